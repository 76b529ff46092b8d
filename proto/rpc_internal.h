/* rpc_internal.h - shared by the rpc_*.c files of this folder only. The rules that span them are in README.md. */
#ifndef TANDEM_RPC_INTERNAL_H
#define TANDEM_RPC_INTERNAL_H

#include <grpc/grpc.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "proto/rpc.h"

/* ---- the gRPC core as a library (rpc_core.c) ---- */

/* Starts the library with the first server or channel of the process. It is never stopped: after a write that had to wait
 * for its peer, grpc_shutdown waits up to 10 s for a poller of the core's own, and every grpc_init meanwhile waits with it
 * (a client that reconnects, a command that ends). Its threads block every signal. */
void rpc_core_start(void);

/* Blocks every signal in the calling thread, for the time in which threads are created. */
void rpc_signals_block(sigset_t *old);
void rpc_signals_restore(const sigset_t *old);

gpr_timespec rpc_after_ms(uint64_t ms); /* 0: never */

/* A pointer that travels through a completion queue. Whoever starts a batch arms its tag, whoever gets it back disarms
 * it: that catches a tag that is out twice, and tells a thread sanitizer of the order which the core guarantees between
 * the two (it cannot see into the core). */
struct rpc_tag {
    void (*done)(void *owner, bool ok);
    void *owner;
    bool armed;
};

void rpc_tag_arm(struct rpc_tag *tag);
void rpc_tag_disarm(struct rpc_tag *tag);
void rpc_tag_run(struct rpc_tag *tag, bool ok); /* disarms it and calls done */
/* grpc_call_start_batch with the tag armed. A refusal is a mistake of ours (the core would never complete it): abort. */
void rpc_batch_start(grpc_call *call, const grpc_op *ops, size_t n_ops, struct rpc_tag *tag);

/* ---- addresses (rpc_address.c) ---- */

#define RPC_TARGET_MAX 320

/* Target for the core: "unix:PATH", "ipv4:A:P", "ipv6:[A]:P" or "dns:///HOST:P". `what` opens the error message. */
STATUS_MUST_CHECK enum status_code rpc_address_target(const char *address, const char *what, bool port_0_allowed,
                                                      char target[RPC_TARGET_MAX], struct status *st);
/* Can a server listen there? Removes a stale unix socket. Errors as rpc_server_start. */
STATUS_MUST_CHECK enum status_code rpc_address_probe(const char *address, struct status *st);
bool rpc_address_is_unix(const char *address);

/* ---- messages and headers (rpc_message.c) ---- */

/* Packed message; the core takes no ownership of the buffer itself: grpc_byte_buffer_destroy when written. */
grpc_byte_buffer *rpc_pack(const ProtobufCMessage *m, size_t *bytes);
/* One slice with all bytes; grpc_slice_unref it. */
grpc_slice rpc_flatten(grpc_byte_buffer *b);
/* An error's text from the network into a status. */
enum status_code rpc_status_from_slice(struct status *st, grpc_status_code code, grpc_slice details);

/* ---- details of an error (rpc_details.c) ---- */

#define RPC_DETAILS_MAX (3 * STATUS_MESSAGE_MAX)
/* The trailer grpc-status-details-bin: a google.rpc.Status with a BadRequest that names the field and a RetryInfo. Returns
 * its bytes; 0 when there is neither. */
size_t rpc_details_encode(const struct status *st, uint32_t retry_after_ms, uint8_t out[RPC_DETAILS_MAX]);

/* rpc_caller.c: see rpc_call_caller. Takes the "authorization" headers out of md. */
void rpc_caller_take(uint8_t out[RPC_CALLER_BYTES], grpc_call *core, grpc_metadata_array *md);

/* Copies "first\0key\0value\0key\0value\0\0"; NULL when out of memory. */
char *rpc_strings_copy(const char *first, const grpc_metadata_array *md);
const char *rpc_strings_find(const char *strings, const char *key);

/* ---- server (rpc_server.c) and its calls (rpc_call.c) ---- */

struct rpc_server {
    grpc_completion_queue *cq;
    grpc_completion_queue *idle_cq; /* nothing ever completes on it: see poll_main */
    grpc_server *core;
    const struct rpc_method *methods;
    size_t n_methods;
    void **registered; /* the core's handle of methods[i] */
    uint32_t max_send_queue_bytes;
    uint16_t *ports; /* of listen[i] */
    size_t n_ports;
    pthread_t *threads;
    size_t n_threads;
    bool shut_down;
    struct rpc_tag shutdown_tag;
    atomic_uint live; /* calls between on_open and on_close */
    atomic_bool stopping;

    pthread_mutex_t lock; /* a leaf: nothing is called with it held */
    pthread_cond_t changed;
    uint32_t n_calls;        /* slots waiting for a call and calls that the core knows */
    uint32_t n_active;       /* of these, calls */
    bool shutdown_confirmed; /* by the core */
};

/* One more call may come in for method `index`; n_methods stands for any method that is not in the table. False when out
 * of memory; nothing happens in a server that stops. */
bool rpc_slot_open(struct rpc_server *s, size_t index);
void rpc_server_slot_begins(struct rpc_server *s);
void rpc_server_call_begins(struct rpc_server *s);                /* a slot has become a call */
void rpc_server_call_ends(struct rpc_server *s, bool was_active); /* after its last use of the core */

/* ---- client (rpc_channel.c; calls in rpc_client.c, streams in rpc_stream.c) ---- */

/* Waits for one tag. False: it did not come in time. *ok: how its batch ended. */
bool rpc_pluck(grpc_completion_queue *cq, struct rpc_tag *tag, gpr_timespec deadline, bool *ok);
void rpc_cq_destroy(grpc_completion_queue *cq); /* nothing is out on it any more */

/* A call and what it needs of its channel until it has ended. */
struct rpc_link;
struct rpc_client_call {
    grpc_call *core;
    struct rpc_link *link;
    grpc_metadata headers[1]; /* for GRPC_OP_SEND_INITIAL_METADATA */
    size_t n_headers;
};
void rpc_client_call_begin(struct rpc_client_call *c, struct rpc_channel *ch, const char *path, uint64_t deadline_ms,
                           grpc_completion_queue *cq);
void rpc_client_call_end(struct rpc_client_call *c);           /* nothing of it is out any more */
const char *rpc_channel_address(const struct rpc_channel *ch); /* as given, for messages */
/* The status that a call ended with; names the address where the network is to blame. */
enum status_code rpc_client_status(const struct rpc_channel *ch, grpc_status_code code, grpc_slice details,
                                   struct status *st);

#endif
