/* check_gguf.c - proto/gguf.h and the configuration that a GGUF file gives: what a good file says, and what is said about
 * each kind of damage. Weights are compared in tests/reference.py. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/gguf_build.h"
#include "tests/temp_dir.h"
#include "worker/model_config.h"
#include "worker/model_source.h"

static const uint64_t shape_4x2[] = {4, 2};
static const uint64_t shape_embed[] = {64, 4};

static struct gguf *open_ok(const struct build *b)
{
    struct gguf *g = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(gguf_open_memory(&g, b->data, b->bytes, "input", &st) == ST_OK, "%s", st.message);
    return g;
}

/* Frees the file. */
static void refuse(struct build *b, enum status_code code, const char *says)
{
    struct gguf *g = NULL;
    struct status st = STATUS_INIT;
    enum status_code rc = gguf_open_memory(&g, b->data, b->bytes, "input", &st);
    ck_assert_msg(rc == code && strstr(st.message, says), "%s, \"%s\"; expected %s, \"%s\"", status_name(rc),
                  st.message, status_name(code), says);
    ck_assert_ptr_null(g);
    build_free(b);
}

/* ---- core ---- */

static void all_kinds(struct build *b)
{
    static const struct {
        const char *key;
        uint32_t kind, bytes;
        uint64_t bits;
    } numbers[] = {
        {"u8", GGUF_UINT8, 1, 200},         {"i8", GGUF_INT8, 1, 0xff},
        {"u16", GGUF_UINT16, 2, 60000},     {"i16", GGUF_INT16, 2, 0x8000},
        {"i32", GGUF_INT32, 4, 0xfffffffb}, {"u64", GGUF_UINT64, 8, 1ull << 63},
        {"i64", GGUF_INT64, 8, 1ull << 63}, {"f64", GGUF_FLOAT64, 8, 0x3ff8000000000000},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        build_key(b, numbers[i].key, numbers[i].kind);
        build_number(b, numbers[i].bits, numbers[i].bytes);
    }
    build_u32(b, "u32", 77);
    build_f32(b, "f32", -0.25f);
    build_bool(b, "yes", 1);
    build_string(b, "text", "two words");
    build_array(b, "strings", GGUF_STRING, 3);
    build_text(b, "a");
    build_text(b, "");
    build_text(b, "ccc");
    build_array(b, "ints", GGUF_INT32, 2);
    build_number(b, 5, 4);
    build_number(b, 0xffffffff, 4);
    build_array(b, "floats", GGUF_FLOAT32, 1);
    build_number(b, 0x3fc00000, 4);
}
#define ALL_KINDS 15

START_TEST(values_of_every_kind_are_read)
{
    struct build b = build_start(2, 0, ALL_KINDS);
    all_kinds(&b);
    struct gguf *g = open_ok(&b);
    static const struct {
        const char *key;
        double value;
    } numbers[] = {{"u8", 200}, {"i8", -1},      {"u16", 60000},   {"i16", -32768}, {"u32", 77},
                   {"i32", -5}, {"u64", 0x1p63}, {"i64", -0x1p63}, {"f32", -0.25},  {"f64", 1.5}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        double x = 0;
        ck_assert_int_eq(gguf_read_double(g, numbers[i].key, -1e30, 1e30, &x, NULL), ST_OK);
        ck_assert_double_eq(x, numbers[i].value);
    }
    uint32_t n = 0;
    bool yes = false;
    struct gguf_string s = {0};
    ck_assert_int_eq(gguf_read_uint(g, "u16", 0, 65535, &n, NULL), ST_OK);
    ck_assert_uint_eq(n, 60000);
    ck_assert_int_eq(gguf_read_uint(g, "absent", 1, 2, &n, NULL), ST_OK);
    ck_assert_uint_eq(n, 60000);
    ck_assert_int_eq(gguf_read_bool(g, "yes", &yes, NULL), ST_OK);
    ck_assert(yes);
    ck_assert_int_eq(gguf_read_string(g, "text", &s, NULL), ST_OK);
    ck_assert(gguf_string_is(s, "two words") && !gguf_string_is(s, "two") && !gguf_string_is(s, "two words "));
    gguf_close(g);
    build_free(&b);
}
END_TEST

