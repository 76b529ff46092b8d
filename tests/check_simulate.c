/* check_simulate.c - the scheduler in virtual time (simulate.h): the same again, nothing lost, and what the policies come to. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/simulate.h"

/* Eight billion parameters on one H200. */
static const struct simulate_cost cost = {
    .name = "m",
    .max_context = 131072,
    .slots = 256,
    .kv = {.token_bytes = 131072, .page_bytes = 2097152, .total_pages = 51200},
    .floor_us = 4420,
    .noise = 0.02,
    .decode = {.fixed_us = 4661, .decode_us = 11.06, .kv_us = 0.0324},
    .prefill = {.fixed_us = 139, .row_us = 22.33, .pair_us = 0.00098},
    .hybrid = {.fixed_us = 948, .decode_us = 22.33, .kv_us = 0.0341, .row_us = 22.33, .pair_us = 0.000395},
};

static struct simulate_config config(enum sched_policy policy)
{
    return (struct simulate_config){.cost = &cost,
                                    .groups = 1,
                                    .policy = policy,
                                    .step_tokens = policy == SCHED_TARGETS ? 8192 : 1536,
                                    .depth = 2,
                                    .max_queued = 100000,
                                    .max_queued_tokens = 1000000000,
                                    .tbt_target_us = 100000,
                                    .seed = 7};
}

static struct bench_load load_of(double rate, uint32_t requests)
{
    return (struct bench_load){.mode = BENCH_RATE,
                               .rate = rate,
                               .requests = requests,
                               .prompt = {BENCH_LOG_NORMAL, 4096, 32768, 10500, 0.5},
                               .output = {BENCH_LOG_NORMAL, 16, 4096, 331, 1},
                               .max_tokens = cost.max_context,
                               .seed = 7};
}

/* free() both; request is r->bench.request. */
static struct simulate_result *run(const struct bench_load *load, const struct simulate_config *cfg)
{
    struct simulate_result *r = calloc(1, sizeof *r);
    struct bench_request *request;
    struct status st = STATUS_INIT;
    ck_assert(r && bench_requests(&request, &r->bench.n, load, &st) == ST_OK);
    r->bench.load = load;
    r->bench.request = request;
    r->bench.slo_ttft_s = 10;
    r->bench.slo_tbt_s = 0.15;
    r->bench.slo_stall_s = 0.2;
    ck_assert_msg(simulate_run(r, request, cfg, &st) == ST_OK, "%s", st.message);
    return r;
}

static void drop(struct simulate_result *r)
{
    free((void *)r->bench.request);
    free(r);
}

START_TEST(a_step_takes_what_its_kind_says)
{
    const struct cost_step one = {.decodes = 1, .context = 1}, decodes = {.decodes = 64, .context = 262144},
                           chunk = {.rows = 2048, .pairs = cost_pairs(0, 2048)},
                           both = {.decodes = 64, .context = 262144, .rows = 1024, .pairs = cost_pairs(0, 1024)},
                           little = {.decodes = 64, .context = 262144, .rows = 1};
    ck_assert_double_eq_tol(simulate_step_us(&cost, &one), 4672, 1);
    ck_assert_double_eq_tol(simulate_step_us(&cost, &decodes), 4661 + 64 * 11.06 + 262144 * 0.0324, 1);
    ck_assert_double_eq_tol(simulate_step_us(&cost, &chunk), 139 + 2048 * 22.33 + 0.00098 * 2048 * 2049 / 2, 1);
    ck_assert_double_eq_tol(simulate_step_us(&cost, &both),
                            948 + 1088 * 22.33 + 262144 * 0.0341 + 0.000395 * 1024 * 1025 / 2, 1);
    ck_assert_double_ge(simulate_step_us(&cost, &little), simulate_step_us(&cost, &decodes));
    ck_assert_double_eq(simulate_step_us(&cost, &(struct cost_step){.rows = 1}), 4420);
}
END_TEST

START_TEST(the_same_seed_gives_the_same_times_and_another_others)
{
    struct bench_load load = load_of(2, 200);
    struct simulate_config cfg = config(SCHED_TARGETS), other = cfg;
    other.seed = 8;
    struct simulate_result *a = run(&load, &cfg), *b = run(&load, &cfg), *c = run(&load, &other);
    ck_assert_mem_eq(a->bench.request, b->bench.request, a->bench.n * sizeof *a->bench.request);
    ck_assert(a->steps == b->steps && a->busy_s == b->busy_s);
    ck_assert(a->busy_s != c->busy_s);
    drop(a);
    drop(b);
    drop(c);
}
END_TEST

