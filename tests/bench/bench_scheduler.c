/* bench_scheduler.c - what one step costs the coordinator: sched_result, its events, sched_plan.
 *
 *     bench_scheduler [seconds per line, default 1]
 *
 * steady:   n requests decode, nothing comes or ends
 * churn:    prompts of 64 to 128 tokens, completions of 16 to 48; a request that ends is replaced at once (sched_submit is
 *           in the figures): about n/32 end and begin in every step
 * pressure: completions are longer than memory allows; rows computed again by preemption are the figure of interest
 * suspend:  the same, and the ranks have as much host memory again
 *
 * Two plans are in flight all the time, as in the server.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "coordinator/scheduler.h"

#define MAX_SAMPLES 2000000

struct load_shape {
    uint32_t prompt_lo, prompt_hi, new_lo, new_hi;
};

struct run {
    struct sched *s;
    struct load_shape shape;
    uint64_t random, next_id, step;
    uint32_t *prompt;
    uint32_t n_samples[2]; /* of the plans in flight, step % 2 */
    uint32_t *tokens;
    uint64_t rows;
    bool refill;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint32_t between(struct run *r, uint32_t lo, uint32_t hi)
{
    r->random = r->random * 6364136223846793005u + 1442695040888963407u;
    return lo + (uint32_t)((r->random >> 33) % (hi - lo + 1));
}

static void die(const struct status *st)
{
    fprintf(stderr, "bench_scheduler: %s: %s\n", status_name(st->code), st->message);
    exit(1);
}

static void submit(struct run *r)
{
    struct status st = STATUS_INIT;
    uint32_t stop[2] = {1, 2};
    struct sched_request req = {.id = ++r->next_id,
                                .prompt = r->prompt,
                                .n_prompt = between(r, r->shape.prompt_lo, r->shape.prompt_hi),
                                .max_new = between(r, r->shape.new_lo, r->shape.new_hi),
                                .stop_ids = stop,
                                .n_stop = 2,
                                .deadline_us = INT64_MAX};
    if (sched_submit(r->s, (int64_t)r->step, &req, &st) != ST_OK)
        die(&st);
}

static void plan(struct run *r)
{
    struct sched_plan p;
    if (!sched_plan(r->s, (int64_t)r->step, &p))
        return;
    r->n_samples[p.step % 2] = p.samples;
    r->rows += p.rows;
}

/* One step of the server's loop; returns its time. */
static uint64_t step(struct run *r)
{
    struct status st = STATUS_INIT;
    struct sched_event ev;
    uint64_t start = now_ns();
    r->step++;
    if (sched_result(r->s, (int64_t)r->step, r->step, r->tokens, r->n_samples[r->step % 2], 0, &st) != ST_OK)
        die(&st);
    while (sched_next_event(r->s, &ev)) {
        if (ev.kind != SCHED_TOKEN && r->refill)
            submit(r);
    }
    do
        plan(r);
    while (sched_load(r->s).in_flight < 2 && r->refill);
    return now_ns() - start;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void bench(const char *what, uint32_t n, uint32_t waiting, uint64_t pages, struct load_shape shape,
                  uint64_t host_pages, double seconds, uint64_t *ns)
{
    struct run r = {.shape = shape, .refill = shape.new_hi < 10000};
    uint32_t context = shape.prompt_hi + shape.new_hi;
    struct sched_config cfg = {.max_slots = n,
                               .max_context = context,
                               .step_token_budget = n + 512,
                               .max_queued = 2 * n + waiting,
                               .max_queued_tokens = UINT64_MAX,
                               .depth = 2,
                               .kv = {.page_bytes = 2u << 20, .token_bytes = 128u << 10, .total_pages = pages}};
    struct status st = STATUS_INIT;
    if (sched_create(&r.s, &cfg, &st) != ST_OK || sched_attach(r.s, 0, n, context, &cfg.kv, &st) != ST_OK)
        die(&st);
    sched_set_suspension(r.s, host_pages, 0);
    r.prompt = calloc(shape.prompt_hi, sizeof *r.prompt);
    r.tokens = calloc(n, sizeof *r.tokens);
    for (uint32_t i = 0; i < n + waiting; i++)
        submit(&r);
    plan(&r);
    plan(&r);
    uint32_t warm = n / 4 + 1000;
    for (uint32_t i = 0; i < warm; i++)
        step(&r);
    struct sched_load before = sched_load(r.s);
    r.rows = 0;
    uint32_t k = 0;
    uint64_t end = now_ns() + (uint64_t)(seconds * 1e9), sum = 0;
    while (k < MAX_SAMPLES && (k < 1000 || now_ns() < end) && (r.refill || k + warm + 10 < shape.new_lo))
        sum += ns[k++] = step(&r);
    struct sched_load l = sched_load(r.s);
    qsort(ns, k, sizeof *ns, by_value);
    uint32_t middle = k / 2, worst = k - 1 - k / 100;
    double median = (double)ns[middle], p99 = (double)ns[worst];
    double tokens = (double)(l.generated_tokens - before.generated_tokens);
    printf("%-9s %6u %8u %10.2f %10.2f %10.2f %12.1f %11.2f %8.1f\n", what, n, k, median / 1e3, p99 / 1e3,
           (double)sum / k / 1e3, (double)sum / tokens, tokens / k,
           100.0 * (double)(l.recomputed_tokens - before.recomputed_tokens) / (double)r.rows);
    free(r.prompt);
    free(r.tokens);
    sched_destroy(r.s);
}

int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 1;
    uint64_t *ns = malloc(MAX_SAMPLES * sizeof *ns);
    if (!ns)
        return 1;
    printf("%-9s %6s %8s %10s %10s %10s %12s %11s %8s\n", "load", "slots", "steps", "median us", "p99 us", "mean us",
           "ns per token", "tokens/step", "% again");
    static const uint32_t sizes[] = {1, 64, 256, 1024};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        bench("steady", sizes[i], 0, 1u << 30, (struct load_shape){64, 128, 1000000, 1000000}, 0, seconds, ns);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        bench("churn", sizes[i], sizes[i], 1u << 30, (struct load_shape){64, 128, 16, 48}, 0, seconds, ns);
    for (int host = 0; host < 2; host++) {
        const char *what = host ? "suspend" : "pressure";
        bench(what, 256, 256, 5000, (struct load_shape){64, 1000, 16, 1000}, host ? 5000 : 0, seconds, ns);
        bench(what, 256, 256, 2000, (struct load_shape){16, 64, 256, 512}, host ? 2000 : 0, seconds, ns);
    }
    free(ns);
    return 0;
}
