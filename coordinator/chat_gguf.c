/* chat_gguf.c - what a GGUF file's metadata say of chats, in the form of a tokenizer_config.json. Like that file it is read
 * once more by the tokenizer, which says what is wrong with it: here what cannot be used is not there. */
#include <jansson.h>

#include "coordinator/chat_internal.h"
#include "proto/gguf.h"

/* The text of token `id`; NULL when there is none. */
static json_t *token_text(const struct gguf *g, uint32_t id)
{
    struct gguf_array tokens = {0};
    struct gguf_string text = {"", 0};
    if (gguf_read_array(g, "tokenizer.ggml.tokens", GGUF_STRING, &tokens, NULL) != ST_OK || id >= tokens.count)
        return NULL;
    for (uint32_t i = 0; i <= id; i++)
        text = gguf_next_string(&tokens);
    return json_stringn(text.at, text.bytes); /* NULL where it is no UTF-8 */
}

json_t *chat_gguf_config(const struct gguf *g)
{
    static const char *const names[][2] = {
        {"tokenizer.ggml.bos_token_id", "bos_token"},
        {"tokenizer.ggml.eos_token_id", "eos_token"},
        {"tokenizer.ggml.unknown_token_id", "unk_token"},
    };
    struct gguf_string chat = {"", 0};
    json_t *config = json_object();
    if (gguf_read_string(g, "tokenizer.chat_template", &chat, NULL) == ST_OK && chat.bytes)
        json_object_set_new(config, "chat_template", json_stringn(chat.at, chat.bytes));
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        uint32_t id = UINT32_MAX;
        if (gguf_read_uint(g, names[i][0], 0, UINT32_MAX - 1, &id, NULL) == ST_OK && id != UINT32_MAX)
            json_object_set_new(config, names[i][1], token_text(g, id));
    }
    return config;
}

json_t *chat_gguf_load(const char *path)
{
    struct gguf *g;
    if (gguf_open(&g, path, NULL) != ST_OK)
        return NULL;
    json_t *config = chat_gguf_config(g);
    gguf_close(g);
    return config;
}
