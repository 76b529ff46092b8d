/* attention_sm90_decode.cuh - the memory-bound role: a warpgroup whose four warps each stream every fourth tile of 32 keys.
 *
 * A warp has a ring of its own (SLOTS tiles of K or V, alternating), fills it itself through the copy engine and waits for
 * nobody else until the end of the item, where the four are added up. Keys are the rows of the products and heads the
 * columns (S' = K Q', O' = V' P'), so that up to 8 packed rows cost one mma.sync of 8 columns per 16 keys: the tensor cores
 * stay prefill's.
 *
 *   shared, 1024-byte aligned:  warp 0: slots [SLOTS][32][D] | warp 1 ..        at the end of an item, in the same place:
 *                               sums [4 warps][16][D] of float
 */
#ifndef TANDEM_ATTENTION_SM90_DECODE_CUH
#define TANDEM_ATTENTION_SM90_DECODE_CUH

#include "attention/attention_sm90.cuh"

template <uint32_t D_, uint32_t SLOTS_, typename Type> struct decode_shape {
    static constexpr bool BF16 = Type::BF16, BENT = Type::BENT;
    static constexpr uint32_t D = D_, SLOTS = SLOTS_;
    static constexpr uint32_t TILE_BYTES = BOX_KEYS * D * 2;
    static constexpr uint32_t RING_BYTES = SLOTS * TILE_BYTES;
    static constexpr uint32_t BYTES = WARPS * RING_BYTES;
    static constexpr uint32_t BLOCKS = D / 64;
    static_assert(BYTES >= WARPS * DECODE_ROWS * D * 4, "sums stand where the rings were");
    static_assert(D % 64 == 0, "whole boxes");
};

constexpr uint32_t DECODE_SLOTS_MAX = 8;

struct decode_bars {
    uint64_t full[WARPS][DECODE_SLOTS_MAX];
    attn_item at; /* the item of index `item` */
    uint32_t item, last;
    uint32_t stop; /* set when this block has no prefill any more and may leave decode to others */
    float max[WARPS][DECODE_ROWS], sum[WARPS][DECODE_ROWS], by[WARPS][DECODE_ROWS];
    float all_max[DECODE_ROWS], all_sum[DECODE_ROWS];
};

template <typename C> __device__ void decode_init(decode_bars *b)
{
    for (uint32_t w = 0; w < WARPS; w++)
        for (uint32_t i = 0; i < C::SLOTS; i++)
            sm90_mbar_init(sm90_shared(&b->full[w][i]), 1);
}

/* A warp's stream of tiles: K, V, K, V ... of every fourth tile of an item. */
template <typename C> struct decode_stream {
    uint32_t shared, bars; /* this warp's */
    uint32_t left;         /* tiles of K and V still to be asked for */
    uint32_t key;          /* of the next */
    bool is_v;
    sm90_ring_at<C::SLOTS> put, take;

    __device__ __forceinline__ void ask(const sm90_unit &u) /* one lane */
    {
        if (left == 0)
            return;
        left--;
        uint32_t bar = bars + put.slot * 8, dst = shared + put.slot * C::TILE_BYTES;
        sm90_mbar_expect(bar, C::TILE_BYTES);
#pragma unroll
        for (uint32_t block = 0; block < C::BLOCKS; block++)
            sm90_copy_box(dst + block * BOX_BYTES, is_v ? u.v_map : u.k_map, bar, block * 64, key, u.k_step,
                          SM90_L2_EVICT_FIRST);
        if (is_v)
            key += WARPS * BOX_KEYS;
        is_v = !is_v;
        put.next();
    }
    __device__ __forceinline__ uint32_t arrived()
    {
        sm90_mbar_wait(bars + take.slot * 8, take.parity);
        return shared + take.slot * C::TILE_BYTES;
    }
    __device__ __forceinline__ void done(const sm90_unit &u)
    {
        take.next();
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            ask(u);
    }
};

