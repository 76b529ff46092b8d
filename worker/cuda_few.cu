/* cuda_few.cu - products of 1 to 4 rows of activations, bound by reading W once; and what is computed of them at once.
 *
 * What counts is that reading never stops. A product lets the next launch begin when its own last loads are under way, so that the
 * next one's blocks have the first of their weights on the way while this one adds up and what is between them runs. Tried
 * and lost: asking for more of the weights there (8 to 48 MiB into the L2 cache, while the blocks wait): 0 to 13 % slower steps
 * of one row, as they come no earlier in sum and in the way of what runs.
 */
#include <cuda_bf16.h>

#include "worker/cuda_kernels.h"
#include "worker/cuda_launch.cuh"

namespace
{
constexpr uint32_t WARP = 32;
constexpr uint32_t WARPS = 8;
constexpr uint32_t UNROLL = 4; /* loads of 16 bytes in flight per lane: 16 KiB per block */

/* For as many blocks there are registers: 64 a thread with one row of W, 128 with two, whose loads then come early enough. With
 * 64 gate and up of one row took 62 us instead of 54, and q, k and v with RoPE 21 instead of 14 (H200, hidden 4096). */
constexpr uint32_t blocks_per_sm(uint32_t rows_of_w)
{
    return rows_of_w == 1 ? 4 : 2;
}

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

/* ROWS rows of W, which one warp reads side by side, 512 bytes per load; x comes from the cache. sum [ROWS][T] is the same in
 * all lanes. after_wait() is called once what other kernels write may be read. */
template <uint32_t T, uint32_t ROWS, typename F>
__device__ void few_products(float (*sum)[T], const uint4 *const *row, const uint4 *x, uint32_t eights, F after_wait)
{
    const uint32_t reach = (UNROLL - 1) * WARP, lane = threadIdx.x % WARP;
    uint32_t i = lane;
    uint4 v[ROWS][UNROLL];
#pragma unroll
    for (uint32_t r = 0; r < ROWS; r++) {
        if (i + reach < eights)
            load(v[r], row[r] + i);
    }
    cuda_wait_for_previous();
    after_wait();
    while (i + reach < eights) {
        uint32_t next = i + UNROLL * WARP;
#pragma unroll
        for (uint32_t r = 0; r < ROWS; r++) {
            add_products<T>(sum[r], v[r], x + i, eights);
            if (next + reach < eights)
                load(v[r], row[r] + next);
        }
        if (next + reach >= eights)
            cuda_let_next_begin();
        i = next;
    }
    for (; i < eights; i += WARP) {
#pragma unroll
        for (uint32_t r = 0; r < ROWS; r++) {
            uint4 last = __ldcs(row[r] + i);
#pragma unroll
            for (uint32_t t = 0; t < T; t++)
                sum[r][t] += dot8(last, x[(uint64_t)t * eights + i]);
        }
    }
    cuda_let_next_begin();
#pragma unroll
    for (uint32_t r = 0; r < ROWS; r++)
#pragma unroll
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t mask = WARP / 2; mask; mask >>= 1)
                sum[r][t] += __shfl_xor_sync(~0u, sum[r][t], mask);
}

/* Lane t's value: v[t]. */
template <uint32_t T> __device__ float of_lane(const float *v)
{
    float out = v[0];
#pragma unroll
    for (uint32_t t = 1; t < T; t++)
        out = threadIdx.x % WARP == t ? v[t] : out;
    return out;
}

/* One warp per row of W; lane t puts row t. */
template <uint32_t T, enum cuda_out OUT>
__global__ void __launch_bounds__(WARP *WARPS, blocks_per_sm(1))
    few_kernel(void *y, const uint4 *x, const uint4 *__restrict__ w, uint32_t n, uint32_t eights)
{
    const uint32_t out = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (out >= n)
        return; /* other warps wait */
    const uint64_t at = (uint64_t)lane * n + out;
    const uint4 *row[1] = {w + (uint64_t)out * eights};
    float sum[1][T] = {}, old = 0;
    few_products<T, 1>(sum, row, x, eights, [&] {
        if (OUT == CUDA_OUT_F32_ADD && lane < T)
            old = ((const float *)y)[at];
    });
    if (lane >= T)
        return;
    const float v = of_lane<T>(sum[0]);
    if (OUT == CUDA_OUT_BF16)
        ((__nv_bfloat16 *)y)[at] = __float2bfloat16_rn(v);
    else
        ((float *)y)[at] = OUT == CUDA_OUT_F32_ADD ? old + v : v;
}

