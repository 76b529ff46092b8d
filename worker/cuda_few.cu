/* cuda_few.cu - products of 1 to 4 rows of activations, bound by reading W once. */
#include <cuda_bf16.h>

#include "worker/cuda_kernels.h"
#include "worker/cuda_launch.cuh"

namespace
{
constexpr uint32_t WARP = 32;
constexpr uint32_t WARPS = 8;
constexpr uint32_t UNROLL = 4; /* loads of 16 bytes in flight per lane: 16 KiB per block */

__device__ float dot8(uint4 w, uint4 x)
{
    const __nv_bfloat162 *a = (const __nv_bfloat162 *)&w, *b = (const __nv_bfloat162 *)&x;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 p = __bfloat1622float2(a[i]), q = __bfloat1622float2(b[i]);
        sum = fmaf(p.x, q.x, fmaf(p.y, q.y, sum));
    }
    return sum;
}

template <enum cuda_out OUT> __device__ void put(void *y, uint64_t at, float v)
{
    if (OUT == CUDA_OUT_BF16)
        ((__nv_bfloat16 *)y)[at] = __float2bfloat16_rn(v);
    else if (OUT == CUDA_OUT_F32)
        ((float *)y)[at] = v;
    else
        ((float *)y)[at] += v;
}

template <uint32_t T> __device__ void add_products(float *sum, const uint4 *v, const uint4 *x, uint32_t eights)
{
#pragma unroll
    for (uint32_t u = 0; u < UNROLL; u++)
#pragma unroll
        for (uint32_t t = 0; t < T; t++)
            sum[t] += dot8(v[u], x[(uint64_t)t * eights + u * WARP]);
}

/* Read once: does not push x out of the cache. */
__device__ void load(uint4 *v, const uint4 *w)
{
#pragma unroll
    for (uint32_t u = 0; u < UNROLL; u++)
        v[u] = __ldcs(w + u * WARP);
}

/* One warp per row of W: its lanes walk the row side by side, 512 bytes per load of the warp. x comes from the cache. The
 * first loads are under way while the kernel in front ends. */
template <uint32_t T, enum cuda_out OUT>
__global__ void __launch_bounds__(WARP *WARPS)
    few_kernel(void *y, const uint4 *x, const uint4 *__restrict__ w, uint32_t n, uint32_t eights)
{
    uint32_t out = blockIdx.x * WARPS + threadIdx.x / WARP, i = threadIdx.x % WARP;
    cuda_let_next_begin();
    if (out >= n)
        return; /* other warps wait */
    const uint4 *row = w + (uint64_t)out * eights;
    const uint32_t reach = (UNROLL - 1) * WARP;
    float sum[T] = {};
    uint4 v[UNROLL];
    if (i + reach < eights)
        load(v, row + i);
    cuda_wait_for_previous();
    while (i + reach < eights) {
        uint32_t next = i + UNROLL * WARP;
        add_products<T>(sum, v, x + i, eights);
        if (next + reach < eights)
            load(v, row + next);
        i = next;
    }
    for (; i < eights; i += WARP) {
        uint4 last = __ldcs(row + i);
#pragma unroll
        for (uint32_t t = 0; t < T; t++)
            sum[t] += dot8(last, x[(uint64_t)t * eights + i]);
    }
#pragma unroll
    for (uint32_t t = 0; t < T; t++) {
        for (uint32_t mask = WARP / 2; mask; mask >>= 1)
            sum[t] += __shfl_xor_sync(~0u, sum[t], mask);
        if (threadIdx.x % WARP == 0)
            put<OUT>(y, (uint64_t)t * n + out, sum[t]);
    }
}

