/* Answers: events of a stream, each as it comes, or one body at the end.
 *
 * Of each answer of a request that is not streamed its text and log probabilities are kept until the end; max_tokens bounds
 * both. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/openai.h"

/* Log probabilities as they stand in a body: of a chat all in `a`, of a completion its four arrays. */
struct score_text {
    struct json_text a, values, top, offsets;
    uint32_t n;
};

struct answer {
    struct json_text text;
    struct score_text scores;
    uint64_t offset;  /* of the next token in the text, in characters */
    bool role_sent;   /* the first event of a chat has gone */
    bool first_given; /* the prompt's first token, which has no log probability */
    const char *finish;
};

struct openai_reply {
    struct openai_form form;
    struct openai_context ctx;
    int64_t anchor; /* an ordinary token: what follows it decodes as in the middle of a text; -1: none */
    size_t anchor_len;
    char id[160];
    uint64_t prompt_tokens, completion_tokens, cached_tokens;
    struct json_text out;
    bool taken;
    struct answer answer[]; /* form.n */
};

enum status_code openai_reply_create(struct openai_reply **out, const struct openai_form *form,
                                     const struct openai_context *context, struct status *st)
{
    size_t bytes = sizeof(struct openai_reply) + form->n * sizeof(struct answer);
    struct openai_reply *r = calloc(1, bytes);
    if (!r)
        return status_nomem(st, "reply", bytes);
    r->form = *form;
    r->ctx = *context;
    r->anchor = form->logprobs ? tok_find(context->tok, "a") : -1;
    if (r->anchor >= 0) {
        uint32_t id = (uint32_t)r->anchor;
        char *text = NULL;
        if (tok_decode(context->tok, &id, 1, 0, &text, &r->anchor_len, NULL) != ST_OK)
            r->anchor = -1;
        free(text);
    }
    *out = r;
    return ST_OK;
}

static void scores_free(struct score_text *s)
{
    json_text_free(&s->a);
    json_text_free(&s->values);
    json_text_free(&s->top);
    json_text_free(&s->offsets);
    s->n = 0;
}

void openai_reply_destroy(struct openai_reply *r)
{
    if (!r)
        return;
    for (uint32_t i = 0; i < r->form.n; i++) {
        json_text_free(&r->answer[i].text);
        scores_free(&r->answer[i].scores);
    }
    json_text_free(&r->out);
    free(r);
}

/* ---- log probabilities ---- */

/* What a token adds in the middle of a text. A model may have more ids than its tokenizer, or there is none: such an id has a name
 * instead, as vLLM's have. */
struct token_text {
    const char *text;
    size_t len;
    bool named;
    char *part; /* what is allocated; free() */
};

static bool token_text(struct token_text *out, const struct openai_reply *r, uint32_t id)
{
    uint32_t ids[2] = {(uint32_t)r->anchor, id};
    bool anchored = r->anchor >= 0;
    size_t len = 0, skip = anchored ? r->anchor_len : 0;
    *out = (struct token_text){.text = ""};
    enum status_code rc = tok_decode(r->ctx.tok, anchored ? ids : ids + 1, anchored ? 2 : 1, 0, &out->part, &len, NULL);
    if (rc == ST_OUT_OF_RANGE) {
        int n = asprintf(&out->part, "token_id:%u", id);
        if (n < 0) {
            out->part = NULL;
            return false;
        }
        out->text = out->part;
        out->len = (size_t)n;
        out->named = true;
        return true;
    }
    if (rc != ST_OK)
        return false;
    skip = len < skip ? len : skip;
    out->text = out->part + skip;
    out->len = len - skip;
    return true;
}

/* "token": "..", "logprob": x, "bytes": [..]: no bytes where the token is part of a character, or has no text. */
static void chat_token(struct json_text *t, double logprob, const struct token_text *token)
{
    json_text_put(t, "\"token\":");
    json_text_string(t, token->text, token->len);
    json_text_put(t, ",\"logprob\":");
    json_text_number(t, logprob);
    json_text_put(t, ",\"bytes\":");
    if (token->named || memmem(token->text, token->len, "\xEF\xBF\xBD", 3)) {
        json_text_put(t, "null");
        return;
    }
    json_text_put(t, "[");
    for (size_t i = 0; i < token->len; i++)
        json_text_format(t, "%s%u", i ? "," : "", (unsigned char)token->text[i]);
    json_text_put(t, "]");
}

