#include <check.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/chat.h"
#include "coordinator/jinja.h"
#include "tests/temp_dir.h"

/* ---- the n-th allocation fails ---- */

static long fail_at = -1; /* counts down to the one that fails; below 0: none does */

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t m);
void *__real_realloc(void *p, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t m);
void *__wrap_realloc(void *p, size_t n);

static bool fails(void)
{
    return fail_at >= 0 && fail_at-- == 0;
}

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

/* ---- small parts ---- */

static json_t *json(const char *text)
{
    json_error_t error;
    json_t *v = json_loads(text, JSON_DECODE_ANY, &error);
    ck_assert_msg(v != NULL, "%s in %s", error.text, text);
    return v;
}

/* Code of compiling and rendering; the text or the message in out. */
static enum status_code render(const char *source, const char *context, char *out, size_t out_size)
{
    struct status st = STATUS_INIT;
    struct jinja *t = NULL;
    char *text = NULL;
    size_t bytes = 0;
    json_t *c = json(context);
    enum status_code rc = jinja_compile(&t, source, strlen(source), &st);
    if (rc == ST_OK)
        rc = jinja_render(t, c, &text, &bytes, &st);
    snprintf(out, out_size, "%s", rc == ST_OK ? text : st.message);
    ck_assert(rc != ST_OK || strlen(text) == bytes);
    free(text);
    jinja_free(t);
    json_decref(c);
    return rc;
}

static struct chat *load(const struct temp_dir *d, const char *choice)
{
    struct chat *c = NULL;
    struct status st = STATUS_INIT;
    enum status_code rc = chat_load(&c, d->path, choice, &st);
    ck_assert_msg(rc == ST_OK, "%s", st.message);
    return c;
}

static enum status_code ask(const struct chat *c, const char *messages, const struct chat_prompt *how, char *out,
                            size_t out_size)
{
    struct status st = STATUS_INIT;
    char *text = NULL;
    size_t bytes = 0;
    json_t *m = json(messages);
    struct chat_prompt p = *how;
    p.messages = m;
    enum status_code rc = chat_render(c, &p, &text, &bytes, &st);
    snprintf(out, out_size, "%s", rc == ST_OK ? text : st.message);
    free(text);
    json_decref(m);
    return rc;
}

#define TURNS                                                                                                          \
    "[{\"role\":\"system\",\"content\":\"S\"},{\"role\":\"user\",\"content\":\" U \"},"                                \
    "{\"role\":\"assistant\",\"content\":\"A\"},{\"role\":\"user\",\"content\":\"V\"}]"
#define CONFIG "{\"bos_token\":\"<s>\",\"eos_token\":{\"content\":\"</s>\"},\"pad_token\":null"

/* ---- core ---- */

static const struct {
    const char *name, *text;
} named[] = {
    {"chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n U <|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
               "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"},
    {"llama2", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]"},
    {"llama3",
     "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
     "U<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user"
     "<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"},
    {"mistral", "<s>[INST]  U  [/INST] A</s>[INST] S\n\nV [/INST]"},
};

START_TEST(formats_by_name_write_what_their_makers_describe)
{
    struct temp_dir d = temp_dir_make();
    char out[1024];
    temp_dir_write(&d, "tokenizer_config.json", CONFIG "}", strlen(CONFIG "}"));
    ck_assert_str_eq(chat_names[_i], named[_i].name);
    struct chat *c = load(&d, named[_i].name);
    ck_assert_int_eq(chat_status(c)->code, ST_OK);
    struct chat_prompt begin = {.add_generation_prompt = true};
    ck_assert_int_eq(ask(c, TURNS, &begin, out, sizeof out), ST_OK);
    ck_assert_str_eq(out, named[_i].text);
    chat_free(c);
    temp_dir_remove(&d);
}
END_TEST

