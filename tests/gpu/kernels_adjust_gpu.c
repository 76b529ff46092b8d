/* kernels_adjust_gpu.c - of check_kernels_gpu: counts of tokens, options of single tokens, and draws from what they leave
 * (worker/cuda_adjust.cu, cuda_sample.cu) against the host's sample_adjust and sampler_draw. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/kernels_gpu.h"
#include "worker/cuda_kernels.h"
#include "worker/sample.h"

static void must(enum status_code rc, const struct status *st)
{
    if (rc == ST_OK)
        return;
    fprintf(stderr, "%s\n", st->message);
    exit(1);
}

/* ---- counts ---- */

#define TABLES 3
#define SLOTS  11

/* n rows' tokens, of few ids, so that many count the same one. */
static void count_fed(struct kg *k, uint32_t n, uint32_t vocab)
{
    kg_begin(k, "count %u rows, %u ids", n, vocab);
    const size_t cells = TABLES * (size_t)vocab;
    struct cuda_row *row = kg_zeros(2 * (size_t)n, sizeof *row);
    struct cuda_fed *fed = kg_zeros(n, sizeof *fed);
    uint32_t *seen = kg_zeros(cells, sizeof *seen), *after = kg_zeros(cells, sizeof *after), last[SLOTS];
    for (uint32_t i = 0; i < SLOTS; i++)
        last[i] = kg_below(k, vocab);
    for (uint32_t i = 0; i < 2 * n; i++) /* rows that are not fed name what is not there */
        row[i].token = CUDA_TOKEN_OF_SLOT - 1;
    for (size_t i = 0; i < cells; i++)
        seen[i] = i % 5 == 0 ? 7 : i % 5 == 1 ? CUDA_SEEN_IN_PROMPT | 3 : 0;
    uint32_t *d_seen = kg_give(k, seen, cells * sizeof *seen);
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t at = 2 * (n - 1 - i), slot = kg_below(k, SLOTS), table = kg_below(k, TABLES);
        const bool of_slot = i % 3 == 2;
        const uint32_t token = of_slot ? last[slot] : kg_below(k, vocab);
        row[at].token = of_slot ? CUDA_TOKEN_OF_SLOT | slot : token;
        fed[i] = (struct cuda_fed){d_seen + table * (size_t)vocab, at, i % 4 != 0};
        if (fed[i].output)
            seen[table * (size_t)vocab + token]++;
        else
            seen[table * (size_t)vocab + token] |= CUDA_SEEN_IN_PROMPT;
    }
    const struct cuda_fed *d_fed = kg_give(k, fed, n * sizeof *fed);
    const struct cuda_row *d_row = kg_give(k, row, 2 * (size_t)n * sizeof *row);
    const uint32_t *d_last = kg_give(k, last, sizeof last);
    kg_launched(k, cuda_count_fed(k->stream, d_fed, n, d_row, d_last));
    kg_take(k, after, d_seen, cells * sizeof *after);
    for (size_t i = 0; i < cells; i++)
        kg_same(k, "count", i, after[i], seen[i]);
    kg_end(k);
    free(after);
    free(seen);
    free(fed);
    free(row);
}

/* ---- options ---- */

#define ROWS 9 /* samples with options: of every second one from FIRST + 1 on */

struct options {
    struct sample_adjust host;
    struct cuda_adjust device;
    struct sample_history history;
    uint32_t *allowed, *banned;
    struct sample_bias *bias; /* laid out as struct cuda_bias */
};

_Static_assert(sizeof(struct sample_bias) == sizeof(struct cuda_bias), "copied as they are");

static void make_lists(struct kg *k, struct options *o, uint32_t vocab, uint32_t which)
{
    const uint32_t words = (vocab + 31) / 32;
    if (which & 1) {
        o->allowed = kg_zeros(words, sizeof *o->allowed);
        for (uint32_t i = 0; i < words; i++)
            o->allowed[i] = kg_below(k, ~0u) | kg_below(k, ~0u);
        o->allowed[0] |= 1; /* one stays, unless it is banned */
        o->host.allowed = o->allowed;
        o->device.allowed = kg_give(k, o->allowed, words * sizeof *o->allowed);
    }
    if (which & 2) {
        o->host.n_banned = vocab / 4 < CUDA_MAX_BANNED ? vocab / 4 : CUDA_MAX_BANNED;
        o->host.banned = o->banned = kg_zeros(o->host.n_banned, sizeof *o->banned);
        for (uint32_t i = 0; i < o->host.n_banned; i++) /* some twice; the last one */
            o->banned[i] = i ? 1 + kg_below(k, vocab - 1) : vocab - 1;
        if (o->host.n_banned)
            o->device.banned = kg_give(k, o->banned, o->host.n_banned * sizeof *o->banned);
    }
    if (which & 4) {
        const uint32_t n = vocab < 1500 ? (vocab + 1) / 2 : CUDA_MAX_BIASES, step = vocab / n;
        o->host.n_bias = n;
        o->host.bias = o->bias = kg_zeros(n, sizeof *o->bias);
        for (uint32_t i = 0; i < n; i++) /* each id once; some leave the range of float32 */
            o->bias[i] = (struct sample_bias){vocab - 1 - i * step, i % 7 == 3   ? -FLT_MAX
                                                                    : i % 7 == 5 ? FLT_MAX
                                                                                 : kg_value(k) * 10};
        o->device.bias = kg_give(k, o->bias, n * sizeof *o->bias);
    }
    o->device.n_banned = o->host.n_banned;
    o->device.n_bias = o->host.n_bias;
}

