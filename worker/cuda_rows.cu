/* cuda_rows.cu - what happens to rows between the products. All of it is bound by memory or by latency. */
#include <cuda_bf16.h>

#include "worker/cuda_kernels.h"
#include "worker/cuda_launch.cuh"
#include "worker/model_convert.h"

namespace
{
constexpr uint32_t WARP = 32;
constexpr uint32_t NORM_THREADS_MAX = 1024; /* one float4 each for a hidden size of 4096 */
constexpr uint32_t ROPE_THREADS = 256;      /* 8 heads at a time */
constexpr uint32_t EACH_THREADS = 256;
constexpr uint32_t RANDOM_BLOCKS = 4096;

struct alignas(8) bf16x4 {
    __nv_bfloat162 lo, hi;
};

__device__ bf16x4 to_bf16(float4 v)
{
    return {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
}

__device__ float4 to_float(bf16x4 v)
{
    float2 lo = __bfloat1622float2(v.lo), hi = __bfloat1622float2(v.hi);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
}

__device__ float warp_sum(float v)
{
    for (uint32_t mask = WARP / 2; mask; mask >>= 1)
        v += __shfl_xor_sync(~0u, v, mask);
    return v;
}

/* The same bits in all threads. */
__device__ float block_sum(float v)
{
    __shared__ float part[NORM_THREADS_MAX / WARP];
    v = warp_sum(v);
    if (threadIdx.x % WARP == 0)
        part[threadIdx.x / WARP] = v;
    __syncthreads();
    v = threadIdx.x % WARP < blockDim.x / WARP ? part[threadIdx.x % WARP] : 0;
    return warp_sum(v);
}

/* Of the row's token within the table; wraps to a large number below its first. */
__device__ uint32_t place_of(const cuda_embedding &e, uint32_t row)
{
    uint32_t token = e.row[row].token;
    return (token & CUDA_TOKEN_OF_SLOT ? e.last[token & ~CUDA_TOKEN_OF_SLOT] : token) - e.first;
}

/* One block per row. */
__global__ void embed_kernel(float4 *x, cuda_embedding e)
{
    const uint32_t place = place_of(e, blockIdx.x), quads = e.hidden / 4;
    const bf16x4 *in = (const bf16x4 *)e.table + (uint64_t)place * quads;
    for (uint32_t i = threadIdx.x; i < quads; i += blockDim.x)
        x[(uint64_t)blockIdx.x * quads + i] = place < e.count ? to_float(in[i]) : make_float4(0, 0, 0, 0);
}

/* One block per row. */
__global__ void embed_part_kernel(bf16x4 *out, cuda_embedding e)
{
    const uint32_t place = place_of(e, blockIdx.x), quads = e.hidden / 4;
    const bf16x4 *in = (const bf16x4 *)e.table + (uint64_t)place * quads;
    for (uint32_t i = threadIdx.x; i < quads; i += blockDim.x)
        out[(uint64_t)blockIdx.x * quads + i] = place < e.count ? in[i] : to_bf16(make_float4(0, 0, 0, 0));
}

__device__ float4 plus(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ float squares_of(float4 v)
{
    return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}

__device__ bf16x4 scaled(float4 v, float factor, float4 w)
{
    return to_bf16(make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w));
}

/* One block per row of h. A thread keeps its first quad and that quad's weights; of wider rows it reads the others twice,
 * the second time from the cache. */
__global__ void __launch_bounds__(NORM_THREADS_MAX)
    norm_kernel(bf16x4 *h, float *x, const float *bias, const float *weight, float eps, const cuda_sample *pick,
                uint32_t quads)
{
    const float4 *weights = (const float4 *)weight, *biases = (const float4 *)bias;
    const uint32_t mine = threadIdx.x;
    const float4 zero = make_float4(0, 0, 0, 0);
    cuda_let_next_begin();
    float4 first_weight = mine < quads ? weights[mine] : zero;
    float4 first_bias = bias && mine < quads ? biases[mine] : zero;
    cuda_wait_for_previous();
    uint32_t row = pick ? pick[blockIdx.x].row : blockIdx.x;
    float4 *in = (float4 *)x + (uint64_t)row * quads;
    bf16x4 *out = h + (uint64_t)blockIdx.x * quads;
    float4 first = mine < quads ? plus(in[mine], first_bias) : zero;
    float squares = squares_of(first);
    if (bias && !pick && mine < quads)
        in[mine] = first;
    for (uint32_t i = mine + blockDim.x; i < quads; i += blockDim.x) {
        float4 v = bias ? plus(in[i], biases[i]) : in[i];
        if (bias && !pick)
            in[i] = v;
        squares += squares_of(v);
    }
    float factor = rsqrtf(block_sum(squares) / (float)(4 * quads) + eps);
    if (mine < quads)
        out[mine] = scaled(first, factor, first_weight);
    for (uint32_t i = mine + blockDim.x; i < quads; i += blockDim.x)
        out[i] = scaled(bias && pick ? plus(in[i], biases[i]) : in[i], factor, weights[i]);
}

/* One block per row, one warp per head at a time. Lane l has the pairs of elements 2l, 2l + 1 of the first half of the head
 * and those of the second half that turn with them; heads of more than 128 take two rounds. */
__global__ void rope_kernel(cuda_rope r)
{
    cuda_let_next_begin();
    cuda_wait_for_previous();
    const cuda_row row = r.row[blockIdx.x];
    const uint32_t lane = threadIdx.x % WARP, half = r.head_dim / 2, all = r.heads + 2 * r.kv_heads;
    __nv_bfloat16 *base = (__nv_bfloat16 *)r.qkv + (uint64_t)blockIdx.x * all * r.head_dim;
    const float *cosine = r.cosine + (uint64_t)row.position * half, *sine = r.sine + (uint64_t)row.position * half;
    for (uint32_t head = threadIdx.x / WARP; head < all; head += ROPE_THREADS / WARP) {
        const bool is_q = head < r.heads, is_v = head >= r.heads + r.kv_heads;
        const __nv_bfloat16 *in = base + (uint64_t)head * r.head_dim;
        float2 a[2] = {}, b[2] = {};
        float squares = 0;
#pragma unroll
        for (uint32_t j = 0; j < 2; j++) {
            uint32_t i = 2 * (lane + j * WARP);
            if (i >= half)
                continue;
            a[j] = __bfloat1622float2(*(const __nv_bfloat162 *)(in + i));
            b[j] = __bfloat1622float2(*(const __nv_bfloat162 *)(in + half + i));
            if (r.bias) {
                const float *bias = r.bias + (uint64_t)head * r.head_dim;
                a[j] = make_float2(a[j].x + bias[i], a[j].y + bias[i + 1]);
                b[j] = make_float2(b[j].x + bias[half + i], b[j].y + bias[half + i + 1]);
            }
            squares += a[j].x * a[j].x + a[j].y * a[j].y + b[j].x * b[j].x + b[j].y * b[j].y;
        }
        const float *norm = is_v ? nullptr : is_q ? r.q_norm : r.k_norm;
        float factor = norm ? rsqrtf(warp_sum(squares) / (float)r.head_dim + r.eps) : 1;
        uint32_t kv_head = is_v ? head - r.heads - r.kv_heads : head - r.heads;
        __nv_bfloat16 *out = base + (uint64_t)head * r.head_dim;
        if (!is_q) {
            if (!row.k)
                continue;
            out = (__nv_bfloat16 *)(row.k + r.layer_offset + (is_v ? r.v_offset : 0) + kv_head * r.head_stride);
        }
#pragma unroll
        for (uint32_t j = 0; j < 2; j++) {
            uint32_t i = 2 * (lane + j * WARP);
            if (i >= half)
                continue;
            float2 p = a[j], q = b[j];
            if (norm) {
                p = make_float2(p.x * factor * norm[i], p.y * factor * norm[i + 1]);
                q = make_float2(q.x * factor * norm[half + i], q.y * factor * norm[half + i + 1]);
            }
            float2 c = is_v ? make_float2(1, 1) : make_float2(cosine[i], cosine[i + 1]);
            float2 s = is_v ? make_float2(0, 0) : make_float2(sine[i], sine[i + 1]);
            *(__nv_bfloat162 *)(out + i) = __floats2bfloat162_rn(p.x * c.x - q.x * s.x, p.y * c.y - q.y * s.y);
            *(__nv_bfloat162 *)(out + half + i) = __floats2bfloat162_rn(q.x * c.x + p.x * s.x, q.y * c.y + p.y * s.y);
        }
    }
}

__device__ float silu_times(float gate, float up)
{
    return gate / (1 + __expf(-gate)) * up;
}

/* A thread per four columns; blocks (row of activations, part of its columns): there may be 65536 rows. */
__global__ void swiglu_kernel(bf16x4 *act, const bf16x4 *gate_up, const float *bias, uint32_t quads)
{
    uint32_t i = blockIdx.y * EACH_THREADS + threadIdx.x;
    cuda_let_next_begin();
    cuda_wait_for_previous();
    if (i >= quads)
        return;
    const bf16x4 *in = gate_up + (uint64_t)blockIdx.x * 2 * quads;
    float4 g = to_float(in[i]), u = to_float(in[quads + i]);
    if (bias) {
        float4 bg = ((const float4 *)bias)[i], bu = ((const float4 *)bias)[quads + i];
        g = make_float4(g.x + bg.x, g.y + bg.y, g.z + bg.z, g.w + bg.w);
        u = make_float4(u.x + bu.x, u.y + bu.y, u.z + bu.z, u.w + bu.w);
    }
    act[(uint64_t)blockIdx.x * quads + i] =
        to_bf16(make_float4(silu_times(g.x, u.x), silu_times(g.y, u.y), silu_times(g.z, u.z), silu_times(g.w, u.w)));
}

__global__ void random_kernel(__nv_bfloat16 *out, uint64_t seed, uint64_t first, uint64_t n, float scale)
{
    uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
        out[i] = __float2bfloat16_rn(model_random_value(seed, first + i, scale));
}

uint32_t norm_threads(uint32_t quads)
{
    uint32_t threads = (quads + WARP - 1) / WARP * WARP;
    return threads < NORM_THREADS_MAX ? threads : NORM_THREADS_MAX;
}
} // namespace

cudaError_t cuda_embed(cudaStream_t stream, float *x, const struct cuda_embedding *e)
{
    embed_kernel<<<e->rows, norm_threads(e->hidden / 4), 0, stream>>>((float4 *)x, *e);
    return cudaGetLastError();
}

cudaError_t cuda_embed_part(cudaStream_t stream, void *out, const struct cuda_embedding *e)
{
    embed_part_kernel<<<e->rows, norm_threads(e->hidden / 4), 0, stream>>>((bf16x4 *)out, *e);
    return cudaGetLastError();
}

cudaError_t cuda_norm(cudaStream_t stream, void *h, float *x, const float *bias, const float *weight, float eps,
                      const struct cuda_sample *pick, uint32_t rows, uint32_t hidden)
{
    return cuda_launch_early(norm_kernel, rows, norm_threads(hidden / 4), stream, (bf16x4 *)h, x, bias, weight, eps,
                             pick, hidden / 4);
}

cudaError_t cuda_rope_kv(cudaStream_t stream, const struct cuda_rope *r, uint32_t rows)
{
    return cuda_launch_early(rope_kernel, rows, ROPE_THREADS, stream, *r);
}

cudaError_t cuda_swiglu(cudaStream_t stream, void *act, const void *gate_up, const float *bias, uint32_t rows,
                        uint32_t inner)
{
    dim3 grid(rows, (inner / 4 + EACH_THREADS - 1) / EACH_THREADS);
    return cuda_launch_early(swiglu_kernel, grid, EACH_THREADS, stream, (bf16x4 *)act, (const bf16x4 *)gate_up, bias,
                             inner / 4);
}

cudaError_t cuda_random(cudaStream_t stream, void *out, uint64_t seed, uint64_t first, uint64_t n, float scale)
{
    random_kernel<<<RANDOM_BLOCKS, EACH_THREADS, 0, stream>>>((__nv_bfloat16 *)out, seed, first, n, scale);
    return cudaGetLastError();
}
