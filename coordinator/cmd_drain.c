/* cmd_drain.c - `tandem drain`: a server, one worker group, or one group after the other goes without an error at a client. */
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "coordinator/cmd.h"

enum { OPT_GROUP = 1, OPT_RESTART, OPT_ROLLING, OPT_TIMEOUT, OPT_WAIT, OPT_JSON };

#define CALL_MS 10000 /* of calls that only ask */
#define LOOK_MS 100   /* between two looks at a group that is to come back */

static const struct cli_option own_options[] = {
    {.name = "group",
     .id = OPT_GROUP,
     .arg = "NAME",
     .help = "only this worker group: its requests go on in the others, then its ranks leave (default: the server)"},
    {.name = "restart", .id = OPT_RESTART, .help = "with --group: its ranks are started again by whoever watches them"},
    {.name = "rolling",
     .id = OPT_ROLLING,
     .help = "restart every group, one after the other, each when the one before serves again"},
    {.name = "timeout",
     .id = OPT_TIMEOUT,
     .arg = "SECONDS",
     .fallback = "30",
     .help = "what runs gets so long to end by itself; in a group it goes on elsewhere then"},
    {.name = "wait",
     .id = OPT_WAIT,
     .arg = "SECONDS",
     .fallback = "600",
     .help = "with --rolling: how long a group may take to come back"},
    {.name = "json",
     .id = OPT_JSON,
     .help =
         "print one JSON object a line: group and done (drained, with moved, or serves), or server and done; an error "
         "as {\"error\": {code, message}}"},
    {0},
};

const struct cli_command cmd_drain_cli = {
    .name = "drain",
    .summary = "empty a server or a worker group, or restart all groups one by one",
    .about =
        "Stops admission and waits for what runs. A drained server takes no requests any more and is meant to be "
        "stopped.\nOf a group nothing is lost: what waits or runs there goes on in other groups, or in the same one "
        "when it is back.",
    .tables = (const struct cli_option *const[]){cmd_connect_options, own_options, NULL},
    .exits = "0 done, 1 refused, or requests of the server are left, 2 wrong usage, 3 not reachable.",
    .examples = "  tandem drain --group g1 --restart      # a new binary, a new driver\n"
                "  tandem drain --rolling\n"
                "  tandem drain --timeout 60              # before the server is stopped\n",
};

struct drain_options {
    struct tandem_client_options server;
    const char *group;
    bool restart, rolling, json;
    double timeout_s, wait_s;
    struct cli_args args;
};

static int take(struct drain_options *o, int opt)
{
    const char *text = o->args.text;
    switch (opt) {
    case OPT_GROUP:
        if (!*text)
            return cmd_error(CMD_USAGE, o->args.where, "--group: empty, expected the name of a group");
        o->group = text;
        break;
    case OPT_RESTART:
        o->restart = true;
        break;
    case OPT_ROLLING:
        o->rolling = true;
        break;
    case OPT_TIMEOUT:
        if (!cmd_parse_double(text, 0, 86400, &o->timeout_s))
            return cmd_error(CMD_USAGE, o->args.where, "--timeout %s: expected seconds, 0 to 86400", text);
        break;
    case OPT_WAIT:
        if (!cmd_parse_double(text, 0, 86400, &o->wait_s))
            return cmd_error(CMD_USAGE, o->args.where, "--wait %s: expected seconds, 0 to 86400", text);
        break;
    case OPT_JSON:
        o->json = true;
        break;
    default:
        cmd_connect_option(&o->server, opt, text);
    }
    return CMD_OK;
}

static int parse(int argc, char **argv, struct drain_options *o)
{
    int rc = cmd_read(&o->args, &cmd_drain_cli, argc, argv);
    if (rc)
        return rc;
    for (int opt; !rc && (opt = cli_next(&o->args)) != 0;)
        rc = take(o, opt);
    if (!rc && o->args.n_operands)
        rc = cmd_error(CMD_USAGE, "drain", "%s: takes no arguments, only options; see `tandem drain --help`",
                       o->args.operands[0]);
    if (!rc && o->rolling && (o->group || o->restart))
        rc = cmd_error(CMD_USAGE, "drain", "--rolling: restarts all groups, expected neither --group nor --restart");
    if (!rc && o->restart && !o->group)
        rc = cmd_error(CMD_USAGE, "drain", "--restart: expected --group NAME with it");
    return rc;
}

static int failed(const struct drain_options *o, const struct status *st)
{
    bool unreachable = st->code == ST_UNAVAILABLE || st->code == ST_DEADLINE_EXCEEDED;
    return cmd_failed(unreachable ? CMD_UNREACHABLE : CMD_FAILED, "drain", o->json, st);
}

/* One line that a step is done; facts: of the line in JSON, taken over. */
static void say(const struct drain_options *o, json_t *facts, const char *text)
{
    if (o->json)
        json_dumpf(facts, stdout, JSON_COMPACT);
    puts(o->json ? "" : text);
    fflush(stdout);
    json_decref(facts);
}

