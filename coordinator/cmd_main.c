/* cmd_main.c - the `tandem` command: finds the subcommand and runs it. */
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/cmd.h"

static const struct command {
    const char *name;
    const char *summary;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"serve", "start a coordinator and a group of worker ranks for a model, and keep them running", cmd_serve},
    {"generate", "send a prompt to a server and print the answer as it comes", cmd_generate},
    {"tokenize", "turn text into token ids with a model's tokenizer, or back", cmd_tokenize},
    {"probe", "ask a server for its health; the exit status is the answer", cmd_probe},
};

#define N_COMMANDS (sizeof commands / sizeof *commands)

static void print_help(FILE *f)
{
    fputs("tandem serves large language models on a group of tensor-parallel ranks.\n\n"
          "usage: tandem COMMAND [OPTIONS]\n\n",
          f);
    for (size_t i = 0; i < N_COMMANDS; i++)
        fprintf(f, "  %-10s %s\n", commands[i].name, commands[i].summary);
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

int cmd_bad_option(const char *command, char **argv, int opt)
{
    /* getopt leaves optind behind a bad long option, but on the same word for a short one. */
    const char *word = optind > 0 ? argv[optind - 1] : "";
    if (opt == ':')
        return cmd_error(CMD_USAGE, command, "option %s needs a value; see `tandem %s --help`", word, command);
    return cmd_error(CMD_USAGE, command, "unknown or ambiguous option %s; see `tandem %s --help`", word, command);
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

bool cmd_parse_double(const char *text, double lo, double hi, double *out)
{
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || !isfinite(v) || v < lo || v > hi)
        return false;
    *out = v;
    return true;
}

bool cmd_connect_option(struct tandem_client_options *o, int opt)
{
    switch (opt) {
    case 'a':
        o->address = optarg;
        return true;
    case CMD_OPT_TLS:
        o->tls = true;
        return true;
    case CMD_OPT_TLS_CA:
        o->tls_ca = optarg;
        return true;
    case CMD_OPT_TLS_CERT:
        o->tls_cert = optarg;
        return true;
    case CMD_OPT_TLS_KEY:
        o->tls_key = optarg;
        return true;
    case CMD_OPT_TLS_NAME:
        o->tls_server_name = optarg;
        return true;
    case CMD_OPT_TOKEN:
        o->token_file = optarg;
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
        if (!strcmp(name, commands[i].name))
            return commands[i].run(argc - 1, argv + 1);
    fprintf(stderr, "tandem: unknown command %s; see `tandem --help`\n", name);
    return CMD_USAGE;
}
