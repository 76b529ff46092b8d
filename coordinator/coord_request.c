/* The request table and the way of tokens to clients. Engine thread.
 *
 *     NEW --submit--> LIVE --last event--> FINISHED --all text handed over--> CLOSING --on_close--> GONE
 *      '--refused--> GONE      '--failed----------------------------------------^
 *
 * What a client has not taken waits in the request (text, ids), not in rpc: at most one message is there at a time, so
 * a slow client gets fewer and larger messages, and what is held for it is bounded by its max_tokens. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

/* ---- the table ---- */

static uint32_t name_hash(const char *s)
{
    uint32_t h = 2166136261u; /* FNV-1a */
    for (; *s; s++)
        h = (h ^ (unsigned char)*s) * 16777619u;
    return h;
}

enum status_code requests_init(struct engine *e, struct status *st)
{
    e->name_mask = 4095;
    e->by_name = calloc((size_t)e->name_mask + 1, sizeof(struct request *));
    return e->by_name ? ST_OK
                      : status_nomem(st, "request table", ((size_t)e->name_mask + 1) * sizeof(struct request *));
}

void requests_fini(struct engine *e)
{
    free(e->table);
    free(e->generation);
    free(e->free_index);
    free(e->by_name);
}

static enum status_code table_grow(struct engine *e, struct status *st)
{
    uint32_t cap = e->table_cap ? 2 * e->table_cap : 256;
    struct request **table = realloc(e->table, cap * sizeof(struct request *));
    if (table)
        e->table = table;
    uint32_t *generation = realloc(e->generation, cap * sizeof *generation);
    if (generation)
        e->generation = generation;
    uint32_t *free_index = realloc(e->free_index, cap * sizeof *free_index);
    if (free_index)
        e->free_index = free_index;
    if (!table || !generation || !free_index)
        return status_nomem(st, "request table", cap * sizeof(struct request *));
    for (uint32_t i = cap; i-- > e->table_cap;) {
        table[i] = NULL;
        generation[i] = 0;
        free_index[e->n_free++] = i;
    }
    e->table_cap = cap;
    return ST_OK;
}

static enum status_code table_add(struct engine *e, struct request *r, struct status *st)
{
    if (e->n_free == 0) {
        enum status_code rc = table_grow(e, st);
        if (rc != ST_OK)
            return rc;
    }
    r->table_index = e->free_index[--e->n_free];
    e->table[r->table_index] = r;
    r->id = (uint64_t)++e->generation[r->table_index] << 32 | r->table_index;
    struct request **bucket = &e->by_name[name_hash(r->name) & e->name_mask];
    r->hash_next = *bucket;
    *bucket = r;
    return ST_OK;
}

static void table_remove(struct engine *e, struct request *r)
{
    struct request **p = &e->by_name[name_hash(r->name) & e->name_mask];
    while (*p != r)
        p = &(*p)->hash_next;
    *p = r->hash_next;
    e->table[r->table_index] = NULL;
    e->free_index[e->n_free++] = r->table_index;
}

struct request *request_by_name(struct engine *e, const char *name)
{
    struct request *r = e->by_name[name_hash(name) & e->name_mask];
    while (r && strcmp(r->name, name) != 0)
        r = r->hash_next;
    return r;
}

static struct request *request_by_id(struct engine *e, uint64_t id)
{
    uint32_t i = (uint32_t)id;
    struct request *r = i < e->table_cap ? e->table[i] : NULL;
    return r && r->id == id ? r : NULL;
}

/* ---- ends ---- */

/* When it is worth to ask this server again; 0: no more, it drains. */
static uint32_t retry_after_ms(const struct engine *e)
{
    return e->draining ? 0 : COORD_RETRY_AFTER_MS;
}

/* The call was finished or cancelled; what is left is its on_close. */
static void to_closing(struct engine *e, struct request *r, int64_t now_us)
{
    if (r->state == REQUEST_LIVE || r->state == REQUEST_FINISHED)
        table_remove(e, r);
    list_remove(&r->stalled_link);
    if (r->closed) {
        r->state = REQUEST_GONE;
        request_unref(r); /* the engine's */
        return;
    }
    r->state = REQUEST_CLOSING;
    r->stalled_us = now_us;
    list_append(&e->stalled, &r->stalled_link);
}

static void fail(struct engine *e, struct request *r, const struct status *st, uint32_t retry_after_ms, int64_t now_us)
{
    if (!r->closed)
        rpc_call_finish(r->call, st, retry_after_ms);
    log_line(&e->coord->log, LOG_DEBUG, "%s: %s: %s", r->name, status_name(st->code), st->message);
    to_closing(e, r, now_us);
}

