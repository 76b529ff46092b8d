/* Messages to a prompt: the request's fields to JSON, the chat template, the tokenizer. Intake threads. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

#define MAX_MESSAGES 4096

/* An optional text of a message. */
static enum status_code set_text(json_t *to, const char *key, const char *text, size_t i, struct status *st)
{
    if (!text || !text[0])
        return ST_OK;
    json_t *v = json_string(text);
    if (v && json_object_set_new(to, key, v) == 0)
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "chat.messages[%zu].%s: not valid UTF-8", i, key);
}

/* A field that holds JSON; empty: *out stays NULL. */
static enum status_code parse_json(const char *text, const char *field, bool array, json_t **out, struct status *st)
{
    json_error_t error;
    if (!text || !text[0])
        return ST_OK;
    json_t *v = json_loads(text, 0, &error);
    if (!v)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: not JSON: %s at byte %d", field, error.text, error.position);
    if (array ? !json_is_array(v) : !json_is_object(v)) {
        json_decref(v);
        return status_set(st, ST_INVALID_ARGUMENT, "%s: expected a JSON %s", field, array ? "array" : "object");
    }
    *out = v;
    return ST_OK;
}

static enum status_code message_of(const Tandem__V1__ChatMessage *m, size_t i, json_t *to, struct status *st)
{
    char field[64];
    json_t *calls = NULL;
    enum status_code rc;
    if (!m->role[0])
        return status_set(st, ST_INVALID_ARGUMENT, "chat.messages[%zu].role: empty, expected user, assistant ...", i);
    json_t *content = json_stringn((const char *)m->content.data, m->content.len);
    if (m->content.len == 0)
        content = json_string("");
    if (!content || json_object_set_new(to, "content", content) != 0)
        return status_set(st, ST_INVALID_ARGUMENT, "chat.messages[%zu].content: not valid UTF-8", i);
    if ((rc = set_text(to, "role", m->role, i, st)) != ST_OK || (rc = set_text(to, "name", m->name, i, st)) != ST_OK ||
        (rc = set_text(to, "tool_call_id", m->tool_call_id, i, st)) != ST_OK ||
        (rc = set_text(to, "reasoning_content", m->reasoning_content, i, st)) != ST_OK)
        return rc;
    snprintf(field, sizeof field, "chat.messages[%zu].tool_calls_json", i);
    if ((rc = parse_json(m->tool_calls_json, field, true, &calls, st)) != ST_OK)
        return rc;
    if (calls && json_object_set_new(to, "tool_calls", calls) != 0)
        return status_nomem(st, field, 0);
    return ST_OK;
}

static enum status_code messages_of(const Tandem__V1__Chat *m, json_t *to, struct status *st)
{
    if (m->n_messages == 0 || m->n_messages > MAX_MESSAGES)
        return status_set(st, ST_INVALID_ARGUMENT, "chat.messages: %zu, expected 1 to %d", m->n_messages, MAX_MESSAGES);
    for (size_t i = 0; i < m->n_messages; i++) {
        json_t *one = json_object();
        if (!one || json_array_append_new(to, one) != 0)
            return status_nomem(st, "chat.messages", 0);
        enum status_code rc = message_of(m->messages[i], i, one, st);
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}

/* The template's text to tokens. Special tokens are the template's business: none is added. */
static enum status_code encode(const struct coord *c, struct request *r, const char *text, size_t bytes,
                               uint32_t max_context, size_t *n, struct status *st)
{
    size_t token_bytes = tok_max_token_bytes(c->tok);
    if (token_bytes && bytes > 0 && (bytes - 1) / token_bytes >= max_context - 1)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "chat: a prompt of %zu bytes, but a token takes at most %zu and the context holds %u tokens, "
                          "a new one among them",
                          bytes, token_bytes, max_context);
    if (tok_encode(c->tok, text, bytes, 0, &r->prompt, n, st) != ST_OK)
        return status_prefix(st, "chat");
    if (*n == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "chat: the template makes no token of these messages");
    return ST_OK;
}

enum status_code chat_take(const struct coord *c, struct request *r, const Tandem__V1__Chat *m, uint32_t max_context,
                           size_t *n, struct status *st)
{
    json_t *messages = json_array(), *tools = NULL, *arguments = NULL;
    char *text = NULL;
    size_t bytes = 0;
    enum status_code rc = messages ? ST_OK : status_nomem(st, "chat", 0);
    const struct status *why = chat_status(c->chat);
    if (rc == ST_OK &&
        why->code != ST_OK) /* whatever is wrong with the model's template, the request is not to blame */
        rc = status_set(st, why->code == ST_UNIMPLEMENTED ? ST_UNIMPLEMENTED : ST_FAILED_PRECONDITION, "chat: %s",
                        why->message);
    if (rc != ST_OK || (rc = messages_of(m, messages, st)) != ST_OK ||
        (rc = parse_json(m->tools_json, "chat.tools_json", true, &tools, st)) != ST_OK ||
        (rc = parse_json(m->template_arguments_json, "chat.template_arguments_json", false, &arguments, st)) != ST_OK)
        goto end;
    if (m->continue_final_message && m->add_generation_prompt_is_case && m->add_generation_prompt) {
        rc = status_set(st, ST_INVALID_ARGUMENT,
                        "chat.continue_final_message: true beside add_generation_prompt, expected one of them");
        goto end;
    }
    struct chat_prompt p = {.messages = messages, .tools = tools, .arguments = arguments};
    p.continue_final = m->continue_final_message;
    p.add_generation_prompt = !p.continue_final && (!m->add_generation_prompt_is_case || m->add_generation_prompt);
    if ((rc = chat_render(c->chat, &p, &text, &bytes, st)) != ST_OK)
        status_prefix(st, "chat.messages");
    else
        rc = encode(c, r, text, bytes, max_context, n, st);
end:
    free(text);
    json_decref(messages);
    json_decref(tools);
    json_decref(arguments);
    return rc;
}
