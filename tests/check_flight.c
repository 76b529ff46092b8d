/* check_flight.c - the flight recorder (flight.h): what a killed writer leaves, and who is named. */
#include <check.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "coordinator/flight.h"
#include "tests/temp_dir.h"

#define RECORDS 64
#define BYTES   FLIGHT_MIN_BYTES

static struct temp_dir dir;
static char path[300];

static void set_up(void)
{
    dir = temp_dir_make();
    snprintf(path, sizeof path, "%s/flight", dir.path);
}

static void tear_down(void)
{
    temp_dir_remove(&dir);
}

static struct flight *open_at(int64_t now_us)
{
    struct flight *f = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(flight_open(&f, path, BYTES, now_us, &st) == ST_OK, "%s", st.message);
    return f;
}

static struct flight_log load(void)
{
    struct flight_log l = {0};
    struct status st = STATUS_INIT;
    ck_assert_msg(flight_load(&l, path, &st) == ST_OK, "%s", st.message);
    return l;
}

static void plan(struct flight *f, int64_t now_us, uint64_t epoch, uint64_t step)
{
    flight_numbers(f, now_us, FLIGHT_PLAN, epoch, FLIGHT_NO_RANK, step, (uint32_t[]){3, 2, 1, 1, 0, 0, 3, 9}, 8);
}

static void result(struct flight *f, int64_t now_us, uint64_t epoch, uint32_t rank, uint64_t step)
{
    flight_numbers(f, now_us, FLIGHT_RESULT, epoch, rank, step, (uint32_t[]){1000, 3}, 2);
}

static void ready(struct flight *f, uint64_t epoch, uint32_t ranks)
{
    flight_numbers(f, 1, FLIGHT_READY, epoch, FLIGHT_NO_RANK, 0, (uint32_t[]){ranks, 8, 100, 512}, 4);
}

START_TEST(records_come_back_as_they_were)
{
    struct flight *f = open_at(5);
    plan(f, 10, 2, 7);
    flight_named(f, 11, FLIGHT_END, "req-1", (uint32_t[]){14, 100, 20}, 3);
    flight_text(f, 12, FLIGHT_LOST, 2, FLIGHT_NO_RANK, "rank 1 was lost");
    flight_close(f, 13);
    struct flight_log l = load();
    ck_assert_uint_eq(l.n, 5);
    ck_assert(l.record[0].kind == FLIGHT_START && strcmp(l.record[0].text, TANDEM_VERSION) == 0);
    ck_assert(l.record[1].kind == FLIGHT_PLAN && l.record[1].id == 7 && l.record[1].epoch == 2);
    ck_assert(l.record[1].numbers[0] == 3 && l.record[1].numbers[7] == 9 && l.record[1].time_us == 10);
    ck_assert(l.record[2].number[0] == 14 && strcmp(l.record[2].name, "req-1") == 0);
    ck_assert_str_eq(l.record[3].text, "rank 1 was lost");
    ck_assert(l.record[4].kind == FLIGHT_STOP && l.record[4].seq == 5);
    ck_assert_uint_eq(l.pid, getpid());
    flight_log_free(&l);
}
END_TEST

START_TEST(the_newest_stay_when_the_ring_is_full_and_a_new_writer_goes_on)
{
    struct stat sb;
    struct flight *f = open_at(0);
    for (uint64_t i = 1; i <= 1000; i++)
        plan(f, (int64_t)i, 1, i);
    flight_close(f, 1001);
    f = open_at(2000);
    plan(f, 2001, 1, 1);
    struct flight_log l = load(); /* while it is open */
    ck_assert_uint_eq(l.n, RECORDS);
    ck_assert_uint_eq(l.record[RECORDS - 1].seq, 1004); /* start, 1000 plans, stop, start, plan */
    for (size_t i = 1; i < l.n; i++)
        ck_assert_uint_eq(l.record[i].seq, l.record[i - 1].seq + 1);
    ck_assert(stat(path, &sb) == 0 && sb.st_size == BYTES);
    flight_log_free(&l);
    flight_close(f, 2002);
}
END_TEST

START_TEST(a_text_too_long_is_cut_and_null_is_no_recorder)
{
    char text[500];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    struct flight *f = open_at(0);
    flight_text(f, 1, FLIGHT_LOST, 1, FLIGHT_NO_RANK, text);
    flight_named(f, 1, FLIGHT_ADMIT, text, (uint32_t[]){1, 2, 3}, 3);
    flight_close(f, 2);
    struct flight_log l = load();
    ck_assert(strnlen(l.record[1].text, FLIGHT_TEXT) == FLIGHT_TEXT);
    ck_assert(strnlen(l.record[2].name, FLIGHT_NAME) == FLIGHT_NAME && l.record[2].number[2] == 3);
    flight_log_free(&l);
    flight_text(NULL, 1, FLIGHT_LOST, 1, FLIGHT_NO_RANK, text);
    plan(NULL, 1, 1, 1);
    flight_named(NULL, 1, FLIGHT_ADMIT, text, NULL, 0);
    flight_close(NULL, 1);
}
END_TEST

