#include "worker/model_convert.h"

#include <string.h>

static float widen_half(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023, bits;
    float x;
    if (exponent == 0) {
        x = (float)fraction * 0x1p-24f;
        memcpy(&bits, &x, 4);
    } else {
        bits = (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
    }
    bits |= sign;
    memcpy(&x, &bits, 4);
    return x;
}

static float widen(const uint8_t *in, enum mat_dtype from)
{
    float x;
    uint16_t h;
    uint32_t bits;
    if (from == MAT_F32) {
        memcpy(&x, in, 4);
        return x;
    }
    memcpy(&h, in, 2);
    if (from == MAT_F16)
        return widen_half(h);
    bits = (uint32_t)h << 16;
    memcpy(&x, &bits, 4);
    return x;
}

static uint16_t narrow(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x)
        return (uint16_t)(bits >> 16 | 0x40); /* stays a NaN, whatever the lower half was */
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

static void put(uint8_t *out, enum mat_dtype to, float x)
{
    uint16_t h;
    if (to == MAT_F32) {
        memcpy(out, &x, 4);
        return;
    }
    h = narrow(x);
    memcpy(out, &h, 2);
}

void model_convert(void *out, enum mat_dtype to, const void *in, enum mat_dtype from, uint64_t n)
{
    uint8_t *dst = out;
    const uint8_t *src = in;
    uint32_t dst_elem = mat_elem_bytes(to), src_elem = mat_elem_bytes(from);
    if (from == to) {
        memcpy(dst, src, n * dst_elem);
        return;
    }
    for (uint64_t i = 0; i < n; i++)
        put(dst + i * dst_elem, to, widen(src + i * src_elem, from));
}

uint64_t model_random_seed(const char *tensor)
{
    uint64_t h = 0xCBF29CE484222325ull; /* FNV-1a */
    for (; *tensor; tensor++)
        h = (h ^ (uint8_t)*tensor) * 0x100000001B3ull;
    return h;
}

void model_random(void *out, enum mat_dtype to, uint64_t seed, uint64_t first, uint64_t n, float scale)
{
    uint8_t *dst = out;
    uint32_t elem = mat_elem_bytes(to);
    for (uint64_t i = 0; i < n; i++)
        put(dst + i * elem, to, model_random_value(seed, first + i, scale));
}
