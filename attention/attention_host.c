/* attention_host.c - cuts a batch into items and runs them on the executor.
 *
 * An item is one block (attention_host_internal.h): packed rows of one sequence and KV head against a range of keys. How
 * a sequence is cut depends on its own rows and kv_len and on the head shape, on nothing else; which items run together
 * or on which thread is decided after that and cannot change a result.
 *
 *   packed rows > BLOCK_ROWS    blocks of equal size, each against all keys that one of its rows sees
 *   packed rows <= BLOCK_ROWS   one block; its keys in parts of SPLIT_KEYS or more (flash-decoding), so that a long decode
 *                               is shared by all threads. A part leaves its unnormalised rows in the pool of partial
 *                               results; whoever finishes the last part of a unit adds them up, in order of keys.
 *
 * Items and pool are of fixed size. When one is full, what was planned so far is run first (a wave).
 */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "attention/attention_host_internal.h"

enum {
    SPLIT_KEYS = 512,     /* 50 us and more of a decode: far above the cost of adding up */
    MAX_PARTS = 64,       /* of a unit; longer contexts get longer parts */
    MAX_ITEMS = 4096,     /* of a wave */
    POOL_BYTES = 8 << 20, /* of partial results; at least one unit fits, see pool_floats */
    ALIGN_BYTES = 64,
    GROUP_NS = 8000, /* of estimated work: items are handed to threads in groups no smaller */
    GROUPS_PER_THREAD = 8,
    INLINE_NS = 12000, /* a wave smaller than this is not worth waking anybody */
    NO_UNIT = UINT32_MAX,
};

/* So the row of a unit that starts last sees a key of the unit's first part: its window starts at most BLOCK_ROWS - 1 keys
 * after that part, which has more than SPLIT_KEYS / 2. add_up needs it. */
_Static_assert(BLOCK_ROWS <= SPLIT_KEYS / 2, "rows of a unit may see nothing of its first part");

struct item {
    uint32_t seq, head;   /* KV head */
    uint32_t first, rows; /* packed */
    uint32_t k_begin, k_end;
    uint32_t unit, part; /* NO_UNIT: the block has all its keys */
};

/* A block whose keys are split. */
struct unit {
    uint64_t at; /* in the pool: part after part, each [rows][DP] out, [rows] max, [rows] sum */
    uint32_t parts;
    _Atomic uint32_t open; /* parts that are not finished */
};

struct host {
    const struct host_kernels *kernels;
    struct attn_executor exec;
    uint32_t threads;
    struct host_scratch *scratch; /* [threads] */
    float *scratch_floats;
    float *pool;
    uint64_t pool_floats;

    /* the wave */
    struct item items[MAX_ITEMS];
    struct unit units[MAX_ITEMS];
    uint32_t groups[MAX_ITEMS + 1]; /* first item of each group; the end */
    uint32_t n_items, n_units;
    uint64_t pool_used;
    uint64_t cost_ns[MAX_ITEMS]; /* estimates */
    uint64_t total_ns;
    const struct attn_batch *batch;
};

static uint32_t padded(uint32_t head_dim)
{
    return (head_dim + MAX_VW - 1) / MAX_VW * MAX_VW;
}

static uint64_t part_floats(uint32_t rows, uint32_t DP)
{
    return (uint64_t)rows * (DP + 2);
}

static void host_destroy(void *state)
{
    struct host *h = state;
    if (!h)
        return;
    free(h->pool);
    free(h->scratch_floats);
    free(h->scratch);
    free(h);
}

