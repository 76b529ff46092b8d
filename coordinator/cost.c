/* cost.c - the fit of cost.h. */
#include "coordinator/cost.h"

#include <math.h>
#include <string.h>

#define FORGET 0.998 /* a step counts half after some 350 others */
/* Variance of a coefficient at the start, in squares of itself, over the variance of a step's relative error (5 %). */
#define GAIN_START   4000.0 /* a guess */
#define GAIN_KNOWN   10.0   /* measured */
#define SPREAD_START 1.0
#define SPREAD_KNOWN 0.05
#define SPREAD_RATE  0.02
#define OUTLIER      3.0 /* times the spread */
#define KNOWN_STEPS  64
#define OWN_STEPS    32   /* hybrid steps until their own coefficients are used */
#define MIN_STEP_US  20.0 /* errors are relative to this at least */
#define MAX_STEP_US  3.6e9

/* Terms are scaled to about 1 in a usual step, so that one gain fits all of them. */
static const double SCALE[COST_TERMS] = {1, 1.0 / 64, 1e-5, 1e-3, 1e-7};
/* Coefficients stay below these: microseconds for one of each term. */
static const double LIMIT[COST_TERMS] = {1e8, 1e7, 1e5, 1e7, 1e4};

const struct cost_profile cost_default = {
    .pure = {.fixed_us = 5000, .decode_us = 5, .kv_us = 0.03, .row_us = 25, .pair_us = 0.001},
    .hybrid = {.fixed_us = 5000, .decode_us = 5, .kv_us = 0.03, .row_us = 25, .pair_us = 0.001},
};

static void terms_of(const struct cost_step *s, double x[COST_TERMS])
{
    x[0] = SCALE[0];
    x[1] = s->decodes * SCALE[1];
    x[2] = (double)s->context * SCALE[2];
    x[3] = s->rows * SCALE[3];
    x[4] = (double)s->pairs * SCALE[4];
}

static void fit_init(struct cost_fit *f, const struct cost_coef *c, bool known)
{
    const double start[COST_TERMS] = {c->fixed_us, c->decode_us, c->kv_us, c->row_us, c->pair_us};
    memset(f, 0, sizeof *f);
    for (int i = 0; i < COST_TERMS; i++) {
        double v = start[i] > 0 ? start[i] : 0;
        f->theta[i] = (v < LIMIT[i] ? v : LIMIT[i]) / SCALE[i];
        double about = f->theta[i] > 10 ? f->theta[i] : 10;
        f->floor[i] = 1 / ((known ? GAIN_KNOWN : GAIN_START) * about * about);
    }
    f->spread = known ? SPREAD_KNOWN : SPREAD_START;
}

void cost_init(struct cost_model *m, const struct cost_profile *p)
{
    fit_init(&m->pure, &p->pure, p->known);
    fit_init(&m->hybrid, &p->hybrid, p->known);
    m->known = p->known;
}

static const struct cost_fit *fit_of(const struct cost_model *m, const struct cost_step *s)
{
    bool hybrid = s->decodes > 0 && s->rows > 0;
    return hybrid && (m->known || m->hybrid.seen >= OWN_STEPS) ? &m->hybrid : &m->pure;
}

static double dot(const double *a, const double *b)
{
    double sum = 0;
    for (int i = 0; i < COST_TERMS; i++)
        sum += a[i] * b[i];
    return sum;
}

double cost_predict_us(const struct cost_model *m, const struct cost_step *step)
{
    double x[COST_TERMS];
    terms_of(step, x);
    return dot(fit_of(m, step)->theta, x);
}

/* Minimises over the free terms by Cholesky, the others are 0; false: rounding left nothing to divide by. */
static bool solve(const struct cost_fit *f, const double b[COST_TERMS], const bool free[COST_TERMS],
                  double out[COST_TERMS])
{
    double l[COST_TERMS][COST_TERMS] = {{0}};
    for (int i = 0; i < COST_TERMS; i++)
        for (int k = 0; k <= i; k++) {
            double v = !free[i] || !free[k] ? i == k : f->info[i][k] + (i == k ? f->floor[i] : 0);
            for (int m = 0; m < k; m++)
                v -= l[i][m] * l[k][m];
            if (i == k && !(v > 0))
                return false;
            l[i][k] = i == k ? sqrt(v) : v / l[k][k];
        }
    for (int i = 0; i < COST_TERMS; i++) {
        out[i] = free[i] ? b[i] : 0;
        for (int m = 0; m < i; m++)
            out[i] -= l[i][m] * out[m];
        out[i] /= l[i][i];
    }
    for (int i = COST_TERMS - 1; i >= 0; i--) {
        for (int m = i + 1; m < COST_TERMS; m++)
            out[i] -= l[m][i] * out[m];
        out[i] /= l[i][i];
    }
    return true;
}

