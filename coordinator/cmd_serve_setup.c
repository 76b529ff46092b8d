/* cmd_serve_setup.c - `tandem serve`: options and private folders. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "coordinator/cmd.h"
#include "coordinator/cmd_serve.h"
#include "proto/ranks.h"

enum {
    OPT_MODEL = 1,
    OPT_TP,
    OPT_GROUPS,
    OPT_LISTEN,
    OPT_DRAIN,
    OPT_LAUNCH,
    OPT_COORD_ARG,
    OPT_WORKER_ARG,
    OPT_MPI_ARG,
    OPT_CONTROL,
    OPT_MPIRUN,
    OPT_DEVICES,
    OPT_THREADS,
    OPT_BACKEND,
    OPT_FLIGHT,
    OPT_JSON,
    OPT_TRACE,
    OPT_TRACE_KERNELS,
    OPT_RANDOM,
    OPT_NO_TOKENIZER,
    OPT_FORWARD /* looked up in forwards by its name */
};

static const struct cli_option own_options[] = {
    {.name = "model",
     .id = OPT_MODEL,
     .arg = "DIR",
     .flags = CLI_FILE,
     .help = "the model: a Hugging Face folder or a GGUF file; not given only with --random-weights CONFIG"},
    {.name = "tp", .id = OPT_TP, .arg = "R", .fallback = "1", .help = "tensor-parallel ranks"},
    {.name = "groups",
     .id = OPT_GROUPS,
     .arg = "N",
     .fallback = "1",
     .help = "worker groups, each of --tp ranks with the whole model: requests are spread over them, and those of a "
             "group that "
             "dies go on in another. CUDA devices are dealt out in order"},
    {.name = "listen",
     .id = OPT_LISTEN,
     .arg = "ADDR",
     .fallback = CMD_DEFAULT_ADDRESS,
     .flags = CLI_REPEAT,
     .help = "where clients connect, host:port or unix:/path; words behind it say what the listener demands, as in "
             "0.0.0.0:50052,plain,health (see tandem-coordinator --help)"},
    {.name = "http",
     .id = OPT_FORWARD,
     .arg = "ADDR",
     .help = "OpenAI's HTTP API, health and metrics, as in 127.0.0.1:8000 (default: none); words as for --listen"},
    {.name = "health-listen",
     .id = OPT_FORWARD,
     .arg = "ADDR",
     .help = "grpc.health.v1 alone, in plaintext and for everyone: for probes (default: none)"},
    {.name = "served-name",
     .id = OPT_FORWARD,
     .arg = "NAME",
     .help = "name of the model in the API (default: the folder's name)"},
    {.name = "chat-template",
     .id = OPT_FORWARD,
     .arg = "T",
     .choices = "chatml|llama2|llama3|mistral",
     .help = "chatml, llama2, llama3, mistral or a file (default: the model's own)"},
    {.name = "backend",
     .id = OPT_BACKEND,
     .arg = "NAME",
     .choices = "auto|cuda|host",
     .fallback = "auto",
     .help = "auto, cuda or host"},
    {.name = "devices",
     .id = OPT_DEVICES,
     .arg = "LIST",
     .help = "CUDA devices, such as 0,2: the first is rank 0's (default: all)"},
    {.name = "memory-fraction",
     .id = OPT_FORWARD,
     .arg = "F",
     .fallback = "0.9",
     .help = "of a device's memory that may be in use, other programs included"},
    {.name = "threads",
     .id = OPT_THREADS,
     .arg = "N",
     .help = "CPU threads of each rank on the host back end (default: its share of the cores)"},
    {.name = "max-slots", .id = OPT_FORWARD, .arg = "N", .fallback = "256", .help = "requests that run at once"},
    {.name = "max-context",
     .id = OPT_FORWARD,
     .arg = "N",
     .help = "tokens of a request, prompt and answer (default: the model's)"},
    {.name = "step-tokens",
     .id = OPT_FORWARD,
     .arg = "N",
     .fallback = "512",
     .help = "rows of one step: decodes and prompt chunks"},
    {.name = "kv-memory",
     .id = OPT_FORWARD,
     .arg = "SIZE",
     .help = "KV memory of each rank, such as 512M or 8G (default: computed)"},
    {.name = "page-size", .id = OPT_FORWARD, .arg = "SIZE", .fallback = "2M", .help = "size of a KV page"},
    {.name = "kv-ahead",
     .id = OPT_FORWARD,
     .arg = "auto|on|off",
     .fallback = "auto",
     .help = "a thread maps KV pages before they are needed (auto: on CUDA)"},
    {.name = "suspend-memory",
     .id = OPT_FORWARD,
     .arg = "SIZE",
     .help =
         "host memory of each rank for preempted requests, so that they need not be computed again (default: none)"},
    {.name = "attention",
     .id = OPT_FORWARD,
     .arg = "auto|fused|serial|streams",
     .choices = "auto|fused|serial|streams",
     .fallback = "auto",
     .help = "how chunks and decodes share a CUDA device (auto: the fastest; fused: one kernel)"},
    {.name = "all-reduce",
     .id = OPT_FORWARD,
     .arg = "auto|peer|nccl",
     .choices = "auto|peer|nccl",
     .fallback = "auto",
     .help = "sums over ranks on CUDA devices (auto: by measurement; peer: memory that they reach of each other)"},
    {.name = "batch-invariant",
     .id = OPT_FORWARD,
     .arg = "0|1",
     .choices = "0|1",
     .fallback = "0",
     .help = "1: answers do not depend on what else is served at the same time, to the bit; slower, on CUDA only"},
    {.name = "eager",
     .id = OPT_FORWARD,
     .arg = "0|1",
     .choices = "0|1",
     .fallback = "0",
     .help = "1: kernels of CUDA devices are launched one by one, no graphs; for debugging"},
    {.name = "tbt-target-ms",
     .id = OPT_FORWARD,
     .arg = "T",
     .fallback = "0",
     .help = "between two tokens of an answer: chunks of prompts are cut to what it leaves; 0: steps are filled"},
    {.name = "ttft-target-ms", .id = OPT_FORWARD, .arg = "T", .fallback = "0", .help = "to the first token; 0: none"},
    {.name = "refuse-late",
     .id = OPT_FORWARD,
     .arg = "on|off",
     .choices = "on|off",
     .fallback = "off",
     .help = "requests that would miss it are refused at once"},
    {.name = "prefix-cache",
     .id = OPT_FORWARD,
     .arg = "on|off",
     .fallback = "on",
     .help = "prompts that begin as others did are not computed again"},
    {.name = "max-queued",
     .id = OPT_FORWARD,
     .arg = "N",
     .help = "requests that may wait (default: the coordinator's)"},
    {.name = "max-queued-tenant",
     .id = OPT_FORWARD,
     .arg = "N",
     .help = "those of one tenant; 0: no bound of its own (default: 0)"},
    {.name = "max-queued-tokens-tenant",
     .id = OPT_FORWARD,
     .arg = "N",
     .help = "prompt tokens of those; 0: no bound of its own (default: 0)"},
    {.name = "default-max-tokens",
     .id = OPT_FORWARD,
     .arg = "N",
     .fallback = "256",
     .help = "new tokens of a request that names no limit"},
    {.name = "drain-timeout",
     .id = OPT_DRAIN,
     .arg = "S",
     .fallback = "30",
     .help = "on SIGTERM: seconds that running requests get to end"},
    {.name = "launch-timeout",
     .id = OPT_LAUNCH,
     .arg = "S",
     .fallback = "300",
     .help = "seconds from the start of mpirun until a rank attaches; then it is ended and started again"},
    {.name = "journal",
     .id = OPT_FORWARD,
     .arg = "DIR",
     .flags = CLI_FILE,
     .help =
         "running requests stand there, prompts and all, and outlive the coordinator: clients attach to them again"},
    {.name = "journal-bytes", .id = OPT_FORWARD, .arg = "N", .help = "its files together (default: 268435456)"},
    {.name = "journal-sync-ms",
     .id = OPT_FORWARD,
     .arg = "T",
     .help = "what a crash of the machine may lose; 0: when the system pleases (default: 200)"},
    {.name = "journal-keep-ms",
     .id = OPT_FORWARD,
     .arg = "T",
     .help = "after a restart a request waits so long for its client (default: 60000)"},
    {.name = "tls-cert",
     .id = OPT_FORWARD,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "TLS on TCP listeners: the server's certificate (PEM)"},
    {.name = "tls-key", .id = OPT_FORWARD, .arg = "FILE", .flags = CLI_FILE, .help = "its private key"},
    {.name = "tls-client-ca",
     .id = OPT_FORWARD,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "clients must show a certificate signed by these"},
    {.name = "token-file",
     .id = OPT_FORWARD,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "clients must send one of these bearer tokens"},
    {.name = "control-tls-ca",
     .id = OPT_FORWARD,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "mutual TLS between coordinator and ranks: who signed the certificate that both show"},
    {.name = "control-tls-cert", .id = OPT_FORWARD, .arg = "FILE", .flags = CLI_FILE, .help = "that certificate"},
    {.name = "control-tls-key", .id = OPT_FORWARD, .arg = "FILE", .flags = CLI_FILE, .help = "its private key"},
    {.name = "control-tls-server-name",
     .id = OPT_FORWARD,
     .arg = "NAME",
     .help = "name in that certificate where it is not the address"},
    {.name = "control-token-file", .id = OPT_FORWARD, .arg = "FILE", .flags = CLI_FILE, .help = "a token beside it"},
    {.name = "coordinator-arg",
     .id = OPT_COORD_ARG,
     .arg = "ARG",
     .flags = CLI_REPEAT,
     .help = "handed to tandem-coordinator as it is"},
    {.name = "worker-arg",
     .id = OPT_WORKER_ARG,
     .arg = "ARG",
     .flags = CLI_REPEAT,
     .help = "handed to tandem-worker as it is"},
    {.name = "mpi-arg",
     .id = OPT_MPI_ARG,
     .arg = "ARG",
     .flags = CLI_REPEAT,
     .help = "handed to mpirun as it is. With ranks on other hosts give --control-listen too"},
    {.name = "control-listen",
     .id = OPT_CONTROL,
     .arg = "ADDR",
     .help = "where ranks connect (default: a unix socket in a private folder)"},
    {.name = "flight-recorder",
     .id = OPT_FLIGHT,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "the last steps, groups and requests, for `tandem dump` (default: in a private folder that goes with this "
             "process); off: none"},
    {.name = "trace",
     .id = OPT_TRACE,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "a timeline of each rank's steps, for ui.perfetto.dev (default: none); with several ranks FILE.0, FILE.1 "
             "..., with several groups FILE.g0 and so on"},
    {.name = "trace-kernels",
     .id = OPT_TRACE_KERNELS,
     .arg = "0|1",
     .choices = "0|1",
     .fallback = "0",
     .help = "1: with --trace, every kernel and copy of the CUDA devices, too; needs CUPTI, and steps become slower"},
    {.name = "random-weights",
     .id = OPT_RANDOM,
     .arg = "SEED|CONFIG",
     .flags = CLI_FILE,
     .help = "weights are made, for benchmarks of any shape: of this number if it is not 0, and --model's folder needs "
             "none; or of 1, for a config.json or its folder instead of --model. Without a tokenizer.json there "
             "prompts are token ids (default: the folder's)"},
    {.name = "skip-tokenizer-init",
     .id = OPT_NO_TOKENIZER,
     .arg = "on|off",
     .choices = "on|off",
     .fallback = "off",
     .help = "on: no tokenizer is loaded, prompts are token ids and answers have no text"},
    {.name = "tune-cache",
     .id = OPT_FORWARD,
     .arg = "DIR",
     .flags = CLI_FILE,
     .help = "where the ways of products that were measured on CUDA are kept for the next start (default: tandem in "
             "$XDG_CACHE_HOME or ~/.cache); off: nowhere"},
    {.name = "tune-ms",
     .id = OPT_FORWARD,
     .arg = "N",
     .fallback = "500",
     .help = "how long they are measured, at most, before the ranks are ready"},
    {.name = "mpirun",
     .id = OPT_MPIRUN,
     .arg = "PATH",
     .flags = CLI_FILE,
     .help = "the mpirun to use (default: from PATH)"},
    {.name = "log-level",
     .id = OPT_FORWARD,
     .arg = "LEVEL",
     .choices = "error|warning|info|debug",
     .fallback = "info",
     .help = "error, warning, info or debug"},
    {.name = "json",
     .id = OPT_JSON,
     .help = "tell what happens on standard output, too: one JSON object a line, with its event: starting, listening, "
             "launching, loading, ready, group-lost, group-drained, ended, stopping, error, stopped"},
    {0},
};

