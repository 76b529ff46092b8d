/* gguf.h - the header of a GGUF file: metadata and where the tensors lie. Prefix gguf_.
 *
 * A model in one file: the ranks read the weights from it, the coordinator the tokenizer. All numbers little-endian:
 *
 *   "GGUF", u32 version (2 or 3), u64 tensors, u64 values
 *   values    string key, u32 kind, the value; an array is u32 kind, u64 count, the elements; a string u64 length, bytes
 *   tensors   string name, u32 dimensions (1 to 4), u64 sizes (the one that is contiguous in memory first), u32 type,
 *             u64 offset
 *   padding to a multiple of general.alignment (32 where that is not said), then the data, where the offsets count from
 *
 * Valid when everything lies inside the file, names and keys are unique and without NUL, offsets are aligned, rows are
 * whole blocks, and no tensor overlaps another. Anything else is DATA_LOSS, before anything is used. Versions 1 and
 * big-endian files, arrays of arrays and files in several parts are UNIMPLEMENTED. A tensor type that is not known here is
 * an error only for who asks for that tensor.
 */
#ifndef TANDEM_GGUF_H
#define TANDEM_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

#define GGUF_MAX_DIMS         4
#define GGUF_MAX_HEADER_BYTES (256u << 20) /* vocabularies of a million tokens have a tenth of it */
#define GGUF_MAX_NAME_BYTES   255u

/* Of tensors; only those that gguf_type_find knows. */
enum gguf_type {
    GGUF_F32 = 0,
    GGUF_F16 = 1,
    GGUF_Q4_0 = 2,
    GGUF_Q4_1 = 3,
    GGUF_Q5_0 = 6,
    GGUF_Q5_1 = 7,
    GGUF_Q8_0 = 8,
    GGUF_Q2_K = 10,
    GGUF_Q3_K = 11,
    GGUF_Q4_K = 12,
    GGUF_Q5_K = 13,
    GGUF_Q6_K = 14,
    GGUF_BF16 = 30,
};

struct gguf_type_info {
    const char *name;
    enum gguf_type type;
    uint32_t block_values; /* of a row, which are stored together */
    uint32_t block_bytes;
};

/* Of values. */
enum gguf_kind {
    GGUF_UINT8,
    GGUF_INT8,
    GGUF_UINT16,
    GGUF_INT16,
    GGUF_UINT32,
    GGUF_INT32,
    GGUF_FLOAT32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_UINT64,
    GGUF_INT64,
    GGUF_FLOAT64,
};

struct gguf;

struct gguf_string {
    const char *at; /* no NUL behind it; may hold any byte */
    size_t bytes;
};

/* Elements of one kind, none of them an array. */
struct gguf_array {
    enum gguf_kind kind;
    uint64_t count;
    const uint8_t *at;
};

struct gguf_tensor {
    const char *name;
    uint32_t dims;
    uint64_t shape[GGUF_MAX_DIMS]; /* as in the file: columns first */
    uint32_t type;                 /* enum gguf_type, or one that is not known */
    uint64_t offset;               /* in the file */
    uint64_t bytes;                /* 0: not known, as the type is not */
};

/* Whether a path is one file rather than a model folder: how all programs tell the two sources apart. */
bool gguf_is_file(const char *path);

/* NOT_FOUND, DATA_LOSS, UNIMPLEMENTED, RESOURCE_EXHAUSTED. */
STATUS_MUST_CHECK enum status_code gguf_open(struct gguf **out, const char *path, struct status *st);
/* A whole file in memory, which outlives the handle. name is for messages. */
STATUS_MUST_CHECK enum status_code gguf_open_memory(struct gguf **out, const void *data, size_t bytes, const char *name,
                                                    struct status *st);
void gguf_close(struct gguf *g); /* NULL is fine */
const char *gguf_path(const struct gguf *g);
/* The open file, for who maps the tensors; -1 of a file in memory. Belongs to the handle. */
int gguf_fd(const struct gguf *g);

/* ---- values: what is absent leaves *out as it is; INVALID_ARGUMENT for another kind or range ---- */

bool gguf_has(const struct gguf *g, const char *key);
STATUS_MUST_CHECK enum status_code gguf_need(const struct gguf *g, const char *key, struct status *st);
/* Integers of any width. */
STATUS_MUST_CHECK enum status_code gguf_read_uint(const struct gguf *g, const char *key, uint32_t min, uint32_t max,
                                                  uint32_t *out, struct status *st);
/* Floats and integers. */
STATUS_MUST_CHECK enum status_code gguf_read_double(const struct gguf *g, const char *key, double min, double max,
                                                    double *out, struct status *st);
STATUS_MUST_CHECK enum status_code gguf_read_bool(const struct gguf *g, const char *key, bool *out, struct status *st);
/* Lives as long as the handle, as arrays do. */
STATUS_MUST_CHECK enum status_code gguf_read_string(const struct gguf *g, const char *key, struct gguf_string *out,
                                                    struct status *st);
/* kind: what the elements must be. */
STATUS_MUST_CHECK enum status_code gguf_read_array(const struct gguf *g, const char *key, enum gguf_kind kind,
                                                   struct gguf_array *out, struct status *st);
bool gguf_string_is(struct gguf_string s, const char *text);
/* The next element of an array of strings; moves *a behind it. a->count is above 0. */
struct gguf_string gguf_next_string(struct gguf_array *a);
/* Element i of an array of INT32 or FLOAT32. */
int32_t gguf_int32_at(const struct gguf_array *a, uint64_t i);
float gguf_float32_at(const struct gguf_array *a, uint64_t i);

/* ---- tensors ---- */

size_t gguf_tensors(const struct gguf *g);
/* In ascending order of names; i below gguf_tensors. */
const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, size_t i);
/* NULL: none of that name. */
const struct gguf_tensor *gguf_tensor_find(const struct gguf *g, const char *name);
/* The first `bytes` of a tensor, at most as many as it has. DATA_LOSS when they cannot be read. */
STATUS_MUST_CHECK enum status_code gguf_read_tensor(const struct gguf *g, const struct gguf_tensor *t, void *out,
                                                    size_t bytes, struct status *st);
/* NULL: not known. */
const struct gguf_type_info *gguf_type_find(uint32_t type);
/* For messages: also of types that are not known here but elsewhere; "type 99" for others. */
const char *gguf_type_name(uint32_t type, char room[32]);

#endif
