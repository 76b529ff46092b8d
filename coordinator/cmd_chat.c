/* cmd_chat.c - `tandem chat`: a conversation with a server's model. */
#include <errno.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/cmd_chat.h"

enum { OPT_SYSTEM = 1, OPT_JSON, OPT_STATS };

static const struct cli_option own_options[] = {
    {.name = "system", .id = OPT_SYSTEM, .arg = "TEXT", .help = "system message, in front of the conversation"},
    {.name = "json",
     .id = OPT_JSON,
     .help = "print each answer as one JSON object on a line, when it is complete, and an error as {\"error\": {code, "
             "message}}"},
    {.name = "stats", .id = OPT_STATS, .help = "print token counts and the time of each answer on standard error"},
    {0},
};

#define CHAT_COMMANDS                                                                                                  \
    "  /help             this list\n"                                                                                  \
    "  /reset            forget the conversation, keep the system message\n"                                           \
    "  /system [TEXT]    set the system message; without TEXT remove it\n"                                             \
    "  /undo             forget the last message and its answer\n"                                                     \
    "  /retry            ask again for the last answer\n"                                                              \
    "  /save FILE        write the conversation to a new file, as JSON\n"                                              \
    "  /quit             end, as Ctrl-D does\n"

const struct cli_command cmd_chat_cli = {
    .name = "chat",
    .summary = "talk with the model of a server",
    .about = "Each line is a message; the answer is printed as it comes, and both stay in the conversation. On a "
             "terminal lines\n"
             "can be edited, the arrow keys bring earlier ones back, and a backslash at the end goes on in the next "
             "line. When\n"
             "standard input is no terminal, nothing but the answers is printed. The model needs a chat template.\n\n"
             "Lines that begin with a slash are commands; // at the beginning is a message that begins with one "
             "slash.\n\n" CHAT_COMMANDS,
    .tables = (const struct cli_option *const[]){cmd_connect_options, cmd_sampling_options, own_options, NULL},
    .notes = "Ctrl-C stops an answer, whose beginning stays in the conversation; at the prompt it clears the line.",
    .exits =
        "0 done, 1 the server refused or failed, 2 wrong usage, 3 not reachable, 130 interrupted without a terminal.",
    .examples = "  tandem chat --system \"Answer in one sentence.\"\n"
                "  printf 'Hello\\nWhy?\\n' | tandem chat --seed 7\n",
};

struct chat_session {
    struct tandem_client_options server;
    struct cli_args args;
    struct cmd_sampling how;
    const char *system;
    bool json, stats, terminal;
    struct tandem_client *client;
    struct chat_input *input;
    int signals;
    struct chat_talk talk;
};

enum { GO_ON = -1 }; /* else an exit status */

static void print_answer_json(const struct chat_answer *a)
{
    const char *finish = a->interrupted                                  ? "interrupted"
                         : a->reason == TANDEM__V1__FINISH__REASON__STOP ? "stop"
                                                                         : "length";
    json_t *out = json_pack("{s:s, s:s%, s:s, s:{s:I, s:I}}", "role", "assistant", "content", a->text ? a->text : "",
                            a->bytes, "finish", finish, "usage", "prompt_tokens", (json_int_t)a->prompt_tokens,
                            "completion_tokens", (json_int_t)a->new_tokens);
    json_dumpf(out, stdout, JSON_COMPACT);
    json_decref(out);
}

/* After an error of the server. What a later message cannot change ends the program; so does any without a terminal. */
static int answer_failed(const struct chat_session *s, const struct status *st)
{
    bool for_good =
        st->code == ST_FAILED_PRECONDITION || st->code == ST_UNIMPLEMENTED || st->code == ST_UNAUTHENTICATED;
    int rc = cmd_failed(st->code == ST_UNAVAILABLE ? CMD_UNREACHABLE : CMD_FAILED, "chat", s->json, st);
    return s->terminal && !for_good ? GO_ON : rc;
}

