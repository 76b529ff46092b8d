/* Requests that outlive their client's connection, and the coordinator itself. Part of check_coordinator. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "tests/coord_ask.h"
#include "tests/temp_dir.h"

static struct rpc_stream *attach(struct proc *p, const char *name, const struct proc_reply *have)
{
    struct rpc_stream *s = NULL;
    Tandem__V1__AttachRequest m = TANDEM__V1__ATTACH_REQUEST__INIT;
    Tandem__V1__AttachOffset o = TANDEM__V1__ATTACH_OFFSET__INIT, *list[] = {&o};
    m.request_id = (ProtobufCBinaryData){.len = strlen(name), .data = (uint8_t *)name};
    o.tokens = (uint32_t)have->n_ids;
    m.offsets = list;
    m.n_offsets = 1;
    ck_assert_int_eq(rpc_stream_open(&s, p->ch, "/tandem.v1.Inference/Attach", 0, NULL), ST_OK);
    if (rpc_stream_send(s, &m.base, 20000, NULL) == ST_OK)
        (void)!rpc_stream_half_close(s, 0, NULL);
    return s;
}

static void attach_fails(struct proc *p, const char *name, uint32_t tokens, enum status_code code, const char *text)
{
    struct proc_reply have = {.n_ids = tokens}, r = {0};
    struct rpc_stream *s = attach(p, name, &have);
    proc_drain(s, &r);
    ck_assert_msg(r.code == code && strstr(r.message, text), "%s: %s", status_name(r.code), r.message);
    rpc_stream_close(s);
    proc_reply_free(&r);
}

/* The rest of what r has the beginning of. */
static void attach_rest(struct proc *p, const char *name, struct proc_reply *r)
{
    r->n_first = 0;
    struct rpc_stream *s = attach(p, name, r);
    proc_drain(s, r);
    ck_assert_msg(r->code == ST_OK, "%s", r->message);
    rpc_stream_close(s);
}

static struct rpc_stream *begin(struct proc *p, struct ask *a, const char *name, struct proc_reply *r, size_t n)
{
    ask_name(a, name);
    struct rpc_stream *s = proc_open(p, &a->m, 0);
    while (r->n_ids < n)
        ck_assert(proc_read(s, r, WAIT_MS));
    return s;
}

static void same(const struct proc_reply *r, const struct proc_reply *quiet)
{
    ck_assert_uint_eq(r->n_ids, quiet->n_ids);
    ck_assert_mem_eq(r->ids, quiet->ids, quiet->n_ids * sizeof *quiet->ids);
    ck_assert_str_eq(r->text, quiet->text);
    ck_assert_int_eq(r->reason, quiet->reason);
}

/* ---- without a crash ---- */

START_TEST(a_kept_request_is_taken_up_again)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct proc_reply quiet = {0}, r = {0};
    struct ask a;
    o.step_us = 2000;
    struct fake_group *g = start_ready(&p, &o, NULL);
    ask_text(&a, "Once upon a time", 150);
    proc_generate(&p, &a.m, 0, &quiet);
    a.m.keep_ms = 20000;
    struct rpc_stream *s = begin(&p, &a, "held", &r, 5);
    rpc_stream_close(s); /* cancels */
    usleep(50000);
    ck_assert(wait_running(&p, 1, 0)); /* it goes on */
    r.n_first = 0;
    s = attach(&p, "held", &r);
    while (r.n_ids < 40)
        ck_assert(proc_read(s, &r, WAIT_MS));
    struct proc_reply again = {0};
    struct rpc_stream *second = attach(&p, "held", &again); /* from the beginning; takes it from the first */
    proc_drain(s, &r);
    ck_assert_int_eq(r.code, ST_ABORTED);
    ck_assert(strstr(r.message, "another call has attached"));
    rpc_stream_close(s);
    proc_drain(second, &again);
    ck_assert_msg(again.code == ST_OK, "%s", again.message);
    rpc_stream_close(second);
    same(&again, &quiet);
    attach_rest(&p, "held", &r); /* it has finished, and is kept */
    same(&r, &quiet);
    ck_assert_uint_eq(r.n_first, 1);
    attach_rest(&p, "held", &r); /* nothing but the end is left */
    same(&r, &quiet);
    ck_assert(wait_running(&p, 0, 0));
    /* its caller's next of that name */
    proc_reply_free(&r);
    proc_generate(&p, &a.m, 0, &r);
    same(&r, &quiet);
    proc_reply_free(&r);
    proc_reply_free(&again);
    proc_reply_free(&quiet);
    finish(&p, g);
}
END_TEST

