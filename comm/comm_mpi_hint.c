/* comm_mpi_hint.c - the last word when MPI_Init ends the process. MPI 3 cannot be told to return an error from there:
 * Open MPI prints what it knows, in its own terms, and calls _exit. So a child waits beside it, and speaks up when the
 * pipe between them closes before it was taken back. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "comm/comm_internal.h"

/* In the child: nothing but async-signal-safe calls, other threads may have held locks at the fork. */
static void wait_and_tell(int fd, const char *text, size_t len)
{
    char byte;
    while (read(fd, &byte, 1) < 0 && errno == EINTR)
        ;
    if (write(STDERR_FILENO, text, len) < 0)
        _exit(1);
    _exit(0);
}

void comm_hint_begin(struct comm_hint *h, const char *text)
{
    int fd[2];
    size_t len = strlen(text);
    h->child = -1;
    h->fd = -1;
    if (pipe(fd))
        return; /* the hint is a comfort: do without */
    h->child = fork();
    if (h->child == 0) {
        close(fd[1]);
        wait_and_tell(fd[0], text, len);
    }
    close(fd[0]);
    h->fd = fd[1];
}

void comm_hint_end(struct comm_hint *h)
{
    if (h->child > 0) {
        kill(h->child, SIGKILL);
        while (waitpid(h->child, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    if (h->fd >= 0)
        close(h->fd);
}
