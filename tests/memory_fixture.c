/* memory_fixture.c - what the suites of the KV pool share: calls that fail (linked with --wrap, see CMakeLists.txt), the back
 * ends, and the usual moves.
 */
#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "tests/memory_fixture.h"

/* --- faults: the n-th call from now on fails --- */

atomic_int fail_call;
int fail_errno;
const char *fake_root;

static bool inject(void)
{
    int n = atomic_load(&fail_call);
    do
        if (n == 0)
            return false;
    while (!atomic_compare_exchange_weak(&fail_call, &n, n - 1));
    if (n > 1)
        return false;
    errno = fail_errno ? fail_errno : ENOMEM;
    return true;
}

void *__real_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t off);
void *__wrap_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t off);
void *__wrap_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t off)
{
    return inject() ? MAP_FAILED : __real_mmap(addr, len, prot, flags, fd, off);
}

int __real_fallocate(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate(int fd, int mode, off_t off, off_t len)
{
    return inject() ? -1 : __real_fallocate(fd, mode, off, len);
}

int __real_ftruncate(int fd, off_t len);
int __wrap_ftruncate(int fd, off_t len);
int __wrap_ftruncate(int fd, off_t len)
{
    return inject() ? -1 : __real_ftruncate(fd, len);
}

int __real_memfd_create(const char *name, unsigned flags);
int __wrap_memfd_create(const char *name, unsigned flags);
int __wrap_memfd_create(const char *name, unsigned flags)
{
    return inject() ? -1 : __real_memfd_create(name, flags);
}

void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size)
{
    return inject() ? NULL : __real_calloc(n, size);
}

void *__real_realloc(void *p, size_t size);
void *__wrap_realloc(void *p, size_t size);
void *__wrap_realloc(void *p, size_t size)
{
    return inject() ? NULL : __real_realloc(p, size);
}

int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    unsigned mode = va_arg(ap, unsigned); /* garbage without O_CREAT, and then ignored */
    va_end(ap);
    char fake[512];
    if (fake_root && (strncmp(path, "/proc/", 6) == 0 || strncmp(path, "/sys/", 5) == 0)) {
        snprintf(fake, sizeof fake, "%s%s", fake_root, path);
        path = fake;
    }
    return __real_open(path, flags, mode);
}

/* --- back ends under test --- */

static void copy(void *to, const void *from, size_t n)
{
    if (n)
        memcpy(to, from, n);
}

void *find_call(const char *name)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    return library ? dlsym(library, name) : NULL;
}

#ifdef TEST_FAKE_CUDA
static void *gpu_call(const char *name)
{
    void *at = find_call(name);
    ck_assert_msg(at, "the driver has no %s", name);
    return at;
}

static void gpu_put(void *to, const void *from, size_t n)
{
    static int (*call)(uintptr_t, const void *, size_t);
    if (!call)
        *(void **)&call = gpu_call("cuMemcpyHtoD_v2");
    ck_assert_int_eq(n ? call((uintptr_t)to, from, n) : 0, 0);
}

static void gpu_get(void *to, const void *from, size_t n)
{
    static int (*call)(void *, uintptr_t, size_t);
    if (!call)
        *(void **)&call = gpu_call("cuMemcpyDtoH_v2");
    ck_assert_int_eq(n ? call(to, (uintptr_t)from, n) : 0, 0);
}
#endif

const struct back_end back_ends[] = {
    {.name = "host", .ops = &kv_ops_host, .scale = 1, .put = copy, .get = copy},
#ifdef TEST_FAKE_CUDA
    {.name = "imitated", .ops = &kv_ops_cuda, .driver = TEST_FAKE_CUDA, .scale = 1, .put = copy, .get = copy},
    {.name = "cuda", .ops = &kv_ops_cuda, .scale = 512, .put = gpu_put, .get = gpu_get},
#endif
};
const int n_back_ends = sizeof back_ends / sizeof *back_ends;

struct fake_cuda_control *control(const struct back_end *be)
{
    void *library = be->driver ? dlopen(be->driver, RTLD_NOW) : NULL;
    return library ? dlsym(library, FAKE_CUDA_CONTROL) : NULL;
}

static int inject_result(void)
{
    return inject();
}

void count_driver_calls(const struct back_end *be)
{
    struct fake_cuda_control *c = control(be);
    if (c)
        c->inject = inject_result;
}

bool injects(const struct back_end *be)
{
    return be->driver || be->ops == &kv_ops_host;
}

void expect_rules_kept(const struct back_end *be, int live)
{
    struct fake_cuda_control *c = control(be);
    if (!c)
        return;
    ck_assert_msg(c->broken_rules == 0, "%d rules of the driver are broken", c->broken_rules);
    ck_assert_msg(live < 0 || c->live == live, "%d things of the driver are not given back", c->live);
}

struct kv_pool_config small_config(const struct back_end *be)
{
    return (struct kv_pool_config){.ops = be->ops,
                                   .driver = be->driver,
                                   .slots = 4,
                                   .max_tokens = 100,
                                   .layers = 2,
                                   .kv_heads = 3,
                                   .head_dim = 8 * be->scale,
                                   .elem_bytes = 4,
                                   .page_bytes = PAGE,
                                   .total_pages = 20};
}

struct kv_pool *make(const struct kv_pool_config *cfg)
{
    struct status st = STATUS_INIT;
    struct kv_pool *pool = NULL;
    ck_assert_msg(kv_pool_create(&pool, cfg, &st) == ST_OK, "%s", st.message);
    return pool;
}

void grow(struct kv_pool *pool, uint32_t slot, uint32_t tokens)
{
    struct status st = STATUS_INIT;
    ck_assert_msg(kv_slot_grow(pool, slot, tokens, &st) == ST_OK, "%s", st.message);
    ck_assert_uint_ge(kv_slot_tokens(pool, slot), tokens);
}

void check_stats(const struct kv_pool *pool, const char *where)
{
    struct kv_stats s = kv_pool_stats(pool);
    ck_assert_msg(s.mapped_pages + s.fenced_pages + s.free_pages == s.total_pages,
                  "%s: %" PRIu64 " mapped + %" PRIu64 " fenced + %" PRIu64 " free != %" PRIu64, where, s.mapped_pages,
                  s.fenced_pages, s.free_pages, s.total_pages);
}

void expect(const struct kv_pool *pool, uint64_t mapped, uint64_t fenced, uint64_t free_pages)
{
    struct kv_stats s = kv_pool_stats(pool);
    ck_assert_uint_eq(s.mapped_pages, mapped);
    ck_assert_uint_eq(s.fenced_pages, fenced);
    ck_assert_uint_eq(s.free_pages, free_pages);
    check_stats(pool, "expect");
}

void fill(const struct back_end *be, struct kv_pool *pool, uint32_t slot, uint8_t byte)
{
    uint64_t n = kv_slot_tokens(pool, slot) * kv_pool_account(pool).token_bytes;
    uint8_t *bytes = malloc(n + 1);
    memset(bytes, byte, n);
    be->put(kv_slot_view(pool, slot, 0).k, bytes, n);
    free(bytes);
}

void expect_bytes(const struct back_end *be, const uint8_t *at, uint64_t n, uint8_t byte)
{
    uint8_t *bytes = malloc(n + 1);
    be->get(bytes, at, n);
    uint64_t i = 0;
    while (i < n && bytes[i] == byte) /* an assertion writes to a pipe: not for each byte */
        i++;
    ck_assert_msg(i == n, "byte %" PRIu64 " of %" PRIu64 " is %02x, expected %02x", i, n, i < n ? bytes[i] : 0, byte);
    free(bytes);
}
