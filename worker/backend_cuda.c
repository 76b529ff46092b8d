/* backend_cuda.c - the CUDA back end, built as backend_cuda.so where the toolkit is: finds and describes the devices, and
 * makes a session of one, with memory for the weights. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/backend.h"
#include "worker/cuda_activity.h"
#include "worker/cuda_internal.h"

#define MIN_MAJOR 8 /* bf16 in the tensor cores */

_Static_assert(sizeof(cudaUUID_t) == COMM_DEVICE_BYTES, "the id of a device");

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
    memcpy(out->id, &p.uuid, sizeof out->id);
    return ST_OK;
}

/* ---- a session ---- */

struct backend_session {
    struct backend_parts parts;
    cudaStream_t stream; /* of what is loaded */
    struct {
        void *host; /* pinned */
        cudaEvent_t stored;
    } stage[WEIGHT_LANES];
};

static enum status_code weights_alloc(void *ctx, void **arena, uint64_t bytes, struct status *st)
{
    struct backend_session *s = ctx;
    void *memory;
    enum status_code rc = cuda_check(cudaMalloc(&memory, bytes), st, "memory for weights");
    if (rc != ST_OK)
        return status_prefix(st, "%llu bytes on %s", (unsigned long long)bytes, s->parts.text);
    for (uint32_t i = 0; rc == ST_OK && i < WEIGHT_LANES && !s->stage[i].stored; i++)
        rc = cuda_check(cudaEventCreateWithFlags(&s->stage[i].stored, cudaEventDisableTiming), st, "event");
    if (rc != ST_OK) {
        cudaFree(memory);
        return rc;
    }
    *arena = memory;
    return ST_OK;
}

static void weights_release(void *ctx, void *arena)
{
    (void)ctx;
    cudaFree(arena);
}

/* Its memory is taken when the lane is first used: random weights need none. */
static enum status_code weights_stage(void *ctx, uint32_t lane, void **host, uint64_t bytes, struct status *st)
{
    struct backend_session *s = ctx;
    enum status_code rc = ST_OK;
    if (bytes > WEIGHT_STAGE_BYTES)
        return status_set(st, ST_UNIMPLEMENTED, "a row of weights of %llu bytes, expected at most %u",
                          (unsigned long long)bytes, WEIGHT_STAGE_BYTES);
    if ((rc = cuda_check(cudaSetDevice(s->parts.device), st, "cudaSetDevice")) != ST_OK) /* a thread has its own */
        return rc;
    if (!s->stage[lane].host)
        rc = cuda_check(cudaMallocHost(&s->stage[lane].host, WEIGHT_STAGE_BYTES), st, "pinned memory");
    *host = s->stage[lane].host;
    return rc == ST_OK ? cuda_check(cudaEventSynchronize(s->stage[lane].stored), st, "weights") : rc;
}

static enum status_code weights_store(void *ctx, uint32_t lane, void *to, uint64_t bytes, struct status *st)
{
    struct backend_session *s = ctx;
    enum status_code rc =
        cuda_check(cudaMemcpyAsync(to, s->stage[lane].host, bytes, cudaMemcpyHostToDevice, s->stream), st, "weights");
    return rc == ST_OK ? cuda_check(cudaEventRecord(s->stage[lane].stored, s->stream), st, "weights") : rc;
}

static enum status_code weights_random(void *ctx, void *to, uint64_t seed, uint64_t first, uint64_t n, float scale,
                                       struct status *st)
{
    struct backend_session *s = ctx;
    return cuda_check(cuda_random(s->stream, to, seed, first, n, scale), st, "random weights");
}

static enum status_code weights_finish(void *ctx, struct status *st)
{
    struct backend_session *s = ctx;
    return cuda_check(cudaStreamSynchronize(s->stream), st, "weights");
}

static enum status_code cuda_memory(void *ctx, struct backend_memory *out, struct status *st)
{
    (void)ctx;
    size_t left, total;
    enum status_code rc = cuda_check(cudaMemGetInfo(&left, &total), st, "cudaMemGetInfo");
    if (rc == ST_OK)
        *out = (struct backend_memory){.total_bytes = total, .free_bytes = left};
    return rc;
}

static void cuda_close(struct backend_session *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; i < WEIGHT_LANES; i++) {
        if (s->stage[i].stored)
            cudaEventDestroy(s->stage[i].stored);
        cudaFreeHost(s->stage[i].host);
    }
    if (s->stream)
        cudaStreamDestroy(s->stream);
    free(s);
}

static enum status_code cuda_open(struct backend_session **out, uint32_t device, struct status *st)
{
    struct backend_device d = {.major = 0};
    enum status_code rc = cuda_describe(device, &d, st);
    if (rc != ST_OK)
        return rc;
    if (d.major < MIN_MAJOR)
        return status_set(st, ST_UNIMPLEMENTED, "compute capability %u.%u, expected %u.0 or newer", d.major, d.minor,
                          MIN_MAJOR);
    struct backend_session *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "session", sizeof *s);
    s->parts = (struct backend_parts){
        .device = (int)device,
        .kv = &kv_ops_cuda,
        .kv_elem_bytes = 2,
        .weights = {s, weights_alloc, weights_release, weights_stage, weights_store, weights_random, weights_finish},
        .forward = &forward_ops_cuda,
        .ctx = s,
        .memory = cuda_memory,
    };
    snprintf(s->parts.text, sizeof s->parts.text, "cuda:%u %.50s", device, d.name);
    if ((rc = cuda_check(cudaSetDevice((int)device), st, "cudaSetDevice")) != ST_OK ||
        (rc = cuda_check(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking), st, "stream")) != ST_OK) {
        cuda_close(s);
        return rc;
    }
    *out = s;
    return ST_OK;
}

static const struct backend_parts *cuda_parts(struct backend_session *session)
{
    return &session->parts;
}

static const struct backend_api api = {
    .abi = BACKEND_ABI,
    .name = "cuda",
    .devices = cuda_devices,
    .describe = cuda_describe,
    .open = cuda_open,
    .parts = cuda_parts,
    .close = cuda_close,
    .activity = &cuda_activity,
};

__attribute__((visibility("default"))) backend_entry tandem_backend;

const struct backend_api *tandem_backend(uint32_t abi)
{
    return abi == BACKEND_ABI ? &api : NULL;
}
