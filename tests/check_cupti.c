/* check_cupti.c - worker/cuda_activity.c over an imitation of CUPTI: how the library is found, what is done with its records, and
 * with those that it drops. */
#include <check.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cupti.h>

#include "tests/fake_cupti.h"
#include "worker/cuda_activity.h"

static struct fake_cupti_control *fake;

/* ---- the linker sends dlopen through here ---- */

void *__real_dlopen(const char *path, int flags);
void *__wrap_dlopen(const char *path, int flags);

static struct {
    const char *there;  /* the only library that there is; NULL: whatever there is */
    const char *broken; /* there, but no library */
    char tried[1024];
} files;

void *__wrap_dlopen(const char *path, int flags)
{
    size_t n = strlen(files.tried);
    snprintf(files.tried + n, sizeof files.tried - n, "%s\n", path);
    if (!files.there)
        return __real_dlopen(path, flags);
    if (files.broken && strcmp(path, files.broken) == 0)
        return __real_dlopen("/etc/passwd", flags);
    return strcmp(path, files.there) == 0 ? __real_dlopen(TEST_FAKE_CUPTI, flags) : NULL;
}

static void set_up(void)
{
    void *library = __real_dlopen(TEST_FAKE_CUPTI, RTLD_NOW | RTLD_LOCAL);
    ck_assert_msg(library, "%s", dlerror());
    fake = dlsym(library, FAKE_CUPTI_CONTROL);
    ck_assert_ptr_nonnull(fake);
    memset(&files, 0, sizeof files); /* without forks it is what the last test left */
    fake->refuse_with = fake->version = 0;
    fake->no_own_clock = false;
    fake->ahead_ns = 0;
}

static void start(void)
{
    struct status st = STATUS_INIT;
    ck_assert_msg(cuda_activity.start(TEST_FAKE_CUPTI, &st) == ST_OK, "%s", st.message);
}

/* ---- what comes ---- */

#define KEPT_MAX 16

static struct activity kept[KEPT_MAX];
static char kept_name[KEPT_MAX][32];
static size_t n_kept;

static void keep(void *ctx, const struct activity *a)
{
    ck_assert_ptr_eq(ctx, &n_kept);
    if (n_kept < KEPT_MAX) {
        kept[n_kept] = *a;
        snprintf(kept_name[n_kept], sizeof kept_name[0], "%s", a->name ? a->name : "");
    }
    n_kept++;
}

static uint64_t take(bool last)
{
    n_kept = 0;
    return cuda_activity.take(last, keep, &n_kept);
}

static void tear_down(void)
{
    take(true); /* without forks the next test starts it again */
    ck_assert_int_eq(fake->broken_rules, 0);
}

static void emit_kernel(uint64_t begin_ns, uint64_t end_ns)
{
    fake->emit(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, 0, "k", 0, begin_ns, end_ns);
}

static void emit_copy(int kind)
{
    fake->emit(CUPTI_ACTIVITY_KIND_MEMCPY, kind, NULL, 512, 5000, 6000);
}

START_TEST(records_are_handed_over_as_they_are)
{
    start();
    ck_assert_uint_eq(fake->enabled, 1u << CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL | 1u << CUPTI_ACTIVITY_KIND_MEMCPY |
                                         1u << CUPTI_ACTIVITY_KIND_MEMSET);
    ck_assert_uint_eq(take(false), 0);
    ck_assert_uint_eq(n_kept, 0);
    fake->emit(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, 0, "_Z4normv", 0, 1000, 3500);
    emit_copy(CUPTI_ACTIVITY_MEMCPY_KIND_HTOD);
    emit_copy(CUPTI_ACTIVITY_MEMCPY_KIND_DTOH);
    emit_copy(CUPTI_ACTIVITY_MEMCPY_KIND_DTOD);
    fake->emit(CUPTI_ACTIVITY_KIND_MEMSET, 0, NULL, 64, 7000, 7000);
    ck_assert_uint_eq(take(false), 0);
    ck_assert(!fake->forced);
    static const enum activity_kind kinds[] = {ACTIVITY_KERNEL, ACTIVITY_COPY_IN, ACTIVITY_COPY_OUT, ACTIVITY_COPY,
                                               ACTIVITY_FILL};
    static const uint32_t streams[] = {7, 13, 13, 13, 14};
    ck_assert_uint_eq(n_kept, 5);
    for (int i = 0; i < 5; i++) {
        ck_assert_int_eq(kept[i].kind, kinds[i]);
        ck_assert_uint_eq(kept[i].stream, streams[i]);
    }
    ck_assert_str_eq(kept_name[0], "_Z4normv");
    ck_assert_double_eq(kept[0].begin_us, 1);
    ck_assert_double_eq(kept[0].end_us, 3.5);
    ck_assert_uint_eq(kept[1].bytes, 512);
    ck_assert_double_eq(kept[1].begin_us, 5);
    ck_assert_uint_eq(kept[4].bytes, 64);
    ck_assert_double_eq(kept[4].end_us, 7);
    ck_assert_uint_eq(take(false), 0);
    ck_assert_uint_eq(n_kept, 0); /* once */
}
END_TEST