START_TEST(the_models_own_template_is_found)
{
    static const char config[] = CONFIG ",\"model_max_length\":1000000000000000019884624838656,\"chat_template\":\"{{ "
                                        "bos_token }}{{ messages[0].content }}{{ eos_token }}"
                                        "{{ tools is none }}{{ pad_token is defined }}\"}";
    static const char list[] = "{\"chat_template\":[{\"name\":\"tool_use\",\"template\":\"T{{ tools|length }}\"},"
                               "{\"name\":\"other\",\"template\":\"{% include %}\"},"
                               "{\"name\":\"default\",\"template\":\"D{{ x }}\"}]}";
    struct temp_dir d = temp_dir_make();
    char out[512];
    json_t *tools = json("[{}, {}]"), *arguments = json("{\"x\": \"y\", \"messages\": 1}");
    struct chat_prompt plain = {0}, with_tools = {.tools = tools}, with_x = {.arguments = arguments};
    temp_dir_write(&d, "tokenizer_config.json", config, strlen(config));
    struct chat *c = load(&d, NULL);
    ck_assert_int_eq(ask(c, TURNS, &plain, out, sizeof out), ST_OK);
    ck_assert_str_eq(out, "<s>S</s>TrueFalse");
    chat_free(c);

    temp_dir_write(&d, "tokenizer_config.json", list, strlen(list));
    c = load(&d, NULL);
    ck_assert_int_eq(ask(c, TURNS, &with_tools, out, sizeof out), ST_OK);
    ck_assert_str_eq(out, "T2");
    ck_assert_int_eq(ask(c, TURNS, &with_x, out, sizeof out), ST_OK);
    ck_assert_str_eq(out, "Dy");
    chat_free(c);

    temp_dir_write(&d, "chat_template.jinja", "file", 4); /* comes first */
    c = load(&d, NULL);
    ck_assert_int_eq(ask(c, TURNS, &plain, out, sizeof out), ST_OK);
    ck_assert_str_eq(out, "file");
    chat_free(c);
    temp_dir_write(&d, "other", "by its path", 11);
    snprintf(out, sizeof out, "%s/other", d.path);
    c = load(&d, out);
    chat_free(c);
    json_decref(tools);
    json_decref(arguments);
    temp_dir_remove(&d);
}
END_TEST

START_TEST(the_last_message_can_be_continued)
{
    struct temp_dir d = temp_dir_make();
    char out[512];
    struct chat *c = load(&d, "chatml");
    struct chat_prompt on = {.continue_final = true}, both = {.continue_final = true, .add_generation_prompt = true};
    static const char turns[] =
        "[{\"role\":\"user\",\"content\":\"Sure\"},{\"role\":\"assistant\",\"content\":\" Sure, \"}]";
    ck_assert_int_eq(ask(c, turns, &on, out, sizeof out), ST_OK);
    ck_assert_str_eq(out, "<|im_start|>user\nSure<|im_end|>\n<|im_start|>assistant\n Sure, ");
    ck_assert_int_eq(ask(c, turns, &both, out, sizeof out), ST_INVALID_ARGUMENT);
    chat_free(c);
    temp_dir_write(&d, "t.jinja", "{% for m in messages %}{{ m.content|trim }}.{% endfor %}", 56);
    snprintf(out, sizeof out, "%s/t.jinja", d.path);
    c = load(&d, out);
    ck_assert_int_eq(ask(c, turns, &on, out, sizeof out), ST_OK);
    ck_assert_str_eq(out, "Sure.Sure,");
    ck_assert_int_eq(ask(c, "[{\"role\":\"user\",\"content\":\" \"}]", &on, out, sizeof out), ST_INVALID_ARGUMENT);
    chat_free(c);
    temp_dir_remove(&d);
}
END_TEST

