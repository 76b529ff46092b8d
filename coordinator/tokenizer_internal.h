/* tokenizer_internal.h - what the tokenizer's own files share; nobody else includes it.
 *
 *   text ─ added tokens (raw) ─▶ segment ─ normalizer ─▶ ─ added tokens (normalised) ─▶ ─ pre_tokenizer ─▶ word ─ BPE ─▶ ids
 *
 * Each arrow hands on spans of bytes, depth first: no list of words is ever built. All that changes while encoding lives
 * in a struct tok_ctx, borrowed from the tokenizer's pool for one call.
 *
 *   ids ─ per-token steps ─▶ ─ byte runs ─▶ ─ per-token steps ─▶ ─ fuse, UTF-8 repair ─▶ ─ strips of the whole ─▶ text
 *
 * Decoding is one state machine (struct tok_dec_state), fed id by id; tok_decode and the stream both run it.
 */
#ifndef TANDEM_TOKENIZER_INTERNAL_H
#define TANDEM_TOKENIZER_INTERNAL_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "coordinator/tokenizer.h"

#define TOK_MAX_FILE_BYTES ((size_t)256 << 20)
#define TOK_MAX_TEXT_BYTES ((size_t)256 << 20) /* symbol positions are 31 bits; scratch is 20-40 times a lone word */
#define TOK_MAX_VOCAB      (1u << 22)          /* highest id + 1: tables are indexed by id */
#define TOK_MAX_STEPS      16                  /* normalizers, pre-tokenizers, decoders after flattening */
#define TOK_MAX_AFFIX      64                  /* bytes of a subword prefix or suffix */
#define TOK_MAX_NEST       8                   /* Sequence in Sequence */
#define TOK_NONE           UINT32_MAX

/* --- text (tokenizer_text.c) ----------------------------------------------------------------------------------- */

struct tok_buf {
    char *data;
    size_t len, cap;
};
STATUS_MUST_CHECK bool tok_buf_add(struct tok_buf *b, const char *s, size_t n); /* false: out of memory */
STATUS_MUST_CHECK bool tok_buf_reserve(struct tok_buf *b, size_t extra);
void tok_buf_free(struct tok_buf *b);

struct tok_ids {
    uint32_t *data;
    size_t len, cap;
};
STATUS_MUST_CHECK bool tok_ids_grow(struct tok_ids *v, size_t extra);
static inline bool tok_ids_add(struct tok_ids *v, uint32_t id)
{
    if (v->len == v->cap && !tok_ids_grow(v, 1))
        return false;
    v->data[v->len++] = id;
    return true;
}

/* An automaton over bytes: accepts exactly the well-formed UTF-8 (no surrogates, no overlong forms). */
struct tok_utf8 {
    unsigned char held[4];
    unsigned n_held; /* bytes of an unfinished character */
};
enum tok_utf8_step { TOK_UTF8_MORE, TOK_UTF8_CHAR, TOK_UTF8_BAD };
/* CHAR: held[0..n_held) was a whole character, *n is its length, state is empty again. BAD: byte fits neither. */
enum tok_utf8_step tok_utf8_feed(struct tok_utf8 *u, unsigned char byte, unsigned *n);

/* Index of the first byte that is not part of well-formed UTF-8, n when there is none. */
size_t tok_utf8_check(const char *s, size_t n);
/* Length of the character at s in well-formed text. */
static inline unsigned tok_utf8_len(unsigned char lead)
{
    return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}
uint32_t tok_utf8_get(const char *s, unsigned len);
unsigned tok_utf8_put(char *s, uint32_t c); /* returns the length, 1 to 4 */
bool tok_is_space(uint32_t c);              /* the White_Space property */

uint64_t tok_hash(const char *s, size_t n);
/* s fit for a message: escaped, cut after some 40 bytes. Returns buf. */
#define TOK_QUOTE_MAX 64
const char *tok_quote(char buf[TOK_QUOTE_MAX], const char *s, size_t n);

