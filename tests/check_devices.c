/* check_devices.c - which device each rank takes: the rule itself over random groups, its limits, and what ranks are told. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "comm/comm_internal.h"
#include "proto/ranks.h"
#include "tests/comm_fake.h"

static uint32_t below(uint64_t *state, uint32_t n)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33) % n;
}

static void put(struct comm_devices *d, uint32_t device)
{
    memset(d->id[d->count], 0, COMM_DEVICE_BYTES);
    memcpy(d->id[d->count++], &device, sizeof device);
}

static struct comm_devices seeing(uint32_t machine, const char *devices)
{
    struct comm_devices d = {.machine = machine};
    for (const char *p = devices; *p; p++)
        put(&d, (uint32_t)*p);
    return d;
}

static bool same(const struct comm_devices *a, uint32_t i, const struct comm_devices *b, uint32_t k)
{
    return a->machine == b->machine && memcmp(a->id[i], b->id[k], COMM_DEVICE_BYTES) == 0;
}

/* The first that none before has, without more thought; false: a rank finds none. */
static bool first_come(const struct comm_devices *of, uint32_t ranks, uint32_t *taken)
{
    for (uint32_t r = 0; r < ranks; r++) {
        bool free = false;
        for (taken[r] = 0; taken[r] < of[r].count; taken[r]++) {
            free = true;
            for (uint32_t p = 0; free && p < r; p++)
                free = !same(&of[p], taken[p], &of[r], taken[r]);
            if (free)
                break;
        }
        if (!free)
            return false;
    }
    return true;
}

/* What must hold of any answer; where all can take the first free one, that is the answer. */
static void check_rule(const struct comm_devices *of, uint32_t ranks)
{
    uint32_t taken[MAX_RANKS], plain[MAX_RANKS], first = ranks, without = comm_match_devices(of, ranks, taken);
    for (uint32_t r = ranks; r-- > 0;) {
        if (taken[r] == COMM_DEVICE_ABSENT) {
            first = r;
            continue;
        }
        ck_assert_uint_lt(taken[r], of[r].count);
        for (uint32_t p = 0; p < r; p++)
            ck_assert_msg(taken[p] == COMM_DEVICE_ABSENT || !same(&of[p], taken[p], &of[r], taken[r]),
                          "ranks %u and %u of %u took the same", p, r, ranks);
    }
    ck_assert_uint_eq(without, first);
    if (first_come(of, ranks, plain))
        ck_assert_mem_eq(taken, plain, ranks * sizeof *taken);
}

#define SMALL_DEVICES 6 /* of which every set is tried */

/* How many of the first n ranks can have a device, all of one machine: by trying every set of devices that they can have. */
static uint32_t most(const struct comm_devices *of, uint32_t n)
{
    uint32_t best[1 << SMALL_DEVICES],
        next[1 << SMALL_DEVICES]; /* ranks served with the set; UINT32_MAX: it cannot be had */
    uint32_t top = 0;
    memset(best, 0xff, sizeof best);
    best[0] = 0;
    for (uint32_t r = 0; r < n; r++) {
        memcpy(next, best, sizeof next);
        for (uint32_t set = 0; set < 1 << SMALL_DEVICES; set++)
            for (uint32_t i = 0; best[set] != UINT32_MAX && i < of[r].count; i++) {
                const uint32_t with = set | 1u << of[r].id[i][0];
                if (with != set && (next[with] == UINT32_MAX || next[with] < best[set] + 1))
                    next[with] = best[set] + 1;
            }
        memcpy(best, next, sizeof best);
    }
    for (uint32_t set = 0; set < 1 << SMALL_DEVICES; set++)
        top = best[set] != UINT32_MAX && best[set] > top ? best[set] : top;
    return top;
}

/* ---- core ---- */

