/* rpc_reflection.c - grpc.reflection.v1 and v1alpha: what a server serves, told to generic clients.
 *
 * The two differ in the package's name only, so that one handler answers both. Requests are answered as they come; what
 * cannot be found is an error_response in the stream, which goes on.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "grpc/reflection/v1/reflection.pb-c.h"
#include "proto/rpc_reflection.h"

typedef Grpc__Reflection__V1__ServerReflectionRequest Request;
typedef Grpc__Reflection__V1__ServerReflectionResponse Response;

#define ASKS(name)    GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##name
#define ANSWERS(name) GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_##name

struct rpc_reflection {
    struct refl_index *index;
    /* All services, made once: pointers of a ListServiceResponse. */
    size_t n_services;
    Grpc__Reflection__V1__ServiceResponse *services, **list;
};

/* An answer under construction: what its pointers lead to. */
struct answer {
    Response response;
    Grpc__Reflection__V1__FileDescriptorResponse files;
    ProtobufCBinaryData bytes[REFL_MAX_FILES];
    Grpc__Reflection__V1__ExtensionNumberResponse numbers;
    Grpc__Reflection__V1__ListServiceResponse services;
    Grpc__Reflection__V1__ErrorResponse error;
    char text[256];
};

static void answer_error(struct answer *a, enum status_code code, const char *what, const char *name)
{
    snprintf(a->text, sizeof a->text, "%s%.160s%s: not known here", what, name, *name ? "" : "(empty)");
    a->error = (Grpc__Reflection__V1__ErrorResponse)GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    a->error.error_code = (int32_t)code;
    a->error.error_message = a->text;
    a->response.message_response_case = ANSWERS(ERROR_RESPONSE);
    a->response.error_response = &a->error;
}

/* The file first, then what it imports. */
static void answer_file(struct answer *a, const struct refl_index *x, const struct refl_file *file)
{
    size_t n = 0;
    a->bytes[n++] = (ProtobufCBinaryData){(size_t)(file->bytes.end - file->bytes.p), (uint8_t *)file->bytes.p};
    for (size_t i = 0; i < x->n_files; i++) {
        const struct refl_bytes *b = &x->files[i].bytes;
        if (&x->files[i] != file && file->with_imports >> i & 1)
            a->bytes[n++] = (ProtobufCBinaryData){(size_t)(b->end - b->p), (uint8_t *)b->p};
    }
    a->files = (Grpc__Reflection__V1__FileDescriptorResponse)GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    a->files.n_file_descriptor_proto = n;
    a->files.file_descriptor_proto = a->bytes;
    a->response.message_response_case = ANSWERS(FILE_DESCRIPTOR_RESPONSE);
    a->response.file_descriptor_response = &a->files;
}

static void answer_symbol(struct answer *a, const struct refl_index *x, const char *name)
{
    const struct refl_symbol *s = refl_symbol_named(x, name);
    if (s)
        answer_file(a, x, &x->files[s->file]);
    else
        answer_error(a, ST_NOT_FOUND, "file_containing_symbol: ", name);
}

static void answer_extension(struct answer *a, const struct refl_index *x,
                             const Grpc__Reflection__V1__ExtensionRequest *r)
{
    const struct refl_extension *e = refl_extension_of(x, r->containing_type, r->extension_number);
    char what[64];
    snprintf(what, sizeof what, "file_containing_extension: number %d of ", r->extension_number);
    if (e)
        answer_file(a, x, &x->files[e->file]);
    else
        answer_error(a, ST_NOT_FOUND, what, r->containing_type);
}

/* A type without extensions gets an empty list. The caller frees numbers.extension_number. */
static void answer_numbers(struct answer *a, const struct refl_index *x, const char *type)
{
    size_t n;
    const struct refl_extension *first = refl_extensions_of(x, type, &n);
    const struct refl_symbol *s = refl_symbol_named(x, type);
    int32_t *numbers = n ? malloc(n * sizeof *numbers) : NULL;
    if (n && !numbers) {
        answer_error(a, ST_RESOURCE_EXHAUSTED, "all_extension_numbers_of_type: out of memory: ", type);
        return;
    }
    if (!n && !(s && s->is_message)) {
        answer_error(a, ST_NOT_FOUND, "all_extension_numbers_of_type: ", type);
        return;
    }
    for (size_t i = 0; i < n; i++)
        numbers[i] = first[i].number;
    a->numbers.base_type_name = (char *)type;
    a->numbers.n_extension_number = n;
    a->numbers.extension_number = numbers;
    a->response.message_response_case = ANSWERS(ALL_EXTENSION_NUMBERS_RESPONSE);
    a->response.all_extension_numbers_response = &a->numbers;
}

