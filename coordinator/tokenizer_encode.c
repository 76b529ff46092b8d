/* tok_encode, and the pool of scratch contexts behind it. A context keeps its word cache from call to call; as many
 * exist as calls ran at the same time, KEEP_MAX of them stay. The lock is held to take one out or put it back. */
#include "coordinator/tokenizer_internal.h"

#include <pthread.h>
#include <stdlib.h>

#define KEEP_MAX       16
#define KEEP_BYTES_MAX ((size_t)4 << 20) /* scratch of a context beyond this is given back after the call */

struct tok_pool {
    pthread_mutex_t lock;
    struct tok_ctx *free_list; /* lock */
    size_t n_free;             /* lock */
};

static void ctx_free(struct tok_ctx *ctx)
{
    if (!ctx)
        return;
    tok_match_free(ctx->match);
    free(ctx->cache);
    tok_buf_free(&ctx->norm[0]);
    tok_buf_free(&ctx->norm[1]);
    for (size_t i = 0; i < TOK_MAX_STEPS; i++)
        tok_buf_free(&ctx->step[i]);
    free(ctx->syms);
    free(ctx->heap);
    free(ctx->ids.data);
    free(ctx);
}

static struct tok_ctx *ctx_create(void)
{
    struct tok_ctx *ctx = calloc(1, sizeof *ctx);
    if (!ctx)
        return NULL;
    ctx->match = tok_match_create();
    ctx->cache = calloc(TOK_CACHE_SLOTS, sizeof *ctx->cache);
    if (!ctx->match || !ctx->cache) {
        ctx_free(ctx);
        return NULL;
    }
    return ctx;
}

enum status_code tok_pool_create(struct tok_pool **out, struct status *st)
{
    struct tok_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return status_nomem(st, "tokenizer", sizeof *pool);
    int err = pthread_mutex_init(&pool->lock, NULL);
    if (err) {
        free(pool);
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "tokenizer: mutex");
    }
    *out = pool;
    return ST_OK;
}

void tok_pool_free(struct tok_pool *pool)
{
    if (!pool)
        return;
    while (pool->free_list) {
        struct tok_ctx *ctx = pool->free_list;
        pool->free_list = ctx->next;
        ctx_free(ctx);
    }
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

static struct tok_ctx *pool_take(struct tok_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    struct tok_ctx *ctx = pool->free_list;
    if (ctx) {
        pool->free_list = ctx->next;
        pool->n_free--;
    }
    pthread_mutex_unlock(&pool->lock);
    return ctx ? ctx : ctx_create();
}

static void trim_buf(struct tok_buf *b)
{
    if (b->cap > KEEP_BYTES_MAX / 4)
        tok_buf_free(b);
}

static void pool_put(struct tok_pool *pool, struct tok_ctx *ctx)
{
    trim_buf(&ctx->norm[0]);
    trim_buf(&ctx->norm[1]);
    for (size_t i = 0; i < TOK_MAX_STEPS; i++)
        trim_buf(&ctx->step[i]);
    if (ctx->cap_syms * sizeof *ctx->syms > KEEP_BYTES_MAX / 4) {
        free(ctx->syms);
        ctx->syms = NULL;
        ctx->cap_syms = 0;
    }
    if (ctx->cap_heap * sizeof *ctx->heap > KEEP_BYTES_MAX / 4) {
        free(ctx->heap);
        ctx->heap = NULL;
        ctx->cap_heap = 0;
    }
    pthread_mutex_lock(&pool->lock);
    bool keep = pool->n_free < KEEP_MAX;
    if (keep) {
        ctx->next = pool->free_list;
        pool->free_list = ctx;
        pool->n_free++;
    }
    pthread_mutex_unlock(&pool->lock);
    if (!keep)
        ctx_free(ctx);
}

/* A stretch between added tokens that match after the normalizer. */
static enum status_code encode_normalized(const struct tokenizer *t, struct tok_ctx *ctx, const char *s, size_t n,
                                          bool at_start, struct status *st)
{
    enum status_code rc = tok_norm_run(t, ctx->norm, ctx->match, &s, &n, st);
    struct tok_added_iter it = {.s = s, .len = n};
    size_t done = 0, start, end;
    uint32_t id;
    bool found = true;
    while (rc == ST_OK) {
        rc = tok_added_next(t, &t->added_normalized, &it, ctx->match, &start, &end, &id, &found, st);
        if (rc != ST_OK || !found)
            break;
        if (start > done)
            rc = tok_pre_run(t, ctx, 0, s + done, start - done, at_start && done == 0, st);
        if (rc == ST_OK && end > start && !tok_ids_add(&ctx->ids, id))
            rc = status_nomem(st, "ids", ctx->ids.len);
        done = end;
    }
    return rc == ST_OK && done < n ? tok_pre_run(t, ctx, 0, s + done, n - done, at_start && done == 0, st) : rc;
}

static enum status_code encode_text(const struct tokenizer *t, struct tok_ctx *ctx, const char *s, size_t n,
                                    struct status *st)
{
    struct tok_added_iter it = {.s = s, .len = n};
    size_t done = 0, start, end;
    uint32_t id;
    bool found = true;
    enum status_code rc = ST_OK;
    while (rc == ST_OK) {
        rc = tok_added_next(t, &t->added_raw, &it, ctx->match, &start, &end, &id, &found, st);
        if (rc != ST_OK || !found)
            break;
        if (start > done)
            rc = encode_normalized(t, ctx, s + done, start - done, done == 0, st);
        if (rc == ST_OK && end > start && !tok_ids_add(&ctx->ids, id))
            rc = status_nomem(st, "ids", ctx->ids.len);
        done = end;
    }
    return rc == ST_OK && done < n ? encode_normalized(t, ctx, s + done, n - done, done == 0, st) : rc;
}

static bool add_all(struct tok_ids *to, const struct tok_ids *from)
{
    for (size_t i = 0; i < from->len; i++)
        if (!tok_ids_add(to, from->data[i]))
            return false;
    return true;
}

enum status_code tok_encode(const struct tokenizer *t, const char *text, size_t len, unsigned flags, uint32_t **ids,
                            size_t *n, struct status *st)
{
    if (len > TOK_MAX_TEXT_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "text: %zu bytes, expected at most %zu", len, TOK_MAX_TEXT_BYTES);
    if (t->none)
        return status_set(st, ST_FAILED_PRECONDITION, "there is no tokenizer, expected token ids");
    size_t good = tok_utf8_check(text, len);
    if (good < len)
        return status_set(st, ST_INVALID_ARGUMENT, "text: byte %zu (0x%02x) is not UTF-8", good,
                          (unsigned char)text[good]);
    struct tok_ctx *ctx = pool_take(t->pool);
    if (!ctx)
        return status_nomem(st, "tokenizer context", sizeof *ctx);
    enum status_code rc = ST_OK;
    if ((flags & TOK_ADD_SPECIAL) && !add_all(&ctx->ids, &t->prefix))
        rc = status_nomem(st, "ids", ctx->ids.len);
    if (rc == ST_OK)
        rc = encode_text(t, ctx, text, len, st);
    if (rc == ST_OK && (flags & TOK_ADD_SPECIAL) && !add_all(&ctx->ids, &t->suffix))
        rc = status_nomem(st, "ids", ctx->ids.len);
    if (rc == ST_OK) {
        *n = ctx->ids.len;
        *ids = NULL;
        if (*n) {
            *ids = ctx->ids.data;
            ctx->ids = (struct tok_ids){0};
        }
    }
    ctx->ids.len = 0;
    pool_put(t->pool, ctx);
    return rc;
}
