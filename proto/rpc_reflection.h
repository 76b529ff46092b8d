/* rpc_reflection.h - an index over a serialized google.protobuf.FileDescriptorSet; shared by rpc_reflection_index.c and
 * rpc_reflection.c. It points into the bytes of the set. */
#ifndef TANDEM_RPC_REFLECTION_H
#define TANDEM_RPC_REFLECTION_H

#include "proto/rpc_internal.h"

#define REFL_MAX_FILES 64 /* a set of files is a bit mask */

struct refl_bytes {
    const uint8_t *p, *end;
};

struct refl_file {
    struct refl_bytes bytes; /* of the FileDescriptorProto */
    char *name;
    uint64_t with_imports; /* this file and all that it needs, as bits */
};

struct refl_symbol {
    char *name; /* full, no dot in front */
    uint32_t file;
    bool is_service, is_message;
};

struct refl_extension {
    char *extendee; /* full name of the message that is extended */
    int32_t number;
    uint32_t file;
};

struct refl_index {
    struct refl_file files[REFL_MAX_FILES];
    size_t n_files;
    struct refl_symbol *symbols; /* sorted by name */
    size_t n_symbols, cap_symbols;
    struct refl_extension *extensions; /* sorted by extendee, then number */
    size_t n_extensions, cap_extensions;
};

/* INVALID_ARGUMENT: not a set, or a file imports one that is not in it. */
STATUS_MUST_CHECK enum status_code refl_index_create(struct refl_index **out, const void *set, size_t len,
                                                     struct status *st);
void refl_index_destroy(struct refl_index *x);                                         /* NULL is fine */
const struct refl_file *refl_file_named(const struct refl_index *x, const char *name); /* NULL: none, as all of these */
const struct refl_symbol *refl_symbol_named(const struct refl_index *x, const char *name);
const struct refl_extension *refl_extension_of(const struct refl_index *x, const char *type, int32_t number);
/* The first extension of a type and how many there are; they stand side by side. */
const struct refl_extension *refl_extensions_of(const struct refl_index *x, const char *type, size_t *n);

#endif