const struct cli_command cmd_serve_cli = {
    .name = "serve",
    .summary = "start a coordinator and a group of worker ranks for a model, and keep them running",
    .about = "Serves a model: starts the coordinator, launches the tensor-parallel ranks with mpirun, and starts again "
             "what dies.\n"
             "DIR is a Hugging Face model folder: config.json, *.safetensors, tokenizer.json; or a GGUF file.",
    .tables = (const struct cli_option *const[]){own_options, NULL},
    .notes = "SIGTERM or Ctrl-C drains and stops; a second one stops at once.",
    .exits = "0 stopped by a signal, 1 it cannot serve, 2 wrong usage.",
    .examples = "  tandem serve --model /models/llama --tp 2\n"
                "  tandem generate \"Once upon a time\"          # in another terminal\n"
                "  tandem probe --wait 60                      # until it serves\n",
};

/* ---- options ---- */

/* Options that go on to one or both programs unchanged. */
static const struct forward {
    const char *name, *to_coordinator, *to_worker;
} forwards[] = {
    {"http", "--http", NULL},
    {"health-listen", "--health-listen", NULL},
    {"served-name", "--served-name", NULL},
    {"chat-template", "--chat-template", NULL},
    {"max-queued", "--max-queued", NULL},
    {"max-queued-tenant", "--max-queued-tenant", NULL},
    {"max-queued-tokens-tenant", "--max-queued-tokens-tenant", NULL},
    {"prefix-cache", "--prefix-cache", NULL},
    {"tbt-target-ms", "--tbt-target-ms", NULL},
    {"ttft-target-ms", "--ttft-target-ms", NULL},
    {"refuse-late", "--refuse-late", NULL},
    {"default-max-tokens", "--default-max-tokens", NULL},
    {"journal", "--journal", NULL},
    {"journal-bytes", "--journal-bytes", NULL},
    {"journal-sync-ms", "--journal-sync-ms", NULL},
    {"journal-keep-ms", "--journal-keep-ms", NULL},
    {"log-level", "--log-level", "--log-level"},
    {"step-tokens", "--step-tokens", "--max-step-tokens"},
    {"tls-cert", "--tls-cert", NULL},
    {"tls-key", "--tls-key", NULL},
    {"tls-client-ca", "--tls-client-ca", NULL},
    {"token-file", "--token-file", NULL},
    {"control-tls-cert", "--control-tls-cert", "--tls-cert"},
    {"control-tls-key", "--control-tls-key", "--tls-key"},
    {"control-tls-ca", "--control-tls-client-ca", "--tls-ca"},
    {"control-tls-server-name", NULL, "--tls-server-name"},
    {"control-token-file", "--control-token-file", "--token-file"},
    {"memory-fraction", NULL, "--memory-fraction"},
    {"max-slots", NULL, "--max-slots"},
    {"max-context", NULL, "--max-context"},
    {"kv-memory", NULL, "--kv-memory"},
    {"page-size", NULL, "--page-size"},
    {"kv-ahead", NULL, "--kv-ahead"},
    {"suspend-memory", NULL, "--suspend-memory"},
    {"attention", NULL, "--attention"},
    {"all-reduce", NULL, "--all-reduce"},
    {"batch-invariant", NULL, "--batch-invariant"},
    {"eager", NULL, "--eager"},
    {"tune-cache", NULL, "--tune-cache"},
    {"tune-ms", NULL, "--tune-ms"},
};