/* --- characters (tokenizer_unicode.c) ---------------------------------------------------------------------------- */

bool tok_nf_inert(uint32_t c);   /* no normal form of the library touches it */
bool tok_joins_left(uint32_t c); /* class 0, but may be composed with the character before */
bool tok_is_accent(uint32_t c);
uint32_t tok_lower(uint32_t c); /* U+0130 alone has two characters: not here */
/* *s with characters that PCRE2's Unicode may lack replaced by older ones of the same kind and length, in copy. *s stays
 * as it is when there are none. false: out of memory. */
STATUS_MUST_CHECK bool tok_stand_in(struct tok_buf *copy, const char **s, size_t n);

/* --- JSON (tokenizer_json.c): fields with errors that name the place -------------------------------------------- */

/* Reads and parses a file of at most TOK_MAX_FILE_BYTES that holds an object. flags: jansson's, JSON_REJECT_DUPLICATES
 * and JSON_ALLOW_NUL are set anyway. The caller owns *out. */
STATUS_MUST_CHECK enum status_code tok_json_read(json_t **out, const char *path, size_t flags, struct status *st);
const char *tok_json_kind(const json_t *v); /* "a string", "nothing" for NULL */
STATUS_MUST_CHECK enum status_code tok_json_string(const json_t *obj, const char *where, const char *key,
                                                   const char **s, size_t *n, struct status *st);
STATUS_MUST_CHECK enum status_code tok_json_bool(const json_t *obj, const char *where, const char *key, bool *out,
                                                 struct status *st);
/* As above, but missing or null leaves *out alone. */
STATUS_MUST_CHECK enum status_code tok_json_bool_opt(const json_t *obj, const char *where, const char *key, bool *out,
                                                     struct status *st);
/* An integer of 0..max. */
STATUS_MUST_CHECK enum status_code tok_json_uint(const json_t *v, const char *where, const char *key, uint32_t max,
                                                 uint32_t *out, struct status *st);
STATUS_MUST_CHECK enum status_code tok_json_array(const json_t *obj, const char *where, const char *key,
                                                  const json_t **out, struct status *st);
/* obj.pattern: {"String": s} or {"Regex": s}. */
STATUS_MUST_CHECK enum status_code tok_json_pattern(const json_t *obj, const char *where, const char **s, size_t *n,
                                                    bool *is_regex, struct status *st);
/* The type of a component that must be an object. */
STATUS_MUST_CHECK enum status_code tok_json_type(const json_t *obj, const char *where, const char **type,
                                                 struct status *st);
/* Calls fn for obj, or for each member of obj[list_key] when obj is a Sequence (nested to TOK_MAX_NEST). */
typedef enum status_code tok_component_fn(void *arg, const json_t *obj, const char *type, const char *where,
                                          struct status *st);
STATUS_MUST_CHECK enum status_code tok_json_flatten(const json_t *obj, const char *where, const char *list_key,
                                                    tok_component_fn *fn, void *arg, struct status *st);

/* --- regular expressions (tokenizer_regex.c, PCRE2) ------------------------------------------------------------- */

struct tok_regex;
struct tok_match; /* scratch of one thread */

enum tok_regex_syntax {
    TOK_REGEX_LITERAL, /* the text itself */
    TOK_REGEX_ONIG,    /* Oniguruma's (Ruby's) syntax, as tokenizer.json has it */
    TOK_REGEX_PCRE,    /* our own */
    TOK_REGEX_EXACT,   /* our own, with the very characters of the text (no stand-ins) */
};
/* UNIMPLEMENTED for a construct that means something else in PCRE2, DATA_LOSS for a pattern that is none. */
STATUS_MUST_CHECK enum status_code tok_regex_create(struct tok_regex **out, const char *pattern, size_t len,
                                                    enum tok_regex_syntax syntax, struct status *st);
