/* Byte pair encoding of one word: the lowest-ranked adjacent pair is merged, the leftmost first among equals, until no
 * pair has a rank. Short words are scanned for the minimum each time; long ones use a heap over a linked list, so that a
 * lone word of n characters costs O(n log n). Both give the library's order: a merged symbol is always longer than what
 * it was made of, so a heap entry that is out of date can never pass for a current one.
 */
#include "coordinator/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>

#define SHORT_WORD 40 /* symbols; above, the heap is faster */

static enum status_code nomem(struct status *st, size_t n)
{
    return status_nomem(st, "tokenizer scratch", n);
}

static bool add_sym(struct tok_ctx *ctx, size_t *n, uint32_t id)
{
    if (*n == ctx->cap_syms) {
        size_t cap = ctx->cap_syms ? ctx->cap_syms * 2 : 256;
        struct tok_sym *syms = realloc(ctx->syms, cap * sizeof *syms);
        if (!syms)
            return false;
        ctx->syms = syms;
        ctx->cap_syms = cap;
    }
    ctx->syms[(*n)++].id = id;
    return true;
}

/* A character that model.vocab lacks becomes its bytes when all of them are there, else (part of) an unknown token.
 * An unknown token is put down when the next known character comes, after bytes in between: the library's order. */
static enum status_code unknown_char(const struct tok_bpe *bpe, struct tok_ctx *ctx, size_t *n, const char *s,
                                     unsigned len, bool *pending, struct status *st)
{
    if (bpe->byte_fallback && (!bpe->byte_level || bpe->spelled)) {
        bool all = true;
        for (unsigned k = 0; k < len; k++)
            all = all && bpe->byte_id[(unsigned char)s[k]] != TOK_NONE;
        if (all) {
            for (unsigned k = 0; k < len; k++)
                if (!add_sym(ctx, n, bpe->byte_id[(unsigned char)s[k]]))
                    return nomem(st, *n);
            return ST_OK;
        }
    }
    if (!bpe->has_unk)
        return ST_OK; /* the library drops it */
    if (bpe->unk_id == TOK_NONE)
        return status_set(st, ST_FAILED_PRECONDITION,
                          "tokenizer.json: the text needs model.unk_token, which is not in model.vocab");
    if (*pending && !bpe->fuse_unk && !add_sym(ctx, n, bpe->unk_id))
        return nomem(st, *n);
    *pending = true;
    return ST_OK;
}

/* A character of a word as the vocabulary spells it: s[0..c_len) with the affixes that its place asks for. */
static unsigned spell(const struct tok_bpe *bpe, char *out, const char *s, unsigned c_len, bool first, bool last)
{
    unsigned n = 0;
    if (!first && bpe->prefix.len) {
        memcpy(out, bpe->prefix.data, bpe->prefix.len);
        n += (unsigned)bpe->prefix.len;
    }
    if (bpe->byte_level) {
        n += tok_utf8_put(out + n, tok_char_of_byte((unsigned char)*s));
    } else {
        memcpy(out + n, s, c_len);
        n += c_len;
    }
    if (last && bpe->suffix.len) {
        memcpy(out + n, bpe->suffix.data, bpe->suffix.len);
        n += (unsigned)bpe->suffix.len;
    }
    return n;
}

static enum status_code split_chars(const struct tokenizer *t, struct tok_ctx *ctx, const char *s, size_t len,
                                    size_t *n_out, struct status *st)
{
    const struct tok_bpe *bpe = &t->bpe;
    char spelled[2 * TOK_MAX_AFFIX + 4];
    size_t n = 0;
    bool pending = false;
    for (size_t i = 0; i < len;) {
        unsigned char lead = (unsigned char)s[i];
        unsigned c_len = bpe->byte_level ? 1 : tok_utf8_len(lead);
        const char *c = s + i;
        unsigned len_c = c_len;
        uint32_t id;
        if (bpe->spelled) {
            len_c = spell(bpe, spelled, c, c_len, i == 0, i + c_len == len);
            c = spelled;
            id = tok_vocab_find_model(&t->vocab, c, len_c);
        } else {
            id = bpe->byte_level ? bpe->byte_id[lead]
                 : c_len == 1    ? bpe->ascii_id[lead]
                                 : tok_vocab_find_model(&t->vocab, c, c_len);
        }
        if (id == TOK_NONE) {
            enum status_code rc = unknown_char(bpe, ctx, &n, c, len_c, &pending, st);
            if (rc != ST_OK)
                return rc;
        } else {
            if (pending && !add_sym(ctx, &n, bpe->unk_id))
                return nomem(st, n);
            pending = false;
            if (!add_sym(ctx, &n, id))
                return nomem(st, n);
        }
        i += c_len;
    }
    if (pending && !add_sym(ctx, &n, bpe->unk_id))
        return nomem(st, n);
    *n_out = n;
    return ST_OK;
}