static double monotonic_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

/* With a clock of ours, and with one of the library's that is years ahead or behind. */
START_TEST(times_are_those_of_the_monotonic_clock)
{
    fake->no_own_clock = _i > 0;
    fake->ahead_ns = _i == 2 ? -500000000 : 1700000000ll * 1000000000;
    start();
    double before_us = monotonic_us();
    uint64_t now_ns = fake->clock();
    emit_kernel(now_ns, now_ns + 1000000);
    double after_us = monotonic_us();
    ck_assert_uint_eq(take(false), 0);
    ck_assert_uint_eq(n_kept, 1);
    ck_assert_double_ge(kept[0].begin_us, before_us - 100);
    ck_assert_double_le(kept[0].begin_us, after_us + 100);
    ck_assert_double_eq_tol(kept[0].end_us - kept[0].begin_us, 1000, 0.01);
}
END_TEST

START_TEST(the_last_take_ends_the_recording)
{
    start();
    emit_kernel(1000, 2000);
    ck_assert_uint_eq(take(true), 0);
    ck_assert_uint_eq(n_kept, 1);
    ck_assert(fake->forced);
    ck_assert_uint_eq(fake->enabled, 0);
    emit_kernel(3000, 4000);
    ck_assert_uint_eq(take(false) + take(true), 0);
    ck_assert_uint_eq(n_kept, 0);
}
END_TEST

/* ---- limits ---- */

START_TEST(records_that_find_no_buffer_are_dropped_and_counted)
{
    const size_t per_buffer = CUDA_ACTIVITY_BUFFER_BYTES / sizeof(CUpti_ActivityKernel10),
                 room = CUDA_ACTIVITY_BUFFERS * per_buffer;
    start();
    for (int turn = 0; turn < 3; turn++) { /* buffers come back */
        for (size_t i = 0; i < room + 1000; i++)
            emit_kernel(1000 + i, 2000 + i);
        ck_assert_uint_eq(take(false), 1000);
        ck_assert_uint_eq(n_kept, room);
        emit_kernel(1000, 2000);
        ck_assert_uint_eq(take(false), 0);
        ck_assert_uint_eq(n_kept, 1);
    }
}
END_TEST

START_TEST(records_without_times_are_lost)
{
    start();
    emit_kernel(0, 0);
    emit_kernel(1000, 2000);
    emit_kernel(3000, 0); /* under way */
    ck_assert_uint_eq(take(true), 2);
    ck_assert_uint_eq(n_kept, 1);
}
END_TEST

/* ---- faults ---- */

START_TEST(a_library_that_is_not_there_is_said_with_what_was_tried)
{
    struct status st = STATUS_INIT;
    files.there = "nowhere";
    ck_assert_int_eq(setenv("CUDA_HOME", "/opt/toolkit", 1), 0);
    ck_assert_int_eq(cuda_activity.start(NULL, &st), ST_FAILED_PRECONDITION);
    ck_assert_str_eq(
        st.message,
        "CUPTI is needed and not there (tried libcupti.so.13, libcupti.so, in "
        "/opt/toolkit/extras/CUPTI/lib64, in /usr/local/cuda/extras/CUPTI/lib64, in /usr/local/cuda/lib64): "
        "install cuda-cupti of the toolkit, or set CUDA_HOME or LD_LIBRARY_PATH");
    ck_assert_int_eq(cuda_activity.start("/no/such/libcupti.so", &st), ST_FAILED_PRECONDITION);
    ck_assert_msg(strstr(st.message, "(tried /no/such/libcupti.so)"), "%s", st.message);
    ck_assert_uint_eq(take(true), 0);
}
END_TEST

static const char *const places[] = {"libcupti.so.13",
                                     "libcupti.so",
                                     "/opt/toolkit/extras/CUPTI/lib64/libcupti.so.13",
                                     "/opt/toolkit/extras/CUPTI/lib64/libcupti.so",
                                     "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so.13",
                                     "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so",
                                     "/usr/local/cuda/lib64/libcupti.so.13",
                                     "/usr/local/cuda/lib64/libcupti.so"};
#define PLACES (int)(sizeof places / sizeof *places)

START_TEST(the_library_is_found_in_each_of_its_places_in_order)
{
    char want[1024] = "";
    for (int i = 0; i <= _i; i++)
        snprintf(want + strlen(want), sizeof want - strlen(want), "%s\n", places[i]);
    files.there = places[_i];
    ck_assert_int_eq(setenv("CUDA_HOME", "/opt/toolkit", 1), 0);
    ck_assert_int_eq(cuda_activity.start(NULL, NULL), ST_OK);
    ck_assert_str_eq(files.tried, want);
}
END_TEST

