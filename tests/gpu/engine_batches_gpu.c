/* engine_batches_gpu.c - sequences side by side in an engine on a device: the host's texts, two steps under way, stays in host
 * memory. */
#include "tests/gpu/engine_batches_gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NEW_TOKENS 24
#define MANY       9

struct texts {
    uint32_t id[MANY][NEW_TOKENS];
    double margin[MANY][NEW_TOKENS]; /* of the host: between its two best */
};

static void note(struct texts *t, uint32_t at, uint32_t first, const struct engine_result *r)
{
    for (uint32_t i = 0; i < r->n_tokens && first + i < MANY; i++)
        t->id[first + i][at] = r->tokens[i];
    for (uint32_t i = 0; i < r->n_sample_scores; i++) {
        const struct engine_score *s = &r->sample_scores[i];
        if (first + s->index < MANY && s->scores.n == 2)
            t->margin[first + s->index][at] = (double)s->scores.top_logprob[0] - (double)s->scores.top_logprob[1];
    }
}

/* Sequences of other lengths side by side, a chunk now and then between the decodes. */
static void write_texts(struct texts *t, struct gpu_run *r, bool scores)
{
    Tandem__V1__SampleParams p = TANDEM__V1__SAMPLE_PARAMS__INIT;
    uint32_t vocab = engine_info(r->e).vocab_size, slots[MANY], ids[64];
    p.logprobs = scores;
    p.top_logprobs = scores ? 2 : 0;
    for (uint32_t s = 0; s < MANY; s++) {
        uint32_t n = 1 + s * 7;
        slots[s] = s;
        for (uint32_t i = 0; i < n; i++)
            ids[i] = (s * 131 + i * 17) % vocab;
        gpu_prefill(r, s, ids, n, 0, true, &p);
        note(t, 0, s, &r->result);
    }
    for (uint32_t at = 1; at < NEW_TOKENS; at++) {
        if (at % 5 == 0)
            gpu_hybrid(r, slots, MANY, MANY, ids, 20, at == 5 ? 0 : (at / 5 - 1) * 20);
        else
            gpu_decode(r, slots, MANY);
        note(t, at, 0, &r->result);
    }
    for (uint32_t s = 0; s <= MANY; s++)
        gpu_release(r, s);
}

unsigned engine_batches_gpu(const char *name, struct gpu_run *host, struct gpu_run *other, double close)
{
    unsigned failures = 0;
    struct texts *a = calloc(1, sizeof *a), *b = calloc(1, sizeof *b);
    uint32_t parted = 0;
    write_texts(a, host, true);
    write_texts(b, other, false);
    for (uint32_t s = 0; s < MANY; s++) {
        uint32_t at = 0;
        while (at < NEW_TOKENS && a->id[s][at] == b->id[s][at])
            at++;
        parted += at < NEW_TOKENS;
        if (at < NEW_TOKENS)
            failures +=
                !gpu_expect(a->margin[s][at] <= 2 * close, "text parts at a clear margin", name, s, a->margin[s][at]);
    }
    gpu_say("%-28s %u of %u texts part from the host's within %u ids, all where two logits are within %.3f\n", name,
            parted, MANY, NEW_TOKENS, 2 * close);
    free(b);
    free(a);
    return failures;
}

unsigned engine_ahead_gpu(const char *name, struct gpu_run *device, bool drawn)
{
    Tandem__V1__SampleParams p = TANDEM__V1__SAMPLE_PARAMS__INIT;
    uint32_t slots[MANY], id[2][NEW_TOKENS][MANY], vocab = engine_info(device->e).vocab_size, ids[64], wrong = 0;
    p.temperature = drawn ? 1 : 0;
    p.seed = 4711;
    for (uint32_t pass = 0; pass < 4; pass++) { /* twice each, in turn */
        bool is_ahead = pass % 2 == 1;
        uint32_t at = 0;
        for (uint32_t s = 0; s < MANY; s++) {
            slots[s] = s;
            for (uint32_t i = 0; i < 20; i++)
                ids[i] = (s * 37 + i * 11) % vocab;
            gpu_prefill(device, s, ids, 20, 0, true, &p);
        }
        for (uint32_t i = 0; i < NEW_TOKENS; i++) {
            if (!is_ahead)
                gpu_decode(device, slots, MANY);
            if (!is_ahead || gpu_decode_ahead(device, slots, MANY))
                memcpy(id[is_ahead][at++], device->result.tokens, sizeof id[0][0]);
        }
        if (is_ahead) {
            gpu_collect(device);
            memcpy(id[1][at++], device->result.tokens, sizeof id[0][0]);
        }
        for (uint32_t s = 0; s < MANY; s++)
            gpu_release(device, s);
    }
    for (uint32_t i = 0; i < NEW_TOKENS; i++)
        for (uint32_t s = 0; s < MANY; s++)
            wrong += id[0][i][s] != id[1][i][s];
    return !gpu_expect(wrong == 0, "ids with two steps under way that are not those of one at a time", name, drawn,
                       wrong);
}

unsigned engine_moves_gpu(const char *name, struct gpu_run *device)
{
    uint32_t slots[MANY], id[2][NEW_TOKENS][MANY], vocab = engine_info(device->e).vocab_size, ids[256], wrong = 0;
    for (uint32_t pass = 0; pass < 3; pass++) {
        for (uint32_t s = 0; s < MANY; s++) {
            slots[s] = s;
            for (uint32_t i = 0; i < 20; i++)
                ids[i] = (s * 41 + i * 13) % vocab;
            gpu_prefill(device, s, ids, 20, 0, true, NULL);
        }
        for (uint32_t i = 0; i < NEW_TOKENS; i++) {
            if (pass == 2 && i % 8 == 4) {
                gpu_suspend(device, slots + i / 8, MANY / 2);
                const uint32_t n = gpu_fits(device, 256, 2 * NEW_TOKENS);
                for (uint32_t k = 0; k < n; k++)
                    ids[k] = (i + k * 29) % vocab;
                gpu_prefill(device, MANY, ids, n, 0, false, NULL);
                gpu_resume(device, slots + i / 8, MANY / 2);
                gpu_release(device, MANY);
            }
            gpu_decode(device, slots, MANY);
            memcpy(id[pass == 2][i], device->result.tokens, sizeof id[0][0]);
        }
        for (uint32_t s = 0; s < MANY; s++)
            gpu_release(device, s);
    }
    for (uint32_t i = 0; i < NEW_TOKENS; i++)
        for (uint32_t s = 0; s < MANY; s++)
            wrong += id[0][i][s] != id[1][i][s];
    gpu_say("%-28s slots go to host memory and back at %.1f GB/s\n", name,
            (double)engine_info(device->e).suspend_bytes_per_s * 1e-9);
    return !gpu_expect(wrong == 0, "ids of slots that were in host memory are others", name, 0, wrong);
}
