/* cuda_gemm_choose.c - which way a product goes: cuBLASLt's suggestions and the own kernels are tried once per shape, and what was
 * fastest is kept in a file.
 */
#include <stdio.h>
#include <time.h>

#include "worker/cuda_gemm_internal.h"

#define TRIES_MAX     12  /* algorithms that are tried for a shape */
#define GLU_TRIES_MAX 6   /* and ways of cuda_glu.cu */
#define ALIGN_MAX     64u /* what model_weights.c and the activations keep to */
#define OWN_WAYS      3 /* another number when own kernels have become faster or slower, so that all is measured anew */

static bool few_rows_fit(const struct cuda_product *p)
{
    return p->rows <= CUDA_FEW_ROWS_MAX && p->w->cols % 8 == 0;
}

static bool some_rows_fit(const struct cuda_product *p)
{
    return p->rows > CUDA_FEW_ROWS_MAX && p->rows <= CUDA_SOME_ROWS_MAX && p->w->cols % 8 == 0;
}

static bool glu_is_for(const struct shape *s)
{
    return s->out == CUDA_OUT_SWIGLU && s->t > CUDA_FEW_ROWS_MAX;
}

static uint32_t glu_ways(const struct cuda_gemm *g, const struct shape *s, struct cuda_glu_way *out, uint32_t max)
{
    return glu_is_for(s) ? cuda_glu_suggest(&g->glu, out, max, s->t, s->n / 2, s->k) : 0;
}

/* The largest power of two that divides every row's start, when the first is at a multiple of ALIGN_MAX. */
static uint32_t row_alignment(uint64_t row_bytes)
{
    uint32_t align = ALIGN_MAX;
    while (row_bytes % align)
        align /= 2;
    return align;
}

static enum status_code candidates(const struct cuda_gemm *g, const struct shape *s,
                                   cublasLtMatmulHeuristicResult_t *found, int *n, struct status *st)
{
    cublasLtMatmulPreference_t wish;
    enum status_code rc = cuda_gemm_check(cublasLtMatmulPreferenceCreate(&wish), st, "cublasLtMatmulPreferenceCreate");
    if (rc != ST_OK)
        return rc;
    const uint64_t workspace = CUDA_GEMM_WORKSPACE_BYTES;
    const uint32_t in = row_alignment(2ull * s->k),
                   out = row_alignment((cuda_gemm_is_bf16(s->out) ? 2ull : 4ull) * s->n);
    /* One order of adding: no parts of k. Without this wish a long k gets suggestions with parts alone. */
    const uint32_t reductions = g->one_way ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_MASK;
    const struct {
        cublasLtMatmulPreferenceAttributes_t name;
        const void *value;
        size_t bytes;
    } set[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &in, sizeof in},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &in, sizeof in},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out, sizeof out},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out, sizeof out},
    };
    for (size_t i = 0; rc == ST_OK && i < sizeof set / sizeof *set; i++)
        rc = cuda_gemm_check(cublasLtMatmulPreferenceSetAttribute(wish, set[i].name, set[i].value, set[i].bytes), st,
                             "cublasLtMatmulPreferenceSetAttribute");
    if (rc == ST_OK) {
        cublasStatus_t got =
            cublasLtMatmulAlgoGetHeuristic(g->handle, s->desc, s->w, s->x, s->y, s->y, wish, TRIES_MAX, found, n);
        rc = got == CUBLAS_STATUS_NOT_SUPPORTED ? (*n = 0, ST_OK)
                                                : cuda_gemm_check(got, st, "cublasLtMatmulAlgoGetHeuristic");
    }
    cublasLtMatmulPreferenceDestroy(wish);
    return rc;
}

