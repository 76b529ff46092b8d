/* cuda_score.cu - sample_score of sample_score.c on a device: one block per row. */
#include "worker/cuda_select.cuh"

namespace
{
/* log_positive of sample_score.c, operation by operation. */
__device__ double log_positive(double x)
{
    uint64_t bits = (uint64_t)__double_as_longlong(x);
    int e = (int)(bits >> 52) - 1023;
    double m = __longlong_as_double((long long)((bits & 0xFFFFFFFFFFFFFull) | 1023ull << 52));
    if (m > 0x1.6a09e667f3bcdp+0) {
        m *= 0.5;
        e++;
    }
    double s = __dadd_rn(m, -1.0) / __dadd_rn(m, 1.0), s2 = __dmul_rn(s, s), sum = 0.0;
#pragma unroll
    for (int k = 25; k >= 3; k -= 2)
        sum = __dadd_rn(__dmul_rn(sum, s2), 1.0 / k);
    double ln_m = 2.0 * __dadd_rn(s, __dmul_rn(__dmul_rn(s, s2), sum));
    return __dadd_rn(__dmul_rn(e, 0x1.62e42fee00000p-1), __dadd_rn(__dmul_rn(e, 0x1.a39ef35793c76p-33), ln_m));
}

struct found {
    double sum; /* of e^(x - best) */
    unsigned long long better;
};

/* What is added up in which order depends on vocab alone. */
__device__ found look(const row_state &r, shared_state *s, uint32_t token)
{
    __shared__ double part[WARPS];
    const uint32_t key = order_key(r.logits[token]);
    found f = {0, 0};
    for (uint32_t id = threadIdx.x; id < r.vocab; id += THREADS) {
        const float x = r.logits[id];
        const uint32_t k = order_key(x);
        f.sum = __dadd_rn(f.sum, exp_negative((double)x - r.best));
        f.better += k > key || (k == key && id < token);
    }
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t mask = WARP / 2; mask; mask >>= 1)
            f.sum = __dadd_rn(f.sum, __shfl_xor_sync(~0u, f.sum, mask));
        f.better = warp_sum(f.better);
        if (pass == 1)
            break;
        __syncthreads(); /* s->part is free */
        if (threadIdx.x % WARP == 0) {
            part[threadIdx.x / WARP] = f.sum;
            s->part[threadIdx.x / WARP] = f.better;
        }
        __syncthreads();
        f = {part[threadIdx.x % WARP], s->part[threadIdx.x % WARP]};
    }
    return f;
}

/* The n best in order, with their log probabilities; off: what is taken from each. */
__device__ void write_top(const row_state &r, shared_state *s, cuda_scores *out, uint32_t n, double off)
{
    __shared__ uint32_t best[CUDA_MAX_TOP], have;
    const limit l = keep_best(r, s, COUNT, n);
    if (threadIdx.x == 0)
        have = 0;
    __syncthreads();
    for (uint32_t id = threadIdx.x; id < r.vocab; id += THREADS)
        if (!is_out(l, order_key(r.logits[id]), id)) /* of n */
            best[atomicAdd(&have, 1)] = id;
    __syncthreads();
    if (threadIdx.x >= n)
        return;
    const uint32_t id = best[threadIdx.x], key = order_key(r.logits[id]);
    uint32_t at = 0;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t k = order_key(r.logits[best[i]]);
        at += k > key || (k == key && best[i] < id);
    }
    out->top[at] = id;
    out->top_logprob[at] = __double2float_rn((double)r.logits[id] - r.best - off);
}

__global__ void __launch_bounds__(THREADS) score_kernel(cuda_scores *scores, cuda_choice *choice, const float *logits,
                                                        const cuda_score *score, uint32_t first_sample, uint32_t vocab)
{
    __shared__ shared_state s;
    const cuda_score a = score[blockIdx.x];
    cuda_scores *out = scores + blockIdx.x;
    row_state r = row_of(logits + (uint64_t)(a.sample - first_sample) * vocab, vocab);
    const uint32_t best = find_best(r, &s), fault = fault_of(r.logits[best]);
    if (fault != CUDA_FAULT_NONE) { /* of the raw logits: the sample's own may be fine */
        if (threadIdx.x == 0)
            choice[a.sample] = {best, fault};
        return;
    }
    const uint32_t token = a.given ? a.token : choice[a.sample].token;
    r.best = r.logits[best];
    const found f = look(r, &s, token);
    const double off = log_positive(f.sum);
    if (threadIdx.x == 0) {
        out->logprob = __double2float_rn((double)r.logits[token] - r.best - off);
        out->rank = (uint32_t)f.better + 1;
        out->n = min(a.top, vocab);
    }
    if (a.top)
        write_top(r, &s, out, min(a.top, vocab), off);
}
} // namespace

cudaError_t cuda_score_rows(cudaStream_t stream, struct cuda_scores *scores, struct cuda_choice *choice,
                            const float *logits, const struct cuda_score *score, uint32_t rows, uint32_t first_sample,
                            uint32_t vocab)
{
    if (rows == 0)
        return cudaSuccess;
    score_kernel<<<rows, THREADS, 0, stream>>>(scores, choice, logits, score, first_sample, vocab);
    return cudaGetLastError();
}

cudaError_t cuda_score_load(void)
{
    cudaFuncAttributes a;
    return cudaFuncGetAttributes(&a, score_kernel);
}
