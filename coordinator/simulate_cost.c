/* simulate_cost.c - what steps take, from a file. */
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "coordinator/simulate.h"

#define MAX_FILE_BYTES (1u << 20)
#define MAX_US         1e9

struct reader {
    const char *name;
    struct status *st;
};

/* Member `key` of `in`, a number from lo to hi. path: for messages, "decode." or "". */
static enum status_code read_number(const struct reader *r, const json_t *in, const char *path, const char *key,
                                    double lo, double hi, double *out)
{
    const json_t *v = json_object_get(in, key);
    if (!json_is_number(v) || !(json_number_value(v) >= lo && json_number_value(v) <= hi))
        return status_set(r->st, ST_INVALID_ARGUMENT, "%s: %s%s: expected a number from %g to %g", r->name, path, key,
                          lo, hi);
    *out = json_number_value(v);
    return ST_OK;
}

static enum status_code read_whole(const struct reader *r, const json_t *in, const char *path, const char *key,
                                   uint64_t hi, uint64_t *out)
{
    const json_t *v = json_object_get(in, key);
    if (!json_is_integer(v) || json_integer_value(v) < 1 || (uint64_t)json_integer_value(v) > hi)
        return status_set(r->st, ST_INVALID_ARGUMENT, "%s: %s%s: expected a whole number from 1 to %llu", r->name, path,
                          key, (unsigned long long)hi);
    *out = (uint64_t)json_integer_value(v);
    return ST_OK;
}

static enum status_code no_others(const struct reader *r, const json_t *in, const char *path, const char *const *known)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)in, key, v)
    {
        size_t i = 0;
        while (known[i] && strcmp(known[i], key) != 0)
            i++;
        if (!known[i])
            return status_set(r->st, ST_INVALID_ARGUMENT, "%s: %s%.40s: unknown", r->name, path, key);
    }
    return ST_OK;
}

/* The terms in `names`, all of them needed and no others. */
static enum status_code read_terms(const struct reader *r, const json_t *root, const char *key,
                                   const char *const *names, struct cost_coef *out)
{
    static const char *const all[] = {"fixed_us", "decode_us", "kv_us", "row_us", "pair_us"};
    double *const to[] = {&out->fixed_us, &out->decode_us, &out->kv_us, &out->row_us, &out->pair_us};
    const json_t *in = json_object_get(root, key);
    char path[32];
    snprintf(path, sizeof path, "%s.", key);
    if (!json_is_object(in))
        return status_set(r->st, ST_INVALID_ARGUMENT, "%s: %s: expected an object", r->name, key);
    enum status_code rc = no_others(r, in, path, names);
    for (size_t i = 0; rc == ST_OK && names[i]; i++)
        for (size_t k = 0; k < sizeof all / sizeof *all; k++)
            if (strcmp(all[k], names[i]) == 0)
                rc = read_number(r, in, path, names[i], 0, MAX_US, to[k]);
    return rc;
}

static enum status_code read_kv(const struct reader *r, const json_t *root, struct kv_account *out)
{
    static const char *const known[] = {"token_bytes", "page_bytes", "pages", NULL};
    const json_t *in = json_object_get(root, "kv");
    if (!json_is_object(in))
        return status_set(r->st, ST_INVALID_ARGUMENT, "%s: kv: expected an object", r->name);
    enum status_code rc = no_others(r, in, "kv.", known);
    if (rc == ST_OK)
        rc = read_whole(r, in, "kv.", "token_bytes", INT32_MAX, &out->token_bytes);
    if (rc == ST_OK)
        rc = read_whole(r, in, "kv.", "page_bytes", UINT64_C(1) << 40, &out->page_bytes);
    if (rc == ST_OK)
        rc = read_whole(r, in, "kv.", "pages", UINT64_C(1) << 40, &out->total_pages);
    return rc;
}

