/* model_config_internal.h - shared by model_config.c (fields of config.json), model_family.c (what the classes differ in),
 * model_rope.c (rotary positions) and model_gguf.c (the same from a GGUF file). */
#ifndef TANDEM_MODEL_CONFIG_INTERNAL_H
#define TANDEM_MODEL_CONFIG_INTERNAL_H

#include "worker/model_config.h"
#include "worker/model_json.h"

/* Limits far above any model, low enough that no product of two of them overflows 64 bits. */
#define MODEL_MAX_VOCAB    (1u << 24)
#define MODEL_MAX_HIDDEN   (1u << 18)
#define MODEL_MAX_INNER    (1u << 20)
#define MODEL_MAX_HEADS    4096u
#define MODEL_MAX_HEAD_DIM 256u /* of attention.h */
#define MODEL_MAX_CONTEXT  (1u << 26)

/* A class of models: how it differs from the others, and what the transformers library takes for fields that are not
 * there. */
struct model_family {
    const char *name; /* in config.json */
    bool qkv_bias;    /* always; else as attention_bias says */
    bool bias_options;
    bool qk_norm;
    enum { WINDOW_NEVER, WINDOW_ALWAYS, WINDOW_ASKED } window;
    uint32_t kv_heads; /* 0: as many as heads */
    uint32_t head_dim; /* 0: hidden_size / num_attention_heads */
    uint32_t context;
};

/* "FILE: FIELD: VALUE is not supported, only ONLY" */
enum status_code model_unsupported(const char *file, const char *field, const char *value, const char *only,
                                   struct status *st);

/* UNIMPLEMENTED for any other class. */
STATUS_MUST_CHECK enum status_code model_find_family(const struct model_family **out, struct json_source src,
                                                     struct status *st);
/* Biases, norms and windows, and a refusal of what is not computed. After the number of layers is known. */
STATUS_MUST_CHECK enum status_code model_read_family(struct json_source src, const struct model_family *family,
                                                     struct model_config *m, struct status *st);
/* After max_context is known. */
STATUS_MUST_CHECK enum status_code model_read_rope(struct json_source src, struct model_config *m, struct status *st);
STATUS_MUST_CHECK enum status_code model_check_yarn(const char *file, struct model_config *m, struct status *st);
/* Whether heads, kv_heads, head_dim and layers fit each other and the limits; field names for messages. */
STATUS_MUST_CHECK enum status_code model_check_heads(const char *file, const struct model_config *m, struct status *st);

void model_set_window(struct model_config *m, uint32_t layer);

#endif
