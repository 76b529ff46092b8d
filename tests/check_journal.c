/* check_journal.c - the journal (journal.h) against a plain model: what a reader finds, whatever the disk did. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "coordinator/journal_internal.h"
#include "tests/temp_dir.h"

static struct temp_dir dir;
static char path[300];

static uint32_t draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* ---- the model: what was told ---- */

#define REQUESTS 48
#define TOKENS   4096

static struct told {
    bool accepted, forgotten;
    int64_t until_us;
    uint64_t number;
    char name[32];
    uint32_t prompt[64], n_prompt, n_choices, n[2], id[2][TOKENS];
} model[REQUESTS];
static uint32_t n_model;

/* ---- a system whose calls fail ---- */

enum call { CALL_OPEN, CALL_WRITE, CALL_SYNC, CALL_TRUNCATE, CALL_UNLINK, CALLS };

static struct {
    int64_t now_us;
    uint32_t calls[CALLS], fail_at[CALLS], fail_for; /* from the fail_at-th on, so many; 0: none */
    int error;
    bool short_writes;
    uint32_t failed;
} sys;

static bool fails(enum call c)
{
    uint32_t n = ++sys.calls[c];
    if (sys.fail_at[c] == 0 || n < sys.fail_at[c] || n - sys.fail_at[c] >= sys.fail_for)
        return false;
    sys.failed++;
    errno = sys.error;
    return true;
}

static int sys_open(void *ctx, int at, const char *name, int flags)
{
    (void)ctx;
    return fails(CALL_OPEN) ? -1 : openat(at, name, flags, 0600);
}

/* One that fails may have written a part: a full disk does that, too. */
static ssize_t sys_write(void *ctx, int fd, const void *data, size_t n)
{
    (void)ctx;
    if (fails(CALL_WRITE)) {
        int err = errno;
        ck_assert(write(fd, data, n / 2) >= 0);
        errno = err;
        return -1;
    }
    return write(fd, data, sys.short_writes && n > 1 ? n / 2 : n);
}

static int sys_sync(void *ctx, int fd)
{
    (void)ctx;
    (void)fd;
    return fails(CALL_SYNC) ? -1 : 0;
}

static int sys_truncate(void *ctx, int fd, off_t size)
{
    (void)ctx;
    return fails(CALL_TRUNCATE) ? -1 : ftruncate(fd, size);
}

static int sys_unlink(void *ctx, int at, const char *name)
{
    (void)ctx;
    return fails(CALL_UNLINK) ? -1 : unlinkat(at, name, 0);
}

static int64_t sys_now(void *ctx)
{
    (void)ctx;
    return sys.now_us;
}

static const struct journal_io io = {.open = sys_open,
                                     .write = sys_write,
                                     .sync = sys_sync,
                                     .truncate = sys_truncate,
                                     .unlink = sys_unlink,
                                     .now_us = sys_now};

static int reports[2];

static void report(void *ctx, bool failed, const char *text)
{
    (void)ctx;
    ck_assert(strstr(text, path));
    reports[failed]++;
}

static void set_up(void)
{
    dir = temp_dir_make();
    snprintf(path, sizeof path, "%s/j", dir.path);
    memset(model, 0, sizeof model);
    n_model = 0;
    memset(&sys, 0, sizeof sys);
    sys.now_us = 1000000000;
    sys.error = ENOSPC;
    sys.fail_for = 1;
    reports[0] = reports[1] = 0;
}

static void tear_down(void)
{
    temp_dir_remove(&dir);
}

static struct journal *open_sized(uint64_t max_bytes)
{
    struct journal *j = NULL;
    struct status st = STATUS_INIT;
    const struct journal_config cfg = {
        .dir = path, .max_bytes = max_bytes, .sync_ms = 100, .io = &io, .report = report};
    ck_assert_msg(journal_open(&j, &cfg, &st) == ST_OK, "%s", st.message);
    return j;
}

static struct journal *open_it(void)
{
    return open_sized(64u << 20);
}

