/* rpc_call.c - one call on the server, from the slot that waits for it to its last reference.
 *
 *        slot ──accept──▶ on_open ─▶ on_message* ─▶ on_half_close ─▶ ... ──▶ on_close
 *                          └─ rpc_call_send / _finish / _cancel from any thread ─┘
 *
 * Three things run side by side and meet only under call->lock:
 *  - the read side (bidi): one RECV_MESSAGE out at a time, started again when on_message has returned;
 *  - the write side: one batch out at a time, made of the next message and, when that was the last, the status;
 *  - the close: RECV_CLOSE_ON_SERVER in a batch of its own, out from the beginning, back when the call is over.
 *
 * Completions leave bits in call->events. The poll thread that finds no other thread dispatching runs the callbacks until
 * no bit is left, with the lock released: so callbacks never overlap, and no other poll thread waits for them.
 *
 * call->uses counts batches that are out and threads that are about to enter the core. At 0 nothing can come any more
 * (the close is back and every callback has run): the core's call is released and the server told. Memory lives on for as
 * long as somebody has a reference.
 */
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/rpc_call_internal.h"

static void accept_done(void *owner, bool ok);
static void close_done(void *owner, bool ok);
static void read_done(void *owner, bool ok);

/* ---- memory ---- */

static struct rpc_call *call_new(struct rpc_server *s, size_t index)
{
    struct rpc_call *call = calloc(1, sizeof *call);
    if (!call)
        return NULL;
    atomic_init(&call->refs, 1);
    call->server = s;
    call->method = index < s->n_methods ? &s->methods[index] : NULL;
    call->slot_index = index;
    call->accept_tag = (struct rpc_tag){.done = accept_done, .owner = call};
    call->close_tag = (struct rpc_tag){.done = close_done, .owner = call};
    call->read_tag = (struct rpc_tag){.done = read_done, .owner = call};
    call->write_tag = (struct rpc_tag){.done = rpc_call_write_done, .owner = call};
    grpc_metadata_array_init(&call->metadata);
    grpc_call_details_init(&call->details);
    call->tail = &call->head;
    call->deadline_us = INT64_MAX;
    call->detail = grpc_empty_slice();
    for (size_t i = 0; i < 2; i++)
        call->trailers[i].value = grpc_empty_slice();
    pthread_mutex_init(&call->lock, NULL);
    return call;
}

struct rpc_call *rpc_call_ref(struct rpc_call *call)
{
    atomic_fetch_add_explicit(&call->refs, 1, memory_order_relaxed);
    return call;
}

void rpc_call_unref(struct rpc_call *call)
{
    if (atomic_fetch_sub_explicit(&call->refs, 1, memory_order_acq_rel) != 1)
        return;
    pthread_mutex_destroy(&call->lock);
    free(call->strings);
    free(call);
}

/* What must be given back while the core is still up: a user's reference may outlive the server. */
static void release_core(struct rpc_call *call, grpc_call *core)
{
    if (call->in)
        grpc_byte_buffer_destroy(call->in);
    call->in = NULL;
    grpc_metadata_array_destroy(&call->metadata);
    grpc_call_details_destroy(&call->details);
    grpc_slice_unref(call->detail);
    for (size_t i = 0; i < 2; i++)
        grpc_slice_unref(call->trailers[i].value);
    if (core)
        grpc_call_unref(core);
}

/* With the lock held; releases it. */
static void use_put_unlock(struct rpc_call *call)
{
    bool last = --call->uses == 0;
    grpc_call *core = call->core;
    if (last) {
        call->core = NULL;
        rpc_call_drop_queue(call);
    }
    pthread_mutex_unlock(&call->lock);
    if (!last)
        return;
    release_core(call, core);
    if (call->owes_slot)
        rpc_slot_open(call->server, call->slot_index);
    rpc_server_call_ends(call->server, core != NULL);
    rpc_call_unref(call);
}

void rpc_call_use_put(struct rpc_call *call)
{
    pthread_mutex_lock(&call->lock);
    use_put_unlock(call);
}

