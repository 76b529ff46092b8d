/* agent_secret.c - the secret and what is proven with it. */
#include <errno.h>
#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <string.h>
#include <unistd.h>

#include "k8s/agent.h"

#define FILE_MAX 4096
#define LABEL    "tandem-agent 1 "

enum status_code agent_secrets_parse(struct agent_secrets *out, const char *path, const char *text, size_t bytes,
                                     struct status *st)
{
    struct agent_secrets s = {0};
    enum status_code rc = ST_OK;
    unsigned line = 0;
    for (const char *p = text, *end = text + bytes; rc == ST_OK && p < end;) {
        const char *newline = memchr(p, '\n', (size_t)(end - p));
        size_t len = (size_t)((newline ? newline : end) - p);
        const char *begin = p;
        p += len + (newline != NULL);
        line++;
        while (len > 0 && (begin[len - 1] == '\r' || begin[len - 1] == ' '))
            len--;
        if (len == 0 || begin[0] == '#')
            continue;
        if (s.n == AGENT_SECRETS_MAX)
            rc = status_set(st, ST_INVALID_ARGUMENT, "%.300s: line %u: more than %d secrets", path, line,
                            AGENT_SECRETS_MAX);
        else if (len < AGENT_SECRET_MIN || len > AGENT_SECRET_MAX)
            rc = status_set(st, ST_INVALID_ARGUMENT, "%.300s: line %u: a secret of %zu bytes, expected %d to %d", path,
                            line, len, AGENT_SECRET_MIN, AGENT_SECRET_MAX);
        else {
            s.of[s.n].len = len;
            memcpy(s.of[s.n++].text, begin, len);
        }
    }
    if (rc == ST_OK && s.n == 0)
        rc = status_set(st, ST_INVALID_ARGUMENT, "%.300s: expected a secret, one a line", path);
    if (rc == ST_OK)
        *out = s;
    OPENSSL_cleanse(&s, sizeof s);
    return rc;
}

enum status_code agent_secrets_read(struct agent_secrets *out, const char *path, struct status *st)
{
    char text[FILE_MAX + 1];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return status_errno(st, errno == EACCES ? ST_PERMISSION_DENIED : ST_NOT_FOUND, errno, "secret file %.300s",
                            path);
    size_t len = 0;
    ssize_t n;
    while (len < sizeof text && (n = read(fd, text + len, sizeof text - len)) > 0)
        len += (size_t)n;
    int err = errno;
    close(fd);
    enum status_code rc;
    if (n < 0)
        rc = status_errno(st, ST_UNAVAILABLE, err, "secret file %.300s", path);
    else if (len > FILE_MAX)
        rc = status_set(st, ST_INVALID_ARGUMENT, "secret file %.300s: expected at most %d bytes", path, FILE_MAX);
    else
        rc = agent_secrets_parse(out, path, text, len, st);
    OPENSSL_cleanse(text, sizeof text);
    return rc;
}

bool agent_nonce(uint8_t out[AGENT_NONCE_BYTES])
{
    return RAND_bytes(out, AGENT_NONCE_BYTES) == 1;
}

bool agent_prove(const struct agent_secrets *s, size_t which, enum agent_side side, const struct agent_token *token,
                 uint8_t proof[AGENT_PROOF_BYTES])
{
    static const char *const labels[] = {LABEL "client", LABEL "server"}; /* of one length */
    uint8_t text[sizeof LABEL "client" + 2 * AGENT_NONCE_BYTES + AGENT_REQUEST_MAX];
    size_t n = sizeof LABEL "client";
    if (token->request_bytes > AGENT_REQUEST_MAX)
        return false;
    memcpy(text, labels[side], n);
    memcpy(text + n, token->server_nonce, AGENT_NONCE_BYTES);
    memcpy(text + n + AGENT_NONCE_BYTES, token->client_nonce, AGENT_NONCE_BYTES);
    n += 2 * AGENT_NONCE_BYTES;
    if (token->request_bytes > 0)
        memcpy(text + n, token->request, token->request_bytes);
    unsigned len = 0;
    return HMAC(EVP_sha256(), s->of[which].text, (int)s->of[which].len, text, n + token->request_bytes, proof, &len) &&
           len == AGENT_PROOF_BYTES;
}

int agent_check(const struct agent_secrets *s, enum agent_side side, const struct agent_token *token,
                const uint8_t proof[AGENT_PROOF_BYTES])
{
    int found = -1;
    for (size_t i = 0; i < s->n; i++) { /* all of them, whatever was found */
        uint8_t expected[AGENT_PROOF_BYTES];
        if (agent_prove(s, i, side, token, expected) && CRYPTO_memcmp(expected, proof, sizeof expected) == 0)
            found = (int)i;
    }
    return found;
}
