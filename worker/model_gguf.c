/* model_gguf.c - the configuration of a model from the metadata of a GGUF file. Mistral, Yi and SmolLM2 are "llama" there.
 * What stands in no metadata, which biases there are and whether the head is the embedding, the list of tensors says. */
#include <stdio.h>
#include <string.h>

#include "worker/model_config_internal.h"

#define MAX_FACTOR 1e6

struct source {
    const struct gguf *g;
    char arch[16];
    char key[128]; /* of the last own() */
};

/* "llama.context_length"; until the next call. */
static const char *own(struct source *s, const char *name)
{
    snprintf(s->key, sizeof s->key, "%s.%s", s->arch, name);
    return s->key;
}

static enum status_code find_architecture(struct source *s, struct model_config *m, struct status *st)
{
    static const char *const known[][2] = {
        {"llama", "LlamaForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"}, {"qwen3", "Qwen3ForCausalLM"}};
    struct gguf_string name = {"", 0};
    enum status_code rc;
    if ((rc = gguf_need(s->g, "general.architecture", st)) != ST_OK ||
        (rc = gguf_read_string(s->g, "general.architecture", &name, st)) != ST_OK)
        return rc;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (gguf_string_is(name, known[i][0])) {
            snprintf(s->arch, sizeof s->arch, "%s", known[i][0]);
            snprintf(m->architecture, sizeof m->architecture, "%s", known[i][1]);
            return ST_OK;
        }
    }
    char shown[64];
    snprintf(shown, sizeof shown, "%.*s", name.bytes < sizeof shown ? (int)name.bytes : (int)sizeof shown - 1, name.at);
    return model_unsupported(gguf_path(s->g), "general.architecture", shown, "llama, qwen2 and qwen3", st);
}

/* Options that change the arithmetic: all that we do not compute must be absent, 0 or false. */
static enum status_code check_options(struct source *s, struct status *st)
{
    static const char *const numbers[] = {
        "expert_count",
        "logit_scale",
        "residual_scale",
        "embedding_scale",
        "attention.scale",
        "attention.clamp_kqv",
        "attention.shared_kv_layers",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attention.max_alibi_bias",
    };
    static const char *const absent[] = {"rope.dimension_sections", "attention.sliding_window_pattern"};
    enum status_code rc;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        double x = 0.0;
        if ((rc = gguf_read_double(s->g, own(s, numbers[i]), -1e30, 1e30, &x, st)) != ST_OK)
            return rc;
        if (x != 0.0)
            return model_unsupported(gguf_path(s->g), s->key, "a value", "0", st);
    }
    for (size_t i = 0; i < sizeof absent / sizeof *absent; i++)
        if (gguf_has(s->g, own(s, absent[i])))
            return model_unsupported(gguf_path(s->g), s->key, "a value", "its absence", st);
    bool parallel = false, causal = true;
    uint32_t version = 2;
    if ((rc = gguf_read_bool(s->g, own(s, "use_parallel_residual"), &parallel, st)) != ST_OK)
        return rc;
    if (parallel)
        return model_unsupported(gguf_path(s->g), s->key, "true", "false", st);
    if ((rc = gguf_read_bool(s->g, own(s, "attention.causal"), &causal, st)) != ST_OK)
        return rc;
    if (!causal)
        return model_unsupported(gguf_path(s->g), s->key, "false", "true", st);
    if ((rc = gguf_read_uint(s->g, "general.quantization_version", 0, UINT32_MAX, &version, st)) != ST_OK)
        return rc;
    return version == 2 ? ST_OK
                        : model_unsupported(gguf_path(s->g), "general.quantization_version", "another one", "2", st);
}

