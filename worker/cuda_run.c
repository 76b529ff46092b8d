/* cuda_run.c - a step on a device.
 *
 *   host: rows, sequences, samples  ──copy──▶  layers (graph of the bucket)  ▶  head, sampling  ──copy──▶  tokens
 *
 * The layers (cuda_layers.c) work on the bucket's rows; what is behind the batch's own is padding, which touches nobody's memory.
 */
#include <string.h>

#include "worker/cuda_internal.h"
#include "worker/cuda_ranges.h"

/* ---- the batch goes over ---- */

static struct cuda_bucket *bucket_for(struct forward *f, uint32_t rows)
{
    struct cuda_bucket *b = f->bucket;
    while (b->rows < rows)
        b++;
    return b;
}

static void fill_rows(struct forward *f, struct cuda_flight *l, const struct forward_batch *b, uint32_t padded)
{
    for (uint32_t i = 0; i < b->seqs; i++) {
        const struct forward_seq *s = &b->seq[i];
        const struct kv_view view = kv_slot_view(*f->cfg.kv, s->slot, 0);
        l->seq[i] = (struct attn_seq){
            .k = view.k,
            .v = view.v,
            .first_row = s->first_row,
            .rows = s->rows,
            .kv_len = s->position + s->rows,
        };
        for (uint32_t r = 0; r < s->rows; r++) {
            uint32_t position = s->position + r;
            l->row[s->first_row + r] = (struct cuda_row){
                .k = (uint64_t)(uintptr_t)view.k + position * view.token_stride,
                .token = b->token[s->first_row + r],
                .position = position,
            };
        }
    }
    for (uint32_t r = b->rows; r < padded; r++)
        l->row[r] = (struct cuda_row){0};
    *l->counts = b->seqs;
}

/* Options of slots for which the device has no table. */
static bool on_host(const struct forward *f, const struct forward_sample *s)
{
    return s->adjust && !cuda_options_kept(f, s);
}

static enum cuda_how how_of(const struct forward *f, const struct forward_sample *s)
{
    if (s->given)
        return CUDA_GIVEN;
    if (on_host(f, s))
        return CUDA_ON_HOST;
    return cuda_options_kept(f, s) ? CUDA_DRAW_ADJUSTED : CUDA_DRAW;
}

static void fill_samples(const struct forward *f, struct cuda_flight *l, const struct forward_batch *b)
{
    for (uint32_t i = 0; i < b->samples; i++) {
        const struct forward_sample *s = &b->sample[i];
        l->sample[i] = (struct cuda_sample){
            .row = s->row,
            .position = s->position,
            .temperature = s->params.temperature,
            .top_p = s->params.top_p,
            .min_p = s->params.min_p,
            .typical_p = s->params.typical_p,
            .top_k = s->params.top_k,
            .seed = s->params.seed,
            .slot = s->slot,
            .how = how_of(f, s),
        };
    }
}

_Static_assert(CUDA_NO_SLOT == FORWARD_NO_SLOT && CUDA_TOKEN_OF_SLOT == FORWARD_TOKEN_OF_SLOT, "travel as they are");