/* ---- to the client ---- */

static size_t text_chunk(const struct request *r)
{
    size_t n = r->text_len;
    if (n <= COORD_CHUNK_BYTES)
        return n;
    n = COORD_CHUNK_BYTES;
    while (((unsigned char)r->text[n] & 0xC0) == 0x80) /* whole characters only; the text is valid UTF-8 */
        n--;
    return n;
}

static uint64_t span_us(int64_t from, int64_t to)
{
    return from > 0 && to > from ? (uint64_t)(to - from) : 0;
}

/* One message with as much as fits. True when it was the last of the request. */
static bool send_some(struct request *r, struct status *st)
{
    Tandem__V1__GenerateResponse m = TANDEM__V1__GENERATE_RESPONSE__INIT;
    Tandem__V1__Finish finish = TANDEM__V1__FINISH__INIT;
    Tandem__V1__Usage usage = TANDEM__V1__USAGE__INIT;
    Tandem__V1__Timing timing = TANDEM__V1__TIMING__INIT;
    size_t n_text = text_chunk(r);
    uint32_t n_ids = min_u32(r->n_ids, COORD_CHUNK_IDS);
    bool last = r->finish_ready && n_text == r->text_len && n_ids == r->n_ids;
    m.text = (ProtobufCBinaryData){.len = n_text, .data = (uint8_t *)r->text};
    m.n_token_ids = n_ids;
    m.token_ids = r->ids;
    if (!r->first_sent)
        m.request_id = (ProtobufCBinaryData){.len = strlen(r->name), .data = (uint8_t *)r->name};
    if (last) {
        const struct sched_event *end = &r->end;
        finish.reason = end->stopped ? TANDEM__V1__FINISH__REASON__STOP : TANDEM__V1__FINISH__REASON__LENGTH;
        if (end->stopped) {
            finish.stop_token_id_is_case = TANDEM__V1__FINISH__STOP_TOKEN_ID_IS_STOP_TOKEN_ID;
            finish.stop_token_id = end->token;
        }
        usage.prompt_tokens = end->n_prompt;
        usage.completion_tokens = end->n_new;
        timing.queue_us = span_us(r->arrived_us, end->started_us);
        timing.prefill_us = span_us(end->started_us, end->first_token_us);
        timing.decode_us = span_us(end->first_token_us, end->last_token_us);
        timing.preemptions = end->preemptions;
        finish.usage = &usage;
        finish.timing = &timing;
        m.finish = &finish;
    }
    if (rpc_call_send(r->call, &m.base, st) != ST_OK)
        return false;
    r->first_sent = true;
    r->text_len -= n_text;
    r->n_ids -= n_ids;
    if (r->text_len)
        memmove(r->text, r->text + n_text, r->text_len);
    if (r->n_ids)
        memmove(r->ids, r->ids + n_ids, r->n_ids * sizeof *r->ids);
    return last;
}

/* True when a message sent now goes out at once. Otherwise on_writable will post mail: set the wish, then look again,
 * because the queue may have run empty in between. */
static bool writable(struct request *r)
{
    if (rpc_call_pending(r->call) == 0)
        return true;
    atomic_store(&r->want_writable, true);
    if (rpc_call_pending(r->call) != 0)
        return false;
    atomic_store(&r->want_writable, false);
    return true;
}

static void flush(struct engine *e, struct request *r, int64_t now_us)
{
    while ((r->state == REQUEST_LIVE || r->state == REQUEST_FINISHED) && !r->closed &&
           (r->text_len || r->n_ids || r->finish_ready)) {
        if (!writable(r)) {
            if (!link_listed(&r->stalled_link)) {
                r->stalled_us = now_us;
                list_append(&e->stalled, &r->stalled_link);
            }
            return;
        }
        list_remove(&r->stalled_link);
        struct status st = STATUS_INIT;
        bool last = send_some(r, &st);
        if (last) {
            rpc_call_finish(r->call, NULL, 0);
            to_closing(e, r, now_us);
        } else if (st.code == ST_CANCELLED) {
            return; /* on_close is on its way */
        } else if (st.code != ST_OK) {
            request_end(e, r, &st, now_us);
        }
    }
}

static void mark_dirty(struct engine *e, struct request *r)
{
    if (r->dirty)
        return;
    r->dirty = true;
    request_ref(r);
    r->dirty_next = e->dirty;
    e->dirty = r;
}

