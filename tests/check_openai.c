/* OpenAI's API over the messages of tandem.v1, without sockets; what is a server's is in check_http.c. */
#include <check.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/openai.h"

static Tandem__V1__GenerateRequest *parse(enum openai_kind kind, const char *body, struct openai_form *form)
{
    Tandem__V1__GenerateRequest *m = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(openai_parse(kind, body, strlen(body), form, &m, &st) == ST_OK, "%s: %s", body, st.message);
    return m;
}

static void drop(Tandem__V1__GenerateRequest *m)
{
    protobuf_c_message_free_unpacked(&m->base, NULL);
}

START_TEST(completion_becomes_a_request)
{
    struct openai_form f;
    Tandem__V1__GenerateRequest *m = parse(
        OPENAI_COMPLETION,
        "{\"model\":\"m\",\"prompt\":\"a\\u0000b\",\"max_tokens\":7,\"temperature\":0.5,\"top_p\":0.25,\"n\":3,"
        "\"seed\":-1,\"presence_penalty\":1.5,\"frequency_penalty\":-1,\"stop\":[\"x\",\"yz\"],\"logprobs\":2,"
        "\"logit_bias\":{\"5\":-100,\"7\":1.5},\"top_k\":4,\"min_p\":0.125,\"repetition_penalty\":1.25,"
        "\"ignore_eos\":true,\"min_tokens\":2,\"stop_token_ids\":[9,8],\"include_stop_str_in_output\":true,"
        "\"stream\":true,\"stream_options\":{\"include_usage\":true},\"user\":\"u\",\"suffix\":null,\"best_of\":3,"
        "\"add_special_tokens\":false,\"ttft_target_ms\":500,\"tbt_target_ms\":0,\"tenant\":\"t\",\"priority\":-7}",
        &f);
    ck_assert_int_eq(m->prompt_case, TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT);
    ck_assert_uint_eq(m->text.len, 3);
    ck_assert_mem_eq(m->text.data, "a\0b", 3);
    ck_assert_mem_eq(m->model.data, "m", 1);
    ck_assert(m->add_special_tokens_is_case && !m->add_special_tokens);
    const Tandem__V1__Sampling *s = m->sampling;
    ck_assert(s->temperature_is_case && s->temperature == 0.5f && s->top_p == 0.25f && s->n == 3);
    ck_assert(s->seed_is_case && s->seed == UINT64_MAX && s->presence_penalty == 1.5f && s->frequency_penalty == -1.0f);
    ck_assert(s->n_logit_bias == 2 && s->logit_bias[0]->token_id == 5 && s->logit_bias[0]->bias == -100.0f);
    ck_assert(s->top_k == 4 && s->min_p == 0.125f && s->repetition_penalty == 1.25f && !s->typical_p_is_case);
    const Tandem__V1__Stopping *t = m->stopping;
    ck_assert(t->max_tokens_is_case && t->max_tokens == 7 && t->ignore_eos && t->min_tokens == 2);
    ck_assert(t->n_stop == 2 && strcmp(t->stop[1], "yz") == 0 && t->include_stop_in_output);
    ck_assert(t->n_stop_token_ids == 2 && t->stop_token_ids[1] == 8);
    ck_assert(m->output->logprobs_is_case && m->output->logprobs == 2 && !m->output->echo);
    ck_assert(f.stream && f.include_usage && f.logprobs && f.n == 3);
    const Tandem__V1__Scheduling *d = m->scheduling;
    ck_assert(d->ttft_target_ms_is_case && d->ttft_target_ms == 500 && d->tbt_target_ms_is_case &&
              d->tbt_target_ms == 0);
    ck_assert(d->priority == 1 && d->tenant.len == 1 && d->tenant.data[0] == 't');
    drop(m);
}
END_TEST

