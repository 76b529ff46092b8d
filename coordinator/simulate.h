/* simulate.h - the scheduler against a cost model, in virtual time: what a load would see of so many groups. Prefix simulate_.
 *
 * The scheduler is the server's own (scheduler.h), one for each group. A group's steps take what a file says of the model and
 * the machine, give or take noise; the schedulers do not see that file, they fit their own model from the times, as in a
 * server. Nothing is computed, so a token costs about 100 ns here and a day of a thousand GPUs is minutes.
 *
 *     arrivals (bench.h) ──▶ the group with the fewest prompt tokens to compute ──▶ sched_submit
 *     sched_plan ──▶ starts when the group's step before has ended, takes simulate_step_us ──▶ sched_result ──▶ times
 *
 * The same for the same load, configuration and seed. One thread. Virtual time starts at 0 and has no relation to a clock.
 */
#ifndef TANDEM_SIMULATE_H
#define TANDEM_SIMULATE_H

#include "coordinator/bench.h"
#include "coordinator/scheduler.h"

#define SIMULATE_MAX_GROUPS  65536
#define SIMULATE_MAX_TENANTS 64
#define SIMULATE_MAX_NAME    96

/* ---- what steps take ---- */

/* From a JSON file, all times in microseconds:
 *
 *     {"name": "Llama-3-8B, bf16, one H200",
 *      "max_context": 131072, "slots": 256,            of a request; requests at once
 *      "kv": {"token_bytes": 131072, "page_bytes": 2097152, "pages": 51200},     of the fullest rank
 *      "floor_us": 4420,                               no step is shorter: the weights are read
 *      "decode": {"fixed_us", "decode_us", "kv_us"},   steps of decodes alone: terms of cost.h
 *      "prefill": {"fixed_us", "row_us", "pair_us"},   of chunks alone
 *      "hybrid": {all five},                           of both; at least what the decodes alone take
 *      "noise": 0.02}                                  standard deviation of a step's time, relative; optional
 */
struct simulate_cost {
    char name[SIMULATE_MAX_NAME];
    uint32_t max_context, slots;
    struct kv_account kv;
    double floor_us, noise;
    struct cost_coef decode, prefill, hybrid;
};

/* name: for messages. INVALID_ARGUMENT: names the field and what was expected. */
STATUS_MUST_CHECK enum status_code simulate_cost_parse(struct simulate_cost *out, const char *name, const char *text,
                                                       size_t bytes, struct status *st);
STATUS_MUST_CHECK enum status_code simulate_cost_load(struct simulate_cost *out, const char *path, struct status *st);
/* Without noise. */
double simulate_step_us(const struct simulate_cost *c, const struct cost_step *step);

/* ---- a run ---- */

struct simulate_config {
    const struct simulate_cost *cost;
    uint32_t groups;
    enum sched_policy policy;
    uint32_t step_tokens, slots; /* slots 0: the file's */
    uint32_t depth;
    uint32_t max_queued; /* in all groups together */
    uint64_t max_queued_tokens;
    uint32_t max_queued_tenant; /* 0: no bound of its own */
    int64_t ttft_target_us, tbt_target_us;
    bool refuse_late;
    uint32_t age_us_per_token;
    uint32_t shared_prefix;                    /* tokens that all prompts begin with; over 0 the prefix cache is on */
    uint32_t n_tenants;                        /* 0: one */
    double tenant_share[SIMULATE_MAX_TENANTS]; /* of the requests; they add up to 1 */
    uint64_t seed;
};

/* Of one tenant, tokens of prompts and answers. */
struct simulate_tenant {
    uint32_t requests, refused;
    uint64_t demanded, served; /* served: while requests still arrived */
};

struct simulate_result {
    struct bench_result bench;
    struct simulate_tenant tenant[SIMULATE_MAX_TENANTS];
    double fairness; /* Jain's index of what tenants got over their max-min fair shares; 1 with one tenant */
    /* of all groups */
    uint64_t steps, hybrid_steps, chunk_rows, preemptions, recomputed_tokens, cached_tokens;
    double busy_s; /* steps that ran, added up */
    double longest_step_s;
    uint64_t peak_queued, peak_queued_tokens; /* of all groups at one time */
    uint64_t peak_pages;                      /* of one group */
};

/* Runs the load to its end. request: of bench_requests, filled in. r: zeroed, with bench.load, request, n and the targets of
 * goodput set; summed up afterwards. INVALID_ARGUMENT (what the scheduler refuses in its configuration, a request that can
 * never fit), RESOURCE_EXHAUSTED (memory), INTERNAL (a mistake of the scheduler's). */
STATUS_MUST_CHECK enum status_code simulate_run(struct simulate_result *r, struct bench_request *request,
                                                const struct simulate_config *cfg, struct status *st);

/* ---- reports; what bench.h prints comes first ---- */

const char *simulate_policy_name(enum sched_policy p);
void simulate_print_table(FILE *to, const struct simulate_result *r, const struct simulate_config *cfg);
/* One line for each policy; `head`: the line above them. */
void simulate_print_line(FILE *to, const struct simulate_result *r, const struct simulate_config *cfg, bool head);
void simulate_print_json(FILE *to, const struct simulate_result *r, const struct simulate_config *cfg);

#endif
