#include "tests/gguf_build.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void build_raw(struct build *b, const void *data, size_t bytes)
{
    if (b->bytes + bytes > b->room) {
        b->room = 2 * (b->bytes + bytes);
        b->data = realloc(b->data, b->room);
        if (!b->data)
            abort();
    }
    if (bytes)
        memcpy(b->data + b->bytes, data, bytes);
    b->bytes += bytes;
}

void build_number(struct build *b, uint64_t x, unsigned bytes)
{
    uint8_t out[8];
    for (unsigned i = 0; i < bytes; i++)
        out[i] = (uint8_t)(x >> 8 * i);
    build_raw(b, out, bytes);
}

void build_text(struct build *b, const char *text)
{
    build_number(b, strlen(text), 8);
    build_raw(b, text, strlen(text));
}

struct build build_start(uint32_t version, uint64_t tensors, uint64_t values)
{
    struct build b = {0};
    build_raw(&b, "GGUF", 4);
    build_number(&b, version, 4);
    build_number(&b, tensors, 8);
    build_number(&b, values, 8);
    return b;
}

void build_free(struct build *b)
{
    free(b->data);
    *b = (struct build){0};
}

void build_key(struct build *b, const char *key, uint32_t kind)
{
    build_text(b, key);
    build_number(b, kind, 4);
}

void build_u32(struct build *b, const char *key, uint32_t x)
{
    build_key(b, key, GGUF_UINT32);
    build_number(b, x, 4);
}

void build_f32(struct build *b, const char *key, float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    build_key(b, key, GGUF_FLOAT32);
    build_number(b, bits, 4);
}

void build_bool(struct build *b, const char *key, unsigned x)
{
    build_key(b, key, GGUF_BOOL);
    build_number(b, x, 1);
}

void build_string(struct build *b, const char *key, const char *text)
{
    build_key(b, key, GGUF_STRING);
    build_text(b, text);
}

void build_array(struct build *b, const char *key, uint32_t kind, uint64_t count)
{
    build_key(b, key, GGUF_ARRAY);
    build_number(b, kind, 4);
    build_number(b, count, 8);
}

void build_tensor(struct build *b, const char *name, uint32_t dims, const uint64_t *shape, uint32_t type,
                  uint64_t offset)
{
    build_text(b, name);
    build_number(b, dims, 4);
    for (uint32_t i = 0; i < dims; i++)
        build_number(b, shape[i], 8);
    build_number(b, type, 4);
    build_number(b, offset, 8);
}

void build_data(struct build *b, size_t alignment, size_t bytes)
{
    while (b->bytes % alignment)
        build_number(b, 0, 1);
    for (size_t i = 0; i < bytes; i++)
        build_number(b, i & 255, 1);
}

void build_model(struct build *b, const char *arch)
{
    static const struct {
        const char *name;
        uint32_t value;
    } numbers[] = {
        {"embedding_length", 64},    {"feed_forward_length", 96},    {"block_count", 1},
        {"attention.head_count", 2}, {"attention.head_count_kv", 1}, {"context_length", 128},
    };
    char key[80];
    build_string(b, "general.architecture", arch);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        snprintf(key, sizeof key, "%s.%s", arch, numbers[i].name);
        build_u32(b, key, numbers[i].value);
    }
    snprintf(key, sizeof key, "%s.attention.layer_norm_rms_epsilon", arch);
    build_f32(b, key, 1e-5f);
    snprintf(key, sizeof key, "%s.rope.freq_base", arch);
    build_f32(b, key, 10000.0f);
}
