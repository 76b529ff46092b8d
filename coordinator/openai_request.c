/* Bodies of /v1/completions and /v1/chat/completions to a GenerateRequest.
 *
 * Most fields have a twin in tandem.v1 and are copied by the table below, through protobuf-c's own descriptors; what values
 * are legal is checked where gRPC's requests are checked. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/openai.h"
#include "coordinator/openai_internal.h"

#define COMPLETION 1u
#define CHAT       2u
#define BOTH       3u

typedef enum status_code take_fn(struct openai_taker *t, const char *name, const json_t *v, struct status *st);

static enum status_code wrong(struct status *st, const char *name, const char *expected)
{
    return status_set(st, ST_INVALID_ARGUMENT, "%s: expected %s", name, expected);
}

/* ---- values ---- */

static enum status_code boolean(const char *name, const json_t *v, bool *out, struct status *st)
{
    if (!json_is_boolean(v))
        return wrong(st, name, "true or false");
    *out = json_is_true(v);
    return ST_OK;
}

static enum status_code id_list(const char *name, const json_t *v, uint32_t **out, size_t *n, struct status *st)
{
    size_t count = json_array_size(v);
    uint32_t *ids = NULL;
    if (!json_is_array(v))
        return wrong(st, name, "an array of token ids");
    if (count == 0)
        return ST_OK;
    ids = malloc(count * sizeof *ids);
    if (!ids)
        return status_nomem(st, name, count * sizeof *ids);
    for (size_t i = 0; i < count; i++) {
        const json_t *one = json_array_get(v, i);
        json_int_t id = json_is_integer(one) ? json_integer_value(one) : -1;
        if (id < 0 || id > UINT32_MAX) {
            free(ids);
            return status_set(st, ST_INVALID_ARGUMENT, "%s: element %zu is no token id", name, i);
        }
        ids[i] = (uint32_t)id;
    }
    *out = ids;
    *n = count;
    return ST_OK;
}

/* ---- fields that have a twin ---- */

static enum status_code copy(ProtobufCMessage *to, const char *twin, const char *name, const json_t *v,
                             struct status *st)
{
    const ProtobufCFieldDescriptor *f = protobuf_c_message_descriptor_get_field_by_name(to->descriptor, twin);
    void *at = (char *)to + f->offset;
    json_int_t i = json_is_integer(v) ? json_integer_value(v) : 0;
    bool b = false;
    float number;
    uint32_t u32;
    uint64_t u64;
    switch (f->type) {
    case PROTOBUF_C_TYPE_FLOAT:
        if (!json_is_number(v))
            return wrong(st, name, "a number");
        number = (float)json_number_value(v);
        memcpy(at, &number, sizeof number);
        break;
    case PROTOBUF_C_TYPE_UINT32:
        if (!json_is_integer(v) || i < 0 || i > UINT32_MAX)
            return wrong(st, name, "an integer of at least 0");
        u32 = (uint32_t)i;
        memcpy(at, &u32, sizeof u32);
        break;
    case PROTOBUF_C_TYPE_UINT64: /* a seed: any integer is one */
        if (!json_is_integer(v))
            return wrong(st, name, "an integer");
        u64 = (uint64_t)i;
        memcpy(at, &u64, sizeof u64);
        break;
    default:
        if (boolean(name, v, &b, st) != ST_OK)
            return ST_INVALID_ARGUMENT;
        *(protobuf_c_boolean *)at = b;
    }
    if (f->flags & PROTOBUF_C_FIELD_FLAG_ONEOF)
        memcpy((char *)to + f->quantifier_offset, &f->id, sizeof f->id);
    return ST_OK;
}

static enum status_code take_sampling(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    return copy(&t->m->sampling->base, name, name, v, st);
}

/* -1 says "all" where tandem.v1 says 0. */
static enum status_code take_top_k(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    if (json_is_integer(v) && json_integer_value(v) == -1)
        return ST_OK;
    return copy(&t->m->sampling->base, name, name, v, st);
}

static enum status_code take_stopping(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    return copy(&t->m->stopping->base, name, name, v, st);
}

static enum status_code take_max_tokens(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    if (t->form->max_completion_tokens) /* the newer name counts */
        return ST_OK;
    return copy(&t->m->stopping->base, "max_tokens", name, v, st);
}

