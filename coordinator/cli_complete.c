/* Completion of shells. Choices and operand words are written "a|b|c" in the tables. */
#include <string.h>

#include "coordinator/cli.h"

static void print_words(FILE *to, const char *words)
{
    for (; words && *words; words++)
        putc(*words == '|' ? ' ' : *words, to);
}

/* Calls each of the command's options, the common ones included. */
static void each_option(FILE *to, const struct cli_command *c,
                        void (*fn)(FILE *to, const struct cli_command *c, const struct cli_option *o))
{
    for (const struct cli_option *const *t = c->tables; *t; t++)
        for (const struct cli_option *o = *t; o->name; o++)
            fn(to, c, o);
    for (const struct cli_option *o = cli_common; o->name; o++)
        fn(to, c, o);
}

static void command_names(FILE *to, const struct cli_command *const *all)
{
    for (; *all; all++)
        fprintf(to, "%s ", (*all)->name);
}

/* ---- bash ---- */

static void bash_name(FILE *to, const struct cli_command *c, const struct cli_option *o)
{
    (void)c;
    fprintf(to, "--%s ", o->name);
}

static void bash_value(FILE *to, const struct cli_command *c, const struct cli_option *o)
{
    if (!o->arg)
        return;
    fprintf(to, "        %s:--%s) ", c->name, o->name);
    if (o->flags & CLI_FILE) {
        fputs("compopt -o filenames; COMPREPLY=($(compgen -f -- \"$word\"))", to);
    } else if (o->choices) {
        fputs("COMPREPLY=($(compgen -W '", to);
        print_words(to, o->choices);
        fputs("' -- \"$word\"))", to);
    } else {
        putc(':', to);
    }
    fputs("; return ;;\n", to);
}

static void bash(FILE *to, const struct cli_command *const *all)
{
    fputs("# bash completion of tandem: source <(tandem completion bash)\n"
          "_tandem() {\n"
          "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]} "
          "options=\n"
          "    COMPREPLY=()\n"
          "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
          "        COMPREPLY=($(compgen -W '",
          to);
    command_names(to, all);
    fputs("--help --version' -- \"$word\"))\n        return\n    fi\n    case $command:$before in\n", to);
    for (const struct cli_command *const *c = all; *c; c++)
        each_option(to, *c, bash_value);
    fputs("    esac\n    case $command in\n", to);
    for (const struct cli_command *const *c = all; *c; c++) {
        fprintf(to, "        %s) options='", (*c)->name);
        each_option(to, *c, bash_name);
        fputs("'", to);
        if ((*c)->words) {
            fputs("\n            [ \"$COMP_CWORD\" -eq 2 ] && [[ $word != -* ]] && options='", to);
            print_words(to, (*c)->words);
            fputs("'", to);
        }
        fputs(" ;;\n", to);
    }
    fputs("    esac\n"
          "    COMPREPLY=($(compgen -W \"$options\" -- \"$word\"))\n"
          "    if [ ${#COMPREPLY[@]} -eq 0 ] && [[ $word != -* ]]; then\n"
          "        compopt -o filenames\n"
          "        COMPREPLY=($(compgen -f -- \"$word\"))\n"
          "    fi\n"
          "}\n"
          "complete -F _tandem tandem\n",
          to);
}

/* ---- zsh, fish ---- */

/* The first sentence or so of a help, within quotes of a shell: '...' with what would end or expand it left out. */
static void brief(FILE *to, const char *text, const char *without)
{
    size_t n = strcspn(text, ";\n");
    for (size_t i = 0; i < n && i < 70; i++)
        putc(strchr(without, text[i]) ? ' ' : text[i], to);
}

static void zsh_option(FILE *to, const struct cli_command *c, const struct cli_option *o)
{
    (void)c;
    fprintf(to, "                '%s--%s%s[", o->flags & CLI_REPEAT ? "*" : "", o->name, o->arg ? "=" : "");
    brief(to, o->help, "'[]:\\`$");
    fputs("]", to);
    if (o->arg) {
        fputs(":value:", to);
        if (o->flags & CLI_FILE)
            fputs("_files", to);
        else if (o->choices) {
            putc('(', to);
            print_words(to, o->choices);
            putc(')', to);
        }
    }
    fputs("' \\\n", to);
}

static void zsh(FILE *to, const struct cli_command *const *all)
{
    fputs("#compdef tandem\n# zsh completion of tandem: tandem completion zsh > a folder of $fpath/_tandem\n"
          "_tandem() {\n"
          "    local -a commands\n"
          "    commands=(\n",
          to);
    for (const struct cli_command *const *c = all; *c; c++) {
        fprintf(to, "        '%s:", (*c)->name);
        brief(to, (*c)->summary, "':");
        fputs("'\n", to);
    }
    fputs("    )\n"
          "    if (( CURRENT == 2 )); then\n"
          "        _describe command commands\n"
          "        return\n"
          "    fi\n"
          "    local command=${words[2]}\n"
          "    shift words\n"
          "    (( CURRENT-- ))\n"
          "    case $command in\n",
          to);
    for (const struct cli_command *const *c = all; *c; c++) {
        fprintf(to, "        %s)\n            _arguments -S \\\n", (*c)->name);
        each_option(to, *c, zsh_option);
        if ((*c)->words) {
            fputs("                '1:operand:(", to);
            print_words(to, (*c)->words);
            fputs(")' \\\n", to);
        }
        fputs("                '*:file:_files' ;;\n", to);
    }
    fputs("    esac\n}\n"
          "if [ \"$funcstack[1]\" = _tandem ]; then\n    _tandem \"$@\"\nelse\n    compdef _tandem tandem\nfi\n",
          to);
}

static void fish_option(FILE *to, const struct cli_command *c, const struct cli_option *o)
{
    fprintf(to, "complete -c tandem -n '__fish_seen_subcommand_from %s' -l %s", c->name, o->name);
    if (o->arg)
        fputs(o->flags & CLI_FILE ? " -r -F" : " -x", to);
    if (o->choices) {
        fputs(" -a '", to);
        print_words(to, o->choices);
        fputs("'", to);
    }
    fputs(" -d '", to);
    brief(to, o->help, "'\\");
    fputs("'\n", to);
}

static void fish(FILE *to, const struct cli_command *const *all)
{
    fputs("# fish completion of tandem: tandem completion fish > ~/.config/fish/completions/tandem.fish\n", to);
    for (const struct cli_command *const *c = all; *c; c++) {
        fprintf(to, "complete -c tandem -f -n __fish_use_subcommand -a %s -d '", (*c)->name);
        brief(to, (*c)->summary, "'\\");
        fputs("'\n", to);
        each_option(to, *c, fish_option);
        if ((*c)->words) {
            fprintf(to, "complete -c tandem -n '__fish_seen_subcommand_from %s' -a '", (*c)->name);
            print_words(to, (*c)->words);
            fputs("'\n", to);
        }
    }
}

bool cli_completion(FILE *to, const char *shell, const struct cli_command *const *all)
{
    static const struct {
        const char *name;
        void (*print)(FILE *to, const struct cli_command *const *all);
    } shells[] = {{"bash", bash}, {"zsh", zsh}, {"fish", fish}};
    for (size_t i = 0; i < sizeof shells / sizeof *shells; i++)
        if (strcmp(shell, shells[i].name) == 0) {
            shells[i].print(to, all);
            return true;
        }
    return false;
}
