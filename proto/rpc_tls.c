/* rpc_tls.c - certificates and keys from PEM files, looked over before the core gets them.
 *
 * The core says of a bad file no more than that a handshake failed, and on its own it serves an expired certificate to
 * clients that all refuse it. What can be known before is checked here, with a message that names the file.
 */
#include <openssl/asn1.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/rpc_security.h"

struct rpc_tls_stamps rpc_tls_stamps(const struct rpc_tls_files *f)
{
    return (struct rpc_tls_stamps){rpc_file_stamp(f->cert), rpc_file_stamp(f->key), rpc_file_stamp(f->ca)};
}

bool rpc_tls_same(const struct rpc_tls_stamps *a, const struct rpc_tls_stamps *b)
{
    return rpc_file_same(&a->cert, &b->cert) && rpc_file_same(&a->key, &b->key) && rpc_file_same(&a->ca, &b->ca);
}

/* Nobody is there to be asked for the password of a key. */
static int no_password(char *buf, int size, int writing, void *ctx)
{
    (void)buf, (void)size, (void)writing, (void)ctx;
    return 0;
}

/* The first certificate of a PEM text; *n counts them all. NULL when there is none or one of them is damaged. */
static X509 *read_certificates(const char *pem, size_t *n)
{
    BIO *bio = BIO_new_mem_buf(pem, -1);
    X509 *first = NULL, *x;
    *n = 0;
    while (bio && (x = PEM_read_bio_X509(bio, NULL, no_password, NULL))) {
        if (++*n == 1)
            first = x;
        else
            X509_free(x);
    }
    /* The end of the text reads as "no start line"; anything else is damage. */
    if (ERR_GET_REASON(ERR_peek_last_error()) != PEM_R_NO_START_LINE) {
        X509_free(first);
        first = NULL;
    }
    ERR_clear_error();
    BIO_free(bio);
    return first;
}

static EVP_PKEY *read_key(const char *pem)
{
    BIO *bio = BIO_new_mem_buf(pem, -1);
    EVP_PKEY *key = bio ? PEM_read_bio_PrivateKey(bio, NULL, no_password, NULL) : NULL;
    ERR_clear_error();
    BIO_free(bio);
    return key;
}

static void time_text(const ASN1_TIME *t, char out[32], int64_t *seconds)
{
    struct tm tm = {0};
    if (!ASN1_TIME_to_tm(t, &tm)) {
        snprintf(out, 32, "an unreadable date");
        return;
    }
    strftime(out, 32, "%Y-%m-%d %H:%M:%S UTC", &tm);
    if (seconds)
        *seconds = timegm(&tm);
}

static enum status_code check_dates(X509 *x, const char *path, struct rpc_tls_texts *t, struct status *st)
{
    char from[32];
    X509_NAME_oneline(X509_get_subject_name(x), t->subject, sizeof t->subject);
    time_text(X509_get0_notBefore(x), from, NULL);
    time_text(X509_get0_notAfter(x), t->until, &t->not_after_s);
    if (X509_cmp_current_time(X509_get0_notBefore(x)) > 0)
        return status_set(st, ST_INVALID_ARGUMENT, "tls-cert %.200s: the certificate of %s is not valid before %s",
                          path, t->subject, from);
    if (X509_cmp_current_time(X509_get0_notAfter(x)) <= 0)
        return status_set(st, ST_INVALID_ARGUMENT, "tls-cert %.200s: the certificate of %s expired on %s", path,
                          t->subject, t->until);
    return ST_OK;
}

static enum status_code load_identity(struct rpc_tls_texts *t, const struct rpc_tls_files *f, struct status *st)
{
    size_t n;
    X509 *x = NULL;
    EVP_PKEY *key = NULL;
    enum status_code rc = rpc_file_read("tls-cert", f->cert, &t->cert, st);
    if (rc == ST_OK)
        rc = rpc_file_read("tls-key", f->key, &t->key, st);
    if (rc != ST_OK)
        return rc;
    if (!(x = read_certificates(t->cert, &n)))
        rc = status_set(st, ST_INVALID_ARGUMENT, "tls-cert %.300s: expected certificates in PEM form", f->cert);
    else if (!(key = read_key(t->key)))
        rc = status_set(st, ST_INVALID_ARGUMENT,
                        "tls-key %.300s: expected a private key in PEM form, without a password", f->key);
    else if (X509_check_private_key(x, key) != 1)
        rc = status_set(st, ST_INVALID_ARGUMENT, "tls-key %.200s: is not the key of tls-cert %.200s", f->key, f->cert);
    else
        rc = check_dates(x, f->cert, t, st);
    ERR_clear_error();
    EVP_PKEY_free(key);
    X509_free(x);
    return rc;
}

static enum status_code load_ca(struct rpc_tls_texts *t, const char *path, const char *role, struct status *st)
{
    size_t n;
    enum status_code rc = rpc_file_read(role, path, &t->ca, st);
    if (rc != ST_OK)
        return rc;
    X509 *first = read_certificates(t->ca, &n);
    X509_free(first);
    return first ? ST_OK
                 : status_set(st, ST_INVALID_ARGUMENT, "%s %.300s: expected certificates in PEM form", role, path);
}

enum status_code rpc_tls_load(struct rpc_tls_texts *out, const struct rpc_tls_files *f, const char *ca_role,
                              struct status *st)
{
    struct rpc_tls_texts t = {.not_after_s = INT64_MAX};
    if (!f->cert != !f->key)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: not given, expected beside %s %.300s",
                          f->cert ? "tls-key" : "tls-cert", f->cert ? "tls-cert" : "tls-key",
                          f->cert ? f->cert : f->key);
    enum status_code rc = f->cert ? load_identity(&t, f, st) : ST_OK;
    if (rc == ST_OK && f->ca)
        rc = load_ca(&t, f->ca, ca_role, st);
    if (rc == ST_OK)
        *out = t;
    else
        rpc_tls_unload(&t);
    return rc;
}

void rpc_tls_unload(struct rpc_tls_texts *t)
{
    rpc_file_forget(t->cert, t->cert ? strlen(t->cert) : 0);
    rpc_file_forget(t->key, t->key ? strlen(t->key) : 0);
    rpc_file_forget(t->ca, t->ca ? strlen(t->ca) : 0);
    t->cert = t->key = t->ca = NULL;
}
