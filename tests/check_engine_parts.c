/* check_engine_parts.c - an engine that is built of a back end's parts: here the host's own, with weights in a store that
 * only takes copies, as a device does. And random weights, on which all of them agree. */
#include <check.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/engine_group.h"
#include "tests/temp_dir.h"
#include "worker/backend.h"
#include "worker/mapped_read.h"
#include "worker/model_convert.h"

#define DEMO       TEST_DATA "/demo-model"
#define NEW_TOKENS 24
#define WORKSPACE  (3u << 20)

/* ---- a device that is the host ---- */

struct device {
    uint8_t *arena, *stage; /* [WEIGHT_LANES][WEIGHT_STAGE_BYTES] */
    atomic_bool staged[WEIGHT_LANES];
    uint64_t bytes;
    atomic_ullong stored; /* in all, so that nothing is forgotten or copied twice */
    unsigned allocs, releases, finishes;
    bool refuses;
    uint64_t fails_after; /* bytes */
    struct backend_memory memory;
    struct forward_ops ops;
    struct backend_parts parts;
};

static enum status_code store_alloc(void *ctx, void **arena, uint64_t bytes, struct status *st)
{
    struct device *d = ctx;
    if (d->refuses)
        return status_set(st, ST_RESOURCE_EXHAUSTED, "no memory for weights");
    d->allocs++;
    d->bytes = bytes;
    d->arena = aligned_alloc(64, (bytes + 63) / 64 * 64);
    d->stage = malloc((size_t)WEIGHT_LANES * WEIGHT_STAGE_BYTES);
    *arena = d->arena;
    return ST_OK;
}

static void store_release(void *ctx, void *arena)
{
    struct device *d = ctx;
    ck_assert_ptr_eq(arena, d->arena);
    d->releases++;
    free(d->arena);
    free(d->stage);
}

/* Called by several threads: a lane is one thread's from here to its store. */
static enum status_code store_stage(void *ctx, uint32_t lane, void **host, uint64_t bytes, struct status *st)
{
    (void)st;
    struct device *d = ctx;
    ck_assert_uint_lt(lane, WEIGHT_LANES);
    ck_assert_uint_le(bytes, WEIGHT_STAGE_BYTES);
    ck_assert(!atomic_exchange(&d->staged[lane], true));
    *host = d->stage + (size_t)lane * WEIGHT_STAGE_BYTES;
    memset(*host, 0xff, bytes); /* NaN where nothing is written */
    return ST_OK;
}

static enum status_code store_store(void *ctx, uint32_t lane, void *to, uint64_t bytes, struct status *st)
{
    struct device *d = ctx;
    ck_assert((uint8_t *)to >= d->arena && (uint8_t *)to + bytes <= d->arena + d->bytes);
    memcpy(to, d->stage + (size_t)lane * WEIGHT_STAGE_BYTES, bytes);
    ck_assert(atomic_exchange(&d->staged[lane], false));
    if (atomic_fetch_add(&d->stored, bytes) + bytes > d->fails_after)
        return status_set(st, ST_INTERNAL, "the device is gone");
    return ST_OK;
}

static enum status_code store_random(void *ctx, void *to, uint64_t seed, uint64_t first, uint64_t n, float scale,
                                     struct status *st)
{
    (void)st;
    struct device *d = ctx;
    model_random(to, MAT_BF16, seed, first, n, scale);
    d->stored += 2 * n;
    return ST_OK;
}

static enum status_code store_finish(void *ctx, struct status *st)
{
    (void)st;
    ((struct device *)ctx)->finishes++;
    return ST_OK;
}

static enum status_code device_memory(void *ctx, struct backend_memory *out, struct status *st)
{
    (void)st;
    *out = ((struct device *)ctx)->memory;
    return ST_OK;
}

static enum status_code forward_bytes(uint64_t *out, const struct forward_config *cfg, struct status *st)
{
    (void)cfg;
    (void)st;
    *out = WORKSPACE;
    return ST_OK;
}

