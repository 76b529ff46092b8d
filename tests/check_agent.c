/* The launch agent: what it takes apart, whom it believes, what it starts and how that ends. Servers here are the library's
 * keeper on a socket pair, or the real program on a port of its own. */
#include <check.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "k8s/agent.h"
#include "tests/temp_dir.h"

#ifdef TANDEM_SANITIZED
#define SLOW 6
#else
#define SLOW 1
#endif

static const char SECRET[] = "0123456789abcdef0123456789abcdef", OTHER[] = "fedcba9876543210fedcba9876543210";

/* ---- faults: the n-th call of these fails ---- */

/* Volatile: libc promises that fork and calloc do not come back into this file. 0: none. */
static volatile int fail_at;
static int keeper_fail_at; /* fail_at of the next keepers; Check itself calls some of these, too */
static bool fails(void)
{
    return fail_at > 0 && --fail_at == 0;
}
void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size)
{
    return fails() ? NULL : __real_calloc(n, size);
}
char *__real_strdup(const char *s);
char *__wrap_strdup(const char *s);
char *__wrap_strdup(const char *s)
{
    return fails() ? NULL : __real_strdup(s);
}
int __real_pipe2(int fds[2], int flags);
int __wrap_pipe2(int fds[2], int flags);
int __wrap_pipe2(int fds[2], int flags)
{
    return fails() ? -1 : __real_pipe2(fds, flags);
}
pid_t __real_fork(void);
pid_t __wrap_fork(void);
pid_t __wrap_fork(void)
{
    return fails() ? -1 : __real_fork();
}
int __real_signalfd(int fd, const sigset_t *set, int flags);
int __wrap_signalfd(int fd, const sigset_t *set, int flags);
int __wrap_signalfd(int fd, const sigset_t *set, int flags)
{
    return fails() ? -1 : __real_signalfd(fd, set, flags);
}

/* ---- fixture: a folder with a secret and a program to start ---- */

static struct temp_dir dir;
static char secret_path[300], program_path[300];
static struct agent_secrets secrets;
static struct agent_policy policy;

static void write_program(const char *body)
{
    char text[1024];
    snprintf(text, sizeof text, "#!/bin/sh\n%s\n", body);
    temp_dir_write(&dir, "prog", text, strlen(text));
    ck_assert_int_eq(chmod(program_path, 0755), 0);
}

static void write_secret(const char *text)
{
    temp_dir_write(&dir, "secret", text, strlen(text));
}

static void setup(void)
{
    dir = temp_dir_make();
    snprintf(secret_path, sizeof secret_path, "%s/secret", dir.path);
    snprintf(program_path, sizeof program_path, "%s/prog", dir.path);
    write_secret(SECRET);
    write_program("exit 0");
    ck_assert_int_eq(agent_secrets_read(&secrets, secret_path, NULL), ST_OK);
    ck_assert_int_eq(agent_policy_allow(&policy, program_path, NULL), ST_OK);
}

static void teardown(void)
{
    agent_policy_fini(&policy);
    temp_dir_remove(&dir);
}

/* ---- a keeper on a socket pair, spoken to byte by byte ---- */

struct peer {
    int fd;
    pid_t keeper;
    struct agent_reader *reader;
};

static struct peer start_keeper(const struct agent_secrets *of)
{
    int fds[2];
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
    const struct agent_keep_config cfg = {of, &policy, "test", 300 * SLOW, 200 * SLOW};
    struct peer p = {fds[0], fork(), calloc(1, sizeof *p.reader)};
    if (p.keeper == 0) {
        close(fds[0]);
        fail_at = keeper_fail_at;
        agent_keep(fds[1], &cfg);
        _exit(0);
    }
    close(fds[1]);
    return p;
}

static void end_peer(struct peer *p)
{
    close(p->fd);
    free(p->reader);
    ck_assert_int_eq(waitpid(p->keeper, NULL, 0), p->keeper);
}

/* The next frame, -1: the connection has ended. */
static int next_frame(struct peer *p, const uint8_t **payload, size_t *n)
{
    enum agent_frame type;
    agent_frame_done(p->reader);
    struct status st = STATUS_INIT;
    enum status_code rc = agent_await(p->fd, p->reader, agent_now_ms() + 5000 * SLOW, &type, payload, n, &st);
    ck_assert_msg(rc == ST_OK || rc == ST_UNAVAILABLE, "%s", st.message);
    return rc == ST_OK ? (int)type : -1;
}

struct hello_start { /* what a client has to say, kept to be said again */
    uint8_t bytes[AGENT_NONCE_BYTES + AGENT_PROOF_BYTES + AGENT_REQUEST_MAX];
    size_t n;
};

