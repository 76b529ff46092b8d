/* rpc_reflection_index.c - which file of a FileDescriptorSet defines what.
 *
 * The messages of google/protobuf/descriptor.proto that are walked, with the fields that matter here:
 *
 *     FileDescriptorSet   1 file
 *     FileDescriptorProto 1 name, 2 package, 3 dependency, 4 message_type, 5 enum_type, 6 service, 7 extension
 *     DescriptorProto     1 name, 2 field, 3 nested_type, 4 enum_type, 6 extension, 8 oneof_decl
 *     EnumDescriptorProto 1 name, 2 value (1 name)        ServiceDescriptorProto 1 name, 2 method (1 name)
 *     FieldDescriptorProto 1 name, 2 extendee, 3 number   OneofDescriptorProto   1 name
 *
 * A walk has two passes over a message where its own name must be known before what is inside it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/rpc_reflection.h"

#define MAX_DEPTH 32
#define MAX_NAME  512

struct walk {
    struct refl_index *x;
    uint32_t file;
    bool nomem;
};

/* ---- the wire ---- */

static bool get_varint(struct refl_bytes *b, uint64_t *value)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < 10 && b->p < b->end; i++) {
        uint8_t byte = *b->p++;
        v |= (uint64_t)(byte & 0x7F) << (7 * i);
        if (!(byte & 0x80)) {
            *value = v;
            return true;
        }
    }
    return false;
}

struct field {
    uint32_t number;
    uint64_t value;            /* of a varint */
    struct refl_bytes content; /* of what has a length; else p NULL */
};

/* 1: a field; 0: the end; -1: damaged. */
static int next_field(struct refl_bytes *b, struct field *f)
{
    uint64_t key, n;
    *f = (struct field){0};
    if (b->p == b->end)
        return 0;
    if (!get_varint(b, &key))
        return -1;
    f->number = (uint32_t)(key >> 3);
    switch (key & 7) {
    case 0:
        return get_varint(b, &f->value) ? 1 : -1;
    case 1:
        n = 8;
        break;
    case 5:
        n = 4;
        break;
    case 2:
        if (!get_varint(b, &n))
            return -1;
        break;
    default:
        return -1;
    }
    if ((uint64_t)(b->end - b->p) < n)
        return -1;
    if ((key & 7) == 2)
        f->content = (struct refl_bytes){b->p, b->p + n};
    b->p += n;
    return 1;
}

/* The content of a message's field `number`; empty without it. */
static struct refl_bytes text_field(struct refl_bytes message, uint32_t number)
{
    struct field f;
    while (next_field(&message, &f) > 0) {
        if (f.number == number && f.content.p)
            return f.content;
    }
    return (struct refl_bytes){NULL, NULL};
}

/* ---- what is found ---- */

static bool room(void **array, size_t n, size_t *cap, size_t each)
{
    if (n < *cap)
        return true;
    size_t more = *cap ? *cap * 2 : 256;
    void *grown = realloc(*array, more * each);
    if (!grown)
        return false;
    *array = grown;
    *cap = more;
    return true;
}

/* "scope.name"; false when it is longer than any name of ours. */
static bool join(char out[MAX_NAME], const char *scope, struct refl_bytes name)
{
    size_t k = strlen(scope), n = (size_t)(name.end - name.p), dot = k > 0;
    if (!name.p || k + dot + n >= MAX_NAME)
        return false;
    memmove(out, scope, k);
    out[k] = '.';
    memcpy(out + k + dot, name.p, n);
    out[k + dot + n] = '\0';
    return true;
}

static bool add_symbol(struct walk *w, const char *name, bool is_service, bool is_message)
{
    struct refl_index *x = w->x;
    if (!room((void **)&x->symbols, x->n_symbols, &x->cap_symbols, sizeof *x->symbols)) {
        w->nomem = true;
        return false;
    }
    struct refl_symbol *s = &x->symbols[x->n_symbols];
    *s = (struct refl_symbol){strdup(name), w->file, is_service, is_message};
    w->nomem = !s->name;
    x->n_symbols += s->name != NULL;
    return s->name != NULL;
}

