/* check_model_config.c - worker/model_config.h: defaults, and a refusal by name for everything that is not computed. */
#include <check.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "tests/temp_dir.h"
#include "worker/model_config.h"

#define DEMO TEST_DATA "/demo-model"

static const char base[] = "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":64,\"intermediate_size\":172,"
                           "\"num_hidden_layers\":5,\"num_attention_heads\":8,\"vocab_size\":512}";

/* base with the fields of `patch` in place of its own; null takes a field away. */
static enum status_code parse(struct model_config *out, const char *patch, const char *generation, struct status *st)
{
    json_t *doc = json_loads(base, 0, NULL), *changes = json_loads(patch, JSON_DECODE_ANY, NULL);
    ck_assert_msg(doc && changes, "test data: %s", patch);
    json_object_update(doc, changes);
    char *text = json_dumps(doc, 0);
    enum status_code rc =
        model_config_parse(out, text, strlen(text), generation, generation ? strlen(generation) : 0, st);
    free(text);
    json_decref(changes);
    json_decref(doc);
    return rc;
}

START_TEST(demo_model_is_read)
{
    struct model_config m;
    ck_assert_int_eq(model_config_load(&m, DEMO, NULL), ST_OK);
    ck_assert_str_eq(m.architecture, "LlamaForCausalLM");
    ck_assert_uint_eq(m.hidden, 192);
    ck_assert_uint_eq(m.inner, 512);
    ck_assert_uint_eq(m.layers, 4);
    ck_assert_uint_eq(m.heads, 6);
    ck_assert_uint_eq(m.kv_heads, 3);
    ck_assert_uint_eq(m.head_dim, 32);
    ck_assert_uint_eq(m.vocab_size, 2048);
    ck_assert_uint_eq(m.max_context, 1024);
    ck_assert_float_eq(m.norm_eps, 1e-5f);
    ck_assert(m.tied);
    ck_assert_int_eq(m.bos_id, 2046);
    ck_assert_uint_eq(m.n_eos, 1);
    ck_assert_uint_eq(m.eos_ids[0], 2047);
    ck_assert_float_eq(m.temperature, 0.8f);
    ck_assert_float_eq(m.top_p, 0.95f);
    ck_assert_uint_eq(m.top_k, 0);
}
END_TEST

START_TEST(absent_fields_have_the_defaults_of_hugging_face)
{
    struct model_config m;
    ck_assert_int_eq(parse(&m, "{}", NULL, NULL), ST_OK);
    ck_assert_uint_eq(m.kv_heads, 8);
    ck_assert_uint_eq(m.head_dim, 8);
    ck_assert_uint_eq(m.max_context, 2048);
    ck_assert_float_eq(m.norm_eps, 1e-6f);
    ck_assert_double_eq(m.rope.theta, 10000.0);
    ck_assert(!m.tied);
    ck_assert_int_eq(m.bos_id, -1);
    ck_assert_uint_eq(m.n_eos, 0);
    ck_assert_float_eq(m.temperature, 1.0f);
    ck_assert_float_eq(m.top_p, 1.0f);
    ck_assert_uint_eq(m.top_k, 0);
}
END_TEST

START_TEST(generation_config_goes_before_config)
{
    struct model_config m;
    const char *ids = "{\"bos_token_id\":1,\"eos_token_id\":2}";
    ck_assert_int_eq(parse(&m, ids, "{\"eos_token_id\":[7,8,9],\"top_k\":50,\"temperature\":0.6,\"top_p\":0.9}", NULL),
                     ST_OK);
    ck_assert_int_eq(m.bos_id, 1);
    ck_assert_uint_eq(m.n_eos, 3);
    ck_assert_uint_eq(m.eos_ids[2], 9);
    ck_assert_uint_eq(m.top_k, 50);
    ck_assert_float_eq(m.temperature, 0.6f);
    ck_assert_float_eq(m.top_p, 0.9f);
    ck_assert_float_eq(m.min_p, 0.0f);
    ck_assert_float_eq(m.typical_p, 1.0f);
    ck_assert_float_eq(m.repetition_penalty, 1.0f);
    ck_assert_int_eq(parse(&m, ids, "{\"min_p\":0.05,\"typical_p\":0.9,\"repetition_penalty\":1.1}", NULL), ST_OK);
    ck_assert_float_eq(m.min_p, 0.05f);
    ck_assert_float_eq(m.typical_p, 0.9f);
    ck_assert_float_eq(m.repetition_penalty, 1.1f);
    ck_assert_int_eq(parse(&m, ids, "{\"do_sample\":false,\"temperature\":0.6}", NULL), ST_OK);
    ck_assert_float_eq(m.temperature, 0.0f);
    ck_assert_uint_eq(m.n_eos, 1);
    ck_assert_int_eq(parse(&m, ids, "{\"do_sample\":null,\"top_p\":null,\"eos_token_id\":null}", NULL), ST_OK);
    ck_assert_float_eq(m.temperature, 1.0f);
    ck_assert_uint_eq(m.eos_ids[0], 2);
}
END_TEST

