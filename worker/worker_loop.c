#include "worker/worker_internal.h"

#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "worker/backend.h"

#define SHOW_BAR_US  100000
#define SHOW_LINE_US 2000000
#define BAR_CELLS    30

#define WORKER_STEPS_MAX 2 /* info.depth is at most so much */

/* ---- loading ---- */

static void show_progress(struct worker *w, uint64_t done, uint64_t total)
{
    int64_t now_us = worker_now_us();
    bool last = done >= total;
    int64_t pause_us = w->progress.bar ? SHOW_BAR_US : SHOW_LINE_US;
    bool due = last ? w->progress.shown || w->progress.bar : now_us - w->progress.last_shown_us >= pause_us;
    if (w->rank != 0 || !due)
        return; /* what is loaded at once needs no lines */
    w->progress.last_shown_us = now_us;
    w->progress.shown = true;
    char a[32], b[32];
    worker_size_text(a, done);
    worker_size_text(b, total);
    unsigned percent = total ? (unsigned)(100.0 * (double)done / (double)total) : 100;
    if (!w->progress.bar) {
        worker_log(&w->log, WORKER_LOG_INFO, "loading: %u %% (%s of %s)", percent, a, b);
        return;
    }
    unsigned cells = percent * BAR_CELLS / 100;
    char line[128];
    int n = snprintf(line, sizeof line, "\rloading [%.*s%*s] %3u %% of %s%s", (int)cells,
                     "##############################", (int)(BAR_CELLS - cells), "", percent, b, last ? "\n" : "");
    if (write(STDERR_FILENO, line, (size_t)n) < 0 || last)
        w->progress.bar = w->progress.shown = false;
}

static void on_progress(void *ctx, uint64_t done, uint64_t total)
{
    struct worker *w = ctx;
    show_progress(w, done, total);
    int64_t now_us = worker_now_us();
    if (done < total && now_us - w->progress.last_sent_us < WORKER_PROGRESS_MS * 1000)
        return;
    w->progress.last_sent_us = now_us;
    Tandem__V1__Loading l = TANDEM__V1__LOADING__INIT;
    l.done_bytes = done;
    l.total_bytes = total;
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_LOADING;
    m.loading = &l;
    worker_control_send(&w->control, &m);
}

static void on_note(void *ctx, const char *text)
{
    struct worker *w = ctx;
    worker_log(&w->log, WORKER_LOG_INFO, "%s", text);
}

/* " (model 2 ms, weights 731 ms)"; of what took no millisecond nothing. */
static const char *phases_text(char *buf, size_t cap, const struct engine_info *i)
{
    size_t n = 0;
    buf[0] = '\0';
    for (uint32_t p = 0; p < i->phases && n < cap; p++)
        if (i->phase[p].ms >= 1)
            n += (size_t)snprintf(buf + n, cap - n, "%s%s %.0f ms", n ? ", " : " (", i->phase[p].name, i->phase[p].ms);
    if (n && n < cap)
        snprintf(buf + n, cap - n, ")");
    return buf;
}

static const enum comm_gpu_way reduce_ways[] = {COMM_GPU_AUTO, COMM_GPU_PEER, COMM_GPU_NCCL}; /* --all-reduce */

