/* "messages" of a chat: texts, or lists of parts that are texts; calls of tools as templates want them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/openai_internal.h"

enum status_code openai_bytes(ProtobufCBinaryData *to, const json_t *v, const char *name, struct status *st)
{
    size_t n = json_string_length(v);
    uint8_t *p = malloc(n + 1);
    if (!p)
        return status_nomem(st, name, n);
    memcpy(p, json_string_value(v), n);
    free(to->data);
    *to = (ProtobufCBinaryData){.len = n, .data = p};
    return ST_OK;
}

void openai_dump_free(char **to)
{
    if (*to != protobuf_c_empty_string)
        free(*to);
    *to = (char *)protobuf_c_empty_string;
}

enum status_code openai_dump(char **to, const json_t *v, const char *name, struct status *st)
{
    char *text = json_dumps(v, JSON_COMPACT);
    if (!text)
        return status_nomem(st, name, 0);
    char *own = strdup(text); /* jansson's memory may be another allocator's */
    free(text);
    if (!own)
        return status_nomem(st, name, 0);
    openai_dump_free(to);
    *to = own;
    return ST_OK;
}

/* An optional string of a message; may be null. */
static enum status_code text_of(char **to, const json_t *m, const char *key, size_t i, struct status *st)
{
    const json_t *v = json_object_get(m, key);
    if (!v || json_is_null(v))
        return ST_OK;
    if (!json_is_string(v) || strlen(json_string_value(v)) != json_string_length(v))
        return status_set(st, ST_INVALID_ARGUMENT, "messages[%zu].%s: expected a string without NUL", i, key);
    char *own = strdup(json_string_value(v));
    if (!own)
        return status_nomem(st, key, json_string_length(v));
    openai_dump_free(to);
    *to = own;
    return ST_OK;
}

/* Parts are put together with a newline between them, as vLLM does. */
static enum status_code parts_of(ProtobufCBinaryData *to, const json_t *parts, size_t i, struct status *st)
{
    struct json_text t = {0};
    for (size_t k = 0; k < json_array_size(parts); k++) {
        const json_t *part = json_array_get(parts, k);
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *text = json_object_get(part, "text");
        if (!type || strcmp(type, "text") != 0 || !json_is_string(text)) {
            json_text_free(&t);
            return status_set(
                st, ST_INVALID_ARGUMENT,
                "messages[%zu].content[%zu]: expected {\"type\": \"text\", \"text\": ...}: the model reads "
                "nothing else",
                i, k);
        }
        if (k > 0)
            json_text_add(&t, "\n", 1);
        json_text_add(&t, json_string_value(text), json_string_length(text));
    }
    if (t.failed) {
        json_text_free(&t);
        return status_nomem(st, "messages", 0);
    }
    *to = (ProtobufCBinaryData){.len = t.n, .data = (uint8_t *)t.p};
    return ST_OK;
}

static enum status_code content_of(ProtobufCBinaryData *to, const json_t *m, size_t i, struct status *st)
{
    const json_t *v = json_object_get(m, "content");
    if (!v || json_is_null(v)) /* of an assistant that called tools */
        return ST_OK;
    if (json_is_string(v))
        return openai_bytes(to, v, "messages", st);
    if (json_is_array(v))
        return parts_of(to, v, i, st);
    return status_set(st, ST_INVALID_ARGUMENT, "messages[%zu].content: expected a string or an array of parts", i);
}

/* Clients send the arguments of a call as a text, templates expect an object. False: out of memory. */
static bool object_arguments(json_t *function)
{
    json_error_t error;
    const json_t *text = json_object_get(function, "arguments");
    if (!json_is_string(text))
        return true;
    json_t *object = json_loadb(json_string_value(text), json_string_length(text), 0, &error);
    if (!object)
        return !openai_no_memory(&error);
    bool ok = !json_is_object(object) || json_object_set(function, "arguments", object) == 0;
    json_decref(object);
    return ok;
}

static enum status_code calls_of(char **to, const json_t *m, size_t i, struct status *st)
{
    const json_t *v = json_object_get(m, "tool_calls");
    char field[48];
    if (!v || json_is_null(v))
        return ST_OK;
    snprintf(field, sizeof field, "messages[%zu].tool_calls", i);
    if (!json_is_array(v))
        return status_set(st, ST_INVALID_ARGUMENT, "%s: expected an array", field);
    json_t *calls = json_deep_copy(v);
    if (!calls)
        return status_nomem(st, field, 0);
    for (size_t k = 0; k < json_array_size(calls); k++)
        if (!object_arguments(json_object_get(json_array_get(calls, k), "function"))) {
            json_decref(calls);
            return status_nomem(st, field, 0);
        }
    enum status_code rc = openai_dump(to, calls, field, st);
    json_decref(calls);
    return rc;
}

static enum status_code message_of(Tandem__V1__ChatMessage *to, const json_t *m, size_t i, struct status *st)
{
    enum status_code rc;
    if (!json_is_object(m))
        return status_set(st, ST_INVALID_ARGUMENT, "messages[%zu]: expected an object", i);
    if ((rc = text_of(&to->role, m, "role", i, st)) != ST_OK || (rc = text_of(&to->name, m, "name", i, st)) != ST_OK ||
        (rc = text_of(&to->tool_call_id, m, "tool_call_id", i, st)) != ST_OK ||
        (rc = text_of(&to->reasoning_content, m, "reasoning_content", i, st)) != ST_OK ||
        (rc = content_of(&to->content, m, i, st)) != ST_OK)
        return rc;
    return calls_of(&to->tool_calls_json, m, i, st);
}

enum status_code openai_messages(Tandem__V1__Chat *chat, const json_t *v, struct status *st)
{
    size_t n = json_array_size(v);
    if (!json_is_array(v) || n == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "messages: expected an array with at least one message");
    chat->messages = calloc(n, sizeof *chat->messages);
    if (!chat->messages)
        return status_nomem(st, "messages", n * sizeof *chat->messages);
    for (size_t i = 0; i < n; i++) {
        Tandem__V1__ChatMessage *one = malloc(sizeof *one);
        if (!one)
            return status_nomem(st, "messages", sizeof *one);
        tandem__v1__chat_message__init(one);
        chat->messages[chat->n_messages++] = one;
        enum status_code rc = message_of(one, json_array_get(v, i), i, st);
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}
