/* cmd_simulate.c - `tandem simulate`: options, the order of things. simulate.h does the work. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/cmd.h"
#include "coordinator/simulate.h"

#define DEFAULT_REQUESTS 1000
#define POLICIES         3

enum {
    OPT_COST = 1,
    OPT_GROUPS,
    OPT_POLICY,
    OPT_STEP_TOKENS,
    OPT_SLOTS,
    OPT_TBT_TARGET,
    OPT_TTFT_TARGET,
    OPT_AGE,
    OPT_REFUSE,
    OPT_QUEUED,
    OPT_QUEUED_TOKENS,
    OPT_QUEUED_TENANT,
    OPT_TRACE,
    OPT_SPEED,
    OPT_RATE,
    OPT_REQUESTS,
    OPT_INPUT,
    OPT_OUTPUT,
    OPT_SHARED,
    OPT_TENANTS,
    OPT_SEED,
    OPT_SLO_TTFT,
    OPT_SLO_TBT,
    OPT_SLO_STALL,
    OPT_JSON,
    OPT_PLOT
};

static const struct cli_option cluster_options[] = {
    {.name = "model-cost",
     .id = OPT_COST,
     .arg = "FILE",
     .flags = CLI_FILE | CLI_REQUIRED,
     .help = "JSON: what a step takes on a group, and its memory (coordinator/costs has some)"},
    {.name = "groups", .id = OPT_GROUPS, .arg = "N", .fallback = "1", .help = "worker groups, all alike"},
    {.name = "policy",
     .id = OPT_POLICY,
     .arg = "NAME",
     .choices = "targets|chunked|prefill-first",
     .fallback = "targets",
     .flags = CLI_REPEAT,
     .help = "how steps are made; several are compared"},
    {.name = "step-tokens", .id = OPT_STEP_TOKENS, .arg = "N", .fallback = "2048", .help = "rows of a step at most"},
    {.name = "slots", .id = OPT_SLOTS, .arg = "N", .help = "requests at once in a group (default: the file's)"},
    {.name = "tbt-target",
     .id = OPT_TBT_TARGET,
     .arg = "MS",
     .fallback = "100",
     .help = "policy targets: time between two tokens"},
    {.name = "ttft-target", .id = OPT_TTFT_TARGET, .arg = "MS", .fallback = "0", .help = "time to the first; 0: none"},
    {.name = "age-us-per-token",
     .id = OPT_AGE,
     .arg = "US",
     .fallback = "0",
     .help = "a prompt shorter by a token may pass one that came so much earlier; 0: by age alone"},
    {.name = "refuse-late", .id = OPT_REFUSE, .help = "requests that would miss the TTFT target are refused"},
    {.name = "max-queued", .id = OPT_QUEUED, .arg = "N", .fallback = "100000", .help = "in all groups together"},
    {.name = "max-queued-tokens", .id = OPT_QUEUED_TOKENS, .arg = "N", .fallback = "1000000000", .help = "the same"},
    {.name = "max-queued-tenant",
     .id = OPT_QUEUED_TENANT,
     .arg = "N",
     .fallback = "0",
     .help = "of one tenant; 0: no bound of its own"},
    {0},
};
static const struct cli_option load_options[] = {
    {.name = "trace",
     .id = OPT_TRACE,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "arrivals and lengths of a CSV file, arrival_s,prompt_tokens,output_tokens"},
    {.name = "speed", .id = OPT_SPEED, .arg = "X", .fallback = "1", .help = "of the trace: X times as fast"},
    {.name = "rate", .id = OPT_RATE, .arg = "R", .help = "instead of a trace: Poisson arrivals, R a second"},
    {.name = "requests", .id = OPT_REQUESTS, .arg = "N", .help = "how many (default: 1000; of a trace, all)"},
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
     .help = "all prompts begin with the same N tokens, and the prefix cache is on"},
    {.name = "tenants",
     .id = OPT_TENANTS,
     .arg = "SHARES",
     .help = "requests are of several tenants, as in 0.8,0.2; says how evenly they were served"},
    {.name = "seed", .id = OPT_SEED, .arg = "S", .fallback = "1", .help = "of arrivals, lengths and noise"},
    {.name = "slo-ttft", .id = OPT_SLO_TTFT, .arg = "MS", .help = "goodput: the first token comes within MS"},
    {.name = "slo-tbt", .id = OPT_SLO_TBT, .arg = "MS", .help = "goodput: a further token takes MS at most on average"},
    {.name = "slo-stall", .id = OPT_SLO_STALL, .arg = "MS", .help = "goodput: no pause between two tokens over MS"},
    {.name = "json", .id = OPT_JSON, .arg = "FILE", .flags = CLI_FILE, .help = "write the results as JSON; -: stdout"},
    {.name = "plot", .id = OPT_PLOT, .arg = "FILE", .flags = CLI_FILE, .help = "write a plot as SVG"},
    {0},
};

const struct cli_command cmd_simulate_cli = {
    .name = "simulate",
    .summary = "what a load would see of so many groups, without any",
    .about = "Runs the server's scheduler in virtual time against a model of what steps take, and reports times and\n"
             "goodput as `tandem bench` does. For capacity planning: how many groups keep the targets, what the\n"
             "batching policy does to them. The same seed gives the same result.",
    .tables = (const struct cli_option *const[]){cluster_options, load_options, NULL},
    .exits = "0 done, 1 failed, 2 wrong usage.",
    .examples = "  tandem simulate --model-cost c.json --trace azure.csv --groups 8 --plot r.svg\n"
                "  tandem simulate --model-cost c.json --rate 4 --input-tokens lognormal:10500,0.5,4096-32768 \\\n"
                "      --policy targets --policy chunked --slo-stall 200\n",
};

struct options {
    struct cli_args args;
    struct simulate_cost cost;
    struct simulate_config cfg;
    struct bench_load load;
    struct trace trace;
    const char *cost_path, *trace_path, *json, *plot;
    enum sched_policy policy[POLICIES];
    uint32_t n_policies;
    double slo_ttft_ms, slo_tbt_ms, slo_stall_ms;
};

static int target(const struct options *o, int64_t *out_us)
{
    double ms;
    int rc = cmd_take_double(&o->args, 0, 1e7, &ms);
    if (!rc)
        *out_us = llround(ms * 1e3);
    return rc;
}

static int whole(const struct options *o, uint64_t lo, uint64_t *out)
{
    if (!cmd_parse_u64(o->args.text, lo, UINT64_MAX >> 1, out))
        return cmd_error(CMD_USAGE, o->args.where, "%s: expected a number", o->args.text);
    return CMD_OK;
}

static int lengths(const struct options *o, const char *option, struct bench_lengths *out)
{
    struct status st = STATUS_INIT;
    if (bench_lengths_parse(out, option, o->args.text, &st) != ST_OK)
        return cmd_error(CMD_USAGE, o->args.where, "%s", st.message);
    return CMD_OK;
}

static int take_policy(struct options *o)
{
    for (uint32_t p = 0; p < POLICIES; p++)
        if (strcmp(o->args.text, simulate_policy_name((enum sched_policy)p)) == 0) {
            if (o->n_policies == POLICIES)
                return cmd_error(CMD_USAGE, o->args.where, "more than %d policies", POLICIES);
            o->policy[o->n_policies++] = (enum sched_policy)p;
            return CMD_OK;
        }
    return cmd_error(CMD_USAGE, o->args.where, "%s: expected targets, chunked or prefill-first", o->args.text);
}

/* "0.8,0.2" */
static int take_tenants(struct options *o)
{
    const char *p = o->args.text;
    double sum = 0;
    uint32_t n = 0;
    for (bool more = true; more && n < SIMULATE_MAX_TENANTS; n++) {
        char *end;
        double v = *p >= '0' && *p <= '9' ? strtod(p, &end) : -1;
        if (!(v > 0 && v <= 1) || (*end && *end != ','))
            break;
        o->cfg.tenant_share[n] = v;
        sum += v;
        more = *end == ',';
        p = end + more;
    }
    if (n == 0 || *p || fabs(sum - 1) > 1e-6)
        return cmd_error(CMD_USAGE, o->args.where, "%s: expected 1 to %d shares that add up to 1, as in 0.8,0.2",
                         o->args.text, SIMULATE_MAX_TENANTS);
    o->cfg.n_tenants = n;
    return CMD_OK;
}

