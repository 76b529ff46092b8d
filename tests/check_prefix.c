/* The prefix index against a plain model: a table of token lists that is searched from one end to the other. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/prefix.h"

#define ENTRIES    24
#define MAX_TOKENS 60
#define ANY        UINT32_MAX

static struct prefix_index *create(uint32_t block, uint32_t nodes)
{
    struct prefix_index *ix = NULL;
    struct status st = STATUS_INIT;
    const struct prefix_config cfg = {.block_tokens = block, .max_entries = ENTRIES, .max_nodes = nodes};
    ck_assert_msg(prefix_create(&ix, &cfg, &st) == ST_OK, "%s", st.message);
    return ix;
}

static const uint32_t ABC[] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
static const uint32_t ABD[] = {1, 2, 3, 4, 5, 6, 9, 9, 9};

START_TEST(longest_run_of_whole_blocks_is_found)
{
    struct prefix_index *ix = create(3, 100);
    uint32_t entry = ANY;
    ck_assert_uint_eq(prefix_match(ix, 0, ABC, 9, &entry), 0);
    ck_assert_uint_eq(prefix_extend(ix, 5, 0, ABC, 8), 6);
    ck_assert_uint_eq(prefix_extend(ix, 6, 0, ABD, 9), 9);
    ck_assert_uint_eq(prefix_stats(ix).nodes, 3); /* two of them shared */
    ck_assert_uint_eq(prefix_match(ix, 0, ABC, 9, &entry), 6);
    ck_assert_uint_eq(entry, 5);
    ck_assert_uint_eq(prefix_match(ix, 0, ABD, 9, &entry), 9);
    ck_assert_uint_eq(entry, 6);
    ck_assert_uint_eq(prefix_match(ix, 0, ABD, 8, &entry), 6);
    ck_assert_uint_eq(prefix_match(ix, 0, ABD, 2, &entry), 0);
    ck_assert_uint_eq(prefix_extend(ix, 5, 0, ABC, 9), 9); /* it goes on where it was */
    ck_assert_uint_eq(prefix_match(ix, 0, ABC, 9, &entry), 9);
    ck_assert_uint_eq(entry, 5);
    prefix_check(ix);
    prefix_destroy(ix);
}
END_TEST

START_TEST(another_entry_serves_when_one_goes)
{
    struct prefix_index *ix = create(3, 100);
    uint32_t entry = ANY;
    prefix_extend(ix, 0, 0, ABC, 9);
    prefix_extend(ix, 1, 0, ABD, 9);
    prefix_remove(ix, 0);
    prefix_remove(ix, 0);
    ck_assert_uint_eq(prefix_match(ix, 0, ABC, 9, &entry), 6);
    ck_assert_uint_eq(entry, 1);
    prefix_remove(ix, 1);
    ck_assert_uint_eq(prefix_match(ix, 0, ABC, 9, &entry), 0);
    ck_assert_uint_eq(prefix_stats(ix).nodes, 0);
    prefix_check(ix);
    prefix_destroy(ix);
}
END_TEST

START_TEST(salts_do_not_meet)
{
    struct prefix_index *ix = create(3, 100);
    uint32_t entry = ANY;
    prefix_extend(ix, 0, 1, ABC, 9);
    ck_assert_uint_eq(prefix_match(ix, 2, ABC, 9, &entry), 0);
    prefix_extend(ix, 1, 2, ABC, 6);
    ck_assert_uint_eq(prefix_match(ix, 2, ABC, 9, &entry), 6);
    ck_assert_uint_eq(entry, 1);
    ck_assert_uint_eq(prefix_stats(ix).nodes, 5);
    prefix_check(ix);
    prefix_destroy(ix);
}
END_TEST

START_TEST(parked_entries_go_by_last_use)
{
    struct prefix_index *ix = create(1, 100);
    uint32_t entry = ANY;
    ck_assert(!prefix_oldest(ix, ANY, &entry));
    ck_assert(!prefix_park(ix, 0)); /* it has no tokens */
    for (uint32_t i = 0; i < 3; i++) {
        prefix_extend(ix, i, i, ABC, 4);
        ck_assert(prefix_park(ix, i));
    }
    ck_assert(prefix_oldest(ix, ANY, &entry) && entry == 0);
    ck_assert(prefix_oldest(ix, 0, &entry) && entry == 1);
    prefix_hit(ix, 0, 4);
    ck_assert(prefix_oldest(ix, ANY, &entry) && entry == 1);
    prefix_remove(ix, 1);
    prefix_remove(ix, 2);
    ck_assert(prefix_oldest(ix, ANY, &entry) && entry == 0);
    ck_assert(!prefix_oldest(ix, 0, &entry));
    struct prefix_stats stats = prefix_stats(ix);
    ck_assert_uint_eq(stats.hits, 1);
    ck_assert_uint_eq(stats.hit_tokens, 4);
    ck_assert_uint_eq(stats.evictions, 2);
    prefix_check(ix);
    prefix_destroy(ix);
}
END_TEST

