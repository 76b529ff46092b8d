#include "coordinator/cmd_sampling.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define USAGE(...) cmd_error(CMD_USAGE, command, __VA_ARGS__)

const struct cli_option cmd_sampling_options[] = {
    {.name = "max-tokens",
     .id = CMD_OPT_MAX_TOKENS,
     .arg = "N",
     .help = "stop after N new tokens (default: the server's)"},
    {.name = "greedy", .id = CMD_OPT_GREEDY, .help = "always the likeliest token; the same as --temperature 0"},
    {.name = "temperature", .id = CMD_OPT_TEMPERATURE, .arg = "T", .help = "0 to 100 (default: the model's own)"},
    {.name = "top-k", .id = CMD_OPT_TOP_K, .arg = "K", .help = "sample among the K likeliest tokens; 0 is all"},
    {.name = "top-p",
     .id = CMD_OPT_TOP_P,
     .arg = "P",
     .help = "sample among the likeliest tokens that reach probability P"},
    {.name = "min-p",
     .id = CMD_OPT_MIN_P,
     .arg = "P",
     .help = "sample what is at least P times as likely as the likeliest"},
    {.name = "typical-p",
     .id = CMD_OPT_TYPICAL_P,
     .arg = "P",
     .help = "sample among the most typical tokens that reach probability P"},
    {.name = "repetition-penalty",
     .id = CMD_OPT_REPETITION,
     .arg = "R",
     .help = "over 1: less of what prompt and answer hold"},
    {.name = "presence-penalty", .id = CMD_OPT_PRESENCE, .arg = "P", .help = "-2 to 2: less of what the answer holds"},
    {.name = "frequency-penalty",
     .id = CMD_OPT_FREQUENCY,
     .arg = "P",
     .help = "-2 to 2: the same for each time that it does"},
    {.name = "logit-bias",
     .id = CMD_OPT_BIAS,
     .arg = "ID:BIAS",
     .flags = CLI_REPEAT,
     .help = "add -100 to 100 to a token's logit, 1024 of them at most"},
    {.name = "allowed-ids",
     .id = CMD_OPT_ALLOWED,
     .arg = "JSON",
     .help = "sample nothing but these token ids, [1, 2, 3]"},
    {.name = "seed", .id = CMD_OPT_SEED, .arg = "S", .help = "the same seed gives the same answer"},
    {.name = "stop-token-id",
     .id = CMD_OPT_STOP_ID,
     .arg = "ID",
     .flags = CLI_REPEAT,
     .help = "stop at this token as well, 64 of them at most"},
    {.name = "stop",
     .id = CMD_OPT_STOP,
     .arg = "TEXT",
     .flags = CLI_REPEAT,
     .help = "stop where this text comes, and leave it out, 32 of them at most"},
    {.name = "include-stop", .id = CMD_OPT_INCLUDE_STOP, .help = "do not leave it out"},
    {.name = "min-tokens", .id = CMD_OPT_MIN_TOKENS, .arg = "N", .help = "do not stop before N tokens"},
    {.name = "ignore-eos", .id = CMD_OPT_IGNORE_EOS, .help = "go on after the model's end-of-sequence token"},
    {.name = "ttft-target-ms",
     .id = CMD_OPT_TTFT_TARGET,
     .arg = "T",
     .help = "milliseconds to the first token; 0: any (default: the server's)"},
    {.name = "tbt-target-ms",
     .id = CMD_OPT_TBT_TARGET,
     .arg = "T",
     .help = "milliseconds between two tokens; 0: any (default: the server's)"},
    {.name = "priority", .id = CMD_OPT_PRIORITY, .arg = "N", .help = "1 goes before 0, and 0 before -1 (default: 0)"},
    {.name = "tenant",
     .id = CMD_OPT_TENANT,
     .arg = "NAME",
     .help = "for whom; tenants get equally much of a server that is full"},
    {0},
};

