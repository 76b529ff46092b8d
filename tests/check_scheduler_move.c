/* Requests that move between the schedulers of several groups. Part of check_scheduler. */
#include <stdlib.h>
#include <string.h>

#include "tests/check_scheduler.h"

enum { GROUPS = 3, SLOTS = 6, REQUESTS = 4000, LIVE = 60 };

/* What a group's ranks know, and where each request is. */
struct groups {
    struct sched *s[GROUPS];
    bool attached[GROUPS];
    struct sched_book *book;
    uint64_t slot_id[GROUPS][SLOTS];
    uint64_t sampled[GROUPS][2][SLOTS]; /* ids, of step % 2 */
    uint32_t n_sampled[GROUPS][2], n_scored[GROUPS][2];
    uint64_t first_open[GROUPS], next_step[GROUPS];
    /* by id */
    uint32_t n_prompt[REQUESTS + 1], n_new[REQUESTS + 1], n_scores[REQUESTS + 1], got[REQUESTS + 1];
    uint8_t where[REQUESTS + 1]; /* group + 1; 0: not live */
    uint32_t finished, live, moved, ended_otherwise;
    uint64_t random;
};

static uint32_t draw(struct groups *g, uint32_t n)
{
    g->random = g->random * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)(g->random >> 33) % n;
}

static uint32_t token_of(uint64_t id, uint32_t n)
{
    return (uint32_t)(id * 31 + n * 7) % 1000 + 10; /* none stops */
}

static void take_events(struct groups *g, uint32_t k)
{
    struct sched_event ev;
    while (sched_next_event(g->s[k], &ev)) {
        ck_assert_uint_eq(g->where[ev.id], k + 1);
        if (ev.kind == SCHED_TOKEN) {
            ck_assert_uint_eq(ev.token, token_of(ev.id, g->got[ev.id]));
            g->got[ev.id]++;
        } else if (ev.kind == SCHED_SCORES) {
            g->n_scores[ev.id] += ev.count;
        } else {
            if (ev.kind == SCHED_FINISHED) {
                ck_assert_uint_eq(g->got[ev.id], g->n_new[ev.id]);
                ck_assert_uint_eq(ev.n_new, g->n_new[ev.id]);
                if (ev.id % 5 == 0) /* each row of the prompt once */
                    ck_assert_uint_eq(g->n_scores[ev.id], g->n_prompt[ev.id] - 1);
                g->finished++;
            } else {
                g->ended_otherwise++;
            }
            g->where[ev.id] = 0;
            g->live--;
        }
    }
    sched_check(g->s[k]);
}

static void make_plan(struct groups *g, uint32_t k)
{
    struct sched_plan p;
    while (sched_plan(g->s[k], 1000, &p)) {
        uint32_t n = 0, half = p.step % 2;
        for (uint32_t i = 0; i < p.n_admit; i++)
            g->slot_id[k][p.admit[i].slot] = p.admit[i].id;
        for (uint32_t i = 0; i < p.n_decode; i++)
            g->sampled[k][half][n++] = g->slot_id[k][p.decode[i]];
        for (uint32_t i = 0; i < p.n_chunk; i++)
            if (p.chunk[i].sample)
                g->sampled[k][half][n++] = p.chunk[i].id;
        g->n_sampled[k][half] = n;
        g->n_scored[k][half] = p.scores;
        g->next_step[k] = p.step + 1;
    }
    take_events(g, k);
}

/* Samples of a request that are on their way, in order behind those that came. */
static void take_result(struct groups *g, uint32_t k)
{
    if (g->first_open[k] == g->next_step[k])
        return;
    uint64_t step = g->first_open[k]++;
    uint32_t half = step % 2, tokens[SLOTS];
    struct status st = STATUS_INIT;
    for (uint32_t i = 0; i < g->n_sampled[k][half]; i++)
        tokens[i] = token_of(g->sampled[k][half][i], g->got[g->sampled[k][half][i]]);
    ck_assert_msg(sched_result(g->s[k], 1000, step, tokens, g->n_sampled[k][half], g->n_scored[k][half], &st) == ST_OK,
                  "%s", st.message);
    take_events(g, k);
}

static void attach(struct groups *g, uint32_t k)
{
    struct kv_account kv = ROOMY;
    struct status st = STATUS_INIT;
    kv.total_pages = 40 + 5 * k;
    ck_assert_msg(sched_attach(g->s[k], 1000, SLOTS - k, 256, &kv, &st) == ST_OK, "%s", st.message);
    g->attached[k] = true;
    g->first_open[k] = g->next_step[k] = 1;
    take_events(g, k);
}

