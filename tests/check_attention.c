/* check_attention.c - attention/attention.h: every back end of a table against softmax in double.
 *
 * Tolerance: K and V are at most 1. A score is a float sum of D products, off by some 2^-24 times S = scale * sum |q|; a
 * power is off by that, relatively, and the weighted mean of the values adds a few roundings: 2^-23 * (8 + S) in all. A
 * soft cap keeps what a score is off by, and adds 2^-22 of the score it leaves.
 *
 * TANDEM_TEST_LARGE=1: the table's large shapes too, with 48 rows of each sequence compared (minutes).
 */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "attention/attention.h"
#include "attention/attention_host_internal.h"
#include "attention/attention_internal.h"
#include "tests/attn_cases.h"
#include "tests/unsanitized.h"
#include "worker/threads.h"

enum { MAX_SEQS = 3100, MAX_ROWS = 8192, LARGE_ROWS = 48 };

static const struct attn_ops *const back_ends[] = {&attn_ops_host, &attn_ops_host_nth[1], &attn_ops_host_nth[2]};
enum { N_BACK_ENDS = sizeof back_ends / sizeof *back_ends };
static const enum attn_dtype dtypes[] = {ATTN_F32, ATTN_BF16, ATTN_F16};
static const char *const dtype_names[] = {"f32", "bf16", "f16"};

/* ---- a batch with its own memory ---- */

struct span {
    uint32_t rows, kv_len;
};

struct layout {
    uint32_t H, HK, D;
    enum attn_dtype dtype;
    uint64_t token_pad; /* bytes between tokens; head-major instead: HEAD_MAJOR */
    float sharpness;    /* of the softmax: magnitude of q */
    uint32_t window;
    float soft_cap;
};

#define HEAD_MAJOR UINT64_MAX

struct problem {
    struct attn_batch b;
    struct attn_seq seq[MAX_SEQS];
    float *k[MAX_SEQS], *v[MAX_SEQS]; /* the same values, [kv_len][HK][D] */
    void *map[MAX_SEQS];
    size_t map_bytes[MAX_SEQS];
    float *q, *out;
    double *want;    /* [rows][H][D], and what an element of a row and head may be off by; NULL until they are needed */
    double *allowed; /* [rows][H] */
    uint32_t most_rows; /* of a sequence that are compared, spread out; 0: all */
};

UNSANITIZED static float uniform(unsigned *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return (float)(*seed >> 8) * 0x1p-23f - 1;
}

/* Writes a value near f at p and returns what stands there. */
UNSANITIZED static float put(char *p, float f, enum attn_dtype dtype)
{
    if (dtype == ATTN_F32) {
        memcpy(p, &f, 4);
        return f;
    }
    uint16_t bits;
    if (dtype == ATTN_BF16) {
        uint32_t u;
        memcpy(&u, &f, 4);
        u &= 0xffff0000;
        bits = (uint16_t)(u >> 16);
        memcpy(&f, &u, 4);
    } else {
        int m = (int)lrintf(fabsf(f) * 2048); /* |f| <= 1: 11 bits are exact as a half */
        int e = 0, x = m;
        while (x && x < 1024) {
            x *= 2;
            e++;
        }
        while (x >= 2048) {
            x /= 2;
            e--;
        }
        bits = m ? (uint16_t)((14 - e) << 10 | (x & 1023)) : 0;
        bits |= (uint16_t)(f < 0 ? 0x8000 : 0);
        f = (f < 0 ? -1.0f : 1.0f) * (float)m / 2048;
    }
    memcpy(p, &bits, 2);
    return f;
}

/* KV of one sequence. Its last byte is followed by a page nobody may touch, whatever lies between elements is NaN. */
UNSANITIZED static void make_seq(struct problem *p, uint32_t i, struct span s, const struct layout *l, unsigned *seed)
{
    uint64_t elem = l->dtype == ATTN_F32 ? 4 : 2, head = l->D * elem, all = l->HK * head;
    int head_major = l->token_pad == HEAD_MAJOR;
    uint64_t gap = 3 * elem; /* between heads */
    p->b.head_stride = head_major ? s.kv_len * head + gap : head + gap;
    p->b.token_stride = head_major ? head : 2 * (all + l->HK * gap) + l->token_pad;
    uint64_t v_at = head_major ? l->HK * p->b.head_stride : all + l->HK * gap;
    uint64_t bytes = head_major ? 2 * v_at - gap : (s.kv_len - 1) * p->b.token_stride + v_at + all + (l->HK - 1) * gap;

    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    char *m = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ck_assert(m != MAP_FAILED);
    ck_assert_int_eq(mprotect(m + room, page, PROT_NONE), 0);
    p->map[i] = m;
    p->map_bytes[i] = room + page;
    char *base = m + room - bytes;
    uint64_t n = (uint64_t)s.kv_len * l->HK * l->D;
    p->k[i] = malloc(n * sizeof(float));
    p->v[i] = malloc(n * sizeof(float));
    if (l->token_pad <= 4096 || head_major)
        memset(m, 0xff, room);
    for (uint64_t t = 0, at = 0; t < s.kv_len; t++) {
        for (uint32_t h = 0; h < l->HK; h++) {
            char *to = base + t * p->b.token_stride + h * p->b.head_stride;
            memset(to + head, 0xff, h + 1 < l->HK ? gap : 0);
            for (uint32_t d = 0; d < l->D; d++, at++) {
                p->k[i][at] = put(to + d * elem, uniform(seed), l->dtype);
                p->v[i][at] = put(to + v_at + d * elem, uniform(seed), l->dtype);
            }
        }
    }
    p->seq[i] = (struct attn_seq){.k = base, .v = base + v_at, .rows = s.rows, .kv_len = s.kv_len};
}

/* Keys before the window of the sequence's first row must not be read: NaN. */
static void hide_before_window(struct problem *p, uint32_t i, const struct layout *l)
{
    const struct attn_seq *s = &p->seq[i];
    uint32_t seen = s->kv_len - s->rows + 1, hidden = l->window && l->window < seen ? seen - l->window : 0;
    for (uint32_t t = 0; t < hidden; t++) {
        for (uint32_t h = 0; h < l->HK; h++) {
            uint64_t at = t * p->b.token_stride + h * p->b.head_stride, bytes = l->D * (l->dtype == ATTN_F32 ? 4u : 2u);
            memset((char *)s->k + at, 0xff, bytes);
            memset((char *)s->v + at, 0xff, bytes);
        }
    }
}

