/* attention_cuda.cu - the portable CUDA back end: mma.sync, cp.async, sm_80 and newer. Host side: memory and launches. */
#include <cmath>
#include <cstdlib>

#include "attention/attention_cuda.cuh"
#include "attention/attention_launch.cuh"

namespace
{
constexpr float LOG2_E = 1.4426950408889634f;
constexpr uint32_t MAX_DECODE_PARTS = 64;

struct cuda_state {
    attn_gpu_config cfg;
    const cuda_kernel *kernel;
    uint32_t sms;
    uint32_t blocks; /* of a launch */
    bool early;      /* the device knows launches that begin early */
    cuda_workspace ws;
    char *memory;
    uint64_t bytes;
    cudaStream_t side; /* ATTN_GPU_STREAMS: decode's */
    cudaEvent_t fork, join;
};

enum status_code failed(struct status *st, enum status_code code, cudaError_t err, const char *what)
{
    return status_set(st, code, "%s: %s (%s)", what, cudaGetErrorString(err), cudaGetErrorName(err));
}

const cuda_kernel *kernel_for(uint32_t head_dim, attn_dtype dtype)
{
    const cuda_kernel *by_dtype = head_dim <= 64    ? cuda_kernels_64
                                  : head_dim <= 128 ? cuda_kernels_128
                                                    : cuda_kernels_256;
    return &by_dtype[dtype == ATTN_F16];
}

enum status_code query(const struct attn_gpu_config *cfg, struct status *st)
{
    int major = 0, minor = 0, shared = 0;
    cudaError_t err = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, cfg->device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, cfg->device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, cfg->device);
    if (err != cudaSuccess)
        return failed(st, ST_UNIMPLEMENTED, err, "cudaDeviceGetAttribute");
    if (major < 8)
        return status_set(st, ST_UNIMPLEMENTED, "CUDA device %d: compute capability %d.%d, expected 8.0 or newer",
                          cfg->device, major, minor);
    if (cfg->max_seqs > PLAN_MAX_SEQS)
        return status_set(st, ST_UNIMPLEMENTED, "max_seqs: %u, this back end takes at most %u", cfg->max_seqs,
                          PLAN_MAX_SEQS);
    uint32_t needed = kernel_for(cfg->head_dim, cfg->dtype)->shared_bytes + 1024;
    if (needed > (uint32_t)shared)
        return status_set(st, ST_UNIMPLEMENTED, "CUDA device %d: %d bytes of shared memory per block, expected %u",
                          cfg->device, shared, needed);
    return ST_OK;
}

/* Pieces of one allocation; with base NULL they only add up. */
struct arena {
    char *base;
    uint64_t used;
};

template <typename T> void take(arena *a, T **out, uint64_t n)
{
    if (a->base)
        *out = (T *)(a->base + a->used);
    a->used += (n * sizeof(T) + 255) / 256 * 256;
}

void size_lists(cuda_state *s)
{
    const attn_gpu_config *c = &s->cfg;
    uint64_t group = c->heads / c->kv_heads, fixed = c->fixed_split_keys;
    uint64_t slots[ROLES] = {4 * s->blocks, 8 * s->blocks}; /* see rule_for in the planner */
    if (fixed) {
        uint64_t by_tokens = c->max_kv_tokens / fixed + c->max_seqs,
                 by_parts = (uint64_t)c->max_seqs * MAX_DECODE_PARTS;
        slots[ROLE_PREFILL] = 0;
        slots[ROLE_DECODE] = c->kv_heads * (by_tokens < by_parts ? by_tokens : by_parts);
    }
    if (c->batch_invariant)
        slots[ROLE_PREFILL] = slots[ROLE_DECODE] = 0;
    uint64_t units[ROLES] = {c->kv_heads * ((uint64_t)c->max_rows * group / s->kernel->unit_rows + c->max_seqs),
                             (uint64_t)c->kv_heads * c->max_seqs};
    for (uint32_t r = 0; r < ROLES; r++) {
        s->ws.max_slots[r] = (uint32_t)slots[r];
        s->ws.max_items[r] = (uint32_t)(units[r] + slots[r]);
    }
}

void lay_out(cuda_state *s, arena *a)
{
    const uint32_t rows[ROLES] = {s->kernel->unit_rows, DECODE_ROWS};
    take(a, &s->ws.lists, 1);
    take(a, &s->ws.counters, 2);
    for (uint32_t r = 0; r < ROLES; r++)
        take(a, &s->ws.arrived[r], s->ws.max_slots[r]);
    for (uint32_t r = 0; r < ROLES; r++) {
        uint64_t n = (uint64_t)s->ws.max_slots[r] * rows[r];
        take(a, &s->ws.items[r], s->ws.max_items[r]);
        take(a, &s->ws.weights[r], n);
        take(a, &s->ws.sums[r], n * s->kernel->padded_dim);
    }
}