static struct journal_stats stats_of(struct journal *j)
{
    struct journal_stats s;
    journal_get_stats(j, &s);
    return s;
}

/* ---- telling both ---- */

static struct told *tell_accept(struct journal *j, uint64_t *rng)
{
    struct told *t = &model[n_model++];
    ck_assert_uint_le(n_model, REQUESTS);
    t->accepted = true;
    t->number = journal_number(j);
    t->n_choices = 1 + draw(rng) % 2;
    t->n_prompt = 1 + draw(rng) % 64;
    for (uint32_t i = 0; i < t->n_prompt; i++)
        t->prompt[i] = draw(rng);
    snprintf(t->name, sizeof t->name, "r-%u", n_model);
    struct journal_accept a = {.number = t->number,
                               .arrived_us = (int64_t)t->number * 10,
                               .deadline_us = INT64_MAX,
                               .model = 77,
                               .keep_ms = 5000,
                               .n_choices = t->n_choices,
                               .owner = {1, 2, 3},
                               .name = t->name,
                               .name_len = (uint32_t)strlen(t->name),
                               .prompt = t->prompt,
                               .n_prompt = t->n_prompt,
                               .request = t->name,
                               .request_len = t->n_prompt % 3};
    journal_accept(j, &a);
    return t;
}

static void tell_tokens(struct journal *j, struct told *t, uint32_t choice, uint32_t n, uint64_t *rng)
{
    uint32_t from = t->n[choice];
    ck_assert_uint_le(from + n, TOKENS);
    for (uint32_t i = 0; i < n; i++)
        t->id[choice][t->n[choice]++] = draw(rng);
    journal_tokens(j, t->number, choice, from, t->id[choice] + from, n);
}

static void tell_end(struct journal *j, struct told *t, int64_t until_us)
{
    t->until_us = until_us;
    t->forgotten = until_us == 0;
    journal_end(j, t->number, until_us);
}

/* A script of the model's: some accept, most tokens, some ends. */
static void script(struct journal *j, uint64_t *rng, int steps)
{
    for (int i = 0; i < steps; i++) {
        struct told *t = n_model ? &model[draw(rng) % n_model] : NULL;
        uint32_t what = draw(rng) % 16;
        if ((!t || what == 0) && n_model < REQUESTS)
            tell_accept(j, rng);
        else if (t && what == 1 && !t->until_us && !t->forgotten)
            tell_end(j, t, draw(rng) % 2 ? 0 : INT64_MAX);
        else if (t && !t->until_us && !t->forgotten && t->n[draw(rng) % t->n_choices] + 4 < TOKENS)
            tell_tokens(j, t, draw(rng) % t->n_choices, 1 + draw(rng) % 3, rng);
        if (draw(rng) % 3 == 0)
            journal_turn(j, false);
    }
}

/* ---- comparing ---- */

struct check {
    bool exact; /* nothing is missing */
    uint32_t found;
};

static struct told *told_of(uint64_t number)
{
    for (uint32_t i = 0; i < n_model; i++)
        if (model[i].number == number)
            return &model[i];
    return NULL;
}

static void check_one(void *ctx, const struct journal_found *f)
{
    struct check *c = ctx;
    const struct told *t = told_of(f->accept.number);
    ck_assert_msg(t, "request %llu was never told", (unsigned long long)f->accept.number);
    c->found++;
    ck_assert_uint_eq(f->accept.n_prompt, t->n_prompt);
    ck_assert_mem_eq(f->accept.prompt, t->prompt, t->n_prompt * 4);
    ck_assert_uint_eq(f->accept.name_len, strlen(t->name));
    ck_assert_mem_eq(f->accept.name, t->name, strlen(t->name));
    ck_assert_uint_eq(f->accept.n_choices, t->n_choices);
    ck_assert_uint_eq(f->accept.request_len, t->n_prompt % 3);
    ck_assert(f->accept.deadline_us == INT64_MAX && f->accept.model == 77 && f->accept.keep_ms == 5000 &&
              f->accept.owner[2] == 3 && f->accept.arrived_us == (int64_t)t->number * 10);
    for (uint32_t i = 0; i < t->n_choices; i++) {
        ck_assert_uint_le(f->n_tokens[i], t->n[i]);
        if (f->n_tokens[i])
            ck_assert_mem_eq(f->tokens[i], t->id[i], f->n_tokens[i] * 4);
        if (c->exact)
            ck_assert_uint_eq(f->n_tokens[i], t->n[i]);
    }
    if (c->exact)
        ck_assert(!t->forgotten && f->until_us == t->until_us);
}

