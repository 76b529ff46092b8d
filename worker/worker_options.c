#include "worker/worker_internal.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum option_kind { OPTION_TEXT, OPTION_ADDRESS, OPTION_NUMBER, OPTION_SIZE, OPTION_FRACTION, OPTION_CHOICE };

struct option_spec {
    const char *name; /* without the dashes */
    const char *arg;
    enum option_kind kind;
    size_t offset; /* in struct worker_options */
    uint64_t min, max;
    const char *const *choices; /* NULL-ended; the value is the index */
    const char *help;
};

static const char *const backend_names[] = {"auto", "cuda", "host", NULL};
static const char *const ahead_names[] = {"auto", "on", "off", NULL};                      /* enum engine_ahead */
static const char *const attention_names[] = {"auto", "fused", "serial", "streams", NULL}; /* enum attn_gpu_policy */
static const char *const reduce_names[] = {"auto", "peer", "nccl", NULL};   /* worker_loop.c: reduce_ways */
static const char *const progress_names[] = {"auto", "bar", "lines", NULL}; /* enum worker_progress */
static const char *const level_names[] = {"error", "warning", "info", "debug", NULL};

#define AT(field) offsetof(struct worker_options, field)

static const struct option_spec specs[] = {
    {"model", "PATH", OPTION_TEXT, AT(model_dir), 0, 0, NULL, "Hugging Face folder or GGUF file of a model (required)"},
    {"coordinator", "ADDR", OPTION_ADDRESS, AT(coordinator), 0, 0, NULL,
     "control listener of tandem-coordinator: host:port or unix:/path (required)"},
    {"group", "NAME", OPTION_TEXT, AT(group), 0, 0, NULL,
     "name of this rank's worker group, where one coordinator has several; default \"default\""},
    {"tls-ca", "FILE", OPTION_TEXT, AT(security.ca_file), 0, 0, NULL,
     "PEM: TLS to the coordinator, whose certificate these must have signed"},
    {"tls-cert", "FILE", OPTION_TEXT, AT(security.cert_file), 0, 0, NULL, "PEM: certificate to show it (mutual TLS)"},
    {"tls-key", "FILE", OPTION_TEXT, AT(security.key_file), 0, 0, NULL, "PEM: its private key"},
    {"tls-server-name", "NAME", OPTION_TEXT, AT(security.server_name), 0, 0, NULL,
     "name in the coordinator's certificate; default: the host of --coordinator"},
    {"token-file", "FILE", OPTION_TEXT, AT(security.token_file), 0, 0, NULL, "bearer token for the coordinator"},
    {"backend", "NAME", OPTION_CHOICE, AT(backend), 0, 0, backend_names,
     "auto (CUDA where it can serve, else host), cuda or host; default auto"},
    {"devices", "LIST", OPTION_TEXT, AT(devices), 0, 0, NULL,
     "devices of CUDA that may be taken, as 0,2: each rank takes the first that no other of its machine needs; "
     "default: all that the driver finds"},
    {"threads", "N", OPTION_NUMBER, AT(threads), 1, 1024, NULL,
     "threads of this rank; default: its share of the machine's cores"},
    {"max-slots", "N", OPTION_NUMBER, AT(max_slots), 1, 65536, NULL, "sequences held at once; default 256"},
    {"max-context", "N", OPTION_NUMBER, AT(max_context), 1, UINT32_MAX, NULL,
     "tokens of one sequence; default: the model's own limit"},
    {"max-step-tokens", "N", OPTION_NUMBER, AT(max_step_tokens), 1, 1u << 20, NULL, "rows of one step; default 512"},
    {"kv-memory", "SIZE", OPTION_SIZE, AT(kv_bytes), 1, UINT64_MAX, NULL,
     "KV cache of this rank, as 512M or 2G; default: what the slots can use, at most\n"
     "host: a quarter of the available memory divided by the ranks on it\n"
     "CUDA: what --memory-fraction leaves"},
    {"memory-fraction", "F", OPTION_FRACTION, AT(memory_fraction), 0, 0, NULL,
     "of a device's memory that may be in use, other programs included; default 0.9"},
    {"trace", "FILE", OPTION_TEXT, AT(trace), 0, 0, NULL,
     "a timeline of the steps, for ui.perfetto.dev; with several ranks FILE.0, FILE.1 ..."},
    {"trace-kernels", "0|1", OPTION_NUMBER, AT(trace_kernels), 0, 1, NULL,
     "1: with --trace, every kernel and copy of a CUDA device, too; needs CUPTI, and steps become slower"},
    {"eager", "0|1", OPTION_NUMBER, AT(eager), 0, 1, NULL, "1: CUDA kernels are launched one by one; for debugging"},
    {"attention", "HOW", OPTION_CHOICE, AT(attention), 0, 0, attention_names,
     "how chunks and decodes share a CUDA device: auto (the fastest), fused (one kernel), serial or streams; default "
     "auto"},
    {"all-reduce", "HOW", OPTION_CHOICE, AT(all_reduce), 0, 0, reduce_names,
     "sums over CUDA devices: auto (by measurement), peer (memory that they reach of each other) or nccl; default "
     "auto"},
    {"batch-invariant", "0|1", OPTION_NUMBER, AT(batch_invariant), 0, 1, NULL,
     "1: answers do not depend on what else is served at the same time, to the bit; slower, on CUDA only"},
    {"random-weights", "SEED", OPTION_NUMBER, AT(random_weights), 0, UINT32_MAX, NULL,
     "not 0: the folder needs no weights, only config.json, and they depend on this number; for benchmarks of any\n"
     "shape"},
    {"tune-cache", "DIR", OPTION_TEXT, AT(tune_cache), 0, 0, NULL,
     "CUDA: where measured ways of products are kept for the next start; off: nowhere; default: tandem in\n"
     "$XDG_CACHE_HOME or ~/.cache"},
    {"tune-ms", "N", OPTION_NUMBER, AT(tune_ms), 1, 600000, NULL,
     "CUDA: how long they are measured before the rank is ready; default 500"},
    {"page-size", "SIZE", OPTION_SIZE, AT(page_bytes), 1, UINT64_MAX, NULL, "one page of the KV cache, as 64K or 2M"},
    {"kv-ahead", "WHEN", OPTION_CHOICE, AT(kv_ahead), 0, 0, ahead_names,
     "auto (on CUDA), on or off: a thread maps pages of the KV cache before they are needed; default auto"},
    {"suspend-memory", "SIZE", OPTION_SIZE, AT(suspend_bytes), 1, UINT64_MAX, NULL,
     "host memory of this rank for preempted requests, which then go on without being computed again; default: none"},
    {"comm-timeout-ms", "N", OPTION_NUMBER, AT(comm_timeout_ms), 1, 3600000, NULL,
     "bound of one exchange between ranks; default 60000"},
    {"attach-timeout-ms", "N", OPTION_NUMBER, AT(attach_timeout_ms), 1, 86400000, NULL,
     "how long to wait for a coordinator; default 30000"},
    {"progress", "HOW", OPTION_CHOICE, AT(progress), 0, 0, progress_names,
     "of loading, by rank 0: bar, lines (one in 2 s), or auto: a bar where standard error is a terminal; default auto"},
    {"log-level", "NAME", OPTION_CHOICE, AT(log_level), 0, 0, level_names,
     "error, warning, info or debug; default info"},
};
#define SPEC_COUNT (sizeof specs / sizeof *specs)

