/* Clients that leave, ranks that die, ends. Part of check_coordinator. */
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "tandem/v1/worker_control.pb-c.h"
#include "tests/coord_ask.h"

START_TEST(cancel_frees_the_slot_within_a_step)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.step_us = 20000;
    struct fake_group *g = start_ready(&p, &o, (const char *[]){"--prefix-cache", "off", NULL}); /* else it is kept */
    struct proc_reply r = {0};
    struct ask a;
    for (int i = 0; i < 3; i++) {
        ask_ids(&a, 8, 1, 1000);
        struct rpc_stream *s = proc_open(&p, &a.m, 0);
        ck_assert(proc_read(s, &r, WAIT_MS));
        rpc_stream_cancel(s);
        uint64_t step = fake_group_steps(g);
        ck_assert(wait_running(&p, 0, 0));
        rpc_stream_close(s);
        for (int64_t until = proc_now_ms() + WAIT_MS; fake_group_used_slots(g) && proc_now_ms() < until;)
            usleep(1000);
        ck_assert_uint_eq(fake_group_used_slots(g), 0);
        /* two were in flight, one releases; how long the cancel takes to arrive is the rest */
        ck_assert_uint_le(fake_group_steps(g), step + 8);
    }
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(deadlines_end_queued_and_running_requests)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.max_slots = 1;
    o.step_us = 5000;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct proc_reply r = {0}, queued = {0};
    struct ask a;
    ask_ids(&a, 8, 1, 1000);
    struct rpc_stream *s = proc_open(&p, &a.m, 600);
    ck_assert(proc_read(s, &r, WAIT_MS));
    proc_generate(&p, &a.m, 200, &queued);
    ck_assert_int_eq(queued.code, ST_DEADLINE_EXCEEDED);
    ck_assert_uint_eq(queued.n_ids, 0);
    proc_drain(s, &r);
    ck_assert_int_eq(r.code, ST_DEADLINE_EXCEEDED);
    ck_assert_uint_gt(r.n_ids, 1);
    rpc_stream_close(s);
    ck_assert(wait_running(&p, 0, 0));
    proc_reply_free(&r);
    proc_reply_free(&queued);
    finish(&p, g);
}
END_TEST

