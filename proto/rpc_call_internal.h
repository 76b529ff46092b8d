/* rpc_call_internal.h - what the two files of a call on the server share: rpc_call.c has its life, its reading and its
 * callbacks, rpc_call_write.c its send queue and its end. The picture of it all opens rpc_call.c. */
#ifndef TANDEM_RPC_CALL_INTERNAL_H
#define TANDEM_RPC_CALL_INTERNAL_H

#include "proto/rpc_internal.h"

enum event { EV_OPEN = 1, EV_MESSAGE = 2, EV_HALF_CLOSE = 4, EV_WRITABLE = 8, EV_CLOSE = 16 };

struct out_message {
    struct out_message *next;
    grpc_byte_buffer *buffer;
    size_t cost; /* bytes it takes of the send queue */
};

struct rpc_call {
    atomic_uint refs; /* the core's side holds one until uses is 0 */
    struct rpc_server *server;
    const struct rpc_method *method; /* NULL: not in the table */
    size_t slot_index;
    struct rpc_tag accept_tag, close_tag, read_tag, write_tag;
    _Atomic(void *) data;

    /* Written by the core while the batch is out, read by whoever gets its tag. */
    grpc_metadata_array metadata;
    grpc_call_details details;
    gpr_timespec deadline;
    grpc_byte_buffer *in;
    int cancelled;

    /* Constant from on_open on. */
    char *strings; /* peer, then request headers */
    int64_t deadline_us;
    uint8_t caller[RPC_CALLER_BYTES];

    pthread_mutex_t lock; /* a leaf: nothing is called with it held */
    grpc_call *core;      /* NULL: not yet, or no longer */
    unsigned uses;
    unsigned events;
    bool dispatching;
    bool opened; /* on_open is due or has run, so on_close is owed */
    bool closed; /* RECV_CLOSE_ON_SERVER is back */
    bool initial_sent;
    bool writing;
    bool finish_wanted; /* status is set */
    bool finish_started;
    struct out_message *head, **tail; /* not yet given to the core */
    struct out_message *current;      /* being written */
    uint32_t pending;                 /* messages in the queue and being written */
    size_t queued_bytes;              /* their cost */
    struct status status;
    uint32_t retry_after_ms;
    /* What the core reads while the status batch is out. */
    grpc_slice detail;
    grpc_metadata trailers[2];
    bool owes_slot; /* no memory for the slot that should have followed */
};

/* rpc_call.c */

/* Runs the callbacks that are due, unless another thread is at it: then that one will find them. */
void rpc_call_dispatch(struct rpc_call *call);
/* Takes one off call->uses; at 0 the core's side of the call is released. */
void rpc_call_use_put(struct rpc_call *call);

/* rpc_call_write.c */

/* With the lock held: drops what is queued and not yet given to the core. */
void rpc_call_drop_queue(struct rpc_call *call);
void rpc_call_write_done(void *owner, bool ok); /* of write_tag */

#endif
