/* memory_cuda.c - KV pages in the memory of a GPU, by the driver's virtual memory calls.
 *
 *   cuMemCreate, once per page         handle[0] handle[1] handle[2] ...       all of them in open
 *   cuMemAddressReserve, once          | range 0          | range 1          | ...
 *   map    cuMemMap per page, then one cuMemSetAccess over the new range (access is what costs, by the page)
 *   unmap  one cuMemUnmap over the range; the handles stay
 *
 * The driver checks less than one would like: unmapping what is not mapped is a success. So the pool must know what is
 * mapped where, and does.
 *
 * The driver's library is opened at run time; nothing links libcuda. Everything happens in the primary context of the
 * device, which the runtime API uses too. Clears and copies go through one stream of our own, which waits for no other
 * stream; sync waits on the host, so that what is launched afterwards, on any stream, sees them.
 */
#include <dlfcn.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include <cuda.h>

#include "memory/memory_internal.h"

/* The calls of the driver that are used. cuda.h defines some of these names to be others (_v2), for the types and for the
 * names looked up alike. */
#define CALLS(X)                                                                                                       \
    X(cuInit)                                                                                                          \
    X(cuGetErrorName)                                                                                                  \
    X(cuDeviceGetCount)                                                                                                \
    X(cuDeviceGet)                                                                                                     \
    X(cuDeviceGetAttribute)                                                                                            \
    X(cuDevicePrimaryCtxRetain)                                                                                        \
    X(cuDevicePrimaryCtxRelease)                                                                                       \
    X(cuCtxGetStreamPriorityRange)                                                                                     \
    X(cuCtxSetCurrent)                                                                                                 \
    X(cuMemGetInfo)                                                                                                    \
    X(cuMemGetAllocationGranularity)                                                                                   \
    X(cuMemAddressReserve)                                                                                             \
    X(cuMemAddressFree)                                                                                                \
    X(cuMemCreate)                                                                                                     \
    X(cuMemRelease)                                                                                                    \
    X(cuMemMap)                                                                                                        \
    X(cuMemUnmap)                                                                                                      \
    X(cuMemSetAccess)                                                                                                  \
    X(cuMemHostAlloc)                                                                                                  \
    X(cuMemFreeHost)                                                                                                   \
    X(cuStreamCreateWithPriority)                                                                                      \
    X(cuStreamDestroy)                                                                                                 \
    X(cuStreamSynchronize)                                                                                             \
    X(cuMemsetD8Async)                                                                                                 \
    X(cuMemcpyDtoDAsync)                                                                                               \
    X(cuMemcpyDtoHAsync)                                                                                               \
    X(cuMemcpyHtoDAsync)

#define NAME_OF(name) #name
#define FIELD(name)   __typeof__(name) *name;
#define LOOK_UP(name) {NAME_OF(name), offsetof(struct driver, name)},

/* clang-format off: the lists are macros */
struct driver {
    CALLS(FIELD)
};

static const struct entry_point {
    const char *name;
    size_t at;
} entry_points[] = {CALLS(LOOK_UP)};
/* clang-format on */
#define N_ENTRY_POINTS (sizeof entry_points / sizeof *entry_points)

struct kv_backend {
    struct kv_geometry geo;
    void *library;
    struct driver cu;
    CUdevice device;
    CUcontext context; /* NULL: not retained */
    CUstream stream;
    CUmemAllocationProp prop;
    CUmemAccessDesc access;
    CUmemGenericAllocationHandle *handle; /* [total_pages] */
    uint64_t n_handles;                   /* created by open so far */
    CUdeviceptr base;                     /* 0: not reserved */
    uint64_t reserved_bytes;
    CUdeviceptr *extras; /* one reservation for each range past the first `slots` */
    uint32_t n_extras;
    uint32_t cap_extras;
};

