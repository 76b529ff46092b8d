/* bench_engine_gpu.c - steps of an engine on a device: decodes of a batch at a context, prefill, and both in one step.
 *
 *     bench_engine_gpu CONFIG_DIR [--eager] [--plugin PATH]     random weights; 77 where there is no GPU
 *                  [--one-at-a-time]                            without a second step under way
 *                  [--tune-cache DIR]                           where measured products are kept; default: nowhere
 *                  [--tune-ms MS]                                how long products are measured at the start; default: 500
 *                  [--decode BATCH:CONTEXT] ...                 these decodes alone, up to 8
 *                  [--hybrid ROWS:BATCH:CONTEXT]                this chunk beside these decodes alone
 *                  [--attention auto|fused|serial|streams]      how both share the device
 *     mpirun -np 2 bench_engine_gpu ...                         two ranks, a device each; bytes are those of one rank
 *
 * The limit of a decode step is what it must read, weights and KV, at the rate that a copy within the device's memory
 * was measured at (--rate GB/s, default 4300: H200). That of a step with a chunk is its products, those
 * of the head, of sampled rows alone, or the reading of it if that takes longer, and then the longer one of attention's arithmetic and
 * its reading; arithmetic at --flops TFLOP/s, default 790. Times are from result to result, host
 * work included, two steps being under way as in the worker; prefill is one step alone.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu_parts.h"
#include "worker/engine_internal.h"

#define STEP_ROWS    2048
#define STEPS        40
#define WARM_UP      4
#define MAX_BATCH    512
#define MAX_WANTED   8
#define HYBRIDS      5             /* a hybrid step alone and behind another one, so many times */
#define HYBRID_STEPS (3 * HYBRIDS) /* of its decodes */

struct bench {
    struct gpu_run run;
    uint32_t *ids, slots[MAX_BATCH];
    double rate, flops, token_bytes;
    double weight_bytes, head_bytes; /* that a step reads, of 2 bytes each, and those of the head among them */
    bool one_at_a_time;
    uint32_t wanted, batch[MAX_WANTED], context[MAX_WANTED];
    uint32_t rows, beside, at; /* of --hybrid */
};

/* Of several ranks the first. */
#define say(...) (comm_rank(gpu_comm()) == 0 ? (void)printf(__VA_ARGS__) : (void)0)

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void fill(struct bench *b, uint32_t slot, uint32_t tokens)
{
    for (uint32_t at = 0; at < tokens; at += STEP_ROWS) {
        uint32_t n = tokens - at < STEP_ROWS ? tokens - at : STEP_ROWS;
        gpu_prefill(&b->run, slot, b->ids + at, n, at, at + n == tokens, NULL);
    }
}

static void decode(struct bench *b, uint32_t batch, uint32_t context)
{
    double s[STEPS];
    for (uint32_t i = 0; i < batch; i++)
        fill(b, i, context);
    for (uint32_t i = 0; i < WARM_UP; i++)
        gpu_decode(&b->run, b->slots, batch);
    double t0 = gpu_now_s();
    for (uint32_t n = 0; n < STEPS;) {
        if (b->one_at_a_time)
            gpu_decode(&b->run, b->slots, batch);
        else if (!gpu_decode_ahead(&b->run, b->slots, batch))
            continue;
        double t = gpu_now_s();
        s[n++] = t - t0;
        t0 = t;
    }
    if (!b->one_at_a_time) {
        gpu_collect(&b->run);
        s[0] = s[1]; /* the first interval began with an idle device */
    }
    qsort(s, STEPS, sizeof *s, by_value);
    double limit = (b->weight_bytes + (double)batch * context * b->token_bytes) / b->rate;
    say("decode, batch %3u at %5u: median %7.3f ms, best %7.3f ms; limit %7.3f ms, %.0f %%; %8.0f tokens/s\n", batch,
        context, s[STEPS / 2] * 1e3, s[0] * 1e3, limit * 1e3, 100 * limit / s[STEPS / 2], batch / s[STEPS / 2]);
    fflush(stdout);
    for (uint32_t i = 0; i < batch; i++)
        gpu_release(&b->run, i);
}

/* Of a weight of 2 bytes and a row: a product and a sum. */
static double product_flop(const struct bench *b, uint32_t rows, uint32_t sampled)
{
    return (b->weight_bytes - b->head_bytes) * rows + b->head_bytes * sampled;
}

static void prefill(struct bench *b, uint32_t tokens)
{
    double best = 1e9;
    for (int i = 0; i < 5; i++) {
        double t0 = gpu_now_s();
        gpu_prefill(&b->run, 0, b->ids, tokens, 0, true, NULL);
        double t = gpu_now_s() - t0;
        best = t < best ? t : best;
        gpu_release(&b->run, 0);
    }
    say("prefill of %5u:          best %7.3f ms; %8.0f tokens/s; %.0f TFLOP/s in products\n", tokens, best * 1e3,
        tokens / best, product_flop(b, tokens, 1) / best / 1e12);
    fflush(stdout);
}