void destroy(void *state)
{
    cuda_state *s = (cuda_state *)state;
    if (!s)
        return;
    if (s->join)
        cudaEventDestroy(s->join);
    if (s->fork)
        cudaEventDestroy(s->fork);
    if (s->side)
        cudaStreamDestroy(s->side);
    cudaFree(s->memory);
    free(s);
}

enum status_code prepare_streams(cuda_state *s, struct status *st)
{
    cudaError_t err = cudaStreamCreateWithFlags(&s->side, cudaStreamNonBlocking);
    if (err == cudaSuccess)
        err = cudaEventCreateWithFlags(&s->fork, cudaEventDisableTiming);
    if (err == cudaSuccess)
        err = cudaEventCreateWithFlags(&s->join, cudaEventDisableTiming);
    return err == cudaSuccess ? ST_OK : failed(st, ST_INTERNAL, err, "a second stream for attention");
}

enum status_code create(void **state, const struct attn_gpu_config *cfg, struct status *st)
{
    cuda_state *s = (cuda_state *)calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "attention", sizeof *s);
    s->cfg = *cfg;
    s->kernel = kernel_for(cfg->head_dim, cfg->dtype);
    enum status_code rc = ST_OK;
    arena a = {};
    int sms = 0, per_sm = 0, major = 0;
    cudaError_t err = cudaSetDevice(cfg->device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, cfg->device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, cfg->device);
    if (err == cudaSuccess)
        err = cudaFuncSetAttribute((const void *)s->kernel->run, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)s->kernel->shared_bytes);
    if (err == cudaSuccess)
        err = cuda_prepare_decode(cfg->head_dim, cfg->dtype);
    if (err == cudaSuccess)
        err = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, (const void *)s->kernel->run, THREADS,
                                                            s->kernel->shared_bytes);
    if (err != cudaSuccess) {
        rc = failed(st, ST_INTERNAL, err, "attention kernels");
        goto fail;
    }
    s->sms = (uint32_t)sms;
    s->early = major >= 9 && cfg->policy != ATTN_GPU_STREAMS;
    s->blocks = s->sms * (per_sm < (int)BLOCKS_PER_SM ? (uint32_t)per_sm : BLOCKS_PER_SM);
    size_lists(s);
    lay_out(s, &a);
    s->bytes = a.used;
    err = cudaMalloc((void **)&s->memory, s->bytes);
    if (err != cudaSuccess) {
        cudaGetLastError(); /* not the next call's */
        rc = status_set(st, ST_RESOURCE_EXHAUSTED, "attention workspace: %llu bytes of device memory: %s",
                        (unsigned long long)s->bytes, cudaGetErrorString(err));
        goto fail;
    }
    a.base = s->memory;
    a.used = 0;
    lay_out(s, &a);
    /* Counters and numbers of arrived parts, which stand in front of everything else. */
    err = cudaMemset(s->memory, 0, (uint64_t)((char *)s->ws.items[0] - s->memory));
    if (err == cudaSuccess)
        err = cudaDeviceSynchronize();
    if (err != cudaSuccess) {
        rc = failed(st, ST_INTERNAL, err, "attention workspace");
        goto fail;
    }
    if (cfg->policy == ATTN_GPU_STREAMS)
        rc = prepare_streams(s, st);
    if (rc != ST_OK)
        goto fail;
    *state = s;
    return ST_OK;
fail:
    destroy(s);
    return rc;
}

uint64_t workspace_bytes(const void *state)
{
    return ((const cuda_state *)state)->bytes;
}

const uint32_t *fault(const void *state)
{
    return &((const cuda_state *)state)->ws.lists->fault;
}

enum status_code plan(void *state, const struct attn_gpu_step *step, struct status *st)
{
    const cuda_state *s = (const cuda_state *)state;
    cuda_plan_args a = {};
    a.seq = step->seq;
    a.counts = step->counts;
    a.max_seqs = step->max_seqs;
    a.max_rows = step->max_rows;
    a.max_seq_rows = step->max_seq_rows;
    a.max_kv_len = s->cfg.max_kv_len;
    a.group = s->cfg.heads / s->cfg.kv_heads;
    a.kv_heads = s->cfg.kv_heads;
    a.window = s->cfg.window;
    a.unit_rows = s->kernel->unit_rows;
    a.blocks = s->blocks;
    a.fixed_tiles = s->cfg.fixed_split_keys / TILE_KEYS;
    a.one_way = s->cfg.batch_invariant;
    a.ws = s->ws;
    cudaError_t err = cuda_launch_plan(a, (cudaStream_t)step->stream);
    return err == cudaSuccess ? ST_OK : failed(st, ST_INTERNAL, err, "attention plan");
}

