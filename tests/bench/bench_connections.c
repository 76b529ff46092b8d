/* bench_connections - what connections that do nothing cost the coordinator: memory of the process and CPU time. So many to
 * each of its listeners, over TCP: HTTP/2 with its handshake done, as an idle gRPC channel has it, and HTTP/1.1 after one
 * answer, kept alive. The coordinator is the real program; its figures are from /proc. What the kernel holds for a socket is
 * not in them.
 *
 *     bench_connections [--grpc 10000] [--http 10000] [--seconds 10]
 */
#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/bench/bench_number.h"
#include "tests/coord_fake.h"
#include "tests/coord_proc.h"

#define AT_ONCE 64 /* connections whose handshake is under way */

static const char HELLO_HTTP2[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
                                  "\0\0\0\4\0\0\0\0\0" /* SETTINGS, none */
                                  "\0\0\0\4\1\0\0\0\0" /* the server's are taken */;
static const char HELLO_HTTP[] = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n";

static int dial(unsigned port)
{
    struct sockaddr_in sa = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&sa, sizeof sa) != 0) {
        perror("bench_connections: connect");
        exit(1);
    }
    return fd;
}

/* The peer has answered. */
static void await_answer(int fd)
{
    char bytes[4096];
    struct pollfd p = {.fd = fd, .events = POLLIN};
    if (poll(&p, 1, 20000) != 1 || read(fd, bytes, sizeof bytes) <= 0) {
        fprintf(stderr, "bench_connections: the server does not answer\n");
        exit(1);
    }
}

static int *open_all(unsigned port, uint32_t n, const char *hello, size_t len)
{
    int *fd = calloc(n + 1, sizeof *fd);
    if (!fd)
        abort();
    for (uint32_t first = 0; first < n; first += AT_ONCE) {
        uint32_t end = n - first < AT_ONCE ? n : first + AT_ONCE;
        for (uint32_t i = first; i < end; i++) {
            fd[i] = dial(port);
            if (write(fd[i], hello, len) != (ssize_t)len)
                abort();
        }
        for (uint32_t i = first; i < end; i++)
            await_answer(fd[i]);
    }
    return fd;
}

/* Those that the server has not closed. */
static uint32_t count_open(const int *fd, uint32_t n)
{
    uint32_t open = 0;
    for (uint32_t i = 0; i < n; i++) {
        char bytes[4096];
        ssize_t got;
        while ((got = recv(fd[i], bytes, sizeof bytes, MSG_DONTWAIT)) > 0)
            ;
        open += got < 0;
    }
    return open;
}

static double resident_bytes(const struct proc *p)
{
    char path[64];
    unsigned long size = 0, resident = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)p->pid);
    FILE *f = fopen(path, "r");
    if (!f || fscanf(f, "%lu %lu", &size, &resident) != 2)
        abort();
    fclose(f);
    return (double)resident * (double)sysconf(_SC_PAGESIZE);
}

static bool measure(struct proc *p, const char *what, unsigned port, uint32_t n, const char *hello, size_t len,
                    uint32_t seconds)
{
    double bytes = resident_bytes(p), cpu = proc_cpu_seconds(p);
    int *fd = open_all(port, n, hello, len);
    double opening = proc_cpu_seconds(p) - cpu;
    usleep(500000);
    double held = resident_bytes(p) - bytes;
    cpu = proc_cpu_seconds(p);
    sleep(seconds);
    cpu = proc_cpu_seconds(p) - cpu;
    uint32_t open = count_open(fd, n);
    printf("%s: %u connections, %.1f KiB each, opened with %.0f us of CPU each; idle for %u s: %.2f %% of a core, %u "
           "still "
           "open\n",
           what, n, held / 1024 / n, opening * 1e6 / n, seconds, cpu * 100 / seconds, open);
    for (uint32_t i = 0; i < n; i++)
        close(fd[i]);
    free(fd);
    return open == n;
}

int main(int argc, char **argv)
{
    uint32_t grpc = 10000, http = 10000, seconds = 10;
    const struct bench_number numbers[] = {{"--grpc", &grpc}, {"--http", &http}, {"--seconds", &seconds}, {0}};
    bench_numbers("bench_connections", numbers, argc, argv);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max; /* the coordinator inherits it */
    setrlimit(RLIMIT_NOFILE, &files);
    uint32_t most = grpc > http ? grpc : http;
    if (files.rlim_cur < most + 1000) {
        fprintf(stderr, "bench_connections: %lu files may be open (ulimit -n), %u are needed\n",
                (unsigned long)files.rlim_cur, most + 1000);
        return 2;
    }
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    const char *args[] = {"--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", NULL};
    proc_start(&p, TEST_COORDINATOR, TEST_MODEL, args);
    struct fake_group *g = fake_group_start(p.control, &o);
    if (!proc_wait_state(&p, TANDEM__V1__SERVER_INFO__STATE__READY, 10000))
        return 1;
    unsigned grpc_port = 0, http_port = 0;
    const char *at = strstr(p.listening, ",127.0.0.1:"), *http_at = strstr(p.listening, " http=127.0.0.1:");
    if (!at || sscanf(at, ",127.0.0.1:%u", &grpc_port) != 1 || !http_at ||
        sscanf(http_at, " http=127.0.0.1:%u", &http_port) != 1)
        abort();
    double cpu = proc_cpu_seconds(&p);
    sleep(seconds);
    cpu = proc_cpu_seconds(&p) - cpu;
    printf("no connections: %.1f MiB, %.2f %% of a core\n", resident_bytes(&p) / (1 << 20), cpu * 100 / seconds);
    bool ok = grpc == 0 || measure(&p, "gRPC", grpc_port, grpc, HELLO_HTTP2, sizeof HELLO_HTTP2 - 1, seconds);
    ok = (http == 0 || measure(&p, "HTTP", http_port, http, HELLO_HTTP, sizeof HELLO_HTTP - 1, seconds)) && ok;
    ok = fake_group_stop(g) && ok;
    if (proc_end(&p, SIGTERM, 20000) != 0 || !ok) {
        fprintf(stderr, "bench_connections: connections were closed, or the coordinator failed\n");
        return 1;
    }
    return 0;
}
