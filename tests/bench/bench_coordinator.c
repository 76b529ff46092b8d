/* bench_coordinator - CPU time of the coordinator per streamed token, everything included: scheduler, detokenizing,
 * packing, gRPC, sockets, the ranks' streams. Ranks without a model (coord_fake.h) answer every plan at once or after
 * --step-us; the clients, in this process, read all streams. The coordinator is the real program in its own process; its
 * CPU time is taken from /proc, so what the ranks and clients here use does not count.
 *
 *     bench_coordinator [--streams 256] [--tokens 400] [--step-us 20000] [--ranks 2] [--tcp 1] [--journal 1] [--one-core 1]
 *
 * With --journal 1 it records the requests in a folder of $TMPDIR. With --one-core 1 it has the first core of those that this
 * process may use, and the ranks and clients have the others.
 */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "tests/bench/bench_number.h"
#include "tests/coord_fake.h"
#include "tests/coord_proc.h"

#define READERS 2

struct reader {
    struct proc *p;
    uint32_t first, n, tokens;
    uint64_t got, messages;
    pthread_t thread;
};

static void *reader_main(void *arg)
{
    struct reader *r = arg;
    struct rpc_stream **s = calloc(r->n, sizeof(struct rpc_stream *));
    bool *open = calloc(r->n, sizeof *open);
    if (!s || !open)
        abort();
    (void)setpriority(PRIO_PROCESS, 0, 10); /* of this thread: ranks, which have devices of their own, go first */
    for (uint32_t i = 0; i < r->n; i++) {
        Tandem__V1__GenerateRequest m = TANDEM__V1__GENERATE_REQUEST__INIT;
        Tandem__V1__Stopping stopping = TANDEM__V1__STOPPING__INIT;
        char prompt[] = "Once upon a time, there was a little dog";
        m.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT;
        m.text = (ProtobufCBinaryData){.len = sizeof prompt - 1, .data = (uint8_t *)prompt};
        stopping.max_tokens_is_case = TANDEM__V1__STOPPING__MAX_TOKENS_IS_MAX_TOKENS;
        stopping.max_tokens = r->tokens;
        m.stopping = &stopping;
        s[i] = proc_open(r->p, &m, 0);
        open[i] = true;
    }
    for (uint32_t left = r->n; left > 0;) {
        for (uint32_t i = 0; i < r->n; i++) {
            struct proc_reply reply = {0};
            if (!open[i])
                continue;
            if (!proc_read(s[i], &reply, 60000)) {
                open[i] = false;
                left--;
                if (reply.code != ST_OK)
                    fprintf(stderr, "stream %u: %s\n", r->first + i, reply.message);
            }
            r->got += reply.n_ids;
            r->messages += reply.n_messages;
            proc_reply_free(&reply);
        }
    }
    for (uint32_t i = 0; i < r->n; i++)
        rpc_stream_close(s[i]);
    free(s);
    free(open);
    return NULL;
}

/* "listening public=unix:...,127.0.0.1:4711 control=..." */
static void use_tcp(struct proc *p)
{
    char address[64];
    const char *at = strstr(p->listening, ",127.0.0.1:");
    if (!at || sscanf(at + 1, "%63[0-9.:]", address) != 1)
        abort();
    rpc_channel_destroy(p->ch);
    if (rpc_channel_create(&p->ch, address, NULL) != ST_OK)
        abort();
}

/* This thread, and what it starts from now on: on the first core of `all`, or on the others. */
static void use_cores(const cpu_set_t *all, bool first)
{
    cpu_set_t set;
    bool seen = false;
    CPU_ZERO(&set);
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, all)) {
            if (seen != first)
                CPU_SET(i, &set);
            seen = true;
        }
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        abort();
}

