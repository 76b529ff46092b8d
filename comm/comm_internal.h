/* comm_internal.h - what a back end of comm.h gives. Other folders never include this.
 *
 * comm.c checks arguments, starts the clock of each operation and remembers failures; a back end moves and adds bytes. A
 * back end that waits does it in steps with comm_check between them, so that deadline and abort hold everywhere alike.
 */
#ifndef TANDEM_COMM_INTERNAL_H
#define TANDEM_COMM_INTERNAL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "comm/comm.h"

struct comm {
    const struct comm_ops *ops;
    void *backend; /* the back end's own; set by open */
    uint32_t rank;
    uint32_t size;
    uint32_t local_size, local_rank;
    uint32_t machine; /* the lowest rank on it */
    uint32_t timeout_ms;

    atomic_bool aborted; /* any thread sets it, never cleared */

    /* The thread of the operations. */
    uint64_t start_ns;
    uint64_t deadline_ns;
    enum status_code failed; /* ST_OK, or how the first failed operation ended: the ranks are out of step since then */
};

struct comm_ops {
    const char *name;

    /* Fills backend, rank, size, local_size, local_rank and machine; starts the clock itself where it waits. Nothing is left behind on failure. */
    enum status_code (*open)(struct comm *c, struct status *st);
    /* clean: no operation has failed and deadline_ns is set; else no peer may be waited for. */
    void (*close)(struct comm *c, bool clean);

    /* As in comm.h, with arguments checked. Never called with size 1, nor with nothing to move. */
    enum status_code (*all_reduce)(struct comm *c, float *x, size_t n, struct status *st);
    enum status_code (*all_gather)(struct comm *c, const void *send, void *recv, const size_t *bytes,
                                   struct status *st);
    enum status_code (*broadcast)(struct comm *c, void *x, size_t bytes, uint32_t root, struct status *st);
    enum status_code (*barrier)(struct comm *c, struct status *st);
};

uint64_t comm_now_ns(void);
void comm_start_clock(struct comm *c); /* sets start_ns and deadline_ns; comm.c does it before each operation */

/* One step of waiting: ST_OK to go on, ST_ABORTED, or ST_DEADLINE_EXCEEDED. Gives the core away for longer the longer
 * the operation waits. The message is the caller's: it knows the peer. */
struct comm_wait {
    uint32_t polls;
    uint64_t since_ns; /* 0 until the clock was needed */
};
enum status_code comm_wait_step(struct comm *c, struct comm_wait *w);

/* Prints text to stderr if the process ends between begin and end, however it ends. */
struct comm_hint {
    pid_t child;
    int fd;
};
void comm_hint_begin(struct comm_hint *h, const char *text);
void comm_hint_end(struct comm_hint *h);

#endif
