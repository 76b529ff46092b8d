/* tandem_client.c - see tandem_client.h; calls of rpc.h, with the types of the public API. */
#include "proto/tandem_client.h"

#include <stdlib.h>
#include <string.h>

#include "grpc/health/v1/health.pb-c.h"
#include "proto/rpc.h"

#define SEND_TIMEOUT_MS 30000

struct tandem_client {
    struct rpc_channel *channel;
    uint32_t timeout_ms;
};

struct tandem_generation {
    struct rpc_stream *stream;
    Tandem__V1__GenerateResponse *message; /* the one handed out last */
};

enum status_code tandem_client_open(struct tandem_client **out, const struct tandem_client_options *options,
                                    struct status *st)
{
    struct rpc_client_security sec = {.tls = options->tls,
                                      .ca_file = options->tls_ca,
                                      .cert_file = options->tls_cert,
                                      .key_file = options->tls_key,
                                      .server_name = options->tls_server_name,
                                      .token_file = options->token_file};
    struct tandem_client *c = calloc(1, sizeof *c);
    if (!c)
        return status_nomem(st, "client", sizeof *c);
    c->timeout_ms = options->timeout_ms;
    enum status_code rc =
        rpc_channel_open(&c->channel, options->address ? options->address : TANDEM_DEFAULT_ADDRESS, &sec, st);
    if (rc != ST_OK) {
        free(c);
        return rc;
    }
    *out = c;
    return ST_OK;
}

void tandem_client_close(struct tandem_client *c)
{
    if (!c)
        return;
    rpc_channel_destroy(c->channel);
    free(c);
}

/* ---- generating ---- */

enum status_code tandem_generation_open(struct tandem_generation **out, struct tandem_client *c, uint64_t deadline_ms,
                                        struct status *st)
{
    struct tandem_generation *g = calloc(1, sizeof *g);
    if (!g)
        return status_nomem(st, "generation", sizeof *g);
    enum status_code rc = rpc_stream_open(&g->stream, c->channel, "/tandem.v1.Inference/Generate", deadline_ms, st);
    if (rc != ST_OK) {
        free(g);
        return rc;
    }
    *out = g;
    return ST_OK;
}

void tandem_generation_send(struct tandem_generation *g, const Tandem__V1__GenerateRequest *request)
{
    /* A server that refuses at once ends the call before all was sent: an error here is not the reason, recv tells it. */
    if (rpc_stream_send(g->stream, &request->base, SEND_TIMEOUT_MS, NULL) == ST_OK &&
        rpc_stream_half_close(g->stream, NULL) != ST_OK)
        rpc_stream_cancel(g->stream);
}

enum status_code tandem_generation_next(struct tandem_generation *g, const Tandem__V1__GenerateResponse **message,
                                        uint32_t timeout_ms, bool *timed_out, struct status *st)
{
    const void *bytes;
    size_t len;
    enum status_code rc = rpc_stream_recv(g->stream, &bytes, &len, timeout_ms, timed_out, st);
    if (rc != ST_OK)
        return rc;
    tandem_free(g->message);
    g->message = NULL;
    if (bytes) {
        g->message = (Tandem__V1__GenerateResponse *)rpc_unpack(&tandem__v1__generate_response__descriptor, bytes, len);
        if (!g->message)
            return status_set(st, ST_INTERNAL, "the server sent %zu bytes that are not a GenerateResponse", len);
    }
    *message = g->message;
    return ST_OK;
}

void tandem_generation_cancel(struct tandem_generation *g)
{
    rpc_stream_cancel(g->stream);
}

uint32_t tandem_generation_retry_after_ms(const struct tandem_generation *g)
{
    const char *text = rpc_stream_trailer(g->stream, "retry-after-ms");
    unsigned long v = text ? strtoul(text, NULL, 10) : 0;
    return v < UINT32_MAX ? (uint32_t)v : UINT32_MAX;
}

void tandem_generation_close(struct tandem_generation *g)
{
    if (!g)
        return;
    rpc_stream_close(g->stream);
    tandem_free(g->message);
    free(g);
}

enum status_code tandem_client_generate(struct tandem_client *c, const Tandem__V1__GenerateRequest *request,
                                        uint64_t deadline_ms,
                                        bool (*on_message)(void *ctx, const Tandem__V1__GenerateResponse *message),
                                        void *ctx, struct status *st)
{
    struct tandem_generation *g = NULL;
    const Tandem__V1__GenerateResponse *m = NULL;
    enum status_code rc = tandem_generation_open(&g, c, deadline_ms, st);
    if (rc != ST_OK || !g)
        return rc;
    tandem_generation_send(g, request);
    do {
        rc = tandem_generation_next(g, &m, 0, NULL, st);
        if (rc == ST_OK && m && !on_message(ctx, m))
            rc = status_set(st, ST_CANCELLED, "stopped by the caller");
    } while (rc == ST_OK && m);
    tandem_generation_close(g);
    return rc;
}

/* ---- asking ---- */