static void check_journal(struct journal *j, bool exact)
{
    uint32_t expected = 0;
    struct check c = {.exact = exact};
    journal_each(j, check_one, &c);
    for (uint32_t i = 0; i < n_model; i++)
        expected += model[i].accepted && !model[i].forgotten;
    if (exact)
        ck_assert_uint_eq(c.found, expected);
}

static void reopen_and_check(bool exact)
{
    memset(sys.fail_at, 0, sizeof sys.fail_at);
    struct journal *j = open_it();
    check_journal(j, exact);
    if (n_model)
        ck_assert_uint_gt(journal_number(j), exact ? model[n_model - 1].number : 0);
    journal_close(j);
}

static uint32_t segments(uint64_t *bytes, char *newest)
{
    char name[JOURNAL_NAME_BYTES], full[400];
    uint32_t n = 0;
    struct stat info;
    *bytes = 0;
    for (uint64_t s = 1; s < 2000; s++) {
        journal_file_name(name, s);
        snprintf(full, sizeof full, "%s/%s", path, name);
        if (stat(full, &info) != 0)
            continue;
        n++;
        *bytes += (uint64_t)info.st_size;
        if (newest)
            strcpy(newest, full);
    }
    return n;
}

/* ---- core ---- */

START_TEST(what_was_told_is_found)
{
    uint64_t rng = 1;
    struct journal *j = open_it();
    script(j, &rng, 3000);
    journal_turn(j, true);
    ck_assert(!stats_of(j).degraded);
    ck_assert_uint_gt(stats_of(j).syncs, 0);
    journal_close(j);
    reopen_and_check(true);
    reopen_and_check(true);
}
END_TEST

START_TEST(an_empty_folder_is_made_and_locked)
{
    struct status st = STATUS_INIT;
    struct journal *j = open_it(), *second = NULL;
    struct journal_config cfg = {.dir = path, .max_bytes = JOURNAL_MIN_BYTES};
    struct stat info;
    ck_assert(stat(path, &info) == 0);
    ck_assert_uint_eq(info.st_mode & 0777, 0700);
    ck_assert_int_eq(journal_open(&second, &cfg, &st), ST_ALREADY_EXISTS);
    ck_assert(strstr(st.message, path));
    journal_close(j);
    cfg.dir = "/nonexistent/folder";
    ck_assert_int_eq(journal_open(&second, &cfg, &st), ST_NOT_FOUND);
    ck_assert(strstr(st.message, cfg.dir));
    temp_dir_write(&dir, "file", "x", 1);
    snprintf(path, sizeof path, "%s/file", dir.path);
    cfg.dir = path;
    ck_assert_int_eq(journal_open(&second, &cfg, &st), ST_INVALID_ARGUMENT);
    ck_assert(strstr(st.message, path));
}
END_TEST