START_TEST(chat_becomes_messages)
{
    struct openai_form f;
    Tandem__V1__GenerateRequest *m = parse(
        OPENAI_CHAT,
        "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"text\",\"text\":"
        "\"b\"}],\"name\":\"n\"},{\"role\":\"assistant\",\"content\":null,\"refusal\":null,\"tool_calls\":[{\"id\":"
        "\"1\","
        "\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"x\\\":1}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"1\","
        "\"content\":\"4\"}],\"tools\":[{\"type\":\"function\"}],\"max_tokens\":3,\"max_completion_tokens\":4,"
        "\"logprobs\":true,\"chat_template_kwargs\":{\"k\":true},\"continue_final_message\":true,"
        "\"add_generation_prompt\":false}",
        &f);
    ck_assert_int_eq(m->prompt_case, TANDEM__V1__GENERATE_REQUEST__PROMPT_CHAT);
    const Tandem__V1__Chat *c = m->chat;
    ck_assert_uint_eq(c->n_messages, 3);
    ck_assert(strcmp(c->messages[0]->role, "user") == 0 && strcmp(c->messages[0]->name, "n") == 0);
    ck_assert(c->messages[0]->content.len == 3 && memcmp(c->messages[0]->content.data, "a\nb", 3) == 0);
    ck_assert_str_eq(c->messages[1]->tool_calls_json,
                     "[{\"id\":\"1\",\"function\":{\"name\":\"f\",\"arguments\":{\"x\":1}}}]");
    ck_assert(c->messages[1]->content.len == 0 && strcmp(c->messages[2]->tool_call_id, "1") == 0);
    ck_assert_str_eq(c->tools_json, "[{\"type\":\"function\"}]");
    ck_assert_str_eq(c->template_arguments_json, "{\"k\":true}");
    ck_assert(c->continue_final_message && c->add_generation_prompt_is_case && !c->add_generation_prompt);
    ck_assert(m->stopping->max_tokens == 4 && f.max_completion_tokens);
    ck_assert(m->output->logprobs_is_case && m->output->logprobs == 0 && f.logprobs);
    drop(m);
}
END_TEST

START_TEST(what_is_not_given_has_openais_default)
{
    struct openai_form f;
    Tandem__V1__GenerateRequest *m =
        parse(OPENAI_COMPLETION, "{\"prompt\":[3,4],\"top_k\":-1,\"temperature\":null}", &f);
    ck_assert(m->prompt_case == TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS && m->token_ids->n_ids == 2);
    ck_assert(m->stopping->max_tokens == OPENAI_COMPLETION_TOKENS && !m->sampling->top_k_is_case);
    ck_assert(!m->sampling->temperature_is_case && !f.stream && !f.logprobs && f.n == 1);
    drop(m);
    m = parse(OPENAI_CHAT,
              "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"tools\":[1],\"tool_choice\":\"none\"}", &f);
    ck_assert(!m->stopping->max_tokens_is_case && m->chat->tools_json[0] == '\0');
    drop(m);
    m = parse(OPENAI_COMPLETION, "{\"prompt\":[\"x\"],\"echo\":true,\"logprobs\":0}", &f);
    ck_assert(m->output->echo && m->output->prompt_logprobs_is_case && m->output->prompt_logprobs == 0);
    drop(m);
}
END_TEST

static const struct {
    enum openai_kind kind;
    const char *body, *param; /* param NULL: none */
} bad[] = {
    {OPENAI_COMPLETION, "", NULL},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\"", NULL},
    {OPENAI_COMPLETION, "[]", NULL},
    {OPENAI_COMPLETION, "{}", "prompt"},
    {OPENAI_COMPLETION, "{\"prompt\":5}", "prompt"},
    {OPENAI_COMPLETION, "{\"prompt\":[\"a\",\"b\"]}", "prompt"},
    {OPENAI_COMPLETION, "{\"prompt\":[1,-1]}", "prompt"},
    {OPENAI_COMPLETION, "{\"prompt\":[1,4294967296]}", "prompt"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"temperature\":\"1\"}", "temperature"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"ttft_target_ms\":-1}", "ttft_target_ms"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"tbt_target_ms\":1.5}", "tbt_target_ms"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"tenant\":7}", "tenant"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"priority\":\"1\"}", "priority"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"max_tokens\":-1}", "max_tokens"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"max_tokens\":1.5}", "max_tokens"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"n\":4294967296}", "n"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"seed\":1.5}", "seed"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"stop\":5}", "stop"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"stop\":[5]}", "stop"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"stop\":\"a\\u0000\"}", "stop"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"logit_bias\":{\"a\":1}}", "logit_bias"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"logit_bias\":{\"5\":\"1\"}}", "logit_bias"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"logprobs\":true}", "logprobs"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"ignore_eos\":1}", "ignore_eos"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"stream\":\"yes\"}", "stream"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"stream_options\":{}}", "stream_options"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"stream\":true,\"stream_options\":{\"a\":1}}", "stream_options"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"best_of\":2}", "best_of"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"suffix\":\"y\"}", "suffix"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"echo\":true,\"logprobs\":1,\"n\":2}", "n"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"skip_special_tokens\":false}", "skip_special_tokens"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"messages\":[]}", "messages"},
    {OPENAI_COMPLETION, "{\"prompt\":\"x\",\"colour\":1}", "colour"},
    {OPENAI_CHAT, "{}", "messages"},
    {OPENAI_CHAT, "{\"messages\":[]}", "messages"},
    {OPENAI_CHAT, "{\"messages\":[5]}", "messages[0]"},
    {OPENAI_CHAT, "{\"messages\":[{\"role\":5}]}", "messages[0].role"},
    {OPENAI_CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":5}]}", "messages[0].content"},
    {OPENAI_CHAT, "{\"messages\":[{\"content\":[{\"type\":\"image_url\"}]}]}", "messages[0].content[0]"},
    {OPENAI_CHAT, "{\"messages\":[{\"tool_calls\":1}]}", "messages[0].tool_calls"},
    {OPENAI_CHAT, "{\"messages\":[{}],\"top_logprobs\":2}", "top_logprobs"},
    {OPENAI_CHAT, "{\"messages\":[{}],\"tool_choice\":\"required\"}", "tool_choice"},
    {OPENAI_CHAT, "{\"messages\":[{}],\"response_format\":{\"type\":\"json_object\"}}", "response_format"},
    {OPENAI_CHAT, "{\"messages\":[{}],\"echo\":true}", "echo"},
};

