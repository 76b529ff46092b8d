/* check_scheduler_limits.c - the scheduler at its bounds, with wrong calls, without memory, and with damaged state. */
#include <check.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/scheduler_internal.h"
#include "tests/check_scheduler.h"

/* ---- limits ---- */

START_TEST(configuration_out_of_range_is_refused_by_name)
{
    const struct {
        const char *field;
        struct sched_config cfg;
    } bad[] = {
        {"max_slots", config(0, 16, 2)}, {"max_slots", config(65537, 16, 2)}, {"step_token_budget", config(4, 0, 2)},
        {"depth", config(4, 16, 0)},     {"depth", config(4, 16, 3)},
    };
    struct sched *s = NULL;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct status st = STATUS_INIT;
        ck_assert_int_eq(sched_create(&s, &bad[i].cfg, &st), ST_INVALID_ARGUMENT);
        ck_assert_msg(strstr(st.message, bad[i].field) == st.message, "%s: %s", bad[i].field, st.message);
        ck_assert_ptr_null(s);
    }
    for (int i = 0; i < 5; i++) {
        struct sched_config cfg = config(4, 16, 2);
        cfg.max_context = i == 0 ? 0 : cfg.max_context;
        cfg.max_queued = i == 1 ? 0 : cfg.max_queued;
        cfg.max_queued_tokens = i == 2 ? 0 : cfg.max_queued_tokens;
        cfg.kv.page_bytes = i == 3 ? 1ull << 41 : cfg.kv.page_bytes;
        cfg.kv.token_bytes = i == 4 ? 1ull << 31 : cfg.kv.token_bytes;
        static const char *const field[] = {"max_context", "max_queued", "max_queued_tokens", "kv.page_bytes",
                                            "kv.token_bytes"};
        struct status st = STATUS_INIT;
        ck_assert_int_eq(sched_create(&s, &cfg, &st), ST_INVALID_ARGUMENT);
        ck_assert_msg(strstr(st.message, field[i]) == st.message, "%s: %s", field[i], st.message);
    }
    sched_destroy(NULL);
}
END_TEST

START_TEST(request_of_exactly_the_context_and_the_memory_is_taken_and_one_more_refused)
{
    struct sched_config cfg = config(4, 64, 2);
    cfg.max_context = 100;
    cfg.kv.total_pages = 20; /* 80 tokens; the last one sampled is not stored */
    struct sched *s = create_attached(cfg);
    struct status st = STATUS_INIT;
    ck_assert_int_eq(submit_until(s, 1, 60, 41, INT64_MAX, &st), ST_INVALID_ARGUMENT);
    ck_assert_str_eq(st.message, "prompt and max_tokens: 60 prompt tokens + 41 new = 101, the context holds 100");
    ck_assert_int_eq(submit_until(s, 1, 60, 22, INT64_MAX, &st), ST_INVALID_ARGUMENT);
    ck_assert_str_eq(st.message,
                     "prompt and max_tokens: 60 prompt tokens + 22 new need 81 tokens x 1024 bytes = 21 pages "
                     "of 4096 bytes, the KV memory has 20");
    ck_assert_int_eq(submit_until(s, 1, 0, 5, INT64_MAX, &st), ST_INVALID_ARGUMENT);
    ck_assert_msg(strstr(st.message, "prompt: ") == st.message, "%s", st.message);
    ck_assert_int_eq(submit_until(s, 1, 5, 0, INT64_MAX, &st), ST_INVALID_ARGUMENT);
    ck_assert_msg(strstr(st.message, "max_tokens: ") == st.message, "%s", st.message);
    uint32_t prompt = 1;
    struct sched_request huge = {.id = 1, .prompt = &prompt, .n_prompt = UINT32_MAX, .max_new = UINT32_MAX};
    ck_assert_int_eq(sched_submit(s, 0, &huge, &st), ST_INVALID_ARGUMENT);

    submit(s, 1, 60, 21);
    uint32_t token = 50;
    plan(s);
    for (uint64_t step = 1; step <= 21; step++) {
        result(s, step, 1, &token);
        expect_token(s, 1, 50);
        if (step < 21)
            plan(s);
    }
    ck_assert(!expect_finished(s, 1).stopped);
    plan(s);
    result(s, 22, 0, NULL);
    finish(s);
}
END_TEST

