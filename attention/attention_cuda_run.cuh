/* attention_cuda_run.cuh - the kernels of the portable CUDA back end, for one padded head dimension and dtype: one for both
 * roles and for prefill, one for decode alone.
 *
 * Grid: BLOCKS_PER_SM per SM; every block stays and takes items until there are none. Of the blocks of an SM one begins
 * with prefill, the next with decode, so that an SM computes and reads at the same time; when the list of its
 * role is empty a block turns to the other (POD-Attention, with items instead of blocks).
 *
 * The kernel for decode alone fills its first rings before the launch in front of it has ended (attention_launch.cuh): keys
 * of earlier steps, which stand before the sequence's last `rows`, were written before the plan. What the launch in front
 * may still write, those last rows, q and what others count, it touches after.
 *
 *   prefill item: the block computes unit_rows packed rows, MTILES tiles of 16 per warp; K and V tiles of TILE keys are
 *   shared; one buffer each: K of the next tile comes in under softmax and PV, V under QK. The other block of the SM fills
 *   the gaps.
 *
 *       shared:  Q [unit_rows][DP] | K [TILE][DP] | V [TILE][DP]
 *
 *   decode item: up to 16 packed rows; each warp takes every fourth group of 16 keys, with a ring of its own that only it
 *   waits for (virtual blocks of one warp); at the end the four are added up.
 *
 *       shared:  Q [16][DP] | warp 0: K [16][DP] V [16][DP] .. (SLOTS of them) | warp 1 ..    then: sums [4][16][DP + 8]
 *
 * Rows in shared memory are swizzled: chunk c (16 bytes) of row r stands at c ^ (r % 8), so that the 8 rows of an ldmatrix
 * lie in different banks.
 */
#ifndef TANDEM_ATTENTION_CUDA_RUN_CUH
#define TANDEM_ATTENTION_CUDA_RUN_CUH

#include "attention/attention_bend.cuh"
#include "attention/attention_cuda.cuh"
#include "attention/attention_launch.cuh"
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

/* After a part's sums were written by all threads: whether the block's was the last part of the unit; then the others'
 * sums can be read. */
__device__ __forceinline__ bool arrive_last(const cuda_run_args &a, attn_role role, run_shared &sh)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t *arrived = &a.ws.arrived[role][sh.item.slot];
        __threadfence(); /* of what all threads wrote before the barrier */
        sh.last = atomicAdd(arrived, 1) + 1 == sh.item.parts;
        if (sh.last)
            *arrived = 0; /* nobody else comes; for the next layer */
        __threadfence();
    }
    __syncthreads();
    return sh.last;
}

/* out of a unit whose parts have all been written: ROWS rows per slot. Sums in order of keys, whoever came last. A thread
 * has QUADS_AT_ONCE sums of four and reads PARTS_AT_ONCE parts of them at a time: each read that waits for another takes
 * half a microsecond. */
