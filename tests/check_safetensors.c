/* check_safetensors.c - worker/safetensors.h: what a good folder gives, and what is said about each kind of damage. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/temp_dir.h"
#include "worker/safetensors.h"

#define DEMO TEST_DATA "/demo-model"

/* A file of a header and `data_bytes` counting bytes; *bytes is its length. To be freed. */
static uint8_t *make_file(const char *header, size_t data_bytes, size_t *bytes)
{
    size_t n = strlen(header);
    *bytes = 8 + n + data_bytes;
    uint8_t *f = malloc(*bytes);
    for (int i = 0; i < 8; i++)
        f[i] = (uint8_t)((uint64_t)n >> 8 * i);
    uint8_t *data = mempcpy(f + 8, header, n);
    for (size_t i = 0; i < data_bytes; i++)
        data[i] = (uint8_t)i;
    return f;
}

static void write_tensors(const struct temp_dir *d, const char *name, const char *header, size_t data_bytes)
{
    size_t bytes;
    uint8_t *f = make_file(header, data_bytes, &bytes);
    temp_dir_write(d, name, f, bytes);
    free(f);
}

static void write_text(const struct temp_dir *d, const char *name, const char *text)
{
    temp_dir_write(d, name, text, strlen(text));
}

/* ---- core ---- */

START_TEST(demo_model_is_read)
{
    struct safetensors *s;
    struct safetensor t;
    ck_assert_int_eq(safetensors_open(&s, DEMO, NULL), ST_OK);
    ck_assert_uint_eq(safetensors_count(s), 2 + 4 * 9);
    ck_assert_int_eq(safetensors_get(&t, s, "model.embed_tokens.weight", NULL), ST_OK);
    ck_assert_int_eq(t.dtype, MAT_BF16);
    ck_assert_uint_eq(t.dims, 2);
    ck_assert_uint_eq(t.shape[0], 2048);
    ck_assert_uint_eq(t.shape[1], 192);
    ck_assert_uint_eq(t.bytes, 2048 * 192 * 2);
    uint64_t total = 0;
    for (size_t i = 0; i < safetensors_count(s); i++) {
        ck_assert(i == 0 || strcmp(safetensors_name(s, i - 1), safetensors_name(s, i)) < 0);
        ck_assert_int_eq(safetensors_get(&t, s, safetensors_name(s, i), NULL), ST_OK);
        total += t.bytes;
    }
    struct stat info;
    ck_assert_int_eq(stat(DEMO "/model.safetensors", &info), 0);
    ck_assert_uint_lt(total, (uint64_t)info.st_size);
    ck_assert_uint_gt(total, (uint64_t)info.st_size - 8192); /* all but the header */
    ck_assert(!safetensors_has(s, "lm_head.weight"));
    safetensors_close(s);
    safetensors_close(NULL);
}
END_TEST