START_TEST(spellings_that_mean_the_plain_model_are_accepted)
{
    static const char *const same[] = {
        "{\"rope_scaling\":null,\"attention_bias\":false,\"mlp_bias\":false,\"hidden_act\":\"silu\"}",
        "{\"rope_scaling\":{\"rope_type\":\"default\"}}",
        "{\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000.0}}",
        "{\"rope_parameters\":{\"rope_theta\":10000}}",
        "{\"quantization_config\":null,\"head_dim\":null,\"num_key_value_heads\":null}",
        "{\"unknown_field\":[1,{\"x\":2}]}",
    };
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        struct model_config m;
        struct status st = STATUS_INIT;
        ck_assert_msg(parse(&m, same[i], NULL, &st) == ST_OK, "%s: %s", same[i], st.message);
        ck_assert_double_eq(m.rope.theta, 10000.0);
    }
    struct model_config m;
    ck_assert_int_eq(parse(&m, "{\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":5e5}}", NULL, NULL),
                     ST_OK);
    ck_assert_double_eq(m.rope.theta, 500000.0);
    ck_assert_int_eq(parse(&m, "{\"head_dim\":128,\"num_attention_heads\":3,\"hidden_size\":50}", NULL, NULL), ST_OK);
    ck_assert_uint_eq(m.head_dim, 128);
}
END_TEST

#define MISTRAL "{\"architectures\":[\"MistralForCausalLM\"],\"num_key_value_heads\":2"
#define QWEN2   "{\"architectures\":[\"Qwen2ForCausalLM\"],\"num_key_value_heads\":2"
#define QWEN3   "{\"architectures\":[\"Qwen3ForCausalLM\"],\"num_key_value_heads\":2"
#define LLAMA3_SCALING(low, high)                                                                                      \
    "{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":" #low                               \
    ",\"high_freq_factor\":" #high ",\"original_max_position_embeddings\":64}}"

static void parse_ok(struct model_config *m, const char *patch)
{
    struct status st = STATUS_INIT;
    ck_assert_msg(parse(m, patch, NULL, &st) == ST_OK, "%s: %s", patch, st.message);
}

/* Bit i: layer i has a window. */
static unsigned windows(const struct model_config *m)
{
    unsigned mask = 0;
    for (uint32_t i = 0; i < m->layers; i++)
        mask |= (unsigned)(model_window(m, i) != 0) << i;
    return mask;
}