static void device_init(struct device *d, uint64_t total_mib, uint64_t free_mib)
{
    *d = (struct device){
        .memory = {total_mib << 20, free_mib << 20}, .fails_after = UINT64_MAX, .ops = forward_ops_host};
    d->ops.bytes = forward_bytes;
    d->parts = (struct backend_parts){
        .text = "fake:0",
        .kv = &kv_ops_host,
        .kv_elem_bytes = 4,
        .weights = {d, store_alloc, store_release, store_stage, store_store, store_random, store_finish},
        .forward = &d->ops,
        .ctx = d,
        .memory = device_memory,
    };
}

static void greedy(uint32_t out[NEW_TOKENS], const struct engine_config *cfg, uint32_t ranks)
{
    static const uint32_t prompt[] = {5, 415, 424, 258, 393};
    struct group *g;
    struct status st = STATUS_INIT;
    ck_assert_msg(group_create(&g, cfg, ranks, &st) == ST_OK, "%s", st.message);
    struct group_request r = {.prompt = prompt, .prompt_tokens = 5, .max_new = NEW_TOKENS, .out = out};
    struct group_schedule s = {.rows_per_step = 4, .concurrent = 1};
    ck_assert_msg(group_run(g, &r, 1, &s, &st) == ST_OK, "%s", st.message);
    group_destroy(g);
}

/* ---- core ---- */

START_TEST(weights_in_a_store_are_those_of_the_file)
{
    uint32_t plain[NEW_TOKENS], stored[NEW_TOKENS];
    struct device d;
    device_init(&d, 2048, 2000);
    struct engine_config cfg = {.model_dir = DEMO, .max_slots = 2, .threads = 1};
    greedy(plain, &cfg, 1);
    cfg.parts = &d.parts;
    cfg.threads = WEIGHT_LANES + 1; /* one more than can copy */
    greedy(stored, &cfg, 1);
    ck_assert_mem_eq(plain, stored, sizeof plain);
    ck_assert_uint_eq(d.allocs, 1);
    ck_assert_uint_eq(d.releases, 1);
    ck_assert_uint_eq(d.finishes, 1);
    ck_assert_uint_le(d.stored, d.bytes);
    ck_assert_uint_ge(d.stored + 64 * 64, d.bytes); /* all but the gaps between matrices */
}
END_TEST

static struct temp_dir random_model(void)
{
    static const char config[] =
        "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":96,\"intermediate_size\":200,"
        "\"num_hidden_layers\":2,\"num_attention_heads\":6,\"num_key_value_heads\":3,\"head_dim\":16,"
        "\"vocab_size\":700,\"max_position_embeddings\":256,\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,"
        "\"hidden_act\":\"silu\",\"tie_word_embeddings\":false}";
    struct temp_dir dir = temp_dir_make();
    temp_dir_write(&dir, "config.json", config, sizeof config - 1);
    return dir;
}

START_TEST(random_weights_are_alike_for_any_ranks_and_in_a_store)
{
    uint32_t one[NEW_TOKENS], other[NEW_TOKENS];
    struct temp_dir dir = random_model();
    struct device d;
    device_init(&d, 2048, 2000);
    struct engine_config cfg = {.model_dir = dir.path, .random_weights = 1, .max_slots = 2};
    greedy(one, &cfg, 1);
    uint32_t same = 0;
    for (uint32_t i = 1; i < NEW_TOKENS; i++)
        same += one[i] == one[0];
    ck_assert_uint_lt(same, NEW_TOKENS / 2);
    greedy(other, &cfg, 2);
    ck_assert_mem_eq(one, other, sizeof one);
    cfg.parts = &d.parts;
    greedy(other, &cfg, 1);
    ck_assert_mem_eq(one, other, sizeof one);
    cfg.random_weights = 2;
    greedy(other, &cfg, 1);
    ck_assert_mem_ne(one, other, sizeof one);
    temp_dir_remove(&dir);
}
END_TEST