static void move(struct groups *g, uint32_t from, uint32_t to)
{
    uint64_t id = sched_next_waiting(g->s[from], 0);
    for (uint32_t skip = draw(g, 4); id && skip > 0; skip--) {
        uint64_t next = sched_next_waiting(g->s[from], id);
        id = next ? next : id;
    }
    struct sched_wish w;
    struct sched_look look;
    if (!id || from == to || !sched_wish_of(g->s[from], id, &w))
        return;
    ck_assert_uint_eq(w.n_tokens, g->n_prompt[id] + g->got[id]); /* nothing is in flight */
    sched_look(g->s[to], &w, &look);
    if (!look.fits)
        return;
    ck_assert(sched_move(g->s[from], g->s[to], id));
    ck_assert(!sched_move(g->s[from], g->s[to], id));
    g->where[id] = (uint8_t)(to + 1);
    g->moved++;
    sched_check(g->s[from]);
    sched_check(g->s[to]);
}

static void submit_next(struct groups *g, uint64_t id, uint32_t k)
{
    uint32_t prompt[64];
    struct status st = STATUS_INIT;
    g->n_prompt[id] = 2 + draw(g, 40);
    g->n_new[id] = 1 + draw(g, 30);
    for (uint32_t i = 0; i < g->n_prompt[id]; i++)
        prompt[i] = 100 + (i < 16 ? id % 3 : id) + i; /* many begin alike */
    const struct sched_request req = {.id = id,
                                      .prompt = prompt,
                                      .n_prompt = g->n_prompt[id],
                                      .max_new = g->n_new[id],
                                      .deadline_us = id % 7 ? INT64_MAX : 2000,
                                      .tenant = id % 4,
                                      .priority = (int32_t)(id % 3) - 1,
                                      .scores = id % 5 == 0};
    ck_assert_msg(sched_submit(g->s[k], 1000, &req, &st) == ST_OK, "%s", st.message);
    g->where[id] = (uint8_t)(k + 1);
    g->live++;
    sched_check(g->s[k]);
}

static void lose(struct groups *g, uint32_t k)
{
    if (draw(g, 2))
        sched_lose(g->s[k], 1000);
    else
        sched_recall(g->s[k], 1000);
    g->attached[k] = false;
    g->first_open[k] = g->next_step[k];
    take_events(g, k);
}

/* Moves at all moments, also of what was just preempted or lost; whoever moves back into a struct of his own meets no old
 * sample. */
START_TEST(requests_move_between_groups_and_lose_nothing)
{
    struct groups *g = calloc(1, sizeof *g);
    ck_assert(g);
    g->random = (uint64_t)_i;
    struct sched_config cfg = config(SLOTS, 24, 2);
    cfg.prefix_cache = true;
    cfg.replay_limit = 1000000;
    ck_assert_int_eq(sched_book_create(&g->book, NULL), ST_OK);
    cfg.book = g->book;
    for (uint32_t k = 0; k < GROUPS; k++) {
        g->s[k] = create(&cfg);
        attach(g, k);
    }
    for (uint64_t id = 1; id <= REQUESTS || g->live > 0;) {
        uint32_t k = draw(g, GROUPS), what = draw(g, 100);
        if (what < 20 && id <= REQUESTS && g->live < LIVE)
            submit_next(g, id++, k);
        else if (what < 60)
            make_plan(g, k);
        else if (what < 90)
            take_result(g, k);
        else if (what < 97)
            move(g, k, draw(g, GROUPS));
        else if (what < 98 && g->attached[k])
            lose(g, k);
        else if (!g->attached[k])
            attach(g, k);
        else if (what == 99 && id % 50 == 0)
            (void)!sched_cancel(g->s[k], 1000, id - 1, ST_CANCELLED, NULL), take_events(g, k);
    }
    ck_assert_uint_eq(g->finished + g->ended_otherwise, REQUESTS);
    ck_assert_uint_gt(g->moved, 300);
    for (uint32_t k = 0; k < GROUPS; k++) {
        struct sched_load l = sched_load(g->s[k]);
        ck_assert_uint_eq(l.queued + l.running, 0);
        sched_destroy(g->s[k]);
    }
    sched_book_destroy(g->book);
    free(g);
}
END_TEST

