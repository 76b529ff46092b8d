/* engine_options_gpu.h - part of check_engine_gpu: sampling options on a device against the host's. */
#ifndef TANDEM_TESTS_ENGINE_OPTIONS_GPU_H
#define TANDEM_TESTS_ENGINE_OPTIONS_GPU_H

#include <stdbool.h>

#include "tests/gpu/gpu_parts.h"

/* Returns how many checks failed, each with a line on stdout. The engine has 13 slots or more, memory for suspended ones, and no
 * slot in use; invariant: it is batch-invariant, so slots side by side are compared with each alone. */
unsigned engine_options_gpu(const char *name, struct gpu_run *r, const char *what, bool invariant);

#endif