/* The last message is the user's. */
static int answer(struct chat_session *s)
{
    struct chat_answer a;
    struct status st = STATUS_INIT;
    int result = GO_ON;
    enum status_code rc = chat_talk_ask(&s->talk, s->client, &s->how, s->signals, !s->json, &a, &st);
    if (a.bytes || rc == ST_OK) {
        if (s->json && rc == ST_OK)
            print_answer_json(&a);
        if (!a.bytes || a.text[a.bytes - 1] != '\n' || s->json)
            putchar('\n');
        if (fflush(stdout) && !a.stdout_broken) {
            a.stdout_broken = true;
            status_errno(&st, ST_CANCELLED, errno, "standard output");
        }
    }
    if (a.stdout_broken) {
        result = cmd_error(CMD_FAILED, "chat", "%s", st.message);
    } else if (rc != ST_OK) {
        chat_talk_cut(&s->talk, s->talk.n - 1);
        result = answer_failed(s, &st);
    } else if (!a.bytes && a.interrupted) {
        chat_talk_cut(&s->talk, s->talk.n - 1); /* as if it had not been asked */
    } else if (!chat_talk_add(&s->talk, "assistant", a.text ? a.text : "", a.bytes)) {
        result = cmd_error(CMD_FAILED, "chat", "out of memory, or more than %d messages", CHAT_MAX_MESSAGES);
    }
    if (rc == ST_OK && s->stats)
        fprintf(stderr, "[%u prompt tokens, %u new, %.2f s%s]\n", a.prompt_tokens, a.new_tokens, a.seconds,
                a.interrupted ? ", interrupted" : "");
    free(a.text);
    return a.terminated && result == GO_ON ? 128 + SIGTERM : result;
}

static size_t first_message(const struct chat_session *s)
{
    return s->talk.n && strcmp(s->talk.messages[0]->role, "system") == 0;
}

/* Leaves the conversation before the last message of the user; false: there is none. */
static bool undo(struct chat_session *s, bool keep_question)
{
    size_t n = s->talk.n;
    while (n > first_message(s) && strcmp(s->talk.messages[n - 1]->role, "user") != 0)
        n--;
    if (n == first_message(s))
        return false;
    chat_talk_cut(&s->talk, keep_question ? n : n - 1);
    return true;
}

static int bad_command(const struct chat_session *s, const char *text)
{
    cmd_error(CMD_USAGE, "chat", "%s", text);
    return s->terminal ? GO_ON : CMD_USAGE;
}

/* line begins with a slash. */
static int command(struct chat_session *s, const char *line)
{
    size_t n = strcspn(line, " ");
    const char *rest = line + n + strspn(line + n, " ");
#define IS(name) (n == strlen(name) && strncmp(line, name, n) == 0)
    if (IS("/quit") || IS("/exit"))
        return CMD_OK;
    if (IS("/help")) {
        fputs(CHAT_COMMANDS, s->terminal ? stdout : stderr);
    } else if (IS("/reset")) {
        chat_talk_cut(&s->talk, first_message(s));
    } else if (IS("/system")) {
        if (!chat_talk_system(&s->talk, rest))
            return cmd_error(CMD_FAILED, "chat", "out of memory, or more than %d messages", CHAT_MAX_MESSAGES);
    } else if (IS("/undo")) {
        if (!undo(s, false))
            return bad_command(s, "/undo: nothing was said yet");
    } else if (IS("/retry")) {
        return undo(s, true) ? answer(s) : bad_command(s, "/retry: nothing was said yet");
    } else if (IS("/save")) {
        char text[512];
        if (!*rest)
            return bad_command(s, "/save: expected a file");
        if (!chat_talk_save(&s->talk, rest)) {
            snprintf(text, sizeof text, "/save %.300s: %s", rest, strerror(errno));
            return bad_command(s, text);
        }
    } else {
        return bad_command(s, "no such command; /help lists them, and // begins a message with a slash");
    }
#undef IS
    return GO_ON;
}

/* One message, of several lines where each but the last ends in a backslash. *out: freed by the caller; it stays NULL at the end,
 * and the exit status is returned. */
static int read_message(struct chat_session *s, char **out)
{
    char *all = NULL;
    for (size_t bytes = 0;;) {
        char *line = NULL;
        enum chat_read rc = chat_input_read(s->input, all ? ". " : "> ", &line);
        if (rc != CHAT_LINE) {
            free(all);
            all = NULL;
            bytes = 0;
            if (s->terminal)
                putchar('\n');
            if (rc == CHAT_INTERRUPTED && s->terminal)
                continue;
            return rc == CHAT_END           ? CMD_OK
                   : rc == CHAT_INTERRUPTED ? 130
                   : rc == CHAT_TERMINATED  ? 128 + SIGTERM
                                            : cmd_error(CMD_FAILED, "chat", "standard input: %s", strerror(errno));
        }
        size_t n = strlen(line);
        bool more = s->terminal && n && line[n - 1] == '\\';
        char *grown = realloc(all, bytes + n + 1);
        if (!grown) {
            free(line);
            free(all);
            return cmd_error(CMD_FAILED, "chat", "out of memory for a message of %zu bytes", bytes + n);
        }
        all = grown;
        memcpy(all + bytes, line, n + 1);
        free(line);
        bytes += n;
        if (!more) {
            *out = all;
            return GO_ON;
        }
        all[bytes - 1] = '\n';
    }
}

