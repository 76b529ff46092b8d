/* check_rpc.c - proto/rpc.h: server, client and health over real sockets.
 *
 * Every test starts a server of its own with four methods (struct bench_server below) on a free port or a unix socket in a
 * fresh folder, and ends by shutting it down: the tear-down checks that each on_open was followed by one on_close.
 */
#include <arpa/inet.h>
#include <check.h>
#include <fcntl.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "grpc/health/v1/health.pb-c.h"
#include "proto/rpc.h"
#include "tandem/v1/control.pb-c.h"
#include "tandem/v1/inference.pb-c.h"

/* The message of all test methods: bytes and numbers. */
typedef Tandem__V1__GenerateResponse Msg;
#define MSG_INIT TANDEM__V1__GENERATE_RESPONSE__INIT
#define MSG_TYPE (&tandem__v1__generate_response__descriptor)

#ifdef TANDEM_SANITIZED
#define SLOW 10 /* sanitizers and the time they take */
#else
#define SLOW 1
#endif
#define PATIENCE_MS 20000 /* for what must happen; a test that waits this long fails */

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void sleep_ms(unsigned ms)
{
    usleep(ms * 1000);
}

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

/* ---- the server under test ---- */

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

static struct test_server srv;

/* A call's own record, to catch callbacks that overlap or come after on_close. */
struct record {
    atomic_int inside;
    bool closed;
    uint32_t left; /* messages to go; UINT32_MAX: no end */
    size_t size;
    uint32_t next;
};

static void enter(struct record *r)
{
    if (atomic_fetch_add(&r->inside, 1) != 0 || r->closed)
        atomic_fetch_add(&srv.overlaps, 1);
}

static void leave(struct record *r)
{
    atomic_fetch_sub(&r->inside, 1);
}

static struct record *open_record(struct rpc_call *call)
{
    struct record *r = calloc(1, sizeof *r);
    atomic_fetch_add(&srv.opens, 1);
    rpc_call_set_data(call, r);
    atomic_store(&srv.deadline_us, rpc_call_deadline_us(call));
    return r;
}

static void on_close(struct rpc_call *call, bool cancelled, void *ctx)
{
    struct record *r = rpc_call_data(call);
    (void)ctx;
    enter(r);
    r->closed = true;
    leave(r);
    free(r);
    rpc_call_set_data(call, NULL);
    atomic_fetch_add(&srv.cancelled, cancelled);
    atomic_store(&srv.closed_at_us, now_us());
    atomic_fetch_add(&srv.closes, 1);
}

static Msg *unpack_or_finish(struct rpc_call *call, const void *msg, size_t len)
{
    Msg *m = (Msg *)rpc_unpack(MSG_TYPE, msg, len);
    if (!m) {
        struct status st;
        status_set(&st, ST_INVALID_ARGUMENT, "request: not a valid message");
        rpc_call_finish(call, &st, 0);
    }
    return m;
}

static bool text_is(const Msg *m, const char *s)
{
    return m->text.len == strlen(s) && (m->text.len == 0 || memcmp(m->text.data, s, m->text.len) == 0);
}

static void echo_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct record *r = open_record(call);
    (void)ctx;
    enter(r);
    Msg *m = unpack_or_finish(call, msg, len);
    if (m && text_is(m, "busy")) {
        struct status st;
        status_set(&st, ST_UNAVAILABLE, "busy, come again: é");
        rpc_call_finish(call, &st, 1500);
    } else if (m) {
        snprintf(srv.peer, sizeof srv.peer, "%s", rpc_call_peer(call));
        const char *agent = rpc_call_metadata(call, "user-agent");
        snprintf(srv.header, sizeof srv.header, "%s", agent ? agent : "none");
        rpc_call_reply(call, &m->base);
    }
    if (m)
        protobuf_c_message_free_unpacked(&m->base, NULL);
    leave(r);
}

/* Sends until the queue is full or the end is reached. */
static void pump(struct rpc_call *call, struct record *r)
{
    uint8_t *payload = calloc(1, r->size + 1);
    uint32_t id;
    Msg m = MSG_INIT;
    m.text = (ProtobufCBinaryData){.data = payload, .len = r->size};
    m.n_token_ids = 1;
    m.token_ids = &id;
    for (int burst = 0; r->left > 0 && burst < 64; burst++) {
        id = r->next;
        enum status_code rc = rpc_call_send(call, &m.base, NULL);
        if (rc == ST_RESOURCE_EXHAUSTED)
            atomic_fetch_add(&srv.refused_sends, 1);
        if (rc != ST_OK)
            break;
        r->next++;
        r->left -= r->left != UINT32_MAX;
    }
    if (r->left == 0)
        rpc_call_finish(call, NULL, 0);
    free(payload);
}

/* token_ids: how many messages (UINT32_MAX: no end), of how many bytes. */
static void count_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct record *r = open_record(call);
    (void)ctx;
    enter(r);
    Msg *m = unpack_or_finish(call, msg, len);
    if (m) {
        r->left = m->n_token_ids > 0 ? m->token_ids[0] : 0;
        r->size = m->n_token_ids > 1 ? m->token_ids[1] : 0;
        pump(call, r);
        protobuf_c_message_free_unpacked(&m->base, NULL);
    }
    leave(r);
}

static void count_writable(struct rpc_call *call, void *ctx)
{
    struct record *r = rpc_call_data(call);
    (void)ctx;
    enter(r);
    atomic_fetch_add(&srv.writables, 1);
    if (r->left > 0)
        pump(call, r);
    leave(r);
}

static void hold_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct record *r = open_record(call);
    (void)msg;
    (void)len;
    (void)ctx;
    enter(r);
    struct rpc_call *before = atomic_exchange(&srv.held, rpc_call_ref(call));
    if (before)
        rpc_call_unref(before);
    leave(r);
}

static void bidi_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct record *r = open_record(call);
    (void)ctx;
    ck_assert(msg == NULL && len == 0);
    enter(r);
    leave(r);
}

static void bidi_message(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct record *r = rpc_call_data(call);
    (void)ctx;
    enter(r);
    atomic_fetch_add(&srv.messages, 1);
    Msg *m = unpack_or_finish(call, msg, len);
    if (m) {
        if (text_is(m, "slow"))
            sleep_ms(5);
        if (rpc_call_send(call, &m->base, NULL) != ST_OK)
            atomic_fetch_add(&srv.refused_sends, 1);
        protobuf_c_message_free_unpacked(&m->base, NULL);
    }
    leave(r);
}

