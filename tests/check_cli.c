/* check_cli.c - options of a command from arguments, environment and file, and what is printed of their table. */
#include <check.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/cli.h"
#include "tests/temp_dir.h"

enum { TOP_K = 1, GREEDY, STOP, IDS, MODEL };

static const struct cli_option options[] = {
    {.name = "top-k", .id = TOP_K, .arg = "K", .fallback = "0", .help = "likeliest"},
    {.name = "greedy", .id = GREEDY, .help = "always the likeliest"},
    {.name = "stop", .id = STOP, .arg = "TEXT", .flags = CLI_REPEAT, .help = "stop here"},
    {.name = "ids", .id = IDS, .arg = "JSON", .flags = CLI_LINE_ONLY, .help = "the prompt"},
    {.name = "model", .id = MODEL, .arg = "DIR", .flags = CLI_FILE, .choices = NULL, .help = ".a 'model'\\dir"},
    {0},
};
static const struct cli_option other_options[] = {{.name = "wait", .id = 1, .arg = "S", .help = "so long"}, {0}};
static const struct cli_command generate = {
    .name = "generate",
    .summary = "generate",
    .operands = "[PROMPT]",
    .about = "About.\n\n.Second paragraph",
    .tables = (const struct cli_option *const[]){options, NULL},
    .exits = "0 done.",
    .examples = "  tandem generate\n",
};
static const struct cli_command other = {
    .name = "other",
    .summary = "other",
    .words = "one|two",
    .about = "About.",
    .tables = (const struct cli_option *const[]){other_options, NULL},
    .hands_on = true,
};
static const struct cli_command *const all[] = {&generate, &other, NULL};

static struct temp_dir dir;
static char conf[300];

/* ---- allocations that fail ---- */

static int fail_at; /* 0: none */
static int seen;

static bool fails(void)
{
    return fail_at && ++seen == fail_at;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t m);
void *__real_realloc(void *p, size_t n);
char *__real_strdup(const char *s);
char *__real_strndup(const char *s, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t m);
void *__wrap_realloc(void *p, size_t n);
char *__wrap_strdup(const char *s);
char *__wrap_strndup(const char *s, size_t n);
void *__wrap_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}
void *__wrap_calloc(size_t n, size_t m)
{
    return fails() ? NULL : __real_calloc(n, m);
}
void *__wrap_realloc(void *p, size_t n)
{
    return fails() ? NULL : __real_realloc(p, n);
}
char *__wrap_strdup(const char *s)
{
    return fails() ? NULL : __real_strdup(s);
}
char *__wrap_strndup(const char *s, size_t n)
{
    return fails() ? NULL : __real_strndup(s, n);
}

/* ---- fixture ---- */

static void set_up(void)
{
    dir = temp_dir_make();
    snprintf(conf, sizeof conf, "%s/tandem.conf", dir.path);
    setenv("TANDEM_CONFIG", "", 1);
    fail_at = 0;
}

static void tear_down(void)
{
    temp_dir_remove(&dir);
}

static void use_file(const char *text)
{
    temp_dir_write(&dir, "tandem.conf", text, strlen(text));
    setenv("TANDEM_CONFIG", conf, 1);
}

static int count(const char *const *words)
{
    int n = 0;
    while (words[n])
        n++;
    return n;
}

/* The words end with NULL. */
#define WORDS(...) ((const char *const[]){"generate", __VA_ARGS__})
#define READ(a, st, ...)                                                                                               \
    cli_read(a, &generate, all, count(WORDS(__VA_ARGS__)), (char **)(uintptr_t)WORDS(__VA_ARGS__), st)

/* All that cli_next gives, as "id=text ". */
static void list(struct cli_args *a, char *out, size_t room)
{
    size_t n = 0;
    out[0] = '\0';
    for (int id; (id = cli_next(a)) != 0;)
        n += (size_t)snprintf(out + n, room - n, "%d=%s ", id, a->text);
}

static void refused(const char *part, const char *arg1, const char *arg2)
{
    struct cli_args a;
    struct status st = STATUS_INIT;
    ck_assert_int_ne(READ(&a, &st, arg1, arg2, NULL), ST_OK);
    ck_assert_msg(strstr(st.message, part) != NULL, "\"%s\" lacks \"%s\"", st.message, part);
    cli_free(&a);
}