/* NT * 8 packed rows; a thread has columns (packed rows) lane % 4 * 2 and + 1 of each group of 8. */
template <typename C, uint32_t NT> struct decode_sums {
    float o[C::D / 16][NT][4];
    float max[NT][2], sum[NT][2];
    uint32_t limit[NT][2], first[NT][2];
};

template <typename C, uint32_t NT>
__device__ __forceinline__ void decode_tile(const sm90_args &a, const sm90_unit &u, decode_stream<C> &st,
                                            const uint32_t (&q)[C::D / 16][NT][2], decode_sums<C, NT> &x, uint32_t key,
                                            bool masked)
{
    const uint32_t lane = threadIdx.x % 32;
    float s[2][NT][4];
#pragma unroll
    for (uint32_t m = 0; m < 2; m++)
#pragma unroll
        for (uint32_t n = 0; n < NT; n++)
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                s[m][n][i] = 0;
    uint32_t k_shared = st.arrived();
#pragma unroll
    for (uint32_t k = 0; k < C::D / 16; k++)
#pragma unroll
        for (uint32_t m = 0; m < 2; m++) {
            uint32_t r[4];
            sm90_ldmatrix(r, k_shared + sm90_swizzled(m * 16 + lane % 16, k * 2 + lane / 16, BOX_KEYS));
#pragma unroll
            for (uint32_t n = 0; n < NT; n++)
                sm90_mma<C::BF16>(s[m][n], r, q[k][n][0], q[k][n][1]);
        }
    st.done(u);

    const float scale = a.run.score_scale;
    uint32_t p[2][NT][2];
#pragma unroll
    for (uint32_t n = 0; n < NT; n++) {
#pragma unroll
        for (uint32_t j = 0; j < 2; j++) {
            float most = x.max[n][j];
#pragma unroll
            for (uint32_t m = 0; m < 2; m++)
#pragma unroll
                for (uint32_t h = 0; h < 2; h++) {
                    float &v = s[m][n][h * 2 + j];
                    if constexpr (C::BENT)
                        v = sm90_bend(a, v);
                    uint32_t t = key + m * 16 + h * 8 + lane / 4;
                    if (masked && (t >= x.limit[n][j] || t < x.first[n][j]))
                        v = -INFINITY;
                    most = fmaxf(most, v);
                }
#pragma unroll
            for (uint32_t d = 4; d < 32; d *= 2)
                most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, d));
            float base = most == -INFINITY ? 0 : most * scale;
            float by = sm90_exp2(x.max[n][j] * scale - base), sum = 0;
            x.max[n][j] = most;
#pragma unroll
            for (uint32_t m = 0; m < 2; m++)
#pragma unroll
                for (uint32_t h = 0; h < 2; h++) {
                    float &v = s[m][n][h * 2 + j];
                    v = sm90_exp2(v * scale - base);
                    sum += v;
                }
            x.sum[n][j] = x.sum[n][j] * by + sum;
#pragma unroll
            for (uint32_t i = 0; i < C::D / 16; i++) {
                x.o[i][n][j] *= by;
                x.o[i][n][2 + j] *= by;
            }
        }
#pragma unroll
        for (uint32_t m = 0; m < 2; m++)
#pragma unroll
            for (uint32_t h = 0; h < 2; h++)
                p[m][n][h] = sm90_transposed(sm90_pack<C::BF16>(s[m][n][h * 2], s[m][n][h * 2 + 1]));
    }
    uint32_t v_shared = st.arrived();
#pragma unroll
    for (uint32_t m = 0; m < 2; m++)
#pragma unroll
        for (uint32_t i = 0; i < C::D / 16; i++) {
            uint32_t r[4]; /* rows d .. d + 7, keys 0 .. 7; d + 8 ..; keys 8 .. 15, d ..; d + 8 .. */
            sm90_ldmatrix_trans(
                r, v_shared + sm90_swizzled(m * 16 + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2, BOX_KEYS));
#pragma unroll
            for (uint32_t n = 0; n < NT; n++)
                sm90_mma<C::BF16>(x.o[i][n], r, p[m][n][0], p[m][n][1]);
        }
    st.done(u);
}

