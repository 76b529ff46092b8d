/* rpc_caller.c - who calls, as a number that says nothing about the secret: whoever showed the same is the same. */
#include <grpc/grpc_security.h>
#include <openssl/evp.h>
#include <string.h>

#include "proto/rpc_internal.h"

#define HEADER "authorization"

/* A token's digest and a name's never meet: the first byte tells them apart. */
static void add(EVP_MD_CTX *ctx, char kind, const void *data, size_t len)
{
    uint64_t n = len;
    if (!ctx)
        return;
    EVP_DigestUpdate(ctx, &kind, 1);
    EVP_DigestUpdate(ctx, &n, sizeof n);
    EVP_DigestUpdate(ctx, data, len);
}

/* Out of the array, the order of the others kept. The array is the core's, which frees no more than its own memory. */
static bool take_header(EVP_MD_CTX *ctx, grpc_metadata_array *md)
{
    size_t kept = 0;
    for (size_t i = 0; i < md->count; i++) {
        if (grpc_slice_str_cmp(md->metadata[i].key, HEADER) == 0)
            add(ctx, 't', GRPC_SLICE_START_PTR(md->metadata[i].value), GRPC_SLICE_LENGTH(md->metadata[i].value));
        else
            md->metadata[kept++] = md->metadata[i];
    }
    bool any = kept < md->count;
    md->count = kept;
    return any;
}

static bool take_names(EVP_MD_CTX *ctx, grpc_call *core)
{
    grpc_auth_context *auth = grpc_call_auth_context(core);
    bool any = false;
    if (auth && grpc_auth_context_peer_is_authenticated(auth)) {
        grpc_auth_property_iterator it = grpc_auth_context_peer_identity(auth);
        for (const grpc_auth_property *p; (p = grpc_auth_property_iterator_next(&it)); any = true)
            add(ctx, 'n', p->value, p->value_length);
    }
    if (auth)
        grpc_auth_context_release(auth);
    return any;
}

void rpc_caller_take(uint8_t out[RPC_CALLER_BYTES], grpc_call *core, grpc_metadata_array *md)
{
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned len = 0;
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    memset(out, 0, RPC_CALLER_BYTES);
    bool ok = ctx && EVP_DigestInit_ex(ctx, EVP_sha256(), NULL);
    bool any = take_header(ctx, md) || take_names(ctx, core);
    if (ok && any && EVP_DigestFinal_ex(ctx, digest, &len) && len >= RPC_CALLER_BYTES)
        memcpy(out, digest, RPC_CALLER_BYTES);
    EVP_MD_CTX_free(ctx);
}
