/* check_tokenizer_gguf.c - the tokenizer of a GGUF file: the files of tests/data, put into metadata as converters do it, give
 * the ids and texts that Hugging Face's library gave for them.
 *
 * The linker sends this program's malloc, calloc and realloc through __wrap_* below, so that the n-th one can fail.
 */
#include <check.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/tokenizer_internal.h"
#include "tests/gguf_build.h"

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);

static long allocs_left = -1; /* -1: never fail */

static bool alloc_fails(void)
{
    if (allocs_left > 0)
        allocs_left--;
    return allocs_left == 0;
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

/* ---- a tokenizer.json as metadata ---- */

enum { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };

static const struct {
    const char *folder, *cases, *pre; /* pre NULL: SentencePiece */
    uint32_t bos;
} models[] = {
    {TEST_DATA "/demo-model", "tokenizer_cases.json", "llama-bpe", 2046},
    {TEST_DATA "/tokenizers/tinystories512", "cases.json", NULL, 1},
    {TEST_DATA "/tokenizers/llama2", "cases.json", NULL, 1},
};
#define N_MODELS 3

static json_t *read_json(const char *folder, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    json_error_t err;
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, &err);
    ck_assert_msg(root != NULL, "%s: %s", path, err.text);
    return root;
}

/* What a merge makes; to be freed. */
static char *joined(const json_t *merge)
{
    char *out = NULL;
    if (json_is_array(merge)) {
        ck_assert_int_ge(asprintf(&out, "%s%s", json_string_value(json_array_get(merge, 0)),
                                  json_string_value(json_array_get(merge, 1))),
                         0);
        return out;
    }
    out = strdup(json_string_value(merge));
    char *gap = strchr(out, ' ');
    memmove(gap, gap + 1, strlen(gap));
    return out;
}

struct vocabulary {
    const char *token[40000];
    uint32_t type[40000];
    float score[40000];
    uint32_t n;
};

static void collect(struct vocabulary *v, const json_t *root, bool scores)
{
    json_t *model = json_object_get(root, "model"), *id, *t, *rank = json_object();
    const json_t *merges = json_object_get(model, "merges"), *added = json_object_get(root, "added_tokens");
    const char *key;
    size_t i;
    json_object_foreach(json_object_get(model, "vocab"), key, id)
    {
        uint32_t at = (uint32_t)json_integer_value(id);
        v->token[at] = key;
        v->type[at] = scores && strlen(key) == 6 && strncmp(key, "<0x", 3) == 0 ? BYTE : NORMAL;
        v->n = at + 1 > v->n ? at + 1 : v->n;
    }
    json_array_foreach(added, i, t)
    {
        uint32_t at = (uint32_t)json_integer_value(json_object_get(t, "id"));
        v->token[at] = json_string_value(json_object_get(t, "content"));
        v->type[at] = strcmp(v->token[at], "<unk>") == 0 ? UNKNOWN : CONTROL;
        v->n = at + 1 > v->n ? at + 1 : v->n;
    }
    json_array_foreach(merges, i, t)
    {
        char *whole = joined(t);
        if (!json_object_get(rank, whole))
            json_object_set_new(rank, whole, json_integer((json_int_t)i));
        free(whole);
    }
    for (uint32_t k = 0; k < v->n; k++) {
        const json_t *r = json_object_get(rank, v->token[k]);
        v->score[k] = r ? -(float)json_integer_value(r) : -1e6f;
    }
    json_decref(rank);
}

static void build_scores(struct build *b, const struct vocabulary *v)
{
    build_array(b, "tokenizer.ggml.scores", GGUF_FLOAT32, v->n);
    for (uint32_t i = 0; i < v->n; i++) {
        uint32_t bits;
        memcpy(&bits, &v->score[i], 4);
        build_number(b, bits, 4);
    }
}

static void build_merges(struct build *b, const json_t *merges)
{
    size_t i;
    json_t *m;
    build_array(b, "tokenizer.ggml.merges", GGUF_STRING, json_array_size(merges));
    json_array_foreach(merges, i, m) build_text(b, json_string_value(m));
}

