/* attention_bend.cuh - the hyperbolic tangent of a soft cap, for all kernels on a GPU.
 *
 *     tanh(x) = 1 - 2 / (1 + 2^z), z = 2 log2(e) x
 *
 * Absolute error below 2^-21: z is rounded (2^-24 of it), ex2.approx is off by 2^-22 of the power, rcp.approx by 2^-23 of the
 * quotient. A relative error d of the power moves the result by (1 - tanh(x)^2) / 2 * d, and z only matters where that is not
 * small; emulated over -12 .. 12 with the worst of each the result is off by 4.2e-7. A weight is then off by cap * 2^-21,
 * relatively: 2^-15.4 for a cap of 50, far below what rounding weights to 16 bits costs (2^-9 of bf16, 2^-12 of f16).
 * tanh.approx is off by 2^-11 of the result: 1.6 % of a weight whose score is 40 under that cap, 3 to 45 times what is allowed.
 *
 * Right at both ends: 2^z is infinite or 0, its quotient 0 or 1. NaN stays NaN.
 */
#ifndef TANDEM_ATTENTION_BEND_CUH
#define TANDEM_ATTENTION_BEND_CUH

#include <cuda_runtime.h>

__device__ __forceinline__ float attn_tanh(float x)
{
    constexpr float TWO_LOG2_E = 2.8853900817779268f;
    float power, part;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * TWO_LOG2_E));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(part) : "f"(1 + power));
    return 1 - 2 * part;
}

#endif
