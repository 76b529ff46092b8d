/* trace.h - arrivals of requests and their lengths, from a CSV file. Prefix trace_.
 *
 *     arrival_s,prompt_tokens,output_tokens        a first line with names is optional; it may put the columns in any order,
 *     0.000,512,128                                and have others beside them
 *     0.350,1024,64                                # a comment; empty lines are skipped
 *
 * Names that are known, in any case: arrival_s, arrival, timestamp, time; prompt_tokens, input_tokens, contexttokens;
 * output_tokens, generatedtokens, completion_tokens. Arrivals are seconds, or dates as 2023-11-16 18:17:03.9799600, which
 * count from the first one. They do not go back.
 */
#ifndef TANDEM_TRACE_H
#define TANDEM_TRACE_H

#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

#define TRACE_MAX_BYTES   (256u << 20)
#define TRACE_MAX_ENTRIES (4u << 20)
#define TRACE_MAX_TOKENS  (1u << 24) /* of a prompt, of an answer */

struct trace_entry {
    double arrival_s;                      /* 0 or more */
    uint32_t prompt_tokens, output_tokens; /* 1 or more */
};

struct trace {
    struct trace_entry *entry; /* by arrival */
    size_t n;
};

/* name: for messages. INVALID_ARGUMENT: "NAME:LINE: ..."; a trace without entries is one, too. RESOURCE_EXHAUSTED. */
STATUS_MUST_CHECK enum status_code trace_parse(struct trace *out, const char *name, const char *text, size_t bytes,
                                               struct status *st);
STATUS_MUST_CHECK enum status_code trace_load(struct trace *out, const char *path, struct status *st);
void trace_free(struct trace *t); /* fine on zeroed memory */

#endif