static struct build convert(int which)
{
    static struct vocabulary v;
    memset(&v, 0, sizeof v);
    json_t *root = read_json(models[which].folder, "tokenizer.json");
    const char *pre = models[which].pre;
    collect(&v, root, !pre);
    struct build b = build_start(3, 0, 6);
    build_string(&b, "tokenizer.ggml.model", pre ? "gpt2" : "llama");
    build_string(&b, "tokenizer.ggml.pre", pre ? pre : "default");
    build_u32(&b, "tokenizer.ggml.bos_token_id", models[which].bos);
    build_array(&b, "tokenizer.ggml.tokens", GGUF_STRING, v.n);
    for (uint32_t i = 0; i < v.n; i++)
        build_text(&b, v.token[i]);
    build_array(&b, "tokenizer.ggml.token_type", GGUF_INT32, v.n);
    for (uint32_t i = 0; i < v.n; i++)
        build_number(&b, v.type[i], 4);
    if (pre)
        build_merges(&b, json_object_get(json_object_get(root, "model"), "merges"));
    else
        build_scores(&b, &v);
    json_decref(root);
    return b;
}

static struct tokenizer *load(struct build *b)
{
    struct gguf *g = NULL;
    struct tokenizer *t = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(gguf_open_memory(&g, b->data, b->bytes, "input", &st) == ST_OK, "%s", st.message);
    ck_assert_msg(tok_gguf_create(&t, g, &st) == ST_OK, "%s", st.message);
    gguf_close(g);
    build_free(b);
    return t;
}

/* ---- core ---- */

static void expect_ids(const struct tokenizer *t, const json_t *text, const json_t *want, unsigned flags, size_t i)
{
    uint32_t *ids = NULL;
    size_t n = 0, bad = 0;
    ck_assert_int_eq(tok_encode(t, json_string_value(text), json_string_length(text), flags, &ids, &n, NULL), ST_OK);
    for (size_t k = 0; k < n && n == json_array_size(want); k++)
        bad += ids[k] != (uint32_t)json_integer_value(json_array_get(want, k));
    if (n != json_array_size(want) || bad)
        ck_abort_msg("case %zu: %zu ids, expected %zu, %zu differ", i, n, json_array_size(want), bad);
    free(ids);
}

static void expect_text(const struct tokenizer *t, const json_t *ids, const json_t *want, size_t i)
{
    size_t n = json_array_size(ids), len = 0;
    uint32_t *list = calloc(n + 1, sizeof *list);
    char *text = NULL;
    for (size_t k = 0; k < n; k++)
        list[k] = (uint32_t)json_integer_value(json_array_get(ids, k));
    ck_assert_int_eq(tok_decode(t, list, n, 0, &text, &len, NULL), ST_OK);
    if (len != json_string_length(want) || memcmp(text, json_string_value(want), len) != 0)
        ck_abort_msg("case %zu: '%s', expected '%s'", i, text, json_string_value(want));
    free(text);
    free(list);
}

START_TEST(metadata_give_the_library_s_ids_and_texts)
{
    struct build b = convert(_i);
    struct tokenizer *t = load(&b);
    json_t *root = read_json(models[_i].folder, models[_i].cases), *c;
    size_t i;
    json_array_foreach(json_object_get(root, "cases"), i, c)
    {
        const json_t *text = json_object_get(c, "text"), *ids = json_object_get(c, "ids");
        const json_t *with = json_object_get(c, "ids_add_special"), *decoded = json_object_get(c, "decoded");
        expect_ids(t, text, ids, 0, i);
        if (with)
            expect_ids(t, text, with, TOK_ADD_SPECIAL, i);
        if (decoded && !json_object_get(c, "mixed"))
            expect_text(t, ids, decoded, i);
    }
    ck_assert_uint_ge(i, 150);
    json_decref(root);
    tok_free(t);
}
END_TEST

/* A vocabulary of letters, for what the data have none of. */
static struct build letters(uint64_t more)
{
    static const char *const tokens[] = {"a", "b", "c", "ab", "abc", "<s>", "<user>", "[PAD7]"};
    static const uint32_t types[] = {NORMAL, NORMAL, NORMAL, NORMAL, NORMAL, CONTROL, USER_DEFINED, UNUSED};
    struct build b = build_start(3, 0, 4 + more);
    build_string(&b, "tokenizer.ggml.model", "gpt2");
    build_array(&b, "tokenizer.ggml.tokens", GGUF_STRING, 8);
    for (int i = 0; i < 8; i++)
        build_text(&b, tokens[i]);
    build_array(&b, "tokenizer.ggml.token_type", GGUF_INT32, 8);
    for (int i = 0; i < 8; i++)
        build_number(&b, types[i], 4);
    build_array(&b, "tokenizer.ggml.merges", GGUF_STRING, 2);
    build_text(&b, "a b");
    build_text(&b, "ab c");
    return b;
}