static enum status_code take_max_completion(struct openai_taker *t, const char *name, const json_t *v,
                                            struct status *st)
{
    t->form->max_completion_tokens = true;
    return copy(&t->m->stopping->base, "max_tokens", name, v, st);
}

static enum status_code take_include_stop(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    return copy(&t->m->stopping->base, "include_stop_in_output", name, v, st);
}

static enum status_code take_add_special(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    return copy(&t->m->base, name, name, v, st);
}

static enum status_code take_chat_switch(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    return copy(&t->chat->base, name, name, v, st);
}

static Tandem__V1__Scheduling *scheduling(struct openai_taker *t)
{
    if (!t->m->scheduling && (t->m->scheduling = malloc(sizeof *t->m->scheduling)))
        tandem__v1__scheduling__init(t->m->scheduling);
    return t->m->scheduling;
}

static enum status_code take_target(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    Tandem__V1__Scheduling *s = scheduling(t);
    return s ? copy(&s->base, name, name, v, st) : status_nomem(st, name, sizeof *s);
}

/* ---- fields with a form of their own ---- */

static enum status_code take_tenant(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    Tandem__V1__Scheduling *s = scheduling(t);
    if (!s)
        return status_nomem(st, name, sizeof *s);
    return json_is_string(v) ? openai_bytes(&s->tenant, v, name, st) : wrong(st, name, "a string");
}

/* vLLM's: the less, the earlier; 0 is what all have. */
static enum status_code take_priority(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    Tandem__V1__Scheduling *s = scheduling(t);
    if (!s)
        return status_nomem(st, name, sizeof *s);
    if (!json_is_integer(v))
        return wrong(st, name, "an integer");
    s->priority = json_integer_value(v) < 0 ? 1 : json_integer_value(v) > 0 ? -1 : 0;
    return ST_OK;
}

static enum status_code take_model(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    if (!json_is_string(v))
        return wrong(st, name, "a string");
    return openai_bytes(&t->m->model, v, name, st);
}

static enum status_code take_stop(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    Tandem__V1__Stopping *s = t->m->stopping;
    size_t n = json_is_array(v) ? json_array_size(v) : 1;
    if (n == 0)
        return ST_OK;
    s->stop = calloc(n, sizeof *s->stop);
    if (!s->stop)
        return status_nomem(st, name, n * sizeof *s->stop);
    for (size_t i = 0; i < n; i++) {
        const json_t *one = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_is_string(one) || strlen(json_string_value(one)) != json_string_length(one))
            return wrong(st, name, "a string or an array of strings, without NUL");
        s->stop[i] = strdup(json_string_value(one));
        if (!s->stop[i])
            return status_nomem(st, name, json_string_length(one));
        s->n_stop++;
    }
    return ST_OK;
}

static enum status_code take_stop_ids(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    return id_list(name, v, &t->m->stopping->stop_token_ids, &t->m->stopping->n_stop_token_ids, st);
}

static enum status_code take_allowed_ids(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    return id_list(name, v, &t->m->sampling->allowed_token_ids, &t->m->sampling->n_allowed_token_ids, st);
}

static enum status_code take_bias(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    Tandem__V1__Sampling *s = t->m->sampling;
    const char *key;
    json_t *bias;
    if (!json_is_object(v))
        return wrong(st, name, "an object of token ids and numbers");
    if (json_object_size(v) == 0)
        return ST_OK;
    s->logit_bias = calloc(json_object_size(v), sizeof *s->logit_bias);
    if (!s->logit_bias)
        return status_nomem(st, name, json_object_size(v) * sizeof *s->logit_bias);
    json_object_foreach((json_t *)v, key, bias)
    {
        size_t digits = strspn(key, "0123456789");
        unsigned long long id = digits && digits <= 10 && !key[digits] ? strtoull(key, NULL, 10) : UINT64_MAX;
        if (id > UINT32_MAX || !json_is_number(bias))
            return wrong(st, name, "an object of token ids and numbers");
        Tandem__V1__LogitBias *one = malloc(sizeof *one);
        if (!one)
            return status_nomem(st, name, sizeof *one);
        tandem__v1__logit_bias__init(one);
        one->token_id = (uint32_t)id;
        one->bias = (float)json_number_value(bias);
        s->logit_bias[s->n_logit_bias++] = one;
    }
    return ST_OK;
}

