/* chat_internal.h - between chat*.c. */
#ifndef TANDEM_CHAT_INTERNAL_H
#define TANDEM_CHAT_INTERNAL_H

#include "coordinator/chat.h"

const char *chat_named_template(const char *name); /* NULL: no such name */

#endif
