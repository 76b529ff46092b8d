/* flight.h - the flight recorder: the last steps, groups and requests of a coordinator, in a file. Prefix flight_.
 *
 * The file is mapped and shared, so what was recorded is there when the process is killed, at any moment and by any signal; a
 * machine that loses power may lose the end of it. All of it is reserved when it is opened: it never grows, and a full disk is
 * an error then and not later. Numbers are little-endian (the program does not run on others).
 *
 *   0  header, 4096 bytes      offset  size
 *                              0       8     "TANDFLT1"
 *                              8       4     record size, 128
 *                              12      4     0
 *                              16      8     number of records, n
 *                              24      8     clock: microseconds since 1970 less the record's time_us, at the last start
 *                              32      4     pid of the last writer
 *                              36      rest  0
 *   4096  record 0 .. n - 1    0       8     seq: 1, 2, 3 ... through restarts; record seq stands at (seq - 1) % n. 0: empty
 *                              8       8     time_us, of the writer's monotonic clock
 *                              16      2     kind, enum flight_kind
 *                              18      2     rank; 0xffff: none
 *                              20      4     check: FNV-1a of the 128 bytes with 0 here
 *                              24      8     epoch of the worker group; 0: none
 *                              32      8     id: of a step or a request
 *                              40      88    by kind: text (zero-padded), or 22 numbers of 4 bytes, or 6 and a name of 64
 *
 * A record is valid when seq stands where it should and check is right; a reader leaves out all others. A writer killed in the
 * middle of a record has spoilt that one, the oldest. A file that was written before is gone on with when its size is the same.
 *
 * The writer is one thread; every function of it takes a recorder of NULL as switched off.
 */
#ifndef TANDEM_FLIGHT_H
#define TANDEM_FLIGHT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "proto/ranks.h"
#include "proto/status.h"

#define FLIGHT_HEADER_BYTES 4096u
#define FLIGHT_RECORD_BYTES 128u
#define FLIGHT_MIN_BYTES    (FLIGHT_HEADER_BYTES + 64 * FLIGHT_RECORD_BYTES)
#define FLIGHT_MAX_BYTES    (1ull << 30)
#define FLIGHT_NO_RANK      0xffff
#define FLIGHT_MAX_RANKS    MAX_RANKS
#define FLIGHT_TEXT         88
#define FLIGHT_NAME         64

enum flight_kind {
    FLIGHT_START = 1, /* text: version */
    FLIGHT_STOP,      /* an orderly end */
    FLIGHT_ATTACH,    /* a rank came; text: "pid 12 on host, device" */
    FLIGHT_READY,     /* a group serves; number: ranks, slots, pages, context */
    FLIGHT_LOST,      /* a group is gone; text: why */
    FLIGHT_PLAN,   /* id: step; number: rows, decodes, chunks, chunk rows, admits, releases, samples, context / 1024 */
    FLIGHT_RESULT, /* of a rank, id: step; number: microseconds of its own, tokens */
    FLIGHT_ADMIT,  /* a request was taken; number: prompt tokens, max_tokens, answers; name */
    FLIGHT_REFUSE, /* or not; number: code, prompt tokens; name */
    FLIGHT_END,    /* a request has ended; number: code, prompt tokens, answer tokens; name */
    FLIGHT_SILENT, /* no heartbeat of a rank came when it should have; number: milliseconds since the last */
    FLIGHT_KINDS
};

struct flight_record {
    uint64_t seq;
    int64_t time_us;
    uint16_t kind, rank;
    uint32_t check;
    uint64_t epoch, id;
    union {
        char text[FLIGHT_TEXT]; /* without an end mark when it is full */
        struct {
            uint32_t number[6];
            char name[FLIGHT_NAME];
        };
        uint32_t numbers[FLIGHT_TEXT / 4];
    };
};

/* ---- writing ---- */

struct flight;
/* bytes: of the whole file, FLIGHT_MIN_BYTES to FLIGHT_MAX_BYTES. INVALID_ARGUMENT, RESOURCE_EXHAUSTED (disk), or what the
 * system says of the path. */
STATUS_MUST_CHECK enum status_code flight_open(struct flight **out, const char *path, uint64_t bytes, int64_t now_us,
                                               struct status *st);
void flight_close(struct flight *f, int64_t now_us); /* records STOP */
/* seq and check are filled in. */
void flight_write(struct flight *f, struct flight_record *r);
/* text is cut where it is too long. */
void flight_text(struct flight *f, int64_t now_us, enum flight_kind kind, uint64_t epoch, uint32_t rank,
                 const char *text);
void flight_numbers(struct flight *f, int64_t now_us, enum flight_kind kind, uint64_t epoch, uint32_t rank, uint64_t id,
                    const uint32_t *number, uint32_t n);
/* With up to 6 numbers. */
void flight_named(struct flight *f, int64_t now_us, enum flight_kind kind, const char *name, const uint32_t *number,
                  uint32_t n);

/* ---- reading ---- */

struct flight_log {
    struct flight_record *record; /* by seq */
    size_t n;
    int64_t clock_us; /* + time_us: microseconds since 1970 */
    uint32_t pid;
    uint64_t spoilt; /* records that were not empty and not valid */
};
/* name: for messages. INVALID_ARGUMENT: not such a file. A file that was cut gives what is there. */
STATUS_MUST_CHECK enum status_code flight_parse(struct flight_log *out, const char *name, const void *bytes, size_t n,
                                                struct status *st);
STATUS_MUST_CHECK enum status_code flight_load(struct flight_log *out, const char *path, struct status *st);
void flight_log_free(struct flight_log *l); /* fine on zeroed memory */
/* "plan"; "?" for a kind that is none. */
const char *flight_kind_name(uint32_t kind);

/* What the records say of the ranks of the newest group that planned steps. */
struct flight_rank {
    bool seen;
    uint32_t silent_ms;   /* without a heartbeat, at the last look; 0: it beats, or was heard again */
    uint64_t last_step;   /* that it answered; 0: none */
    int64_t last_us;      /* when its last record came */
    uint64_t steps, last; /* answered; and as the last of all ranks */
    double compute_us;    /* mean of what it says of itself */
    double behind_us;     /* mean, after the first rank to answer */
    double longest_us;    /* the longest it was behind */
};
struct flight_verdict {
    uint64_t epoch; /* 0: no group planned anything */
    uint32_t ranks;
    uint64_t planned; /* the newest step */
    int64_t end_us;   /* time of the newest record */
    struct flight_rank rank[FLIGHT_MAX_RANKS];
    uint32_t owing; /* ranks that have not answered what others have, or what is overdue */
    bool owes[FLIGHT_MAX_RANKS];
    uint32_t slowest; /* answered last most often; FLIGHT_NO_RANK: all alike, or one rank */
    const char *lost; /* why the group ended, into the log; NULL: it did not */
    char text[512];   /* all of that in a sentence or two */
};
/* epoch 0: of the group that planned or was lost last. */
void flight_judge(struct flight_verdict *out, const struct flight_log *l, uint64_t epoch);

#endif
