/* threads.h - a fixed pool of threads for loops over independent items. Prefix threads_.
 *
 * The caller takes part; helpers wait without spinning for long (several ranks may share the cores). One loop at a time.
 */
#ifndef TANDEM_THREADS_H
#define TANDEM_THREADS_H

#include <stdint.h>

#include "proto/status.h"

struct thread_pool;

/* threads: the caller included, at least 1. */
STATUS_MUST_CHECK enum status_code threads_create(struct thread_pool **out, uint32_t threads, struct status *st);
void threads_destroy(struct thread_pool *p); /* NULL is fine */
uint32_t threads_count(const struct thread_pool *p);
/* fn(arg, i, worker) for i in 0..n-1, in any order, worker in 0..threads-1; returns when all are done. */
void threads_for(struct thread_pool *p, uint32_t n, void (*fn)(void *arg, uint32_t i, uint32_t worker), void *arg);

#endif
