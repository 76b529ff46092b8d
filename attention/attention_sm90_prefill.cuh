/* attention_sm90_prefill.cuh - the compute-bound role: one producer warp, two consumer warpgroups of 64 packed rows each; two
 * such blocks, a cluster, work on a unit.
 *
 *   producer   takes items (block 0 for both), copies half of each K and V tile of KEYS keys, last keys first, into STAGES slots
 *              each of both blocks: what comes from L2 is half, and so is what that costs in energy
 *   consumer   S' = Q K' of the next tile is issued before O += P V of this one, so that softmax of S' runs under PV; the
 *              two warpgroups take turns at issuing (named barriers), so that one's softmax runs under the other's products
 *
 *   shared, 1024-byte aligned:  Q [128][D] | K [STAGES][KEYS][D] | V [STAGES][KEYS][D]      blocks of 64 columns each
 *
 * Q is loaded by the warpgroup that needs it, packed rows being rows of several heads; its place takes the output before
 * that goes to memory in full lines.
 */
#ifndef TANDEM_ATTENTION_SM90_PREFILL_CUH
#define TANDEM_ATTENTION_SM90_PREFILL_CUH

#include "attention/attention_sm90.cuh"

template <uint32_t D_, uint32_t KEYS_, uint32_t STAGES_, typename Type, uint64_t POLICY_ = SM90_L2_NORMAL>
struct prefill_shape {
    static constexpr uint64_t POLICY = POLICY_;
    static constexpr bool BF16 = Type::BF16, BENT = Type::BENT;
    static constexpr uint32_t D = D_, KEYS = KEYS_, STAGES = STAGES_;
    static constexpr uint32_t Q_BYTES = BLOCK_ROWS * D * 2;
    static constexpr uint32_t TILE_BYTES = KEYS * D * 2;
    static constexpr uint32_t K_AT = Q_BYTES, V_AT = K_AT + STAGES * TILE_BYTES;
    static constexpr uint32_t BYTES = V_AT + STAGES * TILE_BYTES;
    static constexpr uint32_t CHAINS = KEYS >= 128 ? 4 : 1; /* of maxima: latency, where registers allow it */
    static constexpr bool BY_SUMS = STAGES >= 3;  /* see prefill_rows; K is held for longer, which takes a slot more */
    static constexpr uint32_t BLOCK = KEYS * 128; /* bytes of 64 columns of a tile */
    static_assert(KEYS % BOX_KEYS == 0 && D % 64 == 0, "whole boxes");
    static_assert(STAGES <= 4, "barriers of prefill_bars");
};

constexpr uint32_t PREFILL_ITEMS = 2; /* taken ahead */

struct prefill_bars {
    uint64_t k_full[4], k_empty[4], v_full[4], v_empty[4], item_full[PREFILL_ITEMS], item_empty[PREFILL_ITEMS];
    uint64_t mail_full, mail_empty; /* at the block that gets it; at block 0 */
    uint32_t mail;                  /* index of the next item, to the others */
    attn_item item[PREFILL_ITEMS];  /* parts 0: no more */
    uint32_t last[2];
};

template <typename C> __device__ void prefill_init(prefill_bars *b)
{
    for (uint32_t i = 0; i < C::STAGES; i++) {
        sm90_mbar_init(sm90_shared(&b->k_full[i]), 1);
        sm90_mbar_init(sm90_shared(&b->v_full[i]), 1);
        sm90_mbar_init(sm90_shared(&b->k_empty[i]), UNIT_GROUPS);
        sm90_mbar_init(sm90_shared(&b->v_empty[i]), UNIT_GROUPS);
    }
    for (uint32_t i = 0; i < PREFILL_ITEMS; i++) {
        sm90_mbar_init(sm90_shared(&b->item_full[i]), 1);
        sm90_mbar_init(sm90_shared(&b->item_empty[i]), 2 * GROUP_THREADS);
    }
    sm90_mbar_init(sm90_shared(&b->mail_full), 1);
    sm90_mbar_init(sm90_shared(&b->mail_empty), CLUSTER - 1);
}

