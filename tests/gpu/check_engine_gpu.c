/* check_engine_gpu.c - an engine on a device against the host's: the same plans, logits and greedy ids; draws against the
 * host's sampler on the device's own logits.
 *
 *     check_engine_gpu MODEL [PLUGIN [NAME]]  MODEL: tests/data/demo-model; NAME: of the random models, or "demo", this one
 *                                             alone. Ends with 77 where there is no GPU
 *     mpirun -np 2 check_engine_gpu MODEL     two ranks on two devices against two on the host
 *
 * Tolerance: the device rounds activations and KV to bf16 (2^-9), some ten times per layer, with signs that are as good as
 * random: ||device - host|| <= logits_off ||host||, 0.03. Ids may part where the host's two best logits are closer than the
 * largest difference between the two rows; from there on the texts differ.
 *
 * Environment: CHECK_LOGITS_OFF: another bound, for a model whose logits bf16 moves further (stories15M: 0.12, stories260K: 0.06,
 * by another library's own bf16 against its float32).
 */
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/gpu/engine_batches_gpu.h"
#include "tests/gpu/engine_options_gpu.h"
#include "tests/gpu/engine_ways_gpu.h"
#include "tests/gpu/gpu_parts.h"
#include "worker/engine_internal.h"

#define NEW_TOKENS 24

static double logits_off = 0.03;

static unsigned failures;

static void expect(bool ok, const char *what, const char *name, uint32_t at, double value)
{
    failures += !gpu_expect(ok, what, name, at, value);
}

struct difference {
    double relative, largest, margin; /* margin: between the two best of the host */
};

static struct difference compare(const float *host, const float *device, uint32_t n)
{
    struct difference d = {0};
    double norm = 0, off = 0, best = -INFINITY, second = -INFINITY;
    for (uint32_t i = 0; i < n; i++) {
        double h = host[i], x = (double)device[i] - h;
        norm += h * h;
        off += x * x;
        d.largest = fabs(x) > d.largest ? fabs(x) : d.largest;
        second = h > best ? best : h > second ? h : second;
        best = h > best ? h : best;
    }
    d.relative = sqrt(off / norm);
    d.margin = best - second;
    return d;
}

/* ---- parity ---- */

/* One sequence: a prompt in chunks, then greedy decodes. Returns the largest difference between two logits. */
static double parity(const char *name, struct gpu_run *host, struct gpu_run *device, uint32_t prompt, uint32_t chunk,
                     uint32_t seed)
{
    uint32_t vocab = engine_info(host->e).vocab_size, slot = seed % 3, same = 0;
    prompt = gpu_fits(host, prompt, 2 * NEW_TOKENS);
    uint32_t *ids = malloc(prompt * sizeof *ids);
    float *a = malloc(vocab * sizeof *a), *b = malloc(vocab * sizeof *b);
    double worst = 0, largest = 0;
    for (uint32_t i = 0; i < prompt; i++)
        ids[i] = (uint32_t)((seed * 7919ull + i * 104729ull + (uint64_t)i * i * 31) % vocab);
    for (uint32_t at = 0; at < prompt; at += chunk) {
        uint32_t n = prompt - at < chunk ? prompt - at : chunk;
        gpu_prefill(host, slot, ids + at, n, at, at + n == prompt, NULL);
        gpu_prefill(device, slot, ids + at, n, at, at + n == prompt, NULL);
    }
    for (;; same++) {
        uint32_t h = host->result.tokens[0], d = device->result.tokens[0];
        gpu_logits(host, a);
        gpu_logits(device, b);
        struct difference off = compare(a, b, vocab);
        worst = off.relative > worst ? off.relative : worst;
        largest = off.largest > largest ? off.largest : largest;
        expect(off.relative <= logits_off, "logits off", name, same, off.relative);
        expect(sample_argmax(b, vocab, 0).id == d, "greedy id is not the best of its logits", name, same, d);
        if (h != d)
            expect(off.margin <= 2 * off.largest, "other greedy id at a clear margin", name, same, off.margin);
        if (h != d || same == NEW_TOKENS)
            break;
        gpu_decode(host, &slot, 1);
        gpu_decode(device, &slot, 1);
    }
    gpu_say("%-28s prompt %4u in chunks of %4u: %2u ids alike, logits off by at most %.4f\n", name, prompt, chunk, same,
            worst);
    gpu_release(host, slot);
    gpu_release(device, slot);
    free(b);
    free(a);
    free(ids);
    return largest;
}

