/* check_attention_rule.c - what the Hopper plan follows, on the host, over random batches: parts cover their unit, the lists have room for all
 * of them by every policy and way, prefill is on SMs that there are. And which way is chosen. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/attention_sm90_rule.h"

enum { MAX_SEQS = 300, ROUNDS = 4000 };

static uint64_t state;

static uint32_t draw(uint32_t n) /* 0 .. n - 1 */
{
    state += 0x9e3779b97f4a7c15ull;
    uint64_t z = state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return (uint32_t)((z ^ z >> 31) % n);
}

/* Mostly small, up to n. */
static uint32_t draw_skewed(uint32_t n)
{
    return 1 + draw(1 + draw(1 + draw(n)));
}

struct batch {
    struct attn_gpu_config cfg;
    struct sm90_shape shape;
    uint32_t seqs;
    struct attn_seq seq[MAX_SEQS];
};

/* A config, and a batch at its limits or inside of them. Decodes are equal, or not; chunks come at any place. */
static void make(struct batch *b)
{
    static const uint32_t sms[] = {132, 114, 78, 16}, groups[] = {1, 2, 3, 4, 7, 8, 16};
    const uint32_t longest = 1 + draw(draw(4) ? 40000 : 2000), equal = draw(2), chunks = draw(4) ? draw(9) : 0;
    *b = (struct batch){.seqs = 1 + draw(draw(3) ? 40 : MAX_SEQS)};
    b->shape = (struct sm90_shape){
        .group = groups[draw(7)],
        .kv_heads = 1 + draw(8),
        .head_dim = 8 * (1 + draw(16)),
        .bent = draw(3) == 0,
        .window = draw(4) ? 0 : 1 + draw(5000),
        .sms = sms[draw(4)],
        .fixed_tiles = draw(5) ? 0 : 1 + draw(32),
        .max_kv_len = longest,
        .policy = (enum attn_gpu_policy)(draw(2) ? ATTN_GPU_AUTO : draw(4)),
        .way = (enum attn_gpu_way)draw(ATTN_GPU_WAYS),
        .prefill_only = b->seqs == 1 && draw(2),
    };
    const uint32_t length = draw_skewed(longest);
    for (uint32_t i = 0; i < b->seqs; i++) {
        struct attn_seq *s = &b->seq[i];
        s->kv_len = equal ? length : draw_skewed(longest);
        s->rows = draw(b->seqs) < chunks ? 1 + draw(s->kv_len < 4096 ? s->kv_len : 4096) : 1;
        s->first_row = b->shape.max_rows;
        b->shape.max_rows += s->rows;
        b->shape.max_seq_rows = s->rows > b->shape.max_seq_rows ? s->rows : b->shape.max_seq_rows;
        b->cfg.max_kv_tokens += s->kv_len;
    }
    b->cfg.heads = b->shape.group * b->shape.kv_heads;
    b->cfg.kv_heads = b->shape.kv_heads;
    b->cfg.max_seqs = b->seqs;
    b->cfg.max_rows = b->shape.max_rows;
    b->cfg.fixed_split_keys = b->shape.fixed_tiles * SM90_TILE_KEYS;
}

/* The same, where AUTO has launches apart. */
static void make_apart(struct batch *b)
{
    make(b);
    b->shape.policy = ATTN_GPU_AUTO;
    b->shape.way = ATTN_WAY_APART;
    b->shape.fixed_tiles = 0;
}

static struct sm90_totals totals_of(const struct batch *b, uint32_t last)
{
    struct sm90_totals t = {{0, 0}, 0, {0, 0}, {0, 0}};
    for (uint32_t i = 0; i < b->seqs; i++) {
        ck_assert(!sm90_breaks_rule(&b->shape, &b->seq[i]));
        const struct sm90_work w = sm90_work_of(&b->shape, &b->seq[i]);
        t.tiles[w.role] += w.tiles;
        t.units[w.role] += w.units;
        t.longest[w.role] = w.longest > t.longest[w.role] ? w.longest : t.longest[w.role];
        if (w.role == SM90_DECODE && i >= last)
            t.last_tiles += w.tiles;
    }
    return t;
}

static unsigned long long share_of(const struct sm90_shape *shape, const struct sm90_totals *t)
{
    unsigned long long best = UINT64_MAX;
    for (uint32_t n = 1; n < 1024; n++) { /* as many threads as the plan has */
        const unsigned long long one = sm90_share_of(shape, t, n);
        best = one < best ? one : best;
    }
    return best;
}

/* As the plan has it: the last quarter of the sequences is cut by itself. */
static struct sm90_rule rule_of(const struct batch *b)
{
    const uint32_t last = b->seqs - b->seqs / 4;
    const struct sm90_totals t = totals_of(b, last);
    return sm90_rule_of(&b->shape, &t, share_of(&b->shape, &t), last);
}

/* As the plan counts: items and places for parts of both roles, over all KV heads. */
static void count(const struct batch *b, const struct sm90_rule *r, uint64_t items[SM90_ROLES],
                  uint64_t slots[SM90_ROLES])
{
    for (uint32_t i = 0; i < b->seqs; i++) {
        const struct attn_seq *s = &b->seq[i];
        const uint32_t role = sm90_role_of(&b->shape, s), n = sm90_units_of(&b->shape, s);
        for (uint32_t u = 0; u < n; u++) {
            uint32_t lo, hi;
            sm90_keys_of(&b->shape, s, u * SM90_UNIT_ROWS, &lo, &hi);
            ck_assert(lo < hi && hi <= s->kv_len);
            const uint32_t tiles = sm90_tiles_of(lo, hi), each = sm90_part_tiles(r, role, i, tiles);
            ck_assert_msg(each > 0 && each <= tiles, "%u tiles in parts of %u", tiles, each);
            const uint32_t parts = (tiles + each - 1) / each;
            ck_assert(parts <= (role == SM90_DECODE ? SM90_MAX_DECODE_PARTS : SM90_MAX_PREFILL_PARTS));
            ck_assert((parts - 1) * each < tiles); /* the last one has work */
            items[role] += (uint64_t)parts * b->shape.kv_heads;
            slots[role] += parts > 1 ? (uint64_t)parts * b->shape.kv_heads : 0;
        }
    }
}

static void describe(const struct batch *b, const struct sm90_rule *r, char *text, size_t n)
{
    snprintf(text, n,
             "%u sequences, %u rows, group %u, %u KV heads, %u SMs, window %u, fixed %u, policy %d, way %d: parts of "
             "%u, %u, %u, %u clusters",
             b->seqs, b->shape.max_rows, b->shape.group, b->shape.kv_heads, b->shape.sms, b->shape.window,
             b->shape.fixed_tiles, (int)b->shape.policy, (int)b->shape.way, r->tiles[0], r->tiles[1], r->last_tiles,
             r->clusters);
}