/* A slot is free as far as this warpgroup goes: said to all blocks of the cluster. */
__device__ __forceinline__ void prefill_release(const uint64_t *bar, uint32_t tid)
{
    if (tid < CLUSTER)
        sm90_mbar_arrive_at(sm90_shared(bar), tid);
}

/* This block's boxes of a tile, to all; all of the tile arrives here. It may arrive before it is expected, but not before the slot
 * was free everywhere. */
template <typename C>
__device__ __forceinline__ void prefill_copy(const sm90_unit &u, const sm90_map *map, uint32_t rank, uint32_t key,
                                             uint32_t dst, uint32_t bar)
{
    constexpr uint32_t ROWS = C::KEYS / BOX_KEYS, BOXES = ROWS * (C::D / 64);
    static_assert(BOXES % CLUSTER == 0, "the same number of boxes for each block");
    sm90_mbar_expect(bar, C::TILE_BYTES);
#pragma unroll
    for (uint32_t i = 0; i < BOXES / CLUSTER; i++) {
        uint32_t n = i * CLUSTER + rank, block = n / ROWS, k = n % ROWS * BOX_KEYS;
        sm90_copy_box_to((1 << CLUSTER) - 1, dst + block * C::BLOCK + k * 128, map, bar, (int32_t)(block * 64),
                         (int32_t)(key + k), u.k_step, C::POLICY);
    }
}

/* Cluster i begins with item i, which is read while the counts are. One thread, before prefill_produce by the same. */
__device__ __forceinline__ void prefill_first(const sm90_args &a, prefill_bars *b)
{
    if (blockIdx.x / CLUSTER < a.run.ws.max_items[ROLE_PREFILL])
        attn_item_copy(&b->item[0], &a.run.ws.items[ROLE_PREFILL][blockIdx.x / CLUSTER]);
}

/* The next item's index, the same in all blocks of a cluster; `items` or more: no more. Block 0 takes it. */
__device__ __forceinline__ uint32_t prefill_next(const sm90_args &a, prefill_bars *b, uint32_t rank, uint32_t items,
                                                 uint32_t clusters, uint32_t &parity)
{
    uint32_t index;
    if (rank == 0) {
        do
            index = clusters + atomicAdd(&a.run.counters->next[ROLE_PREFILL], 1);
        while (index < items && __ldcg(&a.run.ws.items[ROLE_PREFILL][index].parts) == 0);
        sm90_mbar_wait(sm90_shared(&b->mail_empty), parity ^ 1);
        for (uint32_t r = 1; r < CLUSTER; r++)
            sm90_store_in(sm90_in_block(sm90_shared(&b->mail), r), index, sm90_in_block(sm90_shared(&b->mail_full), r));
    } else {
        sm90_mbar_expect(sm90_shared(&b->mail_full), sizeof b->mail);
        sm90_mbar_wait(sm90_shared(&b->mail_full), parity);
        index = *(volatile uint32_t *)&b->mail;
        if (index != NO_ITEM) /* always; so the arrival waits for what was read */
            sm90_mbar_arrive_at(sm90_shared(&b->mail_empty), 0);
    }
    parity ^= 1;
    return index;
}

/* One thread; `items` is the length of the list. Nothing is counted where no cluster has a second item. `taken` is
 * called when there is no more to take. Returns when nothing more comes to this block from the others: then it may end. */
