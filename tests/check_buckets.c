/* check_buckets.c - for how many rows launches are made, for largest steps up to a million rows. */
#include <check.h>
#include <stdlib.h>

#include "worker/cuda_buckets.h"

enum { LARGEST = 1 << 20 }; /* of --max-step-tokens */

/* The header's table. */
static uint32_t buckets_in_octave(uint32_t rows)
{
    return rows < 128 ? 2 : rows < 512 ? 4 : rows < 2048 ? 32 : rows < 8192 ? 8 : 2;
}

START_TEST(lists_ascend_and_end_at_the_largest_step)
{
    uint32_t rows[CUDA_BUCKETS_MAX];
    for (uint32_t max_rows = 1; max_rows <= LARGEST; max_rows += max_rows < 20000 ? 1 : 997) {
        const uint32_t n = cuda_bucket_list(max_rows, rows);
        ck_assert_uint_le(n, CUDA_BUCKETS_MAX);
        ck_assert_uint_eq(rows[0], 1);
        ck_assert_uint_eq(rows[n - 1], max_rows);
        for (uint32_t i = 1; i < n; i++)
            if (rows[i] <= rows[i - 1])
                ck_abort_msg("steps of %u: bucket %u has %u rows, the one before it %u", max_rows, i, rows[i],
                             rows[i - 1]);
    }
}
END_TEST

START_TEST(padding_is_bounded)
{
    uint32_t list[CUDA_BUCKETS_MAX];
    const uint32_t n = cuda_bucket_list(LARGEST, list);
    ck_assert_uint_le(n, CUDA_BUCKETS_MAX);
    for (uint32_t rows = 1, i = 0; rows <= LARGEST; rows++) {
        i += list[i] < rows;
        if ((uint64_t)(list[i] - rows) * buckets_in_octave(rows) > rows)
            ck_abort_msg("%u rows run as %u", rows, list[i]);
    }
}
END_TEST

/* Decodes, chunks, and chunks of 512 and 1024 with 32 or 64 decodes beside them. */
START_TEST(what_is_measured_runs_unpadded)
{
    static const uint32_t rows[] = {1, 8, 64, 256, 512, 544, 1024, 1056, 1088, 2048};
    uint32_t list[CUDA_BUCKETS_MAX];
    const uint32_t n = cuda_bucket_list(8192, list);
    for (uint32_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        uint32_t at = 0;
        while (at < n && list[at] != rows[i])
            at++;
        if (at == n)
            ck_abort_msg("no bucket of %u rows", rows[i]);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("buckets");
    TCase *t = tcase_create("core");
    tcase_add_test(t, lists_ascend_and_end_at_the_largest_step);
    tcase_add_test(t, padding_is_bounded);
    tcase_add_test(t, what_is_measured_runs_unpadded);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
