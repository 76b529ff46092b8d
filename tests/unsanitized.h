/* unsanitized.h - for a suite's own arithmetic: what it compares with touches the suite's memory only, which no thread of
 * the product writes, so that sanitizers find nothing there and make it many times slower.
 */
#ifndef TANDEM_UNSANITIZED_H
#define TANDEM_UNSANITIZED_H

#define UNSANITIZED __attribute__((no_sanitize("address", "undefined", "thread")))

#endif