/* The theta that fits the sums best, none under 0: whatever would be the furthest below is 0, until none is. */
static void fit_solve(struct cost_fit *f)
{
    bool free[COST_TERMS] = {true, true, true, true, true};
    double b[COST_TERMS], out[COST_TERMS];
    for (int i = 0; i < COST_TERMS; i++)
        b[i] = f->target[i] + f->floor[i] * f->theta[i];
    for (;;) {
        int worst = -1;
        if (!solve(f, b, free, out))
            return;
        for (int i = 0; i < COST_TERMS; i++)
            if (out[i] < 0 && (worst < 0 || out[i] < out[worst]))
                worst = i;
        if (worst < 0)
            break;
        free[worst] = false;
    }
    for (int i = 0; i < COST_TERMS; i++)
        f->theta[i] = fmin(out[i], LIMIT[i] / SCALE[i]);
}

/* One step of recursive least squares on relative errors. */
static void fit_update(struct cost_fit *f, const struct cost_step *step, double took_us)
{
    double x[COST_TERMS];
    terms_of(step, x);
    double size = took_us > MIN_STEP_US ? took_us : MIN_STEP_US;
    double error = (took_us - dot(f->theta, x)) / size;
    double off = fabs(error);
    if (!isfinite(error))
        return;
    double weight = off > OUTLIER * f->spread ? OUTLIER * f->spread / off : 1;
    f->spread += SPREAD_RATE * ((off < 2 ? off : 2) * 1.25 - f->spread); /* 1.25: from mean to standard deviation */
    f->spread = f->spread > 0.002 ? f->spread : 0.002;
    for (int i = 0; i < COST_TERMS; i++)
        x[i] /= size;
    for (int i = 0; i < COST_TERMS; i++) {
        f->target[i] = f->target[i] * FORGET + weight * x[i] * (took_us / size);
        for (int k = 0; k < COST_TERMS; k++)
            f->info[i][k] = f->info[i][k] * FORGET + weight * x[i] * x[k];
    }
    f->seen++;
    fit_solve(f);
}

void cost_observe(struct cost_model *m, const struct cost_step *step, double took_us)
{
    if (!(took_us > 0) || took_us > MAX_STEP_US || (step->decodes == 0 && step->rows == 0))
        return;
    if (step->decodes == 0 || step->rows == 0) {
        fit_update(&m->pure, step, took_us);
        return;
    }
    if (m->hybrid.seen == 0 && !m->known) {
        memcpy(m->hybrid.theta, m->pure.theta, sizeof m->hybrid.theta);
        m->hybrid.spread = m->pure.spread;
    }
    fit_update(&m->hybrid, step, took_us);
    if (!m->known && m->hybrid.seen < OWN_STEPS) /* what little is known of the sum is better than a guess */
        fit_update(&m->pure, step, took_us);
}

bool cost_known(const struct cost_model *m)
{
    return m->known || m->pure.seen + m->hybrid.seen >= KNOWN_STEPS;
}

double cost_spread(const struct cost_model *m)
{
    return m->hybrid.seen >= OWN_STEPS ? m->hybrid.spread : m->pure.spread;
}

uint32_t cost_rows_within(const struct cost_model *m, const struct cost_step *step, uint32_t position,
                          uint32_t max_rows, double limit_us)
{
    struct cost_step with = *step;
    if (max_rows == 0)
        return 0;
    with.rows += 1;
    const double *theta = fit_of(m, &with)->theta;
    double x[COST_TERMS];
    terms_of(step, x);
    /* a n^2 + b n <= left */
    double left = limit_us - dot(theta, x), pair = theta[4] * SCALE[4];
    double a = pair / 2, b = theta[3] * SCALE[3] + pair * (position + 0.5);
    if (left <= 0)
        return 0;
    double n = a > 0 ? 2 * left / (b + sqrt(b * b + 4 * a * left)) : b > 0 ? left / b : max_rows;
    return n >= max_rows ? max_rows : (uint32_t)n;
}

static struct cost_coef coef_of(const struct cost_fit *f)
{
    return (struct cost_coef){.fixed_us = f->theta[0] * SCALE[0],
                              .decode_us = f->theta[1] * SCALE[1],
                              .kv_us = f->theta[2] * SCALE[2],
                              .row_us = f->theta[3] * SCALE[3],
                              .pair_us = f->theta[4] * SCALE[4]};
}

struct cost_profile cost_get(const struct cost_model *m)
{
    bool own = m->known || m->hybrid.seen >= OWN_STEPS;
    return (struct cost_profile){
        .pure = coef_of(&m->pure), .hybrid = coef_of(own ? &m->hybrid : &m->pure), .known = cost_known(m)};
}
