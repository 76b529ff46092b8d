/* tandem-coordinator: start, signals, end. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/coord_http.h"
#include "coordinator/coord_internal.h"
#include "coordinator/flight.h"

#define ALIVE_CHECK_MS    500
#define FAREWELL_S        2
#define STOP_S            20  /* for the whole of stop() */
#define SHUTDOWN_GRACE_MS 500 /* for calls that end anyway; the drain was before */

/* Where a server really listens: the port that was asked for may be 0. */
static void bound_address(char *out, size_t cap, const char *asked, uint16_t port)
{
    const char *colon = strrchr(asked, ':');
    if (strncmp(asked, "unix:", 5) == 0 || !colon || port == 0)
        snprintf(out, cap, "%s", asked);
    else
        snprintf(out, cap, "%.*s:%u", (int)(colon - asked), asked, port);
}

static void announce(const struct coord *c)
{
    char list[COORD_MAX_LISTEN * 128] = "", control[208], http[208] = "";
    size_t n = 0;
    for (size_t i = 0; i < c->opt.n_listen; i++) {
        char one[128];
        bound_address(one, sizeof one, c->opt.listen[i], rpc_server_port(c->public_server, i));
        int k = snprintf(list + n, sizeof list - n, "%s%s", i ? "," : "", one);
        n += k > 0 ? (size_t)k : 0;
        if (n >= sizeof list)
            break;
    }
    bound_address(control, sizeof control, c->opt.control.address, rpc_server_port(c->control_server, 0));
    log_line(&c->log, LOG_INFO, "serving \"%s\" on %s; ranks attach to %s", c->opt.served_name, list, control);
    if (!tok_has_text(c->tok))
        log_line(&c->log, LOG_INFO, "no tokenizer: prompts are token ids, answers have no text; no chats are served");
    else if (chat_status(c->chat)->code != ST_OK)
        log_line(&c->log, LOG_INFO, "no chats are served: %s", chat_status(c->chat)->message);
    else if (chat_lacks(c->chat))
        log_line(&c->log, LOG_INFO, "chats that need this are not served: chat template: %s", chat_lacks(c->chat));
    listeners_warn(&c->opt, &c->log);
    if (c->http) {
        bound_address(http, sizeof http, c->opt.http.address, http_port(c->http));
        log_line(&c->log, LOG_INFO, "OpenAI's API on http://%s/v1", http);
    }
    supervisor_line(c, "listening public=%s control=%s%s%s", list, control, http[0] ? " http=" : "", http);
}

/* From a thread of the rpc library. */
static void on_report(void *ctx, bool failed, const char *message)
{
    const struct coord *c = ctx;
    log_line(&c->log, failed ? LOG_ERROR : LOG_INFO, "%s", message);
}

static struct rpc_server_config public_config(struct coord *c, const struct rpc_method *methods,
                                              struct rpc_listen_security *security)
{
    const struct coord_options *o = &c->opt;
    for (size_t i = 0; i < o->n_listen; i++)
        security[i] = o->listeners[i].security;
    return (struct rpc_server_config){.methods = methods,
                                      .n_methods = COORD_PUBLIC_METHODS + RPC_HEALTH_METHODS +
                                                   (c->reflection ? RPC_REFLECTION_METHODS : 0),
                                      .listen = o->listen,
                                      .n_listen = o->n_listen,
                                      .security = security,
                                      .on_report = on_report,
                                      .report_ctx = c,
                                      .max_message_bytes = o->max_message_bytes,
                                      .keepalive_ms = o->keepalive_ms,
                                      .keepalive_timeout_ms = o->keepalive_timeout_ms,
                                      .min_ping_interval_ms = o->min_ping_interval_ms,
                                      .max_connection_idle_ms = o->max_connection_idle_ms,
                                      .max_connection_age_ms = o->max_connection_age_ms,
                                      .max_connection_age_grace_ms = o->max_connection_age_grace_ms};
}

