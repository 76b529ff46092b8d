/* rpc_message.c - messages: bytes to structs safely, structs to bytes, headers to strings.
 *
 * rpc_unpack looks over the bytes before protobuf-c 1.4 does, because protobuf-c believes its peer:
 *  - it recurses as deep as the types go, without a bound;
 *  - two bytes on the wire can cost a hundred bytes of heap (an empty element of a repeated message, an unknown field),
 *    so that 16 MiB may become more than a gigabyte;
 *  - a singular message that occurs again is merged by copying all of its arrays: n occurrences take n * n time;
 *  - a C string ends at its first NUL, so that two different names may look equal.
 * One pass over the bytes, without allocation, rules all of this out.
 */
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <stdlib.h>
#include <string.h>

#include "proto/rpc_internal.h"

#define MAX_DEPTH      16
#define MAX_FIELDS     128          /* of one message type; ours have at most 14 */
#define MAX_HEAP_BYTES (128u << 20) /* 16 MiB of one-byte token ids take 64 MiB */
#define MALLOC_BYTES   32           /* overhead and rounding of one allocation */
#define SCANNED_BYTES  64           /* what protobuf-c notes down for each field; its slabs double */
#define UNKNOWN_BYTES  (sizeof(ProtobufCMessageUnknownField) + MALLOC_BYTES)

enum wire { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_LEN = 2, WIRE_32 = 5 };

struct bytes {
    const uint8_t *p;
    const uint8_t *end;
};

static bool get_varint(struct bytes *b, unsigned max_bytes, uint64_t *value)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < max_bytes && b->p < b->end; i++) {
        uint8_t byte = *b->p++;
        v |= (uint64_t)(byte & 0x7F) << (7 * i);
        if (!(byte & 0x80)) {
            *value = v;
            return true;
        }
    }
    return false;
}

static bool skip(struct bytes *b, size_t n)
{
    if ((size_t)(b->end - b->p) < n)
        return false;
    b->p += n;
    return true;
}

static enum wire wire_of(ProtobufCType type)
{
    switch (type) {
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_SFIXED32:
    case PROTOBUF_C_TYPE_FLOAT:
        return WIRE_32;
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_DOUBLE:
        return WIRE_64;
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
    case PROTOBUF_C_TYPE_MESSAGE:
        return WIRE_LEN;
    default:
        return WIRE_VARINT;
    }
}

/* Heap bytes of a packed array; false when its bytes do not divide into elements. */
static bool packed_bytes(ProtobufCType type, struct bytes b, size_t *bytes)
{
    enum wire wire = wire_of(type);
    size_t len = (size_t)(b.end - b.p), n = 0, run = 0;
    bool wide = type == PROTOBUF_C_TYPE_INT64 || type == PROTOBUF_C_TYPE_UINT64 || type == PROTOBUF_C_TYPE_SINT64;
    if (wire != WIRE_VARINT) {
        *bytes = len;
        return len % (wire == WIRE_32 ? 4 : 8) == 0;
    }
    for (const uint8_t *p = b.p; p < b.end; p++) {
        if (++run > 10)
            return false;
        if (!(*p & 0x80)) {
            n++;
            run = 0;
        }
    }
    *bytes = n * (wide ? 8 : 4);
    return run == 0;
}

static bool check_message(const ProtobufCMessageDescriptor *d, struct bytes b, unsigned depth, size_t *heap);

/* One occurrence of a known field with length-prefixed content. */
static bool check_content(const ProtobufCFieldDescriptor *f, struct bytes b, unsigned depth, size_t *heap)
{
    size_t len = (size_t)(b.end - b.p);
    bool repeated = f->label == PROTOBUF_C_LABEL_REPEATED;
    if (repeated)
        *heap += sizeof(void *);
    switch (f->type) {
    case PROTOBUF_C_TYPE_MESSAGE:
        return check_message(f->descriptor, b, depth + 1, heap);
    case PROTOBUF_C_TYPE_STRING:
        *heap += MALLOC_BYTES + len;
        return !memchr(b.p, '\0', len);
    case PROTOBUF_C_TYPE_BYTES:
        *heap += MALLOC_BYTES + len + sizeof(ProtobufCBinaryData);
        return true;
    default: {
        size_t bytes;
        if (!repeated || !packed_bytes(f->type, b, &bytes))
            return false;
        *heap += MALLOC_BYTES + bytes;
        return true;
    }
    }
}

/* Reads one field. *content is what a length-prefixed one holds. */
static bool next_field(struct bytes *b, uint32_t *number, enum wire *wire, struct bytes *content)
{
    uint64_t key, value;
    if (!get_varint(b, 5, &key) || key > UINT32_MAX || key >> 3 == 0)
        return false;
    *number = (uint32_t)key >> 3;
    *wire = (enum wire)(key & 7);
    switch (*wire) {
    case WIRE_VARINT:
        return get_varint(b, 10, &value);
    case WIRE_64:
        return skip(b, 8);
    case WIRE_32:
        return skip(b, 4);
    case WIRE_LEN:
        if (!get_varint(b, 5, &value))
            return false;
        content->p = b->p;
        if (value > RPC_MAX_MESSAGE_BYTES || !skip(b, (size_t)value))
            return false;
        content->end = b->p;
        return true;
    default: /* groups are of another age */
        return false;
    }
}