template <typename C, typename F>
__device__ void prefill_produce(const sm90_args &a, prefill_bars *b, uint32_t shared, uint32_t items, uint32_t clusters,
                                F taken)
{
    sm90_ring_at<C::STAGES> k_at, v_at;
    sm90_ring_at<PREFILL_ITEMS> at;
    const uint32_t rank = sm90_cluster_rank(), first = blockIdx.x / CLUSTER;
    const bool counted = items > clusters;
    uint32_t mails = 0;
    bool read = first < items && b->item[0].parts != 0;
    for (;; read = false) {
        const uint32_t index = read ? first : counted ? prefill_next(a, b, rank, items, clusters, mails) : items;
        sm90_mbar_wait(sm90_shared(&b->item_empty[at.slot]), at.parity ^ 1);
        attn_item *const item = &b->item[at.slot];
        if (index >= items)
            item->parts = 0;
        else if (!read)
            attn_item_copy(item, &a.run.ws.items[ROLE_PREFILL][index]);
        sm90_mbar_arrive(sm90_shared(&b->item_full[at.slot]));
        at.next();
        if (index >= items)
            break;
        const attn_item it = *item;
        const sm90_unit u = sm90_unit_of(a, it);
        sm90_map_acquire(u.k_map);
        sm90_map_acquire(u.v_map);
        uint32_t tiles = (it.key_end - it.key_begin + C::KEYS - 1) / C::KEYS;
        for (uint32_t i = 0; i <= tiles; i++) { /* K runs one tile ahead of V, as the consumers need them */
            if (i < tiles) {
                sm90_mbar_wait(sm90_shared(&b->k_empty[k_at.slot]), k_at.parity ^ 1);
                prefill_copy<C>(u, u.k_map, rank, it.key_begin + (tiles - 1 - i) * C::KEYS,
                                shared + C::K_AT + k_at.slot * C::TILE_BYTES, sm90_shared(&b->k_full[k_at.slot]));
                k_at.next();
            }
            if (i > 0) {
                sm90_mbar_wait(sm90_shared(&b->v_empty[v_at.slot]), v_at.parity ^ 1);
                prefill_copy<C>(u, u.v_map, rank, it.key_begin + (tiles - i) * C::KEYS,
                                shared + C::V_AT + v_at.slot * C::TILE_BYTES, sm90_shared(&b->v_full[v_at.slot]));
                v_at.next();
            }
        }
    }
    taken();
    for (uint32_t i = 0; i < C::STAGES; i++) {
        sm90_mbar_wait(sm90_shared(&b->k_empty[k_at.slot]), k_at.parity ^ 1);
        sm90_mbar_wait(sm90_shared(&b->v_empty[v_at.slot]), v_at.parity ^ 1);
        k_at.next();
        v_at.next();
    }
    if (rank == 0)
        sm90_mbar_wait(sm90_shared(&b->mail_empty), mails ^ 1);
}

/* 64 packed rows of Q, from `first` on, into shared memory by a warpgroup; zeros behind the sequence and behind the head. */
template <typename C>
__device__ __forceinline__ void prefill_load_q(const sm90_args &a, const sm90_unit &u, const attn_item &it,
                                               uint32_t first, uint32_t group, uint32_t tid, uint32_t shared)
{
    constexpr uint32_t CHUNKS = C::D / 8;
#pragma unroll
    for (uint32_t i = tid; i < 64 * CHUNKS; i += GROUP_THREADS) {
        uint32_t r = i / CHUNKS, c = i % CHUNKS, p = first + r;
        uint4 x = {0, 0, 0, 0};
        if (p < u.packed && c * 8 < a.run.head_dim)
            x = *(const uint4 *)(a.run.q + sm90_row_at(a, u, it.kv_head, p, a.run.q_row_stride) + c * 16);
        asm volatile(
            "st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(shared + sm90_swizzled(group * 64 + r, c, BLOCK_ROWS)),
            "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
            : "memory");
    }
}

template <typename C> __device__ __forceinline__ void prefill_qk(float (&s)[C::KEYS / 2], uint32_t q, uint32_t key)
{
#pragma unroll
    for (uint32_t k = 0; k < C::D / 16; k++) {
        uint32_t in_block = (k % 4) * 32, block = k / 4;
        sm90_wgmma_ss<C::BF16>(s, sm90_desc_at(q, block * BLOCK_ROWS * 128 + in_block),
                               sm90_desc_at(key, block * C::BLOCK + in_block), k > 0);
    }
}

template <typename C>
__device__ __forceinline__ void prefill_pv(float (&o)[C::D / 2], const uint32_t (&p)[C::KEYS / 4], uint32_t value)
{
#pragma unroll
    for (uint32_t k = 0; k < C::KEYS / 16; k++)
        sm90_wgmma_rs<C::BF16>(o, p + k * 4, sm90_desc_at(value, k * 16 * 128), 1);
}

/* What a thread knows of its two rows. Powers are relative to 2^base, the largest score as it was when weights last became too large:
 *
 *   by maxima   a score stands more than GROWTH above base, which is known before powers are taken of it
 *   by sums     a tile's weights add up to more than MOST_SUM in one of a thread's chains, of KEYS / 8 each; its scores are computed
 *               once more then, as the weights may be infinite. Takes 70 instructions less of a tile's 440
 *
 * `sum` is of the thread's own columns, in two chains. */
