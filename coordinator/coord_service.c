/* The rpc callbacks of Inference and Control. They run on poll threads: bound, copy, hand over. */
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
    atomic_fetch_sub(&r->coord->live_requests, 1);
    rpc_call_unref(r->call);
    choices_destroy(r);
    options_fini(r);
    free(r->raw);
    free(r->prompt);
    free(r->stop);
    free(r);
}

static void request_post(struct request *r, uint32_t flags)
{
    mailbox_post(&r->coord->box, &r->mail, flags, &r->refs);
}

/* Why no request can be taken now; ST_OK when one can. */
static enum status_code check_state(struct coord *c, uint32_t *retry_after_ms, struct status *st)
{
    int state = atomic_load_explicit(&c->state, memory_order_acquire);
    if (state == TANDEM__V1__SERVER_INFO__STATE__READY)
        return ST_OK;
    *retry_after_ms = state == TANDEM__V1__SERVER_INFO__STATE__DRAINING ? 0 : COORD_RETRY_AFTER_MS;
    pthread_mutex_lock(&c->pub_mu);
    status_set(st, ST_UNAVAILABLE, "%s", c->reason);
    pthread_mutex_unlock(&c->pub_mu);
    return ST_UNAVAILABLE;
}

static struct request *request_create(struct coord *c, struct rpc_call *call, const void *msg, size_t len)
{
    struct request *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->raw = malloc(len ? len : 1);
    if (!r->raw) {
        free(r);
        return NULL;
    }
    if (len)
        memcpy(r->raw, msg, len);
    r->raw_len = len;
    r->mail.kind = MAIL_REQUEST;
    r->coord = c;
    r->call = rpc_call_ref(call);
    r->arrived_us = coord_now_us();
    r->deadline_us = rpc_call_deadline_us(call);
    atomic_init(&r->refs, 1);
    atomic_init(&r->cancelled, false);
    atomic_init(&r->want_writable, false);
    return r;
}

static void generate_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct coord *c = ctx;
    struct status st = STATUS_INIT;
    uint32_t retry = COORD_RETRY_AFTER_MS;
    if (check_state(c, &retry, &st) != ST_OK) {
        rpc_call_finish(call, &st, retry);
        return;
    }
    unsigned bound = atomic_load(&c->max_live);
    if (atomic_fetch_add(&c->live_requests, 1) >= bound) {
        atomic_fetch_sub(&c->live_requests, 1);
        status_set(&st, ST_RESOURCE_EXHAUSTED, "%u requests are live (queued, running or not read yet): the limit",
                   bound);
        rpc_call_finish(call, &st, retry);
        return;
    }
    struct request *r = request_create(c, call, msg, len);
    if (!r) {
        atomic_fetch_sub(&c->live_requests, 1);
        status_nomem(&st, "request", len);
        rpc_call_finish(call, &st, retry);
        return;
    }
    rpc_call_set_data(call, r);
    if (intake_push(c, r, &st) != ST_OK)
        rpc_call_finish(call, &st, retry);
}

static void generate_writable(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    struct request *r = rpc_call_data(call);
    if (r && atomic_exchange(&r->want_writable, false))
        request_post(r, REQUEST_WRITABLE);
}

static void generate_close(struct rpc_call *call, bool cancelled, void *ctx)
{
    (void)ctx;
    struct request *r = rpc_call_data(call);
    if (!r)
        return;
    if (cancelled)
        atomic_store_explicit(&r->cancelled, true, memory_order_relaxed);
    request_post(r, REQUEST_CLOSED);
    request_unref(r);
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
    };
    *m++ = (struct rpc_method){.path = "/tandem.v1.Inference/Generate",
                               .kind = RPC_SERVER_STREAM,
                               .on_open = generate_open,
                               .on_writable = generate_writable,
                               .on_close = generate_close,
                               .ctx = c};
    for (size_t i = 0; i < sizeof control / sizeof *control; i++)
        *m++ = (struct rpc_method){.path = control[i].path,
                                   .kind = RPC_UNARY,
                                   .on_open = control[i].open,
                                   .on_close = control_close,
                                   .ctx = c};
}
