/* engine_ways_gpu.c - hybrid steps that are large enough for attention's ways (attn_gpu_way), against the serial policy. */
#include "tests/gpu/engine_ways_gpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/attention_sm90_rule.h"
#include "comm/comm.h"
#include "tests/gpu/gpu_parts.h"
#include "worker/engine_internal.h"

enum {
    DECODES = 90, /* at most */
    CONTEXT = 4096,
    CHUNK = 512,
    SHORT = 64,
    CHUNK_SLOT = DECODES,
    STEP = 1024,
    SMS = 132,
    FLIPS = 3 /* decodes whose token may be another one: two logits were nearly alike */
};

enum { N_STEPS = 3 };

/* What a step has: decodes of so many slots, and a chunk. By the ranks, whose heads say which way is taken. */
static const struct step {
    const char *name;
    uint32_t decodes, rows, at;
    enum attn_gpu_way way;
} steps_of[ENGINE_WAYS_RANKS][N_STEPS] = {
    {{"apart", 45, SHORT, 0, ATTN_WAY_APART},
     {"fused", 12, CHUNK, 7680, ATTN_WAY_FUSED},
     {"apart, long", 45, CHUNK, 7680, ATTN_WAY_APART}},
    {{"apart", 45, SHORT, 0, ATTN_WAY_APART},
     {"fused", 12, CHUNK, 7680, ATTN_WAY_FUSED},
     {"apart, long", DECODES, CHUNK, 13824, ATTN_WAY_APART}},
};

/* Of heads that do not fill boxes, by one rank and two. */
static const struct step narrow = {"serial", 45, SHORT, 0, ATTN_WAY_SERIAL};

/* What comes of it: of each decode the token that it was fed and the best log probability; of each row of the chunk that of the next token. */
struct seen {
    uint32_t fed[DECODES], decodes, rows;
    float best[DECODES], row[CHUNK];
    double spread; /* of the first decode's logits */
};

/* The rule is asked for what the step will be, so that a rule that changes does not leave a way out in silence. */
static enum attn_gpu_way way_of(const struct step *s, uint32_t ranks, uint32_t head_dim)
{
    const struct sm90_shape shape = {.group = 4,
                                     .kv_heads = 8 / ranks,
                                     .head_dim = head_dim,
                                     .sms = SMS,
                                     .max_rows = STEP,
                                     .max_seq_rows = STEP,
                                     .max_kv_len = 1 << 16};
    struct attn_seq seq[DECODES + 1];
    for (uint32_t i = 0; i < s->decodes; i++)
        seq[i] = (struct attn_seq){.first_row = i, .rows = 1, .kv_len = CONTEXT + 1};
    seq[s->decodes] = (struct attn_seq){.first_row = s->decodes, .rows = s->rows, .kv_len = s->at + s->rows};
    return sm90_choose(&shape, seq, s->decodes + 1);
}

static void token_ids(uint32_t *ids, uint32_t n, uint32_t slot, uint32_t from, uint32_t vocab)
{
    for (uint32_t i = 0; i < n; i++)
        ids[i] =
            (uint32_t)(((uint64_t)(from + i) * 104729 + (uint64_t)(from + i) * (from + i) * 31 + slot * 7919) % vocab);
}

/* Returns the token that was drawn at the end, if one was. */
static uint32_t fill_slot(struct gpu_run *r, uint32_t slot, uint32_t tokens, bool sample, Tandem__V1__SampleParams *p)
{
    uint32_t ids[CHUNK], vocab = engine_info(r->e).vocab_size;
    for (uint32_t at = 0; at < tokens; at += CHUNK) {
        token_ids(ids, CHUNK, slot, at, vocab);
        gpu_prefill(r, slot, ids, CHUNK, at, sample && at + CHUNK == tokens, p);
    }
    return sample ? r->result.tokens[0] : 0;
}

static double spread_of(struct gpu_run *r)
{
    const uint32_t vocab = engine_info(r->e).vocab_size;
    double sum = 0, squares = 0;
    float *x = malloc(vocab * sizeof *x);
    gpu_logits(r, x);
    for (uint32_t i = 0; i < vocab; i++) {
        sum += x[i];
        squares += (double)x[i] * x[i];
    }
    free(x);
    return sqrt(squares / vocab - sum / vocab * (sum / vocab));
}

