/* coord_internal.h - what the files of tandem-coordinator share. Not for other programs.
 *
 *     poll threads (rpc)                intake threads (2)              engine thread (1)
 *     on_open: copy, bound ───────────▶ unpack, validate, ──submit────▶ scheduler, request table,
 *     on_writable, on_close ──mail───────── tokenize ─────────────────▶ worker group, clock
 *     rank messages, Control ──mail───────────────────────────────────▶   │ plans to ranks, messages to clients
 *                                                                         ▼ (rpc_call_send, from the engine)
 *
 * One thread decides: the engine owns everything that is not marked otherwise here, and no lock guards it. The others
 * hand it mail. A mail node is part of the object that it speaks of and carries flags, so posting never allocates, never
 * fails and never blocks, and the mailbox is bounded by the number of objects, which is bounded where they are made.
 *
 * References: a request or rank_conn is counted. One reference each: the protocol (until request_closed), the intake queue,
 * the mailbox while the node is queued, the engine's tables.
 */
#ifndef TANDEM_COORD_INTERNAL_H
#define TANDEM_COORD_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "coordinator/chat.h"
#include "coordinator/coord_sink.h"
#include "coordinator/coord_stop.h"
#include "coordinator/journal.h"
#include "coordinator/metrics.h"
#include "coordinator/scheduler.h"
#include "coordinator/spans.h"
#include "coordinator/tokenizer.h"
#include "proto/ranks.h"
#include "proto/rpc.h"
#include "proto/status.h"
#include "tandem/v1/control.pb-c.h"
#include "tandem/v1/inference.pb-c.h"
#include "tandem/v1/worker_control.pb-c.h"

#define COORD_MAX_LISTEN     16
#define COORD_MAX_HEALTH     4
#define COORD_MAX_RANKS      MAX_RANKS
#define COORD_MAX_GROUPS     64 /* names that are known at a time */
#define COORD_MAX_GROUP_NAME 63
#define COORD_DEFAULT_GROUP  "default"
#define COORD_MAX_CONNS      1024 /* streams on the control listener, refused and ending ones included */
#define COORD_MAX_CONN_MAIL  64   /* messages of one rank that wait for the engine; two results are in flight at most */
#define COORD_MAX_CONTROL    256  /* Control calls that wait for the engine, Drain calls included */
#define COORD_MAX_ABORT_IDS  1024 /* control.proto */
#define COORD_MAX_STOP_IDS   64   /* inference.proto */
#define COORD_MAX_ANSWERS    64   /* the same */
#define COORD_MAX_ATTACH     8192 /* Attach calls at a time */
#define COORD_MAX_EOS_IDS    64
#define COORD_MAX_NAME       128                       /* request_id; served name */
#define COORD_LOST_BYTES     (STATUS_MESSAGE_MAX + 64) /* why a group went: a rank's message, whose, and its code */
#define COORD_REASON_BYTES   (COORD_LOST_BYTES + 128)  /* and what that means for now */
#define COORD_STEP_RING      64   /* steps that a rank may be behind before no more plans are sent */
#define COORD_CLOSE_MS       2000 /* a rank that was told to go gets this long to close its stream */
#define COORD_HELLO_MS       10000
#define COORD_ATTACH_MS      60000 /* first Hello to last Hello of a group */
#define COORD_RETRY_AFTER_MS 1000
#define COORD_ALIVE_MS       5000 /* an engine that did not turn for so long is not alive */
#define COORD_BIG_MESSAGE    (64u << 10)
#define COORD_CHUNK_BYTES    (256u << 10) /* text of one message to a client at most; clients take 4 MiB by default */
#define COORD_CHUNK_IDS      (64u << 10)
#define COORD_CHUNK_SCORES   1024
#define COORD_LEAST_WRITES   32 /* requests that get their output in each turn, whatever else waits */

static inline int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* CLOCK_MONOTONIC. */
int64_t coord_now_us(void);

/* ---- coord_log.c: one line per event on stderr; any thread ---- */

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

struct coord_log {
    enum log_level level;
    bool json; /* a line is a JSON object */
};

void log_line(const struct coord_log *log, enum log_level level, const char *fmt, ...) STATUS_PRINTF(3, 4);
/* About one request: its name in front, or in a field of its own. */
void log_request(const struct coord_log *log, enum log_level level, const char *name, const char *fmt, ...)
    STATUS_PRINTF(4, 5);

/* Copies text of a peer for a log line or message: what is not printable ASCII becomes '?'; cut at cap - 1 bytes. */
void text_sanitize(char *out, size_t cap, const void *text, size_t len);

/* ---- coord_options.c ---- */

/* An address to listen on and what it demands; strings of `security` point into argv. */
struct coord_listener {
    char address[192];
    struct rpc_listen_security security;
};

