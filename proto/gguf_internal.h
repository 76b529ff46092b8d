/* gguf_internal.h - shared by gguf.c (reads the header) and gguf_values.c (hands out what is in it). */
#ifndef TANDEM_GGUF_INTERNAL_H
#define TANDEM_GGUF_INTERNAL_H

#include "proto/gguf.h"

struct gguf_value {
    char *key;
    uint32_t kind;
    uint32_t elements; /* of an array: their kind */
    uint64_t count;    /* of an array or string: elements, bytes */
    size_t at;         /* of the value, or of its first element or byte, in the header */
};

struct gguf {
    char *path;
    int fd;
    uint8_t *header;            /* what was read of the file, at least to the end of the header */
    bool owns_header;           /* else the caller's memory */
    struct gguf_value *value;   /* ascending by key */
    struct gguf_tensor *tensor; /* ascending by name */
    size_t values, tensors;
};

/* Bytes of an element; 0 for strings, arrays and what is no kind. */
uint32_t gguf_kind_bytes(uint32_t kind);

#endif
