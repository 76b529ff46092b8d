/* rpc.h - gRPC in C: a server and a client over the gRPC C core, messages by protobuf-c. Prefix rpc_.
 *
 * Server: a table of methods with callbacks. Everything is asynchronous; callbacks run on poll threads and must not block
 * (hand the call to another thread; every function on a call may be used from any thread).
 *
 *     static void on_open(struct rpc_call *call, const void *msg, size_t len, void *ctx) {
 *         Req *r = (Req *)rpc_unpack(&req__descriptor, msg, len);         // NULL: not a valid message
 *         rpc_call_set_data(call, new_request(r, rpc_call_ref(call)));    // keep a reference as long as you use it
 *     }
 *     static const struct rpc_method methods[] = {{ "/pkg.Svc/Method", RPC_SERVER_STREAM, .on_open = on_open, ... }};
 *     rpc_server_start(&server, &(struct rpc_server_config){ .methods = methods, ... }, st);
 *
 * Life of a server call: on_open once; on_message for each message of a bidi stream, then on_half_close; on_writable each
 * time that the send queue has run empty; on_close once and last (success, cancel, deadline, lost connection alike).
 * Callbacks of one call never overlap. Methods that are not in the table are answered UNIMPLEMENTED at once.
 *
 * Client: blocking calls with a bound on every wait.
 */
#ifndef TANDEM_RPC_H
#define TANDEM_RPC_H

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

#define RPC_WORKER_PROTOCOL    5           /* Hello.protocol of worker_control.proto */
#define RPC_MAX_MESSAGE_BYTES  (16u << 20) /* a prompt of a million ids is about 3 MB */
#define RPC_MAX_METADATA_BYTES (16u << 10) /* request headers of one call */
#define RPC_MAX_STREAMS        4096        /* at once on one connection */

/* ---- messages ---- */

/* NULL when the bytes are not a valid message. Free with protobuf_c_message_free_unpacked(m, NULL). */
ProtobufCMessage *rpc_unpack(const ProtobufCMessageDescriptor *d, const void *data, size_t len);

/* ---- server ---- */

struct rpc_server;
struct rpc_call;

enum rpc_kind {
    RPC_UNARY,         /* one message in, rpc_call_reply or rpc_call_finish with an error */
    RPC_SERVER_STREAM, /* one message in, any number out */
    RPC_BIDI,
};

struct rpc_method {
    const char *path; /* "/package.Service/Method", static */
    enum rpc_kind kind;
    /* UNARY, SERVER_STREAM: msg is the request, valid during the callback. BIDI: msg NULL, len 0. */
    void (*on_open)(struct rpc_call *call, const void *msg, size_t len, void *ctx);
    /* BIDI only. The next message is read when this has returned: a slow handler slows its peer and nobody else. */
    void (*on_message)(struct rpc_call *call, const void *msg, size_t len, void *ctx);
    void (*on_half_close)(struct rpc_call *call, void *ctx);            /* BIDI only, optional */
    void (*on_writable)(struct rpc_call *call, void *ctx);              /* optional */
    void (*on_close)(struct rpc_call *call, bool cancelled, void *ctx); /* optional */
    void *ctx;
};

/* What one listener demands; all zero: plaintext, open to everyone. The files are read at the start and again when they
 * have changed: certificates before the next handshake, tokens within 0.2 s. New files that cannot be used are reported,
 * and those read before stay in use. Calls that the listener refuses reach no callback. */
struct rpc_listen_security {
    const char *cert_file, *key_file; /* PEM, the certificate first and its chain behind it. Both: TLS 1.2 or later */
    const char *client_ca_file;       /* PEM. With TLS: clients must show a certificate signed by one of these */
    const char *token_file;           /* tokens, one a line. Calls must carry "authorization: Bearer TOKEN" and else get
                                         UNAUTHENTICATED; grpc.health.v1 needs none */
    bool health_only;                 /* other calls than grpc.health.v1 get PERMISSION_DENIED */
};