/* As few_kernel, but a warp has a row of gate and the row of up that belongs to it, and makes act of both. */
template <uint32_t T>
__global__ void __launch_bounds__(WARP *WARPS)
    few_swiglu_kernel(__nv_bfloat16 *act, const uint4 *x, const uint4 *__restrict__ w, const float *__restrict__ bias,
                      uint32_t n, uint32_t eights)
{
    uint32_t out = blockIdx.x * WARPS + threadIdx.x / WARP, i = threadIdx.x % WARP;
    cuda_let_next_begin();
    if (out >= n)
        return; /* other warps wait */
    const uint4 *gate_row = w + (uint64_t)out * eights, *up_row = gate_row + (uint64_t)n * eights;
    const uint32_t reach = (UNROLL - 1) * WARP;
    float gate[T] = {}, up[T] = {};
    uint4 v[UNROLL], u[UNROLL];
    if (i + reach < eights) {
        load(v, gate_row + i);
        load(u, up_row + i);
    }
    cuda_wait_for_previous();
    while (i + reach < eights) {
        uint32_t next = i + UNROLL * WARP;
        add_products<T>(gate, v, x + i, eights);
        add_products<T>(up, u, x + i, eights);
        if (next + reach < eights) {
            load(v, gate_row + next);
            load(u, up_row + next);
        }
        i = next;
    }
    for (; i < eights; i += WARP) {
        uint4 a = __ldcs(gate_row + i), b = __ldcs(up_row + i);
#pragma unroll
        for (uint32_t t = 0; t < T; t++) {
            gate[t] += dot8(a, x[(uint64_t)t * eights + i]);
            up[t] += dot8(b, x[(uint64_t)t * eights + i]);
        }
    }
#pragma unroll
    for (uint32_t t = 0; t < T; t++) {
        for (uint32_t mask = WARP / 2; mask; mask >>= 1) {
            gate[t] += __shfl_xor_sync(~0u, gate[t], mask);
            up[t] += __shfl_xor_sync(~0u, up[t], mask);
        }
        if (threadIdx.x % WARP == 0) {
            float g = gate[t] + (bias ? bias[out] : 0), p = up[t] + (bias ? bias[n + out] : 0);
            act[(uint64_t)t * n + out] = __float2bfloat16_rn(g / (1 + __expf(-g)) * p);
        }
    }
}

template <enum cuda_out OUT>
cudaError_t launch(cudaStream_t stream, void *y, const void *x, const void *w, uint32_t t, uint32_t n, uint32_t k)
{
    uint32_t blocks = (n + WARPS - 1) / WARPS, threads = WARP * WARPS;
    const uint4 *a = (const uint4 *)x, *b = (const uint4 *)w;
    switch (t) {
    case 1:
        return cuda_launch_early(few_kernel<1, OUT>, blocks, threads, stream, y, a, b, n, k / 8);
    case 2:
        return cuda_launch_early(few_kernel<2, OUT>, blocks, threads, stream, y, a, b, n, k / 8);
    case 3:
        return cuda_launch_early(few_kernel<3, OUT>, blocks, threads, stream, y, a, b, n, k / 8);
    case 4:
        return cuda_launch_early(few_kernel<4, OUT>, blocks, threads, stream, y, a, b, n, k / 8);
    default:
        return cudaErrorInvalidValue;
    }
}
} // namespace

cudaError_t cuda_few_rows(cudaStream_t stream, void *y, enum cuda_out out, const void *x, const void *w, uint32_t t,
                          uint32_t n, uint32_t k)
{
    switch (out) {
    case CUDA_OUT_BF16:
        return launch<CUDA_OUT_BF16>(stream, y, x, w, t, n, k);
    case CUDA_OUT_F32:
        return launch<CUDA_OUT_F32>(stream, y, x, w, t, n, k);
    default:
        return launch<CUDA_OUT_F32_ADD>(stream, y, x, w, t, n, k);
    }
}

cudaError_t cuda_few_swiglu(cudaStream_t stream, void *act, const void *x, const void *w, const float *bias, uint32_t t,
                            uint32_t inner, uint32_t k)
{
    uint32_t blocks = (inner + WARPS - 1) / WARPS, threads = WARP * WARPS;
    __nv_bfloat16 *y = (__nv_bfloat16 *)act;
    const uint4 *a = (const uint4 *)x, *b = (const uint4 *)w;
    switch (t) {
    case 1:
        return cuda_launch_early(few_swiglu_kernel<1>, blocks, threads, stream, y, a, b, bias, inner, k / 8);
    case 2:
        return cuda_launch_early(few_swiglu_kernel<2>, blocks, threads, stream, y, a, b, bias, inner, k / 8);
    case 3:
        return cuda_launch_early(few_swiglu_kernel<3>, blocks, threads, stream, y, a, b, bias, inner, k / 8);
    case 4:
        return cuda_launch_early(few_swiglu_kernel<4>, blocks, threads, stream, y, a, b, bias, inner, k / 8);
    default:
        return cudaErrorInvalidValue;
    }
}