/* ---- core ---- */

/* Every set of origins, for an option with one value and for one with several: the highest wins, whole. */
START_TEST(the_highest_origin_that_names_an_option_wins)
{
    for (unsigned set = 0; set < 32; set++) {
        char file[256], got[128], want[64] = "";
        struct cli_args a;
        struct status st = STATUS_INIT;
        snprintf(file, sizeof file, "%s[generate]\n%s[other]\nwait = 1\n", set & 1 ? "top-k=0\nstop=a0\nstop=b0\n" : "",
                 set & 2 ? "top-k=1\nstop=a1\nstop=b1\n" : "");
        use_file(file);
        setenv("TANDEM_TOP_K", set & 4 ? "2" : "", 1);
        setenv("TANDEM_STOP", set & 4 ? "a2\nb2" : "", 1);
        setenv("TANDEM_GENERATE_TOP_K", set & 8 ? "3" : "", 1);
        setenv("TANDEM_GENERATE_STOP", set & 8 ? "a3\nb3\n" : "", 1);
        if (set & 16)
            ck_assert_int_eq(READ(&a, &st, "--top-k", "4", "--stop=a4", "--stop", "b4", NULL), ST_OK);
        else
            ck_assert_int_eq(READ(&a, &st, NULL), ST_OK);
        list(&a, got, sizeof got);
        for (int o = 4; o >= 0 && !*want; o--)
            if (set & 1u << o)
                snprintf(want, sizeof want, "1=%d 3=a%d 3=b%d ", o, o, o);
        ck_assert_str_eq(got, want);
        const struct cli_value *v = cli_find(&a, &options[2], 1);
        ck_assert_int_eq(v != NULL, set != 0);
        ck_assert_ptr_null(cli_find(&a, &options[2], 2));
        cli_free(&a);
    }
}
END_TEST

START_TEST(a_switch_can_be_turned_off_by_a_higher_origin)
{
    struct cli_args a;
    struct status st = STATUS_INIT;
    char got[64];
    use_file("greedy = on\n");
    ck_assert_int_eq(READ(&a, &st, NULL), ST_OK);
    list(&a, got, sizeof got);
    ck_assert_str_eq(got, "2=on ");
    cli_free(&a);
    ck_assert_int_eq(READ(&a, &st, "--greedy=false", NULL), ST_OK);
    list(&a, got, sizeof got);
    ck_assert_str_eq(got, "");
    cli_free(&a);
}
END_TEST

START_TEST(words_of_the_command_line)
{
    struct cli_args a;
    struct status st = STATUS_INIT;
    char got[64];
    ck_assert_int_eq(READ(&a, &st, "one", "--top", "-3", "--gr", "-", "--", "--stop", NULL), ST_OK);
    list(&a, got, sizeof got);
    ck_assert_str_eq(got, "1=-3 2=true ");
    ck_assert_int_eq(a.n_operands, 3);
    ck_assert_str_eq(a.operands[1], "-");
    ck_assert_str_eq(a.operands[2], "--stop");
    cli_free(&a);
    ck_assert_int_eq(READ(&a, &st, "--nonsense-later-is-fine", NULL), ST_INVALID_ARGUMENT);
    cli_free(&a);
    ck_assert_int_eq(READ(&a, &st, "--help", "--nonsense", NULL), ST_OK);
    ck_assert(a.help);
    cli_free(&a);
    const char *const argv[] = {"other", "--wait", "1", "one", "--top-k", NULL};
    ck_assert_int_eq(cli_read(&a, &other, all, 5, (char **)(uintptr_t)argv, &st), ST_OK);
    ck_assert_int_eq(a.n_operands, 2); /* hands_on */
    cli_free(&a);
}
END_TEST

