/* engine_batches_gpu.h - part of check_engine_gpu: sequences side by side. Every function returns how many checks failed, each with a
 * line on stdout, and begins and ends with no slot in use; engines have 10 slots or more. */
#ifndef TANDEM_TESTS_ENGINE_BATCHES_GPU_H
#define TANDEM_TESTS_ENGINE_BATCHES_GPU_H

#include <stdbool.h>

#include "tests/gpu/gpu_parts.h"

/* Texts part only where the host's choice was a close one; `close` is what logits were seen to differ by. */
unsigned engine_batches_gpu(const char *name, struct gpu_run *host, struct gpu_run *other, double close);
/* Two steps under way give the ids of one at a time: the same kernels, so to the bit. */
unsigned engine_ahead_gpu(const char *name, struct gpu_run *device, bool drawn);
/* Slots that went to host memory, while another wrote into their pages, go on to the bit. The engine has memory for them. */
unsigned engine_moves_gpu(const char *name, struct gpu_run *device);

#endif
