/* fuzz_journal.c - any bytes as a segment of the journal.
 *
 * What must hold: a segment without header or SNAPSHOT does not count; what is found has choices, a name and a prompt within the
 * bounds, sums that are right, and can be written again as records that give the same. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/journal_internal.h"
#include "tests/fuzz/fuzz.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_journal: %s\n", what);
    abort();
}

static void check_entry(const struct journal_entry *e)
{
    struct journal_found f;
    struct journal_accept again;
    journal_found_of(e, &f);
    const struct journal_accept *a = &f.accept;
    require(a->n_choices >= 1 && a->n_choices <= JOURNAL_MAX_CHOICES, "choices that there can be");
    require(a->name_len >= 1 && a->name_len <= JOURNAL_MAX_NAME && a->n_prompt >= 1, "a name and a prompt");
    require(journal_accept_size(a) == e->payload_len, "a size");
    uint8_t *copy = malloc(e->payload_len);
    if (!copy)
        abort();
    journal_put_accept(copy, a);
    require(journal_get_accept(copy, e->payload_len, &again) && again.number == a->number &&
                memcmp(copy, e->payload, e->payload_len) == 0,
            "the same bytes when it is written again");
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct journal_state s = {.max_bytes = UINT64_MAX};
    uint64_t sequence = 0, damaged = 0, n = 0;
    bool good = journal_parse(&s, data, size, &sequence, &damaged);
    require(!good || size >= JOURNAL_HEADER_BYTES + JOURNAL_FRAME_BYTES + JOURNAL_SNAP_BYTES, "room for a SNAPSHOT");
    for (const struct journal_entry *e = journal_first(&s); e; e = journal_next(&s, e), n++) {
        require(e->accept.number < s.next_number, "a number that is not given out again");
        check_entry(e);
    }
    require(n == s.n, "as many as are counted");
    journal_expire(&s, INT64_MAX);
    require(!s.ended.head, "the ended can go");
    journal_state_fini(&s);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

#define N 24

static uint32_t draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

static size_t put_record(uint8_t *at, uint64_t *rng)
{
    uint8_t *p = at + JOURNAL_FRAME_BYTES;
    uint64_t number = draw(rng) % 4;
    uint32_t ids[8], n = 1 + draw(rng) % 8, size = 0;
    for (uint32_t i = 0; i < n; i++)
        ids[i] = draw(rng);
    struct journal_accept a = {.number = number,
                               .n_choices = 1 + draw(rng) % 3,
                               .name = "name",
                               .name_len = 4,
                               .prompt = ids,
                               .n_prompt = n,
                               .request = "request",
                               .request_len = draw(rng) % 7};
    switch (draw(rng) % 5) {
    case 0:
        size = (uint32_t)journal_accept_size(&a);
        journal_put_accept(p, &a);
        break;
    case 1:
        size = JOURNAL_END_BYTES;
        journal_put_end(p, number, draw(rng) % 2);
        break;
    case 2:
        size = JOURNAL_SNAP_BYTES;
        journal_put_snapshot(p, draw(rng));
        break;
    default:
        size = JOURNAL_TOKENS_BYTES + n * 4;
        journal_put_tokens(p, number, draw(rng) % 3, draw(rng) % 4, ids, n);
    }
    if (draw(rng) % 16 == 0) /* damage that the sum does not show */
        p[draw(rng) % size] = (uint8_t)draw(rng);
    journal_seal(at, draw(rng) % 32 ? size : draw(rng) % size + 1);
    if (draw(rng) % 16 == 0) /* and such that it does */
        at[draw(rng) % (size + JOURNAL_FRAME_BYTES)] ^= 1;
    return JOURNAL_FRAME_BYTES + size;
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 20000);
    uint64_t rng = 7;
    static uint8_t file[JOURNAL_HEADER_BYTES + N * 256];
    for (long r = 0; r < runs; r++) {
        size_t n = JOURNAL_HEADER_BYTES;
        journal_put_header(file, draw(&rng), 1);
        for (uint32_t i = 1 + draw(&rng) % N; i > 0; i--)
            n += put_record(file + n, &rng);
        fuzz_one(file, draw(&rng) % 8 ? n : draw(&rng) % n);
    }
    return 0;
}

#endif
