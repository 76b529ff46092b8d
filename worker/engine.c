#include "worker/engine.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "worker/engine_internal.h"

#define DEFAULT_SLOTS       256
#define DEFAULT_STEP_TOKENS 512
#define DEFAULT_TUNE_MS     500
#define MAX_SLOTS           65536u
#define MAX_STEP_TOKENS     65536u

_Static_assert(ENGINE_MAX_EOS == MODEL_MAX_EOS, "eos_ids is copied whole");

/* ---- create ---- */

/* What went on since the last phase ended was this one. Only reported: no decision rests on it. */
static void end_phase(struct engine *e, const char *name)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    double now_ms = (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
    if (name && e->info.phases < ENGINE_PHASES_MAX)
        e->info.phase[e->info.phases++] = (struct engine_phase){name, now_ms - e->phase_ms};
    e->phase_ms = now_ms;
}

/* The cores that this process may run on, shared among the ranks of this machine. */
static uint32_t default_threads(const struct comm *comm)
{
    cpu_set_t set;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        cores = CPU_COUNT(&set);
    uint32_t share = cores > 0 ? (uint32_t)cores / comm_local_size(comm) : 0;
    return share ? share : 1;
}

static enum status_code in_range(const char *field, uint32_t value, uint32_t min, uint32_t max, struct status *st)
{
    if (value >= min && value <= max)
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "%s: %u, expected %u to %u", field, value, min, max);
}

static enum status_code read_limits(struct engine *e, const struct engine_config *cfg, struct status *st)
{
    struct engine_info *info = &e->info;
    info->max_slots = cfg->max_slots ? cfg->max_slots : DEFAULT_SLOTS;
    info->max_step_tokens = cfg->max_step_tokens ? cfg->max_step_tokens : DEFAULT_STEP_TOKENS;
    info->max_context = cfg->max_context ? cfg->max_context : e->model.max_context;
    enum status_code rc;
    if ((rc = in_range("ranks", comm_size(cfg->comm), 1, SHARD_MAX_RANKS, st)) != ST_OK ||
        (rc = in_range("max_slots", info->max_slots, 1, MAX_SLOTS, st)) != ST_OK ||
        (rc = in_range("max_step_tokens", info->max_step_tokens, 1, MAX_STEP_TOKENS, st)) != ST_OK)
        return rc;
    /* A rank that has all from its file waits for one that measures, which only devices do. */
    const uint32_t tune_ms = cfg->tune_ms || !cfg->parts ? cfg->tune_ms : DEFAULT_TUNE_MS;
    if (comm_size(cfg->comm) > 1 && tune_ms > comm_timeout_ms(cfg->comm) / 2)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "tune_ms: %u, expected at most %u, half of what ranks wait for each other", tune_ms,
                          comm_timeout_ms(cfg->comm) / 2);
    if (info->max_context > e->model.max_context)
        return status_set(st, ST_INVALID_ARGUMENT, "max_context: %u, expected at most %u, the model's own",
                          info->max_context, e->model.max_context);
    return ST_OK;
}

#define DEFAULT_MEMORY_FRACTION 0.9
/* For what a driver takes as kernels are loaded, and for its own granularity. */
#define DEVICE_SPARE_BYTES (256ull << 20)
/* More with several ranks: what NCCL takes, and the driver for ranks that reach each other. Two H200s had 265 MiB too much in use without. */
#define DEVICE_RANKS_BYTES (384ull << 20)

/* A quarter of the machine, or of what is left of it: other programs, a container's limit. */
static uint64_t host_share(const struct engine_config *cfg)
{
    char why[128];
    uint64_t machine = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t available = kv_host_available(why, sizeof why);
    return (available < machine ? available : machine) / 4 / comm_local_size(cfg->comm);
}

