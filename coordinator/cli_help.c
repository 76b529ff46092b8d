/* --help and man pages. */
#include <string.h>

#include "coordinator/cli.h"

#define COLUMNS 100
#define INDENT  26

/* Words of text, in lines that begin at INDENT; the first goes on at column `at`. */
static void wrapped(FILE *to, const char *text, int at)
{
    for (bool first = true; *text; first = false) {
        size_t n = strcspn(text, " \n");
        if (!first && at + 1 + (int)n > COLUMNS) {
            fprintf(to, "\n%*s", INDENT, "");
            at = INDENT;
        } else if (!first) {
            putc(' ', to);
            at++;
        }
        fwrite(text, 1, n, to);
        at += (int)n;
        text += n;
        text += strspn(text, " \n");
    }
    putc('\n', to);
}

static void left_part(char *out, size_t room, const struct cli_option *o)
{
    snprintf(out, room, "--%s%s%s", o->name, o->arg ? " " : "", o->arg ? o->arg : "");
}

static void help_text(char *out, size_t room, const struct cli_option *o)
{
    snprintf(out, room, "%s%s%s%s%s%s", o->help, o->fallback ? " (default " : "", o->fallback ? o->fallback : "",
             o->fallback ? ")" : "", o->flags & CLI_REPEAT ? "; may be repeated" : "",
             o->flags & CLI_REQUIRED ? " (required)" : "");
}

static void print_table(FILE *to, const struct cli_option *table)
{
    for (const struct cli_option *o = table; o->name; o++) {
        char left[96], text[1024];
        left_part(left, sizeof left, o);
        help_text(text, sizeof text, o);
        int n = fprintf(to, "  %-*s", INDENT - 3, left);
        if (n >= INDENT) {
            fprintf(to, "\n%*s", INDENT, "");
            n = INDENT;
        } else {
            n += fprintf(to, "%*s", INDENT - n, "");
        }
        wrapped(to, text, n);
    }
}

void cli_help(FILE *to, const struct cli_command *c)
{
    bool any = c->tables[0] != NULL;
    fprintf(to, "usage: tandem %s", c->name);
    for (const struct cli_option *const *t = c->tables; *t; t++)
        for (const struct cli_option *o = *t; o->name; o++)
            if (o->flags & CLI_REQUIRED)
                fprintf(to, " --%s %s", o->name, o->arg);
    fprintf(to, "%s%s%s\n\n%s\n\n", any ? " [OPTIONS]" : "", c->operands ? " " : "", c->operands ? c->operands : "",
            c->about);
    for (const struct cli_option *const *t = c->tables; *t; t++)
        print_table(to, *t);
    print_table(to, cli_common);
    putc('\n', to);
    if (any)
        fputs(
            "Options may also stand in the environment, --top-k as TANDEM_TOP_K, and in a configuration file; `tandem\n"
            "config` shows what counts and where it comes from.\n",
            to);
    if (c->notes)
        fprintf(to, "%s\n", c->notes);
    if (c->exits)
        fprintf(to, "Exit status: %s\n", c->exits);
    if (c->examples)
        fprintf(to, "\n%s", c->examples);
}

/* ---- man ---- */

/* Text of ours as roff: what begins a request or an escape is taken literally. */
static void roff(FILE *to, const char *text)
{
    bool start = true;
    for (; *text; text++) {
        if (start && (*text == '.' || *text == '\''))
            fputs("\\&", to);
        if (*text == '\\')
            fputs("\\e", to);
        else if (*text == '-')
            fputs("\\-", to);
        else
            putc(*text, to);
        start = *text == '\n';
    }
}

