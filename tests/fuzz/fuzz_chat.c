/* fuzz_chat.c - any bytes as a chat template.
 *
 * What must hold: an error has a message and nothing else; a text is UTF-8 where the template is; the same twice. */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/jinja.h"
#include "tests/fuzz/fuzz.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_chat: %s\n", what);
    abort();
}

static const char CONTEXT[] = "{\"messages\":[{\"role\":\"user\",\"content\":\" h\\u00e9 'q' \\\"x\\\" "
                              "\\n\"},{\"role\":\"assistant\",\"content\":"
                              "\"\",\"tool_calls\":[{\"name\":\"f\",\"arguments\":{\"x\":[1,2.5,null,true]}}]}],\"l\":["
                              "3,1,2],\"s\":\"Hello\",\"n\":7,"
                              "\"f\":-2.5,\"d\":{\"a\":1,\"b\":{\"c\":\"d\"}},\"t\":true,\"none\":null,\"e\":\"\"}";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    json_t *context = json_loads(CONTEXT, 0, NULL);
    struct status st = STATUS_INIT;
    struct jinja *t = NULL;
    char *text[2] = {NULL, NULL};
    size_t bytes[2] = {0, 0};
    enum status_code rc = jinja_compile(&t, (const char *)data, size, &st);
    require(rc == ST_OK ? t != NULL : st.message[0] && !t, "an error has a message and no template");
    for (int i = 0; rc == ST_OK && i < 2; i++) {
        enum status_code one = jinja_render(t, context, &text[i], &bytes[i], &st);
        require(one == ST_OK ? text[i] && !text[i][bytes[i]] : st.message[0] && !text[i],
                "an error has a message and no text");
        require(one != ST_INTERNAL, "nothing breaks inside");
    }
    if (text[0] && !memmem(data, size, "strftime_now", 12)) {
        require(text[1] && bytes[0] == bytes[1] && memcmp(text[0], text[1], bytes[0]) == 0, "the same text again");
        json_t *utf8 = json_stringn(text[0], bytes[0]);
        require(utf8 != NULL, "the text is UTF-8");
        json_decref(utf8);
    }
    free(text[0]);
    free(text[1]);
    jinja_free(t);
    json_decref(context);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

static const char *const SEEDS[] = {
    "{% for m in messages if m.role != 'x' %}{{- m['role'] ~ ': ' + m.content|trim -}}{% else %}none{% endfor %}",
    "{% set ns = namespace(a=0, b=[]) %}{% for i in l %}{% set ns.a = ns.a + i %}{% continue %}{% endfor %}{{ ns.a }}",
    "{% if s is defined and s is string and not (e or none) %}{{ s[1:3] }}{{ s[::-1] }}{% elif n > 3 %}x{% endif %}",
    "{% macro m(a, b='B') %}{{ a }}{{ b|upper }}{% endmacro %}{{ m(1) }}{{ m(b=2, a=d.b.c) }}",
    "{{ d|tojson(indent=2) }}{{ messages|tojson }}{{ d.items()|list }}{{ l|sort|join(',') }}{{ d|dictsort }}",
    "{{ s.split('l') }}{{ s.replace('l', 'L', 1) }}{{ s.strip('Ho') }}{{ ' a b '.split() }}{{ 'x\\ny'.splitlines() }}",
    "{{ n // 2 }}{{ n % 3 }}{{ -n ** 2 }}{{ f * 1.5 }}{{ 1e20 }}{{ n / 3 }}{{ f|round(1) }}{{ '12'|int }}",
    "{%- set x -%} a {%- endset -%}{# c #}{% raw %}{{ }}{% endraw %}{% filter upper %}{{ x }}{% endfilter %}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list }}{{ l|select('odd')|first }}",
    "{% with a = 1, b = l %}{{ a }}{% for x, y in d.items() %}{{ loop.index }}{{ loop.cycle('a', 'b') }}{% endfor %}{% "
    "endwith %}",
    "{{ range(5)|reverse|list }}{{ 'a' in s }}{{ 3 not in l }}{{ 1 < n <= 7 }}{{ x is undefined }}{{ x|default('d') }}",
    "{% generation %}{{ '%s' if t else [1, (2, 3), {'k': none}] }}{% endgeneration %}{{ raise_exception('no') }}",
};
#define N_SEEDS (sizeof SEEDS / sizeof *SEEDS)

static uint64_t next(uint64_t *state)
{
    *state += 0x9e3779b97f4a7c15u; /* splitmix64 */
    uint64_t z = *state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* A piece of one seed in place of a piece of another, and a few bytes changed. */
static size_t make(uint64_t *state, char *out, size_t cap)
{
    static const char marks[] = "{}%#-+~|.,:()[]'\"\\ \n=<>*/0a_\xc3\xa9";
    const char *a = SEEDS[next(state) % N_SEEDS], *b = SEEDS[next(state) % N_SEEDS];
    size_t na = strlen(a), nb = strlen(b);
    size_t head = next(state) % (na + 1), from = next(state) % nb, n = next(state) % (nb - from + 1);
    size_t tail = head + next(state) % (na - head + 1);
    int len = snprintf(out, cap, "%.*s%.*s%s", (int)head, a, (int)n, b + from, a + tail);
    for (uint64_t i = next(state) % 4; i > 0 && len > 0; i--)
        out[next(state) % (uint64_t)len] = marks[next(state) % (sizeof marks - 1)];
    return (size_t)len;
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 20000);
    uint64_t state = 1;
    char text[1024];
    for (size_t i = 0; i < N_SEEDS; i++)
        fuzz_one(SEEDS[i], strlen(SEEDS[i]));
    for (long i = 0; i < runs; i++)
        fuzz_one(text, make(&state, text, sizeof text));
    return 0;
}

#endif
