/* check_threads.c - worker/threads.h: every item once, on a worker of its own, and nothing left behind. */
#include <check.h>
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "worker/threads.h"

enum { MAX_ITEMS = 5000, MAX_WORKERS = 16 };

struct ledger {
    struct thread_pool *pool;
    _Atomic uint32_t hits[MAX_ITEMS];
    atomic_bool inside[MAX_WORKERS]; /* a worker number is used by one thread at a time */
    _Atomic uint32_t clashes;
    uint32_t plain[MAX_ITEMS]; /* not atomic: threads_for must publish it to the caller */
    uint32_t plain_in;         /* written by the caller before the loop */
    uint32_t delay_ns;
};

static struct thread_pool *make(uint32_t threads)
{
    struct thread_pool *p = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(threads_create(&p, threads, &st) == ST_OK, "%s", st.message);
    return p;
}

static void mark(void *arg, uint32_t i, uint32_t worker)
{
    struct ledger *l = arg;
    if (worker >= threads_count(l->pool) || atomic_exchange(&l->inside[worker], true))
        atomic_fetch_add(&l->clashes, 1);
    atomic_fetch_add(&l->hits[i], 1);
    l->plain[i] = l->plain_in + i;
    if (l->delay_ns)
        nanosleep(&(struct timespec){.tv_nsec = l->delay_ns}, NULL);
    atomic_store(&l->inside[worker], false);
}

static void run_and_check(struct ledger *l, uint32_t n)
{
    memset(l->hits, 0, sizeof l->hits);
    memset(l->plain, 0, sizeof l->plain);
    l->plain_in++;
    threads_for(l->pool, n, mark, l);
    for (uint32_t i = 0; i < MAX_ITEMS; i++) {
        ck_assert_uint_eq(l->hits[i], i < n ? 1 : 0);
        ck_assert_uint_eq(l->plain[i], i < n ? l->plain_in + i : 0);
    }
    ck_assert_uint_eq(l->clashes, 0);
}

START_TEST(every_item_runs_once_for_any_count)
{
    static const uint32_t threads[] = {1, 2, 3, 4, 8, 16};
    static const uint32_t counts[] = {0, 1, 2, 3, 4, 5, 15, 16, 17, 100, 999, MAX_ITEMS};
    static struct ledger l;
    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++) {
        l.pool = make(threads[t]);
        ck_assert_uint_eq(threads_count(l.pool), threads[t]);
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
            run_and_check(&l, counts[c]);
        threads_destroy(l.pool);
    }
}
END_TEST

START_TEST(loops_follow_each_other_without_mixing)
{
    static struct ledger l;
    const char *env = getenv("TANDEM_STRESS");
    uint32_t rounds = env ? (uint32_t)strtoul(env, NULL, 10) : 1;
    l.pool = make(4);
    unsigned seed = 1;
    for (uint32_t round = 0; round < rounds * 3000; round++) {
        /* Short loops, and now and then a pause that sends the helpers to sleep. */
        uint32_t n = (uint32_t)rand_r(&seed) % 12;
        memset(l.hits, 0, 16 * sizeof *l.hits);
        l.plain_in++;
        threads_for(l.pool, n, mark, &l);
        for (uint32_t i = 0; i < 16; i++)
            ck_assert_uint_eq(l.hits[i], i < n);
        for (uint32_t i = 0; i < n; i++)
            ck_assert_uint_eq(l.plain[i], l.plain_in + i);
        if (round % 97 == 0)
            nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
    ck_assert_uint_eq(l.clashes, 0);
    threads_destroy(l.pool);
}
END_TEST

START_TEST(slow_items_are_waited_for_asleep)
{
    static struct ledger l = {.delay_ns = 5000000};
    l.pool = make(3);
    for (int i = 0; i < 5; i++)
        run_and_check(&l, 7);
    threads_destroy(l.pool);
}
END_TEST

static void nap(void *arg, uint32_t i, uint32_t worker)
{
    (void)arg;
    (void)i;
    (void)worker;
    nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
}

static double cpu_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

START_TEST(waiting_takes_no_processor_time)
{
    struct thread_pool *p = make(8);
    double before = cpu_s();
    threads_for(p, 2, nap, NULL);                              /* six helpers and then the caller have nothing to do */
    nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL); /* nobody has */
    ck_assert_double_lt(cpu_s() - before, 0.05);
    threads_destroy(p);
}
END_TEST

