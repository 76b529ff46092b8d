#include "worker/shard.h"

struct shard_span shard_even(uint32_t n, uint32_t rank, uint32_t ranks)
{
    uint32_t each = n / ranks, rest = n % ranks;
    return (struct shard_span){
        .first = rank * each + (rank < rest ? rank : rest),
        .count = each + (rank < rest),
    };
}

struct shard_span shard_units(uint32_t n, uint32_t unit, uint32_t rank, uint32_t ranks)
{
    struct shard_span s = shard_even((n + unit - 1) / unit, rank, ranks);
    uint32_t first = s.first * unit < n ? s.first * unit : n, end = (s.first + s.count) * unit;
    return (struct shard_span){first, (end < n ? end : n) - first};
}

void shard_heads(struct shard_span *heads, struct shard_span *kv_heads, uint32_t n_heads, uint32_t n_kv_heads,
                 uint32_t rank, uint32_t ranks)
{
    uint32_t group = n_heads / n_kv_heads;
    if (ranks <= n_kv_heads) {
        *kv_heads = shard_even(n_kv_heads, rank, ranks);
        *heads = (struct shard_span){kv_heads->first * group, kv_heads->count * group};
        return;
    }
    /* the last j with j * ranks / n_kv_heads <= rank */
    uint32_t j = 0;
    while (j + 1 < n_kv_heads && (uint64_t)(j + 1) * ranks / n_kv_heads <= rank)
        j++;
    uint32_t begin = (uint32_t)((uint64_t)j * ranks / n_kv_heads);
    uint32_t end = (uint32_t)((uint64_t)(j + 1) * ranks / n_kv_heads);
    *heads = shard_even(group, rank - begin, end - begin);
    heads->first += j * group;
    *kv_heads = (struct shard_span){j, heads->count ? 1 : 0};
}
