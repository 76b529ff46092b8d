/* cmd_top.c - `tandem top`: what a server does, live in the terminal; or once, for scripts. */
#include <inttypes.h>
#include <jansson.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/cmd.h"

#define BAR 40

enum { OPT_INTERVAL = 1, OPT_ONCE, OPT_JSON };

static const struct cli_option own_options[] = {
    {.name = "interval", .id = OPT_INTERVAL, .arg = "SECONDS", .fallback = "1", .help = "between two looks"},
    {.name = "once", .id = OPT_ONCE, .help = "print one look and end (rates are over one interval)"},
    {.name = "json", .id = OPT_JSON, .help = "with --once: as one JSON object"},
    {0},
};

const struct cli_command cmd_top_cli = {
    .name = "top",
    .summary = "what a server does, live in the terminal",
    .about = "Requests, tokens a second, steps, KV memory, groups and ranks of a server. q or Ctrl-C ends.",
    .tables = (const struct cli_option *const[]){cmd_connect_options, own_options, NULL},
    .exits = "0 done, 2 wrong usage, 3 not reachable.",
    .examples = "  tandem top --address llm.example:50051\n  tandem top --once --json | jq .output_tokens_per_s\n",
};

struct look {
    Tandem__V1__ServerInfo *info;
    Tandem__V1__Load *load;
    double at_s;
};

struct top {
    struct tandem_client_options server;
    struct tandem_client *client;
    double interval_s;
    bool once, json;
    struct look now, before; /* before.load NULL: the first */
    struct cli_args args;
};

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static void drop(struct look *l)
{
    if (l->info)
        tandem_free(l->info);
    if (l->load)
        tandem_free(l->load);
    *l = (struct look){0};
}

static enum status_code take_look(struct top *t, struct status *st)
{
    struct look l = {.at_s = now_s()};
    enum status_code rc = tandem_client_server_info(t->client, &l.info, st);
    if (rc == ST_OK)
        rc = tandem_client_load(t->client, &l.load, st);
    if (rc != ST_OK) {
        drop(&l);
        return rc;
    }
    drop(&t->before);
    t->before = t->now;
    t->now = l;
    return ST_OK;
}

static const char *state_name(int state)
{
    static const char *const names[] = {"?", "STARTING", "READY", "RECOVERING", "DRAINING"};
    return state >= 0 && state < 5 ? names[state] : "?";
}

/* Growth of a counter a second; 0 when the server started anew in between. */
static double rate(const struct top *t, uint64_t now, uint64_t before)
{
    double s = t->now.at_s - t->before.at_s;
    return t->before.load && now >= before && s > 0 ? (double)(now - before) / s : 0;
}

static double rate_of(const struct top *t, size_t offset)
{
    const char *now = (const char *)t->now.load, *before = (const char *)t->before.load;
    uint64_t a, b = 0;
    memcpy(&a, now + offset, sizeof a);
    if (before)
        memcpy(&b, before + offset, sizeof b);
    return rate(t, a, b);
}
#define RATE(t, field) rate_of(t, offsetof(Tandem__V1__Load, field))

/* What the server says of itself, on one line: its texts come from elsewhere. */
static void put_text(const char *text)
{
    for (; text && *text; text++)
        putchar((unsigned char)*text < 0x20 || *text == 0x7f ? '?' : *text);
}

static void put_bar(const char *name, double used, double kept, double all)
{
    printf("%-10s [", name);
    for (int i = 0; i < BAR; i++) {
        double at = all * (i + 0.5) / BAR;
        putchar(all <= 0 ? ' ' : at < used ? '#' : at < used + kept ? '=' : '.');
    }
    printf("] ");
}

static void print_group(const struct top *t, const Tandem__V1__GroupInfo *g)
{
    const Tandem__V1__GroupLoad *l = NULL;
    for (size_t i = 0; i < t->now.load->n_groups; i++)
        if (strcmp(t->now.load->groups[i]->name, g->name) == 0)
            l = t->now.load->groups[i];
    printf("  ");
    put_text(g->name);
    printf(": %s, epoch %" PRIu64 ", %u of %u ranks ready", state_name((int)g->state), g->epoch, g->ready_ranks,
           g->tensor_parallel_size);
    if (l)
        printf("; %u running, %u waiting, %" PRIu64 "/%" PRIu64 " pages, step %.2f ms", l->running_requests,
               l->queued_requests, l->used_pages, l->total_pages, (double)l->last_step_us / 1e3);
    if (g->reason && *g->reason) {
        printf(" (");
        put_text(g->reason);
        putchar(')');
    }
    putchar('\n');
}