START_TEST(each_class_has_its_own_rules)
{
    static const struct {
        const char *patch;
        bool qkv_bias, o_bias, mlp_bias, qk_norm;
        unsigned windows;
        uint32_t window; /* of these */
    } cases[] = {
        {"{}", false, false, false, false, 0, 0},
        {"{\"sliding_window\":64}", false, false, false, false, 0, 0},
        {"{\"attention_bias\":true}", true, true, false, false, 0, 0},
        {"{\"mlp_bias\":true}", false, false, true, false, 0, 0},
        {MISTRAL "}", false, false, false, false, 31, 4096},
        {MISTRAL ",\"sliding_window\":null}", false, false, false, false, 0, 0},
        {MISTRAL ",\"sliding_window\":77}", false, false, false, false, 31, 77},
        {QWEN2 "}", true, false, false, false, 0, 0},
        {QWEN2 ",\"sliding_window\":77,\"use_sliding_window\":false}", true, false, false, false, 0, 0},
        {QWEN2 ",\"sliding_window\":77,\"use_sliding_window\":true}", true, false, false, false, 0, 77},
        {QWEN2 ",\"sliding_window\":77,\"use_sliding_window\":true,\"max_window_layers\":3}", true, false, false, false,
         24, 77},
        {QWEN2 ",\"sliding_window\":null,\"use_sliding_window\":true,\"max_window_layers\":0}", true, false, false,
         false, 0, 0},
        {QWEN3 ",\"attention_bias\":true}", true, true, false, true, 0, 0},
        {QWEN3
         ",\"use_sliding_window\":true,\"sliding_window\":5,\"max_window_layers\":0,\"layer_types\":"
         "[\"full_attention\",\"sliding_attention\",\"full_attention\",\"sliding_attention\",\"full_attention\"]}",
         false, false, false, true, 10, 5},
        {QWEN3 ",\"use_sliding_window\":false,\"num_hidden_layers\":1,\"layer_types\":[\"sliding_attention\"]}", false,
         false, false, true, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model_config m;
        parse_ok(&m, cases[i].patch);
        ck_assert_msg(m.qkv_bias == cases[i].qkv_bias && m.o_bias == cases[i].o_bias &&
                          m.mlp_bias == cases[i].mlp_bias && m.qk_norm == cases[i].qk_norm,
                      "%s: biases and norms", cases[i].patch);
        ck_assert_msg(windows(&m) == cases[i].windows && m.window == cases[i].window, "%s: windows %#x of %u",
                      cases[i].patch, windows(&m), m.window);
    }
}
END_TEST

START_TEST(absent_fields_have_the_defaults_of_the_class)
{
    struct model_config m;
    parse_ok(&m, "{\"architectures\":[\"MistralForCausalLM\"],\"hidden_size\":128,\"num_attention_heads\":16}");
    ck_assert_uint_eq(m.kv_heads, 8);
    ck_assert_uint_eq(m.max_context, 131072);
    parse_ok(&m, "{\"architectures\":[\"Qwen2ForCausalLM\"],\"hidden_size\":512,\"num_attention_heads\":64}");
    ck_assert_uint_eq(m.kv_heads, 32);
    ck_assert_uint_eq(m.head_dim, 8);
    parse_ok(&m, QWEN3 "}");
    ck_assert_uint_eq(m.head_dim, 128);
    ck_assert_uint_eq(m.max_context, 32768);
    json_t *null_heads = json_loads(base, 0, NULL); /* null is not absent: as many as heads */
    json_object_set_new(null_heads, "architectures", json_pack("[s]", "MistralForCausalLM"));
    json_object_set_new(null_heads, "num_key_value_heads", json_null());
    char *text = json_dumps(null_heads, 0);
    ck_assert_int_eq(model_config_parse(&m, text, strlen(text), NULL, 0, NULL), ST_OK);
    ck_assert_uint_eq(m.kv_heads, m.heads);
    free(text);
    json_decref(null_heads);
}
END_TEST

START_TEST(rope_scalings_are_read)
{
    struct model_config m;
    parse_ok(&m, LLAMA3_SCALING(1, 4));
    ck_assert_int_eq(m.rope.scaling, ROPE_LLAMA3);
    ck_assert_double_eq(m.rope.original_context, 64);
    parse_ok(&m, "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":4}}");
    ck_assert_int_eq(m.rope.scaling, ROPE_LINEAR);
    ck_assert_uint_eq(m.max_context, 2048);
    parse_ok(&m, "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":2048}}");
    ck_assert_uint_eq(m.max_context, 8192); /* published models leave max_position_embeddings as it was */
    ck_assert_double_eq_tol(m.rope.attention_factor, 1.138629436, 1e-8);
    ck_assert(m.rope.whole_pairs);
    parse_ok(&m, "{\"rope_parameters\":{\"rope_type\":\"yarn\",\"rope_theta\":1e6,\"factor\":4,\"mscale\":1.0,"
                 "\"mscale_all_dim\":0.5,\"truncate\":false}}");
    ck_assert_double_eq(m.rope.theta, 1e6);
    ck_assert_double_eq_tol(m.rope.attention_factor, 1.138629436 / 1.069314718, 1e-8);
    ck_assert(!m.rope.whole_pairs);
    parse_ok(&m, "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,\"attention_factor\":0.9}}");
    ck_assert_double_eq(m.rope.attention_factor, 0.9);
    parse_ok(&m, "{\"max_position_embeddings\":50000000,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":1000}}");
    ck_assert_uint_eq(m.max_context, 1u << 26);
}
END_TEST

