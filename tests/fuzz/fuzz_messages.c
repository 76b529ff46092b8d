/* fuzz_messages.c - arbitrary bytes as each message type that crosses a process boundary.
 *
 * What must hold: no read outside of the input (the address sanitizer looks); what rpc_unpack accepts can be packed, the
 * result is accepted again and packs to the same bytes; a valid message is accepted.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "grpc/health/v1/health.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"
#include "proto/rpc.h"
#include "tandem/v1/control.pb-c.h"
#include "tandem/v1/inference.pb-c.h"
#include "tandem/v1/worker_control.pb-c.h"
#include "tests/fuzz/fuzz.h"

/* All others are parts of these. */
static const ProtobufCMessageDescriptor *const types[] = {
    &tandem__v1__generate_request__descriptor,
    &tandem__v1__attach_request__descriptor,
    &tandem__v1__generate_response__descriptor,
    &tandem__v1__get_server_info_request__descriptor,
    &tandem__v1__server_info__descriptor,
    &tandem__v1__get_model_info_request__descriptor,
    &tandem__v1__model_info__descriptor,
    &tandem__v1__get_load_request__descriptor,
    &tandem__v1__load__descriptor,
    &tandem__v1__abort_request__descriptor,
    &tandem__v1__abort_response__descriptor,
    &tandem__v1__drain_request__descriptor,
    &tandem__v1__drain_response__descriptor,
    &tandem__v1__rank_message__descriptor,
    &tandem__v1__coordinator_message__descriptor,
    &grpc__health__v1__health_check_request__descriptor,
    &grpc__health__v1__health_check_response__descriptor,
    &grpc__health__v1__health_list_request__descriptor,
    &grpc__health__v1__health_list_response__descriptor,
    &grpc__reflection__v1__server_reflection_request__descriptor,
    &grpc__reflection__v1__server_reflection_response__descriptor,
};
#define N_TYPES (sizeof types / sizeof *types)

static void require(int holds, const char *what, const ProtobufCMessageDescriptor *d)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_messages: %s: %s\n", d->name, what);
    abort();
}

static uint8_t *pack(const ProtobufCMessage *m, size_t *n)
{
    *n = protobuf_c_message_get_packed_size(m);
    uint8_t *bytes = malloc(*n + 1);
    if (!bytes)
        abort();
    require(protobuf_c_message_pack(m, bytes) == *n, "packs to the size that was told", m->descriptor);
    return bytes;
}

static int try_one(const ProtobufCMessageDescriptor *d, const uint8_t *data, size_t size)
{
    ProtobufCMessage *m = rpc_unpack(d, data, size);
    if (!m)
        return 0;
    size_t n, n2;
    uint8_t *bytes = pack(m, &n);
    protobuf_c_message_free_unpacked(m, NULL);
    m = rpc_unpack(d, bytes, n);
    require(m != NULL, "what was packed is accepted", d);
    uint8_t *again = pack(m, &n2);
    protobuf_c_message_free_unpacked(m, NULL);
    require(n == n2 && memcmp(bytes, again, n) == 0, "packs to the same bytes again", d);
    free(bytes);
    free(again);
    return 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    for (size_t i = 0; i < N_TYPES && size <= 1 << 16; i++)
        try_one(types[i], data, size);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

#define MAX_BYTES 4096

struct bytes {
    uint8_t p[MAX_BYTES];
    size_t n;
};

static uint64_t random_state = 1;

static uint32_t draw(uint32_t below)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % below);
}

static void put(struct bytes *b, uint8_t byte)
{
    if (b->n < MAX_BYTES)
        b->p[b->n++] = byte;
}

static void put_varint(struct bytes *b, uint64_t v)
{
    for (; v > 0x7F; v >>= 7)
        put(b, (uint8_t)(v | 0x80));
    put(b, (uint8_t)v);
}

static uint64_t any_number(void)
{
    uint64_t v = (uint64_t)draw(1u << 31) << 33 ^ draw(1u << 31);
    return v >> draw(64);
}

static void put_fixed(struct bytes *b, unsigned n)
{
    while (n-- > 0)
        put(b, (uint8_t)draw(256));
}

static void generate(const ProtobufCMessageDescriptor *d, struct bytes *b, int depth);

