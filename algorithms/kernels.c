/* The work of the batched engine's layers that torch has no operator for: convolutions in which
 * every task has its own kernel, and batch normalisation within each task, each differentiable
 * twice (algorithms/kernels.py, which builds this, says what each function computes).
 *
 * Threads take whole tasks, or parts of them that are always the same, so that a task's patches and
 * activations stay in a core's cache, and results do not depend on the number of threads.
 *
 * Built once for each type, REAL. Matrices are row-major; the BLAS, which takes columns, sees their
 * transposes. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Elements of a block of patches: they and what they are multiplied with fit a core's L2 cache. */
#define BLOCK 131072

/* Parts of a meta-batch that threads take: at least so many where there is enough to do. */
#define PARTS 16

#define SQRT(value) (sizeof(REAL) == sizeof(float) ? sqrtf(value) : sqrt(value))

typedef struct {
    int64_t threads;
    int64_t tasks, samples; /* samples of each task */
    int64_t height, width, channels;
    int64_t rows, columns, filters; /* places of the window, and its kernels */
    int64_t kernel_height, kernel_width, stride_y, stride_x, dilation_y, dilation_x, top, left;
    int64_t shared; /* one kernel for all tasks */
} Geometry;

typedef void Gemm(const char *, const char *, const int *, const int *, const int *,
                        const REAL *, const REAL *, const int *, const REAL *, const int *,
                        const REAL *, REAL *, const int *);

/* Patches of `count` samples: (count, rows, columns, kernel_height, kernel_width, channels). */
static void patches(const Geometry *s, int64_t count, const REAL *images, REAL *out) {
    const int64_t line = s->kernel_width * s->channels;
    for (int64_t n = 0; n < count; n++, images += s->height * s->width * s->channels)
        for (int64_t r = 0; r < s->rows; r++)
            for (int64_t c = 0; c < s->columns; c++)
                for (int64_t i = 0; i < s->kernel_height; i++, out += line) {
                    const int64_t y = r * s->stride_y + i * s->dilation_y - s->top;
                    const int64_t x = c * s->stride_x - s->left;
                    if (y < 0 || y >= s->height) {
                        memset(out, 0, line * sizeof(REAL));
                        continue;
                    }
                    const REAL *row = images + y * s->width * s->channels;
                    if (s->dilation_x == 1 && x >= 0 && x + s->kernel_width <= s->width) {
                        memcpy(out, row + x * s->channels, line * sizeof(REAL));
                        continue;
                    }
                    for (int64_t j = 0; j < s->kernel_width; j++) {
                        const int64_t at = x + j * s->dilation_x;
                        REAL *to = out + j * s->channels;
                        if (at < 0 || at >= s->width)
                            memset(to, 0, s->channels * sizeof(REAL));
                        else
                            memcpy(to, row + at * s->channels, s->channels * sizeof(REAL));
                    }
                }
}

/* The transpose of `patches`: each pixel the sum of the patch elements that it is in. */
static void from_patches(const Geometry *s, int64_t count, const REAL *in, REAL *images) {
    const int64_t line = s->kernel_width * s->channels;
    const int64_t size = s->height * s->width * s->channels;
    memset(images, 0, count * size * sizeof(REAL));
    for (int64_t n = 0; n < count; n++, images += size)
        for (int64_t r = 0; r < s->rows; r++)
            for (int64_t c = 0; c < s->columns; c++)
                for (int64_t i = 0; i < s->kernel_height; i++, in += line) {
                    const int64_t y = r * s->stride_y + i * s->dilation_y - s->top;
                    if (y < 0 || y >= s->height)
                        continue;
                    for (int64_t j = 0; j < s->kernel_width; j++) {
                        const int64_t x = c * s->stride_x + j * s->dilation_x - s->left;
                        if (x < 0 || x >= s->width)
                            continue;
                        REAL *pixel = images + (y * s->width + x) * s->channels;
                        const REAL *from = in + j * s->channels;
                        for (int64_t k = 0; k < s->channels; k++)
                            pixel[k] += from[k];
                    }
                }
}

/* Samples of which the patches make a block. */
static int64_t samples_of_block(const Geometry *s) {
    const int64_t patch = s->kernel_height * s->kernel_width * s->channels;
    const int64_t samples = BLOCK / (s->rows * s->columns * patch);
    return samples < 1 ? 1 : samples < s->samples ? samples : s->samples;
}

