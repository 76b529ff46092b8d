#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "coordinator/coord_internal.h"
#include "coordinator/flight.h"

enum kind { TEXT, LISTEN, HEALTH_LISTEN, CONTROL_LISTEN, NAME, U32, U64, FD, LEVEL, FORMAT, SWITCH };

struct option {
    const char *name;
    enum kind kind;
    size_t offset; /* in struct coord_options */
    uint64_t min, max;
    const char *arg, *help;
};

#define AT(field) offsetof(struct coord_options, field)

/* The one table: parsing, bounds and --help. An empty name starts a paragraph of the help. */
static const struct option options[] = {
    {"", TEXT, 0, 0, 0, NULL, "What to serve, and where"},
    {"--model", TEXT, AT(model_dir), 0, 0, "DIR",
     "folder with tokenizer.json, or a GGUF file (the ranks read the weights)"},
    {"--skip-tokenizer-init", SWITCH, AT(no_tokenizer), 0, 0, "on|off",
     "no tokenizer is loaded: prompts are token ids, answers have no text; default off"},
    {"--served-name", NAME, 0, 0, 0, "NAME", "name that clients may ask for; default: the folder's name"},
    {"--chat-template", TEXT, AT(chat_template), 0, 0, "T",
     "chatml, llama2, llama3, mistral or a file; default: what the model's folder has"},
    {"--listen", LISTEN, 0, 0, 0, "ADDR",
     "public address, may be given again: 127.0.0.1:50051 (the default), [::]:50051, unix:/path; port 0: any free"},
    {"--control-listen", CONTROL_LISTEN, 0, 0, 0, "ADDR",
     "where ranks attach; default unix:$XDG_RUNTIME_DIR/tandem-control.sock"},
    {"--http", TEXT, AT(http_listen), 0, 0, "ADDR",
     "OpenAI's HTTP API, health and metrics, as in 127.0.0.1:8000; default: none"},
    {"--health-listen", HEALTH_LISTEN, 0, 0, 0, "ADDR",
     "grpc.health.v1 alone, in plaintext and for everyone: for probes"},
    {"--tp", U32, AT(tp), 1, COORD_MAX_RANKS, "R", "size of the worker group; default: that of the first to attach"},
    {"--reflection", SWITCH, AT(reflection), 0, 0, "on|off", "answer grpc.reflection (v1, v1alpha); default on"},
    {"", TEXT, 0, 0, 0, NULL,
     "Security. TCP listeners demand what there are files for, unix sockets nothing; words behind an address say\n"
     "otherwise, as in --listen 0.0.0.0:50051,mtls,open: plain, tls, mtls; open, token; health (grpc.health.v1 only).\n"
     "Changed files are read again by themselves"},
    {"--tls-cert", TEXT, AT(tls_cert), 0, 0, "FILE", "PEM: the server's certificate and its chain"},
    {"--tls-key", TEXT, AT(tls_key), 0, 0, "FILE", "PEM: its private key"},
    {"--tls-client-ca", TEXT, AT(tls_client_ca), 0, 0, "FILE", "PEM: clients must show a certificate signed by these"},
    {"--token-file", TEXT, AT(token_file), 0, 0, "FILE", "bearer tokens, one a line; health needs none"},
    {"--control-tls-cert", TEXT, AT(control_tls_cert), 0, 0, "FILE",
     "the same for --control-listen, on a unix socket, too"},
    {"--control-tls-key", TEXT, AT(control_tls_key), 0, 0, "FILE", "its private key"},
    {"--control-tls-client-ca", TEXT, AT(control_tls_client_ca), 0, 0, "FILE",
     "ranks must show a certificate signed by these"},
    {"--control-token-file", TEXT, AT(control_token_file), 0, 0, "FILE", "tokens of ranks"},
    {"", TEXT, 0, 0, 0, NULL, "Connections of clients, in milliseconds"},
    {"--keepalive-ms", U32, AT(keepalive_ms), 1000, 86400000, "T", "a silent client is pinged; default 60000"},
    {"--keepalive-timeout-ms", U32, AT(keepalive_timeout_ms), 100, 3600000, "T",
     "and gone without an answer for so long; default 20000"},
    {"--min-ping-interval-ms", U32, AT(min_ping_interval_ms), 100, 3600000, "T",
     "clients that ping more often are sent away; default 10000"},
    {"--max-connection-idle-ms", U32, AT(max_connection_idle_ms), 0, 0x7fffffff, "T",
     "closed when it had no call for so long; 0: never; default 900000"},
    {"--max-connection-age-ms", U32, AT(max_connection_age_ms), 0, 0x7fffffff, "T",
     "then the client is told to connect anew; running calls go on; 0: never; default 1800000"},
    {"--max-connection-age-grace-ms", U32, AT(max_connection_age_grace_ms), 0, 0x7fffffff, "T",
     "for them, from then on; 0 (the default): no limit"},
    {"", TEXT, 0, 0, 0, NULL, "Limits; what is over them is refused with RESOURCE_EXHAUSTED"},
    {"--max-queued", U32, AT(max_queued), 1, 1000000, "N", "requests that wait for a slot; default 1024"},
    {"--max-queued-tokens", U64, AT(max_queued_tokens), 1, UINT64_C(1) << 40, "N", "their prompts; default 4194304"},
    {"--max-queued-tenant", U32, AT(max_queued_tenant), 0, 1000000, "N",
     "those of one tenant that wait; 0 (the default): no bound of its own"},
    {"--max-queued-tokens-tenant", U64, AT(max_queued_tokens_tenant), 0, UINT64_C(1) << 40, "N",
     "their prompts, the same"},
    {"--max-running", U32, AT(max_running), 1, 65536, "N",
     "requests at once; default: as many as the ranks have slots"},
    {"--max-message-bytes", U32, AT(max_message_bytes), 1024, RPC_MAX_MESSAGE_BYTES, "N",
     "of one call; default and at most 16777216"},
    {"--http-connections", U32, AT(http_connections), 1, 100000, "N", "over HTTP at once; default 10240"},
    {"--default-max-tokens", U32, AT(default_max_tokens), 1, UINT32_MAX, "N", "where a request sets none; default 256"},
    {"", TEXT, 0, 0, 0, NULL, "Batching"},
    {"--step-tokens", U32, AT(step_tokens), 1, 65536, "N", "rows of a step at most; default 512"},
    {"--tbt-target-ms", U32, AT(tbt_target_ms), 0, 60000, "T",
     "between two tokens of an answer: chunks of prompts are cut to what it leaves; 0 (the default): whole steps"},
    {"--min-tbt-target-ms", U32, AT(min_tbt_target_ms), 0, 60000, "T",
     "a request's own, lower one counts as this; 0 (the default): as it is"},
    {"--ttft-target-ms", U32, AT(ttft_target_ms), 0, 3600000, "T", "to the first token; 0 (the default): none"},
    {"--refuse-late", SWITCH, AT(refuse_late), 0, 0, "on|off",
     "a request that would miss it behind what waits gets RESOURCE_EXHAUSTED at once; default off"},
    {"--short-first-us", U32, AT(short_first_us), 0, 1000000, "T",
     "a prompt shorter by a token may pass one that came so much earlier; 0 (the default): by age"},
    {"--prefix-cache", SWITCH, AT(prefix_cache), 0, 0, "on|off",
     "prompts that begin as others did are not computed again; default on"},
    {"--pipeline-depth", U32, AT(pipeline_depth), 1, 2, "N", "plans in flight, 1 or 2; default 2"},
    {"", TEXT, 0, 0, 0, NULL, "Time limits, in milliseconds"},
    {"--heartbeat-interval-ms", U32, AT(heartbeat_interval_ms), 10, 60000, "T", "ranks report this often; default 500"},
    {"--heartbeat-timeout-ms", U32, AT(heartbeat_timeout_ms), 20, 600000, "T",
     "a rank that is silent for so long is lost; default 3000, at least twice the interval"},
    {"--step-timeout-ms", U32, AT(step_timeout_ms), 100, 3600000, "T", "a step that takes longer: default 60000"},
    {"--load-timeout-ms", U32, AT(load_timeout_ms), 100, 86400000, "T",
     "a rank that is not ready and has read no more of its weights for so long is lost; default 120000"},
    {"--slow-client-timeout-ms", U32, AT(slow_client_timeout_ms), 100, 3600000, "T",
     "a client that reads nothing for so long is dropped; default 30000"},
    {"--drain-timeout-ms", U32, AT(drain_timeout_ms), 0, 86400000, "T",
     "on SIGTERM live requests get so long to end; default 30000"},
    {"", TEXT, 0, 0, 0, NULL, "When a worker group is lost"},
    {"--replay", SWITCH, AT(replay), 0, 0, "on|off",
     "on (the default): running requests go on in the next group, new ones wait for it; off: UNAVAILABLE"},
    {"--replay-timeout-ms", U32, AT(replay_timeout_ms), 1, 86400000, "T",
     "requests wait for a group so long, then they get UNAVAILABLE; default 60000"},
    {"--replay-limit", U32, AT(replay_limit), 0, 1000000, "N",
     "what loses more groups in a row without a new token gets INTERNAL: it may be the cause; default 3"},
    {"", TEXT, 0, 0, 0, NULL, "Requests that outlive their connection, or this process (Inference.Attach)"},
    {"--journal", TEXT, AT(journal_dir), 0, 0, "DIR",
     "running requests stand there, prompts and all, and go on when it is started again; default: none"},
    {"--journal-bytes", U64, AT(journal_bytes), JOURNAL_MIN_BYTES, UINT64_C(1) << 40, "N",
     "its files together; default 268435456"},
    {"--journal-sync-ms", U32, AT(journal_sync_ms), 0, 60000, "T",
     "what a crash of the machine may lose; 0: when the system pleases; default 200"},
    {"--journal-keep-ms", U32, AT(journal_keep_ms), 1, 3600000, "T",
     "after a restart a request waits so long for its client; default 60000"},
    {"--max-keep-ms", U32, AT(max_keep_ms), 0, 3600000, "T", "keep_ms of a request at most; default 600000"},
    {"--max-kept", U32, AT(max_kept), 0, 1000000, "N", "finished requests that are kept; default 256"},
    {"", TEXT, 0, 0, 0, NULL, "Other"},
    {"--flight-recorder", TEXT, AT(flight_path), 0, 0, "FILE",
     "the last steps, groups and requests, for `tandem dump`, whatever ends this process; default: none"},
    {"--flight-recorder-bytes", U64, AT(flight_bytes), FLIGHT_MIN_BYTES, FLIGHT_MAX_BYTES, "N",
     "size of that file; default 16777216"},
    {"--spans", TEXT, AT(spans_path), 0, 0, "FILE",
     "a line for each request: its spans, as OTLP in JSON, in the trace that its traceparent names; default: none"},
    {"--supervisor-fd", FD, AT(supervisor_fd), 0, 1u << 20, "N", "pipe for events, set by `tandem serve`"},
    {"--log-level", LEVEL, AT(log_level), 0, 0, "L", "error, warning, info (the default) or debug"},
    {"--log-format", FORMAT, AT(log_json), 0, 0, "text|json", "of a line on stderr; default text"},
    {"--help", TEXT, 0, 0, 0, NULL, "this text"},
    {"--version", TEXT, 0, 0, 0, NULL, "the version"},
};
#define N_OPTIONS (sizeof options / sizeof *options)

