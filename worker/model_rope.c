/* model_rope.c - what config.json says about rotary positions. Older files: rope_theta and rope_scaling {"type": ...} or
 * {"rope_type": ...}; newer ones: rope_parameters with the theta in it. A field of a known scaling that is missing has the
 * default of the transformers library where that has one. */
#include <string.h>

#include "worker/model_config_internal.h"

#define MAX_THETA   1e15
#define MAX_FACTOR  1e6
#define MAX_CONTEXT 1e9
#define MAX_TURNS   1e6

static enum status_code read_factor(struct json_source src, struct rope *r, struct status *st)
{
    enum status_code rc = json_read_need(src, "factor", st);
    return rc != ST_OK ? rc : json_read_double(src, "factor", 1.0, MAX_FACTOR, &r->factor, st);
}

static enum status_code read_llama3(struct json_source src, struct rope *r, struct status *st)
{
    enum status_code rc;
    static const char *const needed[] = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if ((rc = json_read_need(src, needed[i], st)) != ST_OK)
            return rc;
    if ((rc = read_factor(src, r, st)) != ST_OK ||
        (rc = json_read_double(src, needed[0], 1e-6, MAX_TURNS, &r->low_freq_factor, st)) != ST_OK ||
        (rc = json_read_double(src, needed[1], 1e-6, MAX_TURNS, &r->high_freq_factor, st)) != ST_OK ||
        (rc = json_read_double(src, needed[2], 1.0, MAX_CONTEXT, &r->original_context, st)) != ST_OK)
        return rc;
    if (r->high_freq_factor <= r->low_freq_factor)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: high_freq_factor: %g, expected more than low_freq_factor, %g",
                          src.file, r->high_freq_factor, r->low_freq_factor);
    return ST_OK;
}

static enum status_code read_yarn(struct json_source src, const struct model_config *m, struct rope *r,
                                  struct status *st)
{
    enum status_code rc;
    double mscale = 0.0, mscale_all = 0.0, attention = 0.0;
    r->beta_fast = 32.0;
    r->beta_slow = 1.0;
    r->whole_pairs = true;
    r->original_context = m->max_context;
    if ((rc = read_factor(src, r, st)) != ST_OK ||
        (rc = json_read_double(src, "beta_fast", 1e-6, MAX_TURNS, &r->beta_fast, st)) != ST_OK ||
        (rc = json_read_double(src, "beta_slow", 1e-6, MAX_TURNS, &r->beta_slow, st)) != ST_OK ||
        (rc = json_read_double(src, "original_max_position_embeddings", 1.0, MAX_CONTEXT, &r->original_context, st)) !=
            ST_OK ||
        (rc = json_read_double(src, "mscale", 0.0, MAX_FACTOR, &mscale, st)) != ST_OK ||
        (rc = json_read_double(src, "mscale_all_dim", 0.0, MAX_FACTOR, &mscale_all, st)) != ST_OK ||
        (rc = json_read_double(src, "attention_factor", 1e-6, MAX_FACTOR, &attention, st)) != ST_OK ||
        (rc = json_read_bool(src, "truncate", &r->whole_pairs, st)) != ST_OK)
        return rc;
    if (r->beta_fast < r->beta_slow)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: beta_fast: %g, expected at least beta_slow, %g", src.file,
                          r->beta_fast, r->beta_slow);
    if (attention > 0.0)
        r->attention_factor = attention;
    else if (mscale > 0.0 && mscale_all > 0.0)
        r->attention_factor = rope_yarn_mscale(r->factor, mscale) / rope_yarn_mscale(r->factor, mscale_all);
    else
        r->attention_factor = rope_yarn_mscale(r->factor, 1.0);
    return ST_OK;
}

/* One of the two objects; `type` has the default. */
static enum status_code read_scaling(struct json_source src, const char *field, const char *type,
                                     struct model_config *m, struct status *st)
{
    static const char *const per_layer[] = {"full_attention", "sliding_attention"};
    struct rope *r = &m->rope;
    enum status_code rc;
    for (size_t i = 0; i < sizeof per_layer / sizeof *per_layer; i++)
        if (json_object_get(src.obj, per_layer[i]))
            return model_unsupported(src.file, field, per_layer[i], "one set for all layers", st);
    if ((rc = json_read_string(src, "type", &type, st)) != ST_OK ||
        (rc = json_read_string(src, "rope_type", &type, st)) != ST_OK ||
        (rc = json_read_double(src, "rope_theta", 1.0, MAX_THETA, &r->theta, st)) != ST_OK)
        return rc;
    double part = 1.0;
    if ((rc = json_read_double(src, "partial_rotary_factor", 0.0, 1.0, &part, st)) != ST_OK)
        return rc;
    if (part < 1.0)
        return model_unsupported(src.file, field, "a partial_rotary_factor", "1", st);
    if (strcmp(type, "default") == 0)
        return ST_OK;
    if (r->scaling != ROPE_PLAIN)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %s: a scaling, expected one in rope_scaling or here, not both",
                          src.file, field);
    if (strcmp(type, "linear") == 0) {
        r->scaling = ROPE_LINEAR;
        return read_factor(src, r, st);
    }
    if (strcmp(type, "llama3") == 0) {
        r->scaling = ROPE_LLAMA3;
        return read_llama3(src, r, st);
    }
    if (strcmp(type, "yarn") == 0) {
        r->scaling = ROPE_YARN;
        return read_yarn(src, m, r, st);
    }
    return model_unsupported(src.file, field, type, "null, default, linear, llama3 and yarn", st);
}

enum status_code model_read_rope(struct json_source src, struct model_config *m, struct status *st)
{
    enum status_code rc;
    static const char *const fields[] = {"rope_scaling", "rope_parameters"};
    m->rope = (struct rope){.theta = 10000.0, .factor = 1.0, .attention_factor = 1.0};
    if ((rc = json_read_double(src, "rope_theta", 1.0, MAX_THETA, &m->rope.theta, st)) != ST_OK)
        return rc;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        const json_t *v = json_object_get(src.obj, fields[i]);
        if (!v || json_is_null(v))
            continue;
        if (!json_is_object(v))
            return status_set(st, ST_INVALID_ARGUMENT, "%s: %s: expected an object or null", src.file, fields[i]);
        const char *type = i == 1 ? "default" : "a scaling without rope_type";
        if ((rc = read_scaling((struct json_source){src.file, v}, fields[i], type, m, st)) != ST_OK)
            return rc;
    }
    if (m->rope.scaling == ROPE_YARN)
        return model_check_yarn(src.file, m, st);
    return ST_OK;
}

/* Published models give the stretched context as original times factor and leave max_position_embeddings as it was. */
enum status_code model_check_yarn(const char *file, struct model_config *m, struct status *st)
{
    if (m->rope.theta <= 1.0)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: rope_theta: %g, expected more than 1 with yarn", file,
                          m->rope.theta);
    double reach = m->rope.original_context * m->rope.factor;
    if (reach > m->max_context)
        m->max_context = reach < MODEL_MAX_CONTEXT ? (uint32_t)reach : MODEL_MAX_CONTEXT;
    return ST_OK;
}
