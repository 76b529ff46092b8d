/* check_tokenizer.c - ids and texts against what Hugging Face's library gave (tests/data), streams against tok_decode,
 * BPE against a plain model, damaged files, hostile texts, failing allocations.
 *
 * The linker sends this program's malloc, calloc and realloc through __wrap_* below, so that the n-th one can fail.
 */
#include "coordinator/tokenizer.h"

#include <check.h>
#include <jansson.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <utf8proc.h>

#include "coordinator/tokenizer_internal.h"
#include "tests/temp_dir.h"

/* --- failing allocations ------------------------------------------------------------------------------------------ */

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);

static atomic_long allocs_left = -1; /* -1: never fail */

static bool alloc_fails(void)
{
    long left = atomic_load(&allocs_left);
    if (left < 0)
        return false;
    if (left == 0)
        return true;
    atomic_fetch_sub(&allocs_left, 1);
    return false;
}

void *__wrap_malloc(size_t n)
{
    return alloc_fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return alloc_fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    return alloc_fails() ? NULL : __real_realloc(p, n);
}

/* --- fixtures ------------------------------------------------------------------------------------------------------- */

static const char *const MODELS[] = {TEST_DATA "/demo-model", TEST_DATA "/tokenizers/tinystories512",
                                     TEST_DATA "/tokenizers/llama2"};
#define N_MODELS 3

static uint64_t rng_next(uint64_t *s)
{
    uint64_t z = *s += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* Processor time: what else runs on the machine does not count. */
static double now_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static struct tokenizer *load(const char *dir)
{
    struct tokenizer *t = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(tok_load(&t, dir, &st) == ST_OK, "%s", st.message);
    return t;
}

static struct tokenizer *create(json_t *root)
{
    struct tokenizer *t = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(tok_create(&t, root, &st) == ST_OK, "%s", st.message);
    return t;
}

static json_t *read_json(const char *path)
{
    json_error_t err;
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, &err);
    ck_assert_msg(root != NULL, "%s:%d: %s", path, err.line, err.text);
    return root;
}

static json_t *parse_json(const char *text)
{
    json_error_t err;
    json_t *root = json_loads(text, JSON_ALLOW_NUL, &err);
    ck_assert_msg(root != NULL, "line %d, column %d: %s", err.line, err.column, err.text);
    return root;
}

/* --- comparing ------------------------------------------------------------------------------------------------------ */

static uint32_t *ids_of(const json_t *list, size_t *n)
{
    *n = json_array_size(list);
    uint32_t *ids = calloc(*n + 1, sizeof *ids);
    for (size_t i = 0; i < *n; i++)
        ids[i] = (uint32_t)json_integer_value(json_array_get(list, i));
    return ids;
}

static void expect_ids(const struct tokenizer *t, const json_t *text, const json_t *want, unsigned flags,
                       const char *what)
{
    struct status st = STATUS_INIT;
    uint32_t *ids = NULL;
    size_t n = 0, n_want;
    uint32_t *expected = ids_of(want, &n_want);
    enum status_code rc = tok_encode(t, json_string_value(text), json_string_length(text), flags, &ids, &n, &st);
    ck_assert_msg(rc == ST_OK, "%s: %s", what, st.message);
    ck_assert_msg((ids == NULL) == (n == 0), "%s: NULL exactly when there are no ids", what);
    size_t bound = tok_max_token_bytes(t);
    ck_assert_msg(bound == 0 || n * bound >= json_string_length(text), "%s: %zu ids of at most %zu bytes for %zu", what,
                  n, bound, json_string_length(text));
    char *shown = json_dumps(text, JSON_ENCODE_ANY);
    ck_assert_msg(n == n_want, "%s: %s: %zu ids, expected %zu", what, shown, n, n_want);
    for (size_t i = 0; i < n; i++)
        ck_assert_msg(ids[i] == expected[i], "%s: %s: id %zu is %u, expected %u", what, shown, i, ids[i], expected[i]);
    free(shown);
    free(ids);
    free(expected);
}

static char *decode(const struct tokenizer *t, const uint32_t *ids, size_t n, unsigned flags, size_t *len)
{
    struct status st = STATUS_INIT;
    char *text = NULL;
    ck_assert_msg(tok_decode(t, ids, n, flags, &text, len, &st) == ST_OK, "%s", st.message);
    ck_assert(text[*len] == '\0');
    ck_assert(tok_utf8_check(text, *len) == *len);
    return text;
}

static void expect_text(const struct tokenizer *t, const json_t *list, const json_t *want, unsigned flags,
                        const char *what)
{
    size_t n, len;
    uint32_t *ids = ids_of(list, &n);
    char *text = decode(t, ids, n, flags, &len);
    char *shown = json_dumps(list, 0);
    ck_assert_msg(len == json_string_length(want) && memcmp(text, json_string_value(want), len) == 0,
                  "%s: %s: '%s', expected '%s'", what, shown, text, json_string_value(want));
    free(shown);
    free(text);
    free(ids);
}

static void check_case(const struct tokenizer *t, const json_t *c, const char *what)
{
    const json_t *text = json_object_get(c, "text"), *ids = json_object_get(c, "ids");
    const json_t *with = json_object_get(c, "ids_add_special"), *mixed = json_object_get(c, "mixed");
    expect_ids(t, text, ids, 0, what);
    expect_ids(t, text, ids, 0, what); /* once more: from the cache */
    if (with)
        expect_ids(t, text, with, TOK_ADD_SPECIAL, what);
    const json_t *decoded = json_object_get(c, "decoded"), *skipped = json_object_get(c, "decoded_skip_special");
    expect_text(t, mixed ? mixed : ids, decoded ? decoded : text, 0, what);
    if (skipped)
        expect_text(t, mixed ? mixed : with, skipped, TOK_SKIP_SPECIAL, what);
}

START_TEST(models_give_the_library_s_ids_and_texts)
{
    static const char *const cases[N_MODELS] = {"tokenizer_cases.json", "cases.json", "cases.json"};
    static const size_t least[N_MODELS] = {200, 150, 150};
    char path[512];
    snprintf(path, sizeof path, "%s/%s", MODELS[_i], cases[_i]);
    json_t *root = read_json(path), *list = json_object_get(root, "cases");
    struct tokenizer *t = load(MODELS[_i]);
    ck_assert_uint_ge(json_array_size(list), least[_i]);
    for (size_t i = 0; i < json_array_size(list); i++) {
        char what[64];
        snprintf(what, sizeof what, "case %zu", i);
        check_case(t, json_array_get(list, i), what);
    }
    tok_free(t);
    json_decref(root);
}
END_TEST

/* merges as [["a", "b"], ...] from ["a b", ...] */
static json_t *merge_arrays(const json_t *list)
{
    json_t *out = json_array();
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *s = json_string_value(json_array_get(list, i)), *gap = strchr(s, ' ');
        json_array_append_new(out, json_pack("[s%,s]", s, (size_t)(gap - s), gap + 1));
    }
    return out;
}

START_TEST(combinations_of_components_give_the_library_s_ids_and_texts)
{
    json_t *root = read_json(_i ? TEST_DATA "/tokenizers/normalizers.json" : TEST_DATA "/tokenizers/components.json");
    json_t *vocabs = json_object_get(root, "vocabularies"), *list = json_object_get(root, "combinations");
    size_t n_cases = 0;
    ck_assert_uint_ge(json_array_size(list), 50);
    for (size_t i = 0; i < json_array_size(list); i++) {
        json_t *entry = json_array_get(list, i), *cases = json_object_get(entry, "cases");
        const json_t *v = json_array_get(vocabs, (size_t)json_integer_value(json_object_get(entry, "vocab")));
        json_t *tok = json_copy(json_object_get(entry, "tokenizer")),
               *model = json_copy(json_object_get(entry, "model"));
        json_object_set(model, "vocab", json_object_get(v, "vocab"));
        if (json_is_true(json_object_get(entry, "arrays")))
            json_object_set_new(model, "merges", merge_arrays(json_object_get(v, "merges")));
        else
            json_object_set(model, "merges", json_object_get(v, "merges"));
        json_object_set_new(tok, "model", model);
        struct tokenizer *t = create(tok);
        for (size_t k = 0; k < json_array_size(cases); k++, n_cases++) {
            char what[64];
            snprintf(what, sizeof what, "combination %zu, case %zu", i, k);
            check_case(t, json_array_get(cases, k), what);
        }
        tok_free(t);
        json_decref(tok);
    }
    ck_assert_uint_ge(n_cases, 300);
    json_decref(root);
}
END_TEST

