/* attention_sm90.cu - the Hopper back end: wgmma and the copy engine. Host side: memory and launches. */
#include <cmath>
#include <cstdlib>

#include "attention/attention_cuda.cuh"
#include "attention/attention_launch.cuh"
#include "attention/attention_sm90.cuh"

namespace
{
constexpr float LOG2_E = 1.4426950408889634f;
constexpr uint32_t MAX_HEAD_DIM = 128;

struct sm90_state {
    attn_gpu_config cfg;
    const sm90_kernels *kernels;
    uint32_t sms;
    sm90_workspace ws;
    sm90_map map; /* without base and length */
    char *memory;
    uint64_t bytes;
    cudaStream_t side; /* ATTN_GPU_STREAMS: decode's */
    cudaEvent_t fork, join;
};

enum status_code failed(struct status *st, enum status_code code, cudaError_t err, const char *what)
{
    return status_set(st, code, "%s: %s (%s)", what, cudaGetErrorString(err), cudaGetErrorName(err));
}

enum status_code query(const struct attn_gpu_config *cfg, struct status *st)
{
    int major = 0, minor = 0;
    cudaError_t err = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, cfg->device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, cfg->device);
    if (err != cudaSuccess)
        return failed(st, ST_UNIMPLEMENTED, err, "cudaDeviceGetAttribute");
    if (major != 9 || minor != 0)
        return status_set(st, ST_UNIMPLEMENTED, "CUDA device %d: compute capability %d.%d, expected 9.0", cfg->device,
                          major, minor);
    if (cfg->batch_invariant)
        return status_set(st, ST_UNIMPLEMENTED, "batch_invariant: the portable back end has it");
    if (cfg->head_dim > MAX_HEAD_DIM)
        return status_set(st, ST_UNIMPLEMENTED, "head_dim: %u, this back end takes at most %u", cfg->head_dim,
                          MAX_HEAD_DIM);
    if (cfg->max_seqs > PLAN_MAX_SEQS)
        return status_set(st, ST_UNIMPLEMENTED, "max_seqs: %u, this back end takes at most %u", cfg->max_seqs,
                          PLAN_MAX_SEQS);
    const uint64_t group = cfg->heads / cfg->kv_heads;
    if ((cfg->max_rows * group + UNIT_ROWS) * (group - 1) >> 32) /* sm90_by_group */
        return status_set(st, ST_UNIMPLEMENTED,
                          "max_rows: %u with %llu query heads per KV head, this back end takes %llu", cfg->max_rows,
                          (unsigned long long)group,
                          (unsigned long long)(((1ull << 32) / (group - 1) - UNIT_ROWS) / group));
    if (cfg->token_stride >> 40)
        return status_set(st, ST_UNIMPLEMENTED, "token_stride: %llu, this back end takes less than 2^40",
                          (unsigned long long)cfg->token_stride);
    return ST_OK;
}

bool bent(const attn_gpu_config *c)
{
    return c->soft_cap > 0 || !(c->scale > 0);
}

/* Whether all sequences of a step are decode's by their rows. */
bool decodes_only(const sm90_state *s, const struct attn_gpu_step *step)
{
    return step->max_seq_rows * (s->cfg.heads / s->cfg.kv_heads) <= DECODE_ROWS;
}

