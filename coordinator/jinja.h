/* jinja.h - the part of the Jinja template language that chat templates are written in. Prefix jinja_.
 *
 *     jinja_compile(&t, source, strlen(source), st);
 *     jinja_render(t, context, &text, &bytes, st);      // context: a JSON object, {"messages": [...], "bos_token": ...}
 *     free(text);  jinja_free(t);
 *
 * Follows Jinja2 3.1 as Hugging Face sets it up for chat templates: trim_blocks, lstrip_blocks, no autoescape, break and
 * continue, an immutable sandbox, raise_exception(), strftime_now() and a tojson that neither sorts nor escapes.
 *
 *   statements    for (with else, if, tuple targets), if, set (also of blocks and of a namespace's attribute), macro,
 *                 filter, with, raw, generation, break, continue, comments, whitespace control
 *   expressions   all of Jinja's operators, literals, slices, calls with keywords; tests, filters, methods of strings,
 *                 lists and dictionaries: the tables in jinja_filter.c, jinja_test.c and jinja_method.c. str.format knows no
 *                 widths ("{:>8}"), keys of dictionaries are strings and integers
 *
 * What is not supported (include, extends, call, recursive loops, a filter that is not in the table ...) is refused by its
 * name when the template is compiled, never ignored. A method is known only by its object and is refused on rendering; so is,
 * as in Jinja2, a filter or test that stands within an if: other messages may never reach it.
 *
 * Threads: a compiled template does not change; any number may render it at the same time.
 */
#ifndef TANDEM_JINJA_H
#define TANDEM_JINJA_H

#include <jansson.h>
#include <stddef.h>

#include "proto/status.h"

struct jinja;

#define JINJA_MAX_SOURCE_BYTES (1u << 20)
#define JINJA_MAX_OUTPUT_BYTES (16u << 20)
#define JINJA_MAX_MEMORY_BYTES (256u << 20) /* of one render: all values made on the way */
#define JINJA_MAX_STEPS        20000000u    /* of one render: nodes evaluated and elements walked */

/* The source is UTF-8; it is copied. INVALID_ARGUMENT: no valid template; UNIMPLEMENTED: a construct that is not supported.
 * Both say the line and what stands there. */
STATUS_MUST_CHECK enum status_code jinja_compile(struct jinja **out, const char *source, size_t bytes,
                                                 struct status *st);
void jinja_free(struct jinja *t); /* NULL is fine */
/* The first filter or test that will be refused where it is reached, as "line 3: ..."; NULL: there is none. The template's. */
const char *jinja_lacks(const struct jinja *t);

/* *text: NUL-terminated, the caller frees it. INVALID_ARGUMENT: raise_exception() of the template, with its message, or a
 * value that an operation cannot take; UNIMPLEMENTED: a method that is not supported; RESOURCE_EXHAUSTED: over a limit
 * above. The context is only read. */
STATUS_MUST_CHECK enum status_code jinja_render(const struct jinja *t, const json_t *context, char **text,
                                                size_t *bytes, struct status *st);

#endif
