/* forward_ops.c - the arithmetic between the matrix products. Loops are written for the compiler's vectoriser (this file
 * is compiled with -O3); sums go over fixed lanes, so that their order does not depend on the machine. */
#include <math.h>
#include <string.h>

#include "worker/forward_internal.h"

#define LANES 16

/* Also compiled for the wider vectors of newer x86-64 CPUs, chosen when the program starts: by what the CPU can do, while
 * "arch=haswell" would ask for that very model. Not under a sanitizer: the
 * choice would run before its run-time is there. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(TANDEM_SANITIZED)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
#define INLINE static inline __attribute__((always_inline))

/* Below this many floats waking helpers costs more than it saves. */
#define SERIAL_FLOATS 16384

struct rows_job {
    uint32_t rows, block;
    void (*fn)(void *arg, uint32_t first, uint32_t end, uint32_t worker);
    void *arg;
};

static void rows_item(void *arg, uint32_t i, uint32_t worker)
{
    const struct rows_job *j = arg;
    uint32_t first = i * j->block;
    uint32_t end = j->rows - first < j->block ? j->rows : first + j->block;
    j->fn(j->arg, first, end, worker);
}

void forward_rows(struct thread_pool *pool, uint32_t rows, uint64_t row_floats,
                  void (*fn)(void *arg, uint32_t first, uint32_t end, uint32_t worker), void *arg)
{
    if (rows == 0)
        return;
    uint64_t block = row_floats ? SERIAL_FLOATS / 2 / row_floats + 1 : rows;
    if (rows * row_floats < SERIAL_FLOATS || block > rows)
        block = rows;
    struct rows_job j = {rows, (uint32_t)block, fn, arg};
    threads_for(pool, (rows + j.block - 1) / j.block, rows_item, &j);
}

INLINE float sum_lanes(const float *lane)
{
    float s[LANES];
    memcpy(s, lane, sizeof s);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            s[i] += s[i + half];
    return s[0];
}

INLINE float sum_squares(const float *x, uint32_t n)
{
    float lane[LANES] = {0};
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += x[i + j] * x[i + j];
    for (; i < n; i++)
        lane[i % LANES] += x[i] * x[i];
    return sum_lanes(lane);
}

INLINE void norm_row(float *restrict out, const float *restrict x, const float *restrict weight, uint32_t n, float eps)
{
    float scale = 1.0f / sqrtf(sum_squares(x, n) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++)
        out[i] = x[i] * scale * weight[i];
}

VECTORISED void forward_norm_row(float *restrict out, const float *restrict x, const float *restrict weight, uint32_t n,
                                 float eps)
{
    norm_row(out, x, weight, n, eps);
}

VECTORISED void forward_add_norm_row(float *restrict x, float *restrict y, const float *restrict weight, uint32_t n,
                                     float eps)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] += y[i];
    norm_row(y, x, weight, n, eps);
}

VECTORISED void forward_add_row(float *restrict x, const float *restrict y, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] += y[i];
}

VECTORISED void forward_norm_heads(float *x, const float *restrict weight, uint32_t heads, uint32_t d, float eps)
{
    for (uint32_t h = 0; h < heads; h++, x += d) {
        float scale = 1.0f / sqrtf(sum_squares(x, d) / (float)d + eps);
        for (uint32_t i = 0; i < d; i++)
            x[i] = x[i] * scale * weight[i];
    }
}

VECTORISED void forward_rope_row(float *out, const float *x, const float *cosine, const float *sine, uint32_t heads,
                                 uint32_t d)
{
    uint32_t half = d / 2;
    for (uint32_t h = 0; h < heads; h++, x += d, out += d)
        for (uint32_t i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            out[i] = a * cosine[i] - b * sine[i];
            out[i + half] = b * cosine[i] + a * sine[i];
        }
}

/* e^x to 1 ulp or so, for -87 <= x <= 88: 2^n * p(r) with |r| <= ln 2 / 2. */
INLINE float exp_bounded(float x)
{
    float shifted = x * 0x1.715476p+0f + 0x1.8p23f;
    float n = shifted - 0x1.8p23f;
    float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits, scale;
    float power;
    memcpy(&bits, &shifted, sizeof bits);
    scale = (bits << 23) + (127u << 23);
    memcpy(&power, &scale, sizeof power);
    return p * power;
}

VECTORISED void forward_swiglu_row(float *restrict out, const float *restrict gate, const float *restrict up,
                                   uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        float g = gate[i];
        float x = -g < 88.0f ? -g : 88.0f; /* past that silu is 0 within a denormal */
        x = x > -87.0f ? x : -87.0f;
        /* a NaN fails both comparisons and is bounded away, but g itself brings it back */
        out[i] = g / (1.0f + exp_bounded(x)) * up[i];
    }
}
