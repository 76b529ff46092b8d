/* forward_head.c - from the residual stream to tokens. Greedy rows exchange one pair per rank; the others, and rows that are
 * scored, gather their logits, and every rank draws the same token from them. */
#include <string.h>

#include "worker/forward_internal.h"

struct head_job {
    struct forward *f;
    const struct forward_batch *b;
    const uint32_t *order; /* of this block */
    uint32_t rows;         /* of this block */
    uint32_t greedy;       /* of these, the first */
    uint32_t first;        /* of this block among all samples */
    uint32_t *tokens;
};

static void pick_rows(void *arg, uint32_t first, uint32_t end, uint32_t worker)
{
    (void)worker;
    const struct head_job *j = arg;
    const struct model_config *m = j->f->cfg.model;
    for (uint32_t i = first; i < end; i++) {
        uint64_t row = j->b->sample[j->order[i]].row;
        float *out = j->f->picked + (uint64_t)i * m->hidden;
        memcpy(out, j->f->h + row * m->hidden, m->hidden * sizeof *out);
        forward_add_norm_row(j->f->x + row * m->hidden, out, j->f->cfg.weights->final_norm, m->hidden, m->norm_eps);
    }
}

static void best_rows(void *arg, uint32_t first, uint32_t end, uint32_t worker)
{
    (void)worker;
    const struct head_job *j = arg;
    const struct shard_span vocab = j->f->cfg.shard->vocab;
    for (uint32_t i = first; i < end; i++) {
        float *logits = j->f->logits + (uint64_t)i * vocab.count;
        const struct sample_adjust *adjust = j->b->sample[j->order[i]].adjust;
        if (adjust)
            sample_adjust(logits, vocab.count, vocab.first, adjust);
        j->f->best[j->first + i] = sample_argmax(logits, vocab.count, vocab.first);
    }
}

/* All raw logits of row i of the block's drawn rows, `drawn` in number; perhaps put together in the worker's full_row. */
static const float *whole_row(const struct head_job *j, uint32_t i, uint32_t drawn, uint32_t worker)
{
    struct forward *f = j->f;
    uint32_t vocab = f->cfg.model->vocab_size;
    if (f->ranks == 1)
        return f->logits + (uint64_t)(j->greedy + i) * vocab;
    float *out = f->full_row + (uint64_t)worker * vocab;
    const float *part = f->gathered;
    for (uint32_t r = 0; r < f->ranks; r++) {
        struct shard_span s = shard_even(vocab, r, f->ranks);
        memcpy(out + s.first, part + (uint64_t)i * s.count, s.count * sizeof *out);
        part += (uint64_t)drawn * s.count;
    }
    return out;
}

static enum status_code draw_row(const struct head_job *j, uint32_t i, uint32_t worker, struct status *st)
{
    struct forward *f = j->f;
    uint32_t sample = j->order[j->greedy + i], vocab = f->cfg.model->vocab_size, drawn = j->rows - j->greedy;
    const struct forward_sample *s = &j->b->sample[sample];
    j->tokens[sample] = s->token;
    if (s->given && f->rank != 0)
        return ST_OK;
    const float *raw = whole_row(j, i, drawn, worker), *logits = raw;
    enum status_code rc;
    if (!s->given) {
        if (s->adjust) {
            float *adjusted = f->full_row + (uint64_t)worker * vocab;
            if (raw != adjusted)
                memcpy(adjusted, raw, vocab * sizeof *raw);
            sample_adjust(adjusted, vocab, 0, s->adjust);
            logits = adjusted;
        }
        rc = sampler_draw(f->sampler[worker], &j->tokens[sample], logits, &s->params, s->position, s->row, st);
        if (rc != ST_OK)
            return rc;
    }
    if (!s->scored || f->rank != 0)
        return ST_OK;
    if (s->adjust)
        raw = whole_row(j, i, drawn, worker); /* once more: what it returned before may have been adjusted */
    return sample_score(s->scores, raw, vocab, j->tokens[sample], s->top < vocab ? s->top : vocab, s->row, st);
}

