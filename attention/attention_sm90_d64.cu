/* attention_sm90_d64.cu - Hopper kernels for head dimensions up to 64. */
#include "attention/attention_sm90_kernels.cuh"

template <bool BF16>
constexpr sm90_kernels KERNELS = sm90_kernels_of<prefill_shape<64, 128, 2, BF16>, prefill_shape<64, 128, 2, BF16>,
                                                 decode_shape<64, 6, BF16>, decode_shape<64, 4, BF16>>();

extern const sm90_kernels sm90_kernels_64[2] = {KERNELS<true>, KERNELS<false>};
