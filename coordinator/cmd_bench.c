/* cmd_bench.c - `tandem bench`: options, the order of things, the reports. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "coordinator/cmd_bench.h"

#define DEFAULT_REQUESTS 100
#define MAX_REQUESTS     TRACE_MAX_ENTRIES

enum {
    OPT_REQUESTS = 1,
    OPT_RATE,
    OPT_CONCURRENCY,
    OPT_TRACE,
    OPT_SPEED,
    OPT_INPUT,
    OPT_OUTPUT,
    OPT_SHARED,
    OPT_SEED,
    OPT_WARM_UP,
    OPT_TEMPERATURE,
    OPT_EOS,
    OPT_TIMEOUT,
    OPT_SLO_TTFT,
    OPT_SLO_TBT,
    OPT_SLO_STALL,
    OPT_JSON,
    OPT_PLOT
};

static const struct cli_option own_options[] = {
    {.name = "requests", .id = OPT_REQUESTS, .arg = "N", .help = "how many (default: 100; of a trace, all)"},
    {.name = "rate", .id = OPT_RATE, .arg = "R", .help = "open loop: Poisson arrivals, R a second"},
    {.name = "concurrency", .id = OPT_CONCURRENCY, .arg = "C", .help = "closed loop: C requests under way at any time"},
    {.name = "trace",
     .id = OPT_TRACE,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "open loop: arrivals and lengths of a CSV file, arrival_s,prompt_tokens,output_tokens"},
    {.name = "speed",
     .id = OPT_SPEED,
     .arg = "X",
     .fallback = "1",
     .help = "of the trace: arrivals come X times as fast"},
    {.name = "input-tokens",
     .id = OPT_INPUT,
     .arg = "LENGTHS",
     .fallback = "220",
     .help = "of prompts: N, uniform:LOW-HIGH or lognormal:MEAN[,SIGMA[,LOW-HIGH]]"},
    {.name = "output-tokens", .id = OPT_OUTPUT, .arg = "LENGTHS", .fallback = "200", .help = "of answers, the same"},
    {.name = "shared-prefix",
     .id = OPT_SHARED,
     .arg = "N",
     .fallback = "0",
     .help = "the first N tokens of all prompts are the same"},
    {.name = "seed", .id = OPT_SEED, .arg = "S", .fallback = "1", .help = "of arrivals, lengths, prompts and sampling"},
    {.name = "warm-up",
     .id = OPT_WARM_UP,
     .arg = "N",
     .fallback = "0",
     .help = "requests that are sent first, 32 at a time, and not counted"},
    {.name = "temperature", .id = OPT_TEMPERATURE, .arg = "T", .fallback = "0", .help = "0 is greedy"},
    {.name = "stop-at-eos", .id = OPT_EOS, .help = "answers may end before their length"},
    {.name = "timeout", .id = OPT_TIMEOUT, .arg = "SECONDS", .help = "of each request (default: none)"},
    {.name = "slo-ttft", .id = OPT_SLO_TTFT, .arg = "MS", .help = "goodput: the first token comes within MS"},
    {.name = "slo-tbt", .id = OPT_SLO_TBT, .arg = "MS", .help = "goodput: a further token takes MS at most on average"},
    {.name = "slo-stall", .id = OPT_SLO_STALL, .arg = "MS", .help = "goodput: no pause between two messages over MS"},
    {.name = "json", .id = OPT_JSON, .arg = "FILE", .flags = CLI_FILE, .help = "write the results as JSON; -: stdout"},
    {.name = "plot", .id = OPT_PLOT, .arg = "FILE", .flags = CLI_FILE, .help = "write a plot as SVG"},
    {0},
};

const struct cli_command cmd_bench_cli = {
    .name = "bench",
    .summary = "put load on a server and measure it",
    .about =
        "Sends prompts of random tokens and measures when the answers come. Without --rate, --concurrency or --trace\n"
        "all requests are sent at once. Times of an open loop count from when a request was due, not from when it\n"
        "was sent.",
    .tables = (const struct cli_option *const[]){cmd_connect_options, own_options, NULL},
    .notes = "Ctrl-C ends early and reports what there is.",
    .exits = "0 done, 1 requests failed, 2 wrong usage, 3 not reachable, 130 interrupted.",
    .examples = "  tandem bench --requests 1000 --input-tokens lognormal:220 --output-tokens lognormal:200\n"
                "  tandem bench --rate 8 --requests 500 --slo-ttft 500 --slo-tbt 50 --json r.json --plot r.svg\n"
                "  tandem bench --trace azure.csv --speed 2\n",
};

struct options {
    struct cli_args args;
    struct bench_server server;
    struct bench_load load;
    struct trace trace;
    const char *trace_path, *json, *plot;
    const char *no_trace_option, *trace_option; /* given: what a trace has no use for, what has none without one */
    uint32_t warm_up;
    double slo_ttft_ms, slo_tbt_ms, slo_stall_ms;
};

