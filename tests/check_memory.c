/* check_memory.c - the KV pool: one table of tests over all back ends, and a random walk against a plain model; with
 * memory_faults.c, where each call that a back end makes fails once.
 *
 *     check_memory          the host back end, and the CUDA back end over an imitation of the driver (fake_cuda.c)
 *     check_memory cuda     the CUDA back end on the GPU; 77 when there is none. All tests in one process with one context,
 *                           which takes longer to make than most of them to run; --quick: short walks, for compute-sanitizer
 *
 * TANDEM_TEST_SEED and TANDEM_TEST_STEPS change the random walk: 4000 steps and more are for a run by hand.
 */
#include <dirent.h>
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tests/memory_fixture.h"

static bool quick;

/* --- core --- */

START_TEST(slot_is_contiguous_across_page_edges)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    struct kv_pool *pool = make(&cfg);
    grow(pool, 1, 5);
    grow(pool, 2, 30);
    grow(pool, 1, 90); /* pages of slot 1 are no neighbours any more */
    /* every row by the documented strides, then all at once by plain addresses */
    struct kv_account a = kv_pool_account(pool);
    uint32_t dim = cfg.head_dim;
    float *want = malloc(90 * a.token_bytes), *got = malloc(90 * a.token_bytes), *row = want;
    for (uint32_t t = 0; t < 90; t++)
        for (uint32_t layer = 0; layer < 2; layer++)
            for (uint32_t half = 0; half < 2; half++)
                for (uint32_t h = 0; h < 3; h++, row += dim) {
                    struct kv_view v = kv_slot_view(pool, 1, layer);
                    for (uint32_t d = 0; d < dim; d++)
                        row[d] = (float)(((t * 2 + layer) * 2 + half) * 100 + h * 10 + d);
                    be->put((half ? v.v : v.k) + t * v.token_stride + h * v.head_stride, row, dim * 4);
                }
    ck_assert_int_eq((row - want) * 4, 90 * a.token_bytes);
    be->get(got, kv_slot_view(pool, 1, 0).k, 90 * a.token_bytes);
    ck_assert_int_eq(memcmp(got, want, 90 * a.token_bytes), 0);
    free(want);
    free(got);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(strides_follow_the_token_major_layout)
{
    struct kv_pool_config cfg = small_config(&back_ends[_i]);
    cfg.elem_bytes = 2;
    cfg.head_dim = 48;
    cfg.kv_heads = 5;
    cfg.layers = 3;
    struct kv_pool *pool = make(&cfg);
    grow(pool, 3, 1);
    struct kv_view v0 = kv_slot_view(pool, 3, 0), v2 = kv_slot_view(pool, 3, 2);
    ck_assert_uint_eq(v0.head_stride, 96);
    ck_assert_uint_eq(v0.token_stride, 3 * 2 * 5 * 96);
    ck_assert_int_eq(v0.v - v0.k, 5 * 96);
    ck_assert_int_eq(v2.k - v0.k, 2 * 2 * 5 * 96);
    ck_assert_uint_eq((uintptr_t)v0.k % cfg.page_bytes, 0);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(account_is_what_the_pool_maps)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    struct kv_pool *pool = make(&cfg);
    struct kv_account a = kv_pool_account(pool);
    ck_assert_uint_eq(a.page_bytes, cfg.page_bytes);
    ck_assert_uint_eq(a.token_bytes, TOKEN);
    ck_assert_uint_eq(a.total_pages, 20);
    for (uint32_t t = 1; t <= 100; t++) {
        grow(pool, 0, t);
        uint64_t pages = kv_pages_for(&a, t);
        expect(pool, pages, 0, 20 - pages);
        ck_assert_uint_eq(kv_pool_stats(pool).wasted_bytes, pages * a.page_bytes - t * a.token_bytes);
    }
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(grow_never_shrinks_and_keeps_content_and_address)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    struct kv_pool *pool = make(&cfg);
    grow(pool, 0, 17);
    fill(be, pool, 0, 0x5a);
    uint8_t *k = kv_slot_view(pool, 0, 0).k;
    grow(pool, 0, 3);
    ck_assert_uint_eq(kv_slot_tokens(pool, 0), 17);
    grow(pool, 0, 100);
    ck_assert_ptr_eq(kv_slot_view(pool, 0, 0).k, k);
    expect_bytes(be, k, 17 * TOKEN, 0x5a);
    expect_bytes(be, k + 17 * TOKEN, (100 - 17) * TOKEN, 0);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(released_pages_wait_for_the_fence)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    struct kv_pool *pool = make(&cfg);
    grow(pool, 0, 40); /* 4 pages */
    kv_slot_release(pool, 0, 7);
    ck_assert_uint_eq(kv_slot_tokens(pool, 0), 0);
    expect(pool, 0, 4, 16);
    kv_pool_complete(pool, 6);
    expect(pool, 0, 4, 16);
    kv_pool_complete(pool, 9);
    expect(pool, 0, 0, 20);
    grow(pool, 0, 40);
    kv_slot_release(pool, 0, 9); /* 9 has finished already */
    expect(pool, 0, 0, 20);
    kv_pool_complete(pool, 3); /* goes back: nothing happens */
    grow(pool, 0, 40);
    kv_slot_release(pool, 0, 10);
    expect(pool, 0, 4, 16);
    kv_slot_release(pool, 0, 10); /* empty */
    kv_slot_release(pool, 3, 10);
    expect(pool, 0, 4, 16);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(step_in_flight_still_reads_a_slot_that_was_grown_again)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    struct kv_pool *pool = make(&cfg);
    const uint8_t *old[3];
    for (uint32_t i = 0; i < 3; i++) { /* released and grown again twice before any step has finished */
        grow(pool, 2, 30);
        old[i] = kv_slot_view(pool, 2, 0).k;
        fill(be, pool, 2, (uint8_t)(i + 1));
        if (i < 2)
            kv_slot_release(pool, 2, i);
    }
    for (uint32_t i = 0; i < 3; i++)
        expect_bytes(be, old[i], 30 * TOKEN, (uint8_t)(i + 1));
    kv_pool_complete(pool, 0);
    grow(pool, 0, 100); /* takes what step 0 held */
    fill(be, pool, 0, 0x77);
    expect_bytes(be, old[1], 30 * TOKEN, 2);
    expect_bytes(be, old[2], 30 * TOKEN, 3);
    expect(pool, 10 + 3, 3, 4);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(stale_content_is_never_visible)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    struct kv_pool *pool = make(&cfg);
    for (uint64_t step = 0; step < 50; step++) {
        /* sizes differ from round to round, so pages go from slot to slot, warm and cold */
        for (uint32_t s = 0; s < 4; s++) {
            uint32_t tokens = 1 + (uint32_t)(step * 7 + s * 13) % 53;
            grow(pool, s, tokens);
            struct kv_stats stats = kv_pool_stats(pool);
            ck_assert_uint_le(stats.mapped_pages, 20);
            expect_bytes(be, kv_slot_view(pool, s, 0).k, tokens * TOKEN, 0);
            /* and up to the end of the last page: kernels may read a little past the length */
            uint64_t end =
                kv_pages_for(&(struct kv_account){.page_bytes = cfg.page_bytes, .token_bytes = TOKEN}, tokens) *
                cfg.page_bytes;
            expect_bytes(be, kv_slot_view(pool, s, 0).k, end, 0);
            fill(be, pool, s, 0xff); /* NaN as float */
        }
        for (uint32_t s = 0; s < 4; s++)
            kv_slot_release(pool, s, step);
        kv_pool_complete(pool, step);
    }
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(steady_state_makes_no_calls)
{
    struct kv_pool_config cfg = small_config(&back_ends[_i]);
    struct kv_pool *pool = make(&cfg);
    uint64_t calls = 0;
    for (uint64_t step = 0; step < 20; step++) {
        for (uint32_t t = 1; t <= 50; t++) {
            grow(pool, 0, t);
            grow(pool, 1, t);
        }
        kv_slot_release(pool, 0, step);
        kv_slot_release(pool, 1, step);
        kv_pool_complete(pool, step);
        if (step == 0)
            calls = kv_pool_stats(pool).map_calls;
    }
    ck_assert_uint_gt(calls, 0);
    ck_assert_uint_eq(kv_pool_stats(pool).map_calls, calls);
    kv_pool_destroy(pool);
}
END_TEST

/* Sequences of many lengths come and go; after a while every range has all that any of them needs. */
START_TEST(steady_arrivals_make_no_calls)
{
    enum { SEQS = 32, WARM = 200, STEPS = 300 };
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    cfg.slots = SEQS;
    cfg.max_tokens = 256;
    cfg.kv_heads = 1;
    cfg.head_dim = 16 * be->scale; /* 16 tokens in a page */
    cfg.total_pages = 12 * (SEQS + 3);
    cfg.background = cfg.no_clear = true;
    cfg.ahead_tokens = 16;
    cfg.arrival_tokens = 32;
    struct kv_pool *pool = make(&cfg);
    struct kv_stats from = kv_pool_stats(pool);
    uint32_t length[SEQS] = {0}, end[SEQS] = {0}, arrivals = 0, before = 0;
    for (uint32_t step = 1; step <= WARM + STEPS; step++) {
        kv_pool_complete(pool, step - 1);
        kv_pool_settle(pool); /* a step is longer than what the thread does in it */
        if (step == WARM + 1) {
            from = kv_pool_stats(pool);
            before = arrivals;
        }
        for (uint32_t i = 0; i < SEQS; i++) {
            if (length[i] == end[i]) {
                kv_slot_release(pool, i, step - 1);
                length[i] = 8 + 16 * (arrivals % 4);
                end[i] = length[i] + 16 + 28 * (arrivals++ % 3);
            } else {
                length[i]++;
            }
            grow(pool, i, length[i]);
        }
    }
    kv_pool_settle(pool);
    struct kv_stats to = kv_pool_stats(pool);
    ck_assert_uint_gt(arrivals - before, 2 * SEQS);
    ck_assert_uint_eq(to.map_calls, from.map_calls);
    ck_assert_uint_eq(to.clear_calls, 0);
    struct status st = STATUS_INIT;
    ck_assert_msg(kv_pool_check(pool, &st) == ST_OK, "%s", st.message);
    kv_pool_destroy(pool);
}
END_TEST

/* What is held back is done later, or when somebody waits for it, and no slot misses a page meanwhile. */
START_TEST(the_thread_is_held_while_a_step_takes_its_pages)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    cfg.slots = 3;
    cfg.total_pages = 12;
    cfg.background = cfg.no_clear = true;
    cfg.ahead_tokens = 20; /* two pages */
    struct kv_pool *pool = make(&cfg);
    kv_pool_hold(pool, true);
    grow(pool, 0, 10);
    grow(pool, 1, 10);
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    const uint64_t calls = kv_pool_stats(pool).map_calls; /* those of the step */
    kv_pool_complete(pool, 1);                            /* reaps what is done */
    ck_assert_uint_eq(kv_pool_stats(pool).map_calls, calls);
    kv_pool_hold(pool, false); /* nobody waits for it: it begins by itself */
    uint64_t step = 2;
    for (; step < 500 && kv_pool_stats(pool).map_calls == calls; step++) {
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
        kv_pool_complete(pool, step);
    }
    ck_assert_uint_gt(kv_pool_stats(pool).map_calls, calls);
    kv_pool_settle(pool);
    kv_pool_hold(pool, true);
    grow(pool, 2, 10);
    grow(pool, 2, 30); /* needs what is held back: it waits for that */
    kv_pool_hold(pool, false);
    struct status st = STATUS_INIT;
    ck_assert_msg(kv_pool_check(pool, &st) == ST_OK, "%s", st.message);
    kv_pool_hold(pool, true);
    grow(pool, 0, 30);
    kv_pool_destroy(pool); /* with work held back */
}
END_TEST

