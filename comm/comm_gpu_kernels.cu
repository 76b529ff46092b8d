/* comm_gpu_kernels.cu - sums over ranks fused with residual and norm, and rows put together; both read the memory of peers
 * after a handshake, or local memory that NCCL has filled without one.
 *
 * Handshake: block b writes its count to signal[b] of every peer and waits until all peers' blocks b have written theirs
 * here. What is read behind it was written by kernels in front of this one, which have ended: it stands in the memory (L2) of
 * its device, where peers' reads go. So the flags need no fence, and parts are read past L1, which a kernel in front may have
 * left old lines in. Blocks of one launch need not run at the same time, as each waits for the block of its own number alone,
 * and these run in the order of their numbers everywhere.
 */
#include "comm/comm_gpu_device.cuh"

namespace
{
constexpr uint32_t CHUNK = 4096; /* columns that a block copies at a time: 16 bytes a thread */

/* Until *p has reached value; counts may wrap. */
__device__ void wait_for(const comm_gpu_limit &l, const uint32_t *p, uint32_t value, uint32_t peer)
{
    patience patience = {};
    for (uint32_t polls = 1; (int32_t)(load_flag(p) - value) < 0; polls++)
        if (polls % POLLS == 0 && out_of_patience(l, patience, peer))
            return;
}

/* All threads; value is the block's count of this meeting. A rank that has given up keeps silent: what it has is no sum. */
__device__ void meet(const comm_gpu_meet &m, uint32_t value)
{
    if (m.ranks == 0)
        return;
    const bool silent = threadIdx.x < m.ranks && load_flag(m.limit.broken); /* on its way beside value */
    __syncthreads();                                                        /* what this block has read, is read */
    if (threadIdx.x < m.ranks) {
        uint32_t row = blockIdx.x * COMM_GPU_PEERS;
        if (!silent)
            store_flag(m.signal[threadIdx.x] + row + m.rank, value);
        wait_for(m.limit, m.signal[m.rank] + row + threadIdx.x, value, threadIdx.x);
    }
    __syncthreads();
}

/* Quad i of a row after the sum. */
__device__ float4 summed(const comm_gpu_sum_job &j, uint64_t row, uint32_t i, uint32_t quads)
{
    const uint64_t at = row * quads + i;
    float4 v = j.rows.set ? make_float4(0, 0, 0, 0) : ((float4 *)j.rows.x)[at];
    float4 add = make_float4(0, 0, 0, 0);
#pragma unroll
    for (uint32_t r = 0; r < COMM_GPU_PEERS; r++)
        if (r < j.parts)
            add = plus(add, to_float(load_part((const bf16x4 *)j.part[r] + at)));
    v = plus(v, add);
    return j.rows.bias ? plus(v, ((const float4 *)j.rows.bias)[i]) : v;
}

/* Block b has rows b, b + blocks, ... A thread keeps its first quad; of wider rows it reads the others again, from x. */
__global__ void __launch_bounds__(THREADS_MAX) sum_kernel(const __grid_constant__ comm_gpu_sum_job j)
{
    const uint32_t quads = j.rows.hidden / 4, mine = threadIdx.x;
    const float4 *weights = (const float4 *)j.rows.weight;
    let_next_begin();
    float4 weight = weights && mine < quads ? weights[mine] : make_float4(0, 0, 0, 0);
    wait_for_previous();
    const uint32_t value = j.meet.ranks ? j.meet.count[blockIdx.x] + 1 : 0;
    meet(j.meet, value);
    for (uint32_t row = blockIdx.x; row < j.rows.rows; row += gridDim.x) {
        float4 *x = (float4 *)j.rows.x + (uint64_t)row * quads, first = make_float4(0, 0, 0, 0);
        bf16x4 *h = (bf16x4 *)j.rows.h + (uint64_t)row * quads;
        float squares = 0;
        for (uint32_t i = mine; i < quads; i += blockDim.x) {
            float4 v = summed(j, row, i, quads);
            x[i] = v;
            squares += squares_of(v);
            if (i == mine)
                first = v;
        }
        if (!weights)
            continue;
        float factor = rsqrtf(block_sum(squares) / (float)j.rows.hidden + j.rows.eps);
        if (mine < quads)
            h[mine] = scaled(first, factor, weight);
        for (uint32_t i = mine + blockDim.x; i < quads; i += blockDim.x)
            h[i] = scaled(x[i], factor, weights[i]);
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
} // namespace

cudaError_t comm_gpu_load_kernels(void)
{
    cudaError_t err = load(sum_kernel);
    if (err == cudaSuccess)
        err = load(gather_kernel<true>);
    if (err == cudaSuccess)
        err = load(gather_kernel<false>);
    return err == cudaSuccess ? comm_gpu_load_push() : err;
}

cudaError_t comm_gpu_launch_sum(cudaStream_t stream, const struct comm_gpu_sum_job *job)
{
    return launch(sum_kernel, job->rows.rows < COMM_GPU_BLOCKS ? job->rows.rows : COMM_GPU_BLOCKS,
                  threads_for(job->rows.hidden), stream, *job);
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
