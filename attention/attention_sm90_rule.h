/* attention_sm90_rule.h - which launches are the fastest for a batch, which SMs work on what, and how large a part is: all from lengths.
 * attn_gpu_choose follows it on the host (sm90_way_of), the plan on the device (sm90_rule_of). Plain C for both, and for a test.
 * Work is counted in tiles of 64 keys; a unit is a block of 256 packed rows of prefill, or a decode, of one KV head. Prefix sm90_.
 */
#ifndef TANDEM_ATTENTION_SM90_RULE_H
#define TANDEM_ATTENTION_SM90_RULE_H

#include <stdbool.h>
#include <stdint.h>

#include "attention/attention.h"

#ifdef __CUDACC__
#define SM90_BOTH static __host__ __device__ inline
#else
#define SM90_BOTH static inline
#endif

/* As in attention_items.cuh and attention_sm90.cuh, which see to it. */
enum { SM90_PREFILL, SM90_DECODE, SM90_ROLES };
enum {
    SM90_TILE_KEYS = 64,
    SM90_CLUSTER = 2,      /* SMs that work on a prefill unit */
    SM90_UNIT_ROWS = 256,  /* packed, of prefill */
    SM90_DECODE_ROWS = 16, /* packed rows of a sequence that is decode's */
    SM90_DECODE_BLOCKS = 2 /* per SM, of decode's kernel */
};

enum {
    SM90_MAX_PREFILL_PARTS = 16,
    SM90_MAX_DECODE_PARTS = 64,
    SM90_MIN_PREFILL_TILES = 8, /* 512 keys */
    SM90_MIN_DECODE_TILES = 2,  /* a tile of 32 keys for each warp */
    SM90_UNIT_COST = 6,         /* start and end of a prefill item, in tiles */
    SM90_PREFILL_WAVES = 4,     /* of all clusters, that its parts may be at most */
    SM90_DECODE_WAVES = 6,      /* of parts, beside prefill, where these are long enough */
    SM90_LAST_WAVES = 8,        /* of the parts of the last decodes */
    SM90_MAX_LAST_PARTS = 8,    /* of a unit of theirs, where the others' are whole */
    SM90_LAST_PARTS = 4,        /* at least, of a unit of theirs, where it is long */
    SM90_SOON = 10,             /* tiles: a prefill that lets all SMs go before it matters */
    SM90_LONG_PART = 16,        /* tiles */
    SM90_TINY_PART = 3,         /* tiles */
    SM90_FINE_ROUNDS = 12,      /* of decode's blocks, that parts are, where four leave many of them idle */
    SM90_LEVEL_LEAST = 15,      /* half tiles of decodes for each block, from which on parts are level, */
    SM90_LEVEL_MOST = 32,       /* tiles up to which they are, */
    SM90_LEVEL_WHOLE = 160,     /* where units would be whole, of */
    SM90_WHOLE_MORE = 32,       /* more than so many tiles */
    SM90_WHOLE_MOST = 64,       /* and so many at most, */
    SM90_LEVEL_FEW = 2,         /* parts for each block, */
    SM90_LEVEL_MANY = 4,        /* and of whole units, */
    SM90_LEVEL_PART_LEAST = 8,  /* and of a part */
    SM90_WAVE_TILES = 28,       /* of parts, where two to six waves of them can be had */
    SM90_SHORT_PART = 64,       /* tiles that a block may still be at when a short prefill has ended */
    /* What a whole unit of decode costs beside its tiles, and a part twice. More where prefill is beside: its reads are waited for, too. */
    SM90_ENDS_ALONE = 1,
    SM90_ENDS_BESIDE = 2,
    SM90_LONG_PREFILL = 60, /* tiles */
    /* Less decodes than this are not worth that prefill waits for SMs of theirs, in tiles of one SM. */
    SM90_SHARE_MIN = 30,
    SM90_NARROW = 64,      /* head dimension: kernels of their own */
    SM90_BOX = 64,         /* head dimension that boxes of K and V come in */
    SM90_SHORT = 16,       /* tiles of prefill */
    SM90_SHORT_BELOW = 24, /* the same where heads are below a box */
    /* sm90_serial_anyway: rounds of decode's blocks are full where they take 4/3 of what all SMs would take at best. */
    SM90_FULL = 4,
    SM90_FULL_OF = 3,
    SM90_ONE_TILE = 7,      /* an item of prefill of a tile, with its ends */
    SM90_ONE_CLUSTERS = 32, /* so many of them, half as many of narrow heads, and of decodes so many times the tiles */
    SM90_ONE_TIMES = 4,
    /* Prefill that is brief, in tiles (five, and an item's ends), and decodes so many times (or tenths) of it, by the head dimension. Where
     * heads are below a box, decodes beside a prefill of fewer tiles are else in the fused kernel. */
    SM90_BRIEF = 11,
    SM90_BRIEF_DIM = 80,
    SM90_BRIEF_TIMES = 3,
    SM90_BRIEFEST = 8,
    SM90_BRIEFEST_TENTHS = 18,
    SM90_BRIEF_WIDE = 9,
    SM90_WIDE_DIM = 112,
    SM90_BRIEF_MOST = 5,
    SM90_THIN_DIM = 32, /* up to here beside any prefill */
    SM90_THIN_TENTHS = 26,
    /* Long prefill with few decodes, a fourth of it in tiles. */
    SM90_FEW_LEAST = 70,
    SM90_FEW_MOST = 300,
    SM90_FEW_PART = 4,
    SM90_SMALL = 8,         /* tiles of prefill: no more of decodes are apart where heads are wide */
    SM90_MUCH = 2,          /* so many times prefill's tiles, */
    SM90_MUCH_BENT = 7,     /* where scores are bent, */
    SM90_MUCH_SHORT = 500,  /* or so many where that is short: twice the most that was measured */
    SM90_BENT_PREFILL = 28, /* tiles, from which on either is worth the fused kernel where scores are bent */
    SM90_BENT_DECODE = 24,
    SM90_BENT_LONG = 44, /* but from here on decodes must be half of it */
    SM90_BENT_PART = 2
};

