/* coord_spans.c - spans of requests to a file, and their text in the log. Engine thread. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/coord_internal.h"

/* The file of --spans grows no further. */
#define SPANS_MAX_BYTES (1ll << 30)

enum status_code span_file_open(struct coord *c, struct status *st)
{
    c->spans_fd = open(c->opt.spans_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY, 0600);
    return c->spans_fd >= 0 ? ST_OK
                            : status_errno(st, errno == ENOENT ? ST_NOT_FOUND : ST_PERMISSION_DENIED, errno,
                                           "--spans: %s", c->opt.spans_path);
}

static void give_up(struct coord *c, const char *why)
{
    log_line(&c->log, LOG_WARN, "no more spans are written to %s: %s", c->opt.spans_path, why);
    close(c->spans_fd);
    c->spans_fd = -1;
}

/* From the monotonic clock to the one of dates; 0 stays 0. */
static int64_t wall_us(int64_t us, int64_t offset_us)
{
    return us ? us + offset_us : 0;
}

void span_end(struct coord *c, const struct request *r, enum status_code code, int64_t now_us)
{
    uint8_t random[40];
    struct timespec ts;
    struct stat sb;
    struct json_text line = {0};
    if (c->spans_fd < 0 || !r->parent.sampled || getrandom(random, sizeof random, 0) != sizeof random)
        return;
    clock_gettime(CLOCK_REALTIME, &ts);
    int64_t offset_us = (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000 - now_us;
    const struct sched_event *end = r->choice && r->choice[0].finish_ready ? &r->choice[0].end : NULL;
    struct spans_request s = {.name = r->name,
                              .model = c->opt.served_name,
                              .code = code == ST_OK ? "OK" : status_name(code),
                              .failed = code != ST_OK,
                              .arrived_us = wall_us(r->arrived_us, offset_us),
                              .ended_us = wall_us(now_us, offset_us),
                              .prompt_tokens = r->n_prompt};
    for (uint32_t i = 0; r->choice && i < r->n_choices; i++)
        s.new_tokens += r->choice[i].n_new;
    if (end) {
        s.started_us = wall_us(end->started_us, offset_us);
        s.first_token_us = wall_us(end->first_token_us, offset_us);
        s.last_token_us = wall_us(end->last_token_us, offset_us);
        s.cached_tokens = end->n_cached;
    }
    spans_line(&line, &r->parent, &s, random);
    if (line.failed)
        goto done;
    if (fstat(c->spans_fd, &sb) || (S_ISREG(sb.st_mode) && sb.st_size > SPANS_MAX_BYTES))
        give_up(c, "it has 1 GiB");
    else if (write(c->spans_fd, line.p, line.n) != (ssize_t)line.n)
        give_up(c, strerror(errno));
done:
    json_text_free(&line);
}