static const struct {
    const char *patch, *generation;
    enum status_code code;
    const char *says;
} refused[] = {
    {"{\"architectures\":[\"MixtralForCausalLM\"]}", NULL, ST_UNIMPLEMENTED, "architectures: MixtralForCausalLM"},
    {"{\"architectures\":[\"Qwen2MoeForCausalLM\"]}", NULL, ST_UNIMPLEMENTED, "architectures: Qwen2MoeForCausalLM"},
    {"{\"architectures\":[\"SmolLM3ForCausalLM\"]}", NULL, ST_UNIMPLEMENTED, "architectures: SmolLM3ForCausalLM"},
    {"{\"architectures\":null}", NULL, ST_INVALID_ARGUMENT, "architectures"},
    {"{\"architectures\":[]}", NULL, ST_INVALID_ARGUMENT, "architectures"},
    {MISTRAL ",\"attention_bias\":true}", NULL, ST_UNIMPLEMENTED, "attention_bias: true"},
    {MISTRAL ",\"mlp_bias\":true}", NULL, ST_UNIMPLEMENTED, "mlp_bias: true"},
    {QWEN3 ",\"mlp_bias\":true}", NULL, ST_UNIMPLEMENTED, "mlp_bias: true"},
    {MISTRAL ",\"sliding_window\":0}", NULL, ST_INVALID_ARGUMENT, "sliding_window: 0, expected 1 to"},
    {MISTRAL ",\"sliding_window\":\"4k\"}", NULL, ST_INVALID_ARGUMENT, "sliding_window: a string"},
    {QWEN2 ",\"use_sliding_window\":1}", NULL, ST_INVALID_ARGUMENT, "use_sliding_window: an integer"},
    {QWEN2 ",\"use_sliding_window\":true,\"max_window_layers\":-1}", NULL, ST_INVALID_ARGUMENT,
     "max_window_layers: -1"},
    {QWEN2 ",\"use_mrope\":true}", NULL, ST_UNIMPLEMENTED, "use_mrope: true"},
    {"{\"rope_interleaved\":true}", NULL, ST_UNIMPLEMENTED, "rope_interleaved: true"},
    {"{\"partial_rotary_factor\":0.5}", NULL, ST_UNIMPLEMENTED, "partial_rotary_factor: less than 1"},
    {QWEN3 ",\"layer_types\":[\"full_attention\"]}", NULL, ST_INVALID_ARGUMENT, "layer_types: expected an array of 5"},
    {QWEN3 ",\"layer_types\":[1,2,3,4,5]}", NULL, ST_INVALID_ARGUMENT, "layer_types: expected names"},
    {QWEN3 ",\"num_hidden_layers\":1,\"layer_types\":[\"linear_attention\"]}", NULL, ST_UNIMPLEMENTED,
     "layer_types: linear_attention"},
    {"{\"num_hidden_layers\":1,\"layer_types\":[\"sliding_attention\"]}", NULL, ST_UNIMPLEMENTED,
     "layer_types: sliding_attention"},
    {"{\"mlp_bias\":1}", NULL, ST_INVALID_ARGUMENT, "mlp_bias: an integer"},
    {"{\"hidden_act\":\"gelu\"}", NULL, ST_UNIMPLEMENTED, "hidden_act: gelu"},
    {"{\"rope_scaling\":{\"rope_type\":\"dynamic\",\"factor\":8}}", NULL, ST_UNIMPLEMENTED, "rope_scaling: dynamic"},
    {"{\"rope_scaling\":{\"type\":\"longrope\"}}", NULL, ST_UNIMPLEMENTED, "rope_scaling: longrope"},
    {"{\"rope_scaling\":{\"type\":\"mrope\"}}", NULL, ST_UNIMPLEMENTED, "rope_scaling: mrope"},
    {"{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8}}", NULL, ST_INVALID_ARGUMENT,
     "low_freq_factor is missing"},
    {LLAMA3_SCALING(4, 4), NULL, ST_INVALID_ARGUMENT, "high_freq_factor: 4, expected more than low_freq_factor"},
    {"{\"rope_scaling\":{\"type\":\"linear\"}}", NULL, ST_INVALID_ARGUMENT, "factor is missing"},
    {"{\"rope_scaling\":{\"type\":\"linear\",\"factor\":0.5}}", NULL, ST_INVALID_ARGUMENT,
     "factor: 0.5, expected 1 to"},
    {"{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,\"beta_fast\":1,\"beta_slow\":2}}", NULL, ST_INVALID_ARGUMENT,
     "beta_fast: 1, expected at least beta_slow"},
    {"{\"rope_theta\":1,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2}}", NULL, ST_INVALID_ARGUMENT,
     "rope_theta: 1, expected more than 1"},
    {"{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2},\"rope_parameters\":{\"rope_type\":\"yarn\",\"factor\":2}}",
     NULL, ST_INVALID_ARGUMENT, "not both"},
    {"{\"rope_parameters\":{\"sliding_attention\":{},\"full_attention\":{}}}", NULL, ST_UNIMPLEMENTED,
     "rope_parameters: full_attention"},
    {"{\"rope_scaling\":{\"factor\":2}}", NULL, ST_UNIMPLEMENTED, "rope_scaling"},
    {"{\"rope_scaling\":8}", NULL, ST_INVALID_ARGUMENT, "rope_scaling"},
    {"{\"rope_parameters\":{\"rope_type\":\"yarn\"}}", NULL, ST_INVALID_ARGUMENT, "factor is missing"},
    {"{\"quantization_config\":{\"quant_method\":\"awq\"}}", NULL, ST_UNIMPLEMENTED, "quantization_config: awq"},
    {"{\"hidden_size\":null}", NULL, ST_INVALID_ARGUMENT, "hidden_size is missing"},
    {"{\"hidden_size\":0}", NULL, ST_INVALID_ARGUMENT, "hidden_size: 0, expected 1 to"},
    {"{\"hidden_size\":-5}", NULL, ST_INVALID_ARGUMENT, "hidden_size: -5"},
    {"{\"hidden_size\":64.0}", NULL, ST_INVALID_ARGUMENT, "hidden_size: a real number"},
    {"{\"hidden_size\":\"64\"}", NULL, ST_INVALID_ARGUMENT, "hidden_size: a string"},
    {"{\"hidden_size\":4294967360}", NULL, ST_INVALID_ARGUMENT, "hidden_size: 4294967360"},
    {"{\"intermediate_size\":null}", NULL, ST_INVALID_ARGUMENT, "intermediate_size is missing"},
    {"{\"num_hidden_layers\":0}", NULL, ST_INVALID_ARGUMENT, "num_hidden_layers: 0"},
    {"{\"num_hidden_layers\":1000000}", NULL, ST_INVALID_ARGUMENT, "num_hidden_layers: 1000000"},
    {"{\"vocab_size\":0}", NULL, ST_INVALID_ARGUMENT, "vocab_size: 0"},
    {"{\"num_key_value_heads\":3}", NULL, ST_INVALID_ARGUMENT, "num_key_value_heads: 3, expected a divisor"},
    {"{\"num_key_value_heads\":16}", NULL, ST_INVALID_ARGUMENT, "num_key_value_heads: 16"},
    {"{\"num_attention_heads\":7}", NULL, ST_INVALID_ARGUMENT, "head_dim is missing"},
    {"{\"head_dim\":12}", NULL, ST_UNIMPLEMENTED, "head_dim: 12"},
    {"{\"head_dim\":512}", NULL, ST_INVALID_ARGUMENT, "head_dim: 512"},
    {"{\"hidden_size\":8192}", NULL, ST_UNIMPLEMENTED, "head_dim: 1024"},
    {"{\"num_hidden_layers\":4096,\"num_attention_heads\":4096,\"head_dim\":256}", NULL, ST_INVALID_ARGUMENT,
     "KV bytes a token"},
    {"{\"max_position_embeddings\":0}", NULL, ST_INVALID_ARGUMENT, "max_position_embeddings: 0"},
    {"{\"rms_norm_eps\":0}", NULL, ST_INVALID_ARGUMENT, "rms_norm_eps: 0"},
    {"{\"rms_norm_eps\":\"1e-5\"}", NULL, ST_INVALID_ARGUMENT, "rms_norm_eps: a string"},
    {"{\"rope_theta\":0.5}", NULL, ST_INVALID_ARGUMENT, "rope_theta: 0.5"},
    {"{\"tie_word_embeddings\":\"yes\"}", NULL, ST_INVALID_ARGUMENT, "tie_word_embeddings: a string"},
    {"{\"bos_token_id\":512}", NULL, ST_INVALID_ARGUMENT, "bos_token_id: 512, expected 0 to 511"},
    {"{\"eos_token_id\":[1,-1]}", NULL, ST_INVALID_ARGUMENT, "eos_token_id: -1"},
    {"{\"eos_token_id\":\"x\"}", NULL, ST_INVALID_ARGUMENT, "eos_token_id"},
    {"{\"eos_token_id\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}", NULL, ST_INVALID_ARGUMENT,
     "eos_token_id: 17 ids"},
    {"{}", "{\"temperature\":-1}", ST_INVALID_ARGUMENT, "generation_config.json: temperature: -1"},
    {"{}", "{\"top_p\":1.5}", ST_INVALID_ARGUMENT, "generation_config.json: top_p: 1.5"},
    {"{}", "{\"top_k\":-1}", ST_INVALID_ARGUMENT, "generation_config.json: top_k: -1"},
    {"{}", "{\"min_p\":-0.1}", ST_INVALID_ARGUMENT, "generation_config.json: min_p: -0.1"},
    {"{}", "{\"typical_p\":2}", ST_INVALID_ARGUMENT, "generation_config.json: typical_p: 2"},
    {"{}", "{\"repetition_penalty\":0}", ST_INVALID_ARGUMENT, "generation_config.json: repetition_penalty: 0"},
    {"{}", "{\"do_sample\":0}", ST_INVALID_ARGUMENT, "generation_config.json: do_sample"},
    {"{}", "{\"eos_token_id\":512}", ST_INVALID_ARGUMENT, "generation_config.json: eos_token_id: 512"},
    {"{}", "[]", ST_DATA_LOSS, "generation_config.json: an array"},
    {"{}", "{", ST_DATA_LOSS, "generation_config.json: not valid JSON"},
};

