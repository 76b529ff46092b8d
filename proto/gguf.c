#include "proto/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/gguf_internal.h"

#define READ_BYTES        (1u << 16) /* at a time, at least */
#define DEFAULT_ALIGNMENT 32
#define MAX_ALIGNMENT     (1u << 20)
#define MIN_VALUE_BYTES   13 /* in the file: an empty key, its kind, one byte */
#define MIN_TENSOR_BYTES  32 /* an empty name, one dimension */
#define MAX_KEY_BYTES     65535u

/* Walks through the header and reads more of the file as it goes: how long the header is stands nowhere. */
struct reader {
    struct gguf *g;
    uint64_t file_bytes;
    size_t at, used, room; /* in g->header */
    struct status *st;
};

static enum status_code damaged(struct reader *r, const char *what)
{
    return status_set(r->st, ST_DATA_LOSS, "%s: not a valid GGUF file: %s at byte %zu", r->g->path, what, r->at);
}

/* Makes n more bytes at r->at readable. */
static enum status_code need(struct reader *r, uint64_t n)
{
    if (n <= r->used - r->at)
        return ST_OK;
    if (n > r->file_bytes - r->at) {
        damaged(r, "it ends within its header, or a length is wrong,");
        return ST_DATA_LOSS; /* codes are spelled out for the static analyser, which does not see into status.c */
    }
    if (n > GGUF_MAX_HEADER_BYTES - r->at) {
        status_set(r->st, ST_DATA_LOSS, "%s: a header of more than %u bytes, no such file is known", r->g->path,
                   GGUF_MAX_HEADER_BYTES);
        return ST_DATA_LOSS;
    }
    size_t goal = r->at + (size_t)n;
    goal = goal < r->used + READ_BYTES ? r->used + READ_BYTES : goal;
    goal = goal < r->file_bytes ? goal : (size_t)r->file_bytes;
    if (goal > r->room) {
        size_t room = goal * 2;
        uint8_t *grown = realloc(r->g->header, room);
        if (!grown) {
            status_nomem(r->st, "GGUF header", room);
            return ST_RESOURCE_EXHAUSTED;
        }
        r->g->header = grown;
        r->room = room;
    }
    while (r->used < goal) {
        ssize_t got = pread(r->g->fd, r->g->header + r->used, goal - r->used, (off_t)r->used);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return status_errno(r->st, ST_DATA_LOSS, errno, "%s: cannot be read", r->g->path);
        if (got == 0)
            return status_set(r->st, ST_DATA_LOSS, "%s: another program cut it while it was read", r->g->path);
        r->used += (size_t)got;
    }
    return ST_OK;
}

static enum status_code take_u32(struct reader *r, uint32_t *out)
{
    enum status_code rc = need(r, 4);
    if (rc != ST_OK)
        return rc;
    const uint8_t *p = r->g->header + r->at;
    *out = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
    r->at += 4;
    return ST_OK;
}

static enum status_code take_u64(struct reader *r, uint64_t *out)
{
    uint32_t low, high;
    enum status_code rc;
    if ((rc = take_u32(r, &low)) != ST_OK || (rc = take_u32(r, &high)) != ST_OK)
        return rc;
    *out = (uint64_t)high << 32 | low;
    return ST_OK;
}

static enum status_code take_name(struct reader *r, char **out, uint32_t max_bytes)
{
    uint64_t n;
    enum status_code rc = take_u64(r, &n);
    if (rc != ST_OK)
        return rc;
    if (n == 0 || n > max_bytes)
        return damaged(r, "a name that is empty or too long");
    if ((rc = need(r, n)) != ST_OK)
        return rc;
    if (memchr(r->g->header + r->at, 0, n))
        return damaged(r, "a name with a NUL byte");
    char *name = malloc(n + 1);
    if (!name)
        return status_nomem(r->st, "GGUF name", n + 1);
    memcpy(name, r->g->header + r->at, n);
    name[n] = '\0';
    *out = name;
    r->at += n;
    return ST_OK;
}

static enum status_code skip(struct reader *r, uint64_t n)
{
    enum status_code rc = need(r, n);
    if (rc == ST_OK)
        r->at += n;
    return rc;
}

