/* rpc_security.h - who may connect and who may call; shared by rpc_file.c, rpc_token.c, rpc_tls.c, rpc_guard.c and the server
 * and client that use them. For operators it is described in README.md, "Security". */
#ifndef TANDEM_RPC_SECURITY_H
#define TANDEM_RPC_SECURITY_H

#include <grpc/grpc_security.h>

#include "proto/rpc_internal.h"
#include "proto/rpc_token.h"

/* ---- files that change (rpc_file.c) ---- */

#define RPC_FILE_MAX (256u << 10) /* bytes of a certificate, key or token file */

/* Equal stamps: the file has not changed. All zero: there is none. */
struct rpc_file_stamp {
    uint64_t dev, ino, size, mtime_ns;
};
struct rpc_file_stamp rpc_file_stamp(const char *path); /* NULL: all zero */
bool rpc_file_same(const struct rpc_file_stamp *a, const struct rpc_file_stamp *b);
/* The whole file as a string; `role` and path open the message of an error. rpc_file_forget it. */
STATUS_MUST_CHECK enum status_code rpc_file_read(const char *role, const char *path, char **text, struct status *st);
void rpc_file_forget(char *text, size_t len); /* wipes len bytes and frees; NULL is fine */

void rpc_report(const struct rpc_report *to, bool failed, const char *fmt, ...) STATUS_PRINTF(3, 4);

/* ---- bearer tokens (rpc_token.c): rpc_token.h, and for clients: ---- */

/* "Bearer <the first token of the file>" for a client. */
STATUS_MUST_CHECK enum status_code rpc_token_header(const char *path, char out[RPC_TOKEN_MAX_BYTES + 16],
                                                    struct status *st);

/* ---- certificates (rpc_tls.c) ---- */

struct rpc_tls_files {
    const char *cert, *key; /* both or none */
    const char *ca;         /* whose certificates are believed; NULL: nobody's (server), the system's (client) */
};

struct rpc_tls_stamps {
    struct rpc_file_stamp cert, key, ca;
};

/* PEM texts, checked: they can be read, the key belongs to the certificate, and that is valid today. */
struct rpc_tls_texts {
    char *cert, *key, *ca;
    int64_t not_after_s; /* of the certificate, since 1970 */
    char subject[128], until[32];
};

struct rpc_tls_stamps rpc_tls_stamps(const struct rpc_tls_files *f);
bool rpc_tls_same(const struct rpc_tls_stamps *a, const struct rpc_tls_stamps *b);
/* An error names the file: INVALID_ARGUMENT for what is wrong in it, NOT_FOUND, PERMISSION_DENIED. */
STATUS_MUST_CHECK enum status_code rpc_tls_load(struct rpc_tls_texts *out, const struct rpc_tls_files *f,
                                                const char *ca_role, struct status *st);
void rpc_tls_unload(struct rpc_tls_texts *t);

/* ---- a listener's guard (rpc_guard.c) ---- */

/* Credentials for the core that enforce `sec`. They live as long as the core needs them; release them when the port is
 * bound. Errors as rpc_server_start. */
STATUS_MUST_CHECK enum status_code rpc_guard_credentials(grpc_server_credentials **out,
                                                         const struct rpc_listen_security *sec,
                                                         struct rpc_report report, struct status *st);

#endif
