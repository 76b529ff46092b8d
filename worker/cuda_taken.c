/* cuda_taken.c - see cuda_taken.h. */
#include "worker/cuda_taken.h"

#ifdef TANDEM_WATCH_TAKEN
#include <stdio.h>
#include <stdlib.h>

#include <cuda_runtime_api.h>

static _Thread_local const char *forbidden;

void cuda_taken_forbid(const char *where)
{
    forbidden = where;
}

static void look(const char *call)
{
    if (!forbidden)
        return;
    fprintf(stderr, "tandem: %s: %s takes memory, though all was taken before the rank was ready\n", forbidden, call);
    abort();
}

#define WATCHED(name, parameters, arguments)                                                                           \
    cudaError_t __real_##name parameters;                                                                              \
    cudaError_t __wrap_##name parameters;                                                                              \
    cudaError_t __wrap_##name parameters                                                                               \
    {                                                                                                                  \
        look(#name);                                                                                                   \
        return __real_##name arguments;                                                                                \
    }

WATCHED(cudaMalloc, (void **p, size_t n), (p, n))
WATCHED(cudaMallocAsync, (void **p, size_t n, cudaStream_t s), (p, n, s))
WATCHED(cudaMallocFromPoolAsync, (void **p, size_t n, cudaMemPool_t m, cudaStream_t s), (p, n, m, s))
WATCHED(cudaMallocManaged, (void **p, size_t n, unsigned flags), (p, n, flags))
WATCHED(cudaMallocPitch, (void **p, size_t *pitch, size_t width, size_t height), (p, pitch, width, height))
WATCHED(cudaMallocHost, (void **p, size_t n), (p, n))
WATCHED(cudaHostAlloc, (void **p, size_t n, unsigned flags), (p, n, flags))
WATCHED(cudaHostRegister, (void *p, size_t n, unsigned flags), (p, n, flags))
WATCHED(cudaIpcOpenMemHandle, (void **p, cudaIpcMemHandle_t h, unsigned flags), (p, h, flags))
WATCHED(cudaGraphInstantiate, (cudaGraphExec_t * out, cudaGraph_t g, unsigned long long flags), (out, g, flags))
WATCHED(cudaGraphInstantiateWithFlags, (cudaGraphExec_t * out, cudaGraph_t g, unsigned long long flags),
        (out, g, flags))
WATCHED(cudaStreamCreateWithFlags, (cudaStream_t * s, unsigned flags), (s, flags))
WATCHED(cudaStreamCreateWithPriority, (cudaStream_t * s, unsigned flags, int priority), (s, flags, priority))
WATCHED(cudaEventCreate, (cudaEvent_t * e), (e))
WATCHED(cudaEventCreateWithFlags, (cudaEvent_t * e, unsigned flags), (e, flags))
#else
void cuda_taken_forbid(const char *where)
{
    (void)where;
}
#endif