START_TEST(one_token_is_sampled_by_the_prompt_alone)
{
    struct sched *s = create_attached(config(4, 16, 2));
    submit(s, 1, 1, 1);
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.rows, 1);
    ck_assert_uint_eq(sched_load(s).used_pages, 1);
    no_plan(s);
    RESULT(s, 1, 7);
    expect_token(s, 1, 7);
    ck_assert(expect_finished(s, 1).stopped); /* the stop token and the length at once: stopped */
    plan(s);
    result(s, 2, 0, NULL);
    finish(s);
}
END_TEST

START_TEST(queue_is_bounded_in_requests_and_in_tokens)
{
    struct sched_config cfg = config(1, 64, 1);
    cfg.max_queued = 3;
    cfg.max_queued_tokens = 100;
    struct sched *s = create_attached(cfg);
    struct status st = STATUS_INIT;
    ck_assert_int_eq(submit_until(s, 9, 101, 5, INT64_MAX, &st), ST_INVALID_ARGUMENT); /* never, so not "later" */
    submit(s, 1, 40, 5);
    submit(s, 2, 40, 5);
    ck_assert_int_eq(submit_until(s, 3, 21, 5, INT64_MAX, &st), ST_RESOURCE_EXHAUSTED);
    ck_assert_msg(strstr(st.message, "max_queued_tokens 100") != NULL, "%s", st.message);
    submit(s, 3, 20, 5);
    ck_assert_int_eq(submit_until(s, 4, 1, 5, INT64_MAX, &st), ST_RESOURCE_EXHAUSTED);
    ck_assert_msg(strstr(st.message, "max_queued 3") != NULL, "%s", st.message);
    ck_assert_int_eq(submit_until(s, 2, 1, 5, INT64_MAX, &st), ST_ALREADY_EXISTS);
    plan(s); /* the first is not queued any more */
    ck_assert_uint_eq(sched_load(s).queued, 2);
    ck_assert_uint_eq(sched_load(s).running, 1);
    ck_assert_uint_eq(sched_load(s).queued_tokens, 60);
    submit(s, 4, 40, 5);
    ck_assert_int_eq(submit_until(s, 1, 1, 5, INT64_MAX, &st), ST_ALREADY_EXISTS);
    sched_destroy(s);
}
END_TEST

START_TEST(step_budget_can_be_cut_to_what_a_group_takes)
{
    struct sched *s = create_attached(config(4, 64, 1));
    submit(s, 1, 200, 5);
    ck_assert_uint_eq(plan(s).rows, 64);
    result(s, 1, 0, NULL);
    sched_set_step_budget(s, 10);
    ck_assert_uint_eq(plan(s).rows, 10);
    result(s, 2, 0, NULL);
    sched_set_step_budget(s, 0);
    ck_assert_uint_eq(plan(s).rows, 1);
    result(s, 3, 0, NULL);
    sched_set_step_budget(s, 1000);
    ck_assert_uint_eq(plan(s).rows, 64);
    sched_destroy(s);
}
END_TEST

START_TEST(ids_of_any_pattern_are_found_again)
{
    struct sched_config cfg = config(4, 16, 1);
    cfg.max_queued = 3000;
    cfg.max_queued_tokens = 3000;
    for (unsigned shift = 0; shift < 64; shift += 9) {
        struct sched *s = create(&cfg);
        uint32_t prompt = 1;
        struct sched_request req = {.prompt = &prompt, .n_prompt = 1, .max_new = 1, .deadline_us = INT64_MAX};
        uint64_t n = shift <= 52 ? 3000 : 1ull << (64 - shift);
        for (uint64_t i = 0; i < n; i++) {
            req.id = i << shift;
            ck_assert_int_eq(sched_submit(s, 0, &req, NULL), ST_OK);
        }
        for (uint64_t i = 0; i < n; i += 2)
            ck_assert_int_eq(sched_cancel(s, 0, i << shift, ST_CANCELLED, NULL), ST_OK);
        sched_check(s);
        for (uint64_t i = 0; i < n; i++)
            ck_assert_int_eq(sched_cancel(s, 0, i << shift, ST_CANCELLED, NULL), i % 2 ? ST_OK : ST_NOT_FOUND);
        sched_check(s);
        sched_destroy(s);
    }
}
END_TEST

START_TEST(chunk_tokens_stay_until_the_next_plan)
{
    struct sched *s = create_attached(config(4, 16, 2));
    submit(s, 1, 12, 5);
    struct sched_plan p = plan(s);
    ck_assert_int_eq(sched_cancel(s, 0, 1, ST_CANCELLED, NULL), ST_OK);
    submit(s, 2, 12, 5);
    for (uint32_t i = 0; i < 12; i++)
        ck_assert_uint_eq(p.chunk[0].tokens[i], 100 + i);
    ck_assert_uint_eq(p.admit[0].slot, p.chunk[0].slot);
    sched_destroy(s);
}
END_TEST