START_TEST(refuses_what_is_wrong_and_names_the_field)
{
    struct openai_form f = {.kind = bad[_i].kind};
    Tandem__V1__GenerateRequest *m = NULL;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(openai_parse(bad[_i].kind, bad[_i].body, strlen(bad[_i].body), &f, &m, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_null(m);
    struct json_text text = {0};
    openai_error(&text, 400, &f, &st);
    json_t *v = json_loadb(text.p, text.n, 0, NULL);
    const json_t *error = json_object_get(v, "error");
    ck_assert_str_eq(json_string_value(json_object_get(error, "type")), "invalid_request_error");
    if (bad[_i].param)
        ck_assert_str_eq(json_string_value(json_object_get(error, "param")), bad[_i].param);
    else
        ck_assert(json_is_null(json_object_get(error, "param")));
    ck_assert_uint_gt(json_string_length(json_object_get(error, "message")), 5);
    json_decref(v);
    json_text_free(&text);
}
END_TEST

static const struct {
    enum openai_kind kind;
    bool completion_limit;
    enum status_code code;
    const char *message, *param, *error_code;
    unsigned http;
} renamed[] = {
    {OPENAI_CHAT, false, ST_INVALID_ARGUMENT, "sampling.top_p: 2, expected", "top_p", NULL, 400},
    {OPENAI_CHAT, false, ST_INVALID_ARGUMENT, "stopping.max_tokens: 9", "max_tokens", NULL, 400},
    {OPENAI_CHAT, true, ST_INVALID_ARGUMENT, "stopping.max_tokens: 9", "max_completion_tokens", NULL, 400},
    {OPENAI_CHAT, false, ST_INVALID_ARGUMENT, "output.logprobs: 21", "top_logprobs", NULL, 400},
    {OPENAI_COMPLETION, false, ST_INVALID_ARGUMENT, "output.logprobs: 21", "logprobs", NULL, 400},
    {OPENAI_COMPLETION, false, ST_INVALID_ARGUMENT, "token_ids: empty", "prompt", NULL, 400},
    {OPENAI_CHAT, false, ST_INVALID_ARGUMENT, "chat.messages[3].role: x", "messages[3].role", NULL, 400},
    {OPENAI_CHAT, false, ST_FAILED_PRECONDITION, "chat: no template", "messages", NULL, 400},
    {OPENAI_CHAT, false, ST_NOT_FOUND, "model: no", "model", "model_not_found", 404},
    {OPENAI_CHAT, false, ST_UNAUTHENTICATED, "authorization: no", NULL, "invalid_api_key", 401},
    {OPENAI_CHAT, false, ST_RESOURCE_EXHAUSTED, "full: 5 wait", NULL, "rate_limit_exceeded", 429},
    {OPENAI_CHAT, false, ST_UNAVAILABLE, "no group", NULL, NULL, 503},
    {OPENAI_CHAT, false, ST_DEADLINE_EXCEEDED, "late", NULL, NULL, 504},
    {OPENAI_CHAT, false, ST_INTERNAL, "a \"bug\"\n", NULL, NULL, 500},
};

START_TEST(errors_have_the_clients_names)
{
    struct openai_form f = {.kind = renamed[_i].kind, .max_completion_tokens = renamed[_i].completion_limit};
    struct status st = STATUS_INIT;
    struct json_text text = {0};
    status_set(&st, renamed[_i].code, "%s", renamed[_i].message);
    ck_assert_uint_eq(openai_http_code(st.code), renamed[_i].http);
    openai_error(&text, renamed[_i].http, &f, &st);
    json_t *v = json_loadb(text.p, text.n, 0, NULL), *error = json_object_get(v, "error");
    ck_assert_ptr_nonnull(error);
    const char *param = json_string_value(json_object_get(error, "param"));
    const char *code = json_string_value(json_object_get(error, "code"));
    ck_assert(renamed[_i].param ? param && strcmp(param, renamed[_i].param) == 0 : !param);
    ck_assert(renamed[_i].error_code ? code && strcmp(code, renamed[_i].error_code) == 0 : !code);
    json_decref(v);
    json_text_free(&text);
}
END_TEST

/* ---- answers ---- */

static struct tokenizer *tok;

static void load(void)
{
    ck_assert_int_eq(tok_load(&tok, TEST_MODEL, NULL), ST_OK);
}

static void unload(void)
{
    tok_free(tok);
    tok = NULL;
}

static struct openai_reply *reply_of(struct openai_form form)
{
    struct openai_reply *r = NULL;
    const struct openai_context ctx = {.tok = tok, .model = "m\"x", .created_s = 5};
    ck_assert_int_eq(openai_reply_create(&r, &form, &ctx, NULL), ST_OK);
    return r;
}

static enum status_code add(struct openai_reply *r, uint32_t index, const char *text, int finish, bool scored)
{
    Tandem__V1__GenerateResponse m = TANDEM__V1__GENERATE_RESPONSE__INIT;
    Tandem__V1__Finish f = TANDEM__V1__FINISH__INIT;
    Tandem__V1__Usage u = TANDEM__V1__USAGE__INIT;
    Tandem__V1__TokenLogprob score = TANDEM__V1__TOKEN_LOGPROB__INIT, *list = &score;
    uint32_t top[2] = {300, 301};
    float top_logprobs[2] = {-0.5f, -2.0f};
    m.index = index;
    m.text = (ProtobufCBinaryData){.len = strlen(text), .data = (uint8_t *)(uintptr_t)text};
    m.request_id = (ProtobufCBinaryData){.len = 2, .data = (uint8_t *)"r1"};
    score.token_id = 301;
    score.logprob = -2.0f;
    score.n_top_token_ids = score.n_top_logprobs = 2;
    score.top_token_ids = top;
    score.top_logprobs = top_logprobs;
    if (scored) {
        m.n_logprobs = 1;
        m.logprobs = &list;
    }
    u.prompt_tokens = 4;
    u.completion_tokens = 3;
    u.cached_prompt_tokens = 2;
    f.reason = finish == 2 ? TANDEM__V1__FINISH__REASON__STOP : TANDEM__V1__FINISH__REASON__LENGTH;
    f.usage = &u;
    m.finish = finish ? &f : NULL;
    return openai_reply_add(r, &m, NULL);
}

static char *taken(struct openai_reply *r)
{
    const char *text;
    size_t len;
    openai_reply_take(r, &text, &len);
    char *copy = calloc(len + 1, 1);
    ck_assert_ptr_nonnull(copy);
    if (len) {
        memcpy(copy, text, len);
    }
    return copy;
}

START_TEST(whole_answers_are_one_body)
{
    struct openai_reply *r = reply_of((struct openai_form){.kind = OPENAI_CHAT, .n = 2});
    ck_assert_int_eq(add(r, 1, "one\n", 0, false), ST_OK);
    ck_assert_int_eq(add(r, 0, "zero", 2, false), ST_OK);
    ck_assert_int_eq(add(r, 1, "\"more\"", 1, false), ST_OK);
    ck_assert_int_eq(openai_reply_end(r, NULL), ST_OK);
    char *text = taken(r);
    ck_assert_str_eq(
        text, "{\"id\":\"chatcmpl-r1\",\"object\":\"chat.completion\",\"created\":5,\"model\":\"m\\\"x\",\"choices\":[{"
              "\"index\":"
              "0,\"message\":{\"role\":\"assistant\",\"content\":\"zero\",\"refusal\":null},\"logprobs\":null,\"finish_"
              "reason\":"
              "\"stop\"},{\"index\":1,\"message\":{\"role\":\"assistant\",\"content\":\"one\\n\\\"more\\\"\","
              "\"refusal\":null},"
              "\"logprobs\":null,\"finish_reason\":\"length\"}],\"usage\":{\"prompt_tokens\":4,\"completion_tokens\":6,"
              "\"total_tokens\":10,\"prompt_tokens_details\":{\"cached_tokens\":2}}}");
    free(text);
    openai_reply_destroy(r);
}
END_TEST

#define CHUNK(choice, usage)                                                                                           \
    "data: {\"id\":\"chatcmpl-r1\",\"object\":\"chat.completion.chunk\",\"created\":5,\"model\":\"m\\\"x\","           \
    "\"choices\":[" choice "]" usage "}\n\n"
#define DELTA(delta, finish) "{\"index\":0,\"delta\":{" delta "},\"logprobs\":null,\"finish_reason\":" finish "}"

START_TEST(streams_are_events_and_end_with_done)
{
    struct openai_reply *r =
        reply_of((struct openai_form){.kind = OPENAI_CHAT, .n = 1, .stream = true, .include_usage = true});
    ck_assert_int_eq(add(r, 0, "ab", 0, false), ST_OK);
    char *text = taken(r), *nothing = taken(r);
    ck_assert_str_eq(text, CHUNK(DELTA("\"role\":\"assistant\",\"content\":\"\"", "null"), ",\"usage\":null")
                               CHUNK(DELTA("\"content\":\"ab\"", "null"), ",\"usage\":null"));
    ck_assert_str_eq(nothing, "");
    free(nothing);
    free(text);
    ck_assert_int_eq(add(r, 0, "", 2, false), ST_OK);
    ck_assert_int_eq(openai_reply_end(r, NULL), ST_OK);
    text = taken(r);
    ck_assert_str_eq(text, CHUNK(DELTA("", "\"stop\""), ",\"usage\":null")
                               CHUNK("", ",\"usage\":{\"prompt_tokens\":4,\"completion_tokens\":3,\"total_tokens\":7,"
                                         "\"prompt_tokens_details\":{\"cached_tokens\":2}}") "data: [DONE]\n\n");
    free(text);
    openai_reply_destroy(r);
}
END_TEST

START_TEST(a_stream_that_fails_says_why_and_is_not_done)
{
    struct openai_reply *r = reply_of((struct openai_form){.kind = OPENAI_COMPLETION, .n = 1, .stream = true});
    struct status why = STATUS_INIT;
    ck_assert_int_eq(add(r, 0, "ab", 0, false), ST_OK);
    free(taken(r));
    status_set(&why, ST_UNAVAILABLE, "rank 1 was lost");
    ck_assert_int_eq(openai_reply_fail(r, &why, NULL), ST_OK);
    char *text = taken(r);
    ck_assert_str_eq(text, "data: {\"error\":{\"message\":\"rank 1 was lost\",\"type\":\"service_unavailable_error\","
                           "\"param\":null,\"code\":null}}\n\n");
    free(text);
    openai_reply_destroy(r);
}
END_TEST

START_TEST(log_probabilities_stand_beside_their_tokens)
{
    for (int stream = 0; stream < 2; stream++)
        for (int chat = 0; chat < 2; chat++) {
            struct openai_reply *r = reply_of((struct openai_form){
                .kind = chat ? OPENAI_CHAT : OPENAI_COMPLETION, .n = 1, .logprobs = true, .stream = stream});
            ck_assert_int_eq(add(r, 0, "x", 0, true), ST_OK);
            ck_assert_int_eq(add(r, 0, "y", 1, true), ST_OK);
            ck_assert_int_eq(openai_reply_end(r, NULL), ST_OK);
            char *text = taken(r);
            if (!stream) {
                json_t *v = json_loads(text, 0, NULL);
                json_t *l = json_object_get(json_array_get(json_object_get(v, "choices"), 0), "logprobs");
                ck_assert_uint_eq(json_array_size(json_object_get(l, chat ? "content" : "tokens")), 2);
                ck_assert_uint_eq(json_array_size(json_object_get(l, chat ? "content" : "text_offset")), 2);
                json_decref(v);
            }
            ck_assert_ptr_nonnull(strstr(text, chat ? "\"logprob\":-2,\"bytes\":[" : "\"token_logprobs\":[-2"));
            free(text);
            openai_reply_destroy(r);
        }
}
END_TEST

/* ---- allocations that fail ---- */

static uint32_t fail_at, allocations;
static bool counting;

void *__real_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t size);
char *__real_strdup(const char *s);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t size);
char *__wrap_strdup(const char *s);