START_TEST(any_group_obeys_the_rule)
{
    uint64_t seed = 1;
    for (int turn = 0; turn < 4000; turn++) {
        struct comm_devices of[MAX_RANKS];
        const uint32_t ranks = 1 + below(&seed, MAX_RANKS), machines = 1 + below(&seed, 5),
                       devices = 1 + below(&seed, 20), most = below(&seed, COMM_DEVICES_MAX + 1);
        for (uint32_t r = 0; r < ranks; r++) {
            of[r] = (struct comm_devices){.machine = below(&seed, machines)};
            for (uint32_t n = below(&seed, most + 1); n; n--)
                put(&of[r], below(&seed, devices)); /* some come twice */
        }
        check_rule(of, ranks);
    }
}
END_TEST

START_TEST(as_many_ranks_have_a_device_as_can)
{
    uint64_t seed = 2;
    uint32_t moved = 0;
    for (int turn = 0; turn < 4000; turn++) {
        struct comm_devices of[8];
        uint32_t taken[8], plain[8], served = 0;
        const uint32_t ranks = 1 + below(&seed, 8), devices = 1 + below(&seed, SMALL_DEVICES);
        for (uint32_t r = 0; r < ranks; r++) {
            of[r] = (struct comm_devices){0};
            for (uint32_t n = below(&seed, 4); n; n--)
                put(&of[r], below(&seed, devices));
        }
        comm_match_devices(of, ranks, taken);
        for (uint32_t r = 0; r < ranks; r++) { /* of those before, too: who has one keeps one */
            served += taken[r] != COMM_DEVICE_ABSENT;
            ck_assert_uint_eq(served, most(of, r + 1));
        }
        moved += served == ranks && !first_come(of, ranks, plain);
    }
    ck_assert_uint_ge(moved, 50);
}
END_TEST

struct example {
    const char *name;
    const char *sees[5]; /* of ranks of machine 0, each a letter */
    const char *takes;   /* the letters; '-': none */
};

static const struct example examples[] = {
    {"equal lists: one after the other", {"ABCD", "ABCD", "ABCD"}, "ABC"},
    {"pods with a device each", {"A", "B", "C"}, "ABC"},
    {"pods with two devices for a rank each", {"AB", "CD"}, "AC"},
    {"two ranks of each of two pods", {"AB", "AB", "CD", "CD"}, "ABCD"},
    {"a pod sees all, the others one", {"ABC", "B", "C"}, "ABC"},
    {"one rank with --devices", {"AB", "B"}, "AB"},
    {"one rank with --devices in another order", {"BA", "AB"}, "BA"},
    {"a rank makes room for one that has no other", {"AB", "A"}, "BA"},
    {"two ranks make room for a third", {"AB", "BC", "A"}, "BCA"},
    {"three ranks and two devices", {"AB", "AB", "A"}, "AB-"},
    {"one device seen by two", {"A", "A"}, "A-"},
    {"no device at all", {"", "", "A"}, "--A"},
    {"a device that is named twice", {"AA", "AAB"}, "AB"},
};
#define EXAMPLES (int)(sizeof examples / sizeof *examples)

START_TEST(devices_go_as_in_the_examples)
{
    const struct example *e = &examples[_i];
    struct comm_devices of[5];
    uint32_t ranks = 0, taken[5];
    for (; ranks < 5 && e->sees[ranks]; ranks++)
        of[ranks] = seeing(0, e->sees[ranks]);
    ck_assert_uint_eq(ranks, strlen(e->takes));
    comm_match_devices(of, ranks, taken);
    for (uint32_t r = 0; r < ranks; r++) {
        char got = taken[r] == COMM_DEVICE_ABSENT ? '-' : e->sees[r][taken[r]];
        ck_assert_msg(got == e->takes[r], "%s: rank %u took %c", e->name, r, got);
    }
    check_rule(of, ranks);
}
END_TEST

/* ---- limits ---- */

