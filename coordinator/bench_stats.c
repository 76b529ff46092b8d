/* bench_stats.c - times in bins, and what they sum up to. */
#include <math.h>

#include "coordinator/bench.h"

#define BIN_FIRST_S 1e-6
#define BIN_STEP    1.005

static uint32_t bin_of(double seconds)
{
    if (!(seconds > BIN_FIRST_S))
        return 0;
    double b = ceil(log(seconds / BIN_FIRST_S) / log(BIN_STEP) - 1e-9);
    return b < BENCH_BINS - 1 ? (uint32_t)b : BENCH_BINS - 1;
}

void bench_add(struct bench_histogram *h, double seconds, uint64_t times)
{
    if (times == 0)
        return;
    h->count[bin_of(seconds)] += times;
    h->n += times;
    h->sum_s += seconds * (double)times;
    if (seconds > h->max_s)
        h->max_s = seconds;
}

double bench_quantile(const struct bench_histogram *h, double q)
{
    uint64_t below = 0, wanted = (uint64_t)ceil(q * (double)h->n);
    if (h->n == 0)
        return 0;
    if (wanted < 1)
        wanted = 1;
    for (uint32_t b = 0; b < BENCH_BINS; b++)
        if ((below += h->count[b]) >= wanted) {
            double edge = BIN_FIRST_S * pow(BIN_STEP, b);
            return edge < h->max_s ? edge : h->max_s;
        }
    return h->max_s;
}

void bench_note_tokens(struct bench_result *r, double at_s, uint32_t tokens)
{
    while (at_s >= r->slice_s * BENCH_SLICES) { /* two become one */
        for (uint32_t i = 0; i < BENCH_SLICES; i++)
            r->tokens_of_slice[i] =
                i < BENCH_SLICES / 2 ? r->tokens_of_slice[2 * i] + r->tokens_of_slice[2 * i + 1] : 0;
        r->slice_s *= 2;
    }
    r->tokens_of_slice[at_s > 0 ? (uint32_t)(at_s / r->slice_s) : 0] += tokens;
}

static void sum_up_one(struct bench_result *r, const struct bench_request *q)
{
    double per_token = q->tokens > 1 ? (q->end_s - q->first_s) / (q->tokens - 1) : 0;
    r->done++;
    r->prompt_tokens += q->prompt_tokens;
    r->output_tokens += q->tokens;
    bench_add(&r->ttft, q->first_s - q->due_s, 1);
    bench_add(&r->latency, q->end_s - q->due_s, 1);
    r->stalled_200ms += q->stall_s > 0.2;
    r->stalled_500ms += q->stall_s > 0.5;
    if (q->tokens > 1)
        bench_add(&r->per_token, per_token, 1);
    if ((r->slo_ttft_s == 0 || q->first_s - q->due_s <= r->slo_ttft_s) &&
        (r->slo_tbt_s == 0 || per_token <= r->slo_tbt_s) && (r->slo_stall_s == 0 || q->stall_s <= r->slo_stall_s))
        r->good++;
}

void bench_sum_up(struct bench_result *r)
{
    double first = INFINITY, last = 0;
    for (uint32_t i = 0; i < r->n; i++) {
        const struct bench_request *q = &r->request[i];
        if (q->sent_s < 0)
            continue; /* interrupted before */
        first = fmin(first, q->due_s);
        last = fmax(last, q->end_s);
        r->late_s = fmax(r->late_s, q->sent_s - q->due_s);
        if (q->code == ST_OK && q->first_s >= 0 && q->end_s >= 0)
            sum_up_one(r, q);
        else
            r->failed++;
    }
    r->duration_s = last > first ? last - first : 0;
}
