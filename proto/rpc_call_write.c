/* rpc_call_write.c - the write side of a call: its send queue, the batches made of it, its end.
 *
 * One batch is out at a time, made of the next message and, when that was the last, the status. Any thread may add to the
 * queue; the core is entered without call->lock.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/rpc_call_internal.h"

#define MESSAGE_OVERHEAD 64 /* bytes counted for each queued message, so that empty ones are not free */

static void message_free(struct out_message *m)
{
    if (!m)
        return;
    grpc_byte_buffer_destroy(m->buffer);
    free(m);
}

void rpc_call_drop_queue(struct rpc_call *call)
{
    while (call->head) {
        struct out_message *m = call->head;
        call->head = m->next;
        call->pending--;
        call->queued_bytes -= m->cost;
        message_free(m);
    }
    call->tail = &call->head;
}

/* With the lock held: what a program reads of the status beside its code. Returns how many trailers that makes. */
static size_t make_trailers(struct rpc_call *call)
{
    size_t n = 0;
    if (call->retry_after_ms > 0) {
        char text[16];
        snprintf(text, sizeof text, "%u", call->retry_after_ms);
        call->trailers[n].key = grpc_slice_from_static_string("retry-after-ms");
        call->trailers[n++].value = grpc_slice_from_copied_string(text);
    }
    uint8_t details[RPC_DETAILS_MAX];
    size_t len = rpc_details_encode(&call->status, call->retry_after_ms, details);
    if (len > 0) {
        call->trailers[n].key = grpc_slice_from_static_string("grpc-status-details-bin");
        call->trailers[n++].value = grpc_slice_from_copied_buffer((const char *)details, len);
    }
    return n;
}

/* With the lock held. Fills ops with what is to be written now, 0: nothing. A batch may hold the headers, a message and
 * the status at once; a call that ends with an error before its first message sends headers and status in one batch,
 * which the core turns into "trailers only". */
static size_t next_write(struct rpc_call *call, grpc_op ops[3])
{
    if (!call->core || call->closed || call->writing || call->finish_started || (!call->head && !call->finish_wanted))
        return 0;
    size_t n = 0;
    memset(ops, 0, 3 * sizeof *ops);
    if (!call->initial_sent)
        ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    if (call->head) {
        struct out_message *m = call->head;
        call->head = m->next;
        if (!call->head)
            call->tail = &call->head;
        call->current = m;
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = m->buffer;
    }
    if (!call->head && call->finish_wanted) {
        call->finish_started = true;
        call->detail = grpc_slice_from_copied_string(call->status.message);
        ops[n].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
        ops[n].data.send_status_from_server.status = (grpc_status_code)call->status.code;
        ops[n].data.send_status_from_server.status_details = &call->detail;
        ops[n].data.send_status_from_server.trailing_metadata_count = make_trailers(call);
        ops[n++].data.send_status_from_server.trailing_metadata = call->trailers;
    }
    call->initial_sent = true;
    call->writing = true;
    call->uses++;
    return n;
}

/* With the lock held; releases it. The core is entered without the lock: it may do a whole connection's work in here.
 * With `in_place` the first completion of that work, mostly that of this very batch, is run here: left to the queue it
 * wakes a poll thread, which costs more than the write. */
static void write_next_unlock(struct rpc_call *call, bool in_place)
{
    grpc_op ops[3];
    size_t n = next_write(call, ops);
    grpc_call *core = call->core;
    grpc_completion_queue *cq = call->server->cq;
    void *tag;
    int ok;
    pthread_mutex_unlock(&call->lock);
    if (n == 0)
        return;
    if (in_place)
        grpc_completion_queue_thread_local_cache_init(cq);
    rpc_batch_start(core, ops, n, &call->write_tag);
    if (in_place && grpc_completion_queue_thread_local_cache_flush(cq, &tag, &ok))
        rpc_tag_run(tag, ok != 0);
}

void rpc_call_write_done(void *owner, bool ok)
{
    struct rpc_call *call = owner;
    pthread_mutex_lock(&call->lock);
    struct out_message *written = call->current;
    call->current = NULL;
    call->writing = false;
    if (written) {
        call->pending--;
        call->queued_bytes -= written->cost;
    }
    if (!ok)
        rpc_call_drop_queue(call); /* the call is lost: its close is on the way */
    else if (!call->head && !call->finish_wanted && call->opened)
        call->events |= EV_WRITABLE;
    write_next_unlock(call, false);
    message_free(written);
    rpc_call_dispatch(call);
    rpc_call_use_put(call);
}

