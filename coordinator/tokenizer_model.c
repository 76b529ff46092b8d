/* Loads "model": the BPE vocabulary and its merges. */
#include "coordinator/tokenizer_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t merge_slot(const struct tok_bpe *bpe, uint64_t pair)
{
    size_t mask = bpe->n_slots - 1;
    uint64_t h = pair * 0x9E3779B97F4A7C15u;
    size_t i = (size_t)(h ^ h >> 32) & mask;
    while (bpe->merges[i].pair != TOK_NO_PAIR && bpe->merges[i].pair != pair)
        i = (i + 1) & mask;
    return i;
}

uint64_t tok_bpe_goal(const struct tok_bpe *bpe, uint32_t left, uint32_t right)
{
    return bpe->merges[merge_slot(bpe, (uint64_t)left << 32 | right)].goal;
}

static enum status_code load_options(struct tok_bpe *bpe, const json_t *model, const char **unk, size_t *unk_len,
                                     struct status *st)
{
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    struct tok_buf *const affix[] = {&bpe->prefix, &bpe->suffix};
    const json_t *type = json_object_get(model, "type");
    if (!json_is_object(model))
        return status_set(st, ST_DATA_LOSS, "model: expected an object, got %s", tok_json_kind(model));
    /* Files of the first years have no type; vocab and merges make it BPE. */
    if (type && !json_is_string(type))
        return status_set(st, ST_DATA_LOSS, "model.type: expected a string, got %s", tok_json_kind(type));
    if (type ? strcmp(json_string_value(type), "BPE") != 0 : !json_object_get(model, "merges"))
        return status_set(st, ST_UNIMPLEMENTED, "model.type: '%s' is not supported, only 'BPE' is",
                          type ? json_string_value(type) : "(none)");
    const json_t *dropout = json_object_get(model, "dropout");
    if (dropout && !json_is_null(dropout) && !(json_is_number(dropout) && json_number_value(dropout) == 0.0))
        return status_set(st, ST_UNIMPLEMENTED, "model.dropout: not supported");
    for (size_t i = 0; i < 2; i++) {
        const json_t *v = json_object_get(model, affixes[i]);
        const char *s;
        size_t n;
        if (!v || json_is_null(v))
            continue;
        enum status_code rc = tok_json_string(model, "model", affixes[i], &s, &n, st);
        if (rc != ST_OK)
            return rc;
        if (n > TOK_MAX_AFFIX)
            return status_set(st, ST_UNIMPLEMENTED, "model.%s: %zu bytes, expected at most %d", affixes[i], n,
                              TOK_MAX_AFFIX);
        if (!tok_buf_add(affix[i], s, n))
            return status_nomem(st, "model", n);
        bpe->spelled = bpe->spelled || n > 0;
    }
    const json_t *u = json_object_get(model, "unk_token");
    if (u && !json_is_null(u)) {
        enum status_code rc = tok_json_string(model, "model", "unk_token", unk, unk_len, st);
        if (rc != ST_OK)
            return rc;
        bpe->has_unk = true;
    }
    enum status_code rc = tok_json_bool_opt(model, "model", "byte_fallback", &bpe->byte_fallback, st);
    if (rc == ST_OK)
        rc = tok_json_bool_opt(model, "model", "fuse_unk", &bpe->fuse_unk, st);
    if (rc == ST_OK)
        rc = tok_json_bool_opt(model, "model", "ignore_merges", &bpe->ignore_merges, st);
    return rc;
}

static enum status_code load_vocab(struct tok_vocab *vocab, json_t *map, struct status *st)
{
    if (!json_is_object(map))
        return status_set(st, ST_DATA_LOSS, "model.vocab: expected an object, got %s", tok_json_kind(map));
    for (void *it = json_object_iter(map); it; it = json_object_iter_next(map, it)) {
        const char *key = json_object_iter_key(it);
        const json_t *v = json_object_iter_value(it);
        char quoted[TOK_QUOTE_MAX];
        size_t n = strlen(key);
        if (!json_is_integer(v))
            return status_set(st, ST_DATA_LOSS, "model.vocab[%s]: expected an integer, got %s",
                              tok_quote(quoted, key, n), tok_json_kind(v));
        json_int_t id = json_integer_value(v);
        if (id < 0 || id >= TOK_MAX_VOCAB)
            return status_set(st, ST_DATA_LOSS, "model.vocab[%s]: id %lld, expected 0 to %u", tok_quote(quoted, key, n),
                              (long long)id, TOK_MAX_VOCAB - 1);
        enum status_code rc = tok_vocab_add(vocab, (uint32_t)id, key, n, TOK_ID_MODEL, "model.vocab", st);
        if (rc != ST_OK)
            return rc;
    }
    if (vocab->n_model == 0)
        return status_set(st, ST_DATA_LOSS, "model.vocab: is empty");
    return ST_OK;
}