struct coord_options {
    const char *model_dir;
    const char *chat_template; /* NULL: the model's own */
    char served_name[COORD_MAX_NAME + 1];
    const char *listen[COORD_MAX_LISTEN]; /* as given; from listeners_resolve on the addresses */
    struct coord_listener listeners[COORD_MAX_LISTEN];
    size_t n_listen; /* those for health are the last of them */
    char health_listen[COORD_MAX_HEALTH][192];
    size_t n_health;
    char control_listen[192]; /* as given */
    struct coord_listener control;
    const char *http_listen; /* as given; NULL: no HTTP */
    struct coord_listener http;
    uint32_t http_connections;
    const char *tls_cert, *tls_key, *tls_client_ca, *token_file; /* of public listeners; NULL: not given */
    const char *control_tls_cert, *control_tls_key, *control_tls_client_ca, *control_token_file;
    bool reflection;
    bool no_tokenizer;
    bool prefix_cache;
    uint32_t tbt_target_ms, min_tbt_target_ms, ttft_target_ms, short_first_us;
    bool refuse_late;
    uint32_t keepalive_ms, keepalive_timeout_ms, min_ping_interval_ms;
    uint32_t max_connection_idle_ms, max_connection_age_ms, max_connection_age_grace_ms; /* 0: none */
    uint32_t tp;                            /* 0: whatever size the first group has */
    uint32_t max_queued, max_queued_tenant; /* the latter, and of tokens: 0: no such bound */
    uint64_t max_queued_tokens, max_queued_tokens_tenant;
    uint32_t step_tokens;
    uint32_t max_running; /* 0: what the ranks report */
    uint32_t default_max_tokens;
    uint32_t max_message_bytes;
    uint32_t pipeline_depth;
    uint32_t heartbeat_interval_ms;
    uint32_t heartbeat_timeout_ms;
    uint32_t step_timeout_ms;
    uint32_t load_timeout_ms;
    uint32_t slow_client_timeout_ms;
    uint32_t drain_timeout_ms;
    bool replay;
    uint32_t replay_timeout_ms, replay_limit;
    const char *journal_dir; /* NULL: no journal */
    uint64_t journal_bytes;
    uint32_t journal_sync_ms, journal_keep_ms;
    uint32_t max_keep_ms, max_kept;
    int supervisor_fd;       /* -1: none */
    const char *flight_path; /* NULL: none */
    const char *spans_path;  /* the same */
    uint64_t flight_bytes;
    enum log_level log_level;
    bool log_json;
};

/* *done: --help or --version was printed, nothing else is to do. The error is one line that says what to do. */
STATUS_MUST_CHECK enum status_code options_parse(struct coord_options *o, int argc, char **argv, bool *done,
                                                 struct status *st);

/* coord_listen.c: what each listener demands, from its words and the files that were given. */
STATUS_MUST_CHECK enum status_code listeners_resolve(struct coord_options *o, struct status *st);
/* Says which listeners are open to a network. */
void listeners_warn(const struct coord_options *o, const struct coord_log *log);

/* ---- coord_mail.c: mail to the engine ---- */

enum mail_kind { MAIL_REQUEST, MAIL_CONN, MAIL_CONTROL, MAIL_STOP, MAIL_ATTACH };

struct mail {
    struct mail *next;   /* mailbox lock */
    uint32_t flags;      /* mailbox lock: what happened since the engine last took the node */
    bool queued;         /* mailbox lock */
    enum mail_kind kind; /* constant */
};

struct mailbox {
    pthread_mutex_t mu;
    pthread_cond_t cond;
    struct mail *head[2], **tail[2]; /* 0: ranks, taken first, because a step waits for it; 1: the rest */
    bool waiting;
};

STATUS_MUST_CHECK enum status_code mailbox_init(struct mailbox *box, struct status *st);
void mailbox_fini(struct mailbox *box);
/* Adds a reference (refs; NULL: not counted) when the node was not queued before. The caller has one of its own. */
void mailbox_post(struct mailbox *box, struct mail *mail, uint32_t flags, atomic_uint *refs);
/* The next node and its flags; NULL when there is none at until_us (0: do not wait). The reference goes to the caller. */
struct mail *mailbox_take(struct mailbox *box, uint32_t *flags, int64_t until_us);
bool mailbox_has_ranks(struct mailbox *box); /* a rank's mail waits */

/* ---- intrusive list, engine only ---- */

struct link {
    struct link *prev, *next;
};

static inline void list_init(struct link *head)
{
    head->prev = head->next = head;
}

static inline bool list_empty(const struct link *head)
{
    return head->next == head;
}

/* A link that is all zero is in no list. */
static inline bool link_listed(const struct link *l)
{
    return l->next != NULL;
}

static inline void list_append(struct link *head, struct link *l)
{
    l->prev = head->prev;
    l->next = head;
    head->prev->next = l;
    head->prev = l;
}

static inline void list_remove(struct link *l)
{
    if (!l->next)
        return;
    l->prev->next = l->next;
    l->next->prev = l->prev;
    l->prev = l->next = NULL;
}

#define container_of(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))

/* ---- a request ---- */

enum request_mail { REQUEST_SUBMIT = 1, REQUEST_WRITABLE = 2, REQUEST_CLOSED = 4 };