static int lengths(const struct options *o, const char *option, struct bench_lengths *out)
{
    struct status st = STATUS_INIT;
    if (bench_lengths_parse(out, option, o->args.text, &st) != ST_OK)
        return cmd_error(CMD_USAGE, o->args.where, "%s", st.message);
    return CMD_OK;
}

static int mode(struct options *o, enum bench_mode m)
{
    if (o->load.mode != BENCH_OFFLINE && o->load.mode != m)
        return cmd_error(CMD_USAGE, o->args.where, "give one of --rate, --concurrency and --trace");
    o->load.mode = m;
    return CMD_OK;
}

static int take_load(struct options *o, int opt)
{
    int rc;
    uint64_t seed;
    switch (opt) {
    case OPT_REQUESTS:
        return cmd_take_u32(&o->args, 1, MAX_REQUESTS, &o->load.requests);
    case OPT_RATE:
        rc = mode(o, BENCH_RATE);
        return rc ? rc : cmd_take_double(&o->args, 1e-3, 1e6, &o->load.rate);
    case OPT_CONCURRENCY:
        rc = mode(o, BENCH_CONCURRENCY);
        return rc ? rc : cmd_take_u32(&o->args, 1, 65536, &o->load.concurrency);
    case OPT_TRACE:
        o->trace_path = o->args.text;
        return mode(o, BENCH_TRACE);
    case OPT_SPEED:
        o->trace_option = "--speed";
        return cmd_take_double(&o->args, 1e-3, 1e6, &o->load.speed);
    case OPT_INPUT:
        o->no_trace_option = "--input-tokens";
        return lengths(o, "--input-tokens", &o->load.prompt);
    case OPT_OUTPUT:
        o->no_trace_option = "--output-tokens";
        return lengths(o, "--output-tokens", &o->load.output);
    case OPT_SEED:
        if (!cmd_parse_u64(o->args.text, 0, UINT64_MAX, &seed))
            return cmd_error(CMD_USAGE, o->args.where, "--seed %s: expected a number", o->args.text);
        o->load.seed = seed;
        return CMD_OK;
    default:
        return -1;
    }
}

static int take_option(struct options *o, int opt)
{
    switch (opt) {
    case OPT_SHARED:
        return cmd_take_u32(&o->args, 0, TRACE_MAX_TOKENS, &o->server.shared_prefix);
    case OPT_WARM_UP:
        return cmd_take_u32(&o->args, 0, MAX_REQUESTS, &o->warm_up);
    case OPT_TEMPERATURE:
        return cmd_take_double(&o->args, 0, 100, &o->server.temperature);
    case OPT_EOS:
        o->server.stop_at_eos = true;
        return CMD_OK;
    case OPT_TIMEOUT:
        return cmd_take_double(&o->args, 0.001, 1e6, &o->server.timeout_s);
    case OPT_SLO_TTFT:
        return cmd_take_double(&o->args, 0.001, 1e9, &o->slo_ttft_ms);
    case OPT_SLO_TBT:
        return cmd_take_double(&o->args, 0.001, 1e9, &o->slo_tbt_ms);
    case OPT_SLO_STALL:
        return cmd_take_double(&o->args, 0.001, 1e9, &o->slo_stall_ms);
    case OPT_JSON:
        o->json = o->args.text;
        return CMD_OK;
    case OPT_PLOT:
        o->plot = o->args.text;
        return CMD_OK;
    default:
        return take_load(o, opt);
    }
}

static int parse(int argc, char **argv, struct options *o)
{
    int rc = cmd_read(&o->args, &cmd_bench_cli, argc, argv);
    if (rc)
        return rc;
    for (int opt; !rc && (opt = cli_next(&o->args)) != 0;)
        if (!cmd_connect_option(&o->server.options, opt, o->args.text))
            rc = take_option(o, opt);
    if (rc)
        return rc;
    if (o->args.n_operands)
        return cmd_error(CMD_USAGE, "bench", "%s: takes no arguments, only options", o->args.operands[0]);
    if (o->trace_option && !o->trace_path)
        return cmd_error(CMD_USAGE, "bench", "%s is of a trace: give --trace, too", o->trace_option);
    if (o->no_trace_option && o->trace_path)
        return cmd_error(CMD_USAGE, "bench", "%s: lengths come from --trace", o->no_trace_option);
    struct status st = STATUS_INIT;
    if (o->trace_path && trace_load(&o->trace, o->trace_path, &st) != ST_OK)
        return cmd_error(CMD_USAGE, "bench", "--trace: %s", st.message);
    o->load.trace = &o->trace;
    if (o->load.requests == 0 && !o->trace_path)
        o->load.requests = DEFAULT_REQUESTS;
    return CMD_OK;
}

/* ---- the order of things ---- */