START_TEST(what_cannot_be_attached_is_told_why)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct proc_reply r = {0}, kept = {0}, over = {0};
    struct ask a;
    const char *args[] = {"--max-keep-ms", "5000", NULL};
    o.step_us = 3000;
    struct fake_group *g = start_ready(&p, &o, args);
    attach_fails(&p, "nobody", 0, ST_NOT_FOUND, "request_id: \"nobody\"");
    attach_fails(&p, "", 0, ST_INVALID_ARGUMENT, "request_id: 0 bytes");
    ask_ids(&a, 8, 1, 400);
    struct rpc_stream *s = begin(&p, &a, "plain", &r, 2);
    attach_fails(&p, "plain", 0, ST_FAILED_PRECONDITION, "keep_ms was 0");
    rpc_stream_close(s); /* ends it: nothing was asked for */
    ck_assert(wait_running(&p, 0, 0));
    attach_fails(&p, "plain", 0, ST_NOT_FOUND, "request_id: \"plain\"");
    a.m.keep_ms = 5001;
    proc_generate(&p, &a.m, 0, &over);
    ck_assert_int_eq(over.code, ST_INVALID_ARGUMENT);
    ck_assert(strstr(over.message, "keep_ms: 5001, expected at most 5000"));
    a.m.keep_ms = 300;
    s = begin(&p, &a, "short", &kept, 2);
    attach_fails(&p, "short", 401, ST_OUT_OF_RANGE, "offsets[0].tokens: 401, expected at most 400");
    rpc_stream_close(s);
    ck_assert(wait_running(&p, 0, 0)); /* nobody came back */
    attach_fails(&p, "short", 2, ST_NOT_FOUND, "request_id: \"short\"");
    proc_reply_free(&r);
    proc_reply_free(&kept);
    proc_reply_free(&over);
    finish(&p, g);
}
END_TEST

static struct rpc_channel *channel_with(const char *address, const char *token_file)
{
    struct rpc_channel *ch = NULL;
    struct status st = STATUS_INIT;
    struct rpc_client_security sec = {.token_file = token_file};
    ck_assert_msg(rpc_channel_open(&ch, address, &sec, &st) == ST_OK, "%s", st.message);
    return ch;
}

