#include "worker/model_source.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

struct model_source {
    struct safetensors *files; /* or */
    struct gguf *gguf;
    uint32_t paired_rows; /* of q and k there */
    void *map;
    struct stat info;
};

static enum status_code map_file(struct model_source *s, struct status *st)
{
    const char *path = gguf_path(s->gguf);
    if (fstat(gguf_fd(s->gguf), &s->info) != 0)
        return status_errno(st, ST_INVALID_ARGUMENT, errno, "%s", path);
    if (s->info.st_size == 0)
        return status_set(st, ST_DATA_LOSS, "%s: another program cut it while it was read", path);
    void *map = mmap(NULL, (size_t)s->info.st_size, PROT_READ, MAP_PRIVATE, gguf_fd(s->gguf), 0);
    if (map == MAP_FAILED)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "%s: mmap of %lld bytes", path,
                            (long long)s->info.st_size);
    s->map = map;
    return ST_OK;
}

enum status_code model_source_open(struct model_source **out, const char *path, const struct model_config *m,
                                   struct status *st)
{
    struct model_source *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "model files", sizeof *s);
    enum status_code rc;
    if (gguf_is_file(path)) {
        struct gguf_string architecture = {"", 0};
        if ((rc = gguf_open(&s->gguf, path, st)) != ST_OK ||
            (rc = gguf_read_string(s->gguf, "general.architecture", &architecture, st)) != ST_OK ||
            (rc = map_file(s, st)) != ST_OK)
            goto fail;
        if (gguf_string_is(architecture, "llama"))
            s->paired_rows = m->head_dim;
    } else if ((rc = safetensors_open(&s->files, path, st)) != ST_OK) {
        goto fail;
    }
    *out = s;
    return ST_OK;
fail:
    model_source_close(s);
    return rc;
}

void model_source_close(struct model_source *s)
{
    if (!s)
        return;
    if (s->map)
        munmap(s->map, (size_t)s->info.st_size);
    gguf_close(s->gguf);
    safetensors_close(s->files);
    free(s);
}

void model_source_gguf_name(char *out, size_t room, const char *name)
{
    static const char *const whole[][2] = {
        {"model.embed_tokens.weight", "token_embd.weight"},
        {"model.norm.weight", "output_norm.weight"},
        {"lm_head.weight", "output.weight"},
    };
    static const char *const of_layer[][2] = {
        {"input_layernorm", "attn_norm"},    {"self_attn.q_proj", "attn_q"},
        {"self_attn.k_proj", "attn_k"},      {"self_attn.v_proj", "attn_v"},
        {"self_attn.o_proj", "attn_output"}, {"self_attn.q_norm", "attn_q_norm"},
        {"self_attn.k_norm", "attn_k_norm"}, {"post_attention_layernorm", "ffn_norm"},
        {"mlp.gate_proj", "ffn_gate"},       {"mlp.up_proj", "ffn_up"},
        {"mlp.down_proj", "ffn_down"},
    };
    unsigned layer;
    int at = 0;
    snprintf(out, room, "%s", name);
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++)
        if (strcmp(name, whole[i][0]) == 0)
            snprintf(out, room, "%s", whole[i][1]);
    if (sscanf(name, "model.layers.%u.%n", &layer, &at) != 1 || at == 0)
        return;
    for (size_t i = 0; i < sizeof of_layer / sizeof *of_layer; i++) {
        size_t n = strlen(of_layer[i][0]);
        if (strncmp(name + at, of_layer[i][0], n) == 0 && name[(size_t)at + n] == '.')
            snprintf(out, room, "blk.%u.%s%s", layer, of_layer[i][1], name + at + n);
    }
}

static enum status_code get_gguf(struct model_tensor *out, const struct model_source *s, const char *name,
                                 struct status *st)
{
    char own[GGUF_MAX_NAME_BYTES + 1], room[32];
    const char *path = gguf_path(s->gguf);
    model_source_gguf_name(own, sizeof own, name);
    const struct gguf_tensor *t = gguf_tensor_find(s->gguf, own);
    if (!t)
        return status_set(st, ST_DATA_LOSS, "%s: tensor %s is missing", path, own);
    struct model_tensor found = {.name = t->name, .file = path, .dims = t->dims, .quant = quant_find(t->type)};
    switch (t->type) {
    case GGUF_F16:
        found.dtype = MAT_F16;
        break;
    case GGUF_BF16:
        found.dtype = MAT_BF16;
        break;
    default:
        found.dtype = MAT_F32;
        if (t->type != GGUF_F32 && !found.quant)
            return status_set(st, ST_UNIMPLEMENTED,
                              "%s: tensor %s: %s is not supported, only F32, F16, BF16, Q4_0 to Q8_0 and Q2_K to Q6_K",
                              path, own, gguf_type_name(t->type, room));
    }
    if (t->offset + t->bytes > (uint64_t)s->info.st_size)
        return status_set(st, ST_DATA_LOSS, "%s: another program cut it while it was read", path);
    for (uint32_t i = 0; i < t->dims; i++)
        found.shape[i] = t->shape[t->dims - 1 - i];
    if (strstr(name, ".q_proj.") || strstr(name, ".k_proj."))
        found.paired_rows = s->paired_rows;
    found.data = (const uint8_t *)s->map + t->offset;
    *out = found;
    return ST_OK;
}

enum status_code model_source_get(struct model_tensor *out, const struct model_source *s, const char *name,
                                  struct status *st)
{
    if (s->gguf)
        return get_gguf(out, s, name, st);
    struct safetensor t;
    enum status_code rc = safetensors_get(&t, s->files, name, st);
    if (rc != ST_OK)
        return rc;
    struct model_tensor found = {.name = t.name, .file = t.file, .dtype = t.dtype, .dims = t.dims, .data = t.data};
    memcpy(found.shape, t.shape, sizeof found.shape);
    *out = found;
    return ST_OK;
}

enum status_code model_source_check_unchanged(const struct model_source *s, struct status *st)
{
    if (!s->gguf)
        return safetensors_check_unchanged(s->files, st);
    struct stat now;
    if (fstat(gguf_fd(s->gguf), &now) == 0 && now.st_size == s->info.st_size &&
        now.st_mtim.tv_sec == s->info.st_mtim.tv_sec && now.st_mtim.tv_nsec == s->info.st_mtim.tv_nsec)
        return ST_OK;
    return status_set(st, ST_DATA_LOSS, "%s: another program changed it while it was read", gguf_path(s->gguf));
}
