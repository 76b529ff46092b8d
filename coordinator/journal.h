/* journal.h - what a coordinator that starts again must know of the requests that ran when it died. Prefix journal_.
 *
 *     engine, any thread             the journal's own thread                 the disk
 *     journal_accept, _tokens, ───▶ queue (bounded) ──▶ mirror of what ──▶ DIR/00000000000000a3.journal
 *     _end: a copy, no wait                             lives, a write       (fdatasync each sync_ms)
 *
 *     journal_open(&j, &cfg, st);  journal_each(j, take_back, ctx);  journal_start(j, st);  ...  journal_close(j);
 *
 * Nobody waits for the disk. What a kill -9 of the process loses is what was not yet written (10 ms), what a crash of the
 * machine loses is what was not yet synced (sync_ms). Neither changes an answer: the tokens that are missing are sampled
 * again, with the same seed at the same positions; a request whose acceptance is missing is not known any more.
 *
 * Format. A segment is a header and records; all numbers are little-endian.
 *
 *     header  0 "TNDMJRNL"   8 u32 version, 1   12 u32 crc of the other 28 bytes   16 u64 sequence, as in the file's name
 *            24 i64 when it was begun: microseconds since 1970, as all times here
 *     record  0 u32 bytes of the payload, 1 to JOURNAL_MAX_RECORD   4 u32 crc of these 4 bytes and the payload   8 payload
 *     payload 0 u8 kind, then
 *       1 ACCEPT    1 u8 choices  2 u16 bytes of the name  4 u32 keep_ms  8 u64 number  16 i64 arrived  24 i64 deadline
 *                  32 u64 model  40 u8[16] owner  56 u32 prompt ids  60 u32 bytes of the request  64 ids, name, request
 *       2 TOKENS    1 u8 choice  2 u16 ids  4 u32 from: of the choice's tokens, the first here  8 u64 number  16 ids
 *       3 END       8 u64 number  16 i64 until when it is kept; 0: forget it now
 *       4 SNAPSHOT  8 u64 the least number that was never used
 * crc is that of zlib. What begins a segment is everything that lived then, as records, and SNAPSHOT behind them; only then
 * are older segments deleted. So a reader needs one segment: the newest with a SNAPSHOT. Behind a record that is torn or
 * damaged it goes on only if a good one follows at once; tokens behind a gap are left out (and sampled again), and so is what
 * belongs to a request that it does not know. Unknown kinds are passed over.
 *
 * Bounds: the mirror holds a quarter of max_bytes at most, what would pass that is not recorded (skipped); a segment is begun
 * anew at half of max_bytes; so all files together stay below max_bytes. The queue holds JOURNAL_QUEUE_BYTES; what does not
 * fit is dropped and counted, but an END always fits.
 *
 * Errors. A full disk, an I/O error or a failing sync never stops anybody: the journal says so once, counts it and is
 * degraded; the mirror goes on. Each second it tries to begin a segment anew, and with the first that succeeds it is whole
 * again: nothing of what lives then is missing.
 */
#ifndef TANDEM_JOURNAL_H
#define TANDEM_JOURNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "proto/status.h"

#define JOURNAL_OWNER_BYTES 16
#define JOURNAL_MAX_NAME    128
#define JOURNAL_MAX_CHOICES 64
#define JOURNAL_MAX_RECORD  (48u << 20)
#define JOURNAL_QUEUE_BYTES (64u << 20)
#define JOURNAL_MIN_BYTES   (1u << 20)

struct journal;

/* A request as it was accepted. Pointers are copied from; of journal_each they are valid during the call. */
struct journal_accept {
    uint64_t number; /* from journal_number */
    int64_t arrived_us;
    int64_t deadline_us; /* INT64_MAX: none */
    uint64_t model;      /* digest: only the same model goes on with it */
    uint32_t keep_ms;    /* so long it may be without a client */
    uint32_t n_choices;  /* 1 to JOURNAL_MAX_CHOICES */
    uint8_t owner[JOURNAL_OWNER_BYTES];
    const char *name; /* not terminated */
    uint32_t name_len;
    const uint32_t *prompt;
    uint32_t n_prompt;
    const void *request; /* the caller's encoding of the rest */
    uint32_t request_len;
};

/* A request that lived, or one that had ended and is still kept. */
struct journal_found {
    struct journal_accept accept;
    int64_t until_us; /* 0: it had not ended */
    const uint32_t *tokens[JOURNAL_MAX_CHOICES];
    uint32_t n_tokens[JOURNAL_MAX_CHOICES];
};

/* The system's calls, so that tests can fail them. As those of POSIX, errno included. */
struct journal_io {
    int (*open)(void *ctx, int dir, const char *name, int flags);
    ssize_t (*write)(void *ctx, int fd, const void *data, size_t n);
    int (*sync)(void *ctx, int fd);
    int (*truncate)(void *ctx, int fd, off_t size);
    int (*unlink)(void *ctx, int dir, const char *name);
    int64_t (*now_us)(void *ctx); /* since 1970 */
    void *ctx;
};

struct journal_config {
    const char *dir;             /* made where it is missing; its parent is not */
    uint64_t max_bytes;          /* of all files; at least JOURNAL_MIN_BYTES */
    uint32_t sync_ms;            /* what was written is synced within so long; 0: when the system pleases */
    const struct journal_io *io; /* NULL: the system's */
    /* From the journal's thread: it is degraded (failed), or whole again. NULL is fine. */
    void (*report)(void *ctx, bool failed, const char *text);
    void *report_ctx;
};

struct journal_stats {
    bool degraded;
    uint64_t errors;  /* calls to the system that failed */
    uint64_t bytes;   /* written */
    uint64_t records; /* written, those of snapshots not counted */
    uint64_t dropped; /* records that found the queue full, or memory short */
    uint64_t skipped; /* records that would have passed the mirror's bound */
    uint64_t syncs, segments;
    uint64_t live;       /* requests in the mirror */
    uint64_t file_bytes; /* of the newest segment */
    uint64_t damaged;    /* records that the reader passed over, and torn ends, at the start */
};

/* Reads what is there and begins a segment. INVALID_ARGUMENT, NOT_FOUND and PERMISSION_DENIED name the folder,
 * ALREADY_EXISTS: another process uses it. A full disk is no error: the journal starts degraded. */
STATUS_MUST_CHECK enum status_code journal_open(struct journal **out, const struct journal_config *cfg,
                                                struct status *st);
/* What was found, oldest first. Before journal_start. */
void journal_each(struct journal *j, void (*fn)(void *ctx, const struct journal_found *f), void *ctx);
/* From here on the journal's thread writes. */
STATUS_MUST_CHECK enum status_code journal_start(struct journal *j, struct status *st);
/* Writes and syncs what is queued. NULL is fine. */
void journal_close(struct journal *j);

/* Any thread; none of them waits. A number that was never used. */
uint64_t journal_number(struct journal *j);
void journal_accept(struct journal *j, const struct journal_accept *a);
/* Tokens of a choice, from its from-th on. */
void journal_tokens(struct journal *j, uint64_t number, uint32_t choice, uint32_t from, const uint32_t *ids,
                    uint32_t n);
/* until_us since 1970; 0: it is forgotten. */
void journal_end(struct journal *j, uint64_t number, int64_t until_us);
void journal_get_stats(struct journal *j, struct journal_stats *out);

#endif
