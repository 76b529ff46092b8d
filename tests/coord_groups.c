/* Several worker groups behind one coordinator. Part of check_coordinator. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tandem/v1/worker_control.pb-c.h"
#include "tests/coord_ask.h"

struct two {
    struct proc p;
    struct fake_options oa, ob;
    struct fake_group *a, *b;
};

static bool wait_groups(struct proc *p, unsigned serving)
{
    for (int64_t until = proc_now_ms() + WAIT_MS; proc_now_ms() < until; usleep(2000)) {
        unsigned n = 0;
        Tandem__V1__Load *l = get_load(p);
        for (size_t i = 0; i < l->n_groups; i++)
            n += l->groups[i]->serving;
        tandem__v1__load__free_unpacked(l, NULL);
        if (n == serving)
            return true;
    }
    return false;
}

/* Groups "a" (epoch 1) and "b" (epoch 2); the caller has filled in the options. */
static void start_two(struct two *t, const char *const *args)
{
    t->oa.group = "a";
    t->ob.group = "b";
    t->ob.launch_id = 100;
    t->a = start_ready(&t->p, &t->oa, args);
    t->b = fake_group_start(t->p.control, &t->ob);
    ck_assert(wait_groups(&t->p, 2));
}

#define TWO                                                                                                            \
    {                                                                                                                  \
        .oa = FAKE_OPTIONS, .ob = FAKE_OPTIONS                                                                         \
    }

static void finish_two(struct two *t)
{
    ck_assert(!t->b || fake_group_stop(t->b));
    finish(&t->p, t->a);
}

static Tandem__V1__GroupLoad of_group(struct proc *p, const char *name)
{
    Tandem__V1__Load *l = get_load(p);
    Tandem__V1__GroupLoad found = TANDEM__V1__GROUP_LOAD__INIT;
    for (size_t i = 0; i < l->n_groups; i++)
        if (strcmp(l->groups[i]->name, name) == 0)
            found = *l->groups[i];
    ck_assert_msg(found.name[0], "group %s is not listed", name);
    tandem__v1__load__free_unpacked(l, NULL);
    found.name = NULL; /* was the message's */
    return found;
}

static void run_one(struct proc *p, const struct ask *a, uint32_t n_prompt, uint64_t seed, uint32_t n_new)
{
    struct proc_reply r = {0};
    proc_generate(p, &a->m, 0, &r);
    check_ids(&r, n_prompt, seed, n_new);
    proc_reply_free(&r);
}

static struct rpc_stream *open_one(struct proc *p, uint32_t n_prompt, uint64_t seed, uint32_t n_new)
{
    struct ask a;
    ask_ids(&a, n_prompt, seed, n_new);
    return proc_open(p, &a.m, 0);
}

/* Returns how often it was replayed. */
static uint32_t close_one(struct rpc_stream *s, uint32_t n_prompt, uint64_t seed, uint32_t n_new)
{
    struct proc_reply r = {0};
    proc_drain(s, &r);
    check_ids(&r, n_prompt, seed, n_new);
    uint32_t replays = r.replays;
    proc_reply_free(&r);
    rpc_stream_close(s);
    return replays;
}

static enum status_code drain_group(struct proc *p, const char *name, uint64_t timeout_ms, bool restart,
                                    uint32_t *moved, struct status *st)
{
    Tandem__V1__DrainRequest req = TANDEM__V1__DRAIN_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    req.timeout_ms = timeout_ms;
    req.group = (char *)name;
    req.restart = restart;
    enum status_code rc =
        rpc_unary(p->ch, "/tandem.v1.Control/Drain", &req.base, &tandem__v1__drain_response__descriptor, &m, 20000, st);
    if (rc == ST_OK) {
        *moved = ((Tandem__V1__DrainResponse *)m)->remaining_requests;
        protobuf_c_message_free_unpacked(m, NULL);
    }
    return rc;
}