static bool parse_u64(const char *text, uint64_t *out, const char **rest)
{
    if (!isdigit((unsigned char)*text))
        return false; /* strtoull takes signs and blanks */
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (errno)
        return false;
    *out = v;
    *rest = end;
    return true;
}

static enum status_code parse_number(const struct option_spec *s, const char *text, uint32_t *out, struct status *st)
{
    uint64_t v;
    const char *rest;
    if (!parse_u64(text, &v, &rest) || *rest || v < s->min || v > s->max)
        return status_set(st, ST_INVALID_ARGUMENT, "--%s: \"%s\" is not a number from %llu to %llu", s->name, text,
                          (unsigned long long)s->min, (unsigned long long)s->max);
    *out = (uint32_t)v;
    return ST_OK;
}

/* 512M, 2G, 2GiB, 65536: powers of 1024. */
static enum status_code parse_size(const struct option_spec *s, const char *text, uint64_t *out, struct status *st)
{
    static const char letters[] = "KMGT";
    uint64_t v;
    const char *rest;
    unsigned shift = 0;
    if (!parse_u64(text, &v, &rest))
        goto bad;
    const char *letter = *rest ? strchr(letters, toupper((unsigned char)*rest)) : NULL;
    if (letter) {
        shift = 10 * (unsigned)(letter - letters + 1);
        rest++;
        if (strcasecmp(rest, "iB") == 0 || strcasecmp(rest, "B") == 0)
            rest = "";
    }
    if (*rest || v == 0 || (shift && v >> (64 - shift)))
        goto bad;
    *out = v << shift;
    return ST_OK;
bad:
    return status_set(st, ST_INVALID_ARGUMENT, "--%s: \"%s\" is not a size; write it like 65536, 512M or 2G", s->name,
                      text);
}

