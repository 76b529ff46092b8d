/* cmd_config.c - commands about the command itself: `tandem config`, `tandem completion`, `tandem man`. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/cmd.h"

enum { OPT_JSON = 1 };

static const struct cli_option config_options[] = {
    {.name = "json",
     .id = OPT_JSON,
     .flags = CLI_LINE_ONLY,
     .help = "print one JSON object, with the options that have no value, too"},
    {0},
};

const struct cli_command cmd_config_cli = {
    .name = "config",
    .summary = "print the options that count, and where each comes from",
    .operands = "[COMMAND [OPTIONS OF IT]]",
    .words = "serve|generate|chat|bench|simulate|dump|top|memory|tokenize|probe|drain|models|config|completion|man",
    .about =
        "Prints the value of each option of COMMAND (without it: of all commands) as it would count, and its origin, "
        "in the\n"
        "form of a configuration file. The command itself checks values when it runs.\n\n"
        "The first that names an option wins: the command line; TANDEM_COMMAND_OPTION and then TANDEM_OPTION in the\n"
        "environment; the configuration file's section [command], then what stands above its sections.",
    .tables = (const struct cli_option *const[]){config_options, NULL},
    .exits = "0 done, 2 wrong usage or a wrong configuration file.",
    .examples = "  tandem config\n"
                "  TANDEM_TOP_K=5 tandem config generate --temperature 0.7\n"
                "  tandem config serve > ~/.config/tandem/tandem.conf      # to begin with\n",
    .hands_on = true,
};

/* json NULL: as text. */
static void show_value(const struct cli_option *o, const struct cli_value *v, json_t *json)
{
    static const char *const names[] = {"file", "file", "environment", "environment", "command line"};
    const char *text = v ? (o->arg ? v->text : v->off ? "false" : "true") : o->fallback;
    const char *origin = v ? names[v->origin] : o->fallback ? "default" : "unset";
    const char *where = v && v->origin != CLI_ARGUMENT ? v->where : origin;
    if (json) {
        json_t *values = json_object_get(json_object_get(json, o->name), "values");
        if (!values) {
            values = json_array();
            json_object_set_new(json, o->name,
                                json_pack("{s:o, s:s, s:s}", "values", values, "origin", origin, "where", where));
        }
        if (text)
            json_array_append_new(values, json_string(text));
        return;
    }
    if (!text)
        return;
    printf("%s = ", o->name);
    cli_file_write(stdout, text);
    printf("    # %s\n", where);
}

static void show_command(const struct cli_args *a, json_t *json)
{
    if (!json)
        printf("[%s]\n", a->command->name);
    for (const struct cli_option *const *t = a->command->tables; *t; t++)
        for (const struct cli_option *o = *t; o->name; o++) {
            if (o->flags & CLI_LINE_ONLY)
                continue;
            const struct cli_value *v = cli_find(a, o, 0);
            show_value(o, v, json);
            for (size_t n = 1; v && (v = cli_find(a, o, n)) != NULL; n++)
                show_value(o, v, json);
        }
}

static bool has_options(const struct cli_command *c)
{
    for (const struct cli_option *const *t = c->tables; *t; t++)
        for (const struct cli_option *o = *t; o->name; o++)
            if (!(o->flags & CLI_LINE_ONLY))
                return true;
    return false;
}

/* argv[0] is the command whose options the rest may be; file: of our own --config, or NULL. */
static int show(const struct cli_command *c, int argc, char **argv, const char *file, json_t *all)
{
    struct cli_args a = {0};
    char **full = calloc((size_t)argc + 3, sizeof *full);
    if (!full)
        return cmd_error(CMD_FAILED, "config", "out of memory for the options");
    int n = 0;
    full[n++] = argv[0];
    if (file) {
        full[n++] = (char *)"--config";
        full[n++] = (char *)file;
    }
    memcpy(full + n, argv + 1, (size_t)(argc - 1) * sizeof *full);
    int rc = cmd_read(&a, c, n + argc - 1, full);
    if (rc == CMD_OK) {
        json_t *json = all ? json_object() : NULL;
        show_command(&a, json);
        if (all)
            json_object_set_new(all, c->name, json);
    }
    cli_free(&a);
    free(full);
    return rc < 0 ? CMD_OK : rc;
}

