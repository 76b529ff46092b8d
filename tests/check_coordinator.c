/* The real tandem-coordinator as a child process, a worker group without a model (coord_fake.h), clients over gRPC. */
#include <check.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "coordinator/tokenizer.h"
#include "grpc/health/v1/health.pb-c.h"
#include "tests/coord_fake.h"
#include "tests/coord_proc.h"

#define STATE(name) TANDEM__V1__SERVER_INFO__STATE__##name
#define WAIT_MS     10000

static void start(struct proc *p, const char *const *args)
{
    proc_start(p, TEST_COORDINATOR, TEST_MODEL, args);
}

static struct fake_group *start_ready(struct proc *p, const struct fake_options *o, const char *const *args)
{
    start(p, args);
    struct fake_group *g = fake_group_start(p->control, o);
    ck_assert(proc_wait_state(p, STATE(READY), WAIT_MS));
    return g;
}

static void finish(struct proc *p, struct fake_group *g)
{
    bool ok = g ? fake_group_stop(g) : true;
    ck_assert_int_eq(proc_end(p, SIGTERM, WAIT_MS), 0);
    ck_assert(ok);
}

/* ---- requests ---- */

struct ask {
    Tandem__V1__GenerateRequest m;
    Tandem__V1__TokenIds ids;
    Tandem__V1__Sampling sampling;
    Tandem__V1__Stopping stopping;
    uint32_t prompt[2048], stop[80];
};

/* n prompt ids, this seed, so many new tokens. */
static void ask_ids(struct ask *a, uint32_t n, uint64_t seed, uint32_t max_tokens)
{
    tandem__v1__generate_request__init(&a->m);
    tandem__v1__token_ids__init(&a->ids);
    tandem__v1__sampling__init(&a->sampling);
    tandem__v1__stopping__init(&a->stopping);
    for (uint32_t i = 0; i < n && i < 2048; i++)
        a->prompt[i] = 40 + i % 60;
    a->ids.ids = a->prompt;
    a->ids.n_ids = n;
    a->m.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS;
    a->m.token_ids = &a->ids;
    a->m.sampling = &a->sampling;
    a->m.stopping = &a->stopping;
    a->sampling.seed_is_case = TANDEM__V1__SAMPLING__SEED_IS_SEED;
    a->sampling.seed = seed;
    a->stopping.max_tokens_is_case = TANDEM__V1__STOPPING__MAX_TOKENS_IS_MAX_TOKENS;
    a->stopping.max_tokens = max_tokens;
}

static void ask_text(struct ask *a, const char *text, uint32_t max_tokens)
{
    ask_ids(a, 0, 1, max_tokens);
    a->m.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT;
    a->m.text = (ProtobufCBinaryData){.len = strlen(text), .data = (uint8_t *)text};
}

static void ask_name(struct ask *a, const char *name)
{
    a->m.request_id = (ProtobufCBinaryData){.len = strlen(name), .data = (uint8_t *)name};
}

static void check_ids(const struct proc_reply *r, uint32_t n_prompt, uint64_t seed, uint32_t n_new)
{
    ck_assert_msg(r->code == ST_OK, "%s: %s", status_name(r->code), r->message);
    ck_assert(r->finished);
    ck_assert_uint_eq(r->n_ids, n_new);
    for (uint32_t i = 0; i < n_new; i++)
        ck_assert_uint_eq(r->ids[i], fake_token(seed, n_prompt + i, 2048));
    ck_assert_uint_eq(r->prompt_tokens, n_prompt);
    ck_assert_uint_eq(r->completion_tokens, n_new);
    ck_assert_uint_eq(r->n_first, 1);
}

static Tandem__V1__Load *get_load(struct proc *p)
{
    Tandem__V1__GetLoadRequest req = TANDEM__V1__GET_LOAD_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    struct status st = STATUS_INIT;
    enum status_code rc =
        rpc_unary(p->ch, "/tandem.v1.Control/GetLoad", &req.base, &tandem__v1__load__descriptor, &m, 5000, &st);
    ck_assert_msg(rc == ST_OK, "GetLoad: %s", st.message);
    return (Tandem__V1__Load *)m;
}

static bool wait_running(struct proc *p, uint32_t running, uint32_t queued)
{
    for (int64_t until = proc_now_ms() + WAIT_MS; proc_now_ms() < until; usleep(2000)) {
        Tandem__V1__Load *l = get_load(p);
        bool hit = l->running_requests == running && l->queued_requests == queued;
        tandem__v1__load__free_unpacked(l, NULL);
        if (hit)
            return true;
    }
    return false;
}

