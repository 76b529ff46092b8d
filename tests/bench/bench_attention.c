/* bench_attention.c - attention of the host back end: prefill in GFLOP/s, decode in GB/s of KV against the bandwidth of a
 * plain read of the same bytes, hybrid batches, small batches per item.
 *
 *     bench_attention [max threads, default 2]
 *
 * KV is token-major as in the pool: [token][layer][K|V][kv head][D] with LAYERS layers; the call reads one of them.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "attention/attention.h"
#include "worker/threads.h"

enum { MAX_ROWS = 1024, MAX_SEQS = 256, PASSES = 5 };

/* One thread is measured in its own processor time, which other processes on the machine disturb less. */
static clockid_t the_clock = CLOCK_MONOTONIC;

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(the_clock, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static void on_pool(void *ctx, uint32_t n, void (*fn)(void *arg, uint32_t i, uint32_t worker), void *arg)
{
    threads_for(ctx, n, fn, arg);
}

struct shape {
    const char *name;
    uint32_t H, HK, D, layers;
    enum attn_dtype dtype;
};

struct bench {
    struct thread_pool *pool;
    struct attn *attn;
    char *kv;
    uint64_t kv_bytes;
    float *q, *out;
    struct attn_seq seq[MAX_SEQS];
    struct attn_batch b;
};

static uint32_t elem_bytes(enum attn_dtype d)
{
    return d == ATTN_F32 ? 4 : 2;
}

static void begin(struct bench *x, const struct shape *s)
{
    uint64_t head = (uint64_t)s->D * elem_bytes(s->dtype);
    x->b = (struct attn_batch){.seq = x->seq,
                               .heads = s->H,
                               .kv_heads = s->HK,
                               .head_dim = s->D,
                               .scale = 0.1f,
                               .kv_dtype = s->dtype,
                               .token_stride = 2 * s->layers * s->HK * head,
                               .head_stride = head,
                               .q = x->q,
                               .out = x->out};
}

/* n sequences alike, behind those there are; KV one after the other, from the start again when the memory ends. */
static void add(struct bench *x, uint32_t n, uint32_t rows, uint32_t kv_len)
{
    uint64_t slot = x->b.token_stride * kv_len, room = x->kv_bytes / slot;
    for (uint32_t i = 0; i < n; i++) {
        char *k = x->kv + (room ? x->b.seqs % room : 0) * slot;
        x->seq[x->b.seqs++] = (struct attn_seq){k, k + x->b.kv_heads * x->b.head_stride, x->b.rows, rows, kv_len};
        x->b.rows += rows;
    }
}

static double run_s(struct bench *x)
{
    double best = 1e9, begun = now_s();
    for (int pass = 0; pass < PASSES || (now_s() - begun < 0.05 && pass < 1000); pass++) {
        double t0 = now_s();
        struct status st = STATUS_INIT;
        if (attn_run(x->attn, &x->b, &st) != ST_OK) {
            fprintf(stderr, "%s\n", st.message);
            exit(1);
        }
        double t = now_s() - t0;
        best = t < best ? t : best;
    }
    return best;
}

static double flops(const struct bench *x)
{
    double keys = 0;
    for (uint32_t i = 0; i < x->b.seqs; i++) {
        const struct attn_seq *s = &x->seq[i];
        keys += (double)s->rows * (s->kv_len - s->rows) + (double)s->rows * (s->rows + 1) / 2;
    }
    return 4 * keys * x->b.heads * x->b.head_dim;
}

static double kv_read_bytes(const struct bench *x)
{
    double tokens = 0;
    for (uint32_t i = 0; i < x->b.seqs; i++)
        tokens += x->seq[i].kv_len;
    return tokens * 2 * x->b.kv_heads * x->b.head_dim * elem_bytes(x->b.kv_dtype);
}

/* The same runs of bytes, in the same order, only read. */
static void read_seq(void *arg, uint32_t i, uint32_t worker)
{
    typedef uint32_t vec __attribute__((vector_size(32), aligned(4)));
    (void)worker;
    struct bench *x = arg;
    const struct attn_seq *s = &x->seq[i];
    uint64_t run = 2 * x->b.kv_heads * x->b.head_stride;
    vec sum = {0};
    for (uint32_t t = 0; t < s->kv_len; t++) {
        const char *p = (const char *)s->k + t * x->b.token_stride;
        for (uint64_t at = 0; at + sizeof(vec) <= run; at += sizeof(vec))
            sum |= *(const vec *)(p + at);
    }
    __asm__ volatile("" : : "m"(sum));
}

static double read_s(struct bench *x)
{
    double best = 1e9;
    for (int pass = 0; pass < PASSES; pass++) {
        double t0 = now_s();
        threads_for(x->pool, x->b.seqs, read_seq, x);
        double t = now_s() - t0;
        best = t < best ? t : best;
    }
    return best;
}

static void bench_prefill(struct bench *x, const struct shape *s)
{
    static const uint32_t cases[][2] = {{16, 16}, {64, 64}, {512, 512}, {512, 2048}, {64, 2048}, {16, 2048}};
    printf("%-28s prefill GFLOP/s", s->name);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        begin(x, s);
        add(x, 1, cases[i][0], cases[i][1]);
        double t = run_s(x);
        printf("  %u of %u: %.0f (%.0f us)", cases[i][0], cases[i][1], flops(x) / t / 1e9, t * 1e6);
    }
    printf("\n");
}

