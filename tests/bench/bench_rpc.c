/* bench_rpc.c - what a streamed message and a unary call cost over proto/rpc.h.
 *
 *     bench_rpc [SECONDS]      about SECONDS (default 1) for each line
 *
 * The server is a process of its own, so that its CPU time can be told from the client's. Messages are those of a token:
 * one id, five bytes of text.
 *
 *   flood  every stream is sent to as fast as it takes messages, from on_writable
 *   paced  one thread sends one message to every stream, 50 times a second: what a coordinator does
 *   unary  one call after the other, by rpc_unary
 */
#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "proto/rpc.h"
#include "tandem/v1/inference.pb-c.h"

typedef Tandem__V1__GenerateResponse Msg;
#define MSG_INIT TANDEM__V1__GENERATE_RESPONSE__INIT
#define MSG_TYPE (&tandem__v1__generate_response__descriptor)

#define MAX_STREAMS 512
#define TICK_MS     20

static void die(const char *what, const struct status *st)
{
    fprintf(stderr, "bench_rpc: %s: %s\n", what, st ? st->message : "failed");
    exit(EXIT_FAILURE);
}

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- the server's process ---- */

struct bench_server {
    pthread_mutex_t lock;
    struct rpc_call *paced[MAX_STREAMS];
    uint32_t left[MAX_STREAMS];
    size_t n_paced;
    atomic_bool stop;
};

static enum status_code send_token(struct rpc_call *call, uint32_t id)
{
    Msg m = MSG_INIT;
    m.n_token_ids = 1;
    m.token_ids = &id;
    m.text = (ProtobufCBinaryData){.data = (uint8_t *)" word", .len = 5};
    return rpc_call_send(call, &m.base, NULL);
}

static uint32_t requested(const void *msg, size_t len)
{
    Msg *m = (Msg *)rpc_unpack(MSG_TYPE, msg, len);
    uint32_t n = m && m->n_token_ids ? m->token_ids[0] : 0;
    protobuf_c_message_free_unpacked((ProtobufCMessage *)m, NULL);
    return n;
}

static void echo_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    (void)ctx;
    Msg *m = (Msg *)rpc_unpack(MSG_TYPE, msg, len);
    rpc_call_reply(call, &m->base);
    protobuf_c_message_free_unpacked(&m->base, NULL);
}

static void flood_more(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    uintptr_t left = (uintptr_t)rpc_call_data(call);
    if (left == 0)
        return;
    send_token(call, 12345);
    rpc_call_set_data(call, (void *)(left - 1));
    if (left == 1)
        rpc_call_finish(call, NULL, 0);
}

static void flood_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    rpc_call_set_data(call, (void *)(uintptr_t)requested(msg, len));
    flood_more(call, ctx);
}

static void paced_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct bench_server *b = ctx;
    uint32_t n = requested(msg, len);
    pthread_mutex_lock(&b->lock);
    b->left[b->n_paced] = n;
    b->paced[b->n_paced++] = rpc_call_ref(call);
    pthread_mutex_unlock(&b->lock);
}

static void *paced_main(void *arg)
{
    struct bench_server *b = arg;
    while (!b->stop) {
        usleep(TICK_MS * 1000);
        pthread_mutex_lock(&b->lock);
        for (size_t i = 0; i < b->n_paced; i++) {
            if (b->left[i]-- > 0) {
                send_token(b->paced[i], 12345);
                continue;
            }
            rpc_call_finish(b->paced[i], NULL, 0);
            rpc_call_unref(b->paced[i]);
            b->paced[i] = b->paced[--b->n_paced];
            b->left[i] = b->left[b->n_paced];
            i--;
        }
        pthread_mutex_unlock(&b->lock);
    }
    return NULL;
}

/* Runs until `until_eof` ends. Writes the port to `port_fd`. */
static void serve(const char *listen, int port_fd, int until_eof)
{
    struct bench_server b = {.lock = PTHREAD_MUTEX_INITIALIZER};
    struct rpc_method methods[] = {
        {"/bench/Echo", RPC_UNARY, .on_open = echo_open},
        {"/bench/Flood", RPC_SERVER_STREAM, .on_open = flood_open, .on_writable = flood_more},
        {"/bench/Paced", RPC_SERVER_STREAM, .on_open = paced_open, .ctx = &b},
    };
    struct rpc_server_config cfg = {.methods = methods, .n_methods = 3, .listen = &listen, .n_listen = 1};
    struct rpc_server *s;
    struct status st = STATUS_INIT;
    pthread_t pacer;
    if (rpc_server_start(&s, &cfg, &st) != ST_OK)
        die("server", &st);
    uint16_t port = rpc_server_port(s, 0);
    char end;
    pthread_create(&pacer, NULL, paced_main, &b);
    if (write(port_fd, &port, sizeof port) != sizeof port || read(until_eof, &end, 1) < 0)
        die("pipe", NULL);
    b.stop = true;
    pthread_join(pacer, NULL);
    rpc_server_destroy(s);
    exit(EXIT_SUCCESS);
}

