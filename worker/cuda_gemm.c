/* cuda_gemm.c - products through cuBLASLt, or own kernels for a few rows: which one is measured, once per shape, and kept in a
 * file.
 *
 * Row-major y = x W^T is to cuBLASLt, which counts columns first, y' = W' x' with W transposed: m = N, n = T, k = K.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cublasLt.h>

#include "worker/cuda_internal.h"
#include "worker/tuned.h"

#define TRIES_MAX 12  /* algorithms that are tried for a shape */
#define ALIGN_MAX 64u /* what model_weights.c and the activations keep to */
#define OWN_WAYS  1   /* another number when cuda_few.cu has become faster or slower, so that all is measured anew */

struct shape {
    uint32_t n, k, t;
    enum cuda_out out;
    struct shape *next;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algo;
    bool few; /* cuda_few_rows is faster */
};

/* Of a shape, in the file; the key is n, k, t, out. */
struct way {
    cublasLtMatmulAlgo_t algo; /* may be stored, and means the same to the same version of the library */
    uint32_t few, spare;
};
_Static_assert(sizeof(struct way) == TUNED_VALUE_BYTES, "a record of the file");

struct cuda_gemm {
    cublasLtHandle_t handle;
    cudaStream_t stream;
    bool one_way;
    cudaEvent_t begin, end;
    void *workspace;
    struct shape *shapes; /* a few hundred at most, the ones of a model by the buckets */
    struct tuned *file;   /* NULL: none */
    double until_us;
    struct cuda_gemm_counts counts;
};

static enum status_code check(cublasStatus_t rc, struct status *st, const char *what)
{
    if (rc == CUBLAS_STATUS_SUCCESS)
        return ST_OK;
    enum status_code code = rc == CUBLAS_STATUS_ALLOC_FAILED    ? ST_RESOURCE_EXHAUSTED
                            : rc == CUBLAS_STATUS_NOT_SUPPORTED ? ST_UNIMPLEMENTED
                                                                : ST_INTERNAL;
    return status_set(st, code, "%s: %s", what, cublasLtGetStatusString(rc));
}

enum status_code cuda_gemm_create(struct cuda_gemm **out, cudaStream_t stream, bool one_way, struct status *st)
{
    struct cuda_gemm *g = calloc(1, sizeof *g);
    if (!g)
        return status_nomem(st, "products", sizeof *g);
    g->stream = stream;
    g->one_way = one_way;
    enum status_code rc = check(cublasLtCreate(&g->handle), st, "cublasLtCreate");
    if (rc == ST_OK)
        rc = cuda_check(cudaEventCreate(&g->begin), st, "cudaEventCreate");
    if (rc == ST_OK)
        rc = cuda_check(cudaEventCreate(&g->end), st, "cudaEventCreate");
    if (rc == ST_OK)
        rc = cuda_check(cudaMalloc(&g->workspace, CUDA_GEMM_WORKSPACE_BYTES), st, "workspace of the products");
    if (rc != ST_OK) {
        cuda_gemm_destroy(g);
        return rc;
    }
    *out = g;
    return ST_OK;
}

static void free_layouts(struct shape *s)
{
    if (s->y)
        cublasLtMatrixLayoutDestroy(s->y);
    if (s->x)
        cublasLtMatrixLayoutDestroy(s->x);
    if (s->w)
        cublasLtMatrixLayoutDestroy(s->w);
    if (s->desc)
        cublasLtMatmulDescDestroy(s->desc);
}

static void free_shape(struct shape *s)
{
    free_layouts(s);
    free(s);
}

void cuda_gemm_destroy(struct cuda_gemm *g)
{
    if (!g)
        return;
    while (g->shapes) {
        struct shape *next = g->shapes->next;
        free_shape(g->shapes);
        g->shapes = next;
    }
    tuned_close(g->file);
    cudaFree(g->workspace);
    if (g->end)
        cudaEventDestroy(g->end);
    if (g->begin)
        cudaEventDestroy(g->begin);
    if (g->handle)
        cublasLtDestroy(g->handle);
    free(g);
}

static struct shape *find(const struct cuda_gemm *g, const struct cuda_product *p)
{
    for (struct shape *s = g->shapes; s; s = s->next)
        if (s->n == p->w->rows && s->k == p->w->cols && s->t == p->rows && s->out == p->out)
            return s;
    return NULL;
}

