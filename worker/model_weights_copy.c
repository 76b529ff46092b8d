/* model_weights_copy.c - weights from files to their place, by several threads: rows of 4 MiB at a time, converted where the
 * dtype is another one. */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "worker/mapped_read.h"
#include "worker/model_convert.h"
#include "worker/model_weights_internal.h"

#define CHUNK_BYTES (4u << 20) /* copied between two calls of progress */

_Static_assert(CHUNK_BYTES <= WEIGHT_STAGE_BYTES, "a chunk is staged whole");

/* Rows first .. first + n - 1 of the piece's share. */
struct rows_copy {
    const struct piece *piece;
    uint8_t *to;
    uint32_t first, n;
};

/* The file's row for ours. */
static uint64_t row_in_file(const struct model_tensor *t, uint64_t row)
{
    uint64_t d = t->paired_rows;
    if (!d)
        return row;
    uint64_t in_head = row % d;
    return row - in_head + (in_head < d / 2 ? 2 * in_head : 2 * in_head - d + 1);
}

#define QUANT_STEP 1024 /* values that are expanded at a time on their way to another dtype */

static void copy_quantised(const struct piece *p, uint8_t *to, uint64_t row)
{
    const struct quant *q = p->src.quant;
    const uint8_t *from = p->src.data + row * (p->src_cols / q->block_values * q->block_bytes);
    if (p->dtype == MAT_F32) {
        quant_row(q, (float *)(void *)to, from, p->cols.first, p->cols.count);
        return;
    }
    float some[QUANT_STEP];
    for (uint32_t at = 0, n; at < p->cols.count; at += n) {
        n = p->cols.count - at < QUANT_STEP ? p->cols.count - at : QUANT_STEP;
        quant_row(q, some, from, p->cols.first + at, n);
        model_convert(to + (uint64_t)at * mat_elem_bytes(p->dtype), p->dtype, some, MAT_F32, n);
    }
}

static void copy_rows(void *arg)
{
    const struct rows_copy *c = arg;
    const struct piece *p = c->piece;
    uint64_t src_elem = mat_elem_bytes(p->src.dtype), dst_stride = (uint64_t)p->cols.count * mat_elem_bytes(p->dtype);
    uint64_t src_stride = p->src_cols * src_elem, first = p->rows.first + (uint64_t)c->first;
    const uint8_t *src = p->src.data + p->cols.first * src_elem;
    if (p->src.dtype == p->dtype && src_stride == dst_stride && !p->src.paired_rows && !p->src.quant) {
        memcpy(c->to, src + first * src_stride, c->n * dst_stride);
        return;
    }
    for (uint32_t i = 0; i < c->n; i++) {
        uint64_t row = row_in_file(&p->src, first + i);
        if (p->src.quant)
            copy_quantised(p, c->to + i * dst_stride, row);
        else
            model_convert(c->to + i * dst_stride, p->dtype, src + row * src_stride, p->src.dtype, p->cols.count);
    }
}

/* The variance of an even spread over -s .. s is s^2 / 3. */
static float random_scale(const struct piece *p)
{
    return (float)sqrt(3.0 / (double)p->src_cols);
}

static void random_rows(const struct rows_copy *c)
{
    const struct piece *p = c->piece;
    uint64_t stride = (uint64_t)p->cols.count * mat_elem_bytes(p->dtype);
    for (uint32_t i = 0; i < c->n; i++) {
        uint64_t at = (p->rows.first + (uint64_t)c->first + i) * p->src_cols + p->cols.first;
        uint8_t *to = c->to + i * stride;
        if (p->seed)
            model_random(to, p->dtype, p->seed, at, p->cols.count, random_scale(p));
        else
            for (uint32_t j = 0; j < p->cols.count; j++)
                memcpy(to + j * sizeof(float), &(float){1.0f}, sizeof(float));
    }
}