/* 0.9 or 1: digits, and a point between them. */
static enum status_code parse_fraction(const struct option_spec *s, const char *text, double *out, struct status *st)
{
    const size_t n = strspn(text, "0123456789.");
    char *end;
    const double v = strtod(text, &end);
    if (n == 0 || text[n] || *end || text[0] == '.' || text[n - 1] == '.' || v < 0.01 || v > 1)
        return status_set(st, ST_INVALID_ARGUMENT, "--%s: \"%s\" is not a fraction from 0.01 to 1, such as 0.9",
                          s->name, text);
    *out = v;
    return ST_OK;
}

static enum status_code parse_choice(const struct option_spec *s, const char *text, uint32_t *out, struct status *st)
{
    char list[128] = "";
    for (uint32_t i = 0; s->choices[i]; i++) {
        if (strcmp(text, s->choices[i]) == 0) {
            *out = i;
            return ST_OK;
        }
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "", s->choices[i]);
    }
    return status_set(st, ST_INVALID_ARGUMENT, "--%s: \"%s\" is none of: %s", s->name, text, list);
}

static enum status_code check_address(const struct option_spec *s, const char *text, struct status *st)
{
    if (strncmp(text, "unix:", 5) == 0 && text[5])
        return ST_OK;
    const char *colon = strrchr(text, ':');
    uint64_t port;
    const char *rest;
    if (colon && colon != text && parse_u64(colon + 1, &port, &rest) && !*rest && port >= 1 && port <= 65535)
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "--%s: \"%s\" is no address; write host:port or unix:/path", s->name,
                      text);
}

static enum status_code set_option(struct worker_options *o, const struct option_spec *s, const char *text,
                                   struct status *st)
{
    void *field = (char *)o + s->offset;
    switch (s->kind) {
    case OPTION_NUMBER:
        return parse_number(s, text, field, st);
    case OPTION_SIZE:
        return parse_size(s, text, field, st);
    case OPTION_FRACTION:
        return parse_fraction(s, text, field, st);
    case OPTION_CHOICE:
        return parse_choice(s, text, field, st);
    case OPTION_ADDRESS:
        if (check_address(s, text, st) != ST_OK)
            return ST_INVALID_ARGUMENT;
        break;
    case OPTION_TEXT:
        if (!*text)
            return status_set(st, ST_INVALID_ARGUMENT, "--%s: empty, expected %s", s->name, s->arg);
        break;
    }
    memcpy(field, &text, sizeof text);
    return ST_OK;
}

/* "--name" or "--name=value"; *value is what stands after '='. */
static const struct option_spec *find_spec(const char *arg, const char **value)
{
    *value = NULL;
    if (strncmp(arg, "--", 2) != 0)
        return NULL;
    arg += 2;
    size_t n = strcspn(arg, "=");
    for (size_t i = 0; i < SPEC_COUNT; i++) {
        if (strlen(specs[i].name) == n && memcmp(specs[i].name, arg, n) == 0) {
            if (arg[n])
                *value = arg + n + 1;
            return &specs[i];
        }
    }
    return NULL;
}

