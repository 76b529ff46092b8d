/* attention_sm90_d128.cu - Hopper kernels for head dimensions 72 to 128. 128 keys per tile where prefill has an SM's registers
 * and shared memory for itself; 96 where decode's rings (96 KiB) stand beside: 128 + 96 KiB of 227. */
#include "attention/attention_sm90_kernels.cuh"

template <typename T>
constexpr sm90_kernels KERNELS = sm90_kernels_of<prefill_shape<128, 128, 3, T>, prefill_shape<128, 96, 2, T>,
                                                 decode_shape<128, 3, T>, decode_shape<128, 2, T>>();

extern const sm90_kernels sm90_kernels_128[2][2] = {{KERNELS<sm90_type<true, false>>, KERNELS<sm90_type<false, false>>},
                                                    {KERNELS<sm90_type<true, true>>, KERNELS<sm90_type<false, true>>}};
