#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/cli.h"

enum { ID_CONFIG = -1, ID_HELP = -2 };

const struct cli_option cli_common[] = {
    {.name = "config",
     .id = ID_CONFIG,
     .arg = "FILE",
     .flags = CLI_LINE_ONLY | CLI_FILE,
     .help = "configuration file (default: $TANDEM_CONFIG, else ~/.config/tandem/tandem.conf, else "
             "/etc/tandem/tandem.conf)"},
    {.name = "help", .id = ID_HELP, .flags = CLI_LINE_ONLY, .help = "this text"},
    {0},
};

static const struct cli_option *find_in(const struct cli_option *table, const char *name, size_t n, bool abbreviation,
                                        const struct cli_option **partial, int *n_partial)
{
    for (const struct cli_option *o = table; o->name; o++) {
        if (strncmp(o->name, name, n) != 0)
            continue;
        if (!o->name[n])
            return o;
        if (abbreviation) {
            *partial = o;
            ++*n_partial;
        }
    }
    return NULL;
}

const struct cli_option *cli_option_find(const struct cli_command *c, const char *name, size_t n, bool abbreviation)
{
    const struct cli_option *partial = NULL, *found = NULL;
    int n_partial = 0;
    for (const struct cli_option *const *t = c->tables; !found && *t; t++)
        found = find_in(*t, name, n, abbreviation, &partial, &n_partial);
    if (!found)
        found = find_in(cli_common, name, n, abbreviation, &partial, &n_partial);
    return found ? found : n_partial == 1 ? partial : NULL;
}

const struct cli_command *cli_command_find(const struct cli_command *const *all, const char *name, size_t n)
{
    for (; *all; all++)
        if (strncmp((*all)->name, name, n) == 0 && !(*all)->name[n])
            return *all;
    return NULL;
}

/* ---- one value ---- */

static bool parse_switch(const char *text, bool *on)
{
    static const char *const words[] = {"true", "yes", "on", "1", "false", "no", "off", "0"};
    for (size_t i = 0; i < 8; i++)
        if (strcmp(text, words[i]) == 0) {
            *on = i < 4;
            return true;
        }
    return false;
}

static enum status_code add(struct cli_args *a, const struct cli_option *o, enum cli_origin origin, const char *where,
                            const char *text, size_t n, struct status *st)
{
    struct cli_value v = {.option = o, .origin = origin};
    bool on = true;
    struct cli_value *grown = realloc(a->values, (a->n_values + 1) * sizeof *grown);
    if (!grown)
        return status_nomem(st, "options", (a->n_values + 1) * sizeof *grown);
    a->values = grown;
    v.text = strndup(text, n);
    v.where = strdup(where);
    if (!v.text || !v.where) {
        free(v.text);
        free(v.where);
        return status_nomem(st, "options", n);
    }
    enum status_code rc = ST_OK;
    if (!o->arg && !parse_switch(v.text, &on))
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s: %s is \"%.60s\", expected true or false", where, o->name, v.text);
    v.off = !on;
    a->values[a->n_values++] = v;
    return rc;
}

static bool has(const struct cli_args *a, const struct cli_option *o, enum cli_origin origin)
{
    for (size_t i = 0; i < a->n_values; i++)
        if (a->values[i].option == o && a->values[i].origin == origin)
            return true;
    return false;
}

/* ---- the file ---- */

/* Every entry is looked at, also those for other commands: a misspelt option must not wait for its day. */
static enum status_code check_entry(const struct cli_file_entry *e, const struct cli_command *const *all,
                                    const char *path, struct status *st)
{
    const struct cli_option *o = NULL;
    const struct cli_command *c = NULL;
    size_t n = strlen(e->key);
    if (*e->section) {
        c = cli_command_find(all, e->section, strlen(e->section));
        if (!c)
            return status_set(st, ST_INVALID_ARGUMENT, "%s:%u: [%.60s]: no such command", path, e->line, e->section);
        o = cli_option_find(c, e->key, n, false);
    }
    for (size_t i = 0; !c && all[i] && (!o || (o->flags & CLI_LINE_ONLY)); i++) {
        const struct cli_option *other = cli_option_find(all[i], e->key, n, false);
        o = other ? other : o;
    }
    if (!o)
        return status_set(st, ST_INVALID_ARGUMENT, "%s:%u: %.60s: no such option%s%s", path, e->line, e->key,
                          c ? " of " : "", c ? c->name : "");
    if (o->flags & CLI_LINE_ONLY)
        return status_set(st, ST_INVALID_ARGUMENT, "%s:%u: %s: on the command line only", path, e->line, e->key);
    return ST_OK;
}

