/* tandem_client.c - opening a client and asking a server; see tandem_client.h. Generations: tandem_generation.c. */
#include <stdlib.h>
#include <string.h>

#include "grpc/health/v1/health.pb-c.h"
#include "proto/tandem_client_internal.h"

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
    c->no_attach = options->no_attach;
    c->on_lost = options->on_lost;
    c->on_lost_ctx = options->on_lost_ctx;
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
