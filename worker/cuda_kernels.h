/* cuda_kernels.h - launches of the kernels beside the products and attention, for C and for .cu files. Prefix cuda_.
 *
 * Every function only launches, on the stream, and returns what the launch did; all pointers are device memory. Rows are
 * T rows of activations: x is float32, everything else bf16. Rows of padding (row.k 0) are computed like the others, but
 * write nothing outside the activations.
 */
#ifndef TANDEM_CUDA_KERNELS_H
#define TANDEM_CUDA_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_TOKEN_OF_SLOT (1u << 31) /* FORWARD_TOKEN_OF_SLOT */
#define CUDA_NO_SLOT       0xFFFFFFFFu

/* What changes from step to step, one per row. */
struct cuda_row {
    uint64_t k;     /* address of this row's K in layer 0; 0: padding */
    uint32_t token; /* an id, or CUDA_TOKEN_OF_SLOT | slot: what was sampled for the slot last */
    uint32_t position;
};

struct cuda_sample {
    uint32_t row;
    uint32_t position;
    float temperature, top_p, min_p, typical_p; /* as in sample.h */
    uint32_t top_k;
    uint64_t seed;
    uint32_t slot; /* whose last token it becomes; CUDA_NO_SLOT */
    uint32_t how;  /* enum cuda_how */
};

enum cuda_how {
    CUDA_DRAW,
    CUDA_DRAW_ADJUSTED, /* from a row of its own */
    CUDA_GIVEN,         /* nothing is chosen, there is no fault yet */
    CUDA_ON_HOST,       /* nothing is done */
};

enum cuda_fault { CUDA_FAULT_NONE, CUDA_FAULT_NAN, CUDA_FAULT_INFINITE, CUDA_FAULT_MINUS_INFINITE };

struct cuda_choice {
    uint32_t token; /* the first NaN's for CUDA_FAULT_NAN */
    uint32_t fault; /* enum cuda_fault */
};

/* ---- rows (cuda_rows.cu); hidden and inner are multiples of 4 ---- */

struct cuda_embedding {
    const struct cuda_row *row;
    const uint32_t *last; /* [slots] sampled last */
    const void *table;    /* [count][hidden] bf16: tokens first .. first + count - 1; of others the embedding is 0 */
    uint32_t first, count, rows, hidden;
};
/* x [rows][hidden] = embeddings of the rows' tokens. */
cudaError_t cuda_embed(cudaStream_t stream, float *x, const struct cuda_embedding *e);
/* The same in bf16, this rank's part of a sum. */
cudaError_t cuda_embed_part(cudaStream_t stream, void *out, const struct cuda_embedding *e);
/* x += bias (may be NULL), then h = x / sqrt(mean(x^2) + eps) * weight. With pick, h row i is made of x row pick[i].row,
 * and x is left as it is. */
cudaError_t cuda_norm(cudaStream_t stream, void *h, float *x, const float *bias, const float *weight, float eps,
                      const struct cuda_sample *pick, uint32_t rows, uint32_t hidden);

struct cuda_rope {
    void *qkv; /* [T][(H + 2 HK) D]; q is rotated in place */
    const struct cuda_row *row;
    const float *cosine, *sine;   /* [positions][D / 2] */
    const float *bias;            /* [(H + 2 HK) D] or NULL */
    const float *q_norm, *k_norm; /* [D] or NULL: heads are normed before they are rotated */
    float eps;
    uint32_t heads, kv_heads, head_dim; /* D: a multiple of 8 up to 256 */
    uint64_t layer_offset;              /* bytes from row.k to this layer's K */
    uint64_t v_offset;                  /* bytes from K to V */
    uint64_t head_stride;               /* bytes between heads of K */
};
/* Adds the bias, norms, rotates; K and V go to the slots. */
cudaError_t cuda_rope_kv(cudaStream_t stream, const struct cuda_rope *r, uint32_t rows);

/* act[T][inner] = silu(gate) * up of gate_up[T][2 inner], bias [2 inner] or NULL. */
cudaError_t cuda_swiglu(cudaStream_t stream, void *act, const void *gate_up, const float *bias, uint32_t rows,
                        uint32_t inner);