/* ---- faults ---- */

START_TEST(result_that_was_not_planned_is_refused_and_changes_nothing)
{
    struct sched *s = create_attached(config(4, 16, 2));
    uint32_t tokens[3] = {50, 51, 52};
    struct status st = STATUS_INIT;
    ck_assert_int_eq(sched_result(s, 0, 0, tokens, 0, 0, &st), ST_INTERNAL);
    ck_assert_int_eq(sched_result(s, 0, 1, tokens, 0, 0, &st), ST_INTERNAL);
    submit(s, 1, 3, 5);
    plan(s);
    plan(s);
    ck_assert_int_eq(sched_result(s, 0, 2, tokens, 1, 0, &st), ST_INTERNAL);
    ck_assert_str_eq(st.message, "result of step 2: expected step 1");
    ck_assert_int_eq(sched_result(s, 0, 1, tokens, 2, 0, &st), ST_INTERNAL);
    ck_assert_str_eq(st.message, "result of step 1: 2 tokens, 1 were planned");
    ck_assert_int_eq(sched_result(s, 0, 1, tokens, 0, 0, &st), ST_INTERNAL);
    sched_check(s);
    no_event(s);
    RESULT(s, 1, 50);
    expect_token(s, 1, 50);
    ck_assert_int_eq(sched_result(s, 0, 1, tokens, 1, 0, &st), ST_INTERNAL);
    sched_detach(s, 0);
    expect_failed(s, 1, ST_UNAVAILABLE);
    ck_assert_int_eq(sched_result(s, 0, 2, tokens, 1, 0, &st), ST_INTERNAL); /* of the group that is gone */
    sched_destroy(s);
}
END_TEST

START_TEST(request_that_its_owner_finishes_gives_its_slot_back)
{
    struct sched *s = create_attached(config(4, 16, 2));
    struct status st = STATUS_INIT;
    submit(s, 1, 3, 9);
    plan(s);
    plan(s);
    RESULT(s, 1, 50);
    expect_token(s, 1, 50);
    ck_assert_int_eq(sched_finish(s, 0, 1, &st), ST_OK);
    struct sched_event ev = expect_finished(s, 1);
    ck_assert_uint_eq(ev.n_new, 1);
    ck_assert(!ev.stopped);
    ck_assert_int_eq(sched_finish(s, 0, 1, &st), ST_NOT_FOUND);
    RESULT(s, 2, 51); /* was in flight: dropped */
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.n_release, 1);
    ck_assert_uint_eq(p.rows, 0);
    result(s, 3, 0, NULL);
    ck_assert_uint_eq(sched_load(s).finished, 1);
    ck_assert_uint_eq(sched_load(s).wasted_rows, 1);
    finish(s);
}
END_TEST