/* ---- a random walk beside a plain model ---- */

struct model {
    uint32_t block;
    uint64_t random;
    struct {
        uint64_t salt;
        uint32_t tokens[MAX_TOKENS], known; /* what the index says that it knows */
        uint64_t parked;                    /* time of its last use; 0: not */
    } entry[ENTRIES];
    uint64_t now;
};

static uint32_t draw(struct model *m, uint32_t n)
{
    uint64_t x = m->random += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((x ^ (x >> 31)) % n);
}

/* Few tokens, so that lists begin alike; now and then as an entry does. */
static uint32_t draw_tokens(struct model *m, uint32_t *tokens, uint64_t *salt)
{
    uint32_t n = draw(m, MAX_TOKENS + 1), same = 0;
    *salt = draw(m, 2);
    if (draw(m, 4) > 0) {
        uint32_t from = draw(m, ENTRIES);
        *salt = m->entry[from].salt;
        same = draw(m, m->entry[from].known + 1);
        memcpy(tokens, m->entry[from].tokens, same * sizeof *tokens);
    }
    for (uint32_t i = same; i < MAX_TOKENS; i++)
        tokens[i] = draw(m, 2);
    return n;
}

static void check_match(struct model *m, const struct prefix_index *ix)
{
    uint32_t tokens[MAX_TOKENS], best = 0, entry = ANY;
    uint64_t salt;
    uint32_t n = draw_tokens(m, tokens, &salt);
    uint32_t found = prefix_match(ix, salt, tokens, n, &entry);
    for (uint32_t i = 0; i < ENTRIES; i++) {
        uint32_t same = 0;
        while (m->entry[i].salt == salt && same < n && same < m->entry[i].known &&
               m->entry[i].tokens[same] == tokens[same])
            same++;
        same -= same % m->block;
        best = same > best ? same : best;
        ck_assert_msg(i != entry || same >= found, "entry %u has %u of %u tokens", i, same, found);
    }
    ck_assert_msg(found == best, "%u tokens match, found %u", best, found);
}

static void extend(struct model *m, struct prefix_index *ix, uint32_t max_nodes)
{
    uint32_t i = draw(m, ENTRIES);
    if (m->entry[i].parked)
        return;
    uint32_t tokens[MAX_TOKENS], known = m->entry[i].known;
    uint64_t salt;
    uint32_t n = draw_tokens(m, tokens, &salt);
    if (known > 0)
        salt = m->entry[i].salt;
    memcpy(tokens, m->entry[i].tokens, known * sizeof *tokens);
    uint32_t got = prefix_extend(ix, i, salt, tokens, n), whole = n - n % m->block;
    ck_assert_uint_eq(got, prefix_tokens(ix, i));
    ck_assert_uint_ge(got, known);
    ck_assert(got == (whole > known ? whole : known) || prefix_stats(ix).nodes == max_nodes);
    m->entry[i].salt = salt;
    memcpy(m->entry[i].tokens, tokens, sizeof tokens);
    m->entry[i].known = got;
}

static void park_or_evict(struct model *m, struct prefix_index *ix)
{
    uint32_t i = draw(m, ENTRIES), entry = ANY;
    switch (draw(m, 4)) {
    case 0:
        ck_assert(prefix_park(ix, i) == (m->entry[i].known > 0));
        if (m->entry[i].known && !m->entry[i].parked)
            m->entry[i].parked = ++m->now;
        break;
    case 1:
        if (m->entry[i].known == 0)
            break;
        prefix_hit(ix, i, m->entry[i].known);
        if (m->entry[i].parked)
            m->entry[i].parked = ++m->now;
        break;
    case 2:
        if (m->entry[i].parked)
            break;
        prefix_remove(ix, i);
        m->entry[i].known = 0;
        break;
    default: {
        uint32_t oldest = ANY;
        for (uint32_t k = 0; k < ENTRIES; k++)
            if (k != i && m->entry[k].parked && (oldest == ANY || m->entry[k].parked < m->entry[oldest].parked))
                oldest = k;
        ck_assert(prefix_oldest(ix, i, &entry) == (oldest != ANY));
        ck_assert_uint_eq(entry, oldest);
        if (oldest == ANY)
            break;
        prefix_remove(ix, oldest);
        m->entry[oldest].known = 0;
        m->entry[oldest].parked = 0;
    }
    }
}