/* Returns how many symbols are left in syms[0..). */
static size_t merge_short(const struct tok_bpe *bpe, struct tok_sym *syms, size_t n)
{
    uint64_t goal[SHORT_WORD]; /* of the pair (i, i + 1) */
    for (size_t i = 0; i + 1 < n; i++)
        goal[i] = tok_bpe_goal(bpe, syms[i].id, syms[i + 1].id);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (goal[i] < goal[best])
                best = i;
        if (goal[best] == TOK_NO_GOAL)
            break;
        syms[best].id = (uint32_t)goal[best];
        n--;
        for (size_t i = best + 1; i < n; i++) {
            syms[i].id = syms[i + 1].id;
            goal[i - 1] = goal[i];
        }
        if (best > 0)
            goal[best - 1] = tok_bpe_goal(bpe, syms[best - 1].id, syms[best].id);
        if (best + 1 < n)
            goal[best] = tok_bpe_goal(bpe, syms[best].id, syms[best + 1].id);
    }
    return n;
}

static bool before(const struct tok_cand *a, const struct tok_cand *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->pos < b->pos;
}

static void sift_down(struct tok_cand *heap, size_t n, size_t i)
{
    struct tok_cand x = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(&heap[child + 1], &heap[child]))
            child++;
        if (!before(&heap[child], &x))
            break;
        heap[i] = heap[child];
    }
    heap[i] = x;
}

static bool heap_append(struct tok_ctx *ctx, uint64_t goal, size_t pos)
{
    if (ctx->n_heap == ctx->cap_heap) {
        size_t cap = ctx->cap_heap ? ctx->cap_heap * 2 : 256;
        struct tok_cand *heap = realloc(ctx->heap, cap * sizeof *heap);
        if (!heap)
            return false;
        ctx->heap = heap;
        ctx->cap_heap = cap;
    }
    ctx->heap[ctx->n_heap++] = (struct tok_cand){(uint32_t)(goal >> 32), (uint32_t)pos, (uint32_t)goal};
    return true;
}

