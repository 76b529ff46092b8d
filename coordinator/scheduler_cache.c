/* scheduler_cache.c - slots of ended requests stay, as long as nobody needs their room, for requests that begin alike. */
#include "coordinator/scheduler_internal.h"

#define MAX_BLOCKS (1u << 30)

enum status_code cache_attach(struct sched *s, struct status *st)
{
    if (!s->cfg.prefix_cache || s->kv.token_bytes == 0)
        return ST_OK;
    uint64_t lane_bytes = s->kv.token_bytes / kv_lanes(&s->kv), blocks = s->kv.total_pages + s->slots;
    s->block_tokens = (uint32_t)((s->kv.page_bytes + lane_bytes - 1) / lane_bytes);
    const struct prefix_config cfg = {.block_tokens = s->block_tokens,
                                      .max_entries = s->slots,
                                      .max_nodes = blocks < MAX_BLOCKS ? (uint32_t)blocks : MAX_BLOCKS,
                                      .first_version = s->prefix_first_version};
    return prefix_create(&s->prefix, &cfg, st);
}

void cache_detach(struct sched *s)
{
    if (s->prefix) /* requests that wait keep what they matched */
        s->prefix_first_version = prefix_version(s->prefix) + 1;
    prefix_destroy(s->prefix);
    s->prefix = NULL;
}

void cache_index(struct sched *s, struct req *r)
{
    if (!s->prefix || !r->cache_write)
        return;
    uint32_t n = r->n_fed < r->n_known ? r->n_fed : r->n_known;
    if (n / s->block_tokens == r->n_indexed / s->block_tokens)
        return;
    prefix_extend(s->prefix, r->slot, r->salt, r->tokens, n);
    r->n_indexed = n;
}

bool cache_park(struct sched *s, struct req *r)
{
    if (!s->prefix)
        return false;
    cache_index(s, r);
    if (!prefix_park(s->prefix, r->slot))
        return false;
    /* what was set apart for rows that never came is on no rank */
    uint64_t spare = r->pages - kv_pages_for(&s->kv, r->n_fed);
    holder_trim(s, r->slot, spare);
    s->free_pages += spare;
    s->owner[r->slot] = NULL;
    s->n_running--;
    r->slot = SCHED_NO_SLOT;
    r->pages = 0;
    r->cap_tokens = r->n_indexed = 0;
    r->decoding = false;
    return true;
}

void cache_forget(struct sched *s, uint32_t slot)
{
    if (s->prefix)
        prefix_remove(s->prefix, slot);
}

bool cache_evict(struct sched *s, uint32_t except)
{
    uint32_t slot;
    if (!s->prefix || !prefix_oldest(s->prefix, except, &slot))
        return false;
    if (s->source_step[slot] == s->next_step) /* and all behind it were used in this plan, too */
        return false;
    prefix_remove(s->prefix, slot);
    s->pending[s->n_pending++] = slot;
    s->pending_pages += holder_drop(s, slot);
    sched_settle_pending(s);
    return true;
}

/* One page (per lane) is lost to rounding at each holder when ranks differ: alone in memory it must fit even so. */
static bool fits_alone(const struct sched *s, const struct req *r)
{
    uint64_t pages = kv_pages_for(&s->kv, (uint64_t)r->n_total - 1);
    uint64_t lost = s->kv.uneven ? kv_lanes(&s->kv) * (holder_depth(s, r->match_slot, r->n_match) + 1) : 0;
    return pages + lost <= s->kv.total_pages;
}

void cache_match(struct sched *s, struct req *r)
{
    if (!s->prefix || !r->cache_read) {
        r->n_match = 0;
        return;
    }
    if (r->match_version == prefix_version(s->prefix))
        return;
    r->match_version = prefix_version(s->prefix);
    r->n_match = prefix_match(s->prefix, r->salt, r->tokens, r->n_known - 1, &r->match_slot);
    if (r->n_match && !fits_alone(s, r))
        r->n_match = 0;
}
