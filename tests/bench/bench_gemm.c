/* bench_gemm.c - products of worker/gemm.h: few rows against the read bandwidth of the machine, many rows against plain
 * cblas_sgemm.
 *
 *     bench_gemm [max threads, default 2]
 *
 * Each figure is the best of several passes over a matrix that no cache holds (few rows), or over one shape (many rows).
 */
#include <cblas.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/gemm.h"
#include "worker/gemm_internal.h"

enum { PASSES = 7, CHUNK = 1 << 20 };

/* One thread is measured in its own processor time, which other processes on the machine disturb less. */
static clockid_t the_clock = CLOCK_MONOTONIC;

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(the_clock, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

struct read_job {
    const float *data;
    _Atomic uint32_t sink;
};

static void read_chunk(void *arg, uint32_t i, uint32_t worker)
{
    typedef uint32_t vec __attribute__((vector_size(32)));
    enum { STREAMS = 8, STEP = CHUNK / STREAMS / sizeof(vec) }; /* as many as the kernels have rows: one is slower */
    (void)worker;
    struct read_job *j = arg;
    const vec *p = (const vec *)((const char *)j->data + (uint64_t)i * CHUNK);
    vec s[STREAMS] = {0};
    for (uint32_t k = 0; k < STEP; k += 2) {
        for (int u = 0; u < STREAMS; u++)
            s[u] |= p[u * STEP + k] | p[u * STEP + k + 1];
    }
    for (int u = 1; u < STREAMS; u++)
        s[0] |= s[u];
    atomic_fetch_or(&j->sink, s[0][0] | s[0][7]);
}

static double read_gbs(struct thread_pool *pool, const void *data, uint64_t bytes)
{
    struct read_job j = {.data = data};
    double best = 1e9;
    for (int pass = 0; pass < PASSES; pass++) {
        double t0 = now_s();
        threads_for(pool, (uint32_t)(bytes / CHUNK), read_chunk, &j);
        double t = now_s() - t0;
        best = t < best ? t : best;
    }
    return (double)bytes / best / 1e9;
}

static double product_s(struct gemm *g, float *y, const float *x, uint32_t t, const struct mat *w, int passes)
{
    double best = 1e9;
    for (int pass = 0; pass < passes; pass++) {
        double t0 = now_s();
        gemm_run(g, y, w->rows, x, w->cols, t, w);
        double s = now_s() - t0;
        best = s < best ? s : best;
    }
    return best;
}

static void bench_few(uint32_t threads, const char *name, enum mat_dtype dtype, uint32_t n, uint32_t k,
                      const void *data, const float *x, float *y)
{
    struct thread_pool *pool;
    struct gemm *g;
    if (threads_create(&pool, threads, NULL) != ST_OK || gemm_create(&g, pool, k, NULL) != ST_OK)
        exit(1);
    struct mat w = {data, dtype, n, k};
    uint64_t bytes = (uint64_t)n * k * mat_elem_bytes(dtype);
    double limit = read_gbs(pool, data, bytes);
    printf("%-5s %6u x %-5u %u thr  read %5.1f GB/s |", name, n, k, threads, limit);
    static const uint32_t ts[] = {1, 2, 4, 6, 8, 12};
    for (size_t i = 0; i < sizeof ts / sizeof *ts; i++) {
        double gbs = (double)bytes / product_s(g, y, x, ts[i], &w, PASSES) / 1e9;
        printf(" T=%u %5.1f (%3.0f%%)", ts[i], gbs, gbs / limit * 100);
    }
    printf("\n");
    gemm_destroy(g);
    threads_destroy(pool);
}

static void bench_many(uint32_t threads, const char *name, enum mat_dtype dtype, uint32_t n, uint32_t k,
                       const void *data, const float *wide, const float *x, float *y)
{
    struct thread_pool *pool;
    struct gemm *g;
    if (threads_create(&pool, threads, NULL) != ST_OK || gemm_create(&g, pool, k, NULL) != ST_OK)
        exit(1);
    struct mat w = {data, dtype, n, k};
    static const uint32_t ts[] = {4, 8, 16, 32, 64, 96, 128, 192, 256, 512};
    printf("%-5s %6u x %-5u %u thr, GFLOP/s ours/blas |", name, n, k, threads);
    for (size_t i = 0; i < sizeof ts / sizeof *ts; i++) {
        double flop = 2.0 * ts[i] * n * k;
        int passes = ts[i] > 64 ? 3 : PASSES;
        double ours = product_s(g, y, x, ts[i], &w, passes);
        openblas_set_num_threads((int)threads);
        double best = 1e9;
        for (int pass = 0; pass < passes; pass++) {
            double t0 = now_s();
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)ts[i], (blasint)n, (blasint)k, 1, x,
                        (blasint)k, wide, (blasint)k, 0, y, (blasint)n);
            double s = now_s() - t0;
            best = s < best ? s : best;
        }
        openblas_set_num_threads(1);
        printf(" T=%u %.0f/%.0f", ts[i], flop / ours / 1e9, flop / best / 1e9);
        fflush(stdout);
    }
    printf("\n");
    gemm_destroy(g);
    threads_destroy(pool);
}