static int ask_server(struct options *o, char **model)
{
    struct status st = STATUS_INIT;
    struct tandem_client *client = NULL;
    Tandem__V1__ModelInfo *info = NULL;
    enum status_code rc = tandem_client_open(&client, &o->server.options, &st);
    if (rc == ST_OK)
        rc = tandem_client_model_info(client, &info, &st);
    if (rc == ST_OK) {
        o->server.vocab = info->vocab_size;
        o->load.max_tokens = info->max_context_tokens;
        *model = strdup(info->name ? info->name : "");
        tandem_free(info);
    }
    tandem_client_close(client);
    if (rc != ST_OK || !*model || o->server.vocab == 0)
        return cmd_error(rc == ST_UNAVAILABLE ? CMD_UNREACHABLE : CMD_FAILED, "bench", "%s",
                         rc != ST_OK ? st.message : "the server does not say what its model is");
    return CMD_OK;
}

/* One load: makes its requests and sends them. */
static enum status_code measure(struct bench_result *r, const struct options *o, int signal_fd, bool progress,
                                struct status *st)
{
    struct bench_request *request;
    enum status_code rc = bench_requests(&request, &r->n, r->load, st);
    if (rc != ST_OK)
        return rc;
    r->request = request; /* the caller frees it */
    return bench_run(r, request, &o->server, signal_fd, progress, st);
}

static enum status_code warm_up(const struct options *o, int signal_fd, struct status *st)
{
    if (o->warm_up == 0)
        return ST_OK;
    struct bench_load load = o->load;
    struct bench_result *r = calloc(1, sizeof *r);
    if (!r)
        return status_nomem(st, "results", sizeof *r);
    load.mode = BENCH_CONCURRENCY;
    load.requests = o->warm_up;
    load.concurrency = 32;
    load.seed ^= 0x5741524Dull;
    if (o->trace_path) {
        load.prompt = (struct bench_lengths){BENCH_FIXED, o->trace.entry[0].prompt_tokens, 0, 0, 0};
        load.output = (struct bench_lengths){BENCH_FIXED, o->trace.entry[0].output_tokens, 0, 0, 0};
        load.prompt.high = load.prompt.low;
        load.output.high = load.output.low;
    }
    r->load = &load;
    enum status_code rc = measure(r, o, signal_fd, false, st);
    if (rc == ST_OK)
        bench_sum_up(r);
    if (rc == ST_OK && r->failed)
        rc = status_set(st, ST_INTERNAL, "%u of the %u requests of --warm-up failed", r->failed, r->n);
    free((void *)r->request);
    free(r);
    return rc;
}

static int write_file(const char *path, const struct bench_result *r, const char *model, bool plot)
{
    bool own = strcmp(path, "-") != 0;
    FILE *f = own ? fopen(path, "we") : stdout;
    if (f) {
        if (plot)
            bench_print_plot(f, r);
        else
            bench_print_json(f, r, model);
    }
    bool ok = f && !ferror(f);
    int err = errno;
    if (f && own && fclose(f)) {
        err = errno;
        ok = false;
    }
    return ok ? CMD_OK : cmd_error(CMD_FAILED, "bench", "%s: %s", path, strerror(err));
}

static int report(const struct options *o, struct bench_result *r, const char *model)
{
    int rc = CMD_OK;
    bench_sum_up(r);
    if (!o->json || strcmp(o->json, "-") != 0)
        bench_print_table(stdout, r);
    if (o->json)
        rc = write_file(o->json, r, model, false);
    if (!rc && o->plot)
        rc = write_file(o->plot, r, model, true);
    if (!rc && r->failed)
        rc = cmd_error(CMD_FAILED, "bench", "%u of %u requests failed", r->failed, r->n);
    return rc;
}

static int run(struct options *o)
{
    char *model = NULL;
    struct status st = STATUS_INIT;
    struct bench_result *r = calloc(1, sizeof *r);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    int signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (!r || signal_fd < 0) {
        free(r);
        return cmd_error(CMD_FAILED, "bench", r ? "signalfd failed" : "out of memory");
    }
    int exit_code = ask_server(o, &model);
    if (exit_code == CMD_OK) {
        r->load = &o->load;
        r->slo_ttft_s = o->slo_ttft_ms / 1e3;
        r->slo_tbt_s = o->slo_tbt_ms / 1e3;
        r->slo_stall_s = o->slo_stall_ms / 1e3;
        enum status_code rc = warm_up(o, signal_fd, &st);
        if (rc == ST_OK)
            rc = measure(r, o, signal_fd, isatty(STDERR_FILENO), &st);
        if (rc == ST_OK || (rc == ST_CANCELLED && r->request))
            exit_code = report(o, r, model);
        if (rc != ST_OK)
            exit_code = cmd_error(rc == ST_CANCELLED ? 130 : CMD_FAILED, "bench", "%s", st.message);
    }
    close(signal_fd);
    free((void *)r->request);
    free(r);
    free(model);
    return exit_code;
}

int cmd_bench(int argc, char **argv)
{
    struct options o = {
        .server = {.temperature = 0},
        .load = {
            .speed = 1, .seed = 1, .prompt = {BENCH_FIXED, 220, 220, 0, 0}, .output = {BENCH_FIXED, 200, 200, 0, 0}}};
    int rc = parse(argc, argv, &o);
    if (rc == CMD_OK)
        rc = run(&o);
    trace_free(&o.trace);
    cli_free(&o.args);
    return rc < 0 ? CMD_OK : rc;
}
