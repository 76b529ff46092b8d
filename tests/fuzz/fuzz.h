/* fuzz.h - what the fuzz targets share.
 *
 * A target is LLVMFuzzerTestOneInput in fuzz_<name>.c. For libFuzzer (TANDEM_LIBFUZZER) that is all; else the file has a
 * main of its own, which replays what it is given and goes on with damaged copies of its own seeds, the same on every run:
 *
 *     fuzz_<name> [RUNS [FILE OR FOLDER...]]
 */
#ifndef TANDEM_TESTS_FUZZ_H
#define TANDEM_TESTS_FUZZ_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Replays argv[2] and so on, a folder's files by name. RUNS, or `runs` where it is not given. Ends the program when a file
 * cannot be read. */
long fuzz_start(int argc, char **argv, long runs);

/* A copy that ends where its memory ends, so that the sanitizer sees a read behind it. */
void fuzz_one(const void *data, size_t size);

#endif