static bool allocation_fails(void)
{
    return counting && ++allocations == fail_at;
}

void *__wrap_malloc(size_t size)
{
    return allocation_fails() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return allocation_fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t size)
{
    return allocation_fails() ? NULL : __real_realloc(p, size);
}

char *__wrap_strdup(const char *s)
{
    return allocation_fails() ? NULL : __real_strdup(s);
}

START_TEST(nth_allocation_fails_and_no_request_is_made)
{
    static const char body[] =
        "{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":"
        "\"a\"}]},{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"arguments\":\"{}\"}}]}],"
        "\"stop\":[\"x\",\"y\"],\"stop_token_ids\":[1],\"logit_bias\":{\"1\":2},\"tools\":[1]}";
    for (fail_at = 1;; fail_at++) {
        struct openai_form f;
        Tandem__V1__GenerateRequest *m = NULL;
        struct status st = STATUS_INIT;
        allocations = 0;
        counting = true;
        enum status_code rc = openai_parse(OPENAI_CHAT, body, sizeof body - 1, &f, &m, &st);
        counting = false;
        if (rc == ST_OK)
            drop(m);
        else
            ck_assert_msg(rc == ST_RESOURCE_EXHAUSTED, "allocation %u: %s", fail_at, st.message);
        if (allocations < fail_at)
            break;
        ck_assert_msg(rc != ST_OK, "allocation %u", fail_at);
    }
    ck_assert_uint_gt(fail_at, 15);
}
END_TEST