enum request_state {
    REQUEST_NEW,      /* not in the scheduler yet */
    REQUEST_HELD,     /* from the journal; waits for the first worker group */
    REQUEST_LIVE,     /* in the scheduler */
    REQUEST_FINISHED, /* all its answers are out of it; text is left that the client did not take yet */
    REQUEST_KEPT,     /* all was handed over, and may be asked for again */
    REQUEST_CLOSING,  /* all was handed over; request_closed is to come */
    REQUEST_GONE,
};

struct coord;
struct group;
struct request;

/* Log probabilities that wait for the client, packed: token, rank, log probability, then `top` ids and as many of theirs. */
struct score_list {
    uint32_t top;
    uint32_t *word;
    uint32_t n, cap; /* entries */
    uint32_t from;   /* those before it were sent, and stay for who asks again */
};

/* One of the answers to a request: in the scheduler a request of its own. */
struct choice {
    struct request *request;
    uint32_t index;
    bool live;         /* in the scheduler */
    bool matched;      /* a stop string came: what follows it is dropped */
    bool finish_ready; /* `end` is filled */
    bool done;         /* its last message was handed over */
    uint32_t table_index;
    uint64_t id;         /* of the scheduler */
    struct group *group; /* whose scheduler has it */
    struct tok_stream *decoder;
    struct stop_match match;
    uint32_t n_new;
    int64_t token_us;  /* of its last token; 0: none yet */
    uint32_t n_echoed; /* of the prompt's ids */
    char *text;        /* unsent; bounded by max_new tokens and the echoed prompt */
    size_t text_len, text_cap;
    uint32_t *ids;
    uint32_t n_ids, ids_cap;
    struct score_list scores, prompt_scores;
    struct sched_event end;
    /* of a request that is kept: nothing that was sent is dropped */
    size_t text_from; /* so much was sent; or is not to be, and may not have come yet */
    uint32_t ids_from;
    size_t *text_at;   /* [n_ids]: how much text may be sent when the id is there */
    bool text_follows; /* text_from is text_at of ids_from, once that has come */
};

struct request {
    struct mail mail;
    atomic_uint refs;
    atomic_bool cancelled;     /* by request_closed: spares the intake threads the work */
    atomic_bool want_writable; /* set by the engine: request_writable posts mail */
    /* the engine's from REQUEST_SUBMIT on: another call may take the request up (coord_attach.c) */
    const struct sink_ops *ops;
    void *sink;
    /* constant */
    struct coord *coord;
    int64_t arrived_us, deadline_us;
    uint8_t owner[JOURNAL_OWNER_BYTES];
    struct spans_parent parent;
    /* intake; the engine's from REQUEST_SUBMIT on */
    struct request *intake_next;
    void *raw;
    size_t raw_len;
    char name[COORD_MAX_NAME + 1];
    uint32_t *prompt;
    uint32_t n_prompt;
    uint32_t max_new;
    uint32_t *stop; /* the model's own included */
    uint32_t n_stop, n_choices;
    int top, prompt_top; /* likeliest tokens beside the log probability; -1: no log probabilities */
    bool nothing_new;    /* max_tokens was 0: the one new token is dropped */
    bool include_stop, echo, no_cache_read, no_cache_write;
    Tandem__V1__SampleParams params; /* of all answers; but output_at, scores and the seed, which each has of its own */
    struct stop_set *stop_strings;   /* NULL: none */
    uint64_t salt;                   /* of the prefix cache */
    uint64_t tenant;
    int32_t priority;
    uint32_t keep_ms;                      /* without a client; 0: it ends with its call */
    int64_t ttft_target_us, tbt_target_us; /* its own or the server's; 0: none */
    struct choice *choice;                 /* of n_choices; NULL: HELD, none is made yet */
    void *image;                           /* for the journal: a GenerateRequest that needs no default */
    size_t image_len;
    uint32_t *known; /* HELD: tokens of each choice, how many: [COORD_MAX_ANSWERS], then they */
    uint64_t model;  /* HELD: digest */
    /* engine */
    enum request_state state;
    bool closed;     /* request_closed was called: the sink takes nothing more */
    bool first_sent; /* the message with request_id */
    bool dirty;
    /* coord_attach.c, coord_journal.c */
    bool kept;              /* what was sent stays, for Attach; the intake's until REQUEST_SUBMIT */
    bool taken_up;          /* the sink is no longer that of request_open */
    bool told_end, shelved; /* its end is recorded; it is not counted as live */
    /* engine */
    uint32_t n_live, n_done;    /* choices */
    uint32_t turn;              /* the choice that sends next */
    struct request *hash_next;  /* by name */
    struct request *dirty_next; /* has new output that was not offered to its client yet */
    struct link stalled_link;   /* oldest first */
    int64_t stalled_us;         /* since then the client took nothing of what waits */
    /* coord_attach.c, coord_journal.c */
    uint64_t number;       /* in the journal; 0: it is not there */
    struct link keep_link; /* in engine.unclaimed: it has no client */
    struct link held_link; /* HELD */
    int64_t keep_until_us;
};

