/* check_shard.c - worker/shard.h: every head, column and row is held, and held as attention.h wants it. */
#include <check.h>
#include <stdlib.h>

#include "worker/shard.h"

START_TEST(even_split_covers_everything_once)
{
    for (uint32_t ranks = 1; ranks <= SHARD_MAX_RANKS; ranks++)
        for (uint32_t n = 0; n < 2000; n = n < 70 ? n + 1 : n + 97) {
            uint32_t next = 0;
            for (uint32_t r = 0; r < ranks; r++) {
                struct shard_span s = shard_even(n, r, ranks);
                ck_assert_uint_eq(s.first, next);
                ck_assert_uint_eq(s.count, n / ranks + (r < n % ranks)); /* the remainder to the first ranks */
                next += s.count;
            }
            ck_assert_uint_eq(next, n);
        }
}
END_TEST

static void check_heads(uint32_t heads, uint32_t kv_heads, uint32_t ranks)
{
    uint32_t group = heads / kv_heads, next = 0;
    uint32_t *holders = calloc(kv_heads, sizeof *holders);
    for (uint32_t r = 0; r < ranks; r++) {
        struct shard_span q, kv;
        shard_heads(&q, &kv, heads, kv_heads, r, ranks);
        if (q.count == 0) {
            ck_assert_uint_eq(kv.count, 0);
            continue;
        }
        ck_assert_msg(q.first == next, "H %u HK %u R %u rank %u: begins at %u, expected %u", heads, kv_heads, ranks, r,
                      q.first, next);
        next += q.count;
        ck_assert_uint_ge(kv.count, 1);
        ck_assert_uint_le(kv.first + kv.count, kv_heads);
        /* attention pairs local query head i with local KV head i / (H_loc / HK_loc): it must be the right one */
        ck_assert_uint_eq(q.count % kv.count, 0);
        for (uint32_t i = 0; i < q.count; i++)
            ck_assert_uint_eq(kv.first + i / (q.count / kv.count), (q.first + i) / group);
        for (uint32_t i = 0; i < kv.count; i++)
            holders[kv.first + i]++;
    }
    ck_assert_uint_eq(next, heads);
    for (uint32_t j = 0; j < kv_heads; j++) {
        ck_assert_uint_ge(holders[j], 1);
        if (ranks <= kv_heads)
            ck_assert_uint_eq(holders[j], 1);
        else
            ck_assert_uint_le(holders[j], (ranks + kv_heads - 1) / kv_heads);
    }
    free(holders);
}

START_TEST(query_heads_are_covered_once_and_meet_their_kv_head)
{
    for (uint32_t ranks = 1; ranks <= SHARD_MAX_RANKS; ranks++)
        for (uint32_t kv_heads = 1; kv_heads <= 40; kv_heads++)
            for (uint32_t group = 1; group <= 17; group++)
                check_heads(kv_heads * group, kv_heads, ranks);
}
END_TEST

START_TEST(kv_heads_are_balanced_when_there_are_enough)
{
    for (uint32_t ranks = 1; ranks <= SHARD_MAX_RANKS; ranks++)
        for (uint32_t kv_heads = ranks; kv_heads <= 40; kv_heads++) {
            uint32_t least = kv_heads, most = 0;
            for (uint32_t r = 0; r < ranks; r++) {
                struct shard_span q, kv;
                shard_heads(&q, &kv, kv_heads * 4, kv_heads, r, ranks);
                least = kv.count < least ? kv.count : least;
                most = kv.count > most ? kv.count : most;
            }
            ck_assert_uint_le(most - least, 1);
        }
}
END_TEST

static void expect_heads(uint32_t heads, uint32_t kv_heads, uint32_t ranks, const uint32_t *q_count,
                         const uint32_t *kv_first)
{
    for (uint32_t r = 0; r < ranks; r++) {
        struct shard_span q, kv;
        shard_heads(&q, &kv, heads, kv_heads, r, ranks);
        ck_assert_uint_eq(q.count, q_count[r]);
        if (q.count)
            ck_assert_uint_eq(kv.first, kv_first[r]);
    }
}

START_TEST(examples_of_the_header_hold)
{
    expect_heads(6, 3, 2, (uint32_t[]){4, 2}, (uint32_t[]){0, 2});
    expect_heads(6, 1, 4, (uint32_t[]){2, 2, 1, 1}, (uint32_t[]){0, 0, 0, 0});
    expect_heads(32, 8, 8, (uint32_t[]){4, 4, 4, 4, 4, 4, 4, 4}, (uint32_t[]){0, 1, 2, 3, 4, 5, 6, 7});
    /* more ranks than KV heads: rows 0-1, 2-4, 5-7 share one KV head each, and two ranks are left without heads */
    expect_heads(6, 3, 8, (uint32_t[]){1, 1, 1, 1, 0, 1, 1, 0}, (uint32_t[]){0, 0, 1, 1, 0, 2, 2, 0});
    for (uint32_t r = 0; r < 3; r++)
        ck_assert_uint_eq(shard_even(512, r, 3).count, r < 2 ? 171 : 170);
}
END_TEST

START_TEST(units_are_whole_and_cover_everything_once)
{
    for (uint32_t ranks = 1; ranks <= SHARD_MAX_RANKS; ranks++)
        for (uint32_t n = 1; n < 2000; n = n < 70 ? n + 1 : n + 97) {
            uint32_t next = 0;
            for (uint32_t r = 0; r < ranks; r++) {
                struct shard_span s = shard_units(n, SHARD_DEVICE_UNIT, r, ranks);
                ck_assert_uint_eq(s.first, next);
                ck_assert(s.count == 0 || s.first % SHARD_DEVICE_UNIT == 0);
                next += s.count;
            }
            ck_assert_uint_eq(next, n);
        }
}
END_TEST

START_TEST(fewer_items_than_ranks_leave_the_last_ranks_empty)
{
    for (uint32_t r = 0; r < SHARD_MAX_RANKS; r++) {
        struct shard_span s = shard_units(40, SHARD_DEVICE_UNIT, r, SHARD_MAX_RANKS);
        ck_assert_uint_eq(s.first, r < 5 ? 8 * r : 40);
        ck_assert_uint_eq(s.count, r < 5 ? 8 : 0);
    }
    for (uint32_t r = 0; r < 8; r++) {
        ck_assert_uint_eq(shard_even(3, r, 8).count, r < 3);
        struct shard_span q, kv;
        shard_heads(&q, &kv, 1, 1, r, 8);
        ck_assert_uint_eq(q.count, r == 0);
        ck_assert_uint_eq(kv.count, r == 0);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("shard");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits");
    tcase_add_test(core, even_split_covers_everything_once);
    tcase_add_test(core, query_heads_are_covered_once_and_meet_their_kv_head);
    tcase_add_test(core, kv_heads_are_balanced_when_there_are_enough);
    tcase_add_test(core, examples_of_the_header_hold);
    tcase_add_test(core, units_are_whole_and_cover_everything_once);
    tcase_add_test(limits, fewer_items_than_ranks_leave_the_last_ranks_empty);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