static bool take_option(struct serve_setup *s, int opt, bool *ok)
{
    const char *text = s->args.text, *where = s->args.where;
    uint64_t u;
    switch (opt) {
    case OPT_MODEL:
        s->model = text;
        s->model_origin = s->args.values[s->args.at - 1].origin;
        break;
    case OPT_TP:
        if (!cmd_parse_u64(text, 1, MAX_RANKS, &u))
            return cmd_error(CMD_USAGE, where, "--tp %s: expected the number of ranks, 1 to %d", text, MAX_RANKS),
                   false;
        s->tp = u;
        break;
    case OPT_GROUPS:
        if (!cmd_parse_u64(text, 1, SERVE_MAX_GROUPS, &s->groups))
            return cmd_error(CMD_USAGE, where, "--groups %s: expected the number of worker groups, 1 to %d", text,
                             SERVE_MAX_GROUPS),
                   false;
        break;
    case OPT_DEVICES:
        s->devices = text;
        break;
    case OPT_THREADS:
        s->threads = text;
        break;
    case OPT_BACKEND:
        s->backend = text;
        break;
    case OPT_LISTEN:
        s->listens = true;
        *ok = arguments_push2(&s->coordinator_extra, "--listen", text);
        break;
    case OPT_DRAIN:
        if (!cmd_parse_double(text, 0, 86400, &s->drain_s))
            return cmd_error(CMD_USAGE, where, "--drain-timeout %s: expected seconds, 0 to 86400", text), false;
        break;
    case OPT_LAUNCH:
        if (!cmd_parse_double(text, 0.1, 86400, &s->launch_s))
            return cmd_error(CMD_USAGE, where, "--launch-timeout %s: expected seconds, 0.1 to 86400", text), false;
        break;
    case OPT_COORD_ARG:
        *ok = arguments_push(&s->coordinator_extra, text);
        break;
    case OPT_WORKER_ARG:
        *ok = arguments_push(&s->worker_extra, text);
        break;
    case OPT_MPI_ARG:
        s->local_only = false;
        *ok = arguments_push(&s->mpi_extra, text);
        break;
    case OPT_CONTROL:
        s->control_listen = text;
        break;
    case OPT_FLIGHT:
        s->flight = text;
        break;
    case OPT_TRACE:
        s->trace = text;
        break;
    case OPT_TRACE_KERNELS:
        if (!cmd_parse_u64(text, 0, 1, &u))
            return cmd_error(CMD_USAGE, where, "--trace-kernels %s: expected 0 or 1", text), false;
        s->trace_kernels = u;
        break;
    case OPT_MPIRUN:
        s->mpirun_path = text;
        break;
    case OPT_RANDOM:
        s->random_weights = text;
        s->random_origin = s->args.values[s->args.at - 1].origin;
        snprintf(s->random_where, sizeof s->random_where, "%s", where);
        break;
    case OPT_NO_TOKENIZER:
        if (strcmp(text, "on") != 0 && strcmp(text, "off") != 0)
            return cmd_error(CMD_USAGE, where, "--skip-tokenizer-init %s: expected on or off", text), false;
        *ok = arguments_push2(&s->coordinator_extra, "--skip-tokenizer-init", text);
        break;
    case OPT_JSON:
        s->json = true;
        break;
    default: {
        const char *name = s->args.values[s->args.at - 1].option->name;
        const struct forward *f = forwards;
        while (strcmp(f->name, name) != 0)
            f++;
        *ok = (!f->to_coordinator || arguments_push2(&s->coordinator_extra, f->to_coordinator, text)) &&
              (!f->to_worker || arguments_push2(&s->worker_extra, f->to_worker, text));
    }
    }
    return true;
}