static bool wait_live(struct proc *p, uint32_t n)
{
    for (int64_t until = proc_now_ms() + WAIT_MS; proc_now_ms() < until; usleep(2000)) {
        Tandem__V1__Load *l = get_load(p);
        bool hit = l->running_requests + l->queued_requests == n;
        tandem__v1__load__free_unpacked(l, NULL);
        if (hit)
            return true;
    }
    return false;
}

static enum status_code drain_call(struct proc *p, uint64_t timeout_ms, uint32_t *remaining)
{
    Tandem__V1__DrainRequest req = TANDEM__V1__DRAIN_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    req.timeout_ms = timeout_ms;
    enum status_code rc = rpc_unary(p->ch, "/tandem.v1.Control/Drain", &req.base,
                                    &tandem__v1__drain_response__descriptor, &m, 20000, NULL);
    if (rc == ST_OK) {
        *remaining = ((Tandem__V1__DrainResponse *)m)->remaining_requests;
        protobuf_c_message_free_unpacked(m, NULL);
    }
    return rc;
}

static enum status_code abort_call(struct proc *p, const char *const *names, size_t n, bool all, uint32_t *aborted,
                                   struct status *st)
{
    Tandem__V1__AbortRequest req = TANDEM__V1__ABORT_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    req.n_request_ids = n;
    req.request_ids = (char **)names;
    req.all = all;
    enum status_code rc =
        rpc_unary(p->ch, "/tandem.v1.Control/Abort", &req.base, &tandem__v1__abort_response__descriptor, &m, 5000, st);
    if (rc == ST_OK) {
        *aborted = ((Tandem__V1__AbortResponse *)m)->aborted;
        protobuf_c_message_free_unpacked(m, NULL);
    }
    return rc;
}

static bool health_is(struct proc *p, const char *service, bool serving)
{
    Grpc__Health__V1__HealthCheckRequest req = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    req.service = (char *)service;
    for (int64_t until = proc_now_ms() + WAIT_MS; proc_now_ms() < until; usleep(5000)) {
        ProtobufCMessage *m = NULL;
        if (rpc_unary(p->ch, "/grpc.health.v1.Health/Check", &req.base,
                      &grpc__health__v1__health_check_response__descriptor, &m, 5000, NULL) != ST_OK)
            continue;
        bool is = ((Grpc__Health__V1__HealthCheckResponse *)m)->status ==
                  GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
        protobuf_c_message_free_unpacked(m, NULL);
        if (is == serving)
            return true;
    }
    return false;
}

/* ---- core ---- */

START_TEST(generates_the_tokens_of_the_ranks)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct proc_reply r;
    struct ask a;
    ask_ids(&a, 700, 5, 30); /* two chunks of a budget of 512 */
    proc_generate(&p, &a.m, 0, &r);
    check_ids(&r, 700, 5, 30);
    ck_assert_int_eq(r.reason, TANDEM__V1__FINISH__REASON__LENGTH);
    ck_assert(!r.has_stop);
    ck_assert_str_ne(r.request_id, "");
    ck_assert_uint_gt(r.prefill_us, 0);
    ck_assert_uint_gt(r.decode_us, 0);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(text_continues_the_prompt)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct tokenizer *tok = NULL;
    struct status st = STATUS_INIT;
    const char *prompt = "Once upon a time, there was";
    ck_assert_msg(tok_load(&tok, TEST_MODEL, &st) == ST_OK, "%s", st.message);
    for (uint64_t seed = 1; seed <= 8; seed++) {
        struct proc_reply r;
        struct ask a;
        uint32_t *ids = NULL, all[256];
        size_t n = 0, whole_len = 0, prompt_len = 0;
        char *whole = NULL, *alone = NULL;
        ask_text(&a, prompt, 40);
        a.sampling.seed = seed;
        ask_name(&a, "my.request:1");
        proc_generate(&p, &a.m, 0, &r);
        ck_assert_msg(r.code == ST_OK, "%s", r.message);
        ck_assert_str_eq(r.request_id, "my.request:1");
        ck_assert_int_eq(tok_encode(tok, prompt, strlen(prompt), TOK_ADD_SPECIAL, &ids, &n, &st), ST_OK);
        check_ids(&r, (uint32_t)n, seed, 40);
        memcpy(all, ids, n * sizeof *ids);
        memcpy(all + n, r.ids, r.n_ids * sizeof *ids);
        ck_assert_int_eq(tok_decode(tok, all, n, TOK_SKIP_SPECIAL, &alone, &prompt_len, &st), ST_OK);
        ck_assert_int_eq(tok_decode(tok, all, n + r.n_ids, TOK_SKIP_SPECIAL, &whole, &whole_len, &st), ST_OK);
        ck_assert_uint_eq(whole_len, prompt_len + r.text_len);
        ck_assert_mem_eq(whole + prompt_len, r.text, r.text_len);
        free(ids);
        free(whole);
        free(alone);
        proc_reply_free(&r);
    }
    tok_free(tok);
    finish(&p, g);
}
END_TEST

