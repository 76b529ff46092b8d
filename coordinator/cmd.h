/* cmd.h - the subcommands of `tandem`. Each takes argv with argv[0] the subcommand's name and returns the exit status:
 * 0 done, 1 failed (one line on stderr says why and what to do), 2 wrong usage, 3 server not reachable or not serving. */
#ifndef TANDEM_CMD_H
#define TANDEM_CMD_H

#include <stdbool.h>
#include <stdint.h>

#include "coordinator/cli.h"
#include "proto/tandem_client.h"

enum {
    CMD_OK = 0,
    CMD_FAILED = 1,
    CMD_USAGE = 2,
    CMD_UNREACHABLE = 3,
};

#define CMD_DEFAULT_ADDRESS TANDEM_DEFAULT_ADDRESS

/* Options of every command that talks to a server. */
enum {
    CMD_OPT_ADDRESS = 1000,
    CMD_OPT_TLS,
    CMD_OPT_TLS_CA,
    CMD_OPT_TLS_CERT,
    CMD_OPT_TLS_KEY,
    CMD_OPT_TLS_NAME,
    CMD_OPT_TOKEN
};
extern const struct cli_option cmd_connect_options[];
/* True: opt was one of them. The text is kept, not copied. */
bool cmd_connect_option(struct tandem_client_options *o, int opt, const char *text);

extern const struct cli_command cmd_serve_cli, cmd_generate_cli, cmd_chat_cli, cmd_bench_cli, cmd_simulate_cli,
    cmd_dump_cli, cmd_top_cli, cmd_tokenize_cli, cmd_probe_cli, cmd_drain_cli, cmd_memory_cli, cmd_models_cli,
    cmd_config_cli, cmd_completion_cli, cmd_man_cli;
/* Those of all commands; NULL ends. */
extern const struct cli_command *const cmd_all[];

int cmd_serve(int argc, char **argv);
int cmd_generate(int argc, char **argv);
int cmd_models(int argc, char **argv);
int cmd_chat(int argc, char **argv);
int cmd_bench(int argc, char **argv);
int cmd_simulate(int argc, char **argv);
int cmd_dump(int argc, char **argv);
int cmd_top(int argc, char **argv);
int cmd_tokenize(int argc, char **argv);
int cmd_probe(int argc, char **argv);
int cmd_drain(int argc, char **argv);
int cmd_memory(int argc, char **argv);
int cmd_config(int argc, char **argv);
int cmd_completion(int argc, char **argv);
int cmd_man(int argc, char **argv);

/* Prints "tandem <command>: <text>" on stderr and returns `rc`. */
int cmd_error(int rc, const char *command, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The same of a call's end, with its code; json: also {"error":{"code":...,"message":...}} on standard output, on a line. */
int cmd_failed(int rc, const char *command, bool json, const struct status *st);
/* A JSON string of any bytes; what is no UTF-8 becomes '?'. */
struct json_t *cmd_json_string(const char *text);
/* cli_read for a command. CMD_OK; -1 when help was printed; else a line on stderr has said why. cli_free in any case. */
int cmd_read(struct cli_args *a, const struct cli_command *c, int argc, char **argv);

/* Numbers from the command line; false when text is not wholly a number within [lo, hi]. */
bool cmd_parse_u64(const char *text, uint64_t lo, uint64_t hi, uint64_t *out);
bool cmd_parse_double(const char *text, double lo, double hi, double *out);
bool cmd_parse_size(const char *text, uint64_t *out); /* bytes, over 0: 65536, 512M, 8G; powers of 1024 */
/* The present option's value (cli_next): CMD_OK, or CMD_USAGE after a message. */
int cmd_take_u32(const struct cli_args *a, uint32_t lo, uint32_t hi, uint32_t *out);
int cmd_take_double(const struct cli_args *a, double lo, double hi, double *out);

#endif
