/* coord_attach.c - requests whose client is gone, and clients that come back for them.
 *
 *     LIVE, FINISHED ──its call ends early──▶ unclaimed, for keep_ms ──Attach──▶ as before, from the offsets on
 *          '──all was handed over──▶ KEPT ──its call ends──▶ unclaimed, for keep_ms ──▶ gone
 *
 * Of a request that is kept nothing is dropped that was sent: what an answer has sent is a mark in its text, ids and log
 * probabilities, and Attach moves the marks (choice_seek). What is held so is bounded by max_tokens of each, the number of live
 * ones as always, and that of KEPT ones by --max-kept: the one that was left first makes room.
 *
 * A request has one client. Who attaches takes it from whoever has it, since the loss of a connection is often noticed by the
 * client first: the older call ends with ABORTED. Engine thread, but for the callbacks of a call. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

#define LOOK_US 100000 /* between two looks at those without a client */

/* ---- sinks ---- */

static uint32_t none_pending(void *sink)
{
    (void)sink;
    return 1;
}

static enum status_code none_send(void *sink, const Tandem__V1__GenerateResponse *m, struct status *st)
{
    (void)sink;
    (void)m;
    return status_set(st, ST_CANCELLED, "no client is there");
}

static void none_end(void *sink, const struct status *st)
{
    (void)sink;
    (void)st;
}

static void none_finish(void *sink, const struct status *st, uint32_t retry_after_ms)
{
    (void)retry_after_ms;
    none_end(sink, st);
}

static const char *none_peer(const void *sink)
{
    (void)sink;
    return "nobody";
}

static void none_release(void *sink)
{
    (void)sink;
}

/* Of a request without a client. */
const struct sink_ops no_sink = {.pending = none_pending,
                                 .send = none_send,
                                 .finish = none_finish,
                                 .cancel = none_end,
                                 .peer = none_peer,
                                 .release = none_release};

static struct rpc_call *call_of(const void *sink)
{
    return ((const struct attach *)sink)->call;
}

static uint32_t attach_pending(void *sink)
{
    return rpc_call_pending(call_of(sink));
}

static enum status_code attach_send(void *sink, const Tandem__V1__GenerateResponse *m, struct status *st)
{
    return rpc_call_send_in_place(call_of(sink), &m->base, st);
}

static void attach_finish(void *sink, const struct status *st, uint32_t retry_after_ms)
{
    rpc_call_finish(call_of(sink), st, retry_after_ms);
}

static void attach_cancel(void *sink, const struct status *st)
{
    rpc_call_cancel(call_of(sink), st);
}

static const char *attach_peer(const void *sink)
{
    return rpc_call_peer(call_of(sink));
}

static void attach_release(void *sink)
{
    attach_unref(sink);
}

static const struct sink_ops attach_sink = {.attachable = true,
                                            .pending = attach_pending,
                                            .send = attach_send,
                                            .finish = attach_finish,
                                            .cancel = attach_cancel,
                                            .peer = attach_peer,
                                            .release = attach_release};

/* ---- the call: poll threads ---- */

void attach_unref(struct attach *a)
{
    if (!a || atomic_fetch_sub_explicit(&a->refs, 1, memory_order_acq_rel) != 1)
        return;
    request_unref(atomic_load(&a->request));
    atomic_fetch_sub(&a->coord->live_attach, 1);
    rpc_call_unref(a->call);
    free(a);
}

static enum status_code check_message(const Tandem__V1__AttachRequest *m, struct status *st)
{
    uint64_t named = 0;
    if (m->request_id.len < 1 || m->request_id.len > COORD_MAX_NAME)
        return status_set(st, ST_INVALID_ARGUMENT, "request_id: %zu bytes, expected 1 to %d", m->request_id.len,
                          COORD_MAX_NAME);
    for (size_t i = 0; i < m->n_offsets; i++) {
        const Tandem__V1__AttachOffset *o = m->offsets[i];
        if (o->index >= COORD_MAX_ANSWERS)
            return status_set(st, ST_INVALID_ARGUMENT, "offsets[%zu].index: %u, expected below %d", i, o->index,
                              COORD_MAX_ANSWERS);
        if (named >> o->index & 1)
            return status_set(st, ST_INVALID_ARGUMENT, "offsets[%zu].index: answer %u is named twice", i, o->index);
        named |= UINT64_C(1) << o->index;
    }
    return ST_OK;
}