START_TEST(stop_token_is_in_the_ids_and_not_in_the_text)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.eos_id = 50; /* an ordinary token, so its text would be seen */
    o.eos_at = 15;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct proc_reply r, ignored;
    struct ask a;
    ask_ids(&a, 10, 5, 30);
    proc_generate(&p, &a.m, 0, &r);
    ck_assert_int_eq(r.code, ST_OK);
    ck_assert_int_eq(r.reason, TANDEM__V1__FINISH__REASON__STOP);
    ck_assert(r.has_stop);
    ck_assert_uint_eq(r.stop_id, 50);
    ck_assert_uint_eq(r.n_ids, 6); /* positions 10 to 15 */
    ck_assert_uint_eq(r.ids[5], 50);
    a.stopping.ignore_eos = true;
    proc_generate(&p, &a.m, 0, &ignored);
    ck_assert_uint_eq(ignored.n_ids, 30);
    ck_assert_uint_gt(ignored.text_len, r.text_len);
    ck_assert_mem_eq(ignored.text, r.text, r.text_len);
    proc_reply_free(&ignored);
    a.stop[0] = fake_token(5, 12, 2048);
    a.stopping.stop_token_ids = a.stop;
    a.stopping.n_stop_token_ids = 1;
    proc_generate(&p, &a.m, 0, &ignored);
    ck_assert_int_eq(ignored.reason, TANDEM__V1__FINISH__REASON__STOP);
    ck_assert_uint_eq(ignored.stop_id, a.stop[0]);
    ck_assert_uint_le(ignored.n_ids, 3);
    proc_reply_free(&ignored);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(many_streams_at_once_get_their_own_tokens)
{
    enum { N = 512 };
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.max_slots = 128;
    o.total_pages = 512; /* 128 slots of up to 70 tokens need 2 pages each: some are preempted on purpose */
    o.token_bytes = 512;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct rpc_stream *s[N];
    for (uint32_t i = 0; i < N; i++) {
        struct ask a;
        ask_ids(&a, 1 + i % 40, 1000 + i, 1 + i % 30);
        s[i] = proc_open(&p, &a.m, 0);
    }
    for (uint32_t i = 0; i < N; i++) {
        struct proc_reply r = {0};
        proc_drain(s[i], &r);
        check_ids(&r, 1 + i % 40, 1000 + i, 1 + i % 30);
        proc_reply_free(&r);
        rpc_stream_close(s[i]);
    }
    Tandem__V1__Load *l = get_load(&p);
    ck_assert_uint_eq(l->finished_requests, N);
    ck_assert_uint_eq(l->running_requests, 0);
    ck_assert_uint_eq(l->total_slots, 128);
    ck_assert_uint_gt(l->generated_tokens, N);
    tandem__v1__load__free_unpacked(l, NULL);
    finish(&p, g);
}
END_TEST

