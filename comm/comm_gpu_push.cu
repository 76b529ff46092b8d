/* comm_gpu_push.cu - sum over ranks of few rows + residual + norm, for messages that are bound by latency: every rank writes
 * its part into the inbox of each peer and waits in its own memory, so the wire is crossed once (a handshake and a read of
 * the peer's memory cross it three times).
 *
 *   grid     one block per row
 *   thread   quads i, i + threads ... of the row, of every rank: it sends its own, waits for them all, adds them in rank order
 *   line     16 bytes: { 2 bf16, turn } { 2 bf16, turn }, one quad
 *   inbox    [turn % 2][rank it came from][row][quad] lines
 *
 * A line needs no fence and no flag apart: data and turn are one word of 64 bits, and such a word is written and read as a
 * whole (PTX: a vector access is one access for each of its elements, in any order; only the elements are 8 bytes here).
 * Packets of 128 bytes with one flag would carry nearly twice as much, but hang on an order of bytes on the wire that nobody
 * promises; larger sums have their own kernel.
 *
 * turn[row] counts the sums that were pushed for this row. All ranks launch the same ones in the same order, so row r has the
 * same turn everywhere. Why two halves are enough however fast a peer is: thread t of rank A sends turn n only after its turn
 * n - 1 has ended, for which it had to receive the line that thread t of rank B (same row, same quad) sent in turn n - 1;
 * and B sent that after all of its turn n - 2. So what A overwrites in B's inbox, the line of turn n - 2, has been read. This
 * holds for each thread and each pair of ranks by itself; what other kernels come in between does not matter.
 *
 * Lines of other turns are never taken for this one: a half has held turns n - 2, n - 4, ... of this row before, and zeros
 * before the first (turn 1); so turns may wrap. A rank that has given up runs through the rest of its sums without waiting, and
 * sends nothing: its peers wait for their own bound, and do not take what are no sums any more.
 *
 * A sum that reads peers' memory may follow one that does not, and the other way round: the rule of three parts (comm.h)
 * asks that a rank has seen all peers begin a later sum, and a line of any row shows that as well as a handshake does.
 */
#include "comm/comm_gpu_device.cuh"

namespace
{
__device__ uint2 bits_of(bf16x4 v)
{
    return *(const uint2 *)&v;
}

__device__ void store_line(ulonglong2 *p, bf16x4 v, uint32_t turn)
{
    const uint64_t high = (uint64_t)turn << 32;
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(p), "l"(high | bits_of(v).x),
                 "l"(high | bits_of(v).y)
                 : "memory");
}

__device__ ulonglong2 load_line(const ulonglong2 *p)
{
    ulonglong2 v;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
    return v;
}

__device__ bool is_of(ulonglong2 line, uint32_t turn)
{
    return (uint32_t)(line.x >> 32) == turn && (uint32_t)(line.y >> 32) == turn;
}

__device__ float4 value_of(ulonglong2 line)
{
    const uint2 bits = make_uint2((uint32_t)line.x, (uint32_t)line.y);
    return to_float(*(const bf16x4 *)&bits);
}

/* A row's lines in the inboxes, of one turn. */
struct place {
    uint64_t at, stride; /* in lines: of quad 0 from rank 0; from one sender to the next */
    uint32_t turn;
};

__device__ place place_of(const comm_gpu_push_job &j, uint32_t row, uint32_t quads, uint32_t turn)
{
    const uint64_t stride = (uint64_t)j.inbox_rows * quads;
    return {(turn & 1) * j.ranks * stride + (uint64_t)row * quads, stride, turn};
}

template <uint32_t RANKS> __device__ void send(const comm_gpu_push_job &j, const place &p, uint32_t i, bf16x4 v)
{
#pragma unroll
    for (uint32_t r = 0; r < RANKS; r++)
        if (r < j.ranks && r != j.rank)
            store_line((ulonglong2 *)j.inbox[r] + p.at + j.rank * p.stride + i, v, p.turn);
}

/* v[n] += the sum of all ranks' quads i + n * blockDim.x, N of them, where they are below end. A warp waits as a whole, so
 * that one lane can look at the clock for all. */
template <uint32_t RANKS, uint32_t N>
__device__ void receive(float4 *v, const comm_gpu_push_job &j, const place &p, uint32_t i, uint32_t end,
                        const bf16x4 *own)
{
    const ulonglong2 *inbox = (const ulonglong2 *)j.inbox[j.rank] + p.at + i;
    const uint32_t peers = ((1u << j.ranks) - 1) & ~(1u << j.rank);
    ulonglong2 line[N][RANKS] = {};
    uint32_t missing[N]; /* bit r: the line of rank r */
    patience patience = {};
#pragma unroll
    for (uint32_t n = 0; n < N; n++)
        missing[n] = i + n * blockDim.x < end ? peers : 0;
    for (uint32_t polls = 1;; polls++) {
        uint32_t all = 0;
#pragma unroll
        for (uint32_t n = 0; n < N; n++)
#pragma unroll
            for (uint32_t r = 0; r < RANKS; r++)
                if (missing[n] >> r & 1)
                    line[n][r] = load_line(inbox + n * blockDim.x + r * p.stride);
#pragma unroll
        for (uint32_t n = 0; n < N; n++) {
#pragma unroll
            for (uint32_t r = 0; r < RANKS; r++)
                if (is_of(line[n][r], p.turn))
                    missing[n] &= ~(1u << r);
            all |= missing[n];
        }
        if (!__any_sync(~0u, all))
            break;
        if (polls % POLLS)
            continue;
        all = __reduce_or_sync(~0u, all);
        bool over = threadIdx.x % WARP == 0 && out_of_patience(j.limit, patience, __ffs(all) - 1);
        if (__any_sync(~0u, over))
            break;
    }
#pragma unroll
    for (uint32_t n = 0; n < N; n++) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (uint32_t r = 0; r < RANKS; r++)
            if (r < j.ranks)
                sum = plus(sum, r == j.rank ? to_float(own[n]) : value_of(line[n][r]));
        v[n] = plus(v[n], sum);
    }
}

