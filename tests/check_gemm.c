/* check_gemm.c - worker/gemm.h against products summed in double.
 *
 * Tolerance: a float sum of K products in any order is off by at most about K * 2^-24 * sum |x w|; with 16 or more
 * partial sums the true bound is far smaller. We allow (4 + K / 8) * 2^-24 * sum |x w|.
 */
#include <cblas.h>
#include <check.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/unsanitized.h"
#include "worker/gemm.h"
#include "worker/gemm_internal.h"

static const enum mat_dtype dtypes[] = {MAT_F32, MAT_BF16, MAT_F16};
static const char *const dtype_names[] = {"f32", "bf16", "f16"};

struct fixture {
    struct thread_pool *pool;
    struct gemm *gemm;
};

static struct fixture make(uint32_t threads, uint32_t max_cols)
{
    struct fixture f = {0};
    ck_assert_int_eq(threads_create(&f.pool, threads, NULL), ST_OK);
    ck_assert_int_eq(gemm_create(&f.gemm, f.pool, max_cols, NULL), ST_OK);
    return f;
}

static void drop(struct fixture *f)
{
    gemm_destroy(f->gemm);
    threads_destroy(f->pool);
}

static float uniform(unsigned *seed)
{
    return (float)rand_r(seed) / (float)RAND_MAX * 2 - 1;
}

/* Halves, by the definition of the format. */
UNSANITIZED static float f16_value(uint16_t h)
{
    int e = h >> 10 & 31, m = h & 1023;
    double v = e == 31 ? (m ? NAN : INFINITY) : e == 0 ? ldexp(m, -24) : ldexp(1024 + m, e - 25);
    return (float)(h & 0x8000 ? -v : v);
}

UNSANITIZED static float bf16_value(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

UNSANITIZED static float value(const struct mat *w, uint64_t i)
{
    if (w->dtype == MAT_F32)
        return ((const float *)w->data)[i];
    uint16_t h = ((const uint16_t *)w->data)[i];
    return w->dtype == MAT_F16 ? f16_value(h) : bf16_value(h);
}

/* Some element of the dtype with magnitude about 1: any bits that make one. */
static void put_random(void *data, uint64_t i, enum mat_dtype dtype, unsigned *seed)
{
    float f = uniform(seed);
    if (dtype == MAT_F32) {
        ((float *)data)[i] = f;
        return;
    }
    uint16_t bits;
    if (dtype == MAT_F16) {
        bits = (uint16_t)(rand_r(seed) & 0x83ff) | (uint16_t)((8 + rand_r(seed) % 8) << 10);
    } else {
        uint32_t u;
        memcpy(&u, &f, 4);
        bits = (uint16_t)(u >> 16);
    }
    ((uint16_t *)data)[i] = bits;
}

static struct mat random_mat(enum mat_dtype dtype, uint32_t rows, uint32_t cols, unsigned *seed)
{
    uint64_t n = (uint64_t)rows * cols;
    void *data = n ? aligned_alloc(64, (n * mat_elem_bytes(dtype) + 63) / 64 * 64) : NULL;
    for (uint64_t i = 0; i < n; i++)
        put_random(data, i, dtype, seed);
    return (struct mat){data, dtype, rows, cols};
}

static float *random_x(uint32_t t, uint64_t ldx, unsigned *seed)
{
    float *x = malloc((t * ldx + 1) * sizeof *x);
    for (uint64_t i = 0; i < t * ldx; i++)
        x[i] = uniform(seed);
    return x;
}

UNSANITIZED static double reference(const float *x, const float *w, uint32_t n, double *mag)
{
    double sum = 0;
    *mag = 0;
    for (uint32_t k = 0; k < n; k++) {
        double p = (double)x[k] * (double)w[k];
        sum += p;
        *mag += fabs(p);
    }
    return sum;
}

static void check_product(const float *y, uint64_t ldy, const float *x, uint64_t ldx, uint32_t t, const struct mat *w)
{
    float *row = malloc((w->cols + 1) * sizeof *row);
    for (uint32_t n = 0; n < w->rows; n++) {
        for (uint32_t k = 0; k < w->cols; k++)
            row[k] = value(w, (uint64_t)n * w->cols + k);
        for (uint32_t i = 0; i < t; i++) {
            double mag, sum = reference(x + i * ldx, row, w->cols, &mag);
            double tol = (4 + w->cols / 8.0) * 0x1p-24 * mag;
            double err = fabs((double)y[i * ldy + n] - sum);
            if (!(err <= tol)) /* an assertion of Check writes a line even when it holds */
                ck_abort_msg("%s N %u K %u T %u: y[%u][%u] %.9g, expected %.9g, off by %.3g, allowed %.3g",
                             dtype_names[w->dtype], w->rows, w->cols, t, i, n, (double)y[i * ldy + n], sum, err, tol);
        }
    }
    free(row);
}

#define SENTINEL -12345.0f

/* One product with rows of x and y further apart than their width; what lies between stays as it was. */
static void one_case(struct gemm *g, enum mat_dtype dtype, uint32_t n, uint32_t k, uint32_t t, uint32_t pad,
                     unsigned *seed)
{
    struct mat w = random_mat(dtype, n, k, seed);
    uint64_t ldx = k + pad, ldy = n + pad;
    float *x = random_x(t, ldx, seed);
    float *y = malloc((t * ldy + 1) * sizeof *y);
    for (uint64_t i = 0; i < t * ldy + 1; i++)
        y[i] = SENTINEL;
    gemm_run(g, y, ldy, x, ldx, t, &w);
    check_product(y, ldy, x, ldx, t, &w);
    for (uint64_t i = 0; i < t * ldy + 1; i++) {
        if ((i >= t * ldy || i % ldy >= n) && y[i] != SENTINEL)
            ck_abort_msg("y[%llu]: %g, was not to be touched", (unsigned long long)i, (double)y[i]);
    }
    free(x);
    free(y);
    free((void *)w.data);
}

START_TEST(product_matches_double_for_every_row_count)
{
    enum mat_dtype dtype = dtypes[_i];
    struct fixture f = make(2, 300);
    unsigned seed = 7;
    for (uint32_t t = 1; t <= 70; t++)
        one_case(f.gemm, dtype, 37, 131, t, t % 3, &seed);
    for (uint32_t t = 90; t <= 400; t += 31) /* the BLAS takes over somewhere in between */
        one_case(f.gemm, dtype, 291, 70, t, t % 3, &seed);
    drop(&f);
}
END_TEST

START_TEST(product_matches_double_for_odd_sizes)
{
    enum mat_dtype dtype = dtypes[_i];
    static const uint32_t ns[] = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 127, 128, 129, 257};
    static const uint32_t ks[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 96, 200};
    static const uint32_t ts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 33};
    struct fixture f = make(3, 200);
    unsigned seed = 11;
    for (size_t n = 0; n < sizeof ns / sizeof *ns; n++) {
        for (size_t k = 0; k < sizeof ks / sizeof *ks; k++)
            one_case(f.gemm, dtype, ns[n], ks[k], ts[(n * 5 + k) % (sizeof ts / sizeof *ts)], (uint32_t)(n + k) % 4,
                     &seed);
    }
    drop(&f);
}
END_TEST