START_TEST(each_kind_of_token_has_its_meaning)
{
    static const char *const names[] = {"qwen2", "smollm", "gpt-2"};
    struct build b = letters(4);
    build_string(&b, "tokenizer.ggml.pre", names[_i]);
    build_u32(&b, "tokenizer.ggml.bos_token_id", 5);
    build_bool(&b, "tokenizer.ggml.add_bos_token", _i == 0);
    build_bool(&b, "tokenizer.ggml.add_eos_token", 0);
    struct tokenizer *t = load(&b);
    uint32_t *ids;
    size_t n;
    ck_assert_int_eq(tok_encode(t, "abcab<user>c", 12, TOK_ADD_SPECIAL, &ids, &n, NULL), ST_OK);
    static const uint32_t expected[] = {5, 4, 3, 6, 2};
    size_t skip = _i != 0;
    ck_assert_uint_eq(n, 5 - skip);
    for (size_t i = 0; i < n; i++)
        ck_assert_uint_eq(ids[i], expected[i + skip]);
    ck_assert(tok_is_special(t, 5) && !tok_is_special(t, 6));
    ck_assert_int_eq(tok_find(t, "[PAD7]"), -1);
    free(ids);
    tok_free(t);
}
END_TEST

START_TEST(a_tokenizer_json_inside_goes_first)
{
    struct build b = build_start(3, 0, 2);
    build_string(&b, "tokenizer.ggml.model", "bert");
    build_string(&b, "tokenizer.huggingface.json",
                 "{\"version\":\"1.0\",\"model\":{\"type\":\"BPE\",\"vocab\":{\"x\":0,\"y\":1,\"xy\":2},"
                 "\"merges\":[\"x y\"]}}");
    struct tokenizer *t = load(&b);
    ck_assert_int_eq(tok_find(t, "xy"), 2);
    tok_free(t);
}
END_TEST

/* ---- faults ---- */

static void refuse(struct build *b, enum status_code code, const char *says)
{
    struct gguf *g = NULL;
    struct tokenizer *t = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(gguf_open_memory(&g, b->data, b->bytes, "input", &st) == ST_OK, "%s", st.message);
    enum status_code rc = tok_gguf_create(&t, g, &st);
    ck_assert_msg(rc == code && strstr(st.message, says) && strncmp(st.message, "input: ", 7) == 0 &&
                      !strstr(st.message, "input: input: "),
                  "%s, \"%s\"; expected %s, \"%s\"", status_name(rc), st.message, status_name(code), says);
    ck_assert_ptr_null(t);
    gguf_close(g);
    build_free(b);
}

/* Tokens "a", "b" of these types, of SentencePiece with these scores. */
static struct build two(const char *first, const char *second, uint32_t type, uint64_t scores, uint64_t more)
{
    struct build b = build_start(3, 0, 4 + more);
    build_string(&b, "tokenizer.ggml.model", "llama");
    build_array(&b, "tokenizer.ggml.tokens", GGUF_STRING, 2);
    build_text(&b, first);
    build_text(&b, second);
    build_array(&b, "tokenizer.ggml.token_type", GGUF_INT32, 2);
    build_number(&b, type, 4);
    build_number(&b, NORMAL, 4);
    build_array(&b, "tokenizer.ggml.scores", GGUF_FLOAT32, scores);
    for (uint64_t i = 0; i < scores; i++)
        build_number(&b, i == 7 ? 0x7FC00000 : 0, 4);
    return b;
}