static enum status_code take_elements(struct reader *r, struct gguf_value *v)
{
    if (v->elements == GGUF_ARRAY)
        return status_set(r->st, ST_UNIMPLEMENTED, "%s: %s: an array of arrays is not supported", r->g->path, v->key);
    uint32_t each = gguf_kind_bytes(v->elements);
    if (each) {
        if (v->count > r->file_bytes / each)
            return damaged(r, "an array longer than the file");
        return skip(r, v->count * each);
    }
    if (v->elements != GGUF_STRING)
        return damaged(r, "a kind of value that is none");
    for (uint64_t i = 0; i < v->count; i++) {
        uint64_t n;
        enum status_code rc;
        if ((rc = take_u64(r, &n)) != ST_OK || (rc = skip(r, n)) != ST_OK)
            return rc;
    }
    return ST_OK;
}

static enum status_code take_value(struct reader *r, struct gguf_value *v)
{
    enum status_code rc;
    if ((rc = take_name(r, &v->key, MAX_KEY_BYTES)) != ST_OK || (rc = take_u32(r, &v->kind)) != ST_OK)
        return rc;
    if (v->kind == GGUF_ARRAY) {
        if ((rc = take_u32(r, &v->elements)) != ST_OK || (rc = take_u64(r, &v->count)) != ST_OK)
            return rc;
        v->at = r->at;
        return take_elements(r, v);
    }
    if (v->kind == GGUF_STRING) {
        if ((rc = take_u64(r, &v->count)) != ST_OK)
            return rc;
        v->at = r->at;
        return skip(r, v->count);
    }
    uint32_t bytes = gguf_kind_bytes(v->kind);
    if (!bytes)
        return damaged(r, "a kind of value that is none");
    v->at = r->at;
    return skip(r, bytes);
}

/* Size by type and shape; ne: whether the product of the sizes fits. */
static enum status_code measure(struct reader *r, struct gguf_tensor *t)
{
    uint64_t values = 1;
    for (uint32_t i = 0; i < t->dims; i++) {
        if (t->shape[i] == 0 || t->shape[i] > INT64_MAX / values)
            return status_set(r->st, ST_DATA_LOSS, "%s: tensor %s: a size of 0, or too many elements", r->g->path,
                              t->name);
        values *= t->shape[i];
    }
    const struct gguf_type_info *info = gguf_type_find(t->type);
    if (!info)
        return ST_OK;
    if (t->shape[0] % info->block_values)
        return status_set(r->st, ST_DATA_LOSS, "%s: tensor %s: rows of %llu values are no whole blocks of %s",
                          r->g->path, t->name, (unsigned long long)t->shape[0], info->name);
    uint64_t blocks = values / info->block_values;
    if (blocks > r->file_bytes / info->block_bytes)
        return status_set(r->st, ST_DATA_LOSS, "%s: tensor %s: larger than the file", r->g->path, t->name);
    t->bytes = blocks * info->block_bytes;
    return ST_OK;
}

static enum status_code take_tensor(struct reader *r, struct gguf_tensor *t)
{
    char *name = NULL;
    enum status_code rc = take_name(r, &name, GGUF_MAX_NAME_BYTES);
    t->name = name;
    if (rc != ST_OK || (rc = take_u32(r, &t->dims)) != ST_OK)
        return rc;
    if (t->dims == 0 || t->dims > GGUF_MAX_DIMS)
        return status_set(r->st, ST_DATA_LOSS, "%s: tensor %s: %u dimensions, expected 1 to %d", r->g->path, t->name,
                          t->dims, GGUF_MAX_DIMS);
    for (uint32_t i = 0; i < t->dims; i++)
        if ((rc = take_u64(r, &t->shape[i])) != ST_OK)
            return rc;
    if ((rc = take_u32(r, &t->type)) != ST_OK || (rc = take_u64(r, &t->offset)) != ST_OK)
        return rc;
    return measure(r, t);
}

/* ---- the whole ---- */

static int by_key(const void *a, const void *b)
{
    return strcmp(((const struct gguf_value *)a)->key, ((const struct gguf_value *)b)->key);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct gguf_tensor *)a)->name, ((const struct gguf_tensor *)b)->name);
}

static int by_offset(const void *a, const void *b)
{
    uint64_t x = ((const struct gguf_tensor *)a)->offset, y = ((const struct gguf_tensor *)b)->offset;
    return (x > y) - (x < y);
}

/* The lists grow as entries are really read: a count in the file is only a claim. */
static void *grown(void *list, size_t n, size_t each)
{
    return n & (n - 1) ? list : realloc(list, (n ? 2 * n : 1) * each); /* at 0, 1, 2, 4, 8 ... */
}