void tok_regex_free(struct tok_regex *re);
struct tok_match *tok_match_create(void); /* NULL: out of memory */
void tok_match_free(struct tok_match *m);

/* All matches in s, left to right, empty ones included as in the library's iterator. */
struct tok_regex_iter {
    const struct tok_regex *re;
    const char *s;
    size_t len, pos, last_end; /* last_end: TOK_NO_MATCH before the first one */
};
#define TOK_NO_MATCH SIZE_MAX
/* What the iterator has to search in place of s: s itself or a copy with the same offsets. false: out of memory. */
STATUS_MUST_CHECK bool tok_regex_subject(const struct tok_regex *re, struct tok_buf *copy, const char **s, size_t n);
/* *found says whether there was one. INVALID_ARGUMENT when a search takes more steps than any sensible text needs. */
STATUS_MUST_CHECK enum status_code tok_regex_next(struct tok_regex_iter *it, struct tok_match *m, size_t *start,
                                                  size_t *end, bool *found, struct status *st);

/* --- vocabulary (tokenizer_vocab.c) ----------------------------------------------------------------------------- */

enum tok_id_flags {
    TOK_ID_USED = 1,     /* not a hole */
    TOK_ID_MODEL = 2,    /* in model.vocab */
    TOK_ID_ADDED = 4,    /* in added_tokens */
    TOK_ID_SPECIAL = 8,  /* an added token with "special" */
    TOK_ID_SKIP = 16,    /* left out by TOK_SKIP_SPECIAL */
    TOK_ID_RENAMED = 32, /* an added token that decodes to its normalized form */
};
struct tok_vocab {
    struct tok_buf text; /* contents, one after the other */
    uint32_t *off, *len; /* per id */
    uint8_t *flags;      /* per id */
    uint32_t size, cap;  /* highest id + 1 */
    uint32_t n_model;    /* tokens in model.vocab */
    uint32_t *slots;     /* open addressing by content: id + 1, 0 is empty */
    size_t n_slots, n_used;
};
/* DATA_LOSS when the id or the content is there already. where names the place. */
STATUS_MUST_CHECK enum status_code tok_vocab_add(struct tok_vocab *v, uint32_t id, const char *s, size_t n,
                                                 unsigned flags, const char *where, struct status *st);
uint32_t tok_vocab_find(const struct tok_vocab *v, const char *s, size_t n);       /* TOK_NONE */
uint32_t tok_vocab_find_model(const struct tok_vocab *v, const char *s, size_t n); /* model.vocab only */
static inline const char *tok_vocab_text(const struct tok_vocab *v, uint32_t id)
{
    return v->text.data + v->off[id];
}
void tok_vocab_free(struct tok_vocab *v);

/* --- BPE (tokenizer_bpe.c; loaded by tokenizer_model.c) ---------------------------------------------------------- */

struct tok_merge {
    uint64_t pair; /* left << 32 | right; TOK_NO_PAIR is empty */
    uint64_t goal; /* rank << 32 | merged id: sorts by rank */
};
#define TOK_NO_PAIR UINT64_MAX
#define TOK_NO_GOAL UINT64_MAX

struct tok_bpe {
    bool byte_level; /* words are raw bytes: the pre-tokenizer's last step was ByteLevel */
    bool byte_fallback, fuse_unk, ignore_merges;
    bool has_unk, cut_spaces; /* cut_spaces: no merge joins x with U+2581 behind it, so words end there */
    uint32_t unk_id;          /* TOK_NONE with has_unk: named, but not in the vocabulary */
    struct tok_buf prefix;    /* continuing_subword_prefix: in front of all characters of a word but the first */
    struct tok_buf suffix;    /* end_of_word_suffix: behind the last one */
    bool spelled;             /* the first symbols are looked up by their spelling, the slow way: affixes need it */
    uint32_t byte_id[256];    /* byte_level: of a byte's character; byte_fallback: of <0xNN>; else TOK_NONE. spelled: of
                                 <0xNN> always */
    uint32_t ascii_id[128];
    struct tok_merge *merges;
    size_t n_slots;      /* power of 2 */
    uint32_t *raw_slots; /* byte_level with ignore_merges: id + 1 by raw bytes */
    size_t n_raw_slots;
};
STATUS_MUST_CHECK enum status_code tok_bpe_load(struct tok_bpe *bpe, struct tok_vocab *vocab, const json_t *model,
                                                struct status *st);