static bool few_rows_fit(const struct cuda_product *p)
{
    return p->rows <= CUDA_FEW_ROWS_MAX && p->w->cols % 8 == 0;
}

static enum status_code launch(const struct cuda_gemm *g, const struct shape *s, const struct cuda_product *p,
                               const void *w, void *y, float beta, struct status *st)
{
    const float one = 1;
    return check(cublasLtMatmul(g->handle, s->desc, &one, w, s->w, p->x, s->x, &beta, y, s->y, y, s->y, &s->algo,
                                g->workspace, CUDA_GEMM_WORKSPACE_BYTES, g->stream),
                 st, "cublasLtMatmul");
}

static enum status_code describe(struct shape *s, struct status *st)
{
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cudaDataType_t out = s->out == CUDA_OUT_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    cublasStatus_t rc = cublasLtMatmulDescCreate(&s->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = cublasLtMatmulDescSetAttribute(s->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = cublasLtMatrixLayoutCreate(&s->w, CUDA_R_16BF, s->k, s->n, s->k);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = cublasLtMatrixLayoutCreate(&s->x, CUDA_R_16BF, s->k, s->t, s->k);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = cublasLtMatrixLayoutCreate(&s->y, out, s->n, s->t, s->n);
    return check(rc, st, "cublasLt: layout of a product");
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
    enum status_code rc = check(cublasLtMatmulPreferenceCreate(&wish), st, "cublasLtMatmulPreferenceCreate");
    if (rc != ST_OK)
        return rc;
    const uint64_t workspace = CUDA_GEMM_WORKSPACE_BYTES;
    const uint32_t in = row_alignment(2ull * s->k), out = row_alignment((s->out == CUDA_OUT_BF16 ? 2ull : 4ull) * s->n);
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
        rc = check(cublasLtMatmulPreferenceSetAttribute(wish, set[i].name, set[i].value, set[i].bytes), st,
                   "cublasLtMatmulPreferenceSetAttribute");
    if (rc == ST_OK) {
        cublasStatus_t got =
            cublasLtMatmulAlgoGetHeuristic(g->handle, s->desc, s->w, s->x, s->y, s->y, wish, TRIES_MAX, found, n);
        rc = got == CUBLAS_STATUS_NOT_SUPPORTED ? (*n = 0, ST_OK) : check(got, st, "cublasLtMatmulAlgoGetHeuristic");
    }
    cublasLtMatmulPreferenceDestroy(wish);
    return rc;
}

struct trial {
    const struct cuda_product *p;
    const void *const *w; /* [CUDA_GEMM_TURNS] */
    void *scratch;
};

/* Milliseconds of a round of turns, or less than 0 when it does not run. */
static enum status_code time_way(struct cuda_gemm *g, const struct shape *s, const struct trial *t, bool few, float *ms,
                                 struct status *st)
{
    enum status_code rc = ST_OK;
    *ms = -1;
    for (int i = -1; i < CUDA_GEMM_TURNS; i++) {
        const void *w = t->w[i < 0 ? CUDA_GEMM_TURNS - 1 : i]; /* the first run loads the kernel */
        if (i == 0 && (rc = cuda_check(cudaEventRecord(g->begin, g->stream), st, "cudaEventRecord")) != ST_OK)
            return rc;
        if (few)
            rc = cuda_check(cuda_few_rows(g->stream, t->scratch, t->p->out, t->p->x, w, s->t, s->n, s->k), st,
                            "product of few rows");
        else if (launch(g, s, t->p, w, t->scratch, 0, NULL) != ST_OK)
            return ST_OK; /* a suggestion that cannot be used */
        if (rc != ST_OK)
            return rc;
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
static bool recall(struct cuda_gemm *g, struct shape *s, const struct cuda_product *p)
{
    const uint32_t key[TUNED_KEY_WORDS] = {s->n, s->k, s->t, s->out};
    struct way way;
    if (!g->file || !tuned_find(g->file, key, &way) || (way.few ? !few_rows_fit(p) : !takes(g, s, &way.algo)))
        return false;
    s->algo = way.algo;
    s->few = way.few;
    g->counts.remembered++;
    return true;
}

static void keep(struct cuda_gemm *g, const struct shape *s)
{
    const uint32_t key[TUNED_KEY_WORDS] = {s->n, s->k, s->t, s->out};
    const struct way way = {.algo = s->algo, .few = s->few};
    if (g->file)
        tuned_put(g->file, key, &way); /* one that is full keeps what it has */
    g->counts.measured++;
}

/* ---- choosing ---- */

static bool may_try(const struct cuda_gemm *g)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3 < g->until_us;
}

/* Without a measurement: the own kernel, which has nearly always won, or the first that the library suggests. */
static enum status_code guess(struct cuda_gemm *g, struct shape *s, const struct trial *t, struct status *st)
{
    cublasLtMatmulHeuristicResult_t found[TRIES_MAX];
    int n = 0;
    g->counts.untried++;
    s->few = few_rows_fit(t->p);
    if (s->few)
        return ST_OK;
    enum status_code rc = candidates(g, s, found, &n, st);
    for (int i = 0; rc == ST_OK && i < n; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS) {
            s->algo = found[i].algo;
            return ST_OK;
        }
    return rc != ST_OK ? rc
                       : status_set(st, ST_UNIMPLEMENTED, "cublasLt has no product of %u rows with a matrix of %u x %u",
                                    s->t, s->n, s->k);
}

static enum status_code choose(struct cuda_gemm *g, struct shape *s, const struct trial *t, struct status *st)
{
    cublasLtMatmulHeuristicResult_t found[TRIES_MAX];
    int n = 0, best = -1;
    float ms, best_ms = 0;
    if (recall(g, s, t->p))
        return ST_OK;
    if (!may_try(g))
        return guess(g, s, t, st);
    enum status_code rc = candidates(g, s, found, &n, st);
    for (int i = 0; rc == ST_OK && i < n; i++) {
        if (found[i].state != CUBLAS_STATUS_SUCCESS)
            continue;
        s->algo = found[i].algo;
        rc = time_way(g, s, t, false, &ms, st);
        if (rc == ST_OK && ms >= 0 && (best < 0 || ms < best_ms)) {
            best = i;
            best_ms = ms;
        }
    }
    if (rc == ST_OK && few_rows_fit(t->p)) {
        rc = time_way(g, s, t, true, &ms, st);
        s->few = rc == ST_OK && (best < 0 || ms < best_ms);
    }
    if (rc != ST_OK)
        return rc;
    if (best >= 0)
        s->algo = found[best].algo;
    else if (!s->few)
        return status_set(st, ST_UNIMPLEMENTED, "cublasLt has no product of %u rows with a matrix of %u x %u", s->t,
                          s->n, s->k);
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
        enum status_code rc = describe(&probe, st);
        *out = rc == ST_OK && takes(g, &probe, algo);
        free_layouts(&probe);
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
    enum status_code rc = describe(&model, st);
    if (rc == ST_OK)
        rc = candidates(g, &model, found, &n, st);
    free_layouts(&model);
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
    s->algo = found[i].algo;
    return ST_OK;
}

enum status_code cuda_gemm_prepare(struct cuda_gemm *g, const struct cuda_product *p,
                                   const void *const w[CUDA_GEMM_TURNS], void *scratch, struct status *st)
{
    if (p->w->rows == 0 || p->w->cols == 0 || find(g, p))
        return ST_OK;
    struct shape *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "shape of a product", sizeof *s);
    s->n = p->w->rows;
    s->k = p->w->cols;
    s->t = p->rows;
    s->out = p->out;
    enum status_code rc = describe(s, st);
    if (rc == ST_OK)
        rc = g->one_way ? choose_one_way(g, s, st) : choose(g, s, &(struct trial){p, w, scratch}, st);
    if (rc != ST_OK) {
        free_shape(s);
        return rc;
    }
    s->next = g->shapes;
    g->shapes = s;
    return ST_OK;
}

bool cuda_gemm_is_few(const struct cuda_gemm *g, const struct cuda_product *p)
{
    const struct shape *s = find(g, p);
    return s && s->few;
}

enum status_code cuda_gemm_run(struct cuda_gemm *g, const struct cuda_product *p, struct status *st)
{
    if (p->w->rows == 0 || p->w->cols == 0)
        return ST_OK;
    const struct shape *s = find(g, p);
    if (!s)
        return status_set(st, ST_INTERNAL, "product of %u rows with a matrix of %u x %u: not prepared", p->rows,
                          p->w->rows, p->w->cols);
    if (s->few)
        return cuda_check(cuda_few_rows(g->stream, p->y, p->out, p->x, p->w->data, s->t, s->n, s->k), st,
                          "product of few rows");
    return launch(g, s, p, p->w->data, p->y, p->out == CUDA_OUT_F32_ADD ? 1 : 0, st);
}
