/* attention_cuda_run.cuh - the kernels of the portable CUDA back end, for one padded head dimension and dtype: one for both
 * roles and for prefill, one for decode alone.
 *
 * Grid: BLOCKS_PER_SM per SM; every block stays and takes items until there are none. Of the blocks of an SM one begins
 * with prefill, the next with decode, so that an SM computes and reads at the same time; when the list of its
 * role is empty a block turns to the other (POD-Attention, with items instead of blocks).
 *
 * The kernel for decode alone fills its first rings before the launch in front of it has ended (attention_launch.cuh): keys
 * of earlier steps, which stand before the sequence's last `rows`, were written before the plan. What the launch in front
 * may still write, those last rows, q and what others count, it touches after.
 *
 *   prefill item: the block computes unit_rows packed rows, MTILES tiles of 16 per warp; K and V tiles of TILE keys are
 *   shared; one buffer each: K of the next tile comes in under softmax and PV, V under QK. The other block of the SM fills
 *   the gaps.
 *
 *       shared:  Q [unit_rows][DP] | K [TILE][DP] | V [TILE][DP]
 *
 *   decode item: up to 16 packed rows; each warp takes every fourth group of 16 keys, with a ring of its own that only it
 *   waits for (virtual blocks of one warp); at the end the four are added up.
 *
 *       shared:  Q [16][DP] | warp 0: K [16][DP] V [16][DP] .. (SLOTS of them) | warp 1 ..    then: sums [4][16][DP + 8]
 *
 * Rows in shared memory are swizzled: chunk c (16 bytes) of row r stands at c ^ (r % 8), so that the 8 rows of an ldmatrix
 * lie in different banks.
 */
#ifndef TANDEM_ATTENTION_CUDA_RUN_CUH
#define TANDEM_ATTENTION_CUDA_RUN_CUH

#include "attention/attention_cuda_roles.cuh"
#include "attention/attention_launch.cuh"

/* Thread 0: the item behind a place in the list of `role`, or of the other role when that is at its end. */
__device__ __forceinline__ void resolve(const cuda_run_args &a, uint32_t &role, uint32_t place, bool read,
                                        run_shared &sh)
{
    for (uint32_t tries = 0; tries < ROLES; tries++) {
        if ((a.roles >> role & 1) && place < (role == ROLE_PREFILL ? sh.counts.x : sh.counts.y)) {
            if (!read)
                attn_item_copy(&sh.item, &a.ws.items[role][place]);
            sh.role = role;
            return;
        }
        role ^= 1;
        read = false;
        if (tries == 0 && (a.roles >> role & 1))
            place = a.taken[role] + atomicAdd(&a.counters->next[role], 1);
    }
    sh.role = ROLES;
}

/* Thread 0 of a block that leaves: the last one leaves the counters as they were. No fence: what this block added to them
 * has been answered. */
__device__ __forceinline__ void leave(const cuda_run_args &a)
{
    if (atomicAdd(&a.counters->left, 1) + 1 < gridDim.x)
        return;
    for (uint32_t r = 0; r < ROLES; r++)
        a.counters->next[r] = 0;
    a.counters->left = 0;
}

/* DECODE: of decode's list alone. */
template <typename C, bool DECODE>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) run_kernel(const __grid_constant__ cuda_run_args a)
{
    extern __shared__ __align__(128) char bytes[];
    __shared__ run_shared sh;
    uint32_t role = 0, place = 0; /* of thread 0 */
    bool first = true;            /* no item taken yet */
    bool read = false;            /* the item of that place is in sh */
    bool one_each = false;        /* no block has a second item: nothing is counted */
    bool waits = !a.follows;      /* the launch in front may not have ended */
    if (threadIdx.x == 0) {
        /* The blocks of an SM come in rounds over all SMs: those of every other round begin with the other role. */
        uint32_t round = blockIdx.x / a.sms;
        role = a.roles == BOTH_ROLES ? round % ROLES : a.roles >> ROLE_DECODE;
        place = a.roles == BOTH_ROLES ? round / ROLES * a.sms + blockIdx.x % a.sms : blockIdx.x;
        if (a.follows)
            place = atomicAdd(&a.counters->next[role], 1);
        read = place < a.ws.max_items[role];
        if (read) /* on its way with the counts */
            attn_item_copy(&sh.item, &a.ws.items[role][place]);
        const attn_lists lists = attn_lists_of(a.ws.lists);
        sh.counts = make_uint2(lists.count[ROLE_PREFILL], lists.count[ROLE_DECODE]);
        one_each = !a.follows && a.roles != BOTH_ROLES && lists.count[role] <= a.taken[role];
    }
    const bool late = a.follows || a.roles == BOTH_ROLES;
    const auto claim = [&] { /* thread 0: the next item; known when this one is done */
                             place = one_each ? UINT32_MAX : a.taken[role] + atomicAdd(&a.counters->next[role], 1);
    };
    const auto settle = [&] {
        attn_wait_earlier();
        attn_let_next();
        waits = false;
        if (threadIdx.x == 0)
            claim();
    };
    if (!DECODE && waits) {
        attn_wait_earlier();
        waits = false;
    }
    if (!waits)
        attn_let_next();
    for (;;) {
        if (threadIdx.x == 0) {
            /* Not ahead where blocks come to a list one after the other, behind a launch with prefill or from the other role: who had
             * claimed the next item would let all others wait. */
            if (late && !first)
                claim();
            resolve(a, role, place, read, sh);
            first = read = false;
            if (sh.role != ROLES && !waits && !late)
                claim();
        }
        __syncthreads();
        const uint32_t now = sh.role;
        if (now == ROLES)
            break;
        if (waits && !sh.item.parts)
            settle();
        if (sh.item.parts) {
            const attn_seq &in = sh.item.s;
            uint64_t head = sh.item.kv_head * a.head_stride + a.kv_offset;
            run_seq s;
            s.k = (const char *)in.k + head;
            s.v = (const char *)in.v + head;
            s.first_row = in.first_row;
            s.rows = in.rows;
            s.kv_len = in.kv_len;
            s.packed = in.rows * a.group;
            if (!DECODE && now == ROLE_PREFILL)
                prefill<C>(a, s, sh, bytes);
            else
                decode<C>(a, s, sh, bytes, waits, settle);
        }
        __syncthreads(); /* the item and shared memory are free */
    }
    if (a.follows || waits)
        attn_wait_earlier(); /* the counters are in use until then */
    if (threadIdx.x == 0 && !one_each)
        leave(a);
}

template <typename C> constexpr cuda_kernel kernel_of()
{
    return cuda_kernel{run_kernel<C, false>, run_kernel<C, true>, C::DP, C::UNIT_ROWS, C::SHARED_BYTES, C::ALONE_BYTES};
}

#endif
