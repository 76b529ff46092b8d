/* The post-processor: special tokens put around the text when asked for. Only its "single" side counts here; what it
 * does to offsets (ByteLevel) does not show in ids. */
#include "coordinator/tokenizer_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One processor puts ids around the text; of several in a Sequence the library heeds only one. */
static enum status_code wrap(struct tokenizer *t, struct tok_ids side[2], const char *where, struct status *st)
{
    if (t->has_template)
        return status_set(st, ST_UNIMPLEMENTED, "%s: a second one that adds tokens is not supported", where);
    t->has_template = true;
    t->prefix = side[0];
    t->suffix = side[1];
    side[0] = side[1] = (struct tok_ids){0};
    return ST_OK;
}

static enum status_code add_id(struct tokenizer *t, struct tok_ids *side, const json_t *v, const char *where,
                               struct status *st)
{
    uint32_t id;
    enum status_code rc = tok_json_uint(v, where, "ids", TOK_MAX_VOCAB - 1, &id, st);
    if (rc != ST_OK)
        return rc;
    if (id >= t->vocab.size || !t->vocab.flags[id])
        return status_set(st, ST_DATA_LOSS, "%s: id %u is not in the vocabulary", where, id);
    return tok_ids_add(side, id) ? ST_OK : status_nomem(st, where, side->len);
}

static enum status_code add_special(struct tokenizer *t, struct tok_ids *side, const json_t *special, const char *name,
                                    const char *where, struct status *st)
{
    const json_t *token = json_object_get(special, name), *ids;
    char place[320], quoted[TOK_QUOTE_MAX];
    if (!json_is_object(token))
        return status_set(st, ST_DATA_LOSS, "%s.special_tokens: %s is used, but not there", where,
                          tok_quote(quoted, name, strlen(name)));
    snprintf(place, sizeof place, "%s.special_tokens[%s]", where, tok_quote(quoted, name, strlen(name)));
    enum status_code rc = tok_json_array(token, place, "ids", &ids, st);
    for (size_t i = 0; rc == ST_OK && i < json_array_size(ids); i++)
        rc = add_id(t, side, json_array_get(ids, i), place, st);
    return rc;
}

static enum status_code load_template(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    struct tok_ids side[2] = {{0}, {0}};
    const json_t *single;
    size_t n_text = 0;
    enum status_code rc = tok_json_array(obj, where, "single", &single, st);
    for (size_t i = 0; rc == ST_OK && i < json_array_size(single); i++) {
        const json_t *piece = json_array_get(single, i);
        const json_t *special = json_object_get(piece, "SpecialToken"), *text = json_object_get(piece, "Sequence");
        char place[320];
        const char *id;
        size_t n;
        snprintf(place, sizeof place, "%s.single[%zu]", where, i);
        if (json_is_object(special)) {
            rc = tok_json_string(special, place, "id", &id, &n, st);
            if (rc == ST_OK)
                rc = add_special(t, &side[n_text > 0], json_object_get(obj, "special_tokens"), id, where, st);
        } else if (json_is_object(text)) {
            rc = tok_json_string(text, place, "id", &id, &n, st);
            if (rc == ST_OK && strcmp(id, "A") != 0)
                rc = status_set(st, ST_DATA_LOSS, "%s.Sequence.id: '%s', expected 'A'", place, id);
            n_text++;
        } else {
            rc = status_set(st, ST_DATA_LOSS, "%s: expected {\"SpecialToken\": ...} or {\"Sequence\": ...}", place);
        }
    }
    if (rc == ST_OK && n_text != 1)
        rc = status_set(st, ST_UNIMPLEMENTED, "%s.single: the text %zu times, only once is supported", where, n_text);
    if (rc == ST_OK)
        rc = wrap(t, side, where, st);
    free(side[0].data);
    free(side[1].data);
    return rc;
}

/* BertProcessing, RobertaProcessing: cls and sep are ["<s>", 0]. */
static enum status_code load_pair(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    static const char *const keys[] = {"cls", "sep"};
    struct tok_ids side[2] = {{0}, {0}};
    enum status_code rc = ST_OK;
    for (size_t i = 0; rc == ST_OK && i < 2; i++) {
        const json_t *pair;
        char place[320];
        snprintf(place, sizeof place, "%s.%s", where, keys[i]);
        rc = tok_json_array(obj, where, keys[i], &pair, st);
        if (rc == ST_OK)
            rc = add_id(t, &side[i], json_array_get(pair, 1), place, st);
    }
    if (rc == ST_OK)
        rc = wrap(t, side, where, st);
    free(side[0].data);
    free(side[1].data);
    return rc;
}

static enum status_code load_one(void *arg, const json_t *obj, const char *type, const char *where, struct status *st)
{
    struct tokenizer *t = arg;
    if (strcmp(type, "ByteLevel") == 0)
        return ST_OK;
    if (strcmp(type, "TemplateProcessing") == 0)
        return load_template(t, obj, where, st);
    if (strcmp(type, "RobertaProcessing") == 0 || strcmp(type, "BertProcessing") == 0)
        return load_pair(t, obj, where, st);
    return status_set(st, ST_UNIMPLEMENTED, "%s.type: '%s' is not supported", where, type);
}

enum status_code tok_post_load(struct tokenizer *t, const json_t *obj, struct status *st)
{
    if (!obj || json_is_null(obj))
        return ST_OK;
    return tok_json_flatten(obj, "post_processor", "processors", load_one, t, st);
}
