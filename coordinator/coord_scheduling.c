/* coord_scheduling.c - how a request wants to be served among others: targets, priority, tenant. */
#include "coordinator/coord_internal.h"

#define MAX_TENANT_BYTES   256
#define MAX_TTFT_TARGET_MS 3600000
#define MAX_TBT_TARGET_MS  60000

static enum status_code take_target(const char *field, bool given, uint32_t ms, uint32_t most, uint32_t server_ms,
                                    int64_t *out_us, struct status *st)
{
    if (given && ms > most)
        return status_set(st, ST_INVALID_ARGUMENT, "scheduling.%s: %u, expected at most %u", field, ms, most);
    *out_us = (int64_t)(given ? ms : server_ms) * 1000;
    return ST_OK;
}

enum status_code take_scheduling(const struct coord *c, struct request *r, const Tandem__V1__Scheduling *m,
                                 struct status *st)
{
    static const Tandem__V1__Scheduling none = TANDEM__V1__SCHEDULING__INIT;
    m = m ? m : &none;
    enum status_code rc = take_target("ttft_target_ms", m->ttft_target_ms_is_case, m->ttft_target_ms,
                                      MAX_TTFT_TARGET_MS, c->opt.ttft_target_ms, &r->ttft_target_us, st);
    if (rc == ST_OK)
        rc = take_target("tbt_target_ms", m->tbt_target_ms_is_case, m->tbt_target_ms, MAX_TBT_TARGET_MS,
                         c->opt.tbt_target_ms, &r->tbt_target_us, st);
    int64_t least_us = (int64_t)c->opt.min_tbt_target_ms * 1000;
    if (m->tbt_target_ms_is_case && r->tbt_target_us > 0 && r->tbt_target_us < least_us)
        r->tbt_target_us = least_us;
    if (rc == ST_OK && (m->priority < -1 || m->priority > 1))
        rc = status_set(st, ST_INVALID_ARGUMENT, "scheduling.priority: %d, expected -1, 0 or 1", m->priority);
    if (rc != ST_OK)
        return rc;
    r->priority = m->priority;
    return intake_hash(c, "scheduling.tenant", &m->tenant, MAX_TENANT_BYTES, &r->tenant, st);
}
