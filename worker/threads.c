/* threads.c - the pool. One 64-bit word, `ticket`, holds the number of the loop and how many of its items nobody has
 * taken yet. A worker takes an item by a compare-and-swap that lowers the count; a helper that comes late to a loop that
 * is over finds another number or a count of 0, so threads_for never waits for helpers that have not woken up.
 *
 *   ticket   | loop number (32) | items not taken (32) |
 *
 * fn, arg and n of a loop are written before its ticket and kept until all its items are done. A worker reads them
 * between loading the ticket and the swap: when the swap succeeds an item was still open, so what it read was whole.
 */
#include "worker/threads.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_THREADS = 1024,
    LINE_BYTES = 64,
    /* How long a thread waits awake. About the time a futex wait and wake take, so that at worst the wait costs double;
     * the loops of a forward pass follow each other faster than this. */
    SPIN_NS = 15000,
    SPINS_PER_CLOCK = 16,
};

typedef void item_fn(void *arg, uint32_t i, uint32_t worker);

struct helper {
    struct thread_pool *pool;
    pthread_t thread;
    uint32_t worker;
};

struct thread_pool {
    /* written by the caller of threads_for, read by helpers */
    _Alignas(LINE_BYTES) _Atomic uint64_t ticket;
    _Atomic(item_fn *) fn;
    _Atomic(void *) arg;
    _Atomic uint32_t n;
    _Atomic uint32_t loop;     /* futex: helpers sleep on it; follows the number in the ticket */
    _Atomic uint32_t sleepers; /* helpers that sleep on loop or are about to */
    atomic_bool stop;

    /* written by whoever finishes items */
    _Alignas(LINE_BYTES) _Atomic uint32_t open; /* futex: items of this loop that are not done */
    _Atomic uint32_t caller_sleeps;

    /* the caller's own */
    _Alignas(LINE_BYTES) atomic_bool busy;
    uint32_t threads;
    uint32_t started; /* helpers */
    struct helper *helpers;
};

static void futex_wait(_Atomic uint32_t *word, uint32_t while_equal)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, while_equal, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, uint32_t count)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Waits awake, for SPIN_NS at most, until *word differs from old; returns its value. */
static uint32_t spin_while_equal(_Atomic uint32_t *word, uint32_t old)
{
    uint64_t until = 0;
    for (;;) {
        for (int i = 0; i < SPINS_PER_CLOCK; i++) {
            uint32_t v = atomic_load_explicit(word, memory_order_acquire);
            if (v != old)
                return v;
            cpu_relax();
        }
        uint64_t now = now_ns();
        if (!until)
            until = now + SPIN_NS;
        else if (now >= until)
            return old;
    }
}

/* Takes and runs items of the current loop until none is left to take. */
static void work(struct thread_pool *p, uint32_t worker)
{
    uint32_t done = 0;
    uint64_t t = atomic_load_explicit(&p->ticket, memory_order_acquire);
    while ((uint32_t)t) {
        item_fn *fn = atomic_load_explicit(&p->fn, memory_order_relaxed);
        void *arg = atomic_load_explicit(&p->arg, memory_order_relaxed);
        uint32_t n = atomic_load_explicit(&p->n, memory_order_relaxed);
        if (!atomic_compare_exchange_weak_explicit(&p->ticket, &t, t - 1, memory_order_acq_rel, memory_order_acquire))
            continue;
        fn(arg, n - (uint32_t)t, worker);
        done++;
        t = atomic_load_explicit(&p->ticket, memory_order_acquire);
        /* Items taken but not reported keep the loop open, so a next loop cannot begin meanwhile. */
    }
    if (!done)
        return;
    if (atomic_fetch_sub(&p->open, done) == done && atomic_load(&p->caller_sleeps))
        futex_wake(&p->open, 1);
}

static void *helper_main(void *arg)
{
    struct helper *h = arg;
    struct thread_pool *p = h->pool;
    uint32_t seen = 0;
    while (!atomic_load_explicit(&p->stop, memory_order_acquire)) {
        uint32_t loop = spin_while_equal(&p->loop, seen);
        if (loop == seen) {
            /* Counted before the kernel compares the word: the caller either sees us here or we see its new number. */
            atomic_fetch_add(&p->sleepers, 1);
            while ((loop = atomic_load(&p->loop)) == seen)
                futex_wait(&p->loop, seen);
            atomic_fetch_sub(&p->sleepers, 1);
        }
        seen = loop;
        work(p, h->worker);
    }
    return NULL;
}

