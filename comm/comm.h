/* comm.h - how the ranks of one tensor-parallel group add and gather. Prefix comm_.
 *
 * R ranks, numbered 0..R-1, call the same operations in the same order (they obey the same plans). Every operation is
 * bounded: it ends with ST_OK, or ST_DEADLINE_EXCEEDED after timeout_ms (a peer is stuck or gone), or ST_ABORTED after
 * comm_abort. After a failure the group is of no use any more; the process is expected to exit.
 *
 *     comm_create(&c, &(struct comm_config){ .ops = &comm_ops_mpi, .timeout_ms = 60000 }, st);
 *     comm_all_reduce(c, x, n, st);                       // x += x of all other ranks
 *
 * Back ends: MPI (host memory), self (R = 1, no library at all). NCCL comes with CUDA.
 * Threads: one calls the operations; comm_abort may be called from any thread.
 */
#ifndef TANDEM_COMM_H
#define TANDEM_COMM_H

#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

struct comm;
struct comm_ops;
extern const struct comm_ops comm_ops_self; /* one rank */
extern const struct comm_ops comm_ops_mpi;  /* ranks of MPI_COMM_WORLD; initialises and finalises MPI itself */

struct comm_config {
    const struct comm_ops *ops;
    uint32_t timeout_ms; /* of one operation; 0: 60000 */
};

STATUS_MUST_CHECK enum status_code comm_create(struct comm **out, const struct comm_config *cfg, struct status *st);
/* Collective in the MPI back end (MPI_Finalize), bounded by the timeout; skipped after a failure. NULL is fine. */
void comm_destroy(struct comm *c);

uint32_t comm_rank(const struct comm *c);
uint32_t comm_size(const struct comm *c);
/* Ranks on this machine, this one included: to share its cores. */
uint32_t comm_local_size(const struct comm *c);

/* Sum over ranks in place, n floats. The result is bit-identical on all ranks. */
STATUS_MUST_CHECK enum status_code comm_all_reduce(struct comm *c, float *x, size_t n, struct status *st);

/* Rank r contributes bytes[r] bytes; recv gets all, in rank order. bytes has R entries, equal on all ranks. send may
 * stand at its place within recv. */
STATUS_MUST_CHECK enum status_code comm_all_gather(struct comm *c, const void *send, void *recv, const size_t *bytes,
                                                   struct status *st);

STATUS_MUST_CHECK enum status_code comm_broadcast(struct comm *c, void *x, size_t bytes, uint32_t root,
                                                  struct status *st);
STATUS_MUST_CHECK enum status_code comm_barrier(struct comm *c, struct status *st);

/* Makes the operation under way, and all later ones, on this rank return ST_ABORTED soon. Any thread. */
void comm_abort(struct comm *c);

#endif
