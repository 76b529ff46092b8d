/* fuzz_gguf_tokenizer.c - arbitrary bytes as a GGUF file of which the coordinator reads tokenizer and chat template.
 *
 * What must hold: an error has a message and no handle; a tokenizer that is accepted encodes a text to ids of its
 * vocabulary, which decode; a chat is made of whatever the file says.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/chat_internal.h"
#include "coordinator/tokenizer_internal.h"
#include "tests/fuzz/fuzz.h"
#include "tests/gguf_build.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_gguf_tokenizer: %s\n", what);
    abort();
}

static void check_tokenizer(const struct tokenizer *t)
{
    static const char text[] = "ab <s>\xC3\xA9 abab\n 12 \xE2\x96\x81";
    struct status st = STATUS_INIT;
    uint32_t *ids = NULL;
    size_t n = 0, len = 0;
    char *back = NULL;
    if (tok_encode(t, text, sizeof text - 1, TOK_ADD_SPECIAL, &ids, &n, &st) != ST_OK) {
        require(st.message[0] && !ids, "an error has a message and no ids");
        return;
    }
    for (size_t i = 0; i < n; i++)
        require(ids[i] < tok_vocab_size(t), "ids lie in the vocabulary");
    require(tok_decode(t, ids, n, 0, &back, &len, &st) == ST_OK && tok_utf8_check(back, len) == len,
            "known ids decode to UTF-8");
    free(back);
    free(ids);
}

static void check_chat(const struct gguf *g)
{
    json_t *config = chat_gguf_config(g), *messages = json_loads("[{\"role\":\"user\",\"content\":\"U\"}]", 0, NULL);
    struct chat *c = NULL;
    struct status st = STATUS_INIT;
    char *text = NULL;
    size_t bytes = 0;
    require(config && chat_from_config(&c, config, &st) == ST_OK, "there is a chat");
    if (chat_render(c, &(struct chat_prompt){.messages = messages}, &text, &bytes, &st) != ST_OK)
        require(st.message[0] && !text, "an error has a message and no text");
    free(text);
    chat_free(c);
    json_decref(messages);
    json_decref(config);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct status st = STATUS_INIT;
    struct gguf *g = NULL;
    struct tokenizer *t = NULL;
    if (size == 0 || gguf_open_memory(&g, data, size, "input", &st) != ST_OK)
        return 0; /* fuzz_gguf looks at these */
    if (tok_gguf_create(&t, g, &st) == ST_OK)
        check_tokenizer(t);
    else
        require(st.message[0] && !t, "an error has a message and no handle");
    tok_free(t);
    check_chat(g);
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

#define MODEL "tokenizer.ggml."

static void put_strings(struct build *b, const char *key, const char *const *v, size_t n)
{
    build_array(b, key, GGUF_STRING, n);
    for (size_t i = 0; i < n; i++)
        build_text(b, v[i]);
}

static void put_common(struct build *b, const char *model, const char *const *tokens, const int *types, size_t n)
{
    build_string(b, MODEL "model", model);
    put_strings(b, MODEL "tokens", tokens, n);
    build_array(b, MODEL "token_type", GGUF_INT32, n);
    for (size_t i = 0; i < n; i++)
        build_number(b, (uint64_t)types[i], 4);
    build_u32(b, MODEL "bos_token_id", 1);
    build_u32(b, MODEL "eos_token_id", 2);
    build_bool(b, MODEL "add_eos_token", 1);
    build_string(b, "tokenizer.chat_template", "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}");
}
#define COMMON 7

static struct build sentencepiece(void)
{
    static const char *const tokens[] = {"<unk>",
                                         "<s>",
                                         "</s>",
                                         "<0xC3>",
                                         "<0xA9>",
                                         "\xE2\x96\x81",
                                         "a",
                                         "b",
                                         "ab",
                                         "\xE2\x96\x81"
                                         "ab",
                                         "[u]",
                                         "gone"};
    static const int types[] = {2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 4, 5};
    enum { N = sizeof types / sizeof *types };
    struct build b = build_start(3, 0, COMMON + 3);
    put_common(&b, "llama", tokens, types, N);
    build_array(&b, MODEL "scores", GGUF_FLOAT32, N);
    for (size_t i = 0; i < N; i++) {
        float score = -(float)i;
        build_raw(&b, &score, sizeof score);
    }
    build_u32(&b, MODEL "unknown_token_id", 0);
    build_bool(&b, MODEL "add_space_prefix", 1);
    return b;
}

static struct build byte_level(void)
{
    static const char *const tokens[] = {"\xC4\xA0",
                                         "<s>",
                                         "</s>",
                                         "\xC3\x83",
                                         "\xC2\xA9",
                                         "a",
                                         "b",
                                         "ab",
                                         "\xC4\xA0"
                                         "ab"};
    static const int types[] = {1, 3, 3, 1, 1, 1, 1, 1, 1};
    static const char *const merges[] = {"a b", "\xC4\xA0 ab"};
    struct build b = build_start(3, 0, COMMON + 2);
    put_common(&b, "gpt2", tokens, types, sizeof types / sizeof *types);
    build_string(&b, MODEL "pre", "llama-bpe");
    put_strings(&b, MODEL "merges", merges, 2);
    return b;
}

static struct build as_text(void)
{
    struct build b = build_start(3, 0, 1);
    build_string(&b, "tokenizer.huggingface.json",
                 "{\"version\":\"1.0\",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},"
                 "\"merges\":[\"a b\"]}}");
    return b;
}

static size_t damage(uint8_t *data, size_t n, uint64_t *state)
{
    static const uint8_t bytes[] = {0, 1, 2, 8, 9, 0x7f, 0x80, 0xff};
    size_t at = next_random(state) % n, gone = next_random(state) % 12 % (n - at);
    switch (next_random(state) % 4) {
    case 0:
        data[at] ^= (uint8_t)(1u << next_random(state) % 8);
        return n;
    case 1:
        data[at] = bytes[next_random(state) % sizeof bytes];
        return n;
    case 2: /* a word for another of the same length, so that the file stays one */
        memset(data + at, next_random(state) % 2 ? 'a' : 0, gone);
        return n;
    default:
        memmove(data + at, data + at + gone, n - at - gone);
        return n - gone;
    }
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 20000);
    uint64_t state = 2026;
    struct build seeds[] = {sentencepiece(), byte_level(), as_text()};
    for (size_t i = 0; i < 3; i++) {
        struct status st = STATUS_INIT;
        struct gguf *g = NULL;
        struct tokenizer *t = NULL;
        bool good = gguf_open_memory(&g, seeds[i].data, seeds[i].bytes, "seed", &st) == ST_OK &&
                    tok_gguf_create(&t, g, &st) == ST_OK;
        require(good, st.message);
        tok_free(t);
        gguf_close(g);
    }
    for (long i = 0; i < runs; i++) {
        const struct build *b = &seeds[i % 3];
        uint8_t *work = malloc(b->bytes);
        size_t n = b->bytes;
        require(work != NULL, "memory");
        memcpy(work, b->data, n);
        for (uint64_t times = next_random(&state) % 3; times && n > 1; times--)
            n = damage(work, n, &state);
        fuzz_one(work, n);
        free(work);
    }
    for (size_t i = 0; i < 3; i++)
        build_free(&seeds[i]);
    return 0;
}

#endif
