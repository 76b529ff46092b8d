#include "tests/gpu/gpu_parts.h"
#include "tests/gpu/own_device.h"
#include "worker/engine_internal.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static _Noreturn void die(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

struct comm *gpu_comm(void)
{
    static struct comm *comm;
    struct status st = STATUS_INIT;
    const struct comm_config cfg = {.ops = getenv("OMPI_COMM_WORLD_SIZE") ? &comm_ops_mpi : &comm_ops_self};
    if (!comm && comm_create(&comm, &cfg, &st) != ST_OK)
        die("comm", st.message);
    return comm;
}

static uint32_t capability;

uint32_t gpu_capability(void)
{
    return capability;
}

const struct backend_parts *gpu_parts(const char *path)
{
    struct backend_device device;
    char own[4096] = "";
    if (!path) {
        ssize_t n = readlink("/proc/self/exe", own, sizeof own - 32);
        char *slash = n > 0 ? strrchr(own, '/') : NULL;
        if (!slash)
            die("/proc/self/exe", "cannot be read");
        strcpy(slash + 1, "backend_cuda.so");
        path = own;
    }
    if (!dlopen("libcuda.so.1", RTLD_NOW)) {
        printf("no CUDA driver: skipped\n");
        return NULL;
    }
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    void *symbol = library ? dlsym(library, BACKEND_SYMBOL) : NULL;
    if (!symbol)
        die(path, dlerror());
    backend_entry *entry;
    memcpy(&entry, &symbol, sizeof entry);
    const struct backend_api *api = entry(BACKEND_ABI);
    struct status st = STATUS_INIT;
    int taken = 0;
    if (!api)
        die(path, "is of another build");
    if (own_device(gpu_comm(), &taken, &st) != ST_OK) {
        printf("no device for each of %u ranks: skipped (%s)\n", comm_local_size(gpu_comm()), st.message);
        return NULL;
    }
    struct backend_session *session;
    if (api->open(&session, (uint32_t)taken, &st) != ST_OK || api->describe((uint32_t)taken, &device, &st) != ST_OK)
        die("device", st.message);
    capability = device.major * 10 + device.minor;
    return api->parts(session);
}

void gpu_create(struct gpu_run *r, const struct engine_config *cfg)
{
    struct status st = STATUS_INIT;
    struct engine_config c = *cfg;
    c.comm = gpu_comm();
    *r = (struct gpu_run){0};
    if (engine_create(&r->e, &c, &st) != ST_OK || (c.parts && engine_connect(r->e, &st) != ST_OK))
        die(cfg->model_dir, st.message);
    if (engine_reset(r->e, &st) != ST_OK)
        die("reset", st.message);
}

void gpu_destroy(struct gpu_run *r)
{
    struct status st = STATUS_INIT;
    if (comm_barrier(gpu_comm(), &st) != ST_OK) /* nobody reads our memory any more */
        die("barrier", st.message);
    engine_destroy(r->e);
}

static void submit(struct gpu_run *r, Tandem__V1__StepPlan *plan)
{
    struct status st = STATUS_INIT;
    plan->step = ++r->step;
    if (engine_submit(r->e, plan, &st) != ST_OK)
        die("step", st.message);
}

static void step(struct gpu_run *r, Tandem__V1__StepPlan *plan)
{
    submit(r, plan);
    gpu_collect(r);
}

static void prefill(struct gpu_run *r, Tandem__V1__PrefillChunk *chunk, const uint32_t *ids, uint32_t n,
                    Tandem__V1__SampleParams *params)
{
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    Tandem__V1__AdmitSlot admit = TANDEM__V1__ADMIT_SLOT__INIT, *admits[] = {&admit};
    admit.slot = chunk->slot;
    admit.sample = params;
    chunk->token_ids = (uint32_t *)(uintptr_t)ids; /* protobuf-c has no const */
    chunk->n_token_ids = n;
    plan.n_admits = chunk->position == 0;
    plan.n_prefills = 1;
    plan.admits = admits;
    plan.prefills = &chunk;
    step(r, &plan);
}

void gpu_prefill(struct gpu_run *r, uint32_t slot, const uint32_t *ids, uint32_t n, uint32_t position, bool sample,
                 Tandem__V1__SampleParams *params)
{
    Tandem__V1__PrefillChunk chunk = TANDEM__V1__PREFILL_CHUNK__INIT;
    chunk.slot = slot;
    chunk.position = position;
    chunk.sample = sample;
    prefill(r, &chunk, ids, n, params);
}

void gpu_score(struct gpu_run *r, uint32_t slot, const uint32_t *ids, uint32_t n, uint32_t position, uint32_t next,
               Tandem__V1__SampleParams *params)
{
    Tandem__V1__PrefillChunk chunk = TANDEM__V1__PREFILL_CHUNK__INIT;
    chunk.slot = slot;
    chunk.position = position;
    chunk.score_rows = n;
    chunk.next_token = next;
    prefill(r, &chunk, ids, n, params);
}