static enum status_code take_prompt(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    if (json_is_array(v) && json_array_size(v) == 1 && !json_is_integer(json_array_get(v, 0)))
        v = json_array_get(v, 0); /* a list of one prompt */
    if (json_is_string(v)) {
        t->m->prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT;
        return openai_bytes(&t->m->text, v, name, st);
    }
    if (json_is_array(v) && json_array_size(v) > 1 && !json_is_integer(json_array_get(v, 0)))
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %zu prompts, expected one: send a request for each", name,
                          json_array_size(v));
    if (!json_is_array(v))
        return wrong(st, name, "a string or an array of token ids");
    Tandem__V1__TokenIds *ids = malloc(sizeof *ids);
    if (!ids)
        return status_nomem(st, name, sizeof *ids);
    tandem__v1__token_ids__init(ids);
    t->m->prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS;
    t->m->token_ids = ids;
    return id_list(name, v, &ids->ids, &ids->n_ids, st);
}

static enum status_code take_stream(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    return boolean(name, v, &t->form->stream, st);
}

static enum status_code take_stream_options(struct openai_taker *t, const char *name, const json_t *v,
                                            struct status *st)
{
    const char *key;
    json_t *one;
    bool ignored;
    if (!json_is_object(v))
        return wrong(st, name, "an object");
    t->stream_options = true;
    json_object_foreach((json_t *)v, key, one)
    {
        if (strcmp(key, "include_usage") == 0) {
            if (boolean("stream_options.include_usage", one, &t->form->include_usage, st) != ST_OK)
                return ST_INVALID_ARGUMENT;
        } else if (strcmp(key, "include_obfuscation") != 0 && strcmp(key, "continuous_usage_stats") != 0) {
            return status_set(st, ST_INVALID_ARGUMENT, "stream_options: expected include_usage and nothing else");
        } else if (boolean(name, one, &ignored, st) != ST_OK) {
            return ST_INVALID_ARGUMENT;
        }
    }
    return ST_OK;
}

static enum status_code take_echo(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    enum status_code rc = copy(&t->m->output->base, name, name, v, st);
    t->form->echo = t->m->output->echo;
    return rc;
}

/* A number in completions, a switch in chats. */
static enum status_code take_logprobs(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    if (t->form->kind == OPENAI_COMPLETION) {
        t->form->logprobs = true;
        return copy(&t->m->output->base, name, name, v, st);
    }
    return boolean(name, v, &t->form->logprobs, st);
}

static enum status_code take_top_logprobs(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    t->top_logprobs = true;
    return copy(&t->m->output->base, "logprobs", name, v, st);
}

static enum status_code take_best_of(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    if (!json_is_integer(v) || json_integer_value(v) < 1)
        return wrong(st, name, "an integer of at least 1");
    t->best_of = json_integer_value(v);
    return ST_OK;
}

static enum status_code take_messages(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    (void)name;
    t->messages = true;
    return openai_messages(t->chat, v, st);
}

static enum status_code take_tools(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    if (!json_is_array(v))
        return wrong(st, name, "an array");
    return json_array_size(v) == 0 ? ST_OK : openai_dump(&t->chat->tools_json, v, name, st);
}

static enum status_code take_tool_choice(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    const char *s = json_is_string(v) ? json_string_value(v) : "";
    if (strcmp(s, "none") != 0 && strcmp(s, "auto") != 0)
        return wrong(st, name, "\"none\" or \"auto\": calls are not enforced here");
    t->no_tools = strcmp(s, "none") == 0;
    return ST_OK;
}

static enum status_code take_template_arguments(struct openai_taker *t, const char *name, const json_t *v,
                                                struct status *st)
{
    if (!json_is_object(v))
        return wrong(st, name, "an object");
    return openai_dump(&t->chat->template_arguments_json, v, name, st);
}

static enum status_code take_response_format(struct openai_taker *t, const char *name, const json_t *v,
                                             struct status *st)
{
    (void)t;
    const char *type = json_string_value(json_object_get(v, "type"));
    if (type && strcmp(type, "text") == 0)
        return ST_OK;
    return wrong(st, name, "{\"type\": \"text\"}: other formats are not supported");
}

/* Says nothing about the answer. */
static enum status_code ignore(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    (void)t;
    (void)name;
    (void)v;
    (void)st;
    return ST_OK;
}

static enum status_code only_true(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    (void)t;
    return json_is_true(v) ? ST_OK : wrong(st, name, "true: nothing else is supported");
}

static enum status_code unsupported(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    (void)t;
    if (json_is_false(v) || (json_is_array(v) && json_array_size(v) == 0))
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "%s: not supported here", name);
}

