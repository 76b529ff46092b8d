/* attention.h - attention of a hybrid batch (POD-Attention, arXiv 2410.18038): prefill chunks and decodes in one call.
 * Prefix attn_. Knows KV as (base, strides, lengths), not the pool behind it.
 *
 * Shapes: T rows (query tokens) of all sequences, packed; H query heads, HK KV heads, G = H / HK (whole), D head dim.
 *
 *   q, out  [T][H][D]   row-major, contiguous
 *   K, V    per sequence: element (t, h, d) at base + t * token_stride + h * head_stride + d * elem
 *
 *   seq 0: rows 0..4 (a prefill chunk of 5, context 12)     row i of a sequence sits at position kv_len - rows + i and
 *   seq 1: row  5    (a decode, context 900)                 sees keys 0 .. that position: causal, lower right
 *   ...
 *
 * With a sliding window of W a row sees the last W keys of those only, its own included: position - W + 1 .. position.
 *
 * A decode is a sequence with one row: work is split by rows and keys, not by request type. Softmax in fp32.
 * Result of a row does not depend on the other sequences of the batch, nor on the number of threads.
 */
#ifndef TANDEM_ATTENTION_H
#define TANDEM_ATTENTION_H

#include <stdint.h>

#include "proto/status.h"

enum attn_dtype { ATTN_F32 = 0, ATTN_BF16 = 1, ATTN_F16 = 2 };

struct attn_seq {
    const void *k; /* token 0, head 0 */
    const void *v;
    uint32_t first_row; /* in q and out */
    uint32_t rows;      /* at least 1 */
    uint32_t kv_len;    /* keys in all, these rows' own included; at least rows */
};

struct attn_batch {
    uint32_t seqs;
    const struct attn_seq *seq;
    uint32_t rows;     /* T: every row belongs to exactly one sequence */
    uint32_t heads;    /* H */
    uint32_t kv_heads; /* HK */
    uint32_t head_dim; /* D, a multiple of 8 up to 256 */
    float scale;       /* of q . k, usually 1 / sqrt(D) */
    uint32_t window;   /* W: keys a row sees at most; 0: all */
    enum attn_dtype kv_dtype;
    uint64_t token_stride; /* bytes, of K and V alike */
    uint64_t head_stride;
    const void *q; /* host: float */
    void *out;     /* host: float */
};

/* How a back end on the CPU gets its threads: run fn(arg, i, worker) for i in 0..n-1, worker in 0..threads-1, on any
 * thread and in any order, and return when all are done. Owned by the caller. */
struct attn_executor {
    uint32_t threads;
    void (*parallel_for)(void *ctx, uint32_t n, void (*fn)(void *arg, uint32_t i, uint32_t worker), void *arg);
    void *ctx;
};

struct attn;

struct attn_ops;
extern const struct attn_ops attn_ops_host; /* vectorised loops, fp32: the oracle for all others */

struct attn_config {
    const struct attn_ops *ops;
    struct attn_executor exec; /* host only; threads 0 or parallel_for NULL: the calling thread does all */
    uint32_t max_rows;         /* T, the largest batch */
    uint32_t max_heads;
    uint32_t max_head_dim;
    uint32_t max_kv_len;
};

/* Allocates the workspace for the largest batch; attn_run allocates nothing. */
STATUS_MUST_CHECK enum status_code attn_create(struct attn **out, const struct attn_config *cfg, struct status *st);
void attn_destroy(struct attn *a); /* NULL is fine */

/* Checks the batch (INVALID_ARGUMENT names what is wrong), then computes out. A batch of no rows is fine.
 * One thread at a time on one struct attn. */
STATUS_MUST_CHECK enum status_code attn_run(struct attn *a, const struct attn_batch *batch, struct status *st);

#endif
