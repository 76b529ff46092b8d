/* Renders templates for the tests that compare with Jinja itself (tests/jinja_cases.py). Per line of stdin a JSON object
 * {"template": "...", "context": {...}}, per line of stdout {"text": "..."} or {"code": "...", "error": "..."}. */
#include <stdio.h>
#include <stdlib.h>

#include "coordinator/jinja.h"

static json_t *answer(const json_t *request)
{
    const json_t *source = json_object_get(request, "template");
    struct status st = STATUS_INIT;
    struct jinja *t = NULL;
    char *text = NULL;
    size_t bytes = 0;
    json_t *out = NULL;
    enum status_code rc = jinja_compile(&t, json_string_value(source), json_string_length(source), &st);
    if (rc == ST_OK)
        rc = jinja_render(t, json_object_get(request, "context"), &text, &bytes, &st);
    if (rc == ST_OK)
        out = json_pack("{s:o}", "text", json_stringn(text, bytes));
    else
        out = json_pack("{s:s, s:s}", "code", status_name(rc), "error", st.message);
    free(text);
    jinja_free(t);
    return out;
}

int main(void)
{
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    while ((n = getline(&line, &cap, stdin)) > 0) {
        json_error_t error;
        json_t *request = json_loadb(line, (size_t)n, JSON_ALLOW_NUL, &error);
        if (!request || !json_is_string(json_object_get(request, "template")) ||
            !json_is_object(json_object_get(request, "context"))) {
            fprintf(stderr, "jinja_render: not a request: %s\n", error.text);
            return 2;
        }
        json_t *out = answer(request);
        if (!out || json_dumpf(out, stdout, JSON_COMPACT) != 0) {
            fprintf(stderr, "jinja_render: the answer is no JSON\n");
            return 1;
        }
        putchar('\n');
        json_decref(out);
        json_decref(request);
    }
    free(line);
    return 0;
}