/* What a step takes where prefill has some of the clusters for itself and decodes the other SMs, in tiles. Fitted to 64 batches of
 * POD-Attention's sweep, each with seven numbers of clusters (NOTES.md, attention_h200_level.txt). */
#define SM90_SHARE_HALF   0.27f /* of the SMs: decodes there have 0.635 of the rate that they have on all, 1.27 / 2 */
#define SM90_SHARE_MOST   3     /* times its share of that rate is the most that an SM does */
#define SM90_DECODE_RATE  0.84f /* and this the most of it while prefill works */
#define SM90_TILE         0.86f /* of prefill */
#define SM90_FUSED_DECODE 0.42f /* what a tile of decodes costs in the fused kernel, beside prefill's */
#define SM90_FUSED_RATE   0.52f /* tiles of decodes that come on there in one of prefill's */
#define SM90_FUSED_ALONE  1.07f /* what one costs there when prefill has ended */
/* Less gain is not worth it: where prefill leaves SMs in any case; where it would have more; and, of a long prefill's time without a window,
 * this part. */
#define SM90_GAIN      2
#define SM90_GAIN_CUT  5
#define SM90_GAIN_PART 0.05f
#define SM90_RISK      1.08f /* times what prefill takes, as it may */

/* What a rule depends on beside the sequences. */
struct sm90_shape {
    uint32_t group, kv_heads, head_dim, window;
    bool bent; /* scores are, by a soft cap (or a scale that is not positive) */
    uint32_t sms;
    uint32_t fixed_tiles; /* 0: parts by the batch */
    uint32_t max_rows, max_seq_rows, max_kv_len;
    enum attn_gpu_policy policy;
    enum attn_gpu_way way; /* of AUTO */
    bool prefill_only;     /* there is no launch for decodes: all is prefill's */
};

struct sm90_totals {
    unsigned long long tiles[SM90_ROLES];
    unsigned long long last_tiles; /* of the last quarter's decodes */
    uint32_t units[SM90_ROLES];    /* of one KV head */
    uint32_t longest[SM90_ROLES];  /* tiles of a unit */
};

struct sm90_rule {
    uint32_t tiles[SM90_ROLES]; /* most of a part; 0: not cut */
    uint32_t last_tiles;        /* the same of decodes from sequence `last` on */
    uint32_t last;
    uint32_t clusters; /* that work on prefill, where it has a kernel of its own */
};

/* ---- a sequence ---- */

SM90_BOTH bool sm90_breaks_rule(const struct sm90_shape *a, const struct attn_seq *s)
{
    return s->rows == 0 || s->rows > a->max_seq_rows || s->kv_len < s->rows || s->kv_len > a->max_kv_len ||
           s->first_row >= a->max_rows || s->rows > a->max_rows - s->first_row;
}

SM90_BOTH uint32_t sm90_role_of(const struct sm90_shape *a, const struct attn_seq *s)
{
    return s->rows * a->group <= SM90_DECODE_ROWS && !a->prefill_only ? SM90_DECODE : SM90_PREFILL;
}

/* Of one KV head. */
SM90_BOTH uint32_t sm90_units_of(const struct sm90_shape *a, const struct attn_seq *s)
{
    return sm90_role_of(a, s) == SM90_DECODE ? 1 : (s->rows * a->group + SM90_UNIT_ROWS - 1) / SM90_UNIT_ROWS;
}

/* Keys *lo .. *hi - 1 that the packed rows of a unit see, of which `first` is the first. */
SM90_BOTH void sm90_keys_of(const struct sm90_shape *a, const struct attn_seq *s, uint32_t first, uint32_t *lo,
                            uint32_t *hi)
{
    const uint32_t rows = s->rows * a->group, context = s->kv_len - s->rows;
    const uint32_t last = (rows < first + SM90_UNIT_ROWS ? rows : first + SM90_UNIT_ROWS) - 1;
    const uint32_t seen = context + first / a->group + 1;
    *lo = a->window && seen > a->window ? seen - a->window : 0;
    *hi = context + last / a->group + 1;
}

SM90_BOTH uint32_t sm90_tiles_of(uint32_t lo, uint32_t hi)
{
    return (hi - lo + SM90_TILE_KEYS - 1) / SM90_TILE_KEYS;
}

/* What a sequence adds to totals. */
struct sm90_work {
    uint32_t role, units, longest;
    unsigned long long tiles;
};

