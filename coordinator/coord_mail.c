#include <errno.h>
#include <string.h>
#include <time.h>

#include "coordinator/coord_internal.h"

enum status_code mailbox_init(struct mailbox *box, struct status *st)
{
    memset(box, 0, sizeof *box);
    for (int i = 0; i < 2; i++)
        box->tail[i] = &box->head[i];
    pthread_condattr_t attr;
    int err = pthread_condattr_init(&attr);
    if (err)
        return status_errno(st, ST_INTERNAL, err, "pthread_condattr_init");
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    err = pthread_cond_init(&box->cond, &attr);
    pthread_condattr_destroy(&attr);
    if (!err)
        err = pthread_mutex_init(&box->mu, NULL);
    return err ? status_errno(st, ST_INTERNAL, err, "pthread_mutex_init") : ST_OK;
}

void mailbox_fini(struct mailbox *box)
{
    pthread_cond_destroy(&box->cond);
    pthread_mutex_destroy(&box->mu);
}

void mailbox_post(struct mailbox *box, struct mail *mail, uint32_t flags, atomic_uint *refs)
{
    pthread_mutex_lock(&box->mu);
    mail->flags |= flags;
    if (!mail->queued) {
        if (refs) /* under the lock: the engine may take the node and drop the reference at once */
            atomic_fetch_add_explicit(refs, 1, memory_order_relaxed);
        int lane = mail->kind == MAIL_CONN ? 0 : 1;
        mail->queued = true;
        mail->next = NULL;
        *box->tail[lane] = mail;
        box->tail[lane] = &mail->next;
    }
    bool wake = box->waiting;
    box->waiting = false;
    pthread_mutex_unlock(&box->mu);
    if (wake)
        pthread_cond_signal(&box->cond);
}

bool mailbox_has_ranks(struct mailbox *box)
{
    pthread_mutex_lock(&box->mu);
    bool any = box->head[0] != NULL;
    pthread_mutex_unlock(&box->mu);
    return any;
}

struct mail *mailbox_take(struct mailbox *box, uint32_t *flags, int64_t until_us)
{
    struct mail *m = NULL;
    pthread_mutex_lock(&box->mu);
    while (!box->head[0] && !box->head[1] && until_us > 0) {
        struct timespec ts = {.tv_sec = until_us / 1000000, .tv_nsec = (until_us % 1000000) * 1000};
        box->waiting = true;
        int err = pthread_cond_timedwait(&box->cond, &box->mu, &ts);
        box->waiting = false;
        if (err == ETIMEDOUT)
            break;
    }
    int lane = box->head[0] ? 0 : 1;
    m = box->head[lane];
    if (m) {
        box->head[lane] = m->next;
        if (!m->next)
            box->tail[lane] = &box->head[lane];
        m->next = NULL;
        m->queued = false;
        *flags = m->flags;
        m->flags = 0;
    }
    pthread_mutex_unlock(&box->mu);
    return m;
}