static enum status_code send_batch(struct forward *f, struct cuda_flight *l, const struct forward_batch *b,
                                   uint32_t padded, struct status *st)
{
    fill_rows(f, l, b, padded);
    fill_samples(f, l, b);
    cuda_options_fill(f, l, b);
    /* counts stands right in front of seq */
    uint64_t seq_bytes = (uint64_t)((uint8_t *)(l->seq + b->seqs) - (uint8_t *)l->counts);
    const struct {
        void *to;
        const void *from;
        uint64_t bytes;
    } copy[] = {
        {f->row, l->row, padded * sizeof *f->row},
        {f->counts, l->counts, seq_bytes},
        {f->sample, l->sample, b->samples * sizeof *f->sample},
        {f->adjust, l->adjust, l->n_adjust * sizeof *f->adjust},
        {f->fed, l->fed, l->n_fed * sizeof *f->fed},
        {f->score, l->score, l->n_score * sizeof *f->score},
    };
    for (size_t i = 0; i < sizeof copy / sizeof *copy; i++) {
        if (copy[i].bytes == 0)
            continue;
        enum status_code rc = cuda_check(
            cudaMemcpyAsync(copy[i].to, copy[i].from, copy[i].bytes, cudaMemcpyHostToDevice, f->stream), st, "batch");
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}

/* ---- head ---- */

/* Until everything on the stream is done, bounded where peers take part in it. */
static enum status_code wait_for_stream(struct forward *f, struct status *st)
{
    if (!f->group)
        return cuda_check(cudaStreamSynchronize(f->stream), st, "step");
    enum status_code rc = cuda_check(cudaEventRecord(f->waited, f->stream), st, "step");
    return rc == ST_OK ? comm_gpu_finish(f->group, f->waited, st) : rc;
}

/* Row i of f->logits, which is sample s. */
static enum status_code sample_on_host(struct forward *f, const struct forward_sample *s, uint32_t i, uint32_t *token,
                                       struct status *st)
{
    uint32_t vocab = f->cfg.model->vocab_size;
    enum status_code rc = cuda_check(cudaMemcpyAsync(f->host_logits, f->logits + (uint64_t)i * vocab,
                                                     vocab * sizeof(float), cudaMemcpyDeviceToHost, f->stream),
                                     st, "logits");
    if (rc == ST_OK)
        rc = wait_for_stream(f, st);
    if (rc != ST_OK)
        return rc;
    memcpy(f->host_adjusted, f->host_logits, vocab * sizeof *f->host_logits);
    sample_adjust(f->host_adjusted, vocab, 0, s->adjust);
    rc = sampler_draw(f->sampler, token, f->host_adjusted, &s->params, s->position, s->row, st);
    if (rc != ST_OK || !s->scored)
        return rc;
    return sample_score(s->scores, f->host_logits, vocab, *token, s->top < vocab ? s->top : vocab, s->row, st);
}

/* What the host has drawn for sample i becomes its slot's last token on the device, too. */
static enum status_code keep_drawn(struct forward *f, struct cuda_flight *l, uint32_t i, struct status *st)
{
    uint32_t slot = l->batch.sample[i].slot;
    if (slot == FORWARD_NO_SLOT)
        return ST_OK;
    l->drawn[i] = l->tokens[i];
    return cuda_check(cudaMemcpyAsync(f->last + slot, l->drawn + i, sizeof *f->last, cudaMemcpyHostToDevice, f->stream),
                      st, "token");
}

static struct cuda_product head_product(struct forward *f, uint32_t rows)
{
    float *logits = f->group ? comm_gpu_share(f->group) : f->logits;
    return cuda_product_of(&f->cfg.weights->head, f->picked, logits, CUDA_OUT_F32, rows);
}

enum status_code cuda_forward_prepare_head(struct forward *f, uint32_t rows, struct status *st)
{
    const struct cuda_product head = head_product(f, rows);
    const void *w = head.w->data, *const turns[CUDA_GEMM_TURNS] = {w, w, w,
                                                                   w}; /* larger than the cache, if it matters */
    return cuda_gemm_prepare(f->gemm, &head, turns, f->logits, st);
}

enum status_code cuda_forward_load_head(struct forward *f, uint32_t rows, struct status *st)
{
    const struct cuda_product head = head_product(f, rows);
    enum status_code rc = cuda_forward_prepare_head(f, rows, st);
    return rc == ST_OK ? cuda_gemm_run(f->gemm, &head, st) : rc;
}

/* Samples first .. first + n - 1. */
static enum status_code head_block(struct forward *f, struct cuda_flight *l, uint32_t first, uint32_t n,
                                   struct status *st)
{
    const struct model_config *m = f->cfg.model;
    const struct model_weights *w = f->cfg.weights;
    uint32_t padded = bucket_for(f, n)->rows; /* rows n .. are what was there before: nobody looks at them */
    if (padded > f->head_rows)
        padded = f->head_rows;
    const float *bias = f->group ? NULL : w->layer[m->layers - 1].down_bias; /* the sum has added it */
    const struct cuda_product head = head_product(f, padded);
    enum status_code rc = cuda_forward_prepare_head(f, padded, st);
    if (rc != ST_OK)
        return rc;
    rc = cuda_check(
        cuda_norm(f->stream, f->picked, f->x, bias, w->final_norm, m->norm_eps, f->sample + first, n, m->hidden), st,
        "norm");
    if (rc != ST_OK || (rc = cuda_gemm_run(f->gemm, &head, st)) != ST_OK)
        return rc;
    if (f->group) {
        const struct comm_gpu_gather gather = {.rows = n, .out = f->logits, .stream = f->stream};
        if ((rc = comm_gpu_gather(f->group, &gather, st)) != ST_OK)
            return rc;
    }
    rc = cuda_check(
        cuda_sample_rows(f->stream, f->choice + first, f->last, f->logits, f->sample + first, n, m->vocab_size), st,
        "sampling");
    if (rc == ST_OK)
        rc = cuda_options_draw(f, l, first, n, st);
    if (rc == ST_OK)
        rc = cuda_options_score(f, l, first, n, st);
    for (uint32_t i = 0; rc == ST_OK && i < n; i++) {
        const struct forward_sample *s = &l->batch.sample[first + i];
        if (l->sample[first + i].how != CUDA_ON_HOST)
            continue;
        rc = sample_on_host(f, s, i, &l->tokens[first + i], st);
        if (rc == ST_OK)
            rc = keep_drawn(f, l, first + i, st);
    }
    return rc;
}

/* ---- halves of a step ---- */

static enum status_code refuse(const struct forward_sample *s, struct cuda_choice c, struct status *st)
{
    if (c.fault == CUDA_FAULT_NAN)
        return status_set(st, ST_INTERNAL, "row %u: the logit of token %u is NaN", s->row, c.token);
    return status_set(st, ST_INTERNAL, "row %u: the best logit is %sinfinite", s->row,
                      c.fault == CUDA_FAULT_MINUS_INFINITE ? "minus " : "");
}

/* Faults and tokens on their way back. */
static enum status_code send_results(struct forward *f, struct cuda_flight *l, struct status *st)
{
    enum status_code rc = ST_OK;
    for (int i = 0; rc == ST_OK && i < 2; i++) {
        l->fault[i] = 0;
        if (f->attn[i])
            rc = cuda_check(cudaMemcpyAsync(&l->fault[i], attn_gpu_fault(f->attn[i]), sizeof *l->fault,
                                            cudaMemcpyDeviceToHost, f->stream),
                            st, "tokens");
    }
    if (rc == ST_OK && l->batch.samples)
        rc = cuda_check(cudaMemcpyAsync(l->choice, f->choice, l->batch.samples * sizeof *f->choice,
                                        cudaMemcpyDeviceToHost, f->stream),
                        st, "tokens");
    if (rc == ST_OK && l->n_score)
        rc = cuda_check(
            cudaMemcpyAsync(l->scores, f->scores, l->n_score * sizeof *f->scores, cudaMemcpyDeviceToHost, f->stream),
            st, "scores");
    return rc;
}

const struct attn_gpu *cuda_forward_chooser(const struct forward *f)
{
    const struct model_config *m = f->cfg.model;
    uint32_t windowed = 0;
    for (uint32_t l = 0; l < m->layers; l++)
        windowed += model_window(m, l) != 0;
    return f->attn[windowed > m->layers - windowed];
}

static uint32_t kind_of(const struct forward *f, const struct cuda_flight *l)
{
    const struct forward_batch *b = &l->batch;
    if (b->rows == b->seqs)
        return CUDA_DECODES;
    const struct attn_gpu *attn = cuda_forward_chooser(f);
    return attn ? (uint32_t)attn_gpu_choose(attn, l->seq, b->seqs) : ATTN_WAY_APART;
}

static enum status_code start_rows(struct forward *f, struct cuda_flight *l, struct status *st)
{
    const struct forward_batch *b = &l->batch;
    struct cuda_bucket *bucket = bucket_for(f, b->rows);
    cuda_range_begin("batch", b->seqs);
    enum status_code rc = send_batch(f, l, b, bucket->rows, st);
    cuda_range_end();
    if (rc != ST_OK)
        return rc;
    cuda_range_begin("layers", bucket->rows);
    rc = cuda_forward_layers(f, bucket, kind_of(f, l), st);
    cuda_range_end();
    cuda_range_begin("head and tokens", b->samples);
    if (rc == ST_OK)
        rc = cuda_check(cuda_count_fed(f->stream, f->fed, l->n_fed, f->row, f->last), st, "history of slots");
    for (uint32_t first = 0; rc == ST_OK && first < b->samples; first += f->head_rows)
        rc = head_block(f, l, first, b->samples - first < f->head_rows ? b->samples - first : f->head_rows, st);
    if (rc == ST_OK)
        rc = send_results(f, l, st);
    cuda_range_end();
    return rc;
}

enum status_code cuda_forward_start(struct forward *f, const struct forward_batch *b, uint32_t *tokens,
                                    struct status *st)
{
    if (f->flights == CUDA_FLIGHTS)
        return status_set(st, ST_INTERNAL, "%u steps are under way already", f->flights);
    struct cuda_flight *l = &f->flight[(f->first_flight + f->flights) % CUDA_FLIGHTS];
    enum status_code rc = ST_OK;
    l->batch = *b;
    l->tokens = tokens;
    cuda_range_begin("step", b->rows);
    if (l->begin)
        rc = cuda_check(cudaEventRecord(l->begin, f->stream), st, "step");
    if (rc == ST_OK && b->rows)
        rc = start_rows(f, l, st);
    if (rc == ST_OK)
        rc = cuda_check(cudaEventRecord(l->done, f->stream), st, "step");
    if (rc == ST_OK)
        f->flights++;
    cuda_range_end();
    return rc;
}

enum status_code cuda_forward_poll(struct forward *f, bool *done, struct status *st)
{
    struct cuda_flight *l = &f->flight[f->first_flight];
    if (f->group)
        return comm_gpu_poll(f->group, l->done, done, st);
    cudaError_t err = cudaEventQuery(l->done);
    *done = err == cudaSuccess;
    return err == cudaErrorNotReady ? ST_OK : cuda_check(err, st, "step");
}

static enum status_code take_tokens(struct forward *f, const struct cuda_flight *l, struct status *st)
{
    const struct forward_batch *b = &l->batch;
    for (int i = 0; i < 2; i++) {
        enum status_code rc = f->attn[i] ? attn_gpu_fault_status(f->attn[i], l->fault[i], st) : ST_OK;
        if (rc != ST_OK)
            return rc;
    }
    for (uint32_t i = 0; i < b->samples; i++) {
        if (l->sample[i].how == CUDA_ON_HOST)
            continue;
        if (l->choice[i].fault)
            return refuse(&b->sample[i], l->choice[i], st);
        l->tokens[i] = b->sample[i].given ? b->sample[i].token : l->choice[i].token;
    }
    cuda_options_take_scores(l);
    return ST_OK;
}

/* The mark moves along: floats of milliseconds are exact to 1 us for some hours only. */
static enum status_code keep_time(struct forward *f, struct cuda_flight *l, struct status *st)
{
    float to_begin = 0, to_end = 0;
    enum status_code rc = cuda_check(cudaEventElapsedTime(&to_begin, f->mark, l->begin), st, "time of a step");
    if (rc == ST_OK)
        rc = cuda_check(cudaEventElapsedTime(&to_end, l->begin, l->done), st, "time of a step");
    f->begin_us = f->mark_us + (double)to_begin * 1e3;
    f->end_us = f->begin_us + (double)to_end * 1e3;
    f->mark_us = f->end_us;
    cudaEvent_t old = f->mark;
    f->mark = l->done;
    l->done = old;
    return rc;
}

enum status_code cuda_forward_finish(struct forward *f, struct status *st)
{
    struct cuda_flight *l = &f->flight[f->first_flight];
    cuda_range_begin("wait for step", l->batch.rows);
    enum status_code rc =
        f->group ? comm_gpu_finish(f->group, l->done, st) : cuda_check(cudaEventSynchronize(l->done), st, "step");
    cuda_range_end();
    f->first_flight = (f->first_flight + 1) % CUDA_FLIGHTS;
    f->flights--;
    if (rc == ST_OK && l->begin)
        rc = keep_time(f, l, st);
    if (rc != ST_OK || l->batch.rows == 0)
        return rc;
    return take_tokens(f, l, st);
}

enum status_code cuda_forward_run(struct forward *f, const struct forward_batch *b, uint32_t *tokens, struct status *st)
{
    enum status_code rc = cuda_forward_start(f, b, tokens, st);
    return rc == ST_OK ? cuda_forward_finish(f, st) : rc;
}
