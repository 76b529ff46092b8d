/* shard.h - which part of the model a rank holds: pure arithmetic. Prefix shard_.
 *
 * R = 1..SHARD_MAX_RANKS ranks share any number of heads, columns and vocabulary rows.
 *
 *   heads, R <= HK   KV heads in whole contiguous groups, the remainder to the first ranks; each brings its G = H / HK
 *                    query heads.                        H 6, HK 3, R 2:  rank 0: kv 0,1 q 0..3   rank 1: kv 2 q 4,5
 *   heads, R > HK    KV head j is held by ranks [j*R/HK, (j+1)*R/HK), a copy on each; its G query heads are split evenly
 *                    among them, the remainder to the first. A rank may be left without heads: then it has no KV either.
 *                                                        H 6, HK 1, R 4:  q 2+2+1+1, kv 0 on each
 *   columns, rows    evenly, the remainder to the first ranks.              512 on 3: 171+171+170
 *                    on devices in units of SHARD_DEVICE_UNIT                         176+168+168
 *
 * So on each rank every KV head has the same number of query heads, as attention.h wants it.
 */
#ifndef TANDEM_SHARD_H
#define TANDEM_SHARD_H

#include <stdint.h>

#include "proto/ranks.h"

#define SHARD_MAX_RANKS   MAX_RANKS
#define SHARD_DEVICE_UNIT 8 /* of columns and vocabulary rows: 16 bytes of bf16 */

/* Items first .. first + count - 1. */
struct shard_span {
    uint32_t first;
    uint32_t count;
};

struct shard {
    struct shard_span heads;    /* query heads */
    struct shard_span kv_heads; /* none where there are no query heads */
    struct shard_span inner;    /* MLP columns */
    struct shard_span vocab;    /* rows of embedding and LM head */
};

/* rank < ranks. */
struct shard_span shard_even(uint32_t n, uint32_t rank, uint32_t ranks);
/* In units of `unit` items, the last of which may be short: what a device wants aligned. */
struct shard_span shard_units(uint32_t n, uint32_t unit, uint32_t rank, uint32_t ranks);
/* Bytes of one element of K and V, by back end. */
#define SHARD_KV_HOST_BYTES 4 /* float32: greedy ids then equal those of a float32 reference */
#define SHARD_KV_CUDA_BYTES 2 /* bfloat16 */

/* K and V of one token in all layers. */
static inline uint64_t shard_kv_token_bytes(const struct shard *s, uint32_t layers, uint32_t head_dim,
                                            uint32_t elem_bytes)
{
    return (uint64_t)layers * 2 * s->kv_heads.count * head_dim * elem_bytes;
}
void shard_heads(struct shard_span *heads, struct shard_span *kv_heads, uint32_t n_heads, uint32_t n_kv_heads,
                 uint32_t rank, uint32_t ranks);

#endif