START_TEST(messages_name_the_origin)
{
    struct cli_args a;
    struct status st = STATUS_INIT;
    char want[400];
    use_file("\n[generate]\nstop = x\n");
    setenv("TANDEM_TOP_K", "9", 1);
    ck_assert_int_eq(READ(&a, &st, "--greedy", NULL), ST_OK);
    snprintf(want, sizeof want, "generate: %s:3", conf);
    ck_assert_int_eq(cli_next(&a), STOP);
    ck_assert_str_eq(a.where, want);
    ck_assert_int_eq(cli_next(&a), TOP_K);
    ck_assert_str_eq(a.where, "generate: TANDEM_TOP_K");
    ck_assert_int_eq(cli_next(&a), GREEDY);
    ck_assert_str_eq(a.where, "generate");
    cli_free(&a);
    refused("--nope", "--nope", NULL);
    refused("--top-k needs a value", "--top-k", NULL);
    refused("\"maybe\", expected true or false", "--greedy=maybe", NULL);
}
END_TEST

START_TEST(help_man_and_completion_know_every_option)
{
    for (int kind = 0; kind < 5; kind++) {
        static const char *const shells[] = {"bash", "zsh", "fish"};
        char *text = NULL;
        size_t bytes = 0;
        FILE *f = open_memstream(&text, &bytes);
        if (kind == 0)
            cli_help(f, &generate);
        else if (kind == 1)
            cli_man(f, &generate, all);
        else
            ck_assert(cli_completion(f, shells[kind - 2], all));
        fclose(f);
        for (const struct cli_option *o = options; o->name; o++) {
            char name[64];
            snprintf(name, sizeof name, "%s", o->name);
            if (kind == 1 && strcmp(o->name, "top-k") == 0)
                snprintf(name, sizeof name, "top\\-k");
            ck_assert_msg(strstr(text, name) != NULL, "%d lacks %s", kind, name);
        }
        if (kind == 1) { /* no line of ours is taken for a request */
            ck_assert_ptr_null(strstr(text, "\n.a "));
            ck_assert_ptr_null(strstr(text, "\n.Second"));
            ck_assert_ptr_nonnull(strstr(text, "\\edir"));
        }
        free(text);
    }
    ck_assert(!cli_completion(stdout, "csh", all));
}
END_TEST

/* ---- limits ---- */

static void file_is(const char *text, const char *want)
{
    struct cli_file f = {0};
    struct status st = STATUS_INIT;
    char got[1024] = "";
    size_t n = 0;
    if (cli_file_parse(&f, "f", text, strlen(text), &st) != ST_OK)
        snprintf(got, sizeof got, "%s", st.message);
    for (size_t i = 0; i < f.n; i++)
        n += (size_t)snprintf(got + n, sizeof got - n, "%s/%s=<%s>@%u ", f.entries[i].section, f.entries[i].key,
                              f.entries[i].value, f.entries[i].line);
    if (want[0] == 'f' && want[1] == ':')
        ck_assert_msg(strncmp(got, want, strlen(want)) == 0, "\"%s\", not \"%s\"", got, want);
    else
        ck_assert_str_eq(got, want);
    cli_file_free(&f);
}

START_TEST(the_form_of_a_file)
{
    file_is("", "");
    file_is("# only\r\n\n  \t\n", "");
    file_is("a=b", "/a=<b>@1 ");
    file_is(" a-1 =  b c\t# d\n[x] #\nk=v#w\r\n", "/a-1=<b c>@1 x/k=<v#w>@3 ");
    file_is("a=\nb = # c\nc=\"\"\n", "/a=<>@1 /b=<>@2 /c=<>@3 ");
    file_is("a = \" # \\n\\\"\\\\\" # c\n", "/a=< # \n\"\\>@1 ");
    file_is("[ x ]\n[y]\na=1\n", "y/a=<1>@3 ");
    file_is("a\n", "f:1: ");
    file_is("\nA = 1\n", "f:2: ");
    file_is("=1\n", "f:1: ");
    file_is("[x\n", "f:1: ");
    file_is("[]\n", "f:1: ");
    file_is("[x] y\n", "f:1: ");
    file_is("a = \"b\n\"\n", "f:1: ");
    file_is("a = \"b\" c\n", "f:1: ");
    file_is("a = \"\\x\"\n", "f:1: ");
    file_is("a = \"\\", "f:1: ");
}
END_TEST

