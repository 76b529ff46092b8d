/* Every error names file and place: "tokenizer.json: model.merges[12]: expected ..., got ...". */
#include "coordinator/tokenizer_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static enum status_code read_file(char **out, size_t *out_len, const char *path, struct status *st)
{
    enum status_code rc = ST_OK;
    char *data = NULL;
    size_t size = 0, got = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return status_errno(st, errno == ENOENT || errno == ENOTDIR ? ST_NOT_FOUND : ST_FAILED_PRECONDITION, errno,
                            "%s", path);
    struct stat sb;
    if (fstat(fd, &sb) != 0) {
        rc = status_errno(st, ST_FAILED_PRECONDITION, errno, "%s", path);
        goto done;
    }
    if (!S_ISREG(sb.st_mode)) {
        rc = status_set(st, ST_FAILED_PRECONDITION, "%s: expected a regular file", path);
        goto done;
    }
    if ((uint64_t)sb.st_size > TOK_MAX_FILE_BYTES) {
        rc = status_set(st, ST_DATA_LOSS, "%s: %lld bytes, expected at most %zu", path, (long long)sb.st_size,
                        TOK_MAX_FILE_BYTES);
        goto done;
    }
    size = (size_t)sb.st_size;
    data = malloc(size + 1);
    if (!data) {
        rc = status_nomem(st, path, size + 1);
        goto done;
    }
    while (got < size) {
        ssize_t n = read(fd, data + got, size - got);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            rc = status_errno(st, ST_FAILED_PRECONDITION, errno, "%s: reading", path);
            goto done;
        }
        if (n == 0)
            break; /* it became shorter meanwhile: the parser will say where it ends */
        got += (size_t)n;
    }
    *out = data;
    *out_len = got;
    data = NULL;
done:
    free(data);
    close(fd);
    return rc;
}

enum status_code tok_json_read(json_t **out, const char *path, size_t flags, struct status *st)
{
    char *data = NULL;
    size_t len = 0;
    enum status_code rc = read_file(&data, &len, path, st);
    if (rc != ST_OK)
        return rc;
    json_error_t err;
    json_t *root = json_loadb(data, len, flags | JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &err);
    free(data);
    if (!root) {
        if (json_error_code(&err) == json_error_out_of_memory)
            return status_nomem(st, path, len);
        if (len == 0)
            return status_set(st, ST_DATA_LOSS, "%s: the file is empty", path);
        return status_set(st, ST_DATA_LOSS, "%s: line %d, column %d: %s", path, err.line, err.column, err.text);
    }
    if (!json_is_object(root)) {
        rc = status_set(st, ST_DATA_LOSS, "%s: expected a JSON object, got %s", path, tok_json_kind(root));
        json_decref(root);
        return rc;
    }
    *out = root;
    return ST_OK;
}

const char *tok_json_kind(const json_t *v)
{
    if (!v)
        return "nothing";
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a real number";
    case JSON_NULL:
        return "null";
    default:
        return "true or false";
    }
}

static enum status_code wrong_type(const char *where, const char *key, const char *expected, const json_t *got,
                                   struct status *st)
{
    return status_set(st, ST_DATA_LOSS, "%s.%s: expected %s, got %s", where, key, expected, tok_json_kind(got));
}

enum status_code tok_json_string(const json_t *obj, const char *where, const char *key, const char **s, size_t *n,
                                 struct status *st)
{
    const json_t *v = json_object_get(obj, key);
    if (!json_is_string(v))
        return wrong_type(where, key, "a string", v, st);
    *s = json_string_value(v);
    *n = json_string_length(v);
    return ST_OK;
}

enum status_code tok_json_bool(const json_t *obj, const char *where, const char *key, bool *out, struct status *st)
{
    const json_t *v = json_object_get(obj, key);
    if (!json_is_boolean(v))
        return wrong_type(where, key, "true or false", v, st);
    *out = json_is_true(v);
    return ST_OK;
}

enum status_code tok_json_bool_opt(const json_t *obj, const char *where, const char *key, bool *out, struct status *st)
{
    const json_t *v = json_object_get(obj, key);
    return !v || json_is_null(v) ? ST_OK : tok_json_bool(obj, where, key, out, st);
}

enum status_code tok_json_uint(const json_t *v, const char *where, const char *key, uint32_t max, uint32_t *out,
                               struct status *st)
{
    if (!json_is_integer(v))
        return wrong_type(where, key, "an integer", v, st);
    json_int_t i = json_integer_value(v);
    if (i < 0 || i > (json_int_t)max)
        return status_set(st, ST_DATA_LOSS, "%s.%s: %lld, expected 0 to %u", where, key, (long long)i, max);
    *out = (uint32_t)i;
    return ST_OK;
}

enum status_code tok_json_array(const json_t *obj, const char *where, const char *key, const json_t **out,
                                struct status *st)
{
    const json_t *v = json_object_get(obj, key);
    if (!json_is_array(v))
        return wrong_type(where, key, "an array", v, st);
    *out = v;
    return ST_OK;
}

enum status_code tok_json_pattern(const json_t *obj, const char *where, const char **s, size_t *n, bool *is_regex,
                                  struct status *st)
{
    const json_t *p = json_object_get(obj, "pattern");
    const json_t *string = json_object_get(p, "String"), *regex = json_object_get(p, "Regex");
    const json_t *v = string ? string : regex;
    if (!json_is_object(p) || json_object_size(p) != 1 || !json_is_string(v))
        return status_set(st, ST_DATA_LOSS, "%s.pattern: expected {\"String\": ...} or {\"Regex\": ...}", where);
    *s = json_string_value(v);
    *n = json_string_length(v);
    *is_regex = v == regex;
    return ST_OK;
}

enum status_code tok_json_type(const json_t *obj, const char *where, const char **type, struct status *st)
{
    if (!json_is_object(obj))
        return status_set(st, ST_DATA_LOSS, "%s: expected an object or null, got %s", where, tok_json_kind(obj));
    size_t n;
    return tok_json_string(obj, where, "type", type, &n, st);
}

static enum status_code flatten(const json_t *obj, const char *where, const char *list_key, tok_component_fn *fn,
                                void *arg, int depth, struct status *st)
{
    const char *type = "";
    enum status_code rc = tok_json_type(obj, where, &type, st);
    if (rc != ST_OK)
        return rc;
    if (strcmp(type, "Sequence") != 0)
        return fn(arg, obj, type, where, st);
    if (depth >= TOK_MAX_NEST)
        return status_set(st, ST_UNIMPLEMENTED, "%s: Sequence nested deeper than %d", where, TOK_MAX_NEST);
    const json_t *list = NULL;
    rc = tok_json_array(obj, where, list_key, &list, st);
    for (size_t i = 0; rc == ST_OK && i < json_array_size(list); i++) {
        char place[256];
        snprintf(place, sizeof place, "%.180s.%.40s[%zu]", where, list_key, i);
        rc = flatten(json_array_get(list, i), place, list_key, fn, arg, depth + 1, st);
    }
    return rc;
}

enum status_code tok_json_flatten(const json_t *obj, const char *where, const char *list_key, tok_component_fn *fn,
                                  void *arg, struct status *st)
{
    return flatten(obj, where, list_key, fn, arg, 0, st);
}
