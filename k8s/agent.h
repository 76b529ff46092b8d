/* agent.h - tandem-agent: mpirun starts its daemons in other pods through it; no ssh, no root, no rights in the cluster.
 *
 *     leader pod                                          worker pod
 *     mpirun -> tandem-agent run HOST orted ... --TCP--> tandem-agent serve -> one keeper process a connection -> orted
 *
 * `plm_rsh_agent` of Open MPI is "tandem-agent run". Both sides hold one secret, a mounted file. Nothing is started that
 * does not carry its proof, and with the proof nothing but a program of the list, with arguments of the list, without a
 * shell. Who holds the secret may run MPI programs as the server's user: that is what it is for, and all.
 *
 * On the wire: frames of type (1 byte), length (4, big endian, at most AGENT_FRAME_MAX), payload.
 *
 *     server  HELLO    "TAG1", server nonce (32): the one-time token, of this connection and no other
 *     client  START    client nonce (32), proof (32), request
 *     server  STARTED  proof (32): this is the server that knows the secret, and it took this very request
 *             REFUSED  status code (1), text; then the connection ends. Ends every failed START, and the token with it
 *     server  STDOUT, STDERR  bytes; EXIT  0 or 1 (by a signal), status or signal: the last one
 *     client  SIGNAL   number (1): SIGTERM, SIGINT or SIGKILL for all that was started
 *
 *     proof   = HMAC-SHA-256(secret, "tandem-agent 1 client" or "... server", NUL, server nonce, client nonce, request)
 *     request = count of arguments (2), of environment entries (2), then each with its NUL; no arguments: a probe, which
 *               is answered with STARTED and EXIT 0 and starts nothing
 *
 * A frame of another type, order or length ends the connection. A connection that ends takes along what it started, and
 * the other way round. What follows STARTED is neither secret nor proven: who can change packets on the way can end a
 * program, but not start one.
 *
 * Prefix agent_. Everything is single-threaded; a keeper serves one connection and ends.
 */
#ifndef TANDEM_K8S_AGENT_H
#define TANDEM_K8S_AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "proto/status.h"

#define AGENT_PORT         50061
#define AGENT_FRAME_MAX    (64u * 1024)
#define AGENT_REQUEST_MAX  (32u * 1024)
#define AGENT_ARGS_MAX     256
#define AGENT_ENV_MAX      64
#define AGENT_NONCE_BYTES  32
#define AGENT_PROOF_BYTES  32
#define AGENT_SECRETS_MAX  4
#define AGENT_SECRET_MIN   32 /* characters: half a SHA-256 in hexadecimal */
#define AGENT_SECRET_MAX   512
#define AGENT_PROGRAMS_MAX 4
#define AGENT_SESSIONS_MAX 256
#define AGENT_LOGIN_MS     5000  /* from a connection to its START, and from START to the answer */
#define AGENT_SEND_MS      60000 /* a peer that takes nothing for so long is gone */
#define AGENT_GRACE_MS     3000  /* from SIGTERM to SIGKILL */

#define AGENT_EXIT_FAILED 255 /* of `run`, as ssh's: no program ran, or nobody knows how it ended */

/* ---- secret (agent_secret.c) ---- */

/* One secret a line, # begins a comment. Clients use the first, servers take any: so that they can change. */
struct agent_secrets {
    size_t n;
    struct {
        size_t len;
        char text[AGENT_SECRET_MAX];
    } of[AGENT_SECRETS_MAX];
};

enum status_code agent_secrets_read(struct agent_secrets *out, const char *path, struct status *st) STATUS_MUST_CHECK;
enum status_code agent_secrets_parse(struct agent_secrets *out, const char *path, const char *text, size_t bytes,
                                     struct status *st) STATUS_MUST_CHECK;

struct agent_token { /* what a proof is made of, beside the secret */
    uint8_t server_nonce[AGENT_NONCE_BYTES], client_nonce[AGENT_NONCE_BYTES];
    const uint8_t *request;
    size_t request_bytes;
};

enum agent_side { AGENT_CLIENT, AGENT_SERVER };

/* False when the library fails. */
bool agent_nonce(uint8_t out[AGENT_NONCE_BYTES]);
bool agent_prove(const struct agent_secrets *s, size_t which, enum agent_side side, const struct agent_token *token,
                 uint8_t proof[AGENT_PROOF_BYTES]);

/* Index of the secret that the proof was made with, -1: of none. Takes the same time for each that is wrong. */
int agent_check(const struct agent_secrets *s, enum agent_side side, const struct agent_token *token,
                const uint8_t proof[AGENT_PROOF_BYTES]);

/* ---- request (agent_request.c) ---- */

struct agent_request { /* pointers into the bytes it was read from */
    size_t argc, envc;
    const char *argv[AGENT_ARGS_MAX + 1]; /* both end with a NULL */
    const char *env[AGENT_ENV_MAX + 1];
};

/* Bytes written, 0 when it does not fit. */
size_t agent_request_write(const struct agent_request *r, uint8_t out[AGENT_REQUEST_MAX]);
enum status_code agent_request_read(struct agent_request *out, const uint8_t *bytes, size_t n,
                                    struct status *st) STATUS_MUST_CHECK;

/* Splits a command line as mpirun writes it for a shell: words and double quotes. All that a shell would make something of
 * ($, `, ;, globs ...) is refused outside of quotes, $ ` \ " within. text is changed, and argv points into it. */