/* That there is room for its items and their parts. */
static void check_room(const struct batch *b, const struct sm90_rule *r)
{
    uint64_t items[SM90_ROLES] = {0, 0}, used[SM90_ROLES] = {0, 0}, slots[SM90_ROLES], units[SM90_ROLES];
    char text[400];
    describe(b, r, text, sizeof text);
    ck_assert_msg(r->clusters >= 1 && r->clusters <= b->shape.sms / SM90_CLUSTER, "%s", text);
    if (b->shape.policy != ATTN_GPU_AUTO || b->shape.way != ATTN_WAY_APART || b->shape.fixed_tiles)
        ck_assert_msg(r->clusters == b->shape.sms / SM90_CLUSTER, "%s", text);
    count(b, r, items, used);
    sm90_slots(&b->cfg, b->shape.sms, slots);
    sm90_units(&b->cfg, units);
    for (int role = 0; role < SM90_ROLES; role++) {
        ck_assert_msg(used[role] <= slots[role], "role %d: %llu places, %llu used: %s", role,
                      (unsigned long long)slots[role], (unsigned long long)used[role], text);
        ck_assert_msg(items[role] <= units[role] + slots[role], "role %d: room for %llu items, %llu made: %s", role,
                      (unsigned long long)(units[role] + slots[role]), (unsigned long long)items[role], text);
    }
}

START_TEST(lists_have_room_for_all_parts_of_any_batch)
{
    static struct batch b;
    state = (uint64_t)_i + 1;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        make(&b);
        const struct sm90_rule r = rule_of(&b);
        check_room(&b, &r);
    }
}
END_TEST

/* Where decodes' parts are level, and prefill beside them is in parts on some of the clusters. */
START_TEST(lists_have_room_for_level_parts_and_prefill_beside_them)
{
    static struct batch b;
    uint32_t level = 0, cut = 0;
    state = (uint64_t)_i + 1;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        make_apart(&b);
        b.shape.head_dim = 128;
        b.shape.bent = false;
        b.shape.window = 0;
        b.shape.prefill_only = false;
        b.cfg.fixed_split_keys = 0;
        const struct sm90_totals t = totals_of(&b, b.seqs);
        const struct sm90_rule r = rule_of(&b);
        check_room(&b, &r);
        const bool some = r.clusters < b.shape.sms / SM90_CLUSTER;
        level += some && r.tiles[SM90_DECODE] == sm90_cut_level(&b.shape, &t, false);
        cut += some && t.units[SM90_PREFILL] && r.tiles[SM90_PREFILL] < t.longest[SM90_PREFILL];
    }
    ck_assert_msg(level > ROUNDS / 200 && cut > ROUNDS / 50, "%u level, %u with prefill in parts", level, cut);
}
END_TEST

/* With one role alone there is nothing to fuse; wide heads that fill boxes and are not bent all go by the same times, and those that do not
 * are never in the fused kernel where these are apart, but where few SMs are left to decodes. */
START_TEST(a_way_is_for_both_roles)
{
    static struct batch b;
    uint32_t few_left = 0;
    state = (uint64_t)_i + 1;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        make(&b);
        const struct sm90_totals t = totals_of(&b, b.seqs);
        const enum attn_gpu_way way = sm90_choose(&b.shape, b.seq, b.seqs);
        ck_assert_int_lt((int)way, (int)sm90_ways(&b.shape));
        if (t.units[SM90_PREFILL] == 0 || t.units[SM90_DECODE] == 0)
            ck_assert_int_eq(way, ATTN_WAY_APART);
        if (b.shape.head_dim > SM90_NARROW && !b.shape.bent) {
            const struct sm90_shape own = b.shape;
            b.shape.head_dim = SM90_NARROW * (2 + draw(3));
            const enum attn_gpu_way of_wide = sm90_choose(&b.shape, b.seq, b.seqs);
            if (sm90_fills(own.head_dim))
                ck_assert_int_eq(way, of_wide);
            else if (way == ATTN_WAY_FUSED && of_wide != way) {
                const uint32_t all = own.sms / SM90_CLUSTER;
                const uint64_t prefill =
                    sm90_cut_prefill(&own, t.units[SM90_PREFILL] * own.kv_heads, sm90_mean_unit(&t), all).cost;
                uint32_t clusters;
                sm90_apart_time(&own, &t, share_of(&own, &t), &clusters);
                ck_assert(sm90_too_few_left(&own, prefill, sm90_decode_load(&own, &t), clusters));
                ck_assert(3 * clusters > 2 * all && clusters < all);
                few_left++;
            }
        }
    }
    ck_assert_uint_gt(few_left, 0);
}
END_TEST

/* Of others a server would capture graphs that no step takes. */
START_TEST(only_heads_that_can_be_serial_have_that_way)
{
    static const struct {
        uint32_t head_dim, group;
        bool bent, serial;
    } heads[] = {{128, 4, false, false}, {64, 8, false, false}, {128, 1, false, true}, {64, 1, false, true},
                 {80, 4, false, true},   {24, 4, false, true},  {80, 4, true, false},  {128, 1, true, false},
                 {64, 1, true, true},    {64, 4, true, false}};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        const struct sm90_shape a = {
            .head_dim = heads[i].head_dim, .group = heads[i].group, .bent = heads[i].bent, .kv_heads = 8, .sms = 132};
        ck_assert_msg(sm90_ways(&a) == (heads[i].serial ? ATTN_GPU_WAYS : ATTN_WAY_SERIAL), "case %zu: %u ways", i,
                      sm90_ways(&a));
    }
}
END_TEST

START_TEST(a_fixed_cut_depends_on_the_length_alone)
{
    static struct batch b;
    state = (uint64_t)_i + 1;
    for (uint32_t round = 0; round < ROUNDS / 10; round++) {
        make(&b);
        b.shape.fixed_tiles = 1 + draw(32);
        const struct sm90_rule r = rule_of(&b);
        for (uint32_t i = 0; i < b.seqs; i++) {
            const uint32_t tiles = 1 + draw(3000), fixed = b.shape.fixed_tiles;
            uint32_t parts = (tiles + fixed - 1) / fixed;
            parts = parts < SM90_MAX_DECODE_PARTS ? parts : SM90_MAX_DECODE_PARTS;
            ck_assert_uint_eq(sm90_part_tiles(&r, SM90_PREFILL, i, tiles), tiles);
            ck_assert_uint_eq(sm90_part_tiles(&r, SM90_DECODE, i, tiles), (tiles + parts - 1) / parts);
        }
    }
}
END_TEST