/* Letters, marks of all classes, Hangul and what composes oddly. */
static size_t random_marks(uint64_t *seed, char *s, size_t max_chars)
{
    static const uint32_t chars[] = {'a',    'e',    0xE9,   0xC5,   0x212B, 0x1E69, 0x3B9,  0x1FBE,  0xFB01, 0x1100,
                                     0x1161, 0x11A8, 0xAC00, 0xAC01, 0x4E2D, 0x304B, 0x3099, 0x915,   0x93C,  0x958,
                                     0x9C7,  0x9BE,  0xB47,  0xB56,  0x1025, 0x102E, 0xFB1D, 0x1D15E, 0xF73,  0x2460};
    size_t n = 0;
    for (size_t i = rng_next(seed) % (max_chars + 1); i; i--) {
        uint64_t kind = rng_next(seed) % 3;
        uint32_t c =
            kind ? chars[rng_next(seed) % (sizeof chars / sizeof *chars)] : 0x300 + (uint32_t)(rng_next(seed) % 0x4F);
        n += tok_utf8_put(s + n, c);
    }
    return n;
}

/* Text is rewritten in stretches; utf8proc takes it as a whole. */
START_TEST(normal_forms_equal_those_of_the_whole_text)
{
    static const int options[] = {[TOK_NORM_NFC] = UTF8PROC_COMPOSE,
                                  [TOK_NORM_NFD] = UTF8PROC_DECOMPOSE,
                                  [TOK_NORM_NFKC] = UTF8PROC_COMPOSE | UTF8PROC_COMPAT,
                                  [TOK_NORM_NFKD] = UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT};
    uint64_t seed = 9;
    struct tok_buf out = {0};
    for (int round = 0; round < 20000; round++) {
        char text[256];
        size_t n = random_marks(&seed, text, 24);
        utf8proc_uint8_t *want = NULL;
        utf8proc_ssize_t len = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)n, &want,
                                            (utf8proc_option_t)(options[_i] | UTF8PROC_STABLE));
        out.len = 0;
        ck_assert(tok_nf_run((enum tok_norm_type)_i, text, n, &out));
        ck_assert_msg((utf8proc_ssize_t)out.len == len && (len == 0 || memcmp(out.data, want, out.len) == 0),
                      "round %d: '%.*s' became '%.*s', expected '%s'", round, (int)n, text, (int)out.len, out.data,
                      (const char *)want);
        free(want);
    }
    tok_buf_free(&out);
}
END_TEST

START_TEST(a_megabyte_of_marks_in_the_worst_order)
{
    const size_t size = 1 << 20;
    char *text = malloc(size + 4);
    struct tok_buf out = {0};
    size_t n = 0;
    double start = now_s();
    while (n < size) /* classes 230 and 202: every pair is out of order */
        n += tok_utf8_put(text + n, n % 4 ? 0x327 : 0x301);
    for (int form = 0; form < 4; form++) {
        out.len = 0;
        ck_assert(tok_nf_run((enum tok_norm_type)form, text, n, &out));
        ck_assert_uint_eq(out.len, n);
        ck_assert(tok_utf8_get(out.data, 2) == 0x327 && tok_utf8_get(out.data + n - 2, 2) == 0x301);
    }
    ck_assert_msg(now_s() - start < 15, "%.1f s", now_s() - start);
    tok_buf_free(&out);
    free(text);
}
END_TEST

START_TEST(tokens_are_found_by_content)
{
    struct tokenizer *t = load(MODELS[1]);
    ck_assert_uint_eq(tok_vocab_size(t), 512);
    ck_assert_int_eq(tok_find(t, "</s>"), 2);
    ck_assert_int_eq(tok_find(t, "<0x0A>"), 13);
    ck_assert_int_eq(tok_find(t, "no such token"), -1);
    ck_assert_int_eq(tok_find(t, ""), -1);
    ck_assert(tok_is_special(t, 1) && !tok_is_special(t, 3) && !tok_is_special(t, 511));
    ck_assert(!tok_is_special(t, 512) && !tok_is_special(t, UINT32_MAX));
    tok_free(t);
    t = load(MODELS[0]);
    ck_assert_uint_eq(tok_vocab_size(t), 2048);
    ck_assert_int_eq(tok_find(t, "<|end_of_text|>"), 2047);
    ck_assert(tok_is_special(t, 2047));
    tok_free(t);
}
END_TEST

/* --- BPE against a plain model ------------------------------------------------------------------------------------------ */

/* Merges the best pair of the whole list again and again, looking every pair up by its text. */
static size_t plain_bpe(const json_t *ranks, char **parts, size_t n)
{
    for (;;) {
        json_int_t best = -1;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            char pair[256];
            snprintf(pair, sizeof pair, "%s %s", parts[i], parts[i + 1]);
            const json_t *r = json_object_get(ranks, pair);
            if (r && (best < 0 || json_integer_value(r) < best)) {
                best = json_integer_value(r);
                at = i;
            }
        }
        if (best < 0)
            return n;
        strcat(parts[at], parts[at + 1]);
        free(parts[at + 1]);
        memmove(parts + at + 1, parts + at + 2, (n - at - 2) * sizeof *parts);
        n--;
    }
}

START_TEST(words_of_any_length_merge_like_the_plain_model)
{
    json_t *root = read_json(TEST_DATA "/tokenizers/tinystories512/tokenizer.json");
    json_t *model = json_object_get(root, "model"), *vocab = json_object_get(model, "vocab");
    json_t *merges = json_object_get(model, "merges"), *ranks = json_object();
    for (size_t i = 0; i < json_array_size(merges); i++)
        json_object_set_new(ranks, json_string_value(json_array_get(merges, i)), json_integer((json_int_t)i));
    json_object_set_new(root, "normalizer", json_null());
    struct tokenizer *t = create(root);
    uint64_t seed = 1;
    for (int round = 0; round < 300; round++) {
        size_t n = 1 + rng_next(&seed) % (round < 250 ? 90 : 400);
        char text[401], *parts[400];
        for (size_t i = 0; i < n; i++) { /* few letters: many pairs have a rank */
            text[i] = "theandoingtoshe"[rng_next(&seed) % 15];
            parts[i] = calloc(1, 64);
            parts[i][0] = text[i];
        }
        uint32_t *ids;
        size_t n_ids;
        struct status st = STATUS_INIT;
        ck_assert(tok_encode(t, text, n, 0, &ids, &n_ids, &st) == ST_OK);
        size_t n_want = plain_bpe(ranks, parts, n);
        ck_assert_uint_eq(n_ids, n_want);
        for (size_t i = 0; i < n_want; i++) {
            ck_assert_int_eq(ids[i], json_integer_value(json_object_get(vocab, parts[i])));
            free(parts[i]);
        }
        free(ids);
    }
    tok_free(t);
    json_decref(ranks);
    json_decref(root);
}
END_TEST

/* --- streams ---------------------------------------------------------------------------------------------------------- */

struct text {
    char *s;
    size_t len;
};

