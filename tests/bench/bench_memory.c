/* bench_memory.c - what the KV pool costs: grow, release, view; and what its layout costs a reader.
 *
 *     bin/bench_memory [pages of 2 MiB, default 128]
 *
 * Layout of a 15M-parameter-class model on one rank: 6 layers, 6 KV heads of 48, 2 bytes: 6912 bytes per token.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "memory/memory.h"

#define LAYERS   6
#define KV_HEADS 6
#define HEAD_DIM 48

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void must(enum status_code rc, const struct status *st)
{
    if (rc == ST_OK)
        return;
    fprintf(stderr, "bench_memory: %s\n", st->message);
    exit(1);
}

/* Tokens that take exactly `pages` pages. */
static uint32_t tokens_of(const struct kv_pool *pool, uint64_t pages)
{
    struct kv_account a = kv_pool_account(pool);
    return (uint32_t)(pages * a.page_bytes / a.token_bytes);
}

static void say(const char *what, double ns, double per)
{
    printf("%-64s %12.0f ns\n", what, ns / per);
}

static void bench_pages(uint32_t pages)
{
    struct status st = STATUS_INIT;
    struct kv_pool *pool;
    struct kv_pool_config cfg = {.ops = &kv_ops_host,
                                 .slots = 4,
                                 .layers = LAYERS,
                                 .kv_heads = KV_HEADS,
                                 .head_dim = HEAD_DIM,
                                 .elem_bytes = 2,
                                 .page_bytes = KV_PAGE_BYTES_DEFAULT,
                                 .total_pages = pages};
    cfg.max_tokens = (uint32_t)(pages * cfg.page_bytes / (LAYERS * 2 * KV_HEADS * HEAD_DIM * 2));
    double t = now_ns();
    must(kv_pool_create(&pool, &cfg, &st), &st);
    say("create, per page", now_ns() - t, pages);

    /* Twice: pages that were never touched are cleared by the kernel, and in a virtual machine got from the host. */
    for (int round = 0; round < 2; round++) {
        t = now_ns();
        for (uint64_t i = 1; i <= pages; i++)
            must(kv_slot_grow(pool, 0, tokens_of(pool, i), &st), &st);
        say(round ? "grow by one page, warm (mapped already): clears it" : "grow by one page, never touched before",
            now_ns() - t, pages);
        t = now_ns();
        kv_slot_release(pool, 0, 1);
        say("release, per page", now_ns() - t, pages);
        kv_pool_complete(pool, 1);
    }
    /* Half in slot 0, then slot 1 must take them from the range that slot 0 leaves. */
    must(kv_slot_grow(pool, 0, tokens_of(pool, pages / 2), &st), &st);
    must(kv_slot_grow(pool, 1, 1, &st), &st);
    kv_slot_release(pool, 0, 1);
    uint64_t calls = kv_pool_stats(pool).map_calls;
    t = now_ns();
    for (uint64_t i = 2; i <= pages / 2; i++)
        must(kv_slot_grow(pool, 1, tokens_of(pool, i), &st), &st);
    say("grow by one page taken from another range: unmap, map, clear", now_ns() - t, pages / 2 - 1);
    printf("%-64s %12" PRIu64 "\n", "  calls into the kernel", kv_pool_stats(pool).map_calls - calls);

    enum { N = 10000000 };
    t = now_ns();
    for (int i = 0; i < N; i++) {
        struct kv_view v = kv_slot_view(pool, (uint32_t)i & 1, (uint32_t)i % LAYERS);
        __asm__ volatile("" : : "r"(v.k), "r"(v.v));
    }
    printf("%-64s %12.1f ns\n", "view", (now_ns() - t) / N);
    kv_slot_release(pool, 1, 1);
    t = now_ns();
    for (int i = 0; i < 1000; i++)
        for (uint32_t tokens = 1; tokens <= 256; tokens++)
            must(kv_slot_grow(pool, 0, tokens, &st), &st);
    printf("%-64s %12.1f ns\n", "grow by one token within a page", (now_ns() - t) / 256000);
    kv_pool_destroy(pool);
}

/* Sums all K and V of one layer after the other, as a decode step does with one sequence. */
static uint64_t read_all(const uint8_t *base, uint64_t tokens, uint64_t token_stride, uint64_t layer_stride,
                         uint64_t run)
{
    uint64_t sum = 0;
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint64_t t = 0; t < tokens; t++) {
            const uint64_t *p = (const uint64_t *)(base + layer * layer_stride + t * token_stride);
            uint64_t s[4] = {0};
            for (uint64_t i = 0; i < run / 8; i += 4)
                for (int k = 0; k < 4; k++)
                    s[k] += p[i + (uint64_t)k];
            sum += s[0] + s[1] + s[2] + s[3];
        }
    return sum;
}

static void bench_layout(uint64_t pages)
{
    struct status st = STATUS_INIT;
    struct kv_pool *pool;
    struct kv_pool_config cfg = {.ops = &kv_ops_host,
                                 .slots = 1,
                                 .max_tokens = 1u << 20,
                                 .layers = LAYERS,
                                 .kv_heads = KV_HEADS,
                                 .head_dim = HEAD_DIM,
                                 .elem_bytes = 2,
                                 .page_bytes = KV_PAGE_BYTES_DEFAULT,
                                 .total_pages = pages};
    must(kv_pool_create(&pool, &cfg, &st), &st);
    uint32_t tokens = tokens_of(pool, pages);
    must(kv_slot_grow(pool, 0, tokens, &st), &st);
    struct kv_view v = kv_slot_view(pool, 0, 0);
    uint64_t run = (uint64_t)(v.v - v.k) * 2, bytes = tokens * v.token_stride;
    uint8_t *plain = malloc(bytes);
    if (!plain)
        exit(1);
    memset(plain, 1, bytes);
    memset(v.k, 1, bytes);
    for (int contiguous = 0; contiguous < 2; contiguous++) {
        double best = 1e18;
        uint64_t sum = 0;
        for (int i = 0; i < 7; i++) {
            double t = now_ns();
            sum = contiguous ? read_all(plain, tokens, run, run * tokens, run)
                             : read_all(v.k, tokens, v.token_stride, run, run);
            t = now_ns() - t;
            best = t < best ? t : best;
        }
        __asm__ volatile("" : : "r"(sum));
        printf("%-64s %12.2f GB/s  (%u tokens, %" PRIu64 " MiB)\n",
               contiguous ? "decode-like read, one layer contiguous (malloc)" : "decode-like read, token-major (pool)",
               (double)bytes / best, tokens, bytes >> 20);
    }
    free(plain);
    kv_pool_destroy(pool);
}

int main(int argc, char **argv)
{
    uint32_t pages = argc > 1 ? (uint32_t)atoi(argv[1]) : 128;
    if (pages < 8) {
        fprintf(stderr, "usage: bench_memory [pages, at least 8]\n");
        return 2;
    }
    bench_pages(pages);
    bench_layout(1);
    bench_layout(pages);
    return 0;
}
