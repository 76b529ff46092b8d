/* gemm.c - how a product is cut into items for the pool. Neither the cut of the rows of W nor the path depends on the
 * number of threads, so results do not either. */
#include "worker/gemm.h"

#include <cblas.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "worker/gemm_internal.h"

enum {
    /* Rows of x up to which our own kernels beat the BLAS (bench_gemm, AVX-512): the BLAS repacks W on every call, and
     * 16-bit weights must be widened for it first. */
    FEW_MAX_F32 = 96,
    FEW_MAX_16 = 128,
    FEW_MAX_PORTABLE = 8, /* without vectors worth the name */
    ITEM_NS = 6000,       /* of a thread's time in an item of the few-rows path, at about the two speeds below */
    BYTES_PER_NS = 10,
    FLOPS_PER_NS = 100,
    ROW_UNIT = 8,     /* items begin at a multiple of this: whole register blocks */
    PANEL_ROWS = 128, /* of W in an item of the BLAS path, at most */
    PANELS = 8,       /* and about so many of them, so that threads share small matrices evenly, but no panel below */
    PANEL_MIN = 32,
    SCRATCH_ALIGN = 64,
};

struct gemm {
    struct thread_pool *pool;
    const struct gemm_kernels *kernels;
    uint32_t few_max_f32, few_max_16;
    uint32_t max_cols;
    uint64_t scratch_floats; /* per worker */
    float *scratch;
};

#if defined __x86_64__ && defined __GLIBC__
/* OpenBLAS chooses its kernels by a list of processors, and on one that came after it those of 2004: a fraction of the speed, and
 * sums that depend on the number of rows. Another choice it takes from the environment alone, as it is loaded. So there the
 * program begins anew, once, before anything else has happened. */
__attribute__((constructor)) static void begin_with_newer_kernels(int argc, char **argv)
{
    (void)argc;
    if (getenv("OPENBLAS_CORETYPE") || strcmp(openblas_get_corename(), "Prescott") != 0)
        return;
    __builtin_cpu_init();
    const char *core = NULL;
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        core = "SkylakeX";
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        core = "Haswell";
    char path[4096]; /* itself, not the link: the process is called after it */
    const ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (core && n > 0 && (size_t)n < sizeof path - 1 && setenv("OPENBLAS_CORETYPE", core, 1) == 0) {
        path[n] = 0;
        execv(path, argv); /* where that cannot be, it is slow */
    }
}
#endif

static const struct gemm_kernels *best_kernels(void)
{
    const struct gemm_kernels *list[GEMM_MAX_KERNELS];
    gemm_kernels_list(list);
    return list[0];
}

enum status_code gemm_create(struct gemm **out, struct thread_pool *pool, uint32_t max_cols, struct status *st)
{
    struct gemm *g = calloc(1, sizeof *g);
    if (!g)
        return status_nomem(st, "gemm", sizeof *g);
    g->pool = pool;
    g->kernels = best_kernels();
    g->few_max_f32 = g->kernels == &gemm_kernels_portable ? FEW_MAX_PORTABLE : FEW_MAX_F32;
    g->few_max_16 = g->kernels == &gemm_kernels_portable ? FEW_MAX_PORTABLE : FEW_MAX_16;
    g->max_cols = max_cols;
    g->scratch_floats = (uint64_t)PANEL_ROWS * max_cols;
    size_t bytes = threads_count(pool) * g->scratch_floats * sizeof(float);
    if (bytes) {
        g->scratch = aligned_alloc(SCRATCH_ALIGN, bytes);
        if (!g->scratch) {
            gemm_destroy(g);
            return status_nomem(st, "gemm scratch", bytes);
        }
    }
    openblas_set_num_threads(1); /* our pool does the threading */
    *out = g;
    return ST_OK;
}

void gemm_destroy(struct gemm *g)
{
    if (!g)
        return;
    free(g->scratch);
    free(g);
}

struct few_job {
    const struct gemm_kernels *kernels;
    struct gemm_few_args args;
    uint32_t item_rows;
};

static void few_item(void *arg, uint32_t i, uint32_t worker)
{
    (void)worker;
    const struct few_job *j = arg;
    uint32_t first = i * j->item_rows;
    uint32_t left = j->args.w->rows - first;
    j->kernels->few(&j->args, first, first + (left < j->item_rows ? left : j->item_rows));
}

static uint32_t round_up(uint64_t n, uint32_t unit)
{
    return (uint32_t)((n + unit - 1) / unit * unit);
}

static void run_few(struct gemm *g, const struct gemm_few_args *a)
{
    uint32_t N = a->w->rows, K = a->w->cols;
    uint64_t read_ns = (uint64_t)K * mat_elem_bytes(a->w->dtype) / BYTES_PER_NS;
    uint64_t flop_ns = (uint64_t)K * a->t * 2 / FLOPS_PER_NS;
    uint64_t row_ns = 1 + (read_ns > flop_ns ? read_ns : flop_ns);
    uint32_t rows = round_up(ITEM_NS / row_ns + 1, ROW_UNIT);
    struct few_job j = {g->kernels, *a, rows};
    threads_for(g->pool, (N - 1) / rows + 1, few_item, &j);
}

struct many_job {
    struct gemm *g;
    struct gemm_few_args args;
    uint32_t panel_rows;
};

static void many_item(void *arg, uint32_t i, uint32_t worker)
{
    const struct many_job *j = arg;
    const struct gemm_few_args *a = &j->args;
    uint32_t first = i * j->panel_rows, K = a->w->cols;
    uint32_t rows = a->w->rows - first < j->panel_rows ? a->w->rows - first : j->panel_rows;
    const uint8_t *src = (const uint8_t *)a->w->data + (uint64_t)first * K * mat_elem_bytes(a->w->dtype);
    const float *panel = (const float *)src;
    if (a->w->dtype != MAT_F32) {
        float *wide = j->g->scratch + worker * j->g->scratch_floats;
        j->g->kernels->widen(wide, src, (uint64_t)rows * K, a->w->dtype);
        panel = wide;
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)a->t, (blasint)rows, (blasint)K, 1.0f, a->x,
                (blasint)a->ldx, panel, (blasint)K, 0.0f, a->y + first, (blasint)a->ldy);
}

static void run_many(struct gemm *g, const struct gemm_few_args *a)
{
    uint32_t rows = round_up(a->w->rows / PANELS + 1, PANEL_MIN);
    rows = rows < PANEL_ROWS ? rows : PANEL_ROWS;
    struct many_job j = {g, *a, rows};
    threads_for(g->pool, (a->w->rows - 1) / rows + 1, many_item, &j);
}

void gemm_run(struct gemm *g, float *y, uint64_t ldy, const float *x, uint64_t ldx, uint32_t t, const struct mat *w)
{
    if (t == 0 || w->rows == 0)
        return;
    if (w->cols == 0) {
        for (uint32_t i = 0; i < t; i++)
            memset(y + i * ldy, 0, w->rows * sizeof *y);
        return;
    }
    struct gemm_few_args a = {y, ldy, x, ldx, t, w};
    if (t <= (w->dtype == MAT_F32 ? g->few_max_f32 : g->few_max_16) || w->cols > g->max_cols)
        run_few(g, &a);
    else
        run_many(g, &a);
}

void gemm_row(float *out, const struct mat *w, uint32_t row)
{
    best_kernels()->widen(out, (const uint8_t *)w->data + (uint64_t)row * w->cols * mat_elem_bytes(w->dtype), w->cols,
                          w->dtype);
}