START_TEST(arrays_are_read_in_order)
{
    struct build b = build_start(3, 0, ALL_KINDS);
    all_kinds(&b);
    struct gguf *g = open_ok(&b);
    struct gguf_array a = {0};
    static const char *const expected[] = {"a", "", "ccc"};
    ck_assert_int_eq(gguf_read_array(g, "strings", GGUF_STRING, &a, NULL), ST_OK);
    ck_assert_uint_eq(a.count, 3);
    for (int i = 0; i < 3; i++)
        ck_assert(gguf_string_is(gguf_next_string(&a), expected[i]));
    ck_assert_uint_eq(a.count, 0);
    ck_assert_int_eq(gguf_read_array(g, "ints", GGUF_INT32, &a, NULL), ST_OK);
    ck_assert_int_eq(gguf_int32_at(&a, 0), 5);
    ck_assert_int_eq(gguf_int32_at(&a, 1), -1);
    ck_assert_int_eq(gguf_read_array(g, "floats", GGUF_FLOAT32, &a, NULL), ST_OK);
    ck_assert_float_eq(gguf_float32_at(&a, 0), 1.5f);
    gguf_close(g);
    build_free(&b);
}
END_TEST

START_TEST(tensors_lie_where_the_file_says)
{
    for (uint32_t alignment = 8; alignment <= 64; alignment *= 2) {
        struct build b = build_start(3, 3, 1);
        build_u32(&b, "general.alignment", alignment);
        build_tensor(&b, "z", 1, (uint64_t[]){256}, GGUF_Q6_K, 64);
        build_tensor(&b, "a", 2, shape_4x2, GGUF_F32, 0);
        build_tensor(&b, "strange", 4, (uint64_t[]){1, 2, 3, 4}, 99, 320);
        size_t header = b.bytes;
        build_data(&b, alignment, 330);
        size_t start = (header + alignment - 1) / alignment * alignment;
        struct gguf *g = open_ok(&b);
        ck_assert_uint_eq(gguf_tensors(g), 3);
        ck_assert_str_eq(gguf_tensor_at(g, 0)->name, "a");
        const struct gguf_tensor *t = gguf_tensor_find(g, "z");
        ck_assert_uint_eq(t->offset, start + 64);
        ck_assert_uint_eq(t->bytes, 210);
        t = gguf_tensor_find(g, "a");
        ck_assert_uint_eq(t->bytes, 32);
        ck_assert_uint_eq(t->shape[0], 4);
        ck_assert_uint_eq(gguf_tensor_find(g, "strange")->bytes, 0);
        ck_assert_ptr_null(gguf_tensor_find(g, "b"));
        gguf_close(g);
        build_free(&b);
    }
}
END_TEST

/* Longer than what is read at a time, so that the header moves while it is read. */
START_TEST(long_header_of_a_file_is_read)
{
    struct temp_dir d = temp_dir_make();
    struct build b = build_start(3, 0, 2);
    build_array(&b, "words", GGUF_STRING, 50000);
    for (int i = 0; i < 50000; i++)
        build_text(&b, i % 3 ? "word" : "another");
    build_u32(&b, "last", 9);
    temp_dir_write(&d, "long.gguf", b.data, b.bytes);
    char path[300];
    snprintf(path, sizeof path, "%s/long.gguf", d.path);
    ck_assert(gguf_is_file(path) && !gguf_is_file(d.path));
    struct gguf *g;
    struct gguf_array a = {0};
    uint32_t last = 0;
    ck_assert_int_eq(gguf_open(&g, path, NULL), ST_OK);
    ck_assert_int_eq(gguf_read_array(g, "words", GGUF_STRING, &a, NULL), ST_OK);
    ck_assert_uint_eq(a.count, 50000);
    for (int i = 0; i < 50000; i++)
        if (!gguf_string_is(gguf_next_string(&a), i % 3 ? "word" : "another"))
            ck_abort_msg("string %d", i);
    ck_assert_int_eq(gguf_read_uint(g, "last", 0, 9, &last, NULL), ST_OK);
    ck_assert_uint_eq(last, 9);
    gguf_close(g);
    build_free(&b);
    temp_dir_remove(&d);
}
END_TEST