template <typename C, uint32_t ROWS, uint32_t QUADS_AT_ONCE, uint32_t PARTS_AT_ONCE>
__device__ void combine(const cuda_run_args &a, const run_seq &s, attn_role role, const attn_item &it)
{
    constexpr uint32_t QUADS = C::DP / 4;
    const uint32_t rows = s.packed - it.first < ROWS ? s.packed - it.first : ROWS;
    const float2 *weights = a.ws.weights[role] + (uint64_t)it.slot * ROWS;
    const float4 *sums = (const float4 *)a.ws.sums[role] + (uint64_t)it.slot * ROWS * QUADS;
    for (uint32_t first = threadIdx.x; first < rows * QUADS; first += QUADS_AT_ONCE * THREADS) {
        float top[QUADS_AT_ONCE], sum[QUADS_AT_ONCE];
        float4 o[QUADS_AT_ONCE];
        uint32_t r[QUADS_AT_ONCE], c[QUADS_AT_ONCE];
#pragma unroll
        for (uint32_t j = 0; j < QUADS_AT_ONCE; j++) {
            uint32_t i = first + j * THREADS < rows * QUADS ? first + j * THREADS : first; /* again, not stored */
            r[j] = i / QUADS;
            c[j] = i % QUADS;
            top[j] = -INFINITY;
            sum[j] = 0;
            o[j] = make_float4(0, 0, 0, 0);
        }
#pragma unroll 1
        for (uint32_t p = 0; p < it.parts; p += PARTS_AT_ONCE) {
            float2 w[PARTS_AT_ONCE][QUADS_AT_ONCE];
            float4 x[PARTS_AT_ONCE][QUADS_AT_ONCE];
#pragma unroll
            for (uint32_t k = 0; k < PARTS_AT_ONCE; k++)
#pragma unroll
                for (uint32_t j = 0; j < QUADS_AT_ONCE; j++) {
                    const bool on = p + k < it.parts; /* a row that is there in any case; no branch between reads */
                    uint64_t row = (uint64_t)(on ? p + k : p) * ROWS + r[j];
                    float2 read = __ldcg(&weights[row]);
                    x[k][j] = __ldcg(&sums[row * QUADS + c[j]]);
                    w[k][j] = on ? read : make_float2(-INFINITY, 0);
                }
#pragma unroll
            for (uint32_t k = 0; k < PARTS_AT_ONCE; k++)
#pragma unroll
                for (uint32_t j = 0; j < QUADS_AT_ONCE; j++) {
                    /* A part none of whose keys the row sees has -infinity and nothing. */
                    float above = fmaxf(top[j], w[k][j].x), base = above == -INFINITY ? 0 : above;
                    float old = ptx_exp2(top[j] - base), f = ptx_exp2(w[k][j].x - base);
                    top[j] = above;
                    sum[j] = sum[j] * old + w[k][j].y * f;
                    o[j].x = o[j].x * old + x[k][j].x * f;
                    o[j].y = o[j].y * old + x[k][j].y * f;
                    o[j].z = o[j].z * old + x[k][j].z * f;
                    o[j].w = o[j].w * old + x[k][j].w * f;
                }
        }
#pragma unroll
        for (uint32_t j = 0; j < QUADS_AT_ONCE; j++) {
            if (first + j * THREADS >= rows * QUADS || c[j] * 4 >= a.head_dim)
                continue;
            float f = 1 / sum[j];
            uint2 packed = make_uint2(C::Type::pack(o[j].x * f, o[j].y * f), C::Type::pack(o[j].z * f, o[j].w * f));
            *(uint2 *)(a.out + row_offset(a, s, it.kv_head, it.first + r[j], a.out_row_stride) + c[j] * 8) = packed;
        }
    }
}

/* The rows of a warp, complete, by way of shared memory (its own rows of Q, which it has read for the last time). */
template <typename C>
__device__ __forceinline__ void store_rows(const cuda_run_args &a, const run_seq &s, const attn_item &it,
                                           const float (&o)[C::MTILES][C::CHUNKS][4], const running<C::MTILES> &run,
                                           char *q_bytes, uint32_t warp_row)
{
    const uint32_t lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (uint32_t m = 0; m < C::MTILES; m++)
#pragma unroll
        for (uint32_t h = 0; h < 2; h++) {
            float f = 1 / quad_sum(run.sum[m][h]);
            uint32_t r = warp_row + m * 16 + h * 8 + lane / 4;
#pragma unroll
            for (uint32_t d = 0; d < C::CHUNKS; d++)
                *(uint32_t *)(q_bytes + swizzled(r, d, C::ROW_BYTES) + lane % 4 * 4) =
                    C::Type::pack(o[m][d][2 * h] * f, o[m][d][2 * h + 1] * f);
        }
    __syncwarp();
    for (uint32_t i = lane; i < C::MTILES * 16 * C::CHUNKS; i += 32) {
        uint32_t r = warp_row + i / C::CHUNKS, c = i % C::CHUNKS, p = it.first + r;
        if (p < s.packed && c * 8 < a.head_dim)
            *(uint4 *)(a.out + row_offset(a, s, it.kv_head, p, a.out_row_stride) + c * 16) =
                *(const uint4 *)(q_bytes + swizzled(r, c, C::ROW_BYTES));
    }
}