static void append(struct text *to, const char *s, size_t n)
{
    ck_assert(tok_utf8_check(s, n) == n);
    ck_assert(s[n] == '\0');
    to->s = realloc(to->s, to->len + n + 1);
    memcpy(to->s + to->len, s, n);
    to->len += n;
    to->s[to->len] = '\0';
}

/* The pieces of a stream over ids[from..n), primed with those before. */
static struct text stream_all(const struct tokenizer *t, const uint32_t *ids, size_t from, size_t n, unsigned flags)
{
    struct status st = STATUS_INIT;
    struct tok_stream *s;
    struct text out = {calloc(1, 1), 0};
    const char *piece;
    size_t len;
    ck_assert(tok_stream_create(&s, t, flags, &st) == ST_OK);
    if (from)
        tok_stream_prime(s, ids, from);
    for (size_t i = from; i < n; i++) {
        ck_assert(tok_stream_push(s, ids[i], &piece, &len, &st) == ST_OK);
        append(&out, piece, len);
    }
    ck_assert(tok_stream_flush(s, &piece, &len, &st) == ST_OK);
    append(&out, piece, len);
    tok_stream_free(s);
    return out;
}

/* Random ids with what is difficult made frequent: bytes, special tokens, spaces. */
static size_t random_ids(const struct tokenizer *t, uint64_t *seed, uint32_t *ids, size_t max)
{
    size_t n = rng_next(seed) % (max + 1);
    uint32_t size = tok_vocab_size(t);
    for (size_t i = 0; i < n; i++) {
        uint64_t kind = rng_next(seed) % 4;
        ids[i] = (uint32_t)(rng_next(seed) % (kind == 0 ? 3 : kind < 3 ? 262 : size));
        if (rng_next(seed) % 8 == 0)
            ids[i] = size - 1 - ids[i] % 2;
    }
    return n;
}

START_TEST(stream_pieces_add_up_to_the_decoded_text)
{
    struct tokenizer *t = load(MODELS[_i]);
    uint64_t seed = 42 + (uint64_t)_i;
    for (int round = 0; round < 3000; round++) {
        uint32_t ids[40];
        size_t n = random_ids(t, &seed, ids, 40), from = n ? rng_next(&seed) % n : 0, len;
        unsigned flags = round & 1 ? TOK_SKIP_SPECIAL : 0;
        char *all = decode(t, ids, n, flags, &len);
        struct text whole = stream_all(t, ids, 0, n, flags), tail = stream_all(t, ids, from, n, flags);
        ck_assert_msg(whole.len == len && memcmp(whole.s, all, len) == 0, "round %d: '%s', decoded '%s'", round,
                      whole.s, all);
        /* Primed: the end of the whole text, at least all that the ids before cannot have settled. */
        ck_assert_msg(tail.len <= len && memcmp(tail.s, all + len - tail.len, tail.len) == 0,
                      "round %d, primed with %zu: '%s' does not end '%s'", round, from, tail.s, all);
        struct text head = {calloc(1, 1), 0};
        struct tok_stream *s;
        struct status st = STATUS_INIT;
        ck_assert(tok_stream_create(&s, t, flags, &st) == ST_OK);
        for (size_t i = 0; i < from; i++) {
            const char *piece;
            size_t piece_len;
            ck_assert(tok_stream_push(s, ids[i], &piece, &piece_len, &st) == ST_OK);
            append(&head, piece, piece_len);
        }
        tok_stream_free(s);
        /* What the stream held back at that place is the prompt's: bytes, of which no more than a character is left. */
        size_t last = from;
        while (last && flags && (t->vocab.flags[ids[last - 1]] & TOK_ID_SKIP))
            last--;
        bool bytes = last && t->dec.byte[ids[last - 1]] >= 0;
        ck_assert_msg(bytes ? head.len + tail.len <= len : head.len + tail.len == len, "round %d, primed with %zu",
                      round, from);
        free(head.s);
        free(whole.s);
        free(tail.s);
        free(all);
    }
    tok_free(t);
}
END_TEST

static void expect_piece(struct tok_stream *s, const struct tokenizer *t, const char *token, const char *want)
{
    struct status st = STATUS_INIT;
    const char *piece;
    size_t len;
    int64_t id = tok_find(t, token);
    ck_assert_msg(id >= 0, "%s", token);
    ck_assert(tok_stream_push(s, (uint32_t)id, &piece, &len, &st) == ST_OK);
    ck_assert_msg(len == strlen(want) && strcmp(piece, want) == 0, "%s gave '%s', expected '%s'", token, piece, want);
}

