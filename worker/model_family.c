#include <string.h>

#include "worker/model_config_internal.h"

/* Yi and SmolLM2 are published as LlamaForCausalLM. */
static const struct model_family families[] = {
    {.name = "LlamaForCausalLM", .bias_options = true, .context = 2048},
    {.name = "MistralForCausalLM", .window = WINDOW_ALWAYS, .kv_heads = 8, .context = 131072},
    {.name = "Qwen2ForCausalLM", .qkv_bias = true, .window = WINDOW_ASKED, .kv_heads = 32, .context = 32768},
    {.name = "Qwen3ForCausalLM",
     .bias_options = true,
     .qk_norm = true,
     .window = WINDOW_ASKED,
     .kv_heads = 32,
     .head_dim = 128,
     .context = 32768},
};
#define KNOWN "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM"

/* Of the classes with windows, where config.json does not say. */
#define DEFAULT_WINDOW       4096
#define DEFAULT_WINDOW_LAYER 28

enum status_code model_unsupported(const char *file, const char *field, const char *value, const char *only,
                                   struct status *st)
{
    return status_set(st, ST_UNIMPLEMENTED, "%s: %s: %s is not supported, only %s", file, field, value, only);
}

enum status_code model_find_family(const struct model_family **out, struct json_source src, struct status *st)
{
    const json_t *first = json_array_get(json_object_get(src.obj, "architectures"), 0);
    if (!json_is_string(first))
        return status_set(st, ST_INVALID_ARGUMENT, "%s: architectures: expected an array with the model's class",
                          src.file);
    const char *name = json_string_value(first);
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        if (strcmp(name, families[i].name) == 0) {
            *out = &families[i];
            return ST_OK;
        }
    }
    return model_unsupported(src.file, "architectures", name, KNOWN, st);
}

/* ---- options that change the arithmetic; absent ones have the value we compute ---- */

static enum status_code check_options(struct json_source src, struct status *st)
{
    static const char *const must_be_false[] = {"rope_interleaved", "use_mrope", "use_qk_norm"};
    enum status_code rc;
    for (size_t i = 0; i < sizeof must_be_false / sizeof *must_be_false; i++) {
        bool set = false;
        if ((rc = json_read_bool(src, must_be_false[i], &set, st)) != ST_OK)
            return rc;
        if (set)
            return model_unsupported(src.file, must_be_false[i], "true", "false", st);
    }
    double rotary = 1.0;
    if ((rc = json_read_double(src, "partial_rotary_factor", 0.0, 1.0, &rotary, st)) != ST_OK)
        return rc;
    if (rotary < 1.0)
        return model_unsupported(src.file, "partial_rotary_factor", "less than 1", "1", st);
    const char *act = "silu";
    if ((rc = json_read_string(src, "hidden_act", &act, st)) != ST_OK)
        return rc;
    if (strcmp(act, "silu") != 0 && strcmp(act, "swish") != 0)
        return model_unsupported(src.file, "hidden_act", act, "silu", st);
    const json_t *quant = json_object_get(src.obj, "quantization_config");
    if (quant && !json_is_null(quant)) {
        const char *method = json_string_value(json_object_get(quant, "quant_method"));
        return model_unsupported(src.file, "quantization_config", method ? method : "an object", "unquantised weights",
                                 st);
    }
    return ST_OK;
}

static enum status_code read_biases(struct json_source src, const struct model_family *family, struct model_config *m,
                                    struct status *st)
{
    bool attention = false, mlp = false;
    enum status_code rc;
    if ((rc = json_read_bool(src, "attention_bias", &attention, st)) != ST_OK ||
        (rc = json_read_bool(src, "mlp_bias", &mlp, st)) != ST_OK)
        return rc;
    if (mlp && (!family->bias_options || family->qk_norm)) /* Qwen3 has the first option only */
        return model_unsupported(src.file, "mlp_bias", "true", "false in this class", st);
    if (attention && !family->bias_options && !family->qkv_bias)
        return model_unsupported(src.file, "attention_bias", "true", "false in this class", st);
    m->qkv_bias = family->qkv_bias || attention;
    m->o_bias = attention && family->bias_options;
    m->mlp_bias = mlp;
    return ST_OK;
}

/* ---- sliding windows ---- */

void model_set_window(struct model_config *m, uint32_t layer)
{
    m->window_layers[layer / 64] |= 1ull << layer % 64;
}

/* Newer files name the kind of every layer; older ones have a rule. */
static enum status_code read_layer_types(struct json_source src, const json_t *list, const struct model_family *family,
                                         struct model_config *m, struct status *st)
{
    if (!json_is_array(list) || json_array_size(list) != m->layers)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: layer_types: expected an array of %u names", src.file,
                          m->layers);
    for (uint32_t i = 0; i < m->layers; i++) {
        const char *type = json_string_value(json_array_get(list, i));
        if (!type)
            return status_set(st, ST_INVALID_ARGUMENT, "%s: layer_types: expected names", src.file);
        bool sliding = strcmp(type, "sliding_attention") == 0;
        if (sliding ? family->window == WINDOW_NEVER : strcmp(type, "full_attention") != 0)
            return model_unsupported(
                src.file, "layer_types", type,
                family->window == WINDOW_NEVER ? "full_attention" : "full_attention and sliding_attention", st);
        if (sliding)
            model_set_window(m, i);
    }
    return ST_OK;
}

static enum status_code read_window(struct json_source src, const struct model_family *family, struct model_config *m,
                                    struct status *st)
{
    enum status_code rc;
    const json_t *window = json_object_get(src.obj, "sliding_window"), *list = json_object_get(src.obj, "layer_types");
    bool asked = family->window == WINDOW_ALWAYS;
    uint32_t first = family->window == WINDOW_ASKED ? DEFAULT_WINDOW_LAYER : 0;
    if (json_is_null(list))
        list = NULL;
    if (list) {
        if ((rc = read_layer_types(src, list, family, m, st)) != ST_OK)
            return rc;
        first = m->layers;
    }
    if (family->window == WINDOW_NEVER)
        return ST_OK;
    if (family->window == WINDOW_ASKED &&
        ((rc = json_read_bool(src, "use_sliding_window", &asked, st)) != ST_OK ||
         (!list && (rc = json_read_uint(src, "max_window_layers", 0, UINT32_MAX / 2, &first, st)) != ST_OK)))
        return rc;
    if (!asked || json_is_null(window)) /* null: no windows; absent: the default */
        return ST_OK;
    m->window = DEFAULT_WINDOW;
    if ((rc = json_read_uint(src, "sliding_window", 1, INT32_MAX, &m->window, st)) != ST_OK)
        return rc;
    for (uint32_t i = first; i < m->layers; i++)
        model_set_window(m, i);
    return ST_OK;
}

enum status_code model_read_family(struct json_source src, const struct model_family *family, struct model_config *m,
                                   struct status *st)
{
    enum status_code rc;
    m->qk_norm = family->qk_norm;
    if ((rc = check_options(src, st)) != ST_OK || (rc = read_biases(src, family, m, st)) != ST_OK)
        return rc;
    return read_window(src, family, m, st);
}