START_TEST(names_of_tensors_are_translated)
{
    static const char *const pairs[][2] = {
        {"model.embed_tokens.weight", "token_embd.weight"},
        {"lm_head.weight", "output.weight"},
        {"model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"},
        {"model.layers.17.self_attn.o_proj.bias", "blk.17.attn_output.bias"},
        {"model.layers.4.self_attn.q_norm.weight", "blk.4.attn_q_norm.weight"},
        {"model.layers.4.mlp.down_proj.weight", "blk.4.ffn_down.weight"},
        {"rope_freqs.weight", "rope_freqs.weight"},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        char out[64];
        model_source_gguf_name(out, sizeof out, pairs[i][0]);
        ck_assert_str_eq(out, pairs[i][1]);
    }
}
END_TEST

/* ---- the configuration ---- */

static enum status_code configure(struct model_config *m, struct build *b, struct status *st)
{
    struct gguf *g = open_ok(b);
    enum status_code rc = model_config_from_gguf(m, g, st);
    gguf_close(g);
    build_free(b);
    return rc;
}

/* A model with `more` values to come after its own. */
static struct build model(const char *arch, uint64_t more)
{
    struct build b = build_start(3, 1, BUILD_MODEL_VALUES + more);
    build_model(&b, arch);
    return b;
}

static void finish(struct build *b)
{
    build_tensor(b, "token_embd.weight", 2, shape_embed, GGUF_F16, 0);
    build_data(b, 32, 512);
}

START_TEST(architectures_are_those_of_hugging_face)
{
    static const char *const known[][2] = {
        {"llama", "LlamaForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"}, {"qwen3", "Qwen3ForCausalLM"}};
    for (size_t i = 0; i < 3; i++) {
        struct build b = model(known[i][0], 0);
        finish(&b);
        struct model_config m;
        struct status st = STATUS_INIT;
        ck_assert_msg(configure(&m, &b, &st) == ST_OK, "%s", st.message);
        ck_assert_str_eq(m.architecture, known[i][1]);
        ck_assert_uint_eq(m.hidden, 64);
        ck_assert_uint_eq(m.inner, 96);
        ck_assert_uint_eq(m.heads, 2);
        ck_assert_uint_eq(m.kv_heads, 1);
        ck_assert_uint_eq(m.head_dim, 32);
        ck_assert_uint_eq(m.vocab_size, 4);
        ck_assert_uint_eq(m.max_context, 128);
        ck_assert_float_eq(m.norm_eps, 1e-5f);
        ck_assert(m.tied && !m.qkv_bias && !m.o_bias && !m.mlp_bias && m.qk_norm == (i == 2));
        ck_assert_int_eq(m.bos_id, -1);
        ck_assert_uint_eq(m.n_eos, 0);
        ck_assert_float_eq(m.temperature, 1.0f);
    }
}
END_TEST

START_TEST(what_the_metadata_add_is_read)
{
    struct build b = model("llama", 8);
    build_u32(&b, "tokenizer.ggml.bos_token_id", 1);
    build_u32(&b, "tokenizer.ggml.eos_token_id", 2);
    build_u32(&b, "tokenizer.ggml.eot_token_id", 3);
    build_u32(&b, "tokenizer.ggml.eom_token_id", 2);
    build_u32(&b, "llama.attention.sliding_window", 7);
    build_string(&b, "llama.rope.scaling.type", "yarn");
    build_f32(&b, "llama.rope.scaling.factor", 4.0f);
    build_f32(&b, "general.sampling.temp", 0.5f);
    finish(&b);
    struct model_config m;
    struct status st = STATUS_INIT;
    ck_assert_msg(configure(&m, &b, &st) == ST_OK, "%s", st.message);
    ck_assert_int_eq(m.bos_id, 1);
    ck_assert_uint_eq(m.n_eos, 2);
    ck_assert_uint_eq(m.eos_ids[1], 3);
    ck_assert_uint_eq(model_window(&m, 0), 7);
    ck_assert_int_eq(m.rope.scaling, ROPE_YARN);
    ck_assert_double_eq_tol(m.rope.attention_factor, 1.138629436, 1e-8);
    ck_assert_uint_eq(m.max_context, 512);
    ck_assert_float_eq(m.temperature, 0.5f);
}
END_TEST