static float *zeroed(size_t floats)
{
    size_t bytes = (floats * sizeof(float) + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    float *p = aligned_alloc(ALIGN_BYTES, bytes);
    return p ? memset(p, 0, bytes) : NULL;
}

static enum status_code make_scratch(struct host *h, uint32_t DP, struct status *st)
{
    const uint64_t tile = (uint64_t)TILE_KEYS * DP, rows = (uint64_t)BLOCK_ROWS * DP;
    const uint64_t each = 2 * tile + 2 * rows + BLOCK_ROWS * TILE_KEYS;
    h->scratch = calloc(h->threads, sizeof *h->scratch);
    h->scratch_floats = zeroed(h->threads * each);
    if (!h->scratch || !h->scratch_floats)
        return status_nomem(st, "attention scratch", h->threads * (each * sizeof(float) + sizeof *h->scratch));
    for (uint32_t i = 0; i < h->threads; i++) {
        struct host_scratch *s = &h->scratch[i];
        s->q = h->scratch_floats + i * each;
        s->out = s->q + rows;
        s->kt = s->out + rows;
        s->v = s->kt + tile;
        s->p = s->v + tile;
    }
    return ST_OK;
}

static enum status_code host_create(void **state, const struct attn_config *cfg, struct status *st)
{
    const struct host_kernels *list[HOST_MAX_KERNELS];
    uint32_t n_kernels = host_kernels_list(list), nth = 0;
    if (cfg->ops != &attn_ops_host)
        nth = (uint32_t)(cfg->ops - attn_ops_host_nth);
    if (nth >= n_kernels)
        return status_set(st, ST_UNIMPLEMENTED, "attention: this CPU runs %u sets of kernels, not %u", n_kernels,
                          nth + 1);
    struct host *h = calloc(1, sizeof *h);
    if (!h)
        return status_nomem(st, "attention", sizeof *h);
    h->kernels = list[nth];
    h->exec = cfg->exec;
    h->threads = cfg->exec.parallel_for && cfg->exec.threads ? cfg->exec.threads : 1;
    uint32_t DP = padded(cfg->max_head_dim);
    enum status_code rc = make_scratch(h, DP, st);
    if (rc != ST_OK)
        goto fail;
    uint64_t unit = MAX_PARTS * part_floats(BLOCK_ROWS, DP);
    h->pool_floats = POOL_BYTES / sizeof(float) > unit ? POOL_BYTES / sizeof(float) : unit;
    h->pool = malloc(h->pool_floats * sizeof(float));
    if (!h->pool) {
        rc = status_nomem(st, "attention partial results", h->pool_floats * sizeof(float));
        goto fail;
    }
    *state = h;
    return ST_OK;
fail:
    host_destroy(h);
    return rc;
}

/* ---- running items ---- */

/* Offset in q and out of packed row `packed`. */
static uint64_t row_offset(const struct attn_batch *b, const struct item *it, uint32_t packed)
{
    uint32_t G = b->heads / b->kv_heads;
    uint64_t row = b->seq[it->seq].first_row + packed / G;
    return (row * b->heads + it->head * G + packed % G) * b->head_dim;
}

/* The row sees no key from here on. */
static uint32_t keys_seen(const struct attn_batch *b, uint32_t seq, uint32_t packed)
{
    const struct attn_seq *s = &b->seq[seq];
    return s->kv_len - s->rows + packed / (b->heads / b->kv_heads) + 1;
}

static void write_row(struct host *h, const struct item *it, uint32_t i, const float *out, float sum)
{
    const struct attn_batch *b = h->batch;
    h->kernels->scale((float *)b->out + row_offset(b, it, it->first + i), out, b->head_dim, 1 / sum);
}

/* All parts of a unit are there. Every row has seen a key in the first part, so the maximum is one of a score. */
static void add_up(struct host *h, const struct item *it, struct host_scratch *s)
{
    const struct unit *u = &h->units[it->unit];
    const uint32_t D = h->batch->head_dim, DP = padded(D);
    const uint64_t step = part_floats(it->rows, DP);
    const float *parts = h->pool + u->at, *maxs = parts + (uint64_t)it->rows * DP, *sums = maxs + it->rows;
    for (uint32_t i = 0; i < it->rows; i++) {
        float max = maxs[i], sum = 0;
        for (uint32_t p = 1; p < u->parts; p++)
            max = maxs[p * step + i] > max ? maxs[p * step + i] : max;
        float *out = s->out; /* free: its content went to the pool */
        memset(out, 0, D * sizeof *out);
        for (uint32_t p = 0; p < u->parts; p++) {
            if (maxs[p * step + i] == -INFINITY && p > 0)
                continue; /* the row saw no key of this part */
            float factor = h->kernels->exp2(maxs[p * step + i] - max);
            sum += sums[p * step + i] * factor;
            h->kernels->add_scaled(out, parts + p * step + (uint64_t)i * DP, D, factor);
        }
        write_row(h, it, i, out, sum);
    }
}

static void run_item(struct host *h, const struct item *it, struct host_scratch *s)
{
    const struct attn_batch *b = h->batch;
    const struct attn_seq *seq = &b->seq[it->seq];
    const uint32_t G = b->heads / b->kv_heads, D = b->head_dim, DP = padded(D);
    struct host_block block = {
        .k = (const char *)seq->k + it->head * b->head_stride,
        .v = (const char *)seq->v + it->head * b->head_stride,
        .token_stride = b->token_stride,
        .dtype = b->kv_dtype,
        .D = D,
        .DP = DP,
        .rows = it->rows,
        .k_begin = it->k_begin,
        .k_end = it->k_end,
        .cap = b->soft_cap * (float)M_LOG2E,
    };
    for (uint32_t i = 0; i < it->rows; i++) {
        float *q = s->q + (uint64_t)i * DP;
        h->kernels->scale(q, (const float *)b->q + row_offset(b, it, it->first + i), D, b->scale * (float)M_LOG2E);
        memset(q + D, 0, (DP - D) * sizeof *q);
        s->limit[i] = keys_seen(b, it->seq, it->first + i);
        s->start[i] = attn_first_key(b, s->limit[i]);
    }
    if (seq->rows * G <= FEW_ROWS)
        h->kernels->few(&block, s);
    else
        h->kernels->many(&block, s);

    if (it->unit == NO_UNIT) {
        for (uint32_t i = 0; i < it->rows; i++)
            write_row(h, it, i, s->out + (uint64_t)i * DP, s->sum[i]);
        return;
    }
    struct unit *u = &h->units[it->unit];
    float *to = h->pool + u->at + it->part * part_floats(it->rows, DP);
    memcpy(to, s->out, (uint64_t)it->rows * DP * sizeof *to);
    memcpy(to + (uint64_t)it->rows * DP, s->max, it->rows * sizeof *to);
    memcpy(to + (uint64_t)it->rows * (DP + 1), s->sum, it->rows * sizeof *to);
    /* Release our part, and see those of the others if ours is the last. */
    if (atomic_fetch_sub_explicit(&u->open, 1, memory_order_acq_rel) == 1)
        add_up(h, it, s);
}

static void run_group(void *arg, uint32_t i, uint32_t worker)
{
    struct host *h = arg;
    for (uint32_t k = h->groups[i]; k < h->groups[i + 1]; k++)
        run_item(h, &h->items[k], &h->scratch[worker]);
}

/* Runs what is planned. */
static void flush(struct host *h)
{
    if (h->threads == 1 || h->total_ns < INLINE_NS) {
        for (uint32_t k = 0; k < h->n_items; k++)
            run_item(h, &h->items[k], &h->scratch[0]);
    } else {
        uint64_t aim = h->total_ns / (h->threads * GROUPS_PER_THREAD), sum = 0;
        aim = aim > GROUP_NS ? aim : GROUP_NS;
        uint32_t n = 0;
        for (uint32_t k = 0; k < h->n_items; k++) {
            if (sum == 0)
                h->groups[n++] = k;
            sum += h->cost_ns[k];
            if (sum >= aim)
                sum = 0;
        }
        h->groups[n] = h->n_items;
        if (n == 1)
            run_group(h, 0, 0);
        else
            h->exec.parallel_for(h->exec.ctx, n, run_group, h);
    }
    h->n_items = h->n_units = 0;
    h->pool_used = h->total_ns = 0;
}

/* ---- planning ---- */

/* About what an item takes, with AVX-512 and KV in the L2 cache. Decides only what is grouped. */
static uint64_t estimate_ns(const struct attn_batch *b, const struct item *it, int few)
{
    uint64_t elems = (uint64_t)(it->k_end - it->k_begin) * b->head_dim;
    return 100 + (few ? elems * (16 + 4 * it->rows) / 64 : elems * (16 + 3 * it->rows) / 64);
}

static void add_item(struct host *h, const struct item *it, int few)
{
    if (h->n_items == MAX_ITEMS)
        flush(h); /* only without parts: those made room for all their items first */
    h->items[h->n_items] = *it;
    h->cost_ns[h->n_items] = estimate_ns(h->batch, it, few);
    h->total_ns += h->cost_ns[h->n_items++];
}

static void plan_blocks(struct host *h, uint32_t seq, uint32_t packed)
{
    const struct attn_batch *b = h->batch;
    uint32_t blocks = (packed + BLOCK_ROWS - 1) / BLOCK_ROWS;
    uint32_t rows = (packed + blocks - 1) / blocks;
    for (uint32_t end = packed; end > 0;) { /* the last rows see most keys: the longest first */
        uint32_t first = (end - 1) / rows * rows;
        uint32_t k_begin = attn_first_key(b, keys_seen(b, seq, first)), k_end = keys_seen(b, seq, end - 1);
        for (uint32_t head = 0; head < b->kv_heads; head++)
            add_item(h, &(struct item){seq, head, first, end - first, k_begin, k_end, NO_UNIT, 0}, packed <= FEW_ROWS);
        end = first;
    }
}

/* Heads run beside each other on the same keys: in a token-major layout they share pages. */
static void plan_parts(struct host *h, uint32_t seq, uint32_t packed, uint32_t part_keys)
{
    const struct attn_batch *b = h->batch;
    uint32_t kv_len = b->seq[seq].kv_len, start = attn_first_key(b, keys_seen(b, seq, 0));
    uint32_t parts = (kv_len - start + part_keys - 1) / part_keys;
    uint64_t unit_floats = parts * part_floats(packed, padded(b->head_dim));
    uint32_t fit = h->pool_floats / unit_floats < MAX_ITEMS / MAX_PARTS ? (uint32_t)(h->pool_floats / unit_floats)
                                                                        : MAX_ITEMS / MAX_PARTS;
    for (uint32_t begin = 0, end; begin < b->kv_heads; begin = end) {
        end = b->kv_heads - begin < fit ? b->kv_heads : begin + fit;
        uint32_t n = end - begin;
        if (h->n_items + n * parts > MAX_ITEMS || h->pool_used + n * unit_floats > h->pool_floats)
            flush(h);
        uint32_t unit = h->n_units;
        for (uint32_t i = 0; i < n; i++) {
            struct unit *u = &h->units[h->n_units++];
            u->at = h->pool_used;
            u->parts = parts;
            atomic_init(&u->open, parts);
            h->pool_used += unit_floats;
        }
        for (uint32_t p = 0; p < parts; p++) {
            uint32_t k_begin = start + p * part_keys,
                     k_end = kv_len - k_begin < part_keys ? kv_len : k_begin + part_keys;
            for (uint32_t i = 0; i < n; i++)
                add_item(h, &(struct item){seq, begin + i, 0, packed, k_begin, k_end, unit + i, p}, packed <= FEW_ROWS);
        }
    }
}

static void plan_seq(struct host *h, uint32_t seq, uint32_t packed)
{
    uint32_t keys = h->batch->seq[seq].kv_len - attn_first_key(h->batch, keys_seen(h->batch, seq, 0));
    uint32_t parts = (keys + SPLIT_KEYS - 1) / SPLIT_KEYS;
    if (packed > BLOCK_ROWS || parts == 1) {
        plan_blocks(h, seq, packed);
        return;
    }
    parts = parts < MAX_PARTS ? parts : MAX_PARTS;
    uint32_t part_keys = (keys + parts - 1) / parts;
    plan_parts(h, seq, packed, (part_keys + TILE_KEYS - 1) / TILE_KEYS * TILE_KEYS);
}

static enum status_code host_run(void *state, const struct attn_batch *b, struct status *st)
{
    (void)st;
    struct host *h = state;
    h->batch = b;
    uint32_t G = b->heads / b->kv_heads;
    /* The large items first, so that none of them begins when the other threads have nothing left to do. */
    for (int few = 0; few < 2; few++) {
        for (uint32_t i = 0; i < b->seqs; i++) {
            if ((b->seq[i].rows * G <= FEW_ROWS) == few)
                plan_seq(h, i, b->seq[i].rows * G);
        }
    }
    flush(h);
    return ST_OK;
}

#define HOST_OPS(n)                                                                                                    \
    {                                                                                                                  \
        .name = n, .create = host_create, .destroy = host_destroy, .run = host_run,                                    \
    }

const struct attn_ops attn_ops_host = HOST_OPS("host");
const struct attn_ops attn_ops_host_nth[HOST_MAX_KERNELS] = {HOST_OPS("host/0"), HOST_OPS("host/1"),
                                                             HOST_OPS("host/2")};
