/* comm_mpi.c - the group over MPI: host memory, any placement of ranks. The only file that knows MPI.
 *
 * Every operation is made of nonblocking sends and receives that are polled (wait_all), never of MPI's collectives:
 * those cannot be given up when a peer is gone, and they do not promise equal bits on all ranks. The sum is always taken
 * in the order of ranks, x0 + x1 + x2 + ..., each element by one rule whatever the size of the message:
 *
 *   up to DIRECT_MAX_BYTES   every rank sends all to everyone and adds up all of it itself: one latency
 *   above                    rank r adds up slice r and sends it round: two latencies, 2 (R-1)/R of the bytes
 *
 * After a failure requests may still be open on our buffers. No call goes to MPI any more then, and the buffers live
 * until the process exits, because a peer may still write to them.
 */
#include <fcntl.h>
#include <mpi.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/comm_internal.h"

/* What MPI still sends at once over shared memory (4 KiB with its header). 4 ranks on 2 cores: 2 KiB 9.9 us direct and 14
 * sliced, 4 KiB 20 and 12; 2 ranks: 1.8 and 2.4, 3.8 and 3.4. */
#define DIRECT_MAX_BYTES 3840u
#define CHUNK_FLOATS     (128u << 10) /* of the sliced sum: bounds the scratch memory; larger ones gain nothing */
#define PIECE_BYTES      (64u << 20)  /* MPI counts are int */
#define SLICE_ALIGN      16u          /* floats: slices start on cache lines */
#define NAME_BYTES       256

enum { TAG_REDUCE = 1, TAG_GATHER, TAG_BROADCAST, TAG_BARRIER };

struct mpi {
    float *scratch; /* what peers send to be added: one part per rank */
    uint32_t n;     /* open requests, at most 2 per peer */
    MPI_Request *requests;
    uint32_t *peers; /* of each request */
    char *names;     /* of the machines, NAME_BYTES per rank; until all have come */
};

#ifdef TANDEM_SANITIZED
/* Open MPI unloads its components at the end; the sanitizers then cannot tell whose leak or race they report, and the
 * suppressions of tests/sanitizers do not match. */
int dlclose(void *handle);
int dlclose(void *handle)
{
    (void)handle;
    return 0;
}
#endif

static enum status_code mpi_error(int err, const char *what, struct status *st)
{
    char text[MPI_MAX_ERROR_STRING];
    int len;
    if (MPI_Error_string(err, text, &len) != MPI_SUCCESS)
        return status_set(st, ST_INTERNAL, "%s: MPI error %d", what, err);
    return status_set(st, ST_INTERNAL, "%s: %s", what, text);
}

