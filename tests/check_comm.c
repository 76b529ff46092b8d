/* check_comm.c - comm.h without MPI: the group of one rank, and what comm.c does for every back end (arguments, clock,
 * abort, failures), seen through a back end made for the test. The MPI back end: mpi_comm.c. */
#include <check.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "comm/comm.h"
#include "comm/comm_internal.h"

static struct comm *make(const struct comm_ops *ops, uint32_t timeout_ms)
{
    struct status st = STATUS_INIT;
    struct comm *c = NULL;
    ck_assert_msg(comm_create(&c, &(struct comm_config){.ops = ops, .timeout_ms = timeout_ms}, &st) == ST_OK, "%s",
                  st.message);
    return c;
}

static double now_ms(void)
{
    return (double)comm_now_ns() / 1e6;
}

/* --- a back end of two ranks whose peer never answers, or whose operations fail as told --- */

struct fake {
    enum status_code result; /* of every operation; ST_DEADLINE_EXCEEDED: waits for a peer that is not there */
    unsigned calls;
    bool closed, clean;
};

static struct fake fake; /* Check forks for every test */

static enum status_code fake_open(struct comm *c, struct status *st)
{
    if (fake.result == ST_UNAVAILABLE)
        return status_set(st, ST_UNAVAILABLE, "no such network");
    c->rank = 1;
    c->size = 2;
    c->local_size = 2;
    return ST_OK;
}

static void fake_close(struct comm *c, bool clean)
{
    (void)c;
    fake.closed = true;
    fake.clean = clean;
}

static enum status_code fake_work(struct comm *c, struct status *st)
{
    struct comm_wait w = {0};
    enum status_code rc = ST_OK;
    fake.calls++;
    if (fake.result != ST_DEADLINE_EXCEEDED)
        return fake.result ? status_set(st, fake.result, "as told") : ST_OK;
    while (rc == ST_OK)
        rc = comm_wait_step(c, &w);
    return status_set(st, rc, "nobody came");
}

static enum status_code fake_all_reduce(struct comm *c, float *x, size_t n, struct status *st)
{
    (void)x;
    (void)n;
    return fake_work(c, st);
}

static enum status_code fake_all_gather(struct comm *c, const void *send, void *recv, const size_t *bytes,
                                        struct status *st)
{
    ck_assert_ptr_eq(send, (char *)recv + bytes[0]); /* the own part stands at its place already */
    return fake_work(c, st);
}

static enum status_code fake_broadcast(struct comm *c, void *x, size_t bytes, uint32_t root, struct status *st)
{
    (void)x;
    (void)bytes;
    (void)root;
    return fake_work(c, st);
}

static const struct comm_ops comm_ops_fake = {
    .name = "fake",
    .open = fake_open,
    .close = fake_close,
    .all_reduce = fake_all_reduce,
    .all_gather = fake_all_gather,
    .broadcast = fake_broadcast,
    .barrier = fake_work,
};

/* --- core --- */

START_TEST(one_rank_sums_and_gathers_alone)
{
    struct comm *c = make(&comm_ops_self, 0);
    struct status st = STATUS_INIT;
    float x[3] = {1, 2, 3};
    char from[5] = "abcd", to[5] = "";
    ck_assert_uint_eq(comm_rank(c), 0);
    ck_assert_uint_eq(comm_size(c), 1);
    ck_assert_uint_eq(comm_local_size(c), 1);
    ck_assert_int_eq(comm_all_reduce(c, x, 3, &st), ST_OK);
    ck_assert(x[0] == 1 && x[1] == 2 && x[2] == 3);
    ck_assert_int_eq(comm_all_gather(c, from, to, (size_t[]){5}, &st), ST_OK);
    ck_assert_str_eq(to, "abcd");
    ck_assert_int_eq(comm_all_gather(c, to, to, (size_t[]){5}, &st), ST_OK);
    ck_assert_str_eq(to, "abcd");
    ck_assert_int_eq(comm_all_gather(c, NULL, NULL, (size_t[]){0}, &st), ST_OK);
    ck_assert_int_eq(comm_broadcast(c, from, 5, 0, &st), ST_OK);
    ck_assert_int_eq(comm_barrier(c, &st), ST_OK);
    comm_destroy(c);
    comm_destroy(NULL);
}
END_TEST