static void bidi_half_close(struct rpc_call *call, void *ctx)
{
    struct record *r = rpc_call_data(call);
    (void)ctx;
    enter(r);
    atomic_fetch_add(&srv.half_closes, 1);
    rpc_call_finish(call, NULL, 0);
    leave(r);
}

static void server_start(const char *listen, struct rpc_server_config extra)
{
    memset(&srv, 0, sizeof srv);
    OK(rpc_health_create(&srv.health, st));
    srv.methods[0] = (struct rpc_method){"/test.T/Echo", RPC_UNARY, .on_open = echo_open, .on_close = on_close};
    srv.methods[1] = (struct rpc_method){"/test.T/Count", RPC_SERVER_STREAM, .on_open = count_open,
                                         .on_writable = count_writable, .on_close = on_close};
    srv.methods[2] = (struct rpc_method){"/test.T/Hold", RPC_SERVER_STREAM, .on_open = hold_open, .on_close = on_close};
    srv.methods[3] = (struct rpc_method){"/test.T/Bidi",
                                         RPC_BIDI,
                                         .on_open = bidi_open,
                                         .on_message = bidi_message,
                                         .on_half_close = bidi_half_close,
                                         .on_close = on_close};
    rpc_health_methods(srv.health, srv.methods + 4);
    extra.methods = srv.methods;
    extra.n_methods = sizeof srv.methods / sizeof *srv.methods;
    extra.listen = &listen;
    extra.n_listen = 1;
    OK(rpc_server_start(&srv.rpc, &extra, st));
    if (rpc_server_port(srv.rpc, 0))
        snprintf(srv.address, sizeof srv.address, "127.0.0.1:%u", rpc_server_port(srv.rpc, 0));
    else
        snprintf(srv.address, sizeof srv.address, "%s", listen);
}

static void server_stop(uint32_t grace_ms)
{
    rpc_server_shutdown(srv.rpc, grace_ms);
    ck_assert_uint_eq(rpc_server_live_calls(srv.rpc), 0);
    ck_assert_uint_eq(srv.opens, srv.closes);
    ck_assert_uint_eq(srv.overlaps, 0);
    rpc_server_destroy(srv.rpc);
    rpc_health_destroy(srv.health);
    struct rpc_call *held = atomic_load(&srv.held);
    if (held)
        rpc_call_unref(held); /* after the server and the library are gone: must be fine */
}

/* ---- the client's side ---- */

static struct rpc_channel *connect_to(const char *address)
{
    struct rpc_channel *ch;
    OK(rpc_channel_create(&ch, address, st));
    return ch;
}

static enum status_code echo(struct rpc_channel *ch, const char *text, struct status *st)
{
    Msg m = MSG_INIT;
    ProtobufCMessage *reply = NULL;
    m.text = (ProtobufCBinaryData){.data = (uint8_t *)text, .len = strlen(text)};
    enum status_code rc = rpc_unary(ch, "/test.T/Echo", &m.base, MSG_TYPE, &reply, 0, st);
    if (rc == ST_OK) {
        ck_assert(text_is((Msg *)reply, text));
        protobuf_c_message_free_unpacked(reply, NULL);
    }
    return rc;
}

static struct rpc_stream *open_with(struct rpc_channel *ch, const char *path, uint64_t deadline_ms, uint32_t count,
                                    uint32_t size)
{
    struct rpc_stream *s;
    uint32_t numbers[2] = {count, size};
    Msg m = MSG_INIT;
    m.n_token_ids = 2;
    m.token_ids = numbers;
    OK(rpc_stream_open(&s, ch, path, deadline_ms, st));
    OK(rpc_stream_send(s, &m.base, PATIENCE_MS, st));
    OK(rpc_stream_half_close(s, st));
    return s;
}

/* The number in the next message; -1 at the end. */
static int64_t next_id(struct rpc_stream *s)
{
    const void *msg;
    size_t len;
    OK(rpc_stream_recv(s, &msg, &len, PATIENCE_MS, NULL, st));
    if (!msg)
        return -1;
    Msg *m = (Msg *)rpc_unpack(MSG_TYPE, msg, len);
    ck_assert_ptr_nonnull(m);
    int64_t id = m->n_token_ids ? m->token_ids[0] : 0;
    protobuf_c_message_free_unpacked(&m->base, NULL);
    return id;
}

/* Reads to the end and returns how it came. */
static enum status_code drain(struct rpc_stream *s, struct status *st)
{
    const void *msg;
    size_t len;
    enum status_code rc;
    do
        rc = rpc_stream_recv(s, &msg, &len, PATIENCE_MS, NULL, st);
    while (rc == ST_OK && msg);
    return rc;
}

static char folder[64];

static const char *socket_path(const char *name)
{
    static char address[128];
    if (!*folder) {
        snprintf(folder, sizeof folder, "/tmp/check_rpc.XXXXXX");
        ck_assert_ptr_nonnull(mkdtemp(folder));
    }
    snprintf(address, sizeof address, "unix:%s/%s", folder, name);
    return address;
}

static void folder_remove(void)
{
    if (*folder)
        ck_assert_int_eq(rmdir(folder), 0); /* fails if a socket was left behind */
    *folder = '\0';
}

#define NO_EXTRAS ((struct rpc_server_config){0})

/* ---- core ---- */

START_TEST(unary_call_is_answered)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    OK(echo(ch, "hello", st));
    OK(echo(ch, "", st));
    ck_assert_int_eq(strncmp(srv.peer, "ipv4:127.0.0.1:", 15), 0);
    ck_assert_ptr_nonnull(strstr(srv.header, "grpc-c"));
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_uint_eq(srv.opens, 2);
    ck_assert_uint_eq(srv.cancelled, 0);
}
END_TEST

START_TEST(stream_comes_in_order_and_whole)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s = open_with(ch, "/test.T/Count", 0, 5000, 100);
    for (int64_t i = 0; i < 5000; i++)
        ck_assert_int_eq(next_id(s), i);
    ck_assert_int_eq(next_id(s), -1);
    ck_assert_int_eq(next_id(s), -1); /* and stays at the end */
    rpc_stream_close(s);
    s = open_with(ch, "/test.T/Count", 0, 0, 0);
    ck_assert_int_eq(next_id(s), -1);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_uint_eq(srv.cancelled, 0);
}
END_TEST

