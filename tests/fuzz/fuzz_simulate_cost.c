/* fuzz_simulate_cost.c - any bytes as a file of step costs.
 *
 * What must hold: an error names the file and changes nothing; of a file that is taken every step takes a time that is finite
 * and not under its floor. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/simulate.h"
#include "tests/fuzz/fuzz.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_simulate_cost: %s\n", what);
    abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct simulate_cost c = {.slots = 77};
    struct status st = STATUS_INIT;
    if (simulate_cost_parse(&c, "f", (const char *)data, size, &st) != ST_OK) {
        require(strncmp(st.message, "f:", 2) == 0 && c.slots == 77, "an error names the file and gives nothing");
        return 0;
    }
    for (uint32_t i = 1; i < 4; i++) {
        const struct cost_step s = {
            .decodes = i & 1, .context = (i & 1) * 5000u, .rows = (i & 2) * 1000, .pairs = (i & 2) * 1000000u};
        double us = simulate_step_us(&c, &s);
        require(isfinite(us) && us >= c.floor_us && us >= 0, "a step takes a time");
    }
    require(c.slots >= 1 && c.kv.page_bytes >= 1 && c.kv.total_pages >= 1 && c.max_context >= 1, "sizes are there");
    return 0;
}

#ifndef TANDEM_LIBFUZZER

/* Damaged copies: a file that is right, its members cut out, bytes and numbers changed. */
static const char SEED[] =
    "{\"name\": \"m\", \"max_context\": 4096, \"slots\": 8, \"kv\": {\"token_bytes\": 1024, \"page_bytes\": 65536, "
    "\"pages\": 100}, \"floor_us\": 10, \"decode\": {\"fixed_us\": 1, \"decode_us\": 2, \"kv_us\": 0.5}, \"prefill\": "
    "{\"fixed_us\": 1, \"row_us\": 2, \"pair_us\": 0.1}, \"hybrid\": {\"fixed_us\": 1, \"decode_us\": 2, \"kv_us\": "
    "0.5, "
    "\"row_us\": 3, \"pair_us\": 0.2}, \"noise\": 0.5}";
static const char *const PIECES[] = {"1e308",       "-1",    "0", "null", "{}", "[]", "99999999999999999999",
                                     "\"\\u0000\"", "1e-400"};
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
    fuzz_one(SEED, sizeof SEED - 1);
    for (long r = 0; r < runs; r++) {
        char text[sizeof SEED + 64];
        size_t n = sizeof SEED - 1, at = draw(&state) % n;
        memcpy(text, SEED, n);
        if (draw(&state) % 2) { /* the number at or behind `at` becomes another thing */
            const char *piece = PIECES[draw(&state) % N_PIECES];
            while (at < n && (text[at] < '0' || text[at] > '9' || at == 0 || text[at - 1] != ' '))
                at++;
            size_t end = at, m = strlen(piece);
            while (end < n && ((text[end] >= '0' && text[end] <= '9') || text[end] == '.'))
                end++;
            memmove(text + at + m, text + end, n - end);
            memcpy(text + at, piece, m);
            n = n - (end - at) + m;
        }
        for (uint32_t k = draw(&state) % 3; k; k--)
            text[draw(&state) % n] = (char)draw(&state);
        fuzz_one(text, draw(&state) % 8 ? n : draw(&state) % n);
    }
    return 0;
}

#endif
