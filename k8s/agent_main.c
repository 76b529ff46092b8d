/* tandem-agent: see agent.h. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "k8s/agent.h"

#define SECRET_FILE  "/etc/tandem/agent/secret"
#define EXIT_USAGE   2
#define EXIT_UNREADY 3

static const char help[] =
    "usage: tandem-agent serve [--listen ADDR] [--secret-file FILE] [--max-sessions N] [--drain-timeout S]\n"
    "                          [--allow PROGRAM]...\n"
    "       tandem-agent run [--port N] [--secret-file FILE] [--connect-timeout S] HOST COMMAND...\n"
    "       tandem-agent probe [--port N] [--secret-file FILE] [--connect-timeout S] [HOST]\n"
    "       tandem-agent hosts [--set NAME.SERVICE | --from FILE] [--size N] [--slots N] [--wait S] [--output FILE]\n"
    "\n"
    "Starts MPI's daemons in the other pods of a group: `serve` in each of them, `run` as mpirun's launch agent\n"
    "(OMPI_MCA_plm_rsh_agent=\"tandem-agent run\"). `hosts` writes a hostfile: of a LeaderWorkerSet (from "
    "LWS_LEADER_ADDRESS\n"
    "and LWS_GROUP_SIZE), a StatefulSet (--set) or an MPIJob (--from); with --wait not before the agents of all but "
    "this\n"
    "host answer.\n"
    "\n"
    "  --secret-file FILE    shared secrets, one a line; clients use the first (TANDEM_AGENT_SECRET_FILE,\n"
    "                        default " SECRET_FILE "); read again at every connection\n"
    "  --port N              of the agents (TANDEM_AGENT_PORT, default 50061)\n"
    "  --listen ADDR         default [::]:50061\n"
    "  --allow PROGRAM       may be started, again for more; default orted, and prted where there is one\n"
    "  --max-sessions N      connections at once, default 16\n"
    "  --drain-timeout S     on SIGTERM what was started gets so long to end by itself, default 0; a second one ends "
    "it\n"
    "  --connect-timeout S   for a pod that is not up yet (TANDEM_AGENT_CONNECT_TIMEOUT, default 60; probe: 1)\n"
    "  --slots N             ranks of each host, default 1\n"
    "\n"
    "TANDEM_AGENT_RESOLVE=NAME=ADDRESS:PORT,... stands in for name service. Exit status of `run`: the program's, 255 "
    "when\n"
    "it could not be started or the connection was lost. `probe`: 0 or 3. Wrong usage: 2.\n";

struct options {
    struct agent_server_config server;
    struct agent_client_config client;
    struct agent_hosts_config hosts;
    double connect_s, wait_s;
    int first; /* operand */
};

static bool number(const char *text, double max, double *out)
{
    char *end = NULL;
    double v = strtod(text, &end);
    if (text[0] < '0' || text[0] > '9' || *end || !(v >= 0 && v <= max))
        return false;
    *out = v;
    return true;
}

static enum status_code take(struct options *o, const char *name, const char *value, struct status *st)
{
    double v = 0;
    bool ok = true;
    if (strcmp(name, "--secret-file") == 0)
        o->server.secret_file = o->client.secret_file = value;
    else if (strcmp(name, "--listen") == 0)
        o->server.listen = value;
    else if (strcmp(name, "--allow") == 0)
        return agent_policy_allow(&o->server.policy, value, st);
    else if (strcmp(name, "--max-sessions") == 0 && (ok = number(value, AGENT_SESSIONS_MAX, &v) && v >= 1))
        o->server.max_sessions = (uint32_t)v;
    else if (strcmp(name, "--drain-timeout") == 0 && (ok = number(value, 86400, &v)))
        o->server.drain_ms = (uint32_t)(v * 1000);
    else if (strcmp(name, "--port") == 0 && (ok = number(value, 65535, &v) && v >= 1))
        o->client.port = (uint32_t)v;
    else if (strcmp(name, "--connect-timeout") == 0)
        ok = number(value, 86400, &o->connect_s);
    else if (strcmp(name, "--set") == 0)
        o->hosts.set = value;
    else if (strcmp(name, "--from") == 0)
        o->hosts.from = value;
    else if (strcmp(name, "--output") == 0)
        o->hosts.output = value;
    else if (strcmp(name, "--size") == 0 && (ok = number(value, AGENT_HOSTS_MAX, &v) && v >= 1))
        o->hosts.size = (uint32_t)v;
    else if (strcmp(name, "--slots") == 0 && (ok = number(value, 1024, &v) && v >= 1))
        o->hosts.slots = (uint32_t)v;
    else if (strcmp(name, "--wait") == 0)
        ok = number(value, 86400, &o->wait_s);
    else if (ok)
        return status_set(st, ST_INVALID_ARGUMENT, "unknown option %.100s; see tandem-agent --help", name);
    return ok ? ST_OK : status_set(st, ST_INVALID_ARGUMENT, "%s %.100s: not a number in its bounds", name, value);
}

static enum status_code take_environment(struct options *o, struct status *st)
{
    static const char *const names[][2] = {{"TANDEM_AGENT_SECRET_FILE", "--secret-file"},
                                           {"TANDEM_AGENT_PORT", "--port"},
                                           {"TANDEM_AGENT_CONNECT_TIMEOUT", "--connect-timeout"}};
    enum status_code rc = ST_OK;
    for (size_t i = 0; rc == ST_OK && i < sizeof names / sizeof *names; i++) {
        const char *value = getenv(names[i][0]);
        if (value && *value && (rc = take(o, names[i][1], value, st)) != ST_OK)
            return status_prefix(st, "%s", names[i][0]);
    }
    o->client.resolve = getenv("TANDEM_AGENT_RESOLVE");
    o->hosts.leader = getenv("LWS_LEADER_ADDRESS");
    o->hosts.group_size = getenv("LWS_GROUP_SIZE");
    return rc;
}