START_TEST(tells_about_server_and_model)
{
    struct proc p;
    const char *args[] = {"--served-name",        "demo", "--tp", "2", "--max-running", "3",
                          "--default-max-tokens", "9",    NULL};
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, args);
    Tandem__V1__GetServerInfoRequest sreq = TANDEM__V1__GET_SERVER_INFO_REQUEST__INIT;
    Tandem__V1__GetModelInfoRequest mreq = TANDEM__V1__GET_MODEL_INFO_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    ck_assert_int_eq(rpc_unary(p.ch, "/tandem.v1.Control/GetServerInfo", &sreq.base,
                               &tandem__v1__server_info__descriptor, &m, 5000, NULL),
                     ST_OK);
    Tandem__V1__ServerInfo *s = (Tandem__V1__ServerInfo *)m;
    ck_assert_str_ne(s->version, "");
    ck_assert_str_eq(s->reason, "");
    ck_assert_uint_eq(s->epoch, 1);
    ck_assert_uint_eq(s->tensor_parallel_size, 2);
    ck_assert_uint_eq(s->n_ranks, 2);
    ck_assert_str_eq(s->ranks[1]->host, "fake-host");
    ck_assert_str_eq(s->ranks[1]->device, "fake device");
    ck_assert_uint_eq(s->ranks[1]->pid, (uint32_t)getpid());
    ck_assert_uint_lt(s->ranks[1]->heartbeat_age_ms, 3000);
    ck_assert_uint_eq(s->max_running_requests, 3);
    ck_assert_uint_eq(s->step_token_budget, 512);
    ck_assert_uint_eq(s->default_max_tokens, 9);
    protobuf_c_message_free_unpacked(m, NULL);
    ck_assert_int_eq(rpc_unary(p.ch, "/tandem.v1.Control/GetModelInfo", &mreq.base, &tandem__v1__model_info__descriptor,
                               &m, 5000, NULL),
                     ST_OK);
    Tandem__V1__ModelInfo *mi = (Tandem__V1__ModelInfo *)m;
    ck_assert_str_eq(mi->name, "demo");
    ck_assert_str_eq(mi->architecture, "FakeForCausalLM");
    ck_assert_uint_eq(mi->layers, 3);
    ck_assert_uint_eq(mi->max_context_tokens, 1024);
    ck_assert_uint_eq(mi->defaults->max_tokens, 9);
    ck_assert_float_eq(mi->defaults->temperature, 0.5f);
    protobuf_c_message_free_unpacked(m, NULL);
    /* nothing set: the server's number of tokens, a seed of its own, no fewer than two different ones */
    struct proc_reply one, two;
    struct ask a;
    ask_ids(&a, 5, 0, 0);
    a.m.sampling = NULL;
    a.m.stopping = NULL;
    proc_generate(&p, &a.m, 0, &one);
    proc_generate(&p, &a.m, 0, &two);
    ck_assert_uint_eq(one.n_ids, 9);
    ck_assert_uint_eq(two.n_ids, 9);
    ck_assert(memcmp(one.ids, two.ids, 9 * sizeof *one.ids) != 0);
    ck_assert_str_ne(one.request_id, two.request_id);
    proc_reply_free(&one);
    proc_reply_free(&two);
    finish(&p, g);
}
END_TEST

START_TEST(supervisor_and_health_follow_the_group)
{
    struct proc p;
    char line[512];
    struct fake_options o = FAKE_OPTIONS;
    start(&p, NULL);
    ck_assert(health_is(&p, "", true));
    ck_assert(health_is(&p, "tandem.v1.Inference", false));
    struct fake_group *g = fake_group_start(p.control, &o);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "ready epoch=1");
    ck_assert(health_is(&p, "tandem.v1.Inference", true));
    ck_assert(health_is(&p, "readiness", true));
    fake_group_mood(g, 1, FAKE_DROP);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "group-lost epoch=1 permanent=0 reason=rank 1 was lost: its stream was closed");
    ck_assert(health_is(&p, "tandem.v1.Inference", false));
    ck_assert(health_is(&p, "liveness", true));
    ck_assert(fake_group_stop(g));
    o.launch_id = 2;
    g = fake_group_start(p.control, &o);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "ready epoch=2");
    kill(p.pid, SIGTERM);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "drained");
    struct status st = STATUS_INIT;
    bool shutdown = false, relaunch = true;
    ck_assert_int_eq(fake_rank_end(g, 0, &st, &shutdown, &relaunch), ST_OK);
    ck_assert(shutdown && !relaunch);
    ck_assert(fake_group_stop(g));
    ck_assert_int_eq(proc_end(&p, 0, WAIT_MS), 0);
}
END_TEST

/* ---- limits ---- */

struct bad {
    const char *what;
    void (*make)(struct ask *a);
    enum status_code code;
    const char *message; /* must be in it */
};