/* After the pre-tokenizer is known. */
STATUS_MUST_CHECK enum status_code tok_bpe_finish(struct tok_bpe *bpe, const struct tok_vocab *vocab, bool byte_level,
                                                  struct status *st);
void tok_bpe_free(struct tok_bpe *bpe);
uint64_t tok_bpe_goal(const struct tok_bpe *bpe, uint32_t left, uint32_t right);
uint32_t tok_bpe_find_raw(const struct tokenizer *t, const char *s, size_t n);

/* The byte of one of ByteLevel's 256 characters, -1 for another one; and the character of a byte. */
int tok_byte_of_char(uint32_t c);
uint32_t tok_char_of_byte(unsigned char byte);

/* --- added tokens (tokenizer_added.c) ---------------------------------------------------------------------------- */

struct tok_added {
    const char *s; /* what the text is compared with: owned by struct tokenizer */
    size_t len;
    uint32_t id;
    bool single_word, lstrip, rstrip;
};
struct tok_added_set { /* sorted by s */
    struct tok_added *v;
    size_t n;
    bool first[256]; /* bytes that some token begins with */
};
STATUS_MUST_CHECK enum status_code tok_added_load(struct tokenizer *t, const json_t *list, struct status *st);
struct tok_added_iter {
    const char *s;
    size_t len, pos, covered;
};
/* The next added token in the text: [*start, *end) with the white space it takes along. A token of white space that the
 * one before took along comes again, or with *end <= *start not at all; the text goes on at *end in either case. */
STATUS_MUST_CHECK enum status_code tok_added_next(const struct tokenizer *t, const struct tok_added_set *set,
                                                  struct tok_added_iter *it, struct tok_match *m, size_t *start,
                                                  size_t *end, uint32_t *id, bool *found, struct status *st);

/* --- normalizer, pre_tokenizer, post_processor -------------------------------------------------------------------- */

enum tok_norm_type {
    TOK_NORM_NFC,
    TOK_NORM_NFD,
    TOK_NORM_NFKC,
    TOK_NORM_NFKD,
    TOK_NORM_LOWERCASE,
    TOK_NORM_STRIP_ACCENTS,
    TOK_NORM_NMT,
    TOK_NORM_BYTE_LEVEL,
    TOK_NORM_STRIP,
    TOK_NORM_PREPEND,
    TOK_NORM_REPLACE,
};
struct tok_norm {
    enum tok_norm_type type;
    bool left, right;       /* STRIP */
    struct tok_regex *re;   /* REPLACE; NULL when pattern is used */
    struct tok_buf pattern; /* REPLACE: a string */
    struct tok_buf text;    /* what is put in */
};
STATUS_MUST_CHECK enum status_code tok_norm_load(struct tokenizer *t, const json_t *obj, struct status *st);
/* Normalises s; the result stays in one of the two buffers, or is s itself. */
STATUS_MUST_CHECK enum status_code tok_norm_run(const struct tokenizer *t, struct tok_buf pair[2], struct tok_match *m,
                                                const char **s, size_t *n, struct status *st);
void tok_norm_free(struct tok_norm *norm);
/* tokenizer_nf.c: appends a normal form of s, form one of the first four types. false: out of memory. */
STATUS_MUST_CHECK bool tok_nf_run(enum tok_norm_type form, const char *s, size_t n, struct tok_buf *out);

