/* bench_number.h - options of a benchmark: all are whole numbers. */
#ifndef TANDEM_TESTS_BENCH_NUMBER_H
#define TANDEM_TESTS_BENCH_NUMBER_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct bench_number {
    const char *name;
    uint32_t *value;
};

/* options: ended by one without a name. What is wrong ends the program. */
static inline void bench_numbers(const char *program, const struct bench_number *options, int argc, char **argv)
{
    for (int i = 1; i < argc; i += 2) {
        const struct bench_number *o = options;
        char *end = NULL;
        while (o->name && strcmp(o->name, argv[i]) != 0)
            o++;
        unsigned long v = o->name && i + 1 < argc ? strtoul(argv[i + 1], &end, 10) : 0;
        if (!o->name || i + 1 == argc || *end || v > 10000000) {
            fprintf(stderr, "%s: %s: expected one of", program, argv[i]);
            for (o = options; o->name; o++)
                fprintf(stderr, " %s N", o->name);
            fprintf(stderr, ", N a number of at most 10000000\n");
            exit(2);
        }
        *o->value = (uint32_t)v;
    }
}

#endif