SM90_BOTH struct sm90_work sm90_work_of(const struct sm90_shape *a, const struct attn_seq *s)
{
    struct sm90_work w = {sm90_role_of(a, s), sm90_units_of(a, s), 0, 0};
    for (uint32_t u = 0; u < w.units; u++) {
        uint32_t lo, hi;
        sm90_keys_of(a, s, u * SM90_UNIT_ROWS, &lo, &hi);
        const uint32_t tiles = sm90_tiles_of(lo, hi);
        w.tiles += tiles;
        w.longest = tiles > w.longest ? tiles : w.longest;
    }
    return w;
}

/* Tiles of a part, of a unit of so many: parts are equal but for the last, and no more than the most of the role. */
SM90_BOTH uint32_t sm90_part_tiles(const struct sm90_rule *r, uint32_t role, uint32_t seq, uint32_t tiles)
{
    const uint32_t most = role == SM90_DECODE ? SM90_MAX_DECODE_PARTS : SM90_MAX_PREFILL_PARTS;
    const uint32_t of_rule = role == SM90_DECODE && seq >= r->last ? r->last_tiles : r->tiles[role];
    if (of_rule == 0 || tiles <= of_rule)
        return tiles;
    uint32_t parts = (tiles + of_rule - 1) / of_rule;
    parts = parts < most ? parts : most;
    return (tiles + parts - 1) / parts;
}

/* ---- decodes ---- */

/* How they are cut: the tiles of a part, those of the last sequences' parts, and what it costs, in tiles. */
struct sm90_decode_cut {
    uint32_t tiles, last_tiles;
    uint64_t cost;
};

/* Decodes alone, or few of them: the longest unit in as many parts as make the last block be done soonest, if all the work
 * were such units and blocks took parts in rounds. Parts are counted where units are equally long: a few more than blocks are a round more.
 * at_once: so do all blocks begin. Then tiny parts that fill all of them cost a tile more: the next launch finds no room (attention_h200_decodes.txt).
 * Slots are enough: a unit that is cut has fewer than 2 * tiles / (tiles of a part) parts, all have fewer than twice the bounded number of
 * items. */
SM90_BOTH struct sm90_decode_cut sm90_cut_decodes(uint64_t blocks, uint64_t units, uint64_t tiles, uint32_t longest,
                                                  uint32_t ends, bool at_once)
{
    struct sm90_decode_cut best = {longest, longest, UINT64_MAX};
    const bool equal = 16 * tiles >= 15 * units * longest;
    for (uint32_t k = 1; k <= SM90_MAX_DECODE_PARTS; k++) {
        const uint32_t each = (longest + k - 1) / k;
        const uint64_t items = equal ? units * ((longest + each - 1) / each) : (tiles + each - 1) / each;
        if (k > 1 && (each < SM90_MIN_DECODE_TILES || items > 4 * blocks))
            break;
        const uint64_t full = at_once && each <= SM90_TINY_PART && items <= blocks && 4 * items > 3 * blocks;
        const uint64_t cost = (items + blocks - 1) / blocks * (each + (k == 1 ? 1 : 2) * ends) + full;
        if (cost < best.cost) {
            best.tiles = best.last_tiles = each;
            best.cost = cost;
        }
    }
    return best;
}

/* Decodes that have all blocks, equal ones: where the best cut above is one round and a part of one, or an eighth to two thirds of a last one, too
 * few blocks read for long, and more rounds of long parts are better. Where the last one is fuller memory is busy, and where it is emptier
 * soon over (attention_h200_balanced.txt, leases AF and AG). Slots are enough: units are equal, so items are what they are counted as. */
SM90_BOTH void sm90_cut_finer(uint64_t blocks, uint64_t units, uint64_t tiles, uint32_t longest,
                              struct sm90_decode_cut *cut)
{
    const uint64_t items = units * ((longest + cut->tiles - 1) / cut->tiles), last = items % blocks;
    const bool idle = items < 2 * blocks || (8 * last >= blocks && 3 * last < 2 * blocks);
    if (!idle || 16 * tiles < 15 * units * longest)
        return;
    for (uint32_t k = 2; k <= SM90_MAX_DECODE_PARTS; k++) {
        const uint32_t each = (longest + k - 1) / k;
        const uint64_t finer = units * ((longest + each - 1) / each);
        if (each < SM90_LONG_PART || finer > SM90_FINE_ROUNDS * blocks)
            break;
        const uint64_t cost = (finer + blocks - 1) / blocks * (each + 2 * SM90_ENDS_ALONE);
        if (cost < cut->cost) {
            cut->tiles = cut->last_tiles = each;
            cut->cost = cost;
        }
    }
}

/* The same where prefill has some SMs for itself: `blocks` begin at once, `late` ones when it has ended, at `from`, in tiles. Whoever is
 * done takes the next item, so work is spread over all, and half of an item is the mean wait for the last one. What would be a second round of
 * whole units begins when prefill ends or the first one does. Units of the last sequences may be cut: short items at the end are what
 * levels it, and of long units they are worth more than this says where prefill is over by one and a half of the first ones: late blocks take all
 * that is left, on their SMs alone. But long items that fill rounds of all blocks (15/16 of the last one), most of which are there at once (3/4) and
 * the others soon, need none. Slots: two and a half per unit of all at most. */
