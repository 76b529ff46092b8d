/* model_config.h - what config.json and generation_config.json of a Hugging Face folder, or a GGUF file, say. Prefix
 * model_config_.
 *
 * LlamaForCausalLM (also Yi, SmolLM2), MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM; every option that would change the arithmetic and is not computed here is refused by its name
 * (UNIMPLEMENTED), so that a model either runs right or not at all.
 */
#ifndef TANDEM_MODEL_CONFIG_H
#define TANDEM_MODEL_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/gguf.h"
#include "proto/status.h"
#include "worker/rope.h"

#define MODEL_MAX_EOS    16
#define MODEL_MAX_LAYERS 4096

struct model_config {
    char architecture[64];
    uint32_t vocab_size;
    uint32_t hidden;
    uint32_t inner; /* intermediate_size: columns of the MLP */
    uint32_t layers;
    uint32_t heads;    /* H */
    uint32_t kv_heads; /* HK, divides H */
    uint32_t head_dim; /* D; H * D may differ from hidden */
    uint32_t max_context;
    float norm_eps;
    struct rope rope;
    bool tied;       /* the LM head is the embedding */
    bool qkv_bias;   /* of the q, k and v projections */
    bool o_bias;     /* of the attention's output projection */
    bool mlp_bias;   /* of gate, up and down */
    bool qk_norm;    /* q and k are normed head by head before they are rotated */
    uint32_t window; /* tokens that the layers of window_layers see at most; 0: no such layers. model_window answers */
    uint64_t window_layers[MODEL_MAX_LAYERS / 64];

    int64_t bos_id; /* -1: none */
    uint32_t eos_ids[MODEL_MAX_EOS];
    uint32_t n_eos;

    /* defaults for sampling, of generation_config.json or general.sampling.* of a GGUF file: 1, 0, 1, 0, 1, 1 where it says nothing; temperature 0 when it
     * says do_sample false */
    float temperature;
    uint32_t top_k;
    float top_p, min_p, typical_p, repetition_penalty;
};

/* path: a folder, or a GGUF file. NOT_FOUND: it, or config.json in it. generation_config.json may be absent. */
STATUS_MUST_CHECK enum status_code model_config_load(struct model_config *out, const char *path, struct status *st);

/* The same from memory. generation may be NULL. */
STATUS_MUST_CHECK enum status_code model_config_parse(struct model_config *out, const char *config, size_t config_bytes,
                                                      const char *generation, size_t generation_bytes,
                                                      struct status *st);

/* The same from the metadata of a GGUF file. */
STATUS_MUST_CHECK enum status_code model_config_from_gguf(struct model_config *out, const struct gguf *g,
                                                          struct status *st);

/* Tokens that a row of this layer sees, itself included; 0: all. */
static inline uint32_t model_window(const struct model_config *m, uint32_t layer)
{
    return m->window_layers[layer / 64] >> layer % 64 & 1 ? m->window : 0;
}

#endif
