#include "worker/model_config.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "worker/model_config_internal.h"

#define MAX_JSON_BYTES (1u << 20)

#define MAX_KV_BYTES  ((1ull << 31) - 1) /* of one token: kv_account.h */
#define KV_ELEM_BYTES 4

enum status_code model_check_heads(const char *file, const struct model_config *m, struct status *st)
{
    if (m->heads % m->kv_heads)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "%s: num_key_value_heads: %u, expected a divisor of num_attention_heads, %u", file,
                          m->kv_heads, m->heads);
    if (m->head_dim % 8 || m->head_dim > MODEL_MAX_HEAD_DIM)
        return status_set(st, ST_UNIMPLEMENTED, "%s: head_dim: %u is not supported, only multiples of 8 up to %u", file,
                          m->head_dim, MODEL_MAX_HEAD_DIM);
    uint64_t kv_bytes = (uint64_t)m->layers * 2 * m->kv_heads * m->head_dim * KV_ELEM_BYTES;
    if (kv_bytes > MAX_KV_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "%s: num_hidden_layers %u, num_key_value_heads %u, head_dim %u: %llu KV bytes a token, "
                          "expected at most %llu",
                          file, m->layers, m->kv_heads, m->head_dim, (unsigned long long)kv_bytes, MAX_KV_BYTES);
    return ST_OK;
}

/* What is not there has the default of the class; null stands for what the heads and the width say. */
static enum status_code read_heads(struct json_source src, const struct model_family *family, struct model_config *m,
                                   struct status *st)
{
    enum status_code rc;
    m->kv_heads = family->kv_heads && !json_object_get(src.obj, "num_key_value_heads") ? family->kv_heads : m->heads;
    m->head_dim = json_object_get(src.obj, "head_dim") ? 0 : family->head_dim;
    if ((rc = json_read_uint(src, "num_key_value_heads", 1, MODEL_MAX_HEADS, &m->kv_heads, st)) != ST_OK ||
        (rc = json_read_uint(src, "head_dim", 1, MODEL_MAX_HEAD_DIM, &m->head_dim, st)) != ST_OK)
        return rc;
    if (!m->head_dim) {
        if (m->hidden % m->heads)
            return status_set(st, ST_INVALID_ARGUMENT,
                              "%s: head_dim is missing and num_attention_heads, %u, does not divide hidden_size, %u",
                              src.file, m->heads, m->hidden);
        m->head_dim = m->hidden / m->heads;
    }
    return model_check_heads(src.file, m, st);
}

static enum status_code read_shape(struct json_source src, const struct model_family *family, struct model_config *m,
                                   struct status *st)
{
    const struct {
        const char *field;
        uint32_t max;
        uint32_t *out;
    } needed[] = {
        {"vocab_size", MODEL_MAX_VOCAB, &m->vocab_size},     {"hidden_size", MODEL_MAX_HIDDEN, &m->hidden},
        {"intermediate_size", MODEL_MAX_INNER, &m->inner},   {"num_hidden_layers", MODEL_MAX_LAYERS, &m->layers},
        {"num_attention_heads", MODEL_MAX_HEADS, &m->heads},
    };
    enum status_code rc;
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if ((rc = json_read_need(src, needed[i].field, st)) != ST_OK ||
            (rc = json_read_uint(src, needed[i].field, 1, needed[i].max, needed[i].out, st)) != ST_OK)
            return rc;
    if ((rc = read_heads(src, family, m, st)) != ST_OK)
        return rc;
    m->max_context = family->context;
    if ((rc = json_read_uint(src, "max_position_embeddings", 1, MODEL_MAX_CONTEXT, &m->max_context, st)) != ST_OK)
        return rc;
    double eps = 1e-6;
    if ((rc = json_read_double(src, "rms_norm_eps", 1e-30, 1.0, &eps, st)) != ST_OK)
        return rc;
    m->norm_eps = (float)eps;
    return json_read_bool(src, "tie_word_embeddings", &m->tied, st);
}

static enum status_code check_id(struct json_source src, const char *field, const json_t *v,
                                 const struct model_config *m, struct status *st)
{
    if (!json_is_integer(v))
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %s: expected a token id or an array of them", src.file, field);
    json_int_t id = json_integer_value(v);
    if (id < 0 || id >= (json_int_t)m->vocab_size)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %s: %lld, expected 0 to %u (vocab_size - 1)", src.file, field,
                          (long long)id, m->vocab_size - 1);
    return ST_OK;
}

/* What a file says replaces what stood there; a file that is silent changes nothing. */
static enum status_code read_special_ids(struct json_source src, struct model_config *m, struct status *st)
{
    enum status_code rc;
    const json_t *bos = json_object_get(src.obj, "bos_token_id");
    if (bos && !json_is_null(bos)) {
        if ((rc = check_id(src, "bos_token_id", bos, m, st)) != ST_OK)
            return rc;
        m->bos_id = json_integer_value(bos);
    }
    const json_t *eos = json_object_get(src.obj, "eos_token_id");
    if (!eos || json_is_null(eos))
        return ST_OK;
    size_t n = json_is_array(eos) ? json_array_size(eos) : 1;
    if (n > MODEL_MAX_EOS)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: eos_token_id: %zu ids, expected at most %d", src.file, n,
                          MODEL_MAX_EOS);
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_is_array(eos) ? json_array_get(eos, i) : eos;
        if ((rc = check_id(src, "eos_token_id", v, m, st)) != ST_OK)
            return rc;
        m->eos_ids[i] = (uint32_t)json_integer_value(v);
    }
    m->n_eos = (uint32_t)n;
    return ST_OK;
}