static const struct field {
    const char *name;
    unsigned where;
    take_fn *take;
} fields[] = {
    {"model", BOTH, take_model},
    {"messages", CHAT, take_messages},
    {"prompt", COMPLETION, take_prompt},
    {"stream", BOTH, take_stream},
    {"stream_options", BOTH, take_stream_options},
    {"max_completion_tokens", CHAT, take_max_completion},
    {"max_tokens", BOTH, take_max_tokens},
    {"temperature", BOTH, take_sampling},
    {"top_p", BOTH, take_sampling},
    {"n", BOTH, take_sampling},
    {"stop", BOTH, take_stop},
    {"seed", BOTH, take_sampling},
    {"presence_penalty", BOTH, take_sampling},
    {"frequency_penalty", BOTH, take_sampling},
    {"logit_bias", BOTH, take_bias},
    {"logprobs", BOTH, take_logprobs},
    {"top_logprobs", CHAT, take_top_logprobs},
    {"echo", COMPLETION, take_echo},
    {"best_of", COMPLETION, take_best_of},
    {"suffix", COMPLETION, unsupported},
    {"tools", CHAT, take_tools},
    {"tool_choice", CHAT, take_tool_choice},
    {"response_format", BOTH, take_response_format},
    /* vLLM's */
    {"top_k", BOTH, take_top_k},
    {"min_p", BOTH, take_sampling},
    {"typical_p", BOTH, take_sampling},
    {"repetition_penalty", BOTH, take_sampling},
    {"allowed_token_ids", BOTH, take_allowed_ids},
    {"stop_token_ids", BOTH, take_stop_ids},
    {"ignore_eos", BOTH, take_stopping},
    {"min_tokens", BOTH, take_stopping},
    {"include_stop_str_in_output", BOTH, take_include_stop},
    {"skip_special_tokens", BOTH, only_true},
    {"add_special_tokens", COMPLETION, take_add_special},
    {"add_generation_prompt", CHAT, take_chat_switch},
    {"continue_final_message", CHAT, take_chat_switch},
    {"chat_template_kwargs", CHAT, take_template_arguments},
    {"priority", BOTH, take_priority},
    /* our own */
    {"ttft_target_ms", BOTH, take_target},
    {"tbt_target_ms", BOTH, take_target},
    {"tenant", BOTH, take_tenant},
    /* of OpenAI's own service */
    {"user", BOTH, ignore},
    {"metadata", BOTH, ignore},
    {"store", CHAT, ignore},
    {"service_tier", CHAT, ignore},
    {"safety_identifier", CHAT, ignore},
    {"prompt_cache_key", CHAT, ignore},
    {"prompt_cache_retention", CHAT, ignore},
    {"parallel_tool_calls", CHAT, ignore},
    {"functions", CHAT, unsupported},
    {"function_call", CHAT, unsupported},
    {"audio", CHAT, unsupported},
    {"modalities", CHAT, ignore},
    {"prediction", CHAT, unsupported},
    {"reasoning_effort", CHAT, unsupported},
    {"verbosity", CHAT, unsupported},
    {"web_search_options", CHAT, unsupported},
};

/* ---- the whole ---- */

static enum status_code take_field(struct openai_taker *t, const char *name, const json_t *v, struct status *st)
{
    unsigned here = t->form->kind == OPENAI_CHAT ? CHAT : COMPLETION;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (strcmp(name, fields[i].name) == 0) {
            if (!(fields[i].where & here))
                break;
            return json_is_null(v) ? ST_OK : fields[i].take(t, fields[i].name, v, st);
        }
    size_t n = strlen(name) < 100 ? strlen(name) : 100;
    while (n > 0 && ((unsigned char)name[n] & 0xC0) == 0x80)
        n--; /* not within a character */
    return status_set(st, ST_INVALID_ARGUMENT, "%.*s: unknown field", (int)n, name);
}

