#include "worker/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "worker/mapped_read.h"
#include "worker/model_json.h"

#define MAX_INDEX_BYTES (64u << 20)
#define MAX_FILES       4096

struct entry {
    const char *name;  /* in the header document of its file */
    const char *dtype; /* as spelled there */
    uint32_t file;
    uint32_t dims;
    uint64_t shape[SAFETENSORS_MAX_DIMS];
    uint64_t begin; /* within the data of its file */
    uint64_t end;
};

struct file {
    char *path;
    void *map; /* to be unmapped; NULL when the memory is the caller's */
    const uint8_t *bytes;
    uint64_t size;
    uint64_t data_at; /* 8 + N */
    struct stat info; /* when it was mapped */
    json_t *header;
};

struct safetensors {
    struct file *files;
    uint32_t n_files;
    struct entry *entries; /* sorted by name once all files are read */
    size_t n_entries;
};

/* Bytes of one element; 0: a dtype we do not know, whose size is not checked. */
static uint32_t dtype_bytes(const char *name)
{
    static const struct {
        const char *name;
        uint32_t bytes;
    } known[] = {
        {"F32", 4}, {"BF16", 2}, {"F16", 2}, {"F64", 8}, {"I64", 8},     {"I32", 4},     {"I16", 2},  {"I8", 1},
        {"U64", 8}, {"U32", 4},  {"U16", 2}, {"U8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"BOOL", 1},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(known[i].name, name) == 0)
            return known[i].bytes;
    return 0;
}

static bool dtype_usable(const char *name, enum mat_dtype *out)
{
    if (strcmp(name, "F32") == 0)
        *out = MAT_F32;
    else if (strcmp(name, "BF16") == 0)
        *out = MAT_BF16;
    else if (strcmp(name, "F16") == 0)
        *out = MAT_F16;
    else
        return false;
    return true;
}

static enum status_code damaged(const struct file *f, const char *tensor, const char *what, struct status *st)
{
    return status_set(st, ST_DATA_LOSS, "%s: tensor %.100s: %s", f->path, tensor, what);
}

/* A non-negative integer of an array. */
static bool array_uint(const json_t *array, size_t i, uint64_t *out)
{
    const json_t *v = json_array_get(array, i);
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        return false;
    *out = (uint64_t)json_integer_value(v);
    return true;
}

static enum status_code parse_entry(struct entry *e, const struct file *f, const char *name, const json_t *v,
                                    struct status *st)
{
    const json_t *shape = json_object_get(v, "shape"), *offsets = json_object_get(v, "data_offsets");
    e->name = name;
    e->dtype = json_string_value(json_object_get(v, "dtype"));
    if (!e->dtype)
        return damaged(f, name, "dtype: expected a string", st);
    if (!json_is_array(shape) || json_array_size(shape) > SAFETENSORS_MAX_DIMS)
        return damaged(f, name, "shape: expected an array of at most 8 integers", st);
    uint64_t elements = 1;
    e->dims = (uint32_t)json_array_size(shape);
    for (uint32_t i = 0; i < e->dims; i++) {
        if (!array_uint(shape, i, &e->shape[i]))
            return damaged(f, name, "shape: expected integers of at least 0", st);
        if (__builtin_mul_overflow(elements, e->shape[i], &elements))
            return damaged(f, name, "shape: more elements than 64 bits can count", st);
    }
    if (!json_is_array(offsets) || json_array_size(offsets) != 2 || !array_uint(offsets, 0, &e->begin) ||
        !array_uint(offsets, 1, &e->end))
        return damaged(f, name, "data_offsets: expected two integers of at least 0", st);

    uint64_t data_bytes = f->size - f->data_at;
    if (e->begin > e->end || e->end > data_bytes)
        return status_set(st, ST_DATA_LOSS,
                          "%s: tensor %.100s: data_offsets [%llu, %llu], but the file has %llu bytes of data: "
                          "truncated or damaged",
                          f->path, name, (unsigned long long)e->begin, (unsigned long long)e->end,
                          (unsigned long long)data_bytes);
    uint32_t size = dtype_bytes(e->dtype);
    uint64_t expected;
    if (size && (__builtin_mul_overflow(elements, (uint64_t)size, &expected) || expected != e->end - e->begin))
        return status_set(
            st, ST_DATA_LOSS, "%s: tensor %.100s: %llu elements of %.20s do not fit data_offsets [%llu, %llu]", f->path,
            name, (unsigned long long)elements, e->dtype, (unsigned long long)e->begin, (unsigned long long)e->end);
    return ST_OK;
}

static int by_offset(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct entry *)a)->name, ((const struct entry *)b)->name);
}