/* Which peers have not answered: the first of them, and how many. */
static enum status_code blame(struct comm *c, enum status_code rc, struct status *st)
{
    struct mpi *m = c->backend;
    uint32_t first = UINT32_MAX, more = 0, last = UINT32_MAX;
    for (uint32_t i = 0; i < m->n; i++) {
        int done = 0;
        if (MPI_Request_get_status(m->requests[i], &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done)
            continue;
        if (first == UINT32_MAX)
            first = m->peers[i];
        else if (m->peers[i] != first && m->peers[i] != last)
            more++, last = m->peers[i];
    }
    uint64_t ms = (comm_now_ns() - c->start_ns) / 1000000;
    if (rc == ST_ABORTED)
        return status_set(st, rc, "aborted after %llu ms", (unsigned long long)ms);
    return status_set(st, rc, "no answer from rank %u%s within %u ms: it is stuck or gone", first,
                      more ? " and others" : "", c->timeout_ms);
}

/* Until all open requests are done. */
static enum status_code wait_all(struct comm *c, struct status *st)
{
    struct mpi *m = c->backend;
    struct comm_wait w = {0};
    for (;;) {
        int done;
        int err = MPI_Testall((int)m->n, m->requests, &done, MPI_STATUSES_IGNORE);
        if (err != MPI_SUCCESS)
            return mpi_error(err, "MPI_Testall", st);
        if (done)
            break;
        enum status_code rc = comm_wait_step(c, &w);
        if (rc != ST_OK)
            return blame(c, rc, st);
    }
    m->n = 0;
    return ST_OK;
}

/* Starts a receive or a send of at most INT_MAX bytes. */
static enum status_code start_recv(struct comm *c, void *to, size_t bytes, uint32_t peer, int tag, struct status *st)
{
    struct mpi *m = c->backend;
    int err = MPI_Irecv(to, (int)bytes, MPI_BYTE, (int)peer, tag, MPI_COMM_WORLD, &m->requests[m->n]);
    if (err != MPI_SUCCESS)
        return mpi_error(err, "MPI_Irecv", st);
    m->peers[m->n++] = peer;
    return ST_OK;
}

static enum status_code start_send(struct comm *c, const void *from, size_t bytes, uint32_t peer, int tag,
                                   struct status *st)
{
    struct mpi *m = c->backend;
    int err = MPI_Isend(from, (int)bytes, MPI_BYTE, (int)peer, tag, MPI_COMM_WORLD, &m->requests[m->n]);
    if (err != MPI_SUCCESS)
        return mpi_error(err, "MPI_Isend", st);
    m->peers[m->n++] = peer;
    return ST_OK;
}

/* --- all_reduce --- */

/* x = part 0 + part 1 + ... in this order, where x itself is the part of our own rank. */
static void add_in_order(float *restrict x, const float *restrict parts, size_t stride, size_t n, uint32_t rank,
                         uint32_t size)
{
    float sum[256];
    for (size_t at = 0; at < n; at += 256) {
        size_t k = n - at < 256 ? n - at : 256;
        for (uint32_t r = 0; r < size; r++) {
            const float *p = r == rank ? x + at : parts + r * stride + at;
            if (r == 0)
                memcpy(sum, p, k * sizeof *sum);
            else
                for (size_t i = 0; i < k; i++)
                    sum[i] += p[i];
        }
        memcpy(x + at, sum, k * sizeof *sum);
    }
}

static enum status_code reduce_direct(struct comm *c, float *x, size_t n, struct status *st)
{
    struct mpi *m = c->backend;
    enum status_code rc = ST_OK;
    for (uint32_t i = 1; i < c->size && rc == ST_OK; i++) {
        uint32_t peer = (c->rank + i) % c->size;
        rc = start_recv(c, m->scratch + peer * n, n * sizeof *x, peer, TAG_REDUCE, st);
    }
    for (uint32_t i = 1; i < c->size && rc == ST_OK; i++)
        rc = start_send(c, x, n * sizeof *x, (c->rank + i) % c->size, TAG_REDUCE, st);
    if (rc == ST_OK)
        rc = wait_all(c, st);
    if (rc == ST_OK)
        add_in_order(x, m->scratch, n, n, c->rank, c->size);
    return rc;
}

static size_t slice_start(size_t n, uint32_t r, uint32_t size)
{
    size_t per = (n + size - 1) / size;
    per = (per + SLICE_ALIGN - 1) / SLICE_ALIGN * SLICE_ALIGN;
    return per * r < n ? per * r : n;
}

static enum status_code reduce_sliced(struct comm *c, float *x, size_t n, struct status *st)
{
    struct mpi *m = c->backend;
    enum status_code rc = ST_OK;
    size_t own = slice_start(n, c->rank, c->size);
    size_t own_n = slice_start(n, c->rank + 1, c->size) - own;

    for (uint32_t i = 1; i < c->size && rc == ST_OK; i++) {
        uint32_t peer = (c->rank + i) % c->size;
        rc = start_recv(c, m->scratch + peer * own_n, own_n * sizeof *x, peer, TAG_REDUCE, st);
    }
    for (uint32_t i = 1; i < c->size && rc == ST_OK; i++) {
        uint32_t peer = (c->rank + i) % c->size;
        size_t at = slice_start(n, peer, c->size);
        rc = start_send(c, x + at, (slice_start(n, peer + 1, c->size) - at) * sizeof *x, peer, TAG_REDUCE, st);
    }
    if (rc == ST_OK)
        rc = wait_all(c, st);
    if (rc != ST_OK)
        return rc;
    add_in_order(x + own, m->scratch, own_n, own_n, c->rank, c->size);