/* A client writes both texts: whatever repeats in them, the last place is found, and soon. */
START_TEST(the_place_to_continue_is_the_last_one)
{
    struct temp_dir d = temp_dir_make();
    char first[16], last[8], turns[128], whole[64], out[512];
    struct chat_prompt on = {.continue_final = true};
    uint32_t seed = 1;
    temp_dir_write(&d, "t.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}abaab", 55);
    snprintf(out, sizeof out, "%s/t.jinja", d.path);
    struct chat *c = load(&d, out);
    for (int round = 0; round < 500; round++) {
        size_t n_first = (size_t)round % 15, n_last = 1 + (size_t)round % 7, at;
        for (size_t i = 0; i < n_first + n_last; i++) {
            seed = seed * 1664525u + 1013904223u;
            *(i < n_first ? &first[i] : &last[i - n_first]) = seed >> 24 < 160 ? 'a' : 'b';
        }
        first[n_first] = last[n_last] = '\0';
        snprintf(turns, sizeof turns, "[{\"role\":\"u\",\"content\":\"%s\"},{\"role\":\"a\",\"content\":\"%s\"}]",
                 first, last);
        snprintf(whole, sizeof whole, "%s%sabaab", first, last);
        for (at = strlen(whole) - n_last; strncmp(whole + at, last, n_last) != 0; at--)
            continue;
        whole[at + n_last] = '\0';
        ck_assert_int_eq(ask(c, turns, &on, out, sizeof out), ST_OK);
        ck_assert_str_eq(out, whole);
    }
    enum { LONG = 2 << 20 };
    struct status st = STATUS_INIT;
    char *text = NULL, *as = malloc(LONG);
    size_t bytes = 0;
    memset(as, 'a', LONG);
    on.messages = json_pack("[{ss%}, {ss%}]", "content", as, (size_t)LONG, "content", as, (size_t)LONG / 4);
    ck_assert_ptr_nonnull(on.messages);
    ck_assert_int_eq(chat_render(c, &on, &text, &bytes, &st), ST_OK);
    ck_assert_uint_eq(bytes, LONG + LONG / 4 + 1); /* and the first of the template's own */
    json_decref((json_t *)on.messages);
    free(as);
    free(text);
    chat_free(c);
    temp_dir_remove(&d);
}
END_TEST

/* ---- limits ---- */

static const struct {
    const char *source, *says;
    enum status_code code;
} endless[] = {
    {"{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "more than",
     ST_RESOURCE_EXHAUSTED},
    {"{% for a in range(100000) %}{{ 'xxxxxxxxxxxxxxxx' * 1000 }}{% endfor %}", "bytes of text", ST_RESOURCE_EXHAUSTED},
    {"{% set ns = namespace(s='x') %}{% for a in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "MB of memory",
     ST_RESOURCE_EXHAUSTED},
    {"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested deeper", ST_RESOURCE_EXHAUSTED},
    {"{% set ns = namespace(l=[]) %}{% for i in range(1000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
     "nested deeper", ST_RESOURCE_EXHAUSTED},
    {"{% set ns = namespace() %}{% set ns.me = ns %}{{ ns.me.me.me == ns }}{{ ns|tojson }}", "JSON",
     ST_INVALID_ARGUMENT},
    {"{{ range(1000000) }}", "expected at most 100000", ST_RESOURCE_EXHAUSTED},
    {"{{ [0] * 9223372036854775807 }}", "steps", ST_RESOURCE_EXHAUSTED},
    {"{{ 'x' * 9223372036854775807 }}", "memory", ST_RESOURCE_EXHAUSTED},
    {"{{ 'x'|indent(9223372036854775807) }}", "memory", ST_RESOURCE_EXHAUSTED},
    {"{{ [1]|tojson(indent=65) }}", "at most 64", ST_INVALID_ARGUMENT},
    {"{{ 9223372036854775807 + 1 }}", "64 bits", ST_INVALID_ARGUMENT},
    {"{{ 9223372036854775808 }}", "no number", ST_INVALID_ARGUMENT},
    {"{{ (-9223372036854775807 - 1) // -1 }}", "64 bits", ST_INVALID_ARGUMENT},
    {"{{ 2 ** 9223372036854775807 }}", "64 bits", ST_INVALID_ARGUMENT},
    {"{{ 1 ** 9223372036854775807 }}", "steps", ST_RESOURCE_EXHAUSTED},
    {"\n\n{{ x.y.z }}", "line 3: 'y' is undefined", ST_INVALID_ARGUMENT},
    {"{{ raise_exception('line\nbreak') }}", "line\nbreak", ST_INVALID_ARGUMENT},
};

