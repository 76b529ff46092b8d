/* mpi_comm.c - the MPI back end of comm.h, as ranks of one job:
 *
 *     mpirun -np R mpi_comm ops        every operation, sizes and values chosen to hurt; also without mpirun (R = 1)
 *     mpirun -np R mpi_comm timeout    the last rank stops itself (SIGSTOP): the others name it after the timeout
 *     mpirun -np R mpi_comm abort      the last rank does not come: the others are aborted by a thread of their own
 *     mpirun -np R mpi_comm killed     the last rank kills itself (SIGKILL): mpirun must end the job
 *
 * A rank prints "rank N: MODE ok" and exits with 0, or says "FAIL ..." and exits with 1. After timeout and abort no rank
 * can finalise MPI, so mpirun reports failure: go by the lines. TANDEM_TEST_SEED changes the values.
 */
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "comm/comm.h"

#define RANKS_MAX 64u

/* Of mode "timeout". Ranks start and meet within it, too, on a loaded machine. */
#ifdef TANDEM_SANITIZED
#define SHORT_TIMEOUT_MS 6000u
#else
#define SHORT_TIMEOUT_MS 2000u
#endif

static struct comm *group; /* of the whole program, like its rank and size */
static uint32_t rank, size;

static void fail(const char *where, const char *message)
{
    printf("FAIL rank %u: %s: %s\n", rank, where, message);
    fflush(stdout);
    _exit(1); /* mpirun ends the others */
}

