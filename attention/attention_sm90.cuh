/* attention_sm90.cuh - what the Hopper kernels share: shapes, arguments, what a block keeps in shared memory.
 *
 * The plan writes two lists of items once per step (attention_items.cuh); the kernels take items from them until they are
 * empty.
 *
 * K and V come in by the copy engine, through two tensor maps per sequence that the plan writes:
 *
 *   dimension 0: elements of a head   1: tokens, kv_len of them   2: 16-byte steps of kv_offset + kv_head * head_stride
 *
 * Dimension 2 overlaps the others on purpose: any layer and head of any layout is a coordinate. What lies behind kv_len is
 * out of bounds: never read, and zero in shared memory. Boxes are BOX_KEYS tokens of BOX_DIMS elements (128 swizzled bytes).
 */
#ifndef TANDEM_ATTENTION_SM90_CUH
#define TANDEM_ATTENTION_SM90_CUH

#include <cuda_runtime.h>

#include "attention/attention_bend.cuh"
#include "attention/attention_internal.h"
#include "attention/attention_items.cuh"
#include "attention/attention_sm90_rule.h"
#include "attention/ptx_sm90.cuh"

constexpr uint32_t BOX_DIMS = 64; /* elements of a row */
constexpr uint32_t BOX_KEYS = 32;
constexpr uint32_t BOX_BYTES = BOX_KEYS * BOX_DIMS * 2;
static_assert(BOX_DIMS * 2 == 128, "a swizzled row");
constexpr uint32_t DECODE_BLOCKS_PER_SM = SM90_DECODE_BLOCKS;
constexpr uint32_t CLUSTER = SM90_CLUSTER; /* blocks that work on a prefill unit: each brings half of K and V to both */
constexpr uint32_t BLOCK_ROWS = 128;       /* of prefill: 64 per consumer warpgroup */
constexpr uint32_t UNIT_ROWS = CLUSTER * BLOCK_ROWS;
constexpr uint32_t UNIT_GROUPS = UNIT_ROWS / 64;
static_assert(UNIT_ROWS == SM90_UNIT_ROWS && DECODE_ROWS == SM90_DECODE_ROWS && TILE_KEYS == SM90_TILE_KEYS &&
                  (uint32_t)ROLE_PREFILL == SM90_PREFILL && (uint32_t)ROLE_DECODE == SM90_DECODE &&
                  (uint32_t)ROLES == SM90_ROLES && BOX_DIMS == SM90_BOX,
              "the rule's are the kernels'");
/* Numbers of arrived parts, by role: a cut unit has two slots at least, and prefill counts by group of 64 rows. */
constexpr uint32_t ARRIVED_PER_SLOT[2] = {UNIT_GROUPS / 2, 1};
constexpr uint32_t GROUP_THREADS = 128;
constexpr uint32_t NO_ITEM = UINT32_MAX;

/* Named barriers. */
enum { BAR_TURN = 2 /* and 3 */, BAR_ROWS = 4 /* and 5 */, BAR_DECODE = 6 };

struct alignas(128) sm90_map { /* a CUtensorMap */
    unsigned char opaque[128];
};

/* Fills *out for any sequence of this layout; any_memory: a device address, aligned to 16. */
cudaError_t sm90_map_template(sm90_map *out, uint32_t head_dim, uint64_t token_stride, bool bf16, void *any_memory);
cudaError_t sm90_launch_maps(const attn_seq *seq, const uint32_t *counts, uint32_t max_seqs, const sm90_map &from,
                             sm90_map *k_maps, sm90_map *v_maps, cudaStream_t stream);

/* Device memory of the back end; slots hold the parts of units that are cut. */
struct sm90_workspace {
    attn_lists *lists;
    attn_counters *counters;      /* [2]: of two launches at the same time */
    uint32_t *arrived[ROLES];     /* [ARRIVED_PER_SLOT * max_slots], zero between launches */
    sm90_map *k_maps, *v_maps;    /* [max_seqs] */
    uint32_t *offsets[2 * ROLES]; /* [max_seqs], of the plan: first item of a sequence by role, first slot by role */
    attn_item *items[ROLES];      /* [max_items] */
    float2 *weights[ROLES];       /* [max_slots][rows of a unit] maximum (of scores times log2 e), sum of powers */
    float *sums[ROLES];           /* [max_slots][rows of a unit][padded D], not yet divided by the weight */
    uint32_t max_items[ROLES];
    uint32_t max_slots[ROLES];
};