START_TEST(tensors_of_several_files_are_found_by_name)
{
    struct temp_dir d = temp_dir_make();
    write_tensors(&d, "a.safetensors", "{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8);
    write_tensors(&d, "b.safetensors",
                  "{\"__metadata__\":{\"k\":\"v\"},\"y\":{\"dtype\":\"F16\",\"shape\":[1,3],\"data_offsets\":[2,8]},"
                  "\"z\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[0,2]}} ",
                  8);
    write_text(&d, "model.safetensors.index.json",
               "{\"metadata\":{\"total_size\":16},\"weight_map\":"
               "{\"x\":\"a.safetensors\",\"y\":\"b.safetensors\",\"z\":\"b.safetensors\"}}");
    struct safetensors *s;
    struct safetensor t;
    ck_assert_int_eq(safetensors_open(&s, d.path, NULL), ST_OK);
    ck_assert_uint_eq(safetensors_count(s), 3);
    ck_assert_int_eq(safetensors_get(&t, s, "y", NULL), ST_OK);
    ck_assert_int_eq(t.dtype, MAT_F16);
    ck_assert_uint_eq(t.data[0], 2); /* counts within its own file */
    ck_assert_uint_eq(t.bytes, 6);
    ck_assert_ptr_nonnull(strstr(t.file, "b.safetensors"));
    ck_assert_int_eq(safetensors_get(&t, s, "z", NULL), ST_OK);
    ck_assert_uint_eq(t.dims, 0);
    safetensors_close(s);
    temp_dir_remove(&d);
}
END_TEST

START_TEST(single_file_goes_before_an_index)
{
    struct temp_dir d = temp_dir_make();
    write_tensors(&d, "model.safetensors", "{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8);
    write_text(&d, "model.safetensors.index.json", "broken");
    struct safetensors *s;
    ck_assert_int_eq(safetensors_open(&s, d.path, NULL), ST_OK);
    safetensors_close(s);
    temp_dir_remove(&d);
}
END_TEST

/* ---- limits ---- */

START_TEST(empty_tensors_and_empty_files_are_fine)
{
    static const char *const headers[] = {
        "{}",
        "{\"__metadata__\":{}}",
        "{\"e\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}",
        "{\"e\":{\"dtype\":\"F32\",\"shape\":[7,0,9],\"data_offsets\":[0,0]},"
        "\"f\":{\"dtype\":\"BF16\",\"shape\":[0],\"data_offsets\":[0,0]}}",
    };
    for (size_t i = 0; i < sizeof headers / sizeof *headers; i++) {
        size_t bytes;
        uint8_t *f = make_file(headers[i], 0, &bytes);
        struct safetensors *s;
        struct status st = STATUS_INIT;
        ck_assert_msg(safetensors_open_memory(&s, f, bytes, "m", &st) == ST_OK, "%s: %s", headers[i], st.message);
        ck_assert_uint_eq(safetensors_count(s), i < 2 ? 0 : i - 1);
        safetensors_close(s);
        free(f);
    }
}
END_TEST

START_TEST(dtype_that_no_matrix_holds_is_an_error_only_when_asked_for)
{
    size_t bytes;
    uint8_t *f = make_file("{\"a\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]},"
                           "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]},"
                           "\"c\":{\"dtype\":\"F4_NEW\",\"shape\":[3],\"data_offsets\":[12,14]}}",
                           14, &bytes);
    struct safetensors *s;
    struct safetensor t;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(safetensors_open_memory(&s, f, bytes, "some-file", &st), ST_OK);
    ck_assert_int_eq(safetensors_get(&t, s, "b", &st), ST_OK);
    ck_assert_int_eq(safetensors_get(&t, s, "a", &st), ST_UNIMPLEMENTED);
    ck_assert_ptr_nonnull(strstr(st.message, "some-file: tensor a: dtype I64"));
    ck_assert_int_eq(safetensors_get(&t, s, "c", &st), ST_UNIMPLEMENTED);
    ck_assert_int_eq(safetensors_get(&t, s, "d", &st), ST_DATA_LOSS);
    ck_assert_ptr_nonnull(strstr(st.message, "some-file: tensor d is missing"));
    safetensors_close(s);
    free(f);
}
END_TEST

/* ---- faults ---- */

struct damage {
    const char *header;
    size_t data_bytes;
    const char *says;
};

static const struct damage damages[] = {
    {"", 0, "not valid JSON"},
    {"[1]", 0, "expected a JSON object"},
    {"{\"a\":{\"dtype\":\"F32\"", 0, "not valid JSON"},
    {"{\"a\":1}", 0, "tensor a: expected an object"},
    {"{\"a\":{},\"a\":{}}", 0, "duplicate"},
    {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "tensor a: dtype: expected a string"},
    {"{\"a\":{\"dtype\":32,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "tensor a: dtype: expected a string"},
    {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "tensor a: shape: expected an array"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "tensor a: shape: expected integers"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}", 4, "tensor a: shape: expected integers"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4, "tensor a: shape: "},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,2],\"data_offsets\":[0,4]}}", 4, "64 bits"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387905],\"data_offsets\":[0,4]}}", 4, "do not fit"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,4]}}", 4, "not valid JSON"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "tensor a: data_offsets: expected two"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, "tensor a: data_offsets: expected two"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 4, "tensor a: data_offsets: expected two"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4, "tensor a: data_offsets [4, 0]"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 3, "has 3 bytes of data: truncated"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[9223372036854775803,9223372036854775807]}}", 4,
     "truncated"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "2 elements of F32 do not fit"},
    {"{\"a\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "1 elements of BF16 do not fit"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
     "\"b\":{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[2,4]}}",
     4, "tensor b at data offset 2 overlaps tensor a"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
     "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
     4, "overlaps"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, "4 bytes before it belong to none"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 9,
     "9 bytes of data, but its tensors end at 4"},
};