static int take_cluster(struct options *o, int opt)
{
    switch (opt) {
    case OPT_COST:
        o->cost_path = o->args.text;
        return CMD_OK;
    case OPT_GROUPS:
        return cmd_take_u32(&o->args, 1, SIMULATE_MAX_GROUPS, &o->cfg.groups);
    case OPT_POLICY:
        return take_policy(o);
    case OPT_STEP_TOKENS:
        return cmd_take_u32(&o->args, 1, 65536, &o->cfg.step_tokens);
    case OPT_SLOTS:
        return cmd_take_u32(&o->args, 1, 65536, &o->cfg.slots);
    case OPT_TBT_TARGET:
        return target(o, &o->cfg.tbt_target_us);
    case OPT_TTFT_TARGET:
        return target(o, &o->cfg.ttft_target_us);
    case OPT_AGE:
        return cmd_take_u32(&o->args, 0, 1000000, &o->cfg.age_us_per_token);
    case OPT_REFUSE:
        o->cfg.refuse_late = true;
        return CMD_OK;
    case OPT_QUEUED:
        return cmd_take_u32(&o->args, 1, UINT32_MAX, &o->cfg.max_queued);
    case OPT_QUEUED_TOKENS:
        return whole(o, 1, &o->cfg.max_queued_tokens);
    case OPT_QUEUED_TENANT:
        return cmd_take_u32(&o->args, 0, UINT32_MAX, &o->cfg.max_queued_tenant);
    default:
        return -1;
    }
}