struct sm90_plan_args {
    const attn_seq *seq;
    const uint32_t *counts;
    uint32_t max_seqs;
    sm90_shape shape;
    sm90_workspace ws;
};

struct sm90_run_args {
    const char *q;
    char *out;
    uint64_t q_row_stride, out_row_stride, kv_offset, head_stride;
    uint32_t group, head_dim, window;
    uint32_t group_inverse;  /* 2^32 / group, rounded up */
    uint32_t decode_follows; /* 1: decode's kernel stands behind, takes what there is, and sets the counters back */
    float score_scale;       /* scores times this are powers of 2; 1 where they are bent first; positive */
    float bend_in, bend_out; /* bent scores s become bend_out * tanh(bend_in * s), or bend_out * s where bend_in is 0 */
    attn_counters *counters;
    sm90_workspace ws;
};

struct sm90_args {
    sm90_run_args run;
};

struct sm90_kernel {
    void (*run)(const sm90_args); /* a __global__ function */
    uint32_t threads, shared_bytes, blocks_per_sm;
};

struct sm90_kernels {
    sm90_kernel prefill, decode, fused;
    sm90_kernel prefill_beside, decode_beside; /* fit on an SM together */
    uint32_t padded_dim;
};

/* Scores are bent or not: kernels of their own, since a small step fetches most of its code anew in each layer. */
template <bool BF16_, bool BENT_> struct sm90_type {
    static constexpr bool BF16 = BF16_, BENT = BENT_;
};

extern const sm90_kernels sm90_kernels_64[2][2], sm90_kernels_128[2][2]; /* [bent][f16] */

cudaError_t sm90_launch_plan(const sm90_plan_args &args, cudaStream_t stream);

/* The rows and keys of an item, as every thread needs them. */
struct sm90_unit {
    const sm90_map *k_map, *v_map;
    int32_t k_step; /* coordinate 2 */
    uint32_t first_row, rows, kv_len, packed;
};

__device__ __forceinline__ sm90_unit sm90_unit_of(const sm90_args &a, const attn_item &it)
{
    const attn_seq &s = it.s;
    sm90_unit u;
    u.k_map = a.run.ws.k_maps + it.seq;
    u.v_map = a.run.ws.v_maps + it.seq;
    u.k_step = (int32_t)((a.run.kv_offset + it.kv_head * a.run.head_stride) / 16);
    u.first_row = s.first_row;
    u.rows = s.rows;
    u.kv_len = s.kv_len;
    u.packed = s.rows * a.run.group;
    return u;
}

/* p / group, exact where p * (group - 1) is below 2^32. Divisions would be a tenth of the kernels' code. */
__device__ __forceinline__ uint32_t sm90_by_group(const sm90_args &a, uint32_t p)
{
    return a.run.group == 1 ? p : __umulhi(p, a.run.group_inverse);
}

/* Packed row p sees keys sm90_first(limit) .. limit - 1. Rows behind the last see what it sees. */
__device__ __forceinline__ uint32_t sm90_limit(const sm90_args &a, const sm90_unit &u, uint32_t p)
{
    return u.kv_len - u.rows + sm90_by_group(a, p < u.packed ? p : u.packed - 1) + 1;
}

__device__ __forceinline__ uint32_t sm90_first(const sm90_args &a, uint32_t limit)
{
    return a.run.window && limit > a.run.window ? limit - a.run.window : 0;
}

__device__ __forceinline__ uint64_t sm90_row_at(const sm90_args &a, const sm90_unit &u, uint32_t kv_head, uint32_t p,
                                                uint64_t stride)
{
    const uint32_t row = sm90_by_group(a, p);
    return (uint64_t)(u.first_row + row) * stride +
           (uint64_t)(kv_head * a.run.group + p - row * a.run.group) * a.run.head_dim * 2;
}

/* Byte of 16-byte chunk c of row r in blocks of 64 columns (128 swizzled bytes per row), `rows` rows each. */
__device__ __forceinline__ uint32_t sm90_swizzled(uint32_t r, uint32_t c, uint32_t rows)
{
    return (c / 8) * rows * 128 + r * 128 + ((c % 8 ^ (r & 7)) << 4);
}

__device__ __forceinline__ float sm90_bend(const sm90_args &a, float s)
{
    return a.run.bend_out * (a.run.bend_in == 0 ? s : attn_tanh(a.run.bend_in * s));
}

#endif