static void draw_rows(void *arg, uint32_t first, uint32_t end, uint32_t worker)
{
    const struct head_job *j = arg;
    for (uint32_t i = first; i < end; i++)
        j->f->row_rc[i] = draw_row(j, i, worker, NULL);
}

static enum status_code draw_block(struct head_job *j, struct status *st)
{
    struct forward *f = j->f;
    uint32_t drawn = j->rows - j->greedy, vocab = f->cfg.model->vocab_size;
    if (drawn == 0)
        return ST_OK;
    if (f->ranks > 1) {
        for (uint32_t r = 0; r < f->ranks; r++)
            f->gather_bytes[r] = (size_t)drawn * shard_even(vocab, r, f->ranks).count * sizeof(float);
        const float *mine = f->logits + (uint64_t)j->greedy * f->cfg.shard->vocab.count;
        enum status_code rc = comm_all_gather(f->cfg.comm, mine, f->gathered, f->gather_bytes, st);
        if (rc != ST_OK)
            return rc;
    }
    forward_rows(f->cfg.pool, drawn, 8ull * vocab, draw_rows, j);
    for (uint32_t i = 0; i < drawn; i++)
        if (f->row_rc[i] != ST_OK)
            return draw_row(j, i, 0, st); /* once more, for the message */
    return ST_OK;
}

static enum status_code exchange_best(struct forward *f, const struct forward_batch *b, uint32_t greedy,
                                      uint32_t *tokens, struct status *st)
{
    enum status_code rc;
    if (greedy && f->ranks > 1) {
        for (uint32_t r = 0; r < f->ranks; r++)
            f->gather_bytes[r] = greedy * sizeof *f->best;
        if ((rc = comm_all_gather(f->cfg.comm, f->best, f->bests, f->gather_bytes, st)) != ST_OK)
            return rc;
        for (uint32_t i = 0; i < greedy; i++) {
            f->best[i] = f->bests[i];
            for (uint32_t r = 1; r < f->ranks; r++)
                f->best[i] = sample_merge(f->best[i], f->bests[(uint64_t)r * greedy + i]);
        }
    }
    for (uint32_t i = 0; i < greedy; i++) {
        uint32_t sample = f->order[i];
        if ((rc = sample_best_token(&tokens[sample], f->best[i], b->sample[sample].row, st)) != ST_OK)
            return rc;
    }
    return ST_OK;
}

static bool is_greedy(const struct forward_sample *s)
{
    return sample_is_greedy(&s->params) && !s->scored;
}

enum status_code forward_head(struct forward *f, const struct forward_batch *b, uint32_t *tokens, struct status *st)
{
    const struct model_config *m = f->cfg.model;
    uint32_t greedy = 0, n = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < b->samples; i++)
            if (is_greedy(&b->sample[i]) == (pass == 0))
                f->order[n++] = i;
        if (pass == 0)
            greedy = n;
    }
    for (uint32_t first = 0; first < b->samples; first += f->head_rows) {
        uint32_t rows = b->samples - first < f->head_rows ? b->samples - first : f->head_rows;
        struct head_job j = {.f = f, .b = b, .order = f->order + first, .rows = rows, .first = first, .tokens = tokens};
        j.greedy = greedy <= first ? 0 : greedy - first < rows ? greedy - first : rows;
        forward_rows(f->cfg.pool, rows, 2ull * m->hidden, pick_rows, &j);
        gemm_run(f->gemm, f->logits, f->cfg.shard->vocab.count, f->picked, m->hidden, rows, &f->cfg.weights->head);
        forward_rows(f->cfg.pool, j.greedy, f->cfg.shard->vocab.count, best_rows, &j);
        enum status_code rc = draw_block(&j, st);
        if (rc != ST_OK)
            return rc;
    }
    return exchange_best(f, b, greedy, tokens, st);
}