static bool check_message(const ProtobufCMessageDescriptor *d, struct bytes b, unsigned depth, size_t *heap)
{
    uint64_t seen[MAX_FIELDS / 64] = {0};
    if (depth > MAX_DEPTH || d->n_fields > MAX_FIELDS)
        return false;
    *heap += d->sizeof_message + MALLOC_BYTES;
    while (b.p < b.end) {
        uint32_t number;
        enum wire wire;
        struct bytes content = {b.p, b.p};
        const uint8_t *start = b.p;
        if (!next_field(&b, &number, &wire, &content))
            return false;
        *heap += SCANNED_BYTES;
        const ProtobufCFieldDescriptor *f = protobuf_c_message_descriptor_get_field(d, number);
        if (!f) {
            *heap += UNKNOWN_BYTES + (size_t)(b.p - start);
        } else if (wire == WIRE_LEN) {
            size_t index = (size_t)(f - d->fields);
            uint64_t bit = 1ull << (index % 64);
            bool merged = f->type == PROTOBUF_C_TYPE_MESSAGE && f->label != PROTOBUF_C_LABEL_REPEATED &&
                          !(f->flags & PROTOBUF_C_FIELD_FLAG_ONEOF); /* there the last one replaces the others */
            if ((merged && seen[index / 64] & bit) || !check_content(f, content, depth, heap))
                return false;
            seen[index / 64] |= bit;
        } else {
            *heap += 8;
            if (wire != wire_of(f->type))
                return false;
        }
        if (*heap > MAX_HEAP_BYTES)
            return false;
    }
    return true;
}

ProtobufCMessage *rpc_unpack(const ProtobufCMessageDescriptor *d, const void *data, size_t len)
{
    static const uint8_t none[1] = {0};
    size_t heap = 0;
    if (len > RPC_MAX_MESSAGE_BYTES)
        return NULL;
    const uint8_t *p = len ? data : none;
    if (!check_message(d, (struct bytes){p, p + len}, 0, &heap))
        return NULL;
    return protobuf_c_message_unpack(d, NULL, len, p);
}

grpc_byte_buffer *rpc_pack(const ProtobufCMessage *m, size_t *bytes)
{
    size_t n = protobuf_c_message_get_packed_size(m);
    grpc_slice s = grpc_slice_malloc(n);
    protobuf_c_message_pack(m, GRPC_SLICE_START_PTR(s));
    grpc_byte_buffer *b = grpc_raw_byte_buffer_create(&s, 1);
    grpc_slice_unref(s);
    *bytes = n;
    return b;
}

grpc_slice rpc_flatten(grpc_byte_buffer *b)
{
    if (b->type == GRPC_BB_RAW && b->data.raw.slice_buffer.count == 1)
        return grpc_slice_ref(b->data.raw.slice_buffer.slices[0]);
    grpc_byte_buffer_reader r;
    if (!grpc_byte_buffer_reader_init(&r, b))
        return grpc_empty_slice();
    grpc_slice s = grpc_byte_buffer_reader_readall(&r);
    grpc_byte_buffer_reader_destroy(&r);
    return s;
}

enum status_code rpc_status_from_slice(struct status *st, grpc_status_code code, grpc_slice details)
{
    enum status_code c =
        code >= GRPC_STATUS_OK && code <= GRPC_STATUS_UNAUTHENTICATED ? (enum status_code)code : ST_UNKNOWN;
    size_t n = GRPC_SLICE_LENGTH(details);
    return status_set(st, c, "%.*s", (int)(n < STATUS_MESSAGE_MAX ? n : STATUS_MESSAGE_MAX),
                      (const char *)GRPC_SLICE_START_PTR(details));
}

static char *put(char *to, const void *from, size_t n)
{
    memcpy(to, from, n);
    to[n] = '\0';
    return to + n + 1;
}

char *rpc_strings_copy(const char *first, const grpc_metadata_array *md)
{
    size_t n = strlen(first) + 2;
    for (size_t i = 0; i < md->count; i++)
        n += GRPC_SLICE_LENGTH(md->metadata[i].key) + GRPC_SLICE_LENGTH(md->metadata[i].value) + 2;
    char *block = malloc(n);
    if (!block)
        return NULL;
    char *p = put(block, first, strlen(first));
    for (size_t i = 0; i < md->count; i++) {
        const grpc_slice *k = &md->metadata[i].key, *v = &md->metadata[i].value;
        const char *text = (const char *)GRPC_SLICE_START_PTR(*v);
        p = put(p, GRPC_SLICE_START_PTR(*k), GRPC_SLICE_LENGTH(*k));
        p = put(p, text, strnlen(text, GRPC_SLICE_LENGTH(*v))); /* a "-bin" value may hold a NUL */
    }
    *p = '\0'; /* no key is empty */
    return block;
}

const char *rpc_strings_find(const char *strings, const char *key)
{
    if (!strings)
        return NULL;
    const char *p = strings + strlen(strings) + 1;
    while (*p) {
        const char *value = p + strlen(p) + 1;
        if (strcmp(p, key) == 0)
            return value;
        p = value + strlen(value) + 1;
    }
    return NULL;
}