static enum status_code read_heads(struct source *s, struct model_config *m, struct status *st)
{
    enum status_code rc;
    m->kv_heads = m->heads;
    if ((rc = gguf_read_uint(s->g, own(s, "attention.head_count_kv"), 1, MODEL_MAX_HEADS, &m->kv_heads, st)) != ST_OK)
        return rc;
    if (!gguf_has(s->g, own(s, "attention.key_length")) && m->hidden % m->heads)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "%s: %s is missing and attention.head_count, %u, does not divide embedding_length, %u",
                          gguf_path(s->g), s->key, m->heads, m->hidden);
    m->head_dim = m->hidden / m->heads;
    if ((rc = gguf_read_uint(s->g, own(s, "attention.key_length"), 1, UINT32_MAX, &m->head_dim, st)) != ST_OK)
        return rc;
    uint32_t values = m->head_dim, rotated = m->head_dim;
    if ((rc = gguf_read_uint(s->g, own(s, "attention.value_length"), 1, UINT32_MAX, &values, st)) != ST_OK)
        return rc;
    if (values != m->head_dim)
        return model_unsupported(gguf_path(s->g), s->key, "another one than that of keys", "the same", st);
    if ((rc = gguf_read_uint(s->g, own(s, "rope.dimension_count"), 1, UINT32_MAX, &rotated, st)) != ST_OK)
        return rc;
    if (rotated != m->head_dim)
        return model_unsupported(gguf_path(s->g), s->key, "a part of the head", "all of it", st);
    return model_check_heads(gguf_path(s->g), m, st);
}

static enum status_code read_vocabulary(struct source *s, struct model_config *m, struct status *st)
{
    const struct gguf_tensor *embed = gguf_tensor_find(s->g, "token_embd.weight");
    if (!embed || embed->dims != 2)
        return status_set(st, ST_DATA_LOSS, "%s: tensor token_embd.weight: %s, expected a matrix", gguf_path(s->g),
                          embed ? "another shape" : "missing");
    if (embed->shape[1] > MODEL_MAX_VOCAB)
        return status_set(st, ST_DATA_LOSS, "%s: tensor token_embd.weight: %llu rows, expected at most %u",
                          gguf_path(s->g), (unsigned long long)embed->shape[1], MODEL_MAX_VOCAB);
    m->vocab_size = (uint32_t)embed->shape[1]; /* padding included; the list of tokens may be shorter */
    return ST_OK;
}

static enum status_code read_shape(struct source *s, struct model_config *m, struct status *st)
{
    const struct {
        const char *name;
        uint32_t max;
        uint32_t *out;
    } needed[] = {
        {"embedding_length", MODEL_MAX_HIDDEN, &m->hidden},     {"feed_forward_length", MODEL_MAX_INNER, &m->inner},
        {"block_count", MODEL_MAX_LAYERS, &m->layers},          {"attention.head_count", MODEL_MAX_HEADS, &m->heads},
        {"context_length", MODEL_MAX_CONTEXT, &m->max_context},
    };
    enum status_code rc;
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if ((rc = gguf_need(s->g, own(s, needed[i].name), st)) != ST_OK ||
            (rc = gguf_read_uint(s->g, s->key, 1, needed[i].max, needed[i].out, st)) != ST_OK)
            return rc;
    double eps = 0.0;
    if ((rc = gguf_need(s->g, own(s, "attention.layer_norm_rms_epsilon"), st)) != ST_OK ||
        (rc = gguf_read_double(s->g, s->key, 1e-30, 1.0, &eps, st)) != ST_OK)
        return rc;
    m->norm_eps = (float)eps;
    if ((rc = gguf_read_uint(s->g, own(s, "attention.sliding_window"), 0, INT32_MAX, &m->window, st)) != ST_OK)
        return rc;
    for (uint32_t i = 0; m->window && i < m->layers; i++)
        model_set_window(m, i);
    return (rc = read_vocabulary(s, m, st)) != ST_OK ? rc : read_heads(s, m, st);
}

