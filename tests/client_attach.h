/* client_attach.h - the part of check_client about lost connections. */
#ifndef TANDEM_TESTS_CLIENT_ATTACH_H
#define TANDEM_TESTS_CLIENT_ATTACH_H

#include <check.h>

void client_attach(TCase *t);

#endif