START_TEST(product_matches_double_for_long_rows)
{
    struct fixture f = make(2, 14336);
    unsigned seed = 13;
    static const uint32_t ts[] = {1, 4, 20, 200};
    for (size_t i = 0; i < sizeof ts / sizeof *ts; i++)
        one_case(f.gemm, dtypes[_i], 70, 14336, ts[i], 0, &seed);
    drop(&f);
}
END_TEST

/* Which its own list does not give where the processor is newer than it. */
START_TEST(the_library_has_kernels_for_this_processor)
{
#if defined __x86_64__
    if (__builtin_cpu_supports("avx2"))
        ck_assert_str_ne(openblas_get_corename(), "Prescott");
#endif
}
END_TEST

START_TEST(zero_sizes_are_fine)
{
    struct fixture f = make(2, 0);
    float y[4] = {1, 1, 1, 1}, x[4] = {1, 2, 3, 4}, wd[4] = {1, 1, 1, 1};
    struct mat w = {wd, MAT_F32, 2, 2};
    gemm_run(f.gemm, y, 2, x, 2, 0, &w);
    struct mat no_rows = {NULL, MAT_BF16, 0, 2};
    gemm_run(f.gemm, y, 2, x, 2, 2, &no_rows);
    for (int i = 0; i < 4; i++)
        ck_assert_float_eq(y[i], 1);
    struct mat no_cols = {NULL, MAT_F16, 1, 0};
    gemm_run(f.gemm, y, 2, x, 2, 2, &no_cols);
    ck_assert(y[0] == 0 && y[1] == 1 && y[2] == 0 && y[3] == 1);
    gemm_row(y, &no_cols, 0);
    drop(&f);
    gemm_destroy(NULL);
}
END_TEST