START_TEST(abort_ends_by_name_and_all)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct rpc_stream *s[3];
    struct status st = STATUS_INIT;
    struct ask a;
    uint32_t aborted = 0;
    static const char *const names[] = {"r0", "nobody", "r1"};
    fake_group_mood(g, 0, FAKE_HOLD);
    for (int i = 0; i < 3; i++) {
        char name[16];
        snprintf(name, sizeof name, "r%d", i);
        ask_ids(&a, 8, 1, 100);
        ask_name(&a, name);
        s[i] = proc_open(&p, &a.m, 0);
    }
    ck_assert(wait_live(&p, 3));
    ck_assert_int_eq(abort_call(&p, NULL, 0, false, &aborted, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(abort_call(&p, names, 3, false, &aborted, &st), ST_NOT_FOUND);
    ck_assert_msg(strstr(st.message, "nobody") != NULL, "%s", st.message);
    ck_assert(wait_live(&p, 1)); /* the others were ended all the same */
    ck_assert_int_eq(abort_call(&p, NULL, 0, true, &aborted, &st), ST_OK);
    ck_assert_uint_eq(aborted, 1);
    for (int i = 0; i < 3; i++) {
        struct proc_reply r = {0};
        proc_drain(s[i], &r);
        ck_assert_int_eq(r.code, ST_CANCELLED);
        proc_reply_free(&r);
        rpc_stream_close(s[i]);
    }
    fake_group_mood(g, 0, FAKE_WELL);
    finish(&p, g);
}
END_TEST

START_TEST(drain_lets_live_requests_end)
{
    struct proc p;
    char line[512];
    struct fake_options o = FAKE_OPTIONS;
    o.step_us = 5000;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct proc_reply r = {0}, refused;
    struct ask a;
    uint32_t remaining = 99;
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS)); /* ready */
    ask_ids(&a, 8, 1, 60);
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    ck_assert(proc_read(s, &r, WAIT_MS));
    ck_assert_int_eq(drain_call(&p, 0, &remaining), ST_OK);
    ck_assert_uint_eq(remaining, 1);
    proc_generate(&p, &a.m, 0, &refused);
    ck_assert_int_eq(refused.code, ST_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(refused.message, "draining"));
    proc_reply_free(&refused);
    ck_assert_int_eq(drain_call(&p, 50, &remaining), ST_OK);
    ck_assert_uint_eq(remaining, 1);
    proc_drain(s, &r);
    check_ids(&r, 8, 1, 60);
    rpc_stream_close(s);
    ck_assert_int_eq(drain_call(&p, 5000, &remaining), ST_OK);
    ck_assert_uint_eq(remaining, 0);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "drained");
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(sigterm_waits_for_clients_and_a_second_does_not)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.step_us = 5000;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct proc_reply r = {0};
    struct ask a;
    ask_ids(&a, 8, 1, 60);
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    ck_assert(proc_read(s, &r, WAIT_MS));
    kill(p.pid, SIGTERM);
    proc_drain(s, &r);
    check_ids(&r, 8, 1, 60);
    rpc_stream_close(s);
    proc_reply_free(&r);
    ck_assert_int_eq(proc_end(&p, 0, WAIT_MS), 0);
    ck_assert(fake_group_stop(g));

    g = start_ready(&p, &o, NULL);
    ask_ids(&a, 8, 1, 1000);
    s = proc_open(&p, &a.m, 0);
    ck_assert(proc_read(s, &r, WAIT_MS));
    kill(p.pid, SIGTERM);
    ck_assert(proc_wait_state(&p, STATE(DRAINING), WAIT_MS));
    kill(p.pid, SIGINT);
    proc_drain(s, &r);
    ck_assert_int_eq(r.code, ST_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(r.message, "stopping"));
    rpc_stream_close(s);
    proc_reply_free(&r);
    ck_assert_int_eq(proc_end(&p, 0, WAIT_MS), 0);
    ck_assert(fake_group_stop(g));
}
END_TEST

struct loss {
    enum fake_mood mood;
    uint32_t rank;
    const char *reason;
    bool permanent;
};

static const struct loss losses[] = {
    {FAKE_DROP, 1, "rank 1 was lost: its stream was closed", false},
    {FAKE_SILENT, 1, "rank 1 was lost: no heartbeat for", false},
    {FAKE_HOLD, 1, "rank 1 was lost: step ", false}, /* overdue */
    {FAKE_HOLD, 0, "rank 0 was lost: step ", false},
    {FAKE_WRONG_STEP, 0, "rank 0 was lost: it answered step", false},
    {FAKE_WRONG_STEP, 1, "rank 1 was lost: it answered step", false},
    {FAKE_WRONG_EPOCH, 1, "rank 1 was lost: a message of epoch 2, expected 1", false},
    {FAKE_GARBAGE, 1, "rank 1 was lost: its stream was closed", false},
    {FAKE_WRONG_COUNT, 0, "rank 0 was lost: step", false},
    {FAKE_WRONG_TOKEN, 0, "the vocabulary has 2048", false},
    {FAKE_FAULT, 1, "rank 1: " FAKE_FAULT_TEXT " (DATA_LOSS)", true},
};

