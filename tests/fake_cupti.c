/* fake_cupti.c - an imitation of as much of CUPTI as worker/cuda_activity.c takes, for tests without a GPU: what the test says the
 * device did becomes records in buffers that it asks for and gives back by the callbacks. Keeps the library's rules: the clock
 * and the callbacks come before the first kind; records that find no buffer are dropped and counted, once. */
#include <string.h>
#include <time.h>

#include <cupti.h>

#include "tests/fake_cupti.h"

extern struct fake_cupti_control fake_cupti; /* tests look it up */

static CUpti_BuffersCallbackRequestFunc request;
static CUpti_BuffersCallbackCompleteFunc complete;
static CUpti_TimestampCallbackFunc own_clock;
static uint8_t *buffer;
static size_t buffer_bytes, used_bytes, dropped;

static uint64_t now(void)
{
    struct timespec t;
    if (own_clock)
        return own_clock();
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec + (uint64_t)fake_cupti.ahead_ns;
}

static size_t size_of(CUpti_ActivityKind kind)
{
    return kind == CUPTI_ACTIVITY_KIND_MEMCPY   ? sizeof(CUpti_ActivityMemcpy6)
           : kind == CUPTI_ACTIVITY_KIND_MEMSET ? sizeof(CUpti_ActivityMemset4)
                                                : sizeof(CUpti_ActivityKernel10);
}

static void give_back(void)
{
    if (buffer)
        complete(NULL, 0, buffer, buffer_bytes, used_bytes);
    buffer = NULL;
}

/* Room for a record; NULL: dropped. */
static void *room(size_t bytes)
{
    size_t max_records = 1;
    if (buffer && used_bytes + bytes > buffer_bytes)
        give_back();
    if (!buffer) {
        request(&buffer, &buffer_bytes, &max_records);
        used_bytes = 0;
        if (buffer && ((uintptr_t)buffer % 8 || buffer_bytes < bytes || max_records))
            fake_cupti.broken_rules++;
    }
    if (!buffer) {
        dropped++;
        return NULL;
    }
    used_bytes += bytes;
    return memset(buffer + used_bytes - bytes, 0xa5, bytes);
}

static void emit(int kind, int what, const char *name, uint64_t bytes, uint64_t begin_ns, uint64_t end_ns)
{
    CUpti_Activity *r = fake_cupti.enabled & 1u << kind ? room(size_of((CUpti_ActivityKind)kind)) : NULL;
    if (!r)
        return;
    r->kind = (CUpti_ActivityKind)kind;
    if (kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
        CUpti_ActivityMemcpy6 *c = (void *)r;
        c->copyKind = (uint8_t)what;
        c->bytes = bytes;
        c->start = begin_ns;
        c->end = end_ns;
        c->streamId = 13;
    } else if (kind == CUPTI_ACTIVITY_KIND_MEMSET) {
        CUpti_ActivityMemset4 *m = (void *)r;
        m->bytes = bytes;
        m->start = begin_ns;
        m->end = end_ns;
        m->streamId = 14;
    } else {
        CUpti_ActivityKernel10 *k = (void *)r;
        k->name = name;
        k->start = begin_ns;
        k->end = end_ns;
        k->streamId = 7;
    }
}

struct fake_cupti_control fake_cupti = {.emit = emit, .clock = now};

CUptiResult CUPTIAPI cuptiGetVersion(uint32_t *version)
{
    *version = fake_cupti.version ? (uint32_t)fake_cupti.version : CUPTI_API_VERSION;
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityRegisterTimestampCallback(CUpti_TimestampCallbackFunc f)
{
    if (fake_cupti.enabled)
        fake_cupti.broken_rules++;
    if (fake_cupti.no_own_clock)
        return CUPTI_ERROR_NOT_SUPPORTED;
    own_clock = f;
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityRegisterCallbacks(CUpti_BuffersCallbackRequestFunc r,
                                                    CUpti_BuffersCallbackCompleteFunc c)
{
    if (fake_cupti.enabled || !r || !c)
        fake_cupti.broken_rules++;
    request = r;
    complete = c;
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityEnable(CUpti_ActivityKind kind)
{
    if (!request)
        fake_cupti.broken_rules++;
    if (fake_cupti.refuse_with && (int)kind == fake_cupti.refuse_kind)
        return (CUptiResult)fake_cupti.refuse_with;
    fake_cupti.enabled |= 1u << kind;
    if (fake_cupti.emits_when_enabled)
        emit(kind, 0, "k", 0, 1000, 2000);
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityDisable(CUpti_ActivityKind kind)
{
    fake_cupti.enabled &= ~(1u << kind);
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityFlushAll(uint32_t flag)
{
    fake_cupti.forced = flag == CUPTI_ACTIVITY_FLAG_FLUSH_FORCED;
    give_back();
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityGetNextRecord(uint8_t *from, size_t valid_bytes, CUpti_Activity **record)
{
    uint8_t *next = *record ? (uint8_t *)*record + size_of((*record)->kind) : from;
    if (next < from || next > from + valid_bytes)
        fake_cupti.broken_rules++;
    if (next >= from + valid_bytes)
        return CUPTI_ERROR_MAX_LIMIT_REACHED;
    *record = (CUpti_Activity *)(void *)next;
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityGetNumDroppedRecords(CUcontext context, uint32_t stream, size_t *out)
{
    (void)context, (void)stream;
    *out = dropped;
    dropped = 0;
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiGetTimestamp(uint64_t *timestamp)
{
    *timestamp = now();
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiGetResultString(CUptiResult result, const char **text)
{
    *text = result == CUPTI_ERROR_INSUFFICIENT_PRIVILEGES ? "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES" : "CUPTI_ERROR_OTHER";
    return CUPTI_SUCCESS;
}