static int take_option(struct options *o, int opt)
{
    switch (opt) {
    case OPT_TRACE:
        o->trace_path = o->args.text;
        return CMD_OK;
    case OPT_SPEED:
        return cmd_take_double(&o->args, 1e-3, 1e6, &o->load.speed);
    case OPT_RATE:
        return cmd_take_double(&o->args, 1e-3, 1e6, &o->load.rate);
    case OPT_REQUESTS:
        return cmd_take_u32(&o->args, 1, 1u << 28, &o->load.requests);
    case OPT_INPUT:
        return lengths(o, "--input-tokens", &o->load.prompt);
    case OPT_OUTPUT:
        return lengths(o, "--output-tokens", &o->load.output);
    case OPT_SHARED:
        return cmd_take_u32(&o->args, 0, TRACE_MAX_TOKENS, &o->cfg.shared_prefix);
    case OPT_TENANTS:
        return take_tenants(o);
    case OPT_SEED:
        return whole(o, 0, &o->load.seed);
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
        return take_cluster(o, opt);
    }
}

static int load_files(struct options *o)
{
    struct status st = STATUS_INIT;
    if (!o->cost_path)
        return cmd_error(CMD_USAGE, "simulate", "--model-cost: needed; see `tandem simulate --help`");
    if (simulate_cost_load(&o->cost, o->cost_path, &st) != ST_OK)
        return cmd_error(CMD_USAGE, "simulate", "--model-cost: %s", st.message);
    if (o->trace_path && trace_load(&o->trace, o->trace_path, &st) != ST_OK)
        return cmd_error(CMD_USAGE, "simulate", "--trace: %s", st.message);
    return CMD_OK;
}