int main(int argc, char **argv)
{
    uint32_t streams = 256, tokens = 400, step_us = 20000, ranks = 2, tcp = 0, journal = 0, one_core = 0;
    const struct bench_number numbers[] = {
        {"--streams", &streams}, {"--tokens", &tokens},   {"--step-us", &step_us},   {"--ranks", &ranks},
        {"--tcp", &tcp},         {"--journal", &journal}, {"--one-core", &one_core}, {0}};
    bench_numbers("bench_coordinator", numbers, argc, argv);
    if (ranks < 1 || ranks > FAKE_MAX_RANKS || streams < READERS) {
        fprintf(stderr, "bench_coordinator: --ranks 1 to %d, --streams at least %d\n", FAKE_MAX_RANKS, READERS);
        return 2;
    }
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    char dir[256];
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%.200s/tandem-bench-XXXXXX", tmp ? tmp : "/tmp");
    if (journal && !mkdtemp(dir))
        return 1;
    char rows[16]; /* of a step: all decode in each, and some arrive */
    snprintf(rows, sizeof rows, "%u", 2 * streams > 512 ? 2 * streams : 512);
    const char *args[] = {"--max-queued",
                          "4096",
                          "--listen",
                          "127.0.0.1:0",
                          "--step-tokens",
                          rows,
                          journal ? "--journal" : NULL,
                          dir,
                          NULL};
    cpu_set_t all;
    CPU_ZERO(&all);
    if (sched_getaffinity(0, sizeof all, &all) != 0 || (one_core && CPU_COUNT(&all) < 2)) {
        fprintf(stderr, "bench_coordinator: --one-core 1: two cores are needed\n");
        return 2;
    }
    o.size = ranks;
    o.max_slots = streams;
    o.max_context = tokens + 64;
    o.total_pages = (uint64_t)streams * (tokens + 64);
    o.step_us = step_us;
    if (one_core)
        use_cores(&all, true);
    proc_start(&p, TEST_COORDINATOR, TEST_MODEL, args);
    if (one_core)
        use_cores(&all, false);
    if (tcp)
        use_tcp(&p);
    struct fake_group *g = fake_group_start(p.control, &o);
    if (!proc_wait_state(&p, TANDEM__V1__SERVER_INFO__STATE__READY, 10000))
        return 1;
    struct reader r[READERS] = {{0}};
    double cpu = proc_cpu_seconds(&p);
    int64_t t = proc_now_ms();
    for (uint32_t i = 0; i < READERS; i++) {
        r[i].p = &p;
        r[i].first = i * streams / READERS;
        r[i].n = (i + 1) * streams / READERS - r[i].first;
        r[i].tokens = tokens;
        if (pthread_create(&r[i].thread, NULL, reader_main, &r[i]) != 0)
            return 1;
    }
    uint64_t got = 0, messages = 0;
    for (uint32_t i = 0; i < READERS; i++) {
        pthread_join(r[i].thread, NULL);
        got += r[i].got;
        messages += r[i].messages;
    }
    cpu = proc_cpu_seconds(&p) - cpu;
    double seconds = (double)(proc_now_ms() - t) / 1e3;
    uint64_t steps = fake_group_steps(g);
    bool ok = fake_group_stop(g) && got == (uint64_t)streams * tokens;
    printf(
        "%s, %u streams, %u ranks, %llu tokens in %llu messages and %llu steps, %.2f s: %.0f tokens/s, coordinator CPU "
        "%.2f s of %s, "
        "%.2f us per token, %.2f us per message; %.1f steps/s\n",
        tcp ? "TCP" : "unix socket", streams, ranks, (unsigned long long)got, (unsigned long long)messages,
        (unsigned long long)steps, seconds, (double)got / seconds, cpu, one_core ? "one core" : "all cores",
        cpu * 1e6 / (double)got, cpu * 1e6 / (double)messages, (double)steps / seconds);
    if (proc_end(&p, SIGTERM, 10000) != 0 || !ok) {
        fprintf(stderr, "bench_coordinator: tokens are missing, or the coordinator failed\n");
        return 1;
    }
    return 0;
}
