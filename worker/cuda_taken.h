/* cuda_taken.h - that a step takes no memory once a rank is ready, in debug builds: there the linker hands the calls of the CUDA
 * runtime that may take some (TANDEM_TAKING_CALLS in worker/CMakeLists.txt), made by anything in the plugin, to
 * cuda_taken.c. Prefix cuda_taken_. */
#ifndef TANDEM_CUDA_TAKEN_H
#define TANDEM_CUDA_TAKEN_H

/* From now on such a call on this thread names itself and `where` on stderr and ends the process; NULL: it may be made again.
 * Nothing happens in builds that do not look. */
void cuda_taken_forbid(const char *where);

#endif
