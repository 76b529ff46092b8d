/* engine_run.c - runs prompts through an engine and prints what came out, for tests/reference.py and for hand use.
 *
 *     engine_run MODEL RANKS ROWS_PER_STEP CONCURRENT NEW_TOKENS < prompts
 *
 * prompts: one JSON array of arrays of ids, or {"prompts": that, "bias": [[id, bias], ...], "repetition": r,
 * "frequency": f, "presence": p}, greedy in either case. Output: {"ids": [[...], ...], "logits": [[...], ...],
 * "logprobs": [[...], ...], "prompt_logprobs": [[...], ...]}; logits are those after the last token of each prompt, a log
 * probability is [of the token, rank, [likeliest ids], [theirs]]. MODEL may be followed by ",threads=N".
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/engine_group.h"
#include "worker/engine_internal.h"
#include "worker/forward_internal.h"

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "engine_run: %s: %s\n", what, why);
    exit(1);
}

static uint32_t *read_prompt(const json_t *list, uint32_t *n)
{
    *n = (uint32_t)json_array_size(list);
    uint32_t *ids = calloc(*n + 1, sizeof *ids);
    for (uint32_t i = 0; i < *n; i++)
        ids[i] = (uint32_t)json_integer_value(json_array_get(list, i));
    return ids;
}

/* Feeds one prompt whole to a group of its own state and reads the logits out of the ranks. */
static json_t *first_logits(struct group *g, struct group_request r)
{
    uint32_t token;
    struct status st = STATUS_INIT;
    r.max_new = 1;
    r.out = &token;
    r.scores = r.prompt_scores = NULL;
    r.params = NULL; /* raw logits */
    r.arrival = 0;
    struct group_schedule sched = {.rows_per_step = engine_info(group_engine(g, 0)).max_step_tokens, .concurrent = 1};
    group_reset(g);
    /* the last plan, which releases the slot, leaves the logits alone: it has no rows */
    if (group_run(g, &r, 1, &sched, &st) != ST_OK)
        fail("logits", st.message);
    json_t *out = json_array();
    for (uint32_t rank = 0; rank < group_size(g); rank++) {
        const struct engine *e = group_engine(g, rank);
        for (uint32_t i = 0; i < e->shard.vocab.count; i++)
            json_array_append_new(out, json_real((double)e->forward->logits[i]));
    }
    return out;
}

#define TOP 3

static json_t *scores_json(const struct sample_scores *s, uint32_t n)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < n; i++) {
        json_t *ids = json_array(), *logprobs = json_array();
        for (uint32_t k = 0; k < s[i].n; k++) {
            json_array_append_new(ids, json_integer(s[i].top[k]));
            json_array_append_new(logprobs, json_real((double)s[i].top_logprob[k]));
        }
        json_array_append_new(list, json_pack("[f, i, o, o]", (double)s[i].logprob, (int)s[i].rank, ids, logprobs));
    }
    return list;
}

static float number(const json_t *in, const char *key)
{
    return (float)json_number_value(json_object_get(in, key));
}

static void read_options(const json_t *in, Tandem__V1__SampleParams *p)
{
    const json_t *bias = json_object_get(in, "bias");
    tandem__v1__sample_params__init(p);
    p->n_bias_ids = p->n_biases = json_array_size(bias);
    p->bias_ids = calloc(p->n_bias_ids + 1, sizeof *p->bias_ids);
    p->biases = calloc(p->n_bias_ids + 1, sizeof *p->biases);
    for (size_t i = 0; i < p->n_bias_ids; i++) {
        const json_t *pair = json_array_get(bias, i);
        p->bias_ids[i] = (uint32_t)json_integer_value(json_array_get(pair, 0));
        p->biases[i] = (float)json_number_value(json_array_get(pair, 1));
    }
    p->repetition_penalty = number(in, "repetition");
    p->frequency_penalty = number(in, "frequency");
    p->presence_penalty = number(in, "presence");
}

int main(int argc, char **argv)
{
    if (argc != 6)
        fail("usage", "MODEL RANKS ROWS_PER_STEP CONCURRENT NEW_TOKENS < prompts");
    json_t *in = json_loadf(stdin, 0, NULL), *prompts = json_is_object(in) ? json_object_get(in, "prompts") : in;
    Tandem__V1__SampleParams params;
    read_options(in, &params);
    uint32_t n = (uint32_t)json_array_size(prompts), new_tokens = (uint32_t)atoi(argv[5]);
    struct group_schedule sched = {.rows_per_step = (uint32_t)atoi(argv[3]), .concurrent = (uint32_t)atoi(argv[4])};
    char *threads = strstr(argv[1], ",threads=");
    if (threads)
        *threads = '\0';
    struct engine_config cfg = {
        .model_dir = argv[1],
        .max_slots = sched.concurrent,
        .max_step_tokens = sched.rows_per_step > sched.concurrent ? sched.rows_per_step : sched.concurrent,
        .threads = threads ? (uint32_t)atoi(threads + 9) : 1,
    };
    struct group *g;
    struct status st = STATUS_INIT;
    if (n == 0)
        fail("prompts", "expected a JSON array of arrays");
    if (group_create(&g, &cfg, (uint32_t)atoi(argv[2]), &st) != ST_OK)
        fail("load", st.message);
    struct group_request *req = calloc(n, sizeof *req);
    Tandem__V1__SampleParams *each = calloc(n, sizeof *each);
    for (uint32_t i = 0; i < n; i++) {
        req[i].prompt = read_prompt(json_array_get(prompts, i), &req[i].prompt_tokens);
        req[i].max_new = new_tokens;
        req[i].out = calloc(new_tokens, sizeof *req[i].out);
        req[i].arrival = 2 * i; /* so that prompts meet decodes */
        each[i] = params;
        each[i].output_at = req[i].prompt_tokens;
        req[i].params = &each[i];
        req[i].top = TOP;
        req[i].scores = calloc(new_tokens, sizeof *req[i].scores);
        req[i].prompt_scores = calloc(req[i].prompt_tokens, sizeof *req[i].prompt_scores);
    }
    if (group_run(g, req, n, &sched, &st) != ST_OK)
        fail("run", st.message);
    json_t *ids = json_array(), *logits = json_array(), *logprobs = json_array(), *prompt_logprobs = json_array();
    for (uint32_t i = 0; i < n; i++) {
        json_t *list = json_array();
        for (uint32_t k = 0; k < new_tokens; k++)
            json_array_append_new(list, json_integer(req[i].out[k]));
        json_array_append_new(ids, list);
        json_array_append_new(logits, first_logits(g, req[i]));
        json_array_append_new(logprobs, scores_json(req[i].scores, new_tokens));
        json_array_append_new(prompt_logprobs, scores_json(req[i].prompt_scores, req[i].prompt_tokens - 1));
        free(req[i].scores);
        free(req[i].prompt_scores);
        free((void *)req[i].prompt);
        free(req[i].out);
    }
    json_t *out = json_pack("{s:o, s:o, s:o, s:o}", "ids", ids, "logits", logits, "logprobs", logprobs,
                            "prompt_logprobs", prompt_logprobs);
    json_dumpf(out, stdout, JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(out);
    json_decref(in);
    free(params.bias_ids);
    free(params.biases);
    free(each);
    free(req);
    group_destroy(g);
    return 0;
}
