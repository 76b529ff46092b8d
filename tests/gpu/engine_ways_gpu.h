/* engine_ways_gpu.h - part of check_engine_gpu: hybrid steps of an engine by each of attention's ways. */
#ifndef TANDEM_TESTS_ENGINE_WAYS_GPU_H
#define TANDEM_TESTS_ENGINE_WAYS_GPU_H

#include "worker/engine.h"

#define ENGINE_WAYS_RANKS 2 /* at most; more have too few heads for some way */

/* Two layers of 32/8 heads in `dir`, of 128 for two of attention's ways or of 80 for the third, on Hoppers of 132 SMs: hybrid steps that the rule
 * takes these ways for have, by graphs and launched one by one, the log probabilities of an engine whose attention is serial, of every decode
 * and every row of the chunk, as near as logits may be off by `off` of their norm. Returns how many checks failed, each with a line on stdout. */
unsigned engine_ways_gpu(const char *dir, const char *tune_dir, const struct backend_parts *parts, double off);

#endif