int cmd_config(int argc, char **argv)
{
    struct cli_args a = {0};
    json_t *json = NULL;
    int rc = cmd_read(&a, &cmd_config_cli, argc, argv);
    if (rc)
        goto done;
    while (cli_next(&a))
        if (!json)
            json = json_object();
    if (a.n_operands) {
        const struct cli_command *c = cli_command_find(cmd_all, a.operands[0], strlen(a.operands[0]));
        rc = c && has_options(c) ? show(c, a.n_operands, a.operands, a.config, json)
                                 : cmd_error(CMD_USAGE, "config",
                                             "%s: no command with a configuration; see `tandem --help`", a.operands[0]);
    } else {
        for (const struct cli_command *const *c = cmd_all; *c && !rc; c++) {
            char *name[2] = {(char *)(*c)->name, NULL};
            if (!has_options(*c))
                continue;
            rc = show(*c, 1, name, a.config, json);
            if (!json)
                putchar('\n');
        }
    }
    if (json && !rc) {
        json_dumpf(json, stdout, JSON_INDENT(2));
        putchar('\n');
    }
done:
    json_decref(json);
    cli_free(&a);
    return rc < 0 ? CMD_OK : rc;
}

/* ---- completion, man ---- */

static const struct cli_option *const no_tables[] = {NULL};

const struct cli_command cmd_completion_cli = {
    .name = "completion",
    .summary = "print the completion of a shell",
    .operands = "bash|zsh|fish",
    .words = "bash|zsh|fish",
    .about = "Prints a script that lets a shell complete commands, options and their values.",
    .tables = no_tables,
    .exits = "0 done, 2 wrong usage.",
    .examples = "  source <(tandem completion bash)\n"
                "  tandem completion zsh > \"${fpath[1]}/_tandem\"\n"
                "  tandem completion fish > ~/.config/fish/completions/tandem.fish\n",
};

const struct cli_command cmd_man_cli = {
    .name = "man",
    .summary = "print a man page",
    .operands = "[COMMAND]",
    .words = "serve|generate|chat|bench|simulate|dump|top|memory|tokenize|probe|drain|models|config|completion|man",
    .about = "Prints the source of the man page tandem-COMMAND(1), or of tandem(1). It is made of what --help shows.",
    .tables = no_tables,
    .exits = "0 done, 2 wrong usage.",
    .examples = "  tandem man generate | man -l -\n",
};

int cmd_completion(int argc, char **argv)
{
    struct cli_args a = {0};
    int rc = cmd_read(&a, &cmd_completion_cli, argc, argv);
    if (!rc && (a.n_operands != 1 || !cli_completion(stdout, a.operands[0], cmd_all)))
        rc = cmd_error(CMD_USAGE, "completion", "expected one of bash, zsh, fish");
    cli_free(&a);
    return rc < 0 ? CMD_OK : rc;
}

int cmd_man(int argc, char **argv)
{
    struct cli_args a = {0};
    int rc = cmd_read(&a, &cmd_man_cli, argc, argv);
    if (!rc) {
        const char *name = a.n_operands == 1 ? a.operands[0] : NULL;
        const struct cli_command *c = name ? cli_command_find(cmd_all, name, strlen(name)) : NULL;
        if (a.n_operands > 1 || (name && !c))
            rc = cmd_error(CMD_USAGE, "man", "expected the name of one command; see `tandem --help`");
        else
            cli_man(stdout, c, cmd_all);
    }
    cli_free(&a);
    return rc < 0 ? CMD_OK : rc;
}