#define CHECK(cond)                                                                                                    \
    do {                                                                                                               \
        if (!(cond))                                                                                                   \
            fail(__func__, #cond);                                                                                     \
    } while (0)

#define RUN(call)                                                                                                      \
    do {                                                                                                               \
        struct status run_st = STATUS_INIT;                                                                            \
        if ((call) != ST_OK)                                                                                           \
            fail(__func__, run_st.message);                                                                            \
    } while (0)
#define ST (&run_st)

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void sleep_ms(long ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

/* A number that every rank can compute for every other: that is what the expected results are made of. */
static uint32_t hash(uint32_t a, uint32_t b, uint32_t c)
{
    static uint32_t seed;
    if (!seed)
        seed = getenv("TANDEM_TEST_SEED") ? (uint32_t)strtoul(getenv("TANDEM_TEST_SEED"), NULL, 0) | 1 : 12345;
    uint32_t h = seed ^ a * 0x9e3779b1u ^ b * 0x85ebca77u ^ c * 0xc2b2ae3du;
    h = (h ^ h >> 15) * 0x2c1b3c6du;
    h = (h ^ h >> 12) * 0x297a2d39u;
    return h ^ h >> 15;
}

/* Magnitudes from 1e-30 to 1e30 with both signs: any other order of additions gives other bits. */
static float value(uint32_t of_rank, uint32_t i, uint32_t round)
{
    uint32_t h = hash(of_rank, i, round);
    static const float scale[8] = {1, 1e-30f, 1e30f, 1e7f, -1e7f, 3e-8f, -1, 1e15f};
    return ((float)(h >> 8) / (float)(1 << 24) + 0.5f) * scale[h & 7];
}

/* A byte of a long message; cheap, and of no period that a lost or doubled piece could hide in. */
static inline uint8_t byte_at(uint32_t who, size_t i)
{
    return (uint8_t)(i ^ i >> 8 ^ i >> 16 ^ i >> 24 ^ who * 37);
}

/* --- operations --- */

static void all_reduce_once(uint32_t n, uint32_t round)
{
    float *x = malloc((n + 1) * sizeof *x);
    for (uint32_t i = 0; i < n; i++)
        x[i] = value(rank, i, round);
    x[n] = 42;
    RUN(comm_all_reduce(group, x, n, ST));
    CHECK(x[n] == 42);
    for (uint32_t i = 0; i < n; i++) {
        volatile float sum = value(0, i, round); /* in the order of ranks, rounded to float each time */
        for (uint32_t r = 1; r < size; r++)
            sum += value(r, i, round);
        float want = sum;
        if (memcmp(&want, &x[i], sizeof want) != 0) {
            char text[128];
            snprintf(text, sizeof text, "n %u, element %u: %a, expected %a", n, i, (double)x[i], (double)want);
            fail(__func__, text);
        }
    }
    free(x);
}

static void all_reduce_is_the_sum_in_rank_order(void)
{
    static const uint32_t sizes[] = {1,     2,     3,     5,      15,     16,     17,     63,     255,     256,
                                     257,   288,   1000,  4095,   4096,   4097,   8191,   8192,   8193,    16384,
                                     32768, 65535, 65537, 131072, 200001, 524287, 524288, 524289, 1048576, 1200007};
    for (uint32_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        all_reduce_once(sizes[i], i);
}

/* The bytes of every rank, compared by all: equal also where the sum is not a number. */
static void all_reduce_gives_all_ranks_the_same_bits(void)
{
    enum { N = 20011 };
    static float x[N], all[RANKS_MAX][N];
    static const float odd[6] = {1e38f, 3e38f, -3e38f, 1e-45f, -0.0f, 65504};
    size_t bytes[RANKS_MAX];
    for (uint32_t r = 0; r < size; r++)
        bytes[r] = sizeof x;
    for (uint32_t n = 500; n <= N; n += N - 500) {
        for (uint32_t i = 0; i < N; i++)
            x[i] = odd[hash(rank, i, 7) % 6]; /* sums overflow, both ways */
        RUN(comm_all_reduce(group, x, n, ST));
        RUN(comm_all_gather(group, x, all, bytes, ST));
        for (uint32_t r = 0; r < size; r++)
            CHECK(memcmp(all[r], all[0], n * sizeof *x) == 0);
    }
}

static void gather_once(const size_t *bytes, bool in_place)
{
    size_t total = 0, own = 0;
    for (uint32_t r = 0; r < size; r++) {
        own = r == rank ? total : own;
        total += bytes[r];
    }
    uint8_t *recv = malloc(total + 1), *send = malloc(bytes[rank] + 1);
    memset(recv, 0xee, total + 1);
    uint8_t *from = in_place ? recv + own : send;
    for (size_t i = 0; i < bytes[rank]; i++)
        from[i] = byte_at(rank, i);
    RUN(comm_all_gather(group, from, recv, bytes, ST));
    const uint8_t *p = recv;
    for (uint32_t r = 0; r < size; r++)
        for (size_t i = 0; i < bytes[r]; i++)
            if (*p++ != byte_at(r, i))
                fail(__func__, "a byte differs");
    CHECK(*p == 0xee);
    free(send);
    free(recv);
}

static void all_gather_puts_parts_in_rank_order(void)
{
    static const size_t big[] = {1, 7, 64, 4096, 4097, 65536, 1000003};
    size_t bytes[RANKS_MAX];
    for (uint32_t i = 0; i < sizeof big / sizeof *big; i++) {
        for (uint32_t r = 0; r < size; r++)
            bytes[r] = big[i];
        gather_once(bytes, i % 2);
        for (uint32_t r = 0; r < size; r++) /* uneven, as vocabulary shards are; some ranks have nothing */
            bytes[r] = hash(r, i, 9) % 3 == 0 ? 0 : hash(r, i, 10) % (big[i] + 1);
        gather_once(bytes, i % 2 == 0);
        for (uint32_t r = 0; r < size; r++) /* all from one */
            bytes[r] = r == i % size ? big[i] : 0;
        gather_once(bytes, false);
        gather_once(bytes, true);
    }
}

/* Longer than one MPI message of the back end (64 MiB). Only few ranks: the memory is for all of them. */
static void messages_of_several_pieces_arrive(void)
{
    if (size != 2)
        return;
    size_t bytes[2] = {(64u << 20) + 5, 3};
    gather_once(bytes, true);
    uint8_t *x = malloc(bytes[0]);
    for (size_t i = 0; i < bytes[0]; i++)
        x[i] = rank == 1 ? byte_at(1, i) : 0;
    RUN(comm_broadcast(group, x, bytes[0], 1, ST));
    for (size_t i = 0; i < bytes[0]; i++)
        if (x[i] != byte_at(1, i))
            fail(__func__, "a byte differs");
    free(x);
}

static void broadcast_reaches_all_from_any_root(void)
{
    static const size_t sizes[] = {1, 3, 4096, 4097, 100001, 3000001};
    for (uint32_t root = 0; root < size; root++)
        for (uint32_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            uint8_t *x = malloc(sizes[i]);
            for (size_t k = 0; k < sizes[i]; k++)
                x[k] = rank == root ? byte_at(root + i, k) : 0xcc;
            RUN(comm_broadcast(group, x, sizes[i], root, ST));
            for (size_t k = 0; k < sizes[i]; k++)
                if (x[k] != byte_at(root + i, k))
                    fail(__func__, "a byte differs");
            free(x);
        }
}

/* CLOCK_MONOTONIC is the same on all ranks of one machine: nobody may leave before the last has come. */
static void barrier_holds_until_the_last_rank_comes(void)
{
    if (comm_local_size(group) != size)
        return;
    for (uint32_t late = 0; late < size; late++) {
        double came, left, all[RANKS_MAX];
        size_t bytes[RANKS_MAX];
        if (rank == late)
            sleep_ms(20);
        came = now_ms();
        RUN(comm_barrier(group, ST));
        left = now_ms();
        for (uint32_t r = 0; r < size; r++)
            bytes[r] = sizeof came;
        RUN(comm_all_gather(group, &came, all, bytes, ST));
        for (uint32_t r = 0; r < size; r++)
            CHECK(all[r] <= left);
    }
}

static void many_small_operations_stay_in_order(void)
{
    size_t bytes[RANKS_MAX];
    for (uint32_t i = 0; i < 4000; i++) {
        uint32_t what = hash(i, 77, 0) % 4, x[RANKS_MAX];
        float f[300];
        uint32_t n = 1 + hash(i, 78, 0) % 300, root = hash(i, 79, 0) % size;
        if (hash(i, rank, 80) % 50 == 0)
            sched_yield(); /* ranks arrive in any order */
        if (what == 0) {
            RUN(comm_barrier(group, ST));
        } else if (what == 1) {
            for (uint32_t k = 0; k < n; k++)
                f[k] = (float)(rank + k + i);
            RUN(comm_all_reduce(group, f, n, ST));
            for (uint32_t k = 0; k < n; k++)
                CHECK(f[k] == (float)(size * (k + i) + size * (size - 1) / 2));
        } else if (what == 2) {
            x[0] = rank == root ? i : UINT32_MAX;
            RUN(comm_broadcast(group, x, sizeof x[0], root, ST));
            CHECK(x[0] == i);
        } else {
            for (uint32_t r = 0; r < size; r++)
                bytes[r] = sizeof x[0];
            x[rank] = i + rank;
            RUN(comm_all_gather(group, &x[rank], x, bytes, ST));
            for (uint32_t r = 0; r < size; r++)
                CHECK(x[r] == i + r);
        }
    }
}

static double cpu_ms(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e3 +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e3;
}

static void waiting_ranks_leave_the_cores_to_others(void)
{
    if (size == 1)
        return;
    RUN(comm_barrier(group, ST));
    double before = cpu_ms();
    if (rank == 0)
        sleep_ms(500);
    RUN(comm_barrier(group, ST));
    CHECK(cpu_ms() - before < 150);
}

/* Each rank tells n devices from `first` on; the number of the one it takes, UINT32_MAX when a rank finds none. */
static uint32_t device_of(uint32_t first, uint32_t n)
{
    struct comm_devices d = {.count = n};
    struct status st = STATUS_INIT;
    uint32_t taken = 0;
    for (uint32_t i = 0; i < n; i++)
        d.id[i][3] = (uint8_t)(first + i);
    enum status_code rc = comm_take_device(group, &d, &taken, &st);
    CHECK(rc == ST_OK || (rc == ST_FAILED_PRECONDITION && strstr(st.message, "finds no free device")));
    return rc == ST_OK ? first + taken : UINT32_MAX;
}

static void ranks_take_devices(void)
{
    CHECK(comm_machine(group) <= rank);
    if (comm_local_size(group) != size)
        return;
    CHECK(comm_machine(group) == 0);
    CHECK(device_of(0, size) == rank);                           /* all see all */
    CHECK(device_of(size - rank, 1) == size - rank);             /* each its own */
    CHECK(device_of(0, rank + 1) == rank);                       /* and those of the ranks before */
    CHECK(device_of(0, 1) == (size == 1 ? 0 : UINT32_MAX));      /* one for all */
    CHECK(device_of(0, rank == size - 1 ? 0 : 9) == UINT32_MAX); /* the last sees none: all hear it */
}

static void ops(void)
{
    ranks_take_devices();
    CHECK(comm_local_size(group) >= 1 && comm_local_size(group) <= size);
    all_reduce_is_the_sum_in_rank_order();
    all_reduce_gives_all_ranks_the_same_bits();
    all_gather_puts_parts_in_rank_order();
    messages_of_several_pieces_arrive();
    broadcast_reaches_all_from_any_root();
    barrier_holds_until_the_last_rank_comes();
    many_small_operations_stay_in_order();
    waiting_ranks_leave_the_cores_to_others();
}

/* --- failures --- */

/* So that a survivor can end a rank that stopped itself, whatever else happens. */
static pid_t pid_of_last(void)
{
    pid_t all[RANKS_MAX] = {0};
    size_t bytes[RANKS_MAX];
    for (uint32_t r = 0; r < size; r++)
        bytes[r] = sizeof(pid_t);
    all[rank] = getpid();
    RUN(comm_all_gather(group, &all[rank], all, bytes, ST));
    return all[size - 1];
}

/* Rank 0 is the last to judge: only then may the job end. */
static void after_failure(const char *mode, pid_t stopped)
{
    printf("rank %u: %s ok\n", rank, mode);
    fflush(stdout);
    comm_destroy(group); /* must not wait for anyone */
    if (rank == 0) {
        sleep_ms(300);
        if (stopped)
            kill(stopped, SIGKILL);
    } else {
        sleep_ms(SHORT_TIMEOUT_MS);
    }
    _exit(0);
}

static void timeout(uint32_t timeout_ms)
{
    struct status st = STATUS_INIT;
    char name[32];
    pid_t last = pid_of_last();
    static float x[100000];
    snprintf(name, sizeof name, "rank %u", size - 1);
    if (rank == size - 1)
        raise(SIGSTOP);
    double from = now_ms();
    enum status_code rc = comm_all_reduce(group, x, rank % 2 ? 100000 : 100, &st); /* small and big: both must end */
    double took = now_ms() - from;
    if (rc != ST_DEADLINE_EXCEEDED || took < timeout_ms * 0.9 || took > timeout_ms + 1000) {
        printf("FAIL rank %u: %s after %.0f ms: %s\n", rank, status_name(rc), took, st.message);
        fflush(stdout);
    } else if (size == 2 && !strstr(st.message, name)) {
        fail("timeout", st.message);
    } else {
        if (comm_barrier(group, &st) != ST_DEADLINE_EXCEEDED)
            fail("timeout", "a later operation does not fail");
        after_failure("timeout", rank == 0 ? last : 0);
    }
    kill(last, SIGKILL);
    _exit(1);
}

static void *abort_soon(void *started_ms)
{
    sleep_ms(100);
    *(double *)started_ms = now_ms();
    comm_abort(group);
    return NULL;
}

static void aborted(void)
{
    static float x[100000];
    struct status st = STATUS_INIT;
    pthread_t thread;
    double called = 0;
    RUN(comm_barrier(group, ST));
    if (rank == size - 1) {
        sleep_ms(300);
        comm_abort(group);
    } else if (pthread_create(&thread, NULL, abort_soon, &called)) {
        fail("abort", "no thread");
    }
    enum status_code rc = comm_all_reduce(group, x, 100000, &st);
    double back = now_ms();
    if (rank != size - 1)
        pthread_join(thread, NULL);
    if (rc != ST_ABORTED)
        fail("abort", st.message);
    if (rank != size - 1 && back - called > 250) /* 50 ms, and a loaded machine */
        fail("abort", "took too long");
    if (comm_barrier(group, &st) != ST_ABORTED)
        fail("abort", "a later operation does not fail");
    after_failure("abort", 0);
}

static void killed(void)
{
    float x = 1;
    RUN(comm_barrier(group, ST));
    if (rank == size - 1)
        raise(SIGKILL);
    if (comm_all_reduce(group, &x, 1, NULL) == ST_OK)
        fail("killed", "the sum over a dead rank");
    _exit(0);
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "ops";
    uint32_t timeout_ms = strcmp(mode, "timeout") == 0 ? SHORT_TIMEOUT_MS : 60000;
    struct status st = STATUS_INIT;
    if (comm_create(&group, &(struct comm_config){.ops = &comm_ops_mpi, .timeout_ms = timeout_ms}, &st) != ST_OK)
        fail("comm_create", st.message);
    rank = comm_rank(group);
    size = comm_size(group);
    CHECK(rank < size && size <= RANKS_MAX);
    if (strcmp(mode, "timeout") == 0)
        timeout(timeout_ms);
    else if (strcmp(mode, "abort") == 0)
        aborted();
    else if (strcmp(mode, "killed") == 0)
        killed();
    else
        ops();
    struct comm *second = NULL;
    if (comm_create(&second, &(struct comm_config){.ops = &comm_ops_mpi}, &st) != ST_FAILED_PRECONDITION)
        fail("comm_create", "a second group in one process");
    comm_destroy(group);
    printf("rank %u: %s ok\n", rank, mode);
    return 0;
}