/* A matrix whose rows are whole is one run of its stream, a slice of columns one per row. */
static enum status_code random_in_store(const struct model_loader *l, const struct piece *p, uint8_t *to,
                                        struct status *st)
{
    bool whole_rows = p->cols.count == p->src_cols;
    uint32_t runs = whole_rows ? 1 : p->rows.count;
    uint64_t n = whole_rows ? p->src_cols * p->rows.count : p->cols.count;
    for (uint32_t i = 0; i < runs; i++) {
        uint64_t at = ((uint64_t)p->rows.first + i) * p->src_cols + p->cols.first;
        enum status_code rc =
            l->store->random(l->store->ctx, to + i * n * sizeof(uint16_t), p->seed, at, n, random_scale(p), st);
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}

/* ---- the copy: lanes take chunks until there is none left ---- */

struct chunk {
    const struct piece *piece;
    uint32_t first, n; /* rows of the piece's share */
};

struct copy {
    const struct model_loader *l;
    uint8_t *arena;
    struct chunk *chunk;
    uint32_t n_chunks;
    atomic_uint next;
    struct model_progress progress;
    pthread_mutex_t lock; /* of what follows; progress is told with it held */
    uint64_t done;
    enum status_code rc; /* the first failure's */
    struct status why;
};

static uint64_t row_bytes(const struct piece *p)
{
    return (uint64_t)p->cols.count * mat_elem_bytes(p->dtype);
}

static bool made_there(const struct model_loader *l, const struct piece *p)
{
    return l->store && l->store->random && !l->source && p->seed && p->dtype == MAT_BF16;
}

static enum status_code load_chunk(const struct copy *c, const struct chunk *k, uint32_t lane, struct status *st)
{
    const struct piece *p = k->piece;
    const struct weight_store *s = c->l->store;
    uint64_t bytes = k->n * row_bytes(p);
    uint8_t *to = c->arena + p->at + k->first * row_bytes(p);
    void *host = to;
    enum status_code rc;
    if (s && (rc = s->stage(s->ctx, lane, &host, bytes, st)) != ST_OK)
        return rc;
    struct rows_copy rows = {p, host, k->first, k->n};
    if (!c->l->source)
        random_rows(&rows);
    else if (!mapped_read(copy_rows, &rows))
        return status_set(st, ST_DATA_LOSS,
                          "%s: tensor %s cannot be read any more: another program cuts the file, or the disk fails",
                          p->src.file, p->src.name);
    return s ? s->store(s->ctx, lane, to, bytes, st) : ST_OK;
}

/* False: a chunk has failed, here or in another lane. */
static bool chunk_done(struct copy *c, uint64_t bytes, enum status_code rc, const struct status *st)
{
    pthread_mutex_lock(&c->lock);
    if (rc != ST_OK && c->rc == ST_OK) {
        c->rc = rc;
        c->why = *st;
    }
    bool go_on = c->rc == ST_OK;
    c->done += bytes;
    if (go_on && c->progress.fn)
        c->progress.fn(c->progress.ctx, c->done, c->l->bytes);
    pthread_mutex_unlock(&c->lock);
    return go_on;
}

static void run_lane(void *arg, uint32_t lane, uint32_t worker)
{
    struct copy *c = arg;
    struct status st = STATUS_INIT;
    (void)worker;
    for (uint32_t i; (i = atomic_fetch_add_explicit(&c->next, 1, memory_order_relaxed)) < c->n_chunks;) {
        const struct chunk *k = &c->chunk[i];
        enum status_code rc = load_chunk(c, k, lane, &st);
        if (!chunk_done(c, k->n * row_bytes(k->piece), rc, &st))
            return;
    }
}

static uint32_t rows_of_chunk(const struct piece *p)
{
    return row_bytes(p) < CHUNK_BYTES ? (uint32_t)(CHUNK_BYTES / row_bytes(p)) : 1;
}

/* All that is not made in the store, in the order of the file as far as tensors are. */
static enum status_code cut(struct copy *c, struct status *st)
{
    const struct model_loader *l = c->l;
    uint64_t n = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < l->n_pieces; i++) {
            const struct piece *p = &l->piece[i];
            if (row_bytes(p) == 0 || made_there(l, p))
                continue;
            uint32_t step = rows_of_chunk(p);
            for (uint32_t r = 0; pass == 0 && r < p->rows.count; r += step)
                n++;
            for (uint32_t r = 0; pass == 1 && r < p->rows.count; r += step)
                c->chunk[c->n_chunks++] = (struct chunk){p, r, p->rows.count - r < step ? p->rows.count - r : step};
        }
        if (pass == 0 && (n > UINT32_MAX / 2 || !(c->chunk = calloc(n ? n : 1, sizeof *c->chunk))))
            return status_nomem(st, "list of weights to copy", n * sizeof *c->chunk);
    }
    return ST_OK;
}

static enum status_code make_random(struct copy *c, struct status *st)
{
    const struct model_loader *l = c->l;
    for (size_t i = 0; i < l->n_pieces; i++) {
        const struct piece *p = &l->piece[i];
        enum status_code rc = made_there(l, p) ? random_in_store(l, p, c->arena + p->at, st) : ST_OK;
        if (rc != ST_OK)
            return rc;
        if (made_there(l, p))
            c->done += p->rows.count * row_bytes(p);
    }
    return ST_OK;
}

static enum status_code run_lanes(struct copy *c, struct thread_pool *pool, struct status *st)
{
    uint32_t lanes = pool ? threads_count(pool) : 1;
    if (lanes > WEIGHT_LANES)
        lanes = WEIGHT_LANES;
    if (lanes == 1)
        run_lane(c, 0, 0);
    else
        threads_for(pool, lanes, run_lane, c);
    if (c->rc != ST_OK && st)
        *st = c->why;
    return c->rc;
}

enum status_code model_weights_copy(const struct model_loader *l, uint8_t *arena, struct thread_pool *pool,
                                    struct model_progress progress, struct status *st)
{
    struct copy c = {.l = l, .arena = arena, .progress = progress, .lock = PTHREAD_MUTEX_INITIALIZER};
    if (progress.fn)
        progress.fn(progress.ctx, 0, l->bytes);
    enum status_code rc = cut(&c, st);
    if (rc == ST_OK)
        rc = make_random(&c, st);
    if (rc == ST_OK)
        rc = run_lanes(&c, pool, st);
    free(c.chunk);
    if (rc == ST_OK && l->store)
        rc = l->store->finish(l->store->ctx, st);
    if (rc != ST_OK)
        return rc;
    if (progress.fn)
        progress.fn(progress.ctx, l->bytes, l->bytes);
    return l->source ? model_source_check_unchanged(l->source, st) : ST_OK;
}
