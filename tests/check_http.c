/* HTTP of the coordinator: the real program, ranks without a model in this process. */
#include <check.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/coord_ask.h"
#include "tests/http_ask.h"

#define COMPLETIONS "/v1/completions"
#define CHATS       "/v1/chat/completions"
#define STREAMS     64

static const char *const WITH_HTTP[] = {"--http", "127.0.0.1:0", "--chat-template", "chatml", NULL};
static const char *const no_replay[] = {"--http", "127.0.0.1:0", "--replay", "off", NULL};

/* A completion of n ids, as ask_ids makes them. */
static void ids_body(char *out, size_t cap, uint32_t n, uint64_t seed, uint32_t max_tokens, const char *more)
{
    size_t at = (size_t)snprintf(out, cap, "{\"seed\":%llu,\"max_tokens\":%u%s,\"prompt\":[", (unsigned long long)seed,
                                 max_tokens, more);
    for (uint32_t i = 0; i < n; i++)
        at += (size_t)snprintf(out + at, cap - at, "%s%u", i ? "," : "", 40 + i % 60);
    snprintf(out + at, cap - at, "]}");
}

static char *grpc_text(struct proc *p, uint32_t n, uint64_t seed, uint32_t max_tokens)
{
    struct ask a;
    struct proc_reply r;
    ask_ids(&a, n, seed, max_tokens);
    proc_generate(p, &a.m, 0, &r);
    ck_assert_int_eq(r.code, ST_OK);
    char *text =
        calloc(1, r.text_len + 1); /* without the NULs that random tokens hold; http_text leaves them out, too */
    ck_assert_ptr_nonnull(text);
    for (size_t i = 0, at = 0; i < r.text_len; i++)
        if (r.text[i])
            text[at++] = r.text[i];
    proc_reply_free(&r);
    return text;
}

static void check_code(const struct http_answer *a, int code, const char *part)
{
    ck_assert_msg(a->code == code && a->whole, "%d %s", a->code, a->body ? a->body : "");
    if (part)
        ck_assert_msg(strstr(a->body, part) != NULL, "%s", a->body);
}

/* ---- core ---- */

START_TEST(answers_are_those_of_grpc_whole_and_streamed)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, WITH_HTTP);
    char *expected = grpc_text(&p, 30, 7, 40);
    for (int stream = 0; stream < 2; stream++) {
        char body[1024];
        struct http_answer a;
        ids_body(body, sizeof body, 30, 7, 40,
                 stream ? ",\"stream\":true,\"stream_options\":{\"include_usage\":true}" : "");
        http_ask(&p, "POST", COMPLETIONS, "", body, &a);
        check_code(&a, 200, "\"usage\":{\"prompt_tokens\":30,\"completion_tokens\":40,\"total_tokens\":70");
        ck_assert_ptr_nonnull(strstr(a.head, stream ? "text/event-stream" : "application/json"));
        ck_assert(!stream || strcmp(a.body + a.body_len - 14, "data: [DONE]\n\n") == 0);
        char *text = http_text(&a, 0);
        ck_assert_str_eq(text, expected);
        free(text);
        http_answer_free(&a);
    }
    free(expected);
    finish(&p, g);
}
END_TEST

START_TEST(chats_and_several_answers_are_served)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, WITH_HTTP);
    char *first[2][2];
    for (int stream = 0; stream < 2; stream++) {
        struct http_answer a;
        http_ask(&p, "POST", CHATS, "",
                 stream ? "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"n\":2,\"temperature\":1,\"seed\":3,"
                          "\"max_completion_tokens\":20,\"stream\":true}"
                        : "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"n\":2,\"temperature\":1,\"seed\":3,"
                          "\"max_completion_tokens\":20,\"model\":\"demo-model\"}",
                 &a);
        check_code(&a, 200, "\"role\":\"assistant\"");
        for (int i = 0; i < 2; i++)
            first[stream][i] = http_text(&a, i);
        http_answer_free(&a);
    }
    for (int i = 0; i < 2; i++) {
        ck_assert_str_eq(first[0][i], first[1][i]);
        ck_assert_uint_gt(strlen(first[0][i]), 5);
    }
    ck_assert_str_ne(first[0][0], first[0][1]);
    for (int i = 0; i < 4; i++)
        free(first[i / 2][i % 2]);
    finish(&p, g);
}
END_TEST