/* The tensors of one file must tile its data. */
static enum status_code check_tiling(struct entry *e, size_t n, const struct file *f, struct status *st)
{
    uint64_t at = 0, data_bytes = f->size - f->data_at;
    qsort(e, n, sizeof *e, by_offset);
    for (size_t i = 0; i < n; i++) {
        if (e[i].begin < at)
            return status_set(st, ST_DATA_LOSS, "%s: tensor %.100s at data offset %llu overlaps tensor %.100s", f->path,
                              e[i].name, (unsigned long long)e[i].begin, e[i - 1].name);
        if (e[i].begin > at)
            return status_set(st, ST_DATA_LOSS,
                              "%s: tensor %.100s at data offset %llu: %llu bytes before it belong to none", f->path,
                              e[i].name, (unsigned long long)e[i].begin, (unsigned long long)(e[i].begin - at));
        at = e[i].end;
    }
    if (at != data_bytes)
        return status_set(st, ST_DATA_LOSS, "%s: %llu bytes of data, but its tensors end at %llu", f->path,
                          (unsigned long long)data_bytes, (unsigned long long)at);
    return ST_OK;
}

struct copy {
    void *to;
    const void *from;
    size_t bytes;
};

static void copy_bytes(void *arg)
{
    const struct copy *c = arg;
    memcpy(c->to, c->from, c->bytes);
}

static enum status_code gone(const struct file *f, struct status *st)
{
    return status_set(st, ST_DATA_LOSS, "%s: cannot be read to its end: another program cuts it, or the disk fails",
                      f->path);
}

/* The JSON of the header, out of a copy: a parser cannot be left half-way when the file is cut. */
static enum status_code parse_header(struct file *f, uint64_t length, struct status *st)
{
    char *text = malloc(length ? length : 1);
    if (!text)
        return status_nomem(st, f->path, length);
    struct copy c = {text, f->bytes + 8, length};
    enum status_code rc =
        mapped_read(copy_bytes, &c) ? json_read_text(&f->header, text, length, f->path, st) : gone(f, st);
    free(text);
    return rc;
}

/* Header of files[n]; appends its tensors to the entries. */
static enum status_code read_header(struct safetensors *s, uint32_t n, struct status *st)
{
    struct file *f = &s->files[n];
    uint64_t length = 0;
    if (f->size < 8)
        return status_set(st, ST_DATA_LOSS, "%s: %llu bytes, too short for a safetensors file", f->path,
                          (unsigned long long)f->size);
    uint8_t start[8];
    struct copy c = {start, f->bytes, sizeof start};
    if (!mapped_read(copy_bytes, &c))
        return gone(f, st);
    for (int i = 7; i >= 0; i--)
        length = length << 8 | start[i];
    if (length > f->size - 8 || length > SAFETENSORS_MAX_HEADER)
        return status_set(st, ST_DATA_LOSS,
                          "%s: header of %llu bytes in a file of %llu: truncated, or no safetensors file", f->path,
                          (unsigned long long)length, (unsigned long long)f->size);
    f->data_at = 8 + length;
    enum status_code rc = parse_header(f, length, st);
    if (rc != ST_OK)
        return rc;

    size_t room = s->n_entries + json_object_size(f->header), first = s->n_entries;
    struct entry *grown = realloc(s->entries, (room ? room : 1) * sizeof *grown);
    if (!grown)
        return status_nomem(st, "list of tensors", room * sizeof *grown);
    s->entries = grown;
    const char *name;
    json_t *v;
    json_object_foreach(f->header, name, v)
    {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        if (!json_is_object(v))
            return damaged(f, name, "expected an object with dtype, shape and data_offsets", st);
        struct entry *e = &s->entries[s->n_entries];
        memset(e, 0, sizeof *e);
        e->file = n;
        if ((rc = parse_entry(e, f, name, v, st)) != ST_OK)
            return rc;
        s->n_entries++;
    }
    return check_tiling(s->entries + first, s->n_entries - first, f, st);
}

/* Maps the file; f->path is set. An empty file stays without bytes. */
static enum status_code map_file(struct file *f, struct status *st)
{
    int fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO would wait for a writer */
    if (fd < 0) {
        int err = errno;
        return status_errno(st, json_open_error(err), err, "%s", f->path);
    }
    enum status_code rc = ST_OK;
    struct stat info;
    if (fstat(fd, &info) != 0) {
        rc = status_errno(st, ST_INVALID_ARGUMENT, errno, "%s", f->path);
    } else if (!S_ISREG(info.st_mode)) {
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s: not a regular file", f->path);
    } else if (info.st_size > 0) {
        void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) {
            rc = status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "%s: mmap of %lld bytes", f->path,
                              (long long)info.st_size);
        } else {
            f->map = map;
            f->bytes = map;
            f->size = (uint64_t)info.st_size;
            f->info = info;
        }
    }
    close(fd);
    return rc;
}