/* Neither one that runs nor one that has ended, and nobody learns from the refusal what it has. */
START_TEST(only_the_caller_of_a_request_attaches_to_it)
{
    static const char *const tokens[] = {"the-first-token-0123456789", "the-second-token-012345678"};
    struct temp_dir d = temp_dir_make();
    char all[300], address[300], file[2][300];
    snprintf(all, sizeof all, "%s/all", d.path);
    snprintf(address, sizeof address, "unix:%s/socket,token", d.path);
    temp_dir_write(&d, "all", "the-first-token-0123456789\nthe-second-token-012345678\n", 54);
    for (int i = 0; i < 2; i++) {
        char name[8] = {(char)('a' + i)};
        temp_dir_write(&d, name, tokens[i], strlen(tokens[i]));
        snprintf(file[i], sizeof file[i], "%s/%s", d.path, name);
    }
    const char *args[] = {"--listen", address, "--token-file", all, NULL};
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct proc_reply r = {0};
    struct ask a;
    o.step_us = 2000;
    struct fake_group *g = start_ready(&p, &o, args);
    *strchr(address, ',') = '\0';
    struct rpc_channel *open = p.ch, *mine = channel_with(address, file[0]), *other = channel_with(address, file[1]);
    ask_ids(&a, 8, 3, 150);
    a.m.keep_ms = 20000;
    p.ch = mine;
    struct rpc_stream *s = begin(&p, &a, "mine", &r, 5);
    for (int ended = 0; ended < 2; ended++) {
        p.ch = other;
        attach_fails(&p, "mine", 5, ST_PERMISSION_DENIED, "\"mine\" is another caller's");
        attach_fails(&p, "mine", 100000, ST_PERMISSION_DENIED, "another caller's"); /* not: behind its end */
        p.ch = open;
        attach_fails(&p, "mine", 5, ST_PERMISSION_DENIED, "another caller's");
        p.ch = mine;
        if (ended)
            break;
        proc_drain(s, &r); /* nobody took it away */
        ck_assert_msg(r.code == ST_OK, "%s", r.message);
        rpc_stream_close(s);
    }
    attach_rest(&p, "mine", &r);
    check_ids(&r, 8, 3, 150);
    proc_reply_free(&r);
    p.ch = open;
    rpc_channel_destroy(mine);
    rpc_channel_destroy(other);
    finish(&p, g);
    temp_dir_remove(&d);
}
END_TEST

/* Finished ones are kept, the newest two. */
START_TEST(what_is_kept_is_bounded)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct ask a;
    char name[16];
    const char *args[] = {"--max-kept", "2", NULL};
    struct fake_group *g = start_ready(&p, &o, args);
    ask_ids(&a, 8, 1, 10);
    a.m.keep_ms = 60000;
    for (int i = 0; i < 4; i++) {
        struct proc_reply r = {0};
        snprintf(name, sizeof name, "k%d", i);
        rpc_stream_close(begin(&p, &a, name, &r, 1));
        proc_reply_free(&r);
        ck_assert(wait_running(&p, 0, 0));
    }
    usleep(1000000); /* that the calls were closed has to arrive */
    attach_fails(&p, "k0", 0, ST_NOT_FOUND, "k0");
    attach_fails(&p, "k1", 0, ST_NOT_FOUND, "k1");
    for (int i = 2; i < 4; i++) {
        struct proc_reply r = {0};
        snprintf(name, sizeof name, "k%d", i);
        attach_rest(&p, name, &r);
        check_ids(&r, 8, 1, 10);
        proc_reply_free(&r);
    }
    finish(&p, g); /* at once: what is only kept is not waited for */
}
END_TEST

/* ---- the coordinator dies ---- */

struct site {
    struct temp_dir dir;
    char journal[300];
    const char *args[8];
};

static struct site site(void)
{
    struct site s = {.dir = temp_dir_make()};
    snprintf(s.journal, sizeof s.journal, "%s/journal", s.dir.path);
    return s;
}

static const char *const *args_of(struct site *s)
{
    const char *args[] = {"--journal", s->journal, "--journal-keep-ms", "20000", "--journal-bytes", "1048576", NULL};
    memcpy(s->args, args, sizeof args);
    return s->args;
}

static struct fake_group *crash_and_start(struct proc *p, struct site *s, struct fake_group *g, struct fake_options *o)
{
    ck_assert_int_eq(proc_end(p, SIGKILL, WAIT_MS), 128 + SIGKILL);
    ck_assert(fake_group_stop(g));
    o->launch_id++;
    return start_ready(p, o, args_of(s));
}