struct prefill_rows {
    uint32_t limit[2], first[2];
    float base[2];
    float sum[2][2];
};

/* Weights are 2^5 at most: nothing to float, nor to 16-bit weights, rounded relatively. A row's largest weight is exact where base
 * is its maximum, else off by up to half a unit: the less growth passes, the more rows are exact in it. Scores that are nearly
 * all the same make a chain of 16 weights of about 1, far enough from MOST_SUM. */
constexpr float GROWTH = 4, MOST_SUM = 32;
constexpr float LOW_BASE = -1e30f; /* of a row that has seen nothing: less than any score, and no infinity */

template <typename C>
__device__ __forceinline__ void prefill_mask(float (&s)[C::KEYS / 2], const prefill_rows &r, uint32_t key)
{
    const uint32_t col = key + threadIdx.x % 4 * 2;
#pragma unroll
    for (uint32_t i = 0; i < C::KEYS / 2; i++) {
        uint32_t k = col + i / 4 * 8 + i % 2, row = i / 2 % 2;
        if (k >= r.limit[row] || k < r.first[row])
            s[i] = -INFINITY;
    }
}

/* The largest of a thread's scores, of each of its two rows. */
template <typename C> __device__ __forceinline__ void prefill_most(const float (&s)[C::KEYS / 2], float (&most)[2])
{
#pragma unroll
    for (uint32_t row = 0; row < 2; row++) {
        float m[C::CHAINS];
#pragma unroll
        for (uint32_t i = 0; i < C::CHAINS; i++)
            m[i] = fmaxf(s[i * 4 + row * 2], s[i * 4 + row * 2 + 1]);
#pragma unroll
        for (uint32_t i = C::CHAINS; i < C::KEYS / 8; i++)
            m[i % C::CHAINS] = fmaxf(m[i % C::CHAINS], fmaxf(s[i * 4 + row * 2], s[i * 4 + row * 2 + 1]));
#pragma unroll
        for (uint32_t i = 1; i < C::CHAINS; i++)
            m[0] = fmaxf(m[0], m[i]);
        most[row] = m[0];
    }
}

/* Whether a score of this warp's stands far above its row's base. */
__device__ __forceinline__ bool prefill_above(const float (&most)[2], const prefill_rows &r, float scale)
{
    return __any_sync(0xffffffff, most[0] * scale - r.base[0] > GROWTH || most[1] * scale - r.base[1] > GROWTH);
}

/* All rows of this warp get a new base, and what was summed so far is to be multiplied with by[]. */
__device__ __forceinline__ void prefill_rebase(const float (&most)[2], prefill_rows &r, float scale, float (&by)[2])
{
#pragma unroll
    for (uint32_t row = 0; row < 2; row++) {
        float m = most[row];
        m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
        const float base = fmaxf(r.base[row], m * scale);
        by[row] = sm90_exp2(r.base[row] - base);
        r.base[row] = base;
        r.sum[row][0] *= by[row];
        r.sum[row][1] *= by[row];
    }
}

/* Scores become weights, which are added up; the largest of the sums. */
template <typename C>
__device__ __forceinline__ float prefill_weigh(float (&s)[C::KEYS / 2], const prefill_rows &r, float scale,
                                               float (&sum)[2][2])
{
#pragma unroll
    for (uint32_t i = 0; i < C::KEYS / 2; i++) {
        const uint32_t row = i / 2 % 2;
        s[i] = sm90_exp2(s[i] * scale - r.base[row]);
        sum[row][i % 2] = i < 4 ? s[i] : sum[row][i % 2] + s[i];
    }
    return fmaxf(fmaxf(sum[0][0], sum[0][1]), fmaxf(sum[1][0], sum[1][1]));
}

template <typename C>
__device__ __forceinline__ void prefill_pack(uint32_t (&p)[C::KEYS / 4], const float (&s)[C::KEYS / 2])
{
#pragma unroll
    for (uint32_t i = 0; i < C::KEYS / 4; i++)
        p[i] = sm90_pack<C::BF16>(s[i * 2], s[i * 2 + 1]);
}

