/* check_bench.c - traces (trace.h), loads and times (bench.h). */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/bench.h"

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);

static long fail_in = -1; /* the n-th allocation from now fails; each test runs in a process of its own */

static bool fails(void)
{
    return fail_in >= 0 && fail_in-- == 0;
}

void *__wrap_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails() ? NULL : __real_realloc(p, n);
}

static struct trace read_trace(const char *text)
{
    struct trace t = {0};
    struct status st = STATUS_INIT;
    ck_assert_msg(trace_parse(&t, "t", text, strlen(text), &st) == ST_OK, "%s", st.message);
    return t;
}

START_TEST(trace_without_names_has_three_columns)
{
    struct trace t = read_trace("0, 512 ,128\n# c\n\n0.25,1,2 # d\r\n");
    ck_assert_uint_eq(t.n, 2);
    ck_assert_uint_eq(t.entry[0].prompt_tokens, 512);
    ck_assert_uint_eq(t.entry[0].output_tokens, 128);
    ck_assert(t.entry[1].arrival_s == 0.25);
    trace_free(&t);
}
END_TEST

START_TEST(names_put_columns_in_any_order)
{
    struct trace t = read_trace("x,GeneratedTokens,TIMESTAMP,ContextTokens\na,7,3.5,9");
    ck_assert_uint_eq(t.n, 1);
    ck_assert(t.entry[0].arrival_s == 3.5);
    ck_assert_uint_eq(t.entry[0].prompt_tokens, 9);
    ck_assert_uint_eq(t.entry[0].output_tokens, 7);
    trace_free(&t);
}
END_TEST

START_TEST(dates_count_from_the_first)
{
    struct trace t = read_trace("2023-11-16 23:59:59.5,4808,10\n2023-11-17T00:00:01.25Z,1,1\n");
    ck_assert(t.entry[0].arrival_s == 0);
    ck_assert(fabs(t.entry[1].arrival_s - 1.75) < 1e-6);
    trace_free(&t);
}
END_TEST

START_TEST(what_is_wrong_in_a_trace_is_named_with_its_line)
{
    static const struct {
        const char *text, *message;
    } bad[] = {
        {"", "t: no requests"},
        {"0,1,1\n0,x,1", "t:2: \"x\""},
        {"0,1,0", "t:1: \"0\""},
        {"5,1,1\n4,1,1", "t:2: \"4\""},
        {"-1,1,1", "t:1: \"-1\""},
        {"nan,1,1", "t:1: \"nan\""},
        {"0,1", "t:1: 2 values"},
        {"0,16777217,1", "t:1: \"16777217\""},
        {"arrival_s,prompt_tokens\n0,1", "t:1: no column output_tokens"},
        {"2023-11-16 00:00:00,1,1\n1,1,1", "t:2: \"1\""},
        {"1,1,1\n2023-11-16 00:00:00,1,1", "t:2: \"2023-11-16 00:00:00\""},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct trace t = {0};
        struct status st = STATUS_INIT;
        ck_assert_int_eq(trace_parse(&t, "t", bad[i].text, strlen(bad[i].text), &st), ST_INVALID_ARGUMENT);
        ck_assert_msg(strncmp(st.message, bad[i].message, strlen(bad[i].message)) == 0, "%s", st.message);
        ck_assert_ptr_null(t.entry);
    }
}
END_TEST

static struct bench_lengths lengths(const char *text)
{
    struct bench_lengths l;
    struct status st = STATUS_INIT;
    ck_assert_msg(bench_lengths_parse(&l, "--x", text, &st) == ST_OK, "%s", st.message);
    return l;
}

