/* engine_run.c - runs prompts through an engine and prints what came out, for tests/reference.py and for hand use.
 *
 *     engine_run MODEL RANKS ROWS_PER_STEP CONCURRENT NEW_TOKENS < prompts
 *
 * prompts: one JSON array of arrays of ids. Output: {"ids": [[...], ...], "logits": [[...], ...]}, logits being those
 * after the last token of each prompt. MODEL may be followed by ",threads=N".
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

int main(int argc, char **argv)
{
    if (argc != 6)
        fail("usage", "MODEL RANKS ROWS_PER_STEP CONCURRENT NEW_TOKENS < prompts");
    json_t *prompts = json_loadf(stdin, 0, NULL);
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
    for (uint32_t i = 0; i < n; i++) {
        req[i].prompt = read_prompt(json_array_get(prompts, i), &req[i].prompt_tokens);
        req[i].max_new = new_tokens;
        req[i].out = calloc(new_tokens, sizeof *req[i].out);
        req[i].arrival = 2 * i; /* so that prompts meet decodes */
    }
    if (group_run(g, req, n, &sched, &st) != ST_OK)
        fail("run", st.message);
    json_t *ids = json_array(), *logits = json_array();
    for (uint32_t i = 0; i < n; i++) {
        json_t *list = json_array();
        for (uint32_t k = 0; k < new_tokens; k++)
            json_array_append_new(list, json_integer(req[i].out[k]));
        json_array_append_new(ids, list);
        json_array_append_new(logits, first_logits(g, req[i]));
        free((void *)req[i].prompt);
        free(req[i].out);
    }
    json_t *out = json_pack("{s:o, s:o}", "ids", ids, "logits", logits);
    json_dumpf(out, stdout, JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(out);
    json_decref(prompts);
    free(req);
    group_destroy(g);
    return 0;
}