    for (uint32_t i = 1; i < c->size && rc == ST_OK; i++) {
        uint32_t peer = (c->rank + i) % c->size;
        size_t at = slice_start(n, peer, c->size);
        rc = start_recv(c, x + at, (slice_start(n, peer + 1, c->size) - at) * sizeof *x, peer, TAG_GATHER, st);
    }
    for (uint32_t i = 1; i < c->size && rc == ST_OK; i++)
        rc = start_send(c, x + own, own_n * sizeof *x, (c->rank + i) % c->size, TAG_GATHER, st);
    return rc == ST_OK ? wait_all(c, st) : rc;
}

static enum status_code mpi_all_reduce(struct comm *c, float *x, size_t n, struct status *st)
{
    if (n <= DIRECT_MAX_BYTES / sizeof *x)
        return reduce_direct(c, x, n, st);
    enum status_code rc = ST_OK;
    for (size_t at = 0; at < n && rc == ST_OK; at += CHUNK_FLOATS)
        rc = reduce_sliced(c, x + at, n - at < CHUNK_FLOATS ? n - at : CHUNK_FLOATS, st);
    return rc;
}

/* --- the others --- */

/* Round k moves the k-th piece of every rank's part; parts may differ in size, so ranks may have fewer pieces. */
static enum status_code mpi_all_gather(struct comm *c, const void *send, void *recv, const size_t *bytes,
                                       struct status *st)
{
    size_t longest = 0;
    for (uint32_t r = 0; r < c->size; r++)
        longest = bytes[r] > longest ? bytes[r] : longest;
    enum status_code rc = ST_OK;
    for (size_t at = 0; at < longest && rc == ST_OK; at += PIECE_BYTES) {
        size_t start = 0;
        for (uint32_t r = 0; r < c->size && rc == ST_OK; start += bytes[r], r++) {
            size_t n = bytes[r] <= at ? 0 : bytes[r] - at < PIECE_BYTES ? bytes[r] - at : PIECE_BYTES;
            if (n && r != c->rank)
                rc = start_recv(c, (char *)recv + start + at, n, r, TAG_GATHER, st);
            for (uint32_t i = 1; n && r == c->rank && i < c->size && rc == ST_OK; i++)
                rc = start_send(c, (const char *)send + at, n, (r + i) % c->size, TAG_GATHER, st);
        }
        if (rc == ST_OK)
            rc = wait_all(c, st);
    }
    return rc;
}

static enum status_code mpi_broadcast(struct comm *c, void *x, size_t bytes, uint32_t root, struct status *st)
{
    enum status_code rc = ST_OK;
    for (size_t at = 0; at < bytes && rc == ST_OK; at += PIECE_BYTES) {
        size_t n = bytes - at < PIECE_BYTES ? bytes - at : PIECE_BYTES;
        if (c->rank != root)
            rc = start_recv(c, (char *)x + at, n, root, TAG_BROADCAST, st);
        for (uint32_t i = 1; c->rank == root && i < c->size && rc == ST_OK; i++)
            rc = start_send(c, (char *)x + at, n, (root + i) % c->size, TAG_BROADCAST, st);
        if (rc == ST_OK)
            rc = wait_all(c, st);
    }
    return rc;
}

/* Dissemination: after round k every rank has heard, directly or not, of 2^(k+1) ranks. */
static enum status_code mpi_barrier(struct comm *c, struct status *st)
{
    enum status_code rc = ST_OK;
    for (uint32_t step = 1; step < c->size && rc == ST_OK; step *= 2) {
        rc = start_recv(c, NULL, 0, (c->rank + c->size - step) % c->size, TAG_BARRIER, st);
        if (rc == ST_OK)
            rc = start_send(c, NULL, 0, (c->rank + step) % c->size, TAG_BARRIER, st);
        if (rc == ST_OK)
            rc = wait_all(c, st);
    }
    return rc;
}

/* --- open and close --- */

/* Names this machine: the id of its boot (containers on one machine share it, network namespaces too), else its name. */
static void machine_name(char name[NAME_BYTES])
{
    memset(name, 0, NAME_BYTES);
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, name, NAME_BYTES - 1) : -1;
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        gethostname(name, NAME_BYTES - 1);
}

