/* model_source.h - the tensors of a model, whichever kind of file they come from. Prefix model_source_.
 *
 * A folder has safetensors files (safetensors.h); a path that is a file is a GGUF file (proto/gguf.h). Tensors are asked for
 * by the names of Hugging Face's files, and come with their shapes: "model.layers.3.self_attn.q_proj.weight", [rows, cols].
 */
#ifndef TANDEM_MODEL_SOURCE_H
#define TANDEM_MODEL_SOURCE_H

#include <stdbool.h>

#include "worker/model_config.h"
#include "worker/quant.h"
#include "worker/safetensors.h"

struct model_source;

struct model_tensor {
    const char *name; /* in the file */
    const char *file;
    enum mat_dtype dtype;      /* of quantised values what they become: MAT_F32 */
    const struct quant *quant; /* NULL: not quantised */
    /* Of the rotated projections in GGUF files of the architecture "llama", else 0: heads of so many rows, in which row
     * 2i is our row i and row 2i + 1 our row i + D/2, as the pairs of the rotary embedding stand beside each other there. */
    uint32_t paired_rows;
    uint32_t dims;
    uint64_t shape[SAFETENSORS_MAX_DIMS]; /* row-major */
    const uint8_t *data;                  /* to be read by mapped_read, as the file may be cut meanwhile */
};

/* The model is what model_config_load said of the same path; it outlives the source. NOT_FOUND, DATA_LOSS, UNIMPLEMENTED,
 * RESOURCE_EXHAUSTED. */
STATUS_MUST_CHECK enum status_code model_source_open(struct model_source **out, const char *path,
                                                     const struct model_config *m, struct status *st);
void model_source_close(struct model_source *s); /* NULL is fine */

/* DATA_LOSS when there is none of that name, UNIMPLEMENTED for its type. The strings and the data live as long as s. */
STATUS_MUST_CHECK enum status_code model_source_get(struct model_tensor *out, const struct model_source *s,
                                                    const char *name, struct status *st);
/* DATA_LOSS when a file was written to since it was opened. */
STATUS_MUST_CHECK enum status_code model_source_check_unchanged(const struct model_source *s, struct status *st);

/* "blk.3.attn_q.weight" for the name above; as it is for a name that is none of those. For tests, too. */
void model_source_gguf_name(char *out, size_t room, const char *name);

#endif
