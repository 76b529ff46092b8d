/* bench_tokenizer.c - load time, encoding and decoding rates of a model folder's tokenizer.
 *
 *     bench_tokenizer DIR [TEXT_FILE]
 *
 * Without a text: 4 MB of English-like prose made of a fixed vocabulary with a Zipf distribution. "cold" is the first call
 * (empty word cache), "warm" the best of five. "one word" has no white space: the cache does not help.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "coordinator/tokenizer.h"

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts); /* other work on the machine does not count */
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static uint64_t rng_next(uint64_t *s)
{
    uint64_t z = *s += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* 20,000 words of syllables; word k is drawn in proportion to 1/k. */
static char *make_prose(size_t size)
{
    static const char *const syllables[] = {"the", "in",  "er", "an", "re", "on", "at", "en", "st", "or",
                                            "al",  "ing", "ti", "le", "ma", "ro", "se", "li", "de", "ne"};
    char *text = malloc(size + 64), word[64];
    uint64_t seed = 1;
    size_t n = 0, sentence = 0;
    while (text && n < size) {
        double u = (double)(rng_next(&seed) >> 11) / 9007199254740992.0;
        uint64_t rank = 1, w;
        for (double step = 20000; u < 0.93 && rank < 20000; u += 0.07, step /= 2)
            rank = rank * 2 + (rng_next(&seed) & 1);
        w = rank % 20000 * 2654435761u;
        size_t len = 0;
        for (uint64_t k = 1 + w % 3; k; k--, w /= 23) {
            const char *s = syllables[w % 20];
            memcpy(word + len, s, strlen(s));
            len += strlen(s);
        }
        if (sentence == 0)
            word[0] = (char)(word[0] - 32);
        memcpy(text + n, word, len);
        n += len;
        sentence = (sentence + 1) % 14;
        memcpy(text + n, sentence ? " " : ". ", 2);
        n += sentence ? 1 : 2;
    }
    return text;
}

static char *read_text(const char *path, size_t *size)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return NULL;
    char *text = malloc((size_t)64 << 20);
    *size = text ? fread(text, 1, (size_t)64 << 20, f) : 0;
    fclose(f);
    return text;
}

static uint32_t *encode(const struct tokenizer *t, const char *text, size_t len, size_t *n, double *seconds)
{
    struct status st = STATUS_INIT;
    uint32_t *ids = NULL;
    double start = now_s();
    if (tok_encode(t, text, len, 0, &ids, n, &st) != ST_OK) {
        fprintf(stderr, "bench_tokenizer: %s\n", st.message);
        exit(1);
    }
    *seconds = now_s() - start;
    return ids;
}

static void bench_encode(const struct tokenizer *t, const char *name, const char *text, size_t len)
{
    double cold = 0, best = 1e9;
    size_t n = 0;
    for (int i = 0; i < 6; i++) {
        double s;
        free(encode(t, text, len, &n, &s));
        if (i == 0)
            cold = s;
        else if (s < best)
            best = s;
    }
    printf("encode %-10s %6.2f MB  cold %6.1f MB/s  warm %6.1f MB/s  %.1f bytes/id\n", name, (double)len / 1e6,
           (double)len / cold / 1e6, (double)len / best / 1e6, (double)len / (double)n);
}

static void bench_decode(const struct tokenizer *t, const char *text, size_t len)
{
    struct status st = STATUS_INIT;
    size_t n, text_len, piece_len, sum = 0;
    double s;
    uint32_t *ids = encode(t, text, len, &n, &s);
    char *out;
    const char *piece;
    struct tok_stream *stream;
    double start = now_s();
    if (tok_decode(t, ids, n, 0, &out, &text_len, &st) != ST_OK || tok_stream_create(&stream, t, 0, &st) != ST_OK)
        exit(1);
    double decoded = now_s();
    for (size_t i = 0; i < n; i++) {
        if (tok_stream_push(stream, ids[i], &piece, &piece_len, &st) != ST_OK)
            exit(1);
        sum += piece_len;
    }
    double streamed = now_s();
    printf("decode %.1f ns/id, stream %.1f ns/id (%zu bytes)\n", (decoded - start) / (double)n * 1e9,
           (streamed - decoded) / (double)n * 1e9, sum);
    tok_stream_free(stream);
    free(out);
    free(ids);
}

int main(int argc, char **argv)
{
    struct status st = STATUS_INIT;
    struct tokenizer *t;
    size_t len = 4000000;
    if (argc < 2) {
        fprintf(stderr, "usage: bench_tokenizer DIR [TEXT_FILE]\n");
        return 2;
    }
    double start = now_s();
    if (tok_load(&t, argv[1], &st) != ST_OK) {
        fprintf(stderr, "bench_tokenizer: %s\n", st.message);
        return 1;
    }
    printf("load %.0f ms, %u ids\n", (now_s() - start) * 1e3, tok_vocab_size(t));
    char *text = argc > 2 ? read_text(argv[2], &len) : make_prose(len), *word = malloc(1000000);
    if (!text || !word)
        return 1;
    bench_encode(t, "prose", text, len);
    bench_decode(t, text, len);
    size_t n = 0;
    for (size_t i = 0; i < len && n < 1000000; i++)
        if (text[i] >= 'a' && text[i] <= 'z')
            word[n++] = text[i];
    bench_encode(t, "one word", word, n);
    free(word);
    free(text);
    tok_free(t);
    return 0;
}
