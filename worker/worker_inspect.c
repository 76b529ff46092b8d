/* worker_inspect.c - `tandem-worker --inspect PATH`: what a model is and what each rank of 1 to 8 would hold, as one JSON
 * object, from the very code that loads it; or {"error":{"code","message"}}. No MPI, no device, no weights are read.
 * `tandem models inspect` shows it. */
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

#include "worker/model_weights.h"
#include "worker/worker_internal.h"

#define INSPECT_MAX_RANKS 8

/* What a store of a device is for the plan: the dtype follows from its presence, nothing else is called. */
static const struct weight_store device_store = {.ctx = NULL};

/* Weights and biases as the model's authors count them, tied ones once. */
static uint64_t count_parameters(const struct model_config *m)
{
    uint64_t hidden = m->hidden, q = (uint64_t)m->heads * m->head_dim, kv = (uint64_t)m->kv_heads * m->head_dim;
    uint64_t layer = 2 * hidden * q + 2 * hidden * kv + 3 * hidden * m->inner + 2 * hidden;
    if (m->qkv_bias)
        layer += q + 2 * kv;
    if (m->o_bias)
        layer += hidden;
    if (m->mlp_bias)
        layer += 2ull * m->inner + hidden;
    if (m->qk_norm)
        layer += 2ull * m->head_dim;
    return m->layers * layer + (m->tied ? 1 : 2) * (uint64_t)m->vocab_size * hidden + hidden;
}

static enum status_code weight_bytes(uint64_t *out, const char *path, const struct model_config *m,
                                     const struct shard *shard, const struct weight_store *store, struct status *st)
{
    struct model_loader *l = NULL;
    enum status_code rc = model_loader_open(&l, path, 0, m, shard, store, st);
    if (rc != ST_OK)
        return rc;
    *out = model_loader_bytes(l);
    model_loader_close(l);
    return ST_OK;
}

static enum status_code print_rank(FILE *f, const char *path, const struct model_config *m, uint32_t rank,
                                   uint32_t ranks, struct status *st)
{
    struct shard s = {.inner = shard_even(m->inner, rank, ranks), .vocab = shard_even(m->vocab_size, rank, ranks)};
    uint64_t host = 0, device = 0;
    shard_heads(&s.heads, &s.kv_heads, m->heads, m->kv_heads, rank, ranks);
    enum status_code rc = weight_bytes(&host, path, m, &s, NULL, st);
    if (rc == ST_OK)
        rc = weight_bytes(&device, path, m, &s, &device_store, st);
    if (rc != ST_OK)
        return rc;
    uint64_t kv = shard_kv_token_bytes(&s, m->layers, m->head_dim, 1);
    fprintf(f,
            "%s{\"heads\":%u,\"kv_heads\":%u,\"host\":{\"weight_bytes\":%" PRIu64 ",\"kv_token_bytes\":%" PRIu64
            "},\"cuda\":{\"weight_bytes\":%" PRIu64 ",\"kv_token_bytes\":%" PRIu64 "}}",
            rank ? "," : "", s.heads.count, s.kv_heads.count, host, kv * SHARD_KV_HOST_BYTES, device,
            kv * SHARD_KV_CUDA_BYTES);
    return ST_OK;
}

static enum status_code inspect(FILE *f, const char *path, struct status *st)
{
    struct model_config m;
    struct shard whole = {0};
    uint64_t bytes = 0;
    const char *weights = path;
    enum status_code rc = model_config_load(&m, path, st);
    if (rc != ST_OK)
        return rc;
    whole.heads.count = m.heads;
    whole.kv_heads.count = m.kv_heads;
    whole.inner.count = m.inner;
    whole.vocab.count = m.vocab_size;
    rc = weight_bytes(&bytes, path, &m, &whole, NULL, st);
    if (rc == ST_NOT_FOUND) /* config.json alone: as if they were BF16 */
        weights = NULL;
    else if (rc != ST_OK)
        return rc;
    fprintf(f,
            "{\"architecture\":\"%s\",\"layers\":%u,\"hidden_size\":%u,\"intermediate_size\":%u,\"query_heads\":%u,"
            "\"kv_heads\":%u,\"head_dim\":%u,\"vocab_size\":%u,\"max_context_tokens\":%u,\"window_tokens\":%u,"
            "\"tied\":%s,\"parameters\":%" PRIu64 ",\"has_weights\":%s,\"max_ranks\":%u,\"groups\":[",
            m.architecture, m.layers, m.hidden, m.inner, m.heads, m.kv_heads, m.head_dim, m.vocab_size, m.max_context,
            m.window, m.tied ? "true" : "false", count_parameters(&m), weights ? "true" : "false", SHARD_MAX_RANKS);
    rc = ST_OK;
    for (uint32_t ranks = 1; rc == ST_OK && ranks <= INSPECT_MAX_RANKS; ranks++) {
        fprintf(f, "%s{\"ranks\":[", ranks > 1 ? "," : "");
        for (uint32_t rank = 0; rc == ST_OK && rank < ranks; rank++)
            rc = print_rank(f, weights, &m, rank, ranks, st);
        fprintf(f, "]}");
    }
    fprintf(f, "]}\n");
    return rc;
}

static void print_error(const struct status *st)
{
    json_t *text = json_string(st->message);
    if (!text) { /* a path that is no UTF-8 */
        char clean[sizeof st->message];
        size_t n = 0;
        for (; st->message[n]; n++)
            clean[n] = (char)((unsigned char)st->message[n] < 0x80 ? st->message[n] : '?');
        text = json_stringn(clean, n);
    }
    json_t *o = json_pack("{s:{s:s, s:o}}", "error", "code", status_name(st->code), "message", text);
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

enum status_code worker_inspect(const char *path, struct status *st)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *f = open_memstream(&text, &bytes);
    if (!f)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "memory for the figures");
    enum status_code rc = inspect(f, path, st);
    if (fclose(f) && rc == ST_OK)
        rc = status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "memory for the figures");
    if (rc == ST_OK)
        fwrite(text, 1, bytes, stdout);
    else
        print_error(st);
    free(text);
    return rc;
}
