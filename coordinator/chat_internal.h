/* chat_internal.h - between chat*.c. */
#ifndef TANDEM_CHAT_INTERNAL_H
#define TANDEM_CHAT_INTERNAL_H

#include <jansson.h>

#include "coordinator/chat.h"

const char *chat_named_template(const char *name); /* NULL: no such name */

/* The template and the special tokens of a GGUF file, named as in tokenizer_config.json; to be given back with
 * json_decref. */
json_t *chat_gguf_config(const char *path);

#endif