static void *send_all(void *arg)
{
    struct rpc_stream *s = arg;
    uint32_t id;
    Msg m = MSG_INIT;
    m.n_token_ids = 1;
    m.token_ids = &id;
    for (id = 0; id < 3000; id++)
        OK(rpc_stream_send(s, &m.base, PATIENCE_MS, st));
    OK(rpc_stream_half_close(s, st));
    return NULL;
}

START_TEST(bidi_echoes_while_both_sides_talk)
{
    server_start(socket_path("s"), NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s;
    pthread_t sender;
    OK(rpc_stream_open(&s, ch, "/test.T/Bidi", 0, st));
    pthread_create(&sender, NULL, send_all, s);
    for (int64_t i = 0; i < 3000; i++)
        ck_assert_int_eq(next_id(s), i);
    ck_assert_int_eq(next_id(s), -1);
    pthread_join(sender, NULL);
    struct status after = STATUS_INIT;
    Msg m = MSG_INIT;
    ck_assert_int_eq(rpc_stream_send(s, &m.base, 100, &after), ST_FAILED_PRECONDITION);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_uint_eq(srv.messages, 3000);
    ck_assert_uint_eq(srv.half_closes, 1);
    ck_assert_uint_eq(srv.refused_sends, 0);
    folder_remove();
}
END_TEST

static void *send_some(void *arg)
{
    uint32_t id = 7;
    Msg m = MSG_INIT;
    m.n_token_ids = 1;
    m.token_ids = &id;
    for (int i = 0; i < 500; i++)
        OK(rpc_stream_send(arg, &m.base, PATIENCE_MS, st));
    return NULL;
}

START_TEST(several_threads_may_send_on_a_stream)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s;
    pthread_t senders[4];
    OK(rpc_stream_open(&s, ch, "/test.T/Bidi", 0, st));
    for (int i = 0; i < 4; i++)
        pthread_create(&senders[i], NULL, send_some, s);
    for (int i = 0; i < 2000; i++)
        ck_assert_int_eq(next_id(s), 7);
    for (int i = 0; i < 4; i++)
        pthread_join(senders[i], NULL);
    OK(rpc_stream_half_close(s, st));
    ck_assert_int_eq(next_id(s), -1);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

START_TEST(error_carries_message_and_trailer)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s;
    struct status got = STATUS_INIT;
    Msg m = MSG_INIT;
    m.text = (ProtobufCBinaryData){.data = (uint8_t *)"busy", .len = 4};
    OK(rpc_stream_open(&s, ch, "/test.T/Echo", 0, st));
    OK(rpc_stream_send(s, &m.base, PATIENCE_MS, st));
    OK(rpc_stream_half_close(s, st));
    ck_assert_ptr_null(rpc_stream_trailer(s, "retry-after-ms"));
    ck_assert_int_eq(drain(s, &got), ST_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(got.message, "busy, come again: é"));
    ck_assert_str_eq(rpc_stream_trailer(s, "retry-after-ms"), "1500");
    ck_assert_ptr_null(rpc_stream_trailer(s, "retry-after"));
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_uint_eq(srv.cancelled, 0);
}
END_TEST

/* The core retries a call by itself only while nothing of the answer has come: each retry is one more on_open. */
START_TEST(early_error_leaves_the_call_retryable)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    grpc_init();
    grpc_arg policy = {.type = GRPC_ARG_STRING, .key = (char *)GRPC_ARG_SERVICE_CONFIG};
    policy.value.string = (char *)"{\"methodConfig\":[{\"name\":[{}],\"retryPolicy\":{\"maxAttempts\":4,"
                                  "\"initialBackoff\":\"0.01s\",\"maxBackoff\":\"0.02s\",\"backoffMultiplier\":1,"
                                  "\"retryableStatusCodes\":[\"UNAVAILABLE\"]}}]}";
    grpc_channel_args args = {1, &policy};
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    grpc_channel *ch = grpc_channel_create(srv.address, plain, &args);
    grpc_channel_credentials_release(plain);
    grpc_completion_queue *cq = grpc_completion_queue_create_for_next(NULL);
    gpr_timespec end = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_seconds(20, GPR_TIMESPAN));
    grpc_call *call = grpc_channel_create_call(ch, NULL, GRPC_PROPAGATE_DEFAULTS, cq,
                                               grpc_slice_from_static_string("/test.T/Echo"), NULL, end, NULL);
    grpc_slice bytes = grpc_slice_from_static_string("\x0a\x04"
                                                     "busy");
    grpc_byte_buffer *request = grpc_raw_byte_buffer_create(&bytes, 1), *reply = NULL;
    grpc_metadata_array initial, trailing;
    grpc_metadata_array_init(&initial);
    grpc_metadata_array_init(&trailing);
    grpc_status_code code;
    grpc_slice details = grpc_empty_slice();
    grpc_op ops[6] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},  {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}, {.op = GRPC_OP_RECV_INITIAL_METADATA},
                      {.op = GRPC_OP_RECV_MESSAGE},           {.op = GRPC_OP_RECV_STATUS_ON_CLIENT}};
    ops[1].data.send_message.send_message = request;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &initial;
    ops[4].data.recv_message.recv_message = &reply;
    ops[5].data.recv_status_on_client.trailing_metadata = &trailing;
    ops[5].data.recv_status_on_client.status = &code;
    ops[5].data.recv_status_on_client.status_details = &details;
    ck_assert_int_eq(grpc_call_start_batch(call, ops, 6, call, NULL), GRPC_CALL_OK);
    ck_assert_int_eq(grpc_completion_queue_next(cq, end, NULL).type, GRPC_OP_COMPLETE);
    ck_assert_int_eq(code, GRPC_STATUS_UNAVAILABLE);
    grpc_call_unref(call);
    grpc_byte_buffer_destroy(request);
    grpc_slice_unref(details);
    grpc_metadata_array_destroy(&initial);
    grpc_metadata_array_destroy(&trailing);
    grpc_channel_destroy(ch);
    grpc_completion_queue_shutdown(cq);
    while (grpc_completion_queue_next(cq, end, NULL).type != GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_completion_queue_destroy(cq);
    grpc_shutdown_blocking();
    server_stop(0);
    /* "retry-after-ms" is our own name: the core waits as its policy says. */
    ck_assert_uint_eq(srv.opens, 4);
}
END_TEST

