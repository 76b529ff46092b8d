/* cmd_generate.c - `tandem generate`: one prompt over tandem.v1.Inference/Generate, printed as it streams. */
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/cmd.h"

#define MAX_PROMPT_BYTES (15u << 20) /* what fits a message of RPC_MAX_MESSAGE_BYTES */
#define MAX_STOP_IDS     64

static const char help[] =
    "usage: tandem generate [OPTIONS] [PROMPT]\n\n"
    "Sends a prompt and prints the answer as it comes. Without PROMPT the prompt is read from standard input.\n"
    "\n" CMD_CONNECT_HELP "  --prompt-ids JSON     the prompt as token ids, [1, 2, 3]; they are used as they are\n"
    "  --max-tokens N        stop after N new tokens (default: the server's)\n"
    "  --greedy              always the likeliest token; the same as --temperature 0\n"
    "  --temperature T       0 to 100 (default: the model's own)\n"
    "  --top-k K             sample among the K likeliest tokens; 0 is all\n"
    "  --top-p P             sample among the likeliest tokens that reach probability P\n"
    "  --seed S              the same seed gives the same answer\n"
    "  --stop-token-id ID    stop at this token as well; may be given 64 times\n"
    "  --ignore-eos          go on after the model's end-of-sequence token\n"
    "  --no-special          do not put the tokenizer's BOS in front of the prompt\n"
    "  --print-ids           print nothing but the new token ids, as one JSON array\n"
    "  --stats               print token counts and times on standard error at the end\n"
    "  --timeout SECONDS     deadline of the whole request (default: none)\n"
    "  --wait SECONDS        while the server is not ready, try again this long (default 0)\n"
    "  --request-id NAME     name the request in the server's log\n\n"
    "Ctrl-C stops the generation; what was printed stays.\n"
    "Exit status: 0 done, 1 the server refused or failed, 2 wrong usage, 3 not reachable, 130 interrupted.\n\n"
    "  tandem generate --greedy --max-tokens 64 \"Once upon a time\"\n"
    "  echo \"One day, Tom\" | tandem generate --temperature 0.8 --seed 7\n";

