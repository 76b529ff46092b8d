/* kv_account.h - the arithmetic of KV pages, compiled into both sides.
 *
 * The coordinator decides memory and ranks obey, so both must count alike: a slot of n tokens holds kv_pages_for(n)
 * pages on a rank whose token takes token_bytes. Slots are contiguous and token-major, so a page may end within a token.
 * Ranks with uneven shards differ in token_bytes; the coordinator takes the largest token_bytes and the fewest pages of
 * all ranks. ceil is monotonic in token_bytes, hence what fits in that account fits on every rank.
 */
#ifndef TANDEM_KV_ACCOUNT_H
#define TANDEM_KV_ACCOUNT_H

#include <stdint.h>

struct kv_account {
    uint64_t page_bytes;  /* one page-group */
    uint64_t token_bytes; /* one token, all layers, K and V; 0 only on a rank without KV heads */
    uint64_t total_pages;
};

/* Pages that hold `tokens` tokens. No overflow: tokens < 2^32 and token_bytes < 2^31 are checked where they come in. */
static inline uint64_t kv_pages_for(const struct kv_account *a, uint64_t tokens)
{
    return (tokens * a->token_bytes + a->page_bytes - 1) / a->page_bytes;
}

/* The account that is safe on both ranks. Page sizes must be equal. */
static inline struct kv_account kv_account_worst(struct kv_account a, struct kv_account b)
{
    if (b.token_bytes > a.token_bytes)
        a.token_bytes = b.token_bytes;
    if (b.total_pages < a.total_pages)
        a.total_pages = b.total_pages;
    return a;
}

#endif
