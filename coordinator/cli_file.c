/* cli_file.c - the configuration file.
 *
 *     # a comment
 *     address = llm.example:50051        # a comment, too: blank and # end a bare value
 *     [generate]
 *     stop = "\n\n"                      in quotes: \n \t \r \" \\ and anything but a line's end
 *     stop = END                         again: one more value, for options that may be repeated
 *     greedy = true                      switches: true or false, also yes, no, on, off, 1, 0
 *
 * Lines end in LF or CRLF. A key is an option's name without its dashes. No NUL, at most CLI_FILE_MAX_BYTES and
 * CLI_FILE_MAX_ENTRIES; anything else is refused with its line. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "coordinator/cli.h"

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r';
}

/* Lower case, digits and dashes. Returns its end. */
static char *name_end(char *p)
{
    while ((*p >= 'a' && *p <= 'z') || (*p >= '0' && *p <= '9') || *p == '-')
        p++;
    return p;
}

static char *skip_blanks(char *p)
{
    while (is_blank(*p))
        p++;
    return p;
}

/* In place. Returns what is wrong, or NULL. */
static const char *parse_quoted(char *p, char **rest)
{
    static const char letters[] = "ntr\"\\", meanings[] = "\n\t\r\"\\";
    char *to = p;
    for (; *p && *p != '"'; p++) {
        if (*p == '\\') {
            const char *letter = p[1] ? strchr(letters, p[1]) : NULL;
            if (!letter)
                return "expected n, t, r, \" or \\ behind a backslash";
            *to++ = meanings[letter - letters];
            p++;
        } else {
            *to++ = *p;
        }
    }
    if (!*p)
        return "a quote (\") is not closed on its line";
    *rest = p + 1;
    *to = '\0';
    return NULL;
}

static void end_bare(char *p)
{
    char *end = p;
    for (; *p; p++) {
        if (*p == '#' && is_blank(p[-1]))
            break;
        if (!is_blank(*p))
            end = p + 1;
    }
    *end = '\0';
}

/* `key = value`. Returns what is wrong, or NULL. */
static const char *parse_entry(char *p, struct cli_file_entry *e)
{
    char *end = name_end(p), *equals = skip_blanks(end);
    if (end == p || *equals != '=')
        return "expected `option = value`, `[command]` or a comment";
    char *value = skip_blanks(equals + 1);
    *end = '\0';
    e->key = p;
    e->value = value;
    if (*value == '"') {
        char *rest = NULL;
        const char *wrong = parse_quoted(value + 1, &rest);
        if (wrong)
            return wrong;
        rest = skip_blanks(rest);
        e->value = value + 1;
        return *rest && *rest != '#' ? "expected nothing but a comment behind the quotes" : NULL;
    }
    if (*value == '#')
        *value = '\0';
    else
        end_bare(value);
    return NULL;
}

static const char *parse_section(char *p, const char **section)
{
    char *name = skip_blanks(p + 1), *end = name_end(name), *close = skip_blanks(end);
    char *rest = *close == ']' ? skip_blanks(close + 1) : close;
    if (end == name || *close != ']' || (*rest && *rest != '#'))
        return "expected [command]";
    *end = '\0';
    *section = name;
    return NULL;
}

static enum status_code add_entry(struct cli_file *f, size_t *room, struct cli_file_entry e, struct status *st)
{
    if (f->n == *room) {
        size_t more = *room ? *room * 2 : 16;
        struct cli_file_entry *grown = realloc(f->entries, more * sizeof *grown);
        if (!grown)
            return status_nomem(st, "configuration file", more * sizeof *grown);
        f->entries = grown;
        *room = more;
    }
    f->entries[f->n++] = e;
    return ST_OK;
}

/* f->text is parsed in place. */
static enum status_code parse_lines(struct cli_file *f, const char *name, struct status *st)
{
    const char *section = "";
    size_t room = 0;
    unsigned line = 0;
    for (char *p = f->text, *next; p; p = next) {
        const char *wrong = NULL;
        struct cli_file_entry e = {.section = section, .line = ++line};
        next = strchr(p, '\n');
        if (next)
            *next++ = '\0';
        p = skip_blanks(p);
        if (!*p || *p == '#')
            continue;
        wrong = *p == '[' ? parse_section(p, &section) : parse_entry(p, &e);
        if (wrong)
            return status_set(st, ST_INVALID_ARGUMENT, "%s:%u: %s", name, line, wrong);
        if (!e.key)
            continue;
        if (f->n == CLI_FILE_MAX_ENTRIES)
            return status_set(st, ST_INVALID_ARGUMENT, "%s:%u: more than %d values", name, line, CLI_FILE_MAX_ENTRIES);
        enum status_code rc = add_entry(f, &room, e, st);
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}

enum status_code cli_file_parse(struct cli_file *out, const char *name, const char *text, size_t bytes,
                                struct status *st)
{
    struct cli_file f = {0};
    if (bytes > CLI_FILE_MAX_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: over %u bytes", name, CLI_FILE_MAX_BYTES);
    const char *nul = memchr(text, 0, bytes);
    if (nul)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: a NUL at byte %zu, expected text", name, (size_t)(nul - text));
    f.text = malloc(bytes + 1);
    if (!f.text)
        return status_nomem(st, "configuration file", bytes + 1);
    memcpy(f.text, text, bytes);
    f.text[bytes] = '\0';
    enum status_code rc = parse_lines(&f, name, st);
    if (rc == ST_OK)
        *out = f;
    else
        cli_file_free(&f);
    return rc;
}

enum status_code cli_file_load(struct cli_file *out, const char *path, struct status *st)
{
    enum status_code rc;
    struct stat sb;
    char *text = NULL;
    size_t have = 0;
    ssize_t n = 1;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO would wait for a writer */
    if (fd < 0 || fstat(fd, &sb)) {
        rc = status_errno(st, errno == EACCES ? ST_PERMISSION_DENIED : ST_NOT_FOUND, errno, "%s", path);
        goto done;
    }
    if (!S_ISREG(sb.st_mode) && !S_ISCHR(sb.st_mode)) {
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s: not a file", path);
        goto done;
    }
    text = malloc(CLI_FILE_MAX_BYTES + 1);
    if (!text) {
        rc = status_nomem(st, "configuration file", CLI_FILE_MAX_BYTES + 1);
        goto done;
    }
    while (have <= CLI_FILE_MAX_BYTES && (n = read(fd, text + have, CLI_FILE_MAX_BYTES + 1 - have)) > 0)
        have += (size_t)n;
    if (n < 0)
        rc = status_errno(st, ST_INVALID_ARGUMENT, errno, "%s", path);
    else
        rc = cli_file_parse(out, path, text, have, st);
done:
    free(text);
    if (fd >= 0)
        close(fd);
    return rc;
}

void cli_file_free(struct cli_file *f)
{
    free(f->text);
    free(f->entries);
    *f = (struct cli_file){0};
}

void cli_file_write(FILE *to, const char *value)
{
    size_t n = strlen(value);
    if (n && !strpbrk(value, "\n\t\r\"\\#") && !is_blank(value[0]) && !is_blank(value[n - 1])) {
        fputs(value, to);
        return;
    }
    putc('"', to);
    for (; *value; value++) {
        static const char raw[] = "\n\t\r\"\\", letters[] = "ntr\"\\";
        const char *at = strchr(raw, *value);
        if (at)
            fprintf(to, "\\%c", letters[at - raw]);
        else
            putc(*value, to);
    }
    putc('"', to);
}
