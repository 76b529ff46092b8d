/* attention_sm90_maps.cu - tensor maps of K and V: a template encoded once by the driver, and, on the device, one map per
 * sequence and side with its base address and its number of tokens put in. Grid: one warp per sequence.
 */
#include <cuda.h>

#include "attention/attention_sm90.cuh"

namespace
{
constexpr uint32_t MAP_WARPS = 4;
constexpr uint64_t ANY_STEPS = 1ull << 31; /* dimension 2 has no end of its own */

__global__ void __launch_bounds__(MAP_WARPS * 32)
    maps_kernel(const attn_seq *seq, const uint32_t *counts, uint32_t max_seqs, const __grid_constant__ sm90_map from,
                sm90_map *k_maps, sm90_map *v_maps)
{
    __shared__ sm90_map made[MAP_WARPS];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = blockIdx.x * MAP_WARPS + warp;
    const uint32_t given = *counts, seqs = given < max_seqs ? given : max_seqs;
    if (i >= seqs)
        return;
    const attn_seq s = seq[i];
    for (uint32_t side = 0; side < 2; side++) {
        ((uint32_t *)&made[warp])[lane] = ((const uint32_t *)&from)[lane];
        __syncwarp();
        if (lane == 0) {
            sm90_map_set_base(sm90_shared(&made[warp]), side ? s.v : s.k);
            sm90_map_set_dim1(sm90_shared(&made[warp]), s.kv_len);
        }
        __syncwarp();
        sm90_map_publish((side ? v_maps : k_maps) + i, sm90_shared(&made[warp]));
        __syncwarp();
    }
}
} // namespace

cudaError_t sm90_map_template(sm90_map *out, uint32_t head_dim, uint64_t token_stride, bool bf16, void *any_memory)
{
    static_assert(sizeof(CUtensorMap) == sizeof(sm90_map), "tensor map");
    void *fn = NULL;
    cudaDriverEntryPointQueryResult found;
    cudaError_t err = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault, &found);
    if (err != cudaSuccess)
        return err;
    if (found != cudaDriverEntryPointSuccess)
        return cudaErrorNotSupported;
    const cuuint64_t dims[3] = {head_dim, 1u << 30, ANY_STEPS}, strides[2] = {token_stride, 16};
    const cuuint32_t box[3] = {BOX_DIMS, BOX_KEYS, 1}, every[3] = {1, 1, 1};
    /* No promotion: by one to 256 bytes each half of a row is asked for once more, and what lies in the other half of L2 crosses the
     * fabric between them half as often again (attention_h200_binds.txt). */
    CUresult rc = ((decltype(&cuTensorMapEncodeTiled))fn)(
        (CUtensorMap *)out, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, any_memory,
        dims, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return rc == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t sm90_launch_maps(const attn_seq *seq, const uint32_t *counts, uint32_t max_seqs, const sm90_map &from,
                             sm90_map *k_maps, sm90_map *v_maps, cudaStream_t stream)
{
    if (max_seqs == 0)
        return cudaSuccess;
    maps_kernel<<<(max_seqs + MAP_WARPS - 1) / MAP_WARPS, MAP_WARPS * 32, 0, stream>>>(seq, counts, max_seqs, from,
                                                                                       k_maps, v_maps);
    return cudaGetLastError();
}
