/* comm.h - how the ranks of one tensor-parallel group add and gather. Prefix comm_.
 *
 * R ranks, numbered 0..R-1, call the same operations in the same order (they obey the same plans). Every operation is
 * bounded: it ends with ST_OK, or ST_DEADLINE_EXCEEDED after timeout_ms (a peer is stuck or gone), or ST_ABORTED after
 * comm_abort. After a failure the group is of no use any more; the process is expected to exit.
 *
 *     comm_create(&c, &(struct comm_config){ .ops = &comm_ops_mpi, .timeout_ms = 60000 }, st);
 *     comm_all_reduce(c, x, n, st);                       // x += x of all other ranks
 *
 * Back ends: MPI (host memory), self (R = 1, no library at all). Ranks on GPUs have a second part, at the end of this
 * header, for what their kernels add and gather.
 * Threads: one calls the operations; comm_abort may be called from any thread.
 */
#ifndef TANDEM_COMM_H
#define TANDEM_COMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/ranks.h"
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
/* Of these, how many have a lower rank. */
uint32_t comm_local_rank(const struct comm *c);
/* Names this machine: the lowest rank on it. */
uint32_t comm_machine(const struct comm *c);

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
uint32_t comm_timeout_ms(const struct comm *c); /* of one operation */

/* ---- which device a rank takes ----
 *
 * The ranks of a machine, in order of rank, each take the first of their devices that no rank before has taken. So ranks that
 * see the same devices take one after the other; and where each sees devices of its own (pods, CUDA_VISIBLE_DEVICES,
 * --devices), each takes one of these. A rank that finds all of its own taken gets one of them if those that have them can
 * be given others: as many ranks have a device as can.
 */
#define COMM_DEVICES_MAX   16 /* of a rank; more are not looked at */
#define COMM_DEVICE_BYTES  16 /* of an id, the same wherever the device is seen: its UUID */
#define COMM_DEVICE_ABSENT UINT32_MAX

struct comm_devices {
    uint32_t machine;                                /* comm_machine */
    uint32_t count;                                  /* 0: none that it could use */
    uint8_t id[COMM_DEVICES_MAX][COMM_DEVICE_BYTES]; /* the best first; one that comes twice counts once */
};

/* taken[r]: which of its devices rank r takes, or COMM_DEVICE_ABSENT. Returns the first rank that finds none, or `ranks`. Pure;
 * no count may be above COMM_DEVICES_MAX, nor ranks above MAX_RANKS. */
uint32_t comm_match_devices(const struct comm_devices *of, uint32_t ranks, uint32_t *taken);
/* Collective: tells all ranks ours (machine is filled in here) and takes one of them. FAILED_PRECONDITION on all ranks alike when
 * one of them finds none; it names that rank and says what the ranks of its machine see. */
STATUS_MUST_CHECK enum status_code comm_take_device(struct comm *c, const struct comm_devices *mine, uint32_t *taken,
                                                    struct status *st);

/* ---- ranks on GPUs (library tandem_comm_cuda) ----
 *
 * Each rank has a device. Between the products of a forward it needs the sum over ranks of bf16 rows, added to the residual
 * stream and normed in the same kernel; and at the end rows of logits whose columns are spread over the ranks, put together.
 *
 *     comm_gpu_create(&g, &cfg, st);              this rank's memory, nobody is asked
 *     comm_gpu_connect(g, st);                    collective, once
 *     per step, on a stream, captured in a graph or not:
 *       (a product writes this rank's part of a sum to comm_gpu_part(g, 0))
 *       comm_gpu_sum(g, &(struct comm_gpu_sum){.part = 0, ...}, st);      x += sum;  h = norm(x)
 *       (the LM head writes this rank's columns to comm_gpu_share(g))
 *       comm_gpu_gather(g, &(struct comm_gpu_gather){...}, st);           all columns of all rows
 *     comm_gpu_finish(g, event, st);              waits for it, with a bound
 *
 * Three ways. PUSH and READ, for up to COMM_GPU_PEER_RANKS ranks of one machine: kernels reach the other ranks' memory over NVLink or PCIe, and every
 * rank adds all parts in rank order, so all have the same bits, whichever of them it is. PUSH, up to COMM_GPU_PUSH_ROWS rows:
 * each writes its part to all others. READ: after a handshake each reads the parts of the others. NCCL: its all-reduce and
 * all-gather, and a kernel of ours behind it; any placement of ranks. Which one a sum of so many rows takes is measured in
 * connect, rank 0 decides. No way uses NVLink multicast.
 *
 * All ranks launch the same operations with the same numbers in the same order. A part is written again only after two
 * more sums of other parts (0, 1, 2 in turn): by then every rank has read it. A peer that does not come within the comm's
 * timeout, or comm_abort, ends the kernels that wait, and comm_gpu_finish says so; as with the comm, that is final.
 */