/* ---- draws ---- */

static void draws(const char *name, struct gpu_run *device)
{
    static const struct sample_params params[] = {
        {.temperature = 1},
        {.temperature = 0.7f, .top_k = 40},
        {.temperature = 1.3f, .top_p = 0.9f},
        {.temperature = 0.9f, .top_k = 50, .top_p = 0.95f},
        {.temperature = 2, .top_k = 3},
        {.temperature = 1, .top_p = 0.01f},
        {.temperature = 100, .top_p = 0.999f},
        {.temperature = 1, .min_p = 0.05f},
        {.temperature = 1.5f, .top_k = 200, .min_p = 0.01f, .top_p = 0.8f},
        {.temperature = 0.01f},
        {.temperature = 5, .top_k = 1000000},
    };
    uint32_t vocab = engine_info(device->e).vocab_size, slot = 0, others = 0, all = 0, odd = 0;
    struct sampler *sampler;
    float *logits = malloc(vocab * sizeof *logits);
    if (sampler_create(&sampler, vocab, NULL) != ST_OK)
        exit(1);
    for (uint32_t i = 0; i < sizeof params / sizeof *params; i++) {
        Tandem__V1__SampleParams p = TANDEM__V1__SAMPLE_PARAMS__INIT;
        const uint32_t ids[] = {i % vocab, 5, 7, 11, 13};
        p.temperature = params[i].temperature;
        p.top_k = params[i].top_k;
        p.top_p = params[i].top_p;
        p.min_p = params[i].min_p;
        p.seed = 0x123456789ABCDEFull * (i + 1);
        struct sample_params q = params[i];
        q.seed = p.seed;
        gpu_prefill(device, slot, ids, 5, 0, true, &p);
        for (uint32_t at = 5; at < 5 + NEW_TOKENS; at++) {
            uint32_t token, d = device->result.tokens[0];
            gpu_logits(device, logits);
            if (sampler_draw(sampler, &token, logits, &q, at, 0, NULL) != ST_OK)
                exit(1);
            expect(token == d, "drew another token than the host on the same logits", name, i, d);
            others += token != d;
            odd += d != sample_argmax(logits, vocab, 0).id;
            all++;
            gpu_decode(device, &slot, 1);
        }
        gpu_release(device, slot);
    }
    expect(odd > all / 10, "draws that are not the best token", name, 0, odd);
    gpu_say("%-28s %u of %u draws differ from the host's\n", name, others, all);
    sampler_destroy(sampler);
    free(logits);
}

/* A bias that decides. */
static void options(const char *name, struct gpu_run *device)
{
    Tandem__V1__SampleParams p = TANDEM__V1__SAMPLE_PARAMS__INIT;
    const uint32_t ids[] = {3, 5, 7};
    uint32_t slot = 1, biased = 77;
    float bias = 1e6f;
    p.bias_ids = &biased;
    p.biases = &bias;
    p.n_bias_ids = p.n_biases = 1;
    gpu_prefill(device, slot, ids, 3, 0, true, &p);
    expect(device->result.tokens[0] == 77, "logit_bias has no effect", name, 0, device->result.tokens[0]);
    gpu_decode(device, &slot, 1);
    expect(device->result.tokens[0] == 77, "logit_bias has no effect", name, 1, device->result.tokens[0]);
    gpu_release(device, slot);
}

/* ---- batch-invariant ---- */

#define INVARIANT_PROMPT 517
#define BESIDE_MAX       7

/* Logits after a prompt that comes in chunks of `chunk` rows, and after NEW_TOKENS decodes, beside `beside` other sequences, in
 * that many turns of new batches; the bits of all of them. */