const struct cli_option cmd_output_options[] = {
    {.name = "n", .id = CMD_OPT_N, .arg = "N", .help = "N answers, 1 to 64; needs --json"},
    {.name = "logprobs",
     .id = CMD_OPT_LOGPROBS,
     .arg = "N",
     .help = "log probability of each new token and of the N likeliest; needs --json"},
    {.name = "prompt-logprobs",
     .id = CMD_OPT_PROMPT_LOGPROBS,
     .arg = "N",
     .help = "the same of the prompt's tokens; needs --json"},
    {.name = "echo", .id = CMD_OPT_ECHO, .help = "print the prompt before the answer"},
    {0},
};

void cmd_sampling_init(struct cmd_sampling *s)
{
    memset(s, 0, sizeof *s);
    tandem__v1__sampling__init(&s->sampling);
    tandem__v1__stopping__init(&s->stopping);
    tandem__v1__output__init(&s->output);
    tandem__v1__scheduling__init(&s->scheduling);
    s->sampling.logit_bias = s->biases;
    s->stopping.stop_token_ids = s->stop_ids;
    s->stopping.stop = s->stops;
}

void cmd_sampling_fini(struct cmd_sampling *s)
{
    free(s->allowed);
}

void cmd_sampling_apply(struct cmd_sampling *s, Tandem__V1__GenerateRequest *m)
{
    m->sampling = &s->sampling;
    m->stopping = &s->stopping;
    m->output = &s->output;
    m->scheduling = &s->scheduling;
}

int cmd_parse_ids(const char *command, const char *option, const char *text, uint32_t **ids, size_t *n)
{
    json_t *array = json_loads(text, 0, NULL);
    size_t count = json_array_size(array);
    if (!json_is_array(array) || !count) {
        json_decref(array);
        return USAGE("%s: expected a JSON array of token ids, such as [1, 2, 3]", option);
    }
    free(*ids);
    *ids = malloc(count * sizeof **ids);
    for (size_t i = 0; *ids && i < count; i++) {
        json_t *id = json_array_get(array, i);
        json_int_t v = json_is_integer(id) ? json_integer_value(id) : -1;
        if (v < 0 || v > UINT32_MAX) {
            json_decref(array);
            return USAGE("%s: element %zu is not a token id", option, i);
        }
        (*ids)[i] = (uint32_t)v;
    }
    json_decref(array);
    if (!*ids)
        return cmd_error(CMD_FAILED, command, "out of memory for %zu ids", count);
    *n = count;
    return CMD_OK;
}

/* ---- numbers ---- */

/* The `optional` fields of a message: where they are, and which value of NAME_is_case says that they are set. */
struct real_option {
    int opt, set;
    const char *name, *expected;
    double low, high;
    float *value;
    int *is_case;
    bool over_low;
};

#define REAL(OPT, NAME, FIELD, CASE, LOW, HIGH, OVER, EXPECTED)                                                        \
    {                                                                                                                  \
        .opt = (OPT), .name = (NAME), .expected = (EXPECTED), .low = (LOW), .high = (HIGH), .over_low = (OVER),        \
        .value = &s->sampling.FIELD, .is_case = (int *)&s->sampling.FIELD##_is_case,                                   \
        .set = TANDEM__V1__SAMPLING__##CASE                                                                            \
    }