/* Where pages come from, as memory/README.md has it; no calls where they lie already. 5 pages hold 50 tokens, 10 hold 100. */
START_TEST(pages_are_claimed_in_the_stated_order)
{
    struct kv_pool_config cfg = small_config(&back_ends[_i]);
    cfg.slots = 6;
    cfg.total_pages = 30;
    struct kv_pool *pool = make(&cfg);
    uint32_t of_first[5];
    for (uint32_t s = 0; s < 5; s++)
        grow(pool, s, 50);
    const struct kv_range *first = pool->slot[0].range, *second = pool->slot[1].range, *third = pool->slot[2].range;
    memcpy(of_first, first->pages, sizeof of_first);
    for (uint32_t s = 0; s < 3; s++) {
        kv_slot_release(pool, s, s);
        kv_pool_complete(pool, s);
    }
    ck_assert_uint_eq(pool->n_cold, 5);
    grow(pool, 3, 100); /* the cold ones */
    ck_assert_uint_eq(pool->n_cold, 0);
    for (uint32_t i = 0; i < 5; i++)
        ck_assert(kv_page_free(&pool->page[first->pages[i]]) && kv_page_free(&pool->page[second->pages[i]]) &&
                  kv_page_free(&pool->page[third->pages[i]]));
    grow(pool, 4, 70); /* of the range that is idle longest, from its end */
    const uint32_t *got = pool->slot[4].range->pages;
    ck_assert_uint_eq(got[5], of_first[4]);
    ck_assert_uint_eq(got[6], of_first[3]);
    grow(pool, 4, 100);
    for (uint32_t i = 0; i < 3; i++)
        ck_assert_uint_eq(got[7 + i], of_first[2 - i]);
    for (uint32_t i = 0; i < 5; i++)
        ck_assert(kv_page_free(&pool->page[second->pages[i]]) && kv_page_free(&pool->page[third->pages[i]]));
    uint64_t calls = kv_pool_stats(pool).map_calls;
    kv_slot_release(pool, 4, 3);
    kv_pool_complete(pool, 3);
    grow(pool, 0, 100);
    ck_assert_ptr_eq(pool->slot[0].range->pages, got);
    ck_assert_uint_eq(kv_pool_stats(pool).map_calls, calls);
    kv_pool_destroy(pool);
}
END_TEST

