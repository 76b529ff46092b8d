/* cmd_dump.c - `tandem dump`: what a flight recorder's file says, and which rank was slow or dead. */
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "coordinator/cmd.h"
#include "coordinator/flight.h"

enum { OPT_LAST = 1, OPT_EPOCH, OPT_ALL, OPT_JSON };

static const struct cli_option own_options[] = {
    {.name = "last", .id = OPT_LAST, .arg = "N", .fallback = "40", .help = "the newest N records"},
    {.name = "epoch",
     .id = OPT_EPOCH,
     .arg = "N",
     .help = "judge the group of this epoch (default: the one that planned or was lost last)"},
    {.name = "all", .id = OPT_ALL, .help = "all of them"},
    {.name = "json", .id = OPT_JSON, .help = "one JSON object a record, then one with the verdict; each on a line"},
    {0},
};

const struct cli_command cmd_dump_cli = {
    .name = "dump",
    .summary = "read a flight recorder's file and name the slow or dead rank",
    .operands = "FILE",
    .about =
        "Prints the newest records of a coordinator's flight recorder (tandem serve --flight-recorder FILE), also of\n"
        "one that was killed or still runs: steps and who answered them when, groups, requests. Then what they say\n"
        "of the ranks of the newest group.",
    .tables = (const struct cli_option *const[]){own_options, NULL},
    .exits = "0 done, 1 failed, 2 wrong usage.",
    .examples =
        "  tandem dump /var/log/tandem.flight\n  tandem dump --json --all FILE | jq 'select(.kind == \"lost\")'\n",
};

static void print_text(size_t cap, const char *text)
{
    for (size_t i = 0; i < cap && text[i]; i++)
        putchar((unsigned char)text[i] < 0x20 || (unsigned char)text[i] == 0x7f ? '?' : text[i]);
}

static const char *code_name(const struct flight_record *r)
{
    return r->number[0] == 0 ? "OK" : status_name((enum status_code)r->number[0]);
}

/* Microseconds since 1970; without overflow, whatever the bytes. */
static int64_t wall_us(const struct flight_log *l, const struct flight_record *r)
{
    uint64_t us = (uint64_t)l->clock_us + (uint64_t)r->time_us;
    return (int64_t)us;
}

/* "14:03:07.123456" of the day, in the zone of whoever reads. */
static void print_time(const struct flight_log *l, const struct flight_record *r)
{
    int64_t us = wall_us(l, r);
    time_t s = us / 1000000;
    struct tm tm;
    char text[32] = "?";
    if (localtime_r(&s, &tm))
        strftime(text, sizeof text, "%H:%M:%S", &tm);
    printf("%s.%06d", text, (int)(us % 1000000 < 0 ? 0 : us % 1000000));
}

static void print_record(const struct flight_log *l, const struct flight_record *r)
{
    const uint32_t *v = r->numbers;
    print_time(l, r);
    printf(" %6" PRIu64 "  %-7s", r->seq, flight_kind_name(r->kind));
    if (r->epoch)
        printf(" epoch %" PRIu64, r->epoch);
    switch (r->kind) {
    case FLIGHT_PLAN:
        printf(" step %" PRIu64
               ": %u rows, %u decodes over %u Ki tokens, %u rows in %u chunks, %u admitted, %u released",
               r->id, v[0], v[1], v[7], v[3], v[2], v[4], v[5]);
        break;
    case FLIGHT_RESULT:
        printf(" step %" PRIu64 ": rank %u, %.3f ms, %u tokens", r->id, r->rank, v[0] / 1e3, v[1]);
        break;
    case FLIGHT_SILENT:
        printf(": rank %u, no heartbeat for %.1f s", r->rank, v[0] / 1e3);
        break;
    case FLIGHT_READY:
        printf(": %u ranks, %u slots, %u pages, context %u", v[0], v[1], v[2], v[3]);
        break;
    case FLIGHT_ATTACH:
        printf(": rank %u, ", r->rank);
        print_text(FLIGHT_TEXT, r->text);
        break;
    case FLIGHT_ADMIT:
        printf(" ");
        print_text(FLIGHT_NAME, r->name);
        printf(": %u prompt tokens, at most %u new, %u answers", v[0], v[1], v[2]);
        break;
    case FLIGHT_REFUSE:
        printf(" ");
        print_text(FLIGHT_NAME, r->name);
        printf(": %s, %u prompt tokens", code_name(r), v[1]);
        break;
    case FLIGHT_END:
        printf(" ");
        print_text(FLIGHT_NAME, r->name);
        printf(": %s, %u prompt and %u new tokens", code_name(r), v[1], v[2]);
        break;
    default:
        printf(" ");
        print_text(FLIGHT_TEXT, r->text);
    }
    putchar('\n');
}