START_TEST(what_is_not_computed_is_refused_by_name)
{
    struct model_config m;
    struct status st = STATUS_INIT;
    enum status_code rc = parse(&m, refused[_i].patch, refused[_i].generation, &st);
    ck_assert_msg(rc == refused[_i].code && strstr(st.message, refused[_i].says),
                  "%s %s: %s, \"%s\"; expected %s, \"%s\"", refused[_i].patch,
                  refused[_i].generation ? refused[_i].generation : "", status_name(rc), st.message,
                  status_name(refused[_i].code), refused[_i].says);
}
END_TEST

START_TEST(folder_without_a_usable_config_is_described)
{
    struct model_config m;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(model_config_load(&m, "/nonexistent/model", &st), ST_NOT_FOUND);
    ck_assert_ptr_nonnull(strstr(st.message, "/nonexistent/model: no such folder"));
    struct temp_dir d = temp_dir_make();
    ck_assert_int_eq(model_config_load(&m, d.path, &st), ST_NOT_FOUND);
    ck_assert_ptr_nonnull(strstr(st.message, "config.json"));
    temp_dir_write(&d, "config.json", "{\"architectures\":", 17);
    ck_assert_int_eq(model_config_load(&m, d.path, &st), ST_DATA_LOSS);
    char *big = calloc(1, 2 << 20);
    memset(big, ' ', 2 << 20);
    temp_dir_write(&d, "config.json", big, 2 << 20);
    free(big);
    ck_assert_int_eq(model_config_load(&m, d.path, &st), ST_DATA_LOSS);
    ck_assert_ptr_nonnull(strstr(st.message, "config.json: over"));
    temp_dir_write(&d, "config.json", base, sizeof base - 1);
    ck_assert_int_eq(model_config_load(&m, d.path, &st), ST_OK);
    temp_dir_write(&d, "generation_config.json", "{", 1);
    ck_assert_int_eq(model_config_load(&m, d.path, &st), ST_DATA_LOSS);
    ck_assert_ptr_nonnull(strstr(st.message, "generation_config.json"));
    temp_dir_remove(&d);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("model_config");
    TCase *core = tcase_create("core"), *faults = tcase_create("faults");
    tcase_add_test(core, demo_model_is_read);
    tcase_add_test(core, absent_fields_have_the_defaults_of_hugging_face);
    tcase_add_test(core, generation_config_goes_before_config);
    tcase_add_test(core, spellings_that_mean_the_plain_model_are_accepted);
    tcase_add_test(core, each_class_has_its_own_rules);
    tcase_add_test(core, absent_fields_have_the_defaults_of_the_class);
    tcase_add_test(core, rope_scalings_are_read);
    tcase_add_loop_test(faults, what_is_not_computed_is_refused_by_name, 0, sizeof refused / sizeof *refused);
    tcase_add_test(faults, folder_without_a_usable_config_is_described);
    suite_add_tcase(s, core);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