enum status_code agent_words(char *text, const char **argv, size_t max, size_t *argc,
                             struct status *st) STATUS_MUST_CHECK;

/* ---- policy (agent_policy.c) ---- */

struct agent_policy {
    size_t n_programs;
    char *programs[AGENT_PROGRAMS_MAX]; /* full paths; asked for by their last part */
};

/* path: a full path, or a name that is looked up in PATH. */
enum status_code agent_policy_allow(struct agent_policy *p, const char *path, struct status *st) STATUS_MUST_CHECK;
void agent_policy_fini(struct agent_policy *p);

/* Whether a request may be started; *program: the path to start. */
enum status_code agent_policy_check(const struct agent_policy *p, const struct agent_request *r, const char **program,
                                    struct status *st) STATUS_MUST_CHECK;

/* Whether this NAME=VALUE may go along. Clients send those of theirs that may. */
bool agent_policy_env(const char *entry);

/* ---- wire (agent_wire.c) ---- */

enum agent_frame {
    AGENT_HELLO = 1,
    AGENT_STARTED,
    AGENT_REFUSED,
    AGENT_STDOUT,
    AGENT_STDERR,
    AGENT_EXIT,
    AGENT_START = 16,
    AGENT_SIGNAL,
};

#define AGENT_HEADER 5 /* bytes before a frame's payload */

struct agent_reader { /* of one connection */
    size_t have;      /* bytes in buffer */
    uint8_t buffer[AGENT_HEADER + AGENT_FRAME_MAX];
};

int64_t agent_now_ms(void);

void agent_write_header(uint8_t out[AGENT_HEADER], enum agent_frame type, size_t bytes);

/* All sockets here are non-blocking. ST_DEADLINE_EXCEEDED, ST_UNAVAILABLE (gone), ST_DATA_LOSS (not this protocol). */
enum status_code agent_send(int fd, enum agent_frame type, const void *payload, size_t bytes, int64_t until_ms,
                            struct status *st) STATUS_MUST_CHECK;

/* Takes what is there. A whole frame: *payload points into r until agent_frame_done. *payload NULL: not yet. */
enum status_code agent_receive(int fd, struct agent_reader *r, enum agent_frame *type, const uint8_t **payload,
                               size_t *bytes, struct status *st) STATUS_MUST_CHECK;
void agent_frame_done(struct agent_reader *r);

/* Waits for a whole frame. */
enum status_code agent_await(int fd, struct agent_reader *r, int64_t until_ms, enum agent_frame *type,
                             const uint8_t **payload, size_t *bytes, struct status *st) STATUS_MUST_CHECK;

/* "host:port", "[v6]:port", port alone or host alone (then port AGENT_PORT). */
enum status_code agent_split_address(const char *address, char host[256], char port[8],
                                     struct status *st) STATUS_MUST_CHECK;
enum status_code agent_listen(const char *address, int *fd, unsigned *port, struct status *st) STATUS_MUST_CHECK;

/* Tries again, also while the name is unknown, until until_ms: pods come up in any order. */
enum status_code agent_connect(const char *address, int64_t until_ms, int *fd, struct status *st) STATUS_MUST_CHECK;

/* A peer that is gone without a word is noticed after some 20 s. */
void agent_keep_alive(int fd);

/* ---- the commands ---- */

struct agent_server_config {
    const char *listen, *secret_file;
    uint32_t max_sessions; /* connections at once; more are refused */
    uint32_t drain_ms;     /* on the first signal what runs gets so long to end by itself; nothing new is taken */
    struct agent_policy policy;
};

/* Until SIGTERM or SIGINT; returns the exit status. (agent_server.c) */
int agent_serve(const struct agent_server_config *cfg);

struct agent_keep_config {
    const struct agent_secrets *secrets;
    const struct agent_policy *policy;
    const char *peer;            /* for the log */
    uint32_t login_ms, grace_ms; /* AGENT_LOGIN_MS, AGENT_GRACE_MS */
};

/* One connection, from HELLO to its end; then nothing that it started is left. Called in a process of its own, which ends
 * behind it. (agent_keeper.c) */
void agent_keep(int fd, const struct agent_keep_config *cfg);

struct agent_client_config {
    const char *secret_file;
    const char *resolve; /* "NAME=ADDRESS,...": instead of name service; NULL */
    uint32_t port;
    uint32_t connect_ms;
};

/* What mpirun calls; host and command as it gives them. Returns the program's exit status. (agent_client.c) */
int agent_run(const struct agent_client_config *cfg, int argc, char **argv);

/* ST_OK when an agent there knows the secret and would start a program. */
enum status_code agent_probe(const struct agent_client_config *cfg, const char *host,
                             struct status *st) STATUS_MUST_CHECK;

/* ---- hosts (agent_hosts.c) ---- */

struct agent_hosts_config {
    uint32_t slots;         /* of each host */
    const char *from;       /* hostfile of mpi-operator, or NULL */
    const char *set;        /* NAME.SERVICE of a StatefulSet, or NULL: then LWS_LEADER_ADDRESS */
    uint32_t size;          /* hosts; 0: LWS_GROUP_SIZE */
    const char *leader;     /* LWS_LEADER_ADDRESS */
    const char *group_size; /* LWS_GROUP_SIZE */
    const char *output;     /* NULL: standard output */
};

#define AGENT_HOSTS_MAX 1024

/* The lines of a hostfile, to be freed. */
enum status_code agent_hosts(const struct agent_hosts_config *cfg, char **text, struct status *st) STATUS_MUST_CHECK;

#endif