/* Prefill on some of the clusters only where the estimate says that it ends sooner than on all, with decodes behind it. */
START_TEST(prefill_is_on_some_clusters_only_where_that_ends_sooner)
{
    static struct batch b;
    uint32_t some = 0, all = 0;
    state = (uint64_t)_i + 1;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        make_apart(&b);
        const struct sm90_totals t = totals_of(&b, b.seqs);
        const unsigned long long share = share_of(&b.shape, &t);
        const struct sm90_rule r = sm90_rule_of(&b.shape, &t, share, b.seqs);
        const uint32_t clusters = b.shape.sms / SM90_CLUSTER, units = t.units[SM90_PREFILL] * b.shape.kv_heads;
        if (t.units[SM90_PREFILL] == 0 || t.units[SM90_DECODE] == 0) {
            ck_assert_uint_eq(share, UINT64_MAX);
            ck_assert_uint_eq(r.clusters, clusters);
            continue;
        }
        const struct sm90_prefill_cut on_all = sm90_cut_prefill(&b.shape, units, sm90_mean_unit(&t), clusters);
        const float in_turn = SM90_TILE * (float)on_all.cost + (float)sm90_decode_load(&b.shape, &t);
        if (r.clusters == clusters) {
            ck_assert(share == UINT64_MAX ||
                      sm90_on_clusters(&b.shape, &t, (uint32_t)(share & 0xffff)).time >= in_turn);
            all++;
            continue;
        }
        const struct sm90_prefill_cut cut = sm90_cut_prefill(&b.shape, units, sm90_mean_unit(&t), r.clusters);
        ck_assert(sm90_shared_time((float)cut.cost, (float)sm90_decode_load(&b.shape, &t), (float)r.clusters,
                                   (float)clusters) < in_turn);
        some++;
    }
    ck_assert_msg(some > ROUNDS / 50 && all > ROUNDS / 50, "%u batches on some, %u on all", some, all);
}
END_TEST

/* AUTO's third way is the serial policy, to the last part, and the second the fused one. */
START_TEST(a_way_is_cut_as_its_policy)
{
    static struct batch b;
    uint32_t chosen = 0;
    state = (uint64_t)_i + 1;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        make_apart(&b);
        const uint32_t last = b.seqs - b.seqs / 4;
        const struct sm90_totals t = totals_of(&b, last);
        struct sm90_shape other = b.shape;
        b.shape.way = ATTN_WAY_SERIAL;
        other.policy = ATTN_GPU_SERIAL;
        const struct sm90_rule r = sm90_rule_of(&b.shape, &t, share_of(&b.shape, &t), last),
                               like = sm90_rule_of(&other, &t, share_of(&other, &t), last);
        ck_assert(memcmp(&r, &like, sizeof r) == 0);
        struct sm90_shape fused = b.shape;
        fused.way = ATTN_WAY_FUSED;
        other.policy = ATTN_GPU_FUSED;
        const struct sm90_rule f = sm90_rule_of(&fused, &t, share_of(&fused, &t), last),
                               like_f = sm90_rule_of(&other, &t, share_of(&other, &t), last);
        ck_assert(memcmp(&f, &like_f, sizeof f) == 0);
        if (sm90_choose(&b.shape, b.seq, b.seqs) != ATTN_WAY_SERIAL)
            continue;
        ck_assert(t.units[SM90_PREFILL] > 0 && t.units[SM90_DECODE] > 0);
        ck_assert(!b.shape.bent || b.shape.head_dim <= SM90_NARROW);
        chosen++;
    }
    ck_assert_msg(chosen > ROUNDS / 100 && chosen < ROUNDS / 4, "%u batches", chosen);
}
END_TEST

/* A rank of heads of a model on an H200, 4 to a KV head. */
static struct sm90_shape shape_of(uint32_t kv_heads, uint32_t max_seq_rows)
{
    return (struct sm90_shape){.group = 4,
                               .kv_heads = kv_heads,
                               .head_dim = 128,
                               .sms = 132,
                               .max_rows = 8192,
                               .max_seq_rows = max_seq_rows,
                               .max_kv_len = 1 << 20};
}

/* One chunk, if it has rows, and equal decodes. Returns the number of sequences. */
static uint32_t chunk_and_decodes(struct attn_seq *seq, uint32_t rows, uint32_t chunk_len, uint32_t decodes,
                                  uint32_t decode_len)
{
    uint32_t n = 0;
    if (rows)
        seq[n++] = (struct attn_seq){.rows = rows, .kv_len = chunk_len};
    for (uint32_t d = 0; d < decodes; d++)
        seq[n++] = (struct attn_seq){.first_row = 4096 + d, .rows = 1, .kv_len = decode_len};
    return n;
}

/* At the edges of what the serial pair is for: prefill's clusters and tiles; equal decodes, of which 264 blocks work on 2 * tiles for each SM where they
 * are a round. */
