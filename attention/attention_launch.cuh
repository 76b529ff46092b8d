/* attention_launch.cuh - launches whose beginning overlaps the end of the launch before on the stream (programmatic
 * dependent launch, compute capability 9.0 and newer): what a launch costs is hidden, what it may touch is not changed.
 *
 * Each such kernel calls attn_wait_earlier in every block, before it touches memory that an earlier launch may write, or, where
 * that launch is known to leave it alone, at the latest before the block ends: who waits for this launch has then waited
 * for all before it. What a plan wrote, and tokens of earlier steps, may be read earlier (attention_items.cuh).
 * attn_let_next allows the next launch's blocks to begin as soon as there is room.
 */
#ifndef TANDEM_ATTENTION_LAUNCH_CUH
#define TANDEM_ATTENTION_LAUNCH_CUH

#include <cstdint>

#include <cuda_runtime.h>

__device__ __forceinline__ void attn_wait_earlier()
{
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void attn_let_next()
{
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct attn_grid {
    uint32_t blocks, threads, shared_bytes;
    bool early; /* may begin before the launch before it has ended */
    cudaStream_t stream;
};

template <typename Args> cudaError_t attn_launch(void (*kernel)(const Args), const attn_grid &g, const Args &args)
{
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = g.blocks;
    config.blockDim = g.threads;
    config.dynamicSmemBytes = g.shared_bytes;
    config.stream = g.stream;
    config.attrs = &early;
    config.numAttrs = g.early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

#endif