static void bench_decode(struct bench *x, const struct shape *s)
{
    static const uint32_t cases[][2] = {{1, 100}, {1, 2000}, {1, 16000}, {64, 16}, {64, 100}, {64, 1000}};
    printf("%-28s decode GB/s", s->name);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        begin(x, s);
        add(x, cases[i][0], 1, cases[i][1]);
        double t = run_s(x), limit = read_s(x);
        printf("  %u x %u: %.1f (%.1f us, read %.1f)", cases[i][0], cases[i][1], kv_read_bytes(x) / t / 1e9, t * 1e6,
               kv_read_bytes(x) / limit / 1e9);
    }
    printf("\n");
}

/* A chunk beside decodes, against both one after the other. */
static void bench_hybrid(struct bench *x, const struct shape *s)
{
    begin(x, s);
    add(x, 1, 256, 1024);
    double prefill = run_s(x);
    begin(x, s);
    add(x, 64, 1, 700);
    double decode = run_s(x);
    begin(x, s);
    add(x, 64, 1, 700);
    add(x, 1, 256, 1024);
    double both = run_s(x);
    printf("%-28s hybrid  256 of 1024: %.0f us, 64 x 700: %.0f us, together %.0f us (%.2f of the sum)\n", s->name,
           prefill * 1e6, decode * 1e6, both * 1e6, both / (prefill + decode));
}

int main(int argc, char **argv)
{
    uint32_t max_threads = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 2;
    static const struct shape shapes[] = {
        {"15M 6/6 x 48, 6 layers, f32", 6, 6, 48, 6, ATTN_F32},
        {"100M 12/4 x 64, 12 l., bf16", 12, 4, 64, 12, ATTN_BF16},
        {"8B 32/8 x 128, 32 l., bf16", 32, 8, 128, 32, ATTN_BF16},
        {"8B 32/8 x 128, 1 layer, f16", 32, 8, 128, 1, ATTN_F16},
        {"4/4 x 128, 1 layer, f32", 4, 4, 128, 1, ATTN_F32},
    };
    struct bench *x = calloc(1, sizeof *x);
    if (!x)
        return 1;
    x->kv_bytes = 2200000000;
    x->kv = aligned_alloc(4096, x->kv_bytes / 4096 * 4096);
    x->q = malloc((size_t)MAX_ROWS * 32 * 128 * sizeof(float));
    x->out = malloc((size_t)MAX_ROWS * 32 * 128 * sizeof(float));
    if (!x->kv || !x->q || !x->out)
        return 1;
    /* 0x3d3d is a small number in every dtype. */
    memset(x->kv, 0x3d, x->kv_bytes / 4096 * 4096);
    for (uint32_t i = 0; i < MAX_ROWS * 32 * 128; i++)
        x->q[i] = (float)(i % 1021) / 512 - 1;
    for (uint32_t threads = 1; threads <= max_threads; threads *= 2) {
        the_clock = threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
        printf("%u threads, %s time\n", threads, threads == 1 ? "processor" : "wall");
        if (threads_create(&x->pool, threads, NULL) != ST_OK)
            return 1;
        struct attn_config cfg = {.ops = &attn_ops_host,
                                  .exec = {threads, on_pool, x->pool},
                                  .max_rows = MAX_ROWS,
                                  .max_heads = 32,
                                  .max_head_dim = 128,
                                  .max_kv_len = 32768};
        if (attn_create(&x->attn, &cfg, NULL) != ST_OK)
            return 1;
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            bench_prefill(x, &shapes[i]);
            bench_decode(x, &shapes[i]);
            bench_hybrid(x, &shapes[i]);
        }
        attn_destroy(x->attn);
        threads_destroy(x->pool);
    }
    free(x->kv);
    free(x->q);
    free(x->out);
    free(x);
    return 0;
}
