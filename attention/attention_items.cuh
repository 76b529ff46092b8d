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

enum attn_role { ROLE_PREFILL = 0, ROLE_DECODE = 1, ROLES = 2 };

constexpr uint32_t DECODE_ROWS = 16; /* the rows of one mma.sync, or two times its columns */
constexpr uint32_t TILE_KEYS = 64;   /* plans count work in tiles of so many keys */
constexpr uint32_t WARPS = 4;        /* that work on a decode item */

struct attn_item {
    uint32_t seq;
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

struct attn_lists {
    uint32_t count[ROLES]; /* items; written by plan */
    uint32_t fault;
};

#endif