/* n random bf16 elements, as model_random makes them. */
cudaError_t cuda_random(cudaStream_t stream, void *out, uint64_t seed, uint64_t first, uint64_t n, float scale);

/* ---- products of few rows (cuda_few.cu) ---- */

#define CUDA_FEW_ROWS_MAX 4
/* What becomes of a product: bf16; float32; float32 to which it is added; or, of gate and up, silu(gate) * up in bf16. */
enum cuda_out { CUDA_OUT_BF16, CUDA_OUT_F32, CUDA_OUT_F32_ADD, CUDA_OUT_SWIGLU };
/* y[T][N] = x[T][K] W[N][K]^T, T at most CUDA_FEW_ROWS_MAX, K a multiple of 8, everything 16-byte aligned. Not for
 * CUDA_OUT_SWIGLU: cuda_few_swiglu. */
cudaError_t cuda_few_rows(cudaStream_t stream, void *y, enum cuda_out out, const void *x, const void *w, uint32_t t,
                          uint32_t n, uint32_t k);
/* act[T][inner] = silu(gate) * up, with gate and up the halves of x W^T + bias, W [2 inner][K]; bias [2 inner] or NULL. */
cudaError_t cuda_few_swiglu(cudaStream_t stream, void *act, const void *x, const void *w, const float *bias, uint32_t t,
                            uint32_t inner, uint32_t k);
/* As the product of x with W [(H + 2 HK) D][K] and cuda_rope_kv on what comes of it; without norms of heads. */
cudaError_t cuda_few_rope(cudaStream_t stream, const struct cuda_rope *r, const void *x, const void *w, uint32_t t,
                          uint32_t k);

/* ---- products of some rows (cuda_some.cu): compute capability 8.0 on ---- */

#define CUDA_SOME_ROWS_MAX 16
/* As cuda_few_rows, and with CUDA_OUT_SWIGLU as cuda_few_swiglu (N is inner then), for T up to CUDA_SOME_ROWS_MAX; bias [2 N] or NULL
 * is for that alone. Sums do not depend on T. */
cudaError_t cuda_some_rows(cudaStream_t stream, void *y, enum cuda_out out, const void *x, const void *w,
                           const float *bias, uint32_t t, uint32_t n, uint32_t k);

/* ---- gate and up with SwiGLU, of many rows (cuda_glu.cu): compute capability 9.0 alone ---- */

#define CUDA_GLU_COLS     128 /* inner is a multiple of it, */
#define CUDA_GLU_DEPTH    64  /* and K of this */
#define CUDA_GLU_ALL_ROWS UINT32_MAX

/* What launches need to know of a device. */
struct cuda_glu {
    void *encode;    /* the driver's; NULL: not a device for this */
    uint32_t blocks; /* at a time: one for each SM */
};

/* Blocks work alone, or in pairs that load for each other what both need. SHARES_X: inner is a multiple of 256. */
enum cuda_glu_share { CUDA_GLU_ALONE, CUDA_GLU_SHARES_X, CUDA_GLU_SHARES_W };

struct cuda_glu_way {
    uint32_t rows;  /* of x in a tile */
    uint32_t share; /* enum cuda_glu_share */
    uint32_t
        group;    /* so many tiles in T, or pairs of them, are worked at before the next rows of W; CUDA_GLU_ALL_ROWS */
    uint32_t lag; /* steps of k that a half of a block is behind the other; at most 2 */
};

/* Of the current device. cudaErrorNotSupported where these kernels do not run. */
cudaError_t cuda_glu_open(struct cuda_glu *out);
/* Whether cuda_glu_run takes it: a way that exists, inner and k multiples of what they must be. */
bool cuda_glu_fits(const struct cuda_glu *g, const struct cuda_glu_way *way, uint32_t t, uint32_t inner, uint32_t k);
/* Up to max ways, the one that should be fastest first; how many, 0 where none fits. */
uint32_t cuda_glu_suggest(const struct cuda_glu *g, struct cuda_glu_way *out, uint32_t max, uint32_t t, uint32_t inner,
                          uint32_t k);