START_TEST(lengths_have_their_means_and_bounds)
{
    struct bench_load load = {.mode = BENCH_RATE,
                              .requests = 20000,
                              .rate = 50,
                              .prompt = lengths("lognormal:220,0.8"),
                              .output = lengths("uniform:100-300"),
                              .seed = 5};
    struct bench_request *q, *again;
    uint32_t n;
    double prompt = 0, output = 0;
    ck_assert_int_eq(bench_requests(&q, &n, &load, NULL), ST_OK);
    ck_assert_int_eq(bench_requests(&again, &n, &load, NULL), ST_OK);
    ck_assert_mem_eq(q, again, n * sizeof *q);
    for (uint32_t i = 0; i < n; i++) {
        ck_assert(i == 0 || q[i].due_s >= q[i - 1].due_s);
        ck_assert(q[i].output_tokens >= 100 && q[i].output_tokens <= 300 && q[i].prompt_tokens >= 1);
        prompt += q[i].prompt_tokens;
        output += q[i].output_tokens;
    }
    /* four standard errors: sigma / mean is 0.95, 0.29 and 1; sqrt(20000) is 141 */
    ck_assert_double_eq_tol(prompt / n, 220, 220 * 4 * 0.95 / 141);
    ck_assert_double_eq_tol(output / n, 200, 200 * 4 * 0.29 / 141);
    ck_assert_double_eq_tol(q[n - 1].due_s, 400, 400 * 4 / 141.0);
    free(q);
    free(again);
}
END_TEST

START_TEST(lengths_that_are_none_are_refused)
{
    static const char *const bad[] = {"",
                                      "0",
                                      "x",
                                      "1.5",
                                      "-3",
                                      "uniform:5",
                                      "uniform:5-4",
                                      "uniform:1.5-3",
                                      "lognormal:",
                                      "lognormal:5,",
                                      "lognormal:5,9",
                                      "220 ",
                                      "99999999"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct bench_lengths l;
        ck_assert_msg(bench_lengths_parse(&l, "--x", bad[i], NULL) == ST_INVALID_ARGUMENT, "%s", bad[i]);
    }
}
END_TEST

START_TEST(a_trace_is_followed_at_its_speed_and_cut_to_the_context)
{
    struct trace t = read_trace("10,5,6\n12,100,200\n13,900,5\n");
    const struct bench_load load = {.mode = BENCH_TRACE, .trace = &t, .speed = 2, .max_tokens = 150};
    struct bench_request *q;
    uint32_t n;
    ck_assert_int_eq(bench_requests(&q, &n, &load, NULL), ST_OK);
    ck_assert_uint_eq(n, 3);
    ck_assert(q[0].due_s == 0 && q[1].due_s == 1 && q[2].due_s == 1.5);
    ck_assert_uint_eq(q[1].prompt_tokens, 100);
    ck_assert_uint_eq(q[1].output_tokens, 50);
    ck_assert_uint_eq(q[2].prompt_tokens, 149);
    ck_assert_uint_eq(q[2].output_tokens, 1);
    free(q);
    trace_free(&t);
}
END_TEST

START_TEST(prompts_share_what_they_are_to_share)
{
    uint32_t same = 0;
    for (uint32_t i = 0; i < 1000; i++) {
        uint32_t a = bench_prompt_token(1, 3, i, 500, 128256), b = bench_prompt_token(1, 4, i, 500, 128256);
        ck_assert(a < 128256 && b < 128256);
        ck_assert(i >= 500 || a == b);
        same += a == b;
    }
    ck_assert_uint_le(same, 502);
}
END_TEST

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

START_TEST(quantiles_are_those_of_the_sorted_values)
{
    enum { N = 5000 };
    struct bench_histogram *h = calloc(1, sizeof *h);
    double *v = calloc(N, sizeof *v);
    uint64_t s = 9;
    for (int i = 0; i < N; i++) {
        s = s * 6364136223846793005u + 1442695040888963407u;
        v[i] = 1e-5 * exp((double)(s >> 40) / (1 << 24) * 14); /* 10 us to 12 s */
        bench_add(h, v[i], 1);
    }
    qsort(v, N, sizeof *v, by_value);
    for (int i = 1; i <= 1000; i++) {
        double exact = v[(int)ceil(i / 1000.0 * N) - 1], got = bench_quantile(h, i / 1000.0);
        ck_assert_msg(got >= exact * (1 - 1e-9) && got <= exact * 1.0051, "%g: %g, not %g", i / 1000.0, got, exact);
    }
    ck_assert(bench_quantile(h, 1) == v[N - 1]);
    free(v);
    free(h);
}
END_TEST