static enum status_code refuse(enum status_code code, struct out_message *m, struct status *st, const char *why)
{
    message_free(m);
    return status_set(st, code, "%s", why);
}

static struct out_message *message_new(const ProtobufCMessage *m)
{
    struct out_message *out = malloc(sizeof *out);
    size_t bytes;
    if (!out)
        return NULL;
    out->next = NULL;
    out->buffer = rpc_pack(m, &bytes);
    out->cost = bytes + MESSAGE_OVERHEAD;
    return out;
}

/* With the lock held. */
static void append(struct rpc_call *call, struct out_message *m)
{
    *call->tail = m;
    call->tail = &m->next;
    call->pending++;
    call->queued_bytes += m->cost;
}

static enum status_code queue_message(struct rpc_call *call, const ProtobufCMessage *m, bool in_place,
                                      struct status *st)
{
    struct out_message *out = message_new(m);
    if (!out)
        return status_nomem(st, "message to send", sizeof *out);
    pthread_mutex_lock(&call->lock);
    bool over = !call->core || call->closed || call->finish_wanted;
    /* A message on its own is always taken: one that is larger than the queue could never be sent otherwise. */
    bool full = call->pending > 0 && call->queued_bytes + out->cost > call->server->max_send_queue_bytes;
    if (over || full) {
        pthread_mutex_unlock(&call->lock);
        return over ? refuse(ST_CANCELLED, out, st, "the call has ended")
                    : refuse(ST_RESOURCE_EXHAUSTED, out, st, "the send queue of the call is full");
    }
    append(call, out);
    write_next_unlock(call, in_place);
    return ST_OK;
}

enum status_code rpc_call_send(struct rpc_call *call, const ProtobufCMessage *m, struct status *st)
{
    return queue_message(call, m, false, st);
}

enum status_code rpc_call_send_in_place(struct rpc_call *call, const ProtobufCMessage *m, struct status *st)
{
    return queue_message(call, m, true, st);
}

/* With the lock held; releases it. The first to end the call wins. */
static void finish_unlock(struct rpc_call *call, struct out_message *last, const struct status *st,
                          uint32_t retry_after_ms)
{
    if (!call->core || call->closed || call->finish_wanted) {
        pthread_mutex_unlock(&call->lock);
        message_free(last);
        return;
    }
    if (last)
        append(call, last);
    call->finish_wanted = true;
    if (st)
        call->status = *st;
    call->retry_after_ms = retry_after_ms;
    write_next_unlock(call, false);
}

void rpc_call_finish(struct rpc_call *call, const struct status *st, uint32_t retry_after_ms)
{
    pthread_mutex_lock(&call->lock);
    finish_unlock(call, NULL, st, retry_after_ms);
}

void rpc_call_reply(struct rpc_call *call, const ProtobufCMessage *m)
{
    struct status st;
    struct out_message *out = message_new(m);
    if (!out)
        status_nomem(&st, "reply", sizeof *out);
    pthread_mutex_lock(&call->lock);
    finish_unlock(call, out, out ? NULL : &st, 0);
}

void rpc_call_cancel(struct rpc_call *call, const struct status *st)
{
    bool named = st && st->code != ST_OK;
    pthread_mutex_lock(&call->lock);
    if (!call->core || call->closed) {
        pthread_mutex_unlock(&call->lock);
        return;
    }
    rpc_call_drop_queue(call);
    call->finish_wanted = true;
    call->finish_started = true; /* no status batch any more: the core sends the status itself */
    call->uses++;
    grpc_call *core = call->core;
    pthread_mutex_unlock(&call->lock);
    grpc_call_cancel_with_status(core, named ? (grpc_status_code)st->code : GRPC_STATUS_CANCELLED,
                                 named ? st->message : "cancelled by the server", NULL);
    rpc_call_use_put(call);
}

uint32_t rpc_call_pending(const struct rpc_call *call)
{
    struct rpc_call *c = (struct rpc_call *)call;
    pthread_mutex_lock(&c->lock);
    uint32_t n = c->pending;
    pthread_mutex_unlock(&c->lock);
    return n;
}