static int parse(int argc, char **argv, struct options *o)
{
    int rc = cmd_read(&o->args, &cmd_simulate_cli, argc, argv);
    for (int opt; !rc && (opt = cli_next(&o->args)) != 0;)
        rc = take_option(o, opt);
    if (rc)
        return rc;
    if (o->args.n_operands)
        return cmd_error(CMD_USAGE, "simulate", "%s: takes no arguments, only options", o->args.operands[0]);
    if (!o->trace_path == !(o->load.rate > 0))
        return cmd_error(CMD_USAGE, "simulate", "give one of --trace and --rate");
    if (o->n_policies == 0)
        o->policy[o->n_policies++] = SCHED_TARGETS;
    if (o->n_policies > 1 && (o->json || o->plot))
        return cmd_error(CMD_USAGE, "simulate", "--json and --plot are of one --policy");
    rc = load_files(o);
    o->load.mode = o->trace_path ? BENCH_TRACE : BENCH_RATE;
    o->load.trace = &o->trace;
    o->load.max_tokens = o->cost.max_context;
    if (o->load.requests == 0 && !o->trace_path)
        o->load.requests = DEFAULT_REQUESTS;
    o->cfg.cost = &o->cost;
    o->cfg.seed = o->load.seed;
    return rc;
}

static int write_file(const char *path, const struct simulate_result *r, const struct simulate_config *cfg, bool plot)
{
    bool own = strcmp(path, "-") != 0;
    FILE *f = own ? fopen(path, "we") : stdout;
    if (f) {
        if (plot)
            bench_print_plot(f, &r->bench);
        else
            simulate_print_json(f, r, cfg);
    }
    bool ok = f && !ferror(f);
    int err = errno;
    if (f && own && fclose(f)) {
        err = errno;
        ok = false;
    }
    return ok ? CMD_OK : cmd_error(CMD_FAILED, "simulate", "%s: %s", path, strerror(err));
}

static int report(const struct options *o, const struct simulate_result *r, uint32_t nth)
{
    int rc = CMD_OK;
    if (o->n_policies > 1)
        simulate_print_line(stdout, r, &o->cfg, nth == 0);
    else if (!o->json || strcmp(o->json, "-") != 0)
        simulate_print_table(stdout, r, &o->cfg);
    if (o->json)
        rc = write_file(o->json, r, &o->cfg, false);
    if (!rc && o->plot)
        rc = write_file(o->plot, r, &o->cfg, true);
    return rc;
}

static int run_policy(struct options *o, uint32_t nth)
{
    struct status st = STATUS_INIT;
    struct bench_request *request = NULL;
    struct simulate_result *r = calloc(1, sizeof *r);
    if (!r)
        return cmd_error(CMD_FAILED, "simulate", "out of memory");
    r->bench.load = &o->load;
    r->bench.slo_ttft_s = o->slo_ttft_ms / 1e3;
    r->bench.slo_tbt_s = o->slo_tbt_ms / 1e3;
    r->bench.slo_stall_s = o->slo_stall_ms / 1e3;
    o->cfg.policy = o->policy[nth];
    enum status_code rc = bench_requests(&request, &r->bench.n, &o->load, &st);
    r->bench.request = request;
    if (rc == ST_OK)
        rc = simulate_run(r, request, &o->cfg, &st);
    int exit_code = rc == ST_OK
                        ? report(o, r, nth)
                        : cmd_error(rc == ST_INVALID_ARGUMENT ? CMD_USAGE : CMD_FAILED, "simulate", "%s", st.message);
    free(request);
    free(r);
    return exit_code;
}

int cmd_simulate(int argc, char **argv)
{
    struct options o = {
        .cfg = {.groups = 1,
                .step_tokens = 2048,
                .depth = 2,
                .max_queued = 100000,
                .max_queued_tokens = 1000000000,
                .tbt_target_us = 100000},
        .load = {
            .speed = 1, .seed = 1, .prompt = {BENCH_FIXED, 220, 220, 0, 0}, .output = {BENCH_FIXED, 200, 200, 0, 0}}};
    int rc = parse(argc, argv, &o);
    for (uint32_t i = 0; rc == CMD_OK && i < o.n_policies; i++)
        rc = run_policy(&o, i);
    trace_free(&o.trace);
    cli_free(&o.args);
    return rc < 0 ? CMD_OK : rc;
}
