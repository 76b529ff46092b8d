/* nvtx_tool.c - a tool for NVTX, the least that is one: counts the ranges of a program and says so when it ends.
 *
 *     NVTX_INJECTION64_PATH=lib/libnvtx_tool.so NVTX_TOOL_OUT=FILE PROGRAM
 *
 * Shows without Nsight Systems that the ranges of cuda_ranges.h arrive: a line for each name with how often, how deep, and the
 * largest value; a last one with ranges that were not closed. Not locked: the ranges of one thread.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <nvtx3/nvToolsExt.h>

#define NAMES_MAX  64
#define NAME_BYTES 64
#define DEPTH_MAX  32

struct range {
    char name[NAME_BYTES];
    uint64_t count, value_max;
    unsigned depth;
};

static struct range ranges[NAMES_MAX];
static unsigned depth;
static uint64_t pops_too_many, left_out;

static struct range *named(const char *name)
{
    for (unsigned i = 0; i < NAMES_MAX; i++) {
        if (ranges[i].count == 0)
            snprintf(ranges[i].name, NAME_BYTES, "%s", name);
        if (strncmp(ranges[i].name, name, NAME_BYTES - 1) == 0)
            return &ranges[i];
    }
    return NULL;
}

static int NVTX_API push(const nvtxEventAttributes_t *a)
{
    struct range *r = named(a->messageType == NVTX_MESSAGE_TYPE_ASCII ? a->message.ascii : "(no text)");
    if (r) {
        r->count++;
        r->depth = depth;
        if (a->payloadType == NVTX_PAYLOAD_TYPE_UNSIGNED_INT64 && a->payload.ullValue > r->value_max)
            r->value_max = a->payload.ullValue;
    } else {
        left_out++;
    }
    return (int)depth++;
}

static int NVTX_API pop(void)
{
    if (depth == 0) {
        pops_too_many++;
        return -1;
    }
    return (int)--depth;
}

static void say(void)
{
    const char *path = getenv("NVTX_TOOL_OUT");
    FILE *f = path ? fopen(path, "w") : stderr;
    if (!f) {
        fprintf(stderr, "nvtx_tool: %s: cannot be written\n", path);
        return;
    }
    for (unsigned i = 0; i < NAMES_MAX && ranges[i].count; i++)
        fprintf(f, "%-24s %8llu times, %u deep, value at most %llu\n", ranges[i].name,
                (unsigned long long)ranges[i].count, ranges[i].depth, (unsigned long long)ranges[i].value_max);
    fprintf(f, "open at the end: %u; ends without a beginning: %llu; names left out: %llu\n", depth,
            (unsigned long long)pops_too_many, (unsigned long long)left_out);
    if (path)
        fclose(f);
}

int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table);

int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table)
{
    const NvtxExportTableCallbacks *callbacks = get_table(NVTX_ETID_CALLBACKS);
    NvtxFunctionTable table;
    unsigned size = 0;
    if (!callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &table, &size) ||
        size <= NVTX_CBID_CORE_RangePop)
        return 0;
    *table[NVTX_CBID_CORE_RangePushEx] = (NvtxFunctionPointer)(uintptr_t)push;
    *table[NVTX_CBID_CORE_RangePop] = (NvtxFunctionPointer)(uintptr_t)pop;
    return atexit(say) == 0;
}