static void print_help(void)
{
    printf("usage: tandem-coordinator --model DIR [OPTIONS]\n\n"
           "tandem-coordinator serves a model over gRPC; the computing is done by ranks (tandem-worker) that attach to "
           "it.\n"
           "`tandem serve` starts both. By hand:\n\n"
           "    tandem-coordinator --model ./my-model --tp 2 --control-listen unix:/tmp/ctl.sock &\n"
           "    mpirun -np 2 tandem-worker --model ./my-model --coordinator unix:/tmp/ctl.sock\n"
           "    tandem generate --address 127.0.0.1:50051 'Once upon a time'\n");
    for (size_t i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &options[i];
        char left[64];
        if (!o->name[0]) {
            printf("\n%s\n", o->help);
            continue;
        }
        snprintf(left, sizeof left, "%s %s", o->name, o->arg ? o->arg : "");
        printf("  %-33s %s\n", left, o->help);
    }
    printf("\nSIGTERM or SIGINT drains and stops; a second one stops at once. Health: \"\" (alive), "
           "\"tandem.v1.Inference\"\n"
           "(a worker group is ready). `tandem probe --address ADDR` asks for both.\n");
}

static enum status_code parse_number(const struct option *o, const char *text, uint64_t *out, struct status *st)
{
    char *end = NULL;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || v < o->min || v > o->max)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %.60s, expected a number from %llu to %llu", o->name, text,
                          (unsigned long long)o->min, (unsigned long long)o->max);
    *out = v;
    return ST_OK;
}