/* Milliseconds of a round of turns, or less than 0 when it does not run. */
static enum status_code time_way(struct cuda_gemm *g, const struct shape *s, const struct trial *t, float *ms,
                                 struct status *st)
{
    void *y = s->out == CUDA_OUT_SWIGLU ? t->p->y : t->scratch;
    enum status_code rc = ST_OK;
    *ms = -1;
    for (int i = -1; i < CUDA_GEMM_TURNS; i++) {
        const void *w = t->w[i < 0 ? CUDA_GEMM_TURNS - 1 : i]; /* the first run loads the kernel */
        if (i == 0 && (rc = cuda_check(cudaEventRecord(g->begin, g->stream), st, "cudaEventRecord")) != ST_OK)
            return rc;
        if (cuda_gemm_launch(g, s, t->p, w, y, 0, NULL) != ST_OK) {
            cudaGetLastError(); /* not the next launch's */
            return ST_OK;       /* a suggestion that cannot be used */
        }
    }
    if ((rc = cuda_check(cudaEventRecord(g->end, g->stream), st, "cudaEventRecord")) != ST_OK ||
        (rc = cuda_check(cudaEventSynchronize(g->end), st, "trying products")) != ST_OK)
        return rc;
    return cuda_check(cudaEventElapsedTime(ms, g->begin, g->end), st, "cudaEventElapsedTime");
}

/* ---- what earlier starts have measured ---- */

enum status_code cuda_gemm_remember(struct cuda_gemm *g, const char *dir, struct status *st)
{
    struct cudaDeviceProp p;
    char identity[TUNED_IDENTITY_MAX];
    int device = 0, driver = 0, runtime = 0;
    enum status_code rc = cuda_check(cudaGetDevice(&device), st, "cudaGetDevice");
    if (rc == ST_OK)
        rc = cuda_check(cudaGetDeviceProperties(&p, device), st, "cudaGetDeviceProperties");
    if (rc == ST_OK)
        rc = cuda_check(cudaDriverGetVersion(&driver), st, "cudaDriverGetVersion");
    if (rc == ST_OK)
        rc = cuda_check(cudaRuntimeGetVersion(&runtime), st, "cudaRuntimeGetVersion");
    if (rc != ST_OK)
        return rc;
    snprintf(identity, sizeof identity,
             "products: %.128s, compute capability %d.%d, %d SMs, driver %d, runtime %d, cuBLASLt %zu, own ways %d",
             p.name, p.major, p.minor, p.multiProcessorCount, driver, runtime, cublasLtGetVersion(), OWN_WAYS);
    return tuned_open(&g->file, dir, identity, st);
}

void cuda_gemm_try_until(struct cuda_gemm *g, double until_us)
{
    g->until_us = until_us;
}

struct cuda_gemm_counts cuda_gemm_counts(const struct cuda_gemm *g)
{
    return g->counts;
}

const char *cuda_gemm_file_problem(const struct cuda_gemm *g)
{
    return g->file ? tuned_problem(g->file) : NULL;
}

const char *cuda_gemm_file(const struct cuda_gemm *g)
{
    return g->file ? tuned_path(g->file) : NULL;
}

enum status_code cuda_gemm_save(struct cuda_gemm *g, struct status *st)
{
    return g->file ? tuned_save(g->file, st) : ST_OK;
}

/* Whether the library takes it for this shape. */
static bool takes(const struct cuda_gemm *g, const struct shape *s, const cublasLtMatmulAlgo_t *algo)
{
    cublasLtMatmulHeuristicResult_t r;
    return cublasLtMatmulAlgoCheck(g->handle, s->desc, s->w, s->x, s->y, s->y, algo, &r) == CUBLAS_STATUS_SUCCESS &&
           r.state == CUBLAS_STATUS_SUCCESS && r.workspaceSize <= CUDA_GEMM_WORKSPACE_BYTES;
}

/* What comes from a file is not trusted. */
static bool can_go(const struct cuda_gemm *g, const struct shape *s, const struct cuda_product *p,
                   const struct way *way)
{
    switch (way->kind) {
    case WAY_LIBRARY:
        return takes(g, s, &way->algo);
    case WAY_FEW:
        return few_rows_fit(p);
    case WAY_SOME:
        return some_rows_fit(p);
    case WAY_GLU:
        return glu_is_for(s) && cuda_glu_fits(&g->glu, &way->glu, s->t, s->n / 2, s->k);
    default:
        return false;
    }
}