/* A child writes as fast as it can until it is killed. At most the record under way is spoilt. */
START_TEST(a_killed_writer_leaves_a_file_that_reads)
{
    for (int round = 0; round < 20; round++) {
        int fd[2];
        char byte;
        ck_assert(pipe(fd) == 0);
        pid_t pid = fork();
        ck_assert(pid >= 0);
        if (pid == 0) {
            struct flight *f = open_at(0);
            for (uint64_t i = 1;; i++) {
                plan(f, (int64_t)i, 1, i);
                if (i == 300 && write(fd[1], "x", 1) != 1)
                    _exit(1);
            }
        }
        ck_assert(read(fd[0], &byte, 1) == 1);
        usleep((useconds_t)round * 37);
        kill(pid, SIGKILL);
        ck_assert(waitpid(pid, NULL, 0) == pid);
        close(fd[0]);
        close(fd[1]);
        struct flight_log l = load();
        ck_assert_uint_le(l.spoilt, 1);
        ck_assert_uint_ge(l.n, RECORDS - 1);
        for (size_t i = 1; i < l.n; i++)
            ck_assert_uint_eq(l.record[i].seq, l.record[i - 1].seq + 1);
        flight_log_free(&l);
    }
}
END_TEST

START_TEST(damaged_records_are_left_out)
{
    struct flight *f = open_at(0);
    for (uint64_t i = 1; i <= 10; i++)
        plan(f, (int64_t)i, 1, i);
    flight_close(f, 11);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    uint8_t bad = 0x5a;
    for (int i = 2; i < 5; i++) /* an id, a check, a seq */
        ck_assert(pwrite(fd, &bad, 1,
                         FLIGHT_HEADER_BYTES + FLIGHT_RECORD_BYTES * i +
                             (i == 2   ? 33
                              : i == 3 ? 20
                                       : 0)) == 1);
    close(fd);
    struct flight_log l = load();
    ck_assert_uint_eq(l.n, 12 - 3);
    ck_assert_uint_eq(l.spoilt, 3);
    flight_log_free(&l);
    ck_assert(truncate(path, FLIGHT_HEADER_BYTES + 6 * FLIGHT_RECORD_BYTES + 7) == 0);
    l = load();
    ck_assert_uint_eq(l.n, 3);
    flight_log_free(&l);
}
END_TEST

START_TEST(what_cannot_be_is_an_error)
{
    struct flight *f = NULL;
    struct flight_log l;
    struct status st = STATUS_INIT;
    ck_assert(flight_open(&f, path, 100, 0, &st) == ST_INVALID_ARGUMENT);
    ck_assert(flight_open(&f, path, FLIGHT_MAX_BYTES + 1, 0, &st) == ST_INVALID_ARGUMENT);
    ck_assert(flight_open(&f, dir.path, BYTES, 0, &st) != ST_OK);
    ck_assert(flight_open(&f, "/nonexistent/x", BYTES, 0, &st) == ST_NOT_FOUND);
    ck_assert_msg(strstr(st.message, "/nonexistent/x") != NULL, "%s", st.message);
    ck_assert(flight_load(&l, "/nonexistent/x", &st) == ST_NOT_FOUND);
    ck_assert(flight_load(&l, dir.path, &st) == ST_INVALID_ARGUMENT);
    ck_assert(flight_parse(&l, "f", "short", 5, &st) == ST_INVALID_ARGUMENT);
    char other[FLIGHT_HEADER_BYTES] = "TANDFLT0";
    ck_assert(flight_parse(&l, "f", other, sizeof other, &st) == ST_INVALID_ARGUMENT);
    ck_assert_msg(strncmp(st.message, "f: not a flight", 15) == 0, "%s", st.message);
}
END_TEST

START_TEST(a_dead_rank_is_named)
{
    struct flight *f = open_at(0);
    struct flight_verdict v;
    ready(f, 1, 3);
    for (uint64_t i = 1; i <= 5; i++) {
        plan(f, (int64_t)i * 1000, 1, i);
        for (uint32_t r = 0; r < 3; r++)
            if (i < 5 || r != 1)
                result(f, (int64_t)i * 1000 + 500 + r, 1, r, i);
    }
    flight_text(f, 3006000, FLIGHT_LOST, 1, FLIGHT_NO_RANK, "rank 1 was lost: no heartbeat for 3.0 s");
    flight_close(f, 3006001);
    struct flight_log l = load();
    flight_judge(&v, &l, 0);
    ck_assert_uint_eq(v.epoch, 1);
    ck_assert_uint_eq(v.ranks, 3);
    ck_assert(v.owing == 1 && v.owes[1] && !v.owes[0] && !v.owes[2]);
    ck_assert_msg(strstr(v.text, "Rank 1 has not answered step 5") != NULL, "%s", v.text);
    ck_assert_msg(strstr(v.text, "no heartbeat for 3.0 s") != NULL, "%s", v.text);
    ck_assert_msg(strstr(v.text, "last heard 3.002") != NULL, "%s", v.text);
    flight_log_free(&l);
}
END_TEST

