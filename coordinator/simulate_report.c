/* simulate_report.c - a simulation as tables and JSON. */
#include <math.h>

#include "coordinator/simulate.h"

const char *simulate_policy_name(enum sched_policy p)
{
    static const char *const names[] = {"chunked", "targets", "prefill-first"};
    return names[p];
}

static double part(double a, double b)
{
    return b > 0 ? a / b : 0;
}

static uint32_t n_tenants(const struct simulate_config *cfg)
{
    return cfg->n_tenants ? cfg->n_tenants : 1;
}

void simulate_print_table(FILE *to, const struct simulate_result *r, const struct simulate_config *cfg)
{
    fprintf(to, "model                    %s, %u group%s, policy %s, steps of at most %u tokens\n", cfg->cost->name,
            cfg->groups, cfg->groups == 1 ? "" : "s", simulate_policy_name(cfg->policy), cfg->step_tokens);
    bench_print_table(to, &r->bench);
    fprintf(
        to,
        "\nsteps                    %llu, %.1f %% with decodes and chunks; %.2f ms in the mean, %.2f at most; groups "
        "busy %.1f %%\n",
        (unsigned long long)r->steps, 100 * part((double)r->hybrid_steps, (double)r->steps),
        1e3 * part(r->busy_s, (double)r->steps), 1e3 * r->longest_step_s,
        100 * part(r->busy_s, r->bench.duration_s * cfg->groups));
    fprintf(to, "memory                   %llu of %llu pages at most in a group, %llu preemptions, %llu tokens again\n",
            (unsigned long long)r->peak_pages, (unsigned long long)cfg->cost->kv.total_pages,
            (unsigned long long)r->preemptions, (unsigned long long)r->recomputed_tokens);
    fprintf(to, "queue                    %llu requests of %llu tokens at most\n", (unsigned long long)r->peak_queued,
            (unsigned long long)r->peak_queued_tokens);
    if (cfg->shared_prefix)
        fprintf(to, "prefix cache             %llu tokens were there\n", (unsigned long long)r->cached_tokens);
    if (n_tenants(cfg) == 1)
        return;
    fprintf(to, "fairness                 %.4f (Jain's index of tokens over max-min fair shares)\n", r->fairness);
    for (uint32_t i = 0; i < n_tenants(cfg); i++)
        fprintf(to, "  tenant %-15u %u requests, %u refused, %llu tokens asked for, %llu served\n", i,
                r->tenant[i].requests, r->tenant[i].refused, (unsigned long long)r->tenant[i].demanded,
                (unsigned long long)r->tenant[i].served);
}

void simulate_print_line(FILE *to, const struct simulate_result *r, const struct simulate_config *cfg, bool head)
{
    const struct bench_result *b = &r->bench;
    if (head)
        fprintf(to, "%-14s %17s %17s %19s %15s %9s\n", "", "TTFT s p50/p99", "TBT s p50/p99", "answer s p50/p99",
                "% over .2/.5 s", "goodput/s");
    fprintf(to, "%-14s %8.2f %8.2f %8.3f %8.3f %9.2f %9.2f %7.2f %7.2f %9.3f\n", simulate_policy_name(cfg->policy),
            bench_quantile(&b->ttft, 0.5), bench_quantile(&b->ttft, 0.99), bench_quantile(&b->gap, 0.5),
            bench_quantile(&b->gap, 0.99), bench_quantile(&b->latency, 0.5), bench_quantile(&b->latency, 0.99),
            100 * part(b->stalled_200ms, b->done), 100 * part(b->stalled_500ms, b->done), part(b->good, b->duration_s));
}

void simulate_print_json(FILE *to, const struct simulate_result *r, const struct simulate_config *cfg)
{
    fprintf(to, "{\"policy\": \"%s\", \"groups\": %u, \"step_tokens\": %u,\n \"tbt_target_us\": %lld, ",
            simulate_policy_name(cfg->policy), cfg->groups, cfg->step_tokens, (long long)cfg->tbt_target_us);
    fprintf(to,
            "\"ttft_target_us\": %lld, \"age_us_per_token\": %u,\n \"steps\": %llu, \"hybrid_steps\": %llu, "
            "\"chunk_rows\": %llu, \"busy_s\": %.6f, \"longest_step_s\": %.6f,\n \"preemptions\": %llu, "
            "\"recomputed_tokens\": %llu, \"cached_tokens\": %llu,\n \"peak_queued\": %llu, \"peak_queued_tokens\": "
            "%llu, \"peak_pages\": %llu,\n \"fairness\": %.6f, \"tenants\": [",
            (long long)cfg->ttft_target_us, cfg->age_us_per_token, (unsigned long long)r->steps,
            (unsigned long long)r->hybrid_steps, (unsigned long long)r->chunk_rows, r->busy_s, r->longest_step_s,
            (unsigned long long)r->preemptions, (unsigned long long)r->recomputed_tokens,
            (unsigned long long)r->cached_tokens, (unsigned long long)r->peak_queued,
            (unsigned long long)r->peak_queued_tokens, (unsigned long long)r->peak_pages, r->fairness);
    for (uint32_t i = 0; i < n_tenants(cfg); i++)
        fprintf(to, "%s{\"requests\": %u, \"refused\": %u, \"demanded\": %llu, \"served\": %llu}", i ? ", " : "",
                r->tenant[i].requests, r->tenant[i].refused, (unsigned long long)r->tenant[i].demanded,
                (unsigned long long)r->tenant[i].served);
    fputs("],\n \"load\": ", to);
    bench_print_json(to, &r->bench, cfg->cost->name);
    fputs("}\n", to);
}
