/* cuda_options.c - options of single tokens on a device, and scores. A table for each slot that has some, out of a bounded pool.
 *
 *   seen   [V]   how often the slot's output holds a token, and whether its prompt does: counted by each step from its own rows,
 *                on the device, so that a step can be under way whose tokens the host does not know yet
 *   lists        allowed tokens, biases, bans: written once, at the slot's beginning
 *
 * All of it goes over and is used in the order of the stream: a table whose slot was released may be given away while a step
 * that looks at it is under way. The host's copy of the lists belongs to the step that the slot begins in.
 */
#include <stdlib.h>
#include <string.h>

#include "worker/cuda_internal.h"

#define TABLE_BYTES (640u << 20) /* of all: 1246 tables of a vocabulary of 128256 */

/* In units of 4 bytes. */
static uint32_t allowed_words(uint32_t vocab)
{
    return (vocab + 31) / 32;
}

uint32_t cuda_options_list_words(uint32_t vocab)
{
    return allowed_words(vocab) + 2 * CUDA_MAX_BIASES + CUDA_MAX_BANNED;
}

uint32_t cuda_options_tables(uint32_t max_slots, uint32_t vocab)
{
    uint64_t tables = TABLE_BYTES / sizeof(uint32_t) / (vocab + cuda_options_list_words(vocab));
    tables = tables < 1 ? 1 : tables;
    return tables < max_slots ? (uint32_t)tables : max_slots;
}

enum status_code cuda_options_create(struct cuda_options *o, uint32_t max_slots, uint32_t vocab, struct status *st)
{
    uint32_t tables = cuda_options_tables(max_slots, vocab);
    o->slot = calloc(max_slots, sizeof *o->slot);
    o->free = calloc(tables, sizeof *o->free);
    if (!o->slot || !o->free)
        return status_nomem(st, "options of slots", max_slots * sizeof *o->slot + tables * sizeof *o->free);
    for (uint32_t i = 0; i < tables; i++)
        o->free[o->n_free++] = i;
    enum status_code rc = cuda_check(cuda_adjust_load(), st, "kernels of options");
    return rc == ST_OK ? cuda_check(cuda_score_load(), st, "kernel of scores") : rc;
}

void cuda_options_fini(struct cuda_options *o)
{
    free(o->free);
    free(o->slot);
}

/* ---- a slot's ---- */

/* n words to both copies, from word `at` on. */
static enum status_code send_list(struct forward *f, uint32_t *host, uint32_t *device, uint32_t at, const void *list,
                                  uint32_t n, struct status *st)
{
    if (n == 0)
        return ST_OK;
    memcpy(host + at, list, n * sizeof *host);
    return cuda_check(cudaMemcpyAsync(device + at, host + at, n * sizeof *host, cudaMemcpyHostToDevice, f->stream), st,
                      "options of a slot");
}

_Static_assert(sizeof(struct sample_bias) == sizeof(struct cuda_bias) && sizeof(struct cuda_bias) == 8, "as it is");

enum status_code cuda_forward_begin(struct forward *f, uint32_t slot, const struct sample_adjust *a, uint32_t output_at,
                                    bool *kept, struct status *st)
{
    struct cuda_options *o = &f->options;
    struct cuda_options_slot *s = &o->slot[slot];
    *kept = false;
    if (o->n_free == 0 || a->n_bias > CUDA_MAX_BIASES || a->n_banned > CUDA_MAX_BANNED)
        return ST_OK;
    uint32_t vocab = f->cfg.model->vocab_size, words = cuda_options_list_words(vocab), table = o->free[o->n_free - 1];
    uint32_t bias_at = allowed_words(vocab), banned_at = bias_at + 2 * CUDA_MAX_BIASES;
    /* of the step that comes next: none that is under way uses it */
    struct cuda_flight *l = &f->flight[(f->first_flight + f->flights) % CUDA_FLIGHTS];
    uint32_t *host = l->lists + (uint64_t)table * words, *device = f->lists + (uint64_t)table * words,
             *seen = f->seen + (uint64_t)table * vocab;
    enum status_code rc = ST_OK;
    if (a->history)
        rc = cuda_check(cudaMemsetAsync(seen, 0, vocab * sizeof *seen, f->stream), st, "history of a slot");
    if (rc == ST_OK)
        rc = send_list(f, host, device, 0, a->allowed, a->allowed ? bias_at : 0, st);
    if (rc == ST_OK)
        rc = send_list(f, host, device, bias_at, a->bias, 2 * a->n_bias, st);
    if (rc == ST_OK)
        rc = send_list(f, host, device, banned_at, a->banned, a->n_banned, st);
    if (rc != ST_OK)
        return rc;
    o->n_free--;
    *s = (struct cuda_options_slot){
        .kept = true,
        .table = table,
        .output_at = output_at,
        .adjust = {.allowed = a->allowed ? device : NULL,
                   .bias = (const struct cuda_bias *)(device + bias_at),
                   .banned = device + banned_at,
                   .seen = a->history ? seen : NULL,
                   .n_bias = a->n_bias,
                   .repetition = a->repetition,
                   .frequency = a->frequency,
                   .presence = a->presence},
    };
    *kept = true;
    return ST_OK;
}

