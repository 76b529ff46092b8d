/* worker_activity.c - see worker_activity.h. */
#include "worker/worker_activity.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ANCHOR_US  1000.0  /* how far from where it is expected a step's beginning is looked for */
#define DRIFT      1e-4    /* and by how much of the time since the last step farther: more than clocks drift apart */
#define IDLE_US    10000.0 /* behind a longer gap others may have copied, too: only copies that kernels follow */
#define RUN_US     200.0   /* copies of one step follow each other faster */
#define NAME_SLOTS (2 * ACTIVITY_NAMES_MAX)

struct record {
    double begin_us, end_us;
    uint64_t bytes;
    uint32_t kind, stream, name; /* name: of a kernel, in names */
};

struct step {
    uint64_t step;
    double begin_us, end_us;
};

struct name {
    char *mangled;
    char text[ACTIVITY_NAME_MAX];
    uint64_t count;
    double us;
};

struct activity_book {
    void (*placed)(void *ctx, const struct activity_placed *p);
    void *ctx;

    struct record *record; /* what waits; in order of time only within settle */
    uint32_t records, max_records;
    double settled_us; /* all that began before it was laid */

    struct step step[ACTIVITY_STEPS_MAX];
    uint32_t first_step, steps;
    double shift_us;    /* of the last step that was laid: records are so much later than it says */
    double step_end_us; /* its end, by the records' clock */
    double told_end_us; /* and by the steps' */
    double told_us;     /* how long it took */

    double lane_end_us[2][ACTIVITY_LANES_MAX];
    double kernel_end_us, any_end_us; /* the furthest end of what was laid, of kernels and of all */

    struct name name[ACTIVITY_NAMES_MAX + 1]; /* the last: all that have no place */
    uint32_t names, slot[NAME_SLOTS];         /* slot: of a table of hashes, name + 1 */
    struct activity_totals totals;
};

enum status_code activity_book_create(struct activity_book **out, uint32_t max_records,
                                      void (*placed)(void *ctx, const struct activity_placed *p), void *ctx,
                                      struct status *st)
{
    struct activity_book *b = calloc(1, sizeof *b);
    uint32_t n = max_records ? max_records : ACTIVITY_RECORDS_MAX;
    if (b)
        b->record = calloc(n, sizeof *b->record);
    if (!b || !b->record) {
        activity_book_destroy(b);
        return status_nomem(st, "records of a device", sizeof *b + n * sizeof *b->record);
    }
    b->max_records = n;
    b->placed = placed;
    b->ctx = ctx;
    b->settled_us = b->step_end_us = b->told_end_us = b->kernel_end_us = b->any_end_us = -INFINITY;
    b->told_us = INFINITY;
    for (int i = 0; i < 2 * ACTIVITY_LANES_MAX; i++)
        b->lane_end_us[i / ACTIVITY_LANES_MAX][i % ACTIVITY_LANES_MAX] = -INFINITY;
    snprintf(b->name[ACTIVITY_NAMES_MAX].text, ACTIVITY_NAME_MAX, "(other kernels)");
    *out = b;
    return ST_OK;
}

void activity_book_destroy(struct activity_book *b)
{
    if (!b)
        return;
    for (uint32_t i = 0; i < b->names; i++)
        free(b->name[i].mangled);
    free(b->record);
    free(b);
}

/* ---- names ---- */

/* Kernels whose short names are alike are told apart by a number. */
static void name_new(struct activity_book *b, struct name *n)
{
    char text[ACTIVITY_NAME_MAX];
    unsigned alike = 1;
    activity_name_short(text, n->mangled);
    snprintf(n->text, sizeof n->text, "%s", text);
    for (uint32_t i = 0; i < b->names; i++)
        if (strcmp(b->name[i].text, n->text) == 0) {
            snprintf(n->text, sizeof n->text, "%.*s #%u", ACTIVITY_NAME_MAX - 16, text, ++alike);
            i = UINT32_MAX; /* from the first again */
        }
}

