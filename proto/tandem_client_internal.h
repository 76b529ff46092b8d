/* tandem_client_internal.h - what tandem_client.c and tandem_generation.c share. */
#ifndef TANDEM_CLIENT_INTERNAL_H
#define TANDEM_CLIENT_INTERNAL_H

#include "proto/rpc.h"
#include "proto/tandem_client.h"

struct tandem_client {
    struct rpc_channel *channel;
    uint32_t timeout_ms;
    bool no_attach;
    void (*on_lost)(void *ctx, const struct status *st, uint32_t attach_ms);
    void *on_lost_ctx;
};

#endif