START_TEST(a_template_without_an_end_is_ended)
{
    char out[600];
    ck_assert_int_eq(render(endless[_i].source, "{\"x\":{}}", out, sizeof out), endless[_i].code);
    ck_assert_msg(strstr(out, endless[_i].says) != NULL, "%s", out);
}
END_TEST

START_TEST(deep_nesting_of_the_source_is_refused)
{
    static const char *const parts[][2] = {{"(", ")"}, {"[", "]"}, {"-", ""}, {"not ", ""}, {"1 if ", ""}};
    char out[600];
    char *source = malloc(1 << 20);
    size_t n = (size_t)sprintf(source, "{{ ");
    for (int i = 0; i < 20000; i++)
        n += (size_t)sprintf(source + n, "%s", parts[_i][0]);
    sprintf(source + n, "1 }}");
    enum status_code rc = render(source, "{}", out, sizeof out);
    ck_assert(rc == ST_RESOURCE_EXHAUSTED || rc == ST_INVALID_ARGUMENT);
    free(source);
}
END_TEST

START_TEST(slices_take_any_bounds)
{
    static const char *const big[] = {"", "0", "1", "-1", "3", "9223372036854775807", "(-9223372036854775807 - 1)"};
    char source[200], out[200];
    for (int a = 0; a < 7; a++)
        for (int b = 0; b < 7; b++)
            for (int c = 2; c < 7; c++) {
                snprintf(source, sizeof source, "{{ 'abc'[%s:%s:%s] }}", big[a], big[b], big[c]);
                ck_assert_msg(render(source, "{}", out, sizeof out) == ST_OK, "%s: %s", source, out);
                ck_assert_uint_le(strlen(out), 3);
            }
}
END_TEST

/* ---- faults ---- */

START_TEST(what_only_some_chats_reach_is_refused_to_them_only)
{
    static const char source[] = "{{ messages[0].content }}\n{% if messages|length > 3 %}\n{{ messages|batch(2) }}"
                                 "{% elif messages is escaped %}x{% endif %}";
    struct temp_dir d = temp_dir_make();
    char out[512];
    struct chat_prompt plain = {0};
    temp_dir_write(&d, "chat_template.jinja", source, strlen(source));
    struct chat *c = load(&d, NULL);
    ck_assert_int_eq(chat_status(c)->code, ST_OK);
    ck_assert_str_eq(chat_lacks(c), "line 3: the filter \"batch\" is not supported");
    ck_assert_int_eq(ask(c, TURNS, &plain, out, sizeof out), ST_UNIMPLEMENTED);
    ck_assert_msg(strstr(out, "line 3: the filter \"batch\" is not supported") != NULL, "%s", out);
    ck_assert_int_eq(ask(c, "[{\"role\":\"user\",\"content\":\"U\"}]", &plain, out, sizeof out), ST_UNIMPLEMENTED);
    ck_assert_msg(strstr(out, "line 3: the test \"is escaped\" is not supported") != NULL, "%s", out);
    chat_free(c);
    temp_dir_write(&d, "chat_template.jinja", source, 26);
    c = load(&d, NULL);
    ck_assert_ptr_null(chat_lacks(c));
    chat_free(c);
    temp_dir_remove(&d);
}
END_TEST

