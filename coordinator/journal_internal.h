/* journal_internal.h - what the journal's own files, its tests and its fuzz target share. */
#ifndef TANDEM_JOURNAL_INTERNAL_H
#define TANDEM_JOURNAL_INTERNAL_H

#include "coordinator/journal.h"

#define JOURNAL_HEADER_BYTES 32
#define JOURNAL_FRAME_BYTES  8
#define JOURNAL_ACCEPT_BYTES 64
#define JOURNAL_TOKENS_BYTES 16
#define JOURNAL_END_BYTES    24
#define JOURNAL_SNAP_BYTES   16
#define JOURNAL_TURN_US      10000   /* between two writes */
#define JOURNAL_RETRY_US     1000000 /* between two tries of a degraded journal */
#define JOURNAL_EXPIRE_US    1000000
#define JOURNAL_BUCKETS      4096

enum journal_kind { JOURNAL_ACCEPT = 1, JOURNAL_TOKENS, JOURNAL_END, JOURNAL_SNAPSHOT };

/* ---- journal_format.c ---- */

uint32_t journal_crc(const void *frame, size_t n); /* of a frame that holds its length and n bytes of payload */
void journal_put_header(uint8_t out[JOURNAL_HEADER_BYTES], uint64_t sequence, int64_t now_us);
bool journal_get_header(const uint8_t *data, size_t len, uint64_t *sequence);
/* Sizes and contents of payloads. */
size_t journal_accept_size(const struct journal_accept *a);
void journal_put_accept(uint8_t *out, const struct journal_accept *a);
bool journal_get_accept(const uint8_t *p, size_t n, struct journal_accept *a); /* pointers into p */
void journal_put_tokens(uint8_t *out, uint64_t number, uint32_t choice, uint32_t from, const uint32_t *ids, uint32_t n);
void journal_put_end(uint8_t *out, uint64_t number, int64_t until_us);
void journal_put_snapshot(uint8_t *out, uint64_t next_number);
/* Fills length and crc of a frame whose payload is in place. */
void journal_seal(uint8_t *frame, uint32_t payload);

/* ---- journal_state.c: the requests that live, as records make them ---- */

struct journal_entry {
    struct journal_entry *next, *prev, *hash_next; /* live ones by acceptance, ended ones by their end */
    uint8_t *payload;                              /* of ACCEPT */
    size_t payload_len;
    struct journal_accept accept; /* into payload */
    int64_t until_us;             /* 0: it lives */
    struct journal_ids {
        uint32_t *id, n, cap;
    } * choice; /* [n_choices] */
};

struct journal_list {
    struct journal_entry *head, *tail;
};

struct journal_state {
    struct journal_list live, ended;
    struct journal_entry *bucket[JOURNAL_BUCKETS];
    uint64_t next_number; /* never used */
    uint64_t n;           /* requests, live and ended */
    uint64_t bytes;       /* what their records take */
    uint64_t max_bytes;
};

enum journal_applied { JOURNAL_DONE, JOURNAL_IGNORED, JOURNAL_OVER, JOURNAL_NOMEM };

/* DONE: the state has changed, and the record belongs on the disk. OVER: it would pass max_bytes. */
enum journal_applied journal_apply(struct journal_state *s, const uint8_t *payload, size_t n);
void journal_expire(struct journal_state *s, int64_t now_us); /* walks all that have ended */
/* All of them: the ended, then the live. NULL: no more. */
struct journal_entry *journal_first(const struct journal_state *s);
struct journal_entry *journal_next(const struct journal_state *s, const struct journal_entry *e);
void journal_state_fini(struct journal_state *s);
void journal_found_of(const struct journal_entry *e, struct journal_found *out);

/* ---- journal_read.c ---- */

/* A segment's bytes into an empty state. False: no header, or no SNAPSHOT. *damaged counts what was passed over. */
bool journal_parse(struct journal_state *s, const uint8_t *data, size_t len, uint64_t *sequence, uint64_t *damaged);
/* The newest good segment of the folder; *sequence: the newest there is, good or not. A folder without any is fine. */
STATUS_MUST_CHECK enum status_code journal_read_dir(struct journal_state *s, int dir, uint64_t *sequence,
                                                    uint64_t *damaged, struct status *st);
#define JOURNAL_NAME_BYTES 32
void journal_file_name(char out[JOURNAL_NAME_BYTES], uint64_t sequence);
bool journal_file_sequence(const char *name, uint64_t *sequence);

/* ---- journal_file.c: the newest segment; one thread ---- */

struct journal_file {
    struct journal_io io;
    int dir, fd; /* fd -1: degraded, or not begun */
    uint64_t sequence, size, max_bytes;
    uint32_t sync_ms;
    int64_t unsynced_us,
        tried_us; /* since when something is written and not synced, 0: all is; last try to begin one */
    uint8_t *out; /* frames that wait for a write */
    size_t out_len, out_cap;
    const char *failed; /* what went wrong last, with `error` */
    int error;
    struct journal_stats stats;
};

/* Begins a segment with all of `s` and deletes older ones. False: the file is degraded. */
bool journal_file_begin(struct journal_file *f, const struct journal_state *s);
/* A frame around the payload into `out`. False: memory is short. */
bool journal_file_add(struct journal_file *f, const uint8_t *payload, size_t n);
/* Writes `out`, syncs when it is time. False: as above; what `out` held is in the mirror only. */
bool journal_file_flush(struct journal_file *f, bool sync_now);
void journal_file_fini(struct journal_file *f);

/* ---- journal.c ---- */

/* One turn of the journal's thread: the queue into mirror and file. Tests call it in the thread's place. */
void journal_turn(struct journal *j, bool last);

#endif