/* ---- callbacks ---- */

static void read_next(struct rpc_call *call)
{
    pthread_mutex_lock(&call->lock);
    bool go = call->core && !call->closed;
    grpc_call *core = call->core;
    if (go)
        call->uses++;
    pthread_mutex_unlock(&call->lock);
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    op.data.recv_message.recv_message = &call->in;
    if (go)
        rpc_batch_start(core, &op, 1, &call->read_tag);
}

static void run_incoming(struct rpc_call *call, void (*handler)(struct rpc_call *, const void *, size_t, void *))
{
    grpc_slice bytes = call->in ? rpc_flatten(call->in) : grpc_empty_slice();
    if (handler)
        handler(call, call->in ? GRPC_SLICE_START_PTR(bytes) : NULL, GRPC_SLICE_LENGTH(bytes), call->method->ctx);
    grpc_slice_unref(bytes);
    if (call->in)
        grpc_byte_buffer_destroy(call->in);
    call->in = NULL;
    if (call->method->kind == RPC_BIDI)
        read_next(call);
}

static void run_event(struct rpc_call *call, enum event e)
{
    const struct rpc_method *m = call->method;
    switch (e) {
    case EV_OPEN:
        run_incoming(call, m->on_open);
        break;
    case EV_MESSAGE:
        run_incoming(call, m->on_message);
        break;
    case EV_HALF_CLOSE:
        if (m->on_half_close)
            m->on_half_close(call, m->ctx);
        break;
    case EV_WRITABLE:
        if (m->on_writable)
            m->on_writable(call, m->ctx);
        break;
    case EV_CLOSE:
        if (m->on_close)
            m->on_close(call, call->cancelled != 0, m->ctx);
        atomic_fetch_sub_explicit(&call->server->live, 1, memory_order_relaxed);
        break;
    }
}

/* With the lock held. The next event in the order of a call's life; 0 when there is none. Once the call is over only
 * on_open, if it has not run yet, and on_close are left. */
static enum event next_event(struct rpc_call *call, unsigned *turn)
{
    if (*turn == 0 || call->closed) {
        *turn |= call->events;
        call->events = 0;
    }
    if (call->closed)
        *turn &= EV_OPEN | EV_CLOSE;
    unsigned lowest = *turn & -*turn;
    *turn &= ~lowest;
    return (enum event)lowest;
}

void rpc_call_dispatch(struct rpc_call *call)
{
    pthread_mutex_lock(&call->lock);
    if (!call->dispatching) {
        unsigned turn = 0; /* events taken and not yet run: each kind has its turn, however fast another comes again */
        enum event e;
        call->dispatching = true;
        while ((e = next_event(call, &turn)) != 0) {
            pthread_mutex_unlock(&call->lock);
            run_event(call, e);
            pthread_mutex_lock(&call->lock);
        }
        call->dispatching = false;
    }
    pthread_mutex_unlock(&call->lock);
}

/* ---- completions ---- */

static void close_done(void *owner, bool ok)
{
    struct rpc_call *call = owner;
    (void)ok;
    pthread_mutex_lock(&call->lock);
    call->closed = true;
    rpc_call_drop_queue(call);
    if (call->opened)
        call->events |= EV_CLOSE;
    pthread_mutex_unlock(&call->lock);
    rpc_call_dispatch(call);
    rpc_call_use_put(call);
}

static void read_done(void *owner, bool ok)
{
    struct rpc_call *call = owner;
    /* A cancelled call, too, ends its reading with no message and no error. */
    bool half_close = ok && !call->in && !grpc_call_failed_before_recv_message(call->core);
    pthread_mutex_lock(&call->lock);
    if (call->in)
        call->events |= EV_MESSAGE;
    else if (half_close)
        call->events |= EV_HALF_CLOSE;
    pthread_mutex_unlock(&call->lock);
    rpc_call_dispatch(call);
    rpc_call_use_put(call);
}

