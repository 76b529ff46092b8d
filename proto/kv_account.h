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
    uint32_t lanes;  /* pieces that a token's bytes are cut into, each contiguous of its own; 0 is 1, the usual */
    uint32_t uneven; /* 1: ranks differ in token_bytes, so that a shared prefix may save one page (per lane) less */
};

static inline uint64_t kv_lanes(const struct kv_account *a)
{
    return a->lanes ? a->lanes : 1;
}

/* Pages that hold `tokens` tokens. No overflow: tokens < 2^32 and token_bytes < 2^31 are checked where they come in. */
static inline uint64_t kv_pages_for(const struct kv_account *a, uint64_t tokens)
{
    uint64_t lanes = kv_lanes(a);
    return lanes * ((tokens * (a->token_bytes / lanes) + a->page_bytes - 1) / a->page_bytes);
}

/* Pages that `tokens` tokens fill to the end: what a slot that begins with these tokens can share with another. */
static inline uint64_t kv_pages_shared(const struct kv_account *a, uint64_t tokens)
{
    uint64_t lanes = kv_lanes(a);
    return lanes * (tokens * (a->token_bytes / lanes) / a->page_bytes);
}

/* Pages that a slot of `tokens` tokens adds to what is in use when its first `shared` tokens are another slot's. With an
 * account of ranks that differ, the most that any of them adds. */
static inline uint64_t kv_pages_added(const struct kv_account *a, uint64_t tokens, uint64_t shared)
{
    uint64_t all = kv_pages_for(a, tokens), saved = kv_pages_shared(a, shared);
    uint64_t slack = a->uneven && saved ? kv_lanes(a) : 0;
    return all - saved + slack;
}

/* The account that is safe on both ranks. Page sizes must be equal. */
static inline struct kv_account kv_account_worst(struct kv_account a, struct kv_account b)
{
    if (a.uneven || b.uneven || a.token_bytes != b.token_bytes)
        a.uneven = 1;
    if (b.token_bytes > a.token_bytes)
        a.token_bytes = b.token_bytes;
    if (b.total_pages < a.total_pages)
        a.total_pages = b.total_pages;
    return a;
}

#endif
