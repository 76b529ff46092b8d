/* A back end for check_backend.c; BACKEND_FAKE says how it behaves. */
#include <stdlib.h>
#include <string.h>

#include "worker/backend.h"

static int is(const char *behaviour)
{
    const char *b = getenv("BACKEND_FAKE");
    return b && strcmp(b, behaviour) == 0;
}

static enum status_code fake_devices(uint32_t *count, struct status *st)
{
    if (is("driver-too-old"))
        return status_set(st, ST_FAILED_PRECONDITION, "the driver is too old");
    *count = is("no-device") ? 0 : 2;
    return ST_OK;
}

static enum status_code fake_describe(uint32_t device, struct backend_device *out, struct status *st)
{
    if (device >= 2)
        return status_set(st, ST_OUT_OF_RANGE, "device %u", device);
    *out = (struct backend_device){
        .name = "Fake 9000", .memory_bytes = 80ull << 30, .major = 9, .id = {(uint8_t)(device + 1)}};
    return ST_OK;
}

static int opened[2];

static enum status_code fake_open(struct backend_session **out, uint32_t device, struct status *st)
{
    if (is("serves")) {
        *out = (struct backend_session *)(void *)&opened[device];
        opened[device]++;
        return ST_OK;
    }
    return status_set(st, ST_UNIMPLEMENTED, "refuses to serve on device %u", device);
}

static void fake_close(struct backend_session *session)
{
    if (--*(int *)(void *)session != 0)
        abort(); /* closed twice */
}

static const struct backend_parts *fake_parts(struct backend_session *session)
{
    (void)session;
    static const struct backend_parts parts = {.text = "fake:1"};
    return &parts;
}

static enum status_code fake_start(const char *library, struct status *st)
{
    (void)library;
    return is("records") || is("serves") ? ST_OK : status_set(st, ST_FAILED_PRECONDITION, "no recorder");
}

static uint64_t fake_take(bool last, activity_each *each, void *ctx)
{
    (void)last, (void)each, (void)ctx;
    return 0;
}

static const struct activity_source activity = {fake_start, fake_take};

static const struct backend_api api = {BACKEND_ABI, "fake",     fake_devices, fake_describe,
                                       fake_open,   fake_parts, fake_close,   &activity};
static const struct backend_api old_api = {.abi = BACKEND_ABI + 1};

backend_entry tandem_backend;

const struct backend_api *tandem_backend(uint32_t abi)
{
    if (is("answers-null"))
        return NULL;
    return is("other-abi") || abi != BACKEND_ABI ? &old_api : &api;
}