/* More columns than were announced: slower perhaps, never out of bounds. */
START_TEST(more_columns_than_announced_still_works)
{
    struct fixture f = make(2, 16);
    unsigned seed = 3;
    for (size_t d = 0; d < 3; d++)
        one_case(f.gemm, dtypes[d], 40, 100, 300, 0, &seed);
    drop(&f);
}
END_TEST

START_TEST(result_does_not_depend_on_the_number_of_threads)
{
    enum mat_dtype dtype = dtypes[_i];
    static const uint32_t ts[] = {1, 2, 5, 8, 16, 40, 70, 250};
    unsigned seed = 5;
    struct mat w = random_mat(dtype, 1037, 333, &seed);
    for (size_t i = 0; i < sizeof ts / sizeof *ts; i++) {
        uint32_t t = ts[i];
        float *x = random_x(t, 333, &seed), *first = NULL;
        for (uint32_t threads = 1; threads <= 5; threads++) {
            struct fixture f = make(threads, 333);
            float *y = malloc((uint64_t)t * 1037 * sizeof *y);
            gemm_run(f.gemm, y, 1037, x, 333, t, &w);
            if (first)
                ck_assert_msg(!memcmp(first, y, (uint64_t)t * 1037 * sizeof *y), "%s T %u: %u threads differ from 1",
                              dtype_names[dtype], t, threads);
            if (first)
                free(y);
            else
                first = y;
            drop(&f);
        }
        free(first);
        free(x);
    }
    free((void *)w.data);
}
END_TEST

START_TEST(row_is_widened_exactly)
{
    /* All 65536 values of both 16-bit formats, as rows of odd length. */
    enum { COLS = 257, ROWS = 256 };
    uint16_t *bits = aligned_alloc(64, (COLS * ROWS * 2 + 63) / 64 * 64);
    for (uint32_t i = 0; i < COLS * ROWS; i++)
        bits[i] = (uint16_t)i;
    for (size_t d = 1; d < 3; d++) {
        struct mat w = {bits, dtypes[d], ROWS, COLS};
        for (uint32_t r = 0; r < ROWS; r++) {
            float out[COLS + 1];
            out[COLS] = SENTINEL;
            gemm_row(out, &w, r);
            ck_assert_float_eq(out[COLS], SENTINEL);
            for (uint32_t c = 0; c < COLS; c++) {
                float want = value(&w, r * COLS + c);
                ck_assert_msg(isnan(want) ? isnan(out[c]) : !memcmp(&want, &out[c], 4), "%s 0x%04x: %g, expected %g",
                              dtype_names[d], bits[r * COLS + c], (double)out[c], (double)want);
            }
        }
    }
    float f[3] = {1.5f, -0.0f, 3e-42f}, out[3];
    struct mat w = {f, MAT_F32, 1, 3};
    gemm_row(out, &w, 0);
    ck_assert(!memcmp(f, out, sizeof f));
    free(bits);
}
END_TEST

START_TEST(denormal_weights_count)
{
    struct fixture f = make(2, 64);
    enum { MAX_T = 250 };
    static float x[MAX_T * 64], y[MAX_T];
    for (uint32_t t = 1; t <= MAX_T; t += MAX_T - 1) {
        for (size_t d = 0; d < 3; d++) {
            uint16_t h[64];
            float fl[64];
            for (int i = 0; i < 64; i++) {
                h[i] = 3; /* denormal in f16 and bf16 */
                fl[i] = 3e-40f;
            }
            for (int i = 0; i < MAX_T * 64; i++)
                x[i] = 0x1p100f;
            struct mat w = {d ? (void *)h : (void *)fl, dtypes[d], 1, 64};
            gemm_run(f.gemm, y, 1, x, 64, t, &w);
            double want = 64 * 0x1p100 * (double)value(&w, 0);
            for (uint32_t i = 0; i < t; i++)
                ck_assert_double_eq_tol(y[i] / want, 1, 1e-6);
        }
    }
    drop(&f);
}
END_TEST

START_TEST(nan_and_infinity_reach_their_row_and_no_other)
{
    struct fixture f = make(2, 40);
    static const float bad[] = {NAN, INFINITY};
    for (size_t b = 0; b < 2; b++) {
        for (uint32_t at = 0; at < 37; at++) {
            for (uint32_t t = 1; t <= 200; t *= 10) { /* 100: the BLAS */
                float wd[9 * 37], x[100 * 37], y[100 * 9];
                for (int i = 0; i < 9 * 37; i++)
                    wd[i] = 1;
                for (int i = 0; i < 100 * 37; i++)
                    x[i] = 0.5f;
                wd[5 * 37 + at] = bad[b];
                struct mat w = {wd, MAT_F32, 9, 37};
                gemm_run(f.gemm, y, 9, x, 37, t, &w);
                for (uint32_t i = 0; i < t * 9; i++)
                    ck_assert(i % 9 == 5 ? (b ? isinf(y[i]) : isnan(y[i])) : y[i] == 18.5f);
            }
        }
    }
    drop(&f);
}
END_TEST

