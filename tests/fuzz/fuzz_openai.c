/* fuzz_openai.c - any bytes as the body of a request to OpenAI's API.
 *
 * What must hold: an error has a message, and its JSON is JSON; a request can be packed, and is the same when it comes back. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/openai.h"
#include "tests/fuzz/fuzz.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_openai: %s\n", what);
    abort();
}

static void check_request(const Tandem__V1__GenerateRequest *m)
{
    size_t len = protobuf_c_message_get_packed_size(&m->base);
    uint8_t *bytes = malloc(len + 1), *again = malloc(len + 1);
    require(bytes && again && protobuf_c_message_pack(&m->base, bytes) == len, "a request has a size");
    Tandem__V1__GenerateRequest *copy = tandem__v1__generate_request__unpack(NULL, len, bytes);
    require(copy && protobuf_c_message_get_packed_size(&copy->base) == len, "it comes back");
    protobuf_c_message_pack(&copy->base, again);
    require(memcmp(bytes, again, len) == 0, "it comes back as it was");
    tandem__v1__generate_request__free_unpacked(copy, NULL);
    free(bytes);
    free(again);
}

static void check_error(enum openai_kind kind, const struct status *st)
{
    const struct openai_form form = {.kind = kind};
    struct json_text text = {0};
    require(st->message[0], "an error has a message");
    openai_error(&text, openai_http_code(st->code), &form, st);
    json_t *v = json_loadb(text.p, text.n, 0, NULL);
    require(v && json_is_string(json_object_get(json_object_get(v, "error"), "message")), "its JSON is JSON");
    json_decref(v);
    json_text_free(&text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    for (int i = 0; i < 2; i++) {
        enum openai_kind kind = i ? OPENAI_CHAT : OPENAI_COMPLETION;
        Tandem__V1__GenerateRequest *m = NULL;
        struct openai_form form = {0};
        struct status st = STATUS_INIT;
        if (openai_parse(kind, data, size, &form, &m, &st) == ST_OK) {
            require(form.n >= 1 && form.n <= 64 && form.kind == kind, "a form that can be answered");
            check_request(m);
            protobuf_c_message_free_unpacked(&m->base, NULL);
        } else {
            require(!m, "an error and no request");
            check_error(kind, &st);
        }
    }
    return 0;
}

#ifndef TANDEM_LIBFUZZER

static const char *const SEEDS[] = {
    "{\"model\":\"m\",\"prompt\":\"Once upon a time\",\"max_tokens\":16,\"temperature\":0.5,\"top_p\":0.9,\"n\":2}",
    "{\"prompt\":[1,2,3,4294967295],\"echo\":true,\"logprobs\":5,\"stream\":true,\"seed\":-1}",
    "{\"prompt\":[\"one\"],\"stop\":[\"a\",\"\\u00e9\\n\"],\"logit_bias\":{\"5\":-100,\"7\":1.5},\"best_of\":1}",
    "{\"messages\":[{\"role\":\"system\",\"content\":\"x\"},{\"role\":\"user\",\"content\":[{\"type\":\"text\","
    "\"text\":\"a\"},{\"type\":\"text\",\"text\":\"b\"}],\"name\":\"n\"}],\"max_completion_tokens\":3}",
    "{\"messages\":[{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"1\",\"function\":{\"name\":"
    "\"f\","
    "\"arguments\":\"{\\\"x\\\":[1]}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"1\",\"content\":\"4\"}],\"tools\":[{}]"
    "}",
    "{\"messages\":[{\"role\":\"user\",\"content\":\"\\u0000\\ud83d\\ude00\"}],\"logprobs\":true,\"top_logprobs\":20,"
    "\"stream\":true,\"stream_options\":{\"include_usage\":true},\"tool_choice\":\"none\",\"tools\":[1]}",
    "{\"prompt\":\"x\",\"top_k\":-1,\"min_p\":0.1,\"ignore_eos\":true,\"min_tokens\":4,\"stop_token_ids\":[1],"
    "\"allowed_token_ids\":[2,3],\"include_stop_str_in_output\":true,\"skip_special_tokens\":true,\"user\":null}",
    "{\"messages\":[{}],\"chat_template_kwargs\":{\"a\":{\"b\":[1e9,true,null]}},\"continue_final_message\":true,"
    "\"add_generation_prompt\":false,\"response_format\":{\"type\":\"text\"}}",
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
    static const char marks[] = "{}[]\":,0123456789.-+eE \\utfn\n\xc3\xa9\xff";
    const char *a = SEEDS[next(state) % N_SEEDS], *b = SEEDS[next(state) % N_SEEDS];
    size_t na = strlen(a), nb = strlen(b);
    size_t head = next(state) % (na + 1), from = next(state) % nb, n = next(state) % (nb - from + 1);
    size_t tail = head + next(state) % (na - head + 1);
    if (next(state) % 2) /* a change of bytes alone leaves most of them JSON */
        head = tail = na, n = 0;
    int len = snprintf(out, cap, "%.*s%.*s%s", (int)head, a, (int)n, b + from, a + tail);
    for (uint64_t i = next(state) % 4; i > 0 && len > 0; i--)
        out[next(state) % (uint64_t)len] = marks[next(state) % (sizeof marks - 1)];
    return (size_t)len;
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 20000);
    uint64_t state = 1;
    char text[2048];
    for (size_t i = 0; i < N_SEEDS; i++)
        fuzz_one(SEEDS[i], strlen(SEEDS[i]));
    for (long i = 0; i < runs; i++)
        fuzz_one(text, make(&state, text, sizeof text));
    return 0;
}

#endif
