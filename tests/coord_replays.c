/* What becomes of requests whose worker group is lost: they go on in the next. Part of check_coordinator. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tandem/v1/worker_control.pb-c.h"
#include "tests/coord_ask.h"

/* The group goes, and the coordinator knows. */
static void lose(struct proc *p, struct fake_group *g)
{
    fake_group_mood(g, 1, FAKE_DROP);
    ck_assert(proc_wait_state(p, STATE(RECOVERING), WAIT_MS));
    ck_assert(fake_group_stop(g));
}

static struct fake_group *next_group(struct proc *p, struct fake_options *o)
{
    o->launch_id++;
    return fake_group_start(p->control, o);
}

static uint64_t replays(struct proc *p)
{
    Tandem__V1__Load *l = get_load(p);
    uint64_t n = l->replays;
    tandem__v1__load__free_unpacked(l, NULL);
    return n;
}

/* A request that has begun, and its group lost. */
static struct rpc_stream *begin_and_lose(struct proc *p, const char *const *args, struct fake_options *o, struct ask *a,
                                         struct proc_reply *r, uint64_t deadline_ms)
{
    o->step_us = 2000;
    struct fake_group *g = start_ready(p, o, args);
    *r = (struct proc_reply){0};
    ask_ids(a, 8, 1, 150);
    ask_name(a, "held");
    struct rpc_stream *s = proc_open(p, &a->m, deadline_ms);
    for (int i = 0; i < 3; i++)
        ck_assert(proc_read(s, r, WAIT_MS));
    lose(p, g);
    return s;
}

static void ends_with(struct rpc_stream *s, struct proc_reply *r, enum status_code code, const char *text)
{
    proc_drain(s, r);
    ck_assert_msg(r->code == code && strstr(r->message, text), "%s: %s", status_name(r->code), r->message);
    rpc_stream_close(s);
    proc_reply_free(r);
}

/* Fewer slots than requests, pages for few of them, two plans in flight: some decode, some prefill, some have their last
 * token on its way, some wait. Groups are lost again and again, at moments that the seed draws. */
START_TEST(every_stream_goes_on_exactly_once_through_many_groups)
{
    enum { N = 64, LOSSES = 8 };
    const char *args[] = {"--replay-limit", "1000", NULL};
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.max_slots = 12;
    o.total_pages = 24;
    o.token_bytes = 512;
    o.step_us = 300;
    struct fake_group *g = start_ready(&p, &o, args);
    struct rpc_stream *s[N];
    uint64_t x = 1;
    for (uint32_t i = 0; i < N; i++) {
        struct ask a;
        ask_ids(&a, 1 + i * 7 % 90, 1000 + i, 1 + i * 11 % 120);
        s[i] = proc_open(&p, &a.m, 0);
    }
    for (int k = 0; k < LOSSES; k++) {
        x = x * UINT64_C(6364136223846793005) + 1442695040888963407u;
        usleep((useconds_t)(x >> 33) % 20000);
        fake_group_mood(g, (uint32_t)(x >> 20) & 1, (x >> 21) & 1 ? FAKE_DROP : FAKE_WRONG_STEP);
        /* no plan, no wrong answer: it may have nothing to do any more */
        if (!proc_wait_state(&p, STATE(RECOVERING), 500))
            fake_group_mood(g, 0, FAKE_DROP);
        ck_assert(proc_wait_state(&p, STATE(RECOVERING), WAIT_MS));
        ck_assert(fake_group_stop(g));
        g = next_group(&p, &o);
        ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
    }
    uint32_t replayed = 0;
    for (uint32_t i = 0; i < N; i++) {
        struct proc_reply r = {0};
        proc_drain(s[i], &r);
        check_ids(&r, 1 + i * 7 % 90, 1000 + i, 1 + i * 11 % 120);
        replayed += r.replays;
        proc_reply_free(&r);
        rpc_stream_close(s[i]);
    }
    ck_assert_uint_gt(replayed, LOSSES);
    ck_assert_uint_eq(replays(&p), replayed);
    ck_assert(wait_running(&p, 0, 0));
    finish(&p, g);
}
END_TEST

/* The rank drew nothing: the coordinator made the seed, once. */
START_TEST(a_seed_that_the_server_drew_is_kept)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct proc_reply r = {0};
    struct ask a;
    o.step_us = 2000;
    struct fake_group *g = start_ready(&p, &o, NULL);
    ask_ids(&a, 8, 0, 200);
    a.sampling.seed_is_case = TANDEM__V1__SAMPLING__SEED_IS__NOT_SET;
    a.sampling.temperature_is_case = TANDEM__V1__SAMPLING__TEMPERATURE_IS_TEMPERATURE;
    a.sampling.temperature = 1.0f;
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    ck_assert(proc_read(s, &r, WAIT_MS));
    lose(&p, g);
    g = next_group(&p, &o);
    proc_drain(s, &r); /* the ranks check that what they compute again is of the seed that they are given */
    ck_assert_msg(r.code == ST_OK, "%s", r.message);
    ck_assert_uint_eq(r.n_ids, 200);
    ck_assert_uint_eq(r.replays, 1);
    rpc_stream_close(s);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

