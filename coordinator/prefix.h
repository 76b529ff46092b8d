/* prefix.h - which slots begin with the same tokens: a radix tree over token ids, a block of them per edge. Prefix prefix_.
 *
 *     root --[P tokens]--> node --[P tokens]--> node        entry 3 ends here: slot 3 holds at least these 2 P tokens
 *                            '----[P tokens]--> node        entry 7 ends here
 *
 * An entry is a slot of the ranks, known by its number. A block is what fills a page-group, so that a match is worth
 * whole pages. A node is there as long as an entry passes through it (it counts them). Entries that nobody works in are
 * parked: they stand in one list by last use, and the caller takes the oldest when it needs room. Tokens are compared,
 * hashes only lead to them. Requests of different salts never meet, not even in timing.
 *
 *     prefix_extend(ix, slot, salt, tokens, n);            // the slot holds these tokens now; blocks it had stay
 *     n = prefix_match(ix, salt, prompt, n_prompt - 1, &slot);
 *     prefix_park(ix, slot);  ...  prefix_oldest(ix, not_this, &slot) && ... prefix_remove(ix, slot);
 *
 * Pure data: no clock, thread or I/O. Memory is bounded by max_nodes blocks; when that or the machine's memory is at its
 * end an entry is known by fewer tokens than it has, and nothing else happens.
 */
#ifndef TANDEM_PREFIX_H
#define TANDEM_PREFIX_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/status.h"

struct prefix_index;

struct prefix_config {
    uint32_t block_tokens;  /* at least 1 */
    uint32_t max_entries;   /* entries are 0 to max_entries - 1; at least 1 */
    uint32_t max_nodes;     /* blocks kept at most, each once however many entries share it; at least 1, below 2^31 */
    uint64_t first_version; /* of prefix_version: higher than any of an index before it whose answers are still kept */
};

struct prefix_stats {
    uint32_t entries, parked, nodes;
    uint64_t hits, hit_tokens; /* prefix_hit: calls, tokens */
    uint64_t evictions;        /* parked entries that were removed */
};

/* INVALID_ARGUMENT names the field. */
STATUS_MUST_CHECK enum status_code prefix_create(struct prefix_index **out, const struct prefix_config *cfg,
                                                 struct status *st);
void prefix_destroy(struct prefix_index *ix); /* NULL is fine */

/* The entry holds these tokens, which begin with all that was said of it before, under the same salt. Whole blocks count.
 * Returns the tokens that it is known by. */
uint32_t prefix_extend(struct prefix_index *ix, uint32_t entry, uint64_t salt, const uint32_t *tokens, uint32_t n);
uint32_t prefix_tokens(const struct prefix_index *ix, uint32_t entry); /* 0: not an entry */
/* The longest run of whole blocks that tokens begin with and an entry has; *entry only where it is not 0. */
uint32_t prefix_match(const struct prefix_index *ix, uint64_t salt, const uint32_t *tokens, uint32_t n,
                      uint32_t *entry);
/* Changes whenever the answer of a match may have changed. */
uint64_t prefix_version(const struct prefix_index *ix);
/* A match was made use of: counted, and a parked entry is the youngest again. */
void prefix_hit(struct prefix_index *ix, uint32_t entry, uint32_t tokens);

/* Nobody works in the entry any more. An entry without tokens is not parked: false. */
bool prefix_park(struct prefix_index *ix, uint32_t entry);
bool prefix_parked(const struct prefix_index *ix, uint32_t entry);
/* The parked entry that was used longest ago, but not `except` (UINT32_MAX: any). */
bool prefix_oldest(const struct prefix_index *ix, uint32_t except, uint32_t *entry);
void prefix_remove(struct prefix_index *ix, uint32_t entry); /* no entry: nothing */

struct prefix_stats prefix_stats(const struct prefix_index *ix);
/* Aborts with a message when an invariant is broken. Slow; for tests. */
void prefix_check(const struct prefix_index *ix);

#endif
