#include "tests/coord_fake.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "proto/rpc.h"
#include "tandem/v1/worker_control.pb-c.h"

struct slot {
    bool used, suspended, shares;
    uint64_t seed;
    uint32_t length;
    uint32_t output_at; /* where its answer begins */
};

struct fake_rank {
    struct fake_group *group;
    uint32_t rank;
    pthread_t thread;
    bool started, joined;
    atomic_int mood;
    struct rpc_channel *channel;
    _Atomic(struct rpc_stream *) stream;
    struct slot *slots; /* the rank's thread */
    uint32_t *tokens;
    atomic_uint used;
    atomic_uint_least64_t suspensions;
    uint64_t host_pages; /* taken */
    uint64_t pages;      /* of the pool */
    atomic_uint_least64_t last_step, epoch;
    uint32_t heartbeat_ms;
    int64_t beat_ms;
    bool ready_sent, shutdown, relaunch;
    struct status end;
    struct status broken; /* the rule that a plan broke */
};

struct fake_group {
    struct fake_options o;
    atomic_bool stop;
    struct fake_rank rank[FAKE_MAX_RANKS];
};

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

uint32_t fake_token(uint64_t seed, uint32_t position, uint32_t vocab_size)
{
    uint64_t x = seed * UINT64_C(0x9E3779B97F4A7C15) + position * UINT64_C(0xD1B54A32D192ED03);
    x ^= x >> 31;
    x *= UINT64_C(0x94D049BB133111EB);
    x ^= x >> 29;
    return (uint32_t)(x % vocab_size);
}

/* The first rule that a plan broke says most. */
#define broke(r, ...) ((r)->broken.code == ST_OK ? (void)status_set(&(r)->broken, ST_INTERNAL, __VA_ARGS__) : (void)0)

static bool send_message(struct fake_rank *r, Tandem__V1__RankMessage *m)
{
    m->epoch = m->body_case == TANDEM__V1__RANK_MESSAGE__BODY_HELLO ? 0 : atomic_load(&r->epoch);
    m->epoch += atomic_load(&r->mood) == FAKE_WRONG_EPOCH;
    return rpc_stream_send(atomic_load(&r->stream), &m->base, 5000, NULL) == ST_OK;
}

static bool send_hello(struct fake_rank *r)
{
    const struct fake_options *o = &r->group->o;
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    Tandem__V1__Hello h = TANDEM__V1__HELLO__INIT;
    char host[] = "fake-host", device[] = "no device yet";
    h.protocol = o->protocol ? o->protocol : RPC_WORKER_PROTOCOL;
    h.launch_id = o->launch_id;
    h.rank = r->rank;
    h.size = o->size;
    h.host = host;
    h.pid = (uint32_t)getpid();
    h.device = device;
    if (o->group)
        h.group = (char *)o->group;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_HELLO;
    m.hello = &h;
    return send_message(r, &m);
}

static bool send_loading(struct fake_rank *r)
{
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    Tandem__V1__Loading loading = TANDEM__V1__LOADING__INIT;
    bool ok = true;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_LOADING;
    m.loading = &loading;
    loading.total_bytes = 1000;
    for (uint32_t i = 0; ok && i < r->group->o.loading; i++) {
        loading.done_bytes = i + 1;
        usleep(100000);
        ok = send_message(r, &m);
    }
    return ok;
}

static bool send_ready(struct fake_rank *r)
{
    const struct fake_options *o = &r->group->o;
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    Tandem__V1__Loading loading = TANDEM__V1__LOADING__INIT;
    Tandem__V1__Ready ready = TANDEM__V1__READY__INIT;
    Tandem__V1__ModelInfo model = TANDEM__V1__MODEL_INFO__INIT;
    Tandem__V1__Defaults defaults = TANDEM__V1__DEFAULTS__INIT;
    char architecture[] = "FakeForCausalLM", device[] = "fake device";
    uint32_t eos = o->eos_id;
    loading.done_bytes = loading.total_bytes = 1000;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_LOADING;
    m.loading = &loading;
    if (!send_message(r, &m))
        return false;
    defaults.temperature = 0.5f;
    defaults.top_p = 0.9f;
    model.architecture = architecture;
    model.vocab_size = o->vocab_size;
    model.layers = 3;
    model.max_context_tokens = o->max_context;
    model.n_eos_token_ids = o->eos_id != FAKE_NO_STOP;
    model.eos_token_ids = &eos;
    model.defaults = &defaults;
    ready.max_slots = o->max_slots + r->rank; /* the least counts */
    ready.max_context_tokens = o->max_context;
    ready.page_bytes = o->page_bytes;
    ready.token_bytes = o->token_bytes;
    ready.total_pages = r->pages = o->total_pages + 7 * r->rank;
    ready.suspend_pages = o->suspend_pages + 3 * r->rank;
    ready.suspend_bytes_per_s =
        0; /* not known: suspension is tried whatever rows cost, which is next to nothing here */
    ready.max_step_tokens = o->max_step_tokens;
    ready.vocab_size = o->vocab_size;
    ready.sample_options = TANDEM__V1__SAMPLE_OPTION__ALL & ~o->lacks;
    ready.model = &model;
    if (r->rank > 0) /* rank 0: as Hello said */
        ready.device = device;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_READY;
    m.ready = &ready;
    return send_message(r, &m);
}