static void generate_value(const ProtobufCFieldDescriptor *f, struct bytes *b, int depth)
{
    struct bytes *inner = calloc(1, sizeof *inner);
    if (!inner)
        abort();
    switch (f->type) {
    case PROTOBUF_C_TYPE_MESSAGE:
        generate(f->descriptor, inner, depth + 1);
        break;
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
        for (uint32_t n = draw(20); n > 0; n--)
            put(inner, (uint8_t)('a' + draw(26)));
        break;
    default: /* packed numbers */
        for (uint32_t n = draw(10); n > 0; n--)
            put_varint(inner, any_number());
    }
    put_varint(b, (uint64_t)f->id << 3 | 2);
    put_varint(b, inner->n);
    for (size_t i = 0; i < inner->n; i++)
        put(b, inner->p[i]);
    free(inner);
}

static void generate_field(const ProtobufCFieldDescriptor *f, struct bytes *b, int depth)
{
    switch (f->type) {
    case PROTOBUF_C_TYPE_FLOAT:
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_SFIXED32:
        put_varint(b, (uint64_t)f->id << 3 | 5);
        put_fixed(b, 4);
        return;
    case PROTOBUF_C_TYPE_DOUBLE:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_SFIXED64:
        put_varint(b, (uint64_t)f->id << 3 | 1);
        put_fixed(b, 8);
        return;
    case PROTOBUF_C_TYPE_MESSAGE:
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
        generate_value(f, b, depth);
        return;
    default:
        if (f->label == PROTOBUF_C_LABEL_REPEATED && draw(4)) {
            generate_value(f, b, depth);
        } else {
            put_varint(b, (uint64_t)f->id << 3);
            put_varint(b, any_number());
        }
    }
}

/* A valid message, as long as it stays within MAX_BYTES. */
static void generate(const ProtobufCMessageDescriptor *d, struct bytes *b, int depth)
{
    for (unsigned i = 0; i < d->n_fields; i++) {
        uint32_t times = d->fields[i].label == PROTOBUF_C_LABEL_REPEATED ? draw(3) : draw(4) > 0;
        for (; times > 0 && depth < 6; times--)
            generate_field(&d->fields[i], b, depth);
    }
    if (draw(8) == 0) { /* of a later version */
        put_varint(b, (100 + draw(100)) << 3);
        put_varint(b, any_number());
    }
}

/* One small damage of the usual kinds. */
static void damage(struct bytes *b)
{
    size_t at = b->n ? draw((uint32_t)b->n) : 0;
    size_t len = b->n ? draw((uint32_t)(b->n - at)) % 16 : 0;
    switch (draw(6)) {
    case 0:
        b->p[at] ^= (uint8_t)(1u << draw(8));
        break;
    case 1:
        b->p[at] = (uint8_t)draw(256);
        break;
    case 2: /* cut the end off */
        b->n = at;
        break;
    case 3: /* take a piece out */
        memmove(b->p + at, b->p + at + len, b->n - at - len);
        b->n -= len;
        break;
    case 4: /* a piece twice */
        if (b->n + len <= MAX_BYTES) {
            memmove(b->p + at + len, b->p + at, b->n - at);
            b->n += len;
        }
        break;
    default: /* a length or number of many bytes */
        for (size_t i = 0; i < len && at + i < b->n; i++)
            b->p[at + i] |= 0x80;
    }
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 500000);
    long accepted = 0;
    struct bytes *b = calloc(1, sizeof *b);
    if (!b)
        return EXIT_FAILURE;
    for (long i = 0; i < runs; i++) {
        const ProtobufCMessageDescriptor *d = types[(size_t)i % N_TYPES];
        b->n = 0;
        generate(d, b, 0);
        if (b->n < MAX_BYTES)
            require(try_one(d, b->p, b->n), "a valid message is accepted", d);
        for (uint32_t k = 1 + draw(4); k > 0; k--)
            damage(b);
        uint8_t *copy = malloc(b->n ? b->n : 1); /* of its own, so that the sanitizer sees its end */
        if (!copy)
            return EXIT_FAILURE;
        memcpy(copy, b->p, b->n);
        accepted += try_one(d, copy, b->n);
        free(copy);
    }
    printf("%ld accepted after damage\n", accepted);
    free(b);
    return EXIT_SUCCESS;
}

#endif