START_TEST(many_streams_at_once_get_their_own_tokens)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, WITH_HTTP);
    int fd[STREAMS];
    for (int i = 0; i < STREAMS; i++) {
        char body[1024];
        ids_body(body, sizeof body, 10 + (uint32_t)i, (uint64_t)i, 30, i % 2 ? ",\"stream\":true" : "");
        fd[i] = http_connect(&p);
        http_send(fd[i], "POST", COMPLETIONS, "", body);
    }
    for (int i = 0; i < STREAMS; i++) {
        struct http_answer a;
        ck_assert(http_read(fd[i], &a, WAIT_MS));
        check_code(&a, 200, NULL);
        char *text = http_text(&a, 0), *expected = grpc_text(&p, 10 + (uint32_t)i, (uint64_t)i, 30);
        ck_assert_str_eq(text, expected);
        free(text);
        free(expected);
        http_answer_free(&a);
        close(fd[i]);
    }
    finish(&p, g);
}
END_TEST

START_TEST(a_connection_serves_one_request_after_the_other)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, WITH_HTTP);
    int fd = http_connect(&p);
    for (int i = 0; i < 6; i++) {
        struct http_answer a;
        http_send(fd, "POST", COMPLETIONS, "",
                  i == 2  ? "{"
                  : i % 2 ? "{\"prompt\":\"Once\",\"stream\":true}"
                          : "{\"prompt\":\"Once\"}");
        ck_assert_msg(http_read(fd, &a, WAIT_MS), "%d", i);
        check_code(&a, i == 2 ? 400 : 200, i == 2 ? "not valid JSON" : "\"text_completion\"");
        http_answer_free(&a);
        http_send(fd, "GET", i == 4 ? "/nothing" : "/version", "", "");
        ck_assert_msg(http_read(fd, &a, WAIT_MS), "page %d", i);
        check_code(&a, i == 4 ? 404 : 200, NULL);
        http_answer_free(&a);
    }
    close(fd);
    finish(&p, g);
}
END_TEST

START_TEST(pages_say_what_is)
{
    static const struct {
        const char *method, *path;
        int before, code;
        const char *part;
    } page[] = {
        {"GET", "/livez", 200, 200, "\"ok\""},
        {"GET", "/healthz", 200, 200, "\"ok\""},
        {"GET", "/health", 503, 200, "\"ok\""},
        {"GET", "/readyz", 503, 200, "\"ok\""},
        {"GET", "/startupz", 503, 200, "\"ok\""},
        {"GET", "/v1/models", 200, 200, "\"max_model_len\":1024"},
        {"GET", "/v1/models/demo-model", 200, 200, "\"id\":\"demo-model\""},
        {"GET", "/v1/models/other", 404, 404, "\"model_not_found\""},
        {"GET", "/version", 200, 200, "\"version\""},
        {"GET", "/", 200, 200, "fetch(\"live.json\""},
        {"GET", "/live.json", 200, 200, "\"state\":\"READY\""},
        {"POST", "/", 404, 404, NULL},
        {"GET", "/nothing", 404, 404, "no such path"},
        {"POST", "/v1/embeddings", 404, 404, "no such path"},
        {"GET", COMPLETIONS, 405, 405, "takes POST"},
        {"DELETE", "/v1/models", 405, 405, "takes GET"},
        {"POST", COMPLETIONS, 503, 400, NULL},
    };
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct http_answer a;
    start(&p, WITH_HTTP);
    struct fake_group *g = NULL;
    for (int ready = 0; ready < 2; ready++) {
        for (size_t i = 0; i < sizeof page / sizeof *page; i++) {
            http_ask(&p, page[i].method, page[i].path, "", page[i].method[0] == 'P' ? "{}" : NULL, &a);
            ck_assert_msg(a.code == (ready ? page[i].code : page[i].before), "%s %s: %d %s", page[i].method,
                          page[i].path, a.code, a.body);
            if (ready && page[i].part)
                ck_assert_msg(strstr(a.body, page[i].part) != NULL, "%s: %s", page[i].path, a.body);
            http_answer_free(&a);
        }
        if (!ready)
            g = fake_group_start(p.control, &o);
        ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
    }
    finish(&p, g);
}
END_TEST

static json_int_t sum_of(const json_t *numbers)
{
    json_int_t sum = 0;
    for (size_t i = 0; i < json_array_size(numbers); i++)
        sum += json_integer_value(json_array_get(numbers, i));
    return sum;
}