/* A thing with a name and, where `inner` is not 0, named things in that field: their scope is `inner_scope`. */
static bool add_named(struct walk *w, const char *scope, struct refl_bytes m, uint32_t inner, bool scoped,
                      bool is_service)
{
    char name[MAX_NAME], below[MAX_NAME];
    struct field f;
    int more;
    if (!join(name, scope, text_field(m, 1)) || !add_symbol(w, name, is_service, false))
        return false;
    while (inner && (more = next_field(&m, &f)) != 0) {
        if (more < 0)
            return false;
        if (f.number == inner && f.content.p &&
            (!join(below, scoped ? name : scope, text_field(f.content, 1)) || !add_symbol(w, below, false, false)))
            return false;
    }
    return true;
}

static bool add_extension(struct walk *w, const char *scope, struct refl_bytes m)
{
    struct refl_index *x = w->x;
    char extendee[MAX_NAME];
    struct refl_bytes type = text_field(m, 2);
    uint64_t number = 0;
    struct field f;
    for (struct refl_bytes b = m; next_field(&b, &f) > 0;)
        number = f.number == 3 && !f.content.p ? f.value : number;
    if (type.p < type.end && *type.p == '.')
        type.p++;
    if (!join(extendee, "", type) || !add_named(w, scope, m, 0, false, false))
        return false;
    if (!room((void **)&x->extensions, x->n_extensions, &x->cap_extensions, sizeof *x->extensions)) {
        w->nomem = true;
        return false;
    }
    struct refl_extension *e = &x->extensions[x->n_extensions];
    *e = (struct refl_extension){strdup(extendee), (int32_t)number, w->file};
    w->nomem = !e->extendee;
    x->n_extensions += e->extendee != NULL;
    return e->extendee != NULL;
}

static bool add_message(struct walk *w, const char *scope, struct refl_bytes m, unsigned depth)
{
    char name[MAX_NAME];
    struct field f;
    int more;
    if (depth > MAX_DEPTH || !join(name, scope, text_field(m, 1)) || !add_symbol(w, name, false, true))
        return false;
    while ((more = next_field(&m, &f)) > 0) {
        bool ok = true;
        if (!f.content.p)
            continue;
        if (f.number == 2 || f.number == 8)
            ok = add_named(w, name, f.content, 0, false, false);
        else if (f.number == 3)
            ok = add_message(w, name, f.content, depth + 1);
        else if (f.number == 4)
            ok = add_named(w, name, f.content, 2, false, false); /* values are siblings of their enum */
        else if (f.number == 6)
            ok = add_extension(w, name, f.content);
        if (!ok)
            return false;
    }
    return more == 0;
}

static bool add_file(struct walk *w, struct refl_bytes m)
{
    char package[MAX_NAME] = "";
    struct refl_bytes name = text_field(m, 1), in = text_field(m, 2);
    struct refl_file *file = &w->x->files[w->file];
    struct field f;
    int more;
    if (!name.p || (in.p && !join(package, "", in)))
        return false;
    file->bytes = m;
    size_t n = (size_t)(name.end - name.p);
    file->name = malloc(n + 1);
    w->nomem = !file->name;
    if (file->name) {
        memcpy(file->name, name.p, n);
        file->name[n] = '\0';
    }
    while (file->name && (more = next_field(&m, &f)) != 0) {
        bool ok = more > 0;
        if (ok && f.content.p && f.number == 4)
            ok = add_message(w, package, f.content, 0);
        else if (ok && f.content.p && f.number == 5)
            ok = add_named(w, package, f.content, 2, false, false);
        else if (ok && f.content.p && f.number == 6)
            ok = add_named(w, package, f.content, 2, true, true);
        else if (ok && f.content.p && f.number == 7)
            ok = add_extension(w, package, f.content);
        if (!ok)
            return false;
    }
    return file->name != NULL;
}

/* ---- imports ---- */

/* Bits of the files that a file names; 0 in *ok when one is not there. */
static uint64_t direct_imports(const struct refl_index *x, const struct refl_file *file, bool *ok)
{
    uint64_t bits = 0;
    struct field f;
    for (struct refl_bytes b = file->bytes; next_field(&b, &f) > 0;) {
        if (f.number != 3 || !f.content.p)
            continue;
        size_t n = (size_t)(f.content.end - f.content.p), i = 0;
        while (i < x->n_files && (strlen(x->files[i].name) != n || memcmp(x->files[i].name, f.content.p, n) != 0))
            i++;
        *ok = *ok && i < x->n_files;
        bits |= i < x->n_files ? UINT64_C(1) << i : 0;
    }
    return bits;
}

