/* comm_gpu_kernels.cu - sums over ranks fused with residual and norm, and rows put together; both read the memory of peers
 * after a handshake, or local memory that NCCL has filled without one.
 *
 * Handshake: block b writes its count to signal[b] of every peer and waits until all peers' blocks b have written theirs
 * here. What is read behind it was written by kernels in front of this one, which have ended: it stands in the memory (L2) of
 * its device, where peers' reads go. So the flags need no fence, and parts are read past L1, which a kernel in front may have
 * left old lines in. Blocks of one launch need not run at the same time, as each waits for the block of its own number alone,
 * and these run in the order of their numbers everywhere.
 *
 * Who waits looks at the host's memory for an abort, but only after CHECK_NS: such a read takes about 1 us, one after the
 * other for all blocks. With a look each 128 polls, 256 blocks that once waited for 50 us took 240 us for it, which made the
 * peer wait for them in the next sum, and so on: 240 us a sum instead of 12, for as long as the ranks kept in step.
 */
#include <cuda_bf16.h>

#include "comm/comm_gpu_internal.h"

namespace
{
constexpr uint32_t WARP = 32;
constexpr uint32_t THREADS_MAX = 1024;  /* one quad each for a hidden size of 4096 */
constexpr uint32_t POLLS = 64;          /* between looks at the clock */
constexpr uint64_t CHECK_NS = 10000000; /* between looks at the host's memory */
constexpr uint32_t CHUNK = 4096;        /* columns that a block copies at a time: 16 bytes a thread */

struct alignas(8) bf16x4 {
    __nv_bfloat162 lo, hi;
};

__device__ float4 to_float(bf16x4 v)
{
    float2 lo = __bfloat1622float2(v.lo), hi = __bfloat1622float2(v.hi);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
}

__device__ float4 plus(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ uint32_t load_flag(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ void store_flag(uint32_t *p, uint32_t v)
{
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

/* Of a rank's memory, past L1. */
__device__ bf16x4 load_part(const bf16x4 *p)
{
    uint2 v;
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    bf16x4 out;
    *(uint2 *)&out = v;
    return out;
}

__device__ float4 load_share(const float4 *p)
{
    float4 v;
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p));
    return v;
}

__device__ float load_share(const float *p)
{
    float v;
    asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}

__device__ uint64_t now_ns()
{
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

__device__ void let_next_begin()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ void wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Until *p has reached value; counts may wrap. */
__device__ void wait_for(const comm_gpu_meet &m, const uint32_t *p, uint32_t value, uint32_t peer)
{
    uint64_t start = 0, check = 0;
    for (uint32_t polls = 1; (int32_t)(load_flag(p) - value) < 0; polls++) {
        if (polls % POLLS)
            continue;
        if (load_flag(m.broken))
            return;
        uint64_t now = now_ns();
        if (!start) {
            start = now;
            check = now + CHECK_NS;
        }
        if (now < check)
            continue;
        check = now + CHECK_NS;
        bool abort = *(volatile uint32_t *)&m.watch->abort;
        if (!abort && now - start < m.timeout_ns)
            continue;
        *(volatile uint32_t *)m.broken = 1;
        *(volatile uint32_t *)&m.watch->peer = peer;
        __threadfence_system();
        *(volatile uint32_t *)&m.watch->fault = abort ? 1 : 2;
        __threadfence_system();
        return;
    }
}

/* All threads; value is the block's count of this meeting. */
__device__ void meet(const comm_gpu_meet &m, uint32_t value)
{
    if (m.ranks == 0)
        return;
    __syncthreads(); /* what this block has read, is read */
    if (threadIdx.x < m.ranks) {
        uint32_t row = blockIdx.x * COMM_GPU_RANKS;
        store_flag(m.signal[threadIdx.x] + row + m.rank, value);
        wait_for(m, m.signal[m.rank] + row + threadIdx.x, value, threadIdx.x);
    }
    __syncthreads();
}

/* The same bits in all threads. */
__device__ float block_sum(float v)
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

/* Quad i of a row after the sum. */
__device__ float4 summed(const comm_gpu_sum_job &j, uint64_t row, uint32_t i, uint32_t quads)
{
    const uint64_t at = row * quads + i;
    float4 v = j.set ? make_float4(0, 0, 0, 0) : ((float4 *)j.x)[at];
    float4 add = make_float4(0, 0, 0, 0);
#pragma unroll
    for (uint32_t r = 0; r < COMM_GPU_RANKS; r++)
        if (r < j.parts)
            add = plus(add, to_float(load_part((const bf16x4 *)j.part[r] + at)));
    v = plus(v, add);
    return j.bias ? plus(v, ((const float4 *)j.bias)[i]) : v;
}

__device__ float squares_of(float4 v)
{
    return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}

__device__ bf16x4 scaled(float4 v, float factor, float4 w)
{
    return {__floats2bfloat162_rn(v.x * factor * w.x, v.y * factor * w.y),
            __floats2bfloat162_rn(v.z * factor * w.z, v.w * factor * w.w)};
}

/* Block b has rows b, b + blocks, ... A thread keeps its first quad; of wider rows it reads the others again, from x. */
__global__ void __launch_bounds__(THREADS_MAX) sum_kernel(const __grid_constant__ comm_gpu_sum_job j)
{
    const uint32_t quads = j.hidden / 4, mine = threadIdx.x;
    let_next_begin();
    float4 weight = j.weight && mine < quads ? ((const float4 *)j.weight)[mine] : make_float4(0, 0, 0, 0);
    wait_for_previous();
    const uint32_t value = j.meet.ranks ? j.meet.count[blockIdx.x] + 1 : 0;
    meet(j.meet, value);
    for (uint32_t row = blockIdx.x; row < j.rows; row += gridDim.x) {
        float4 *x = (float4 *)j.x + (uint64_t)row * quads, first = make_float4(0, 0, 0, 0);
        bf16x4 *h = (bf16x4 *)j.h + (uint64_t)row * quads;
        float squares = 0;
        for (uint32_t i = mine; i < quads; i += blockDim.x) {
            float4 v = summed(j, row, i, quads);
            x[i] = v;
            squares += squares_of(v);
            if (i == mine)
                first = v;
        }
        if (!j.weight)
            continue;
        float factor = rsqrtf(block_sum(squares) / (float)j.hidden + j.eps);
        if (mine < quads)
            h[mine] = scaled(first, factor, weight);
        for (uint32_t i = mine + blockDim.x; i < quads; i += blockDim.x)
            h[i] = scaled(x[i], factor, ((const float4 *)j.weight)[i]);
    }
    if (j.meet.ranks && threadIdx.x == 0)
        j.meet.count[blockIdx.x] = value; /* every thread has read it: the barriers of meet */
}

/* Items are (row, rank, chunk of its columns). A second handshake at the end: the share may be written again at once. */
template <bool WIDE>
__global__ void __launch_bounds__(THREADS_MAX) gather_kernel(const __grid_constant__ comm_gpu_gather_job j)
{
    let_next_begin();
    wait_for_previous();
    const uint32_t value = j.meet.ranks ? j.meet.count[blockIdx.x] + 1 : 0;
    meet(j.meet, value);
    uint32_t chunks = 0;
    for (uint32_t r = 0; r < j.ranks; r++)
        chunks = max(chunks, (j.count[r] + CHUNK - 1) / CHUNK);
    for (uint64_t item = blockIdx.x; item < (uint64_t)j.rows * j.ranks * chunks; item += gridDim.x) {
        const uint32_t row = item / (j.ranks * chunks), rest = item % (j.ranks * chunks), r = rest % j.ranks;
        const uint32_t begin = rest / j.ranks * CHUNK, end = min(begin + CHUNK, j.count[r]);
        const float *in = j.share[r] + (uint64_t)row * j.count[r];
        float *out = j.out + (uint64_t)row * j.total + j.first[r];
        if (WIDE)
            for (uint32_t i = begin + 4 * threadIdx.x; i < end; i += 4 * blockDim.x)
                *(float4 *)(out + i) = load_share((const float4 *)(in + i));
        else
            for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x)
                out[i] = load_share(in + i);
    }
    if (j.meet.ranks == 0)
        return;
    meet(j.meet, value + 1);
    if (threadIdx.x == 0)
        j.meet.count[blockIdx.x] = value + 1;
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
} // namespace

cudaError_t comm_gpu_launch_sum(cudaStream_t stream, const struct comm_gpu_sum_job *job)
{
    uint32_t quads = job->hidden / 4, threads = (quads + WARP - 1) / WARP * WARP;
    return launch(sum_kernel, job->rows < COMM_GPU_BLOCKS ? job->rows : COMM_GPU_BLOCKS,
                  threads < THREADS_MAX ? threads : THREADS_MAX, stream, *job);
}

cudaError_t comm_gpu_launch_gather(cudaStream_t stream, const struct comm_gpu_gather_job *job)
{
    bool wide = job->total % 4 == 0;
    uint64_t chunks = 0;
    for (uint32_t r = 0; r < job->ranks; r++) {
        wide = wide && job->first[r] % 4 == 0 && job->count[r] % 4 == 0;
        uint64_t n = (job->count[r] + CHUNK - 1) / CHUNK;
        chunks = n > chunks ? n : chunks;
    }
    uint64_t items = chunks * job->ranks * job->rows;
    return launch(wide ? gather_kernel<true> : gather_kernel<false>,
                  items < COMM_GPU_BLOCKS ? (uint32_t)items : COMM_GPU_BLOCKS, THREADS_MAX, stream, *job);
}