/* A child tells and says how far it got; it is killed in the middle. */
START_TEST(what_a_killed_process_told_is_found)
{
    uint64_t rng = 3;
    int pipe_fd[2];
    ck_assert_int_eq(pipe(pipe_fd), 0);
    struct journal_config cfg = {.dir = path, .max_bytes = 64u << 20, .sync_ms = 0};
    pid_t pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        struct journal *j = NULL;
        struct status st = STATUS_INIT;
        if (journal_open(&j, &cfg, &st) != ST_OK || journal_start(j, &st) != ST_OK)
            _exit(1);
        struct told *t = tell_accept(j, &rng);
        for (uint32_t i = 0; i < TOKENS; i++) {
            tell_tokens(j, t, 0, 1, &rng);
            struct journal_stats s = stats_of(j);
            if (write(pipe_fd[1], &s.records, sizeof s.records) < 0)
                _exit(1);
            usleep(200);
        }
        pause();
    }
    uint64_t records = 0;
    while (records < 100)
        ck_assert_int_eq(read(pipe_fd[0], &records, sizeof records), sizeof records);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    struct journal *j = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(journal_open(&j, &cfg, &st) == ST_OK, "%s", st.message);
    ck_assert_uint_eq(stats_of(j).live, 1);
    /* the same numbers, drawn again */
    rng = 3;
    struct told *t = &model[n_model++];
    t->n_choices = 1 + draw(&rng) % 2;
    t->n_prompt = 1 + draw(&rng) % 64;
    for (uint32_t i = 0; i < t->n_prompt; i++)
        t->prompt[i] = draw(&rng);
    strcpy(t->name, "r-1");
    t->number = 1;
    for (uint32_t i = 0; i < TOKENS; i++)
        t->id[0][t->n[0]++] = draw(&rng);
    struct check c = {0};
    journal_each(j, check_one, &c);
    ck_assert_uint_eq(c.found, 1);
    journal_close(j);
    close(pipe_fd[0]);
    close(pipe_fd[1]);
}
END_TEST

/* ---- damage ---- */

/* The newest segment of a small script, its records told one by one. */
static char *segment(size_t *size, int steps)
{
    uint64_t rng = 5, bytes;
    char newest[400];
    struct journal *j = open_it();
    script(j, &rng, steps);
    journal_turn(j, true);
    journal_close(j);
    ck_assert_uint_eq(segments(&bytes, newest), 1);
    return temp_dir_read_file(newest, size);
}

static struct check parsed(const char *data, size_t n, bool *complete)
{
    struct journal_state s = {.max_bytes = UINT64_MAX};
    struct check c = {0};
    uint64_t sequence, damaged = 0;
    struct journal_found found;
    char *copy = malloc(n ? n : 1); /* ends where its memory ends */
    memcpy(copy, data, n);
    *complete = journal_parse(&s, (const uint8_t *)copy, n, &sequence, &damaged);
    free(copy);
    for (const struct journal_entry *e = journal_first(&s); e; e = journal_next(&s, e)) {
        journal_found_of(e, &found);
        check_one(&c, &found);
    }
    journal_state_fini(&s);
    return c;
}

START_TEST(a_tail_torn_at_any_byte_takes_only_the_last_record)
{
    size_t size, start = JOURNAL_HEADER_BYTES + JOURNAL_FRAME_BYTES + JOURNAL_SNAP_BYTES;
    char *data = segment(&size, 60);
    bool complete;
    uint32_t most = 0;
    for (size_t n = 0; n <= size; n++) {
        struct check c = parsed(data, n, &complete);
        ck_assert_msg(complete == (n >= start), "%zu bytes of %zu", n, size);
        most = c.found > most ? c.found : most;
    }
    ck_assert_uint_gt(most, 2);
    free(data);
}
END_TEST

START_TEST(a_damaged_byte_anywhere_gives_a_prefix)
{
    size_t size;
    char *data = segment(&size, 60);
    bool complete;
    for (size_t i = 0; i < size; i++)
        for (int bit = 0; bit < 8; bit += 3) {
            data[i] = (char)(data[i] ^ (1 << bit));
            parsed(data, size, &complete);
            data[i] = (char)(data[i] ^ (1 << bit));
        }
    free(data);
}
END_TEST

