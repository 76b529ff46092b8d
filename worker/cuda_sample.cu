/* cuda_sample.cu - sampler_draw of sample.c on a device: one block per row. */
#include "worker/cuda_select.cuh"

namespace
{
__device__ double uniform(uint64_t seed, uint64_t position)
{
    uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) { /* Philox4x32-10, as sample_philox */
        uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (double)(((uint64_t)c0 << 32 | c1) >> 11) * 0x1p-53;
}

/* The mean of y, weighted. |w y| is below 1 / e, so both sums stay below 2^63. */
__device__ double mean_of(const row_state &r, shared_state *s)
{
    const double unit = 2 * WEIGHT_UNIT;
    uint32_t key;
    find_id(r, s, ~0ull, [&](uint32_t id) { return __double2ull_rn(exact_weight(r, id, &key) * unit); });
    const unsigned long long weights = warp_sum(s->part[threadIdx.x % WARP]);
    find_id(r, s, ~0ull, [&](uint32_t id) {
        const double w = exact_weight(r, id, &key);
        if (w == 0) /* y may be -infinity */
            return 0ull;
        return __double2ull_rn(__dmul_rn(w, (r.best - (double)r.logits[id]) / r.temperature) * unit);
    });
    return -(double)warp_sum(s->part[threadIdx.x % WARP]) / (double)weights;
}

__device__ uint32_t draw(row_state &r, shared_state *s, const cuda_sample &p, uint32_t best_id)
{
    r.best = r.logits[best_id];
    r.temperature = p.temperature;
    r.min_weight = p.min_p;
    r.stay = {0, NONE};
    if (p.top_k && p.top_k < r.vocab)
        r.stay = keep_best(r, s, COUNT, p.top_k);
    auto weight = [&](uint32_t id) {
        uint32_t key;
        return weight_of(r, id, &key);
    };
    /* a target that is never reached: only the sums of the warps are wanted */
    auto total = [&]() {
        find_id(r, s, ~0ull, weight);
        return warp_sum(s->part[threadIdx.x % WARP]);
    };
    unsigned long long sum = total();
    auto share = [&](float of) {
        unsigned long long target = (unsigned long long)ceil((double)of * (double)sum);
        return target < 1 ? 1 : target < sum ? target : sum;
    };
    if (p.top_p > 0.0f && p.top_p < 1.0f) {
        r.stay = keep_best(r, s, WEIGHT, share(p.top_p));
        sum = total();
    }
    if (p.typical_p > 0.0f && p.typical_p < 1.0f) {
        r.mean = mean_of(r, s);
        r.near = keep_best(r, s, NEAR, share(p.typical_p));
        r.typical = true;
        sum = total();
    }
    uint32_t id = find_id(r, s, (unsigned long long)(uniform(p.seed, p.position) * (double)sum), weight);
    return id == NONE ? best_id : id;
}

/* One block per row; adjusted: what the rows are, NULL: those of all samples. */
__global__ void __launch_bounds__(THREADS)
    sample_kernel(cuda_choice *choice, uint32_t *last, const float *logits, const cuda_sample *sample,
                  const cuda_adjust *adjusted, uint32_t vocab)
{
    __shared__ shared_state s;
    const uint32_t i = adjusted ? adjusted[blockIdx.x].sample : blockIdx.x;
    const cuda_sample p = sample[i];
    if (p.how != (adjusted ? CUDA_DRAW_ADJUSTED : CUDA_DRAW)) {
        if (p.how == CUDA_GIVEN && threadIdx.x == 0)
            choice[i] = {0, CUDA_FAULT_NONE};
        return;
    }
    row_state r = row_of(logits + (uint64_t)blockIdx.x * vocab, vocab);
    uint32_t token = find_best(r, &s), fault = fault_of(r.logits[token]);
    if (fault == CUDA_FAULT_NONE && p.temperature != 0.0f && p.top_k != 1)
        token = draw(r, &s, p, token);
    if (threadIdx.x)
        return;
    choice[i] = {token, fault};
    if (p.slot != CUDA_NO_SLOT)
        last[p.slot] = fault == CUDA_FAULT_NONE ? token : 0;
}
} // namespace

cudaError_t cuda_sample_rows(cudaStream_t stream, struct cuda_choice *choice, uint32_t *last, const float *logits,
                             const struct cuda_sample *sample, uint32_t rows, uint32_t vocab)
{
    if (rows == 0)
        return cudaSuccess;
    sample_kernel<<<rows, THREADS, 0, stream>>>(choice, last, logits, sample, NULL, vocab);
    return cudaGetLastError();
}

cudaError_t cuda_sample_adjusted(cudaStream_t stream, struct cuda_choice *choice, uint32_t *last, const float *adjusted,
                                 const struct cuda_sample *sample, const struct cuda_adjust *adjust, uint32_t rows,
                                 uint32_t vocab)
{
    if (rows == 0)
        return cudaSuccess;
    sample_kernel<<<rows, THREADS, 0, stream>>>(choice, last, adjusted, sample, adjust, vocab);
    return cudaGetLastError();
}
