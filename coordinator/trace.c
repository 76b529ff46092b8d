#include "coordinator/trace.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>

#define MAX_COLUMNS 32
#define MAX_FIELD   64  /* bytes of a value that is looked at */
#define MAX_ARRIVAL 1e9 /* seconds: over thirty years */

enum column { COLUMN_ARRIVAL, COLUMN_PROMPT, COLUMN_OUTPUT, COLUMNS };

static const struct {
    const char *name;
    enum column column;
} names[] = {
    {"arrival_s", COLUMN_ARRIVAL},      {"arrival", COLUMN_ARRIVAL},
    {"timestamp", COLUMN_ARRIVAL},      {"time", COLUMN_ARRIVAL},
    {"prompt_tokens", COLUMN_PROMPT},   {"input_tokens", COLUMN_PROMPT},
    {"contexttokens", COLUMN_PROMPT},   {"output_tokens", COLUMN_OUTPUT},
    {"generatedtokens", COLUMN_OUTPUT}, {"completion_tokens", COLUMN_OUTPUT},
};

struct reader {
    const char *name;
    unsigned long line;
    size_t at[COLUMNS];  /* where each stands in a line */
    double first_date_s; /* NAN: none was seen */
    size_t capacity;
    struct trace trace;
};

/* A value without the blanks around it. */
struct field {
    const char *text;
    size_t n;
};

static size_t split(const char *line, size_t n, struct field out[MAX_COLUMNS])
{
    size_t count = 0;
    for (size_t i = 0; count < MAX_COLUMNS;) {
        size_t end = i;
        while (end < n && line[end] != ',')
            end++;
        struct field f = {line + i, end - i};
        while (f.n && (*f.text == ' ' || *f.text == '\t'))
            f.text++, f.n--;
        while (f.n && strchr(" \t\r", f.text[f.n - 1]) && f.text[f.n - 1])
            f.n--;
        out[count++] = f;
        if (end == n)
            break;
        i = end + 1;
    }
    return count;
}

static enum status_code bad(const struct reader *r, const struct field *f, const char *expected, struct status *st)
{
    return status_set(st, ST_INVALID_ARGUMENT, "%s:%lu: \"%.*s\": expected %s", r->name, r->line,
                      (int)(f->n < MAX_FIELD ? f->n : MAX_FIELD), f->text, expected);
}

/* A copy that ends with 0; false when it is too long or has a 0 inside. */
static bool copy(char out[MAX_FIELD], const struct field *f)
{
    if (f->n == 0 || f->n >= MAX_FIELD || memchr(f->text, 0, f->n))
        return false;
    memcpy(out, f->text, f->n);
    out[f->n] = '\0';
    return true;
}

/* 2023-11-16 18:17:03.9799600, or with a T between; *out counts from 1970. */
static bool read_date(const char *text, double *out)
{
    struct tm tm = {0};
    int used = 0;
    char between;
    double seconds;
    if (sscanf(text, "%4d-%2d-%2d%c%2d:%2d:%n", &tm.tm_year, &tm.tm_mon, &tm.tm_mday, &between, &tm.tm_hour, &tm.tm_min,
               &used) != 6 ||
        !used || (between != ' ' && between != 'T') || text[used] < '0' || text[used] > '9')
        return false;
    char *end;
    seconds = strtod(text + used, &end);
    if (*end == 'Z')
        end++;
    if (*end || !(seconds >= 0 && seconds < 61) || tm.tm_year < 1970 || tm.tm_mon < 1 || tm.tm_mon > 12 ||
        tm.tm_mday < 1 || tm.tm_mday > 31 || tm.tm_hour < 0 || tm.tm_hour > 23 || tm.tm_min < 0 || tm.tm_min > 59)
        return false;
    tm.tm_year -= 1900;
    tm.tm_mon -= 1;
    *out = (double)timegm(&tm) + seconds;
    return true;
}

static enum status_code read_arrival(struct reader *r, const struct field *f, double *out, struct status *st)
{
    char text[MAX_FIELD], *end;
    if (!copy(text, f))
        return bad(r, f, "seconds or a date", st);
    double v;
    if (read_date(text, &v)) {
        if (r->trace.n == 0)
            r->first_date_s = v;
        else if (isnan(r->first_date_s))
            return bad(r, f, "seconds, as in the lines above", st);
        v -= r->first_date_s;
        if (v > MAX_ARRIVAL)
            return bad(r, f, "a date at most 1e9 seconds behind the first", st);
    } else {
        v = strtod(text, &end);
        if (*end || !isfinite(v) || v < 0 || v > MAX_ARRIVAL || !isnan(r->first_date_s))
            return bad(r, f, isnan(r->first_date_s) ? "seconds from 0 to 1e9, or a date" : "a date", st);
    }
    double last = r->trace.n ? r->trace.entry[r->trace.n - 1].arrival_s : 0;
    if (v < last)
        return bad(r, f, "an arrival that is not before the one above", st);
    *out = v;
    return ST_OK;
}

static enum status_code read_tokens(const struct reader *r, const struct field *f, uint32_t *out, struct status *st)
{
    char text[MAX_FIELD], *end;
    unsigned long v = 0;
    if (!copy(text, f) || text[0] < '0' || text[0] > '9' || (v = strtoul(text, &end, 10)) < 1 || *end ||
        v > TRACE_MAX_TOKENS)
        return bad(r, f, "a number of tokens from 1 to 16777216", st);
    *out = (uint32_t)v;
    return ST_OK;
}