enum tok_pre_type { TOK_PRE_SPLIT, TOK_PRE_LENGTH, TOK_PRE_PREFIX_SPACE, TOK_PRE_METASPACE, TOK_PRE_BYTE_CHARS };
enum tok_behavior {
    TOK_REMOVED,
    TOK_ISOLATED,
    TOK_MERGED_WITH_PREVIOUS,
    TOK_MERGED_WITH_NEXT,
    TOK_CONTIGUOUS,
};
enum tok_scheme { TOK_PREPEND_ALWAYS, TOK_PREPEND_FIRST, TOK_PREPEND_NEVER };
struct tok_pre {
    enum tok_pre_type type;
    enum tok_behavior behavior;
    enum tok_scheme scheme;
    bool invert;
    struct tok_regex *re;
    char mark[4]; /* METASPACE: stands for the space */
    unsigned mark_len;
    uint32_t length; /* LENGTH: characters of a piece */
};
STATUS_MUST_CHECK enum status_code tok_pre_load(struct tokenizer *t, const json_t *obj, struct status *st);
void tok_pre_free(struct tok_pre *pre);

STATUS_MUST_CHECK enum status_code tok_post_load(struct tokenizer *t, const json_t *obj, struct status *st);

/* --- encoding (tokenizer_encode.c, tokenizer_pre.c, tokenizer_bpe.c) ----------------------------------------------- */

struct tok_cached {     /* one cache line: a short word and its ids */
    uint32_t check;     /* high half of the hash */
    uint8_t len, n_ids; /* len 0: empty */
    char word[26];
    uint32_t ids[8];
};
#define TOK_CACHE_SLOTS 16384 /* 1 MiB a context, touched page by page */

struct tok_sym {
    uint32_t id;
    int32_t prev, next; /* -1 at the ends */
};
struct tok_cand {
    uint32_t rank, pos, goal_id;
};

struct tok_ctx {
    struct tok_ctx *next;
    struct tok_match *match;
    struct tok_cached *cache; /* NULL: none */
    struct tok_buf norm[2];
    struct tok_buf step[TOK_MAX_STEPS]; /* per pre-tokenizer that rewrites */
    struct tok_sym *syms;
    size_t cap_syms;
    struct tok_cand *heap;
    size_t n_heap, cap_heap;
    struct tok_ids ids; /* the result */
};
struct tok_pool;
STATUS_MUST_CHECK enum status_code tok_pool_create(struct tok_pool **out, struct status *st);
void tok_pool_free(struct tok_pool *pool);

/* Splits s by pre-tokenizer number step and those behind it, and appends the ids of every word. at_start: s begins at
 * the first byte of the text. */
STATUS_MUST_CHECK enum status_code tok_pre_run(const struct tokenizer *t, struct tok_ctx *ctx, size_t step,
                                               const char *s, size_t n, bool at_start, struct status *st);
STATUS_MUST_CHECK enum status_code tok_bpe_run(const struct tokenizer *t, struct tok_ctx *ctx, const char *s, size_t n,
                                               struct status *st);

/* --- decoding (tokenizer_decoder.c) --------------------------------------------------------------------------------- */

