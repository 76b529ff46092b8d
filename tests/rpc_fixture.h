/* rpc_fixture.h - for the suites of proto/rpc.h: a server with four methods, and a client's usual moves.
 *
 * /test.T/Echo  unary; text "busy" fails with UNAVAILABLE and a retry hint
 * /test.T/Count server stream; token_ids of the request: how many messages (UINT32_MAX: no end), of how many bytes
 * /test.T/Hold  server stream that does nothing; a reference to the last call is in srv.held
 * /test.T/Bidi  echoes each message, ends at the half close
 * and grpc.health.v1. One server at a time: Check runs each test in a process of its own.
 */
#ifndef TANDEM_RPC_FIXTURE_H
#define TANDEM_RPC_FIXTURE_H

#include <check.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/rpc.h"
#include "tandem/v1/inference.pb-c.h"

typedef Tandem__V1__GenerateResponse Msg;
#define MSG_INIT TANDEM__V1__GENERATE_RESPONSE__INIT
#define MSG_TYPE (&tandem__v1__generate_response__descriptor)

#ifdef TANDEM_SANITIZED
#define SLOW 10 /* sanitizers and the time they take */
#else
#define SLOW 1
#endif
#define PATIENCE_MS 20000 /* for what must happen; a test that waits this long fails */

int64_t now_us(void);
void sleep_ms(unsigned ms);

/* Waits until expr holds. */
#define AWAIT(expr)                                                                                                    \
    do {                                                                                                               \
        int64_t end_ = now_us() + PATIENCE_MS * 1000;                                                                  \
        while (!(expr) && now_us() < end_)                                                                             \
            sleep_ms(1);                                                                                               \
        ck_assert_msg(expr, "did not happen: %s", #expr);                                                              \
    } while (0)

#define OK(expr)                                                                                                       \
    do {                                                                                                               \
        struct status st_ = STATUS_INIT;                                                                               \
        struct status *st = &st_;                                                                                      \
        enum status_code rc_ = (expr);                                                                                 \
        ck_assert_msg(rc_ == ST_OK, "%s: %s %s", #expr, status_name(rc_), st_.message);                                \
    } while (0)

struct test_server {
    struct rpc_server *rpc;
    struct rpc_health *health;
    struct rpc_method methods[4 + RPC_HEALTH_METHODS];
    char address[160];
    atomic_uint opens, closes, cancelled, messages, half_closes, writables, overlaps, refused_sends;
    _Atomic int64_t closed_at_us, deadline_us;
    _Atomic(struct rpc_call *) held; /* Hold: the last call, with a reference */
    char peer[64], header[64];
};

extern struct test_server srv;

#define NO_EXTRAS ((struct rpc_server_config){0})

/* Methods, listen address and health are filled in, the rest of `extra` is kept. */
void server_start(const char *listen, struct rpc_server_config extra);
/* Shuts down; each on_open must have had its one on_close, and no callback another beside it. */
void server_stop(uint32_t grace_ms);

bool text_is(const Msg *m, const char *s);
struct rpc_channel *connect_to(const char *address);
enum status_code echo(struct rpc_channel *ch, const char *text, struct status *st);
/* A stream with one request and the half close sent. */
struct rpc_stream *open_with(struct rpc_channel *ch, const char *path, uint64_t deadline_ms, uint32_t count,
                             uint32_t size);
int64_t next_id(struct rpc_stream *s);                           /* the number in the next message; -1 at the end */
enum status_code drain(struct rpc_stream *s, struct status *st); /* reads to the end and returns how it came */

/* "unix:" and a path in a folder that is made for it; valid until the next call. */
const char *socket_path(const char *name);
void folder_remove(void); /* fails when a socket was left behind */

/* ---- the parts of the suite ---- */

void rpc_limits_tests(TCase *c);
void rpc_unpack_tests(TCase *c);
void rpc_faults_tests(TCase *c);
void rpc_security_tests(TCase *c);
void rpc_connections_tests(TCase *c);

#endif
