/* fuzz_tokenizer.c - damaged tokenizer.json files, and texts and ids through what is accepted of them.
 *
 * An input is a tokenizer.json, a NUL and a text. What must hold: an error has a message and no handle; ids lie in the
 * vocabulary; decoded text is UTF-8; a stream gives what tok_decode gives; encoding again gives the same ids.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/tokenizer_internal.h"
#include "tests/fuzz/fuzz.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_tokenizer: %s\n", what);
    abort();
}

static void check_stream(const struct tokenizer *t, const uint32_t *ids, size_t n, unsigned flags)
{
    struct status st = STATUS_INIT;
    struct tok_stream *s;
    struct tok_buf all = {0};
    char *text;
    const char *piece;
    size_t len, piece_len;
    require(tok_decode(t, ids, n, flags, &text, &len, &st) == ST_OK, "known ids decode");
    require(tok_utf8_check(text, len) == len && text[len] == '\0', "decoded text is UTF-8");
    require(tok_stream_create(&s, t, flags, &st) == ST_OK, "a stream is made");
    for (size_t i = 0; i <= n; i++) {
        enum status_code rc =
            i < n ? tok_stream_push(s, ids[i], &piece, &piece_len, &st) : tok_stream_flush(s, &piece, &piece_len, &st);
        require(rc == ST_OK && tok_utf8_check(piece, piece_len) == piece_len, "a piece is UTF-8");
        require(tok_buf_add(&all, piece, piece_len), "memory");
    }
    require(all.len == len && (len == 0 || memcmp(all.data, text, len) == 0), "the pieces are the text");
    tok_stream_free(s);
    tok_buf_free(&all);
    free(text);
}

static void check_text(const struct tokenizer *t, const char *text, size_t len)
{
    for (unsigned flags = 0; flags <= TOK_ADD_SPECIAL; flags++) {
        struct status st = STATUS_INIT;
        uint32_t *ids = NULL, *again = NULL;
        size_t n = 0, n_again = 0;
        enum status_code rc = tok_encode(t, text, len, flags, &ids, &n, &st);
        if (rc != ST_OK) {
            require(st.message[0] && !ids, "an error has a message and no ids");
            require(rc != ST_INVALID_ARGUMENT || tok_utf8_check(text, len) < len || strstr(st.message, "gives up"),
                    "only bad UTF-8 and texts that a regex explodes on are the caller's fault");
            continue;
        }
        for (size_t i = 0; i < n; i++)
            require(ids[i] < tok_vocab_size(t), "ids lie in the vocabulary");
        require(tok_encode(t, text, len, flags, &again, &n_again, &st) == ST_OK, "encodes again");
        require(n == n_again && (n == 0 || memcmp(ids, again, n * sizeof *ids) == 0), "the same ids again");
        check_stream(t, ids, n, 0);
        check_stream(t, ids, n, TOK_SKIP_SPECIAL);
        free(ids);
        free(again);
    }
}

/* Ids drawn from the text's bytes: any order, byte tokens and special ones side by side. */
static void check_ids(const struct tokenizer *t, const uint8_t *data, size_t size)
{
    uint32_t ids[64];
    size_t n = 0;
    for (size_t i = 0; i + 1 < size && n < 64; i += 2) {
        uint32_t id = (data[i] | (uint32_t)data[i + 1] << 8) % tok_vocab_size(t);
        if (t->vocab.flags[id])
            ids[n++] = id;
    }
    check_stream(t, ids, n, 0);
    check_stream(t, ids, n, TOK_SKIP_SPECIAL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *end = size ? memchr(data, 0, size) : NULL;
    size_t json_len = end ? (size_t)(end - data) : size;
    const uint8_t *text = end ? end + 1 : data;
    size_t len = size - (size_t)(text - data);
    json_error_t err;
    json_t *root = json_loadb((const char *)data, json_len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &err);
    if (!root)
        return 0;
    struct tokenizer *t = NULL;
    struct status st = STATUS_INIT;
    if (tok_create(&t, root, &st) == ST_OK) {
        check_text(t, (const char *)text, len);
        check_ids(t, text, len);
    } else {
        require(st.message[0] && !t, "an error has a message and no handle");
    }
    tok_free(t);
    json_decref(root);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

#define ADDED(id, content, normalized, special)                                                                        \
    "{\"id\":" id ",\"content\":\"" content                                                                            \
    "\",\"single_word\":false,\"lstrip\":true,\"rstrip\":false,\"normalized\":" normalized ",\"special\":" special "}"

static const char *const SEEDS[] = {
    "{\"version\":\"1.0\",\"added_tokens\":[" ADDED("0", "<unk>", "false", "true") "," ADDED(
        "12", "[X]", "true",
        "false") "],"
                 "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"_\"},"
                 "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"_\"}]},\"pre_tokenizer\":null,"
                 "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"u\","
                 "\"type_id\":0}},"
                 "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"special_tokens\":{\"u\":{\"id\":\"u\",\"ids\":[0],"
                 "\"tokens\":[\"u\"]}}},"
                 "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":\"_\"}"
                 ",\"content\":\" \"},"
                 "{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" "
                 "\",\"start\":1,\"stop\":1}]},"
                 "\"model\":{\"type\":\"BPE\",\"unk_token\":\"<unk>\",\"fuse_unk\":true,\"byte_fallback\":true,"
                 "\"vocab\":{\"<unk>\":0,"
                 "\"<0xC3>\":1,\"<0xA9>\":2,\"<0xF0>\":3,\"<0x9F>\":4,\"_\":5,\"a\":6,\"b\":7,\"ab\":8,\"_a\":9,\"_"
                 "ab\":10,\"abab\":11},"
                 "\"merges\":[\"a b\",\"_ a\",\"_ ab\",\"ab ab\"]}}",
    "{\"version\":\"1.0\",\"added_tokens\":[" ADDED(
        "9", "<s>", "false",
        "true") "],\"normalizer\":null,"
                "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\",\"individual_"
                "digits\":true},"
                "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(?i:'s|'t)|\\\\p{L}+| "
                "?[^\\\\s\\\\p{L}\\\\p{N}]+|\\\\s+(?!\\\\S)|\\\\s+\"},"
                "\"behavior\":\"MergedWithNext\",\"invert\":false},{\"type\":\"ByteLevel\",\"add_prefix_space\":true,"
                "\"use_regex\":true}]},"
                "\"post_processor\":{\"type\":\"RobertaProcessing\",\"sep\":[\"a\",1],\"cls\":[\"b\",2]},"
                "\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true},"
                "\"model\":{\"type\":\"BPE\",\"ignore_merges\":true,\"vocab\":{\"\xC4\xA0\":0,\"a\":1,\"b\":2,"
                "\"\xC4\xA0"
                "a\":3,\"ab\":4,\"1\":5,\"'\":6,\"\xC3\x83\":7,\"\xC2\xA9\":8},\"merges\":[[\"\xC4\xA0\",\"a\"],[\"a\","
                "\"b\"]]}}",
    "{\"version\":\"1.0\",\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"_\",\"prepend_scheme\":\"first\","
    "\"split\":true},"
    "\"decoder\":{\"type\":\"Metaspace\",\"replacement\":\"_\",\"prepend_scheme\":\"first\"},"
    "\"model\":{\"type\":\"BPE\",\"vocab\":{\"_\":0,\"a\":1,\"b\":2,\"_a\":3},\"merges\":[\"_ a\"]}}",
    "{\"version\":\"1.0\",\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKC\"},{\"type\":\"NFD\"}"
    ","
    "{\"type\":\"StripAccents\"},{\"type\":\"Strip\",\"strip_left\":true,\"strip_right\":true},{\"type\":\"Lowercase\"}"
    ","
    "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"[b[\\\\s,]]+\"},\"content\":\" \"}]},\"pre_tokenizer\":{\"type\":"
    "\"Sequence\",\"pretokenizers\":[{\"type\":\"Punctuation\",\"behavior\":\"Contiguous\"},{\"type\":\"ByteLevel\","
    "\"add_prefix_space\":false,\"use_regex\":false},{\"type\":\"FixedLength\",\"length\":3}]},"
    "\"decoder\":{\"type\":\"Fuse\"},\"model\":{\"type\":\"BPE\",\"unk_token\":\"?\",\"continuing_subword_prefix\":\"#"
    "\","
    "\"end_of_word_suffix\":\"$\",\"byte_fallback\":true,\"vocab\":{\"?\":0,\"a\":1,\"#b\":2,\"#b$\":3,\"a$\":4,\"ab$"
    "\":5,"
    "\"ab\":6,\"<0x23>\":7,\"<0xC3>\":8},\"merges\":[\"a #b$\",\"a #b\"]}}",
};

static const char *const WORDS[] = {
    "null",
    "true",
    "false",
    "0",
    "-1",
    "4194303",
    "99999999999999",
    "1.5",
    "\"\"",
    "[]",
    "{}",
    "\"a\"",
    "\"Sequence\"",
    "\"Fuse\"",
    "\"Strip\"",
    "\"ByteLevel\"",
    "\"ByteFallback\"",
    "\"Metaspace\"",
    "\"Replace\"",
    "\"NFC\"",
    "\"NFKD\"",
    "\"Lowercase\"",
    "\"StripAccents\"",
    "\"Nmt\"",
    "\"Whitespace\"",
    "\"Punctuation\"",
    "\"BertPreTokenizer\"",
    "\"FixedLength\"",
    "\"CharDelimiterSplit\"",
    "\"Regex\"",
    "\\\\s",
    "\\\\w+",
    "(?",
    "[",
    "*",
    "{1,3}",
    "\"Removed\"",
    "\"Contiguous\"",
    "\"MergedWithPrevious\"",
    "\"always\"",
    "\"never\"",
    "\\u0000",
};

static const char *const TEXTS[] = {
    "ab ab",
    "a",
    " ",
    "<s>",
    "[X]",
    "\xC3\xA9",
    "\xF0\x9F\x91\x8D",
    "'s",
    "e\xCC\x81\xCC\xA7",
    "\xEA\xB0\x80\xE1\x86\xA8",
    "\xF0\xB1\x8D\x90",
    "\xC4\xB0",
    ",",
    "\xF0\x90\xB5\x90",
    "1",
    "\n",
    "b",
    "<unk>",
    "_",
    "\xC3",
    "abababab",
    "\t",
};

static uint64_t rng_next(uint64_t *s)
{
    uint64_t z = *s += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* Replaces the JSON value or other word that begins at or behind `at` (to the next punctuation) by another. */
static size_t swap_word(char *buf, size_t n, size_t max, size_t at, const char *word)
{
    while (at < n && strchr(",:[]{}", buf[at]))
        at++;
    size_t end = at, len = strlen(word);
    while (end < n && !strchr(",:[]{}", buf[end]))
        end++;
    if (n - (end - at) + len > max)
        return n;
    memmove(buf + at + len, buf + end, n - end);
    memcpy(buf + at, word, len);
    return n - (end - at) + len;
}

static size_t damage(char *buf, size_t n, size_t max, uint64_t *seed)
{
    for (uint64_t times = rng_next(seed) % 4; times && n > 8; times--) {
        size_t at = rng_next(seed) % n, len = rng_next(seed) % 8;
        switch (rng_next(seed) % 8) {
        case 0:
            buf[at] = (char)rng_next(seed);
            break;
        case 1: /* a piece goes */
            len = len < n - at ? len : n - at;
            memmove(buf + at, buf + at + len, n - at - len);
            n -= len;
            break;
        case 2: /* a piece comes twice */
            len = len < n - at ? len : n - at;
            if (n + len > max)
                break;
            memmove(buf + at + len, buf + at, n - at);
            n += len;
            break;
        default:
            n = swap_word(buf, n, max, at, WORDS[rng_next(seed) % (sizeof WORDS / sizeof *WORDS)]);
        }
    }
    return n;
}

int main(int argc, char **argv)
{
    unsigned long runs = (unsigned long)fuzz_start(argc, argv, 20000);
    static char buf[8192];
    for (unsigned long run = 0; run < runs; run++) {
        uint64_t seed = run * 7919 + 1;
        const char *base = SEEDS[run % (sizeof SEEDS / sizeof *SEEDS)];
        size_t n = strlen(base);
        memcpy(buf, base, n);
        n = damage(buf, n, sizeof buf - 512, &seed);
        buf[n++] = '\0';
        for (uint64_t words = rng_next(&seed) % 24; words; words--) {
            const char *word = TEXTS[rng_next(&seed) % (sizeof TEXTS / sizeof *TEXTS)];
            memcpy(buf + n, word, strlen(word));
            n += strlen(word);
        }
        fuzz_one(buf, n);
    }
    return 0;
}

#endif