/* The folder of a config.json, or a folder with one. */
static bool folder_of(char *folder, size_t cap, const char *config)
{
    static const char name[] = "config.json";
    char path[PATH_MAX + 32];
    struct stat sb;
    const char *slash = strrchr(config, '/');
    if (stat(config, &sb) != 0)
        return false;
    if (S_ISDIR(sb.st_mode)) {
        snprintf(path, sizeof path, "%s/%s", config, name);
        return stat(path, &sb) == 0 && snprintf(folder, cap, "%s", config) < (int)cap;
    }
    if (strcmp(slash ? slash + 1 : config, name) != 0)
        return false;
    if (!slash || slash == config)
        return snprintf(folder, cap, "%s", slash ? "/" : ".") < (int)cap;
    return snprintf(folder, cap, "%.*s", (int)(slash - config), config) < (int)cap;
}

static bool is_there(const struct argument_list *a, const char *text)
{
    int i = 0;
    while (i < a->n && strcmp(a->v[i], text) != 0)
        i++;
    return i < a->n;
}

/* A folder without a tokenizer: where weights are made that is nobody's mistake. */
static bool skip_tokenizer(struct serve_setup *s)
{
    static const char option[] = "--skip-tokenizer-init";
    char path[PATH_MAX + 32];
    struct stat sb;
    if (!s->model || is_there(&s->coordinator_extra, option) || stat(s->model, &sb) != 0 || !S_ISDIR(sb.st_mode))
        return true;
    snprintf(path, sizeof path, "%s/tokenizer.json", s->model);
    if (stat(path, &sb) == 0 || errno != ENOENT)
        return true;
    fprintf(stderr, "tandem serve: no tokenizer.json in %s: prompts are token ids, answers have no text\n", s->model);
    return arguments_push2(&s->coordinator_extra, option, "on");
}

