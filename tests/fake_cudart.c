/* fake_cudart.c - see fake_cudart.h. */
#include "tests/fake_cudart.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_gpu_internal.h"

struct fake_cudart fake_cudart;

static _Thread_local struct {
    uint32_t rank;
    void *memory; /* what it has a handle of */
} own;

void fake_cudart_rank(uint32_t rank)
{
    own.rank = rank;
}

/* ---- memory ---- */

cudaError_t CUDARTAPI cudaMalloc(void **p, size_t bytes)
{
    *p = malloc(bytes ? bytes : 1);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t CUDARTAPI cudaHostAlloc(void **p, size_t bytes, unsigned flags)
{
    (void)flags;
    return cudaMalloc(p, bytes);
}

cudaError_t CUDARTAPI cudaFree(void *p)
{
    free(p);
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFreeHost(void *p)
{
    free(p);
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemset(void *p, int byte, size_t n)
{
    memset(p, byte, n);
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemsetAsync(void *p, int byte, size_t n, cudaStream_t stream)
{
    (void)stream;
    return cudaMemset(p, byte, n);
}

cudaError_t CUDARTAPI cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind)
{
    (void)kind;
    memcpy(to, from, n);
    return cudaSuccess;
}

/* ---- memory of other ranks: the handle is the address ---- */

cudaError_t CUDARTAPI cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *p)
{
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &p, sizeof p);
    own.memory = p;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t handle, unsigned flags)
{
    (void)flags;
    if (fake_cudart.reach[own.rank] == FAKE_REFUSES)
        return cudaErrorInvalidValue;
    memcpy(p, &handle, sizeof *p);
    if (fake_cudart.reach[own.rank] == FAKE_CONFUSES)
        *p = own.memory;
    fake_cudart.mapped++;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaIpcCloseMemHandle(void *p)
{
    (void)p;
    fake_cudart.mapped--;
    return cudaSuccess;
}

/* ---- devices, streams, events ---- */

cudaError_t CUDARTAPI cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
    memset(p, 0, sizeof *p);
    memset(&p->uuid, device + 1, sizeof p->uuid);
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceSynchronize(void)
{
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGetLastError(void)
{
    return cudaSuccess;
}

const char *CUDARTAPI cudaGetErrorString(cudaError_t err)
{
    return err == cudaErrorInvalidValue ? "invalid argument" : "an error";
}

const char *CUDARTAPI cudaGetErrorName(cudaError_t err)
{
    return err == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaErrorOther";
}

cudaError_t CUDARTAPI cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    (void)flags;
    *stream = (cudaStream_t)(void *)&own;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamDestroy(cudaStream_t stream)
{
    (void)stream;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventCreate(cudaEvent_t *event)
{
    *event = (cudaEvent_t)(void *)&own;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventDestroy(cudaEvent_t event)
{
    (void)event;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    (void)event, (void)stream;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventQuery(cudaEvent_t event)
{
    (void)event;
    return atomic_load(&fake_cudart.pending) && !(fake_cudart.ends && atomic_load(fake_cudart.ends)) ? cudaErrorNotReady
                                                                                                     : cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    (void)from, (void)to;
    *ms = 1;
    return cudaSuccess;
}

/* ---- graphs ---- */

cudaError_t CUDARTAPI cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    (void)stream, (void)mode;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    (void)stream;
    *graph = (cudaGraph_t)(void *)&own;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
    (void)graph, (void)flags;
    *exec = (cudaGraphExec_t)(void *)&own;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    (void)exec, (void)stream;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    (void)exec;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphDestroy(cudaGraph_t graph)
{
    (void)graph;
    return cudaSuccess;
}

/* ---- the kernels of comm/ ---- */

cudaError_t comm_gpu_load_kernels(void)
{
    return cudaSuccess;
}

cudaError_t comm_gpu_launch_sum(cudaStream_t stream, const struct comm_gpu_sum_job *job)
{
    (void)stream;
    fake_cudart.launched += job->meet.ranks > 0;
    return cudaSuccess;
}

cudaError_t comm_gpu_launch_push(cudaStream_t stream, const struct comm_gpu_push_job *job)
{
    (void)stream, (void)job;
    fake_cudart.launched++;
    return cudaSuccess;
}

cudaError_t comm_gpu_launch_gather(cudaStream_t stream, const struct comm_gpu_gather_job *job)
{
    (void)stream;
    fake_cudart.launched += job->meet.ranks > 0;
    return cudaSuccess;
}