/* Steps that can have one chunk only are one launch of prefill's, under AUTO, whatever their rows. */
bool one_chunk(const sm90_state *s, const struct attn_gpu_step *step)
{
    const attn_gpu_config *c = &s->cfg;
    return c->policy == ATTN_GPU_AUTO && !c->fixed_split_keys && step->max_seqs == 1 && !decodes_only(s, step);
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

void size_lists(sm90_state *s)
{
    uint64_t slots[ROLES], units[ROLES];
    sm90_slots(&s->cfg, s->sms, slots);
    sm90_units(&s->cfg, units);
    for (uint32_t r = 0; r < ROLES; r++) {
        s->ws.max_slots[r] = (uint32_t)slots[r];
        s->ws.max_items[r] = (uint32_t)(units[r] + slots[r]);
    }
}

void lay_out(sm90_state *s, arena *a)
{
    const uint32_t rows[ROLES] = {UNIT_ROWS, DECODE_ROWS};
    take(a, &s->ws.lists, 1);
    take(a, &s->ws.counters, 2);
    for (uint32_t r = 0; r < ROLES; r++)
        take(a, &s->ws.arrived[r], (uint64_t)ARRIVED_PER_SLOT[r] * s->ws.max_slots[r]);
    take(a, &s->ws.k_maps, s->cfg.max_seqs);
    take(a, &s->ws.v_maps, s->cfg.max_seqs);
    for (uint32_t i = 0; i < 2 * ROLES; i++)
        take(a, &s->ws.offsets[i], s->cfg.max_seqs);
    for (uint32_t r = 0; r < ROLES; r++) {
        uint64_t n = (uint64_t)s->ws.max_slots[r] * rows[r];
        take(a, &s->ws.items[r], s->ws.max_items[r]);
        take(a, &s->ws.weights[r], n);
        take(a, &s->ws.sums[r], n * s->kernels->padded_dim);
    }
}

void destroy(void *state)
{
    sm90_state *s = (sm90_state *)state;
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

cudaError_t prepare_kernels(const sm90_kernels *k)
{
    const sm90_kernel *const all[] = {&k->prefill, &k->decode, &k->fused, &k->prefill_beside, &k->decode_beside};
    cudaError_t err = cudaSuccess;
    for (const sm90_kernel *one : all)
        if (err == cudaSuccess)
            err = cudaFuncSetAttribute((const void *)one->run, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       (int)one->shared_bytes);
    return err;
}

enum status_code allocate(sm90_state *s, struct status *st)
{
    arena a = {};
    lay_out(s, &a);
    s->bytes = a.used;
    cudaError_t err = cudaMalloc((void **)&s->memory, s->bytes);
    if (err != cudaSuccess) {
        cudaGetLastError(); /* not the next call's */
        return status_set(st, ST_RESOURCE_EXHAUSTED, "attention workspace: %llu bytes of device memory: %s",
                          (unsigned long long)s->bytes, cudaGetErrorString(err));
    }
    a.base = s->memory;
    a.used = 0;
    lay_out(s, &a);
    /* Counters and numbers of arrived parts, which stand in front of everything else. */
    err = cudaMemset(s->memory, 0, (uint64_t)((char *)s->ws.k_maps - s->memory));
    if (err == cudaSuccess)
        err = cudaDeviceSynchronize();
    if (err == cudaSuccess)
        err = sm90_map_template(&s->map, s->cfg.head_dim, s->cfg.token_stride, s->cfg.dtype == ATTN_BF16, s->memory);
    return err == cudaSuccess ? ST_OK : failed(st, ST_INTERNAL, err, "attention workspace");
}

enum status_code prepare_streams(sm90_state *s, struct status *st)
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
    sm90_state *s = (sm90_state *)calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "attention", sizeof *s);
    s->cfg = *cfg;
    s->kernels = &(cfg->head_dim <= 64 ? sm90_kernels_64 : sm90_kernels_128)[bent(cfg)][cfg->dtype == ATTN_F16];
    int sms = 0;
    enum status_code rc = ST_OK;
    cudaError_t err = cudaSetDevice(cfg->device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, cfg->device);
    if (err == cudaSuccess)
        err = prepare_kernels(s->kernels);
    if (err == cudaSuccess)
        err = cuda_prepare_decode(cfg->head_dim, cfg->dtype);
    if (err != cudaSuccess) {
        rc = failed(st, ST_INTERNAL, err, "attention kernels");
        goto fail;
    }
    s->sms = (uint32_t)sms;
    size_lists(s);
    rc = allocate(s, st);
    if (rc == ST_OK && cfg->policy == ATTN_GPU_STREAMS)
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
    return ((const sm90_state *)state)->bytes;
}

const uint32_t *fault(const void *state)
{
    return &((const sm90_state *)state)->ws.lists->fault;
}

sm90_shape shape_of(const sm90_state *s, const struct attn_gpu_step *step)
{
    sm90_shape a = {};
    a.group = s->cfg.heads / s->cfg.kv_heads;
    a.kv_heads = s->cfg.kv_heads;
    a.head_dim = s->cfg.head_dim;
    a.bent = bent(&s->cfg);
    a.window = s->cfg.window;
    a.sms = s->sms;
    a.fixed_tiles = s->cfg.fixed_split_keys / TILE_KEYS;
    a.max_rows = step->max_rows;
    a.max_seq_rows = step->max_seq_rows;
    a.max_kv_len = s->cfg.max_kv_len;
    a.policy = s->cfg.policy;
    a.way = step->way;
    a.prefill_only = one_chunk(s, step);
    return a;
}