START_TEST(damaged_header_is_described)
{
    const struct damage *c = &damages[_i];
    size_t bytes;
    uint8_t *f = make_file(c->header, c->data_bytes, &bytes);
    struct safetensors *s = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(safetensors_open_memory(&s, f, bytes, "some-file", &st) == ST_DATA_LOSS, "%s: accepted", c->header);
    ck_assert_ptr_null(s);
    ck_assert_msg(strstr(st.message, c->says) && strstr(st.message, "some-file"), "%s: says \"%s\"", c->header,
                  st.message);
    free(f);
}
END_TEST

START_TEST(lying_header_length_is_refused)
{
    size_t bytes;
    uint8_t *f = make_file("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, &bytes);
    static const uint64_t lengths[] = {0, 1, 5, 60, 100000001, 1ull << 32, 1ull << 63, UINT64_MAX, UINT64_MAX - 7};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        struct safetensors *s;
        struct status st = STATUS_INIT;
        for (int k = 0; k < 8; k++)
            f[k] = (uint8_t)(lengths[i] >> 8 * k);
        ck_assert_int_eq(safetensors_open_memory(&s, f, bytes, "some-file", &st), ST_DATA_LOSS);
        ck_assert_ptr_nonnull(strstr(st.message, "some-file"));
    }
    for (size_t n = 0; n < 8; n++) {
        struct safetensors *s;
        ck_assert_int_eq(safetensors_open_memory(&s, f, n, "some-file", NULL), ST_DATA_LOSS);
    }
    free(f);
}
END_TEST

START_TEST(file_cut_anywhere_is_refused)
{
    size_t bytes, step = 1;
    char *f = temp_dir_read_file(DEMO "/model.safetensors", &bytes);
    for (size_t n = 0; n < bytes; n += step) {
        struct safetensors *s;
        /* a copy, so that the sanitizer sees a read behind its end */
        char *cut = malloc(n ? n : 1);
        memcpy(cut, f, n);
        ck_assert_msg(safetensors_open_memory(&s, cut, n, "m", NULL) == ST_DATA_LOSS, "cut at %zu", n);
        free(cut);
        step = n < 64 || bytes - n < 64 ? 1 : n < 5000 ? 97 : (bytes - n) / 8 + 1;
    }
    free(f);
}
END_TEST

static void expect_open(const struct temp_dir *d, enum status_code code, const char *says)
{
    struct safetensors *s;
    struct status st = STATUS_INIT;
    enum status_code rc = safetensors_open(&s, d->path, &st);
    ck_assert_msg(rc == code && strstr(st.message, says), "%s, \"%s\"; expected %s, \"%s\"", status_name(rc),
                  st.message, status_name(code), says);
}

