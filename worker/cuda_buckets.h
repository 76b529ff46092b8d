/* cuda_buckets.h - for how many rows the launches of a step are made. Prefix cuda_bucket_.
 *
 * A step of n rows runs the launches of the first bucket with n rows or more; what is over is padding, computed for nobody. Each
 * bucket costs up to four graphs, about 0.9 MiB and 3 to 6 ms each (Llama-3-8B's shape, H200), and products that are measured once for a
 * kind of device, driver and cuBLASLt.
 *
 *     rows           buckets in an octave    padding at most
 *     1 to 127       2                       half as many: a product takes as long as the reading of its weights
 *     128 to 511     4                       a quarter; from here on rows cost time
 *     512 to 2047    32                      a thirty-second: chunks of 512 and 1024 with some decodes beside them
 *     2048 to 8191   8                       an eighth
 *     8192 on        2                       half: graphs would become too many
 *
 * The largest is the largest step whatever its rows: a batch that fills a step is never padded.
 *
 * Plain C, so that any machine can look at it (tests/check_buckets.c).
 */
#ifndef TANDEM_CUDA_BUCKETS_H
#define TANDEM_CUDA_BUCKETS_H

#include <stdint.h>

#define CUDA_BUCKETS_MAX 128 /* 116 of 2^20 rows */

/* Rows of the bucket after one of `rows`, at least 1. */
static inline uint32_t cuda_bucket_after(uint32_t rows)
{
    const uint32_t parts = rows < 128 ? 2 : rows < 512 ? 4 : rows < 2048 ? 32 : rows < 8192 ? 8 : 2;
    uint32_t octave = 1;
    while (octave <= rows / 2)
        octave *= 2;
    return rows + (octave > parts ? octave / parts : 1);
}

/* Ascending rows of all buckets for steps of up to max_rows, the last. Returns how many there are. */
static inline uint32_t cuda_bucket_list(uint32_t max_rows, uint32_t rows[CUDA_BUCKETS_MAX])
{
    uint32_t n = 0;
    for (uint32_t r = 1; r < max_rows; r = cuda_bucket_after(r))
        rows[n++] = r;
    rows[n++] = max_rows;
    return n;
}

#endif
