/* cmd_generate.c - `tandem generate`: one prompt over tandem.v1.Inference/Generate, printed as it streams. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/cmd_sampling.h"

#define MAX_PROMPT_BYTES (15u << 20) /* what fits a message of RPC_MAX_MESSAGE_BYTES */

enum {
    OPT_PROMPT_IDS = 1,
    OPT_NO_SPECIAL,
    OPT_PRINT_IDS,
    OPT_JSON,
    OPT_STATS,
    OPT_TIMEOUT,
    OPT_WAIT,
    OPT_REQUEST_ID,
    OPT_NO_ATTACH
};

static const struct cli_option own_options[] = {
    {.name = "prompt-ids",
     .id = OPT_PROMPT_IDS,
     .arg = "JSON",
     .flags = CLI_LINE_ONLY,
     .help = "the prompt as token ids, [1, 2, 3]; they are used as they are"},
    {.name = "no-special", .id = OPT_NO_SPECIAL, .help = "do not put the tokenizer's BOS in front of the prompt"},
    {.name = "print-ids",
     .id = OPT_PRINT_IDS,
     .flags = CLI_LINE_ONLY,
     .help = "print nothing but the new token ids, as one JSON array"},
    {.name = "json",
     .id = OPT_JSON,
     .help =
         "print each message of the server as one JSON object on a line, and an error as {\"error\": {code, message}}"},
    {.name = "stats", .id = OPT_STATS, .help = "print token counts and times on standard error at the end"},
    {.name = "timeout", .id = OPT_TIMEOUT, .arg = "SECONDS", .help = "deadline of the whole request (default: none)"},
    {.name = "wait",
     .id = OPT_WAIT,
     .arg = "SECONDS",
     .fallback = "0",
     .help = "while the server is not ready, try again this long"},
    {.name = "request-id",
     .id = OPT_REQUEST_ID,
     .arg = "NAME",
     .flags = CLI_LINE_ONLY,
     .help = "name the request in the server's log"},
    {.name = "no-attach",
     .id = OPT_NO_ATTACH,
     .help = "do not take the answer up again when the connection or the server is lost"},
    {0},
};

const struct cli_command cmd_generate_cli = {
    .name = "generate",
    .summary = "send a prompt to a server and print the answer as it comes",
    .operands = "[PROMPT]",
    .about = "Sends a prompt and prints the answer as it comes. Without PROMPT the prompt is read from standard input.",
    .tables = (const struct cli_option *const[]){cmd_connect_options, cmd_sampling_options, cmd_output_options,
                                                 own_options, NULL},
    .notes = "Ctrl-C stops the generation; what was printed stays. When the connection or the server is lost in the "
             "middle of an "
             "answer and the server keeps it (tandem serve --journal), a line on standard error says so and the rest "
             "follows, "
             "nothing twice; when that takes longer than the server keeps it (--journal-keep-ms), the generation has "
             "failed.",
    .exits = "0 done, 1 the server refused or failed, 2 wrong usage, 3 not reachable, 130 interrupted.",
    .examples = "  tandem generate --greedy --max-tokens 64 \"Once upon a time\"\n"
                "  echo \"One day, Tom\" | tandem generate --temperature 0.8 --seed 7\n",
};

struct generate_options {
    struct cli_args args;
    struct tandem_client_options server;
    char *prompt; /* malloc'ed */
    size_t prompt_len;
    uint32_t *prompt_ids;
    size_t n_prompt_ids;
    bool has_ids;
    double timeout_s, wait_s;
    bool print_ids, json, stats;
    /* built in place; the pointers lead into this struct */
    Tandem__V1__GenerateRequest request;
    struct cmd_sampling how;
    Tandem__V1__TokenIds token_ids;
};

/* The thread that waits for SIGINT and the generation that it cancels. */
struct interrupt {
    pthread_mutex_t lock;
    struct tandem_generation *generation;
    atomic_bool hit;
};

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void *interrupt_thread(void *arg)
{
    struct interrupt *in = arg;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGUSR1); /* from main: time to end */
    for (int sig; !sigwait(&set, &sig) && sig != SIGUSR1;) {
        atomic_store(&in->hit, true);
        pthread_mutex_lock(&in->lock);
        if (in->generation)
            tandem_generation_cancel(in->generation);
        pthread_mutex_unlock(&in->lock);
    }
    return NULL;
}

static int read_stdin(struct generate_options *o)
{
    size_t room = 4096;
    o->prompt = malloc(room);
    while (o->prompt) {
        size_t n = fread(o->prompt + o->prompt_len, 1, room - o->prompt_len, stdin);
        o->prompt_len += n;
        if (o->prompt_len < room)
            break;
        if (room > MAX_PROMPT_BYTES)
            return cmd_error(CMD_FAILED, "generate", "prompt: over %u bytes", MAX_PROMPT_BYTES);
        char *grown = realloc(o->prompt, room *= 2);
        if (!grown)
            free(o->prompt);
        o->prompt = grown;
    }
    if (!o->prompt)
        return cmd_error(CMD_FAILED, "generate", "out of memory for the prompt");
    if (ferror(stdin))
        return cmd_error(CMD_FAILED, "generate", "standard input: %s", strerror(errno));
    if (o->prompt_len && o->prompt[o->prompt_len - 1] == '\n')
        o->prompt_len--; /* of echo or the last line; a prompt that ends in a newline needs two */
    return CMD_OK;
}