static void run_step(struct seen *out, struct gpu_run *r, const struct step *s)
{
    uint32_t slots[DECODES], ids[CHUNK], vocab = engine_info(r->e).vocab_size;
    Tandem__V1__SampleParams p = TANDEM__V1__SAMPLE_PARAMS__INIT;
    p.logprobs = true;
    p.top_logprobs = 2;
    *out = (struct seen){.decodes = s->decodes};
    for (uint32_t i = 0; i < s->decodes; i++) {
        slots[i] = i;
        out->fed[i] = fill_slot(r, i, CONTEXT, true, &p);
    }
    fill_slot(r, CHUNK_SLOT, s->at, false, &p);
    token_ids(ids, s->rows, CHUNK_SLOT, s->at, vocab);
    gpu_hybrid_score(r, slots, s->decodes, CHUNK_SLOT, ids, s->rows, s->at, 77, &p);
    for (uint32_t i = 0; i < r->result.n_sample_scores; i++)
        if (r->result.sample_scores[i].index < s->decodes)
            out->best[r->result.sample_scores[i].index] = r->result.sample_scores[i].scores.top_logprob[0];
    for (uint32_t i = 0; i < r->result.n_prompt_scores && i < CHUNK; i++)
        out->row[out->rows++] = r->result.prompt_scores[i].scores.logprob;
    out->spread = spread_of(r);
    for (uint32_t i = 0; i < s->decodes; i++)
        gpu_release(r, i);
    gpu_release(r, CHUNK_SLOT);
}

static unsigned compare(const struct step *s, const struct seen *want, const struct seen *got, uint32_t kind,
                        double off)
{
    const double bound = 6 * off * want->spread;
    double decode = 0, row = 0;
    uint32_t flips = 0;
    unsigned failures = 0;
    const bool scored = comm_rank(gpu_comm()) == 0; /* the others have tokens alone */
    for (uint32_t i = 0; i < s->decodes; i++) {
        const bool flip = want->fed[i] != got->fed[i];
        const double d = fabs((double)want->best[i] - got->best[i]);
        flips += flip;
        failures += !gpu_expect((want->best[i] < 0 && got->best[i] < 0) == scored, "a decode without a score", s->name,
                                i, got->best[i]);
        if (!flip)
            failures += !gpu_expect(d <= bound, "a decode's best log probability off", s->name, i, d);
        decode = flip || d < decode ? decode : d;
    }
    failures += !gpu_expect(flips <= FLIPS, "decodes were fed other tokens", s->name, kind, flips);
    failures += !gpu_expect(want->rows == got->rows && got->rows == (scored ? s->rows : 0),
                            "rows of the chunk with a score", s->name, kind, got->rows);
    for (uint32_t i = 0; i < want->rows && i < got->rows; i++) {
        const double d = fabs((double)want->row[i] - got->row[i]);
        failures += !gpu_expect(d <= bound, "a chunk row's log probability off", s->name, i, d);
        row = d > row ? d : row;
    }
    gpu_say("%-28s %s: off from serial by at most %.4f (decodes), %.4f (rows of the chunk), of %.4f\n", s->name,
            kind == 1 ? "graphs" : "eager", decode, row, bound);
    return failures;
}

unsigned engine_ways_gpu(const char *dir, const char *tune_dir, const struct backend_parts *parts, double off)
{
    struct engine_config cfg = {.model_dir = dir,
                                .random_weights = 1,
                                .max_slots = DECODES + 1,
                                .max_step_tokens = STEP,
                                .max_context = 16384,
                                .kv_bytes = 3ull << 30,
                                .tune_dir = tune_dir, /* the same products in all three */
                                .tune_ms = 20000,
                                .parts = parts};
    static struct seen want[N_STEPS], got;
    const uint32_t ranks = comm_size(gpu_comm());
    unsigned failures = 0;
    struct gpu_run r;
    for (uint32_t kind = 0; kind < 3; kind++) { /* serial; by graphs; launched one by one */
        cfg.attention = kind ? ATTN_GPU_AUTO : ATTN_GPU_SERIAL;
        cfg.eager = kind == 2;
        gpu_create(&r, &cfg);
        const uint32_t head_dim = r.e->model.head_dim, n = sm90_fills(head_dim) ? N_STEPS : 1;
        const struct step *steps = sm90_fills(head_dim) ? steps_of[ranks - 1] : &narrow;
        for (uint32_t i = 0; i < n; i++) {
            run_step(kind ? &got : &want[i], &r, &steps[i]);
            if (kind == 0)
                continue;
            const enum attn_gpu_way way = way_of(&steps[i], ranks, head_dim);
            failures += !gpu_expect(way == steps[i].way, "the rule takes another way", steps[i].name, i, way);
            failures += compare(&steps[i], &want[i], &got, kind, off);
        }
        gpu_destroy(&r);
    }
    return failures;
}