struct rpc_server_config {
    const struct rpc_method *methods; /* stay valid as long as the server */
    size_t n_methods;
    const char *const *listen; /* "127.0.0.1:50051", "[::]:50051", "unix:/path"; port 0 takes a free one */
    size_t n_listen;
    const struct rpc_listen_security *security; /* of listen[i]; NULL: none */
    /* A file was read again (failed: could not be used), a certificate has expired. Any thread; must not block. */
    void (*on_report)(void *ctx, bool failed, const char *message);
    void *report_ctx;
    uint32_t max_message_bytes;    /* 0: RPC_MAX_MESSAGE_BYTES. Larger ones end the call: RESOURCE_EXHAUSTED */
    uint32_t max_metadata_bytes;   /* 0: RPC_MAX_METADATA_BYTES */
    uint32_t max_streams;          /* 0: RPC_MAX_STREAMS */
    uint32_t max_send_queue_bytes; /* of one call; 0: 4 MiB */
    uint32_t poll_threads;         /* 0: 2 (with one, a busy writer starves reads) */
    /* Connections. A client that is silent for keepalive_ms is pinged, and gone after keepalive_timeout_ms more. One that
     * pings more often than min_ping_interval_ms is sent away. */
    uint32_t keepalive_ms, keepalive_timeout_ms, min_ping_interval_ms; /* 0: 60000, 20000, 10000 */
    uint32_t max_connection_idle_ms;      /* without a call for so long: closed; 0: never */
    uint32_t max_connection_age_ms;       /* the client is told to connect anew, calls under way go on; 0: never */
    uint32_t max_connection_age_grace_ms; /* of these calls, from then on; they end with UNAVAILABLE. 0: no limit */
};

/* ALREADY_EXISTS when an address is in use, INVALID_ARGUMENT when it is none; the message names it. A stale unix socket
 * (nobody accepts on it) is replaced; one that is alive is in use. A security file that is missing or wrong, an expired
 * certificate, a key of another one: INVALID_ARGUMENT, NOT_FOUND or PERMISSION_DENIED, and the message names the file. */
STATUS_MUST_CHECK enum status_code rpc_server_start(struct rpc_server **out, const struct rpc_server_config *cfg,
                                                    struct status *st);
/* Port that listen[i] was bound to; 0 for a unix socket. */
uint16_t rpc_server_port(const struct rpc_server *s, size_t i);
/* Refuses new calls, lets live ones end for grace_ms, cancels the rest. All on_close have run on return. */
void rpc_server_shutdown(struct rpc_server *s, uint32_t grace_ms);
void rpc_server_destroy(struct rpc_server *s); /* shuts down with no grace if that was not done; NULL is fine */
/* Calls that are open now. */
uint32_t rpc_server_live_calls(const struct rpc_server *s);

struct rpc_call *rpc_call_ref(struct rpc_call *call);
void rpc_call_unref(struct rpc_call *call);
void rpc_call_set_data(struct rpc_call *call, void *data); /* any pointer of the user's */
void *rpc_call_data(const struct rpc_call *call);
/* CLOCK_MONOTONIC microseconds; INT64_MAX without a deadline. */
int64_t rpc_call_deadline_us(const struct rpc_call *call);
/* "ipv4:10.0.0.7:4711"; valid as long as the call. */
const char *rpc_call_peer(const struct rpc_call *call);
/* Value of a request header (lower-case key), NULL without it; valid as long as the call. "authorization" is never there. */
const char *rpc_call_metadata(const struct rpc_call *call, const char *key);

#define RPC_CALLER_BYTES 16
/* Who calls: a digest of the bearer token that was shown, without one of the client certificate's names, else all zero. */
void rpc_call_caller(const struct rpc_call *call, uint8_t out[RPC_CALLER_BYTES]);