START_TEST(load_is_spread_and_told)
{
    struct two t = TWO;
    struct rpc_stream *s[16];
    t.oa.step_us = t.ob.step_us = 2000;
    start_two(&t, NULL);
    for (uint32_t i = 0; i < 16; i++)
        s[i] = open_one(&t.p, 8, 1 + i, 100);
    ck_assert(wait_running(&t.p, 16, 0));
    ck_assert_uint_eq(of_group(&t.p, "a").running_requests, 8);
    ck_assert_uint_eq(of_group(&t.p, "b").running_requests, 8);
    for (uint32_t i = 0; i < 16; i++)
        ck_assert_uint_eq(close_one(s[i], 8, 1 + i, 100), 0);
    Tandem__V1__GetServerInfoRequest req = TANDEM__V1__GET_SERVER_INFO_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    ck_assert_int_eq(rpc_unary(t.p.ch, "/tandem.v1.Control/GetServerInfo", &req.base,
                               &tandem__v1__server_info__descriptor, &m, 5000, NULL),
                     ST_OK);
    const Tandem__V1__ServerInfo *info = (Tandem__V1__ServerInfo *)m;
    ck_assert_uint_eq(info->epoch, 2);
    ck_assert_uint_eq(info->max_running_requests, 16);
    ck_assert_uint_eq(info->n_groups, 2);
    ck_assert_str_eq(info->groups[1]->name, "b");
    ck_assert_int_eq(info->groups[1]->state, STATE(READY));
    ck_assert_uint_eq(info->n_ranks, 4);
    ck_assert_str_eq(info->ranks[3]->group, "b");
    ck_assert_uint_eq(info->ranks[3]->rank, 1);
    protobuf_c_message_free_unpacked(m, NULL);
    finish_two(&t);
}
END_TEST

/* Blocks of 64 tokens. */
START_TEST(a_prompt_goes_where_its_beginning_is)
{
    struct two t = TWO;
    struct ask a, other;
    start_two(&t, NULL);
    ask_ids(&a, 512, 1, 5);
    ask_ids(&other, 512, 2, 5);
    other.prompt[0] = 7;
    run_one(&t.p, &a, 512, 1, 5);
    const char *first = of_group(&t.p, "a").routed_requests ? "a" : "b", *second = *first == 'a' ? "b" : "a";
    run_one(&t.p, &other, 512, 2, 5); /* of two idle groups the one that got less */
    ck_assert_uint_eq(of_group(&t.p, second).routed_requests, 1);
    for (int i = 0; i < 3; i++) {
        run_one(&t.p, &a, 512, 1, 5);
        run_one(&t.p, &other, 512, 2, 5);
        ck_assert_uint_eq(of_group(&t.p, first).cached_tokens, 448 * (unsigned)(i + 1)); /* all but the last block */
        ck_assert_uint_eq(of_group(&t.p, second).cached_tokens, 448 * (unsigned)(i + 1));
    }
    ck_assert_uint_eq(of_group(&t.p, first).routed_requests, 4);
    finish_two(&t);
}
END_TEST

/* Two of three groups die at moments that the seed draws and come back; one is always there. */
START_TEST(requests_of_a_lost_group_go_on_in_another_exactly_once)
{
    enum { N = 72, LOSSES = 12 };
    const char *args[] = {"--replay-limit", "1000", NULL};
    struct two t = TWO;
    struct rpc_stream *s[N];
    uint64_t x = 7;
    uint32_t replays = 0;
    struct fake_options oc = FAKE_OPTIONS;
    t.oa.step_us = t.ob.step_us = oc.step_us = 300;
    t.oa.max_slots = 5;
    t.ob.total_pages = oc.total_pages = 24;
    t.ob.token_bytes = oc.token_bytes = 512;
    oc.group = "c";
    oc.launch_id = 200;
    start_two(&t, args);
    struct fake_group *c = fake_group_start(t.p.control, &oc);
    ck_assert(wait_groups(&t.p, 3));
    for (uint32_t i = 0; i < N; i++)
        s[i] = open_one(&t.p, 1 + i * 7 % 90, 1000 + i, 1 + i * 11 % 120);
    for (int k = 0; k < LOSSES; k++) {
        x = x * UINT64_C(6364136223846793005) + 1442695040888963407u;
        usleep((useconds_t)(x >> 33) % 15000);
        struct fake_group **g = (x >> 24) & 1 ? &t.b : &c;
        fake_group_mood(*g, (uint32_t)(x >> 20) & 1, FAKE_DROP);
        ck_assert(wait_groups(&t.p, 2));
        ck_assert(fake_group_stop(*g));
        struct fake_options *o = g == &c ? &oc : &t.ob;
        o->launch_id++;
        *g = fake_group_start(t.p.control, o);
        ck_assert(wait_groups(&t.p, 3));
    }
    for (uint32_t i = 0; i < N; i++)
        replays += close_one(s[i], 1 + i * 7 % 90, 1000 + i, 1 + i * 11 % 120);
    ck_assert_uint_gt(replays, 0);
    Tandem__V1__Load *l = get_load(&t.p);
    ck_assert_uint_eq(l->replays, replays);
    ck_assert_uint_eq(l->finished_requests, N);
    ck_assert_uint_eq(l->used_pages, 0);
    tandem__v1__load__free_unpacked(l, NULL);
    ck_assert(fake_group_stop(c));
    finish_two(&t);
}
END_TEST

