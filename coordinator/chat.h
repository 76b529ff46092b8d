/* chat.h - from the messages of a chat to the text of a prompt, by the model's chat template. Prefix chat_.
 *
 *     chat_load(&c, "/models/demo", NULL, st);                   // the model's own template
 *     chat_render(c, &(struct chat_prompt){ .messages = ..., .add_generation_prompt = true }, &text, &bytes, st);
 *     tok_encode(tok, text, bytes, 0, ...);                      // the template writes its special tokens itself
 *
 * As apply_chat_template of Hugging Face Transformers: a template sees messages, tools, documents, add_generation_prompt,
 * the special tokens of tokenizer_config.json by their names (bos_token ...) and the caller's own arguments.
 *
 * Threads: a struct chat does not change after load; any number may render.
 */
#ifndef TANDEM_CHAT_H
#define TANDEM_CHAT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "proto/status.h"

struct chat;

/* Templates by name, for models whose folder has none: "chatml" (Qwen, SmolLM2), "llama2", "llama3", "mistral".
 * NULL ends the list. */
extern const char *const chat_names[];

/* choice: a name, or the path of a file with a template (it has a "/" or ends in .jinja), or NULL: the model's own, from
 * DIR/chat_template.jinja, else chat_template of DIR/tokenizer_config.json.
 *
 * A choice that is not there or does not compile is an error (NOT_FOUND, INVALID_ARGUMENT, UNIMPLEMENTED). A model whose own
 * template is missing or does not compile is none: chat_status says what chat_render will answer. */
STATUS_MUST_CHECK enum status_code chat_load(struct chat **out, const char *dir, const char *choice, struct status *st);
void chat_free(struct chat *c); /* NULL is fine */
/* OK: chats are served. Else why not: FAILED_PRECONDITION (no template), UNIMPLEMENTED (names the construct). */
const struct status *chat_status(const struct chat *c);
/* What the template has that will be refused where a chat reaches it (jinja_lacks); NULL: nothing. */
const char *chat_lacks(const struct chat *c);

struct chat_prompt {
    const json_t *messages;     /* an array of objects with "role" and "content" */
    const json_t *tools;        /* an array, or NULL */
    const json_t *arguments;    /* an object of further names, or NULL */
    bool add_generation_prompt; /* the text ends where the assistant begins to speak */
    bool continue_final;        /* the text ends with the last message, to be continued; not with the former */
};

/* *text: UTF-8 with a NUL behind, the caller frees it. INVALID_ARGUMENT: the template refuses the messages (its own
 * words), or needs something of them that they lack; else as chat_status and jinja_render say. */
STATUS_MUST_CHECK enum status_code chat_render(const struct chat *c, const struct chat_prompt *p, char **text,
                                               size_t *bytes, struct status *st);

#endif