SM90_BOTH void sm90_cut_last_decodes(uint64_t blocks, uint64_t late, uint64_t from, uint64_t first_tiles,
                                     uint64_t last_tiles, uint32_t longest, struct sm90_decode_cut *best)
{
    const uint64_t unit = longest + SM90_ENDS_BESIDE, wait = late * from;
    if (best->tiles == longest)
        best->cost = UINT64_MAX; /* whole units, looked at again */
    for (uint32_t k = 1; k <= SM90_MAX_LAST_PARTS; k *= 2) {
        const uint32_t each = (longest + k - 1) / k;
        if (k > 1 && each < SM90_MIN_DECODE_TILES)
            break;
        const uint64_t whole = ((k > 1 ? 0 : last_tiles) + first_tiles) / longest;
        const uint64_t part = k > 1 ? each + 2 * SM90_ENDS_BESIDE : unit;
        const uint64_t parts = k > 1 ? (last_tiles + each - 1) / each : 0;
        const uint64_t ends = whole <= blocks ? unit : unit + (unit < from ? unit : from);
        uint64_t cost = (whole * unit + parts * part + wait) / (blocks + late) + part / 2;
        cost = cost > ends ? cost : ends;
        if (k == 1) {
            const uint64_t rounds = (whole + blocks - 1) / blocks * unit;
            cost = rounds < cost ? rounds : cost;
        }
        if (cost < best->cost) {
            best->tiles = longest;
            best->last_tiles = each;
            best->cost = cost;
        }
    }
    if (longest < SM90_LONG_PART || 2 * best->tiles < longest)
        return;
    const uint64_t all = blocks + late, items = (first_tiles + last_tiles) / best->tiles,
                   rounds = (items + all - 1) / all;
    const uint32_t level = (longest + SM90_LAST_PARTS - 1) / SM90_LAST_PARTS;
    if (from < SM90_SOON && 4 * blocks >= 3 * all && 16 * items >= 15 * rounds * all)
        best->last_tiles = best->tiles;
    else if (2 * from < 3 * unit && best->last_tiles > level)
        best->last_tiles = level;
}

/* Beside prefill, where each of all blocks, early and late, has 7.5 to 32 tiles to do: equal parts, about two for each block and of 8 tiles at
 * least, so that whoever is free takes the next one. A part more costs half a tile, much less than it costs where a block has fewer
 * (SM90_ENDS_BESIDE), and how many units there are does not matter; but whole units that are a round are faster still. Where blocks have more,
 * below 160 tiles, and units of 33 to 64 would be whole to the last, parts of a fourth of that and 16 tiles at least. As far as it was measured
 * (attention_h200_level.txt): heads of 128, no cap, no window. Returns the tiles of a part; 0: cut by the other rules. */
SM90_BOTH uint32_t sm90_cut_level(const struct sm90_shape *a, const struct sm90_totals *t, bool whole)
{
    const uint64_t all = SM90_DECODE_BLOCKS * a->sms, units = (uint64_t)t->units[SM90_DECODE] * a->kv_heads,
                   tiles = t->tiles[SM90_DECODE] * a->kv_heads, most = whole ? SM90_LEVEL_WHOLE : SM90_LEVEL_MOST;
    if (a->head_dim != 2 * SM90_BOX || a->bent || a->window || 2 * tiles < SM90_LEVEL_LEAST * all ||
        tiles >= most * all)
        return 0;
    const bool few = tiles < SM90_LEVEL_MOST * all, equal = 16 * tiles >= 15 * units * t->longest[SM90_DECODE];
    if (few && equal && units <= all && 16 * units >= 15 * all)
        return 0;
    const uint64_t parts = (few ? SM90_LEVEL_FEW : SM90_LEVEL_MANY) * all, part = (tiles + parts - 1) / parts,
                   least = few ? SM90_LEVEL_PART_LEAST : 2 * SM90_LEVEL_PART_LEAST;
    return (uint32_t)(part > least ? part : least);
}

/* Beside prefill: few as if alone, by one warpgroup per SM; else about a wave of parts, more where there is more to balance. The last
 * sequences are cut finer: a part takes long beside prefill, and whoever begins one when prefill ends lets all others wait. */
SM90_BOTH void sm90_cut_beside(const struct sm90_shape *a, const struct sm90_totals *t, struct sm90_rule *r)
{
    const uint64_t decodes = (uint64_t)t->units[SM90_DECODE] * a->kv_heads,
                   wave = (uint64_t)SM90_DECODE_BLOCKS * a->sms;
    const uint64_t tiles = t->tiles[SM90_DECODE] * a->kv_heads;
    uint64_t waves = (4 * decodes + wave - 1) / wave;
    if (tiles < wave * SM90_LONG_PART) {
        r->last_tiles = sm90_cut_decodes(a->sms, decodes, tiles, t->longest[SM90_DECODE], SM90_ENDS_ALONE, false).tiles;
        r->tiles[SM90_DECODE] = r->last_tiles;
        return;
    }
    const uint64_t long_waves = tiles / (wave * SM90_WAVE_TILES);
    if (waves < SM90_DECODE_WAVES && waves < long_waves) {
        waves = SM90_DECODE_WAVES;
        waves = long_waves < waves ? long_waves : waves;
    }
    const uint64_t part = tiles / (waves * wave - decodes * (waves * wave > decodes)) + 1;
    const uint64_t long_part = SM90_LONG_PART, least = waves > 4 ? long_part : (uint64_t)SM90_MIN_DECODE_TILES;
    r->tiles[SM90_DECODE] = (uint32_t)(part > least ? part : least);
    uint64_t last = t->last_tiles * a->kv_heads / (SM90_LAST_WAVES * wave) + 1;
    last = last > long_part ? last : long_part;
    r->last_tiles = last < r->tiles[SM90_DECODE] ? (uint32_t)last : r->tiles[SM90_DECODE];
}