static void answer(struct answer *a, const struct rpc_reflection *r, Request *request)
{
    a->response = (Response)GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    a->response.valid_host = request->host;
    a->response.original_request = request;
    a->numbers = (Grpc__Reflection__V1__ExtensionNumberResponse)GRPC__REFLECTION__V1__EXTENSION_NUMBER_RESPONSE__INIT;
    switch (request->message_request_case) {
    case ASKS(FILE_BY_FILENAME): {
        const struct refl_file *file = refl_file_named(r->index, request->file_by_filename);
        if (file)
            answer_file(a, r->index, file);
        else
            answer_error(a, ST_NOT_FOUND, "file_by_filename: ", request->file_by_filename);
        break;
    }
    case ASKS(FILE_CONTAINING_SYMBOL):
        answer_symbol(a, r->index, request->file_containing_symbol);
        break;
    case ASKS(FILE_CONTAINING_EXTENSION):
        answer_extension(a, r->index, request->file_containing_extension);
        break;
    case ASKS(ALL_EXTENSION_NUMBERS_OF_TYPE):
        answer_numbers(a, r->index, request->all_extension_numbers_of_type);
        break;
    case ASKS(LIST_SERVICES):
        a->services = (Grpc__Reflection__V1__ListServiceResponse)GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
        a->services.n_service = r->n_services;
        a->services.service = r->list;
        a->response.message_response_case = ANSWERS(LIST_SERVICES_RESPONSE);
        a->response.list_services_response = &a->services;
        break;
    default:
        answer_error(a, ST_INVALID_ARGUMENT, "message_request: ", "this kind of question");
    }
}

/* ---- the calls ---- */

static void on_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    (void)call, (void)msg, (void)len, (void)ctx; /* all that is asked comes in messages */
}

static void on_message(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct status st = STATUS_INIT;
    struct answer a;
    Request *request = (Request *)rpc_unpack(&grpc__reflection__v1__server_reflection_request__descriptor, msg, len);
    if (!request) {
        status_set(&st, ST_INVALID_ARGUMENT, "the request is not a valid ServerReflectionRequest");
        rpc_call_finish(call, &st, 0);
        return;
    }
    answer(&a, ctx, request);
    if (rpc_call_send(call, &a.response.base, &st) == ST_RESOURCE_EXHAUSTED)
        rpc_call_finish(call, &st, 0); /* asks and does not read */
    free(a.numbers.extension_number);
    protobuf_c_message_free_unpacked(&request->base, NULL);
}

static void on_half_close(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    rpc_call_finish(call, NULL, 0);
}

enum status_code rpc_reflection_create(struct rpc_reflection **out, const void *set, size_t len, struct status *st)
{
    struct rpc_reflection *r = calloc(1, sizeof *r);
    if (!r)
        return status_nomem(st, "reflection", sizeof *r);
    enum status_code rc = refl_index_create(&r->index, set, len, st);
    if (rc != ST_OK)
        goto fail;
    size_t n = r->index->n_symbols;
    r->services = calloc(n + 1, sizeof *r->services);
    r->list = calloc(n + 1, sizeof(void *));
    if (!r->services || !r->list) {
        rc = status_nomem(st, "reflection", n * sizeof *r->services);
        goto fail;
    }
    for (size_t i = 0; i < n; i++) {
        const struct refl_symbol *s = &r->index->symbols[i];
        if (!s->is_service)
            continue;
        Grpc__Reflection__V1__ServiceResponse *one = &r->services[r->n_services];
        *one = (Grpc__Reflection__V1__ServiceResponse)GRPC__REFLECTION__V1__SERVICE_RESPONSE__INIT;
        one->name = s->name;
        r->list[r->n_services++] = one;
    }
    *out = r;
    return ST_OK;
fail:
    rpc_reflection_destroy(r);
    return rc;
}

void rpc_reflection_destroy(struct rpc_reflection *r)
{
    if (!r)
        return;
    refl_index_destroy(r->index);
    free(r->services);
    free(r->list);
    free(r);
}

void rpc_reflection_methods(struct rpc_reflection *r, struct rpc_method *methods)
{
    methods[0] = (struct rpc_method){.path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                     .kind = RPC_BIDI,
                                     .on_open = on_open,
                                     .on_message = on_message,
                                     .on_half_close = on_half_close,
                                     .ctx = r};
    methods[1] = methods[0];
    methods[1].path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
}