START_TEST(all_tokens_come_whatever_the_policy_and_the_groups)
{
    struct bench_load load = load_of(6, 300);
    struct simulate_config cfg = config((enum sched_policy)_i);
    cfg.groups = 3;
    cfg.shared_prefix = _i == SCHED_TARGETS ? 2048 : 0;
    struct simulate_result *r = run(&load, &cfg);
    uint64_t prompts = 0;
    ck_assert_uint_eq(r->bench.done, 300);
    for (uint32_t i = 0; i < r->bench.n; i++) {
        const struct bench_request *q = &r->bench.request[i];
        prompts += q->prompt_tokens;
        ck_assert_uint_eq(q->tokens, q->output_tokens);
        ck_assert(q->first_s > q->due_s && q->end_s >= q->first_s);
    }
    ck_assert_uint_eq(r->chunk_rows + r->cached_tokens, prompts + r->recomputed_tokens);
    ck_assert(cfg.shared_prefix == 0 || r->cached_tokens > 200 * 2048);
    ck_assert_double_le(r->busy_s, r->bench.duration_s * cfg.groups + 1e-3);
    drop(r);
}
END_TEST

/* The load that the server can just bear: coordinator/SIMULATE.md has it in full. */
START_TEST(targets_beat_fixed_chunks_and_prefill_first)
{
    struct bench_load load = load_of(2.4, 1500);
    struct simulate_result *r[3];
    for (int p = 0; p < 3; p++) {
        struct simulate_config cfg = config((enum sched_policy)p);
        r[p] = run(&load, &cfg);
    }
    ck_assert_uint_gt(r[SCHED_TARGETS]->bench.good, r[SCHED_CHUNKED]->bench.good);
    ck_assert_uint_gt(r[SCHED_TARGETS]->bench.good, r[SCHED_PREFILL_FIRST]->bench.good);
    ck_assert_uint_eq(r[SCHED_TARGETS]->bench.stalled_200ms, 0);
    ck_assert_double_le(bench_quantile(&r[SCHED_TARGETS]->bench.gap, 0.99), 0.1);
    ck_assert_double_lt(bench_quantile(&r[SCHED_TARGETS]->bench.ttft, 0.99),
                        bench_quantile(&r[SCHED_CHUNKED]->bench.ttft, 0.99));
    ck_assert_uint_gt(r[SCHED_PREFILL_FIRST]->bench.stalled_500ms, 1000);
    for (int p = 0; p < 3; p++)
        drop(r[p]);
}
END_TEST

/* Steps of one kind for a long time must not leave a model in which nobody else may run. */
START_TEST(a_light_load_does_not_spoil_the_cost_model)
{
    struct bench_load load = load_of(_i ? 2 : 1.1, 700);
    struct simulate_config cfg = config(SCHED_TARGETS);
    cfg.step_tokens = 1536;
    load.seed = cfg.seed = 1;
    struct simulate_result *r = run(&load, &cfg);
    ck_assert_double_lt(bench_quantile(&r->bench.ttft, 0.99), 10);
    ck_assert_uint_eq(r->bench.stalled_200ms, 0);
    drop(r);
}
END_TEST

START_TEST(at_three_times_the_load_accepted_requests_keep_their_targets)
{
    struct bench_load load = load_of(7.4, 7.4 * 600);
    struct simulate_config cfg = config(SCHED_TARGETS);
    cfg.refuse_late = true;
    cfg.ttft_target_us = 10000000;
    cfg.age_us_per_token = 200;
    cfg.n_tenants = 2;
    cfg.tenant_share[0] = 0.8;
    cfg.tenant_share[1] = 0.2;
    struct simulate_result *r = run(&load, &cfg);
    ck_assert_double_ge(r->fairness, 0.95);
    ck_assert_double_ge(r->bench.good, 0.95 * r->bench.done);
    ck_assert_uint_gt(r->bench.done, 1500);
    ck_assert_uint_eq(r->bench.done + r->tenant[0].refused + r->tenant[1].refused, r->bench.n);
    ck_assert_uint_lt(r->peak_queued, 100);
    ck_assert_uint_eq(r->bench.stalled_500ms, 0);
    drop(r);
}
END_TEST

/* A queue that one tenant fills is closed to the other, unless each has a bound of its own. */
START_TEST(a_greedy_tenant_does_not_fill_the_queue_of_several_groups)
{
    struct bench_load load = load_of(4 * 7.4, 4 * 7.4 * 60);
    struct simulate_config cfg = config(SCHED_TARGETS);
    cfg.groups = 4;
    cfg.max_queued = 64;
    cfg.n_tenants = 2;
    cfg.tenant_share[0] = 0.8;
    cfg.tenant_share[1] = 0.2;
    struct simulate_result *open = run(&load, &cfg);
    cfg.max_queued_tenant = 32;
    struct simulate_result *bound = run(&load, &cfg);
    ck_assert_double_lt(open->fairness, 0.9);
    ck_assert_double_ge(bound->fairness, 0.95);
    ck_assert_uint_le(bound->peak_queued, 64);
    drop(open);
    drop(bound);
}
END_TEST