START_TEST(what_cannot_be_used_says_why)
{
    struct temp_dir d = temp_dir_make();
    struct status st = STATUS_INIT;
    struct chat *c = NULL;
    char out[512];
    struct chat_prompt plain = {0};
    c = load(&d, NULL); /* nothing in the folder */
    ck_assert_int_eq(chat_status(c)->code, ST_FAILED_PRECONDITION);
    ck_assert_int_eq(ask(c, TURNS, &plain, out, sizeof out), ST_FAILED_PRECONDITION);
    ck_assert_msg(strstr(out, "--chat-template") != NULL, "%s", out);
    chat_free(c);

    temp_dir_write(&d, "chat_template.jinja", "a\n{% include 'x' %}", 19);
    c = load(&d, NULL);
    ck_assert_int_eq(ask(c, TURNS, &plain, out, sizeof out), ST_UNIMPLEMENTED);
    ck_assert_msg(strstr(out, "chat_template.jinja: line 2: {% include %} is not supported") != NULL, "%s", out);
    chat_free(c);
    ck_assert_int_eq(chat_load(&c, d.path, "llama9", &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(chat_load(&c, d.path, "/nowhere/t.jinja", &st), ST_NOT_FOUND);
    snprintf(out, sizeof out, "%s/chat_template.jinja", d.path);
    ck_assert_int_eq(chat_load(&c, d.path, out, &st), ST_UNIMPLEMENTED);
    temp_dir_write(&d, "chat_template.jinja", "\xff", 1);
    ck_assert_int_eq(chat_load(&c, d.path, out, &st), ST_INVALID_ARGUMENT);
    temp_dir_remove(&d);

    d = temp_dir_make();
    c = load(&d, "llama2");
    ck_assert_int_eq(ask(c, "[{\"role\":\"assistant\",\"content\":\"x\"}]", &plain, out, sizeof out),
                     ST_INVALID_ARGUMENT);
    ck_assert_msg(strstr(out, "roles must alternate") != NULL, "%s", out);
    chat_free(c);
    temp_dir_remove(&d);
}
END_TEST

START_TEST(any_allocation_may_fail)
{
    static const char source[] =
        "{% for m in messages %}{{ m.content|upper ~ [1, {'a': 2}] }}{{ m|tojson }}{% endfor %}";
    struct temp_dir d = temp_dir_make();
    json_t *messages = json(TURNS);
    char path[300];
    temp_dir_write(&d, "t.jinja", source, strlen(source));
    temp_dir_write(&d, "tokenizer_config.json", CONFIG "}", strlen(CONFIG "}"));
    snprintf(path, sizeof path, "%s/t.jinja", d.path);
    bool done = false;
    for (long n = 0; !done; n++) {
        struct status st = STATUS_INIT;
        struct chat *c = NULL;
        char *text = NULL;
        size_t bytes = 0;
        struct chat_prompt p = {.messages = messages};
        ck_assert_int_lt(n, 5000);
        fail_at = n;
        enum status_code rc = chat_load(&c, d.path, path, &st);
        if (rc == ST_OK)
            rc = chat_render(c, &p, &text, &bytes, &st);
        done = fail_at >= 0;
        fail_at = -1;
        ck_assert(rc == ST_OK ? text != NULL : st.message[0] && !text);
        ck_assert(!done || rc == ST_OK);
        free(text);
        chat_free(c);
    }
    json_decref(messages);
    temp_dir_remove(&d);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("chat");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_loop_test(core, formats_by_name_write_what_their_makers_describe, 0, 4);
    tcase_add_test(core, the_models_own_template_is_found);
    tcase_add_test(core, the_last_message_can_be_continued);
    tcase_add_test(core, the_place_to_continue_is_the_last_one);
    tcase_add_loop_test(limits, a_template_without_an_end_is_ended, 0, (int)(sizeof endless / sizeof *endless));
    tcase_add_loop_test(limits, deep_nesting_of_the_source_is_refused, 0, 5);
    tcase_add_test(limits, slices_take_any_bounds);
    tcase_add_test(faults, what_only_some_chats_reach_is_refused_to_them_only);
    tcase_add_test(faults, what_cannot_be_used_says_why);
    tcase_add_test(faults, any_allocation_may_fail);
    tcase_set_timeout(limits, 120);
    tcase_set_timeout(faults, 120);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