/* ---- prefill ---- */

/* How it is cut for so many clusters. */
struct sm90_prefill_cut {
    uint32_t parts; /* of a unit of mean length */
    uint32_t cost;  /* tiles */
};

/* As many parts per unit as make the waves of clusters cheapest. Slots are enough by construction (sm90_slots): units are cut into few
 * parts where there are many, and a sum of quotients rounded up is less than the quotient of the sum and their number. */
SM90_BOTH struct sm90_prefill_cut sm90_cut_prefill(const struct sm90_shape *a, uint32_t units, uint32_t mean,
                                                   uint32_t clusters)
{
    const uint32_t most = SM90_PREFILL_WAVES * (a->sms / SM90_CLUSTER);
    struct sm90_prefill_cut best = {1, UINT32_MAX};
    for (uint32_t s = 1;
         s <= SM90_MAX_PREFILL_PARTS && (s == 1 || (mean / s >= SM90_MIN_PREFILL_TILES && units * s <= most)); s++) {
        const uint64_t waves = ((uint64_t)units * s + clusters - 1) / clusters;
        const uint64_t cost = waves * ((mean + s - 1) / s + SM90_UNIT_COST + (s > 1 ? SM90_UNIT_COST : 0));
        if (cost < best.cost) {
            best.parts = s;
            best.cost = (uint32_t)cost;
        }
    }
    return best;
}

/* Units that are about equally long count as the longest: a part more of a few would be a wave more. */
SM90_BOTH uint32_t sm90_mean_unit(const struct sm90_totals *t)
{
    const uint32_t mean = (uint32_t)(t->tiles[SM90_PREFILL] / t->units[SM90_PREFILL]) + 1;
    const uint32_t longest = t->longest[SM90_PREFILL];
    return longest <= mean + mean / 4 ? longest : mean;
}

/* ---- both ---- */

/* Decodes' tiles for each SM. */
SM90_BOTH uint64_t sm90_decode_load(const struct sm90_shape *a, const struct sm90_totals *t)
{
    return t->tiles[SM90_DECODE] * a->kv_heads / a->sms;
}

/* Tiles until a step has ended whose prefill, of so many tiles on n of all clusters, leaves the other SMs to decodes. */
SM90_BOTH float sm90_shared_time(float prefill, float decode, float n, float all)
{
    const float share = 1 - n / all, by_share = share * (1 + SM90_SHARE_HALF) / (share + SM90_SHARE_HALF);
    float rate = SM90_SHARE_MOST * share < SM90_DECODE_RATE ? SM90_SHARE_MOST * share : SM90_DECODE_RATE;
    rate = by_share < rate ? by_share : rate;
    const float both = prefill * SM90_TILE;
    return rate * both < decode ? both + decode - rate * both : both;
}

/* The same of the fused kernel, where a tile of decodes costs so much when prefill has ended. */
SM90_BOTH float sm90_fused_time(float prefill, float decode, float alone)
{
    const float most =
        SM90_FUSED_RATE * prefill / (1 - SM90_FUSED_RATE * SM90_FUSED_DECODE); /* that can come on beside */
    const float beside = decode < most ? decode : most;
    return prefill + SM90_FUSED_DECODE * beside + alone * (decode - beside);
}

/* Heads fill boxes of K and V. Where they do not, decodes in a launch of their own are the portable kernel's, which reads no padding, but
 * under a fixed cut (launch_decode); those of the fused kernel come in whole boxes. */
SM90_BOTH bool sm90_fills(uint32_t head_dim)
{
    return head_dim % SM90_BOX == 0;
}

/* Prefill on n of the clusters. */
struct sm90_on {
    float time;    /* until the step has ended, with the gain that is asked for */
    float prefill; /* until prefill has ended */
    bool leaves;   /* SMs by itself */
};

SM90_BOTH struct sm90_on sm90_on_clusters(const struct sm90_shape *a, const struct sm90_totals *t, uint32_t n)
{
    const uint32_t units = t->units[SM90_PREFILL] * a->kv_heads;
    const struct sm90_prefill_cut cut = sm90_cut_prefill(a, units, sm90_mean_unit(t), n);
    struct sm90_on on = {0, SM90_TILE * (float)cut.cost, units * cut.parts <= n};
    on.time =
        sm90_shared_time((float)cut.cost, (float)sm90_decode_load(a, t), (float)n, (float)(a->sms / SM90_CLUSTER)) +
        (on.leaves ? SM90_GAIN : SM90_GAIN_CUT);
    return on;
}

/* How good n clusters are for prefill: the time, in 1/16 of a tile, and n in the low 16 bits; UINT64_MAX where it cannot be or is not worth
 * a look. The least over all n is what `share` stands for below. Where decodes take longer than prefill would on all clusters, one that ends
 * with the step lets all wait when it takes longer than was thought, one that ends before does not: SM90_RISK (not measured where heads do
 * not fill boxes). */