/* What weights and workspace leave for the KV cache. */
static enum status_code device_share(uint64_t *out, const struct engine *e, const struct engine_config *cfg,
                                     uint64_t weight_bytes, const struct forward_config *forward, struct status *st)
{
    struct backend_memory m;
    enum status_code rc = e->parts->memory(e->parts->ctx, &m, st);
    if (rc != ST_OK)
        return rc;
    double fraction = cfg->memory_fraction > 0 ? cfg->memory_fraction : DEFAULT_MEMORY_FRACTION;
    uint64_t budget = (uint64_t)((double)m.total_bytes * fraction), used = m.total_bytes - m.free_bytes;
    uint64_t workspace;
    if ((rc = e->ops->bytes(&workspace, forward, st)) != ST_OK)
        return rc;
    const uint64_t spare = DEVICE_SPARE_BYTES + (comm_size(cfg->comm) > 1 ? DEVICE_RANKS_BYTES : 0);
    workspace += spare;
    uint64_t need = used + weight_bytes + workspace + cfg->kv_bytes;
    if (need >= budget) /* where nothing else in use would help, another try fails, too */
        return status_set(
            st, need - used >= budget ? ST_INVALID_ARGUMENT : ST_RESOURCE_EXHAUSTED,
            "%s: %.4g of %llu MiB is %llu MiB; in use already %llu, weights %llu, workspace of %u rows and "
            "%u samples %llu (%llu of it for the driver%s), KV cache %llu: together %llu MiB, %llu too many. "
            "Less is needed with fewer slots or rows a step, a smaller KV cache or more ranks to share the weights",
            e->parts->text, fraction, (unsigned long long)(m.total_bytes >> 20), (unsigned long long)(budget >> 20),
            (unsigned long long)(used >> 20), (unsigned long long)(weight_bytes >> 20), forward->max_rows,
            forward->max_samples, (unsigned long long)(workspace >> 20), (unsigned long long)(spare >> 20),
            comm_size(cfg->comm) > 1 ? " and NCCL" : "", (unsigned long long)(cfg->kv_bytes >> 20),
            (unsigned long long)(need >> 20), (unsigned long long)((need - budget) >> 20));
    *out = budget - need + cfg->kv_bytes;
    return ST_OK;
}

static enum status_code create_flight(struct engine_flight *f, uint64_t rows, struct status *st)
{
    f->row_token = calloc(rows, sizeof *f->row_token);
    f->seq = calloc(rows, sizeof *f->seq);
    f->sample = calloc(rows, sizeof *f->sample);
    f->sampled_slot = calloc(rows, sizeof *f->sampled_slot);
    f->token = calloc(rows, sizeof *f->token);
    f->sample_score = calloc(rows, sizeof *f->sample_score);
    f->prompt_score = calloc(rows, sizeof *f->prompt_score);
    if (!f->row_token || !f->seq || !f->sample || !f->sampled_slot || !f->token || !f->sample_score || !f->prompt_score)
        return status_nomem(st, "a step of the engine", rows * (sizeof *f->seq + 2 * sizeof *f->sample_score));
    return ST_OK;
}

static void free_flight(struct engine_flight *f)
{
    free(f->row_token);
    free(f->seq);
    free(f->sample);
    free(f->sampled_slot);
    free(f->token);
    free(f->sample_score);
    free(f->prompt_score);
}

static enum status_code create_buffers(struct engine *e, struct status *st)
{
    e->slot = calloc(e->info.max_slots, sizeof *e->slot);
    if (!e->slot)
        return status_nomem(st, "slots of the engine", e->info.max_slots * sizeof *e->slot);
    enum status_code rc = ST_OK;
    for (uint32_t i = 0; rc == ST_OK && i < e->info.depth; i++)
        rc = create_flight(&e->flight[i], e->info.max_step_tokens, st);
    return rc;
}

static void fill_info(struct engine *e)
{
    struct engine_info *info = &e->info;
    const struct model_config *m = &e->model;
    info->vocab_size = m->vocab_size;
    info->sample_options = e->ops->options;
    info->kv = kv_pool_account(e->kv);
    info->kv_pages_max = info->kv.total_pages;
    info->weight_bytes = e->weights.bytes;
    uint32_t threads = threads_count(e->pool);
    if (e->parts)
        snprintf(info->device, sizeof info->device, "%s", e->parts->text);
    else
        snprintf(info->device, sizeof info->device, "host, %u thread%s", threads, threads == 1 ? "" : "s");
    memcpy(info->architecture, m->architecture, sizeof info->architecture);
    info->layers = m->layers;
    info->hidden = m->hidden;
    info->heads = m->heads;
    info->kv_heads = m->kv_heads;
    info->head_dim = m->head_dim;
    info->bos_id = m->bos_id;
    memcpy(info->eos_ids, m->eos_ids, sizeof info->eos_ids);
    info->n_eos = m->n_eos;
    info->temperature = m->temperature;
    info->top_p = m->top_p;
    info->min_p = m->min_p;
    info->typical_p = m->typical_p;
    info->repetition_penalty = m->repetition_penalty;
    info->top_k = m->top_k;
}