START_TEST(a_loss_is_not_seen_from_outside_while_another_serves)
{
    const char *args[] = {"--replay-timeout-ms", "300", NULL};
    struct two t = TWO;
    struct rpc_stream *s[20];
    char line[512];
    t.oa.step_us = t.ob.step_us = 3000;
    start_two(&t, args);
    for (uint32_t i = 0; i < 20; i++)
        s[i] = open_one(&t.p, 8, 1 + i, 150);
    ck_assert(wait_running(&t.p, 16, 4));
    fake_group_mood(t.a, 0, FAKE_DROP);
    ck_assert(wait_groups(&t.p, 1));
    ck_assert(proc_wait_state(&t.p, STATE(READY), 0));
    Tandem__V1__GroupLoad gone = of_group(&t.p, "a");
    ck_assert_uint_eq(gone.running_requests + gone.queued_requests, 0);
    for (uint32_t i = 0; i < 20; i++)
        close_one(s[i], 8, 1 + i, 150);
    ck_assert_uint_ge(of_group(&t.p, "b").moved_requests, 8);
    const char *want[] = {"ready epoch=1 group=a", "ready epoch=2 group=b",
                          "group-lost epoch=1 group=a permanent=0 reason=rank 0 was lost: its stream was closed"};
    for (int i = 0; i < 3; i++) {
        ck_assert(proc_event(&t.p, line, sizeof line, WAIT_MS));
        ck_assert_str_eq(line, want[i]);
    }
    finish_two(&t);
}
END_TEST

/* What runs in the group may end in it: "a" has more time than it needs. What does not end in time moves, all of it: "b" has
 * none, and no step of the 400 is over before 3 ms. */