START_TEST(log_probabilities_that_do_not_come_end_the_request_only)
{
    const char *args[] = {NULL};
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, args);
    Tandem__V1__Output output = TANDEM__V1__OUTPUT__INIT;
    struct proc_reply r = {0};
    struct ask a;
    ask_ids(&a, 8, 1, 20);
    output.logprobs_is_case = TANDEM__V1__OUTPUT__LOGPROBS_IS_LOGPROBS;
    a.m.output = &output;
    proc_generate(&p, &a.m, 0, &r); /* fake ranks have none */
    ck_assert_int_eq(r.code, ST_INTERNAL);
    ck_assert_ptr_nonnull(strstr(r.message, "no log probability"));
    proc_reply_free(&r);
    ask_ids(&a, 8, 1, 20);
    r = (struct proc_reply){0};
    proc_generate(&p, &a.m, 0, &r);
    check_ids(&r, 8, 1, 20);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(options_that_the_ranks_lack_are_refused_by_name)
{
    const char *args[] = {NULL};
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.lacks = TANDEM__V1__SAMPLE_OPTION__ADJUST | TANDEM__V1__SAMPLE_OPTION__MIN_P;
    struct fake_group *g = start_ready(&p, &o, args);
    for (int i = 0; i < 3; i++) {
        static const char *const says[] = {"sampling.min_p", "sampling.presence_penalty", NULL};
        struct proc_reply r = {0};
        struct ask a;
        ask_ids(&a, 8, 1, 5);
        a.sampling.min_p_is_case = TANDEM__V1__SAMPLING__MIN_P_IS_MIN_P;
        a.sampling.min_p = i == 0 ? 0.1f : 0.0f;
        a.sampling.presence_penalty_is_case = TANDEM__V1__SAMPLING__PRESENCE_PENALTY_IS_PRESENCE_PENALTY;
        a.sampling.presence_penalty = i == 1 ? 0.5f : 0.0f;
        a.sampling.typical_p_is_case = TANDEM__V1__SAMPLING__TYPICAL_P_IS_TYPICAL_P;
        a.sampling.typical_p = 0.5f; /* this one they have */
        proc_generate(&p, &a.m, 0, &r);
        ck_assert_int_eq(r.code, says[i] ? ST_UNIMPLEMENTED : ST_OK);
        if (says[i])
            ck_assert_ptr_nonnull(strstr(r.message, says[i]));
        proc_reply_free(&r);
    }
    finish(&p, g);
}
END_TEST

START_TEST(a_lost_rank_ends_the_epoch_and_the_next_group_goes_on)
{
    const struct loss *l = &losses[_i];
    const char *args[] = {
        "--heartbeat-interval-ms", "100", "--heartbeat-timeout-ms", "600", "--step-timeout-ms", "1000", NULL};
    struct proc p;
    char line[1024], want[512];
    struct fake_options o = FAKE_OPTIONS;
    o.step_us = 2000;
    struct fake_group *g = start_ready(&p, &o, args);
    struct proc_reply r = {0};
    struct ask a;
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS)); /* ready */
    ask_ids(&a, 8, 1, 150);
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    ck_assert(proc_read(s, &r, WAIT_MS));
    int64_t t = proc_now_ms();
    fake_group_mood(g, l->rank, l->mood);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    t = proc_now_ms() - t;
    ck_assert_int_lt(t, 4000);
    snprintf(want, sizeof want, "group-lost epoch=1 permanent=%d reason=", l->permanent);
    ck_assert_msg(strncmp(line, want, strlen(want)) == 0 && strstr(line, l->reason), "%s", line);
    ck_assert(proc_wait_state(&p, STATE(RECOVERING), WAIT_MS));
    if (l->permanent) { /* the next would fail, too: nobody waits for it */
        struct proc_reply late = {0};
        proc_drain(s, &r);
        ck_assert_msg(r.code == ST_UNAVAILABLE && strstr(r.message, l->reason), "%s", r.message);
        ck_assert_uint_gt(r.retry_after_ms, 0);
        proc_generate(&p, &a.m, 0, &late);
        ck_assert_int_eq(late.code, ST_UNAVAILABLE);
        ck_assert_msg(strstr(late.message, "waiting for a new worker group") != NULL, "%s", late.message);
        proc_reply_free(&late);
    }
    /* the survivor was told to make room */
    if (l->mood != FAKE_HOLD) {
        struct status st = STATUS_INIT;
        bool shutdown = false, relaunch = false;
        ck_assert_int_eq(fake_rank_end(g, 1 - l->rank, &st, &shutdown, &relaunch), ST_OK);
        ck_assert(shutdown && relaunch);
    }
    ck_assert(fake_group_stop(g));
    o.launch_id = 2;
    g = fake_group_start(p.control, &o);
    ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
    ck_assert_uint_eq(fake_group_epoch(g), 2);
    if (!l->permanent) {
        proc_drain(s, &r);
        check_ids(&r, 8, 1, 150);
        ck_assert_uint_eq(r.replays, 1);
    }
    rpc_stream_close(s);
    proc_reply_free(&r);
    ask_ids(&a, 8, 7, 20);
    proc_generate(&p, &a.m, 0, &r);
    check_ids(&r, 8, 7, 20);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