/* What the page at / draws. */
START_TEST(live_numbers_are_those_of_what_was_served)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, WITH_HTTP);
    json_t *live = NULL;
    free(grpc_text(&p, 20, 1, 10));
    ck_assert(wait_live(&p, 0));
    for (int64_t until = proc_now_ms() + WAIT_MS; proc_now_ms() < until; usleep(10000)) {
        struct http_answer a;
        json_decref(live);
        http_ask(&p, "GET", "/live.json", "", NULL, &a);
        check_code(&a, 200, NULL);
        live = json_loads(a.body, 0, NULL);
        ck_assert_msg(live != NULL, "%s", a.body);
        http_answer_free(&a);
        if (json_integer_value(json_object_get(live, "finished")) == 1 &&
            json_integer_value(
                json_object_get(json_object_get(live, "pages"), "total"))) /* the engine tells once a turn */
            break;
    }
    const json_t *steps = json_object_get(live, "steps"), *ttft = json_object_get(live, "ttft"),
                 *tbt = json_object_get(live, "tbt"), *group = json_array_get(json_object_get(live, "groups"), 0);
    json_int_t decodes = 0, rows = 0, took = 0;
    for (size_t i = 0; i < json_array_size(steps); i++) {
        const json_t *s = json_array_get(steps, i);
        ck_assert_int_eq(json_integer_value(json_array_get(s, 0)), 1);
        decodes += json_integer_value(json_array_get(s, 2));
        rows += json_integer_value(json_array_get(s, 3));
        took += json_integer_value(json_array_get(s, 4)) > 0;
    }
    ck_assert_int_eq(rows, 20);
    ck_assert_int_eq(decodes, 9);
    ck_assert_int_eq(took, (json_int_t)json_array_size(steps));
    ck_assert_int_eq(sum_of(json_object_get(ttft, "count")), 1);
    ck_assert_int_eq(sum_of(json_object_get(tbt, "count")), 9);
    ck_assert_uint_eq(json_array_size(json_object_get(tbt, "count")),
                      json_array_size(json_object_get(tbt, "bounds_us")) + 1);
    ck_assert_int_eq(json_integer_value(json_object_get(json_object_get(live, "pages"), "total")), 1024);
    ck_assert_int_eq(json_integer_value(json_object_get(live, "slots")), 8);
    ck_assert(json_is_true(json_object_get(group, "serving")));
    ck_assert_uint_eq(json_array_size(json_object_get(group, "ranks")), 2);
    json_decref(live);
    finish(&p, g);
}
END_TEST

/* The caller's trace goes on in a file; one that the caller does not keep is not written. */
START_TEST(spans_go_on_in_the_trace_of_the_caller)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    char path[] = "/tmp/tandem-spans-XXXXXX", text[4096] = "", body[1024];
    int fd = mkstemp(path);
    const char *args[] = {"--http", "127.0.0.1:0", "--spans", path, NULL};
    static const char *const headers[] = {"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00\r\n",
                                          "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4737-00f067aa0ba902b7-01\r\n"};
    ck_assert_int_ge(fd, 0);
    struct fake_group *g = start_ready(&p, &o, args);
    for (int i = 0; i < 2; i++) {
        struct http_answer a;
        ids_body(body, sizeof body, 30, 7, 5, "");
        http_ask(&p, "POST", COMPLETIONS, headers[i], body, &a);
        check_code(&a, 200, NULL);
        http_answer_free(&a);
    }
    for (int64_t until = proc_now_ms() + WAIT_MS; proc_now_ms() < until && !strchr(text, '\n'); usleep(10000)) {
        ssize_t n = pread(fd, text, sizeof text - 1, 0);
        text[n > 0 ? n : 0] = '\0';
    }
    json_t *line = json_loads(text, 0, NULL); /* one line, so only the second request's */
    ck_assert_msg(line != NULL, "%s", text);
    ck_assert_ptr_nonnull(strstr(text, "\"traceId\":\"4bf92f3577b34da6a3ce929d0e0e4737\""));
    ck_assert_ptr_nonnull(strstr(text, "\"parentSpanId\":\"00f067aa0ba902b7\",\"name\":\"generate\""));
    ck_assert_ptr_nonnull(strstr(text, "\"gen_ai.usage.output_tokens\",\"value\":{\"intValue\":\"5\"}"));
    ck_assert_ptr_nonnull(strstr(text, "\"name\":\"decode\""));
    json_decref(line);
    close(fd);
    unlink(path);
    finish(&p, g);
}
END_TEST

START_TEST(a_target_below_the_least_counts_as_that)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct http_answer a;
    char body[1024];
    o.step_us = 2000;
    struct fake_group *g =
        start_ready(&p, &o, (const char *const[]){"--http", "127.0.0.1:0", "--min-tbt-target-ms", "20000", NULL});
    ids_body(body, sizeof body, 30, 7, 40, ",\"tbt_target_ms\":1");
    http_ask(&p, "POST", COMPLETIONS, "", body, &a);
    check_code(&a, 200, NULL);
    http_answer_free(&a);
    for (int64_t until = proc_now_ms() + WAIT_MS;
         http_metric(&p, "tandem_generation_tokens_total") < 40 && proc_now_ms() < until;)
        usleep(10000);
    ck_assert_double_eq(http_metric(&p, "tandem_answers_within_targets_total"), 1);
    finish(&p, g);
}
END_TEST