static enum status_code ask(struct tandem_client *c, const char *path, const ProtobufCMessage *request,
                            const ProtobufCMessageDescriptor *type, ProtobufCMessage **reply, struct status *st)
{
    return rpc_unary(c->channel, path, request, type, reply, c->timeout_ms, st);
}

enum status_code tandem_client_health(struct tandem_client *c, const char *service, bool *serving, struct status *st)
{
    ProtobufCMessage *reply = NULL;
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)(service ? service : "tandem.v1.Inference");
    enum status_code rc = ask(c, "/grpc.health.v1.Health/Check", &request.base,
                              &grpc__health__v1__health_check_response__descriptor, &reply, st);
    if (rc != ST_OK)
        return rc;
    *serving = ((Grpc__Health__V1__HealthCheckResponse *)reply)->status ==
               GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
    tandem_free(reply);
    return ST_OK;
}

enum status_code tandem_client_server_info(struct tandem_client *c, Tandem__V1__ServerInfo **out, struct status *st)
{
    ProtobufCMessage *reply = NULL;
    Tandem__V1__GetServerInfoRequest request = TANDEM__V1__GET_SERVER_INFO_REQUEST__INIT;
    enum status_code rc =
        ask(c, "/tandem.v1.Control/GetServerInfo", &request.base, &tandem__v1__server_info__descriptor, &reply, st);
    if (rc == ST_OK)
        *out = (Tandem__V1__ServerInfo *)reply;
    return rc;
}

enum status_code tandem_client_model_info(struct tandem_client *c, Tandem__V1__ModelInfo **out, struct status *st)
{
    ProtobufCMessage *reply = NULL;
    Tandem__V1__GetModelInfoRequest request = TANDEM__V1__GET_MODEL_INFO_REQUEST__INIT;
    enum status_code rc =
        ask(c, "/tandem.v1.Control/GetModelInfo", &request.base, &tandem__v1__model_info__descriptor, &reply, st);
    if (rc == ST_OK)
        *out = (Tandem__V1__ModelInfo *)reply;
    return rc;
}

enum status_code tandem_client_load(struct tandem_client *c, Tandem__V1__Load **out, struct status *st)
{
    ProtobufCMessage *reply = NULL;
    Tandem__V1__GetLoadRequest request = TANDEM__V1__GET_LOAD_REQUEST__INIT;
    enum status_code rc =
        ask(c, "/tandem.v1.Control/GetLoad", &request.base, &tandem__v1__load__descriptor, &reply, st);
    if (rc == ST_OK)
        *out = (Tandem__V1__Load *)reply;
    return rc;
}

enum status_code tandem_client_abort(struct tandem_client *c, const char *const *request_ids, size_t n,
                                     struct status *st)
{
    ProtobufCMessage *reply = NULL;
    Tandem__V1__AbortRequest request = TANDEM__V1__ABORT_REQUEST__INIT;
    request.n_request_ids = n;
    request.request_ids = (char **)request_ids;
    enum status_code rc =
        ask(c, "/tandem.v1.Control/Abort", &request.base, &tandem__v1__abort_response__descriptor, &reply, st);
    if (rc == ST_OK)
        tandem_free(reply);
    return rc;
}

enum status_code tandem_client_drain(struct tandem_client *c, const char *group, bool restart, uint64_t timeout_ms,
                                     uint32_t *remaining, struct status *st)
{
    ProtobufCMessage *reply = NULL;
    Tandem__V1__DrainRequest request = TANDEM__V1__DRAIN_REQUEST__INIT;
    uint64_t call_ms = c->timeout_ms ? timeout_ms + c->timeout_ms : 0;
    if (group)
        request.group = (char *)group;
    request.restart = restart;
    request.timeout_ms = timeout_ms;
    enum status_code rc =
        rpc_unary(c->channel, "/tandem.v1.Control/Drain", &request.base, &tandem__v1__drain_response__descriptor,
                  &reply, call_ms < UINT32_MAX ? (uint32_t)call_ms : UINT32_MAX, st);
    if (rc != ST_OK)
        return rc;
    *remaining = ((Tandem__V1__DrainResponse *)reply)->remaining_requests;
    tandem_free(reply);
    return ST_OK;
}

enum status_code tandem_client_set_kv_memory(struct tandem_client *c, const char *group, uint64_t kv_bytes,
                                             Tandem__V1__SetKvMemoryResponse **out, struct status *st)
{
    ProtobufCMessage *reply = NULL;
    Tandem__V1__SetKvMemoryRequest request = TANDEM__V1__SET_KV_MEMORY_REQUEST__INIT;
    if (group)
        request.group = (char *)group;
    request.kv_bytes = kv_bytes;
    enum status_code rc = ask(c, "/tandem.v1.Control/SetKvMemory", &request.base,
                              &tandem__v1__set_kv_memory_response__descriptor, &reply, st);
    if (rc == ST_OK)
        *out = (Tandem__V1__SetKvMemoryResponse *)reply;
    return rc;
}

void tandem_free(void *message)
{
    if (message)
        protobuf_c_message_free_unpacked(message, NULL);
}
