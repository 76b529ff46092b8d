/* How much text one id can stand for at most. What may drop or shrink text on its way to the ids has no such bound. */
#include "coordinator/tokenizer_internal.h"

#define MAX_CHAR_BYTES 4

/* Bytes that no UTF-8 text holds. */
static bool in_utf8(unsigned byte)
{
    return byte < 0xC0 || (byte >= 0xC2 && byte <= 0xF4);
}

static bool all_bytes_have_ids(const struct tok_bpe *bpe)
{
    for (unsigned b = 0; b < 256; b++)
        if (in_utf8(b) && bpe->byte_id[b] == TOK_NONE)
            return false;
    return true;
}

/* How many times shorter text may become before the words are formed; 0: without a bound. Composing takes up to 9 bytes
 * to 2, compatibility and lower case 4 to 1. */
static size_t shrink(const struct tokenizer *t)
{
    size_t factor = 1;
    for (size_t i = 0; i < t->n_norms; i++) {
        const struct tok_norm *norm = &t->norms[i];
        switch (norm->type) {
        case TOK_NORM_REPLACE:
            if (norm->re || norm->pattern.len > norm->text.len)
                return 0;
            break;
        case TOK_NORM_PREPEND:
        case TOK_NORM_BYTE_LEVEL:
            break;
        case TOK_NORM_NFC:
        case TOK_NORM_NFD:
        case TOK_NORM_NFKC:
        case TOK_NORM_NFKD:
        case TOK_NORM_LOWERCASE:
            if (factor > 64)
                return 0;
            factor *= 8;
            break;
        default: /* characters go */
            return 0;
        }
    }
    for (size_t i = 0; i < t->n_pres; i++)
        if (t->pres[i].type == TOK_PRE_SPLIT && t->pres[i].behavior == TOK_REMOVED)
            return 0;
    return factor;
}

/* The longest added token; false: one takes white space around it along, as much as there is. */
static bool added_bound(const struct tok_added_set *set, size_t *max)
{
    for (size_t i = 0; i < set->n; i++) {
        if (set->v[i].lstrip || set->v[i].rstrip)
            return false;
        if (set->v[i].len > *max)
            *max = set->v[i].len;
    }
    return true;
}

/* The longest token of the model: a byte for each of ByteLevel's characters, else the bytes of its content. */
static size_t model_bound(const struct tokenizer *t)
{
    size_t max = 1;
    for (uint32_t id = 0; id < t->vocab.size; id++) {
        if (!(t->vocab.flags[id] & TOK_ID_MODEL))
            continue;
        const char *s = tok_vocab_text(&t->vocab, id);
        size_t n = t->vocab.len[id], chars = 0;
        for (size_t i = 0; t->byte_level && i < n; i++)
            chars += ((unsigned char)s[i] & 0xC0) != 0x80;
        size_t bytes = t->byte_level ? chars : n;
        if (bytes > max)
            max = bytes;
    }
    return max;
}

size_t tok_bound(const struct tokenizer *t)
{
    size_t added = 0, factor = shrink(t);
    if (factor == 0 || t->bpe.spelled || !added_bound(&t->added_raw, &added) ||
        !added_bound(&t->added_normalized, &added))
        return 0;
    size_t model = model_bound(t);
    if ((!t->byte_level && !t->bpe.byte_fallback) || !all_bytes_have_ids(&t->bpe)) {
        /* A character may be unknown: dropped, joined with others into one unknown token, or one such token each. That
         * one may be merged into longer ones, each of its bytes standing for a whole character then. */
        if (!t->bpe.has_unk || t->bpe.fuse_unk)
            return 0;
        model *= MAX_CHAR_BYTES;
    }
    return (model > added ? model : added) * factor;
}