/* The rows of a warp, of one part. */
template <typename C>
__device__ __forceinline__ void store_part(const cuda_run_args &a, const run_seq &s, const attn_item &it,
                                           const float (&o)[C::MTILES][C::CHUNKS][4], const running<C::MTILES> &run,
                                           uint32_t warp_row)
{
    const uint32_t lane = threadIdx.x % 32;
    uint64_t row0 = (uint64_t)(it.slot + it.part) * C::UNIT_ROWS;
#pragma unroll
    for (uint32_t m = 0; m < C::MTILES; m++)
#pragma unroll
        for (uint32_t h = 0; h < 2; h++) {
            uint32_t r = warp_row + m * 16 + h * 8 + lane / 4;
            float sum = quad_sum(run.sum[m][h]);
            if (it.first + r >= s.packed)
                continue;
            float *to = a.ws.sums[ROLE_PREFILL] + (row0 + r) * C::DP + lane % 4 * 2;
#pragma unroll
            for (uint32_t d = 0; d < C::CHUNKS; d++)
                *(float2 *)(to + d * 8) = make_float2(o[m][d][2 * h], o[m][d][2 * h + 1]);
            if (lane % 4 == 0)
                a.ws.weights[ROLE_PREFILL][row0 + r] = make_float2(run.max[m][h] * a.score_scale, sum);
        }
}

template <typename C>
__device__ __forceinline__ void prefill(const cuda_run_args &a, const run_seq &s, run_shared &sh, char *bytes)
{
    constexpr uint32_t MT = C::MTILES, NT = C::TILE / 8;
    const uint32_t lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * MT * 16;
    const uint32_t q_shared = ptx_shared(bytes), k_shared = q_shared + C::UNIT_ROWS * C::ROW_BYTES;
    const uint32_t v_shared = k_shared + C::TILE * C::ROW_BYTES;
    const attn_item it = sh.item; /* read from shared memory each time it cost 6 % */

    load_q<C, C::UNIT_ROWS>(a, s, it.kv_head, it.first, q_shared);
    load_keys<C, C::TILE, THREADS>(a, s.k, it.key_begin, it.key_end, threadIdx.x, k_shared);
    ptx_copy_commit();

    uint32_t limit[MT][2];
#pragma unroll
    for (uint32_t m = 0; m < MT; m++)
#pragma unroll
        for (uint32_t h = 0; h < 2; h++)
            limit[m][h] = limit_of(a, s, it.first + warp_row + m * 16 + h * 8 + lane / 4);
    const uint32_t first_limit = limit_of(a, s, it.first + warp_row); /* of the warp's rows */
    const uint32_t last_limit = limit_of(a, s, it.first + warp_row + MT * 16 - 1);
    const uint32_t seen_from = first_key(a, first_limit), seen_by_all_from = first_key(a, last_limit);
    const bool has_rows = it.first + warp_row < s.packed;

    float o[MT][C::CHUNKS][4];
    running<MT> run;
    clear<C, MT>(o, run);
    for (uint32_t from = it.key_begin; from < it.key_end; from += C::TILE) {
        ptx_copy_wait<0>();
        __syncthreads(); /* Q and this K are there; nobody reads the V before */
        load_keys<C, C::TILE, THREADS>(a, s.v, from, it.key_end, threadIdx.x, v_shared);
        ptx_copy_commit();
        /* Same for all threads of a warp. */
        const bool sees = has_rows && from < last_limit && from + C::TILE > seen_from;
        float p[MT][NT][4];
        if (sees)
            scores<C, MT, NT>(p, q_shared, warp_row, k_shared);
        ptx_copy_wait<0>();
        __syncthreads(); /* this V is there; nobody reads this K any more */
        if (from + C::TILE < it.key_end)
            load_keys<C, C::TILE, THREADS>(a, s.k, from + C::TILE, it.key_end, threadIdx.x, k_shared);
        ptx_copy_commit();
        if (sees) {
            if (a.bent)
                bend<MT, NT>(a, p);
            if (from + C::TILE > first_limit || from < seen_by_all_from)
                mask<MT, NT>(a, p, limit, from);
            softmax<C, MT, NT>(p, o, run, a.score_scale);
            values<C, MT, NT>(o, p, v_shared);
        }
    }
    if (it.parts == 1) {
        if (has_rows)
            store_rows<C>(a, s, it, o, run, bytes, warp_row);
        return;
    }
    if (has_rows)
        store_part<C>(a, s, it, o, run, warp_row);
    if (arrive_last(a, ROLE_PREFILL, sh))
        combine<C, C::UNIT_ROWS, 4, 1>(a, s, ROLE_PREFILL, it);
}

