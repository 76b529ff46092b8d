/* flight_judge.c - which rank was slow or dead, from the records of the newest group. */
#include <inttypes.h>
#include <stdarg.h>
#include <string.h>

#include "coordinator/flight.h"

#define SLOW_SHARE 0.7  /* last in so many of the steps, and */
#define SLOW_US    50.0 /* so far behind the first in the mean */
#define MIN_STEPS  8

/* A step whose answers are being counted. Plans are in order and at most two in flight: a small ring is plenty. */
#define OPEN_STEPS 16
struct open_step {
    uint64_t step;
    int64_t first_us;
    uint32_t answers;
};

static void say(struct flight_verdict *v, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(struct flight_verdict *v, const char *fmt, ...)
{
    size_t n = strlen(v->text);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(v->text + n, sizeof v->text - n, fmt, ap);
    va_end(ap);
}

/* Records [first, end) of the newest group that planned or was lost, within one run of a coordinator: another counts epochs
 * from 1 again. */
static uint64_t newest_epoch(const struct flight_log *l, uint64_t want, size_t *first, size_t *end)
{
    uint64_t epoch = 0;
    *end = l->n;
    for (size_t i = l->n; i-- > 0;) {
        const struct flight_record *r = &l->record[i];
        if (!epoch && (r->kind == FLIGHT_PLAN || r->kind == FLIGHT_LOST) && (!want || r->epoch == want))
            epoch = r->epoch;
        if (epoch && r->epoch == epoch)
            *first = i;
        if (r->kind == FLIGHT_START) {
            if (epoch)
                break;
            *end = i;
        }
    }
    return epoch;
}

static void take_result(struct flight_verdict *v, struct open_step open[OPEN_STEPS], const struct flight_record *r)
{
    struct flight_rank *k = &v->rank[r->rank];
    struct open_step *o = &open[r->id % OPEN_STEPS];
    if (o->step != r->id)
        *o = (struct open_step){.step = r->id, .first_us = r->time_us};
    double behind_us = (double)r->time_us - (double)o->first_us; /* of any bytes: no overflow */
    k->seen = true;
    k->silent_ms = 0;
    k->last_step = r->id;
    k->last_us = r->time_us;
    k->compute_us += r->numbers[0];
    k->behind_us += behind_us;
    k->longest_us = behind_us > k->longest_us ? behind_us : k->longest_us;
    k->steps++;
    if (++o->answers == v->ranks)
        k->last++;
}

static void take(struct flight_verdict *v, struct open_step open[OPEN_STEPS], const struct flight_record *r)
{
    if (r->kind == FLIGHT_READY && r->numbers[0] <= FLIGHT_MAX_RANKS)
        v->ranks = r->numbers[0];
    if (r->kind == FLIGHT_PLAN)
        v->planned = r->id;
    if (r->kind == FLIGHT_LOST)
        v->lost = r->text;
    if (r->rank >= FLIGHT_MAX_RANKS)
        return;
    if (r->rank >= v->ranks) /* READY may have been overwritten long ago */
        v->ranks = r->rank + 1u;
    if (r->kind == FLIGHT_ATTACH) {
        v->rank[r->rank].seen = true;
        v->rank[r->rank].last_us = r->time_us;
    }
    if (r->kind == FLIGHT_SILENT)
        v->rank[r->rank].silent_ms = r->numbers[0];
    if (r->kind == FLIGHT_RESULT)
        take_result(v, open, r);
}

/* Who has not answered: less than the others, or nobody of those has anything since the newest plan. */
static void find_owing(struct flight_verdict *v)
{
    uint64_t most = 0;
    for (uint32_t i = 0; i < v->ranks; i++)
        most = v->rank[i].last_step > most ? v->rank[i].last_step : most;
    for (uint32_t i = 0; i < v->ranks; i++) {
        v->owes[i] = v->planned && v->rank[i].last_step < most;
        v->owing += v->owes[i];
    }
    if (v->owing)
        say(v, "Rank%s", v->owing > 1 ? "s" : "");
    for (uint32_t i = 0, n = 0; i < v->ranks; i++)
        if (v->owes[i])
            say(v, "%s %u", n++ ? "," : "", i);
    for (uint32_t i = 0; i < v->ranks; i++)
        if (v->owes[i]) {
            say(v,
                " ha%s not answered step %" PRIu64
                ", which others have; last heard %.3f s before the end of the record. ",
                v->owing > 1 ? "ve" : "s", v->rank[i].last_step + 1,
                ((double)v->end_us - (double)v->rank[i].last_us) / 1e6);
            break;
        }
    if (!v->owing && v->planned > most)
        say(v, "No rank has answered step %" PRIu64 ". ", most + 1);
}

static void find_silent(struct flight_verdict *v)
{
    for (uint32_t i = 0; i < v->ranks; i++)
        if (v->rank[i].silent_ms)
            say(v, "Rank %u was silent: no heartbeat for %.1f s. ", i, v->rank[i].silent_ms / 1e3);
}

static void find_slowest(struct flight_verdict *v)
{
    v->slowest = FLIGHT_NO_RANK;
    for (uint32_t i = 0; i < v->ranks; i++) {
        struct flight_rank *k = &v->rank[i];
        if (k->steps) {
            k->compute_us /= (double)k->steps;
            k->behind_us /= (double)k->steps;
        }
        if (v->ranks > 1 && k->steps >= MIN_STEPS && (double)k->last >= SLOW_SHARE * (double)k->steps &&
            k->behind_us >= SLOW_US)
            v->slowest = i;
    }
    if (v->slowest == FLIGHT_NO_RANK)
        return;
    const struct flight_rank *k = &v->rank[v->slowest];
    say(v,
        "Rank %u is the slowest: the last to answer %" PRIu64 " of %" PRIu64
        " steps, %.3f ms after the first in the mean. ",
        v->slowest, k->last, k->steps, k->behind_us / 1e3);
}

void flight_judge(struct flight_verdict *v, const struct flight_log *l, uint64_t epoch)
{
    struct open_step open[OPEN_STEPS] = {{0}};
    size_t first = 0, end = 0;
    memset(v, 0, sizeof *v);
    v->slowest = FLIGHT_NO_RANK;
    v->epoch = newest_epoch(l, epoch, &first, &end);
    v->end_us = end ? l->record[end - 1].time_us : 0;
    if (!v->epoch) {
        say(v, "No %s has planned a step.", epoch ? "group of that epoch" : "group");
        return;
    }
    for (size_t i = first; i < end; i++)
        if (l->record[i].epoch == v->epoch)
            take(v, open, &l->record[i]);
    if (v->lost)
        say(v, "The group of epoch %" PRIu64 " was lost: %.*s. ", v->epoch, FLIGHT_TEXT, v->lost);
    find_owing(v);
    find_silent(v);
    find_slowest(v);
    if (!v->text[0])
        say(v, "All %u ranks of epoch %" PRIu64 " have answered alike.", v->ranks, v->epoch);
}
