/* attention_cuda_roles.cuh - the two roles of the portable CUDA back end's kernels: an item of prefill, an item of decode, and the
 * sums of their parts. How they are laid out: attention_cuda_run.cuh.
 */
#ifndef TANDEM_ATTENTION_CUDA_ROLES_CUH
#define TANDEM_ATTENTION_CUDA_ROLES_CUH

#include "attention/attention_cuda_tile.cuh"

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

#endif
