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
};

static uint64_t host_granularity(void)
{
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

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

/* At worst every page is a mapping of its own, and so is the empty rest of every range. */
static enum status_code check_mappings(const struct kv_geometry *geo, struct status *st)
{
    uint64_t limit = read_number("/proc/sys/vm/max_map_count", UINT64_MAX);
    uint64_t tails = geo->total_pages < geo->slots ? geo->total_pages : geo->slots;
    uint64_t need = geo->total_pages + tails + MAPPINGS_SPARE;
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
    enum status_code rc = check_mappings(geo, st);
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

/* Both check the limit on mappings before they touch the old mapping, so a failure leaves the range as it was. */
static enum status_code host_map(struct kv_backend *be, uint8_t *at, uint64_t first_page, uint64_t pages,
                                 struct status *st)
{
    void *p = mmap(at, pages * be->geo.page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE,
                   be->fd, (off_t)(first_page * be->geo.page_bytes));
    if (p == MAP_FAILED)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno,
                            "mmap of %" PRIu64 " KV pages (vm.max_map_count too small?)", pages);
    return ST_OK;
}

static enum status_code host_unmap(struct kv_backend *be, uint8_t *at, uint64_t pages, struct status *st)
{
    void *p =
        mmap(at, pages * be->geo.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (p == MAP_FAILED)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno,
                            "unmapping %" PRIu64 " KV pages (vm.max_map_count too small?)", pages);
    return ST_OK;
}

/* memset, not PUNCH_HOLE: 200 us against 940 us (106 and the faults after it) for 2 MiB, and the memory stays ours. */
static void host_clear(struct kv_backend *be, uint8_t *at, uint64_t bytes)
{
    (void)be;
    memset(at, 0, bytes);
}

const struct kv_ops kv_ops_host = {
    .name = "host",
    .granularity = host_granularity,
    .open = host_open,
    .close = host_close,
    .range = host_range,
    .map = host_map,
    .unmap = host_unmap,
    .clear = host_clear,
};
