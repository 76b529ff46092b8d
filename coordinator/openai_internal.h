/* openai_internal.h - what the files of openai*.c share. */
#ifndef TANDEM_OPENAI_INTERNAL_H
#define TANDEM_OPENAI_INTERNAL_H

#include <jansson.h>

#include "coordinator/openai.h"

/* A body on its way to a request. */
struct openai_taker {
    struct openai_form *form;
    Tandem__V1__GenerateRequest *m;
    Tandem__V1__Chat *chat; /* of m; NULL for a completion */
    bool messages, stream_options, top_logprobs, no_tools;
    long long best_of;
};

/* jansson found no memory; it does not always say so. */
static inline bool openai_no_memory(const json_error_t *e)
{
    return json_error_code(e) == json_error_out_of_memory || !e->text[0];
}

/* A string as bytes, malloc'ed; *to is empty before. */
STATUS_MUST_CHECK enum status_code openai_bytes(ProtobufCBinaryData *to, const json_t *v, const char *name,
                                                struct status *st);
/* A value as JSON text in a string field, in place of what it holds. */
STATUS_MUST_CHECK enum status_code openai_dump(char **to, const json_t *v, const char *name, struct status *st);
void openai_dump_free(char **to);
/* openai_messages.c */
STATUS_MUST_CHECK enum status_code openai_messages(Tandem__V1__Chat *chat, const json_t *v, struct status *st);

#endif