START_TEST(metrics_count_what_was_served)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.step_us = 2000;
    struct fake_group *g = start_ready(&p, &o, WITH_HTTP);
    struct http_answer a;
    char body[1024];
    ids_body(body, sizeof body, 30, 7, 40, ",\"tbt_target_ms\":1"); /* which it cannot keep */
    free(grpc_text(&p, 20, 1, 10));
    http_ask(&p, "POST", COMPLETIONS, "", body, &a);
    check_code(&a, 200, NULL);
    http_answer_free(&a);
    http_ask(&p, "POST", COMPLETIONS, "", "{\"prompt\":\"x\",\"top_p\":7}", &a);
    check_code(&a, 400, "\"param\":\"top_p\"");
    http_answer_free(&a);
    ck_assert(wait_live(&p, 0));
    for (int64_t until = proc_now_ms() + WAIT_MS; (http_metric(&p, "tandem_generation_tokens_total") < 50 ||
                                                   http_metric(&p, "tandem_kv_pool_map_calls_total") < 100) &&
                                                  proc_now_ms() < until;)
        usleep(10000); /* the engine tells once a turn, and a rank may be a step behind the other */
    static const struct {
        const char *name;
        double v;
    } is[] = {
        {"tandem_generation_tokens_total", 50},
        {"tandem_prompt_tokens_total", 50},
        {"tandem_request_success_total{finished_reason=\"length\"}", 2},
        {"tandem_request_errors_total{code=\"INVALID_ARGUMENT\"}", 1},
        {"tandem_time_to_first_token_seconds_count", 2},
        {"tandem_inter_token_latency_seconds_count", 48},
        {"tandem_inter_token_latency_seconds_bucket{le=\"+Inf\"}", 48},
        {"tandem_e2e_request_latency_seconds_count", 2},
        {"tandem_request_prompt_tokens_sum", 50},
        {"tandem_request_generation_tokens_sum", 50},
        {"tandem_request_generation_tokens_bucket{le=\"20\"}", 1},
        {"tandem_request_generation_tokens_bucket{le=\"50\"}", 2},
        {"tandem_answers_within_targets_total", 1},
        {"tandem_replays_total", 0},
        {"tandem_num_requests_running", 0},
        {"tandem_num_requests_waiting", 0},
        {"tandem_kv_pages_total", 1024},
        {"tandem_http_requests_total", 2},
        {"tandem_ready", 1},
        {"tandem_ranks", 2},
        {"tandem_slots_total", 8},
        {"tandem_worker_groups_total", 1},
        {"tandem_worker_groups_serving", 1},
    };
    for (size_t i = 0; i < sizeof is / sizeof *is; i++)
        ck_assert_msg(http_metric(&p, is[i].name) == is[i].v, "%s: %g", is[i].name, http_metric(&p, is[i].name));
    ck_assert(http_metric(&p, "tandem_steps_total") >= 50);
    ck_assert(http_metric(&p, "tandem_kv_pool_map_calls_total") >= 100); /* fake ranks, each: its last step */
    ck_assert(http_metric(&p, "tandem_kv_pool_wasted_bytes") == 0);
    http_ask(&p, "GET", "/metrics?names=vllm", "", NULL, &a);
    check_code(&a, 200, "\nvllm:num_requests_waiting 0\n");
    ck_assert_ptr_nonnull(strstr(a.body, "\nvllm:time_to_first_token_seconds_count 2\n"));
    http_answer_free(&a);
    finish(&p, g);
}
END_TEST