static enum status_code take_file(struct cli_args *a, const struct cli_command *const *all, struct status *st)
{
    struct cli_file f = {0};
    enum status_code rc = cli_file_load(&f, a->config, st);
    for (size_t i = 0; rc == ST_OK && i < f.n; i++)
        rc = check_entry(&f.entries[i], all, a->config, st);
    for (enum cli_origin origin = CLI_TOP; origin <= CLI_SECTION; origin++)
        for (size_t i = 0; rc == ST_OK && i < f.n; i++) {
            const struct cli_file_entry *e = &f.entries[i];
            const struct cli_option *o = cli_option_find(a->command, e->key, strlen(e->key), false);
            char where[4200];
            if (strcmp(e->section, origin == CLI_TOP ? "" : a->command->name) != 0 || !o || (o->flags & CLI_LINE_ONLY))
                continue;
            snprintf(where, sizeof where, "%s:%u", a->config, e->line);
            if (!(o->flags & CLI_REPEAT) && has(a, o, origin))
                rc = status_set(st, ST_INVALID_ARGUMENT, "%s: %s is given twice", where, o->name);
            else
                rc = add(a, o, origin, where, e->value, strlen(e->value), st);
        }
    cli_file_free(&f);
    return rc;
}

/* Sets a->config unless --config did. */
static enum status_code find_file(struct cli_args *a, struct status *st)
{
    const char *env = getenv("TANDEM_CONFIG"), *xdg = getenv("XDG_CONFIG_HOME"), *home = getenv("HOME");
    char path[4096] = "";
    if (a->config)
        return ST_OK;
    if (env) {
        if (!*env)
            return ST_OK;
        snprintf(path, sizeof path, "%s", env);
    } else {
        if (xdg && *xdg == '/')
            snprintf(path, sizeof path, "%s/tandem/tandem.conf", xdg);
        else if (home && *home == '/')
            snprintf(path, sizeof path, "%s/.config/tandem/tandem.conf", home);
        if (!*path || access(path, F_OK))
            snprintf(path, sizeof path, "/etc/tandem/tandem.conf");
        if (access(path, F_OK))
            return ST_OK;
    }
    a->config = strdup(path);
    return a->config ? ST_OK : status_nomem(st, "options", strlen(path));
}

/* ---- the environment ---- */

static void variable_name(char *out, size_t room, const char *command, const char *option)
{
    int n = snprintf(out, room, "TANDEM_%s%s%s", command, *command ? "_" : "", option);
    for (int i = 0; i < n && (size_t)i < room; i++) {
        if (out[i] == '-')
            out[i] = '_';
        else if (out[i] >= 'a' && out[i] <= 'z')
            out[i] = (char)(out[i] - 'a' + 'A');
    }
}

static enum status_code take_variable(struct cli_args *a, const struct cli_option *o, enum cli_origin origin,
                                      struct status *st)
{
    char name[128];
    variable_name(name, sizeof name, origin == CLI_ENV ? "" : a->command->name, o->name);
    const char *text = getenv(name);
    enum status_code rc = ST_OK;
    if (!text || !*text)
        return ST_OK;
    if (!(o->flags & CLI_REPEAT))
        return add(a, o, origin, name, text, strlen(text), st);
    for (; rc == ST_OK && *text;) {
        size_t n = strcspn(text, "\n");
        if (n)
            rc = add(a, o, origin, name, text, n, st);
        text += n + (text[n] == '\n');
    }
    return rc;
}

static enum status_code take_environment(struct cli_args *a, struct status *st)
{
    enum status_code rc = ST_OK;
    for (enum cli_origin origin = CLI_ENV; origin <= CLI_ENV_COMMAND; origin++)
        for (const struct cli_option *const *t = a->command->tables; *t; t++)
            for (const struct cli_option *o = *t; rc == ST_OK && o->name; o++)
                if (!(o->flags & CLI_LINE_ONLY))
                    rc = take_variable(a, o, origin, st);
    return rc;
}

/* ---- the command line ---- */

static enum status_code take_argument(struct cli_args *a, int *i, int argc, char **argv, struct status *st)
{
    const char *word = argv[*i];
    if (strcmp(word, "-h") == 0) {
        a->help = true;
        return ST_OK;
    }
    size_t n = word[1] == '-' ? strcspn(word + 2, "=") : 0;
    const struct cli_option *o = n ? cli_option_find(a->command, word + 2, n, true) : NULL;
    if (strcmp(word, "-a") == 0) /* older than the rest, and short */
        o = cli_option_find(a->command, "address", 7, false);
    if (!o)
        return status_set(st, ST_INVALID_ARGUMENT, "unknown or ambiguous option %.100s; see `tandem %s --help`", word,
                          a->command->name);
    const char *value = n && word[2 + n] ? word + 2 + n + 1 : NULL;
    if (!value && !o->arg)
        value = "true";
    else if (!value && *i + 1 < argc)
        value = argv[++*i];
    if (!value)
        return status_set(st, ST_INVALID_ARGUMENT, "option --%s needs a value; see `tandem %s --help`", o->name,
                          a->command->name);
    if (o->id == ID_HELP) {
        a->help = true;
        return ST_OK;
    }
    if (o->id == ID_CONFIG) {
        free(a->config);
        a->config = strdup(value);
        return a->config ? ST_OK : status_nomem(st, "options", strlen(value));
    }
    return add(a, o, CLI_ARGUMENT, "command line", value, strlen(value), st);
}

