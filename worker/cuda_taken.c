/* cuda_taken.c - counts what takes memory (cuda_taken.h). The counter is the process's, as the memory is. */
#include "worker/cuda_taken.h"

#ifdef TANDEM_COUNT_TAKEN
#include <stdatomic.h>

#include <cuda_runtime_api.h>

static atomic_uint_fast64_t taken;

#define COUNTED(name, parameters, arguments)                                                                           \
    cudaError_t __real_##name parameters;                                                                              \
    cudaError_t __wrap_##name parameters;                                                                              \
    cudaError_t __wrap_##name parameters                                                                               \
    {                                                                                                                  \
        atomic_fetch_add(&taken, 1);                                                                                   \
        return __real_##name arguments;                                                                                \
    }

COUNTED(cudaMalloc, (void **p, size_t bytes), (p, bytes))
COUNTED(cudaMallocAsync, (void **p, size_t bytes, cudaStream_t stream), (p, bytes, stream))
COUNTED(cudaMallocHost, (void **p, size_t bytes), (p, bytes))
COUNTED(cudaHostAlloc, (void **p, size_t bytes, unsigned flags), (p, bytes, flags))
COUNTED(cudaGraphInstantiate, (cudaGraphExec_t * out, cudaGraph_t graph, unsigned long long flags), (out, graph, flags))

uint64_t cuda_taken(void)
{
    return atomic_load(&taken);
}
#else
uint64_t cuda_taken(void)
{
    return 0;
}
#endif
