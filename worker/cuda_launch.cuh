/* cuda_launch.cuh - launches that may begin before the kernel in front of them has ended (programmatic dependent launch,
 * compute capability 9.0 on). Prefix cuda_.
 *
 * A kernel launched by cuda_launch_early calls cuda_let_next_begin when it starts, or where the next one may, and
 * cuda_wait_for_previous before it touches what other kernels write or read: then all kernels in front have ended, as each
 * waited for the one in front of it. What it reads before can only be weights.
 */
#ifndef TANDEM_CUDA_LAUNCH_CUH
#define TANDEM_CUDA_LAUNCH_CUH

#include <cuda_runtime.h>

__device__ __forceinline__ void cuda_let_next_begin(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void cuda_wait_for_previous(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename... P, typename... A>
cudaError_t cuda_launch_early(void (*kernel)(P...), dim3 grid, uint32_t threads, cudaStream_t stream, A... args)
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
    cfg.gridDim = grid;
    cfg.blockDim = dim3(threads);
    cfg.stream = stream;
    cfg.attrs = &early;
    cfg.numAttrs = major >= 9;
    return cudaLaunchKernelEx(&cfg, kernel, P(args)...);
}

#endif