START_TEST(a_drained_group_loses_nothing)
{
    struct two t = TWO;
    struct rpc_stream *s[8];
    struct status st = STATUS_INIT;
    char line[512];
    uint32_t moved = 99, replays = 0;
    bool shutdown = false, relaunch = true;
    t.oa.step_us = t.ob.step_us = 3000;
    start_two(&t, NULL);
    for (uint32_t i = 0; i < 8; i++)
        s[i] = open_one(&t.p, 8, 1 + i, 150);
    ck_assert(wait_running(&t.p, 8, 0));
    ck_assert_int_eq(drain_group(&t.p, "none", 0, false, &moved, &st), ST_NOT_FOUND);
    ck_assert_int_eq(drain_group(&t.p, "a", 15000, false, &moved, &st), ST_OK);
    ck_assert_uint_eq(moved, 0);
    ck_assert_int_eq(fake_rank_end(t.a, 0, &st, &shutdown, &relaunch), ST_OK);
    ck_assert(shutdown && !relaunch);
    for (int i = 0; i < 3; i++)
        ck_assert(proc_event(&t.p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "group-drained epoch=1 group=a restart=0");
    ck_assert_str_eq(t.p.attaching, "attaching epoch=2 group=b");
    for (uint32_t i = 0; i < 8; i++)
        ck_assert_uint_eq(close_one(s[i], 8, 1 + i, 150), 0);
    st = (struct status)STATUS_INIT;
    ck_assert_int_eq(drain_group(&t.p, "b", 0, false, &moved, &st), ST_FAILED_PRECONDITION);
    ck_assert_msg(strstr(st.message, "no other than \"b\" serves") != NULL, "%s", st.message);
    ck_assert(fake_group_stop(t.a));
    t.oa.launch_id++;
    t.a = fake_group_start(t.p.control, &t.oa);
    ck_assert(wait_groups(&t.p, 2));
    for (uint32_t i = 0; i < 8; i++)
        s[i] = open_one(&t.p, 8, 1 + i, 400);
    ck_assert(wait_running(&t.p, 8, 0));
    uint32_t in_b = of_group(&t.p, "b").running_requests;
    ck_assert_uint_ge(in_b, 1);
    ck_assert_int_eq(drain_group(&t.p, "b", 0, false, &moved, &st), ST_OK);
    ck_assert_uint_eq(moved, in_b);
    for (uint32_t i = 0; i < 8; i++)
        replays += close_one(s[i], 8, 1 + i, 400);
    ck_assert_uint_eq(replays, moved);
    finish_two(&t);
}
END_TEST

/* The only group goes and comes back: requests wait, those that run and those that come. */
START_TEST(a_restarted_group_is_waited_for)
{
    struct two t = TWO;
    struct fake_options o = FAKE_OPTIONS;
    struct status st = STATUS_INIT;
    uint32_t moved = 0;
    bool shutdown = false, relaunch = false;
    o.step_us = 2000;
    struct fake_group *g = start_ready(&t.p, &o, NULL);
    struct rpc_stream *s = open_one(&t.p, 8, 1, 200);
    ck_assert(wait_running(&t.p, 1, 0));
    ck_assert_int_eq(drain_group(&t.p, "default", 0, true, &moved, &st), ST_OK);
    ck_assert_uint_eq(moved, 1);
    ck_assert_int_eq(fake_rank_end(g, 1, &st, &shutdown, &relaunch), ST_OK);
    ck_assert(shutdown && relaunch);
    ck_assert(proc_wait_state(&t.p, STATE(RECOVERING), WAIT_MS));
    struct rpc_stream *late = open_one(&t.p, 8, 2, 20);
    ck_assert(wait_running(&t.p, 1, 1));
    ck_assert(fake_group_stop(g));
    o.launch_id = 2;
    g = fake_group_start(t.p.control, &o);
    ck_assert_uint_eq(close_one(s, 8, 1, 200), 1);
    ck_assert_uint_eq(close_one(late, 8, 2, 20), 0);
    finish(&t.p, g);
}
END_TEST

/* One after the other, under load. */
START_TEST(a_rolling_restart_is_not_noticed)
{
    enum { N = 24 };
    struct two t = TWO;
    struct rpc_stream *s[N];
    struct status st = STATUS_INIT;
    uint32_t moved = 0;
    t.oa.step_us = t.ob.step_us = 1000;
    start_two(&t, NULL);
    for (uint32_t i = 0; i < N; i++)
        s[i] = open_one(&t.p, 8, 1 + i, 300);
    for (int i = 0; i < 4; i++) {
        struct fake_group **g = i & 1 ? &t.b : &t.a;
        struct fake_options *o = i & 1 ? &t.ob : &t.oa;
        ck_assert_int_eq(drain_group(&t.p, o->group, 30, true, &moved, &st), ST_OK);
        ck_assert(fake_group_stop(*g));
        o->launch_id++;
        *g = fake_group_start(t.p.control, o);
        ck_assert(wait_groups(&t.p, 2));
    }
    for (uint32_t i = 0; i < N; i++)
        close_one(s[i], 8, 1 + i, 300);
    finish_two(&t);
}
END_TEST

START_TEST(what_waits_moves_to_a_group_that_comes)
{
    struct two t = TWO;
    struct rpc_stream *s[6];
    t.oa.max_slots = 1;
    t.oa.step_us = t.ob.step_us = 2000;
    t.oa.group = "a";
    t.ob.group = "b";
    t.ob.launch_id = 100;
    t.a = start_ready(&t.p, &t.oa, NULL);
    for (uint32_t i = 0; i < 6; i++) {
        s[i] = open_one(&t.p, 8, 1 + i, 100);
        ck_assert(wait_live(&t.p, i + 1));
    }
    ck_assert(wait_running(&t.p, 1, 5));
    t.b = fake_group_start(t.p.control, &t.ob);
    ck_assert(wait_running(&t.p, 6, 0));
    ck_assert_uint_eq(of_group(&t.p, "b").moved_requests, 5);
    for (uint32_t i = 0; i < 6; i++)
        ck_assert_uint_eq(close_one(s[i], 8, 1 + i, 100), 0);
    finish_two(&t);
}
END_TEST

/* Contexts of 256 and 1024: what only one can hold goes there, whatever its load. */
START_TEST(groups_may_differ_in_size)
{
    struct two t = TWO;
    struct ask a;
    struct proc_reply r = {0};
    t.oa.max_context = 256;
    t.oa.max_step_tokens = 64;
    start_two(&t, NULL);
    for (uint32_t i = 0; i < 3; i++) {
        ask_ids(&a, 500, i, 100);
        run_one(&t.p, &a, 500, i, 100);
    }
    ck_assert_uint_eq(of_group(&t.p, "b").routed_requests, 3);
    ask_ids(&a, 1000, 1, 100);
    proc_generate(&t.p, &a.m, 0, &r);
    ck_assert_int_eq(r.code, ST_INVALID_ARGUMENT);
    ck_assert_msg(strstr(r.message, "1024") != NULL, "%s", r.message);
    proc_reply_free(&r);
    finish_two(&t);
}
END_TEST

START_TEST(a_group_that_does_not_fit_in_is_refused)
{
    struct two t = TWO;
    struct status st = STATUS_INIT;
    struct rpc_stream *s;
    const struct {
        const char *group;
        uint32_t vocab_size, lacks;
        const char *message;
    } bad[] = {{"b", 2047, 0, ""}, /* a Shutdown, its reason is in the log */
               {"b", 2048, TANDEM__V1__SAMPLE_OPTION__SCORE, ""},
               {"a", 2048, 0, "a worker group is attached already (\"a\", epoch 1, 2 of 2 ranks)"},
               {"not a name", 2048, 0, "group: expected a name"}};
    t.oa.group = "a";
    t.oa.step_us = 1000;
    t.a = start_ready(&t.p, &t.oa, NULL);
    s = open_one(&t.p, 8, 1, 200);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        bool shutdown = false;
        t.ob.group = bad[i].group;
        t.ob.launch_id = 10 + i;
        t.ob.vocab_size = bad[i].vocab_size;
        t.ob.lacks = bad[i].lacks;
        struct fake_group *g = fake_group_start(t.p.control, &t.ob);
        fake_rank_end(g, 0, &st, &shutdown, NULL);
        ck_assert_msg(strstr(st.message, bad[i].message) != NULL, "%s", st.message);
        ck_assert_int_eq(shutdown, bad[i].message[0] == '\0');
        fake_rank_end(g, 1, &st, &shutdown, NULL);
        ck_assert(fake_group_stop(g));
        ck_assert(wait_groups(&t.p, 1));
    }
    close_one(s, 8, 1, 200); /* the one that serves has not noticed */
    finish(&t.p, t.a);
}
END_TEST

