#include "worker/sample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "worker/sample_internal.h"

/* ---- random numbers ---- */

void sample_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

double sample_uniform(uint64_t seed, uint64_t position)
{
    const uint32_t counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 0};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t x[4];
    sample_philox(x, counter, key);
    uint64_t bits = (uint64_t)x[0] << 32 | x[1];
    return (double)(bits >> 11) * 0x1p-53;
}

/* ---- greedy ---- */

#define LANES 16

struct sample_best sample_argmax(const float *logits, uint32_t n, uint32_t first_id)
{
    struct sample_best best = {-INFINITY, UINT32_MAX};
    if (n == 0)
        return best;
    /* Independent lanes, so that the compiler may use vectors; a NaN never wins a comparison and is counted apart. */
    float top[LANES];
    uint32_t nan[LANES] = {0};
    for (int j = 0; j < LANES; j++)
        top[j] = -INFINITY;
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            float x = logits[i + j];
            nan[j] |= x != x;
            top[j] = x > top[j] ? x : top[j];
        }
    for (; i < n; i++) {
        nan[0] |= logits[i] != logits[i];
        top[0] = logits[i] > top[0] ? logits[i] : top[0];
    }
    bool any_nan = false;
    for (int j = 0; j < LANES; j++) {
        any_nan |= nan[j] != 0;
        best.logit = top[j] > best.logit ? top[j] : best.logit;
    }
    if (any_nan) {
        for (i = 0; logits[i] == logits[i];)
            i++;
        best.logit = NAN;
    } else {
        for (i = 0; logits[i] != best.logit;)
            i++;
    }
    best.id = first_id + i;
    return best;
}

struct sample_best sample_merge(struct sample_best a, struct sample_best b)
{
    bool a_nan = isnan(a.logit), b_nan = isnan(b.logit);
    if (a_nan != b_nan)
        return a_nan ? a : b;
    if (a_nan || a.logit == b.logit)
        return a.id < b.id ? a : b;
    return a.logit > b.logit ? a : b;
}

enum status_code sample_best_token(uint32_t *token, struct sample_best best, uint32_t row, struct status *st)
{
    if (isnan(best.logit))
        return status_set(st, ST_INTERNAL, "row %u: the logit of token %u is NaN", row, best.id);
    if (isinf(best.logit))
        return status_set(st, ST_INTERNAL, "row %u: the best logit is %sinfinite", row, best.logit < 0 ? "minus " : "");
    *token = best.id;
    return ST_OK;
}

/* ---- the others ---- */

enum status_code sample_check(const struct sample_params *p, struct status *st)
{
    if (!(p->temperature >= 0.0f) || isinf(p->temperature))
        return status_set(st, ST_INVALID_ARGUMENT, "temperature: %g, expected a finite number of at least 0",
                          (double)p->temperature);
    if (p->temperature > 0.0f && !(p->top_p >= 0.0f && p->top_p <= 1.0f))
        return status_set(st, ST_INVALID_ARGUMENT, "top_p: %g, expected 0 to 1", (double)p->top_p);
    if (p->temperature > 0.0f && !(p->min_p >= 0.0f && p->min_p <= 1.0f))
        return status_set(st, ST_INVALID_ARGUMENT, "min_p: %g, expected 0 to 1", (double)p->min_p);
    if (p->temperature > 0.0f && !(p->typical_p >= 0.0f && p->typical_p <= 1.0f))
        return status_set(st, ST_INVALID_ARGUMENT, "typical_p: %g, expected 0 to 1", (double)p->typical_p);
    return ST_OK;
}

struct sampler {
    uint32_t vocab;
    uint32_t n;      /* candidates, by id */
    uint32_t *id;    /* [vocab] */
    uint32_t *key;   /* [vocab] larger key: better */
    double *weight;  /* [vocab] unnormalised probability */
    double *measure; /* [1 << DIGIT_BITS] work of select */
};

#define DIGIT_BITS 11

enum status_code sampler_create(struct sampler **out, uint32_t vocab, struct status *st)
{
    struct sampler *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "sampler", sizeof *s);
    s->vocab = vocab;
    s->id = malloc(vocab * sizeof *s->id);
    s->key = malloc(vocab * sizeof *s->key);
    s->weight = calloc(vocab, sizeof *s->weight);
    s->measure = malloc(sizeof *s->measure << DIGIT_BITS);
    if (!s->id || !s->key || !s->weight || !s->measure) {
        sampler_destroy(s);
        return status_nomem(st, "work memory of the sampler", vocab * (2 * sizeof *s->id + sizeof *s->weight));
    }
    *out = s;
    return ST_OK;
}

void sampler_destroy(struct sampler *s)
{
    if (!s)
        return;
    free(s->id);
    free(s->key);
    free(s->weight);
    free(s->measure);
    free(s);
}