/* Whether the first line has names; sets r->at then. */
static bool take_names(struct reader *r, const struct field *f, size_t n, enum status_code *rc, struct status *st)
{
    bool known[COLUMNS] = {false}, any = false;
    size_t at[COLUMNS] = {0};
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < sizeof names / sizeof *names; k++)
            if (f[i].n == strlen(names[k].name) && strncasecmp(f[i].text, names[k].name, f[i].n) == 0) {
                at[names[k].column] = i;
                known[names[k].column] = any = true;
            }
    *rc = ST_OK;
    if (!any)
        return false;
    if (!known[COLUMN_ARRIVAL] || !known[COLUMN_PROMPT] || !known[COLUMN_OUTPUT])
        *rc = status_set(st, ST_INVALID_ARGUMENT,
                         "%s:%lu: no column %s; expected arrival_s, prompt_tokens and output_tokens", r->name, r->line,
                         !known[COLUMN_ARRIVAL]  ? "arrival_s"
                         : !known[COLUMN_PROMPT] ? "prompt_tokens"
                                                 : "output_tokens");
    memcpy(r->at, at, sizeof at);
    return true;
}

static enum status_code append(struct reader *r, const struct trace_entry *e, struct status *st)
{
    struct trace *t = &r->trace;
    if (t->n == TRACE_MAX_ENTRIES)
        return status_set(st, ST_INVALID_ARGUMENT, "%s:%lu: more than %u requests", r->name, r->line,
                          TRACE_MAX_ENTRIES);
    if (t->n == r->capacity) {
        size_t capacity = r->capacity ? 2 * r->capacity : 256;
        struct trace_entry *grown = realloc(t->entry, capacity * sizeof *grown);
        if (!grown)
            return status_nomem(st, "trace", capacity * sizeof *grown);
        t->entry = grown;
        r->capacity = capacity;
    }
    t->entry[t->n++] = *e;
    return ST_OK;
}

static enum status_code take_line(struct reader *r, const char *line, size_t n, bool *named, struct status *st)
{
    const char *comment = memchr(line, '#', n);
    struct field f[MAX_COLUMNS];
    enum status_code rc;
    if (comment)
        n = (size_t)(comment - line);
    size_t count = split(line, n, f);
    if (count == 1 && f[0].n == 0)
        return ST_OK;
    if (!*named) {
        *named = true;
        if (take_names(r, f, count, &rc, st))
            return rc;
    }
    for (int i = 0; i < COLUMNS; i++)
        if (r->at[i] >= count)
            return status_set(st, ST_INVALID_ARGUMENT, "%s:%lu: %zu values, expected %zu or more", r->name, r->line,
                              count, r->at[i] + 1);
    struct trace_entry e;
    if ((rc = read_arrival(r, &f[r->at[COLUMN_ARRIVAL]], &e.arrival_s, st)) != ST_OK ||
        (rc = read_tokens(r, &f[r->at[COLUMN_PROMPT]], &e.prompt_tokens, st)) != ST_OK ||
        (rc = read_tokens(r, &f[r->at[COLUMN_OUTPUT]], &e.output_tokens, st)) != ST_OK)
        return rc;
    return append(r, &e, st);
}

enum status_code trace_parse(struct trace *out, const char *name, const char *text, size_t bytes, struct status *st)
{
    struct reader r = {.name = name, .at = {0, 1, 2}, .first_date_s = NAN};
    bool named = false;
    enum status_code rc = ST_OK;
    for (size_t i = 0; rc == ST_OK && i < bytes;) {
        const char *nl = memchr(text + i, '\n', bytes - i);
        size_t end = nl ? (size_t)(nl - text) : bytes;
        r.line++;
        rc = take_line(&r, text + i, end - i, &named, st);
        i = end + 1;
    }
    if (rc == ST_OK && r.trace.n == 0)
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s: no requests in it", name);
    if (rc != ST_OK) {
        trace_free(&r.trace);
        return rc;
    }
    *out = r.trace;
    return ST_OK;
}

enum status_code trace_load(struct trace *out, const char *path, struct status *st)
{
    struct stat sb;
    enum status_code rc;
    char *text = NULL;
    FILE *f = fopen(path, "rbe");
    if (!f)
        return status_errno(st, errno == ENOENT ? ST_NOT_FOUND : ST_PERMISSION_DENIED, errno, "%s", path);
    if (fstat(fileno(f), &sb) || !S_ISREG(sb.st_mode) || sb.st_size > (off_t)TRACE_MAX_BYTES) {
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s: expected a file of at most %u MiB", path, TRACE_MAX_BYTES >> 20);
        goto done;
    }
    text = malloc((size_t)sb.st_size + 1);
    if (!text) {
        rc = status_nomem(st, path, (size_t)sb.st_size + 1);
        goto done;
    }
    size_t n = fread(text, 1, (size_t)sb.st_size, f);
    rc = ferror(f) ? status_errno(st, ST_INTERNAL, EIO, "%s", path) : trace_parse(out, path, text, n, st);
done:
    free(text);
    fclose(f);
    return rc;
}

void trace_free(struct trace *t)
{
    free(t->entry);
    *t = (struct trace){0};
}
