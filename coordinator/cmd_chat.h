/* cmd_chat.h - what the files of `tandem chat` share: cmd_chat_input.c reads lines, cmd_chat_talk.c holds the conversation
 * and lets the server answer, cmd_chat.c is the command. */
#ifndef TANDEM_CMD_CHAT_H
#define TANDEM_CMD_CHAT_H

#include "coordinator/cmd_sampling.h"

/* ---- signals ---- */

/* SIGINT and SIGTERM come through a descriptor: nothing is interrupted where it does not ask. */
int chat_signals_open(void); /* -1: errno says why */
/* The signal that has come, 0: none. Does not wait. */
int chat_signal(int fd);

/* ---- lines ---- */

enum chat_read { CHAT_LINE, CHAT_END, CHAT_INTERRUPTED, CHAT_TERMINATED, CHAT_FAILED };

struct chat_input;
/* terminal: with line editing and a history of lines; else lines as they are. NULL: no memory, or no such terminal. */
struct chat_input *chat_input_open(int signals, bool terminal);
/* *line without its end, freed by the caller. CHAT_FAILED: errno. */
enum chat_read chat_input_read(struct chat_input *in, const char *prompt, char **line);
void chat_input_close(struct chat_input *in); /* NULL is fine */

/* ---- the conversation ---- */

#define CHAT_MAX_MESSAGES 4096 /* of a request */

struct chat_talk {
    Tandem__V1__ChatMessage *messages[CHAT_MAX_MESSAGES]; /* role and content are ours */
    size_t n;
};

/* False: out of memory or full. role: a string constant. */
bool chat_talk_add(struct chat_talk *t, const char *role, const char *content, size_t bytes);
/* The first message, before all others; "" removes it. */
bool chat_talk_system(struct chat_talk *t, const char *content);
void chat_talk_cut(struct chat_talk *t, size_t n); /* leaves n messages */
/* {"messages": [{"role": ..., "content": ...}]} in a new file; false: errno. */
bool chat_talk_save(const struct chat_talk *t, const char *path);

struct chat_answer {
    char *text; /* malloc'ed */
    size_t bytes;
    bool interrupted;
    bool terminated;
    bool printed_any;
    bool stdout_broken;
    Tandem__V1__Finish__Reason reason;
    uint32_t prompt_tokens, new_tokens;
    double seconds;
};
/* Asks for the next message. print: as it comes, on standard output. SIGINT cancels: then OK with interrupted. */
STATUS_MUST_CHECK enum status_code chat_talk_ask(const struct chat_talk *t, struct tandem_client *client,
                                                 struct cmd_sampling *how, int signals, bool print,
                                                 struct chat_answer *out, struct status *st);

#endif