/* Weights that are made. A shape and --model exclude each other: the one of the higher origin counts. */
static int take_random_weights(struct serve_setup *s)
{
    uint64_t seed = 1;
    const char *text = s->random_weights, *where = s->random_where;
    if (!text)
        return CMD_OK;
    const bool number = cmd_parse_u64(text, 0, UINT32_MAX, &seed);
    if (!number) {
        if (s->model && s->model_origin > s->random_origin)
            return CMD_OK;
        if (!folder_of(s->shape, sizeof s->shape, text))
            return cmd_error(CMD_USAGE, where,
                             "--random-weights %s: expected a number, 0 to %u, or a config.json or its folder", text,
                             UINT32_MAX);
        if (s->model && s->model_origin == s->random_origin)
            return cmd_error(CMD_USAGE, where,
                             "--random-weights %s: --model says another shape; expected one of them, or a number here",
                             text);
        s->model = s->shape;
    }
    if (!arguments_push2(&s->worker_extra, "--random-weights", number ? text : "1") || (seed && !skip_tokenizer(s)))
        return cmd_error(CMD_USAGE, "serve", "too many arguments: %d at most", SERVE_MAX_ARGS);
    return CMD_OK;
}

/* CMD_OK, CMD_USAGE, or -1 after --help. */
int serve_parse(int argc, char **argv, struct serve_setup *s)
{
    bool ok = true;
    int rc = cmd_read(&s->args, &cmd_serve_cli, argc, argv);
    if (rc)
        return rc;
    for (int opt; (opt = cli_next(&s->args)) != 0;) {
        if (!take_option(s, opt, &ok))
            return CMD_USAGE;
        if (!ok)
            return cmd_error(CMD_USAGE, "serve", "too many arguments: %d at most", SERVE_MAX_ARGS);
    }
    if (s->args.n_operands)
        return cmd_error(CMD_USAGE, "serve", "%s: takes no arguments, only options; see `tandem serve --help`",
                         s->args.operands[0]);
    if ((rc = take_random_weights(s)) != CMD_OK)
        return rc;
    if (!s->model)
        return cmd_error(CMD_USAGE, "serve", "--model DIR is missing; see `tandem serve --help`");
    if (s->trace_kernels && !s->trace)
        return cmd_error(CMD_USAGE, "serve", "--trace-kernels 1: also give the file, --trace FILE");
    if (s->trace_kernels && s->backend && strcmp(s->backend, "host") == 0)
        return cmd_error(CMD_USAGE, "serve", "--trace-kernels 1: --backend host has none, expected cuda or auto");
    size_t len;
    if (s->groups > 1 && s->devices && !serve_devices_of(s, 0, &len))
        return cmd_error(CMD_USAGE, "serve", "--devices %s: expected %llu, for %llu groups of %llu ranks", s->devices,
                         (unsigned long long)s->groups * s->tp, (unsigned long long)s->groups,
                         (unsigned long long)s->tp);
    struct stat sb;
    if (stat(s->model, &sb))
        return serve_error(s, CMD_FAILED, "--model %s: %s", s->model, strerror(errno));
    if (!S_ISDIR(sb.st_mode) && !S_ISREG(sb.st_mode))
        return serve_error(s, CMD_FAILED,
                           "--model %s: neither folder nor file; expected a Hugging Face model folder or a GGUF file",
                           s->model);
    return CMD_OK;
}