/* The four warps' shares, from shared memory, added up in their order: to out, or to the part's slot. */
template <typename C>
__device__ __forceinline__ void merge(const cuda_run_args &a, const run_seq &s, const attn_item &it,
                                      const run_shared &sh, const char *bytes)
{
    constexpr uint32_t QUADS = C::DP / 4;
    for (uint32_t i = threadIdx.x; i < s.packed * QUADS; i += THREADS) {
        uint32_t r = i / QUADS, c = i % QUADS;
        float top = -INFINITY, sum = 0;
        for (uint32_t w = 0; w < WARPS; w++)
            top = fmaxf(top, sh.merge_max[w][r]);
        float base = top == -INFINITY ? 0 : top;
        float4 o = make_float4(0, 0, 0, 0);
        for (uint32_t w = 0; w < WARPS; w++) {
            float4 x = ((const float4 *)bytes)[(w * 16 + r) * (C::DP + MERGE_PAD) / 4 + c];
            float f = ptx_exp2(sh.merge_max[w][r] - base);
            sum += sh.merge_sum[w][r] * f;
            o.x += x.x * f;
            o.y += x.y * f;
            o.z += x.z * f;
            o.w += x.w * f;
        }
        if (it.parts > 1) {
            uint64_t row = (uint64_t)(it.slot + it.part) * DECODE_ROWS + r;
            ((float4 *)a.ws.sums[ROLE_DECODE])[row * QUADS + c] = o;
            if (c == 0)
                a.ws.weights[ROLE_DECODE][row] = make_float2(top, sum);
        } else if (c * 4 < a.head_dim) {
            float f = 1 / sum;
            uint2 packed = make_uint2(C::Type::pack(o.x * f, o.y * f), C::Type::pack(o.z * f, o.w * f));
            *(uint2 *)(a.out + row_offset(a, s, it.kv_head, r, a.out_row_stride) + c * 8) = packed;
        }
    }
}

