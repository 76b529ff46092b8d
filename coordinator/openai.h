/* openai.h - OpenAI's HTTP API over the messages of tandem.v1: bodies to requests, answers to bodies. Prefix openai_.
 *
 *     openai_parse(OPENAI_CHAT, body, len, &form, &request, st);        // one GenerateRequest, checked by the server as any
 *     openai_reply_create(&reply, &form, &context, st);
 *     openai_reply_add(reply, response, st);  ...                       // in the order in which they come
 *     openai_reply_take(reply, &text, &len);                            // form.stream: events, as they come
 *     openai_reply_end(reply, st); openai_reply_take(...);              // the rest of them; else the whole body
 *
 * No socket, thread or clock in here. Names of fields are those of OpenAI, and those that vLLM added to them.
 */
#ifndef TANDEM_OPENAI_H
#define TANDEM_OPENAI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "coordinator/json_text.h"
#include "coordinator/tokenizer.h"
#include "proto/status.h"
#include "tandem/v1/inference.pb-c.h"

enum openai_kind { OPENAI_COMPLETION, OPENAI_CHAT };

#define OPENAI_COMPLETION_TOKENS 16 /* max_tokens of a completion that says nothing; a chat gets the server's default */

/* How the answer is to look. */
struct openai_form {
    enum openai_kind kind;
    bool stream, include_usage;
    bool logprobs;
    bool echo;
    bool max_completion_tokens; /* the limit was called so */
    uint32_t n;                 /* answers */
};

/* INVALID_ARGUMENT: "field: why", the field as the client calls it; unknown fields are one, too, as at OpenAI. A field whose
 * value is null counts as not given. *out: free it with protobuf_c_message_free_unpacked. */
STATUS_MUST_CHECK enum status_code openai_parse(enum openai_kind kind, const void *body, size_t len,
                                                struct openai_form *form, Tandem__V1__GenerateRequest **out,
                                                struct status *st);

/* ---- answers ---- */

struct openai_reply;

struct openai_context {
    const struct tokenizer *tok; /* stays valid */
    const char *model;           /* stays valid */
    int64_t created_s;           /* since 1970 */
};

STATUS_MUST_CHECK enum status_code openai_reply_create(struct openai_reply **out, const struct openai_form *form,
                                                       const struct openai_context *context, struct status *st);
void openai_reply_destroy(struct openai_reply *r); /* NULL is fine */
/* Only lack of memory is an error. */
STATUS_MUST_CHECK enum status_code openai_reply_add(struct openai_reply *r, const Tandem__V1__GenerateResponse *m,
                                                    struct status *st);
/* A good end. */
STATUS_MUST_CHECK enum status_code openai_reply_end(struct openai_reply *r, struct status *st);
/* A bad one behind events that have gone out: an event with the error. */
STATUS_MUST_CHECK enum status_code openai_reply_fail(struct openai_reply *r, const struct status *why,
                                                     struct status *st);
/* What is ready, without a copy: valid until the next call with r; it is not returned again. */
void openai_reply_take(struct openai_reply *r, const char **text, size_t *len);

/* ---- errors ---- */

/* The HTTP code of a status. */
unsigned openai_http_code(enum status_code code);
/* {"error": ...}; form may be NULL. The names that tandem.v1 has for a field become those of the client. */
void openai_error(struct json_text *out, unsigned http_code, const struct openai_form *form, const struct status *st);

#endif
