/* fake_cuda.c - an imitation of the CUDA driver, for tests of the CUDA back end of memory/ without a GPU: device memory is
 * a memfd, device addresses are host addresses, streams do everything at once. A shared object, loaded by its path.
 *
 * It keeps the rules that were found on an H200 (memory/README.md): a handle is mapped whole, at offset 0, over reserved
 * addresses that hold nothing; access is given to ranges without a hole, and is needed to touch them; unmap takes whole
 * handles. It is stricter in two points, where the driver says nothing: unmapping what is not mapped, and releasing a
 * handle that is mapped. The page is 4096 bytes instead of 2 MiB. Memory of a new handle is not zero.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cuda.h>

#include "tests/fake_cuda.h"

#define GRAIN        UINT64_C(4096)
#define DEVICE_BYTES (UINT64_C(1) << 30)
#define MAX_RESERVED 64
#define MAX_HANDLES  4096
#define MAX_MAPPED   16384

extern struct fake_cuda_control fake_cuda; /* tests look it up */
struct fake_cuda_control fake_cuda;

struct reservation {
    uint64_t at, bytes;
};

struct handle { /* its number in `handles` + 1 is the driver's handle */
    bool live;
    unsigned mapped;
    uint64_t offset, bytes; /* in the memfd */
};

struct mapping {
    uint64_t at, bytes;
    uint32_t handle;
    bool access;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below */
static struct reservation reserved[MAX_RESERVED];
static struct handle handles[MAX_HANDLES];
static struct mapping mappings[MAX_MAPPED];
static unsigned n_mappings;
static uint64_t used_bytes, file_bytes;
static int fd = -1;

static CUresult fault(void)
{
    if (!fake_cuda.inject || !fake_cuda.inject())
        return CUDA_SUCCESS;
    return fake_cuda.result ? (CUresult)fake_cuda.result : CUDA_ERROR_OUT_OF_MEMORY;
}

static CUresult broken(const char *what)
{
    fprintf(stderr, "fake_cuda: %s\n", what);
    fake_cuda.broken_rules++;
    return CUDA_ERROR_INVALID_VALUE;
}

static CUresult locked(CUresult rc)
{
    pthread_mutex_unlock(&lock);
    return rc;
}

#define FAULT_OR_LOCK()                                                                                                \
    do {                                                                                                               \
        CUresult fault_rc = fault();                                                                                   \
        if (fault_rc != CUDA_SUCCESS)                                                                                  \
            return fault_rc;                                                                                           \
        pthread_mutex_lock(&lock);                                                                                     \
    } while (0)

/* --- device, context, stream --- */

CUresult CUDAAPI cuInit(unsigned flags)
{
    (void)flags;
    return fault();
}

CUresult CUDAAPI cuGetErrorName(CUresult rc, const char **name)
{
    *name = rc == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER";
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetCount(int *count)
{
    *count = 1;
    return fault();
}

CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return fault();
}

CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice device)
{
    (void)device;
    *value = what == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
    return fault();
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    (void)device;
    FAULT_OR_LOCK();
    fake_cuda.live++;
    *context = (CUcontext)&fake_cuda;
    return locked(CUDA_SUCCESS);
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device)
{
    (void)device;
    pthread_mutex_lock(&lock);
    fake_cuda.live--;
    return locked(CUDA_SUCCESS);
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context)
{
    (void)context;
    return fault();
}

CUresult CUDAAPI cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return fault();
}

CUresult CUDAAPI cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority)
{
    (void)flags, (void)priority;
    FAULT_OR_LOCK();
    fake_cuda.live++;
    *stream = (CUstream)&fake_cuda;
    return locked(CUDA_SUCCESS);
}

CUresult CUDAAPI cuStreamDestroy(CUstream stream)
{
    (void)stream;
    pthread_mutex_lock(&lock);
    fake_cuda.live--;
    return locked(CUDA_SUCCESS);
}

CUresult CUDAAPI cuStreamSynchronize(CUstream stream)
{
    (void)stream;
    return fault();
}

/* --- addresses --- */

