#include "tests/coord_proc.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int64_t proc_now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void die(const char *what)
{
    perror(what);
    abort();
}

void proc_start(struct proc *p, const char *binary, const char *model, const char *const *args)
{
    const char *argv[64];
    char fd_text[16], line[4096];
    int fds[2], n = 0;
    memset(p, 0, sizeof *p);
    snprintf(p->folder, sizeof p->folder, "/tmp/tandem-test-XXXXXX");
    if (!mkdtemp(p->folder))
        die("mkdtemp");
    snprintf(p->address, sizeof p->address, "unix:%s/public", p->folder);
    snprintf(p->control, sizeof p->control, "unix:%s/control", p->folder);
    if (pipe2(fds, O_CLOEXEC) < 0)
        die("pipe");
    snprintf(fd_text, sizeof fd_text, "%d", fds[1]);
    const char *usual[] = {binary,     "--model",         model,   "--listen",    p->address, "--control-listen",
                           p->control, "--supervisor-fd", fd_text, "--log-level", "warning"};
    for (size_t i = 0; i < sizeof usual / sizeof *usual; i++)
        argv[n++] = usual[i];
    for (; args && *args && n < 63; args++)
        argv[n++] = *args;
    argv[n] = NULL;
    pid_t parent = getpid();
    p->pid = fork();
    if (p->pid < 0)
        die("fork");
    if (p->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that crashes leaves nothing behind */
        if (getppid() != parent)
            _exit(127);
        fcntl(fds[1], F_SETFD, 0);
        execv(binary, (char *const *)argv);
        _exit(127);
    }
    close(fds[1]);
    p->events = fds[0];
    if (!proc_event(p, line, sizeof line, 20000) || strncmp(line, "listening ", 10) != 0) {
        fprintf(stderr, "%s did not start\n", binary);
        abort();
    }
    snprintf(p->listening, sizeof p->listening, "%.500s", line);
    if (rpc_channel_create(&p->ch, p->address, NULL) != ST_OK)
        abort();
}

bool proc_event(struct proc *p, char *line, size_t cap, int timeout_ms)
{
    int64_t until = proc_now_ms() + timeout_ms;
    for (;;) {
        char *end = memchr(p->line, '\n', p->line_len);
        if (end) {
            size_t n = (size_t)(end - p->line);
            snprintf(line, cap, "%.*s", (int)n, p->line);
            p->line_len -= n + 1;
            memmove(p->line, end + 1, p->line_len);
            if (strncmp(line, "attaching ", 10) == 0) {
                snprintf(p->attaching, sizeof p->attaching, "%s", line);
                continue;
            }
            if (strncmp(line, "loading ", 8) == 0) { /* of two groups that start at once, at either's time */
                p->loading++;
                continue;
            }
            return true;
        }
        int64_t left = until - proc_now_ms();
        struct pollfd fd = {.fd = p->events, .events = POLLIN};
        if (left <= 0 || poll(&fd, 1, (int)left) <= 0)
            return false;
        ssize_t k = read(p->events, p->line + p->line_len, sizeof p->line - p->line_len);
        if (k <= 0)
            return false;
        p->line_len += (size_t)k;
    }
}

int proc_end(struct proc *p, int signal_number, int timeout_ms)
{
    int status = 0, result = -1;
    int64_t until = proc_now_ms() + timeout_ms;
    rpc_channel_destroy(p->ch);
    p->ch = NULL;
    if (signal_number)
        kill(p->pid, signal_number);
    pid_t got;
    while ((got = waitpid(p->pid, &status, WNOHANG)) == 0 && proc_now_ms() < until)
        usleep(2000);
    if (got == p->pid) {
        result = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    } else {
        kill(p->pid, SIGKILL);
        waitpid(p->pid, &status, 0);
    }
    close(p->events);
    unlink(p->address + 5);
    unlink(p->control + 5);
    rmdir(p->folder);
    return result;
}

bool proc_wait_state(struct proc *p, Tandem__V1__ServerInfo__State state, int timeout_ms)
{
    int64_t until = proc_now_ms() + timeout_ms;
    Tandem__V1__GetServerInfoRequest req = TANDEM__V1__GET_SERVER_INFO_REQUEST__INIT;
    do {
        ProtobufCMessage *m = NULL;
        if (rpc_unary(p->ch, "/tandem.v1.Control/GetServerInfo", &req.base, &tandem__v1__server_info__descriptor, &m,
                      5000, NULL) == ST_OK) {
            bool hit = ((Tandem__V1__ServerInfo *)m)->state == state;
            protobuf_c_message_free_unpacked(m, NULL);
            if (hit)
                return true;
        }
        usleep(5000);
    } while (proc_now_ms() < until);
    return false;
}

