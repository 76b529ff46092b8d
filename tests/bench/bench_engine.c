/* bench_engine.c - one rank on a model folder: decode against what the memory allows, and prefill.
 *
 *     bench_engine MODEL [threads, default 2] [decode steps, default 64]
 *
 * Limit of a decode step: every weight but the rows of the embedding that are not looked up is read once, at the read
 * bandwidth of the machine. Each timed step is followed by a plain read, with the same threads, of a buffer as large as
 * those weights: so both meet the same disturbance by other programs and the same caches. Compared are medians with
 * medians and best with best.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "worker/engine_internal.h"

enum { CHUNK = 1 << 18, PREFILL = 512, CONTEXT = 128, MAX_STEPS = 4096, BATCH = 16 };

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static void die(const char *what, const struct status *st)
{
    fprintf(stderr, "bench_engine: %s: %s\n", what, st->message);
    exit(1);
}

/* ---- read bandwidth ---- */

struct read_job {
    const char *data;
    _Atomic uint32_t sink;
};

static void read_chunk(void *arg, uint32_t i, uint32_t worker)
{
    typedef uint32_t vec __attribute__((vector_size(64)));
    (void)worker;
    struct read_job *j = arg;
    const vec *p = (const vec *)(const void *)(j->data + (uint64_t)i * CHUNK);
    vec s[4] = {0};
    for (uint32_t k = 0; k < CHUNK / sizeof(vec); k += 4)
        for (int u = 0; u < 4; u++)
            s[u] |= p[k + u];
    s[0] |= s[1] | s[2] | s[3];
    atomic_fetch_or(&j->sink, s[0][0] | s[0][7]);
}

struct buffer {
    struct read_job job;
    uint64_t bytes;
};

static struct buffer make_buffer(uint64_t bytes)
{
    const uint64_t huge = 2 << 20;
    struct buffer b = {.bytes = (bytes + CHUNK - 1) / CHUNK * CHUNK};
    char *data = aligned_alloc(huge, (b.bytes + huge - 1) / huge * huge);
    if (!data)
        exit(1);
    madvise(data, b.bytes, MADV_HUGEPAGE); /* as the weights */
    memset(data, 1, b.bytes);
    b.job.data = data;
    return b;
}

static double read_s(struct thread_pool *pool, struct buffer *b)
{
    double t0 = now_s();
    threads_for(pool, (uint32_t)(b->bytes / CHUNK), read_chunk, &b->job);
    return now_s() - t0;
}

/* ---- steps ---- */

struct bench {
    struct engine *e;
    uint64_t step;
    uint32_t ids[PREFILL], slots[BATCH];
    double step_s[MAX_STEPS], read_s[MAX_STEPS];
    struct buffer buffer; /* as many bytes as a step reads */
};

static double timed_step(struct bench *b, Tandem__V1__StepPlan *plan)
{
    struct engine_result r;
    struct status st = STATUS_INIT;
    plan->step = ++b->step;
    double t0 = now_s();
    if (engine_step(b->e, plan, &r, &st) != ST_OK)
        die("step", &st);
    return now_s() - t0;
}

/* Admits the slot and feeds n tokens. */
static double prefill(struct bench *b, uint32_t slot, uint32_t n)
{
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    Tandem__V1__AdmitSlot admit = TANDEM__V1__ADMIT_SLOT__INIT, *admits[] = {&admit};
    Tandem__V1__PrefillChunk chunk = TANDEM__V1__PREFILL_CHUNK__INIT, *chunks[] = {&chunk};
    admit.slot = chunk.slot = slot;
    chunk.token_ids = b->ids;
    chunk.n_token_ids = n;
    chunk.sample = true;
    plan.n_admits = plan.n_prefills = 1;
    plan.admits = admits;
    plan.prefills = chunks;
    return timed_step(b, &plan);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void print_decode(struct bench *b, uint32_t batch, uint32_t steps)
{
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    plan.decode_slots = b->slots;
    plan.n_decode_slots = batch;
    for (uint32_t i = 0; i < 4; i++)
        timed_step(b, &plan);
    for (uint32_t i = 0; i < steps; i++) {
        b->step_s[i] = timed_step(b, &plan);
        b->read_s[i] = read_s(b->e->pool, &b->buffer);
    }
    qsort(b->step_s, steps, sizeof *b->step_s, by_value);
    qsort(b->read_s, steps, sizeof *b->read_s, by_value);
    double median = b->step_s[steps / 2], read = b->read_s[steps / 2];
    printf("decode, batch %2u:  %8.1f tokens/s   step: median %.3f ms, best %.3f   read: median %.3f ms, best %.3f "
           "(%.1f GB/s)   of the limit: median %.0f %%, best %.0f %%\n",
           batch, batch / median, median * 1e3, b->step_s[0] * 1e3, read * 1e3, b->read_s[0] * 1e3,
           (double)b->buffer.bytes / b->read_s[0] / 1e9, 100 * read / median, 100 * b->read_s[0] / b->step_s[0]);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: bench_engine MODEL [threads] [decode steps]\n");
        return 2;
    }
    static struct bench b;
    struct status st = STATUS_INIT;
    struct comm *comm;
    uint32_t threads = argc > 2 ? (uint32_t)atoi(argv[2]) : 2, steps = argc > 3 ? (uint32_t)atoi(argv[3]) : 64;
    if (comm_create(&comm, &(struct comm_config){.ops = &comm_ops_self}, &st) != ST_OK)
        die("comm", &st);
    double t0 = now_s();
    struct engine_config cfg = {.model_dir = argv[1], .comm = comm, .threads = threads, .max_slots = BATCH + 1};
    if (engine_create(&b.e, &cfg, &st) != ST_OK)
        die(argv[1], &st);
    double load_s = now_s() - t0;
    struct engine_info info = engine_info(b.e);
    const struct model_weights *w = &b.e->weights;
    uint64_t read = info.weight_bytes;
    if (w->embed.data != w->head.data)
        read -= (uint64_t)w->embed.rows * w->embed.cols * mat_elem_bytes(w->embed.dtype);
    b.buffer = make_buffer(read);
    printf("%s: %u layers, hidden %u, %.1f MB of weights read a step; %s; loaded in %.2f s\n", argv[1], info.layers,
           info.hidden, (double)read / 1e6, info.device, load_s);

    for (uint32_t i = 0; i < PREFILL; i++)
        b.ids[i] = 3 + i * 7 % (info.vocab_size - 3);
    uint32_t room = info.max_context, long_prompt = room < PREFILL ? room : PREFILL;
    uint32_t context = room / 2 < CONTEXT ? room / 2 : CONTEXT;
    if (steps + 8 > (room - context) / 2)
        steps = (room - context) / 2 - 8;
    for (uint32_t i = 0; i < BATCH; i++) {
        b.slots[i] = i;
        prefill(&b, i, context);
    }
    double best = 1e9;
    for (int i = 0; i < 3; i++) {
        Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
        uint32_t slot = BATCH;
        double t = prefill(&b, slot, long_prompt);
        best = t < best ? t : best;
        plan.release_slots = &slot;
        plan.n_release_slots = 1;
        timed_step(&b, &plan);
    }
    printf("prefill of %u:      %8.1f tokens/s (%.1f ms, %.1f GFLOP/s in products)\n", long_prompt, long_prompt / best,
           best * 1e3, 2.0 * (double)read / mat_elem_bytes(w->head.dtype) * long_prompt / best / 1e9);
    print_decode(&b, 1, steps);
    print_decode(&b, BATCH, steps);
    free((char *)b.buffer.job.data);
    engine_destroy(b.e);
    comm_destroy(comm);
    return 0;
}
