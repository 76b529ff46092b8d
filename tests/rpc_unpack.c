/* rpc_unpack.c - rpc_unpack and bytes that want to hurt: see the top of proto/rpc_message.c. */
#include "rpc_fixture.h"
#include "tandem/v1/control.pb-c.h"
#include "tandem/v1/worker_control.pb-c.h"

#define REQUEST (&tandem__v1__generate_request__descriptor)

struct writer {
    uint8_t *p;
    size_t len, room;
};

static void put(struct writer *w, const void *data, size_t n)
{
    if (w->len + n > w->room) {
        w->room = 2 * (w->len + n);
        w->p = realloc(w->p, w->room);
        ck_assert_ptr_nonnull(w->p);
    }
    if (n)
        memcpy(w->p + w->len, data, n);
    w->len += n;
}

static void put_varint(struct writer *w, uint64_t v)
{
    do {
        uint8_t b = (uint8_t)((v & 0x7F) | (v > 0x7F ? 0x80 : 0));
        put(w, &b, 1);
        v >>= 7;
    } while (v);
}

static void put_field(struct writer *w, unsigned number, const void *data, size_t n)
{
    put_varint(w, number << 3 | 2);
    put_varint(w, n);
    put(w, data, n);
}

static bool accepted(const ProtobufCMessageDescriptor *d, const void *data, size_t n)
{
    ProtobufCMessage *m = rpc_unpack(d, data, n);
    protobuf_c_message_free_unpacked(m, NULL);
    return m != NULL;
}

START_TEST(message_survives_the_way)
{
    uint32_t ids[] = {1, 200, 70000, UINT32_MAX};
    Tandem__V1__GenerateRequest r = TANDEM__V1__GENERATE_REQUEST__INIT;
    Tandem__V1__TokenIds t = TANDEM__V1__TOKEN_IDS__INIT;
    Tandem__V1__Sampling s = TANDEM__V1__SAMPLING__INIT;
    t.ids = ids;
    t.n_ids = 4;
    r.token_ids = &t;
    r.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS;
    s.top_k = 0;
    s.top_k_is_case = TANDEM__V1__SAMPLING__TOP_K_IS_TOP_K; /* set, to zero */
    r.sampling = &s;
    uint8_t bytes[128];
    size_t n = protobuf_c_message_pack(&r.base, bytes);
    Tandem__V1__GenerateRequest *got = (Tandem__V1__GenerateRequest *)rpc_unpack(REQUEST, bytes, n);
    ck_assert_ptr_nonnull(got);
    ck_assert_uint_eq(got->token_ids->n_ids, 4);
    ck_assert_uint_eq(got->token_ids->ids[3], UINT32_MAX);
    ck_assert_int_eq(got->sampling->top_k_is_case, TANDEM__V1__SAMPLING__TOP_K_IS_TOP_K);
    ck_assert_int_eq(got->sampling->top_p_is_case, TANDEM__V1__SAMPLING__TOP_P_IS__NOT_SET);
    protobuf_c_message_free_unpacked(&got->base, NULL);
    for (size_t cut = 0; cut < n; cut++) /* no prefix may hurt */
        accepted(REQUEST, bytes, cut);
    ck_assert(accepted(REQUEST, NULL, 0));
}
END_TEST

START_TEST(unpack_keeps_what_it_does_not_know)
{
    static const uint8_t bytes[] = {0xA2, 0x06, 3, 'a', 'b', 'c', 0xA8, 0x06, 5, 0xB5, 0x06, 1, 2, 3, 4};
    uint8_t again[sizeof bytes];
    ProtobufCMessage *m = rpc_unpack(&tandem__v1__token_ids__descriptor, bytes, sizeof bytes);
    ck_assert_ptr_nonnull(m);
    ck_assert_uint_eq(protobuf_c_message_get_packed_size(m), sizeof bytes);
    protobuf_c_message_pack(m, again);
    ck_assert_mem_eq(bytes, again, sizeof bytes);
    protobuf_c_message_free_unpacked(m, NULL);
}
END_TEST

