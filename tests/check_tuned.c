/* check_tuned.c - measurements kept in a file: what is put is found by the next one, and whatever is wrong with the file, it is
 * as good as none. */
#include <check.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/temp_dir.h"
#include "worker/tuned.h"

#define IDENTITY "a device, driver 1, library 2"

static struct temp_dir dir;

static void make_dir(void)
{
    dir = temp_dir_make();
}

static void remove_dir(void)
{
    temp_dir_remove(&dir);
}

static struct tuned *open_in(const char *folder, const char *identity)
{
    struct tuned *t;
    struct status st = STATUS_INIT;
    ck_assert_msg(tuned_open(&t, folder, identity, &st) == ST_OK, "%s", st.message);
    return t;
}

static const uint32_t *key_of(uint32_t i)
{
    static uint32_t key[TUNED_KEY_WORDS];
    for (uint32_t w = 0; w < TUNED_KEY_WORDS; w++)
        key[w] = i * 0x9E3779B9u + w;
    return key;
}

static void put(struct tuned *t, uint32_t i, uint8_t byte)
{
    uint8_t value[TUNED_VALUE_BYTES];
    memset(value, byte, sizeof value);
    ck_assert(tuned_put(t, key_of(i), value));
}

/* -1: it is not there; else the value's byte. */
static int get(const struct tuned *t, uint32_t i)
{
    uint8_t value[TUNED_VALUE_BYTES];
    if (!tuned_find(t, key_of(i), value))
        return -1;
    for (uint32_t b = 1; b < sizeof value; b++)
        ck_assert_uint_eq(value[b], value[0]);
    return value[0];
}

static void save(struct tuned *t)
{
    struct status st = STATUS_INIT;
    ck_assert_msg(tuned_save(t, &st) == ST_OK, "%s", st.message);
}

static uint32_t files_in(const char *path)
{
    DIR *d = opendir(path);
    uint32_t n = 0;
    ck_assert_ptr_nonnull(d);
    while (readdir(d))
        n++;
    closedir(d);
    return n - 2;
}

/* ---- core ---- */

START_TEST(what_was_put_is_found_by_the_next_one)
{
    char folder[300];
    snprintf(folder, sizeof folder, "%s/not/yet/there", dir.path);
    struct tuned *t = open_in(folder, IDENTITY);
    ck_assert_ptr_null(tuned_problem(t));
    save(t); /* nothing: no folder either */
    ck_assert_int_ne(access(folder, F_OK), 0);
    put(t, 1, 11);
    put(t, 2, 22);
    put(t, 1, 33);
    ck_assert_int_eq(get(t, 1), 33);
    save(t);
    tuned_close(t);
    ck_assert_uint_eq(files_in(folder), 1);
    struct stat sb;
    ck_assert_int_eq(stat(folder, &sb), 0);
    ck_assert_uint_eq(sb.st_mode & 0777, 0700);
    t = open_in(folder, IDENTITY);
    ck_assert_ptr_null(tuned_problem(t));
    ck_assert_int_eq(stat(tuned_path(t), &sb), 0);
    ck_assert_uint_eq(sb.st_mode & 0777, 0600);
    ck_assert_uint_eq(tuned_count(t), 2);
    ck_assert_int_eq(get(t, 1), 33);
    ck_assert_int_eq(get(t, 2), 22);
    ck_assert_int_eq(get(t, 3), -1);
    tuned_close(t);
}
END_TEST

START_TEST(each_identity_has_its_own)
{
    struct tuned *a = open_in(dir.path, IDENTITY), *b = open_in(dir.path, IDENTITY "2");
    put(a, 1, 1);
    put(b, 1, 2);
    save(a);
    save(b);
    tuned_close(a);
    tuned_close(b);
    ck_assert_uint_eq(files_in(dir.path), 2);
    a = open_in(dir.path, IDENTITY);
    b = open_in(dir.path, IDENTITY "2");
    ck_assert_int_eq(get(a, 1), 1);
    ck_assert_int_eq(get(b, 1), 2);
    tuned_close(a);
    tuned_close(b);
}
END_TEST

START_TEST(two_writers_keep_what_the_other_found)
{
    struct tuned *a = open_in(dir.path, IDENTITY), *b = open_in(dir.path, IDENTITY);
    put(a, 1, 1);
    put(a, 2, 1);
    put(b, 2, 2);
    put(b, 3, 2);
    save(a);
    save(b);
    tuned_close(a);
    tuned_close(b);
    a = open_in(dir.path, IDENTITY);
    ck_assert_int_eq(get(a, 1), 1);
    ck_assert_int_eq(get(a, 2), 2); /* the last one's */
    ck_assert_int_eq(get(a, 3), 2);
    tuned_close(a);
}
END_TEST