START_TEST(what_is_not_known_is_named)
{
    struct build b = build_start(3, 0, 0);
    refuse(&b, ST_INVALID_ARGUMENT, "tokenizer.ggml.model is missing");
    b = build_start(3, 0, 1);
    build_string(&b, "tokenizer.ggml.model", "t5");
    refuse(&b, ST_UNIMPLEMENTED, "tokenizer.ggml.model: 't5' is not supported");
    b = letters(0);
    refuse(&b, ST_INVALID_ARGUMENT, "tokenizer.ggml.pre is missing");
    b = letters(1);
    build_string(&b, "tokenizer.ggml.pre", "falcon");
    refuse(&b, ST_UNIMPLEMENTED, "tokenizer.ggml.pre: 'falcon' is not supported");
    b = two("a", "b", NORMAL, 2, 1);
    build_array(&b, "tokenizer.ggml.precompiled_charsmap", GGUF_UINT8, 0);
    refuse(&b, ST_UNIMPLEMENTED, "precompiled_charsmap");
    b = two("a", "b", NORMAL, 2, 1);
    build_bool(&b, "tokenizer.ggml.remove_extra_whitespaces", 1);
    refuse(&b, ST_UNIMPLEMENTED, "remove_extra_whitespaces");
}
END_TEST

START_TEST(damage_is_named)
{
    struct build b = two("a", "b", 9, 2, 0);
    refuse(&b, ST_DATA_LOSS, "token_type[0]: 9, expected 1 to 6");
    b = two("a", "a", NORMAL, 2, 0);
    refuse(&b, ST_DATA_LOSS, "tokens[1]: 'a' is there twice");
    b = two("\xff", "a", NORMAL, 2, 0);
    refuse(&b, ST_DATA_LOSS, "tokens[0]: expected UTF-8");
    b = two("a", "b", NORMAL, 3, 0);
    refuse(&b, ST_DATA_LOSS, "scores: 3, expected one for each of 2 tokens");
    b = two("a", "b", NORMAL, 2, 1);
    build_u32(&b, "tokenizer.ggml.bos_token_id", 2);
    refuse(&b, ST_INVALID_ARGUMENT, "tokenizer.ggml.bos_token_id: 2, expected 0 to 1");
    b = two("a", "b", UNUSED, 2, 1);
    build_u32(&b, "tokenizer.ggml.bos_token_id", 0);
    refuse(&b, ST_DATA_LOSS, "tokenizer.ggml.bos_token_id: 0 is an unused token");
    b = build_start(3, 0, 2);
    build_string(&b, "tokenizer.ggml.model", "llama");
    build_array(&b, "tokenizer.ggml.tokens", GGUF_STRING, 0);
    refuse(&b, ST_DATA_LOSS, "tokens: 0, expected 1 to");
    b = build_start(3, 0, 1);
    build_string(&b, "tokenizer.huggingface.json", "[1]");
    refuse(&b, ST_DATA_LOSS, "tokenizer.huggingface.json: not a JSON object");
}
END_TEST

START_TEST(every_failing_allocation_is_reported)
{
    for (long k = 1, whole = 0; whole < 2; k++) { /* until both are loaded */
        struct build b = k % 2 ? two("a", "b", NORMAL, 2, 0) : letters(1);
        if (k % 2 == 0)
            build_string(&b, "tokenizer.ggml.pre", "gpt-2");
        struct gguf *g = NULL;
        struct tokenizer *t = NULL;
        struct status st = STATUS_INIT;
        allocs_left = k / 2 + 1;
        enum status_code rc = gguf_open_memory(&g, b.data, b.bytes, "input", &st);
        if (rc == ST_OK)
            rc = tok_gguf_create(&t, g, &st);
        bool reached = allocs_left == 0;
        allocs_left = -1;
        ck_assert_msg(rc == ST_OK || rc == ST_RESOURCE_EXHAUSTED, "%ld: %s: %s", k, status_name(rc), st.message);
        ck_assert_msg(reached == (rc != ST_OK), "%ld: %s", k, status_name(rc));
        tok_free(t);
        gguf_close(g);
        build_free(&b);
        whole = rc == ST_OK ? whole + 1 : 0;
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("tokenizer_gguf");
    TCase *core = tcase_create("core"), *faults = tcase_create("faults");
    tcase_set_timeout(core, 60);
    tcase_add_loop_test(core, metadata_give_the_library_s_ids_and_texts, 0, N_MODELS);
    tcase_add_loop_test(core, each_kind_of_token_has_its_meaning, 0, 3);
    tcase_add_test(core, a_tokenizer_json_inside_goes_first);
    tcase_add_test(faults, what_is_not_known_is_named);
    tcase_add_test(faults, damage_is_named);
    tcase_add_test(faults, every_failing_allocation_is_reported);
    suite_add_tcase(s, core);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
