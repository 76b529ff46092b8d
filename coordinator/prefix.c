#include "coordinator/prefix.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NONE        UINT32_MAX
#define FIRST_NODES 64u

struct node {
    uint64_t hash;              /* of (parent, salt, tokens) */
    uint64_t salt;              /* of all entries that pass */
    uint32_t parent;            /* NONE: the first block */
    uint32_t child, next, prev; /* first child; siblings. A free node: next */
    uint32_t chain;             /* next in the hash bucket */
    uint32_t refs;              /* entries that pass or end here */
    uint32_t ends;              /* first of the entries that end here */
};

struct entry {
    uint32_t node; /* where it ends; NONE: nothing known of it */
    uint32_t blocks;
    uint32_t end_next, end_prev; /* others that end there */
    bool parked;
    uint32_t next, prev; /* parked ones by last use */
};

struct prefix_index {
    struct prefix_config cfg;
    struct entry *entry;
    struct node *node;
    uint32_t *tokens; /* block_tokens of each node */
    uint32_t *bucket; /* capacity of them */
    uint32_t capacity, free;
    uint32_t oldest, youngest;
    uint64_t version;
    struct prefix_stats stats;
};

enum status_code prefix_create(struct prefix_index **out, const struct prefix_config *cfg, struct status *st)
{
    if (cfg->block_tokens < 1)
        return status_set(st, ST_INVALID_ARGUMENT, "block_tokens: 0, expected at least 1");
    if (cfg->max_entries < 1 || cfg->max_entries == NONE)
        return status_set(st, ST_INVALID_ARGUMENT, "max_entries: %u, expected 1 to %u", cfg->max_entries, NONE - 1);
    if (cfg->max_nodes < 1 || cfg->max_nodes > INT32_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "max_nodes: %u, expected 1 to %d", cfg->max_nodes, INT32_MAX);
    struct prefix_index *ix = calloc(1, sizeof *ix);
    if (!ix)
        return status_nomem(st, "prefix index", sizeof *ix);
    ix->cfg = *cfg;
    ix->version = cfg->first_version;
    ix->free = ix->oldest = ix->youngest = NONE;
    ix->entry = malloc((size_t)cfg->max_entries * sizeof *ix->entry);
    if (!ix->entry) {
        prefix_destroy(ix);
        return status_nomem(st, "prefix index", (size_t)cfg->max_entries * sizeof *ix->entry);
    }
    for (uint32_t i = 0; i < cfg->max_entries; i++)
        ix->entry[i] = (struct entry){.node = NONE};
    *out = ix;
    return ST_OK;
}

void prefix_destroy(struct prefix_index *ix)
{
    if (!ix)
        return;
    free(ix->entry);
    free(ix->node);
    free(ix->tokens);
    free(ix->bucket);
    free(ix);
}

/* ---- nodes ---- */

static uint64_t mix(uint64_t h, uint64_t x)
{
    h = (h ^ x) * 0x9fb21c651e98df25u;
    return h ^ (h >> 32);
}

static uint64_t hash_block(const struct prefix_index *ix, uint32_t parent, uint64_t salt, const uint32_t *tokens)
{
    uint64_t h = mix(mix(0x2545f4914f6cdd1du, parent), salt);
    for (uint32_t i = 0; i < ix->cfg.block_tokens; i++)
        h = mix(h, tokens[i]);
    return h;
}

static uint32_t *bucket_of(const struct prefix_index *ix, uint64_t hash)
{
    return &ix->bucket[hash % ix->capacity];
}

static uint32_t *tokens_of(const struct prefix_index *ix, uint32_t node)
{
    return ix->tokens + (size_t)node * ix->cfg.block_tokens;
}

static uint32_t find(const struct prefix_index *ix, uint32_t parent, uint64_t salt, const uint32_t *tokens,
                     uint64_t hash)
{
    if (ix->capacity == 0)
        return NONE;
    for (uint32_t i = *bucket_of(ix, hash); i != NONE; i = ix->node[i].chain) {
        const struct node *n = &ix->node[i];
        if (n->hash == hash && n->parent == parent && n->salt == salt &&
            memcmp(tokens_of(ix, i), tokens, ix->cfg.block_tokens * sizeof *tokens) == 0)
            return i;
    }
    return NONE;
}

/* Twice the nodes. What could be had before another allocation failed stays, unused. */
static bool more_nodes(struct prefix_index *ix)
{
    uint64_t want = ix->capacity ? 2ull * ix->capacity : FIRST_NODES;
    if (want > ix->cfg.max_nodes)
        want = ix->cfg.max_nodes;
    if (want == ix->capacity)
        return false;
    struct node *node = realloc(ix->node, want * sizeof *node);
    if (!node)
        return false;
    ix->node = node;
    uint32_t *tokens = realloc(ix->tokens, want * ix->cfg.block_tokens * sizeof *tokens);
    if (!tokens)
        return false;
    ix->tokens = tokens;
    uint32_t *bucket = malloc(want * sizeof *bucket);
    if (!bucket)
        return false;
    memset(bucket, 0xff, want * sizeof *bucket);
    for (uint32_t i = 0; i < ix->capacity; i++) { /* all are in use: more are asked for only then */
        uint32_t *b = &bucket[node[i].hash % want];
        node[i].chain = *b;
        *b = i;
    }
    free(ix->bucket);
    ix->bucket = bucket;
    for (uint32_t i = (uint32_t)want; i-- > ix->capacity;) {
        node[i] = (struct node){.next = ix->free};
        ix->free = i;
    }
    ix->capacity = (uint32_t)want;
    return true;
}

