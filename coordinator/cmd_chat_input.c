#include <errno.h>
#include <histedit.h>
#include <langinfo.h>
#include <locale.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>
#include <wchar.h>

#include "coordinator/cmd_chat.h"

#define HISTORY_LINES 1000

struct chat_input {
    int signals;
    const char *prompt;
    /* a terminal */
    EditLine *edit;
    History *history;
    mbstate_t decoder;
    /* else: what was read and is not yet taken */
    char *buffer;
    size_t have, room;
    bool ended;
    enum chat_read stopped; /* why the last read gave nothing */
};

int chat_signals_open(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    if (pthread_sigmask(SIG_BLOCK, &set, NULL))
        return -1;
    return signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
}

int chat_signal(int fd)
{
    struct signalfd_siginfo info;
    return read(fd, &info, sizeof info) == (ssize_t)sizeof info ? (int)info.ssi_signo : 0;
}

/* CHAT_LINE: standard input can be read. */
static enum chat_read wait_input(const struct chat_input *in)
{
    struct pollfd fds[2] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = in->signals, .events = POLLIN}};
    for (;;) {
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            return CHAT_FAILED;
        int sig = fds[1].revents ? chat_signal(in->signals) : 0;
        if (sig)
            return sig == SIGINT ? CHAT_INTERRUPTED : CHAT_TERMINATED;
        if (fds[0].revents)
            return CHAT_LINE;
    }
}

/* ---- a terminal ---- */

static int get_char(EditLine *edit, wchar_t *out)
{
    struct chat_input *in = NULL;
    el_get(edit, EL_CLIENTDATA, &in);
    for (;;) {
        char byte;
        in->stopped = wait_input(in);
        if (in->stopped != CHAT_LINE)
            return -1;
        ssize_t n = read(STDIN_FILENO, &byte, 1);
        if (n <= 0) {
            in->stopped = n ? CHAT_FAILED : CHAT_END;
            return (int)n;
        }
        size_t used = mbrtowc(out, &byte, 1, &in->decoder);
        if (used == (size_t)-2)
            continue; /* more bytes of this character are to come */
        if (used != (size_t)-1)
            return 1;
        memset(&in->decoder, 0, sizeof in->decoder); /* no character: left out */
    }
}

static char *get_prompt(EditLine *edit)
{
    struct chat_input *in = NULL;
    el_get(edit, EL_CLIENTDATA, &in);
    return (char *)in->prompt;
}

static bool open_terminal(struct chat_input *in)
{
    HistEvent event;
    setlocale(LC_CTYPE, "");
    if (strcmp(nl_langinfo(CODESET), "UTF-8") != 0) /* what we send is UTF-8 in any case */
        setlocale(LC_CTYPE, "C.UTF-8");
    in->edit = el_init("tandem", stdin, stdout, stderr);
    in->history = history_init();
    if (!in->edit || !in->history)
        return false;
    history(in->history, &event, H_SETSIZE, HISTORY_LINES);
    history(in->history, &event, H_SETUNIQUE, 1);
    el_set(in->edit, EL_CLIENTDATA, in);
    el_set(in->edit, EL_SIGNAL, 0);
    el_set(in->edit, EL_EDITOR, "emacs");
    el_set(in->edit, EL_HIST, history, in->history);
    el_set(in->edit, EL_PROMPT, get_prompt);
    el_set(in->edit, EL_GETCFN, get_char);
    el_source(in->edit, NULL); /* ~/.editrc */
    return true;
}

static enum chat_read read_terminal(struct chat_input *in, char **line)
{
    HistEvent event;
    int n = 0;
    el_resize(in->edit);
    in->stopped = CHAT_END;
    el_set(in->edit, EL_PREP_TERM,
           1); /* before the prompt: who answers it at once with Ctrl-D is not to meet a cooked terminal */
    const char *text = el_gets(in->edit, &n);
    if (!text || n <= 0)
        return in->stopped == CHAT_LINE ? CHAT_END : in->stopped; /* Ctrl-D is a character */
    if (*text != '\n')
        history(in->history, &event, H_ENTER, text);
    *line = strndup(text, strcspn(text, "\n"));
    return *line ? CHAT_LINE : CHAT_FAILED;
}

/* ---- plain lines ---- */

static enum chat_read read_plain(struct chat_input *in, char **line)
{
    for (;;) {
        char *end = in->have ? memchr(in->buffer, '\n', in->have) : NULL;
        if (end || (in->ended && in->have)) {
            size_t n = end ? (size_t)(end - in->buffer) : in->have, taken = end ? n + 1 : n;
            *line = strndup(in->buffer, n);
            memmove(in->buffer, in->buffer + taken, in->have - taken);
            in->have -= taken;
            return *line ? CHAT_LINE : CHAT_FAILED;
        }
        if (in->ended)
            return CHAT_END;
        enum chat_read can = wait_input(in);
        if (can != CHAT_LINE)
            return can;
        if (in->have == in->room) {
            char *grown = realloc(in->buffer, in->room + 65536);
            if (!grown)
                return CHAT_FAILED;
            in->buffer = grown;
            in->room += 65536;
        }
        ssize_t n = read(STDIN_FILENO, in->buffer + in->have, in->room - in->have);
        if (n < 0)
            return CHAT_FAILED;
        in->ended = n == 0;
        in->have += (size_t)n;
    }
}

struct chat_input *chat_input_open(int signals, bool terminal)
{
    struct chat_input *in = calloc(1, sizeof *in);
    if (!in)
        return NULL;
    in->signals = signals;
    if (terminal && !open_terminal(in)) {
        chat_input_close(in);
        return NULL;
    }
    return in;
}

enum chat_read chat_input_read(struct chat_input *in, const char *prompt, char **line)
{
    in->prompt = prompt;
    return in->edit ? read_terminal(in, line) : read_plain(in, line);
}

void chat_input_close(struct chat_input *in)
{
    if (!in)
        return;
    if (in->history)
        history_end(in->history);
    if (in->edit)
        el_end(in->edit);
    free(in->buffer);
    free(in);
}