static void roff_section(FILE *to, const char *title, const char *text, bool literal)
{
    if (!text)
        return;
    fprintf(to, ".SH %s\n%s", title, literal ? ".nf\n" : "");
    for (; *text; text++) { /* an empty line between paragraphs */
        const char *end = strstr(text, "\n\n");
        char part[4096];
        size_t n = literal || !end ? strlen(text) : (size_t)(end - text);
        snprintf(part, sizeof part, "%.*s", (int)n, text);
        roff(to, part);
        text += n;
        if (!*text)
            break;
        fputs("\n.PP\n", to);
        text++;
    }
    fprintf(to, "\n%s", literal ? ".fi\n" : "");
}

static void roff_table(FILE *to, const struct cli_option *table)
{
    for (const struct cli_option *o = table; o->name; o++) {
        char text[1024];
        fputs(".TP\n\\fB\\-\\-", to);
        roff(to, o->name);
        fputs("\\fR", to);
        if (o->arg) {
            fputs(" \\fI", to);
            roff(to, o->arg);
            fputs("\\fR", to);
        }
        putc('\n', to);
        help_text(text, sizeof text, o);
        roff(to, text);
        putc('\n', to);
    }
}

static void title(FILE *to, const char *name, const char *summary)
{
    fprintf(to, ".TH TANDEM%s%s 1 \"\" \"tandem " TANDEM_VERSION "\" \"User Commands\"\n.SH NAME\ntandem%s%s \\- ",
            *name ? "\\-" : "", name, *name ? "\\-" : "", name);
    roff(to, summary);
    putc('\n', to);
}

static void origins(FILE *to)
{
    static const char text[] =
        "Each option of a command has the value of the first of these that names it:\n\n"
        "1. the command line, --top-k 5 or --top-k=5\n\n"
        "2. the environment, for one command: TANDEM_GENERATE_TOP_K=5\n\n"
        "3. the environment: TANDEM_TOP_K=5; an empty variable counts as not set\n\n"
        "4. the configuration file, in the section of the command: [generate], then top-k = 5\n\n"
        "5. the configuration file, above all sections: for every command that has the option\n\n"
        "Values of options that may be repeated come from one of these only; in the environment one stands on each "
        "line, "
        "in a file the key is repeated. Switches are true or false; --greedy=false turns one off that is on "
        "elsewhere.\n\n"
        "The file is that of --config, else of TANDEM_CONFIG (empty: none), else $XDG_CONFIG_HOME/tandem/tandem.conf "
        "(~/.config where that is not set), else /etc/tandem/tandem.conf. # begins a comment; values with blanks at an "
        "end, # or quotes stand in double quotes, where \\n, \\t, \\r, \\\" and \\\\ are known. An unknown section or "
        "option is an error.";
    roff_section(to, "CONFIGURATION", text, false);
}

void cli_man(FILE *to, const struct cli_command *c, const struct cli_command *const *all)
{
    if (!c) {
        title(to, "", "serve large language models on a group of tensor-parallel ranks");
        fputs(".SH SYNOPSIS\n\\fBtandem\\fR \\fICOMMAND\\fR [\\fIOPTIONS\\fR]\n.SH COMMANDS\n", to);
        for (; *all; all++) {
            fprintf(to, ".TP\n\\fBtandem\\-%s\\fR(1)\n", (*all)->name);
            roff(to, (*all)->summary);
            putc('\n', to);
        }
        origins(to);
        return;
    }
    title(to, c->name, c->summary);
    fprintf(to, ".SH SYNOPSIS\n\\fBtandem %s\\fR%s ", c->name, c->tables[0] ? " [\\fIOPTIONS\\fR]" : "");
    roff(to, c->operands ? c->operands : "");
    putc('\n', to);
    roff_section(to, "DESCRIPTION", c->about, false);
    fputs(".SH OPTIONS\n", to);
    for (const struct cli_option *const *t = c->tables; *t; t++)
        roff_table(to, *t);
    roff_table(to, cli_common);
    roff_section(to, "NOTES", c->notes, false);
    roff_section(to, "EXIT STATUS", c->exits, false);
    roff_section(to, "EXAMPLES", c->examples, true);
    fputs(".SH SEE ALSO\n\\fBtandem\\fR(1), which says how configuration works\n", to);
}
