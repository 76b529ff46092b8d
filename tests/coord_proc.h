/* coord_proc.h - a real tandem-coordinator as a child process, and clients of it. Prefix proc_. */
#ifndef TANDEM_TESTS_COORD_PROC_H
#define TANDEM_TESTS_COORD_PROC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "proto/rpc.h"
#include "tandem/v1/control.pb-c.h"
#include "tandem/v1/inference.pb-c.h"

struct proc {
    pid_t pid;
    int events;                    /* read end of --supervisor-fd */
    char folder[64];               /* with the sockets */
    char address[96], control[96]; /* unix: */
    struct rpc_channel *ch;        /* to address */
    char line[4096];               /* bytes of events not yet handed out */
    size_t line_len;
    char attaching[128]; /* the last such line */
    char listening[512]; /* the first line: all addresses as they were bound */
    unsigned loading;    /* lines of that name, which proc_event keeps to itself */
};

/* args: NULL-terminated, behind the usual ones. Waits for the "listening" line. Aborts when that does not come. */
void proc_start(struct proc *p, const char *binary, const char *model, const char *const *args);
/* The next line of the supervisor pipe but "attaching" and "loading", without its newline; false after timeout_ms or at its end. */
bool proc_event(struct proc *p, char *line, size_t cap, int timeout_ms);
/* Sends the signal (0: none), waits at most timeout_ms; the exit status, or -1 (killed then). */
int proc_end(struct proc *p, int signal_number, int timeout_ms);
/* Waits for a state of Control.GetServerInfo; false after timeout_ms. */
bool proc_wait_state(struct proc *p, Tandem__V1__ServerInfo__State state, int timeout_ms);
/* CPU time of the process so far, user and system. */
double proc_cpu_seconds(const struct proc *p);

struct proc_reply {
    enum status_code code;
    char message[STATUS_MESSAGE_MAX];
    uint32_t retry_after_ms;
    char request_id[160];
    uint32_t n_messages, n_first; /* n_first: messages that named the request */
    uint32_t *ids;
    size_t n_ids;
    char *text;
    size_t text_len;
    bool finished;
    Tandem__V1__Finish__Reason reason;
    bool has_stop;
    uint32_t stop_id;
    uint32_t prompt_tokens, completion_tokens, replays;
    uint64_t queue_us, prefill_us, decode_us;
};

/* Opens the call and sends the request. Aborts only for lack of memory. */
struct rpc_stream *proc_open(struct proc *p, const Tandem__V1__GenerateRequest *req, uint64_t deadline_ms);
/* Reads one message into r: true while there may be more; at the end r->code is set. */
bool proc_read(struct rpc_stream *s, struct proc_reply *r, uint32_t timeout_ms);
/* Reads to the end. */
void proc_drain(struct rpc_stream *s, struct proc_reply *r);
void proc_reply_free(struct proc_reply *r);
/* All in one. */
void proc_generate(struct proc *p, const Tandem__V1__GenerateRequest *req, uint64_t deadline_ms, struct proc_reply *r);

int64_t proc_now_ms(void);

#endif