/* Seconds. Of one rank's part. */
static double hybrid_limit(const struct bench *b, uint32_t rows, uint32_t batch, uint32_t context)
{
    const struct model_config *m = &b->run.e->model;
    double keys = (double)rows * (context - (rows - 1) / 2.0) + (double)batch * context;
    double attention = 4 * keys * m->heads * m->head_dim * m->layers / comm_size(gpu_comm()) / b->flops;
    double reading = (double)(batch + 1) * context * b->token_bytes / b->rate;
    double body = product_flop(b, rows + batch, 0) / b->flops, head = product_flop(b, 0, batch + 1) / b->flops;
    double head_reading = b->head_bytes / b->rate;
    return body + (head > head_reading ? head : head_reading) + (attention > reading ? attention : reading);
}

/* What the device worked on the step that was collected last, seconds. */
static double device_s(const struct bench *b)
{
    const struct engine_timing *t = &b->run.result.timing;
    return (t->end_us - t->begin_us) * 1e-6;
}

/* Of a step, seconds. */
struct took {
    double all, submit, device;
};

static void keep_least(struct took *least, struct took t)
{
    if (t.all < least->all)
        *least = t;
}

/* The last chunk of `rows` of a prompt that ends at `context`, beside `batch` decodes there: from the result of the chunk before
 * it, with which it was under way; and alone on an idle device, where submitting, pages for the chunk included, comes first. */
static void hybrid(struct bench *b, uint32_t rows, uint32_t batch, uint32_t context)
{
    const uint32_t at = context - rows;
    struct took best = {.all = 1e9}, alone = best;
    for (uint32_t i = 0; i < batch; i++)
        fill(b, i, context);
    for (int i = 0; i < HYBRIDS; i++) {
        fill(b, batch, at);
        double t0 = gpu_now_s();
        gpu_hybrid_ahead(&b->run, b->slots, batch, batch, b->ids, rows, at);
        struct took t = {.submit = gpu_now_s() - t0};
        gpu_collect(&b->run);
        t.all = gpu_now_s() - t0;
        t.device = device_s(b);
        keep_least(&alone, t);
        gpu_release(&b->run, batch);
        fill(b, batch, at - rows);
        gpu_hybrid_ahead(&b->run, b->slots, batch, batch, b->ids, rows, at - rows);
        gpu_hybrid_ahead(&b->run, b->slots, batch, batch, b->ids, rows, at);
        gpu_collect(&b->run);
        t0 = gpu_now_s();
        gpu_collect(&b->run);
        t.all = gpu_now_s() - t0;
        t.device = device_s(b);
        keep_least(&best, t);
        gpu_release(&b->run, batch);
    }
    double limit = hybrid_limit(b, rows, batch, context);
    say("chunk of %u at %u with %u decodes at %u: best %.3f ms, on the device %.3f; limit %.3f ms, %.1f %%; "
        "alone %.3f ms, %.3f of it until it is submitted, on the device %.3f, %.1f %%\n",
        rows, context, batch, context, best.all * 1e3, best.device * 1e3, limit * 1e3, 100 * limit / best.all,
        alone.all * 1e3, alone.submit * 1e3, alone.device * 1e3, 100 * limit / alone.device);
    fflush(stdout);
    for (uint32_t i = 0; i < batch; i++)
        gpu_release(&b->run, i);
}

/* "BATCH:CONTEXT" */
static void read_wanted(struct bench *b, const char *text)
{
    unsigned batch, context;
    if (b->wanted == MAX_WANTED || sscanf(text, "%u:%u", &batch, &context) != 2 || batch == 0 || batch > MAX_BATCH ||
        context == 0) {
        fprintf(stderr, "--decode %s: expected BATCH:CONTEXT, batches up to %u, %u times at most\n", text, MAX_BATCH,
                MAX_WANTED);
        exit(2);
    }
    b->batch[b->wanted] = batch;
    b->context[b->wanted++] = context;
}

/* "ROWS:BATCH:CONTEXT" */
static void read_hybrid(struct bench *b, const char *text)
{
    int end = 0;
    if (b->rows || sscanf(text, "%u:%u:%u%n", &b->rows, &b->beside, &b->at, &end) != 3 || text[end] || b->rows == 0 ||
        b->rows > STEP_ROWS || b->beside == 0 || b->beside >= MAX_BATCH || b->beside + b->rows > STEP_ROWS ||
        b->at < 2 * b->rows) {
        fprintf(stderr,
                "--hybrid %s: expected ROWS:BATCH:CONTEXT, once, rows of both up to %d, batches below %d, contexts of "
                "two chunks and more\n",
                text, STEP_ROWS, MAX_BATCH);
        exit(2);
    }
}

