/* memory_host.c - KV pages in host memory: one memfd holds all pages, mmap puts them into the ranges.
 *
 *   memfd    | 0 | 1 | 2 | 3 | 4 | ...                        page p stands at offset p * page_bytes
 *               \   \____________
 *   range 0  [ 0 ][ 1 ][ no access ......]  range 1 [ 3 ][ no access ...]
 *
 * The addresses of the first `slots` ranges are one reservation, further ranges one each. A reservation is PROT_NONE
 * and never given back before close: map and unmap only replace what lies in it (MAP_FIXED), so no other mapping of the
 * process can ever get in between.
 *
 * fallocate takes the whole budget at once: a page that is mapped later can always be touched, and several ranks on one
 * machine see each other's share. The kernel clears such a page at its first touch, which MAP_POPULATE does page-wise in
 * one call (52 us for 2 MiB that have been touched before; 510 us when every 4 KiB faults on its own).
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory/memory_internal.h"

/* One fallocate: a signal makes the kernel give back all that the call had taken, so the calls are short. */
#define COMMIT_STEP_BYTES (64ull << 20)
/* Mappings that the rest of the process may need: libraries, threads, heaps. */
#define MAPPINGS_SPARE 2048
/* What must be left to the machine after the pool was created. */
#define AVAILABLE_SPARE_BYTES (64ull << 20)

struct kv_backend {
    struct kv_geometry geo;
    int fd;
    uint8_t *reserved; /* as mmap gave it */
    uint64_t reserved_bytes;
    uint8_t *base;    /* aligned to page_bytes */
    uint8_t **extras; /* one reservation for each range past the first `slots` */
    uint32_t n_extras;
    uint32_t cap_extras;
    uint64_t mappings; /* what vm.max_map_count leaves for pages */
};

static uint8_t *reserve(uint64_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static uint8_t *align_up(uint8_t *p, uint64_t to)
{
    return p + (-(uintptr_t)p & (to - 1));
}

static uint64_t read_number(const char *path, uint64_t otherwise)
{
    char text[64];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return otherwise;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return otherwise;
    text[n] = '\0';
    char *end;
    errno = 0;
    uint64_t v = strtoull(text, &end, 10);
    return end == text || errno ? otherwise : v;
}

static enum status_code check_grain(const struct kv_geometry *geo, struct status *st)
{
    uint64_t grain = (uint64_t)sysconf(_SC_PAGESIZE);
    if (geo->page_bytes % grain == 0)
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "page_bytes: %" PRIu64 ", expected a multiple of %" PRIu64,
                      geo->page_bytes, grain);
}

/* At worst every page is a mapping of its own, and so is the empty rest of every range. */
static enum status_code check_mappings(struct kv_backend *be, const struct kv_geometry *geo, struct status *st)
{
    uint64_t limit = read_number("/proc/sys/vm/max_map_count", UINT64_MAX);
    uint64_t tails = geo->total_pages < geo->slots ? geo->total_pages : geo->slots;
    uint64_t need = geo->total_pages + tails + MAPPINGS_SPARE;
    be->mappings = limit == UINT64_MAX ? limit : limit - MAPPINGS_SPARE - geo->slots;
    if (need <= limit)
        return ST_OK;
    return status_set(st, ST_RESOURCE_EXHAUSTED,
                      "total_pages: %" PRIu64 " pages + %" PRIu64 " slot ends + %d of the process = %" PRIu64
                      " mappings, but vm.max_map_count is %" PRIu64 ": raise it, or raise page_bytes (%" PRIu64 ")",
                      geo->total_pages, tails, MAPPINGS_SPARE, need, limit, geo->page_bytes);
}

static enum status_code check_available(const struct kv_geometry *geo, struct status *st)
{
    char why[128];
    uint64_t bytes = geo->total_pages * geo->page_bytes; /* the pool has checked the product */
    uint64_t avail = kv_host_available(why, sizeof why);
    if (avail == UINT64_MAX || (bytes <= avail && avail - bytes >= AVAILABLE_SPARE_BYTES))
        return ST_OK;
    return status_set(st, ST_RESOURCE_EXHAUSTED,
                      "total_pages: %" PRIu64 " pages of %" PRIu64 " KiB = %" PRIu64 " MiB, but %s leaves %" PRIu64
                      " MiB, of which %llu MiB stay free",
                      geo->total_pages, geo->page_bytes >> 10, bytes >> 20, why, avail >> 20,
                      AVAILABLE_SPARE_BYTES >> 20);
}

