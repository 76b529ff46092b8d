/* Stop strings: one automaton of Knuth, Morris and Pratt for each, side by side. */
#include "coordinator/coord_stop.h"

#include <stdlib.h>
#include <string.h>

static void fill_back(uint32_t *back, const char *text, uint32_t n)
{
    back[0] = 0;
    for (uint32_t i = 1, k = 0; i < n; i++) {
        while (k && text[i] != text[k])
            k = back[k - 1];
        k += text[i] == text[k];
        back[i] = k;
    }
}

enum status_code stop_set_create(struct stop_set **out, char *const *texts, uint32_t n, struct status *st)
{
    *out = NULL;
    if (n == 0)
        return ST_OK;
    struct stop_set *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "stop strings", sizeof *s);
    s->len = calloc(n, sizeof *s->len);
    s->text = calloc(n, sizeof *s->text);
    s->back = calloc(n, sizeof *s->back);
    if (!s->len || !s->text || !s->back)
        goto nomem;
    for (s->n = 0; s->n < n; s->n++) {
        uint32_t i = s->n, len = (uint32_t)strlen(texts[i]);
        s->len[i] = len;
        s->text[i] = strdup(texts[i]);
        s->back[i] = malloc(len * sizeof **s->back);
        if (!s->text[i] || !s->back[i]) {
            s->n++;
            goto nomem;
        }
        fill_back(s->back[i], s->text[i], len);
    }
    *out = s;
    return ST_OK;
nomem:
    stop_set_destroy(s);
    return status_nomem(st, "stop strings", n * sizeof(char *));
}

void stop_set_destroy(struct stop_set *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; i < s->n; i++) {
        free(s->text[i]);
        free(s->back[i]);
    }
    free(s->len);
    free(s->text);
    free(s->back);
    free(s);
}

enum status_code stop_match_init(struct stop_match *m, const struct stop_set *set, struct status *st)
{
    *m = (struct stop_match){.set = set};
    if (!set)
        return ST_OK;
    m->state = calloc(set->n, sizeof *m->state);
    return m->state ? ST_OK : status_nomem(st, "stop strings", set->n * sizeof *m->state);
}

void stop_match_fini(struct stop_match *m)
{
    free(m->state);
    m->state = NULL;
}

static uint32_t advance(const struct stop_set *s, uint32_t i, uint32_t state, char c)
{
    if (state == s->len[i]) /* it was complete and did not count */
        state = s->back[i][state - 1];
    while (state && s->text[i][state] != c)
        state = s->back[i][state - 1];
    return state + (s->text[i][state] == c);
}

bool stop_feed(struct stop_match *m, const char *piece, size_t n, bool armed, size_t *used)
{
    const struct stop_set *s = m->set;
    if (!s)
        return false;
    for (size_t at = 0; at < n; at++) {
        uint32_t longest = 0;
        for (uint32_t i = 0; i < s->n; i++) {
            m->state[i] = advance(s, i, m->state[i], piece[at]);
            if (armed && m->state[i] == s->len[i] && s->len[i] > longest) {
                longest = s->len[i];
                m->which = i;
            }
        }
        if (longest) {
            m->held = 0;
            *used = at + 1;
            return true;
        }
    }
    m->held = 0;
    for (uint32_t i = 0; i < s->n; i++) {
        if (m->state[i] == s->len[i])
            m->state[i] = s->back[i][s->len[i] - 1];
        m->held = m->state[i] > m->held ? m->state[i] : m->held;
    }
    return false;
}