START_TEST(what_follows_a_damaged_record_is_found)
{
    uint64_t rng = 6;
    struct journal *j = open_it();
    struct told *a = tell_accept(j, &rng), *b = tell_accept(j, &rng);
    tell_tokens(j, a, 0, 5, &rng);
    tell_tokens(j, b, 0, 7, &rng);
    journal_turn(j, true);
    journal_close(j);
    char newest[400];
    uint64_t bytes;
    size_t size;
    segments(&bytes, newest);
    char *data = temp_dir_read_file(newest, &size);
    size_t last = JOURNAL_FRAME_BYTES + JOURNAL_TOKENS_BYTES + 7 * 4;
    data[size - last - 2] ^= 1; /* of the tokens of a */
    bool complete;
    struct journal_state s = {.max_bytes = UINT64_MAX};
    uint64_t sequence, damaged = 0;
    complete = journal_parse(&s, (const uint8_t *)data, size, &sequence, &damaged);
    ck_assert(complete && damaged == 1 && s.n == 2);
    ck_assert_uint_eq(s.live.head->choice[0].n, 0);
    ck_assert_uint_eq(s.live.tail->choice[0].n, 7);
    journal_state_fini(&s);
    free(data);
}
END_TEST

/* The beginning of a segment is torn anywhere: the one before it counts. */
START_TEST(a_segment_without_its_snapshot_does_not_count)
{
    char first[400], second[JOURNAL_NAME_BYTES];
    uint64_t bytes, rng = 8, sequence = 0, damaged = 0;
    size_t size;
    free(segment(&size, 60));
    segments(&bytes, first);
    char *old = temp_dir_read_file(first, &size), name[JOURNAL_NAME_BYTES];
    size_t old_size = size;
    strcpy(name, strrchr(first, '/') + 1);
    ck_assert(journal_file_sequence(name, &sequence));
    reopen_and_check(true); /* which begins another */
    segments(&bytes, first);
    char *data = temp_dir_read_file(first, &size);
    journal_file_name(second, sequence + 1);
    struct temp_dir in = {0};
    snprintf(in.path, sizeof in.path, "%.255s", path);
    temp_dir_write(&in, name, old, old_size);
    int fd = open(path, O_RDONLY | O_DIRECTORY);
    for (size_t n = 0; n < size; n += 1 + draw(&rng) % 7) {
        struct journal_state s = {.max_bytes = UINT64_MAX};
        struct check c = {.exact = true};
        struct journal_found found;
        uint64_t newest;
        temp_dir_write(&in, second, data, n);
        ck_assert_int_eq(journal_read_dir(&s, fd, &newest, &damaged, NULL), ST_OK);
        ck_assert_uint_eq(newest, sequence + 1);
        for (const struct journal_entry *e = journal_first(&s); e; e = journal_next(&s, e)) {
            journal_found_of(e, &found);
            check_one(&c, &found);
        }
        ck_assert_uint_gt(c.found, 2);
        journal_state_fini(&s);
    }
    close(fd);
    free(old);
    free(data);
}
END_TEST

/* ---- bounds ---- */

START_TEST(files_stay_below_the_bound)
{
    uint64_t rng = 9, bytes;
    uint32_t turns = 0;
    struct journal *j = open_sized(JOURNAL_MIN_BYTES);
    struct told *t = tell_accept(j, &rng);
    for (int round = 0; round < 40; round++) {
        while (t->n[0] + 16 < TOKENS) {
            tell_tokens(j, t, 0, 16, &rng);
            if (++turns % 16 == 0) {
                journal_turn(j, false);
                segments(&bytes, NULL);
                ck_assert_uint_lt(bytes, JOURNAL_MIN_BYTES);
            }
        }
        if (n_model < REQUESTS) {
            tell_end(j, t, 0);
            t = tell_accept(j, &rng);
        }
    }
    journal_turn(j, true);
    ck_assert_uint_gt(stats_of(j).segments, 1);
    ck_assert_uint_eq(stats_of(j).skipped + stats_of(j).dropped, 0);
    ck_assert_uint_eq(segments(&bytes, NULL), 1);
    journal_close(j);
    reopen_and_check(true);
}
END_TEST