/* What a client of the lost group hears, and who stays. */
static const char *const no_replay[] = {"--replay", "off", NULL};

START_TEST(queued_requests_outlive_the_group)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.max_slots = 1;
    struct fake_group *g = start_ready(&p, &o, no_replay);
    struct proc_reply r = {0};
    struct ask a;
    fake_group_mood(g, 0, FAKE_HOLD);
    ask_ids(&a, 8, 1, 4);
    struct rpc_stream *running = proc_open(&p, &a.m, 0);
    ck_assert(wait_running(&p, 1, 0));
    ask_ids(&a, 8, 2, 4);
    struct rpc_stream *queued = proc_open(&p, &a.m, 0);
    ck_assert(wait_running(&p, 1, 1));
    fake_group_mood(g, 1, FAKE_DROP);
    proc_drain(running, &r);
    ck_assert_int_eq(r.code, ST_UNAVAILABLE);
    ck_assert(wait_running(&p, 0, 1));
    ck_assert(fake_group_stop(g));
    o.launch_id = 2;
    g = fake_group_start(p.control, &o);
    proc_reply_free(&r);
    proc_drain(queued, &r);
    check_ids(&r, 8, 2, 4);
    rpc_stream_close(running);
    rpc_stream_close(queued);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

/* No group may attach to a coordinator that stops: what waits for one is told so, not left to the drain timeout. */
START_TEST(a_stop_without_a_group_keeps_nobody_waiting)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.max_slots = 1;
    struct fake_group *g = start_ready(&p, &o, no_replay);
    struct proc_reply r = {0}, q = {0};
    struct ask a;
    fake_group_mood(g, 0, FAKE_HOLD);
    ask_ids(&a, 8, 1, 4);
    struct rpc_stream *running = proc_open(&p, &a.m, 0);
    ck_assert(wait_running(&p, 1, 0));
    ask_ids(&a, 8, 2, 4);
    struct rpc_stream *queued = proc_open(&p, &a.m, 0);
    ck_assert(wait_running(&p, 1, 1));
    if (_i == 1) {
        kill(p.pid, SIGTERM);
        ck_assert(proc_wait_state(&p, STATE(DRAINING), WAIT_MS));
    }
    int64_t t = proc_now_ms();
    fake_group_mood(g, 1, FAKE_DROP);
    proc_drain(running, &r);
    ck_assert_int_eq(r.code, ST_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(r.message, "rank 1 was lost"));
    ck_assert_int_eq(r.retry_after_ms > 0, _i == 0);
    if (_i == 0)
        kill(p.pid, SIGTERM);
    proc_drain(queued, &q);
    ck_assert_int_eq(q.code, ST_UNAVAILABLE);
    ck_assert_msg(strstr(q.message, "stopping") && strstr(q.message, "rank 1 was lost"), "%s", q.message);
    ck_assert_uint_eq(q.retry_after_ms, 0);
    ck_assert_int_lt(proc_now_ms() - t, 5000);
    rpc_stream_close(running);
    rpc_stream_close(queued);
    proc_reply_free(&r);
    proc_reply_free(&q);
    ck_assert_int_eq(proc_end(&p, 0, WAIT_MS), 0);
    ck_assert(fake_group_stop(g));
}
END_TEST

