/* tuned.h - what was found out by measurement, kept in a file so that the next start need not measure again. Prefix tuned_.
 *
 *     tuned_open(&t, "/home/me/.cache/tandem", "NVIDIA H200, driver 13000, cuBLASLt 130100", st);
 *     if (!tuned_find(t, key, value)) { ... measure ...; tuned_put(t, key, value); }
 *     tuned_save(t, st);
 *
 * A record is a key of TUNED_KEY_WORDS numbers and a value of TUNED_VALUE_BYTES bytes; both mean what the user says, and hold
 * for one identity, which must name all that they depend on beside the key. Each identity has a file of its own in the
 * folder. The file is a cache: one that is missing, damaged or of another identity is as good as none.
 * Threads: one for each struct tuned. Processes may use one file at a time: it is replaced as a whole, and what others have
 * put there since is kept.
 */
#ifndef TANDEM_TUNED_H
#define TANDEM_TUNED_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/status.h"

#define TUNED_KEY_WORDS    4
#define TUNED_VALUE_BYTES  72
#define TUNED_RECORDS_MAX  4096
#define TUNED_IDENTITY_MAX 512 /* bytes */

struct tuned;

/* Reads what is there. dir need not exist; it is copied. Fails only without memory, or when the identity or the path is too
 * long (INVALID_ARGUMENT). */
STATUS_MUST_CHECK enum status_code tuned_open(struct tuned **out, const char *dir, const char *identity,
                                              struct status *st);
void tuned_close(struct tuned *t); /* NULL is fine. Saves nothing */
/* Why a file that was there is not used, naming it; NULL: there was none, or it is used. */
const char *tuned_problem(const struct tuned *t);
const char *tuned_path(const struct tuned *t);
uint32_t tuned_count(const struct tuned *t);

bool tuned_find(const struct tuned *t, const uint32_t key[TUNED_KEY_WORDS], void *value);
/* Takes the place of an older value. False when there are TUNED_RECORDS_MAX others. */
bool tuned_put(struct tuned *t, const uint32_t key[TUNED_KEY_WORDS], const void *value);
/* Writes the file if anything was put since the last time, and makes the folder (0700) if it is missing. The errors of the file
 * system, naming the path. */
STATUS_MUST_CHECK enum status_code tuned_save(struct tuned *t, struct status *st);

#endif
