/* backend_cuda.c - the CUDA back end, built as backend_cuda.so where the toolkit is. This version finds and describes the
 * devices; the kernels do not stand behind it yet, and open says so. */
#include <cuda_runtime_api.h>
#include <stdio.h>

#include "worker/backend.h"

static enum status_code cuda_status(struct status *st, enum status_code code, cudaError_t err, const char *what)
{
    return status_set(st, code, "%s: %s (%s)", what, cudaGetErrorString(err), cudaGetErrorName(err));
}

static enum status_code cuda_devices(uint32_t *count, struct status *st)
{
    int n = 0;
    cudaError_t err = cudaGetDeviceCount(&n);
    if (err == cudaErrorNoDevice)
        n = 0;
    else if (err != cudaSuccess)
        return cuda_status(st, ST_FAILED_PRECONDITION, err, "cudaGetDeviceCount");
    *count = n > 0 ? (uint32_t)n : 0;
    return ST_OK;
}

static enum status_code cuda_describe(uint32_t device, struct backend_device *out, struct status *st)
{
    uint32_t count = 0;
    enum status_code rc = cuda_devices(&count, st);
    if (rc != ST_OK)
        return rc;
    if (device >= count)
        return status_set(st, ST_OUT_OF_RANGE, "CUDA device %u: there are %u", device, count);
    struct cudaDeviceProp p;
    cudaError_t err = cudaGetDeviceProperties(&p, (int)device);
    if (err != cudaSuccess)
        return cuda_status(st, ST_INTERNAL, err, "cudaGetDeviceProperties");
    *out = (struct backend_device){
        .memory_bytes = p.totalGlobalMem,
        .major = (uint32_t)p.major,
        .minor = (uint32_t)p.minor,
        .processors = (uint32_t)p.multiProcessorCount,
    };
    snprintf(out->name, sizeof out->name, "%.*s", (int)sizeof out->name - 1, p.name);
    return ST_OK;
}

static enum status_code cuda_open(struct backend_session **out, uint32_t device, struct status *st)
{
    (void)out;
    return status_set(st, ST_UNIMPLEMENTED, "serving on CUDA device %u is not implemented in this version", device);
}

static void cuda_close(struct backend_session *session)
{
    (void)session; /* open never made one */
}

static const struct backend_parts *cuda_parts(struct backend_session *session)
{
    (void)session;
    return NULL;
}

static const struct backend_api api = {
    .abi = BACKEND_ABI,
    .name = "cuda",
    .devices = cuda_devices,
    .describe = cuda_describe,
    .open = cuda_open,
    .parts = cuda_parts,
    .close = cuda_close,
};

__attribute__((visibility("default"))) backend_entry tandem_backend;

const struct backend_api *tandem_backend(uint32_t abi)
{
    return abi == BACKEND_ABI ? &api : NULL;
}
