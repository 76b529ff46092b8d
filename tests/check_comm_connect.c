/* check_comm_connect.c - how ranks on GPUs agree on a way, without a GPU: two ranks as threads over imitations of the CUDA runtime
 * and of NCCL. What the ways do on GPUs: gpu/check_comm_gpu.c. */
#include <check.h>
#include <dlfcn.h>
#include <nccl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_gpu_internal.h"
#include "comm/comm_internal.h"
#include "tests/comm_fake.h"
#include "tests/fake_cudart.h"
#include "tests/fake_nccl.h"

#define RANKS 2

/* ---- two ranks ---- */

static struct group {
    pthread_barrier_t met;
    const void *send[RANKS];
    uint32_t machines;
} group;

static enum status_code pair_all_gather(struct comm *c, const void *send, void *recv, const size_t *bytes,
                                        struct status *st)
{
    (void)st;
    group.send[c->rank] = send;
    pthread_barrier_wait(&group.met);
    memcpy((char *)recv + (c->rank ? 0 : bytes[0]), group.send[!c->rank], bytes[!c->rank]);
    pthread_barrier_wait(&group.met);
    return ST_OK;
}

static enum status_code pair_broadcast(struct comm *c, void *x, size_t bytes, uint32_t root, struct status *st)
{
    (void)st;
    group.send[c->rank] = x;
    pthread_barrier_wait(&group.met);
    if (c->rank != root)
        memcpy(x, group.send[root], bytes);
    pthread_barrier_wait(&group.met);
    return ST_OK;
}

static const struct comm_ops comm_ops_pair = {.name = "pair",
                                              .open = comm_fake_open,
                                              .close = comm_fake_close,
                                              .all_gather = pair_all_gather,
                                              .broadcast = pair_broadcast};

struct rank {
    uint32_t number;
    enum comm_gpu_way way;
    const char *nccl;
    void (*then)(struct rank *r); /* once connected; NULL: nothing */

    struct comm *comm;
    struct comm_gpu *g;
    enum status_code rc;
    struct status st;
    char text[320];
    bool peer_gather, clean;
};

static void *rank_main(void *arg)
{
    struct rank *r = arg;
    comm_fake.rank = r->number;
    comm_fake.size = RANKS;
    comm_fake.local_size = RANKS / group.machines;
    fake_cudart_rank(r->number);
    struct comm_gpu_config cfg = {.device = (int)r->number,
                                  .max_rows = 64,
                                  .hidden = 64,
                                  .gather_rows = 4,
                                  .cols_first = 100 * r->number,
                                  .cols_count = 100,
                                  .cols_total = 200,
                                  .way = r->way,
                                  .nccl = r->nccl};
    ck_assert_int_eq(comm_create(&r->comm, &(struct comm_config){.ops = &comm_ops_pair, .timeout_ms = 20000}, NULL),
                     ST_OK);
    cfg.comm = r->comm;
    ck_assert_int_eq(comm_gpu_create(&r->g, &cfg, NULL), ST_OK);
    r->rc = comm_gpu_connect(r->g, &r->st);
    if (r->rc == ST_OK) {
        snprintf(r->text, sizeof r->text, "%s", comm_gpu_text(r->g));
        r->peer_gather = r->g->peer_gather;
        static const uint8_t zeros[64];
        r->clean = memcmp(comm_gpu_part(r->g, 0), zeros, sizeof zeros) == 0;
        if (r->then)
            r->then(r);
    }
    pthread_barrier_wait(&group.met);
    comm_gpu_destroy(r->g);
    comm_destroy(r->comm);
    return NULL;
}

static struct fake_nccl_control *nccl;

static void run(struct rank rank[RANKS])
{
    pthread_t thread[RANKS];
    void *library = dlopen(TEST_FAKE_NCCL, RTLD_NOW | RTLD_LOCAL);
    ck_assert_msg(library, "%s", dlerror());
    nccl = dlsym(library, FAKE_NCCL_CONTROL);
    ck_assert_ptr_nonnull(nccl);
    group.machines = group.machines ? group.machines : 1;
    ck_assert_int_eq(pthread_barrier_init(&group.met, NULL, RANKS), 0);
    for (uint32_t r = 0; r < RANKS; r++) {
        rank[r].number = r;
        rank[r].st = (struct status)STATUS_INIT;
        ck_assert_int_eq(pthread_create(&thread[r], NULL, rank_main, &rank[r]), 0);
    }
    for (uint32_t r = 0; r < RANKS; r++)
        ck_assert_int_eq(pthread_join(thread[r], NULL), 0);
    pthread_barrier_destroy(&group.met);
    ck_assert_int_eq(fake_cudart.mapped, 0);
}