/* What the thread has made ready behind a slot goes last, and takes nothing from the slot. */
START_TEST(pages_behind_slots_are_claimed_last)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    cfg.slots = 2;
    cfg.total_pages = 8;
    cfg.background = true;
    cfg.ahead_tokens = 12;
    struct kv_pool *pool = make(&cfg);
    grow(pool, 0, 10);
    fill(be, pool, 0, 5);
    kv_pool_settle(pool);
    const struct kv_range *r = pool->slot[0].range;
    uint32_t behind = r->mapped - 1;
    ck_assert_uint_ge(behind, 1);
    grow(pool, 1, (7 - behind) * 32 / 3);
    expect(pool, 1 + 7 - behind, 0, behind);
    for (uint32_t i = 1; i <= behind; i++)
        ck_assert_uint_eq(pool->page[r->pages[i]].active, 0);
    grow(pool, 1, 74); /* 7 pages */
    expect(pool, 8, 0, 0);
    expect_bytes(be, kv_slot_view(pool, 0, 0).k, 10 * TOKEN, 5);
    expect_bytes(be, kv_slot_view(pool, 1, 0).k, 74 * TOKEN, 0);
    ck_assert_int_eq(kv_pool_check(pool, NULL), ST_OK);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(uncleared_memory_is_as_it_was)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    cfg.no_clear = true;
    cfg.total_pages = 5; /* slot 1 takes what slot 0 had */
    struct kv_pool *pool = make(&cfg);
    grow(pool, 0, 40);
    fill(be, pool, 0, 0x5a);
    kv_slot_release(pool, 0, 0);
    kv_pool_complete(pool, 0);
    uint64_t clears = kv_pool_stats(pool).clear_calls;
    grow(pool, 1, 30);
    expect_bytes(be, kv_slot_view(pool, 1, 0).k, 30 * TOKEN, 0x5a);
    ck_assert_uint_eq(kv_pool_stats(pool).clear_calls, clears);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(neighbouring_pages_take_one_call)
{
    struct kv_pool_config cfg = small_config(&back_ends[_i]);
    struct kv_pool *pool = make(&cfg);
    grow(pool, 0, 100); /* 10 pages of a fresh pool: CUDA maps one by one, then gives access to all */
    ck_assert_uint_eq(kv_pool_stats(pool).map_calls, cfg.ops == &kv_ops_host ? 1 : 11);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(reset_forgets_slots_fences_and_steps)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    struct kv_pool *pool = make(&cfg);
    grow(pool, 0, 60);
    fill(be, pool, 0, 0xee);
    grow(pool, 1, 60);
    fill(be, pool, 1, 0xee);
    kv_slot_release(pool, 1, 1000);
    kv_pool_complete(pool, 500);
    kv_pool_reset(pool);
    expect(pool, 0, 0, 20);
    ck_assert_uint_eq(kv_slot_tokens(pool, 0), 0);
    ck_assert_ptr_null(kv_slot_view(pool, 0, 0).k);
    grow(pool, 3, 100);
    expect_bytes(be, kv_slot_view(pool, 3, 0).k, 100 * TOKEN, 0);
    kv_slot_release(pool, 3, 2); /* steps count from the start again: 2 has not finished */
    expect(pool, 0, 10, 10);
    kv_pool_complete(pool, 2);
    expect(pool, 0, 0, 20);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(rank_without_heads_has_no_pages)
{
    struct kv_pool_config cfg = small_config(&back_ends[_i]);
    cfg.kv_heads = 0;
    struct kv_pool *pool = make(&cfg);
    struct kv_account a = kv_pool_account(pool);
    ck_assert_uint_eq(a.token_bytes, 0);
    ck_assert_uint_eq(a.total_pages, 20); /* must not bound the other ranks */
    ck_assert_uint_eq(kv_pages_for(&a, 100), 0);
    grow(pool, 0, 100);
    ck_assert_uint_eq(kv_slot_tokens(pool, 0), 100);
    ck_assert_ptr_null(kv_slot_view(pool, 0, 1).k);
    expect(pool, 0, 0, 0);
    ck_assert_int_eq(kv_slot_suspend(pool, 0, NULL), ST_OK); /* the plan is that of all ranks */
    ck_assert_uint_eq(kv_slot_suspended(pool, 0), 100);
    ck_assert_int_eq(kv_slot_grow(pool, 0, 101, NULL), ST_OUT_OF_RANGE);
    ck_assert_int_eq(kv_slot_resume(pool, 0, NULL), ST_OK);
    ck_assert_uint_eq(kv_slot_tokens(pool, 0), 100);
    ck_assert_int_eq(kv_pool_resize(pool, 7, NULL), ST_OK);
    ck_assert_uint_eq(kv_pool_account(pool).total_pages, 7);
    kv_slot_release(pool, 0, 1);
    ck_assert_uint_eq(kv_slot_tokens(pool, 0), 0);
    kv_pool_complete(pool, 1);
    kv_pool_reset(pool);
    kv_pool_destroy(pool);
}
END_TEST

/* --- the random walk --- */

#define WALK_SLOTS  6
#define WALK_TOKENS 60
#define WALK_PAGES  22

enum { FAULTS = 1, BACKGROUND = 2, LANES = 4 };

struct walk_slot {
    uint32_t tokens;
    bool suspended;
    uint32_t id[8]; /* which page stands at each position: slots that share one have the same number */
    uint8_t bytes[WALK_TOKENS * 384]; /* what stands in the slot */
};

struct walk_fenced { /* a released slot that a step may still read */
    struct kv_view at[2];
    uint64_t step;
    struct walk_slot was;
};

struct walk {
    const struct back_end *be;
    struct kv_pool *pool;
    int mode;
    uint32_t lanes;
    uint64_t random;
    uint64_t step, done; /* running; finished steps are below `done` */
    uint64_t total;      /* pages that are not given back */
    uint32_t next_id;
    struct walk_slot slot[WALK_SLOTS];
    struct walk_fenced fenced[64];
    uint32_t n_fenced;
};

static uint32_t pick(struct walk *w, uint32_t n)
{
    w->random = w->random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(w->random >> 33) % n;
}

/* Part `part` (layer, K or V) of 96 model bytes of token t. The walk keeps one byte for `scale` equal ones in the pool. */
static uint8_t *walk_row(const struct kv_view at[2], uint32_t t, uint32_t part)
{
    return (part % 2 ? at[part / 2].v : at[part / 2].k) + t * at[part / 2].token_stride;
}

static void walk_put(struct walk *w, const struct kv_view at[2], uint32_t from, uint32_t to, const uint8_t *bytes)
{
    const size_t scale = w->be->scale;
    uint8_t *wide = malloc(96 * scale);
    for (uint32_t t = from; t < to; t++)
        for (uint32_t part = 0; part < 4; part++) {
            for (uint32_t i = 0; i < 96; i++)
                memset(wide + i * scale, bytes[t * 384 + part * 96 + i], scale);
            w->be->put(walk_row(at, t, part), wide, 96 * scale);
        }
    free(wide);
}

static bool walk_same(struct walk *w, const struct kv_view at[2], const struct walk_slot *s)
{
    const size_t scale = w->be->scale;
    uint8_t *wide = malloc(96 * scale);
    bool same = true;
    for (uint32_t t = 0; t < s->tokens && same; t++)
        for (uint32_t part = 0; part < 4 && same; part++) {
            w->be->get(wide, walk_row(at, t, part), 96 * scale);
            for (size_t i = 0; i < 96 * scale && same; i++)
                same = wide[i] == s->bytes[t * 384 + part * 96 + i / scale];
        }
    free(wide);
    return same;
}

static void walk_views(struct walk *w, uint32_t slot, struct kv_view at[2])
{
    at[0] = kv_slot_view(w->pool, slot, 0);
    at[1] = kv_slot_view(w->pool, slot, 1);
}

/* The model's own arithmetic. */
static uint32_t walk_pages(const struct walk *w, uint32_t tokens)
{
    return (tokens * 384 / w->lanes + 4095) / 4096 * w->lanes;
}

static uint32_t walk_full(const struct walk *w, uint32_t tokens)
{
    return tokens * 384 / w->lanes / 4096 * w->lanes;
}

static uint32_t walk_held(const struct walk *w, const struct walk_slot *s)
{
    return s->suspended ? 0 : walk_pages(w, s->tokens);
}

static void walk_count(const struct walk *w, uint64_t *mapped, uint64_t *fenced, uint64_t *shared)
{
    static uint32_t id[WALK_SLOTS * 8 + 64 * 8], times[WALK_SLOTS * 8 + 64 * 8];
    uint32_t n = 0, active;
    for (uint32_t i = 0; i < WALK_SLOTS; i++)
        for (uint32_t k = 0; k < walk_held(w, &w->slot[i]); k++) {
            uint32_t j = 0;
            while (j < n && id[j] != w->slot[i].id[k])
                j++;
            times[j] = j == n ? 1 : times[j] + 1;
            n += j == n;
            id[j] = w->slot[i].id[k];
        }
    active = n;
    for (uint32_t i = 0; i < w->n_fenced; i++)
        for (uint32_t k = 0; k < walk_held(w, &w->fenced[i].was); k++) {
            uint32_t j = 0;
            while (j < n && id[j] != w->fenced[i].was.id[k])
                j++;
            n += j == n;
            id[j] = w->fenced[i].was.id[k];
        }
    *mapped = active;
    *fenced = n - active;
    *shared = 0;
    for (uint32_t j = 0; j < active; j++)
        *shared += times[j] > 1;
}

static void walk_check(struct walk *w, uint64_t at)
{
    uint64_t mapped, fenced, shared, waste = 0;
    walk_count(w, &mapped, &fenced, &shared);
    for (uint32_t i = 0; i < WALK_SLOTS; i++) {
        const struct walk_slot *s = &w->slot[i];
        uint32_t tokens = s->suspended ? 0 : s->tokens;
        waste += walk_held(w, s) * 4096 - tokens * 384;
        ck_assert_uint_eq(kv_slot_tokens(w->pool, i), tokens);
        ck_assert_uint_eq(kv_slot_suspended(w->pool, i), s->suspended ? s->tokens : 0);
    }
    struct kv_stats s = kv_pool_stats(w->pool);
    ck_assert_msg(s.mapped_pages == mapped && s.fenced_pages == fenced && s.shared_pages == shared &&
                      s.free_pages == w->total - mapped - fenced && s.wasted_bytes == waste * w->be->scale,
                  "step %" PRIu64 ": the pool counts %" PRIu64 " mapped, %" PRIu64 " fenced, %" PRIu64
                  " shared, the model %" PRIu64 ", %" PRIu64 ", %" PRIu64,
                  at, s.mapped_pages, s.fenced_pages, s.shared_pages, mapped, fenced, shared);
    if (w->mode & BACKGROUND)
        kv_pool_hold(w->pool, pick(w, 3) == 0);
    if (!(w->mode & BACKGROUND) || pick(w, 16) == 0) { /* the check waits for the thread */
        struct status st = STATUS_INIT;
        ck_assert_msg(kv_pool_check(w->pool, &st) == ST_OK, "step %" PRIu64 ": %s", at, st.message);
    }
    uint32_t i = pick(w, WALK_SLOTS);
    struct kv_view view[2];
    walk_views(w, i, view);
    if (!w->slot[i].suspended)
        ck_assert_msg(walk_same(w, view, &w->slot[i]), "step %" PRIu64 ": slot %u differs", at, i);
    if (w->n_fenced) {
        const struct walk_fenced *f = &w->fenced[pick(w, w->n_fenced)];
        ck_assert_msg(walk_same(w, f->at, &f->was), "step %" PRIu64 ": a fenced range has changed", at);
    }
}

/* Lets one of the next calls fail, now and then. */
static bool walk_inject(struct walk *w)
{
    bool yes = w->mode & FAULTS && pick(w, 4) == 0;
    fail_call = yes ? 1 + (int)pick(w, 6) : 0;
    return yes;
}

/* An operation that needs `pages` free ones has ended: is that right? */
static bool walk_ended(struct walk *w, enum status_code rc, uint64_t pages, bool injected)
{
    bool reached = injected && fail_call == 0;
    fail_call = 0;
    uint64_t mapped, fenced, shared;
    walk_count(w, &mapped, &fenced, &shared);
    if (pages > w->total - mapped - fenced)
        ck_assert_int_eq(rc, ST_RESOURCE_EXHAUSTED);
    else if (!reached)
        ck_assert_int_eq(rc, ST_OK);
    else if (!(w->mode & BACKGROUND)) /* else the thread may have met it */
        ck_assert_int_eq(rc, ST_RESOURCE_EXHAUSTED);
    return rc == ST_OK;
}

static void walk_grow(struct walk *w)
{
    uint32_t i = pick(w, WALK_SLOTS);
    struct walk_slot *s = &w->slot[i];
    uint32_t tokens = s->tokens + 1 + pick(w, pick(w, 3) ? 4 : WALK_TOKENS);
    bool injected = walk_inject(w);
    enum status_code rc = kv_slot_grow(w->pool, i, tokens, NULL);
    if (tokens > WALK_TOKENS || s->suspended) {
        ck_assert_int_eq(rc, tokens > WALK_TOKENS ? ST_OUT_OF_RANGE : ST_FAILED_PRECONDITION);
        fail_call = 0;
        return;
    }
    if (!walk_ended(w, rc, walk_pages(w, tokens) - walk_pages(w, s->tokens), injected))
        return;
    for (uint32_t k = walk_pages(w, s->tokens); k < walk_pages(w, tokens); k++)
        s->id[k] = w->next_id++;
    memset(s->bytes + s->tokens * 384, 0, (tokens - s->tokens) * 384); /* the promise about new memory */
    s->tokens = tokens;
}

static void walk_share(struct walk *w)
{
    uint32_t to = pick(w, WALK_SLOTS), from = pick(w, WALK_SLOTS);
    struct walk_slot *s = &w->slot[to];
    const struct walk_slot *f = &w->slot[from];
    uint32_t tokens = pick(w, 3) ? f->tokens : pick(w, WALK_TOKENS + 1);
    bool injected = walk_inject(w);
    enum status_code rc = kv_slot_share(w->pool, to, from, tokens, NULL);
    if (s->tokens || f->suspended || tokens > f->tokens) {
        ck_assert_int_eq(rc, s->tokens || tokens > (f->suspended ? 0 : f->tokens) ? ST_FAILED_PRECONDITION : ST_OK);
        fail_call = 0;
        return;
    }
    if (!walk_ended(w, rc, walk_pages(w, tokens) - walk_full(w, tokens), injected))
        return;
    memcpy(s->id, f->id, walk_full(w, tokens) * sizeof *s->id);
    for (uint32_t k = walk_full(w, tokens); k < walk_pages(w, tokens); k++)
        s->id[k] = w->next_id++;
    memcpy(s->bytes, f->bytes, tokens * 384);
    s->tokens = tokens;
}

/* Writes what may be written: tokens behind the last page that is shared with anybody, be he in flight. */
static void walk_write(struct walk *w)
{
    uint32_t i = pick(w, WALK_SLOTS), first = 0;
    struct walk_slot *s = &w->slot[i];
    if (s->tokens == 0 || s->suspended)
        return;
    for (uint32_t k = 0; k < walk_pages(w, s->tokens); k++) {
        bool shared = false;
        for (uint32_t j = 0; j < WALK_SLOTS; j++)
            shared = shared || (j != i && k < walk_held(w, &w->slot[j]) && w->slot[j].id[k] == s->id[k]);
        for (uint32_t j = 0; j < w->n_fenced; j++)
            shared = shared || (k < walk_held(w, &w->fenced[j].was) && w->fenced[j].was.id[k] == s->id[k]);
        if (shared) /* a token on the page's edge belongs to it */
            first = ((k / w->lanes + 1) * 4096 + 384 / w->lanes - 1) / (384 / w->lanes);
    }
    if (first >= s->tokens)
        return;
    uint32_t from = first + pick(w, s->tokens - first), n = 1 + pick(w, s->tokens - from);
    memset(s->bytes + from * 384, 1 + (int)pick(w, 255), n * 384);
    struct kv_view at[2];
    walk_views(w, i, at);
    walk_put(w, at, from, from + n, s->bytes);
}

static void walk_release(struct walk *w)
{
    uint32_t i = pick(w, WALK_SLOTS);
    struct walk_slot *s = &w->slot[i];
    if (w->n_fenced == 64)
        return;
    uint64_t step = w->step - (w->step && pick(w, 8) == 0);
    if (s->tokens && !s->suspended && step >= w->done) {
        struct walk_fenced *f = &w->fenced[w->n_fenced++];
        *f = (struct walk_fenced){.step = step, .was = *s};
        walk_views(w, i, f->at);
    }
    kv_slot_release(w->pool, i, step);
    s->tokens = 0;
    s->suspended = false;
}

static void walk_suspend(struct walk *w)
{
    uint32_t i = pick(w, WALK_SLOTS);
    struct walk_slot *s = &w->slot[i];
    bool was = s->suspended, injected = walk_inject(w);
    enum status_code rc = was ? kv_slot_resume(w->pool, i, NULL) : kv_slot_suspend(w->pool, i, NULL);
    if (s->tokens == 0) {
        ck_assert_int_eq(rc, ST_FAILED_PRECONDITION);
        fail_call = 0;
    } else if (walk_ended(w, rc, was ? walk_pages(w, s->tokens) : 0, injected)) {
        s->suspended = !was;
        for (uint32_t k = 0; k < walk_pages(w, s->tokens); k++)
            s->id[k] = w->next_id++;
    }
}

static void walk_resize(struct walk *w)
{
    bool shrink = pick(w, 2);
    uint64_t pages = pick(w, 5), mapped, fenced, shared;
    walk_count(w, &mapped, &fenced, &shared);
    bool injected = walk_inject(w);
    uint64_t goal = shrink ? w->total - pages : w->total + pages;
    enum status_code rc = pick(w, 2) && (!shrink || pages <= w->total) ? kv_pool_resize(w->pool, goal, NULL)
                          : shrink                                     ? kv_pool_shrink(w->pool, pages, NULL)
                                                                       : kv_pool_extend(w->pool, pages, NULL);
    if (!shrink && pages > WALK_PAGES - w->total) {
        ck_assert_int_eq(rc, ST_INVALID_ARGUMENT);
        fail_call = 0;
        return;
    }
    bool ok = walk_ended(w, rc, shrink ? pages : 0, injected);
    uint64_t total = kv_pool_stats(w->pool).total_pages, full = shrink && pages > w->total ? 0 : goal;
    if (ok)
        ck_assert_uint_eq(total, full);
    else
        ck_assert(shrink ? total >= full && total <= w->total : total <= full && total >= w->total);
    ck_assert_uint_eq(kv_pool_account(w->pool).total_pages, total);
    w->total = total;
}

static void walk_complete(struct walk *w)
{
    if (w->done >= w->step)
        return;
    w->done += 1 + pick(w, (uint32_t)(w->step - w->done));
    kv_pool_complete(w->pool, w->done - 1);
    for (uint32_t i = 0; i < w->n_fenced;)
        if (w->fenced[i].step < w->done)
            w->fenced[i] = w->fenced[--w->n_fenced];
        else
            i++;
}

static void walk_reset(struct walk *w)
{
    kv_pool_reset(w->pool);
    memset(w->slot, 0, sizeof w->slot);
    w->n_fenced = 0;
    w->step = w->done = 0;
}

static void walk_once(struct walk *w)
{
    uint32_t what = pick(w, 100);
    if (what < 38)
        walk_grow(w);
    else if (what < 55)
        walk_write(w);
    else if (what < 64)
        walk_share(w);
    else if (what < 71)
        walk_suspend(w);
    else if (what < 73)
        walk_resize(w);
    else if (what < 83)
        walk_release(w);
    else if (what < 91)
        w->step++;
    else if (what < 99 || pick(w, 20))
        walk_complete(w);
    else
        walk_reset(w);
}

static void walk(const struct back_end *be, int mode)
{
    const char *seed = getenv("TANDEM_TEST_SEED"), *steps = getenv("TANDEM_TEST_STEPS");
    struct walk *w = calloc(1, sizeof *w);
    w->be = be;
    w->mode = mode;
    w->lanes = mode & LANES ? 4 : 1;
    w->random = seed ? strtoull(seed, NULL, 0) : 20260101;
    w->total = WALK_PAGES;
    struct kv_pool_config cfg = small_config(be);
    cfg.slots = WALK_SLOTS;
    cfg.max_tokens = WALK_TOKENS;
    cfg.total_pages = WALK_PAGES;
    cfg.suspend_bytes = 8 * 16 * PAGE;
    cfg.group_layers = mode & LANES ? 1 : 0;
    cfg.apart = mode & LANES;
    cfg.background = mode & BACKGROUND;
    cfg.ahead_tokens = 12;
    cfg.arrival_tokens = 25;
    count_driver_calls(be);
    w->pool = make(&cfg);
#ifdef TANDEM_SANITIZED
    uint64_t n = 500;
#else
    uint64_t n = be->scale > 1 ? (quick ? 25 : 150) : 1500;
#endif
    if (steps)
        n = strtoull(steps, NULL, 0);
    for (uint64_t i = 0; i < n; i++) {
        walk_once(w);
        walk_check(w, i);
    }
    kv_pool_destroy(w->pool);
    expect_rules_kept(be, 0);
    free(w);
}

START_TEST(random_walk_agrees_with_the_model)
{
    walk(&back_ends[_i], 0);
}
END_TEST

START_TEST(random_walk_over_lanes_agrees_with_the_model)
{
    walk(&back_ends[_i], LANES);
}
END_TEST

START_TEST(random_walk_with_the_thread_agrees_with_the_model)
{
    walk(&back_ends[_i], BACKGROUND);
}
END_TEST

START_TEST(random_walk_with_failing_calls_agrees_with_the_model)
{
    walk(&back_ends[_i], FAULTS);
}
END_TEST

START_TEST(random_walk_with_all_of_it_agrees_with_the_model)
{
    walk(&back_ends[_i], FAULTS | BACKGROUND | LANES);
}
END_TEST

/* --- limits --- */

static void refuse(const struct kv_pool_config *cfg, enum status_code code, const char *says)
{
    struct status st = STATUS_INIT;
    struct kv_pool *pool = (struct kv_pool *)&st;
    ck_assert_msg(kv_pool_create(&pool, cfg, &st) == code, "%s: %s: %s", says, status_name(st.code), st.message);
    ck_assert_ptr_eq(pool, (struct kv_pool *)&st);
    ck_assert_msg(strstr(st.message, says), "\"%s\" does not say \"%s\"", st.message, says);
}

START_TEST(wrong_config_names_the_field)
{
    const struct kv_pool_config good = small_config(&back_ends[_i]);
    struct kv_pool_config c;
#define REFUSE(field, value) (c = good, c.field = (value), refuse(&c, ST_INVALID_ARGUMENT, #field ": "))
    REFUSE(ops, NULL);
    REFUSE(slots, 0);
    REFUSE(slots, 65537);
    REFUSE(max_tokens, 0);
    REFUSE(layers, 0);
    REFUSE(head_dim, 0);
    REFUSE(elem_bytes, 0);
    REFUSE(elem_bytes, 3);
    REFUSE(elem_bytes, 8);
    REFUSE(page_bytes, 0);
    REFUSE(page_bytes, good.page_bytes / 2);
    REFUSE(page_bytes, good.page_bytes * 3);
    REFUSE(page_bytes, good.page_bytes + 1);
    REFUSE(page_bytes, UINT64_C(1) << 31);
    REFUSE(page_bytes, UINT64_C(1) << 63);
    REFUSE(total_pages, 0);
    REFUSE(total_pages, UINT64_MAX);
#undef REFUSE
}
END_TEST

START_TEST(overflowing_sizes_are_refused)
{
    const struct back_end *be = &back_ends[_i];
    const struct kv_pool_config good = small_config(be);
    struct kv_pool_config c = good;
    c.layers = c.kv_heads = c.head_dim = UINT32_MAX; /* 2^98 bytes per token */
    refuse(&c, ST_INVALID_ARGUMENT, "layers: ");
    c = good;
    c.layers = 1u << 10, c.kv_heads = 1u << 10, c.head_dim = 1u << 10; /* 2^33 */
    refuse(&c, ST_INVALID_ARGUMENT, "bytes per token");
    c = good;
    c.kv_heads = (1u << 20) / be->scale; /* 128 MiB per token */
    c.max_tokens = UINT32_MAX;
    refuse(&c, ST_INVALID_ARGUMENT, "max_tokens: ");
    c = good;
    c.slots = 65536;
    c.kv_heads = (1u << 14) / be->scale; /* 2 MiB per token: 2^16 slots of 2^21 * 2^24 bytes */
    c.max_tokens = 1u << 19;
    refuse(&c, ST_RESOURCE_EXHAUSTED, "slots: ");
}
END_TEST

START_TEST(more_memory_than_the_machine_has_is_refused_with_the_arithmetic)
{
    struct kv_pool_config c = small_config(&back_ends[_i]);
    c.page_bytes = 1u << 30;
    c.total_pages = 1u << 14; /* 16 TiB */
    refuse(&c, ST_RESOURCE_EXHAUSTED, "16384 pages of 1048576 KiB = 16777216 MiB");
    refuse(&c, ST_RESOURCE_EXHAUSTED, "total_pages: ");
}
END_TEST

START_TEST(slot_and_tokens_out_of_range)
{
    struct kv_pool_config cfg = small_config(&back_ends[_i]);
    struct kv_pool *pool = make(&cfg);
    struct status st = STATUS_INIT;
    ck_assert_int_eq(kv_slot_grow(pool, 4, 1, &st), ST_OUT_OF_RANGE);
    ck_assert_ptr_nonnull(strstr(st.message, "slot"));
    ck_assert_int_eq(kv_slot_grow(pool, 0, 101, &st), ST_OUT_OF_RANGE);
    ck_assert_ptr_nonnull(strstr(st.message, "max_tokens"));
    kv_slot_release(pool, 4, 1);
    ck_assert_uint_eq(kv_slot_tokens(pool, 4), 0);
    ck_assert_ptr_null(kv_slot_view(pool, 4, 0).k);
    grow(pool, 0, 1);
    ck_assert_ptr_null(kv_slot_view(pool, 0, 2).k);
    expect(pool, 1, 0, 19);
    kv_pool_destroy(pool);
    kv_pool_destroy(NULL);
}
END_TEST

START_TEST(exhaustion_changes_nothing)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    struct kv_pool *pool = make(&cfg);
    grow(pool, 0, 100); /* 10 pages */
    grow(pool, 1, 64);  /* 6 */
    fill(be, pool, 1, 9);
    struct status st = STATUS_INIT;
    struct kv_stats before = kv_pool_stats(pool);
    ck_assert_int_eq(kv_slot_grow(pool, 2, 43, &st), ST_RESOURCE_EXHAUSTED); /* 5 pages, 4 are free */
    ck_assert_ptr_nonnull(strstr(st.message, "take 5 more pages, free are 4 of 20"));
    ck_assert_int_eq(kv_slot_grow(pool, 1, 100, NULL), ST_OK); /* exactly the last 4 */
    expect(pool, 20, 0, 0);
    kv_slot_release(pool, 1, 5);
    ck_assert_int_eq(kv_slot_grow(pool, 2, 1, &st), ST_RESOURCE_EXHAUSTED); /* fenced pages are not free */
    ck_assert_ptr_nonnull(strstr(st.message, "10 are fenced"));
    expect(pool, 10, 10, 0);
    ck_assert_uint_eq(before.total_pages, kv_pool_stats(pool).total_pages);
    kv_pool_complete(pool, 5);
    grow(pool, 2, 100);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(all_pages_go_round_many_slots)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    cfg.slots = 300;
    cfg.total_pages = 300;
    struct kv_pool *pool = make(&cfg);
    for (uint32_t s = 0; s < 300; s++)
        grow(pool, s, 1); /* a page each */
    expect(pool, 300, 0, 0);
    for (uint32_t s = 0; s < 300; s += 2)
        kv_slot_release(pool, s, 1);
    kv_pool_complete(pool, 1);
    for (uint32_t s = 1; s < 30; s += 2) { /* 15 slots take 9 more pages each from the ends of idle ranges */
        grow(pool, s, 100);
        fill(be, pool, s, (uint8_t)s);
    }
    for (uint32_t s = 1; s < 30; s += 2)
        expect_bytes(be, kv_slot_view(pool, s, 0).k, 100 * TOKEN, (uint8_t)s);
    expect(pool, 150 + 15 * 9, 0, 15);
    kv_pool_destroy(pool);
}
END_TEST

