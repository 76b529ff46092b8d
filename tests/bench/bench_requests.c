/* bench_requests - many short requests a second: CPU time of the coordinator for each, and how long they take. Every request is
 * a call of its own with a prompt of text, a few new tokens and an end. They are sent at a fixed rate, whatever becomes of those
 * before, by threads of this process over one gRPC channel; ranks without a model (coord_fake.h) answer after --step-us. The
 * coordinator is the real program; its CPU time is taken from /proc.
 *
 *     bench_requests [--rate 2000] [--seconds 10] [--tokens 4] [--threads 128] [--step-us 1000] [--ranks 2]
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/bench/bench_number.h"
#include "tests/coord_fake.h"
#include "tests/coord_proc.h"

static struct {
    struct proc p;
    uint32_t rate, n, tokens;
    int64_t begin_us;
    atomic_uint next, failed, late;
    uint32_t *took_us; /* from the time that it was due */
} bench;

static int64_t now_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static void ask(uint32_t i, int64_t due_us)
{
    Tandem__V1__GenerateRequest m = TANDEM__V1__GENERATE_REQUEST__INIT;
    Tandem__V1__Stopping stopping = TANDEM__V1__STOPPING__INIT;
    char prompt[64];
    struct proc_reply reply;
    snprintf(prompt, sizeof prompt, "Once upon a time, %u little dogs", i);
    m.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT;
    m.text = (ProtobufCBinaryData){.len = strlen(prompt), .data = (uint8_t *)prompt};
    stopping.max_tokens_is_case = TANDEM__V1__STOPPING__MAX_TOKENS_IS_MAX_TOKENS;
    stopping.max_tokens = bench.tokens;
    m.stopping = &stopping;
    proc_generate(&bench.p, &m, 0, &reply);
    if (reply.code != ST_OK || reply.n_ids != bench.tokens) {
        if (atomic_fetch_add(&bench.failed, 1) == 0)
            fprintf(stderr, "request %u: %s: %s\n", i, status_name(reply.code), reply.message);
    }
    proc_reply_free(&reply);
    int64_t us = now_us() - due_us;
    bench.took_us[i] = us < UINT32_MAX ? (uint32_t)us : UINT32_MAX;
}

static void *client_main(void *arg)
{
    (void)arg;
    for (uint32_t i; (i = atomic_fetch_add(&bench.next, 1)) < bench.n;) {
        int64_t due_us = bench.begin_us + (int64_t)i * 1000000 / bench.rate;
        struct timespec at = {.tv_sec = due_us / 1000000, .tv_nsec = due_us % 1000000 * 1000};
        if (now_us() > due_us + 1000) /* all threads were busy */
            atomic_fetch_add(&bench.late, 1);
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR)
            ;
        ask(i, due_us);
    }
    return NULL;
}

static int by_size(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
    uint32_t seconds = 10, threads = 128, step_us = 1000, ranks = 2;
    bench.rate = 2000;
    bench.tokens = 4;
    const struct bench_number numbers[] = {{"--rate", &bench.rate},
                                           {"--seconds", &seconds},
                                           {"--tokens", &bench.tokens},
                                           {"--threads", &threads},
                                           {"--step-us", &step_us},
                                           {"--ranks", &ranks},
                                           {0}};
    bench_numbers("bench_requests", numbers, argc, argv);
    if (bench.rate < 1 || seconds < 1 || threads < 1 || threads > 1024 || ranks < 1 || ranks > FAKE_MAX_RANKS) {
        fprintf(stderr, "bench_requests: --rate, --seconds at least 1, --threads 1 to 1024, --ranks 1 to %d\n",
                FAKE_MAX_RANKS);
        return 2;
    }
    struct fake_options o = FAKE_OPTIONS;
    const char *args[] = {"--max-queued", "8192", NULL};
    pthread_t *thread = calloc(threads, sizeof *thread);
    bench.n = bench.rate * seconds;
    bench.took_us = calloc(bench.n, sizeof *bench.took_us);
    if (!thread || !bench.took_us)
        abort();
    o.size = ranks;
    o.max_slots = 256;
    o.total_pages = 65536;
    o.step_us = step_us;
    proc_start(&bench.p, TEST_COORDINATOR, TEST_MODEL, args);
    struct fake_group *g = fake_group_start(bench.p.control, &o);
    if (!proc_wait_state(&bench.p, TANDEM__V1__SERVER_INFO__STATE__READY, 10000))
        return 1;
    double cpu = proc_cpu_seconds(&bench.p);
    bench.begin_us = now_us() + 100000;
    for (uint32_t i = 0; i < threads; i++)
        if (pthread_create(&thread[i], NULL, client_main, NULL) != 0)
            return 1;
    for (uint32_t i = 0; i < threads; i++)
        pthread_join(thread[i], NULL);
    double took = (double)(now_us() - bench.begin_us) * 1e-6;
    cpu = proc_cpu_seconds(&bench.p) - cpu;
    qsort(bench.took_us, bench.n, sizeof *bench.took_us, by_size);
    printf("%u requests of %u tokens in %.2f s: %.0f a second (asked for: %u), %u sent late; coordinator CPU %.2f s, "
           "%.0f us per "
           "request, %.2f cores; from when they were due to the end: p50 %.1f, p99 %.1f, most %.1f ms; %u failed\n",
           bench.n, bench.tokens, took, bench.n / took, bench.rate, atomic_load(&bench.late), cpu, cpu * 1e6 / bench.n,
           cpu / took, bench.took_us[bench.n / 2] / 1e3, bench.took_us[(size_t)bench.n * 99 / 100] / 1e3,
           bench.took_us[bench.n - 1] / 1e3, atomic_load(&bench.failed));
    bool ok = fake_group_stop(g) && atomic_load(&bench.failed) == 0;
    free(thread);
    free(bench.took_us);
    if (proc_end(&bench.p, SIGTERM, 10000) != 0 || !ok) {
        fprintf(stderr, "bench_requests: requests or the coordinator failed\n");
        return 1;
    }
    return 0;
}