void requests_flush_dirty(struct engine *e, int64_t now_us)
{
    while (e->dirty) {
        struct request *r = e->dirty;
        e->dirty = r->dirty_next;
        r->dirty = false;
        flush(e, r, now_us);
        request_unref(r);
    }
}

/* ---- tokens ---- */

static bool append_text(struct request *r, const char *text, size_t len)
{
    if (len == 0)
        return true;
    if (r->text_len + len > r->text_cap) {
        size_t cap = 2 * (r->text_len + len) + 64;
        char *p = realloc(r->text, cap);
        if (!p)
            return false;
        r->text = p;
        r->text_cap = cap;
    }
    memcpy(r->text + r->text_len, text, len);
    r->text_len += len;
    return true;
}

static bool append_id(struct request *r, uint32_t id)
{
    if (r->n_ids == r->ids_cap) {
        uint32_t cap = r->ids_cap ? 2 * r->ids_cap : 8;
        uint32_t *p = realloc(r->ids, cap * sizeof *p);
        if (!p)
            return false;
        r->ids = p;
        r->ids_cap = cap;
    }
    r->ids[r->n_ids++] = id;
    return true;
}

static bool is_stop(const struct request *r, uint32_t id)
{
    for (uint32_t i = 0; i < r->n_stop; i++)
        if (r->stop[i] == id)
            return true;
    return false;
}

static void take_token(struct engine *e, struct request *r, uint32_t id, int64_t now_us)
{
    struct status st = STATUS_INIT;
    const char *text = NULL;
    size_t len = 0;
    bool ok = append_id(r, id);
    if (ok && !is_stop(r, id)) {
        if (tok_stream_push(r->decoder, id, &text, &len, &st) != ST_OK) {
            request_end(e, r, &st, now_us);
            return;
        }
        ok = append_text(r, text, len);
    }
    if (!ok) {
        status_nomem(&st, "output of a request", r->text_cap);
        request_end(e, r, &st, now_us);
        return;
    }
    mark_dirty(e, r);
}

static void take_finished(struct engine *e, struct request *r, const struct sched_event *ev, int64_t now_us)
{
    struct status st = STATUS_INIT;
    const char *text = NULL;
    size_t len = 0;
    if (tok_stream_flush(r->decoder, &text, &len, &st) != ST_OK) {
        fail(e, r, &st, 0, now_us);
        return;
    }
    if (!append_text(r, text, len)) {
        status_nomem(&st, "output of a request", len);
        fail(e, r, &st, 0, now_us);
        return;
    }
    r->end = *ev;
    r->finish_ready = true;
    r->state = REQUEST_FINISHED; /* not closed: a live request is ended when its call closes */
    mark_dirty(e, r);
    log_line(&e->coord->log, LOG_DEBUG, "%s: %u prompt tokens, %u new, %s", r->name, ev->n_prompt, ev->n_new,
             ev->stopped ? "stop" : "length");
}

static void take_failed(struct engine *e, struct request *r, const struct sched_event *ev, int64_t now_us)
{
    struct status st = STATUS_INIT;
    uint32_t retry = 0;
    switch (ev->code) {
    case ST_UNAVAILABLE:
        status_set(&st, ST_UNAVAILABLE, "%s", e->lost_reason[0] ? e->lost_reason : "the worker group is gone");
        retry = retry_after_ms(e);
        break;
    case ST_DEADLINE_EXCEEDED:
        status_set(&st, ev->code, "the deadline passed %s, after %u of %u tokens",
                   ev->started_us ? "while running" : "in the queue", ev->n_new, r->max_new);
        break;
    case ST_INVALID_ARGUMENT:
        status_set(&st, ev->code, "prompt of %u and max_tokens of %u: more than the new worker group can hold",
                   r->n_prompt, r->max_new);
        break;
    default:
        status_set(&st, ev->code, "the request was ended (%s)", status_name(ev->code));
    }
    fail(e, r, &st, retry, now_us);
}

void request_event(struct engine *e, const struct sched_event *ev, int64_t now_us)
{
    struct request *r = request_by_id(e, ev->id);
    if (!r || r->state != REQUEST_LIVE)
        return; /* ended by us: request_end took it out of the table at once */
    if (ev->kind == SCHED_TOKEN)
        take_token(e, r, ev->token, now_us);
    else if (ev->kind == SCHED_FINISHED)
        take_finished(e, r, ev, now_us);
    else
        take_failed(e, r, ev, now_us);
}