void gpu_decode(struct gpu_run *r, uint32_t *slots, uint32_t n)
{
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    plan.decode_slots = slots;
    plan.n_decode_slots = n;
    step(r, &plan);
}

bool gpu_decode_ahead(struct gpu_run *r, uint32_t *slots, uint32_t n)
{
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    plan.decode_slots = slots;
    plan.n_decode_slots = n;
    submit(r, &plan);
    if (engine_in_flight(r->e) < engine_info(r->e).depth)
        return false;
    gpu_collect(r);
    return true;
}

void gpu_collect(struct gpu_run *r)
{
    struct status st = STATUS_INIT;
    if (engine_collect(r->e, &r->result, &st) != ST_OK)
        die("step", st.message);
}

void gpu_hybrid(struct gpu_run *r, uint32_t *slots, uint32_t n, uint32_t slot, const uint32_t *ids, uint32_t rows,
                uint32_t position)
{
    gpu_hybrid_ahead(r, slots, n, slot, ids, rows, position);
    gpu_collect(r);
}

static void submit_hybrid(struct gpu_run *r, uint32_t *slots, uint32_t n, Tandem__V1__PrefillChunk *chunk,
                          const uint32_t *ids, uint32_t rows, Tandem__V1__SampleParams *params)
{
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    Tandem__V1__AdmitSlot admit = TANDEM__V1__ADMIT_SLOT__INIT, *admits[] = {&admit};
    admit.slot = chunk->slot;
    admit.sample = params;
    chunk->token_ids = (uint32_t *)(uintptr_t)ids;
    chunk->n_token_ids = rows;
    plan.decode_slots = slots;
    plan.n_decode_slots = n;
    plan.n_admits = chunk->position == 0;
    plan.n_prefills = 1;
    plan.admits = admits;
    plan.prefills = &chunk;
    submit(r, &plan);
}

void gpu_hybrid_ahead(struct gpu_run *r, uint32_t *slots, uint32_t n, uint32_t slot, const uint32_t *ids, uint32_t rows,
                      uint32_t position)
{
    Tandem__V1__PrefillChunk chunk = TANDEM__V1__PREFILL_CHUNK__INIT;
    chunk.slot = slot;
    chunk.position = position;
    submit_hybrid(r, slots, n, &chunk, ids, rows, NULL);
}

void gpu_hybrid_score(struct gpu_run *r, uint32_t *slots, uint32_t n, uint32_t slot, const uint32_t *ids, uint32_t rows,
                      uint32_t position, uint32_t next, Tandem__V1__SampleParams *params)
{
    Tandem__V1__PrefillChunk chunk = TANDEM__V1__PREFILL_CHUNK__INIT;
    chunk.slot = slot;
    chunk.position = position;
    chunk.score_rows = rows;
    chunk.next_token = next;
    submit_hybrid(r, slots, n, &chunk, ids, rows, params);
    gpu_collect(r);
}

void gpu_release(struct gpu_run *r, uint32_t slot)
{
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    plan.release_slots = &slot;
    plan.n_release_slots = 1;
    step(r, &plan);
}

void gpu_suspend(struct gpu_run *r, uint32_t *slots, uint32_t n)
{
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    plan.suspend_slots = slots;
    plan.n_suspend_slots = n;
    step(r, &plan);
}

void gpu_resume(struct gpu_run *r, uint32_t *slots, uint32_t n)
{
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    plan.resume_slots = slots;
    plan.n_resume_slots = n;
    step(r, &plan);
}

void gpu_logits(struct gpu_run *r, float *out)
{
    struct status st = STATUS_INIT;
    struct comm *comm = gpu_comm();
    size_t each[SHARD_MAX_RANKS], bytes[SHARD_MAX_RANKS];
    for (uint32_t i = 0; i < comm_size(comm); i++)
        each[i] = sizeof *bytes;
    size_t own = r->e->shard.vocab.count * sizeof(float);
    float *share = malloc(own + 1);
    if (!share || r->e->ops->logits(r->e->forward, share, &st) != ST_OK ||
        comm_all_gather(comm, &own, bytes, each, &st) != ST_OK ||
        comm_all_gather(comm, share, out, bytes, &st) != ST_OK)
        die("logits", st.message);
    free(share);
}

double gpu_now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

uint32_t gpu_fits(const struct gpu_run *r, uint32_t n, uint32_t more)
{
    const uint32_t most = engine_info(r->e).max_context - more;
    return n < most ? n : most;
}

bool gpu_expect(bool ok, const char *what, const char *name, uint32_t at, double value)
{
    if (!ok)
        printf("FAILED %s: %s, at %u: %g\n", name, what, at, value);
    return ok;
}
