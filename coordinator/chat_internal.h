/* chat_internal.h - between chat*.c. */
#ifndef TANDEM_CHAT_INTERNAL_H
#define TANDEM_CHAT_INTERNAL_H

#include <jansson.h>

#include "coordinator/chat.h"

const char *chat_named_template(const char *name); /* NULL: no such name */

/* What chat_load makes of a tokenizer_config.json (NULL: none) where no file has a template. */
STATUS_MUST_CHECK enum status_code chat_from_config(struct chat **out, const json_t *config, struct status *st);

/* The template and the special tokens of a GGUF file, named as in tokenizer_config.json; to be given back with
 * json_decref. */
struct gguf;
json_t *chat_gguf_config(const struct gguf *g);
json_t *chat_gguf_load(const char *path);

#endif
