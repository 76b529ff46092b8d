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

#include "proto/rpc_internal.h"

#define MESSAGE_OVERHEAD 64 /* bytes counted for each queued message, so that empty ones are not free */

enum event { EV_OPEN = 1, EV_MESSAGE = 2, EV_HALF_CLOSE = 4, EV_WRITABLE = 8, EV_CLOSE = 16 };

struct out_message {
    struct out_message *next;
    grpc_byte_buffer *buffer;
    size_t cost; /* bytes it takes of the send queue */
};

struct rpc_call {
    atomic_uint refs; /* the core's side holds one until uses is 0 */
    struct rpc_server *server;
    const struct rpc_method *method; /* NULL: not in the table */
    size_t slot_index;
    struct rpc_tag accept_tag, close_tag, read_tag, write_tag;
    _Atomic(void *) data;

    /* Written by the core while the batch is out, read by whoever gets its tag. */
    grpc_metadata_array metadata;
    grpc_call_details details;
    gpr_timespec deadline;
    grpc_byte_buffer *in;
    int cancelled;

    /* Constant from on_open on. */
    char *strings; /* peer, then request headers */
    int64_t deadline_us;

    pthread_mutex_t lock; /* a leaf: nothing is called with it held */
    grpc_call *core;      /* NULL: not yet, or no longer */
    unsigned uses;
    unsigned events;
    bool dispatching;
    bool opened; /* on_open is due or has run, so on_close is owed */
    bool closed; /* RECV_CLOSE_ON_SERVER is back */
    bool initial_sent;
    bool writing;
    bool finish_wanted; /* status is set */
    bool finish_started;
    struct out_message *head, **tail; /* not yet given to the core */
    struct out_message *current;      /* being written */
    uint32_t pending;                 /* messages in the queue and being written */
    size_t queued_bytes;              /* their cost */
    struct status status;
    uint32_t retry_after_ms;
    /* What the core reads while the status batch is out. */
    grpc_slice detail;
    grpc_metadata trailers[2];
    bool owes_slot; /* no memory for the slot that should have followed */
};

static void accept_done(void *owner, bool ok);
static void close_done(void *owner, bool ok);
static void read_done(void *owner, bool ok);
static void write_done(void *owner, bool ok);

/* ---- memory ---- */

static void message_free(struct out_message *m)
{
    if (!m)
        return;
    grpc_byte_buffer_destroy(m->buffer);
    free(m);
}

static void drop_queue(struct rpc_call *call)
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
    call->write_tag = (struct rpc_tag){.done = write_done, .owner = call};
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
        drop_queue(call);
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

static void use_put(struct rpc_call *call)
{
    pthread_mutex_lock(&call->lock);
    use_put_unlock(call);
}

/* ---- writing ---- */

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

/* With the lock held; releases it. The core is entered without the lock: it may do a whole connection's work in here. */
static void write_next_unlock(struct rpc_call *call)
{
    grpc_op ops[3];
    size_t n = next_write(call, ops);
    grpc_call *core = call->core;
    pthread_mutex_unlock(&call->lock);
    if (n > 0)
        rpc_batch_start(core, ops, n, &call->write_tag);
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

/* Runs the callbacks that are due, unless another thread is at it: then that one will find them. */
static void dispatch(struct rpc_call *call)
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
    drop_queue(call);
    if (call->opened)
        call->events |= EV_CLOSE;
    pthread_mutex_unlock(&call->lock);
    dispatch(call);
    use_put(call);
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
    dispatch(call);
    use_put(call);
}

static void read_facts(struct rpc_call *call)
{
    gpr_timespec d = gpr_convert_clock_type(call->deadline, GPR_CLOCK_MONOTONIC);
    if (gpr_time_cmp(d, gpr_inf_future(GPR_CLOCK_MONOTONIC)) != 0)
        call->deadline_us = d.tv_sec * 1000000 + d.tv_nsec / 1000;
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
        use_put(call);
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
        dispatch(call);
    }
    use_put(call);
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

static void write_done(void *owner, bool ok)
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
        drop_queue(call); /* the call is lost: its close is on the way */
    else if (!call->head && !call->finish_wanted && call->opened)
        call->events |= EV_WRITABLE;
    write_next_unlock(call);
    message_free(written);
    dispatch(call);
    use_put(call);
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

enum status_code rpc_call_send(struct rpc_call *call, const ProtobufCMessage *m, struct status *st)
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
    write_next_unlock(call);
    return ST_OK;
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
    write_next_unlock(call);
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
    drop_queue(call);
    call->finish_wanted = true;
    call->finish_started = true; /* no status batch any more: the core sends the status itself */
    call->uses++;
    grpc_call *core = call->core;
    pthread_mutex_unlock(&call->lock);
    grpc_call_cancel_with_status(core, named ? (grpc_status_code)st->code : GRPC_STATUS_CANCELLED,
                                 named ? st->message : "cancelled by the server", NULL);
    use_put(call);
}

uint32_t rpc_call_pending(const struct rpc_call *call)
{
    struct rpc_call *c = (struct rpc_call *)call;
    pthread_mutex_lock(&c->lock);
    uint32_t n = c->pending;
    pthread_mutex_unlock(&c->lock);
    return n;
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