START_TEST(serial_is_for_brief_and_for_lonely_prefill)
{
    static const struct {
        uint32_t head_dim;
        bool bent;
        uint32_t clusters, prefill, decodes, tiles;
        bool serial;
    } cases[] = {
        /* One tile on many clusters, a round of whole decodes, four times as long and more. */
        {128, false, 32, 7, 256, 16, true},
        {128, false, 31, 7, 256, 16, false},
        {128, false, 32, 8, 256, 32, false}, /* two tiles */
        {128, false, 32, 7, 320, 16, false}, /* a second round, hardly begun */
        {128, false, 32, 7, 128, 32, false}, /* cut */
        {128, false, 32, 7, 256, 14, false},
        {64, true, 16, 7, 256, 16, true},
        {64, false, 15, 7, 256, 16, false},
        {72, true, 32, 7, 256, 16, false},
        /* Heads that do not fill boxes. */
        {80, false, 16, 11, 264, 17, true},
        {80, false, 16, 11, 264, 16, false},
        {80, false, 16, 12, 264, 64, false},
        {80, false, 16, 11, 275, 64, false}, /* a second round, hardly begun */
        {80, true, 16, 11, 264, 64, false},
        {80, false, 16, 8, 264, 8, true},
        {80, false, 16, 8, 264, 7, false},
        {80, false, 16, 9, 264, 9, false},
        {40, false, 16, 11, 264, 15, true},
        {40, false, 16, 11, 264, 14, false},
        {40, false, 16, 12, 264, 64, false},
        {88, false, 16, 9, 264, 14, true},
        {88, false, 16, 9, 264, 13, false},
        {88, false, 16, 9, 264, 22, true},
        {88, false, 16, 9, 264, 23, false},
        {88, false, 16, 10, 264, 20, false},
        {88, false, 16, 8, 264, 8, false},
        {112, false, 16, 9, 264, 14, true},
        {120, false, 16, 9, 264, 14, false},
        {32, false, 128, 268, 2640, 64, true},
        {32, false, 16, 100, 264, 130, true},
        {32, false, 16, 100, 264, 129, false},
        {80, false, 64, 72, 264, 9, true}, /* few beside a long one */
        {80, false, 64, 70, 264, 8, true},
        {80, false, 64, 69, 264, 8, false},
        {80, false, 64, 71, 264, 9, false},
        {80, false, 64, 300, 264, 37, true},
        {80, false, 64, 301, 264, 37, false},
        {56, false, 64, 100, 264, 10, false},
        {24, false, 64, 100, 264, 10, true},
        {128, false, 64, 100, 264, 10, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct sm90_shape shape = {
            .group = 1, .head_dim = cases[i].head_dim, .bent = cases[i].bent, .kv_heads = 1, .sms = 132};
        const struct sm90_totals t = {.tiles = {0, (unsigned long long)cases[i].decodes * cases[i].tiles},
                                      .units = {cases[i].clusters, cases[i].decodes},
                                      .longest = {0, cases[i].tiles}};
        ck_assert_msg(sm90_serial_anyway(&shape, &t, cases[i].prefill) == cases[i].serial, "case %zu", i);
        shape.group = 4;
        const bool of_heads = cases[i].head_dim % SM90_BOX != 0 && !cases[i].bent;
        ck_assert_msg(sm90_serial_anyway(&shape, &t, cases[i].prefill) == (cases[i].serial && of_heads), "case %zu", i);
    }
}
END_TEST

START_TEST(a_sequence_that_breaks_a_rule_is_left_out)
{
    struct sm90_shape shape = shape_of(8, 50);
    shape.max_rows = 100;
    shape.max_kv_len = 1000;
    const struct attn_seq good = {.first_row = 60, .rows = 40, .kv_len = 1000};
    ck_assert(!sm90_breaks_rule(&shape, &good));
#define BREAKS(field, value)                                                                                           \
    do {                                                                                                               \
        struct attn_seq bad = good;                                                                                    \
        bad.field = value;                                                                                             \
        ck_assert(sm90_breaks_rule(&shape, &bad));                                                                     \
    } while (0)
    BREAKS(rows, 0);
    BREAKS(rows, 51);
    BREAKS(rows, 41); /* one behind max_rows */
    BREAKS(kv_len, 39);
    BREAKS(kv_len, 1001);
    BREAKS(first_row, 61);
    BREAKS(first_row, 100);
    BREAKS(first_row, UINT32_MAX);
#undef BREAKS
    /* A chunk beside decodes is fused; without those that break a rule it is alone. */
    struct sm90_shape wide = shape_of(8, 512);
    wide.max_rows = 600;
    wide.max_kv_len = 4096;
    struct attn_seq seq[33] = {{.rows = 512, .kv_len = 4096}};
    for (uint32_t i = 1; i < 33; i++)
        seq[i] = (struct attn_seq){.first_row = 511 + i, .rows = 1, .kv_len = 1024};
    ck_assert_int_eq(sm90_choose(&wide, seq, 33), ATTN_WAY_FUSED);
    for (uint32_t i = 1; i < 33; i++)
        seq[i].first_row = 600;
    ck_assert_int_eq(sm90_choose(&wide, seq, 33), ATTN_WAY_APART);
}
END_TEST

/* One chunk and equal decodes: what was fastest on an H200 (attention/README.md; from the second part on attention_h200_shapes.txt and _serial.txt). */
START_TEST(the_way_is_what_was_fastest_when_it_was_measured)
{
    static const struct {
        uint32_t kv_heads, head_dim;
        bool bent;
        uint32_t rows, chunk_len, decodes, decode_len;
        enum attn_gpu_way way;
    } cases[] = {
        {8, 128, false, 1024, 16384, 0, 0, ATTN_WAY_APART},
        {8, 128, false, 0, 0, 64, 8192, ATTN_WAY_APART},
        {8, 128, false, 64, 64, 8, 1024, ATTN_WAY_APART},
        {8, 128, false, 256, 2048, 32, 1024, ATTN_WAY_APART},
        {8, 128, false, 1024, 8192, 66, 8192, ATTN_WAY_APART},
        {8, 128, false, 1024, 4096, 128, 512, ATTN_WAY_FUSED},
        {8, 128, false, 512, 512, 32, 1024,
         ATTN_WAY_APART}, /* 43.0, fused 44.7; with a kernel between layers 47.4, 49.5 */
        {8, 128, false, 512, 512, 8, 4096, ATTN_WAY_FUSED}, /* 44.3, apart 43.0; but with a kernel between 49.1, 55.8 */
        {8, 128, false, 1024, 1024, 8, 4096, ATTN_WAY_APART}, /* 51.2, fused 60.4; 55.6, 62.7 */
        {8, 128, false, 512, 4096, 32, 1024, ATTN_WAY_FUSED},
        {8, 128, false, 1024, 12288, 128, 2048, ATTN_WAY_APART}, /* 479, fused 495 */
        {8, 128, false, 1024, 32768, 22, 32768, ATTN_WAY_APART}, /* 1084, 1196 */
        {4, 128, false, 1024, 4096, 22, 4096, ATTN_WAY_FUSED},   /* 82, 91 */
        {8, 128, false, 512, 131072, 2, 131072, ATTN_WAY_APART}, /* 1820 us, fused 2058 */
        {8, 128, false, 512, 32768, 22, 32768, ATTN_WAY_APART},  /* 808, 946 */

        /* The steps of check_engine_gpu (engine_ways_gpu.c), one rank and two. */
        {8, 128, false, 64, 64, 45, 4097, ATTN_WAY_APART},
        {8, 128, false, 512, 8192, 12, 4097, ATTN_WAY_FUSED},
        {8, 128, false, 512, 8192, 45, 4097, ATTN_WAY_APART},
        {4, 128, false, 64, 64, 45, 4097, ATTN_WAY_APART},
        {4, 128, false, 512, 8192, 12, 4097, ATTN_WAY_FUSED},
        {4, 128, false, 512, 14336, 90, 4097, ATTN_WAY_APART},

        {8, 64, false, 256, 256, 64, 1024, ATTN_WAY_FUSED},    /* 40.6 us, apart 48.3 */
        {2, 64, false, 128, 128, 32, 1024, ATTN_WAY_FUSED},    /* 11.6, 13.0 */
        {8, 64, true, 512, 4096, 32, 4096, ATTN_WAY_FUSED},    /* 152, 257 */
        {8, 64, false, 512, 4096, 96, 2048, ATTN_WAY_APART},   /* 113.3, fused 125.0, serial 147.5 */
        {2, 64, false, 2048, 2048, 128, 2048, ATTN_WAY_APART}, /* 45.8, fused 52.1 */
        {8, 64, true, 1024, 8192, 8, 8192, ATTN_WAY_APART},    /* 505, fused 520: few decodes */
        {32, 64, false, 128, 4096, 32, 4096, ATTN_WAY_APART}, /* 32/32 heads, 512 rows, 7.1 times: 279.8, fused 298.1 */
        {32, 64, false, 64, 256, 64, 1024,
         ATTN_WAY_FUSED}, /* 256 rows: 135.5, apart 157.1, though 25 times: prefill is short */
        {32, 64, false, 64, 1024, 32, 2048, ATTN_WAY_APART}, /* 256 rows, 12 times: 143.2, fused 149.3 */
        {8, 64, false, 64, 64, 256, 8192, ATTN_WAY_APART},   /* very many: not measured */
        {8, 96, false, 512, 4096, 32, 4096, ATTN_WAY_APART}, /* 135, fused 160 */

        /* Heads that do not fill boxes (attention_h200_narrow.txt, _serial.txt). */
        {2, 80, false, 2048, 2048, 128, 2048, ATTN_WAY_APART}, /* 74.9, fused 87.8 */
        {4, 80, false, 1024, 1024, 128, 1024, ATTN_WAY_APART}, /* 65.3, 80.6 */
        {4, 80, false, 64, 64, 8, 1024, ATTN_WAY_APART},       /* 11.9, 12.5: prefill is short */
        {8, 80, false, 1024, 8192, 32, 8192, ATTN_WAY_APART},  /* 337, 346: prefill takes as long as decodes */
        {2, 80, false, 1024, 8192, 32, 8192, ATTN_WAY_FUSED},  /* 104, 134 */
        {8, 80, false, 512, 512, 16, 1024, ATTN_WAY_FUSED},    /* 24.7, 32.7: nothing is left beside it */
        {8, 80, false, 512, 512, 64, 1024, ATTN_WAY_SERIAL},   /* 64.5, fused 71.3: brief */
        {8, 80, false, 128, 128, 32, 1024, ATTN_WAY_SERIAL},   /* 32.7, apart 33.6, fused 39.1 */
        {4, 80, false, 128, 128, 32, 1024, ATTN_WAY_SERIAL},   /* 22.6, 23.4, 25.5 */
        {8, 80, false, 1024, 8192, 8, 8192, ATTN_WAY_SERIAL},  /* 257, 267, 264: few decodes */
        {1, 80, false, 1024, 8192, 32, 8192, ATTN_WAY_FUSED},  /* 65.2, apart 72.2: too few SMs left */
        {8, 80, true, 512, 4096, 32, 4096, ATTN_WAY_FUSED},    /* a cap: not measured */
        {8, 40, false, 256, 256, 64, 1024, ATTN_WAY_SERIAL},   /* 40.9, apart 43.4, fused 50.8: brief */
        {8, 40, false, 512, 8192, 96, 4096, ATTN_WAY_APART},   /* 234, 301 */
        {2, 40, false, 512, 4096, 32, 4096, ATTN_WAY_APART},   /* 33.8, 39.4 */
        {2, 40, false, 256, 1024, 32, 2048, ATTN_WAY_APART},   /* 18.2, 23.1: fewer decodes, but prefill is short */
        {8, 40, false, 1024, 4096, 64, 1024, ATTN_WAY_FUSED},  /* 112, apart 115 */
        {4, 40, false, 128, 128, 32, 1024, ATTN_WAY_FUSED},    /* 15.5, 17.5: prefill is shortest */
        {2, 40, false, 128, 128, 32, 1024, ATTN_WAY_FUSED},    /* 11.7, 12.7 */
        {2, 40, false, 256, 256, 64, 1024, ATTN_WAY_FUSED},    /* 16.6, 17.6: prefill of 9 tiles */
        {1, 40, false, 256, 256, 64, 1024, ATTN_WAY_APART},    /* 13.0, 13.7: of 9, and fewer of decodes */
        {1, 40, false, 512, 512, 64, 1024, ATTN_WAY_APART},    /* 12.8, 14.2: of 11 */
        {1, 40, false, 1024, 1024, 128, 1024, ATTN_WAY_APART}, /* 18.4, 23.2: of 15 */
        {2, 40, false, 512, 2560, 32, 1024, ATTN_WAY_APART},   /* of 22: not measured */
        {2, 40, false, 512, 3072, 32, 1024, ATTN_WAY_FUSED},   /* of 24: not measured */
        {1, 80, false, 512, 4096, 32, 4096, ATTN_WAY_APART},   /* 36.9, fused 39.6: of 20 */

        {8, 128, true, 512, 4096, 32, 4096, ATTN_WAY_FUSED}, /* 179, apart 281 */
        {4, 128, true, 512, 512, 64, 1024, ATTN_WAY_FUSED},  /* 47.5, 48.2: decodes enough */
        {2, 128, true, 512, 512, 64, 1024, ATTN_WAY_APART},  /* 29.5, fused 37.3: hardly anything to do */
        {2, 128, true, 1024, 8192, 4, 8192, ATTN_WAY_APART}, /* few decodes beside a long prefill: not measured */
        {2, 128, true, 512, 4096, 12, 4096, ATTN_WAY_FUSED}, /* prefill enough: not measured */
        {1, 128, true, 128, 128, 32, 1024, ATTN_WAY_APART},  /* 15.2, fused 17.7 */
        {8, 64, false, 512, 4096, 0, 0, ATTN_WAY_APART},     /* nothing to fuse */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct attn_seq seq[MAX_SEQS];
        struct sm90_shape shape = shape_of(cases[i].kv_heads, 8192);
        shape.head_dim = cases[i].head_dim;
        shape.bent = cases[i].bent;
        const uint32_t n =
            chunk_and_decodes(seq, cases[i].rows, cases[i].chunk_len, cases[i].decodes, cases[i].decode_len);
        ck_assert_msg(sm90_choose(&shape, seq, n) == cases[i].way,
                      "case %zu (%u heads of %u, %u of %u, %u x %u): way %d, expected %d", i, cases[i].kv_heads,
                      cases[i].head_dim, cases[i].rows, cases[i].chunk_len, cases[i].decodes, cases[i].decode_len,
                      (int)sm90_choose(&shape, seq, n), (int)cases[i].way);
    }
}
END_TEST

/* With a window a prefill of 16K is 92 tiles: 94.3 us, fused 110.5, serial 98.7. Without one a prefill as long must gain 5 % of its time. */
START_TEST(a_prefill_that_is_short_by_a_window_is_apart)
{
    struct attn_seq seq[MAX_SEQS];
    struct sm90_shape shape = shape_of(8, 8192);
    shape.window = 1024;
    ck_assert_int_eq(sm90_choose(&shape, seq, chunk_and_decodes(seq, 2048, 16384, 16, 16384)), ATTN_WAY_APART);
}
END_TEST

/* Figure 6's first chunks (attention_h200_sets.csv): 419.6 and 438.0 us, fused 450.8 and 459.0, serial 444.9 and 446.3. */
START_TEST(many_tiles_of_decodes_beside_a_brief_prefill_are_apart)
{
    struct attn_seq seq[MAX_SEQS];
    struct sm90_shape shape = shape_of(4, 8192);
    shape.group = 8;
    for (uint32_t decodes = 54; decodes < 56; decodes++)
        ck_assert_int_eq(sm90_choose(&shape, seq, chunk_and_decodes(seq, 512, 512, decodes, 16384)), ATTN_WAY_APART);
}
END_TEST

/* Equal decodes beside one chunk, on an H200: what was fastest there, too. Heads are 4 to a KV head. */
START_TEST(the_last_decodes_are_cut_as_was_fastest_when_it_was_measured)
{
    static const struct {
        uint32_t kv_heads, rows, chunk_len, decodes, decode_len, tiles, most, least; /* of the last ones' parts */
    } cases[] = {
        {2, 512, 4096, 128, 2048, 32, 8, 1}, /* late blocks would take all that is left, whole */
        {2, 128, 4096, 128, 2048, 32, 8, 1},     {4, 128, 4096, 64, 2048, 32, 8, 1},
        {8, 128, 128, 32, 1024, 16, 16, 16}, /* all blocks are there soon, and whole units fill a round */
        {4, 128, 128, 64, 2048, 32, 32, 32},     {8, 1024, 1024, 128, 512, 16, 16, 16}, /* short ones, many: whole */
        {8, 64, 64, 8, 4096, 8, 8, 8}, /* from 7.5 to 32 tiles for each block: two parts each, of 8 tiles at least */
        {8, 64, 64, 12, 4096, 12, 12, 12},       {8, 256, 256, 4, 16384, 16, 16, 16},
        {8, 256, 1024, 8, 8192, 16, 16, 16},     {4, 576, 576, 16, 4096, 8, 8, 8},
        {8, 64, 64, 30, 1024, 8, 8, 8},       /* of 16: 24 fewer than a round */
        {8, 64, 64, 34, 1024, 9, 9, 9},       /* 8 more than one */
        {4, 512, 4096, 33, 4096, 64, 16, 16}, /* 32 tiles: no more; the last ones' are finer */
        {2, 128, 2048, 67, 4096, 16, 16, 16}, /* of 64, and would be whole to the last: four parts for each block */
        {2, 2048, 4096, 135, 4096, 17, 17, 17},  {8, 64, 64, 64, 2048, 32, 32, 32}, /* of 32 they stay whole, */
        {2, 64, 64, 250, 4096, 31, 31, 31},      /* below 160 tiles; no more are cut, */
        {8, 2048, 4096, 45, 4096, 64, 64, 64},   /* nor where prefill has more than half of the SMs, */
        {8, 1024, 2048, 8, 4096, 32, 32, 32},    /* behind prefill */
        {2, 64, 64, 61, 1024, 8, 4, 4},          /* 7.4 tiles for each, cut for the early ones */
        {4, 2048, 32768, 60, 16384, 46, 16, 16}, /* equal ones beside prefill get no finer rounds */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct batch b = {.seqs = cases[i].decodes + 1};
        b.shape = shape_of(cases[i].kv_heads, 8192);
        chunk_and_decodes(b.seq, cases[i].rows, cases[i].chunk_len, cases[i].decodes, cases[i].decode_len);
        const struct sm90_rule r = rule_of(&b);
        ck_assert_msg(r.tiles[SM90_DECODE] == cases[i].tiles && r.last_tiles <= cases[i].most &&
                          r.last_tiles >= cases[i].least,
                      "case %zu: parts of %u, the last ones' of %u", i, r.tiles[SM90_DECODE], r.last_tiles);
    }
}
END_TEST

/* Level parts: about two for each block, and those left over of each unit; none longer than half of what a block may have. */
START_TEST(level_parts_are_about_two_for_each_block)
{
    static struct batch b;
    uint32_t cut = 0;
    state = (uint64_t)_i + 1;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        make_apart(&b);
        const bool equal = draw(2);
        const uint32_t decodes = 1 + draw(MAX_SEQS / 4), len = 2048 + draw(20000), rows = 17 + draw(300);
        b.shape.head_dim = 128;
        b.shape.bent = false;
        b.shape.window = 0;
        b.shape.prefill_only = false;
        b.shape.max_kv_len = len;
        b.shape.max_rows = b.shape.max_seq_rows = 4096 + MAX_SEQS;
        b.shape.kv_heads = 1 + draw(draw(2) ? 8 : 32);
        b.seqs = chunk_and_decodes(b.seq, rows, rows + draw(300), decodes, len);
        for (uint32_t i = 0; !equal && i < b.seqs; i++)
            if (b.seq[i].rows == 1)
                b.seq[i].kv_len = 1 + draw(len);
        const struct sm90_totals t = totals_of(&b, b.seqs);
        const struct sm90_rule r = rule_of(&b);
        const uint32_t level = sm90_cut_level(&b.shape, &t, false);
        if (t.units[SM90_PREFILL] == 0 || level == 0 || r.clusters == b.shape.sms / SM90_CLUSTER)
            continue; /* decodes alone, or cut by another rule, or behind prefill */
        uint64_t items[SM90_ROLES] = {0, 0}, used[SM90_ROLES] = {0, 0};
        char text[400];
        describe(&b, &r, text, sizeof text);
        ck_assert_msg(r.tiles[SM90_DECODE] == level && r.last_tiles == level, "%s", text);
        count(&b, &r, items, used);
        const uint64_t blocks = SM90_DECODE_BLOCKS * b.shape.sms, units = t.units[SM90_DECODE] * b.shape.kv_heads;
        const uint64_t tiles = t.tiles[SM90_DECODE] * b.shape.kv_heads, each = tiles / (2 * blocks) + 1,
                       least = tiles / (each > 8 ? each : 8);
        ck_assert_msg(items[SM90_DECODE] <= 2 * blocks + units &&
                          (items[SM90_DECODE] >= least || t.longest[SM90_DECODE] > SM90_MAX_DECODE_PARTS * level),
                      "%llu parts, expected %llu: %s", (unsigned long long)items[SM90_DECODE],
                      (unsigned long long)least, text);
        ck_assert_msg(level >= 8 && level <= 16, "%s", text);
        cut++;
    }
    ck_assert_msg(cut > ROUNDS / 100, "%u of %d", cut, ROUNDS);
}
END_TEST