static uint32_t name_of(struct activity_book *b, const char *mangled)
{
    uint32_t h = 2166136261u;
    for (const char *p = mangled; *p; p++)
        h = (h ^ (uint8_t)*p) * 16777619u;
    uint32_t at = h % NAME_SLOTS;
    for (; b->slot[at]; at = (at + 1) % NAME_SLOTS)
        if (strcmp(b->name[b->slot[at] - 1].mangled, mangled) == 0)
            return b->slot[at] - 1;
    struct name *n = &b->name[b->names];
    if (b->names == ACTIVITY_NAMES_MAX || !(n->mangled = strdup(mangled)))
        return ACTIVITY_NAMES_MAX;
    name_new(b, n);
    b->slot[at] = b->names + 1;
    return b->names++;
}

static const char *name_text(const struct activity_book *b, const struct record *r)
{
    static const char *const texts[ACTIVITY_KINDS] = {NULL, "copy to device", "copy to host", "copy on device", "fill"};
    return r->kind == ACTIVITY_KERNEL ? b->name[r->name].text : texts[r->kind];
}

/* ---- laying ---- */

/* What of [begin, end) is covered by intervals that come in order of their beginnings. */
struct cover {
    double to_us, end_us, gap_us, longest_us;
};

static struct cover cover_begin(double begin_us, double end_us, double covered_to_us)
{
    return (struct cover){.to_us = fmin(fmax(begin_us, covered_to_us), end_us), .end_us = end_us};
}

static void cover_add(struct cover *c, double begin_us, double end_us)
{
    double gap = fmin(begin_us, c->end_us) - c->to_us;
    if (gap > 0) {
        c->gap_us += gap;
        c->longest_us = fmax(c->longest_us, gap);
    }
    c->to_us = fmax(c->to_us, fmin(end_us, c->end_us));
}

/* By the times that are shown: steps are not all moved alike. */
static uint32_t lane_for(double lane_end_us[ACTIVITY_LANES_MAX], double begin_us, double end_us)
{
    uint32_t lane = 0;
    while (lane + 1 < ACTIVITY_LANES_MAX && lane_end_us[lane] > begin_us)
        lane++;
    lane_end_us[lane] = fmax(lane_end_us[lane], end_us);
    return lane;
}

static void lay(struct activity_book *b, const struct record *r, const struct step *in)
{
    const bool kernel = r->kind == ACTIVITY_KERNEL;
    const struct activity_placed p = {
        .kind = (enum activity_kind)r->kind,
        .name = name_text(b, r),
        .stream = r->stream,
        .lane = lane_for(b->lane_end_us[!kernel], r->begin_us - b->shift_us, r->end_us - b->shift_us),
        .step = in ? in->step : 0,
        .in_step = in != NULL,
        .begin_us = r->begin_us - b->shift_us,
        .end_us = r->end_us - b->shift_us,
        .bytes = r->bytes,
    };
    b->any_end_us = fmax(b->any_end_us, r->end_us);
    if (kernel)
        b->kernel_end_us = fmax(b->kernel_end_us, r->end_us);
    if (r->begin_us < b->settled_us)
        b->totals.late++;
    else if (!kernel)
        b->totals.copies += in != NULL;
    else if (!in)
        b->totals.outside++;
    else {
        b->totals.kernels++;
        b->name[r->name].count++;
        b->name[r->name].us += r->end_us - r->begin_us;
    }
    b->placed(b->ctx, &p);
}

static uint32_t lay_until(struct activity_book *b, uint32_t at, double until_us)
{
    while (at < b->records && b->record[at].begin_us < until_us)
        lay(b, &b->record[at++], NULL);
    return at;
}

/* The time between the last step that was laid, or is about to be, and this one. */
static double gap_us(const struct activity_book *b, const struct step *s)
{
    const double gap = s->begin_us - b->told_end_us;
    return isfinite(gap) ? fmax(gap, 0) : 0;
}

/* How far from where it is expected the step may begin, either way; never nearer to the steps beside it than to itself. */
static double reach_us(const struct activity_book *b, const struct step *s)
{
    return fmin(ANCHOR_US, fmin(s->end_us - s->begin_us, b->told_us) / 2) + DRIFT * gap_us(b, s);
}

/* Copies of a step, and its first kernels, are of one stream; those of the KV pool, for a slot that is resumed, of another. The
 * next record of the same stream as i's, behind it or, by -1, in front; NULL: none that begins after from_us. */
static const struct record *beside(const struct activity_book *b, uint32_t i, int by, double from_us)
{
    const uint32_t stream = b->record[i].stream;
    for (i += (uint32_t)by; i < b->records && b->record[i].begin_us > from_us; i += (uint32_t)by)
        if (b->record[i].stream == stream)
            return &b->record[i];
    return NULL;
}

