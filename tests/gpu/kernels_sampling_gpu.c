/* kernels_sampling_gpu.c - of check_kernels_gpu: choices, log probabilities, options of single tokens (worker/cuda_sample.cu,
 * cuda_score.cu, cuda_adjust.cu; cuda_select.cuh in the first two) against the host's sample.h. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/kernels_gpu.h"
#include "worker/cuda_kernels.h"
#include "worker/sample.h"

static const struct vocab {
    uint32_t n;
    bool small;
} vocabs[] = {{1, true},     {2, false},   {33, true},    {511, false}, {512, true},    {513, false},
              {1024, false}, {1025, true}, {4096, false}, {4097, true}, {32000, false}, {151936, false}};

static const struct sample_params params[] = {
    {.temperature = 0},
    {.temperature = 1},
    {.temperature = 0.7f, .top_k = 40},
    {.temperature = 1.3f, .top_p = 0.9f},
    {.temperature = 0.9f, .top_k = 50, .top_p = 0.95f},
    {.temperature = 2, .top_k = 3},
    {.temperature = 1, .top_k = 1},
    {.temperature = 1, .top_p = 0.01f},
    {.temperature = 100, .top_p = 0.999f},
    {.temperature = 1, .min_p = 0.05f},
    {.temperature = 1.5f, .top_k = 200, .min_p = 0.01f, .top_p = 0.8f},
    {.temperature = 0.01f},
    {.temperature = 5, .top_k = 1000000},
    {.temperature = 1, .typical_p = 0.5f},
    {.temperature = 1.2f, .top_p = 0.95f, .typical_p = 0.9f},
    {.temperature = 0.8f, .top_k = 100, .min_p = 0.001f, .top_p = 0.9f, .typical_p = 0.2f},
};
#define PARAMS KG_COUNT(params)

/* Logits of one row, by `kind`: spread evenly, with many equal ones, all equal, some of them -infinity. */
static void fill_row(struct kg *k, float *row, uint32_t n, uint32_t kind)
{
    for (uint32_t i = 0; i < n; i++) {
        const float x = kg_value(k) * 8;
        row[i] = kind == 1 ? rintf(x) : kind == 2 ? -1.5f : kind == 3 && i % 3 == 1 ? -INFINITY : x;
    }
}

/* What the host says of the row when it is to draw: a token, or why not. */
static struct cuda_choice host_choice(struct sampler *sampler, const float *row, uint32_t vocab,
                                      const struct sample_params *p, uint64_t position)
{
    struct cuda_choice c = {0, CUDA_FAULT_NONE};
    if (sampler_draw(sampler, &c.token, row, p, position, 0, NULL) == ST_OK)
        return c;
    const struct sample_best best = sample_argmax(row, vocab, 0);
    c.token = best.id;
    c.fault = isnan(best.logit) ? CUDA_FAULT_NAN : best.logit > 0 ? CUDA_FAULT_INFINITE : CUDA_FAULT_MINUS_INFINITE;
    return c;
}

static struct sampler *new_sampler(uint32_t vocab)
{
    struct sampler *s;
    struct status st = STATUS_INIT;
    if (sampler_create(&s, vocab, &st) != ST_OK) {
        fprintf(stderr, "%s\n", st.message);
        exit(1);
    }
    return s;
}

static struct cuda_sample sample_of(struct kg *k, const struct sample_params *p, uint32_t i, enum cuda_how how)
{
    const struct cuda_sample s = {
        .row = i,
        .position = kg_below(k, 1u << 20),
        .temperature = p->temperature,
        .top_p = p->top_p,
        .min_p = p->min_p,
        .typical_p = p->typical_p,
        .top_k = p->top_k,
        .seed = (uint64_t)kg_below(k, ~0u) << 32 | kg_below(k, ~0u),
        .slot = i % 4 == 3 ? CUDA_NO_SLOT : 2 * i,
        .how = how,
    };
    return s;
}

static struct sample_params params_of(const struct cuda_sample *s)
{
    const struct sample_params p = {s->temperature, s->top_k, s->top_p, s->seed, s->min_p, s->typical_p};
    return p;
}

/* Of a choice that is to be there, and where it goes to. */
static void compare_choice(struct kg *k, uint32_t i, const struct cuda_choice *got, const struct cuda_choice *want,
                           const struct cuda_sample *s, uint32_t *last)
{
    kg_same(k, "fault", i, got->fault, want->fault);
    kg_same(k, "token", i, got->token, want->token);
    if (s->slot == CUDA_NO_SLOT)
        return;
    kg_same(k, "last token of slot", s->slot, last[s->slot], want->fault == CUDA_FAULT_NONE ? want->token : 0);
    last[s->slot] = ~0u; /* what is left was to stay as it was */
}