START_TEST(a_run_of_byte_tokens_waits_for_its_end)
{
    struct tokenizer *t = load(MODELS[1]);
    struct status st = STATUS_INIT;
    struct tok_stream *s;
    const char *piece;
    size_t len;
    ck_assert(tok_stream_create(&s, t, 0, &st) == ST_OK);
    expect_piece(s, t, "\xE2\x96\x81the", "the"); /* no space in front of the first word */
    expect_piece(s, t, "\xE2\x96\x81the", " the");
    expect_piece(s, t, "<0xF0>", "");
    expect_piece(s, t, "<0x9F>", "");
    expect_piece(s, t, "<0x91>", "");
    expect_piece(s, t, "<0x8D>", ""); /* a bad byte could still follow and spoil it */
    expect_piece(s, t, "e",
                 "\xF0\x9F\x91\x8D"
                 "e");
    expect_piece(s, t, "<0xC3>", "");
    expect_piece(s, t, "<0xA9>", "");
    expect_piece(s, t, "<0xFF>", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"); /* spoilt: nothing more to wait for */
    expect_piece(s, t, "<0x41>", "\xEF\xBF\xBD");
    expect_piece(s, t, "e", "e");
    expect_piece(s, t, "<0xE2>", "");
    ck_assert(tok_stream_flush(s, &piece, &len, &st) == ST_OK);
    ck_assert_str_eq(piece, "\xEF\xBF\xBD");
    tok_stream_free(s);
    tok_free(t);
}
END_TEST

START_TEST(byte_level_holds_back_at_most_one_character)
{
    struct tokenizer *t = load(MODELS[0]);
    struct status st = STATUS_INIT;
    struct tok_stream *s;
    const char *piece;
    size_t len;
    ck_assert(tok_stream_create(&s, t, 0, &st) == ST_OK);
    expect_piece(s, t, "\xC3\xB0", "");                         /* F0 */
    expect_piece(s, t, "\xC4\xA3", "\xEF\xBF\xBD\xEF\xBF\xBD"); /* 81 is no second byte of F0: both are bad */
    tok_stream_free(s);
    ck_assert(tok_stream_create(&s, t, 0, &st) == ST_OK);
    expect_piece(s, t, "\xC3\xB0", "");
    expect_piece(s, t, "e",
                 "\xEF\xBF\xBD"
                 "e");
    expect_piece(s, t, "\xC3\xA9", ""); /* E9 */
    ck_assert(tok_stream_flush(s, &piece, &len, &st) == ST_OK);
    ck_assert_str_eq(piece, "\xEF\xBF\xBD");
    tok_stream_free(s);
    tok_free(t);
}
END_TEST

START_TEST(a_primed_stream_continues_the_prompt)
{
    struct tokenizer *t = load(MODELS[2]);
    struct status st = STATUS_INIT;
    struct tok_stream *s;
    uint32_t *ids;
    size_t n;
    ck_assert(tok_encode(t, "Once upon", 9, TOK_ADD_SPECIAL, &ids, &n, &st) == ST_OK);
    ck_assert(tok_stream_create(&s, t, TOK_SKIP_SPECIAL, &st) == ST_OK);
    tok_stream_prime(s, ids, n);
    expect_piece(s, t,
                 "\xE2\x96\x81"
                 "a",
                 " a"); /* unprimed it would be "a" */
    expect_piece(s, t, "</s>", "");
    expect_piece(s, t, "\xE2\x96\x81time", " time");
    tok_stream_free(s);
    free(ids);
    tok_free(t);
}
END_TEST

/* Characters that the vocabulary lacks are runs of bytes, which a stream holds back to their end. */
START_TEST(characters_of_the_prompt_do_not_come_again)
{
    struct tokenizer *t = load(MODELS[1]);
    struct status st = STATUS_INIT;
    struct tok_stream *s;
    uint32_t *ids;
    size_t n;
    ck_assert(tok_encode(t, "the \xF0\x9F\x91\x8D\xF0\x9F\x91\x8E", 12, 0, &ids, &n, &st) == ST_OK);
    ck_assert_int_ge(t->dec.byte[ids[n - 1]], 0);
    ck_assert(tok_stream_create(&s, t, 0, &st) == ST_OK);
    tok_stream_prime(s, ids, n);
    expect_piece(s, t, "e", "e");
    tok_stream_free(s);
    ck_assert(tok_stream_create(&s, t, 0, &st) == ST_OK);
    tok_stream_prime(s, ids, n - 1); /* half a character, after a whole one */
    expect_piece(s, t, "<0x8E>", "");
    expect_piece(s, t, "<0xC3>", "");
    expect_piece(s, t, "<0xA8>", "");
    expect_piece(s, t, "e",
                 "\xF0\x9F\x91\x8E\xC3\xA8"
                 "e");
    tok_stream_free(s);
    free(ids);
    tok_free(t);
}
END_TEST

START_TEST(ids_outside_of_the_vocabulary)
{
    struct tokenizer *t = load(MODELS[0]);
    struct status st = STATUS_INIT;
    struct tok_stream *s;
    const char *piece;
    char *text;
    size_t len;
    uint32_t bad[] = {64, 2048};
    ck_assert_int_eq(tok_decode(t, bad, 2, 0, &text, &len, &st), ST_OUT_OF_RANGE);
    ck_assert_ptr_nonnull(strstr(st.message, "ids[1]: 2048"));
    ck_assert(tok_stream_create(&s, t, 0, &st) == ST_OK);
    ck_assert(tok_stream_push(s, UINT32_MAX, &piece, &len, &st) == ST_OK);
    ck_assert_uint_eq(len, 0);
    tok_stream_free(s);
    ck_assert(tok_decode(t, NULL, 0, 0, &text, &len, &st) == ST_OK);
    ck_assert_uint_eq(len, 0);
    ck_assert_str_eq(text, "");
    free(text);
    tok_free(t);
}
END_TEST

START_TEST(without_a_vocabulary_there_is_no_text)
{
    struct tokenizer *t, *whole = load(MODELS[0]);
    struct status st = STATUS_INIT;
    struct tok_stream *s;
    const char *piece;
    char *text;
    uint32_t *ids = NULL, some[] = {0, 1, UINT32_MAX};
    size_t n = 0, len;
    ck_assert(tok_create_none(&t, &st) == ST_OK);
    ck_assert(!tok_has_text(t) && tok_has_text(whole));
    ck_assert_uint_eq(tok_vocab_size(t), 0);
    ck_assert_uint_eq(tok_max_token_bytes(t), 0);
    ck_assert(!tok_is_special(t, 1));
    ck_assert_int_eq(tok_find(t, "a"), -1);
    ck_assert_int_eq(tok_encode(t, "a", 1, TOK_ADD_SPECIAL, &ids, &n, &st), ST_FAILED_PRECONDITION);
    ck_assert_ptr_null(ids);
    ck_assert_int_eq(tok_decode(t, some, 3, 0, &text, &len, &st), ST_OUT_OF_RANGE);
    ck_assert(tok_stream_create(&s, t, TOK_SKIP_SPECIAL, &st) == ST_OK);
    tok_stream_prime(s, some, 3);
    for (size_t i = 0; i < 3; i++) {
        ck_assert(tok_stream_push(s, some[i], &piece, &len, &st) == ST_OK);
        ck_assert_uint_eq(len, 0);
        ck_assert_str_eq(piece, "");
    }
    ck_assert(tok_stream_flush(s, &piece, &len, &st) == ST_OK);
    ck_assert_uint_eq(len, 0);
    tok_stream_free(s);
    tok_free(t);
    tok_free(whole);
}
END_TEST

/* --- limits ----------------------------------------------------------------------------------------------------------- */

/* Text that survives the way there and back, for models that lose nothing. */
static void round_trip(const struct tokenizer *t, const char *text, size_t len, const char *what)
{
    struct status st = STATUS_INIT;
    uint32_t *ids;
    size_t n, back_len;
    double start = now_s();
    ck_assert_msg(tok_encode(t, text, len, 0, &ids, &n, &st) == ST_OK, "%s: %s", what, st.message);
    double encoded = now_s();
    ck_assert_uint_ge(n * tok_max_token_bytes(t), len);
    char *back = decode(t, ids, n, 0, &back_len);
    /* Linear or n log n: far below; quadratic would take minutes. */
    ck_assert_msg(encoded - start < 15 && now_s() - encoded < 15, "%s: %.1f s and %.1f s", what, encoded - start,
                  now_s() - encoded);
    ck_assert_msg(back_len == len && memcmp(back, text, len) == 0, "%s comes back changed", what);
    free(back);
    free(ids);
}

START_TEST(a_lone_word_of_a_megabyte_and_other_monsters)
{
    static const char *const units[] = {"a",     " ",
                                        "\n",    "ab",
                                        "x y",   "\xE4\xB8\xAD",
                                        "'",     "1",
                                        "\t \n", "\xF0\x9F\x91\x8D",
                                        "<s",    "thequickbrownfox",
                                        "    x", "\xE2\x96\x81",
                                        "!\r\n", "\xCC\x81"};
    struct tokenizer *t = load(MODELS[_i]);
#ifdef TANDEM_SANITIZED
    const size_t size = 1 << 18; /* quadratic would still take minutes */
#else
    const size_t size = 1 << 20;
#endif
    char *text = malloc(size + 32);
    for (size_t k = 0; k < sizeof units / sizeof *units; k++) {
        size_t unit = strlen(units[k]), len = 0;
        if (_i > 0 && strcmp(units[k], "\xE2\x96\x81") == 0)
            continue; /* becomes a space */
        while (len < size) {
            memcpy(text + len, units[k], unit);
            len += unit;
        }
        round_trip(t, text, len, units[k]);
    }
    free(text);
    tok_free(t);
}
END_TEST

START_TEST(texts_that_are_not_utf8_or_too_long)
{
    static const struct {
        const char *text;
        size_t len;
        const char *says;
    } bad[] = {{"abc\xFFxyz", 7, "byte 3 (0xff)"},
               {"\x80", 1, "byte 0"},
               {"0123456789\xC3", 11, "byte 10"},
               {"\xC0\x80", 2, "byte 0"},
               {"ab\xED\xA0\x80", 5, "byte 2"},
               {"\xF4\x90\x80\x80", 4, "byte 0"},
               {"\xE2\x82", 2, "byte 0"},
               {"aaaaaaaa\xE0\x80\x80", 11, "byte 8"},
               {"", (size_t)1 << 40, "expected at most"}};
    struct tokenizer *t = load(MODELS[0]);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct status st = STATUS_INIT;
        uint32_t *ids;
        size_t n;
        ck_assert_int_eq(tok_encode(t, bad[i].text, bad[i].len, 0, &ids, &n, &st), ST_INVALID_ARGUMENT);
        ck_assert_msg(strstr(st.message, bad[i].says) != NULL, "%s", st.message);
    }
    struct status st = STATUS_INIT;
    uint32_t *ids;
    size_t n;
    ck_assert(tok_encode(t, "", 0, 0, &ids, &n, &st) == ST_OK && n == 0 && ids == NULL);
    ck_assert(tok_encode(t, "", 0, TOK_ADD_SPECIAL, &ids, &n, &st) == ST_OK && n == 1 && ids[0] == 2046);
    free(ids);
    ck_assert(tok_encode(t, "a\0b", 3, 0, &ids, &n, &st) == ST_OK && n == 3);
    free(ids);
    tok_free(t);
}
END_TEST