START_TEST(times_count_from_when_a_request_was_due)
{
    const struct bench_load load = {.mode = BENCH_RATE};
    const struct bench_request q[] = {
        {.due_s = 0, .sent_s = 0, .first_s = 0.1, .end_s = 1.1, .tokens = 11, .prompt_tokens = 3},
        {.due_s = 1, .sent_s = 3, .first_s = 3.1, .end_s = 3.2, .tokens = 2, .prompt_tokens = 4}, /* sent late */
        {.due_s = 2, .sent_s = 2, .first_s = -1, .end_s = 4, .code = ST_UNAVAILABLE},
        {.due_s = 9, .sent_s = -1, .first_s = -1, .end_s = -1}, /* interrupted before it was sent */
    };
    struct bench_result *r = calloc(1, sizeof *r);
    r->load = &load;
    r->request = q;
    r->n = 4;
    r->slo_ttft_s = 0.5;
    r->slo_tbt_s = 0.2;
    bench_sum_up(r);
    ck_assert_uint_eq(r->done, 2);
    ck_assert_uint_eq(r->failed, 1);
    ck_assert_uint_eq(r->good, 1);
    ck_assert_uint_eq(r->output_tokens, 13);
    ck_assert_double_eq_tol(r->ttft.max_s, 2.1, 1e-9);
    ck_assert_double_eq_tol(r->duration_s, 4, 1e-9);
    ck_assert_double_eq_tol(r->late_s, 2, 1e-9);
    ck_assert_double_eq_tol(bench_quantile(&r->per_token, 1), 0.1, 1e-9);
    free(r);
}
END_TEST

START_TEST(tokens_over_time_keep_their_sum)
{
    struct bench_result *r = calloc(1, sizeof *r);
    uint64_t sum = 0;
    r->slice_s = 0.01;
    for (int i = 0; i < 1000; i++)
        bench_note_tokens(r, i * 0.1, 3);
    for (int i = 0; i < BENCH_SLICES; i++)
        sum += r->tokens_of_slice[i];
    ck_assert_uint_eq(sum, 3000);
    ck_assert(r->slice_s * BENCH_SLICES > 99.9 && r->slice_s * BENCH_SLICES < 400);
    free(r);
}
END_TEST

START_TEST(each_allocation_that_fails_is_an_error)
{
    static const char text[] = "0,1,1\n1,2,2\n";
    for (long n = 0;; n++) {
        struct trace t = {0};
        struct bench_request *q = NULL;
        uint32_t count = 0;
        fail_in = n;
        enum status_code rc = trace_parse(&t, "t", text, sizeof text - 1, NULL);
        const struct bench_load load = {.mode = BENCH_TRACE, .trace = &t, .speed = 1};
        if (rc == ST_OK)
            rc = bench_requests(&q, &count, &load, NULL);
        bool failed = fail_in < 0;
        fail_in = -1;
        ck_assert_int_eq(rc, failed ? ST_RESOURCE_EXHAUSTED : ST_OK);
        free(q);
        trace_free(&t);
        if (!failed) {
            ck_assert_int_ge(n, 2);
            break;
        }
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("bench");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_test(core, trace_without_names_has_three_columns);
    tcase_add_test(core, names_put_columns_in_any_order);
    tcase_add_test(core, dates_count_from_the_first);
    tcase_add_test(core, lengths_have_their_means_and_bounds);
    tcase_add_test(core, a_trace_is_followed_at_its_speed_and_cut_to_the_context);
    tcase_add_test(core, prompts_share_what_they_are_to_share);
    tcase_add_test(core, quantiles_are_those_of_the_sorted_values);
    tcase_add_test(core, times_count_from_when_a_request_was_due);
    tcase_add_test(core, tokens_over_time_keep_their_sum);
    tcase_add_test(limits, what_is_wrong_in_a_trace_is_named_with_its_line);
    tcase_add_test(limits, lengths_that_are_none_are_refused);
    tcase_add_test(faults, each_allocation_that_fails_is_an_error);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
