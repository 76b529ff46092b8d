/* cuda_gemm_internal.h - products, shared by cuda_gemm.c (what they are made of, launches) and cuda_gemm_choose.c (which way
 * is taken). Prefix cuda_gemm_. */
#ifndef TANDEM_CUDA_GEMM_INTERNAL_H
#define TANDEM_CUDA_GEMM_INTERNAL_H

#include <cublasLt.h>

#include "worker/cuda_internal.h"
#include "worker/tuned.h"

enum way_kind { WAY_LIBRARY, WAY_FEW, WAY_GLU, WAY_SOME }; /* cuBLASLt, cuda_few.cu, cuda_glu.cu, cuda_some.cu */

/* How a shape is computed; of a shape, in the file, whose key is n, k, t, out. */
struct way {
    union {
        cublasLtMatmulAlgo_t algo; /* may be stored, and means the same to the same version of the library */
        struct cuda_glu_way glu;
    };
    uint32_t kind; /* enum way_kind */
    uint32_t spare;
};
_Static_assert(sizeof(struct way) == TUNED_VALUE_BYTES, "a record of the file");

struct shape {
    uint32_t n, k, t;
    enum cuda_out out;
    struct shape *next;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, y;
    struct way way;
};

struct cuda_gemm {
    cublasLtHandle_t handle;
    cudaStream_t stream;
    bool one_way, own_first;
    struct cuda_glu glu;
    cudaEvent_t begin, end;
    void *workspace;
    struct shape *shapes; /* a few hundred at most, the ones of a model by the buckets */
    struct tuned *file;   /* NULL: none */
    double until_us;
    struct cuda_gemm_counts counts;
};

struct trial {
    const struct cuda_product *p;
    const void *const *w; /* [CUDA_GEMM_TURNS] */
    void *scratch;
};

enum status_code cuda_gemm_check(cublasStatus_t rc, struct status *st, const char *what);
/* What the library needs to know of n, k, t and out; cuda_gemm_forget in any case. */
enum status_code cuda_gemm_describe(struct shape *s, struct status *st);
void cuda_gemm_forget(struct shape *s);
bool cuda_gemm_is_bf16(enum cuda_out out);
/* Launches the shape's way, with this w and y instead of the product's. beta: what is in y counts so much. */
enum status_code cuda_gemm_launch(const struct cuda_gemm *g, const struct shape *s, const struct cuda_product *p,
                                  const void *w, void *y, float beta, struct status *st);

/* Gives a shape that was described its way. */
enum status_code cuda_gemm_choose(struct cuda_gemm *g, struct shape *s, const struct trial *t, struct status *st);

#endif
