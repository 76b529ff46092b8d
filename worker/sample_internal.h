/* sample_internal.h - arithmetic that sample.c and sample_score.c share. */
#ifndef TANDEM_SAMPLE_INTERNAL_H
#define TANDEM_SAMPLE_INTERNAL_H

/* e^x for x <= 0; below -700: 0. Not exp() of the C library: its last bit depends on the CPU. */
double sample_exp_negative(double x);

#endif