UNSANITIZED static struct problem *make(const struct layout *l, const struct span *spans, uint32_t n, unsigned seed)
{
    struct problem *p = calloc(1, sizeof *p);
    ck_assert_uint_le(n, MAX_SEQS);
    p->b = (struct attn_batch){.seqs = n,
                               .seq = p->seq,
                               .heads = l->H,
                               .kv_heads = l->HK,
                               .head_dim = l->D,
                               .scale = 1 / sqrtf((float)l->D),
                               .soft_cap = l->soft_cap,
                               .window = l->window,
                               .kv_dtype = l->dtype};
    for (uint32_t i = 0; i < n; i++) {
        make_seq(p, i, spans[i], l, &seed);
        hide_before_window(p, i, l);
        p->seq[i].first_row = p->b.rows;
        p->b.rows += spans[i].rows;
    }
    uint64_t elems = (uint64_t)p->b.rows * l->H * l->D;
    p->q = malloc(elems * sizeof(float));
    p->out = malloc(elems * sizeof(float));
    for (uint64_t i = 0; i < elems; i++) {
        p->q[i] = uniform(&seed) * (l->sharpness > 0 ? l->sharpness : 1);
        p->out[i] = NAN;
    }
    p->b.q = p->q;
    p->b.out = p->out;
    return p;
}

static void drop(struct problem *p)
{
    for (uint32_t i = 0; i < p->b.seqs; i++) {
        munmap(p->map[i], p->map_bytes[i]);
        free(p->k[i]);
        free(p->v[i]);
    }
    free(p->q);
    free(p->out);
    free(p->want);
    free(p->allowed);
    free(p);
}

/* ---- the reference ---- */

#define NOT_COMPARED -1.0 /* allowed, of a row that is left out */

/* One query row and head against its keys, 0 .. keys - 1 or the window's; score has room for them. Returns the tolerance. */
UNSANITIZED static double reference_row(const struct problem *p, uint32_t seq, uint32_t head, uint32_t keys,
                                        const float *q, double *want, double *score)
{
    uint32_t D = p->b.head_dim, HK = p->b.kv_heads;
    uint64_t at = (uint64_t)(head / (p->b.heads / HK)) * D, step = (uint64_t)HK * D;
    uint32_t first = p->b.window && p->b.window < keys ? keys - p->b.window : 0;
    double max = -INFINITY, S = 0, sum = 0, cap = (double)p->b.soft_cap, most = 0;
    for (uint32_t d = 0; d < D; d++)
        S += fabs((double)q[d]) * (double)p->b.scale;
    for (uint32_t t = first; t < keys; t++) {
        const float *k = p->k[seq] + at + t * step;
        double dot[4] = {0};
        for (uint32_t d = 0; d < D; d += 4) {
            for (uint32_t u = 0; u < 4; u++)
                dot[u] += (double)q[d + u] * (double)k[d + u];
        }
        score[t] = (dot[0] + dot[1] + dot[2] + dot[3]) * (double)p->b.scale;
        if (cap > 0)
            score[t] = cap * tanh(score[t] / cap);
        most = fmax(most, fabs(score[t]));
        max = fmax(max, score[t]);
    }
    memset(want, 0, D * sizeof *want);
    for (uint32_t t = first; t < keys; t++) {
        const float *v = p->v[seq] + at + t * step;
        double w = exp(score[t] - max);
        sum += w;
        for (uint32_t d = 0; d < D; d++)
            want[d] += w * (double)v[d];
    }
    for (uint32_t d = 0; d < D; d++)
        want[d] /= sum;
    return 0x1p-23 * (8 + S + (cap > 0 ? 2 * most : 0));
}

static void compute_reference(struct problem *p)
{
    uint32_t H = p->b.heads, D = p->b.head_dim;
    p->want = malloc((uint64_t)p->b.rows * H * D * sizeof *p->want);
    p->allowed = malloc((uint64_t)p->b.rows * H * sizeof *p->allowed);
    for (uint32_t i = 0; i < p->b.seqs; i++) {
        const struct attn_seq *s = &p->seq[i];
        double *score = malloc(s->kv_len * sizeof *score);
        for (uint32_t r = 0; r < s->rows; r++) {
            for (uint32_t h = 0; h < H; h++) {
                uint64_t at = (uint64_t)(s->first_row + r) * H + h;
                p->allowed[at] = NOT_COMPARED;
                if (p->most_rows && s->rows > p->most_rows && r % (s->rows / p->most_rows) && r + 1 < s->rows)
                    continue;
                p->allowed[at] =
                    reference_row(p, i, h, s->kv_len - s->rows + r + 1, p->q + at * D, p->want + at * D, score);
            }
        }
        free(score);
    }
}

UNSANITIZED static void check_result(struct problem *p, const char *what)
{
    uint32_t H = p->b.heads, D = p->b.head_dim;
    if (!p->want)
        compute_reference(p);
    for (uint64_t i = 0; i < (uint64_t)p->b.rows * H * D; i++) {
        if (p->allowed[i / D] == NOT_COMPARED)
            continue;
        double err = fabs((double)p->out[i] - p->want[i]);
        if (!(err <= p->allowed[i / D])) /* an assertion of Check writes a line even when it holds */
            ck_abort_msg(
                "%s: H %u HK %u D %u %s, row %u, head %u, d %u: %.9g, expected %.9g, off by %.3g, allowed %.3g", what,
                H, p->b.kv_heads, D, dtype_names[p->b.kv_dtype], (uint32_t)(i / D / H), (uint32_t)(i / D % H),
                (uint32_t)(i % D), (double)p->out[i], p->want[i], err, p->allowed[i / D]);
    }
}

/* ---- running ---- */

static void on_pool(void *ctx, uint32_t n, void (*fn)(void *arg, uint32_t i, uint32_t worker), void *arg)
{
    threads_for(ctx, n, fn, arg);
}

struct runner {
    struct thread_pool *pool;
    struct attn *attn;
};

/* attn stays NULL when this machine cannot run the back end. */
static struct runner start(const struct attn_ops *ops, uint32_t threads)
{
    struct runner r = {0};
    struct attn_config cfg = {
        .ops = ops, .max_rows = MAX_ROWS, .max_heads = 80, .max_head_dim = 256, .max_kv_len = 1 << 20};
    if (threads) {
        ck_assert_int_eq(threads_create(&r.pool, threads, NULL), ST_OK);
        cfg.exec = (struct attn_executor){threads, on_pool, r.pool};
    }
    struct status st = STATUS_INIT;
    enum status_code rc = attn_create(&r.attn, &cfg, &st);
    ck_assert_msg(rc == ST_OK || rc == ST_UNIMPLEMENTED, "%s", st.message);
    return r;
}

static void stop(struct runner *r)
{
    attn_destroy(r->attn);
    threads_destroy(r->pool);
}