/* One entry: ["a", "b"] or "a b". Parts point into the JSON value; *skip for a "#version" line. */
static enum status_code merge_parts(const json_t *v, size_t i, const char *s[2], size_t n[2], bool *skip,
                                    struct status *st)
{
    *skip = false;
    if (json_is_array(v) && json_array_size(v) == 2) {
        const json_t *a = json_array_get(v, 0), *b = json_array_get(v, 1);
        if (json_is_string(a) && json_is_string(b)) {
            s[0] = json_string_value(a);
            n[0] = json_string_length(a);
            s[1] = json_string_value(b);
            n[1] = json_string_length(b);
            return ST_OK;
        }
    } else if (json_is_string(v)) {
        const char *text = json_string_value(v);
        size_t len = json_string_length(v);
        if (len >= 8 && memcmp(text, "#version", 8) == 0) {
            *skip = true;
            return ST_OK;
        }
        const char *gap = memchr(text, ' ', len);
        if (gap && !memchr(gap + 1, ' ', len - (size_t)(gap + 1 - text))) {
            s[0] = text;
            n[0] = (size_t)(gap - text);
            s[1] = gap + 1;
            n[1] = len - n[0] - 1;
            return ST_OK;
        }
    }
    return status_set(st, ST_DATA_LOSS, "model.merges[%zu]: expected \"a b\" or [\"a\", \"b\"]", i);
}

static bool begins_with_mark(const char *s, size_t n)
{
    return n >= 3 && memcmp(s, "\xE2\x96\x81", 3) == 0;
}

static bool ends_with_mark(const char *s, size_t n)
{
    return n >= 3 && memcmp(s + n - 3, "\xE2\x96\x81", 3) == 0;
}

/* Of the right part of a merge the result lacks the prefix. The library takes its length in characters for bytes. */
static size_t prefix_cut(const struct tok_bpe *bpe)
{
    size_t chars = 0;
    for (size_t i = 0; i < bpe->prefix.len; i++)
        chars += ((unsigned char)bpe->prefix.data[i] & 0xC0) != 0x80;
    return chars;
}

static enum status_code load_merges(struct tok_bpe *bpe, const struct tok_vocab *vocab, const json_t *list,
                                    struct status *st)
{
    enum status_code rc = ST_OK;
    struct tok_buf joined = {0};
    char quoted[TOK_QUOTE_MAX];
    size_t rank = 0, cut = prefix_cut(bpe);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *s[2] = {NULL, NULL};
        size_t n[2] = {0, 0};
        bool skip;
        rc = merge_parts(json_array_get(list, i), i, s, n, &skip, st);
        if (rc != ST_OK)
            goto done;
        if (skip)
            continue;
        uint32_t id[3];
        for (int k = 0; k < 2; k++) {
            id[k] = tok_vocab_find_model(vocab, s[k], n[k]);
            if (id[k] == TOK_NONE) {
                rc = status_set(st, ST_DATA_LOSS, "model.merges[%zu]: %s is not in model.vocab", i,
                                tok_quote(quoted, s[k], n[k]));
                goto done;
            }
        }
        if (n[1] < cut) {
            rc = status_set(st, ST_DATA_LOSS, "model.merges[%zu]: %s lacks continuing_subword_prefix", i,
                            tok_quote(quoted, s[1], n[1]));
            goto done;
        }
        joined.len = 0;
        if (!tok_buf_add(&joined, s[0], n[0]) || !tok_buf_add(&joined, s[1] + cut, n[1] - cut)) {
            rc = status_nomem(st, "merge", n[0] + n[1]);
            goto done;
        }
        id[2] = tok_vocab_find_model(vocab, joined.data, joined.len);
        if (id[2] == TOK_NONE) {
            rc = status_set(st, ST_DATA_LOSS, "model.merges[%zu]: the result %s is not in model.vocab", i,
                            tok_quote(quoted, joined.data, joined.len));
            goto done;
        }
        if (begins_with_mark(s[1], n[1]) && !ends_with_mark(s[0], n[0]))
            bpe->cut_spaces = false;
        uint64_t pair = (uint64_t)id[0] << 32 | id[1];
        /* A pair given twice has the later rank, as in the library. */
        bpe->merges[merge_slot(bpe, pair)] = (struct tok_merge){pair, (uint64_t)rank++ << 32 | id[2]};
    }