START_TEST(damaged_folder_is_described)
{
    static const char *const x = "{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}";
    static const char *const index = "model.safetensors.index.json";
    struct temp_dir d = temp_dir_make();
    expect_open(&d, ST_NOT_FOUND, "neither model.safetensors nor model.safetensors.index.json");
    write_text(&d, index, "{");
    expect_open(&d, ST_DATA_LOSS, "index.json: not valid JSON");
    write_text(&d, index, "{\"weights\":{}}");
    expect_open(&d, ST_DATA_LOSS, "weight_map: expected an object");
    write_text(&d, index, "{\"weight_map\":{\"x\":3}}");
    expect_open(&d, ST_DATA_LOSS, "weight_map: x: expected the name of a file");
    write_text(&d, index, "{\"weight_map\":{\"x\":\"../a.safetensors\"}}");
    expect_open(&d, ST_DATA_LOSS, "weight_map: x: expected the name of a file in this folder");
    write_text(&d, index, "{\"weight_map\":{\"x\":\"..\"}}");
    expect_open(&d, ST_DATA_LOSS, "weight_map: x: expected the name of a file in this folder");
    write_text(&d, index, "{\"weight_map\":{\"x\":\"a.safetensors\",\"y\":\"b.safetensors\"}}");
    write_tensors(&d, "a.safetensors", x, 8);
    expect_open(&d, ST_NOT_FOUND, "b.safetensors");
    write_text(&d, "b.safetensors", "");
    expect_open(&d, ST_DATA_LOSS, "b.safetensors: 0 bytes");
    write_tensors(&d, "b.safetensors", x, 8);
    expect_open(&d, ST_DATA_LOSS, "tensor x is also in");
    write_tensors(&d, "b.safetensors", "{\"z\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8);
    expect_open(&d, ST_DATA_LOSS, "weight_map: tensor y is not in b.safetensors");
    char path[512];
    snprintf(path, sizeof path, "%s/model.safetensors", d.path);
    ck_assert_int_eq(mkdir(path, 0700), 0);
    expect_open(&d, ST_INVALID_ARGUMENT, "model.safetensors: not a regular file");
    temp_dir_remove(&d);
}
END_TEST

/* What stands there instead of a file must neither be waited for nor be taken for nothing. */
START_TEST(odd_files_are_described)
{
    struct temp_dir d = temp_dir_make();
    char path[512], index[512];
    snprintf(path, sizeof path, "%s/model.safetensors", d.path);
    snprintf(index, sizeof index, "%s/model.safetensors.index.json", d.path);
    ck_assert_int_eq(mkfifo(path, 0600), 0);
    expect_open(&d, ST_INVALID_ARGUMENT, "model.safetensors: not a regular file");
    ck_assert_int_eq(unlink(path), 0);
    ck_assert_int_eq(symlink("model.safetensors", path), 0);
    expect_open(&d, ST_INVALID_ARGUMENT, "model.safetensors: Too many levels");
    ck_assert_int_eq(unlink(path), 0);
    ck_assert_int_eq(symlink("nowhere", path), 0);
    expect_open(&d, ST_NOT_FOUND, "model.safetensors: No such file");
    ck_assert_int_eq(unlink(path), 0);
    ck_assert_int_eq(mkfifo(index, 0600), 0);
    expect_open(&d, ST_INVALID_ARGUMENT, "index.json: not a regular file");
    temp_dir_remove(&d);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("safetensors");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_test(core, demo_model_is_read);
    tcase_add_test(core, tensors_of_several_files_are_found_by_name);
    tcase_add_test(core, single_file_goes_before_an_index);
    tcase_add_test(limits, empty_tensors_and_empty_files_are_fine);
    tcase_add_test(limits, dtype_that_no_matrix_holds_is_an_error_only_when_asked_for);
    tcase_add_loop_test(faults, damaged_header_is_described, 0, sizeof damages / sizeof *damages);
    tcase_add_test(faults, lying_header_length_is_refused);
    tcase_add_test(faults, file_cut_anywhere_is_refused);
    tcase_add_test(faults, damaged_folder_is_described);
    tcase_add_test(faults, odd_files_are_described);
    tcase_set_timeout(faults, 60);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
