/* check_status.c - proto/status.h. */
#include <check.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "proto/status.h"

static enum status_code open_page(struct status *st)
{
    return status_set(st, ST_RESOURCE_EXHAUSTED, "page %d of %s", 7, "pool");
}

/* Is s a sequence of whole UTF-8 characters? */
static bool whole_characters(const char *s)
{
    for (const unsigned char *p = (const unsigned char *)s; *p;) {
        unsigned n = *p < 0x80 ? 1 : *p >= 0xF0 ? 4 : *p >= 0xE0 ? 3 : *p >= 0xC0 ? 2 : 0;
        if (n == 0)
            return false;
        for (unsigned i = 1; i < n; i++) {
            if ((p[i] & 0xC0) != 0x80)
                return false;
        }
        p += n;
    }
    return true;
}

START_TEST(status_holds_code_and_message)
{
    struct status st = STATUS_INIT;
    ck_assert_int_eq(st.code, ST_OK);
    ck_assert_str_eq(st.message, "");
    ck_assert_int_eq(open_page(&st), ST_RESOURCE_EXHAUSTED);
    ck_assert_int_eq(st.code, ST_RESOURCE_EXHAUSTED);
    ck_assert_str_eq(st.message, "page 7 of pool");
}
END_TEST

START_TEST(prefix_adds_context_and_keeps_the_code)
{
    struct status st = STATUS_INIT;
    open_page(&st);
    ck_assert_int_eq(status_prefix(&st, "rank %d", 3), ST_RESOURCE_EXHAUSTED);
    ck_assert_str_eq(st.message, "rank 3: page 7 of pool");
    ck_assert_int_eq(status_prefix(&st, "%s", st.message), ST_RESOURCE_EXHAUSTED); /* its own message as an argument */
    ck_assert_str_eq(st.message, "rank 3: page 7 of pool: rank 3: page 7 of pool");
    status_set(&st, ST_INTERNAL, "again: %s", st.message);
    ck_assert_str_eq(st.message, "again: rank 3: page 7 of pool: rank 3: page 7 of pool");
}
END_TEST

START_TEST(errno_is_named)
{
    struct status st = STATUS_INIT;
    ck_assert_int_eq(status_errno(&st, ST_NOT_FOUND, ENOENT, "open %s", "x.json"), ST_NOT_FOUND);
    ck_assert_str_eq(st.message, "open x.json: No such file or directory");
    ck_assert_int_eq(status_nomem(&st, "slots", 4096), ST_RESOURCE_EXHAUSTED);
    ck_assert_str_eq(st.message, "out of memory: slots (4096 bytes)");
}
END_TEST

START_TEST(codes_have_the_names_and_numbers_of_grpc)
{
    static const char *const names[] = {
        "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
        "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
        "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
        "DATA_LOSS", "UNAUTHENTICATED"};
    for (int i = 0; i < 17; i++)
        ck_assert_str_eq(status_name((enum status_code)i), names[i]);
    ck_assert_str_eq(status_name((enum status_code)17), "UNKNOWN");
    ck_assert_str_eq(status_name((enum status_code) - 1), "UNKNOWN");
}
END_TEST

START_TEST(without_a_status_the_code_is_kept)
{
    ck_assert_int_eq(open_page(NULL), ST_RESOURCE_EXHAUSTED);
    ck_assert_int_eq(status_errno(NULL, ST_INTERNAL, EIO, "x"), ST_INTERNAL);
    ck_assert_int_eq(status_nomem(NULL, "x", 1), ST_RESOURCE_EXHAUSTED);
    ck_assert_int_eq(status_prefix(NULL, "x"), ST_UNKNOWN);
}
END_TEST

/* Characters of one to four bytes, at every place where the message can be cut. */
START_TEST(long_message_is_cut_between_characters)
{
    static const char *const letters[] = {"x", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80"};
    for (size_t k = 0; k < 4; k++) {
        for (size_t lead = 0; lead < 5; lead++) {
            char text[2 * STATUS_MESSAGE_MAX] = "";
            size_t n = strlen(letters[k]);
            memset(text, '.', lead);
            for (size_t at = lead; at + n < sizeof text; at += n)
                memcpy(text + at, letters[k], n);
            struct status st = STATUS_INIT;
            status_set(&st, ST_INTERNAL, "%s", text);
            size_t len = strlen(st.message);
            ck_assert_msg(whole_characters(st.message), "%zu bytes a character, %zu before", n, lead);
            ck_assert_uint_lt(len, STATUS_MESSAGE_MAX);
            ck_assert_uint_ge(len, STATUS_MESSAGE_MAX - 1 - (n - 1)); /* and no more is lost than must be */
            ck_assert_int_eq(strncmp(st.message, text, len), 0);
            status_prefix(&st, "rank");
            ck_assert(whole_characters(st.message));
            ck_assert_int_eq(strncmp(st.message, "rank: ", 6), 0);
        }
    }
}
END_TEST

START_TEST(bytes_that_are_no_text_do_no_harm)
{
    char text[2 * STATUS_MESSAGE_MAX];
    memset(text, 0x80, sizeof text - 1);
    text[sizeof text - 1] = '\0';
    struct status st = STATUS_INIT;
    status_set(&st, ST_INTERNAL, "%s", text);
    ck_assert_uint_lt(strlen(st.message), STATUS_MESSAGE_MAX);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("status");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_test(core, status_holds_code_and_message);
    tcase_add_test(core, prefix_adds_context_and_keeps_the_code);
    tcase_add_test(core, errno_is_named);
    tcase_add_test(core, codes_have_the_names_and_numbers_of_grpc);
    tcase_add_test(limits, long_message_is_cut_between_characters);
    tcase_add_test(faults, without_a_status_the_code_is_kept);
    tcase_add_test(faults, bytes_that_are_no_text_do_no_harm);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
