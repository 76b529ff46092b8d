/* Intake: the threads between a client's bytes and the engine. Unpack, validate, tokenize, then REQUEST_SUBMIT. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

/* Prompts in intake at most, in messages of the largest size. */
#define INTAKE_MESSAGES 8

static void copy_facts(struct coord *c, struct model_facts *out)
{
    pthread_mutex_lock(&c->pub_mu);
    *out = c->model;
    pthread_mutex_unlock(&c->pub_mu);
}

/* ---- one field after the other; messages name it as the .proto does ---- */

static enum status_code take_name(struct coord *c, struct request *r, const ProtobufCBinaryData *id, struct status *st)
{
    if (id->len == 0) {
        uint64_t n = c->intake.name_seed + atomic_fetch_add(&c->intake.counter, 1);
        snprintf(r->name, sizeof r->name, "req-%016llx", (unsigned long long)n);
        return ST_OK;
    }
    if (id->len > COORD_MAX_NAME)
        return status_set(st, ST_INVALID_ARGUMENT, "request_id: %zu bytes, expected at most %d", id->len,
                          COORD_MAX_NAME);
    for (size_t i = 0; i < id->len; i++) {
        unsigned char ch = id->data[i];
        bool ok = (ch >= '0' && ch <= '9') || (ch >= 'A' && ch <= 'Z') || (ch >= 'a' && ch <= 'z') || ch == '.' ||
                  ch == '_' || ch == ':' || ch == '-';
        if (!ok)
            return status_set(st, ST_INVALID_ARGUMENT, "request_id: byte 0x%02x at %zu, expected [A-Za-z0-9._:-]", ch,
                              i);
    }
    memcpy(r->name, id->data, id->len);
    r->name[id->len] = '\0';
    return ST_OK;
}

static enum status_code check_model(const struct coord *c, const ProtobufCBinaryData *model, struct status *st)
{
    const char *name = c->opt.served_name;
    if (model->len == 0 || (model->len == strlen(name) && memcmp(model->data, name, model->len) == 0))
        return ST_OK;
    char got[65];
    text_sanitize(got, sizeof got, model->data, model->len);
    return status_set(st, ST_NOT_FOUND, "model: \"%s\" is not served here, expected \"%s\" or nothing", got, name);
}

/* r->prompt from the text; *n may be more than the context holds. */
static enum status_code take_text(struct coord *c, struct request *r, const Tandem__V1__GenerateRequest *m,
                                  const struct model_facts *facts, size_t *n, struct status *st)
{
    size_t token_bytes = tok_max_token_bytes(c->tok);
    if (m->text.len == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "text: empty, expected a prompt");
    /* Encoding megabytes takes seconds: not for a text that cannot fit whatever comes out. */
    if (token_bytes && (m->text.len - 1) / token_bytes >= facts->max_context - 1)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "text: a prompt of %zu bytes, but a token takes at most %zu and the context holds %u tokens, "
                          "a new one among them",
                          m->text.len, token_bytes, facts->max_context);
    unsigned flags = m->add_special_tokens_is_case && !m->add_special_tokens ? 0 : TOK_ADD_SPECIAL;
    if (tok_encode(c->tok, (const char *)m->text.data, m->text.len, flags, &r->prompt, n, st) != ST_OK)
        return status_prefix(st, "text");
    if (*n == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "text: makes no token, expected a prompt");
    return ST_OK;
}

/* The ids are taken over from the message, not copied. */
static enum status_code take_ids(struct request *r, Tandem__V1__TokenIds *ids, size_t *n, struct status *st)
{
    if (!ids || ids->n_ids == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "token_ids: empty, expected a prompt");
    *n = ids->n_ids;
    r->prompt = ids->ids;
    ids->ids = NULL;
    ids->n_ids = 0;
    return ST_OK;
}

static enum status_code check_prompt_ids(struct request *r, const char *field, size_t n,
                                         const struct model_facts *facts, struct status *st)
{
    if (n >= facts->max_context)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "%s: %zu tokens, expected at most %u: the context of %u has to hold a new token too", field,
                          n, facts->max_context - 1, facts->max_context);
    for (size_t i = 0; i < n; i++)
        if (r->prompt[i] >= facts->vocab_size)
            return status_set(st, ST_INVALID_ARGUMENT, "%s: token %zu is %u, expected below %u, the vocabulary", field,
                              i, r->prompt[i], facts->vocab_size);
    r->n_prompt = (uint32_t)n;
    return ST_OK;
}