static bool recall(struct cuda_gemm *g, struct shape *s, const struct cuda_product *p)
{
    const uint32_t key[TUNED_KEY_WORDS] = {s->n, s->k, s->t, s->out};
    struct way way;
    if (!g->file || !tuned_find(g->file, key, &way) || !can_go(g, s, p, &way))
        return false;
    s->way = way;
    g->counts.remembered++;
    return true;
}

static void keep(struct cuda_gemm *g, const struct shape *s)
{
    const uint32_t key[TUNED_KEY_WORDS] = {s->n, s->k, s->t, s->out};
    if (g->file)
        tuned_put(g->file, key, &s->way); /* one that is full keeps what it has */
    g->counts.measured++;
}

/* ---- choosing ---- */

static bool may_try(const struct cuda_gemm *g)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3 < g->until_us;
}

static enum status_code no_product(const struct shape *s, struct status *st)
{
    return status_set(st, ST_UNIMPLEMENTED, "cublasLt has no product of %u rows with a matrix of %u x %u", s->t, s->n,
                      s->k);
}

/* Without a measurement: the own kernel of a few rows, which has nearly always won, or the first that the library suggests. */
static enum status_code guess(struct cuda_gemm *g, struct shape *s, const struct trial *t, struct status *st)
{
    cublasLtMatmulHeuristicResult_t found[TRIES_MAX];
    int n = 0;
    g->counts.untried++;
    if (few_rows_fit(t->p)) {
        s->way.kind = WAY_FEW;
        return ST_OK;
    }
    enum status_code rc = candidates(g, s, found, &n, st);
    for (int i = 0; rc == ST_OK && i < n; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS) {
            s->way.algo = found[i].algo;
            return ST_OK;
        }
    return rc != ST_OK ? rc : no_product(s, st);
}

struct best {
    float ms; /* less than 0: none yet */
    struct way way;
};

static enum status_code try_way(struct cuda_gemm *g, struct shape *s, const struct trial *t, const struct way *way,
                                struct best *best, struct status *st)
{
    float ms;
    s->way = *way;
    enum status_code rc = time_way(g, s, t, &ms, st);
    if (rc == ST_OK && ms >= 0 && (best->ms < 0 || ms < best->ms))
        *best = (struct best){ms, *way};
    return rc;
}

static enum status_code try_all(struct cuda_gemm *g, struct shape *s, const struct trial *t, struct best *best,
                                struct status *st)
{
    cublasLtMatmulHeuristicResult_t found[TRIES_MAX];
    struct cuda_glu_way glu[GLU_TRIES_MAX];
    const uint32_t glus = glu_ways(g, s, glu, GLU_TRIES_MAX);
    int n = 0;
    enum status_code rc = candidates(g, s, found, &n, st);
    for (int i = 0; rc == ST_OK && i < n; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS)
            rc = try_way(g, s, t, &(struct way){.algo = found[i].algo}, best, st);
    if (rc == ST_OK && few_rows_fit(t->p))
        rc = try_way(g, s, t, &(struct way){.kind = WAY_FEW}, best, st);
    if (rc == ST_OK && some_rows_fit(t->p))
        rc = try_way(g, s, t, &(struct way){.kind = WAY_SOME}, best, st);
    for (uint32_t i = 0; rc == ST_OK && i < glus; i++)
        rc = try_way(g, s, t, &(struct way){.glu = glu[i], .kind = WAY_GLU}, best, st);
    return rc;
}

/* For tests: own kernels of more than a few rows wherever they can be had; of gate and up another of the ways for each number of
 * rows. */