/* False: not one of these. */
static bool real_option(struct cmd_sampling *s, const char *command, int opt, const char *text, int *rc)
{
    const struct real_option table[] = {
        REAL(CMD_OPT_TEMPERATURE, "temperature", temperature, TEMPERATURE_IS_TEMPERATURE, 0, 100, false, "0 to 100"),
        REAL(CMD_OPT_TOP_P, "top-p", top_p, TOP_P_IS_TOP_P, 0, 1, true, "more than 0 and at most 1"),
        REAL(CMD_OPT_MIN_P, "min-p", min_p, MIN_P_IS_MIN_P, 0, 1, false, "0 to 1"),
        REAL(CMD_OPT_TYPICAL_P, "typical-p", typical_p, TYPICAL_P_IS_TYPICAL_P, 0, 1, true,
             "more than 0 and at most 1"),
        REAL(CMD_OPT_REPETITION, "repetition-penalty", repetition_penalty, REPETITION_PENALTY_IS_REPETITION_PENALTY, 0,
             100, true, "more than 0 and at most 100"),
        REAL(CMD_OPT_PRESENCE, "presence-penalty", presence_penalty, PRESENCE_PENALTY_IS_PRESENCE_PENALTY, -2, 2, false,
             "-2 to 2"),
        REAL(CMD_OPT_FREQUENCY, "frequency-penalty", frequency_penalty, FREQUENCY_PENALTY_IS_FREQUENCY_PENALTY, -2, 2,
             false, "-2 to 2"),
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        const struct real_option *o = &table[i];
        double d;
        if (o->opt != opt)
            continue;
        *rc = CMD_OK;
        if (!cmd_parse_double(text, o->low, o->high, &d) || (o->over_low && d <= o->low)) {
            *rc = USAGE("--%s %s: expected %s", o->name, text, o->expected);
            return true;
        }
        *o->value = (float)d;
        *o->is_case = o->set;
        return true;
    }
    return false;
}

static int count_option(const char *command, const char *name, const char *text, uint64_t low, uint64_t high,
                        uint32_t *out)
{
    uint64_t u;
    if (!cmd_parse_u64(text, low, high, &u))
        return high == UINT32_MAX
                   ? USAGE("--%s %s: expected a whole number, at least %u", name, text, (unsigned)low)
                   : USAGE("--%s %s: expected a whole number, %u to %u", name, text, (unsigned)low, (unsigned)high);
    *out = (uint32_t)u;
    return CMD_OK;
}

/* ---- lists ---- */

static int bias_option(struct cmd_sampling *s, const char *command, const char *text)
{
    size_t n = s->sampling.n_logit_bias;
    char id[16];
    const char *colon = strchr(text, ':');
    uint64_t token = 0;
    double bias = 0;
    if (n == CMD_MAX_BIASES)
        return USAGE("--logit-bias: more than %d of them", CMD_MAX_BIASES);
    bool ok = colon && (size_t)(colon - text) < sizeof id;
    if (ok) {
        memcpy(id, text, (size_t)(colon - text));
        id[colon - text] = '\0';
        ok = cmd_parse_u64(id, 0, UINT32_MAX, &token) && cmd_parse_double(colon + 1, -100, 100, &bias);
    }
    if (!ok)
        return USAGE("--logit-bias %s: expected ID:BIAS with a bias of -100 to 100", text);
    tandem__v1__logit_bias__init(&s->bias[n]);
    s->bias[n].token_id = (uint32_t)token;
    s->bias[n].bias = (float)bias;
    s->biases[n] = &s->bias[n];
    s->sampling.n_logit_bias++;
    return CMD_OK;
}

static int stop_option(struct cmd_sampling *s, const char *command, int opt, char *text)
{
    uint64_t u;
    if (opt == CMD_OPT_STOP) {
        if (!*text || s->stopping.n_stop == CMD_MAX_STOPS)
            return USAGE("--stop \"%s\": expected a text, %d of them at most", text, CMD_MAX_STOPS);
        s->stops[s->stopping.n_stop++] = text;
        return CMD_OK;
    }
    if (!cmd_parse_u64(text, 0, UINT32_MAX, &u) || s->stopping.n_stop_token_ids == CMD_MAX_STOP_IDS)
        return USAGE("--stop-token-id %s: expected a token id, %d of them at most", text, CMD_MAX_STOP_IDS);
    s->stop_ids[s->stopping.n_stop_token_ids++] = (uint32_t)u;
    return CMD_OK;
}

static int seed_option(struct cmd_sampling *s, const char *command, const char *text)
{
    if (!cmd_parse_u64(text, 0, UINT64_MAX, &s->sampling.seed))
        return USAGE("--seed %s: expected a whole number", text);
    s->sampling.seed_is_case = TANDEM__V1__SAMPLING__SEED_IS_SEED;
    return CMD_OK;
}