START_TEST(default_page_size_works)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = {.ops = be->ops,
                                 .driver = be->driver,
                                 .slots = 2,
                                 .max_tokens = 2048,
                                 .layers = 6,
                                 .kv_heads = 6,
                                 .head_dim = 48,
                                 .elem_bytes = 2,
                                 .page_bytes = KV_PAGE_BYTES_DEFAULT,
                                 .total_pages = 4};
    struct kv_pool *pool = make(&cfg);
    grow(pool, 0, 600); /* 6912 bytes per token: 303.4 tokens per page */
    fill(be, pool, 0, 1);
    expect(pool, 2, 0, 2);
    ck_assert_uint_eq((uintptr_t)kv_slot_view(pool, 0, 0).k % KV_PAGE_BYTES_DEFAULT, 0);
    kv_pool_destroy(pool);
}
END_TEST

/* --- host back end alone --- */

START_TEST(too_many_mappings_are_refused_with_the_arithmetic)
{
    struct kv_pool_config c = small_config(&back_ends[0]);
    FILE *f = fopen("/proc/sys/vm/max_map_count", "r");
    uint64_t limit;
    ck_assert(f && fscanf(f, "%" SCNu64, &limit) == 1);
    fclose(f);
    c.total_pages = limit;
    refuse(&c, ST_RESOURCE_EXHAUSTED, "vm.max_map_count is ");
}
END_TEST

