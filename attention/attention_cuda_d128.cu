/* attention_cuda_d128.cu - the kernels for head dimensions up to 128. */
#include "attention/attention_cuda_run.cuh"

const cuda_kernel cuda_kernels_128[2] = {
    kernel_of<run_shape<128, 2, 64, 4, ptx_bf16>>(),
    kernel_of<run_shape<128, 2, 64, 4, ptx_f16>>(),
};