/* The server knows what is too much. */
static bool scheduling_option(Tandem__V1__Scheduling *s, const char *command, int opt, char *text, int *rc)
{
    double d;
    *rc = CMD_OK;
    switch (opt) {
    case CMD_OPT_TTFT_TARGET:
        s->ttft_target_ms_is_case = TANDEM__V1__SCHEDULING__TTFT_TARGET_MS_IS_TTFT_TARGET_MS;
        *rc = count_option(command, "ttft-target-ms", text, 0, UINT32_MAX, &s->ttft_target_ms);
        return true;
    case CMD_OPT_TBT_TARGET:
        s->tbt_target_ms_is_case = TANDEM__V1__SCHEDULING__TBT_TARGET_MS_IS_TBT_TARGET_MS;
        *rc = count_option(command, "tbt-target-ms", text, 0, UINT32_MAX, &s->tbt_target_ms);
        return true;
    case CMD_OPT_PRIORITY:
        if (!cmd_parse_double(text, -1, 1, &d) || d != (int)d)
            *rc = USAGE("--priority %s: expected -1, 0 or 1", text);
        else
            s->priority = (int32_t)d;
        return true;
    case CMD_OPT_TENANT:
        s->tenant = (ProtobufCBinaryData){strlen(text), (uint8_t *)text};
        return true;
    default:
        return false;
    }
}

bool cmd_sampling_option(struct cmd_sampling *s, const char *command, int opt, char *text, int *rc)
{
    if (real_option(s, command, opt, text, rc) || scheduling_option(&s->scheduling, command, opt, text, rc))
        return true;
    *rc = CMD_OK;
    switch (opt) {
    case CMD_OPT_GREEDY:
        s->sampling.temperature_is_case = TANDEM__V1__SAMPLING__TEMPERATURE_IS_TEMPERATURE;
        s->sampling.temperature = 0;
        return true;
    case CMD_OPT_MAX_TOKENS: /* 0: what goes with it, the server knows */
        s->stopping.max_tokens_is_case = TANDEM__V1__STOPPING__MAX_TOKENS_IS_MAX_TOKENS;
        *rc = count_option(command, "max-tokens", text, 0, UINT32_MAX, &s->stopping.max_tokens);
        return true;
    case CMD_OPT_MIN_TOKENS:
        s->stopping.min_tokens_is_case = TANDEM__V1__STOPPING__MIN_TOKENS_IS_MIN_TOKENS;
        *rc = count_option(command, "min-tokens", text, 0, UINT32_MAX, &s->stopping.min_tokens);
        return true;
    case CMD_OPT_TOP_K:
        s->sampling.top_k_is_case = TANDEM__V1__SAMPLING__TOP_K_IS_TOP_K;
        *rc = count_option(command, "top-k", text, 0, UINT32_MAX, &s->sampling.top_k);
        return true;
    case CMD_OPT_N:
        s->sampling.n_is_case = TANDEM__V1__SAMPLING__N_IS_N;
        *rc = count_option(command, "n", text, 1, 64, &s->sampling.n);
        return true;
    case CMD_OPT_LOGPROBS:
        s->output.logprobs_is_case = TANDEM__V1__OUTPUT__LOGPROBS_IS_LOGPROBS;
        *rc = count_option(command, "logprobs", text, 0, 20, &s->output.logprobs);
        return true;
    case CMD_OPT_PROMPT_LOGPROBS:
        s->output.prompt_logprobs_is_case = TANDEM__V1__OUTPUT__PROMPT_LOGPROBS_IS_PROMPT_LOGPROBS;
        *rc = count_option(command, "prompt-logprobs", text, 0, 20, &s->output.prompt_logprobs);
        return true;
    case CMD_OPT_SEED:
        *rc = seed_option(s, command, text);
        return true;
    case CMD_OPT_BIAS:
        *rc = bias_option(s, command, text);
        return true;
    case CMD_OPT_ALLOWED:
        *rc = cmd_parse_ids(command, "--allowed-ids", text, &s->allowed, &s->sampling.n_allowed_token_ids);
        s->sampling.allowed_token_ids = s->allowed;
        return true;
    case CMD_OPT_STOP:
    case CMD_OPT_STOP_ID:
        *rc = stop_option(s, command, opt, text);
        return true;
    case CMD_OPT_INCLUDE_STOP:
        s->stopping.include_stop_in_output = true;
        return true;
    case CMD_OPT_IGNORE_EOS:
        s->stopping.ignore_eos = true;
        return true;
    case CMD_OPT_ECHO:
        s->output.echo = true;
        return true;
    default:
        return false;
    }
}