static bool find_bin_dir(struct serve_setup *s)
{
    ssize_t n = readlink("/proc/self/exe", s->bin_dir, sizeof s->bin_dir - 1);
    if (n <= 0)
        return serve_error(s, CMD_FAILED, "/proc/self/exe: %s", strerror(errno)), false;
    s->bin_dir[n] = '\0';
    char *slash = strrchr(s->bin_dir, '/');
    *slash = '\0';
    char path[PATH_MAX + 32];
    static const char *const programs[] = {"tandem-coordinator", "tandem-worker"};
    int needed = s->local_only ? 2 : 1; /* ranks on other hosts are started from there */
    for (int i = 0; i < needed; i++) {
        snprintf(path, sizeof path, "%s/%s", s->bin_dir, programs[i]);
        if (access(path, X_OK))
            return serve_error(s, CMD_FAILED, "%s: %s; it must lie beside this program", path, strerror(errno)), false;
    }
    return true;
}

/* ---- private folders ---- */

static int remove_entry(const char *path, const struct stat *sb, int type, struct FTW *ftw)
{
    (void)sb, (void)type, (void)ftw;
    remove(path);
    return 0;
}

static void remove_tree(const char *path)
{
    nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

/* Removes what a serve that was killed has left in `parent`: a folder of our name whose lock nobody holds. The lock, and
 * not a process id, tells: the folder may be shared with containers that number their processes themselves. */
static void sweep(const char *parent)
{
    DIR *dir = opendir(parent);
    if (!dir)
        return;
    for (const struct dirent *e; (e = readdir(dir));) {
        char path[PATH_MAX], lock[PATH_MAX + 8];
        struct stat sb;
        if (strncmp(e->d_name, "tandem-", 7) != 0 || strlen(e->d_name) != 13)
            continue;
        snprintf(path, sizeof path, "%s/%s", parent, e->d_name);
        snprintf(lock, sizeof lock, "%s/lock", path);
        if (lstat(path, &sb) || !S_ISDIR(sb.st_mode) || sb.st_uid != geteuid())
            continue;
        int fd = open(lock, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
        if (fd < 0)
            continue;
        if (!flock(fd, LOCK_EX | LOCK_NB))
            remove_tree(path);
        close(fd);
    }
    closedir(dir);
}

/* Makes PARENT/tandem-XXXXXX and holds its lock as long as this process lives. path: "" on failure, errno says why. */
static bool make_folder(char *path, size_t n, const char *parent)
{
    sweep(parent);
    snprintf(path, n, "%s/tandem-XXXXXX", parent);
    if (!mkdtemp(path)) {
        path[0] = '\0';
        return false;
    }
    char lock[PATH_MAX];
    snprintf(lock, sizeof lock, "%s/lock", path);
    int fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600); /* closed by the end of the process */
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB)) {
        close(fd); /* a file system without locks: nobody will take it for stale either */
        unlink(lock);
    }
    return true;
}

