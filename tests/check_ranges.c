/* The ranges of cuda_ranges.h as a tool sees them. No GPU is needed: NVTX is headers and whatever library the environment names. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "worker/cuda_ranges.h"

static void make_ranges(const char *out)
{
    setenv("NVTX_INJECTION64_PATH", TEST_NVTX_TOOL, 1); /* read at the first call */
    setenv("NVTX_TOOL_OUT", out, 1);
    for (uint64_t i = 0; i < 3; i++) {
        cuda_range_begin("step", 40 + i);
        cuda_range_begin("layers", 7);
        cuda_range_end();
        cuda_range_end();
    }
    exit(0);
}

START_TEST(a_tool_sees_names_values_and_depth)
{
    char path[] = "/tmp/tandem-ranges-XXXXXX", text[512] = "";
    int fd = mkstemp(path), how = -1;
    ck_assert_int_ge(fd, 0);
    pid_t pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid == 0)
        make_ranges(path);
    ck_assert_int_eq(waitpid(pid, &how, 0), pid);
    ck_assert_int_eq(how, 0);
    close(fd);
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    unlink(path);
    text[n] = 0;
    ck_assert_str_eq(text, "step                            3 times, 0 deep, value at most 42\n"
                           "layers                          3 times, 1 deep, value at most 7\n"
                           "open at the end: 0; ends without a beginning: 0; names left out: 0\n");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("ranges");
    TCase *t = tcase_create("core");
    tcase_add_test(t, a_tool_sees_names_values_and_depth);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
