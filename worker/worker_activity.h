/* worker_activity.h - records of a device laid under the steps that they belong to, and what comes of it: how long kernels ran in
 * them, how long none did. Prefixes activity_book_ and activity_name_. Arithmetic alone: no device, no clock, no thread.
 *
 *     step  |------------ 7 ------------|--- 8 ...
 *     copies iii                     oo  iii          a step begins with a run of copies to the device
 *     kernels   KKKK KK  KKKKKKK  K               busy: the union, as kernels overlap; gaps: all else of the step
 *                        KKK
 *
 * Steps and records are timed by two clocks that drift apart by some microseconds in a second. So each step is moved to the
 * nearest beginning of a run of copies to the device, all of one stream, and records are moved the other way, onto the steps as
 * they were told. Behind a gap kernels must follow the run: others copy to the device, too, by streams of their own. A step
 * waits for the next one to be told, as what comes behind that one's first copy is not its own.
 *
 * Records and steps come in any order between them, each in a bounded queue; activity_book_settle lays what is not to change any more.
 */
#ifndef TANDEM_WORKER_ACTIVITY_H
#define TANDEM_WORKER_ACTIVITY_H

#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"
#include "worker/activity.h"

#define ACTIVITY_NAME_MAX    96   /* bytes of a short name, with the NUL */
#define ACTIVITY_NAMES_MAX   1024 /* kernels told apart; all others have one name */
#define ACTIVITY_LANES_MAX   8    /* records of one kind at the same time, side by side */
#define ACTIVITY_STEPS_MAX   1024 /* full: the oldest is laid with the records that are there */
#define ACTIVITY_RECORDS_MAX (1u << 18)

/* A kernel's name without what does not tell it apart: namespaces without names, parameters, types of templates that cannot be
 * read; template arguments stay: "glu_kernel<128,1>". Names that are not mangled stay. What is too long is cut and ends
 * with a number made of all of it. Returns out. */
const char *activity_name_short(char out[ACTIVITY_NAME_MAX], const char *mangled);

#define ACTIVITY_JSON_MAX (6 * ACTIVITY_NAME_MAX)
/* A name as what stands between the quotes of a JSON string; bytes that are no ASCII become '?'. Returns out. */
const char *activity_name_json(char out[ACTIVITY_JSON_MAX], const char *name);

/* A record where it was laid. */
struct activity_placed {
    enum activity_kind kind;
    uint32_t stream;
    uint32_t lane; /* of kernels, or of the others: no two in one overlap, but in the last */
    bool in_step;
    uint64_t step;           /* the one that it began in; meaningless unless in_step */
    const char *name;        /* short; of copies and fills, too */
    double begin_us, end_us; /* by the clock of the steps */
    uint64_t bytes;
};

struct activity_totals {
    uint64_t steps;      /* with at least one kernel; the sums are of these */
    uint64_t bare_steps; /* without any */
    uint64_t kernels, copies;
    uint64_t outside; /* kernels between steps, before and behind them */
    uint64_t late;    /* records that came when their time was settled: in no sum */
    double step_us;   /* of the steps */
    double busy_us;   /* of it, with a kernel running */
    double gap_us;    /* without */
    double copy_us;   /* of gap_us, with a copy or fill running */
    double longest_gap_us;
    uint64_t longest_step; /* where that was */
    double shift_us;       /* the most that records were moved, either way */
};

struct activity_top {
    const char *name;
    uint64_t count;
    double us;
};

struct activity_book;

/* placed is called for each record, in the order of time within a call of settle. max_records: 0: ACTIVITY_RECORDS_MAX; when
 * so many wait, the older half of them is laid. */
STATUS_MUST_CHECK enum status_code activity_book_create(struct activity_book **out, uint32_t max_records,
                                                        void (*placed)(void *ctx, const struct activity_placed *p),
                                                        void *ctx, struct status *st);
void activity_book_destroy(struct activity_book *b);                                             /* NULL is fine */
void activity_book_step(struct activity_book *b, uint64_t step, double begin_us, double end_us); /* in order of time */
void activity_book_add(struct activity_book *b, const struct activity *a);
/* Lays what is not to change any more. All records that begin before until_us have been told, and of steps to come none begins
 * before idle_us, as far as one can know: such a one is laid with the records that are left. INFINITY, INFINITY: that was all. */
void activity_book_settle(struct activity_book *b, double until_us, double idle_us);
struct activity_totals activity_book_totals(const struct activity_book *b);
/* The kernels of steps that took most, most first; at most n. Returns how many. */
size_t activity_book_top(const struct activity_book *b, struct activity_top *out, size_t n);

#endif