static enum status_code attach_create(struct attach **out, struct coord *c, struct rpc_call *call,
                                      const Tandem__V1__AttachRequest *m, struct status *st)
{
    enum status_code rc = check_message(m, st);
    if (rc != ST_OK)
        return rc;
    if (atomic_fetch_add(&c->live_attach, 1) >= COORD_MAX_ATTACH) {
        atomic_fetch_sub(&c->live_attach, 1);
        return status_set(st, ST_RESOURCE_EXHAUSTED, "%d Attach calls are open: the limit", COORD_MAX_ATTACH);
    }
    struct attach *a = calloc(1, sizeof *a + m->n_offsets * sizeof *a->offset);
    if (!a) {
        atomic_fetch_sub(&c->live_attach, 1);
        return status_nomem(st, "attach call", sizeof *a);
    }
    a->mail.kind = MAIL_ATTACH;
    atomic_init(&a->refs, 1);
    atomic_init(&a->request, NULL);
    a->coord = c;
    a->call = rpc_call_ref(call);
    text_sanitize(a->name, sizeof a->name, m->request_id.data, m->request_id.len);
    rpc_call_caller(call, a->owner);
    a->n_offsets = (uint32_t)m->n_offsets;
    for (size_t i = 0; i < m->n_offsets; i++)
        a->offset[i] = (struct attach_offset){.index = m->offsets[i]->index,
                                              .tokens = m->offsets[i]->tokens,
                                              .has_text = m->offsets[i]->text_bytes_is_case,
                                              .text = m->offsets[i]->text_bytes};
    *out = a;
    return ST_OK;
}

void attach_call_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct coord *c = ctx;
    struct status st = STATUS_INIT;
    struct attach *a = NULL;
    Tandem__V1__AttachRequest *m =
        (Tandem__V1__AttachRequest *)rpc_unpack(&tandem__v1__attach_request__descriptor, msg, len);
    enum status_code rc = m ? attach_create(&a, c, call, m, &st)
                            : status_set(&st, ST_INVALID_ARGUMENT, "not a valid tandem.v1.AttachRequest");
    if (m)
        protobuf_c_message_free_unpacked(&m->base, NULL);
    if (rc != ST_OK) {
        metrics_error(&c->metrics, rc);
        rpc_call_finish(call, &st, rc == ST_RESOURCE_EXHAUSTED ? COORD_RETRY_AFTER_MS : 0);
        return;
    }
    rpc_call_set_data(call, a); /* the call's reference, until attach_call_close */
    mailbox_post(&c->box, &a->mail, ATTACH_OPENED, &a->refs);
}

void attach_call_writable(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    struct attach *a = rpc_call_data(call);
    struct request *r = a ? atomic_load(&a->request) : NULL;
    if (r)
        request_writable(r);
}

void attach_call_close(struct rpc_call *call, bool cancelled, void *ctx)
{
    (void)cancelled;
    (void)ctx;
    struct attach *a = rpc_call_data(call);
    if (!a)
        return;
    mailbox_post(&a->coord->box, &a->mail, ATTACH_CLOSED, &a->refs);
    attach_unref(a);
}

/* ---- without a client ---- */

static void drop_sink(struct request *r)
{
    r->ops->release(r->sink);
    r->ops = &no_sink;
    r->sink = NULL;
}

static void drop_client(struct request *r)
{
    r->closed = true;
    drop_sink(r);
    list_remove(&r->stalled_link);
}

void attach_forget(struct engine *e, struct request *r)
{
    if (link_listed(&r->keep_link)) {
        list_remove(&r->keep_link);
        e->n_unclaimed--;
    }
    e->n_kept -= r->state == REQUEST_KEPT;
    list_remove(&r->held_link);
}

static void leave_unclaimed(struct engine *e, struct request *r, int64_t now_us)
{
    r->keep_until_us = now_us + (int64_t)r->keep_ms * 1000;
    if (link_listed(&r->keep_link))
        return;
    list_append(&e->unclaimed, &r->keep_link);
    e->n_unclaimed++;
}

/* One that is only kept is no live request any more: not for the bounds, and not for a drain. */
static void shelve(struct engine *e, struct request *r)
{
    if (r->state != REQUEST_KEPT || r->shelved)
        return;
    r->shelved = true;
    atomic_fetch_sub(&e->coord->live_requests, 1);
}

/* The one that was left first makes room; while all have a client nobody has to. */
static void bound_kept(struct engine *e, int64_t now_us)
{
    for (struct link *l = e->unclaimed.next, *next; l != &e->unclaimed && e->n_kept > e->coord->opt.max_kept;
         l = next) {
        next = l->next;
        struct request *r = container_of(l, struct request, keep_link);
        if (r->state == REQUEST_KEPT)
            request_to_closing(e, r, ST_OK, now_us);
    }
}

