/* memory_fixture.h - for the suites of memory.h: the back ends under test, calls of theirs that fail, and the usual moves.
 *
 * A test gets the number of its back end in Check's `_i`:   const struct back_end *be = &back_ends[_i];
 */
#ifndef TANDEM_MEMORY_FIXTURE_H
#define TANDEM_MEMORY_FIXTURE_H

#include <check.h>
#include <stdatomic.h>

#include "memory/memory.h"
#include "memory/memory_internal.h"
#include "tests/fake_cuda.h"

/* --- faults --- */

extern atomic_int fail_call;  /* 0: none; n: the n-th call of the wrapped functions from now on fails */
extern int fail_errno;        /* 0: ENOMEM */
extern const char *fake_root; /* files under /proc and /sys are opened here instead; NULL: nowhere else */

/* --- back ends --- */

struct back_end {
    const char *name;
    const struct kv_ops *ops;
    const char *driver;
    uint32_t scale; /* the smallest legal page is 4096 times this */
    void (*put)(void *to_pool, const void *from, size_t n);
    void (*get)(void *to, const void *from_pool, size_t n);
};

extern const struct back_end back_ends[];
extern const int n_back_ends;
#define GPU_BACK_END 2                           /* in this table: the one that is not imitated */
#define TOKEN        (UINT64_C(384) * be->scale) /* bytes, see small_config */
#define PAGE         (UINT64_C(4096) * be->scale)

/* Of the imitated driver; NULL for others. Loads it, so that it stays the same one over all pools of a test. */
struct fake_cuda_control *control(const struct back_end *be);
/* From here on fail_call counts the calls into the imitated driver too. */
void count_driver_calls(const struct back_end *be);
/* Whether the calls of the back end can be made to fail: all but those of a real driver. */
bool injects(const struct back_end *be);
/* No rule of the imitated driver was broken, and it has so many things that were not given back (-1: any number). */
void expect_rules_kept(const struct back_end *be, int live);
void *find_call(const char *name); /* of the GPU's driver, or NULL */

/* --- pools --- */

/* A token of 2 * 2 * 3 * 8 * 4 = 384 bytes: 10.67 of them in a page of 4 KiB, so that tokens cross page edges. Where
 * pages are larger, so are tokens. Four slots of 100 tokens, 20 pages. */
struct kv_pool_config small_config(const struct back_end *be);
struct kv_pool *make(const struct kv_pool_config *cfg);
void grow(struct kv_pool *pool, uint32_t slot, uint32_t tokens);
void check_stats(const struct kv_pool *pool, const char *where); /* the counts that must hold at any time */
void expect(const struct kv_pool *pool, uint64_t mapped, uint64_t fenced, uint64_t free_pages);
void fill(const struct back_end *be, struct kv_pool *pool, uint32_t slot, uint8_t byte);
void expect_bytes(const struct back_end *be, const uint8_t *at, uint64_t n, uint8_t byte);

/* --- memory_faults.c --- */

void memory_fault_cases(TCase *faults, int first, int end); /* of back ends first .. end - 1 */

#endif