START_TEST(a_rank_that_attaches_twice_ends_its_group)
{
    struct proc p;
    char line[512];
    struct status st = STATUS_INIT;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, no_replay);
    struct proc_reply r = {0};
    struct ask a;
    bool shutdown = false, relaunch = false;
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS)); /* ready */
    fake_group_mood(g, 0, FAKE_HOLD);
    ask_ids(&a, 8, 1, 4);
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    ck_assert(wait_running(&p, 1, 0));
    o.partial = true; /* rank 0 of the same launch, alone */
    struct fake_group *again = fake_group_start(p.control, &o);
    proc_drain(s, &r);
    ck_assert_int_eq(r.code, ST_UNAVAILABLE);
    ck_assert_msg(strstr(r.message, "rank 0 was lost: it attached again"), "%s", r.message);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_msg(strstr(line, "group-lost epoch=1 permanent=0"), "%s", line);
    ck_assert_int_eq(fake_rank_end(g, 1, &st, &shutdown, &relaunch), ST_OK);
    ck_assert(shutdown && relaunch);
    ck_assert(fake_group_stop(g));
    ck_assert(fake_group_stop(again)); /* its half group of epoch 2 goes with it */
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_msg(strstr(line, "group-lost epoch=2 permanent=0"), "%s", line);
    o.partial = false;
    o.launch_id = 2;
    g = fake_group_start(p.control, &o);
    ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
    rpc_stream_close(s);
    proc_reply_free(&r);
    proc_generate(&p, &a.m, 0, &r);
    check_ids(&r, 8, 1, 4);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(ranks_that_do_not_belong_are_refused)
{
    const char *args[] = {"--tp", "2", NULL};
    struct proc p;
    struct status st = STATUS_INIT;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, args);
    struct proc_reply r;
    struct ask a;
    o.launch_id = 2; /* a second group */
    struct fake_group *other = fake_group_start(p.control, &o);
    ck_assert_int_eq(fake_rank_end(other, 0, &st, NULL, NULL), ST_ALREADY_EXISTS);
    ck_assert_ptr_nonnull(strstr(st.message, "epoch 1"));
    ck_assert(fake_group_stop(other));
    o.size = 3;
    other = fake_group_start(p.control, &o);
    ck_assert_int_eq(fake_rank_end(other, 2, &st, NULL, NULL), ST_FAILED_PRECONDITION);
    ck_assert_msg(strstr(st.message, "3 ranks") && strstr(st.message, "--tp 2"), "%s", st.message);
    ck_assert(fake_group_stop(other));
    o.size = 2;
    o.protocol = 99;
    other = fake_group_start(p.control, &o);
    ck_assert_int_eq(fake_rank_end(other, 0, &st, NULL, NULL), ST_FAILED_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(st.message, "99"));
    ck_assert(fake_group_stop(other));
    ask_ids(&a, 8, 1, 4); /* the first one serves on */
    proc_generate(&p, &a.m, 0, &r);
    check_ids(&r, 8, 1, 4);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(a_group_that_never_gets_ready_is_no_group)
{
    struct proc p;
    char line[1024];
    struct fake_options o = FAKE_OPTIONS;
    o.never_ready = true;
    start(&p, NULL);
    struct fake_group *g = fake_group_start(p.control, &o);
    usleep(100000);
    ck_assert(proc_wait_state(&p, STATE(STARTING), WAIT_MS));
    fake_group_mood(g, 0, FAKE_FAULT);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "group-lost epoch=1 permanent=1 reason=rank 0: " FAKE_FAULT_TEXT " (DATA_LOSS)");
    ck_assert(proc_wait_state(&p, STATE(STARTING), WAIT_MS));
    finish(&p, g);
}
END_TEST

