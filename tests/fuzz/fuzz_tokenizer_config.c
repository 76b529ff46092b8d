/* fuzz_tokenizer_config.c - arbitrary bytes as tokenizer_config.json, as the tokenizer and the chats read it.
 *
 * What must hold: an error has a message; a chat is made of whatever is JSON, and it either says why it serves none or
 * renders a prompt, the same twice and UTF-8, or says why not.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/chat_internal.h"
#include "coordinator/tokenizer_internal.h"
#include "tests/fuzz/fuzz.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_tokenizer_config: %s\n", what);
    abort();
}

/* A tokenizer with the added tokens that the seeds speak of; made once, it does not change. */
static const struct tokenizer *tiny(void)
{
    static const char text[] =
        "{\"version\":\"1.0\",\"added_tokens\":[{\"id\":3,\"content\":\"<s>\",\"single_word\":false,\"lstrip\":false,"
        "\"rstrip\":false,\"normalized\":false,\"special\":true},{\"id\":4,\"content\":\"</s>\",\"single_word\":false,"
        "\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":true}],\"model\":{\"type\":\"BPE\","
        "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]}}";
    static struct tokenizer *t;
    if (!t) {
        json_t *root = json_loads(text, 0, NULL);
        require(tok_create(&t, root, NULL) == ST_OK, "the tokenizer is good");
        json_decref(root);
    }
    return t;
}

static void render(const struct chat *c, const struct chat_prompt *p)
{
    struct status st = STATUS_INIT;
    char *text[2] = {NULL, NULL};
    size_t bytes[2] = {0, 0};
    for (int i = 0; i < 2; i++) {
        enum status_code rc = chat_render(c, p, &text[i], &bytes[i], &st);
        require(rc == ST_OK ? text[i] && !text[i][bytes[i]] : st.message[0] && !text[i],
                "an error has a message and no text");
        require(rc != ST_INTERNAL, "nothing breaks inside");
    }
    if (text[0]) {
        require(text[1] != NULL, "renders again");
        require(tok_utf8_check(text[0], bytes[0]) == bytes[0], "the text is UTF-8");
    }
    free(text[0]);
    free(text[1]);
}

static void check_chat(const json_t *config)
{
    static const char messages[] =
        "[{\"role\":\"system\",\"content\":\"S\"},{\"role\":\"user\",\"content\":\" h\\u00e9 "
        "\"},{\"role\":\"assistant\",\"content\":\"yes \"}]";
    static const char tools[] =
        "[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"x\":[1,null]}}}]";
    struct chat *c = NULL;
    struct status st = STATUS_INIT;
    require(chat_from_config(&c, config, &st) == ST_OK && c, "whatever the file says, there is a chat");
    json_t *m = json_loads(messages, 0, NULL), *t = json_loads(tools, 0, NULL);
    require(chat_status(c)->code == ST_OK || chat_status(c)->message[0], "why there are no chats is said");
    render(c, &(struct chat_prompt){.messages = m, .add_generation_prompt = true});
    render(c, &(struct chat_prompt){.messages = m, .tools = t});
    render(c, &(struct chat_prompt){.messages = m, .continue_final = true});
    json_decref(m);
    json_decref(t);
    chat_free(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    json_error_t err;
    struct status st = STATUS_INIT;
    json_t *root =
        json_loadb((const char *)data, size, JSON_DECODE_INT_AS_REAL | JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &err);
    if (json_is_object(root) && tok_check_config(tiny(), root, &st) != ST_OK)
        require(st.message[0], "an error has a message");
    if (root)
        check_chat(root);
    json_decref(root);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

#define TOKENS                                                                                                         \
    "\"added_tokens_decoder\":{\"3\":{\"content\":\"<s>\",\"special\":true},\"4\":{\"content\":\"</s>\"}},"            \
    "\"bos_token\":\"<s>\",\"eos_token\":{\"content\":\"</s>\",\"lstrip\":false},\"pad_token\":null,"                  \
    "\"model_max_length\":1000000000000000019884624838656,"

static const char *const SEEDS[] = {
    "{" TOKENS "\"chat_template\":\"{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content|trim }}{{ "
    "eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}\"}",
    "{" TOKENS "\"chat_template\":[{\"name\":\"default\",\"template\":\"{{ messages[-1].content }}\"},{\"name\":"
    "\"tool_use\",\"template\":\"{{ tools|tojson }}{{ messages[0].content }}\"},{\"name\":\"rag\",\"template\":1}]}",
    "{" TOKENS "\"chat_template\":\"{% if messages[0].role == 'x' %}{{ raise_exception('no ' ~ unk_token) }}{% endif "
    "%}{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}{{ m.content }}{% "
    "endfor %}{{ ns.n }}\"}",
    "{\"added_tokens_decoder\":null,\"unk_token\":\"\\u00e9\",\"cls_token\":{\"content\":1},\"chat_template\":null}",
};
static const char *const PIECES[] = {
    "null",        "true",     "0",  "-1", "1e999", "\"\"", "[]", "{}", "[[[[", "\\u0000", "\\ud800",
    "\"default\"", "\"</s>\"", "{{", "}}", "{%",    "%}",   "\"", "\\", "\xff", "3",       "99999999999999999999",
};

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

/* Some bytes taken out and a piece, or a piece of another seed, put in. */
static size_t damage(char *data, size_t n, size_t room, uint64_t *state)
{
    const char *other = SEEDS[next_random(state) % (sizeof SEEDS / sizeof *SEEDS)];
    const char *piece = PIECES[next_random(state) % (sizeof PIECES / sizeof *PIECES)];
    size_t at = next_random(state) % n, gone = next_random(state) % 24 % (n - at), len = strlen(piece);
    if (next_random(state) % 3 == 0) {
        piece = other + next_random(state) % strlen(other);
        len = strnlen(piece, next_random(state) % 64);
    }
    if (n - gone + len > room)
        return n;
    memmove(data + at + len, data + at + gone, n - at - gone);
    memcpy(data + at, piece, len);
    return n - gone + len;
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 20000);
    uint64_t state = 2026;
    static char work[4096];
    for (long i = 0; i < runs; i++) {
        const char *seed = SEEDS[(size_t)i % (sizeof SEEDS / sizeof *SEEDS)];
        size_t n = strlen(seed);
        memcpy(work, seed, n);
        for (uint64_t times = next_random(&state) % 4; times && n > 1; times--)
            n = damage(work, n, sizeof work, &state);
        fuzz_one(work, n);
    }
    tok_free((struct tokenizer *)tiny());
    return 0;
}

#endif
