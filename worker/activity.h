/* activity.h - what a device did, record by record: kernels, copies, fills. From a back end that can tell (cuda_activity.c) to the
 * worker's timeline (worker_kernels.c). Prefix activity_.
 *
 *     source->start(NULL, st);                       // before anything else is asked of the back end
 *     lost += source->take(false, each, ctx);        // now and then; not on the thread of the steps
 *     lost += source->take(true, each, ctx);         // once, at the end
 */
#ifndef TANDEM_ACTIVITY_H
#define TANDEM_ACTIVITY_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/status.h"

enum activity_kind {
    ACTIVITY_KERNEL,
    ACTIVITY_COPY_IN,  /* to the device */
    ACTIVITY_COPY_OUT, /* to the host */
    ACTIVITY_COPY,     /* between devices, or within one */
    ACTIVITY_FILL,
    ACTIVITY_KINDS
};

struct activity {
    enum activity_kind kind;
    uint32_t stream;         /* a number that tells streams apart */
    double begin_us, end_us; /* CLOCK_MONOTONIC */
    uint64_t bytes;          /* of copies and fills */
    const char *name;        /* of a kernel, as the compiler mangled it; valid during the call. Else NULL */
};

typedef void activity_each(void *ctx, const struct activity *a);

struct activity_source {
    /* From now on all that the process has devices do is recorded. Once in a process. library: instead of the ones that are
     * looked for; NULL: those. FAILED_PRECONDITION says what was tried and what is needed. */
    enum status_code (*start)(const char *library, struct status *st);
    /* Hands over the records that are complete, in no strict order. One thread at a time, any one. last: whatever there is,
     * and the end of recording. Returns how many were lost since the last call, as there was no room for them or they had no
     * times. */
    uint64_t (*take)(bool last, activity_each *each, void *ctx);
};

#endif
