/* fuzz_safetensors.c - arbitrary bytes as a safetensors file and as config.json.
 *
 * LLVMFuzzerTestOneInput is the target for libFuzzer (build with -DTANDEM_LIBFUZZER -fsanitize=fuzzer). Without that the
 * program has a main of its own: a fixed sequence of damaged copies of small valid files, the same on every run.
 *
 *     fuzz_safetensors [RUNS]
 *
 * What must hold: no read outside of the input (the address sanitizer looks), an error has a message, and every tensor
 * that is given out lies within the file and has the bytes that its shape says.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/model_config.h"
#include "worker/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_safetensors: %s\n", what);
    abort();
}

static void check_tensors(const struct safetensors *s, const uint8_t *data, size_t size)
{
    volatile uint8_t sink = 0;
    for (size_t i = 0; i < safetensors_count(s); i++) {
        struct safetensor t;
        struct status st = STATUS_INIT;
        if (safetensors_get(&t, s, safetensors_name(s, i), &st) != ST_OK) {
            require(st.code == ST_UNIMPLEMENTED, "a tensor that is listed is only refused for its dtype");
            continue;
        }
        uint64_t elements = 1;
        for (uint32_t d = 0; d < t.dims; d++)
            elements *= t.shape[d];
        require(elements * mat_elem_bytes(t.dtype) == t.bytes, "bytes follow from the shape");
        require(t.data >= data && t.bytes <= size - (size_t)(t.data - data), "the tensor lies within the file");
        if (t.bytes)
            sink ^= t.data[0] ^ t.data[t.bytes - 1];
    }
    (void)sink;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct status st = STATUS_INIT;
    if (size == 0)
        return 0;
    if (data[0] & 1) {
        struct model_config m;
        const char *text = (const char *)data + 1, *both = data[0] & 2 ? memchr(text, '\n', size - 1) : NULL;
        size_t first = both ? (size_t)(both - text) : size - 1; /* two files stand on two lines */
        if (model_config_parse(&m, text, first, both ? both + 1 : NULL, both ? size - 2 - first : 0, &st) != ST_OK)
            require(st.message[0], "an error has a message");
        else
            require(m.hidden && m.heads && m.heads % m.kv_heads == 0 && m.n_eos <= MODEL_MAX_EOS,
                    "what is accepted is sane");
        return 0;
    }
    struct safetensors *s = NULL;
    if (safetensors_open_memory(&s, data + 1, size - 1, "input", &st) != ST_OK) {
        require(st.message[0] && !s, "an error has a message and no handle");
        return 0;
    }
    check_tensors(s, data + 1, size - 1);
    safetensors_close(s);
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

static const char *const headers[] = {
    "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
    "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[16,24]}}",
    "{\"a\":{\"dtype\":\"F16\",\"shape\":[0,9],\"data_offsets\":[0,0]},"
    "\"b\":{\"dtype\":\"I64\",\"shape\":[3],\"data_offsets\":[0,24]}}",
};
static const char *const configs[] = {
    "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":64,\"intermediate_size\":172,\"num_hidden_layers\":5,"
    "\"num_attention_heads\":8,\"num_key_value_heads\":4,\"vocab_size\":512,\"rms_norm_eps\":1e-5,\"rope_scaling\":"
    "null,"
    "\"eos_token_id\":[1,2]}",
    "{\"eos_token_id\":2,\"do_sample\":true,\"temperature\":0.8,\"top_p\":0.95,\"top_k\":40}",
};
static const char *const pieces[] = {
    "\"",
    "{",
    "}",
    "[",
    "]",
    ",",
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "9223372036854775807",
    "null",
    "true",
    "\"F32\"",
    "\"dtype\"",
    "\"shape\"",
    "\"data_offsets\"",
    "[[[[[[[[",
    "\\u0000",
    "\xff",
};

static size_t seed(uint8_t *out, uint64_t *state)
{
    size_t n = 1;
    uint64_t pick = next_random(state);
    out[0] = (uint8_t)(pick >> 8 & 3);
    if (out[0] & 1) {
        for (size_t i = 0; i < (out[0] & 2 ? 2u : 1u); i++) {
            memcpy(out + n, configs[i], strlen(configs[i]));
            n += strlen(configs[i]);
            if (i == 0)
                out[n++] = '\n';
        }
        return n;
    }
    const char *header = headers[pick & 1];
    uint64_t length = strlen(header);
    for (int i = 0; i < 8; i++)
        out[n++] = (uint8_t)(length >> 8 * i);
    uint8_t *values = mempcpy(out + n, header, length);
    memset(values, 7, 24);
    return (size_t)(values - out) + 24;
}

static size_t damage(uint8_t *data, size_t n, uint64_t *state)
{
    size_t at = 1 + next_random(state) % (n > 1 ? n - 1 : 1);
    const char *piece = pieces[next_random(state) % (sizeof pieces / sizeof *pieces)];
    switch (next_random(state) % 6) {
    case 0: /* a bit */
        data[at] ^= (uint8_t)(1u << next_random(state) % 8);
        return n;
    case 1: /* a byte */
        data[at] = (uint8_t)next_random(state);
        return n;
    case 2: /* the end */
        return at;
    case 3: { /* some bytes taken out */
        size_t gone = next_random(state) % 16 % (n - at + 1);
        memmove(data + at, data + at + gone, n - at - gone);
        return n - gone;
    }
    case 4: /* a digit */
        for (size_t i = at; i < n; i++)
            if (data[i] >= '0' && data[i] <= '9') {
                data[i] = (uint8_t)('0' + next_random(state) % 10);
                break;
            }
        return n;
    default: /* something put in */
        for (const char *c = piece; *c; c++, at++, n++) {
            memmove(data + at + 1, data + at, n - at);
            data[at] = (uint8_t)*c;
        }
        return n;
    }
}

int main(int argc, char **argv)
{
    uint64_t runs = argc > 1 ? strtoull(argv[1], NULL, 10) : 100000, state = 2026;
    static uint8_t work[4096];
    for (uint64_t i = 0; i < runs; i++) {
        size_t n = seed(work, &state);
        for (uint64_t changes = next_random(&state) % 6; changes > 0 && n > 1; changes--)
            n = damage(work, n, &state);
        uint8_t *exact = malloc(n); /* so that a read behind the end is seen */
        memcpy(exact, work, n);
        LLVMFuzzerTestOneInput(exact, n);
        free(exact);
    }
    printf("%llu inputs\n", (unsigned long long)runs);
    return 0;
}
#endif