/* QUADS: of a thread, at most. */
template <uint32_t RANKS, uint32_t QUADS>
__global__ void __launch_bounds__(THREADS_MAX) push_kernel(const __grid_constant__ comm_gpu_push_job j)
{
    constexpr uint32_t AT_ONCE = RANKS == 2 ? QUADS : 1; /* to wait for; all of 8 ranks do not fit in the registers */
    const uint32_t quads = j.rows.hidden / 4, row = blockIdx.x, threads = blockDim.x;
    const uint64_t begin = (uint64_t)row * quads;
    const float4 *weights = (const float4 *)j.rows.weight, *biases = (const float4 *)j.rows.bias;
    float4 weight[QUADS], bias[QUADS], v[QUADS] = {};
    bf16x4 own[QUADS];
    let_next_begin();
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
        const uint32_t i = threadIdx.x + q * threads;
        weight[q] = weights && i < quads ? weights[i] : make_float4(0, 0, 0, 0);
        bias[q] = biases && i < quads ? biases[i] : make_float4(0, 0, 0, 0);
    }
    wait_for_previous();
    const uint32_t turn = load_flag(j.turn + row) + 1;
    const bool silent = load_flag(j.limit.broken); /* what follows a wait that was given up is no sum */
    const place p = place_of(j, row, quads, turn);
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
        const uint32_t i = threadIdx.x + q * threads;
        if (i < quads)
            own[q] = load_part((const bf16x4 *)j.part + begin + i);
        if (i < quads && !j.rows.set)
            v[q] = ((const float4 *)j.rows.x)[begin + i];
    }
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++)
        if (threadIdx.x + q * threads < quads && !silent)
            send<RANKS>(j, p, threadIdx.x + q * threads, own[q]);
    float squares = 0;
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
        const uint32_t i = threadIdx.x + q * threads;
        if (q % AT_ONCE == 0)
            receive<RANKS, AT_ONCE>(v + q, j, p, i, quads, own + q);
        if (biases)
            v[q] = plus(v[q], bias[q]);
        if (i < quads) {
            ((float4 *)j.rows.x)[begin + i] = v[q];
            squares += squares_of(v[q]);
        }
    }
    if (weights) {
        const float factor = rsqrtf(block_sum(squares) / (float)j.rows.hidden + j.rows.eps);
#pragma unroll
        for (uint32_t q = 0; q < QUADS; q++)
            if (threadIdx.x + q * threads < quads)
                ((bf16x4 *)j.rows.h)[begin + threadIdx.x + q * threads] = scaled(v[q], factor, weight[q]);
    } else {
        __syncthreads(); /* as in block_sum: all have read turn */
    }
    if (threadIdx.x == 0)
        j.turn[row] = turn;
}

/* As many threads as where parts are read, each with the same quads: the sum of squares has the same bits there. */
template <uint32_t QUADS> cudaError_t launch_quads(cudaStream_t stream, const struct comm_gpu_push_job *job)
{
    return launch(job->ranks == 2 ? push_kernel<2, QUADS> : push_kernel<COMM_GPU_PEERS, QUADS>, job->rows.rows,
                  threads_for(job->rows.hidden), stream, *job);
}

template <uint32_t QUADS> cudaError_t load_quads()
{
    cudaError_t err = load(push_kernel<2, QUADS>);
    return err == cudaSuccess ? load(push_kernel<COMM_GPU_PEERS, QUADS>) : err;
}
} // namespace

cudaError_t comm_gpu_load_push(void)
{
    cudaError_t err = load_quads<1>();
    if (err == cudaSuccess)
        err = load_quads<2>();
    return err == cudaSuccess ? load_quads<4>() : err;
}

cudaError_t comm_gpu_launch_push(cudaStream_t stream, const struct comm_gpu_push_job *job)
{
    const uint32_t quads = job->rows.hidden / 4;
    if (quads <= THREADS_MAX)
        return launch_quads<1>(stream, job);
    if (quads <= 2 * THREADS_MAX)
        return launch_quads<2>(stream, job);
    static_assert(COMM_GPU_PUSH_HIDDEN == 16 * THREADS_MAX, "what four quads a thread make");
    return launch_quads<4>(stream, job);
}
