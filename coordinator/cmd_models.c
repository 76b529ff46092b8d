/* cmd_models.c - `tandem models inspect`: shape and memory of a model. The figures come from tandem-worker --inspect, which
 * has the code that shards and loads; here they are compared with a memory and shown. */
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "coordinator/cmd.h"

enum { OPT_BACKEND = 1, OPT_MEMORY, OPT_CONTEXT, OPT_JSON };

static const struct cli_option own_options[] = {
    {.name = "backend",
     .id = OPT_BACKEND,
     .arg = "NAME",
     .choices = "host|cuda",
     .fallback = "host",
     .help = "host or cuda: they hold weights and KV in different types"},
    {.name = "memory",
     .id = OPT_MEMORY,
     .arg = "SIZE",
     .help = "memory of each rank, such as 80G (default with host: that of this machine, divided by the ranks)"},
    {.name = "context",
     .id = OPT_CONTEXT,
     .arg = "N",
     .help = "tokens of KV that must fit beside the weights (default: the model's context)"},
    {.name = "json",
     .id = OPT_JSON,
     .help = "print one JSON object, with the figures of each rank; an error as {\"error\": {code, message}}"},
    {0},
};

const struct cli_command cmd_models_cli = {
    .name = "models",
    .summary = "look into a model: shape, parameters, memory of each rank, what will not fit",
    .operands = "inspect DIR|FILE.gguf",
    .words = "inspect",
    .about =
        "Prints the shape of a model and, for groups of 1 to 8 ranks, the bytes that the largest rank holds: its "
        "weights, KV\n"
        "for each token, both with a whole context; and how many tokens of KV fit beside the weights. No server is "
        "needed\n"
        "and no weights are read; a folder without weights is counted as BF16. What a step needs beside is not in it.",
    .tables = (const struct cli_option *const[]){own_options, NULL},
    .exits = "0 done, 1 the model cannot be read or served, 2 wrong usage.",
    .examples = "  tandem models inspect /models/llama\n"
                "  tandem models inspect --backend cuda --memory 80G llama-70b.gguf\n",
};

struct inspect_options {
    struct cli_args args;
    const char *backend;
    uint64_t memory_bytes, context; /* 0: default */
    bool json;
};

static int take(struct inspect_options *o, int opt)
{
    const char *text = o->args.text;
    switch (opt) {
    case OPT_BACKEND:
        if (strcmp(text, "host") != 0 && strcmp(text, "cuda") != 0)
            return cmd_error(CMD_USAGE, o->args.where, "--backend %s: expected host or cuda", text);
        o->backend = text;
        break;
    case OPT_MEMORY:
        if (!cmd_parse_size(text, &o->memory_bytes))
            return cmd_error(CMD_USAGE, o->args.where, "--memory %s: expected a size, such as 512M or 80G", text);
        break;
    case OPT_CONTEXT:
        if (!cmd_parse_u64(text, 1, UINT32_MAX, &o->context))
            return cmd_error(CMD_USAGE, o->args.where, "--context %s: expected a number of tokens", text);
        break;
    default:
        o->json = true;
    }
    return CMD_OK;
}

/* ---- the worker ---- */

/* Its standard error is ours. *out: also on failure what it has printed, or NULL. */
static int run_worker(const char *path, json_t **out)
{
    char program[PATH_MAX + 32];
    int fds[2];
    ssize_t n = readlink("/proc/self/exe", program, PATH_MAX);
    char *slash = n > 0 ? memrchr(program, '/', (size_t)n) : NULL;
    if (!slash || pipe(fds))
        return cmd_error(CMD_FAILED, "models", "cannot start tandem-worker: %s", strerror(errno));
    snprintf(slash, 32, "/tandem-worker");
    if (access(program, X_OK)) {
        close(fds[0]);
        close(fds[1]);
        return cmd_error(CMD_FAILED, "models", "%s: %s; it must lie beside this program", program, strerror(errno));
    }
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fds[1], STDOUT_FILENO);
        close(fds[0]);
        close(fds[1]);
        execl(program, "tandem-worker", "--inspect", path, (char *)NULL);
        _exit(127);
    }
    close(fds[1]);
    FILE *f = fdopen(fds[0], "r");
    json_error_t error;
    json_t *got = f && pid > 0 ? json_loadf(f, 0, &error) : NULL;
    if (f)
        fclose(f);
    else
        close(fds[0]);
    int status = -1;
    if (pid > 0)
        waitpid(pid, &status, 0);
    *out = got;
    if (status || !got) {
        if (pid > 0 && WIFEXITED(status) && WEXITSTATUS(status) == CMD_FAILED)
            return CMD_FAILED; /* it has said why */
        return cmd_error(CMD_FAILED, "models", "tandem-worker --inspect ended with status %d", status);
    }
    return CMD_OK;
}

/* ---- figures ---- */

static uint64_t number(const json_t *object, const char *key)
{
    return (uint64_t)json_integer_value(json_object_get(object, key));
}

