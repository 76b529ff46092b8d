#include "worker/mapped_read.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>

/* All that a handler can reach: where this thread's call goes on, NULL outside of one, and who was asked before us. */
static _Thread_local sigjmp_buf *volatile resume;
static struct sigaction before;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void on_bus_error(int number)
{
    if (resume)
        siglongjmp(*resume, 1);
    sigaction(number, &before, NULL); /* not ours: the instruction runs again and meets the former action */
}

static void install(void)
{
    struct sigaction action = {.sa_handler = on_bus_error};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, NULL, &before);
    sigaction(SIGBUS, &action, NULL);
}

bool mapped_read(void (*fn)(void *arg), void *arg)
{
    sigjmp_buf here;
    pthread_once(&once, install);
    bool whole = sigsetjmp(here, 1) == 0;
    if (whole) {
        resume = &here;
        fn(arg);
    }
    resume = NULL;
    return whole;
}
