/* rpc_token.h - bearer tokens of a file, for listeners that are not gRPC's as well. Prefix rpc_tokens_. */
#ifndef TANDEM_RPC_TOKEN_H
#define TANDEM_RPC_TOKEN_H

#include <stdbool.h>
#include <stddef.h>

#include "proto/status.h"

/* Where a reload is reported to; fn may be NULL. */
struct rpc_report {
    void (*fn)(void *ctx, bool failed, const char *message);
    void *ctx;
};

#define RPC_TOKENS_MAX      32 /* in a file */
#define RPC_TOKEN_MIN_BYTES 16
#define RPC_TOKEN_MAX_BYTES 512

/* The tokens that a server takes, one a line; blank lines and those that begin with # are skipped. Thread-safe. */
struct rpc_tokens;
STATUS_MUST_CHECK enum status_code rpc_tokens_create(struct rpc_tokens **out, const char *path,
                                                     struct rpc_report report, struct status *st);
void rpc_tokens_destroy(struct rpc_tokens *t); /* NULL is fine */
/* Is this value of "authorization" "Bearer " and one of them? The time it takes says nothing about them. Reads the file
 * again first when it has changed. */
bool rpc_tokens_accept(struct rpc_tokens *t, const void *value, size_t len);

#endif
