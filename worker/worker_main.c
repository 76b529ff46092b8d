/* tandem-worker: one rank. See worker_internal.h for its threads and how it ends. */
#include "worker/worker_internal.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <unistd.h>

/* What launchers tell the processes they start: Open MPI and all that speak PMIx or PMI (srun, MPICH's Hydra). */
static bool under_launcher(void)
{
    return getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMIX_RANK") || getenv("PMI_RANK");
}

/* Before MPI tells: so that a bad command line is reported once, not by every rank. */
static bool is_first_rank(void)
{
    const char *rank = getenv("OMPI_COMM_WORLD_RANK");
    if (!rank)
        rank = getenv("PMIX_RANK");
    if (!rank)
        rank = getenv("PMI_RANK");
    return !rank || strcmp(rank, "0") == 0;
}

/* mpirun that is killed with -9 takes no rank with it otherwise. A rank without a launcher outlives its shell as usual. */
static enum status_code die_with_launcher(struct status *st)
{
    pid_t launcher = getppid();
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
        return status_errno(st, ST_INTERNAL, errno, "PR_SET_PDEATHSIG");
    /* It may have ended between the two calls: then no signal comes. Before the first, MPI finds nobody to talk to. */
    if (getppid() != launcher)
        return status_set(st, ST_ABORTED, "the launcher is gone");
    return ST_OK;
}

/* The same number on all ranks: the coordinator groups them by it. */
static enum status_code draw_launch_id(struct worker *w, struct status *st)
{
    while (w->rank == 0 && w->launch_id == 0) {
        if (getrandom(&w->launch_id, sizeof w->launch_id, 0) != (ssize_t)sizeof w->launch_id)
            return status_errno(st, ST_INTERNAL, errno, "getrandom");
    }
    return comm_broadcast(w->comm, &w->launch_id, sizeof w->launch_id, 0, st);
}

static enum status_code join_group(struct worker *w, struct status *st)
{
    const struct comm_config cfg = {
        .ops = under_launcher() ? &comm_ops_mpi : &comm_ops_self,
        .timeout_ms = w->options.comm_timeout_ms,
    };
    enum status_code rc = comm_create(&w->comm, &cfg, st);
    if (rc != ST_OK)
        return rc;
    worker_guard_set_comm(&w->guard, w->comm);
    w->rank = comm_rank(w->comm);
    w->size = comm_size(w->comm);
    atomic_store(&w->log.rank, (int)w->rank);
    if (w->options.trace &&
        (rc = worker_trace_open(&w->trace, w->options.trace, w->rank, w->size, &w->log, st)) != ST_OK)
        return rc;
    return draw_launch_id(w, st);
}

static void fill_hello(struct worker *w)
{
    if (gethostname(w->host, sizeof w->host) != 0)
        snprintf(w->host, sizeof w->host, "unknown");
    w->host[sizeof w->host - 1] = '\0';
    if (w->options.backend != WORKER_BACKEND_HOST)
        snprintf(w->device, sizeof w->device, "no device yet");
    else if (w->options.threads)
        snprintf(w->device, sizeof w->device, "host, %u threads", w->options.threads);
    else
        snprintf(w->device, sizeof w->device, "host");
    w->control.address = w->options.coordinator;
    w->control.security = &w->options.security;
    Tandem__V1__Hello *h = &w->control.hello;
    h->protocol = RPC_WORKER_PROTOCOL;
    h->launch_id = w->launch_id;
    h->rank = w->rank;
    h->size = w->size;
    h->host = w->host;
    h->pid = (uint32_t)getpid();
    if (w->options.group)
        h->group = (char *)w->options.group; /* protobuf-c has no const */
}

/* The orderly end: all ranks come here, so MPI_Finalize finds its peers; the guard bounds it all the same. */
static void close_all(struct worker *w)
{
    const bool whole = worker_trace_close(w->trace);
    worker_control_detach(&w->control);
    if (!whole) {
        /* A thread is still inside the plugin, which must not be unloaded under it, nor may exit's handlers run. All is
         * done, so this is no failure; the group is left in order, as MPI takes it for one otherwise. */
        worker_log(&w->log, WORKER_LOG_WARNING, "--trace-kernels: the last records did not come within %d ms",
                   WORKER_KERNELS_END_MS);
        worker_guard_set_comm(&w->guard, NULL);
        comm_destroy(w->comm);
        _exit(WORKER_EXIT_OK);
    }
    engine_destroy(w->engine);
    worker_backend_close(&w->backend);
    worker_guard_set_comm(&w->guard, NULL);
    comm_destroy(w->comm);
    worker_guard_stop(&w->guard);
    worker_control_fini(&w->control);
}

/* No MPI_Finalize here: it would wait for ranks that do not come. mpirun ends the job because of the status. */
_Noreturn static void leave(struct worker *w, int code)
{
    worker_trace_close(w->trace);
    worker_log(&w->log, WORKER_LOG_INFO, "ending with status %d", code);
    if (code == WORKER_EXIT_RELAUNCH)
        usleep(WORKER_RELAUNCH_DELAY_MS * 1000);
    _exit(code);
}

static int parse_command_line(struct worker_options *o, int argc, char **argv, bool *done)
{
    struct status st = STATUS_INIT;
    enum worker_action action;
    *done = true;
    if (worker_options_parse(o, &action, argc, argv, &st) != ST_OK) {
        if (is_first_rank())
            fprintf(stderr, "tandem-worker: %s\n", st.message);
        return WORKER_EXIT_USAGE;
    }
    if (action == WORKER_SHOW_HELP)
        worker_options_help();
    else if (action == WORKER_SHOW_VERSION)
        printf("tandem-worker %s\n", TANDEM_VERSION);
    else if (action != WORKER_INSPECT)
        *done = false;
    else if (worker_inspect(o->model_dir, &st) != ST_OK) {
        fprintf(stderr, "tandem-worker: %s\n", st.message);
        return WORKER_EXIT_PERMANENT;
    }
    return WORKER_EXIT_OK;
}

int main(int argc, char **argv)
{
    struct worker w = {.rank = 0};
    bool done;
    int code = parse_command_line(&w.options, argc, argv, &done);
    if (done)
        return code;
    w.log.level = (enum worker_log_level)w.options.log_level;
    atomic_init(&w.log.rank, -1);

    struct status st = STATUS_INIT;
    signal(SIGPIPE, SIG_IGN);
    if ((under_launcher() && die_with_launcher(&st) != ST_OK) ||
        worker_control_init(&w.control, &w.guard, &w.log, &st) != ST_OK ||
        worker_guard_start(&w.guard, &w.log, worker_control_wake, &w.control, &st) != ST_OK) {
        worker_log(&w.log, WORKER_LOG_ERROR, "%s: %s", status_name(st.code), st.message);
        leave(&w, WORKER_EXIT_RELAUNCH);
    }
    if (join_group(&w, &st) != ST_OK) {
        code = worker_guard_exit_code(&w.guard);
        worker_log(&w.log, WORKER_LOG_ERROR, "%s: %s", status_name(st.code), st.message);
        leave(&w, code > 0 ? code : WORKER_EXIT_RELAUNCH);
    }
    fill_hello(&w);
    code = worker_run(&w);
    if (code != WORKER_EXIT_OK)
        leave(&w, code);
    close_all(&w);
    worker_log(&w.log, WORKER_LOG_INFO, "ended as the coordinator asked");
    return WORKER_EXIT_OK;
}