START_TEST(broken_bytes_are_no_message)
{
    static const struct {
        const char *bytes;
        size_t n;
    } bad[] = {
        {"\x0A", 1}, /* a length is missing */
        {"\x0A\x05"
         "abcd",
         6},                                                          /* and one is too long */
        {"\x0A\xFF\xFF\xFF\xFF\x0F", 6},                              /* by 4 GiB */
        {"\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01", 11},         /* by 2^64 */
        {"\x08\x01", 2},                                              /* a number where text is expected */
        {"\x0B\x0C", 2},                                              /* a group */
        {"\x02\x00", 2},                                              /* field number 0 */
        {"\x0E\x00", 2},                                              /* wire type 6 */
        {"\x80\x80\x80\x80\x80\x01", 6},                              /* a key of six bytes */
        {"\x12\x01\x80", 3},                                          /* an array that ends within an element */
        {"\x12\x0B\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", 13}, /* an element of eleven bytes */
        {"\xF8\x07\x80", 3},                                          /* an unknown number without an end */
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        ck_assert_msg(!accepted(MSG_TYPE, bad[i].bytes, bad[i].n), "case %zu was accepted", i);
}
END_TEST

START_TEST(text_with_a_nul_is_refused_where_it_would_be_cut)
{
    struct writer w = {0};
    put_field(&w, 1, "a\0b", 3);
    ck_assert(!accepted(&tandem__v1__abort_request__descriptor, w.p, w.len)); /* a C string */
    ck_assert(accepted(MSG_TYPE, w.p, w.len));                                /* length and bytes */
    free(w.p);
}
END_TEST

START_TEST(million_token_ids_are_fine)
{
    struct writer ids = {0}, w = {0};
    for (uint32_t i = 0; i < 1000000; i++)
        put_varint(&ids, i % 128000);
    struct writer inner = {0};
    put_field(&inner, 1, ids.p, ids.len);
    put_field(&w, 3, inner.p, inner.len);
    Tandem__V1__GenerateRequest *m = (Tandem__V1__GenerateRequest *)rpc_unpack(REQUEST, w.p, w.len);
    ck_assert_ptr_nonnull(m);
    ck_assert_uint_eq(m->token_ids->n_ids, 1000000);
    protobuf_c_message_free_unpacked(&m->base, NULL);
    w.len = 0; /* the most that fits: every byte an id */
    free(ids.p);
    ids.p = calloc(1, RPC_MAX_MESSAGE_BYTES);
    put_field(&w, 2, ids.p, RPC_MAX_MESSAGE_BYTES - 8);
    ck_assert(accepted(MSG_TYPE, w.p, w.len));
    put_field(&w, 2, ids.p, 16);
    ck_assert_uint_gt(w.len, RPC_MAX_MESSAGE_BYTES);
    ck_assert(!accepted(MSG_TYPE, w.p, w.len));
    free(ids.p);
    free(inner.p);
    free(w.p);
}
END_TEST

/* Millions of tiny parts: each would take fifty times its bytes from the heap. */
START_TEST(small_parts_cannot_take_much_memory)
{
    static const char *const parts[] = {
        "\x1A\x00",     /* StepPlan.admits, empty */
        "\x2A\x00",     /* StepPlan.prefills, empty */
        "\xF8\x07\x00", /* a number that is not known */
        "\xFA\x07\x00", /* bytes that are not known */
    };
    static const size_t lens[] = {2, 2, 3, 3};
    for (size_t i = 0; i < 4; i++) {
        struct writer w = {0};
        while (w.len < 12u << 20)
            put(&w, parts[i], lens[i]);
        int64_t t = now_us();
        ck_assert_msg(!accepted(&tandem__v1__step_plan__descriptor, w.p, w.len), "part %zu was accepted", i);
        ck_assert_int_lt(now_us() - t, 1000000 * SLOW);
        ck_assert(accepted(&tandem__v1__step_plan__descriptor, w.p, 3000 * lens[i]));
        free(w.p);
    }
}
END_TEST

/* Merged by copying: a long array, then a hundred thousand messages of one element each. */
START_TEST(repeated_singular_message_cannot_take_much_time)
{
    struct writer w = {0}, inner = {0};
    uint8_t *ids = calloc(1, 1 << 20);
    put_field(&inner, 2, ids, 1 << 20);
    put_field(&w, 6, inner.p, inner.len); /* GenerateRequest.stopping.stop_token_ids */
    ck_assert(accepted(REQUEST, w.p, w.len));
    for (int i = 0; i < 100000; i++)
        put_field(&w, 6, "\x12\x01\x05", 3);
    int64_t t = now_us();
    ck_assert(!accepted(REQUEST, w.p, w.len));
    ck_assert_int_lt(now_us() - t, 1000000 * SLOW);
    /* In a oneof the last one counts, nothing is merged. */
    w.len = 0;
    put_field(&w, 3, "\x0A\x01\x05", 3);
    put_field(&w, 3, "\x0A\x02\x06\x07", 4);
    put_field(&w, 2, "text", 4);
    put_field(&w, 3, "\x0A\x02\x08\x09", 4);
    Tandem__V1__GenerateRequest *m = (Tandem__V1__GenerateRequest *)rpc_unpack(REQUEST, w.p, w.len);
    ck_assert_ptr_nonnull(m);
    ck_assert_int_eq(m->prompt_case, TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS);
    ck_assert_uint_eq(m->token_ids->n_ids, 2);
    ck_assert_uint_eq(m->token_ids->ids[1], 9);
    protobuf_c_message_free_unpacked(&m->base, NULL);
    free(ids);
    free(inner.p);
    free(w.p);
}
END_TEST

/* message Node { Node child = 1; }, by hand: none of our own types contains itself. */
struct node {
    ProtobufCMessage base;
    struct node *child;
};

static ProtobufCMessageDescriptor node_type;
static const ProtobufCFieldDescriptor node_fields[] = {{
    .name = "child",
    .id = 1,
    .label = PROTOBUF_C_LABEL_NONE,
    .type = PROTOBUF_C_TYPE_MESSAGE,
    .offset = offsetof(struct node, child),
    .descriptor = &node_type,
}};
static const unsigned node_names[] = {0};
static const ProtobufCIntRange node_ranges[] = {{1, 0}, {0, 1}};

START_TEST(deep_nesting_is_refused)
{
    node_type = (ProtobufCMessageDescriptor){
        .magic = PROTOBUF_C__MESSAGE_DESCRIPTOR_MAGIC,
        .name = "Node",
        .sizeof_message = sizeof(struct node),
        .n_fields = 1,
        .fields = node_fields,
        .fields_sorted_by_name = node_names,
        .n_field_ranges = 1,
        .field_ranges = node_ranges,
    };
    enum { DEPTH = 100000, ROOM = 6 * DEPTH };
    uint8_t *bytes = malloc(ROOM), *p = bytes + ROOM; /* written from its end, the innermost first */
    for (int depth = 1; depth <= DEPTH; depth++) {
        uint8_t head[8];
        struct writer w = {head, 0, sizeof head};
        put_varint(&w, 0x0A);
        put_varint(&w, (uint64_t)(bytes + ROOM - p));
        p -= w.len;
        memcpy(p, head, w.len);
        if (depth <= 10)
            ck_assert(accepted(&node_type, p, (size_t)(bytes + ROOM - p)));
    }
    ck_assert(!accepted(&node_type, p, (size_t)(bytes + ROOM - p)));
    free(bytes);
}
END_TEST

void rpc_unpack_tests(TCase *c)
{
    tcase_add_test(c, message_survives_the_way);
    tcase_add_test(c, unpack_keeps_what_it_does_not_know);
    tcase_add_test(c, broken_bytes_are_no_message);
    tcase_add_test(c, text_with_a_nul_is_refused_where_it_would_be_cut);
    tcase_add_test(c, million_token_ids_are_fine);
    tcase_add_test(c, small_parts_cannot_take_much_memory);
    tcase_add_test(c, repeated_singular_message_cannot_take_much_time);
    tcase_add_test(c, deep_nesting_is_refused);
}