static uint64_t characters(const char *text, size_t len)
{
    uint64_t n = 0;
    for (size_t i = 0; i < len; i++)
        n += ((unsigned char)text[i] & 0xC0) != 0x80;
    return n;
}

/* One of the likeliest tokens: an entry of a list in a chat, a member of an object in a completion. */
static bool top_token(struct openai_reply *r, struct json_text *to, uint32_t id, double logprob, bool first)
{
    struct token_text token;
    if (!token_text(&token, r, id))
        return false;
    if (!first)
        json_text_put(to, ",");
    if (r->form.kind == OPENAI_CHAT) {
        json_text_put(to, "{");
        chat_token(to, logprob, &token);
        json_text_put(to, "}");
    } else {
        json_text_string(to, token.text, token.len);
        json_text_put(to, ":");
        json_text_number(to, logprob);
    }
    free(token.part);
    return true;
}

static bool top_tokens(struct openai_reply *r, struct json_text *to, const Tandem__V1__TokenLogprob *m)
{
    bool listed = r->form.kind == OPENAI_CHAT; /* in a completion the token itself stands among them in any case */
    bool ok = true;
    for (size_t i = 0; i < m->n_top_token_ids && ok; i++) {
        listed = listed || m->top_token_ids[i] == m->token_id;
        ok = top_token(r, to, m->top_token_ids[i], (double)m->top_logprobs[i], i == 0);
    }
    if (ok && !listed)
        ok = top_token(r, to, m->token_id, (double)m->logprob, m->n_top_token_ids == 0);
    return ok;
}

/* m NULL: the prompt's first token, id. */
static bool add_score(struct openai_reply *r, struct answer *a, uint32_t id, const Tandem__V1__TokenLogprob *m)
{
    struct score_text *s = &a->scores;
    const char *comma = s->n++ ? "," : "";
    struct token_text token;
    bool ok;
    if (!token_text(&token, r, id))
        return false;
    if (r->form.kind == OPENAI_CHAT) {
        json_text_format(&s->a, "%s{", comma);
        chat_token(&s->a, m ? (double)m->logprob : 0, &token);
        json_text_put(&s->a, ",\"top_logprobs\":[");
        ok = !m || top_tokens(r, &s->a, m);
        json_text_put(&s->a, "]}");
    } else {
        json_text_put(&s->a, comma);
        json_text_string(&s->a, token.text, token.len);
        json_text_put(&s->values, comma);
        json_text_put(&s->top, comma);
        json_text_format(&s->offsets, "%s%llu", comma, (unsigned long long)a->offset);
        if (m) {
            json_text_number(&s->values, (double)m->logprob);
            json_text_put(&s->top, "{");
        } else {
            json_text_put(&s->values, "null");
            json_text_put(&s->top, "null");
        }
        ok = !m || top_tokens(r, &s->top, m);
        if (m)
            json_text_put(&s->top, "}");
    }
    if (!token.named && !tok_is_special(r->ctx.tok, id)) /* these have no text in an answer */
        a->offset += characters(token.text, token.len);
    free(token.part);
    return ok && !s->a.failed && !s->values.failed && !s->top.failed && !s->offsets.failed;
}

static bool add_scores(struct openai_reply *r, struct answer *a, const Tandem__V1__GenerateResponse *m)
{
    bool ok = true;
    if (!r->form.logprobs)
        return true;
    if (m->n_prompt_token_ids && !a->first_given) {
        a->first_given = true;
        ok = add_score(r, a, m->prompt_token_ids[0], NULL);
    }
    for (size_t i = 0; i < m->n_prompt_logprobs && ok; i++)
        ok = add_score(r, a, m->prompt_logprobs[i]->token_id, m->prompt_logprobs[i]);
    for (size_t i = 0; i < m->n_logprobs && ok; i++)
        ok = add_score(r, a, m->logprobs[i]->token_id, m->logprobs[i]);
    return ok;
}