static enum status_code take_lists(struct reader *r, uint64_t values, uint64_t tensors)
{
    struct gguf *g = r->g;
    enum status_code rc;
    for (uint64_t i = 0; i < values; i++) {
        struct gguf_value *v = grown(g->value, g->values, sizeof *v);
        if (!v)
            return status_nomem(r->st, "GGUF values", g->values * sizeof *v);
        g->value = v;
        v[g->values++] = (struct gguf_value){0};
        if ((rc = take_value(r, &v[i])) != ST_OK)
            return rc;
    }
    for (uint64_t i = 0; i < tensors; i++) {
        struct gguf_tensor *t = grown(g->tensor, g->tensors, sizeof *t);
        if (!t)
            return status_nomem(r->st, "GGUF tensors", g->tensors * sizeof *t);
        g->tensor = t;
        t[g->tensors++] = (struct gguf_tensor){0};
        if ((rc = take_tensor(r, &t[i])) != ST_OK)
            return rc;
    }
    return ST_OK;
}

/* Offsets become those of the file. */
static enum status_code place_tensors(struct reader *r, uint32_t alignment)
{
    struct gguf *g = r->g;
    uint64_t start = ((uint64_t)r->at + alignment - 1) / alignment * alignment, end = 0;
    uint64_t room = start < r->file_bytes ? r->file_bytes - start : 0;
    if (g->tensors)
        qsort(g->tensor, g->tensors, sizeof *g->tensor, by_offset);
    for (size_t i = 0; i < g->tensors; i++) {
        struct gguf_tensor *t = &g->tensor[i];
        if (t->offset % alignment)
            return status_set(r->st, ST_DATA_LOSS, "%s: tensor %s: its offset is no multiple of %u", g->path, t->name,
                              alignment);
        /* a type that is not known has no bytes here, but its tensor begins within the file all the same */
        if (start > r->file_bytes || t->offset > room || t->bytes > room - t->offset)
            return status_set(r->st, ST_DATA_LOSS, "%s: tensor %s lies beyond the end of the file", g->path, t->name);
        if (t->offset < end)
            return status_set(r->st, ST_DATA_LOSS, "%s: tensor %s overlaps %s", g->path, t->name, t[-1].name);
        end = t->offset + t->bytes;
        t->offset += start;
    }
    return ST_OK;
}

static enum status_code check_unique(struct reader *r)
{
    struct gguf *g = r->g;
    if (g->values)
        qsort(g->value, g->values, sizeof *g->value, by_key);
    if (g->tensors)
        qsort(g->tensor, g->tensors, sizeof *g->tensor, by_name);
    for (size_t i = 1; i < g->values; i++)
        if (strcmp(g->value[i - 1].key, g->value[i].key) == 0)
            return status_set(r->st, ST_DATA_LOSS, "%s: %.200s: there twice", g->path, g->value[i].key);
    for (size_t i = 1; i < g->tensors; i++)
        if (strcmp(g->tensor[i - 1].name, g->tensor[i].name) == 0)
            return status_set(r->st, ST_DATA_LOSS, "%s: tensor %s: there twice", g->path, g->tensor[i].name);
    return ST_OK;
}

static enum status_code check_version(struct reader *r)
{
    uint32_t version;
    enum status_code rc = r->file_bytes < 8 ? ST_OK : need(r, 4);
    if (rc != ST_OK)
        return rc;
    if (r->file_bytes < 8 || memcmp(r->g->header, "GGUF", 4) != 0)
        return status_set(r->st, ST_DATA_LOSS, "%s: not a GGUF file: it does not begin with \"GGUF\"", r->g->path);
    r->at = 4;
    if ((rc = take_u32(r, &version)) != ST_OK)
        return rc;
    if (version == 2u << 24 || version == 3u << 24)
        return status_set(r->st, ST_UNIMPLEMENTED, "%s: a big-endian file is not supported", r->g->path);
    if (version < 2 || version > 3)
        return status_set(r->st, ST_UNIMPLEMENTED, "%s: GGUF version %u is not supported, only 2 and 3", r->g->path,
                          version);
    return ST_OK;
}