static void send_heartbeat(struct fake_rank *r)
{
    int64_t now = now_ms();
    if (r->heartbeat_ms == 0 || now - r->beat_ms < r->heartbeat_ms / 2)
        return;
    r->beat_ms = now;
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    Tandem__V1__Heartbeat beat = TANDEM__V1__HEARTBEAT__INIT;
    beat.last_step = atomic_load(&r->last_step);
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_HEARTBEAT;
    m.heartbeat = &beat;
    (void)!send_message(r, &m);
}

static bool send_fault(struct fake_rank *r)
{
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    Tandem__V1__Fault fault = TANDEM__V1__FAULT__INIT;
    char text[] = FAKE_FAULT_TEXT;
    fault.code = ST_DATA_LOSS;
    fault.message = text;
    fault.permanent = true;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_FAULT;
    m.fault = &fault;
    return send_message(r, &m);
}

/* ---- plans ---- */

static struct slot *slot_of(struct fake_rank *r, uint32_t i, bool used, const char *what)
{
    if (!r->slots || i >= r->group->o.max_slots) {
        broke(r, "%s: slot %u of %u", what, i, r->group->o.max_slots);
        return NULL;
    }
    if (r->slots[i].used != used)
        broke(r, "%s: slot %u is %s", what, i, used ? "free" : "taken");
    return &r->slots[i];
}

static uint32_t token_at(const struct fake_rank *r, const struct slot *s, uint32_t position)
{
    const struct fake_options *o = &r->group->o;
    if (o->eos_at && position == o->eos_at)
        return o->eos_id;
    return fake_token(s->seed, position, o->vocab_size);
}

static uint32_t sample(struct fake_rank *r, const struct slot *s)
{
    return token_at(r, s, s->length);
}

/* What of an answer is computed again is what ranks sampled before. */
static void check_replay(struct fake_rank *r, const struct slot *s, const Tandem__V1__PrefillChunk *c)
{
    for (uint32_t i = 0; i < c->n_token_ids; i++)
        if (c->position + i >= s->output_at && c->token_ids[i] != token_at(r, s, c->position + i))
            broke(r, "prefill: token %u at %u of an answer that begins at %u, sampled was %u", c->token_ids[i],
                  c->position + i, s->output_at, token_at(r, s, c->position + i));
}

static uint32_t run_rows(struct fake_rank *r, const Tandem__V1__StepPlan *p)
{
    const struct fake_options *o = &r->group->o;
    uint32_t n = 0;
    size_t rows = p->n_decode_slots;
    for (size_t i = 0; i < p->n_decode_slots; i++) {
        struct slot *s = slot_of(r, p->decode_slots[i], true, "decode");
        if (!s)
            return n;
        if (s->suspended)
            broke(r, "decode: slot %u is suspended", p->decode_slots[i]);
        s->length++;
        r->tokens[n++] = sample(r, s);
    }
    for (size_t i = 0; i < p->n_prefills; i++) {
        const Tandem__V1__PrefillChunk *c = p->prefills[i];
        struct slot *s = slot_of(r, c->slot, true, "prefill");
        if (!s)
            return n;
        if (s->suspended)
            broke(r, "prefill: slot %u is suspended", c->slot);
        if (c->position != s->length || c->n_token_ids == 0)
            broke(r, "prefill: %zu tokens at %u, the slot has %u", c->n_token_ids, c->position, s->length);
        check_replay(r, s, c);
        rows += c->n_token_ids;
        s->length += (uint32_t)c->n_token_ids;
        if (s->length > o->max_context)
            broke(r, "prefill: slot of %u tokens, context %u", s->length, o->max_context);
        if (c->sample)
            r->tokens[n++] = sample(r, s);
    }
    if (rows > o->max_step_tokens)
        broke(r, "step of %zu rows, limit %u", rows, o->max_step_tokens);
    return n;
}

