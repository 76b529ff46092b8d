/* tandem_generation.c - a generation of tandem_client.h: Inference.Generate, and Attach when its connection is lost.
 *
 *     Generate ──a message with attach_ms──▶ counted ──UNAVAILABLE──▶ lost ──pause──▶ Attach ──a new message──▶ counted
 *                                                                      ^                '──UNAVAILABLE──┐
 *                                                                      '────────────────────────────────'
 *                            over after attach_ms without a new message, or when Attach is refused: the error of the loss
 *
 * What came is counted for each answer, and Attach is asked for what is behind that. An answer without a token comes again from
 * its beginning (echo, log probabilities of the prompt): what was handed out of it is cut off, so that nothing comes twice. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/tandem_client_internal.h"

#define SEND_TIMEOUT_MS 30000
#define ATTACH_SEND_MS  5000 /* a connection that hangs: the next try may find a better one */
#define PAUSE_MIN_MS    100
#define PAUSE_MAX_MS    2000
#define MAX_ANSWERS     64 /* Sampling.n */

/* What was handed out of an answer. */
struct answer {
    uint32_t tokens;
    uint64_t text_bytes;
    size_t prompt_ids, prompt_scores;
    bool finished;
    /* Of what comes again: to be cut off. */
    uint64_t skip_text;
    size_t skip_ids, skip_scores;
};

struct tandem_generation {
    struct tandem_client *client;
    int64_t end_ms;                        /* deadline; 0: none */
    Tandem__V1__GenerateResponse *message; /* the one handed out last */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct rpc_stream *stream; /* NULL: lost, Attach comes next. Changed by the reader */
    bool cancelled;

    /* The reader's. */
    uint32_t attach_ms;    /* 0: Attach does not help */
    char *name;            /* request_id */
    struct answer *answer; /* [MAX_ANSWERS]; NULL: attach_ms is 0 */
    bool attaching;        /* lost, and nothing new has come since */
    bool heard;            /* something came on this stream */
    struct status lost;    /* the newest loss; ST_OK: there was none */
    int64_t give_up_ms, next_try_ms;
    uint32_t pause_ms;
};

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* ---- its life ---- */

static void init_lock(struct tandem_generation *g)
{
    pthread_condattr_t attr;
    pthread_mutex_init(&g->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&g->changed, &attr);
    pthread_condattr_destroy(&attr);
}

static void free_generation(struct tandem_generation *g)
{
    tandem_free(g->message);
    free(g->name);
    free(g->answer);
    pthread_cond_destroy(&g->changed);
    pthread_mutex_destroy(&g->lock);
    free(g);
}

enum status_code tandem_generation_open(struct tandem_generation **out, struct tandem_client *c, uint64_t deadline_ms,
                                        struct status *st)
{
    struct tandem_generation *g = calloc(1, sizeof *g);
    if (!g)
        return status_nomem(st, "generation", sizeof *g);
    g->client = c;
    g->end_ms = deadline_ms && deadline_ms < INT64_MAX / 2 ? now_ms() + (int64_t)deadline_ms : 0;
    init_lock(g);
    enum status_code rc = rpc_stream_open(&g->stream, c->channel, "/tandem.v1.Inference/Generate", deadline_ms, st);
    if (rc != ST_OK) {
        free_generation(g);
        return rc;
    }
    *out = g;
    return ST_OK;
}

static void send_request(struct rpc_stream *s, const ProtobufCMessage *request, uint32_t timeout_ms)
{
    /* A server that refuses at once ends the call before all was sent: an error here is not the reason, recv tells it. */
    if (rpc_stream_send(s, request, timeout_ms, NULL) == ST_OK && rpc_stream_half_close(s, timeout_ms, NULL) != ST_OK)
        rpc_stream_cancel(s);
}

void tandem_generation_send(struct tandem_generation *g, const Tandem__V1__GenerateRequest *request)
{
    send_request(g->stream, &request->base, SEND_TIMEOUT_MS);
}

