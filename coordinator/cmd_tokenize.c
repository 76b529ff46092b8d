/* cmd_tokenize.c - `tandem tokenize`: text to ids and back, one line at a time, JSON on both sides. */
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/cmd.h"
#include "coordinator/tokenizer.h"

enum { OPT_MODEL = 1, OPT_ADD_SPECIAL, OPT_DECODE, OPT_SKIP_SPECIAL };

static const struct cli_option own_options[] = {
    {.name = "model",
     .id = OPT_MODEL,
     .arg = "DIR",
     .flags = CLI_FILE | CLI_REQUIRED,
     .help = "folder with tokenizer.json (and tokenizer_config.json), or a GGUF file; no weights needed"},
    {.name = "add-special",
     .id = OPT_ADD_SPECIAL,
     .flags = CLI_LINE_ONLY,
     .help = "put the model's own special tokens around the text, such as <s> in front"},
    {.name = "decode", .id = OPT_DECODE, .flags = CLI_LINE_ONLY, .help = "ids to text"},
    {.name = "skip-special",
     .id = OPT_SKIP_SPECIAL,
     .flags = CLI_LINE_ONLY,
     .help = "with --decode: leave special tokens out"},
    {0},
};

const struct cli_command cmd_tokenize_cli = {
    .name = "tokenize",
    .summary = "turn text into token ids with a model's tokenizer, or back",
    .operands = "< LINES",
    .about = "Turns text into token ids, and back. Reads lines of JSON from stdin, writes one line of JSON for each: a "
             "string\n"
             "in, an array of ids out; with --decode an array of ids in, a string out. Special tokens that are written "
             "out in\n"
             "the text, like <s>, are recognised.",
    .tables = (const struct cli_option *const[]){own_options, NULL},
    .exits = "0 done, 1 a line or the model is bad (stderr names the line), 2 wrong usage.",
    .examples =
        "  echo '\"Once upon a time\"' | tandem tokenize --model models/demo\n"
        "  echo '[415, 424, 258, 393]' | tandem tokenize --model models/demo --decode\n"
        "  jq -R . < book.txt | tandem tokenize --model models/demo | jq length    # ids per line of a text file\n",
};

struct tokenize_options {
    struct cli_args args;
    const char *model;
    bool decode;
    unsigned encode_flags, decode_flags;
};

static int parse(int argc, char **argv, struct tokenize_options *o)
{
    int rc = cmd_read(&o->args, &cmd_tokenize_cli, argc, argv);
    if (rc)
        return rc;
    for (int opt; (opt = cli_next(&o->args)) != 0;) {
        switch (opt) {
        case OPT_MODEL:
            o->model = o->args.text;
            break;
        case OPT_ADD_SPECIAL:
            o->encode_flags |= TOK_ADD_SPECIAL;
            break;
        case OPT_DECODE:
            o->decode = true;
            break;
        default:
            o->decode_flags |= TOK_SKIP_SPECIAL;
        }
    }
    if (o->args.n_operands)
        return cmd_error(CMD_USAGE, "tokenize", "unexpected argument '%s': text and ids come on stdin",
                         o->args.operands[0]);
    if (!o->model)
        return cmd_error(CMD_USAGE, "tokenize", "--model DIR is missing; see tandem tokenize --help");
    if (o->encode_flags && o->decode)
        return cmd_error(CMD_USAGE, "tokenize", "--add-special goes with text, not with --decode");
    if (o->decode_flags && !o->decode)
        return cmd_error(CMD_USAGE, "tokenize", "--skip-special goes with --decode");
    return CMD_OK;
}

static enum status_code encode_line(const struct tokenizer *t, const json_t *line, unsigned flags, struct status *st)
{
    uint32_t *ids;
    size_t n;
    if (!json_is_string(line))
        return status_set(st, ST_INVALID_ARGUMENT, "expected a JSON string, like \"Once upon a time\"");
    enum status_code rc = tok_encode(t, json_string_value(line), json_string_length(line), flags, &ids, &n, st);
    if (rc != ST_OK)
        return rc;
    putchar('[');
    for (size_t i = 0; i < n; i++)
        printf(i ? ",%u" : "%u", ids[i]);
    fputs("]\n", stdout);
    free(ids);
    return ST_OK;
}

