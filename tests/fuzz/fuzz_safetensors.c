/* fuzz_safetensors.c - arbitrary bytes as a safetensors file.
 *
 * What must hold: no read outside of the input (the address sanitizer looks), an error has a message, and every tensor
 * that is given out lies within the file and has the bytes that its shape says.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"
#include "worker/safetensors.h"

static void require(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_safetensors: %s\n", what);
    abort();
}

static void check_tensors(const struct safetensors *s, const uint8_t *data, size_t size)
{
    volatile uint8_t sink = 0;
    for (size_t i = 0; i < safetensors_count(s); i++) {
        struct safetensor t;
        struct status st = STATUS_INIT;
        if (safetensors_get(&t, s, safetensors_name(s, i), &st) != ST_OK) {
            require(st.code == ST_UNIMPLEMENTED, "a tensor that is listed is only refused for its dtype");
            continue;
        }
        uint64_t elements = 1;
        for (uint32_t d = 0; d < t.dims; d++)
            elements *= t.shape[d];
        require(elements * mat_elem_bytes(t.dtype) == t.bytes, "bytes follow from the shape");
        require(t.data >= data && t.bytes <= size - (size_t)(t.data - data), "the tensor lies within the file");
        if (t.bytes)
            sink ^= t.data[0] ^ t.data[t.bytes - 1];
    }
    (void)sink;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct status st = STATUS_INIT;
    if (size == 0)
        return 0;
    struct safetensors *s = NULL;
    if (safetensors_open_memory(&s, data, size, "input", &st) != ST_OK) {
        require(st.message[0] && !s, "an error has a message and no handle");
        return 0;
    }
    check_tensors(s, data, size);
    safetensors_close(s);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

static const char *const headers[] = {
    "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
    "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[16,24]}}",
    "{\"a\":{\"dtype\":\"F16\",\"shape\":[0,9],\"data_offsets\":[0,0]},"
    "\"b\":{\"dtype\":\"I64\",\"shape\":[3],\"data_offsets\":[0,24]}}",
};
static const char *const pieces[] = {
    "\"",
    "{",
    "}",
    "[",
    "]",
    ",",
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "9223372036854775807",
    "null",
    "true",
    "\"F32\"",
    "\"dtype\"",
    "\"shape\"",
    "\"data_offsets\"",
    "[[[[[[[[",
    "\\u0000",
    "\xff",
};

static size_t seed(uint8_t *out, uint64_t *state)
{
    size_t n = 0;
    const char *header = headers[next_random(state) & 1];
    uint64_t length = strlen(header);
    for (int i = 0; i < 8; i++)
        out[n++] = (uint8_t)(length >> 8 * i);
    uint8_t *values = mempcpy(out + n, header, length);
    memset(values, 7, 24);
    return (size_t)(values - out) + 24;
}

static size_t damage(uint8_t *data, size_t n, uint64_t *state)
{
    size_t at = next_random(state) % n;
    const char *piece = pieces[next_random(state) % (sizeof pieces / sizeof *pieces)];
    switch (next_random(state) % 6) {
    case 0: /* a bit */
        data[at] ^= (uint8_t)(1u << next_random(state) % 8);
        return n;
    case 1: /* a byte */
        data[at] = (uint8_t)next_random(state);
        return n;
    case 2: /* the end */
        return at;
    case 3: { /* some bytes taken out */
        size_t gone = next_random(state) % 16 % (n - at + 1);
        memmove(data + at, data + at + gone, n - at - gone);
        return n - gone;
    }
    case 4: /* a digit */
        for (size_t i = at; i < n; i++)
            if (data[i] >= '0' && data[i] <= '9') {
                data[i] = (uint8_t)('0' + next_random(state) % 10);
                break;
            }
        return n;
    default: /* something put in */
        for (const char *c = piece; *c; c++, at++, n++) {
            memmove(data + at + 1, data + at, n - at);
            data[at] = (uint8_t)*c;
        }
        return n;
    }
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 100000);
    uint64_t state = 2026;
    static uint8_t work[4096];
    for (long i = 0; i < runs; i++) {
        size_t n = seed(work, &state);
        for (uint64_t changes = next_random(&state) % 6; changes > 0 && n > 1; changes--)
            n = damage(work, n, &state);
        fuzz_one(work, n);
    }
    return 0;
}
#endif
