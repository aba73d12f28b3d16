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

/* Patches of the lines of places from `first` to `last`, samples one after another: (lines, columns,
 * kernel_height, kernel_width, channels). */
static void patches(const Geometry *s, int64_t first, int64_t last, const REAL *images, REAL *out) {
    const int64_t line = s->kernel_width * s->channels, size = s->height * s->width * s->channels;
    for (int64_t l = first; l < last; l++)
        for (int64_t c = 0; c < s->columns; c++)
            for (int64_t i = 0; i < s->kernel_height; i++, out += line) {
                const int64_t y = l % s->rows * s->stride_y + i * s->dilation_y - s->top;
                const int64_t x = c * s->stride_x - s->left;
                if (y < 0 || y >= s->height) {
                    memset(out, 0, line * sizeof(REAL));
                    continue;
                }
                const REAL *row = images + l / s->rows * size + y * s->width * s->channels;
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

/* The transpose of `patches`: each pixel the sum of the patch elements that it is in. The lines of a
 * sample come in order, and its first clears it. */
static void from_patches(const Geometry *s, int64_t first, int64_t last, const REAL *in,
                         REAL *images) {
    const int64_t line = s->kernel_width * s->channels, size = s->height * s->width * s->channels;
    for (int64_t l = first; l < last; l++) {
        REAL *image = images + l / s->rows * size;
        if (l % s->rows == 0)
            memset(image, 0, size * sizeof(REAL));
        for (int64_t c = 0; c < s->columns; c++)
            for (int64_t i = 0; i < s->kernel_height; i++, in += line) {
                const int64_t y = l % s->rows * s->stride_y + i * s->dilation_y - s->top;
                if (y < 0 || y >= s->height)
                    continue;
                for (int64_t j = 0; j < s->kernel_width; j++) {
                    const int64_t x = c * s->stride_x + j * s->dilation_x - s->left;
                    if (x < 0 || x >= s->width)
                        continue;
                    REAL *pixel = image + (y * s->width + x) * s->channels;
                    const REAL *from = in + j * s->channels;
                    for (int64_t k = 0; k < s->channels; k++)
                        pixel[k] += from[k];
                }
            }
    }
}

/* Lines of places of which the patches make a block. */
static int64_t lines_of_block(const Geometry *s) {
    const int64_t patch = s->kernel_height * s->kernel_width * s->channels;
    const int64_t lines = BLOCK / (s->columns * patch), all = s->samples * s->rows;
    return lines < 1 ? 1 : lines < all ? lines : all;
}

static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static pthread_key_t scratch;

static void make_scratch(void) { pthread_key_create(&scratch, free); }

/* Memory for a block of patches, and for a kernel beside it, after a line that says how much it is.
 * It stays with its thread, and ends with it: to get it anew from the system costs more than to fill
 * it. NULL where there is none. */
static REAL *scratch_memory(const Geometry *s) {
    const int64_t patch = s->kernel_height * s->kernel_width * s->channels;
    const int64_t elements = (lines_of_block(s) * s->columns + s->filters) * patch;
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
    const int64_t limit = lines_of_block(s), line = s->columns * filters;
    const int64_t image = s->height * s->width * s->channels;
    /* Few tasks are cut, always alike, so that the number of threads does not matter; lines that add
     * to the same pixels are not. */
    const int64_t unit = map == TO_IMAGES ? s->rows : 1, units = s->samples * s->rows / unit;
    const int64_t wanted = (PARTS + s->tasks - 1) / s->tasks;
    const int64_t large = s->samples * s->rows * s->columns * patch / (BLOCK / 2);
    const int64_t enough = wanted < large ? wanted : large > 1 ? large : 1;
    const int64_t parts = enough < units ? enough : units;
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
        REAL *buffer = scratch_memory(s), *transposed = buffer + limit * s->columns * patch;
        failed = buffer == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < s->tasks * parts; item++) {
            if (buffer == NULL)
                continue;
            const int64_t task = item / parts, part = item % parts;
            const int64_t start = units * part / parts * unit;
            const int64_t lines = units * (part + 1) / parts * unit - start;
            const int64_t blocks = (lines + limit - 1) / limit;
            REAL *in = images + task * s->samples * image;
            REAL *kernel = kernels + (s->shared ? 0 : task * filters * patch);
            if (partial)
                kernel = partial + item * filters * patch;
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = start + lines * b / blocks;
                const int64_t last = start + lines * (b + 1) / blocks;
                const int rows = (last - first) * s->columns;
                REAL *out = outputs + (task * s->samples * s->rows + first) * line;
                if (map != TO_IMAGES)
                    patches(s, first, last, in, buffer);
                if (map == FORWARD)
                    gemm("T", "N", &filters, &rows, &patch, &one, kernel, &patch, buffer, &patch,
                         &zero, out, &filters);
                else if (map == TO_KERNELS && narrow)
                    gemm("N", "T", &filters, &patch, &rows, &one, out, &filters, buffer, &patch,
                         b > 0 ? &one : &zero, transposed, &filters);
                else if (map == TO_KERNELS)
                    gemm("N", "T", &patch, &filters, &rows, &one, buffer, &patch, out, &filters,
                         b > 0 ? &one : &zero, kernel, &patch);
                else {
                    gemm("N", "N", &patch, &rows, &filters, &one, kernel, &patch, out, &filters,
                         &zero, buffer, &patch);
                    from_patches(s, first, last, buffer, in);
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

/* To images, where the window moves by one: the outputs convolved with the kernels turned about. No
 * sums are scattered then, and lines are of different pixels. */
static int convolve_turned(const Geometry *s, Gemm *gemm, REAL *images, REAL *kernels,
                           REAL *outputs) {
    const int64_t taps = s->kernel_height * s->kernel_width, filters = s->filters;
    const int64_t different = s->shared ? 1 : s->tasks, channels = s->channels;
    REAL *turned = malloc(different * filters * taps * channels * sizeof(REAL));
    if (turned == NULL)
        return 1;
#pragma omp parallel for num_threads(s->threads) collapse(2)
    for (int64_t task = 0; task < different; task++)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t tap = 0; tap < taps; tap++)
                for (int64_t f = 0; f < filters; f++)
                    turned[((task * channels + c) * taps + tap) * filters + f] =
                        kernels[((task * filters + f) * taps + taps - 1 - tap) * channels + c];
    Geometry about = *s;
    about.height = s->rows, about.width = s->columns, about.channels = filters;
    about.rows = s->height, about.columns = s->width, about.filters = channels;
    about.top = s->kernel_height - 1 - s->top, about.left = s->kernel_width - 1 - s->left;
    const int failed = convolve(FORWARD, &about, gemm, outputs, turned, images);
    free(turned);
    return failed;
}

int convolution(const Geometry *s, Gemm *gemm, REAL *images, REAL *kernels, REAL *outputs) {
    return convolve(FORWARD, s, gemm, images, kernels, outputs);
}

int convolution_to_images(const Geometry *s, Gemm *gemm, REAL *images, REAL *kernels,
                          REAL *outputs) {
    if (s->stride_y == 1 && s->stride_x == 1 && s->dilation_y == 1 && s->dilation_x == 1)
        return convolve_turned(s, gemm, images, kernels, outputs);
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
 * Means are over rows. w and b may be NULL (1 and 0), and relu is applied where asked for.
 *
 * Rows may be the pixels of pictures, and the outputs then the highest of each window of them; the
 * windows lie side by side, and what none holds whole goes into none. `window_height` is 0 where
 * outputs are of rows. */
typedef struct {
    int64_t threads, groups, rows, channels, relu;
    int64_t height, width, window_height, window_width;
    double eps;
} Layout;

/* What the functions below read and fill: (groups, rows, channels) or (groups, channels). Of
 * windows, there are (groups, windows, channels) of out, to_out, to_to_out, and of `highest`: y at
 * the place of the output, which is the first of its window where y is that. */
typedef struct {
    const REAL *x, *w, *b, *to_out, *to_y, *through, *u, *v_w, *v_b, *sum_h, *sum_h_y;
    REAL *out, *y, *scale, *highest, *to_x, *to_w, *to_b, *to_to_out, *to_standard, *to_scale;
} Tensors;

/* Sums over rows come first, and what needs them is done in a second pass over the rows. A group may
 * be cut into parts, and each of the parts has sums of its own. */
#define SUMS 4
#define CUT 65536 /* elements of a part, at least, where groups are few */
typedef struct {
    const Layout *layout;
    const Tensors *t;
    int64_t group, first, last; /* the rows of a part */
    int64_t part, parts;        /* which of how many */
    REAL *sums;                 /* (parts, SUMS, channels) of the group */
} Part;

typedef void Pass(const Part *);

/* Rows that no part divides: a picture's, where there are windows. */
static int64_t unit_of(const Layout *layout) {
    return layout->window_height ? layout->height * layout->width : 1;
}

static Part part_of(const Layout *layout, const Tensors *t, int64_t parts, int64_t item, REAL *sums) {
    const int64_t unit = unit_of(layout), units = layout->rows / unit, group = item / parts, part = item % parts;
    return (Part){layout, t, group, units * part / parts * unit, units * (part + 1) / parts * unit,
                  part, parts, sums + group * parts * SUMS * layout->channels};
}

static int in_two_passes(Pass *first, Pass *second, const Layout *layout, const Tensors *t) {
    /* As many whatever the threads, so that these do not matter. */
    int64_t parts = (PARTS + layout->groups - 1) / layout->groups;
    if (parts > layout->rows * layout->channels / CUT)
        parts = layout->rows * layout->channels / CUT;
    if (parts > layout->rows / unit_of(layout))
        parts = layout->rows / unit_of(layout);
    if (parts < 1)
        parts = 1;
    const int64_t items = layout->groups * parts;
    REAL *sums = malloc(items * SUMS * layout->channels * sizeof(REAL));
    if (sums == NULL)
        return 1;
#pragma omp parallel num_threads(layout->threads)
    {
#pragma omp for
        for (int64_t item = 0; item < items; item++) {
            const Part part = part_of(layout, t, parts, item, sums);
            first(&part);
            if (parts == 1) /* while its rows are in the cache */
                second(&part);
        }
        if (parts > 1) {
#pragma omp for
            for (int64_t item = 0; item < items; item++) {
                const Part part = part_of(layout, t, parts, item, sums);
                second(&part);
            }
        }
    }
    free(sums);
    return 0;
}

/* Channels are passed in blocks, whose widths the compiler knows but for those of odd widths. */
#define BLOCK_OF_CHANNELS 64
#define INLINE static inline __attribute__((always_inline))
#define PASS(name)                                                                                 \
    static void name(const Part *part) {                                                           \
        for (int64_t low = 0; low < part->layout->channels; low += BLOCK_OF_CHANNELS) {            \
            const int64_t left = part->layout->channels - low;                                     \
            if (left >= BLOCK_OF_CHANNELS)                                                         \
                name##_block(part, low, BLOCK_OF_CHANNELS);                                        \
            else if (left == BLOCK_OF_CHANNELS / 2)                                                \
                name##_block(part, low, BLOCK_OF_CHANNELS / 2);                                    \
            else                                                                                   \
                name##_block(part, low, left);                                                     \
        }                                                                                          \
    }

/* The names that a pass uses. `at` is where the group's rows begin, `at_output` where its outputs
 * do, and `few` where its channels do; a part's outputs are from `first_output` to `last_output`. */
#define NAMES                                                                                      \
    const Layout *layout = part->layout;                                                           \
    const Tensors *t = part->t;                                                                    \
    const int64_t rows = layout->rows, channels = layout->channels;                                \
    const int64_t first = part->first, last = part->last;                                          \
    const int64_t height = layout->height, width = layout->width;                                  \
    const int64_t window_height = layout->window_height, window_width = layout->window_width;      \
    const int64_t pixels = unit_of(layout);                                                        \
    const int64_t outputs =                                                                        \
        window_height ? (height / window_height) * (width / window_width) : 1;                     \
    const int64_t first_output = first / pixels * outputs, last_output = last / pixels * outputs;  \
    const int64_t few = part->group * channels + low, at = few + part->group * channels * (rows - 1); \
    const int64_t at_output = few + part->group * channels * (rows / pixels * outputs - 1);        \
    const REAL share = (REAL)1 / rows, lowest = layout->relu ? 0 : (REAL)NAN;                      \
    REAL w[BLOCK_OF_CHANNELS], b[BLOCK_OF_CHANNELS];                                               \
    EACH_CHANNEL(w[c] = t->w ? t->w[few + c] : 1; b[c] = t->b ? t->b[few + c] : 0)                 \
    (void)w, (void)b, (void)at, (void)share, (void)lowest, (void)first_output, (void)last_output,  \
        (void)at_output

#define EACH_CHANNEL(statement)                                                                    \
    _Pragma("omp simd") for (int64_t c = 0; c < block; c++) { statement; }

/* `c` is an element's channel, `i` its index. */
#define EACH(from, to, statement)                                                                  \
    for (int64_t row = from; row < to; row++) {                                                    \
        _Pragma("omp simd") for (int64_t c = 0; c < block; c++) {                                  \
            const int64_t i = row * channels + c;                                                  \
            (void)i;                                                                               \
            statement;                                                                             \
        }                                                                                          \
    }

/* A pass in runs of rows, so that rounding does not grow with the rows: `statement` adds to the
 * `run`s of sums, and what they came to is taken after each run of `count` rows from `begun`. */
#define RUN 64
#define IN_RUNS(from, to, statement, after)                                                        \
    for (int64_t begun = from; begun < to; begun += RUN) {                                         \
        const int64_t count = to - begun < RUN ? to - begun : RUN;                                 \
        EACH_CHANNEL(run_1[c] = run_2[c] = run_3[c] = 0)                                           \
        EACH(begun, begun + count, statement)                                                      \
        after;                                                                                     \
    }

/* Sums of a part: made of runs, kept, and brought together. */
#define RUNS REAL run_1[BLOCK_OF_CHANNELS], run_2[BLOCK_OF_CHANNELS], run_3[BLOCK_OF_CHANNELS]
#define SUM(k) (part->sums + (part->part * SUMS + k) * channels + low)
#define ADD_RUNS(k)                                                                                \
    EACH_CHANNEL(SUM(k)[c] += run_1[c]; SUM(k + 1)[c] += run_2[c]; run_1[c] = run_2[c] = 0)
#define TOTAL(name, k)                                                                             \
    REAL name[BLOCK_OF_CHANNELS];                                                                  \
    EACH_CHANNEL(name[c] = 0)                                                                      \
    for (int64_t each = 0; each < part->parts; each++)                                             \
    EACH_CHANNEL(name[c] += part->sums[(each * SUMS + k) * channels + low + c])

/* A pass by windows: `before` each, for each channel; `statement` for each element of it; `after`
 * it, where it is `whole`; and at the end of each line of them. Before and after, `i` is the index of
 * the output. */
#define EACH_WINDOW(before, statement, after, at_the_end)                                          \
    for (int64_t picture = first, window = first_output; picture < last; picture += pixels)        \
        for (int64_t top = 0; top < height; top += window_height) {                                \
            for (int64_t left = 0; left < width; left += window_width) {                           \
                const int64_t below = top + window_height, beside = left + window_width;           \
                const int whole = below <= height && beside <= width;                              \
                const int64_t begin = picture + top * width;                                       \
                const int64_t end = picture + (below < height ? below : height) * width;           \
                const int64_t right = beside < width ? beside : width;                             \
                EACH(window, window + 1, before)                                                   \
                for (int64_t line = begin; line < end; line += width)                              \
                    EACH(line + left, line + right, statement)                                     \
                if (whole)                                                                         \
                    EACH(window, window + 1, after)                                                \
                window += whole;                                                                   \
            }                                                                                      \
            at_the_end;                                                                            \
        }

/* Whether the rectifier passes z: as it is written, what is not a number passes, and without a
 * rectifier, when `lowest` is none, everything does, also what has overflowed. */
#define PASSES(z) (!((z) <= lowest))

/* Of a window the first of the highest is taken, and what is not a number before all. */
#define HIGHER(z, than) ((z) > (than) || (z) != (z))

/* What arrives at a window, and the place where; once it is found it is no more looked for. */
#define WINDOW REAL arriving[BLOCK_OF_CHANNELS], place[BLOCK_OF_CHANNELS]
#define LOOK_FOR_PLACE                                                                             \
    arriving[c] = whole && PASSES(w[c] * highest[i] + b[c]) ? to_out[i] : 0;                       \
    place[c] = whole ? highest[i] : (REAL)NAN
#define AT_PLACE(h)                                                                                \
    const int there = y[i] == place[c];                                                            \
    const REAL h = there ? arriving[c] : 0;                                                        \
    place[c] = there ? (REAL)NAN : place[c]

/* The mean of a part, and the sum of squares of what is about it. Runs, and then parts, are joined
 * as by Chan et al. 1979: exact, and each run is read from memory once. */
#define JOIN(mean, squares, of, more_mean, more_squares, more)                                     \
    const REAL away = more_mean - mean;                                                            \
    const REAL weight = (REAL)(more) / (of + more);                                                \
    mean += away * weight;                                                                         \
    squares += more_squares + away * away * weight * of

INLINE void normalise_sums_block(const Part *part, const int64_t low, const int64_t block) {
    NAMES;
    RUNS;
    const REAL *restrict x = t->x + at;
    REAL mean[BLOCK_OF_CHANNELS], squares[BLOCK_OF_CHANNELS];
    EACH_CHANNEL(mean[c] = squares[c] = 0)
    IN_RUNS(first, last, run_1[c] += x[i],
            EACH_CHANNEL(run_1[c] /= count)
            EACH(begun, begun + count, run_2[c] += (x[i] - run_1[c]) * (x[i] - run_1[c]))
            EACH_CHANNEL(JOIN(mean[c], squares[c], (begun - first), run_1[c], run_2[c], count)))
    EACH_CHANNEL(SUM(0)[c] = mean[c]; SUM(1)[c] = squares[c])
}

INLINE void normalise_rest_block(const Part *part, const int64_t low, const int64_t block) {
    NAMES;
    const REAL *restrict x = t->x + at;
    REAL *restrict out = t->out + at_output;
    REAL mean[BLOCK_OF_CHANNELS], squares[BLOCK_OF_CHANNELS], scale[BLOCK_OF_CHANNELS];
    EACH_CHANNEL(mean[c] = squares[c] = 0)
    for (int64_t each = 0; each < part->parts; each++) {
        const Part other = part_of(layout, t, part->parts, part->group * part->parts + each, NULL);
        const REAL *restrict sums = part->sums + each * SUMS * channels + low;
        EACH_CHANNEL(JOIN(mean[c], squares[c], other.first, sums[c], sums[channels + c],
                          (other.last - other.first)))
    }
    EACH_CHANNEL(scale[c] = 1 / SQRT(squares[c] * share + (REAL)layout->eps))
    if (part->part == 0)
        EACH_CHANNEL(t->scale[few + c] = scale[c])
#define STANDARD const REAL standard = (x[i] - mean[c]) * scale[c]; const REAL z = w[c] * standard + b[c]
    REAL top_z[BLOCK_OF_CHANNELS], top_y[BLOCK_OF_CHANNELS];
    if (window_height && t->y) {
        REAL *restrict y = t->y + at, *restrict highest = t->highest + at_output;
        EACH_WINDOW(top_z[c] = top_y[c] = -(REAL)INFINITY,
                    STANDARD; const int higher = HIGHER(z, top_z[c]); y[i] = standard;
                    top_z[c] = higher ? z : top_z[c]; top_y[c] = higher ? standard : top_y[c],
                    out[i] = PASSES(top_z[c]) ? top_z[c] : 0; highest[i] = top_y[c], )
    } else if (window_height) {
        EACH_WINDOW(top_z[c] = -(REAL)INFINITY,
                    STANDARD; top_z[c] = HIGHER(z, top_z[c]) ? z : top_z[c],
                    out[i] = PASSES(top_z[c]) ? top_z[c] : 0, )
    } else if (t->y) {
        REAL *restrict y = t->y + at;
        EACH(first, last, STANDARD; y[i] = standard; out[i] = PASSES(z) ? z : 0)
    } else
        EACH(first, last, STANDARD; out[i] = PASSES(z) ? z : 0)
}

PASS(normalise_sums)
PASS(normalise_rest)

/* Fills out, scale and, unless they are NULL, y and highest from x. */
int normalise(const Layout *layout, const Tensors *tensors) {
    return in_two_passes(normalise_sums, normalise_rest, layout, tensors);
}

INLINE void backward_sums_block(const Part *part, const int64_t low, const int64_t block) {
    NAMES;
    RUNS;
    const REAL *restrict y = t->y + at, *restrict to_out = t->to_out + at_output;
    const REAL *restrict reached = window_height ? t->highest + at_output : y; /* y of outputs */
    EACH_CHANNEL(SUM(0)[c] = SUM(1)[c] = SUM(2)[c] = SUM(3)[c] = 0)
    IN_RUNS(first_output, last_output,
            const REAL h = PASSES(w[c] * reached[i] + b[c]) ? to_out[i] : 0;
            run_1[c] += h; run_2[c] += h * reached[i], ADD_RUNS(0))
    if (t->to_y) {
        const REAL *restrict to_y = t->to_y + at;
        IN_RUNS(first, last, run_1[c] += to_y[i]; run_2[c] += to_y[i] * y[i], ADD_RUNS(2))
    }
}

INLINE void backward_rest_block(const Part *part, const int64_t low, const int64_t block) {
    NAMES;
    const REAL *restrict y = t->y + at, *restrict to_out = t->to_out + at_output;
    REAL *restrict to_x = t->to_x + at;
    TOTAL(sum_h, 0)
    TOTAL(sum_h_y, 1)
    TOTAL(mean_k, 2)
    TOTAL(through, 3)
    if (part->part == 0)
        EACH_CHANNEL(t->to_b[few + c] = sum_h[c]; t->to_w[few + c] = sum_h_y[c])
    REAL scale[BLOCK_OF_CHANNELS], factor[BLOCK_OF_CHANNELS];
    EACH_CHANNEL(
        scale[c] = t->scale[few + c]; factor[c] = w[c] * scale[c];
        mean_k[c] = (mean_k[c] + w[c] * sum_h[c]) * share * scale[c];
        through[c] = (t->through ? t->through[few + c] : 0) -
                     (through[c] + w[c] * sum_h_y[c]) * share * scale[c])
    WINDOW;
    if (window_height && t->to_y) {
        const REAL *restrict to_y = t->to_y + at, *restrict highest = t->highest + at_output;
        EACH_WINDOW(LOOK_FOR_PLACE, AT_PLACE(h); to_x[i] = factor[c] * h + scale[c] * to_y[i] -
                                                           mean_k[c] + y[i] * through[c], , )
    } else if (window_height) {
        const REAL *restrict highest = t->highest + at_output;
        EACH_WINDOW(LOOK_FOR_PLACE,
                    AT_PLACE(h); to_x[i] = factor[c] * h - mean_k[c] + y[i] * through[c], , )
    } else if (t->to_y) {
        const REAL *restrict to_y = t->to_y + at;
        EACH(first, last, const REAL h = PASSES(w[c] * y[i] + b[c]) ? to_out[i] : 0;
             to_x[i] = factor[c] * h + scale[c] * to_y[i] - mean_k[c] + y[i] * through[c])
    } else
        EACH(first, last, const REAL h = PASSES(w[c] * y[i] + b[c]) ? to_out[i] : 0;
             to_x[i] = factor[c] * h - mean_k[c] + y[i] * through[c])
}

PASS(backward_sums)
PASS(backward_rest)

/* The derivatives of `normalise`, transposed. With h = to_out where z passes and, of windows, at the
 * place of the output, and 0 elsewhere,
 *
 *   to_b = sum h;  to_w = sum h y
 *   to_x = scale (k - mean k - y mean(k y)) + y through,  k = w h + to_y
 *
 * to_y and through, what arrives by way of y and scale, may be NULL (0). */
int normalise_backward(const Layout *layout, const Tensors *tensors) {
    return in_two_passes(backward_sums, backward_rest, layout, tensors);
}

INLINE void twice_sums_block(const Part *part, const int64_t low, const int64_t block) {
    NAMES;
    RUNS;
    const REAL *restrict u = t->u + at, *restrict y = t->y + at;
    const REAL *restrict to_out = t->to_out + at_output;
    EACH_CHANNEL(SUM(0)[c] = SUM(1)[c] = SUM(2)[c] = SUM(3)[c] = 0)
#define ADD run_1[c] += u[i]; run_2[c] += u[i] * y[i]; run_3[c] += h * u[i]
#define ADD_THREE                                                                                  \
    ADD_RUNS(0)                                                                                    \
    EACH_CHANNEL(SUM(2)[c] += run_3[c]; run_3[c] = 0)
    if (window_height) {
        const REAL *restrict highest = t->highest + at_output;
        WINDOW;
        EACH_CHANNEL(run_1[c] = run_2[c] = run_3[c] = 0)
        EACH_WINDOW(LOOK_FOR_PLACE, AT_PLACE(h); ADD, , ADD_THREE)
    } else
        IN_RUNS(first, last, const REAL h = PASSES(w[c] * y[i] + b[c]) ? to_out[i] : 0; ADD,
                ADD_THREE)
}

INLINE void twice_rest_block(const Part *part, const int64_t low, const int64_t block) {
    NAMES;
    const REAL *restrict u = t->u + at, *restrict y = t->y + at;
    const REAL *restrict to_out = t->to_out + at_output;
    REAL *restrict to_to_out = t->to_to_out + at_output, *restrict to_standard = t->to_standard + at;
    TOTAL(mean_u, 0)
    TOTAL(mean_u_y, 1)
    TOTAL(along, 2)
    REAL size[BLOCK_OF_CHANNELS], mean_h_y[BLOCK_OF_CHANNELS];
    REAL v_w[BLOCK_OF_CHANNELS], v_b[BLOCK_OF_CHANNELS];
    EACH_CHANNEL(mean_u[c] *= share; mean_u_y[c] *= share; size[c] = w[c] * t->scale[few + c];
                 mean_h_y[c] = t->sum_h_y[few + c] * share;
                 v_w[c] = t->v_w ? t->v_w[few + c] : 0; v_b[c] = t->v_b ? t->v_b[few + c] : 0;
                 along[c] -= mean_u[c] * t->sum_h[few + c] + mean_u_y[c] * t->sum_h_y[few + c])
    if (part->part == 0)
        EACH_CHANNEL(t->to_scale[few + c] = w[c] * along[c];
                     t->to_w[few + c] = t->scale[few + c] * along[c])
#define TO_H                                                                                       \
    const REAL to_h = size[c] * (u[i] - mean_u[c] - y[i] * mean_u_y[c]) + v_b[c] + y[i] * v_w[c];  \
    to_standard[i] = v_w[c] * h - size[c] * (u[i] * mean_h_y[c] + h * mean_u_y[c])
    if (window_height) {
        const REAL *restrict highest = t->highest + at_output;
        WINDOW;
        REAL reached[BLOCK_OF_CHANNELS];
        EACH_WINDOW(LOOK_FOR_PLACE; reached[c] = 0,
                    AT_PLACE(h); TO_H; reached[c] = there ? to_h : reached[c],
                    to_to_out[i] = PASSES(w[c] * highest[i] + b[c]) ? reached[c] : 0, )
    } else
        EACH(first, last, const int passes = PASSES(w[c] * y[i] + b[c]);
             const REAL h = passes ? to_out[i] : 0; TO_H; to_to_out[i] = passes ? to_h : 0)
}

PASS(twice_sums)
PASS(twice_rest)

/* The derivatives, transposed, of `normalise_backward` without to_y and through, of u, v_w and v_b
 * that arrive at to_x, to_w and to_b (the latter two may be NULL: 0):
 *
 *   to_to_out = w scale (u - mean u - y mean(u y)) + v_b + y v_w  where z passes, and 0 elsewhere
 *   to_standard, to y, = v_w h - w scale (u mean(h y) + h mean(u y))
 *   to_scale = w sum h (u - mean u - y mean(u y));  to_w = scale of the same sum
 *
 * sum_h and sum_h_y are what it came to. Of windows, to_to_out is that at their places. */
int normalise_twice(const Layout *layout, const Tensors *tensors) {
    return in_two_passes(twice_sums, twice_rest, layout, tensors);
}
