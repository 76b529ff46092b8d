/* rpc_stream.c - a client's stream of messages in both directions.
 *
 * Four batches may be out at once, each with its own tag: the headers (opened and not looked at again), the status (from
 * the beginning, back at the end of the call), one message being received, one message or half close being sent. A wait
 * that runs out of time leaves its batch out; rpc_stream_close cancels the call and collects what is still out.
 *
 * A tag is waited for by one thread at a time: recv_tag by the receiver, send_tag by the holder of `sending`, status_tag by
 * the holder of `status_busy`. `lock` guards the flags and is not held while waiting.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/rpc_internal.h"

#define DEFAULT_SEND_TIMEOUT_MS 10000

struct rpc_stream {
    struct rpc_channel *channel;
    grpc_completion_queue *cq;
    struct rpc_client_call call;
    struct rpc_tag open_tag, headers_tag, status_tag, recv_tag, send_tag;

    /* Written by the core while their batches are out. */
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice details;
    grpc_byte_buffer *in;

    /* The receiver's. */
    bool receiving;   /* recv_tag is out */
    bool exhausted;   /* no message will come any more */
    grpc_slice bytes; /* the message last handed out */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool sending;  /* one thread owns send_tag and `out` */
    bool send_out; /* send_tag was not back in time: nothing can be sent any more */
    bool half_closed;
    bool cancelled;   /* by rpc_stream_cancel */
    bool status_busy; /* one thread waits for status_tag */
    bool ended;       /* status_tag is back: `code`, `details`, `trailers` are final */
    char *trailers;   /* strings block */
    grpc_byte_buffer *out;
};

static gpr_timespec no_wait(void)
{
    return gpr_time_0(GPR_CLOCK_MONOTONIC);
}

static void start_call(struct rpc_stream *s)
{
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
    op.data.recv_status_on_client.trailing_metadata = &s->trailing;
    op.data.recv_status_on_client.status = &s->code;
    op.data.recv_status_on_client.status_details = &s->details;
    rpc_batch_start(s->call.core, &op, 1, &s->status_tag);
    op = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
    op.data.send_initial_metadata.metadata = s->call.headers;
    op.data.send_initial_metadata.count = s->call.n_headers;
    rpc_batch_start(s->call.core, &op, 1, &s->open_tag);
    op = (grpc_op){.op = GRPC_OP_RECV_INITIAL_METADATA};
    op.data.recv_initial_metadata.recv_initial_metadata = &s->initial;
    rpc_batch_start(s->call.core, &op, 1, &s->headers_tag);
}

enum status_code rpc_stream_open(struct rpc_stream **out, struct rpc_channel *ch, const char *path,
                                 uint64_t deadline_ms, struct status *st)
{
    struct rpc_stream *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "stream", sizeof *s);
    s->channel = ch;
    s->details = s->bytes = grpc_empty_slice();
    grpc_metadata_array_init(&s->initial);
    grpc_metadata_array_init(&s->trailing);
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&s->changed, &attr);
    pthread_condattr_destroy(&attr);
    s->cq = grpc_completion_queue_create_for_pluck(NULL);
    rpc_client_call_begin(&s->call, ch, path, deadline_ms, s->cq);
    start_call(s);
    *out = s;
    return ST_OK;
}

/* Waits for the end of the call. False: not in time, or another thread is at it and `deadline` is past. */
static bool await_end(struct rpc_stream *s, gpr_timespec deadline)
{
    struct timespec end = {.tv_sec = (time_t)deadline.tv_sec, .tv_nsec = deadline.tv_nsec};
    bool forever = gpr_time_cmp(deadline, gpr_inf_future(GPR_CLOCK_MONOTONIC)) == 0;
    int rc = 0;
    pthread_mutex_lock(&s->lock);
    while (s->status_busy && !s->ended && rc != ETIMEDOUT)
        rc = forever ? pthread_cond_wait(&s->changed, &s->lock) : pthread_cond_timedwait(&s->changed, &s->lock, &end);
    bool ended = s->ended;
    bool mine = !ended && !s->status_busy;
    if (mine)
        s->status_busy = true;
    pthread_mutex_unlock(&s->lock);
    if (!mine)
        return ended;

    bool ok;
    ended = rpc_pluck(s->cq, &s->status_tag, deadline, &ok);
    char *trailers = ended ? rpc_strings_copy("", &s->trailing) : NULL;
    pthread_mutex_lock(&s->lock);
    s->status_busy = false;
    s->ended = ended;
    s->trailers = trailers;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    return ended;
}

