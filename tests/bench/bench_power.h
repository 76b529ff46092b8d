/* bench_power.h - what a GPU draws while a benchmark repeats one thing: energy, clock, limit. Prefix power_.
 *
 * NVML comes with the driver and is opened at run time; its header is not needed. The driver's energy counter moves every 20 to
 * 100 ms: repeat for a second and more.
 */
#ifndef TANDEM_BENCH_POWER_H
#define TANDEM_BENCH_POWER_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

struct power_meter {
    void *device;
    int (*energy)(void *device, unsigned long long *mj);
    int (*clock)(void *device, int which, unsigned *mhz);
    double limit_w;
};

static inline bool power_symbol(void *library, const char *name, void *out)
{
    void *at = dlsym(library, name);
    memcpy(out, &at, sizeof at);
    return at != NULL;
}

/* bus_id: of cudaDeviceGetPCIBusId. False: no NVML, or one without a counter. */
static inline bool power_open(struct power_meter *m, const char *bus_id)
{
    int (*init)(void);
    int (*find)(const char *bus_id, void **device);
    int (*limit)(void *device, unsigned *mw);
    unsigned long long mj;
    unsigned mw = 0;
    void *lib = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!lib || !power_symbol(lib, "nvmlInit_v2", &init) ||
        !power_symbol(lib, "nvmlDeviceGetHandleByPciBusId_v2", &find) ||
        !power_symbol(lib, "nvmlDeviceGetEnforcedPowerLimit", &limit) ||
        !power_symbol(lib, "nvmlDeviceGetTotalEnergyConsumption", &m->energy) ||
        !power_symbol(lib, "nvmlDeviceGetClockInfo", &m->clock) || init() != 0 || find(bus_id, &m->device) != 0 ||
        m->energy(m->device, &mj) != 0)
        return false;
    m->limit_w = limit(m->device, &mw) == 0 ? mw * 1e-3 : 0;
    return true;
}

/* Since the first start. */
static inline double power_joules(const struct power_meter *m)
{
    unsigned long long mj = 0;
    return m->energy(m->device, &mj) == 0 ? (double)mj * 1e-3 : 0;
}

static inline unsigned power_sm_mhz(const struct power_meter *m)
{
    const int sm = 1;
    unsigned mhz = 0;
    return m->clock(m->device, sm, &mhz) == 0 ? mhz : 0;
}

#endif