static void invariant_logits(float *out, struct gpu_run *r, uint32_t chunk, uint32_t beside)
{
    const uint32_t vocab = engine_info(r->e).vocab_size, all = gpu_fits(r, INVARIANT_PROMPT, 2 * NEW_TOKENS);
    uint32_t ids[INVARIANT_PROMPT], others[BESIDE_MAX], with[BESIDE_MAX + 1];
    for (uint32_t i = 0; i < all; i++)
        ids[i] = (i * 104729 + i * i * 31) % vocab;
    for (uint32_t s = 0; s < beside; s++) {
        uint32_t prompt[64], n = 3 + 7 * s;
        for (uint32_t i = 0; i < n; i++)
            prompt[i] = (s * 131 + i * 17) % vocab;
        others[s] = with[s + 1] = s + 1;
        gpu_prefill(r, s + 1, prompt, n, 0, true, NULL);
    }
    for (uint32_t at = 0; at < all; at += chunk) {
        uint32_t n = all - at < chunk ? all - at : chunk;
        if (beside && at && at + n < all)
            gpu_hybrid(r, others, beside, 0, ids + at, n, at);
        else
            gpu_prefill(r, 0, ids + at, n, at, at + n == all, NULL);
    }
    gpu_logits(r, out);
    with[0] = 0;
    for (uint32_t i = 0; i < NEW_TOKENS; i++)
        gpu_decode(r, with, beside + 1);
    gpu_logits(r, out + vocab);
    for (uint32_t s = 0; s <= beside; s++)
        gpu_release(r, s);
}

static void invariant(const char *name, const struct engine_config *base)
{
    static const struct {
        uint32_t chunk, beside;
    } way[] = {{300, 0}, {300, 0} /* again */, {64, 0}, {1, 0}, {100, 7}, {100, 7}, {33, 3}, {259, 1}};
    struct engine_config cfg = *base;
    struct gpu_run r;
    cfg.batch_invariant = true;
    gpu_create(&r, &cfg);
    uint32_t vocab = engine_info(r.e).vocab_size, other = 0;
    size_t bytes = 2 * (size_t)vocab * sizeof(float);
    float *first = malloc(bytes), *now = malloc(bytes);
    for (uint32_t i = 0; i < sizeof way / sizeof *way; i++) {
        if (i == 4) { /* nothing hangs on what this engine has done before */
            gpu_destroy(&r);
            gpu_create(&r, &cfg);
        }
        invariant_logits(i ? now : first, &r, way[i].chunk, way[i].beside);
        bool same = i == 0 || memcmp(first, now, bytes) == 0;
        expect(same, "batch-invariant logits have other bits in chunks of", name, i, way[i].chunk);
        other += !same;
    }
    gpu_say("%-28s batch-invariant: %u of %zu ways have other bits\n", name, other, sizeof way / sizeof *way - 1);
    failures += engine_options_gpu(name, &r, "batch-invariant", true);
    free(now);
    free(first);
    gpu_destroy(&r);
}

/* ---- how prefill and decode share the device ---- */

/* Each policy, as graphs and launched one by one; AUTO is what all else here runs with. */
static void policies(const char *name, struct gpu_run *host, const struct engine_config *base)
{
    static const struct {
        const char *name;
        enum attn_gpu_policy policy;
    } all[] = {{"fused", ATTN_GPU_FUSED}, {"serial", ATTN_GPU_SERIAL}, {"streams", ATTN_GPU_STREAMS}};
    for (uint32_t i = 0; i < 2 * sizeof all / sizeof *all; i++) {
        struct engine_config cfg = *base;
        struct gpu_run r;
        char text[64];
        cfg.attention = all[i / 2].policy;
        cfg.eager = i % 2;
        gpu_create(&r, &cfg);
        snprintf(text, sizeof text, "%s, %s%s", name, all[i / 2].name, cfg.eager ? ", eager" : "");
        double close = parity(text, host, &r, 300, 100, 2 * i);
        failures += engine_batches_gpu(text, host, &r, close);
        parity(text, host, &r, 130, 300, 2 * i + 1);
        gpu_destroy(&r);
    }
}

/* ---- own products ---- */