/* Attach: the sink of a request that was taken up again. */
enum attach_mail { ATTACH_OPENED = 1, ATTACH_CLOSED = 2 };

struct attach_offset {
    uint32_t index, tokens;
    bool has_text;
    uint64_t text;
};

struct attach {
    struct mail mail;
    atomic_uint refs;
    struct coord *coord;
    struct rpc_call *call;
    char name[COORD_MAX_NAME + 1];
    uint8_t owner[JOURNAL_OWNER_BYTES];
    _Atomic(struct request *) request; /* set by the engine, once; a reference */
    int64_t wait_until_us;             /* the engine's: while the request is HELD */
    uint32_t n_offsets;
    struct attach_offset offset[];
};

void request_ref(struct request *r);
void request_unref(struct request *r);

/* ---- the model, as the last group reported it; copied out under coord.pub_mu ---- */

struct model_facts {
    uint32_t vocab_size;
    uint32_t max_context;
    float temperature, top_p, min_p, typical_p, repetition_penalty;
    uint32_t top_k;
    uint32_t sample_options; /* SampleOption bits that all ranks have */
    uint32_t n_eos;
    uint32_t eos[COORD_MAX_EOS_IDS];
};

/* ---- coord_intake.c: from bytes to a request that the scheduler can take ---- */

/* Two threads. Short messages are taken by both, long ones (COORD_BIG_MESSAGE) by the second only: a prompt of 16 MB is
 * tokenized while short ones pass it. */
struct intake {
    pthread_mutex_t mu;
    pthread_cond_t cond[2]; /* one per thread */
    struct request *head[2], **tail[2];
    uint32_t n;     /* queued and in work */
    uint64_t bytes; /* of their messages */
    bool stop;
    pthread_t thread[2];
    unsigned n_threads;
    atomic_uint_least64_t counter; /* of names that we make */
    uint64_t name_seed;
    uint64_t salt_key[4]; /* of this process: nobody can find two salts that give the same number */
};

/* coord_sampling.c. INVALID_ARGUMENT and UNIMPLEMENTED name the field. Takes the allowed ids out of the message. */
STATUS_MUST_CHECK enum status_code take_options(struct request *r, Tandem__V1__GenerateRequest *m,
                                                const struct model_facts *facts, struct status *st);
void options_fini(struct request *r);
/* INVALID_ARGUMENT names the field; m NULL: not given. */
STATUS_MUST_CHECK enum status_code take_prefix_cache(const struct coord *c, struct request *r,
                                                     const Tandem__V1__PrefixCache *m, struct status *st);
/* A number for bytes of a client, at most `most` of them: nobody outside finds two texts that give the same. */
STATUS_MUST_CHECK enum status_code intake_hash(const struct coord *c, const char *field,
                                               const ProtobufCBinaryData *text, size_t most, uint64_t *out,
                                               struct status *st);
/* coord_scheduling.c: the same as take_prefix_cache of Scheduling. */
STATUS_MUST_CHECK enum status_code take_scheduling(const struct coord *c, struct request *r,
                                                   const Tandem__V1__Scheduling *m, struct status *st);
STATUS_MUST_CHECK enum status_code draw_seed(uint64_t *seed, struct status *st);
uint64_t choice_seed(uint64_t seed, uint32_t index);

/* coord_chat.c: r->prompt from the messages; *n may be more than the context holds. */
STATUS_MUST_CHECK enum status_code chat_take(const struct coord *c, struct request *r, const Tandem__V1__Chat *m,
                                             uint32_t max_context, size_t *n, struct status *st);
/* A request of the journal again, as validate would have left it. Engine thread. */
STATUS_MUST_CHECK enum status_code intake_restore(struct coord *c, struct request *r, struct status *st);
STATUS_MUST_CHECK enum status_code intake_start(struct coord *c, struct status *st);
void intake_stop(struct coord *c); /* requests still queued get UNAVAILABLE */
/* Takes a reference. RESOURCE_EXHAUSTED when the queue is full (then nothing was taken). */
STATUS_MUST_CHECK enum status_code intake_push(struct coord *c, struct request *r, struct status *st);

/* ---- a rank's stream ---- */

enum conn_mail { CONN_OPENED = 1, CONN_MESSAGE = 2, CONN_HALF_CLOSED = 4, CONN_CLOSED = 8 };

enum conn_state {
    CONN_NEW,    /* no Hello yet */
    CONN_MEMBER, /* of a live group */
    CONN_ENDING, /* told to go, or refused */
};

struct conn_msg {
    struct conn_msg *next;
    Tandem__V1__RankMessage *m;
};

