/* bench_report.c - results as a table and as JSON. */
#include <math.h>
#include <string.h>

#include "coordinator/bench.h"

static const struct {
    const char *name;
    double q;
} quantiles[] = {{"p50", 0.5}, {"p90", 0.9}, {"p95", 0.95}, {"p99", 0.99}, {"p999", 0.999}};
#define N_QUANTILES (sizeof quantiles / sizeof *quantiles)

static const char *const mode_names[] = {"offline", "rate", "concurrency", "trace"};

static double per_second(const struct bench_result *r, double what)
{
    return r->duration_s > 0 ? what / r->duration_s : 0;
}

static void print_row(FILE *to, const char *name, const struct bench_histogram *h)
{
    fprintf(to, "%-24s %10.2f", name, h->n ? h->sum_s / (double)h->n * 1e3 : 0);
    for (size_t i = 0; i < N_QUANTILES; i++)
        fprintf(to, " %10.2f", bench_quantile(h, quantiles[i].q) * 1e3);
    fprintf(to, " %10.2f\n", h->max_s * 1e3);
}

void bench_print_table(FILE *to, const struct bench_result *r)
{
    fprintf(to, "requests                 %u done, %u failed, in %.2f s\n", r->done, r->failed, r->duration_s);
    fprintf(to, "tokens                   %llu of prompts, %llu of answers\n", (unsigned long long)r->prompt_tokens,
            (unsigned long long)r->output_tokens);
    fprintf(to, "throughput               %.2f requests/s, %.1f answer tokens/s, %.1f tokens/s in all\n",
            per_second(r, r->done), per_second(r, (double)r->output_tokens),
            per_second(r, (double)(r->output_tokens + r->prompt_tokens)));
    if (r->slo_ttft_s > 0 || r->slo_tbt_s > 0 || r->slo_stall_s > 0) {
        uint32_t all = r->done + r->failed;
        fprintf(to, "goodput                  %.2f requests/s: %u of %u (%.1f %%)", per_second(r, r->good), r->good,
                all, 100.0 * r->good / (all ? all : 1));
        if (r->slo_ttft_s > 0)
            fprintf(to, ", first token within %g ms", r->slo_ttft_s * 1e3);
        if (r->slo_tbt_s > 0)
            fprintf(to, ", each further one within %g ms on average", r->slo_tbt_s * 1e3);
        if (r->slo_stall_s > 0)
            fprintf(to, ", no pause over %g ms", r->slo_stall_s * 1e3);
        putc('\n', to);
    }
    fprintf(to, "stalled                  %u answers with a pause over 200 ms, %u over 500 ms\n", r->stalled_200ms,
            r->stalled_500ms);
    if (r->load->mode == BENCH_RATE || r->load->mode == BENCH_TRACE)
        fprintf(to, "sent late by             %.2f ms at most (it counts in the times below)\n", r->late_s * 1e3);
    fprintf(to, "\n%-24s %10s", "milliseconds", "mean");
    for (size_t i = 0; i < N_QUANTILES; i++)
        fprintf(to, " %10s", quantiles[i].name);
    fprintf(to, " %10s\n", "max");
    print_row(to, "first token (TTFT)", &r->ttft);
    print_row(to, "between messages (TBT)", &r->gap);
    print_row(to, "per token (TPOT)", &r->per_token);
    print_row(to, "whole answer", &r->latency);
}

static void json_text(FILE *to, const char *s)
{
    putc('"', to);
    for (; *s; s++) {
        if (*s == '"' || *s == '\\')
            fprintf(to, "\\%c", *s);
        else if ((unsigned char)*s < 0x20)
            fprintf(to, "\\u%04x", (unsigned)*s);
        else
            putc(*s, to);
    }
    putc('"', to);
}

static void json_histogram(FILE *to, const char *name, const struct bench_histogram *h)
{
    fprintf(to, ",\n  \"%s\": {\"count\": %llu, \"mean\": %.6f", name, (unsigned long long)h->n,
            h->n ? h->sum_s / (double)h->n : 0);
    for (size_t i = 0; i < N_QUANTILES; i++)
        fprintf(to, ", \"%s\": %.6f", quantiles[i].name, bench_quantile(h, quantiles[i].q));
    fprintf(to, ", \"max\": %.6f}", h->max_s);
}

static void json_codes(FILE *to, const struct bench_result *r)
{
    uint32_t count[256] = {0};
    const char *comma = "";
    for (uint32_t i = 0; i < r->n; i++)
        if (r->request[i].sent_s >= 0)
            count[r->request[i].code]++;
    fputs(",\n  \"codes\": {", to);
    for (unsigned c = 0; c < 256; c++)
        if (count[c]) {
            fprintf(to, "%s\"%s\": %u", comma, status_name((enum status_code)c), count[c]);
            comma = ", ";
        }
    fputs("}", to);
}

void bench_print_json(FILE *to, const struct bench_result *r, const char *model)
{
    const struct bench_load *l = r->load;
    fputs("{\n  \"model\": ", to);
    json_text(to, model);
    fprintf(
        to,
        ",\n  \"mode\": \"%s\", \"rate\": %g, \"concurrency\": %u, \"seed\": %llu,\n  \"requests\": %u, \"done\": %u, "
        "\"failed\": %u, \"duration_s\": %.6f,\n  \"prompt_tokens\": %llu, \"output_tokens\": %llu,\n"
        "  \"requests_per_s\": %.4f, \"output_tokens_per_s\": %.2f, \"tokens_per_s\": %.2f,\n"
        "  \"slo_ttft_s\": %g, \"slo_tbt_s\": %g, \"slo_stall_s\": %g, \"stalled_200ms\": %u, \"stalled_500ms\": %u,\n "
        " \"good\": %u, \"goodput_requests_per_s\": %.4f, \"sent_late_s\": "
        "%.6f",
        mode_names[l->mode], l->mode == BENCH_RATE ? l->rate : 0, l->mode == BENCH_CONCURRENCY ? l->concurrency : 0,
        (unsigned long long)l->seed, r->n, r->done, r->failed, r->duration_s, (unsigned long long)r->prompt_tokens,
        (unsigned long long)r->output_tokens, per_second(r, r->done), per_second(r, (double)r->output_tokens),
        per_second(r, (double)(r->output_tokens + r->prompt_tokens)), r->slo_ttft_s, r->slo_tbt_s, r->slo_stall_s,
        r->stalled_200ms, r->stalled_500ms, r->good, per_second(r, r->good), r->late_s);
    json_codes(to, r);
    json_histogram(to, "ttft_s", &r->ttft);
    json_histogram(to, "tbt_s", &r->gap);
    json_histogram(to, "tpot_s", &r->per_token);
    json_histogram(to, "latency_s", &r->latency);
    fprintf(to, ",\n  \"slice_s\": %g, \"output_tokens_of_slice\": [", r->slice_s);
    uint32_t last = BENCH_SLICES;
    while (last > 1 && r->tokens_of_slice[last - 1] == 0)
        last--;
    for (uint32_t i = 0; i < last; i++)
        fprintf(to, "%s%llu", i ? ", " : "", (unsigned long long)r->tokens_of_slice[i]);
    fputs("]\n}\n", to);
}