static enum status_code create_pages(struct kv_backend *be, struct status *st)
{
    uint64_t bytes = be->geo.total_pages * be->geo.page_bytes;
    be->fd = memfd_create("tandem-kv", MFD_CLOEXEC);
    if (be->fd < 0)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "memfd_create for the KV pages");
    if (ftruncate(be->fd, (off_t)bytes))
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "total_pages: a memfd of %" PRIu64 " MiB", bytes >> 20);
    for (uint64_t done = 0; done < bytes;) {
        uint64_t n = bytes - done < COMMIT_STEP_BYTES ? bytes - done : COMMIT_STEP_BYTES;
        if (fallocate(be->fd, 0, (off_t)done, (off_t)n) == 0)
            done += n;
        else if (errno != EINTR)
            return status_errno(st, ST_RESOURCE_EXHAUSTED, errno,
                                "total_pages: %" PRIu64 " MiB for %" PRIu64 " pages, the machine gave %" PRIu64 " MiB",
                                bytes >> 20, be->geo.total_pages, done >> 20);
    }
    return ST_OK;
}

static void host_close(struct kv_backend *be)
{
    if (!be)
        return;
    for (uint32_t i = 0; i < be->n_extras; i++)
        munmap(be->extras[i], be->geo.range_bytes + be->geo.page_bytes);
    free(be->extras);
    if (be->reserved)
        munmap(be->reserved, be->reserved_bytes);
    if (be->fd >= 0)
        close(be->fd);
    free(be);
}

static enum status_code host_open(struct kv_backend **out, const struct kv_geometry *geo, struct status *st)
{
    struct kv_backend *be = calloc(1, sizeof *be);
    if (!be)
        return status_nomem(st, "host KV pages", sizeof *be);
    be->geo = *geo;
    be->fd = -1;
    enum status_code rc = check_grain(geo, st);
    if (rc == ST_OK)
        rc = check_mappings(be, geo, st);
    if (rc == ST_OK)
        rc = check_available(geo, st);
    if (rc != ST_OK)
        goto fail;

    /* One page more than needed: mmap aligns to 4 KiB only, and transparent huge pages want 2 MiB. */
    if (__builtin_mul_overflow(geo->range_bytes, geo->slots, &be->reserved_bytes) ||
        __builtin_add_overflow(be->reserved_bytes, geo->page_bytes, &be->reserved_bytes)) {
        rc = status_set(st, ST_INVALID_ARGUMENT, "slots: %u ranges of %" PRIu64 " bytes do not fit 64 bits", geo->slots,
                        geo->range_bytes);
        goto fail;
    }
    be->reserved = reserve(be->reserved_bytes);
    if (!be->reserved) {
        rc = status_errno(st, ST_RESOURCE_EXHAUSTED, errno,
                          "slots: address space for %u ranges of %" PRIu64 " MiB = %" PRIu64 " GiB", geo->slots,
                          geo->range_bytes >> 20, be->reserved_bytes >> 30);
        goto fail;
    }
    be->base = align_up(be->reserved, geo->page_bytes);
    rc = create_pages(be, st);
    if (rc != ST_OK)
        goto fail;
    *out = be;
    return ST_OK;
fail:
    host_close(be);
    return rc;
}

static enum status_code host_range(struct kv_backend *be, uint32_t index, uint8_t **base, struct status *st)
{
    if (index < be->geo.slots) {
        *base = be->base + index * be->geo.range_bytes;
        return ST_OK;
    }
    if (be->n_extras == be->cap_extras) {
        uint32_t cap = be->cap_extras ? 2 * be->cap_extras : 16;
        uint8_t **more = realloc(be->extras, cap * sizeof *more);
        if (!more)
            return status_nomem(st, "KV ranges", cap * sizeof *more);
        be->extras = more;
        be->cap_extras = cap;
    }
    uint8_t *p = reserve(be->geo.range_bytes + be->geo.page_bytes);
    if (!p)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "address space for one more range of %" PRIu64 " MiB",
                            be->geo.range_bytes >> 20);
    be->extras[be->n_extras++] = p;
    *base = align_up(p, be->geo.page_bytes);
    return ST_OK;
}

static uint64_t host_mappings(const struct kv_backend *be)
{
    return be->mappings;
}

static enum status_code set_empty(uint8_t *at, uint64_t bytes, struct status *st)
{
    void *p = mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (p != MAP_FAILED)
        return ST_OK;
    return status_errno(st, ST_RESOURCE_EXHAUSTED, errno,
                        "unmapping %" PRIu64 " KiB of KV (vm.max_map_count too small?)", bytes >> 10);
}

