/* quant.h - rows of quantised values, as GGUF files hold them, to floats. Prefix quant_.
 *
 * A row is cut into blocks of 32 or 256 values that share scales. d and m are F16 numbers of a block, q small integers:
 *
 *   Q4_0 Q5_0 Q8_0   32     d * q, with q from -8, -16, -128 on
 *   Q4_1 Q5_1        32     d * q + m, with q from 0 on
 *   Q2_K Q4_K Q5_K   256    (d * s) * q - (m * t), with integers s and t for each 16 (Q2_K) or 32 values
 *   Q3_K Q6_K        256    (d * s) * q, with an integer s for each 16 values
 */
#ifndef TANDEM_QUANT_H
#define TANDEM_QUANT_H

#include <stdint.h>

#include "proto/gguf.h"

struct quant {
    enum gguf_type type;
    uint32_t block_values, block_bytes;
    void (*block)(float *out, const uint8_t *in); /* one block */
};

/* NULL: no quantised type, or none of those above. */
const struct quant *quant_find(uint32_t type);
/* Values first .. first + n - 1 of a row. */
void quant_row(const struct quant *q, float *out, const uint8_t *row, uint32_t first, uint32_t n);

#endif
