/* rpc_client.c - a channel, and calls with one message each way.
 *
 * Each call has a small completion queue of its own on which its callers wait for one tag each ("pluck"): the thread that
 * waits is the one that polls the sockets, so an answer reaches it without a hop over another thread.
 */
#include <grpc/grpc_security.h>
#include <stdlib.h>
#include <string.h>

#include "proto/rpc_internal.h"

#define DEFAULT_TIMEOUT_MS 10000

static grpc_arg arg_int(const char *key, int value)
{
    grpc_arg a = {.type = GRPC_ARG_INTEGER, .key = (char *)key};
    a.value.integer = value;
    return a;
}

static grpc_channel *core_channel_new(const char *target)
{
    grpc_arg args[] = {
        arg_int(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)RPC_MAX_MESSAGE_BYTES),
        arg_int(GRPC_ARG_MAX_METADATA_SIZE, (int)RPC_MAX_METADATA_BYTES),
        arg_int(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1), /* a channel is a connection of its own */
        arg_int(GRPC_ARG_ENABLE_HTTP_PROXY, 0),         /* http_proxy is not meant for a cluster's inner traffic */
        arg_int(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        /* While a server is away calls fail at once; it is looked for again soon after it has come back. */
        arg_int(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100),
        arg_int(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000),
        arg_int(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5000), /* in truth: the longest that one attempt to connect takes */
        /* A dead server is noticed within 30 s; the server allows a ping every 10 s. */
        arg_int(GRPC_ARG_KEEPALIVE_TIME_MS, 20000),
        arg_int(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000),
        arg_int(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
    };
    grpc_channel_args list = {sizeof args / sizeof *args, args};
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    grpc_channel *core = grpc_channel_create(target, plain, &list);
    grpc_channel_credentials_release(plain);
    return core;
}

enum status_code rpc_channel_create(struct rpc_channel **out, const char *address, struct status *st)
{
    char target[RPC_TARGET_MAX];
    enum status_code rc = rpc_address_target(address, "address", false, target, st);
    if (rc != ST_OK)
        return rc;
    struct rpc_channel *ch = calloc(1, sizeof *ch);
    if (!ch || !(ch->address = strdup(address))) {
        free(ch);
        return status_nomem(st, "channel", sizeof *ch);
    }
    sigset_t old;
    rpc_core_start();
    rpc_signals_block(&old);
    ch->core = core_channel_new(target);
    rpc_signals_restore(&old);
    *out = ch;
    return ST_OK;
}

void rpc_channel_destroy(struct rpc_channel *ch)
{
    if (!ch)
        return;
    grpc_channel_destroy(ch->core);
    free(ch->address);
    free(ch);
}

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

grpc_call *rpc_call_create(struct rpc_channel *ch, const char *path, uint64_t deadline_ms, grpc_completion_queue *cq)
{
    grpc_slice method = grpc_slice_from_copied_string(path);
    grpc_call *call = grpc_channel_create_call(ch->core, NULL, GRPC_PROPAGATE_DEFAULTS, cq, method, NULL,
                                               rpc_after_ms(deadline_ms), NULL);
    grpc_slice_unref(method);
    return call;
}

enum status_code rpc_client_status(const struct rpc_channel *ch, grpc_status_code code, grpc_slice details,
                                   struct status *st)
{
    enum status_code rc = rpc_status_from_slice(st, code, details);
    if (rc == ST_UNAVAILABLE && st)
        return status_prefix(st, "%s", ch->address);
    return rc;
}

/* What the core writes while a unary call is under way. */
struct unary {
    grpc_metadata_array initial, trailing;
    grpc_byte_buffer *request, *reply;
    grpc_status_code code;
    grpc_slice details;
    struct rpc_tag tag;
};

static void unary_run(struct unary *u, grpc_call *call, grpc_completion_queue *cq)
{
    grpc_op ops[6] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA}, {.op = GRPC_OP_SEND_MESSAGE}, {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA}, {.op = GRPC_OP_RECV_MESSAGE}, {.op = GRPC_OP_RECV_STATUS_ON_CLIENT},
    };
    ops[1].data.send_message.send_message = u->request;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &u->initial;
    ops[4].data.recv_message.recv_message = &u->reply;
    ops[5].data.recv_status_on_client.trailing_metadata = &u->trailing;
    ops[5].data.recv_status_on_client.status = &u->code;
    ops[5].data.recv_status_on_client.status_details = &u->details;
    rpc_batch_start(call, ops, 6, &u->tag);
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
        return status_set(st, ST_INTERNAL, "%s: %s answered OK without a message", ch->address, path);
    grpc_slice bytes = rpc_flatten(u->reply);
    ProtobufCMessage *m = rpc_unpack(reply_type, GRPC_SLICE_START_PTR(bytes), GRPC_SLICE_LENGTH(bytes));
    grpc_slice_unref(bytes);
    if (!m)
        return status_set(st, ST_INTERNAL, "%s: %s answered with bytes that are not a valid %s", ch->address, path,
                          reply_type->name);
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
    grpc_call *call = rpc_call_create(ch, path, timeout_ms ? timeout_ms : DEFAULT_TIMEOUT_MS, cq);
    unary_run(&u, call, cq);
    enum status_code rc = unary_result(&u, ch, path, reply_type, reply, st);
    grpc_call_unref(call);
    rpc_cq_destroy(cq);
    grpc_byte_buffer_destroy(u.request);
    if (u.reply)
        grpc_byte_buffer_destroy(u.reply);
    grpc_slice_unref(u.details);
    grpc_metadata_array_destroy(&u.initial);
    grpc_metadata_array_destroy(&u.trailing);
    return rc;
}