/* For other heads, with a cap or a window, they were not measured. */
START_TEST(parts_are_level_only_where_that_was_measured)
{
    static const struct {
        uint32_t head_dim, group, window;
        bool bent, level;
    } heads[] = {{128, 4, 0, false, true},  {128, 1, 0, false, true}, {64, 4, 0, false, false},
                 {120, 4, 0, false, false}, {128, 4, 0, true, false}, {128, 4, 5000, false, false}};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        struct batch b = {.seqs = 9};
        b.shape = shape_of(8, 8192);
        b.shape.head_dim = heads[i].head_dim;
        b.shape.group = heads[i].group;
        b.shape.window = heads[i].window;
        b.shape.bent = heads[i].bent;
        chunk_and_decodes(b.seq, 64, 64, 8, 4096);
        const struct sm90_rule r = rule_of(&b);
        ck_assert_msg((r.tiles[SM90_DECODE] == 8 && r.last_tiles == 8) == heads[i].level,
                      "case %zu: parts of %u, the last ones' of %u", i, r.tiles[SM90_DECODE], r.last_tiles);
    }
}
END_TEST

/* Prefill's waves on some of the clusters are whole ones, or nearly, where units can be cut for that. */
START_TEST(prefill_beside_decodes_is_cut_for_the_clusters_that_it_has)
{
    static const struct {
        uint32_t kv_heads, rows, chunk_len, decodes, decode_len, clusters, parts;
    } cases[] = {
        {8, 1024, 32768, 22, 32768, 52, 2}, /* 128 units: 5 waves of halves; whole ones would be 3 on 43 clusters */
        {4, 2048, 16384, 45, 16384, 52, 2},
        {8, 512, 4096, 33, 4096, 32, 1}, /* decodes have what they can take */
        {8, 512, 16384, 45, 16384, 32, 1},
        {8, 1024, 16384, 45, 16384, 43, 1}, /* on 37, in halves, prefill would end with the step: SM90_RISK */
        {4, 512, 32768, 11, 32768, 48, 3},  /* fewer decodes than prefill: what they take alone counts */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct batch b = {.seqs = cases[i].decodes + 1};
        b.shape = shape_of(cases[i].kv_heads, 8192);
        chunk_and_decodes(b.seq, cases[i].rows, cases[i].chunk_len, cases[i].decodes, cases[i].decode_len);
        const struct sm90_totals t = totals_of(&b, b.seqs);
        const struct sm90_rule r = rule_of(&b);
        const uint32_t parts = (t.longest[SM90_PREFILL] + r.tiles[SM90_PREFILL] - 1) / r.tiles[SM90_PREFILL];
        ck_assert_msg(r.clusters == cases[i].clusters && parts == cases[i].parts,
                      "case %zu: on %u clusters in %u parts", i, r.clusters, parts);
    }
}
END_TEST

