/* check_kernels_gpu.c - every kernel of the worker's own, one launch at a time, against the host: no cuBLASLt, no graphs, plain
 * memory, so that each of compute-sanitizer's tools can look at them (sanitize_engine.sh).
 *
 *     check_kernels_gpu [--small] [--bare] [NAME]   NAME: of the groups below, this one alone. Ends with 77 where there is no GPU
 *
 * --small leaves out large shapes, for checkers under which a launch takes seconds. --bare leaves out the guards around what
 * kernels write and read, which count as written memory: for initcheck.
 *
 * What no kernel may read is NaN, what none may write is looked at afterwards. Data is random, from a fixed seed for each group. What comes
 * out is compared to the bit where the host computes alike (embeddings, random weights, options, choices, tokens and ranks of scores);
 * else with double, or the host's float32, within the rounding to bf16, 2^-8 of the value, and what float32 sums may be off by.
 */
#include <stdio.h>
#include <string.h>

#include "tests/gpu/kernels_gpu.h"

static const struct group {
    const char *name;
    void (*cases)(struct kg *k);
} groups[] = {
    {"embed", kg_embed}, {"norm", kg_norm}, {"rope", kg_rope},     {"swiglu", kg_swiglu}, {"random", kg_random},
    {"few", kg_few},     {"glu", kg_glu},   {"adjust", kg_adjust}, {"sample", kg_sample}, {"score", kg_score},
};

static int usage(const char *program)
{
    fprintf(stderr, "usage: %s [--small] [--bare] [NAME], one of:", program);
    for (uint32_t i = 0; i < KG_COUNT(groups); i++)
        fprintf(stderr, " %s", groups[i].name);
    fprintf(stderr, "\n");
    return 2;
}

int main(int argc, char **argv)
{
    struct kg k = {.small = false};
    const char *only = NULL;
    struct cudaDeviceProp device;
    int devices = 0;
    bool known = true;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--small") == 0)
            k.small = true;
        else if (strcmp(argv[i], "--bare") == 0)
            k.bare = true;
        else
            only = argv[i];
    }
    for (uint32_t i = 0; only && i < KG_COUNT(groups); i++)
        if ((known = strcmp(only, groups[i].name) == 0))
            break;
    if (!known)
        return usage(argv[0]);
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("no GPU\n");
        return 77;
    }
    kg_launched(&k, cudaGetDeviceProperties(&device, 0));
    kg_launched(&k, cudaStreamCreateWithFlags(&k.stream, cudaStreamNonBlocking));
    printf("%s\n", device.name);
    for (uint32_t i = 0; i < KG_COUNT(groups); i++) {
        if (only && strcmp(only, groups[i].name) != 0)
            continue;
        k.random = i;
        groups[i].cases(&k);
    }
    kg_launched(&k, cudaStreamDestroy(k.stream));
    printf("%s: %u cases, %u failures\n", k.failures ? "FAILED" : "ok", k.cases, k.failures);
    return k.failures != 0;
}