static uint32_t add_node(struct prefix_index *ix, uint32_t parent, uint64_t salt, const uint32_t *tokens, uint64_t hash)
{
    if (ix->free == NONE && !more_nodes(ix))
        return NONE;
    uint32_t i = ix->free;
    struct node *n = &ix->node[i];
    ix->free = n->next;
    uint32_t *bucket = bucket_of(ix, hash);
    *n = (struct node){.hash = hash,
                       .salt = salt,
                       .parent = parent,
                       .child = NONE,
                       .next = NONE,
                       .prev = NONE,
                       .chain = *bucket,
                       .ends = NONE};
    *bucket = i;
    if (parent != NONE) {
        struct node *p = &ix->node[parent];
        n->next = p->child;
        if (p->child != NONE)
            ix->node[p->child].prev = i;
        p->child = i;
    }
    memcpy(tokens_of(ix, i), tokens, ix->cfg.block_tokens * sizeof *tokens);
    ix->stats.nodes++;
    return i;
}

static void drop_node(struct prefix_index *ix, uint32_t i)
{
    struct node *n = &ix->node[i];
    uint32_t *at = bucket_of(ix, n->hash);
    while (*at != i)
        at = &ix->node[*at].chain;
    *at = n->chain;
    if (n->next != NONE)
        ix->node[n->next].prev = n->prev;
    if (n->prev != NONE)
        ix->node[n->prev].next = n->next;
    else if (n->parent != NONE)
        ix->node[n->parent].child = n->next;
    *n = (struct node){.next = ix->free};
    ix->free = i;
    ix->stats.nodes--;
}

/* ---- entries ---- */

static void link_end(struct prefix_index *ix, uint32_t entry)
{
    struct entry *e = &ix->entry[entry];
    struct node *n = &ix->node[e->node];
    e->end_prev = NONE;
    e->end_next = n->ends;
    if (n->ends != NONE)
        ix->entry[n->ends].end_prev = entry;
    n->ends = entry;
}

static void unlink_end(struct prefix_index *ix, uint32_t entry)
{
    struct entry *e = &ix->entry[entry];
    if (e->end_next != NONE)
        ix->entry[e->end_next].end_prev = e->end_prev;
    if (e->end_prev != NONE)
        ix->entry[e->end_prev].end_next = e->end_next;
    else
        ix->node[e->node].ends = e->end_next;
}

uint32_t prefix_extend(struct prefix_index *ix, uint32_t entry, uint64_t salt, const uint32_t *tokens, uint32_t n)
{
    assert(entry < ix->cfg.max_entries);
    struct entry *e = &ix->entry[entry];
    const uint32_t size = ix->cfg.block_tokens, blocks = n / size, before = e->blocks;
    uint32_t at = e->node, done = before;
    for (; done < blocks; done++) {
        const uint32_t *block = tokens + (size_t)done * size;
        uint64_t hash = hash_block(ix, at, salt, block);
        uint32_t next = find(ix, at, salt, block, hash);
        if (next == NONE)
            next = add_node(ix, at, salt, block, hash);
        if (next == NONE)
            break;
        ix->node[next].refs++;
        at = next;
    }
    if (done > before) {
        if (e->node != NONE)
            unlink_end(ix, entry);
        else
            ix->stats.entries++;
        e->node = at;
        e->blocks = done;
        link_end(ix, entry);
        ix->version++;
    }
    return done * size;
}

uint32_t prefix_tokens(const struct prefix_index *ix, uint32_t entry)
{
    return ix->entry[entry].blocks * ix->cfg.block_tokens;
}

uint32_t prefix_match(const struct prefix_index *ix, uint64_t salt, const uint32_t *tokens, uint32_t n, uint32_t *entry)
{
    const uint32_t size = ix->cfg.block_tokens, blocks = n / size;
    uint32_t at = NONE, done = 0;
    for (; done < blocks; done++) {
        const uint32_t *block = tokens + (size_t)done * size;
        uint32_t next = find(ix, at, salt, block, hash_block(ix, at, salt, block));
        if (next == NONE)
            break;
        at = next;
    }
    if (done == 0)
        return 0;
    while (ix->node[at].ends == NONE) /* a leaf always has one */
        at = ix->node[at].child;
    *entry = ix->node[at].ends;
    return done * size;
}

uint64_t prefix_version(const struct prefix_index *ix)
{
    return ix->version;
}

