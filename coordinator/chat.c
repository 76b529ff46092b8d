#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/chat_internal.h"
#include "coordinator/jinja.h"
#include "proto/gguf.h"

struct chat {
    struct jinja *plain; /* NULL: `why` says why */
    struct jinja *tools; /* for requests with tools; NULL: the plain one */
    json_t *tokens;      /* {"bos_token": "<s>", ...} */
    struct status why;
};

/* ---- loading ---- */

static enum status_code compile(struct jinja **out, const char *source, size_t bytes, const char *where,
                                struct status *st)
{
    if (jinja_compile(out, source, bytes, st) == ST_OK)
        return ST_OK;
    return status_prefix(st, "%s", where);
}

/* A whole file; *found false and OK when there is none. */
static enum status_code read_file(const char *path, char **text, size_t *bytes, bool *found, struct status *st)
{
    FILE *f = fopen(path, "rb");
    enum status_code rc = ST_OK;
    *found = f != NULL;
    if (!f)
        return errno == ENOENT || errno == ENOTDIR ? ST_OK : status_errno(st, ST_NOT_FOUND, errno, "%s", path);
    char *buf = malloc(JINJA_MAX_SOURCE_BYTES + 1);
    size_t n = buf ? fread(buf, 1, JINJA_MAX_SOURCE_BYTES + 1, f) : 0;
    if (!buf)
        rc = status_nomem(st, path, JINJA_MAX_SOURCE_BYTES + 1);
    else if (ferror(f))
        rc = status_errno(st, ST_DATA_LOSS, errno, "%s", path);
    else if (n > JINJA_MAX_SOURCE_BYTES)
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s: over %u bytes, expected a chat template", path,
                        JINJA_MAX_SOURCE_BYTES);
    fclose(f);
    if (rc != ST_OK) {
        free(buf);
        return rc;
    }
    *text = buf;
    *bytes = n;
    return ST_OK;
}

static enum status_code load_file(struct chat *c, const char *path, bool *found, struct status *st)
{
    char *text = NULL;
    size_t bytes = 0;
    enum status_code rc = read_file(path, &text, &bytes, found, st);
    if (rc == ST_OK && *found)
        rc = compile(&c->plain, text, bytes, path, st);
    free(text);
    return rc;
}

static enum status_code load_choice(struct chat *c, const char *choice, struct status *st)
{
    const char *named = chat_named_template(choice);
    size_t n = strlen(choice);
    bool found = false;
    if (named)
        return compile(&c->plain, named, strlen(named), choice, st);
    if (!strchr(choice, '/') && !(n > 6 && strcmp(choice + n - 6, ".jinja") == 0))
        return status_set(st, ST_INVALID_ARGUMENT,
                          "chat template: \"%.100s\", expected chatml, llama2, llama3, mistral or the path of a file",
                          choice);
    enum status_code rc = load_file(c, choice, &found, st);
    if (rc == ST_OK && !found)
        return status_set(st, ST_NOT_FOUND, "chat template: %.300s: no such file", choice);
    return rc;
}