START_TEST(a_library_that_does_not_load_is_said_with_the_reason)
{
    struct status st = STATUS_INIT;
    ck_assert_int_eq(setenv("CUDA_HOME", "/opt/toolkit", 1), 0);
    files.there = "nowhere";
    files.broken = places[_i];
    ck_assert_int_eq(cuda_activity.start(NULL, &st), ST_FAILED_PRECONDITION);
    ck_assert_msg(strncmp(st.message, "CUPTI is there, but does not load: /etc/passwd: ", 48) == 0, "%s", st.message);
    files.there = places[(_i + 1) % PLACES]; /* another one will do */
    ck_assert_int_eq(cuda_activity.start(NULL, &st), ST_OK);
}
END_TEST

START_TEST(what_is_older_than_the_records_is_refused)
{
    struct status st = STATUS_INIT;
    fake->version = 18;
    ck_assert_int_eq(cuda_activity.start(TEST_FAKE_CUPTI, &st), ST_FAILED_PRECONDITION);
    ck_assert_str_eq(st.message, "the CUPTI library that was found is of version 18, expected 19 (CUDA 12.0) or newer");
    ck_assert_uint_eq(fake->enabled, 0);
    fake->version = 19;
    start();
}
END_TEST

/* It may have asked for one before it refused. */
START_TEST(a_buffer_that_cupti_holds_is_not_given_twice)
{
    const size_t per_buffer = CUDA_ACTIVITY_BUFFER_BYTES / sizeof(CUpti_ActivityKernel10);
    struct status st = STATUS_INIT;
    fake->refuse_kind = CUPTI_ACTIVITY_KIND_MEMSET;
    fake->refuse_with = CUPTI_ERROR_INSUFFICIENT_PRIVILEGES;
    fake->emits_when_enabled = true;
    ck_assert_int_eq(cuda_activity.start(TEST_FAKE_CUPTI, &st), ST_FAILED_PRECONDITION);
    fake->refuse_with = 0;
    fake->emits_when_enabled = false;
    start();
    for (size_t i = 0; i < CUDA_ACTIVITY_BUFFERS * per_buffer + 1000; i++)
        emit_kernel(1000 + i, 2000 + i);
    take(false);
    ck_assert_uint_le(n_kept,
                      CUDA_ACTIVITY_BUFFERS * per_buffer + 2); /* the first are copies, too, which are smaller */
    ck_assert_uint_gt(n_kept, (CUDA_ACTIVITY_BUFFERS - 1) * per_buffer);
}
END_TEST

START_TEST(another_library_is_no_cupti)
{
    struct status st = STATUS_INIT;
    ck_assert_int_eq(cuda_activity.start("libc.so.6", &st), ST_FAILED_PRECONDITION);
    ck_assert_msg(strstr(st.message, "has no cuptiGetVersion"), "%s", st.message);
}
END_TEST

START_TEST(what_cupti_refuses_is_said_in_its_words)
{
    struct status st = STATUS_INIT;
    fake->refuse_kind = CUPTI_ACTIVITY_KIND_MEMSET;
    fake->refuse_with = CUPTI_ERROR_INSUFFICIENT_PRIVILEGES;
    ck_assert_int_eq(cuda_activity.start(TEST_FAKE_CUPTI, &st), ST_FAILED_PRECONDITION);
    ck_assert_msg(
        strncmp(st.message,
                "CUPTI refuses records of kernels and copies: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES (35); needed ",
                93) == 0,
        "%s", st.message);
    ck_assert_uint_eq(fake->enabled, 0); /* not half of them */
    fake->refuse_with = 0;
    start();
    ck_assert_int_eq(cuda_activity.start(TEST_FAKE_CUPTI, &st), ST_FAILED_PRECONDITION);
    ck_assert_str_eq(st.message, "CUPTI records already");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("cupti");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_checked_fixture(core, set_up, tear_down);
    tcase_add_checked_fixture(limits, set_up, tear_down);
    tcase_add_checked_fixture(faults, set_up, tear_down);
    tcase_set_timeout(limits, 60);
    tcase_add_test(core, records_are_handed_over_as_they_are);
    tcase_add_loop_test(core, times_are_those_of_the_monotonic_clock, 0, 3);
    tcase_add_test(core, the_last_take_ends_the_recording);
    tcase_add_test(limits, records_that_find_no_buffer_are_dropped_and_counted);
    tcase_add_test(limits, records_without_times_are_lost);
    tcase_add_test(faults, a_library_that_is_not_there_is_said_with_what_was_tried);
    tcase_add_loop_test(faults, the_library_is_found_in_each_of_its_places_in_order, 0, PLACES);
    tcase_add_loop_test(faults, a_library_that_does_not_load_is_said_with_the_reason, 0, PLACES);
    tcase_add_test(faults, what_is_older_than_the_records_is_refused);
    tcase_add_test(faults, a_buffer_that_cupti_holds_is_not_given_twice);
    tcase_add_test(faults, another_library_is_no_cupti);
    tcase_add_test(faults, what_cupti_refuses_is_said_in_its_words);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