static void read_facts(struct rpc_call *call)
{
    gpr_timespec d = gpr_convert_clock_type(call->deadline, GPR_CLOCK_MONOTONIC);
    if (gpr_time_cmp(d, gpr_inf_future(GPR_CLOCK_MONOTONIC)) != 0)
        call->deadline_us = d.tv_sec * 1000000 + d.tv_nsec / 1000;
    rpc_caller_take(call->caller, call->core, &call->metadata); /* and no token in the strings */
    char *peer = grpc_call_get_peer(call->core);
    call->strings = rpc_strings_copy(peer, &call->metadata);
    gpr_free(peer);
}

static void refuse_unknown(struct rpc_call *call)
{
    struct status st;
    size_t n = GRPC_SLICE_LENGTH(call->details.method);
    status_set(&st, ST_UNIMPLEMENTED, "method %.*s is not known here", (int)(n < 256 ? n : 256),
               (const char *)GRPC_SLICE_START_PTR(call->details.method));
    rpc_call_finish(call, &st, 0);
}

static void accept_done(void *owner, bool ok)
{
    struct rpc_call *call = owner;
    if (!ok) { /* the server is shutting down */
        rpc_call_use_put(call);
        return;
    }
    rpc_server_call_begins(call->server);
    call->owes_slot = !rpc_slot_open(call->server, call->slot_index);
    read_facts(call);
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    op.data.recv_close_on_server.cancelled = &call->cancelled;
    bool has_request = call->in || !call->method || call->method->kind == RPC_BIDI;
    call->opened = call->method && has_request;
    if (call->opened) {
        call->events = EV_OPEN;
        atomic_fetch_add_explicit(&call->server->live, 1, memory_order_relaxed);
    }
    call->uses++;
    rpc_batch_start(call->core, &op, 1, &call->close_tag);
    if (!call->method) {
        refuse_unknown(call);
    } else if (!has_request) {
        struct status st;
        status_set(&st, ST_INVALID_ARGUMENT, "%s takes one request message, none came", call->method->path);
        rpc_call_finish(call, &st, 0);
    } else {
        rpc_call_dispatch(call);
    }
    rpc_call_use_put(call);
}

bool rpc_slot_open(struct rpc_server *s, size_t index)
{
    if (atomic_load_explicit(&s->stopping, memory_order_relaxed))
        return true;
    struct rpc_call *call = call_new(s, index);
    if (!call)
        return false;
    call->uses = 1;
    rpc_server_slot_begins(s);
    rpc_tag_arm(&call->accept_tag);
    grpc_call_error err;
    if (call->method)
        err = grpc_server_request_registered_call(s->core, s->registered[index], &call->core, &call->deadline,
                                                  &call->metadata, call->method->kind == RPC_BIDI ? NULL : &call->in,
                                                  s->cq, s->cq, &call->accept_tag);
    else
        err = grpc_server_request_call(s->core, &call->core, &call->details, &call->metadata, s->cq, s->cq,
                                       &call->accept_tag);
    if (err != GRPC_CALL_OK) { /* the core refuses only what it was never meant to be asked */
        fprintf(stderr, "rpc: the gRPC core refused a request slot: %s\n", grpc_call_error_to_string(err));
        abort();
    }
    return true;
}

/* ---- facts about the call ---- */

void rpc_call_set_data(struct rpc_call *call, void *data)
{
    atomic_store_explicit(&call->data, data, memory_order_release);
}

void *rpc_call_data(const struct rpc_call *call)
{
    return atomic_load_explicit(&((struct rpc_call *)call)->data, memory_order_acquire);
}

int64_t rpc_call_deadline_us(const struct rpc_call *call)
{
    return call->deadline_us;
}

const char *rpc_call_peer(const struct rpc_call *call)
{
    return call->strings ? call->strings : "unknown";
}

const char *rpc_call_metadata(const struct rpc_call *call, const char *key)
{
    return rpc_strings_find(call->strings, key);
}

void rpc_call_caller(const struct rpc_call *call, uint8_t out[RPC_CALLER_BYTES])
{
    memcpy(out, call->caller, RPC_CALLER_BYTES);
}
