/* check_activity.c - kernels of the timeline without a device: records laid under steps against a plain model of bits, short names,
 * and the file that comes of it (worker_activity.c, worker_activity_name.c, worker_kernels.c, worker_trace.c). */
#include <check.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "worker/worker_activity.h"
#include "worker/worker_internal.h"

/* ---- names ---- */

START_TEST(names_keep_what_tells_kernels_apart)
{
    static const char *const table[][2] = {
        {"_ZN45_GLOBAL__N__1fc1fcac_12_cuda_rows_cu_664ef0a311norm_kernelEPNS_6bf16x4EPfPKfS4_fPK11cuda_samplej",
         "norm_kernel"},
        {"_ZN44_GLOBAL__N__7fc0aa09_11_cuda_glu_cu_81c7154610glu_kernelILj128EL14cuda_glu_share1EEEvNS_8glu_argsE",
         "glu_kernel<128,1>"},
        {"_Z11sm90_decodeI12decode_shapeILj128ELj3ELb0EEEv9sm90_args", "sm90_decode<decode_shape<128,3,0>>"},
        {"_Z12sm90_prefillI13prefill_shapeILj64ELj128ELj2ELb1ELm1152921504606846976EEEv9sm90_args",
         "sm90_prefill<prefill_shape<64,128,2,1>>"},
        {"_Z10run_kernelI9run_shapeILj128ELj2ELj64ELj4E8ptx_bf16ELb1EEv13cuda_run_args",
         "run_kernel<run_shape<128,2,64,4,ptx_bf16>,1>"},
        {"_ZN7cutlass7Kernel2I64cutlass_80_tensorop_s16816gemm_bgrada_f16_128x128_64x5_tt_align8EEvNT_6ParamsE",
         "cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bgrada_f16_128x128_64x5_tt_align8>"},
        {"_ZN8internal5gemvx6kernelIii6__halfS2_S2_"
         "fLb1ELb0ELb0ELb0ELi6ELb1E18cublasGemvParamsExIi23cublasGemvTensorBatchedIK"
         "S2_ES6_S4_IS2_EfEEENSt9enable_ifIXT5_EvE4typeET11_",
         "internal::gemvx::kernel<int,int,__half,float,1,0,0,0,6,1,cublasGemvParamsEx<int,cubla..534feb74"},
        {"_Z4keepILin3EEvv", "keep<-3>"},
        {"_ZL6hiddenPf", "hidden"},
        {"_Z4plusIXadL_Z1aELi1EEEvv", "plus"}, /* an expression is not read */
        {"nvjet_hsh_128x64_64x9_1x2_h_bz_coopB_NNT", "nvjet_hsh_128x64_64x9_1x2_h_bz_coopB_NNT"},
        {"", ""},
        {"_Z", "_Z"},
        {"_ZN", "_ZN"},
        {"_Z99short", "_Z99short"},
        {"_Z99999999999999999999a", "_Z99999999999999999999a"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        char out[ACTIVITY_NAME_MAX];
        const char *got = activity_name_short(out, table[i][0]);
        ck_assert_str_eq(got, table[i][1]);
    }
}
END_TEST

START_TEST(names_too_long_stay_apart)
{
    char a[300], b[300], x[ACTIVITY_NAME_MAX], y[ACTIVITY_NAME_MAX];
    memset(a, 'k', sizeof a);
    memset(b, 'k', sizeof b);
    a[299] = b[299] = '\0';
    b[298] = 'l';
    ck_assert_str_ne(activity_name_short(x, a), activity_name_short(y, b));
    ck_assert_uint_eq(strlen(x), ACTIVITY_NAME_MAX - 1);
}
END_TEST

/* Whatever stands in a name, reading it ends within it. The sanitizers see the rest. */
START_TEST(damaged_names_are_read_to_their_end)
{
    static const char seed[] =
        "_ZN44_GLOBAL__N__7fc0aa0910glu_kernelI1aIJLj128EEEL14cuda_glu_share1ES0_NS1_1bEEEvNS_8glu_argsE";
    srandom(11);
    for (int i = 0; i < 200000; i++) {
        size_t n = (size_t)random() % sizeof seed;
        char *name = malloc(n + 1), out[ACTIVITY_NAME_MAX]; /* no byte too many */
        memcpy(name, seed, n);
        name[n] = '\0';
        for (int k = 0; n > 2 && k < (int)(random() % 4); k++)
            name[2 + (size_t)random() % (n - 2)] = "INELSJXD_019zaPKvT\xff\x01"[random() % 20];
        ck_assert_uint_lt(strlen(activity_name_short(out, name)), ACTIVITY_NAME_MAX);
        free(name);
    }
    char deep[4096] = "_Z1k", out[ACTIVITY_NAME_MAX];
    for (size_t n = 4; n + 3 < sizeof deep; n += 3)
        memcpy(deep + n, "I1a", 4);
    ck_assert_str_eq(activity_name_short(out, deep), "k");
}
END_TEST

START_TEST(names_are_strings_of_json)
{
    char out[ACTIVITY_JSON_MAX], all[ACTIVITY_NAME_MAX], long_name[4096];
    ck_assert_str_eq(activity_name_json(out, "a\"b\\c\n\x7f\xc3\xa4"), "a\\\"b\\\\c\\u000a\\u007f??");
    memset(all, 1, sizeof all);
    all[sizeof all - 1] = '\0';
    ck_assert_uint_eq(strlen(activity_name_json(out, all)), 6 * (ACTIVITY_NAME_MAX - 1));
    memset(long_name, '"', sizeof long_name);
    long_name[sizeof long_name - 1] = '\0';
    ck_assert_uint_lt(strlen(activity_name_json(out, long_name)), ACTIVITY_JSON_MAX);
}
END_TEST

/* ---- records laid under steps ---- */

#define MODEL_US    24000
#define RECORDS_MAX 4000
#define STEPS       8

static struct activity_placed placed[RECORDS_MAX];
static char placed_name[RECORDS_MAX][ACTIVITY_NAME_MAX];
static size_t n_placed;

static void on_placed(void *ctx, const struct activity_placed *p)
{
    (void)ctx;
    ck_assert_uint_lt(n_placed, RECORDS_MAX);
    snprintf(placed_name[n_placed], ACTIVITY_NAME_MAX, "%s", p->name);
    placed[n_placed++] = *p;
}

static struct activity_book *book_create(uint32_t max_records)
{
    struct activity_book *b = NULL;
    n_placed = 0;
    ck_assert_int_eq(activity_book_create(&b, max_records, on_placed, NULL, NULL), ST_OK);
    return b;
}

static void add_on(struct activity_book *b, uint32_t stream, double begin_us, double end_us)
{
    const struct activity a = {
        .kind = ACTIVITY_COPY_IN, .stream = stream, .begin_us = begin_us, .end_us = end_us, .bytes = 8};
    activity_book_add(b, &a);
}

static void add(struct activity_book *b, enum activity_kind kind, double begin_us, double end_us, const char *name)
{
    const struct activity a = {.kind = kind, .begin_us = begin_us, .end_us = end_us, .name = name, .bytes = 8};
    activity_book_add(b, &a);
}

struct model {
    struct activity record[RECORDS_MAX];
    struct {
        int begin, end, shift; /* by the clock of the records, which is shift later */
    } step[STEPS];
    uint32_t records;
    bool kernel[MODEL_US], any[MODEL_US];
    struct activity_totals want;
};

static int below(int n)
{
    return (int)(random() % n);
}

static void model_record(struct model *m, enum activity_kind kind, int begin, int end)
{
    m->record[m->records++] =
        (struct activity){.kind = kind, .begin_us = begin, .end_us = end, .name = "k", .bytes = 1};
    for (int i = begin; i < end && i < MODEL_US; i++) {
        m->any[i] = true;
        m->kernel[i] = m->kernel[i] || kind == ACTIVITY_KERNEL;
    }
}

static void model_make(struct model *m)
{
    memset(m, 0, sizeof *m);
    int at = below(500), shift = below(200) - 100;
    for (int i = 0; i < STEPS; i++) {
        m->step[i].begin = at + 1 + below(below(3) ? 20 : 2000);
        at = m->step[i].end = m->step[i].begin + (i ? 10 : 250) + below(900);
        m->step[i].shift = shift += below(5) - 2;
        model_record(m, ACTIVITY_COPY_IN, m->step[i].begin, m->step[i].begin + 1 + below(3));
    }
    for (int n = below(RECORDS_MAX - STEPS), length = 1 + below(60); n > 0; n--) {
        static const enum activity_kind kinds[] = {ACTIVITY_KERNEL,   ACTIVITY_KERNEL, ACTIVITY_KERNEL,
                                                   ACTIVITY_COPY_OUT, ACTIVITY_COPY,   ACTIVITY_FILL};
        int begin = below(at + 100);
        model_record(m, kinds[below(6)], begin, begin + 1 + below(length));
    }
}

/* What the sums are, bit by bit. */
static void model_sums(struct model *m)
{
    struct activity_totals *w = &m->want;
    uint64_t kernels = 0;
    for (int s = 0; s < STEPS; s++) {
        uint64_t in_step = 0;
        for (uint32_t i = 0; i < m->records; i++) {
            const struct activity *a = &m->record[i];
            if (a->begin_us < m->step[s].begin || a->begin_us >= m->step[s].end)
                continue;
            in_step += a->kind == ACTIVITY_KERNEL;
            w->copies += a->kind != ACTIVITY_KERNEL;
        }
        kernels += in_step;
        if (!in_step) {
            w->bare_steps++;
            continue;
        }
        w->steps++;
        for (int i = m->step[s].begin, run = 0; i < m->step[s].end; i++) {
            w->step_us++;
            w->busy_us += m->kernel[i];
            w->gap_us += !m->kernel[i];
            w->copy_us += m->any[i] && !m->kernel[i];
            run = m->kernel[i] ? 0 : run + 1;
            w->longest_gap_us = run > w->longest_gap_us ? run : w->longest_gap_us;
        }
    }
    w->kernels = kernels;
    for (uint32_t i = 0; i < m->records; i++)
        w->outside += m->record[i].kind == ACTIVITY_KERNEL;
    w->outside -= kernels;
}

static void model_shuffle(struct model *m)
{
    for (uint32_t i = m->records - 1; i > 0; i--) {
        uint32_t j = (uint32_t)below((int)i + 1);
        struct activity a = m->record[i];
        m->record[i] = m->record[j];
        m->record[j] = a;
    }
}

static int by_begin(const void *a, const void *b)
{
    const struct activity *x = a, *y = b;
    return (x->begin_us > y->begin_us) - (x->begin_us < y->begin_us);
}

/* Steps and records are told in any order between them, records within a window of time, and settled now and then. */
static void model_tell(struct model *m, struct activity_book *b)
{
    const int window = 1 + below(64);
    int told = 0;
    qsort(m->record, m->records, sizeof *m->record, by_begin);
    for (uint32_t i = 0; i < m->records;) {
        uint32_t end = i + (uint32_t)window < m->records ? i + (uint32_t)window : m->records;
        for (uint32_t k = end; k > i; k--) /* newest first */
            activity_book_add(b, &m->record[k - 1]);
        i = end;
        for (; told < STEPS && below(3); told++)
            activity_book_step(b, (uint64_t)told + 1, m->step[told].begin - m->step[told].shift,
                               m->step[told].end - m->step[told].shift);
        if (below(2) && i < m->records)
            activity_book_settle(b, m->record[i].begin_us, -INFINITY);
    }
    for (; told < STEPS; told++)
        activity_book_step(b, (uint64_t)told + 1, m->step[told].begin - m->step[told].shift,
                           m->step[told].end - m->step[told].shift);
    activity_book_settle(b, INFINITY, INFINITY);
}

static void check_placed(const struct model *m)
{
    double lane_end[2][ACTIVITY_LANES_MAX];
    for (int i = 0; i < 2 * ACTIVITY_LANES_MAX; i++)
        lane_end[i / ACTIVITY_LANES_MAX][i % ACTIVITY_LANES_MAX] = -INFINITY;
    ck_assert_uint_eq(n_placed, m->records);
    for (size_t i = 0; i < n_placed; i++) {
        const struct activity_placed *p = &placed[i];
        ck_assert_uint_lt(p->lane, ACTIVITY_LANES_MAX);
        double *lane = &lane_end[p->kind != ACTIVITY_KERNEL][p->lane];
        if (p->in_step) {
            const int s = (int)p->step - 1, told = m->step[s].begin - m->step[s].shift;
            ck_assert(p->begin_us >= told && p->begin_us < told + m->step[s].end - m->step[s].begin);
        }
        ck_assert_msg(p->lane + 1 == ACTIVITY_LANES_MAX || p->begin_us >= *lane, "lane %u", p->lane);
        *lane = fmax(*lane, p->end_us);
    }
}

START_TEST(sums_are_those_of_a_plain_model)
{
    static struct model m;
    for (unsigned trial = 0; trial < 30; trial++) {
        unsigned seed = (unsigned)_i * 1000 + trial;
        srandom(seed);
        model_make(&m);
        model_shuffle(&m);
        model_sums(&m);
        struct activity_book *b = book_create(0);
        model_tell(&m, b);
        const struct activity_totals t = activity_book_totals(b), *w = &m.want;
        ck_assert_msg(
            t.kernels == w->kernels && t.copies == w->copies && t.outside == w->outside && t.late == 0 &&
                t.steps == w->steps && t.bare_steps == w->bare_steps,
            "seed %u: %llu kernels, %llu copies, %llu outside, %llu late, %llu steps; wanted %llu, %llu, %llu, 0, %llu",
            seed, (unsigned long long)t.kernels, (unsigned long long)t.copies, (unsigned long long)t.outside,
            (unsigned long long)t.late, (unsigned long long)t.steps, (unsigned long long)w->kernels,
            (unsigned long long)w->copies, (unsigned long long)w->outside, (unsigned long long)w->steps);
        ck_assert_msg(t.busy_us == w->busy_us && t.gap_us == w->gap_us && t.copy_us == w->copy_us &&
                          t.step_us == w->step_us && t.longest_gap_us == w->longest_gap_us,
                      "seed %u: busy %g, gap %g, copies %g, longest %g; wanted %g, %g, %g, %g", seed, t.busy_us,
                      t.gap_us, t.copy_us, t.longest_gap_us, w->busy_us, w->gap_us, w->copy_us, w->longest_gap_us);
        check_placed(&m);
        activity_book_destroy(b);
    }
}
END_TEST

START_TEST(a_step_begins_with_its_run_of_copies)
{
    struct activity_book *b = book_create(0);
    activity_book_step(b, 1, 1000, 3000);
    add(b, ACTIVITY_COPY_OUT, 970, 972, NULL);
    add(b, ACTIVITY_COPY_IN, 980, 982, NULL); /* 20 us in front of where it was told */
    add(b, ACTIVITY_COPY_IN, 990, 992, NULL);
    add(b, ACTIVITY_COPY_IN, 1001, 1003, NULL); /* nearer, but not the first */
    add(b, ACTIVITY_KERNEL, 1010, 2970, "k");
    activity_book_settle(b, INFINITY, INFINITY);
    const struct activity_totals t = activity_book_totals(b);
    ck_assert_double_eq(t.shift_us, 20);
    ck_assert_double_eq(t.busy_us, 1960);
    ck_assert_double_eq(t.longest_gap_us, 30);
    ck_assert_uint_eq(t.copies, 3);
    ck_assert_double_eq(placed[1].begin_us, 1000); /* under the step */
    activity_book_destroy(b);
}
END_TEST

/* 3 us between them, and a copy that comes 12 us sooner or later behind the event: more than that. As two H200 runs had it: the
 * records 40 us sooner than told, with what is done in a step all within it. */
START_TEST(steps_back_to_back_keep_to_their_copies)
{
    struct activity_book *b = book_create(0);
    const double early = 40;
    srandom(5);
    for (int i = 0; i < 200; i++) {
        const double told = 1000 + i * 500.0, at = told - early + 5 + (double)below(13);
        activity_book_step(b, (uint64_t)i + 1, told, told + 497);
        for (int k = 0; k < 3; k++)
            add(b, ACTIVITY_COPY_IN, at + k * 9, at + k * 9 + 3, NULL);
        add(b, ACTIVITY_KERNEL, at + 30, at + 32, "maps");
        add(b, ACTIVITY_KERNEL, at + 32, at + 60, "plan");
        add(b, ACTIVITY_KERNEL, at + 60, told - early + 475, "all else");
        add(b, ACTIVITY_COPY_OUT, told - early + 477, told - early + 480, NULL);
        add(b, ACTIVITY_COPY_OUT, told - early + 482, told - early + 485, NULL);
        if (i % 7 == 0)
            activity_book_settle(b, told - 3000, -INFINITY);
    }
    activity_book_settle(b, INFINITY, INFINITY);
    const struct activity_totals t = activity_book_totals(b);
    ck_assert_uint_eq(t.steps, 200);
    ck_assert_uint_eq(t.kernels, 600);
    ck_assert_uint_eq(t.copies, 1000);
    ck_assert_uint_eq(t.outside + t.late + t.bare_steps, 0);
    ck_assert_uint_eq(n_placed, 1600);
    ck_assert_double_le(t.shift_us, early);
    for (size_t i = 0; i < n_placed; i++) {
        ck_assert(placed[i].in_step);
        ck_assert_uint_eq(placed[i].step, i / 8 + 1);
        const size_t begin_us = 1000 + i / 8 * 500;
        ck_assert_double_ge(placed[i].begin_us, (double)begin_us);
        ck_assert_double_le(placed[i].end_us, (double)begin_us + 497);
    }
    activity_book_destroy(b);
}
END_TEST

/* A slot is resumed while a step runs, and between the next one's own copies: by another stream. */
START_TEST(copies_of_another_stream_are_of_no_step)
{
    struct activity_book *b = book_create(0);
    const double at = 5003 + (_i ? 20000 : 0); /* back to back, or later */
    activity_book_step(b, 1, 1000, 5000);
    add(b, ACTIVITY_COPY_IN, 1000, 1002, NULL);
    add(b, ACTIVITY_KERNEL, 1010, 4990, "k");
    for (int i = 0; i < 80; i++)
        add_on(b, 9, at - 700 + i * 10, at - 700 + i * 10 + 9);
    activity_book_step(b, 2, at, at + 4000);
    for (int i = 0; i < 3; i++)
        add(b, ACTIVITY_COPY_IN, at + 6 + i * 8, at + 9 + i * 8, NULL);
    add(b, ACTIVITY_KERNEL, at + 33, at + 3990, "k");
    activity_book_settle(b, INFINITY, INFINITY);
    const struct activity_totals t = activity_book_totals(b);
    ck_assert_double_le(t.shift_us, 10); /* in the next one a foreign copy may begin nearer than its own */
    ck_assert_uint_eq(t.steps, 2);
    ck_assert_uint_eq(t.kernels, 2);
    activity_book_destroy(b);
}
END_TEST

/* A slot that is resumed is copied to the device long before its step; the clocks have not moved. */
START_TEST(copies_in_a_gap_are_not_taken_for_a_step)
{
    static const double gaps_us[] = {400e3, 1e6, 20e6}, ahead_us[] = {800, 30e3, 150e3};
    struct activity_book *b = book_create(0);
    const double second = 5000 + gaps_us[_i / 3], foreign = second - ahead_us[_i % 3];
    activity_book_step(b, 1, 1000, 5000);
    add(b, ACTIVITY_COPY_IN, 1000, 1002, NULL);
    add(b, ACTIVITY_KERNEL, 1010, 4990, "k");
    add(b, ACTIVITY_COPY_IN, foreign, foreign + 100, NULL);
    add(b, ACTIVITY_COPY_IN, foreign + 110, foreign + 200, NULL);
    activity_book_step(b, 2, second, second + 4000);
    add(b, ACTIVITY_COPY_IN, second + 3, second + 5, NULL);
    add(b, ACTIVITY_COPY_IN, second + 8, second + 9, NULL);
    add(b, ACTIVITY_KERNEL, second + 30, second + 3990, "k");
    activity_book_settle(b, INFINITY, INFINITY);
    const struct activity_totals t = activity_book_totals(b);
    ck_assert_uint_eq(t.steps, 2);
    ck_assert_uint_eq(t.kernels, 2);
    ck_assert_uint_eq(t.copies, 3);
    ck_assert_uint_eq(t.outside, 0);
    ck_assert_double_le(t.shift_us, 3);
    activity_book_destroy(b);
}
END_TEST

/* Nobody served for ten minutes, and the clocks have drifted apart by 30 ms: more than a step takes. */
START_TEST(clocks_that_drift_apart_while_idle_are_joined_again)
{
    struct activity_book *b = book_create(0);
    double told = 0, drift = 0;
    for (int i = 0; i < 40; i++) {
        told += i == 20 ? 600e6 : 2010;
        drift += i == 20 ? (_i - 1) * 30000.0 : 0;
        add(b, ACTIVITY_COPY_IN, told + drift, told + drift + 2, NULL);
        add(b, ACTIVITY_KERNEL, told + drift + 3, told + drift + 1990, "k");
        activity_book_step(b, (uint64_t)i + 1, told, told + 2000);
        if (i % 3 == 0)
            activity_book_settle(b, told + drift - 1e5, -INFINITY);
    }
    activity_book_settle(b, INFINITY, INFINITY);
    const struct activity_totals t = activity_book_totals(b);
    ck_assert_uint_eq(t.steps, 40);
    ck_assert_uint_eq(t.kernels, 40);
    ck_assert_uint_eq(t.outside + t.late, 0);
    ck_assert_double_eq_tol(t.shift_us, _i == 1 ? 0 : 30000, 1e-3);
    ck_assert_double_eq_tol(t.gap_us, 40 * 13, 1e-3);
    activity_book_destroy(b);
}
END_TEST

START_TEST(kernels_with_most_time_come_first)
{
    struct activity_book *b = book_create(0);
    struct activity_top top[3];
    char name[32];
    activity_book_step(b, 7, 0, 1e6);
    for (int i = 0; i < 20; i++)
        for (int k = 0; k <= i % 7; k++) {
            snprintf(name, sizeof name, "_Z%dkernel_%dv", i < 10 ? 8 : 9, i);
            add(b, ACTIVITY_KERNEL, i * 1000 + k * 10, i * 1000 + k * 10 + i, name);
        }
    add(b, ACTIVITY_KERNEL, 2e6, 3e6, "after the step");
    activity_book_settle(b, INFINITY, INFINITY);
    ck_assert_uint_eq(activity_book_top(b, top, 3), 3);
    ck_assert_str_eq(top[0].name, "kernel_19");
    ck_assert_uint_eq(top[0].count, 6);
    ck_assert_double_eq(top[0].us, 6 * 19);
    ck_assert_str_eq(top[1].name, "kernel_13"); /* 7 of 13 us */
    ck_assert_str_eq(top[2].name, "kernel_18"); /* 5 of 18 us */
    activity_book_destroy(b);
}
END_TEST

START_TEST(names_that_shorten_alike_get_a_number)
{
    struct activity_book *b = book_create(0);
    struct activity_top top[4];
    activity_book_step(b, 1, 0, 100);
    add(b, ACTIVITY_KERNEL, 1, 31, "_ZN11_GLOBAL__N14planE1a");
    add(b, ACTIVITY_KERNEL, 40, 60, "_ZN11_GLOBAL__N24planE1b");
    add(b, ACTIVITY_KERNEL, 70, 80, "plan");
    add(b, ACTIVITY_KERNEL, 90, 95, NULL);
    activity_book_settle(b, INFINITY, INFINITY);
    ck_assert_uint_eq(activity_book_top(b, top, 4), 4);
    ck_assert_str_eq(top[0].name, "plan");
    ck_assert_str_eq(top[1].name, "plan #2");
    ck_assert_str_eq(top[2].name, "plan #3");
    ck_assert_str_eq(top[3].name, "(no name)");
    activity_book_destroy(b);
}
END_TEST

/* ---- limits ---- */

START_TEST(a_full_book_lays_the_older_half)
{
    struct activity_book *b = book_create(64);
    for (int i = 0; i < 1000; i++)
        add(b, ACTIVITY_KERNEL, i * 10, i * 10 + 5, "k");
    ck_assert_uint_ge(n_placed, 1000 - 64);
    for (int s = 0; s < 20; s++) { /* steps of more records than there is room for, too */
        activity_book_step(b, (uint64_t)s + 1, 10000 + s * 1000, 11000 + s * 1000);
        for (int i = 0; i < 100; i++)
            add(b, ACTIVITY_KERNEL, 10000 + s * 1000 + i * 10, 10000 + s * 1000 + i * 10 + 5, "k");
    }
    activity_book_settle(b, INFINITY, INFINITY);
    const struct activity_totals t = activity_book_totals(b);
    ck_assert_uint_eq(n_placed, 3000);
    ck_assert_uint_eq(t.kernels + t.outside + t.late, 3000);
    ck_assert_uint_ge(t.outside, 1000);
    ck_assert_uint_eq(t.steps + t.bare_steps, 20);
    activity_book_destroy(b);
}
END_TEST

START_TEST(more_steps_and_names_than_there_is_room_for)
{
    struct activity_book *b = book_create(0);
    struct activity_top top[ACTIVITY_NAMES_MAX + 1];
    char name[32];
    for (int i = 0; i < ACTIVITY_STEPS_MAX + 100; i++) {
        snprintf(name, sizeof name, "kernel %d", i);
        add(b, ACTIVITY_COPY_IN, i * 100, i * 100 + 1, NULL);
        add(b, ACTIVITY_KERNEL, i * 100 + 1, i * 100 + 91, name);
        activity_book_step(b, (uint64_t)i + 1, i * 100, i * 100 + 92);
    }
    activity_book_settle(b, INFINITY, INFINITY);
    ck_assert_uint_eq(activity_book_totals(b).steps, ACTIVITY_STEPS_MAX + 100);
    ck_assert_uint_eq(activity_book_top(b, top, ACTIVITY_NAMES_MAX + 1), ACTIVITY_NAMES_MAX + 1);
    ck_assert_str_eq(top[0].name, "(other kernels)");
    ck_assert_uint_eq(top[0].count, ACTIVITY_STEPS_MAX + 100 - ACTIVITY_NAMES_MAX);
    activity_book_destroy(b);
}
END_TEST

START_TEST(records_that_come_too_late_are_counted_as_such)
{
    struct activity_book *b = book_create(0);
    activity_book_step(b, 1, 0, 100);
    add(b, ACTIVITY_KERNEL, 10, 90, "k");
    add(b, ACTIVITY_KERNEL, 60000, 60010, "k");
    activity_book_settle(b, 50000, 50000);
    add(b, ACTIVITY_KERNEL, 20, 30, "k");
    activity_book_settle(b, INFINITY, INFINITY);
    const struct activity_totals t = activity_book_totals(b);
    ck_assert_uint_eq(t.late, 1);
    ck_assert_uint_eq(t.kernels, 1);
    ck_assert_uint_eq(t.outside, 1);
    ck_assert_uint_eq(n_placed, 3); /* in the file it is all the same */
    activity_book_destroy(b);
}
END_TEST

/* ---- the file ---- */

static struct {
    const struct activity *record;
    size_t records;
    uint64_t lost;
    double base_us;
    atomic_int takes, stuck;
} source;

static enum status_code source_start(const char *library, struct status *st)
{
    (void)library, (void)st;
    return ST_OK;
}

/* Half of them at first, the others at the end. */
static uint64_t source_take(bool last, activity_each *each, void *ctx)
{
    int turn = atomic_fetch_add(&source.takes, 1);
    while (last && atomic_load(&source.stuck))
        usleep(10000);
    size_t from = turn ? source.records / 2 : 0, to = last ? source.records : turn ? from : source.records / 2;
    for (size_t i = last && !turn ? 0 : from; i < to; i++) {
        struct activity a = source.record[i];
        a.begin_us += source.base_us;
        a.end_us += source.base_us;
        each(ctx, &a);
    }
    return last ? source.lost : 1;
}

static const struct activity_source fake_source = {source_start, source_take};

static char trace_path[32];

static struct worker_trace *trace_open(void)
{
    static const struct worker_log log = {.level = WORKER_LOG_WARNING};
    struct worker_trace *t = NULL;
    snprintf(trace_path, sizeof trace_path, "/tmp/tandem-activity-XXXXXX");
    int fd = mkstemp(trace_path);
    atomic_store(&source.takes, 0);
    ck_assert_int_ge(fd, 0);
    close(fd);
    ck_assert_int_eq(worker_trace_open(&t, trace_path, 0, 1, &log, NULL), ST_OK);
    return t;
}

static json_t *trace_read(void)
{
    json_error_t error;
    json_t *all = json_load_file(trace_path, 0, &error);
    ck_assert_msg(all != NULL, "%s", error.text);
    unlink(trace_path);
    return all;
}

static json_t *trace_find(json_t *all, const char *name)
{
    json_t *e;
    size_t i;
    json_array_foreach(all, i, e) if (strcmp(json_string_value(json_object_get(e, "name")), name) == 0) return e;
    ck_abort_msg("no event \"%s\"", name);
}

static double number(json_t *e, const char *key)
{
    ck_assert_msg(json_is_number(json_object_get(e, key)), "%s", key);
    return json_number_value(json_object_get(e, key));
}

static void check_event(json_t *all, const char *name, const char *track, double at_us, double dur_us, double step)
{
    json_t *e = trace_find(all, name), *args = json_object_get(e, "args");
    ck_assert_str_eq(json_string_value(json_object_get(e, "tid")), track);
    ck_assert_double_eq_tol(number(e, "ts"), at_us, 0.002);
    ck_assert_double_eq_tol(number(e, "dur"), dur_us, 0.002);
    if (step)
        ck_assert_double_eq(number(args, "step"), step);
    else
        ck_assert_ptr_null(json_object_get(args, "step"));
}

static const struct activity trace_records[] = {
    {.kind = ACTIVITY_KERNEL, .begin_us = -1e15, .end_us = 9, .name = "before the machine was started"},
    {.kind = ACTIVITY_KERNEL, .begin_us = -500, .end_us = -400, .name = "_Z4warmv"},
    {.kind = ACTIVITY_COPY_IN, .begin_us = 0, .end_us = 4, .bytes = 4096},
    {.kind = ACTIVITY_KERNEL, .begin_us = 10, .end_us = 50, .name = "_Z5firstILi1EEvPf", .stream = 7},
    {.kind = ACTIVITY_KERNEL, .begin_us = 40, .end_us = 60, .name = "sec\"ond\\\n"},
    {.kind = ACTIVITY_KERNEL, .begin_us = 80, .end_us = 90, .name = "_Z5thirdv"},
    {.kind = ACTIVITY_COPY_OUT, .begin_us = 92, .end_us = 96, .bytes = 4},
};

START_TEST(kernels_lie_under_their_step_in_the_file)
{
    struct worker_trace *t = trace_open();
    const double base = floor((double)worker_now_us());
    source.record = trace_records;
    source.records = sizeof trace_records / sizeof *trace_records;
    source.base_us = base;
    source.lost = 5;
    ck_assert_int_eq(worker_trace_kernels(t, &fake_source, NULL), ST_OK);
    for (int i = 0; atomic_load(&source.takes) < 2 && i < 500; i++)
        usleep(10000);
    ck_assert_int_ge(atomic_load(&source.takes), 2);
    const struct engine_result r = {.step = 3, .rows = 2, .timing = {.begin_us = base + 8, .end_us = base + 108}};
    worker_trace_step(t, &r);
    ck_assert(worker_trace_close(t));
    json_t *all = trace_read(), *sum = json_object_get(trace_find(all, "summary 1"), "args"), *top;
    check_event(all, "step 3", "device", base + 8, 100, 0);
    check_event(all, "warm", "kernels", base - 500, 100, 0);
    check_event(all, "first<1>", "kernels", base + 18, 40, 3); /* moved with the step's first copy */
    check_event(all, "sec\"ond\\\n", "kernels 2", base + 48, 20, 3);
    check_event(all, "third", "kernels", base + 88, 10, 3);
    check_event(all, "copy to device", "copies", base + 8, 4, 3);
    check_event(all, "copy to host", "copies", base + 100, 4, 3);
    ck_assert_double_eq(number(json_object_get(trace_find(all, "copy to device"), "args"), "bytes"), 4096);
    ck_assert_double_eq(number(json_object_get(trace_find(all, "first<1>"), "args"), "stream"), 7);
    ck_assert_double_eq(number(sum, "kernels"), 3);
    ck_assert_double_eq(number(sum, "kernel_busy_us"), 60); /* 10 to 60, 80 to 90 */
    ck_assert_double_eq(number(sum, "inside_gap_us"), 40);
    ck_assert_double_eq(number(sum, "copy_us"), 8);
    ck_assert_double_eq(number(sum, "longest_gap_us"), 20);
    ck_assert_double_eq(number(sum, "longest_gap_step"), 3);
    ck_assert_double_eq(number(sum, "kernels_outside"), 1);
    /* one a turn, 5 in the last, and the one whose time cannot be */
    ck_assert_double_eq(number(sum, "dropped"), atomic_load(&source.takes) - 1 + 5 + 1);
    ck_assert_double_eq_tol(number(sum, "shift_us"), 8, 0.01);
    ck_assert_double_eq(number(sum, "busy_us"), 100);
    top = json_object_get(sum, "top_kernels");
    ck_assert_uint_eq(json_array_size(top), 3);
    ck_assert_str_eq(json_string_value(json_object_get(json_array_get(top, 1), "name")), "sec\"ond\\\n");
    ck_assert_double_eq(number(json_array_get(top, 0), "us"), 40);
    json_decref(all);
}
END_TEST

/* The buffer of events goes to the file in parts. */
START_TEST(a_file_of_many_kernels_is_whole)
{
    static struct activity many[20000];
    struct worker_trace *t = trace_open();
    source.base_us = (double)worker_now_us();
    for (int i = 0; i < 20000; i++)
        many[i] = (struct activity){.kind = ACTIVITY_KERNEL, .begin_us = i, .end_us = i + 0.5, .name = "\x01kernel"};
    source.record = many;
    source.records = 20000;
    ck_assert_int_eq(worker_trace_kernels(t, &fake_source, NULL), ST_OK);
    worker_trace_host(t, "submit", 1, 1, 2);
    worker_trace_close(t);
    json_t *all = trace_read();
    ck_assert_uint_eq(json_array_size(all), 20002);
    json_decref(all);
}
END_TEST

START_TEST(without_kernels_the_summary_says_nothing_of_them)
{
    struct worker_trace *t = trace_open();
    const struct engine_result r[] = {
        {.step = 1, .timing = {.begin_us = 1, .end_us = 2}},
        {.step = 2, .timing = {.begin_us = 10, .end_us = 15, .idle_us = 5, .gap_us = 3, .pages_us = 4.5}},
        {.step = 3, .timing = {.begin_us = 17, .end_us = 19, .gap_us = 2, .pages_us = 2.5}},
    };
    for (size_t i = 0; i < sizeof r / sizeof *r; i++)
        worker_trace_step(t, &r[i]);
    worker_trace_close(t);
    json_t *all = trace_read(), *sum = json_object_get(trace_find(all, "summary 3"), "args");
    ck_assert_uint_eq(json_array_size(all), 4);
    ck_assert_ptr_null(json_object_get(sum, "kernels"));
    ck_assert_double_eq(number(sum, "busy_us"), 8);
    ck_assert_double_eq(number(sum, "idle_us"), 5);
    ck_assert_double_eq(number(sum, "gap_us"), 5);
    ck_assert_double_eq(number(sum, "pages_us"), 7);
    ck_assert_double_eq(number(json_object_get(trace_find(all, "step 3"), "args"), "pages_us"), 2.5);
    ck_assert_double_eq_tol(number(sum, "gap_share"), 5.0 / 13, 1e-5);
    ck_assert_double_eq(number(json_object_get(trace_find(all, "step 2"), "args"), "idle_us"), 5);
    json_decref(all);
}
END_TEST

/* ---- faults ---- */

START_TEST(a_source_that_does_not_answer_ends_the_file_all_the_same)
{
    static struct worker_trace *t; /* that thread keeps it, and so do we: no leak */
    t = trace_open();
    source.record = trace_records;
    source.records = 0;
    atomic_store(&source.stuck, 1);
    ck_assert_int_eq(worker_trace_kernels(t, &fake_source, NULL), ST_OK);
    const int64_t before_us = worker_now_us();
    ck_assert(!worker_trace_close(t));
    ck_assert_int_ge(worker_now_us() - before_us, WORKER_KERNELS_END_MS * 1000);
    ck_assert_int_lt(worker_now_us() - before_us, WORKER_KERNELS_END_MS * 1000 + 2000000);
    json_t *all = trace_read();
    ck_assert(json_is_true(json_object_get(json_object_get(trace_find(all, "summary 0"), "args"), "kernels_stuck")));
    json_decref(all);
    atomic_store(&source.stuck, 0);
    usleep(100000); /* its thread ends, and writes to nothing that is gone */
}
END_TEST

/* The largest file that may be stands for the disk, and then there is room again. */
START_TEST(a_full_disk_ends_the_file_and_is_said_once)
{
    static struct activity many[2000];
    struct rlimit limit, small;
    struct stat file;
    char said[1024];
    FILE *log = tmpfile();
    struct worker_trace *t = trace_open();
    const int stderr_fd = dup(STDERR_FILENO);
    ck_assert_ptr_nonnull(log);
    for (int i = 0; i < 2000; i++)
        many[i] = (struct activity){.kind = ACTIVITY_KERNEL, .begin_us = i, .end_us = i + 0.5, .name = "k"};
    source.record = many;
    source.records = 2000;
    source.base_us = (double)worker_now_us();
    ck_assert_int_eq(worker_trace_kernels(t, &fake_source, NULL), ST_OK);
    ck_assert_int_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
    small = limit;
    small.rlim_cur = 5000;
    signal(SIGXFSZ, SIG_IGN);
    dup2(fileno(log), STDERR_FILENO);
    setrlimit(RLIMIT_FSIZE, &small);
    for (uint64_t i = 0; i < 100; i++)
        worker_trace_host(t, "submit", i, 1, 2);
    setrlimit(RLIMIT_FSIZE, &limit);
    for (uint64_t i = 0; i < 100; i++)
        worker_trace_host(t, "submit", i, 1, 2);
    const bool whole = worker_trace_close(t);
    dup2(stderr_fd, STDERR_FILENO);
    close(stderr_fd);
    signal(SIGXFSZ, SIG_DFL);
    ck_assert(whole);
    ck_assert_int_eq(stat(trace_path, &file), 0);
    ck_assert_int_eq(file.st_size, 5000); /* and nothing behind the cut */
    rewind(log);
    said[fread(said, 1, sizeof said - 1, log)] = '\0';
    ck_assert_msg(strstr(said, trace_path) && strstr(said, ": File too large: nothing more is written to it\n"), "%s",
                  said);
    ck_assert_msg(strchr(said, '\n') == said + strlen(said) - 1, "%s", said); /* one line */
    fclose(log);
    unlink(trace_path);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("activity");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_set_timeout(faults, 60);
    tcase_set_timeout(core, 60);
    tcase_add_test(core, names_keep_what_tells_kernels_apart);
    tcase_add_test(core, names_too_long_stay_apart);
    tcase_add_test(core, names_are_strings_of_json);
    tcase_add_loop_test(core, sums_are_those_of_a_plain_model, 0, 4);
    tcase_add_test(core, a_step_begins_with_its_run_of_copies);
    tcase_add_test(core, steps_back_to_back_keep_to_their_copies);
    tcase_add_loop_test(core, copies_of_another_stream_are_of_no_step, 0, 2);
    tcase_add_loop_test(core, copies_in_a_gap_are_not_taken_for_a_step, 0, 9);
    tcase_add_loop_test(core, clocks_that_drift_apart_while_idle_are_joined_again, 0, 3);
    tcase_add_test(core, kernels_with_most_time_come_first);
    tcase_add_test(core, names_that_shorten_alike_get_a_number);
    tcase_add_test(core, kernels_lie_under_their_step_in_the_file);
    tcase_add_test(core, without_kernels_the_summary_says_nothing_of_them);
    tcase_add_test(limits, a_full_book_lays_the_older_half);
    tcase_add_test(limits, more_steps_and_names_than_there_is_room_for);
    tcase_add_test(limits, records_that_come_too_late_are_counted_as_such);
    tcase_add_test(limits, a_file_of_many_kernels_is_whole);
    tcase_add_test(faults, damaged_names_are_read_to_their_end);
    tcase_add_test(faults, a_full_disk_ends_the_file_and_is_said_once);
    tcase_add_test(faults, a_source_that_does_not_answer_ends_the_file_all_the_same);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