struct rank_conn {
    struct mail mail;
    atomic_uint refs;
    struct coord *coord;
    struct rpc_call *call;
    /* set by the poll thread, read by the engine */
    atomic_int_least64_t heard_us; /* last message of any kind */
    atomic_uint_least64_t beat_step;
    /* poll thread */
    bool refused; /* a message broke the rules: the stream was finished */
    /* mailbox lock */
    struct conn_msg *msg_head, **msg_tail;
    uint32_t n_msg;
    /* engine */
    struct link link; /* in engine.conns */
    enum conn_state state;
    int64_t until_us;    /* NEW: for the Hello; ENDING: for the close */
    struct group *group; /* MEMBER */
    uint32_t rank, pid;
    char host[80], device[80];
    uint64_t last_step;
    int64_t silence_told_us; /* to the flight recorder */
    int64_t last_result_us;
    Tandem__V1__KvStats kv; /* of its last result; before the first as many pages as Ready said */
    uint64_t loaded_bytes;
    int64_t progress_us; /* when loaded_bytes grew last; until then when it attached */
    unsigned progress;   /* tenths of the weights that were logged */
    bool ready;
};

void conn_ref(struct rank_conn *conn);
void conn_unref(struct rank_conn *conn);

/* A worker group by its name: the one that is attached, or the place of the next. */
struct group {
    char name[COORD_MAX_GROUP_NAME + 1]; /* empty: a free entry of the table */
    struct sched *sched;                 /* made when it serves first; outlives its epochs */
    bool live;                           /* attached, in part at least */
    bool serving;                        /* all ranks are Ready, the scheduler is attached */
    bool had_one;                        /* a group of this name was serving before */
    bool draining;                       /* by Control.Drain: it gets no new requests */
    bool restart;                        /* and its ranks are to be started again */
    uint64_t launch_id;
    uint64_t epoch;
    uint32_t size, n_attached, n_ready;
    struct rank_conn *rank[COORD_MAX_RANKS];
    int64_t attach_until_us, started_us;
    /* plans */
    uint64_t last_sent;
    int64_t sent_us[COORD_STEP_RING];
    uint64_t last_step_us; /* computing time of rank 0 */
    /* what Ready said, worst of all ranks */
    struct kv_account kv;
    uint64_t kv_pages_max; /* kv.total_pages may be raised up to this */
    uint32_t slots, context, step_tokens, vocab_size, sample_options;
    uint64_t suspend_pages, suspend_bytes_per_s; /* the least of all ranks */
    Tandem__V1__RankMessage *ready;              /* of rank 0; the engine's from the time that it serves */
    uint64_t kv_pages_set; /* by Control.SetKvMemory; 0: nothing; kept for the next group of this name */
    /* when it is gone */
    bool replays;                       /* its requests wait for the next */
    int64_t wait_until_us;              /* for that, new requests too; 0: nobody waits for one, or it is there */
    char lost_reason[COORD_LOST_BYTES]; /* why it went last; empty before that */
    /* coord_route.c */
    uint64_t routed, moved; /* answers sent to it first; and taken over from another */
};

/* ---- Control calls ---- */

enum control_method {
    CONTROL_SERVER_INFO,
    CONTROL_MODEL_INFO,
    CONTROL_LOAD,
    CONTROL_ABORT,
    CONTROL_DRAIN,
    CONTROL_KV_MEMORY
};

struct control_call {
    struct mail mail;
    enum control_method method;
    struct rpc_call *call;
    ProtobufCMessage *request;
    atomic_uint refs;   /* the engine's and, until on_close, the call's */
    atomic_bool closed; /* a Drain whose client went away is not worth the wait */
    /* DRAIN, engine: */
    struct link link;
    int64_t until_us;
    struct group *group; /* of one group; NULL: the server */
    uint64_t epoch;      /* the one of it that is drained */
    uint32_t moved;
};

/* ---- the engine ---- */

enum stop_mail { STOP_DRAIN = 1, STOP_NOW = 2, STOP_QUIT = 4 };

enum stop_phase {
    STOP_NONE,
    STOP_DRAINING, /* until no request is live, or stop_until_us */
    STOP_CLIENTS,  /* the rest were failed; their calls close */
    STOP_RANKS,    /* ranks were told to stop */
    STOP_DONE,     /* main was told */
};

struct plan_scratch; /* coord_plan.c */

struct engine {
    struct coord *coord;
    pthread_t thread;
    bool started;
    struct group group[COORD_MAX_GROUPS];
    uint32_t n_groups;              /* entries that were in use */
    uint64_t epoch;                 /* of the newest group */
    struct sched_book *book;        /* of all schedulers */
    uint64_t model_digest;          /* of the model that is served, or was last; 0: none */
    Tandem__V1__RankMessage *ready; /* what the group that came last said of it; for GetModelInfo */
    struct sched_load retired;      /* counters of groups whose entry was used again */
    int64_t balance_us;             /* when requests are looked over for a better group */
    struct plan_scratch *scratch;
    struct link conns;
    struct link stalled;         /* requests whose client does not read, oldest first */
    struct link drains;          /* control calls */
    struct link unclaimed, held; /* requests without a client; of the journal, before the first group */
    uint32_t n_kept, n_unclaimed;
    int64_t unclaimed_us;                 /* when they were looked over */
    struct request *dirty, **dirty_tail;  /* oldest first */
    const Tandem__V1__StepResult *result; /* that the events under way came from */
    /* answers by table index (the scheduler's id is index and generation); requests by name */
    struct choice **table;
    uint32_t *generation, *free_index;
    uint32_t table_cap, n_free;
    struct request **by_name;
    uint32_t name_mask;
    bool draining, drained_told;
    int64_t abort_all_us; /* requests that arrived before are to end */
    enum stop_phase stop;
    int64_t stop_until_us;
    bool quit;
    int64_t planned_wake_us, published_us;
    char lost_reason[COORD_LOST_BYTES]; /* why the last group went; empty before that */
};