static enum status_code read_yarn(struct source *s, struct model_config *m, struct status *st)
{
    struct rope *r = &m->rope;
    double scale = 1.0, extrapolation = 1.0;
    enum status_code rc;
    r->original_context = m->max_context;
    r->beta_fast = 32.0;
    r->beta_slow = 1.0;
    r->whole_pairs = true;
    if ((rc = gguf_read_double(s->g, own(s, "rope.scaling.original_context_length"), 1.0, 1e9, &r->original_context,
                               st)) != ST_OK ||
        (rc = gguf_read_double(s->g, own(s, "rope.scaling.yarn_beta_fast"), 1e-6, 1e6, &r->beta_fast, st)) != ST_OK ||
        (rc = gguf_read_double(s->g, own(s, "rope.scaling.yarn_beta_slow"), 1e-6, 1e6, &r->beta_slow, st)) != ST_OK ||
        (rc = gguf_read_double(s->g, own(s, "rope.scaling.attn_factor"), 1e-6, 1e6, &scale, st)) != ST_OK ||
        (rc = gguf_read_double(s->g, own(s, "rope.scaling.yarn_ext_factor"), -1.0, 1e6, &extrapolation, st)) != ST_OK)
        return rc;
    if (extrapolation != 1.0 && extrapolation != -1.0) /* -1: the default of the scaling, 1 */
        return model_unsupported(gguf_path(s->g), s->key, "a mixture", "1", st);
    if (r->beta_fast < r->beta_slow)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "%s: rope.scaling.yarn_beta_fast: %g, expected at least beta_slow, %g", gguf_path(s->g),
                          r->beta_fast, r->beta_slow);
    r->attention_factor = scale * rope_yarn_mscale(r->factor, 1.0);
    return model_check_yarn(gguf_path(s->g), m, st);
}

static enum status_code read_divisors(struct source *s, struct model_config *m, struct status *st)
{
    const struct gguf_tensor *t = gguf_tensor_find(s->g, "rope_freqs.weight");
    uint32_t half = m->head_dim / 2;
    if (!t)
        return ST_OK;
    if (t->type != GGUF_F32 || t->dims != 1 || t->shape[0] != half)
        return status_set(st, ST_DATA_LOSS, "%s: tensor %s: expected %u values in F32", gguf_path(s->g), t->name, half);
    enum status_code rc = gguf_read_tensor(s->g, t, m->rope.divisor, half * sizeof(float), st);
    if (rc != ST_OK)
        return rc;
    for (uint32_t i = 0; i < half; i++)
        if (!(m->rope.divisor[i] > 1e-6f && m->rope.divisor[i] < 1e30f))
            return status_set(st, ST_DATA_LOSS, "%s: tensor %s: value %u is %g, expected a positive number",
                              gguf_path(s->g), t->name, i, (double)m->rope.divisor[i]);
    m->rope.divided = true;
    return ST_OK;
}

static enum status_code read_rope(struct source *s, struct model_config *m, struct status *st)
{
    struct rope *r = &m->rope;
    struct gguf_string type = {"", 0};
    enum status_code rc;
    *r = (struct rope){.theta = 10000.0, .factor = 1.0, .attention_factor = 1.0};
    if ((rc = gguf_read_double(s->g, own(s, "rope.freq_base"), 1.0, 1e15, &r->theta, st)) != ST_OK ||
        (rc = gguf_read_double(s->g, own(s, "rope.scale_linear"), 1.0, MAX_FACTOR, &r->factor, st)) != ST_OK ||
        (rc = gguf_read_double(s->g, own(s, "rope.scaling.factor"), 1.0, MAX_FACTOR, &r->factor, st)) != ST_OK ||
        (rc = gguf_read_string(s->g, own(s, "rope.scaling.type"), &type, st)) != ST_OK)
        return rc;
    if (gguf_string_is(type, "none"))
        return ST_OK;
    if (gguf_string_is(type, "linear") || (type.bytes == 0 && r->factor > 1.0)) {
        r->scaling = ROPE_LINEAR;
        return ST_OK;
    }
    if (gguf_string_is(type, "yarn")) {
        r->scaling = ROPE_YARN;
        return read_yarn(s, m, st);
    }
    if (type.bytes == 0)
        return ST_OK;
    char shown[32];
    snprintf(shown, sizeof shown, "%.*s", type.bytes < sizeof shown ? (int)type.bytes : (int)sizeof shown - 1, type.at);
    return model_unsupported(gguf_path(s->g), s->key, shown, "none, linear and yarn", st);
}