static int parse_option(struct generate_options *o, int opt)
{
    const char *where = o->args.where;
    char *text = o->args.text;
    switch (opt) {
    case OPT_PROMPT_IDS:
        o->has_ids = true;
        return cmd_parse_ids(where, "--prompt-ids", text, &o->prompt_ids, &o->n_prompt_ids);
    case OPT_NO_SPECIAL:
        o->request.add_special_tokens_is_case = TANDEM__V1__GENERATE_REQUEST__ADD_SPECIAL_TOKENS_IS_ADD_SPECIAL_TOKENS;
        o->request.add_special_tokens = false;
        return CMD_OK;
    case OPT_PRINT_IDS:
        o->print_ids = true;
        return CMD_OK;
    case OPT_JSON:
        o->json = true;
        return CMD_OK;
    case OPT_STATS:
        o->stats = true;
        return CMD_OK;
    case OPT_TIMEOUT:
        if (!cmd_parse_double(text, 0.001, 1e6, &o->timeout_s))
            return cmd_error(CMD_USAGE, where, "--timeout %s: expected seconds, 0.001 to 1000000", text);
        return CMD_OK;
    case OPT_WAIT:
        if (!cmd_parse_double(text, 0, 86400, &o->wait_s))
            return cmd_error(CMD_USAGE, where, "--wait %s: expected seconds, 0 to 86400", text);
        return CMD_OK;
    case OPT_NO_ATTACH:
        o->server.no_attach = true;
        return CMD_OK;
    case OPT_REQUEST_ID:
        o->request.request_id = (ProtobufCBinaryData){strlen(text), (uint8_t *)text};
        return CMD_OK;
    default:
        return CMD_OK;
    }
}

/* Options that need others; several answers and log probabilities have a place in JSON only. */
static int check_output(const struct generate_options *o)
{
    const Tandem__V1__Output *output = &o->how.output;
    if (o->how.stopping.max_tokens_is_case && o->how.stopping.max_tokens == 0 && !output->echo &&
        !output->prompt_logprobs_is_case)
        return cmd_error(CMD_USAGE, "generate",
                         "--max-tokens 0: expected at least 1 without --echo or --prompt-logprobs");
    if (o->json && o->print_ids)
        return cmd_error(CMD_USAGE, "generate", "give --json or --print-ids, not both");
    if (o->json)
        return CMD_OK;
    if (o->how.sampling.n > 1)
        return cmd_error(CMD_USAGE, "generate", "--n %u: several answers need --json", o->how.sampling.n);
    if (output->logprobs_is_case || output->prompt_logprobs_is_case)
        return cmd_error(CMD_USAGE, "generate", "log probabilities need --json");
    return CMD_OK;
}

/* -1: help was printed. */
static int parse(int argc, char **argv, struct generate_options *o)
{
    tandem__v1__generate_request__init(&o->request);
    cmd_sampling_init(&o->how);
    tandem__v1__token_ids__init(&o->token_ids);
    cmd_sampling_apply(&o->how, &o->request);
    int rc = cmd_read(&o->args, &cmd_generate_cli, argc, argv);
    if (rc)
        return rc;
    for (int opt; !rc && (opt = cli_next(&o->args)) != 0;)
        if (!cmd_connect_option(&o->server, opt, o->args.text) &&
            !cmd_sampling_option(&o->how, o->args.where, opt, o->args.text, &rc))
            rc = parse_option(o, opt);
    if (!rc)
        rc = check_output(o);
    if (rc)
        return rc;
    if (o->args.n_operands > 1)
        return cmd_error(CMD_USAGE, "generate", "more than one prompt: put quotes around it");
    if (o->has_ids) {
        if (o->args.n_operands)
            return cmd_error(CMD_USAGE, "generate", "give a prompt or --prompt-ids, not both");
        o->token_ids.ids = o->prompt_ids;
        o->token_ids.n_ids = o->n_prompt_ids;
        o->request.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS;
        o->request.token_ids = &o->token_ids;
        return CMD_OK;
    }
    if (o->args.n_operands) {
        o->prompt = strdup(o->args.operands[0]);
        if (!o->prompt)
            return cmd_error(CMD_FAILED, "generate", "out of memory for the prompt");
        o->prompt_len = strlen(o->prompt);
    } else {
        if (isatty(STDIN_FILENO))
            fputs("tandem generate: reading the prompt from the terminal, end it with Ctrl-D\n", stderr);
        rc = read_stdin(o);
        if (rc)
            return rc;
    }
    o->request.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT;
    o->request.text = (ProtobufCBinaryData){o->prompt_len, (uint8_t *)o->prompt};
    return CMD_OK;
}

