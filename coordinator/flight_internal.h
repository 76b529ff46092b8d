/* flight_internal.h - the header of the flight recorder's file, as flight.h describes it. */
#ifndef TANDEM_FLIGHT_INTERNAL_H
#define TANDEM_FLIGHT_INTERNAL_H

#include "coordinator/flight.h"

#define FLIGHT_MAGIC "TANDFLT1"

struct flight_header {
    char magic[8];
    uint32_t record_bytes, zero;
    uint64_t n;
    int64_t clock_us;
    uint32_t pid;
};

uint32_t flight_check(const struct flight_record *r);

#endif