/* Requests that do not fit beside each other take turns in host memory; GetLoad and the metrics say so. */
START_TEST(suspended_requests_are_counted)
{
    enum { N = 12, PROMPT = 30, NEW = 60 };
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.token_bytes = 512; /* 8 in a page: a request takes 12 */
    o.total_pages = 30;
    o.suspend_pages = 40;
    struct fake_group *g = start_ready(&p, &o, WITH_HTTP);
    struct rpc_stream *s[N];
    for (uint32_t i = 0; i < N; i++) {
        struct ask a;
        ask_ids(&a, PROMPT, 1000 + i, NEW);
        s[i] = proc_open(&p, &a.m, 0);
    }
    for (uint32_t i = 0; i < N; i++) {
        struct proc_reply r = {0};
        proc_drain(s[i], &r);
        check_ids(&r, PROMPT, 1000 + i, NEW);
        proc_reply_free(&r);
        rpc_stream_close(s[i]);
    }
    Tandem__V1__Load *l = get_load(&p);
    ck_assert_uint_gt(l->suspensions, 0);
    ck_assert_uint_le(l->resumptions, l->suspensions);
    ck_assert_uint_gt(l->resumptions, 0);
    ck_assert_uint_eq(l->suspend_pages, 40); /* of rank 0, which has least */
    ck_assert_uint_eq(l->suspended_slots + l->suspended_pages, 0);
    ck_assert_uint_eq(fake_group_suspensions(g), l->suspensions);
    for (int64_t until = proc_now_ms() + WAIT_MS;
         (http_metric(&p, "tandem_suspensions_total") < (double)l->suspensions ||
          http_metric(&p, "tandem_num_preemptions_total") < (double)l->preemptions ||
          http_metric(&p, "tandem_kv_pages_suspended") > 0) &&
         proc_now_ms() < until;)
        usleep(10000);
    ck_assert(http_metric(&p, "tandem_suspensions_total") == (double)l->suspensions);
    ck_assert(http_metric(&p, "tandem_num_preemptions_total") == (double)l->preemptions);
    ck_assert(http_metric(&p, "tandem_kv_pages_suspended") == 0);
    tandem__v1__load__free_unpacked(l, NULL);
    finish(&p, g);
}
END_TEST

/* ---- limits ---- */

START_TEST(bodies_and_heads_are_bounded)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    const char *args[] = {"--http", "127.0.0.1:0", "--max-message-bytes", "2000", NULL};
    struct fake_group *g = start_ready(&p, &o, args);
    struct http_answer a;
    char *big = calloc(1, 70001), head[3000];
    ck_assert_ptr_nonnull(big);
    memset(big, ' ', 2001);
    http_ask(&p, "POST", COMPLETIONS, "", big, &a);
    check_code(&a, 413, "at most 2000 bytes");
    http_answer_free(&a);
    big[2000] = '\0';
    memcpy(big, "{\"prompt\":\"x\"}", 14);
    http_ask(&p, "POST", COMPLETIONS, "", big, &a);
    check_code(&a, 200, NULL);
    http_answer_free(&a);
    /* a body that does not say how long it is */
    int fd = http_connect(&p);
    http_send(fd, "POST", COMPLETIONS, "Transfer-Encoding: chunked\r\n", NULL);
    for (int i = 0; i < 8; i++) {
        char chunk[520];
        snprintf(chunk, sizeof chunk, "1f4\r\n%500s\r\n", "");
        if (send(fd, chunk, strlen(chunk), MSG_NOSIGNAL) < 0)
            break;
    }
    http_read(fd, &a, WAIT_MS);
    ck_assert_int_eq(a.code == 0 || a.code >= 400, 1);
    http_answer_free(&a);
    close(fd);
    /* a head without an end */
    fd = http_connect(&p);
    memset(head, 'a', sizeof head);
    for (int i = 0; i < 20; i++)
        if (send(fd, head, sizeof head, MSG_NOSIGNAL) < 0)
            break;
    http_read(fd, &a, WAIT_MS);
    ck_assert_int_eq(a.code == 0 || a.code >= 400, 1);
    http_answer_free(&a);
    close(fd);
    free(big);
    http_ask(&p, "POST", COMPLETIONS, "", "{\"prompt\":\"x\"}", &a);
    check_code(&a, 200, NULL);
    http_answer_free(&a);
    finish(&p, g);
}
END_TEST

START_TEST(tokens_are_those_of_grpc)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    char path[] = "/tmp/tandem-token-XXXXXX";
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, "0123456789abcdef0123\n", 21), 21);
    close(fd);
    const char *args[] = {"--http", "127.0.0.1:0,token", "--token-file", path, NULL};
    struct fake_group *g = start_ready(&p, &o, args);
    static const struct {
        const char *path, *header;
        int code;
    } ask[] = {
        {"/health", "", 200},
        {"/livez", "", 200},
        {"/v1/models", "", 401},
        {"/metrics", "", 401},
        {"/", "", 200},
        {"/live.json", "", 401},
        {"/live.json", "Authorization: Bearer 0123456789abcdef0123\r\n", 200},
        {"/v1/models", "Authorization: Bearer 0123456789abcdef0124\r\n", 401},
        {"/v1/models", "Authorization: Bearer 0123456789abcdef0123\r\n", 200},
        {"/metrics", "Authorization: Bearer 0123456789abcdef0123\r\n", 200},
        {COMPLETIONS, "", 401},
        {COMPLETIONS, "Authorization: Bearer x\r\n", 401},
        {COMPLETIONS, "Authorization: Bearer 0123456789abcdef0123\r\n", 200},
    };
    for (size_t i = 0; i < sizeof ask / sizeof *ask; i++) {
        struct http_answer a;
        bool post = strcmp(ask[i].path, COMPLETIONS) == 0;
        http_ask(&p, post ? "POST" : "GET", ask[i].path, ask[i].header, post ? "{\"prompt\":\"x\"}" : NULL, &a);
        ck_assert_msg(a.code == ask[i].code, "%zu: %d %s", i, a.code, a.body);
        if (a.code == 401)
            ck_assert(strstr(a.head, "WWW-Authenticate: Bearer") && strstr(a.body, "invalid_api_key"));
        http_answer_free(&a);
    }
    unlink(path);
    finish(&p, g);
}
END_TEST