void cuda_forward_end(struct forward *f, uint32_t slot)
{
    struct cuda_options *o = &f->options;
    if (!o->slot[slot].kept)
        return;
    o->slot[slot].kept = false;
    o->free[o->n_free++] = o->slot[slot].table;
}

/* ---- of a step ---- */

bool cuda_options_kept(const struct forward *f, const struct forward_sample *s)
{
    return s->slot != FORWARD_NO_SLOT && s->adjust && f->options.slot[s->slot].kept;
}

void cuda_options_fill(const struct forward *f, struct cuda_flight *l, const struct forward_batch *b)
{
    const bool reports = comm_rank(f->cfg.comm) == 0;
    l->n_adjust = l->n_fed = l->n_score = 0;
    for (uint32_t i = 0; i < b->samples; i++) {
        const struct forward_sample *s = &b->sample[i];
        if (reports && s->scored && l->sample[i].how != CUDA_ON_HOST)
            l->score[l->n_score++] =
                (struct cuda_score){.sample = i, .given = s->given, .token = s->token, .top = s->top};
        if (!cuda_options_kept(f, s))
            continue;
        struct cuda_adjust *a = &l->adjust[l->n_adjust++];
        *a = f->options.slot[s->slot].adjust;
        a->sample = i;
        a->n_banned = s->adjust->n_banned; /* by position */
    }
    for (uint32_t i = 0; i < b->seqs; i++) {
        const struct cuda_options_slot *o = &f->options.slot[b->seq[i].slot];
        for (uint32_t r = 0; o->kept && o->adjust.seen && r < b->seq[i].rows; r++)
            l->fed[l->n_fed++] = (struct cuda_fed){
                .seen = f->seen + (uint64_t)o->table * f->cfg.model->vocab_size,
                .row = b->seq[i].first_row + r,
                .output = b->seq[i].position + r >= o->output_at,
            };
    }
}

enum status_code cuda_options_draw(struct forward *f, const struct cuda_flight *l, uint32_t first, uint32_t n,
                                   struct status *st)
{
    const uint32_t vocab = f->cfg.model->vocab_size;
    uint32_t at = 0, end;
    while (at < l->n_adjust && l->adjust[at].sample < first)
        at++;
    for (end = at; end < l->n_adjust && l->adjust[end].sample < first + n;)
        end++;
    enum status_code rc = ST_OK;
    while (rc == ST_OK && at < end) {
        uint32_t rows = end - at < f->adjusted_rows ? end - at : f->adjusted_rows;
        rc = cuda_check(cuda_adjust_rows(f->stream, f->adjusted, f->logits, f->adjust + at, rows, first, vocab), st,
                        "options of tokens");
        if (rc == ST_OK)
            rc = cuda_check(cuda_sample_adjusted(f->stream, f->choice, f->last, f->adjusted, f->sample, f->adjust + at,
                                                 rows, vocab),
                            st, "sampling");
        at += rows;
    }
    return rc;
}

enum status_code cuda_options_score(struct forward *f, const struct cuda_flight *l, uint32_t first, uint32_t n,
                                    struct status *st)
{
    uint32_t at = 0, end;
    while (at < l->n_score && l->score[at].sample < first)
        at++;
    for (end = at; end < l->n_score && l->score[end].sample < first + n;)
        end++;
    return cuda_check(cuda_score_rows(f->stream, f->scores + at, f->choice, f->logits, f->score + at, end - at, first,
                                      f->cfg.model->vocab_size),
                      st, "scores");
}

_Static_assert(CUDA_MAX_TOP == SAMPLE_MAX_TOP, "as many");

void cuda_options_take_scores(const struct cuda_flight *l)
{
    for (uint32_t i = 0; i < l->n_score; i++) {
        const struct cuda_scores *from = &l->scores[i];
        struct sample_scores *to = l->batch.sample[l->score[i].sample].scores;
        to->token = l->tokens[l->score[i].sample];
        to->logprob = from->logprob;
        to->rank = from->rank;
        to->n = from->n;
        memcpy(to->top, from->top, from->n * sizeof *to->top);
        memcpy(to->top_logprob, from->top_logprob, from->n * sizeof *to->top_logprob);
    }
}
