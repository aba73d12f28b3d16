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

/* Memory for a block of patches, and for a kernel beside it. It stays with its thread: to get it anew
 * from the system costs more than to fill it. NULL where there is none. */
static REAL *scratch_memory(const Geometry *s) {
    static _Thread_local REAL *memory;
    static _Thread_local size_t held;
    const int64_t patch = s->kernel_height * s->kernel_width * s->channels;
    const int64_t elements = (samples_of_block(s) * s->rows * s->columns + s->filters) * patch;
    const size_t bytes = (elements * sizeof(REAL) + 63) / 64 * 64;
    if (bytes > held) {
        free(memory);
        memory = aligned_alloc(64, bytes);
        held = memory ? bytes : 0;
    }
    return memory;
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

int convolution(const Geometry *s, Gemm *gemm, REAL *images, REAL *kernels,
                      REAL *outputs) {
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

/* For every row and channel of an item: `c` is the channel, `i` the element's index. */
#define EACH(from, to, statement)                                                                  \
    for (int64_t row = from; row < to; row++) {                                                    \
        _Pragma("omp simd") for (int64_t c = low; c < high; c++) {                                 \
            const int64_t i = row * channels + c;                                                  \
            statement;                                                                             \
        }                                                                                          \
    }

/* totals[c] = the sum over rows of `term`, in short runs, so that rounding does not grow with the
 * rows. */
#define COLUMN_SUMS(totals, term)                                                                  \
    do {                                                                                           \
        memset(totals + low, 0, (high - low) * sizeof(REAL));                                      \
        for (int64_t first = 0; first < rows; first += RUN) {                                      \
            const int64_t last = first + RUN < rows ? first + RUN : rows;                          \
            memset(part + low, 0, (high - low) * sizeof(REAL));                                    \
            EACH(first, last, part[c] += (term));                                                  \
            for (int64_t c = low; c < high; c++)                                                   \
                totals[c] += part[c];                                                              \
        }                                                                                          \
    } while (0)
#define RUN 64

#define AFFINE                                                                                     \
    for (int64_t c = low; c < high; c++) {                                                         \
        w[c] = all_w ? all_w[group * channels + c] : 1;                                            \
        b[c] = all_b ? all_b[group * channels + c] : 0;                                            \
    }

/* Items that threads take: a group, or where these are few a cache line of its channels. A channel
 * is computed alike in both. */
#define LINE 16
#define WIDTH (layout->groups < layout->threads ? LINE : channels)

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

/* Whether the rectifier passes z: as it is written, what is not a number passes. */
#define PASSES(z) (!((z) <= lowest))
#define LOWEST (layout->relu ? 0 : -(REAL)INFINITY)

/* x, out, y (groups, rows, channels); w, b, scale (groups, channels). */
int normalise(const Layout *layout, const REAL *restrict all_x, const REAL *all_w,
              const REAL *all_b, REAL *restrict all_out, REAL *restrict all_y,
              REAL *restrict all_scale) {
    const int64_t rows = layout->rows, channels = layout->channels;
    const int64_t width = WIDTH, ranges = (channels + width - 1) / width;
    const REAL lowest = LOWEST;
    int failed = 0;
#pragma omp parallel num_threads(layout->threads) reduction(| : failed)
    {
        REAL *const scratch = malloc(4 * channels * sizeof(REAL));
        failed = scratch == NULL;
#pragma omp for
        for (int64_t item = 0; item < layout->groups * ranges; item++) {
            if (scratch == NULL)
                continue;
            const int64_t group = item / ranges, low = item % ranges * width;
            const int64_t high = low + width < channels ? low + width : channels;
            REAL *restrict part = scratch, *restrict mean = part + channels;
            REAL *restrict w = mean + channels, *restrict b = w + channels;
            const REAL *restrict x = all_x + group * rows * channels;
            REAL *restrict out = all_out + group * rows * channels;
            REAL *restrict y = all_y + group * rows * channels;
            REAL *restrict scale = all_scale + group * channels;
            AFFINE
            COLUMN_SUMS(mean, x[i]);
            for (int64_t c = low; c < high; c++)
                mean[c] /= rows;
            COLUMN_SUMS(scale, (x[i] - mean[c]) * (x[i] - mean[c]));
            for (int64_t c = low; c < high; c++)
                scale[c] = 1 / SQRT(scale[c] / rows + (REAL)layout->eps);
            EACH(0, rows, const REAL standard = (x[i] - mean[c]) * scale[c];
                 const REAL z = w[c] * standard + b[c];
                 y[i] = standard; out[i] = PASSES(z) ? z : 0);
        }
        free(scratch);
    }
    return failed;
}

/* The derivatives of `normalise`, transposed. With h = to_out where z passes, and 0 elsewhere,
 *
 *   to_b = sum h;  to_w = sum h y
 *   to_x = scale (k - mean k - y mean(k y)) + y through,  k = w h + to_y
 *
 * to_y (groups, rows, channels) and through (groups, channels), what arrives by way of y and of
 * scale, may be NULL (0), and so may to_out. */
int normalise_backward(const Layout *layout, const REAL *all_to_out, const REAL *all_to_y,
                       const REAL *all_through, const REAL *restrict all_y,
                       const REAL *restrict all_scale, const REAL *all_w, const REAL *all_b,
                       REAL *restrict all_to_x, REAL *restrict all_to_w, REAL *restrict all_to_b) {
    const int64_t rows = layout->rows, channels = layout->channels;
    const int64_t width = WIDTH, ranges = (channels + width - 1) / width;
    const REAL lowest = LOWEST;
    int failed = 0;
#pragma omp parallel num_threads(layout->threads) reduction(| : failed)
    {
        REAL *const scratch = malloc(6 * channels * sizeof(REAL));
        failed = scratch == NULL;
#pragma omp for
        for (int64_t item = 0; item < layout->groups * ranges; item++) {
            if (scratch == NULL)
                continue;
            const int64_t group = item / ranges, low = item % ranges * width;
            const int64_t high = low + width < channels ? low + width : channels;
            REAL *restrict part = scratch, *restrict w = part + channels;
            REAL *restrict b = w + channels, *restrict through = b + channels;
            REAL *restrict k = through + channels, *restrict k_y = k + channels;
            const int64_t at = group * rows * channels, few = group * channels;
            const REAL *restrict y = all_y + at, *restrict scale = all_scale + few;
            REAL *restrict to_x = all_to_x + at; /* holds k until its means are known */
            REAL *restrict to_w = all_to_w + few, *restrict to_b = all_to_b + few;
            AFFINE
            for (int64_t c = low; c < high; c++)
                through[c] = all_through ? all_through[few + c] : 0;
            if (all_to_out) {
                const REAL *restrict to_out = all_to_out + at;
                EACH(0, rows, const REAL h = to_out[i];
                     to_x[i] = PASSES(w[c] * y[i] + b[c]) ? h : 0);
            } else
                EACH(0, rows, to_x[i] = 0);
            COLUMN_SUMS(to_b, to_x[i]);
            COLUMN_SUMS(to_w, to_x[i] * y[i]);
            if (all_to_y) {
                const REAL *restrict to_y = all_to_y + at;
                EACH(0, rows, to_x[i] = w[c] * to_x[i] + to_y[i]);
                COLUMN_SUMS(k, to_x[i]);
                COLUMN_SUMS(k_y, to_x[i] * y[i]);
            } else {
                for (int64_t c = low; c < high; c++) {
                    k[c] = w[c] * to_b[c];
                    k_y[c] = w[c] * to_w[c];
                }
            }
            for (int64_t c = low; c < high; c++) {
                w[c] = all_to_y ? 1 : w[c];
                k[c] /= rows;
                k_y[c] /= rows;
            }
            EACH(0, rows, to_x[i] = scale[c] * (w[c] * to_x[i] - k[c] - y[i] * k_y[c]) + y[i] * through[c]);
        }
        free(scratch);
    }
    return failed;
}

/* The derivatives, transposed, of `normalise_backward` without to_y and through, of u, v_w and v_b
 * that arrive at to_x, to_w and to_b (the latter two may be NULL: 0):
 *
 *   to_to_out = w scale (u - mean u - y mean(u y)) + v_b + y v_w  where z passes, and 0 elsewhere
 *   to_y = v_w h - w scale (u mean(h y) + h mean(u y))
 *   to_scale = w sum h (u - mean u - y mean(u y));  to_w = scale of the same sum */
int normalise_twice(const Layout *layout, const REAL *restrict all_u, const REAL *all_v_w,
                    const REAL *all_v_b, const REAL *restrict all_to_out,
                    const REAL *restrict all_y, const REAL *restrict all_scale, const REAL *all_w,
                    const REAL *all_b, const REAL *restrict all_h_y, REAL *restrict all_to_to_out,
                    REAL *restrict all_to_y, REAL *restrict all_to_scale,
                    REAL *restrict all_to_w) {
    const int64_t rows = layout->rows, channels = layout->channels;
    const int64_t width = WIDTH, ranges = (channels + width - 1) / width;
    const REAL lowest = LOWEST;
    int failed = 0;
#pragma omp parallel num_threads(layout->threads) reduction(| : failed)
    {
        REAL *const scratch = malloc(8 * channels * sizeof(REAL));
        failed = scratch == NULL;
#pragma omp for
        for (int64_t item = 0; item < layout->groups * ranges; item++) {
            if (scratch == NULL)
                continue;
            const int64_t group = item / ranges, low = item % ranges * width;
            const int64_t high = low + width < channels ? low + width : channels;
            REAL *restrict part = scratch, *restrict w = part + channels;
            REAL *restrict b = w + channels, *restrict v_w = b + channels;
            REAL *restrict v_b = v_w + channels, *restrict mean = v_b + channels;
            REAL *restrict u_y = mean + channels, *restrict size = u_y + channels;
            const int64_t at = group * rows * channels, few = group * channels;
            const REAL *restrict u = all_u + at, *restrict to_out = all_to_out + at;
            const REAL *restrict y = all_y + at, *restrict scale = all_scale + few;
            const REAL *restrict h_y = all_h_y + few; /* a sum */
            REAL *restrict to_to_out = all_to_to_out + at, *restrict to_y = all_to_y + at;
            REAL *restrict to_scale = all_to_scale + few, *restrict to_w = all_to_w + few;
            AFFINE
            COLUMN_SUMS(mean, u[i]);
            COLUMN_SUMS(u_y, u[i] * y[i]);
            for (int64_t c = low; c < high; c++) {
                v_w[c] = all_v_w ? all_v_w[few + c] : 0;
                v_b[c] = all_v_b ? all_v_b[few + c] : 0;
                mean[c] /= rows;
                u_y[c] /= rows;
                size[c] = w[c] * scale[c];
            }
            const REAL share = (REAL)1 / rows;
            memset(to_scale + low, 0, (high - low) * sizeof(REAL));
            for (int64_t first = 0; first < rows; first += RUN) {
                const int64_t last = first + RUN < rows ? first + RUN : rows;
                memset(part + low, 0, (high - low) * sizeof(REAL));
                EACH(first, last,
                     const REAL z = w[c] * y[i] + b[c]; const REAL arriving = to_out[i];
                     const REAL h = PASSES(z) ? arriving : 0;
                     const REAL centred = u[i] - mean[c] - y[i] * u_y[c];
                     const REAL to_h = size[c] * centred + v_b[c] + y[i] * v_w[c];
                     to_to_out[i] = PASSES(z) ? to_h : 0;
                     to_y[i] = v_w[c] * h - size[c] * (u[i] * h_y[c] * share + h * u_y[c]);
                     part[c] += h * centred);
                for (int64_t c = low; c < high; c++)
                    to_scale[c] += part[c];
            }
            for (int64_t c = low; c < high; c++) {
                to_w[c] = scale[c] * to_scale[c];
                to_scale[c] *= w[c];
            }
        }
        free(scratch);
    }
    return failed;
}