/* The rule of level parts at its edges, for the 264 blocks of an H200: totals of one KV head of 8. */
START_TEST(level_parts_begin_and_end_at_their_limits)
{
    static const struct {
        uint32_t tiles, units, longest;
        bool whole;
        uint32_t level;
    } cases[] = {
        /* 7.49 and 7.52 tiles for each block; two parts would be of 4. */
        {247, 10, 30, false, 0},
        {248, 10, 30, false, 8},
        {528, 20, 30, false, 8},
        {529, 20, 30, false, 9},
        {1055, 20, 60, false, 16},
        {1056, 20, 60, false, 0},
        /* Of whole units; four parts would be of 8. */
        {1056, 20, 60, true, 16},
        {2112, 40, 60, true, 16},
        {2113, 40, 60, true, 17},
        {5279, 100, 64, true, 40},
        {5280, 100, 64, true, 0},
        /* 256 equal units are a round, unequal ones are none, nor are 240 or 272. */
        {512, 32, 16, false, 0},
        {512, 32, 18, false, 8},
        {480, 30, 16, false, 8},
        {544, 34, 16, false, 9},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct sm90_shape shape = shape_of(8, 8192);
        const struct sm90_totals t = {
            .tiles = {0, cases[i].tiles}, .units = {0, cases[i].units}, .longest = {0, cases[i].longest}};
        const uint32_t level = sm90_cut_level(&shape, &t, cases[i].whole);
        ck_assert_msg(level == cases[i].level, "case %zu: parts of %u", i, level);
    }
}
END_TEST

