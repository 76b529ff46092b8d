/* What is refused, and with which words. Part of check_coordinator. */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/coord_ask.h"

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
static void long_text(struct ask *a)
{
    static char text[4097]; /* could fit by its length alone */
    memset(text, '1', 4096);
    ask_text(a, text, 4);
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
static void late_first_token(struct ask *a)
{
    a->m.scheduling = &a->scheduling;
    a->scheduling.ttft_target_ms_is_case = TANDEM__V1__SCHEDULING__TTFT_TARGET_MS_IS_TTFT_TARGET_MS;
    a->scheduling.ttft_target_ms = 3600001;
}
static void late_tokens(struct ask *a)
{
    a->m.scheduling = &a->scheduling;
    a->scheduling.tbt_target_ms_is_case = TANDEM__V1__SCHEDULING__TBT_TARGET_MS_IS_TBT_TARGET_MS;
    a->scheduling.tbt_target_ms = 60001;
}
static void high_priority(struct ask *a)
{
    a->m.scheduling = &a->scheduling;
    a->scheduling.priority = 2;
}
static void long_tenant(struct ask *a)
{
    static char name[257];
    a->m.scheduling = &a->scheduling;
    a->scheduling.tenant = (ProtobufCBinaryData){sizeof name, memset(name, 'x', sizeof name)};
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
    {"long text", long_text, ST_INVALID_ARGUMENT, "tokens, expected at most 1023"},
    {"id", id_out_of_range, ST_INVALID_ARGUMENT, "token_ids: token 3 is 2048, expected below 2048"},
    {"long", long_prompt, ST_INVALID_ARGUMENT, "token_ids: 1024 tokens, expected at most 1023"},
    {"context", too_many_tokens, ST_INVALID_ARGUMENT, "stopping.max_tokens: 25, expected at most 24"},
    {"no tokens", zero_tokens, ST_INVALID_ARGUMENT, "stopping.max_tokens: 0, expected at least 1"},
    {"65 stops", many_stops, ST_INVALID_ARGUMENT, "stopping.stop_token_ids: 65 ids, expected at most 64"},
    {"stop id", stop_out_of_range, ST_INVALID_ARGUMENT, "stopping.stop_token_ids[1]: 5000, expected below 2048"},
    {"charset", name_charset, ST_INVALID_ARGUMENT, "request_id: byte 0x20 at 1"},
    {"name length", name_length, ST_INVALID_ARGUMENT, "request_id: 129 bytes, expected at most 128"},
    {"model", other_model, ST_NOT_FOUND, "model: \"gpt?-99\" is not served here"},
    {"TTFT", late_first_token, ST_INVALID_ARGUMENT, "scheduling.ttft_target_ms: 3600001, expected at most 3600000"},
    {"TBT", late_tokens, ST_INVALID_ARGUMENT, "scheduling.tbt_target_ms: 60001, expected at most 60000"},
    {"priority", high_priority, ST_INVALID_ARGUMENT, "scheduling.priority: 2, expected -1, 0 or 1"},
    {"tenant", long_tenant, ST_INVALID_ARGUMENT, "scheduling.tenant: 257 bytes, expected at most 256"},
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

static struct rpc_stream *open_for(struct proc *p, const char *tenant, int32_t priority)
{
    struct ask a;
    ask_ids(&a, 8, 1, 10);
    a.m.scheduling = &a.scheduling;
    a.scheduling.tenant = (ProtobufCBinaryData){strlen(tenant), (uint8_t *)tenant};
    a.scheduling.priority = priority;
    return proc_open(p, &a.m, 0);
}

/* A tenant's queue has its own bound, and of what waits the urgent goes first though it came last. */
START_TEST(tenants_have_their_bound_and_priority_its_turn)
{
    struct proc p;
    const char *args[] = {"--max-queued-tenant", "2", NULL};
    static const struct {
        const char *tenant;
        int32_t priority;
    } order[] = {{"a", 0}, {"a", 0}, {"a", -1}, {"b", 1}};
    struct fake_options o = FAKE_OPTIONS;
    struct rpc_stream *s[4], *refused;
    struct proc_reply r = {0};
    int64_t began_us[4];
    o.max_slots = 1;
    o.step_us = 10000; /* an answer takes 100 ms */
    struct fake_group *g = start_ready(&p, &o, args);
    fake_group_mood(g, 0, FAKE_HOLD);
    for (uint32_t i = 0; i < 4; i++) {
        s[i] = open_for(&p, order[i].tenant, order[i].priority);
        ck_assert(wait_running(&p, 1, i));
        began_us[i] = proc_now_ms() * 1000;
    }
    refused = open_for(&p, "a", 1);
    proc_drain(refused, &r);
    ck_assert_int_eq(r.code, ST_RESOURCE_EXHAUSTED);
    ck_assert_str_eq(r.message, "the tenant's queue is full: 2 requests wait (max_queued_tenant 2)");
    ck_assert_uint_ge(r.retry_after_ms, 50);
    rpc_stream_close(refused);
    proc_reply_free(&r);
    fake_group_mood(g, 0, FAKE_WELL);
    for (int i = 0; i < 4; i++) {
        struct proc_reply each = {0};
        proc_drain(s[i], &each);
        check_ids(&each, 8, 1, 10);
        began_us[i] += (int64_t)each.queue_us;
        proc_reply_free(&each);
        rpc_stream_close(s[i]);
    }
    ck_assert_msg(began_us[0] < began_us[3] && began_us[3] < began_us[1] && began_us[1] < began_us[2],
                  "%lld %lld %lld %lld", (long long)began_us[0], (long long)began_us[1], (long long)began_us[2],
                  (long long)began_us[3]);
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
    double cpu_s = proc_cpu_seconds(&p);
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
    ck_assert_msg(strstr(r.message, "text: a prompt of 8388608 bytes") && strstr(r.message, "1024"), "%s", r.message);
    ck_assert_int_lt(worst, 2000);
    ck_assert_double_lt(proc_cpu_seconds(&p) - cpu_s, 1.0); /* it was refused by its length, not encoded */
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
        "--max-queued-tenant 1000001",
        "--model " TEST_MODEL " --listen nonsense",
        "--log-level chatter",
        "--step-tokens -1",
        "--model " TEST_MODEL " --max-message-bytes 16777217",
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

START_TEST(one_event_is_one_line_of_the_log)
{
    struct proc p;
    char cmd[1024], out[4096];
    start(&p, NULL); /* for its folder */
    snprintf(
        cmd, sizeof cmd,
        "timeout -s TERM 1 %s --model %s --listen %sx --control-listen %sx --served-name \"$(printf 'a\\nforged')\" "
        "2>&1",
        TEST_COORDINATOR, TEST_MODEL, p.address, p.control);
    FILE *f = popen(cmd, "r");
    ck_assert_ptr_nonnull(f);
    out[fread(out, 1, sizeof out - 1, f)] = '\0';
    pclose(f);
    ck_assert_msg(strstr(out, "a?forged") && !strstr(out, "\nforged"), "%s", out);
    finish(&p, NULL);
}
END_TEST

/* Whether the line is one event; what is said of a request has its name in a field. */
static void check_log_line(const char *line, unsigned *mine, unsigned *refused)
{
    json_error_t error;
    json_t *o = json_loads(line, JSON_REJECT_DUPLICATES, &error);
    ck_assert_msg(json_is_object(o), "%s: %s", error.text, line);
    static const char *const fields[] = {"time", "level", "program", "message"};
    for (int i = 0; i < 4; i++)
        ck_assert_msg(json_is_string(json_object_get(o, fields[i])), "%s: %s", fields[i], line);
    const char *request = json_string_value(json_object_get(o, "request"));
    const char *message = json_string_value(json_object_get(o, "message"));
    *mine += request && strcmp(request, "mine") == 0 && strcmp(message, "8 prompt tokens, 4 new, length") == 0;
    *refused += request && strcmp(request, "bad:one") == 0 && strstr(message, "sampling.top_p: 7") != NULL;
    ck_assert_msg(request || !strstr(message, "mine"), "%s", line);
    json_decref(o);
}

START_TEST(every_json_line_of_the_log_parses_and_names_its_request)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    const char *args[] = {"--log-format", "json", "--log-level", "debug", "--served-name", "q\"uo\\te\x7f\xff\n", NULL};
    char path[] = "/tmp/tandem-log-XXXXXX", line[2048];
    unsigned mine = 0, refused = 0, lines = 0;
    int fd = mkstemp(path), keep = dup(STDERR_FILENO);
    ck_assert(fd >= 0 && keep >= 0 && dup2(fd, STDERR_FILENO) >= 0);
    struct fake_group *g = start_ready(&p, &o, args);
    dup2(keep, STDERR_FILENO); /* only the program's own lines */
    close(keep);
    struct proc_reply r;
    struct ask a;
    ask_ids(&a, 8, 1, 4);
    ask_name(&a, "mine");
    proc_generate(&p, &a.m, 0, &r);
    check_ids(&r, 8, 1, 4);
    proc_reply_free(&r);
    ask_name(&a, "bad:one");
    a.sampling.top_p_is_case = TANDEM__V1__SAMPLING__TOP_P_IS_TOP_P;
    a.sampling.top_p = 7;
    proc_generate(&p, &a.m, 0, &r);
    ck_assert_int_eq(r.code, ST_INVALID_ARGUMENT);
    proc_reply_free(&r);
    fake_group_mood(g, 1, FAKE_DROP);
    ck_assert(proc_wait_state(&p, STATE(RECOVERING), WAIT_MS));
    finish(&p, g);
    FILE *f = fdopen(fd, "r");
    rewind(f);
    for (; fgets(line, sizeof line, f); lines++)
        check_log_line(line, &mine, &refused);
    ck_assert_msg(mine == 1 && refused == 1 && lines >= 6, "%u, %u of %u lines", mine, refused, lines);
    fclose(f);
    unlink(path);
}
END_TEST

TCase *coord_limits(void)
{
    TCase *limits = tcase_create("limits");
    tcase_set_timeout(limits, 90);
    tcase_add_test(limits, every_bad_field_is_named);
    tcase_add_test(limits, a_live_request_id_is_taken);
    tcase_add_test(limits, not_ready_and_full_queue_say_when_to_retry);
    tcase_add_test(limits, tenants_have_their_bound_and_priority_its_turn);
    tcase_add_test(limits, a_huge_prompt_stalls_nobody);
    tcase_add_test(limits, options_are_checked_in_one_line);
    tcase_add_test(limits, an_address_in_use_is_named);
    tcase_add_test(limits, one_event_is_one_line_of_the_log);
    tcase_add_test(limits, every_json_line_of_the_log_parses_and_names_its_request);
    return limits;
}