/* ---- limits ---- */

START_TEST(there_is_a_most)
{
    struct tuned *t = open_in(dir.path, IDENTITY);
    uint8_t value[TUNED_VALUE_BYTES] = {0};
    for (uint32_t i = 0; i < TUNED_RECORDS_MAX; i++)
        put(t, i, (uint8_t)i);
    ck_assert(!tuned_put(t, key_of(TUNED_RECORDS_MAX), value));
    put(t, 7, 99); /* one that is there still can be changed */
    save(t);
    tuned_close(t);
    t = open_in(dir.path, IDENTITY);
    ck_assert_ptr_null(tuned_problem(t));
    ck_assert_uint_eq(tuned_count(t), TUNED_RECORDS_MAX);
    ck_assert_int_eq(get(t, 7), 99);
    ck_assert_int_eq(get(t, TUNED_RECORDS_MAX - 1), (uint8_t)(TUNED_RECORDS_MAX - 1));
    tuned_close(t);
}
END_TEST

START_TEST(names_that_are_too_long_are_refused)
{
    struct tuned *t;
    struct status st = STATUS_INIT;
    char text[5000];
    memset(text, 'x', sizeof text);
    text[TUNED_IDENTITY_MAX + 1] = '\0';
    ck_assert_int_eq(tuned_open(&t, dir.path, text, &st), ST_INVALID_ARGUMENT);
    text[TUNED_IDENTITY_MAX + 1] = 'x';
    text[sizeof text - 1] = '\0';
    ck_assert_int_eq(tuned_open(&t, text, IDENTITY, &st), ST_INVALID_ARGUMENT);
    ck_assert_msg(strstr(st.message, "a path of 4999 bytes"), "%s", st.message);
}
END_TEST

/* ---- faults ---- */

/* Each byte changed, each length cut: never used, always said, and mended by the next save. */
START_TEST(a_damaged_file_is_as_good_as_none)
{
    struct tuned *t = open_in(dir.path, IDENTITY);
    size_t bytes;
    put(t, 1, 11);
    put(t, 2, 22);
    save(t);
    const char *path = tuned_path(t);
    char *good = temp_dir_read_file(path, &bytes), *bad = malloc(bytes + 1);
    for (size_t i = 0; i < 2 * bytes + 1; i++) {
        memcpy(bad, good, bytes);
        size_t n = i < bytes ? bytes : i - bytes; /* cut short, or one longer at the end */
        if (i < bytes)
            bad[i] ^= 1;
        if (i == 2 * bytes)
            n = bytes + 1;
        temp_dir_write(&dir, strrchr(path, '/') + 1, bad, n);
        struct tuned *u = open_in(dir.path, IDENTITY);
        ck_assert_msg(tuned_problem(u) != NULL, "change %zu of %zu bytes", i, bytes);
        ck_assert_ptr_nonnull(strstr(tuned_problem(u), path));
        ck_assert_uint_eq(tuned_count(u), 0);
        if (i % 64 == 0) {
            put(u, 5, 55);
            save(u);
            struct tuned *v = open_in(dir.path, IDENTITY);
            ck_assert_ptr_null(tuned_problem(v));
            ck_assert_int_eq(get(v, 5), 55);
            tuned_close(v);
        }
        tuned_close(u);
    }
    free(bad);
    free(good);
    tuned_close(t);
}
END_TEST

START_TEST(a_folder_that_cannot_be_written_is_named)
{
    char folder[300];
    struct status st = STATUS_INIT;
    temp_dir_write(&dir, "file", "x", 1);
    snprintf(folder, sizeof folder, "%s/file/folder", dir.path); /* root may write anywhere, but not below a file */
    struct tuned *t = open_in(folder, IDENTITY);
    put(t, 1, 1);
    ck_assert_int_eq(tuned_save(t, &st), ST_UNAVAILABLE);
    ck_assert_msg(strstr(st.message, "/file"), "%s", st.message);
    ck_assert_int_eq(get(t, 1), 1); /* this process still has it */
    tuned_close(t);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("tuned");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    TCase *all[] = {core, limits, faults};
    tcase_add_test(core, what_was_put_is_found_by_the_next_one);
    tcase_add_test(core, each_identity_has_its_own);
    tcase_add_test(core, two_writers_keep_what_the_other_found);
    tcase_add_test(limits, there_is_a_most);
    tcase_add_test(limits, names_that_are_too_long_are_refused);
    tcase_add_test(faults, a_damaged_file_is_as_good_as_none);
    tcase_add_test(faults, a_folder_that_cannot_be_written_is_named);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        tcase_add_checked_fixture(all[i], make_dir, remove_dir);
        tcase_set_timeout(all[i], 60);
        suite_add_tcase(s, all[i]);
    }
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
