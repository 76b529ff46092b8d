#include "rpc_fixture.h"

#include <time.h>
#include <unistd.h>

int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

void sleep_ms(unsigned ms)
{
    usleep(ms * 1000);
}

/* ---- the server under test ---- */

struct test_server srv;

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

bool text_is(const Msg *m, const char *s)
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

void server_start(const char *listen, struct rpc_server_config extra)
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

void server_stop(uint32_t grace_ms)
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

struct rpc_channel *connect_to(const char *address)
{
    struct rpc_channel *ch;
    OK(rpc_channel_create(&ch, address, st));
    return ch;
}

enum status_code echo(struct rpc_channel *ch, const char *text, struct status *st)
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

struct rpc_stream *open_with(struct rpc_channel *ch, const char *path, uint64_t deadline_ms, uint32_t count,
                             uint32_t size)
{
    struct rpc_stream *s;
    uint32_t numbers[2] = {count, size};
    Msg m = MSG_INIT;
    m.n_token_ids = 2;
    m.token_ids = numbers;
    OK(rpc_stream_open(&s, ch, path, deadline_ms, st));
    OK(rpc_stream_send(s, &m.base, PATIENCE_MS, st));
    OK(rpc_stream_half_close(s, PATIENCE_MS, st));
    return s;
}

int64_t next_id(struct rpc_stream *s)
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

enum status_code drain(struct rpc_stream *s, struct status *st)
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

const char *socket_path(const char *name)
{
    static char address[128];
    if (!*folder) {
        snprintf(folder, sizeof folder, "/tmp/check_rpc.XXXXXX");
        ck_assert_ptr_nonnull(mkdtemp(folder));
    }
    snprintf(address, sizeof address, "unix:%s/%s", folder, name);
    return address;
}

void folder_remove(void)
{
    if (*folder)
        ck_assert_int_eq(rmdir(folder), 0); /* fails if a socket was left behind */
    *folder = '\0';
}
