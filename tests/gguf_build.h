/* gguf_build.h - GGUF files in memory, right and wrong, for tests. Prefix build_. Errors abort the test program.
 *
 *     struct build b = build_start(3, 1, 2);                        version, tensors, values: what the header claims
 *     build_u32(&b, "general.alignment", 32);  build_string(&b, "a", "text");
 *     build_tensor(&b, "t", 2, (uint64_t[]){4, 2}, GGUF_F32, 0);
 *     build_data(&b, 32, 32);                                       alignment, bytes
 *     ... b.data, b.bytes ...   build_free(&b);
 */
#ifndef TANDEM_TESTS_GGUF_BUILD_H
#define TANDEM_TESTS_GGUF_BUILD_H

#include <stddef.h>
#include <stdint.h>

#include "proto/gguf.h"

struct build {
    uint8_t *data;
    size_t bytes, room;
};

struct build build_start(uint32_t version, uint64_t tensors, uint64_t values);
void build_free(struct build *b);

void build_raw(struct build *b, const void *data, size_t bytes);
void build_number(struct build *b, uint64_t x, unsigned bytes); /* little-endian */
void build_text(struct build *b, const char *text);             /* length and bytes */

/* Values, with their keys. */
void build_key(struct build *b, const char *key, uint32_t kind);
void build_u32(struct build *b, const char *key, uint32_t x);
void build_f32(struct build *b, const char *key, float x);
void build_bool(struct build *b, const char *key, unsigned x);
void build_string(struct build *b, const char *key, const char *text);
void build_array(struct build *b, const char *key, uint32_t kind, uint64_t count); /* the elements follow */

void build_tensor(struct build *b, const char *name, uint32_t dims, const uint64_t *shape, uint32_t type,
                  uint64_t offset);
/* Padding, then so many bytes counting up. */
void build_data(struct build *b, size_t alignment, size_t bytes);

/* The metadata of a one-layer model of the architecture: hidden 64, 2 heads of 32, 4 tokens. */
void build_model(struct build *b, const char *arch);
#define BUILD_MODEL_VALUES 9

#endif