/* ---- health ---- */

typedef Grpc__Health__V1__HealthCheckRequest CheckRequest;
typedef Grpc__Health__V1__HealthCheckResponse CheckResponse;
#define STATE(name) GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__##name

static enum status_code health_check(struct rpc_channel *ch, const char *service, int *state, struct status *st)
{
    CheckRequest r = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    ProtobufCMessage *reply;
    r.service = (char *)service;
    enum status_code rc = rpc_unary(ch, "/grpc.health.v1.Health/Check", &r.base,
                                    &grpc__health__v1__health_check_response__descriptor, &reply, 0, st);
    if (rc == ST_OK) {
        *state = (int)((CheckResponse *)reply)->status;
        protobuf_c_message_free_unpacked(reply, NULL);
    }
    return rc;
}

START_TEST(health_check_and_list_tell_the_table)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct status got = STATUS_INIT;
    int state = -1;
    ck_assert_int_eq(health_check(ch, "", &state, &got), ST_NOT_FOUND);
    rpc_health_set(srv.health, "", true);
    rpc_health_set(srv.health, "a.B", false);
    OK(health_check(ch, "", &state, st));
    ck_assert_int_eq(state, STATE(SERVING));
    OK(health_check(ch, "a.B", &state, st));
    ck_assert_int_eq(state, STATE(NOT_SERVING));
    ck_assert_int_eq(health_check(ch, "a.C", &state, &got), ST_NOT_FOUND);
    ck_assert_ptr_nonnull(strstr(got.message, "a.C"));
    Grpc__Health__V1__HealthListRequest none = GRPC__HEALTH__V1__HEALTH_LIST_REQUEST__INIT;
    ProtobufCMessage *reply;
    OK(rpc_unary(ch, "/grpc.health.v1.Health/List", &none.base, &grpc__health__v1__health_list_response__descriptor,
                 &reply, 0, st));
    Grpc__Health__V1__HealthListResponse *list = (Grpc__Health__V1__HealthListResponse *)reply;
    ck_assert_uint_eq(list->n_statuses, 2);
    ck_assert_str_eq(list->statuses[0]->key, "");
    ck_assert_int_eq(list->statuses[0]->value->status, STATE(SERVING));
    ck_assert_str_eq(list->statuses[1]->key, "a.B");
    ck_assert_int_eq(list->statuses[1]->value->status, STATE(NOT_SERVING));
    protobuf_c_message_free_unpacked(reply, NULL);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

static int watch_next(struct rpc_stream *s)
{
    const void *msg;
    size_t len;
    OK(rpc_stream_recv(s, &msg, &len, PATIENCE_MS, NULL, st));
    if (!msg)
        return -1;
    CheckResponse *r = (CheckResponse *)rpc_unpack(&grpc__health__v1__health_check_response__descriptor, msg, len);
    ck_assert_ptr_nonnull(r);
    int state = (int)r->status;
    protobuf_c_message_free_unpacked(&r->base, NULL);
    return state;
}

static struct rpc_stream *watch(struct rpc_channel *ch, const char *service)
{
    struct rpc_stream *s;
    CheckRequest r = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    r.service = (char *)service;
    OK(rpc_stream_open(&s, ch, "/grpc.health.v1.Health/Watch", 0, st));
    OK(rpc_stream_send(s, &r.base, PATIENCE_MS, st));
    OK(rpc_stream_half_close(s, st));
    return s;
}

START_TEST(health_watch_follows_changes)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *a = watch(ch, "a.B"), *b = watch(ch, "a.B");
    bool timed_out = false;
    const void *msg;
    size_t len;
    ck_assert_int_eq(watch_next(a), STATE(SERVICE_UNKNOWN));
    ck_assert_int_eq(watch_next(b), STATE(SERVICE_UNKNOWN));
    rpc_health_set(srv.health, "a.B", false);
    ck_assert_int_eq(watch_next(a), STATE(NOT_SERVING));
    rpc_health_set(srv.health, "other", true);
    rpc_health_set(srv.health, "a.B", false); /* no change, no message */
    ck_assert_int_eq(rpc_stream_recv(a, &msg, &len, 50, &timed_out, NULL), ST_DEADLINE_EXCEEDED);
    ck_assert(timed_out);
    rpc_health_set(srv.health, "a.B", true);
    ck_assert_int_eq(watch_next(a), STATE(SERVING));
    rpc_stream_close(b); /* one watcher goes, the other stays */
    rpc_health_set(srv.health, "a.B", false);
    rpc_health_close_watchers(srv.health);
    ck_assert_int_eq(watch_next(a), STATE(NOT_SERVING));
    ck_assert_int_eq(watch_next(a), -1);
    rpc_stream_close(a);
    a = watch(ch, "a.B"); /* too late: one update and the end */
    ck_assert_int_eq(watch_next(a), STATE(NOT_SERVING));
    ck_assert_int_eq(watch_next(a), -1);
    rpc_stream_close(a);
    rpc_channel_destroy(ch);
    server_stop(PATIENCE_MS);
}
END_TEST

/* ---- limits ---- */

START_TEST(many_streams_run_at_once)
{
    enum { N = 512, EACH = 20 };
    struct rpc_stream *s[N];
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    for (int i = 0; i < N; i++)
        s[i] = open_with(ch, "/test.T/Hold", 0, 0, 0);
    AWAIT(srv.opens == N);
    ck_assert_uint_eq(rpc_server_live_calls(srv.rpc), N);
    for (int i = 0; i < N; i++) {
        rpc_stream_close(s[i]);
        s[i] = open_with(ch, "/test.T/Count", 0, EACH, 40);
    }
    for (int k = 0; k <= EACH; k++) {
        for (int i = 0; i < N; i++)
            ck_assert_int_eq(next_id(s[i]), k < EACH ? k : -1);
    }
    for (int i = 0; i < N; i++)
        rpc_stream_close(s[i]);
    rpc_channel_destroy(ch);
    server_stop(PATIENCE_MS);
    ck_assert_uint_eq(srv.opens, 2 * N);
}
END_TEST

