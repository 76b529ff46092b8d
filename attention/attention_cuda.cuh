/* attention_cuda.cuh - what the parts of the portable CUDA back end share: items, the workspace, launches.
 *
 * A packed row is one query head of one query row: packed row p of a sequence and KV head is query row p / G, head
 * kv_head * G + p % G. A unit is a block of packed rows of one sequence and KV head with all keys they see; an item is a
 * unit, or a part of its keys. Units of at most DECODE_ROWS packed rows (decodes, tiny chunks) are "decode", whose cost is
 * reading K and V; others are "prefill".
 *
 *   plan  (once per step)   sequences -> two lists of items, sized for the GPU
 *   run   (once per layer)  blocks that stay take items from both lists until these are empty; who finishes the last part
 *                           of a unit adds the parts up, in order of keys
 */
#ifndef TANDEM_ATTENTION_CUDA_CUH
#define TANDEM_ATTENTION_CUDA_CUH

#include <cuda_runtime.h>

#include "attention/attention_internal.h"

enum cuda_role { ROLE_PREFILL = 0, ROLE_DECODE = 1, ROLES = 2 };
constexpr uint32_t BOTH_ROLES = 1 << ROLE_PREFILL | 1 << ROLE_DECODE;

constexpr uint32_t DECODE_ROWS = 16; /* the rows of one mma */
constexpr uint32_t TILE_KEYS = 64;   /* work is counted in tiles of so many keys */
constexpr uint32_t WARPS = 4;
constexpr uint32_t THREADS = WARPS * 32;
constexpr uint32_t BLOCKS_PER_SM = 2;    /* what one waits for, the other hides */
constexpr uint32_t PLAN_MAX_SEQS = 8192; /* the planner keeps a prefix sum of them in shared memory */

struct cuda_item {
    uint32_t seq;
    uint32_t kv_head;
    uint32_t first;     /* packed row */
    uint32_t key_begin; /* of this part */
    uint32_t key_end;
    uint32_t part;  /* index */
    uint32_t parts; /* of the unit */
    uint32_t slot;  /* of the unit's part 0; its number of arrived parts stands at the same index */
};

/* Counters that the blocks of one launch share, zero between launches: the last block to leave sees to it. */
struct cuda_counters {
    uint32_t next[ROLES]; /* items taken, beside those that blocks begin with */
    uint32_t left;        /* blocks */
};

struct cuda_lists {
    uint32_t count[ROLES]; /* items; written by plan */
    uint32_t fault;
};

/* Device memory of a back end; slots hold the parts of units that are cut. */
struct cuda_workspace {
    cuda_lists *lists;
    cuda_counters *counters;  /* [2]: of two launches at the same time */
    cuda_item *items[ROLES];  /* [max_items] */
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
    cuda_workspace ws;
};

struct cuda_run_args {
    const attn_seq *seq;
    const char *q;
    char *out;
    uint64_t q_row_stride, out_row_stride, kv_offset, token_stride, head_stride;
    uint32_t group, head_dim, window;
    uint32_t roles;        /* bit per role: the lists to work on */
    uint32_t taken[ROLES]; /* items that blocks begin with: block i of a role with item i */
    uint32_t sms;
    float score_scale; /* scores times this are powers of 2; 1 where they are bent first; positive */
    uint32_t bent;     /* scores s become bend_out * tanh(bend_in * s), or bend_out * s where bend_in is 0 */
    float bend_in, bend_out;
    cuda_counters *counters;
    cuda_workspace ws;
};

struct cuda_kernel {
    void (*run)(const cuda_run_args); /* a __global__ function */
    uint32_t padded_dim;
    uint32_t unit_rows; /* of prefill */
    uint32_t shared_bytes;
};

/* By padded head dimension, bf16 and f16. */
extern const cuda_kernel cuda_kernels_64[2], cuda_kernels_128[2], cuda_kernels_256[2];

cudaError_t cuda_launch_plan(const cuda_plan_args &args, cudaStream_t stream);

#endif