static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static pthread_key_t scratch;

static void make_scratch(void) { pthread_key_create(&scratch, free); }

/* Memory for a block of patches, and for a kernel beside it, after a line that says how much it is.
 * It stays with its thread, and ends with it: to get it anew from the system costs more than to fill
 * it. NULL where there is none. */
static REAL *scratch_memory(const Geometry *s) {
    const int64_t patch = s->kernel_height * s->kernel_width * s->channels;
    const int64_t elements = (samples_of_block(s) * s->rows * s->columns + s->filters) * patch;
    const size_t line = 64, bytes = line + (elements * sizeof(REAL) + line - 1) / line * line;
    pthread_once(&scratch_once, make_scratch);
    size_t *held = pthread_getspecific(scratch);
    if (held == NULL || *held < bytes) {
        free(held);
        held = aligned_alloc(line, bytes);
        pthread_setspecific(scratch, held);
        if (held == NULL)
            return NULL;
        *held = bytes;
    }
    return (REAL *)((char *)held + line);
}

enum { FORWARD, TO_IMAGES, TO_KERNELS };

/* The three maps of a convolution, which are each other's derivatives.
 *
 *   images  (tasks * samples, height, width, channels)
 *   kernels (tasks, filters, kernel_height, kernel_width, channels)
 *   outputs (tasks * samples, rows, columns, filters)
 *
 * Each map fills the one of the three that it is named after from the two others. Returns 0, or 1
 * where there is no memory. */
static int convolve(int map, const Geometry *s, Gemm *gemm, REAL *images, REAL *kernels,
                    REAL *outputs) {
    const int patch = s->kernel_height * s->kernel_width * s->channels, filters = s->filters;
    const int64_t places = s->rows * s->columns, block = samples_of_block(s);
    const int64_t image = s->height * s->width * s->channels;
    const int64_t blocks = (s->samples + block - 1) / block;
    /* Few tasks are cut, always alike, so that the number of threads does not matter. */
    const int64_t wanted = (PARTS + s->tasks - 1) / s->tasks;
    const int64_t parts = map != TO_KERNELS || wanted > blocks ? blocks : wanted;
    const REAL zero = 0, one = 1;
    const int narrow = patch < filters; /* the BLAS is slow to make few columns */
    REAL *partial = NULL;
    int failed = 0;
    if (map == TO_KERNELS && parts > 1) {
        partial = malloc(s->tasks * parts * filters * patch * sizeof(REAL));
        if (partial == NULL)
            return 1;
    }
#pragma omp parallel num_threads(s->threads) reduction(| : failed)
    {
        REAL *buffer = scratch_memory(s), *transposed = buffer + block * places * patch;
        failed = buffer == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < s->tasks * parts; item++) {
            if (buffer == NULL)
                continue;
            const int64_t task = item / parts, part = item % parts;
            const int64_t last = blocks * (part + 1) / parts, start = blocks * part / parts;
            REAL *kernel = kernels + (s->shared ? 0 : task * filters * patch);
            if (partial)
                kernel = partial + item * filters * patch;
            for (int64_t b = start; b < last; b++) {
                const int64_t first = b * block;
                const int64_t count = s->samples - first < block ? s->samples - first : block;
                const int64_t at = task * s->samples + first;
                const int rows = count * places;
                REAL *in = images + at * image, *out = outputs + at * places * filters;
                if (map != TO_IMAGES)
                    patches(s, count, in, buffer);
                if (map == FORWARD)
                    gemm("T", "N", &filters, &rows, &patch, &one, kernel, &patch, buffer, &patch,
                         &zero, out, &filters);
                else if (map == TO_KERNELS && narrow)
                    gemm("N", "T", &filters, &patch, &rows, &one, out, &filters, buffer, &patch,
                         b > start ? &one : &zero, transposed, &filters);
                else if (map == TO_KERNELS)
                    gemm("N", "T", &patch, &filters, &rows, &one, buffer, &patch, out, &filters,
                         b > start ? &one : &zero, kernel, &patch);
                else {
                    gemm("N", "N", &patch, &rows, &filters, &one, kernel, &patch, out, &filters,
                         &zero, buffer, &patch);
                    from_patches(s, count, buffer, in);
                }
            }
            if (map == TO_KERNELS && narrow)
                for (int64_t f = 0; f < filters; f++)
                    for (int64_t k = 0; k < patch; k++)
                        kernel[f * patch + k] = transposed[k * filters + f];
        }
        if (partial) {
#pragma omp for
            for (int64_t task = 0; task < s->tasks; task++)
                for (int64_t part = 0; part < parts; part++)
                    for (int64_t k = 0; k < filters * patch; k++)
                        kernels[task * filters * patch + k] =
                            (part ? kernels[task * filters * patch + k] : 0) +
                            partial[(task * parts + part) * filters * patch + k];
        }
    }
    free(partial);
    return failed;
}