/* Before it is known whether the group is lost: nothing new goes there, and what waits leaves. */
START_TEST(a_group_that_hangs_gets_nothing_new)
{
    const char *args[] = {"--step-timeout-ms", "4000", NULL};
    struct two t = TWO;
    struct rpc_stream *s[16];
    t.oa.step_us = t.ob.step_us = 1000;
    start_two(&t, args);
    for (uint32_t i = 0; i < 2; i++)
        s[i] = open_one(&t.p, 8, 1 + i, 100);
    ck_assert(wait_running(&t.p, 2, 0));
    fake_group_mood(t.a, 0, FAKE_HOLD);
    usleep(1300000);
    uint64_t before = of_group(&t.p, "a").routed_requests;
    for (uint32_t i = 2; i < 16; i++)
        s[i] = open_one(&t.p, 8, 1 + i, 50);
    for (uint32_t i = 2; i < 16; i++)
        ck_assert_uint_eq(close_one(s[i], 8, 1 + i, 50), 0);
    ck_assert_uint_eq(of_group(&t.p, "a").routed_requests, before);
    uint32_t replays = 0;
    for (uint32_t i = 0; i < 2; i++) /* the step is overdue in the end */
        replays += close_one(s[i], 8, 1 + i, 100);
    ck_assert_uint_eq(replays, 1);
    finish_two(&t);
}
END_TEST

/* It loses two groups before they answer anything; the third, which serves others, does not get it. */
START_TEST(what_may_kill_groups_does_not_go_on_to_the_next)
{
    struct two t = TWO;
    struct fake_options oc = FAKE_OPTIONS;
    oc.group = "c";
    oc.launch_id = 200;
    oc.step_us = 2000;
    start_two(&t, NULL);
    struct fake_group *c = fake_group_start(t.p.control, &oc);
    ck_assert(wait_groups(&t.p, 3));
    fake_group_mood(t.a, 0, FAKE_HOLD);
    fake_group_mood(t.b, 0, FAKE_HOLD);
    struct rpc_stream *s = open_one(&t.p, 8, 1, 20);
    ck_assert(wait_running(&t.p, 1, 0));
    ck_assert_uint_eq(of_group(&t.p, "a").running_requests, 1);
    fake_group_mood(t.a, 1, FAKE_DROP);
    ck_assert(wait_groups(&t.p, 2));
    ck_assert_uint_eq(of_group(&t.p, "b").running_requests, 1);
    fake_group_mood(t.b, 1, FAKE_DROP);
    ck_assert(wait_groups(&t.p, 1));
    struct rpc_stream *other = open_one(&t.p, 8, 2, 20);
    ck_assert_uint_eq(close_one(other, 8, 2, 20), 0);
    ck_assert_uint_eq(of_group(&t.p, "b").running_requests, 1);
    ck_assert_uint_eq(of_group(&t.p, "c").moved_requests, 0);
    ck_assert(fake_group_stop(t.b));
    t.ob.launch_id++;
    t.b = fake_group_start(t.p.control, &t.ob);
    ck_assert_uint_eq(close_one(s, 8, 1, 20), 2);
    ck_assert(fake_group_stop(c));
    finish_two(&t);
}
END_TEST