/* Memory that is short is the caller's to handle; anything else is a fault. */
static enum status_code failed(struct kv_backend *be, CUresult rc, struct status *st, const char *what)
{
    const char *name = NULL;
    if (!be->cu.cuGetErrorName || be->cu.cuGetErrorName(rc, &name) != CUDA_SUCCESS || !name)
        name = "unknown error";
    enum status_code code = ST_INTERNAL;
    if (rc == CUDA_ERROR_OUT_OF_MEMORY)
        code = ST_RESOURCE_EXHAUSTED;
    else if (rc == CUDA_ERROR_NO_DEVICE || rc == CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)
        code = ST_UNAVAILABLE;
    return status_set(st, code, "%s: %s (%d)", what, name, (int)rc);
}

/* --- open, close --- */

static enum status_code load_driver(struct kv_backend *be, struct status *st)
{
    const char *path = be->geo.driver ? be->geo.driver : "libcuda.so.1";
    be->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!be->library)
        return status_set(st, ST_UNAVAILABLE, "the CUDA driver: %s", dlerror());
    for (size_t i = 0; i < N_ENTRY_POINTS; i++) {
        void *at = dlsym(be->library, entry_points[i].name);
        if (!at)
            return status_set(st, ST_UNAVAILABLE, "the CUDA driver %s has no %s: too old", path, entry_points[i].name);
        memcpy((char *)&be->cu + entry_points[i].at, &at, sizeof at);
    }
    CUresult rc = be->cu.cuInit(0);
    return rc == CUDA_SUCCESS ? ST_OK : failed(be, rc, st, "cuInit");
}

static enum status_code open_device(struct kv_backend *be, struct status *st)
{
    int count = 0, able = 0;
    CUresult rc = be->cu.cuDeviceGetCount(&count);
    if (rc != CUDA_SUCCESS)
        return failed(be, rc, st, "cuDeviceGetCount");
    if (be->geo.device < 0 || be->geo.device >= count)
        return status_set(st, ST_INVALID_ARGUMENT, "device: %d, the driver has %d", be->geo.device, count);
    rc = be->cu.cuDeviceGet(&be->device, be->geo.device);
    if (rc == CUDA_SUCCESS)
        rc = be->cu.cuDeviceGetAttribute(&able, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, be->device);
    if (rc != CUDA_SUCCESS)
        return failed(be, rc, st, "cuDeviceGet");
    if (!able)
        return status_set(st, ST_UNAVAILABLE, "device %d has no virtual memory management", be->geo.device);
    CUcontext context;
    rc = be->cu.cuDevicePrimaryCtxRetain(&context, be->device);
    if (rc != CUDA_SUCCESS)
        return failed(be, rc, st, "cuDevicePrimaryCtxRetain");
    be->context = context;
    rc = be->cu.cuCtxSetCurrent(context);
    int least = 0, greatest = 0; /* a step that fills the GPU lets those of higher priority in as its blocks end */
    if (rc == CUDA_SUCCESS)
        rc = be->cu.cuCtxGetStreamPriorityRange(&least, &greatest);
    if (rc == CUDA_SUCCESS)
        rc = be->cu.cuStreamCreateWithPriority(&be->stream, CU_STREAM_NON_BLOCKING, greatest);
    if (rc != CUDA_SUCCESS)
        return failed(be, rc, st, "a CUDA stream for the KV pool");
    be->prop = (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                     .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = be->device}};
    be->access = (CUmemAccessDesc){.location = be->prop.location, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    return ST_OK;
}