static uint64_t pages_of(const struct fake_rank *r, const struct slot *s)
{
    const struct fake_options *o = &r->group->o;
    return (s->length * o->token_bytes + o->page_bytes - 1) / o->page_bytes;
}

static void move_slots(struct fake_rank *r, const Tandem__V1__StepPlan *p)
{
    for (size_t i = 0; i < p->n_suspend_slots; i++) {
        struct slot *s = slot_of(r, p->suspend_slots[i], true, "suspension");
        if (!s)
            continue;
        if (s->suspended || s->length == 0)
            broke(r, "suspension: slot %u is suspended already, or empty", p->suspend_slots[i]);
        s->suspended = true;
        r->host_pages += pages_of(r, s);
        atomic_fetch_add(&r->suspensions, 1);
    }
    if (r->host_pages > r->group->o.suspend_pages)
        broke(r, "suspension: %llu pages of host memory, limit %llu", (unsigned long long)r->host_pages,
              (unsigned long long)r->group->o.suspend_pages);
    for (size_t i = 0; i < p->n_resume_slots; i++) {
        struct slot *s = slot_of(r, p->resume_slots[i], true, "resumption");
        if (!s)
            continue;
        if (!s->suspended)
            broke(r, "resumption: slot %u is not suspended", p->resume_slots[i]);
        s->suspended = false;
        r->host_pages -= pages_of(r, s);
    }
}

/* At least: those of slots that began as another are left out. */
static void check_pages(struct fake_rank *r)
{
    const struct fake_options *o = &r->group->o;
    uint64_t pages = 0;
    for (uint32_t i = 0; r->slots && i < o->max_slots; i++)
        pages += r->slots[i].used && !r->slots[i].suspended && !r->slots[i].shares ? pages_of(r, &r->slots[i]) : 0;
    if (pages > r->pages || pages > o->total_pages)
        broke(r, "%llu pages in use, limit %llu", (unsigned long long)pages, (unsigned long long)r->pages);
}

static void resize(struct fake_rank *r, uint64_t pages)
{
    const struct fake_options *o = &r->group->o;
    uint64_t most = o->most_pages ? o->most_pages : o->total_pages;
    if (pages > o->total_pages)
        broke(r, "kv_pages: %llu, it came with %llu", (unsigned long long)pages, (unsigned long long)o->total_pages);
    if (pages > r->pages && pages > most)
        pages = most > r->pages ? most : r->pages;
    r->pages = pages;
    check_pages(r);
}

static uint32_t run_plan(struct fake_rank *r, const Tandem__V1__StepPlan *p)
{
    if (p->step != atomic_load(&r->last_step) + 1)
        broke(r, "step %llu after %llu", (unsigned long long)p->step, (unsigned long long)atomic_load(&r->last_step));
    for (size_t i = 0; i < p->n_release_slots; i++) {
        struct slot *s = slot_of(r, p->release_slots[i], true, "release");
        if (s) {
            r->host_pages -= s->suspended ? pages_of(r, s) : 0;
            *s = (struct slot){0};
        }
    }
    move_slots(r, p);
    if (p->kv_pages)
        resize(r, p->kv_pages);
    for (size_t i = 0; i < p->n_admits; i++) {
        const Tandem__V1__AdmitSlot *a = p->admits[i];
        const struct slot *from = a->from_tokens ? slot_of(r, a->from_slot, true, "beginning as") : NULL;
        if (from && (from->suspended || from->length < a->from_tokens))
            broke(r, "admit: begins with %u tokens of slot %u, which has %u, or is suspended", a->from_tokens,
                  a->from_slot, from->length);
        struct slot *s = slot_of(r, a->slot, false, "admit");
        if (s)
            *s = (struct slot){.used = true,
                               .seed = a->sample ? a->sample->seed : 0,
                               .output_at = a->sample ? a->sample->output_at : UINT32_MAX,
                               .length = a->from_tokens,
                               .shares = a->from_tokens > 0};
    }
    uint32_t used = 0;
    for (uint32_t i = 0; r->slots && i < r->group->o.max_slots; i++)
        used += r->slots[i].used;
    atomic_store(&r->used, used);
    uint32_t n = run_rows(r, p);
    check_pages(r);
    atomic_store(&r->last_step, p->step);
    return n;
}