done:
    tok_buf_free(&joined);
    return rc;
}

enum status_code tok_bpe_load(struct tok_bpe *bpe, struct tok_vocab *vocab, const json_t *model, struct status *st)
{
    const char *unk = NULL;
    size_t unk_len = 0;
    enum status_code rc = load_options(bpe, model, &unk, &unk_len, st);
    if (rc == ST_OK)
        rc = load_vocab(vocab, json_object_get(model, "vocab"), st);
    const json_t *list = NULL;
    if (rc == ST_OK)
        rc = tok_json_array(model, "model", "merges", &list, st);
    if (rc != ST_OK)
        return rc;
    /* A name that is not in the vocabulary is an error only when a text needs it (older GPT-2 files say ""). */
    bpe->unk_id = bpe->has_unk ? tok_vocab_find_model(vocab, unk, unk_len) : TOK_NONE;
    bpe->n_slots = 16;
    while (bpe->n_slots < json_array_size(list) * 2)
        bpe->n_slots *= 2;
    bpe->merges = malloc(bpe->n_slots * sizeof *bpe->merges);
    if (!bpe->merges)
        return status_nomem(st, "merges", bpe->n_slots * sizeof *bpe->merges);
    for (size_t i = 0; i < bpe->n_slots; i++)
        bpe->merges[i] = (struct tok_merge){TOK_NO_PAIR, TOK_NO_GOAL};
    bpe->cut_spaces = !bpe->ignore_merges && !bpe->spelled &&
                      tok_vocab_find_model(vocab, "\xE2\x96\x81", 3) != TOK_NONE &&
                      !(bpe->has_unk && ends_with_mark(unk, unk_len));
    return load_merges(bpe, vocab, list, st);
}

static uint32_t find_byte_token(const struct tok_vocab *vocab, unsigned byte)
{
    char s[8];
    int n = snprintf(s, sizeof s, "<0x%02X>", byte);
    return tok_vocab_find_model(vocab, s, (size_t)n);
}

/* Whether every byte has a token. */
static bool fill_byte_ids(struct tok_bpe *bpe, const struct tok_vocab *vocab)
{
    bool all = true;
    for (unsigned b = 0; b < 256; b++) {
        char s[4];
        unsigned n = tok_utf8_put(s, tok_char_of_byte((unsigned char)b));
        bpe->byte_id[b] = TOK_NONE;
        if (bpe->byte_level && !bpe->spelled)
            bpe->byte_id[b] = tok_vocab_find_model(vocab, s, n);
        else if (bpe->byte_fallback)
            bpe->byte_id[b] = find_byte_token(vocab, b);
        all = all && bpe->byte_id[b] != TOK_NONE;
    }
    for (unsigned c = 0; c < 128; c++) {
        char s = (char)c;
        bpe->ascii_id[c] = tok_vocab_find_model(vocab, &s, 1);
    }
    if (!bpe->byte_level || !bpe->byte_fallback || bpe->spelled || all)
        return all;
    /* A byte's character that has no token becomes the tokens of that character's bytes. */
    bpe->spelled = true;
    for (unsigned b = 0; b < 256; b++)
        bpe->byte_id[b] = find_byte_token(vocab, b);
    return false;
}

