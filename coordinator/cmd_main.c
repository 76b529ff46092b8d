/* cmd_main.c - the `tandem` command: finds the subcommand and runs it. */
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/cmd.h"

static const struct command {
    const struct cli_command *cli;
    int (*run)(int argc, char **argv);
} commands[] = {
    {&cmd_serve_cli, cmd_serve},       {&cmd_models_cli, cmd_models},
    {&cmd_chat_cli, cmd_chat},         {&cmd_generate_cli, cmd_generate},
    {&cmd_bench_cli, cmd_bench},       {&cmd_simulate_cli, cmd_simulate},
    {&cmd_dump_cli, cmd_dump},         {&cmd_top_cli, cmd_top},
    {&cmd_tokenize_cli, cmd_tokenize}, {&cmd_probe_cli, cmd_probe},
    {&cmd_drain_cli, cmd_drain},       {&cmd_memory_cli, cmd_memory},
    {&cmd_config_cli, cmd_config},     {&cmd_completion_cli, cmd_completion},
    {&cmd_man_cli, cmd_man},
};

#define N_COMMANDS (sizeof commands / sizeof *commands)

const struct cli_command *const cmd_all[] = {
    &cmd_serve_cli,  &cmd_generate_cli,   &cmd_chat_cli,  &cmd_bench_cli, &cmd_simulate_cli, &cmd_dump_cli,
    &cmd_top_cli,    &cmd_tokenize_cli,   &cmd_probe_cli, &cmd_drain_cli, &cmd_memory_cli,   &cmd_models_cli,
    &cmd_config_cli, &cmd_completion_cli, &cmd_man_cli,   NULL,
};

const struct cli_option cmd_connect_options[] = {
    {.name = "address",
     .id = CMD_OPT_ADDRESS,
     .arg = "ADDR",
     .fallback = CMD_DEFAULT_ADDRESS,
     .help = "host:port or unix:/path"},
    {.name = "tls", .id = CMD_OPT_TLS, .help = "TLS, with the system's certificates"},
    {.name = "tls-ca",
     .id = CMD_OPT_TLS_CA,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "TLS: the server's certificate must be signed by one of these (PEM)"},
    {.name = "tls-cert",
     .id = CMD_OPT_TLS_CERT,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "show this certificate to the server (PEM)"},
    {.name = "tls-key", .id = CMD_OPT_TLS_KEY, .arg = "FILE", .flags = CLI_FILE, .help = "its private key (PEM)"},
    {.name = "tls-server-name",
     .id = CMD_OPT_TLS_NAME,
     .arg = "NAME",
     .help = "name in the server's certificate (default: the host of ADDR)"},
    {.name = "token-file",
     .id = CMD_OPT_TOKEN,
     .arg = "FILE",
     .flags = CLI_FILE,
     .help = "bearer token to send with every call"},
    {0},
};

static void print_help(FILE *f)
{
    fputs("tandem serves large language models on a group of tensor-parallel ranks.\n\n"
          "usage: tandem COMMAND [OPTIONS]\n\n",
          f);
    for (size_t i = 0; i < N_COMMANDS; i++)
        fprintf(f, "  %-11s %s\n", commands[i].cli->name, commands[i].cli->summary);
    fputs("\nA first session:\n\n"
          "  tandem serve --model DIR --tp 2          # DIR: a Hugging Face model folder\n"
          "  tandem generate \"Once upon a time\"       # in another terminal\n\n"
          "`tandem COMMAND --help` explains a command; `tandem --version` prints the version.\n",
          f);
}

int cmd_error(int rc, const char *command, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    fflush(stdout);
    fprintf(stderr, "tandem %s: %s\n", command, text);
    return rc;
}

int cmd_read(struct cli_args *a, const struct cli_command *c, int argc, char **argv)
{
    struct status st = STATUS_INIT;
    enum status_code rc = cli_read(a, c, cmd_all, argc, argv, &st);
    if (rc == ST_RESOURCE_EXHAUSTED)
        return cmd_error(CMD_FAILED, c->name, "%s", st.message);
    if (rc != ST_OK)
        return cmd_error(CMD_USAGE, c->name, "%s", st.message);
    if (!a->help)
        return CMD_OK;
    cli_help(stdout, c);
    return -1;
}

bool cmd_parse_u64(const char *text, uint64_t lo, uint64_t hi, uint64_t *out)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || v < lo || v > hi)
        return false;
    *out = v;
    return true;
}

bool cmd_parse_size(const char *text, uint64_t *out)
{
    static const char letters[] = "KMGT";
    char number[24];
    uint64_t v = 0;
    size_t n = strspn(text, "0123456789");
    const char *letter = text[n] ? strchr(letters, toupper((unsigned char)text[n])) : NULL;
    unsigned shift = letter ? 10 * (unsigned)(letter - letters + 1) : 0;
    if (n >= sizeof number || (text[n] && (!letter || text[n + 1])))
        return false;
    snprintf(number, sizeof number, "%.*s", (int)n, text);
    if (!cmd_parse_u64(number, 1, UINT64_MAX >> shift, &v))
        return false;
    *out = v << shift;
    return true;
}

bool cmd_parse_double(const char *text, double lo, double hi, double *out)
{
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || !isfinite(v) || v < lo || v > hi)
        return false;
    *out = v;
    return true;
}

int cmd_take_u32(const struct cli_args *a, uint32_t lo, uint32_t hi, uint32_t *out)
{
    uint64_t v;
    if (!cmd_parse_u64(a->text, lo, hi, &v))
        return cmd_error(CMD_USAGE, a->where, "%s: expected a number from %u to %u", a->text, lo, hi);
    *out = (uint32_t)v;
    return CMD_OK;
}

int cmd_take_double(const struct cli_args *a, double lo, double hi, double *out)
{
    if (!cmd_parse_double(a->text, lo, hi, out))
        return cmd_error(CMD_USAGE, a->where, "%s: expected a number from %g to %g", a->text, lo, hi);
    return CMD_OK;
}

bool cmd_connect_option(struct tandem_client_options *o, int opt, const char *text)
{
    switch (opt) {
    case CMD_OPT_ADDRESS:
        o->address = text;
        return true;
    case CMD_OPT_TLS:
        o->tls = true;
        return true;
    case CMD_OPT_TLS_CA:
        o->tls_ca = text;
        return true;
    case CMD_OPT_TLS_CERT:
        o->tls_cert = text;
        return true;
    case CMD_OPT_TLS_KEY:
        o->tls_key = text;
        return true;
    case CMD_OPT_TLS_NAME:
        o->tls_server_name = text;
        return true;
    case CMD_OPT_TOKEN:
        o->token_file = text;
        return true;
    default:
        return false;
    }
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        print_help(stderr);
        return CMD_USAGE;
    }
    const char *name = argv[1];
    if (!strcmp(name, "--help") || !strcmp(name, "-h") || !strcmp(name, "help")) {
        print_help(stdout);
        return CMD_OK;
    }
    if (!strcmp(name, "--version") || !strcmp(name, "version")) {
        puts("tandem " TANDEM_VERSION);
        return CMD_OK;
    }
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (!strcmp(name, commands[i].cli->name))
            return commands[i].run(argc - 1, argv + 1);
    fprintf(stderr, "tandem: unknown command %s; see `tandem --help`\n", name);
    return CMD_USAGE;
}
