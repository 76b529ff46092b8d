/* cuda_ptx_sm90.cuh - more instructions of Hopper, for products of many rows: what attention/ptx_sm90.cuh has not. Thin: one
 * function, one instruction. Shared memory is addressed by 32-bit numbers. */
#ifndef TANDEM_CUDA_PTX_SM90_CUH
#define TANDEM_CUDA_PTX_SM90_CUH

#include "attention/ptx_sm90.cuh"

/* All threads of all blocks of the cluster; what they have written is seen behind it. */
__device__ __forceinline__ void sm90_cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

/* ---- bulk tensor copies of matrices: c0 counts columns, c1 rows ---- */

__device__ __forceinline__ void sm90_copy_box2(uint32_t dst, const void *map, uint32_t bar, int32_t c0, int32_t c1,
                                               uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "l"(policy)
                 : "memory");
}

/* To the same place in each block of the cluster whose bit is set in `blocks`; each block's own bar gets the bytes. */
__device__ __forceinline__ void sm90_copy_box2_to(uint32_t dst, const void *map, uint32_t bar, int32_t c0, int32_t c1,
                                                  uint16_t blocks, uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "h"(blocks), "l"(policy)
                 : "memory");
}

/* ---- 8x8 matrices of 16-bit elements, spread over a warp as sums of wgmma are, transposed on their way ---- */

/* Lanes 8i .. 8i+7 give the rows of matrix i. */
__device__ __forceinline__ void sm90_stmatrix_trans(uint32_t dst, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void sm90_stmatrix_trans(uint32_t dst, uint32_t a, uint32_t b)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(dst), "r"(a), "r"(b)
                 : "memory");
}

__device__ __forceinline__ uint4 sm90_load_shared(uint32_t src)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(src)
                 : "memory");
    return v;
}

__device__ __forceinline__ float sm90_reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- wgmma of N columns: D[64][N] = add ? D + A * B : A * B, bf16, A and B in shared memory with rows along the sum ---- */

// clang-format off
#define SM90_R40 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
#define SM90_R48 SM90_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SM90_R56 SM90_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SM90_R60 SM90_R56 ", %56, %57, %58, %59"
#define SM90_R64 SM90_R60 ", %60, %61, %62, %63"
#define SM90_R68 SM90_R64 ", %64, %65, %66, %67"
#define SM90_R72 SM90_R68 ", %68, %69, %70, %71"
#define SM90_R76 SM90_R72 ", %72, %73, %74, %75"
#define SM90_R80 SM90_R76 ", %76, %77, %78, %79"
#define SM90_R84 SM90_R80 ", %80, %81, %82, %83"
#define SM90_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SM90_8(i) SM90_4(i), SM90_4(i + 4)
#define SM90_O40 SM90_8(0), SM90_8(8), SM90_8(16), SM90_8(24), SM90_8(32)
#define SM90_O48 SM90_O40, SM90_8(40)
#define SM90_O56 SM90_O48, SM90_8(48)
#define SM90_O60 SM90_O56, SM90_4(56)
#define SM90_O64 SM90_O60, SM90_4(60)
#define SM90_O68 SM90_O64, SM90_4(64)
#define SM90_O72 SM90_O68, SM90_4(68)
#define SM90_O76 SM90_O72, SM90_4(72)
#define SM90_O80 SM90_O76, SM90_4(76)
#define SM90_O84 SM90_O80, SM90_4(80)

/* n columns are r = n / 2 sums a thread; then come the operands r, r + 1 and r + 2. */
#define SM90_WGMMA(n, r, a_at, b_at, add_at)                                                                           \
    __device__ __forceinline__ void sm90_wgmma(float (&d)[r], uint64_t a, uint64_t b, uint32_t add)                    \
    {                                                                                                                  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add_at ", 0;\n"                                             \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" SM90_R##r "}, %" #a_at ", %" #b_at   \
                     ", p, 1, 1, 0, 0;\n}\n"                                                                           \
                     : SM90_O##r                                                                                       \
                     : "l"(a), "l"(b), "r"(add));                                                                      \
    }
SM90_WGMMA(96, 48, 48, 49, 50)
SM90_WGMMA(112, 56, 56, 57, 58)
SM90_WGMMA(128, 64, 64, 65, 66)
SM90_WGMMA(144, 72, 72, 73, 74)
SM90_WGMMA(152, 76, 76, 77, 78)
SM90_WGMMA(168, 84, 84, 85, 86)
// clang-format on

#endif
