/* rpc_many.c - many server-streaming calls on one completion queue, for one thread that makes load and measures it.
 *
 * Of each call up to three batches are out: the request with the headers both ways, the status, and one message. A call has
 * ended when all of them are back; only then its status is told.
 */
#include <stdlib.h>

#include "proto/rpc_internal.h"

struct many_call {
    struct rpc_many *many;
    struct rpc_channel *channel;
    struct rpc_client_call call;
    struct rpc_tag open_tag, status_tag, recv_tag;
    uint32_t out; /* batches */
    void *user;
    struct many_call *next, **link; /* in rpc_many.calls */

    /* written by the core while their batches are out */
    grpc_metadata_array initial, trailing;
    grpc_byte_buffer *request, *in;
    grpc_status_code code;
    grpc_slice details;
};

struct rpc_many {
    grpc_completion_queue *cq;
    struct many_call *calls;
    struct many_call *told; /* its message was handed out: the next one is asked for when the user comes back */
    grpc_slice bytes;
};

enum status_code rpc_many_create(struct rpc_many **out, struct status *st)
{
    struct rpc_many *m = calloc(1, sizeof *m);
    if (!m)
        return status_nomem(st, "calls", sizeof *m);
    rpc_core_start();
    m->cq = grpc_completion_queue_create_for_next(NULL);
    m->bytes = grpc_empty_slice();
    *out = m;
    return ST_OK;
}

static void start(struct many_call *c, const grpc_op *ops, size_t n, struct rpc_tag *tag)
{
    c->out++;
    rpc_batch_start(c->call.core, ops, n, tag);
}

static void receive(struct many_call *c)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    op.data.recv_message.recv_message = &c->in;
    start(c, &op, 1, &c->recv_tag);
}

enum status_code rpc_many_start(struct rpc_many *m, struct rpc_channel *ch, const char *path,
                                const ProtobufCMessage *request, uint64_t deadline_ms, void *user, struct status *st)
{
    struct many_call *c = calloc(1, sizeof *c);
    if (!c)
        return status_nomem(st, "call", sizeof *c);
    size_t bytes;
    *c = (struct many_call){.many = m, .channel = ch, .user = user, .details = grpc_empty_slice()};
    c->open_tag.owner = c->status_tag.owner = c->recv_tag.owner = c;
    grpc_metadata_array_init(&c->initial);
    grpc_metadata_array_init(&c->trailing);
    c->request = rpc_pack(request, &bytes);
    c->next = m->calls;
    c->link = &m->calls;
    if (c->next)
        c->next->link = &c->next;
    m->calls = c;
    rpc_client_call_begin(&c->call, ch, path, deadline_ms, m->cq);
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
    op.data.recv_status_on_client.trailing_metadata = &c->trailing;
    op.data.recv_status_on_client.status = &c->code;
    op.data.recv_status_on_client.status_details = &c->details;
    start(c, &op, 1, &c->status_tag);
    grpc_op ops[4] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                      {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
                      {.op = GRPC_OP_RECV_INITIAL_METADATA}};
    ops[0].data.send_initial_metadata.metadata = c->call.headers;
    ops[0].data.send_initial_metadata.count = c->call.n_headers;
    ops[1].data.send_message.send_message = c->request;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &c->initial;
    start(c, ops, 4, &c->open_tag);
    receive(c);
    return ST_OK;
}

static void call_free(struct many_call *c)
{
    *c->link = c->next;
    if (c->next)
        c->next->link = c->link;
    rpc_client_call_end(&c->call);
    grpc_byte_buffer_destroy(c->request);
    grpc_slice_unref(c->details);
    grpc_metadata_array_destroy(&c->initial);
    grpc_metadata_array_destroy(&c->trailing);
    free(c);
}

/* What was handed out last is done with. */
static void release(struct rpc_many *m)
{
    grpc_slice_unref(m->bytes);
    m->bytes = grpc_empty_slice();
    if (m->told)
        receive(m->told);
    m->told = NULL;
}

/* A batch is back. Whether there is something to tell. */
static bool take(struct rpc_many *m, const struct rpc_tag *tag, struct rpc_many_event *event)
{
    struct many_call *c = tag->owner;
    c->out--;
    if (tag == &c->recv_tag && c->in) {
        m->bytes = rpc_flatten(c->in);
        grpc_byte_buffer_destroy(c->in);
        c->in = NULL;
        m->told = c;
        *event = (struct rpc_many_event){.user = c->user,
                                         .message = GRPC_SLICE_START_PTR(m->bytes),
                                         .len = GRPC_SLICE_LENGTH(m->bytes),
                                         .status = STATUS_INIT};
        return true;
    }
    if (c->out)
        return false;
    *event = (struct rpc_many_event){.user = c->user, .status = STATUS_INIT};
    if (c->code != GRPC_STATUS_OK)
        rpc_client_status(c->channel, c->code, c->details, &event->status);
    call_free(c);
    return true;
}

bool rpc_many_next(struct rpc_many *m, struct rpc_many_event *event, int64_t timeout_us)
{
    release(m);
    gpr_timespec until = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_micros(timeout_us, GPR_TIMESPAN));
    for (;;) {
        grpc_event ev = grpc_completion_queue_next(m->cq, until, NULL);
        if (ev.type != GRPC_OP_COMPLETE)
            return false;
        rpc_tag_disarm(ev.tag);
        if (take(m, ev.tag, event))
            return true;
    }
}

void rpc_many_destroy(struct rpc_many *m)
{
    if (!m)
        return;
    release(m);
    for (struct many_call *c = m->calls; c; c = c->next)
        grpc_call_cancel(c->call.core, NULL);
    while (m->calls) {
        struct rpc_many_event event;
        (void)rpc_many_next(m, &event, 1000000);
    }
    grpc_completion_queue_shutdown(m->cq);
    while (grpc_completion_queue_next(m->cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type != GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_completion_queue_destroy(m->cq);
    free(m);
}