static enum status_code parse_level(const char *text, enum log_level *out, struct status *st)
{
    static const char *const names[] = {"error", "warning", "info", "debug"};
    for (unsigned i = 0; i < 4; i++)
        if (strcmp(text, names[i]) == 0) {
            *out = (enum log_level)i;
            return ST_OK;
        }
    return status_set(st, ST_INVALID_ARGUMENT, "--log-level: %.60s, expected error, warning, info or debug", text);
}

static enum status_code parse_name(struct coord_options *o, const char *text, struct status *st)
{
    size_t n = strlen(text);
    if (n == 0 || n > COORD_MAX_NAME)
        return status_set(st, ST_INVALID_ARGUMENT, "--served-name: %zu bytes, expected 1 to %d", n, COORD_MAX_NAME);
    memcpy(o->served_name, text, n + 1);
    return ST_OK;
}

/* A listener like any other, with the words that probes need. */
static enum status_code add_health_listener(struct coord_options *o, const char *text, struct status *st)
{
    if (o->n_health == COORD_MAX_HEALTH)
        return status_set(st, ST_INVALID_ARGUMENT, "--health-listen: more than %d addresses", COORD_MAX_HEALTH);
    char *at = o->health_listen[o->n_health];
    if (strchr(text, ',') ||
        snprintf(at, sizeof o->health_listen[0], "%s,plain,open,health", text) >= (int)sizeof o->health_listen[0])
        return status_set(st, ST_INVALID_ARGUMENT, "--health-listen: \"%.60s\", expected an address alone", text);
    o->n_health++;
    return ST_OK;
}

