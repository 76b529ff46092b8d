/* coord_sink.h - where a request comes from and where its answers go: the seam between protocols and the request path.
 *
 *     gRPC  coord_service.c ─┐  request_open(bytes)                              ┌─ ops->send, finish, cancel
 *                            ├──▶ intake: ops->decode ──▶ engine ──▶ answers ──▶─┤
 *     HTTP  http_*.c ────────┘  request_writable, request_closed                 └─ ops->pending: back-pressure
 *
 * A protocol hands over the bytes of a request and a sink: its own object and these operations. What it calls "a request" is
 * a GenerateRequest, what comes back are GenerateResponses and one status; all checks, limits, scheduling and accounting lie
 * behind the seam and are the same for all. The operations may come from any thread and never block.
 */
#ifndef TANDEM_COORD_SINK_H
#define TANDEM_COORD_SINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"
#include "tandem/v1/inference.pb-c.h"

struct coord;
struct request;

struct sink_ops {
    bool attachable; /* Inference.Attach can take up a request of it again */
    /* The message that the bytes stand for; freed with protobuf_c_message_free_unpacked. Once, on an intake thread. */
    enum status_code (*decode)(void *sink, const void *raw, size_t len, Tandem__V1__GenerateRequest **out,
                               struct status *st);
    /* How much of what was sent the client has not taken. 0: a message sent now goes out at once. Else request_writable is
     * called when it has become 0. */
    uint32_t (*pending)(void *sink);
    /* As rpc_call_send: the message is not used after the return; CANCELLED when the client is gone already. */
    enum status_code (*send)(void *sink, const Tandem__V1__GenerateResponse *m, struct status *st);
    /* The end, st NULL: a good one. The first counts, later ones do nothing. retry_after_ms 0: no hint. */
    void (*finish)(void *sink, const struct status *st, uint32_t retry_after_ms);
    /* The same, and what waits for the client is dropped. */
    void (*cancel)(void *sink, const struct status *st);
    const char *(*peer)(const void *sink);
    /* A header of the request, NULL: it has none of this name (lower case). Within request_open only. */
    const char *(*header)(const void *sink, const char *name);
    /* Whose request it is: 16 bytes (rpc_call_caller). The same; NULL: nobody's. */
    void (*owner)(const void *sink, uint8_t *out);
    /* The last operation: the request is freed. */
    void (*release)(void *sink);
};

/* Begins a request; `raw` is copied. *out holds one reference, which request_closed takes back: call that once, when the
 * protocol's object is at its end, be it done or given up. It may come on another thread before this has returned.
 * On an error nothing was begun, and nothing of `sink` is called but header: the caller answers, with *retry_after_ms. */
STATUS_MUST_CHECK enum status_code request_open(struct coord *c, const struct sink_ops *ops, void *sink,
                                                const void *raw, size_t len, int64_t deadline_us, struct request **out,
                                                uint32_t *retry_after_ms, struct status *st);
/* To be called when what was sent has gone out. */
void request_writable(struct request *r);
/* cancelled: the client does not want the rest. */
void request_closed(struct request *r, bool cancelled);

#endif
