/* attention_sm90_plan.cu - cuts a batch into items, on the device, once per step. One block.
 *
 *   1  every sequence is looked at: faults, totals by role
 *   2  which SMs work on what, and the size of a part, follow from the totals (rule_of)
 *   3  items and slots of every sequence are counted; a scan gives each its place in the lists
 *   4  items are written: a warp per sequence, a lane per block of packed rows
 *   5  launches of the graph are given their blocks, if the plan is in one
 *
 * Within a sequence items lie by KV head, then last rows first: blocks that run at the same time read the same keys, which
 * come from L2 then, and the longest items of a head begin first.
 */
#include "attention/attention_sm90.cuh"

namespace
{
constexpr uint32_t PLAN_THREADS = 1024;
constexpr uint32_t PLAN_WARPS = PLAN_THREADS / 32;
constexpr uint32_t MAX_PREFILL_PARTS = 16;
constexpr uint32_t MIN_PREFILL_TILES = 8; /* 512 keys */
constexpr uint32_t MIN_DECODE_TILES = 2;  /* a tile of 32 keys for each warp */
constexpr uint32_t UNIT_COST_TILES = 6;   /* start and end of a prefill item, in tiles of 64 keys */
constexpr uint32_t DECODE_WAVES = 6;      /* of parts, beside prefill, where these are long enough */
constexpr uint32_t LAST_WAVES = 8;        /* of the parts of the last decodes */
constexpr uint32_t MAX_LAST_PARTS = 8;    /* of a unit of theirs, where the others' are whole */
constexpr uint32_t LONG_PART_TILES = 16;
constexpr uint32_t WAVE_TILES = 28; /* of parts, where two to six waves of them can be had */
/* Decodes beside prefill come on by 7/10 of its tiles; alone tiles of both take as long. */
constexpr uint32_t PROGRESS = 7, PROGRESS_OF = 10;
/* So many times what comes on beside prefill: decodes are cut as if alone; are left alone. */
constexpr uint32_t MOSTLY = 4, NEARLY_ALL = 16;
/* Where prefill takes so many times what decodes do, they cost more beside it, by its narrower tiles, than behind it; unless neither
 * decodes are small nor prefill is long, in tiles: then decode's start behind it costs more. */
constexpr uint32_t HARDLY_ANY = 4, SMALL_DECODES = 4, LONG_PREFILL = 60;
/* What a step takes where prefill has some of the clusters for itself and decodes the other SMs, in tiles. Fitted to 206 batches, each
 * with seven or eight numbers of clusters (NOTES.md). */
constexpr float DECODE_RATE = 0.9f;  /* most of decodes' rate while prefill works */
constexpr float DECODE_BY_SHARE = 2; /* of that rate, by their share of the SMs */
constexpr float TILE_ALONE = 0.85f;  /* of prefill, without decodes */
constexpr float TILE_BESIDE = 0.2f;  /* more, beside decodes at their full rate */
constexpr float FUSED_DECODE = 0.4f; /* what a tile of decodes costs in the fused kernel, beside prefill's */
constexpr float FUSED_RATE = 0.72f;  /* tiles of decodes that come on there in one of prefill's */
/* Less gain is not worth it: where prefill leaves SMs in any case; where it would have more; and, of a long prefill's time, this part. */
constexpr float SHARE_GAIN = 2, SHARE_GAIN_CUT = 5, SHARE_GAIN_PART = 0.025f;
/* What a whole unit of decode costs beside its tiles, and a part twice. More where prefill is beside: its reads are waited for, too. */
constexpr uint32_t ENDS_ALONE = 1, ENDS_BESIDE = 2;
/* Of decodes, unless prefill is short and leaves SMs in any case: in smaller steps latencies count, which this does not know. */
constexpr uint32_t SHARE_MIN_TILES = 30, SHARE_MIN_SHORT = 5, SHORT_PREFILL_TILES = 12;
constexpr uint32_t SHORT_PART_TILES = 64; /* that a block may still be at when a short prefill has ended */

struct rule {
    uint32_t tiles[ROLES]; /* most of a part; 0: not cut */
    uint32_t last_tiles;   /* the same of decodes from sequence `last` on */
    uint32_t last;
    uint32_t kernels, clusters; /* see attn_lists; kernels where both roles have items */
};

struct totals {
    unsigned long long tiles[ROLES];
    unsigned long long last_tiles; /* of the last quarter's decodes */
    uint32_t units[ROLES];         /* of one KV head */
    uint32_t longest[ROLES];       /* tiles of a unit */
    uint32_t fault;
};

__device__ bool breaks_rule(const sm90_plan_args &a, const attn_seq &s)
{
    return s.rows == 0 || s.rows > a.max_seq_rows || s.kv_len < s.rows || s.kv_len > a.max_kv_len ||
           s.first_row >= a.max_rows || s.rows > a.max_rows - s.first_row;
}

__device__ uint32_t role_of(const sm90_plan_args &a, const attn_seq &s)
{
    return s.rows * a.group <= DECODE_ROWS ? ROLE_DECODE : ROLE_PREFILL;
}

__device__ uint32_t units_of(const sm90_plan_args &a, const attn_seq &s)
{
    return (s.rows * a.group + UNIT_ROWS - 1) / UNIT_ROWS;
}

/* Keys lo .. hi - 1 that the packed rows from `first` on see. */
__device__ void keys_of(const sm90_plan_args &a, const attn_seq &s, uint32_t first, uint32_t &lo, uint32_t &hi)
{
    uint32_t rows = s.rows * a.group, context = s.kv_len - s.rows;
    uint32_t last = (rows < first + UNIT_ROWS ? rows : first + UNIT_ROWS) - 1;
    uint32_t seen = context + first / a.group + 1;
    lo = a.window && seen > a.window ? seen - a.window : 0;
    hi = context + last / a.group + 1;
}

__device__ uint32_t tiles_of(uint32_t lo, uint32_t hi)
{
    return (hi - lo + TILE_KEYS - 1) / TILE_KEYS;
}

/* Parts of a unit are equal but for the last, and no more than `most`. */
__device__ uint32_t part_tiles(uint32_t tiles, uint32_t of_rule, uint32_t most)
{
    if (of_rule == 0 || tiles <= of_rule)
        return tiles;
    uint32_t parts = (tiles + of_rule - 1) / of_rule;
    parts = parts < most ? parts : most;
    return (tiles + parts - 1) / parts;
}

/* How decode is cut: the tiles of a part, those of the last sequences' parts, and what it costs, in tiles. */
struct decode_cut {
    uint32_t tiles, last_tiles;
    uint64_t cost;
};

/* Decodes alone, or few of them: the longest unit in as many parts as make the last block be done soonest, if all the work
 * were such units and blocks took parts in rounds. Slots are enough: a unit that is cut has fewer than 2 * tiles / (tiles of
 * a part) parts, all have fewer than twice the bounded number of items. */
__device__ decode_cut cut_decodes(uint64_t blocks, uint64_t tiles, uint32_t longest, uint32_t ends)
{
    decode_cut best = {longest, longest, UINT64_MAX};
    for (uint32_t k = 1; k <= MAX_DECODE_PARTS; k++) {
        uint32_t each = (longest + k - 1) / k;
        uint64_t items = (tiles + each - 1) / each;
        if (k > 1 && (each < MIN_DECODE_TILES || items > 4 * blocks))
            break;
        uint64_t cost = (items + blocks - 1) / blocks * (each + (k == 1 ? 1 : 2) * ends);
        if (cost < best.cost)
            best = {each, each, cost};
    }
    return best;
}

/* The same where prefill has some SMs for itself: `blocks` begin at once, `late` ones when it has ended, at `from`, in tiles. Whoever is
 * done takes the next item, so work is spread over all, and half of an item is the mean wait for the last one. What would be a second round of
 * whole units begins when prefill ends or the first one does. Units of the last sequences may be cut: short items at the end are what
 * levels it. Slots: two per unit of all. */
__device__ void cut_last_decodes(uint64_t blocks, uint64_t late, uint64_t from, uint64_t first_tiles,
                                 uint64_t last_tiles, uint32_t longest, decode_cut *best)
{
    const uint64_t unit = longest + ENDS_BESIDE, wait = late * from;
    if (best->tiles == longest)
        best->cost = UINT64_MAX; /* whole units, looked at again */
    for (uint32_t k = 1; k <= MAX_LAST_PARTS; k *= 2) {
        const uint32_t each = (longest + k - 1) / k;
        if (k > 1 && each < MIN_DECODE_TILES)
            break;
        const uint64_t whole = ((k > 1 ? 0 : last_tiles) + first_tiles) / longest;
        const uint64_t part = k > 1 ? each + 2 * ENDS_BESIDE : unit;
        const uint64_t parts = k > 1 ? (last_tiles + each - 1) / each : 0;
        const uint64_t ends = whole <= blocks ? unit : unit + (unit < from ? unit : from);
        uint64_t cost = (whole * unit + parts * part + wait) / (blocks + late) + part / 2;
        cost = cost > ends ? cost : ends;
        if (k == 1) {
            const uint64_t rounds = (whole + blocks - 1) / blocks * unit;
            cost = rounds < cost ? rounds : cost;
        }
        if (cost < best->cost)
            *best = {longest, each, cost};
    }
}

/* Decodes beside prefill: few as if alone, by one warpgroup per SM; else about a wave of parts, more where there is more to
 * balance. The last sequences are cut finer: a part takes long beside prefill, and whoever begins one when prefill ends lets
 * all others wait. */
__device__ void decode_tiles_beside(const sm90_plan_args &a, const totals &t, rule *r)
{
    const uint64_t decodes = (uint64_t)t.units[ROLE_DECODE] * a.kv_heads, wave = DECODE_BLOCKS_PER_SM * a.sms;
    const uint64_t tiles = t.tiles[ROLE_DECODE] * a.kv_heads;
    uint64_t waves = (4 * decodes + wave - 1) / wave;
    if (tiles < wave * LONG_PART_TILES) {
        r->tiles[ROLE_DECODE] = r->last_tiles = cut_decodes(a.sms, tiles, t.longest[ROLE_DECODE], ENDS_ALONE).tiles;
        return;
    }
    const uint64_t long_waves = tiles / (wave * WAVE_TILES);
    if (waves < DECODE_WAVES && waves < long_waves)
        waves = long_waves < DECODE_WAVES ? long_waves : DECODE_WAVES;
    uint64_t part = tiles / (waves * wave - decodes * (waves * wave > decodes)) + 1;
    uint64_t least = waves > 4 ? LONG_PART_TILES : MIN_DECODE_TILES;
    r->tiles[ROLE_DECODE] = (uint32_t)(part > least ? part : least);
    uint64_t last = t.last_tiles * a.kv_heads / (LAST_WAVES * wave) + 1;
    last = last > LONG_PART_TILES ? last : LONG_PART_TILES;
    r->last_tiles = last < r->tiles[ROLE_DECODE] ? (uint32_t)last : r->tiles[ROLE_DECODE];
}

/* How prefill is cut for so many clusters. */
struct prefill_cut {
    uint32_t parts; /* of a unit of mean length */
    uint32_t cost;  /* tiles */
};

/* As many parts per unit as make the waves of clusters cheapest. Slots are enough by construction (size_lists in
 * attention_sm90.cu): units are cut into few parts where there are many, and a sum of quotients rounded up is less than
 * the quotient of the sum and their number. */
__device__ prefill_cut cut_prefill(uint32_t units, uint32_t mean, uint32_t clusters)
{
    prefill_cut best = {1, UINT32_MAX};
    for (uint32_t s = 1;
         s <= MAX_PREFILL_PARTS && (s == 1 || (mean / s >= MIN_PREFILL_TILES && units * s <= 4 * clusters)); s++) {
        uint64_t waves = ((uint64_t)units * s + clusters - 1) / clusters;
        uint64_t cost = waves * ((mean + s - 1) / s + UNIT_COST_TILES + (s > 1 ? UNIT_COST_TILES : 0));
        if (cost < best.cost)
            best = {s, (uint32_t)cost};
    }
    return best;
}

/* Units that are about equally long count as the longest: a part more of a few would be a wave more. */
__device__ uint32_t mean_unit(const totals &t)
{
    const uint32_t mean = (uint32_t)(t.tiles[ROLE_PREFILL] / t.units[ROLE_PREFILL]) + 1,
                   longest = t.longest[ROLE_PREFILL];
    return longest <= mean + mean / 4 ? longest : mean;
}

/* Tiles until a step has ended whose prefill, of so many tiles on n of all clusters, leaves the other SMs to decodes. */
__device__ float shared_time(float prefill, float decode, float n, float all)
{
    const float by_share = DECODE_BY_SHARE * (1 - n / all), rate = by_share < DECODE_RATE ? by_share : DECODE_RATE;
    const float tile = TILE_ALONE + TILE_BESIDE * rate, both = prefill * tile;
    if (rate * both < decode)
        return both + decode - rate * both;
    return decode / rate + (prefill - decode / rate / tile) * TILE_ALONE;
}

/* The same of the fused kernel, and decode's behind it. */
__device__ float fused_time(float prefill, float decode)
{
    const float most = FUSED_RATE * prefill / (1 - FUSED_RATE * FUSED_DECODE); /* that can come on beside */
    return decode < most ? prefill + FUSED_DECODE * decode : prefill + FUSED_DECODE * most + decode - most;
}

/* All threads: on how many clusters prefill should be, in *best, UINT64_MAX before: n, and above it the time with the gain that is
 * asked for, in 1/16 of a tile. */
__device__ void look_for_share(const sm90_plan_args &a, const totals &t, unsigned long long *best)
{
    const uint32_t n = threadIdx.x + 1, clusters = a.sms / CLUSTER, units = t.units[ROLE_PREFILL] * a.kv_heads;
    const uint64_t decode = t.tiles[ROLE_DECODE] * a.kv_heads / a.sms;
    if (a.policy != ATTN_GPU_AUTO || a.fixed_tiles || units == 0 || n >= clusters)
        return;
    const prefill_cut cut = cut_prefill(units, mean_unit(t), n);
    const bool leaves = units * cut.parts <= n;
    if (decode < (leaves && cut.cost <= SHORT_PREFILL_TILES ? SHARE_MIN_SHORT : SHARE_MIN_TILES))
        return;
    const float time = shared_time((float)cut.cost, (float)decode, (float)n, (float)clusters);
    atomicMin(best, (unsigned long long)((time + (leaves ? SHARE_GAIN : SHARE_GAIN_CUT)) * 16) << 16 | n);
}

/* What is AUTO's alone: by which kernels, and on how many clusters prefill is. true: nearly all of decode is left when prefill has
 * ended. */
__device__ bool choose_kernels(const sm90_plan_args &a, const totals &t, unsigned long long share, uint32_t prefill,
                               rule *r)
{
    const uint64_t decode = t.tiles[ROLE_DECODE] * a.kv_heads / a.sms;
    r->kernels = RUN_FUSED;
    if (decode * PROGRESS_OF > (uint64_t)prefill * PROGRESS + PROGRESS_OF * HAND_OVER_TILES)
        r->kernels = RUN_FUSED | RUN_DECODE;
    bool mostly_alone = r->kernels & RUN_DECODE && decode * PROGRESS_OF > (uint64_t)MOSTLY * prefill * PROGRESS;
    if (r->kernels & RUN_DECODE && decode * PROGRESS_OF > (uint64_t)NEARLY_ALL * prefill * PROGRESS)
        r->kernels = RUN_PREFILL | RUN_DECODE;
    if (decode * HARDLY_ANY <= prefill && (decode <= SMALL_DECODES || prefill >= LONG_PREFILL)) {
        r->kernels = RUN_PREFILL | RUN_DECODE;
        mostly_alone = true;
    }
    const float gain = prefill > LONG_PREFILL ? SHARE_GAIN_PART * (float)prefill : 0;
    if (share != UINT64_MAX && (float)(share >> 16) / 16 + gain < fused_time((float)prefill, (float)decode)) {
        r->kernels = RUN_PREFILL | RUN_DECODE;
        r->clusters = (uint32_t)(share & 0xffff);
        mostly_alone = true;
    }
    return mostly_alone;
}

/* The kernels that a batch has work for. Decode's never stands alone: it leaves it to another to wait for what is in front. */
__device__ uint32_t kernels_of(const sm90_plan_args &a, const totals &t, const rule &r)
{
    if (a.policy == ATTN_GPU_FUSED)
        return RUN_FUSED;
    if (a.policy != ATTN_GPU_AUTO)
        return RUN_PREFILL | RUN_DECODE;
    const uint32_t decode = t.units[ROLE_DECODE] ? RUN_DECODE : 0;
    if (a.fixed_tiles)
        return RUN_FUSED | decode;
    return t.units[ROLE_PREFILL] && decode ? r.kernels : RUN_PREFILL | decode;
}

__device__ rule rule_of(const sm90_plan_args &a, const totals &t, unsigned long long share, uint32_t last)
{
    rule r = {};
    r.last = last;
    r.clusters = a.sms / CLUSTER;
    r.tiles[ROLE_DECODE] = r.last_tiles = a.fixed_tiles;
    if (a.fixed_tiles)
        return r;
    const uint32_t units = t.units[ROLE_PREFILL] * a.kv_heads;
    bool mostly_alone = a.policy == ATTN_GPU_SERIAL;
    uint32_t prefill = 0; /* tiles until it ends */
    if (units > 0) {
        const uint32_t mean = mean_unit(t);
        prefill_cut cut = cut_prefill(units, mean, r.clusters);
        if (a.policy == ATTN_GPU_AUTO) {
            mostly_alone = choose_kernels(a, t, share, cut.cost, &r);
            cut = cut_prefill(units, mean, r.clusters);
        }
        prefill = cut.cost;
        const uint64_t each = t.tiles[ROLE_PREFILL] * a.kv_heads / r.clusters;
        const uint32_t whole = mean + mean / 2 > each ? mean + mean / 2 : (uint32_t)each;
        r.tiles[ROLE_PREFILL] = cut.parts > 1 ? (mean + cut.parts - 1) / cut.parts : whole;
        if (r.tiles[ROLE_PREFILL] < MIN_PREFILL_TILES)
            r.tiles[ROLE_PREFILL] = MIN_PREFILL_TILES;
    }
    if (t.units[ROLE_DECODE] == 0)
        return r;
    /* Behind prefill blocks come one after the other, and a round of all of them would be two; beside it there are those of the SMs
     * that it leaves. */
    const bool at_once = units == 0 || a.policy == ATTN_GPU_SERIAL;
    const uint32_t on = at_once ? a.sms : a.sms - r.clusters * CLUSTER;
    const uint32_t blocks = on * DECODE_BLOCKS_PER_SM > a.sms ? on * DECODE_BLOCKS_PER_SM : a.sms;
    const bool beside = !at_once && blocks > a.sms;
    decode_cut cut = cut_decodes(blocks, t.tiles[ROLE_DECODE] * a.kv_heads, t.longest[ROLE_DECODE],
                                 beside ? ENDS_BESIDE : ENDS_ALONE);
    if (beside)
        cut_last_decodes(blocks, DECODE_BLOCKS_PER_SM * a.sms - blocks, prefill,
                         (t.tiles[ROLE_DECODE] - t.last_tiles) * a.kv_heads, t.last_tiles * a.kv_heads,
                         t.longest[ROLE_DECODE], &cut);
    if (at_once || (mostly_alone && cut.tiles <= SHORT_PART_TILES)) {
        r.tiles[ROLE_DECODE] = cut.tiles;
        r.last_tiles = cut.last_tiles;
    } else {
        decode_tiles_beside(a, t, &r);
    }
    return r;
}

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

__device__ void look(const sm90_plan_args &a, uint32_t seqs, uint32_t last, totals *t)
{
    for (uint32_t i = threadIdx.x; i < seqs; i += PLAN_THREADS) {
        const attn_seq s = a.seq[i];
        if (breaks_rule(a, s)) {
            atomicMin(&t->fault, i + 1);
            continue;
        }
        uint32_t role = role_of(a, s), n = role == ROLE_DECODE ? 1 : units_of(a, s), lo, hi;
        unsigned long long tiles = 0;
        for (uint32_t u = 0; u < n; u++) {
            keys_of(a, s, u * UNIT_ROWS, lo, hi);
            tiles += tiles_of(lo, hi);
            atomicMax(&t->longest[role], tiles_of(lo, hi));
        }
        atomicAdd(&t->tiles[role], tiles);
        atomicAdd(&t->units[role], n);
        if (role == ROLE_DECODE && i >= last)
            atomicAdd(&t->last_tiles, tiles);
    }
}

__device__ uint32_t rule_tiles(const rule &r, uint32_t role, uint32_t i)
{
    return role == ROLE_DECODE && i >= r.last ? r.last_tiles : r.tiles[role];
}

/* Items and slots of one KV head of sequence i, by a warp; each lane has every 32nd unit. */
__device__ void count(const sm90_plan_args &a, const rule &r, uint32_t i, const attn_seq &s, uint32_t lane,
                      uint32_t &items, uint32_t &slots)
{
    const uint32_t role = role_of(a, s), n = role == ROLE_DECODE ? 1 : units_of(a, s),
                   most_tiles = rule_tiles(r, role, i);
    const uint32_t most = role == ROLE_DECODE ? MAX_DECODE_PARTS : MAX_PREFILL_PARTS;
    items = slots = 0;
    for (uint32_t u = lane; u < n; u += 32) {
        uint32_t lo, hi;
        keys_of(a, s, u * UNIT_ROWS, lo, hi);
        uint32_t tiles = tiles_of(lo, hi), each = part_tiles(tiles, most_tiles, most);
        uint32_t parts = (tiles + each - 1) / each;
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

/* Writes the items of sequence i: KV head h from item + h * (items of a head) on. */
__device__ void write(const sm90_plan_args &a, const rule &r, uint32_t i, const attn_seq &s, uint32_t lane,
                      uint32_t items, uint32_t slots, uint32_t item, uint32_t slot)
{
    const uint32_t role = role_of(a, s), n = role == ROLE_DECODE ? 1 : units_of(a, s),
                   most_tiles = rule_tiles(r, role, i);
    const uint32_t most = role == ROLE_DECODE ? MAX_DECODE_PARTS : MAX_PREFILL_PARTS;
    for (uint32_t from = 0; from < n; from += 32) {
        uint32_t u = from + lane, lo = 0, hi = 0, each = 0, parts = 0;
        if (u < n) { /* the last rows, which see most, first */
            keys_of(a, s, (n - 1 - u) * UNIT_ROWS, lo, hi);
            each = part_tiles(tiles_of(lo, hi), most_tiles, most);
            parts = (tiles_of(lo, hi) + each - 1) / each;
        }
        uint32_t cut = parts > 1 ? parts : 0, my_item = item + warp_before(parts), my_slot = slot + warp_before(cut);
        for (uint32_t h = 0; h < a.kv_heads; h++)
            for (uint32_t p = 0; p < parts; p++) {
                uint32_t at = my_item + h * items + p;
                if (at >= a.ws.max_items[role])
                    break;
                attn_item it;
                it.s = s;
                it.seq = i;
                it.kv_head = h;
                it.first = (n - 1 - u) * UNIT_ROWS;
                it.key_begin = lo + p * each * TILE_KEYS;
                it.key_end = p + 1 < parts ? it.key_begin + each * TILE_KEYS : hi;
                it.part = p;
                it.parts = my_slot + h * slots + parts <= a.ws.max_slots[role] || cut == 0 ? parts : 0;
                it.slot = my_slot + h * slots;
                a.ws.items[role][at] = it;
            }
        item += warp_sum(parts);
        slot += warp_sum(cut);
    }
}

/* This thread's i-th run of the plan, of one for each thread; not from a cache. */
__device__ __forceinline__ sm90_graph_run run_of(const sm90_plan_args &a, uint32_t i)
{
    const sm90_graph_run *at = a.first_run + threadIdx.x + i * PLAN_THREADS;
    sm90_graph_run run = {};
    if (a.plan && at < a.end_runs) {
        static_assert(sizeof run == 2 * sizeof(ulonglong2), "read as two");
        ((ulonglong2 *)&run)[0] = __ldcv((const ulonglong2 *)at);
        ((ulonglong2 *)&run)[1] = __ldcv((const ulonglong2 *)at + 1);
    }
    return run;
}

/* All threads: launches of the graph get the blocks that they have work for; prefill's gets those of `items` items. Decode's, which sets
 * the counters back, has one at least. */
__device__ void size_launches(const sm90_plan_args &a, sm90_graph_run run, const rule &r, uint32_t kernels,
                              uint32_t items, uint32_t *fault)
{
    const uint32_t all = a.sms / CLUSTER, working = items < r.clusters ? items : r.clusters;
    const uint32_t blocks[RUN_NODES] = {
        kernels & RUN_FUSED ? all * CLUSTER : SM90_PASSING,
        kernels & RUN_PREFILL ? (working > 1 ? working : 2) * CLUSTER : SM90_PASSING,
        kernels & RUN_DECODE ? DECODE_BLOCKS_PER_SM * a.sms : 1,
    };
    for (uint32_t i = 1; run.plan == a.plan; i++) {
        for (uint32_t n = 0; n < RUN_NODES; n++)
            if (run.node[n] && cudaGraphKernelNodeSetGridDim(run.node[n], blocks[n]) != cudaSuccess)
                atomicMin(fault, ATTN_FAULT_GRAPH);
        run = run_of(a, i);
    }
}

__global__ void __launch_bounds__(PLAN_THREADS) plan_kernel(const __grid_constant__ sm90_plan_args a)
{
    __shared__ totals t;
    __shared__ unsigned long long share;
    const uint32_t given = *a.counts, seqs = given < a.max_seqs ? given : a.max_seqs;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const sm90_graph_run run = run_of(a, 0); /* on its way while the rest is done */
    if (threadIdx.x == 0) {
        t = {};
        share = UINT64_MAX;
        t.fault = given > a.max_seqs ? ATTN_FAULT_SEQS : UINT32_MAX;
    }
    __syncthreads();
    const uint32_t last = seqs - seqs / 4;
    look(a, seqs, last, &t);
    __syncthreads();
    look_for_share(a, t, &share);
    __syncthreads();
    const rule r = rule_of(a, t, share, last);
    const uint32_t kernels = kernels_of(a, t, r);
    for (uint32_t i = warp; i < seqs; i += PLAN_WARPS) {
        const attn_seq s = a.seq[i];
        uint32_t items = 0, slots = 0;
        bool bad = breaks_rule(a, s);
        if (!bad)
            count(a, r, i, s, lane, items, slots);
        items = warp_sum(items);
        slots = warp_sum(slots);
        if (lane < ROLES) {
            bool mine = !bad && role_of(a, s) == lane;
            a.ws.offsets[lane][i] = mine ? items * a.kv_heads : 0;
            a.ws.offsets[ROLES + lane][i] = mine ? slots * a.kv_heads : 0;
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
        if (breaks_rule(a, s))
            continue;
        uint32_t role = role_of(a, s), items, slots;
        count(a, r, i, s, lane, items, slots);
        write(a, r, i, s, lane, warp_sum(items), warp_sum(slots), a.ws.offsets[role][i], a.ws.offsets[ROLES + role][i]);
    }
    if (threadIdx.x < ROLES) {
        uint32_t n = all[threadIdx.x], most = a.ws.max_items[threadIdx.x];
        a.ws.lists->count[threadIdx.x] = n < most ? n : most;
        if (all[ROLES + threadIdx.x] > a.ws.max_slots[threadIdx.x])
            atomicMin(&t.fault, ATTN_FAULT_KV_TOKENS);
        else if (n > most) /* slots are enough, so units are not */
            atomicMin(&t.fault, ATTN_FAULT_ROWS);
    }
    if (a.plan)
        size_launches(a, run, r, kernels, all[ROLE_PREFILL], &t.fault);
    __syncthreads();
    if (threadIdx.x == 0) {
        a.ws.lists->kernels = (uint16_t)kernels;
        a.ws.lists->clusters = (uint16_t)r.clusters;
        a.ws.lists->fault = t.fault == UINT32_MAX ? 0 : t.fault;
    }
    __threadfence(); /* see attn_lists_of */
}
} // namespace

cudaError_t sm90_launch_plan(const sm90_plan_args &args, cudaStream_t stream)
{
    plan_kernel<<<1, PLAN_THREADS, 0, stream>>>(args);
    return cudaGetLastError();
}