/* ---- limits ---- */

START_TEST(conversions_round_to_nearest_and_keep_nan)
{
    const uint32_t in[] = {0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001,
                           0x7F800001, 0xFF7FFFFF, 0x00000001, 0x80000000};
    const uint16_t expected[] = {0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x7FC0, 0xFF80, 0x0000, 0x8000};
    uint16_t out[8];
    model_convert(out, MAT_BF16, in, MAT_F32, 8);
    ck_assert_mem_eq(out, expected, sizeof out);
    const uint16_t half[] = {0x3C00, 0xC000, 0x7C00, 0x0001, 0x3C01};
    const uint16_t from_half[] = {0x3F80, 0xC000, 0x7F80, 0x3380, 0x3F80};
    model_convert(out, MAT_BF16, half, MAT_F16, 5);
    ck_assert_mem_eq(out, from_half, sizeof from_half);
}
END_TEST

START_TEST(what_is_left_of_a_device_is_the_kv_cache)
{
    struct device d;
    struct group *g;
    struct status st = STATUS_INIT;
    device_init(&d, 1000, 900);
    struct engine_config cfg = {.model_dir = DEMO, .parts = &d.parts, .max_slots = 512, .memory_fraction = 0.5};
    ck_assert_msg(group_create(&g, &cfg, 1, &st) == ST_OK, "%s", st.message);
    struct engine_info info = engine_info(group_engine(g, 0));
    ck_assert_str_eq(info.device, "fake:0");
    /* 500 MiB less 100 in use, the weights, the workspace of 3 and the 256 for the driver */
    uint64_t left = (141ull << 20) - info.weight_bytes;
    ck_assert_uint_eq(info.kv.total_pages, left / info.kv.page_bytes);
    group_destroy(g);
}
END_TEST

/* ---- faults ---- */

START_TEST(a_device_that_is_too_small_is_said_with_the_arithmetic)
{
    struct device d;
    struct group *g;
    struct status st = STATUS_INIT;
    device_init(&d, 1000, 300);
    struct engine_config cfg = {.model_dir = DEMO, .parts = &d.parts, .max_slots = 4};
    ck_assert_int_eq(group_create(&g, &cfg, 1, &st), ST_RESOURCE_EXHAUSTED);
    ck_assert_msg(strstr(st.message, "fake:0: 0.9 of 1000 MiB is 900 MiB; in use already 700, weights ") &&
                      strstr(st.message, "workspace of 512 rows and 4 samples 259 (256 of it for the driver), KV "
                                         "cache 0: together 96") &&
                      strstr(st.message, " too many. Less is needed with fewer slots or rows a step"),
                  "%s", st.message);
    device_init(&d, 1000, 700); /* enough for one rank; two want 384 more */
    ck_assert_int_eq(group_create(&g, &cfg, 2, &st), ST_RESOURCE_EXHAUSTED);
    ck_assert_msg(strstr(st.message, "in use already 300, weights ") &&
                      strstr(st.message, "samples 643 (640 of it for the driver and NCCL), KV cache 0: together 94"),
                  "%s", st.message);
    ck_assert_uint_eq(d.allocs, 0); /* before anything is read */
    device_init(&d, 1000, 900);
    cfg.kv_bytes = 900 << 20; /* which an empty device would not have either */
    ck_assert_int_eq(group_create(&g, &cfg, 1, &st), ST_INVALID_ARGUMENT);
    ck_assert_msg(strstr(st.message, "KV cache 900: together "), "%s", st.message);
    cfg.kv_bytes = 600 << 20;
    ck_assert_int_eq(group_create(&g, &cfg, 1, &st), ST_RESOURCE_EXHAUSTED);
    ck_assert_uint_eq(d.allocs, 0);
}
END_TEST

