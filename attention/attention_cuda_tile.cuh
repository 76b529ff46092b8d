/* attention_cuda_tile.cuh - what a warp of the portable CUDA back end does with a tile of keys: copies into shared memory, scores,
 * softmax, sums. Shapes and layouts: attention_cuda_run.cuh.
 */
#ifndef TANDEM_ATTENTION_CUDA_TILE_CUH
#define TANDEM_ATTENTION_CUDA_TILE_CUH

#include "attention/attention_bend.cuh"
#include "attention/attention_cuda.cuh"
#include "attention/attention_ptx.cuh"

constexpr uint32_t MERGE_PAD = 8; /* floats: rows of sums start in different banks */

template <uint32_t PADDED, uint32_t MTILES_, uint32_t TILE_, uint32_t SLOTS_, typename Type_> struct run_shape {
    using Type = Type_;
    static constexpr uint32_t DP = PADDED;
    static constexpr uint32_t MTILES = MTILES_; /* 16 rows each, per warp */
    static constexpr uint32_t TILE = TILE_;     /* keys of a prefill tile */
    static constexpr uint32_t SLOTS = SLOTS_;   /* of a decode ring: 16 rows of K or V each, in turn */
    static constexpr uint32_t UNIT_ROWS = WARPS * MTILES * 16;
    static constexpr uint32_t CHUNKS = DP / 8; /* 16 bytes each, of a row */
    static constexpr uint32_t ROW_BYTES = DP * 2;
    static constexpr uint32_t PREFILL_BYTES = (UNIT_ROWS + 2 * TILE) * ROW_BYTES;
    static constexpr uint32_t RING_BYTES = SLOTS * 16 * ROW_BYTES; /* of a warp */
    static constexpr uint32_t DECODE_BYTES = 16 * ROW_BYTES + WARPS * RING_BYTES;
    static constexpr uint32_t MERGE_BYTES = WARPS * 16 * (DP + MERGE_PAD) * 4;
    static constexpr uint32_t MOST = PREFILL_BYTES > DECODE_BYTES ? PREFILL_BYTES : DECODE_BYTES;
    static constexpr uint32_t SHARED_BYTES = MOST > MERGE_BYTES ? MOST : MERGE_BYTES;
    /* Decode alone: so much that a third block does not fit into the 227 KiB of an SM. It would be the next launch's, and
     * leave the blocks of that one uneven over the SMs: 252 us became 318 (32 decodes of 8K). */
    static constexpr uint32_t ALONE_BYTES = SHARED_BYTES > 78 * 1024 ? SHARED_BYTES : 78 * 1024;
    /* Two blocks per SM where that has 164 KiB, each with 1 KiB of the system's and the kernel's own few. */
    static_assert(BLOCKS_PER_SM * (ALONE_BYTES + 2048) <= 164 * 1024, "shared memory of two blocks");
    static_assert(SLOTS % 2 == 0, "what comes into a slot is what was in it");
    static_assert(DP % 64 == 0, "the swizzle needs whole groups of 8 chunks");
    static_assert(UNIT_ROWS % TILE_KEYS == 0 && TILE % 16 == 0, "tiles");
};

struct run_seq {
    const char *k, *v; /* this item's KV head, this layer */
    uint32_t first_row, rows, kv_len, packed;
};

struct run_shared {
    attn_item item;
    uint32_t role; /* ROLES: no more items */
    uint2 counts;  /* items of prefill, of decode */
    uint32_t last; /* this block finished the last part of its unit */
    float merge_max[WARPS][16], merge_sum[WARPS][16];
};

__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk, uint32_t row_bytes)
{
    return row * row_bytes + ((chunk ^ (row & 7)) << 4);
}

/* Packed row p sees keys first_key(limit) .. limit - 1. Rows behind the last see what it sees. */
__device__ __forceinline__ uint32_t limit_of(const cuda_run_args &a, const run_seq &s, uint32_t p)
{
    return s.kv_len - s.rows + (p < s.packed ? p : s.packed - 1) / a.group + 1;
}

__device__ __forceinline__ uint32_t first_key(const cuda_run_args &a, uint32_t limit)
{
    return a.window && limit > a.window ? limit - a.window : 0;
}

__device__ __forceinline__ uint64_t row_offset(const cuda_run_args &a, const run_seq &s, uint32_t kv_head, uint32_t p,
                                               uint64_t stride)
{
    return (uint64_t)(s.first_row + p / a.group) * stride +
           (uint64_t)(kv_head * a.group + p % a.group) * a.head_dim * 2;
}

