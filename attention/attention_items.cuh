/* attention_items.cuh - what the plans of the back ends on a GPU leave for their kernels: two lists of items. Alike in all
 * back ends, so that one may run another's kernel on its own lists.
 *
 * A packed row is one query head of one query row: packed row p of a sequence and KV head is query row p / G, head
 * kv_head * G + p % G. A unit is a block of packed rows of one sequence and KV head with all keys they see; an item is a
 * unit, or a part of its keys. Units of at most DECODE_ROWS packed rows (decodes, tiny chunks) are "decode", whose cost is
 * reading K and V; others are "prefill". Who finishes the last part of a unit adds the parts up, in order of keys.
 */
#ifndef TANDEM_ATTENTION_ITEMS_CUH
#define TANDEM_ATTENTION_ITEMS_CUH

#include <cstdint>

#include <cuda_runtime.h>

#include "attention/attention.h"

enum attn_role { ROLE_PREFILL = 0, ROLE_DECODE = 1, ROLES = 2 };

constexpr uint32_t DECODE_ROWS = 16; /* the rows of one mma.sync, or two times its columns */
constexpr uint32_t TILE_KEYS = 64;   /* plans count work in tiles of so many keys */
constexpr uint32_t WARPS = 4;        /* that work on a decode item */

/* One read of 64 bytes tells a block all of its work: each read that waits for another costs a small step 0.7 us. */
struct alignas(16) attn_item {
    attn_seq s;
    uint32_t seq; /* index of s */
    uint32_t kv_head;
    uint32_t first;     /* packed row */
    uint32_t key_begin; /* of this part */
    uint32_t key_end;
    uint32_t part;  /* index */
    uint32_t parts; /* of the unit; 0: not an item, skipped */
    uint32_t slot;  /* of the unit's part 0; its number of arrived parts stands at the same index */
};

/* Counters that the blocks of one launch share, zero between launches: the last block to leave sees to it. */
struct attn_counters {
    uint32_t next[ROLES]; /* items taken, beside those that blocks begin with */
    uint32_t left;        /* blocks */
};

struct alignas(16) attn_lists {
    uint32_t count[ROLES]; /* items; written by plan */
    uint32_t clusters;     /* sm90: that work on prefill, where it has a kernel of its own */
    uint32_t fault;
};

/* Kernels of a step read lists and items before attn_wait_earlier: what came between them and the plan, which is no such
 * launch, has begun after the plan's end, and the plan's threads end with a fence. Not from a cache of an SM, where an
 * earlier step's may stand. K and V of tokens before the step's own are as old (attention.h): decode's kernel reads them as
 * early, by copies that go past that cache. */
__device__ __forceinline__ attn_lists attn_lists_of(const attn_lists *lists)
{
    const uint4 x = __ldcg((const uint4 *)lists);
    return {{x.x, x.y}, x.z, x.w};
}

__device__ __forceinline__ void attn_item_copy(attn_item *to, const attn_item *from)
{
    static_assert(sizeof(attn_item) % sizeof(uint4) == 0, "copied by 16 bytes");
    uint4 x[sizeof(attn_item) / sizeof(uint4)];
#pragma unroll
    for (uint32_t i = 0; i < sizeof(attn_item) / sizeof(uint4); i++)
        x[i] = __ldcg((const uint4 *)from + i);
#pragma unroll
    for (uint32_t i = 0; i < sizeof(attn_item) / sizeof(uint4); i++)
        ((uint4 *)to)[i] = x[i];
}

#endif
