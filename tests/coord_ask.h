/* coord_ask.h - requests and questions to a coordinator under test. */
#ifndef TANDEM_TESTS_COORD_ASK_H
#define TANDEM_TESTS_COORD_ASK_H

#include <check.h>

#include "tests/coord_fake.h"
#include "tests/coord_proc.h"

#define STATE(name) TANDEM__V1__SERVER_INFO__STATE__##name
#define WAIT_MS     10000

struct ask {
    Tandem__V1__GenerateRequest m;
    Tandem__V1__TokenIds ids;
    Tandem__V1__Sampling sampling;
    Tandem__V1__Stopping stopping;
    Tandem__V1__Scheduling scheduling; /* not set until it is wanted */
    uint32_t prompt[2048], stop[80];
};

/* A coordinator over the demo model's tokenizer; args behind the usual ones. */
void start(struct proc *p, const char *const *args);
/* The same with a group that serves. */
struct fake_group *start_ready(struct proc *p, const struct fake_options *o, const char *const *args);
/* SIGTERM, exit status 0, and no plan that broke a rule. */
void finish(struct proc *p, struct fake_group *g);
/* n prompt ids, this seed, so many new tokens. */
void ask_ids(struct ask *a, uint32_t n, uint64_t seed, uint32_t max_tokens);
void ask_text(struct ask *a, const char *text, uint32_t max_tokens);
void ask_name(struct ask *a, const char *name);
/* The whole answer is what the ranks must have sampled. */
void check_ids(const struct proc_reply *r, uint32_t n_prompt, uint64_t seed, uint32_t n_new);
Tandem__V1__Load *get_load(struct proc *p);
/* Waits until Control.GetLoad shows just this. */
bool wait_running(struct proc *p, uint32_t running, uint32_t queued);
/* Running and queued together. */
bool wait_live(struct proc *p, uint32_t n);
enum status_code drain_call(struct proc *p, uint64_t timeout_ms, uint32_t *remaining);
enum status_code abort_call(struct proc *p, const char *const *names, size_t n, bool all, uint32_t *aborted,
                            struct status *st);

/* The cases of the suite. */
TCase *coord_limits(void);
TCase *coord_faults(void);
TCase *coord_replays(void);
TCase *coord_groups(void);
TCase *coord_memory(void);
TCase *coord_attach(void);

#endif