static struct model_config sampling_of(const float *temp, const uint32_t *top_k, const float *penalty, uint32_t last)
{
    struct build b = model("llama", (temp != NULL) + (top_k != NULL) + (penalty ? 2 : 0) + 2);
    if (temp)
        build_f32(&b, "general.sampling.temp", *temp);
    if (top_k) {
        build_key(&b, "general.sampling.top_k", GGUF_INT32);
        build_number(&b, *top_k, 4);
    }
    if (penalty) {
        build_f32(&b, "general.sampling.penalty_repeat", *penalty);
        build_u32(&b, "general.sampling.penalty_last_n", last);
    }
    build_f32(&b, "general.sampling.top_p", 0.9f);
    build_f32(&b, "general.sampling.min_p", 0.05f);
    finish(&b);
    struct model_config m;
    struct status st = STATUS_INIT;
    ck_assert_msg(configure(&m, &b, &st) == ST_OK, "%s", st.message);
    return m;
}

START_TEST(sampling_defaults_are_those_of_the_metadata)
{
    struct model_config m = sampling_of(&(float){0.7f}, &(uint32_t){20}, &(float){1.05f}, 64);
    ck_assert_float_eq(m.temperature, 0.7f);
    ck_assert_uint_eq(m.top_k, 20);
    ck_assert_float_eq(m.top_p, 0.9f);
    ck_assert_float_eq(m.min_p, 0.05f);
    ck_assert_float_eq(m.repetition_penalty, 1.05f);
    m = sampling_of(&(float){-1.0f}, &(uint32_t){UINT32_MAX}, &(float){1.05f}, 0); /* greedy, all, over no token */
    ck_assert_float_eq(m.temperature, 0.0f);
    ck_assert_uint_eq(m.top_k, 0);
    ck_assert_float_eq(m.repetition_penalty, 1.0f);
    m = sampling_of(NULL, NULL, NULL, 0);
    ck_assert_float_eq(m.temperature, 1.0f);
    ck_assert_uint_eq(m.top_k, 0);
    ck_assert_float_eq(m.repetition_penalty, 1.0f);
}
END_TEST

static void add_wrong_min_p(struct build *b)
{
    build_f32(b, "general.sampling.min_p", 1.5f);
}
static void add_expert_count(struct build *b)
{
    build_u32(b, "llama.expert_count", 8);
}
static void add_longrope(struct build *b)
{
    build_string(b, "llama.rope.scaling.type", "longrope");
}
static void add_half_rope(struct build *b)
{
    build_u32(b, "llama.rope.dimension_count", 16);
}
static void add_other_values(struct build *b)
{
    build_u32(b, "llama.attention.value_length", 16);
}
static void add_logit_scale(struct build *b)
{
    build_f32(b, "llama.logit_scale", 0.5f);
}
static void add_not_causal(struct build *b)
{
    build_bool(b, "llama.attention.causal", 0);
}
static void add_old_quants(struct build *b)
{
    build_u32(b, "general.quantization_version", 1);
}
static void add_text_number(struct build *b)
{
    build_string(b, "llama.attention.sliding_window", "4096");
}
static void add_array_number(struct build *b)
{
    build_array(b, "llama.attention.sliding_window", GGUF_INT32, 0);
}
static void add_wrong_eos(struct build *b)
{
    build_u32(b, "tokenizer.ggml.eos_token_id", 4);
}
static void add_wrong_dim(struct build *b)
{
    build_u32(b, "llama.attention.key_length", 12);
}
static void add_factor(struct build *b)
{
    build_f32(b, "llama.rope.scaling.factor", 0.0f);
}
static void add_sections(struct build *b)
{
    build_array(b, "llama.rope.dimension_sections", GGUF_INT32, 0);
}