/* The group goes when the stop string has begun: what is held back of the text outlives it. */
START_TEST(a_stop_string_is_found_across_the_loss)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct proc_reply quiet = {0}, faulty = {0};
    struct ask a;
    o.step_us = 1000;
    struct fake_group *g = start_ready(&p, &o, NULL);
    ask_text(&a, "Once upon a time", 150);
    proc_generate(&p, &a.m, 0, &quiet);
    ck_assert_uint_eq(quiet.n_ids, 150);
    /* what stands late in the text, long enough that it comes in several tokens */
    char stop[13];
    size_t at = quiet.text_len * 2 / 3;
    while (((unsigned char)quiet.text[at] & 0xC0) == 0x80)
        at++;
    size_t end = at + 12 < quiet.text_len ? at + 12 : quiet.text_len;
    while (end < quiet.text_len && ((unsigned char)quiet.text[end] & 0xC0) == 0x80)
        end--;
    memcpy(stop, quiet.text + at, end - at);
    stop[end - at] = '\0';
    char *list[] = {stop};
    a.stopping.stop = list;
    a.stopping.n_stop = 1;
    proc_reply_free(&quiet);
    proc_generate(&p, &a.m, 0, &quiet);
    ck_assert_msg(quiet.code == ST_OK, "%s", quiet.message);
    ck_assert_int_eq(quiet.reason, TANDEM__V1__FINISH__REASON__STOP);
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    while (faulty.n_ids + 2 < quiet.n_ids && proc_read(s, &faulty, WAIT_MS))
        ;
    lose(&p, g);
    g = next_group(&p, &o);
    proc_drain(s, &faulty);
    ck_assert_msg(faulty.code == ST_OK, "%s", faulty.message);
    ck_assert_uint_eq(faulty.n_ids, quiet.n_ids);
    ck_assert_mem_eq(faulty.ids, quiet.ids, quiet.n_ids * sizeof *quiet.ids);
    ck_assert_str_eq(faulty.text, quiet.text);
    ck_assert_int_eq(faulty.reason, quiet.reason);
    rpc_stream_close(s);
    proc_reply_free(&quiet);
    proc_reply_free(&faulty);
    finish(&p, g);
}
END_TEST