struct coord {
    struct coord_options opt;
    struct coord_log log;
    struct tokenizer *tok;
    struct chat *chat;
    struct rpc_health *health;
    struct rpc_reflection *reflection; /* NULL: switched off */
    struct rpc_server *public_server, *control_server;
    struct http *http; /* NULL: switched off */
    struct metrics metrics;
    struct flight *flight;   /* NULL: switched off */
    struct journal *journal; /* the same */
    int spans_fd;            /* -1: switched off */
    struct live *live;       /* NULL: no HTTP */
    struct mailbox box;
    struct intake intake;
    struct engine engine;
    struct mail stop_mail;
    int64_t started_us, started_s; /* the latter since 1970 */
    int done_fd;                   /* eventfd: the engine has stopped serving */
    /* published by the engine */
    atomic_int state;      /* Tandem__V1__ServerInfo__State */
    atomic_bool accepting; /* requests are taken: a group is ready, or soon will be */
    atomic_int_least64_t alive_us;
    atomic_uint max_live;
    pthread_mutex_t pub_mu;
    char reason[COORD_REASON_BYTES]; /* pub_mu: why state is not READY */
    struct model_facts model;        /* pub_mu */
    /* counted where they are made and freed */
    atomic_uint live_requests, live_conns, live_control, live_attach;
};

/* coord_spans.c: engine thread, but span_file_open */
STATUS_MUST_CHECK enum status_code span_file_open(struct coord *c, struct status *st);
void span_end(struct coord *c, const struct request *r, enum status_code code, int64_t now_us);

/* coord_live.c: what the page at / shows. NULL is fine for all but live_json */
STATUS_MUST_CHECK enum status_code live_create(struct live **out, struct status *st);
void live_destroy(struct live *l);
void live_plan(struct live *l, uint64_t epoch, const struct sched_plan *plan); /* engine thread, as the next two */
void live_result(struct live *l, uint64_t epoch, uint64_t step, uint64_t took_us);
void live_publish(struct engine *e, int64_t now_us);
void live_json(struct coord *c, struct json_text *t); /* any thread */

/* coord_flight.c: engine thread. What it is told goes to the live page as well */
void record_plan(struct coord *c, uint64_t epoch, const struct sched_plan *plan, int64_t now_us);
void record_result(struct coord *c, uint64_t epoch, uint32_t rank, const Tandem__V1__StepResult *r, int64_t now_us);
void record_silence(struct coord *c, uint64_t epoch, struct rank_conn *conn, int64_t silent_us, int64_t now_us);
void record_attach(struct coord *c, uint64_t epoch, const struct rank_conn *conn, int64_t now_us);
void record_ready(struct coord *c, const struct group *g, int64_t now_us);
void record_lost(struct coord *c, uint64_t epoch, const char *reason, int64_t now_us);
void record_admit(struct coord *c, const struct request *r, int64_t now_us);
void record_refuse(struct coord *c, const struct request *r, enum status_code code, int64_t now_us);
void record_end(struct coord *c, const struct request *r, enum status_code code, int64_t now_us);

/* coord_engine.c */
STATUS_MUST_CHECK enum status_code engine_start(struct coord *c, struct status *st);
void engine_stop(struct coord *c); /* after both servers are down; joins */
/* Sends plans until the pipelines are full, then deals with what the schedulers say. After every call into one. */
void engine_pump(struct engine *e, int64_t now_us);
/* The same, with plans for one group only. */
void engine_pump_group(struct engine *e, struct group *g, int64_t now_us);
/* What the schedulers say goes into the answers; the engine's loop writes these to clients (requests_flush_dirty). */
void engine_events(struct engine *e, int64_t now_us);
/* Whether the server serves, from its groups; reason: why it does not, when it had a group and has none. */
void engine_publish(struct engine *e, const char *reason);
/* All groups together. */
struct sched_load engine_load(const struct engine *e);

/* ---- coord_kv.c: the ranks' KV pools ---- */

void kv_take(struct engine *e, struct rank_conn *conn, const Tandem__V1__StepResult *r);
void kv_group_ready(struct group *g); /* its scheduler is attached */
/* The sum over the group's ranks, over all groups. */
void kv_of_group(const struct group *g, Tandem__V1__KvStats *out);
void kv_of_all(const struct engine *e, Tandem__V1__KvStats *out);
enum status_code kv_set_memory(struct engine *e, const Tandem__V1__SetKvMemoryRequest *req, const char *peer,
                               Tandem__V1__SetKvMemoryResponse *m, struct status *st);

