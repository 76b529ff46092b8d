/* metrics.h - what the coordinator counts, and its text for Prometheus. Prefix metrics_.
 *
 * The engine writes almost all of it, alone: a relaxed load, an addition, a relaxed store, no bus lock. Others may read at any
 * time; a scrape sees each number as it was at some moment of its own. Where several threads count it says so.
 *
 * Semantics, buckets and units are those of vLLM's metrics, which dashboards and autoscalers know: "/metrics?names=vllm" gives
 * those that have a twin there under vLLM's names as well.
 */
#ifndef TANDEM_METRICS_H
#define TANDEM_METRICS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "coordinator/json_text.h"
#include "proto/status.h"

#define METRICS_BUCKETS 24 /* at most, without +Inf */
#define METRICS_CODES   17 /* enum status_code */

typedef atomic_uint_least64_t metrics_counter;

struct metrics_histogram {
    metrics_counter count[METRICS_BUCKETS + 1]; /* the last one: over all bounds */
    metrics_counter sum;
};

struct metrics {
    /* gauges */
    metrics_counter running, waiting, waiting_tokens;
    metrics_counter pages_used, pages_total, pages_shared, pages_kept, suspended_pages;
    metrics_counter slots, ranks, groups_serving, ready;
    /* of the ranks' KV pools, copied; the last five are counters, times in microseconds */
    metrics_counter pool_mapped, pool_fenced, pool_free, pool_parked, pool_shared, pool_given, pool_wasted_bytes;
    metrics_counter pool_map_calls, pool_clear_calls, pool_driver_us, pool_exposed_us, pool_failed_ahead;
    metrics_counter unclaimed, journal_degraded, journal_file_bytes, journal_requests;
    /* counters of the scheduler, copied */
    metrics_counter steps, prompt_tokens, generation_tokens, preemptions, suspensions, recomputed_tokens, wasted_rows,
        cached_tokens;
    /* counters */
    metrics_counter replays;                                                       /* copied, too */
    metrics_counter journal_errors, journal_bytes, journal_dropped, journal_syncs; /* the same, of the journal */
    metrics_counter attached, recovered;
    metrics_counter within_targets, finished_stop, finished_length, groups, groups_lost, moved;
    metrics_counter errors[METRICS_CODES]; /* several threads */
    metrics_counter http_requests;
    /* times in microseconds */
    struct metrics_histogram first_token, inter_token, whole, queue, prefill, decode, step, host;
    /* tokens */
    struct metrics_histogram prompt_length, generation_length, step_rows, step_chunk;
};

static inline void metrics_add(metrics_counter *c, uint64_t n)
{
    atomic_store_explicit(c, atomic_load_explicit(c, memory_order_relaxed) + n, memory_order_relaxed);
}

static inline void metrics_set(metrics_counter *c, uint64_t v)
{
    atomic_store_explicit(c, v, memory_order_relaxed);
}

void metrics_time(struct metrics_histogram *h, int64_t us);      /* less than 0 counts as 0 */
void metrics_step_time(struct metrics_histogram *h, int64_t us); /* finer, for what takes no second */
void metrics_tokens(struct metrics_histogram *h, uint64_t n);
/* Upper bounds of the buckets of metrics_time, in microseconds; returns how many. */
size_t metrics_time_bounds(const uint64_t **bounds);
/* Any thread. */
void metrics_error(struct metrics *m, enum status_code code);
void metrics_render(const struct metrics *m, bool vllm_names, struct json_text *out);

#endif
