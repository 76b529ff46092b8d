/* Choice of the back end, with a plugin that fails in each way; and the CUDA plugin itself where it was built. */
#include <check.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_internal.h"
#include "tests/comm_fake.h"
#include "worker/backend.h"
#include "worker/worker_internal.h"

#define SOME_LIBRARY "libc.so.6" /* stands for a driver that can be loaded */

static const struct worker_log quiet = {.level = WORKER_LOG_ERROR, .rank = 1};

/* ---- a group of two, or more, of which we are rank 1 and the others see what the fake plugin shows ---- */

static uint32_t group_size = 2;
static const char *others_see = "\1\2"; /* the first byte of each id */

static enum status_code pair_all_gather(struct comm *c, const void *send, void *recv, const size_t *bytes,
                                        struct status *st)
{
    struct comm_devices *all = recv;
    (void)send, (void)bytes, (void)st;
    for (uint32_t r = 0; r < c->size; r++)
        if (r != c->rank)
            for (const char *p = others_see; *p; p++)
                all[r].id[all[r].count++][0] = (uint8_t)*p;
    return ST_OK;
}

static const struct comm_ops comm_ops_pair = {
    .name = "pair", .open = comm_fake_open, .close = comm_fake_close, .all_gather = pair_all_gather};

static enum status_code open_backend(struct worker_backend *b, struct worker_backend_config cfg, struct status *st)
{
    comm_fake.rank = 1;
    comm_fake.size = group_size;
    ck_assert_int_eq(comm_create(&cfg.comm, &(struct comm_config){.ops = &comm_ops_pair}, st), ST_OK);
    enum status_code rc = worker_backend_open(b, &cfg, &quiet, st);
    comm_destroy(cfg.comm);
    return rc;
}

static enum status_code choose(uint32_t kind, const char *plugin, const char *driver, struct status *st)
{
    const struct worker_backend_config cfg = {.kind = kind, .plugin = plugin, .driver_library = driver};
    struct worker_backend b;
    enum status_code rc = open_backend(&b, cfg, st);
    if (rc == ST_OK) {
        ck_assert_ptr_null(b.api);
        worker_backend_close(&b);
    }
    return rc;
}

/* ---- core ---- */

START_TEST(host_looks_for_no_driver)
{
    ck_assert_int_eq(choose(WORKER_BACKEND_HOST, "/no/plugin", "no-driver.so", NULL), ST_OK);
}
END_TEST

START_TEST(devices_are_named_when_the_plugin_refuses)
{
    struct status st = STATUS_INIT;
    ck_assert_int_eq(choose(WORKER_BACKEND_AUTO, TEST_FAKE_PLUGIN, SOME_LIBRARY, &st), ST_OK);
    ck_assert_int_eq(choose(WORKER_BACKEND_CUDA, TEST_FAKE_PLUGIN, SOME_LIBRARY, &st), ST_UNIMPLEMENTED);
    ck_assert_str_eq(st.message, "--backend cuda: 2 x Fake 9000, 80.0 GiB, compute capability 9.0: refuses to serve on "
                                 "device 1");
}
END_TEST

START_TEST(more_ranks_than_devices_are_refused)
{
    struct status st = STATUS_INIT;
    struct worker_backend b;
    const struct worker_backend_config cfg = {
        .kind = WORKER_BACKEND_CUDA, .plugin = TEST_FAKE_PLUGIN, .driver_library = SOME_LIBRARY};
    group_size = 3;
    ck_assert_int_eq(open_backend(&b, cfg, &st), ST_FAILED_PRECONDITION);
    const char *seen = strstr(st.message, "; seen there: ");
    ck_assert_msg(strstr(st.message, "--backend cuda: rank 2 finds no free device among its 2, as 3 ranks share") &&
                      seen,
                  "%s", st.message);
    ck_assert_str_eq(seen, "; seen there: GPU-01000000 (rank 0's), GPU-02000000 (rank 1's)");
}
END_TEST

struct taking_case {
    const char *others, *devices; /* what rank 0 sees; our --devices */
    enum status_code rc;          /* at cuda */
    const char *text;             /* of the device that was tried, or of the match */
};