static enum status_code start_helpers(struct thread_pool *p, struct status *st)
{
    sigset_t all, old;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);                  /* a thread's own, of a file that was cut: see mapped_read.h */
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals stay with the threads that expect them */
    int err = 0;
    for (uint32_t i = 0; i + 1 < p->threads && !err; i++) {
        struct helper *h = &p->helpers[i];
        h->pool = p;
        h->worker = i + 1;
        err = pthread_create(&h->thread, NULL, helper_main, h);
        if (!err) {
            pthread_setname_np(h->thread, "tandem-pool");
            p->started++;
        }
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return err ? status_errno(st, ST_RESOURCE_EXHAUSTED, err, "threads: cannot start thread %u of %u", p->started + 2,
                              p->threads)
               : ST_OK;
}

enum status_code threads_create(struct thread_pool **out, uint32_t threads, struct status *st)
{
    if (threads < 1 || threads > MAX_THREADS)
        return status_set(st, ST_INVALID_ARGUMENT, "threads: %u, expected 1 to %d", threads, MAX_THREADS);
    struct thread_pool *p = aligned_alloc(LINE_BYTES, sizeof *p);
    if (!p)
        return status_nomem(st, "thread pool", sizeof *p);
    *p = (struct thread_pool){.threads = threads};
    enum status_code rc;
    p->helpers = calloc(threads, sizeof *p->helpers);
    if (!p->helpers) {
        rc = status_nomem(st, "thread pool", threads * sizeof *p->helpers);
        goto fail;
    }
    rc = start_helpers(p, st);
    if (rc != ST_OK)
        goto fail;
    *out = p;
    return ST_OK;
fail:
    threads_destroy(p);
    return rc;
}

void threads_destroy(struct thread_pool *p)
{
    if (!p)
        return;
    atomic_store(&p->stop, true);
    atomic_fetch_add(&p->loop, 1);
    futex_wake(&p->loop, MAX_THREADS);
    for (uint32_t i = 0; i < p->started; i++)
        pthread_join(p->helpers[i].thread, NULL);
    free(p->helpers);
    free(p);
}

uint32_t threads_count(const struct thread_pool *p)
{
    return p->threads;
}

static void run_shared(struct thread_pool *p, uint32_t n, item_fn *fn, void *arg)
{
    atomic_store_explicit(&p->fn, fn, memory_order_relaxed);
    atomic_store_explicit(&p->arg, arg, memory_order_relaxed);
    atomic_store_explicit(&p->n, n, memory_order_relaxed);
    atomic_store_explicit(&p->open, n, memory_order_relaxed);
    uint32_t loop = atomic_load_explicit(&p->loop, memory_order_relaxed) + 1;
    atomic_store_explicit(&p->ticket, (uint64_t)loop << 32 | n, memory_order_release);
    atomic_store(&p->loop, loop);
    uint32_t sleepers = atomic_load(&p->sleepers);
    if (sleepers)
        futex_wake(&p->loop, n - 1 < sleepers ? n - 1 : sleepers);

    work(p, 0);

    uint32_t open;
    while ((open = atomic_load_explicit(&p->open, memory_order_acquire)) != 0) {
        if (spin_while_equal(&p->open, open) != open)
            continue;
        atomic_store(&p->caller_sleeps, 1);
        if (atomic_load(&p->open) == open)
            futex_wait(&p->open, open);
        atomic_store(&p->caller_sleeps, 0);
    }
}

void threads_for(struct thread_pool *p, uint32_t n, void (*fn)(void *arg, uint32_t i, uint32_t worker), void *arg)
{
    if (atomic_exchange_explicit(&p->busy, true, memory_order_acquire)) {
        fprintf(stderr, "threads_for: called while a loop of the same pool runs\n");
        abort(); /* the worker numbers, and with them everybody's scratch, would be given out twice */
    }
    if (n == 1 || p->threads == 1) {
        for (uint32_t i = 0; i < n; i++)
            fn(arg, i, 0);
    } else if (n > 1) {
        run_shared(p, n, fn, arg);
    }
    atomic_store_explicit(&p->busy, false, memory_order_release);
}