/* ---- choices ---- */

#define FAULTS 3 /* rows, at the end */
#define OTHERS 3 /* samples that are not drawn from here, in front */

static void make_fault(float *row, uint32_t n, uint32_t which)
{
    const uint32_t at = n / 3;
    for (uint32_t i = 0; which == 2 && i < n; i++)
        row[i] = -INFINITY;
    if (which == 1)
        row[at] = INFINITY;
    if (which == 0)
        row[at] = row[n - 1] = NAN;
}

static void sample_rows(struct kg *k, uint32_t vocab, uint32_t kind)
{
    const uint32_t rows = OTHERS + PARAMS + FAULTS;
    kg_begin(k, "sample %u rows of %u, kind %u", rows, vocab, kind);
    struct cuda_sample sample[OTHERS + PARAMS + FAULTS];
    struct cuda_choice choice[OTHERS + PARAMS + FAULTS];
    uint32_t last[2 * (OTHERS + PARAMS + FAULTS)];
    float *logits = kg_zeros((size_t)rows * vocab, sizeof *logits);
    memset(logits, 0xff, OTHERS * (size_t)vocab * sizeof *logits);
    for (uint32_t i = 0; i < rows; i++) {
        static const enum cuda_how how[OTHERS] = {CUDA_DRAW_ADJUSTED, CUDA_GIVEN, CUDA_ON_HOST};
        sample[i] = sample_of(k, &params[(i + PARAMS - OTHERS) % PARAMS], i, i < OTHERS ? how[i] : CUDA_DRAW);
        if (i >= OTHERS)
            fill_row(k, logits + (size_t)i * vocab, vocab, kind);
        if (i >= OTHERS + PARAMS)
            make_fault(logits + (size_t)i * vocab, vocab, i - OTHERS - PARAMS);
    }
    struct cuda_choice *d_choice = kg_poisoned(k, sizeof choice);
    uint32_t *d_last = kg_poisoned(k, sizeof last);
    const float *d_logits = kg_give(k, logits, (size_t)rows * vocab * sizeof *logits);
    const struct cuda_sample *d_sample = kg_give(k, sample, sizeof sample);
    kg_launched(k, cuda_sample_rows(k->stream, d_choice, d_last, d_logits, d_sample, rows, vocab));
    kg_take(k, choice, d_choice, sizeof choice);
    kg_take(k, last, d_last, sizeof last);
    struct sampler *sampler = new_sampler(vocab);
    for (uint32_t i = OTHERS; i < rows; i++) {
        const struct sample_params p = params_of(&sample[i]);
        const struct cuda_choice want = host_choice(sampler, logits + (size_t)i * vocab, vocab, &p, sample[i].position);
        compare_choice(k, i, &choice[i], &want, &sample[i], last);
    }
    kg_same(k, "fault of what is given", 1, choice[1].fault, CUDA_FAULT_NONE);
    kg_untouched(k, "choice of another kernel", &choice[0], sizeof *choice);
    kg_untouched(k, "choice of the host", &choice[2], sizeof *choice);
    kg_untouched(k, "last tokens", last, sizeof last);
    kg_end(k);
    sampler_destroy(sampler);
    free(logits);
}

void kg_sample(struct kg *k)
{
    for (uint32_t i = 0; i < KG_COUNT(vocabs); i++)
        for (uint32_t kind = 0; kind < 4; kind++)
            if (!k->small || (vocabs[i].small && kind == (i + 1) / 2 % 4))
                sample_rows(k, vocabs[i].n, kind);
}

/* ---- log probabilities ---- */

#define SCORES 14

/* Scores of every second sample or so, in an order of their own; the last three rows have a fault. */
static void make_scores(struct kg *k, struct cuda_score *score, struct cuda_choice *choice, float *logits,
                        uint32_t vocab, uint32_t first)
{
    static const uint32_t tops[] = {0, 1, 2, 5, CUDA_MAX_TOP, 0, 20, 7};
    memset(logits, 0xff, 2 * SCORES * (size_t)vocab * sizeof *logits);
    memset(choice, 0xff, (first + 2 * SCORES) * sizeof *choice);
    for (uint32_t i = 0; i < SCORES; i++) {
        const uint32_t row = 2 * ((i * 5) % SCORES);
        float *at = logits + (size_t)row * vocab;
        fill_row(k, at, vocab, i % 4);
        if (i >= SCORES - FAULTS)
            make_fault(at, vocab, i - (SCORES - FAULTS));
        const uint32_t token = kg_below(k, vocab);
        score[i] = (struct cuda_score){
            .sample = first + row, .given = i % 3 == 0, .token = i % 3 ? ~0u : token, .top = tops[i % 8]};
        choice[first + row] = (struct cuda_choice){i % 3 ? token : 0, CUDA_FAULT_NONE};
        if (i % 5 == 1 && score[i].given == 0)
            choice[first + row].token = sample_argmax(at, vocab, 0).id;
    }
}

