/* cmd_probe.c - `tandem probe`: grpc.health.v1.Health/Check for scripts and exec probes. */
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "coordinator/cmd.h"
#include "grpc/health/v1/health.pb-c.h"
#include "proto/rpc.h"

static const char help[] =
    "usage: tandem probe [--address ADDR] [--live] [--wait SECONDS]\n\n"
    "Asks a server for its health and prints SERVING or what is wrong.\n\n"
    "  --address ADDR   host:port or unix:/path (default " CMD_DEFAULT_ADDRESS ")\n"
    "  --live           liveness: does the coordinator make progress? Without it, readiness: is a worker\n"
    "                   group attached and warm, and the server not draining?\n"
    "  --service NAME   ask for this grpc.health.v1 service name instead\n"
    "  --wait SECONDS   ask again until the server serves, this long at most (default 0: ask once)\n"
    "  --timeout SECONDS  for one answer (default 2)\n"
    "  --quiet          print nothing, the exit status says it\n\n"
    "Exit status: 0 serving, 3 not serving or not reachable, 2 wrong usage.\n\n"
    "  tandem probe --wait 60 && tandem generate \"Once upon a time\"\n";

struct probe_options {
    const char *address;
    const char *service;
    double wait_s, timeout_s;
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
    struct rpc_channel *channel = NULL;
    ProtobufCMessage *reply = NULL;
    enum status_code rc = rpc_channel_create(&channel, o->address, st);
    if (rc != ST_OK)
        return rc;
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)o->service;
    rc = rpc_unary(channel, "/grpc.health.v1.Health/Check", &request.base,
                   &grpc__health__v1__health_check_response__descriptor, &reply, (uint32_t)(o->timeout_s * 1000), st);
    if (rc == ST_OK) {
        int serving = ((Grpc__Health__V1__HealthCheckResponse *)reply)->status;
        if (serving != GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING)
            rc = status_set(st, ST_UNAVAILABLE, "NOT_SERVING: \"%s\" at %s", o->service, o->address);
        protobuf_c_message_free_unpacked(reply, NULL);
    }
    rpc_channel_destroy(channel);
    return rc;
}

static int parse(int argc, char **argv, struct probe_options *o)
{
    static const struct option options[] = {
        {"address", required_argument, 0, 'a'}, {"live", no_argument, 0, 'l'},
        {"service", required_argument, 0, 's'}, {"wait", required_argument, 0, 'w'},
        {"timeout", required_argument, 0, 't'}, {"quiet", no_argument, 0, 'q'},
        {"help", no_argument, 0, 'h'},          {0},
    };
    for (int c; (c = getopt_long(argc, argv, "+:a:h", options, NULL)) != -1;) {
        switch (c) {
        case 'a':
            o->address = optarg;
            break;
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
            if (!cmd_parse_double(optarg, 0.001, 3600, &o->timeout_s))
                return cmd_error(CMD_USAGE, "probe", "--timeout %s: expected seconds, 0.001 to 3600", optarg);
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
    struct probe_options o = {.address = CMD_DEFAULT_ADDRESS, .service = "tandem.v1.Inference", .timeout_s = 2};
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
