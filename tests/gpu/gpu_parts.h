/* gpu_parts.h - the CUDA plugin and small plans, for tests and benchmarks of an engine on a device. Prefix gpu_. */
#ifndef TANDEM_TESTS_GPU_PARTS_H
#define TANDEM_TESTS_GPU_PARTS_H

#include "worker/backend.h"
#include "worker/engine.h"

#define GPU_SKIP 77

/* The group: the ranks of mpirun where it started us, else one. Made at the first call, and never ended: the process is. */
struct comm *gpu_comm(void);

/* Opens the device of this rank. NULL, and what is missing on stdout, when there is no driver or device; ends the program when the plugin
 * is not usable. path NULL: backend_cuda.so beside the program. Stays open. */
const struct backend_parts *gpu_parts(const char *path);

/* Compute capability of that device, times 10. */
uint32_t gpu_capability(void);

/* An engine and the number of its last step. Everything here ends the program on an error. */
struct gpu_run {
    struct engine *e;
    uint64_t step;
    struct engine_result result;
};

/* cfg->comm is not looked at. */
void gpu_create(struct gpu_run *r, const struct engine_config *cfg);
void gpu_destroy(struct gpu_run *r);
/* Admits the slot, unless position is above 0, and feeds n tokens. */
void gpu_prefill(struct gpu_run *r, uint32_t slot, const uint32_t *ids, uint32_t n, uint32_t position, bool sample,
                 Tandem__V1__SampleParams *params);
/* Every row is scored: the token after the last one is `next`. */
void gpu_score(struct gpu_run *r, uint32_t slot, const uint32_t *ids, uint32_t n, uint32_t position, uint32_t next,
               Tandem__V1__SampleParams *params);
void gpu_decode(struct gpu_run *r, uint32_t *slots, uint32_t n);
/* The same with two steps under way: the result is that of the step before; false: there is none yet. */
bool gpu_decode_ahead(struct gpu_run *r, uint32_t *slots, uint32_t n);
void gpu_collect(struct gpu_run *r); /* of the oldest that is under way */
/* Decodes of slots, and a chunk of another one. */
void gpu_hybrid(struct gpu_run *r, uint32_t *slots, uint32_t n, uint32_t slot, const uint32_t *ids, uint32_t rows,
                uint32_t position);
/* The same, and every row of the chunk is scored, as by gpu_score. */
void gpu_hybrid_score(struct gpu_run *r, uint32_t *slots, uint32_t n, uint32_t slot, const uint32_t *ids, uint32_t rows,
                      uint32_t position, uint32_t next, Tandem__V1__SampleParams *params);
/* gpu_hybrid, under way: gpu_collect gets its result. */
void gpu_hybrid_ahead(struct gpu_run *r, uint32_t *slots, uint32_t n, uint32_t slot, const uint32_t *ids, uint32_t rows,
                      uint32_t position);
void gpu_release(struct gpu_run *r, uint32_t slot);
/* Slots to host memory, or back. */
void gpu_suspend(struct gpu_run *r, uint32_t *slots, uint32_t n);
void gpu_resume(struct gpu_run *r, uint32_t *slots, uint32_t n);
/* Logits that the first sample of the last step was drawn from, of all ranks: out [vocab]. Collective. */
void gpu_logits(struct gpu_run *r, float *out);
/* n, or so many rows as leave room for `more` behind them. */
uint32_t gpu_fits(const struct gpu_run *r, uint32_t n, uint32_t more);
double gpu_now_s(void);

/* What all ranks find alike, one says. */
#define gpu_say(...) (comm_rank(gpu_comm()) == 0 ? (void)printf(__VA_ARGS__) : (void)0)
/* ok; if not, a line on stdout. */
bool gpu_expect(bool ok, const char *what, const char *name, uint32_t at, double value);

#endif
