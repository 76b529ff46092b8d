/* attention_sm90_kernels.cuh - the kernels of one padded head dimension and dtype: each role alone, and both on every SM.
 *
 *   prefill  1 block per SM:  producer warpgroup | consumer | consumer
 *   decode   2 blocks per SM: one warpgroup each (what one waits for at the ends of items, the other hides)
 *   fused    1 block per SM:  producer | consumer | consumer | decode, both roles with barriers and memory of their own
 *
 * Blocks with the prefill role come in clusters of two. Blocks stay until the lists are empty, but those of prefill's kernel that the plan
 * has no work for, whose SMs decode's gets, and decode's role of the fused one under a fixed cut, which ends with prefill: decode's kernel
 * takes the rest. The last to leave sets the counters back, where decode's kernel follows the last of its blocks.
 */
#ifndef TANDEM_ATTENTION_SM90_KERNELS_CUH
#define TANDEM_ATTENTION_SM90_KERNELS_CUH

#include "attention/attention_launch.cuh"
#include "attention/attention_sm90_decode.cuh"
#include "attention/attention_sm90_prefill.cuh"

constexpr uint32_t SHARED_ALIGN = 1024; /* swizzled blocks repeat every 8 rows of 128 bytes */

struct sm90_bars {
    prefill_bars prefill;
    decode_bars decode;
};

__device__ __forceinline__ char *sm90_aligned(char *p)
{
    return p + (SHARED_ALIGN - sm90_shared(p) % SHARED_ALIGN) % SHARED_ALIGN;
}

/* One thread of each block, when all of the block is done: what it added to the counters has been answered. */
__device__ __forceinline__ void sm90_leave(attn_counters *c, uint32_t role_bits)
{
    if (atomicAdd(&c->left, 1) != gridDim.x - 1)
        return;
    for (uint32_t r = 0; r < ROLES; r++)
        if (role_bits >> r & 1)
            c->next[r] = 0;
    c->left = 0;
}

/* Barriers are set up, in all blocks of a cluster. */
__device__ __forceinline__ void sm90_begin()
{
    __syncthreads();
    sm90_cluster_begin();
}

template <typename P, uint32_t REGS> __device__ __forceinline__ void prefill_block(const sm90_args &a)
{
    extern __shared__ char raw[];
    __shared__ prefill_bars bars;
    const attn_lists lists = attn_lists_of(a.run.ws.lists);
    if (threadIdx.x == 0)
        prefill_first(a, &bars);
    const uint32_t items = lists.count[ROLE_PREFILL], clusters = lists.clusters;
    if (blockIdx.x / CLUSTER >=
        (clusters < items ? clusters : items)) { /* alike in all of a cluster: out, by way of little code */
        attn_wait_earlier();
        attn_let_next();
        return;
    }
    const uint32_t shared = sm90_shared(sm90_aligned(raw)),
                   group = __shfl_sync(0xffffffff, threadIdx.x / GROUP_THREADS, 0);
    if (threadIdx.x == 0) {
        prefill_init<P>(&bars);
        sm90_mbar_init_fence();
    }
    sm90_begin();
    attn_wait_earlier();
    attn_let_next();
    if (group == 0) {
        sm90_regs_less<24>();
        if (threadIdx.x == 0)
            prefill_produce<P>(a, &bars, shared, items, clusters, [] {});
    } else {
        sm90_regs_more<REGS>();
        prefill_consume<P>(a, &bars, shared, group - 1);
    }
    __syncthreads();
    /* Where any cluster has a second item, and decode's kernel does not follow, all of the grid works: the plan leaves SMs to decodes alone. */
    if (threadIdx.x == 0 && items > clusters && !a.run.decode_follows)
        sm90_leave(a.run.counters, 1 << ROLE_PREFILL);
}

template <typename P>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
    sm90_prefill(const __grid_constant__ sm90_args a)
{
    prefill_block<P, 240>(a);
}

