/* coord_cache.c - what a request says of the prefix cache. */
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <string.h>

#include "coordinator/coord_internal.h"

#define MAX_SALT_BYTES 256

enum status_code intake_hash(const struct coord *c, const char *field, const ProtobufCBinaryData *text, size_t most,
                             uint64_t *out, struct status *st)
{
    const uint64_t *key = c->intake.salt_key;
    unsigned char digest[EVP_MAX_MD_SIZE];
    if (text->len > most)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %zu bytes, expected at most %zu", field, text->len, most);
    if (!HMAC(EVP_sha256(), key, sizeof c->intake.salt_key, text->data ? text->data : (const unsigned char *)"",
              text->len, digest, NULL))
        return status_set(st, ST_INTERNAL, "%s: libcrypto could not hash it", field);
    memcpy(out, digest, sizeof *out);
    return ST_OK;
}

enum status_code take_prefix_cache(const struct coord *c, struct request *r, const Tandem__V1__PrefixCache *m,
                                   struct status *st)
{
    const ProtobufCBinaryData none = {0};
    r->no_cache_read = m && m->no_read;
    r->no_cache_write = m && m->no_write;
    return intake_hash(c, "prefix_cache.salt", m ? &m->salt : &none, MAX_SALT_BYTES, &r->salt, st);
}