SM90_BOTH unsigned long long sm90_share_of(const struct sm90_shape *a, const struct sm90_totals *t, uint32_t n)
{
    if (a->policy != ATTN_GPU_AUTO || a->fixed_tiles || t->units[SM90_PREFILL] == 0 || t->units[SM90_DECODE] == 0 ||
        n == 0 || n >= a->sms / SM90_CLUSTER)
        return UINT64_MAX;
    const struct sm90_on on = sm90_on_clusters(a, t, n);
    if (!on.leaves && sm90_decode_load(a, t) < SM90_SHARE_MIN)
        return UINT64_MAX;
    float time = on.time;
    if (sm90_fills(a->head_dim) && SM90_RISK * on.prefill > time &&
        (float)sm90_decode_load(a, t) > sm90_on_clusters(a, t, a->sms / SM90_CLUSTER).prefill)
        time = SM90_RISK * on.prefill;
    return (unsigned long long)(time * 16) << 16 | n;
}

/* Tiles until a step has ended with a kernel for each role, and on how many clusters prefill is then: on those of the share, or on all with
 * decodes behind it. With prefill's units alone there are none to share with. */
SM90_BOTH float sm90_apart_time(const struct sm90_shape *a, const struct sm90_totals *t, unsigned long long share,
                                uint32_t *clusters)
{
    const uint32_t n = (uint32_t)(share & 0xffff);
    *clusters = a->sms / SM90_CLUSTER;
    if (t->units[SM90_PREFILL] == 0)
        return (float)sm90_decode_load(a, t);
    const float in_turn = sm90_on_clusters(a, t, *clusters).prefill + (float)sm90_decode_load(a, t);
    if (share == UINT64_MAX)
        return in_turn;
    const float time = sm90_on_clusters(a, t, n).time;
    if (time >= in_turn)
        return in_turn;
    *clusters = n;
    return time;
}

/* Whether there is a batch for which sm90_serial_anyway is. */
SM90_BOTH bool sm90_may_be_serial(const struct sm90_shape *a)
{
    return (!a->bent || a->head_dim <= SM90_NARROW) && (a->group == 1 || (!a->bent && !sm90_fills(a->head_dim)));
}

SM90_BOTH bool sm90_is_long_with_few(uint64_t prefill, uint64_t decode)
{
    return prefill >= SM90_FEW_LEAST && prefill <= SM90_FEW_MOST && SM90_FEW_PART * decode <= prefill;
}

/* Where the serial pair has been the fastest, by tiles of prefill and of decodes (attention_h200_serial.txt). Its decodes have all SMs, if
 * late: so they must fill the rounds of their blocks, two per SM. Then, where each query head has a KV head, beside a tile's prefill on
 * many clusters, whole units that are a round; and, of heads that do not fill boxes, whose decodes in a launch of their own are the
 * portable kernel's and come on badly beside prefill, brief prefill with many decodes, and long prefill with few. */
SM90_BOTH bool sm90_serial_anyway(const struct sm90_shape *a, const struct sm90_totals *t, uint64_t prefill)
{
    const uint32_t dim = a->head_dim, blocks = SM90_DECODE_BLOCKS * a->sms, longest = t->longest[SM90_DECODE],
                   clusters = t->units[SM90_PREFILL] * a->kv_heads;
    const uint64_t decode = sm90_decode_load(a, t), units = (uint64_t)t->units[SM90_DECODE] * a->kv_heads;
    if (!sm90_may_be_serial(a))
        return false;
    const struct sm90_decode_cut cut =
        sm90_cut_decodes(blocks, units, t->tiles[SM90_DECODE] * a->kv_heads, longest, SM90_ENDS_ALONE, true);
    if (SM90_FULL_OF * SM90_DECODE_BLOCKS * cut.cost > SM90_FULL * decode)
        return false;
    if (a->group == 1 && prefill <= SM90_ONE_TILE &&
        clusters >= (dim <= SM90_NARROW ? SM90_ONE_CLUSTERS / 2 : SM90_ONE_CLUSTERS) && units <= blocks &&
        cut.tiles == longest && decode >= SM90_ONE_TIMES * prefill)
        return true;
    if (a->bent || sm90_fills(dim))
        return false;
    if (dim <= SM90_THIN_DIM)
        return 10 * decode >= SM90_THIN_TENTHS * prefill || sm90_is_long_with_few(prefill, decode);
    if (dim < SM90_BOX)
        return prefill <= SM90_BRIEF && 10 * decode >= SM90_THIN_TENTHS * prefill;
    const bool brief = dim <= SM90_BRIEF_DIM
                           ? prefill <= SM90_BRIEF && SM90_BRIEF_TIMES * prefill <= decode
                           : dim <= SM90_WIDE_DIM && prefill <= SM90_BRIEF_WIDE &&
                                 SM90_BRIEF_TIMES * prefill <= decode && decode <= SM90_BRIEF_MOST * prefill;
    const bool briefest =
        dim <= SM90_BRIEF_DIM && prefill <= SM90_BRIEFEST && 10 * decode >= SM90_BRIEFEST_TENTHS * prefill;
    return brief || briefest || sm90_is_long_with_few(prefill, decode);
}

/* Heads of 64, what is left of narrower ones, and bent scores: a tile of prefill takes longer there beside one of decodes than by the times
 * above, which are those of D 128 without, so the fused kernel wins but where there is much to read, or hardly anything to do, or, of bent
 * ones, little to read beside a long prefill (attention_h200_shapes.txt, attention_h200_sums.txt). */
