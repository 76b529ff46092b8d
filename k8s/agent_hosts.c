/* agent_hosts.c - the hosts of a group as lines for mpirun.
 *
 *     LeaderWorkerSet   LWS_LEADER_ADDRESS g-0.g.ns        g-0.g.ns g-0-1.g.ns g-0-2.g.ns
 *     StatefulSet       --set NAME.SERVICE                 NAME-0.SERVICE NAME-1.SERVICE
 *     MPIJob            --from the operator's hostfile     its names, in its order
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "k8s/agent.h"

/* As the API server takes them, so that no name can be an option or a second line. */
static enum status_code check_name(const char *what, const char *name, size_t len, struct status *st)
{
    bool ok = len > 0 && len < 254 && isalnum((unsigned char)name[0]);
    for (size_t i = 0; i < len && ok; i++)
        ok = isalnum((unsigned char)name[i]) || name[i] == '-' || name[i] == '.';
    if (ok)
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "%s: \"%.*s\", expected a host name", what, (int)(len > 100 ? 100 : len),
                      name);
}

static enum status_code parse_size(const struct agent_hosts_config *cfg, uint32_t *out, struct status *st)
{
    char *end = NULL;
    unsigned long n = cfg->size;
    if (n == 0 && !cfg->group_size)
        return status_set(st, ST_INVALID_ARGUMENT, "hosts: expected --size or LWS_GROUP_SIZE");
    if (n == 0) {
        n = strtoul(cfg->group_size, &end, 10);
        if (!isdigit((unsigned char)cfg->group_size[0]) || *end)
            n = 0;
    }
    if (n == 0 || n > AGENT_HOSTS_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "hosts: a group of \"%.20s\", expected 1 to %d",
                          cfg->size || !cfg->group_size ? "" : cfg->group_size, AGENT_HOSTS_MAX);
    *out = (uint32_t)n;
    return ST_OK;
}

/* NAME, its index, the rest: index 0 of a LeaderWorkerSet is the leader itself. */
static enum status_code write_numbered(const struct agent_hosts_config *cfg, FILE *to, struct status *st)
{
    const char *base = cfg->set ? cfg->set : cfg->leader;
    uint32_t n = 0;
    if (!base)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "hosts: expected --set NAME.SERVICE, --from FILE or LWS_LEADER_ADDRESS");
    enum status_code rc = check_name(cfg->set ? "--set" : "LWS_LEADER_ADDRESS", base, strlen(base), st);
    if (rc == ST_OK)
        rc = parse_size(cfg, &n, st);
    int dot = (int)strcspn(base, ".");
    for (uint32_t i = 0; rc == ST_OK && i < n; i++)
        if (i == 0 && !cfg->set)
            fprintf(to, "%s slots=%u\n", base, cfg->slots);
        else
            fprintf(to, "%.*s-%u%s slots=%u\n", dot, base, i, base + dot, cfg->slots);
    return rc;
}

static enum status_code copy_hostfile(const struct agent_hosts_config *cfg, FILE *to, struct status *st)
{
    char line[512];
    FILE *from = fopen(cfg->from, "re");
    if (!from)
        return status_set(st, ST_NOT_FOUND, "--from %.300s: cannot be read", cfg->from);
    enum status_code rc = ST_OK;
    unsigned n = 0;
    while (rc == ST_OK && fgets(line, sizeof line, from)) {
        char *name = line + strspn(line, " \t");
        size_t len = strcspn(name, " \t\r\n:");
        if (len == 0 || name[0] == '#')
            continue;
        rc = ++n > AGENT_HOSTS_MAX
                 ? status_set(st, ST_INVALID_ARGUMENT, "--from %.300s: more than %d hosts", cfg->from, AGENT_HOSTS_MAX)
                 : check_name(cfg->from, name, len, st);
        if (rc == ST_OK)
            fprintf(to, "%.*s slots=%u\n", (int)len, name, cfg->slots);
    }
    fclose(from);
    if (rc == ST_OK && n == 0)
        rc = status_set(st, ST_INVALID_ARGUMENT, "--from %.300s: no host in it", cfg->from);
    return rc;
}

enum status_code agent_hosts(const struct agent_hosts_config *cfg, char **text, struct status *st)
{
    char *lines = NULL;
    size_t bytes = 0;
    FILE *to = open_memstream(&lines, &bytes);
    if (!to)
        return status_nomem(st, "hosts", 0);
    enum status_code rc = cfg->from ? copy_hostfile(cfg, to, st) : write_numbered(cfg, to, st);
    if (fclose(to) && rc == ST_OK)
        rc = status_nomem(st, "hosts", bytes);
    if (rc == ST_OK)
        *text = lines;
    else
        free(lines);
    return rc;
}