static const struct {
    void (*add)(struct build *b);
    enum status_code code;
    const char *says;
} not_computed[] = {
    {add_expert_count, ST_UNIMPLEMENTED, "llama.expert_count"},
    {add_longrope, ST_UNIMPLEMENTED, "llama.rope.scaling.type: longrope"},
    {add_half_rope, ST_UNIMPLEMENTED, "llama.rope.dimension_count"},
    {add_other_values, ST_UNIMPLEMENTED, "llama.attention.value_length"},
    {add_logit_scale, ST_UNIMPLEMENTED, "llama.logit_scale"},
    {add_not_causal, ST_UNIMPLEMENTED, "llama.attention.causal"},
    {add_old_quants, ST_UNIMPLEMENTED, "general.quantization_version"},
    {add_text_number, ST_INVALID_ARGUMENT, "llama.attention.sliding_window: string, expected an integer"},
    {add_array_number, ST_INVALID_ARGUMENT, "llama.attention.sliding_window: an array of i32"},
    {add_wrong_eos, ST_INVALID_ARGUMENT, "tokenizer.ggml.eos_token_id: 4, expected 0 to 3"},
    {add_wrong_min_p, ST_INVALID_ARGUMENT, "general.sampling.min_p: 1.5, expected 0 to 1"},
    {add_wrong_dim, ST_UNIMPLEMENTED, "head_dim: 12"},
    {add_factor, ST_INVALID_ARGUMENT, "llama.rope.scaling.factor: 0, expected 1 to"},
    {add_sections, ST_UNIMPLEMENTED, "llama.rope.dimension_sections"},
};

START_TEST(what_is_not_computed_is_refused_by_name)
{
    struct build b = model("llama", 1);
    not_computed[_i].add(&b);
    finish(&b);
    struct model_config m;
    struct status st = STATUS_INIT;
    enum status_code rc = configure(&m, &b, &st);
    ck_assert_msg(rc == not_computed[_i].code && strstr(st.message, not_computed[_i].says), "%s: %s; expected \"%s\"",
                  status_name(rc), st.message, not_computed[_i].says);
}
END_TEST

START_TEST(other_architectures_are_refused_by_name)
{
    struct build b = model("gemma3", 0);
    finish(&b);
    struct model_config m;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(configure(&m, &b, &st), ST_UNIMPLEMENTED);
    ck_assert_ptr_nonnull(strstr(st.message, "general.architecture: gemma3"));
    b = build_start(3, 0, 1);
    build_u32(&b, "general.architecture", 1);
    ck_assert_int_eq(configure(&m, &b, &st), ST_INVALID_ARGUMENT);
    b = build_start(3, 0, 1);
    build_string(&b, "general.architecture", "llama");
    ck_assert_int_eq(configure(&m, &b, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "llama.embedding_length is missing"));
}
END_TEST

/* ---- faults ---- */

static void one_tensor(uint32_t type, uint64_t cols, uint64_t rows, uint64_t offset, size_t data, enum status_code code,
                       const char *says)
{
    struct build b = build_start(3, 1, 0);
    build_tensor(&b, "t", 2, (uint64_t[]){cols, rows}, type, offset);
    build_data(&b, 32, data);
    refuse(&b, code, says);
}

