/* coord_cache.c - what a request says of the prefix cache. */
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <string.h>

#include "coordinator/coord_internal.h"

#define MAX_SALT_BYTES 256

enum status_code take_prefix_cache(const struct coord *c, struct request *r, const Tandem__V1__PrefixCache *m,
                                   struct status *st)
{
    const uint64_t *key = c->intake.salt_key;
    const ProtobufCBinaryData none = {0}, *salt = m ? &m->salt : &none;
    unsigned char digest[EVP_MAX_MD_SIZE];
    r->no_cache_read = m && m->no_read;
    r->no_cache_write = m && m->no_write;
    if (salt->len > MAX_SALT_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "prefix_cache.salt: %zu bytes, expected at most %d", salt->len,
                          MAX_SALT_BYTES);
    if (!HMAC(EVP_sha256(), key, sizeof c->intake.salt_key, salt->data ? salt->data : (const unsigned char *)"",
              salt->len, digest, NULL))
        return status_set(st, ST_INTERNAL, "prefix_cache.salt: libcrypto could not hash it");
    memcpy(&r->salt, digest, sizeof r->salt);
    return ST_OK;
}