/* Queues a message (packed before this returns). RESOURCE_EXHAUSTED: the send queue is full, nothing was queued. After
 * the call was finished or cancelled: CANCELLED, and nothing happens. */
STATUS_MUST_CHECK enum status_code rpc_call_send(struct rpc_call *call, const ProtobufCMessage *m, struct status *st);
/* The same for a thread that holds no lock which a callback of this server takes: callbacks of this and of other calls may
 * run in here, where rpc_call_send would wake a poll thread to run them. For whoever sends to many calls in a row. */
STATUS_MUST_CHECK enum status_code rpc_call_send_in_place(struct rpc_call *call, const ProtobufCMessage *m,
                                                          struct status *st);
/* Messages queued or being written. 0: a message sent now goes out at once. */
uint32_t rpc_call_pending(const struct rpc_call *call);
/* Ends the call with this status after what is queued has gone out; an error with nothing sent yet travels before any
 * message (so that clients may retry). The first call wins, later ones do nothing. retry_after_ms > 0 adds the trailer
 * retry-after-ms. grpc-status-details-bin says the same to programs: a google.rpc.RetryInfo, and for INVALID_ARGUMENT
 * whose message starts with "field.path: " a google.rpc.BadRequest. st NULL: OK. */
void rpc_call_finish(struct rpc_call *call, const struct status *st, uint32_t retry_after_ms);
/* UNARY: the answer and OK. */
void rpc_call_reply(struct rpc_call *call, const ProtobufCMessage *m);
/* Drops the call at once, queued messages included: for a client that does not read. */
void rpc_call_cancel(struct rpc_call *call, const struct status *st);

/* ---- grpc.health.v1 ---- */

/* Serving states by service name; Check, Watch and List answer from it. Thread-safe. At most 32 services. */
struct rpc_health;
STATUS_MUST_CHECK enum status_code rpc_health_create(struct rpc_health **out, struct status *st);
void rpc_health_destroy(struct rpc_health *h); /* after the server; NULL is fine */
void rpc_health_set(struct rpc_health *h, const char *service, bool serving);
/* Ends all Watch calls, after a last update: so that they do not hold up a drain. */
void rpc_health_close_watchers(struct rpc_health *h);
#define RPC_HEALTH_METHODS 3
/* Fills RPC_HEALTH_METHODS entries of a method table. */
void rpc_health_methods(struct rpc_health *h, struct rpc_method *methods);

/* ---- grpc.reflection.v1 and v1alpha ---- */

/* Answers from a serialized google.protobuf.FileDescriptorSet, which stays valid; lists all services in it. */
struct rpc_reflection;
STATUS_MUST_CHECK enum status_code rpc_reflection_create(struct rpc_reflection **out, const void *set, size_t len,
                                                         struct status *st);
void rpc_reflection_destroy(struct rpc_reflection *r); /* after the server; NULL is fine */
#define RPC_REFLECTION_METHODS 2
/* Fills RPC_REFLECTION_METHODS entries of a method table. */
void rpc_reflection_methods(struct rpc_reflection *r, struct rpc_method *methods);

/* The set of all that a coordinator serves to clients, made by protoc at build time. */
extern const uint8_t rpc_public_descriptors[];
extern const size_t rpc_public_descriptors_len;

/* ---- client ---- */

struct rpc_channel;
struct rpc_stream;

/* How a client shows who it is and whom it believes; all zero: plaintext. The strings are copied. Files are read at the
 * start, and again before a call when they have changed (its connection is then a new one). */
struct rpc_client_security {
    bool tls;                         /* TLS, with the system's certificates; each of the next four turns it on, too */
    const char *ca_file;              /* PEM: the server's certificate must be signed by one of these */
    const char *cert_file, *key_file; /* shown to a server that asks for it; both or none */
    const char *server_name;          /* expected in the server's certificate; default: the host of the address */
    const char *token_file; /* its first token goes with every call, but in the clear only to unix sockets and to
                                         loopback addresses: INVALID_ARGUMENT for others */
};

