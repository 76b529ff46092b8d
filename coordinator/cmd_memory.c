/* cmd_memory.c - `tandem memory`: the KV memory of a server that runs: what it is used for, and how much there is. */
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/cmd.h"

enum { OPT_GROUP = 1, OPT_KV_MEMORY, OPT_JSON };

#define CALL_MS 10000

static const struct cli_option own_options[] = {
    {.name = "kv-memory",
     .id = OPT_KV_MEMORY,
     .arg = "SIZE",
     .help = "each rank's KV memory from now on, such as 512M or 8G; all: what it came with (default: only show it)"},
    {.name = "group",
     .id = OPT_GROUP,
     .arg = "NAME",
     .help = "with --kv-memory: only of this worker group (default: all)"},
    {.name = "json",
     .id = OPT_JSON,
     .help = "print one JSON object: groups with their pages, or what --kv-memory has set; an error as "
             "{\"error\": {code, message}}"},
    {0},
};

const struct cli_command cmd_memory_cli = {
    .name = "memory",
    .summary = "show the KV memory of a server; give some of it back to the machine, or take it again",
    .about =
        "Ranks give pages back as they come free, while they serve: nothing that runs is ended for it, and requests\n"
        "that need more than what will be left are refused. Ranks that are started anew take all of it first.",
    .tables = (const struct cli_option *const[]){cmd_connect_options, own_options, NULL},
    .exits = "0 done, 1 refused, 2 wrong usage, 3 not reachable.",
    .examples = "  tandem memory\n"
                "  tandem memory --kv-memory 8G           # the rest is for others\n"
                "  tandem memory --kv-memory all\n",
};

struct memory_options {
    struct tandem_client_options server;
    const char *group;
    bool set, json;
    uint64_t bytes; /* 0: all */
    struct cli_args args;
};

static int take(struct memory_options *o, int opt)
{
    const char *text = o->args.text;
    switch (opt) {
    case OPT_GROUP:
        if (!*text)
            return cmd_error(CMD_USAGE, o->args.where, "--group: empty, expected the name of a group");
        o->group = text;
        break;
    case OPT_KV_MEMORY:
        o->set = true;
        o->bytes = 0;
        if (strcmp(text, "all") != 0 && !cmd_parse_size(text, &o->bytes))
            return cmd_error(CMD_USAGE, o->args.where, "--kv-memory %s: expected a size as 512M or 8G, or all", text);
        break;
    case OPT_JSON:
        o->json = true;
        break;
    default:
        cmd_connect_option(&o->server, opt, text);
    }
    return CMD_OK;
}

static int parse(int argc, char **argv, struct memory_options *o)
{
    int rc = cmd_read(&o->args, &cmd_memory_cli, argc, argv);
    if (rc)
        return rc;
    for (int opt; !rc && (opt = cli_next(&o->args)) != 0;)
        rc = take(o, opt);
    if (!rc && o->args.n_operands)
        rc = cmd_error(CMD_USAGE, "memory", "%s: takes no arguments, only options; see `tandem memory --help`",
                       o->args.operands[0]);
    if (!rc && o->group && !o->set)
        rc = cmd_error(CMD_USAGE, "memory", "--group: expected --kv-memory SIZE with it");
    return rc;
}

static int failed(const struct memory_options *o, const struct status *st)
{
    bool unreachable = st->code == ST_UNAVAILABLE || st->code == ST_DEADLINE_EXCEEDED;
    return cmd_failed(unreachable ? CMD_UNREACHABLE : CMD_FAILED, "memory", o->json, st);
}