static void to_kept(struct engine *e, struct request *r, int64_t now_us)
{
    if (!r->told_end) {
        record_end(e->coord, r, ST_OK, now_us);
        r->told_end = true;
    }
    coord_journal_end(e, r, ST_OK);
    r->state = REQUEST_KEPT;
    e->n_kept++;
}

/* r may be gone after it. */
void attach_detach(struct engine *e, struct request *r, int64_t now_us)
{
    drop_client(r);
    if (r->state == REQUEST_FINISHED) /* its client did not wait for the end */
        to_kept(e, r, now_us);
    leave_unclaimed(e, r, now_us);
    shelve(e, r);
    log_request(&e->coord->log, LOG_DEBUG, r->name, "no client; kept for %u ms", r->keep_ms);
    bound_kept(e, now_us);
}

void attach_finished(struct engine *e, struct request *r, bool fresh, int64_t now_us)
{
    if (r->state != REQUEST_FINISHED || !r->closed || !r->kept)
        return;
    to_kept(e, r, now_us);
    if (fresh)
        leave_unclaimed(e, r, now_us);
    shelve(e, r);
    bound_kept(e, now_us);
}

void attach_keep(struct engine *e, struct request *r, int64_t now_us)
{
    to_kept(e, r, now_us);
    list_remove(&r->stalled_link);
    r->stalled_us = now_us; /* for its call to close */
    list_append(&e->stalled, &r->stalled_link);
    bound_kept(e, now_us);
}

void attach_refuse(struct engine *e, struct request *r, const struct status *st, int64_t now_us)
{
    metrics_error(&e->coord->metrics, st->code);
    r->ops->finish(r->sink, st, 0);
    attach_detach(e, r, now_us);
}

static void give_up(struct engine *e, struct request *r, int64_t now_us)
{
    struct status st = STATUS_INIT;
    if (r->state == REQUEST_KEPT) {
        request_to_closing(e, r, ST_OK, now_us);
        return;
    }
    status_set(&st, ST_CANCELLED, "its client was gone for %u ms", r->keep_ms);
    request_end(e, r, &st, now_us);
}

/* Its deadline ends it; a client waits no longer than after the loss of a group, and may attach again. */
static void check_held(struct engine *e, struct request *r, int64_t now_us)
{
    struct status st = STATUS_INIT;
    const struct attach *a = r->closed ? NULL : r->sink;
    if (r->deadline_us <= now_us) {
        status_set(&st, ST_DEADLINE_EXCEEDED, "the deadline passed before a worker group was ready");
        request_end(e, r, &st, now_us);
    } else if (a && a->wait_until_us <= now_us) {
        status_set(&st, ST_UNAVAILABLE, "no worker group came within %u ms (--replay-timeout-ms); the request is kept",
                   e->coord->opt.replay_timeout_ms);
        metrics_error(&e->coord->metrics, st.code);
        r->ops->finish(r->sink, &st, COORD_RETRY_AFTER_MS);
        attach_detach(e, r, now_us);
    }
}

void attach_check(struct engine *e, int64_t now_us)
{
    if (now_us - e->unclaimed_us < LOOK_US)
        return;
    e->unclaimed_us = now_us;
    for (struct link *l = e->unclaimed.next, *next; l != &e->unclaimed; l = next) {
        next = l->next;
        struct request *r = container_of(l, struct request, keep_link);
        if (r->keep_until_us <= now_us)
            give_up(e, r, now_us);
    }
    for (struct link *l = e->held.next, *next; l != &e->held; l = next) {
        next = l->next;
        check_held(e, container_of(l, struct request, held_link), now_us);
    }
}

void attach_end_held(struct engine *e, const struct status *st, int64_t now_us)
{
    while (!list_empty(&e->held))
        request_end(e, container_of(e->held.next, struct request, held_link), st, now_us);
}

void attach_drop_kept(struct engine *e, int64_t now_us)
{
    while (!list_empty(&e->unclaimed)) {
        struct request *r = container_of(e->unclaimed.next, struct request, keep_link);
        r->number = 0; /* the journal keeps it for the next process */
        request_to_closing(e, r, ST_OK, now_us);
    }
}

/* ---- who comes back ---- */