START_TEST(requests_outlive_a_killed_coordinator)
{
    enum { N = 12 };
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct site site_ = site();
    struct rpc_stream *s[N];
    struct proc_reply r[N] = {{0}};
    char name[16];
    o.step_us = 2000;
    o.max_slots = 8; /* some wait */
    struct fake_group *g = start_ready(&p, &o, args_of(&site_));
    for (uint32_t i = 0; i < N; i++) {
        struct ask a;
        ask_ids(&a, 5 + i * 3, 100 + i, 120 + i);
        snprintf(name, sizeof name, "r%u", i);
        s[i] = begin(&p, &a, name, &r[i], i < 8 ? 3 + i : 0);
    }
    ck_assert(wait_live(&p, N));
    usleep(30000); /* the journal writes each 10 ms */
    kill(p.pid, SIGKILL);
    for (uint32_t i = 0; i < N; i++) {
        proc_drain(s[i], &r[i]); /* what is under way belongs to what the client has */
        ck_assert(!r[i].finished);
    }
    for (uint32_t i = 0; i < N; i++)
        rpc_stream_close(s[i]);
    g = crash_and_start(&p, &site_, g, &o);
    for (uint32_t i = 0; i < N; i++) {
        snprintf(name, sizeof name, "r%u", i);
        attach_rest(&p, name, &r[i]);
        check_ids(&r[i], 5 + i * 3, 100 + i, 120 + i);
        ck_assert_uint_eq(r[i].replays, 1);
        proc_reply_free(&r[i]);
    }
    ck_assert(wait_running(&p, 0, 0));
    finish(&p, g);
    temp_dir_remove(&site_.dir);
}
END_TEST

/* Text, stop strings and the end are those of a quiet run; once more after the end, and after another crash. */
START_TEST(text_and_stop_strings_outlive_it_too)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct site site_ = site();
    struct proc_reply quiet = {0}, r = {0}, again = {0};
    struct ask a;
    o.step_us = 1500;
    struct fake_group *g = start_ready(&p, &o, args_of(&site_));
    ask_text(&a, "Once upon a time", 150);
    proc_generate(&p, &a.m, 0, &quiet);
    char stop[64] = "";
    size_t at = quiet.text_len * 3 / 4, n = 0;
    while (((unsigned char)quiet.text[at] & 0xC0) == 0x80)
        at++;
    for (n = 12; ((unsigned char)quiet.text[at + n] & 0xC0) == 0x80; n--)
        ;
    memcpy(stop, quiet.text + at, n);
    char *list[] = {stop};
    a.stopping.stop = list;
    a.stopping.n_stop = 1;
    a.m.keep_ms = 20000;
    proc_reply_free(&quiet);
    proc_generate(&p, &a.m, 0, &quiet);
    ck_assert_int_eq(quiet.reason, TANDEM__V1__FINISH__REASON__STOP);
    struct rpc_stream *s = begin(&p, &a, "stops", &r, quiet.n_ids / 2);
    usleep(20000);
    kill(p.pid, SIGKILL);
    proc_drain(s, &r);
    rpc_stream_close(s);
    g = crash_and_start(&p, &site_, g, &o);
    attach_rest(&p, "stops", &r);
    same(&r, &quiet);
    usleep(30000);
    g = crash_and_start(&p, &site_, g, &o);
    attach_rest(&p, "stops", &again);
    same(&again, &quiet);
    proc_reply_free(&again);
    proc_reply_free(&r);
    proc_reply_free(&quiet);
    finish(&p, g);
    temp_dir_remove(&site_.dir);
}
END_TEST

#ifdef TANDEM_SANITIZED /* a start takes longer */
#define KEEP_MS "3000"
#define WAIT    "5000"
#else
#define KEEP_MS "800"
#define WAIT    "1600"
#endif