enum tok_dec_type { TOK_DEC_REPLACE, TOK_DEC_STRIP, TOK_DEC_METASPACE, TOK_DEC_BYTE_LEVEL };
struct tok_dec_step {
    enum tok_dec_type type;
    struct tok_buf pattern, text; /* REPLACE */
    char mark[4];                 /* STRIP: what goes; METASPACE: stands for the space */
    unsigned mark_len;
    uint32_t start, stop; /* STRIP: at most so many at either end */
    bool drop_first;      /* METASPACE: marks of the first token vanish */
};
struct tok_decoder {
    struct tok_dec_step steps[TOK_MAX_STEPS];
    size_t n_steps;
    size_t n_before; /* steps[0..n_before) before the byte runs, steps[n_before..n_each) behind them, token by token; */
    size_t n_each;   /* steps[n_each..n_steps) are strips of the whole text */
    bool byte_fallback, fused, lossy, join_space, first_differs;
    struct tok_buf text; /* steps[0..n_before) applied to each token */
    uint32_t *off, *len; /* per id */
    int16_t *byte;       /* per id: what <0xNN> stands for, -1 for all others */
    uint8_t *clean;      /* per id: well-formed UTF-8 by itself */
};
STATUS_MUST_CHECK enum status_code tok_decoder_load(struct tokenizer *t, const json_t *obj, struct status *st);
/* After the vocabulary is complete. */
STATUS_MUST_CHECK enum status_code tok_decoder_finish(struct tokenizer *t, struct status *st);
void tok_decoder_free(struct tok_decoder *dec);

struct tok_dec_state { /* zeroed: at the beginning */
    size_t n_tokens;
    size_t n_joined;
    struct tok_buf run; /* bytes of <0xNN> tokens that are well-formed so far: what follows decides what they become */
    struct tok_utf8 run_utf8;
    bool run_bad; /* inside a run that can no longer be well-formed: every byte is a U+FFFD */
    struct tok_utf8 utf8;
    struct {
        bool started;
        uint32_t n_cut, n_held;
    } strip[TOK_MAX_STEPS];
    struct tok_buf scratch[2];
};
STATUS_MUST_CHECK bool tok_dec_push(const struct tokenizer *t, struct tok_dec_state *s, uint32_t id, unsigned flags,
                                    struct tok_buf *out); /* false: out of memory */
/* Gives out what is held back but for an unfinished character: whatever follows, it belongs to the tokens so far. */
STATUS_MUST_CHECK bool tok_dec_settle(const struct tokenizer *t, struct tok_dec_state *s, struct tok_buf *out);
STATUS_MUST_CHECK bool tok_dec_finish(const struct tokenizer *t, struct tok_dec_state *s, struct tok_buf *out);
void tok_dec_fini(struct tok_dec_state *s);

/* --- the tokenizer itself -------------------------------------------------------------------------------------------- */

struct tokenizer {
    bool none; /* of tok_create_none */
    struct tok_vocab vocab;
    struct tok_bpe bpe;
    struct tok_norm norms[TOK_MAX_STEPS];
    size_t n_norms;
    struct tok_pre pres[TOK_MAX_STEPS];
    size_t n_pres;
    bool byte_level;               /* the last pre-tokenizer is ByteLevel */
    bool has_template;             /* prefix and suffix are set */
    struct tok_ids prefix, suffix; /* what the post-processor puts around */
    struct tok_added_set added_raw, added_normalized;
    struct tok_buf added_text;
    struct tok_regex *word_char; /* for single_word, else NULL */
    struct tok_decoder dec;
    size_t max_token_bytes; /* see tok_max_token_bytes */
    struct tok_pool *pool;  /* the only part that changes after load; has its own lock */
};

/* tokenizer_bound.c: max_token_bytes of a tokenizer that is loaded but for it. */
size_t tok_bound(const struct tokenizer *t);

/* From what tokenizer.json holds; root may go afterwards. */
STATUS_MUST_CHECK enum status_code tok_create(struct tokenizer **out, const json_t *root, struct status *st);

/* tokenizer_config.json lists the added tokens once more, by id: the two files must mean the same tokens. DATA_LOSS. */
STATUS_MUST_CHECK enum status_code tok_check_config(const struct tokenizer *t, json_t *root, struct status *st);

/* tokenizer_gguf.c: a tokenizer from the metadata of a GGUF file. */
struct gguf;
STATUS_MUST_CHECK enum status_code tok_gguf_create(struct tokenizer **out, const struct gguf *g, struct status *st);
STATUS_MUST_CHECK enum status_code tok_gguf_load(struct tokenizer **out, const char *path, struct status *st);

#endif