SM90_BOTH bool sm90_fused_anyway(const struct sm90_shape *a, uint64_t prefill, uint64_t decode)
{
    const uint64_t much = (a->bent ? SM90_MUCH_BENT : SM90_MUCH) * prefill;
    if ((a->head_dim > SM90_NARROW && !a->bent) || decode > (prefill >= SM90_SHORT ? much : (uint64_t)SM90_MUCH_SHORT))
        return false;
    return a->head_dim <= SM90_NARROW || prefill >= SM90_BENT_PREFILL || decode >= SM90_BENT_DECODE;
}

/* Whatever the times say, apart: wide heads with hardly anything to do; bent scores with few decodes beside a long prefill; heads that do
 * not fill boxes where decodes can begin beside prefill and take longer than it, or it is short; but below D 64 not beside the shortest,
 * where the fused kernel mostly ends sooner, unless there is less of decodes and prefill has more than a tile or two
 * (attention_h200_narrow.txt, _serial.txt). */
SM90_BOTH bool sm90_apart_anyway(const struct sm90_shape *a, uint64_t prefill, uint64_t decode, uint32_t clusters)
{
    const bool below = a->head_dim < SM90_BOX;
    if (a->head_dim > SM90_NARROW && prefill <= SM90_SMALL && decode <= prefill)
        return true;
    if (a->bent)
        return prefill >= SM90_BENT_LONG && SM90_BENT_PART * decode < prefill;
    if (sm90_fills(a->head_dim) || (below && prefill < SM90_BRIEF && (prefill <= SM90_SMALL || decode > prefill)))
        return false;
    const uint32_t few = below ? SM90_SHORT_BELOW : SM90_SHORT;
    return clusters < a->sms / SM90_CLUSTER && (decode > prefill || prefill < few);
}

/* The portable kernel's decodes, half of prefill and more, would have less than a third of the SMs. */
SM90_BOTH bool sm90_too_few_left(const struct sm90_shape *a, uint64_t prefill, uint64_t decode, uint32_t clusters)
{
    const uint32_t all = a->sms / SM90_CLUSTER;
    return !sm90_fills(a->head_dim) && !a->bent && clusters < all && 3 * clusters > 2 * all && 2 * decode > prefill;
}

/* Which launches are the fastest for a batch. */
SM90_BOTH enum attn_gpu_way sm90_way_of(const struct sm90_shape *a, const struct sm90_totals *t,
                                        unsigned long long share)
{
    const uint64_t decode = sm90_decode_load(a, t);
    if (t->units[SM90_PREFILL] == 0 || t->units[SM90_DECODE] == 0)
        return ATTN_WAY_APART;
    const uint64_t prefill =
        sm90_cut_prefill(a, t->units[SM90_PREFILL] * a->kv_heads, sm90_mean_unit(t), a->sms / SM90_CLUSTER).cost;
    uint32_t clusters;
    const float apart = sm90_apart_time(a, t, share, &clusters);
    if (sm90_serial_anyway(a, t, prefill))
        return ATTN_WAY_SERIAL;
    if (sm90_apart_anyway(a, prefill, decode, clusters))
        return ATTN_WAY_APART;
    if (sm90_fused_anyway(a, prefill, decode) || sm90_too_few_left(a, prefill, decode, clusters))
        return ATTN_WAY_FUSED;
    /* Beside a brief prefill few units are no handicap of the fused kernel (512 of 512 with 8 x 4K, attention_h200_level.txt). */
    const bool few = prefill <= SM90_BRIEF && decode <= SM90_BRIEF_TIMES * prefill &&
                     16ull * t->units[SM90_DECODE] * a->kv_heads < 15ull * SM90_DECODE_BLOCKS * a->sms;
    const float fused = sm90_fused_time((float)prefill, (float)decode, few ? 1 : SM90_FUSED_ALONE);
    const float gain = prefill > SM90_LONG_PREFILL && !a->window ? SM90_GAIN_PART * (float)prefill : 0;
    return apart + gain < fused ? ATTN_WAY_APART : ATTN_WAY_FUSED;
}

/* Where prefill's units are cut, for so many clusters. Returns the tiles until prefill has ended. */
SM90_BOTH uint32_t sm90_rule_of_prefill(const struct sm90_shape *a, const struct sm90_totals *t, struct sm90_rule *r)
{
    const uint32_t mean = sm90_mean_unit(t);
    const struct sm90_prefill_cut cut = sm90_cut_prefill(a, t->units[SM90_PREFILL] * a->kv_heads, mean, r->clusters);
    const uint64_t each = t->tiles[SM90_PREFILL] * a->kv_heads / r->clusters;
    const uint32_t whole = mean + mean / 2 > each ? mean + mean / 2 : (uint32_t)each;
    const uint32_t tiles = cut.parts > 1 ? (mean + cut.parts - 1) / cut.parts : whole;
    r->tiles[SM90_PREFILL] = tiles > SM90_MIN_PREFILL_TILES ? tiles : (uint32_t)SM90_MIN_PREFILL_TILES;
    return cut.cost;
}