/* Copies of ROWS packed rows of q from `first` on; zeros behind the sequence and behind D. */
template <typename C, uint32_t ROWS>
__device__ __forceinline__ void load_q(const cuda_run_args &a, const run_seq &s, uint32_t kv_head, uint32_t first,
                                       uint32_t shared)
{
    for (uint32_t i = threadIdx.x; i < ROWS * C::CHUNKS; i += THREADS) {
        uint32_t r = i / C::CHUNKS, c = i % C::CHUNKS, p = first + r;
        bool on = p < s.packed && c * 8 < a.head_dim;
        uint64_t at = on ? row_offset(a, s, kv_head, p, a.q_row_stride) + c * 16 : 0;
        ptx_copy16(shared + swizzled(r, c, C::ROW_BYTES), a.q + at, on);
    }
}

/* The same at once, by plain reads, which no group of copies waits for. */
template <typename C, uint32_t ROWS>
__device__ __forceinline__ void load_q_now(const cuda_run_args &a, const run_seq &s, uint32_t kv_head, uint32_t first,
                                           char *bytes)
{
#pragma unroll
    for (uint32_t i = threadIdx.x; i < ROWS * C::CHUNKS; i += THREADS) {
        uint32_t r = i / C::CHUNKS, c = i % C::CHUNKS, p = first + r;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (p < s.packed && c * 8 < a.head_dim)
            x = *(const uint4 *)(a.q + row_offset(a, s, kv_head, p, a.q_row_stride) + c * 16);
        *(uint4 *)(bytes + swizzled(r, c, C::ROW_BYTES)) = x;
    }
}

/* Copies of KEYS rows of K or V from key `from` on by N threads, this one the i-th; zeros from key `end` on and behind D:
 * 0 times whatever stands there would not be 0. */
template <typename C, uint32_t KEYS, uint32_t N>
__device__ __forceinline__ void load_keys(const cuda_run_args &a, const char *base, uint32_t from, uint32_t end,
                                          uint32_t i, uint32_t shared)
{
    constexpr uint32_t STEP = N / C::CHUNKS > 0 ? N / C::CHUNKS : 1; /* rows per round */
    static_assert(N % C::CHUNKS == 0 && KEYS % STEP == 0, "whole rows per round");
    uint32_t r = i / C::CHUNKS, c = i % C::CHUNKS;
    bool in_row = c * 8 < a.head_dim;
    const char *src = base + (uint64_t)(from + r) * a.token_stride + c * 16;
    uint64_t step = STEP * a.token_stride;
#pragma unroll
    for (uint32_t round = 0; round < KEYS / STEP; round++, r += STEP, src += step) {
        bool on = in_row && from + r < end;
        ptx_copy16(shared + swizzled(r, c, C::ROW_BYTES), on ? src : base, on);
    }
}

/* s[m][n] = q (MT tiles of 16 rows, at rows of q_shared) times NT * 8 keys at k_shared. */
template <typename C, uint32_t MT, uint32_t NT>
__device__ __forceinline__ void scores(float (&s)[MT][NT][4], uint32_t q_shared, uint32_t q_row, uint32_t k_shared)
{
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t q_lane = q_row + lane % 16, k_lane = lane % 8 + (lane / 16) * 8;
#pragma unroll
    for (uint32_t m = 0; m < MT; m++)
#pragma unroll
        for (uint32_t n = 0; n < NT; n++)
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                s[m][n][i] = 0;
#pragma unroll
    for (uint32_t k = 0; k < C::DP / 16; k++) {
        uint32_t q[MT][4];
#pragma unroll
        for (uint32_t m = 0; m < MT; m++)
            ptx_ldmatrix(q[m], q_shared + swizzled(q_lane + m * 16, 2 * k + lane / 16, C::ROW_BYTES));
#pragma unroll
        for (uint32_t n = 0; n < NT; n += 2) {
            uint32_t b[4];
            ptx_ldmatrix(b, k_shared + swizzled(k_lane + n * 8, 2 * k + lane / 8 % 2, C::ROW_BYTES));
#pragma unroll
            for (uint32_t m = 0; m < MT; m++) {
                C::Type::mma(s[m][n], q[m], b[0], b[1]);
                C::Type::mma(s[m][n + 1], q[m], b[2], b[3]);
            }
        }
    }
}