/* A block that ends at a page nobody may touch. */
static void *fenced(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    char *m = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ck_assert(m != MAP_FAILED);
    ck_assert_int_eq(mprotect(m + room, page, PROT_NONE), 0);
    return m + room - bytes;
}

START_TEST(nothing_behind_the_matrices_is_touched)
{
    struct fixture f = make(2, 300);
    unsigned seed = 17;
    static const uint32_t shapes[][3] = {{64, 1, 1},   {33, 9, 1},    {5, 100, 3},  {17, 33, 8},
                                         {40, 37, 40}, {40, 37, 250}, {300, 300, 1}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        uint32_t n = shapes[s][0], k = shapes[s][1], t = shapes[s][2];
        for (size_t d = 0; d < 3; d++) {
            void *data = fenced((size_t)n * k * mat_elem_bytes(dtypes[d]));
            float *x = fenced((size_t)t * k * 4), *y = fenced((size_t)t * n * 4);
            for (uint32_t i = 0; i < n * k; i++)
                put_random(data, i, dtypes[d], &seed);
            for (uint32_t i = 0; i < t * k; i++)
                x[i] = uniform(&seed);
            struct mat w = {data, dtypes[d], n, k};
            gemm_run(f.gemm, y, n, x, k, t, &w);
            check_product(y, n, x, k, t, &w);
            float *row = fenced(k * 4);
            gemm_row(row, &w, n - 1);
        }
    }
    drop(&f);
}
END_TEST

/* The instruction sets that the CPU has besides the one that was picked. */
START_TEST(every_instruction_set_computes_the_same)
{
    const struct gemm_kernels *sets[GEMM_MAX_KERNELS];
    uint32_t n_sets = gemm_kernels_list(sets);
    ck_assert_uint_ge(n_sets, 1);
    unsigned seed = 23;
    for (uint32_t s = 0; s < n_sets; s++) {
        for (size_t d = 0; d < 3; d++) {
            for (uint32_t t = 1; t <= 9; t++) {
                for (uint32_t k = 1; k < 80; k += 13) {
                    struct mat w = random_mat(dtypes[d], 29, k, &seed);
                    float *x = random_x(t, k, &seed), y[9 * 29];
                    struct gemm_few_args a = {y, 29, x, k, t, &w};
                    sets[s]->few(&a, 0, 11);
                    sets[s]->few(&a, 11, 29);
                    check_product(y, 29, x, k, t, &w);
                    float wide[80];
                    sets[s]->widen(wide, w.data, k, w.dtype);
                    for (uint32_t i = 0; i < k; i++)
                        ck_assert_float_eq(wide[i], value(&w, i));
                    free(x);
                    free((void *)w.data);
                }
            }
        }
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("gemm");
    TCase *core = tcase_create("core");
    tcase_add_loop_test(core, product_matches_double_for_every_row_count, 0, 3);
    tcase_add_loop_test(core, product_matches_double_for_odd_sizes, 0, 3);
    tcase_add_loop_test(core, product_matches_double_for_long_rows, 0, 3);
    tcase_add_loop_test(core, result_does_not_depend_on_the_number_of_threads, 0, 3);
    tcase_add_test(core, row_is_widened_exactly);
    tcase_add_test(core, every_instruction_set_computes_the_same);
    suite_add_tcase(s, core);
    TCase *limits = tcase_create("limits");
    tcase_add_test(limits, the_library_has_kernels_for_this_processor);
    tcase_add_test(limits, zero_sizes_are_fine);
    tcase_add_test(limits, more_columns_than_announced_still_works);
    tcase_add_test(limits, denormal_weights_count);
    suite_add_tcase(s, limits);
    TCase *faults = tcase_create("faults");
    tcase_add_test(faults, nan_and_infinity_reach_their_row_and_no_other);
    tcase_add_test(faults, nothing_behind_the_matrices_is_touched);
    suite_add_tcase(s, faults);
    tcase_set_timeout(core, 120);
    tcase_set_timeout(limits, 60);
    tcase_set_timeout(faults, 60);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
