/* cmd.h - the subcommands of `tandem`. Each takes argv with argv[0] the subcommand's name and returns the exit status:
 * 0 done, 1 failed (one line on stderr says why and what to do), 2 wrong usage, 3 server not reachable or not serving. */
#ifndef TANDEM_CMD_H
#define TANDEM_CMD_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/status.h"

enum {
    CMD_OK = 0,
    CMD_FAILED = 1,
    CMD_USAGE = 2,
    CMD_UNREACHABLE = 3,
};

#define CMD_DEFAULT_ADDRESS "127.0.0.1:50051"

int cmd_serve(int argc, char **argv);
int cmd_generate(int argc, char **argv);
int cmd_tokenize(int argc, char **argv);
int cmd_probe(int argc, char **argv);

/* Prints "tandem <command>: <text>" on stderr and returns `rc`. */
int cmd_error(int rc, const char *command, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* "tandem <command>: unknown option ...; see tandem <command> --help", CMD_USAGE. For getopt_long's '?' and ':'. */
int cmd_bad_option(const char *command, char **argv, int opt);

/* Numbers from the command line; false when text is not wholly a number within [lo, hi]. */
bool cmd_parse_u64(const char *text, uint64_t lo, uint64_t hi, uint64_t *out);
bool cmd_parse_double(const char *text, double lo, double hi, double *out);

#endif
