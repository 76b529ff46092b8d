/* memory_faults.c - the KV pool when the n-th call that a back end makes fails, for every n. */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "tests/memory_fixture.h"

struct footprint {
    unsigned fds;
    unsigned pool_mappings;
    uint64_t address_bytes;
};

static struct footprint footprint(void)
{
    struct footprint p = {0};
    DIR *d = opendir("/proc/self/fd");
    while (readdir(d))
        p.fds++;
    closedir(d);
    FILE *f = fopen("/proc/self/maps", "r");
    char line[1024];
    while (fgets(line, sizeof line, f)) {
        uint64_t from, to;
        p.pool_mappings += strstr(line, "memfd:tandem-kv") != NULL;
        if (sscanf(line, "%" SCNx64 "-%" SCNx64, &from, &to) == 2)
            p.address_bytes += to - from;
    }
    fclose(f);
    return p;
}

/* Slots big enough that a lost reservation (4 GiB) stands out from what the heap does. */
static struct kv_pool_config roomy_config(const struct back_end *be)
{
    struct kv_pool_config c = small_config(be);
    c.max_tokens = (uint32_t)((1u << 30) / TOKEN);
    c.suspend_bytes = 2 * 16 * PAGE;
    return c;
}

static void expect_footprint(const struct footprint *before, const char *where, int nth)
{
    struct footprint now = footprint();
    ck_assert_msg(now.fds == before->fds, "%s %d: %u files open, %u before", where, nth, now.fds, before->fds);
    ck_assert_msg(now.pool_mappings == before->pool_mappings, "%s %d: pages are still mapped", where, nth);
    ck_assert_msg(now.address_bytes < before->address_bytes + (512u << 20), "%s %d: %" PRIu64 " MiB of addresses lost",
                  where, nth, (now.address_bytes - before->address_bytes) >> 20);
}

START_TEST(destroy_gives_everything_back)
{
    struct kv_pool_config cfg = roomy_config(&back_ends[_i]);
    count_driver_calls(&back_ends[_i]);
    kv_pool_destroy(make(&cfg)); /* what a driver opens once and keeps */
    struct footprint before = footprint();
    for (int i = 0; i < 20; i++) {
        struct kv_pool *pool = make(&cfg);
        for (uint64_t step = 0; step < 8; step++) { /* makes extra ranges too: nothing completes */
            grow(pool, 1, 20);
            kv_slot_release(pool, 1, step);
        }
        kv_pool_destroy(pool);
        expect_footprint(&before, "round", i);
    }
}
END_TEST

START_TEST(create_survives_the_failure_of_any_call)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = roomy_config(be);
    count_driver_calls(be);
    kv_pool_destroy(make(&cfg)); /* what a driver opens once and keeps */
    struct footprint before = footprint();
    int n = 1;
    for (;; n++) {
        struct status st = STATUS_INIT;
        struct kv_pool *pool = NULL;
        fail_call = n;
        enum status_code rc = kv_pool_create(&pool, &cfg, &st);
        bool reached = fail_call == 0;
        fail_call = 0;
        if (!reached) {
            ck_assert_int_eq(rc, ST_OK);
            kv_pool_destroy(pool);
            break;
        }
        ck_assert_msg(rc == ST_RESOURCE_EXHAUSTED, "call %d: %s", n, status_name(rc));
        ck_assert_msg(strlen(st.message) > 10, "call %d: no message", n);
        ck_assert_ptr_null(pool);
        expect_footprint(&before, "call", n);
        expect_rules_kept(be, 0);
    }
    ck_assert_int_gt(n, 5);
}
END_TEST

START_TEST(interrupted_commit_is_tried_again)
{
    struct kv_pool_config cfg = small_config(&back_ends[0]);
    int n = 1;
    for (;; n++) { /* find the fallocate call: the only one for which EINTR is no failure */
        struct kv_pool *pool = NULL;
        fail_call = n;
        fail_errno = EINTR;
        enum status_code rc = kv_pool_create(&pool, &cfg, NULL);
        bool reached = fail_call == 0;
        fail_call = fail_errno = 0;
        ck_assert_msg(reached, "no call was tried again");
        if (rc == ST_OK) {
            grow(pool, 0, 100);
            kv_pool_destroy(pool);
            return;
        }
    }
}
END_TEST

