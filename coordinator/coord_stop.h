/* coord_stop.h - finds the first stop string in a text that comes in pieces. Prefix stop_.
 *
 * The text ends at the first byte at which any of the strings is complete; of several that are complete there, the longest
 * counts. That depends on the text alone, not on its pieces. What may be the beginning of a string is to be held back:
 *
 *     struct stop_match m = {...};  stop_match_init(&m, set, st);
 *     if (stop_feed(&m, piece, n, true, &used))  // the text ends after `used` bytes of the piece, set->len[m.which] of
 *         ...                                    // which, counted from the end, are the stop string's
 *     else hold the last m.held bytes of the text so far
 *
 * Valid UTF-8 in whole characters, in strings and pieces: then what is not held ends with a whole character.
 */
#ifndef TANDEM_COORD_STOP_H
#define TANDEM_COORD_STOP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

/* Immutable once made; used by any number of matches. */
struct stop_set {
    uint32_t n;
    uint32_t *len;   /* [n] */
    char **text;     /* [n] */
    uint32_t **back; /* [n][len]: after a match of i + 1 bytes fails, so many may still match */
};

struct stop_match {
    const struct stop_set *set;
    uint32_t *state; /* [n] bytes that match so far */
    uint32_t held;   /* the most of them */
    uint32_t which;  /* after stop_feed said true */
};

/* texts are copied, none is empty. RESOURCE_EXHAUSTED. NULL with n 0. */
STATUS_MUST_CHECK enum status_code stop_set_create(struct stop_set **out, char *const *texts, uint32_t n,
                                                   struct status *st);
void stop_set_destroy(struct stop_set *s); /* NULL is fine */

STATUS_MUST_CHECK enum status_code stop_match_init(struct stop_match *m, const struct stop_set *set, struct status *st);
void stop_match_fini(struct stop_match *m);
/* armed false: what is complete in this piece does not count; it may have been the beginning of something that does. */
bool stop_feed(struct stop_match *m, const char *piece, size_t n, bool armed, size_t *used);

#endif