START_TEST(a_long_stream_costs_the_same_per_push)
{
    struct tokenizer *t = load(MODELS[1]);
    struct status st = STATUS_INIT;
    struct tok_stream *s;
    size_t total = 0;
    uint64_t seed = 5;
    double start = now_s();
    ck_assert(tok_stream_create(&s, t, 0, &st) == ST_OK);
    for (int i = 0; i < 400000; i++) {
        const char *piece;
        size_t len;
        ck_assert(tok_stream_push(s, (uint32_t)(3 + rng_next(&seed) % 509), &piece, &len, &st) == ST_OK);
        ck_assert_uint_le(len, 4096);
        total += len;
    }
    ck_assert_uint_gt(total, 400000);
    ck_assert_msg(now_s() - start < 15, "%.1f s", now_s() - start);
    tok_stream_free(s);
    tok_free(t);
}
END_TEST

struct worker {
    const struct tokenizer *t;
    const json_t *cases;
    uint64_t seed;
    int wrong;
};

static void *encode_many(void *arg)
{
    struct worker *w = arg;
    for (int i = 0; i < 400; i++) {
        const json_t *c = json_array_get(w->cases, rng_next(&w->seed) % json_array_size(w->cases));
        const json_t *text = json_object_get(c, "text"), *want = json_object_get(c, "ids");
        uint32_t *ids = NULL;
        size_t n = 0;
        if (tok_encode(w->t, json_string_value(text), json_string_length(text), 0, &ids, &n, NULL) != ST_OK)
            w->wrong++;
        w->wrong += n != json_array_size(want);
        for (size_t k = 0; k < n && k < json_array_size(want); k++)
            w->wrong += ids[k] != (uint32_t)json_integer_value(json_array_get(want, k));
        free(ids);
    }
    return NULL;
}

START_TEST(threads_share_a_tokenizer)
{
    json_t *root = read_json(TEST_DATA "/tokenizers/llama2/cases.json");
    struct tokenizer *t = load(MODELS[2]);
    pthread_t threads[6];
    struct worker w[6];
    for (size_t i = 0; i < 6; i++) {
        w[i] = (struct worker){t, json_object_get(root, "cases"), i, 0};
        ck_assert(pthread_create(&threads[i], NULL, encode_many, &w[i]) == 0);
    }
    for (size_t i = 0; i < 6; i++) {
        pthread_join(threads[i], NULL);
        ck_assert_int_eq(w[i].wrong, 0);
    }
    tok_free(t);
    json_decref(root);
}
END_TEST

/* --- faults ------------------------------------------------------------------------------------------------------------- */

/* A small whole tokenizer; the table replaces one member of it. */
static const char TINY[] =
    "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[],\"normalizer\":null,"
    "\"pre_tokenizer\":null,\"post_processor\":null,\"decoder\":null,\"model\":{\"type\":\"BPE\",\"dropout\":null,"
    "\"unk_token\":null,\"fuse_unk\":false,\"byte_fallback\":false,\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},"
    "\"merges\":[\"a b\"]}}";

#define ADDED(id, content)                                                                                             \
    "[{\"id\":" id ",\"content\":\"" content                                                                           \
    "\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":true}]"
#define SPLIT(regex)                                                                                                   \
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex "\"},\"behavior\":\"Isolated\",\"invert\":false}"

struct fault {
    const char *path, *value; /* "model.vocab": what is put there; value NULL: taken out */
    enum status_code code;
    const char *says;
};