/* ---- core ---- */

START_TEST(ranks_that_reach_each_other_use_peer_memory)
{
    struct rank rank[RANKS] = {{.way = COMM_GPU_AUTO, .nccl = TEST_FAKE_NCCL},
                               {.way = COMM_GPU_AUTO, .nccl = TEST_FAKE_NCCL}};
    run(rank);
    for (uint32_t r = 0; r < RANKS; r++) {
        ck_assert_msg(rank[r].rc == ST_OK, "%s", rank[r].st.message);
        ck_assert(rank[r].peer_gather && rank[r].clean);
        ck_assert_str_eq(rank[r].text, "peer memory, pushed");
    }
    ck_assert_int_gt(fake_cudart.launched, 0);
}
END_TEST

struct case_apart {
    enum fake_reach reach[RANKS];
    const char *text[RANKS]; /* of each rank, what it says of peer memory */
};

static const struct case_apart apart[] = {
    {{FAKE_REFUSES, FAKE_REFUSES},
     {"memory of rank 1 cannot be mapped: invalid argument", "memory of rank 0 cannot be mapped: invalid argument"}},
    {{FAKE_REACHES, FAKE_REFUSES},
     {"another rank cannot map it", "memory of rank 0 cannot be mapped: invalid argument"}},
    {{FAKE_CONFUSES, FAKE_REACHES},
     {"memory of rank 1 cannot be mapped: what is mapped is not that", "another rank cannot map it"}},
};
#define APART (int)(sizeof apart / sizeof *apart)

START_TEST(ranks_that_do_not_all_agree_on_nccl)
{
    const struct case_apart *a = &apart[_i];
    struct rank rank[RANKS] = {{.way = COMM_GPU_AUTO, .nccl = TEST_FAKE_NCCL},
                               {.way = COMM_GPU_AUTO, .nccl = TEST_FAKE_NCCL}};
    memcpy(fake_cudart.reach, a->reach, sizeof a->reach);
    run(rank);
    for (uint32_t r = 0; r < RANKS; r++) {
        char wanted[200];
        ck_assert_msg(rank[r].rc == ST_OK, "%s", rank[r].st.message);
        ck_assert(!rank[r].peer_gather && rank[r].clean);
        snprintf(wanted, sizeof wanted, "NCCL 2.28.9, as peer memory is out of reach: %s", a->text[r]);
        ck_assert_str_eq(rank[r].text, wanted);
    }
    ck_assert_int_eq(fake_cudart.launched, 0);
    ck_assert_int_eq(nccl->live, 0);
}
END_TEST

START_TEST(ranks_of_two_machines_do_not_try_peer_memory)
{
    struct rank rank[RANKS] = {{.way = COMM_GPU_AUTO, .nccl = TEST_FAKE_NCCL},
                               {.way = COMM_GPU_AUTO, .nccl = TEST_FAKE_NCCL}};
    group.machines = 2;
    run(rank);
    for (uint32_t r = 0; r < RANKS; r++) {
        ck_assert_int_eq(rank[r].rc, ST_OK);
        ck_assert_str_eq(rank[r].text,
                         "NCCL 2.28.9, as peer memory is out of reach: the ranks are on several machines");
    }
}
END_TEST

/* ---- faults ---- */

START_TEST(peer_memory_that_is_wanted_and_out_of_reach_is_an_error_on_all)
{
    struct rank rank[RANKS] = {{.way = COMM_GPU_PEER, .nccl = TEST_FAKE_NCCL},
                               {.way = COMM_GPU_PEER, .nccl = TEST_FAKE_NCCL}};
    fake_cudart.reach[1] = FAKE_REFUSES;
    run(rank);
    ck_assert_int_eq(rank[0].rc, ST_FAILED_PRECONDITION);
    ck_assert_int_eq(rank[1].rc, ST_FAILED_PRECONDITION);
    ck_assert_str_eq(rank[0].st.message, "no way between the GPUs of the ranks: peer memory: another rank cannot map "
                                         "it; NCCL: not wanted");
    ck_assert_msg(strstr(rank[1].st.message, "peer memory: memory of rank 0 cannot be mapped: invalid argument"), "%s",
                  rank[1].st.message);
}
END_TEST