static void fake_file(const char *root, const char *path, const char *text)
{
    char full[512];
    snprintf(full, sizeof full, "%s%s", root, path);
    for (char *slash = full + strlen(root); (slash = strchr(slash + 1, '/'));) {
        *slash = '\0';
        mkdir(full, 0700);
        *slash = '/';
    }
    FILE *f = fopen(full, "w");
    ck_assert_msg(f != NULL, "%s", full);
    fputs(text, f);
    fclose(f);
}

static uint64_t available_under(const char *root, char why[128])
{
    fake_root = root;
    uint64_t n = kv_host_available(why, 128);
    fake_root = NULL;
    return n;
}

static void remove_tree(const char *path)
{
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d));) {
        char full[1024];
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        snprintf(full, sizeof full, "%s/%s", path, e->d_name);
        if (unlink(full))
            remove_tree(full);
    }
    if (d)
        closedir(d);
    rmdir(path);
}

START_TEST(control_groups_bound_what_is_available)
{
    char root[] = "/tmp/check_memory.XXXXXX", why[128];
    ck_assert_ptr_nonnull(mkdtemp(root));
    ck_assert_uint_eq(available_under(root, why), UINT64_MAX); /* nothing to be read */
    fake_file(root, "/proc/meminfo", "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   4000 kB\nSwapFree: 0 kB\n");
    ck_assert_uint_eq(available_under(root, why), 4000 << 10);
    ck_assert_str_eq(why, "MemAvailable");
    /* version 2: the group has no limit, the one above it has */
    fake_file(root, "/proc/self/cgroup", "0::/a/b\n");
    fake_file(root, "/sys/fs/cgroup/a/b/memory.max", "max\n");
    fake_file(root, "/sys/fs/cgroup/a/b/memory.current", "100\n");
    ck_assert_uint_eq(available_under(root, why), 4000 << 10);
    fake_file(root, "/sys/fs/cgroup/a/memory.max", "1000000\n");
    fake_file(root, "/sys/fs/cgroup/a/memory.current", "400000\n");
    ck_assert_uint_eq(available_under(root, why), 600000);
    ck_assert_str_eq(why, "memory.max of control group /a/");
    fake_file(root, "/sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 100000\nactive_file 7\n");
    ck_assert_uint_eq(available_under(root, why), 700000); /* the kernel would drop that cache */
    fake_file(root, "/sys/fs/cgroup/a/memory.current", "2000000\n");
    ck_assert_uint_eq(available_under(root, why), 0);
    /* version 1 */
    fake_file(root, "/proc/self/cgroup", "7:cpu:/x\n5:memory:/c\n0::/\n");
    fake_file(root, "/sys/fs/cgroup/memory/c/memory.limit_in_bytes", "50000\n");
    fake_file(root, "/sys/fs/cgroup/memory/c/memory.usage_in_bytes", "20000\n");
    ck_assert_uint_eq(available_under(root, why), 30000);
    /* pages that were given back are not taken again then */
    struct kv_pool_config cfg = small_config(&back_ends[0]);
    struct kv_pool *pool = make(&cfg);
    struct status st = STATUS_INIT;
    ck_assert_int_eq(kv_pool_resize(pool, 12, NULL), ST_OK);
    fake_root = root;
    ck_assert_int_eq(kv_pool_resize(pool, 20, &st), ST_RESOURCE_EXHAUSTED);
    fake_root = NULL;
    ck_assert_msg(strstr(st.message, " leaves 0 MiB, of which 64 MiB stay free"), "%s", st.message);
    expect(pool, 0, 0, 12);
    ck_assert_int_eq(kv_pool_resize(pool, 20, NULL), ST_OK);
    expect(pool, 0, 0, 20);
    kv_pool_destroy(pool);
    remove_tree(root);
}
END_TEST