static enum status_code check_offset(const struct request *r, const struct attach_offset *o, uint32_t i,
                                     struct status *st)
{
    if (o->index >= r->n_choices)
        return status_set(st, ST_INVALID_ARGUMENT, "offsets[%u].index: %u, expected below %u, the request's answers", i,
                          o->index, r->n_choices);
    if (r->choice && o->tokens > r->max_new)
        return status_set(st, ST_OUT_OF_RANGE, "offsets[%u].tokens: %u, expected at most %u, the request's max_tokens",
                          i, o->tokens, r->max_new);
    return ST_OK;
}

static enum status_code check_claim(const struct request *r, const struct attach *a, struct status *st)
{
    if (!r)
        return status_set(st, ST_NOT_FOUND, "request_id: \"%s\" is not known, or not any more", a->name);
    if (memcmp(r->owner, a->owner, sizeof r->owner) != 0)
        return status_set(st, ST_PERMISSION_DENIED,
                          "request_id: \"%s\" is another caller's: expected its token, or its certificate", a->name);
    if (!r->kept)
        return status_set(st, ST_FAILED_PRECONDITION, "request_id: \"%s\" is not kept for Attach: its keep_ms was 0",
                          a->name);
    for (uint32_t i = 0; i < a->n_offsets; i++) {
        enum status_code rc = check_offset(r, &a->offset[i], i, st);
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}

static void seek_all(struct request *r, const struct attach *a)
{
    for (uint32_t i = 0; i < r->n_choices; i++)
        choice_seek(&r->choice[i], 0, NULL);
    for (uint32_t i = 0; i < a->n_offsets; i++) {
        const struct attach_offset *o = &a->offset[i];
        choice_seek(&r->choice[o->index], o->tokens, o->has_text ? &o->text : NULL);
    }
    r->n_done = r->turn = 0;
}

static void take_up(struct engine *e, struct request *r, struct attach *a, int64_t now_us)
{
    struct status st = STATUS_INIT;
    if (!r->closed) {
        status_set(&st, ST_ABORTED, "request_id: another call has attached to \"%s\"", r->name);
        r->ops->finish(r->sink, &st, 0);
        drop_client(r);
    }
    if (link_listed(&r->keep_link)) {
        list_remove(&r->keep_link);
        e->n_unclaimed--;
    }
    if (r->state == REQUEST_KEPT) {
        e->n_kept--;
        r->state = REQUEST_FINISHED;
    }
    if (r->shelved) {
        r->shelved = false;
        atomic_fetch_add(&e->coord->live_requests, 1);
    }
    atomic_fetch_add(&a->refs, 1); /* the sink's */
    r->ops = &attach_sink;
    r->sink = a;
    r->taken_up = true;
    r->closed = r->first_sent = false;
    request_ref(r);
    atomic_store(&a->request, r);
    metrics_add(&e->coord->metrics.attached, 1);
    log_request(&e->coord->log, LOG_DEBUG, r->name, "attached by %s", rpc_call_peer(a->call));
    if (r->state == REQUEST_HELD) { /* attach_begin, or check_held */
        a->wait_until_us = now_us + (int64_t)e->coord->opt.replay_timeout_ms * 1000;
        return;
    }
    seek_all(r, a);
    request_flush(e, r, now_us);
}

void attach_begin(struct engine *e, struct request *r, int64_t now_us)
{
    struct status st = STATUS_INIT;
    struct attach *a = r->closed ? NULL : r->sink;
    if (!a) {
        attach_finished(e, r, false, now_us);
        return;
    }
    if (check_claim(r, a, &st) != ST_OK) {
        attach_refuse(e, r, &st, now_us);
        return;
    }
    seek_all(r, a);
    request_flush(e, r, now_us);
}

void attach_handle(struct engine *e, struct attach *a, uint32_t flags, int64_t now_us)
{
    struct status st = STATUS_INIT;
    struct request *r = atomic_load(&a->request);
    if ((flags & ATTACH_OPENED) && !(flags & ATTACH_CLOSED)) {
        r = request_by_name(e, a->name);
        if (check_claim(r, a, &st) == ST_OK) {
            take_up(e, r, a, now_us);
        } else {
            metrics_error(&e->coord->metrics, st.code);
            rpc_call_finish(a->call, &st, 0);
        }
        return;
    }
    if (!(flags & ATTACH_CLOSED) || !r || r->sink != a || r->closed)
        return;
    if (r->state == REQUEST_CLOSING) {
        r->closed = true;
        request_to_closing(e, r, ST_CANCELLED, now_us);
    } else {
        attach_detach(e, r, now_us);
    }
}