static void bad_temperature(struct ask *a)
{
    a->sampling.temperature_is_case = TANDEM__V1__SAMPLING__TEMPERATURE_IS_TEMPERATURE;
    a->sampling.temperature = 200.0f;
}
static void nan_temperature(struct ask *a)
{
    bad_temperature(a);
    a->sampling.temperature = NAN;
}
static void negative_temperature(struct ask *a)
{
    bad_temperature(a);
    a->sampling.temperature = -0.5f;
}
static void zero_top_p(struct ask *a)
{
    a->sampling.top_p_is_case = TANDEM__V1__SAMPLING__TOP_P_IS_TOP_P;
    a->sampling.top_p = 0.0f;
}
static void big_top_p(struct ask *a)
{
    zero_top_p(a);
    a->sampling.top_p = 1.5f;
}
static void nan_top_p(struct ask *a)
{
    zero_top_p(a);
    a->sampling.top_p = NAN;
}
static void no_prompt(struct ask *a)
{
    a->m.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT__NOT_SET;
}
static void empty_ids(struct ask *a)
{
    a->ids.n_ids = 0;
}
static void empty_text(struct ask *a)
{
    ask_text(a, "", 4);
}
static void invalid_utf8(struct ask *a)
{
    ask_text(a, "abc\xff\xfe", 4);
}
static void id_out_of_range(struct ask *a)
{
    a->prompt[3] = 2048;
}
static void long_prompt(struct ask *a)
{
    ask_ids(a, 1024, 1, 1);
}
static void too_many_tokens(struct ask *a)
{
    ask_ids(a, 1000, 1, 25);
}
static void zero_tokens(struct ask *a)
{
    a->stopping.max_tokens = 0;
}
static void many_stops(struct ask *a)
{
    memset(a->stop, 0, sizeof a->stop);
    a->stopping.stop_token_ids = a->stop;
    a->stopping.n_stop_token_ids = 65;
}
static void stop_out_of_range(struct ask *a)
{
    many_stops(a);
    a->stopping.n_stop_token_ids = 2;
    a->stop[1] = 5000;
}
static void name_charset(struct ask *a)
{
    ask_name(a, "a b");
}
static void name_length(struct ask *a)
{
    static char name[130];
    memset(name, 'x', 129);
    ask_name(a, name);
}
static void other_model(struct ask *a)
{
    a->m.model = (ProtobufCBinaryData){.len = 7, .data = (uint8_t *)"gpt\xff-99"};
}
static void never_fits(struct ask *a)
{
    ask_ids(a, 900, 1, 100); /* 1000 tokens of 64 bytes, 12 pages of 4096 hold 768 */
}

static const struct bad bads[] = {
    {"temperature", bad_temperature, ST_INVALID_ARGUMENT, "sampling.temperature: 200, expected 0 to 100"},
    {"NaN temperature", nan_temperature, ST_INVALID_ARGUMENT, "sampling.temperature: nan, expected 0 to 100"},
    {"negative", negative_temperature, ST_INVALID_ARGUMENT, "sampling.temperature: -0.5"},
    {"top_p 0", zero_top_p, ST_INVALID_ARGUMENT, "sampling.top_p: 0, expected over 0, at most 1"},
    {"top_p 1.5", big_top_p, ST_INVALID_ARGUMENT, "sampling.top_p: 1.5"},
    {"top_p NaN", nan_top_p, ST_INVALID_ARGUMENT, "sampling.top_p: nan"},
    {"no prompt", no_prompt, ST_INVALID_ARGUMENT, "prompt: not given"},
    {"no ids", empty_ids, ST_INVALID_ARGUMENT, "token_ids: empty"},
    {"no text", empty_text, ST_INVALID_ARGUMENT, "text: empty"},
    {"UTF-8", invalid_utf8, ST_INVALID_ARGUMENT, "3"},
    {"id", id_out_of_range, ST_INVALID_ARGUMENT, "token_ids: token 3 is 2048, expected below 2048"},
    {"long", long_prompt, ST_INVALID_ARGUMENT, "token_ids: 1024 tokens, expected at most 1023"},
    {"context", too_many_tokens, ST_INVALID_ARGUMENT, "stopping.max_tokens: 25, expected at most 24"},
    {"no tokens", zero_tokens, ST_INVALID_ARGUMENT, "stopping.max_tokens: 0, expected at least 1"},
    {"65 stops", many_stops, ST_INVALID_ARGUMENT, "stopping.stop_token_ids: 65 ids, expected at most 64"},
    {"stop id", stop_out_of_range, ST_INVALID_ARGUMENT, "stopping.stop_token_ids[1]: 5000, expected below 2048"},
    {"charset", name_charset, ST_INVALID_ARGUMENT, "request_id: byte 0x20 at 1"},
    {"name length", name_length, ST_INVALID_ARGUMENT, "request_id: 129 bytes, expected at most 128"},
    {"model", other_model, ST_NOT_FOUND, "model: \"gpt?-99\" is not served here"},
    {"pool", never_fits, ST_INVALID_ARGUMENT, ""},
};