static enum status_code parse_value(struct coord_options *o, const struct option *opt, const char *text,
                                    struct status *st)
{
    void *field = (char *)o + opt->offset;
    uint64_t v = 0;
    enum status_code rc = ST_OK;
    switch (opt->kind) {
    case TEXT:
        *(const char **)field = text;
        return ST_OK;
    case NAME:
        return parse_name(o, text, st);
    case LISTEN:
        if (o->n_listen == COORD_MAX_LISTEN)
            return status_set(st, ST_INVALID_ARGUMENT, "--listen: more than %d addresses", COORD_MAX_LISTEN);
        o->listen[o->n_listen++] = text;
        return ST_OK;
    case HEALTH_LISTEN:
        return add_health_listener(o, text, st);
    case CONTROL_LISTEN:
        if (snprintf(o->control_listen, sizeof o->control_listen, "%s", text) >= (int)sizeof o->control_listen)
            return status_set(st, ST_INVALID_ARGUMENT, "--control-listen: %zu bytes, expected at most %zu",
                              strlen(text), sizeof o->control_listen - 1);
        return ST_OK;
    case SWITCH:
        *(bool *)field = strcmp(text, "on") == 0;
        if (!*(bool *)field && strcmp(text, "off") != 0)
            return status_set(st, ST_INVALID_ARGUMENT, "%s: %.60s, expected on or off", opt->name, text);
        return ST_OK;
    case FORMAT:
        *(bool *)field = strcmp(text, "json") == 0;
        if (*(bool *)field || strcmp(text, "text") == 0)
            return ST_OK;
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %.60s, expected text or json", opt->name, text);
    case LEVEL:
        return parse_level(text, (enum log_level *)field, st);
    case U32:
        if ((rc = parse_number(opt, text, &v, st)) == ST_OK)
            *(uint32_t *)field = (uint32_t)v;
        return rc;
    case U64:
        return parse_number(opt, text, (uint64_t *)field, st);
    case FD:
        if ((rc = parse_number(opt, text, &v, st)) == ST_OK)
            *(int *)field = (int)v;
        return rc;
    }
    return ST_OK;
}

/* The last part of the path, also of "models/demo/" and of ".". */
static enum status_code name_from_folder(struct coord_options *o, struct status *st)
{
    char *path = realpath(o->model_dir, NULL);
    if (!path)
        return status_errno(st, ST_NOT_FOUND, errno, "--model: %.300s", o->model_dir);
    const char *slash = strrchr(path, '/');
    const char *base = slash && slash[1] ? slash + 1 : "model";
    size_t n = strlen(base), suffix = strlen(".gguf");
    if (n > suffix && strcmp(base + n - suffix, ".gguf") == 0)
        n -= suffix;
    if (!o->served_name[0])
        snprintf(o->served_name, sizeof o->served_name, "%.*s", n < COORD_MAX_NAME ? (int)n : COORD_MAX_NAME, base);
    free(path);
    return ST_OK;
}

/* A runtime folder is the user's own; in /tmp the name must not be another user's. */
static void default_control_listen(struct coord_options *o)
{
    const char *dir = getenv("XDG_RUNTIME_DIR");
    if (dir && dir[0] == '/' && strlen(dir) < 80)
        snprintf(o->control_listen, sizeof o->control_listen, "unix:%s/tandem-control.sock", dir);
    else
        snprintf(o->control_listen, sizeof o->control_listen, "unix:/tmp/tandem-control-%u.sock", (unsigned)getuid());
}

