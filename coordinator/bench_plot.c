/* bench_plot.c - results as one SVG: tokens over time above, shares of times below. */
#include <math.h>

#include "coordinator/bench.h"

#define WIDTH  880
#define HEIGHT 620
#define LEFT   70
#define RIGHT  20
#define PANEL  220 /* height of each of the two */
#define TOP    40
#define GAP    80

struct panel {
    double top;       /* of its box */
    double low, high; /* of x, as logarithm when `logarithmic` */
    bool logarithmic;
};

static double x_of(const struct panel *p, double v)
{
    double at = p->logarithmic ? log10(v) : v;
    return LEFT + (at - p->low) / (p->high - p->low) * (WIDTH - LEFT - RIGHT);
}

static double y_of(const struct panel *p, double share)
{
    return p->top + PANEL * (1 - share);
}

static void box(FILE *to, const struct panel *p, const char *title, const char *below)
{
    fprintf(to,
            "<rect x=\"%d\" y=\"%g\" width=\"%d\" height=\"%d\" fill=\"none\" stroke=\"#888\"/>\n"
            "<text x=\"%d\" y=\"%g\" font-weight=\"bold\">%s</text>\n"
            "<text x=\"%d\" y=\"%g\" text-anchor=\"middle\">%s</text>\n",
            LEFT, p->top, WIDTH - LEFT - RIGHT, PANEL, LEFT, p->top - 10, title, (LEFT + WIDTH - RIGHT) / 2,
            p->top + PANEL + 38, below);
}

static void mark_x(FILE *to, const struct panel *p, double v)
{
    char text[32];
    snprintf(text, sizeof text, "%.4g", v);
    fprintf(to,
            "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%g\" y2=\"%g\" stroke=\"#ddd\"/><text x=\"%.1f\" y=\"%g\" "
            "text-anchor=\"middle\">%s</text>\n",
            x_of(p, v), x_of(p, v), p->top, p->top + PANEL, x_of(p, v), p->top + PANEL + 18, text);
}

static void mark_y(FILE *to, const struct panel *p, double share, double v, const char *unit)
{
    char text[32];
    snprintf(text, sizeof text, "%.4g%s", v, unit);
    fprintf(to,
            "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#ddd\"/><text x=\"%d\" y=\"%.1f\" "
            "text-anchor=\"end\">%s</text>\n",
            LEFT, WIDTH - RIGHT, y_of(p, share), y_of(p, share), LEFT - 6, y_of(p, share) + 4, text);
}

static void tokens_over_time(FILE *to, const struct bench_result *r)
{
    uint64_t most = 1;
    uint32_t last = 1;
    for (uint32_t i = 0; i < BENCH_SLICES; i++)
        if (r->tokens_of_slice[i]) {
            most = r->tokens_of_slice[i] > most ? r->tokens_of_slice[i] : most;
            last = i + 1;
        }
    const struct panel p = {.top = TOP, .low = 0, .high = last * r->slice_s};
    for (int i = 0; i <= 4; i++) {
        mark_x(to, &p, p.high * i / 4);
        mark_y(to, &p, i / 4.0, (double)most / r->slice_s * i / 4, "");
    }
    box(to, &p, "answer tokens a second", "seconds");
    fputs("<polyline fill=\"none\" stroke=\"#1f77b4\" stroke-width=\"1.5\" points=\"", to);
    for (uint32_t i = 0; i < last; i++)
        fprintf(to, "%.1f,%.1f %.1f,%.1f ", x_of(&p, i * r->slice_s),
                y_of(&p, (double)r->tokens_of_slice[i] / (double)most), x_of(&p, (i + 1) * r->slice_s),
                y_of(&p, (double)r->tokens_of_slice[i] / (double)most));
    fputs("\"/>\n", to);
}

static void curve(FILE *to, const struct panel *p, const struct bench_histogram *h, const char *colour,
                  const char *name, int place)
{
    fprintf(to, "<text x=\"%d\" y=\"%g\" fill=\"%s\">%s</text>\n", LEFT + 12, p->top + 20 + 18 * place, colour, name);
    if (h->n == 0)
        return;
    fprintf(to, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"1.5\" points=\"", colour);
    for (int i = 0; i <= 200; i++) {
        double v = bench_quantile(h, i / 200.0) * 1e3;
        fprintf(to, "%.1f,%.1f ", x_of(p, fmax(v, pow(10, p->low))), y_of(p, i / 200.0));
    }
    fputs("\"/>\n", to);
}

static void shares(FILE *to, const struct bench_result *r)
{
    const struct {
        const struct bench_histogram *h;
        const char *colour, *name;
    } all[] = {{&r->ttft, "#d62728", "first token"},
               {&r->gap, "#1f77b4", "between messages"},
               {&r->per_token, "#2ca02c", "per token"},
               {&r->latency, "#9467bd", "whole answer"}};
    double low = INFINITY, high = -INFINITY;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].h->n) {
            low = fmin(low, log10(fmax(bench_quantile(all[i].h, 0.01) * 1e3, 1e-3)));
            high = fmax(high, log10(fmax(all[i].h->max_s * 1e3, 1e-3)));
        }
    if (!(low <= high))
        low = high = 0;
    const struct panel p = {
        .top = TOP + PANEL + GAP, .low = floor(low), .high = ceil(high + 1e-9), .logarithmic = true};
    const struct panel wide = {p.top, p.low, p.high > p.low ? p.high : p.low + 1, true};
    for (int at = (int)wide.low; at <= (int)wide.high; at++)
        mark_x(to, &wide, pow(10, at));
    for (int i = 0; i <= 4; i++)
        mark_y(to, &wide, i / 4.0, 25.0 * i, " %");
    box(to, &wide, "share of times below", "milliseconds");
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        curve(to, &wide, all[i].h, all[i].colour, all[i].name, (int)i);
}

void bench_print_plot(FILE *to, const struct bench_result *r)
{
    fprintf(to,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
            "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
            WIDTH, HEIGHT, WIDTH, HEIGHT);
    tokens_over_time(to, r);
    shares(to, r);
    fputs("</svg>\n", to);
}
