/* cuda_gemm.c - products through cuBLASLt, or own kernels: of a few rows, of some, and of gate and up with SwiGLU. Which one is taken is
 * up to cuda_gemm_choose.c.
 *
 * Row-major y = x W^T is to cuBLASLt, which counts columns first, y' = W' x' with W transposed: m = N, n = T, k = K.
 */
#include <stdlib.h>

#include "worker/cuda_gemm_internal.h"

enum status_code cuda_gemm_check(cublasStatus_t rc, struct status *st, const char *what)
{
    if (rc == CUBLAS_STATUS_SUCCESS)
        return ST_OK;
    enum status_code code = rc == CUBLAS_STATUS_ALLOC_FAILED    ? ST_RESOURCE_EXHAUSTED
                            : rc == CUBLAS_STATUS_NOT_SUPPORTED ? ST_UNIMPLEMENTED
                                                                : ST_INTERNAL;
    return status_set(st, code, "%s: %s", what, cublasLtGetStatusString(rc));
}

/* Own kernels that this device may not have. */
static enum status_code open_glu(struct cuda_gemm *g, struct status *st)
{
    const cudaError_t err = cuda_glu_open(&g->glu);
    if (err != cudaErrorNotSupported)
        return cuda_check(err, st, "tensor maps");
    cudaGetLastError();
    g->glu.encode = NULL;
    return ST_OK;
}

enum status_code cuda_gemm_create(struct cuda_gemm **out, const struct cuda_gemm_config *cfg, struct status *st)
{
    struct cuda_gemm *g = calloc(1, sizeof *g);
    if (!g)
        return status_nomem(st, "products", sizeof *g);
    g->stream = cfg->stream;
    g->one_way = cfg->one_way;
    g->own_first = cfg->own_first;
    enum status_code rc = cuda_gemm_check(cublasLtCreate(&g->handle), st, "cublasLtCreate");
    if (rc == ST_OK)
        rc = cuda_check(cudaEventCreate(&g->begin), st, "cudaEventCreate");
    if (rc == ST_OK)
        rc = cuda_check(cudaEventCreate(&g->end), st, "cudaEventCreate");
    if (rc == ST_OK)
        rc = cuda_check(cudaMalloc(&g->workspace, CUDA_GEMM_WORKSPACE_BYTES), st, "workspace of the products");
    if (rc == ST_OK)
        rc = open_glu(g, st);
    if (rc != ST_OK) {
        cuda_gemm_destroy(g);
        return rc;
    }
    *out = g;
    return ST_OK;
}

void cuda_gemm_forget(struct shape *s)
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
    cuda_gemm_forget(s);
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

bool cuda_gemm_is_bf16(enum cuda_out out)
{
    return out == CUDA_OUT_BF16 || out == CUDA_OUT_SWIGLU;
}

enum status_code cuda_gemm_describe(struct shape *s, struct status *st)
{
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cudaDataType_t out = cuda_gemm_is_bf16(s->out) ? CUDA_R_16BF : CUDA_R_32F;
    cublasStatus_t rc = cublasLtMatmulDescCreate(&s->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = cublasLtMatmulDescSetAttribute(s->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = cublasLtMatrixLayoutCreate(&s->w, CUDA_R_16BF, s->k, s->n, s->k);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = cublasLtMatrixLayoutCreate(&s->x, CUDA_R_16BF, s->k, s->t, s->k);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = cublasLtMatrixLayoutCreate(&s->y, out, s->n, s->t, s->n);
    return cuda_gemm_check(rc, st, "cublasLt: layout of a product");
}

static enum status_code launch_library(const struct cuda_gemm *g, const struct shape *s, const struct cuda_product *p,
                                       const void *w, void *y, float beta, struct status *st)
{
    const float one = 1;
    void *to = s->out == CUDA_OUT_SWIGLU ? p->gate_up : y;
    enum status_code rc =
        cuda_gemm_check(cublasLtMatmul(g->handle, s->desc, &one, w, s->w, p->x, s->x, &beta, to, s->y, to, s->y,
                                       &s->way.algo, g->workspace, CUDA_GEMM_WORKSPACE_BYTES, g->stream),
                        st, "cublasLtMatmul");
    if (rc != ST_OK || s->out != CUDA_OUT_SWIGLU)
        return rc;
    return cuda_check(cuda_swiglu(g->stream, y, to, p->bias, s->t, s->n / 2), st, "SwiGLU");
}

static enum status_code launch_few(const struct cuda_gemm *g, const struct shape *s, const struct cuda_product *p,
                                   const void *w, void *y, struct status *st)
{
    if (s->out == CUDA_OUT_SWIGLU)
        return cuda_check(cuda_few_swiglu(g->stream, y, p->x, w, p->bias, s->t, s->n / 2, s->k), st,
                          "gate and up of few rows");
    return cuda_check(cuda_few_rows(g->stream, y, s->out, p->x, w, s->t, s->n, s->k), st, "product of few rows");
}

enum status_code cuda_gemm_launch(const struct cuda_gemm *g, const struct shape *s, const struct cuda_product *p,
                                  const void *w, void *y, float beta, struct status *st)
{
    switch (s->way.kind) {
    case WAY_FEW:
        return launch_few(g, s, p, w, y, st);
    case WAY_SOME:
        return cuda_check(cuda_some_rows(g->stream, y, s->out, p->x, w, p->bias, s->t,
                                         s->out == CUDA_OUT_SWIGLU ? s->n / 2 : s->n, s->k),
                          st, "product of some rows");
    case WAY_GLU:
        return cuda_check(cuda_glu_run(g->stream, &g->glu, &s->way.glu, y, p->x, w, p->bias, s->t, s->n / 2, s->k), st,
                          "gate and up with SwiGLU");
    default:
        return launch_library(g, s, p, w, y, beta, st);
    }
}

static struct shape *find(const struct cuda_gemm *g, const struct cuda_product *p)
{
    for (struct shape *s = g->shapes; s; s = s->next)
        if (s->n == p->w->rows && s->k == p->w->cols && s->t == p->rows && s->out == p->out)
            return s;
    return NULL;
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
    enum status_code rc = cuda_gemm_describe(s, st);
    if (rc == ST_OK)
        rc = cuda_gemm_choose(g, s, &(struct trial){p, w, scratch}, st);
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
    return s && s->way.kind == WAY_FEW;
}

enum status_code cuda_gemm_run(struct cuda_gemm *g, const struct cuda_product *p, struct status *st)
{
    if (p->w->rows == 0 || p->w->cols == 0)
        return ST_OK;
    const struct shape *s = find(g, p);
    if (!s)
        return status_set(st, ST_INTERNAL, "product of %u rows with a matrix of %u x %u: not prepared", p->rows,
                          p->w->rows, p->w->cols);
    return cuda_gemm_launch(g, s, p, p->w->data, p->y, p->out == CUDA_OUT_F32_ADD ? 1 : 0, st);
}