static enum status_code start_servers(struct coord *c, struct rpc_method *public_methods,
                                      struct rpc_method *control_methods, struct status *st)
{
    service_methods(c, public_methods);
    rpc_health_methods(c->health, public_methods + COORD_PUBLIC_METHODS);
    if (c->reflection)
        rpc_reflection_methods(c->reflection, public_methods + COORD_PUBLIC_METHODS + RPC_HEALTH_METHODS);
    conn_methods(c, control_methods);
    struct rpc_server_config cfg = {.methods = control_methods,
                                    .n_methods = COORD_CONTROL_METHODS,
                                    .listen = (const char *const[]){c->opt.control.address},
                                    .n_listen = 1, /* messages of ranks are not clients': no option bounds them */
                                    .security = &c->opt.control.security,
                                    .on_report = on_report,
                                    .report_ctx = c,
                                    .max_streams = COORD_MAX_CONNS};
    mode_t old = umask(0077); /* a control socket is for this user */
    enum status_code rc = rpc_server_start(&c->control_server, &cfg, st);
    umask(old);
    if (rc != ST_OK)
        return status_prefix(st, "--control-listen");
    struct rpc_listen_security security[COORD_MAX_LISTEN];
    cfg = public_config(c, public_methods, security);
    rc = rpc_server_start(&c->public_server, &cfg, st);
    if (rc != ST_OK)
        return status_prefix(st, "--listen");
    return c->opt.http_listen ? http_start(&c->http, c, st) : ST_OK;
}

/* Liveness is a verdict on the engine from outside of it. */
static void check_alive(struct coord *c)
{
    int64_t age_us = coord_now_us() - atomic_load_explicit(&c->alive_us, memory_order_relaxed);
    bool alive = age_us < (int64_t)COORD_ALIVE_MS * 1000;
    if (!alive)
        log_line(&c->log, LOG_ERROR, "the engine has not turned for %.1f s", (double)age_us / 1e6);
    rpc_health_set(c->health, "", alive);
    rpc_health_set(c->health, "liveness", alive);
}

/* Until the engine says that it has stopped serving. The first signal drains, the second ends the drain. */
static void wait_for_end(struct coord *c, int signal_fd)
{
    bool stopping = false;
    for (;;) {
        struct pollfd fds[2] = {{.fd = signal_fd, .events = POLLIN}, {.fd = c->done_fd, .events = POLLIN}};
        if (poll(fds, 2, ALIVE_CHECK_MS) < 0 && errno != EINTR)
            return;
        if (fds[1].revents)
            return;
        struct signalfd_siginfo info;
        if ((fds[0].revents & POLLIN) && read(signal_fd, &info, sizeof info) == (ssize_t)sizeof info) {
            mailbox_post(&c->box, &c->stop_mail, stopping ? STOP_NOW : STOP_DRAIN, NULL);
            stopping = true;
        }
        check_alive(c);
    }
}

static enum status_code block_signals(int *fd, struct status *st)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);               /* a write over the limit of a file's size is an error like any other */
    pthread_sigmask(SIG_BLOCK, &set, NULL); /* before the first thread of any library */
    *fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return *fd >= 0 ? ST_OK : status_errno(st, ST_INTERNAL, errno, "signalfd");
}

static enum status_code start(struct coord *c, struct rpc_method *public_methods, struct rpc_method *control_methods,
                              struct status *st)
{
    c->started_us = coord_now_us();
    c->started_s = time(NULL);
    c->log.level = c->opt.log_level;
    c->log.json = c->opt.log_json;
    c->stop_mail.kind = MAIL_STOP;
    atomic_init(&c->alive_us, c->started_us);
    atomic_init(&c->max_live, c->opt.max_queued);
    pthread_mutex_init(&c->pub_mu, NULL);
    c->done_fd = eventfd(0, EFD_CLOEXEC);
    if (c->done_fd < 0)
        return status_errno(st, ST_INTERNAL, errno, "eventfd");
    enum status_code rc = c->opt.no_tokenizer ? tok_create_none(&c->tok, st) : tok_load(&c->tok, c->opt.model_dir, st);
    if (rc != ST_OK)
        return status_prefix(st, "--model");
    if (chat_load(&c->chat, c->opt.model_dir, c->opt.chat_template, st) != ST_OK)
        return status_prefix(st, c->opt.chat_template ? "--chat-template" : "--model");
    if (c->opt.flight_path &&
        flight_open(&c->flight, c->opt.flight_path, c->opt.flight_bytes, c->started_us, st) != ST_OK)
        return status_prefix(st, "--flight-recorder");
    if (c->opt.spans_path && (rc = span_file_open(c, st)) != ST_OK)
        return rc;
    if (c->opt.http_listen && (rc = live_create(&c->live, st)) != ST_OK)
        return rc;
    if ((rc = mailbox_init(&c->box, st)) != ST_OK || (rc = rpc_health_create(&c->health, st)) != ST_OK ||
        (rc = engine_start(c, st)) != ST_OK || (rc = intake_start(c, st)) != ST_OK)
        return rc;
    check_alive(c);
    if (c->opt.reflection)
        rc = rpc_reflection_create(&c->reflection, rpc_public_descriptors, rpc_public_descriptors_len, st);
    if (rc != ST_OK)
        return rc;
    return start_servers(c, public_methods, control_methods, st);
}

