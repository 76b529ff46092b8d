/* rpc_caller.c - who calls, as a number that says nothing about the secret: whoever showed the same is the same. */
#include <grpc/grpc_security.h>
#include <openssl/evp.h>
#include <string.h>

#include "proto/rpc_internal.h"

#define HEADER "authorization"

/* Made with the first thing that is shown: most calls over a listener without secrets show nothing. */
struct digest {
    EVP_MD_CTX *ctx;
    bool failed;
};

static void begin(struct digest *d)
{
    if (d->ctx || d->failed)
        return;
    d->ctx = EVP_MD_CTX_new();
    d->failed = !d->ctx || !EVP_DigestInit_ex(d->ctx, EVP_sha256(), NULL);
}

/* A token's digest and a name's never meet: the first byte tells them apart. */
static void add(struct digest *d, char kind, const void *data, size_t len)
{
    uint64_t n = len;
    begin(d);
    if (d->failed)
        return;
    EVP_DigestUpdate(d->ctx, &kind, 1);
    EVP_DigestUpdate(d->ctx, &n, sizeof n);
    EVP_DigestUpdate(d->ctx, data, len);
}

/* Out of the array, the order of the others kept. The array is the core's, which frees no more than its own memory. */
static bool take_header(struct digest *d, grpc_metadata_array *md)
{
    size_t kept = 0;
    for (size_t i = 0; i < md->count; i++) {
        if (grpc_slice_str_cmp(md->metadata[i].key, HEADER) == 0)
            add(d, 't', GRPC_SLICE_START_PTR(md->metadata[i].value), GRPC_SLICE_LENGTH(md->metadata[i].value));
        else
            md->metadata[kept++] = md->metadata[i];
    }
    bool any = kept < md->count;
    md->count = kept;
    return any;
}

static void take_names(struct digest *d, grpc_call *core)
{
    grpc_auth_context *auth = grpc_call_auth_context(core);
    if (auth && grpc_auth_context_peer_is_authenticated(auth)) {
        grpc_auth_property_iterator it = grpc_auth_context_peer_identity(auth);
        for (const grpc_auth_property *p; (p = grpc_auth_property_iterator_next(&it));)
            add(d, 'n', p->value, p->value_length);
    }
    if (auth)
        grpc_auth_context_release(auth);
}

void rpc_caller_take(uint8_t out[RPC_CALLER_BYTES], grpc_call *core, grpc_metadata_array *md)
{
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned len = 0;
    struct digest d = {0};
    memset(out, 0, RPC_CALLER_BYTES);
    if (!take_header(&d, md))
        take_names(&d, core);
    if (d.ctx && !d.failed && EVP_DigestFinal_ex(d.ctx, digest, &len) && len >= RPC_CALLER_BYTES)
        memcpy(out, digest, RPC_CALLER_BYTES);
    EVP_MD_CTX_free(d.ctx);
}