START_TEST(grow_survives_the_failure_of_any_call)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    count_driver_calls(be);
    int n = 1, failures = 0;
    for (bool reached = true; reached; n++) {
        struct kv_pool *pool = make(&cfg);
        for (uint32_t s = 0; s < 4; s++) /* interleaved, so that no two pages of a slot are neighbours */
            for (uint32_t t = 10; t <= 50; t += 10)
                grow(pool, s, t);
        fill(be, pool, 3, 3);
        for (uint32_t s = 0; s < 3; s++)
            kv_slot_release(pool, s, s);
        kv_pool_complete(pool, 1); /* 2 is still in flight */
        struct kv_stats before = kv_pool_stats(pool);
        fail_call = n;
        struct status st = STATUS_INIT;
        enum status_code rc = kv_slot_grow(pool, 3, 100, &st); /* unmaps from two ranges, then maps in pieces */
        reached = fail_call == 0;
        fail_call = 0;
        ck_assert_int_eq(rc, reached ? ST_RESOURCE_EXHAUSTED : ST_OK);
        if (reached) {
            failures++;
            ck_assert_ptr_nonnull(strstr(st.message, "slot 3"));
            expect(pool, before.mapped_pages, before.fenced_pages, before.free_pages);
            ck_assert_uint_eq(kv_slot_tokens(pool, 3), 50);
            expect_bytes(be, kv_slot_view(pool, 3, 0).k, 50 * TOKEN, 3);
            grow(pool, 3, 100); /* works when asked again */
        }
        expect_bytes(be, kv_slot_view(pool, 3, 0).k, 50 * TOKEN, 3);
        expect_bytes(be, kv_slot_view(pool, 3, 0).k + 50 * TOKEN, 50 * TOKEN, 0);
        kv_pool_destroy(pool);
    }
    ck_assert_int_ge(failures, injects(be) ? 2 : 0);
}
END_TEST

START_TEST(extra_range_survives_the_failure_of_any_call)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    count_driver_calls(be);
    cfg.slots = 1;
    int failures = 0;
    for (int n = 1;; n++) {
        struct kv_pool *pool = make(&cfg);
        grow(pool, 0, 10);
        kv_slot_release(pool, 0, 1);
        fail_call = n; /* the second range: a bigger table, the range, the back end's table, its addresses, the page */
        enum status_code rc = kv_slot_grow(pool, 0, 10, NULL);
        bool reached = fail_call == 0;
        fail_call = 0;
        failures += rc != ST_OK;
        ck_assert_int_eq(rc, reached ? ST_RESOURCE_EXHAUSTED : ST_OK);
        expect(pool, reached ? 0 : 1, 1, reached ? 19 : 18);
        grow(pool, 0, 20);
        kv_pool_destroy(pool);
        if (!reached)
            break;
    }
    ck_assert_int_ge(failures, injects(be) ? 5 : 3);
}
END_TEST

/* Slot 0 has 50 tokens, all others together what is left. */
static struct kv_pool *crowded_pool(const struct back_end *be, bool suspended)
{
    struct kv_pool_config cfg = small_config(be);
    cfg.suspend_bytes = 16 * PAGE;
    struct kv_pool *pool = make(&cfg);
    grow(pool, 0, 50);
    fill(be, pool, 0, 7);
    if (suspended)
        ck_assert_int_eq(kv_slot_suspend(pool, 0, NULL), ST_OK);
    for (uint32_t s = 1; s < 4; s++) /* stale positions, for the way back */
        grow(pool, s, s < 3 || suspended ? 60 : 10);
    kv_slot_release(pool, 2, 1);
    kv_pool_complete(pool, 1);
    return pool;
}