/* coord_request.c: engine thread */
STATUS_MUST_CHECK enum status_code requests_init(struct engine *e, struct status *st);
void requests_fini(struct engine *e);
void request_handle_mail(struct engine *e, struct request *r, uint32_t flags, int64_t now_us);
void request_event(struct engine *e, const struct sched_event *ev, int64_t now_us);
/* Writes new output to clients, oldest first, until all is written or a rank's mail waits; COORD_LEAST_WRITES in any case.
 * May end requests, which makes events. Returns whether there was any. */
bool requests_flush_dirty(struct engine *e, int64_t now_us);
struct request *request_by_name(struct engine *e, const char *name);
/* Ends one request early; its call gets this status. */
void request_end(struct engine *e, struct request *r, const struct status *st, int64_t now_us);
/* Those that still need the ranks: not those of which only a client has to take the rest. */
void requests_end_live(struct engine *e, const struct status *st, int64_t now_us);
/* Of them, those with an answer in this group's scheduler. */
uint32_t requests_end_group(struct engine *e, const struct group *g, const struct status *st, int64_t now_us);
/* Its answers' new place. */
void request_moved(struct engine *e, uint64_t id, struct group *to);
uint32_t requests_end_all(struct engine *e, const struct status *st, int64_t now_us);
/* Drops clients that took nothing for too long. */
void requests_check_slow(struct engine *e, int64_t now_us);

/* Everything that the engine knows of it is over. */
void request_to_closing(struct engine *e, struct request *r, enum status_code code, int64_t now_us);
void request_flush(struct engine *e, struct request *r, int64_t now_us);
void requests_name_add(struct engine *e, struct request *r);
void requests_name_remove(struct engine *e, struct request *r);
/* HELD to LIVE, or FINISHED where nothing is left to compute; else it is refused. */
STATUS_MUST_CHECK enum status_code request_resume(struct engine *e, struct request *r, int64_t now_us,
                                                  struct status *st);

/* coord_attach.c: requests without a client, and clients that come back. Engine thread, but attach_call_open and attach_call_close */
extern const struct sink_ops no_sink;
void attach_call_open(struct rpc_call *call, const void *msg, size_t len, void *ctx);
void attach_call_writable(struct rpc_call *call, void *ctx);
void attach_call_close(struct rpc_call *call, bool cancelled, void *ctx);
void attach_handle(struct engine *e, struct attach *a, uint32_t flags, int64_t now_us);
void attach_unref(struct attach *a);
/* The client is gone, the request goes on. */
void attach_detach(struct engine *e, struct request *r, int64_t now_us);
/* Its client has all of it: it stays for a while. */
void attach_keep(struct engine *e, struct request *r, int64_t now_us);
/* Its last event came: where it has no client it is only kept from now on. fresh: for its whole keep_ms. */
void attach_finished(struct engine *e, struct request *r, bool fresh, int64_t now_us);
/* The client gets this status, the request stays. */
void attach_refuse(struct engine *e, struct request *r, const struct status *st, int64_t now_us);
void attach_check(struct engine *e, int64_t now_us); /* ends what nobody came back for */
/* At the end of a server: what no group will compute, and what is only kept. */
void attach_end_held(struct engine *e, const struct status *st, int64_t now_us);
void attach_drop_kept(struct engine *e, int64_t now_us);
void attach_forget(struct engine *e, struct request *r); /* takes it out of the lists here */
/* HELD to what follows: the client that came meanwhile gets what it has not. */
void attach_begin(struct engine *e, struct request *r, int64_t now_us);

/* coord_journal.c. Nothing happens without a journal */
STATUS_MUST_CHECK enum status_code coord_journal_open(struct coord *c, struct status *st); /* before the engine runs */
void coord_journal_close(struct coord *c);
/* Intake: what submit will need. */
STATUS_MUST_CHECK enum status_code coord_journal_image(struct request *r, const Tandem__V1__GenerateRequest *m,
                                                       struct status *st);
void coord_journal_accept(struct engine *e, struct request *r);
void coord_journal_token(struct engine *e, const struct choice *c, uint32_t id);
void coord_journal_end(struct engine *e, struct request *r, enum status_code code);
/* A group serves: the requests that waited for one go on. */
void coord_journal_resume(struct engine *e, int64_t now_us);
void coord_journal_publish(struct engine *e);

/* coord_output.c: the text, ids and scores of an answer on their way to the client */
STATUS_MUST_CHECK enum status_code choices_create(struct request *r, const struct tokenizer *tok, struct status *st);
void choices_destroy(struct request *r);
/* The text of a token, or with id NULL what the decoder held back. True in *ended when a stop string came. */
STATUS_MUST_CHECK enum status_code choice_add(struct choice *c, const uint32_t *id, bool *ended, struct status *st);
STATUS_MUST_CHECK enum status_code choice_append(struct choice *c, const void *text, size_t len, struct status *st);
STATUS_MUST_CHECK enum status_code scores_add(struct score_list *l, const Tandem__V1__Scores *s, struct status *st);
bool choice_has_output(const struct choice *c);
/* The client has so much of it; then no more of that is sent. text NULL: what belongs to the tokens. */
void choice_seek(struct choice *c, uint32_t tokens, const uint64_t *text);
/* One message with as much as fits; sets c->done with the last. */
STATUS_MUST_CHECK enum status_code choice_send(struct choice *c, struct status *st);

