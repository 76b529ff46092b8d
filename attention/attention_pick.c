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
    return attn_gpu_pick_of(attn_gpu_back_ends, cfg, st);
}