int convolution(const Geometry *s, Gemm *gemm, REAL *images, REAL *kernels, REAL *outputs) {
    return convolve(FORWARD, s, gemm, images, kernels, outputs);
}

int convolution_to_images(const Geometry *s, Gemm *gemm, REAL *images, REAL *kernels,
                          REAL *outputs) {
    return convolve(TO_IMAGES, s, gemm, images, kernels, outputs);
}

int convolution_to_kernels(const Geometry *s, Gemm *gemm, REAL *images, REAL *kernels,
                           REAL *outputs) {
    return convolve(TO_KERNELS, s, gemm, images, kernels, outputs);
}

/* Groups of rows (groups, rows, channels), normalised within each group and channel, then scaled,
 * shifted and rectified:
 *
 *   y = (x - mean x) * scale,  scale = 1 / sqrt(variance x + eps);  z = w y + b;  out = relu z
 *
 * Means are over rows. w and b may be NULL (1 and 0), and relu is applied where asked for. */
typedef struct {
    int64_t threads, groups, rows, channels, relu;
    double eps;
} Layout;

/* What the functions below read and fill: (groups, rows, channels) or (groups, channels). */
typedef struct {
    const REAL *x, *w, *b, *to_out, *to_y, *through, *u, *v_w, *v_b, *sum_h_y;
    REAL *out, *y, *scale, *to_x, *to_w, *to_b, *to_to_out, *to_standard, *to_scale;
} Tensors;

/* An item, which a thread takes whole: some channels of a group. */
typedef struct {
    int64_t group, low, high;
    REAL *vectors; /* VECTORS of them, of `channels` elements each */
} Item;

#define VECTORS 10
#define LINE 16 /* channels of an item where groups are few */
#define RUN 64  /* rows that are summed at once, so that rounding does not grow with the rows */

typedef void Function(const Layout *, const Tensors *, const Item *);

static int for_every_item(Function *function, const Layout *layout, const Tensors *tensors) {
    const int64_t channels = layout->channels;
    const int64_t width = layout->groups < layout->threads ? LINE : channels;
    const int64_t ranges = (channels + width - 1) / width;
    int failed = 0;
#pragma omp parallel num_threads(layout->threads) reduction(| : failed)
    {
        REAL *vectors = malloc(VECTORS * channels * sizeof(REAL));
        failed = vectors == NULL;
#pragma omp for
        for (int64_t i = 0; i < layout->groups * ranges; i++) {
            const int64_t low = i % ranges * width;
            const int64_t high = low + width < channels ? low + width : channels;
            const Item item = {i / ranges, low, high, vectors};
            if (vectors != NULL)
                function(layout, tensors, &item);
        }
        free(vectors);
    }
    return failed;
}

/* The names that an item's function uses: p_1 and p_2 are for sums, v_1 to v_6 free. */
#define ITEM                                                                                       \
    const int64_t rows = layout->rows, channels = layout->channels;                                \
    const int64_t low = item->low, high = item->high, few = item->group * channels;                \
    const int64_t at = few * rows;                                                                 \
    const REAL share = (REAL)1 / rows, lowest = layout->relu ? 0 : (REAL)NAN;                      \
    REAL *restrict p_1 = item->vectors, *restrict p_2 = p_1 + channels;                            \
    REAL *restrict w = p_2 + channels, *restrict b = w + channels;                                 \
    REAL *restrict v_1 = b + channels, *restrict v_2 = v_1 + channels;                             \
    REAL *restrict v_3 = v_2 + channels, *restrict v_4 = v_3 + channels;                           \
    REAL *restrict v_5 = v_4 + channels, *restrict v_6 = v_5 + channels;                           \
    EACH_CHANNEL(w[c] = t->w ? t->w[few + c] : 1; b[c] = t->b ? t->b[few + c] : 0)                 \
    (void)p_1, (void)p_2, (void)v_1, (void)v_2, (void)v_3, (void)v_4, (void)v_5, (void)v_6;        \
    (void)share, (void)lowest, (void)at