#define GOOD                                                                                                           \
    "{\"name\": \"m\", \"max_context\": 4096, \"slots\": 8,"                                                           \
    "\"kv\": {\"token_bytes\": 1024, \"page_bytes\": 65536, \"pages\": 100}, \"floor_us\": 10,"                        \
    "\"decode\": {\"fixed_us\": 1, \"decode_us\": 2, \"kv_us\": 0.5},"                                                 \
    "\"prefill\": {\"fixed_us\": 1, \"row_us\": 2, \"pair_us\": 0.1},"                                                 \
    "\"hybrid\": {\"fixed_us\": 1, \"decode_us\": 2, \"kv_us\": 0.5, \"row_us\": 3, \"pair_us\": 0.2}"

START_TEST(what_is_wrong_in_a_cost_file_is_named)
{
    static const struct {
        const char *from, *to, *message;
    } cases[] = {
        {"\"slots\": 8", "\"slots\": 0", "c: slots: expected a whole number from 1 to 65536"},
        {"\"slots\": 8", "\"slot\": 8", "c: slot: unknown"},
        {"\"pages\": 100", "\"pages\": 1.5", "c: kv.pages: expected"},
        {"\"row_us\": 2,", "", "c: prefill.row_us: expected a number"},
        {"\"row_us\": 3", "\"row_us\": -3", "c: hybrid.row_us: expected a number from 0"},
        {"\"kv_us\": 0.5}", "\"kv_us\": 0.5, \"row_us\": 1}", "c: decode.row_us: unknown"},
        {"\"name\": \"m\"", "\"name\": 7", "c: name: expected a text"},
        {"\"floor_us\": 10", "\"floor_us\": 10, \"noise\": 2", "c: noise: expected a number from 0 to 1"},
        {"\"max_context\"", "max_context", "c:1: "},
    };
    struct simulate_cost c;
    struct status st = STATUS_INIT;
    ck_assert(simulate_cost_parse(&c, "c", GOOD "}", strlen(GOOD "}"), &st) == ST_OK);
    ck_assert(c.slots == 8 && c.kv.total_pages == 100 && c.hybrid.row_us == 3 && c.noise == 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[1024];
        const char *at = strstr(GOOD, cases[i].from);
        ck_assert(at != NULL);
        snprintf(text, sizeof text, "%.*s%s%s}", (int)(at - GOOD), GOOD, cases[i].to, at + strlen(cases[i].from));
        ck_assert(simulate_cost_parse(&c, "c", text, strlen(text), &st) == ST_INVALID_ARGUMENT);
        ck_assert_msg(strncmp(st.message, cases[i].message, strlen(cases[i].message)) == 0, "%s", st.message);
    }
}
END_TEST

START_TEST(what_can_never_fit_ends_the_run)
{
    struct bench_load load = load_of(1, 3);
    struct simulate_cost small = cost;
    struct simulate_config cfg = config(SCHED_CHUNKED);
    struct simulate_result *r = calloc(1, sizeof *r);
    struct bench_request *request;
    struct status st = STATUS_INIT;
    small.kv.total_pages = 10;
    cfg.cost = &small;
    ck_assert(r && bench_requests(&request, &r->bench.n, &load, &st) == ST_OK);
    r->bench.request = request;
    r->bench.load = &load;
    ck_assert(simulate_run(r, request, &cfg, &st) == ST_INVALID_ARGUMENT);
    ck_assert_msg(strstr(st.message, "request 0: ") != NULL, "%s", st.message);
    drop(r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("simulate");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits");
    tcase_set_timeout(core, 240);
    tcase_add_test(core, a_step_takes_what_its_kind_says);
    tcase_add_test(core, the_same_seed_gives_the_same_times_and_another_others);
    tcase_add_loop_test(core, all_tokens_come_whatever_the_policy_and_the_groups, 0, 3);
    tcase_add_test(core, targets_beat_fixed_chunks_and_prefill_first);
    tcase_add_loop_test(core, a_light_load_does_not_spoil_the_cost_model, 0, 2);
    tcase_add_test(core, at_three_times_the_load_accepted_requests_keep_their_targets);
    tcase_add_test(core, a_greedy_tenant_does_not_fill_the_queue_of_several_groups);
    tcase_add_test(limits, what_is_wrong_in_a_cost_file_is_named);
    tcase_add_test(limits, what_can_never_fit_ends_the_run);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
