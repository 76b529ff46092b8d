/* rpc_core.c - the gRPC core as a library: its start, signals, tags; and OpenSSL beside it. */
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/rpc_internal.h"

/* Threads of the core outlive main: what OpenSSL holds must stay until the process is gone, so it is not to clean up in exit(), where
 * they may be in a handshake, and after which leak checks no longer find what it keeps for each thread. Before anybody else's first use
 * of it, which would settle that. */
__attribute__((constructor)) static void keep_openssl(void)
{
    OPENSSL_init_crypto(OPENSSL_INIT_NO_ATEXIT, NULL);
}

void rpc_signals_block(sigset_t *old)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, old);
}

void rpc_signals_restore(const sigset_t *old)
{
    pthread_sigmask(SIG_SETMASK, old, NULL);
}

/* The core's own lines, with a hint where it does not say what people can do. Who is refused in a handshake has no call that
 * could carry a reason, so this line is all that there is. Any thread. */
static void core_log(gpr_log_func_args *a)
{
    const char *file = strrchr(a->file, '/'), *hint = "";
    if (strstr(a->message, "certificate verify failed"))
        hint = " The certificate that was shown has expired, is not valid yet, or is of no CA that is believed.";
    fprintf(stderr, "gRPC %s %s:%d: %s%s\n", gpr_log_severity_string(a->severity), file ? file + 1 : a->file, a->line,
            a->message, hint);
}

static void start_library(void)
{
    sigset_t old;
    gpr_set_log_function(core_log);
    if (!getenv("GRPC_VERBOSITY"))
        gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
    rpc_signals_block(&old);
    grpc_init();
    rpc_signals_restore(&old);
}

void rpc_core_start(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, start_library);
}

gpr_timespec rpc_after_ms(uint64_t ms)
{
    if (ms == 0 || ms > INT64_MAX / 1000)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis((int64_t)ms, GPR_TIMESPAN));
}

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#else
#define __tsan_acquire(p) ((void)(p))
#define __tsan_release(p) ((void)(p))
#endif

void rpc_tag_arm(struct rpc_tag *tag)
{
    if (tag->armed) {
        fprintf(stderr, "rpc: a tag was started twice\n");
        abort();
    }
    tag->armed = true;
    __tsan_release(tag);
}

void rpc_tag_disarm(struct rpc_tag *tag)
{
    __tsan_acquire(tag);
    if (!tag->armed) {
        fprintf(stderr, "rpc: a tag came back that was not out\n");
        abort();
    }
    tag->armed = false;
}

void rpc_tag_run(struct rpc_tag *tag, bool ok)
{
    rpc_tag_disarm(tag);
    tag->done(tag->owner, ok);
}

void rpc_batch_start(grpc_call *call, const grpc_op *ops, size_t n_ops, struct rpc_tag *tag)
{
    rpc_tag_arm(tag);
    grpc_call_error err = grpc_call_start_batch(call, ops, n_ops, tag, NULL);
    if (err != GRPC_CALL_OK) {
        fprintf(stderr, "rpc: the gRPC core refused a batch: %s\n", grpc_call_error_to_string(err));
        abort();
    }
}