/* coord_service.c: rpc callbacks of Inference and Control */
#define COORD_PUBLIC_METHODS 8
void service_methods(struct coord *c, struct rpc_method *methods);

/* coord_control.c: engine thread */
void control_handle(struct engine *e, struct control_call *call, int64_t now_us);
void control_unref(struct control_call *call);
void control_check_drains(struct engine *e, int64_t now_us);
int64_t control_next_us(const struct engine *e);

/* coord_conn.c: rpc callbacks of WorkerControl */
#define COORD_CONTROL_METHODS 1
void conn_methods(struct coord *c, struct rpc_method *methods);
/* The oldest message that waits, NULL when none does. */
Tandem__V1__RankMessage *conn_next_message(struct rank_conn *conn);

/* coord_group.c: engine thread */
void group_handle_mail(struct engine *e, struct rank_conn *conn, uint32_t flags, int64_t now_us);
void group_check(struct engine *e, int64_t now_us);
int64_t group_next_us(const struct engine *e);
void group_lost(struct engine *e, struct group *g, int64_t now_us, bool permanent, const char *fmt, ...)
    STATUS_PRINTF(5, 6);
void group_end_conn(struct rank_conn *conn, const struct status *st, int64_t now_us);
/* Orderly end: Shutdown{relaunch = false} to all ranks of all groups. */
void group_shutdown(struct engine *e, int64_t now_us, const char *reason);
/* The end of a drained group. Returns how many running requests have to go on elsewhere. */
uint32_t group_leave(struct engine *e, struct group *g, int64_t now_us);
/* " group=NAME" for lines of the log and the supervisor; nothing for COORD_DEFAULT_GROUP. */
const char *group_word(const struct group *g, char *out, size_t cap);
/* After a pause of this whole process, silence of the ranks says nothing. */
void group_forgive_silence(struct engine *e, int64_t now_us);
/* Since when the slowest rank owes the oldest step; INT64_MAX: none does. */
int64_t group_step_began_us(const struct group *g);

/* coord_groups.c: the table of groups. Engine thread */
struct group *group_by_name(struct engine *e, const char *name); /* NULL: not known */
STATUS_MUST_CHECK enum status_code group_get(struct engine *e, struct group **out, const char *name, struct status *st);
bool group_name_valid(const char *name);
bool groups_any_live(const struct engine *e);
/* Whether another than this one (NULL: any) serves and is not to go. */
bool groups_others_serve(const struct engine *e, const struct group *g);
void groups_fini(struct engine *e);

/* coord_route.c: which group a request goes to. Engine thread */
/* NULL: none is there, and none is waited for. */
struct group *route_request(struct engine *e, const struct request *r, int64_t now_us);
/* What waits in a group that is gone or is to go moves to others, where these can take it. */
void route_leave(struct engine *e, struct group *g, int64_t now_us);
/* From time to time: what waits moves to where it is served earlier. */
void route_balance(struct engine *e, int64_t now_us);
int64_t route_next_us(const struct engine *e);

/* coord_replay.c: engine thread */
void replay_prepare(struct engine *e, struct group *g, int64_t now_us, bool served, bool permanent);
void replay_group_lost(struct engine *e, struct group *g, int64_t now_us, bool served, bool permanent);
/* Before the scheduler is attached. FAILED_PRECONDITION: others serve another model, or can do what it cannot. */
STATUS_MUST_CHECK enum status_code replay_group_ready(struct engine *e, struct group *g, int64_t now_us,
                                                      struct status *st);
void replay_check(struct engine *e, int64_t now_us);
int64_t replay_next_us(const struct engine *e);

/* coord_ready.c: what a Ready must hold, and what it makes of the group */
STATUS_MUST_CHECK enum status_code group_take_ready(struct group *g, struct rank_conn *conn,
                                                    const Tandem__V1__Ready *ready, struct status *st);
STATUS_MUST_CHECK enum status_code group_serve(struct engine *e, struct group *g, int64_t now_us, struct status *st);

/* coord_plan.c */
STATUS_MUST_CHECK enum status_code plan_scratch_create(struct plan_scratch **out, struct status *st);
void plan_scratch_destroy(struct plan_scratch *p);
/* To every rank of the group. On an error *bad_rank is who could not be reached. */
STATUS_MUST_CHECK enum status_code plan_send(struct plan_scratch *p, const struct group *g,
                                             const struct sched_plan *plan, uint32_t *bad_rank, struct status *st);

/* coord_supervisor.c: lines to `tandem serve`; any thread */
void supervisor_line(const struct coord *c, const char *fmt, ...) STATUS_PRINTF(2, 3);

#endif