START_TEST(suspension_ends_where_the_host_memory_does)
{
    const struct back_end *be = &back_ends[_i];
    struct kv_pool_config cfg = small_config(be);
    struct status st = STATUS_INIT;
    cfg.suspend_bytes = 2 * 16 * PAGE - 1; /* one unit */
    struct kv_pool *pool = make(&cfg);
    ck_assert_uint_eq(kv_pool_suspend_pages(pool), 16);
    grow(pool, 0, 100); /* 10 pages */
    grow(pool, 1, 70);  /* 7 */
    ck_assert_int_eq(kv_slot_suspend(pool, 0, NULL), ST_OK);
    ck_assert_int_eq(kv_slot_suspend(pool, 1, &st), ST_RESOURCE_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(st.message, "7 pages to suspend, of 16 in host memory 10 are taken"));
    expect(pool, 7, 0, 13);
    kv_slot_release(pool, 0, 1);
    ck_assert_int_eq(kv_slot_suspend(pool, 1, NULL), ST_OK);
    kv_pool_reset(pool);
    ck_assert_uint_eq(kv_pool_stats(pool).suspended_bytes, 0);
    uint64_t rate = 0;
    ck_assert_int_eq(kv_pool_suspend_rate(pool, &rate, NULL), ST_OK);
    ck_assert_uint_gt(rate, 1000000);
    expect(pool, 0, 0, 20);
    kv_pool_destroy(pool);
    cfg.suspend_bytes = UINT64_C(1) << 42;
    ck_assert_int_eq(kv_pool_create(&pool, &cfg, &st), ST_RESOURCE_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(st.message, "suspend_bytes: "));
}
END_TEST