static bool continues_run(const struct activity_book *b, uint32_t i, double from_us)
{
    const struct record *before = beside(b, i, -1, from_us);
    return before && before->kind == ACTIVITY_COPY_IN && b->record[i].begin_us < before->end_us + RUN_US;
}

/* A kernel comes soon behind the run of copies that begins at i, and before the next run. */
static bool leads_to_kernels(const struct activity_book *b, uint32_t i)
{
    const struct record *r = &b->record[i], *next = beside(b, i, 1, -INFINITY);
    while (next && next->kind != ACTIVITY_KERNEL &&
           (next->kind != ACTIVITY_COPY_IN || next->begin_us < r->end_us + RUN_US)) {
        r = next;
        next = beside(b, (uint32_t)(r - b->record), 1, -INFINITY);
    }
    return next && next->kind == ACTIVITY_KERNEL && next->begin_us < r->end_us + ANCHOR_US;
}

/* How much later the records are than the step says: by the nearest beginning of a run of copies to the device. Where the clocks
 * may have drifted apart by more than steps take the nearest would be that of a later step, so there it is the first. */
static double shift_of(const struct activity_book *b, uint32_t at, const struct step *s)
{
    const double expected = s->begin_us + b->shift_us, reach = reach_us(b, s), gap = gap_us(b, s);
    double best = reach, shift = b->shift_us;
    for (uint32_t i = at; i < b->records && b->record[i].begin_us < expected + best; i++) {
        const struct record *r = &b->record[i];
        const double off = fabs(r->begin_us - expected);
        if (r->kind != ACTIVITY_COPY_IN || off >= best || continues_run(b, i, expected - reach) ||
            (gap > IDLE_US && !leads_to_kernels(b, i)))
            continue;
        best = off;
        shift = r->begin_us - s->begin_us;
        if (DRIFT * gap > ANCHOR_US)
            break;
    }
    return shift;
}

static void count_step(struct activity_book *b, const struct step *s, double step_us, const struct cover *kernels,
                       const struct cover *all)
{
    struct activity_totals *t = &b->totals;
    t->steps++;
    t->step_us += step_us;
    t->busy_us += step_us - kernels->gap_us;
    t->gap_us += kernels->gap_us;
    t->copy_us += kernels->gap_us - all->gap_us;
    t->shift_us = fmax(t->shift_us, fabs(b->shift_us));
    if (kernels->longest_us > t->longest_gap_us) {
        t->longest_gap_us = kernels->longest_us;
        t->longest_step = s->step;
    }
}

/* The oldest step ends, by the records' clock, where its end was told or where the next one begins: back to back there are 3 us
 * between them, and a step's first copy comes by more than that sooner or later than another's. */
static double end_of(struct activity_book *b, uint32_t at, double begin_us, double end_us)
{
    if (b->steps < 2)
        return end_us;
    const struct step *next = &b->step[(b->first_step + 1) % ACTIVITY_STEPS_MAX];
    return fmax(begin_us, fmin(end_us, next->begin_us + shift_of(b, at, next)));
}

/* The oldest step, and what stands in front of it. */
static uint32_t lay_step(struct activity_book *b, uint32_t at)
{
    const struct step s = b->step[b->first_step];
    const double shift = shift_of(b, at, &s), begin = fmax(s.begin_us + shift, b->step_end_us);
    at = lay_until(b, at, begin);
    b->shift_us = shift;
    b->told_end_us = s.end_us;
    b->told_us = s.end_us - s.begin_us;
    const double end = end_of(b, at, begin, fmax(s.end_us + shift, begin));
    b->step_end_us = end;
    struct cover kernels = cover_begin(begin, end, b->kernel_end_us), all = cover_begin(begin, end, b->any_end_us);
    bool any = false;
    for (; at < b->records && b->record[at].begin_us < end; at++) {
        const struct record *r = &b->record[at];
        cover_add(&all, r->begin_us, r->end_us);
        if (r->kind == ACTIVITY_KERNEL)
            cover_add(&kernels, r->begin_us, r->end_us);
        any = any || r->kind == ACTIVITY_KERNEL;
        lay(b, r, &s);
    }
    cover_add(&kernels, end, end);
    cover_add(&all, end, end);
    if (any)
        count_step(b, &s, end - begin, &kernels, &all);
    else
        b->totals.bare_steps++;
    b->first_step = (b->first_step + 1) % ACTIVITY_STEPS_MAX;
    b->steps--;
    return at;
}