static bool kills(const struct fake_rank *r, const Tandem__V1__StepPlan *p)
{
    uint32_t chunk = r->rank == 0 ? r->group->o.dies_of_chunk : 0;
    for (size_t i = 0; chunk && i < p->n_prefills; i++)
        if (p->prefills[i]->n_token_ids == chunk)
            return true;
    return false;
}

static bool answer_plan(struct fake_rank *r, const Tandem__V1__StepPlan *p)
{
    uint32_t n = run_plan(r, p);
    if (kills(r, p)) {
        atomic_store(&r->mood, FAKE_DROP);
        return true;
    }
    if (r->group->o.step_us)
        usleep(r->group->o.step_us);
    while (atomic_load(&r->mood) == FAKE_HOLD && !atomic_load(&r->group->stop)) {
        send_heartbeat(r);
        usleep(2000);
    }
    int mood = atomic_load(&r->mood);
    if (mood == FAKE_SILENT)
        return true;
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    Tandem__V1__StepResult result = TANDEM__V1__STEP_RESULT__INIT;
    result.step = p->step + (mood == FAKE_WRONG_STEP);
    result.compute_us = 1 + r->group->o.step_us;
    if (r->rank == 0) {
        result.token_ids = r->tokens;
        result.n_token_ids = n;
        if (mood == FAKE_WRONG_COUNT)
            result.n_token_ids = n ? n - 1 : 1;
        if (mood == FAKE_WRONG_TOKEN && n)
            r->tokens[0] = r->group->o.vocab_size;
    }
    Tandem__V1__KvStats kv = TANDEM__V1__KV_STATS__INIT;
    kv.total_pages = r->pages;
    kv.map_calls = p->step;
    result.kv = &kv;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_RESULT;
    m.result = &result;
    return send_message(r, &m);
}

/* ---- the stream ---- */

static bool take_message(struct fake_rank *r, const void *data, size_t len)
{
    Tandem__V1__CoordinatorMessage *m =
        (Tandem__V1__CoordinatorMessage *)rpc_unpack(&tandem__v1__coordinator_message__descriptor, data, len);
    bool ok = true;
    if (!m) {
        broke(r, "not a CoordinatorMessage");
        return false;
    }
    switch (m->body_case) {
    case TANDEM__V1__COORDINATOR_MESSAGE__BODY_WELCOME:
        atomic_store(&r->epoch, m->epoch);
        r->heartbeat_ms = m->welcome->heartbeat_interval_ms;
        ok = send_loading(r) && (r->group->o.never_ready || send_ready(r));
        break;
    case TANDEM__V1__COORDINATOR_MESSAGE__BODY_PLAN:
        if (m->epoch != atomic_load(&r->epoch))
            broke(r, "plan of epoch %llu", (unsigned long long)m->epoch);
        ok = answer_plan(r, m->plan);
        break;
    case TANDEM__V1__COORDINATOR_MESSAGE__BODY_SHUTDOWN:
        r->shutdown = true;
        r->relaunch = m->shutdown->relaunch;
        break;
    default:
        broke(r, "message without a body");
    }
    protobuf_c_message_free_unpacked(&m->base, NULL);
    return ok;
}

static void take_shutdown(struct fake_rank *r, const void *data, size_t len)
{
    Tandem__V1__CoordinatorMessage *m =
        (Tandem__V1__CoordinatorMessage *)rpc_unpack(&tandem__v1__coordinator_message__descriptor, data, len);
    if (m && m->body_case == TANDEM__V1__COORDINATOR_MESSAGE__BODY_SHUTDOWN) {
        r->shutdown = true;
        r->relaunch = m->shutdown->relaunch;
    }
    if (m)
        protobuf_c_message_free_unpacked(&m->base, NULL);
}

