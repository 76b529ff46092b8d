/* cmd_sampling.h - the options of a command that say how an answer is made: Sampling, Stopping, Output and Scheduling. Prefix
 * cmd_sampling_. */
#ifndef TANDEM_CMD_SAMPLING_H
#define TANDEM_CMD_SAMPLING_H

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
    CMD_OPT_TTFT_TARGET,
    CMD_OPT_TBT_TARGET,
    CMD_OPT_PRIORITY,
    CMD_OPT_TENANT,
};
extern const struct cli_option cmd_sampling_options[]; /* Sampling and Stopping but n; Scheduling */
extern const struct cli_option cmd_output_options[];   /* n and Output */

struct cmd_sampling {
    Tandem__V1__Sampling sampling;
    Tandem__V1__Stopping stopping;
    Tandem__V1__Output output;
    Tandem__V1__Scheduling scheduling;
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
/* False: opt is of neither table. *rc: CMD_OK, or an exit status after a message. The text is kept, not copied. */
bool cmd_sampling_option(struct cmd_sampling *s, const char *command, int opt, char *text, int *rc);

/* A JSON array of token ids, not empty; *ids is malloc'ed, what was there is freed. */
int cmd_parse_ids(const char *command, const char *option, const char *text, uint32_t **ids, size_t *n);

/* One JSON object on one line of standard output. */
void cmd_print_json(const Tandem__V1__GenerateResponse *m);

#endif