START_TEST(a_rank_that_beats_and_loads_nothing_is_lost)
{
    const char *args[] = {"--heartbeat-interval-ms", "50", "--load-timeout-ms", "400", NULL};
    struct proc p;
    char line[1024];
    struct fake_options o = FAKE_OPTIONS;
    o.never_ready = true;
    o.loading = _i == 0 ? 0 : 8;
    start(&p, args);
    int64_t began_ms = proc_now_ms();
    struct fake_group *g = fake_group_start(p.control, &o);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    int64_t took_ms = proc_now_ms() - began_ms;
    ck_assert_msg(strstr(line, "permanent=0") && strstr(line, "got no further for 400 ms"), "%s", line);
    ck_assert_int_ge(took_ms, o.loading * 100 + 400 - 20); /* progress moves the bound */
    ck_assert(fake_group_stop(g));
    o.never_ready = false; /* the next group serves */
    o.loading = 1;
    o.launch_id = 2;
    g = fake_group_start(p.control, &o);
    ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
    finish(&p, g);
}
END_TEST

/* Between a client and the server: passes on what the client says, and of the answers only the first bytes, as a client
 * does whose process stands still. */
struct proxy {
    int listener, client, server;
    size_t answers_left;
    atomic_bool stop;
    pthread_t thread;
    char address[128];
};

static bool pass_on(int from, int to, size_t *left)
{
    char buf[4096];
    ssize_t n = read(from, buf, left && *left < sizeof buf ? *left : sizeof buf);
    if (n <= 0 || write(to, buf, (size_t)n) != n)
        return false;
    if (left)
        *left -= (size_t)n;
    return true;
}

static void *proxy_main(void *arg)
{
    struct proxy *x = arg;
    x->client = accept(x->listener, NULL, NULL);
    bool ok = x->client >= 0;
    while (ok && !atomic_load(&x->stop)) {
        struct pollfd fds[2] = {{.fd = x->client, .events = POLLIN},
                                {.fd = x->answers_left ? x->server : -1, .events = POLLIN}};
        poll(fds, 2, 20);
        if (fds[0].revents)
            ok = pass_on(x->client, x->server, NULL);
        if (ok && fds[1].revents)
            ok = pass_on(x->server, x->client, &x->answers_left);
    }
    return NULL;
}