static enum status_code get_ids(const json_t *line, uint32_t *ids, size_t n, struct status *st)
{
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(line, i);
        json_int_t id = json_integer_value(v);
        if (!json_is_integer(v) || id < 0 || id > UINT32_MAX)
            return status_set(st, ST_INVALID_ARGUMENT, "ids[%zu]: expected a token id", i);
        ids[i] = (uint32_t)id;
    }
    return ST_OK;
}

static enum status_code decode_line(const struct tokenizer *t, const json_t *line, unsigned flags, struct status *st)
{
    if (!json_is_array(line))
        return status_set(st, ST_INVALID_ARGUMENT, "expected a JSON array of token ids, like [415, 424]");
    size_t n = json_array_size(line), len;
    char *text = NULL, *out = NULL;
    json_t *string = NULL;
    uint32_t *ids = calloc(n ? n : 1, sizeof *ids);
    if (!ids)
        return status_nomem(st, "ids", n * sizeof *ids);
    enum status_code rc = get_ids(line, ids, n, st);
    if (rc == ST_OK)
        rc = tok_decode(t, ids, n, flags, &text, &len, st);
    if (rc != ST_OK)
        goto done;
    string = json_stringn(text, len);
    out = string ? json_dumps(string, JSON_ENCODE_ANY) : NULL;
    if (!out) {
        rc = status_nomem(st, "text", len);
        goto done;
    }
    puts(out);
done:
    free(out);
    json_decref(string);
    free(text);
    free(ids);
    return rc;
}

static enum status_code run_line(const struct tokenizer *t, const struct tokenize_options *o, const char *s, size_t len,
                                 struct status *st)
{
    json_error_t err;
    json_t *line = json_loadb(s, len, JSON_DECODE_ANY | JSON_ALLOW_NUL, &err);
    if (!line)
        return status_set(st, ST_INVALID_ARGUMENT, "not JSON: %s", err.text);
    enum status_code rc =
        o->decode ? decode_line(t, line, o->decode_flags, st) : encode_line(t, line, o->encode_flags, st);
    json_decref(line);
    return rc;
}

static int run(const struct tokenizer *t, const struct tokenize_options *o)
{
    struct status st = STATUS_INIT;
    /* Somebody who types, or a program that waits for each answer at a terminal, sees it at once. */
    bool interactive = isatty(STDIN_FILENO) || isatty(STDOUT_FILENO);
    char *line = NULL;
    size_t cap = 0;
    int rc = CMD_OK;
    unsigned long number = 0;
    ssize_t len;
    errno = 0;
    while (rc == CMD_OK && (len = getline(&line, &cap, stdin)) >= 0) {
        number++;
        if (run_line(t, o, line, (size_t)len, &st) != ST_OK) {
            fflush(stdout);
            rc = cmd_error(CMD_FAILED, "tokenize", "line %lu: %s", number, st.message);
        } else if ((interactive && fflush(stdout) != 0) || ferror(stdout)) {
            break;
        }
    }
    if (rc == CMD_OK && ferror(stdin))
        rc = cmd_error(CMD_FAILED, "tokenize", "reading stdin: %s", strerror(errno));
    if (fflush(stdout) != 0 && rc == CMD_OK)
        rc = cmd_error(CMD_FAILED, "tokenize", "writing stdout: %s", strerror(errno));
    free(line);
    return rc;
}

int cmd_tokenize(int argc, char **argv)
{
    struct tokenize_options o = {0};
    struct status st = STATUS_INIT;
    struct tokenizer *t;
    int rc = parse(argc, argv, &o);
    if (rc == CMD_OK && tok_load(&t, o.model, &st) != ST_OK)
        rc = cmd_error(CMD_FAILED, "tokenize", "%s", st.message);
    else if (rc == CMD_OK) {
        rc = run(t, &o);
        tok_free(t);
    }
    cli_free(&o.args);
    return rc < 0 ? CMD_OK : rc;
}
