/* fuzz_gguf.c - arbitrary bytes as a GGUF file: its header, the configuration of a model, every value and tensor.
 *
 * What must hold: no read outside of the input (the address sanitizer looks), an error has a message, every tensor lies
 * within the file, and what is accepted as a model is sane.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"
#include "tests/gguf_build.h"
#include "worker/model_config.h"
#include "worker/quant.h"

static void require(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_gguf: %s\n", what);
    abort();
}

static void walk(const struct gguf *g, const uint8_t *data, size_t size)
{
    volatile float sink = 0;
    float out[32];
    for (size_t i = 0; i < gguf_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(g, i);
        require(gguf_tensor_find(g, t->name) == t, "a tensor is found by its name");
        require(t->offset <= size && t->bytes <= size - t->offset, "the tensor lies within the file");
        const struct quant *q = quant_find(t->type);
        if (q && t->bytes) {
            uint32_t cols = t->shape[0] < 1000 ? (uint32_t)t->shape[0] : 1000;
            uint32_t first = cols < 45 ? 0 : cols - 32;
            quant_row(q, out, data + t->offset, first, cols - first < 32 ? cols - first : 32);
            sink += out[0];
        }
    }
    struct gguf_array a = {0};
    for (struct status st = STATUS_INIT; gguf_read_array(g, "strings", GGUF_STRING, &a, &st) == ST_OK && a.count;) {
        while (a.count) {
            struct gguf_string s = gguf_next_string(&a);
            sink += s.bytes ? (float)s.at[s.bytes - 1] : 0;
        }
        break;
    }
    (void)sink;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct status st = STATUS_INIT;
    struct gguf *g = NULL;
    if (size == 0)
        return 0;
    if (gguf_open_memory(&g, data, size, "input", &st) != ST_OK) {
        require(st.message[0] && !g, "an error has a message and no handle");
        return 0;
    }
    walk(g, data, size);
    struct model_config m;
    if (model_config_from_gguf(&m, g, &st) != ST_OK)
        require(st.message[0], "an error has a message");
    else
        require(m.hidden && m.heads && m.heads % m.kv_heads == 0 && m.head_dim && m.vocab_size &&
                    m.n_eos <= MODEL_MAX_EOS,
                "what is accepted is sane");
    gguf_close(g);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

/* A model with values of many kinds and tensors of many types. */
static struct build seed(void)
{
    static const uint32_t types[] = {GGUF_F32, GGUF_Q4_0, GGUF_Q5_1, GGUF_Q8_0, GGUF_Q2_K, GGUF_Q6_K, 99};
    enum { TYPES = sizeof types / sizeof *types };
    struct build b = build_start(3, 1 + TYPES, BUILD_MODEL_VALUES + 5);
    build_model(&b, "llama");
    build_string(&b, "llama.rope.scaling.type", "yarn");
    build_f32(&b, "llama.rope.scaling.factor", 2.0f);
    build_u32(&b, "tokenizer.ggml.eos_token_id", 2);
    build_array(&b, "strings", GGUF_STRING, 2);
    build_text(&b, "first");
    build_text(&b, "second");
    build_array(&b, "numbers", GGUF_INT64, 1);
    build_number(&b, 5, 8);
    uint64_t at = 512;
    build_tensor(&b, "token_embd.weight", 2, (uint64_t[]){64, 4}, GGUF_F16, 0);
    for (size_t i = 0; i < TYPES; i++) {
        char name[8];
        snprintf(name, sizeof name, "t%zu", i);
        build_tensor(&b, name, 1, (uint64_t[]){256}, types[i], at);
        const struct gguf_type_info *info = gguf_type_find(types[i]);
        at += info ? (256 / info->block_values * info->block_bytes + 31) / 32 * 32 : 0;
    }
    build_data(&b, 32, at);
    return b;
}

static size_t damage(uint8_t *data, size_t n, size_t header, uint64_t *state)
{
    static const uint64_t numbers[] = {
        0, 1, 3, 8, 9, 255, 1u << 31, UINT32_MAX, 1ull << 62, UINT64_MAX, UINT64_MAX - 31};
    size_t at = next_random(state) % (next_random(state) % 8 ? header < n ? header : n : n);
    uint64_t x = numbers[next_random(state) % (sizeof numbers / sizeof *numbers)];
    size_t width = (size_t)1 << next_random(state) % 4;
    switch (next_random(state) % 5) {
    case 0: /* a bit */
        data[at] ^= (uint8_t)(1u << next_random(state) % 8);
        return n;
    case 1: /* a byte */
        data[at] = (uint8_t)next_random(state);
        return n;
    case 2: /* a number */
        for (size_t i = 0; i < width && at + i < n; i++)
            data[at + i] = (uint8_t)(x >> 8 * i);
        return n;
    case 3: /* the end */
        return at ? at : 1;
    default: { /* some bytes taken out */
        size_t gone = next_random(state) % 16 % (n - at);
        memmove(data + at, data + at + gone, n - at - gone);
        return n - gone;
    }
    }
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 300000);
    uint64_t state = 2026;
    struct build b = seed();
    struct gguf *g = NULL;
    struct model_config m;
    require(gguf_open_memory(&g, b.data, b.bytes, "seed", NULL) == ST_OK &&
                model_config_from_gguf(&m, g, NULL) == ST_OK && gguf_tensors(g) == 8,
            "the file that is damaged is good");
    gguf_close(g);
    size_t header = b.bytes > 2400 ? b.bytes - 2400 : b.bytes;
    uint8_t *work = malloc(b.bytes);
    for (long i = 0; i < runs; i++) {
        size_t n = b.bytes;
        memcpy(work, b.data, n);
        for (uint64_t changes = i ? 1 + next_random(&state) % 3 : 0; changes > 0 && n > 1; changes--)
            n = damage(work, n, header, &state);
        fuzz_one(work, n);
    }
    free(work);
    build_free(&b);
    return 0;
}
#endif