/* Back ends first .. end - 1. */
static Suite *memory_suite(int first, int end)
{
    Suite *s = suite_create("memory");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_set_timeout(core, 120);
    tcase_set_timeout(faults, 120);
#define EACH(tcase, test) tcase_add_loop_test(tcase, test, first, end)
    EACH(core, slot_is_contiguous_across_page_edges);
    EACH(core, strides_follow_the_token_major_layout);
    EACH(core, account_is_what_the_pool_maps);
    EACH(core, grow_never_shrinks_and_keeps_content_and_address);
    EACH(core, released_pages_wait_for_the_fence);
    EACH(core, step_in_flight_still_reads_a_slot_that_was_grown_again);
    EACH(core, stale_content_is_never_visible);
    EACH(core, steady_state_makes_no_calls);
    EACH(core, steady_arrivals_make_no_calls);
    EACH(core, the_thread_is_held_while_a_step_takes_its_pages);
    EACH(core, pages_are_claimed_in_the_stated_order);
    EACH(core, pages_behind_slots_are_claimed_last);
    EACH(core, uncleared_memory_is_as_it_was);
    EACH(core, neighbouring_pages_take_one_call);
    EACH(core, reset_forgets_slots_fences_and_steps);
    EACH(core, rank_without_heads_has_no_pages);
    EACH(core, random_walk_agrees_with_the_model);
    EACH(core, random_walk_over_lanes_agrees_with_the_model);
    EACH(core, random_walk_with_the_thread_agrees_with_the_model);
    EACH(limits, wrong_config_names_the_field);
    EACH(limits, overflowing_sizes_are_refused);
    EACH(limits, more_memory_than_the_machine_has_is_refused_with_the_arithmetic);
    EACH(limits, slot_and_tokens_out_of_range);
    EACH(limits, exhaustion_changes_nothing);
    EACH(limits, all_pages_go_round_many_slots);
    EACH(limits, suspension_ends_where_the_host_memory_does);
    EACH(limits, default_page_size_works);
    tcase_add_test(limits, too_many_mappings_are_refused_with_the_arithmetic);
    tcase_add_test(limits, control_groups_bound_what_is_available);
    memory_fault_cases(faults, first, end);
    EACH(faults, random_walk_with_failing_calls_agrees_with_the_model);
    EACH(faults, random_walk_with_all_of_it_agrees_with_the_model);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    return s;
}