/* 70 long units on 60 clusters: 7 waves of sixths would be less than 4 of thirds, but all parts are four for each of 66 clusters at most. */
START_TEST(prefill_is_in_four_parts_for_each_of_all_clusters_at_most)
{
    const struct sm90_shape shape = shape_of(1, 8192);
    ck_assert_uint_eq(sm90_cut_prefill(&shape, 70, 3000, 60).parts, 3);
    ck_assert_uint_eq(sm90_cut_prefill(&shape, 66, 3000, 60).parts, 4);
}
END_TEST

/* Places for prefill's parts are few to spare: units a little longer than one part, and than three, are in two and four, where two were
 * meant. */
START_TEST(places_for_parts_of_prefill_are_needed)
{
    enum { CHUNKS = 33, DECODES = 200 };
    uint64_t most = 0;
    for (uint32_t part = 60; part < 400; part += 5) {
        for (uint32_t decode_len = 1024; decode_len <= 65536; decode_len *= 2) {
            struct batch b = {.seqs = CHUNKS + DECODES};
            b.shape = shape_of(4, 64);
            b.shape.policy = ATTN_GPU_AUTO;
            b.shape.way = ATTN_WAY_APART;
            for (uint32_t i = 0; i < CHUNKS; i++)
                b.seq[i] =
                    (struct attn_seq){.first_row = 64 * i, .rows = 64, .kv_len = 64 * ((i % 2 ? 3 : 1) * part + 1)};
            for (uint32_t i = CHUNKS; i < b.seqs; i++)
                b.seq[i] = (struct attn_seq){.first_row = 64 * CHUNKS + i, .rows = 1, .kv_len = decode_len};
            b.cfg = (struct attn_gpu_config){
                .heads = 16, .kv_heads = 4, .max_seqs = b.seqs, .max_rows = 64 * CHUNKS + DECODES};
            const struct sm90_rule r = rule_of(&b);
            uint64_t items[SM90_ROLES] = {0, 0}, used[SM90_ROLES] = {0, 0};
            check_room(&b, &r);
            count(&b, &r, items, used);
            most = used[SM90_PREFILL] > most ? used[SM90_PREFILL] : most;
        }
    }
    ck_assert_msg(most > 5 * 66, "%llu places", (unsigned long long)most);
}
END_TEST