static enum status_code count_local(struct comm *c, struct status *st)
{
    struct mpi *m = c->backend;
    char *names = m->names = calloc(c->size, NAME_BYTES);
    size_t *bytes = calloc(c->size, sizeof *bytes);
    enum status_code rc = ST_OK;
    if (!names || !bytes) {
        rc = status_nomem(st, "names of machines", (size_t)c->size * NAME_BYTES);
        goto out;
    }
    char *own = names + (size_t)c->rank * NAME_BYTES;
    machine_name(own);
    for (uint32_t r = 0; r < c->size; r++)
        bytes[r] = NAME_BYTES;
    rc = mpi_all_gather(c, own, names, bytes, st);
    if (rc != ST_OK) {
        status_prefix(st, "waiting for all ranks of the job");
        goto out; /* receives may be open on names: it stays */
    }
    c->local_size = c->local_rank = 0;
    for (uint32_t r = 0; r < c->size; r++) {
        bool here = memcmp(names + (size_t)r * NAME_BYTES, own, NAME_BYTES) == 0;
        if (here && c->local_size == 0)
            c->machine = r;
        c->local_size += here;
        c->local_rank += here && r < c->rank;
    }
    free(names);
    m->names = NULL;
out:
    free(bytes);
    return rc;
}

static enum status_code init_library(struct status *st)
{
    struct comm_hint hint;
    int done = 0, provided = 0;
    MPI_Initialized(&done);
    if (done)
        return status_set(st, ST_FAILED_PRECONDITION,
                          "MPI is or was in use in this process: it can be initialised only once");
    /* With more ranks than cores (or a coordinator beside them) ranks must yield inside MPI too, or an operation takes
     * milliseconds instead of microseconds. A setting of the user's stands. */
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    comm_hint_begin(&hint,
                    "tandem: MPI could not initialise (its own message stands above). Start the ranks with mpirun of "
                    "the MPI that this program was built with, or one rank alone without mpirun; check OMPI_MCA_* "
                    "and OPAL_PREFIX in the environment.\n");
    int err = MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided);
    comm_hint_end(&hint);
    if (err != MPI_SUCCESS)
        return status_set(st, ST_FAILED_PRECONDITION, "MPI could not initialise (error %d)", err);
    if (provided < MPI_THREAD_FUNNELED) {
        MPI_Finalize();
        return status_set(st, ST_FAILED_PRECONDITION, "this MPI gives thread level %d, expected at least %d (FUNNELED)",
                          provided, MPI_THREAD_FUNNELED);
    }
    return ST_OK;
}

static enum status_code mpi_open(struct comm *c, struct status *st)
{
    enum status_code rc = init_library(st);
    if (rc != ST_OK)
        return rc;
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    int rank, size;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    c->rank = (uint32_t)rank;
    c->size = (uint32_t)size;
    c->local_size = 1;

    /* From here on a failure leaves MPI initialised: to finalise it would wait for peers. The process exits. */
    struct mpi *m = calloc(1, sizeof *m);
    if (!m)
        return status_nomem(st, "the MPI group", sizeof *m);
    size_t direct = c->size * (size_t)DIRECT_MAX_BYTES;
    size_t sliced = (CHUNK_FLOATS + c->size * (size_t)SLICE_ALIGN) * sizeof(float);
    size_t scratch = direct > sliced ? direct : sliced;
    m->scratch = c->size > 1 ? malloc(scratch) : NULL;
    m->requests = calloc(2 * (size_t)c->size, sizeof(MPI_Request));
    m->peers = calloc(2 * (size_t)c->size, sizeof(uint32_t));
    if ((c->size > 1 && !m->scratch) || !m->requests || !m->peers) {
        rc = status_nomem(st, "buffers of the MPI group", scratch);
        goto fail;
    }
    c->backend = m;
    comm_start_clock(c); /* MPI_Init may have taken long */
    if (c->size > 1)
        rc = count_local(c, st);
    return rc; /* if not ST_OK, requests may be open: the buffers stay */
fail:
    free(m->peers);
    free(m->requests);
    free(m->scratch);
    free(m);
    return rc;
}

/* MPI_Finalize waits for all ranks, without a bound; so a bounded barrier goes first. */
static void mpi_close(struct comm *c, bool clean)
{
    struct mpi *m = c->backend;
    if (!clean || (c->size > 1 && mpi_barrier(c, NULL) != ST_OK))
        return; /* buffers stay, see the top of this file */
    MPI_Finalize();
    free(m->peers);
    free(m->requests);
    free(m->scratch);
    free(m);
}

const struct comm_ops comm_ops_mpi = {
    .name = "mpi",
    .open = mpi_open,
    .close = mpi_close,
    .all_reduce = mpi_all_reduce,
    .all_gather = mpi_all_gather,
    .broadcast = mpi_broadcast,
    .barrier = mpi_barrier,
};