START_TEST(what_would_pass_the_bound_is_skipped_and_the_ended_make_room)
{
    uint64_t rng = 10;
    static uint32_t prompt[20000]; /* 80 KB: three of them fit a quarter of a megabyte */
    struct journal *j = open_sized(JOURNAL_MIN_BYTES);
    struct journal_accept a = {
        .deadline_us = INT64_MAX, .n_choices = 1, .name = "x", .name_len = 1, .prompt = prompt, .n_prompt = 20000};
    for (int i = 0; i < 4; i++) {
        a.number = journal_number(j);
        journal_accept(j, &a);
        journal_tokens(j, a.number, 0, 0, prompt, 3);
    }
    journal_turn(j, false);
    ck_assert_uint_eq(stats_of(j).live, 3);
    ck_assert_uint_eq(stats_of(j).skipped, 1);
    journal_end(j, 1, sys.now_us + 5000000);
    a.number = journal_number(j);
    journal_accept(j, &a);
    journal_turn(j, false);
    ck_assert_uint_eq(stats_of(j).live, 3); /* the first made room */
    ck_assert_uint_eq(stats_of(j).skipped, 1);
    journal_end(j, 2, sys.now_us + 1000);
    journal_turn(j, false);
    sys.now_us += 1001 + JOURNAL_EXPIRE_US;
    journal_turn(j, false);
    ck_assert_uint_eq(stats_of(j).live, 2);
    journal_close(j);
    (void)rng;
}
END_TEST

START_TEST(a_gap_ends_what_is_known_of_a_choice)
{
    uint64_t rng = 11;
    struct journal *j = open_it();
    struct told *t = tell_accept(j, &rng);
    tell_tokens(j, t, 0, 4, &rng);
    journal_tokens(j, t->number, 0, 6, t->id[0], 2);
    journal_tokens(j, t->number + 1, 0, 0, t->id[0], 2); /* of nobody */
    journal_end(j, t->number + 1, 0);
    journal_turn(j, true);
    journal_close(j);
    reopen_and_check(true);
}
END_TEST

/* ---- faults ---- */

/* Each call of each kind fails once, or for a while; what is on the disk is a prefix at once, and all of it after a second. */
static void nth_call_fails(enum call kind, int error, uint32_t how_long)
{
    for (uint32_t n = 1; n < 200; n += n < 6 ? 1 : 31) {
        tear_down();
        set_up();
        uint64_t rng = n;
        sys.error = error;
        sys.fail_at[kind] = n;
        sys.fail_for = how_long;
        sys.short_writes = n % 2;
        struct journal *j = open_sized(JOURNAL_MIN_BYTES);
        for (int part = 0; part < 8; part++) {
            script(j, &rng, 40);
            sys.now_us += 300000;
        }
        uint32_t failed = sys.failed;
        sys.fail_at[kind] = 0;
        sys.now_us += JOURNAL_RETRY_US;
        journal_turn(j, false);
        journal_turn(j, false);
        struct journal_stats s = stats_of(j);
        ck_assert_msg(!s.degraded && s.errors >= (failed && kind != CALL_TRUNCATE), "call %u", n);
        ck_assert_int_eq(reports[0], reports[1]);
        ck_assert_uint_eq(s.dropped + s.skipped, 0);
        journal_close(j);
        reopen_and_check(true);
        if (!failed)
            return;
    }
}

START_TEST(the_nth_write_fails)
{
    nth_call_fails(CALL_WRITE, ENOSPC, 1);
    nth_call_fails(CALL_WRITE, EIO, 3);
}
END_TEST

START_TEST(the_nth_sync_fails)
{
    nth_call_fails(CALL_SYNC, EIO, 1);
    nth_call_fails(CALL_SYNC, ENOSPC, 2);
}
END_TEST

START_TEST(the_nth_open_or_unlink_fails)
{
    nth_call_fails(CALL_OPEN, ENOSPC, 2);
    nth_call_fails(CALL_UNLINK, EIO, 2);
}
END_TEST