static enum status_code read_special_ids(struct source *s, struct model_config *m, struct status *st)
{
    /* where generation ends: of the text, of a turn, of a message */
    static const char *const ends[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                       "tokenizer.ggml.eom_token_id"};
    uint32_t bos = 0;
    enum status_code rc;
    if ((rc = gguf_read_uint(s->g, "tokenizer.ggml.bos_token_id", 0, m->vocab_size - 1, &bos, st)) != ST_OK)
        return rc;
    m->bos_id = gguf_has(s->g, "tokenizer.ggml.bos_token_id") ? (int64_t)bos : -1;
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        uint32_t id = 0;
        bool twice = false;
        if (!gguf_has(s->g, ends[i]))
            continue;
        if ((rc = gguf_read_uint(s->g, ends[i], 0, m->vocab_size - 1, &id, st)) != ST_OK)
            return rc;
        for (uint32_t k = 0; k < m->n_eos; k++)
            twice = twice || m->eos_ids[k] == id;
        if (!twice)
            m->eos_ids[m->n_eos++] = id;
    }
    return ST_OK;
}

/* As generation_config.json's. A top_k below 1 keeps all, a penalty over the last 0 tokens is none; other windows of it are
 * not kept, ours looks at all tokens. Not taken: typical_p, which has no key; mirostat, xtc and the order of samplers, which
 * have no option here. */
static enum status_code read_sampling(const struct source *s, struct model_config *m, struct status *st)
{
    double temperature = 1.0, top_k = 0.0, top_p = 1.0, min_p = 0.0, repetition = 1.0, last = -1.0;
    const struct {
        const char *key;
        double min, max, *out;
    } keys[] = {
        {"general.sampling.temp", -100.0, 100.0, &temperature},
        {"general.sampling.top_k", -1e9, INT32_MAX, &top_k},
        {"general.sampling.top_p", 0.0, 1.0, &top_p},
        {"general.sampling.min_p", 0.0, 1.0, &min_p},
        {"general.sampling.penalty_repeat", 0.01, 100.0, &repetition},
        {"general.sampling.penalty_last_n", -1.0, 1e9, &last},
    };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        enum status_code rc = gguf_read_double(s->g, keys[i].key, keys[i].min, keys[i].max, keys[i].out, st);
        if (rc != ST_OK)
            return rc;
    }
    m->temperature = temperature > 0.0 ? (float)temperature : 0.0f;
    m->top_k = top_k > 0.0 ? (uint32_t)top_k : 0;
    m->top_p = top_p > 0.0 ? (float)top_p : 1.0f;
    m->min_p = (float)min_p;
    m->repetition_penalty = last == 0.0 ? 1.0f : (float)repetition;
    return ST_OK;
}

enum status_code model_config_from_gguf(struct model_config *out, const struct gguf *g, struct status *st)
{
    struct model_config m = {
        .bos_id = -1, .temperature = 1.0f, .top_p = 1.0f, .typical_p = 1.0f, .repetition_penalty = 1.0f};
    struct source s = {.g = g};
    enum status_code rc;
    if ((rc = find_architecture(&s, &m, st)) != ST_OK || (rc = check_options(&s, st)) != ST_OK ||
        (rc = read_shape(&s, &m, st)) != ST_OK || (rc = read_rope(&s, &m, st)) != ST_OK ||
        (rc = read_divisors(&s, &m, st)) != ST_OK || (rc = read_special_ids(&s, &m, st)) != ST_OK ||
        (rc = read_sampling(&s, &m, st)) != ST_OK)
        return rc;
    m.tied = !gguf_tensor_find(g, "output.weight");
    m.qkv_bias = gguf_tensor_find(g, "blk.0.attn_q.bias");
    m.o_bias = gguf_tensor_find(g, "blk.0.attn_output.bias");
    m.mlp_bias = gguf_tensor_find(g, "blk.0.ffn_down.bias");
    m.qk_norm = strcmp(s.arch, "qwen3") == 0;
    *out = m;
    return ST_OK;
}
