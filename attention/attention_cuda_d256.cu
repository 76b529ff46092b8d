/* attention_cuda_d256.cu - the kernels for head dimensions up to 256. */
#include "attention/attention_cuda_run.cuh"

const cuda_kernel cuda_kernels_256[2] = {
    kernel_of<run_shape<256, 1, 32, 2, ptx_bf16>>(),
    kernel_of<run_shape<256, 1, 32, 2, ptx_f16>>(),
};
