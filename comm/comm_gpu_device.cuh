/* comm_gpu_device.cuh - what the kernels of comm/ have in common: numbers, loads and stores that peers take part in, waits
 * with a bound, launches that begin early. All of it in device code or inline.
 *
 * Who waits looks at the host's memory for an abort, but only after CHECK_NS: such a read takes about 1 us, one after the
 * other for all blocks. With a look each 128 polls, 256 blocks that once waited for 50 us took 240 us for it, which made the
 * peer wait for them in the next sum, and so on: 240 us a sum instead of 12, for as long as the ranks kept in step.
 */
#ifndef TANDEM_COMM_GPU_DEVICE_CUH
#define TANDEM_COMM_GPU_DEVICE_CUH

#include <cuda_bf16.h>

#include "comm/comm_gpu_internal.h"

namespace
{
constexpr uint32_t WARP = 32;
constexpr uint32_t THREADS_MAX = 1024;  /* one quad each for a hidden size of 4096 */
constexpr uint32_t POLLS = 64;          /* between looks at the clock */
constexpr uint64_t CHECK_NS = 10000000; /* between looks at the host's memory */

/* ---- numbers ---- */

struct alignas(8) bf16x4 {
    __nv_bfloat162 lo, hi;
};

__device__ inline float4 to_float(bf16x4 v)
{
    float2 lo = __bfloat1622float2(v.lo), hi = __bfloat1622float2(v.hi);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
}

__device__ inline float4 plus(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ inline float squares_of(float4 v)
{
    return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}

__device__ inline bf16x4 scaled(float4 v, float factor, float4 w)
{
    return {__floats2bfloat162_rn(v.x * factor * w.x, v.y * factor * w.y),
            __floats2bfloat162_rn(v.z * factor * w.z, v.w * factor * w.w)};
}

/* The same bits in all threads. */
__device__ inline float block_sum(float v)
{
    __shared__ float part[THREADS_MAX / WARP];
    for (uint32_t mask = WARP / 2; mask; mask >>= 1)
        v += __shfl_xor_sync(~0u, v, mask);
    __syncthreads(); /* part is free */
    if (threadIdx.x % WARP == 0)
        part[threadIdx.x / WARP] = v;
    __syncthreads();
    v = threadIdx.x % WARP < blockDim.x / WARP ? part[threadIdx.x % WARP] : 0;
    for (uint32_t mask = WARP / 2; mask; mask >>= 1)
        v += __shfl_xor_sync(~0u, v, mask);
    return v;
}

/* ---- memory that peers read and write, past L1 ---- */

__device__ inline uint32_t load_flag(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ inline void store_flag(uint32_t *p, uint32_t v)
{
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ inline bf16x4 load_part(const bf16x4 *p)
{
    uint2 v;
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    bf16x4 out;
    *(uint2 *)&out = v;
    return out;
}

__device__ inline float4 load_share(const float4 *p)
{
    float4 v;
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p));
    return v;
}

__device__ inline float load_share(const float *p)
{
    float v;
    asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}

/* ---- waits ---- */

__device__ inline uint64_t now_ns()
{
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

struct patience {
    uint64_t start, check; /* 0: the clock was not needed yet */
};

/* One thread, each POLLS polls: whether the wait for peer is over without it. The first one who gives up says so. */
__device__ inline bool out_of_patience(const comm_gpu_limit &l, patience &p, uint32_t peer)
{
    if (load_flag(l.broken))
        return true;
    uint64_t now = now_ns();
    if (!p.start) {
        p.start = now;
        p.check = now + CHECK_NS;
    }
    if (now < p.check)
        return false;
    p.check = now + CHECK_NS;
    bool abort = *(volatile uint32_t *)&l.watch->abort;
    if (!abort && now - p.start < l.timeout_ns)
        return false;
    *(volatile uint32_t *)l.broken = 1;
    *(volatile uint32_t *)&l.watch->peer = peer;
    __threadfence_system();
    *(volatile uint32_t *)&l.watch->fault = abort ? 1 : 2;
    __threadfence_system();
    return true;
}

/* ---- launches that may begin before the kernel in front has ended (compute capability 9.0 on) ---- */

__device__ inline void let_next_begin()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Has the kernel loaded now, and not at its first launch. */
template <typename J> cudaError_t load(void (*kernel)(J))
{
    cudaFuncAttributes unused;
    return cudaFuncGetAttributes(&unused, kernel);
}

template <typename J>
cudaError_t launch(void (*kernel)(J), uint32_t blocks, uint32_t threads, cudaStream_t stream, const J &job)
{
    int device = 0, major = 0;
    cudaError_t err = cudaGetDevice(&device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (err != cudaSuccess)
        return err;
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t cfg = {};
    cfg.gridDim = dim3(blocks);
    cfg.blockDim = dim3(threads);
    cfg.stream = stream;
    cfg.attrs = &early;
    cfg.numAttrs = major >= 9;
    return cudaLaunchKernelEx(&cfg, kernel, job);
}

/* Threads of a block that has a row of so many elements. */
inline uint32_t threads_for(uint32_t hidden)
{
    uint32_t quads = hidden / 4, threads = (quads + WARP - 1) / WARP * WARP;
    return threads < THREADS_MAX ? threads : THREADS_MAX;
}
} // namespace

#endif