static void leave(int signal_number)
{
    (void)signal_number;
    _exit(0);
}

static void leave_late(int signal_number)
{
    static const char text[] = "tandem-coordinator: stopped in the middle: the shutdown took too long\n";
    (void)signal_number;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0) /* nobody is left to tell */
        _exit(1);
    _exit(1);
}

/* Everything that matters is done here; what is left is to free memory. The gRPC core takes up to 10 s for that when a
 * connection's peer does not read (it joins a thread of its own that sleeps in epoll). */
static void bound_farewell(void)
{
    signal(SIGALRM, leave);
    alarm(FAREWELL_S);
}

static void stop(struct coord *c, bool served)
{
    /* A prompt that is being tokenized and the gRPC core are waited for below, and neither promises an end. */
    signal(SIGALRM, leave_late);
    alarm(STOP_S);
    if (c->health)
        rpc_health_close_watchers(c->health); /* they would hold up the shutdown */
    if (c->public_server)
        rpc_server_shutdown(c->public_server, SHUTDOWN_GRACE_MS);
    if (c->control_server)
        rpc_server_shutdown(c->control_server, 0);
    http_stop(c->http, SHUTDOWN_GRACE_MS);
    if (c->intake.n_threads)
        intake_stop(c);
    engine_stop(c); /* last: it takes the mail that the others left */
    coord_journal_close(c);
    flight_close(c->flight, coord_now_us());
    if (served)
        bound_farewell();
    rpc_server_destroy(c->public_server);
    rpc_server_destroy(c->control_server);
    rpc_health_destroy(c->health);
    rpc_reflection_destroy(c->reflection);
    live_destroy(c->live);
    if (c->spans_fd >= 0)
        close(c->spans_fd);
    chat_free(c->chat);
    tok_free(c->tok);
    if (c->engine.coord)
        mailbox_fini(&c->box);
    if (c->done_fd >= 0)
        close(c->done_fd);
    alarm(0);
}

int main(int argc, char **argv)
{
    struct status st = STATUS_INIT;
    struct rpc_method public_methods[COORD_PUBLIC_METHODS + RPC_HEALTH_METHODS + RPC_REFLECTION_METHODS];
    struct rpc_method control_methods[COORD_CONTROL_METHODS];
    int signal_fd = -1, exit_code = 0;
    bool done = false;
    struct coord *c = calloc(1, sizeof *c);
    if (!c) {
        fprintf(stderr, "tandem-coordinator: out of memory\n");
        return 1;
    }
    c->done_fd = c->spans_fd = -1;
    enum status_code rc = options_parse(&c->opt, argc, argv, &done, &st);
    if (rc != ST_OK || done) {
        if (rc != ST_OK) {
            fprintf(stderr, "tandem-coordinator: %s\n", st.message);
            supervisor_line(c, "refused reason=%s", st.message);
        }
        free(c);
        return rc == ST_OK ? 0 : 2;
    }
    rc = block_signals(&signal_fd, &st);
    if (rc == ST_OK)
        rc = start(c, public_methods, control_methods, &st);
    if (rc == ST_OK) {
        announce(c);
        wait_for_end(c, signal_fd);
    } else {
        fprintf(stderr, "tandem-coordinator: %s\n", st.message);
        supervisor_line(c, "refused reason=%s", st.message);
        exit_code = 1;
    }
    stop(c, exit_code == 0);
    if (exit_code == 0)
        log_line(&c->log, LOG_INFO, "stopped");
    if (signal_fd >= 0)
        close(signal_fd);
    free(c);
    return exit_code;
}