START_TEST(who_holds_something_stays)
{
    struct sched_config cfg = config(4, 16, 2);
    struct sched_book *book;
    uint32_t tokens[1] = {50};
    struct sched_plan p;
    struct sched_event ev;
    ck_assert_int_eq(sched_book_create(&book, NULL), ST_OK);
    cfg.book = book;
    cfg.replay_limit = 1;
    struct sched *a = create_attached(cfg), *b = create_attached(cfg);
    submit(a, 1, 8, 5);
    ck_assert_uint_eq(sched_first_waiting(a), 1);
    ck_assert(sched_plan(a, 1000, &p));
    ck_assert_uint_eq(sched_next_waiting(a, 0), 0);
    ck_assert(!sched_move(a, b, 1)); /* it runs */
    ck_assert(!sched_move(a, b, 2)); /* it is not there */
    ck_assert(!sched_move(a, a, 1));
    ck_assert_int_eq(sched_result(a, 1000, 1, tokens, 1, 0, NULL), ST_OK);
    ck_assert(sched_next_event(a, &ev));
    sched_lose(a, 1000);
    ck_assert(sched_move(a, b, 1));
    ck_assert_uint_eq(sched_load(a).running, 0);
    ck_assert_uint_eq(sched_load(b).running, 1);
    ck_assert(sched_plan(b, 1000, &p));
    ck_assert_uint_eq(p.n_chunk, 1);
    ck_assert_uint_eq(p.chunk[0].n_tokens, 9); /* prompt and the one token that came */
    sched_check(a);
    sched_check(b);
    sched_destroy(a);
    sched_destroy(b);
    sched_book_destroy(book);
}
END_TEST

START_TEST(a_held_group_empties)
{
    struct sched_plan p;
    struct sched *s = create_attached(config(4, 16, 1));
    submit(s, 1, 4, 3);
    ck_assert(sched_plan(s, 1000, &p));
    submit(s, 2, 4, 3);
    sched_hold(s);
    uint32_t token = 50;
    for (uint64_t step = 1; step <= 3; step++) {
        ck_assert_int_eq(sched_result(s, 1000, step, &token, 1, 0, NULL), ST_OK);
        bool more = sched_plan(s, 1000, &p);
        ck_assert_uint_eq(more && p.n_admit > 0, 0);
    }
    ck_assert_uint_eq(sched_runs(s), 0);
    ck_assert_uint_eq(sched_queue(s).requests, 1);
    sched_destroy(s);
}
END_TEST

/* ---- tenants ---- */

static enum status_code submit_of(struct sched *s, uint64_t id, uint64_t tenant, struct status *st)
{
    const uint32_t prompt[8] = {50, 51, 52, 53, 54, 55, 56, 57};
    const struct sched_request req = {
        .id = id, .prompt = prompt, .n_prompt = 8, .max_new = 1, .deadline_us = INT64_MAX, .tenant = tenant};
    enum status_code rc = sched_submit(s, 1000, &req, st);
    sched_check(s);
    return rc;
}

/* One step, a request in it; ids of tenant 2 are odd. */
static void serve_one(struct sched *s, uint32_t served[2])
{
    struct sched_plan p = plan(s);
    uint32_t token = 50;
    ck_assert_int_eq(sched_result(s, 1000, p.step, &token, 1, 0, NULL), ST_OK);
    expect_token(s, p.chunk[0].id, token);
    expect_finished(s, p.chunk[0].id);
    served[p.chunk[0].id % 2]++;
    sched_check(s);
}

/* Tenant 1 has group A for itself; so group B is for tenant 2 until both have had as much. */
START_TEST(tenants_share_all_groups_evenly)
{
    struct sched_config cfg = config(1, 16, 1);
    struct sched_book *book;
    struct status st = STATUS_INIT;
    uint32_t served[2] = {0};
    cfg.max_queued = 200;
    ck_assert_int_eq(sched_book_create(&book, NULL), ST_OK);
    cfg.book = book;
    struct sched *a = create_attached(cfg), *b = create_attached(cfg);
    for (uint64_t i = 0; i < 40; i++) {
        ck_assert_int_eq(submit_of(a, 1000 + 2 * i, 1, &st), ST_OK);
        ck_assert_int_eq(submit_of(b, 2000 + 2 * i, 1, &st), ST_OK);
        ck_assert_int_eq(submit_of(b, 3001 + 2 * i, 2, &st), ST_OK);
    }
    for (int i = 0; i < 30; i++) {
        serve_one(a, served);
        serve_one(b, served);
    }
    ck_assert_uint_eq(served[0] + served[1], 60);
    ck_assert_msg(served[0] >= 29 && served[0] <= 31, "%u and %u", served[0], served[1]);
    sched_destroy(a); /* with what waits there */
    ck_assert_int_eq(submit_of(b, 4000, 3, &st), ST_OK);
    serve_one(b, served); /* the newcomer begins at the least that anybody has had */
    sched_destroy(b);
    sched_book_destroy(book);
}
END_TEST