static void make_start(struct hello_start *out, const uint8_t *hello, const struct agent_secrets *s,
                       const struct agent_request *r)
{
    struct agent_token t;
    memcpy(t.server_nonce, hello + 4, AGENT_NONCE_BYTES);
    memset(t.client_nonce, 7, AGENT_NONCE_BYTES);
    t.request = out->bytes + AGENT_NONCE_BYTES + AGENT_PROOF_BYTES;
    t.request_bytes = agent_request_write(r, out->bytes + AGENT_NONCE_BYTES + AGENT_PROOF_BYTES);
    memcpy(out->bytes, t.client_nonce, AGENT_NONCE_BYTES);
    ck_assert(agent_prove(s, 0, AGENT_CLIENT, &t, out->bytes + AGENT_NONCE_BYTES));
    out->n = AGENT_NONCE_BYTES + AGENT_PROOF_BYTES + t.request_bytes;
}

static void say(struct peer *p, enum agent_frame type, const void *bytes, size_t n)
{
    ck_assert_int_eq(agent_send(p->fd, type, bytes, n, agent_now_ms() + 5000, NULL), ST_OK);
}

/* Logs in and starts; the frame that answers. */
static int start(struct peer *p, const struct agent_secrets *s, const struct agent_request *r, struct hello_start *said,
                 const uint8_t **payload, size_t *n)
{
    ck_assert_int_eq(next_frame(p, payload, n), AGENT_HELLO);
    ck_assert_uint_eq(*n, 4 + AGENT_NONCE_BYTES);
    make_start(said, *payload, s, r);
    say(p, AGENT_START, said->bytes, said->n);
    return next_frame(p, payload, n);
}

static const struct agent_request plain_request = {.argc = 1, .argv = {"prog"}};

/* ---- the real program ---- */

struct server {
    pid_t pid;
    char port[8];
};

static struct server start_server(const char *option, const char *value)
{
    struct server s;
    int fds[2];
    char line[200];
    ck_assert_int_eq(pipe(fds), 0);
    s.pid = fork();
    if (s.pid == 0) {
        dup2(fds[1], STDERR_FILENO);
        execl(TEST_AGENT, "tandem-agent", "serve", "--listen", "127.0.0.1:0", "--secret-file", secret_path, "--allow",
              program_path, option, value, NULL);
        _exit(127);
    }
    close(fds[1]);
    FILE *f = fdopen(fds[0], "r");
    ck_assert(fgets(line, sizeof line, f) != NULL);
    ck_assert_msg(sscanf(line, "tandem-agent: listening on port %7[0-9]", s.port) == 1, "%s", line);
    /* the pipe stays open: a log that nobody reads must not end the server; it is closed with the test's process */
    return s;
}