START_TEST(message_over_the_limit_is_refused)
{
    struct status got = STATUS_INIT;
    ProtobufCMessage *reply;
    uint8_t *big = calloc(1, 70000);
    Msg m = MSG_INIT;
    server_start("127.0.0.1:0", (struct rpc_server_config){.max_message_bytes = 65536});
    struct rpc_channel *ch = connect_to(srv.address);
    m.text = (ProtobufCBinaryData){.data = big, .len = 70000};
    ck_assert_int_eq(rpc_unary(ch, "/test.T/Echo", &m.base, MSG_TYPE, &reply, 0, &got), ST_RESOURCE_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(got.message, "65536"));
    ck_assert_uint_eq(srv.opens, 0);
    struct rpc_stream *s;
    OK(rpc_stream_open(&s, ch, "/test.T/Bidi", 0, st));
    enum status_code rc = rpc_stream_send(s, &m.base, PATIENCE_MS, &got); /* may have left before it was refused */
    ck_assert(rc == ST_OK || rc == ST_RESOURCE_EXHAUSTED || rc == ST_UNAVAILABLE);
    ck_assert_int_eq(drain(s, &got), ST_RESOURCE_EXHAUSTED);
    rpc_stream_close(s);
    m.text.len = 65000;
    OK(rpc_unary(ch, "/test.T/Echo", &m.base, MSG_TYPE, &reply, 0, st));
    protobuf_c_message_free_unpacked(reply, NULL);
    rpc_channel_destroy(ch);
    server_stop(PATIENCE_MS);
    free(big);
}
END_TEST

START_TEST(large_message_passes)
{
    ProtobufCMessage *reply;
    size_t len = RPC_MAX_MESSAGE_BYTES - 64;
    uint8_t *big = malloc(len);
    memset(big, 'x', len);
    Msg m = MSG_INIT;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    m.text = (ProtobufCBinaryData){.data = big, .len = len};
    OK(rpc_unary(ch, "/test.T/Echo", &m.base, MSG_TYPE, &reply, 60000, st));
    ck_assert_uint_eq(((Msg *)reply)->text.len, len);
    protobuf_c_message_free_unpacked(reply, NULL);
    rpc_channel_destroy(ch);
    server_stop(0);
    free(big);
}
END_TEST

START_TEST(send_queue_is_bounded)
{
    server_start("127.0.0.1:0", (struct rpc_server_config){.max_send_queue_bytes = 10000});
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s = open_with(ch, "/test.T/Hold", 0, 0, 0);
    AWAIT(atomic_load(&srv.held) != NULL);
    struct rpc_call *call = atomic_load(&srv.held);
    uint8_t payload[4000] = {0};
    struct status got = STATUS_INIT;
    Msg m = MSG_INIT;
    m.text = (ProtobufCBinaryData){.data = payload, .len = sizeof payload};
    enum status_code rc = ST_OK;
    unsigned sent = 0;
    while (sent < 100000 && (rc = rpc_call_send(call, &m.base, &got)) == ST_OK)
        sent++;
    ck_assert_int_eq(rc, ST_RESOURCE_EXHAUSTED);
    ck_assert_uint_le(rpc_call_pending(call), 2);
    ck_assert_uint_gt(rpc_call_pending(call), 0);
    rpc_call_finish(call, NULL, 0);
    ck_assert_int_eq(rpc_call_send(call, &m.base, &got), ST_CANCELLED);
    for (unsigned i = 0; i < sent; i++)
        ck_assert_int_eq(next_id(s), 0); /* all that was taken arrives, then the end */
    ck_assert_int_eq(next_id(s), -1);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(PATIENCE_MS);
    ck_assert_uint_eq(srv.cancelled, 0);
}
END_TEST

START_TEST(header_over_the_limit_is_refused)
{
    char *path = malloc(20000);
    struct status got = STATUS_INIT;
    ProtobufCMessage *reply;
    Msg m = MSG_INIT;
    memset(path, 'a', 19999);
    path[0] = '/';
    path[19999] = '\0';
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    ck_assert_int_eq(rpc_unary(ch, path, &m.base, MSG_TYPE, &reply, 5000, &got), ST_RESOURCE_EXHAUSTED);
    /* The core may cut the connection afterwards; the server lives and a long path by itself is no fault. */
    path[8000] = '\0';
    AWAIT(rpc_unary(ch, path, &m.base, MSG_TYPE, &reply, 5000, &got) == ST_UNIMPLEMENTED);
    AWAIT(echo(ch, "still here", &got) == ST_OK);
    rpc_channel_destroy(ch);
    server_stop(0);
    free(path);
}
END_TEST

/* ---- faults ---- */