START_TEST(the_queues_bounds_hold_over_all_groups)
{
    struct sched_config cfg = config(1, 16, 1);
    struct sched_book *book;
    struct status st = STATUS_INIT;
    cfg.max_queued = 6;
    cfg.max_queued_tenant = 3;
    ck_assert_int_eq(sched_book_create(&book, NULL), ST_OK);
    cfg.book = book;
    struct sched *a = create_attached(cfg), *b = create_attached(cfg);
    ck_assert_int_eq(submit_of(a, 1, 1, &st), ST_OK);
    ck_assert_int_eq(submit_of(a, 2, 1, &st), ST_OK);
    ck_assert_int_eq(submit_of(b, 3, 1, &st), ST_OK);
    ck_assert_int_eq(submit_of(b, 4, 1, &st), ST_RESOURCE_EXHAUSTED);
    ck_assert_str_eq(st.message, "the tenant's queue is full: 3 requests wait (max_queued_tenant 3)");
    ck_assert_int_eq(submit_of(b, 5, 2, &st), ST_OK);
    ck_assert(sched_move(a, b, 2)); /* a move is no new request */
    sched_check(a);
    sched_check(b);
    st = (struct status)STATUS_INIT;
    ck_assert_int_eq(submit_of(a, 6, 1, &st), ST_RESOURCE_EXHAUSTED);
    for (uint64_t id = 7; id < 9; id++)
        ck_assert_int_eq(submit_of(a, id, 2, &st), ST_OK);
    st = (struct status)STATUS_INIT;
    ck_assert_int_eq(submit_of(a, 9, 3, &st), ST_RESOURCE_EXHAUSTED);
    ck_assert_str_eq(st.message, "the queue is full: 6 requests wait (max_queued 6)");
    uint32_t served[2] = {0};
    serve_one(a, served);
    ck_assert_int_eq(submit_of(b, 9, 3, &st), ST_OK);
    sched_destroy(a);
    sched_destroy(b);
    sched_book_destroy(book);
}
END_TEST

/* It knows tokens that another process drew, goes before who waits, and is bound by no queue. */
START_TEST(a_resumed_request_goes_on_behind_what_is_known)
{
    struct sched_config cfg = config(2, 16, 1);
    cfg.max_queued = 1;
    struct sched *s = create(&cfg);
    struct status st = STATUS_INIT;
    uint32_t prompt[] = {1, 2, 3, 4}, output[] = {50, 51, 52}, stop = 7;
    struct sched_request req = {.id = 2,
                                .prompt = prompt,
                                .n_prompt = 4,
                                .max_new = 5,
                                .stop_ids = &stop,
                                .n_stop = 1,
                                .deadline_us = INT64_MAX,
                                .output = output,
                                .n_output = 3};
    submit(s, 1, 8, 5);
    ck_assert_int_eq(sched_submit(s, 1000, &req, &st), ST_INVALID_ARGUMENT); /* not without `resumed` */
    ck_assert(strstr(st.message, "output"));
    req.resumed = true;
    req.n_output = 5;
    ck_assert_int_eq(sched_submit(s, 1000, &req, &st), ST_INVALID_ARGUMENT);
    req.n_output = 3;
    ck_assert_int_eq(sched_submit(s, 1000, &req, &st), ST_OK);
    req.id = 3;
    req.n_output = 0;
    ck_assert_int_eq(sched_submit(s, 1000, &req, &st), ST_OK); /* the queue is full */
    sched_check(s);
    ck_assert_uint_eq(sched_load(s).queued, 1);
    ck_assert_uint_eq(sched_load(s).running, 2);
    ck_assert_int_eq(sched_attach(s, 1000, 2, 256, &ROOMY, &st), ST_OK);
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.n_admit, 2);
    ck_assert(p.admit[0].id == 2 && p.admit[1].id == 3);
    ck_assert_uint_eq(p.n_chunk, 2);
    ck_assert_uint_eq(p.chunk[0].n_tokens, 7);
    ck_assert_uint_eq(p.chunk[0].tokens[6], 52);
    ck_assert_uint_eq(p.chunk[1].n_tokens, 4);
    RESULT(s, p.step, 53, 60);
    expect_token(s, 2, 53);
    expect_token(s, 3, 60);
    p = plan(s);
    RESULT(s, p.step, 54, 7);
    expect_token(s, 2, 54);
    struct sched_event ev = expect_finished(s, 2);
    ck_assert(ev.n_prompt == 4 && ev.n_new == 5 && ev.replays == 1 && ev.first_token_us == 3000);
    expect_token(s, 3, 7);
    ck_assert(expect_finished(s, 3).stopped);
    sched_destroy(s);
}
END_TEST

TCase *scheduler_move(void)
{
    TCase *moves = tcase_create("move");
    tcase_set_timeout(moves, 60);
    tcase_add_loop_test(moves, requests_move_between_groups_and_lose_nothing, 0, 2);
    tcase_add_test(moves, who_holds_something_stays);
    tcase_add_test(moves, a_held_group_empties);
    tcase_add_test(moves, tenants_share_all_groups_evenly);
    tcase_add_test(moves, the_queues_bounds_hold_over_all_groups);
    tcase_add_test(moves, a_resumed_request_goes_on_behind_what_is_known);
    return moves;
}