/* PREFIX_STEPS and PREFIX_SEED make it longer and another. */
START_TEST(agrees_with_a_plain_table)
{
    static const struct {
        uint32_t block, nodes;
    } shape[] = {{1, 2000}, {3, 100}, {4, 17}, {7, 1}, {59, 30}};
    const char *steps = getenv("PREFIX_STEPS"), *seed = getenv("PREFIX_SEED");
    struct model m = {.block = shape[_i].block, .random = seed ? strtoull(seed, NULL, 0) : 17 + (uint64_t)_i};
    struct prefix_index *ix = create(m.block, shape[_i].nodes);
    for (uint64_t left = steps ? strtoull(steps, NULL, 0) : 30000; left > 0; left--) {
        uint32_t what = draw(&m, 8);
        if (what < 3)
            extend(&m, ix, shape[_i].nodes);
        else if (what < 5)
            park_or_evict(&m, ix);
        else
            check_match(&m, ix);
        prefix_check(ix);
    }
    for (uint32_t i = 0; i < ENTRIES; i++)
        prefix_remove(ix, i);
    ck_assert_uint_eq(prefix_stats(ix).nodes, 0);
    prefix_check(ix);
    prefix_destroy(ix);
}
END_TEST

START_TEST(wrong_configurations_name_the_field)
{
    static const struct prefix_config wrong[] = {{0, 1, 1, 0}, {1, 0, 1, 0}, {1, 1, 0, 0}, {1, 1, 1u << 31, 0}};
    static const char *const field[] = {"block_tokens", "max_entries", "max_nodes", "max_nodes"};
    struct prefix_index *ix = NULL;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(prefix_create(&ix, &wrong[_i], &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, field[_i]));
    ck_assert_ptr_null(ix);
}
END_TEST

START_TEST(full_index_knows_less_and_goes_on)
{
    struct prefix_index *ix = create(1, 5);
    uint32_t entry = ANY;
    ck_assert_uint_eq(prefix_extend(ix, 0, 0, ABC, 9), 5);
    ck_assert_uint_eq(prefix_extend(ix, 1, 1, ABC, 9), 0);
    ck_assert(!prefix_park(ix, 1));
    ck_assert_uint_eq(prefix_extend(ix, 2, 0, ABD, 5), 5); /* nothing new in it */
    prefix_remove(ix, 0);
    prefix_remove(ix, 2);
    ck_assert_uint_eq(prefix_extend(ix, 1, 1, ABC, 9), 5);
    ck_assert_uint_eq(prefix_match(ix, 1, ABC, 9, &entry), 5);
    prefix_check(ix);
    prefix_destroy(ix);
}
END_TEST

/* ---- the n-th allocation fails, once; only those between start and stop are looked at ---- */

static uint64_t fail_at, allocations;
static bool counting;

void *__real_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t size);

static bool allocation_fails(void)
{
    return counting && ++allocations == fail_at;
}

void *__wrap_malloc(size_t size)
{
    return allocation_fails() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return allocation_fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t size)
{
    return allocation_fails() ? NULL : __real_realloc(p, size);
}

START_TEST(nth_allocation_fails_and_nothing_is_lost)
{
    uint32_t tokens[400], entry = ANY;
    for (uint32_t i = 0; i < 400; i++)
        tokens[i] = i;
    for (fail_at = 1;; fail_at++) {
        const struct prefix_config cfg = {.block_tokens = 1, .max_entries = ENTRIES, .max_nodes = 1000};
        struct prefix_index *ix = NULL;
        allocations = 0;
        counting = true;
        enum status_code rc = prefix_create(&ix, &cfg, NULL);
        uint32_t first = rc == ST_OK ? prefix_extend(ix, 0, 0, tokens, 400) : 0;
        uint32_t again = rc == ST_OK ? prefix_extend(ix, 0, 0, tokens, 400) : 0; /* one try fails, not all */
        counting = false;
        bool failed = allocations >= fail_at;
        if (rc != ST_OK) {
            ck_assert_int_eq(rc, ST_RESOURCE_EXHAUSTED);
            ck_assert(failed && !ix);
            continue;
        }
        prefix_check(ix);
        ck_assert(failed ? first < 400 : first == 400);
        ck_assert_uint_eq(again, 400);
        ck_assert_uint_eq(prefix_match(ix, 0, tokens, 400, &entry), 400);
        prefix_destroy(ix);
        if (!failed)
            break;
    }
    ck_assert_uint_gt(fail_at, 10);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("prefix");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_set_timeout(core, 600);
    tcase_add_test(core, longest_run_of_whole_blocks_is_found);
    tcase_add_test(core, another_entry_serves_when_one_goes);
    tcase_add_test(core, salts_do_not_meet);
    tcase_add_test(core, parked_entries_go_by_last_use);
    tcase_add_loop_test(core, agrees_with_a_plain_table, 0, 5);
    tcase_add_loop_test(limits, wrong_configurations_name_the_field, 0, 4);
    tcase_add_test(limits, full_index_knows_less_and_goes_on);
    tcase_add_test(faults, nth_allocation_fails_and_nothing_is_lost);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
