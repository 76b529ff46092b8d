#include "coordinator/metrics.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

/* vLLM's: TTFT and its kin in seconds, here microseconds. */
static const uint64_t time_bounds[] = {1000,     5000,     10000,    20000,     40000,     60000,     80000,   100000,
                                       250000,   500000,   750000,   1000000,   2500000,   5000000,   7500000, 10000000,
                                       20000000, 40000000, 80000000, 160000000, 640000000, 2560000000};
/* Steps and what the host adds to them are shorter. */
static const uint64_t step_bounds[] = {5,    10,   20,    50,    100,   200,   500,    1000,   2000,
                                       5000, 8000, 12000, 20000, 35000, 50000, 100000, 250000, 1000000};
static const uint64_t token_bounds[] = {1,    2,    5,    10,    20,    50,    100,    200,    500,
                                        1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000};

#define COUNT(a) (sizeof(a) / sizeof *(a))
_Static_assert(COUNT(time_bounds) <= METRICS_BUCKETS && COUNT(step_bounds) <= METRICS_BUCKETS &&
                   COUNT(token_bounds) <= METRICS_BUCKETS,
               "METRICS_BUCKETS");

enum metric_type { GAUGE, COUNTER, TIME, STEP_TIME, TOKENS };

static const struct metric {
    const char *name, *vllm, *help; /* vllm: its name there, NULL: it has none */
    enum metric_type type;
    size_t offset;
} metrics[] = {
#define M(field) offsetof(struct metrics, field)
    {"num_requests_running", "num_requests_running", "Requests that have a slot, or lost it to others for now.", GAUGE,
     M(running)},
    {"num_requests_waiting", "num_requests_waiting", "Requests that wait to be admitted.", GAUGE, M(waiting)},
    {"waiting_prompt_tokens", NULL, "Prompt tokens of those.", GAUGE, M(waiting_tokens)},
    {"kv_pages_used", NULL, "Pages of KV memory in use by running requests.", GAUGE, M(pages_used)},
    {"kv_pages_total", NULL, "Pages of KV memory.", GAUGE, M(pages_total)},
    {"kv_pages_shared", NULL, "Pages that several slots hold.", GAUGE, M(pages_shared)},
    {"kv_pages_kept", NULL, "Pages that hold prefixes for requests to come.", GAUGE, M(pages_kept)},
    {"kv_pages_suspended", NULL, "Pages of host memory that preempted requests wait in.", GAUGE, M(suspended_pages)},
    {"kv_pool_mapped_pages", NULL, "Pages of the ranks' KV pools, all ranks together, that slots hold.", GAUGE,
     M(pool_mapped)},
    {"kv_pool_fenced_pages", NULL, "Released, but a step in flight may read them.", GAUGE, M(pool_fenced)},
    {"kv_pool_free_pages", NULL, "Held by no slot.", GAUGE, M(pool_free)},
    {"kv_pool_parked_pages", NULL, "Of the free ones, those that are still mapped.", GAUGE, M(pool_parked)},
    {"kv_pool_shared_pages", NULL, "Of the mapped ones, those of two slots or more.", GAUGE, M(pool_shared)},
    {"kv_pool_given_pages", NULL, "Given back to the machine.", GAUGE, M(pool_given)},
    {"kv_pool_wasted_bytes", NULL, "Mapped behind the last token of a slot.", GAUGE, M(pool_wasted_bytes)},
    {"kv_pool_map_calls_total", NULL, "Calls that map, give access or unmap.", COUNTER, M(pool_map_calls)},
    {"kv_pool_clear_calls_total", NULL, "Calls that clear, copy, save or load.", COUNTER, M(pool_clear_calls)},
    {"kv_pool_driver_microseconds_total", NULL, "Time in those calls, on any thread.", COUNTER, M(pool_driver_us)},
    {"kv_pool_exposed_microseconds_total", NULL, "Time that steps waited for memory.", COUNTER, M(pool_exposed_us)},
    {"kv_pool_failed_ahead_total", NULL, "Calls ahead of time that failed and were made again.", COUNTER,
     M(pool_failed_ahead)},
    {"slots_total", NULL, "Requests that may run at once.", GAUGE, M(slots)},
    {"ranks", NULL, "Ranks that are attached.", GAUGE, M(ranks)},
    {"worker_groups_serving", NULL, "Worker groups that serve.", GAUGE, M(groups_serving)},
    {"ready", NULL, "1: requests are taken.", GAUGE, M(ready)},
    {"prompt_tokens_total", "prompt_tokens_total", "Prompt tokens computed or found, each request's once.", COUNTER,
     M(prompt_tokens)},
    {"generation_tokens_total", "generation_tokens_total", "Tokens generated.", COUNTER, M(generation_tokens)},
    {"num_preemptions_total", "num_preemptions_total", "Requests that lost their KV to memory pressure.", COUNTER,
     M(preemptions)},
    {"suspensions_total", NULL, "Those of them whose KV went to host memory.", COUNTER, M(suspensions)},
    {"recomputed_tokens_total", NULL, "Rows computed again because of that.", COUNTER, M(recomputed_tokens)},
    {"replays_total", NULL, "Requests that lost their worker group and went on, once for each time.", COUNTER,
     M(replays)},
    {"answers_within_targets_total", NULL,
     "Answers whose first token and mean time between tokens kept its targets or the server's: goodput.", COUNTER,
     M(within_targets)},
    {"wasted_rows_total", NULL, "Rows of requests that had ended one step before.", COUNTER, M(wasted_rows)},
    {"prefix_cache_queries_total", "prefix_cache_queries_total", "Prompt tokens looked up for a prefix that is there.",
     COUNTER, M(prompt_tokens)},
    {"prefix_cache_hits_total", "prefix_cache_hits_total", "Those of them that were found.", COUNTER, M(cached_tokens)},
    {"steps_total", NULL, "Steps planned.", COUNTER, M(steps)},
    {"worker_groups_total", NULL, "Worker groups that became ready.", COUNTER, M(groups)},
    {"worker_groups_lost_total", NULL, "Worker groups that were lost.", COUNTER, M(groups_lost)},
    {"requests_moved_total", NULL, "Answers that went on in another worker group.", COUNTER, M(moved)},
    {"requests_unclaimed", NULL, "Requests that go on, or are kept, without a client.", GAUGE, M(unclaimed)},
    {"attached_total", NULL, "Requests that were taken up again by Attach.", COUNTER, M(attached)},
    {"journal_degraded", NULL, "1: the journal could not be written and is tried again.", GAUGE, M(journal_degraded)},
    {"journal_requests", NULL, "Requests that the journal would bring back.", GAUGE, M(journal_requests)},
    {"journal_file_bytes", NULL, "Size of its newest file.", GAUGE, M(journal_file_bytes)},
    {"journal_errors_total", NULL, "Calls to the system that failed for it.", COUNTER, M(journal_errors)},
    {"journal_written_bytes_total", NULL, "What it has written.", COUNTER, M(journal_bytes)},
    {"journal_dropped_total", NULL, "Records that passed its bounds and were left out.", COUNTER, M(journal_dropped)},
    {"journal_syncs_total", NULL, "How often it was synced.", COUNTER, M(journal_syncs)},
    {"requests_recovered_total", NULL, "Requests that the journal brought at the start.", COUNTER, M(recovered)},
    {"http_requests_total", NULL, "Requests over HTTP that were to generate.", COUNTER, M(http_requests)},
    {"time_to_first_token_seconds", "time_to_first_token_seconds", "Arrival to first token.", TIME, M(first_token)},
    {"inter_token_latency_seconds", "inter_token_latency_seconds", "Token to next token.", TIME, M(inter_token)},
    {"e2e_request_latency_seconds", "e2e_request_latency_seconds", "Arrival to last token.", TIME, M(whole)},
    {"request_queue_time_seconds", "request_queue_time_seconds", "Arrival to first row.", TIME, M(queue)},
    {"request_prefill_time_seconds", "request_prefill_time_seconds", "First row to first token.", TIME, M(prefill)},
    {"request_decode_time_seconds", "request_decode_time_seconds", "First token to last.", TIME, M(decode)},
    {"step_time_seconds", NULL, "Computing time of a step on rank 0.", STEP_TIME, M(step)},
    {"host_overhead_seconds", NULL, "A result's arrival at the engine to the next plan on its way.", STEP_TIME,
     M(host)},
    {"request_prompt_tokens", "request_prompt_tokens", "Tokens of prompts.", TOKENS, M(prompt_length)},
    {"request_generation_tokens", "request_generation_tokens", "Tokens of answers.", TOKENS, M(generation_length)},
    {"iteration_tokens", "iteration_tokens_total", "Rows of a step, prefill and decode.", TOKENS, M(step_rows)},
    {"step_prefill_tokens", NULL, "Prefill rows of a step that has any: the chunk chosen.", TOKENS, M(step_chunk)},
#undef M
};

