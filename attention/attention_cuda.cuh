/* attention_cuda.cuh - what the parts of the portable CUDA back end share: the workspace, launches.
 *
 *   plan  (once per step)   sequences -> two lists of items, sized for the GPU
 *   run   (once per layer)  blocks that stay take items from both lists until these are empty; who finishes the last part
 *                           of a unit adds the parts up, in order of keys
 */
#ifndef TANDEM_ATTENTION_CUDA_CUH
#define TANDEM_ATTENTION_CUDA_CUH

#include <cuda_runtime.h>

#include "attention/attention_internal.h"
#include "attention/attention_items.cuh"

constexpr uint32_t BOTH_ROLES = 1 << ROLE_PREFILL | 1 << ROLE_DECODE;

constexpr uint32_t THREADS = WARPS * 32;
constexpr uint32_t BLOCKS_PER_SM = 2;    /* what one waits for, the other hides */
constexpr uint32_t PLAN_MAX_SEQS = 8192; /* the planner keeps a prefix sum of them in shared memory */

/* Device memory of a back end; slots hold the parts of units that are cut. */
struct cuda_workspace {
    attn_lists *lists;
    attn_counters *counters;  /* [2]: of two launches at the same time */
    attn_item *items[ROLES];  /* [max_items] */
    uint32_t *arrived[ROLES]; /* [max_slots], zero between launches */
    float *sums[ROLES];       /* [max_slots][rows of a unit][padded D], not yet divided by the weight */
    float2 *weights[ROLES];   /* [max_slots][rows of a unit] maximum (of scores times log2 e), sum of powers */
    uint32_t max_items[ROLES];
    uint32_t max_slots[ROLES];
};

struct cuda_plan_args {
    const attn_seq *seq;
    const uint32_t *counts;
    uint32_t max_seqs, max_rows, max_seq_rows, max_kv_len;
    uint32_t group, kv_heads, window;
    uint32_t unit_rows;   /* of prefill */
    uint32_t blocks;      /* of a launch of run */
    uint32_t fixed_tiles; /* 0: parts by the batch */
    uint32_t one_way;     /* 1: all is prefill's, and not cut */
    cuda_workspace ws;
};

struct cuda_run_args {
    const char *q;
    char *out;
    uint64_t q_row_stride, out_row_stride, kv_offset, token_stride, head_stride;
    uint32_t group, head_dim, window;
    uint32_t roles;        /* bit per role: the lists to work on */
    uint32_t taken[ROLES]; /* items that blocks begin with: block i of a role with item i */
    uint32_t sms;
    uint32_t
        follows; /* 1: Hopper's prefill, beside which this one begins, stands in front, and left the counters as they were */
    float score_scale; /* scores times this are powers of 2; 1 where they are bent first; positive */
    uint32_t bent;     /* scores s become bend_out * tanh(bend_in * s), or bend_out * s where bend_in is 0 */
    float bend_in, bend_out;
    attn_counters *counters;
    cuda_workspace ws;
};

struct cuda_kernel {
    void (*run)(const cuda_run_args);    /* a __global__ function: both roles, or prefill */
    void (*decode)(const cuda_run_args); /* the same: decode */
    uint32_t padded_dim;
    uint32_t unit_rows; /* of prefill */
    uint32_t shared_bytes, decode_bytes;
};

/* By padded head dimension, bf16 and f16. */
extern const cuda_kernel cuda_kernels_64[2], cuda_kernels_128[2], cuda_kernels_256[2];

cudaError_t cuda_launch_plan(const cuda_plan_args &args, cudaStream_t stream);

/* For a back end with a plan of its own: decode's list by this back end's kernel, BLOCKS_PER_SM blocks on each of a.sms. Of
 * `a` roles and taken are filled in here. Prepare once per device. */
cudaError_t cuda_prepare_decode(uint32_t head_dim, attn_dtype dtype);
cudaError_t cuda_launch_decode(cuda_run_args a, attn_dtype dtype, cudaStream_t stream);

#endif