START_TEST(new_requests_wait_behind_those_that_had_begun)
{
    const char *args[] = {"--max-queued", "2", NULL};
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct proc_reply r, q[3] = {{0}};
    struct rpc_stream *late[3];
    struct ask a;
    o.max_slots = 1;
    struct rpc_stream *s = begin_and_lose(&p, args, &o, &a, &r, 0);
    for (uint32_t i = 0; i < 3; i++) {
        ask_ids(&a, 8, 2 + i, 20);
        late[i] = proc_open(&p, &a.m, 0);
        if (i < 2)
            ck_assert(wait_running(&p, 1, 1 + i));
    }
    proc_drain(late[2], &q[2]); /* the queue is as bounded as ever */
    ck_assert_int_eq(q[2].code, ST_RESOURCE_EXHAUSTED);
    ck_assert_uint_gt(q[2].retry_after_ms, 0);
    struct fake_group *g = next_group(&p, &o);
    proc_drain(s, &r);
    check_ids(&r, 8, 1, 150);
    for (uint32_t i = 0; i < 2; i++) {
        proc_drain(late[i], &q[i]);
        check_ids(&q[i], 8, 2 + i, 20);
        ck_assert_uint_eq(q[i].replays, 0);
    }
    for (uint32_t i = 0; i < 3; i++) {
        rpc_stream_close(late[i]);
        proc_reply_free(&q[i]);
    }
    rpc_stream_close(s);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(without_a_new_group_the_wait_ends)
{
    const char *args[] = {"--replay-timeout-ms", "300", NULL};
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct proc_reply r, q = {0};
    struct ask a;
    int64_t t = proc_now_ms();
    struct rpc_stream *s = begin_and_lose(&p, args, &o, &a, &r, 0);
    ask_ids(&a, 8, 2, 20);
    struct rpc_stream *late = proc_open(&p, &a.m, 0);
    ends_with(s, &r, ST_UNAVAILABLE, "rank 1 was lost: its stream was closed; no worker group came within 300 ms");
    ends_with(late, &q, ST_UNAVAILABLE, "no worker group came within 300 ms");
    ck_assert_int_lt(proc_now_ms() - t, 3000);
    proc_generate(&p, &a.m, 0, &q); /* from now on at once */
    ck_assert_int_eq(q.code, ST_UNAVAILABLE);
    ck_assert_uint_gt(q.retry_after_ms, 0);
    proc_reply_free(&q);
    ck_assert(wait_running(&p, 0, 0));
    struct fake_group *g = next_group(&p, &o);
    ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
    proc_generate(&p, &a.m, 0, &q);
    check_ids(&q, 8, 2, 20);
    proc_reply_free(&q);
    finish(&p, g);
}
END_TEST

/* Each group dies before it answers anything: after the limit the request ends, and groups live again. */
START_TEST(what_kills_group_after_group_is_ended)
{
    const char *args[] = {"--replay-limit", "2", NULL};
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct proc_reply r;
    struct ask a;
    struct rpc_stream *s = begin_and_lose(&p, args, &o, &a, &r, 0);
    for (int i = 0; i < 2; i++) {
        struct fake_group *g = next_group(&p, &o);
        fake_group_mood(g, 0, FAKE_HOLD);
        ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
        ck_assert(wait_running(&p, 1, 0));
        lose(&p, g);
    }
    ends_with(s, &r, ST_INTERNAL, "3 worker groups in a row were lost while this request ran, without a new token");
    struct fake_group *g = next_group(&p, &o);
    ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
    ask_ids(&a, 8, 2, 20);
    proc_generate(&p, &a.m, 0, &r);
    check_ids(&r, 8, 2, 20);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

enum held_end { BY_DEADLINE, BY_ABORT, BY_CANCEL, BY_TERM, BY_DRAIN, BY_OTHER_MODEL, BY_FEWER_OPTIONS, HELD_ENDS };

START_TEST(what_waits_for_a_group_can_end)
{
    const char *names[] = {"held"};
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = NULL;
    struct proc_reply r;
    struct status st = STATUS_INIT;
    struct ask a;
    uint32_t n = 99;
    struct rpc_stream *s = begin_and_lose(&p, NULL, &o, &a, &r, _i == BY_DEADLINE ? 300 : 0);
    switch (_i) {
    case BY_DEADLINE:
        ends_with(s, &r, ST_DEADLINE_EXCEEDED, "eadline");
        break;
    case BY_ABORT:
        ck_assert_int_eq(abort_call(&p, names, 1, false, &n, &st), ST_OK);
        ck_assert_uint_eq(n, 1);
        ends_with(s, &r, ST_CANCELLED, "aborted by Control.Abort");
        break;
    case BY_CANCEL:
        rpc_stream_close(s);
        proc_reply_free(&r);
        break;
    case BY_TERM: /* no group may attach any more */
        kill(p.pid, SIGTERM);
        ends_with(s, &r, ST_UNAVAILABLE, "stopping");
        ck_assert_int_eq(proc_end(&p, 0, WAIT_MS), 0);
        return;
    case BY_DRAIN: /* admission ends, what is live does not */
        ck_assert_int_eq(drain_call(&p, 0, &n), ST_OK);
        ck_assert_uint_eq(n, 1);
        g = next_group(&p, &o);
        proc_drain(s, &r);
        check_ids(&r, 8, 1, 150);
        ck_assert_uint_eq(r.replays, 1);
        rpc_stream_close(s);
        proc_reply_free(&r);
        ck_assert_int_eq(drain_call(&p, 5000, &n), ST_OK);
        ck_assert_uint_eq(n, 0);
        break;
    case BY_OTHER_MODEL:
        o.vocab_size--;
        g = next_group(&p, &o);
        ends_with(s, &r, ST_UNAVAILABLE, "another model");
        break;
    case BY_FEWER_OPTIONS:
        o.lacks = TANDEM__V1__SAMPLE_OPTION__ADJUST;
        g = next_group(&p, &o);
        ends_with(s, &r, ST_UNAVAILABLE, "lacks options");
        break;
    default:
        ck_abort();
    }
    ck_assert(wait_running(&p, 0, 0));
    finish(&p, g);
}
END_TEST

START_TEST(replay_off_ends_the_running_at_once)
{
    const char *args[] = {"--replay", "off", NULL};
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct proc_reply r, q;
    struct ask a;
    struct rpc_stream *s = begin_and_lose(&p, args, &o, &a, &r, 0);
    ends_with(s, &r, ST_UNAVAILABLE, "rank 1 was lost: its stream was closed");
    proc_generate(&p, &a.m, 0, &q);
    ck_assert_int_eq(q.code, ST_UNAVAILABLE);
    ck_assert_msg(strstr(q.message, "waiting for a new worker group") != NULL, "%s", q.message);
    proc_reply_free(&q);
    ck_assert_uint_eq(replays(&p), 0);
    finish(&p, NULL);
}
END_TEST

TCase *coord_replays(void)
{
    TCase *replay = tcase_create("replay");
    tcase_set_timeout(replay, 90);
    tcase_add_test(replay, every_stream_goes_on_exactly_once_through_many_groups);
    tcase_add_test(replay, a_seed_that_the_server_drew_is_kept);
    tcase_add_test(replay, a_stop_string_is_found_across_the_loss);
    tcase_add_test(replay, new_requests_wait_behind_those_that_had_begun);
    tcase_add_test(replay, without_a_new_group_the_wait_ends);
    tcase_add_test(replay, what_kills_group_after_group_is_ended);
    tcase_add_loop_test(replay, what_waits_for_a_group_can_end, 0, HELD_ENDS);
    tcase_add_test(replay, replay_off_ends_the_running_at_once);
    return replay;
}
