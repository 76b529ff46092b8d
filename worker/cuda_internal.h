/* cuda_internal.h - the CUDA back end of a rank, shared by its own C files: backend_cuda.c (devices, sessions, memory for
 * weights), cuda_forward.c (create), cuda_run.c (a step), cuda_layers.c (its layers), cuda_gemm.c and cuda_gemm_choose.c (products).
 *
 * One stream carries all of a step. Everything that changes from step to step is written to pinned memory of the host and
 * goes over in a few copies; the launches that follow depend on the bucket and the kind of step alone, so they can be replayed as a graph.
 */
#ifndef TANDEM_CUDA_INTERNAL_H
#define TANDEM_CUDA_INTERNAL_H

#include <stdbool.h>

#include <cuda_runtime_api.h>

#include "attention/attention.h"
#include "comm/comm.h"
#include "worker/cuda_buckets.h"
#include "worker/cuda_kernels.h"
#include "worker/forward.h"

/* "what: text (name)"; code by err: RESOURCE_EXHAUSTED when memory is out, else INTERNAL. Clears the error that the
 * runtime keeps. ST_OK stays ST_OK. */
enum status_code cuda_check(cudaError_t err, struct status *st, const char *what);

/* ---- products (cuda_gemm.c, cuda_gemm_choose.c) ---- */

struct cuda_gemm;

#define CUDA_GEMM_WORKSPACE_BYTES (64u << 20)

struct cuda_product {
    const struct mat *w; /* in the device's memory, BF16 */
    const void *x;       /* [rows][w->cols] bf16 */
    void *y;             /* [rows][w->rows], of CUDA_OUT_SWIGLU half of it */
    enum cuda_out out;
    uint32_t rows;
    /* of CUDA_OUT_SWIGLU */
    const float *bias; /* [w->rows] or NULL */
    void *gate_up;     /* [rows][w->rows] bf16: on their way, where they leave the chip at all */
};

static inline struct cuda_product cuda_product_of(const struct mat *w, const void *x, void *y, enum cuda_out out,
                                                  uint32_t rows)
{
    return (struct cuda_product){.w = w, .x = x, .y = y, .out = out, .rows = rows};
}

struct cuda_gemm_config {
    cudaStream_t stream;
    /* Whatever its rows, a product with matrices of one shape goes by one algorithm that adds up k in one order, so that a row's
     * bits do not depend on the others; nothing is measured then. */
    bool one_way;
    bool own_first; /* own kernels of more than a few rows wherever they can be had: forward.h */
};
STATUS_MUST_CHECK enum status_code cuda_gemm_create(struct cuda_gemm **out, const struct cuda_gemm_config *cfg,
                                                    struct status *st);
void cuda_gemm_destroy(struct cuda_gemm *g); /* NULL is fine */
#define CUDA_GEMM_TURNS 4

/* Ways that were measured are kept in a file of dir (tuned.h), and looked up there. */
STATUS_MUST_CHECK enum status_code cuda_gemm_remember(struct cuda_gemm *g, const char *dir, struct status *st);
/* Until this moment of CLOCK_MONOTONIC ways are tried; later, and before the first call, the library's first suggestion is
 * taken, or the own kernel for a few rows. */
void cuda_gemm_try_until(struct cuda_gemm *g, double until_us);
struct cuda_gemm_counts {
    uint32_t measured, remembered, untried; /* shapes */
    uint32_t glu, some;                     /* of all, by cuda_glu.cu and by cuda_some.cu */
};
struct cuda_gemm_counts cuda_gemm_counts(const struct cuda_gemm *g);
/* What is wrong with the file, or where it is; NULL without one. */
const char *cuda_gemm_file_problem(const struct cuda_gemm *g);
const char *cuda_gemm_file(const struct cuda_gemm *g);
STATUS_MUST_CHECK enum status_code cuda_gemm_save(struct cuda_gemm *g, struct status *st);

/* Picks the fastest way for products of this shape by trying them on these matrices of one shape in turn, so that none is
 * in the cache when its turn comes (p->w is one of them), the results going to scratch (as large as y; those of CUDA_OUT_SWIGLU to y); nothing when the
 * way is known. Waits for the stream where it tries. */