static void run_ok(struct runner *r, const struct attn_batch *b)
{
    struct status st = STATUS_INIT;
    ck_assert_msg(attn_run(r->attn, b, &st) == ST_OK, "%s", st.message);
}

/* Sanitizers see each type, shape and path, not each with each: the release build compares all of them. */
#ifdef TANDEM_SANITIZED
enum { ONE_OF_EACH = 1 };
#else
enum { ONE_OF_EACH = 0 };
#endif
/* Threads meet alike whatever the instructions: the thread sanitizer sees the usual ones with all shapes. */
#ifdef __SANITIZE_THREAD__
enum { CHECKED_BACK_ENDS = 1 };
#else
enum { CHECKED_BACK_ENDS = N_BACK_ENDS };
#endif

/* All back ends that this machine has. */
static void check_rows_of(const struct layout *l, const struct span *spans, uint32_t n, const char *what,
                          uint32_t most_rows)
{
    struct problem *p = make(l, spans, n, 42 + n + l->D);
    p->most_rows = most_rows;
    for (uint32_t i = 0; i < CHECKED_BACK_ENDS; i++) {
        struct runner r = start(back_ends[i], 2);
        if (r.attn) {
            memset(p->out, 0xff, (uint64_t)p->b.rows * l->H * l->D * sizeof *p->out);
            run_ok(&r, &p->b);
            check_result(p, what);
        }
        stop(&r);
    }
    drop(p);
}

static void check_all(const struct layout *l, const struct span *spans, uint32_t n, const char *what)
{
    check_rows_of(l, spans, n, what, 0);
}