template <typename C> __device__ __forceinline__ void prefill_scale(float (&o)[C::D / 2], const float (&by)[2])
{
#pragma unroll
    for (uint32_t i = 0; i < C::D / 2; i++)
        o[i] *= by[i / 2 % 2];
}

/* Divides and writes 64 rows, from `first` on, through this warpgroup's part of Q. */
template <typename C>
__device__ __forceinline__ void prefill_write(const sm90_args &a, const sm90_unit &u, const attn_item &it,
                                              uint32_t first, uint32_t group, uint32_t tid, uint32_t shared,
                                              const float (&o)[C::D / 2], const prefill_rows &r)
{
    const uint32_t row = group * 64 + tid / 32 * 16 + tid % 32 / 4;
    float inv[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; i++)
        inv[i] = r.sum[i][0] > 0 ? 1 / r.sum[i][0] : 0;
#pragma unroll
    for (uint32_t i = 0; i < C::D / 4; i++) {
        uint32_t at = sm90_swizzled(row + i % 2 * 8, i / 2, BLOCK_ROWS) + tid % 4 * 4;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared + at),
                     "r"(sm90_pack<C::BF16>(o[i * 2] * inv[i % 2], o[i * 2 + 1] * inv[i % 2]))
                     : "memory");
    }
    sm90_bar_sync(BAR_ROWS + group, GROUP_THREADS);
    constexpr uint32_t CHUNKS = C::D / 8;
#pragma unroll
    for (uint32_t i = tid; i < 64 * CHUNKS; i += GROUP_THREADS) {
        uint32_t q = i / CHUNKS, c = i % CHUNKS, p = first + q;
        uint4 x;
        asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "r"(shared + sm90_swizzled(group * 64 + q, c, BLOCK_ROWS))
                     : "memory");
        if (p < u.packed && c * 8 < a.run.head_dim)
            *(uint4 *)(a.run.out + sm90_row_at(a, u, it.kv_head, p, a.run.out_row_stride) + c * 16) = x;
    }
}

/* Adds up the parts of 64 rows, group `of_unit` of the unit, in order of keys. A warp has every fourth row, MERGE_ROWS of
 * them and MERGE_PARTS parts at a time: each read that waits for another takes half a microsecond. */
constexpr uint32_t MERGE_ROWS = 8, MERGE_PARTS = 2;

template <typename C>
__device__ void prefill_merge(const sm90_args &a, const sm90_unit &u, const attn_item &it, uint32_t of_unit,
                              uint32_t tid)
{
    constexpr uint32_t QUADS = C::D / 4;
    const uint32_t lane = tid % 32, column = lane % QUADS;
    const float2 *weights = a.run.ws.weights[ROLE_PREFILL] + (uint64_t)it.slot * UNIT_ROWS;
    const float4 *sums = (const float4 *)a.run.ws.sums[ROLE_PREFILL] + (uint64_t)it.slot * UNIT_ROWS * QUADS + column;
#pragma unroll 1
    for (uint32_t first = of_unit * 64 + tid / 32; first < of_unit * 64 + 64; first += 4 * MERGE_ROWS) {
        float top[MERGE_ROWS], sum[MERGE_ROWS];
        float4 o[MERGE_ROWS];
#pragma unroll
        for (uint32_t j = 0; j < MERGE_ROWS; j++) {
            top[j] = -INFINITY;
            sum[j] = 0;
            o[j] = make_float4(0, 0, 0, 0);
        }
#pragma unroll 1
        for (uint32_t part = 0; part < it.parts; part += MERGE_PARTS) {
            float2 w[MERGE_PARTS][MERGE_ROWS];
            float4 x[MERGE_PARTS][MERGE_ROWS];
#pragma unroll
            for (uint32_t k = 0; k < MERGE_PARTS; k++) {
                const bool on = part + k < it.parts; /* a part that is there in any case; no branch between reads */
                const uint32_t row = (on ? part + k : part) * UNIT_ROWS + first;
#pragma unroll
                for (uint32_t j = 0; j < MERGE_ROWS; j++) {
                    float2 read = __ldcg(&weights[row + 4 * j]);
                    x[k][j] = __ldcg(&sums[(uint64_t)(row + 4 * j) * QUADS]);
                    w[k][j] = on ? read : make_float2(LOW_BASE, 0);
                }
            }
#pragma unroll
            for (uint32_t k = 0; k < MERGE_PARTS; k++)
#pragma unroll
                for (uint32_t j = 0; j < MERGE_ROWS; j++) {
                    /* A part none of whose keys the row sees has LOW_BASE and nothing. */
                    const float above = fmaxf(top[j], w[k][j].x);
                    const float old = sm90_exp2(top[j] - above), f = sm90_exp2(w[k][j].x - above);
                    top[j] = above;
                    sum[j] = sum[j] * old + w[k][j].y * f;
                    o[j].x = o[j].x * old + x[k][j].x * f;
                    o[j].y = o[j].y * old + x[k][j].y * f;
                    o[j].z = o[j].z * old + x[k][j].z * f;
                    o[j].w = o[j].w * old + x[k][j].w * f;
                }
        }
#pragma unroll
        for (uint32_t j = 0; j < MERGE_ROWS; j++) {
            const uint32_t p = it.first + first + 4 * j;
            const float inv = sum[j] > 0 ? 1 / sum[j] : 0;
            uint2 y = {sm90_pack<C::BF16>(o[j].x * inv, o[j].y * inv), sm90_pack<C::BF16>(o[j].z * inv, o[j].w * inv)};
            if (lane < QUADS && p < u.packed && lane * 4 < a.run.head_dim)
                *((uint2 *)(a.run.out + sm90_row_at(a, u, it.kv_head, p, a.run.out_row_stride)) + lane) = y;
        }
    }
}