STATUS_MUST_CHECK enum status_code cuda_gemm_prepare(struct cuda_gemm *g, const struct cuda_product *p,
                                                     const void *const w[CUDA_GEMM_TURNS], void *scratch,
                                                     struct status *st);
/* Whether the shape, which was prepared, is computed by cuda_few_rows. */
bool cuda_gemm_is_few(const struct cuda_gemm *g, const struct cuda_product *p);
/* Launches. The shape was prepared. */
STATUS_MUST_CHECK enum status_code cuda_gemm_run(struct cuda_gemm *g, const struct cuda_product *p, struct status *st);

/* ---- the pass ---- */

/* Kinds of steps: with chunks, by attn_gpu_way, each of which is right for any; and of decodes alone. */
enum { CUDA_DECODES = ATTN_GPU_WAYS, CUDA_KINDS };

/* Launches of the layers for up to `rows` rows. */
struct cuda_bucket {
    uint32_t rows;
    bool prepared;
    cudaGraphExec_t graph[CUDA_KINDS]; /* NULL: launched one by one */
};

#define CUDA_FLIGHTS 2

/* A step from its start to its finish: what the host writes for it and gets from it, in pinned memory of its own. */
struct cuda_flight {
    struct forward_batch batch;
    uint32_t *tokens;
    cudaEvent_t begin, done;    /* begin: where steps are timed, else NULL */
    void *host_step;            /* as step below */
    struct cuda_row *row;       /* [T] */
    uint32_t *counts;           /* [1] sequences */
    struct attn_seq *seq;       /* [max_seqs] */
    struct cuda_sample *sample; /* [T] */
    struct cuda_adjust *adjust; /* [max_samples] in the order of samples */
    struct cuda_fed *fed;       /* [T] */
    struct cuda_score *score;   /* [T] in the order of samples */
    uint32_t n_adjust, n_fed, n_score;
    struct cuda_scores *scores; /* [T] */
    uint32_t *lists;            /* [tables][list_words] of slots that begin in it */
    struct cuda_choice *choice; /* [T] */
    uint32_t *fault;            /* [2] of attn */
    uint32_t *drawn;            /* [T] tokens that the host has drawn, on their way to last */
};

/* What the device has of slots whose options it keeps. */
struct cuda_options {
    struct cuda_options_slot {
        bool kept;
        uint32_t table, output_at;
        struct cuda_adjust adjust; /* but for the sample and n_banned */
    } * slot;                      /* [max_slots] */
    uint32_t *free, n_free;        /* [tables] */
};

struct forward {
    struct forward_config cfg;
    cudaStream_t stream;
    struct cuda_gemm *gemm;
    struct attn_gpu *attn[2]; /* whole context; window. NULL: no such layers */
    struct comm_gpu *group;   /* NULL: one rank */
    cudaEvent_t waited;       /* of waits within a step */
    bool graphs;
    bool warm; /* all that steps launch is prepared */
    uint32_t n_buckets;
    struct cuda_bucket bucket[CUDA_BUCKETS_MAX];
    uint32_t head_rows; /* logits are made for so many rows at a time */

    /* device memory, one allocation */
    void *arena;
    float *x;                            /* [T][hidden] */
    void *h, *qkv, *att, *gate_up, *act; /* [T][...] bf16; gate_up is scratch of cuda_gemm_prepare, too */
    float *cosine, *sine;                /* [max_context][D / 2] */
    void *picked;                        /* [head_rows][hidden] bf16 */
    float *logits;                       /* [head_rows][V], of all ranks */
    struct cuda_choice *choice;          /* [max_samples] */

    uint32_t *last;             /* [slots] token sampled last */
    uint32_t *seen, *lists;     /* [tables][V], [tables][list_words]: cuda_options.c */
    struct cuda_scores *scores; /* [T] */
    float *adjusted;            /* [adjusted_rows][V] */
    uint32_t adjusted_rows;
    struct cuda_options options;

    /* of the step that the device works at; the host's copy, laid out alike, is the flight's */
    void *step;
    uint64_t step_bytes;
    struct cuda_row *row;
    struct attn_seq *seq;
    uint32_t *counts;
    struct cuda_sample *sample;
    struct cuda_adjust *adjust;
    struct cuda_fed *fed;
    struct cuda_score *score;