static enum status_code load(struct worker *w, struct status *st)
{
    const struct worker_options *o = &w->options;
    const struct worker_backend_config backend = {
        .kind = o->backend, .devices = o->devices, .comm = w->comm, .kernels = o->trace_kernels};
    enum status_code rc = worker_backend_open(&w->backend, &backend, &w->log, st);
    if (rc == ST_OK && o->trace_kernels)
        rc = worker_trace_kernels(w->trace, w->backend.api->activity, st);
    if (rc != ST_OK)
        return rc;
    if (o->trace_kernels)
        worker_log(&w->log, WORKER_LOG_INFO, "kernels are recorded: steps take longer than without --trace-kernels");
    const bool wanted =
        o->progress == WORKER_PROGRESS_AUTO ? isatty(STDERR_FILENO) : o->progress == WORKER_PROGRESS_BAR;
    w->progress.bar = w->rank == 0 && o->log_level >= WORKER_LOG_INFO && wanted;
    char tune_dir[PATH_MAX];
    struct engine_config cfg = {
        .model_dir = o->model_dir,
        .comm = w->comm,
        .parts = w->backend.parts,
        .random_weights = o->random_weights,
        .eager = o->eager,
        .attention = (enum attn_gpu_policy)o->attention,
        .all_reduce = reduce_ways[o->all_reduce],
        .batch_invariant = o->batch_invariant,
        .timed = w->trace != NULL,
        .threads = o->threads,
        .max_slots = o->max_slots,
        .max_context = o->max_context,
        .max_step_tokens = o->max_step_tokens,
        .kv_bytes = o->kv_bytes,
        .page_bytes = o->page_bytes,
        .suspend_bytes = o->suspend_bytes,
        .kv_ahead = (enum engine_ahead)o->kv_ahead,
        .memory_fraction = o->memory_fraction,
        .progress = on_progress,
        .progress_ctx = w,
        .tune_dir = worker_tune_dir(o, tune_dir, sizeof tune_dir),
        .tune_ms = o->tune_ms,
        .note = on_note,
        .note_ctx = w,
    };
    int64_t start_us = worker_now_us();
    w->progress.last_shown_us = start_us;
    rc = engine_create(&w->engine, &cfg, st);
    if (rc == ST_UNIMPLEMENTED && cfg.parts && o->backend == WORKER_BACKEND_AUTO && !o->trace_kernels) {
        worker_log(&w->log, WORKER_LOG_WARNING, "host back end, not %s: %s", cfg.parts->text, st->message);
        worker_backend_close(&w->backend);
        cfg.parts = NULL;
        *st = (struct status)STATUS_INIT;
        rc = engine_create(&w->engine, &cfg, st);
    }
    if (rc == ST_OK)
        rc = engine_connect(w->engine, st);
    if (rc != ST_OK)
        return rc;
    const struct engine_info info = engine_info(w->engine);
    snprintf(w->device, sizeof w->device, "%s", info.device);
    char weights[32], kv[32], phases[256];
    worker_log(&w->log, WORKER_LOG_INFO, "ready on %s: weights %s, KV cache %s, %u slots, loaded in %lld ms%s",
               info.device, worker_size_text(weights, info.weight_bytes),
               worker_size_text(kv, info.kv.token_bytes ? info.kv.total_pages * info.kv.page_bytes : 0), info.max_slots,
               (long long)(worker_now_us() - start_us) / 1000, phases_text(phases, sizeof phases, &info));
    if (info.suspend_pages)
        worker_log(&w->log, WORKER_LOG_INFO, "suspended requests: %s of host memory, moved at %.1f GB/s",
                   worker_size_text(kv, info.suspend_pages * info.kv.page_bytes),
                   (double)info.suspend_bytes_per_s / 1e9);
    return ST_OK;
}

_Static_assert((int)SAMPLE_ALL == (int)TANDEM__V1__SAMPLE_OPTION__ALL &&
                   (int)SAMPLE_SCORE == (int)TANDEM__V1__SAMPLE_OPTION__SCORE &&
                   (int)SAMPLE_ADJUST == (int)TANDEM__V1__SAMPLE_OPTION__ADJUST &&
                   (int)SAMPLE_MIN_P == (int)TANDEM__V1__SAMPLE_OPTION__MIN_P,
               "sample_options travels as it is");

