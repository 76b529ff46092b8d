/* cuda_some.cu - products of 5 to 16 rows of activations, by tensor cores, bound by reading W once.
 *
 * A block has 32 rows of W, and its warps every eighth piece of 64 elements of K; what they have is added up in shared memory, in
 * order of warps. W goes from memory into registers as mma.sync wants it: a thread reads 16 bytes of a row, 8 elements that stand side by
 * side, and counts them as those that are its own in two products of 16. The same elements of x are its own then, so K is in another
 * order for both, which a sum does not mind.
 */
#include <cuda_bf16.h>

#include "worker/cuda_kernels.h"
#include "worker/cuda_launch.cuh"

namespace
{
constexpr uint32_t WARP = 32, WARPS = 8;
constexpr uint32_t TILE = 16, TILES = 2; /* rows of W of a product; and products side by side */
constexpr uint32_t COLS = 8;             /* rows of x in a product */
constexpr uint32_t PIECE = 64;           /* of K: whole lines of 128 bytes */
constexpr uint32_t HALVES = PIECE / 32;  /* loads of 16 bytes of a row by four threads */

__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* What a warp has of W: the 16 bytes of row `group` and of the eighth behind it, of each tile, in each half of a piece. */
struct piece {
    uint4 w[TILES][2][HALVES];
};

struct place {
    const uint4 *row[TILES][2]; /* NULL: behind the last one */
    uint32_t eights, at;        /* 16 bytes each: of a row; this thread's in a half */
};

__device__ __forceinline__ void load(piece *p, const place &w, uint32_t from)
{
#pragma unroll
    for (uint32_t t = 0; t < TILES; t++)
#pragma unroll
        for (uint32_t r = 0; r < 2; r++)
#pragma unroll
            for (uint32_t h = 0; h < HALVES; h++) {
                const uint32_t i = from + h * 4 + w.at;
                p->w[t][r][h] = w.row[t][r] && i < w.eights ? __ldcs(w.row[t][r] + i) : make_uint4(0, 0, 0, 0);
            }
}

template <uint32_t NT>
__device__ __forceinline__ void add(float (&sum)[TILES][NT][4], const piece &p, const uint4 *const (&x)[NT],
                                    const place &w, uint32_t from)
{
#pragma unroll
    for (uint32_t h = 0; h < HALVES; h++) {
        const uint32_t i = from + h * 4 + w.at;
#pragma unroll
        for (uint32_t n = 0; n < NT; n++) {
            const uint4 b =
                x[n] && i < w.eights ? __ldca(x[n] + i) : make_uint4(0, 0, 0, 0); /* not __ldg: another kernel's */
#pragma unroll
            for (uint32_t t = 0; t < TILES; t++) {
                const uint4 a = p.w[t][0][h], c = p.w[t][1][h];
                multiply(sum[t][n], a.x, c.x, a.y, c.y, b.x, b.y);
                multiply(sum[t][n], a.z, c.z, a.w, c.w, b.z, b.w);
            }
        }
    }
}

/* One row of W, of a tile of the block: gate's in the first one and up's in the second, or rows that follow each other. */
__device__ __forceinline__ uint32_t row_of(uint32_t tile, uint32_t in_tile, uint32_t n, bool swiglu)
{
    return swiglu ? tile * n + blockIdx.x * TILE + in_tile : (blockIdx.x * TILES + tile) * TILE + in_tile;
}

/* n: columns of y; W has as many rows, or twice as many where they are gate and up. UNDER_WAY: pieces of a warp that are read at a
 * time, 4 KiB each; BLOCKS: of an SM. */
template <uint32_t NT, enum cuda_out OUT, uint32_t UNDER_WAY, uint32_t BLOCKS>
__global__ void __launch_bounds__(WARP *WARPS, BLOCKS)
    some_kernel(void *y, const uint4 *x, const uint4 *__restrict__ w, const float *__restrict__ bias, uint32_t rows,
                uint32_t n, uint32_t eights)
{
    constexpr bool SWIGLU = OUT == CUDA_OUT_SWIGLU;
    __shared__ float part[WARPS][NT * COLS][TILES * TILE + 1];
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quad = lane % 4;
    const uint32_t step = PIECE / 8 * WARPS;
    place at = {{}, eights, quad};
#pragma unroll
    for (uint32_t t = 0; t < TILES; t++)
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            const uint32_t row = row_of(t, r * 8 + group, n, SWIGLU), end = SWIGLU ? (t + 1) * n : n;
            at.row[t][r] = row < end ? w + (uint64_t)row * eights : NULL;
        }
    piece p[UNDER_WAY];
    uint32_t from = warp * (PIECE / 8);
#pragma unroll
    for (uint32_t u = 0; u < UNDER_WAY; u++)
        load(&p[u], at, from + u * step);
    cuda_wait_for_previous();
    const uint4 *own[NT];
#pragma unroll
    for (uint32_t i = 0; i < NT; i++)
        own[i] = i * COLS + group < rows ? x + (uint64_t)(i * COLS + group) * eights : NULL;
    float sum[TILES][NT][4] = {};
    while (from < eights) {
#pragma unroll
        for (uint32_t u = 0; u < UNDER_WAY; u++) {
            add<NT>(sum, p[u], own, at, from + u * step);
            load(&p[u], at, from + (UNDER_WAY + u) * step); /* zeros behind the end */
        }
        from += UNDER_WAY * step;
        if (from + UNDER_WAY * step >= eights)
            cuda_let_next_begin();
    }
    cuda_let_next_begin();
#pragma unroll
    for (uint32_t t = 0; t < TILES; t++)
#pragma unroll
        for (uint32_t i = 0; i < NT; i++)
#pragma unroll
            for (uint32_t e = 0; e < 4; e++)
                part[warp][i * COLS + quad * 2 + e % 2][t * TILE + e / 2 * 8 + group] = sum[t][i][e];
    __syncthreads();
    constexpr uint32_t OUTS = SWIGLU ? TILE : TILES * TILE;
    for (uint32_t i = threadIdx.x; i < NT * COLS * OUTS; i += WARP * WARPS) {
        const uint32_t r = i / OUTS, c = i % OUTS, column = blockIdx.x * OUTS + c;
        if (r >= rows || column >= n)
            continue;
        float v = 0, up = 0;
#pragma unroll
        for (uint32_t k = 0; k < WARPS; k++) {
            v += part[k][r][c];
            if (SWIGLU)
                up += part[k][r][TILE + c];
        }
        const uint64_t to = (uint64_t)r * n + column;
        if (SWIGLU) {
            const float g = v + (bias ? bias[column] : 0), u = up + (bias ? bias[n + column] : 0);
            ((__nv_bfloat16 *)y)[to] = __float2bfloat16_rn(g / (1 + __expf(-g)) * u);
        } else if (OUT == CUDA_OUT_BF16) {
            ((__nv_bfloat16 *)y)[to] = __float2bfloat16_rn(v);
        } else {
            ((float *)y)[to] = OUT == CUDA_OUT_F32_ADD ? ((const float *)y)[to] + v : v;
        }
    }
}