/* The bytes that ByteLevel's characters in s stand for; false when s has another character. */
static bool raw_bytes(struct tok_buf *out, const char *s, size_t n, bool *nomem)
{
    out->len = 0;
    for (size_t i = 0; i < n;) {
        unsigned len = tok_utf8_len((unsigned char)s[i]);
        int b = tok_byte_of_char(tok_utf8_get(s + i, len));
        if (b < 0)
            return false;
        char c = (char)b;
        if (!tok_buf_add(out, &c, 1)) {
            *nomem = true;
            return false;
        }
        i += len;
    }
    return n > 0;
}

/* Compares without a table of raw bytes: the content is read through the byte map. */
static bool raw_equal(const struct tok_vocab *vocab, uint32_t id, const char *s, size_t n)
{
    const char *content = tok_vocab_text(vocab, id);
    size_t len = vocab->len[id], i = 0, k = 0;
    while (i < len && k < n) {
        unsigned c_len = tok_utf8_len((unsigned char)content[i]);
        if (tok_byte_of_char(tok_utf8_get(content + i, c_len)) != (unsigned char)s[k++])
            return false;
        i += c_len;
    }
    return i == len && k == n;
}

uint32_t tok_bpe_find_raw(const struct tokenizer *t, const char *s, size_t n)
{
    const struct tok_bpe *bpe = &t->bpe;
    if (!bpe->byte_level)
        return tok_vocab_find_model(&t->vocab, s, n);
    size_t mask = bpe->n_raw_slots - 1;
    for (size_t i = (size_t)tok_hash(s, n) & mask; bpe->raw_slots[i]; i = (i + 1) & mask)
        if (raw_equal(&t->vocab, bpe->raw_slots[i] - 1, s, n))
            return bpe->raw_slots[i] - 1;
    return TOK_NONE;
}

enum status_code tok_bpe_finish(struct tok_bpe *bpe, const struct tok_vocab *vocab, bool byte_level, struct status *st)
{
    bpe->byte_level = byte_level;
    bool no_gap = fill_byte_ids(bpe, vocab) || bpe->has_unk;
    if (byte_level || !no_gap) /* characters without a token vanish, and what stood around them may merge */
        bpe->cut_spaces = false;
    if (!byte_level || !bpe->ignore_merges)
        return ST_OK;
    bpe->n_raw_slots = 16;
    while (bpe->n_raw_slots < (size_t)vocab->n_model * 2)
        bpe->n_raw_slots *= 2;
    bpe->raw_slots = calloc(bpe->n_raw_slots, sizeof *bpe->raw_slots);
    if (!bpe->raw_slots)
        return status_nomem(st, "vocabulary", bpe->n_raw_slots * sizeof *bpe->raw_slots);
    struct tok_buf raw = {0};
    bool nomem = false;
    size_t mask = bpe->n_raw_slots - 1;
    for (uint32_t id = 0; id < vocab->size && !nomem; id++) {
        if (!(vocab->flags[id] & TOK_ID_MODEL) || !raw_bytes(&raw, tok_vocab_text(vocab, id), vocab->len[id], &nomem))
            continue;
        size_t i = (size_t)tok_hash(raw.data, raw.len) & mask;
        while (bpe->raw_slots[i])
            i = (i + 1) & mask;
        bpe->raw_slots[i] = id + 1;
    }
    tok_buf_free(&raw);
    return nomem ? status_nomem(st, "vocabulary", vocab->text.len) : ST_OK;
}

void tok_bpe_free(struct tok_bpe *bpe)
{
    tok_buf_free(&bpe->prefix);
    tok_buf_free(&bpe->suffix);
    free(bpe->merges);
    free(bpe->raw_slots);
    *bpe = (struct tok_bpe){0};
}

/* GPT-2's map: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards. */
static bool stands_for_itself(uint32_t b)
{
    return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
}

uint32_t tok_char_of_byte(unsigned char byte)
{
    if (stands_for_itself(byte))
        return byte;
    if (byte <= 0x20)
        return 0x100u + byte;
    return byte == 0xAD ? 0x143u : 0x121u + (byte - 0x7Fu); /* 7F..A0 follow 00..20 */
}

int tok_byte_of_char(uint32_t c)
{
    if (c < 0x100)
        return stands_for_itself(c) ? (int)c : -1;
    if (c <= 0x120)
        return (int)(c - 0x100);
    if (c <= 0x142)
        return (int)(c - 0x121 + 0x7F);
    return c == 0x143 ? 0xAD : -1;
}
