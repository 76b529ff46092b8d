#include "tests/gpu/kernels_gpu.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GUARD_BYTES 1024

static void must(const struct kg *k, cudaError_t err, const char *what)
{
    if (err == cudaSuccess)
        return;
    fprintf(stderr, "%s: %s: %s (%s)\n", k->name, what, cudaGetErrorString(err), cudaGetErrorName(err));
    exit(1);
}

void kg_begin(struct kg *k, const char *name, ...)
{
    va_list ap;
    va_start(ap, name);
    vsnprintf(k->name, sizeof k->name, name, ap);
    va_end(ap);
    k->problem[0] = '\0';
    k->values = 0;
    k->share = k->error = k->allowed = 0;
    k->n_blocks = 0;
}

static void fail(struct kg *k, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The first problem of a case is the one that is told. */
static void fail(struct kg *k, const char *format, ...)
{
    va_list ap;
    if (k->problem[0])
        return;
    va_start(ap, format);
    vsnprintf(k->problem, sizeof k->problem, format, ap);
    va_end(ap);
}

static void check_guards(struct kg *k, const struct kg_block *b)
{
    uint8_t guard[GUARD_BYTES];
    for (int side = 0; side < 2; side++) {
        must(k, cudaMemcpy(guard, side ? b->at + b->bytes : b->base, sizeof guard, cudaMemcpyDeviceToHost), "guards");
        for (uint32_t i = 0; i < GUARD_BYTES; i++)
            if (guard[i] != 0xff)
                return fail(k, "%u bytes %s memory of %zu bytes were written", side ? i + 1 : GUARD_BYTES - i,
                            side ? "behind" : "in front of", b->bytes);
    }
}

void kg_end(struct kg *k)
{
    must(k, cudaStreamSynchronize(k->stream), "kernels");
    for (uint32_t i = 0; i < k->n_blocks; i++) {
        if (!k->bare)
            check_guards(k, &k->block[i]);
        must(k, cudaFree(k->block[i].base), "cudaFree");
    }
    k->n_blocks = 0;
    if (k->values == 0)
        fail(k, "nothing was compared");
    k->cases++;
    k->failures += k->problem[0] != '\0';
    printf("%s: ", k->name);
    if (k->problem[0])
        printf("FAILED: %s\n", k->problem);
    else if (k->allowed > 0)
        printf("ok, %llu values, largest error %.3g of %.3g allowed\n", (unsigned long long)k->values, k->error,
               k->allowed);
    else
        printf("ok, %llu values, none differs\n", (unsigned long long)k->values);
    fflush(stdout);
}

static uint8_t *take_block(struct kg *k, size_t bytes)
{
    const size_t guard = k->bare ? 0 : GUARD_BYTES;
    if (k->n_blocks == KG_BLOCKS_MAX || bytes == 0) {
        fprintf(stderr, "%s: too many blocks, or an empty one\n", k->name);
        exit(1);
    }
    struct kg_block *b = &k->block[k->n_blocks++];
    must(k, cudaMalloc((void **)&b->base, bytes + 2 * guard), "cudaMalloc");
    b->at = b->base + guard;
    b->bytes = bytes;
    if (!k->bare) {
        must(k, cudaMemset(b->base, 0xff, guard), "cudaMemset");
        must(k, cudaMemset(b->at + bytes, 0xff, guard), "cudaMemset");
    }
    return b->at;
}

/* The stream is one that does not wait for the default one. */
static void settle(const struct kg *k)
{
    must(k, cudaDeviceSynchronize(), "the device");
}

void *kg_give(struct kg *k, const void *host, size_t bytes)
{
    uint8_t *at = take_block(k, bytes);
    must(k, cudaMemcpy(at, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    settle(k);
    return at;
}

void kg_poison(struct kg *k, void *device, size_t bytes)
{
    must(k, cudaStreamSynchronize(k->stream), "kernels");
    must(k, cudaMemset(device, 0xff, bytes), "cudaMemset");
    settle(k);
}

void *kg_poisoned(struct kg *k, size_t bytes)
{
    uint8_t *at = take_block(k, bytes);
    kg_poison(k, at, bytes);
    return at;
}

void kg_take(struct kg *k, void *host, const void *device, size_t bytes)
{
    must(k, cudaStreamSynchronize(k->stream), "kernels");
    must(k, cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

void kg_launched(const struct kg *k, cudaError_t err)
{
    must(k, err, "launch");
}

/* ---- comparisons ---- */

void kg_near(struct kg *k, const char *what, uint64_t at, double got, double want, double allowed)
{
    const double error = fabs(got - want), share = error / allowed;
    k->values++;
    if (!(error <= allowed))
        fail(k, "%s %llu: %.9g, expected %.9g, error %.3g of %.3g allowed", what, (unsigned long long)at, got, want,
             error, allowed);
    if (k->allowed <= 0 || share > k->share) {
        k->share = share;
        k->error = error;
        k->allowed = allowed;
    }
}

void kg_same(struct kg *k, const char *what, uint64_t at, uint64_t got, uint64_t want)
{
    k->values++;
    if (got != want)
        fail(k, "%s %llu: 0x%llx, expected 0x%llx", what, (unsigned long long)at, (unsigned long long)got,
             (unsigned long long)want);
}

void kg_untouched(struct kg *k, const char *what, const void *host, size_t bytes)
{
    const uint8_t *at = host;
    for (size_t i = 0; i < bytes; i++)
        if (at[i] != 0xff)
            return fail(k, "%s: byte %zu was written", what, i);
}

/* ---- data ---- */

void *kg_zeros(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size);
    if (!p) {
        fprintf(stderr, "out of memory: %zu times %zu bytes\n", count, size);
        exit(1);
    }
    return p;
}

static uint64_t next(struct kg *k)
{
    uint64_t z = k->random += 0x9E3779B97F4A7C15ull; /* splitmix64 */
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

uint32_t kg_below(struct kg *k, uint32_t n)
{
    return (uint32_t)((next(k) >> 32) * n >> 32);
}

float kg_value(struct kg *k)
{
    return (float)((int32_t)(next(k) >> 40) - (1 << 23)) * 0x1p-23f;
}

float *kg_floats(struct kg *k, size_t n, float scale)
{
    float *p = kg_zeros(n, sizeof *p);
    for (size_t i = 0; i < n; i++)
        p[i] = kg_value(k) * scale;
    return p;
}

uint16_t *kg_halves(struct kg *k, size_t n, float scale)
{
    uint16_t *p = kg_zeros(n, sizeof *p);
    for (size_t i = 0; i < n; i++)
        p[i] = kg_bf16(kg_value(k) * scale);
    return p;
}

uint32_t kg_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

uint16_t kg_bf16(float x)
{
    const uint32_t bits = kg_bits(x);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float kg_float(uint16_t bf16)
{
    const uint32_t bits = (uint32_t)bf16 << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

void kg_product(double *y, double *size, const uint16_t *x, const uint16_t *w, uint32_t t, uint32_t n, uint32_t k)
{
    float *row = kg_zeros(k, sizeof *row), *wide = kg_zeros((size_t)t * k, sizeof *wide);
    for (size_t i = 0; i < (size_t)t * k; i++)
        wide[i] = kg_float(x[i]);
    for (uint32_t j = 0; j < n; j++) {
        for (uint32_t i = 0; i < k; i++)
            row[i] = kg_float(w[(size_t)j * k + i]);
        for (uint32_t r = 0; r < t; r++) {
            const float *of = wide + (size_t)r * k;
            double sum = 0, all = 0;
            for (uint32_t i = 0; i < k; i++) {
                const double p = (double)of[i] * (double)row[i];
                sum += p;
                all += fabs(p);
            }
            y[(size_t)r * n + j] = sum;
            size[(size_t)r * n + j] = all;
        }
    }
    free(wide);
    free(row);
}

/* More than enough: a lane rounds at most once for every product of its own, k / 32 of them in units of eight, then the lanes'
 * sums are added in five steps. By tensor cores a warp has k / 8 products in k / 128 steps, each off by a few units, then eight warps
 * are added. */
double kg_few_off(double size, uint32_t k)
{
    return size * (k / 32.0 + 8 + 8) * 0x1p-24;
}
