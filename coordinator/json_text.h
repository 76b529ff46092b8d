/* json_text.h - JSON written piece by piece into a buffer that grows. Prefix json_text_.
 *
 * Out of memory is kept in `failed`: look once, at the end. The caller sets the commas; starts as all zero. */
#ifndef TANDEM_JSON_TEXT_H
#define TANDEM_JSON_TEXT_H

#include <stdbool.h>
#include <stddef.h>

#include "proto/status.h"

struct json_text {
    char *p;
    size_t n, cap;
    bool failed;
};

void json_text_free(struct json_text *t);
/* Room for so many bytes behind p + n; false: out of memory. */
bool json_text_reserve(struct json_text *t, size_t more);
void json_text_add(struct json_text *t, const void *bytes, size_t n);
void json_text_put(struct json_text *t, const char *literal);
void json_text_format(struct json_text *t, const char *fmt, ...) STATUS_PRINTF(2, 3);
/* A JSON string, with its quotes. text: UTF-8. */
void json_text_string(struct json_text *t, const void *text, size_t n);
/* A number that is none in JSON (NaN, infinite) becomes -9999, as elsewhere for log probabilities. */
void json_text_number(struct json_text *t, double v);

#endif