static enum status_code host_unmap(struct kv_backend *be, uint8_t *at, uint32_t n, uint64_t *calls, struct status *st)
{
    ++*calls;
    return set_empty(at, n * be->geo.page_bytes, st);
}

/* One call for each run of neighbouring pages. mmap checks the limit on mappings before it touches the old mapping, so
 * a failure leaves the addresses as they were. */
static enum status_code host_map(struct kv_backend *be, uint8_t *at, const uint32_t *pages, uint32_t n, uint64_t *calls,
                                 struct status *st)
{
    const uint64_t size = be->geo.page_bytes;
    for (uint32_t i = 0, run; i < n; i += run) {
        for (run = 1; i + run < n && pages[i + run] == pages[i] + run;)
            run++;
        ++*calls;
        void *p = mmap(at + i * size, run * size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE, be->fd,
                       (off_t)(pages[i] * size));
        if (p == MAP_FAILED) {
            enum status_code rc = status_errno(st, ST_RESOURCE_EXHAUSTED, errno,
                                               "mmap of %u of %u KV pages (vm.max_map_count too small?)", run, n);
            if (i && host_unmap(be, at, i, calls, NULL) != ST_OK)
                abort(); /* merging mappings needs no more of them: not seen to fail; pages would be where none should be */
            return rc;
        }
    }
    return ST_OK;
}

/* memset, not PUNCH_HOLE: 200 us against 940 us (106 and the faults after it) for 2 MiB, and the memory stays ours. */
static enum status_code host_clear(struct kv_backend *be, uint8_t *at, uint64_t bytes, struct status *st)
{
    (void)be, (void)st;
    memset(at, 0, bytes);
    return ST_OK;
}

static enum status_code host_copy(struct kv_backend *be, uint8_t *to, const uint8_t *from, uint64_t bytes,
                                  struct status *st)
{
    (void)be, (void)st;
    memcpy(to, from, bytes);
    return ST_OK;
}

static enum status_code host_save(struct kv_backend *be, void *host, const uint8_t *from, uint64_t bytes,
                                  struct status *st)
{
    (void)be, (void)st;
    memcpy(host, from, bytes);
    return ST_OK;
}

static enum status_code host_load(struct kv_backend *be, uint8_t *to, const void *host, uint64_t bytes,
                                  struct status *st)
{
    (void)be, (void)st;
    memcpy(to, host, bytes);
    return ST_OK;
}

static enum status_code host_sync(struct kv_backend *be, struct status *st)
{
    (void)be, (void)st;
    return ST_OK;
}

static enum status_code host_alloc(struct kv_backend *be, void **out, uint64_t bytes, struct status *st)
{
    (void)be;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (p == MAP_FAILED)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "%" PRIu64 " MiB for suspended slots", bytes >> 20);
    *out = p;
    return ST_OK;
}

static void host_free(struct kv_backend *be, void *p, uint64_t bytes)
{
    (void)be;
    munmap(p, bytes);
}

static enum status_code host_drop(struct kv_backend *be, uint32_t page, struct status *st)
{
    const uint64_t size = be->geo.page_bytes;
    if (fallocate(be->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * size), (off_t)size) == 0)
        return ST_OK;
    return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "giving KV page %u back", page);
}

/* The kernel would rather end some process than refuse a page of a memfd. */
static enum status_code host_restore(struct kv_backend *be, uint32_t page, struct status *st)
{
    const uint64_t size = be->geo.page_bytes;
    char why[128];
    uint64_t avail = kv_host_available(why, sizeof why);
    if (avail != UINT64_MAX && avail < size + AVAILABLE_SPARE_BYTES)
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "taking KV page %u of %" PRIu64 " KiB again: %s leaves %" PRIu64
                          " MiB, of which %llu MiB stay free",
                          page, size >> 10, why, avail >> 20, AVAILABLE_SPARE_BYTES >> 20);
    int rc;
    do
        rc = fallocate(be->fd, 0, (off_t)(page * size), (off_t)size);
    while (rc && errno == EINTR);
    if (rc == 0)
        return ST_OK;
    return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "taking KV page %u of %" PRIu64 " KiB again", page,
                        size >> 10);
}

const struct kv_ops kv_ops_host = {
    .name = "host",
    .new_pages_are_zero = true,
    .close_unmaps = true,
    .open = host_open,
    .close = host_close,
    .mappings = host_mappings,
    .range = host_range,
    .map = host_map,
    .unmap = host_unmap,
    .clear = host_clear,
    .copy = host_copy,
    .save = host_save,
    .load = host_load,
    .sync = host_sync,
    .host_alloc = host_alloc,
    .host_free = host_free,
    .drop = host_drop,
    .restore = host_restore,
};
