#include "worker/model_json.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *type_name(const json_t *v)
{
    static const char *const names[] = {"an object",     "an array", "a string", "an integer",
                                        "a real number", "true",     "false",    "null"};
    return v ? names[json_typeof(v)] : "nothing";
}

static const json_t *lookup(struct json_source src, const char *field)
{
    const json_t *v = json_object_get(src.obj, field);
    return json_is_null(v) ? NULL : v;
}

static enum status_code wrong_type(struct json_source src, const char *field, const json_t *v, const char *expected,
                                   struct status *st)
{
    return status_set(st, ST_INVALID_ARGUMENT, "%s: %s: %s, expected %s", src.file, field, type_name(v), expected);
}

enum status_code json_read_text(json_t **out, const char *text, size_t bytes, const char *file, struct status *st)
{
    json_error_t err;
    json_t *doc = json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &err);
    if (!doc) {
        if (json_error_code(&err) == json_error_out_of_memory || !err.text[0]) /* jansson has a reason for all else */
            return status_nomem(st, file, bytes);
        return status_set(st, ST_DATA_LOSS, "%s: not valid JSON: line %d column %d: %s", file, err.line, err.column,
                          err.text);
    }
    if (!json_is_object(doc)) {
        status_set(st, ST_DATA_LOSS, "%s: %s, expected a JSON object", file, type_name(doc));
        json_decref(doc);
        return ST_DATA_LOSS;
    }
    *out = doc;
    return ST_OK;
}

enum status_code json_open_error(int err)
{
    if (err == ENOENT || err == ENOTDIR)
        return ST_NOT_FOUND;
    return err == ENOMEM || err == EMFILE || err == ENFILE ? ST_RESOURCE_EXHAUSTED : ST_INVALID_ARGUMENT;
}

enum status_code json_read_file(json_t **out, const char *path, size_t max_bytes, struct status *st)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO would wait for a writer */
    struct stat info;
    if (fd >= 0 && fstat(fd, &info) == 0 && !S_ISREG(info.st_mode)) {
        close(fd);
        return status_set(st, ST_INVALID_ARGUMENT, "%s: not a regular file", path);
    }
    FILE *f = fd >= 0 ? fdopen(fd, "rb") : NULL;
    if (!f) {
        int err = errno;
        if (fd >= 0)
            close(fd);
        return status_errno(st, json_open_error(err), err, "%s", path);
    }
    enum status_code rc = ST_OK;
    char *text = NULL;
    size_t used = 0, room = 0;
    for (;;) {
        if (used == room) {
            room = room ? room * 2 : 1 << 14;
            char *more = realloc(text, room);
            if (!more) {
                rc = status_nomem(st, path, room);
                goto done;
            }
            text = more;
        }
        size_t got = fread(text + used, 1, room - used, f);
        used += got;
        if (used > max_bytes) {
            rc = status_set(st, ST_DATA_LOSS, "%s: over %zu bytes, no such file is that large", path, max_bytes);
            goto done;
        }
        if (got == 0)
            break;
    }
    if (ferror(f))
        rc = status_errno(st, ST_DATA_LOSS, errno, "%s: cannot be read", path);
    else
        rc = json_read_text(out, text, used, path, st);
done:
    free(text);
    fclose(f);
    return rc;
}

enum status_code json_read_need(struct json_source src, const char *field, struct status *st)
{
    if (lookup(src, field))
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "%s: %s is missing", src.file, field);
}

enum status_code json_read_uint(struct json_source src, const char *field, uint32_t min, uint32_t max, uint32_t *out,
                                struct status *st)
{
    const json_t *v = lookup(src, field);
    if (!v)
        return ST_OK;
    if (!json_is_integer(v))
        return wrong_type(src, field, v, "an integer", st);
    json_int_t n = json_integer_value(v);
    if (n < (json_int_t)min || n > (json_int_t)max)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %s: %lld, expected %u to %u", src.file, field, (long long)n,
                          min, max);
    *out = (uint32_t)n;
    return ST_OK;
}

enum status_code json_read_double(struct json_source src, const char *field, double min, double max, double *out,
                                  struct status *st)
{
    const json_t *v = lookup(src, field);
    if (!v)
        return ST_OK;
    if (!json_is_number(v))
        return wrong_type(src, field, v, "a number", st);
    double x = json_number_value(v);
    if (!(x >= min && x <= max))
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %s: %g, expected %g to %g", src.file, field, x, min, max);
    *out = x;
    return ST_OK;
}

enum status_code json_read_bool(struct json_source src, const char *field, bool *out, struct status *st)
{
    const json_t *v = lookup(src, field);
    if (!v)
        return ST_OK;
    if (!json_is_boolean(v))
        return wrong_type(src, field, v, "true or false", st);
    *out = json_is_true(v);
    return ST_OK;
}

enum status_code json_read_string(struct json_source src, const char *field, const char **out, struct status *st)
{
    const json_t *v = lookup(src, field);
    if (!v)
        return ST_OK;
    if (!json_is_string(v))
        return wrong_type(src, field, v, "a string", st);
    *out = json_string_value(v);
    return ST_OK;
}