static bool own_way(const struct cuda_gemm *g, struct shape *s, const struct cuda_product *p)
{
    struct cuda_glu_way glu[32];
    if (!g->own_first)
        return false;
    const uint32_t n = glu_ways(g, s, glu, sizeof glu / sizeof *glu);
    if (n)
        s->way = (struct way){.glu = glu[s->t % n], .kind = WAY_GLU};
    else if (some_rows_fit(p))
        s->way = (struct way){.kind = WAY_SOME};
    else
        return false;
    return true;
}

static enum status_code choose(struct cuda_gemm *g, struct shape *s, const struct trial *t, struct status *st)
{
    struct best best = {.ms = -1};
    if (own_way(g, s, t->p) || recall(g, s, t->p))
        return ST_OK;
    if (!may_try(g))
        return guess(g, s, t, st);
    enum status_code rc = try_all(g, s, t, &best, st);
    if (rc != ST_OK)
        return rc;
    if (best.ms < 0)
        return no_product(s, st);
    s->way = best.way;
    keep(g, s);
    return ST_OK;
}

/* ---- one way for all rows ---- */

#define ONE_WAY_ROWS 64 /* what the library is asked for */
/* Whether a suggestion is taken for all rows is not known beforehand: these stand for them. */
static const uint32_t one_way_probes[] = {1, 3, 17, 256};

static bool adds_in_order(const cublasLtMatmulAlgo_t *algo)
{
    uint32_t parts = 0, reduction = ~0u;
    size_t n;
    return cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts, sizeof parts, &n) ==
               CUBLAS_STATUS_SUCCESS &&
           cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction,
                                                sizeof reduction, &n) == CUBLAS_STATUS_SUCCESS &&
           parts <= 1 && reduction == CUBLASLT_REDUCTION_SCHEME_NONE;
}

static enum status_code takes_probes(bool *out, const struct cuda_gemm *g, const struct shape *s,
                                     const cublasLtMatmulAlgo_t *algo, struct status *st)
{
    *out = adds_in_order(algo);
    for (size_t i = 0; *out && i < sizeof one_way_probes / sizeof *one_way_probes; i++) {
        struct shape probe = {.n = s->n, .k = s->k, .t = one_way_probes[i], .out = s->out};
        enum status_code rc = cuda_gemm_describe(&probe, st);
        *out = rc == ST_OK && takes(g, &probe, algo);
        cuda_gemm_forget(&probe);
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}

/* The library's first suggestion for ONE_WAY_ROWS rows that keeps to one order, and that it takes for few and many rows: the same
 * in every run. */
static enum status_code choose_one_way(const struct cuda_gemm *g, struct shape *s, struct status *st)
{
    struct shape model = {.n = s->n, .k = s->k, .t = ONE_WAY_ROWS, .out = s->out};
    cublasLtMatmulHeuristicResult_t found[TRIES_MAX];
    int n = 0, i = 0;
    enum status_code rc = cuda_gemm_describe(&model, st);
    if (rc == ST_OK)
        rc = candidates(g, &model, found, &n, st);
    cuda_gemm_forget(&model);
    if (rc != ST_OK)
        return rc;
    for (bool good = false; i < n; i++) {
        if (found[i].state == CUBLAS_STATUS_SUCCESS && (rc = takes_probes(&good, g, s, &found[i].algo, st)) != ST_OK)
            return rc;
        if (good)
            break;
    }
    if (i == n || !takes(g, s, &found[i].algo))
        return status_set(st, ST_UNIMPLEMENTED,
                          "batch_invariant: cublasLt has no such product of %u rows with a matrix of %u x %u", s->t,
                          s->n, s->k);
    s->way.algo = found[i].algo;
    return ST_OK;
}

enum status_code cuda_gemm_choose(struct cuda_gemm *g, struct shape *s, const struct trial *t, struct status *st)
{
    const enum status_code rc = g->one_way ? choose_one_way(g, s, st) : choose(g, s, t, st);
    g->counts.glu += rc == ST_OK && s->way.kind == WAY_GLU;
    g->counts.some += rc == ST_OK && s->way.kind == WAY_SOME;
    return rc;
}