/* The process dies right after the fault, and the torn end stays. */
START_TEST(a_fault_and_a_crash_leave_a_prefix)
{
    for (uint32_t n = 1; n < 20; n++) {
        tear_down();
        set_up();
        uint64_t rng = n;
        sys.fail_at[CALL_WRITE] = n;
        sys.fail_at[CALL_TRUNCATE] = 1;
        sys.fail_for = 1000;
        struct journal *j = open_it();
        script(j, &rng, 100);
        journal_close(j); /* nothing more is written: it is degraded */
        reopen_and_check(false);
    }
}
END_TEST

START_TEST(a_full_disk_is_told_once_and_left_behind)
{
    uint64_t rng = 20;
    struct journal *j = open_it();
    script(j, &rng, 200);
    sys.fail_at[CALL_WRITE] = sys.calls[CALL_WRITE] + 1;
    sys.fail_for = 1000000;
    for (int i = 0; i < 20; i++) {
        script(j, &rng, 20);
        sys.now_us += 400000;
    }
    journal_turn(j, false);
    struct journal_stats s = stats_of(j);
    ck_assert(s.degraded && s.errors > 3 && s.errors < 12); /* each second, not each turn */
    ck_assert_int_eq(reports[1], 1);
    ck_assert_int_eq(reports[0], 0);
    sys.fail_at[CALL_WRITE] = 0;
    sys.now_us += JOURNAL_RETRY_US;
    journal_turn(j, false);
    ck_assert(!stats_of(j).degraded);
    ck_assert_int_eq(reports[0], 1);
    uint64_t bytes;
    ck_assert_uint_eq(segments(&bytes, NULL), 1);
    journal_close(j);
    reopen_and_check(true);
}
END_TEST

START_TEST(a_disk_that_is_full_at_the_start_is_no_error)
{
    uint64_t rng = 21;
    sys.fail_at[CALL_OPEN] = 1;
    struct journal *j = open_it();
    ck_assert(stats_of(j).degraded);
    tell_accept(j, &rng);
    sys.now_us += JOURNAL_RETRY_US;
    journal_turn(j, false);
    ck_assert(!stats_of(j).degraded);
    journal_close(j);
    reopen_and_check(true);
}
END_TEST

static Suite *journal_suite(void)
{
    Suite *s = suite_create("journal");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    TCase *all[] = {core, limits, faults};
    for (size_t i = 0; i < 3; i++) {
        tcase_add_checked_fixture(all[i], set_up, tear_down);
        tcase_set_timeout(all[i], 60);
        suite_add_tcase(s, all[i]);
    }
    tcase_add_test(core, what_was_told_is_found);
    tcase_add_test(core, an_empty_folder_is_made_and_locked);
    tcase_add_test(core, what_a_killed_process_told_is_found);
    tcase_add_test(limits, files_stay_below_the_bound);
    tcase_add_test(limits, what_would_pass_the_bound_is_skipped_and_the_ended_make_room);
    tcase_add_test(limits, a_gap_ends_what_is_known_of_a_choice);
    tcase_add_test(faults, a_tail_torn_at_any_byte_takes_only_the_last_record);
    tcase_add_test(faults, a_damaged_byte_anywhere_gives_a_prefix);
    tcase_add_test(faults, what_follows_a_damaged_record_is_found);
    tcase_add_test(faults, a_segment_without_its_snapshot_does_not_count);
    tcase_add_test(faults, the_nth_write_fails);
    tcase_add_test(faults, the_nth_sync_fails);
    tcase_add_test(faults, the_nth_open_or_unlink_fails);
    tcase_add_test(faults, a_fault_and_a_crash_leave_a_prefix);
    tcase_add_test(faults, a_full_disk_is_told_once_and_left_behind);
    tcase_add_test(faults, a_disk_that_is_full_at_the_start_is_no_error);
    return s;
}

int main(void)
{
    SRunner *r = srunner_create(journal_suite());
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