/* Wherever own kernels can be taken: each number of rows has another of the variants of gate and up with SwiGLU. */
static void own_kernels(const char *name, struct gpu_run *host, const struct engine_config *base, const char *note)
{
    static const struct {
        uint32_t prompt, chunk;
    } text[] = {{300, 300}, {300, 300} /* again */, {517, 64}, {130, 100}, {37, 11}};
    struct engine_config cfg = *base;
    struct gpu_run r;
    unsigned glu = 0, some = 0;
    cfg.own_first = true;
    gpu_create(&r, &cfg);
    const char *at = strstr(note, " as the library suggests, ");
    if (!at || sscanf(at, " as the library suggests, %u with SwiGLU in them, %u of some rows", &glu, &some) != 2)
        expect(false, note, name, 0, 0);
    const uint32_t hidden = r.e->model.hidden, inner = r.e->shard.inner.count;
    const bool can = gpu_capability() == 90 && hidden % 64 == 0 && inner % 128 == 0; /* CUDA_GLU_DEPTH, _COLS */
    expect((glu > 0) == can, "numbers of rows by the own kernel of gate and up", name, inner, glu);
    /* q, k, v, what comes behind attention, and down: of each number of rows that graphs are made for, of which there are two at
     * least from 5 to 16 */
    expect(some >= 2 * 3 || hidden % 8 || inner % 8, "products of 5 to 16 rows by the own kernel", name, hidden, some);
    gpu_say("%-28s by own kernels: gate and up for %u numbers of rows, %u products of 5 to 16 rows\n", name, glu, some);
    double close = 0;
    for (uint32_t i = 0; i < sizeof text / sizeof *text; i++) {
        double off = parity(name, host, &r, text[i].prompt, text[i].chunk, i);
        close = off > close ? off : close;
    }
    failures += engine_batches_gpu(name, host, &r, close);
    gpu_destroy(&r);
}

/* ---- models ---- */

enum what {
    ALL,
    SHORT, /* a short text, and batch-invariant: the host would take minutes for more */
    WAYS,  /* hybrid steps by each of attention's ways, against the serial policy */
};

static const struct {
    const char *name, *config;
    enum what what;
} shapes[] = {
    {"llama",
     "\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":512,\"intermediate_size\":1368,"
     "\"num_hidden_layers\":3,\"num_attention_heads\":8,\"num_key_value_heads\":2,\"head_dim\":128,"
     "\"vocab_size\":128256,\"max_position_embeddings\":2048,\"rms_norm_eps\":1e-5,\"rope_theta\":500000.0,"
     "\"hidden_act\":\"silu\",\"tie_word_embeddings\":false,\"torch_dtype\":\"bfloat16\"",
     ALL},
    {"qwen2",
     "\"architectures\":[\"Qwen2ForCausalLM\"],\"hidden_size\":256,\"intermediate_size\":640,"
     "\"num_hidden_layers\":3,\"num_attention_heads\":7,\"num_key_value_heads\":1,\"head_dim\":64,"
     "\"vocab_size\":5003,\"max_position_embeddings\":2048,\"rms_norm_eps\":1e-6,\"rope_theta\":1000000.0,"
     "\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,\"torch_dtype\":\"bfloat16\"",
     ALL},
    {"qwen3",
     "\"architectures\":[\"Qwen3ForCausalLM\"],\"hidden_size\":320,\"intermediate_size\":768,"
     "\"num_hidden_layers\":3,\"num_attention_heads\":4,\"num_key_value_heads\":4,\"head_dim\":80,"
     "\"vocab_size\":4096,\"max_position_embeddings\":2048,\"rms_norm_eps\":1e-6,\"rope_theta\":1000000.0,"
     "\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,\"torch_dtype\":\"bfloat16\"",
     ALL},
    {"mistral",
     "\"architectures\":[\"MistralForCausalLM\"],\"hidden_size\":256,\"intermediate_size\":512,"
     "\"num_hidden_layers\":3,\"num_attention_heads\":8,\"num_key_value_heads\":4,\"head_dim\":32,"
     "\"vocab_size\":1000,\"max_position_embeddings\":2048,\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,"
     "\"sliding_window\":48,\"hidden_act\":\"silu\",\"tie_word_embeddings\":false,"
     "\"torch_dtype\":\"bfloat16\"",
     ALL},
    /* Layers with windows and without: two attentions in a step. */
    {"windows",
     "\"architectures\":[\"Qwen3ForCausalLM\"],\"hidden_size\":384,\"intermediate_size\":768,"
     "\"num_hidden_layers\":4,\"num_attention_heads\":8,\"num_key_value_heads\":2,\"head_dim\":128,"
     "\"vocab_size\":4099,\"max_position_embeddings\":2048,\"rms_norm_eps\":1e-6,\"rope_theta\":1000000.0,"
     "\"use_sliding_window\":true,\"sliding_window\":100,"
     "\"layer_types\":[\"full_attention\",\"sliding_attention\",\"full_attention\",\"sliding_attention\"],"
     "\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,\"torch_dtype\":\"bfloat16\"",
     ALL},
    {"biased",
     "\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":256,\"intermediate_size\":768,"
     "\"num_hidden_layers\":3,\"num_attention_heads\":8,\"num_key_value_heads\":4,\"head_dim\":64,"
     "\"vocab_size\":3001,\"max_position_embeddings\":2048,\"rms_norm_eps\":1e-5,\"rope_theta\":500000.0,"
     "\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
     "\"original_max_position_embeddings\":256},\"attention_bias\":true,\"mlp_bias\":true,"
     "\"hidden_act\":\"silu\",\"tie_word_embeddings\":false,\"torch_dtype\":\"bfloat16\"",
     ALL},
    {"yarn",
     "\"architectures\":[\"Qwen2ForCausalLM\"],\"hidden_size\":256,\"intermediate_size\":640,"
     "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":64,"
     "\"vocab_size\":2003,\"max_position_embeddings\":2048,\"rms_norm_eps\":1e-6,\"rope_theta\":1000000.0,"
     "\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":512},"
     "\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,\"torch_dtype\":\"bfloat16\"",
     ALL},
    /* A layer of Llama-3-8B: long sums, of which the library would rather add up parts. */
    {"wide",
     "\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":4096,\"intermediate_size\":14336,"
     "\"num_hidden_layers\":1,\"num_attention_heads\":32,\"num_key_value_heads\":8,\"head_dim\":128,"
     "\"vocab_size\":8192,\"max_position_embeddings\":2048,\"rms_norm_eps\":1e-5,\"rope_theta\":500000.0,"
     "\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,\"torch_dtype\":\"bfloat16\"",
     SHORT},
    {"ways",
     "\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":4096,\"intermediate_size\":14336,"
     "\"num_hidden_layers\":2,\"num_attention_heads\":32,\"num_key_value_heads\":8,\"head_dim\":128,"
     "\"vocab_size\":8192,\"max_position_embeddings\":16384,\"rms_norm_eps\":1e-5,\"rope_theta\":500000.0,"
     "\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,\"torch_dtype\":\"bfloat16\"",
     WAYS},
    {"ways, D 80",
     "\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":2560,\"intermediate_size\":6912,"
     "\"num_hidden_layers\":2,\"num_attention_heads\":32,\"num_key_value_heads\":8,\"head_dim\":80,"
     "\"vocab_size\":8192,\"max_position_embeddings\":16384,\"rms_norm_eps\":1e-5,\"rope_theta\":500000.0,"
     "\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,\"torch_dtype\":\"bfloat16\"",
     WAYS},
};

