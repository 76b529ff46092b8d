/* cuda_warm.c - all that steps will launch is prepared before the first one: no step waits for a measurement or for a graph, nor,
 * with graphs, for a kernel that is loaded.
 *
 * Products are measured for cfg.tune_ms at most, the buckets of single decodes and of the largest step first; what is not
 * reached is taken as the library suggests it and measured at a later start, since what was measured is kept (tuned.h).
 * Graphs are bounded by their number, CUDA_KINDS for each bucket, as all ranks must capture the same ones.
 */
#include <stdio.h>
#include <time.h>

#include "worker/cuda_internal.h"

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static void note(struct forward *f, const char *text)
{
    if (f->cfg.note)
        f->cfg.note(f->cfg.note_ctx, text);
}

/* What products are tried on; zeros would cost less power than what comes later. */
static enum status_code fill_inputs(struct forward *f, struct status *st)
{
    const struct shard *s = f->cfg.shard;
    const struct {
        void *to;
        uint64_t cols, rows;
    } all[] = {
        {f->h, f->cfg.model->hidden, f->cfg.max_rows},
        {f->att, (uint64_t)s->heads.count * f->cfg.model->head_dim, f->cfg.max_rows},
        {f->act, s->inner.count, f->cfg.max_rows},
        {f->picked, f->cfg.model->hidden, f->head_rows},
    };
    enum status_code rc = ST_OK;
    for (size_t i = 0; rc == ST_OK && i < sizeof all / sizeof *all; i++)
        rc =
            cuda_check(cuda_random(f->stream, all[i].to, i, 0, all[i].cols * all[i].rows, 1), st, "inputs of products");
    return rc;
}

static enum status_code choose_products(struct forward *f, struct status *st)
{
    const uint32_t n = f->n_buckets;
    enum status_code rc = fill_inputs(f, st);
    cuda_gemm_try_until(f->gemm, now_us() + f->cfg.tune_ms * 1e3);
    for (uint32_t i = 0; rc == ST_OK && i < n; i++) {
        struct cuda_bucket *b = &f->bucket[i < 2 ? (n - 1) * i : i - 1]; /* first, last, second, third ... */
        uint32_t head = b->rows < f->head_rows ? b->rows : f->head_rows;
        rc = cuda_forward_prepare(f, b, st);
        if (rc == ST_OK)
            rc = cuda_forward_prepare_head(f, head, st);
    }
    cuda_gemm_try_until(f->gemm, 0);
    return rc;
}

/* The most that any rank has: one without heads, or with another GPU, captures the others' kinds, too. Collective. */
static enum status_code agree_on_ways(const struct forward *f, uint32_t *ways, struct status *st)
{
    const struct attn_gpu *attn = cuda_forward_chooser(f);
    const uint32_t own = attn ? attn_gpu_ways(attn) : 1;
    float ranks[ATTN_GPU_WAYS] = {0}; /* that have way number i */
    for (uint32_t i = 0; i < own; i++)
        ranks[i] = 1;
    enum status_code rc = comm_size(f->cfg.comm) > 1 ? comm_all_reduce(f->cfg.comm, ranks, ATTN_GPU_WAYS, st) : ST_OK;
    for (*ways = 1; *ways < ATTN_GPU_WAYS && ranks[*ways] > 0;)
        ++*ways;
    return rc;
}

/* Of decodes alone there are as many rows as sequences. */
static enum status_code make_graphs(struct forward *f, uint32_t ways, uint32_t *made, struct status *st)
{
    const uint32_t max_seqs = cuda_forward_max_seqs(&f->cfg);
    enum status_code rc = ST_OK;
    for (uint32_t i = 0; f->graphs && i < f->n_buckets; i++) {
        struct cuda_bucket *b = &f->bucket[i];
        bool decodes = i == 0 || b[-1].rows < max_seqs;
        for (uint32_t kind = 0; kind < CUDA_KINDS; kind++) {
            if (kind == CUDA_DECODES ? !decodes : kind >= ways)
                continue;
            if ((rc = cuda_forward_capture(f, b, kind, st)) != ST_OK)
                return rc;
            ++*made;
        }
    }
    return rc;
}

/* The head's products are in no graph. Those that were not measured in this start have not run yet, and CUDA loads a kernel at its first
 * launch, for which it waits until the device is idle. */
static enum status_code load_heads(struct forward *f, struct status *st)
{
    enum status_code rc = ST_OK;
    for (uint32_t i = 0; rc == ST_OK && i < f->n_buckets; i++) {
        const bool last = f->bucket[i].rows >= f->head_rows;
        rc = cuda_forward_load_head(f, last ? f->head_rows : f->bucket[i].rows, st);
        if (last)
            break;
    }
    return rc;
}

/* One row that is nobody's goes all the way, so that every other kernel of it is loaded. */
static enum status_code run_padding(struct forward *f, struct status *st)
{
    const struct forward_sample sample = {.slot = FORWARD_NO_SLOT};
    const struct forward_batch batch = {.rows = 1, .samples = 1, .sample = &sample};
    uint32_t token;
    for (uint32_t i = 0; i < CUDA_FLIGHTS; i++)
        f->flight[i].row[0] = (struct cuda_row){0};
    return cuda_forward_run(f, &batch, &token, st);
}

static void say(struct forward *f, double products_ms, uint32_t graphs, double graphs_ms)
{
    const struct cuda_gemm_counts c = cuda_gemm_counts(f->gemm);
    const char *file = cuda_gemm_file(f->gemm), *problem = cuda_gemm_file_problem(f->gemm);
    char text[1024];
    if (problem) {
        snprintf(text, sizeof text, "measured products are not used: %.800s", problem);
        note(f, text);
    }
    snprintf(text, sizeof text,
             "products: %u measured, %u from %.500s, %u as the library suggests, %u with SwiGLU in them, "
             "%u of some rows, in %.0f ms; %u graphs in %.0f ms",
             c.measured, c.remembered, file ? file : "no file", c.untried, c.glu, c.some, products_ms, graphs,
             graphs_ms);
    note(f, text);
}

/* What cannot be kept is measured again at the next start: no reason not to serve. */
static void keep_products(struct forward *f)
{
    struct status st = STATUS_INIT;
    char text[STATUS_MESSAGE_MAX + 64];
    if (cuda_gemm_save(f->gemm, &st) == ST_OK)
        return;
    snprintf(text, sizeof text, "measured products are not kept: %s", st.message);
    note(f, text);
}

enum status_code cuda_forward_warm(struct forward *f, struct status *st)
{
    uint32_t graphs = 0, ways;
    double start_us = now_us(), products_us = 0;
    enum status_code rc = agree_on_ways(f, &ways, st);
    if (rc == ST_OK)
        rc = choose_products(f, st);
    if (rc == ST_OK) {
        keep_products(f);
        products_us = now_us();
        rc = make_graphs(f, ways, &graphs, st);
    }
    if (rc == ST_OK) {
        say(f, (products_us - start_us) / 1e3, graphs, (now_us() - products_us) / 1e3);
        rc = load_heads(f, st);
        if (rc == ST_OK)
            rc = run_padding(f, st);
    }
    if (rc != ST_OK) {
        status_prefix(st, "before the first step");
        return rc;
    }
    f->warm = true;
    return ST_OK;
}
