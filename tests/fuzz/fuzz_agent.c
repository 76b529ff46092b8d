/* fuzz_agent.c - any bytes as what an agent hears, and as what mpirun says to it.
 *
 * What must hold: what reads as a request is written as the same bytes; nothing passes the policy but a program of the
 * list; a frame is whole or an error; no word of a command holds what was refused. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "k8s/agent.h"
#include "tests/fuzz/fuzz.h"

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_agent: %s\n", what);
    abort();
}

static void fuzz_request(const uint8_t *data, size_t size)
{
    static char name[] = "/usr/bin/orted";
    const struct agent_policy policy = {1, {name}};
    struct agent_request r;
    const char *program = NULL;
    uint8_t again[AGENT_REQUEST_MAX];
    if (agent_request_read(&r, data, size, NULL) != ST_OK)
        return;
    require(agent_request_write(&r, again) == size && memcmp(again, data, size) == 0,
            "a request is written as it was read");
    if (agent_policy_check(&policy, &r, &program, NULL) == ST_OK)
        require(program == name && r.argc >= 1 && strstr(r.argv[0], "orted"), "only the list's program may start");
}

static void fuzz_frames(const uint8_t *data, size_t size)
{
    static struct agent_reader reader;
    int fds[2];
    require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds) == 0, "a socket pair");
    require(write(fds[1], data, size) == (ssize_t)size, "a write");
    close(fds[1]);
    reader.have = 0;
    for (size_t taken = 0;;) {
        enum agent_frame type;
        const uint8_t *payload;
        size_t n;
        struct status st = STATUS_INIT;
        if (agent_receive(fds[0], &reader, &type, &payload, &n, &st) != ST_OK) {
            require(st.message[0], "an error says why");
            break;
        }
        require(payload != NULL && n <= AGENT_FRAME_MAX && taken + 5 + n <= size, "a frame is part of what came");
        require(memcmp(payload, data + taken + 5, n) == 0, "its bytes are those that came");
        taken += 5 + n;
        agent_frame_done(&reader);
    }
    close(fds[0]);
}

static void fuzz_text(const uint8_t *data, size_t size)
{
    char text[1025], host[256], port[8];
    const char *argv[16];
    size_t n = size < 1024 ? size : 1024, argc;
    struct agent_secrets s;
    memcpy(text, data, n);
    text[n] = '\0';
    if (agent_secrets_parse(&s, "f", text, n, NULL) == ST_OK)
        require(s.n >= 1 && s.n <= AGENT_SECRETS_MAX && s.of[0].len >= AGENT_SECRET_MIN, "secrets have their sizes");
    if (agent_split_address(text, host, port, NULL) == ST_OK)
        require(host[0] && atoi(port) <= 65535, "an address has a host and a port");
    if (agent_words(text, argv, 16, &argc, NULL) == ST_OK)
        for (size_t i = 0; i < argc; i++)
            require(argv[i] >= text && argv[i] <= text + n && !strpbrk(argv[i], "$`\\"),
                    "words hold nothing of a shell's");
    (void)agent_policy_env(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    switch (data[0] % 3) {
    case 0:
        fuzz_request(data + 1, size - 1);
        break;
    case 1:
        fuzz_frames(data + 1, size - 1);
        break;
    default:
        fuzz_text(data + 1, size - 1);
    }
    return 0;
}

#ifndef TANDEM_LIBFUZZER

#define PIECE(s)                                                                                                       \
    {                                                                                                                  \
        s, sizeof s - 1                                                                                                \
    }
static const struct {
    const char *text;
    size_t n;
} PIECES[] = {
    PIECE("\0\1\0\0orted\0"),
    PIECE("\0\4\0\1orted\0-mca\0ess\0env\0NCCL_DEBUG=INFO\0"),
    PIECE("-mca\0"),
    PIECE("plm_rsh_agent\0tandem-agent run\0"),
    PIECE("plm_rsh_args\0-o ConnectionAttempts=10\0"),
    PIECE("\0\3\0\0"),
    PIECE("orted"),
    PIECE("\0"),
    PIECE("\1\0\0\0\44TAG1"),
    PIECE("\4\0\0\0\3abc"),
    PIECE("\6\0\0\0\2\0\0"),
    PIECE("\21\0\0\0\1\17"),
    PIECE("\1\377\377\377\377"),
    PIECE("\"env\" "),
    PIECE(" orted -mca ess "),
    PIECE("$(id)"),
    PIECE("\""),
    PIECE(";"),
    PIECE("0123456789abcdef0123456789abcdef\n"),
    PIECE("# c\n"),
    PIECE("[::1]:50061"),
    PIECE("host:7"),
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
        uint8_t text[1024];
        size_t n = 1;
        text[0] = (uint8_t)draw(&state);
        for (uint32_t k = 1 + draw(&state) % 8; k; k--) {
            uint32_t i = draw(&state) % N_PIECES;
            memcpy(text + n, PIECES[i].text, PIECES[i].n);
            n += PIECES[i].n;
        }
        for (uint32_t k = draw(&state) % 4; k; k--)
            text[1 + draw(&state) % (n - 1)] = (uint8_t)draw(&state);
        fuzz_one(text, n - draw(&state) % 2);
    }
    return 0;
}
#endif
