/* safetensors.h - the tensors of a model folder, mapped read-only. Prefix safetensors_.
 *
 * One model.safetensors, or several files named by model.safetensors.index.json. A file is
 *
 *   0        u64 little-endian N, the length of the header, at most SAFETENSORS_MAX_HEADER
 *   8        N bytes of JSON: {"name": {"dtype": "BF16", "shape": [2048, 192], "data_offsets": [begin, end)}, ...},
 *            and "__metadata__" with free text
 *   8 + N    the data, to the end of the file; offsets count from here
 *
 * Valid when every tensor lies inside the data, has as many bytes as dtype and shape say, none overlap, and no byte is
 * left over (as the format demands). Anything else is DATA_LOSS, before any tensor is used. A tensor of a dtype that
 * struct mat cannot hold is an error only for who asks for it: files carry buffers that nobody needs.
 */
#ifndef TANDEM_SAFETENSORS_H
#define TANDEM_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"
#include "worker/gemm.h"

#define SAFETENSORS_MAX_HEADER 100000000u /* the limit of the reference implementation */
#define SAFETENSORS_MAX_DIMS   8

struct safetensors;

struct safetensor {
    const char *name;
    const char *file; /* its path */
    enum mat_dtype dtype;
    uint32_t dims;
    uint64_t shape[SAFETENSORS_MAX_DIMS];
    const uint8_t *data; /* row-major, not aligned; to be read by mapped_read, as the file may be cut meanwhile */
    uint64_t bytes;
};

/* NOT_FOUND: no weights in the folder, or a file that the index names is absent. */
STATUS_MUST_CHECK enum status_code safetensors_open(struct safetensors **out, const char *dir, struct status *st);
/* One file, already in memory, which outlives the handle. name is for messages. */
STATUS_MUST_CHECK enum status_code safetensors_open_memory(struct safetensors **out, const void *data, size_t bytes,
                                                           const char *name, struct status *st);
void safetensors_close(struct safetensors *s); /* NULL is fine */

size_t safetensors_count(const struct safetensors *s);
/* Names in ascending order; i below the count. */
const char *safetensors_name(const struct safetensors *s, size_t i);
/* Path of the first file: for messages about the whole. */
const char *safetensors_file(const struct safetensors *s);

/* DATA_LOSS when there is none of that name, UNIMPLEMENTED when its dtype is none of F32, F16, BF16. The strings and
 * the data live as long as the handle. */
STATUS_MUST_CHECK enum status_code safetensors_get(struct safetensor *out, const struct safetensors *s,
                                                   const char *name, struct status *st);
/* DATA_LOSS when a file was written to since it was opened: what has been read may be half old and half new. */
STATUS_MUST_CHECK enum status_code safetensors_check_unchanged(const struct safetensors *s, struct status *st);
/* Whether there is a tensor of that name, of whatever dtype. */
int safetensors_has(const struct safetensors *s, const char *name);

#endif