static enum status_code check_together(struct coord_options *o, struct status *st)
{
    if (!o->model_dir)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "--model: not given, expected the model's folder (--help shows all options)");
    if (o->heartbeat_timeout_ms < 2 * o->heartbeat_interval_ms)
        return status_set(st, ST_INVALID_ARGUMENT, "--heartbeat-timeout-ms: %u, expected at least twice %s (%u)",
                          o->heartbeat_timeout_ms, "--heartbeat-interval-ms", o->heartbeat_interval_ms);
    if (o->supervisor_fd >= 0) {
        int fl = fcntl(o->supervisor_fd, F_GETFL);
        if (fl < 0 || fcntl(o->supervisor_fd, F_SETFL, fl | O_NONBLOCK) < 0)
            return status_errno(st, ST_INVALID_ARGUMENT, errno, "--supervisor-fd: %d is no open file",
                                o->supervisor_fd);
        fcntl(o->supervisor_fd, F_SETFD, FD_CLOEXEC);
    }
    if (o->n_listen == 0)
        o->listen[o->n_listen++] = "127.0.0.1:50051";
    if (o->n_listen + o->n_health > COORD_MAX_LISTEN)
        return status_set(st, ST_INVALID_ARGUMENT, "--health-listen: more than %d addresses with those of --listen",
                          COORD_MAX_LISTEN);
    for (size_t i = 0; i < o->n_health; i++)
        o->listen[o->n_listen++] = o->health_listen[i];
    if (!o->control_listen[0])
        default_control_listen(o);
    enum status_code rc = listeners_resolve(o, st);
    return rc == ST_OK ? name_from_folder(o, st) : rc;
}

static const struct option *find_option(const char *arg, const char **value)
{
    size_t n = strcspn(arg, "=");
    for (size_t i = 0; i < N_OPTIONS; i++)
        if (options[i].name[0] && strlen(options[i].name) == n && strncmp(options[i].name, arg, n) == 0) {
            *value = arg[n] ? arg + n + 1 : NULL;
            return &options[i];
        }
    return NULL;
}

enum status_code options_parse(struct coord_options *o, int argc, char **argv, bool *done, struct status *st)
{
    *o = (struct coord_options){
        .max_queued = 1024,
        .max_queued_tokens = 4u << 20,
        .step_tokens = 512,
        .default_max_tokens = 256,
        .http_connections = 10240,
        .max_message_bytes = RPC_MAX_MESSAGE_BYTES,
        .pipeline_depth = 2,
        .heartbeat_interval_ms = 500,
        .heartbeat_timeout_ms = 3000,
        .step_timeout_ms = 60000,
        .load_timeout_ms = 120000,
        .slow_client_timeout_ms = 30000,
        .drain_timeout_ms = 30000,
        .replay = true,
        .replay_timeout_ms = 60000,
        .replay_limit = 3,
        .reflection = true,
        .prefix_cache = true,
        .keepalive_ms = 60000,
        .keepalive_timeout_ms = 20000,
        .min_ping_interval_ms = 10000,
        .max_connection_idle_ms = 900000,
        .max_connection_age_ms = 1800000,
        .journal_bytes = 256u << 20,
        .journal_sync_ms = 200,
        .journal_keep_ms = 60000,
        .max_keep_ms = 600000,
        .max_kept = 256,
        .supervisor_fd = -1,
        .flight_bytes = 16u << 20,
        .log_level = LOG_INFO,
    };
    *done = false;
    for (int i = 1; i < argc; i++) {
        const char *value = NULL;
        const struct option *opt = find_option(argv[i], &value);
        if (!opt)
            return status_set(st, ST_INVALID_ARGUMENT, "%.100s: no such option (--help shows all)", argv[i]);
        if (strcmp(opt->name, "--help") == 0 || strcmp(opt->name, "--version") == 0) {
            if (opt->name[2] == 'h')
                print_help();
            else
                printf("tandem-coordinator %s\n", TANDEM_VERSION);
            *done = true;
            return ST_OK;
        }
        if (!value && i + 1 < argc)
            value = argv[++i];
        if (!value || !value[0])
            return status_set(st, ST_INVALID_ARGUMENT, "%s: expected %s behind it", opt->name, opt->arg);
        enum status_code rc = parse_value(o, opt, value, st);
        if (rc != ST_OK)
            return rc;
    }
    return check_together(o, st);
}