static void make_penalties(struct kg *k, struct options *o, uint32_t vocab, uint32_t which)
{
    uint32_t *seen = kg_zeros(vocab, sizeof *seen);
    struct status st = STATUS_INIT;
    o->device.repetition = o->host.repetition = which % 2 ? 1.3f : 0.6f;
    o->device.frequency = o->host.frequency = which % 3 ? 0.7f : -0.3f;
    o->device.presence = o->host.presence = which % 2 ? -0.4f : 1.1f;
    for (uint32_t i = 0; i < 3 * (vocab / 8 + 1) && i < 3000; i++) {
        const uint32_t id = kg_below(k, vocab < 700 ? vocab : 700) * (vocab < 700 ? 1 : vocab / 700);
        must(sample_history_add(&o->history, id, i % 3 != 0, &st), &st);
        if (i % 3)
            seen[id]++;
        else
            seen[id] |= CUDA_SEEN_IN_PROMPT;
    }
    o->host.history = &o->history;
    o->device.seen = kg_give(k, seen, vocab * sizeof *seen);
    free(seen);
}

static void clear_options(struct options *o)
{
    sample_history_fini(&o->history);
    free(o->bias);
    free(o->banned);
    free(o->allowed);
}

/* Logits at the edges of float32, too. */
static void fill_logits(struct kg *k, float *row, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        row[i] = kg_value(k) * 8;
    for (uint32_t i = 3; i < n; i += 11)
        row[i] = i % 2 ? -3e38f : -INFINITY;
    for (uint32_t i = 5; i < n; i += 97)
        row[i] = i % 2 ? 0.0f : -0.0f;
}

struct adjust_problem {
    uint32_t vocab, first;
    struct options options[ROWS];
    struct cuda_sample sample[2 * ROWS + 8];
    float *logits, *adjusted; /* [2 ROWS + 1][V] raw, of samples from `first` on; [ROWS][V] */
    const float *d_adjusted;
    const struct cuda_adjust *d_adjust;
};

static void make_adjust(struct kg *k, struct adjust_problem *p)
{
    const size_t v = p->vocab;
    struct cuda_adjust adjust[ROWS];
    p->logits = kg_zeros((2 * ROWS + 1) * v, sizeof *p->logits);
    p->adjusted = kg_zeros(ROWS * v, sizeof *p->adjusted);
    memset(p->logits, 0xff, (2 * ROWS + 1) * v * sizeof *p->logits); /* those without options stay NaN */
    for (uint32_t i = 0; i < ROWS; i++) {
        const uint32_t row = 2 * (i * 4 % ROWS) + 1;
        struct options *o = &p->options[i];
        float *to = p->adjusted + i * v;
        fill_logits(k, p->logits + row * v, p->vocab);
        o->device.repetition = o->host.repetition = 1;
        make_lists(k, o, p->vocab, i);
        if (i % 3 != 1)
            make_penalties(k, o, p->vocab, i);
        o->device.sample = p->first + row;
        adjust[i] = o->device;
        memcpy(to, p->logits + row * v, v * sizeof *to);
        sample_adjust(to, p->vocab, 0, &o->host);
    }
    p->d_adjust = kg_give(k, adjust, sizeof adjust);
}

static void adjust_rows(struct kg *k, struct adjust_problem *p)
{
    const size_t v = p->vocab, n = ROWS * v;
    float *out = kg_zeros(n, sizeof *out), *d_out = kg_poisoned(k, n * sizeof *out);
    const float *d_logits = kg_give(k, p->logits, (2 * ROWS + 1) * v * sizeof *p->logits);
    kg_launched(k, cuda_adjust_rows(k->stream, d_out, d_logits, p->d_adjust, ROWS, p->first, p->vocab));
    kg_take(k, out, d_out, n * sizeof *out);
    for (size_t i = 0; i < n; i++)
        kg_same(k, "logit", i, kg_bits(out[i]), kg_bits(p->adjusted[i]));
    p->d_adjusted = d_out;
    free(out);
}

