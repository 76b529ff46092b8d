/* cmd.h - the subcommands of `tandem`. Each takes argv with argv[0] the subcommand's name and returns the exit status:
 * 0 done, 1 failed (one line on stderr says why and what to do), 2 wrong usage, 3 server not reachable or not serving. */
#ifndef TANDEM_CMD_H
#define TANDEM_CMD_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/tandem_client.h"

enum {
    CMD_OK = 0,
    CMD_FAILED = 1,
    CMD_USAGE = 2,
    CMD_UNREACHABLE = 3,
};

#define CMD_DEFAULT_ADDRESS TANDEM_DEFAULT_ADDRESS

/* Options of every command that talks to a server: for its table of getopt_long and for its help. */
enum { CMD_OPT_TLS = 1000, CMD_OPT_TLS_CA, CMD_OPT_TLS_CERT, CMD_OPT_TLS_KEY, CMD_OPT_TLS_NAME, CMD_OPT_TOKEN };
/* clang-format off */
#define CMD_CONNECT_OPTIONS                                                                                            \
    {"address", required_argument, 0, 'a'},                                                                            \
    {"tls", no_argument, 0, CMD_OPT_TLS},                                                                              \
    {"tls-ca", required_argument, 0, CMD_OPT_TLS_CA},                                                                  \
    {"tls-cert", required_argument, 0, CMD_OPT_TLS_CERT},                                                              \
    {"tls-key", required_argument, 0, CMD_OPT_TLS_KEY},                                                                \
    {"tls-server-name", required_argument, 0, CMD_OPT_TLS_NAME},                                                       \
    {"token-file", required_argument, 0, CMD_OPT_TOKEN}
/* clang-format on */
#define CMD_CONNECT_HELP                                                                                               \
    "  --address ADDR        host:port or unix:/path (default " CMD_DEFAULT_ADDRESS ")\n"                              \
    "  --tls                 TLS, with the system's certificates\n"                                                    \
    "  --tls-ca FILE         TLS: the server's certificate must be signed by one of these (PEM)\n"                     \
    "  --tls-cert FILE, --tls-key FILE   show this certificate to the server (PEM)\n"                                  \
    "  --tls-server-name NAME   name in the server's certificate (default: the host of ADDR)\n"                        \
    "  --token-file FILE     bearer token to send with every call\n"
/* True: opt was one of CMD_CONNECT_OPTIONS. */
bool cmd_connect_option(struct tandem_client_options *o, int opt);

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