/* NULL and RESOURCE_EXHAUSTED when memory is out. dir NULL: the name is the path. */
static struct file *add_file(struct safetensors *s, const char *dir, const char *name, struct status *st)
{
    struct file *grown = realloc(s->files, (s->n_files + 1) * sizeof *grown);
    if (!grown) {
        status_nomem(st, "list of files", (s->n_files + 1) * sizeof *grown);
        return NULL;
    }
    s->files = grown;
    struct file *f = &s->files[s->n_files];
    memset(f, 0, sizeof *f);
    int length = dir ? asprintf(&f->path, "%s/%s", dir, name) : asprintf(&f->path, "%s", name);
    if (length < 0) {
        status_nomem(st, "path of a file", strlen(name));
        return NULL;
    }
    s->n_files++;
    return f;
}

/* Number of the file of that name, n_files when it is new. Few files, and most tensors stand in the one before. */
static uint32_t file_number(const struct safetensors *s, const char *name)
{
    size_t length = strlen(name);
    for (uint32_t i = s->n_files; i-- > 0;) {
        size_t n = strlen(s->files[i].path);
        if (n > length && s->files[i].path[n - length - 1] == '/' && strcmp(s->files[i].path + n - length, name) == 0)
            return i;
    }
    return s->n_files;
}

static enum status_code add_indexed_files(struct safetensors *s, const char *dir, const char *index_path,
                                          const json_t *map, struct status *st)
{
    const char *tensor;
    json_t *v;
    json_object_foreach((json_t *)map, tensor, v)
    {
        const char *name = json_string_value(v);
        if (!name || !*name || strchr(name, '/') || name[0] == '.')
            return status_set(st, ST_DATA_LOSS, "%s: weight_map: %.100s: expected the name of a file in this folder",
                              index_path, tensor);
        if (file_number(s, name) < s->n_files)
            continue;
        if (s->n_files == MAX_FILES)
            return status_set(st, ST_DATA_LOSS, "%s: weight_map: more than %d files", index_path, MAX_FILES);
        if (!add_file(s, dir, name, st))
            return ST_RESOURCE_EXHAUSTED;
    }
    return ST_OK;
}

/* After all headers are read and sorted: every tensor of the index stands in the file that it names. */
static enum status_code check_index(const struct safetensors *s, const char *index_path, const json_t *map,
                                    struct status *st)
{
    const char *tensor;
    json_t *v;
    json_object_foreach((json_t *)map, tensor, v)
    {
        struct entry key = {.name = tensor};
        const struct entry *e = s->n_entries ? bsearch(&key, s->entries, s->n_entries, sizeof key, by_name) : NULL;
        if (!e || e->file != file_number(s, json_string_value(v)))
            return status_set(st, ST_DATA_LOSS, "%s: weight_map: tensor %.100s is not in %.100s", index_path, tensor,
                              json_string_value(v));
    }
    return ST_OK;
}

static enum status_code sort_entries(struct safetensors *s, struct status *st)
{
    if (s->n_entries)
        qsort(s->entries, s->n_entries, sizeof *s->entries, by_name);
    for (size_t i = 1; i < s->n_entries; i++)
        if (strcmp(s->entries[i - 1].name, s->entries[i].name) == 0)
            return status_set(st, ST_DATA_LOSS, "%s: tensor %.100s is also in %s", s->files[s->entries[i].file].path,
                              s->entries[i].name, s->files[s->entries[i - 1].file].path);
    return ST_OK;
}

static enum status_code open_files(struct safetensors *s, struct status *st)
{
    enum status_code rc;
    for (uint32_t i = 0; i < s->n_files; i++)
        if ((rc = map_file(&s->files[i], st)) != ST_OK || (rc = read_header(s, i, st)) != ST_OK)
            return rc;
    return sort_entries(s, st);
}

static enum status_code open_indexed(struct safetensors *s, const char *dir, const char *index_path, struct status *st)
{
    json_t *index = NULL;
    enum status_code rc = json_read_file(&index, index_path, MAX_INDEX_BYTES, st);
    if (rc == ST_NOT_FOUND)
        return status_set(st, ST_NOT_FOUND, "%s: neither model.safetensors nor model.safetensors.index.json is there",
                          dir);
    if (rc != ST_OK)
        return rc;
    const json_t *map = json_object_get(index, "weight_map");
    if (!json_is_object(map))
        rc = status_set(st, ST_DATA_LOSS, "%s: weight_map: expected an object", index_path);
    else if ((rc = add_indexed_files(s, dir, index_path, map, st)) == ST_OK && (rc = open_files(s, st)) == ST_OK)
        rc = check_index(s, index_path, map, st);
    if (rc == ST_NOT_FOUND)
        status_prefix(st, "%s names a file that is absent", index_path);
    json_decref(index);
    return rc;
}

