/* check_scheduler_suspend.c - preempted requests in host memory, by hand; the simulator does the rest. Ranks are those of
 * sim_ranks.h, so that every plan is taken literally. */
#include <stdlib.h>

#include "tests/check_scheduler.h"
#include "tests/sim_ranks.h"

/* Two requests of 8 + 60 tokens, 17 pages each, where there are 18 pages. */
enum { PAGES = 18, PROMPT = 8, NEW = 60 };

struct run {
    struct sched *s;
    struct sim_ranks ranks;
    uint32_t flight[2][8], n_flight[2], in_flight;
    uint64_t step; /* of the next result */
    uint32_t n_token[4], slot[4];
    bool finished[4];
    struct sched_load seen; /* the most of the suspended ones at any time */
};

static void submit_sim(struct run *r, uint64_t id)
{
    uint32_t prompt[PROMPT];
    struct status st = STATUS_INIT;
    for (uint32_t i = 0; i < PROMPT; i++)
        prompt[i] = sim_token(id, i);
    const struct sched_request req = {.id = id,
                                      .prompt = prompt,
                                      .n_prompt = PROMPT,
                                      .max_new = NEW,
                                      .deadline_us = INT64_MAX,
                                      .sample = {.seed = id}};
    ck_assert_msg(sched_submit(r->s, 0, &req, &st) == ST_OK, "%s", st.message);
}

static struct run *start_empty(struct sched_config cfg, uint64_t host_pages, uint64_t bytes_per_s)
{
    struct run *r = calloc(1, sizeof *r);
    r->s = create_attached(cfg);
    sched_set_suspension(r->s, host_pages, bytes_per_s);
    const struct sim_group group = {
        .n_ranks = 1, .slots = cfg.max_slots, .max_context = 256, .kv = {cfg.kv}, .host_pages = {host_pages}};
    sim_ranks_init(&r->ranks, &group);
    r->step = 1;
    return r;
}

static struct run *start(const struct cost_profile *cost, uint64_t host_pages, uint64_t bytes_per_s)
{
    struct sched_config cfg = config(4, 64, 2);
    cfg.kv.total_pages = PAGES;
    if (cost)
        cfg.cost = *cost;
    struct run *r = start_empty(cfg, host_pages, bytes_per_s);
    submit_sim(r, 1);
    submit_sim(r, 2);
    return r;
}

static void take_plans(struct run *r)
{
    struct sched_plan p;
    while (sched_plan(r->s, 0, &p)) {
        sched_check(r->s);
        for (uint32_t i = 0; i < p.n_admit; i++)
            r->slot[p.admit[i].id] = p.admit[i].slot;
        sim_ranks_step(&r->ranks, &p, p.step - 1 - r->in_flight, r->flight[p.step % 2]);
        r->n_flight[p.step % 2] = p.samples;
        r->in_flight++;
        struct sched_load l = sched_load(r->s);
        ck_assert_uint_eq(l.suspended_pages, sim_ranks_suspended(&r->ranks));
        if (l.suspended_pages > r->seen.suspended_pages)
            r->seen = l;
    }
}

static void take_result(struct run *r)
{
    struct sched_event ev;
    ck_assert_uint_gt(r->in_flight, 0);
    result(r->s, r->step, r->n_flight[r->step % 2], r->flight[r->step % 2]);
    r->step++;
    r->in_flight--;
    while (sched_next_event(r->s, &ev)) {
        if (ev.kind == SCHED_TOKEN)
            ck_assert_uint_eq(ev.token, sim_token(ev.id, PROMPT + r->n_token[ev.id]++));
        else
            r->finished[ev.id] = true;
    }
}

/* Until request 2 is suspended or was computed again, or both have ended. */
static void run_until_preempted(struct run *r)
{
    while (sched_load(r->s).preemptions == 0) {
        take_plans(r);
        take_result(r);
    }
}

static void run_to_the_end(struct run *r)
{
    while (!r->finished[1] || !r->finished[2]) {
        take_plans(r);
        take_result(r);
    }
}

static struct sched_load stop(struct run *r)
{
    take_plans(r);
    while (r->in_flight)
        take_result(r);
    struct sched_load l = sched_load(r->s);
    ck_assert_uint_eq(l.suspended_slots + l.suspended_pages + l.used_pages, 0);
    sim_ranks_check_idle(&r->ranks, (bool[4]){false}, 0);
    sim_ranks_fini(&r->ranks);
    finish(r->s);
    free(r);
    return l;
}

START_TEST(suspended_request_goes_on_behind_its_last_token)
{
    struct run *r = start(NULL, PAGES, 0);
    run_to_the_end(r);
    ck_assert_uint_eq(r->n_token[1], NEW);
    ck_assert_uint_eq(r->n_token[2], NEW);
    ck_assert_uint_eq(r->seen.suspended_slots, 1);
    ck_assert_uint_ge(r->seen.suspended_pages, PAGES / 2 - 1);
    struct sched_load l = stop(r);
    ck_assert_uint_eq(l.preemptions, 1);
    ck_assert_uint_eq(l.suspensions, 1);
    ck_assert_uint_eq(l.resumptions, 1);
    ck_assert_uint_eq(l.recomputed_tokens, 0);
}
END_TEST

START_TEST(what_does_not_fit_host_memory_is_computed_again)
{
    struct run *r = start(NULL, PAGES / 2 - 2, 0);
    run_to_the_end(r);
    struct sched_load l = stop(r);
    ck_assert_uint_eq(l.preemptions, 1);
    ck_assert_uint_eq(l.suspensions, 0);
    ck_assert_uint_gt(l.recomputed_tokens, PROMPT);
}
END_TEST