static const struct {
    uint32_t H, HK, D;
} shapes[] = {
    {1, 1, 32},  {6, 3, 32},  {6, 6, 48},  {8, 2, 64}, {9, 3, 64}, {5, 1, 64},  {4, 4, 80},
    {12, 1, 96}, {8, 1, 128}, {2, 2, 256}, {3, 1, 8},  {5, 5, 40}, {17, 1, 72}, {33, 1, 32},
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

static const struct span prefills[] = {{5, 5}, {1, 1}, {37, 37}, {2, 2}, {110, 150}};
static const struct span decodes[] = {{1, 1},  {1, 2},   {1, 15},  {1, 16},  {1, 17},  {1, 63},  {1, 64},
                                      {1, 65}, {1, 100}, {1, 511}, {1, 512}, {1, 513}, {1, 1100}};
static const struct span hybrid[] = {{1, 40}, {1, 700}, {9, 9},   {3, 130}, {25, 90},
                                     {1, 1},  {17, 64}, {1, 257}, {50, 300}};

#define COUNT(a) ((uint32_t)(sizeof(a) / sizeof *(a)))

/* Every shape in the index-th dtype, or only each third shape, so that three indices make up all of them. */
static void conformance(uint32_t index, int third, const struct span *spans, uint32_t n, const char *what)
{
    for (uint32_t s = third ? index : 0; s < N_SHAPES; s += third ? 3 : 1) {
        struct layout l = {shapes[s].H, shapes[s].HK, shapes[s].D, dtypes[index], s * 48, s % 2 ? 8 : 1, 0, 0};
        check_all(&l, spans, n, what);
    }
}

START_TEST(prefill_matches_the_reference)
{
    conformance((uint32_t)_i, 1, prefills, COUNT(prefills), "prefill");
}
END_TEST

START_TEST(decode_matches_the_reference)
{
    conformance((uint32_t)_i, ONE_OF_EACH, decodes, COUNT(decodes), "decode");
}
END_TEST

START_TEST(hybrid_batch_matches_the_reference)
{
    conformance((uint32_t)_i, 1, hybrid, COUNT(hybrid), "hybrid");
}
END_TEST

/* The table that every back end is held to, a dtype each. */
START_TEST(table_of_shapes_matches_the_reference)
{
    const char *asked = getenv("TANDEM_TEST_LARGE");
    const int large = asked && strcmp(asked, "0") != 0;
    for (uint32_t i = (uint32_t)_i; i < ATTN_CASES; i += 4) {
        const struct attn_case *c = &attn_cases[i];
        if (c->large && !large)
            continue;
        if (ONE_OF_EACH && attn_case_work(c) > 20000000)
            continue; /* smaller ones take the same ways */
        struct span spans[MAX_SEQS];
        uint32_t n = 0;
        for (const struct attn_span *s = c->span; s->times; s++) {
            for (uint32_t k = 0; k < s->times; k++)
                spans[n++] = (struct span){s->rows, s->kv_len};
        }
        struct layout l = {c->H, c->HK, c->D, dtypes[i % 3], 0, 2, c->window, c->soft_cap};
        if (c->soft_cap > 0)
            l.sharpness = 2 * c->soft_cap; /* so that scores come near the cap, and pass it */
        check_rows_of(&l, spans, n, c->name, c->large ? LARGE_ROWS : 0);
        if (c->large) {
            printf("%s: as the reference\n", c->name);
            fflush(stdout);
        }
    }
}
END_TEST

START_TEST(every_group_size_matches_the_reference)
{
    for (uint32_t G = 1; G <= 16; G++) {
        struct layout l = {2 * G, 2, 48, dtypes[G % 3], 0, 1, 0, 0};
        static const struct span spans[] = {{1, 77}, {2, 20}, {7, 30}, {1, 3}};
        check_all(&l, spans, COUNT(spans), "group");
    }
}
END_TEST

START_TEST(wide_token_strides_and_head_major_layouts_work)
{
    static const uint64_t pads[] = {HEAD_MAJOR, 4, 65536 - 64, 65536 - 1024 * 4};
    for (size_t i = 0; i < COUNT(pads); i++) {
        struct layout l = {8, 4, 64, dtypes[_i], pads[i], 1, 0, 0};
        /* one stride serves the whole batch: head-major needs equal lengths */
        static const struct span spans[] = {{1, 130}, {20, 130}, {5, 130}};
        check_all(&l, spans, COUNT(spans), "stride");
    }
}
END_TEST

START_TEST(long_contexts_match_the_reference)
{
    static const struct span spans[] = {{1, 20000}, {30, 3000}, {1, 4097}};
    if (ONE_OF_EACH && _i)
        return;
    struct layout l = {4, 2, 64, dtypes[_i], 0, 4, 0, 0};
    check_all(&l, spans, COUNT(spans), "long");
}
END_TEST

/* More than 64 parts of 512 keys: parts grow. */
START_TEST(parts_grow_with_very_long_contexts)
{
    static const struct span spans[] = {{1, 70001}};
    struct layout l = {2, 1, 8, ATTN_F32, 0, 1, 0, 0};
    check_all(&l, spans, COUNT(spans), "very long");
}
END_TEST

/* Widths around the sizes of tiles and vectors, of which a block sees one key, all, or its part of a split. */
START_TEST(sliding_windows_match_the_reference)
{
    static const uint32_t windows[] = {1, 2, 5, 16, 17, 63, 64, 65, 200, 513, 600, 1099, 1100, 5000};
    static const struct span spans[] = {{1, 1}, {1, 40}, {1, 700}, {3, 1100}, {9, 9}, {25, 90}, {40, 1100}, {110, 150}};
    for (size_t i = 0; i < COUNT(windows); i++) {
        uint32_t G = 1 + (uint32_t)i % 4;
        struct layout l = {2 * G, 2, i % 2 ? 40 : 32, dtypes[i % 3], 0, 4, windows[i], 0};
        check_all(&l, spans, COUNT(spans), "window");
    }
}
END_TEST

/* More items and more partial results than a wave holds. */
START_TEST(large_batches_run_in_waves)
{
    enum { N = 80 };
    struct span spans[N];
    for (uint32_t i = 0; i < N; i++)
        spans[i] = (struct span){1 + (i % 16 == 3), 20 + i + (i % 10 == 0 ? 1500 : 0)};
    struct layout l = {64, 64, 8, ATTN_BF16, 0, 1, 0, 0};
    check_all(&l, spans, N, "waves");
}
END_TEST

START_TEST(scores_far_apart_do_not_overflow)
{
    static const struct span spans[] = {{1, 700}, {40, 200}, {3, 3}};
    struct layout l = {4, 2, 64, ATTN_F32, 0, 2000, 0, 0};
    check_all(&l, spans, COUNT(spans), "sharp");
}
END_TEST

/* Scores far below the cap, near it and far above, by every path: few and many rows, a window, keys cut. */
START_TEST(soft_caps_match_the_reference)
{
    static const float caps[] = {0.5f, 30, 50, 1e6f};
    static const struct span spans[] = {{1, 1}, {1, 700}, {9, 9}, {40, 450}};
#ifdef TANDEM_SANITIZED
    const size_t all = COUNT(caps);
#else
    const size_t all = COUNT(caps) * 3;
#endif
    for (size_t i = 0; i < all; i++) {
        const float sharpness[] = {0.01f, 8, 400};
        struct layout l = {4,
                           2,
                           i % 2 ? 64 : 40,
                           dtypes[i % 3],
                           0,
                           sharpness[i / COUNT(caps)],
                           i % 2 ? 300 : 0,
                           caps[i % COUNT(caps)]};
        check_all(&l, spans, COUNT(spans), "soft cap");
    }
}
END_TEST

START_TEST(sequences_may_stand_in_any_order)
{
    struct runner r = start(back_ends[_i], 2);
    struct layout l = {4, 2, 32, ATTN_F32, 0, 1, 0, 0};
    if (r.attn) {
        struct problem *p = make(&l, hybrid, COUNT(hybrid), 5);
        uint32_t at = p->b.rows;
        for (uint32_t i = 0; i < p->b.seqs; i++)
            p->seq[i].first_row = at -= p->seq[i].rows;
        run_ok(&r, &p->b);
        check_result(p, "order");
        drop(p);
    }
    stop(&r);
}
END_TEST

/* ---- the promise: neither the batch nor the threads matter ---- */

START_TEST(result_is_the_same_alone_and_in_a_batch_for_any_threads)
{
    static const struct span spans[] = {{1, 40},   {1, 2700}, {150, 300}, {1, 1},    {20, 1300},
                                        {1, 1025}, {3, 777},  {96, 900},  {1, 9000}, {1, 512}};
    static const struct {
        uint32_t H, HK, D;
    } heads[] = {{6, 3, 32}, {8, 2, 64}, {3, 3, 48}, {12, 1, 128}};
    const struct attn_ops *ops = back_ends[_i / 4];
    if (ONE_OF_EACH && _i % 4 != _i / 4)
        return;
    struct layout l = {heads[_i % 4].H, heads[_i % 4].HK, heads[_i % 4].D, dtypes[_i % 3], 0, 3, 0, 0};
    struct runner one = start(ops, 0);
    if (!one.attn)
        return;
    struct problem *p = make(&l, spans, COUNT(spans), 9);
    run_ok(&one, &p->b);
    uint64_t row = (uint64_t)l.H * l.D, elems = p->b.rows * row;
    float *want = malloc(elems * sizeof *want);
    memcpy(want, p->out, elems * sizeof *want);
#ifdef TANDEM_SANITIZED
    enum { FEWEST = 3, MOST = 3 }; /* slow */
#else
    enum { FEWEST = 2, MOST = 5 };
#endif
    for (uint32_t threads = FEWEST; threads <= MOST; threads++) {
        struct runner r = start(ops, threads);
        memset(p->out, 0xff, elems * sizeof *want);
        run_ok(&r, &p->b);
        ck_assert_msg(!memcmp(want, p->out, elems * sizeof *want), "%s: %u threads differ from none", ops->name,
                      threads);
        for (uint32_t i = 0; i < p->b.seqs; i++) {
            struct attn_seq s = p->seq[i];
            uint64_t first = s.first_row * row;
            s.first_row = 0;
            struct attn_batch b = p->b;
            b.seqs = 1;
            b.seq = &s;
            b.rows = s.rows;
            b.q = p->q + first;
            b.out = p->out + first;
            memset(p->out + first, 0xff, s.rows * row * sizeof *want);
            run_ok(&r, &b);
            ck_assert_msg(!memcmp(want + first, p->out + first, s.rows * row * sizeof *want),
                          "%s: seq %u alone, %u threads, differs from the batch", ops->name, i, threads);
        }
        stop(&r);
    }
    free(want);
    drop(p);
    stop(&one);
}
END_TEST

/* ---- limits ---- */

START_TEST(nothing_to_do_is_fine)
{
    struct runner r = start(back_ends[_i], 2);
    if (!r.attn)
        return;
    struct attn_batch b = {0};
    run_ok(&r, &b);
    /* a rank without heads: whatever the rest says */
    struct attn_seq s = {.rows = 3, .kv_len = 3};
    b = (struct attn_batch){.seqs = 1, .seq = &s, .rows = 3, .head_dim = 64};
    run_ok(&r, &b);
    b.heads = 4;
    run_ok(&r, &b);
    b.heads = 0;
    b.kv_heads = 4;
    run_ok(&r, &b);
    stop(&r);
    attn_destroy(NULL);
}
END_TEST

START_TEST(exp2_is_accurate)
{
    const struct host_kernels *list[HOST_MAX_KERNELS];
    uint32_t n = host_kernels_list(list);
    for (uint32_t i = 0; i < n; i++) {
        ck_assert_float_eq(list[i]->exp2(0), 1);
        ck_assert(isnan(list[i]->exp2(NAN)));
        double worst = 0;
        for (float x = 0; x > -126; x -= 0.000917f)
            worst = fmax(worst, fabs((double)list[i]->exp2(x) / exp2((double)x) - 1));
        ck_assert_double_lt(worst, 2e-7);
        ck_assert_double_le((double)list[i]->exp2(-1000), 0x1p-126);
        ck_assert_double_le((double)list[i]->exp2(-INFINITY), 0x1p-126);
    }
}
END_TEST

/* ---- faults: each refused, the field named, nothing written ---- */

static struct runner refuser;
static struct problem *refused;

static void refuse(const struct attn_batch *b, const char *field)
{
    struct status st = STATUS_INIT;
    ck_assert_int_eq(attn_run(refuser.attn, b, &st), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(st.code, ST_INVALID_ARGUMENT);
    ck_assert_msg(!strncmp(st.message, field, strlen(field)), "'%s' does not begin with '%s'", st.message, field);
    ck_assert_int_eq(attn_run(refuser.attn, b, NULL), ST_INVALID_ARGUMENT);
    for (uint32_t i = 0; i < refused->b.rows * refused->b.heads * refused->b.head_dim; i++)
        ck_assert(isnan(refused->out[i]));
}

static void setup_refuser(void)
{
    static const struct span spans[] = {{3, 10}, {1, 20}, {2, 2}};
    static const struct layout l = {4, 2, 32, ATTN_F32, 0, 1, 0, 0};
    refuser = (struct runner){0};
    struct attn_config cfg = {
        .ops = &attn_ops_host, .max_rows = 8, .max_heads = 8, .max_head_dim = 64, .max_kv_len = 30};
    ck_assert_int_eq(attn_create(&refuser.attn, &cfg, NULL), ST_OK);
    refused = make(&l, spans, COUNT(spans), 3);
}

static void teardown_refuser(void)
{
    stop(&refuser);
    drop(refused);
}

START_TEST(batches_over_the_maxima_are_refused)
{
    struct attn_batch b = refused->b;
    b.rows = 9;
    refuse(&b, "rows: 9");
    b = refused->b;
    b.seqs = 7;
    refuse(&b, "seqs: 7");
    b = refused->b;
    b.heads = 10;
    refuse(&b, "heads: 10");
    b = refused->b;
    b.head_dim = 72;
    refuse(&b, "head_dim: 72");
    refused->seq[1].kv_len = 31;
    refuse(&refused->b, "seq[1].kv_len: 31");
}
END_TEST

START_TEST(wrong_head_shapes_are_refused)
{
    struct attn_batch b = refused->b;
    b.head_dim = 0;
    refuse(&b, "head_dim: 0");
    b.head_dim = 36;
    refuse(&b, "head_dim: 36");
    b = refused->b;
    b.kv_heads = 3;
    refuse(&b, "heads: 4");
    b.kv_heads = 8;
    refuse(&b, "heads: 4");
    b = refused->b;
    b.scale = NAN;
    refuse(&b, "scale");
    b = refused->b;
    b.soft_cap = -1;
    refuse(&b, "soft_cap: -1");
    b.soft_cap = INFINITY;
    refuse(&b, "soft_cap: inf");
    b = refused->b;
    b.kv_dtype = (enum attn_dtype)3;
    refuse(&b, "kv_dtype: 3");
}
END_TEST

START_TEST(wrong_layouts_are_refused)
{
    struct attn_batch b = refused->b;
    b.token_stride = 31 * 4;
    refuse(&b, "token_stride: 124");
    b.token_stride = 129;
    refuse(&b, "token_stride: 129");
    b = refused->b;
    b.head_stride = 0;
    refuse(&b, "head_stride: 0");
    b.head_stride = 130;
    refuse(&b, "head_stride: 130");
    b = refused->b;
    b.q = NULL;
    refuse(&b, "q: NULL");
    b = refused->b;
    b.out = NULL;
    refuse(&b, "out: NULL");
}
END_TEST

START_TEST(wrong_sequences_are_refused)
{
    struct attn_seq good = refused->seq[1], *s = &refused->seq[1];
    s->rows = 0;
    refuse(&refused->b, "seq[1].rows: 0");
    *s = good;
    s->rows = 4;
    s->kv_len = 20;
    refuse(&refused->b, "seq[1].rows: 4");
    *s = good;
    s->first_row = UINT32_MAX;
    refuse(&refused->b, "seq[1].rows: 1");
    *s = good;
    s->kv_len = 0;
    refuse(&refused->b, "seq[1].kv_len: 0");
    *s = good;
    s->k = NULL;
    refuse(&refused->b, "seq[1].k: NULL");
    *s = good;
    s->v = (const char *)s->v + 2;
    refuse(&refused->b, "seq[1].v");
    *s = good;
    refused->seq[0].kv_len = 2;
    refuse(&refused->b, "seq[0].kv_len: 2");
}
END_TEST

START_TEST(rows_without_or_with_two_owners_are_refused)
{
    struct attn_batch b = refused->b;
    b.seqs = 2;
    refuse(&b, "rows: row 4 of 6");
    b.seqs = 0;
    refuse(&b, "rows: row 0 of 6");
    refused->seq[1].first_row = 2;
    refuse(&refused->b, "seq[1].first_row: row 2 belongs to seq[0]");
    refused->seq[1].first_row = 5;
    refuse(&refused->b, "seq[2].first_row: row 5 belongs to seq[1]");
    refused->seq[1].first_row = 0; /* as many rows as there are, but twice and not at all */
    refuse(&refused->b, "seq[1].first_row: row 0 belongs to seq[0]");
}
END_TEST

START_TEST(wrong_configs_are_refused)
{
    const struct attn_config good = {
        .ops = &attn_ops_host, .max_rows = 8, .max_heads = 8, .max_head_dim = 64, .max_kv_len = 30};
    static const char *const fields[] = {"ops",        "max_rows: 0",     "max_rows: 4294967295",
                                         "max_kv_len", "max_head_dim: 0", "max_head_dim: 264"};
    for (size_t i = 0; i < COUNT(fields); i++) {
        struct attn_config cfg = good;
        struct attn *a = NULL;
        struct status st = STATUS_INIT;
        switch (i) {
        case 0:
            cfg.ops = NULL;
            break;
        case 1:
            cfg.max_rows = 0;
            break;
        case 2:
            cfg.max_rows = UINT32_MAX;
            break;
        case 3:
            cfg.max_kv_len = 0;
            break;
        case 4:
            cfg.max_head_dim = 0;
            break;
        case 5:
            cfg.max_head_dim = 264;
            break;
        }
        ck_assert_int_eq(attn_create(&a, &cfg, &st), ST_INVALID_ARGUMENT);
        ck_assert_msg(!strncmp(st.message, fields[i], strlen(fields[i])), "'%s'", st.message);
        ck_assert_ptr_null(a);
    }
}
END_TEST

/* ---- the frame of back ends on a GPU, with one that only counts ---- */

struct counted {
    uint32_t creates, plans, runs;
    enum attn_gpu_way way; /* of the last plan */
    uint32_t ways;         /* that it says it has */
    struct attn_gpu_config cfg;
};
static struct counted counted;

static enum status_code count_query(const struct attn_gpu_config *cfg, struct status *st)
{
    ck_assert_uint_ne(cfg->kv_heads, 0); /* back ends divide by it */
    ck_assert_uint_ge(cfg->heads, cfg->kv_heads);
    return cfg->device == 7 ? status_set(st, ST_UNIMPLEMENTED, "device 7") : ST_OK;
}

static enum status_code count_create(void **state, const struct attn_gpu_config *cfg, struct status *st)
{
    if (cfg->device == 8)
        return status_set(st, ST_RESOURCE_EXHAUSTED, "device 8");
    counted.creates++;
    counted.cfg = *cfg;
    *state = &counted;
    return ST_OK;
}

static void count_destroy(void *state)
{
    if (state)
        ((struct counted *)state)->creates--;
}

static uint64_t count_bytes(const void *state)
{
    return state == &counted ? 12345 : 0;
}

static const uint32_t *count_fault(const void *state)
{
    return &((const struct counted *)state)->plans;
}

static uint32_t count_ways(const void *state)
{
    ck_assert_ptr_eq(state, &counted);
    return counted.ways;
}

/* By the number of sequences, so that a test sees that they come through. */
static enum attn_gpu_way count_choose(const void *state, const struct attn_seq *seq, uint32_t seqs)
{
    ck_assert_ptr_eq(state, &counted);
    return seqs == 2 && seq[1].kv_len == 7 ? ATTN_WAY_SERIAL : ATTN_WAY_FUSED;
}

static enum status_code count_plan(void *state, const struct attn_gpu_step *step, struct status *st)
{
    counted.way = step->way;
    (void)st;
    ((struct counted *)state)->plans++;
    return ST_OK;
}

static enum status_code count_run(void *state, const struct attn_gpu_step *step, const struct attn_gpu_io *io,
                                  struct status *st)
{
    (void)step;
    (void)io;
    (void)st;
    ((struct counted *)state)->runs++;
    return ST_OK;
}

static const struct attn_gpu_ops count_ops = {.name = "count",
                                              .query = count_query,
                                              .create = count_create,
                                              .destroy = count_destroy,
                                              .workspace_bytes = count_bytes,
                                              .fault = count_fault,
                                              .ways = count_ways,
                                              .choose = count_choose,
                                              .plan = count_plan,
                                              .run = count_run};

static const struct attn_gpu_config gpu_good = {.ops = &count_ops,
                                                .dtype = ATTN_BF16,
                                                .heads = 8,
                                                .kv_heads = 2,
                                                .head_dim = 64,
                                                .scale = 0.125f,
                                                .token_stride = 4096,
                                                .head_stride = 128,
                                                .max_seqs = 4,
                                                .max_rows = 100,
                                                .max_kv_len = 1000};

START_TEST(steps_on_a_gpu_reach_the_back_end)
{
    static const struct attn_seq seq[4];
    static const uint32_t counts;
    static uint64_t memory[2 * 8] __attribute__((aligned(16)));
    struct attn_gpu *a = NULL;
    counted = (struct counted){0};
    ck_assert_int_eq(attn_gpu_create(&a, &gpu_good, NULL), ST_OK);
    ck_assert_str_eq(attn_gpu_name(a), "count");
    ck_assert_uint_eq(attn_gpu_workspace_bytes(a), 12345);
    ck_assert_uint_eq(counted.cfg.max_kv_tokens, 4 * 1000);
    struct attn_gpu_step step = {.seq = seq, .counts = &counts, .max_seqs = 4, .max_rows = 100, .max_seq_rows = 100};
    struct attn_gpu_io io = {.q = memory, .out = memory, .q_row_stride = 2048, .out_row_stride = 1024};
    ck_assert_int_eq(attn_gpu_plan(a, &step, NULL), ST_OK);
    ck_assert_int_eq(attn_gpu_run(a, &step, &io, NULL), ST_OK);
    io.kv_offset = 256;
    ck_assert_int_eq(attn_gpu_run(a, &step, &io, NULL), ST_OK);
    step.max_seqs = step.max_rows = step.max_seq_rows = 0; /* nobody */
    ck_assert_int_eq(attn_gpu_plan(a, &step, NULL), ST_OK);
    ck_assert_int_eq(attn_gpu_run(a, &step, &io, NULL), ST_OK);
    ck_assert_uint_eq(counted.plans, 2); /* the fault is this plan's */
    ck_assert_uint_eq(counted.runs, 2);
    ck_assert_ptr_eq(attn_gpu_fault(a), &counted.plans);
    static const struct {
        uint32_t fault;
        const char *text;
    } faults[] = {{1, "seq[0] breaks"},
                  {4, "seq[3] breaks"},
                  {ATTN_FAULT_KV_TOKENS, "max_kv_tokens (4000)"},
                  {ATTN_FAULT_ROWS, "max_rows (100)"},
                  {ATTN_FAULT_SEQS, "max_seqs of the step (at most 4)"}};
    ck_assert_int_eq(attn_gpu_fault_status(a, 0, NULL), ST_OK);
    for (size_t i = 0; i < COUNT(faults); i++) {
        struct status st = STATUS_INIT;
        ck_assert_int_eq(attn_gpu_fault_status(a, faults[i].fault, &st), ST_INTERNAL);
        ck_assert_msg(strstr(st.message, faults[i].text) != NULL, "'%s' without '%s'", st.message, faults[i].text);
    }
    attn_gpu_destroy(a);
    attn_gpu_destroy(NULL);
    ck_assert_uint_eq(counted.creates, 0);
}
END_TEST

START_TEST(ways_are_chosen_by_the_back_end_under_auto)
{
    static const struct attn_seq seq[2] = {{.rows = 1, .kv_len = 3}, {.rows = 2, .kv_len = 7}};
    static const uint32_t counts;
    struct attn_gpu *a = NULL;
    counted = (struct counted){.ways = 2};
    ck_assert_int_eq(attn_gpu_create(&a, &gpu_good, NULL), ST_OK);
    ck_assert_uint_eq(attn_gpu_ways(a), 2);
    ck_assert_int_eq(attn_gpu_choose(a, seq, 1), ATTN_WAY_FUSED);
    ck_assert_int_eq(attn_gpu_choose(a, seq, 2), ATTN_WAY_APART); /* none that it has not */
    counted.ways = ATTN_GPU_WAYS;
    ck_assert_uint_eq(attn_gpu_ways(a), ATTN_GPU_WAYS);
    ck_assert_int_eq(attn_gpu_choose(a, seq, 2), ATTN_WAY_SERIAL);
    ck_assert_int_eq(attn_gpu_choose(a, seq, 1), ATTN_WAY_FUSED);
    for (int w = 0; w < ATTN_GPU_WAYS; w++) {
        const struct attn_gpu_step step = {.seq = seq,
                                           .counts = &counts,
                                           .max_seqs = 2,
                                           .max_rows = 4,
                                           .max_seq_rows = 4,
                                           .way = (enum attn_gpu_way)w};
        ck_assert_int_eq(attn_gpu_plan(a, &step, NULL), ST_OK);
        ck_assert_int_eq(counted.way, w);
    }
    attn_gpu_destroy(a);
    struct attn_gpu_ops one_way = count_ops;
    struct attn_gpu_config cfg = gpu_good;
    one_way.ways = NULL;
    cfg.ops = &one_way;
    ck_assert_int_eq(attn_gpu_create(&a, &cfg, NULL), ST_OK);
    ck_assert_uint_eq(attn_gpu_ways(a), 1);
    ck_assert_int_eq(attn_gpu_choose(a, seq, 2), ATTN_WAY_APART);
    attn_gpu_destroy(a);
    for (int fixed = 0; fixed < 2; fixed++) {
        cfg = gpu_good;
        cfg.policy = fixed ? ATTN_GPU_AUTO : ATTN_GPU_FUSED;
        cfg.fixed_split_keys = fixed ? 64 : 0;
        ck_assert_int_eq(attn_gpu_create(&a, &cfg, NULL), ST_OK);
        ck_assert_uint_eq(attn_gpu_ways(a), 1);
        ck_assert_int_eq(attn_gpu_choose(a, seq, 2), ATTN_WAY_APART);
        attn_gpu_destroy(a);
    }
    ck_assert_uint_eq(counted.creates, 0);
}
END_TEST

static void refuse_gpu_config(struct attn_gpu_config cfg, enum status_code code, const char *text)
{
    struct attn_gpu *a = NULL;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(attn_gpu_create(&a, &cfg, &st), code);
    ck_assert_msg(!strncmp(st.message, text, strlen(text)), "'%s' does not begin with '%s'", st.message, text);
    ck_assert_ptr_null(a);
    ck_assert_int_eq(attn_gpu_create(&a, &cfg, NULL), code);
    if (!cfg.ops || code == ST_RESOURCE_EXHAUSTED) /* not pick's to see */
        return;
    static const struct attn_gpu_ops *const only[] = {&count_ops, NULL};
    cfg.ops = NULL;
    st = (struct status)STATUS_INIT;
    ck_assert_int_eq(attn_gpu_pick_of(only, &cfg, &st), code);
    ck_assert_msg(!strncmp(st.message, text, strlen(text)), "pick: '%s' does not begin with '%s'", st.message, text);
    ck_assert_ptr_null(cfg.ops);
}

#define REFUSE_GPU_CONFIG(field, value, text)                                                                          \
    do {                                                                                                               \
        struct attn_gpu_config bad = gpu_good;                                                                         \
        bad.field = value;                                                                                             \
        refuse_gpu_config(bad, ST_INVALID_ARGUMENT, text);                                                             \
    } while (0)

START_TEST(wrong_gpu_configs_are_refused)
{
    REFUSE_GPU_CONFIG(ops, NULL, "ops");
    REFUSE_GPU_CONFIG(dtype, ATTN_F32, "dtype: 0");
    REFUSE_GPU_CONFIG(kv_heads, 0, "kv_heads: 0");
    REFUSE_GPU_CONFIG(kv_heads, 3, "heads: 8");
    REFUSE_GPU_CONFIG(heads, 0, "heads: 0");
    REFUSE_GPU_CONFIG(head_dim, 36, "head_dim: 36");
    REFUSE_GPU_CONFIG(head_dim, 264, "head_dim: 264");
    REFUSE_GPU_CONFIG(scale, NAN, "scale");
    REFUSE_GPU_CONFIG(soft_cap, -1, "soft_cap: -1");
    REFUSE_GPU_CONFIG(token_stride, 4104, "token_stride: 4104");
    REFUSE_GPU_CONFIG(token_stride, 112, "token_stride: 112");
    REFUSE_GPU_CONFIG(head_stride, 0, "head_stride: 0");
    REFUSE_GPU_CONFIG(head_stride, 136, "head_stride: 136");
    REFUSE_GPU_CONFIG(max_seqs, 0, "max_seqs: 0");
    REFUSE_GPU_CONFIG(max_seqs, 101, "max_rows: 100");
    REFUSE_GPU_CONFIG(max_rows, UINT32_MAX, "max_rows: 4294967295");
    REFUSE_GPU_CONFIG(max_kv_len, 0, "max_kv_len: 0");
    REFUSE_GPU_CONFIG(max_kv_len, UINT32_MAX, "max_kv_len: 4294967295");
    REFUSE_GPU_CONFIG(fixed_split_keys, 100, "fixed_split_keys: 100");
    REFUSE_GPU_CONFIG(policy, (enum attn_gpu_policy)9, "policy: 9");
    struct attn_gpu_config cfg = gpu_good;
    cfg.batch_invariant = true;
    cfg.fixed_split_keys = 64;
    refuse_gpu_config(cfg, ST_INVALID_ARGUMENT, "fixed_split_keys: 64, expected 0 with batch_invariant");
    cfg.fixed_split_keys = 0;
    cfg.window = 100;
    refuse_gpu_config(cfg, ST_UNIMPLEMENTED, "window: 100, expected 0 with batch_invariant");
    cfg = gpu_good;
    cfg.device = 7;
    refuse_gpu_config(cfg, ST_UNIMPLEMENTED, "device 7");
    cfg.device = 8;
    refuse_gpu_config(cfg, ST_RESOURCE_EXHAUSTED, "device 8");
}
END_TEST

static enum status_code cannot_query(const struct attn_gpu_config *cfg, struct status *st)
{
    (void)cfg;
    return status_set(st, ST_UNIMPLEMENTED, "cannot");
}

static enum status_code broken_query(const struct attn_gpu_config *cfg, struct status *st)
{
    (void)cfg;
    return status_set(st, ST_INTERNAL, "broken");
}

START_TEST(the_first_back_end_that_can_is_picked)
{
    static const struct attn_gpu_ops cannot = {.name = "cannot", .query = cannot_query},
                                     broken = {.name = "broken", .query = broken_query};
    const struct attn_gpu_ops *const later[] = {&cannot, &count_ops, &broken, NULL}, *const no[] = {&cannot, NULL},
                                     *const stops[] = {&cannot, &broken, &count_ops, NULL}, *const none[] = {NULL};
    struct attn_gpu_config cfg = gpu_good;
    struct status st = STATUS_INIT;
    cfg.ops = NULL;
    ck_assert_int_eq(attn_gpu_pick_of(no, &cfg, &st), ST_UNIMPLEMENTED);
    ck_assert_str_eq(st.message, "cannot");
    ck_assert_int_eq(attn_gpu_pick_of(none, &cfg, NULL), ST_UNIMPLEMENTED);
    ck_assert_int_eq(attn_gpu_pick_of(stops, &cfg, NULL), ST_INTERNAL);
    ck_assert_ptr_null(cfg.ops);
    ck_assert_int_eq(attn_gpu_pick_of(later, &cfg, NULL), ST_OK);
    ck_assert_ptr_eq(cfg.ops, &count_ops);
}
END_TEST

#define REFUSE_GPU_RUN(place, value, text)                                                                             \
    do {                                                                                                               \
        struct attn_gpu_step step = good_step;                                                                         \
        struct attn_gpu_io io = good_io;                                                                               \
        struct status st = STATUS_INIT;                                                                                \
        place = value;                                                                                                 \
        ck_assert_int_eq(attn_gpu_run(a, &step, &io, &st), ST_INVALID_ARGUMENT);                                       \
        ck_assert_msg(!strncmp(st.message, text, strlen(text)), "'%s'", st.message);                                   \
    } while (0)

START_TEST(wrong_gpu_steps_are_refused)
{
    static const struct attn_seq seq[4];
    static const uint32_t counts;
    static uint64_t memory[2 * 8] __attribute__((aligned(16)));
    struct attn_gpu *a = NULL;
    counted = (struct counted){0};
    ck_assert_int_eq(attn_gpu_create(&a, &gpu_good, NULL), ST_OK);
    const struct attn_gpu_step good_step = {
        .seq = seq, .counts = &counts, .max_seqs = 4, .max_rows = 100, .max_seq_rows = 100};
    const struct attn_gpu_io good_io = {.q = memory, .out = memory, .q_row_stride = 2048, .out_row_stride = 1024};
    REFUSE_GPU_RUN(step.seq, NULL, "seq");
    REFUSE_GPU_RUN(step.counts, NULL, "counts");
    REFUSE_GPU_RUN(step.max_seqs, 5, "max_seqs: 5");
    REFUSE_GPU_RUN(step.max_rows, 101, "max_rows: 101");
    REFUSE_GPU_RUN(step.max_rows, 3, "max_rows: 3");
    REFUSE_GPU_RUN(step.max_seq_rows, 0, "max_seq_rows: 0");
    REFUSE_GPU_RUN(step.max_seq_rows, 101, "max_seq_rows: 101");
    REFUSE_GPU_RUN(step.way, ATTN_GPU_WAYS, "way: 3, expected 0 to 2");
    REFUSE_GPU_RUN(io.q, NULL, "q:");
    REFUSE_GPU_RUN(io.out, (char *)memory + 8, "out:");
    REFUSE_GPU_RUN(io.q_row_stride, 1008, "q_row_stride: 1008");
    REFUSE_GPU_RUN(io.out_row_stride, 1032, "out_row_stride: 1032");
    REFUSE_GPU_RUN(io.kv_offset, 8, "kv_offset: 8");
    ck_assert_uint_eq(counted.runs, 0);
    attn_gpu_destroy(a);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("attention");
    TCase *core = tcase_create("core");
    tcase_add_loop_test(core, prefill_matches_the_reference, 0, 3);
    tcase_add_loop_test(core, decode_matches_the_reference, 0, 3);
    tcase_add_loop_test(core, hybrid_batch_matches_the_reference, 0, 3);
    tcase_add_loop_test(core, table_of_shapes_matches_the_reference, 0, 4);
    tcase_add_test(core, every_group_size_matches_the_reference);
    tcase_add_loop_test(core, wide_token_strides_and_head_major_layouts_work, 0, 3);
    tcase_add_loop_test(core, sequences_may_stand_in_any_order, 0, N_BACK_ENDS);
    tcase_add_loop_test(core, result_is_the_same_alone_and_in_a_batch_for_any_threads, 0, 4 * N_BACK_ENDS);
    suite_add_tcase(s, core);
    TCase *limits = tcase_create("limits");
    tcase_add_loop_test(limits, long_contexts_match_the_reference, 0, 3);
    tcase_add_test(limits, parts_grow_with_very_long_contexts);
    tcase_add_test(limits, sliding_windows_match_the_reference);
    tcase_add_test(limits, large_batches_run_in_waves);
    tcase_add_test(limits, scores_far_apart_do_not_overflow);
    tcase_add_test(limits, soft_caps_match_the_reference);
    tcase_add_loop_test(limits, nothing_to_do_is_fine, 0, N_BACK_ENDS);
    tcase_add_test(limits, exp2_is_accurate);
    tcase_add_test(core, steps_on_a_gpu_reach_the_back_end);
    tcase_add_test(core, ways_are_chosen_by_the_back_end_under_auto);
    suite_add_tcase(s, limits);
    TCase *faults = tcase_create("faults");
    tcase_add_checked_fixture(faults, setup_refuser, teardown_refuser);
    tcase_add_test(faults, batches_over_the_maxima_are_refused);
    tcase_add_test(faults, wrong_head_shapes_are_refused);
    tcase_add_test(faults, wrong_layouts_are_refused);
    tcase_add_test(faults, wrong_sequences_are_refused);
    tcase_add_test(faults, rows_without_or_with_two_owners_are_refused);
    tcase_add_test(faults, wrong_configs_are_refused);
    tcase_add_test(faults, wrong_gpu_configs_are_refused);
    tcase_add_test(faults, the_first_back_end_that_can_is_picked);
    tcase_add_test(faults, wrong_gpu_steps_are_refused);
    suite_add_tcase(s, faults);
    tcase_set_timeout(core, 120);
    tcase_set_timeout(limits, 120);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
