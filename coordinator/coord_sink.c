/* Begin and end of a request as a protocol sees them. Threads of the protocols; nothing here waits. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

void request_ref(struct request *r)
{
    atomic_fetch_add_explicit(&r->refs, 1, memory_order_relaxed);
}

void request_unref(struct request *r)
{
    if (!r || atomic_fetch_sub_explicit(&r->refs, 1, memory_order_acq_rel) != 1)
        return;
    if (!r->shelved)
        atomic_fetch_sub(&r->coord->live_requests, 1);
    if (r->ops)
        r->ops->release(r->sink);
    choices_destroy(r);
    options_fini(r);
    free(r->raw);
    free(r->prompt);
    free(r->stop);
    free(r->image);
    free(r->known);
    free(r);
}

/* Why no request can be taken now; ST_OK when one can. */
static enum status_code check_state(struct coord *c, uint32_t *retry_after_ms, struct status *st)
{
    if (atomic_load_explicit(&c->accepting, memory_order_acquire))
        return ST_OK;
    int state = atomic_load_explicit(&c->state, memory_order_acquire);
    *retry_after_ms = state == TANDEM__V1__SERVER_INFO__STATE__DRAINING ? 0 : COORD_RETRY_AFTER_MS;
    pthread_mutex_lock(&c->pub_mu);
    status_set(st, ST_UNAVAILABLE, "%s", c->reason);
    pthread_mutex_unlock(&c->pub_mu);
    return ST_UNAVAILABLE;
}

/* Takes a place among the live requests, which request_unref gives back. */
static struct request *request_create(struct coord *c, const void *raw, size_t len, struct status *st)
{
    unsigned bound = atomic_load(&c->max_live);
    struct request *r = NULL;
    if (atomic_fetch_add(&c->live_requests, 1) >= bound) {
        status_set(st, ST_RESOURCE_EXHAUSTED, "%u requests are live (queued, running or not read yet): the limit",
                   bound);
        goto fail;
    }
    r = calloc(1, sizeof *r);
    if (r)
        r->raw = malloc(len ? len : 1);
    if (!r || !r->raw) {
        status_nomem(st, "request", len);
        goto fail;
    }
    if (len)
        memcpy(r->raw, raw, len);
    r->raw_len = len;
    r->mail.kind = MAIL_REQUEST;
    r->coord = c;
    r->arrived_us = coord_now_us();
    atomic_init(&r->refs, 1);
    atomic_init(&r->cancelled, false);
    atomic_init(&r->want_writable, false);
    return r;
fail:
    atomic_fetch_sub(&c->live_requests, 1);
    free(r);
    return NULL;
}

enum status_code request_open(struct coord *c, const struct sink_ops *ops, void *sink, const void *raw, size_t len,
                              int64_t deadline_us, struct request **out, uint32_t *retry_after_ms, struct status *st)
{
    *retry_after_ms = COORD_RETRY_AFTER_MS;
    enum status_code rc = check_state(c, retry_after_ms, st);
    struct request *r = rc == ST_OK ? request_create(c, raw, len, st) : NULL;
    if (!r) {
        rc = rc == ST_OK ? ST_RESOURCE_EXHAUSTED : rc;
        metrics_error(&c->metrics, rc);
        return rc;
    }
    r->ops = ops;
    r->sink = sink;
    r->deadline_us = deadline_us;
    if (ops->owner)
        ops->owner(sink, r->owner);
    r->parent = spans_parent_parse(ops->header(sink, "traceparent"));
    *out = r; /* before others can see it: they may answer at once */
    rc = intake_push(c, r, st);
    if (rc != ST_OK) {
        metrics_error(&c->metrics, rc);
        *out = NULL;
        r->ops = NULL;
        request_unref(r);
    }
    return rc;
}

void request_writable(struct request *r)
{
    if (atomic_exchange(&r->want_writable, false))
        mailbox_post(&r->coord->box, &r->mail, REQUEST_WRITABLE, &r->refs);
}

void request_closed(struct request *r, bool cancelled)
{
    if (cancelled)
        atomic_store_explicit(&r->cancelled, true, memory_order_relaxed);
    mailbox_post(&r->coord->box, &r->mail, REQUEST_CLOSED, &r->refs);
    request_unref(r);
}
