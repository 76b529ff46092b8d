/* quant_run.c - rows of quantised values from stdin to floats on stdout, for tests/reference.py.
 *
 *     quant_run TYPE COLUMNS FIRST COUNT < rows
 *
 * Values FIRST .. FIRST + COUNT - 1 of every row.
 */
#include <stdio.h>
#include <stdlib.h>

#include "worker/quant.h"

int main(int argc, char **argv)
{
    const struct quant *q = argc == 5 ? quant_find((uint32_t)atoi(argv[1])) : NULL;
    if (!q) {
        fprintf(stderr, "quant_run: expected TYPE COLUMNS FIRST COUNT, of a quantised type\n");
        return 1;
    }
    uint32_t cols = (uint32_t)atoi(argv[2]), first = (uint32_t)atoi(argv[3]), count = (uint32_t)atoi(argv[4]);
    size_t row_bytes = (size_t)cols / q->block_values * q->block_bytes;
    uint8_t *row = malloc(row_bytes);
    float *out = malloc(count * sizeof *out);
    if (!row || !out || first + count > cols)
        return 1;
    while (fread(row, 1, row_bytes, stdin) == row_bytes) {
        quant_row(q, out, row, first, count);
        fwrite(out, sizeof *out, count, stdout);
    }
    free(row);
    free(out);
    return 0;
}