static enum attn_gpu_policy read_policy(const char *text)
{
    static const char *const names[] = {"auto", "fused", "serial", "streams"}; /* enum attn_gpu_policy */
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(text, names[i]))
            return (enum attn_gpu_policy)i;
    fprintf(stderr, "--attention %s: expected auto, fused, serial or streams\n", text);
    exit(2);
}

static void all(struct bench *b, uint32_t max_context)
{
    decode(b, 1, 128);
    decode(b, 1, 4096);
    decode(b, 8, 1024);
    decode(b, 64, 1024);
    decode(b, 64, 4096);
    decode(b, 256, 512);
    decode(b, 512, 512);
    prefill(b, 512);
    prefill(b, 2048);
    if (max_context >= 16384)
        hybrid(b, 1024, 32, 16384 - 64);
}

static void print_note(void *ctx, const char *text)
{
    (void)ctx;
    say("%s\n", text);
}

int main(int argc, char **argv)
{
    struct bench b = {.rate = 4300e9, .flops = 790e12};
    const char *plugin = NULL;
    struct engine_config cfg = {.random_weights = 1, .max_slots = MAX_BATCH, .max_step_tokens = STEP_ROWS};
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--eager"))
            cfg.eager = true;
        else if (!strcmp(argv[i], "--one-at-a-time"))
            b.one_at_a_time = true;
        else if (!strcmp(argv[i], "--plugin") && i + 1 < argc)
            plugin = argv[++i];
        else if (!strcmp(argv[i], "--rate") && i + 1 < argc)
            b.rate = atof(argv[++i]) * 1e9;
        else if (!strcmp(argv[i], "--flops") && i + 1 < argc)
            b.flops = atof(argv[++i]) * 1e12;
        else if (!strcmp(argv[i], "--tune-cache") && i + 1 < argc)
            cfg.tune_dir = argv[++i];
        else if (!strcmp(argv[i], "--tune-ms") && i + 1 < argc)
            cfg.tune_ms = (uint32_t)atoi(argv[++i]);
        else if (!strcmp(argv[i], "--decode") && i + 1 < argc)
            read_wanted(&b, argv[++i]);
        else if (!strcmp(argv[i], "--hybrid") && i + 1 < argc)
            read_hybrid(&b, argv[++i]);
        else if (!strcmp(argv[i], "--attention") && i + 1 < argc)
            cfg.attention = read_policy(argv[++i]);
        else
            cfg.model_dir = argv[i];
    }
    if (!cfg.model_dir) {
        fprintf(stderr, "usage: bench_engine_gpu CONFIG_DIR [--eager] [--plugin PATH] [--rate GB/s] [--flops TFLOP/s] "
                        "[--one-at-a-time] [--tune-cache DIR] [--tune-ms MS] [--decode BATCH:CONTEXT] "
                        "[--hybrid ROWS:BATCH:CONTEXT] [--attention auto|fused|serial|streams]\n");
        return 2;
    }
    cfg.parts = gpu_parts(plugin);
    cfg.note = print_note;
    cfg.timed = true;
    if (!cfg.parts)
        return GPU_SKIP;
    double t0 = gpu_now_s();
    gpu_create(&b.run, &cfg);
    double load_s = gpu_now_s() - t0;
    struct engine_info info = engine_info(b.run.e);
    const struct model_weights *w = &b.run.e->weights;
    b.weight_bytes = (double)info.weight_bytes;
    if (w->embed.data != w->head.data)
        b.weight_bytes -= 2.0 * w->embed.rows * w->embed.cols;
    b.head_bytes = 2.0 * w->head.rows * w->head.cols;
    b.token_bytes = (double)info.kv.token_bytes;
    say("%s, %s: %u layers, hidden %u; a step reads %.2f GB of weights; KV cache %.1f GiB; ready in %.2f s\n",
        info.device, cfg.eager ? "launched one by one" : "graphs", info.layers, info.hidden, b.weight_bytes / 1e9,
        (double)(info.kv.total_pages * info.kv.page_bytes) / 0x1p30, load_s);
    if (b.rows && b.at + HYBRID_STEPS > info.max_context) {
        say("--hybrid: context %u, expected at most %u\n", b.at, info.max_context - HYBRID_STEPS);
        gpu_destroy(&b.run);
        comm_destroy(gpu_comm());
        return 2;
    }
    b.ids = malloc(info.max_context * sizeof *b.ids);
    for (uint32_t i = 0; i < info.max_context; i++)
        b.ids[i] = (i * 7919u + 3) % info.vocab_size;
    for (uint32_t i = 0; i < MAX_BATCH; i++)
        b.slots[i] = i;
    for (uint32_t i = 0; i < b.wanted; i++)
        decode(&b, b.batch[i], b.context[i]);
    if (b.rows)
        hybrid(&b, b.rows, b.beside, b.at);
    else if (!b.wanted)
        all(&b, info.max_context);
    free(b.ids);
    gpu_destroy(&b.run);
    comm_destroy(gpu_comm());
    return 0;
}
