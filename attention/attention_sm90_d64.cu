/* attention_sm90_d64.cu - Hopper kernels for head dimensions up to 64. */
#include "attention/attention_sm90_kernels.cuh"

template <typename T>
constexpr sm90_kernels KERNELS = sm90_kernels_of<prefill_shape<64, 128, 3, T>, prefill_shape<64, 128, 2, T>,
                                                 decode_shape<64, 6, T>, decode_shape<64, 4, T>>();

extern const sm90_kernels sm90_kernels_64[2][2] = {{KERNELS<sm90_type<true, false>>, KERNELS<sm90_type<false, false>>},
                                                   {KERNELS<sm90_type<true, true>>, KERNELS<sm90_type<false, true>>}};
