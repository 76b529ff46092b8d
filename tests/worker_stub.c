#include "tests/worker_stub.h"

#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "worker/worker_internal.h"

extern char **environ;

/* ---- the coordinator ---- */

static struct stub_rank *rank_of(struct stub *s, const struct rpc_call *call)
{
    for (uint32_t r = 0; r < STUB_RANKS; r++)
        if (s->ranks[r].call == call)
            return &s->ranks[r];
    return NULL;
}

static void on_hello(struct stub *s, struct rpc_call *call, const Tandem__V1__Hello *h)
{
    struct status st = STATUS_INIT;
    if (s->deny.code != ST_OK) {
        rpc_call_finish(call, &s->deny, 0);
        return;
    }
    ck_assert_uint_lt(h->rank, STUB_RANKS);
    struct stub_rank *r = &s->ranks[h->rank];
    unsigned attached = r->attached + 1;
    if (r->call)
        rpc_call_unref(r->call);
    *r = (struct stub_rank){.call = rpc_call_ref(call),
                            .attached = attached,
                            .launch_id = h->launch_id,
                            .size = h->size,
                            .pid = h->pid,
                            .protocol = h->protocol,
                            .epoch = s->epoch};
    if (s->epoch == 0)
        return;
    Tandem__V1__Welcome w = TANDEM__V1__WELCOME__INIT;
    w.heartbeat_interval_ms = 50;
    Tandem__V1__CoordinatorMessage m = TANDEM__V1__COORDINATOR_MESSAGE__INIT;
    m.epoch = s->epoch;
    m.body_case = TANDEM__V1__COORDINATOR_MESSAGE__BODY_WELCOME;
    m.welcome = &w;
    if (rpc_call_send(call, &m.base, &st) != ST_OK)
        fprintf(stderr, "stub: Welcome: %s\n", st.message);
}

static void on_ready(struct stub_rank *r, const Tandem__V1__Ready *m)
{
    r->ready = true;
    r->vocab_size = m->vocab_size;
    r->max_slots = m->max_slots;
    r->max_step_tokens = m->max_step_tokens;
    r->page_bytes = m->page_bytes;
    r->token_bytes = m->token_bytes;
    r->total_pages = m->total_pages;
    if (!m->model)
        return;
    r->layers = m->model->layers;
    r->eos = m->model->n_eos_token_ids ? m->model->eos_token_ids[0] : UINT32_MAX;
    r->bos = m->model->bos_token_id;
}

static void on_result(struct stub_rank *r, const Tandem__V1__StepResult *m)
{
    if (r->n_results == STUB_STEPS)
        return;
    struct stub_result *x = &r->results[r->n_results++];
    x->step = m->step;
    x->compute_us = m->compute_us;
    x->at_us = worker_now_us();
    x->n = (uint32_t)m->n_token_ids;
    for (uint32_t i = 0; i < x->n && i < STUB_TOKENS; i++)
        x->tokens[i] = m->token_ids[i];
}

static void on_message(struct rpc_call *call, const void *data, size_t len, void *ctx)
{
    struct stub *s = ctx;
    Tandem__V1__RankMessage *m =
        (Tandem__V1__RankMessage *)rpc_unpack(&tandem__v1__rank_message__descriptor, data, len);
    if (!m)
        return;
    pthread_mutex_lock(&s->lock);
    const uint32_t slow_us = s->slow_us;
    pthread_mutex_unlock(&s->lock);
    if (slow_us)
        usleep(slow_us);
    pthread_mutex_lock(&s->lock);
    struct stub_rank *r = rank_of(s, call);
    if (m->body_case == TANDEM__V1__RANK_MESSAGE__BODY_HELLO) {
        on_hello(s, call, m->hello);
    } else if (r && m->epoch != r->epoch) {
        r->foreign++;
    } else if (r) {
        switch (m->body_case) {
        case TANDEM__V1__RANK_MESSAGE__BODY_LOADING:
            r->loadings++;
            break;
        case TANDEM__V1__RANK_MESSAGE__BODY_READY:
            on_ready(r, m->ready);
            break;
        case TANDEM__V1__RANK_MESSAGE__BODY_RESULT:
            on_result(r, m->result);
            break;
        case TANDEM__V1__RANK_MESSAGE__BODY_HEARTBEAT:
            r->heartbeats++;
            r->heartbeat_step = m->heartbeat->last_step;
            break;
        case TANDEM__V1__RANK_MESSAGE__BODY_FAULT:
            r->faulted = true;
            r->fault_code = m->fault->code;
            r->fault_permanent = m->fault->permanent;
            snprintf(r->fault, sizeof r->fault, "%s", m->fault->message);
            break;
        default:
            break;
        }
    }
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    protobuf_c_message_free_unpacked(&m->base, NULL);
}

static void on_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    (void)call, (void)msg, (void)len, (void)ctx;
}