    struct cuda_flight flight[CUDA_FLIGHTS];
    uint32_t first_flight, flights; /* under way */

    /* where steps are timed: the device's clock by a moment that both know */
    cudaEvent_t mark;
    double mark_us;          /* CLOCK_MONOTONIC */
    double begin_us, end_us; /* of the step that was finished last */

    /* slots for whose options there is no table: sampled on the host */
    struct sampler *sampler;
    float *host_logits, *host_adjusted; /* pinned [V]; [V] */
};

uint32_t cuda_forward_max_seqs(const struct forward_config *cfg);
enum status_code cuda_forward_start(struct forward *f, const struct forward_batch *b, uint32_t *tokens,
                                    struct status *st);
enum status_code cuda_forward_poll(struct forward *f, bool *done, struct status *st);
enum status_code cuda_forward_finish(struct forward *f, struct status *st);
enum status_code cuda_forward_run(struct forward *f, const struct forward_batch *b, uint32_t *tokens,
                                  struct status *st);

/* ---- options of single tokens (cuda_options.c) ---- */

uint32_t cuda_options_tables(uint32_t max_slots, uint32_t vocab);
uint32_t cuda_options_list_words(uint32_t vocab); /* of a table */
STATUS_MUST_CHECK enum status_code cuda_options_create(struct cuda_options *o, uint32_t max_slots, uint32_t vocab,
                                                       struct status *st);
void cuda_options_fini(struct cuda_options *o);
enum status_code cuda_forward_begin(struct forward *f, uint32_t slot, const struct sample_adjust *a, uint32_t output_at,
                                    bool *kept, struct status *st);
void cuda_forward_end(struct forward *f, uint32_t slot);
/* The device does what s->adjust says. */
bool cuda_options_kept(const struct forward *f, const struct forward_sample *s);
void cuda_options_fill(const struct forward *f, struct cuda_flight *l, const struct forward_batch *b);
/* Of samples first .. first + n - 1, whose raw logits stand in f->logits: those with options are drawn from copies; scores. */
STATUS_MUST_CHECK enum status_code cuda_options_draw(struct forward *f, const struct cuda_flight *l, uint32_t first,
                                                     uint32_t n, struct status *st);
STATUS_MUST_CHECK enum status_code cuda_options_score(struct forward *f, const struct cuda_flight *l, uint32_t first,
                                                      uint32_t n, struct status *st);
/* The step has ended: its scores go where the batch wants them. */
void cuda_options_take_scores(const struct cuda_flight *l);

/* ---- layers (cuda_layers.c) ---- */

/* All of them, of the rows, sequences and tokens that went over. */
STATUS_MUST_CHECK enum status_code cuda_forward_layers(struct forward *f, struct cuda_bucket *b, uint32_t kind,
                                                       struct status *st);

/* ---- before the first step (cuda_layers.c, cuda_run.c, cuda_warm.c) ---- */

/* The products of the bucket's layers get their ways; of the LM head for so many rows. */
STATUS_MUST_CHECK enum status_code cuda_forward_prepare(struct forward *f, struct cuda_bucket *b, struct status *st);
STATUS_MUST_CHECK enum status_code cuda_forward_prepare_head(struct forward *f, uint32_t rows, struct status *st);
/* Launches it once, on what is in the arena. */
STATUS_MUST_CHECK enum status_code cuda_forward_load_head(struct forward *f, uint32_t rows, struct status *st);
/* Whose attn_gpu_choose says how steps with chunks are launched: that of most layers. NULL: this rank has no heads. */
const struct attn_gpu *cuda_forward_chooser(const struct forward *f);
/* The bucket's graph of a kind. */
STATUS_MUST_CHECK enum status_code cuda_forward_capture(struct forward *f, struct cuda_bucket *b, uint32_t kind,
                                                        struct status *st);
/* Products for all buckets, as long as there is time; graphs; the head's products and a step of padding, so that kernels are loaded. Collective. */
STATUS_MUST_CHECK enum status_code cuda_forward_warm(struct forward *f, struct status *st);

extern const struct forward_ops forward_ops_cuda;

#endif
