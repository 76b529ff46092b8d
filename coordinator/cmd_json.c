/* cmd_json.c - errors of commands with --json. */
#include <jansson.h>
#include <stdio.h>

#include "coordinator/cmd.h"

struct json_t *cmd_json_string(const char *text)
{
    json_t *v = json_string(text);
    if (v)
        return v;
    char clean[1024]; /* a path, or what another program said: bytes that are no UTF-8 */
    size_t n = 0;
    for (; text[n] && n < sizeof clean - 1; n++)
        clean[n] = (char)((unsigned char)text[n] < 0x80 ? text[n] : '?');
    return json_stringn(clean, n);
}

int cmd_failed(int rc, const char *command, bool json, const struct status *st)
{
    cmd_error(rc, command, "%s (%s)", st->message, status_name(st->code));
    if (json) {
        json_t *o = json_pack("{s:{s:s, s:o}}", "error", "code", status_name(st->code), "message",
                              cmd_json_string(st->message));
        json_dumpf(o, stdout, JSON_COMPACT);
        putchar('\n');
        fflush(stdout);
        json_decref(o);
    }
    return rc;
}