/* ---- sending ---- */

/* A send did not go through: why? */
static enum status_code send_failure(struct rpc_stream *s, struct status *st)
{
    bool ended = await_end(s, no_wait());
    pthread_mutex_lock(&s->lock);
    bool cancelled = s->cancelled;
    pthread_mutex_unlock(&s->lock);
    if (ended && s->code != GRPC_STATUS_OK)
        return rpc_client_status(s->channel, s->code, s->details, st);
    if (cancelled)
        return status_set(st, ST_CANCELLED, "the stream was cancelled");
    return status_set(st, ST_UNAVAILABLE, "%s: the stream has ended", rpc_channel_address(s->channel));
}

/* Takes the right to send. */
static enum status_code send_begin(struct rpc_stream *s, gpr_timespec deadline, struct status *st)
{
    struct timespec end = {.tv_sec = (time_t)deadline.tv_sec, .tv_nsec = deadline.tv_nsec};
    enum status_code rc = ST_OK;
    int err = 0;
    pthread_mutex_lock(&s->lock);
    while (s->sending && err != ETIMEDOUT)
        err = pthread_cond_timedwait(&s->changed, &s->lock, &end);
    if (s->sending || s->send_out)
        rc = status_set(st, ST_DEADLINE_EXCEEDED, "%s: the peer did not take a message in time",
                        rpc_channel_address(s->channel));
    else if (s->half_closed)
        rc = status_set(st, ST_FAILED_PRECONDITION, "a message after the half close of the stream");
    else
        s->sending = true;
    pthread_mutex_unlock(&s->lock);
    return rc;
}

/* Starts op on send_tag and waits for it; gives the right to send back. */
static enum status_code send_op(struct rpc_stream *s, const grpc_op *op, gpr_timespec deadline, struct status *st)
{
    bool ok = false;
    rpc_batch_start(s->call.core, op, 1, &s->send_tag);
    bool back = rpc_pluck(s->cq, &s->send_tag, deadline, &ok);
    if (!back)
        grpc_call_cancel(s->call.core, NULL); /* half a message may be on its way: nothing can follow it */
    if (back && s->out) {
        grpc_byte_buffer_destroy(s->out);
        s->out = NULL;
    }
    pthread_mutex_lock(&s->lock);
    s->sending = false;
    s->send_out = !back;
    if (op->op == GRPC_OP_SEND_CLOSE_FROM_CLIENT)
        s->half_closed = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    if (!back)
        return status_set(st, ST_DEADLINE_EXCEEDED, "%s: the peer did not take a message in time",
                          rpc_channel_address(s->channel));
    return ok ? ST_OK : send_failure(s, st);
}

enum status_code rpc_stream_send(struct rpc_stream *s, const ProtobufCMessage *m, uint32_t timeout_ms,
                                 struct status *st)
{
    gpr_timespec deadline = rpc_after_ms(timeout_ms ? timeout_ms : DEFAULT_SEND_TIMEOUT_MS);
    enum status_code rc = send_begin(s, deadline, st);
    if (rc != ST_OK)
        return rc;
    size_t bytes;
    s->out = rpc_pack(m, &bytes);
    grpc_op op = {.op = GRPC_OP_SEND_MESSAGE};
    op.data.send_message.send_message = s->out;
    return send_op(s, &op, deadline, st);
}