static int drain_group(const struct drain_options *o, struct tandem_client *c, const char *name, bool restart)
{
    struct status st = STATUS_INIT;
    uint32_t moved = 0;
    if (tandem_client_drain(c, name, restart, (uint64_t)(o->timeout_s * 1000), &moved, &st) != ST_OK)
        return failed(o, &st);
    char text[192];
    snprintf(text, sizeof text, "%s: drained, %u running request%s went on elsewhere", name, moved,
             moved == 1 ? "" : "s");
    say(o, json_pack("{s:o, s:s, s:I}", "group", cmd_json_string(name), "done", "drained", "moved", (json_int_t)moved),
        text);
    return CMD_OK;
}

static int drain_server(const struct drain_options *o, struct tandem_client *c)
{
    struct status st = STATUS_INIT;
    uint32_t left = 0;
    if (tandem_client_drain(c, NULL, false, (uint64_t)(o->timeout_s * 1000), &left, &st) != ST_OK)
        return failed(o, &st);
    if (left) {
        status_set(&st, ST_DEADLINE_EXCEEDED, "%u requests are left after %.1f s", left, o->timeout_s);
        return cmd_failed(CMD_FAILED, "drain", o->json, &st);
    }
    say(o, json_pack("{s:o, s:s}", "server", cmd_json_string(o->server.address), "done", "drained"), "drained");
    return CMD_OK;
}

/* ---- one after the other ---- */

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* False: it does not serve. */
static bool serves(const Tandem__V1__ServerInfo *info, const char *name, uint64_t *epoch)
{
    for (size_t i = 0; i < info->n_groups; i++)
        if (strcmp(info->groups[i]->name, name) == 0 &&
            info->groups[i]->state == TANDEM__V1__SERVER_INFO__STATE__READY) {
            *epoch = info->groups[i]->epoch;
            return true;
        }
    return false;
}

/* Until a later epoch of the group serves. */
static int wait_for_group(const struct drain_options *o, struct tandem_client *c, const char *name, uint64_t before)
{
    int64_t end_ms = now_ms() + (int64_t)(o->wait_s * 1000);
    do {
        struct status st = STATUS_INIT;
        Tandem__V1__ServerInfo *info = NULL;
        uint64_t epoch = 0;
        if (tandem_client_server_info(c, &info, &st) != ST_OK)
            return failed(o, &st);
        bool back = serves(info, name, &epoch) && epoch > before;
        tandem_free(info);
        if (back) {
            char text[96];
            snprintf(text, sizeof text, "%s: serves again", name);
            say(o, json_pack("{s:o, s:s}", "group", cmd_json_string(name), "done", "serves"), text);
            return CMD_OK;
        }
        nanosleep(&(struct timespec){.tv_nsec = LOOK_MS * 1000000L}, NULL);
    } while (now_ms() < end_ms);
    struct status late = STATUS_INIT;
    status_set(&late, ST_DEADLINE_EXCEEDED, "%s: not back within %.0f s; the groups behind it were left as they are",
               name, o->wait_s);
    return cmd_failed(CMD_FAILED, "drain", o->json, &late);
}

static int roll(const struct drain_options *o, struct tandem_client *c)
{
    struct status st = STATUS_INIT;
    Tandem__V1__ServerInfo *info = NULL;
    if (tandem_client_server_info(c, &info, &st) != ST_OK)
        return failed(o, &st);
    int rc = CMD_OK;
    unsigned n = 0;
    for (size_t i = 0; !rc && i < info->n_groups; i++) {
        const char *name = info->groups[i]->name;
        uint64_t epoch;
        if (!serves(info, name, &epoch)) /* it is on its way, or stays away */
            continue;
        n++;
        rc = drain_group(o, c, name, true);
        if (!rc)
            rc = wait_for_group(o, c, name, epoch);
    }
    tandem_free(info);
    if (rc || n)
        return rc;
    status_set(&st, ST_FAILED_PRECONDITION, "no worker group serves");
    return cmd_failed(CMD_FAILED, "drain", o->json, &st);
}

int cmd_drain(int argc, char **argv)
{
    struct drain_options o = {
        .server = {.address = CMD_DEFAULT_ADDRESS, .timeout_ms = CALL_MS}, .timeout_s = 30, .wait_s = 600};
    int rc = parse(argc, argv, &o);
    if (!rc) {
        struct tandem_client *c = NULL;
        struct status st = STATUS_INIT;
        if (tandem_client_open(&c, &o.server, &st) != ST_OK)
            rc = failed(&o, &st);
        else if (o.rolling)
            rc = roll(&o, c);
        else if (o.group)
            rc = drain_group(&o, c, o.group, o.restart);
        else
            rc = drain_server(&o, c);
        tandem_client_close(c);
    }
    cli_free(&o.args);
    return rc < 0 ? CMD_OK : rc;
}
