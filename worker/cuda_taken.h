/* cuda_taken.h - how often memory was taken through the CUDA runtime, in debug builds: there the linker hands this plugin's
 * calls of cudaMalloc and its like, and of cudaGraphInstantiate, to cuda_taken.c. Prefix cuda_taken. */
#ifndef TANDEM_CUDA_TAKEN_H
#define TANDEM_CUDA_TAKEN_H

#include <stdint.h>

/* So far, by any thread; 0 in builds that do not count. */
uint64_t cuda_taken(void);

#endif
