/* rpc_connections.c - proto/rpc.h: the age of connections, idle ones, and peers that have gone silent. */
#include <arpa/inet.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include "rpc_fixture.h"

START_TEST(old_connections_are_replaced_and_calls_go_on)
{
    server_start("127.0.0.1:0", (struct rpc_server_config){.max_connection_age_ms = 200});
    struct rpc_channel *ch = connect_to(srv.address);
    char first[64];
    OK(echo(ch, "hello", st));
    snprintf(first, sizeof first, "%s", srv.peer);
    struct rpc_stream *held = open_with(ch, "/test.T/Hold", 0, 0, 0);
    AWAIT(srv.held != NULL);
    AWAIT(echo(ch, "hello", NULL) == ST_OK && strcmp(srv.peer, first) != 0);
    rpc_call_finish(atomic_load(&srv.held), NULL, 0); /* on the old connection */
    ck_assert_int_eq(next_id(held), -1);
    rpc_stream_close(held);
    rpc_channel_destroy(ch);
    server_stop(PATIENCE_MS);
}
END_TEST

START_TEST(grace_of_an_old_connection_is_bounded)
{
    server_start("127.0.0.1:0",
                 (struct rpc_server_config){.max_connection_age_ms = 50, .max_connection_age_grace_ms = 50});
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *held = open_with(ch, "/test.T/Hold", 0, 0, 0);
    struct status got = STATUS_INIT;
    ck_assert_int_eq(drain(held, &got), ST_UNAVAILABLE);
    rpc_stream_close(held);
    rpc_channel_destroy(ch);
    server_stop(PATIENCE_MS);
}
END_TEST

START_TEST(idle_connections_are_closed)
{
    server_start("127.0.0.1:0", (struct rpc_server_config){.max_connection_idle_ms = 50});
    struct rpc_channel *ch = connect_to(srv.address);
    char first[64];
    OK(echo(ch, "hello", st));
    snprintf(first, sizeof first, "%s", srv.peer);
    for (int tries = 0; tries < 50 && strcmp(srv.peer, first) == 0; tries++) {
        sleep_ms(150);
        OK(echo(ch, "hello", st)); /* on a new connection, unnoticed */
    }
    ck_assert_str_ne(srv.peer, first);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

/* ---- a wire between client and server that can be cut without a word ---- */

struct wire {
    int listener, ends[2];
    uint16_t port, to;
    pthread_t thread;
    atomic_bool cut, stop;
};

static void forward(struct wire *w, int from)
{
    char bytes[4096];
    ssize_t n = recv(w->ends[from], bytes, sizeof bytes, 0);
    for (ssize_t at = 0; n > 0 && at < n;) {
        ssize_t k = send(w->ends[1 - from], bytes + at, (size_t)(n - at), MSG_NOSIGNAL);
        if (k <= 0)
            return;
        at += k;
    }
}

static void *wire_main(void *arg)
{
    struct wire *w = arg;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(w->to)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    w->ends[0] = accept(w->listener, NULL, NULL);
    w->ends[1] = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(w->ends[1], (struct sockaddr *)&to, sizeof to), 0);
    while (!w->stop) {
        struct pollfd fds[2] = {{w->ends[0], POLLIN, 0}, {w->ends[1], POLLIN, 0}};
        if (w->cut || poll(fds, 2, 10) <= 0) {
            sleep_ms(w->cut ? 10 : 0);
            continue;
        }
        for (int i = 0; i < 2; i++)
            if (fds[i].revents)
                forward(w, i);
    }
    close(w->ends[0]);
    close(w->ends[1]);
    return NULL;
}

static void wire_start(struct wire *w, uint16_t to)
{
    struct sockaddr_in here = {.sin_family = AF_INET};
    socklen_t n = sizeof here;
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    *w = (struct wire){.listener = socket(AF_INET, SOCK_STREAM, 0), .to = to};
    ck_assert_int_eq(bind(w->listener, (struct sockaddr *)&here, sizeof here), 0);
    ck_assert_int_eq(listen(w->listener, 1), 0);
    ck_assert_int_eq(getsockname(w->listener, (struct sockaddr *)&here, &n), 0);
    w->port = ntohs(here.sin_port);
    pthread_create(&w->thread, NULL, wire_main, w);
}

static void wire_end(struct wire *w)
{
    w->stop = true;
    pthread_join(w->thread, NULL);
    close(w->listener);
}

START_TEST(silent_client_is_given_up)
{
    struct wire w;
    char address[64];
    server_start("127.0.0.1:0", (struct rpc_server_config){.keepalive_ms = 100, .keepalive_timeout_ms = 500});
    wire_start(&w, rpc_server_port(srv.rpc, 0));
    snprintf(address, sizeof address, "127.0.0.1:%u", w.port);
    struct rpc_channel *ch = connect_to(address);
    struct rpc_stream *held = open_with(ch, "/test.T/Hold", 0, 0, 0);
    AWAIT(srv.held != NULL);
    const void *msg;
    size_t len;
    bool timed_out = false;
    /* Pinged several times, and it answers. */
    ck_assert_int_eq(rpc_stream_recv(held, &msg, &len, 800, &timed_out, NULL), ST_DEADLINE_EXCEEDED);
    ck_assert(timed_out);
    ck_assert_uint_eq(srv.closes, 0);
    w.cut = true;
    AWAIT(srv.closes == 1);
    ck_assert_uint_eq(srv.cancelled, 1);
    wire_end(&w);
    rpc_stream_close(held);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

void rpc_connections_tests(TCase *c)
{
    tcase_add_test(c, old_connections_are_replaced_and_calls_go_on);
    tcase_add_test(c, grace_of_an_old_connection_is_bounded);
    tcase_add_test(c, idle_connections_are_closed);
    tcase_add_test(c, silent_client_is_given_up);
}