static void send_ready(struct worker *w)
{
    struct engine_info i = engine_info(w->engine);
    Tandem__V1__Defaults defaults = TANDEM__V1__DEFAULTS__INIT;
    defaults.temperature = i.temperature;
    defaults.top_k = i.top_k;
    defaults.top_p = i.top_p;
    defaults.min_p = i.min_p;
    defaults.typical_p = i.typical_p;
    defaults.repetition_penalty = i.repetition_penalty;
    Tandem__V1__ModelInfo model = TANDEM__V1__MODEL_INFO__INIT;
    model.architecture = i.architecture;
    model.vocab_size = i.vocab_size;
    model.max_context_tokens = i.max_context;
    model.layers = i.layers;
    model.hidden_size = i.hidden;
    model.query_heads = i.heads;
    model.kv_heads = i.kv_heads;
    model.head_dim = i.head_dim;
    if (i.bos_id >= 0) {
        model.bos_token_id_is_case = TANDEM__V1__MODEL_INFO__BOS_TOKEN_ID_IS_BOS_TOKEN_ID;
        model.bos_token_id = (uint32_t)i.bos_id;
    }
    model.n_eos_token_ids = i.n_eos;
    model.eos_token_ids = i.eos_ids;
    model.defaults = &defaults;
    Tandem__V1__Ready r = TANDEM__V1__READY__INIT;
    r.max_slots = i.max_slots;
    r.max_context_tokens = i.max_context;
    r.page_bytes = i.kv.page_bytes;
    r.token_bytes = i.kv.token_bytes;
    r.total_pages = i.kv.total_pages;
    r.max_pages = i.kv_pages_max;
    r.suspend_pages = i.suspend_pages;
    r.suspend_bytes_per_s = i.suspend_bytes_per_s;
    r.max_step_tokens = i.max_step_tokens;
    r.vocab_size = i.vocab_size;
    r.sample_options = i.sample_options;
    r.model = &model;
    r.device = w->device;
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_READY;
    m.ready = &r;
    worker_control_send(&w->control, &m);
}

/* ---- steps ---- */

/* Steps under way: a plan each, oldest first. */
struct steps {
    Tandem__V1__CoordinatorMessage *message[WORKER_STEPS_MAX];
    uint64_t step[WORKER_STEPS_MAX];
    int64_t submitted_us[WORKER_STEPS_MAX];
    uint32_t first, count;
    int64_t ended_us; /* the last one */
};

static enum status_code submit(struct worker *w, struct steps *s, Tandem__V1__CoordinatorMessage *message,
                               struct status *st)
{
    uint32_t at = (s->first + s->count++) % WORKER_STEPS_MAX;
    s->message[at] = message;
    s->step[at] = message->plan->step;
    s->submitted_us[at] = worker_now_us();
    enum status_code rc = engine_submit(w->engine, message->plan, st);
    worker_trace_host(w->trace, "submit", message->plan->step, s->submitted_us[at], worker_now_us());
    return rc;
}

/* Waits for the oldest step and sends its result. A step's time begins when the one in front has ended. */
static enum status_code collect(struct worker *w, struct steps *s, struct status *st)
{
    struct engine_result result = {0};
    Tandem__V1__CoordinatorMessage *message = s->message[s->first];
    uint64_t step = s->step[s->first];
    int64_t waits_us = worker_now_us();
    enum status_code rc = engine_collect(w->engine, &result, st);
    int64_t now_us = worker_now_us(), start_us = s->submitted_us[s->first];
    if (rc == ST_OK) {
        worker_trace_host(w->trace, "collect", step, waits_us, now_us);
        worker_trace_step(w->trace, &result);
    }
    if (s->ended_us > start_us)
        start_us = s->ended_us;
    s->ended_us = now_us;
    s->first = (s->first + 1) % WORKER_STEPS_MAX;
    s->count--;
    worker_control_step_end(&w->control, message, rc == ST_OK);
    if (rc != ST_OK)
        return rc;
    if (result.resize_failed)
        worker_log(&w->log, WORKER_LOG_WARNING, "KV memory: %s", result.resize_failed);
    worker_log(&w->log, WORKER_LOG_DEBUG, "step %llu: %u tokens, %lld us", (unsigned long long)step, result.n_tokens,
               (long long)(now_us - start_us));
    worker_control_result(&w->control, step, (uint64_t)(now_us - start_us), &result);
    return ST_OK;
}

static void forget(struct worker *w, struct steps *s)
{
    for (; s->count; s->count--) {
        worker_control_step_end(&w->control, s->message[s->first], false);
        s->first = (s->first + 1) % WORKER_STEPS_MAX;
    }
}

#define SPIN_US  2000 /* of a wait for a device; then it sleeps between looks */
#define SLEEP_US 20

/* The next thing to do: a plan, if there is room for its step; WORKER_NOTHING: the oldest step is to be collected; else
 * what ends this attachment, once no step is under way. */