static enum status_code load_weights(struct engine *e, const struct engine_config *cfg, struct forward_config *forward,
                                     struct status *st)
{
    struct model_loader *loader;
    enum status_code rc = model_loader_open(&loader, cfg->random_weights ? NULL : cfg->model_dir, cfg->random_weights,
                                            &e->model, &e->shard, e->parts ? &e->parts->weights : NULL, st);
    if (rc != ST_OK)
        return rc;
    const struct model_progress progress = {cfg->progress, cfg->progress_ctx};
    uint64_t share = 0;
    if (!e->parts)
        share = host_share(cfg);
    else if ((rc = device_share(&share, e, cfg, model_loader_bytes(loader), forward, st)) != ST_OK)
        goto done;
    end_phase(e, "model");
    if ((rc = engine_kv_begin(e, cfg, share, st)) == ST_OK) {
        rc = model_weights_load(&e->weights, loader, e->pool, progress, st);
        end_phase(e, "weights");
        enum status_code kv = engine_kv_look(e, st); /* what fails there is the cause of what fails here */
        rc = kv != ST_OK ? kv : rc;
    }
done:
    model_loader_close(loader);
    return rc;
}

/* Cheap things first: a wrong option is reported before gigabytes are read. */
static enum status_code create_parts(struct engine *e, const struct engine_config *cfg, struct status *st)
{
    enum status_code rc;
    uint32_t rank = comm_rank(cfg->comm), ranks = comm_size(cfg->comm);
    uint32_t threads = cfg->threads ? cfg->threads : default_threads(cfg->comm);
    if ((rc = model_config_load(&e->model, cfg->model_dir, st)) != ST_OK || (rc = read_limits(e, cfg, st)) != ST_OK)
        return rc;
    if (cfg->batch_invariant && !cfg->parts)
        return status_set(st, ST_UNIMPLEMENTED, "batch_invariant: the host back end does not have it, CUDA does");
    if (cfg->batch_invariant && cfg->all_reduce == COMM_GPU_NCCL)
        return status_set(
            st, ST_INVALID_ARGUMENT,
            "all_reduce: NCCL adds up in an order that depends on the size, expected peer memory with batch_invariant");
    e->comm = cfg->comm;
    e->timed = cfg->timed;
    e->parts = cfg->parts;
    e->ops = cfg->parts ? cfg->parts->forward : &forward_ops_host;
    e->info.depth = e->ops->start ? ENGINE_DEPTH_MAX : 1;
    shard_heads(&e->shard.heads, &e->shard.kv_heads, e->model.heads, e->model.kv_heads, rank, ranks);
    uint32_t unit = cfg->parts ? SHARD_DEVICE_UNIT : 1;
    e->shard.inner = shard_units(e->model.inner, unit, rank, ranks);
    e->shard.vocab = shard_units(e->model.vocab_size, unit, rank, ranks);
    if ((rc = threads_create(&e->pool, threads, st)) != ST_OK || (rc = create_buffers(e, st)) != ST_OK)
        return rc;
    struct forward_config forward = {
        .model = &e->model,
        .weights = &e->weights,
        .kv = &e->kv,
        .shard = &e->shard,
        .comm = cfg->comm,
        .pool = e->pool,
        .max_slots = e->info.max_slots,
        .max_rows = e->info.max_step_tokens,
        .max_samples = e->info.max_slots < e->info.max_step_tokens ? e->info.max_slots : e->info.max_step_tokens,
        .max_context = e->info.max_context,
        .eager = cfg->eager,
        .timed = cfg->timed,
        .attention = cfg->attention,
        .batch_invariant = cfg->batch_invariant,
        .all_reduce = cfg->all_reduce,
        .own_first = cfg->own_first,
        .tune_dir = cfg->tune_dir,
        .tune_ms = cfg->tune_ms ? cfg->tune_ms : DEFAULT_TUNE_MS,
        .note = cfg->note,
        .note_ctx = cfg->note_ctx,
    };
    if ((rc = load_weights(e, cfg, &forward, st)) != ST_OK)
        return rc;
    rc = e->ops->create(&e->forward, &forward, st);
    end_phase(e, "workspace");
    if (rc == ST_OK)
        rc = engine_kv_end(e, st);
    end_phase(e, "KV cache");
    return rc;
}

