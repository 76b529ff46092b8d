/* fake_cupti.h - what tests ask of the imitation of CUPTI (fake_cupti.c), found in it with dlsym. */
#ifndef TANDEM_FAKE_CUPTI_H
#define TANDEM_FAKE_CUPTI_H

#include <stdbool.h>
#include <stdint.h>

struct fake_cupti_control {
    /* set by the test */
    int refuse_kind;         /* enabling it fails, */
    int refuse_with;         /* with this CUptiResult; 0: none fails */
    int version;             /* 0: that of the headers */
    bool no_own_clock;       /* the callback for times is refused, as by an old library */
    bool emits_when_enabled; /* the device is at work already */
    int64_t ahead_ns;        /* of its own clock before CLOCK_MONOTONIC */
    /* kept by the fake */
    uint32_t enabled; /* kinds, a bit each */
    int broken_rules; /* clock set after a kind was enabled, buffer given twice, record read beyond the end ... */
    bool forced;      /* the last flush was */
    /* called by the test: the device did something. kind: CUpti_ActivityKind; what: of copies, CUpti_ActivityMemcpyKind */
    void (*emit)(int kind, int what, const char *name, uint64_t bytes, uint64_t begin_ns, uint64_t end_ns);
    uint64_t (*clock)(void);
};

#define FAKE_CUPTI_CONTROL "fake_cupti" /* a struct fake_cupti_control */

#endif
