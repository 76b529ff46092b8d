/* journal_file.c - the newest segment: begun with all that lives, appended to, given up at the first error.
 *
 *     begin ──▶ whole ──a call fails──▶ degraded (fd -1): nothing is written ──each second: begin──▶ whole
 *                 '──half of max_bytes──▶ begin
 *
 * A segment whose beginning fails is removed again; the one before it stays until then, and is all that a reader looks at. An
 * append that fails leaves the segment as it was before, cut there if the system lets us: a torn end means the same. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/journal_internal.h"

#define OUT_BYTES  (256u << 10) /* of a snapshot between two writes */
#define MAX_TOKENS 65535u       /* of a record */

static bool give_up(struct journal_file *f, const char *what)
{
    f->error = errno;
    f->failed = what;
    f->stats.errors++;
    f->stats.degraded = true;
    f->out_len = 0;
    f->unsynced_us = 0;
    f->tried_us = f->io.now_us(f->io.ctx);
    if (f->fd >= 0)
        close(f->fd);
    f->fd = -1;
    return false;
}

/* 0, or errno. */
static int write_all(struct journal_file *f)
{
    size_t at = 0;
    while (at < f->out_len) {
        ssize_t n = f->io.write(f->io.ctx, f->fd, f->out + at, f->out_len - at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? errno : ENOSPC;
        at += (size_t)n;
    }
    f->size += f->out_len;
    f->stats.bytes += f->out_len;
    f->out_len = 0;
    return 0;
}

static bool out_reserve(struct journal_file *f, size_t more)
{
    if (f->out_cap - f->out_len >= more)
        return true;
    size_t cap = f->out_len + more + f->out_len / 2 + 4096;
    uint8_t *p = realloc(f->out, cap);
    if (!p)
        return false;
    f->out = p;
    f->out_cap = cap;
    return true;
}

/* Room for a frame; its payload is to be written to what comes back, then sealed. NULL: memory is short. */
static uint8_t *frame(struct journal_file *f, size_t payload)
{
    if (!out_reserve(f, JOURNAL_FRAME_BYTES + payload))
        return NULL;
    uint8_t *at = f->out + f->out_len;
    f->out_len += JOURNAL_FRAME_BYTES + payload;
    return at;
}

bool journal_file_add(struct journal_file *f, const uint8_t *payload, size_t n)
{
    uint8_t *at = frame(f, n);
    if (!at)
        return false;
    memcpy(at + JOURNAL_FRAME_BYTES, payload, n);
    journal_seal(at, (uint32_t)n);
    return true;
}

/* ---- beginning ---- */

static int put_entry(struct journal_file *f, const struct journal_entry *e)
{
    uint8_t *at;
    if (!journal_file_add(f, e->payload, e->payload_len))
        return ENOMEM;
    for (uint32_t c = 0; c < e->accept.n_choices; c++) {
        const struct journal_ids *l = &e->choice[c];
        for (uint32_t from = 0, n; from < l->n; from += n) {
            n = l->n - from < MAX_TOKENS ? l->n - from : MAX_TOKENS;
            if (!(at = frame(f, JOURNAL_TOKENS_BYTES + (size_t)n * 4)))
                return ENOMEM;
            journal_put_tokens(at + JOURNAL_FRAME_BYTES, e->accept.number, c, from, l->id + from, n);
            journal_seal(at, JOURNAL_TOKENS_BYTES + n * 4);
        }
    }
    if (e->until_us) {
        if (!(at = frame(f, JOURNAL_END_BYTES)))
            return ENOMEM;
        journal_put_end(at + JOURNAL_FRAME_BYTES, e->accept.number, e->until_us);
        journal_seal(at, JOURNAL_END_BYTES);
    }
    return 0;
}

static int put_snapshot(struct journal_file *f, const struct journal_state *s)
{
    int err = 0;
    if (!out_reserve(f, JOURNAL_HEADER_BYTES))
        return ENOMEM;
    journal_put_header(f->out, f->sequence, f->io.now_us(f->io.ctx));
    f->out_len = JOURNAL_HEADER_BYTES;
    for (const struct journal_entry *e = journal_first(s); e && !err; e = journal_next(s, e)) {
        err = put_entry(f, e);
        if (!err && f->out_len >= OUT_BYTES)
            err = write_all(f);
    }
    uint8_t *at = err ? NULL : frame(f, JOURNAL_SNAP_BYTES);
    if (!at)
        return err ? err : ENOMEM;
    journal_put_snapshot(at + JOURNAL_FRAME_BYTES, s->next_number);
    journal_seal(at, JOURNAL_SNAP_BYTES);
    return write_all(f);
}

/* All segments but `keep` go. One that cannot is older, and no reader's first choice. */
static void remove_others(struct journal_file *f, uint64_t keep)
{
    uint64_t sequence;
    int fd = openat(f->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (!d) {
        if (fd >= 0)
            close(fd);
        return;
    }
    for (struct dirent *e; (e = readdir(d));)
        if (journal_file_sequence(e->d_name, &sequence) && sequence != keep &&
            f->io.unlink(f->io.ctx, f->dir, e->d_name) != 0)
            f->stats.errors++;
    closedir(d);
}

/* A disk that is full of nothing but old segments would stay full: where nothing lives they are of no use. */
static void make_way(struct journal_file *f, const struct journal_state *s)
{
    if (f->stats.degraded && f->error == ENOSPC && s->n == 0)
        remove_others(f, 0);
}

bool journal_file_begin(struct journal_file *f, const struct journal_state *s)
{
    char name[JOURNAL_NAME_BYTES];
    make_way(f, s);
    if (f->fd >= 0)
        close(f->fd);
    f->out_len = 0;
    f->size = 0;
    f->sequence++; /* also when it fails: a name is used once */
    journal_file_name(name, f->sequence);
    f->fd = f->io.open(f->io.ctx, f->dir, name, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC);
    if (f->fd < 0)
        return give_up(f, "opening a segment");
    int err = put_snapshot(f, s);
    /* the folder, too: its name has to be there before the older ones go */
    if (!err && f->sync_ms && (f->io.sync(f->io.ctx, f->fd) != 0 || f->io.sync(f->io.ctx, f->dir) != 0))
        err = errno;
    if (err) {
        (void)!f->io.unlink(f->io.ctx, f->dir, name);
        errno = err;
        return give_up(f, "beginning a segment");
    }
    f->stats.syncs += f->sync_ms > 0;
    remove_others(f, f->sequence);
    f->unsynced_us = 0;
    f->stats.segments++;
    f->stats.degraded = false;
    f->stats.file_bytes = f->size;
    return true;
}

/* ---- going on ---- */

static bool sync_due(struct journal_file *f, bool sync_now)
{
    int64_t now_us = f->io.now_us(f->io.ctx);
    if (!f->unsynced_us ||
        (!sync_now && now_us - f->unsynced_us < (int64_t)f->sync_ms * 1000 && now_us >= f->unsynced_us))
        return false;
    return f->sync_ms > 0;
}

bool journal_file_flush(struct journal_file *f, bool sync_now)
{
    if (f->fd < 0)
        return false;
    uint64_t good = f->size;
    bool any = f->out_len > 0;
    int err = write_all(f);
    if (err) {
        (void)!f->io.truncate(f->io.ctx, f->fd, (off_t)good);
        errno = err;
        return give_up(f, "writing");
    }
    if (any && !f->unsynced_us)
        f->unsynced_us = f->io.now_us(f->io.ctx);
    f->stats.file_bytes = f->size;
    if (!sync_due(f, sync_now))
        return true;
    if (f->io.sync(f->io.ctx, f->fd) != 0)
        return give_up(f, "syncing"); /* what the system had of it may be gone: all is written anew */
    f->unsynced_us = 0;
    f->stats.syncs++;
    return true;
}

void journal_file_fini(struct journal_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    f->fd = -1;
    free(f->out);
    f->out = NULL;
}