START_TEST(tensors_that_do_not_fit_are_refused)
{
    one_tensor(GGUF_F32, 4, 2, 0, 31, ST_DATA_LOSS, "t lies beyond the end");
    one_tensor(GGUF_F32, 4, 2, 32, 63, ST_DATA_LOSS, "t lies beyond the end");
    one_tensor(GGUF_F32, 4, 2, 16, 64, ST_DATA_LOSS, "no multiple of 32");
    one_tensor(GGUF_F32, 4, 2, UINT64_MAX - 31, 64, ST_DATA_LOSS, "t lies beyond the end");
    one_tensor(GGUF_F32, 0, 2, 0, 64, ST_DATA_LOSS, "a size of 0");
    one_tensor(GGUF_F32, 1ull << 62, 4, 0, 64, ST_DATA_LOSS, "too many elements");
    one_tensor(GGUF_F32, 1ull << 40, 1, 0, 64, ST_DATA_LOSS, "larger than the file");
    one_tensor(GGUF_Q4_0, 33, 1, 0, 64, ST_DATA_LOSS, "no whole blocks of Q4_0");
    one_tensor(GGUF_Q4_K, 128, 2, 0, 200, ST_DATA_LOSS, "no whole blocks of Q4_K");
    one_tensor(99, 4, 2, 1024, 64, ST_DATA_LOSS, "t lies beyond the end");
    struct build b = build_start(3, 2, 0);
    build_tensor(&b, "a", 2, shape_4x2, GGUF_F32, 0);
    build_tensor(&b, "b", 2, shape_4x2, GGUF_F32, 0);
    build_data(&b, 32, 64);
    refuse(&b, ST_DATA_LOSS, "overlaps");
    b = build_start(3, 2, 0);
    build_tensor(&b, "a", 2, shape_4x2, GGUF_F32, 0);
    build_tensor(&b, "a", 2, shape_4x2, GGUF_F32, 32);
    build_data(&b, 32, 64);
    refuse(&b, ST_DATA_LOSS, "tensor a: there twice");
    for (uint32_t dims = 0; dims <= 5; dims += 5) {
        b = build_start(3, 1, 0);
        build_tensor(&b, "t", dims, (uint64_t[]){1, 1, 1, 1, 1}, GGUF_F32, 0);
        build_data(&b, 32, 64);
        refuse(&b, ST_DATA_LOSS, "dimensions, expected 1 to 4");
    }
}
END_TEST

START_TEST(damaged_headers_are_refused)
{
    struct build b = build_start(1, 0, 0);
    refuse(&b, ST_UNIMPLEMENTED, "GGUF version 1");
    b = build_start(3u << 24, 0, 0);
    refuse(&b, ST_UNIMPLEMENTED, "big-endian");
    b = build_start(3, 0, 0);
    b.data[0] = 'g';
    refuse(&b, ST_DATA_LOSS, "does not begin with");
    b = (struct build){0};
    build_raw(&b, "GGU", 3);
    refuse(&b, ST_DATA_LOSS, "does not begin with");
    b = build_start(3, UINT64_MAX, 0);
    refuse(&b, ST_DATA_LOSS, "more tensors or values than the file has room for");
    b = build_start(3, 0, 1ull << 40);
    refuse(&b, ST_DATA_LOSS, "more tensors or values");
    b = build_start(3, 0, 1);
    build_number(&b, UINT64_MAX, 8);
    build_number(&b, 0, 8);
    refuse(&b, ST_DATA_LOSS, "a name that is empty or too long");
    b = build_start(3, 0, 1);
    build_u32(&b, "", 1);
    refuse(&b, ST_DATA_LOSS, "a name that is empty");
    b = build_start(3, 0, 1);
    build_key(&b, "k", 13);
    build_number(&b, 0, 8);
    refuse(&b, ST_DATA_LOSS, "a kind of value that is none");
    b = build_start(3, 0, 1);
    build_array(&b, "k", 77, 1);
    build_number(&b, 0, 8);
    refuse(&b, ST_DATA_LOSS, "a kind of value that is none");
    b = build_start(3, 0, 1);
    build_array(&b, "k", GGUF_ARRAY, 1);
    build_number(&b, 0, 8);
    refuse(&b, ST_UNIMPLEMENTED, "an array of arrays");
    b = build_start(3, 0, 1);
    build_array(&b, "k", GGUF_UINT64, 1ull << 61);
    refuse(&b, ST_DATA_LOSS, "an array longer than the file");
    b = build_start(3, 0, 1);
    build_array(&b, "k", GGUF_STRING, UINT64_MAX);
    build_text(&b, "only one");
    refuse(&b, ST_DATA_LOSS, "ends within its header");
    b = build_start(3, 0, 2);
    build_u32(&b, "same", 1);
    build_u32(&b, "same", 1);
    refuse(&b, ST_DATA_LOSS, "same: there twice");
    b = build_start(3, 0, 1);
    build_u32(&b, "general.alignment", 24);
    refuse(&b, ST_DATA_LOSS, "general.alignment: 24, expected a power of two");
    b = build_start(3, 0, 1);
    build_u32(&b, "general.alignment", 0);
    refuse(&b, ST_INVALID_ARGUMENT, "general.alignment: 0");
    b = build_start(3, 0, 1);
    build_key(&b, "split.count", GGUF_UINT16);
    build_number(&b, 3, 2);
    refuse(&b, ST_UNIMPLEMENTED, "split.count: a model in 3 files");
}
END_TEST