/* An unsigned number with the order of floats that are not NaN; -0 like 0. */
static uint32_t order_key(float x)
{
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

double sample_exp_negative(double x)
{
    if (!(x >= -700.0))
        return 0.0;
    double shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52; /* the integer n = round(x / ln 2) in the low bits */
    double n = shifted - 0x1.8p52;
    double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33; /* |r| <= ln 2 / 2 */
    double p = 1.0 / 6227020800.0;
    static const double inverse_factorial[] = {
        1.0 / 479001600.0,
        1.0 / 39916800.0,
        1.0 / 3628800.0,
        1.0 / 362880.0,
        1.0 / 40320.0,
        1.0 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    };
    for (size_t i = 0; i < sizeof inverse_factorial / sizeof *inverse_factorial; i++)
        p = p * r + inverse_factorial[i];
    uint64_t bits, scale;
    memcpy(&bits, &shifted, sizeof bits);
    scale = (bits << 52) + (1023ull << 52); /* 2^n */
    double power;
    memcpy(&power, &scale, sizeof power);
    return p * power;
}

/* Keeps the shortest run of candidates, best first (larger key, then lower id), whose measure reaches target; at least
 * one. Measure: weight, or 1 each. Three passes of a radix select, most significant digit first: linear, whatever the
 * logits are. The candidates stay in the order of ids. */
static void keep_best(struct sampler *s, const double *weight, double target)
{
    static const struct {
        unsigned shift, bits;
    } digit[] = {{21, 11}, {10, 11}, {0, 10}};
    uint32_t prefix = 0, prefix_mask = 0;
    double above = 0.0; /* measure of the keys over the digits chosen so far */
    for (size_t d = 0; d < sizeof digit / sizeof *digit; d++) {
        uint32_t values = 1u << digit[d].bits;
        /* an empty digit is told from one of weight 0: a best candidate always weighs 1, others may have underflowed */
        for (uint32_t v = 0; v < values; v++)
            s->measure[v] = -1.0;
        for (uint32_t i = 0; i < s->n; i++) {
            if ((s->key[i] & prefix_mask) != prefix)
                continue;
            double *m = &s->measure[s->key[i] >> digit[d].shift & (values - 1)];
            *m = (*m < 0.0 ? 0.0 : *m) + (weight ? weight[i] : 1.0);
        }
        uint32_t chosen = 0;
        double chosen_above = above;
        for (uint32_t v = values; v-- > 0;) {
            if (s->measure[v] < 0.0)
                continue;
            chosen = v;
            chosen_above = above;
            if (above + s->measure[v] >= target)
                break;
            above += s->measure[v];
        }
        above = chosen_above; /* rounding may leave the target unreached: then the last one there is */
        prefix |= chosen << digit[d].shift;
        prefix_mask |= (values - 1) << digit[d].shift;
    }

    uint32_t kept = 0;
    bool reached = false;
    for (uint32_t i = 0; i < s->n; i++) {
        if (s->key[i] < prefix || (s->key[i] == prefix && reached))
            continue;
        if (s->key[i] == prefix) {
            above += weight ? weight[i] : 1.0;
            reached = above >= target;
        }
        s->key[kept] = s->key[i];
        s->id[kept] = s->id[i];
        s->weight[kept] = s->weight[i];
        kept++;
    }
    s->n = kept;
}

static double total_weight(const struct sampler *s)
{
    double sum = 0.0;
    for (uint32_t i = 0; i < s->n; i++)
        sum += s->weight[i];
    return sum;
}

/* min_p: the best weighs 1 or is not far below it, so a weight is what min_p is compared with. */
static void keep_heavy(struct sampler *s, double least)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < s->n; i++) {
        if (s->weight[i] < least)
            continue;
        s->key[kept] = s->key[i];
        s->id[kept] = s->id[i];
        s->weight[kept] = s->weight[i];
        kept++;
    }
    s->n = kept;
}

/* y of a candidate: see the header. */
static double scaled(const float *logits, uint32_t id, float best, float temperature)
{
    return ((double)logits[id] - (double)best) / (double)temperature;
}

static void keep_typical(struct sampler *s, const float *logits, float best, const struct sample_params *p)
{
    double total = total_weight(s), sum = 0.0;
    for (uint32_t i = 0; i < s->n; i++)
        if (s->weight[i] > 0.0) /* y may be -infinity where it is not */
            sum += s->weight[i] * scaled(logits, s->id[i], best, p->temperature);
    for (uint32_t i = 0; i < s->n; i++)
        s->key[i] = ~order_key((float)fabs(sum / total - scaled(logits, s->id[i], best, p->temperature)));
    keep_best(s, s->weight, (double)p->typical_p * total);
}

enum status_code sampler_draw(struct sampler *s, uint32_t *token, const float *logits, const struct sample_params *p,
                              uint64_t position, uint32_t row, struct status *st)
{
    struct sample_best best = sample_argmax(logits, s->vocab, 0);
    uint32_t first = best.id;
    enum status_code rc = sample_best_token(&first, best, row, st);
    if (rc != ST_OK)
        return rc;
    *token = first;
    if (sample_is_greedy(p))
        return ST_OK;
    s->n = s->vocab;
    for (uint32_t i = 0; i < s->n; i++) {
        s->id[i] = i;
        s->key[i] = order_key(logits[i]);
    }
    if (p->top_k && p->top_k < s->n)
        keep_best(s, NULL, (double)p->top_k);
    for (uint32_t i = 0; i < s->n; i++)
        s->weight[i] = sample_exp_negative(scaled(logits, s->id[i], best.logit, p->temperature));
    if (p->min_p > 0.0f)
        keep_heavy(s, (double)p->min_p);
    if (p->top_p > 0.0f && p->top_p < 1.0f)
        keep_best(s, s->weight, (double)p->top_p * total_weight(s));
    if (p->typical_p > 0.0f && p->typical_p < 1.0f)
        keep_typical(s, logits, best.logit, p);

    double target = sample_uniform(p->seed, position) * total_weight(s), sum = 0.0;
    *token = s->id[s->n - 1];
    for (uint32_t i = 0; i < s->n; i++) {
        sum += s->weight[i];
        if (sum > target) {
            *token = s->id[i];
            break;
        }
    }
    return ST_OK;
}