START_TEST(sixty_four_ranks_fill_four_machines)
{
    struct comm_devices of[MAX_RANKS];
    uint32_t taken[MAX_RANKS];
    for (uint32_t r = 0; r < MAX_RANKS; r++) { /* machines by turns, as mpirun --map-by node does it */
        of[r] = seeing(r % 4, "ABCDEFGHIJKLMNOP");
        ck_assert_uint_eq(of[r].count, COMM_DEVICES_MAX);
    }
    ck_assert_uint_eq(comm_match_devices(of, MAX_RANKS, taken), MAX_RANKS);
    for (uint32_t r = 0; r < MAX_RANKS; r++)
        ck_assert_uint_eq(taken[r], r / 4);
    of[MAX_RANKS - 1].machine = 0; /* one too many there */
    ck_assert_uint_eq(comm_match_devices(of, MAX_RANKS, taken), MAX_RANKS - 1);
}
END_TEST

START_TEST(no_rank_and_no_device_are_no_match)
{
    struct comm_devices none[3] = {{.machine = 0}, {.machine = 0}, {.machine = 1}};
    uint32_t taken[3];
    ck_assert_uint_eq(comm_match_devices(none, 0, taken), 0);
    ck_assert_uint_eq(comm_match_devices(none, 3, taken), 0);
    for (uint32_t r = 0; r < 3; r++)
        ck_assert_uint_eq(taken[r], COMM_DEVICE_ABSENT);
}
END_TEST

/* ---- what ranks tell each other ---- */

/* A group whose other ranks tell what the test has put here. */
static struct {
    struct comm_devices told[MAX_RANKS];
    enum status_code result;
    void *kept; /* what a gather that failed may still write to */
} others;

static enum status_code told_all_gather(struct comm *c, const void *send, void *recv, const size_t *bytes,
                                        struct status *st)
{
    struct comm_devices *all = recv;
    ck_assert_ptr_eq(send, &all[c->rank]);
    ck_assert_uint_eq(all[c->rank].machine, c->machine);
    others.kept = recv;
    for (uint32_t r = 0; r < c->size; r++) {
        ck_assert_uint_eq(bytes[r], sizeof *all);
        if (r != c->rank)
            all[r] = others.told[r];
    }
    return others.result ? status_set(st, others.result, "as told") : ST_OK;
}

static const struct comm_ops comm_ops_told = {
    .name = "told", .open = comm_fake_open, .close = comm_fake_close, .all_gather = told_all_gather};

static enum status_code take(uint32_t *taken, struct status *st)
{
    struct comm *c = NULL;
    const struct comm_config cfg = {.ops = comm_fake.size > 1 ? &comm_ops_told : &comm_ops_self};
    ck_assert_int_eq(comm_create(&c, &cfg, st), ST_OK);
    struct comm_devices mine = others.told[comm_fake.rank];
    mine.machine = 99; /* is filled in */
    enum status_code rc = comm_take_device(c, &mine, taken, st);
    comm_destroy(c);
    return rc;
}

static void tell(uint32_t rank, const struct comm_devices *of, uint32_t ranks)
{
    comm_fake.rank = rank;
    comm_fake.size = ranks;
    comm_fake.machine = of[rank].machine;
    memcpy(others.told, of, ranks * sizeof *of);
}

START_TEST(each_rank_takes_its_own_of_what_all_told)
{
    const struct comm_devices of[] = {seeing(0, "AB"), seeing(1, "AB"), seeing(0, "AB"), seeing(1, "B")};
    const uint32_t wanted[] = {0, 0, 1, 0};
    for (uint32_t r = 0; r < 4; r++) {
        uint32_t taken = 7;
        tell(r, of, 4);
        ck_assert_int_eq(take(&taken, NULL), ST_OK);
        ck_assert_uint_eq(taken, wanted[r]);
    }
}
END_TEST