static enum status_code next_event(struct worker *w, struct steps *s, enum worker_event *event,
                                   Tandem__V1__CoordinatorMessage **message, struct status *st)
{
    int64_t since_us = worker_now_us();
    if (s->count == 0) {
        *event = worker_control_next(&w->control, message);
        return ST_OK;
    }
    for (;;) {
        bool done = true;
        *event = WORKER_NOTHING;
        if (s->count < engine_info(w->engine).depth)
            *event = worker_control_poll(&w->control, message);
        if (*event == WORKER_PLAN)
            return ST_OK;
        bool ending = *event != WORKER_NOTHING;
        *event = WORKER_NOTHING;
        if (ending || s->count == engine_info(w->engine).depth)
            return ST_OK;
        enum status_code rc = engine_poll(w->engine, &done, st);
        if (rc != ST_OK || done)
            return rc;
        if (worker_now_us() - since_us > SPIN_US)
            usleep(SLEEP_US);
        else
            sched_yield();
    }
}

/* Tells log and coordinator; returns the exit status. */
static int fault(struct worker *w, const struct status *st, bool permanent)
{
    int code = worker_guard_exit_code(&w->guard);
    if (code >= 0)
        return code; /* the error follows from the end that was asked for: an aborted collective */
    worker_log(&w->log, WORKER_LOG_ERROR, "%s: %s", status_name(st->code), st->message);
    worker_control_fault(&w->control, st, permanent);
    return permanent ? WORKER_EXIT_PERMANENT : WORKER_EXIT_RELAUNCH;
}

/* One attachment with a loaded engine. Returns -1 when the link broke and the rank may attach again. */
static int serve_steps(struct worker *w, struct steps *s)
{
    struct status st = STATUS_INIT;
    Tandem__V1__CoordinatorMessage *message;
    enum worker_event event;
    for (;;) {
        if (next_event(w, s, &event, &message, &st) != ST_OK)
            return fault(w, &st, false);
        switch (event) {
        case WORKER_PLAN:
            if (submit(w, s, message, &st) != ST_OK)
                return fault(w, &st, false);
            break;
        case WORKER_NOTHING:
            if (collect(w, s, &st) != ST_OK)
                return fault(w, &st, false);
            break;
        case WORKER_VIOLATION:
            return fault(w, &w->control.violation, false);
        case WORKER_BROKEN:
            worker_log(&w->log, WORKER_LOG_WARNING, "lost the coordinator: %s; weights stay loaded",
                       w->control.broken.message);
            return -1;
        case WORKER_EXIT:
            return worker_guard_exit_code(&w->guard);
        }
    }
}

static int serve(struct worker *w)
{
    struct steps s = {.count = 0};
    struct status st = STATUS_INIT;
    if (engine_reset(w->engine, &st) != ST_OK)
        return fault(w, &st, false);
    send_ready(w);
    int code = serve_steps(w, &s);
    forget(w, &s);
    return code;
}

/* ---- life of the rank ---- */

/* Which errors of loading another try would meet again. Not RESOURCE_EXHAUSTED: memory may be back in a moment, and a
 * service that gave up for good because of it would stay down; the supervisor bounds the tries. */
static bool is_permanent(enum status_code rc)
{
    switch (rc) {
    case ST_INVALID_ARGUMENT:
    case ST_NOT_FOUND:
    case ST_PERMISSION_DENIED:
    case ST_FAILED_PRECONDITION:
    case ST_OUT_OF_RANGE:
    case ST_UNIMPLEMENTED:
    case ST_UNAUTHENTICATED:
    case ST_DATA_LOSS:
        return true;
    default:
        return false;
    }
}

int worker_run(struct worker *w)
{
    for (;;) {
        struct status st = STATUS_INIT;
        w->control.hello.device = w->device;
        enum status_code rc = worker_control_attach(&w->control, w->options.attach_timeout_ms, &st);
        if (rc != ST_OK)
            return fault(w, &st, is_permanent(rc));
        worker_log(&w->log, WORKER_LOG_INFO, "attached to %s, epoch %llu", w->control.address,
                   (unsigned long long)w->control.epoch);
        if (!w->engine && load(w, &st) != ST_OK)
            return fault(w, &st, is_permanent(st.code));
        int code = serve(w);
        if (code >= 0)
            return code;
        worker_control_detach(&w->control);
    }
}