/* ---- the parked ones ---- */

static void unpark(struct prefix_index *ix, uint32_t entry)
{
    struct entry *e = &ix->entry[entry];
    *(e->prev != NONE ? &ix->entry[e->prev].next : &ix->oldest) = e->next;
    *(e->next != NONE ? &ix->entry[e->next].prev : &ix->youngest) = e->prev;
    e->parked = false;
    ix->stats.parked--;
}

bool prefix_park(struct prefix_index *ix, uint32_t entry)
{
    struct entry *e = &ix->entry[entry];
    if (e->node == NONE || e->parked)
        return e->parked;
    e->parked = true;
    e->next = NONE;
    e->prev = ix->youngest;
    *(ix->youngest != NONE ? &ix->entry[ix->youngest].next : &ix->oldest) = entry;
    ix->youngest = entry;
    ix->stats.parked++;
    return true;
}

bool prefix_parked(const struct prefix_index *ix, uint32_t entry)
{
    return ix->entry[entry].parked;
}

void prefix_hit(struct prefix_index *ix, uint32_t entry, uint32_t tokens)
{
    ix->stats.hits++;
    ix->stats.hit_tokens += tokens;
    if (ix->entry[entry].parked) {
        unpark(ix, entry);
        prefix_park(ix, entry);
    }
}

bool prefix_oldest(const struct prefix_index *ix, uint32_t except, uint32_t *entry)
{
    uint32_t i = ix->oldest;
    if (i != NONE && i == except)
        i = ix->entry[i].next;
    if (i == NONE)
        return false;
    *entry = i;
    return true;
}

void prefix_remove(struct prefix_index *ix, uint32_t entry)
{
    struct entry *e = &ix->entry[entry];
    if (e->node == NONE)
        return;
    if (e->parked) {
        unpark(ix, entry);
        ix->stats.evictions++;
    }
    unlink_end(ix, entry);
    for (uint32_t i = e->node, up; i != NONE; i = up) {
        up = ix->node[i].parent;
        if (--ix->node[i].refs == 0)
            drop_node(ix, i);
    }
    *e = (struct entry){.node = NONE};
    ix->stats.entries--;
    ix->version++;
}

struct prefix_stats prefix_stats(const struct prefix_index *ix)
{
    return ix->stats;
}

/* ---- invariants ---- */

static void require(bool ok, const char *what, uint32_t where)
{
    if (ok)
        return;
    fprintf(stderr, "prefix index invariant broken: %s (%u)\n", what, where);
    abort();
}

static void check_entries(const struct prefix_index *ix, uint32_t *refs)
{
    uint32_t entries = 0, parked = 0;
    for (uint32_t k = 0; k < ix->cfg.max_entries; k++) {
        const struct entry *e = &ix->entry[k];
        uint32_t blocks = 0;
        entries += e->node != NONE;
        parked += e->parked;
        for (uint32_t i = e->node; i != NONE; i = ix->node[i].parent, blocks++)
            refs[i]++;
        require(blocks == e->blocks, "entry: wrong depth", k);
        bool listed = e->node == NONE;
        for (uint32_t o = e->node == NONE ? NONE : ix->node[e->node].ends; o != NONE; o = ix->entry[o].end_next)
            listed |= o == k;
        require(listed && (e->node != NONE || !e->parked), "entry: not where it ends", k);
    }
    require(entries == ix->stats.entries && parked == ix->stats.parked, "entries: wrong count", entries);
    uint32_t prev = NONE;
    for (uint32_t k = ix->oldest; k != NONE; prev = k, k = ix->entry[k].next, parked--)
        require(parked > 0 && ix->entry[k].parked && ix->entry[k].prev == prev, "parked list", k);
    require(parked == 0 && ix->youngest == prev, "parked list: its end", prev);
}

void prefix_check(const struct prefix_index *ix)
{
    uint32_t *refs = calloc((size_t)ix->capacity + 1, sizeof *refs), used = 0, free_nodes = 0;
    require(refs != NULL, "out of memory", 0);
    check_entries(ix, refs);
    for (uint32_t i = 0; i < ix->capacity; i++) {
        const struct node *n = &ix->node[i];
        require(n->refs == refs[i], "node: wrong count of entries", i);
        if (n->refs == 0)
            continue;
        used++;
        require(n->ends != NONE || n->child != NONE, "node: leads nowhere", i);
        require(find(ix, n->parent, n->salt, tokens_of(ix, i), n->hash) == i, "node: not found", i);
        for (uint32_t c = n->child; c != NONE; c = ix->node[c].next)
            require(ix->node[c].parent == i && ix->node[c].salt == n->salt, "node: wrong child", c);
    }
    for (uint32_t i = ix->free; i != NONE; i = ix->node[i].next)
        free_nodes++;
    require(used == ix->stats.nodes && used + free_nodes == ix->capacity, "nodes: wrong count", used);
    require(ix->capacity <= ix->cfg.max_nodes, "nodes: more than allowed", ix->capacity);
    free(refs);
}
