/* check_scheduler_resize.c - KV memory given back and taken again, by hand; the simulator does the rest. */
#include <string.h>

#include "tests/check_scheduler.h"

/* 20 pages of 4 tokens, 4 slots, one plan in flight. */
static struct sched *small(bool cache)
{
    struct sched_config cfg = config(4, 64, 1);
    cfg.kv.total_pages = 20;
    cfg.prefix_cache = cache;
    return create_attached(cfg);
}

static struct sched_plan bare_plan(struct sched *s, uint64_t kv_pages)
{
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.rows, 0);
    ck_assert_uint_eq(p.kv_pages, kv_pages);
    return p;
}

static void expect_pages(const struct sched *s, uint64_t total, uint64_t goal)
{
    struct sched_load l = sched_load(s);
    ck_assert_uint_eq(l.total_pages, total);
    ck_assert_uint_eq(l.goal_pages, goal);
}

static void end_of(struct sched *s, uint64_t id, uint64_t from, uint32_t tokens)
{
    for (uint32_t i = 0; i < tokens; i++) {
        if (i)
            plan(s);
        RESULT(s, from + i, 1);
        expect_token(s, id, 1);
    }
    expect_finished(s, id);
}

START_TEST(an_idle_group_gives_pages_at_once)
{
    struct sched *s = small(false);
    sched_set_pages(s, 5);
    bare_plan(s, 5);
    expect_pages(s, 5, 0);
    result(s, 1, 0, NULL);
    no_plan(s);
    finish(s);
}
END_TEST

START_TEST(a_large_pool_goes_in_pieces)
{
    struct sched *s = create_attached(config(4, 64, 1));
    sched_set_pages(s, 900);
    bare_plan(s, 936);
    expect_pages(s, 936, 900);
    result(s, 1, 0, NULL);
    bare_plan(s, 900);
    result(s, 2, 0, NULL);
    finish(s);
}
END_TEST

/* A request of 17 pages runs: it keeps what it may need, and what comes after it is measured by what will be left. */
START_TEST(what_runs_keeps_its_pages)
{
    struct sched *s = small(false);
    struct status st = STATUS_INIT;
    submit(s, 1, 60, 8); /* 67 tokens are fed */
    ck_assert_uint_eq(plan(s).kv_pages, 0);
    sched_set_pages(s, 5);
    ck_assert_int_eq(submit_until(s, 2, 20, 8, INT64_MAX, &st), ST_INVALID_ARGUMENT);
    ck_assert_msg(strstr(st.message, "7 pages of 4096 bytes, the KV memory has 5"), "%s", st.message);
    RESULT(s, 1, 1);
    expect_token(s, 1, 1);
    ck_assert_uint_eq(plan(s).kv_pages, 17);
    expect_pages(s, 17, 5);
    end_of(s, 1, 2, 7);
    struct sched_plan p = bare_plan(s, 5);
    ck_assert_uint_eq(p.n_release, 1);
    result(s, 9, 0, NULL);
    expect_pages(s, 5, 0);
    finish(s);
}
END_TEST

START_TEST(kept_prefixes_go_first)
{
    struct sched *s = small(true);
    submit(s, 1, 40, 1);
    plan(s);
    end_of(s, 1, 1, 1);
    ck_assert_uint_eq(sched_load(s).kept_pages, 10);
    sched_set_pages(s, 12);
    struct sched_plan p = bare_plan(s, 12); /* there are 10 free ones */
    ck_assert_uint_eq(p.n_release, 0);
    result(s, 2, 0, NULL);
    ck_assert_uint_eq(sched_load(s).kept_pages, 10);
    sched_set_pages(s, 6);
    p = bare_plan(s, 6);
    ck_assert_uint_eq(p.n_release, 1);
    ck_assert_uint_eq(sched_load(s).kept_pages, 0);
    result(s, 3, 0, NULL);
    finish(s);
}
END_TEST

START_TEST(more_pages_count_when_the_ranks_have_them)
{
    struct sched *s = small(false);
    struct status st = STATUS_INIT;
    sched_set_pages(s, 2);
    bare_plan(s, 2);
    result(s, 1, 0, NULL);
    sched_set_pages(s, 20);
    ck_assert_uint_eq(sched_pages_asked(s), 0);
    bare_plan(s, 20);
    ck_assert_uint_eq(sched_pages_asked(s), 2);
    expect_pages(s, 2, 20);
    result(s, 2, 0, NULL);
    ck_assert_int_eq(submit_until(s, 1, 20, 8, INT64_MAX, &st), ST_INVALID_ARGUMENT); /* they may not come */
    no_plan(s);
    ck_assert(!sched_pages_are(s, 23)); /* the others have more; all have 20 */
    sched_check(s);
    expect_pages(s, 20, 0);
    submit(s, 1, 20, 1);
    plan(s);
    end_of(s, 1, 3, 1);
    plan(s);
    result(s, 4, 0, NULL);
    finish(s);
}
END_TEST

/* The ranks that did get them give them back, and nobody asks again by himself. */
START_TEST(what_the_machine_does_not_have_is_given_up)
{
    struct sched *s = small(false);
    sched_set_pages(s, 2);
    bare_plan(s, 2);
    result(s, 1, 0, NULL);
    sched_set_pages(s, 20);
    bare_plan(s, 20);
    result(s, 2, 0, NULL);
    ck_assert(sched_pages_are(s, 9));
    sched_check(s);
    expect_pages(s, 9, 0);
    bare_plan(s, 9);
    result(s, 3, 0, NULL);
    ck_assert(!sched_pages_are(s, 9)); /* nobody has asked */
    finish(s);
}
END_TEST

START_TEST(a_lost_group_takes_the_wish_with_it)
{
    struct sched *s = small(false);
    struct kv_account kv = ROOMY;
    sched_set_pages(s, 2);
    bare_plan(s, 2);
    sched_set_pages(s, 20);
    sched_lose(s, 0);
    sched_check(s);
    ck_assert_int_eq(sched_attach(s, 0, 4, 256, &kv, NULL), ST_OK);
    expect_pages(s, ROOMY.total_pages, 0);
    finish(s);
}
END_TEST

TCase *scheduler_resize(void)
{
    TCase *resize = tcase_create("resize");
    tcase_add_test(resize, an_idle_group_gives_pages_at_once);
    tcase_add_test(resize, a_large_pool_goes_in_pieces);
    tcase_add_test(resize, what_runs_keeps_its_pages);
    tcase_add_test(resize, kept_prefixes_go_first);
    tcase_add_test(resize, more_pages_count_when_the_ranks_have_them);
    tcase_add_test(resize, what_the_machine_does_not_have_is_given_up);
    tcase_add_test(resize, a_lost_group_takes_the_wish_with_it);
    return resize;
}
