/* cmd_sampling.h - the options of a command that say how an answer is made: Sampling, Stopping and Output. Prefix
 * cmd_sampling_. */
#ifndef TANDEM_CMD_SAMPLING_H
#define TANDEM_CMD_SAMPLING_H

#include <getopt.h>

#include "coordinator/cmd.h"

#define CMD_MAX_STOP_IDS 64
#define CMD_MAX_STOPS    32
#define CMD_MAX_BIASES   1024

enum {
    CMD_OPT_MAX_TOKENS = 1100,
    CMD_OPT_GREEDY,
    CMD_OPT_TEMPERATURE,
    CMD_OPT_TOP_K,
    CMD_OPT_TOP_P,
    CMD_OPT_MIN_P,
    CMD_OPT_TYPICAL_P,
    CMD_OPT_REPETITION,
    CMD_OPT_PRESENCE,
    CMD_OPT_FREQUENCY,
    CMD_OPT_BIAS,
    CMD_OPT_ALLOWED,
    CMD_OPT_SEED,
    CMD_OPT_N,
    CMD_OPT_STOP_ID,
    CMD_OPT_STOP,
    CMD_OPT_INCLUDE_STOP,
    CMD_OPT_MIN_TOKENS,
    CMD_OPT_IGNORE_EOS,
    CMD_OPT_LOGPROBS,
    CMD_OPT_PROMPT_LOGPROBS,
    CMD_OPT_ECHO,
};
/* clang-format off */
#define CMD_SAMPLING_OPTIONS                                                                                           \
    {"max-tokens", required_argument, 0, CMD_OPT_MAX_TOKENS},                                                          \
    {"greedy", no_argument, 0, CMD_OPT_GREEDY},                                                                        \
    {"temperature", required_argument, 0, CMD_OPT_TEMPERATURE},                                                        \
    {"top-k", required_argument, 0, CMD_OPT_TOP_K},                                                                    \
    {"top-p", required_argument, 0, CMD_OPT_TOP_P},                                                                    \
    {"min-p", required_argument, 0, CMD_OPT_MIN_P},                                                                    \
    {"typical-p", required_argument, 0, CMD_OPT_TYPICAL_P},                                                            \
    {"repetition-penalty", required_argument, 0, CMD_OPT_REPETITION},                                                  \
    {"presence-penalty", required_argument, 0, CMD_OPT_PRESENCE},                                                      \
    {"frequency-penalty", required_argument, 0, CMD_OPT_FREQUENCY},                                                    \
    {"logit-bias", required_argument, 0, CMD_OPT_BIAS},                                                                \
    {"allowed-ids", required_argument, 0, CMD_OPT_ALLOWED},                                                            \
    {"seed", required_argument, 0, CMD_OPT_SEED},                                                                      \
    {"n", required_argument, 0, CMD_OPT_N},                                                                            \
    {"stop-token-id", required_argument, 0, CMD_OPT_STOP_ID},                                                          \
    {"stop", required_argument, 0, CMD_OPT_STOP},                                                                      \
    {"include-stop", no_argument, 0, CMD_OPT_INCLUDE_STOP},                                                            \
    {"min-tokens", required_argument, 0, CMD_OPT_MIN_TOKENS},                                                          \
    {"ignore-eos", no_argument, 0, CMD_OPT_IGNORE_EOS},                                                                \
    {"logprobs", required_argument, 0, CMD_OPT_LOGPROBS},                                                              \
    {"prompt-logprobs", required_argument, 0, CMD_OPT_PROMPT_LOGPROBS},                                                \
    {"echo", no_argument, 0, CMD_OPT_ECHO}
/* clang-format on */
#define CMD_SAMPLING_HELP                                                                                              \
    "  --max-tokens N        stop after N new tokens (default: the server's)\n"                                        \
    "  --greedy              always the likeliest token; the same as --temperature 0\n"                                \
    "  --temperature T       0 to 100 (default: the model's own)\n"                                                    \
    "  --top-k K             sample among the K likeliest tokens; 0 is all\n"                                          \
    "  --top-p P             sample among the likeliest tokens that reach probability P\n"                             \
    "  --min-p P             sample what is at least P times as likely as the likeliest\n"                             \
    "  --typical-p P         sample among the most typical tokens that reach probability P\n"                          \
    "  --repetition-penalty R   over 1: less of what prompt and answer hold\n"                                         \
    "  --presence-penalty P  -2 to 2: less of what the answer holds\n"                                                 \
    "  --frequency-penalty P -2 to 2: the same for each time that it does\n"                                           \
    "  --logit-bias ID:BIAS  add -100 to 100 to a token's logit; may be given 1024 times\n"                            \
    "  --allowed-ids JSON    sample nothing but these token ids, [1, 2, 3]\n"                                          \
    "  --seed S              the same seed gives the same answer\n"                                                    \
    "  --n N                 N answers, 1 to 64; needs --json\n"                                                       \
    "  --stop-token-id ID    stop at this token as well; may be given 64 times\n"                                      \
    "  --stop TEXT           stop where this text comes, and leave it out; may be given 32 times\n"                    \
    "  --include-stop        do not leave it out\n"                                                                    \
    "  --min-tokens N        do not stop before N tokens\n"                                                            \
    "  --ignore-eos          go on after the model's end-of-sequence token\n"                                          \
    "  --logprobs N          log probability of each new token and of the N likeliest; needs --json\n"                 \
    "  --prompt-logprobs N   the same of the prompt's tokens; needs --json\n"                                          \
    "  --echo                print the prompt before the answer\n"

struct cmd_sampling {
    Tandem__V1__Sampling sampling;
    Tandem__V1__Stopping stopping;
    Tandem__V1__Output output;
    /* what they point to; the struct does not move after cmd_sampling_init */
    uint32_t stop_ids[CMD_MAX_STOP_IDS];
    char *stops[CMD_MAX_STOPS];
    Tandem__V1__LogitBias bias[CMD_MAX_BIASES], *biases[CMD_MAX_BIASES];
    uint32_t *allowed; /* malloc'ed */
};

void cmd_sampling_init(struct cmd_sampling *s);
void cmd_sampling_fini(struct cmd_sampling *s);
/* Lets the request point here. */
void cmd_sampling_apply(struct cmd_sampling *s, Tandem__V1__GenerateRequest *m);
/* False: opt is none of CMD_SAMPLING_OPTIONS. *rc: CMD_OK, or an exit status after a message. */
bool cmd_sampling_option(struct cmd_sampling *s, const char *command, int opt, int *rc);

/* A JSON array of token ids, not empty; *ids is malloc'ed, what was there is freed. */
int cmd_parse_ids(const char *command, const char *option, const char *text, uint32_t **ids, size_t *n);

/* One JSON object on one line of standard output. */
void cmd_print_json(const Tandem__V1__GenerateResponse *m);

#endif