/* There and, in the second half of the rounds, back. */
START_TEST(suspension_survives_the_failure_of_any_call)
{
    const struct back_end *be = &back_ends[_i];
    count_driver_calls(be);
    int failures[2] = {0};
    for (int back = 0; back < 2; back++)
        for (int n = 1, reached = 1; reached; n++) {
            struct kv_pool *pool = crowded_pool(be, back);
            struct kv_stats before = kv_pool_stats(pool);
            struct status st = STATUS_INIT;
            fail_call = n;
            enum status_code rc = back ? kv_slot_resume(pool, 0, &st) : kv_slot_suspend(pool, 0, &st);
            reached = fail_call == 0;
            fail_call = 0;
            ck_assert_int_eq(rc, reached ? ST_RESOURCE_EXHAUSTED : ST_OK);
            if (reached) {
                failures[back]++;
                ck_assert_ptr_nonnull(strstr(st.message, "slot 0"));
                expect(pool, before.mapped_pages, before.fenced_pages, before.free_pages);
                ck_assert_uint_eq(kv_pool_stats(pool).suspended_bytes, before.suspended_bytes);
                ck_assert_int_eq(kv_pool_check(pool, &st), ST_OK);
                rc = back ? kv_slot_resume(pool, 0, &st) : kv_slot_suspend(pool, 0, &st);
                ck_assert_msg(rc == ST_OK, "%s", st.message); /* works when asked again */
            }
            if (!back)
                ck_assert_int_eq(kv_slot_resume(pool, 0, NULL), ST_OK);
            ck_assert_uint_eq(kv_slot_tokens(pool, 0), 50);
            expect_bytes(be, kv_slot_view(pool, 0, 0).k, 50 * TOKEN, 7);
            ck_assert_int_eq(kv_pool_check(pool, NULL), ST_OK);
            kv_pool_destroy(pool);
        }
    /* the host copies there without a call; back it maps */
    ck_assert_int_ge(failures[0], control(be) ? 5 : 0);
    ck_assert_int_ge(failures[1], control(be) ? 6 : be->ops == &kv_ops_host ? 1 : 0);
}
END_TEST

/* --- sharing, and an elastic pool --- */

/* What fails at its n-th call, on a pool of small_config. */
struct faulty {
    const char *name;
    const char *says; /* in the message of any failure */
    bool keeps_count; /* total_pages is as before; else it says how far the call came */
    int least;        /* failures there are at the least: on the host, and with the imitated driver */
    int least_driver;
    void (*prepare)(const struct back_end *be, struct kv_pool *pool);
    enum status_code (*once)(struct kv_pool *pool, struct status *st);
    void (*instead)(const struct back_end *be, struct kv_pool *pool); /* before it is asked again; NULL: nothing */
    void (*after)(const struct back_end *be, struct kv_pool *pool);   /* when it has succeeded at last */
};

/* Slot 0 has 50 tokens, 4.69 pages; slots 1 and 2 have had as many, side by side with it, and leave stale and free pages. */
static void three_slots(const struct back_end *be, struct kv_pool *pool)
{
    for (uint32_t t = 10; t <= 50; t += 10)
        for (uint32_t s = 0; s < 3; s++)
            grow(pool, s, t);
    fill(be, pool, 0, 5);
    fill(be, pool, 1, 0xee);
    kv_slot_release(pool, 1, 1);
    kv_slot_release(pool, 2, 2);
    kv_pool_complete(pool, 1); /* 2 is still in flight */
}

/* As above, and all ranges are in use: the slot that is to share gets a new one. */
static void no_idle_range(const struct back_end *be, struct kv_pool *pool)
{
    three_slots(be, pool);
    grow(pool, 3, 10);
    for (uint64_t step = 3; step < 6; step++) {
        grow(pool, 1, 1);
        kv_slot_release(pool, 1, step);
    }
}

static enum status_code share_prefix(struct kv_pool *pool, struct status *st)
{
    return kv_slot_share(pool, 1, 0, 43, st); /* 4.03 pages: the last copies a bit of one */
}

static enum status_code fork_slot(struct kv_pool *pool, struct status *st)
{
    return kv_slot_share(pool, 1, 0, 50, st);
}

/* What the failed call has written into free pages is not seen by whoever gets them. */
static void expect_fresh(const struct back_end *be, struct kv_pool *pool)
{
    grow(pool, 1, 50);
    expect_bytes(be, kv_slot_view(pool, 1, 0).k, 50 * TOKEN, 0);
    kv_slot_release(pool, 1, 1); /* which has finished */
}

