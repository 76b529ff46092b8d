/* tok_load: tokenizer.json, checked part by part, and what tokenizer_config.json says of the same tokens. */
#include "coordinator/tokenizer_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/gguf.h"

static enum status_code load_parts(struct tokenizer *t, const json_t *root, struct status *st)
{
    static const char *const refused[] = {"truncation", "padding"};
    const json_t *version = json_object_get(root, "version");
    if (version && !(json_is_string(version) && strcmp(json_string_value(version), "1.0") == 0))
        return status_set(st, ST_UNIMPLEMENTED, "version: expected \"1.0\"");
    for (size_t i = 0; i < 2; i++) {
        const json_t *v = json_object_get(root, refused[i]);
        if (v && !json_is_null(v))
            return status_set(st, ST_UNIMPLEMENTED, "%s: not supported, expected null", refused[i]);
    }
    enum status_code rc = tok_bpe_load(&t->bpe, &t->vocab, json_object_get(root, "model"), st);
    if (rc == ST_OK)
        rc = tok_norm_load(t, json_object_get(root, "normalizer"), st);
    if (rc == ST_OK)
        rc = tok_pre_load(t, json_object_get(root, "pre_tokenizer"), st);
    if (rc == ST_OK)
        rc = tok_bpe_finish(&t->bpe, &t->vocab, t->byte_level, st);
    if (rc == ST_OK)
        rc = tok_added_load(t, json_object_get(root, "added_tokens"), st);
    if (rc == ST_OK)
        rc = tok_post_load(t, json_object_get(root, "post_processor"), st);
    if (rc == ST_OK)
        rc = tok_decoder_load(t, json_object_get(root, "decoder"), st);
    if (rc == ST_OK)
        rc = tok_decoder_finish(t, st);
    if (rc == ST_OK)
        t->max_token_bytes = tok_bound(t);
    return rc;
}

enum status_code tok_check_config(const struct tokenizer *t, json_t *root, struct status *st)
{
    json_t *map = json_object_get(root, "added_tokens_decoder");
    if (!map || json_is_null(map))
        return ST_OK;
    if (!json_is_object(map))
        return status_set(st, ST_DATA_LOSS, "added_tokens_decoder: expected an object, got %s", tok_json_kind(map));
    for (void *it = json_object_iter(map); it; it = json_object_iter_next(map, it)) {
        const char *key = json_object_iter_key(it), *s;
        char where[96], quoted[TOK_QUOTE_MAX], *end;
        size_t n;
        snprintf(where, sizeof where, "added_tokens_decoder[%s]", tok_quote(quoted, key, strlen(key)));
        enum status_code rc = tok_json_string(json_object_iter_value(it), where, "content", &s, &n, st);
        if (rc != ST_OK)
            return rc;
        unsigned long id = strtoul(key, &end, 10);
        uint32_t known = tok_vocab_find(&t->vocab, s, n);
        if (key[0] < '0' || key[0] > '9' || *end || id >= TOK_MAX_VOCAB)
            return status_set(st, ST_DATA_LOSS, "%s: expected an id below %u as key", where, TOK_MAX_VOCAB);
        if (known == TOK_NONE)
            return status_set(st, ST_DATA_LOSS, "%s: %s is not in tokenizer.json", where, tok_quote(quoted, s, n));
        if (known != id)
            return status_set(st, ST_DATA_LOSS, "%s: %s has id %u in tokenizer.json", where, tok_quote(quoted, s, n),
                              known);
    }
    return ST_OK;
}

enum status_code tok_create(struct tokenizer **out, const json_t *root, struct status *st)
{
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t)
        return status_nomem(st, "tokenizer", sizeof *t);
    enum status_code rc = tok_pool_create(&t->pool, st);
    if (rc == ST_OK)
        rc = load_parts(t, root, st);
    if (rc == ST_OK)
        *out = t;
    else
        tok_free(t);
    return rc;
}

enum status_code tok_create_none(struct tokenizer **out, struct status *st)
{
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t)
        return status_nomem(st, "tokenizer", sizeof *t);
    t->none = true;
    *out = t;
    return ST_OK;
}

bool tok_has_text(const struct tokenizer *t)
{
    return !t->none;
}

static enum status_code join_path(char **out, const char *dir, const char *name, struct status *st)
{
    if (asprintf(out, "%s/%s", dir, name) < 0) {
        *out = NULL;
        return status_nomem(st, "path", strlen(dir));
    }
    return ST_OK;
}

enum status_code tok_load(struct tokenizer **out, const char *dir, struct status *st)
{
    char *path = NULL, *config_path = NULL;
    json_t *root = NULL, *config = NULL;
    struct tokenizer *t = NULL;
    struct status local = STATUS_INIT;
    if (gguf_is_file(dir))
        return tok_gguf_load(out, dir, st);
    enum status_code rc = join_path(&path, dir, "tokenizer.json", st);
    if (rc == ST_OK)
        rc = join_path(&config_path, dir, "tokenizer_config.json", st);
    if (rc == ST_OK)
        rc = tok_json_read(&root, path, 0, st);
    if (rc != ST_OK)
        goto done;
    rc = tok_create(&t, root, st);
    if (rc != ST_OK) {
        status_prefix(st, "%s", path);
        goto done;
    }
    /* Many have "model_max_length": 1000000000000000019884624838656, which no 64-bit integer holds. */
    rc = tok_json_read(&config, config_path, JSON_DECODE_INT_AS_REAL, &local);
    if (rc == ST_NOT_FOUND) {
        rc = ST_OK; /* optional */
    } else if (rc != ST_OK) {
        status_set(st, rc, "%s", local.message);
    } else {
        rc = tok_check_config(t, config, st);
        if (rc != ST_OK)
            status_prefix(st, "%s", config_path);
    }
done:
    json_decref(root);
    json_decref(config);
    free(path);
    free(config_path);
    if (rc == ST_OK)
        *out = t;
    else
        tok_free(t);
    return rc;
}

void tok_free(struct tokenizer *t)
{
    if (!t)
        return;
    tok_pool_free(t->pool);
    tok_decoder_free(&t->dec);
    tok_regex_free(t->word_char);
    free(t->added_raw.v);
    free(t->added_normalized.v);
    tok_buf_free(&t->added_text);
    free(t->prefix.data);
    free(t->suffix.data);
    for (size_t i = 0; i < t->n_pres; i++)
        tok_pre_free(&t->pres[i]);
    for (size_t i = 0; i < t->n_norms; i++)
        tok_norm_free(&t->norms[i]);
    tok_bpe_free(&t->bpe);
    tok_vocab_free(&t->vocab);
    free(t);
}

uint32_t tok_vocab_size(const struct tokenizer *t)
{
    return t->vocab.size;
}

size_t tok_max_token_bytes(const struct tokenizer *t)
{
    return t->max_token_bytes;
}

bool tok_is_special(const struct tokenizer *t, uint32_t id)
{
    return id < t->vocab.size && (t->vocab.flags[id] & TOK_ID_SPECIAL);
}

int64_t tok_find(const struct tokenizer *t, const char *content)
{
    uint32_t id = tok_vocab_find(&t->vocab, content, strlen(content));
    return id == TOK_NONE ? -1 : (int64_t)id;
}
