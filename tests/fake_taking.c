/* fake_taking.c - the calls of the CUDA runtime that check_taken.c makes: in a file of their own, so that the linker hands them on. */
#include <cuda_runtime_api.h>

extern int fake_taking_calls;
int fake_taking_calls;

#define FAKE(name, parameters)                                                                                         \
    cudaError_t CUDARTAPI name parameters                                                                              \
    {                                                                                                                  \
        fake_taking_calls++;                                                                                           \
        return n == 77 ? cudaErrorMemoryAllocation : cudaSuccess;                                                      \
    }
#define UNUSED __attribute__((unused))

FAKE(cudaMalloc, (void **p UNUSED, size_t n))
FAKE(cudaMallocAsync, (void **p UNUSED, size_t n, cudaStream_t s UNUSED))
FAKE(cudaMallocFromPoolAsync, (void **p UNUSED, size_t n, cudaMemPool_t m UNUSED, cudaStream_t s UNUSED))
FAKE(cudaMallocManaged, (void **p UNUSED, size_t n, unsigned flags UNUSED))
FAKE(cudaMallocPitch, (void **p UNUSED, size_t *pitch UNUSED, size_t width UNUSED, size_t n))
FAKE(cudaMallocHost, (void **p UNUSED, size_t n))
FAKE(cudaHostAlloc, (void **p UNUSED, size_t n, unsigned flags UNUSED))
FAKE(cudaHostRegister, (void *p UNUSED, size_t n, unsigned flags UNUSED))
FAKE(cudaIpcOpenMemHandle, (void **p UNUSED, cudaIpcMemHandle_t h UNUSED, unsigned n))
FAKE(cudaGraphInstantiate, (cudaGraphExec_t * out UNUSED, cudaGraph_t g UNUSED, unsigned long long n))
FAKE(cudaGraphInstantiateWithFlags, (cudaGraphExec_t * out UNUSED, cudaGraph_t g UNUSED, unsigned long long n))
FAKE(cudaStreamCreateWithFlags, (cudaStream_t * s UNUSED, unsigned n))
FAKE(cudaStreamCreateWithPriority, (cudaStream_t * s UNUSED, unsigned flags UNUSED, int n))
FAKE(cudaEventCreateWithFlags, (cudaEvent_t * e UNUSED, unsigned n))

cudaError_t CUDARTAPI cudaEventCreate(cudaEvent_t *e)
{
    fake_taking_calls++;
    return e ? cudaSuccess : cudaErrorMemoryAllocation;
}