/* Slot 1 has the first tokens of slot 0, and what each writes behind them the other does not see. */
static void expect_shared(const struct back_end *be, struct kv_pool *pool)
{
    uint32_t n = kv_slot_tokens(pool, 1);
    ck_assert_uint_eq(kv_pool_stats(pool).shared_pages, n * TOKEN / PAGE);
    grow(pool, 1, 60);
    uint8_t *at = kv_slot_view(pool, 1, 0).k;
    expect_bytes(be, at, n * TOKEN, 5);
    expect_bytes(be, at + n * TOKEN, (60 - n) * TOKEN, 0);
    uint8_t nine[64];
    memset(nine, 9, sizeof nine);
    be->put(at + n * TOKEN, nine, sizeof nine);
    expect_bytes(be, kv_slot_view(pool, 0, 0).k, 50 * TOKEN, 5);
}

static void forked(const struct back_end *be, struct kv_pool *pool)
{
    three_slots(be, pool);
    ck_assert_int_eq(fork_slot(pool, NULL), ST_OK);
}

static enum status_code suspend_fork(struct kv_pool *pool, struct status *st)
{
    return kv_slot_suspend(pool, 0, st);
}

static void suspended_fork(const struct back_end *be, struct kv_pool *pool)
{
    forked(be, pool);
    ck_assert_int_eq(suspend_fork(pool, NULL), ST_OK);
    kv_pool_complete(pool, 2);
    grow(pool, 3, 60); /* takes what slot 0 had */
}

static enum status_code resume_fork(struct kv_pool *pool, struct status *st)
{
    return kv_slot_resume(pool, 0, st);
}

static void expect_alone(const struct back_end *be, struct kv_pool *pool)
{
    if (kv_slot_suspended(pool, 0))
        ck_assert_int_eq(resume_fork(pool, NULL), ST_OK);
    ck_assert_uint_eq(kv_pool_stats(pool).shared_pages, 0);
    expect_bytes(be, kv_slot_view(pool, 0, 0).k, 50 * TOKEN, 5);
    expect_bytes(be, kv_slot_view(pool, 1, 0).k, 50 * TOKEN, 5);
}

static enum status_code give_back(struct kv_pool *pool, struct status *st)
{
    return kv_pool_resize(pool, 11, st); /* 5 are held, 5 fenced; 4 of these 9 are mapped in an idle range */
}

static void smaller(const struct back_end *be, struct kv_pool *pool)
{
    three_slots(be, pool);
    ck_assert_int_eq(give_back(pool, NULL), ST_OK);
}

static enum status_code take_again(struct kv_pool *pool, struct status *st)
{
    return kv_pool_resize(pool, 20, st);
}

static void expect_whole(const struct back_end *be, struct kv_pool *pool)
{
    ck_assert_int_eq(take_again(pool, NULL), ST_OK);
    kv_pool_complete(pool, 2);
    expect(pool, 5, 0, 15);
    grow(pool, 3, 100);
    expect_bytes(be, kv_slot_view(pool, 3, 0).k, 100 * TOKEN, 0);
    expect_bytes(be, kv_slot_view(pool, 0, 0).k, 50 * TOKEN, 5);
}

static const struct faulty faulty[] = {
    {"share", "slot 1, 43 tokens of slot 0: ", true, 5, 10, three_slots, share_prefix, expect_fresh, expect_shared},
    {"fork", "slot 1, 50 tokens of slot 0: ", true, 5, 10, three_slots, fork_slot, expect_fresh, expect_shared},
    {"fork, new range", "slot 1, 50 tokens of", true, 7, 12, no_idle_range, fork_slot, expect_fresh, expect_shared},
    {"suspend a fork", "slot 0: ", true, 0, 6, forked, suspend_fork, NULL, expect_alone}, /* the host makes no call */
    {"resume a fork", "slot 0: ", true, 5, 14, suspended_fork, resume_fork, NULL, expect_alone},
    {"shrink", "pages", false, 11, 11, three_slots, give_back, NULL, expect_whole},
    {"extend", "pages: ", false, 9, 9, smaller, take_again, NULL, expect_whole},
};
#define N_FAULTY ((int)(sizeof faulty / sizeof *faulty))