START_TEST(a_listener_for_health_generates_nothing)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    const char *args[] = {"--http", "127.0.0.1:0,health", NULL};
    struct fake_group *g = start_ready(&p, &o, args);
    struct http_answer a;
    http_ask(&p, "GET", "/metrics", "", NULL, &a);
    check_code(&a, 200, "tandem_ready 1");
    http_answer_free(&a);
    http_ask(&p, "GET", "/live.json", "", NULL, &a);
    check_code(&a, 403, "health and metrics only");
    http_answer_free(&a);
    http_ask(&p, "POST", COMPLETIONS, "", "{\"prompt\":\"x\"}", &a);
    check_code(&a, 403, "health and metrics only");
    http_answer_free(&a);
    finish(&p, g);
}
END_TEST

START_TEST(a_full_queue_says_when_to_try_again)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    const char *args[] = {"--http", "127.0.0.1:0", "--max-queued", "1", NULL};
    o.max_slots = 1;
    struct fake_group *g = start_ready(&p, &o, args);
    fake_group_mood(g, 0, FAKE_HOLD);
    int fd[2];
    for (int i = 0; i < 2; i++) {
        fd[i] = http_connect(&p);
        http_send(fd[i], "POST", COMPLETIONS, "", i ? "{\"prompt\":\"x\",\"stream\":true}" : "{\"prompt\":\"x\"}");
        ck_assert(wait_running(&p, 1, (uint32_t)i));
    }
    struct http_answer a;
    int64_t begin = proc_now_ms();
    http_ask(&p, "POST", COMPLETIONS, "", "{\"prompt\":\"x\",\"stream\":true}", &a);
    check_code(&a, 429, "\"rate_limit_exceeded\"");
    ck_assert_int_lt(proc_now_ms() - begin, 1000);
    ck_assert(strstr(a.head, "\r\nRetry-After: 1\r\n") && strstr(a.head, "\r\nretry-after-ms: 1000\r\n"));
    http_answer_free(&a);
    fake_group_mood(g, 0, FAKE_WELL);
    for (int i = 0; i < 2; i++) {
        ck_assert(http_read(fd[i], &a, WAIT_MS));
        check_code(&a, 200, NULL);
        http_answer_free(&a);
        close(fd[i]);
    }
    finish(&p, g);
}
END_TEST

static void check_refused_start(const char *option, const char *value, const char *part)
{
    char command[512], text[512] = "";
    snprintf(command, sizeof command, "%s --model %s --listen 127.0.0.1:0 %s %s 2>&1", TEST_COORDINATOR, TEST_MODEL,
             option, value);
    FILE *f = popen(command, "r");
    ck_assert_ptr_nonnull(f);
    size_t n = fread(text, 1, sizeof text - 1, f);
    text[n] = '\0';
    ck_assert_int_ne(pclose(f), 0);
    ck_assert_msg(strstr(text, part) != NULL, "%s %s: %s", option, value, text);
}

START_TEST(addresses_that_cannot_be_are_refused_at_the_start)
{
    check_refused_start("--http", "127.0.0.1", "expected HOST:PORT");
    check_refused_start("--http", "127.0.0.1:99999", "expected HOST:PORT");
    check_refused_start("--http", "unix:/tmp/x", "expected HOST:PORT");
    check_refused_start("--http", "127.0.0.1:0,tls", "needs --tls-cert");
    check_refused_start("--http", "127.0.0.1:0,word", "expected plain");
    check_refused_start("--health-listen", "127.0.0.1:0,tls", "expected an address alone");
}
END_TEST

/* ---- faults ---- */

