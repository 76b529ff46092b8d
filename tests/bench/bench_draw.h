/* bench_draw.h - what a CUDA benchmark repeats, by time and by energy; and random numbers that draw as much power as a model's.
 * Prefix draw_.
 */
#ifndef TANDEM_BENCH_DRAW_H
#define TANDEM_BENCH_DRAW_H

#include "bench_cuda.h"
#include "bench_power.h"

/* About normal, deviation 1: zeros and uniform bits draw less power than what models compute with. */
static __global__ void draw_fill(uint16_t *at, uint64_t n)
{
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x) {
        uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ x >> 27) * 0x94D049BB133111EBull;
        x ^= x >> 31;
        float sum = (float)(x & 0xffff) + (float)(x >> 16 & 0xffff) + (float)(x >> 32 & 0xffff) + (float)(x >> 48);
        float y = (sum / 65536 - 2) * 1.732f;
        at[i] = (uint16_t)(__float_as_uint(y) >> 16);
    }
}

/* --power */
struct draw_power {
    uint32_t ms; /* 0: not asked for */
    power_meter meter;
};

static __global__ void draw_spin(uint64_t clocks)
{
    for (uint64_t t = clock64(); clock64() - t < clocks;)
        ;
}

/* Launches for so long, two under way, or each when the one before has ended; *mhz: mean of what the SMs' clock was. Returns how many. */
template <typename F>
static inline uint32_t draw_for(const draw_power *p, cudaStream_t stream, uint32_t ms, bool pauses, F launch,
                                double *mhz)
{
    cudaEvent_t done[2];
    uint32_t n = 0, looks = 0;
    double sum = 0, from = now_us(), look = from;
    for (cudaEvent_t &e : done)
        CUDA_MUST(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    for (double t = from; t - from < ms * 1e3; t = now_us()) {
        if (n >= 2)
            CUDA_MUST(cudaEventSynchronize(done[n % 2]));
        launch();
        CUDA_MUST(cudaEventRecord(done[n++ % 2], stream));
        if (t - look > 2e4) {
            look = t;
            sum += power_sm_mhz(&p->meter);
            looks++;
        }
        if (pauses)
            CUDA_MUST(cudaStreamSynchronize(stream));
    }
    CUDA_MUST(cudaStreamSynchronize(stream));
    for (cudaEvent_t e : done)
        CUDA_MUST(cudaEventDestroy(e));
    *mhz = looks ? sum / looks : 0;
    return n;
}

struct draw_result {
    double us, watts, mhz, mj; /* us, mj: of a launch */
};

/* After 300 ms of it, in which power and clock settle. With pauses us has them in it. */
template <typename F>
static inline draw_result draw_of(const draw_power *p, cudaStream_t stream, F launch, bool pauses = false)
{
    draw_result d;
    draw_for(p, stream, 300, pauses, launch, &d.mhz);
    double t = now_us(), j = power_joules(&p->meter);
    uint32_t n = draw_for(p, stream, p->ms, pauses, launch, &d.mhz);
    t = now_us() - t;
    j = power_joules(&p->meter) - j;
    d.us = t / n;
    d.mj = j * 1e3 / n;
    d.watts = j * 1e6 / t;
    return d;
}

/* Opens the meter, and says what the chip draws with one thread; ends the program where there is none. */
static inline void draw_start(draw_power *p)
{
    char bus_id[32];
    cudaStream_t stream;
    CUDA_MUST(cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, 0));
    if (!power_open(&p->meter, bus_id)) {
        fprintf(stderr, "--power: NVML has no energy counter for %s\n", bus_id);
        exit(1);
    }
    CUDA_MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    draw_result d = draw_of(p, stream, [&] { draw_spin<<<1, 1, 0, stream>>>(2000000); });
    CUDA_MUST(cudaStreamDestroy(stream));
    printf("limit %.0f W; one thread alone: %.0f W at %.0f MHz\n", p->meter.limit_w, d.watts, d.mhz);
}

#endif