enum status_code plan(void *state, const struct attn_gpu_step *step, struct status *st)
{
    const sm90_state *s = (const sm90_state *)state;
    const sm90_plan_args a = {step->seq, step->counts, step->max_seqs, shape_of(s, step), s->ws};
    cudaError_t err = sm90_launch_maps(step->seq, step->counts, step->max_seqs, s->map, s->ws.k_maps, s->ws.v_maps,
                                       (cudaStream_t)step->stream);
    if (err == cudaSuccess)
        err = sm90_launch_plan(a, (cudaStream_t)step->stream);
    return err == cudaSuccess ? ST_OK : failed(st, ST_INTERNAL, err, "attention plan");
}

static_assert(ATTN_WAY_SERIAL + 1 == ATTN_GPU_WAYS, "the way that some heads never take is the last");

uint32_t ways(const void *state)
{
    const struct attn_gpu_step none = {};
    const sm90_shape shape = shape_of((const sm90_state *)state, &none);
    return sm90_ways(&shape);
}

enum attn_gpu_way choose(const void *state, const struct attn_seq *seq, uint32_t seqs)
{
    const sm90_state *s = (const sm90_state *)state;
    struct attn_gpu_step step = {};
    step.max_seqs = s->cfg.max_seqs;
    step.max_rows = step.max_seq_rows = s->cfg.max_rows;
    const sm90_shape shape = shape_of(s, &step);
    return sm90_choose(&shape, seq, seqs);
}

cudaError_t launch(const sm90_state *s, const sm90_kernel &k, sm90_args a, uint32_t set, void *stream)
{
    a.run.counters = s->ws.counters + set;
    const bool early = s->cfg.policy != ATTN_GPU_STREAMS;
    const uint32_t blocks = s->sms / CLUSTER * CLUSTER * k.blocks_per_sm;
    return attn_launch(k.run, {blocks, k.threads, k.shared_bytes, early, (cudaStream_t)stream}, a);
}

/* Decode's kernel on the side stream, beside prefill's: one block of each fits on an SM. */
cudaError_t launch_on_two(const sm90_state *s, const sm90_args &a, void *stream)
{
    cudaError_t err = cudaEventRecord(s->fork, (cudaStream_t)stream);
    if (err == cudaSuccess)
        err = cudaStreamWaitEvent(s->side, s->fork, 0);
    if (err == cudaSuccess)
        err = launch(s, s->kernels->decode_beside, a, 1, s->side);
    if (err == cudaSuccess)
        err = launch(s, s->kernels->prefill_beside, a, 0, stream);
    if (err == cudaSuccess)
        err = cudaEventRecord(s->join, s->side);
    if (err == cudaSuccess)
        err = cudaStreamWaitEvent((cudaStream_t)stream, s->join, 0);
    return err;
}

sm90_args run_args(const sm90_state *s, const struct attn_gpu_io *io)
{
    const attn_gpu_config *c = &s->cfg;
    sm90_args a = {};
    sm90_run_args *r = &a.run;
    r->q = (const char *)io->q;
    r->out = (char *)io->out;
    r->q_row_stride = io->q_row_stride;
    r->out_row_stride = io->out_row_stride;
    r->kv_offset = io->kv_offset;
    r->head_stride = c->head_stride;
    r->group = c->heads / c->kv_heads;
    r->group_inverse = (uint32_t)((0x100000000 + r->group - 1) / r->group); /* of 1 not used */
    r->head_dim = c->head_dim;
    r->window = c->window;
    r->ws = s->ws;
    r->score_scale = bent(c) ? 1 : c->scale * LOG2_E;
    r->bend_in = c->soft_cap > 0 ? c->scale / c->soft_cap : 0;
    r->bend_out = (c->soft_cap > 0 ? c->soft_cap : c->scale) * LOG2_E;
    return a;
}

/* Decode's list, or what is left of it. Alone, and behind prefill as by the serial policy, by the portable kernel, which begins and ends
 * sooner; where it shares a step's SMs with prefill (decode_follows, whether there is any or not) the other is faster
 * (attention_h200_shapes.txt), but for bent scores and for heads that do not fill its boxes. Under a fixed cut bits are those of one kernel. */
