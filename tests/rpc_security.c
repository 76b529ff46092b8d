/* rpc_security.c - proto/rpc.h with certificates and tokens. make_certs.sh makes the certificates, once for the whole run. */
#include <dirent.h>
#include <pthread.h>
#include <unistd.h>

#include "grpc/health/v1/health.pb-c.h"
#include "rpc_fixture.h"

#define TOKEN_A "first-token-0123456789"
#define TOKEN_B "second-token-0123456789"

static char dir[64]; /* of certificates: made by the first test that asks, or before the fork */

static void certs_make(void)
{
    char command[256];
    snprintf(dir, sizeof dir, "/tmp/check_rpc_certs.XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(command, sizeof command, "'%s' '%s'", TEST_MAKE_CERTS, dir);
    ck_assert_int_eq(system(command), 0);
}

static void certs_remove(void)
{
    DIR *d = opendir(dir);
    for (const struct dirent *e; d && (e = readdir(d));)
        unlinkat(dirfd(d), e->d_name, 0);
    if (d)
        closedir(d);
    rmdir(dir);
}

/* A file's path; up to 16 are valid at once. */
static const char *in_dir(const char *name)
{
    static char paths[16][160];
    static unsigned next;
    char *p = paths[next++ % 16];
    snprintf(p, sizeof paths[0], "%s/%s", dir, name);
    return p;
}

static void write_file(const char *name, const char *text)
{
    char temporary[200];
    snprintf(temporary, sizeof temporary, "%s.new", in_dir(name));
    FILE *f = fopen(temporary, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
    ck_assert_int_eq(rename(temporary, in_dir(name)), 0);
}

static void copy_file(const char *from, const char *to)
{
    static char text[8192];
    FILE *f = fopen(in_dir(from), "r");
    ck_assert_ptr_nonnull(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    write_file(to, text);
}

/* What the server reported last. */
static pthread_mutex_t report_lock = PTHREAD_MUTEX_INITIALIZER;
static char report_text[600];
static bool report_failed;
static unsigned reports;

static void on_report(void *ctx, bool failed, const char *message)
{
    (void)ctx;
    pthread_mutex_lock(&report_lock);
    snprintf(report_text, sizeof report_text, "%s", message);
    report_failed = failed;
    reports++;
    pthread_mutex_unlock(&report_lock);
}

static bool reported(bool failed, const char *part)
{
    pthread_mutex_lock(&report_lock);
    bool yes = report_failed == failed && strstr(report_text, part);
    pthread_mutex_unlock(&report_lock);
    return yes;
}

static void start_secure(const char *listen, struct rpc_listen_security sec)
{
    server_start(listen, (struct rpc_server_config){.security = &sec, .on_report = on_report});
}

static struct rpc_listen_security server_files(const char *client_ca)
{
    return (struct rpc_listen_security){.cert_file = in_dir("server.pem"),
                                        .key_file = in_dir("server.key"),
                                        .client_ca_file = client_ca ? in_dir(client_ca) : NULL};
}

static struct rpc_channel *open_secure(struct rpc_client_security sec)
{
    struct rpc_channel *ch;
    OK(rpc_channel_open(&ch, srv.address, &sec, st));
    return ch;
}

/* One call on a connection of its own. */
static enum status_code try_call(struct rpc_client_security sec, struct status *st)
{
    struct rpc_channel *ch = open_secure(sec);
    enum status_code rc = echo(ch, "hello", st);
    rpc_channel_destroy(ch);
    return rc;
}

#define CLIENT(...) ((struct rpc_client_security){__VA_ARGS__})
#define REFUSED(code, part, ...)                                                                                       \
    do {                                                                                                               \
        struct status got_ = STATUS_INIT;                                                                              \
        ck_assert_int_eq(try_call(CLIENT(__VA_ARGS__), &got_), code);                                                  \
        ck_assert_msg(strstr(got_.message, part), "\"%s\" not in: %s", part, got_.message);                            \
    } while (0)

START_TEST(tls_needs_the_right_ca_and_name)
{
    start_secure("127.0.0.1:0", server_files(NULL));
    OK(try_call(CLIENT(.ca_file = in_dir("ca.pem")), st));
    OK(try_call(CLIENT(.ca_file = in_dir("ca.pem"), .server_name = "localhost"), st));
    REFUSED(ST_UNAVAILABLE, "was not signed by tls-ca /tmp", .ca_file = in_dir("other-ca.pem"));
    REFUSED(ST_UNAVAILABLE, "tls-server-name", .ca_file = in_dir("ca.pem"), .server_name = "elsewhere.test");
    REFUSED(ST_UNAVAILABLE, "does the server expect TLS", .tls = false);
    ck_assert_uint_eq(srv.opens, 2);
    server_stop(0);
}
END_TEST

START_TEST(mutual_tls_needs_a_certificate_of_the_ca)
{
    start_secure("127.0.0.1:0", server_files("ca.pem"));
    OK(try_call(
        CLIENT(.ca_file = in_dir("ca.pem"), .cert_file = in_dir("client.pem"), .key_file = in_dir("client.key")), st));
    REFUSED(ST_UNAVAILABLE, "demand a client certificate (tls-cert)", .ca_file = in_dir("ca.pem"));
    REFUSED(ST_UNAVAILABLE, "believe tls-cert /tmp", .ca_file = in_dir("ca.pem"), .cert_file = in_dir("stranger.pem"),
            .key_file = in_dir("stranger.key"));
    ck_assert_uint_eq(srv.opens, 1);
    server_stop(0);
}
END_TEST

START_TEST(new_certificates_count_from_the_next_connection)
{
    copy_file("server.pem", "live.pem");
    copy_file("server.key", "live.key");
    copy_file("ca.pem", "live-ca.pem");
    start_secure("127.0.0.1:0", (struct rpc_listen_security){.cert_file = in_dir("live.pem"),
                                                             .key_file = in_dir("live.key"),
                                                             .client_ca_file = in_dir("live-ca.pem")});
    ck_assert(reported(false, "CN = server") || reported(false, "CN=server"));
    struct rpc_client_security client = {
        .ca_file = in_dir("ca.pem"), .cert_file = in_dir("client.pem"), .key_file = in_dir("client.key")};
    struct rpc_channel *before = open_secure(client);
    OK(echo(before, "hello", st));
    /* Half of a rotation, and worse: nothing changes for anybody, and it is said. */
    copy_file("renewed.pem", "live.pem");
    OK(try_call(client, st));
    ck_assert(reported(true, "is not the key of"));
    unsigned n = reports;
    OK(try_call(client, st));
    ck_assert_uint_eq(reports, n); /* once */
    write_file("live.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    OK(try_call(client, st));
    ck_assert(reported(true, "in PEM form"));
    copy_file("expired.pem", "live.pem");
    copy_file("expired.key", "live.key");
    OK(try_call(client, st));
    ck_assert(reported(true, "expired on 20"));
    unlink(in_dir("live.key"));
    OK(try_call(client, st));
    ck_assert(reported(true, "live.key"));
    /* Whole: other people's clients are believed from now on, and a new certificate is shown. */
    copy_file("stranger.pem", "live.pem");
    copy_file("stranger.key", "live.key");
    copy_file("other-ca.pem", "live-ca.pem");
    REFUSED(ST_UNAVAILABLE, "certificate verify failed", .ca_file = in_dir("ca.pem"), .cert_file = in_dir("client.pem"),
            .key_file = in_dir("client.key"));
    OK(try_call(CLIENT(.ca_file = in_dir("other-ca.pem"), .cert_file = in_dir("stranger.pem"),
                       .key_file = in_dir("stranger.key")),
                st));
    ck_assert(reported(false, "read again"));
    OK(echo(before, "the old connection lives on", st));
    rpc_channel_destroy(before);
    server_stop(0);
}
END_TEST

START_TEST(client_takes_up_new_files_by_itself)
{
    copy_file("stranger.pem", "mine.pem");
    copy_file("stranger.key", "mine.key");
    write_file("token", TOKEN_A "\n");
    write_file("my-token", TOKEN_B "\n");
    struct rpc_listen_security sec = server_files("ca.pem");
    sec.token_file = in_dir("token");
    start_secure("127.0.0.1:0", sec);
    struct status got = STATUS_INIT;
    struct rpc_channel *ch = open_secure(CLIENT(.ca_file = in_dir("ca.pem"), .cert_file = in_dir("mine.pem"),
                                                .key_file = in_dir("mine.key"), .token_file = in_dir("my-token")));
    ck_assert_int_eq(echo(ch, "hello", &got), ST_UNAVAILABLE);
    copy_file("client.pem", "mine.pem");
    copy_file("client.key", "mine.key");
    AWAIT(echo(ch, "hello", &got) == ST_UNAUTHENTICATED);
    struct rpc_stream *s;
    OK(rpc_stream_open(&s, ch, "/grpc.health.v1.Health/Watch", 0, st)); /* under way while its link is replaced */
    Grpc__Health__V1__HealthCheckRequest r = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    OK(rpc_stream_send(s, &r.base, PATIENCE_MS, st));
    write_file("my-token", "# of today\n\n  " TOKEN_A "\r\n");
    copy_file("renewed.pem", "mine.pem");
    copy_file("renewed.key", "mine.key");
    AWAIT(echo(ch, "hello", &got) == ST_OK);
    const void *msg;
    size_t len;
    OK(rpc_stream_recv(s, &msg, &len, PATIENCE_MS, NULL, st));
    ck_assert_ptr_nonnull(msg);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(PATIENCE_MS);
}
END_TEST

START_TEST(token_is_demanded_of_all_but_health)
{
    static const char *const listen[] = {"127.0.0.1:0", "unix"};
    for (int i = 0; i < 2; i++) {
        write_file("token", "# two tokens\n" TOKEN_A "\n\n" TOKEN_B "\n");
        write_file("a", TOKEN_A "\n");
        write_file("b", TOKEN_B);
        write_file("c", "third-token-01234567890");
        start_secure(i ? socket_path("s") : listen[i], (struct rpc_listen_security){.token_file = in_dir("token")});
        OK(try_call(CLIENT(.token_file = in_dir("a")), st));
        OK(try_call(CLIENT(.token_file = in_dir("b")), st));
        ck_assert_str_ne(srv.header, "none"); /* user-agent: the others came through */
        REFUSED(ST_UNAUTHENTICATED, "authorization: no such header", .tls = false);
        REFUSED(ST_UNAUTHENTICATED, "authorization: not a token", .token_file = in_dir("c"));
        struct status got = STATUS_INIT;
        struct rpc_channel *ch = open_secure(CLIENT(.tls = false));
        ProtobufCMessage *reply;
        Grpc__Health__V1__HealthCheckRequest r = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
        rpc_health_set(srv.health, "", true);
        OK(rpc_unary(ch, "/grpc.health.v1.Health/Check", &r.base, &grpc__health__v1__health_check_response__descriptor,
                     &reply, 0, st));
        protobuf_c_message_free_unpacked(reply, NULL);
        /* Not even what exists is told. */
        ck_assert_int_eq(rpc_unary(ch, "/test.T/Nope", &r.base, MSG_TYPE, &reply, 0, &got), ST_UNAUTHENTICATED);
        rpc_channel_destroy(ch);
        ck_assert_uint_eq(srv.opens, 2);
        /* Rotation: a file that is gone or wrong changes nothing; a new one counts within its time. */
        unlink(in_dir("token"));
        AWAIT(try_call(CLIENT(.token_file = in_dir("a")), &got) == ST_OK && reported(true, "the tokens read before"));
        write_file("token", "short\n");
        AWAIT(try_call(CLIENT(.token_file = in_dir("a")), &got) == ST_OK && reported(true, "line 1: a token of 5"));
        write_file("token", "third-token-01234567890\n");
        AWAIT(try_call(CLIENT(.token_file = in_dir("c")), &got) == ST_OK);
        REFUSED(ST_UNAUTHENTICATED, "authorization", .token_file = in_dir("a"));
        server_stop(0);
    }
    folder_remove();
}
END_TEST

START_TEST(listener_for_probes_answers_health_only)
{
    start_secure("127.0.0.1:0", (struct rpc_listen_security){.health_only = true});
    rpc_health_set(srv.health, "", true);
    REFUSED(ST_PERMISSION_DENIED, "grpc.health.v1 only", .tls = false);
    struct rpc_channel *ch = open_secure(CLIENT(.tls = false));
    ProtobufCMessage *reply;
    Grpc__Health__V1__HealthCheckRequest r = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    OK(rpc_unary(ch, "/grpc.health.v1.Health/Check", &r.base, &grpc__health__v1__health_check_response__descriptor,
                 &reply, 0, st));
    protobuf_c_message_free_unpacked(reply, NULL);
    rpc_channel_destroy(ch);
    ck_assert_uint_eq(srv.opens, 0);
    server_stop(0);
}
END_TEST

/* ---- what is wrong with the files, said at the start ---- */

static void check_start(struct rpc_listen_security sec, enum status_code code, const char *part)
{
    const char *listen = "127.0.0.1:0";
    static const struct rpc_method none = {"/a.B/C", RPC_UNARY, .on_open = NULL};
    struct rpc_server_config cfg = {
        .methods = &none, .n_methods = 1, .listen = &listen, .n_listen = 1, .security = &sec};
    struct rpc_server *s;
    struct status got = STATUS_INIT;
    ck_assert_int_eq(rpc_server_start(&s, &cfg, &got), code);
    ck_assert_msg(strstr(got.message, part), "\"%s\" not in: %s", part, got.message);
}

static void check_open(struct rpc_client_security sec, const char *address, enum status_code code, const char *part)
{
    struct rpc_channel *ch;
    struct status got = STATUS_INIT;
    ck_assert_int_eq(rpc_channel_open(&ch, address, &sec, &got), code);
    ck_assert_msg(strstr(got.message, part), "\"%s\" not in: %s", part, got.message);
}

#define SERVER(c, k, ...) ((struct rpc_listen_security){.cert_file = in_dir(c), .key_file = in_dir(k), __VA_ARGS__})

START_TEST(bad_files_are_named_at_the_start)
{
    static const char here[] = "127.0.0.1:1";
    check_start(SERVER("none.pem", "server.key"), ST_NOT_FOUND, "tls-cert /tmp/check_rpc_certs");
    check_start(SERVER("server.pem", "none.key"), ST_NOT_FOUND, "none.key: No such file");
    check_start(SERVER("server.key", "server.key"), ST_INVALID_ARGUMENT, "server.key: expected certificates");
    check_start(SERVER("server.pem", "server.pem"), ST_INVALID_ARGUMENT, "server.pem: expected a private key");
    check_start(SERVER("server.pem", "client.key"), ST_INVALID_ARGUMENT, "client.key: is not the key of tls-cert");
    check_start(SERVER("expired.pem", "expired.key"), ST_INVALID_ARGUMENT, "expired on 20");
    check_start(SERVER("server.pem", "server.key", .client_ca_file = in_dir("server.key")), ST_INVALID_ARGUMENT,
                "tls-client-ca /tmp");
    check_start((struct rpc_listen_security){.cert_file = in_dir("server.pem")}, ST_INVALID_ARGUMENT,
                "tls-key: not given");
    check_start((struct rpc_listen_security){.key_file = in_dir("server.key")}, ST_INVALID_ARGUMENT,
                "tls-cert: not given");
    check_start((struct rpc_listen_security){.client_ca_file = in_dir("ca.pem")}, ST_INVALID_ARGUMENT, "tls-client-ca");
    write_file("token", "# none\n\n");
    check_start((struct rpc_listen_security){.token_file = in_dir("token")}, ST_INVALID_ARGUMENT, "expected a token");
    write_file("token", TOKEN_A "\n" TOKEN_A " b\n");
    check_start((struct rpc_listen_security){.token_file = in_dir("token")}, ST_INVALID_ARGUMENT, "line 2: expected");
    check_start((struct rpc_listen_security){.token_file = dir}, ST_UNAVAILABLE, "token-file /tmp");
    check_open(CLIENT(.ca_file = in_dir("none.pem")), here, ST_NOT_FOUND, "tls-ca /tmp");
    check_open(CLIENT(.cert_file = in_dir("expired.pem"), .key_file = in_dir("expired.key")), here, ST_INVALID_ARGUMENT,
               "tls-cert /tmp");
    check_open(CLIENT(.cert_file = in_dir("client.pem")), here, ST_INVALID_ARGUMENT, "tls-key: not given");
    write_file("token", TOKEN_A);
    check_open(CLIENT(.token_file = in_dir("token")), "10.0.0.1:1", ST_INVALID_ARGUMENT, "in the clear to 10.0.0.1:1");
    check_open(CLIENT(.token_file = in_dir("none")), here, ST_NOT_FOUND, "token-file /tmp");
}
END_TEST

START_TEST(token_file_takes_so_many_and_no_more)
{
    static char text[(RPC_MAX_METADATA_BYTES)];
    size_t n = 0;
    for (int i = 0; i < 33; i++) {
        write_file("token", text);
        if (i == 32) {
            struct rpc_listen_security full = {.token_file = in_dir("token")};
            start_secure("127.0.0.1:0", full);
            server_stop(0);
        }
        n += (size_t)snprintf(text + n, sizeof text - n, "token-number-%010d\n", i);
    }
    write_file("token", text);
    check_start((struct rpc_listen_security){.token_file = in_dir("token")}, ST_INVALID_ARGUMENT, "more than 32");
    memset(text, 'x', 513);
    text[513] = '\0';
    write_file("token", text);
    check_start((struct rpc_listen_security){.token_file = in_dir("token")}, ST_INVALID_ARGUMENT, "513 bytes");
    text[512] = '\0';
    write_file("token", text);
    start_secure("127.0.0.1:0", (struct rpc_listen_security){.token_file = in_dir("token")});
    OK(try_call(CLIENT(.token_file = in_dir("token")), st));
    server_stop(0);
}
END_TEST

/* ---- allocations that fail: the linker sends those of our own code here; those of this thread are counted ---- */

static _Thread_local long fail_at = -1; /* below 0: none */

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t each);
char *__real_strdup(const char *s);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t each);
char *__wrap_strdup(const char *s);

static bool fails(void)
{
    return fail_at >= 0 && fail_at-- == 0;
}

void *__wrap_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t each)
{
    return fails() ? NULL : __real_calloc(n, each);
}

char *__wrap_strdup(const char *s)
{
    return fails() ? NULL : __real_strdup(s);
}

START_TEST(every_allocation_of_a_start_may_fail)
{
    static const char *const listen = "127.0.0.1:0";
    static const struct rpc_method none = {"/a.B/C", RPC_UNARY, .on_open = NULL};
    write_file("token", TOKEN_A "\n");
    struct rpc_listen_security sec = server_files("ca.pem");
    sec.token_file = in_dir("token");
    struct rpc_server_config cfg = {
        .methods = &none, .n_methods = 1, .listen = &listen, .n_listen = 1, .security = &sec};
    struct rpc_client_security client = {.ca_file = in_dir("ca.pem"),
                                         .cert_file = in_dir("client.pem"),
                                         .key_file = in_dir("client.key"),
                                         .server_name = "localhost",
                                         .token_file = in_dir("token")};
    long n = 0;
    for (bool done = false; !done; n++) {
        struct rpc_server *s = NULL;
        struct status got = STATUS_INIT;
        fail_at = n;
        enum status_code rc = rpc_server_start(&s, &cfg, &got);
        done = fail_at >= 0; /* it was not reached */
        fail_at = -1;
        /* One request slot less than wished for is no failure. */
        ck_assert_msg(rc == ST_OK || (!done && rc == ST_RESOURCE_EXHAUSTED), "%ld: %s", n, got.message);
        rpc_server_destroy(s);
    }
    ck_assert_int_gt(n, 12);
    n = 0;
    for (bool done = false; !done; n++) {
        struct rpc_channel *ch = NULL;
        struct status got = STATUS_INIT;
        fail_at = n;
        enum status_code rc = rpc_channel_open(&ch, "127.0.0.1:1", &client, &got);
        done = fail_at >= 0;
        fail_at = -1;
        ck_assert_msg(rc == (done ? ST_OK : ST_RESOURCE_EXHAUSTED), "%ld: %s", n, got.message);
        rpc_channel_destroy(ch);
    }
    ck_assert_int_gt(n, 9);
}
END_TEST

void rpc_security_tests(TCase *c)
{
    tcase_add_unchecked_fixture(c, certs_make, certs_remove);
    tcase_add_test(c, tls_needs_the_right_ca_and_name);
    tcase_add_test(c, mutual_tls_needs_a_certificate_of_the_ca);
    tcase_add_test(c, new_certificates_count_from_the_next_connection);
    tcase_add_test(c, client_takes_up_new_files_by_itself);
    tcase_add_test(c, token_is_demanded_of_all_but_health);
    tcase_add_test(c, listener_for_probes_answers_health_only);
    tcase_add_test(c, bad_files_are_named_at_the_start);
    tcase_add_test(c, token_file_takes_so_many_and_no_more);
    tcase_add_test(c, every_allocation_of_a_start_may_fail);
}