START_TEST(a_header_cut_anywhere_is_refused)
{
    struct build b = build_start(3, 1, ALL_KINDS);
    all_kinds(&b);
    build_tensor(&b, "t", 2, shape_4x2, GGUF_F32, 0);
    build_data(&b, 32, 32);
    for (size_t n = 0; n < b.bytes; n++) {
        uint8_t *exact = malloc(n + !n); /* so that a read behind the end is seen */
        memcpy(exact, b.data, n);
        struct gguf *g = NULL;
        struct status st = STATUS_INIT;
        if (gguf_open_memory(&g, exact, n, "input", &st) != ST_DATA_LOSS)
            ck_abort_msg("%zu bytes of %zu: %s", n, b.bytes, st.message);
        free(exact);
    }
    gguf_close(open_ok(&b));
    build_free(&b);
}
END_TEST

START_TEST(values_of_another_kind_or_range_are_named)
{
    struct build b = build_start(3, 0, ALL_KINDS);
    all_kinds(&b);
    struct gguf *g = open_ok(&b);
    struct status st = STATUS_INIT;
    uint32_t n;
    double x;
    bool yes;
    struct gguf_string s;
    struct gguf_array a;
    ck_assert_int_eq(gguf_read_uint(g, "i32", 0, 9, &n, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "i32: -5, expected 0 to 9"));
    ck_assert_int_eq(gguf_read_uint(g, "u64", 0, 9, &n, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "u64: 9223372036854775808"));
    ck_assert_int_eq(gguf_read_uint(g, "i64", 0, 9, &n, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "i64: -9223372036854775808"));
    ck_assert_int_eq(gguf_read_uint(g, "f32", 0, 9, &n, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "f32: f32, expected an integer"));
    ck_assert_int_eq(gguf_read_double(g, "text", 0, 9, &x, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(gguf_read_double(g, "f32", 0, 9, &x, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(gguf_read_bool(g, "u8", &yes, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(gguf_read_string(g, "u8", &s, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(gguf_read_array(g, "strings", GGUF_INT32, &a, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "strings: an array of string, expected an array of i32"));
    ck_assert_int_eq(gguf_read_array(g, "u8", GGUF_INT32, &a, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(gguf_need(g, "absent", &st), ST_INVALID_ARGUMENT);
    gguf_close(g);
    build_free(&b);
}
END_TEST

START_TEST(paths_that_are_no_such_file_are_described)
{
    struct gguf *g = NULL;
    struct status st = STATUS_INIT;
    struct temp_dir d = temp_dir_make();
    ck_assert_int_eq(gguf_open(&g, "/nonexistent/m.gguf", &st), ST_NOT_FOUND);
    ck_assert_int_eq(gguf_open(&g, d.path, &st), ST_INVALID_ARGUMENT);
    char path[300];
    snprintf(path, sizeof path, "%s/pipe", d.path);
    ck_assert_int_eq(mkfifo(path, 0600), 0);
    ck_assert_int_eq(gguf_open(&g, path, &st), ST_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(st.message, "not a regular file"));
    unlink(path);
    temp_dir_write(&d, "empty", "", 0);
    snprintf(path, sizeof path, "%s/empty", d.path);
    ck_assert_int_eq(gguf_open(&g, path, &st), ST_DATA_LOSS);
    struct model_config m;
    ck_assert_int_eq(model_config_load(&m, path, &st), ST_DATA_LOSS);
    ck_assert_ptr_null(g);
    temp_dir_remove(&d);
}
END_TEST

START_TEST(tensors_that_cannot_be_used_are_named)
{
    struct temp_dir d = temp_dir_make();
    struct build b = build_start(3, 2, BUILD_MODEL_VALUES);
    build_model(&b, "llama");
    build_tensor(&b, "output_norm.weight", 1, (uint64_t[]){64}, 20, 512);
    build_tensor(&b, "token_embd.weight", 2, shape_embed, GGUF_F16, 0);
    build_data(&b, 32, 600);
    temp_dir_write(&d, "m.gguf", b.data, b.bytes);
    char path[300];
    snprintf(path, sizeof path, "%s/m.gguf", d.path);
    struct model_config m;
    struct model_source *s = NULL;
    struct model_tensor t;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(model_config_load(&m, path, NULL), ST_OK);
    ck_assert_int_eq(model_source_open(&s, path, &m, NULL), ST_OK);
    ck_assert_int_eq(model_source_get(&t, s, "model.norm.weight", &st), ST_UNIMPLEMENTED);
    ck_assert_ptr_nonnull(strstr(st.message, "output_norm.weight: IQ4_NL is not supported"));
    ck_assert_int_eq(model_source_get(&t, s, "model.layers.0.mlp.up_proj.weight", &st), ST_DATA_LOSS);
    ck_assert_ptr_nonnull(strstr(st.message, "tensor blk.0.ffn_up.weight is missing"));
    ck_assert_int_eq(model_source_get(&t, s, "model.embed_tokens.weight", NULL), ST_OK);
    ck_assert(t.shape[0] == 4 && t.shape[1] == 64 && t.dtype == MAT_F16 && t.data[5] == 5);
    ck_assert_int_eq(model_source_check_unchanged(s, NULL), ST_OK);
    ck_assert_int_eq(truncate(path, (off_t)b.bytes - 1), 0);
    ck_assert_int_eq(model_source_check_unchanged(s, &st), ST_DATA_LOSS);
    model_source_close(s);
    build_free(&b);
    temp_dir_remove(&d);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("gguf");
    TCase *core = tcase_create("core"), *faults = tcase_create("faults");
    tcase_add_test(core, values_of_every_kind_are_read);
    tcase_add_test(core, arrays_are_read_in_order);
    tcase_add_test(core, tensors_lie_where_the_file_says);
    tcase_add_test(core, long_header_of_a_file_is_read);
    tcase_add_test(core, names_of_tensors_are_translated);
    tcase_add_test(core, architectures_are_those_of_hugging_face);
    tcase_add_test(core, what_the_metadata_add_is_read);
    tcase_add_test(core, sampling_defaults_are_those_of_the_metadata);
    tcase_add_loop_test(faults, what_is_not_computed_is_refused_by_name, 0, sizeof not_computed / sizeof *not_computed);
    tcase_add_test(faults, other_architectures_are_refused_by_name);
    tcase_add_test(faults, tensors_that_do_not_fit_are_refused);
    tcase_add_test(faults, damaged_headers_are_refused);
    tcase_add_test(faults, a_header_cut_anywhere_is_refused);
    tcase_add_test(faults, values_of_another_kind_or_range_are_named);
    tcase_add_test(faults, paths_that_are_no_such_file_are_described);
    tcase_add_test(faults, tensors_that_cannot_be_used_are_named);
    suite_add_tcase(s, core);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
