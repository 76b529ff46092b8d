/* bench_comm.c - time of comm_all_reduce over MPI, beside plain blocking MPI_Allreduce, for 1 KiB to 4 MiB.
 *
 *     mpirun -np 2 --oversubscribe bin/bench_comm [milliseconds per figure, default 300]
 *
 * Median and 99th percentile of single operations on rank 0; every operation starts after the last has ended on all
 * ranks only as far as the operation itself makes it so, as in a forward pass.
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "comm/comm.h"

#define SAMPLES_MAX 20000u

struct bench {
    struct comm *c;
    float *x;
    size_t n;
    double us[SAMPLES_MAX];
};

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void fail(const char *what, const struct status *st)
{
    fprintf(stderr, "bench_comm: %s: %s\n", what, st->message);
    exit(1);
}

static void ours(struct bench *b)
{
    struct status st = STATUS_INIT;
    if (comm_all_reduce(b->c, b->x, b->n, &st) != ST_OK)
        fail("all_reduce", &st);
}

static void plain(struct bench *b)
{
    MPI_Allreduce(MPI_IN_PLACE, b->x, (int)b->n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}

/* All ranks must make the same number of calls: rank 0 times ten and says how many fit. */
static void measure(struct bench *b, void (*op)(struct bench *), double budget_us, double *median, double *p99)
{
    struct status st = STATUS_INIT;
    for (int i = 0; i < 3; i++)
        op(b);
    double t = now_us();
    for (int i = 0; i < 10; i++)
        op(b);
    unsigned rounds = (unsigned)(budget_us / ((now_us() - t) / 10 + 0.1));
    rounds = rounds < 20 ? 20 : rounds > SAMPLES_MAX ? SAMPLES_MAX : rounds;
    if (comm_broadcast(b->c, &rounds, sizeof rounds, 0, &st) != ST_OK)
        fail("broadcast", &st);
    for (unsigned i = 0; i < rounds; i++) {
        double from = now_us();
        op(b);
        b->us[i] = now_us() - from;
    }
    qsort(b->us, rounds, sizeof *b->us, ascending);
    *median = b->us[rounds / 2];
    *p99 = b->us[rounds * 99 / 100];
}

int main(int argc, char **argv)
{
    static struct bench b;
    struct status st = STATUS_INIT;
    double budget_us = (argc > 1 ? atof(argv[1]) : 300) * 1e3;
    if (comm_create(&b.c, &(struct comm_config){.ops = &comm_ops_mpi}, &st) != ST_OK)
        fail("create", &st);
    size_t max = 1u << 20;
    b.x = calloc(max, sizeof *b.x);
    if (!b.x)
        return 1;
    if (comm_rank(b.c) == 0)
        printf("%u ranks\n%10s %12s %10s %12s %10s %8s\n", comm_size(b.c), "bytes", "comm us", "p99", "MPI us", "p99",
               "GB/s");
    for (b.n = 256; b.n <= max; b.n *= 2) {
        double m[2], p[2];
        measure(&b, ours, budget_us, &m[0], &p[0]);
        measure(&b, plain, budget_us, &m[1], &p[1]);
        if (comm_rank(b.c) == 0)
            printf("%10zu %12.1f %10.1f %12.1f %10.1f %8.2f\n", b.n * sizeof *b.x, m[0], p[0], m[1], p[1],
                   (double)(b.n * sizeof *b.x) / m[0] / 1e3);
    }
    comm_destroy(b.c);
    free(b.x);
    return 0;
}