static void on_half_close(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    rpc_call_finish(call, NULL, 0);
}

static void on_close(struct rpc_call *call, bool cancelled, void *ctx)
{
    (void)cancelled;
    struct stub *s = ctx;
    pthread_mutex_lock(&s->lock);
    struct stub_rank *r = rank_of(s, call);
    if (r) {
        r->call = NULL;
        rpc_call_unref(call);
    }
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

void stub_init(struct stub *s)
{
    *s = (struct stub){.epoch = 1};
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&s->changed, &attr);
    pthread_condattr_destroy(&attr);
}

void stub_start(struct stub *s, const char *address)
{
    s->method = (struct rpc_method){
        .path = "/tandem.v1.WorkerControl/Attach",
        .kind = RPC_BIDI,
        .on_open = on_open,
        .on_message = on_message,
        .on_half_close = on_half_close,
        .on_close = on_close,
        .ctx = s,
    };
    struct status st = STATUS_INIT;
    const struct rpc_server_config cfg = {.methods = &s->method, .n_methods = 1, .listen = &address, .n_listen = 1};
    ck_assert_msg(rpc_server_start(&s->server, &cfg, &st) == ST_OK, "%s", st.message);
    if (strncmp(address, "unix:", 5) == 0)
        snprintf(s->address, sizeof s->address, "%s", address);
    else
        snprintf(s->address, sizeof s->address, "127.0.0.1:%u", rpc_server_port(s->server, 0));
}

void stub_stop(struct stub *s)
{
    rpc_server_destroy(s->server);
    s->server = NULL;
}

void stub_wait(struct stub *s, uint32_t n, bool (*done)(const struct stub_rank *r, uint64_t arg), uint64_t arg,
               const char *what)
{
    int64_t until_us = worker_now_us() + (int64_t)STUB_WAIT_MS * 1000;
    struct timespec until = {.tv_sec = until_us / 1000000, .tv_nsec = until_us % 1000000 * 1000};
    bool in_time = true;
    pthread_mutex_lock(&s->lock);
    for (uint32_t r = 0; r < n && in_time;) {
        if (done(&s->ranks[r], arg))
            r++;
        else
            in_time = pthread_cond_timedwait(&s->changed, &s->lock, &until) != ETIMEDOUT;
    }
    pthread_mutex_unlock(&s->lock);
    if (!in_time)
        ck_abort_msg("%s: not within %d ms", what, STUB_WAIT_MS);
}

bool stub_is_ready(const struct stub_rank *r, uint64_t epoch)
{
    return r->ready && r->epoch == epoch;
}

bool stub_has_fault(const struct stub_rank *r, uint64_t unused)
{
    (void)unused;
    return r->faulted;
}

bool stub_is_gone(const struct stub_rank *r, uint64_t unused)
{
    (void)unused;
    return !r->call;
}

bool stub_has_results(const struct stub_rank *r, uint64_t n)
{
    return r->n_results >= n;
}

bool stub_has_heartbeats(const struct stub_rank *r, uint64_t n)
{
    return r->heartbeats >= n;
}

bool stub_beats_at_step(const struct stub_rank *r, uint64_t step)
{
    return r->heartbeat_step == step;
}

struct stub_rank stub_rank(struct stub *s, uint32_t rank)
{
    pthread_mutex_lock(&s->lock);
    struct stub_rank r = s->ranks[rank];
    pthread_mutex_unlock(&s->lock);
    return r;
}

struct stub_result stub_result(struct stub *s, uint32_t rank, unsigned index)
{
    pthread_mutex_lock(&s->lock);
    ck_assert_uint_lt(index, s->ranks[rank].n_results);
    struct stub_result r = s->ranks[rank].results[index];
    pthread_mutex_unlock(&s->lock);
    return r;
}

static struct rpc_call *take_call(struct stub *s, uint32_t rank)
{
    pthread_mutex_lock(&s->lock);
    struct rpc_call *call = s->ranks[rank].call ? rpc_call_ref(s->ranks[rank].call) : NULL;
    pthread_mutex_unlock(&s->lock);
    return call;
}

void stub_send(struct stub *s, uint32_t rank, Tandem__V1__CoordinatorMessage *m)
{
    struct status st = STATUS_INIT;
    struct rpc_call *call = take_call(s, rank);
    ck_assert_msg(call, "rank %u is not attached", rank);
    ck_assert_msg(rpc_call_send(call, &m->base, &st) == ST_OK, "%s", st.message);
    rpc_call_unref(call);
}

void stub_shutdown(struct stub *s, uint32_t ranks, bool relaunch)
{
    Tandem__V1__Shutdown d = TANDEM__V1__SHUTDOWN__INIT;
    d.reason = (char *)"the test says so";
    d.relaunch = relaunch;
    Tandem__V1__CoordinatorMessage m = TANDEM__V1__COORDINATOR_MESSAGE__INIT;
    m.epoch = s->epoch;
    m.body_case = TANDEM__V1__COORDINATOR_MESSAGE__BODY_SHUTDOWN;
    m.shutdown = &d;
    for (uint32_t r = 0; r < ranks; r++)
        stub_send(s, r, &m);
}

