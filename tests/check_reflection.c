/* check_reflection.c - proto/rpc_reflection.c over a real socket, on the files in data/reflection: what is asked is answered
 * from the right file, with its imports. tests/e2e/test_security.py does the same with protobuf's own pool of descriptors. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "grpc/reflection/v1/reflection.pb-c.h"
#include "proto/rpc.h"

typedef Grpc__Reflection__V1__ServerReflectionRequest Request;
typedef Grpc__Reflection__V1__ServerReflectionResponse Response;

#define ASKS(name)    GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##name
#define ANSWERS(name) GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_##name
#define PATIENCE_MS   20000

extern const uint8_t test_descriptors[];
extern const size_t test_descriptors_len;

#define OK(expr)                                                                                                       \
    do {                                                                                                               \
        struct status st_ = STATUS_INIT;                                                                               \
        struct status *st = &st_;                                                                                      \
        enum status_code rc_ = (expr);                                                                                 \
        ck_assert_msg(rc_ == ST_OK, "%s: %s %s", #expr, status_name(rc_), st_.message);                                \
    } while (0)

/* ---- allocations that fail: the linker sends those of our own code here ---- */

static long fail_at = -1; /* allocations until the one that fails; below 0: none */

static bool fails(void)
{
    return fail_at >= 0 && fail_at-- == 0;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t each);
void *__real_realloc(void *p, size_t n);
char *__real_strdup(const char *s);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t each);
void *__wrap_realloc(void *p, size_t n);
char *__wrap_strdup(const char *s);

void *__wrap_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t each)
{
    return fails() ? NULL : __real_calloc(n, each);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails() ? NULL : __real_realloc(p, n);
}

char *__wrap_strdup(const char *s)
{
    return fails() ? NULL : __real_strdup(s);
}

/* ---- a server and a question ---- */

static struct rpc_reflection *reflection;
static struct rpc_method methods[RPC_REFLECTION_METHODS];
static struct rpc_server *server;
static struct rpc_channel *channel;
static struct rpc_stream *stream;

static void start(const char *path)
{
    static const char *const listen = "127.0.0.1:0";
    char address[64];
    OK(rpc_reflection_create(&reflection, test_descriptors, test_descriptors_len, st));
    rpc_reflection_methods(reflection, methods);
    struct rpc_server_config cfg = {
        .methods = methods, .n_methods = RPC_REFLECTION_METHODS, .listen = &listen, .n_listen = 1};
    OK(rpc_server_start(&server, &cfg, st));
    snprintf(address, sizeof address, "127.0.0.1:%u", rpc_server_port(server, 0));
    OK(rpc_channel_create(&channel, address, st));
    OK(rpc_stream_open(&stream, channel, path, 0, st));
}

static void stop(void)
{
    const void *msg;
    size_t len;
    OK(rpc_stream_half_close(stream, PATIENCE_MS, st));
    OK(rpc_stream_recv(stream, &msg, &len, PATIENCE_MS, NULL, st));
    ck_assert_ptr_null(msg); /* the stream ends as it should */
    rpc_stream_close(stream);
    rpc_channel_destroy(channel);
    rpc_server_destroy(server);
    rpc_reflection_destroy(reflection);
}

static Response *ask(const Request *r)
{
    const void *msg;
    size_t len;
    OK(rpc_stream_send(stream, &r->base, PATIENCE_MS, st));
    OK(rpc_stream_recv(stream, &msg, &len, PATIENCE_MS, NULL, st));
    ck_assert_ptr_nonnull(msg);
    Response *a = (Response *)rpc_unpack(&grpc__reflection__v1__server_reflection_response__descriptor, msg, len);
    ck_assert_ptr_nonnull(a);
    ck_assert_int_eq(a->original_request->message_request_case, r->message_request_case);
    ck_assert_str_eq(a->valid_host, r->host);
    return a;
}

static Request question(unsigned what, const char *text)
{
    Request r = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    r.host = (char *)"a.host";
    r.message_request_case = what;
    r.list_services = (char *)text; /* all strings of the oneof lie in the same place */
    return r;
}

/* Is the n-th file of the answer this one? Its name is the first field. */
static bool file_is(const Response *a, size_t i, const char *name)
{
    size_t n = strlen(name);
    const ProtobufCBinaryData *b = &a->file_descriptor_response->file_descriptor_proto[i];
    return b->len > n + 2 && b->data[0] == 0x0A && b->data[1] == n && memcmp(b->data + 2, name, n) == 0;
}

/* Asks, expects the file and so many more that it imports; file NULL: nothing is found. */
static void expect(const Request *r, const char *file, size_t imports)
{
    Response *a = ask(r);
    if (!file) {
        ck_assert_int_eq(a->message_response_case, ANSWERS(ERROR_RESPONSE));
        ck_assert_int_eq(a->error_response->error_code, ST_NOT_FOUND);
    } else {
        ck_assert_int_eq(a->message_response_case, ANSWERS(FILE_DESCRIPTOR_RESPONSE));
        ck_assert_uint_eq(a->file_descriptor_response->n_file_descriptor_proto, imports + 1);
        ck_assert(file_is(a, 0, file));
        if (imports)
            ck_assert(file_is(a, 1, "base.proto"));
    }
    protobuf_c_message_free_unpacked(&a->base, NULL);
}

