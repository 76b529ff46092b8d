/* check_coord_stop.c - stop strings in a stream against a plain search of the whole text. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_stop.h"

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

/* The first place, from `from` on, where one of the strings ends: its length there; *end behind it. 0: none. */
static size_t plain_search(const char *text, size_t n, char *const *stops, unsigned n_stops, size_t from, size_t *end)
{
    for (*end = from + 1; *end <= n; ++*end) {
        size_t longest = 0;
        for (unsigned i = 0; i < n_stops; i++) {
            size_t len = strlen(stops[i]);
            if (len <= *end && memcmp(text + *end - len, stops[i], len) == 0 && len > longest)
                longest = len;
        }
        if (longest)
            return longest;
    }
    return 0;
}

static size_t longest_beginning(const char *text, size_t n, char *const *stops, unsigned n_stops)
{
    size_t most = 0;
    for (unsigned i = 0; i < n_stops; i++)
        for (size_t len = 1; len < strlen(stops[i]) && len <= n; len++)
            if (memcmp(text + n - len, stops[i], len) == 0 && len > most)
                most = len;
    return most;
}

/* Characters of one to four bytes, some of which share bytes. */
static const char *const letters[] = {"a", "b", "a", "\xc3\xa4", "\xc3\xa5", "\xe2\x82\xac", "\xf0\x9f\x98\x80"};

static size_t append_letter(char *to, uint64_t *state, unsigned kinds)
{
    const char *c = letters[next_random(state) % kinds];
    size_t n = strlen(c);
    memcpy(to, c, n + 1);
    return n;
}

START_TEST(streams_end_where_a_search_of_the_whole_text_says)
{
    uint64_t state = 100 + (uint64_t)_i;
    unsigned found = 0, rounds = 20000;
    for (unsigned round = 0; round < rounds; round++) {
        unsigned kinds = _i ? 7 : 3, n_stops = 1 + (unsigned)(next_random(&state) % 4), pieces[64], n_pieces = 0;
        char stop[4][40], *stops[4], text[400] = "";
        for (unsigned i = 0; i < n_stops; i++) {
            size_t len = 0;
            for (unsigned k = 1 + (unsigned)(next_random(&state) % 6); k > 0; k--)
                len += append_letter(stop[i] + len, &state, kinds);
            stops[i] = stop[i];
        }
        size_t n = 0, unarmed = 0;
        unsigned deaf = (unsigned)(next_random(&state) % 4); /* pieces in which nothing counts */
        for (unsigned k = (unsigned)(next_random(&state) % 40); k > 0; n_pieces++) {
            size_t before = n;
            for (unsigned part = (unsigned)(next_random(&state) % 4); part > 0 && k > 0; part--, k--)
                n += append_letter(text + n, &state, kinds);
            pieces[n_pieces] = (unsigned)(n - before);
            if (n_pieces < deaf)
                unarmed = n;
            if (n_pieces + 1 == 64)
                k = 0;
        }
        size_t end, length = plain_search(text, n, stops, n_stops, unarmed, &end), at = 0, used = 0;
        struct stop_set *set;
        struct stop_match m;
        ck_assert_int_eq(stop_set_create(&set, stops, n_stops, NULL), ST_OK);
        ck_assert_int_eq(stop_match_init(&m, set, NULL), ST_OK);
        bool ended = false;
        for (unsigned i = 0; i < n_pieces && !ended; i++) {
            ended = stop_feed(&m, text + at, pieces[i], i >= deaf, &used);
            if (ended) {
                ck_assert_msg(length > 0 && at + used == end && strlen(stops[m.which]) == length,
                              "round %u: ends at %zu with %u, expected %zu", round, at + used, m.which, end);
                break;
            }
            at += pieces[i];
            ck_assert_uint_eq(m.held, longest_beginning(text, at, stops, n_stops));
            ck_assert((text[at - m.held] & 0xC0) != 0x80 || m.held == 0);
        }
        ck_assert_int_eq(ended, length > 0);
        found += ended;
        stop_match_fini(&m);
        stop_set_destroy(set);
    }
    ck_assert_uint_gt(found, rounds / 10);
    ck_assert_uint_lt(found, rounds);
}
END_TEST

START_TEST(no_strings_hold_nothing)
{
    struct stop_set *set;
    struct stop_match m;
    size_t used;
    ck_assert_int_eq(stop_set_create(&set, NULL, 0, NULL), ST_OK);
    ck_assert_ptr_null(set);
    ck_assert_int_eq(stop_match_init(&m, set, NULL), ST_OK);
    ck_assert(!stop_feed(&m, "abc", 3, true, &used));
    ck_assert_uint_eq(m.held, 0);
    stop_match_fini(&m);
    stop_set_destroy(set);
}
END_TEST

START_TEST(long_repeats_take_linear_time)
{
    enum { N = 1024 };
    char *stop = malloc(N + 1), *stops[] = {stop};
    memset(stop, 'a', N);
    stop[N - 1] = 'b';
    stop[N] = '\0';
    struct stop_set *set;
    struct stop_match m;
    size_t used;
    ck_assert_int_eq(stop_set_create(&set, stops, 1, NULL), ST_OK);
    ck_assert_int_eq(stop_match_init(&m, set, NULL), ST_OK);
    for (int i = 0; i < 1000000; i++) {
        ck_assert(!stop_feed(&m, "a", 1, true, &used));
    }
    ck_assert_uint_eq(m.held, N - 1);
    ck_assert(stop_feed(&m, "b", 1, true, &used));
    stop_match_fini(&m);
    stop_set_destroy(set);
    free(stop);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("coord_stop");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits");
    tcase_add_loop_test(core, streams_end_where_a_search_of_the_whole_text_says, 0, 2);
    tcase_add_test(limits, no_strings_hold_nothing);
    tcase_add_test(limits, long_repeats_take_linear_time);
    tcase_set_timeout(core, 60);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
