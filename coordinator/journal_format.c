/* journal_format.c - records as bytes: journal.h has the layout. */
#include <string.h>
#include <zlib.h>

#include "coordinator/journal_internal.h"

static const char magic[8] = {'T', 'N', 'D', 'M', 'J', 'R', 'N', 'L'};
#define VERSION 1

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the journal is written in the machine's order");

#define PUT(at, type, value)                                                                                           \
    do {                                                                                                               \
        const type put_ = (type)(value);                                                                               \
        memcpy(at, &put_, sizeof put_);                                                                                \
    } while (0)

static uint32_t get_u32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint64_t get_u64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint32_t header_crc(const uint8_t *h)
{
    uLong crc = crc32(0, h, 12);
    return (uint32_t)crc32(crc, h + 16, JOURNAL_HEADER_BYTES - 16);
}

void journal_put_header(uint8_t out[JOURNAL_HEADER_BYTES], uint64_t sequence, int64_t now_us)
{
    memcpy(out, magic, sizeof magic);
    PUT(out + 8, uint32_t, VERSION);
    PUT(out + 16, uint64_t, sequence);
    PUT(out + 24, int64_t, now_us);
    PUT(out + 12, uint32_t, header_crc(out));
}

bool journal_get_header(const uint8_t *data, size_t len, uint64_t *sequence)
{
    if (len < JOURNAL_HEADER_BYTES || memcmp(data, magic, sizeof magic) != 0 || get_u32(data + 8) != VERSION ||
        get_u32(data + 12) != header_crc(data))
        return false;
    *sequence = get_u64(data + 16);
    return true;
}

uint32_t journal_crc(const void *frame, size_t n)
{
    const uint8_t *f = frame;
    uLong crc = crc32(0, f, 4);
    return (uint32_t)crc32(crc, f + JOURNAL_FRAME_BYTES, (uInt)n);
}

void journal_seal(uint8_t *frame, uint32_t payload)
{
    PUT(frame, uint32_t, payload);
    PUT(frame + 4, uint32_t, journal_crc(frame, payload));
}

size_t journal_accept_size(const struct journal_accept *a)
{
    return JOURNAL_ACCEPT_BYTES + (size_t)a->n_prompt * 4 + a->name_len + a->request_len;
}

void journal_put_accept(uint8_t *out, const struct journal_accept *a)
{
    out[0] = JOURNAL_ACCEPT;
    out[1] = (uint8_t)a->n_choices;
    PUT(out + 2, uint16_t, a->name_len);
    PUT(out + 4, uint32_t, a->keep_ms);
    PUT(out + 8, uint64_t, a->number);
    PUT(out + 16, int64_t, a->arrived_us);
    PUT(out + 24, int64_t, a->deadline_us);
    PUT(out + 32, uint64_t, a->model);
    memcpy(out + 40, a->owner, JOURNAL_OWNER_BYTES);
    PUT(out + 56, uint32_t, a->n_prompt);
    PUT(out + 60, uint32_t, a->request_len);
    out += JOURNAL_ACCEPT_BYTES;
    memcpy(out, a->prompt, (size_t)a->n_prompt * 4);
    out += (size_t)a->n_prompt * 4;
    memcpy(out, a->name, a->name_len);
    if (a->request_len)
        memcpy(out + a->name_len, a->request, a->request_len);
}

/* The ids are aligned where the payload is: JOURNAL_ACCEPT_BYTES is a multiple of 4. */
bool journal_get_accept(const uint8_t *p, size_t n, struct journal_accept *a)
{
    uint16_t name_len;
    if (n < JOURNAL_ACCEPT_BYTES || p[0] != JOURNAL_ACCEPT)
        return false;
    memcpy(&name_len, p + 2, sizeof name_len);
    *a = (struct journal_accept){.n_choices = p[1],
                                 .name_len = name_len,
                                 .keep_ms = get_u32(p + 4),
                                 .number = get_u64(p + 8),
                                 .arrived_us = (int64_t)get_u64(p + 16),
                                 .deadline_us = (int64_t)get_u64(p + 24),
                                 .model = get_u64(p + 32),
                                 .n_prompt = get_u32(p + 56),
                                 .request_len = get_u32(p + 60)};
    memcpy(a->owner, p + 40, JOURNAL_OWNER_BYTES);
    uint64_t size = JOURNAL_ACCEPT_BYTES + (uint64_t)a->n_prompt * 4 + name_len + a->request_len;
    if (size != n || a->n_choices < 1 || a->n_choices > JOURNAL_MAX_CHOICES || name_len < 1 ||
        name_len > JOURNAL_MAX_NAME || a->n_prompt < 1 || a->number == UINT64_MAX)
        return false;
    a->prompt = (const uint32_t *)(const void *)(p + JOURNAL_ACCEPT_BYTES);
    a->name = (const char *)(p + JOURNAL_ACCEPT_BYTES + (size_t)a->n_prompt * 4);
    a->request = a->name + name_len;
    return true;
}

void journal_put_tokens(uint8_t *out, uint64_t number, uint32_t choice, uint32_t from, const uint32_t *ids, uint32_t n)
{
    out[0] = JOURNAL_TOKENS;
    out[1] = (uint8_t)choice;
    PUT(out + 2, uint16_t, n);
    PUT(out + 4, uint32_t, from);
    PUT(out + 8, uint64_t, number);
    memcpy(out + JOURNAL_TOKENS_BYTES, ids, (size_t)n * 4);
}

void journal_put_end(uint8_t *out, uint64_t number, int64_t until_us)
{
    memset(out, 0, 8);
    out[0] = JOURNAL_END;
    PUT(out + 8, uint64_t, number);
    PUT(out + 16, int64_t, until_us);
}

void journal_put_snapshot(uint8_t *out, uint64_t next_number)
{
    memset(out, 0, 8);
    out[0] = JOURNAL_SNAPSHOT;
    PUT(out + 8, uint64_t, next_number);
}