START_TEST(a_client_that_goes_away_ends_its_request)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.max_slots = 1;
    struct fake_group *g = start_ready(&p, &o, WITH_HTTP);
    /* in the middle of its events */
    int fd = http_connect(&p);
    char body[512];
    ids_body(body, sizeof body, 4, 1, 1000, ",\"stream\":true");
    http_send(fd, "POST", COMPLETIONS, "", body);
    ck_assert(http_read_until(fd, "data: ", WAIT_MS));
    fake_group_mood(g, 0, FAKE_HOLD);
    ck_assert(wait_running(&p, 1, 0));
    close(fd);
    ck_assert(wait_live(&p, 0));
    /* while it waits for a whole answer, and in the queue */
    for (int i = 0; i < 2; i++) {
        int wait[2];
        for (int k = 0; k < 2; k++) {
            wait[k] = http_connect(&p);
            http_send(wait[k], "POST", COMPLETIONS, "",
                      k ^ i ? "{\"prompt\":\"x\"}" : "{\"prompt\":\"x\",\"stream\":true}");
            ck_assert(wait_live(&p, (uint32_t)k + 1));
        }
        close(wait[1]);
        ck_assert(wait_live(&p, 1));
        close(wait[0]);
        ck_assert(wait_live(&p, 0));
    }
    fake_group_mood(g, 0, FAKE_WELL);
    ck_assert(http_metric(&p, "tandem_request_errors_total{code=\"CANCELLED\"}") >= 4);
    free(grpc_text(&p, 5, 5, 5));
    finish(&p, g);
}
END_TEST

START_TEST(a_client_that_does_not_read_is_cut_off)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    const char *args[] = {"--http", "127.0.0.1:0", "--slow-client-timeout-ms", "150", NULL};
    o.max_context = 60000;
    o.total_pages = 8192;
    struct fake_group *g = start_ready(&p, &o, args);
    int fd = http_connect(&p), small = 2048;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    char body[512];
    ids_body(body, sizeof body, 4, 1, 59000, ",\"stream\":true,\"temperature\":1,\"n\":8");
    http_send(fd, "POST", COMPLETIONS, "", body);
    for (int64_t until = proc_now_ms() + 6 * WAIT_MS; /* the sockets hold some 10,000 tokens */
         http_metric(&p, "tandem_request_errors_total{code=\"RESOURCE_EXHAUSTED\"}") < 1 && proc_now_ms() < until;)
        usleep(20000);
    ck_assert_msg(http_metric(&p, "tandem_request_errors_total{code=\"RESOURCE_EXHAUSTED\"}") == 1, "tokens %g",
                  http_metric(&p, "tandem_inter_token_latency_seconds_count"));
    ck_assert(wait_live(&p, 0));
    free(grpc_text(&p, 5, 5, 5));
    close(fd);
    finish(&p, g);
}
END_TEST

START_TEST(a_lost_group_ends_streams_with_an_error)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.dies_of_chunk = 7;
    o.step_us = 5000; /* the other two have not ended by then */
    struct fake_group *g = start_ready(&p, &o, no_replay);
    char body[512];
    int fd[3];
    struct http_answer a;
    for (int i = 0; i < 3; i++) {
        fd[i] = http_connect(&p);
        ids_body(body, sizeof body, i == 2 ? 7 : 4, 1, 1000, i ? ",\"stream\":true" : ""); /* the last gets no token */
        http_send(fd[i], "POST", COMPLETIONS, "", body);
        if (i == 1)
            ck_assert(http_read_until(fd[i], "data: ", WAIT_MS));
    }
    ck_assert(http_read(fd[0], &a, WAIT_MS));
    check_code(&a, 503, "rank 0 was lost");
    http_answer_free(&a);
    ck_assert(http_read_until(fd[1], "data: {\"error\":{\"message\":\"rank 0 was lost", WAIT_MS));
    ck_assert(http_read(fd[2], &a, WAIT_MS));
    check_code(&a, 503, "service_unavailable_error");
    ck_assert_ptr_nonnull(strstr(a.head, "\r\nRetry-After: "));
    http_answer_free(&a);
    for (int i = 0; i < 3; i++)
        close(fd[i]);
    fake_group_stop(g);
    http_ask(&p, "GET", "/health", "", NULL, &a);
    check_code(&a, 503, "rank 0 was lost");
    http_answer_free(&a);
    ck_assert_int_eq(proc_end(&p, SIGTERM, WAIT_MS), 0);
}
END_TEST

START_TEST(a_drain_lets_answers_end_and_takes_no_more)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, WITH_HTTP);
    int fd = http_connect(&p), late = http_connect(&p);
    struct http_answer a;
    fake_group_mood(g, 0, FAKE_HOLD);
    http_send(fd, "POST", COMPLETIONS, "", "{\"prompt\":\"x\",\"max_tokens\":30,\"stream\":true}");
    ck_assert(wait_running(&p, 1, 0));
    kill(p.pid, SIGTERM);
    ck_assert(proc_wait_state(&p, STATE(DRAINING), WAIT_MS));
    http_send(late, "POST", COMPLETIONS, "", "{\"prompt\":\"x\"}");
    ck_assert(http_read(late, &a, WAIT_MS));
    check_code(&a, 503, "draining");
    ck_assert_ptr_null(strstr(a.head, "Retry-After"));
    http_answer_free(&a);
    fake_group_mood(g, 0, FAKE_WELL);
    ck_assert(http_read(fd, &a, WAIT_MS));
    check_code(&a, 200, "data: [DONE]");
    http_answer_free(&a);
    close(fd);
    close(late);
    fake_group_stop(g);
    ck_assert_int_eq(proc_end(&p, 0, WAIT_MS), 0);
}
END_TEST

