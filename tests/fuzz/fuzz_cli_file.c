/* fuzz_cli_file.c - any bytes as a configuration file.
 *
 * What must hold: an error has a message that names file; what was read, written again, reads the same. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/cli.h"
#include "tests/fuzz/fuzz.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_cli_file: %s\n", what);
    abort();
}

static void check_again(const struct cli_file *f)
{
    char *text = NULL;
    size_t bytes = 0;
    struct cli_file again = {0};
    struct status st = STATUS_INIT;
    FILE *to = open_memstream(&text, &bytes);
    require(to != NULL, "memory");
    for (size_t i = 0; i < f->n; i++) {
        if (*f->entries[i].section)
            fprintf(to, "[%s]\n", f->entries[i].section);
        fprintf(to, "%s = ", f->entries[i].key);
        cli_file_write(to, f->entries[i].value);
        fputs("   # comment\n", to);
    }
    fclose(to);
    if (bytes <= CLI_FILE_MAX_BYTES) {
        require(cli_file_parse(&again, "f", text, bytes, &st) == ST_OK, "what was written reads");
        require(again.n == f->n, "as many values");
        for (size_t i = 0; i < f->n; i++)
            require(strcmp(again.entries[i].section, f->entries[i].section) == 0 &&
                        strcmp(again.entries[i].key, f->entries[i].key) == 0 &&
                        strcmp(again.entries[i].value, f->entries[i].value) == 0,
                    "the same values");
        cli_file_free(&again);
    }
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct cli_file f = {0};
    struct status st = STATUS_INIT;
    enum status_code rc = cli_file_parse(&f, "f", (const char *)data, size, &st);
    require(rc == ST_OK || (strncmp(st.message, "f:", 2) == 0 && !f.text), "an error names the file and gives nothing");
    if (rc == ST_OK)
        check_again(&f);
    cli_file_free(&f);
    return 0;
}

#ifndef TANDEM_LIBFUZZER

static const char *const PIECES[] = {
    "[generate]\n",
    "[ serve ] # c\n",
    "top-k = 5\n",
    "stop=\"a\\n\\\"b\\\\\"#c\n",
    "x =\r\n",
    "  # comment\n",
    "a = b # c\n",
    "a = #\n",
    "\"",
    "\\",
    "=",
    "[",
    "]",
    "\n",
    "#",
    " ",
    "\t",
    "\r",
    "key-1 = v#w\n",
    "stop = \"\"\n",
};
#define N_PIECES (sizeof PIECES / sizeof *PIECES)

static uint32_t draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

int main(int argc, char **argv)
{
    long runs = fuzz_start(argc, argv, 100000);
    uint64_t state = 7;
    for (long r = 0; r < runs; r++) {
        uint8_t text[512];
        size_t n = 0;
        for (uint32_t k = draw(&state) % 12; k; k--) {
            const char *piece = PIECES[draw(&state) % N_PIECES];
            size_t m = strlen(piece);
            memcpy(text + n, piece, m);
            n += m;
        }
        for (uint32_t k = draw(&state) % 4; n && k; k--)
            text[draw(&state) % n] = (uint8_t)draw(&state);
        fuzz_one(text, n);
    }
    return 0;
}

#endif