double proc_cpu_seconds(const struct proc *p)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)p->pid);
    FILE *f = fopen(path, "r");
    if (!f)
        return 0;
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[n] = '\0';
    unsigned long user = 0, sys = 0;
    const char *rest = strrchr(text, ')'); /* the name may hold anything */
    if (!rest || sscanf(rest + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &sys) != 2)
        return 0;
    return (double)(user + sys) / (double)sysconf(_SC_CLK_TCK);
}

/* ---- clients ---- */

struct rpc_stream *proc_open(struct proc *p, const Tandem__V1__GenerateRequest *req, uint64_t deadline_ms)
{
    struct rpc_stream *s = NULL;
    if (rpc_stream_open(&s, p->ch, "/tandem.v1.Inference/Generate", deadline_ms, NULL) != ST_OK)
        abort();
    /* an early refusal shows in proc_read */
    if (rpc_stream_send(s, &req->base, 20000, NULL) == ST_OK)
        (void)!rpc_stream_half_close(s, 0, NULL);
    return s;
}

static void append(struct proc_reply *r, const Tandem__V1__GenerateResponse *m)
{
    r->n_messages++;
    if (m->request_id.len) {
        r->n_first++;
        snprintf(r->request_id, sizeof r->request_id, "%.*s", (int)m->request_id.len, (const char *)m->request_id.data);
    }
    r->ids = realloc(r->ids, (r->n_ids + m->n_token_ids + 1) * sizeof *r->ids);
    r->text = realloc(r->text, r->text_len + m->text.len + 1);
    if (!r->ids || !r->text)
        abort();
    if (m->n_token_ids)
        memcpy(r->ids + r->n_ids, m->token_ids, m->n_token_ids * sizeof *r->ids);
    if (m->text.len)
        memcpy(r->text + r->text_len, m->text.data, m->text.len);
    r->n_ids += m->n_token_ids;
    r->text_len += m->text.len;
    r->text[r->text_len] = '\0';
    if (!m->finish)
        return;
    r->finished = true;
    r->reason = m->finish->reason;
    r->has_stop = m->finish->stop_token_id_is_case != 0;
    r->stop_id = m->finish->stop_token_id;
    if (m->finish->usage) {
        r->prompt_tokens = m->finish->usage->prompt_tokens;
        r->completion_tokens = m->finish->usage->completion_tokens;
    }
    if (m->finish->timing) {
        r->replays = m->finish->timing->replays;
        r->queue_us = m->finish->timing->queue_us;
        r->prefill_us = m->finish->timing->prefill_us;
        r->decode_us = m->finish->timing->decode_us;
    }
}

bool proc_read(struct rpc_stream *s, struct proc_reply *r, uint32_t timeout_ms)
{
    const void *msg = NULL;
    size_t len = 0;
    struct status st = STATUS_INIT;
    r->code = rpc_stream_recv(s, &msg, &len, timeout_ms, NULL, &st);
    snprintf(r->message, sizeof r->message, "%s", st.message);
    if (r->code == ST_OK && msg) {
        Tandem__V1__GenerateResponse *m =
            (Tandem__V1__GenerateResponse *)rpc_unpack(&tandem__v1__generate_response__descriptor, msg, len);
        if (!m)
            abort();
        append(r, m);
        protobuf_c_message_free_unpacked(&m->base, NULL);
        return true;
    }
    const char *retry = rpc_stream_trailer(s, "retry-after-ms");
    r->retry_after_ms = retry ? (uint32_t)strtoul(retry, NULL, 10) : 0;
    return false;
}

void proc_drain(struct rpc_stream *s, struct proc_reply *r)
{
    while (proc_read(s, r, 30000))
        ;
}

void proc_reply_free(struct proc_reply *r)
{
    free(r->ids);
    free(r->text);
    memset(r, 0, sizeof *r);
}

void proc_generate(struct proc *p, const Tandem__V1__GenerateRequest *req, uint64_t deadline_ms, struct proc_reply *r)
{
    memset(r, 0, sizeof *r);
    struct rpc_stream *s = proc_open(p, req, deadline_ms);
    proc_drain(s, r);
    rpc_stream_close(s);
}
