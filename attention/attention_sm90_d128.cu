/* attention_sm90_d128.cu - Hopper kernels for head dimensions 72 to 128. 128 keys per tile where prefill has an SM's registers
 * and shared memory for itself; 96 where decode's rings (96 KiB) stand beside: 128 + 96 KiB of 227. */
#include "attention/attention_sm90_kernels.cuh"

template <bool BF16>
constexpr sm90_kernels KERNELS = sm90_kernels_of<prefill_shape<128, 128, 2, BF16>, prefill_shape<128, 96, 2, BF16>,
                                                 decode_shape<128, 3, BF16>, decode_shape<128, 2, BF16>>();

extern const sm90_kernels sm90_kernels_128[2] = {KERNELS<true>, KERNELS<false>};
