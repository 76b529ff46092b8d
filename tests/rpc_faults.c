/* rpc_faults.c - proto/rpc.h when things go wrong: bad peers, bad addresses, cancellation, shutdown under load. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "rpc_fixture.h"

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
        OK(rpc_stream_half_close(s, PATIENCE_MS, st));
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

static void *read_two(void *arg)
{
    ck_assert_int_eq(next_id(arg), 0); /* the last message and the status are not lost */
    ck_assert_int_eq(next_id(arg), -1);
    return NULL;
}

START_TEST(shutdown_returns_when_the_last_call_has_ended)
{
    pthread_t finisher, reader;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s = open_with(ch, "/test.T/Hold", 0, 0, 0);
    AWAIT(atomic_load(&srv.held) != NULL);
    pthread_create(&finisher, NULL, finish_later, atomic_load(&srv.held));
    pthread_create(&reader, NULL, read_two, s);
    int64_t t = now_us();
    rpc_server_shutdown(srv.rpc, 60000);
    ck_assert_int_lt(now_us() - t, 5000000 * SLOW);
    pthread_join(finisher, NULL);
    pthread_join(reader, NULL);
    ck_assert_uint_eq(srv.cancelled, 0);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

START_TEST(cancelled_bidi_call_is_not_half_closed)
{
    enum { N = 50 };
    Msg m = MSG_INIT;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    for (unsigned i = 0; i < N; i++) {
        struct rpc_stream *s;
        OK(rpc_stream_open(&s, ch, "/test.T/Bidi", 0, st));
        OK(rpc_stream_send(s, &m.base, PATIENCE_MS, st));
        ck_assert_int_eq(next_id(s), 0);
        rpc_stream_close(s);
        AWAIT(srv.closes == i + 1);
    }
    ck_assert_uint_eq(srv.half_closes, 0);
    ck_assert_uint_eq(srv.cancelled, N);
    struct rpc_stream *s;
    OK(rpc_stream_open(&s, ch, "/test.T/Bidi", 0, st));
    rpc_channel_destroy(ch); /* streams keep the connection */
    OK(rpc_stream_send(s, &m.base, PATIENCE_MS, st));
    ck_assert_int_eq(next_id(s), 0);
    rpc_server_shutdown(srv.rpc, 0);
    ck_assert_uint_eq(srv.half_closes, 0);
    rpc_stream_close(s);
    server_stop(0);
}
END_TEST

static void *cancel_later(void *arg)
{
    sleep_ms(50);
    rpc_stream_cancel(arg);
    return NULL;
}

struct stuck_send {
    struct rpc_stream *stream;
    const Msg *message;
    atomic_uint sent;
    enum status_code rc;
};

static void *send_until_it_fails(void *arg)
{
    struct stuck_send *k = arg;
    while ((k->rc = rpc_stream_send(k->stream, &k->message->base, PATIENCE_MS, NULL)) == ST_OK)
        atomic_fetch_add(&k->sent, 1);
    return NULL;
}

/* A message that is being written is not overtaken, and not waited for longer than one asked. */
START_TEST(half_close_behind_a_stuck_message_has_a_bound)
{
    struct status got = STATUS_INIT;
    pthread_t sender;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    uint8_t *payload = calloc(1, 1 << 20);
    Msg m = MSG_INIT;
    m.text = (ProtobufCBinaryData){.data = payload, .len = 1 << 20};
    struct stuck_send k = {.message = &m};
    OK(rpc_stream_open(&k.stream, ch, "/test.T/Hold", 0, st)); /* takes one message and reads no other */
    pthread_create(&sender, NULL, send_until_it_fails, &k);
    unsigned before;
    do {
        before = atomic_load(&k.sent);
        sleep_ms(300 * SLOW);
    } while (before == 0 || atomic_load(&k.sent) != before);
    int64_t t = now_us();
    ck_assert_int_eq(rpc_stream_half_close(k.stream, 100, &got), ST_DEADLINE_EXCEEDED);
    int64_t took = now_us() - t;
    ck_assert_int_ge(took, 95000);
    ck_assert_int_lt(took, 3000000 * SLOW);
    rpc_stream_cancel(k.stream);
    pthread_join(sender, NULL);
    ck_assert_int_eq(k.rc, ST_CANCELLED);
    rpc_stream_close(k.stream);
    rpc_channel_destroy(ch);
    server_stop(0);
    free(payload);
}
END_TEST

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

START_TEST(garbage_on_the_socket_is_survived)
{
    static const char *const openers[] = {"", "GET / HTTP/1.1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"};
    unsigned seed = 1;
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct sockaddr_in sa = {.sin_family = AF_INET, .sin_port = htons(rpc_server_port(srv.rpc, 0))};
    sa.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < 60; i++) {
        char bytes[2000];
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        ck_assert_int_eq(connect(fd, (struct sockaddr *)&sa, sizeof sa), 0);
        ssize_t sent = send(fd, openers[i % 3], strlen(openers[i % 3]), MSG_NOSIGNAL);
        for (size_t k = 0; k < sizeof bytes; k++)
            bytes[k] = (char)(rand_r(&seed) >> 8);
        if (sent >= 0)
            sent = send(fd, bytes, (size_t)rand_r(&seed) % sizeof bytes, MSG_NOSIGNAL);
        if (sent >= 0 && i % 2) { /* half of them wait for an answer or the end, the others are gone at once */
            shutdown(fd, SHUT_WR);
            while (recv(fd, bytes, sizeof bytes, 0) > 0)
                ;
        }
        close(fd);
    }
    struct rpc_channel *ch = connect_to(srv.address);
    OK(echo(ch, "still here", st));
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_uint_eq(srv.opens, 1);
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
            rc = rpc_stream_half_close(s, PATIENCE_MS, &got);
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

void rpc_faults_tests(TCase *c)
{
    tcase_add_test(c, unknown_method_is_unimplemented_at_once);
    tcase_add_test(c, malformed_or_missing_request_is_refused);
    tcase_add_test(c, cancel_is_seen_while_the_server_writes);
    tcase_add_test(c, deadline_ends_both_sides);
    tcase_add_test(c, call_of_a_client_that_never_reads_can_be_dropped);
    tcase_add_test(c, nobody_listening_is_unavailable_quickly);
    tcase_add_test(c, channel_finds_a_server_that_comes_back);
    tcase_add_test(c, address_in_use_is_told);
    tcase_add_test(c, bad_address_is_told);
    tcase_add_test(c, unix_socket_is_replaced_only_when_stale);
    tcase_add_test(c, shutdown_lets_calls_end_then_cancels);
    tcase_add_test(c, shutdown_returns_when_the_last_call_has_ended);
    tcase_add_test(c, cancelled_bidi_call_is_not_half_closed);
    tcase_add_test(c, recv_and_send_under_way_end_with_cancelled);
    tcase_add_test(c, half_close_behind_a_stuck_message_has_a_bound);
    tcase_add_test(c, garbage_on_the_socket_is_survived);
    tcase_add_test(c, random_ends_leave_nothing_behind);
    tcase_add_test(c, signals_go_to_the_program_and_not_to_poll_threads);
}