START_TEST(thread_count_out_of_range_is_refused)
{
    struct thread_pool *p = NULL;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(threads_create(&p, 0, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "threads: 0"));
    ck_assert_int_eq(threads_create(&p, 100000, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_null(p);
    ck_assert_int_eq(threads_create(&p, 0, NULL), ST_INVALID_ARGUMENT);
    threads_destroy(NULL);
}
END_TEST

static uint32_t entries(const char *dir)
{
    uint32_t n = 0;
    DIR *d = opendir(dir);
    ck_assert_ptr_nonnull(d);
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

START_TEST(destroy_leaves_no_thread_behind)
{
    threads_destroy(make(4)); /* a sanitizer may start threads of its own with the first one */
    uint32_t tasks = entries("/proc/self/task");
    static struct ledger l;
    for (int i = 0; i < 200; i++) {
        l.pool = make(1 + (uint32_t)i % 6);
        if (i % 2) /* a pool may also be destroyed unused, while its helpers still start */
            threads_for(l.pool, 5, mark, &l);
        threads_destroy(l.pool);
    }
    /* A joined thread may stay visible for a moment. */
    for (int i = 0; i < 100 && entries("/proc/self/task") > tasks; i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    ck_assert_uint_le(entries("/proc/self/task"), tasks);
}
END_TEST

START_TEST(two_pools_are_independent)
{
    static struct ledger a, b;
    a.pool = make(2);
    b.pool = make(3);
    for (int i = 0; i < 50; i++) {
        run_and_check(&a, 20);
        run_and_check(&b, 30);
    }
    threads_destroy(a.pool);
    threads_destroy(b.pool);
}
END_TEST

static void nest(void *arg, uint32_t i, uint32_t worker)
{
    (void)i;
    (void)worker;
    struct ledger *l = arg;
    threads_for(l->pool, 1, mark, l);
}

START_TEST(nested_loop_is_refused)
{
    static struct ledger l;
    l.pool = make((uint32_t)_i);
    threads_for(l.pool, 2, nest, &l);
}
END_TEST

static atomic_bool helper_got_signal;
static pthread_t main_thread;

static void on_signal(int sig)
{
    (void)sig;
    if (!pthread_equal(pthread_self(), main_thread))
        atomic_store(&helper_got_signal, true);
}

START_TEST(signals_stay_with_the_callers_threads)
{
    main_thread = pthread_self();
    struct sigaction sa = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &sa, NULL);
    static struct ledger l;
    l.pool = make(4);
    for (int i = 0; i < 200; i++) {
        kill(getpid(), SIGUSR1); /* to any thread of the process that does not block it */
        threads_for(l.pool, 8, mark, &l);
    }
    ck_assert(!atomic_load(&helper_got_signal));
    threads_destroy(l.pool);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("threads");
    TCase *core = tcase_create("core");
    tcase_add_test(core, every_item_runs_once_for_any_count);
    tcase_add_test(core, loops_follow_each_other_without_mixing);
    tcase_add_test(core, two_pools_are_independent);
    suite_add_tcase(s, core);
    TCase *limits = tcase_create("limits");
    tcase_add_test(limits, slow_items_are_waited_for_asleep);
    tcase_add_test(limits, waiting_takes_no_processor_time);
    tcase_add_test(limits, thread_count_out_of_range_is_refused);
    tcase_add_test(limits, destroy_leaves_no_thread_behind);
    suite_add_tcase(s, limits);
    TCase *faults = tcase_create("faults");
    tcase_add_loop_test_raise_signal(faults, nested_loop_is_refused, SIGABRT, 1, 3);
    tcase_add_test(faults, signals_stay_with_the_callers_threads);
    suite_add_tcase(s, faults);
    tcase_set_timeout(core, 60);
    tcase_set_timeout(limits, 60);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