/* Q of the item's packed rows as the second operand; zeros behind the sequence and the head. */
template <typename C, uint32_t NT>
__device__ __forceinline__ void decode_load_q(const sm90_args &a, const sm90_unit &u, const attn_item &it,
                                              uint32_t (&q)[C::D / 16][NT][2])
{
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t n = 0; n < NT; n++) {
        uint32_t p = it.first + n * 8 + lane / 4;
        bool on = p < u.packed;
        const char *src = a.run.q + (on ? sm90_row_at(a, u, it.kv_head, p, a.run.q_row_stride) : 0);
#pragma unroll
        for (uint32_t k = 0; k < C::D / 16; k++)
#pragma unroll
            for (uint32_t h = 0; h < 2; h++) {
                uint32_t d = k * 16 + h * 8 + lane % 4 * 2;
                q[k][n][h] = on && d < a.run.head_dim ? *(const uint32_t *)(src + d * 2) : 0;
            }
    }
}

/* One item by one warp, up to its sums in shared memory. */
template <typename C, uint32_t NT>
__device__ __forceinline__ void decode_item(const sm90_args &a, const sm90_unit &u, const attn_item &it, decode_bars *b,
                                            decode_stream<C> &st, uint32_t warp, float *sums)
{
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t tiles = (it.key_end - it.key_begin + BOX_KEYS - 1) / BOX_KEYS;
    const uint32_t mine = tiles > warp ? (tiles - warp + WARPS - 1) / WARPS : 0;
    st.left = 2 * mine;
    st.key = it.key_begin + warp * BOX_KEYS;
    st.is_v = false;
    if (lane == 0) {
        sm90_map_acquire(u.k_map);
        sm90_map_acquire(u.v_map);
        for (uint32_t i = 0; i < C::SLOTS; i++)
            st.ask(u);
    }
    decode_sums<C, NT> x;
    uint32_t q[C::D / 16][NT][2];
    decode_load_q<C, NT>(a, u, it, q);
#pragma unroll
    for (uint32_t n = 0; n < NT; n++) {
#pragma unroll
        for (uint32_t j = 0; j < 2; j++) {
            uint32_t limit = sm90_limit(a, u, it.first + n * 8 + lane % 4 * 2 + j);
            x.first[n][j] = sm90_first(a, limit);
            x.limit[n][j] = limit < it.key_end ? limit : it.key_end;
            x.max[n][j] = -INFINITY;
            x.sum[n][j] = 0;
        }
#pragma unroll
        for (uint32_t i = 0; i < C::D / 16; i++)
#pragma unroll
            for (uint32_t e = 0; e < 4; e++)
                x.o[i][n][e] = 0;
    }
    uint32_t all_see_to = sm90_limit(a, u, it.first), all_see_from = sm90_first(a, u.kv_len);
    all_see_to = all_see_to < it.key_end ? all_see_to : it.key_end;
    uint32_t key = it.key_begin + warp * BOX_KEYS;
#pragma unroll 1
    for (uint32_t i = 0; i < mine; i++, key += WARPS * BOX_KEYS)
        decode_tile<C, NT>(a, u, st, q, x, key, key + BOX_KEYS > all_see_to || key < all_see_from);

    sm90_bar_sync(BAR_DECODE, GROUP_THREADS); /* all rings are empty: their place takes the sums */
#pragma unroll
    for (uint32_t n = 0; n < NT; n++)
#pragma unroll
        for (uint32_t j = 0; j < 2; j++) {
            uint32_t r = n * 8 + lane % 4 * 2 + j;
#pragma unroll
            for (uint32_t d = 4; d < 32; d *= 2)
                x.sum[n][j] += __shfl_xor_sync(0xffffffff, x.sum[n][j], d);
            if (lane < 4) {
                b->max[warp][r] = x.max[n][j] == -INFINITY ? -INFINITY : x.max[n][j] * a.run.score_scale;
                b->sum[warp][r] = x.sum[n][j];
            }
            float *to = sums + (warp * DECODE_ROWS + r) * C::D + lane / 4;
#pragma unroll
            for (uint32_t i = 0; i < C::D / 16; i++) {
                to[i * 16] = x.o[i][n][j];
                to[i * 16 + 8] = x.o[i][n][2 + j];
            }
        }
}