START_TEST(every_bad_field_is_named)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.total_pages = 12;
    struct fake_group *g = start_ready(&p, &o, NULL);
    for (size_t i = 0; i < sizeof bads / sizeof *bads; i++) {
        struct proc_reply r;
        struct ask a;
        ask_ids(&a, 8, 1, 4);
        bads[i].make(&a);
        proc_generate(&p, &a.m, 0, &r);
        ck_assert_msg(r.code == bads[i].code, "%s: %s (%s)", bads[i].what, status_name(r.code), r.message);
        ck_assert_msg(strstr(r.message, bads[i].message) != NULL, "%s: %s", bads[i].what, r.message);
        ck_assert_uint_eq(r.n_messages, 0);
        proc_reply_free(&r);
    }
    ck_assert(wait_running(&p, 0, 0)); /* nothing leaked */
    struct proc_reply r;
    struct ask a;
    ask_ids(&a, 8, 1, 4);
    proc_generate(&p, &a.m, 0, &r);
    check_ids(&r, 8, 1, 4);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(a_live_request_id_is_taken)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct proc_reply r = {0}, second;
    struct ask a;
    fake_group_mood(g, 0, FAKE_HOLD);
    ask_ids(&a, 8, 1, 4);
    ask_name(&a, "twin");
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    ck_assert(wait_running(&p, 1, 0));
    proc_generate(&p, &a.m, 0, &second);
    ck_assert_int_eq(second.code, ST_ALREADY_EXISTS);
    proc_reply_free(&second);
    fake_group_mood(g, 0, FAKE_WELL);
    proc_drain(s, &r);
    check_ids(&r, 8, 1, 4);
    rpc_stream_close(s);
    proc_reply_free(&r);
    proc_generate(&p, &a.m, 0, &second); /* free again */
    check_ids(&second, 8, 1, 4);
    proc_reply_free(&second);
    finish(&p, g);
}
END_TEST

START_TEST(not_ready_and_full_queue_say_when_to_retry)
{
    struct proc p;
    const char *args[] = {"--max-queued", "2", NULL};
    struct fake_options o = FAKE_OPTIONS;
    struct proc_reply r;
    struct ask a;
    ProtobufCMessage *m = NULL;
    o.max_slots = 1;
    start(&p, args);
    ask_ids(&a, 8, 1, 4);
    proc_generate(&p, &a.m, 0, &r);
    ck_assert_int_eq(r.code, ST_UNAVAILABLE);
    ck_assert_uint_gt(r.retry_after_ms, 0);
    Tandem__V1__GetModelInfoRequest mreq = TANDEM__V1__GET_MODEL_INFO_REQUEST__INIT;
    ck_assert_int_eq(rpc_unary(p.ch, "/tandem.v1.Control/GetModelInfo", &mreq.base, &tandem__v1__model_info__descriptor,
                               &m, 5000, NULL),
                     ST_UNAVAILABLE);
    struct fake_group *g = fake_group_start(p.control, &o);
    ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
    fake_group_mood(g, 0, FAKE_HOLD);
    struct rpc_stream *s[3];
    for (uint32_t i = 0; i < 3; i++) { /* one runs, two wait */
        s[i] = proc_open(&p, &a.m, 0);
        ck_assert(wait_running(&p, 1, i));
    }
    proc_generate(&p, &a.m, 0, &r);
    ck_assert_msg(r.code == ST_RESOURCE_EXHAUSTED, "%s: %s", status_name(r.code), r.message);
    ck_assert_uint_gt(r.retry_after_ms, 0);
    fake_group_mood(g, 0, FAKE_WELL);
    for (int i = 0; i < 3; i++) {
        struct proc_reply each = {0};
        proc_drain(s[i], &each);
        check_ids(&each, 8, 1, 4);
        proc_reply_free(&each);
        rpc_stream_close(s[i]);
    }
    finish(&p, g);
}
END_TEST

