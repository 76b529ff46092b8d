#include "worker/quant.h"

#include <string.h>

#include "worker/model_convert.h"

#define SMALL 32
#define LARGE 256

static float f16_at(const uint8_t *p)
{
    float x;
    model_convert(&x, MAT_F32, p, MAT_F16, 1);
    return x;
}

/* ---- blocks of 32: value i in the low half of byte i, value i + 16 in its high half ---- */

static void q4_0(float *out, const uint8_t *in)
{
    float d = f16_at(in);
    for (int i = 0; i < 16; i++) {
        out[i] = d * (float)((in[2 + i] & 15) - 8);
        out[i + 16] = d * (float)((in[2 + i] >> 4) - 8);
    }
}

static void q4_1(float *out, const uint8_t *in)
{
    float d = f16_at(in), m = f16_at(in + 2);
    for (int i = 0; i < 16; i++) {
        out[i] = d * (float)(in[4 + i] & 15) + m;
        out[i + 16] = d * (float)(in[4 + i] >> 4) + m;
    }
}

/* The fifth bit of value i is bit i of four bytes. */
static int five_bits(const uint8_t *high, const uint8_t *low, int i)
{
    int four = i < 16 ? low[i] & 15 : low[i - 16] >> 4;
    return four | (high[i / 8] >> i % 8 & 1) << 4;
}

static void q5_0(float *out, const uint8_t *in)
{
    float d = f16_at(in);
    for (int i = 0; i < SMALL; i++)
        out[i] = d * (float)(five_bits(in + 2, in + 6, i) - 16);
}

static void q5_1(float *out, const uint8_t *in)
{
    float d = f16_at(in), m = f16_at(in + 2);
    for (int i = 0; i < SMALL; i++)
        out[i] = d * (float)five_bits(in + 4, in + 8, i) + m;
}

static void q8_0(float *out, const uint8_t *in)
{
    float d = f16_at(in);
    for (int i = 0; i < SMALL; i++)
        out[i] = d * (float)(int8_t)in[2 + i];
}

/* ---- blocks of 256 ----
 *
 * Two bits of value i: the halves of 128 values have 32 bytes each, in which four groups of 32 lie over each other. */
static int two_bits(const uint8_t *q, int i)
{
    return q[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
}

/* Four bits of value i: pairs of groups of 32 share 32 bytes. */
static int four_bits(const uint8_t *q, int i)
{
    return q[i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15;
}

static void q2_k(float *out, const uint8_t *in)
{
    const uint8_t *scales = in, *q = in + 16;
    float d = f16_at(in + 80), m = f16_at(in + 82);
    for (int i = 0; i < LARGE; i += 16) {
        float scale = d * (float)(scales[i / 16] & 15), min = m * (float)(scales[i / 16] >> 4);
        for (int j = i; j < i + 16; j++)
            out[j] = scale * (float)two_bits(q, j) - min;
    }
}

static void q3_k(float *out, const uint8_t *in)
{
    const uint8_t *high = in, *q = in + 32, *scales = in + 96;
    float d = f16_at(in + 108);
    for (int g = 0; g < 16; g++) {
        int low = g < 8 ? scales[g] & 15 : scales[g - 8] >> 4;
        float scale = d * (float)((low | (scales[8 + g % 4] >> g / 4 * 2 & 3) << 4) - 32);
        for (int j = 16 * g; j < 16 * g + 16; j++) {
            int third = high[j % 32] >> j / 32 & 1;
            out[j] = scale * (float)(two_bits(q, j) + 4 * third - 4);
        }
    }
}

/* Eight scales and eight minima of six bits in twelve bytes. */
static void scale_and_min(const uint8_t *p, int g, float *scale, float *min)
{
    if (g < 4) {
        *scale = (float)(p[g] & 63);
        *min = (float)(p[g + 4] & 63);
    } else {
        *scale = (float)((p[g + 4] & 15) | p[g - 4] >> 6 << 4);
        *min = (float)(p[g + 4] >> 4 | p[g] >> 6 << 4);
    }
}

static void q4_k(float *out, const uint8_t *in)
{
    float d = f16_at(in), m = f16_at(in + 2), scale, min;
    for (int g = 0; g < 8; g++) {
        scale_and_min(in + 4, g, &scale, &min);
        scale *= d;
        min *= m;
        for (int j = 32 * g; j < 32 * g + 32; j++)
            out[j] = scale * (float)four_bits(in + 16, j) - min;
    }
}

static void q5_k(float *out, const uint8_t *in)
{
    const uint8_t *high = in + 16;
    float d = f16_at(in), m = f16_at(in + 2), scale, min;
    for (int g = 0; g < 8; g++) {
        scale_and_min(in + 4, g, &scale, &min);
        scale *= d;
        min *= m;
        for (int j = 32 * g; j < 32 * g + 32; j++)
            out[j] = scale * (float)(four_bits(in + 48, j) | (high[j % 32] >> g & 1) << 4) - min;
    }
}

static void q6_k(float *out, const uint8_t *in)
{
    const uint8_t *low = in, *high = in + 128, *scales = in + 192;
    float d = f16_at(in + 208);
    for (int i = 0; i < LARGE; i++) {
        /* In a half: 64 bytes, whose low halves are the first 64 values and whose high halves are the others. */
        int four = low[i / 128 * 64 + i % 64] >> i % 128 / 64 * 4 & 15;
        float scale = d * (float)(int8_t)scales[i / 16];
        out[i] = scale * (float)((four | two_bits(high, i) << 4) - 32);
    }
}

const struct quant *quant_find(uint32_t type)
{
    static const struct quant list[] = {
        {GGUF_Q4_0, SMALL, 18, q4_0},  {GGUF_Q4_1, SMALL, 20, q4_1},  {GGUF_Q5_0, SMALL, 22, q5_0},
        {GGUF_Q5_1, SMALL, 24, q5_1},  {GGUF_Q8_0, SMALL, 34, q8_0},  {GGUF_Q2_K, LARGE, 84, q2_k},
        {GGUF_Q3_K, LARGE, 110, q3_k}, {GGUF_Q4_K, LARGE, 144, q4_k}, {GGUF_Q5_K, LARGE, 176, q5_k},
        {GGUF_Q6_K, LARGE, 210, q6_k},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        if ((uint32_t)list[i].type == type)
            return &list[i];
    return NULL;
}

void quant_row(const struct quant *q, float *out, const uint8_t *row, uint32_t first, uint32_t n)
{
    float whole[LARGE];
    uint32_t end = first + n;
    row += (uint64_t)(first / q->block_values) * q->block_bytes;
    for (uint32_t at = first / q->block_values * q->block_values; at < end;
         at += q->block_values, row += q->block_bytes) {
        if (at >= first && end - at >= q->block_values) {
            q->block(out + (at - first), row);
            continue;
        }
        uint32_t from = at < first ? first - at : 0, to = end - at < q->block_values ? end - at : q->block_values;
        q->block(whole, row);
        memcpy(out + (at + from - first), whole + from, (to - from) * sizeof *out);
    }
}