/* As few_kernel, but a warp has a row of gate and the row of up that belongs to it, and makes act of both. */
template <uint32_t T>
__global__ void __launch_bounds__(WARP *WARPS, blocks_per_sm(2))
    few_swiglu_kernel(__nv_bfloat16 *act, const uint4 *x, const uint4 *__restrict__ w, const float *__restrict__ bias,
                      uint32_t n, uint32_t eights)
{
    const uint32_t out = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (out >= n)
        return; /* other warps wait */
    const uint4 *row[2] = {w + (uint64_t)out * eights, w + (uint64_t)(n + out) * eights};
    float sum[2][T] = {}, gate_bias = bias ? bias[out] : 0, up_bias = bias ? bias[n + out] : 0;
    few_products<T, 2>(sum, row, x, eights, [] {});
    if (lane >= T)
        return;
    const float g = of_lane<T>(sum[0]) + gate_bias, u = of_lane<T>(sum[1]) + up_bias;
    act[(uint64_t)lane * n + out] = __float2bfloat16_rn(g / (1 + __expf(-g)) * u);
}

/* As few_kernel, but a warp has the two rows of a head that turn together: q goes to r.qkv rotated, K and V to the slots. */
template <uint32_t T>
__global__ void __launch_bounds__(WARP *WARPS, blocks_per_sm(2))
    few_rope_kernel(const __grid_constant__ cuda_rope r, const uint4 *x, const uint4 *__restrict__ w, uint32_t eights)
{
    const uint32_t pair = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP, half = r.head_dim / 2;
    const uint32_t head = pair / half, i = pair % half, all = r.heads + 2 * r.kv_heads;
    if (head >= all)
        return; /* other warps wait */
    const uint32_t first = head * r.head_dim + i;
    const bool is_q = head < r.heads, is_v = head >= r.heads + r.kv_heads;
    const uint4 *pair_rows[2] = {w + (uint64_t)first * eights, w + (uint64_t)(first + half) * eights};
    float sum[2][T] = {}, bias[2] = {r.bias ? r.bias[first] : 0, r.bias ? r.bias[first + half] : 0};
    float cosine = 1, sine = 0;
    cuda_row row = {};
    few_products<T, 2>(sum, pair_rows, x, eights, [&] {
        if (lane >= T)
            return;
        row = r.row[lane];
        if (is_v)
            return;
        cosine = r.cosine[(uint64_t)row.position * half + i];
        sine = r.sine[(uint64_t)row.position * half + i];
    });
    if (lane >= T || (!is_q && !row.k))
        return;
    const float p = of_lane<T>(sum[0]) + bias[0], q = of_lane<T>(sum[1]) + bias[1];
    __nv_bfloat16 *out = (__nv_bfloat16 *)r.qkv + (uint64_t)(lane * all + head) * r.head_dim;
    if (!is_q) {
        uint32_t kv_head = is_v ? head - r.heads - r.kv_heads : head - r.heads;
        out = (__nv_bfloat16 *)(row.k + r.layer_offset + (is_v ? r.v_offset : 0) + kv_head * r.head_stride);
    }
    out[i] = __float2bfloat16_rn(p * cosine - q * sine);
    out[half + i] = __float2bfloat16_rn(q * cosine + p * sine);
}

template <typename... P, typename... A>
cudaError_t launch_few(void (*const (&kernel)[CUDA_FEW_ROWS_MAX])(P...), uint32_t t, uint32_t warps,
                       cudaStream_t stream, A... args)
{
    if (t < 1 || t > CUDA_FEW_ROWS_MAX)
        return cudaErrorInvalidValue;
    return cuda_launch_early(kernel[t - 1], (warps + WARPS - 1) / WARPS, WARP * WARPS, stream, args...);
}

template <enum cuda_out OUT>
cudaError_t launch(cudaStream_t stream, void *y, const void *x, const void *w, uint32_t t, uint32_t n, uint32_t k)
{
    void (*const kernel[])(void *, const uint4 *, const uint4 *, uint32_t,
                           uint32_t) = {few_kernel<1, OUT>, few_kernel<2, OUT>, few_kernel<3, OUT>, few_kernel<4, OUT>};
    return launch_few(kernel, t, n, stream, y, (const uint4 *)x, (const uint4 *)w, n, k / 8);
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
    void (*const kernel[])(__nv_bfloat16 *, const uint4 *, const uint4 *, const float *, uint32_t, uint32_t) = {
        few_swiglu_kernel<1>, few_swiglu_kernel<2>, few_swiglu_kernel<3>, few_swiglu_kernel<4>};
    return launch_few(kernel, t, inner, stream, (__nv_bfloat16 *)act, (const uint4 *)x, (const uint4 *)w, bias, inner,
                      k / 8);
}

cudaError_t cuda_few_rope(cudaStream_t stream, const struct cuda_rope *r, const void *x, const void *w, uint32_t t,
                          uint32_t k)
{
    const uint32_t rows = (r->heads + 2 * r->kv_heads) * r->head_dim;
    void (*const kernel[])(cuda_rope, const uint4 *, const uint4 *,
                           uint32_t) = {few_rope_kernel<1>, few_rope_kernel<2>, few_rope_kernel<3>, few_rope_kernel<4>};
    return launch_few(kernel, t, rows / 2, stream, *r, (const uint4 *)x, (const uint4 *)w, k / 8);
}