#define EACH_CHANNEL(statement)                                                                    \
    for (int64_t c = low; c < high; c++) {                                                         \
        statement;                                                                                 \
    }

/* `c` is an element's channel, `i` its index. */
#define EACH(from, to, statement)                                                                  \
    for (int64_t row = from; row < to; row++) {                                                    \
        _Pragma("omp simd") for (int64_t c = low; c < high; c++) {                                 \
            const int64_t i = row * channels + c;                                                  \
            statement;                                                                             \
        }                                                                                          \
    }

/* A pass in runs: `statement` adds to p_1[c] and p_2[c], what they came to is taken at the end of
 * each run of `count` rows from `first`. */
#define IN_RUNS(statement, at_the_end)                                                             \
    for (int64_t first = 0; first < rows; first += RUN) {                                          \
        const int64_t count = rows - first < RUN ? rows - first : RUN;                             \
        EACH_CHANNEL(p_1[c] = 0; p_2[c] = 0)                                                       \
        EACH(first, first + count, statement)                                                      \
        at_the_end;                                                                                \
    }

#define TWO_SUMS(sum_1, sum_2, statement)                                                          \
    EACH_CHANNEL(sum_1[c] = 0; sum_2[c] = 0)                                                       \
    IN_RUNS(statement, EACH_CHANNEL(sum_1[c] += p_1[c]; sum_2[c] += p_2[c]))

/* Whether the rectifier passes z: as it is written, what is not a number passes, and without a
 * rectifier, when `lowest` is none, everything does, also what has overflowed. */
#define PASSES(z) (!((z) <= lowest))

static void normalise_item(const Layout *layout, const Tensors *t, const Item *item) {
    ITEM;
    const REAL *restrict x = t->x + at;
    REAL *restrict out = t->out + at, *restrict scale = t->scale + few;
    REAL *restrict mean = v_1, *restrict squares = v_2; /* of what is about the mean */
    EACH_CHANNEL(mean[c] = 0; squares[c] = 0)
    /* Runs are joined as by Chan et al. 1979: exact, and each is read from memory once. */
    IN_RUNS(
        p_1[c] += x[i],
        EACH_CHANNEL(p_1[c] /= count)
        EACH(first, first + count, p_2[c] += (x[i] - p_1[c]) * (x[i] - p_1[c]))
        EACH_CHANNEL(
            const REAL away = p_1[c] - mean[c]; const REAL part = (REAL)count / (first + count);
            mean[c] += away * part;
            squares[c] += p_2[c] + away * away * part * first))
    EACH_CHANNEL(scale[c] = 1 / SQRT(squares[c] * share + (REAL)layout->eps))
    if (t->y) {
        REAL *restrict y = t->y + at;
        EACH(0, rows, const REAL standard = (x[i] - mean[c]) * scale[c];
             const REAL z = w[c] * standard + b[c]; y[i] = standard; out[i] = PASSES(z) ? z : 0)
    } else
        EACH(0, rows, const REAL z = w[c] * ((x[i] - mean[c]) * scale[c]) + b[c];
             out[i] = PASSES(z) ? z : 0)
}

/* Fills out, scale and, unless it is NULL, y from x. */
int normalise(const Layout *layout, const Tensors *tensors) {
    return for_every_item(normalise_item, layout, tensors);
}