static enum status_code read_header(struct reader *r)
{
    uint64_t tensors, values;
    enum status_code rc = check_version(r);
    if (rc != ST_OK || (rc = take_u64(r, &tensors)) != ST_OK || (rc = take_u64(r, &values)) != ST_OK)
        return rc;
    if (tensors > r->file_bytes / MIN_TENSOR_BYTES || values > r->file_bytes / MIN_VALUE_BYTES)
        return damaged(r, "more tensors or values than the file has room for");
    if ((rc = take_lists(r, values, tensors)) != ST_OK || (rc = check_unique(r)) != ST_OK)
        return rc;
    uint32_t alignment = DEFAULT_ALIGNMENT, parts = 1;
    if ((rc = gguf_read_uint(r->g, "general.alignment", 1, MAX_ALIGNMENT, &alignment, r->st)) != ST_OK ||
        (rc = gguf_read_uint(r->g, "split.count", 0, UINT32_MAX, &parts, r->st)) != ST_OK)
        return rc;
    if (alignment & (alignment - 1))
        return status_set(r->st, ST_DATA_LOSS, "%s: general.alignment: %u, expected a power of two", r->g->path,
                          alignment);
    if (parts > 1)
        return status_set(r->st, ST_UNIMPLEMENTED, "%s: split.count: a model in %u files is not supported, only in one",
                          r->g->path, parts);
    if ((rc = place_tensors(r, alignment)) != ST_OK)
        return rc;
    if (r->g->tensors)
        qsort(r->g->tensor, r->g->tensors, sizeof *r->g->tensor, by_name);
    return ST_OK;
}

static enum status_code open_path(struct reader *r, const char *path)
{
    struct gguf *g = r->g;
    struct stat info;
    g->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO would wait for a writer */
    if (g->fd < 0) {
        enum status_code code = errno == ENOENT || errno == ENOTDIR                     ? ST_NOT_FOUND
                                : errno == ENOMEM || errno == EMFILE || errno == ENFILE ? ST_RESOURCE_EXHAUSTED
                                                                                        : ST_INVALID_ARGUMENT;
        return status_errno(r->st, code, errno, "%s", path);
    }
    if (fstat(g->fd, &info) != 0)
        return status_errno(r->st, ST_INVALID_ARGUMENT, errno, "%s", path);
    if (!S_ISREG(info.st_mode))
        return status_set(r->st, ST_INVALID_ARGUMENT, "%s: not a regular file", path);
    r->file_bytes = (uint64_t)info.st_size;
    g->owns_header = true;
    return ST_OK;
}

static enum status_code open_any(struct gguf **out, const char *path, const void *data, size_t bytes, struct status *st)
{
    struct gguf *g = calloc(1, sizeof *g);
    if (!g)
        return status_nomem(st, "GGUF file", sizeof *g);
    struct reader r = {.g = g, .st = st};
    enum status_code rc;
    g->fd = -1;
    g->path = strdup(path);
    if (!g->path) {
        rc = status_nomem(st, "GGUF path", strlen(path));
        goto fail;
    }
    if (data) {
        g->header = (uint8_t *)(uintptr_t)data; /* never written to: all of it is there */
        r.file_bytes = r.used = bytes;
    } else if ((rc = open_path(&r, path)) != ST_OK) {
        goto fail;
    }
    if ((rc = read_header(&r)) != ST_OK)
        goto fail;
    *out = g;
    return ST_OK;
fail:
    gguf_close(g);
    return rc;
}

bool gguf_is_file(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

enum status_code gguf_open(struct gguf **out, const char *path, struct status *st)
{
    return open_any(out, path, NULL, 0, st);
}

enum status_code gguf_open_memory(struct gguf **out, const void *data, size_t bytes, const char *name,
                                  struct status *st)
{
    return open_any(out, name, data, bytes, st);
}

enum status_code gguf_read_tensor(const struct gguf *g, const struct gguf_tensor *t, void *out, size_t bytes,
                                  struct status *st)
{
    if (g->fd < 0) {
        memcpy(out, g->header + t->offset, bytes);
        return ST_OK;
    }
    for (size_t done = 0; done < bytes;) {
        ssize_t got = pread(g->fd, (uint8_t *)out + done, bytes - done, (off_t)(t->offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return status_errno(st, ST_DATA_LOSS, errno, "%s: tensor %s", g->path, t->name);
        if (got == 0)
            return status_set(st, ST_DATA_LOSS, "%s: another program cut it while it was read", g->path);
        done += (size_t)got;
    }
    return ST_OK;
}

void gguf_close(struct gguf *g)
{
    if (!g)
        return;
    for (size_t i = 0; i < g->values; i++)
        free(g->value[i].key);
    for (size_t i = 0; i < g->tensors; i++)
        free((char *)(uintptr_t)g->tensor[i].name);
    free(g->value);
    free(g->tensor);
    if (g->owns_header)
        free(g->header);
    if (g->fd >= 0)
        close(g->fd);
    free(g->path);
    free(g);
}