CUresult CUDAAPI cuMemAddressReserve(CUdeviceptr *at, size_t bytes, size_t align, CUdeviceptr hint,
                                     unsigned long long flags)
{
    (void)hint, (void)flags;
    FAULT_OR_LOCK();
    unsigned i = 0;
    while (i < MAX_RESERVED && reserved[i].bytes)
        i++;
    if (i == MAX_RESERVED || bytes == 0 || bytes % GRAIN)
        return locked(CUDA_ERROR_INVALID_VALUE);
    align = align < GRAIN ? GRAIN : align;
    uint8_t *p = mmap(NULL, bytes + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return locked(CUDA_ERROR_OUT_OF_MEMORY);
    uint64_t from = (uint64_t)(uintptr_t)p, to = (from + align - 1) / align * align;
    if (to > from)
        munmap(p, to - from);
    if (from + align > to)
        munmap((void *)(uintptr_t)(to + bytes), from + align - to);
    reserved[i] = (struct reservation){to, bytes};
    fake_cuda.live++;
    *at = to;
    return locked(CUDA_SUCCESS);
}

static bool overlaps(const struct mapping *m, uint64_t at, uint64_t bytes)
{
    return m->at < at + bytes && at < m->at + m->bytes;
}

CUresult CUDAAPI cuMemAddressFree(CUdeviceptr at, size_t bytes)
{
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < n_mappings; i++)
        if (overlaps(&mappings[i], at, bytes))
            return locked(broken("addresses are freed while something is mapped there"));
    for (unsigned i = 0; i < MAX_RESERVED; i++)
        if (reserved[i].at == at && reserved[i].bytes == bytes) {
            reserved[i].bytes = 0;
            munmap((void *)(uintptr_t)at, bytes);
            fake_cuda.live--;
            return locked(CUDA_SUCCESS);
        }
    return locked(broken("addresses are freed that were not reserved so"));
}

/* --- pages --- */