/* address as in listen. Connects lazily. sec NULL: plaintext. Errors as those of rpc_server_start's files. */
STATUS_MUST_CHECK enum status_code rpc_channel_open(struct rpc_channel **out, const char *address,
                                                    const struct rpc_client_security *sec, struct status *st);
/* The same in plaintext. */
STATUS_MUST_CHECK enum status_code rpc_channel_create(struct rpc_channel **out, const char *address, struct status *st);
void rpc_channel_destroy(struct rpc_channel *ch); /* after its streams; NULL is fine */

/* One message each way. *reply: unpacked, freed by the caller with protobuf_c_message_free_unpacked. The error is the
 * status of the call; when nobody listens: UNAVAILABLE. timeout_ms 0: 10000. */
STATUS_MUST_CHECK enum status_code rpc_unary(struct rpc_channel *ch, const char *path, const ProtobufCMessage *request,
                                             const ProtobufCMessageDescriptor *reply_type, ProtobufCMessage **reply,
                                             uint32_t timeout_ms, struct status *st);

/* deadline_ms 0: none. */
STATUS_MUST_CHECK enum status_code rpc_stream_open(struct rpc_stream **out, struct rpc_channel *ch, const char *path,
                                                   uint64_t deadline_ms, struct status *st);
/* Any thread, one after the other (a lock is inside). Waits until the message is written, timeout_ms at most
 * (DEADLINE_EXCEEDED: the stream is of no use then). UNAVAILABLE or the call's status when the stream has ended. */
STATUS_MUST_CHECK enum status_code rpc_stream_send(struct rpc_stream *s, const ProtobufCMessage *m, uint32_t timeout_ms,
                                                   struct status *st);
/* Likewise: behind a message that is being written, timeout_ms at most. */
STATUS_MUST_CHECK enum status_code rpc_stream_half_close(struct rpc_stream *s, uint32_t timeout_ms, struct status *st);
/* One thread. *msg: the next message (valid until the next recv), NULL at the end of the stream with status OK. Another
 * end is returned as its status. timeout_ms 0: no bound but the call's own. DEADLINE_EXCEEDED with *timed_out set: nothing
 * came in time, the stream is intact. timed_out may be NULL. */
STATUS_MUST_CHECK enum status_code rpc_stream_recv(struct rpc_stream *s, const void **msg, size_t *len,
                                                   uint32_t timeout_ms, bool *timed_out, struct status *st);
/* Any thread; a recv or send under way ends with CANCELLED. */
void rpc_stream_cancel(struct rpc_stream *s);
/* Value of a trailer after the end of the stream; NULL without it. */
const char *rpc_stream_trailer(const struct rpc_stream *s, const char *key);
void rpc_stream_close(struct rpc_stream *s); /* cancels what is under way; NULL is fine */

/* ---- many calls at once (server streaming): load generators ---- */

struct rpc_many;
struct rpc_many_event {
    void *user;          /* as given to rpc_many_start */
    const void *message; /* valid until the next rpc_many_next; NULL: the call has ended, as `status` says */
    size_t len;
    struct status status;
};

/* One thread calls all four. */
STATUS_MUST_CHECK enum status_code rpc_many_create(struct rpc_many **out, struct status *st);
/* Opens a call and sends the request; does not wait. ch outlives the call, deadline_ms 0: none. */
STATUS_MUST_CHECK enum status_code rpc_many_start(struct rpc_many *m, struct rpc_channel *ch, const char *path,
                                                  const ProtobufCMessage *request, uint64_t deadline_ms, void *user,
                                                  struct status *st);
/* The next event of any call; false: none within timeout_us. Each call has one event that ends it, its last. */
bool rpc_many_next(struct rpc_many *m, struct rpc_many_event *event, int64_t timeout_us);
void rpc_many_destroy(struct rpc_many *m); /* cancels what is under way; NULL is fine */

#endif