static void bounds_of(enum metric_type type, const uint64_t **bounds, size_t *n)
{
    *bounds = type == TIME ? time_bounds : type == STEP_TIME ? step_bounds : token_bounds;
    *n = type == TIME ? COUNT(time_bounds) : type == STEP_TIME ? COUNT(step_bounds) : COUNT(token_bounds);
}

size_t metrics_time_bounds(const uint64_t **bounds)
{
    *bounds = time_bounds;
    return COUNT(time_bounds);
}

static void observe(struct metrics_histogram *h, enum metric_type type, uint64_t v)
{
    const uint64_t *bounds;
    size_t low = 0, high;
    bounds_of(type, &bounds, &high);
    while (low < high) { /* the first bound that is not under v */
        size_t mid = (low + high) / 2;
        if (bounds[mid] < v)
            low = mid + 1;
        else
            high = mid;
    }
    metrics_add(&h->count[low], 1);
    metrics_add(&h->sum, v);
}

void metrics_time(struct metrics_histogram *h, int64_t us)
{
    observe(h, TIME, us > 0 ? (uint64_t)us : 0);
}

void metrics_step_time(struct metrics_histogram *h, int64_t us)
{
    observe(h, STEP_TIME, us > 0 ? (uint64_t)us : 0);
}

void metrics_tokens(struct metrics_histogram *h, uint64_t n)
{
    observe(h, TOKENS, n);
}

