#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/cmd_chat.h"

#define LOOK_MS 50 /* how late Ctrl-C may be seen while nothing comes */

static void free_message(Tandem__V1__ChatMessage *m)
{
    if (m)
        free(m->content.data);
    free(m);
}

static Tandem__V1__ChatMessage *new_message(const char *role, const char *content, size_t bytes)
{
    Tandem__V1__ChatMessage *m = malloc(sizeof *m);
    if (!m)
        return NULL;
    tandem__v1__chat_message__init(m);
    m->role = (char *)role;
    m->content.data = malloc(bytes + 1);
    if (!m->content.data) {
        free(m);
        return NULL;
    }
    memcpy(m->content.data, content, bytes);
    m->content.len = bytes;
    return m;
}

bool chat_talk_add(struct chat_talk *t, const char *role, const char *content, size_t bytes)
{
    Tandem__V1__ChatMessage *m = t->n < CHAT_MAX_MESSAGES ? new_message(role, content, bytes) : NULL;
    if (m)
        t->messages[t->n++] = m;
    return m != NULL;
}

static bool has_system(const struct chat_talk *t)
{
    return t->n && strcmp(t->messages[0]->role, "system") == 0;
}

bool chat_talk_system(struct chat_talk *t, const char *content)
{
    bool had = has_system(t);
    if (*content) {
        Tandem__V1__ChatMessage *m =
            had || t->n < CHAT_MAX_MESSAGES ? new_message("system", content, strlen(content)) : NULL;
        if (!m)
            return false;
        if (had)
            free_message(t->messages[0]);
        else
            memmove(t->messages + 1, t->messages, t->n++ * sizeof *t->messages);
        t->messages[0] = m;
    } else if (had) {
        free_message(t->messages[0]);
        memmove(t->messages, t->messages + 1, --t->n * sizeof *t->messages);
    }
    return true;
}

void chat_talk_cut(struct chat_talk *t, size_t n)
{
    while (t->n > n)
        free_message(t->messages[--t->n]);
}

bool chat_talk_save(const struct chat_talk *t, const char *path)
{
    json_t *list = json_array(), *all = json_pack("{s:o}", "messages", list);
    bool ok = all != NULL;
    for (size_t i = 0; i < t->n; i++) {
        const Tandem__V1__ChatMessage *m = t->messages[i];
        if (json_array_append_new(list, json_pack("{s:s, s:s%}", "role", m->role, "content", m->content.data,
                                                  m->content.len))) { /* not UTF-8 */
            json_decref(all);
            errno = EILSEQ;
            return false;
        }
    }
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600); /* what was said is nobody else's business */
    FILE *f = fd >= 0 ? fdopen(fd, "w") : NULL;
    ok = f && ok && json_dumpf(all, f, JSON_INDENT(2)) == 0 && putc('\n', f) != EOF;
    if (f)
        ok = fclose(f) == 0 && ok;
    json_decref(all);
    return ok;
}

/* ---- asking ---- */

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static enum status_code take_message(struct chat_answer *a, const Tandem__V1__GenerateResponse *m, bool print,
                                     struct status *st)
{
    if (m->text.len) {
        char *grown = realloc(a->text, a->bytes + m->text.len + 1);
        if (!grown)
            return status_nomem(st, "answer", a->bytes + m->text.len + 1);
        a->text = grown;
        memcpy(a->text + a->bytes, m->text.data, m->text.len);
        a->bytes += m->text.len;
        a->text[a->bytes] = '\0';
        if (print && (fwrite(m->text.data, 1, m->text.len, stdout) != m->text.len || fflush(stdout)))
            a->stdout_broken = true;
    }
    if (m->finish) {
        a->reason = m->finish->reason;
        if (m->finish->usage) {
            a->prompt_tokens = m->finish->usage->prompt_tokens;
            a->new_tokens = m->finish->usage->completion_tokens;
        }
    }
    return a->stdout_broken ? status_errno(st, ST_CANCELLED, errno, "standard output") : ST_OK;
}

enum status_code chat_talk_ask(const struct chat_talk *t, struct tandem_client *client, struct cmd_sampling *how,
                               int signals, bool print, struct chat_answer *out, struct status *st)
{
    Tandem__V1__GenerateRequest request;
    Tandem__V1__Chat chat;
    struct tandem_generation *g = NULL;
    const Tandem__V1__GenerateResponse *m = NULL;
    double start_s = now_s();
    tandem__v1__generate_request__init(&request);
    tandem__v1__chat__init(&chat);
    chat.messages = (Tandem__V1__ChatMessage **)t->messages;
    chat.n_messages = t->n;
    request.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_CHAT;
    request.chat = &chat;
    cmd_sampling_apply(how, &request);
    *out = (struct chat_answer){0};
    enum status_code rc = tandem_generation_open(&g, client, 0, st);
    if (rc != ST_OK)
        return rc;
    tandem_generation_send(g, &request);
    for (bool more = true; more;) {
        bool timed_out = false;
        rc = tandem_generation_next(g, &m, LOOK_MS, &timed_out, st);
        if (rc == ST_OK && m)
            rc = take_message(out, m, print, st);
        more = timed_out || (rc == ST_OK && m);
        int sig = chat_signal(signals);
        if (sig && more) { /* behind the end it has nothing to stop */
            tandem_generation_cancel(g);
            out->interrupted = true;
            out->terminated = sig == SIGTERM;
            more = false;
            rc = ST_OK;
        }
    }
    tandem_generation_close(g);
    out->seconds = now_s() - start_s;
    return rc;
}