enum status_code rpc_stream_half_close(struct rpc_stream *s, uint32_t timeout_ms, struct status *st)
{
    gpr_timespec deadline = rpc_after_ms(timeout_ms ? timeout_ms : DEFAULT_SEND_TIMEOUT_MS);
    enum status_code rc = send_begin(s, deadline, st);
    if (rc != ST_OK)
        return rc;
    grpc_op op = {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT};
    return send_op(s, &op, deadline, st);
}

/* ---- receiving ---- */

static enum status_code recv_late(bool *timed_out, struct status *st)
{
    if (timed_out)
        *timed_out = true;
    return status_set(st, ST_DEADLINE_EXCEEDED, "no message came in time");
}

enum status_code rpc_stream_recv(struct rpc_stream *s, const void **msg, size_t *len, uint32_t timeout_ms,
                                 bool *timed_out, struct status *st)
{
    gpr_timespec deadline = rpc_after_ms(timeout_ms);
    bool ok = false;
    if (timed_out)
        *timed_out = false;
    if (!s->exhausted && !s->receiving) {
        grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
        op.data.recv_message.recv_message = &s->in;
        rpc_batch_start(s->call.core, &op, 1, &s->recv_tag);
        s->receiving = true;
    }
    if (s->receiving) {
        if (!rpc_pluck(s->cq, &s->recv_tag, deadline, &ok))
            return recv_late(timed_out, st);
        s->receiving = false;
        grpc_slice_unref(s->bytes);
        s->bytes = grpc_empty_slice();
        if (s->in) {
            s->bytes = rpc_flatten(s->in);
            grpc_byte_buffer_destroy(s->in);
            s->in = NULL;
            *msg = GRPC_SLICE_START_PTR(s->bytes);
            *len = GRPC_SLICE_LENGTH(s->bytes);
            return ST_OK;
        }
        s->exhausted = true;
    }
    if (!await_end(s, deadline))
        return recv_late(timed_out, st);
    if (s->code != GRPC_STATUS_OK)
        return rpc_client_status(s->channel, s->code, s->details, st);
    *msg = NULL;
    *len = 0;
    return ST_OK;
}

void rpc_stream_cancel(struct rpc_stream *s)
{
    pthread_mutex_lock(&s->lock);
    s->cancelled = true;
    pthread_mutex_unlock(&s->lock);
    grpc_call_cancel(s->call.core, NULL);
}

const char *rpc_stream_trailer(const struct rpc_stream *s, const char *key)
{
    struct rpc_stream *t = (struct rpc_stream *)s;
    pthread_mutex_lock(&t->lock);
    const char *value = rpc_strings_find(t->trailers, key);
    pthread_mutex_unlock(&t->lock);
    return value;
}

void rpc_stream_close(struct rpc_stream *s)
{
    if (!s)
        return;
    gpr_timespec forever = gpr_inf_future(GPR_CLOCK_MONOTONIC); /* a cancelled call gives all its batches back */
    bool ok;
    grpc_call_cancel(s->call.core, NULL);
    if (s->receiving)
        rpc_pluck(s->cq, &s->recv_tag, forever, &ok);
    if (s->send_out)
        rpc_pluck(s->cq, &s->send_tag, forever, &ok);
    rpc_pluck(s->cq, &s->open_tag, forever, &ok);
    rpc_pluck(s->cq, &s->headers_tag, forever, &ok);
    await_end(s, forever);
    rpc_client_call_end(&s->call);
    rpc_cq_destroy(s->cq);
    if (s->in)
        grpc_byte_buffer_destroy(s->in);
    if (s->out)
        grpc_byte_buffer_destroy(s->out);
    grpc_slice_unref(s->bytes);
    grpc_slice_unref(s->details);
    grpc_metadata_array_destroy(&s->initial);
    grpc_metadata_array_destroy(&s->trailing);
    free(s->trailers);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    free(s);
}
