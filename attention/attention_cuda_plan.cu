/* attention_cuda_plan.cu - cuts a batch into items, on the device.
 *
 * An entry is a block of packed rows of one sequence, for all KV heads: they are cut alike. Grid: PLAN_BLOCKS blocks that
 * all count everything (it is cheap, and needs no second launch) and each write every PLAN_BLOCKS-th entry. A thread has a
 * range of neighbouring entries, which it walks three times: to add up the tiles, to count items and slots under the part
 * size that follows, and to write. Shared memory: [sequences + 1] the first entry of each sequence.
 */
#include "attention/attention_cuda.cuh"

namespace
{
constexpr uint32_t PLAN_THREADS = 512;
constexpr uint32_t PLAN_BLOCKS = 16;
constexpr uint32_t MIN_PART_TILES = 2;     /* less is all start and end */
constexpr uint32_t MAX_PREFILL_PARTS = 16; /* one block adds them up */
constexpr uint32_t MAX_DECODE_PARTS = 64;

struct entry {
    uint32_t first;  /* packed row */
    uint32_t lo, hi; /* keys that its rows see */
    uint32_t tiles;
};

struct counts {
    uint32_t v[2 * ROLES]; /* items of each role, slots of each role */
};

/* 0, or what is wrong. */
__device__ bool breaks_rule(const cuda_plan_args &a, const attn_seq &s)
{
    return s.rows == 0 || s.rows > a.max_seq_rows || s.kv_len < s.rows || s.kv_len > a.max_kv_len ||
           s.first_row >= a.max_rows || s.rows > a.max_rows - s.first_row;
}

__device__ attn_role role_of(const cuda_plan_args &a, const attn_seq &s)
{
    return !a.one_way && s.rows * a.group <= DECODE_ROWS ? ROLE_DECODE : ROLE_PREFILL;
}

__device__ uint32_t entries_of(const cuda_plan_args &a, const attn_seq &s)
{
    if (breaks_rule(a, s))
        return 0;
    return role_of(a, s) == ROLE_DECODE ? 1 : (s.rows * a.group + a.unit_rows - 1) / a.unit_rows;
}

/* The index-th entry of n. Later rows see more keys and come first: long items at the end would leave blocks idle. */
__device__ entry entry_at(const cuda_plan_args &a, const attn_seq &s, uint32_t index, uint32_t n)
{
    entry e;
    uint32_t rows = s.rows * a.group;
    e.first = (n - 1 - index) * a.unit_rows;
    uint32_t last = (rows < e.first + a.unit_rows ? rows : e.first + a.unit_rows) - 1;
    uint32_t context = s.kv_len - s.rows;
    uint32_t seen = context + e.first / a.group + 1; /* by the first row */
    e.lo = a.window && seen > a.window ? seen - a.window : 0;
    e.hi = context + last / a.group + 1;
    e.tiles = (e.hi - e.lo + TILE_KEYS - 1) / TILE_KEYS;
    return e;
}

struct part_rule {
    uint32_t tiles[ROLES]; /* of a part; 0: not cut */
};

/* What a part costs beside its own tiles, in tiles: start and end; of a unit in k parts the sums too, k times over. */
__device__ uint32_t overhead(attn_role role, uint32_t k)
{
    return k == 1 ? 1 : role == ROLE_DECODE ? 2 : 2 + k / 2;
}

/* Into how many parts the longest unit is cut, so that the last block is done soonest: `units` of it would make up all the
 * work, and blocks take parts in rounds. Where decodes are equally long their parts are counted: a few more than blocks are a round more.
 * Slots are enough by construction: a unit that is cut has fewer than
 * 2 * tiles / (tiles of a part) parts, so all have fewer than 2 * units * k, and that is bounded here. */
__device__ uint32_t best_parts(const cuda_plan_args &a, attn_role role, uint64_t units, uint64_t total,
                               uint32_t longest)
{
    const bool equal = role == ROLE_DECODE && 16 * total >= 15 * units * longest;
    uint32_t most_parts = role == ROLE_DECODE ? MAX_DECODE_PARTS : MAX_PREFILL_PARTS;
    uint64_t most_items = (role == ROLE_DECODE ? 4 : 2) * (uint64_t)a.blocks;
    uint64_t best_cost = UINT64_MAX;
    uint32_t best = 1;
    for (uint32_t k = 1; k <= most_parts; k++) {
        uint32_t each = (longest + k - 1) / k;
        uint64_t items = equal ? units * ((longest + each - 1) / each) : (total + each - 1) / each;
        if (k > 1 && (each < MIN_PART_TILES || items > most_items))
            break;
        uint64_t cost = (items + a.blocks - 1) / a.blocks * (each + overhead(role, k));
        if (cost < best_cost) {
            best_cost = cost;
            best = k;
        }
    }
    return best;
}

constexpr uint32_t COUNT_BIT = 40; /* a sum has tiles below it, units from it on */

/* total: units and tiles of all units of a role; longest: tiles of the longest unit. */
__device__ part_rule rule_for(const cuda_plan_args &a, const uint64_t (&total)[ROLES], const uint32_t (&longest)[ROLES])
{
    part_rule r;
    r.tiles[ROLE_PREFILL] = 0;
    r.tiles[ROLE_DECODE] = a.fixed_tiles;
    for (uint32_t role = 0; role < ROLES && !a.fixed_tiles && !a.one_way; role++) {
        const uint64_t units = total[role] >> COUNT_BIT, tiles = total[role] & ((1ull << COUNT_BIT) - 1);
        uint32_t k = best_parts(a, (attn_role)role, units * a.kv_heads, tiles * a.kv_heads, longest[role]);
        r.tiles[role] = (longest[role] + k - 1) / k;
    }
    return r;
}

/* Tiles of each part of a unit, the last of which may have fewer. Under a fixed cut all parts but the last are of the
 * rule's size; else they are about equal. */
__device__ uint32_t part_tiles(const cuda_plan_args &a, const part_rule &r, attn_role role, uint32_t tiles)
{
    uint32_t of_rule = r.tiles[role];
    if (of_rule == 0 || tiles <= of_rule)
        return tiles;
    uint32_t most = role == ROLE_DECODE ? MAX_DECODE_PARTS : MAX_PREFILL_PARTS;
    uint32_t parts = (tiles + of_rule - 1) / of_rule;
    if (parts > most)
        return (tiles + most - 1) / most;
    return a.fixed_tiles ? of_rule : (tiles + parts - 1) / parts;
}

template <typename T> __device__ T warp_scan(T x)
{
    for (uint32_t d = 1; d < 32; d *= 2) {
        T y = __shfl_up_sync(0xffffffff, x, d);
        if (threadIdx.x % 32 >= d)
            x += y;
    }
    return x;
}

/* The sum of x over all threads before this one; *total over all. Two barriers. */
template <typename T> __device__ T block_scan(T x, T *total)
{
    __shared__ T sums[PLAN_THREADS / 32];
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    T inclusive = warp_scan(x);
    if (lane == 31)
        sums[warp] = inclusive;
    __syncthreads();
    T before = 0, all = 0;
    for (uint32_t w = 0; w < PLAN_THREADS / 32; w++) {
        if (w < warp)
            before += sums[w];
        all += sums[w];
    }
    *total = all;
    __syncthreads();
    return before + inclusive - x;
}

/* Calls fn(index, sequence, entry, role) for entries begin .. end - 1; first_entry[] is in shared memory. */
template <typename Fn>
__device__ void walk(const cuda_plan_args &a, const uint32_t *first_entry, uint32_t seqs, uint32_t begin, uint32_t end,
                     Fn fn)
{
    if (begin >= end)
        return;
    uint32_t low = 0, high = seqs; /* the sequence of entry begin: first_entry[low] <= begin < first_entry[high] */
    while (high - low > 1) {
        uint32_t mid = (low + high) / 2;
        if (first_entry[mid] <= begin)
            low = mid;
        else
            high = mid;
    }
    for (uint32_t i = low, e = begin; e < end; i++) {
        uint32_t from = first_entry[i], n = first_entry[i + 1] - from;
        if (n == 0)
            continue;
        const attn_seq s = a.seq[i];
        attn_role role = role_of(a, s);
        for (; e < end && e < from + n; e++)
            fn(e, i, entry_at(a, s, e - from, n), role);
    }
}

__device__ void write_items(const cuda_plan_args &a, uint32_t seq, const entry &e, attn_role role, uint32_t tiles,
                            uint32_t parts, uint32_t item, uint32_t slot)
{
    const cuda_workspace &ws = a.ws;
    const attn_seq s = a.seq[seq];
    for (uint32_t part = 0; part < parts; part++) {
        for (uint32_t h = 0; h < a.kv_heads; h++, item++) {
            if (item >= ws.max_items[role])
                return;
            attn_item it;
            it.s = s;
            it.seq = seq;
            it.kv_head = h;
            it.first = e.first;
            it.key_begin = e.lo + part * tiles * TILE_KEYS;
            it.key_end = part + 1 < parts ? it.key_begin + tiles * TILE_KEYS : e.hi;
            it.part = part;
            it.parts = parts;
            it.slot = slot + h * parts;
            ws.items[role][item] = it;
        }
    }
}

__global__ void __launch_bounds__(PLAN_THREADS) plan_kernel(const __grid_constant__ cuda_plan_args a)
{
    extern __shared__ uint32_t first_entry[]; /* [seqs + 1] */
    __shared__ uint32_t fault, longest_of[ROLES];
    uint32_t given = *a.counts, seqs = given < a.max_seqs ? given : a.max_seqs;
    if (threadIdx.x == 0)
        fault = given > a.max_seqs ? ATTN_FAULT_SEQS : UINT32_MAX;
    if (threadIdx.x < ROLES)
        longest_of[threadIdx.x] = 0;
    __syncthreads();

    uint32_t per = (seqs + PLAN_THREADS - 1) / PLAN_THREADS;
    uint32_t begin = threadIdx.x * per < seqs ? threadIdx.x * per : seqs;
    uint32_t end = begin + per < seqs ? begin + per : seqs;
    uint32_t mine = 0, entries;
    for (uint32_t i = begin; i < end; i++) {
        uint32_t n = entries_of(a, a.seq[i]);
        mine += n;
        if (n == 0)
            atomicMin(&fault, i + 1);
    }
    uint32_t at = block_scan(mine, &entries);
    for (uint32_t i = begin; i < end; i++) {
        first_entry[i] = at;
        at += entries_of(a, a.seq[i]);
    }
    if (threadIdx.x == 0)
        first_entry[seqs] = entries;
    __syncthreads();

    per = (entries + PLAN_THREADS - 1) / PLAN_THREADS;
    begin = threadIdx.x * per < entries ? threadIdx.x * per : entries;
    end = begin + per < entries ? begin + per : entries;
    uint64_t tiles[ROLES] = {0, 0}, total[ROLES];
    uint32_t longest[ROLES] = {0, 0};
    walk(a, first_entry, seqs, begin, end, [&](uint32_t, uint32_t, const entry &e, attn_role role) {
        tiles[role] += (1ull << COUNT_BIT) + e.tiles;
        longest[role] = e.tiles > longest[role] ? e.tiles : longest[role];
    });
    for (uint32_t r = 0; r < ROLES; r++)
        atomicMax(&longest_of[r], longest[r]);
    for (uint32_t r = 0; r < ROLES; r++)
        block_scan(tiles[r], &total[r]);
    for (uint32_t r = 0; r < ROLES; r++)
        longest[r] = longest_of[r]; /* complete since the barriers of the sums */
    const part_rule rule = rule_for(a, total, longest);

    counts n = {}, all, from;
    walk(a, first_entry, seqs, begin, end, [&](uint32_t, uint32_t, const entry &e, attn_role role) {
        uint32_t each = part_tiles(a, rule, role, e.tiles), parts = (e.tiles + each - 1) / each;
        n.v[role] += parts * a.kv_heads;
        n.v[ROLES + role] += parts > 1 ? parts * a.kv_heads : 0;
    });
    for (uint32_t i = 0; i < 2 * ROLES; i++)
        from.v[i] = block_scan(n.v[i], &all.v[i]);

    walk(a, first_entry, seqs, begin, end, [&](uint32_t index, uint32_t seq, const entry &e, attn_role role) {
        uint32_t each = part_tiles(a, rule, role, e.tiles), parts = (e.tiles + each - 1) / each;
        uint32_t item = from.v[role], slot = from.v[ROLES + role];
        from.v[role] += parts * a.kv_heads;
        from.v[ROLES + role] += parts > 1 ? parts * a.kv_heads : 0;
        if (parts > 1 && slot + parts * a.kv_heads > a.ws.max_slots[role]) {
            /* More keys than max_kv_tokens: said, and one part does without slots. Items behind keep their places. */
            atomicMin(&fault, ATTN_FAULT_KV_TOKENS);
            if (index % PLAN_BLOCKS == blockIdx.x)
                write_items(a, seq, e, role, e.tiles, 1, item, 0);
            for (uint32_t i = a.kv_heads; i < parts * a.kv_heads; i++) {
                attn_item none = {};
                if (index % PLAN_BLOCKS == blockIdx.x && item + i < a.ws.max_items[role])
                    a.ws.items[role][item + i] = none; /* parts 0: skipped */
            }
            return;
        }
        if (index % PLAN_BLOCKS == blockIdx.x)
            write_items(a, seq, e, role, each, parts, item, slot);
    });
    if (blockIdx.x == 0 && threadIdx.x < ROLES) {
        uint32_t most = a.ws.max_items[threadIdx.x];
        a.ws.lists->count[threadIdx.x] = all.v[threadIdx.x] < most ? all.v[threadIdx.x] : most;
        if (all.v[threadIdx.x] > most && all.v[ROLES + threadIdx.x] <= a.ws.max_slots[threadIdx.x])
            atomicMin(&fault, ATTN_FAULT_ROWS); /* slots are enough, so units are not */
    }
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0)
        a.ws.lists->fault = fault == UINT32_MAX ? 0 : fault;
    __threadfence(); /* see attn_lists_of */
}
} // namespace

cudaError_t cuda_launch_plan(const cuda_plan_args &args, cudaStream_t stream)
{
    uint32_t shared_bytes = (args.max_seqs + 1) * (uint32_t)sizeof(uint32_t);
    plan_kernel<<<PLAN_BLOCKS, PLAN_THREADS, shared_bytes, stream>>>(args);
    return cudaGetLastError();
}
