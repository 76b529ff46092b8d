/* rope.h - angles of the rotary position embedding, with the scalings that stretch a model's context. Prefix rope_.
 *
 * Pair i of a head of D floats turns by position * f_i, where the plain f_i is theta^(-2i/D). The scalings, with F the
 * factor, C the context that the model was first trained with and w_i = 2 pi / f_i the wave length:
 *
 *   linear   f_i / F
 *   llama3   f_i for w_i < C / high_freq_factor, f_i / F for w_i > C / low_freq_factor, in between a mean of both whose
 *            weight goes linearly with C / w_i
 *   yarn     f_i / F and f_i mixed by a ramp over i: below the pair that turns beta_fast times in C tokens all of f_i,
 *            above the one that turns beta_slow times none of it (arXiv 2309.00071); cosine and sine are multiplied by
 *            the attention factor
 */
#ifndef TANDEM_ROPE_H
#define TANDEM_ROPE_H

#include <stdbool.h>
#include <stdint.h>

enum rope_scaling { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN };

#define ROPE_MAX_DIM 256

struct rope {
    double theta;
    enum rope_scaling scaling;
    double factor;           /* F, all but plain */
    double original_context; /* C, llama3 and yarn */
    double low_freq_factor, high_freq_factor;
    double beta_fast, beta_slow;
    bool whole_pairs;        /* the ramp's ends are rounded outwards to whole pairs, as usual */
    double attention_factor; /* 1 for all but yarn */
    bool divided; /* every frequency by a number of its own, on top of the scaling: so have GGUF files Llama 3's */
    float divisor[ROPE_MAX_DIM / 2];
};

/* What yarn multiplies cosine and sine with where the model does not say: 0.1 * scale * ln(F) + 1. */
double rope_yarn_mscale(double factor, double scale);

/* f_i of pairs 0 .. head_dim / 2 - 1. */
void rope_frequencies(double *out, const struct rope *rope, uint32_t head_dim);

/* Cosine and sine of positions 0 .. positions - 1, [positions][head_dim / 2] each, times the attention factor. */
void rope_table(float *cosine, float *sine, const struct rope *rope, uint32_t head_dim, uint32_t positions);

#endif