/* Ranks wait for each other within a step: then only heartbeats tell who is dead. */
START_TEST(a_silent_rank_is_named_when_nobody_answers)
{
    struct flight *f = open_at(0);
    struct flight_verdict v;
    ready(f, 1, 2);
    for (uint32_t ms = 1300; ms < 3000; ms += 500) {
        plan(f, ms * 1000, 1, 1 + ms);
        flight_numbers(f, ms * 1000, FLIGHT_SILENT, 1, 1, 0, &ms, 1);
    }
    flight_close(f, 3000000);
    struct flight_log l = load();
    flight_judge(&v, &l, 0);
    ck_assert(v.owing == 0 && v.rank[1].silent_ms == 2800 && v.rank[0].silent_ms == 0);
    ck_assert_msg(strstr(v.text, "No rank has answered") && strstr(v.text, "Rank 1 was silent: no heartbeat for 2.8 s"),
                  "%s", v.text);
    flight_log_free(&l);
}
END_TEST

START_TEST(a_slow_rank_is_named_and_an_older_group_is_not)
{
    struct flight *f = open_at(0);
    struct flight_verdict v;
    ready(f, 1, 2);
    plan(f, 1, 1, 1);
    result(f, 2, 1, 0, 1); /* rank 1 of epoch 1 never answered: long ago */
    ready(f, 2, 2);
    for (uint64_t i = 1; i <= 10; i++) {
        plan(f, (int64_t)i * 10000, 2, i);
        result(f, (int64_t)i * 10000 + 1000 + (i == 3 ? 5000 : 0), 2, 1, i);
        result(f, (int64_t)i * 10000 + 4000, 2, 0, i);
    }
    flight_close(f, 200000);
    struct flight_log l = load();
    flight_judge(&v, &l, 0);
    ck_assert(v.epoch == 2 && v.owing == 0 && v.lost == NULL);
    ck_assert_uint_eq(v.slowest, 0);
    ck_assert_msg(strstr(v.text, "Rank 0 is the slowest") != NULL, "%s", v.text);
    flight_judge(&v, &l, 1); /* asked for by name */
    ck_assert(v.epoch == 1 && v.owes[1]);
    flight_log_free(&l);
}
END_TEST

START_TEST(groups_of_two_runs_are_not_mixed)
{
    struct flight *f = open_at(0);
    struct flight_verdict v;
    ready(f, 1, 2);
    plan(f, 1, 1, 1);
    flight_close(f, 2);
    f = open_at(10);
    ready(f, 1, 2);
    for (uint64_t i = 1; i <= 3; i++) {
        plan(f, 10 + (int64_t)i, 1, i);
        result(f, 10 + (int64_t)i, 1, 0, i);
        result(f, 10 + (int64_t)i, 1, 1, i);
    }
    flight_close(f, 20);
    f = open_at(30);
    flight_text(f, 31, FLIGHT_ATTACH, 1, 5, "pid 7 on h, d");
    flight_close(f, 32);
    struct flight_log l = load();
    flight_judge(&v, &l, 0);
    ck_assert_uint_eq(v.ranks, 2);
    ck_assert_uint_eq(v.planned, 3);
    ck_assert_msg(strstr(v.text, "answered alike") != NULL, "%s", v.text);
    flight_log_free(&l);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("flight");
    TCase *core = tcase_create("core"), *faults = tcase_create("faults");
    tcase_add_checked_fixture(core, set_up, tear_down);
    tcase_add_checked_fixture(faults, set_up, tear_down);
    tcase_add_test(core, records_come_back_as_they_were);
    tcase_add_test(core, the_newest_stay_when_the_ring_is_full_and_a_new_writer_goes_on);
    tcase_add_test(core, a_text_too_long_is_cut_and_null_is_no_recorder);
    tcase_add_test(core, a_dead_rank_is_named);
    tcase_add_test(core, a_silent_rank_is_named_when_nobody_answers);
    tcase_add_test(core, a_slow_rank_is_named_and_an_older_group_is_not);
    tcase_add_test(core, groups_of_two_runs_are_not_mixed);
    tcase_add_test(faults, a_killed_writer_leaves_a_file_that_reads);
    tcase_add_test(faults, damaged_records_are_left_out);
    tcase_add_test(faults, what_cannot_be_is_an_error);
    suite_add_tcase(s, core);
    suite_add_tcase(s, faults);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
