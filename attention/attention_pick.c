/* attention_pick.c - the back ends on a GPU that this build has, fastest first. Linked with the CUDA code only. */
#include "attention/attention_internal.h"

const struct attn_gpu_ops *const attn_gpu_back_ends[] = {
#ifdef TANDEM_ATTENTION_SM90
    &attn_gpu_ops_sm90,
#endif
    &attn_gpu_ops_cuda,
    NULL,
};

enum status_code attn_gpu_pick(struct attn_gpu_config *cfg, struct status *st)
{
    for (uint32_t i = 0; attn_gpu_back_ends[i]; i++) {
        enum status_code rc = attn_gpu_back_ends[i]->query(cfg, st);
        if (rc == ST_OK) {
            cfg->ops = attn_gpu_back_ends[i];
            return ST_OK;
        }
        if (rc != ST_UNIMPLEMENTED)
            return rc;
    }
    return ST_UNIMPLEMENTED; /* the last one's reason */
}