void request_end(struct engine *e, struct request *r, const struct status *st, int64_t now_us)
{
    bool live = r->state == REQUEST_LIVE;
    uint64_t id = r->id;
    fail(e, r, st, st->code == ST_UNAVAILABLE ? retry_after_ms(e) : 0, now_us);
    if (live) /* its FAILED event finds no request any more */
        (void)!sched_cancel(e->sched, now_us, id, st->code, NULL);
}

void requests_end_live(struct engine *e, const struct status *st, int64_t now_us)
{
    for (uint32_t i = 0; i < e->table_cap; i++)
        if (e->table[i] && e->table[i]->state == REQUEST_LIVE)
            request_end(e, e->table[i], st, now_us);
}

uint32_t requests_end_all(struct engine *e, const struct status *st, int64_t now_us)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < e->table_cap; i++) {
        if (!e->table[i])
            continue;
        request_end(e, e->table[i], st, now_us);
        n++;
    }
    return n;
}

/* ---- mail ---- */

static void submit(struct engine *e, struct request *r, int64_t now_us)
{
    struct status st = STATUS_INIT;
    uint32_t retry = COORD_RETRY_AFTER_MS;
    struct coord *c = e->coord;
    int state = atomic_load(&c->state);
    if (state != TANDEM__V1__SERVER_INFO__STATE__READY) {
        if (state == TANDEM__V1__SERVER_INFO__STATE__DRAINING)
            retry = 0;
        status_set(&st, ST_UNAVAILABLE, "%s", c->reason); /* only this thread writes it */
        goto refuse;
    }
    if (r->arrived_us <= e->abort_all_us) {
        status_set(&st, ST_CANCELLED, "aborted by Control.Abort");
        goto refuse;
    }
    if (request_by_name(e, r->name)) {
        status_set(&st, ST_ALREADY_EXISTS, "request_id: \"%s\" is live already, expected a new one", r->name);
        goto refuse;
    }
    if (table_add(e, r, &st) != ST_OK)
        goto refuse;
    struct sched_request req = {.id = r->id,
                                .prompt = r->prompt,
                                .n_prompt = r->n_prompt,
                                .max_new = r->max_new,
                                .stop_ids = r->stop,
                                .n_stop = r->n_stop,
                                .deadline_us = r->deadline_us,
                                .sample = r->sample};
    if (sched_submit(e->sched, now_us, &req, &st) != ST_OK) {
        table_remove(e, r);
        goto refuse;
    }
    r->state = REQUEST_LIVE;
    request_ref(r); /* the engine's */
    free(r->prompt);
    r->prompt = NULL;
    return;
refuse:
    rpc_call_finish(r->call, &st, st.code == ST_UNAVAILABLE || st.code == ST_RESOURCE_EXHAUSTED ? retry : 0);
    r->state = REQUEST_GONE;
}

void request_handle_mail(struct engine *e, struct request *r, uint32_t flags, int64_t now_us)
{
    if (flags & REQUEST_CLOSED) {
        struct status st = STATUS_INIT;
        r->closed = true;
        status_set(&st, ST_CANCELLED, "the client cancelled or went away");
        if (r->state == REQUEST_LIVE || r->state == REQUEST_FINISHED) {
            request_end(e, r, &st, now_us);
        } else if (r->state == REQUEST_CLOSING) {
            to_closing(e, r, now_us);
        }
    }
    if ((flags & REQUEST_SUBMIT) && !r->closed)
        submit(e, r, now_us);
    if (flags & REQUEST_WRITABLE)
        flush(e, r, now_us);
}

void requests_check_slow(struct engine *e, int64_t now_us)
{
    int64_t limit_us = (int64_t)e->coord->opt.slow_client_timeout_ms * 1000;
    while (!list_empty(&e->stalled)) {
        struct request *r = container_of(e->stalled.next, struct request, stalled_link);
        if (r->stalled_us + limit_us > now_us)
            return;
        struct status st = STATUS_INIT;
        status_set(&st, ST_RESOURCE_EXHAUSTED, "the client read nothing for %u ms (--slow-client-timeout-ms)",
                   e->coord->opt.slow_client_timeout_ms);
        log_line(&e->coord->log, LOG_INFO, "%s from %s: %s", r->name, rpc_call_peer(r->call), st.message);
        rpc_call_cancel(r->call, &st);
        if (r->state == REQUEST_CLOSING) { /* cancelled now; its on_close comes */
            list_remove(&r->stalled_link);
            r->stalled_us = now_us;
            list_append(&e->stalled, &r->stalled_link);
        } else {
            request_end(e, r, &st, now_us);
        }
    }
}