/* ---- the client's process: all streams on one queue, so that it is not what is measured ---- */

struct client {
    grpc_channel *channel;
    grpc_completion_queue *cq;
};

struct stream {
    grpc_call *call;
    grpc_metadata_array initial, trailing;
    grpc_byte_buffer *in;
    grpc_status_code code;
    grpc_slice details;
};

static grpc_byte_buffer *request(uint32_t n)
{
    uint8_t bytes[32];
    Msg m = MSG_INIT;
    m.n_token_ids = 1;
    m.token_ids = &n;
    grpc_slice s = grpc_slice_from_copied_buffer((char *)bytes, protobuf_c_message_pack(&m.base, bytes));
    grpc_byte_buffer *b = grpc_raw_byte_buffer_create(&s, 1);
    grpc_slice_unref(s);
    return b;
}

/* Tags: the stream with bit 0 for its end, without for a message. */
static void read_next(struct stream *s, bool first)
{
    grpc_op ops[2] = {{.op = GRPC_OP_RECV_MESSAGE}, {.op = GRPC_OP_RECV_INITIAL_METADATA}};
    ops[0].data.recv_message.recv_message = &s->in;
    ops[1].data.recv_initial_metadata.recv_initial_metadata = &s->initial;
    grpc_call_start_batch(s->call, ops, first ? 2 : 1, s, NULL);
}