static enum status_code parse(struct options *o, int argc, char **argv, struct status *st)
{
    enum status_code rc = take_environment(o, st);
    bool run = strcmp(argv[1], "run") == 0;
    int i = 2;
    for (; rc == ST_OK && i < argc && argv[i][0] == '-' && !(run && strcmp(argv[i], "-o") == 0); i++) {
        char name[32] = "";
        const char *value = strchr(argv[i], '=');
        size_t len = strcspn(argv[i], "=");
        if (!value && i + 1 == argc)
            return status_set(st, ST_INVALID_ARGUMENT, "%.100s: expected a value", argv[i]);
        memcpy(name, argv[i], len < sizeof name ? len : sizeof name - 1);
        rc = take(o, name, value ? value + 1 : argv[++i], st);
    }
    o->first = i;
    return rc;
}

static enum status_code default_programs(struct agent_policy *p, struct status *st)
{
    if (p->n_programs > 0)
        return ST_OK;
    enum status_code orted = agent_policy_allow(p, "orted", st), prted = agent_policy_allow(p, "prted", NULL);
    return orted == ST_OK || prted == ST_OK ? ST_OK : orted;
}

/* Whether a host of the list is the pod that this runs in: mpirun starts what belongs there by itself. */
static bool is_here(const char *host)
{
    char own[256] = "";
    if (gethostname(own, sizeof own - 1))
        return false;
    size_t n = strcspn(own, ".");
    return n > 0 && n == strcspn(host, ".") && strncmp(own, host, n) == 0;
}

/* Asks the agents of all hosts but this one. In a LeaderWorkerSet this is the first, whatever its name service says. */
static enum status_code await_hosts(const struct options *o, const char *text, struct status *st)
{
    int64_t until = agent_now_ms() + (int64_t)(o->wait_s * 1000);
    bool leader = !o->hosts.set && !o->hosts.from;
    for (const char *line = text; *line; line = strchr(line, '\n') + 1) {
        char host[256];
        struct agent_client_config cfg = o->client;
        int64_t left = until - agent_now_ms();
        snprintf(host, sizeof host, "%.*s", (int)strcspn(line, " \n"), line);
        if ((leader && line == text) || is_here(host))
            continue;
        cfg.connect_ms = left > 0 ? (uint32_t)left : 0;
        enum status_code rc = agent_probe(&cfg, host, st);
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}

static enum status_code write_hosts(const struct options *o, struct status *st)
{
    char *text = NULL;
    enum status_code rc = agent_hosts(&o->hosts, &text, st);
    if (rc == ST_OK && o->wait_s > 0)
        rc = await_hosts(o, text, st);
    if (rc == ST_OK) {
        FILE *to = o->hosts.output ? fopen(o->hosts.output, "we") : stdout;
        if (!to || fputs(text, to) < 0 || (to == stdout ? fflush(to) : fclose(to)))
            rc = status_errno(st, ST_UNAVAILABLE, errno, "--output %.300s",
                              o->hosts.output ? o->hosts.output : "(standard output)");
    }
    free(text);
    return rc;
}

static int command(struct options *o, int argc, char **argv)
{
    struct status st = STATUS_INIT;
    const char *what = argv[1];
    bool probe = strcmp(what, "probe") == 0, serve = strcmp(what, "serve") == 0, hosts = strcmp(what, "hosts") == 0;
    if (!probe && !serve && !hosts && strcmp(what, "run") != 0) {
        fprintf(stderr, "tandem-agent: %s: expected serve, run, probe or hosts; see tandem-agent --help\n", what);
        return EXIT_USAGE;
    }
    o->connect_s = probe ? 1 : 60;
    enum status_code rc = parse(o, argc, argv, &st);
    if (rc == ST_OK && (serve || hosts) && o->first < argc)
        rc = status_set(&st, ST_INVALID_ARGUMENT, "%.100s: takes no arguments", argv[o->first]);
    if (rc == ST_OK && serve)
        rc = default_programs(&o->server.policy, &st);
    o->client.connect_ms = (uint32_t)(o->connect_s * 1000);
    if (rc != ST_OK) {
        fprintf(stderr, "tandem-agent: %s\n", st.message);
        return strcmp(what, "run") == 0 ? AGENT_EXIT_FAILED : EXIT_USAGE;
    }
    if (serve)
        return agent_serve(&o->server);
    if (!probe && !hosts)
        return agent_run(&o->client, argc - o->first, argv + o->first);
    rc = hosts ? write_hosts(o, &st) : agent_probe(&o->client, o->first < argc ? argv[o->first] : "localhost", &st);
    if (rc != ST_OK)
        fprintf(stderr, "tandem-agent: %s\n", st.message);
    return rc == ST_OK ? 0 : hosts ? 1 : EXIT_UNREADY;
}

int main(int argc, char **argv)
{
    struct options o = {.server = {.listen = "[::]:50061", .secret_file = SECRET_FILE, .max_sessions = 16},
                        .client = {.secret_file = SECRET_FILE, .port = AGENT_PORT},
                        .hosts = {.slots = 1}};
    if (argc < 2) {
        fputs(help, stderr);
        return EXIT_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        fputs(help, stdout);
        return 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("tandem-agent %s\n", TANDEM_VERSION);
        return 0;
    }
    int code = command(&o, argc, argv);
    agent_policy_fini(&o.server.policy);
    return code;
}