static int unix_socket(const char *path, bool listening)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(a.sun_path, sizeof a.sun_path, "%s", path);
    ck_assert_int_ge(fd, 0);
    if (listening) {
        ck_assert_int_eq(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
        ck_assert_int_eq(listen(fd, 1), 0);
    } else {
        ck_assert_int_eq(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
    }
    return fd;
}

START_TEST(a_client_that_never_reads_is_dropped)
{
    const char *args[] = {"--slow-client-timeout-ms", "500", NULL};
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.max_context = 100000;
    o.total_pages = 20000;
    struct fake_group *g = start_ready(&p, &o, args);
    struct proxy x = {.answers_left = 2000};
    struct rpc_channel *direct = p.ch;
    struct proc_reply other;
    struct ask a;
    snprintf(x.address, sizeof x.address, "%s-proxy", p.address);
    x.listener = unix_socket(x.address + 5, true);
    x.server = unix_socket(p.address + 5, false);
    ck_assert_int_eq(pthread_create(&x.thread, NULL, proxy_main, &x), 0);
    ck_assert_int_eq(rpc_channel_create(&p.ch, x.address, NULL), ST_OK);
    ask_ids(&a, 8, 1, _i == 0 ? 99000 : 6000);
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    struct rpc_channel *proxied = p.ch;
    p.ch = direct;
    ck_assert(wait_running(&p, 1, 0));
    ck_assert(wait_running(&p, 0, 0)); /* the server's own doing */
    Tandem__V1__Load *l = get_load(&p);
    if (_i == 0) { /* dropped while it ran; the short one, as a rule, when it was done and its text waited */
        ck_assert_uint_lt(l->generated_tokens, 90000);
        ck_assert_uint_eq(l->finished_requests, 0);
    }
    tandem__v1__load__free_unpacked(l, NULL);
    ask_ids(&a, 8, 2, 50); /* nobody else was held up */
    proc_generate(&p, &a.m, 0, &other);
    check_ids(&other, 8, 2, 50);
    proc_reply_free(&other);
    uint32_t remaining = 99;
    ck_assert_int_eq(drain_call(&p, 5000, &remaining), ST_OK);
    ck_assert_uint_eq(remaining, 0); /* its call is gone too */
    atomic_store(&x.stop, true);
    pthread_join(x.thread, NULL);
    rpc_stream_close(s);
    rpc_channel_destroy(proxied);
    close(x.client);
    close(x.server);
    close(x.listener);
    unlink(x.address + 5);
    finish(&p, g);
}
END_TEST

START_TEST(clients_that_come_and_go_leave_nothing)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    uint64_t x = 12345;
    for (int round = 0; round < 200; round++) {
        struct ask a;
        struct proc_reply r = {0};
        x = x * UINT64_C(6364136223846793005) + 1442695040888963407u;
        ask_ids(&a, 1 + (uint32_t)(x >> 40) % 600, x, 1 + (uint32_t)(x >> 50) % 50);
        struct rpc_stream *s = proc_open(&p, &a.m, round % 5 == 4 ? 1 + (x >> 33) % 20 : 0);
        for (unsigned i = 0; i < (x >> 60) && proc_read(s, &r, WAIT_MS); i++)
            ;
        if (round % 3 == 0)
            rpc_stream_cancel(s);
        rpc_stream_close(s); /* cancels what is under way */
        proc_reply_free(&r);
    }
    ck_assert(wait_running(&p, 0, 0));
    uint32_t remaining = 99;
    ck_assert_int_eq(drain_call(&p, 5000, &remaining), ST_OK);
    ck_assert_uint_eq(remaining, 0);
    finish(&p, g);
}
END_TEST

TCase *coord_faults(void)
{
    TCase *faults = tcase_create("faults");
    tcase_set_timeout(faults, 90);
    tcase_add_test(faults, cancel_frees_the_slot_within_a_step);
    tcase_add_test(faults, deadlines_end_queued_and_running_requests);
    tcase_add_test(faults, abort_ends_by_name_and_all);
    tcase_add_test(faults, drain_lets_live_requests_end);
    tcase_add_test(faults, sigterm_waits_for_clients_and_a_second_does_not);
    tcase_add_loop_test(faults, a_lost_rank_ends_the_epoch_and_the_next_group_goes_on, 0,
                        (int)(sizeof losses / sizeof *losses));
    tcase_add_test(faults, queued_requests_outlive_the_group);
    tcase_add_loop_test(faults, a_stop_without_a_group_keeps_nobody_waiting, 0, 2);
    tcase_add_test(faults, a_rank_that_attaches_twice_ends_its_group);
    tcase_add_test(faults, ranks_that_do_not_belong_are_refused);
    tcase_add_test(faults, a_group_that_never_gets_ready_is_no_group);
    tcase_add_loop_test(faults, a_rank_that_beats_and_loads_nothing_is_lost, 0, 2);
    tcase_add_loop_test(faults, a_client_that_never_reads_is_dropped, 0, 2);
    tcase_add_test(faults, log_probabilities_that_do_not_come_end_the_request_only);
    tcase_add_test(faults, options_that_the_ranks_lack_are_refused_by_name);
    tcase_add_test(faults, clients_that_come_and_go_leave_nothing);
    return faults;
}
