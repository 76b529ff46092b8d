/* tokenizer_gguf.c - the tokenizer of a GGUF file: its metadata, put into the form of a tokenizer.json, which the other
 * files load.
 *
 *   tokenizer.ggml.model "gpt2"    byte-level BPE: tokens and merges as they are; tokenizer.ggml.pre names the normalizer
 *                                  and pre-tokenizer, which stand here as the published tokenizer.json has them
 *   tokenizer.ggml.model "llama"   SentencePiece BPE: a score for each token instead of merges. Each way to put a token
 *                                  together from two others is a merge; those of tokens with the higher score come first,
 *                                  of one token those whose parts have the lower ids
 *   tokenizer.huggingface.json     a tokenizer.json as text, which is taken instead of all that
 *
 * Unused tokens, with which files fill up the vocabulary, are left out: nothing encodes to them.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/tokenizer_internal.h"
#include "proto/gguf.h"

#define KEY(name) "tokenizer.ggml." name
#define MARK      "\xE2\x96\x81" /* U+2581 stands for a space */

/* Of tokenizer.ggml.token_type. */
enum { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };

struct source {
    const struct gguf *g;
    struct gguf_string *token; /* [n] */
    uint8_t *type;             /* [n] */
    uint32_t n;
};

static const char llama3_split[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char qwen2_split[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

static const struct pre {
    const char *name;
    const char *split; /* NULL: GPT-2's own */
    bool digits;       /* one by one, before that */
    bool nfc, ignore_merges, add_bos;
} pres[] = {
    {"llama-bpe", llama3_split, false, false, true, true},
    {"llama3", llama3_split, false, false, true, true},
    {"llama-v3", llama3_split, false, false, true, true},
    {"qwen2", qwen2_split, false, true, false, false},
    {"deepseek-r1-qwen", qwen2_split, false, true, false, false},
    {"smollm", NULL, true, false, false, false},
    {"gpt-2", NULL, false, false, false, false},
};

/* Gives the last reference to v away; nothing fits in JSON but what jansson has no memory for. */
static enum status_code set(json_t *obj, const char *key, json_t *v, struct status *st)
{
    return json_object_set_new_nocheck(obj, key, v) == 0 ? ST_OK : status_nomem(st, "tokenizer", 0);
}

/* ---- tokens ---- */

static enum status_code read_tokens(struct source *s, struct status *st)
{
    struct gguf_array tokens = {0}, types = {0};
    enum status_code rc;
    if ((rc = gguf_need(s->g, KEY("tokens"), st)) != ST_OK ||
        (rc = gguf_read_array(s->g, KEY("tokens"), GGUF_STRING, &tokens, st)) != ST_OK ||
        (rc = gguf_read_array(s->g, KEY("token_type"), GGUF_INT32, &types, st)) != ST_OK)
        return rc;
    if (tokens.count == 0 || tokens.count > TOK_MAX_VOCAB)
        return status_set(st, ST_DATA_LOSS, KEY("tokens: %llu, expected 1 to %u"), (unsigned long long)tokens.count,
                          TOK_MAX_VOCAB);
    if (types.at && types.count != tokens.count)
        return status_set(st, ST_DATA_LOSS, KEY("token_type: %llu, expected one for each of %llu tokens"),
                          (unsigned long long)types.count, (unsigned long long)tokens.count);
    uint32_t n = (uint32_t)tokens.count;
    s->token = calloc(n, sizeof *s->token);
    s->type = calloc(n, 1);
    if (!s->token || !s->type)
        return status_nomem(st, "tokens", n * sizeof *s->token);
    for (s->n = 0; s->n < n; s->n++) {
        struct gguf_string t = gguf_next_string(&tokens);
        int32_t type = types.at ? gguf_int32_at(&types, s->n) : NORMAL;
        if (type < NORMAL || type > BYTE)
            return status_set(st, ST_DATA_LOSS, KEY("token_type[%u]: %d, expected 1 to 6"), s->n, type);
        if (type != UNUSED && (tok_utf8_check(t.at, t.bytes) != t.bytes || memchr(t.at, 0, t.bytes)))
            return status_set(st, ST_DATA_LOSS, KEY("tokens[%u]: expected UTF-8 without NUL"), s->n);
        s->token[s->n] = t;
        s->type[s->n] = (uint8_t)type;
    }
    return ST_OK;
}

static enum status_code make_vocab(const struct source *s, json_t *model, struct status *st)
{
    char quoted[TOK_QUOTE_MAX];
    struct tok_buf key = {0};
    json_t *vocab = json_object();
    enum status_code rc = vocab ? ST_OK : status_nomem(st, "vocabulary", 0);
    for (uint32_t i = 0; rc == ST_OK && i < s->n; i++) {
        if (s->type[i] == UNUSED)
            continue;
        key.len = 0;
        if (!tok_buf_add(&key, s->token[i].at, s->token[i].bytes) || !tok_buf_add(&key, "", 1))
            rc = status_nomem(st, "token", s->token[i].bytes);
        else if (json_object_get(vocab, key.data))
            rc = status_set(st, ST_DATA_LOSS, KEY("tokens[%u]: %s is there twice"), i,
                            tok_quote(quoted, key.data, key.len - 1));
        else
            rc = set(vocab, key.data, json_integer(i), st);
    }
    tok_buf_free(&key);
    if (rc == ST_OK)
        return set(model, "vocab", vocab, st);
    json_decref(vocab);
    return rc;
}

/* Control tokens are special, tokens of users are matched in the text like them. */
static enum status_code make_added(const struct source *s, json_t *root, struct status *st)
{
    json_t *list = json_array();
    enum status_code rc = list ? ST_OK : status_nomem(st, "added tokens", 0);
    for (uint32_t i = 0; rc == ST_OK && i < s->n; i++) {
        bool special = s->type[i] == CONTROL || s->type[i] == UNKNOWN;
        if (!special && s->type[i] != USER_DEFINED)
            continue;
        json_t *t = json_pack("{s:I, s:s%, s:b, s:b, s:b, s:b, s:b}", "id", (json_int_t)i, "content", s->token[i].at,
                              s->token[i].bytes, "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special",
                              special);
        if (json_array_append_new(list, t) != 0)
            rc = status_nomem(st, "added tokens", s->n);
    }
    if (rc == ST_OK)
        return set(root, "added_tokens", list, st);
    json_decref(list);
    return rc;
}

/* The id of a special token of that name; TOK_NONE when there is none. */
static enum status_code special_id(const struct source *s, const char *key, uint32_t *id, struct status *st)
{
    *id = TOK_NONE;
    enum status_code rc = gguf_read_uint(s->g, key, 0, s->n - 1, id, st);
    if (rc == ST_OK && *id != TOK_NONE && s->type[*id] == UNUSED)
        rc = status_set(st, ST_DATA_LOSS, "%s: %u is an unused token", key, *id);
    return rc;
}

/* ---- what goes around a text ---- */

static json_t *special_piece(const struct source *s, uint32_t id)
{
    return json_pack("{s:{s:s%, s:i}}", "SpecialToken", "id", s->token[id].at, s->token[id].bytes, "type_id", 0);
}

/* NULL: out of memory. */
static json_t *template(const struct source *s, uint32_t bos, uint32_t eos, bool pair)
{
    json_t *list = json_array();
    int bad = 0;
    for (int i = 0; i <= pair; i++) {
        if (bos != TOK_NONE)
            bad |= json_array_append_new(list, special_piece(s, bos));
        bad |= json_array_append_new(list, json_pack("{s:{s:s, s:i}}", "Sequence", "id", i ? "B" : "A", "type_id", i));
        if (eos != TOK_NONE)
            bad |= json_array_append_new(list, special_piece(s, eos));
    }
    if (!bad)
        return list;
    json_decref(list);
    return NULL;
}

static enum status_code describe_special(const struct source *s, json_t *map, uint32_t id, struct status *st)
{
    if (id == TOK_NONE)
        return ST_OK;
    const struct gguf_string t = s->token[id];
    json_t *v = json_pack("{s:s%, s:[I], s:[s%]}", "id", t.at, t.bytes, "ids", (json_int_t)id, "tokens", t.at, t.bytes);
    char *name = calloc(1, t.bytes + 1);
    if (name)
        memcpy(name, t.at, t.bytes);
    enum status_code rc = v && name ? set(map, name, json_incref(v), st) : status_nomem(st, "special token", t.bytes);
    json_decref(v);
    free(name);
    return rc;
}

static enum status_code make_template(const struct source *s, json_t *root, bool add_bos, struct status *st)
{
    bool add_eos = false;
    uint32_t bos = TOK_NONE, eos = TOK_NONE;
    enum status_code rc;
    if ((rc = gguf_read_bool(s->g, KEY("add_bos_token"), &add_bos, st)) != ST_OK ||
        (rc = gguf_read_bool(s->g, KEY("add_eos_token"), &add_eos, st)) != ST_OK ||
        (rc = special_id(s, KEY("bos_token_id"), &bos, st)) != ST_OK ||
        (rc = special_id(s, KEY("eos_token_id"), &eos, st)) != ST_OK)
        return rc;
    bos = add_bos ? bos : TOK_NONE;
    eos = add_eos ? eos : TOK_NONE;
    if (bos == TOK_NONE && eos == TOK_NONE)
        return ST_OK;
    json_t *map = json_object();
    if (!map)
        return status_nomem(st, "special tokens", 0);
    if ((rc = describe_special(s, map, bos, st)) != ST_OK || (rc = describe_special(s, map, eos, st)) != ST_OK) {
        json_decref(map);
        return rc;
    }
    json_t *post = json_pack("{s:s, s:o, s:o, s:o}", "type", "TemplateProcessing", "single",
                             template(s, bos, eos, false), "pair", template(s, bos, eos, true), "special_tokens", map);
    return set(root, "post_processor", post, st);
}

/* ---- byte-level BPE ---- */

static enum status_code find_pre(const struct pre **out, const struct gguf *g, struct status *st)
{
    struct gguf_string name = {"", 0};
    char quoted[TOK_QUOTE_MAX];
    enum status_code rc;
    if ((rc = gguf_need(g, KEY("pre"), st)) != ST_OK || (rc = gguf_read_string(g, KEY("pre"), &name, st)) != ST_OK)
        return rc;
    for (size_t i = 0; i < sizeof pres / sizeof *pres; i++) {
        if (gguf_string_is(name, pres[i].name)) {
            *out = &pres[i];
            return ST_OK;
        }
    }
    return status_set(st, ST_UNIMPLEMENTED,
                      KEY("pre: %s is not supported, only llama-bpe, qwen2, smollm, gpt-2 and other names of these"),
                      tok_quote(quoted, name.at, name.bytes));
}

static enum status_code make_merges(const struct gguf *g, json_t *model, struct status *st)
{
    struct gguf_array merges = {0};
    enum status_code rc;
    if ((rc = gguf_need(g, KEY("merges"), st)) != ST_OK ||
        (rc = gguf_read_array(g, KEY("merges"), GGUF_STRING, &merges, st)) != ST_OK)
        return rc;
    json_t *list = json_array();
    if (!list)
        return status_nomem(st, "merges", 0);
    for (uint64_t i = 0; merges.count; i++) {
        struct gguf_string m = gguf_next_string(&merges);
        bool text = tok_utf8_check(m.at, m.bytes) == m.bytes && !memchr(m.at, 0, m.bytes);
        if (text && json_array_append_new(list, json_stringn_nocheck(m.at, m.bytes)) == 0)
            continue;
        json_decref(list);
        return text ? status_nomem(st, "merges", m.bytes)
                    : status_set(st, ST_DATA_LOSS, KEY("merges[%llu]: expected UTF-8 without NUL"),
                                 (unsigned long long)i);
    }
    return set(model, "merges", list, st);
}

static json_t *byte_level(bool use_regex)
{
    return json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 0, "use_regex",
                     use_regex);
}

static enum status_code make_byte_level(const struct source *s, json_t *root, json_t *model, struct status *st)
{
    const struct pre *pre = NULL;
    enum status_code rc = find_pre(&pre, s->g, st);
    if (rc != ST_OK)
        return rc;
    json_t *first = NULL;
    if (pre->split)
        first = json_pack("{s:s, s:{s:s}, s:s, s:b}", "type", "Split", "pattern", "Regex", pre->split, "behavior",
                          "Isolated", "invert", 0);
    else if (pre->digits)
        first = json_pack("{s:s, s:b}", "type", "Digits", "individual_digits", 1);
    json_t *steps = first ? json_pack("[o, o]", first, byte_level(!pre->split)) : json_pack("[o]", byte_level(true));
    if ((rc = set(root, "pre_tokenizer", json_pack("{s:s, s:o}", "type", "Sequence", "pretokenizers", steps), st)) !=
            ST_OK ||
        (rc = set(root, "decoder", byte_level(true), st)) != ST_OK ||
        (rc = set(model, "ignore_merges", json_boolean(pre->ignore_merges), st)) != ST_OK)
        return rc;
    if (pre->nfc && (rc = set(root, "normalizer", json_pack("{s:s}", "type", "NFC"), st)) != ST_OK)
        return rc;
    return (rc = make_merges(s->g, model, st)) != ST_OK ? rc : make_template(s, root, pre->add_bos, st);
}

/* ---- SentencePiece ---- */

struct score_merge {
    float score;
    uint32_t id; /* of the whole */
    uint32_t left, right;
};

static int by_score(const void *a, const void *b)
{
    const struct score_merge *x = a, *y = b;
    if (x->score != y->score)
        return x->score < y->score ? 1 : -1;
    if (x->left != y->left)
        return x->left < y->left ? -1 : 1;
    if (x->right != y->right)
        return x->right < y->right ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

struct score_merges {
    struct score_merge *v;
    size_t n, room;
};

static bool can_merge(uint8_t type)
{
    return type == NORMAL || type == USER_DEFINED;
}

/* All ways to put token i together. */
static bool add_merges(struct score_merges *m, const struct source *s, const struct tok_vocab *vocab, uint32_t i,
                       float score)
{
    const struct gguf_string t = s->token[i];
    for (size_t cut = 1; cut < t.bytes; cut++) {
        if (((unsigned char)t.at[cut] & 0xC0) == 0x80) /* within a character */
            continue;
        uint32_t left = tok_vocab_find(vocab, t.at, cut), right = tok_vocab_find(vocab, t.at + cut, t.bytes - cut);
        if (left == TOK_NONE || right == TOK_NONE)
            continue;
        if (m->n == m->room) {
            size_t room = m->room ? 2 * m->room : 1024;
            struct score_merge *v = realloc(m->v, room * sizeof *v);
            if (!v)
                return false;
            m->v = v;
            m->room = room;
        }
        m->v[m->n++] = (struct score_merge){score, i, left, right};
    }
    return true;
}

static enum status_code collect_merges(struct score_merges *m, const struct source *s, struct status *st)
{
    struct gguf_array scores = {0};
    struct tok_vocab vocab = {0};
    enum status_code rc;
    if ((rc = gguf_need(s->g, KEY("scores"), st)) != ST_OK ||
        (rc = gguf_read_array(s->g, KEY("scores"), GGUF_FLOAT32, &scores, st)) != ST_OK)
        return rc;
    if (scores.count != s->n)
        return status_set(st, ST_DATA_LOSS, KEY("scores: %llu, expected one for each of %u tokens"),
                          (unsigned long long)scores.count, s->n);
    for (uint32_t i = 0; rc == ST_OK && i < s->n; i++)
        if (can_merge(s->type[i]))
            rc = tok_vocab_add(&vocab, i, s->token[i].at, s->token[i].bytes, TOK_ID_MODEL, KEY("tokens"), st);
    for (uint32_t i = 0; rc == ST_OK && i < s->n; i++) {
        float score = gguf_float32_at(&scores, i);
        if (!isfinite(score))
            rc = status_set(st, ST_DATA_LOSS, KEY("scores[%u]: %g, expected a number"), i, (double)score);
        else if (s->type[i] == NORMAL && !add_merges(m, s, &vocab, i, score))
            rc = status_nomem(st, "merges", m->n * sizeof *m->v);
    }
    tok_vocab_free(&vocab);
    if (m->n)
        qsort(m->v, m->n, sizeof *m->v, by_score);
    return rc;
}

static enum status_code make_score_merges(const struct source *s, json_t *model, struct status *st)
{
    struct score_merges m = {0};
    enum status_code rc = collect_merges(&m, s, st);
    json_t *list = rc == ST_OK ? json_array() : NULL;
    if (rc == ST_OK && !list)
        rc = status_nomem(st, "merges", 0);
    for (size_t i = 0; rc == ST_OK && i < m.n; i++) {
        const struct gguf_string l = s->token[m.v[i].left], r = s->token[m.v[i].right];
        if (json_array_append_new(list, json_pack("[s%, s%]", l.at, l.bytes, r.at, r.bytes)) != 0)
            rc = status_nomem(st, "merges", m.n);
    }
    free(m.v);
    if (rc == ST_OK)
        return set(model, "merges", list, st);
    json_decref(list);
    return rc;
}

/* A space in front of a text, and marks for all of them; the decoder takes both away. */
static enum status_code make_spaces(json_t *root, bool prefix, struct status *st)
{
    json_t *replace = json_pack("{s:s, s:{s:s}, s:s}", "type", "Replace", "pattern", "String", " ", "content", MARK);
    json_t *norms =
        prefix ? json_pack("[{s:s, s:s}, o]", "type", "Prepend", "prepend", MARK, replace) : json_pack("[o]", replace);
    json_t *back = json_pack("[{s:s, s:{s:s}, s:s}, {s:s}, {s:s}]", "type", "Replace", "pattern", "String", MARK,
                             "content", " ", "type", "ByteFallback", "type", "Fuse");
    json_t *strip =
        prefix ? json_pack("{s:s, s:s, s:i, s:i}", "type", "Strip", "content", " ", "start", 1, "stop", 0) : NULL;
    if (prefix && json_array_append_new(back, strip) != 0) {
        json_decref(back);
        back = NULL; /* said below */
    }
    enum status_code rc =
        set(root, "normalizer", json_pack("{s:s, s:o}", "type", "Sequence", "normalizers", norms), st);
    json_t *decoder = json_pack("{s:s, s:o}", "type", "Sequence", "decoders", back);
    if (rc == ST_OK)
        return set(root, "decoder", decoder, st);
    json_decref(decoder);
    return rc;
}

static enum status_code make_sentencepiece(const struct source *s, json_t *root, json_t *model, struct status *st)
{
    bool prefix = true, remove = false;
    uint32_t unknown = TOK_NONE;
    enum status_code rc;
    if (gguf_has(s->g, KEY("precompiled_charsmap")))
        return status_set(st, ST_UNIMPLEMENTED, KEY("precompiled_charsmap: not supported"));
    if ((rc = gguf_read_bool(s->g, KEY("add_space_prefix"), &prefix, st)) != ST_OK ||
        (rc = gguf_read_bool(s->g, KEY("remove_extra_whitespaces"), &remove, st)) != ST_OK ||
        (rc = special_id(s, KEY("unknown_token_id"), &unknown, st)) != ST_OK)
        return rc;
    if (remove)
        return status_set(st, ST_UNIMPLEMENTED, KEY("remove_extra_whitespaces: true is not supported, only false"));
    for (uint32_t i = 0; unknown == TOK_NONE && i < s->n; i++)
        unknown = s->type[i] == UNKNOWN ? i : TOK_NONE;
    if (unknown != TOK_NONE &&
        (rc = set(model, "unk_token", json_stringn_nocheck(s->token[unknown].at, s->token[unknown].bytes), st)) !=
            ST_OK)
        return rc;
    if ((rc = set(model, "byte_fallback", json_true(), st)) != ST_OK ||
        (rc = set(model, "fuse_unk", json_true(), st)) != ST_OK || (rc = make_spaces(root, prefix, st)) != ST_OK ||
        (rc = make_score_merges(s, model, st)) != ST_OK)
        return rc;
    return make_template(s, root, true, st);
}

/* ---- the whole ---- */

static enum status_code make_all(struct source *s, json_t *root, struct status *st)
{
    struct gguf_string name = {"", 0};
    char quoted[TOK_QUOTE_MAX];
    enum status_code rc;
    if ((rc = gguf_need(s->g, KEY("model"), st)) != ST_OK ||
        (rc = gguf_read_string(s->g, KEY("model"), &name, st)) != ST_OK)
        return rc;
    bool bytes = gguf_string_is(name, "gpt2");
    if (!bytes && !gguf_string_is(name, "llama"))
        return status_set(st, ST_UNIMPLEMENTED, KEY("model: %s is not supported, only gpt2 and llama"),
                          tok_quote(quoted, name.at, name.bytes));
    json_t *model = json_pack("{s:s}", "type", "BPE");
    if (!model)
        return status_nomem(st, "tokenizer", 0);
    /* Both lists are there then: said for the static analyser, which does not see into status.c. */
    if ((rc = read_tokens(s, st)) == ST_OK && s->token && s->type && (rc = make_vocab(s, model, st)) == ST_OK &&
        (rc = make_added(s, root, st)) == ST_OK)
        rc = bytes ? make_byte_level(s, root, model, st) : make_sentencepiece(s, root, model, st);
    if (rc == ST_OK)
        return set(root, "model", model, st);
    json_decref(model);
    return rc;
}

static enum status_code take_text(json_t **out, const struct gguf *g, struct status *st)
{
    static const char key[] = "tokenizer.huggingface.json";
    struct gguf_string text = {"", 0};
    json_error_t err;
    enum status_code rc = gguf_read_string(g, key, &text, st);
    if (rc != ST_OK)
        return rc;
    *out = json_loadb(text.at, text.bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &err);
    if (*out && json_is_object(*out))
        return ST_OK;
    return status_set(st, ST_DATA_LOSS, "%s: not a JSON object: line %d column %d: %s", key, err.line, err.column,
                      *out ? "something else" : err.text);
}

enum status_code tok_gguf_create(struct tokenizer **out, const struct gguf *g, struct status *st)
{
    struct source s = {.g = g};
    json_t *root = NULL;
    enum status_code rc;
    if (gguf_has(g, "tokenizer.huggingface.json"))
        rc = take_text(&root, g, st);
    else if (!(root = json_pack("{s:s}", "version", "1.0")))
        rc = status_nomem(st, "tokenizer", 0);
    else
        rc = make_all(&s, root, st);
    free(s.token);
    free(s.type);
    if (rc == ST_OK)
        rc = tok_create(out, root, st);
    json_decref(root);
    if (rc != ST_OK && st && strncmp(st->message, gguf_path(g), strlen(gguf_path(g))) != 0)
        status_prefix(st, "%s", gguf_path(g)); /* what gguf.h says begins with it */
    return rc;
}

enum status_code tok_gguf_load(struct tokenizer **out, const char *path, struct status *st)
{
    struct gguf *g;
    enum status_code rc = gguf_open(&g, path, st);
    if (rc != ST_OK)
        return rc;
    rc = tok_gguf_create(out, g, st);
    gguf_close(g);
    return rc;
}