static const struct taking_case taking_cases[] = {
    {"\1\2", NULL, ST_UNIMPLEMENTED, "on device 1"},
    {"\1", NULL, ST_UNIMPLEMENTED, "on device 1"},    /* rank 0 sees the first alone */
    {"\2", NULL, ST_UNIMPLEMENTED, "on device 0"},    /* the second: a pod of its own, or CUDA_VISIBLE_DEVICES */
    {"\3", NULL, ST_UNIMPLEMENTED, "on device 0"},    /* one that we do not see */
    {"\3", "1,0", ST_UNIMPLEMENTED, "on device 1"},   /* our own order */
    {"\2\1", "1,0", ST_UNIMPLEMENTED, "on device 0"}, /* the same list, in an order that both were told */
    {"\1\2", "0", ST_UNIMPLEMENTED, "on device 0"},   /* rank 0 takes the other */
    {"\1", "0", ST_FAILED_PRECONDITION, "rank 1 finds no free device among its 1"},
    {"", NULL, ST_FAILED_PRECONDITION, "rank 0 finds no free device among its 0"},
};
#define TAKING_CASES (int)(sizeof taking_cases / sizeof *taking_cases)

START_TEST(a_rank_takes_what_the_others_leave)
{
    const struct taking_case *t = &taking_cases[_i];
    struct status st = STATUS_INIT;
    struct worker_backend b;
    struct worker_backend_config cfg = {
        .kind = WORKER_BACKEND_CUDA, .devices = t->devices, .plugin = TEST_FAKE_PLUGIN, .driver_library = SOME_LIBRARY};
    others_see = t->others;
    ck_assert_int_eq(open_backend(&b, cfg, &st), t->rc);
    ck_assert_msg(strstr(st.message, t->text), "%s", st.message);
    cfg.kind = WORKER_BACKEND_AUTO;
    ck_assert_int_eq(open_backend(&b, cfg, NULL), ST_OK);
    ck_assert_ptr_null(b.api); /* the host */
}
END_TEST

START_TEST(a_back_end_that_serves_gives_its_parts)
{
    const struct worker_backend_config cfg = {.plugin = TEST_FAKE_PLUGIN, .driver_library = SOME_LIBRARY};
    struct worker_backend b;
    setenv("BACKEND_FAKE", "serves", 1);
    for (int i = 0; i < 2; i++) { /* the second time finds the first one closed */
        ck_assert_int_eq(open_backend(&b, cfg, NULL), ST_OK);
        ck_assert_str_eq(b.parts->text, "fake:1");
        worker_backend_close(&b);
    }
    ck_assert_ptr_null(b.parts);
}
END_TEST

/* Whoever asked for kernels gets them or an error, and no host that has none. */
static const struct {
    const char *behaviour, *plugin, *driver;
    uint32_t kind;
    enum status_code rc;
    const char *text;
} kernel_cases[] = {
    {"serves", TEST_FAKE_PLUGIN, SOME_LIBRARY, WORKER_BACKEND_AUTO, ST_OK, ""},
    {"serves", TEST_FAKE_PLUGIN, SOME_LIBRARY, WORKER_BACKEND_CUDA, ST_OK, ""},
    {"", TEST_FAKE_PLUGIN, SOME_LIBRARY, WORKER_BACKEND_AUTO, ST_FAILED_PRECONDITION, "--trace-kernels: no recorder"},
    {"", TEST_FAKE_PLUGIN, SOME_LIBRARY, WORKER_BACKEND_CUDA, ST_FAILED_PRECONDITION, "--trace-kernels: no recorder"},
    {"records", TEST_FAKE_PLUGIN, SOME_LIBRARY, WORKER_BACKEND_AUTO, ST_UNIMPLEMENTED,
     "--trace-kernels: 2 x Fake 9000"},
    {"", TEST_FAKE_PLUGIN, "no-driver.so.1", WORKER_BACKEND_AUTO, ST_FAILED_PRECONDITION,
     "--trace-kernels: no CUDA driver"},
    {"", "/no/such/plugin.so", SOME_LIBRARY, WORKER_BACKEND_AUTO, ST_FAILED_PRECONDITION,
     "/no/such/plugin.so is not there"},
};
#define KERNEL_CASES (int)(sizeof kernel_cases / sizeof *kernel_cases)