static int by_begin(const void *a, const void *b)
{
    const struct record *x = a, *y = b;
    return (x->begin_us > y->begin_us) - (x->begin_us < y->begin_us);
}

/* Records from here on may be of the oldest step. */
static double held_from_us(const struct activity_book *b)
{
    const struct step *s = &b->step[b->first_step];
    return s->begin_us + b->shift_us - reach_us(b, s);
}

/* What begins behind this says nothing of the oldest step any more, nor of where a next one near it begins. */
static double held_to_us(const struct activity_book *b)
{
    const struct step *s = &b->step[b->first_step];
    return s->end_us + b->shift_us + reach_us(b, s) + 3 * ANCHOR_US;
}

/* The last step waits for a next one, which may begin at its end. */
static bool is_complete(const struct activity_book *b, double until_us, double idle_us)
{
    return b->steps && held_to_us(b) < until_us &&
           (b->steps > 1 || b->step[b->first_step].end_us + ANCHOR_US < idle_us);
}

/* idle_us: of steps, and of records, which may be laid without them. */
static void settle(struct activity_book *b, double until_us, double steps_idle_us, double idle_us)
{
    uint32_t at = 0;
    qsort(b->record, b->records, sizeof *b->record, by_begin);
    while (is_complete(b, until_us, steps_idle_us))
        at = lay_step(b, at);
    until_us = fmin(until_us, b->steps ? held_from_us(b) : fmax(b->step_end_us, idle_us));
    at = lay_until(b, at, until_us);
    memmove(b->record, b->record + at, (b->records - at) * sizeof *b->record);
    b->records -= at;
    b->settled_us = fmax(b->settled_us, fmax(b->step_end_us, until_us));
}

void activity_book_settle(struct activity_book *b, double until_us, double idle_us)
{
    settle(b, until_us, idle_us, idle_us);
}

/* The oldest step, with the records that are there. */
static void settle_step(struct activity_book *b)
{
    settle(b, nextafter(held_to_us(b), INFINITY), INFINITY, -INFINITY);
}

void activity_book_step(struct activity_book *b, uint64_t step, double begin_us, double end_us)
{
    if (b->steps == ACTIVITY_STEPS_MAX)
        settle_step(b);
    b->step[(b->first_step + b->steps++) % ACTIVITY_STEPS_MAX] =
        (struct step){.step = step, .begin_us = begin_us, .end_us = end_us};
}

/* The older half goes, with the steps that it reaches into. */
static void make_room(struct activity_book *b)
{
    qsort(b->record, b->records, sizeof *b->record, by_begin);
    const double until_us = nextafter(b->record[b->records / 2].begin_us, INFINITY);
    while (b->steps && b->records == b->max_records && held_from_us(b) < until_us)
        settle_step(b);
    if (b->records == b->max_records)
        activity_book_settle(b, until_us, until_us);
}

void activity_book_add(struct activity_book *b, const struct activity *a)
{
    if (b->records == b->max_records)
        make_room(b);
    b->record[b->records++] = (struct record){
        .begin_us = a->begin_us,
        .end_us = fmax(a->begin_us, a->end_us),
        .bytes = a->bytes,
        .kind = a->kind,
        .stream = a->stream,
        .name = a->kind == ACTIVITY_KERNEL ? name_of(b, a->name ? a->name : "(no name)") : 0,
    };
}

struct activity_totals activity_book_totals(const struct activity_book *b)
{
    return b->totals;
}

size_t activity_book_top(const struct activity_book *b, struct activity_top *out, size_t n)
{
    size_t got = 0;
    for (uint32_t i = 0; i <= ACTIVITY_NAMES_MAX; i++) {
        const struct name *name = &b->name[i];
        if (name->count == 0)
            continue;
        size_t at = got;
        while (at > 0 && out[at - 1].us < name->us)
            at--;
        if (at == n)
            continue;
        got += got < n;
        memmove(out + at + 1, out + at, (got - at - 1) * sizeof *out);
        out[at] = (struct activity_top){.name = name->text, .count = name->count, .us = name->us};
    }
    return got;
}
