/* gemm.c - how a product is cut into items for the pool. Neither the cut of the rows of W nor the path depends on the
 * number of threads, so results do not either. */
#include "worker/gemm.h"

#include <cblas.h>
#include <stdlib.h>
#include <string.h>

#include "worker/gemm_internal.h"

enum {
    FEW_MAX = 64,       /* rows of x up to which our own kernels win, see tests/bench */
    ITEM_BYTES = 65536, /* of W in an item of the few-rows path: 5 to 10 us of reading */
    ROW_UNIT = 8,       /* items begin at a multiple of this: whole register blocks */
    PANEL_ROWS = 128,   /* of W in an item of the BLAS path */
    SCRATCH_ALIGN = 64,
};

struct gemm {
    struct thread_pool *pool;
    const struct gemm_kernels *kernels;
    uint32_t max_cols;
    uint64_t scratch_floats; /* per worker */
    float *scratch;
};

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

static void run_few(struct gemm *g, const struct gemm_few_args *a)
{
    uint64_t row_bytes = (uint64_t)a->w->cols * mat_elem_bytes(a->w->dtype);
    uint64_t rows = (ITEM_BYTES / row_bytes + ROW_UNIT) / ROW_UNIT * ROW_UNIT;
    if (rows > a->w->rows)
        rows = a->w->rows;
    struct few_job j = {g->kernels, *a, (uint32_t)rows};
    threads_for(g->pool, (uint32_t)((a->w->rows + rows - 1) / rows), few_item, &j);
}

struct many_job {
    struct gemm *g;
    struct gemm_few_args args;
};

static void many_item(void *arg, uint32_t i, uint32_t worker)
{
    const struct many_job *j = arg;
    const struct gemm_few_args *a = &j->args;
    uint32_t first = i * PANEL_ROWS, K = a->w->cols;
    uint32_t rows = a->w->rows - first < PANEL_ROWS ? a->w->rows - first : PANEL_ROWS;
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
    if (t <= FEW_MAX || w->cols > g->max_cols) {
        run_few(g, &a);
        return;
    }
    struct many_job j = {g, a};
    threads_for(g->pool, (w->rows + PANEL_ROWS - 1) / PANEL_ROWS, many_item, &j);
}

void gemm_row(float *out, const struct mat *w, uint32_t row)
{
    best_kernels()->widen(out, (const uint8_t *)w->data + (uint64_t)row * w->cols * mat_elem_bytes(w->dtype), w->cols,
                          w->dtype);
}
