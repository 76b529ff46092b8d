/* The rpc callbacks of Inference and Control. They run on poll threads: bound, copy, hand over. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

/* ---- Inference: the sink of a request is its call ---- */

static enum status_code call_decode(void *sink, const void *raw, size_t len, Tandem__V1__GenerateRequest **out,
                                    struct status *st)
{
    (void)sink;
    ProtobufCMessage *m = rpc_unpack(&tandem__v1__generate_request__descriptor, raw, len);
    if (!m)
        return status_set(st, ST_INVALID_ARGUMENT, "not a valid tandem.v1.GenerateRequest");
    *out = (Tandem__V1__GenerateRequest *)m;
    return ST_OK;
}

static uint32_t call_pending(void *sink)
{
    return rpc_call_pending(sink);
}

static enum status_code call_send(void *sink, const Tandem__V1__GenerateResponse *m, struct status *st)
{
    return rpc_call_send_in_place(sink, &m->base, st);
}

static void call_finish(void *sink, const struct status *st, uint32_t retry_after_ms)
{
    rpc_call_finish(sink, st, retry_after_ms);
}

static void call_cancel(void *sink, const struct status *st)
{
    rpc_call_cancel(sink, st);
}

static const char *call_peer(const void *sink)
{
    return rpc_call_peer(sink);
}

static const char *call_header(const void *sink, const char *name)
{
    return rpc_call_metadata(sink, name);
}

static void call_owner(const void *sink, uint8_t *out)
{
    rpc_call_caller(sink, out);
}

static void call_release(void *sink)
{
    rpc_call_unref(sink);
}

static const struct sink_ops call_ops = {
    .attachable = true,
    .decode = call_decode,
    .pending = call_pending,
    .send = call_send,
    .finish = call_finish,
    .cancel = call_cancel,
    .peer = call_peer,
    .header = call_header,
    .owner = call_owner,
    .release = call_release,
};

static void generate_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct status st = STATUS_INIT;
    struct request *r = NULL;
    uint32_t retry = 0;
    rpc_call_ref(call); /* the request's */
    if (request_open(ctx, &call_ops, call, msg, len, rpc_call_deadline_us(call), &r, &retry, &st) == ST_OK) {
        rpc_call_set_data(call, r); /* the other callbacks of this call come after this one */
    } else {
        rpc_call_finish(call, &st, retry);
        rpc_call_unref(call);
    }
}

static void generate_writable(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    struct request *r = rpc_call_data(call);
    if (r)
        request_writable(r);
}

static void generate_close(struct rpc_call *call, bool cancelled, void *ctx)
{
    (void)ctx;
    struct request *r = rpc_call_data(call);
    if (r)
        request_closed(r, cancelled);
}

/* ---- Control ---- */

void control_unref(struct control_call *cc)
{
    if (!cc || atomic_fetch_sub_explicit(&cc->refs, 1, memory_order_acq_rel) != 1)
        return;
    rpc_call_unref(cc->call);
    if (cc->request)
        protobuf_c_message_free_unpacked(cc->request, NULL);
    free(cc);
}

static void control_open(struct rpc_call *call, const void *msg, size_t len, struct coord *c,
                         enum control_method method, const ProtobufCMessageDescriptor *type)
{
    struct status st = STATUS_INIT;
    struct control_call *cc = NULL;
    if (atomic_fetch_add(&c->live_control, 1) >= COORD_MAX_CONTROL) {
        status_set(&st, ST_RESOURCE_EXHAUSTED, "%d Control calls wait already", COORD_MAX_CONTROL);
        goto fail;
    }
    cc = calloc(1, sizeof *cc);
    if (!cc) {
        status_nomem(&st, "control call", sizeof *cc);
        goto fail;
    }
    cc->mail.kind = MAIL_CONTROL;
    atomic_init(&cc->refs, 1);
    atomic_init(&cc->closed, false);
    cc->method = method;
    cc->call = rpc_call_ref(call);
    cc->request = rpc_unpack(type, msg, len);
    if (!cc->request) {
        status_set(&st, ST_INVALID_ARGUMENT, "not a valid %s", type->name);
        goto fail;
    }
    atomic_fetch_add(&cc->refs, 1);
    rpc_call_set_data(call, cc);
    mailbox_post(&c->box, &cc->mail, 0, NULL); /* the first reference goes with it */
    return;
fail:
    atomic_fetch_sub(&c->live_control, 1);
    control_unref(cc);
    rpc_call_finish(call, &st, st.code == ST_RESOURCE_EXHAUSTED ? COORD_RETRY_AFTER_MS : 0);
}

static void control_close(struct rpc_call *call, bool cancelled, void *ctx)
{
    (void)cancelled;
    (void)ctx;
    struct control_call *cc = rpc_call_data(call);
    if (!cc)
        return;
    atomic_store(&cc->closed, true);
    control_unref(cc);
}

static void server_info_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    control_open(call, msg, len, ctx, CONTROL_SERVER_INFO, &tandem__v1__get_server_info_request__descriptor);
}

static void model_info_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    control_open(call, msg, len, ctx, CONTROL_MODEL_INFO, &tandem__v1__get_model_info_request__descriptor);
}

static void load_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    control_open(call, msg, len, ctx, CONTROL_LOAD, &tandem__v1__get_load_request__descriptor);
}

static void abort_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    control_open(call, msg, len, ctx, CONTROL_ABORT, &tandem__v1__abort_request__descriptor);
}

static void drain_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    control_open(call, msg, len, ctx, CONTROL_DRAIN, &tandem__v1__drain_request__descriptor);
}

static void kv_memory_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    control_open(call, msg, len, ctx, CONTROL_KV_MEMORY, &tandem__v1__set_kv_memory_request__descriptor);
}

void service_methods(struct coord *c, struct rpc_method *m)
{
    static const struct {
        const char *path;
        void (*open)(struct rpc_call *, const void *, size_t, void *);
    } control[] = {
        {"/tandem.v1.Control/GetServerInfo", server_info_open},
        {"/tandem.v1.Control/GetModelInfo", model_info_open},
        {"/tandem.v1.Control/GetLoad", load_open},
        {"/tandem.v1.Control/Abort", abort_open},
        {"/tandem.v1.Control/Drain", drain_open},
        {"/tandem.v1.Control/SetKvMemory", kv_memory_open},
    };
    _Static_assert(2 + sizeof control / sizeof *control == COORD_PUBLIC_METHODS, "two of Inference, the rest");
    *m++ = (struct rpc_method){.path = "/tandem.v1.Inference/Generate",
                               .kind = RPC_SERVER_STREAM,
                               .on_open = generate_open,
                               .on_writable = generate_writable,
                               .on_close = generate_close,
                               .ctx = c};
    *m++ = (struct rpc_method){.path = "/tandem.v1.Inference/Attach",
                               .kind = RPC_SERVER_STREAM,
                               .on_open = attach_call_open,
                               .on_writable = attach_call_writable,
                               .on_close = attach_call_close,
                               .ctx = c};
    for (size_t i = 0; i < sizeof control / sizeof *control; i++)
        *m++ = (struct rpc_method){.path = control[i].path,
                                   .kind = RPC_UNARY,
                                   .on_open = control[i].open,
                                   .on_close = control_close,
                                   .ctx = c};
}