static int stop_server(struct server *s)
{
    int status;
    kill(s->pid, SIGTERM);
    ck_assert_int_eq(waitpid(s->pid, &status, 0), s->pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static pid_t run_client(const struct server *s, const char *secret, const char *output)
{
    pid_t pid = fork();
    if (pid == 0) {
        int fd = open(output, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        dup2(fd, STDOUT_FILENO);
        dup2(fd, STDERR_FILENO);
        execl(TEST_AGENT, "tandem-agent", "run", "--secret-file", secret, "--port", s->port, "--connect-timeout", "5",
              "127.0.0.1", "prog", "-mca", "ess", "\"env\"", NULL);
        _exit(127);
    }
    return pid;
}

static int client_status(pid_t pid)
{
    int status;
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static char *output_path(void)
{
    static char path[300];
    snprintf(path, sizeof path, "%s/output", dir.path);
    return path;
}

static void await_file(const char *name)
{
    char path[400];
    struct stat sb;
    snprintf(path, sizeof path, "%s/%s", dir.path, name);
    for (int i = 0; i < 500 * SLOW && (stat(path, &sb) || sb.st_size == 0); i++)
        nanosleep(&(struct timespec){0, 10000000L}, NULL);
    ck_assert_msg(stat(path, &sb) == 0, "%s did not come", name);
}

/* Whether the processes whose numbers stand in the file are gone. */
static bool all_gone(const char *name)
{
    char path[400];
    int pid;
    snprintf(path, sizeof path, "%s/%s", dir.path, name);
    FILE *f = fopen(path, "r");
    ck_assert(f != NULL);
    bool gone = true;
    while (fscanf(f, "%d", &pid) == 1)
        gone = gone && kill(pid, 0) != 0;
    fclose(f);
    return gone;
}

/* ---- core ---- */

START_TEST(words_are_split_as_mpirun_writes_them)
{
    char text[] = "  orted -mca ess \"env\" -mca orte_node_regex \"vm,pod-[3:1]@0(3)\" x\"y z\"w \"\"";
    const char *expected[] = {"orted", "-mca", "ess", "env", "-mca", "orte_node_regex", "vm,pod-[3:1]@0(3)",
                              "xy zw", ""};
    const char *argv[16];
    size_t n;
    ck_assert_int_eq(agent_words(text, argv, 16, &n, NULL), ST_OK);
    ck_assert_uint_eq(n, 9);
    for (size_t i = 0; i < n; i++)
        ck_assert_str_eq(argv[i], expected[i]);
}
END_TEST

START_TEST(request_reads_as_it_was_written)
{
    static char text[AGENT_ARGS_MAX][20];
    unsigned seed = 3;
    for (int round = 0; round < 200; round++) {
        struct agent_request r = {.argc = (size_t)rand_r(&seed) % (AGENT_ARGS_MAX + 1),
                                  .envc = (size_t)rand_r(&seed) % (AGENT_ENV_MAX + 1)},
                             back;
        uint8_t bytes[AGENT_REQUEST_MAX];
        for (size_t i = 0; i < AGENT_ARGS_MAX; i++)
            snprintf(text[i], sizeof text[i], "%.*s", rand_r(&seed) % 12, "abcdefghijkl");
        for (size_t i = 0; i < r.argc; i++)
            r.argv[i] = text[i];
        for (size_t i = 0; i < r.envc; i++)
            r.env[i] = text[i];
        size_t n = agent_request_write(&r, bytes);
        ck_assert_uint_gt(n, 0);
        ck_assert_int_eq(agent_request_read(&back, bytes, n, NULL), ST_OK);
        ck_assert_uint_eq(back.argc, r.argc);
        ck_assert_uint_eq(back.envc, r.envc);
        for (size_t i = 0; i < r.argc; i++)
            ck_assert_str_eq(back.argv[i], r.argv[i]);
        for (size_t i = 0; i < r.envc; i++)
            ck_assert_str_eq(back.env[i], r.env[i]);
        ck_assert(!back.argv[r.argc] && !back.env[r.envc]);
        for (size_t cut = 0; cut < n; cut += 1 + n / 16) /* a part of it is no request */
            ck_assert_int_eq(agent_request_read(&back, bytes, cut, NULL), ST_INVALID_ARGUMENT);
    }
}
END_TEST

START_TEST(hosts_of_every_kind_of_group)
{
    char path[300], *text = NULL;
    static const char operators[] = "j-worker-0.j.ns.svc slots=1\n# c\n\nj-worker-1.j.ns.svc:1\n";
    temp_dir_write(&dir, "hostfile", operators, strlen(operators));
    snprintf(path, sizeof path, "%s/hostfile", dir.path);
    struct agent_hosts_config lws = {.slots = 8, .leader = "g-0.g.ns", .group_size = "3"};
    ck_assert_int_eq(agent_hosts(&lws, &text, NULL), ST_OK);
    ck_assert_str_eq(text, "g-0.g.ns slots=8\ng-0-1.g.ns slots=8\ng-0-2.g.ns slots=8\n");
    free(text);
    struct agent_hosts_config set = {.slots = 1, .set = "w.w-pods", .size = 2, .leader = "g-0.g.ns", .group_size = "3"};
    ck_assert_int_eq(agent_hosts(&set, &text, NULL), ST_OK);
    ck_assert_str_eq(text, "w-0.w-pods slots=1\nw-1.w-pods slots=1\n");
    free(text);
    struct agent_hosts_config job = {.slots = 2, .from = path};
    ck_assert_int_eq(agent_hosts(&job, &text, NULL), ST_OK);
    ck_assert_str_eq(text, "j-worker-0.j.ns.svc slots=2\nj-worker-1.j.ns.svc slots=2\n");
    free(text);
}
END_TEST

START_TEST(output_and_status_come_back)
{
    struct server s = start_server(NULL, NULL);
    write_program("echo \"$@\"; echo oops >&2; exit 7");
    ck_assert_int_eq(client_status(run_client(&s, secret_path, output_path())), 7);
    size_t n;
    char *text = temp_dir_read_file(output_path(), &n);
    ck_assert_ptr_nonnull(strstr(text, "-mca ess env\n"));
    ck_assert_ptr_nonnull(strstr(text, "oops\n"));
    free(text);
    write_program("kill -9 $$");
    ck_assert_int_eq(client_status(run_client(&s, secret_path, output_path())), 128 + 9);
    write_program("yes 0123456789 | head -n 200000"); /* more than any buffer holds */
    ck_assert_int_eq(client_status(run_client(&s, secret_path, output_path())), 0);
    text = temp_dir_read_file(output_path(), &n);
    ck_assert_uint_eq(n, 11 * 200000);
    free(text);
    ck_assert_int_eq(stop_server(&s), 0);
}
END_TEST

/* `hosts --from` a file of this host and 127.0.0.1, waiting; its exit status. */
static int wait_for_hosts(const char *port, bool only_here)
{
    char list[400], own[256] = "";
    snprintf(list, sizeof list, "%s/list", dir.path);
    ck_assert_int_eq(gethostname(own, sizeof own - 1), 0);
    FILE *f = fopen(list, "w");
    ck_assert(f != NULL);
    fprintf(f, "%s.some.domain slots=1\n%s", own, only_here ? "" : "127.0.0.1 slots=1\n");
    fclose(f);
    pid_t pid = fork();
    if (pid == 0) {
        execl(TEST_AGENT, "tandem-agent", "hosts", "--from", list, "--wait=0.3", "--port", port, "--secret-file",
              secret_path, "--output", output_path(), NULL);
        _exit(127);
    }
    return client_status(pid);
}

/* mpirun starts what belongs on its own host by itself: no agent need be there. */
START_TEST(hosts_waits_for_all_agents_but_its_own)
{
    struct server s = start_server(NULL, NULL);
    ck_assert_int_eq(wait_for_hosts(s.port, false), 0);
    ck_assert_int_eq(stop_server(&s), 0);
    ck_assert_int_eq(wait_for_hosts(s.port, false), 1);
    ck_assert_int_eq(wait_for_hosts(s.port, true), 0);
}
END_TEST

START_TEST(secret_changes_while_it_serves)
{
    char both[200], old_path[300];
    struct agent_client_config cfg = {.secret_file = secret_path, .connect_ms = 2000};
    struct status st = STATUS_INIT;
    struct server s = start_server(NULL, NULL);
    cfg.port = (uint32_t)atoi(s.port);
    temp_dir_write(&dir, "old", SECRET, strlen(SECRET));
    snprintf(old_path, sizeof old_path, "%s/old", dir.path);
    const struct agent_client_config with_old = {.secret_file = old_path, .port = cfg.port, .connect_ms = 2000};
    ck_assert_int_eq(agent_probe(&cfg, "127.0.0.1", &st), ST_OK);
    snprintf(both, sizeof both, "# new, old\n%s\n%s\n", OTHER, SECRET);
    write_secret(both);
    ck_assert_int_eq(agent_probe(&cfg, "127.0.0.1", &st), ST_OK);
    ck_assert_int_eq(agent_probe(&with_old, "127.0.0.1", &st), ST_OK);
    write_secret("short\n"); /* a bad file leaves what was there */
    ck_assert_int_eq(agent_probe(&with_old, "127.0.0.1", &st), ST_OK);
    write_secret(OTHER);
    ck_assert_int_eq(agent_probe(&cfg, "127.0.0.1", &st), ST_OK);
    ck_assert_int_eq(agent_probe(&with_old, "127.0.0.1", &st), ST_UNAUTHENTICATED);
    ck_assert_int_eq(stop_server(&s), 0);
}
END_TEST

/* ---- limits ---- */

START_TEST(what_means_something_to_a_shell_is_refused)
{
    static const char *const bad[] = {"orted; id", "orted $HOME", "orted `id`", "orted \"$(id)\"",
                                      "orted > f", "a|b",         "a&",         "orted *",
                                      "a\\ b",     "\"open",      "a\nb",       "a 'b'"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[64];
        const char *argv[8];
        size_t n = 99;
        snprintf(text, sizeof text, "%s", bad[i]);
        ck_assert_msg(agent_words(text, argv, 8, &n, NULL) == ST_INVALID_ARGUMENT && n == 99, "%s", bad[i]);
    }
    char many[] = "a b c";
    const char *argv[2];
    size_t n;
    ck_assert_int_eq(agent_words(many, argv, 2, &n, NULL), ST_INVALID_ARGUMENT);
}
END_TEST

START_TEST(only_what_is_on_the_lists_may_start)
{
    static const struct {
        bool may;
        const char *argv[6];
        const char *env;
    } cases[] = {
        {true, {"prog", "-mca", "ess", "env", "--tree-spawn"}, "NCCL_DEBUG=INFO"},
        {true, {"prog", "--mca", "plm_rsh_agent", "tandem-agent run"}, NULL},
        {true, {"prog", "-mca", "plm_rsh_args", "-o ConnectionAttempts=10"}, NULL},
        {false, {"prog", "-mca", "plm_rsh_args", "--secret-file /tmp/mine"}, NULL},
        {true, {"prog", "-mca", "btl_tcp_if_include", "eth0"}, NULL},
        {true, {"prog", "-mca", "orte_set_default_slots", "8"}, NULL}, /* mpi-operator's */
        {false, {"sh", "-c", "id"}, NULL},
        {false, {"/bin/prog"}, NULL},
        {false, {"../prog"}, NULL},
        {false, {"prog", "--help"}, NULL},
        {false, {"prog", "id"}, NULL},
        {false, {"prog", "-mca", "plm_rsh_agent", "sh -c id"}, NULL},
        {false, {"prog", "-mca", "orte_launch_agent", "id"}, NULL},
        {false, {"prog", "-mca", "mca_base_component_path", "/tmp"}, NULL},
        {false, {"prog", "-mca", "mca_base_param_files", "/tmp/f"}, NULL},
        {false, {"prog", "-mca", "ess", "slave"}, NULL},
        {false, {"prog", "-mca", "ess"}, NULL},
        {false, {"prog", "-mca"}, NULL},
        {false, {"prog", "-mca", "ess", "env\x01"}, NULL},
        {false, {"prog"}, "LD_PRELOAD=/tmp/x.so"},
        {false, {"prog"}, "NCCL_DEBUG"},
        {false, {"prog"}, "OMPI_MCA_plm_rsh_agent=sh"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct agent_request r = {.argc = 0};
        const char *program = NULL;
        while (cases[i].argv[r.argc]) {
            r.argv[r.argc] = cases[i].argv[r.argc];
            r.argc++;
        }
        if (cases[i].env)
            r.env[r.envc++] = cases[i].env;
        enum status_code rc = agent_policy_check(&policy, &r, &program, NULL);
        ck_assert_msg(rc == (cases[i].may ? ST_OK : ST_PERMISSION_DENIED), "case %zu", i);
        if (cases[i].may)
            ck_assert_str_eq(program, program_path);
    }
}
END_TEST

START_TEST(files_addresses_and_groups_have_bounds)
{
    static const char *const secrets_bad[] = {"", "# only\n", "short\n",
                                              "0123456789abcdef0123456789abcdef\n0123456789abcdef0123456789abcdef\n"
                                              "0123456789abcdef0123456789abcdef\n0123456789abcdef0123456789abcdef\n"
                                              "0123456789abcdef0123456789abcdef\n"};
    static const char *const addresses_bad[] = {"", ":1", "h:", "h:99999", "h:1x", "[::1", "[::1]x"};
    static const char *const leaders_bad[] = {"", "-x.y", "a b", "a\nb", "a;b"};
    static const char *const sizes_bad[] = {"0", "", "1025", "-1", "2x"};
    struct agent_secrets s;
    char host[256], port[8], *text = NULL;
    for (size_t i = 0; i < 4; i++)
        ck_assert_int_eq(agent_secrets_parse(&s, "f", secrets_bad[i], strlen(secrets_bad[i]), NULL),
                         ST_INVALID_ARGUMENT);
    for (size_t i = 0; i < 7; i++)
        ck_assert_msg(agent_split_address(addresses_bad[i], host, port, NULL) == ST_INVALID_ARGUMENT, "%zu", i);
    ck_assert_int_eq(agent_split_address("[::1]:7", host, port, NULL), ST_OK);
    ck_assert_str_eq(host, "::1");
    ck_assert_str_eq(port, "7");
    for (size_t i = 0; i < 5; i++) {
        struct agent_hosts_config bad_name = {.slots = 1, .leader = leaders_bad[i], .group_size = "2"};
        struct agent_hosts_config bad_size = {.slots = 1, .leader = "g-0.g", .group_size = sizes_bad[i]};
        ck_assert_int_eq(agent_hosts(&bad_name, &text, NULL), ST_INVALID_ARGUMENT);
        ck_assert_int_eq(agent_hosts(&bad_size, &text, NULL), ST_INVALID_ARGUMENT);
    }
    ck_assert_ptr_null(text);
}
END_TEST

START_TEST(sessions_over_the_bound_are_refused)
{
    write_program("echo here > $(dirname $0)/begun; sleep 60");
    struct server s = start_server("--max-sessions", "1");
    struct agent_client_config cfg = {.secret_file = secret_path, .port = (uint32_t)atoi(s.port), .connect_ms = 2000};
    struct status st = STATUS_INIT;
    pid_t client = run_client(&s, secret_path, output_path());
    await_file("begun");
    ck_assert_int_eq(agent_probe(&cfg, "127.0.0.1", &st), ST_RESOURCE_EXHAUSTED);
    kill(client, SIGTERM); /* the client hands it on */
    ck_assert_int_eq(client_status(client), 128 + SIGTERM);
    enum status_code rc = ST_UNKNOWN; /* its keeper may still be about to end */
    for (int i = 0; i < 100 && (rc = agent_probe(&cfg, "127.0.0.1", &st)) != ST_OK; i++)
        nanosleep(&(struct timespec){0, 10000000L}, NULL);
    ck_assert_int_eq(rc, ST_OK);
    ck_assert_int_eq(stop_server(&s), 0);
}
END_TEST

START_TEST(silent_client_is_dropped)
{
    struct peer p = start_keeper(&secrets);
    const uint8_t *payload;
    size_t n;
    int64_t begun = agent_now_ms();
    ck_assert_int_eq(next_frame(&p, &payload, &n), AGENT_HELLO);
    ck_assert_int_eq(next_frame(&p, &payload, &n), AGENT_REFUSED);
    ck_assert_int_eq(payload[0], ST_DEADLINE_EXCEEDED);
    ck_assert_int_lt(agent_now_ms() - begun, 3000 * SLOW);
    end_peer(&p);
}
END_TEST

/* ---- faults ---- */

START_TEST(wrong_secret_is_refused)
{
    struct agent_secrets wrong;
    struct hello_start said;
    const uint8_t *payload;
    size_t n;
    ck_assert_int_eq(agent_secrets_parse(&wrong, "f", OTHER, strlen(OTHER), NULL), ST_OK);
    write_program("echo x > $(dirname $0)/began");
    struct peer p = start_keeper(&secrets);
    ck_assert_int_eq(start(&p, &wrong, &plain_request, &said, &payload, &n), AGENT_REFUSED);
    ck_assert_int_eq(payload[0], ST_UNAUTHENTICATED);
    ck_assert_int_eq(next_frame(&p, &payload, &n), -1);
    end_peer(&p);
    char path[400];
    snprintf(path, sizeof path, "%s/began", dir.path);
    ck_assert_int_ne(access(path, F_OK), 0);
}
END_TEST

START_TEST(one_time_token_works_once)
{
    struct hello_start said;
    const uint8_t *payload;
    size_t n;
    write_program("echo x >> $(dirname $0)/starts");
    struct peer first = start_keeper(&secrets);
    ck_assert_int_eq(start(&first, &secrets, &plain_request, &said, &payload, &n), AGENT_STARTED);
    ck_assert_int_eq(next_frame(&first, &payload, &n), AGENT_EXIT);
    ck_assert_int_eq(next_frame(&first, &payload, &n), -1);
    end_peer(&first);
    struct peer second = start_keeper(&secrets); /* who has listened says the same again */
    ck_assert_int_eq(next_frame(&second, &payload, &n), AGENT_HELLO);
    say(&second, AGENT_START, said.bytes, said.n);
    ck_assert_int_eq(next_frame(&second, &payload, &n), AGENT_REFUSED);
    ck_assert_int_eq(payload[0], ST_UNAUTHENTICATED);
    end_peer(&second);
    char path[400];
    size_t bytes;
    snprintf(path, sizeof path, "%s/starts", dir.path);
    char *text = temp_dir_read_file(path, &bytes);
    ck_assert_str_eq(text, "x\n");
    free(text);
}
END_TEST

START_TEST(second_start_on_a_connection_ends_it)
{
    struct hello_start said;
    const uint8_t *payload;
    size_t n;
    write_program("echo $$ > $(dirname $0)/pids; exec sleep 60");
    struct peer p = start_keeper(&secrets);
    ck_assert_int_eq(start(&p, &secrets, &plain_request, &said, &payload, &n), AGENT_STARTED);
    await_file("pids");
    say(&p, AGENT_START, said.bytes, said.n);
    ck_assert_int_eq(next_frame(&p, &payload, &n), -1);
    end_peer(&p);
    ck_assert(all_gone("pids"));
}
END_TEST

START_TEST(changed_request_is_refused)
{
    struct hello_start said;
    const uint8_t *payload;
    size_t n;
    for (size_t at = 0; at < AGENT_NONCE_BYTES + AGENT_PROOF_BYTES + 9; at += 3) {
        struct peer p = start_keeper(&secrets);
        ck_assert_int_eq(next_frame(&p, &payload, &n), AGENT_HELLO);
        make_start(&said, payload, &secrets, &plain_request);
        said.bytes[at] ^= 1;
        say(&p, AGENT_START, said.bytes, said.n);
        ck_assert_int_eq(next_frame(&p, &payload, &n), AGENT_REFUSED);
        ck_assert_int_eq(payload[0], ST_UNAUTHENTICATED);
        end_peer(&p);
    }
}
END_TEST

/* One that does not heed SIGTERM, with a child in a session of its own that does not either. */
START_TEST(lost_connection_ends_all_that_was_started)
{
    struct hello_start said;
    const uint8_t *payload;
    size_t n;
    write_program(
        "trap '' TERM HUP; cd $(dirname $0); setsid sh -c 'trap \"\" TERM; sleep 60 & echo $$ $! > inner; wait' &\n"
        "while [ ! -s inner ]; do sleep 0.01; done; echo $$ $! > pids; while :; do sleep 1; done");
    struct peer p = start_keeper(&secrets);
    ck_assert_int_eq(start(&p, &secrets, &plain_request, &said, &payload, &n), AGENT_STARTED);
    await_file("pids");
    ck_assert(!all_gone("pids"));
    end_peer(&p); /* waits for the keeper */
    ck_assert(all_gone("pids"));
    ck_assert(all_gone("inner"));
}
END_TEST

START_TEST(what_outlives_its_program_is_ended_with_it)
{
    struct hello_start said;
    const uint8_t *payload;
    size_t n;
    write_program("setsid sleep 60 & echo $! > $(dirname $0)/pids; exit 5");
    struct peer p = start_keeper(&secrets);
    ck_assert_int_eq(start(&p, &secrets, &plain_request, &said, &payload, &n), AGENT_STARTED);
    ck_assert_int_eq(next_frame(&p, &payload, &n), AGENT_EXIT);
    ck_assert_int_eq(payload[1], 5);
    ck_assert(all_gone("pids")); /* before the client hears of the end */
    end_peer(&p);
}
END_TEST

START_TEST(end_of_the_server_ends_what_it_started)
{
    write_program("echo $$ > $(dirname $0)/pids; exec sleep 60");
    struct server s = start_server(NULL, NULL);
    pid_t client = run_client(&s, secret_path, output_path());
    await_file("pids");
    ck_assert_int_eq(stop_server(&s), 0);
    ck_assert_int_eq(client_status(client), 128 + SIGTERM);
    ck_assert(all_gone("pids"));
}
END_TEST

/* A client that takes no output does not keep the server from ending what it started, also in a session of its own. */
START_TEST(client_that_takes_nothing_holds_up_no_end)
{
    struct hello_start said;
    const uint8_t *payload;
    size_t n;
    write_program("cd $(dirname $0); setsid sleep 60 & echo $$ $! > pids; exec tr '\\0' x < /dev/zero");
    struct peer p = start_keeper(&secrets);
    ck_assert_int_eq(start(&p, &secrets, &plain_request, &said, &payload, &n), AGENT_STARTED);
    await_file("pids");
    nanosleep(&(struct timespec){0, 200000000L}, NULL); /* until the socket is full */
    int64_t begun = agent_now_ms();
    kill(p.keeper, SIGTERM); /* what the server does at its end */
    ck_assert_int_eq(waitpid(p.keeper, NULL, 0), p.keeper);
    ck_assert_int_lt(agent_now_ms() - begun, 5000 * SLOW);
    ck_assert(all_gone("pids"));
    close(p.fd);
    free(p.reader);
}
END_TEST

/* As a tcpSocket probe does, every few seconds. */
START_TEST(who_says_nothing_and_leaves_is_not_logged)
{
    char path[400];
    size_t bytes;
    snprintf(path, sizeof path, "%s/log", dir.path);
    fflush(stderr);
    int saved = dup(STDERR_FILENO), log = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(log, STDERR_FILENO);
    struct peer p = start_keeper(&secrets);
    end_peer(&p);
    struct peer q = start_keeper(&secrets);
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(log);
    say(&q, AGENT_SIGNAL, "\x0f", 1); /* this one does say something */
    const uint8_t *payload;
    size_t n;
    ck_assert_int_eq(next_frame(&q, &payload, &n), AGENT_HELLO);
    ck_assert_int_eq(next_frame(&q, &payload, &n), AGENT_REFUSED);
    end_peer(&q);
    char *text = temp_dir_read_file(path, &bytes);
    ck_assert_msg(strstr(text, "expected START") && strchr(text, '\n') == strrchr(text, '\n'), "%s", text);
    free(text);
}
END_TEST

/* Told to end, a server that may drain takes nothing new, and what runs ends by itself. */
START_TEST(drain_waits_for_what_runs)
{
    write_program("cd $(dirname $0); echo $$ > pids; while [ ! -e go ]; do sleep 0.02; done; exit 7");
    struct server s = start_server("--drain-timeout=60", NULL);
    pid_t client = run_client(&s, secret_path, output_path());
    await_file("pids");
    kill(s.pid, SIGTERM);
    char path[400];
    const struct agent_client_config late = {.secret_file = secret_path, .port = (uint32_t)atoi(s.port)};
    enum status_code rc = ST_OK;
    for (int i = 0; i < 500 * SLOW && rc == ST_OK; i++) /* the signal takes a moment */
        rc = agent_probe(&late, "127.0.0.1", NULL);
    ck_assert_int_eq(rc, ST_UNAVAILABLE);
    ck_assert(!all_gone("pids"));
    snprintf(path, sizeof path, "%s/go", dir.path);
    close(open(path, O_WRONLY | O_CREAT, 0600));
    ck_assert_int_eq(client_status(client), 7);
    int status;
    ck_assert_int_eq(waitpid(s.pid, &status, 0), s.pid);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
END_TEST

START_TEST(second_signal_ends_the_drain)
{
    write_program("echo $$ > $(dirname $0)/pids; exec sleep 60");
    struct server s = start_server("--drain-timeout", "60");
    pid_t client = run_client(&s, secret_path, output_path());
    await_file("pids");
    kill(s.pid, SIGTERM);
    nanosleep(&(struct timespec){0, 200000000L}, NULL); /* two at once would be one */
    ck_assert(!all_gone("pids"));
    ck_assert_int_eq(stop_server(&s), 0);
    ck_assert_int_eq(client_status(client), 128 + SIGTERM);
    ck_assert(all_gone("pids"));
}
END_TEST

/* A server that does not know the secret is not believed. */
START_TEST(false_server_is_found_out)
{
    int listener, fd = -1;
    unsigned port;
    ck_assert_int_eq(agent_listen("127.0.0.1:0", &listener, &port, NULL), ST_OK);
    pid_t pid = fork();
    if (pid == 0) {
        struct agent_client_config cfg = {.secret_file = secret_path, .port = port, .connect_ms = 2000};
        _exit((int)agent_probe(&cfg, "127.0.0.1", NULL));
    }
    for (int i = 0; i < 500 && fd < 0; i++, usleep(5000))
        fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
    struct peer p = {fd, pid, calloc(1, sizeof *p.reader)};
    const uint8_t *payload;
    size_t n;
    uint8_t hello[4 + AGENT_NONCE_BYTES] = "TAG1";
    say(&p, AGENT_HELLO, hello, sizeof hello);
    ck_assert_int_eq(next_frame(&p, &payload, &n), AGENT_START);
    say(&p, AGENT_STARTED, hello, AGENT_PROOF_BYTES);
    int status;
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_int_eq(WEXITSTATUS(status), ST_UNAUTHENTICATED);
    close(fd);
    close(listener);
    free(p.reader);
}
END_TEST

/* Each thing that the keeper takes, refused in turn: the client is told or cut off, and nothing hangs or is left. */
START_TEST(nth_failure_is_told)
{
    bool through = false;
    write_program("exit 9");
    for (int at = 1; at < 20 && !through; at++) {
        struct hello_start said;
        const uint8_t *payload;
        size_t n;
        keeper_fail_at = at;
        struct peer p = start_keeper(&secrets);
        int type = next_frame(&p, &payload, &n);
        if (type == AGENT_HELLO) {
            make_start(&said, payload, &secrets, &plain_request);
            say(&p, AGENT_START, said.bytes, said.n);
            type = next_frame(&p, &payload, &n);
        }
        ck_assert_msg(type == AGENT_REFUSED || type == -1 || type == AGENT_STARTED, "call %d: frame %d", at, type);
        if (type == AGENT_REFUSED)
            ck_assert_int_eq(payload[0], ST_RESOURCE_EXHAUSTED);
        through = type == AGENT_STARTED;
        if (through) {
            ck_assert_int_eq(next_frame(&p, &payload, &n), AGENT_EXIT);
            ck_assert_int_eq(payload[1], 9);
            ck_assert_int_gt(at, 5); /* calloc, signalfd, two pipes, a third, fork */
        }
        end_peer(&p);
    }
    ck_assert(through);
    struct agent_policy q = {.n_programs = 0};
    fail_at = 1;
    ck_assert_int_eq(agent_policy_allow(&q, program_path, NULL), ST_RESOURCE_EXHAUSTED);
    ck_assert_uint_eq(q.n_programs, 0);
}
END_TEST

static void add(Suite *s, const char *name, const TTest *const *tests)
{
    TCase *c = tcase_create(name);
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_set_timeout(c, 30 * SLOW);
    for (; *tests; tests++)
        tcase_add_test(c, *tests);
    suite_add_tcase(s, c);
}

int main(void)
{
    Suite *s = suite_create("agent");
    add(s, "core",
        (const TTest *const[]){words_are_split_as_mpirun_writes_them, request_reads_as_it_was_written,
                               hosts_of_every_kind_of_group, hosts_waits_for_all_agents_but_its_own,
                               output_and_status_come_back, secret_changes_while_it_serves, NULL});
    add(s, "limits",
        (const TTest *const[]){what_means_something_to_a_shell_is_refused, only_what_is_on_the_lists_may_start,
                               files_addresses_and_groups_have_bounds, sessions_over_the_bound_are_refused,
                               silent_client_is_dropped, who_says_nothing_and_leaves_is_not_logged, NULL});
    add(s, "faults",
        (const TTest *const[]){wrong_secret_is_refused, one_time_token_works_once, second_start_on_a_connection_ends_it,
                               changed_request_is_refused, lost_connection_ends_all_that_was_started,
                               what_outlives_its_program_is_ended_with_it, end_of_the_server_ends_what_it_started,
                               client_that_takes_nothing_holds_up_no_end, drain_waits_for_what_runs,
                               second_signal_ends_the_drain, false_server_is_found_out, nth_failure_is_told, NULL});
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
