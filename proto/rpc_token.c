/* rpc_token.c - bearer tokens from a file.
 *
 * Only SHA-256 digests are kept and compared: so the length of a token shows nowhere, memory holds no token, and a compare
 * of 32 bytes against each of the digests takes the same time whatever is presented.
 */
#include <grpc/support/time.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/rpc_security.h"

#define DIGEST_BYTES 32
#define LOOK_MS      200 /* between looks at the file's stamp */
#define SCHEME       "bearer "

struct digests {
    size_t n;
    uint8_t of[RPC_TOKENS_MAX][DIGEST_BYTES];
};

struct rpc_tokens {
    char *path;
    struct rpc_report report;
    pthread_mutex_t lock; /* a leaf but for `report` */
    struct digests digests;
    struct rpc_file_stamp stamp; /* of the file as it was read last, well or not */
    gpr_timespec next_look;
};

static bool digest(const void *token, size_t len, uint8_t out[DIGEST_BYTES])
{
    return EVP_Digest(token, len, out, NULL, EVP_sha256(), NULL) == 1;
}

/* The next token; *rest moves behind its line. NULL at the end. */
static const char *next_token(const char **rest, size_t *len, unsigned *line)
{
    while (**rest) {
        const char *begin = *rest + strspn(*rest, " \t");
        size_t all = strcspn(begin, "\n");
        size_t n = all;
        while (n > 0 && strchr(" \t\r", begin[n - 1]))
            n--;
        *rest = begin + all + (begin[all] == '\n');
        ++*line;
        if (n > 0 && begin[0] != '#') {
            *len = n;
            return begin;
        }
    }
    return NULL;
}

/* Characters of RFC 6750; the message shows none of them. */
static enum status_code check_token(const char *path, const char *token, size_t len, unsigned line, struct status *st)
{
    static const char legal[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~+/=";
    if (len < RPC_TOKEN_MIN_BYTES || len > RPC_TOKEN_MAX_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "token-file %.300s: line %u: a token of %zu bytes, expected %d to %d", path, line, len,
                          RPC_TOKEN_MIN_BYTES, RPC_TOKEN_MAX_BYTES);
    if (strspn(token, legal) < len)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "token-file %.300s: line %u: expected letters, digits and -._~+/= only", path, line);
    return ST_OK;
}

static enum status_code read_digests(const char *path, struct digests *out, struct status *st)
{
    char *text = NULL;
    enum status_code rc = rpc_file_read("token-file", path, &text, st);
    if (rc != ST_OK)
        return rc;
    const char *rest = text, *token;
    size_t len = 0;
    unsigned line = 0;
    struct digests d = {0};
    while (rc == ST_OK && (token = next_token(&rest, &len, &line))) {
        rc = check_token(path, token, len, line, st);
        if (rc == ST_OK && d.n == RPC_TOKENS_MAX)
            rc = status_set(st, ST_INVALID_ARGUMENT, "token-file %.300s: line %u: more than %d tokens", path, line,
                            RPC_TOKENS_MAX);
        if (rc == ST_OK && !digest(token, len, d.of[d.n++]))
            rc = status_set(st, ST_INTERNAL, "token-file %.300s: SHA-256 failed", path);
    }
    if (rc == ST_OK && d.n == 0)
        rc = status_set(st, ST_INVALID_ARGUMENT, "token-file %.300s: expected a token, one a line", path);
    if (rc == ST_OK)
        *out = d;
    rpc_file_forget(text, strlen(text));
    return rc;
}

enum status_code rpc_tokens_create(struct rpc_tokens **out, const char *path, struct rpc_report report,
                                   struct status *st)
{
    struct rpc_tokens *t = calloc(1, sizeof *t);
    if (!t || !(t->path = strdup(path))) {
        free(t);
        return status_nomem(st, "tokens", sizeof *t);
    }
    t->report = report;
    pthread_mutex_init(&t->lock, NULL);
    t->stamp = rpc_file_stamp(path); /* before it is read: a change meanwhile is seen at the next look */
    t->next_look = gpr_now(GPR_CLOCK_MONOTONIC);
    enum status_code rc = read_digests(path, &t->digests, st);
    if (rc != ST_OK) {
        rpc_tokens_destroy(t);
        return rc;
    }
    *out = t;
    return ST_OK;
}

void rpc_tokens_destroy(struct rpc_tokens *t)
{
    if (!t)
        return;
    pthread_mutex_destroy(&t->lock);
    free(t->path);
    free(t);
}

/* With the lock held. A file that is gone or wrong leaves the tokens as they were: half a rotation must lock nobody out. */
static void look(struct rpc_tokens *t)
{
    gpr_timespec now = gpr_now(GPR_CLOCK_MONOTONIC);
    if (gpr_time_cmp(now, t->next_look) < 0)
        return;
    t->next_look = gpr_time_add(now, gpr_time_from_millis(LOOK_MS, GPR_TIMESPAN));
    struct rpc_file_stamp stamp = rpc_file_stamp(t->path);
    if (rpc_file_same(&stamp, &t->stamp))
        return;
    t->stamp = stamp;
    struct status st = STATUS_INIT;
    if (read_digests(t->path, &t->digests, &st) == ST_OK)
        rpc_report(&t->report, false, "token-file %s: read again, tokens: %zu", t->path, t->digests.n);
    else
        rpc_report(&t->report, true, "%s; the tokens read before stay", st.message);
}

bool rpc_tokens_accept(struct rpc_tokens *t, const void *value, size_t len)
{
    size_t scheme = sizeof SCHEME - 1;
    uint8_t presented[DIGEST_BYTES];
    if (len <= scheme || strncasecmp(value, SCHEME, scheme) != 0 ||
        !digest((const char *)value + scheme, len - scheme, presented))
        return false;
    unsigned found = 0;
    pthread_mutex_lock(&t->lock);
    look(t);
    for (size_t i = 0; i < t->digests.n; i++)
        found |= CRYPTO_memcmp(presented, t->digests.of[i], DIGEST_BYTES) == 0;
    pthread_mutex_unlock(&t->lock);
    return found != 0;
}

enum status_code rpc_token_header(const char *path, char out[RPC_TOKEN_MAX_BYTES + 16], struct status *st)
{
    char *text = NULL;
    enum status_code rc = rpc_file_read("token-file", path, &text, st);
    if (rc != ST_OK)
        return rc;
    const char *rest = text;
    size_t len = 0;
    unsigned line = 0;
    const char *token = next_token(&rest, &len, &line);
    if (!token)
        rc = status_set(st, ST_INVALID_ARGUMENT, "token-file %.300s: expected a token, one a line", path);
    else if ((rc = check_token(path, token, len, line, st)) == ST_OK)
        snprintf(out, RPC_TOKEN_MAX_BYTES + 16, "Bearer %.*s", (int)len, token);
    rpc_file_forget(text, strlen(text));
    return rc;
}
