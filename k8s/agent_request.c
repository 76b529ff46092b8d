/* agent_request.c - what to start, on the wire and as mpirun writes it. */
#include <string.h>

#include "k8s/agent.h"

static bool put(uint8_t *out, size_t *at, const char *const *list, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        size_t len = strlen(list[i]) + 1;
        if (len > AGENT_REQUEST_MAX - *at)
            return false;
        memcpy(out + *at, list[i], len);
        *at += len;
    }
    return true;
}

size_t agent_request_write(const struct agent_request *r, uint8_t out[AGENT_REQUEST_MAX])
{
    size_t at = 4;
    out[0] = (uint8_t)(r->argc >> 8);
    out[1] = (uint8_t)r->argc;
    out[2] = (uint8_t)(r->envc >> 8);
    out[3] = (uint8_t)r->envc;
    return put(out, &at, r->argv, r->argc) && put(out, &at, r->env, r->envc) ? at : 0;
}

static const uint8_t *take(const char **list, size_t n, const uint8_t *p, const uint8_t *end)
{
    for (size_t i = 0; i < n; i++) {
        const uint8_t *nul = memchr(p, 0, (size_t)(end - p));
        if (!nul)
            return NULL;
        list[i] = (const char *)p;
        p = nul + 1;
    }
    list[n] = NULL;
    return p;
}

enum status_code agent_request_read(struct agent_request *out, const uint8_t *bytes, size_t n, struct status *st)
{
    if (n < 4 || n > AGENT_REQUEST_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "request: %zu bytes, expected 4 to %u", n, AGENT_REQUEST_MAX);
    struct agent_request r = {.argc = (size_t)bytes[0] << 8 | bytes[1], .envc = (size_t)bytes[2] << 8 | bytes[3]};
    if (r.argc > AGENT_ARGS_MAX || r.envc > AGENT_ENV_MAX)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "request: %zu arguments and %zu environment entries, expected at most %d, %d", r.argc, r.envc,
                          AGENT_ARGS_MAX, AGENT_ENV_MAX);
    const uint8_t *end = bytes + n, *p = take(r.argv, r.argc, bytes + 4, end);
    if (p)
        p = take(r.env, r.envc, p, end);
    if (p != end)
        return status_set(st, ST_INVALID_ARGUMENT, "request: its strings do not fill its %zu bytes", n);
    *out = r;
    return ST_OK;
}

/* One word from *p on, written over itself without its quotes; its end, or NULL for what is refused. */
static char *take_word(char **p, char **bad)
{
    static const char special[] = "$`;|&<>(){}[]*?~!#'\\\n";
    char *to = *p, *from = *p;
    bool quoted = false;
    for (; *from && (quoted || (*from != ' ' && *from != '\t')); from++) {
        if (*from == '"')
            quoted = !quoted;
        else if (strchr(quoted ? "$`\\" : special, *from)) {
            *bad = from;
            return NULL;
        } else
            *to++ = *from;
    }
    if (quoted) {
        *bad = from;
        return NULL;
    }
    *p = from;
    return to;
}

enum status_code agent_words(char *text, const char **argv, size_t max, size_t *argc, struct status *st)
{
    size_t n = 0;
    for (char *p = text;;) {
        p += strspn(p, " \t");
        if (!*p)
            break;
        if (n == max)
            return status_set(st, ST_INVALID_ARGUMENT, "command: more than %zu words", max);
        char *begin = p, *bad = NULL, *end = take_word(&p, &bad);
        if (!end)
            return *bad ? status_set(st, ST_INVALID_ARGUMENT,
                                     "command: '%c' has a meaning to a shell, and there is none (no --prefix, no full "
                                     "path of mpirun?)",
                                     *bad)
                        : status_set(st, ST_INVALID_ARGUMENT, "command: a quote is not closed");
        bool last = !*p;
        *end = '\0';
        argv[n++] = begin;
        if (last)
            break;
        p++;
    }
    *argc = n;
    return ST_OK;
}