static const struct fault FAULTS[] = {
    {"version", "\"2.0\"", ST_UNIMPLEMENTED, "version"},
    {"truncation", "{\"max_length\":5}", ST_UNIMPLEMENTED, "truncation"},
    {"padding", "{}", ST_UNIMPLEMENTED, "padding"},
    {"model", NULL, ST_DATA_LOSS, "model: expected an object, got nothing"},
    {"model", "[]", ST_DATA_LOSS, "model: expected an object, got an array"},
    {"model.type", "\"Unigram\"", ST_UNIMPLEMENTED, "'Unigram'"},
    {"model.type", "7", ST_DATA_LOSS, "model.type: expected a string"},
    {"model.dropout", "0.1", ST_UNIMPLEMENTED, "dropout"},
    {"model.continuing_subword_prefix", "\"##\"", ST_DATA_LOSS, "merges[0]: 'b' lacks continuing_subword_prefix"},
    {"model.end_of_word_suffix", "7", ST_DATA_LOSS, "model.end_of_word_suffix: expected a string"},
    {"model.byte_fallback", "3", ST_DATA_LOSS, "model.byte_fallback: expected true or false, got an integer"},
    {"model.unk_token", "3", ST_DATA_LOSS, "model.unk_token: expected a string"},
    {"model.vocab", NULL, ST_DATA_LOSS, "model.vocab: expected an object, got nothing"},
    {"model.vocab", "{}", ST_DATA_LOSS, "model.vocab: is empty"},
    {"model.vocab", "{\"a\":0,\"b\":0,\"ab\":2}", ST_DATA_LOSS, "same id 0"},
    {"model.vocab", "{\"a\":\"0\"}", ST_DATA_LOSS, "model.vocab['a']: expected an integer, got a string"},
    {"model.vocab", "{\"a\":-1}", ST_DATA_LOSS, "model.vocab['a']: id -1"},
    {"model.vocab", "{\"a\":4194304}", ST_DATA_LOSS, "id 4194304, expected 0 to 4194303"},
    {"model.vocab", "{\"a\":9223372036854775807}", ST_DATA_LOSS, "expected 0 to 4194303"},
    {"model.vocab", "{\"a\":1.5}", ST_DATA_LOSS, "got a real number"},
    {"model.merges", NULL, ST_DATA_LOSS, "model.merges: expected an array"},
    {"model.merges", "[\"a c\"]", ST_DATA_LOSS, "model.merges[0]: 'c' is not in model.vocab"},
    {"model.merges", "[\"a b\",\"b a\"]", ST_DATA_LOSS, "model.merges[1]: the result 'ba' is not in model.vocab"},
    {"model.merges", "[\"a b c\"]", ST_DATA_LOSS, "model.merges[0]: expected"},
    {"model.merges", "[\"ab\"]", ST_DATA_LOSS, "model.merges[0]: expected"},
    {"model.merges", "[[\"a\"]]", ST_DATA_LOSS, "model.merges[0]: expected"},
    {"model.merges", "[[\"a\",2]]", ST_DATA_LOSS, "model.merges[0]: expected"},
    {"model.merges", "[7]", ST_DATA_LOSS, "model.merges[0]: expected"},
    {"added_tokens", "{}", ST_DATA_LOSS, "added_tokens: expected an array"},
    {"added_tokens", "[4]", ST_DATA_LOSS, "added_tokens[0]: expected an object"},
    {"added_tokens", "[{\"id\":3,\"content\":\"x\"}]", ST_DATA_LOSS, "added_tokens[0].single_word"},
    {"added_tokens", ADDED("7", "x"), ST_DATA_LOSS, "added_tokens[0].id: 7 for 'x', expected 3"},
    {"added_tokens", ADDED("1", "a"), ST_DATA_LOSS, "expected 0 (as in model.vocab)"},
    {"added_tokens", ADDED("-1", "x"), ST_DATA_LOSS, "added_tokens[0].id: -1"},
    {"added_tokens", ADDED("99999999999", "x"), ST_DATA_LOSS, "added_tokens[0].id: 99999999999"},
    {"normalizer", "{\"type\":\"Precompiled\"}", ST_UNIMPLEMENTED, "normalizer.type: 'Precompiled'"},
    {"normalizer", "{\"type\":\"Strip\",\"strip_left\":true}", ST_DATA_LOSS,
     "normalizer.strip_right: expected true or false"},
    {"normalizer", "7", ST_DATA_LOSS, "normalizer: expected an object"},
    {"normalizer", "{}", ST_DATA_LOSS, "normalizer.type: expected a string, got nothing"},
    {"normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Precompiled\"}]}", ST_UNIMPLEMENTED,
     "normalizer.normalizers[0].type: 'Precompiled'"},
    {"normalizer", "{\"type\":\"Sequence\"}", ST_DATA_LOSS, "normalizer.normalizers: expected an array"},
    {"normalizer", "{\"type\":\"Prepend\"}", ST_DATA_LOSS, "normalizer.prepend"},
    {"normalizer", "{\"type\":\"Replace\",\"pattern\":\"x\",\"content\":\"\"}", ST_DATA_LOSS, "normalizer.pattern"},
    {"pre_tokenizer", "{\"type\":\"UnicodeScripts\"}", ST_UNIMPLEMENTED, "'UnicodeScripts'"},
    {"pre_tokenizer", SPLIT("("), ST_DATA_LOSS, "pre_tokenizer.pattern: regex '(': missing closing parenthesis"},
    {"pre_tokenizer", SPLIT("[a"), ST_DATA_LOSS, "a class is not closed"},
    {"pre_tokenizer", SPLIT("^a"), ST_UNIMPLEMENTED, "'^'"},
    {"pre_tokenizer", SPLIT("a\\\\b"), ST_UNIMPLEMENTED, "\\b"},
    {"pre_tokenizer", SPLIT("\\\\h"), ST_UNIMPLEMENTED, "\\h"},
    {"pre_tokenizer", SPLIT("[a-z&&[^b]]"), ST_UNIMPLEMENTED, "'&&'"},
    {"pre_tokenizer", SPLIT("a{2}+"), ST_UNIMPLEMENTED, "interval"},
    {"pre_tokenizer", SPLIT("(?i)a"), ST_UNIMPLEMENTED, "group"},
    {"pre_tokenizer", SPLIT("(a)\\\\1"), ST_UNIMPLEMENTED, "\\1"},
    {"pre_tokenizer", SPLIT("\\\\p{Nonsense}"), ST_UNIMPLEMENTED, "unknown property"},
    {"pre_tokenizer", "{\"type\":\"Split\",\"pattern\":{\"Glob\":\"*\"},\"behavior\":\"Isolated\",\"invert\":false}",
     ST_DATA_LOSS, "pre_tokenizer.pattern"},
    {"pre_tokenizer", "{\"type\":\"Split\",\"pattern\":{\"String\":\" \"},\"behavior\":\"Sideways\",\"invert\":false}",
     ST_UNIMPLEMENTED, "'Sideways'"},
    {"pre_tokenizer", "{\"type\":\"Metaspace\",\"replacement\":\"xy\"}", ST_DATA_LOSS, "expected one character"},
    {"pre_tokenizer",
     "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"FixedLength\",\"length\":2},"
     "{\"type\":\"FixedLength\",\"length\":0}]}",
     ST_DATA_LOSS, "pre_tokenizer.pretokenizers[1].length: 0, expected 1 at least"},
    {"pre_tokenizer", "{\"type\":\"CharDelimiterSplit\",\"delimiter\":\"ab\"}", ST_DATA_LOSS,
     "pre_tokenizer.delimiter: expected one character"},
    {"pre_tokenizer", "{\"type\":\"Punctuation\",\"behavior\":\"Odd\"}", ST_UNIMPLEMENTED, "behavior: 'Odd'"},
    {"post_processor", "{\"type\":\"Magic\"}", ST_UNIMPLEMENTED, "'Magic'"},
    {"post_processor", "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}]}", ST_DATA_LOSS,
     "'x' is used, but not there"},
    {"post_processor", "{\"type\":\"TemplateProcessing\",\"single\":[]}", ST_UNIMPLEMENTED, "the text 0 times"},
    {"post_processor",
     "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}},{\"Sequence\":{\"id\":\"A\"}}],"
     "\"special_tokens\":{\"x\":{\"id\":\"x\",\"ids\":[77]}}}",
     ST_DATA_LOSS, "id 77 is not in the vocabulary"},
    {"decoder", "{\"type\":\"WordPiece\"}", ST_UNIMPLEMENTED, "decoder.type: 'WordPiece'"},
    {"decoder", "{\"type\":\"Strip\",\"content\":\" \",\"start\":-1,\"stop\":0}", ST_DATA_LOSS, "decoder.start: -1"},
    {"decoder", "{\"type\":\"Strip\",\"content\":\"\",\"start\":1,\"stop\":0}", ST_DATA_LOSS, "one character"},
    {"decoder", "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},{\"type\":\"ByteFallback\"}]}",
     ST_UNIMPLEMENTED, "behind Fuse"},
};

static void put_member(json_t *root, const char *path, const char *value)
{
    const char *dot = strchr(path, '.');
    json_t *at = root;
    if (dot) {
        char first[64];
        snprintf(first, sizeof first, "%.*s", (int)(dot - path), path);
        at = json_object_get(root, first);
        path = dot + 1;
    }
    if (!value) {
        json_object_del(at, path);
        return;
    }
    json_error_t err;
    json_t *v = json_loads(value, JSON_DECODE_ANY, &err);
    ck_assert_msg(v != NULL, "%s: %s", value, err.text);
    json_object_set_new(at, path, v);
}

START_TEST(a_wrong_member_is_named)
{
    const struct fault *f = &FAULTS[_i];
    json_t *root = parse_json(TINY);
    struct tokenizer *t = NULL;
    struct status st = STATUS_INIT;
    put_member(root, f->path, f->value);
    enum status_code rc = tok_create(&t, root, &st);
    ck_assert_msg(rc == f->code && st.code == rc, "%s = %s: %s %s", f->path, f->value ? f->value : "(none)",
                  status_name(rc), st.message);
    ck_assert_msg(strstr(st.message, f->says) != NULL, "%s = %s: %s", f->path, f->value ? f->value : "(none)",
                  st.message);
    ck_assert_ptr_null(t);
    json_decref(root);
}
END_TEST

START_TEST(deeply_nested_sequences_are_refused)
{
    char text[4096] = "";
    for (int i = 0; i < 40; i++)
        strcat(text, "{\"type\":\"Sequence\",\"normalizers\":[");
    for (int i = 0; i < 40; i++)
        strcat(text, "]}");
    json_t *root = parse_json(TINY);
    struct tokenizer *t = NULL;
    struct status st = STATUS_INIT;
    put_member(root, "normalizer", text);
    ck_assert_int_eq(tok_create(&t, root, &st), ST_UNIMPLEMENTED);
    ck_assert_ptr_nonnull(strstr(st.message, "nested deeper"));
    json_decref(root);
}
END_TEST

static enum status_code load_bytes(const char *data, size_t n, const char *config, struct status *st)
{
    struct temp_dir dir = temp_dir_make();
    struct tokenizer *t = NULL;
    temp_dir_write(&dir, "tokenizer.json", data, n);
    if (config)
        temp_dir_write(&dir, "tokenizer_config.json", config, strlen(config));
    enum status_code rc = tok_load(&t, dir.path, st);
    ck_assert((t != NULL) == (rc == ST_OK));
    tok_free(t);
    temp_dir_remove(&dir);
    return rc;
}