static void *rank_main(void *arg)
{
    struct fake_rank *r = arg;
    bool ok = send_hello(r);
    while (ok && !atomic_load(&r->group->stop)) {
        int mood = atomic_load(&r->mood);
        if (mood == FAKE_SILENT) {
            usleep(5000);
            continue;
        }
        if (mood == FAKE_DROP || (mood == FAKE_FAULT && !send_fault(r)))
            break;
        if (mood == FAKE_FAULT)
            atomic_store(&r->mood, FAKE_WELL);
        send_heartbeat(r);
        for (int i = 0; i < 5 && mood == FAKE_GARBAGE; i++) {
            Tandem__V1__RankMessage none = TANDEM__V1__RANK_MESSAGE__INIT;
            send_message(r, &none); /* false once the stream has ended: recv says how */
        }
        const void *msg = NULL;
        size_t len = 0;
        bool late = false;
        enum status_code rc = rpc_stream_recv(atomic_load(&r->stream), &msg, &len, 20, &late, &r->end);
        if (late) {
            r->end = (struct status)STATUS_INIT;
            continue;
        }
        if (rc != ST_OK || !msg)
            return NULL; /* r->end says how */
        ok = take_message(r, msg, len);
    }
    if (atomic_load(&r->mood) == FAKE_DROP)
        rpc_stream_cancel(atomic_load(&r->stream));
    const void *msg = NULL;
    size_t len = 0;
    /* to its end, for the status; a result that met the end of the stream comes before its Shutdown is read */
    while (rpc_stream_recv(atomic_load(&r->stream), &msg, &len, 5000, NULL, &r->end) == ST_OK && msg)
        take_shutdown(r, msg, len);
    return NULL;
}

struct fake_group *fake_group_start(const char *address, const struct fake_options *o)
{
    struct fake_group *g = calloc(1, sizeof *g);
    if (!g)
        abort();
    g->o = *o;
    for (uint32_t i = 0; i < o->size && i < FAKE_MAX_RANKS; i++) {
        struct fake_rank *r = &g->rank[i];
        struct status st = STATUS_INIT;
        struct rpc_stream *stream = NULL;
        if (o->partial && i == o->size - 1)
            continue;
        r->group = g;
        r->rank = i;
        r->slots = calloc(o->max_slots, sizeof *r->slots);
        r->tokens = calloc(o->max_slots + o->max_step_tokens + 1, sizeof *r->tokens);
        if (!r->slots || !r->tokens || rpc_channel_create(&r->channel, address, &st) != ST_OK ||
            rpc_stream_open(&stream, r->channel, "/tandem.v1.WorkerControl/Attach", 0, &st) != ST_OK) {
            fprintf(stderr, "fake rank %u: %s\n", i, st.message);
            abort();
        }
        atomic_store(&r->stream, stream);
        if (pthread_create(&r->thread, NULL, rank_main, r) != 0)
            abort();
        r->started = true;
    }
    return g;
}

void fake_group_mood(struct fake_group *g, uint32_t rank, enum fake_mood mood)
{
    atomic_store(&g->rank[rank].mood, mood);
}

static void join(struct fake_rank *r)
{
    if (r->started && !r->joined)
        pthread_join(r->thread, NULL);
    r->joined = true;
}

enum status_code fake_rank_end(struct fake_group *g, uint32_t rank, struct status *st, bool *shutdown, bool *relaunch)
{
    struct fake_rank *r = &g->rank[rank];
    join(r);
    *st = r->end;
    if (shutdown)
        *shutdown = r->shutdown;
    if (relaunch)
        *relaunch = r->relaunch;
    return r->end.code;
}

bool fake_group_stop(struct fake_group *g)
{
    bool ok = true;
    atomic_store(&g->stop, true);
    for (uint32_t i = 0; i < g->o.size; i++) {
        struct fake_rank *r = &g->rank[i];
        if (!r->started)
            continue;
        rpc_stream_cancel(atomic_load(&r->stream));
        join(r);
        rpc_stream_close(atomic_load(&r->stream));
        rpc_channel_destroy(r->channel);
        free(r->slots);
        free(r->tokens);
        if (r->broken.code != ST_OK) {
            fprintf(stderr, "fake rank %u: a plan broke a rule: %s\n", i, r->broken.message);
            ok = false;
        }
    }
    free(g);
    return ok;
}

uint64_t fake_group_steps(const struct fake_group *g)
{
    return atomic_load(&g->rank[0].last_step);
}

uint64_t fake_group_epoch(const struct fake_group *g)
{
    return atomic_load(&g->rank[0].epoch);
}

uint32_t fake_group_used_slots(struct fake_group *g)
{
    return atomic_load(&g->rank[0].used);
}

uint64_t fake_group_suspensions(struct fake_group *g)
{
    return atomic_load(&g->rank[0].suspensions);
}
