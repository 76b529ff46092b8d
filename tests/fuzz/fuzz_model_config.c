/* fuzz_model_config.c - arbitrary bytes as config.json and generation_config.json of a model.
 *
 * An input is a config.json, and behind a NUL a generation_config.json; without a NUL there is none. What must hold: an
 * error has a message, and what is accepted keeps the limits that the engine computes with.
 */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"
#include "worker/model_config.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_model_config: %s\n", what);
    abort();
}

static void check_sane(const struct model_config *m)
{
    require(m->hidden && m->inner && m->layers && m->layers <= MODEL_MAX_LAYERS && m->vocab_size, "a shape");
    require(m->heads && m->kv_heads && m->heads % m->kv_heads == 0 && m->head_dim && m->head_dim % 8 == 0, "heads");
    require(m->max_context && isfinite(m->norm_eps) && m->norm_eps > 0, "context and norm");
    require(m->n_eos <= MODEL_MAX_EOS && m->bos_id < (int64_t)m->vocab_size, "special ids");
    for (uint32_t i = 0; i < m->n_eos; i++)
        require(m->eos_ids[i] < m->vocab_size, "eos ids");
    require(isfinite(m->temperature) && m->temperature >= 0 && m->top_p > 0 && m->top_p <= 1, "sampling");
    for (uint32_t i = 0; i < m->layers; i++)
        require(model_window(m, i) == 0 || model_window(m, i) == m->window, "windows");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct status st = STATUS_INIT;
    struct model_config m;
    const char *text = (const char *)data, *end = size ? memchr(text, 0, size) : NULL;
    size_t first = end ? (size_t)(end - text) : size;
    if (model_config_parse(&m, text, first, end ? end + 1 : NULL, end ? size - first - 1 : 0, &st) != ST_OK)
        require(st.message[0], "an error has a message");
    else
        check_sane(&m);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

#define SHAPE                                                                                                          \
    "\"hidden_size\":64,\"intermediate_size\":172,\"num_hidden_layers\":5,\"num_attention_heads\":8,"                  \
    "\"num_key_value_heads\":4,\"vocab_size\":512,\"rms_norm_eps\":1e-5,\"max_position_embeddings\":4096,"

static const char *const CONFIGS[] = {
    "{\"architectures\":[\"LlamaForCausalLM\"]," SHAPE "\"rope_scaling\":null,\"eos_token_id\":[1,2]}",
    "{\"architectures\":[\"LlamaForCausalLM\"]," SHAPE "\"attention_bias\":true,\"mlp_bias\":false,\"rope_theta\":5e5,"
    "\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
    "\"original_max_position_embeddings\":8192}}",
    "{\"architectures\":[\"Qwen2ForCausalLM\"]," SHAPE "\"use_sliding_window\":true,\"sliding_window\":128,"
    "\"max_window_layers\":2,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4.0,"
    "\"original_max_position_embeddings\":1024}}",
    "{\"architectures\":[\"Qwen3ForCausalLM\"]," SHAPE "\"head_dim\":16,\"tie_word_embeddings\":true,"
    "\"layer_types\":[\"full_attention\",\"full_attention\",\"full_attention\",\"full_attention\",\"full_attention\"]}",
    "{\"architectures\":[\"MistralForCausalLM\"]," SHAPE "\"sliding_window\":256,\"hidden_act\":\"silu\","
    "\"bos_token_id\":1,\"eos_token_id\":2,\"torch_dtype\":\"bfloat16\",\"rope_scaling\":{\"type\":\"linear\","
    "\"factor\":2.0}}",
};
static const char GENERATION[] = "{\"eos_token_id\":2,\"bos_token_id\":1,\"do_sample\":true,\"temperature\":0.8,"
                                 "\"top_p\":0.95,\"top_k\":40,\"min_p\":0.05,\"typical_p\":0.9,"
                                 "\"repetition_penalty\":1.1}";
static const char *const PIECES[] = {
    "\"",
    "{",
    "}",
    "[",
    "]",
    ",",
    "-1",
    "0",
    "1e999",
    "1e-999",
    "1.5",
    "18446744073709551616",
    "9223372036854775807",
    "4294967296",
    "null",
    "true",
    "[[[[[[[[",
    "\\u0000",
    "\xff",
    "\"yarn\"",
    "\"sliding_attention\"",
};

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

/* The value that begins behind the next colon, or what stands at `at`, becomes another. */
static size_t damage(char *data, size_t n, size_t room, uint64_t *state)
{
    size_t at = next_random(state) % n, gone = 0;
    const char *piece = PIECES[next_random(state) % (sizeof PIECES / sizeof *PIECES)];
    size_t len = strlen(piece);
    switch (next_random(state) % 4) {
    case 0:
        data[at] = (char)next_random(state);
        return n;
    case 1:
        gone = next_random(state) % 16 % (n - at);
        len = 0;
        break;
    default: {
        char *colon = memchr(data + at, ':', n - at);
        if (colon) {
            at = (size_t)(colon - data) + 1;
            while (at + gone < n && !strchr(",}", data[at + gone]))
                gone++;
        }
    }
    }
    if (n - gone + len > room)
        return n;
    memmove(data + at + len, data + at + gone, n - at - gone);
    memcpy(data + at, piece, len);
    return n - gone + len;
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 50000);
    uint64_t state = 2026;
    static char work[4096];
    for (long i = 0; i < runs; i++) {
        const char *config = CONFIGS[(size_t)i % (sizeof CONFIGS / sizeof *CONFIGS)];
        size_t n = strlen(config) + 1;
        memcpy(work, config, n); /* with its NUL */
        memcpy(work + n, GENERATION, strlen(GENERATION));
        n += strlen(GENERATION);
        for (uint64_t times = next_random(&state) % 4; times && n > 1; times--)
            n = damage(work, n, sizeof work, &state);
        fuzz_one(work, n);
    }
    return 0;
}

#endif
