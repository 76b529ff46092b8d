/* fuzz_trace.c - any bytes as a trace of requests.
 *
 * What must hold: an error names file and gives nothing; what was read is in order and in bounds, and written again it
 * reads the same. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/trace.h"
#include "tests/fuzz/fuzz.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_trace: %s\n", what);
    abort();
}

static void check_again(const struct trace *t)
{
    char *text = NULL;
    size_t bytes = 0;
    struct trace again = {0};
    FILE *to = open_memstream(&text, &bytes);
    require(to != NULL, "memory");
    fputs("output_tokens,arrival_s,prompt_tokens\n", to);
    for (size_t i = 0; i < t->n; i++)
        fprintf(to, "%u,%.17g,%u\r\n", t->entry[i].output_tokens, t->entry[i].arrival_s, t->entry[i].prompt_tokens);
    fclose(to);
    require(trace_parse(&again, "t", text, bytes, NULL) == ST_OK && again.n == t->n, "what was written reads");
    for (size_t i = 0; i < t->n; i++)
        require(again.entry[i].arrival_s == t->entry[i].arrival_s &&
                    again.entry[i].prompt_tokens == t->entry[i].prompt_tokens &&
                    again.entry[i].output_tokens == t->entry[i].output_tokens,
                "the same requests");
    trace_free(&again);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct trace t = {0};
    struct status st = STATUS_INIT;
    enum status_code rc = trace_parse(&t, "t", (const char *)data, size, &st);
    require(rc == ST_OK || (strncmp(st.message, "t:", 2) == 0 && !t.entry),
            "an error names the file and gives nothing");
    for (size_t i = 0; i < t.n; i++)
        require(t.entry[i].arrival_s >= (i ? t.entry[i - 1].arrival_s : 0) && t.entry[i].prompt_tokens >= 1 &&
                    t.entry[i].prompt_tokens <= TRACE_MAX_TOKENS && t.entry[i].output_tokens >= 1 &&
                    t.entry[i].output_tokens <= TRACE_MAX_TOKENS,
                "in order and in bounds");
    if (rc == ST_OK)
        check_again(&t);
    trace_free(&t);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

static const char *const PIECES[] = {
    "arrival_s,prompt_tokens,output_tokens\n",
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n",
    "0,512,128\n",
    "0.5, 1024 ,64\n",
    "1e3,1,1\n",
    "2023-11-16 18:17:03.9799600,4808,10\n",
    "2023-11-16T18:17:04Z,3180,8\n",
    "# comment\n",
    "\n",
    "7,1,1,extra",
    ",",
    "-1",
    "nan",
    "0x10",
    "16777217",
    "\t",
    "\r\n",
};
#define N_PIECES (sizeof PIECES / sizeof *PIECES)

static uint32_t draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 100000);
    uint64_t state = 7;
    for (long r = 0; r < runs; r++) {
        uint8_t text[512];
        size_t n = 0;
        for (uint32_t k = draw(&state) % 8; k; k--) {
            const char *piece = PIECES[draw(&state) % N_PIECES];
            size_t m = strlen(piece);
            memcpy(text + n, piece, m);
            n += m;
        }
        for (uint32_t k = draw(&state) % 4; n && k; k--)
            text[draw(&state) % n] = (uint8_t)draw(&state);
        fuzz_one(text, n);
    }
    return 0;
}

#endif
