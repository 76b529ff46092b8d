/* status.h - the one error vocabulary of tandem, from kernel wrapper to client.
 *
 * A status is a code for programs (gRPC's own numbers, so that it travels unchanged) and a message for people. The
 * message is written once, where the facts are known; callers may put context in front (status_prefix), never replace.
 *
 *     enum status_code kv_pool_create(struct kv_pool **out, ..., struct status *st)
 *     {
 *         if (cfg->max_slots == 0)
 *             return status_set(st, ST_INVALID_ARGUMENT, "max_slots: 0, expected at least 1");
 *         ...
 *     }
 *
 * Fallible functions return the code and take `struct status *st` last. st may be NULL: then only the code is kept. On
 * ST_OK *st is not touched. Out-parameters are set only on ST_OK. Thread-safe: no shared state.
 */
#ifndef TANDEM_STATUS_H
#define TANDEM_STATUS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum status_code {
    ST_OK = 0,
    ST_CANCELLED = 1,
    ST_UNKNOWN = 2,
    ST_INVALID_ARGUMENT = 3, /* the request or option is wrong: the message names the field and what was expected */
    ST_DEADLINE_EXCEEDED = 4,
    ST_NOT_FOUND = 5,
    ST_ALREADY_EXISTS = 6,
    ST_PERMISSION_DENIED = 7,
    ST_RESOURCE_EXHAUSTED = 8, /* a bounded thing is full: queue, pool, memory */
    ST_FAILED_PRECONDITION = 9,
    ST_ABORTED = 10,
    ST_OUT_OF_RANGE = 11,
    ST_UNIMPLEMENTED = 12,
    ST_INTERNAL = 13,    /* a mistake of ours, or of the hardware */
    ST_UNAVAILABLE = 14, /* not now: starting, draining, a rank was lost */
    ST_DATA_LOSS = 15,   /* a file or message is damaged */
    ST_UNAUTHENTICATED = 16,
};

#define STATUS_MESSAGE_MAX 512 /* with the NUL; longer messages are cut at a character's edge */

struct status {
    enum status_code code;
    char message[STATUS_MESSAGE_MAX];
};

#define STATUS_INIT                                                                                                    \
    {                                                                                                                  \
        ST_OK,                                                                                                         \
        {                                                                                                              \
            0                                                                                                          \
        }                                                                                                              \
    }

#define STATUS_MUST_CHECK         __attribute__((warn_unused_result))
#define STATUS_PRINTF(fmt, first) __attribute__((format(printf, fmt, first)))

/* Writes code and message, returns code. */
enum status_code status_set(struct status *st, enum status_code code, const char *fmt, ...) STATUS_PRINTF(3, 4);

/* As status_set, with ": <strerror(err)>" added at the end. */
enum status_code status_errno(struct status *st, enum status_code code, int err, const char *fmt, ...)
    STATUS_PRINTF(4, 5);

/* Puts "<text>: " in front of the message and returns st's code (st may be NULL: returns ST_UNKNOWN then). */
enum status_code status_prefix(struct status *st, const char *fmt, ...) STATUS_PRINTF(2, 3);

/* Out of memory, the usual case: "out of memory: <what> (<bytes> bytes)". */
enum status_code status_nomem(struct status *st, const char *what, size_t bytes);

/* "INVALID_ARGUMENT" and so on; "UNKNOWN" for a number that is none. */
const char *status_name(enum status_code code);

#ifdef __cplusplus
}
#endif
#endif