START_TEST(attach_is_refused_when_attached_or_out_of_range)
{
    struct sched_config cfg = config(4, 16, 2);
    struct sched *s = create(&cfg);
    struct kv_account kv = ROOMY;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(sched_attach(s, 0, 0, 100, &kv, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(sched_attach(s, 0, 4, 0, &kv, &st), ST_INVALID_ARGUMENT);
    kv.page_bytes = 0;
    ck_assert_int_eq(sched_attach(s, 0, 4, 100, &kv, &st), ST_INVALID_ARGUMENT);
    ck_assert_msg(strstr(st.message, "page_bytes") != NULL, "%s", st.message);
    ck_assert_int_eq(sched_attach(s, 0, 4, 100, &ROOMY, &st), ST_OK);
    ck_assert_int_eq(sched_attach(s, 0, 4, 100, &ROOMY, &st), ST_FAILED_PRECONDITION);
    submit(s, 1, 3, 5);
    plan(s);
    sched_destroy(s); /* with a plan in flight */
}
END_TEST

/* A rank without KV heads has pages of nothing. */
START_TEST(token_of_no_bytes_needs_no_pages)
{
    struct sched_config cfg = config(2, 16, 2);
    cfg.kv = (struct kv_account){.page_bytes = 4096, .token_bytes = 0, .total_pages = 0};
    struct sched *s = create_attached(cfg);
    submit(s, 1, 100, 100);
    ck_assert_uint_eq(plan(s).rows, 16);
    sched_destroy(s);
}
END_TEST

/* The n-th allocation fails, once. Only those of a call in COUNTED() are looked at: the test library has its own. */
static uint64_t allocations, failing_allocation;
static bool counting;

static bool allocation_fails(void)
{
    return counting && ++allocations == failing_allocation;
}

static enum status_code stop_counting(enum status_code rc)
{
    counting = false;
    return rc;
}
#define COUNTED(call) stop_counting((counting = true, (call)))

void *__real_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t size);

void *__wrap_malloc(size_t size)
{
    return allocation_fails() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return allocation_fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t size)
{
    return allocation_fails() ? NULL : __real_realloc(p, size);
}

/* 150 requests through 8 slots, events taken late; what fails for want of memory is done again. Returns failures. */
static uint32_t run_with_failures(void)
{
    struct sched_config cfg = config(8, 64, 2);
    cfg.max_queued = 200;
    struct sched *s = NULL;
    uint32_t failures = 0, prompt = 1, tokens[2][8] = {{0}}, samples[2] = {0}, ended = 0;
    while (COUNTED(sched_create(&s, &cfg, NULL)) != ST_OK)
        failures++;
    while (COUNTED(sched_attach(s, 0, 8, 256, &cfg.kv, NULL)) != ST_OK)
        failures++;
    for (uint64_t id = 1; id <= 150; id++) {
        struct sched_request req = {
            .id = id, .prompt = &prompt, .n_prompt = 1, .max_new = 40, .deadline_us = INT64_MAX - (int64_t)id};
        enum status_code rc;
        while ((rc = COUNTED(sched_submit(s, 0, &req, NULL))) != ST_OK) {
            ck_assert_int_eq(rc, ST_RESOURCE_EXHAUSTED);
            failures++;
            sched_check(s);
        }
    }
    uint64_t step = 1;
    for (bool busy = true; busy; step++) {
        struct sched_plan p;
        while (sched_plan(s, 0, &p))
            samples[p.step % 2] = p.samples;
        busy = sched_load(s).in_flight > 0;
        if (!busy)
            break;
        enum status_code rc;
        while ((rc = COUNTED(sched_result(s, 0, step, tokens[step % 2], samples[step % 2], 0, NULL))) != ST_OK) {
            ck_assert_int_eq(rc, ST_RESOURCE_EXHAUSTED);
            failures++;
            sched_check(s);
        }
        struct sched_event ev;
        while (step % 50 == 0 && sched_next_event(s, &ev))
            ended += ev.kind == SCHED_FINISHED && ev.n_new == 40;
    }
    struct sched_event ev;
    while (sched_next_event(s, &ev))
        ended += ev.kind == SCHED_FINISHED && ev.n_new == 40;
    ck_assert_uint_eq(ended, 150);
    sched_check(s);
    sched_destroy(s);
    return failures;
}

START_TEST(nothing_is_lost_when_an_allocation_fails)
{
    allocations = failing_allocation = 0;
    ck_assert_uint_eq(run_with_failures(), 0);
    uint64_t all = allocations;
    ck_assert_uint_gt(all, 170); /* one for each request and those of the tables: the wrappers are in effect */
    for (uint64_t n = 1; n <= all; n++) {
        allocations = 0;
        failing_allocation = n;
        ck_assert_uint_eq(run_with_failures(), 1);
    }
}
END_TEST

START_TEST(steps_allocate_nothing)
{
    struct sched *s = create_attached(config(8, 64, 2));
    for (uint64_t id = 1; id <= 20; id++)
        submit(s, id, 10, 50);
    uint32_t tokens[8] = {0}, samples[2] = {0};
    uint64_t step = 1;
    counting = true;
    allocations = failing_allocation = 0;
    for (struct sched_plan p; sched_load(s).queued + sched_load(s).running > 0; step++) {
        while (sched_plan(s, 0, &p))
            samples[p.step % 2] = p.samples;
        if (sched_result(s, 0, step, tokens, samples[step % 2], 0, NULL) != ST_OK)
            break;
        struct sched_event ev;
        while (sched_next_event(s, &ev))
            ;
    }
    counting = false;
    ck_assert_uint_eq(sched_load(s).finished, 20);
    ck_assert_uint_gt(step, 100);
    ck_assert_uint_eq(allocations, 0);
    sched_destroy(s);
}
END_TEST

/* The checks of sched_check themselves: state is damaged by hand. Its message would only confuse the log. */
static struct sched *running(void)
{
    struct sched *s = create_attached(config(4, 64, 2));
    submit(s, 1, 8, 40);
    submit(s, 2, 8, 40);
    plan(s);
    sched_check(s);
    close(STDERR_FILENO);
    return s;
}

START_TEST(check_aborts_when_a_slot_is_lost)
{
    struct sched *s = running();
    s->n_free--;
    sched_check(s);
}
END_TEST

START_TEST(check_aborts_when_a_page_is_lost)
{
    struct sched *s = running();
    s->free_pages--;
    sched_check(s);
}
END_TEST

START_TEST(check_aborts_when_a_sample_is_lost)
{
    struct sched *s = running();
    s->run.head->n_unknown = 0;
    s->run.head->n_fed--;
    sched_check(s);
}
END_TEST

START_TEST(check_aborts_when_a_request_is_in_the_wrong_list)
{
    struct sched *s = running();
    s->preempted = s->run;
    s->run = (struct req_list){0};
    sched_check(s);
}
END_TEST

/* Rows of the second request's first chunk, beside a first one that decodes and has a target of its own (0: none). */
static uint32_t chunk_beside(int64_t tbt_target_us)
{
    static const struct cost_coef step = {.fixed_us = 100, .decode_us = 10, .row_us = 10};
    struct sched_config cfg = config(4, 300, 1);
    uint32_t prompt[200] = {0}, token = 50;
    cfg.policy = SCHED_TARGETS;
    cfg.cost = (struct cost_profile){.pure = step, .hybrid = step, .known = true};
    struct sched *s = create_attached(cfg);
    struct sched_request first = {.id = 1,
                                  .prompt = prompt,
                                  .n_prompt = 8,
                                  .max_new = 50,
                                  .deadline_us = INT64_MAX,
                                  .tbt_target_us = tbt_target_us};
    struct sched_request second = {.id = 2, .prompt = prompt, .n_prompt = 200, .max_new = 5, .deadline_us = INT64_MAX};
    ck_assert_int_eq(sched_submit(s, 1000, &first, NULL), ST_OK);
    struct sched_plan p = plan(s);
    result(s, p.step, 1, &token);
    ck_assert_int_eq(sched_submit(s, 1000, &second, NULL), ST_OK);
    p = plan(s);
    ck_assert(p.n_decode == 1 && p.n_chunk == 1 && p.chunk[0].id == 2);
    uint32_t rows = p.chunk[0].n_tokens;
    sched_destroy(s);
    return rows;
}

START_TEST(the_target_of_one_request_cuts_the_chunks_of_others)
{
    ck_assert_uint_eq(chunk_beside(0), 200);
    ck_assert_uint_eq(chunk_beside(100000), 200);
    uint32_t rows = chunk_beside(1000);
    ck_assert_msg(rows >= 50 && rows <= 89, "%u rows of 10 us in a step of 1000 us", rows);
    ck_assert_uint_eq(chunk_beside(1), 200); /* nobody could keep that, so nobody waits for it */
}
END_TEST

TCase *scheduler_limits(void)
{
    TCase *limits = tcase_create("limits");
    tcase_add_test(limits, configuration_out_of_range_is_refused_by_name);
    tcase_add_test(limits, request_of_exactly_the_context_and_the_memory_is_taken_and_one_more_refused);
    tcase_add_test(limits, one_token_is_sampled_by_the_prompt_alone);
    tcase_add_test(limits, queue_is_bounded_in_requests_and_in_tokens);
    tcase_add_test(limits, step_budget_can_be_cut_to_what_a_group_takes);
    tcase_add_test(limits, the_target_of_one_request_cuts_the_chunks_of_others);
    tcase_add_test(limits, ids_of_any_pattern_are_found_again);
    tcase_add_test(limits, chunk_tokens_stay_until_the_next_plan);
    tcase_add_test(limits, token_of_no_bytes_needs_no_pages);
    tcase_add_test(limits, steps_allocate_nothing);
    return limits;
}

TCase *scheduler_faults(void)
{
    TCase *faults = tcase_create("faults");
    tcase_set_timeout(faults, 60);
    tcase_add_test(faults, result_that_was_not_planned_is_refused_and_changes_nothing);
    tcase_add_test(faults, request_that_its_owner_finishes_gives_its_slot_back);
    tcase_add_test(faults, attach_is_refused_when_attached_or_out_of_range);
    tcase_add_test(faults, nothing_is_lost_when_an_allocation_fails);
    tcase_add_test_raise_signal(faults, check_aborts_when_a_slot_is_lost, SIGABRT);
    tcase_add_test_raise_signal(faults, check_aborts_when_a_page_is_lost, SIGABRT);
    tcase_add_test_raise_signal(faults, check_aborts_when_a_sample_is_lost, SIGABRT);
    tcase_add_test_raise_signal(faults, check_aborts_when_a_request_is_in_the_wrong_list, SIGABRT);
    return faults;
}