static void print_look(const struct top *t)
{
    const Tandem__V1__ServerInfo *s = t->now.info;
    const Tandem__V1__Load *l = t->now.load;
    printf("tandem %s at %s: %s, up %.0f s", s->version, t->server.address, state_name((int)s->state),
           (double)s->uptime_ms / 1e3);
    if (s->reason && *s->reason) {
        printf(" (");
        put_text(s->reason);
        putchar(')');
    }
    printf("\n\nrequests   %u running of %u, %u waiting (%" PRIu64 " tokens), %" PRIu64 " finished, %.1f/s\n",
           l->running_requests, l->total_slots, l->queued_requests, l->queued_tokens, l->finished_requests,
           RATE(t, finished_requests));
    printf("tokens/s   %.1f of answers, %.1f of prompts\n", RATE(t, generated_tokens), RATE(t, prompt_tokens));
    printf("steps      %.1f/s, the last took %.2f ms; %" PRIu64 " preemptions, %" PRIu64 " replays\n", RATE(t, steps),
           (double)l->last_step_us / 1e3, l->preemptions, l->replays);
    put_bar("slots", l->running_requests, l->kept_slots, l->total_slots);
    printf("%u used, %u kept for prefixes\n", l->running_requests, l->kept_slots);
    put_bar("KV pages", (double)l->used_pages, (double)l->kept_pages, (double)l->total_pages);
    printf("%" PRIu64 " used, %" PRIu64 " kept (=), %" PRIu64 " shared, of %" PRIu64 "\n\n", l->used_pages,
           l->kept_pages, l->shared_pages, l->total_pages);
    for (size_t i = 0; i < s->n_groups; i++)
        print_group(t, s->groups[i]);
    for (size_t i = 0; i < s->n_ranks; i++) {
        const Tandem__V1__RankInfo *r = s->ranks[i];
        printf("  rank %-3u step %-8" PRIu64 " heartbeat %4" PRIu64 " ms ago, pid %u on ", r->rank, r->last_step,
               r->heartbeat_age_ms, r->pid);
        put_text(r->host);
        printf(", ");
        put_text(r->device);
        if (s->n_groups > 1) {
            printf(", ");
            put_text(r->group);
        }
        putchar('\n');
    }
}

static json_t *text_or_null(const char *text)
{
    json_t *v = text ? json_string(text) : NULL;
    return v ? v : json_null();
}