/* What one field alone does not say. */
static enum status_code check_together(struct openai_taker *t, struct status *st)
{
    struct openai_form *f = t->form;
    Tandem__V1__GenerateRequest *m = t->m;
    uint32_t n = m->sampling->n_is_case && m->sampling->n >= 1 && m->sampling->n <= 64 ? m->sampling->n : 1;
    /* others are refused later */
    bool chat = f->kind == OPENAI_CHAT;
    f->n = n;
    if (chat ? !t->messages : !m->prompt_case)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: not given", chat ? "messages" : "prompt");
    if (t->stream_options && !f->stream)
        return status_set(st, ST_INVALID_ARGUMENT, "stream_options: given without \"stream\": true");
    if (t->top_logprobs && !f->logprobs)
        return status_set(st, ST_INVALID_ARGUMENT, "top_logprobs: given without \"logprobs\": true");
    if (t->best_of && t->best_of != n)
        return status_set(st, ST_INVALID_ARGUMENT, "best_of: %lld, expected n (%u): answers are not ranked here",
                          t->best_of, n);
    if (chat && f->logprobs && !t->top_logprobs) {
        m->output->logprobs_is_case = TANDEM__V1__OUTPUT__LOGPROBS_IS_LOGPROBS;
        m->output->logprobs = 0;
    }
    if (f->echo && f->logprobs && n > 1)
        return status_set(st, ST_INVALID_ARGUMENT, "n: %u with echo and logprobs, expected 1", n);
    if (f->echo && f->logprobs) {
        m->output->prompt_logprobs_is_case = TANDEM__V1__OUTPUT__PROMPT_LOGPROBS_IS_PROMPT_LOGPROBS;
        m->output->prompt_logprobs = m->output->logprobs;
    }
    if (!chat && !m->stopping->max_tokens_is_case) {
        m->stopping->max_tokens_is_case = TANDEM__V1__STOPPING__MAX_TOKENS_IS_MAX_TOKENS;
        m->stopping->max_tokens = OPENAI_COMPLETION_TOKENS;
    }
    if (t->no_tools)
        openai_dump_free(&m->chat->tools_json);
    return ST_OK;
}

static Tandem__V1__GenerateRequest *empty_request(enum openai_kind kind, struct openai_taker *t)
{
    Tandem__V1__GenerateRequest *m = malloc(sizeof *m);
    if (!m)
        return NULL;
    tandem__v1__generate_request__init(m);
    m->sampling = malloc(sizeof *m->sampling);
    m->stopping = m->sampling ? malloc(sizeof *m->stopping) : NULL;
    m->output = m->stopping ? malloc(sizeof *m->output) : NULL;
    t->chat = m->output && kind == OPENAI_CHAT ? malloc(sizeof *t->chat) : NULL;
    if (m->sampling)
        tandem__v1__sampling__init(m->sampling);
    if (m->stopping)
        tandem__v1__stopping__init(m->stopping);
    if (m->output)
        tandem__v1__output__init(m->output);
    if (t->chat) {
        tandem__v1__chat__init(t->chat);
        m->prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_CHAT;
        m->chat = t->chat;
    }
    if (m->output && (t->chat || kind == OPENAI_COMPLETION))
        return m;
    protobuf_c_message_free_unpacked(&m->base, NULL);
    return NULL;
}

enum status_code openai_parse(enum openai_kind kind, const void *body, size_t len, struct openai_form *form,
                              Tandem__V1__GenerateRequest **out, struct status *st)
{
    struct openai_form f = {.kind = kind};
    struct openai_taker t = {.form = &f};
    json_error_t error;
    enum status_code rc = ST_OK;
    const char *key;
    json_t *v;
    json_t *root = json_loadb(body, len, JSON_ALLOW_NUL, &error);
    if (!root && openai_no_memory(&error))
        return status_nomem(st, "request", len);
    if (!root) {
        char why[80]; /* it may quote bytes of the body */
        snprintf(why, sizeof why, "%.*s", (int)strcspn(error.text, "'"), error.text);
        return status_set(st, ST_INVALID_ARGUMENT, "the body is not valid JSON: %s(byte %d)", why, error.position);
    }
    t.m = empty_request(kind, &t);
    if (!t.m)
        rc = status_nomem(st, "request", sizeof *t.m);
    else if (!json_is_object(root))
        rc = status_set(st, ST_INVALID_ARGUMENT, "the body is no JSON object");
    else
        json_object_foreach(root, key, v)
        {
            rc = take_field(&t, key, v, st);
            if (rc != ST_OK)
                break;
        }
    if (rc == ST_OK)
        rc = check_together(&t, st);
    json_decref(root);
    if (rc != ST_OK) {
        if (t.m)
            protobuf_c_message_free_unpacked(&t.m->base, NULL);
        return rc;
    }
    *form = f;
    *out = t.m;
    return ST_OK;
}