/* Asked in a process of its own: a driver that was initialised does not survive the forks of Check. */
static bool gpu_is_here(void)
{
    pid_t child = fork();
    if (child == 0) {
        void *library = dlopen("libcuda.so.1", RTLD_NOW), *at = library ? dlsym(library, "cuInit") : NULL;
        int (*init)(unsigned);
        *(void **)&init = at;
        _exit(at && init(0) == 0 ? 0 : 1);
    }
    int status = 1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

#ifdef TEST_FAKE_CUDA
/* The pools of all tests use the device's primary context: it lives as long as somebody holds it. */
static void hold_context(void)
{
    int (*init)(unsigned), (*retain)(void **, int), (*set)(void *);
    void *context = NULL;
    *(void **)&init = find_call("cuInit");
    *(void **)&retain = find_call("cuDevicePrimaryCtxRetain");
    *(void **)&set = find_call("cuCtxSetCurrent");
    if (!init || !retain || !set || init(0) != 0 || retain(&context, 0) != 0 || set(context) != 0) {
        fprintf(stderr, "check_memory: no context on device 0\n");
        exit(1);
    }
}
#else
static void hold_context(void)
{
}
#endif

int main(int argc, char **argv)
{
    bool gpu = argc > 1 && strcmp(argv[1], "cuda") == 0;
    quick = argc > 2 && strcmp(argv[2], "--quick") == 0;
    if (gpu && (n_back_ends <= GPU_BACK_END || !gpu_is_here())) {
        fprintf(stderr, "check_memory: skipped, there is no GPU here\n");
        return 77;
    }
    int end = n_back_ends < GPU_BACK_END ? n_back_ends : GPU_BACK_END;
    SRunner *runner = srunner_create(gpu ? memory_suite(GPU_BACK_END, n_back_ends) : memory_suite(0, end));
    if (gpu) {
        hold_context();
        srunner_set_fork_status(runner, CK_NOFORK);
    }
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
