/* model_config.h - what config.json and generation_config.json of a Hugging Face folder say. Prefix model_config_.
 *
 * Only LlamaForCausalLM; every option that would change the arithmetic and is not computed here is refused by its name
 * (UNIMPLEMENTED), so that a model either runs right or not at all.
 */
#ifndef TANDEM_MODEL_CONFIG_H
#define TANDEM_MODEL_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

#define MODEL_MAX_EOS 16

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
    double rope_theta;
    bool tied; /* the LM head is the embedding */

    int64_t bos_id; /* -1: none */
    uint32_t eos_ids[MODEL_MAX_EOS];
    uint32_t n_eos;

    /* defaults for sampling, of generation_config.json: 1, 0, 1 where it says nothing; temperature 0 when it says
     * do_sample false */
    float temperature;
    uint32_t top_k;
    float top_p;
};

/* NOT_FOUND: the folder or its config.json. generation_config.json may be absent. */
STATUS_MUST_CHECK enum status_code model_config_load(struct model_config *out, const char *dir, struct status *st);

/* The same from memory. generation may be NULL. */
STATUS_MUST_CHECK enum status_code model_config_parse(struct model_config *out, const char *config, size_t config_bytes,
                                                      const char *generation, size_t generation_bytes,
                                                      struct status *st);

#endif
