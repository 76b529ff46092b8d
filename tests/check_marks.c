/* check_marks.c - where a test is, told to Check's parent less often.
 *
 * Check sends the place of every assertion that holds through a temporary file, so that a crash can be reported as "after
 * this point". A test with a million of them spends most of its time on that. Here a place is sent when the last one is
 * older than a millisecond: a crash is still reported with a place that was passed shortly before. Failures carry their own
 * place and are not concerned.
 */
#include <stdint.h>
#include <time.h>

void __real__mark_point(const char *file, int line);
void __wrap__mark_point(const char *file, int line);

void __wrap__mark_point(const char *file, int line)
{
    static _Thread_local int64_t sent_us;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    int64_t now_us = now.tv_sec * 1000000ll + now.tv_nsec / 1000;
    if (now_us - sent_us < 1000)
        return;
    sent_us = now_us;
    __real__mark_point(file, line);
}
