/* sample_adjust.c - options that change the logits of single tokens, and the history that some of them look at. */
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "worker/sample.h"

#define FIRST_CELLS 64u

static uint32_t hash_id(uint32_t id)
{
    id *= 0x9E3779B1u; /* ids of one text stand close together */
    return id ^ id >> 15;
}

/* The cell of the id, or the empty one where it belongs. */
static struct sample_seen *find(const struct sample_history *h, uint32_t id)
{
    uint32_t at = hash_id(id) & h->mask;
    while (h->cell[at].id_plus_1 && h->cell[at].id_plus_1 != id + 1)
        at = (at + 1) & h->mask;
    return &h->cell[at];
}

static enum status_code reserve(struct sample_history *h, struct status *st)
{
    if (h->cell && 2 * (h->count + 1) <= h->mask + 1)
        return ST_OK;
    uint32_t cells = h->cell ? 2 * (h->mask + 1) : FIRST_CELLS;
    struct sample_history grown = {.cell = calloc(cells, sizeof *grown.cell), .mask = cells - 1, .count = h->count};
    if (!grown.cell)
        return status_nomem(st, "history of a sequence", cells * sizeof *grown.cell);
    for (uint32_t i = 0; h->cell && i <= h->mask; i++)
        if (h->cell[i].id_plus_1)
            *find(&grown, h->cell[i].id_plus_1 - 1) = h->cell[i];
    free(h->cell);
    *h = grown;
    return ST_OK;
}

enum status_code sample_history_add(struct sample_history *h, uint32_t id, bool output, struct status *st)
{
    enum status_code rc = reserve(h, st);
    if (rc != ST_OK)
        return rc;
    struct sample_seen *s = find(h, id);
    if (!s->id_plus_1) {
        s->id_plus_1 = id + 1;
        h->count++;
    }
    s->in_output += output;
    return ST_OK;
}

void sample_history_fini(struct sample_history *h)
{
    free(h->cell);
    *h = (struct sample_history){0};
}

/* Steps of the definition: an infinity stays, but none comes of a finite number. */
static float bounded(float before, float after)
{
    if (isinf(after) && !isinf(before))
        return copysignf(FLT_MAX, after);
    return after;
}

static float penalised(float x, const struct sample_adjust *a, uint32_t in_output)
{
    x = bounded(x, x > 0.0f ? x / a->repetition : x * a->repetition);
    if (in_output == 0)
        return x;
    float times = a->frequency * (float)in_output;
    x = bounded(x, x - times);
    return bounded(x, x - a->presence);
}

void sample_adjust(float *logits, uint32_t n, uint32_t first_id, const struct sample_adjust *a)
{
    for (uint32_t i = 0; a->allowed && i < n; i++)
        if (!(a->allowed[(first_id + i) / 32] >> (first_id + i) % 32 & 1))
            logits[i] = -INFINITY;
    /* ids below first_id wrap to large numbers */
    for (uint32_t i = 0; i < a->n_banned; i++)
        if (a->banned[i] - first_id < n)
            logits[a->banned[i] - first_id] = -INFINITY;
    for (uint32_t i = 0; i < a->n_bias; i++)
        if (a->bias[i].id - first_id < n) {
            float *x = &logits[a->bias[i].id - first_id];
            *x = bounded(*x, *x + a->bias[i].bias);
        }
    const struct sample_history *h = a->history;
    for (uint32_t i = 0; h && h->cell && i <= h->mask; i++)
        if (h->cell[i].id_plus_1 && h->cell[i].id_plus_1 - 1 - first_id < n) {
            float *x = &logits[h->cell[i].id_plus_1 - 1 - first_id];
            *x = penalised(*x, a, h->cell[i].in_output);
        }
}
