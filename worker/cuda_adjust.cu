/* cuda_adjust.cu - sample_adjust of sample_adjust.c on a device, operation by operation: no contraction; and the counts of fed
 * tokens that its penalties look at, which do not depend on the order of the additions. */
#include <cfloat>

#include "worker/cuda_kernels.h"

namespace
{
constexpr uint32_t THREADS = 256;
constexpr uint32_t SPAN = 4096; /* ids of a block: 16 KiB of shared memory */

/* One thread per fed row. Of one token there may be several. */
__global__ void __launch_bounds__(THREADS)
    count_kernel(const cuda_fed *fed, uint32_t n, const cuda_row *row, const uint32_t *last)
{
    const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n)
        return;
    const cuda_fed f = fed[i];
    uint32_t token = row[f.row].token;
    if (token & CUDA_TOKEN_OF_SLOT)
        token = last[token & ~CUDA_TOKEN_OF_SLOT];
    if (f.output)
        atomicAdd(f.seen + token, 1);
    else
        atomicOr(f.seen + token, CUDA_SEEN_IN_PROMPT);
}

__device__ float bounded(float before, float after)
{
    return isinf(after) && !isinf(before) ? copysignf(FLT_MAX, after) : after;
}

__device__ float penalised(float x, const cuda_adjust &a, uint32_t in_output)
{
    x = bounded(x, x > 0.0f ? __fdiv_rn(x, a.repetition) : __fmul_rn(x, a.repetition));
    if (in_output == 0)
        return x;
    x = bounded(x, __fsub_rn(x, __fmul_rn(a.frequency, __uint2float_rn(in_output))));
    return bounded(x, __fsub_rn(x, a.presence));
}

/* Block (s, r): ids s * SPAN on of the r-th row, in shared memory between the parts. */
__global__ void __launch_bounds__(THREADS)
    adjust_kernel(float *out, const float *logits, const cuda_adjust *adjust, uint32_t first_sample, uint32_t vocab)
{
    __shared__ float x[SPAN];
    const cuda_adjust a = adjust[blockIdx.y];
    const uint32_t first = blockIdx.x * SPAN, n = min(SPAN, vocab - first);
    logits += (uint64_t)(a.sample - first_sample) * vocab + first;
    out += (uint64_t)blockIdx.y * vocab + first;
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
        const uint32_t id = first + i;
        x[i] = a.allowed && !(a.allowed[id / 32] >> id % 32 & 1) ? -INFINITY : logits[i];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < a.n_banned; i += THREADS)
        if (a.banned[i] - first < n) /* ids below first wrap to large numbers */
            x[a.banned[i] - first] = -INFINITY;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < a.n_bias; i += THREADS) { /* each id once */
        const cuda_bias b = a.bias[i];
        if (b.id - first < n)
            x[b.id - first] = bounded(x[b.id - first], __fadd_rn(x[b.id - first], b.bias));
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
        const uint32_t seen = a.seen ? a.seen[first + i] : 0;
        out[i] = seen ? penalised(x[i], a, seen & ~CUDA_SEEN_IN_PROMPT) : x[i];
    }
}
} // namespace

cudaError_t cuda_count_fed(cudaStream_t stream, const struct cuda_fed *fed, uint32_t n, const struct cuda_row *row,
                           const uint32_t *last)
{
    if (n == 0)
        return cudaSuccess;
    count_kernel<<<(n + THREADS - 1) / THREADS, THREADS, 0, stream>>>(fed, n, row, last);
    return cudaGetLastError();
}

cudaError_t cuda_adjust_rows(cudaStream_t stream, float *out, const float *logits, const struct cuda_adjust *adjust,
                             uint32_t rows, uint32_t first_sample, uint32_t vocab)
{
    if (rows == 0)
        return cudaSuccess;
    const dim3 grid((vocab + SPAN - 1) / SPAN, rows);
    adjust_kernel<<<grid, THREADS, 0, stream>>>(out, logits, adjust, first_sample, vocab);
    return cudaGetLastError();
}

cudaError_t cuda_adjust_load(void)
{
    cudaFuncAttributes a;
    const cudaError_t err = cudaFuncGetAttributes(&a, count_kernel);
    return err == cudaSuccess ? cudaFuncGetAttributes(&a, adjust_kernel) : err;
}