template <enum cuda_out OUT>
cudaError_t launch(cudaStream_t stream, void *y, const void *x, const void *w, const float *bias, uint32_t t,
                   uint32_t n, uint32_t k)
{
    if (t < 1 || t > CUDA_SOME_ROWS_MAX || k % 8)
        return cudaErrorInvalidValue;
    constexpr uint32_t OUTS = OUT == CUDA_OUT_SWIGLU ? TILE : TILES * TILE;
    const uint32_t blocks = (n + OUTS - 1) / OUTS;
    int device, sms;
    cudaError_t err = cudaGetDevice(&device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (err != cudaSuccess)
        return err;
    /* A block for each SM at most: it alone keeps memory busy, with more under way. Which is not faster where two of them do. */
    auto *kernel = blocks <= (uint32_t)sms ? (t <= COLS ? some_kernel<1, OUT, 3, 1> : some_kernel<2, OUT, 3, 1>)
                                           : (t <= COLS ? some_kernel<1, OUT, 1, 2> : some_kernel<2, OUT, 2, 2>);
    return cuda_launch_early(kernel, blocks, WARP * WARPS, stream, y, (const uint4 *)x, (const uint4 *)w, bias, t, n,
                             k / 8);
}
} // namespace

cudaError_t cuda_some_rows(cudaStream_t stream, void *y, enum cuda_out out, const void *x, const void *w,
                           const float *bias, uint32_t t, uint32_t n, uint32_t k)
{
    switch (out) {
    case CUDA_OUT_BF16:
        return launch<CUDA_OUT_BF16>(stream, y, x, w, bias, t, n, k);
    case CUDA_OUT_F32:
        return launch<CUDA_OUT_F32>(stream, y, x, w, bias, t, n, k);
    case CUDA_OUT_F32_ADD:
        return launch<CUDA_OUT_F32_ADD>(stream, y, x, w, bias, t, n, k);
    default:
        return launch<CUDA_OUT_SWIGLU>(stream, y, x, w, bias, t, n, k);
    }
}
