/* rpc_client.c - calls with one message each way.
 *
 * Each call has a small completion queue of its own on which its callers wait for one tag each ("pluck"): the thread that
 * waits is the one that polls the sockets, so an answer reaches it without a hop over another thread.
 */
#include "proto/rpc_internal.h"

#define DEFAULT_TIMEOUT_MS 10000

bool rpc_pluck(grpc_completion_queue *cq, struct rpc_tag *tag, gpr_timespec deadline, bool *ok)
{
    grpc_event ev = grpc_completion_queue_pluck(cq, tag, deadline, NULL);
    if (ev.type != GRPC_OP_COMPLETE)
        return false;
    rpc_tag_disarm(tag);
    *ok = ev.success != 0;
    return true;
}

void rpc_cq_destroy(grpc_completion_queue *cq)
{
    grpc_completion_queue_shutdown(cq);
    grpc_completion_queue_pluck(cq, NULL, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_completion_queue_destroy(cq);
}

/* What the core writes while a unary call is under way. */
struct unary {
    grpc_metadata_array initial, trailing;
    grpc_byte_buffer *request, *reply;
    grpc_status_code code;
    grpc_slice details;
    struct rpc_tag tag;
};

static void unary_run(struct unary *u, struct rpc_client_call *call, grpc_completion_queue *cq)
{
    grpc_op ops[6] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA}, {.op = GRPC_OP_SEND_MESSAGE}, {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA}, {.op = GRPC_OP_RECV_MESSAGE}, {.op = GRPC_OP_RECV_STATUS_ON_CLIENT},
    };
    ops[0].data.send_initial_metadata.metadata = call->headers;
    ops[0].data.send_initial_metadata.count = call->n_headers;
    ops[1].data.send_message.send_message = u->request;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &u->initial;
    ops[4].data.recv_message.recv_message = &u->reply;
    ops[5].data.recv_status_on_client.trailing_metadata = &u->trailing;
    ops[5].data.recv_status_on_client.status = &u->code;
    ops[5].data.recv_status_on_client.status_details = &u->details;
    rpc_batch_start(call->core, ops, 6, &u->tag);
    bool ok;
    rpc_pluck(cq, &u->tag, gpr_inf_future(GPR_CLOCK_MONOTONIC), &ok); /* the call's deadline bounds it */
}

static enum status_code unary_result(struct unary *u, const struct rpc_channel *ch, const char *path,
                                     const ProtobufCMessageDescriptor *reply_type, ProtobufCMessage **reply,
                                     struct status *st)
{
    if (u->code != GRPC_STATUS_OK)
        return rpc_client_status(ch, u->code, u->details, st);
    if (!u->reply)
        return status_set(st, ST_INTERNAL, "%s: %s answered OK without a message", rpc_channel_address(ch), path);
    grpc_slice bytes = rpc_flatten(u->reply);
    ProtobufCMessage *m = rpc_unpack(reply_type, GRPC_SLICE_START_PTR(bytes), GRPC_SLICE_LENGTH(bytes));
    grpc_slice_unref(bytes);
    if (!m)
        return status_set(st, ST_INTERNAL, "%s: %s answered with bytes that are not a valid %s",
                          rpc_channel_address(ch), path, reply_type->name);
    *reply = m;
    return ST_OK;
}

enum status_code rpc_unary(struct rpc_channel *ch, const char *path, const ProtobufCMessage *request,
                           const ProtobufCMessageDescriptor *reply_type, ProtobufCMessage **reply, uint32_t timeout_ms,
                           struct status *st)
{
    size_t bytes;
    struct unary u = {.request = rpc_pack(request, &bytes), .details = grpc_empty_slice()};
    grpc_metadata_array_init(&u.initial);
    grpc_metadata_array_init(&u.trailing);
    grpc_completion_queue *cq = grpc_completion_queue_create_for_pluck(NULL);
    struct rpc_client_call call;
    rpc_client_call_begin(&call, ch, path, timeout_ms ? timeout_ms : DEFAULT_TIMEOUT_MS, cq);
    unary_run(&u, &call, cq);
    enum status_code rc = unary_result(&u, ch, path, reply_type, reply, st);
    rpc_client_call_end(&call);
    rpc_cq_destroy(cq);
    grpc_byte_buffer_destroy(u.request);
    if (u.reply)
        grpc_byte_buffer_destroy(u.reply);
    grpc_slice_unref(u.details);
    grpc_metadata_array_destroy(&u.initial);
    grpc_metadata_array_destroy(&u.trailing);
    return rc;
}
