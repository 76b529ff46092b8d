/* check_spans.c - traceparent in, OTLP lines out (spans.h). */
#include <check.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/spans.h"

#define TRACE "4bf92f3577b34da6a3ce929d0e0e4736"
#define SPAN  "00f067aa0ba902b7"

START_TEST(a_traceparent_is_read)
{
    struct spans_parent p = spans_parent_parse("00-" TRACE "-" SPAN "-01");
    ck_assert(p.there && p.sampled && p.trace[0] == 0x4b && p.trace[15] == 0x36 && p.span[1] == 0xf0);
    p = spans_parent_parse("00-" TRACE "-" SPAN "-00");
    ck_assert(p.there && !p.sampled);
    p = spans_parent_parse("01-" TRACE "-" SPAN "-03-more of a later version");
    ck_assert(p.there && p.sampled);
}
END_TEST

START_TEST(what_is_none_begins_a_trace)
{
    static const char *const bad[] = {NULL,
                                      "",
                                      "00-" TRACE "-" SPAN,
                                      "00-" TRACE "-" SPAN "-01-",
                                      "00-" TRACE "-" SPAN "-0g",
                                      "ff-" TRACE "-" SPAN "-01",
                                      "01-" TRACE "-" SPAN "-011",
                                      "00-4BF92F3577B34DA6A3CE929D0E0E4736-" SPAN "-01",
                                      "00-00000000000000000000000000000000-" SPAN "-01",
                                      "00-" TRACE "-0000000000000000-01",
                                      "00_" TRACE "-" SPAN "-01"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct spans_parent p = spans_parent_parse(bad[i]);
        ck_assert_msg(!p.there && p.sampled, "%zu", i);
    }
}
END_TEST

static json_t *line_of(const struct spans_parent *p, const struct spans_request *r)
{
    struct json_text t = {0};
    const uint8_t random[40] = {0}; /* the worst that can come */
    spans_line(&t, p, r, random);
    ck_assert(!t.failed && t.n > 2 && t.p[t.n - 1] == '\n' && !memchr(t.p, '\n', t.n - 1));
    json_t *line = json_loadb(t.p, t.n, 0, NULL);
    ck_assert(line != NULL);
    json_text_free(&t);
    json_t *scope =
        json_array_get(json_object_get(json_array_get(json_object_get(line, "resourceSpans"), 0), "scopeSpans"), 0);
    json_t *spans = json_incref(json_object_get(scope, "spans"));
    json_decref(line);
    return spans;
}

static const char *text_of(const json_t *spans, size_t i, const char *key)
{
    const char *v = json_string_value(json_object_get(json_array_get(spans, i), key));
    return v ? v : "";
}

START_TEST(a_request_has_a_span_and_three_within_it)
{
    struct spans_parent p = spans_parent_parse("00-" TRACE "-" SPAN "-01");
    const struct spans_request r = {.name = "req \"1\"\n",
                                    .model = "m",
                                    .code = "OK",
                                    .arrived_us = 1000000,
                                    .started_us = 1000010,
                                    .first_token_us = 1000300,
                                    .last_token_us = 1009000,
                                    .ended_us = 1009500,
                                    .prompt_tokens = 20,
                                    .new_tokens = 7};
    static const char *const names[] = {"generate", "queue", "prefill", "decode"};
    json_t *s = line_of(&p, &r);
    ck_assert_uint_eq(json_array_size(s), 4);
    for (size_t i = 0; i < 4; i++) {
        ck_assert_str_eq(text_of(s, i, "name"), names[i]);
        ck_assert_str_eq(text_of(s, i, "traceId"), TRACE);
        ck_assert_uint_eq(strlen(text_of(s, i, "spanId")), 16);
        ck_assert(strcmp(text_of(s, i, "spanId"), "0000000000000000") != 0);
        ck_assert_str_eq(text_of(s, i, "parentSpanId"), i ? text_of(s, 0, "spanId") : SPAN);
    }
    ck_assert_str_eq(text_of(s, 0, "startTimeUnixNano"), "1000000000");
    ck_assert_str_eq(text_of(s, 2, "startTimeUnixNano"), "1000010000");
    ck_assert_str_eq(text_of(s, 2, "endTimeUnixNano"), "1000300000");
    ck_assert_int_eq(json_integer_value(json_object_get(json_object_get(json_array_get(s, 0), "status"), "code")), 1);
    json_decref(s);
}
END_TEST

START_TEST(a_request_that_never_ran_has_one_span_of_a_trace_of_its_own)
{
    struct spans_parent p = spans_parent_parse(NULL);
    const struct spans_request r = {
        .name = "r", .model = "m", .code = "UNAVAILABLE", .failed = true, .arrived_us = 5, .ended_us = 9};
    json_t *s = line_of(&p, &r);
    ck_assert_uint_eq(json_array_size(s), 1);
    ck_assert_str_eq(text_of(s, 0, "parentSpanId"), "");
    ck_assert(strcmp(text_of(s, 0, "traceId"), "00000000000000000000000000000000") != 0);
    ck_assert_int_eq(json_integer_value(json_object_get(json_object_get(json_array_get(s, 0), "status"), "code")), 2);
    json_decref(s);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("spans");
    TCase *core = tcase_create("core");
    tcase_add_test(core, a_traceparent_is_read);
    tcase_add_test(core, what_is_none_begins_a_trace);
    tcase_add_test(core, a_request_has_a_span_and_three_within_it);
    tcase_add_test(core, a_request_that_never_ran_has_one_span_of_a_trace_of_its_own);
    suite_add_tcase(s, core);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