static enum status_code read_generation(struct json_source src, struct model_config *m, struct status *st)
{
    enum status_code rc = read_special_ids(src, m, st);
    if (rc != ST_OK)
        return rc;
    double temperature = 1.0, top_p = 1.0, min_p = 0.0, typical_p = 1.0, repetition = 1.0;
    bool do_sample = true;
    if ((rc = json_read_double(src, "temperature", 0.0, 100.0, &temperature, st)) != ST_OK ||
        (rc = json_read_double(src, "top_p", 0.0, 1.0, &top_p, st)) != ST_OK ||
        (rc = json_read_uint(src, "top_k", 0, INT32_MAX, &m->top_k, st)) != ST_OK ||
        (rc = json_read_double(src, "min_p", 0.0, 1.0, &min_p, st)) != ST_OK ||
        (rc = json_read_double(src, "typical_p", 0.0, 1.0, &typical_p, st)) != ST_OK ||
        (rc = json_read_double(src, "repetition_penalty", 0.01, 100.0, &repetition, st)) != ST_OK ||
        (rc = json_read_bool(src, "do_sample", &do_sample, st)) != ST_OK)
        return rc;
    m->temperature = do_sample ? (float)temperature : 0.0f;
    m->top_p = top_p > 0.0 ? (float)top_p : 1.0f;
    m->min_p = (float)min_p;
    m->typical_p = typical_p > 0.0 ? (float)typical_p : 1.0f;
    m->repetition_penalty = (float)repetition;
    return ST_OK;
}

static enum status_code from_documents(struct model_config *out, struct json_source config,
                                       struct json_source generation, struct status *st)
{
    struct model_config m = {
        .bos_id = -1, .temperature = 1.0f, .top_p = 1.0f, .typical_p = 1.0f, .repetition_penalty = 1.0f};
    enum status_code rc;
    const struct model_family *family;
    if ((rc = model_find_family(&family, config, st)) != ST_OK)
        return rc;
    snprintf(m.architecture, sizeof m.architecture, "%s", family->name);
    if ((rc = read_shape(config, family, &m, st)) != ST_OK ||
        (rc = model_read_family(config, family, &m, st)) != ST_OK || (rc = model_read_rope(config, &m, st)) != ST_OK ||
        (rc = read_special_ids(config, &m, st)) != ST_OK)
        return rc;
    if (generation.obj && (rc = read_generation(generation, &m, st)) != ST_OK)
        return rc;
    *out = m;
    return ST_OK;
}

enum status_code model_config_parse(struct model_config *out, const char *config, size_t config_bytes,
                                    const char *generation, size_t generation_bytes, struct status *st)
{
    json_t *c = NULL, *g = NULL;
    enum status_code rc = json_read_text(&c, config, config_bytes, "config.json", st);
    if (rc == ST_OK && generation)
        rc = json_read_text(&g, generation, generation_bytes, "generation_config.json", st);
    if (rc == ST_OK)
        rc = from_documents(out, (struct json_source){"config.json", c},
                            (struct json_source){"generation_config.json", g}, st);
    json_decref(g);
    json_decref(c);
    return rc;
}

static enum status_code load_gguf(struct model_config *out, const char *path, struct status *st)
{
    struct gguf *g;
    enum status_code rc = gguf_open(&g, path, st);
    if (rc != ST_OK)
        return rc;
    rc = model_config_from_gguf(out, g, st);
    gguf_close(g);
    return rc;
}

enum status_code model_config_load(struct model_config *out, const char *path, struct status *st)
{
    struct stat info;
    if (gguf_is_file(path))
        return load_gguf(out, path, st);
    if (stat(path, &info) != 0 || !S_ISDIR(info.st_mode))
        return status_set(st, ST_NOT_FOUND, "model folder %s: no such folder", path);
    char config_path[4096], generation_path[4096];
    if (snprintf(config_path, sizeof config_path, "%s/config.json", path) >= (int)sizeof config_path ||
        snprintf(generation_path, sizeof generation_path, "%s/generation_config.json", path) >=
            (int)sizeof generation_path)
        return status_set(st, ST_INVALID_ARGUMENT, "model folder: its path has more than 4000 characters");

    json_t *c = NULL, *g = NULL;
    enum status_code rc = json_read_file(&c, config_path, MAX_JSON_BYTES, st);
    if (rc == ST_OK) {
        struct status absent = STATUS_INIT;
        rc = json_read_file(&g, generation_path, MAX_JSON_BYTES, &absent);
        if (rc == ST_NOT_FOUND)
            rc = ST_OK;
        else if (rc != ST_OK)
            status_set(st, rc, "%s", absent.message);
    }
    if (rc == ST_OK)
        rc = from_documents(out, (struct json_source){config_path, c}, (struct json_source){generation_path, g}, st);
    json_decref(g);
    json_decref(c);
    return rc;
}