/* act[T][inner] = silu(gate) * up, with gate and up the halves of x W^T + bias, not rounded in between: x [T][K] and
 * W [2 inner][K] bf16, gate's rows first; bias [2 inner] float32 or NULL. act, x and W are 16-byte aligned; W is never written
 * while kernels run. cudaErrorInvalidValue for what does not fit. */
cudaError_t cuda_glu_run(cudaStream_t stream, const struct cuda_glu *g, const struct cuda_glu_way *way, void *act,
                         const void *x, const void *w, const float *bias, uint32_t t, uint32_t inner, uint32_t k);

/* ---- sampling (cuda_sample.cu) ---- */

/* choice[i] from logits row i, as sample.h has it: greedy, temperature, top_k, min_p, top_p, typical_p. Weights are the host's to the
 * bit, but sums are formed in units of 2^-44, exact and in any order: a draw differs from the host's only where u falls
 * within about 1e-12 of a token's edge. vocab: at most 2^18. The token also goes to last[slot]. Rows of samples that are not
 * CUDA_DRAW are left out. */
cudaError_t cuda_sample_rows(cudaStream_t stream, struct cuda_choice *choice, uint32_t *last, const float *logits,
                             const struct cuda_sample *sample, uint32_t rows, uint32_t vocab);

/* ---- log probabilities (cuda_score.cu) ---- */

#define CUDA_MAX_TOP 20

struct cuda_score {
    uint32_t sample;       /* of the step's */
    uint32_t given, token; /* not given: the sample's choice */
    uint32_t top;          /* likeliest ones */
};

struct cuda_scores {
    float logprob;
    uint32_t rank, n;
    uint32_t top[CUDA_MAX_TOP];
    float top_logprob[CUDA_MAX_TOP];
};

/* scores[i] of raw logits row score[i].sample - first_sample, as sample_score has them: tokens, ranks and order are the host's.
 * The sum is formed in another order, always the same, so a log probability may be off by 2^-36 and one rounding to float32,
 * 2^-23 of itself. A fault of the raw logits becomes the sample's. */
cudaError_t cuda_score_rows(cudaStream_t stream, struct cuda_scores *scores, struct cuda_choice *choice,
                            const float *logits, const struct cuda_score *score, uint32_t rows, uint32_t first_sample,
                            uint32_t vocab);
cudaError_t cuda_score_load(void); /* as cuda_adjust_load */

/* ---- options of single tokens (cuda_adjust.cu) ---- */

#define CUDA_MAX_BIASES     1024
#define CUDA_MAX_BANNED     256
#define CUDA_SEEN_IN_PROMPT (1u << 31)

struct cuda_bias {
    uint32_t id;
    float bias;
};

/* As struct sample_adjust, for one sample. */
struct cuda_adjust {
    const uint32_t *allowed; /* NULL: all are */
    const uint32_t *banned;
    const struct cuda_bias *bias;
    const uint32_t *seen; /* [V] times in the output, and CUDA_SEEN_IN_PROMPT; NULL: no penalties */
    uint32_t sample;      /* of the step's */
    uint32_t n_banned, n_bias;
    float repetition, frequency, presence;
};

/* A row whose token is counted. */
struct cuda_fed {
    uint32_t *seen;
    uint32_t row;
    uint32_t output; /* 0: in the prompt */
};

/* Before the step samples: a row may name the slot whose token it is. */
cudaError_t cuda_count_fed(cudaStream_t stream, const struct cuda_fed *fed, uint32_t n, const struct cuda_row *row,
                           const uint32_t *last);
/* out row i = logits row adjust[i].sample - first_sample, adjusted: the host's to the bit. */
cudaError_t cuda_adjust_rows(cudaStream_t stream, float *out, const float *logits, const struct cuda_adjust *adjust,
                             uint32_t rows, uint32_t first_sample, uint32_t vocab);
/* As cuda_sample_rows for samples adjust[i].sample from row i. */
cudaError_t cuda_sample_adjusted(cudaStream_t stream, struct cuda_choice *choice, uint32_t *last, const float *adjusted,
                                 const struct cuda_sample *sample, const struct cuda_adjust *adjust, uint32_t rows,
                                 uint32_t vocab);
/* Loads both kernels, which a step would otherwise wait for. */
cudaError_t cuda_adjust_load(void);

#ifdef __cplusplus
}
#endif
#endif