/* Text that may hold any bytes: those that are not UTF-8 become '?'. */
static json_t *text_of(const char *text, size_t cap)
{
    size_t n = strnlen(text, cap);
    json_t *v = json_stringn(text, n);
    if (v)
        return v;
    char plain[FLIGHT_TEXT + 1];
    for (size_t i = 0; i < n; i++)
        plain[i] = (unsigned char)text[i] >= 0x80 ? '?' : text[i];
    return json_stringn(plain, n);
}

static void put_numbers(json_t *o, const struct flight_record *r, const char *const *names)
{
    for (size_t i = 0; names[i]; i++)
        json_object_set_new(o, names[i], json_integer(r->numbers[i]));
}

static json_t *to_json(const struct flight_log *l, const struct flight_record *r)
{
    static const char *const plan[] = {"rows",     "decodes", "chunks",     "chunk_rows", "admits",
                                       "releases", "samples", "context_ki", NULL};
    static const char *const result[] = {"compute_us", "tokens", NULL};
    static const char *const ready[] = {"ranks", "slots", "pages", "context", NULL};
    static const char *const admit[] = {"prompt_tokens", "max_tokens", "answers", NULL};
    json_t *o = json_pack("{s:I, s:I, s:s}", "seq", (json_int_t)r->seq, "time_us", wall_us(l, r), "kind",
                          flight_kind_name(r->kind));
    if (r->epoch)
        json_object_set_new(o, "epoch", json_integer((json_int_t)r->epoch));
    if (r->rank != FLIGHT_NO_RANK)
        json_object_set_new(o, "rank", json_integer(r->rank));
    if (r->kind == FLIGHT_PLAN || r->kind == FLIGHT_RESULT) {
        json_object_set_new(o, "step", json_integer((json_int_t)r->id));
        put_numbers(o, r, r->kind == FLIGHT_PLAN ? plan : result);
    } else if (r->kind == FLIGHT_SILENT) {
        json_object_set_new(o, "silent_ms", json_integer(r->numbers[0]));
    } else if (r->kind == FLIGHT_READY) {
        put_numbers(o, r, ready);
    } else if (r->kind >= FLIGHT_ADMIT) {
        json_object_set_new(o, "request", text_of(r->name, FLIGHT_NAME));
        if (r->kind == FLIGHT_ADMIT) {
            put_numbers(o, r, admit);
        } else {
            json_object_set_new(o, "code", json_string(code_name(r)));
            json_object_set_new(o, "prompt_tokens", json_integer(r->number[1]));
            if (r->kind == FLIGHT_END)
                json_object_set_new(o, "new_tokens", json_integer(r->number[2]));
        }
    } else {
        json_object_set_new(o, "text", text_of(r->text, FLIGHT_TEXT));
    }
    return o;
}