START_TEST(a_huge_prompt_stalls_nobody)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct proc_reply r = {0};
    struct ask big, small;
    size_t len = 8u << 20;
    char *text = malloc(len + 1);
    ck_assert_ptr_nonnull(text);
    for (size_t i = 0; i < len; i++)
        text[i] = "the little dog ran "[i % 19];
    text[len] = '\0';
    ask_text(&big, text, 4);
    struct rpc_stream *s = proc_open(&p, &big.m, 0);
    int64_t worst = 0;
    for (int i = 0; i < 20; i++) { /* short ones go through at once */
        struct proc_reply each;
        int64_t t = proc_now_ms();
        ask_text(&small, "Once upon a time", 4);
        proc_generate(&p, &small.m, 0, &each);
        ck_assert_int_eq(each.code, ST_OK);
        t = proc_now_ms() - t;
        worst = t > worst ? t : worst;
        proc_reply_free(&each);
    }
    proc_drain(s, &r);
    ck_assert_int_eq(r.code, ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(r.message, "tokens, expected at most 1023"));
    ck_assert_int_lt(worst, 2000);
    rpc_stream_close(s);
    proc_reply_free(&r);
    free(text);
    finish(&p, g);
}
END_TEST

START_TEST(options_are_checked_in_one_line)
{
    static const char *const bad[] = {
        "--bogus 1",
        "--model /nonexistent",
        "--model " TEST_MODEL " --tp 65",
        "--model",
        "--max-queued x",
        "--model " TEST_MODEL " --listen nonsense",
        "--log-level chatter",
        "--step-tokens -1",
        "--model " TEST_MODEL " --heartbeat-timeout-ms 600",
        "",
        "--supervisor-fd 99 --model " TEST_MODEL,
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char cmd[2048], out[2048];
        snprintf(cmd, sizeof cmd, "%s %s 2>&1", TEST_COORDINATOR, bad[i]);
        FILE *f = popen(cmd, "r");
        ck_assert_ptr_nonnull(f);
        size_t n = fread(out, 1, sizeof out - 1, f);
        int rc = pclose(f);
        out[n] = '\0';
        ck_assert_msg(rc != 0 && strncmp(out, "tandem-coordinator: ", 20) == 0, "'%s': %s", bad[i], out);
        ck_assert_msg(strchr(out, '\n') == out + n - 1, "'%s' is more than a line: %s", bad[i], out);
    }
}
END_TEST

START_TEST(an_address_in_use_is_named)
{
    struct proc p;
    char cmd[1024], out[1024];
    start(&p, NULL);
    snprintf(cmd, sizeof cmd, "%s --model %s --listen %s --control-listen %s2 2>&1", TEST_COORDINATOR, TEST_MODEL,
             p.address, p.control);
    FILE *f = popen(cmd, "r");
    ck_assert_ptr_nonnull(f);
    out[fread(out, 1, sizeof out - 1, f)] = '\0';
    ck_assert_int_ne(pclose(f), 0);
    ck_assert_msg(strstr(out, "--listen") && strstr(out, p.address), "%s", out);
    finish(&p, NULL);
}
END_TEST

/* ---- faults ---- */

START_TEST(cancel_frees_the_slot_within_a_step)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.step_us = 20000;
    struct fake_group *g = start_ready(&p, &o, NULL);
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
        char name[8];
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
    {FAKE_WRONG_COUNT, 0, "rank 0 was lost: step", false},
    {FAKE_WRONG_TOKEN, 0, "the vocabulary has 2048", false},
    {FAKE_FAULT, 1, "rank 1: weights: file is truncated (DATA_LOSS)", true},
};