START_TEST(a_rank_alone_takes_its_first)
{
    const struct comm_devices one = seeing(0, "AB"), none = seeing(0, "");
    struct status st = STATUS_INIT;
    uint32_t taken = 7;
    tell(0, &one, 1);
    ck_assert_int_eq(take(&taken, &st), ST_OK);
    ck_assert_uint_eq(taken, 0);
    tell(0, &none, 1);
    ck_assert_int_eq(take(&taken, &st), ST_FAILED_PRECONDITION);
    ck_assert_msg(strstr(st.message, "among its 0, as 1 rank has its machine:") &&
                      strstr(st.message, "seen there: no device"),
                  "%s", st.message);
}
END_TEST

/* ---- faults ---- */

START_TEST(all_ranks_hear_who_finds_none)
{
    const struct comm_devices of[] = {seeing(0, "AB"), seeing(2, "CD"), seeing(0, "AB"), seeing(0, "B")};
    for (uint32_t r = 0; r < 4; r++) {
        struct status st = STATUS_INIT;
        uint32_t taken = 7;
        tell(r, of, 4);
        ck_assert_int_eq(take(&taken, &st), ST_FAILED_PRECONDITION);
        ck_assert_uint_eq(taken, 7);
        ck_assert_str_eq(st.message,
                         "rank 3 finds no free device among its 1, as 3 ranks share its machine: start fewer there, or "
                         "give each a device of its own (--devices, CUDA_VISIBLE_DEVICES, the GPUs of its pod); seen "
                         "there: GPU-41000000 (rank 0's), GPU-42000000 (rank 2's)");
    }
}
END_TEST

START_TEST(a_long_list_is_cut_short_in_the_error)
{
    const struct comm_devices of[] = {seeing(0, "ABCDEFGHIJKLMNOP"), seeing(0, "A"), seeing(0, "A")};
    struct status st = STATUS_INIT;
    uint32_t taken;
    tell(0, of, 3);
    ck_assert_int_eq(take(&taken, &st), ST_FAILED_PRECONDITION);
    ck_assert_msg(strstr(st.message, "seen there: GPU-41000000 (rank 1's), GPU-42000000 (rank 0's)") &&
                      strstr(st.message, "GPU-46000000 (free) ..."),
                  "%s", st.message);
}
END_TEST

START_TEST(more_devices_than_there_may_be_are_refused)
{
    struct comm_devices of[] = {seeing(0, "A"), seeing(0, "B")};
    struct status st = STATUS_INIT;
    uint32_t taken;
    of[1].count = COMM_DEVICES_MAX + 1;
    tell(0, of, 2);
    ck_assert_int_eq(take(&taken, &st), ST_INTERNAL);
    ck_assert_str_eq(st.message, "rank 1 tells of 17 devices, expected at most 16");
}
END_TEST

START_TEST(a_group_that_is_gone_says_so)
{
    const struct comm_devices of[] = {seeing(0, "A"), seeing(0, "B")};
    struct status st = STATUS_INIT;
    uint32_t taken;
    tell(0, of, 2);
    others.result = ST_DEADLINE_EXCEEDED;
    ck_assert_int_eq(take(&taken, &st), ST_DEADLINE_EXCEEDED);
    ck_assert_str_eq(st.message, "all_gather on rank 0 of 2: as told");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("devices");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_test(core, any_group_obeys_the_rule);
    tcase_add_test(core, as_many_ranks_have_a_device_as_can);
    tcase_add_loop_test(core, devices_go_as_in_the_examples, 0, EXAMPLES);
    tcase_add_test(core, each_rank_takes_its_own_of_what_all_told);
    tcase_add_test(core, a_rank_alone_takes_its_first);
    tcase_add_test(limits, sixty_four_ranks_fill_four_machines);
    tcase_add_test(limits, no_rank_and_no_device_are_no_match);
    tcase_add_test(faults, all_ranks_hear_who_finds_none);
    tcase_add_test(faults, a_long_list_is_cut_short_in_the_error);
    tcase_add_test(faults, more_devices_than_there_may_be_are_refused);
    tcase_add_test(faults, a_group_that_is_gone_says_so);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