START_TEST(nth_allocation_fails_and_the_answer_is_not_half)
{
    for (fail_at = 1;; fail_at++) {
        const struct openai_form form = {.kind = OPENAI_COMPLETION, .n = 1, .logprobs = true, .stream = fail_at % 2};
        const struct openai_context ctx = {.tok = tok, .model = "m"};
        struct openai_reply *r = NULL;
        allocations = 0;
        counting = true;
        enum status_code rc = openai_reply_create(&r, &form, &ctx, NULL);
        for (int i = 0; i < 20 && rc == ST_OK; i++)
            rc = add(r, 0, "some text that is added", i == 19, true);
        if (rc == ST_OK)
            rc = openai_reply_end(r, NULL);
        counting = false;
        bool failed = allocations >= fail_at;
        /* the anchor may fail: the text of tokens is then that at the beginning of a text */
        ck_assert_msg(failed || rc == ST_OK, "%u", fail_at);
        ck_assert_msg(rc == ST_OK || rc == ST_RESOURCE_EXHAUSTED, "%u: %d", fail_at, rc);
        openai_reply_destroy(r);
        if (!failed)
            break;
    }
    ck_assert_uint_gt(fail_at, 10);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("openai");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    TCase *answers = tcase_create("answers");
    tcase_add_test(core, completion_becomes_a_request);
    tcase_add_test(core, chat_becomes_messages);
    tcase_add_test(core, what_is_not_given_has_openais_default);
    tcase_add_unchecked_fixture(answers, load, unload);
    tcase_add_test(answers, whole_answers_are_one_body);
    tcase_add_test(answers, streams_are_events_and_end_with_done);
    tcase_add_test(answers, a_stream_that_fails_says_why_and_is_not_done);
    tcase_add_test(answers, log_probabilities_stand_beside_their_tokens);
    tcase_add_test(answers, nth_allocation_fails_and_the_answer_is_not_half);
    tcase_add_loop_test(limits, refuses_what_is_wrong_and_names_the_field, 0, (int)(sizeof bad / sizeof *bad));
    tcase_add_loop_test(limits, errors_have_the_clients_names, 0, (int)(sizeof renamed / sizeof *renamed));
    tcase_add_test(faults, nth_allocation_fails_and_no_request_is_made);
    suite_add_tcase(s, core);
    suite_add_tcase(s, answers);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *sr = srunner_create(s);
    srunner_run_all(sr, CK_NORMAL);
    int failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
