/* cmd_probe.c - `tandem probe`: grpc.health.v1.Health/Check for scripts and exec probes. */
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "coordinator/cmd.h"

enum { OPT_LIVE = 1, OPT_SERVICE, OPT_WAIT, OPT_TIMEOUT, OPT_QUIET, OPT_JSON };

static const struct cli_option own_options[] = {
    {.name = "live",
     .id = OPT_LIVE,
     .help = "liveness: does the coordinator make progress? Without it, readiness: is a worker group attached and "
             "warm, and the server not draining?"},
    {.name = "service",
     .id = OPT_SERVICE,
     .arg = "NAME",
     .fallback = "tandem.v1.Inference",
     .help = "ask for this grpc.health.v1 service name instead"},
    {.name = "wait",
     .id = OPT_WAIT,
     .arg = "SECONDS",
     .fallback = "0",
     .help = "ask again until the server serves, this long at most"},
    {.name = "timeout", .id = OPT_TIMEOUT, .arg = "SECONDS", .fallback = "2", .help = "for one answer"},
    {.name = "quiet", .id = OPT_QUIET, .help = "print nothing, the exit status says it"},
    {.name = "json", .id = OPT_JSON, .help = "print the answer as one JSON object on standard output, also a bad one"},
    {0},
};

const struct cli_command cmd_probe_cli = {
    .name = "probe",
    .summary = "ask a server for its health; the exit status is the answer",
    .about = "Asks a server for its health and prints SERVING or what is wrong.",
    .tables = (const struct cli_option *const[]){cmd_connect_options, own_options, NULL},
    .exits = "0 serving, 3 not serving or not reachable, 2 wrong usage.",
    .examples = "  tandem probe --wait 60 && tandem generate \"Once upon a time\"\n",
};

struct probe_options {
    struct tandem_client_options server;
    const char *service;
    double wait_s;
    bool quiet, json;
    struct cli_args args;
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

static int take(struct probe_options *o, int opt)
{
    const char *text = o->args.text;
    double timeout_s;
    switch (opt) {
    case OPT_LIVE:
        o->service = "";
        break;
    case OPT_SERVICE:
        o->service = text;
        break;
    case OPT_WAIT:
        if (!cmd_parse_double(text, 0, 86400, &o->wait_s))
            return cmd_error(CMD_USAGE, o->args.where, "--wait %s: expected seconds, 0 to 86400", text);
        break;
    case OPT_TIMEOUT:
        if (!cmd_parse_double(text, 0.001, 3600, &timeout_s))
            return cmd_error(CMD_USAGE, o->args.where, "--timeout %s: expected seconds, 0.001 to 3600", text);
        o->server.timeout_ms = (uint32_t)(timeout_s * 1000);
        break;
    case OPT_QUIET:
        o->quiet = true;
        break;
    case OPT_JSON:
        o->json = true;
        break;
    default:
        cmd_connect_option(&o->server, opt, text);
    }
    return CMD_OK;
}

static int parse(int argc, char **argv, struct probe_options *o)
{
    int rc = cmd_read(&o->args, &cmd_probe_cli, argc, argv);
    if (rc)
        return rc;
    for (int opt; !rc && (opt = cli_next(&o->args)) != 0;)
        rc = take(o, opt);
    if (!rc && o->args.n_operands)
        rc = cmd_error(CMD_USAGE, "probe", "%s: takes no arguments, only options; see `tandem probe --help`",
                       o->args.operands[0]);
    return rc;
}

static int report(const struct probe_options *o, enum status_code code, const struct status *st)
{
    int rc = code == ST_OK ? CMD_OK : CMD_UNREACHABLE;
    if (o->quiet)
        return rc;
    if (o->json) {
        json_t *out = json_pack("{s:s, s:s, s:b, s:s}", "address", o->server.address, "service", o->service, "serving",
                                code == ST_OK, "code", code == ST_OK ? "OK" : status_name(code));
        if (code != ST_OK)
            json_object_set_new(out, "message", json_string(st->message));
        json_dumpf(out, stdout, JSON_COMPACT);
        putchar('\n');
        json_decref(out);
        return rc;
    }
    if (rc)
        return cmd_error(rc, "probe", "%s (%s)", st->message, status_name(code));
    puts("SERVING");
    return rc;
}

int cmd_probe(int argc, char **argv)
{
    struct probe_options o = {.server = {.address = CMD_DEFAULT_ADDRESS, .timeout_ms = 2000},
                              .service = "tandem.v1.Inference"};
    int rc = parse(argc, argv, &o);
    int64_t end_ms = now_ms() + (int64_t)(o.wait_s * 1000);
    struct status st = STATUS_INIT;
    while (!rc) {
        enum status_code code = check_once(&o, &st);
        /* Only these two pass with time; a wrong address or an unknown service does not. */
        bool may_change = code == ST_UNAVAILABLE || code == ST_DEADLINE_EXCEEDED;
        if (!may_change || now_ms() >= end_ms) {
            rc = report(&o, code, &st);
            break;
        }
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    }
    cli_free(&o.args);
    return rc < 0 ? CMD_OK : rc;
}