START_TEST(missing_empty_and_truncated_files)
{
    struct tokenizer *t = NULL;
    struct status st = STATUS_INIT;
    struct temp_dir dir = temp_dir_make();
    ck_assert_int_eq(tok_load(&t, dir.path, &st), ST_NOT_FOUND);
    ck_assert_ptr_nonnull(strstr(st.message, "tokenizer.json: No such file"));
    temp_dir_remove(&dir);
    ck_assert_int_eq(tok_load(&t, "/nonexistent/folder", &st), ST_NOT_FOUND);
    ck_assert_int_eq(load_bytes("", 0, NULL, &st), ST_DATA_LOSS);
    ck_assert_ptr_nonnull(strstr(st.message, "the file is empty"));
    ck_assert_int_eq(load_bytes(TINY, strlen(TINY), NULL, &st), ST_OK);
    for (size_t n = 1; n < strlen(TINY); n++) {
        ck_assert_int_eq(load_bytes(TINY, n, NULL, &st), ST_DATA_LOSS);
        ck_assert_ptr_nonnull(strstr(st.message, "tokenizer.json: line 1"));
    }
    ck_assert_int_eq(load_bytes("[1]", 3, NULL, &st), ST_DATA_LOSS);
    ck_assert_int_eq(load_bytes("{\"a\":1,\"a\":2}", 13, NULL, &st), ST_DATA_LOSS); /* one key twice */
    ck_assert_int_eq(load_bytes("{\"a\":\"\xFF\"}", 9, NULL, &st), ST_DATA_LOSS);
    char deep[8192];
    memset(deep, '[', sizeof deep);
    ck_assert_int_eq(load_bytes(deep, sizeof deep, NULL, &st), ST_DATA_LOSS);
}
END_TEST

START_TEST(the_config_must_mean_the_same_tokens)
{
    struct status st = STATUS_INIT;
    size_t n = strlen(TINY);
    ck_assert_int_eq(load_bytes(TINY, n, "{\"model_max_length\":1000000000000000019884624838656}", &st), ST_OK);
    ck_assert_int_eq(load_bytes(TINY, n, "{\"added_tokens_decoder\":{\"2\":{\"content\":\"ab\"}}}", &st), ST_OK);
    ck_assert_int_eq(load_bytes(TINY, n, "{\"added_tokens_decoder\":{\"1\":{\"content\":\"ab\"}}}", &st), ST_DATA_LOSS);
    ck_assert_ptr_nonnull(strstr(st.message, "tokenizer_config.json: added_tokens_decoder['1']: 'ab' has id 2"));
    ck_assert_int_eq(load_bytes(TINY, n, "{\"added_tokens_decoder\":{\"9\":{\"content\":\"zz\"}}}", &st), ST_DATA_LOSS);
    ck_assert_int_eq(load_bytes(TINY, n, "{\"added_tokens_decoder\":{\"x\":{\"content\":\"ab\"}}}", &st), ST_DATA_LOSS);
    ck_assert_int_eq(load_bytes(TINY, n, "{\"added_tokens_decoder\":[]}", &st), ST_DATA_LOSS);
    ck_assert_int_eq(load_bytes(TINY, n, "{", &st), ST_DATA_LOSS);
}
END_TEST

START_TEST(holes_in_the_vocabulary_stay_holes)
{
    json_t *root = parse_json(TINY);
    put_member(root, "model.vocab", "{\"a\":5,\"b\":9,\"ab\":1000}");
    struct tokenizer *t = create(root);
    struct status st = STATUS_INIT;
    uint32_t hole = 6, *ids;
    char *text;
    size_t len, n;
    ck_assert_uint_eq(tok_vocab_size(t), 1001);
    ck_assert_int_eq(tok_decode(t, &hole, 1, 0, &text, &len, &st), ST_OUT_OF_RANGE);
    ck_assert(tok_encode(t, "abb", 3, 0, &ids, &n, &st) == ST_OK && n == 2 && ids[0] == 1000 && ids[1] == 9);
    free(ids);
    tok_free(t);
    json_decref(root);
}
END_TEST

START_TEST(an_unknown_token_that_is_missing_is_an_error_when_needed)
{
    json_t *root = parse_json(TINY);
    put_member(root, "model.unk_token", "\"<unk>\"");
    struct tokenizer *t = create(root);
    struct status st = STATUS_INIT;
    uint32_t *ids;
    size_t n;
    ck_assert(tok_encode(t, "ab", 2, 0, &ids, &n, &st) == ST_OK);
    free(ids);
    ck_assert_int_eq(tok_encode(t, "xab", 3, 0, &ids, &n, &st), ST_FAILED_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(st.message, "unk_token"));
    tok_free(t);
    json_decref(root);
}
END_TEST

/* Characters without a token vanish where nothing stands for unknown ones: what stood around them is merged. */
START_TEST(what_stood_around_a_character_without_a_token_is_merged)
{
    static const char *const models[] = {
        "{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"\u2581\":1,\"\u2581\u2581\":2},\"merges\":[\"\u2581 \u2581\"]}",
        "{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{\"a\":0,\"\u2581\":1,\"\u2581\u2581\":2,\"<0x78>\":3},"
        "\"merges\":[\"\u2581 \u2581\"]}"};
    for (size_t i = 0; i < 2; i++) {
        json_t *root = parse_json(TINY);
        put_member(root, "model", models[i]);
        struct tokenizer *t = create(root);
        struct status st = STATUS_INIT;
        uint32_t *ids;
        size_t n;
        ck_assert(tok_encode(t, "\u2581y\u2581", 7, 0, &ids, &n, &st) == ST_OK && n == 1 && ids[0] == 2);
        free(ids);
        tok_free(t);
        json_decref(root);
    }
}
END_TEST

struct bound {
    const char *path, *value;
    size_t want;
};

#define UNK(fuse) "{\"type\":\"BPE\",\"unk_token\":\"?\",\"fuse_unk\":" fuse ",\"vocab\":" UNK_VOCAB "}"
#define UNK_VOCAB "{\"?\":0,\"??\":1},\"merges\":[\"? ?\"]"
#define LONG_ADDED(strip)                                                                                              \
    "[{\"id\":32000,\"content\":\"<a long one>\",\"single_word\":false," strip                                         \
    ",\"normalized\":false,\"special\":true}]"
#define REPLACE(from, to) "{\"type\":\"Replace\",\"pattern\":{\"String\":\"" from "\"},\"content\":\"" to "\"}"

/* Of llama2's tokenizer, whose longest token is 16 U+2581. */
static const struct bound BOUNDS[] = {
    {NULL, NULL, 48},
    {"added_tokens", LONG_ADDED("\"lstrip\":false,\"rstrip\":false"), 48},
    {"added_tokens", LONG_ADDED("\"lstrip\":true,\"rstrip\":false"), 0},
    {"added_tokens", LONG_ADDED("\"lstrip\":false,\"rstrip\":true"), 0},
    {"normalizer", "null", 48},
    {"normalizer", REPLACE("ab", "cd"), 48},
    {"normalizer", REPLACE("ab", "c"), 0},
    {"normalizer", "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"a\"},\"content\":\"bb\"}", 0},
    {"pre_tokenizer", "{\"type\":\"WhitespaceSplit\"}", 0},
    {"pre_tokenizer", "{\"type\":\"Digits\",\"individual_digits\":true}", 48},
    {"model.byte_fallback", "false", 0}, /* unknown characters are fused */
    {"model", UNK("true"), 0},
    {"model", UNK("false"), 8}, /* "??" may be two characters of four bytes */
    {"model", "{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]}", 0},
};

