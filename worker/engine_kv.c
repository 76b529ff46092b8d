/* engine_kv.c - the KV pool of an engine: how large it is, and its pages. 110 GiB of them take an H200's driver 1.3 s, so that a
 * thread makes them while weights are read. */
#include <stdatomic.h>
#include <stdlib.h>

#include "worker/engine_internal.h"

/* When nobody says how much: each page may be a mapping, and a process has 65530 by default. */
#define NO_BOUND_PAGES       (UINT64_C(1) << 31) /* as many as a pool can have */
#define DEFAULT_KV_PAGES_MAX 32768u
/* Tokens of a slot whose pages are ready before they are fed: enough steps for a call that waits behind others. */
#define AHEAD_TOKENS 16

struct engine_kv_start {
    struct kv_pool_config cfg;
    pthread_t thread;
    struct kv_pool *pool;
    enum status_code rc;
    struct status st;
    atomic_bool failed; /* rc and st are set */
};

static enum status_code configure(struct kv_pool_config *out, const struct engine *e, const struct engine_config *cfg,
                                  uint64_t share, struct status *st)
{
    const struct engine_info *info = &e->info;
    uint32_t elem_bytes = e->parts ? e->parts->kv_elem_bytes : SHARD_KV_HOST_BYTES;
    struct kv_account a = {
        .page_bytes = cfg->page_bytes ? cfg->page_bytes : KV_PAGE_BYTES_DEFAULT,
        .token_bytes = shard_kv_token_bytes(&e->shard, e->model.layers, e->model.head_dim, elem_bytes),
    };
    uint64_t budget = cfg->kv_bytes;
    if (budget == 0) {
        uint64_t useful = kv_pages_for(&a, info->max_context) * info->max_slots;
        if (useful > DEFAULT_KV_PAGES_MAX && !e->parts)
            useful = DEFAULT_KV_PAGES_MAX;
        budget = share;
        if (budget / a.page_bytes > useful)
            budget = useful * a.page_bytes;
    }
    a.total_pages = budget / a.page_bytes;
    if (a.token_bytes == 0)
        a.total_pages = NO_BOUND_PAGES; /* it has none, and the others may have as many as they like */
    else if (a.total_pages == 0)
        return status_set(st, cfg->kv_bytes ? ST_INVALID_ARGUMENT : ST_RESOURCE_EXHAUSTED,
                          "kv_bytes: %llu bytes of KV memory, less than one page of %llu bytes",
                          (unsigned long long)budget, (unsigned long long)a.page_bytes);
    bool ahead = cfg->kv_ahead == ENGINE_AHEAD_ON || (cfg->kv_ahead == ENGINE_AHEAD_AUTO && e->parts);
    *out = (struct kv_pool_config){
        .ops = e->parts ? e->parts->kv : &kv_ops_host,
        .slots = info->max_slots,
        .max_tokens = info->max_context,
        .layers = e->model.layers,
        .kv_heads = e->shard.kv_heads.count,
        .head_dim = e->model.head_dim,
        .elem_bytes = elem_bytes,
        .page_bytes = a.page_bytes,
        .total_pages = a.total_pages,
        .device = e->parts ? e->parts->device : 0,
        .no_clear = true, /* attention reads no row past a sequence's length: attention.h */
        .background = ahead,
        .ahead_tokens = AHEAD_TOKENS,
        .arrival_tokens = info->max_step_tokens, /* the first chunk of a prompt */
        .suspend_bytes = cfg->suspend_bytes,
    };
    return ST_OK;
}

static void *create(void *arg)
{
    struct engine_kv_start *s = arg;
    s->rc = kv_pool_create(&s->pool, &s->cfg, &s->st);
    atomic_store(&s->failed, s->rc != ST_OK);
    return NULL;
}

enum status_code engine_kv_begin(struct engine *e, const struct engine_config *cfg, uint64_t share, struct status *st)
{
    struct kv_pool_config kv;
    enum status_code rc = configure(&kv, e, cfg, share, st);
    if (rc != ST_OK)
        return rc;
    if (!e->parts) /* nothing to wait for there, and what cannot be had is said before weights are read */
        return kv_pool_create(&e->kv, &kv, st);
    struct engine_kv_start *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "start of the KV pool", sizeof *s);
    s->cfg = kv;
    int err = pthread_create(&s->thread, NULL, create, s);
    if (err) {
        free(s);
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "starting the thread that makes the KV pool");
    }
    e->kv_start = s;
    return ST_OK;
}

static enum status_code join(struct engine *e, struct status *st)
{
    struct engine_kv_start *s = e->kv_start;
    if (!s)
        return ST_OK;
    pthread_join(s->thread, NULL);
    enum status_code rc = s->rc;
    e->kv = s->pool;
    e->kv_start = NULL;
    if (rc != ST_OK)
        *st = s->st;
    free(s);
    return rc;
}

enum status_code engine_kv_look(struct engine *e, struct status *st)
{
    return e->kv_start && atomic_load(&e->kv_start->failed) ? join(e, st) : ST_OK;
}

enum status_code engine_kv_end(struct engine *e, struct status *st)
{
    enum status_code rc = join(e, st);
    if (rc != ST_OK)
        return rc;
    e->info.suspend_pages = kv_pool_suspend_pages(e->kv);
    return kv_pool_suspend_rate(e->kv, &e->info.suspend_bytes_per_s, st);
}

void engine_kv_destroy(struct engine *e)
{
    struct status st = STATUS_INIT;
    (void)!join(e, &st); /* why the engine ends is known already */
    kv_pool_destroy(e->kv);
}