START_TEST(no_way_at_all_is_an_error_on_all)
{
    struct rank rank[RANKS] = {{.way = COMM_GPU_AUTO, .nccl = "/no/such/libnccl.so"},
                               {.way = COMM_GPU_AUTO, .nccl = TEST_FAKE_NCCL}};
    fake_cudart.reach[0] = FAKE_REFUSES;
    run(rank);
    for (uint32_t r = 0; r < RANKS; r++)
        ck_assert_int_eq(rank[r].rc, ST_FAILED_PRECONDITION);
    ck_assert_msg(strstr(rank[0].st.message, "/no/such/libnccl.so"), "%s", rank[0].st.message);
    ck_assert_msg(strstr(rank[1].st.message, "NCCL: another rank lacks it"), "%s", rank[1].st.message);
}
END_TEST

static void finish_at_once(struct rank *r)
{
    r->rc = comm_gpu_finish(r->g, NULL, &r->st);
}

/* Rank 0 waits for sums that do not come, as the connection to rank 1 has broken. */
static void wait_for_lost_peer(struct rank *r)
{
    if (r->number != 0)
        return;
    bool done = true;
    uint64_t start = comm_now_ns();
    fake_cudart.ends = &nccl->ended; /* kernels, when they are told to */
    atomic_store(&fake_cudart.pending, true);
    ck_assert_int_eq(comm_gpu_poll(r->g, NULL, &done, &r->st), ST_OK); /* all is well yet */
    ck_assert(!done);
    ck_assert_int_eq(nccl->asked, 1);
    atomic_store(&nccl->error, ncclInProgress);
    ck_assert_int_eq(comm_gpu_poll(r->g, NULL, &done, &r->st), ST_OK);
    atomic_store(&nccl->error, ncclRemoteError);
    r->rc = comm_gpu_finish(r->g, NULL, &r->st);
    ck_assert_uint_lt(comm_now_ns() - start, 10000 * UINT64_C(1000000)); /* of 20 s */
    ck_assert_int_eq(nccl->ended, 1);
    ck_assert_int_eq(comm_barrier(r->comm, NULL), ST_ABORTED);
}

START_TEST(a_peer_that_nccl_has_lost_ends_the_wait)
{
    struct rank rank[RANKS] = {{.way = COMM_GPU_NCCL, .nccl = TEST_FAKE_NCCL, .then = wait_for_lost_peer},
                               {.way = COMM_GPU_NCCL, .nccl = TEST_FAKE_NCCL}};
    run(rank);
    ck_assert_int_eq(rank[0].rc, ST_UNAVAILABLE);
    ck_assert_str_eq(rank[0].st.message, "NCCL: remote process exited or there was a network error: socketProgress: "
                                         "Connection closed by remote peer 10.1.2.3");
    ck_assert_int_eq(nccl->ended, 1);
    ck_assert_int_eq(nccl->live, 0); /* rank 1 has left in order */
}
END_TEST

START_TEST(steps_that_have_ended_are_not_asked_about)
{
    struct rank rank[RANKS] = {{.way = COMM_GPU_NCCL, .nccl = TEST_FAKE_NCCL},
                               {.way = COMM_GPU_NCCL, .nccl = TEST_FAKE_NCCL}};
    rank[0].then = rank[1].then = finish_at_once;
    run(rank);
    ck_assert_int_eq(rank[0].rc, ST_OK);
    ck_assert_int_eq(nccl->asked, 0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("comm_connect");
    TCase *core = tcase_create("core"), *faults = tcase_create("faults");
    tcase_add_test(core, ranks_that_reach_each_other_use_peer_memory);
    tcase_add_loop_test(core, ranks_that_do_not_all_agree_on_nccl, 0, APART);
    tcase_add_test(core, ranks_of_two_machines_do_not_try_peer_memory);
    tcase_add_test(faults, peer_memory_that_is_wanted_and_out_of_reach_is_an_error_on_all);
    tcase_add_test(core, steps_that_have_ended_are_not_asked_about);
    tcase_add_test(faults, a_peer_that_nccl_has_lost_ends_the_wait);
    tcase_add_test(faults, no_way_at_all_is_an_error_on_all);
    suite_add_tcase(s, core);
    suite_add_tcase(s, faults);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
