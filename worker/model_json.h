/* model_json.h - reading the JSON files of a model folder, with errors that name file and field. Prefix json_read_.
 *
 * A field that is absent or null leaves *out as it is, so that callers set the default first; required fields are asked
 * for with json_read_need. All errors are INVALID_ARGUMENT "<file>: <field>: <what stands there>, expected <what may>".
 */
#ifndef TANDEM_MODEL_JSON_H
#define TANDEM_MODEL_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto/status.h"

/* An object in a file, and the file's name for messages. */
struct json_source {
    const char *file;
    const json_t *obj;
};

/* What it means that a file cannot be opened: NOT_FOUND, RESOURCE_EXHAUSTED or INVALID_ARGUMENT. */
enum status_code json_open_error(int err);

/* The whole file as a JSON object, to be given back with json_decref. NOT_FOUND; DATA_LOSS when it is no JSON object or
 * larger than max_bytes. */
STATUS_MUST_CHECK enum status_code json_read_file(json_t **out, const char *path, size_t max_bytes, struct status *st);
/* The same from memory; file is for messages. */
STATUS_MUST_CHECK enum status_code json_read_text(json_t **out, const char *text, size_t bytes, const char *file,
                                                  struct status *st);

STATUS_MUST_CHECK enum status_code json_read_need(struct json_source src, const char *field, struct status *st);
STATUS_MUST_CHECK enum status_code json_read_uint(struct json_source src, const char *field, uint32_t min, uint32_t max,
                                                  uint32_t *out, struct status *st);
STATUS_MUST_CHECK enum status_code json_read_double(struct json_source src, const char *field, double min, double max,
                                                    double *out, struct status *st);
STATUS_MUST_CHECK enum status_code json_read_bool(struct json_source src, const char *field, bool *out,
                                                  struct status *st);
/* *out points into the document. */
STATUS_MUST_CHECK enum status_code json_read_string(struct json_source src, const char *field, const char **out,
                                                    struct status *st);

#endif
