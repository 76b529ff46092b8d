/* sample_score.c - log probabilities of a row of raw logits. */
#include <math.h>
#include <string.h>

#include "worker/sample.h"
#include "worker/sample_internal.h"

/* ln x for a normal number of at least 1. As sample_exp_negative, without the C library: x = 2^e m with m in
 * [sqrt(1/2), sqrt(2)), and ln m = 2 atanh((m - 1) / (m + 1)), whose argument is at most 0.172. */
static double log_positive(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int e = (int)(bits >> 52) - 1023;
    bits = (bits & 0xFFFFFFFFFFFFFull) | 1023ull << 52;
    double m;
    memcpy(&m, &bits, sizeof m);
    if (m > 0x1.6a09e667f3bcdp+0) {
        m *= 0.5;
        e++;
    }
    double s = (m - 1.0) / (m + 1.0), s2 = s * s, sum = 0.0;
    for (int k = 25; k >= 3; k -= 2)
        sum = sum * s2 + 1.0 / k;
    double ln_m = 2.0 * (s + s * s2 * sum);
    return e * 0x1.62e42fee00000p-1 + (e * 0x1.a39ef35793c76p-33 + ln_m);
}

/* Keeps the n best in order; few enough that insertion is the fastest. */
static void collect_top(struct sample_scores *out, const float *logits, uint32_t vocab, uint32_t n)
{
    float *best = out->top_logprob;
    uint32_t have = 0;
    for (uint32_t i = 0; i < vocab; i++) {
        if (have == n && !(logits[i] > best[n - 1])) /* ids ascend: of equal ones the first stays */
            continue;
        uint32_t at = have < n ? have++ : n - 1;
        for (; at > 0 && logits[i] > best[at - 1]; at--) {
            best[at] = best[at - 1];
            out->top[at] = out->top[at - 1];
        }
        best[at] = logits[i];
        out->top[at] = i;
    }
    out->n = have;
}

enum status_code sample_score(struct sample_scores *out, const float *logits, uint32_t vocab, uint32_t token,
                              uint32_t n, uint32_t row, struct status *st)
{
    struct sample_best best = sample_argmax(logits, vocab, 0);
    uint32_t first;
    enum status_code rc = sample_best_token(&first, best, row, st);
    if (rc != ST_OK)
        return rc;
    double sum = 0.0;
    uint32_t rank = 1;
    for (uint32_t i = 0; i < vocab; i++) {
        sum += sample_exp_negative((double)logits[i] - (double)best.logit);
        rank += logits[i] > logits[token] || (logits[i] == logits[token] && i < token);
    }
    double off = log_positive(sum);
    out->token = token;
    out->rank = rank;
    out->logprob = (float)((double)logits[token] - (double)best.logit - off);
    out->n = 0;
    if (n)
        collect_top(out, logits, vocab, n);
    for (uint32_t i = 0; i < out->n; i++)
        out->top_logprob[i] = (float)((double)out->top_logprob[i] - (double)best.logit - off);
    return ST_OK;
}