CUresult CUDAAPI cuMemGetInfo(size_t *left, size_t *total)
{
    FAULT_OR_LOCK();
    *left = DEVICE_BYTES - used_bytes;
    *total = DEVICE_BYTES;
    return locked(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *prop,
                                               CUmemAllocationGranularity_flags which)
{
    (void)which;
    *bytes = GRAIN;
    return prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE ? fault() : broken("pages are not of a device");
}

static CUresult fill(uint64_t offset, uint64_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    if (p == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    memset(p, 0xa5, bytes);
    munmap(p, bytes);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *prop,
                             unsigned long long flags)
{
    (void)prop, (void)flags;
    FAULT_OR_LOCK();
    unsigned i = 0;
    while (i < MAX_HANDLES && (handles[i].live || (handles[i].bytes && handles[i].bytes != bytes)))
        i++;
    if (bytes == 0 || bytes % GRAIN)
        return locked(broken("a handle of no whole number of pages"));
    if (i == MAX_HANDLES || bytes > DEVICE_BYTES - used_bytes)
        return locked(CUDA_ERROR_OUT_OF_MEMORY);
    if (fd < 0)
        fd = memfd_create("fake-cuda", MFD_CLOEXEC);
    if (!handles[i].bytes) {
        if (ftruncate(fd, (off_t)(file_bytes + bytes)))
            return locked(CUDA_ERROR_OUT_OF_MEMORY);
        handles[i] = (struct handle){.offset = file_bytes, .bytes = bytes};
        file_bytes += bytes;
    }
    if (fill(handles[i].offset, bytes) != CUDA_SUCCESS)
        return locked(CUDA_ERROR_OUT_OF_MEMORY);
    handles[i].live = true;
    used_bytes += bytes;
    fake_cuda.live++;
    *handle = i + 1;
    return locked(CUDA_SUCCESS);
}

static struct handle *find(CUmemGenericAllocationHandle h)
{
    return h >= 1 && h <= MAX_HANDLES && handles[h - 1].live ? &handles[h - 1] : NULL;
}

CUresult CUDAAPI cuMemRelease(CUmemGenericAllocationHandle handle)
{
    FAULT_OR_LOCK();
    struct handle *h = find(handle);
    if (!h || h->mapped)
        return locked(broken("release of a handle that is mapped or no handle"));
    h->live = false;
    used_bytes -= h->bytes;
    fake_cuda.live--;
    return locked(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemMap(CUdeviceptr at, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                          unsigned long long flags)
{
    FAULT_OR_LOCK();
    struct handle *h = find(handle);
    if (!h || offset || flags || bytes != h->bytes || at % GRAIN)
        return locked(broken("map of a part of a handle, or of none"));
    bool inside = false;
    for (unsigned i = 0; i < MAX_RESERVED; i++)
        inside =
            inside || (reserved[i].bytes && at >= reserved[i].at && at + bytes <= reserved[i].at + reserved[i].bytes);
    if (!inside)
        return locked(broken("map outside of what is reserved"));
    for (unsigned i = 0; i < n_mappings; i++)
        if (overlaps(&mappings[i], at, bytes))
            return locked(broken("map over a mapping"));
    if (n_mappings == MAX_MAPPED)
        return locked(CUDA_ERROR_OUT_OF_MEMORY);
    mappings[n_mappings++] = (struct mapping){at, bytes, (uint32_t)handle - 1, false};
    h->mapped++;
    fake_cuda.live++;
    return locked(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemSetAccess(CUdeviceptr at, size_t bytes, const CUmemAccessDesc *desc, size_t n)
{
    FAULT_OR_LOCK();
    uint64_t found = 0;
    if (n != 1 || desc->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        return locked(broken("access of another kind"));
    for (unsigned i = 0; i < n_mappings; i++)
        if (mappings[i].at >= at && mappings[i].at + mappings[i].bytes <= at + bytes)
            found += mappings[i].bytes;
    if (found != bytes)
        return locked(broken("access to a range with a hole"));
    for (unsigned i = 0; i < n_mappings; i++) {
        struct mapping *m = &mappings[i];
        if (m->access || m->at < at || m->at + m->bytes > at + bytes)
            continue;
        if (mmap((void *)(uintptr_t)m->at, m->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
                 (off_t)handles[m->handle].offset) == MAP_FAILED)
            return locked(CUDA_ERROR_OUT_OF_MEMORY);
        m->access = true;
    }
    return locked(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemUnmap(CUdeviceptr at, size_t bytes)
{
    FAULT_OR_LOCK();
    uint64_t found = 0;
    for (unsigned i = 0; i < n_mappings; i++)
        if (mappings[i].at >= at && mappings[i].at + mappings[i].bytes <= at + bytes)
            found += mappings[i].bytes;
    if (found != bytes)
        return locked(broken("unmap of a range with a hole"));
    for (unsigned i = 0; i < n_mappings;) {
        struct mapping *m = &mappings[i];
        if (m->at < at || m->at + m->bytes > at + bytes) {
            i++;
            continue;
        }
        if (mmap((void *)(uintptr_t)m->at, m->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                 -1, 0) == MAP_FAILED)
            abort();
        handles[m->handle].mapped--;
        *m = mappings[--n_mappings];
        fake_cuda.live--;
    }
    return locked(CUDA_SUCCESS);
}

/* --- content --- */

CUresult CUDAAPI cuMemHostAlloc(void **out, size_t bytes, unsigned flags)
{
    (void)flags;
    FAULT_OR_LOCK();
    *out = malloc(bytes);
    fake_cuda.live += *out != NULL;
    return locked(*out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

CUresult CUDAAPI cuMemFreeHost(void *p)
{
    free(p);
    pthread_mutex_lock(&lock);
    fake_cuda.live--;
    return locked(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr at, unsigned char byte, size_t n, CUstream stream)
{
    (void)stream;
    CUresult rc = fault();
    if (rc == CUDA_SUCCESS)
        memset((void *)(uintptr_t)at, byte, n);
    return rc;
}

CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream stream)
{
    (void)stream;
    CUresult rc = fault();
    if (rc == CUDA_SUCCESS)
        memcpy((void *)(uintptr_t)to, (const void *)(uintptr_t)from, n);
    return rc;
}

CUresult CUDAAPI cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t n, CUstream stream)
{
    (void)stream;
    CUresult rc = fault();
    if (rc == CUDA_SUCCESS)
        memcpy(to, (const void *)(uintptr_t)from, n);
    return rc;
}

CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t n, CUstream stream)
{
    (void)stream;
    CUresult rc = fault();
    if (rc == CUDA_SUCCESS)
        memcpy((void *)(uintptr_t)to, from, n);
    return rc;
}
