/* coord_fake.h - a worker group without a model, for tests and the benchmark of the coordinator. Prefix fake_.
 *
 * Each rank is a thread with its own stream that speaks WorkerControl as proto/tandem/v1/worker_control.proto says and
 * checks every plan against its own book of slots: admit only free ones, chunks where the slot ends, budget kept, nothing of
 * slots that are suspended, pages and host memory never more than there are. What it
 * "samples" is a function of seed and position, so a client's tokens are known before they come. */
#ifndef TANDEM_TESTS_COORD_FAKE_H
#define TANDEM_TESTS_COORD_FAKE_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/status.h"

#define FAKE_MAX_RANKS 8
#define FAKE_NO_STOP   UINT32_MAX

struct fake_options {
    uint64_t launch_id;
    const char *group; /* NULL: the default one */
    uint32_t size;
    uint32_t protocol; /* 0: the right one */
    uint32_t max_slots, max_context, max_step_tokens, vocab_size;
    uint64_t page_bytes, token_bytes, total_pages;
    uint64_t suspend_pages; /* of host memory */
    uint64_t most_pages;    /* of total_pages that a rank can have again; 0: all */
    uint32_t step_us;       /* a step takes this long */
    uint32_t eos_id;        /* FAKE_NO_STOP: the model has none */
    uint32_t eos_at;        /* position at which eos_id is sampled; 0: never */
    uint32_t
        dies_of_chunk; /* rank 0 drops its stream instead of answering a plan with a chunk of so many tokens; 0: never */
    uint32_t lacks;    /* SampleOption bits that Ready leaves out */
    bool never_ready;  /* stays in loading */
    uint32_t loading;  /* Loading messages that the ranks send before that, 100 ms apart, each with more bytes */
    bool partial;      /* the last rank does not attach */
};

#define FAKE_OPTIONS                                                                                                   \
    {                                                                                                                  \
        .launch_id = 1, .size = 2, .max_slots = 8, .max_context = 1024, .max_step_tokens = 4096, .vocab_size = 2048,   \
        .page_bytes = 4096, .token_bytes = 64, .total_pages = 1024, .eos_id = FAKE_NO_STOP                             \
    }

/* As long as the longest of a rank's messages are, and of no use without its end. */
#define FAKE_FAULT_TEXT                                                                                                \
    "weights: file is truncated: model-00003-of-00004.safetensors: tensor model.layers.31.mlp.down_proj.weight has "   \
    "117440512 bytes by its shape, the file ends 4718592 bytes before that; it has 4999802616 bytes, expected "        \
    "5004521208 by its header; the file of before, model-00002-of-00004.safetensors, has as many as it should; "       \
    "fetch it again"

enum fake_mood {
    FAKE_WELL,
    FAKE_HOLD,        /* heartbeats go on, plans are not answered */
    FAKE_SILENT,      /* neither: like SIGSTOP */
    FAKE_WRONG_STEP,  /* answers the next plan with another number */
    FAKE_WRONG_COUNT, /* with a token too few or too many */
    FAKE_WRONG_TOKEN, /* with an id that is not in the vocabulary */
    FAKE_WRONG_EPOCH, /* answers under the number of the next epoch */
    FAKE_GARBAGE,     /* sends messages without a body, again and again */
    FAKE_DROP,        /* cancels the stream */
    FAKE_FAULT,       /* sends a permanent Fault */
};

struct fake_group;

struct fake_group *fake_group_start(const char *address, const struct fake_options *o);
void fake_group_mood(struct fake_group *g, uint32_t rank, enum fake_mood mood);
/* Waits until the rank's stream has ended; its status, and whether Shutdown came (relaunch: which). */
enum status_code fake_rank_end(struct fake_group *g, uint32_t rank, struct status *st, bool *shutdown, bool *relaunch);
/* Cancels what is left and frees. False, with a message on stderr, when a plan broke a rule. */
bool fake_group_stop(struct fake_group *g);
uint64_t fake_group_steps(const struct fake_group *g);
uint64_t fake_group_epoch(const struct fake_group *g);
uint32_t fake_group_used_slots(struct fake_group *g);
uint64_t fake_group_suspensions(struct fake_group *g); /* carried out by rank 0 */

/* What the ranks sample at this position (that of the new token) of a request with this seed. */
uint32_t fake_token(uint64_t seed, uint32_t position, uint32_t vocab_size);

#endif