enum status_code engine_create(struct engine **out, const struct engine_config *cfg, struct status *st)
{
    struct engine *e = calloc(1, sizeof *e);
    if (!e)
        return status_nomem(st, "engine", sizeof *e);
    end_phase(e, NULL);
    enum status_code rc = create_parts(e, cfg, st);
    if (rc != ST_OK) {
        engine_destroy(e);
        return rc;
    }
    fill_info(e);
    *out = e;
    return ST_OK;
}

void engine_drop_options(struct engine *e, uint32_t slot)
{
    struct engine_slot *s = &e->slot[slot];
    if (s->options && e->forward && e->ops->end)
        e->ops->end(e->forward, slot);
    engine_options_destroy(s->options);
    s->options = NULL;
}

static void drop_options(struct engine *e)
{
    for (uint32_t i = 0; e->slot && i < e->info.max_slots; i++)
        engine_drop_options(e, i);
}

void engine_destroy(struct engine *e)
{
    if (!e)
        return;
    if (e->ops)
        e->ops->destroy(e->forward);
    e->forward = NULL;
    model_weights_unload(&e->weights);
    engine_kv_destroy(e);
    drop_options(e);
    free(e->slot);
    for (uint32_t i = 0; i < ENGINE_DEPTH_MAX; i++)
        free_flight(&e->flight[i]);
    threads_destroy(e->pool);
    free(e);
}

/* What ranks must have alike; more of it is compared where devices connect. */
struct rank_kind {
    char back_end[32]; /* "host", or the device's without its number */
    uint32_t max_slots, max_context, max_step_tokens;
};

static enum status_code compare_kinds(struct engine *e, struct status *st)
{
    struct rank_kind own = {
        .max_slots = e->info.max_slots, .max_context = e->info.max_context, .max_step_tokens = e->info.max_step_tokens};
    struct rank_kind all[SHARD_MAX_RANKS];
    size_t bytes[SHARD_MAX_RANKS];
    uint32_t ranks = comm_size(e->comm);
    const char *device = e->parts ? e->parts->text : "host";
    snprintf(own.back_end, sizeof own.back_end, "%.*s", (int)strcspn(device, ":"), device);
    for (uint32_t r = 0; r < ranks; r++)
        bytes[r] = sizeof own;
    enum status_code rc = comm_all_gather(e->comm, &own, all, bytes, st);
    for (uint32_t r = 1; rc == ST_OK && r < ranks; r++)
        if (memcmp(&all[r], &all[0], sizeof own) != 0)
            return status_set(
                st, ST_FAILED_PRECONDITION,
                "ranks differ: rank 0 computes on %s with %u slots, context %u, %u rows a step; rank %u on "
                "%s with %u, %u, %u. Give all the same options, and --backend where machines differ",
                all[0].back_end, all[0].max_slots, all[0].max_context, all[0].max_step_tokens, r, all[r].back_end,
                all[r].max_slots, all[r].max_context, all[r].max_step_tokens);
    return rc;
}

enum status_code engine_connect(struct engine *e, struct status *st)
{
    enum status_code rc = ST_OK;
    end_phase(e, NULL);
    if (comm_size(e->comm) > 1)
        rc = compare_kinds(e, st);
    end_phase(e, "waiting for ranks");
    if (rc == ST_OK && e->ops->connect)
        rc = e->ops->connect(e->forward, st);
    end_phase(e, "device");
    e->connected = rc == ST_OK;
    return rc;
}

struct engine_info engine_info(const struct engine *e)
{
    return e->info;
}

enum status_code engine_reset(struct engine *e, struct status *st)
{
    enum status_code rc = engine_drop_flights(e, st);
    if (rc != ST_OK)
        return rc;
    kv_pool_reset(e->kv);
    drop_options(e);
    memset(e->slot, 0, e->info.max_slots * sizeof *e->slot);
    e->step = e->done = 0;
    e->ended_us = 0;
    e->checks = 0;
    e->suspended_pages = 0;
    return ST_OK;
}