struct generate_options {
    struct tandem_client_options server;
    char *prompt; /* malloc'ed */
    size_t prompt_len;
    uint32_t *prompt_ids;
    size_t n_prompt_ids;
    bool has_ids;
    double timeout_s, wait_s;
    bool print_ids, stats;
    uint32_t stop_ids[MAX_STOP_IDS];
    /* built in place; the pointers lead into this struct */
    Tandem__V1__GenerateRequest request;
    Tandem__V1__Sampling sampling;
    Tandem__V1__Stopping stopping;
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

static int parse_prompt_ids(struct generate_options *o, const char *text)
{
    json_error_t err;
    json_t *array = json_loads(text, 0, &err);
    size_t n = json_array_size(array);
    if (!json_is_array(array) || !n) {
        json_decref(array);
        return cmd_error(CMD_USAGE, "generate", "--prompt-ids: expected a JSON array of token ids, such as [1, 2, 3]");
    }
    free(o->prompt_ids);
    o->prompt_ids = malloc(n * sizeof *o->prompt_ids);
    for (size_t i = 0; o->prompt_ids && i < n; i++) {
        json_t *id = json_array_get(array, i);
        json_int_t v = json_is_integer(id) ? json_integer_value(id) : -1;
        if (v < 0 || v > UINT32_MAX) {
            json_decref(array);
            return cmd_error(CMD_USAGE, "generate", "--prompt-ids: element %zu is not a token id", i);
        }
        o->prompt_ids[i] = (uint32_t)v;
    }
    json_decref(array);
    if (!o->prompt_ids)
        return cmd_error(CMD_FAILED, "generate", "out of memory for %zu prompt ids", n);
    o->n_prompt_ids = n;
    o->has_ids = true;
    return CMD_OK;
}

enum {
    OPT_PROMPT_IDS = 256,
    OPT_MAX,
    OPT_GREEDY,
    OPT_TEMP,
    OPT_TOP_K,
    OPT_TOP_P,
    OPT_SEED,
    OPT_STOP,
    OPT_IGNORE_EOS,
    OPT_NO_SPECIAL,
    OPT_PRINT_IDS,
    OPT_STATS,
    OPT_TIMEOUT,
    OPT_WAIT,
    OPT_REQUEST_ID
};

static const struct option long_options[] = {
    CMD_CONNECT_OPTIONS,
    {"prompt-ids", required_argument, 0, OPT_PROMPT_IDS},
    {"max-tokens", required_argument, 0, OPT_MAX},
    {"greedy", no_argument, 0, OPT_GREEDY},
    {"temperature", required_argument, 0, OPT_TEMP},
    {"top-k", required_argument, 0, OPT_TOP_K},
    {"top-p", required_argument, 0, OPT_TOP_P},
    {"seed", required_argument, 0, OPT_SEED},
    {"stop-token-id", required_argument, 0, OPT_STOP},
    {"ignore-eos", no_argument, 0, OPT_IGNORE_EOS},
    {"no-special", no_argument, 0, OPT_NO_SPECIAL},
    {"print-ids", no_argument, 0, OPT_PRINT_IDS},
    {"stats", no_argument, 0, OPT_STATS},
    {"timeout", required_argument, 0, OPT_TIMEOUT},
    {"wait", required_argument, 0, OPT_WAIT},
    {"request-id", required_argument, 0, OPT_REQUEST_ID},
    {"help", no_argument, 0, 'h'},
    {0},
};

static int sampling_option(struct generate_options *o, int opt)
{
    double d = 0;
    uint64_t u;
    switch (opt) {
    case OPT_TEMP:
        if (!cmd_parse_double(optarg, 0, 100, &d))
            return cmd_error(CMD_USAGE, "generate", "--temperature %s: expected 0 to 100", optarg);
        __attribute__((fallthrough)); /* greedy is temperature 0 */
    case OPT_GREEDY:
        o->sampling.temperature_is_case = TANDEM__V1__SAMPLING__TEMPERATURE_IS_TEMPERATURE;
        o->sampling.temperature = (float)d;
        return CMD_OK;
    case OPT_TOP_K:
        if (!cmd_parse_u64(optarg, 0, UINT32_MAX, &u))
            return cmd_error(CMD_USAGE, "generate", "--top-k %s: expected a whole number, 0 for all", optarg);
        o->sampling.top_k_is_case = TANDEM__V1__SAMPLING__TOP_K_IS_TOP_K;
        o->sampling.top_k = (uint32_t)u;
        return CMD_OK;
    case OPT_TOP_P:
        if (!cmd_parse_double(optarg, 0, 1, &d) || d <= 0)
            return cmd_error(CMD_USAGE, "generate", "--top-p %s: expected more than 0 and at most 1", optarg);
        o->sampling.top_p_is_case = TANDEM__V1__SAMPLING__TOP_P_IS_TOP_P;
        o->sampling.top_p = (float)d;
        return CMD_OK;
    default:
        if (!cmd_parse_u64(optarg, 0, UINT64_MAX, &u))
            return cmd_error(CMD_USAGE, "generate", "--seed %s: expected a whole number", optarg);
        o->sampling.seed_is_case = TANDEM__V1__SAMPLING__SEED_IS_SEED;
        o->sampling.seed = u;
        return CMD_OK;
    }
}

static int stopping_option(struct generate_options *o, int opt)
{
    uint64_t u;
    switch (opt) {
    case OPT_MAX:
        if (!cmd_parse_u64(optarg, 1, UINT32_MAX, &u))
            return cmd_error(CMD_USAGE, "generate", "--max-tokens %s: expected a whole number, at least 1", optarg);
        o->stopping.max_tokens_is_case = TANDEM__V1__STOPPING__MAX_TOKENS_IS_MAX_TOKENS;
        o->stopping.max_tokens = (uint32_t)u;
        return CMD_OK;
    case OPT_STOP:
        if (!cmd_parse_u64(optarg, 0, UINT32_MAX, &u) || o->stopping.n_stop_token_ids == MAX_STOP_IDS)
            return cmd_error(CMD_USAGE, "generate", "--stop-token-id %s: expected a token id, %d of them at most",
                             optarg, MAX_STOP_IDS);
        o->stop_ids[o->stopping.n_stop_token_ids++] = (uint32_t)u;
        return CMD_OK;
    default:
        o->stopping.ignore_eos = true;
        return CMD_OK;
    }
}

static int parse_option(struct generate_options *o, int opt, char **argv)
{
    switch (opt) {
    case OPT_PROMPT_IDS:
        return parse_prompt_ids(o, optarg);
    case OPT_GREEDY:
    case OPT_TEMP:
    case OPT_TOP_K:
    case OPT_TOP_P:
    case OPT_SEED:
        return sampling_option(o, opt);
    case OPT_MAX:
    case OPT_STOP:
    case OPT_IGNORE_EOS:
        return stopping_option(o, opt);
    case OPT_NO_SPECIAL:
        o->request.add_special_tokens_is_case = TANDEM__V1__GENERATE_REQUEST__ADD_SPECIAL_TOKENS_IS_ADD_SPECIAL_TOKENS;
        o->request.add_special_tokens = false;
        return CMD_OK;
    case OPT_PRINT_IDS:
        o->print_ids = true;
        return CMD_OK;
    case OPT_STATS:
        o->stats = true;
        return CMD_OK;
    case OPT_TIMEOUT:
        if (!cmd_parse_double(optarg, 0.001, 1e6, &o->timeout_s))
            return cmd_error(CMD_USAGE, "generate", "--timeout %s: expected seconds, 0.001 to 1000000", optarg);
        return CMD_OK;
    case OPT_WAIT:
        if (!cmd_parse_double(optarg, 0, 86400, &o->wait_s))
            return cmd_error(CMD_USAGE, "generate", "--wait %s: expected seconds, 0 to 86400", optarg);
        return CMD_OK;
    case OPT_REQUEST_ID:
        o->request.request_id = (ProtobufCBinaryData){strlen(optarg), (uint8_t *)optarg};
        return CMD_OK;
    default:
        return cmd_bad_option("generate", argv, opt);
    }
}

/* -1: help was printed. */
static int parse(int argc, char **argv, struct generate_options *o)
{
    tandem__v1__generate_request__init(&o->request);
    tandem__v1__sampling__init(&o->sampling);
    tandem__v1__stopping__init(&o->stopping);
    tandem__v1__token_ids__init(&o->token_ids);
    o->request.sampling = &o->sampling;
    o->request.stopping = &o->stopping;
    o->stopping.stop_token_ids = o->stop_ids;
    for (int c; (c = getopt_long(argc, argv, ":a:h", long_options, NULL)) != -1;) {
        if (c == 'h') {
            fputs(help, stdout);
            return -1;
        }
        if (cmd_connect_option(&o->server, c))
            continue;
        int rc = parse_option(o, c, argv);
        if (rc)
            return rc;
    }
    if (argc - optind > 1)
        return cmd_error(CMD_USAGE, "generate", "more than one prompt: put quotes around it");
    if (o->has_ids) {
        if (optind < argc)
            return cmd_error(CMD_USAGE, "generate", "give a prompt or --prompt-ids, not both");
        o->token_ids.ids = o->prompt_ids;
        o->token_ids.n_ids = o->n_prompt_ids;
        o->request.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS;
        o->request.token_ids = &o->token_ids;
        return CMD_OK;
    }
    if (optind < argc) {
        o->prompt = strdup(argv[optind]);
        if (!o->prompt)
            return cmd_error(CMD_FAILED, "generate", "out of memory for the prompt");
        o->prompt_len = strlen(o->prompt);
    } else {
        if (isatty(STDIN_FILENO))
            fputs("tandem generate: reading the prompt from the terminal, end it with Ctrl-D\n", stderr);
        int rc = read_stdin(o);
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
            f->reason == TANDEM__V1__FINISH__REASON__STOP ? "stop token" : "length limit");
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
    if (o->print_ids) {
        for (size_t i = 0; i < m->n_token_ids; i++)
            printf("%s%u", out->n_ids++ ? ", " : "[", m->token_ids[i]);
    } else if (m->text.len) {
        fwrite(m->text.data, 1, m->text.len, stdout);
        out->last = (char)m->text.data[m->text.len - 1];
    }
    if (m->finish && !o->print_ids && out->last != '\n') {
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
        return cmd_error(rc == ST_UNAVAILABLE && !out.any ? CMD_UNREACHABLE : CMD_FAILED, "generate", "%s (%s)",
                         st.message, status_name(rc));
    return CMD_OK;
}

int cmd_generate(int argc, char **argv)
{
    struct generate_options o = {.server = {.address = CMD_DEFAULT_ADDRESS}};
    int rc = parse(argc, argv, &o);
    if (rc == CMD_OK)
        rc = run(&o);
    free(o.prompt);
    free(o.prompt_ids);
    return rc < 0 ? CMD_OK : rc;
}