START_TEST(bytes_of_a_token_are_bounded_or_said_not_to_be)
{
    static const char *const texts[] = {"aaaa", "   a   ", "\xF0\x9F\x91\x8D\xF0\x9F\x91\x8D??\xF0\x9F\x91\x8D",
                                        "abab"};
    const struct bound *b = &BOUNDS[_i];
    json_t *root = read_json(TEST_DATA "/tokenizers/llama2/tokenizer.json");
    if (b->path) {
        put_member(root, "post_processor", "null");
        if (strncmp(b->path, "model", 5) == 0)
            put_member(root, "added_tokens", "[]");
        put_member(root, b->path, b->value);
    }
    struct tokenizer *t = create(root);
    ck_assert_uint_eq(tok_max_token_bytes(t), b->want);
    for (size_t i = 0; b->want && i < sizeof texts / sizeof *texts; i++) {
        struct status st = STATUS_INIT;
        uint32_t *ids;
        size_t n;
        ck_assert(tok_encode(t, texts[i], strlen(texts[i]), 0, &ids, &n, &st) == ST_OK);
        ck_assert_uint_ge(n * b->want, strlen(texts[i]));
        free(ids);
    }
    tok_free(t);
    json_decref(root);
}
END_TEST

START_TEST(bounds_of_the_models)
{
    static const size_t want[N_MODELS] = {17, 9, 48};
    struct tokenizer *t = load(MODELS[_i]);
    ck_assert_uint_eq(tok_max_token_bytes(t), want[_i]);
    tok_free(t);
}
END_TEST

START_TEST(spaces_of_the_prompt_do_not_come_again)
{
    json_t *root = read_json(TEST_DATA "/tokenizers/tinystories512/tokenizer.json");
    put_member(
        root, "decoder",
        "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":\"\xE2\x96\x81\"},"
        "\"content\":\" \"},{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":0,\"stop\":2}]}");
    struct tokenizer *t = create(root);
    struct status st = STATUS_INIT;
    struct tok_stream *s;
    int64_t mark = tok_find(t, "\xE2\x96\x81");
    ck_assert_int_ge(mark, 0);
    uint32_t ids[] = {(uint32_t)mark, (uint32_t)mark};
    ck_assert(tok_stream_create(&s, t, 0, &st) == ST_OK);
    tok_stream_prime(s, ids, 2);
    expect_piece(s, t, "\xE2\x96\x81the", " the");
    tok_stream_free(s);
    tok_free(t);
    json_decref(root);
}
END_TEST

START_TEST(a_regex_that_explodes_ends_with_an_error)
{
    json_t *root = parse_json(TINY);
    put_member(root, "pre_tokenizer", SPLIT("(?:a+)+\\\\d"));
    struct tokenizer *t = create(root);
    struct status st = STATUS_INIT;
    char text[64];
    uint32_t *ids;
    size_t n;
    memset(text, 'a', sizeof text);
    double start = now_s();
    ck_assert_int_eq(tok_encode(t, text, sizeof text, 0, &ids, &n, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "gives up"));
    ck_assert_msg(now_s() - start < 15, "%.1f s", now_s() - start);
    tok_free(t);
    json_decref(root);
}
END_TEST

/* One whole use, with the n-th allocation of ours failing; true when it went through. */
static bool use_with_failure(json_t *root, long n)
{
    struct status st = STATUS_INIT;
    struct tokenizer *t = NULL;
    struct tok_stream *s = NULL;
    uint32_t *ids = NULL;
    size_t n_ids = 0, len;
    char *text = NULL;
    const char *piece;
    static const char input[] = "Once upon a time, <s> the \xF0\x9F\x91\x8D thethethethethethethethethethethethethethe";
    atomic_store(&allocs_left, n);
    enum status_code rc = tok_create(&t, root, &st);
    if (rc == ST_OK)
        rc = tok_encode(t, input, sizeof input - 1, TOK_ADD_SPECIAL, &ids, &n_ids, &st);
    if (rc == ST_OK)
        rc = tok_decode(t, ids, n_ids, TOK_SKIP_SPECIAL, &text, &len, &st);
    if (rc == ST_OK)
        rc = tok_stream_create(&s, t, 0, &st);
    if (rc == ST_OK)
        tok_stream_prime(s, ids, n_ids / 2);
    for (size_t i = n_ids / 2; rc == ST_OK && i < n_ids; i++)
        rc = tok_stream_push(s, ids[i], &piece, &len, &st);
    if (rc == ST_OK)
        rc = tok_stream_flush(s, &piece, &len, &st);
    atomic_store(&allocs_left, -1);
    ck_assert_msg(rc == ST_OK || (rc == ST_RESOURCE_EXHAUSTED && strstr(st.message, "out of memory")), "%ld: %s %s", n,
                  status_name(rc), st.message);
    if (text)
        ck_assert_str_eq(text, "Once upon a time,   the \xF0\x9F\x91\x8D thethethethethethethethethethethethethethe");
    tok_stream_free(s);
    free(text);
    free(ids);
    tok_free(t);
    return rc == ST_OK;
}

START_TEST(every_failing_allocation_is_reported_and_leaks_nothing)
{
    json_t *root = read_json(TEST_DATA "/tokenizers/tinystories512/tokenizer.json");
    long n = 0;
    while (!use_with_failure(root, n))
        ck_assert_int_lt(++n, 10000);
    ck_assert_int_gt(n, 20);
    json_decref(root);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("tokenizer");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_set_timeout(core, 120);
    tcase_set_timeout(limits, 240);
    tcase_set_timeout(faults, 120);
    tcase_add_loop_test(core, models_give_the_library_s_ids_and_texts, 0, N_MODELS);
    tcase_add_loop_test(core, combinations_of_components_give_the_library_s_ids_and_texts, 0, 2);
    tcase_add_loop_test(core, normal_forms_equal_those_of_the_whole_text, 0, 4);
    tcase_add_test(core, tokens_are_found_by_content);
    tcase_add_test(core, what_stood_around_a_character_without_a_token_is_merged);
    tcase_add_test(core, words_of_any_length_merge_like_the_plain_model);
    tcase_add_loop_test(core, stream_pieces_add_up_to_the_decoded_text, 0, N_MODELS);
    tcase_add_test(core, a_run_of_byte_tokens_waits_for_its_end);
    tcase_add_test(core, byte_level_holds_back_at_most_one_character);
    tcase_add_test(core, a_primed_stream_continues_the_prompt);
    tcase_add_test(core, characters_of_the_prompt_do_not_come_again);
    tcase_add_test(core, spaces_of_the_prompt_do_not_come_again);
    tcase_add_test(core, ids_outside_of_the_vocabulary);
    tcase_add_loop_test(limits, a_lone_word_of_a_megabyte_and_other_monsters, 0, N_MODELS);
    tcase_add_test(limits, a_megabyte_of_marks_in_the_worst_order);
    tcase_add_test(core, without_a_vocabulary_there_is_no_text);
    tcase_add_test(limits, texts_that_are_not_utf8_or_too_long);
    tcase_add_loop_test(limits, bytes_of_a_token_are_bounded_or_said_not_to_be, 0, sizeof BOUNDS / sizeof *BOUNDS);
    tcase_add_loop_test(limits, bounds_of_the_models, 0, N_MODELS);
    tcase_add_test(limits, a_long_stream_costs_the_same_per_push);
    tcase_add_test(limits, threads_share_a_tokenizer);
    tcase_add_loop_test(faults, a_wrong_member_is_named, 0, sizeof FAULTS / sizeof *FAULTS);
    tcase_add_test(faults, deeply_nested_sequences_are_refused);
    tcase_add_test(faults, missing_empty_and_truncated_files);
    tcase_add_test(faults, the_config_must_mean_the_same_tokens);
    tcase_add_test(faults, holes_in_the_vocabulary_stay_holes);
    tcase_add_test(faults, an_unknown_token_that_is_missing_is_an_error_when_needed);
    tcase_add_test(faults, a_regex_that_explodes_ends_with_an_error);
    tcase_add_test(faults, every_failing_allocation_is_reported_and_leaks_nothing);
    suite_add_tcase(suite, core);
    suite_add_tcase(suite, limits);
    suite_add_tcase(suite, faults);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