/* Leaves a part in the workspace; who brings the last one of these 64 rows adds all up. */
template <typename C>
__device__ __forceinline__ void prefill_leave(const sm90_args &a, const sm90_unit &u, const attn_item &it,
                                              prefill_bars *b, uint32_t rank, uint32_t group, uint32_t tid,
                                              const float (&o)[C::D / 2], const prefill_rows &r)
{
    const sm90_workspace &ws = a.run.ws;
    const uint32_t of_unit = rank * 2 + group, row = of_unit * 64 + tid / 32 * 16 + tid % 32 / 4;
    const uint64_t at = (uint64_t)(it.slot + it.part) * UNIT_ROWS + row;
    float *sums = ws.sums[ROLE_PREFILL] + at * C::D + tid % 4 * 2;
#pragma unroll
    for (uint32_t i = 0; i < C::D / 4; i++)
        *(float2 *)(sums + i % 2 * 8 * C::D + i / 2 * 8) = {o[i * 2], o[i * 2 + 1]};
    if (tid % 4 == 0)
        for (uint32_t i = 0; i < 2; i++)
            ws.weights[ROLE_PREFILL][at + i * 8] = {r.base[i], r.sum[i][0]};
    sm90_bar_sync(BAR_ROWS + group, GROUP_THREADS);
    if (tid == 0) {
        __threadfence(); /* of what all wrote before the barrier */
        uint32_t *arrived = &ws.arrived[ROLE_PREFILL][it.slot * ARRIVED_PER_SLOT[ROLE_PREFILL] + of_unit];
        bool last = atomicAdd(arrived, 1) == it.parts - 1;
        if (last)
            *arrived = 0;
        __threadfence();
        b->last[group] = last;
    }
    sm90_bar_sync(BAR_ROWS + group, GROUP_THREADS);
    if (b->last[group])
        prefill_merge<C>(a, u, it, of_unit, tid);
}