START_TEST(a_store_that_refuses_leaves_nothing_behind)
{
    struct device d;
    struct group *g;
    struct status st = STATUS_INIT;
    device_init(&d, 2048, 2000);
    d.refuses = true;
    struct engine_config cfg = {.model_dir = DEMO, .parts = &d.parts, .max_slots = 4};
    ck_assert_int_eq(group_create(&g, &cfg, 1, &st), ST_RESOURCE_EXHAUSTED);
    ck_assert_msg(strstr(st.message, "no memory for weights"), "%s", st.message);
    ck_assert_uint_eq(d.releases, 0);
}
END_TEST

START_TEST(a_store_that_fails_on_the_way_is_an_error_of_the_load)
{
    struct group *g;
    for (uint32_t threads = 1; threads <= 4; threads += 3) {
        for (uint64_t bytes = 0; bytes < 3000000; bytes += 299993) { /* of 4 million */
            struct device d;
            struct status st = STATUS_INIT;
            device_init(&d, 2048, 2000);
            d.fails_after = bytes;
            struct engine_config cfg = {.model_dir = DEMO, .parts = &d.parts, .max_slots = 4, .threads = threads};
            ck_assert_int_eq(group_create(&g, &cfg, 1, &st), ST_INTERNAL);
            ck_assert_msg(strstr(st.message, "the device is gone"), "%s", st.message);
            ck_assert_uint_eq(d.releases, 1);
            ck_assert_uint_eq(d.finishes, 0);
        }
    }
}
END_TEST

static void read_last_byte(void *arg)
{
    *(volatile uint8_t *)arg;
}

struct cut_file {
    uint8_t *map;
    atomic_uint whole, cut;
};

static void read_both_pages(void *arg, uint32_t i, uint32_t worker)
{
    struct cut_file *f = arg;
    (void)i, (void)worker;
    atomic_fetch_add(&f->whole, mapped_read(read_last_byte, f->map));
    atomic_fetch_add(&f->cut, !mapped_read(read_last_byte, f->map + 65536));
    atomic_fetch_add(&f->whole, mapped_read(read_last_byte, f->map + 1));
}

START_TEST(a_file_that_was_cut_is_noticed_by_every_thread)
{
    struct temp_dir dir = temp_dir_make();
    struct thread_pool *pool;
    struct status st = STATUS_INIT;
    char path[512];
    temp_dir_write(&dir, "file", "x", 1);
    snprintf(path, sizeof path, "%s/file", dir.path);
    int fd = open(path, O_RDWR);
    ck_assert(fd >= 0 && ftruncate(fd, 131072) == 0);
    struct cut_file f = {.map = mmap(NULL, 131072, PROT_READ, MAP_PRIVATE, fd, 0)};
    ck_assert(f.map != MAP_FAILED && ftruncate(fd, 4096) == 0);
    ck_assert_int_eq(threads_create(&pool, 4, &st), ST_OK);
    threads_for(pool, 100, read_both_pages, &f);
    ck_assert_uint_eq(f.whole, 200);
    ck_assert_uint_eq(f.cut, 100);
    threads_destroy(pool);
    munmap(f.map, 131072);
    close(fd);
    temp_dir_remove(&dir);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("engine_parts");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_set_timeout(core, 60);
    tcase_add_test(core, weights_in_a_store_are_those_of_the_file);
    tcase_add_test(core, random_weights_are_alike_for_any_ranks_and_in_a_store);
    tcase_add_test(limits, conversions_round_to_nearest_and_keep_nan);
    tcase_add_test(limits, what_is_left_of_a_device_is_the_kv_cache);
    tcase_add_test(faults, a_device_that_is_too_small_is_said_with_the_arithmetic);
    tcase_add_test(faults, a_store_that_refuses_leaves_nothing_behind);
    tcase_add_test(faults, a_store_that_fails_on_the_way_is_an_error_of_the_load);
    tcase_add_test(faults, a_file_that_was_cut_is_noticed_by_every_thread);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
