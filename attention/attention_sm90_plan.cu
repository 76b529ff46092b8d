/* attention_sm90_plan.cu - cuts a batch into items, on the device, once per step. One block.
 *
 *   1  every sequence is looked at: faults, totals by role
 *   2  which SMs work on what, and the size of a part, follow from the totals (attention_sm90_rule.h)
 *   3  items and slots of every sequence are counted; a scan gives each its place in the lists
 *   4  items are written: a warp per sequence, a lane per block of packed rows, or, of one block, per KV head and part
 *
 * Within a sequence items lie by KV head, then last rows first: blocks that run at the same time read the same keys, which
 * come from L2 then, and the longest items of a head begin first.
 */
#include "attention/attention_sm90.cuh"

namespace
{
constexpr uint32_t PLAN_THREADS = 1024;
constexpr uint32_t PLAN_WARPS = PLAN_THREADS / 32;

/* The sum of x over all threads before this one; *total over all. Two barriers. */
__device__ uint32_t block_scan(uint32_t x, uint32_t *total)
{
    __shared__ uint32_t sums[PLAN_WARPS];
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, inclusive = x;
    for (uint32_t d = 1; d < 32; d *= 2) {
        uint32_t y = __shfl_up_sync(0xffffffff, inclusive, d);
        if (lane >= d)
            inclusive += y;
    }
    if (lane == 31)
        sums[warp] = inclusive;
    __syncthreads();
    uint32_t before = 0, all = 0;
    for (uint32_t w = 0; w < PLAN_WARPS; w++) {
        before += w < warp ? sums[w] : 0;
        all += sums[w];
    }
    *total = all;
    __syncthreads();
    return before + inclusive - x;
}

__device__ void look(const sm90_plan_args &a, uint32_t seqs, uint32_t last, sm90_totals *t, uint32_t *fault)
{
    for (uint32_t i = threadIdx.x; i < seqs; i += PLAN_THREADS) {
        const attn_seq s = a.seq[i];
        if (sm90_breaks_rule(&a.shape, &s)) {
            atomicMin(fault, i + 1);
            continue;
        }
        const sm90_work w = sm90_work_of(&a.shape, &s);
        atomicMax(&t->longest[w.role], w.longest);
        atomicAdd(&t->tiles[w.role], w.tiles);
        atomicAdd(&t->units[w.role], w.units);
        if (w.role == ROLE_DECODE && i >= last)
            atomicAdd(&t->last_tiles, w.tiles);
    }
}

/* Items and slots of one KV head of sequence i, by a warp; each lane has every 32nd unit. */
__device__ void count(const sm90_plan_args &a, const sm90_rule &r, uint32_t i, const attn_seq &s, uint32_t lane,
                      uint32_t &items, uint32_t &slots)
{
    const uint32_t role = sm90_role_of(&a.shape, &s), n = sm90_units_of(&a.shape, &s);
    items = slots = 0;
    for (uint32_t u = lane; u < n; u += 32) {
        uint32_t lo, hi;
        sm90_keys_of(&a.shape, &s, u * UNIT_ROWS, &lo, &hi);
        const uint32_t tiles = sm90_tiles_of(lo, hi), each = sm90_part_tiles(&r, role, i, tiles);
        const uint32_t parts = (tiles + each - 1) / each;
        items += parts;
        slots += parts > 1 ? parts : 0;
    }
}

__device__ uint32_t warp_sum(uint32_t x)
{
    return __reduce_add_sync(0xffffffff, x);
}

__device__ uint32_t warp_before(uint32_t x)
{
    uint32_t lane = threadIdx.x % 32, inclusive = x;
    for (uint32_t d = 1; d < 32; d *= 2) {
        uint32_t y = __shfl_up_sync(0xffffffff, inclusive, d);
        inclusive += lane >= d ? y : 0;
    }
    return inclusive - x;
}

/* Of a sequence: what its items have in common, and where they begin; those of KV head h from item + h * items on. */
struct sequence_items {
    attn_seq s;
    uint32_t seq, role, items, slots;
};

/* A unit, in `parts` parts of `each` tiles. */
struct unit_items {
    uint32_t first, lo, hi, each, parts, item, slot;
};

__device__ __forceinline__ void write_part(const sm90_plan_args &a, const sequence_items &q, const unit_items &u,
                                           uint32_t h, uint32_t p)
{
    const uint32_t at = u.item + h * q.items + p;
    if (at >= a.ws.max_items[q.role])
        return;
    attn_item it;
    it.s = q.s;
    it.seq = q.seq;
    it.kv_head = h;
    it.first = u.first;
    it.key_begin = u.lo + p * u.each * TILE_KEYS;
    it.key_end = p + 1 < u.parts ? it.key_begin + u.each * TILE_KEYS : u.hi;
    it.part = p;
    it.slot = u.slot + h * q.slots;
    it.parts = u.parts == 1 || it.slot + u.parts <= a.ws.max_slots[q.role] ? u.parts : 0;
    a.ws.items[q.role][at] = it;
}

__device__ unit_items unit_of(const sm90_plan_args &a, const sm90_rule &r, const sequence_items &q, uint32_t first)
{
    unit_items u = {first};
    sm90_keys_of(&a.shape, &q.s, first, &u.lo, &u.hi);
    const uint32_t tiles = sm90_tiles_of(u.lo, u.hi);
    u.each = sm90_part_tiles(&r, q.role, q.seq, tiles);
    u.parts = (tiles + u.each - 1) / u.each;
    return u;
}

/* Writes the items of a sequence. One unit: lanes share its heads and parts; more: a lane has every 32nd, the last rows, which see
 * most, first. */
__device__ void write(const sm90_plan_args &a, const sm90_rule &r, const sequence_items &q, uint32_t lane,
                      uint32_t item, uint32_t slot)
{
    const uint32_t n = sm90_units_of(&a.shape, &q.s);
    if (n == 1) {
        unit_items u = unit_of(a, r, q, 0);
        u.item = item;
        u.slot = slot;
        for (uint32_t i = lane; i < a.shape.kv_heads * u.parts; i += 32)
            write_part(a, q, u, i / u.parts, i % u.parts);
        return;
    }
    for (uint32_t from = 0; from < n; from += 32) {
        unit_items u = {};
        if (from + lane < n)
            u = unit_of(a, r, q, (n - 1 - from - lane) * UNIT_ROWS);
        const uint32_t cut = u.parts > 1 ? u.parts : 0;
        u.item = item + warp_before(u.parts);
        u.slot = slot + warp_before(cut);
        for (uint32_t h = 0; h < a.shape.kv_heads; h++)
            for (uint32_t p = 0; p < u.parts; p++)
                write_part(a, q, u, h, p);
        item += warp_sum(u.parts);
        slot += warp_sum(cut);
    }
}

__global__ void __launch_bounds__(PLAN_THREADS) plan_kernel(const __grid_constant__ sm90_plan_args a)
{
    __shared__ sm90_totals t;
    __shared__ unsigned long long share;
    __shared__ sm90_rule rule;
    __shared__ uint32_t fault;
    const uint32_t given = *a.counts, seqs = given < a.max_seqs ? given : a.max_seqs;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        t = {};
        share = UINT64_MAX;
        fault = given > a.max_seqs ? ATTN_FAULT_SEQS : UINT32_MAX;
    }
    __syncthreads();
    const uint32_t last = seqs - seqs / 4;
    look(a, seqs, last, &t, &fault);
    __syncthreads();
    atomicMin(&share, sm90_share_of(&a.shape, &t, threadIdx.x + 1)); /* of each number of clusters */
    __syncthreads();
    if (threadIdx.x == 0) /* alone: by all warps at once it takes longer */
        rule = sm90_rule_of(&a.shape, &t, share, last);
    __syncthreads();
    const sm90_rule r = rule;
    for (uint32_t i = warp; i < seqs; i += PLAN_WARPS) {
        const attn_seq s = a.seq[i];
        uint32_t items = 0, slots = 0;
        bool bad = sm90_breaks_rule(&a.shape, &s);
        if (!bad)
            count(a, r, i, s, lane, items, slots);
        items = warp_sum(items);
        slots = warp_sum(slots);
        if (lane < ROLES) {
            bool mine = !bad && sm90_role_of(&a.shape, &s) == lane;
            a.ws.offsets[lane][i] = mine ? items * a.shape.kv_heads : 0;
            a.ws.offsets[ROLES + lane][i] = mine ? slots * a.shape.kv_heads : 0;
        }
    }
    __syncthreads();
    uint32_t all[2 * ROLES] = {};
    for (uint32_t v = 0; v < 2 * ROLES; v++)
        for (uint32_t from = 0; from < seqs; from += PLAN_THREADS) {
            uint32_t i = from + threadIdx.x, total;
            uint32_t before = block_scan(i < seqs ? a.ws.offsets[v][i] : 0, &total);
            if (i < seqs)
                a.ws.offsets[v][i] = all[v] + before;
            all[v] += total;
        }
    __syncthreads();
    for (uint32_t i = warp; i < seqs; i += PLAN_WARPS) {
        const attn_seq s = a.seq[i];
        if (sm90_breaks_rule(&a.shape, &s))
            continue;
        sequence_items q = {s, i, sm90_role_of(&a.shape, &s)};
        count(a, r, i, s, lane, q.items, q.slots);
        q.items = warp_sum(q.items);
        q.slots = warp_sum(q.slots);
        write(a, r, q, lane, a.ws.offsets[q.role][i], a.ws.offsets[ROLES + q.role][i]);
    }
    if (threadIdx.x < ROLES) {
        uint32_t n = all[threadIdx.x], most = a.ws.max_items[threadIdx.x];
        a.ws.lists->count[threadIdx.x] = n < most ? n : most;
        if (all[ROLES + threadIdx.x] > a.ws.max_slots[threadIdx.x])
            atomicMin(&fault, ATTN_FAULT_KV_TOKENS);
        else if (n > most) /* slots are enough, so units are not */
            atomicMin(&fault, ATTN_FAULT_ROWS);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        a.ws.lists->clusters = r.clusters;
        a.ws.lists->fault = fault == UINT32_MAX ? 0 : fault;
    }
    __threadfence(); /* see attn_lists_of */
}
} // namespace

cudaError_t sm90_launch_plan(const sm90_plan_args &args, cudaStream_t stream)
{
    plan_kernel<<<1, PLAN_THREADS, 0, stream>>>(args);
    return cudaGetLastError();
}