/* As sm90_prefill, with registers left for a block of the decode kernel beside it. */
template <typename P>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(512, 1)
    sm90_prefill_beside(const __grid_constant__ sm90_args a)
{
    prefill_block<P, 176>(a);
}

template <typename C> __device__ __forceinline__ void decode_block(const sm90_args &a)
{
    extern __shared__ char raw[];
    __shared__ decode_bars bars;
    const uint32_t items = attn_lists_of(a.run.ws.lists).count[ROLE_DECODE];
    if (threadIdx.x == 0) {
        decode_init<C>(&bars);
        sm90_mbar_init_fence();
    }
    __syncthreads();
    if (!a.run.decode_follows)
        attn_wait_earlier();
    attn_let_next();
    decode_role<C>(a, &bars, sm90_aligned(raw), threadIdx.x, items, NULL);
    __syncthreads();
    if (a.run.decode_follows)
        attn_wait_earlier(); /* the counters are in use until then */
    if (threadIdx.x == 0)
        sm90_leave(a.run.counters, 1 << ROLE_DECODE | a.run.decode_follows << ROLE_PREFILL);
}

template <typename C> __global__ void __launch_bounds__(128, 2) sm90_decode(const __grid_constant__ sm90_args a)
{
    decode_block<C>(a);
}

/* As sm90_decode, with registers for one block beside sm90_prefill_beside. */
template <typename C> __global__ void __launch_bounds__(128, 4) sm90_decode_beside(const __grid_constant__ sm90_args a)
{
    decode_block<C>(a);
}

/* P: prefill's shape where decode's rings stand beside it. */
template <typename P, typename C>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(512, 1)
    sm90_fused(const __grid_constant__ sm90_args a)
{
    extern __shared__ char raw[];
    __shared__ sm90_bars bars;
    const attn_lists lists = attn_lists_of(a.run.ws.lists);
    char *memory = sm90_aligned(raw);
    const uint32_t group = __shfl_sync(0xffffffff, threadIdx.x / GROUP_THREADS, 0);
    if (threadIdx.x == 0) {
        prefill_first(a, &bars.prefill);
        prefill_init<P>(&bars.prefill);
        decode_init<C>(&bars.decode);
        bars.decode.stop = 0;
        sm90_mbar_init_fence();
    }
    sm90_begin();
    attn_wait_earlier();
    attn_let_next();
    if (group == 0) {
        sm90_regs_less<24>();
        if (threadIdx.x == 0)
            prefill_produce<P>(a, &bars.prefill, sm90_shared(memory), lists.count[ROLE_PREFILL], gridDim.x / CLUSTER,
                               [&] { atomicExch(&bars.decode.stop, a.run.decode_follows); });
    } else if (group == 3) {
        sm90_regs_more<136>();
        decode_role<C>(a, &bars.decode, memory + P::BYTES, threadIdx.x % GROUP_THREADS, lists.count[ROLE_DECODE],
                       &bars.decode.stop);
    } else {
        sm90_regs_more<176>();
        prefill_consume<P>(a, &bars.prefill, sm90_shared(memory), group - 1);
    }
    __syncthreads();
    if (threadIdx.x == 0 && !a.run.decode_follows)
        sm90_leave(a.run.counters, 1 << ROLE_PREFILL | 1 << ROLE_DECODE);
}

template <typename P, typename NARROW, typename C, typename SMALL> constexpr sm90_kernels sm90_kernels_of()
{
    return {
        {sm90_prefill<P>, 384, P::BYTES + SHARED_ALIGN, 1},
        {sm90_decode<C>, 128, C::BYTES + SHARED_ALIGN, DECODE_BLOCKS_PER_SM},
        {sm90_fused<NARROW, C>, 512, NARROW::BYTES + C::BYTES + SHARED_ALIGN, 1},
        {sm90_prefill_beside<NARROW>, 384, NARROW::BYTES + SHARED_ALIGN, 1},
        {sm90_decode_beside<SMALL>, 128, SMALL::BYTES + SHARED_ALIGN, 1},
        P::D,
    };
}

#endif