static enum status_code take_prompt(struct coord *c, struct request *r, Tandem__V1__GenerateRequest *m,
                                    const struct model_facts *facts, struct status *st)
{
    size_t n = 0;
    enum status_code rc;
    const char *field = "text";
    switch (m->prompt_case) {
    case TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT:
        rc = take_text(c, r, m, facts, &n, st);
        break;
    case TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS:
        rc = take_ids(r, m->token_ids, &n, st);
        field = "token_ids";
        break;
    case TANDEM__V1__GENERATE_REQUEST__PROMPT_CHAT:
        rc = chat_take(c, r, m->chat, facts->max_context, &n, st);
        field = "chat";
        break;
    default:
        return status_set(st, ST_INVALID_ARGUMENT, "prompt: not given, expected text, token_ids or chat");
    }
    return rc == ST_OK ? check_prompt_ids(r, field, n, facts, st) : rc;
}

static enum status_code take_max_tokens(struct coord *c, struct request *r, const Tandem__V1__Stopping *s,
                                        const struct model_facts *facts, struct status *st)
{
    uint32_t left = facts->max_context - r->n_prompt; /* at least 1 */
    r->params.output_at = r->n_prompt;
    if (!s || !s->max_tokens_is_case) {
        r->max_new = min_u32(c->opt.default_max_tokens, left);
        return ST_OK;
    }
    if (s->max_tokens > left)
        return status_set(
            st, ST_INVALID_ARGUMENT,
            "stopping.max_tokens: %u, expected at most %u: the prompt takes %u of the context's %u tokens",
            s->max_tokens, left, r->n_prompt, facts->max_context);
    r->nothing_new = s->max_tokens == 0;
    r->max_new = r->nothing_new ? 1 : s->max_tokens;
    return ST_OK;
}

static enum status_code check_min_tokens(const struct request *r, const Tandem__V1__Stopping *s, struct status *st)
{
    uint32_t most = r->nothing_new ? 0 : r->max_new;
    if (s && s->min_tokens_is_case && s->min_tokens > most)
        return status_set(st, ST_INVALID_ARGUMENT, "stopping.min_tokens: %u, expected at most %u, %s", s->min_tokens,
                          most, s->max_tokens_is_case ? "as stopping.max_tokens" : "the max_tokens of this server");
    return ST_OK;
}

/* What is about text, where ids have none. */
static enum status_code check_text(const struct coord *c, const Tandem__V1__GenerateRequest *m, struct status *st)
{
    const struct {
        const char *name;
        bool given;
    } field[] = {
        {"text", m->prompt_case == TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT},
        {"chat", m->prompt_case == TANDEM__V1__GENERATE_REQUEST__PROMPT_CHAT},
        {"stopping.stop", m->stopping && m->stopping->n_stop},
        {"output.echo", m->output && m->output->echo},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field && !tok_has_text(c->tok); i++)
        if (field[i].given)
            return status_set(st, ST_FAILED_PRECONDITION,
                              "%s: this server has no tokenizer (--skip-tokenizer-init), prompts are token ids and "
                              "answers have no text",
                              field[i].name);
    return ST_OK;
}

/* What the answers begin with: the prompt as it was given, or the text of its ids. */
static enum status_code take_echo(struct coord *c, struct request *r, const Tandem__V1__GenerateRequest *m,
                                  struct status *st)
{
    char *decoded = NULL;
    const void *text = m->text.data;
    size_t len = m->text.len;
    enum status_code rc = ST_OK;
    if (!r->echo)
        return ST_OK;
    if (m->prompt_case != TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT) {
        if ((rc = tok_decode(c->tok, r->prompt, r->n_prompt, TOK_SKIP_SPECIAL, &decoded, &len, st)) != ST_OK)
            return status_prefix(st, "output.echo");
        text = decoded;
    }
    for (uint32_t i = 0; i < r->n_choices && rc == ST_OK; i++)
        rc = choice_append(&r->choice[i], text, len, st);
    free(decoded);
    return rc;
}

/* All answers of a request wait for a slot at first. */
static enum status_code check_answers(const struct coord *c, const struct request *r, struct status *st)
{
    if (r->n_choices <= c->opt.max_queued)
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT,
                      "sampling.n: %u, expected at most %u: no more may wait here (--max-queued)", r->n_choices,
                      c->opt.max_queued);
}