cudaError_t launch_decode(const sm90_state *s, const sm90_args &a, void *stream)
{
    const sm90_run_args &r = a.run;
    if (s->cfg.fixed_split_keys || (r.decode_follows && sm90_fills(s->cfg.head_dim) && !bent(&s->cfg)))
        return launch(s, s->kernels->decode, a, 0, stream);
    cuda_run_args c = {};
    c.q = r.q;
    c.out = r.out;
    c.q_row_stride = r.q_row_stride;
    c.out_row_stride = r.out_row_stride;
    c.kv_offset = r.kv_offset;
    c.token_stride = s->cfg.token_stride;
    c.head_stride = r.head_stride;
    c.group = r.group;
    c.head_dim = r.head_dim;
    c.window = r.window;
    c.sms = s->sms;
    c.follows = r.decode_follows;
    c.score_scale = r.score_scale;
    c.bent = bent(&s->cfg);
    c.bend_in = r.bend_in;
    c.bend_out = r.bend_out;
    c.counters = s->ws.counters;
    c.ws.lists = s->ws.lists;
    for (uint32_t i = 0; i < ROLES; i++) {
        c.ws.items[i] = s->ws.items[i];
        c.ws.max_items[i] = s->ws.max_items[i];
        c.ws.arrived[i] = s->ws.arrived[i];
        c.ws.sums[i] = s->ws.sums[i];
        c.ws.weights[i] = s->ws.weights[i];
    }
    return cuda_launch_decode(c, s->cfg.dtype, (cudaStream_t)stream);
}

cudaError_t launch_serial(const sm90_state *s, const sm90_args &a, const struct attn_gpu_step *step)
{
    const cudaError_t err = launch(s, s->kernels->prefill, a, 0, step->stream);
    return err == cudaSuccess ? launch_decode(s, a, step->stream) : err;
}

/* AUTO: by the step's way. Under a fixed cut prefill has one kernel, the fused one, for the bits, and decode's takes what that leaves. */
cudaError_t launch_auto(const sm90_state *s, sm90_args a, const struct attn_gpu_step *step)
{
    const bool fixed = s->cfg.fixed_split_keys != 0, fused = fixed || step->way == ATTN_WAY_FUSED;
    if (one_chunk(s, step))
        return launch(s, s->kernels->prefill, a, 0, step->stream);
    if (!fixed && step->way == ATTN_WAY_SERIAL)
        return launch_serial(s, a, step);
    a.run.decode_follows = step->max_seqs > 1 && (fixed || !fused);
    cudaError_t err = launch(s, fused ? s->kernels->fused : s->kernels->prefill, a, 0, step->stream);
    return err == cudaSuccess && a.run.decode_follows ? launch_decode(s, a, step->stream) : err;
}

cudaError_t launch_roles(const sm90_state *s, const sm90_args &a, const struct attn_gpu_step *step)
{
    if (decodes_only(s, step))
        return launch_decode(s, a, step->stream);
    switch (s->cfg.policy) {
    case ATTN_GPU_AUTO:
        return launch_auto(s, a, step);
    case ATTN_GPU_FUSED:
        return launch(s, s->kernels->fused, a, 0, step->stream);
    case ATTN_GPU_SERIAL:
        return launch_serial(s, a, step);
    case ATTN_GPU_STREAMS:
        return launch_on_two(s, a, step->stream);
    }
    return cudaErrorInvalidValue;
}

enum status_code run(void *state, const struct attn_gpu_step *step, const struct attn_gpu_io *io, struct status *st)
{
    const sm90_state *s = (const sm90_state *)state;
    const attn_gpu_config *c = &s->cfg;
    if ((io->kv_offset + (c->kv_heads - 1) * c->head_stride) / 16 > INT32_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "kv_offset: %llu, this back end takes less than 2^35",
                          (unsigned long long)io->kv_offset);
    cudaError_t err = launch_roles(s, run_args(s, io), step);
    return err == cudaSuccess ? ST_OK : failed(st, ST_INTERNAL, err, "attention kernel");
}
} // namespace

extern const struct attn_gpu_ops attn_gpu_ops_sm90 = {
    "sm90", query, create, destroy, workspace_bytes, fault, ways, choose, plan, run,
};
