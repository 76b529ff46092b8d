/* cli.h - a command's options, from one table: the command line, the environment, the configuration file, --help, the man
 * page and the completion of shells. Prefix cli_.
 *
 *     static const struct cli_option options[] = {
 *         {.name = "top-k", .id = OPT_TOP_K, .arg = "K", .help = "sample among the K likeliest tokens"}, {0}};
 *     ... cli_read(&args, &command, all, argc, argv, &st);
 *     for (int id; (id = cli_next(&args)) != 0;)
 *         take(id, args.text);                      // lower origins first, so the last one wins
 *     cli_free(&args);
 *
 * One option has the values of one origin, the highest that names it:
 *
 *     4  --top-k 5                         the command line
 *     3  TANDEM_GENERATE_TOP_K=5           environment, for one command; empty is not set
 *     2  TANDEM_TOP_K=5                    environment
 *     1  [generate]  top-k = 5             configuration file, section of the command
 *     0  top-k = 5                         the same, above all sections: for every command that has the option
 *
 * The file is the one of --config, else of TANDEM_CONFIG (empty: none), else $XDG_CONFIG_HOME/tandem/tandem.conf (by default
 * ~/.config), else /etc/tandem/tandem.conf; only the latter two may be absent. Its form is in cli_file.c.
 * Threads: none of its own; reads the environment.
 */
#ifndef TANDEM_CLI_H
#define TANDEM_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "proto/status.h"

#define CLI_LINE_ONLY 1u /* on the command line only */
#define CLI_REPEAT    2u /* may be given several times; one a line in the environment */
#define CLI_FILE      4u /* the value is a path: for completion */
#define CLI_REQUIRED  8u /* for help; the command itself asks for it */

struct cli_option {
    const char *name;     /* without the dashes; NULL ends a table */
    const char *arg;      /* the name of its value; NULL: a switch, which --NAME=false turns off again */
    const char *choices;  /* "auto|cuda|host", for completion; the command itself checks values */
    const char *fallback; /* the default, as it would be written; NULL: none, or help says it */
    const char *help;
    int id; /* what cli_next returns, over 0 */
    unsigned flags;
};

struct cli_command {
    const char *name, *summary;
    const char *operands;                   /* "[PROMPT]"; NULL: none */
    const char *words;                      /* "bash|zsh|fish": what the first operand may be, for completion */
    const char *about;                      /* paragraphs, no line longer than 100 */
    const struct cli_option *const *tables; /* NULL ends */
    const char *notes;                      /* signals and the like, or NULL */
    const char *exits;                      /* exit status, one sentence */
    const char *examples;                   /* lines */
    bool hands_on;                          /* what follows the first operand is not for this command */
};

enum cli_origin { CLI_TOP, CLI_SECTION, CLI_ENV, CLI_ENV_COMMAND, CLI_ARGUMENT };

struct cli_value {
    const struct cli_option *option;
    char *text; /* "" of a switch that is on */
    bool off;   /* a switch that is off */
    enum cli_origin origin;
    char *where; /* "/etc/tandem/tandem.conf:3", "TANDEM_TOP_K", "command line" */
};

/* All zero before cli_read. */
struct cli_args {
    const struct cli_command *command;
    struct cli_value *values; /* ascending origins */
    size_t n_values, at;
    char **operands; /* of argv */
    int n_operands;
    bool help;    /* --help was there; the rest may be incomplete */
    char *config; /* path of the file, NULL: none */
    /* by cli_next */
    char *text;      /* the value, lives until cli_free */
    char where[192]; /* for messages: "generate", or "generate: TANDEM_TOP_K" where it is not from the command line */
};

/* all: every command, NULL at the end, since a file has sections for all of them. argv[0] is the command's name.
 * INVALID_ARGUMENT, NOT_FOUND (a file that was named), PERMISSION_DENIED, RESOURCE_EXHAUSTED. cli_free in any case. */
STATUS_MUST_CHECK enum status_code cli_read(struct cli_args *a, const struct cli_command *command,
                                            const struct cli_command *const *all, int argc, char **argv,
                                            struct status *st);
/* The next option's id; 0 at the end. */
int cli_next(struct cli_args *a);
/* The values that count, for `tandem config`: in order of the option's tables; NULL where there is none. */
const struct cli_value *cli_find(const struct cli_args *a, const struct cli_option *o, size_t nth);
void cli_free(struct cli_args *a);

/* NULL: no such option. abbreviation: also by a beginning that only one option has. n: length of name. */
const struct cli_option *cli_option_find(const struct cli_command *c, const char *name, size_t n, bool abbreviation);
const struct cli_command *cli_command_find(const struct cli_command *const *all, const char *name, size_t n);
/* Common to all commands: --config, --help. */
extern const struct cli_option cli_common[];

/* ---- the configuration file ---- */

#define CLI_FILE_MAX_BYTES   (1u << 20)
#define CLI_FILE_MAX_ENTRIES 4096

struct cli_file_entry {
    const char *section, *key, *value; /* section "": above all sections */
    unsigned line;
};
struct cli_file {
    char *text;
    struct cli_file_entry *entries;
    size_t n;
};
/* Syntax only. name: for messages. INVALID_ARGUMENT: "NAME:LINE: ...". */
STATUS_MUST_CHECK enum status_code cli_file_parse(struct cli_file *out, const char *name, const char *text,
                                                  size_t bytes, struct status *st);
STATUS_MUST_CHECK enum status_code cli_file_load(struct cli_file *out, const char *path, struct status *st);
void cli_file_free(struct cli_file *f); /* fine on zeroed memory */
/* As a value of a file, in quotes where it needs them. */
void cli_file_write(FILE *to, const char *value);

/* ---- what is made from the tables ---- */

void cli_help(FILE *to, const struct cli_command *c);
/* man(7) source of tandem-NAME(1); c NULL: of tandem(1). */
void cli_man(FILE *to, const struct cli_command *c, const struct cli_command *const *all);
/* shell: "bash", "zsh" or "fish"; false: another. */
bool cli_completion(FILE *to, const char *shell, const struct cli_command *const *all);

#endif