void tandem_generation_cancel(struct tandem_generation *g)
{
    pthread_mutex_lock(&g->lock);
    g->cancelled = true;
    if (g->stream)
        rpc_stream_cancel(g->stream);
    pthread_cond_signal(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

uint32_t tandem_generation_retry_after_ms(const struct tandem_generation *g)
{
    const char *text = g->stream ? rpc_stream_trailer(g->stream, "retry-after-ms") : NULL;
    unsigned long v = text ? strtoul(text, NULL, 10) : 0;
    return v < UINT32_MAX ? (uint32_t)v : UINT32_MAX;
}

void tandem_generation_close(struct tandem_generation *g)
{
    if (!g)
        return;
    rpc_stream_close(g->stream);
    free_generation(g);
}

/* ---- what came ---- */

/* The first message of a call: whether Attach may follow. Without memory for it there is none. */
static void take_name(struct tandem_generation *g, const Tandem__V1__GenerateResponse *m)
{
    if (!m->request_id.len)
        return;
    g->attach_ms = g->client->no_attach ? 0 : m->attach_ms;
    if (!g->attach_ms || g->answer)
        return;
    g->answer = calloc(MAX_ANSWERS, sizeof *g->answer);
    g->name = calloc(1, m->request_id.len + 1);
    if (g->answer && g->name)
        memcpy(g->name, m->request_id.data, m->request_id.len);
    else
        g->attach_ms = 0;
}

static void count(struct answer *a, const Tandem__V1__GenerateResponse *m)
{
    a->tokens += (uint32_t)m->n_token_ids;
    a->text_bytes += m->text.len;
    a->prompt_ids += m->n_prompt_token_ids;
    a->prompt_scores += m->n_prompt_logprobs;
    a->finished |= m->finish != NULL;
}

static void cut_text(ProtobufCBinaryData *text, uint64_t *skip)
{
    size_t n = *skip < text->len ? (size_t)*skip : text->len;
    *skip -= n;
    text->len -= n;
    if (n)
        memmove(text->data, text->data + n, text->len);
}

static void cut_prompt(Tandem__V1__GenerateResponse *m, struct answer *a)
{
    size_t n = a->skip_ids < m->n_prompt_token_ids ? a->skip_ids : m->n_prompt_token_ids;
    a->skip_ids -= n;
    m->n_prompt_token_ids -= n;
    if (n)
        memmove(m->prompt_token_ids, m->prompt_token_ids + n, m->n_prompt_token_ids * sizeof *m->prompt_token_ids);
    n = a->skip_scores < m->n_prompt_logprobs ? a->skip_scores : m->n_prompt_logprobs;
    a->skip_scores -= n;
    m->n_prompt_logprobs -= n;
    for (size_t i = 0; i < n; i++)
        tandem_free(m->prompt_logprobs[i]);
    if (n)
        memmove(m->prompt_logprobs, m->prompt_logprobs + n, m->n_prompt_logprobs * sizeof(void *));
}

/* A message after Attach, to what the one that was lost would have been. False: nothing is left of it. */
static bool cut(struct answer *a, Tandem__V1__GenerateResponse *m)
{
    m->request_id.len = 0;
    m->attach_ms = 0;
    if (a->finished)
        return false;
    cut_text(&m->text, &a->skip_text);
    cut_prompt(m, a);
    return m->text.len || m->n_token_ids || m->n_prompt_token_ids || m->n_prompt_logprobs || m->finish;
}

/* ST_OK and *fresh false: nothing new is in it. */
static enum status_code take_message(struct tandem_generation *g, const void *bytes, size_t len, bool *fresh,
                                     struct status *st)
{
    Tandem__V1__GenerateResponse *m =
        (Tandem__V1__GenerateResponse *)rpc_unpack(&tandem__v1__generate_response__descriptor, bytes, len);
    tandem_free(g->message);
    g->message = m;
    if (!m)
        return status_set(st, ST_INTERNAL, "the server sent %zu bytes that are not a GenerateResponse", len);
    take_name(g, m);
    g->heard = *fresh = true;
    if (!g->answer)
        return ST_OK;
    if (m->index >= MAX_ANSWERS)
        return status_set(st, ST_INTERNAL, "the server sent a part of answer %u, expected below %d", m->index,
                          MAX_ANSWERS);
    struct answer *a = &g->answer[m->index];
    if (g->lost.code != ST_OK)
        *fresh = cut(a, m);
    if (!*fresh)
        return ST_OK;
    count(a, m);
    g->attaching = false;
    return ST_OK;
}

/* ---- Attach ---- */

static struct rpc_stream *swap_stream(struct tandem_generation *g, struct rpc_stream *s)
{
    pthread_mutex_lock(&g->lock);
    struct rpc_stream *old = g->stream;
    g->stream = s;
    if (s && g->cancelled)
        rpc_stream_cancel(s);
    pthread_mutex_unlock(&g->lock);
    return old;
}

static bool is_cancelled(struct tandem_generation *g)
{
    pthread_mutex_lock(&g->lock);
    bool cancelled = g->cancelled;
    pthread_mutex_unlock(&g->lock);
    return cancelled;
}

/* Attach itself was refused; other codes are the request's own end. */
static bool refused(enum status_code code)
{
    switch (code) {
    case ST_NOT_FOUND:
    case ST_FAILED_PRECONDITION:
    case ST_PERMISSION_DENIED:
    case ST_UNAUTHENTICATED:
    case ST_UNIMPLEMENTED:
    case ST_OUT_OF_RANGE:
    case ST_INVALID_ARGUMENT:
        return true;
    default:
        return false;
    }
}

/* The connection is to blame, or the server for now. CANCELLED, and not by us: the request for the rest was not taken in time. */
static bool passes(enum status_code code, bool asked)
{
    return code == ST_UNAVAILABLE || (asked && (code == ST_RESOURCE_EXHAUSTED || code == ST_CANCELLED));
}

static void plan_try(struct tandem_generation *g, int64_t now)
{
    g->next_try_ms = min_i64(now + g->pause_ms, g->give_up_ms);
    if (g->end_ms)
        g->next_try_ms = min_i64(g->next_try_ms, g->end_ms);
    g->pause_ms = g->pause_ms < PAUSE_MAX_MS / 2 ? g->pause_ms * 2 : PAUSE_MAX_MS;
}

/* The call ended with st, which is not OK. True: Attach comes next. Else st is what the generation ended with. */
static bool take_loss(struct tandem_generation *g, struct status *st)
{
    bool asked = g->attaching && !g->heard; /* and all that came is this */
    int64_t now = now_ms();
    if (!g->attach_ms || is_cancelled(g))
        return false;
    if (asked && refused(st->code)) {
        struct status why = *st;
        status_set(st, g->lost.code, "%s; Attach: %s: %s", g->lost.message, status_name(why.code), why.message);
        return false;
    }
    if (!passes(st->code, asked))
        return false;
    if (g->attaching && now >= g->give_up_ms) {
        status_set(st, g->lost.code, "%s; no Attach went through within %u ms", g->lost.message, g->attach_ms);
        return false;
    }
    if (!g->attaching) {
        g->attaching = true;
        g->lost = *st;
        g->give_up_ms = now + g->attach_ms;
        g->pause_ms = PAUSE_MIN_MS;
        if (g->client->on_lost)
            g->client->on_lost(g->client->on_lost_ctx, st, g->attach_ms);
    }
    plan_try(g, now);
    rpc_stream_close(swap_stream(g, NULL));
    return true;
}

/* False: cancelled, or until_ms (0: never) is past before it is time for the next try. */
static bool await_try(struct tandem_generation *g, int64_t until_ms)
{
    int64_t to_ms = until_ms ? min_i64(until_ms, g->next_try_ms) : g->next_try_ms;
    struct timespec to = {.tv_sec = to_ms / 1000, .tv_nsec = to_ms % 1000 * 1000000};
    pthread_mutex_lock(&g->lock);
    for (int rc = 0; !g->cancelled && rc != ETIMEDOUT;)
        rc = pthread_cond_timedwait(&g->changed, &g->lock, &to);
    bool ok = !g->cancelled && to_ms == g->next_try_ms;
    pthread_mutex_unlock(&g->lock);
    return ok;
}

static void ask_rest(struct tandem_generation *g, struct rpc_stream *s, uint32_t timeout_ms)
{
    Tandem__V1__AttachRequest m = TANDEM__V1__ATTACH_REQUEST__INIT;
    Tandem__V1__AttachOffset offset[MAX_ANSWERS], *list[MAX_ANSWERS];
    m.request_id = (ProtobufCBinaryData){strlen(g->name), (uint8_t *)g->name};
    m.offsets = list;
    for (uint32_t i = 0; i < MAX_ANSWERS; i++) {
        struct answer *a = &g->answer[i];
        bool any = a->tokens > 0;
        a->skip_text = any ? 0 : a->text_bytes;
        a->skip_ids = any ? 0 : a->prompt_ids;
        a->skip_scores = any ? 0 : a->prompt_scores;
        if (!any)
            continue;
        list[m.n_offsets] = &offset[m.n_offsets];
        offset[m.n_offsets] = (Tandem__V1__AttachOffset)TANDEM__V1__ATTACH_OFFSET__INIT;
        offset[m.n_offsets].index = i;
        offset[m.n_offsets].tokens = a->tokens;
        offset[m.n_offsets].text_bytes_is_case = TANDEM__V1__ATTACH_OFFSET__TEXT_BYTES_IS_TEXT_BYTES;
        offset[m.n_offsets++].text_bytes = a->text_bytes;
    }
    send_request(s, &m.base, timeout_ms);
}

static enum status_code attach(struct tandem_generation *g, int64_t until_ms, struct status *st)
{
    struct rpc_stream *s = NULL;
    int64_t now = now_ms();
    int64_t left_ms = until_ms ? min_i64(until_ms - now, ATTACH_SEND_MS) : ATTACH_SEND_MS;
    uint64_t deadline_ms = g->end_ms == 0 ? 0 : g->end_ms > now ? (uint64_t)(g->end_ms - now) : 1;
    enum status_code rc = rpc_stream_open(&s, g->client->channel, "/tandem.v1.Inference/Attach", deadline_ms, st);
    if (rc != ST_OK)
        return rc;
    g->heard = false;
    swap_stream(g, s);
    ask_rest(g, s, left_ms > 0 ? (uint32_t)left_ms : 1);
    return ST_OK;
}

/* ---- reading ---- */

static enum status_code late(bool *timed_out, struct status *st)
{
    if (timed_out)
        *timed_out = true;
    return status_set(st, ST_DEADLINE_EXCEEDED, "no message came in time");
}

/* Lost: waits until it is time, then asks for the rest. */
static enum status_code try_again(struct tandem_generation *g, int64_t until_ms, bool *timed_out, struct status *st)
{
    if (await_try(g, until_ms))
        return attach(g, until_ms, st);
    if (is_cancelled(g))
        return status_set(st, ST_CANCELLED, "the stream was cancelled");
    return late(timed_out, st);
}

/* until_ms 0: no bound. */
static enum status_code receive(struct tandem_generation *g, int64_t until_ms, const void **bytes, size_t *len,
                                bool *timed_out, struct status *st)
{
    int64_t left_ms = until_ms ? until_ms - now_ms() : 0;
    if (until_ms && left_ms < 1)
        left_ms = 1;
    return rpc_stream_recv(g->stream, bytes, len, (uint32_t)left_ms, timed_out, st);
}

enum status_code tandem_generation_next(struct tandem_generation *g, const Tandem__V1__GenerateResponse **message,
                                        uint32_t timeout_ms, bool *timed_out, struct status *st)
{
    int64_t until_ms = timeout_ms ? now_ms() + timeout_ms : 0;
    bool timeout = false;
    if (timed_out)
        *timed_out = false;
    for (;;) {
        const void *bytes = NULL;
        size_t len = 0;
        bool fresh = false;
        struct status why = STATUS_INIT;
        enum status_code rc = g->stream ? ST_OK : try_again(g, until_ms, timed_out, st);
        if (rc != ST_OK)
            return rc;
        rc = receive(g, until_ms, &bytes, &len, &timeout, &why);
        if (rc != ST_OK && !timeout && take_loss(g, &why))
            continue;
        if (rc != ST_OK) {
            if (timed_out)
                *timed_out = timeout;
            return status_set(st, why.code, "%s", why.message);
        }
        if (!bytes) {
            tandem_free(g->message);
            g->message = NULL;
            *message = NULL;
            return ST_OK;
        }
        rc = take_message(g, bytes, len, &fresh, st);
        if (rc == ST_OK && fresh)
            *message = g->message;
        if (rc != ST_OK || fresh)
            return rc;
    }
}

enum status_code tandem_client_generate(struct tandem_client *c, const Tandem__V1__GenerateRequest *request,
                                        uint64_t deadline_ms,
                                        bool (*on_message)(void *ctx, const Tandem__V1__GenerateResponse *message),
                                        void *ctx, struct status *st)
{
    struct tandem_generation *g = NULL;
    const Tandem__V1__GenerateResponse *m = NULL;
    enum status_code rc = tandem_generation_open(&g, c, deadline_ms, st);
    if (rc != ST_OK || !g)
        return rc;
    tandem_generation_send(g, request);
    do {
        rc = tandem_generation_next(g, &m, 0, NULL, st);
        if (rc == ST_OK && m && !on_message(ctx, m))
            rc = status_set(st, ST_CANCELLED, "stopped by the caller");
    } while (rc == ST_OK && m);
    tandem_generation_close(g);
    return rc;
}
