#include "worker/rope.h"

#include <math.h>

#define TWO_PI 6.28318530717958647692

double rope_yarn_mscale(double factor, double scale)
{
    return factor > 1.0 ? 0.1 * scale * log(factor) + 1.0 : 1.0;
}

static double llama3_frequency(const struct rope *r, double f)
{
    double turns = r->original_context * f / TWO_PI; /* in the original context: C / w */
    if (turns > r->high_freq_factor)
        return f;
    if (turns < r->low_freq_factor)
        return f / r->factor;
    double kept = (turns - r->low_freq_factor) / (r->high_freq_factor - r->low_freq_factor);
    return (1.0 - kept) * f / r->factor + kept * f;
}

/* The pair, a fraction of one as well, that turns so many times in the original context. */
static double pair_of_turns(const struct rope *r, double turns, uint32_t head_dim)
{
    return head_dim * log(r->original_context / (turns * TWO_PI)) / (2.0 * log(r->theta));
}

static void yarn_frequencies(double *f, const struct rope *r, uint32_t head_dim)
{
    double low = pair_of_turns(r, r->beta_fast, head_dim), high = pair_of_turns(r, r->beta_slow, head_dim);
    if (r->whole_pairs) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0.0);
    high = fmin(high, head_dim - 1.0);
    double width = high == low ? 0.001 : high - low;
    for (uint32_t i = 0; i < head_dim / 2; i++) {
        double ramp = fmin(fmax((i - low) / width, 0.0), 1.0);
        f[i] = f[i] / r->factor * ramp + f[i] * (1.0 - ramp);
    }
}

void rope_frequencies(double *out, const struct rope *rope, uint32_t head_dim)
{
    uint32_t half = head_dim / 2;
    for (uint32_t i = 0; i < half; i++) {
        double f = pow(rope->theta, -(double)i / half);
        if (rope->scaling == ROPE_LINEAR)
            f /= rope->factor;
        else if (rope->scaling == ROPE_LLAMA3)
            f = llama3_frequency(rope, f);
        out[i] = f;
    }
    if (rope->scaling == ROPE_YARN)
        yarn_frequencies(out, rope, head_dim);
    for (uint32_t i = 0; rope->divided && i < half; i++)
        out[i] /= (double)rope->divisor[i];
}

/* Angles in double: position times frequency has no digits to lose at a long context. */
void rope_table(float *cosine, float *sine, const struct rope *rope, uint32_t head_dim, uint32_t positions)
{
    double f[ROPE_MAX_DIM / 2], factor = rope->attention_factor;
    uint32_t half = head_dim / 2;
    rope_frequencies(f, rope, head_dim);
    for (uint32_t i = 0; i < half; i++) {
        for (uint32_t p = 0; p < positions; p++) {
            cosine[(uint64_t)p * half + i] = (float)(cos(p * f[i]) * factor);
            sine[(uint64_t)p * half + i] = (float)(sin(p * f[i]) * factor);
        }
    }
}