START_TEST(unknown_method_is_unimplemented_at_once)
{
    struct status got = STATUS_INIT;
    ProtobufCMessage *reply;
    Msg m = MSG_INIT;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    OK(echo(ch, "warm", st));
    int64_t t = now_us();
    for (int i = 0; i < 100; i++)
        ck_assert_int_eq(rpc_unary(ch, "/test.T/Nope", &m.base, MSG_TYPE, &reply, 5000, &got), ST_UNIMPLEMENTED);
    ck_assert_int_lt(now_us() - t, 2000000 * SLOW);
    ck_assert_ptr_nonnull(strstr(got.message, "/test.T/Nope"));
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

START_TEST(malformed_or_missing_request_is_refused)
{
    struct status got = STATUS_INIT;
    ProtobufCMessage *reply;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    /* Field 1 as a number where GenerateResponse has bytes: another type's encoding. */
    Tandem__V1__Finish wrong = TANDEM__V1__FINISH__INIT;
    wrong.reason = TANDEM__V1__FINISH__REASON__STOP;
    ck_assert_int_eq(rpc_unary(ch, "/test.T/Echo", &wrong.base, MSG_TYPE, &reply, 0, &got), ST_INVALID_ARGUMENT);
    ck_assert_str_eq(got.message, "request: not a valid message");
    struct rpc_stream *s;
    OK(rpc_stream_open(&s, ch, "/test.T/Bidi", 0, st));
    OK(rpc_stream_send(s, &wrong.base, PATIENCE_MS, st));
    ck_assert_int_eq(drain(s, &got), ST_INVALID_ARGUMENT);
    ck_assert_int_ne(rpc_stream_send(s, &wrong.base, PATIENCE_MS, &got), ST_OK);
    rpc_stream_close(s);
    const char *paths[] = {"/test.T/Echo", "/test.T/Count"};
    for (int i = 0; i < 2; i++) {
        OK(rpc_stream_open(&s, ch, paths[i], 0, st));
        OK(rpc_stream_half_close(s, st));
        ck_assert_int_eq(drain(s, &got), ST_INVALID_ARGUMENT);
        ck_assert_ptr_nonnull(strstr(got.message, paths[i]));
        rpc_stream_close(s);
    }
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_uint_eq(srv.opens, 2);
}
END_TEST

/* The best of a few tries: another process on the machine may delay one of them, a starved reader delays all. */
START_TEST(cancel_is_seen_while_the_server_writes)
{
    enum { TRIES = 5, BUSY = 16 };
    struct rpc_stream *busy[BUSY];
    int64_t best_us = INT64_MAX;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    for (int i = 0; i < BUSY; i++)
        busy[i] = open_with(ch, "/test.T/Count", 0, UINT32_MAX, 10);
    for (int k = 0; k < TRIES; k++) {
        struct rpc_stream *s = open_with(ch, "/test.T/Count", 0, UINT32_MAX, 10);
        for (int i = 0; i < 100; i++)
            ck_assert_int_ge(next_id(s), 0);
        unsigned before = srv.closes;
        int64_t t = now_us();
        rpc_stream_cancel(s);
        struct status got = STATUS_INIT;
        ck_assert_int_eq(drain(s, &got), ST_CANCELLED);
        AWAIT(srv.closes == before + 1);
        int64_t took = srv.closed_at_us - t;
        best_us = took < best_us ? took : best_us;
        rpc_stream_close(s);
    }
    ck_assert_int_lt(best_us, 100000 * SLOW);
    for (int i = 0; i < BUSY; i++)
        rpc_stream_close(busy[i]);
    AWAIT(srv.closes == srv.opens);
    ck_assert_uint_eq(srv.cancelled, srv.closes);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

START_TEST(deadline_ends_both_sides)
{
    struct status got = STATUS_INIT;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    OK(echo(ch, "warm", st));
    int64_t t = now_us();
    struct rpc_stream *s = open_with(ch, "/test.T/Hold", 300, 0, 0);
    const void *msg;
    size_t len;
    bool timed_out = true;
    ck_assert_int_eq(rpc_stream_recv(s, &msg, &len, 0, &timed_out, &got), ST_DEADLINE_EXCEEDED);
    ck_assert(!timed_out);
    int64_t took = now_us() - t;
    ck_assert_int_ge(took, 290000);
    ck_assert_int_lt(took, 300000 + 2000000 * SLOW);
    AWAIT(srv.closes == srv.opens);
    ck_assert_uint_eq(srv.cancelled, 1);
    ck_assert_int_ge(srv.deadline_us, t + 200000);
    ck_assert_int_le(srv.deadline_us, t + 400000 + 1000000 * SLOW);
    rpc_stream_close(s);
    s = open_with(ch, "/test.T/Hold", 0, 0, 0);
    AWAIT(srv.opens == 3);
    ck_assert_int_eq(srv.deadline_us, INT64_MAX);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

START_TEST(call_of_a_client_that_never_reads_can_be_dropped)
{
    server_start("127.0.0.1:0", (struct rpc_server_config){.max_send_queue_bytes = 100000});
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s = open_with(ch, "/test.T/Hold", 0, 0, 0);
    AWAIT(atomic_load(&srv.held) != NULL);
    struct rpc_call *call = atomic_load(&srv.held);
    uint8_t payload[10000] = {0};
    Msg m = MSG_INIT;
    m.text = (ProtobufCBinaryData){.data = payload, .len = sizeof payload};
    int64_t idle_since = now_us(); /* until nothing moves any more */
    while (now_us() - idle_since < 200000) {
        if (rpc_call_send(call, &m.base, NULL) == ST_OK)
            idle_since = now_us();
        else
            sleep_ms(1);
    }
    ck_assert_uint_gt(rpc_call_pending(call), 0);
    rpc_call_finish(call, NULL, 0); /* waits behind what is queued, for ever */
    sleep_ms(50);
    ck_assert_uint_eq(srv.closes, 0);
    struct status reason;
    status_set(&reason, ST_RESOURCE_EXHAUSTED, "the client does not read");
    rpc_call_cancel(call, &reason);
    AWAIT(srv.closes == 1);
    ck_assert_uint_eq(srv.cancelled, 1);
    AWAIT(rpc_call_pending(call) == 0);
    ck_assert_int_eq(rpc_call_send(call, &m.base, NULL), ST_CANCELLED);
    rpc_call_cancel(call, &reason);
    struct status got = STATUS_INIT;
    ck_assert_int_ne(drain(s, &got), ST_OK);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

START_TEST(nobody_listening_is_unavailable_quickly)
{
    server_start("127.0.0.1:0", NO_EXTRAS); /* to know a port where nobody will be */
    char address[160];
    memcpy(address, srv.address, sizeof address);
    server_stop(0);
    const char *gone[] = {address, socket_path("nobody")};
    for (int i = 0; i < 2; i++) {
        struct rpc_channel *ch = connect_to(gone[i]);
        struct status got = STATUS_INIT;
        int64_t t = now_us();
        ck_assert_int_eq(echo(ch, "?", &got), ST_UNAVAILABLE);
        ck_assert_int_lt(now_us() - t, 1000000 * SLOW);
        ck_assert_msg(strstr(got.message, gone[i]) != NULL, "no address in: %s", got.message);
        struct rpc_stream *s;
        OK(rpc_stream_open(&s, ch, "/test.T/Bidi", 0, st));
        ck_assert_int_eq(drain(s, &got), ST_UNAVAILABLE);
        rpc_stream_close(s);
        rpc_channel_destroy(ch);
    }
    folder_remove();
}
END_TEST

START_TEST(channel_finds_a_server_that_comes_back)
{
    const char *address = socket_path("s");
    struct rpc_channel *ch = connect_to(address);
    struct status got = STATUS_INIT;
    ck_assert_int_eq(echo(ch, "1", &got), ST_UNAVAILABLE);
    for (int k = 0; k < 3; k++) {
        server_start(address, NO_EXTRAS);
        AWAIT(echo(ch, "2", &got) == ST_OK);
        server_stop(0);
        ck_assert_int_eq(echo(ch, "3", &got), ST_UNAVAILABLE);
    }
    rpc_channel_destroy(ch);
    folder_remove();
}
END_TEST

static enum status_code try_listen(const char *const *listen, size_t n, struct status *st)
{
    struct rpc_server *s;
    struct rpc_server_config cfg = {.listen = listen, .n_listen = n};
    enum status_code rc = rpc_server_start(&s, &cfg, st);
    if (rc == ST_OK)
        rpc_server_destroy(s);
    return rc;
}

START_TEST(address_in_use_is_told)
{
    struct status got = STATUS_INIT;
    server_start("127.0.0.1:0", NO_EXTRAS);
    const char *taken = srv.address;
    ck_assert_int_eq(try_listen(&taken, 1, &got), ST_ALREADY_EXISTS);
    ck_assert_ptr_nonnull(strstr(got.message, taken));
    const char *two[] = {"127.0.0.1:0", srv.address};
    ck_assert_int_eq(try_listen(two, 2, &got), ST_ALREADY_EXISTS);
    char any[32];
    snprintf(any, sizeof any, "0.0.0.0:%u", rpc_server_port(srv.rpc, 0));
    const char *wide = any;
    ck_assert_int_eq(try_listen(&wide, 1, &got), ST_ALREADY_EXISTS);
    struct rpc_channel *ch = connect_to(srv.address);
    OK(echo(ch, "the first server is unharmed", st));
    rpc_channel_destroy(ch);
    server_stop(0);
    OK(try_listen(&taken, 1, st)); /* free again at once */
}
END_TEST

START_TEST(bad_address_is_told)
{
    static const char *const bad[] = {
        "",
        "localhost",
        "127.0.0.1",
        "127.0.0.1:",
        ":50051",
        "127.0.0.1:x",
        "127.0.0.1:70000",
        "127.0.0.1:-1",
        "::1:50051",
        "[::1]50051",
        "[]:1",
        "unix:",
        "no such host:1",
        "256.0.0.1:0",
        "192.0.2.1:0",
        "unix:/no/such/folder/s",
        "http://a:1",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct status got = STATUS_INIT;
        ck_assert_msg(try_listen(&bad[i], 1, &got) == ST_INVALID_ARGUMENT, "%s: %s %s", bad[i], status_name(got.code),
                      got.message);
        ck_assert_msg(strstr(got.message, bad[i]) != NULL, "%s is not in: %s", bad[i], got.message);
    }
    char longest[200] = "unix:/tmp/";
    memset(longest + 10, 'x', 150);
    const char *too_long = longest;
    struct status got = STATUS_INIT;
    ck_assert_int_eq(try_listen(&too_long, 1, &got), ST_INVALID_ARGUMENT);
    struct rpc_channel *ch;
    ck_assert_int_eq(rpc_channel_create(&ch, "127.0.0.1:0", &got), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(rpc_channel_create(&ch, "nonsense", &got), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(try_listen(&too_long, 0, &got), ST_INVALID_ARGUMENT);
}
END_TEST

START_TEST(unix_socket_is_replaced_only_when_stale)
{
    const char *address = socket_path("s");
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    snprintf(sa.sun_path, sizeof sa.sun_path, "%s", address + 5);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&sa, sizeof sa), 0);
    close(fd); /* as a killed process leaves it */
    server_start(address, NO_EXTRAS);
    struct status got = STATUS_INIT;
    ck_assert_int_eq(try_listen(&address, 1, &got), ST_ALREADY_EXISTS);
    ck_assert_ptr_nonnull(strstr(got.message, address));
    struct rpc_channel *ch = connect_to(address);
    OK(echo(ch, "the first server is unharmed", st));
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_int_ne(access(sa.sun_path, F_OK), 0);
    fd = open(sa.sun_path, O_CREAT | O_WRONLY, 0600);
    close(fd);
    ck_assert_int_eq(try_listen(&address, 1, &got), ST_ALREADY_EXISTS);
    ck_assert_int_eq(access(sa.sun_path, F_OK), 0); /* somebody's file is not removed */
    unlink(sa.sun_path);
    folder_remove();
}
END_TEST

START_TEST(shutdown_lets_calls_end_then_cancels)
{
    struct status got = STATUS_INIT;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *held = open_with(ch, "/test.T/Hold", 0, 0, 0);
    struct rpc_stream *endless = open_with(ch, "/test.T/Count", 0, UINT32_MAX, 100);
    AWAIT(srv.opens == 2);
    int64_t t = now_us();
    rpc_server_shutdown(srv.rpc, 200);
    int64_t took = now_us() - t;
    ck_assert_int_ge(took, 190000);
    ck_assert_int_lt(took, 3000000 * SLOW);
    ck_assert_uint_eq(srv.closes, 2);
    ck_assert_uint_eq(srv.cancelled, 2);
    ck_assert_int_ne(drain(held, &got), ST_OK);
    ck_assert_int_ne(drain(endless, &got), ST_OK);
    rpc_stream_close(held);
    rpc_stream_close(endless);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

static void *finish_later(void *arg)
{
    sleep_ms(100);
    Msg m = MSG_INIT;
    OK(rpc_call_send(arg, &m.base, st));
    rpc_call_finish(arg, NULL, 0);
    return NULL;
}

START_TEST(shutdown_returns_when_the_last_call_has_ended)
{
    pthread_t finisher;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s = open_with(ch, "/test.T/Hold", 0, 0, 0);
    AWAIT(atomic_load(&srv.held) != NULL);
    pthread_create(&finisher, NULL, finish_later, atomic_load(&srv.held));
    int64_t t = now_us();
    rpc_server_shutdown(srv.rpc, 60000);
    ck_assert_int_lt(now_us() - t, 5000000 * SLOW);
    pthread_join(finisher, NULL);
    ck_assert_uint_eq(srv.cancelled, 0);
    ck_assert_int_eq(next_id(s), 0); /* the last message and the status were not lost */
    ck_assert_int_eq(next_id(s), -1);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

static void *cancel_later(void *arg)
{
    sleep_ms(50);
    rpc_stream_cancel(arg);
    return NULL;
}

START_TEST(recv_and_send_under_way_end_with_cancelled)
{
    struct status got = STATUS_INIT;
    pthread_t canceller;
    const void *msg;
    size_t len;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s = open_with(ch, "/test.T/Hold", 0, 0, 0);
    pthread_create(&canceller, NULL, cancel_later, s);
    ck_assert_int_eq(rpc_stream_recv(s, &msg, &len, 0, NULL, &got), ST_CANCELLED);
    pthread_join(canceller, NULL);
    rpc_stream_close(s);

    /* Nobody reads the echoes: the server stops reading once its handler cannot send, and the client's send waits. */
    uint8_t *payload = calloc(1, 1 << 20);
    Msg m = MSG_INIT;
    m.text = (ProtobufCBinaryData){.data = payload, .len = 1 << 20};
    s = open_with(ch, "/test.T/Hold", 0, 0, 0);
    rpc_stream_close(s);
    OK(rpc_stream_open(&s, ch, "/test.T/Hold", 0, st)); /* takes one message and reads no other */
    pthread_create(&canceller, NULL, cancel_later, s);
    enum status_code rc = ST_OK;
    for (int i = 0; i < 1000 && rc == ST_OK; i++)
        rc = rpc_stream_send(s, &m.base, PATIENCE_MS, &got);
    ck_assert_int_eq(rc, ST_CANCELLED);
    pthread_join(canceller, NULL);
    rpc_stream_close(s);

    OK(rpc_stream_open(&s, ch, "/test.T/Hold", 0, st));
    rc = ST_OK;
    for (int i = 0; i < 1000 && rc == ST_OK; i++)
        rc = rpc_stream_send(s, &m.base, 100, &got);
    ck_assert_int_eq(rc, ST_DEADLINE_EXCEEDED);
    ck_assert_int_eq(rpc_stream_send(s, &m.base, 100, &got), ST_DEADLINE_EXCEEDED);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
    free(payload);
}
END_TEST

/* Calls that are opened, cancelled, finished and dropped at random from several threads. */
static void *hammer(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    struct rpc_channel *ch = connect_to(srv.address);
    for (int i = 0; i < 60; i++) {
        struct status got = STATUS_INIT;
        static const char *const paths[] = {"/test.T/Count", "/test.T/Bidi", "/test.T/Nope", "/test.T/Echo"};
        unsigned r = (unsigned)rand_r(&seed);
        uint32_t numbers[2] = {r % 5 == 0 ? UINT32_MAX : r % 50, r % 3000};
        Msg m = MSG_INIT;
        m.n_token_ids = 2;
        m.token_ids = numbers;
        struct rpc_stream *s;
        OK(rpc_stream_open(&s, ch, paths[r % 4], r % 7 == 0 ? 1 + r % 20 : 0, st));
        enum status_code rc = rpc_stream_send(s, &m.base, PATIENCE_MS, &got);
        if (rc == ST_OK && r % 3)
            rc = rpc_stream_half_close(s, &got);
        const void *msg;
        size_t len;
        for (unsigned k = 0; k < r % 11 && rc == ST_OK; k++)
            rc = rpc_stream_recv(s, &msg, &len, 1 + r % 5, NULL, &got);
        if (r % 2)
            rpc_stream_cancel(s);
        rpc_stream_close(s);
    }
    rpc_channel_destroy(ch);
    return NULL;
}

START_TEST(random_ends_leave_nothing_behind)
{
    pthread_t threads[4];
    server_start("127.0.0.1:0", NO_EXTRAS);
    for (uintptr_t i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, hammer, (void *)(i + 1));
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    AWAIT(rpc_server_live_calls(srv.rpc) == 0);
    server_stop(0);
    ck_assert_uint_gt(srv.opens, 50);
}
END_TEST

static atomic_uint signals_seen;
static pthread_t main_thread;

static void on_signal(int sig)
{
    (void)sig;
    atomic_fetch_add(&signals_seen, pthread_equal(pthread_self(), main_thread) ? 1 : 1000);
}

START_TEST(signals_go_to_the_program_and_not_to_poll_threads)
{
    main_thread = pthread_self();
    struct sigaction sa = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &sa, NULL);
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    OK(echo(ch, "threads are up", st));
    for (unsigned i = 1; i <= 20; i++) {
        kill(getpid(), SIGUSR1);
        AWAIT(atomic_load(&signals_seen) >= i);
    }
    ck_assert_uint_eq(signals_seen, 20);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

static Suite *rpc_suite(void)
{
    Suite *s = suite_create("rpc");
    TCase *core = tcase_create("core");
    tcase_set_timeout(core, 60);
    tcase_add_test(core, unary_call_is_answered);
    tcase_add_test(core, stream_comes_in_order_and_whole);
    tcase_add_test(core, bidi_echoes_while_both_sides_talk);
    tcase_add_test(core, several_threads_may_send_on_a_stream);
    tcase_add_test(core, error_carries_message_and_trailer);
    tcase_add_test(core, early_error_leaves_the_call_retryable);
    tcase_add_test(core, health_check_and_list_tell_the_table);
    tcase_add_test(core, health_watch_follows_changes);
    suite_add_tcase(s, core);

    TCase *limits = tcase_create("limits");
    tcase_set_timeout(limits, 60);
    tcase_add_test(limits, many_streams_run_at_once);
    tcase_add_test(limits, message_over_the_limit_is_refused);
    tcase_add_test(limits, large_message_passes);
    tcase_add_test(limits, send_queue_is_bounded);
    tcase_add_test(limits, header_over_the_limit_is_refused);
    suite_add_tcase(s, limits);

    TCase *faults = tcase_create("faults");
    tcase_set_timeout(faults, 60);
    tcase_add_test(faults, unknown_method_is_unimplemented_at_once);
    tcase_add_test(faults, malformed_or_missing_request_is_refused);
    tcase_add_test(faults, cancel_is_seen_while_the_server_writes);
    tcase_add_test(faults, deadline_ends_both_sides);
    tcase_add_test(faults, call_of_a_client_that_never_reads_can_be_dropped);
    tcase_add_test(faults, nobody_listening_is_unavailable_quickly);
    tcase_add_test(faults, channel_finds_a_server_that_comes_back);
    tcase_add_test(faults, address_in_use_is_told);
    tcase_add_test(faults, bad_address_is_told);
    tcase_add_test(faults, unix_socket_is_replaced_only_when_stale);
    tcase_add_test(faults, shutdown_lets_calls_end_then_cancels);
    tcase_add_test(faults, shutdown_returns_when_the_last_call_has_ended);
    tcase_add_test(faults, recv_and_send_under_way_end_with_cancelled);
    tcase_add_test(faults, random_ends_leave_nothing_behind);
    tcase_add_test(faults, signals_go_to_the_program_and_not_to_poll_threads);
    suite_add_tcase(s, faults);
    return s;
}

int main(void)
{
    SRunner *r = srunner_create(rpc_suite());
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