static void compare_score(struct kg *k, uint32_t i, const struct cuda_scores *got, const struct sample_scores *want)
{
    const uint32_t n = want->n;
    /* cuda_kernels.h; -infinity exactly */
    const double off = isinf(want->logprob) ? 0 : 0x1p-36 + 0x1p-23 * fabs((double)want->logprob);
    if (off > 0)
        kg_near(k, "log probability", i, (double)got->logprob, (double)want->logprob, off);
    else
        kg_same(k, "log probability", i, kg_bits(got->logprob), kg_bits(want->logprob));
    kg_same(k, "rank", i, got->rank, want->rank);
    kg_same(k, "how many", i, got->n, n);
    for (uint32_t j = 0; j < n; j++) {
        const double x = (double)want->top_logprob[j];
        kg_same(k, "one of the likeliest", j, got->top[j], want->top[j]);
        if (isinf(x))
            kg_same(k, "log probability of the likeliest", j, kg_bits(got->top_logprob[j]), kg_bits(-INFINITY));
        else
            kg_near(k, "log probability of the likeliest", j, (double)got->top_logprob[j], x,
                    0x1p-36 + 0x1p-23 * fabs(x));
    }
    kg_untouched(k, "ids behind the likeliest", got->top + n, (CUDA_MAX_TOP - n) * sizeof *got->top);
    kg_untouched(k, "log probabilities behind the likeliest", got->top_logprob + n,
                 (CUDA_MAX_TOP - n) * sizeof *got->top_logprob);
}

static void score_rows(struct kg *k, uint32_t vocab, uint32_t first)
{
    kg_begin(k, "score %u rows of %u, first sample %u", SCORES, vocab, first);
    const uint32_t samples = first + 2 * SCORES;
    const size_t n = 2 * SCORES * (size_t)vocab;
    struct cuda_score score[SCORES];
    struct cuda_scores scores[SCORES];
    struct cuda_choice *choice = kg_zeros(samples, sizeof *choice), *after = kg_zeros(samples, sizeof *after);
    float *logits = kg_zeros(n, sizeof *logits);
    make_scores(k, score, choice, logits, vocab, first);
    struct cuda_scores *d_scores = kg_poisoned(k, sizeof scores);
    struct cuda_choice *d_choice = kg_give(k, choice, samples * sizeof *choice);
    const float *d_logits = kg_give(k, logits, n * sizeof *logits);
    const struct cuda_score *d_score = kg_give(k, score, sizeof score);
    kg_launched(k, cuda_score_rows(k->stream, d_scores, d_choice, d_logits, d_score, SCORES, first, vocab));
    kg_take(k, scores, d_scores, sizeof scores);
    kg_take(k, after, d_choice, samples * sizeof *after);
    for (uint32_t i = 0; i < SCORES; i++) {
        const float *row = logits + (size_t)(score[i].sample - first) * vocab;
        struct cuda_choice *c = &choice[score[i].sample];
        struct sample_scores want;
        const uint32_t token = score[i].given ? score[i].token : c->token;
        const uint32_t top = score[i].top < vocab ? score[i].top : vocab;
        if (sample_score(&want, row, vocab, token, top, 0, NULL) == ST_OK) {
            compare_score(k, i, &scores[i], &want);
            continue;
        }
        const struct sample_best best = sample_argmax(row, vocab, 0);
        *c = (struct cuda_choice){best.id, isnan(best.logit) ? CUDA_FAULT_NAN
                                           : best.logit > 0  ? CUDA_FAULT_INFINITE
                                                             : CUDA_FAULT_MINUS_INFINITE};
        kg_untouched(k, "scores of a row with a fault", &scores[i], sizeof scores[i]);
    }
    for (uint32_t i = 0; i < samples; i++) {
        kg_same(k, "choice", i, after[i].token, choice[i].token);
        kg_same(k, "fault", i, after[i].fault, choice[i].fault);
    }
    kg_end(k);
    free(logits);
    free(after);
    free(choice);
}

void kg_score(struct kg *k)
{
    kg_launched(k, cuda_score_load());
    for (uint32_t i = 0; i < KG_COUNT(vocabs); i++)
        if (!k->small || vocabs[i].small)
            score_rows(k, vocabs[i].n, i % 2 * 5);
}