/* last: the first sequence of the last quarter. */
SM90_BOTH struct sm90_rule sm90_rule_of(const struct sm90_shape *a, const struct sm90_totals *t,
                                        unsigned long long share, uint32_t last)
{
    const bool automatic = a->policy == ATTN_GPU_AUTO, apart = automatic && a->way == ATTN_WAY_APART;
    struct sm90_rule r = {{0, a->fixed_tiles}, a->fixed_tiles, last, a->sms / SM90_CLUSTER};
    if (a->fixed_tiles)
        return r;
    if (apart)
        sm90_apart_time(a, t, share, &r.clusters);
    const uint32_t prefill = t->units[SM90_PREFILL] ? sm90_rule_of_prefill(a, t, &r) : 0;
    if (t->units[SM90_DECODE] == 0)
        return r;
    /* Behind prefill blocks come one after the other, and a round of all of them would be two; beside it there are those of the SMs that it
     * leaves. */
    const bool serial = a->policy == ATTN_GPU_SERIAL || (automatic && a->way == ATTN_WAY_SERIAL);
    const bool at_once = t->units[SM90_PREFILL] == 0 || serial;
    const uint32_t longest = t->longest[SM90_DECODE];
    const uint32_t on = at_once ? a->sms : a->sms - r.clusters * SM90_CLUSTER;
    const uint32_t blocks = on * SM90_DECODE_BLOCKS > a->sms ? on * SM90_DECODE_BLOCKS : a->sms;
    const bool beside = !at_once && blocks > a->sms;
    struct sm90_decode_cut cut =
        sm90_cut_decodes(blocks, (uint64_t)t->units[SM90_DECODE] * a->kv_heads, t->tiles[SM90_DECODE] * a->kv_heads,
                         longest, beside ? SM90_ENDS_BESIDE : SM90_ENDS_ALONE, at_once);
    if (at_once)
        sm90_cut_finer(blocks, (uint64_t)t->units[SM90_DECODE] * a->kv_heads, t->tiles[SM90_DECODE] * a->kv_heads,
                       longest, &cut);
    if (beside)
        sm90_cut_last_decodes(blocks, SM90_DECODE_BLOCKS * a->sms - blocks, prefill,
                              (t->tiles[SM90_DECODE] - t->last_tiles) * a->kv_heads, t->last_tiles * a->kv_heads,
                              longest, &cut);
    const bool whole = beside && longest > SM90_WHOLE_MORE && longest <= SM90_WHOLE_MOST && cut.tiles >= longest &&
                       cut.last_tiles >= longest;
    const uint32_t level = apart && !at_once && r.clusters < a->sms / SM90_CLUSTER ? sm90_cut_level(a, t, whole) : 0;
    if (level)
        cut.tiles = cut.last_tiles = level;
    if (at_once || (apart && cut.tiles <= SM90_SHORT_PART)) {
        r.tiles[SM90_DECODE] = cut.tiles;
        r.last_tiles = cut.last_tiles;
    } else {
        sm90_cut_beside(a, t, &r);
    }
    return r;
}

/* How many ways there are batches for. */
static inline uint32_t sm90_ways(const struct sm90_shape *a)
{
    return sm90_may_be_serial(a) ? ATTN_GPU_WAYS : ATTN_WAY_SERIAL;
}

/* On the host: the way of a batch. */
static inline enum attn_gpu_way sm90_choose(const struct sm90_shape *a, const struct attn_seq *seq, uint32_t seqs)
{
    struct sm90_totals t = {{0, 0}, 0, {0, 0}, {0, 0}};
    for (uint32_t i = 0; i < seqs; i++) {
        if (sm90_breaks_rule(a, &seq[i]))
            continue;
        const struct sm90_work w = sm90_work_of(a, &seq[i]);
        t.tiles[w.role] += w.tiles;
        t.units[w.role] += w.units;
        t.longest[w.role] = w.longest > t.longest[w.role] ? w.longest : t.longest[w.role];
    }
    unsigned long long share = UINT64_MAX;
    for (uint32_t n = 1; n < a->sms / SM90_CLUSTER; n++) {
        const unsigned long long one = sm90_share_of(a, &t, n);
        share = one < share ? one : share;
    }
    return sm90_way_of(a, &t, share);
}

/* ---- sizes ---- */

/* Places for parts of units that are cut: prefill's units are cut only where there are at most two per cluster, into at most four parts per
 * cluster plus one each. Decode: four parts per unit and six waves, plus eight waves and one part per unit of the last ones, which are
 * cut finer; or eight parts per unit of the last quarter alone, or two and, of that quarter, four; or two or four for each of all blocks. Under a fixed cut, by tokens. */
SM90_BOTH void sm90_slots(const struct attn_gpu_config *c, uint32_t sms, uint64_t slots[SM90_ROLES])
{
    const uint64_t fixed = c->fixed_split_keys, seqs = (uint64_t)c->kv_heads * c->max_seqs;
    slots[SM90_PREFILL] = fixed ? 0 : (SM90_PREFILL_WAVES + SM90_PREFILL_WAVES / 2) * (sms / SM90_CLUSTER);
    slots[SM90_DECODE] = 5 * seqs + 14ull * SM90_DECODE_BLOCKS * sms;
    if (fixed) {
        const uint64_t by_tokens = c->kv_heads * (c->max_kv_tokens / fixed + c->max_seqs),
                       by_parts = seqs * SM90_MAX_DECODE_PARTS;
        slots[SM90_DECODE] = by_tokens < by_parts ? by_tokens : by_parts;
    }
}

/* Units, of all KV heads. */
SM90_BOTH void sm90_units(const struct attn_gpu_config *c, uint64_t units[SM90_ROLES])
{
    units[SM90_PREFILL] =
        c->kv_heads * ((uint64_t)c->max_rows * (c->heads / c->kv_heads) / SM90_UNIT_ROWS + c->max_seqs);
    units[SM90_DECODE] = (uint64_t)c->kv_heads * c->max_seqs;
}

#endif