START_TEST(a_lost_rank_ends_the_epoch_and_the_next_group_serves)
{
    const struct loss *l = &losses[_i];
    const char *args[] = {
        "--heartbeat-interval-ms", "100", "--heartbeat-timeout-ms", "600", "--step-timeout-ms", "1000", NULL};
    struct proc p;
    char line[512], want[512];
    struct fake_options o = FAKE_OPTIONS;
    o.step_us = 2000;
    struct fake_group *g = start_ready(&p, &o, args);
    struct proc_reply r = {0};
    struct ask a;
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS)); /* ready */
    ask_ids(&a, 8, 1, 1000);
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    ck_assert(proc_read(s, &r, WAIT_MS));
    int64_t t = proc_now_ms();
    fake_group_mood(g, l->rank, l->mood);
    proc_drain(s, &r);
    t = proc_now_ms() - t;
    ck_assert_msg(r.code == ST_UNAVAILABLE, "%s: %s", status_name(r.code), r.message);
    ck_assert_msg(strstr(r.message, l->reason) != NULL, "%s", r.message);
    ck_assert_uint_gt(r.retry_after_ms, 0);
    ck_assert_int_lt(t, 4000);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    snprintf(want, sizeof want, "group-lost epoch=1 permanent=%d reason=", l->permanent);
    ck_assert_msg(strncmp(line, want, strlen(want)) == 0 && strstr(line, l->reason), "%s", line);
    rpc_stream_close(s);
    ck_assert(proc_wait_state(&p, STATE(RECOVERING), WAIT_MS));
    proc_reply_free(&r);
    proc_generate(&p, &a.m, 0, &r);
    ck_assert_int_eq(r.code, ST_UNAVAILABLE);
    ck_assert_msg(strstr(r.message, "waiting for a new worker group") != NULL, "%s", r.message);
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
    ask_ids(&a, 8, 7, 20);
    proc_generate(&p, &a.m, 0, &r);
    check_ids(&r, 8, 7, 20);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(queued_requests_outlive_the_group)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.max_slots = 1;
    struct fake_group *g = start_ready(&p, &o, NULL);
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
    char line[512];
    struct fake_options o = FAKE_OPTIONS;
    o.never_ready = true;
    start(&p, NULL);
    struct fake_group *g = fake_group_start(p.control, &o);
    usleep(100000);
    ck_assert(proc_wait_state(&p, STATE(STARTING), WAIT_MS));
    fake_group_mood(g, 0, FAKE_FAULT);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "group-lost epoch=1 permanent=1 reason=rank 0: weights: file is truncated (DATA_LOSS)");
    ck_assert(proc_wait_state(&p, STATE(STARTING), WAIT_MS));
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
    ask_ids(&a, 8, 1, 99000);
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    struct rpc_channel *proxied = p.ch;
    p.ch = direct;
    ck_assert(wait_running(&p, 1, 0));
    ck_assert(wait_running(&p, 0, 0)); /* the server's own doing */
    Tandem__V1__Load *l = get_load(&p);
    ck_assert_uint_eq(l->finished_requests, 0); /* dropped while it ran, not when it was done */
    ck_assert_uint_lt(l->generated_tokens, 90000);
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

static Suite *suite(void)
{
    Suite *s = suite_create("coordinator");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_set_timeout(core, 90);
    tcase_add_test(core, generates_the_tokens_of_the_ranks);
    tcase_add_test(core, text_continues_the_prompt);
    tcase_add_test(core, stop_token_is_in_the_ids_and_not_in_the_text);
    tcase_add_test(core, many_streams_at_once_get_their_own_tokens);
    tcase_add_test(core, tells_about_server_and_model);
    tcase_add_test(core, supervisor_and_health_follow_the_group);
    suite_add_tcase(s, core);
    tcase_set_timeout(limits, 90);
    tcase_add_test(limits, every_bad_field_is_named);
    tcase_add_test(limits, a_live_request_id_is_taken);
    tcase_add_test(limits, not_ready_and_full_queue_say_when_to_retry);
    tcase_add_test(limits, a_huge_prompt_stalls_nobody);
    tcase_add_test(limits, options_are_checked_in_one_line);
    tcase_add_test(limits, an_address_in_use_is_named);
    suite_add_tcase(s, limits);
    tcase_set_timeout(faults, 90);
    tcase_add_test(faults, cancel_frees_the_slot_within_a_step);
    tcase_add_test(faults, deadlines_end_queued_and_running_requests);
    tcase_add_test(faults, abort_ends_by_name_and_all);
    tcase_add_test(faults, drain_lets_live_requests_end);
    tcase_add_test(faults, sigterm_waits_for_clients_and_a_second_does_not);
    tcase_add_loop_test(faults, a_lost_rank_ends_the_epoch_and_the_next_group_serves, 0,
                        (int)(sizeof losses / sizeof *losses));
    tcase_add_test(faults, queued_requests_outlive_the_group);
    tcase_add_test(faults, ranks_that_do_not_belong_are_refused);
    tcase_add_test(faults, a_group_that_never_gets_ready_is_no_group);
    tcase_add_test(faults, a_client_that_never_reads_is_dropped);
    tcase_add_test(faults, clients_that_come_and_go_leave_nothing);
    suite_add_tcase(s, faults);
    return s;
}

int main(void)
{
    SRunner *sr = srunner_create(suite());
    srunner_run_all(sr, CK_NORMAL);
    int failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