static void put_scores(struct openai_reply *r, struct score_text *s)
{
    struct json_text *t = &r->out;
    if (!r->form.logprobs) {
        json_text_put(t, "null");
        return;
    }
    if (r->form.kind == OPENAI_CHAT) {
        json_text_put(t, "{\"content\":[");
        json_text_add(t, s->a.p, s->a.n);
        json_text_put(t, "],\"refusal\":null}");
        return;
    }
    json_text_put(t, "{\"tokens\":[");
    json_text_add(t, s->a.p, s->a.n);
    json_text_put(t, "],\"token_logprobs\":[");
    json_text_add(t, s->values.p, s->values.n);
    json_text_put(t, "],\"top_logprobs\":[");
    json_text_add(t, s->top.p, s->top.n);
    json_text_put(t, "],\"text_offset\":[");
    json_text_add(t, s->offsets.p, s->offsets.n);
    json_text_put(t, "]}");
}

/* ---- bodies and events ---- */

/* What all of them begin with, up to the list of choices. */
static void put_head(struct openai_reply *r, const char *object)
{
    json_text_format(&r->out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", r->id, object,
                     (long long)r->ctx.created_s);
    json_text_string(&r->out, r->ctx.model, strlen(r->ctx.model));
    json_text_put(&r->out, ",\"choices\":[");
}

static void put_usage(struct openai_reply *r)
{
    uint64_t total = r->prompt_tokens + r->completion_tokens;
    json_text_format(&r->out,
                     "\"usage\":{\"prompt_tokens\":%llu,\"completion_tokens\":%llu,\"total_tokens\":%llu,"
                     "\"prompt_tokens_details\":{\"cached_tokens\":%llu}}",
                     (unsigned long long)r->prompt_tokens, (unsigned long long)r->completion_tokens,
                     (unsigned long long)total, (unsigned long long)r->cached_tokens);
}

static void put_finish(struct json_text *t, const char *finish)
{
    json_text_put(t, ",\"finish_reason\":");
    json_text_put(t, finish ? finish : "null");
    json_text_put(t, "}");
}

static const char *object_of(const struct openai_reply *r)
{
    if (r->form.kind == OPENAI_COMPLETION)
        return "text_completion";
    return r->form.stream ? "chat.completion.chunk" : "chat.completion";
}

enum delta { DELTA_ROLE, DELTA_TEXT, DELTA_END };

static void put_event(struct openai_reply *r, struct answer *a, enum delta what, const void *text, size_t len,
                      const char *finish)
{
    struct json_text *t = &r->out;
    json_text_put(t, "data: ");
    put_head(r, object_of(r));
    json_text_format(t, "{\"index\":%u,", (unsigned)(a - r->answer));
    if (r->form.kind == OPENAI_COMPLETION) {
        json_text_put(t, "\"text\":");
        json_text_string(t, text, len);
    } else if (what == DELTA_ROLE) {
        json_text_put(t, "\"delta\":{\"role\":\"assistant\",\"content\":\"\"}");
    } else if (what == DELTA_END) {
        json_text_put(t, "\"delta\":{}");
    } else {
        json_text_put(t, "\"delta\":{\"content\":");
        json_text_string(t, text, len);
        json_text_put(t, "}");
    }
    json_text_put(t, ",\"logprobs\":");
    if (a->scores.n)
        put_scores(r, &a->scores);
    else
        json_text_put(t, "null");
    put_finish(t, finish);
    json_text_put(t, r->form.include_usage ? "],\"usage\":null}\n\n" : "]}\n\n");
    scores_free(&a->scores);
}

/* says: there is something new, with or without a text. */
static void add_events(struct openai_reply *r, struct answer *a, const void *text, size_t len, bool says)
{
    if (r->form.kind == OPENAI_COMPLETION) {
        if (says || a->scores.n || a->finish)
            put_event(r, a, DELTA_TEXT, text, len, a->finish);
        return;
    }
    if (!a->role_sent)
        put_event(r, a, DELTA_ROLE, NULL, 0, NULL);
    a->role_sent = true;
    if (says || a->scores.n)
        put_event(r, a, DELTA_TEXT, text, len, NULL);
    if (a->finish)
        put_event(r, a, DELTA_END, NULL, 0, a->finish);
}