void metrics_error(struct metrics *m, enum status_code code)
{
    if ((unsigned)code < METRICS_CODES)
        atomic_fetch_add_explicit(&m->errors[code], 1, memory_order_relaxed);
}

/* ---- text ---- */

static unsigned long long get(const metrics_counter *c)
{
    return atomic_load_explicit(c, memory_order_relaxed);
}

static void head(struct json_text *t, const char *prefix, const char *name, const char *help, const char *type)
{
    json_text_format(t, "# HELP %s%s %s\n# TYPE %s%s %s\n", prefix, name, help, prefix, name, type);
}

static void histogram(struct json_text *t, const char *prefix, const char *name, const struct metrics_histogram *h,
                      enum metric_type type)
{
    const uint64_t *bounds;
    size_t n;
    unsigned long long all = 0;
    double unit = type == TOKENS ? 1 : 1e-6;
    bounds_of(type, &bounds, &n);
    for (size_t i = 0; i < n; i++) {
        all += get(&h->count[i]);
        json_text_format(t, "%s%s_bucket{le=\"%g\"} %llu\n", prefix, name, (double)bounds[i] * unit, all);
    }
    all += get(&h->count[n]);
    json_text_format(t, "%s%s_bucket{le=\"+Inf\"} %llu\n%s%s_sum %.17g\n%s%s_count %llu\n", prefix, name, all, prefix,
                     name, (double)get(&h->sum) * unit, prefix, name, all);
}

/* Those with a shape of their own. */
static void others(const struct metrics *m, const char *prefix, struct json_text *t)
{
    unsigned long long used = get(&m->pages_used), total = get(&m->pages_total);
    head(t, prefix, "kv_cache_usage_perc", "Part of the KV memory in use, 0 to 1.", "gauge");
    json_text_format(t, "%skv_cache_usage_perc %.6g\n", prefix, total ? (double)used / (double)total : 0.0);
    head(t, prefix, "request_success_total", "Answers that came to their end.", "counter");
    json_text_format(t, "%srequest_success_total{finished_reason=\"stop\"} %llu\n", prefix, get(&m->finished_stop));
    json_text_format(t, "%srequest_success_total{finished_reason=\"length\"} %llu\n", prefix, get(&m->finished_length));
}

static void own(const struct metrics *m, struct json_text *t)
{
    head(t, "tandem_", "request_errors_total", "Requests that ended with an error, by gRPC's code.", "counter");
    for (unsigned i = 1; i < METRICS_CODES; i++)
        json_text_format(t, "tandem_request_errors_total{code=\"%s\"} %llu\n", status_name((enum status_code)i),
                         get(&m->errors[i]));
    head(t, "tandem_", "build_info", "The version.", "gauge");
    json_text_format(t, "tandem_build_info{version=\"%s\"} 1\n", TANDEM_VERSION);
}

static void all_of(const struct metrics *m, const char *prefix, bool vllm, struct json_text *t)
{
    for (size_t i = 0; i < COUNT(metrics); i++) {
        const struct metric *x = &metrics[i];
        const char *name = vllm ? x->vllm : x->name;
        const void *at = (const char *)m + x->offset;
        if (!name)
            continue;
        head(t, prefix, name, x->help, x->type == GAUGE ? "gauge" : x->type == COUNTER ? "counter" : "histogram");
        if (x->type == GAUGE || x->type == COUNTER)
            json_text_format(t, "%s%s %llu\n", prefix, name, get(at));
        else
            histogram(t, prefix, name, at, x->type);
    }
    others(m, prefix, t);
}

void metrics_render(const struct metrics *m, bool vllm_names, struct json_text *out)
{
    all_of(m, "tandem_", false, out);
    own(m, out);
    if (vllm_names)
        all_of(m, "vllm:", true, out);
}