static bool heap_push(const struct tok_bpe *bpe, struct tok_ctx *ctx, int32_t left, int32_t right)
{
    uint64_t goal = tok_bpe_goal(bpe, ctx->syms[left].id, ctx->syms[right].id);
    if (goal == TOK_NO_GOAL)
        return true;
    if (!heap_append(ctx, goal, (size_t)left))
        return false;
    struct tok_cand *heap = ctx->heap, x = heap[ctx->n_heap - 1];
    size_t i = ctx->n_heap - 1;
    for (; i > 0 && before(&x, &heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = x;
    return true;
}

static enum status_code merge_long(const struct tok_bpe *bpe, struct tok_ctx *ctx, size_t *n_io, struct status *st)
{
    struct tok_sym *syms = ctx->syms;
    size_t n = *n_io;
    ctx->n_heap = 0;
    for (size_t i = 0; i < n; i++) {
        syms[i].prev = (int32_t)i - 1;
        syms[i].next = i + 1 < n ? (int32_t)(i + 1) : -1;
        uint64_t goal = i + 1 < n ? tok_bpe_goal(bpe, syms[i].id, syms[i + 1].id) : TOK_NO_GOAL;
        if (goal != TOK_NO_GOAL && !heap_append(ctx, goal, i))
            return nomem(st, n);
    }
    for (size_t i = ctx->n_heap / 2; i-- > 0;)
        sift_down(ctx->heap, ctx->n_heap, i);
    while (ctx->n_heap) {
        struct tok_cand top = ctx->heap[0];
        ctx->heap[0] = ctx->heap[--ctx->n_heap];
        if (ctx->n_heap)
            sift_down(ctx->heap, ctx->n_heap, 0);
        struct tok_sym *left = &syms[top.pos];
        if (left->id == TOK_NONE || left->next < 0)
            continue; /* merged away, or the last one now */
        struct tok_sym *right = &syms[left->next];
        uint64_t goal = tok_bpe_goal(bpe, left->id, right->id);
        if (goal == TOK_NO_GOAL || (uint32_t)goal != top.goal_id)
            continue; /* out of date */
        left->id = top.goal_id;
        left->next = right->next;
        right->id = TOK_NONE;
        if (left->next >= 0)
            syms[left->next].prev = (int32_t)top.pos;
        if ((left->prev >= 0 && !heap_push(bpe, ctx, left->prev, (int32_t)top.pos)) ||
            (left->next >= 0 && !heap_push(bpe, ctx, (int32_t)top.pos, left->next)))
            return nomem(st, n);
    }
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
        if (syms[i].id != TOK_NONE)
            syms[kept++].id = syms[i].id;
    *n_io = kept;
    return ST_OK;
}

static void remember(struct tok_cached *slot, uint64_t hash, const char *s, size_t len, const uint32_t *ids, size_t n)
{
    if (n == 0 || n > sizeof slot->ids / sizeof *slot->ids)
        return;
    slot->check = (uint32_t)(hash >> 32);
    slot->len = (uint8_t)len;
    slot->n_ids = (uint8_t)n;
    memcpy(slot->word, s, len);
    memcpy(slot->ids, ids, n * sizeof *ids);
}

static enum status_code encode_word(const struct tokenizer *t, struct tok_ctx *ctx, const char *s, size_t len,
                                    struct status *st)
{
    struct tok_cached *slot = NULL;
    uint64_t hash = 0;
    if (ctx->cache && len <= sizeof slot->word) {
        hash = tok_hash(s, len);
        slot = &ctx->cache[hash % TOK_CACHE_SLOTS];
        if (slot->check == (uint32_t)(hash >> 32) && slot->len == len && memcmp(slot->word, s, len) == 0) {
            if (!tok_ids_grow(&ctx->ids, slot->n_ids))
                return nomem(st, ctx->ids.len);
            memcpy(ctx->ids.data + ctx->ids.len, slot->ids, slot->n_ids * sizeof(uint32_t));
            ctx->ids.len += slot->n_ids;
            return ST_OK;
        }
    }
    size_t first = ctx->ids.len, n = 0;
    uint32_t whole = t->bpe.ignore_merges ? tok_bpe_find_raw(t, s, len) : TOK_NONE;
    if (whole != TOK_NONE) {
        if (!tok_ids_add(&ctx->ids, whole))
            return nomem(st, ctx->ids.len);
    } else {
        enum status_code rc = split_chars(t, ctx, s, len, &n, st);
        if (rc == ST_OK && n > SHORT_WORD)
            rc = merge_long(&t->bpe, ctx, &n, st);
        else if (rc == ST_OK && n > 1)
            n = merge_short(&t->bpe, ctx->syms, n);
        if (rc != ST_OK)
            return rc;
        if (!tok_ids_grow(&ctx->ids, n))
            return nomem(st, ctx->ids.len);
        for (size_t i = 0; i < n; i++)
            ctx->ids.data[ctx->ids.len++] = ctx->syms[i].id;
    }
    if (slot &&
        ctx->ids.len > first) /* a word of nothing but unknown characters may have no ids, and no memory for them */
        remember(slot, hash, s, len, ctx->ids.data + first, ctx->ids.len - first);
    return ST_OK;
}

/* Where a sentencepiece word ends: in front of a U+2581 that follows another character; n when there is none. */
static size_t word_end(const char *s, size_t n)
{
    size_t i = 0;
    while (n - i >= 3 && memcmp(s + i, "\xE2\x96\x81", 3) == 0)
        i += 3;
    while (i < n) {
        const char *lead = memchr(s + i, 0xE2, n - i);
        if (!lead)
            return n;
        i = (size_t)(lead - s);
        if (n - i >= 3 && memcmp(lead, "\xE2\x96\x81", 3) == 0)
            return i;
        i++;
    }
    return n;
}

enum status_code tok_bpe_run(const struct tokenizer *t, struct tok_ctx *ctx, const char *s, size_t n, struct status *st)
{
    if (!t->bpe.cut_spaces)
        return encode_word(t, ctx, s, n, st);
    /* Without a pre-tokenizer the whole text is one word. Where no merge reaches across the start of "▁word", the
     * parts come out the same one by one: short, and known to the cache. */
    while (n) {
        size_t end = word_end(s, n);
        enum status_code rc = encode_word(t, ctx, s, end, st);
        if (rc != ST_OK)
            return rc;
        s += end;
        n -= end;
    }
    return ST_OK;
}