START_TEST(a_stop_in_the_middle_closes_all_connections)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    const char *args[] = {"--http", "127.0.0.1:0", "--drain-timeout-ms", "50", NULL};
    struct fake_group *g = start_ready(&p, &o, args);
    int fd[3];
    struct http_answer a;
    fake_group_mood(g, 0, FAKE_HOLD);
    for (int i = 0; i < 3; i++)
        fd[i] = http_connect(&p);
    http_send(fd[0], "POST", COMPLETIONS, "", "{\"prompt\":\"x\"}");
    http_send(fd[1], "POST", COMPLETIONS, "", "{\"prompt\":\"x\",\"stream\":true}");
    ck_assert(wait_live(&p, 2));
    ck_assert_int_eq(proc_end(&p, SIGTERM, WAIT_MS), 0);
    for (int i = 0; i < 2; i++) {
        ck_assert(http_read(fd[i], &a, WAIT_MS));
        check_code(&a, 503, "stopping");
        http_answer_free(&a);
    }
    for (int i = 0; i < 3; i++)
        close(fd[i]);
    fake_group_stop(g);
}
END_TEST

START_TEST(bytes_that_are_no_http_do_no_harm)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, WITH_HTTP);
    static const char request[] =
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 25\r\n\r\n{\"prompt\":\"Once "
        "upon a\"}\r\nGET /metrics HTTP/1.1\r\n\r\n";
    uint64_t x = 7;
    for (int i = 0; i < 100; i++) {
        char text[sizeof request];
        struct http_answer a;
        int fd = http_connect(&p);
        memcpy(text, request, sizeof text);
        for (int k = i % 5; k > 0; k--) {
            x = x * 6364136223846793005u + 1442695040888963407u;
            text[(x >> 33) % (sizeof text - 1)] = (char)(x >> 24);
        }
        size_t n = i % 3 ? sizeof text - 1 : (size_t)(x >> 33) % sizeof text; /* or broken off */
        ck_assert_int_eq(send(fd, text, n, MSG_NOSIGNAL) >= 0, 1);
        if (i % 4 == 0) {
            shutdown(fd, SHUT_WR);
            http_read(fd, &a, 20);
            http_answer_free(&a);
        }
        close(fd);
    }
    ck_assert(wait_live(&p, 0));
    free(grpc_text(&p, 5, 5, 5));
    finish(&p, g);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("http");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_test(core, answers_are_those_of_grpc_whole_and_streamed);
    tcase_add_test(core, chats_and_several_answers_are_served);
    tcase_add_test(core, many_streams_at_once_get_their_own_tokens);
    tcase_add_test(core, a_connection_serves_one_request_after_the_other);
    tcase_add_test(core, pages_say_what_is);
    tcase_add_test(core, live_numbers_are_those_of_what_was_served);
    tcase_add_test(core, spans_go_on_in_the_trace_of_the_caller);
    tcase_add_test(core, metrics_count_what_was_served);
    tcase_add_test(core, a_target_below_the_least_counts_as_that);
    tcase_add_test(core, suspended_requests_are_counted);
    tcase_add_test(limits, bodies_and_heads_are_bounded);
    tcase_add_test(limits, tokens_are_those_of_grpc);
    tcase_add_test(limits, a_listener_for_health_generates_nothing);
    tcase_add_test(limits, a_full_queue_says_when_to_try_again);
    tcase_add_test(limits, addresses_that_cannot_be_are_refused_at_the_start);
    tcase_add_test(faults, a_client_that_goes_away_ends_its_request);
    tcase_add_test(faults, a_client_that_does_not_read_is_cut_off);
    tcase_add_test(faults, a_lost_group_ends_streams_with_an_error);
    tcase_add_test(faults, a_drain_lets_answers_end_and_takes_no_more);
    tcase_add_test(faults, a_stop_in_the_middle_closes_all_connections);
    tcase_add_test(faults, bytes_that_are_no_http_do_no_harm);
    TCase *all[] = {core, limits, faults};
    for (int i = 0; i < 3; i++) {
        tcase_set_timeout(all[i], 90);
        suite_add_tcase(s, all[i]);
    }
    SRunner *sr = srunner_create(s);
    srunner_run_all(sr, CK_NORMAL);
    int failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