template <typename C>
__device__ __forceinline__ void decode_put(const sm90_args &a, const sm90_unit &u, const attn_item &it, uint32_t r,
                                           uint32_t d, float x)
{
    uint32_t pair = sm90_pack<C::BF16>(x, 0);
    if (d < a.run.head_dim)
        *(uint16_t *)(a.run.out + sm90_row_at(a, u, it.kv_head, it.first + r, a.run.out_row_stride) + d * 2) =
            (uint16_t)pair;
}

/* The parts of a unit, all of them written, in order of keys. PARTS_AT_ONCE are read at a time: each read that waits for
 * another takes half a microsecond. */
template <typename C>
__device__ __forceinline__ void decode_combine(const sm90_args &a, const sm90_unit &u, const attn_item &it,
                                               uint32_t rows, uint32_t tid)
{
    constexpr uint32_t QUADS = C::D / 4, PARTS_AT_ONCE = 4;
    const float2 *weights = a.run.ws.weights[ROLE_DECODE] + (uint64_t)it.slot * DECODE_ROWS;
    const float4 *sums = (const float4 *)a.run.ws.sums[ROLE_DECODE] + (uint64_t)it.slot * DECODE_ROWS * QUADS;
#pragma unroll 1
    for (uint32_t i = tid; i < rows * QUADS; i += GROUP_THREADS) {
        const uint32_t r = i / QUADS, c = i % QUADS;
        float top = -INFINITY, sum = 0;
        float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 1
        for (uint32_t p = 0; p < it.parts; p += PARTS_AT_ONCE) {
            float2 w[PARTS_AT_ONCE];
            float4 x[PARTS_AT_ONCE];
#pragma unroll
            for (uint32_t k = 0; k < PARTS_AT_ONCE; k++) {
                const bool on = p + k < it.parts; /* a row that is there in any case; no branch between reads */
                uint32_t row = (on ? p + k : p) * DECODE_ROWS + r;
                float2 read = __ldcg(&weights[row]);
                x[k] = __ldcg(&sums[row * QUADS + c]);
                w[k] = on ? read : make_float2(-INFINITY, 0);
            }
#pragma unroll
            for (uint32_t k = 0; k < PARTS_AT_ONCE; k++) {
                /* A part none of whose keys the row sees has -infinity and nothing. */
                float above = fmaxf(top, w[k].x), base = above == -INFINITY ? 0 : above;
                float old = sm90_exp2(top - base), f = sm90_exp2(w[k].x - base);
                top = above;
                sum = sum * old + w[k].y * f;
                o.x = o.x * old + x[k].x * f;
                o.y = o.y * old + x[k].y * f;
                o.z = o.z * old + x[k].z * f;
                o.w = o.w * old + x[k].w * f;
            }
        }
        float f = sum > 0 ? 1 / sum : 0;
        if (c * 4 < a.run.head_dim)
            *(uint2 *)(a.run.out + sm90_row_at(a, u, it.kv_head, it.first + r, a.run.out_row_stride) + c * 8) =
                make_uint2(sm90_pack<C::BF16>(o.x * f, o.y * f), sm90_pack<C::BF16>(o.z * f, o.w * f));
    }
}