struct comm_gpu;

#define COMM_GPU_MAX_RANKS  MAX_RANKS
#define COMM_GPU_PEER_RANKS 8 /* PUSH and READ; more are joined by NCCL alone */
#define COMM_GPU_PARTS      3
#define COMM_GPU_PUSH_ROWS  128

enum comm_gpu_way { COMM_GPU_AUTO, COMM_GPU_PEER, COMM_GPU_PUSH, COMM_GPU_READ, COMM_GPU_NCCL };

struct comm_gpu_config {
    struct comm *comm;    /* outlives it; carries what connect exchanges */
    int device;           /* of the CUDA runtime; current for the calling thread in all calls */
    uint32_t max_rows;    /* of a sum */
    uint32_t hidden;      /* elements of a row, a multiple of 4 */
    uint32_t gather_rows; /* at a time */
    uint32_t cols_first;  /* this rank's columns of gathered rows; all ranks together have 0 .. cols_total - 1 */
    uint32_t cols_count;
    uint32_t cols_total;
    enum comm_gpu_way
        way;          /* AUTO: what is there, by measurement; PEER: PUSH or READ, by measurement; PUSH: READ beyond its
                              rows. All but AUTO: FAILED_PRECONDITION where it cannot be had */
    const char *nccl; /* the library, as dlopen takes it; NULL: libnccl.so.2 */
};

/* Device memory that create and connect take, NCCL's own guessed, and what connect gives back again. */
uint64_t comm_gpu_bytes(const struct comm_gpu_config *cfg);
STATUS_MUST_CHECK enum status_code comm_gpu_create(struct comm_gpu **out, const struct comm_gpu_config *cfg,
                                                   struct status *st);
void comm_gpu_destroy(
    struct comm_gpu *g); /* NULL is fine; the peers may still read our memory: all ranks have finished */

/* FAILED_PRECONDITION: two ranks on one device, no way between the devices. May take seconds (NCCL). */
STATUS_MUST_CHECK enum status_code comm_gpu_connect(struct comm_gpu *g, struct status *st);
bool comm_gpu_connected(const struct comm_gpu *g);
/* "peer memory, pushed up to 64 rows; peer memory, read up to 1024 rows; NCCL 2.28.9": what it takes; with AUTO also why it is NCCL
 * alone. Valid as long as g. */
const char *comm_gpu_text(const struct comm_gpu *g);

void *comm_gpu_part(struct comm_gpu *g, uint32_t part); /* bf16 [max_rows][hidden] */
float *comm_gpu_share(struct comm_gpu *g);              /* [gather_rows][cols_count] */

struct comm_gpu_sum {
    uint32_t part; /* 0 .. COMM_GPU_PARTS - 1 */
    uint32_t rows;
    bool set;            /* x = sum, not x += sum */
    float *x;            /* [rows][hidden] */
    const float *bias;   /* [hidden], added once; NULL: none */
    const float *weight; /* [hidden] of the norm; NULL: none, h is left alone */
    float eps;
    void *h;      /* bf16 [rows][hidden] = x / sqrt(mean(x^2) + eps) * weight */
    void *stream; /* cudaStream_t */
};

struct comm_gpu_gather {
    uint32_t rows;
    float *out; /* [rows][cols_total] */
    void *stream;
};

/* Both only launch; INTERNAL with the launch's error. Sums of the same rows take the same way always. */
STATUS_MUST_CHECK enum status_code comm_gpu_sum(struct comm_gpu *g, const struct comm_gpu_sum *s, struct status *st);
STATUS_MUST_CHECK enum status_code comm_gpu_gather(struct comm_gpu *g, const struct comm_gpu_gather *s,
                                                   struct status *st);

/* Waits for the event (cudaEvent_t). DEADLINE_EXCEEDED names the rank that did not come; UNAVAILABLE: NCCL has lost a peer, in its
 * own words; ABORTED after comm_abort, at most COMM_GPU_ABORT_MS later. */
#define COMM_GPU_ABORT_MS 2000
STATUS_MUST_CHECK enum status_code comm_gpu_finish(struct comm_gpu *g, void *event, struct status *st);
/* Whether the event has come, without waiting; the same errors. */
STATUS_MUST_CHECK enum status_code comm_gpu_poll(struct comm_gpu *g, void *event, bool *done, struct status *st);

#endif
