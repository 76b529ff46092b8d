/* cmd_probe.c - `tandem probe`: grpc.health.v1.Health/Check for scripts and exec probes. */
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "coordinator/cmd.h"

static const char help[] =
    "usage: tandem probe [--address ADDR] [--live] [--wait SECONDS]\n\n"
    "Asks a server for its health and prints SERVING or what is wrong.\n\n" CMD_CONNECT_HELP
    "  --live                liveness: does the coordinator make progress? Without it, readiness: is a worker\n"
    "                        group attached and warm, and the server not draining?\n"
    "  --service NAME        ask for this grpc.health.v1 service name instead\n"
    "  --wait SECONDS        ask again until the server serves, this long at most (default 0: ask once)\n"
    "  --timeout SECONDS     for one answer (default 2)\n"
    "  --quiet               print nothing, the exit status says it\n\n"
    "Exit status: 0 serving, 3 not serving or not reachable, 2 wrong usage.\n\n"
    "  tandem probe --wait 60 && tandem generate \"Once upon a time\"\n";

struct probe_options {
    struct tandem_client_options server;
    const char *service;
    double wait_s;
    bool quiet;
};

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* ST_OK only when the service is SERVING. */
static enum status_code check_once(const struct probe_options *o, struct status *st)
{
    struct tandem_client *client = NULL; /* one for each try: a connection that failed waits before it tries again */
    bool serving = false;
    enum status_code rc = tandem_client_open(&client, &o->server, st);
    if (rc != ST_OK)
        return rc;
    rc = tandem_client_health(client, o->service, &serving, st);
    tandem_client_close(client);
    if (rc == ST_OK && !serving)
        rc = status_set(st, ST_UNAVAILABLE, "NOT_SERVING: \"%s\" at %s", o->service, o->server.address);
    return rc;
}

static int parse(int argc, char **argv, struct probe_options *o)
{
    static const struct option options[] = {
        CMD_CONNECT_OPTIONS,
        {"live", no_argument, 0, 'l'},
        {"service", required_argument, 0, 's'},
        {"wait", required_argument, 0, 'w'},
        {"timeout", required_argument, 0, 't'},
        {"quiet", no_argument, 0, 'q'},
        {"help", no_argument, 0, 'h'},
        {0},
    };
    double timeout_s;
    for (int c; (c = getopt_long(argc, argv, "+:a:h", options, NULL)) != -1;) {
        if (cmd_connect_option(&o->server, c))
            continue;
        switch (c) {
        case 'l':
            o->service = "";
            break;
        case 's':
            o->service = optarg;
            break;
        case 'w':
            if (!cmd_parse_double(optarg, 0, 86400, &o->wait_s))
                return cmd_error(CMD_USAGE, "probe", "--wait %s: expected seconds, 0 to 86400", optarg);
            break;
        case 't':
            if (!cmd_parse_double(optarg, 0.001, 3600, &timeout_s))
                return cmd_error(CMD_USAGE, "probe", "--timeout %s: expected seconds, 0.001 to 3600", optarg);
            o->server.timeout_ms = (uint32_t)(timeout_s * 1000);
            break;
        case 'q':
            o->quiet = true;
            break;
        case 'h':
            fputs(help, stdout);
            return -1;
        default:
            return cmd_bad_option("probe", argv, c);
        }
    }
    if (optind < argc)
        return cmd_error(CMD_USAGE, "probe", "%s: takes no arguments, only options; see `tandem probe --help`",
                         argv[optind]);
    return CMD_OK;
}

int cmd_probe(int argc, char **argv)
{
    struct probe_options o = {.server = {.address = CMD_DEFAULT_ADDRESS, .timeout_ms = 2000},
                              .service = "tandem.v1.Inference"};
    int rc = parse(argc, argv, &o);
    if (rc)
        return rc < 0 ? CMD_OK : rc;
    int64_t end_ms = now_ms() + (int64_t)(o.wait_s * 1000);
    struct status st = STATUS_INIT;
    for (;;) {
        enum status_code code = check_once(&o, &st);
        if (code == ST_OK) {
            if (!o.quiet)
                puts("SERVING");
            return CMD_OK;
        }
        /* Only these two pass with time; a wrong address or an unknown service does not. */
        bool may_change = code == ST_UNAVAILABLE || code == ST_DEADLINE_EXCEEDED;
        if (!may_change || now_ms() >= end_ms)
            break;
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    }
    if (o.quiet)
        return CMD_UNREACHABLE;
    return cmd_error(CMD_UNREACHABLE, "probe", "%s (%s)", st.message, status_name(st.code));
}