enum status_code worker_options_parse(struct worker_options *o, enum worker_action *action, int argc, char **argv,
                                      struct status *st)
{
    struct worker_options r = {.attach_timeout_ms = 30000, .log_level = WORKER_LOG_INFO};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--version") == 0) {
            *action = strcmp(argv[i], "--version") == 0 ? WORKER_SHOW_VERSION : WORKER_SHOW_HELP;
            return ST_OK;
        }
        if (strcmp(argv[i], "--inspect") == 0) {
            if (i + 2 != argc || argc != 3)
                return status_set(st, ST_INVALID_ARGUMENT, "--inspect: write --inspect PATH, and nothing else");
            o->model_dir = argv[i + 1];
            *action = WORKER_INSPECT;
            return ST_OK;
        }
        const char *value;
        const struct option_spec *s = find_spec(argv[i], &value);
        if (!s)
            return status_set(st, ST_INVALID_ARGUMENT, "%s %s: see tandem-worker --help",
                              argv[i][0] == '-' ? "unknown option" : "unexpected argument", argv[i]);
        if (!value && i + 1 < argc)
            value = argv[++i];
        if (!value)
            return status_set(st, ST_INVALID_ARGUMENT, "--%s: write --%s %s", s->name, s->name, s->arg);
        enum status_code rc = set_option(&r, s, value, st);
        if (rc != ST_OK)
            return rc;
    }
    if (!r.model_dir)
        return status_set(st, ST_INVALID_ARGUMENT, "--model is missing: give the folder with config.json, see --help");
    if (!r.coordinator)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "--coordinator is missing: give the control address of tandem-coordinator, see --help");
    if (r.trace_kernels && !r.trace)
        return status_set(st, ST_INVALID_ARGUMENT, "--trace-kernels 1: also give the file, --trace FILE");
    if (r.trace_kernels && r.backend == WORKER_BACKEND_HOST)
        return status_set(st, ST_INVALID_ARGUMENT, "--trace-kernels 1: --backend host has none, expected cuda or auto");
    *o = r;
    *action = WORKER_RUN;
    return ST_OK;
}

const char *worker_tune_dir(const struct worker_options *o, char *buf, size_t cap)
{
    const char *base = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n = -1;
    if (o->tune_cache)
        return strcmp(o->tune_cache, "off") == 0 ? NULL : o->tune_cache;
    if (base && *base == '/') /* a relative one is to be ignored */
        n = snprintf(buf, cap, "%s/tandem", base);
    else if (home && *home == '/')
        n = snprintf(buf, cap, "%s/.cache/tandem", home);
    return n > 0 && (size_t)n < cap ? buf : NULL;
}

void worker_options_help(void)
{
    printf(
        "usage: tandem-worker --model DIR --coordinator ADDR [OPTIONS]\n\n"
        "tandem-worker - one tensor-parallel rank of a tandem cluster.\n"
        "\n"
        "MPI starts R of them; together they hold one model, each rank its share of the heads, of the MLP and of the\n"
        "vocabulary. Each rank keeps a stream to tandem-coordinator, which sends the steps to run. `tandem serve`\n"
        "starts all of this. By hand, beside a running coordinator:\n"
        "\n"
        "    mpirun -np 2 --oversubscribe --mca mpi_yield_when_idle 1 \\\n"
        "        tandem-worker --model DIR --coordinator 127.0.0.1:50052\n"
        "\n"
        "Without mpirun it is a group of one rank. All ranks take the same options.\n"
        "\n"
        "Options:\n");
    for (size_t i = 0; i < SPEC_COUNT; i++) {
        char left[64];
        snprintf(left, sizeof left, "--%s %s", specs[i].name, specs[i].arg);
        printf("  %-24s", left);
        for (const char *p = specs[i].help; *p; p++) {
            putchar(*p);
            if (*p == '\n')
                printf("%26s", "");
        }
        putchar('\n');
    }
    printf("  %-24s%s\n  %-24s%s\n", "--help", "this text", "--version", "the version");
    printf("  %-24s%s\n", "--inspect PATH",
           "print shape and memory of a model as JSON; alone, see `tandem models --help`");
    printf(
        "\n"
        "Exit status: 0 told to stop; 1 would fail again (model, options); 2 command line; 75 start the group again;\n"
        "128 + n ended by signal n.\n");
}
