/* cuda_select.cuh - how one block looks at one row of logits: the best, sums by id, the shortest run from the best on. Shared by
 * cuda_sample.cu and cuda_score.cu. No sort, every sum an integer.
 */
#ifndef TANDEM_CUDA_SELECT_CUH
#define TANDEM_CUDA_SELECT_CUH

#include "worker/cuda_kernels.h"

namespace
{
constexpr uint32_t WARP = 32;
constexpr uint32_t THREADS = 1024;
constexpr uint32_t WARPS = THREADS / WARP;
constexpr uint32_t BINS = 2048; /* of a digit of 11 bits: 16 KiB of shared memory */
constexpr uint32_t NONE = ~0u;
/* Weights are at most 1, so a row's sum stays below 2^62. */
constexpr double WEIGHT_UNIT = 0x1p44;

static_assert(BINS == 2 * THREADS, "a thread clears and adds up two bins");
static_assert(WARPS == WARP, "one warp adds up what the warps found");

/* What stays of a row: larger keys than `key`, and of equal ones the ids up to last_id. */
struct limit {
    uint32_t key, last_id;
};

struct row_state {
    const float *logits;
    uint32_t vocab;
    uint32_t first, end; /* ids of this warp */
    double best, temperature, min_weight;
    limit stay;
    bool typical; /* of what stays, those near the mean; their keys are near_key */
    double mean;
    limit near;
};

struct shared_state {
    unsigned long long bin[BINS];
    unsigned long long part[WARPS];
    uint32_t id[WARPS];
    uint32_t chosen;
    unsigned long long above;
};

__device__ uint32_t order_key(float x)
{
    uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* exp_negative of sample.c, operation by operation: no contraction. */
__device__ double exp_negative(double x)
{
    if (!(x >= -700.0))
        return 0.0;
    double shifted = __dadd_rn(__dmul_rn(x, 0x1.71547652b82fep+0), 0x1.8p52);
    double n = __dadd_rn(shifted, -0x1.8p52);
    double r = __dadd_rn(__dadd_rn(x, -__dmul_rn(n, 0x1.62e42fee00000p-1)), -__dmul_rn(n, 0x1.a39ef35793c76p-33));
    const double inverse_factorial[] = {
        1.0 / 479001600.0,
        1.0 / 39916800.0,
        1.0 / 3628800.0,
        1.0 / 362880.0,
        1.0 / 40320.0,
        1.0 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    };
    double p = 1.0 / 6227020800.0;
#pragma unroll
    for (int i = 0; i < 13; i++)
        p = __dadd_rn(__dmul_rn(p, r), inverse_factorial[i]);
    uint64_t bits = (uint64_t)__double_as_longlong(shifted);
    return __dmul_rn(p, __longlong_as_double((long long)((bits << 52) + (1023ull << 52))));
}

/* Larger: nearer to the mean. */
__device__ uint32_t near_key(const row_state &r, float x)
{
    return ~order_key(__double2float_rn(fabs(r.mean - ((double)x - r.best) / r.temperature)));
}

__device__ bool is_out(const limit &l, uint32_t key, uint32_t id)
{
    return key < l.key || (key == l.key && id > l.last_id);
}

/* 0 for what does not stay. */
__device__ double exact_weight(const row_state &r, uint32_t id, uint32_t *key)
{
    float x = r.logits[id];
    *key = order_key(x);
    if (is_out(r.stay, *key, id) || (r.typical && is_out(r.near, near_key(r, x), id)))
        return 0;
    double w = exp_negative(((double)x - r.best) / r.temperature);
    return w >= r.min_weight ? w : 0;
}

/* In units of WEIGHT_UNIT. */
__device__ unsigned long long weight_of(const row_state &r, uint32_t id, uint32_t *key)
{
    return (unsigned long long)(exact_weight(r, id, key) * WEIGHT_UNIT);
}

enum measure { COUNT, WEIGHT, NEAR }; /* 1 each; the weight, by logits; the weight, by nearness to the mean */

__device__ unsigned long long measure_of(const row_state &r, measure by, uint32_t id, uint32_t *key)
{
    if (by == COUNT) {
        *key = order_key(r.logits[id]);
        return 1;
    }
    unsigned long long w = weight_of(r, id, key);
    if (by == NEAR)
        *key = near_key(r, r.logits[id]);
    return w;
}

__device__ unsigned long long warp_sum(unsigned long long v)
{
    for (uint32_t mask = WARP / 2; mask; mask >>= 1)
        v += __shfl_xor_sync(~0u, v, mask);
    return v;
}

__device__ unsigned long long warp_scan(unsigned long long v) /* inclusive */
{
    for (uint32_t d = 1; d < WARP; d <<= 1) {
        unsigned long long below = __shfl_up_sync(~0u, v, d);
        if (threadIdx.x % WARP >= d)
            v += below;
    }
    return v;
}

/* The first id, in order, at which the cumulated value exceeds target; value(id) of each; NONE when it never does. part
 * gets the sums of the warps' spans. */
template <typename F>
__device__ uint32_t find_id(const row_state &r, shared_state *s, unsigned long long target, F value)
{
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned long long sum = 0;
    for (uint32_t id = r.first + lane; id < r.end; id += WARP)
        sum += value(id);
    sum = warp_sum(sum);
    __syncthreads(); /* part and chosen are free */
    if (lane == 0)
        s->part[warp] = sum;
    if (threadIdx.x == 0)
        s->chosen = NONE;
    __syncthreads();
    unsigned long long before = warp_scan(s->part[lane]) - s->part[lane];
    before = __shfl_sync(~0u, before, warp);
    if (before <= target && before + sum > target) { /* this warp's alone */
        for (uint32_t first = r.first; first < r.end; first += WARP) {
            uint32_t id = first + lane;
            unsigned long long at = before + warp_scan(id < r.end ? value(id) : 0);
            uint32_t over = __ballot_sync(~0u, at > target);
            if (over) {
                if (lane == 0)
                    s->chosen = first + (uint32_t)__ffs((int)over) - 1;
                break;
            }
            before = __shfl_sync(~0u, at, WARP - 1);
        }
    }
    __syncthreads();
    return s->chosen;
}

/* The digit of the bins at which the sum from the largest on reaches target, s->above being what is over it. */
__device__ uint32_t find_bin(shared_state *s, unsigned long long target)
{
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, each = BINS / WARPS;
    unsigned long long sum = warp_sum(s->bin[warp * each + lane] + s->bin[warp * each + WARP + lane]);
    if (lane == 0)
        s->part[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned long long above = s->above;
        uint32_t w = WARPS - 1;
        while (w > 0 && above + s->part[w] < target)
            above += s->part[w--];
        uint32_t b = (w + 1) * each - 1;
        while (b > w * each && above + s->bin[b] < target)
            above += s->bin[b--];
        s->above = above;
        s->chosen = b;
    }
    __syncthreads();
    return s->chosen;
}

/* Keeps the shortest run, best first (larger key, then lower id), whose measure reaches target, which is at least 1 and at
 * most the sum. Radix select, most significant digit first. */
__device__ limit keep_best(const row_state &r, shared_state *s, measure by, unsigned long long target)
{
    uint32_t prefix = 0, mask = 0;
    const uint32_t shifts[] = {21, 10, 0}, bits[] = {11, 11, 10};
    if (threadIdx.x == 0)
        s->above = 0;
    for (int d = 0; d < 3; d++) {
        __syncthreads();
        s->bin[threadIdx.x] = s->bin[threadIdx.x + THREADS] = 0;
        __syncthreads();
        uint32_t values = (1u << bits[d]) - 1;
        for (uint32_t id = threadIdx.x; id < r.vocab; id += THREADS) {
            uint32_t key;
            unsigned long long m = measure_of(r, by, id, &key);
            if (m && (key & mask) == prefix)
                atomicAdd(&s->bin[key >> shifts[d] & values], m);
        }
        __syncthreads();
        prefix |= find_bin(s, target) << shifts[d];
        mask |= values << shifts[d];
    }
    /* of the equal ones: so many that what is missing is reached */
    unsigned long long missing = target - s->above;
    uint32_t last = find_id(r, s, missing - 1, [&](uint32_t id) {
        uint32_t key;
        unsigned long long m = measure_of(r, by, id, &key);
        return key == prefix ? m : 0ull;
    });
    return {prefix, last};
}

/* The best logit's id; NaN before all, then larger logits, then lower ids. */
__device__ uint32_t find_best(const row_state &r, shared_state *s)
{
    /* one number: NaN 2^32, else the key, above the complement of the id */
    unsigned long long best = 0;
    auto take = [&](unsigned long long other) { best = other > best ? other : best; };
    auto rank = [&](float x, uint32_t id) {
        return (x != x ? 0xFFFFFFFFull : (unsigned long long)order_key(x)) << 32 | (unsigned long long)~id;
    };
    const uint32_t quads = (uintptr_t)r.logits % sizeof(float4) ? 0 : r.vocab / 4;
    const float4 *four = (const float4 *)r.logits;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < quads; i += THREADS) {
        const float4 v = four[i];
        take(rank(v.x, 4 * i));
        take(rank(v.y, 4 * i + 1));
        take(rank(v.z, 4 * i + 2));
        take(rank(v.w, 4 * i + 3));
    }
    for (uint32_t id = 4 * quads + threadIdx.x; id < r.vocab; id += THREADS)
        take(rank(r.logits[id], id));
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t mask = WARP / 2; mask; mask >>= 1)
            take(__shfl_xor_sync(~0u, best, mask));
        if (pass == 0) {
            if (threadIdx.x % WARP == 0)
                s->part[threadIdx.x / WARP] = best;
            __syncthreads();
            best = s->part[threadIdx.x % WARP];
        }
    }
    return ~(uint32_t)best;
}

__device__ uint32_t fault_of(float best)
{
    if (best != best)
        return CUDA_FAULT_NAN;
    if (isinf(best))
        return best > 0 ? CUDA_FAULT_INFINITE : CUDA_FAULT_MINUS_INFINITE;
    return CUDA_FAULT_NONE;
}

/* Sums over ids in order: warp w has the ids of the w-th of WARPS equal spans. */
__device__ row_state row_of(const float *logits, uint32_t vocab)
{
    const uint32_t warp = threadIdx.x / WARP, span = (vocab + WARPS - 1) / WARPS;
    row_state r = {};
    r.logits = logits;
    r.vocab = vocab;
    r.first = min(warp * span, vocab);
    r.end = min(r.first + span, vocab);
    return r;
}
} // namespace

#endif