static void renew(struct openai_reply *r)
{
    if (r->taken)
        r->out.n = 0;
    r->taken = false;
}

static enum status_code result(const struct openai_reply *r, struct status *st)
{
    return r->out.failed ? status_nomem(st, "reply", r->out.n) : ST_OK;
}

enum status_code openai_reply_add(struct openai_reply *r, const Tandem__V1__GenerateResponse *m, struct status *st)
{
    if (m->index >= r->form.n)
        return status_set(st, ST_INTERNAL, "answer %u, expected less than %u", m->index, r->form.n);
    struct answer *a = &r->answer[m->index];
    renew(r);
    if (m->request_id.len)
        snprintf(r->id, sizeof r->id, "%s-%.*s", r->form.kind == OPENAI_CHAT ? "chatcmpl" : "cmpl",
                 (int)m->request_id.len, (const char *)m->request_id.data);
    if (!add_scores(r, a, m))
        return status_nomem(st, "log probabilities of a reply", 0);
    if (m->finish) {
        a->finish = m->finish->reason == TANDEM__V1__FINISH__REASON__STOP ? "\"stop\"" : "\"length\"";
        if (m->finish->usage) {
            r->prompt_tokens = m->finish->usage->prompt_tokens;
            r->completion_tokens += m->finish->usage->completion_tokens;
            if (m->finish->usage->cached_prompt_tokens > r->cached_tokens)
                r->cached_tokens = m->finish->usage->cached_prompt_tokens;
        }
    }
    if (r->form.stream) {
        /* Where no token has a text, an event says that there are some. */
        add_events(r, a, m->text.data, m->text.len, m->text.len || (m->n_token_ids && !tok_has_text(r->ctx.tok)));
        return result(r, st);
    }
    json_text_add(&a->text, m->text.data, m->text.len);
    return a->text.failed ? status_nomem(st, "reply", a->text.n) : ST_OK;
}

static void put_choice(struct openai_reply *r, struct answer *a)
{
    struct json_text *t = &r->out;
    json_text_format(t, "{\"index\":%u,", (unsigned)(a - r->answer));
    json_text_put(t, r->form.kind == OPENAI_CHAT ? "\"message\":{\"role\":\"assistant\",\"content\":" : "\"text\":");
    json_text_string(t, a->text.p, a->text.n);
    if (r->form.kind == OPENAI_CHAT)
        json_text_put(t, ",\"refusal\":null}");
    json_text_put(t, ",\"logprobs\":");
    put_scores(r, &a->scores);
    put_finish(t, a->finish);
}

enum status_code openai_reply_end(struct openai_reply *r, struct status *st)
{
    struct json_text *t = &r->out;
    renew(r);
    if (!r->form.stream) {
        put_head(r, object_of(r));
        for (uint32_t i = 0; i < r->form.n; i++) {
            if (i)
                json_text_put(t, ",");
            put_choice(r, &r->answer[i]);
        }
        json_text_put(t, "],");
        put_usage(r);
        json_text_put(t, "}");
        return result(r, st);
    }
    if (r->form.include_usage) {
        json_text_put(t, "data: ");
        put_head(r, object_of(r));
        json_text_put(t, "],");
        put_usage(r);
        json_text_put(t, "}\n\n");
    }
    json_text_put(t, "data: [DONE]\n\n");
    return result(r, st);
}

enum status_code openai_reply_fail(struct openai_reply *r, const struct status *why, struct status *st)
{
    renew(r);
    json_text_put(&r->out, "data: ");
    openai_error(&r->out, openai_http_code(why->code), &r->form, why);
    json_text_put(&r->out, "\n\n");
    return result(r, st);
}

void openai_reply_take(struct openai_reply *r, const char **text, size_t *len)
{
    *text = r->out.p;
    *len = r->taken ? 0 : r->out.n;
    r->taken = true;
}