static void normalise_backward_item(const Layout *layout, const Tensors *t, const Item *item) {
    ITEM;
    const REAL *restrict y = t->y + at, *restrict scale = t->scale + few;
    REAL *restrict to_x = t->to_x + at; /* holds h, then k, until their means are known */
    REAL *restrict sum_h = t->to_b + few, *restrict sum_h_y = t->to_w + few;
    REAL *restrict mean_k = v_1, *restrict mean_k_y = v_2;
    REAL *restrict factor = v_3, *restrict through = v_4;
    if (t->to_out) {
        const REAL *restrict to_out = t->to_out + at;
        TWO_SUMS(sum_h, sum_h_y, const REAL arriving = to_out[i];
                 const REAL h = PASSES(w[c] * y[i] + b[c]) ? arriving : 0;
                 to_x[i] = h; p_1[c] += h; p_2[c] += h * y[i])
    } else {
        EACH(0, rows, to_x[i] = 0)
        EACH_CHANNEL(sum_h[c] = 0; sum_h_y[c] = 0)
    }
    if (t->to_y) {
        const REAL *restrict to_y = t->to_y + at;
        TWO_SUMS(mean_k, mean_k_y, const REAL k = w[c] * to_x[i] + to_y[i];
                 to_x[i] = k; p_1[c] += k; p_2[c] += k * y[i])
        EACH_CHANNEL(factor[c] = scale[c])
    } else
        EACH_CHANNEL(mean_k[c] = w[c] * sum_h[c]; mean_k_y[c] = w[c] * sum_h_y[c];
                     factor[c] = w[c] * scale[c])
    EACH_CHANNEL(mean_k[c] *= share * scale[c];
                 through[c] = (t->through ? t->through[few + c] : 0) - mean_k_y[c] * share * scale[c])
    EACH(0, rows, to_x[i] = factor[c] * to_x[i] - mean_k[c] + y[i] * through[c])
}

/* The derivatives of `normalise`, transposed. With h = to_out where z passes, and 0 elsewhere,
 *
 *   to_b = sum h;  to_w = sum h y
 *   to_x = scale (k - mean k - y mean(k y)) + y through,  k = w h + to_y
 *
 * to_out, to_y and through, what arrives by way of out, y and scale, may be NULL (0). */
int normalise_backward(const Layout *layout, const Tensors *tensors) {
    return for_every_item(normalise_backward_item, layout, tensors);
}

static void normalise_twice_item(const Layout *layout, const Tensors *t, const Item *item) {
    ITEM;
    const REAL *restrict u = t->u + at, *restrict to_out = t->to_out + at;
    const REAL *restrict y = t->y + at, *restrict scale = t->scale + few;
    REAL *restrict to_to_out = t->to_to_out + at, *restrict to_standard = t->to_standard + at;
    REAL *restrict to_scale = t->to_scale + few, *restrict to_w = t->to_w + few;
    REAL *restrict mean_u = v_1, *restrict mean_u_y = v_2, *restrict size = v_3;
    REAL *restrict v_w = v_4, *restrict mean_h_y = v_5, *restrict v_b = v_6;
    TWO_SUMS(mean_u, mean_u_y, p_1[c] += u[i]; p_2[c] += u[i] * y[i])
    EACH_CHANNEL(mean_u[c] *= share; mean_u_y[c] *= share; size[c] = w[c] * scale[c];
                 mean_h_y[c] = t->sum_h_y[few + c] * share;
                 v_w[c] = t->v_w ? t->v_w[few + c] : 0;
                 v_b[c] = t->v_b ? t->v_b[few + c] : 0; to_scale[c] = 0)
    IN_RUNS(
        const REAL z = w[c] * y[i] + b[c]; const REAL arriving = to_out[i];
        const REAL h = PASSES(z) ? arriving : 0;
        const REAL centred = u[i] - mean_u[c] - y[i] * mean_u_y[c];
        const REAL to_h = size[c] * centred + v_b[c] + y[i] * v_w[c];
        to_to_out[i] = PASSES(z) ? to_h : 0;
        to_standard[i] = v_w[c] * h - size[c] * (u[i] * mean_h_y[c] + h * mean_u_y[c]);
        p_1[c] += h * centred,
        EACH_CHANNEL(to_scale[c] += p_1[c]))
    EACH_CHANNEL(to_w[c] = scale[c] * to_scale[c]; to_scale[c] *= w[c])
}

/* The derivatives, transposed, of `normalise_backward` without to_y and through, of u, v_w and v_b
 * that arrive at to_x, to_w and to_b (the latter two may be NULL: 0):
 *
 *   to_to_out = w scale (u - mean u - y mean(u y)) + v_b + y v_w  where z passes, and 0 elsewhere
 *   to_standard, to y, = v_w h - w scale (u mean(h y) + h mean(u y))
 *   to_scale = w sum h (u - mean u - y mean(u y));  to_w = scale of the same sum */
int normalise_twice(const Layout *layout, const Tensors *tensors) {
    return for_every_item(normalise_twice_item, layout, tensors);
}
