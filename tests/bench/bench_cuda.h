/* bench_cuda.h - what the CUDA benchmarks share: checked calls, the driver's virtual memory calls (fetched at run time, so
 * that nothing links libcuda), 2 MiB pages, medians. Prefix vmm_ for the driver, sample_ for timings.
 */
#ifndef TANDEM_BENCH_CUDA_H
#define TANDEM_BENCH_CUDA_H

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

constexpr uint64_t PAGE_BYTES = 2u << 20; /* the granularity of cuMemCreate on every GPU so far; checked by vmm_load */
constexpr uint64_t PAGE_WORDS = PAGE_BYTES / 4;

/* The calls of the driver that the pool needs, and what they take for a page of device 0. */
struct vmm {
    PFN_cuMemGetAllocationGranularity_v10020 granularity;
    PFN_cuMemAddressReserve_v10020 reserve;
    PFN_cuMemAddressFree_v10020 address_free;
    PFN_cuMemCreate_v10020 create;
    PFN_cuMemRelease_v10020 release;
    PFN_cuMemMap_v10020 map;
    PFN_cuMemUnmap_v10020 unmap;
    PFN_cuMemSetAccess_v10020 set_access;
    PFN_cuGetErrorName_v6000 error_name;
    CUmemAllocationProp prop;
    CUmemAccessDesc access;
};

typedef CUmemGenericAllocationHandle vmm_page;

#define CUDA_MUST(call)                                                                                                \
    do {                                                                                                               \
        cudaError_t cuda_rc = (call);                                                                                  \
        if (cuda_rc != cudaSuccess) {                                                                                  \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(cuda_rc));                \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#define VMM_MUST(call)                                                                                                 \
    do {                                                                                                               \
        CUresult vmm_rc = (call);                                                                                      \
        if (vmm_rc != CUDA_SUCCESS) {                                                                                  \
            fprintf(stderr, "%s:%d: %s: CUresult %d\n", __FILE__, __LINE__, #call, (int)vmm_rc);                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static inline double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

template <typename F> static inline void vmm_entry(const char *name, F *out)
{
    void *at = NULL;
    cudaDriverEntryPointQueryResult found;
    CUDA_MUST(cudaGetDriverEntryPointByVersion(name, &at, 10020, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess || !at) {
        fprintf(stderr, "the driver has no %s\n", name);
        exit(1);
    }
    *out = (F)at;
}

/* Device 0, its primary context, and the entry points. */
static inline void vmm_load(struct vmm *v)
{
    memset(v, 0, sizeof *v);
    setenv("CUDA_MODULE_LOADING", "EAGER", 1); /* loading a kernel late would wait for the one that runs */
    CUDA_MUST(cudaSetDevice(0));
    CUDA_MUST(cudaFree(NULL));
    vmm_entry("cuMemGetAllocationGranularity", &v->granularity);
    vmm_entry("cuMemAddressReserve", &v->reserve);
    vmm_entry("cuMemAddressFree", &v->address_free);
    vmm_entry("cuMemCreate", &v->create);
    vmm_entry("cuMemRelease", &v->release);
    vmm_entry("cuMemMap", &v->map);
    vmm_entry("cuMemUnmap", &v->unmap);
    vmm_entry("cuMemSetAccess", &v->set_access);
    vmm_entry("cuGetErrorName", &v->error_name);
    v->prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    v->prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    v->access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    v->access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    size_t least = 0;
    VMM_MUST(v->granularity(&least, &v->prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
    if (least != PAGE_BYTES) {
        fprintf(stderr, "least page of this driver: %zu bytes, expected %llu\n", least, (unsigned long long)PAGE_BYTES);
        exit(1);
    }
}

static inline const char *vmm_name(const struct vmm *v, CUresult rc)
{
    const char *name = NULL;
    return v->error_name(rc, &name) == CUDA_SUCCESS && name ? name : "unknown";
}

static inline void print_device(void)
{
    struct cudaDeviceProp p;
    int driver, runtime;
    CUDA_MUST(cudaGetDeviceProperties(&p, 0));
    CUDA_MUST(cudaDriverGetVersion(&driver));
    CUDA_MUST(cudaRuntimeGetVersion(&runtime));
    printf("%s, sm_%d%d, %d SMs, L2 %.0f MiB, %.1f GiB; driver API %d.%d, runtime %d.%d\n", p.name, p.major, p.minor,
           p.multiProcessorCount, p.l2CacheSize / 1048576.0, (double)p.totalGlobalMem / (1 << 30), driver / 1000,
           driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
}

/* Timings of one kind of call. */
struct samples {
    std::vector<double> us;
};

static inline double sample_at(struct samples *s, double share)
{
    if (s->us.empty())
        return 0;
    std::sort(s->us.begin(), s->us.end());
    return s->us[(size_t)((double)(s->us.size() - 1) * share + 0.5)];
}

/* "median p99 max" of calls, in microseconds. */
static inline void sample_print(struct samples *s)
{
    printf(" %8.1f %8.1f %9.1f |", sample_at(s, 0.5), sample_at(s, 0.99), sample_at(s, 1.0));
}

/* What word w (of 4 bytes) of page p holds: not zero, different everywhere, cheap on both sides. */
static inline __host__ __device__ uint32_t page_word(uint64_t p, uint64_t w)
{
    uint64_t x = (p * PAGE_WORDS + w + 1) * 0x9E3779B97F4A7C15ull;
    return (uint32_t)(x >> 32) ^ (uint32_t)x;
}

constexpr uint64_t FLUSH_BYTES = 256u << 20;

/* Fills the L2 cache with lines of `at` by reads: what is written would be written back while the next kernel is timed.
 * A template only so that a program may leave it unused. */
template <typename T> static __global__ void flush_read(const T *at, uint32_t *sums)
{
    uint32_t sum = 0;
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < FLUSH_BYTES / sizeof *at;
         i += (uint64_t)gridDim.x * blockDim.x)
        sum += at[i].x + at[i].y + at[i].z + at[i].w;
    if (sum == 0x12345678)
        sums[0] = sum; /* keeps the loads */
}

#endif