static void nothing(void *arg, uint32_t i, uint32_t worker)
{
    (void)arg;
    (void)i;
    (void)worker;
}

static void bench_dispatch(uint32_t threads)
{
    struct thread_pool *pool;
    if (threads_create(&pool, threads, NULL) != ST_OK)
        exit(1);
    static const uint32_t ns[] = {1, 2, 64, 1024};
    printf("threads_for, %u thr:", threads);
    for (size_t i = 0; i < sizeof ns / sizeof *ns; i++) {
        enum { LOOPS = 20000 };
        uint32_t loops = ns[i] > 100 ? LOOPS / 20 : LOOPS;
        double t0 = now_s();
        for (uint32_t l = 0; l < loops; l++)
            threads_for(pool, ns[i], nothing, NULL);
        double per = (now_s() - t0) / loops;
        printf("  n=%u %.2f us (%.0f ns an item)", ns[i], per * 1e6, per * 1e9 / ns[i]);
    }
    printf("\n");
    threads_destroy(pool);
}

int main(int argc, char **argv)
{
    uint32_t max_threads = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 2;
    const struct gemm_kernels *sets[GEMM_MAX_KERNELS];
    gemm_kernels_list(sets);
    printf("kernels: %s\n", sets[0]->name);
    /* The caches of a server hold hundreds of MB: a matrix must be larger to be read from memory. */
    enum { N = 65536, K = 4096, MAX_T = 512 };
    uint64_t elems = (uint64_t)N * K;
    float *wide = aligned_alloc(64, elems * 4), *x = aligned_alloc(64, (uint64_t)MAX_T * K * 4);
    uint16_t *narrow = (uint16_t *)wide;
    float *y = aligned_alloc(64, (uint64_t)MAX_T * N * 4);
    if (!wide || !x || !y)
        return 1;
    for (uint64_t i = 0; i < elems; i++)
        wide[i] = (float)(i % 2039) / 1024 - 1;
    for (uint64_t i = 0; i < (uint64_t)MAX_T * K; i++)
        x[i] = (float)(i % 1021) / 512 - 1;
    for (uint32_t thr = 1; thr <= max_threads; thr *= 2) {
        the_clock = thr == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
        bench_dispatch(thr);
        bench_few(thr, "f32", MAT_F32, N, K, wide, x, y);
        bench_few(thr, "f32", MAT_F32, 2048, 1024, wide, x, y); /* in the cache */
        bench_many(thr, "f32", MAT_F32, 1024, 1024, wide, wide, x, y);
        bench_many(thr, "f32", MAT_F32, 288, 288, wide, wide, x, y);
        bench_many(thr, "f32", MAT_F32, 4096, 4096, wide, wide, x, y);
    }
    for (uint64_t i = 0; i < elems; i++) {
        uint32_t u;
        float f = (float)(i % 2039) / 1024 - 1;
        memcpy(&u, &f, 4);
        narrow[i] = (uint16_t)(u >> 16);
    }
    float *small = malloc(4096ull * 4096 * 4);
    if (!small)
        return 1;
    for (uint64_t i = 0; i < 4096ull * 4096; i++)
        small[i] = (float)(i % 2039) / 1024 - 1;
    for (uint32_t thr = 1; thr <= max_threads; thr *= 2) {
        the_clock = thr == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
        bench_few(thr, "bf16", MAT_BF16, N, K, narrow, x, y);
        bench_few(thr, "bf16", MAT_BF16, 2048, 1024, narrow, x, y);
        bench_few(thr, "f16", MAT_F16, N, K, narrow, x, y);
        bench_many(thr, "bf16", MAT_BF16, 1024, 1024, narrow, small, x, y);
        bench_many(thr, "bf16", MAT_BF16, 288, 288, narrow, small, x, y);
        bench_many(thr, "bf16", MAT_BF16, 4096, 4096, narrow, small, x, y);
    }
    free(small);
    free(wide);
    free(x);
    free(y);
    return 0;
}