/* ---- JSON ---- */

static json_t *ids_json(const uint32_t *ids, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(list, json_integer(ids[i]));
    return list;
}

/* JSON has no infinity: null. */
static json_t *real_json(float x)
{
    json_t *real = json_real((double)x);
    return real ? real : json_null();
}

static json_t *logprobs_json(Tandem__V1__TokenLogprob *const *list, size_t n)
{
    json_t *out = json_array();
    for (size_t i = 0; i < n; i++) {
        json_t *top = json_array();
        for (size_t k = 0; k < list[i]->n_top_token_ids && k < list[i]->n_top_logprobs; k++)
            json_array_append_new(top, json_pack("{s:I, s:o}", "token_id", (json_int_t)list[i]->top_token_ids[k],
                                                 "logprob", real_json(list[i]->top_logprobs[k])));
        json_array_append_new(out,
                              json_pack("{s:I, s:o, s:I, s:o}", "token_id", (json_int_t)list[i]->token_id, "logprob",
                                        real_json(list[i]->logprob), "rank", (json_int_t)list[i]->rank, "top", top));
    }
    return out;
}

static json_t *finish_json(const Tandem__V1__Finish *f)
{
    json_t *out = json_pack("{s:s}", "reason", f->reason == TANDEM__V1__FINISH__REASON__STOP ? "stop" : "length");
    if (f->stop_token_id_is_case)
        json_object_set_new(out, "stop_token_id", json_integer(f->stop_token_id));
    if (f->stop_index_is_case)
        json_object_set_new(out, "stop_index", json_integer(f->stop_index));
    if (f->usage)
        json_object_set_new(out, "usage",
                            json_pack("{s:I, s:I, s:I}", "prompt_tokens", (json_int_t)f->usage->prompt_tokens,
                                      "completion_tokens", (json_int_t)f->usage->completion_tokens,
                                      "cached_prompt_tokens", (json_int_t)f->usage->cached_prompt_tokens));
    if (f->timing)
        json_object_set_new(out, "timing",
                            json_pack("{s:I, s:I, s:I, s:I}", "queue_us", (json_int_t)f->timing->queue_us, "prefill_us",
                                      (json_int_t)f->timing->prefill_us, "decode_us", (json_int_t)f->timing->decode_us,
                                      "preemptions", (json_int_t)f->timing->preemptions));
    return out;
}

void cmd_print_json(const Tandem__V1__GenerateResponse *m)
{
    json_t *out = json_pack("{s:I}", "index", (json_int_t)m->index);
    if (m->request_id.len)
        json_object_set_new(out, "request_id", json_stringn((const char *)m->request_id.data, m->request_id.len));
    if (m->text.len)
        json_object_set_new(out, "text", json_stringn((const char *)m->text.data, m->text.len));
    if (m->n_token_ids)
        json_object_set_new(out, "token_ids", ids_json(m->token_ids, m->n_token_ids));
    if (m->n_logprobs)
        json_object_set_new(out, "logprobs", logprobs_json(m->logprobs, m->n_logprobs));
    if (m->n_prompt_token_ids)
        json_object_set_new(out, "prompt_token_ids", ids_json(m->prompt_token_ids, m->n_prompt_token_ids));
    if (m->n_prompt_logprobs)
        json_object_set_new(out, "prompt_logprobs", logprobs_json(m->prompt_logprobs, m->n_prompt_logprobs));
    if (m->finish)
        json_object_set_new(out, "finish", finish_json(m->finish));
    json_dumpf(out, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(out);
}