/* o += p (as left by softmax, rounded to 16 bits) times NT * 8 rows of V. */
template <typename C, uint32_t MT, uint32_t NT>
__device__ __forceinline__ void values(float (&o)[MT][C::CHUNKS][4], const float (&p)[MT][NT][4], uint32_t v_shared)
{
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t n = 0; n < NT; n += 2) {
        uint32_t w[MT][4];
#pragma unroll
        for (uint32_t m = 0; m < MT; m++) {
            w[m][0] = C::Type::pack(p[m][n][0], p[m][n][1]);
            w[m][1] = C::Type::pack(p[m][n][2], p[m][n][3]);
            w[m][2] = C::Type::pack(p[m][n + 1][0], p[m][n + 1][1]);
            w[m][3] = C::Type::pack(p[m][n + 1][2], p[m][n + 1][3]);
        }
#pragma unroll
        for (uint32_t d = 0; d < C::CHUNKS; d += 2) {
            uint32_t b[4];
            ptx_ldmatrix_trans(b, v_shared + swizzled(n * 8 + lane % 16, d + lane / 16, C::ROW_BYTES));
#pragma unroll
            for (uint32_t m = 0; m < MT; m++) {
                C::Type::mma(o[m][d], w[m], b[0], b[1]);
                C::Type::mma(o[m][d + 1], w[m], b[2], b[3]);
            }
        }
    }
}

/* Bends scores (soft cap, scales that are not positive) into powers of 2. */
template <uint32_t MT, uint32_t NT> __device__ __forceinline__ void bend(const cuda_run_args &a, float (&s)[MT][NT][4])
{
#pragma unroll
    for (uint32_t m = 0; m < MT; m++)
#pragma unroll
        for (uint32_t n = 0; n < NT; n++)
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                float x = s[m][n][i];
                s[m][n][i] = a.bend_out * (a.bend_in != 0 ? attn_tanh(a.bend_in * x) : x);
            }
}

/* Weight 0 for keys that a row does not see. Element i of n is key from + n * 8 + lane % 4 * 2 + i % 2, row half i / 2. */
template <uint32_t MT, uint32_t NT>
__device__ __forceinline__ void mask(const cuda_run_args &a, float (&s)[MT][NT][4], const uint32_t (&limit)[MT][2],
                                     uint32_t from)
{
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t n = 0; n < NT; n++)
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t key = from + n * 8 + lane % 4 * 2 + i % 2;
#pragma unroll
            for (uint32_t m = 0; m < MT; m++)
                if (key >= limit[m][i / 2] || key < first_key(a, limit[m][i / 2]))
                    s[m][n][i] = -INFINITY;
        }
}

__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

/* Running maximum (of unscaled scores) and this thread's share of the sum of powers, by row half. */
template <uint32_t MT> struct running {
    float max[MT][2], sum[MT][2];
};

/* Scores become powers of 2 below the new maximum; o and the sums follow it. */
template <typename C, uint32_t MT, uint32_t NT>
__device__ __forceinline__ void softmax(float (&s)[MT][NT][4], float (&o)[MT][C::CHUNKS][4], running<MT> &run,
                                        float scale)
{
#pragma unroll
    for (uint32_t m = 0; m < MT; m++)
#pragma unroll
        for (uint32_t h = 0; h < 2; h++) {
            float top = run.max[m][h];
#pragma unroll
            for (uint32_t n = 0; n < NT; n++)
                top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
            top = quad_max(top);
            float base = top == -INFINITY ? 0 : __fmul_rn(top, scale); /* no key seen yet: all powers are 0, not NaN */
            /* Rounded as base was, not fused: exactly 1 where the maximum stays. */
            float shrink = ptx_exp2(__fmul_rn(run.max[m][h], scale) - base);
            run.max[m][h] = top;
            float sum = run.sum[m][h] * shrink;
#pragma unroll
            for (uint32_t n = 0; n < NT; n++)
#pragma unroll
                for (uint32_t i = 2 * h; i < 2 * h + 2; i++) {
                    s[m][n][i] = ptx_exp2(s[m][n][i] * scale - base);
                    sum += s[m][n][i];
                }
            run.sum[m][h] = sum;
            if (__any_sync(0xffffffff, shrink != 1)) {
#pragma unroll
                for (uint32_t d = 0; d < C::CHUNKS; d++) {
                    o[m][d][2 * h] *= shrink;
                    o[m][d][2 * h + 1] *= shrink;
                }
            }
        }
}

template <typename C, uint32_t MT> __device__ __forceinline__ void clear(float (&o)[MT][C::CHUNKS][4], running<MT> &run)
{
#pragma unroll
    for (uint32_t m = 0; m < MT; m++) {
#pragma unroll
        for (uint32_t d = 0; d < C::CHUNKS; d++)
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                o[m][d][i] = 0;
#pragma unroll
        for (uint32_t h = 0; h < 2; h++) {
            run.max[m][h] = -INFINITY;
            run.sum[m][h] = 0;
        }
    }
}

#endif