START_TEST(kernels_are_recorded_or_the_reason_is_said)
{
    struct status st = STATUS_INIT;
    struct worker_backend b;
    const struct worker_backend_config cfg = {.kind = kernel_cases[_i].kind,
                                              .kernels = true,
                                              .plugin = kernel_cases[_i].plugin,
                                              .driver_library = kernel_cases[_i].driver};
    setenv("BACKEND_FAKE", kernel_cases[_i].behaviour, 1);
    ck_assert_int_eq(open_backend(&b, cfg, &st), kernel_cases[_i].rc);
    ck_assert_msg(strstr(st.message, kernel_cases[_i].text), "%s", st.message);
    ck_assert((kernel_cases[_i].rc == ST_OK) == (b.api != NULL));
    worker_backend_close(&b);
}
END_TEST

/* ---- limits ---- */

START_TEST(device_lists_are_numbers_of_devices)
{
    static const char *const wrong[] = {
        "", ",", "0,", ",0", "0,,1", "a", "1 ", "-1", "4", "99999999999999999999", "0,1,2,3,0,1,2,3,0,1,2,3,0,1,2,3,0"};
    uint32_t device[COMM_DEVICES_MAX], n;
    struct status st = STATUS_INIT;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        ck_assert_int_eq(worker_backend_devices(device, &n, wrong[i], 4, &st), ST_INVALID_ARGUMENT);
        ck_assert_msg(strncmp(st.message, "--devices: ", 11) == 0, "%s", st.message);
    }
    ck_assert_int_eq(worker_backend_devices(device, &n, "3,0,2", 4, &st), ST_OK);
    ck_assert_uint_eq(n, 3);
    ck_assert(device[0] == 3 && device[1] == 0 && device[2] == 2);
    ck_assert_int_eq(worker_backend_devices(device, &n, "0,1,2,3,0,1,2,3,0,1,2,3,0,1,2,3", 4, &st), ST_OK);
    ck_assert_uint_eq(n, COMM_DEVICES_MAX);
}
END_TEST

START_TEST(a_wrong_device_list_is_said_at_auto_too)
{
    const struct worker_backend_config cfg = {
        .kind = WORKER_BACKEND_AUTO, .devices = "2", .plugin = TEST_FAKE_PLUGIN, .driver_library = SOME_LIBRARY};
    struct worker_backend b;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(open_backend(&b, cfg, &st), ST_INVALID_ARGUMENT);
    ck_assert_str_eq(st.message, "--devices: 2, but the driver finds 2 devices");
}
END_TEST

START_TEST(cuda_plugin_keeps_its_contract)
{
#ifdef TEST_CUDA_PLUGIN
    void *library = dlopen(TEST_CUDA_PLUGIN, RTLD_NOW | RTLD_LOCAL);
    ck_assert_msg(library, "%s", dlerror());
    void *symbol = dlsym(library, BACKEND_SYMBOL);
    ck_assert_ptr_nonnull(symbol);
    ck_assert_ptr_null(dlsym(library, "status_set")); /* nothing but the entry is seen */
    backend_entry *entry;
    memcpy(&entry, &symbol, sizeof entry);
    ck_assert_ptr_null(entry(BACKEND_ABI + 1));
    const struct backend_api *api = entry(BACKEND_ABI);
    ck_assert_ptr_nonnull(api);
    ck_assert_uint_eq(api->abi, BACKEND_ABI);
    ck_assert_str_eq(api->name, "cuda");
    ck_assert(api->activity && api->activity->start && api->activity->take);
    uint32_t count = 0;
    struct status st = STATUS_INIT;
    enum status_code rc = api->devices(&count, &st);
    ck_assert_msg(rc == ST_OK || (rc == ST_FAILED_PRECONDITION && st.message[0]), "%d", rc);
    struct backend_device d;
    for (uint32_t i = 0; rc == ST_OK && i < count; i++) {
        ck_assert_int_eq(api->describe(i, &d, &st), ST_OK);
        ck_assert(d.name[0] && d.memory_bytes && d.major && d.processors);
        ck_assert_mem_ne(d.id, (uint8_t[COMM_DEVICE_BYTES]){0}, COMM_DEVICE_BYTES);
    }
    ck_assert_int_ne(api->describe(count, &d, &st), ST_OK);
    struct backend_session *session = NULL;
    if (rc == ST_OK && count) {
        ck_assert_msg(api->open(&session, 0, &st) == ST_OK, "%s", st.message);
        ck_assert_str_ne(api->parts(session)->text, "");
        api->close(session);
    } else {
        ck_assert_int_ne(api->open(&session, 0, &st), ST_OK);
        ck_assert_ptr_null(session);
    }
    api->close(NULL);
    dlclose(library);
#endif
}
END_TEST