static int talk(struct chat_session *s)
{
    for (;;) {
        char *message = NULL;
        int rc = read_message(s, &message);
        if (!message)
            return rc;
        const char *text = message + strspn(message, " \t\r");
        if (!*text)
            rc = GO_ON;
        else if (text[0] == '/' && text[1] != '/')
            rc = command(s, text);
        else {
            text += text[0] == '/';
            rc = chat_talk_add(&s->talk, "user", text, strlen(text))
                     ? answer(s)
                     : cmd_error(CMD_FAILED, "chat", "out of memory, or more than %d messages", CHAT_MAX_MESSAGES);
        }
        free(message);
        if (rc != GO_ON)
            return rc;
    }
}

static int parse(int argc, char **argv, struct chat_session *s)
{
    int rc = cmd_read(&s->args, &cmd_chat_cli, argc, argv);
    if (rc)
        return rc;
    for (int opt; !rc && (opt = cli_next(&s->args)) != 0;) {
        if (cmd_connect_option(&s->server, opt, s->args.text) ||
            cmd_sampling_option(&s->how, s->args.where, opt, s->args.text, &rc))
            continue;
        s->system = opt == OPT_SYSTEM ? s->args.text : s->system;
        s->json |= opt == OPT_JSON;
        s->stats |= opt == OPT_STATS;
    }
    if (!rc && s->args.n_operands)
        rc = cmd_error(CMD_USAGE, "chat", "%s: messages come on standard input; see `tandem chat --help`",
                       s->args.operands[0]);
    return rc;
}

/* Who is there; a server that cannot be reached is told before anything is typed. */
static int greet(struct chat_session *s)
{
    struct status st = STATUS_INIT;
    Tandem__V1__ModelInfo *info = NULL;
    if (tandem_client_model_info(s->client, &info, &st) != ST_OK)
        return cmd_error(st.code == ST_UNAVAILABLE ? CMD_UNREACHABLE : CMD_FAILED, "chat", "%s (%s)", st.message,
                         status_name(st.code));
    printf("%s at %s. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.\n", info->name, s->server.address);
    tandem_free(info);
    return CMD_OK;
}

static int run(struct chat_session *s)
{
    struct status st = STATUS_INIT;
    signal(SIGPIPE, SIG_IGN);
    s->terminal = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
    s->signals = chat_signals_open();
    if (s->signals < 0)
        return cmd_error(CMD_FAILED, "chat", "signals: %s", strerror(errno));
    if (tandem_client_open(&s->client, &s->server, &st) != ST_OK)
        return cmd_error(CMD_FAILED, "chat", "%s (%s)", st.message, status_name(st.code));
    int rc = s->terminal ? greet(s) : CMD_OK;
    if (rc)
        return rc;
    s->input = chat_input_open(s->signals, s->terminal);
    if (!s->input || (s->system && !chat_talk_system(&s->talk, s->system)))
        return cmd_error(CMD_FAILED, "chat", "out of memory, or no such terminal (TERM)");
    return talk(s);
}

int cmd_chat(int argc, char **argv)
{
    struct chat_session *s = calloc(1, sizeof *s);
    if (!s)
        return cmd_error(CMD_FAILED, "chat", "out of memory");
    s->server.address = CMD_DEFAULT_ADDRESS;
    s->signals = -1;
    cmd_sampling_init(&s->how);
    int rc = parse(argc, argv, s);
    if (rc == CMD_OK)
        rc = run(s);
    chat_input_close(s->input);
    chat_talk_cut(&s->talk, 0);
    tandem_client_close(s->client);
    cmd_sampling_fini(&s->how);
    cli_free(&s->args);
    if (s->signals >= 0)
        close(s->signals);
    free(s);
    return rc < 0 ? CMD_OK : rc;
}
