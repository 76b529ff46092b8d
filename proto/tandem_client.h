/* tandem_client.h - a client of a tandem server, in C. Prefix tandem_. Link libtandem_client; messages are those of
 * the public .proto files as protobuf-c makes them (README.md: "In C, the messages look a little different").
 *
 *     struct tandem_client *client;
 *     struct tandem_client_options options = {.address = "llm.example:50051", .tls_ca = "ca.pem", .token_file = "token"};
 *     if (tandem_client_open(&client, &options, &st) != ST_OK)
 *         return fail(&st);
 *     Tandem__V1__GenerateRequest request = TANDEM__V1__GENERATE_REQUEST__INIT;
 *     request.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT;
 *     request.text = (ProtobufCBinaryData){strlen(prompt), (uint8_t *)prompt};
 *     enum status_code rc = tandem_client_generate(client, &request, 0, print_message, NULL, &st);
 *     tandem_client_close(client);
 *
 * Threads: any number may use one client at once, each its own generation; only tandem_generation_cancel may come from
 * another thread than the one that reads. Every wait has a bound or can be cancelled.
 * Errors: the code and message that the server sent, as README.md of the project lists them; UNAVAILABLE with the address
 * and the reason when there is no connection. st may be NULL. Out-parameters are set on ST_OK only.
 * A lost connection: where the server keeps requests (it has a journal, or keep_ms was set), the generation goes on by
 * itself: Inference.Attach asks for what is behind the tokens that came, for attach_ms of its first message at most, and
 * after a loss the caller sees a pause and each message's content once. Else, and when that fails, the error of the loss.
 * Ownership: strings and messages handed in are used during the call only (paths and address are copied); what is handed
 * out says who frees it.
 * Signals: threads of the gRPC core block them all. Do not fork without exec once a client is open.
 */
#ifndef TANDEM_CLIENT_H
#define TANDEM_CLIENT_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/status.h"
#include "tandem/v1/control.pb-c.h"
#include "tandem/v1/inference.pb-c.h"

#define TANDEM_DEFAULT_ADDRESS "127.0.0.1:50051"

struct tandem_client;
struct tandem_generation;

/* All zero: plaintext to TANDEM_DEFAULT_ADDRESS. Files that change are read again by themselves. */
struct tandem_client_options {
    const char *address;            /* host:port or unix:/path */
    bool tls;                       /* with the system's certificates; each of the next four turns it on, too */
    const char *tls_ca;             /* PEM file: who may have signed the server's certificate */
    const char *tls_cert, *tls_key; /* PEM files: our own certificate, for servers that ask for one */
    const char *tls_server_name;    /* in the server's certificate; default: the host of the address */
    const char *token_file;         /* its first token is sent with every call; not in the clear over a network */
    uint32_t timeout_ms;            /* of every call but a generation; 0: 10000 */
    bool no_attach;                 /* a lost connection ends its generation */
    /* May be NULL. From within tandem_generation_next: a generation lost its connection, st says how, and takes itself up
     * again within attach_ms. */
    void (*on_lost)(void *ctx, const struct status *st, uint32_t attach_ms);
    void *on_lost_ctx;
};

/* Checks options and files; INVALID_ARGUMENT, NOT_FOUND or PERMISSION_DENIED name what is wrong. Connects with the first
 * call. */
STATUS_MUST_CHECK enum status_code tandem_client_open(struct tandem_client **out,
                                                      const struct tandem_client_options *options, struct status *st);
void tandem_client_close(struct tandem_client *c); /* after its generations; NULL is fine */

/* ---- generating ---- */

/* Runs a request to its end. deadline_ms of the whole, in the queue and while running; 0: none. on_message is called for each
 * message, which is valid during that call only; false stops: the generation ends with CANCELLED. */
STATUS_MUST_CHECK enum status_code
tandem_client_generate(struct tandem_client *c, const Tandem__V1__GenerateRequest *request, uint64_t deadline_ms,
                       bool (*on_message)(void *ctx, const Tandem__V1__GenerateResponse *message), void *ctx,
                       struct status *st);

/* The same in steps: open, send, next until there is no more, close. From the return of open on, g can be cancelled. */
STATUS_MUST_CHECK enum status_code tandem_generation_open(struct tandem_generation **out, struct tandem_client *c,
                                                          uint64_t deadline_ms, struct status *st);
/* Once. Connects where that is still to do. What goes wrong is told by tandem_generation_next. */
void tandem_generation_send(struct tandem_generation *g, const Tandem__V1__GenerateRequest *request);
/* *message: the next, valid until the following call on g; NULL when the generation has ended well. Waits at most timeout_ms
 * (0: as long as it takes): then DEADLINE_EXCEEDED and *timed_out, and g can be asked again. timed_out may be NULL. */
STATUS_MUST_CHECK enum status_code tandem_generation_next(struct tandem_generation *g,
                                                          const Tandem__V1__GenerateResponse **message,
                                                          uint32_t timeout_ms, bool *timed_out, struct status *st);
/* From any thread; what waits in tandem_generation_next returns CANCELLED. The server frees the request's slot. */
void tandem_generation_cancel(struct tandem_generation *g);
/* After an error: when the server suggests to try again, in milliseconds; 0: it did not. */
uint32_t tandem_generation_retry_after_ms(const struct tandem_generation *g);
/* Cancels what still runs, frees g and its last message. NULL is fine. */
void tandem_generation_close(struct tandem_generation *g);

/* ---- asking ---- */

/* service NULL: "tandem.v1.Inference", readiness; "": liveness. NOT_FOUND: a service that the server does not know. */
STATUS_MUST_CHECK enum status_code tandem_client_health(struct tandem_client *c, const char *service, bool *serving,
                                                        struct status *st);
/* The caller frees *out by tandem_free. */
STATUS_MUST_CHECK enum status_code tandem_client_server_info(struct tandem_client *c, Tandem__V1__ServerInfo **out,
                                                             struct status *st);
STATUS_MUST_CHECK enum status_code tandem_client_model_info(struct tandem_client *c, Tandem__V1__ModelInfo **out,
                                                            struct status *st);
STATUS_MUST_CHECK enum status_code tandem_client_load(struct tandem_client *c, Tandem__V1__Load **out,
                                                      struct status *st);
/* Ends requests by their ids; NOT_FOUND when one of them is not live. */
STATUS_MUST_CHECK enum status_code tandem_client_abort(struct tandem_client *c, const char *const *request_ids,
                                                       size_t n, struct status *st);
/* Control.Drain: of a group (NULL: the server), within the call's own time and the client's timeout_ms on top. */
STATUS_MUST_CHECK enum status_code tandem_client_drain(struct tandem_client *c, const char *group, bool restart,
                                                       uint64_t timeout_ms, uint32_t *remaining, struct status *st);
/* Control.SetKvMemory: of a group (NULL: all), so many bytes a rank, 0: all that it came with. The caller frees *out. */
STATUS_MUST_CHECK enum status_code tandem_client_set_kv_memory(struct tandem_client *c, const char *group,
                                                               uint64_t kv_bytes, Tandem__V1__SetKvMemoryResponse **out,
                                                               struct status *st);
void tandem_free(void *message); /* with all that it holds; NULL is fine */

#endif
