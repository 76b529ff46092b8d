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
 * Result of a row does not depend on the other sequences of the batch, nor on the number of threads (on a GPU: beyond
 * rounding, or not at all, see fixed_split_keys).
 *
 * Two families of back ends, one meaning: struct attn computes on the host at once; struct attn_gpu, below, launches
 * kernels on a stream, with everything that changes from step to step in device memory, so that a captured CUDA graph
 * serves every step. (One graph is right for all; to be as fast as README.md says a caller keeps one for each way, see
 * attn_gpu_choose.)
 */
#ifndef TANDEM_ATTENTION_H
#define TANDEM_ATTENTION_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/status.h"

#ifdef __cplusplus
extern "C" {
#endif

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
    float soft_cap;    /* c > 0: scores s = scale * q . k become c * tanh(s / c); 0: none */
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

/* ---- back ends on a GPU ----
 *
 *     struct attn_gpu *a;
 *     attn_gpu_pick(&cfg, st);                           fills cfg.ops: the fastest back end that can do cfg
 *     attn_gpu_create(&a, &cfg, st);                     all memory is taken here
 *     per step, captured in a graph or not:
 *       (caller, on the stream: step.seq and step.counts get this step's batch)
 *       attn_gpu_plan(a, &step, st);                     once per step: work lists, on the device, from step's memory
 *       attn_gpu_run(a, &step, &io_of_layer_0, st);      once per layer, all with the same plan
 *       attn_gpu_run(a, &step, &io_of_layer_1, st); ...
 *
 * Memory of q, out, K and V is the device's; their elements are cfg.dtype (bf16 or f16), sums are fp32.
 *
 *   q, out  row r, head h: base + r * row_stride + h * D * 2 + d * 2; row strides in bytes, so that q may stay where the
 *           QKV product left it
 *   K, V    of a sequence: seq.k + io.kv_offset + t * token_stride + h * head_stride + d * 2. With all layers of a token
 *           side by side (token_stride = L * 2 * HK * D * 2), seq.k and seq.v are those of layer 0, and kv_offset is
 *           l * 2 * HK * D * 2.
 *
 * Alignment: q, out, k, v, every stride and kv_offset are multiples of 16 bytes.
 *
 * What is read: of K and V only tokens 0 .. kv_len - 1 (with a window, only those that some row of the sequence sees), in
 * full rows of D; pages behind may be unmapped, and NaN behind or between does no harm. Of q and out only rows of
 * sequences. Keys that a row does not see, but another row of its sequence does, must be finite.
 *
 * When: a run may begin before launches in front of it have ended, where these allow it (programmatic dependent launch). Before
 * they have it reads the plan and tokens 0 .. kv_len - rows - 1, which must thus be written by what stands before the plan on
 * the stream: two sequences of one step may share tokens of earlier steps, not those that one of them adds in it.
 *
 * out overlaps nothing that is read. A row of q and out that belongs to no sequence is neither read nor written; one that belongs to
 * two has either's result, or parts of both (the host back end refuses both, INVALID_ARGUMENT).
 *
 * Streams and graphs: plan and run only launch kernels on step.stream (and, with ATTN_GPU_STREAMS, on an own stream that
 * is forked from it and joined to it): no allocation, no synchronisation, no copy from the host. They may be captured;
 * the arguments are then frozen, the contents of seq and counts are read at each replay. Plans and runs of one struct
 * attn_gpu must follow each other in stream order: it has one plan and one workspace. A plan's runs are given its step's bounds
 * and way. Create and destroy are not captured; destroy when the GPU has finished, with the device of the config current; graphs
 * that were captured must not run after it.
 *
 * Threads: plan, run and destroy of one struct attn_gpu by one thread at a time; all else of it by any. Two of them share nothing.
 *
 * Limits: those of max_seqs, rows, keys and strides stand at the fields. "sm90" computes head dimensions up to 128 and no
 * batch_invariant; attn_gpu_pick takes "cuda" for these without a word (attn_gpu_name says which it is), whose prefill does 270 to
 * 310 TFLOP/s at D 128 where the other does 620 to 720 (README.md).
 */

/* How prefill and decode share the GPU. All but ATTN_GPU_AUTO are there to be compared. */
enum attn_gpu_policy {
    ATTN_GPU_AUTO = 0, /* by the step's way; which SMs work on what is decided on the device, from the batch */
    ATTN_GPU_FUSED,    /* one kernel in which both live on every SM */
    ATTN_GPU_SERIAL,   /* prefill's work, then decode's */
    ATTN_GPU_STREAMS,  /* two kernels on two streams */
};

/* The launches of a run under ATTN_GPU_AUTO. Each is right for any batch; which is fastest attn_gpu_choose says. */
enum attn_gpu_way {
    ATTN_WAY_APART = 0, /* prefill's kernel, and decode's, which begins on the SMs that the plan leaves to it */
    ATTN_WAY_FUSED,     /* one kernel in which both live on every SM */
    ATTN_WAY_SERIAL,    /* prefill's kernel on all SMs, then decode's, as by ATTN_GPU_SERIAL */
    ATTN_GPU_WAYS       /* their number */
};

struct attn_gpu_ops;
extern const struct attn_gpu_ops attn_gpu_ops_cuda; /* portable: mma.sync, sm_80 and newer */
extern const struct attn_gpu_ops attn_gpu_ops_sm90; /* wgmma and the copy engine, compute capability 9.0 alone */

struct attn_gpu_config {
    const struct attn_gpu_ops *ops;
    int device;            /* of the CUDA runtime */
    enum attn_dtype dtype; /* of q, out, K and V: ATTN_BF16 or ATTN_F16 */
    uint32_t heads;        /* H, of this rank */
    uint32_t kv_heads;     /* HK; H is a multiple */
    uint32_t head_dim;     /* D, a multiple of 8 up to 256 */
    float scale;           /* of q . k, usually 1 / sqrt(D); 0 and below take the slow kernels of a soft cap */
    float soft_cap;  /* c > 0: scores s = scale * q . k become c * tanh(s / c), prefill 2.3 times as slow; 0: none */
    uint32_t window; /* keys a row sees at most; 0: all. Layers with another window take another struct attn_gpu */
    uint64_t token_stride; /* bytes, of K and V alike; D * 2 and more; sm90: below 2^40 */
    uint64_t head_stride;  /* D * 2 and more; with one KV head not looked at */
    uint32_t max_seqs;     /* of a batch; 1 to 8192 */
    /* T, of a batch; max_seqs and more, max_rows * H below 2^31; sm90: (max_rows * G + 256) * (G - 1) below 2^32 */
    uint32_t max_rows;
    uint32_t max_kv_len;    /* of a sequence; 1 to 2^31 - 1 */
    uint64_t max_kv_tokens; /* of all sequences of a batch together; 0: max_seqs * max_kv_len */
    /* 0: keys are cut into parts as the batch needs, and a row's result depends on the batch within rounding. Else the cut
     * depends on the sequence's own rows and kv_len alone (parts of so many keys, a multiple of 64, for decodes; chunks
     * are not cut), and so do all bits of its rows. */
    uint32_t fixed_split_keys;
    /* A row's bits depend on its own q and on the keys that it sees, and on nothing else: neither on the batch nor on the
     * chunk that it came in. All work goes one way, whatever its size, and keys are never cut: slow where few sequences are
     * long. Takes no window, whose first key depends on the chunk, and no fixed_split_keys. */
    bool batch_invariant;
    enum attn_gpu_policy policy;
};

/* A step. Made once per captured graph ("bucket"): the pointers and bounds stay, the memory behind them changes. */
struct attn_gpu_step {
    /* Device memory, [max_seqs]; 8-byte aligned. k and v: device pointers, token 0, head 0, layer 0. Not changed between
     * the plan and the last run of the step. */
    const struct attn_seq *seq;
    const uint32_t *counts; /* device memory, [1]: sequences of this step, 0 .. max_seqs */
    /* Bounds of the bucket, host numbers, at most the config's: launches are sized by them. */
    uint32_t max_seqs;     /* 0: nobody. A plan sets the fault then, a run does nothing */
    uint32_t max_rows;     /* max_seqs and more */
    uint32_t max_seq_rows; /* rows of one sequence: 1 where all are decodes; max_rows if not known */
    enum attn_gpu_way way; /* of the plan and its runs */
    void *stream;          /* cudaStream_t; NULL is the default stream */
};

/* One layer's memory. */
struct attn_gpu_io {
    const void *q;
    void *out;
    uint64_t q_row_stride; /* bytes; at least H * D * 2 */
    uint64_t out_row_stride;
    uint64_t kv_offset; /* bytes, added to every k and v; sm90: with the last head's offset below 2^35 */
};

struct attn_gpu;

/* Sets cfg->ops to the first back end, fastest first, that can do cfg on cfg->device; UNIMPLEMENTED, with the last one's reason, when
 * none can; INVALID_ARGUMENT as attn_gpu_create. */
STATUS_MUST_CHECK enum status_code attn_gpu_pick(struct attn_gpu_config *cfg, struct status *st);

/* INVALID_ARGUMENT names the field; UNIMPLEMENTED: the back end cannot do this on this device; RESOURCE_EXHAUSTED: the
 * device has not memory enough. Makes cfg->device current for the calling thread. */
STATUS_MUST_CHECK enum status_code attn_gpu_create(struct attn_gpu **out, const struct attn_gpu_config *cfg,
                                                   struct status *st);
void attn_gpu_destroy(struct attn_gpu *a); /* NULL is fine */
const char *attn_gpu_name(const struct attn_gpu *a);
/* Device memory held. Most of it are sums of parts, fp32: sm90 has 8 KiB (D up to 64: 4) for each of 5 * HK * max_seqs + 28 * SMs
 * parts of decodes, 0.37 GB for 1024 sequences of 8 KV heads, and 128 KiB (64) for each of 3 * SMs parts of prefill, 52 MB;
 * max_kv_tokens counts under fixed_split_keys alone. */
uint64_t attn_gpu_workspace_bytes(const struct attn_gpu *a);

/* Faults that are not of one sequence. */
#define ATTN_FAULT_KV_TOKENS 0xfffffff0u /* more keys in all than max_kv_tokens: rows of the last ones may be missing */
#define ATTN_FAULT_ROWS      0xfffffff1u /* more rows in all than the config's max_rows; likewise */
#define ATTN_FAULT_SEQS      0xfffffff2u /* more sequences than the step's max_seqs: those behind are not looked at */

/* Device memory, one uint32_t: 0, one of the above, or, before these, 1 + the index of a sequence of the last plan that breaks
 * a rule (no rows, kv_len below rows or above max_kv_len, more rows than max_seq_rows, rows behind max_rows). The rows of such
 * a sequence are not computed; the others are. Sums are not looked for as such: more keys or rows in all are a fault where
 * the workspace does not hold the plan that they need. Copy it with the step's results. */
const uint32_t *attn_gpu_fault(const struct attn_gpu *a);

/* What a fault that was copied says: OK for 0, else INTERNAL with the sequence or the limit by name. */
STATUS_MUST_CHECK enum status_code attn_gpu_fault_status(const struct attn_gpu *a, uint32_t fault, struct status *st);

/* The fastest way for a step of these sequences (host memory; k and v are not looked at): where lengths are known on the host before a
 * step, it may keep a graph of each way for a bucket. Any thread. attn_gpu_ways: how many of them it ever says, the first so many: all, fewer
 * where heads are such that the last ones are never the fastest, or 1, ATTN_WAY_APART, where a policy or a fixed cut is given or the back
 * end knows one only. */
uint32_t attn_gpu_ways(const struct attn_gpu *a);
enum attn_gpu_way attn_gpu_choose(const struct attn_gpu *a, const struct attn_seq *seq, uint32_t seqs);

/* The device of the config must be current. Both check what the host knows (INVALID_ARGUMENT) and report launch errors
 * (INTERNAL). A step of no sequences is fine. */
STATUS_MUST_CHECK enum status_code attn_gpu_plan(struct attn_gpu *a, const struct attn_gpu_step *step,
                                                 struct status *st);
STATUS_MUST_CHECK enum status_code attn_gpu_run(struct attn_gpu *a, const struct attn_gpu_step *step,
                                                const struct attn_gpu_io *io, struct status *st);

#ifdef __cplusplus
}
#endif
#endif
