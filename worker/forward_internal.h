/* forward_internal.h - shared by forward.c (layers), forward_head.c (logits and sampling) and forward_ops.c (loops over
 * rows). */
#ifndef TANDEM_FORWARD_INTERNAL_H
#define TANDEM_FORWARD_INTERNAL_H

#include "attention/attention.h"
#include "worker/forward.h"
#include "worker/gemm.h"

struct forward {
    struct forward_config cfg;
    uint32_t rank, ranks;
    uint32_t head_rows; /* logits are made for so many rows at a time */
    struct gemm *gemm;
    struct attn *attn; /* NULL on a rank without heads */

    /* one allocation, see forward.c */
    void *arena;
    float *x, *h;              /* [T][hidden] */
    float *qkv;                /* [T][(H_loc + 2 HK_loc) D] */
    float *q, *att;            /* [T][H_loc D] */
    float *gate_up;            /* [T][2 inner_loc] */
    float *act;                /* [T][inner_loc] */
    float *cosine, *sine;      /* [max_context][D / 2] */
    uint32_t *row_seq;         /* [T] which sequence a row belongs to */
    struct attn_seq *attn_seq; /* [T] */

    /* forward_head.c */
    float *picked;             /* [head_rows][hidden] */
    float *logits;             /* [head_rows][vocab_loc] */
    float *gathered;           /* R > 1: the logits of all ranks, rank after rank */
    float *full_row;           /* [threads][vocab] */
    uint32_t *order;           /* [max_rows] greedy rows first */
    enum status_code *row_rc;  /* [head_rows] */
    struct sample_best *best;  /* [max_rows] */
    struct sample_best *bests; /* [R][max_rows] */
    size_t *gather_bytes;      /* [R] */
    struct sampler **sampler;  /* [threads] */
};

enum status_code forward_head(struct forward *f, const struct forward_batch *b, uint32_t *tokens, struct status *st);

/* ---- loops over rows (forward_ops.c) ---- */

/* fn(arg, first, end, worker) over 0..rows-1 in blocks; on the calling thread alone when rows * row_floats is small. */
void forward_rows(struct thread_pool *pool, uint32_t rows, uint64_t row_floats,
                  void (*fn)(void *arg, uint32_t first, uint32_t end, uint32_t worker), void *arg);
/* out = x / sqrt(mean(x^2) + eps) * weight */
void forward_norm_row(float *out, const float *x, const float *weight, uint32_t n, float eps);
/* x += y, then as above into y. */
void forward_add_norm_row(float *x, float *y, const float *weight, uint32_t n, float eps);
/* Rotates pairs (i, i + d/2) of n heads of d floats, the half-split form. out may be x. */
void forward_rope_row(float *out, const float *x, const float *cosine, const float *sine, uint32_t heads, uint32_t d);
/* x += y */
void forward_add_row(float *x, const float *y, uint32_t n);
/* Each of n heads of d floats normed by itself, in place, with the same weight [d]. */
void forward_norm_heads(float *x, const float *weight, uint32_t heads, uint32_t d, float eps);
/* out = silu(gate) * up */
void forward_swiglu_row(float *out, const float *gate, const float *up, uint32_t n);

#endif