/* ---- faults ---- */

struct fault_case {
    const char *behaviour, *plugin, *driver, *text;
};

static const struct fault_case fault_cases[] = {
    {"", TEST_FAKE_PLUGIN, "no-driver.so.1", "no CUDA driver"},
    {"", "/no/such/plugin.so", SOME_LIBRARY, "/no/such/plugin.so is not there"},
    {"", TEST_DATA "/demo-model/config.json", SOME_LIBRARY, "CUDA back end: "},
    {"", SOME_LIBRARY, SOME_LIBRARY, "is not there"}, /* a path, not a name to look for */
    {"answers-null", TEST_FAKE_PLUGIN, SOME_LIBRARY, "is not of this build"},
    {"other-abi", TEST_FAKE_PLUGIN, SOME_LIBRARY, "is not of this build"},
    {"driver-too-old", TEST_FAKE_PLUGIN, SOME_LIBRARY, "the driver is too old"},
    {"no-device", TEST_FAKE_PLUGIN, SOME_LIBRARY, "the driver finds no device"},
};
#define FAULT_CASES (int)(sizeof fault_cases / sizeof *fault_cases)

START_TEST(what_keeps_cuda_away_leaves_the_host_or_is_said)
{
    const struct fault_case *f = &fault_cases[_i];
    struct status st = STATUS_INIT;
    setenv("BACKEND_FAKE", f->behaviour, 1);
    ck_assert_int_eq(choose(WORKER_BACKEND_AUTO, f->plugin, f->driver, &st), ST_OK);
    ck_assert_int_eq(choose(WORKER_BACKEND_CUDA, f->plugin, f->driver, &st), ST_FAILED_PRECONDITION);
    ck_assert_msg(strncmp(st.message, "--backend cuda: ", 16) == 0 && strstr(st.message, f->text), "%s", st.message);
}
END_TEST

/* ---- measured products ---- */

START_TEST(what_is_measured_is_kept_where_caches_are)
{
    char buf[64];
    struct worker_options o = {.model_dir = NULL};
    ck_assert_int_eq(setenv("XDG_CACHE_HOME", "/cache", 1) | setenv("HOME", "/home/me", 1), 0);
    ck_assert_str_eq(worker_tune_dir(&o, buf, sizeof buf), "/cache/tandem");
    ck_assert_int_eq(setenv("XDG_CACHE_HOME", "cache", 1), 0); /* not absolute: as if it were not there */
    ck_assert_str_eq(worker_tune_dir(&o, buf, sizeof buf), "/home/me/.cache/tandem");
    ck_assert_ptr_null(worker_tune_dir(&o, buf, 22)); /* one byte too small */
    ck_assert_int_eq(unsetenv("XDG_CACHE_HOME") | unsetenv("HOME"), 0);
    ck_assert_ptr_null(worker_tune_dir(&o, buf, sizeof buf));
    o.tune_cache = "there";
    ck_assert_str_eq(worker_tune_dir(&o, buf, sizeof buf), "there");
    o.tune_cache = "off";
    ck_assert_ptr_null(worker_tune_dir(&o, buf, sizeof buf));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("backend");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_set_timeout(limits, 60); /* a driver may take long to open */
    tcase_add_test(core, host_looks_for_no_driver);
    tcase_add_test(core, what_is_measured_is_kept_where_caches_are);
    tcase_add_test(core, devices_are_named_when_the_plugin_refuses);
    tcase_add_test(core, more_ranks_than_devices_are_refused);
    tcase_add_test(core, a_back_end_that_serves_gives_its_parts);
    tcase_add_loop_test(core, kernels_are_recorded_or_the_reason_is_said, 0, KERNEL_CASES);
    tcase_add_test(limits, device_lists_are_numbers_of_devices);
    tcase_add_test(limits, a_wrong_device_list_is_said_at_auto_too);
    tcase_add_test(limits, cuda_plugin_keeps_its_contract);
    tcase_add_loop_test(core, a_rank_takes_what_the_others_leave, 0, TAKING_CASES);
    tcase_add_test(limits, more_ranks_than_devices_are_refused);
    tcase_add_loop_test(faults, what_keeps_cuda_away_leaves_the_host_or_is_said, 0, FAULT_CASES);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