static void expect_text(unsigned what, const char *text, const char *file, size_t imports)
{
    Request r = question(what, text);
    expect(&r, file, imports);
}

START_TEST(all_services_are_listed)
{
    static const char *const paths[] = {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"};
    start(paths[_i]);
    Request r = question(ASKS(LIST_SERVICES), "");
    Response *a = ask(&r);
    ck_assert_int_eq(a->message_response_case, ANSWERS(LIST_SERVICES_RESPONSE));
    ck_assert_uint_eq(a->list_services_response->n_service, 2);
    ck_assert_str_eq(a->list_services_response->service[0]->name, "AloneService");
    ck_assert_str_eq(a->list_services_response->service[1]->name, "zoo.Keeper");
    protobuf_c_message_free_unpacked(&a->base, NULL);
    stop();
}
END_TEST

START_TEST(every_name_leads_to_its_file)
{
    static const char *const base[] = {"zoo.base.Animal",
                                       "zoo.base.Animal.name",
                                       "zoo.base.Animal.food",
                                       "zoo.base.Animal.Prey",
                                       "zoo.base.Animal.plant",
                                       "zoo.base.Animal.Prey.count",
                                       "zoo.base.Colour",
                                       "zoo.base.RED",
                                       "zoo.base.Animal.Prey.Size",
                                       "zoo.base.Animal.Prey.LARGE",
                                       "zoo.base.Animal.Prey.Deeper.size"};
    static const char *const top[] = {"zoo.Cage", "zoo.legs", "zoo.Cage.home", "zoo.Keeper", "zoo.Keeper.Feed"};
    static const char *const none[] = {"",           "zoo",         "zoo.base",   "RED", "zoo.base.Colour.RED",
                                       "zoo.keeper", "zoo.Keeper.", ".zoo.Keeper"};
    start("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo");
    for (size_t i = 0; i < sizeof base / sizeof *base; i++)
        expect_text(ASKS(FILE_CONTAINING_SYMBOL), base[i], "base.proto", 0);
    for (size_t i = 0; i < sizeof top / sizeof *top; i++)
        expect_text(ASKS(FILE_CONTAINING_SYMBOL), top[i], "top.proto", 1);
    expect_text(ASKS(FILE_CONTAINING_SYMBOL), "Alone", "alone.proto", 0);
    expect_text(ASKS(FILE_CONTAINING_SYMBOL), "AloneService.Sit", "alone.proto", 0);
    for (size_t i = 0; i < sizeof none / sizeof *none; i++)
        expect_text(ASKS(FILE_CONTAINING_SYMBOL), none[i], NULL, 0);
    expect_text(ASKS(FILE_BY_FILENAME), "top.proto", "top.proto", 1);
    expect_text(ASKS(FILE_BY_FILENAME), "base.proto", "base.proto", 0);
    expect_text(ASKS(FILE_BY_FILENAME), "Base.proto", NULL, 0);
    stop();
}
END_TEST

START_TEST(extensions_are_found_by_number)
{
    static const struct {
        const char *type;
        int32_t number;
        const char *file;
    } cases[] = {{"zoo.base.Animal", 150, "top.proto"},
                 {"zoo.base.Animal", 101, "top.proto"},
                 {"zoo.base.Animal", 120, "top.proto"},
                 {"zoo.base.Animal", 102, NULL},
                 {"zoo.base.Animal", -1, NULL},
                 {"zoo.Cage", 150, NULL},
                 {"no.Such", 1, NULL},
                 {"", 0, NULL}};
    start("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Grpc__Reflection__V1__ExtensionRequest e = GRPC__REFLECTION__V1__EXTENSION_REQUEST__INIT;
        e.containing_type = (char *)cases[i].type;
        e.extension_number = cases[i].number;
        Request r = question(ASKS(FILE_CONTAINING_EXTENSION), "");
        r.file_containing_extension = &e;
        expect(&r, cases[i].file, cases[i].file ? 1 : 0);
    }
    Request r = question(ASKS(ALL_EXTENSION_NUMBERS_OF_TYPE), "zoo.base.Animal");
    Response *a = ask(&r);
    ck_assert_int_eq(a->message_response_case, ANSWERS(ALL_EXTENSION_NUMBERS_RESPONSE));
    ck_assert_str_eq(a->all_extension_numbers_response->base_type_name, "zoo.base.Animal");
    ck_assert_uint_eq(a->all_extension_numbers_response->n_extension_number, 3);
    static const int32_t numbers[] = {101, 120, 150};
    ck_assert_mem_eq(a->all_extension_numbers_response->extension_number, numbers, sizeof numbers);
    protobuf_c_message_free_unpacked(&a->base, NULL);
    r = question(ASKS(ALL_EXTENSION_NUMBERS_OF_TYPE), "Alone"); /* may be extended and is not */
    a = ask(&r);
    ck_assert_int_eq(a->message_response_case, ANSWERS(ALL_EXTENSION_NUMBERS_RESPONSE));
    ck_assert_uint_eq(a->all_extension_numbers_response->n_extension_number, 0);
    protobuf_c_message_free_unpacked(&a->base, NULL);
    expect_text(ASKS(ALL_EXTENSION_NUMBERS_OF_TYPE), "zoo.Keeper", NULL, 0); /* no message */
    stop();
}
END_TEST

START_TEST(unknown_question_and_bad_bytes)
{
    start("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo");
    Request r = question(GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST__NOT_SET, NULL);
    Response *a = ask(&r);
    ck_assert_int_eq(a->message_response_case, ANSWERS(ERROR_RESPONSE));
    ck_assert_int_eq(a->error_response->error_code, ST_INVALID_ARGUMENT);
    protobuf_c_message_free_unpacked(&a->base, NULL);
    expect_text(ASKS(FILE_BY_FILENAME), "base.proto", "base.proto", 0); /* the stream goes on */
    Grpc__Reflection__V1__ExtensionRequest other = GRPC__REFLECTION__V1__EXTENSION_REQUEST__INIT;
    other.extension_number = 5; /* field 2 as a number: nothing of a request; skipped */
    other.containing_type = (char *)"x";
    OK(rpc_stream_send(stream, &other.base, PATIENCE_MS, st));
    struct status got = STATUS_INIT;
    const void *msg;
    size_t len;
    OK(rpc_stream_recv(stream, &msg, &len, PATIENCE_MS, NULL, st));
    Grpc__Reflection__V1__ErrorResponse wrong = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    wrong.error_code = 5; /* field 1 as a number, where host is a string */
    OK(rpc_stream_send(stream, &wrong.base, PATIENCE_MS, st));
    ck_assert_int_eq(rpc_stream_recv(stream, &msg, &len, PATIENCE_MS, NULL, &got), ST_INVALID_ARGUMENT);
    rpc_stream_close(stream);
    rpc_channel_destroy(channel);
    rpc_server_destroy(server);
    rpc_reflection_destroy(reflection);
}
END_TEST

START_TEST(damaged_sets_are_refused_or_indexed_but_never_overrun)
{
    struct status got = STATUS_INIT;
    uint32_t seed = 1;
    unsigned refused = 0;
    for (size_t n = 0; n < test_descriptors_len; n++) {
        uint8_t *cut = malloc(n + 1); /* of that size, so that a sanitizer sees a read behind it */
        memcpy(cut, test_descriptors, n);
        struct rpc_reflection *r = NULL;
        if (rpc_reflection_create(&r, cut, n, &got) != ST_OK) {
            refused++;
            ck_assert_int_eq(got.code, ST_INVALID_ARGUMENT);
        }
        rpc_reflection_destroy(r);
        free(cut);
    }
    ck_assert_uint_ge(refused, test_descriptors_len - 3); /* all but whole numbers of files */
    for (int i = 0; i < 20000; i++) {
        uint8_t *bytes = malloc(test_descriptors_len);
        memcpy(bytes, test_descriptors, test_descriptors_len);
        for (int k = 0; k < 3; k++) {
            seed = seed * 1664525 + 1013904223;
            bytes[(seed >> 8) % test_descriptors_len] = (uint8_t)(seed >> 24);
        }
        struct rpc_reflection *r = NULL;
        if (rpc_reflection_create(&r, bytes, test_descriptors_len, NULL) == ST_OK)
            rpc_reflection_destroy(r);
        free(bytes);
    }
}
END_TEST

START_TEST(every_allocation_may_fail)
{
    long n = 0;
    for (bool done = false; !done; n++) {
        struct rpc_reflection *r = NULL;
        struct status got = STATUS_INIT;
        fail_at = n;
        enum status_code rc = rpc_reflection_create(&r, test_descriptors, test_descriptors_len, &got);
        done = fail_at >= 0; /* it was not reached */
        fail_at = -1;
        ck_assert_int_eq(rc, done ? ST_OK : ST_RESOURCE_EXHAUSTED);
        rpc_reflection_destroy(r);
    }
    ck_assert_int_gt(n, 30);
}
END_TEST

static TCase *add_case(Suite *s, const char *name)
{
    TCase *c = tcase_create(name);
    tcase_set_timeout(c, 120);
    suite_add_tcase(s, c);
    return c;
}

int main(void)
{
    Suite *s = suite_create("reflection");
    TCase *core = add_case(s, "core");
    tcase_add_loop_test(core, all_services_are_listed, 0, 2);
    tcase_add_test(core, every_name_leads_to_its_file);
    tcase_add_test(core, extensions_are_found_by_number);
    TCase *faults = add_case(s, "faults");
    tcase_add_test(faults, unknown_question_and_bad_bytes);
    tcase_add_test(faults, damaged_sets_are_refused_or_indexed_but_never_overrun);
    tcase_add_test(faults, every_allocation_may_fail);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
