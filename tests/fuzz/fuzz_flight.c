/* fuzz_flight.c - any bytes as a flight recorder's file.
 *
 * What must hold: an error names the file; records are in order, no two have one number; the verdict is about ranks that there
 * can be, and ends in a text. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/flight_internal.h"
#include "tests/fuzz/fuzz.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_flight: %s\n", what);
    abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct flight_verdict v;
    struct flight_log l = {0};
    struct status st = STATUS_INIT;
    if (flight_parse(&l, "f", data, size, &st) != ST_OK) {
        require(strncmp(st.message, "f:", 2) == 0 && !l.record, "an error names the file and gives nothing");
        return 0;
    }
    for (size_t i = 1; i < l.n; i++)
        require(l.record[i - 1].seq < l.record[i].seq, "records are in order");
    flight_judge(&v, &l, size % 4);
    require(v.ranks <= FLIGHT_MAX_RANKS && v.owing <= v.ranks, "ranks that there can be");
    require(v.slowest == FLIGHT_NO_RANK || v.slowest < v.ranks, "the slowest is one of them");
    require(v.text[0] && memchr(v.text, 0, sizeof v.text), "a text");
    flight_log_free(&l);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

#define N 40

static uint32_t draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* Records with anything in them and a check that is right, mostly; a header that is right, mostly. */
int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 20000);
    uint64_t state = 7;
    static uint8_t file[FLIGHT_HEADER_BYTES + N * FLIGHT_RECORD_BYTES];
    for (long r = 0; r < runs; r++) {
        struct flight_header h = {.record_bytes = FLIGHT_RECORD_BYTES, .n = 1 + draw(&state) % N};
        memset(file, 0, sizeof file);
        memcpy(h.magic, FLIGHT_MAGIC, sizeof h.magic);
        memcpy(file, &h, sizeof h);
        uint64_t turn = draw(&state) % 3;
        for (uint64_t i = 0; i < h.n; i++) {
            struct flight_record k = {.seq = i + 1 + h.n * (turn - (turn && draw(&state) % 2)),
                                      .time_us = draw(&state) % 8 ? draw(&state) % 100000 : INT64_MIN,
                                      .kind = (uint16_t)(draw(&state) % (FLIGHT_KINDS + 1)),
                                      .rank = (uint16_t)(draw(&state) % 4 ? draw(&state) % 3 : draw(&state)),
                                      .epoch = draw(&state) % 3,
                                      .id = draw(&state) % 8 ? draw(&state) % 6 : UINT64_MAX};
            for (size_t n = 0; n < FLIGHT_TEXT / 4; n++)
                k.numbers[n] = draw(&state) % 4 ? draw(&state) % 70 : draw(&state) * 2;
            k.check = flight_check(&k);
            if (draw(&state) % 16 == 0)
                k.check++;
            memcpy(file + FLIGHT_HEADER_BYTES + i * FLIGHT_RECORD_BYTES, &k, sizeof k);
        }
        if (draw(&state) % 8 == 0)
            file[draw(&state) % 48] = (uint8_t)draw(&state);
        size_t n = FLIGHT_HEADER_BYTES + h.n * FLIGHT_RECORD_BYTES;
        fuzz_one(file, draw(&state) % 8 ? n : draw(&state) % n);
    }
    return 0;
}

#endif