/* Over the bound is an error, not cut: the client counts on it. */
static enum status_code take_keep(struct coord *c, struct request *r, uint32_t keep_ms, struct status *st)
{
    if (keep_ms > c->opt.max_keep_ms)
        return status_set(st, ST_INVALID_ARGUMENT, "keep_ms: %u, expected at most %u (--max-keep-ms)", keep_ms,
                          c->opt.max_keep_ms);
    r->keep_ms = keep_ms;
    r->kept = keep_ms > 0 && r->ops->attachable;
    return ST_OK;
}

static enum status_code validate(struct coord *c, struct request *r, Tandem__V1__GenerateRequest *m, struct status *st)
{
    struct model_facts facts;
    copy_facts(c, &facts);
    enum status_code rc;
    if ((rc = take_name(c, r, &m->request_id, st)) != ST_OK || (rc = check_model(c, &m->model, st)) != ST_OK ||
        (rc = take_options(r, m, &facts, st)) != ST_OK || (rc = check_text(c, m, st)) != ST_OK ||
        (rc = check_answers(c, r, st)) != ST_OK || (rc = take_prefix_cache(c, r, m->prefix_cache, st)) != ST_OK ||
        (rc = take_scheduling(c, r, m->scheduling, st)) != ST_OK || (rc = take_keep(c, r, m->keep_ms, st)) != ST_OK)
        return rc;
    /* last, because it can take long */
    if ((rc = take_prompt(c, r, m, &facts, st)) != ST_OK ||
        (rc = take_max_tokens(c, r, m->stopping, &facts, st)) != ST_OK ||
        (rc = check_min_tokens(r, m->stopping, st)) != ST_OK || (rc = choices_create(r, c->tok, st)) != ST_OK)
        return rc;
    rc = take_echo(c, r, m, st);
    return rc == ST_OK ? coord_journal_image(r, m, st) : rc;
}

enum status_code intake_restore(struct coord *c, struct request *r, struct status *st)
{
    struct model_facts facts = c->model; /* only this thread writes it */
    uint32_t n_choices = r->n_choices;
    Tandem__V1__GenerateRequest *m =
        (Tandem__V1__GenerateRequest *)rpc_unpack(&tandem__v1__generate_request__descriptor, r->image, r->image_len);
    if (!m)
        return status_set(st, ST_DATA_LOSS, "the journal's request is not a valid GenerateRequest");
    enum status_code rc = ST_OK;
    if ((rc = take_options(r, m, &facts, st)) == ST_OK && (rc = check_text(c, m, st)) == ST_OK &&
        (rc = take_prefix_cache(c, r, m->prefix_cache, st)) == ST_OK &&
        (rc = take_scheduling(c, r, m->scheduling, st)) == ST_OK &&
        (rc = check_prompt_ids(r, "journal", r->n_prompt, &facts, st)) == ST_OK &&
        (rc = take_max_tokens(c, r, m->stopping, &facts, st)) == ST_OK && r->n_choices != n_choices)
        rc = status_set(st, ST_DATA_LOSS, "the journal's request has %u answers, expected %u", n_choices, r->n_choices);
    if (rc == ST_OK && (rc = choices_create(r, c->tok, st)) == ST_OK)
        rc = take_echo(c, r, m, st);
    protobuf_c_message_free_unpacked(&m->base, NULL);
    return rc;
}

/* It does not wait here any more. Before anybody is told: who hears of it may send the next at once. */
static void leave(struct intake *in, size_t bytes)
{
    pthread_mutex_lock(&in->mu);
    in->n--;
    in->bytes -= bytes;
    pthread_mutex_unlock(&in->mu);
}

static void work(struct coord *c, struct request *r)
{
    size_t bytes = r->raw_len;
    struct status st = STATUS_INIT;
    enum status_code rc = ST_OK;
    if (atomic_load_explicit(&r->cancelled, memory_order_relaxed)) {
        leave(&c->intake, bytes);
        return;
    }
    if (r->deadline_us <= coord_now_us()) {
        rc = status_set(&st, ST_DEADLINE_EXCEEDED, "the deadline passed before the prompt was read");
    } else {
        Tandem__V1__GenerateRequest *m = NULL;
        rc = r->ops->decode(r->sink, r->raw, r->raw_len, &m, &st);
        free(r->raw);
        r->raw = NULL;
        if (rc == ST_OK)
            rc = validate(c, r, m, &st);
        if (m)
            protobuf_c_message_free_unpacked(&m->base, NULL);
    }
    leave(&c->intake, bytes);
    if (rc != ST_OK) {
        log_request(&c->log, LOG_DEBUG, r->name, "refused: %s", st.message);
        metrics_error(&c->metrics, rc);
        r->ops->finish(r->sink, &st, rc == ST_RESOURCE_EXHAUSTED ? COORD_RETRY_AFTER_MS : 0);
        return;
    }
    mailbox_post(&c->box, &r->mail, REQUEST_SUBMIT, &r->refs);
}