/* Who comes before the ranks do waits for them, but not for ever; who does not come is ended. */
START_TEST(a_client_may_come_before_the_ranks)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct site site_ = site();
    struct proc_reply r = {0}, other = {0}, left = {0};
    struct ask a;
    o.step_us = 2000;
    struct fake_group *g = start_ready(&p, &o, args_of(&site_));
    ask_ids(&a, 8, 5, 100);
    struct rpc_stream *s = begin(&p, &a, "early", &r, 10);
    ask_ids(&a, 8, 4, 900);
    struct rpc_stream *nobody = begin(&p, &a, "left", &left, 1); /* its client never comes back */
    ask_ids(&a, 8, 6, 900);
    rpc_stream_close(begin(&p, &a, "gone", &other, 1)); /* cancelled before the crash */
    ck_assert(wait_running(&p, 2, 0));
    usleep(30000);
    kill(p.pid, SIGKILL);
    proc_drain(s, &r);
    rpc_stream_close(s);
    rpc_stream_close(nobody);
    ck_assert_int_eq(proc_end(&p, SIGKILL, WAIT_MS), 128 + SIGKILL);
    ck_assert(fake_group_stop(g));
    const char *args[] = {"--journal", site_.journal, "--journal-keep-ms", KEEP_MS, "--replay-timeout-ms", WAIT, NULL};
    start(&p, args);
    attach_fails(&p, "early", 10, ST_UNAVAILABLE, WAIT " ms"); /* it waited longer than it is kept without a client */
    attach_fails(&p, "gone", 0, ST_NOT_FOUND, "gone");
    attach_fails(&p, "left", 1, ST_NOT_FOUND, "left");
    r.n_first = 0;
    s = attach(&p, "early", &r);
    o.launch_id++;
    g = fake_group_start(p.control, &o);
    proc_drain(s, &r);
    rpc_stream_close(s);
    check_ids(&r, 8, 5, 100);
    proc_reply_free(&r);
    proc_reply_free(&other);
    proc_reply_free(&left);
    finish(&p, g);
    temp_dir_remove(&site_.dir);
}
END_TEST

static void limit_files(const struct proc *p, rlim_t bytes)
{
    struct rlimit limit = {.rlim_cur = bytes, .rlim_max = RLIM_INFINITY};
    ck_assert_int_eq(prlimit(p->pid, RLIMIT_FSIZE, &limit, NULL), 0);
}

/* The journal cannot grow: nobody notices. It can again: it is whole. */
START_TEST(a_journal_that_cannot_be_written_disturbs_nobody)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct site site_ = site();
    struct proc_reply r = {0}, held = {0};
    struct ask a;
    o.step_us = 2000;
    struct fake_group *g = start_ready(&p, &o, args_of(&site_));
    ask_ids(&a, 8, 7, 900);
    struct rpc_stream *s = begin(&p, &a, "held", &held, 5);
    limit_files(&p, 64);
    for (uint32_t i = 0; i < 5; i++) {
        struct ask b;
        ask_ids(&b, 500, i, 30);
        proc_generate(&p, &b.m, 0, &r);
        check_ids(&r, 500, i, 30);
        proc_reply_free(&r);
    }
    limit_files(&p, RLIM_INFINITY);
    usleep(1300000); /* it is tried each second */
    kill(p.pid, SIGKILL);
    proc_drain(s, &held);
    rpc_stream_close(s);
    ck_assert_uint_lt(held.n_ids, 900);
    g = crash_and_start(&p, &site_, g, &o);
    attach_rest(&p, "held", &held);
    check_ids(&held, 8, 7, 900);
    proc_reply_free(&held);
    finish(&p, g);
    temp_dir_remove(&site_.dir);
}
END_TEST

TCase *coord_attach(void)
{
    TCase *t = tcase_create("attach");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, a_kept_request_is_taken_up_again);
    tcase_add_test(t, what_cannot_be_attached_is_told_why);
    tcase_add_test(t, only_the_caller_of_a_request_attaches_to_it);
    tcase_add_test(t, what_is_kept_is_bounded);
    tcase_add_test(t, requests_outlive_a_killed_coordinator);
    tcase_add_test(t, text_and_stop_strings_outlive_it_too);
    tcase_add_test(t, a_client_may_come_before_the_ranks);
    tcase_add_test(t, a_journal_that_cannot_be_written_disturbs_nobody);
    return t;
}