static void stream_open(struct client *c, struct stream *s, const char *path, uint32_t n)
{
    memset(s, 0, sizeof *s);
    s->details = grpc_empty_slice();
    grpc_metadata_array_init(&s->initial);
    grpc_metadata_array_init(&s->trailing);
    s->call =
        grpc_channel_create_call(c->channel, NULL, GRPC_PROPAGATE_DEFAULTS, c->cq, grpc_slice_from_static_string(path),
                                 NULL, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_byte_buffer *b = request(n);
    grpc_op ops[4] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                      {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
                      {.op = GRPC_OP_RECV_STATUS_ON_CLIENT}};
    ops[1].data.send_message.send_message = b;
    ops[3].data.recv_status_on_client.trailing_metadata = &s->trailing;
    ops[3].data.recv_status_on_client.status = &s->code;
    ops[3].data.recv_status_on_client.status_details = &s->details;
    grpc_call_start_batch(s->call, ops, 4, (char *)s + 1, NULL);
    grpc_byte_buffer_destroy(b);
    read_next(s, true);
}

static void stream_close(struct stream *s)
{
    grpc_call_unref(s->call);
    grpc_slice_unref(s->details);
    grpc_metadata_array_destroy(&s->initial);
    grpc_metadata_array_destroy(&s->trailing);
}

/* Messages that came, over all streams. */
static uint64_t run_streams(struct client *c, const char *path, size_t n_streams, uint32_t each)
{
    static struct stream streams[MAX_STREAMS];
    uint64_t got = 0;
    for (size_t i = 0; i < n_streams; i++)
        stream_open(c, &streams[i], path, each);
    for (size_t out = 2 * n_streams; out > 0;) {
        grpc_event ev = grpc_completion_queue_next(c->cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        uintptr_t tag = (uintptr_t)ev.tag;
        struct stream *s = (struct stream *)(tag & ~(uintptr_t)1);
        if (tag & 1 || !s->in) {
            out--;
            continue;
        }
        grpc_byte_buffer_destroy(s->in);
        got++;
        read_next(s, false);
    }
    for (size_t i = 0; i < n_streams; i++) {
        if (streams[i].code != GRPC_STATUS_OK)
            die("a stream failed", NULL);
        stream_close(&streams[i]);
    }
    return got;
}

static void bench_streams(struct client *c, const char *transport, clockid_t server_cpu, double aim_s)
{
    static const size_t counts[] = {1, 64, 256, 512};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        size_t n = counts[i];
        run_streams(c, "/bench/Flood", n, 10); /* warm */
        uint32_t each = (uint32_t)(100000 * aim_s / (double)n) + 1;
        double t = seconds(CLOCK_MONOTONIC), cpu = seconds(server_cpu);
        double got = (double)run_streams(c, "/bench/Flood", n, each);
        t = seconds(CLOCK_MONOTONIC) - t;
        cpu = seconds(server_cpu) - cpu;
        printf("%-5s flood %4zu streams: %7.0f messages/s, server CPU %5.2f us a message\n", transport, n, got / t,
               cpu / got * 1e6);
        each = (uint32_t)(aim_s * 1000 / TICK_MS) + 1;
        cpu = seconds(server_cpu);
        t = seconds(CLOCK_MONOTONIC);
        got = (double)run_streams(c, "/bench/Paced", n, each);
        t = seconds(CLOCK_MONOTONIC) - t;
        cpu = seconds(server_cpu) - cpu;
        printf("%-5s paced %4zu streams: %7.0f messages/s, server CPU %5.2f us a message\n", transport, n, got / t,
               cpu / got * 1e6);
        fflush(stdout);
    }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void bench_unary(const char *address, const char *transport, double aim_s)
{
    enum { MAX_CALLS = 100000 };
    static double us[MAX_CALLS];
    struct rpc_channel *ch;
    struct status st = STATUS_INIT;
    size_t n = 0;
    Msg m = MSG_INIT;
    m.text = (ProtobufCBinaryData){.data = (uint8_t *)"hello", .len = 5};
    if (rpc_channel_create(&ch, address, &st) != ST_OK)
        die("channel", &st);
    double end = seconds(CLOCK_MONOTONIC) + aim_s;
    for (int warm = 200; n < MAX_CALLS; warm--) {
        ProtobufCMessage *reply;
        double t = seconds(CLOCK_MONOTONIC);
        if (rpc_unary(ch, "/bench/Echo", &m.base, MSG_TYPE, &reply, 0, &st) != ST_OK)
            die("unary", &st);
        double now = seconds(CLOCK_MONOTONIC);
        protobuf_c_message_free_unpacked(reply, NULL);
        if (warm <= 0)
            us[n++] = (now - t) * 1e6;
        if (now > end && n > 0)
            break;
    }
    rpc_channel_destroy(ch);
    qsort(us, n, sizeof *us, compare);
    printf("%-5s unary %zu calls: median %.0f us, p99 %.0f us\n", transport, n, us[n / 2], us[n * 99 / 100]);
}

static void bench_transport(const char *transport, const char *listen, double aim_s)
{
    int to_client[2], to_server[2];
    if (pipe(to_client) != 0 || pipe(to_server) != 0)
        die("pipe", NULL);
    pid_t pid = fork();
    if (pid < 0)
        die("fork", NULL);
    if (pid == 0) {
        close(to_server[1]);
        serve(listen, to_client[1], to_server[0]);
    }
    close(to_client[1]);
    close(to_server[0]);
    uint16_t port;
    if (read(to_client[0], &port, sizeof port) != sizeof port)
        die("the server did not start", NULL);
    char address[128];
    if (port)
        snprintf(address, sizeof address, "127.0.0.1:%u", port);
    else
        snprintf(address, sizeof address, "%s", listen);
    clockid_t server_cpu;
    if (clock_getcpuclockid(pid, &server_cpu) != 0)
        die("no CPU clock of the server", NULL);
    bench_unary(address, transport, aim_s);
    struct client c;
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    c.channel = grpc_channel_create(address, plain, NULL);
    grpc_channel_credentials_release(plain);
    c.cq = grpc_completion_queue_create_for_next(NULL);
    bench_streams(&c, transport, server_cpu, aim_s);
    grpc_channel_destroy(c.channel);
    close(to_server[1]);
    waitpid(pid, NULL, 0);
}

int main(int argc, char **argv)
{
    double aim_s = argc > 1 ? atof(argv[1]) : 1;
    char folder[] = "/tmp/bench_rpc.XXXXXX", socket_address[64];
    if (!mkdtemp(folder))
        die("mkdtemp", NULL);
    snprintf(socket_address, sizeof socket_address, "unix:%s/s", folder);
    /* The core must not be up when a process is forked: each transport has its client in a process, too. */
    for (int i = 0; i < 2; i++) {
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            bench_transport(i == 0 ? "tcp" : "unix", i == 0 ? "127.0.0.1:0" : socket_address, aim_s);
            exit(EXIT_SUCCESS);
        }
        waitpid(pid, NULL, 0);
    }
    rmdir(folder);
    return EXIT_SUCCESS;
}