/* ---- the two threads ---- */

struct intake_arg {
    struct coord *c;
    int lane;
};

static struct request *intake_pop(struct intake *in, int lane)
{
    for (;;) {
        for (int l = lane; l >= 0; l--) { /* the second thread helps the first, not the other way round */
            struct request *r = in->head[l];
            if (!r)
                continue;
            in->head[l] = r->intake_next;
            if (!in->head[l])
                in->tail[l] = &in->head[l];
            return r;
        }
        if (in->stop)
            return NULL;
        pthread_cond_wait(&in->cond[lane], &in->mu);
    }
}

static void *intake_main(void *p)
{
    struct intake_arg arg = *(struct intake_arg *)p;
    struct intake *in = &arg.c->intake;
    free(p);
    pthread_mutex_lock(&in->mu);
    for (struct request *r; (r = intake_pop(in, arg.lane));) {
        bool stopping = in->stop;
        pthread_mutex_unlock(&in->mu);
        if (stopping) {
            struct status st = STATUS_INIT;
            leave(in, r->raw_len);
            status_set(&st, ST_UNAVAILABLE, "the server is stopping");
            metrics_error(&arg.c->metrics, st.code);
            r->ops->finish(r->sink, &st, 0);
        } else {
            work(arg.c, r);
        }
        request_unref(r);
        pthread_mutex_lock(&in->mu);
    }
    pthread_mutex_unlock(&in->mu);
    return NULL;
}

enum status_code intake_push(struct coord *c, struct request *r, struct status *st)
{
    struct intake *in = &c->intake;
    int lane = r->raw_len > COORD_BIG_MESSAGE;
    enum status_code rc = ST_OK;
    pthread_mutex_lock(&in->mu);
    if (in->stop)
        rc = status_set(st, ST_UNAVAILABLE, "the server is stopping");
    else if (in->n >= c->opt.max_queued)
        rc = status_set(st, ST_RESOURCE_EXHAUSTED, "%u prompts wait to be tokenized: the limit (--max-queued)", in->n);
    else if (in->bytes > 0 && in->bytes + r->raw_len > (uint64_t)INTAKE_MESSAGES * c->opt.max_message_bytes)
        rc = status_set(st, ST_RESOURCE_EXHAUSTED, "%llu bytes of prompts wait to be tokenized: the limit",
                        (unsigned long long)in->bytes);
    if (rc == ST_OK) {
        request_ref(r);
        r->intake_next = NULL;
        *in->tail[lane] = r;
        in->tail[lane] = &r->intake_next;
        in->n++;
        in->bytes += r->raw_len;
        pthread_cond_signal(&in->cond[lane]);
        if (lane == 0 && in->head[0] != r) /* the first thread is behind */
            pthread_cond_signal(&in->cond[1]);
    }
    pthread_mutex_unlock(&in->mu);
    return rc;
}

enum status_code intake_start(struct coord *c, struct status *st)
{
    struct intake *in = &c->intake;
    pthread_mutex_init(&in->mu, NULL);
    atomic_init(&in->counter, 0);
    enum status_code rc = draw_seed(&in->name_seed, st);
    for (int i = 0; i < 4 && rc == ST_OK; i++)
        rc = draw_seed(&in->salt_key[i], st);
    if (rc != ST_OK)
        return rc;
    for (int i = 0; i < 2; i++) {
        in->tail[i] = &in->head[i];
        pthread_cond_init(&in->cond[i], NULL);
    }
    for (int i = 0; i < 2; i++) {
        struct intake_arg *arg = malloc(sizeof *arg);
        if (!arg)
            return status_nomem(st, "intake thread", sizeof *arg);
        *arg = (struct intake_arg){c, i};
        int err = pthread_create(&in->thread[i], NULL, intake_main, arg);
        if (err) {
            free(arg);
            return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "starting a tokenizer thread");
        }
        in->n_threads++;
    }
    return ST_OK;
}

void intake_stop(struct coord *c)
{
    struct intake *in = &c->intake;
    pthread_mutex_lock(&in->mu);
    in->stop = true;
    pthread_cond_broadcast(&in->cond[0]);
    pthread_cond_broadcast(&in->cond[1]);
    pthread_mutex_unlock(&in->mu);
    for (unsigned i = 0; i < in->n_threads; i++)
        pthread_join(in->thread[i], NULL);
    in->n_threads = 0;
}