bool serve_prepare(struct serve_setup *s)
{
    if (!find_bin_dir(s))
        return false;
    const char *tmp = getenv("TMPDIR");
    if (!tmp || !*tmp || strlen(tmp) > 40) /* a socket's path is short */
        tmp = "/tmp";
    if (!make_folder(s->run_dir, sizeof s->run_dir, tmp))
        return serve_error(s, CMD_FAILED, "%s: cannot make a private folder: %s; TMPDIR names another place", tmp,
                           strerror(errno)),
               false;
    if (s->local_only) /* on other hosts the folder would not exist */
        make_folder(s->shm_dir, sizeof s->shm_dir, "/dev/shm");
    if (s->control_listen)
        snprintf(s->control, sizeof s->control, "%s", s->control_listen);
    else
        snprintf(s->control, sizeof s->control, "unix:%s/control", s->run_dir);
    if (!serve_build_commands(s))
        return serve_error(s, CMD_FAILED, "too many arguments: %d at most", SERVE_MAX_ARGS), false;
    if (geteuid() == 0) { /* mpirun refuses root without these two; in containers root is usual */
        setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
        setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    }
    return true;
}

void serve_release(struct serve_setup *s)
{
    if (s->run_dir[0])
        remove_tree(s->run_dir);
    if (s->shm_dir[0])
        remove_tree(s->shm_dir);
    struct argument_list *lists[] = {&s->coordinator, &s->coordinator_extra, &s->worker_extra, &s->mpi_extra};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        arguments_cut(lists[i], 0);
    for (int i = 0; i < SERVE_MAX_GROUPS; i++)
        arguments_cut(&s->mpirun[i], 0);
    cli_free(&s->args);
}