/* The failure left everything as it was, but how many pages the machine has. */
static void expect_unchanged(struct kv_pool *pool, const struct faulty *f, int nth, const struct kv_stats *before)
{
    struct status st = STATUS_INIT;
    struct kv_stats now = kv_pool_stats(pool);
    ck_assert_msg(kv_pool_check(pool, &st) == ST_OK, "%s, call %d: %s", f->name, nth, st.message);
    ck_assert_msg(now.total_pages + now.given_pages == 20, "%s, call %d: %" PRIu64 " pages, %" PRIu64 " given back",
                  f->name, nth, now.total_pages, now.given_pages);
    ck_assert_uint_eq(now.total_pages, kv_pool_account(pool).total_pages);
    ck_assert_msg(!f->keeps_count || now.total_pages == before->total_pages, "%s, call %d: %" PRIu64 " pages", f->name,
                  nth, now.total_pages);
    expect(pool, before->mapped_pages, before->fenced_pages,
           before->free_pages + now.total_pages - before->total_pages);
    ck_assert_uint_eq(now.shared_pages, before->shared_pages);
    ck_assert_uint_eq(now.wasted_bytes, before->wasted_bytes);
    ck_assert_uint_eq(now.suspended_bytes, before->suspended_bytes);
}

/* Whether there was an n-th call to fail. */
static bool fails_once(const struct back_end *be, const struct faulty *f, int nth)
{
    struct kv_pool_config cfg = small_config(be);
    struct status st = STATUS_INIT;
    cfg.suspend_bytes = 16 * PAGE;
    struct kv_pool *pool = make(&cfg);
    f->prepare(be, pool);
    struct kv_stats before = kv_pool_stats(pool);
    fail_call = nth;
    enum status_code rc = f->once(pool, &st);
    bool reached = fail_call == 0;
    fail_call = 0;
    ck_assert_msg(rc == (reached ? ST_RESOURCE_EXHAUSTED : ST_OK), "%s, call %d: %s", f->name, nth, status_name(rc));
    if (reached) {
        ck_assert_msg(strstr(st.message, f->says), "%s, call %d: %s", f->name, nth, st.message);
        expect_unchanged(pool, f, nth, &before);
        if (f->instead && nth % 2)
            f->instead(be, pool);
        rc = f->once(pool, &st); /* works when asked again */
        ck_assert_msg(rc == ST_OK, "%s, call %d, again: %s", f->name, nth, st.message);
    }
    f->after(be, pool);
    ck_assert_msg(kv_pool_check(pool, &st) == ST_OK, "%s, call %d: %s", f->name, nth, st.message);
    kv_pool_destroy(pool);
    expect_rules_kept(be, 0);
    return reached;
}

START_TEST(sharing_and_resizing_survive_the_failure_of_any_call)
{
    const struct back_end *be = &back_ends[_i];
    count_driver_calls(be);
    for (int i = 0; i < N_FAULTY; i++) {
        int failures = 0;
        while (fails_once(be, &faulty[i], failures + 1))
            failures++;
        int least = control(be) ? faulty[i].least_driver : injects(be) ? faulty[i].least : 0;
        ck_assert_msg(failures >= least, "%s: %d calls, expected %d or more", faulty[i].name, failures, least);
    }
}
END_TEST

void memory_fault_cases(TCase *faults, int first, int end)
{
#define EACH(test) tcase_add_loop_test(faults, test, first, end)
    EACH(destroy_gives_everything_back);
    EACH(create_survives_the_failure_of_any_call);
    EACH(grow_survives_the_failure_of_any_call);
    EACH(extra_range_survives_the_failure_of_any_call);
    EACH(suspension_survives_the_failure_of_any_call);
    EACH(sharing_and_resizing_survive_the_failure_of_any_call);
#undef EACH
    tcase_add_test(faults, interrupted_commit_is_tried_again);
}