void stub_drop(struct stub *s, uint32_t rank)
{
    struct rpc_call *call = take_call(s, rank);
    if (!call)
        return;
    struct status st = {ST_UNAVAILABLE, "dropped by the test"};
    rpc_call_cancel(call, &st);
    rpc_call_unref(call);
}

/* ---- jobs ---- */

void job_make_dir(struct job *j)
{
    if (j->dir[0])
        return;
    snprintf(j->dir, sizeof j->dir, "/tmp/check_worker.XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(j->dir));
    snprintf(j->log, sizeof j->log, "%s/log", j->dir);
}

void job_start(struct job *j, unsigned np, const char *model, const char *coordinator, const char *const *extra)
{
    char count[16];
    snprintf(count, sizeof count, "%u", np);
    const char *argv[64];
    unsigned n = 0;
    if (np) {
        /* isolated: no ssh here; yield: the test, its server and the ranks share few cores */
        static const char *const mpirun[] = {
            "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", "--mca", "plm", "isolated"};
        argv[n++] = "mpirun";
        argv[n++] = "-np";
        argv[n++] = count;
        for (unsigned i = 0; i < sizeof mpirun / sizeof *mpirun; i++)
            argv[n++] = mpirun[i];
    }
    argv[n++] = TEST_WORKER;
    const char *const own[] = {"--model",     model, "--coordinator", coordinator, "--threads", "1",
                               "--kv-memory", "8M",  "--page-size",   "64K"};
    for (unsigned i = 0; i < sizeof own / sizeof *own; i++)
        argv[n++] = own[i];
    for (; extra && *extra; extra++)
        argv[n++] = *extra;
    argv[n] = NULL;

    job_make_dir(j);
#ifdef TANDEM_SANITIZED
    /* Open MPI is built without frame pointers: only the slow unwinder finds whose its leaks are, and so what to
     * suppress. */
    if (np) {
        const char *leaks = getenv("LSAN_OPTIONS");
        char with[1024];
        setenv("ASAN_OPTIONS",
               "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=0:fast_unwind_on_malloc=0", 1);
        /* It would crash on what an ended thread of Open MPI had in thread-local memory. */
        snprintf(with, sizeof with, "%s%suse_tls=0", leaks ? leaks : "", leaks ? ":" : "");
        if (!leaks || !strstr(leaks, "use_tls"))
            setenv("LSAN_OPTIONS", with, 1);
    }
#endif
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, 1, j->log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    posix_spawn_file_actions_adddup2(&files, 1, 2);
    int err = posix_spawnp(&j->pid, argv[0], &files, NULL, (char *const *)argv, environ);
    posix_spawn_file_actions_destroy(&files);
    ck_assert_msg(err == 0, "%s: %s", argv[0], strerror(err));
}

static void print_log(const struct job *j)
{
    FILE *f = fopen(j->log, "r");
    char line[1024];
    while (f && fgets(line, sizeof line, f))
        fprintf(stderr, "    | %s", line);
    if (f)
        fclose(f);
}

static bool reap(struct job *j, uint32_t timeout_ms, int *status)
{
    int64_t until_us = worker_now_us() + (int64_t)timeout_ms * 1000;
    for (;;) {
        pid_t got = waitpid(j->pid, status, WNOHANG);
        if (got == j->pid) {
            j->pid = 0;
            return true;
        }
        if (worker_now_us() > until_us)
            return false;
        usleep(5000);
    }
}

int job_wait(struct job *j, uint32_t timeout_ms)
{
    int status;
    if (!reap(j, timeout_ms, &status)) {
        print_log(j);
        ck_abort_msg("the job did not end within %u ms", timeout_ms);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

bool job_log_has(const struct job *j, const char *text)
{
    FILE *f = fopen(j->log, "r");
    char line[4096];
    bool found = false;
    while (f && !found && fgets(line, sizeof line, f))
        found = strstr(line, text) != NULL;
    if (f)
        fclose(f);
    return found;
}

void job_end(struct job *j)
{
    int status;
    if (j->pid > 0) {
        kill(j->pid, SIGTERM);
        if (!reap(j, 5000, &status)) {
            kill(j->pid, SIGKILL);
            reap(j, 5000, &status);
        }
    }
    if (getenv("CHECK_WORKER_LOG"))
        print_log(j);
    DIR *d = j->dir[0] ? opendir(j->dir) : NULL;
    for (struct dirent *e; d && (e = readdir(d));)
        if (e->d_name[0] != '.')
            unlinkat(dirfd(d), e->d_name, 0);
    if (d)
        closedir(d);
    if (j->dir[0])
        rmdir(j->dir);
    *j = (struct job){0};
}
