/* Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}. */
#include <stdio.h>
#include <string.h>

#include "coordinator/openai.h"

unsigned openai_http_code(enum status_code code)
{
    switch (code) {
    case ST_OK:
        return 200;
    case ST_INVALID_ARGUMENT:
    case ST_OUT_OF_RANGE:
    case ST_FAILED_PRECONDITION:
    case ST_UNIMPLEMENTED: /* not 501: clients try again on that, and nothing will have changed */
        return 400;
    case ST_UNAUTHENTICATED:
        return 401;
    case ST_PERMISSION_DENIED:
        return 403;
    case ST_NOT_FOUND:
        return 404;
    case ST_ALREADY_EXISTS:
        return 409;
    case ST_RESOURCE_EXHAUSTED:
        return 429;
    case ST_CANCELLED:
        return 499;
    case ST_UNAVAILABLE:
    case ST_ABORTED:
        return 503;
    case ST_DEADLINE_EXCEEDED:
        return 504;
    default:
        return 500;
    }
}

static const char *type_of(unsigned http_code)
{
    switch (http_code) {
    case 401:
        return "authentication_error";
    case 403:
        return "permission_error";
    case 404:
        return "not_found_error";
    case 429:
        return "rate_limit_error";
    case 503:
    case 504:
        return "service_unavailable_error";
    default:
        return http_code >= 500 ? "server_error" : "invalid_request_error";
    }
}

static const char *code_of(const struct status *st, const char *message, size_t param)
{
    const char *rest = message + param;
    switch (st->code) {
    case ST_UNAUTHENTICATED:
        return "\"invalid_api_key\"";
    case ST_NOT_FOUND:
        return param ? "\"model_not_found\"" : "null";
    case ST_RESOURCE_EXHAUSTED:
        return "\"rate_limit_exceeded\"";
    case ST_INVALID_ARGUMENT:
        if (param && strcmp(rest, ": unknown field") == 0)
            return "\"unknown_parameter\"";
        if (param && strcmp(rest, ": not given") == 0)
            return "\"missing_required_parameter\"";
        return "null";
    default:
        return "null";
    }
}

/* The message with the client's name of its field in front. */
static void rename_field(char *out, size_t cap, const struct openai_form *form, const char *message)
{
    static const struct {
        const char *ours, *theirs;
    } names[] = {
        {"stopping.include_stop_in_output", "include_stop_str_in_output"},
        {"text: ", "prompt: "},
        {"token_ids: ", "prompt: "},
        {"chat.template_arguments_json", "chat_template_kwargs"},
        {"chat.tools_json", "tools"},
        {"chat: ", "messages: "},
        {"chat.", ""},
        {"sampling.", ""},
        {"output.prompt_logprobs", "logprobs"},
        {"output.", ""},
        {"stopping.", ""},
    };
    bool chat = form && form->kind == OPENAI_CHAT;
    if (form && form->max_completion_tokens && strncmp(message, "stopping.max_tokens", 19) == 0) {
        snprintf(out, cap, "max_completion_tokens%s", message + 19);
        return;
    }
    if (chat && strncmp(message, "output.logprobs", 15) == 0) {
        snprintf(out, cap, "top_logprobs%s", message + 15);
        return;
    }
    for (size_t i = 0; form && i < sizeof names / sizeof *names; i++) {
        size_t n = strlen(names[i].ours);
        if (strncmp(message, names[i].ours, n) == 0) {
            snprintf(out, cap, "%s%s", names[i].theirs, message + n);
            return;
        }
    }
    snprintf(out, cap, "%s", message);
}

/* Length of the field's name that the message begins with; 0: it names none. */
static size_t param_len(const struct status *st, const char *message)
{
    if (st->code != ST_INVALID_ARGUMENT && st->code != ST_NOT_FOUND && st->code != ST_UNIMPLEMENTED &&
        st->code != ST_FAILED_PRECONDITION && st->code != ST_ALREADY_EXISTS)
        return 0;
    size_t n =
        strspn(message, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.[]-"); /* also unknown ones */
    return message[n] == ':' ? n : 0;
}

void openai_error(struct json_text *out, unsigned http_code, const struct openai_form *form, const struct status *st)
{
    char message[STATUS_MESSAGE_MAX + 32];
    rename_field(message, sizeof message, form, st->message);
    size_t param = param_len(st, message);
    json_text_put(out, "{\"error\":{\"message\":");
    json_text_string(out, message, strlen(message));
    json_text_format(out, ",\"type\":\"%s\",\"param\":", type_of(http_code));
    if (param)
        json_text_string(out, message, param);
    else
        json_text_put(out, "null");
    json_text_format(out, ",\"code\":%s}}", code_of(st, message, param));
}