static enum status_code read_root(const struct reader *r, const json_t *root, struct simulate_cost *c)
{
    static const char *const known[] = {"name",   "max_context", "slots",  "kv",    "floor_us",
                                        "decode", "prefill",     "hybrid", "noise", NULL};
    static const char *const decode[] = {"fixed_us", "decode_us", "kv_us", NULL};
    static const char *const prefill[] = {"fixed_us", "row_us", "pair_us", NULL};
    static const char *const hybrid[] = {"fixed_us", "decode_us", "kv_us", "row_us", "pair_us", NULL};
    const char *name = json_string_value(json_object_get(root, "name"));
    uint64_t context = 0, slots = 0;
    enum status_code rc = no_others(r, root, "", known);
    if (rc == ST_OK && (!name || strlen(name) >= sizeof c->name))
        rc = status_set(r->st, ST_INVALID_ARGUMENT, "%s: name: expected a text of at most %zu bytes", r->name,
                        sizeof c->name - 1);
    if (rc == ST_OK)
        rc = read_whole(r, root, "", "max_context", TRACE_MAX_TOKENS, &context);
    if (rc == ST_OK)
        rc = read_whole(r, root, "", "slots", 65536, &slots);
    if (rc == ST_OK)
        rc = read_kv(r, root, &c->kv);
    if (rc == ST_OK)
        rc = read_number(r, root, "", "floor_us", 0, MAX_US, &c->floor_us);
    if (rc == ST_OK)
        rc = read_terms(r, root, "decode", decode, &c->decode);
    if (rc == ST_OK)
        rc = read_terms(r, root, "prefill", prefill, &c->prefill);
    if (rc == ST_OK)
        rc = read_terms(r, root, "hybrid", hybrid, &c->hybrid);
    if (rc == ST_OK && json_object_get(root, "noise"))
        rc = read_number(r, root, "", "noise", 0, 1, &c->noise);
    if (rc != ST_OK)
        return rc;
    snprintf(c->name, sizeof c->name, "%s", name ? name : ""); /* it is there: checked above */
    c->max_context = (uint32_t)context;
    c->slots = (uint32_t)slots;
    return ST_OK;
}

enum status_code simulate_cost_parse(struct simulate_cost *out, const char *name, const char *text, size_t bytes,
                                     struct status *st)
{
    struct simulate_cost c = {.noise = 0};
    const struct reader r = {name, st};
    json_error_t e;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &e);
    if (!root)
        return status_set(st, ST_INVALID_ARGUMENT, "%s:%d: %s", name, e.line, e.text);
    enum status_code rc = json_is_object(root) ? read_root(&r, root, &c)
                                               : status_set(st, ST_INVALID_ARGUMENT, "%s: expected an object", name);
    json_decref(root);
    if (rc == ST_OK)
        *out = c;
    return rc;
}

enum status_code simulate_cost_load(struct simulate_cost *out, const char *path, struct status *st)
{
    struct stat sb;
    enum status_code rc;
    char *text = NULL;
    FILE *f = fopen(path, "rbe");
    if (!f)
        return status_errno(st, errno == ENOENT ? ST_NOT_FOUND : ST_PERMISSION_DENIED, errno, "%s", path);
    if (fstat(fileno(f), &sb) || !S_ISREG(sb.st_mode) || sb.st_size > (off_t)MAX_FILE_BYTES)
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s: expected a file of at most %u bytes", path, MAX_FILE_BYTES);
    else if (!(text = malloc((size_t)sb.st_size + 1)))
        rc = status_nomem(st, path, (size_t)sb.st_size + 1);
    else {
        size_t n = fread(text, 1, (size_t)sb.st_size, f);
        rc = ferror(f) ? status_errno(st, ST_INTERNAL, EIO, "%s", path) : simulate_cost_parse(out, path, text, n, st);
    }
    free(text);
    fclose(f);
    return rc;
}

static double linear(const struct cost_coef *c, const struct cost_step *s)
{
    return c->fixed_us + s->decodes * c->decode_us + (double)s->context * c->kv_us + s->rows * c->row_us +
           (double)s->pairs * c->pair_us;
}

double simulate_step_us(const struct simulate_cost *c, const struct cost_step *step)
{
    double us = c->floor_us;
    if (step->decodes) {
        const struct cost_step alone = {.decodes = step->decodes, .context = step->context};
        us = fmax(us, linear(&c->decode, &alone));
    }
    if (step->rows)
        us = fmax(us, linear(step->decodes ? &c->hybrid : &c->prefill, step));
    return us;
}