START_TEST(the_size_of_a_file_is_bounded)
{
    struct cli_file f = {0};
    struct status st = STATUS_INIT;
    size_t room = CLI_FILE_MAX_BYTES + 1;
    char *text = malloc(room);
    memset(text, '#', room);
    ck_assert_int_eq(cli_file_parse(&f, "f", text, room - 1, &st), ST_OK);
    cli_file_free(&f);
    ck_assert_int_eq(cli_file_parse(&f, "f", text, room, &st), ST_INVALID_ARGUMENT);
    text[5] = '\0';
    ck_assert_int_eq(cli_file_parse(&f, "f", text, 10, &st), ST_INVALID_ARGUMENT);
    for (size_t i = 0; i <= CLI_FILE_MAX_ENTRIES; i++)
        memcpy(text + 4 * i, "a=1\n", 4);
    ck_assert_int_eq(cli_file_parse(&f, "f", text, 4 * CLI_FILE_MAX_ENTRIES, &st), ST_OK);
    ck_assert_uint_eq(f.n, CLI_FILE_MAX_ENTRIES);
    cli_file_free(&f);
    ck_assert_int_eq(cli_file_parse(&f, "f", text, 4 * (CLI_FILE_MAX_ENTRIES + 1), &st), ST_INVALID_ARGUMENT);
    free(text);
}
END_TEST

/* ---- faults ---- */

START_TEST(a_wrong_file_is_refused_with_its_line)
{
    use_file("[none]\na=1\n");
    refused(":2: [none]: no such command", NULL, NULL);
    use_file("[other]\nwait=1\ntop-k=1\n");
    refused(":3: top-k: no such option of other", NULL, NULL);
    use_file("nothing=1\n");
    refused(":1: nothing: no such option", NULL, NULL);
    use_file("ids=[1]\n");
    refused(":1: ids: on the command line only", NULL, NULL);
    use_file("top-k=1\ntop-k=2\n");
    refused(":2: top-k is given twice", NULL, NULL);
    use_file("greedy=maybe\n");
    refused(":1: greedy is \"maybe\"", NULL, NULL);
    setenv("TANDEM_CONFIG", "/nonexistent/tandem.conf", 1);
    refused("/nonexistent/tandem.conf", NULL, NULL);
    setenv("TANDEM_CONFIG", dir.path, 1);
    refused("not a file", NULL, NULL);
    unsetenv("TANDEM_CONFIG"); /* the usual place may be empty */
    setenv("XDG_CONFIG_HOME", dir.path, 1);
    struct cli_args a;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(READ(&a, &st, "--config", "/dev/null", NULL), ST_OK);
    cli_free(&a);
}
END_TEST

START_TEST(any_allocation_may_fail)
{
    use_file("top-k = 1\nstop = a\nstop = b\n[generate]\ngreedy = true\n");
    setenv("TANDEM_STOP", "x\ny", 1);
    bool failed = true;
    int n = 0;
    while (failed) {
        struct cli_args a;
        struct status st = STATUS_INIT;
        seen = 0;
        fail_at = ++n;
        enum status_code rc = READ(&a, &st, "--stop", "z", "--top-k=2", "--config", conf, "operand", NULL);
        failed = seen >= fail_at;
        fail_at = 0;
        ck_assert_int_eq(rc, failed ? ST_RESOURCE_EXHAUSTED : ST_OK);
        cli_free(&a);
    }
    ck_assert_int_gt(n, 15);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("cli");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_test(core, the_highest_origin_that_names_an_option_wins);
    tcase_add_test(core, a_switch_can_be_turned_off_by_a_higher_origin);
    tcase_add_test(core, words_of_the_command_line);
    tcase_add_test(core, messages_name_the_origin);
    tcase_add_test(core, help_man_and_completion_know_every_option);
    tcase_add_test(limits, the_form_of_a_file);
    tcase_add_test(limits, the_size_of_a_file_is_bounded);
    tcase_add_test(faults, a_wrong_file_is_refused_with_its_line);
    tcase_add_test(faults, any_allocation_may_fail);
    TCase *cases[] = {core, limits, faults};
    for (int i = 0; i < 3; i++) {
        tcase_add_checked_fixture(cases[i], set_up, tear_down);
        suite_add_tcase(s, cases[i]);
    }
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