static void print_json(const struct top *t)
{
    const Tandem__V1__ServerInfo *s = t->now.info;
    const Tandem__V1__Load *l = t->now.load;
    json_t *ranks = json_array(), *groups = json_array();
    for (size_t i = 0; i < s->n_ranks; i++)
        json_array_append_new(ranks,
                              json_pack("{s:i, s:o, s:o, s:I, s:I}", "rank", (int)s->ranks[i]->rank, "host",
                                        text_or_null(s->ranks[i]->host), "group", text_or_null(s->ranks[i]->group),
                                        "heartbeat_age_ms", (json_int_t)s->ranks[i]->heartbeat_age_ms, "last_step",
                                        (json_int_t)s->ranks[i]->last_step));
    for (size_t i = 0; i < s->n_groups; i++)
        json_array_append_new(groups,
                              json_pack("{s:o, s:s, s:I, s:i}", "name", text_or_null(s->groups[i]->name), "state",
                                        state_name((int)s->groups[i]->state), "epoch", (json_int_t)s->groups[i]->epoch,
                                        "ready_ranks", (int)s->groups[i]->ready_ranks));
    json_t *o = json_pack("{s:s, s:s, s:o, s:f, s:I, s:I, s:I, s:I, s:I}", "address", t->server.address, "state",
                          state_name((int)s->state), "version", text_or_null(s->version), "uptime_s",
                          (double)s->uptime_ms / 1e3, "running", (json_int_t)l->running_requests, "waiting",
                          (json_int_t)l->queued_requests, "waiting_tokens", (json_int_t)l->queued_tokens, "slots",
                          (json_int_t)l->total_slots, "finished", (json_int_t)l->finished_requests);
    json_t *more = json_pack(
        "{s:f, s:f, s:f, s:f, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o}", "requests_per_s", RATE(t, finished_requests),
        "output_tokens_per_s", RATE(t, generated_tokens), "prompt_tokens_per_s", RATE(t, prompt_tokens), "steps_per_s",
        RATE(t, steps), "last_step_us", (json_int_t)l->last_step_us, "pages_used", (json_int_t)l->used_pages,
        "pages_kept", (json_int_t)l->kept_pages, "pages_total", (json_int_t)l->total_pages, "preemptions",
        (json_int_t)l->preemptions, "replays", (json_int_t)l->replays, "groups", groups, "ranks", ranks);
    json_object_update(o, more);
    json_decref(more);
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

/* True when it is time to end: q, Ctrl-C, SIGTERM. */
static bool wait_for_end(const struct top *t, int signal_fd)
{
    struct pollfd p[2] = {{.fd = signal_fd, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
    double end_s = now_s() + t->interval_s;
    bool keys = !t->once && isatty(STDIN_FILENO);
    for (double left_s; (left_s = end_s - now_s()) > 0;) {
        char key;
        if (poll(p, keys ? 2 : 1, (int)(left_s * 1000) + 1) <= 0)
            continue;
        if (p[0].revents)
            return true;
        if (p[1].revents && (read(STDIN_FILENO, &key, 1) != 1 || key == 'q'))
            return true;
    }
    return false;
}

static int watch(struct top *t, int signal_fd)
{
    struct termios old, raw;
    struct status st = STATUS_INIT;
    bool screen = isatty(STDOUT_FILENO), keys = isatty(STDIN_FILENO) && tcgetattr(STDIN_FILENO, &old) == 0;
    if (keys) {
        raw = old;
        raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
        tcsetattr(STDIN_FILENO, TCSANOW, &raw);
    }
    if (screen)
        fputs("\033[?1049h\033[?25l", stdout); /* another screen, no cursor */
    do {
        enum status_code rc = take_look(t, &st);
        if (screen)
            fputs("\033[H\033[2J", stdout);
        if (rc == ST_OK)
            print_look(t);
        else /* it may come back */
            printf("%s: %s\n", t->server.address, st.message);
        fflush(stdout);
    } while (!ferror(stdout) && !wait_for_end(t, signal_fd));
    if (screen)
        fputs("\033[?25h\033[?1049l", stdout);
    if (keys)
        tcsetattr(STDIN_FILENO, TCSANOW, &old);
    return CMD_OK;
}

static int once(struct top *t, int signal_fd)
{
    struct status st = STATUS_INIT;
    for (int i = 0; i < 2; i++) {
        if (i && wait_for_end(t, signal_fd))
            return CMD_OK;
        if (take_look(t, &st) != ST_OK)
            return cmd_failed(CMD_UNREACHABLE, "top", t->json, &st);
    }
    if (t->json)
        print_json(t);
    else
        print_look(t);
    return CMD_OK;
}

static int parse(int argc, char **argv, struct top *t)
{
    int rc = cmd_read(&t->args, &cmd_top_cli, argc, argv);
    for (int opt; !rc && (opt = cli_next(&t->args)) != 0;) {
        if (opt == OPT_ONCE)
            t->once = true;
        else if (opt == OPT_JSON)
            t->json = true;
        else if (opt != OPT_INTERVAL)
            cmd_connect_option(&t->server, opt, t->args.text);
        else if (!cmd_parse_double(t->args.text, 0.05, 3600, &t->interval_s))
            rc = cmd_error(CMD_USAGE, t->args.where, "%s: expected seconds, 0.05 to 3600", t->args.text);
    }
    if (!rc && t->args.n_operands)
        rc = cmd_error(CMD_USAGE, "top", "%s: takes no arguments, only options", t->args.operands[0]);
    if (!rc && t->json && !t->once)
        rc = cmd_error(CMD_USAGE, "top", "--json goes with --once");
    return rc;
}

int cmd_top(int argc, char **argv)
{
    struct top t = {.server = {.address = CMD_DEFAULT_ADDRESS, .timeout_ms = 2000}, .interval_s = 1};
    struct status st = STATUS_INIT;
    sigset_t set;
    int rc = parse(argc, argv, &t);
    if (!rc) {
        sigemptyset(&set);
        sigaddset(&set, SIGINT);
        sigaddset(&set, SIGTERM);
        sigprocmask(SIG_BLOCK, &set, NULL);
        int signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
        if (tandem_client_open(&t.client, &t.server, &st) != ST_OK)
            rc = cmd_error(CMD_USAGE, "top", "%s", st.message);
        else
            rc = t.once ? once(&t, signal_fd) : watch(&t, signal_fd);
        tandem_client_close(t.client);
        close(signal_fd);
    }
    drop(&t.now);
    drop(&t.before);
    cli_free(&t.args);
    return rc < 0 ? CMD_OK : rc;
}