/* What only the one that goes for good could hold is told so. */
START_TEST(a_drained_group_leaves_nothing_behind)
{
    struct two t = TWO;
    struct status st = STATUS_INIT;
    struct proc_reply r = {0};
    uint32_t moved = 0;
    t.oa.max_context = 256;
    t.ob.step_us = 2000;
    start_two(&t, NULL);
    struct rpc_stream *s = open_one(&t.p, 500, 1, 500);
    ck_assert(wait_running(&t.p, 1, 0));
    ck_assert_int_eq(drain_group(&t.p, "b", 10, false, &moved, &st), ST_OK);
    proc_drain(s, &r);
    ck_assert_int_eq(r.code, ST_UNAVAILABLE);
    ck_assert_msg(strstr(r.message, "no other can hold") != NULL, "%s", r.message);
    rpc_stream_close(s);
    proc_reply_free(&r);
    ck_assert(wait_running(&t.p, 0, 0));
    finish_two(&t);
}
END_TEST

/* Names come and go, as those of pods do: what is known of the oldest is given up. */
START_TEST(entries_of_groups_that_are_gone_are_used_again)
{
    struct two t = TWO;
    struct ask a;
    const char *args[] = {"--replay-timeout-ms", "1", NULL};
    char name[16];
    uint64_t finished = 0;
    start(&t.p, args);
    ask_ids(&a, 8, 1, 3);
    for (unsigned i = 0; i < 70; i++) {
        snprintf(name, sizeof name, "g%u", i);
        t.oa.group = name;
        t.oa.launch_id = 1 + i;
        t.a = fake_group_start(t.p.control, &t.oa);
        ck_assert(proc_wait_state(&t.p, STATE(READY), WAIT_MS));
        run_one(&t.p, &a, 8, 1, 3);
        fake_group_mood(t.a, 0, FAKE_DROP);
        ck_assert(proc_wait_state(&t.p, STATE(RECOVERING), WAIT_MS));
        ck_assert(fake_group_stop(t.a));
    }
    Tandem__V1__Load *l = get_load(&t.p);
    finished = l->finished_requests;
    ck_assert_uint_le(l->n_groups, 64);
    tandem__v1__load__free_unpacked(l, NULL);
    ck_assert_uint_eq(finished, 70);
    finish(&t.p, NULL);
}
END_TEST

TCase *coord_groups(void)
{
    TCase *groups = tcase_create("groups");
    tcase_set_timeout(groups, 90);
    tcase_add_test(groups, load_is_spread_and_told);
    tcase_add_test(groups, a_prompt_goes_where_its_beginning_is);
    tcase_add_test(groups, requests_of_a_lost_group_go_on_in_another_exactly_once);
    tcase_add_test(groups, a_loss_is_not_seen_from_outside_while_another_serves);
    tcase_add_test(groups, a_drained_group_loses_nothing);
    tcase_add_test(groups, a_restarted_group_is_waited_for);
    tcase_add_test(groups, a_rolling_restart_is_not_noticed);
    tcase_add_test(groups, what_waits_moves_to_a_group_that_comes);
    tcase_add_test(groups, groups_may_differ_in_size);
    tcase_add_test(groups, a_group_that_does_not_fit_in_is_refused);
    tcase_add_test(groups, a_group_that_hangs_gets_nothing_new);
    tcase_add_test(groups, what_may_kill_groups_does_not_go_on_to_the_next);
    tcase_add_test(groups, a_drained_group_leaves_nothing_behind);
    tcase_add_test(groups, entries_of_groups_that_are_gone_are_used_again);
    return groups;
}