static enum status_code take_line(struct cli_args *a, int argc, char **argv, struct status *st)
{
    enum status_code rc = ST_OK;
    bool options = true;
    a->operands = calloc((size_t)argc + 1, sizeof *a->operands);
    if (!a->operands)
        return status_nomem(st, "options", (size_t)argc * sizeof *a->operands);
    for (int i = 1; rc == ST_OK && i < argc && !a->help; i++) {
        if (options && strcmp(argv[i], "--") == 0)
            options = false;
        else if (options && argv[i][0] == '-' && argv[i][1])
            rc = take_argument(a, &i, argc, argv, st);
        else
            a->operands[a->n_operands++] = argv[i];
        if (a->n_operands && a->command->hands_on)
            options = false;
    }
    return rc;
}

/* Values whose option has some of a higher origin go. */
static void keep_highest(struct cli_args *a)
{
    size_t kept = 0;
    for (size_t i = 0; i < a->n_values; i++) {
        bool beaten = false;
        for (size_t k = i + 1; k < a->n_values && !beaten; k++)
            beaten = a->values[k].option == a->values[i].option && a->values[k].origin > a->values[i].origin;
        if (beaten) {
            free(a->values[i].text);
            free(a->values[i].where);
        } else {
            a->values[kept++] = a->values[i];
        }
    }
    a->n_values = kept;
}

enum status_code cli_read(struct cli_args *a, const struct cli_command *command, const struct cli_command *const *all,
                          int argc, char **argv, struct status *st)
{
    *a = (struct cli_args){.command = command};
    snprintf(a->where, sizeof a->where, "%s", command->name);
    /* The line is read first, since it names the file, and its values are put behind the others. */
    enum status_code rc = take_line(a, argc, argv, st);
    if (rc != ST_OK || a->help)
        return rc;
    struct cli_value *line = a->values;
    size_t n_line = a->n_values;
    a->values = NULL;
    a->n_values = 0;
    rc = find_file(a, st);
    if (rc == ST_OK && a->config)
        rc = take_file(a, all, st);
    if (rc == ST_OK)
        rc = take_environment(a, st);
    struct cli_value *grown = n_line ? realloc(a->values, (a->n_values + n_line) * sizeof *grown) : a->values;
    if (n_line && !grown) {
        for (size_t i = 0; i < n_line; i++) {
            free(line[i].text);
            free(line[i].where);
        }
        free(line);
        return status_nomem(st, "options", n_line * sizeof *grown);
    }
    a->values = grown;
    if (n_line)
        memcpy(a->values + a->n_values, line, n_line * sizeof *line);
    a->n_values += n_line;
    free(line);
    keep_highest(a);
    return rc;
}

int cli_next(struct cli_args *a)
{
    while (a->at < a->n_values) {
        const struct cli_value *v = &a->values[a->at++];
        if (v->off)
            continue;
        a->text = v->text;
        if (v->origin == CLI_ARGUMENT)
            snprintf(a->where, sizeof a->where, "%s", a->command->name);
        else
            snprintf(a->where, sizeof a->where, "%s: %s", a->command->name, v->where);
        return v->option->id;
    }
    snprintf(a->where, sizeof a->where, "%s", a->command->name);
    return 0;
}

const struct cli_value *cli_find(const struct cli_args *a, const struct cli_option *o, size_t nth)
{
    const struct cli_value *last = NULL;
    for (size_t i = 0; i < a->n_values; i++) {
        if (a->values[i].option != o)
            continue;
        last = &a->values[i];
        if ((o->flags & CLI_REPEAT) && nth-- == 0)
            return last;
    }
    return (o->flags & CLI_REPEAT) || nth ? NULL : last;
}

void cli_free(struct cli_args *a)
{
    for (size_t i = 0; i < a->n_values; i++) {
        free(a->values[i].text);
        free(a->values[i].where);
    }
    free(a->values);
    free(a->operands);
    free(a->config);
    *a = (struct cli_args){0};
}