START_TEST(own_part_of_a_gather_is_put_in_its_place)
{
    struct comm *c = make(&comm_ops_fake, 0);
    char to[8] = "--------";
    ck_assert_int_eq(comm_all_gather(c, "xyz", to, (size_t[]){2, 3}, NULL), ST_OK);
    ck_assert_int_eq(memcmp(to, "--xyz---", 8), 0);
    comm_destroy(c);
    ck_assert(fake.closed && fake.clean);
}
END_TEST

START_TEST(nothing_to_move_asks_no_peer)
{
    struct comm *c = make(&comm_ops_fake, 0);
    float x = 1;
    ck_assert_int_eq(comm_all_reduce(c, &x, 0, NULL), ST_OK);
    ck_assert_int_eq(comm_all_gather(c, NULL, NULL, (size_t[]){0, 0}, NULL), ST_OK);
    ck_assert_int_eq(comm_broadcast(c, NULL, 0, 1, NULL), ST_OK);
    ck_assert_uint_eq(fake.calls, 0);
    comm_destroy(c);
}
END_TEST

/* --- limits --- */

START_TEST(wrong_arguments_are_named_and_do_not_break_the_group)
{
    struct comm *c = make(&comm_ops_fake, 0);
    struct status st = STATUS_INIT;
    float x = 1;
    ck_assert_int_eq(comm_broadcast(c, &x, 4, 2, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "root 2 of 2"));
    ck_assert_int_eq(comm_broadcast(c, NULL, 4, 0, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(comm_all_reduce(c, NULL, 4, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(comm_all_reduce(c, &x, SIZE_MAX / 2, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(comm_all_gather(c, &x, &x, NULL, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(comm_all_gather(c, NULL, &x, (size_t[]){0, 4}, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(comm_all_gather(c, &x, &x, (size_t[]){SIZE_MAX, 4}, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "bytes[1]"));
    ck_assert_uint_eq(fake.calls, 0);
    ck_assert_int_eq(comm_all_reduce(c, &x, 1, &st), ST_OK);
    comm_destroy(c);
    ck_assert(fake.clean);
    c = NULL;
    ck_assert_int_eq(comm_create(&c, &(struct comm_config){0}, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_null(c);
}
END_TEST

/* --- faults --- */

START_TEST(missing_peer_ends_with_deadline_exceeded)
{
    struct comm *c = make(&comm_ops_fake, 150);
    struct status st = STATUS_INIT;
    fake.result = ST_DEADLINE_EXCEEDED;
    double from = now_ms();
    ck_assert_int_eq(comm_barrier(c, &st), ST_DEADLINE_EXCEEDED);
    double took = now_ms() - from;
    ck_assert_msg(took >= 149 && took < 1500, "%.1f ms", took);
    ck_assert_str_eq(st.message, "barrier on rank 1 of 2: nobody came");
    /* ranks are out of step now: nothing is tried any more, and it is said why */
    fake.result = ST_OK;
    float x = 0;
    ck_assert_int_eq(comm_all_reduce(c, &x, 1, &st), ST_DEADLINE_EXCEEDED);
    ck_assert_ptr_nonnull(strstr(st.message, "an earlier operation of the group failed (DEADLINE_EXCEEDED)"));
    ck_assert_uint_eq(fake.calls, 1);
    comm_destroy(c);
    ck_assert(fake.closed && !fake.clean);
}
END_TEST

START_TEST(waiting_leaves_the_core_to_others)
{
    struct comm *c = make(&comm_ops_fake, 1000);
    fake.result = ST_DEADLINE_EXCEEDED;
    struct rusage a, b;
    getrusage(RUSAGE_SELF, &a);
    ck_assert_int_eq(comm_barrier(c, NULL), ST_DEADLINE_EXCEEDED);
    getrusage(RUSAGE_SELF, &b);
    double cpu_ms = (double)(b.ru_utime.tv_sec - a.ru_utime.tv_sec + b.ru_stime.tv_sec - a.ru_stime.tv_sec) * 1e3 +
                    (double)(b.ru_utime.tv_usec - a.ru_utime.tv_usec + b.ru_stime.tv_usec - a.ru_stime.tv_usec) / 1e3;
    ck_assert_msg(cpu_ms < 150, "%.1f ms of CPU time in a second of waiting", cpu_ms);
    comm_destroy(c);
}
END_TEST

static void *abort_soon(void *arg)
{
    nanosleep(&(struct timespec){.tv_nsec = 100 * 1000 * 1000}, NULL);
    comm_abort(arg);
    return NULL;
}

START_TEST(abort_from_another_thread_ends_the_wait)
{
    struct comm *c = make(&comm_ops_fake, 60000);
    struct status st = STATUS_INIT;
    pthread_t thread;
    fake.result = ST_DEADLINE_EXCEEDED;
    double from = now_ms();
    ck_assert_int_eq(pthread_create(&thread, NULL, abort_soon, c), 0);
    ck_assert_int_eq(comm_barrier(c, &st), ST_ABORTED);
    double took = now_ms() - from;
    pthread_join(thread, NULL);
    ck_assert_msg(took < 1000, "%.1f ms", took);
    fake.result = ST_OK;
    ck_assert_int_eq(comm_barrier(c, &st), ST_ABORTED);
    ck_assert_uint_eq(fake.calls, 1);
    comm_destroy(c);
    ck_assert(!fake.clean);
}
END_TEST

START_TEST(abort_holds_for_one_rank_too)
{
    struct comm *c = make(&comm_ops_self, 0);
    float x = 1;
    comm_abort(c);
    ck_assert_int_eq(comm_all_reduce(c, &x, 1, NULL), ST_ABORTED);
    ck_assert_int_eq(comm_all_gather(c, &x, &x, (size_t[]){4}, NULL), ST_ABORTED);
    ck_assert_int_eq(comm_broadcast(c, &x, 4, 0, NULL), ST_ABORTED);
    ck_assert_int_eq(comm_barrier(c, NULL), ST_ABORTED);
    comm_destroy(c);
}
END_TEST

START_TEST(failures_of_the_back_end_are_passed_on)
{
    struct status st = STATUS_INIT;
    struct comm *c = NULL;
    fake.result = ST_UNAVAILABLE;
    ck_assert_int_eq(comm_create(&c, &(struct comm_config){.ops = &comm_ops_fake}, &st), ST_UNAVAILABLE);
    ck_assert_ptr_null(c);
    ck_assert_ptr_nonnull(strstr(st.message, "no such network"));
    fake.result = ST_OK;
    c = make(&comm_ops_fake, 0);
    fake.result = ST_INTERNAL;
    ck_assert_int_eq(comm_broadcast(c, &st, 4, 0, &st), ST_INTERNAL);
    ck_assert_str_eq(st.message, "broadcast on rank 1 of 2: as told");
    ck_assert_int_eq(comm_barrier(c, NULL), ST_INTERNAL);
    comm_destroy(c);
}
END_TEST

static Suite *comm_suite(void)
{
    Suite *s = suite_create("comm");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_set_timeout(faults, 30);
    tcase_add_test(core, one_rank_sums_and_gathers_alone);
    tcase_add_test(core, own_part_of_a_gather_is_put_in_its_place);
    tcase_add_test(core, nothing_to_move_asks_no_peer);
    tcase_add_test(limits, wrong_arguments_are_named_and_do_not_break_the_group);
    tcase_add_test(faults, missing_peer_ends_with_deadline_exceeded);
    tcase_add_test(faults, waiting_leaves_the_core_to_others);
    tcase_add_test(faults, abort_from_another_thread_ends_the_wait);
    tcase_add_test(faults, abort_holds_for_one_rank_too);
    tcase_add_test(faults, failures_of_the_back_end_are_passed_on);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    return s;
}

int main(void)
{
    SRunner *runner = srunner_create(comm_suite());
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