/* A page of 4 tokens takes 4 us of rows; there and back at 4096 MB/s 2 us, at 1024 MB/s 8 us. */
START_TEST(the_cheaper_way_is_taken)
{
    const struct cost_coef coef = {.fixed_us = 50, .decode_us = 1, .row_us = 1};
    const struct cost_profile cost = {.pure = coef, .hybrid = coef, .known = true};
    struct run *r = start(&cost, PAGES, _i ? UINT64_C(4096000000) : 1024000000);
    run_to_the_end(r);
    ck_assert_uint_eq(stop(r).suspensions, _i);
}
END_TEST

START_TEST(suspended_request_that_is_cancelled_gives_all_back)
{
    for (int early = 0; early < 2; early++) { /* before the ranks know of it, and after */
        struct run *r = start(NULL, PAGES, 0);
        run_until_preempted(r);
        for (int i = 0; !early && i < 3; i++) {
            take_plans(r);
            take_result(r);
        }
        ck_assert_uint_eq(sched_load(r->s).suspended_slots, 1);
        ck_assert_int_eq(sched_cancel(r->s, 0, 2, ST_CANCELLED, NULL), ST_OK);
        sched_check(r->s);
        ck_assert_uint_eq(sched_load(r->s).suspended_slots, 0);
        r->finished[2] = true;
        run_to_the_end(r);
        ck_assert_uint_eq(stop(r).suspensions, 1);
    }
}
END_TEST

/* The ranks and their host memory are gone: in the next group its tokens are computed again. */
START_TEST(lost_group_takes_what_was_suspended_with_it)
{
    struct run *r = start(NULL, PAGES, 0);
    struct kv_account kv = r->ranks.group.kv[0];
    struct status st = STATUS_INIT;
    run_until_preempted(r);
    take_plans(r);
    sched_lose(r->s, 0); /* replay_limit is 0: those that ran fail */
    sched_check(r->s);
    struct sched_load l = sched_load(r->s);
    ck_assert_uint_eq(l.suspended_slots + l.suspended_pages + l.suspend_pages, 0);
    ck_assert_uint_eq(l.running, 1); /* the suspended one did not run */
    while (sched_next_event(r->s, &(struct sched_event){0}))
        ;
    sim_ranks_fini(&r->ranks);
    const struct sim_group group = {.n_ranks = 1, .slots = 4, .max_context = 256, .kv = {kv}};
    sim_ranks_init(&r->ranks, &group);
    ck_assert_int_eq(sched_attach(r->s, 0, 4, 256, &kv, &st), ST_OK);
    r->in_flight = 0;
    r->step = 1;
    r->finished[1] = true;
    run_to_the_end(r);
    ck_assert_uint_eq(r->n_token[2], NEW);
    ck_assert_uint_eq(stop(r).resumptions, 0);
}
END_TEST

/* An older request comes from another group's scheduler, where it ran and lost its ranks, and finds both slots taken. */
START_TEST(older_request_takes_the_slot_of_a_suspended_one)
{
    struct sched_book *book;
    struct sched_config cfg = config(2, 64, 2);
    struct sched_plan p;
    ck_assert_int_eq(sched_book_create(&book, NULL), ST_OK);
    cfg.book = book;
    cfg.kv.total_pages = 27; /* it fits beside the one that runs */
    cfg.replay_limit = 1;
    struct run other = {.s = create_attached(cfg)};
    submit_sim(&other, 1);
    ck_assert(sched_plan(other.s, 0, &p));
    sched_lose(other.s, 0);
    struct run *r = start_empty(cfg, 27, 0);
    submit_sim(r, 2);
    submit_sim(r, 3);
    run_until_preempted(r);
    take_plans(r);
    ck_assert_uint_eq(sched_load(r->s).suspended_slots, 1);
    uint32_t slot = r->slot[3];
    ck_assert(sched_move(other.s, r->s, 1));
    sched_check(r->s);
    sched_destroy(other.s);
    while (r->n_token[1] == 0) {
        take_result(r);
        take_plans(r);
    }
    ck_assert_uint_eq(r->slot[1], slot);
    ck_assert_uint_eq(sched_load(r->s).suspended_slots, 0);
    r->finished[1] = false;
    while (!r->finished[1] || !r->finished[2] || !r->finished[3]) {
        take_plans(r);
        take_result(r);
    }
    for (uint32_t id = 1; id < 4; id++)
        ck_assert_uint_eq(r->n_token[id], NEW);
    struct sched_load l = stop(r);
    ck_assert_uint_gt(l.recomputed_tokens, 0);
    ck_assert_uint_lt(l.resumptions, l.suspensions);
    sched_book_destroy(book);
}
END_TEST

TCase *scheduler_suspension(void)
{
    TCase *t = tcase_create("suspension");
    tcase_add_test(t, suspended_request_goes_on_behind_its_last_token);
    tcase_add_test(t, what_does_not_fit_host_memory_is_computed_again);
    tcase_add_loop_test(t, the_cheaper_way_is_taken, 0, 2);
    tcase_add_test(t, suspended_request_that_is_cancelled_gives_all_back);
    tcase_add_test(t, lost_group_takes_what_was_suspended_with_it);
    tcase_add_test(t, older_request_takes_the_slot_of_a_suspended_one);
    return t;
}