enum status_code safetensors_open(struct safetensors **out, const char *dir, struct status *st)
{
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "safetensors", sizeof *s);
    enum status_code rc;
    char *index_path = NULL, *single_path = NULL;
    if (asprintf(&index_path, "%s/model.safetensors.index.json", dir) < 0) {
        index_path = NULL;
        rc = status_nomem(st, "path of the index", strlen(dir));
        goto fail;
    }
    if (asprintf(&single_path, "%s/model.safetensors", dir) < 0) {
        single_path = NULL;
        rc = status_nomem(st, "path of the weights", strlen(dir));
        goto fail;
    }
    struct stat info;
    if (lstat(single_path, &info) == 0) /* also a link to nowhere: the message is about it then */
        rc = add_file(s, dir, "model.safetensors", st) ? open_files(s, st) : ST_RESOURCE_EXHAUSTED;
    else
        rc = open_indexed(s, dir, index_path, st);
    if (rc != ST_OK)
        goto fail;
    free(index_path);
    free(single_path);
    *out = s;
    return ST_OK;
fail:
    free(index_path);
    free(single_path);
    safetensors_close(s);
    return rc;
}

enum status_code safetensors_open_memory(struct safetensors **out, const void *data, size_t bytes, const char *name,
                                         struct status *st)
{
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "safetensors", sizeof *s);
    enum status_code rc = ST_RESOURCE_EXHAUSTED;
    struct file *f = add_file(s, NULL, name, st);
    if (!f)
        goto fail;
    f->bytes = data;
    f->size = bytes;
    if ((rc = read_header(s, 0, st)) != ST_OK || (rc = sort_entries(s, st)) != ST_OK)
        goto fail;
    *out = s;
    return ST_OK;
fail:
    safetensors_close(s);
    return rc;
}

void safetensors_close(struct safetensors *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; i < s->n_files; i++) {
        json_decref(s->files[i].header);
        if (s->files[i].map)
            munmap(s->files[i].map, s->files[i].size);
        free(s->files[i].path);
    }
    free(s->files);
    free(s->entries);
    free(s);
}

size_t safetensors_count(const struct safetensors *s)
{
    return s->n_entries;
}

const char *safetensors_name(const struct safetensors *s, size_t i)
{
    return s->entries[i].name;
}

const char *safetensors_file(const struct safetensors *s)
{
    return s->n_files ? s->files[0].path : "no file";
}

enum status_code safetensors_check_unchanged(const struct safetensors *s, struct status *st)
{
    for (uint32_t i = 0; i < s->n_files; i++) {
        const struct file *f = &s->files[i];
        struct stat now;
        /* Another file of that name is fine: ours is still there, without a name. */
        if (!f->map || stat(f->path, &now) != 0 || now.st_ino != f->info.st_ino || now.st_dev != f->info.st_dev)
            continue;
        if (now.st_size != f->info.st_size || now.st_mtim.tv_sec != f->info.st_mtim.tv_sec ||
            now.st_mtim.tv_nsec != f->info.st_mtim.tv_nsec)
            return status_set(st, ST_DATA_LOSS, "%s: another program changed it while it was read", f->path);
    }
    return ST_OK;
}

static const struct entry *find(const struct safetensors *s, const char *name)
{
    struct entry key = {.name = name};
    return s->n_entries ? bsearch(&key, s->entries, s->n_entries, sizeof key, by_name) : NULL;
}

int safetensors_has(const struct safetensors *s, const char *name)
{
    return find(s, name) != NULL;
}

enum status_code safetensors_get(struct safetensor *out, const struct safetensors *s, const char *name,
                                 struct status *st)
{
    const struct entry *e = find(s, name);
    if (!e)
        return status_set(st, ST_DATA_LOSS, "%s%s: tensor %.100s is missing", safetensors_file(s),
                          s->n_files > 1 ? " and the other files" : "", name);
    const struct file *f = &s->files[e->file];
    struct safetensor t = {
        .name = e->name,
        .file = f->path,
        .dims = e->dims,
        .data = f->bytes + f->data_at + e->begin,
        .bytes = e->end - e->begin,
    };
    if (!dtype_usable(e->dtype, &t.dtype))
        return status_set(st, ST_UNIMPLEMENTED, "%s: tensor %.100s: dtype %.20s is not supported, only F32, F16, BF16",
                          f->path, name, e->dtype);
    memcpy(t.shape, e->shape, sizeof t.shape);
    *out = t;
    return ST_OK;
}