/* Equal decodes alone, for 264 blocks: parts in tiles as was fastest (tests/bench/results/attention_h200_decodes.txt). */
static const struct {
    uint32_t kv_heads, seqs, kv_len, part;
} equal_decodes[] = {
    {2, 45, 4096, 13},   /* 450 parts: 5 a unit; with 3, 270, some blocks had two and most one */
    {1, 45, 8192, 26},   /* 225 */
    {2, 24, 1024, 4},    /* 192 */
    {2, 24, 2048, 7},    /* 240 of 7 beat 192 of 8: long enough for one more block to pay */
    {2, 16, 1024, 3},    /* 192 of 3 beat 256 of 2: blocks are left for the next launch */
    {8, 8, 512, 3},      /* the same */
    {8, 16, 256, 4},     /* 128, whole, beat 256 of 2 */
    {1, 8, 4096, 3},     /* 176 of 3 beat 256 of 2 */
    {2, 33, 2048, 8},    /* 264 */
    {1, 33, 2048, 4},    /* 264; 231 of 5 are as fast */
    {8, 33, 16384, 256}, /* 264, whole */
    /* Few rounds whose last one leaves blocks idle: more of them (attention_h200_balanced.txt, leases AF and AG) */
    {4, 54, 16384, 43},   /* 216 whole: 1296 in five rounds */
    {4, 80, 12288, 48},   /* 3.64 rounds */
    {4, 220, 12288, 64},  /* 3.33 */
    {8, 180, 4096, 32},   /* 5.45 */
    {32, 9, 8192, 16},    /* of 16 tiles at least */
    {32, 9, 3840, 20},    /* which 15 are not */
    {4, 106, 32768, 171}, /* of 64 they would be 12.8 rounds */
    {4, 135, 8192, 128},  /* 2.05, 4.09, 2.73 and 2.67: of others it was slower, or as fast */
    {8, 135, 4096, 64},
    {4, 90, 16384, 128},
    {32, 22, 8192, 128},
    {3, 187, 8192, 32}, /* 2 and an eighth: the first that is; 2 and 32 of 264 */
    {4, 140, 8192, 128},
    {19, 37, 8192, 43}, /* one fewer than 2 and two thirds: the last; that is 22 above */
    {16, 29, 8192, 26}  /* 1.76: one round and a part of one, however large */
};

START_TEST(decodes_alone_are_cut_for_the_blocks_that_there_are)
{
    struct batch b = {.seqs = equal_decodes[_i].seqs};
    b.shape = shape_of(equal_decodes[_i].kv_heads, 1);
    for (uint32_t i = 0; i < b.seqs; i++)
        b.seq[i] = (struct attn_seq){.first_row = i, .rows = 1, .kv_len = equal_decodes[_i].kv_len};
    const struct sm90_rule r = rule_of(&b);
    const uint32_t whole = equal_decodes[_i].kv_len / 64, part = r.tiles[SM90_DECODE];
    ck_assert_uint_eq(r.last_tiles, part);
    ck_assert_msg((part < whole ? part : whole) == equal_decodes[_i].part,
                  "%u decodes of %u by %u KV heads: parts of %u", b.seqs, equal_decodes[_i].kv_len,
                  equal_decodes[_i].kv_heads, part);
}
END_TEST

/* Finer rounds are counted from equal units: others keep their cut. */
START_TEST(unequal_decodes_are_not_cut_finer)
{
    struct batch b = {.seqs = 58};
    b.shape = shape_of(4, 1);
    for (uint32_t i = 0; i < b.seqs; i++)
        b.seq[i] =
            (struct attn_seq){.first_row = i, .rows = 1, .kv_len = i % 4 != 2 ? 16384 : 12288}; /* more than 15 of 16 */
    struct sm90_rule r = rule_of(&b);
    ck_assert_uint_eq(r.tiles[SM90_DECODE], 29);
    b.seq[1].kv_len -= 4096; /* fewer */
    r = rule_of(&b);
    ck_assert_uint_eq(r.tiles[SM90_DECODE], 256);
}
END_TEST

START_TEST(one_long_decode_among_short_ones_is_cut)
{
    struct batch b = {.seqs = 256};
    b.shape = shape_of(8, 1);
    for (uint32_t i = 0; i < b.seqs; i++)
        b.seq[i] = (struct attn_seq){.first_row = i, .rows = 1, .kv_len = i == 17 ? 131072 : 128};
    const struct sm90_rule r = rule_of(&b);
    ck_assert_msg(r.tiles[SM90_DECODE] <= 2048 / 16, "one of 2048 tiles in parts of %u", r.tiles[SM90_DECODE]);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("attention_rule");
    TCase *core = tcase_create("core");
    tcase_add_test(core, serial_is_for_brief_and_for_lonely_prefill);
    tcase_add_test(core, only_heads_that_can_be_serial_have_that_way);
    tcase_add_test(core, the_way_is_what_was_fastest_when_it_was_measured);
    tcase_add_test(core, many_tiles_of_decodes_beside_a_brief_prefill_are_apart);
    tcase_add_test(core, the_last_decodes_are_cut_as_was_fastest_when_it_was_measured);
    tcase_add_loop_test(core, level_parts_are_about_two_for_each_block, 0, 4);
    tcase_add_test(core, parts_are_level_only_where_that_was_measured);
    tcase_add_test(core, level_parts_begin_and_end_at_their_limits);
    tcase_add_test(core, prefill_is_in_four_parts_for_each_of_all_clusters_at_most);
    tcase_add_test(core, a_prefill_that_is_short_by_a_window_is_apart);
    tcase_add_test(core, prefill_beside_decodes_is_cut_for_the_clusters_that_it_has);
    tcase_add_loop_test(core, decodes_alone_are_cut_for_the_blocks_that_there_are, 0,
                        sizeof equal_decodes / sizeof *equal_decodes);
    tcase_add_test(core, unequal_decodes_are_not_cut_finer);
    tcase_add_test(core, one_long_decode_among_short_ones_is_cut);
    tcase_add_loop_test(core, a_fixed_cut_depends_on_the_length_alone, 0, 4);
    tcase_add_loop_test(core, a_way_is_for_both_roles, 0, 4);
    suite_add_tcase(s, core);
    TCase *limits = tcase_create("limits");
    tcase_set_timeout(limits, 60);
    tcase_add_loop_test(limits, lists_have_room_for_all_parts_of_any_batch, 0, 8);
    tcase_add_loop_test(limits, lists_have_room_for_level_parts_and_prefill_beside_them, 0, 4);
    tcase_add_loop_test(limits, a_way_is_cut_as_its_policy, 0, 8);
    tcase_add_loop_test(limits, prefill_is_on_some_clusters_only_where_that_ends_sooner, 0, 4);
    tcase_add_test(limits, places_for_parts_of_prefill_are_needed);
    tcase_add_test(limits, a_sequence_that_breaks_a_rule_is_left_out);
    suite_add_tcase(s, limits);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