/* Launches for the lists of `roles`, bits; set is which counters are theirs. */
cudaError_t launch(const cuda_state *s, cuda_run_args *a, uint32_t roles, uint32_t set, uint32_t blocks, void *stream)
{
    a->roles = roles;
    a->sms = s->sms;
    for (uint32_t r = 0; r < ROLES; r++) { /* as the kernel counts */
        uint32_t rounds = blocks / s->sms;
        a->taken[r] = roles != BOTH_ROLES ? blocks : (rounds + (r == ROLE_PREFILL)) / ROLES * s->sms;
    }
    a->counters = s->ws.counters + set;
    const cuda_kernel *k = s->kernel;
    if (roles == 1 << ROLE_DECODE)
        return attn_launch(k->decode, {blocks, THREADS, k->decode_bytes, s->early, (cudaStream_t)stream}, *a);
    return attn_launch(k->run, {blocks, THREADS, k->shared_bytes, s->early, (cudaStream_t)stream}, *a);
}

/* Decode's work on the side stream, between prefill's and whatever comes behind. One block of each per SM. */
cudaError_t launch_on_two(const cuda_state *s, cuda_run_args *a, void *stream)
{
    cudaError_t err = cudaEventRecord(s->fork, (cudaStream_t)stream);
    if (err == cudaSuccess)
        err = cudaStreamWaitEvent(s->side, s->fork, 0);
    if (err == cudaSuccess)
        err = launch(s, a, 1 << ROLE_DECODE, 1, s->sms, s->side);
    if (err == cudaSuccess)
        err = launch(s, a, 1 << ROLE_PREFILL, 0, s->sms, stream);
    if (err == cudaSuccess)
        err = cudaEventRecord(s->join, s->side);
    if (err == cudaSuccess)
        err = cudaStreamWaitEvent((cudaStream_t)stream, s->join, 0);
    return err;
}

enum status_code run(void *state, const struct attn_gpu_step *step, const struct attn_gpu_io *io, struct status *st)
{
    const cuda_state *s = (const cuda_state *)state;
    const attn_gpu_config *c = &s->cfg;
    cuda_run_args a = {};
    a.q = (const char *)io->q;
    a.out = (char *)io->out;
    a.q_row_stride = io->q_row_stride;
    a.out_row_stride = io->out_row_stride;
    a.kv_offset = io->kv_offset;
    a.token_stride = c->token_stride;
    a.head_stride = c->head_stride;
    a.group = c->heads / c->kv_heads;
    a.head_dim = c->head_dim;
    a.window = c->window;
    a.ws = s->ws;
    a.bent = c->soft_cap > 0 || !(c->scale > 0);
    a.score_scale = a.bent ? 1 : c->scale * LOG2_E;
    a.bend_in = c->soft_cap > 0 ? c->scale / c->soft_cap : 0;
    a.bend_out = (c->soft_cap > 0 ? c->soft_cap : c->scale) * LOG2_E;

    bool decodes_only = step->max_seq_rows * a.group <= DECODE_ROWS;
    cudaError_t err;
    if (c->batch_invariant) {
        err = launch(s, &a, 1 << ROLE_PREFILL, 0, s->blocks, step->stream);
    } else if (decodes_only || c->policy == ATTN_GPU_AUTO || c->policy == ATTN_GPU_FUSED) {
        err = launch(s, &a, decodes_only ? 1 << ROLE_DECODE : BOTH_ROLES, 0, s->blocks, step->stream);
    } else if (c->policy == ATTN_GPU_SERIAL) {
        err = launch(s, &a, 1 << ROLE_PREFILL, 0, s->blocks, step->stream);
        if (err == cudaSuccess)
            err = launch(s, &a, 1 << ROLE_DECODE, 0, s->blocks, step->stream);
    } else {
        err = launch_on_two(s, &a, step->stream);
    }
    return err == cudaSuccess ? ST_OK : failed(st, ST_INTERNAL, err, "attention kernel");
}
} // namespace

cudaError_t cuda_prepare_decode(uint32_t head_dim, attn_dtype dtype)
{
    const cuda_kernel *k = kernel_for(head_dim, dtype);
    return cudaFuncSetAttribute((const void *)k->decode, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)k->decode_bytes);
}

cudaError_t cuda_launch_decode(cuda_run_args a, attn_dtype dtype, cudaStream_t stream)
{
    const cuda_kernel *k = kernel_for(a.head_dim, dtype);
    const uint32_t blocks = BLOCKS_PER_SM * a.sms;
    a.roles = 1 << ROLE_DECODE;
    a.taken[ROLE_DECODE] = a.follows ? 0 : blocks;
    return attn_launch(k->decode, {blocks, THREADS, k->decode_bytes, true, stream}, a);
}

extern const struct attn_gpu_ops attn_gpu_ops_cuda = {
    "cuda", query, create, destroy, workspace_bytes, fault, NULL, NULL, plan, run,
};
