/* attention_cuda_d64.cu - the kernels for head dimensions up to 64. */
#include "attention/attention_cuda_run.cuh"

const cuda_kernel cuda_kernels_64[2] = {
    kernel_of<run_shape<64, 2, 64, 6, ptx_bf16>>(),
    kernel_of<run_shape<64, 2, 64, 6, ptx_f16>>(),
};