/* Adds what follows from a memory to each group: of its largest rank, as the scheduler counts with the fullest. */
static void add_group(const struct inspect_options *o, json_t *group, size_t ranks, uint64_t context)
{
    uint64_t weights = 0, kv = 0, memory = o->memory_bytes;
    json_t *rank;
    size_t i;
    json_array_foreach(json_object_get(group, "ranks"), i, rank)
    {
        const json_t *held = json_object_get(rank, o->backend);
        uint64_t w = number(held, "weight_bytes"), k = number(held, "kv_token_bytes");
        weights = w > weights ? w : weights;
        kv = k > kv ? k : kv;
    }
    if (!memory && strcmp(o->backend, "host") == 0)
        memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE) / ranks;
    uint64_t total = weights + kv * context, left = memory > weights ? memory - weights : 0;
    json_object_set_new(group, "weight_bytes", json_integer((json_int_t)weights));
    json_object_set_new(group, "kv_token_bytes", json_integer((json_int_t)kv));
    json_object_set_new(group, "total_bytes", json_integer((json_int_t)total));
    if (!memory)
        return;
    json_object_set_new(group, "memory_bytes", json_integer((json_int_t)memory));
    json_object_set_new(group, "kv_tokens", json_integer((json_int_t)(kv ? left / kv : 0)));
    json_object_set_new(group, "fits", json_boolean(total <= memory));
}

static const char *size_text(uint64_t bytes, char out[16])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double v = (double)bytes;
    int u = 0;
    for (; v >= 1024 && u < 4; u++)
        v /= 1024;
    snprintf(out, 16, u ? "%.1f %s" : "%.0f %s", v, units[u]);
    return out;
}

static void show(const struct inspect_options *o, const json_t *m, uint64_t context)
{
    char a[16], b[16], c[16], d[16];
    double parameters = (double)number(m, "parameters");
    printf("%s: %" PRIu64 " layers, hidden %" PRIu64 ", %" PRIu64 " query heads and %" PRIu64 " KV heads of %" PRIu64
           ", MLP %" PRIu64 ", vocabulary %" PRIu64 ", context %" PRIu64 "\n",
           json_string_value(json_object_get(m, "architecture")), number(m, "layers"), number(m, "hidden_size"),
           number(m, "query_heads"), number(m, "kv_heads"), number(m, "head_dim"), number(m, "intermediate_size"),
           number(m, "vocab_size"), number(m, "max_context_tokens"));
    printf("%.*f %s parameters%s%s\n\n", parameters < 1e9 ? 1 : 2,
           parameters < 1e9 ? parameters / 1e6 : parameters / 1e9, parameters < 1e9 ? "million" : "billion",
           json_is_true(json_object_get(m, "tied")) ? ", embedding and head are one" : "",
           json_is_true(json_object_get(m, "has_weights")) ? "" : "; no weights here, counted as BF16");
    printf("Of the largest rank, %s back end; with KV for %" PRIu64 " tokens:\n\n", o->backend, context);
    printf("  ranks     weights  KV a token    together      memory   KV tokens\n");
    const json_t *group;
    size_t i;
    json_array_foreach(json_object_get(m, "groups"), i, group)
    {
        const json_t *fits = json_object_get(group, "fits");
        printf("  %5zu  %10s  %10s  %10s", i + 1, size_text(number(group, "weight_bytes"), a),
               size_text(number(group, "kv_token_bytes"), b), size_text(number(group, "total_bytes"), c));
        if (fits)
            printf("  %10s  %10" PRIu64 "%s", size_text(number(group, "memory_bytes"), d), number(group, "kv_tokens"),
                   json_is_true(fits) ? "" : "  does not fit");
        putchar('\n');
    }
}

int cmd_models(int argc, char **argv)
{
    struct inspect_options o = {.backend = "host"};
    json_t *m = NULL;
    int rc = cmd_read(&o.args, &cmd_models_cli, argc, argv);
    if (rc)
        goto done;
    for (int opt; !rc && (opt = cli_next(&o.args)) != 0;)
        rc = take(&o, opt);
    if (!rc && (o.args.n_operands != 2 || strcmp(o.args.operands[0], "inspect") != 0))
        rc = cmd_error(CMD_USAGE, "models", "expected inspect and one folder or file; see `tandem models --help`");
    if (!rc)
        rc = run_worker(o.args.operands[1], &m);
    if (rc && o.json && json_object_get(m, "error")) {
        json_dumpf(m, stdout, JSON_COMPACT);
        putchar('\n');
    }
    if (rc)
        goto done;
    uint64_t context = o.context ? o.context : number(m, "max_context_tokens");
    json_t *group;
    size_t i;
    json_array_foreach(json_object_get(m, "groups"), i, group) add_group(&o, group, i + 1, context);
    json_object_set_new(m, "backend", json_string(o.backend));
    json_object_set_new(m, "context_tokens", json_integer((json_int_t)context));
    if (o.json) {
        json_dumpf(m, stdout, JSON_INDENT(2));
        putchar('\n');
    } else {
        show(&o, m, context);
    }
    if (fflush(stdout))
        rc = cmd_error(CMD_FAILED, "models", "writing stdout: %s", strerror(errno));
done:
    json_decref(m);
    cli_free(&o.args);
    return rc < 0 ? CMD_OK : rc;
}