/* waits: the launch in front may not have ended yet; settle() returns when it has. */
template <typename C, typename Settle>
__device__ __forceinline__ void decode(const cuda_run_args &a, const run_seq &s, run_shared &sh, char *bytes,
                                       bool waits, const Settle &settle)
{
    constexpr uint32_t KV_BYTES = 16 * C::ROW_BYTES; /* 16 rows of K or V */
    constexpr uint32_t STRIDE = WARPS * 16;          /* keys from one group of a warp to its next */
    constexpr uint32_t AHEAD = C::SLOTS / 2 * STRIDE;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t q_shared = ptx_shared(bytes), ring = q_shared + KV_BYTES + warp * C::RING_BYTES;
    const attn_item &it = sh.item;
    const uint32_t begin = it.key_begin + warp * 16, end = it.key_end;

    uint32_t slot = 0;
    if (waits) {
        for (; slot < C::SLOTS; slot++) {
            uint32_t from = begin + slot / 2 * STRIDE;
            if (from >= end || from + 16 > s.kv_len - s.rows)
                break;
            load_keys<C, 16, 32>(a, slot % 2 ? s.v : s.k, from, end, lane, ring + slot * KV_BYTES);
            ptx_copy_commit();
        }
        settle();
    }
    for (; slot < C::SLOTS; slot++) {
        uint32_t from = begin + slot / 2 * STRIDE;
        if (from < end)
            load_keys<C, 16, 32>(a, slot % 2 ? s.v : s.k, from, end, lane, ring + slot * KV_BYTES);
        ptx_copy_commit();
    }
    load_q_now<C, DECODE_ROWS>(a, s, it.kv_head, 0, bytes);
    const uint32_t limit[1][2] = {{limit_of(a, s, lane / 4), limit_of(a, s, lane / 4 + 8)}};
    const uint32_t first_limit = limit_of(a, s, 0), seen_by_all_from = first_key(a, limit_of(a, s, s.packed - 1));

    float o[1][C::CHUNKS][4];
    running<1> run;
    clear<C, 1>(o, run);
    __syncthreads(); /* q, of all threads */
    slot = 0;
    for (uint32_t from = begin; from < end; from += STRIDE) {
        uint32_t k_shared = ring + slot * KV_BYTES, v_shared = k_shared + KV_BYTES;
        const bool more = from + AHEAD < end;
        float p[1][2][4];
        ptx_copy_wait<C::SLOTS - 1>();
        __syncwarp();
        scores<C, 1, 2>(p, q_shared, 0, k_shared);
        __syncwarp();
        if (more)
            load_keys<C, 16, 32>(a, s.k, from + AHEAD, end, lane, k_shared);
        ptx_copy_commit();
        if (a.bent)
            bend<1, 2>(a, p);
        if (from + 16 > first_limit || from < seen_by_all_from)
            mask<1, 2>(a, p, limit, from);
        softmax<C, 1, 2>(p, o, run, a.score_scale);
        ptx_copy_wait<C::SLOTS - 1>();
        __syncwarp();
        values<C, 1, 2>(o, p, v_shared);
        __syncwarp();
        if (more)
            load_keys<C, 16, 32>(a, s.v, from + AHEAD, end, lane, v_shared);
        ptx_copy_commit();
        slot = slot + 2 < C::SLOTS ? slot + 2 : 0;
    }
    ptx_copy_wait<0>();
    __syncthreads(); /* the rings are free */
#pragma unroll
    for (uint32_t h = 0; h < 2; h++) {
        uint32_t r = h * 8 + lane / 4;
        float sum = quad_sum(run.sum[0][h]);
        float *to = (float *)bytes + (warp * 16 + r) * (C::DP + MERGE_PAD) + lane % 4 * 2;
#pragma unroll
        for (uint32_t d = 0; d < C::CHUNKS; d++)
            *(float2 *)(to + d * 8) = make_float2(o[0][d][2 * h], o[0][d][2 * h + 1]);
        if (lane % 4 == 0) {
            sh.merge_max[warp][r] = run.max[0][h] * a.score_scale;
            sh.merge_sum[warp][r] = sum;
        }
    }
    __syncthreads();
    merge<C>(a, s, it, sh, bytes);
    if (it.parts > 1 && arrive_last(a, ROLE_DECODE, sh))
        combine<C, DECODE_ROWS, 1, 8>(a, s, ROLE_DECODE, it);
}

/* Thread 0: the item behind a place in the list of `role`, or of the other role when that is at its end. */
__device__ __forceinline__ void resolve(const cuda_run_args &a, uint32_t &role, uint32_t place, bool read,
                                        run_shared &sh)
{
    for (uint32_t tries = 0; tries < ROLES; tries++) {
        if ((a.roles >> role & 1) && place < (role == ROLE_PREFILL ? sh.counts.x : sh.counts.y)) {
            if (!read)
                attn_item_copy(&sh.item, &a.ws.items[role][place]);
            sh.role = role;
            return;
        }
        role ^= 1;
        read = false;
        if (tries == 0 && (a.roles >> role & 1))
            place = a.taken[role] + atomicAdd(&a.counters->next[role], 1);
    }
    sh.role = ROLES;
}

