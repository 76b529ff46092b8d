/* comm_devices.c - which device a rank takes (comm.h): every rank hears what all others see, and all come to the same match. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "proto/ranks.h"

#define SHOWN 6 /* devices in the text of an error, at most */

static const uint8_t *id_of(const struct comm_devices *of, uint32_t rank, uint32_t i)
{
    return of[rank].id[i];
}

/* Which of the first `ranks` has taken this device of a machine; `ranks`: nobody. */
static uint32_t taker(const struct comm_devices *of, const uint32_t *taken, uint32_t ranks, uint32_t machine,
                      const uint8_t *id)
{
    for (uint32_t r = 0; r < ranks; r++)
        if (of[r].machine == machine && taken[r] != COMM_DEVICE_ABSENT &&
            memcmp(id_of(of, r, taken[r]), id, COMM_DEVICE_BYTES) == 0)
            return r;
    return ranks;
}

/* Gives `rank` a device that none of the first `ranks` has; or one whose owner can be given another in the same way (an augmenting
 * path). asked: the ranks on the way, which are not asked again. At most MAX_RANKS calls deep. */
static bool give(const struct comm_devices *of, uint32_t *taken, uint32_t ranks, uint32_t rank, bool *asked)
{
    const struct comm_devices *own = &of[rank];
    for (uint32_t i = 0; i < own->count; i++)
        if (taker(of, taken, ranks, own->machine, own->id[i]) == ranks) {
            taken[rank] = i;
            return true;
        }
    for (uint32_t i = 0; i < own->count; i++) {
        const uint32_t owner = taker(of, taken, ranks, own->machine, own->id[i]);
        if (asked[owner])
            continue;
        asked[owner] = true;
        if (give(of, taken, ranks, owner, asked)) {
            taken[rank] = i;
            return true;
        }
    }
    return false;
}

uint32_t comm_match_devices(const struct comm_devices *of, uint32_t ranks, uint32_t *taken)
{
    uint32_t without = ranks;
    for (uint32_t r = 0; r < ranks; r++) {
        bool asked[MAX_RANKS] = {false};
        if (give(of, taken, r, r, asked))
            continue;
        taken[r] = COMM_DEVICE_ABSENT;
        if (without == ranks)
            without = r;
    }
    return without;
}

/* Whether a rank before this one, or this one earlier in its list, has named the device. */
static bool named_before(const struct comm_devices *of, uint32_t rank, uint32_t at)
{
    for (uint32_t r = 0; r <= rank; r++)
        for (uint32_t i = 0; of[r].machine == of[rank].machine && i < (r == rank ? at : of[r].count); i++)
            if (memcmp(id_of(of, r, i), id_of(of, rank, at), COMM_DEVICE_BYTES) == 0)
                return true;
    return false;
}

/* "GPU-00010203 (rank 0's), GPU-04050607 (free)", as nvidia-smi -L begins their UUIDs. */
static void list_devices(char *text, size_t cap, const struct comm_devices *of, const uint32_t *taken, uint32_t ranks,
                         uint32_t machine)
{
    uint32_t shown = 0;
    size_t n = (size_t)snprintf(text, cap, "no device");
    for (uint32_t r = 0; r < ranks; r++)
        for (uint32_t i = 0; of[r].machine == machine && i < of[r].count && n < cap; i++) {
            const uint8_t *id = id_of(of, r, i);
            if (named_before(of, r, i) || shown > SHOWN)
                continue;
            if (shown++ == SHOWN) {
                n += (size_t)snprintf(text + n, cap - n, " ...");
                continue;
            }
            char whose[24] = "free";
            uint32_t by = taker(of, taken, ranks, machine, id);
            if (by < ranks)
                snprintf(whose, sizeof whose, "rank %u's", by);
            n = shown == 1 ? 0 : n;
            n += (size_t)snprintf(text + n, cap - n, "%sGPU-%02x%02x%02x%02x (%s)", n ? ", " : "", id[0], id[1], id[2],
                                  id[3], whose);
        }
}

static enum status_code refuse(const struct comm_devices *of, const uint32_t *taken, uint32_t ranks, uint32_t rank,
                               struct status *st)
{
    char text[(SHOWN + 1) * 32];
    uint32_t local = 0;
    for (uint32_t r = 0; r < ranks; r++)
        local += of[r].machine == of[rank].machine;
    list_devices(text, sizeof text, of, taken, ranks, of[rank].machine);
    return status_set(st, ST_FAILED_PRECONDITION,
                      "rank %u finds no free device among its %u, as %u rank%s its machine: start fewer there, or give "
                      "each a device of its own (--devices, CUDA_VISIBLE_DEVICES, the GPUs of its pod); seen there: %s",
                      rank, of[rank].count, local, local == 1 ? " has" : "s share", text);
}

static enum status_code match(const struct comm_devices *of, uint32_t ranks, uint32_t *all, struct status *st)
{
    for (uint32_t r = 0; r < ranks; r++)
        if (of[r].count > COMM_DEVICES_MAX)
            return status_set(st, ST_INTERNAL, "rank %u tells of %u devices, expected at most %d", r, of[r].count,
                              COMM_DEVICES_MAX);
    uint32_t without = comm_match_devices(of, ranks, all);
    return without < ranks ? refuse(of, all, ranks, without, st) : ST_OK;
}

enum status_code comm_take_device(struct comm *c, const struct comm_devices *mine, uint32_t *taken, struct status *st)
{
    const uint32_t ranks = comm_size(c), rank = comm_rank(c);
    struct comm_devices *of = calloc(ranks, sizeof *of);
    uint32_t *all = calloc(ranks, sizeof *all);
    size_t *bytes = calloc(ranks, sizeof *bytes);
    enum status_code rc;
    if (!of || !all || !bytes) {
        rc = status_nomem(st, "devices of all ranks", ranks * sizeof *of);
        goto out;
    }
    for (uint32_t r = 0; r < ranks; r++)
        bytes[r] = sizeof *of;
    of[rank] = *mine;
    of[rank].machine = comm_machine(c);
    if ((rc = comm_all_gather(c, &of[rank], of, bytes, st)) != ST_OK) {
        of = NULL; /* peers may still write there, see comm/README.md */
        goto out;
    }
    if ((rc = match(of, ranks, all, st)) == ST_OK)
        *taken = all[rank];
out:
    free(bytes);
    free(all);
    free(of);
    return rc;
}