static void print_json(json_t *object)
{
    json_dumpf(object, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(object);
}

static int set(const struct memory_options *o, struct tandem_client *c)
{
    struct status st = STATUS_INIT;
    Tandem__V1__SetKvMemoryResponse *m = NULL;
    if (tandem_client_set_kv_memory(c, o->group, o->bytes, &m, &st) != ST_OK)
        return failed(o, &st);
    if (o->json)
        print_json(json_pack("{s:I, s:I, s:I}", "total_pages", (json_int_t)m->total_pages, "goal_pages",
                             (json_int_t)m->goal_pages, "page_bytes", (json_int_t)m->page_bytes));
    else
        printf("%" PRIu64 " pages of %" PRIu64 " bytes, on the way to %" PRIu64 "\n", m->total_pages, m->page_bytes,
               m->goal_pages);
    tandem_free(m);
    return CMD_OK;
}

static void print_group(const Tandem__V1__GroupLoad *g)
{
    const Tandem__V1__KvStats *k = g->kv;
    printf("%s: %" PRIu64 " pages a rank, %" PRIu64 " in use", g->name, g->total_pages, g->used_pages);
    if (g->goal_pages)
        printf(", on the way to %" PRIu64, g->goal_pages);
    putchar('\n');
    if (!k || k->total_pages == 0)
        return;
    printf("  all its ranks: %" PRIu64 " mapped (%" PRIu64 " shared), %" PRIu64 " fenced, %" PRIu64 " free (%" PRIu64
           " parked), %" PRIu64 " given back\n",
           k->mapped_pages, k->shared_pages, k->fenced_pages, k->free_pages, k->parked_pages, k->given_pages);
    printf("  %.1f MiB behind last tokens; %" PRIu64 " calls that map, %" PRIu64
           " that clear or copy, %.1f ms in them, %.1f ms of steps\n",
           (double)k->wasted_bytes / 1048576.0, k->map_calls, k->clear_calls, (double)k->driver_us / 1e3,
           (double)k->exposed_us / 1e3);
}

/* The names are those of control.proto. */
static json_t *group_json(const Tandem__V1__GroupLoad *g)
{
    json_t *o =
        json_pack("{s:o, s:I, s:I, s:I}", "name", cmd_json_string(g->name), "total_pages", (json_int_t)g->total_pages,
                  "used_pages", (json_int_t)g->used_pages, "goal_pages", (json_int_t)g->goal_pages);
    const Tandem__V1__KvStats *k = g->kv;
    if (!k)
        return o;
    const struct {
        const char *name;
        uint64_t value;
    } of_ranks[] = {
        {"total_pages", k->total_pages},   {"mapped_pages", k->mapped_pages}, {"fenced_pages", k->fenced_pages},
        {"free_pages", k->free_pages},     {"parked_pages", k->parked_pages}, {"shared_pages", k->shared_pages},
        {"given_pages", k->given_pages},   {"wasted_bytes", k->wasted_bytes}, {"map_calls", k->map_calls},
        {"clear_calls", k->clear_calls},   {"driver_us", k->driver_us},       {"exposed_us", k->exposed_us},
        {"failed_ahead", k->failed_ahead},
    };
    json_t *kv = json_object();
    for (size_t i = 0; i < sizeof of_ranks / sizeof *of_ranks; i++)
        json_object_set_new(kv, of_ranks[i].name, json_integer((json_int_t)of_ranks[i].value));
    json_object_set_new(o, "kv", kv);
    return o;
}

static int show(const struct memory_options *o, struct tandem_client *c)
{
    struct status st = STATUS_INIT;
    Tandem__V1__Load *l = NULL;
    if (tandem_client_load(c, &l, &st) != ST_OK)
        return failed(o, &st);
    json_t *groups = json_array();
    for (size_t i = 0; i < l->n_groups; i++) {
        if (l->groups[i]->serving && o->json)
            json_array_append_new(groups, group_json(l->groups[i]));
        else if (l->groups[i]->serving)
            print_group(l->groups[i]);
    }
    if (o->json)
        print_json(json_pack("{s:O}", "groups", groups));
    json_decref(groups);
    tandem_free(l);
    return CMD_OK;
}

int cmd_memory(int argc, char **argv)
{
    struct memory_options o = {.server = {.address = CMD_DEFAULT_ADDRESS, .timeout_ms = CALL_MS}};
    int rc = parse(argc, argv, &o);
    if (!rc) {
        struct tandem_client *c = NULL;
        struct status st = STATUS_INIT;
        if (tandem_client_open(&c, &o.server, &st) != ST_OK)
            rc = failed(&o, &st);
        else
            rc = o.set ? set(&o, c) : show(&o, c);
        tandem_client_close(c);
    }
    cli_free(&o.args);
    return rc < 0 ? CMD_OK : rc;
}