static bool close_imports(struct refl_index *x)
{
    bool ok = true;
    for (size_t i = 0; i < x->n_files; i++)
        x->files[i].with_imports = UINT64_C(1) << i | direct_imports(x, &x->files[i], &ok);
    for (bool grew = true; grew;) {
        grew = false;
        for (size_t i = 0; i < x->n_files; i++) {
            uint64_t before = x->files[i].with_imports, all = before;
            for (size_t k = 0; k < x->n_files; k++)
                all |= before >> k & 1 ? x->files[k].with_imports : 0;
            x->files[i].with_imports = all;
            grew = grew || all != before;
        }
    }
    return ok;
}

/* ---- the whole ---- */

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct refl_symbol *)a)->name, ((const struct refl_symbol *)b)->name);
}

static int by_extendee(const void *a, const void *b)
{
    const struct refl_extension *x = a, *y = b;
    int order = strcmp(x->extendee, y->extendee);
    return order ? order : (x->number > y->number) - (x->number < y->number);
}

static enum status_code build(struct refl_index *x, struct refl_bytes set, struct status *st)
{
    struct walk w = {.x = x};
    struct field f;
    int more;
    while ((more = next_field(&set, &f)) > 0) {
        if (f.number != 1 || !f.content.p)
            continue;
        if (x->n_files == REFL_MAX_FILES)
            return status_set(st, ST_INVALID_ARGUMENT, "descriptor set: more than %d files", REFL_MAX_FILES);
        w.file = (uint32_t)x->n_files++;
        if (!add_file(&w, f.content))
            return w.nomem ? status_nomem(st, "descriptor index", 0)
                           : status_set(st, ST_INVALID_ARGUMENT, "descriptor set: file %u is damaged", w.file);
    }
    if (more < 0)
        return status_set(st, ST_INVALID_ARGUMENT, "descriptor set: damaged behind file %zu", x->n_files);
    if (!close_imports(x))
        return status_set(st, ST_INVALID_ARGUMENT, "descriptor set: a file imports one that is not in it");
    if (x->n_symbols)
        qsort(x->symbols, x->n_symbols, sizeof *x->symbols, by_name);
    if (x->n_extensions)
        qsort(x->extensions, x->n_extensions, sizeof *x->extensions, by_extendee);
    return ST_OK;
}

enum status_code refl_index_create(struct refl_index **out, const void *set, size_t len, struct status *st)
{
    struct refl_index *x = calloc(1, sizeof *x);
    if (!x)
        return status_nomem(st, "descriptor index", sizeof *x);
    const uint8_t *p = set;
    enum status_code rc = build(x, (struct refl_bytes){p, p + len}, st);
    if (rc != ST_OK) {
        refl_index_destroy(x);
        return rc;
    }
    *out = x;
    return ST_OK;
}

void refl_index_destroy(struct refl_index *x)
{
    if (!x)
        return;
    for (size_t i = 0; i < x->n_files; i++)
        free(x->files[i].name);
    for (size_t i = 0; i < x->n_symbols; i++)
        free(x->symbols[i].name);
    for (size_t i = 0; i < x->n_extensions; i++)
        free(x->extensions[i].extendee);
    free(x->symbols);
    free(x->extensions);
    free(x);
}

const struct refl_file *refl_file_named(const struct refl_index *x, const char *name)
{
    for (size_t i = 0; i < x->n_files; i++) {
        if (strcmp(x->files[i].name, name) == 0)
            return &x->files[i];
    }
    return NULL;
}

const struct refl_symbol *refl_symbol_named(const struct refl_index *x, const char *name)
{
    struct refl_symbol key = {.name = (char *)name};
    return x->n_symbols ? bsearch(&key, x->symbols, x->n_symbols, sizeof key, by_name) : NULL;
}

const struct refl_extension *refl_extension_of(const struct refl_index *x, const char *type, int32_t number)
{
    struct refl_extension key = {.extendee = (char *)type, .number = number};
    return x->n_extensions ? bsearch(&key, x->extensions, x->n_extensions, sizeof key, by_extendee) : NULL;
}

const struct refl_extension *refl_extensions_of(const struct refl_index *x, const char *type, size_t *n)
{
    size_t i = 0;
    *n = 0;
    while (i < x->n_extensions && strcmp(x->extensions[i].extendee, type) != 0)
        i++;
    while (i + *n < x->n_extensions && strcmp(x->extensions[i + *n].extendee, type) == 0)
        ++*n;
    return *n ? &x->extensions[i] : NULL;
}