static void print_stats(const Tandem__V1__Finish *f)
{
    const Tandem__V1__Usage *u = f->usage;
    const Tandem__V1__Timing *t = f->timing;
    if (!u || !t)
        return;
    double decode_s = (double)t->decode_us / 1e6;
    fprintf(stderr,
            "%u prompt tokens, %u new tokens; queue %.1f ms, prefill %.1f ms, decode %.1f ms (%.1f tokens/s); %s\n",
            u->prompt_tokens, u->completion_tokens, (double)t->queue_us / 1e3, (double)t->prefill_us / 1e3,
            (double)t->decode_us / 1e3,
            decode_s > 0 && u->completion_tokens > 1 ? (u->completion_tokens - 1) / decode_s : 0.0,
            f->stop_index_is_case                           ? "stop text"
            : f->reason == TANDEM__V1__FINISH__REASON__STOP ? "stop token"
                                                            : "length limit");
}

struct output {
    bool any;    /* something was received */
    bool broken; /* standard output cannot be written any more */
    uint32_t n_ids;
    char last; /* last character printed */
};

static enum status_code print_message(const struct generate_options *o, struct output *out,
                                      const Tandem__V1__GenerateResponse *m, struct status *st)
{
    out->any = true;
    if (o->json) {
        cmd_print_json(m);
    } else if (o->print_ids) {
        for (size_t i = 0; i < m->n_token_ids; i++)
            printf("%s%u", out->n_ids++ ? ", " : "[", m->token_ids[i]);
    } else if (m->text.len) {
        fwrite(m->text.data, 1, m->text.len, stdout);
        out->last = (char)m->text.data[m->text.len - 1];
    }
    if (m->finish && !o->print_ids && !o->json && out->last != '\n') {
        putchar('\n');
        out->last = '\n';
    }
    if (fflush(stdout))
        out->broken = true;
    if (m->finish && o->stats)
        print_stats(m->finish);
    return out->broken ? status_errno(st, ST_CANCELLED, errno, "standard output") : ST_OK;
}

static void watch(struct interrupt *in, struct tandem_generation *g)
{
    pthread_mutex_lock(&in->lock);
    in->generation = g;
    if (g && atomic_load(&in->hit))
        tandem_generation_cancel(g);
    pthread_mutex_unlock(&in->lock);
}

static void say_lost(void *ctx, const struct status *st, uint32_t attach_ms)
{
    (void)ctx;
    fprintf(stderr, "tandem generate: %s; taking the answer up again, for %u s at most\n", st->message,
            (attach_ms + 999) / 1000);
}

/* One try: to the end of the stream. */
static enum status_code run_once(const struct generate_options *o, struct tandem_client *client, struct interrupt *in,
                                 struct output *out, struct status *st)
{
    struct tandem_generation *g = NULL;
    const Tandem__V1__GenerateResponse *m;
    enum status_code rc = tandem_generation_open(&g, client, (uint64_t)(o->timeout_s * 1000), st);
    if (rc != ST_OK)
        return rc;
    watch(in, g);
    tandem_generation_send(g, &o->request);
    do {
        rc = tandem_generation_next(g, &m, 0, NULL, st);
        if (rc == ST_OK && m)
            rc = print_message(o, out, m, st);
    } while (rc == ST_OK && m);
    watch(in, NULL);
    tandem_generation_close(g);
    return rc;
}

static int run(const struct generate_options *o)
{
    struct status st = STATUS_INIT;
    struct tandem_client *client = NULL;
    struct interrupt in = {.lock = PTHREAD_MUTEX_INITIALIZER};
    struct output out = {.last = '\n'};
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    pthread_t thread;
    if (pthread_create(&thread, NULL, interrupt_thread, &in))
        return cmd_error(CMD_FAILED, "generate", "cannot start a thread");

    enum status_code rc = tandem_client_open(&client, &o->server, &st);
    int64_t end_ms = now_ms() + (int64_t)(o->wait_s * 1000);
    while (rc == ST_OK) {
        rc = run_once(o, client, &in, &out, &st);
        if (rc != ST_UNAVAILABLE || out.any || atomic_load(&in.hit) || now_ms() >= end_ms)
            break;
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
        rc = ST_OK;
    }
    tandem_client_close(client);
    pthread_kill(thread, SIGUSR1);
    pthread_join(thread, NULL);
    if (o->print_ids && (out.n_ids || rc == ST_OK))
        puts(out.n_ids ? "]" : "[]");
    else if (out.last != '\n' && !out.broken)
        putchar('\n');
    if (atomic_load(&in.hit))
        return 130;
    if (out.broken)
        return CMD_FAILED;
    if (rc != ST_OK)
        return cmd_failed(rc == ST_UNAVAILABLE && !out.any ? CMD_UNREACHABLE : CMD_FAILED, "generate", o->json, &st);
    return CMD_OK;
}

int cmd_generate(int argc, char **argv)
{
    struct generate_options o = {.server = {.address = CMD_DEFAULT_ADDRESS, .on_lost = say_lost}};
    int rc = parse(argc, argv, &o);
    if (rc == CMD_OK)
        rc = run(&o);
    free(o.prompt);
    free(o.prompt_ids);
    cmd_sampling_fini(&o.how);
    cli_free(&o.args);
    return rc < 0 ? CMD_OK : rc;
}
