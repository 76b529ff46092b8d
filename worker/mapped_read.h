/* mapped_read.h - reading files that are mapped, whose pages may be gone. Prefix mapped_read.
 *
 * A file that another program cuts short while it is mapped, and a disk that fails, are told by SIGBUS at the instruction
 * that reads the page. Here that becomes an answer that a caller can turn into a message.
 */
#ifndef TANDEM_MAPPED_READ_H
#define TANDEM_MAPPED_READ_H

#include <stdbool.h>

/* Calls fn(arg); false when a page it read was gone. fn may then have been left between any two instructions: it holds no
 * lock, takes no memory, and only copies. Any thread; the first call sets the process's handler for SIGBUS, which hands on
 * what does not come from such a call. */
bool mapped_read(void (*fn)(void *arg), void *arg);

#endif