/* chat_template of tokenizer_config.json: a text, or an array of {"name", "template"}. */
static enum status_code load_from_config(struct chat *c, const json_t *config, struct status *st)
{
    const json_t *t = json_object_get(config, "chat_template"), *entry;
    const char *where = "tokenizer_config.json: chat_template";
    enum status_code rc = ST_OK;
    size_t i;
    if (json_is_string(t))
        return compile(&c->plain, json_string_value(t), json_string_length(t), where, st);
    if (t && !json_is_array(t) && !json_is_null(t))
        return status_set(st, ST_INVALID_ARGUMENT, "%s: expected a text or an array of named ones", where);
    json_array_foreach(t, i, entry)
    {
        const json_t *name = json_object_get(entry, "name"), *text = json_object_get(entry, "template");
        struct jinja **slot = NULL;
        if (json_is_string(name) && strcmp(json_string_value(name), "default") == 0)
            slot = &c->plain;
        else if (json_is_string(name) && strcmp(json_string_value(name), "tool_use") == 0)
            slot = &c->tools;
        if (!slot || *slot || !json_is_string(text))
            continue;
        rc = compile(slot, json_string_value(text), json_string_length(text), where, st);
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}

/* The names whose values are texts, or added tokens with a text. */
static enum status_code take_tokens(struct chat *c, const json_t *config, struct status *st)
{
    static const char *const names[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                        "pad_token", "cls_token", "mask_token"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const json_t *v = json_object_get(config, names[i]);
        const json_t *text = json_is_object(v) ? json_object_get(v, "content") : v;
        if (json_is_string(text) && json_object_set(c->tokens, names[i], (json_t *)text) != 0)
            return status_nomem(st, names[i], 0);
    }
    return ST_OK;
}

/* dir NULL: only what config says. */
static enum status_code load_own(struct chat *c, const char *dir, const json_t *config, struct status *st)
{
    char path[4096];
    bool found = false;
    enum status_code rc = ST_OK;
    if (dir && snprintf(path, sizeof path, "%s/chat_template.jinja", dir) >= (int)sizeof path)
        return status_set(st, ST_INVALID_ARGUMENT, "model: a path of %zu bytes", strlen(dir));
    if (dir)
        rc = load_file(c, path, &found, st);
    if (rc == ST_OK && !found)
        rc = load_from_config(c, config, st);
    if (rc == ST_OK && !c->plain)
        rc = status_set(st, ST_FAILED_PRECONDITION,
                        "the model has no chat template: send a text, or let the server name one (--chat-template)");
    return rc;
}

static enum status_code make(struct chat **out, const char *dir, const json_t *config, const char *choice,
                             struct status *st)
{
    struct chat *c = calloc(1, sizeof *c);
    enum status_code rc = ST_OK;
    if (!c || !(c->tokens = json_object())) {
        rc = status_nomem(st, "chat template", sizeof *c);
        goto fail;
    }
    if ((rc = take_tokens(c, config, st)) != ST_OK)
        goto fail;
    if (choice) {
        if ((rc = load_choice(c, choice, st)) != ST_OK)
            goto fail;
    } else if (load_own(c, dir, config, &c->why) != ST_OK) {
        jinja_free(c->plain);
        c->plain = NULL;
    }
    *out = c;
    return ST_OK;
fail:
    chat_free(c);
    return rc;
}

enum status_code chat_from_config(struct chat **out, const json_t *config, struct status *st)
{
    return make(out, NULL, config, NULL, st);
}

enum status_code chat_load(struct chat **out, const char *dir, const char *choice, struct status *st)
{
    char path[4096];
    json_error_t error;
    json_t *config = NULL;
    if (gguf_is_file(dir))
        config = chat_gguf_load(dir);
    else if (snprintf(path, sizeof path, "%s/tokenizer_config.json", dir) < (int)sizeof path)
        /* The tokenizer says what is wrong with it. Whole numbers as reals, as it does: model_max_length may be 1e30. */
        config = json_load_file(path, JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, &error);
    enum status_code rc = make(out, dir, config, choice, st);
    json_decref(config);
    return rc;
}

void chat_free(struct chat *c)
{
    if (!c)
        return;
    jinja_free(c->plain);
    jinja_free(c->tools);
    json_decref(c->tokens);
    free(c);
}

const struct status *chat_status(const struct chat *c)
{
    return &c->why;
}

const char *chat_lacks(const struct chat *c)
{
    const char *plain = c->plain ? jinja_lacks(c->plain) : NULL;
    return plain || !c->tools ? plain : jinja_lacks(c->tools);
}

/* ---- rendering ---- */

static json_t *context_of(const struct chat *c, const struct chat_prompt *p)
{
    json_t *context = json_copy(c->tokens);
    const char *key;
    json_t *v;
    bool ok = context != NULL;
    json_object_foreach((json_t *)p->arguments, key, v) ok = ok && json_object_set(context, key, v) == 0;
    /* what is ours comes last: an argument cannot replace the messages */
    ok = ok && json_object_set(context, "messages", (json_t *)p->messages) == 0;
    ok = ok && json_object_set_new(context, "tools", p->tools ? json_incref((json_t *)p->tools) : json_null()) == 0;
    ok = ok && json_object_set_new(context, "documents", json_null()) == 0;
    ok = ok && json_object_set_new(context, "add_generation_prompt", json_boolean(p->add_generation_prompt)) == 0;
    if (ok)
        return context;
    json_decref(context);
    return NULL;
}

static bool blank(char ch)
{
    return ch == ' ' || (ch >= '\t' && ch <= '\r');
}

/* Where s begins last in the text; SIZE_MAX: nowhere. Knuth, Morris and Pratt from the end, so that the time is linear
 * whatever repeats in what a client writes. n > 0. */
static enum status_code find_last(const char *text, size_t bytes, const char *s, size_t n, size_t *at,
                                  struct status *st)
{
    *at = SIZE_MAX;
    if (n > bytes)
        return ST_OK;
    uint32_t *back = malloc(n * sizeof *back); /* after i + 1 bytes, from the end, match and the next does not */
    if (!back)
        return status_nomem(st, "the last message", n * sizeof *back);
    back[0] = 0;
    for (size_t i = 1, k = 0; i < n; i++) {
        while (k && s[n - 1 - i] != s[n - 1 - k])
            k = back[k - 1];
        k += s[n - 1 - i] == s[n - 1 - k];
        back[i] = (uint32_t)k; /* a text has JINJA_MAX_OUTPUT_BYTES at most */
    }
    for (size_t i = bytes, k = 0; i-- > 0 && *at == SIZE_MAX;) {
        while (k && text[i] != s[n - 1 - k])
            k = back[k - 1];
        k += text[i] == s[n - 1 - k];
        if (k == n)
            *at = i;
    }
    free(back);
    return ST_OK;
}

/* Cuts the text behind the words of the last message, whose white space at the end the template may have taken. */
static enum status_code cut_behind(const json_t *last, char *text, size_t *bytes, struct status *st)
{
    const json_t *content = json_object_get(last, "content");
    const char *s = json_string_value(content);
    size_t n = json_string_length(content), found = SIZE_MAX;
    if (!s)
        return status_set(st, ST_INVALID_ARGUMENT, "the last message has no content to continue");
    while (n > 0 && blank(*s)) {
        s++;
        n--;
    }
    size_t whole = n;
    while (n > 0 && blank(s[n - 1]))
        n--;
    if (n > 0 && find_last(text, *bytes, s, n, &found, st) != ST_OK)
        return st->code;
    if (found == SIZE_MAX)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "the template does not write the last message's content as it is, so it cannot be continued");
    bool kept = whole <= *bytes - found && memcmp(text + found, s, whole) == 0;
    *bytes = found + (kept ? whole : n);
    text[*bytes] = '\0';
    return ST_OK;
}

enum status_code chat_render(const struct chat *c, const struct chat_prompt *p, char **text, size_t *bytes,
                             struct status *st)
{
    size_t n = json_array_size(p->messages);
    if (!c->plain)
        return status_set(st, c->why.code, "%s", c->why.message);
    if (p->continue_final && p->add_generation_prompt)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "a prompt cannot both begin an answer and continue the last message");
    json_t *context = context_of(c, p);
    if (!context)
        return status_nomem(st, "chat", 0);
    enum status_code rc = jinja_render(p->tools && c->tools ? c->tools : c->plain, context, text, bytes, st);
    json_decref(context);
    if (rc != ST_OK)
        return status_prefix(st, "chat template");
    if (p->continue_final && (rc = cut_behind(json_array_get(p->messages, n - 1), *text, bytes, st)) != ST_OK) {
        free(*text);
        *text = NULL;
    }
    return rc;
}
