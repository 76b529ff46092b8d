/* memory_host_limit.c - how much memory this process can still get: /proc/meminfo and the control groups above it. */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "memory/memory_internal.h"

#define TEXT_MAX 8192

/* Whole small file with a NUL at the end; false when there is none. */
static bool slurp(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    size_t n = 0;
    ssize_t got;
    while (n < size - 1 && (got = read(fd, text + n, size - 1 - n)) > 0)
        n += (size_t)got;
    close(fd);
    text[n] = '\0';
    return n > 0;
}

/* The number after `key` at the start of a line; false when it is not there. */
static bool field(const char *text, const char *key, uint64_t *value)
{
    size_t len = strlen(key);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, key, len) == 0)
            return sscanf(line + len, "%" SCNu64, value) == 1;
    }
    return false;
}

struct group_files {
    const char *root;
    const char *max;
    const char *usage;
    const char *cache; /* key in memory.stat: page cache that the kernel gives back when asked */
};

static const struct group_files group_v2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "};
static const struct group_files group_v1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                            "total_inactive_file "};

static bool group_number(const struct group_files *g, const char *group, const char *file, const char *key,
                         uint64_t *value)
{
    char path[512], text[TEXT_MAX];
    int n = snprintf(path, sizeof path, "%s%s/%s", g->root, group, file);
    return n < (int)sizeof path && slurp(path, text, sizeof text) && field(text, key, value);
}

/* Goes from the process's own group up to the root: each level may have a limit. In a container the own path may not be
 * visible; then only the root of what is mounted counts, which is the container's group. */
static void bound_by_groups(const struct group_files *g, char *group, uint64_t *avail, char *why, size_t why_size)
{
    for (;;) {
        uint64_t max, usage, cache = 0;
        if (group_number(g, group, g->max, "", &max) && group_number(g, group, g->usage, "", &usage)) {
            group_number(g, group, "memory.stat", g->cache, &cache);
            usage -= cache < usage ? cache : usage;
            uint64_t left = max > usage ? max - usage : 0;
            if (left < *avail) {
                *avail = left;
                snprintf(why, why_size, "%s of control group %s/", g->max, group);
            }
        }
        char *slash = strrchr(group, '/');
        if (!slash)
            return;
        *slash = '\0';
    }
}

/* /proc/self/cgroup has lines "hierarchy:controllers:path"; v2 has hierarchy 0 and no controllers. */
static void bound_by_cgroup_file(char *text, uint64_t *avail, char *why, size_t why_size)
{
    char *rest = text;
    for (char *line; (line = strsep(&rest, "\n"));) {
        char *controllers = strchr(line, ':');
        char *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path)
            continue;
        *controllers++ = '\0';
        *path++ = '\0';
        if (strcmp(path, "/") == 0)
            *path = '\0';
        if (strcmp(line, "0") == 0 && !*controllers)
            bound_by_groups(&group_v2, path, avail, why, why_size);
        else if (strstr(controllers, "memory"))
            bound_by_groups(&group_v1, path, avail, why, why_size);
    }
}

uint64_t kv_host_available(char *why, size_t why_size)
{
    char text[TEXT_MAX];
    uint64_t avail = UINT64_MAX, kib;
    snprintf(why, why_size, "nothing");
    if (slurp("/proc/meminfo", text, sizeof text) && field(text, "MemAvailable:", &kib)) {
        avail = kib << 10;
        snprintf(why, why_size, "MemAvailable");
    }
    if (slurp("/proc/self/cgroup", text, sizeof text))
        bound_by_cgroup_file(text, &avail, why, why_size);
    return avail;
}