static enum status_code check_sizes(struct kv_backend *be, struct status *st)
{
    const struct kv_geometry *geo = &be->geo;
    size_t grain = 0, left = 0, total = 0;
    CUresult rc = be->cu.cuMemGetAllocationGranularity(&grain, &be->prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    if (rc != CUDA_SUCCESS)
        return failed(be, rc, st, "cuMemGetAllocationGranularity");
    if (grain == 0 || geo->page_bytes % grain)
        return status_set(st, ST_INVALID_ARGUMENT, "page_bytes: %" PRIu64 ", expected a multiple of %zu",
                          geo->page_bytes, grain);
    rc = be->cu.cuMemGetInfo(&left, &total);
    if (rc != CUDA_SUCCESS)
        return failed(be, rc, st, "cuMemGetInfo");
    uint64_t bytes = geo->total_pages * geo->page_bytes; /* the pool has checked the product */
    if (bytes <= left)
        return ST_OK;
    return status_set(st, ST_RESOURCE_EXHAUSTED,
                      "total_pages: %" PRIu64 " pages of %" PRIu64 " KiB = %" PRIu64
                      " MiB, but of the GPU's %zu MiB only %zu are free",
                      geo->total_pages, geo->page_bytes >> 10, bytes >> 20, total >> 20, left >> 20);
}

static enum status_code reserve_ranges(struct kv_backend *be, struct status *st)
{
    const struct kv_geometry *geo = &be->geo;
    if (__builtin_mul_overflow(geo->range_bytes, geo->slots, &be->reserved_bytes))
        return status_set(st, ST_INVALID_ARGUMENT, "slots: %u ranges of %" PRIu64 " bytes do not fit 64 bits",
                          geo->slots, geo->range_bytes);
    CUdeviceptr base;
    CUresult rc = be->cu.cuMemAddressReserve(&base, be->reserved_bytes, geo->page_bytes, 0, 0);
    if (rc == CUDA_SUCCESS) {
        be->base = base;
        return ST_OK;
    }
    enum status_code code = failed(be, rc, st, "cuMemAddressReserve");
    (void)status_prefix(st, "slots: addresses for %u ranges of %" PRIu64 " MiB = %" PRIu64 " GiB", geo->slots,
                        geo->range_bytes >> 20, be->reserved_bytes >> 30);
    return code;
}

/* One thread: the driver takes creations one by one, and four threads were slower. */
static enum status_code create_pages(struct kv_backend *be, struct status *st)
{
    const struct kv_geometry *geo = &be->geo;
    be->handle = calloc(geo->total_pages, sizeof *be->handle);
    if (!be->handle)
        return status_nomem(st, "handles of KV pages", geo->total_pages * sizeof *be->handle);
    for (; be->n_handles < geo->total_pages; be->n_handles++) {
        CUresult rc = be->cu.cuMemCreate(&be->handle[be->n_handles], geo->page_bytes, &be->prop, 0);
        if (rc == CUDA_SUCCESS)
            continue;
        enum status_code code = failed(be, rc, st, "cuMemCreate");
        (void)status_prefix(st, "total_pages: %" PRIu64 " pages of %" PRIu64 " KiB, the GPU gave %" PRIu64,
                            geo->total_pages, geo->page_bytes >> 10, be->n_handles);
        return code;
    }
    return ST_OK;
}

/* All ranges are unmapped by the pool before it closes. */
static void cuda_close(struct kv_backend *be)
{
    if (!be)
        return;
    if (be->stream) {
        be->cu.cuStreamSynchronize(be->stream);
        be->cu.cuStreamDestroy(be->stream);
    }
    for (uint64_t i = 0; i < be->n_handles; i++)
        if (be->handle[i]) /* 0: given back */
            be->cu.cuMemRelease(be->handle[i]);
    for (uint32_t i = 0; i < be->n_extras; i++)
        be->cu.cuMemAddressFree(be->extras[i], be->geo.range_bytes);
    if (be->base)
        be->cu.cuMemAddressFree(be->base, be->reserved_bytes);
    if (be->context)
        be->cu.cuDevicePrimaryCtxRelease(be->device);
    free(be->handle);
    free(be->extras);
    if (be->library)
        dlclose(be->library);
    free(be);
}

static enum status_code cuda_open(struct kv_backend **out, const struct kv_geometry *geo, struct status *st)
{
    struct kv_backend *be = calloc(1, sizeof *be);
    if (!be)
        return status_nomem(st, "CUDA KV pages", sizeof *be);
    be->geo = *geo;
    enum status_code rc;
    if ((rc = load_driver(be, st)) != ST_OK || (rc = open_device(be, st)) != ST_OK ||
        (rc = check_sizes(be, st)) != ST_OK || (rc = reserve_ranges(be, st)) != ST_OK ||
        (rc = create_pages(be, st)) != ST_OK) {
        cuda_close(be);
        return rc;
    }
    *out = be;
    return ST_OK;
}

static enum status_code cuda_enter(struct kv_backend *be, struct status *st)
{
    CUresult rc = be->cu.cuCtxSetCurrent(be->context);
    return rc == CUDA_SUCCESS ? ST_OK : failed(be, rc, st, "cuCtxSetCurrent");
}

/* --- addresses and pages --- */

static uint64_t cuda_mappings(const struct kv_backend *be)
{
    (void)be;
    return UINT64_MAX;
}

static enum status_code cuda_range(struct kv_backend *be, uint32_t index, uint8_t **base, struct status *st)
{
    if (index < be->geo.slots) {
        *base = (uint8_t *)(uintptr_t)(be->base + index * be->geo.range_bytes);
        return ST_OK;
    }
    if (be->n_extras == be->cap_extras) {
        uint32_t cap = be->cap_extras ? 2 * be->cap_extras : 16;
        CUdeviceptr *more = realloc(be->extras, cap * sizeof *more);
        if (!more)
            return status_nomem(st, "KV ranges", cap * sizeof *more);
        be->extras = more;
        be->cap_extras = cap;
    }
    CUdeviceptr at;
    CUresult rc = be->cu.cuMemAddressReserve(&at, be->geo.range_bytes, be->geo.page_bytes, 0, 0);
    if (rc != CUDA_SUCCESS)
        return failed(be, rc, st, "cuMemAddressReserve of one more KV range");
    be->extras[be->n_extras++] = at;
    *base = (uint8_t *)(uintptr_t)at;
    return ST_OK;
}

static enum status_code cuda_map(struct kv_backend *be, uint8_t *at, const uint32_t *pages, uint32_t n, uint64_t *calls,
                                 struct status *st)
{
    const uint64_t size = be->geo.page_bytes;
    const CUdeviceptr base = (CUdeviceptr)(uintptr_t)at;
    const char *what = "cuMemMap";
    CUresult rc = CUDA_SUCCESS;
    uint32_t done = 0;
    for (; done < n; done++) {
        ++*calls;
        rc = be->cu.cuMemMap(base + done * size, size, 0, be->handle[pages[done]], 0);
        if (rc != CUDA_SUCCESS)
            goto fail;
    }
    what = "cuMemSetAccess";
    ++*calls;
    rc = be->cu.cuMemSetAccess(base, n * size, &be->access, 1);
    if (rc == CUDA_SUCCESS)
        return ST_OK;
fail:
    if (done) {
        ++*calls;
        be->cu.cuMemUnmap(base, done * size); /* it takes out what was put in a moment ago; there is no other remedy */
    }
    enum status_code code = failed(be, rc, st, what);
    (void)status_prefix(st, "%u KV pages", n);
    return code;
}

static enum status_code cuda_unmap(struct kv_backend *be, uint8_t *at, uint32_t n, uint64_t *calls, struct status *st)
{
    ++*calls;
    CUresult rc = be->cu.cuMemUnmap((CUdeviceptr)(uintptr_t)at, n * be->geo.page_bytes);
    return rc == CUDA_SUCCESS ? ST_OK : failed(be, rc, st, "cuMemUnmap");
}

static enum status_code cuda_drop(struct kv_backend *be, uint32_t page, struct status *st)
{
    CUresult rc = be->cu.cuMemRelease(be->handle[page]);
    if (rc != CUDA_SUCCESS)
        return failed(be, rc, st, "cuMemRelease");
    be->handle[page] = 0;
    return ST_OK;
}

static enum status_code cuda_restore(struct kv_backend *be, uint32_t page, struct status *st)
{
    CUmemGenericAllocationHandle handle;
    CUresult rc = be->cu.cuMemCreate(&handle, be->geo.page_bytes, &be->prop, 0);
    if (rc != CUDA_SUCCESS)
        return failed(be, rc, st, "cuMemCreate");
    be->handle[page] = handle;
    return ST_OK;
}

/* --- content --- */

static enum status_code cuda_clear(struct kv_backend *be, uint8_t *at, uint64_t bytes, struct status *st)
{
    CUresult rc = be->cu.cuMemsetD8Async((CUdeviceptr)(uintptr_t)at, 0, bytes, be->stream);
    return rc == CUDA_SUCCESS ? ST_OK : failed(be, rc, st, "cuMemsetD8Async");
}

static enum status_code cuda_copy(struct kv_backend *be, uint8_t *to, const uint8_t *from, uint64_t bytes,
                                  struct status *st)
{
    CUresult rc = be->cu.cuMemcpyDtoDAsync((CUdeviceptr)(uintptr_t)to, (CUdeviceptr)(uintptr_t)from, bytes, be->stream);
    return rc == CUDA_SUCCESS ? ST_OK : failed(be, rc, st, "cuMemcpyDtoDAsync");
}

static enum status_code cuda_save(struct kv_backend *be, void *host, const uint8_t *from, uint64_t bytes,
                                  struct status *st)
{
    CUresult rc = be->cu.cuMemcpyDtoHAsync(host, (CUdeviceptr)(uintptr_t)from, bytes, be->stream);
    return rc == CUDA_SUCCESS ? ST_OK : failed(be, rc, st, "cuMemcpyDtoHAsync");
}

static enum status_code cuda_load(struct kv_backend *be, uint8_t *to, const void *host, uint64_t bytes,
                                  struct status *st)
{
    CUresult rc = be->cu.cuMemcpyHtoDAsync((CUdeviceptr)(uintptr_t)to, host, bytes, be->stream);
    return rc == CUDA_SUCCESS ? ST_OK : failed(be, rc, st, "cuMemcpyHtoDAsync");
}

static enum status_code cuda_sync(struct kv_backend *be, struct status *st)
{
    CUresult rc = be->cu.cuStreamSynchronize(be->stream);
    return rc == CUDA_SUCCESS ? ST_OK : failed(be, rc, st, "cuStreamSynchronize of the KV pool");
}

static enum status_code cuda_host_alloc(struct kv_backend *be, void **out, uint64_t bytes, struct status *st)
{
    void *p = NULL;
    CUresult rc = be->cu.cuMemHostAlloc(&p, bytes, 0);
    if (rc != CUDA_SUCCESS)
        return failed(be, rc, st, "cuMemHostAlloc for suspended slots");
    *out = p;
    return ST_OK;
}

static void cuda_host_free(struct kv_backend *be, void *p, uint64_t bytes)
{
    (void)bytes;
    be->cu.cuMemFreeHost(p);
}

const struct kv_ops kv_ops_cuda = {
    .name = "cuda",
    .open = cuda_open,
    .close = cuda_close,
    .enter = cuda_enter,
    .mappings = cuda_mappings,
    .range = cuda_range,
    .map = cuda_map,
    .unmap = cuda_unmap,
    .clear = cuda_clear,
    .copy = cuda_copy,
    .save = cuda_save,
    .load = cuda_load,
    .sync = cuda_sync,
    .host_alloc = cuda_host_alloc,
    .host_free = cuda_host_free,
    .drop = cuda_drop,
    .restore = cuda_restore,
};