static void put_line(json_t *o)
{
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

static void print_verdict_json(const struct flight_verdict *v, const struct flight_log *l)
{
    json_t *ranks = json_array(), *owing = json_array();
    for (uint32_t i = 0; i < v->ranks; i++) {
        const struct flight_rank *k = &v->rank[i];
        json_array_append_new(ranks, json_pack("{s:i, s:I, s:I, s:I, s:f, s:f, s:f, s:I}", "rank", (int)i, "last_step",
                                               (json_int_t)k->last_step, "steps", (json_int_t)k->steps,
                                               "last_to_answer", (json_int_t)k->last, "compute_ms", k->compute_us / 1e3,
                                               "behind_ms", k->behind_us / 1e3, "longest_behind_ms",
                                               k->longest_us / 1e3, "silent_ms", (json_int_t)k->silent_ms));
        if (v->owes[i])
            json_array_append_new(owing, json_integer(i));
    }
    json_t *o = json_pack("{s:s, s:I, s:I, s:o, s:o, s:I, s:I}", "kind", "verdict", "epoch", (json_int_t)v->epoch,
                          "planned", (json_int_t)v->planned, "ranks", ranks, "owing", owing, "pid", (json_int_t)l->pid,
                          "spoilt", (json_int_t)l->spoilt);
    json_object_set_new(o, "slowest", v->slowest == FLIGHT_NO_RANK ? json_null() : json_integer(v->slowest));
    json_object_set_new(o, "lost", v->lost ? text_of(v->lost, FLIGHT_TEXT) : json_null());
    json_t *text = json_string(v->text);
    json_object_set_new(o, "text", text ? text : json_string("not UTF-8"));
    put_line(o);
}

static void print_verdict(const struct flight_verdict *v, const struct flight_log *l)
{
    printf("\n%zu records", l->n);
    if (l->spoilt)
        printf(", %" PRIu64 " spoilt", l->spoilt);
    printf("; last written by pid %u\n", l->pid);
    for (uint32_t i = 0; i < v->ranks; i++) {
        const struct flight_rank *k = &v->rank[i];
        printf("rank %-3u last step %-8" PRIu64
               " mean %9.3f ms, behind the first %8.3f ms (longest %8.3f), last of all in "
               "%" PRIu64 " of %" PRIu64 "%s\n",
               i, k->last_step, k->compute_us / 1e3, k->behind_us / 1e3, k->longest_us / 1e3, k->last, k->steps,
               v->owes[i] ? "   <- owes a step" : "");
    }
    print_text(sizeof v->text, v->text);
    putchar('\n');
}

static int dump(const char *path, uint64_t last, uint64_t epoch, bool json)
{
    struct flight_log l = {0};
    struct status st = STATUS_INIT;
    if (flight_load(&l, path, &st) != ST_OK)
        return cmd_error(CMD_FAILED, "dump", "%s", st.message);
    struct flight_verdict *v = calloc(1, sizeof *v);
    if (!v) {
        flight_log_free(&l);
        return cmd_error(CMD_FAILED, "dump", "out of memory");
    }
    flight_judge(v, &l, epoch);
    for (size_t i = l.n > last ? l.n - last : 0; i < l.n; i++) {
        if (json)
            put_line(to_json(&l, &l.record[i]));
        else
            print_record(&l, &l.record[i]);
    }
    if (json)
        print_verdict_json(v, &l);
    else
        print_verdict(v, &l);
    free(v);
    flight_log_free(&l);
    return ferror(stdout) ? cmd_error(CMD_FAILED, "dump", "standard output cannot be written") : CMD_OK;
}

int cmd_dump(int argc, char **argv)
{
    struct cli_args args = {0};
    uint64_t last = 40, epoch = 0;
    bool json = false;
    int rc = cmd_read(&args, &cmd_dump_cli, argc, argv);
    for (int opt; !rc && (opt = cli_next(&args)) != 0;) {
        if (opt == OPT_JSON)
            json = true;
        else if (opt == OPT_ALL)
            last = UINT64_MAX;
        else if (!cmd_parse_u64(args.text, 0, UINT64_MAX, opt == OPT_EPOCH ? &epoch : &last))
            rc = cmd_error(CMD_USAGE, args.where, "%s: expected a number", args.text);
    }
    if (!rc && args.n_operands != 1)
        rc = cmd_error(CMD_USAGE, "dump", "expected one FILE; see `tandem dump --help`");
    if (!rc)
        rc = dump(args.operands[0], last, epoch, json);
    cli_free(&args);
    return rc < 0 ? CMD_OK : rc;
}