/* ---- measured products are kept ---- */

static char tune_dir[] = "/tmp/tandem-tune-XXXXXX";

/* What the engines say of their products: the last of it. */
static void keep_note(void *ctx, const char *text)
{
    if (strncmp(text, "products:", 9) == 0)
        snprintf(ctx, 512, "%.511s", text);
}

static void remove_tune_dir(void)
{
    DIR *d = opendir(tune_dir);
    char path[sizeof tune_dir + 300];
    for (struct dirent *f; d && (f = readdir(d)) != NULL;) {
        snprintf(path, sizeof path, "%s/%.255s", tune_dir, f->d_name);
        unlink(path);
    }
    if (d)
        closedir(d);
    rmdir(tune_dir);
}

static enum comm_gpu_way all_reduce; /* AUTO, NCCL for all, or peer memory without NCCL */

static void check_model(const char *name, const char *dir, bool random, enum what what,
                        const struct backend_parts *parts)
{
    struct engine_config cfg = {.model_dir = dir,
                                .random_weights = random ? 1 : 0,
                                .max_slots = 16,
                                .max_step_tokens = 300,
                                .kv_bytes = 64 << 20,
                                .tune_dir = tune_dir,
                                .all_reduce = all_reduce,
                                .tune_ms = 20000};
    char note[512] = "";
    struct gpu_run host, device, eager;
    if (what == WAYS) {
        if (comm_size(gpu_comm()) <= ENGINE_WAYS_RANKS && gpu_capability() == 90)
            failures += engine_ways_gpu(dir, tune_dir, parts, logits_off);
        return;
    }
    if (what == SHORT) {
        gpu_create(&host, &cfg);
        cfg.parts = parts;
        cfg.suspend_bytes = 64 << 20;
        gpu_create(&device, &cfg);
        parity(name, &host, &device, 37, 20, 1);
        parity(name, &host, &device, 130, 130, 2);
        gpu_destroy(&device);
        gpu_destroy(&host);
        if (all_reduce != COMM_GPU_NCCL)
            invariant(name, &cfg);
        return;
    }
    cfg.note = keep_note;
    cfg.note_ctx = note;
    gpu_create(&host, &cfg);
    cfg.parts = parts;
    cfg.suspend_bytes = 64 << 20;
    gpu_create(&device, &cfg);
    cfg.suspend_bytes = 0;
    cfg.eager = true;
    gpu_say("%-28s %s\n", name, note);
    gpu_create(&eager, &cfg);
    expect(strncmp(note, "products: 0 measured", 20) == 0, note, name, 0, 0); /* all were in the file */
    static const struct {
        uint32_t prompt, chunk;
    } text[] = {{1, 1}, {5, 300}, {300, 300}, {517, 64}, {5, 300} /* again */, {130, 100}};
    double close = 0;
    for (uint32_t i = 0; i < sizeof text / sizeof *text; i++) {
        double off = parity(name, &host, i % 3 == 2 ? &eager : &device, text[i].prompt, text[i].chunk, i);
        close = off > close ? off : close;
    }
    failures += engine_batches_gpu(name, &host, &device, close);
    failures += engine_batches_gpu(name, &host, &eager, close);
    failures += engine_ahead_gpu(name, &device, false);
    failures += engine_ahead_gpu(name, &device, true);
    failures += engine_moves_gpu(name, &device);
    draws(name, &device);
    options(name, &device);
    failures += engine_options_gpu(name, &device, "graphs", false);
    failures += engine_options_gpu(name, &eager, "eager", false);
    gpu_destroy(&eager);
    gpu_destroy(&device);
    cfg.eager = false;
    own_kernels(name, &host, &cfg, note);
    policies(name, &host, &cfg);
    gpu_destroy(&host);
    cfg.suspend_bytes = 64 << 20;
    if (strcmp(name, "mistral") != 0 && strcmp(name, "windows") != 0 &&
        all_reduce != COMM_GPU_NCCL) /* windows and NCCL are refused */
        invariant(name, &cfg);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL [PLUGIN [NAME] [nccl|peer]]\n",
                argv[0]); /* sums by NCCL alone, or without it */
        return 2;
    }
    const struct backend_parts *parts = gpu_parts(argc > 2 ? argv[2] : NULL);
    if (!parts)
        return GPU_SKIP;
    gpu_say("%u ranks, %s\n", comm_size(gpu_comm()), parts->text);
    if (!mkdtemp(tune_dir)) {
        perror(tune_dir);
        return 1;
    }
    const char *only = NULL, *off = getenv("CHECK_LOGITS_OFF");
    logits_off = off ? atof(off) : logits_off;
    for (int i = 3; i < argc; i++) {
        if (strcmp(argv[i], "nccl") == 0)
            all_reduce = COMM_GPU_NCCL;
        else if (strcmp(argv[i], "peer") == 0)
            all_reduce = COMM_GPU_PEER;
        else
            only = argv[i];
    }
    bool any = !only || strcmp(only, "demo") == 0;
    if (any)
        check_model("demo", argv[1], false, ALL, parts);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        if (only && strcmp(only, shapes[i].name) != 0)
            continue;
        char dir[] = "/tmp/tandem-gpu-XXXXXX", path[64];
        FILE *f = NULL;
        if (mkdtemp(dir)) {
            snprintf(path, sizeof path, "%s/config.json", dir);
            f = fopen(path, "w");
        }
        if (!f) {
            perror(dir);
            return 1;
        }
        fprintf(f, "{%s}\n", shapes[i].config);
        fclose(f);
        any = true;
        check_model(shapes[i].name, dir, true, shapes[i].what, parts);
        unlink(path);
        rmdir(dir);
    }
    remove_tune_dir();
    expect(any, "no model of that name", only, 0, 0);
    gpu_say("%s: %u failures\n", failures ? "FAILED" : "ok", failures);
    comm_destroy(gpu_comm());
    return failures != 0;
}
