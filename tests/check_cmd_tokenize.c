/* check_cmd_tokenize.c - `tandem tokenize` as people and scripts use it: what goes in, what comes out, what it says. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "tests/temp_dir.h"

#define LLAMA2 "--model " TEST_DATA "/tokenizers/llama2"
#define TINY   "--model " TEST_DATA "/tokenizers/tinystories512"
#define DEMO   "--model " TEST_DATA "/demo-model"

struct run {
    const char *args, *input;
    int status;
    const char *out, *err; /* err: a part of the one line on stderr; NULL: nothing is said */
};

static const struct run RUNS[] = {
    {DEMO, "\"Once upon a time\"\n", 0, "[415,424,258,393]\n", NULL},
    {DEMO, "\"Once upon a time\"", 0, "[415,424,258,393]\n", NULL}, /* the last line may lack its end */
    {DEMO, "\"\"\n\" \"\r\n", 0, "[]\n[220]\n", NULL},
    {DEMO, "", 0, "", NULL},
    {DEMO, "\"a\\u0000b\"\n", 0, "[64,188,65]\n", NULL},
    {LLAMA2, "\"<s>'s\"\n", 0, "[1,525,29879]\n", NULL},
    {LLAMA2 " --add-special", "\"<s>'s\"\n\"\"\n", 0, "[1,1,525,29879]\n[1]\n", NULL},
    {LLAMA2 " --decode", "[1,525,29879]\n[]\n", 0, "\"<s> 's\"\n\"\"\n", NULL},
    {LLAMA2 " --decode --skip-special", "[1,525,29879]\n", 0, "\"'s\"\n", NULL},
    {TINY " --decode", "[3]\n", 0, "\"\\u0000\"\n", NULL},
    {DEMO, "\"a\"\n\"b\n\"c\"\n", 1, "[64]\n", "tandem tokenize: line 2: not JSON: "},
    {DEMO, "7\n", 1, "", "tandem tokenize: line 1: expected a JSON string"},
    {DEMO, "\n", 1, "", "tandem tokenize: line 1: not JSON"},
    {DEMO, "\"\\ud800\"\n", 1, "", "tandem tokenize: line 1: not JSON"}, /* half a surrogate pair is no text */
    {DEMO, "\"\xFF\"\n", 1, "", "tandem tokenize: line 1: not JSON"},
    {DEMO " --decode", "\"a\"\n", 1, "", "line 1: expected a JSON array of token ids"},
    {DEMO " --decode", "[64]\n[64,2048]\n", 1, "\"a\"\n", "line 2: ids[1]: 2048 is not in the vocabulary"},
    {DEMO " --decode", "[-1]\n", 1, "", "line 1: ids[0]: expected a token id"},
    {DEMO " --decode", "[1.5]\n", 1, "", "line 1: ids[0]: expected a token id"},
    {DEMO " --decode", "[99999999999]\n", 1, "", "line 1: ids[0]: expected a token id"},
    {"--model /nonexistent", "", 1, "", "tandem tokenize: /nonexistent/tokenizer.json: No such file"},
    {"", "", 2, "", "tandem tokenize: --model DIR is missing"},
    {DEMO " text", "", 2, "", "unexpected argument 'text'"},
    {DEMO " --nonsense", "", 2, "", "--nonsense"},
    {DEMO " --skip-special", "", 2, "", "--skip-special goes with --decode"},
    {DEMO " --decode --add-special", "", 2, "", "--add-special goes with text"},
};

static char *slurp(const struct temp_dir *d, const char *name)
{
    char path[512];
    size_t n;
    snprintf(path, sizeof path, "%s/%s", d->path, name);
    return temp_dir_read_file(path, &n);
}

static int run(const struct temp_dir *d, const char *args, const char *input)
{
    char command[2048];
    temp_dir_write(d, "in", input, strlen(input));
    snprintf(command, sizeof command, "'%s' tokenize %s <%s/in >%s/out 2>%s/err", TEST_TANDEM, args, d->path, d->path,
             d->path);
    int status = system(command);
    ck_assert(WIFEXITED(status));
    return WEXITSTATUS(status);
}

START_TEST(lines_in_lines_out)
{
    const struct run *r = &RUNS[_i];
    struct temp_dir d = temp_dir_make();
    int status = run(&d, r->args, r->input);
    char *out = slurp(&d, "out"), *err = slurp(&d, "err");
    ck_assert_msg(status == r->status, "%s: status %d, expected %d: %s", r->args, status, r->status, err);
    ck_assert_str_eq(out, r->out);
    if (r->err)
        ck_assert_msg(strstr(err, r->err) && strchr(err, '\n') == err + strlen(err) - 1, "%s: '%s'", r->args, err);
    else
        ck_assert_str_eq(err, "");
    free(out);
    free(err);
    temp_dir_remove(&d);
}
END_TEST

START_TEST(help_teaches)
{
    struct temp_dir d = temp_dir_make();
    ck_assert_int_eq(run(&d, "--help", ""), 0);
    char *out = slurp(&d, "out");
    ck_assert_ptr_nonnull(strstr(out, "usage: tandem tokenize --model DIR"));
    ck_assert_ptr_nonnull(strstr(out, "--skip-special"));
    free(out);
    temp_dir_remove(&d);
}
END_TEST

START_TEST(a_full_disk_is_noticed)
{
    char command[1024];
    snprintf(command, sizeof command, "echo '\"a\"' | '%s' tokenize %s >/dev/full 2>/dev/null", TEST_TANDEM, DEMO);
    int status = system(command);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 1);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cmd_tokenize");
    TCase *core = tcase_create("core");
    tcase_set_timeout(core, 60);
    tcase_add_loop_test(core, lines_in_lines_out, 0, sizeof RUNS / sizeof *RUNS);
    tcase_add_test(core, help_teaches);
    tcase_add_test(core, a_full_disk_is_noticed);
    suite_add_tcase(suite, core);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