/* What the host draws of a row; a fault where it has none. */
static struct cuda_choice host_choice(struct sampler *s, const float *row, uint32_t vocab, const struct cuda_sample *a)
{
    const struct sample_params p = {a->temperature, a->top_k, a->top_p, a->seed, a->min_p, a->typical_p};
    struct cuda_choice c = {0, CUDA_FAULT_NONE};
    if (sampler_draw(s, &c.token, row, &p, a->position, 0, NULL) == ST_OK)
        return c;
    const struct sample_best best = sample_argmax(row, vocab, 0);
    c.token = best.id;
    c.fault = isnan(best.logit) ? CUDA_FAULT_NAN : best.logit > 0 ? CUDA_FAULT_INFINITE : CUDA_FAULT_MINUS_INFINITE;
    return c;
}

/* Of ROWS samples all but one are drawn from their adjusted rows. */
static void draw_adjusted(struct kg *k, struct adjust_problem *p)
{
    const uint32_t samples = p->first + 2 * ROWS + 1;
    struct cuda_choice choice[2 * ROWS + 8];
    uint32_t last[2 * ROWS + 8];
    memset(p->sample, 0, sizeof p->sample);
    for (uint32_t i = 0; i < samples; i++)
        p->sample[i] = (struct cuda_sample){
            .row = i,
            .position = kg_below(k, 100000),
            .temperature = i % 5 == 0 ? 0 : 0.5f + (float)(i % 4),
            .top_k = i % 3 == 0 ? 50 : 0,
            .top_p = i % 2 ? 0.9f : 0,
            .typical_p = i % 7 == 3 ? 0.7f : 0,
            .seed = (uint64_t)kg_below(k, ~0u) << 32 | i,
            .slot = i,
            .how = CUDA_DRAW_ADJUSTED,
        };
    p->sample[p->options[4].device.sample].how = CUDA_ON_HOST;
    struct cuda_choice *d_choice = kg_poisoned(k, samples * sizeof *choice);
    uint32_t *d_last = kg_poisoned(k, samples * sizeof *last);
    const struct cuda_sample *d_sample = kg_give(k, p->sample, samples * sizeof *p->sample);
    kg_launched(
        k, cuda_sample_adjusted(k->stream, d_choice, d_last, p->d_adjusted, d_sample, p->d_adjust, ROWS, p->vocab));
    kg_take(k, choice, d_choice, samples * sizeof *choice);
    kg_take(k, last, d_last, samples * sizeof *last);
    struct sampler *s;
    struct status st = STATUS_INIT;
    must(sampler_create(&s, p->vocab, &st), &st);
    for (uint32_t i = 0; i < ROWS; i++) {
        const uint32_t at = p->options[i].device.sample;
        if (p->sample[at].how == CUDA_ON_HOST)
            continue;
        const struct cuda_choice want = host_choice(s, p->adjusted + (size_t)i * p->vocab, p->vocab, &p->sample[at]);
        kg_same(k, "fault of sample", at, choice[at].fault, want.fault);
        kg_same(k, "token of sample", at, choice[at].token, want.token);
        kg_same(k, "last token of slot", at, last[at], want.fault == CUDA_FAULT_NONE ? want.token : 0);
        memset(&choice[at], 0xff, sizeof choice[at]); /* what is left was to stay as it was */
        last[at] = ~0u;
    }
    kg_untouched(k, "choices of others", choice, samples * sizeof *choice);
    kg_untouched(k, "last tokens of others", last, samples * sizeof *last);
    sampler_destroy(s);
}

void kg_adjust(struct kg *k)
{
    static const uint32_t fed[] = {1, 3, 255, 256, 257, 2000}, vocab[] = {33, 4097, 1, 512, 4095, 4096, 151936};
    kg_launched(k, cuda_adjust_load());
    for (uint32_t i = 0; i < KG_COUNT(fed); i++)
        if (!k->small || fed[i] <= 257)
            count_fed(k, fed[i], i % 2 ? 40 : 512);
    for (uint32_t i = 0; i < (k->small ? 2 : KG_COUNT(vocab)); i++) {
        struct adjust_problem p;
        memset(&p, 0, sizeof p);
        p.vocab = vocab[i];
        p.first = i % 2 * 6;
        kg_begin(k, "adjust %u rows of %u, first sample %u", ROWS, p.vocab, p.first);
        make_adjust(k, &p);
        adjust_rows(k, &p);
        draw_adjusted(k, &p);
        kg_end(k);
        for (uint32_t r = 0; r < ROWS; r++)
            clear_options(&p.options[r]);
        free(p.adjusted);
        free(p.logits);
    }
}