/* Thread 0 of a block that leaves: the last one leaves the counters as they were. No fence: what this block added to them
 * has been answered. */
__device__ __forceinline__ void leave(const cuda_run_args &a)
{
    if (atomicAdd(&a.counters->left, 1) + 1 < gridDim.x)
        return;
    for (uint32_t r = 0; r < ROLES; r++)
        a.counters->next[r] = 0;
    a.counters->left = 0;
}

/* DECODE: of decode's list alone. */
template <typename C, bool DECODE>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) run_kernel(const __grid_constant__ cuda_run_args a)
{
    extern __shared__ __align__(128) char bytes[];
    __shared__ run_shared sh;
    uint32_t role = 0, place = 0; /* of thread 0 */
    bool read = false;            /* the item of that place is in sh */
    bool one_each = false;        /* no block has a second item: nothing is counted */
    bool waits = !a.follows;      /* the launch in front may not have ended */
    if (threadIdx.x == 0) {
        /* The blocks of an SM come in rounds over all SMs: those of every other round begin with the other role. */
        uint32_t round = blockIdx.x / a.sms;
        role = a.roles == BOTH_ROLES ? round % ROLES : a.roles >> ROLE_DECODE;
        place = a.roles == BOTH_ROLES ? round / ROLES * a.sms + blockIdx.x % a.sms : blockIdx.x;
        if (a.follows)
            place = atomicAdd(&a.counters->next[role], 1);
        read = place < a.ws.max_items[role];
        if (read) /* on its way with the counts */
            attn_item_copy(&sh.item, &a.ws.items[role][place]);
        const attn_lists lists = attn_lists_of(a.ws.lists);
        sh.counts = make_uint2(lists.count[ROLE_PREFILL], lists.count[ROLE_DECODE]);
        one_each = !a.follows && a.roles != BOTH_ROLES && lists.count[role] <= a.taken[role];
    }
    const auto claim = [&] { /* thread 0: the next item; known when this one is done */
                             place = one_each ? UINT32_MAX : a.taken[role] + atomicAdd(&a.counters->next[role], 1);
    };
    const auto settle = [&] {
        attn_wait_earlier();
        attn_let_next();
        waits = false;
        if (threadIdx.x == 0)
            claim();
    };
    if (!DECODE && waits) {
        attn_wait_earlier();
        waits = false;
    }
    if (!waits)
        attn_let_next();
    for (;;) {
        if (threadIdx.x == 0) {
            /* Behind a fused launch blocks begin one after the other: who has claimed the next item lets all others wait. */
            if (a.follows && !read)
                claim();
            resolve(a, role, place, read, sh);
            read = false;
            if (sh.role != ROLES && !waits && !a.follows)
                claim();
        }
        __syncthreads();
        const uint32_t now = sh.role;
        if (now == ROLES)
            break;
        if (waits && !sh.item.parts)
            settle();
        if (sh.item.parts) {
            const attn_seq &in = sh.item.s;
            uint64_t head = sh.item.kv_head * a.head_stride + a.kv_offset;
            run_seq s;
            s.k = (const char *)in.k + head;
            s.v = (const char *)in.v + head;
            s.first_row = in.first_row;
            s.rows = in.rows;
            s.kv_len = in.kv_len;
            s.packed = in.rows * a.group;
            if (!DECODE && now == ROLE_PREFILL)
                prefill<C>(a, s, sh, bytes);
            else
                decode<C>(a, s, sh, bytes, waits, settle);
        }
        __syncthreads(); /* the item and shared memory are free */
    }
    if (a.follows || waits)
        attn_wait_earlier(); /* the counters are in use until then */
    if (threadIdx.x == 0 && !one_each)
        leave(a);
}

template <typename C> constexpr cuda_kernel kernel_of()
{
    return cuda_kernel{run_kernel<C, false>, run_kernel<C, true>, C::DP, C::UNIT_ROWS, C::SHARED_BYTES, C::ALONE_BYTES};
}

#endif