/* Adds up the four warps, then, where this item is the last part of its unit, the parts. */
template <typename C>
__device__ __forceinline__ void decode_finish(const sm90_args &a, const sm90_unit &u, const attn_item &it,
                                              decode_bars *b, uint32_t tid, const float *sums)
{
    const sm90_workspace &ws = a.run.ws;
    const uint32_t rows = u.packed - it.first < DECODE_ROWS ? u.packed - it.first : DECODE_ROWS;
    if (tid < rows) {
        float most = -INFINITY, sum = 0;
        for (uint32_t w = 0; w < WARPS; w++)
            most = fmaxf(most, b->max[w][tid]);
        for (uint32_t w = 0; w < WARPS; w++) {
            float by = b->max[w][tid] == -INFINITY ? 0 : sm90_exp2(b->max[w][tid] - most);
            b->by[w][tid] = by;
            sum += by * b->sum[w][tid];
        }
        b->all_max[tid] = most;
        b->all_sum[tid] = sum;
        if (it.parts > 1)
            ws.weights[ROLE_DECODE][(uint64_t)(it.slot + it.part) * DECODE_ROWS + tid] = {most, sum};
    }
    sm90_bar_sync(BAR_DECODE, GROUP_THREADS);
    constexpr uint32_t ROWS_AT_ONCE = GROUP_THREADS / C::D;
    const uint32_t d = tid % C::D;
    for (uint32_t r = tid / C::D; r < rows; r += ROWS_AT_ONCE) {
        float o = 0;
#pragma unroll
        for (uint32_t w = 0; w < WARPS; w++)
            o += b->by[w][r] * sums[(w * DECODE_ROWS + r) * C::D + d];
        if (it.parts == 1)
            decode_put<C>(a, u, it, r, d, b->all_sum[r] > 0 ? o / b->all_sum[r] : 0);
        else
            ws.sums[ROLE_DECODE][((uint64_t)(it.slot + it.part) * DECODE_ROWS + r) * C::D + d] = o;
    }
    sm90_async_fence(); /* the rings are filled next */
    if (it.parts == 1)
        return;
    sm90_bar_sync(BAR_DECODE, GROUP_THREADS);
    if (tid == 0) {
        __threadfence(); /* of what all wrote before the barrier */
        b->last = atomicAdd(&ws.arrived[ROLE_DECODE][it.slot], 1) == it.parts - 1;
        if (b->last)
            ws.arrived[ROLE_DECODE][it.slot] = 0;
        __threadfence();
    }
    sm90_bar_sync(BAR_DECODE, GROUP_THREADS);
    if (b->last)
        decode_combine<C>(a, u, it, rows, tid);
}

/* None is taken any more once *stop is set: a launch of a decode kernel follows. stop: NULL where nothing sets it. Read by
 * an atomic, since prefill's producer sets it at any time. */
__device__ __forceinline__ uint32_t decode_take(const sm90_args &a, uint32_t *stop)
{
    if (stop && atomicOr(stop, 0))
        return NO_ITEM;
    return atomicAdd(&a.run.counters->next[ROLE_DECODE], 1);
}

/* A warpgroup; tid 0 .. 127; `items` is the length of the list. */
template <typename C>
__device__ void decode_role(const sm90_args &a, decode_bars *b, char *memory, uint32_t tid, uint32_t items,
                            uint32_t *stop)
{
    const uint32_t warp = tid / 32;
    decode_stream<C> st;
    st.shared = sm90_shared(memory) + warp * C::RING_BYTES;
    st.bars = sm90_shared(&b->full[warp][0]);
    float *sums = (float *)memory;
    for (;;) {
        if (tid == 0) {
            b->item = decode_take(a, stop);
            if (b->item < items)
                attn_item_copy(&b->at, &a.run.ws.items[ROLE_DECODE][b->item]); /* perhaps before attn_wait_earlier */
        }
        sm90_bar_sync(BAR_DECODE, GROUP_THREADS);
        const uint32_t index = b->item;
        if (index >= items)
            break;
        const attn_item it = b->at;
        if (it.parts > 0) {
            const sm90_unit u = sm90_unit_of(a, it);
            if (u.packed - it.first <= 8)
                decode_item<C, 1>(a, u, it, b, st, warp, sums);
            else
                decode_item<C, 2>(a, u, it, b, st, warp, sums);
            sm90_bar_sync(BAR_DECODE, GROUP_THREADS);
            decode_finish<C>(a, u, it, b, tid, sums);
        }
        sm90_bar_sync(BAR_DECODE, GROUP_THREADS); /* b->item and the rings are free again */
    }
}

#endif