/* A consumer warpgroup, group 0 or 1. */
template <typename C>
__device__ __forceinline__ void prefill_consume(const sm90_args &a, prefill_bars *b, uint32_t shared, uint32_t group)
{
    const uint32_t tid = threadIdx.x % GROUP_THREADS, rank = sm90_cluster_rank();
    const float scale = a.run.score_scale;
    const uint32_t q = sm90_desc_low(shared + group * 64 * 128, 16);
    const uint32_t keys = sm90_desc_low(shared + C::K_AT, 16), values = sm90_desc_low(shared + C::V_AT, C::BLOCK);
    auto in_slot = [](uint32_t low, uint32_t slot) {
        return __shfl_sync(0xffffffff, low + slot * (C::TILE_BYTES / 16), 0);
    };
    sm90_ring_at<C::STAGES> k_at, v_at;
    sm90_ring_at<PREFILL_ITEMS> at;
    if (group == 1)
        sm90_bar_arrive(BAR_TURN, 2 * GROUP_THREADS); /* group 0 begins */
    for (;; at.next()) {
        sm90_mbar_wait(sm90_shared(&b->item_full[at.slot]), at.parity);
        const attn_item it = b->item[at.slot];
        if (it.parts == 0)
            break;
        const uint32_t first = it.first + rank * BLOCK_ROWS + group * 64; /* packed row of this warpgroup */
        const uint32_t tiles = (it.key_end - it.key_begin + C::KEYS - 1) / C::KEYS;
        const sm90_unit u = sm90_unit_of(a, it);
        sm90_mbar_arrive(sm90_shared(&b->item_empty[at.slot]));
        sm90_bar_sync(BAR_ROWS + group, GROUP_THREADS); /* all have read the last output from Q's place */
        if (it.first + rank * BLOCK_ROWS >= u.packed) { /* no rows for this block: it only keeps step */
            for (uint32_t i = 0; i < tiles; i++) {
                /* Who waits gives back, and nobody else waits: a warp that is late would not know one phase from the next but one. */
                if (tid < CLUSTER)
                    sm90_mbar_wait(sm90_shared(&b->k_full[k_at.slot]), k_at.parity);
                prefill_release(&b->k_empty[k_at.slot], tid);
                k_at.next();
                if (tid < CLUSTER)
                    sm90_mbar_wait(sm90_shared(&b->v_full[v_at.slot]), v_at.parity);
                prefill_release(&b->v_empty[v_at.slot], tid);
                v_at.next();
            }
            continue;
        }
        prefill_load_q<C>(a, u, it, first, group, tid, shared);
        sm90_async_fence();
        sm90_bar_sync(BAR_ROWS + group, GROUP_THREADS);

        prefill_rows rows;
        const uint32_t row = first + tid / 32 * 16 + tid % 32 / 4;
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            rows.limit[i] = sm90_limit(a, u, row + i * 8);
            rows.first[i] = sm90_first(a, rows.limit[i]);
            rows.limit[i] = rows.limit[i] < it.key_end ? rows.limit[i] : it.key_end;
            rows.base[i] = LOW_BASE;
            rows.sum[i][0] = rows.sum[i][1] = 0;
        }
        uint32_t all_see_to = sm90_limit(a, u, first), all_see_from;
        all_see_to = all_see_to < it.key_end ? all_see_to : it.key_end;
        all_see_from = sm90_first(a, sm90_limit(a, u, first + 63));

        uint32_t key = it.key_begin + (tiles - 1) * C::KEYS;
        float o[C::D / 2], s[C::KEYS / 2], by[2];
        uint32_t p[C::KEYS / 4];
#pragma unroll
        for (uint32_t i = 0; i < C::D / 2; i++)
            o[i] = 0;

        float sum[2][2], most_sum; /* of this tile */
        /* Scores become weights; whether by a new base, which `anew` asks for. */
        auto weigh = [&](bool anew) -> bool {
            if constexpr (C::BENT) {
#pragma unroll
                for (uint32_t i = 0; i < C::KEYS / 2; i++)
                    s[i] = sm90_bend(a, s[i]);
            }
            if (key + C::KEYS > all_see_to || key < all_see_from)
                prefill_mask<C>(s, rows, key);
            if (!C::BY_SUMS || anew) {
                float most[2];
                prefill_most<C>(s, most);
                if (!C::BY_SUMS)
                    anew = prefill_above(most, rows, scale);
                if (anew)
                    prefill_rebase(most, rows, scale, by);
            }
            most_sum = prefill_weigh<C>(s, rows, scale, sum);
            return anew;
        };
        auto add = [&] {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                rows.sum[i / 2][i % 2] += sum[i / 2][i % 2];
        };

        sm90_mbar_wait(sm90_shared(&b->k_full[k_at.slot]), k_at.parity);
        sm90_wgmma_fence();
        prefill_qk<C>(s, q, in_slot(keys, k_at.slot));
        sm90_wgmma_commit();
        sm90_wgmma_wait<0>();
        sm90_pin(s);
        prefill_release(&b->k_empty[k_at.slot], tid);
        k_at.next();
        weigh(true);
        add();
        prefill_pack<C>(p, s);
        if (tiles > 1)
            sm90_mbar_wait(sm90_shared(&b->k_full[k_at.slot]), k_at.parity);

        for (uint32_t i = 1; i < tiles; i++) {
            const bool after_edge = key + C::KEYS > all_see_to; /* few keys of the tile before were seen by all */
            key -= C::KEYS;
            const uint32_t k_now = in_slot(keys, k_at.slot), v_now = in_slot(values, v_at.slot);
            uint32_t q_now = q;
            asm volatile("" : "+r"(q_now));
            q_now = __shfl_sync(0xffffffff, q_now, 0);
            sm90_bar_sync(BAR_TURN + group, 2 * GROUP_THREADS);
            sm90_pin(s);
            sm90_pin(o);
            sm90_pin(p);
            sm90_wgmma_fence();
            prefill_qk<C>(s, q_now, k_now);
            sm90_wgmma_commit();
            sm90_mbar_wait(sm90_shared(&b->v_full[v_at.slot]), v_at.parity);
            sm90_wgmma_fence();
            prefill_pv<C>(o, p, v_now);
            sm90_wgmma_commit();
            sm90_bar_arrive(BAR_TURN + (group ^ 1), 2 * GROUP_THREADS);
            sm90_wgmma_wait<1>();
            bool grown = after_edge;
            if constexpr (C::BY_SUMS) {
                for (;; grown = true) {
                    sm90_pin(s);
                    asm volatile("" : "+r"(key)); /* what is masked is not worked out ahead, under the products */
                    weigh(grown);
                    /* All warps of the group come here, and so are done with K. */
                    if (!sm90_bar_any(BAR_ROWS + group, GROUP_THREADS, most_sum > MOST_SUM && !grown))
                        break;
                    sm90_wgmma_fence();
                    prefill_qk<C>(s, q_now, k_now);
                    sm90_wgmma_commit();
                    sm90_wgmma_wait<0>();
                }
                prefill_release(&b->k_empty[k_at.slot], tid);
            } else {
                sm90_pin(s);
                prefill_release(&b->k_empty[k_at.slot], tid);
                grown = weigh(false);
            }
            add();
            /* The assembler would leave the sums for later, when the products are waited for, and it is the next ones' turn. */
            if constexpr (!C::BY_SUMS)
                sm90_need(fminf(rows.sum[0][0], rows.sum[0][1]), fminf(rows.sum[1][0], rows.sum[1][1]));
            k_at.next();
            sm90_pin(s);
            if (i + 1 < tiles)
                sm90_mbar_wait(sm90_shared(&b->k_full[k_at.slot]), k_at.parity);
            sm90_wgmma_wait<0>();
            sm90_pin(o);
            prefill_release(&b->v_empty[v_at.slot], tid);
            v_at.next();
            if (grown)
                prefill_scale<C>(o, by);
            prefill_pack<C>(p, s);
        }
        sm90_mbar_wait(sm90_shared(&b->v_full[v_at.slot]), v_at.parity);
        sm90_pin(o);
        sm90_pin(p);
        sm90_wgmma_fence();
        prefill_pv<C>(o, p, in_slot(values, v_at.slot));
        sm90_wgmma_commit();
        sm90_wgmma_wait<0>();
        sm90_pin(o);
        prefill_release(&b->v_empty[v_at.slot], tid);
        v_at.next();

#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            rows.sum[i][0] += rows.sum[i][1];
            rows.sum[i][0] += __shfl_xor_sync(0xffffffff, rows.sum[i][0], 1);
            rows.sum[i][0] += __shfl_xor_sync(0xffffffff, rows.sum[i][0], 2);
        }
        if (it.parts == 1)
            prefill_write<C>(a, u, it, first, group, tid, shared, o, rows);
        else
            prefill_leave<C>(a, u, it, b, rank, group, tid, o, rows);
    }
}

#endif
