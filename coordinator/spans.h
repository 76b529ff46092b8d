/* spans.h - traces of requests: W3C's traceparent in, OTLP's JSON out, one line a request. Prefix spans_.
 *
 * traceparent: "00-" 32 hex digits "-" 16 hex digits "-" 2 hex digits, lower case (https://www.w3.org/TR/trace-context/). One
 * that is none, or of a version that cannot be, counts as not there. The file's lines are ExportTraceServiceRequest in JSON
 * (opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding), as collectors' file receivers read them.
 */
#ifndef TANDEM_SPANS_H
#define TANDEM_SPANS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "coordinator/json_text.h"

struct spans_parent {
    bool there;   /* else a trace begins here */
    bool sampled; /* whoever called wants it kept */
    uint8_t trace[16], span[8];
};

/* text NULL: not there. */
struct spans_parent spans_parent_parse(const char *text);

/* Of one request; microseconds since 1970, 0: did not come to that. */
struct spans_request {
    const char *name, *model, *code; /* code: "OK" or the status' name; UTF-8, as the others */
    bool failed;
    int64_t arrived_us, started_us, first_token_us, last_token_us, ended_us;
    uint32_t prompt_tokens, new_tokens, cached_tokens;
};
/* One line with its end. random: 40 bytes; ids are made of them, none is all zeros. */
void spans_line(struct json_text *out, const struct spans_parent *parent, const struct spans_request *r,
                const uint8_t random[40]);

#endif
