/* agent_policy.c - what may be started, and with what.
 *
 * The list of settings is one of names, since some settings of Open MPI name programs (plm_rsh_agent, orte_launch_agent,
 * orte_fork_agent), libraries (mca_base_component_path) or files (mca_base_param_files) to take. What is not on it is
 * refused by name, so that whoever needs one more sees which. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "k8s/agent.h"

/* Of mpirun to its daemons (plm_rsh), and what users tune: interfaces, ports, shared memory, verbosity. '*': any end. */
static const char *const settings[] = {
    "ess",
    "ess_base_jobid",
    "ess_base_vpid",
    "ess_base_num_procs",
    "ess_base_nspace",
    "orte_node_regex",
    "orte_hnp_uri",
    "orte_parent_uri",
    "orte_keep_fqdn_hostnames",
    "orte_tmpdir_base",
    "orte_abort_on_non_zero_status",
    "orte_hostname_cutoff",
    "orte_connect_timeout",
    "orte_default_hostfile",
    "orte_set_default_slots",
    "orte_report_bindings",
    "orte_startup_timeout",
    "prte_node_regex",
    "prte_hnp_uri",
    "prte_parent_uri",
    "prte_keep_fqdn_hostnames",
    "prte_default_hostfile",
    "plm",
    "plm_base_verbose",
    "plm_rsh_no_tree_spawn",
    "plm_rsh_num_concurrent",
    "routed",
    "pmix",
    "oob",
    "oob_tcp_*",
    "oob_base_verbose",
    "rmaps_base_*",
    "hwloc_base_binding_policy",
    "btl",
    "btl_tcp_*",
    "btl_vader_*",
    "btl_base_verbose",
    "pml",
    "pml_ob1_*",
    "pml_ucx_*",
    "pml_base_verbose",
    "mtl",
    "osc",
    "coll",
    "coll_tuned_*",
    "mpi_yield_when_idle",
    "mpi_preconnect_mpi",
    "mpi_warn_on_fork",
    "psec",
    "ptl",
};

/* Values that are programs, but must be given: each daemon starts others in turn (the launch is a tree). */
static const char *const agents[] = {"tandem-agent run"};

/* What mpi-operator sets for ssh and every daemon is told; `run` takes no notice of it. */
static const char *const agent_arguments[] = {"-o ConnectionAttempts=10"};

static const char *const switches[] = {"--tree-spawn", "-tree-spawn", "--debug-daemons"};

static const char *const environment[] = {
    "NCCL_*", "UCX_*", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TANDEM_LOG_*", "TZ", "LANG", "CUDA_VISIBLE_DEVICES"};

#define COUNT(a) (sizeof(a) / sizeof *(a))

static bool matches(const char *name, size_t len, const char *const *list, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        size_t m = strlen(list[i]);
        bool open = m > 0 && list[i][m - 1] == '*';
        if (open ? len >= m - 1 && strncmp(name, list[i], m - 1) == 0 : len == m && strncmp(name, list[i], m) == 0)
            return true;
    }
    return false;
}

static bool plain(const char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || (unsigned char)*text >= 0x7f)
            return false;
    return true;
}

static enum status_code find_program(const char *name, char **out, struct status *st)
{
    char path[4096];
    const char *dirs = getenv("PATH");
    if (strchr(name, '/')) {
        if (name[0] != '/' || access(name, X_OK) != 0)
            return status_set(st, ST_NOT_FOUND, "--allow %.200s: expected the full path of a program", name);
        *out = strdup(name);
        return *out ? ST_OK : status_nomem(st, "program", strlen(name));
    }
    for (const char *d = dirs ? dirs : "/usr/local/bin:/usr/bin:/bin"; *d;) {
        size_t n = strcspn(d, ":");
        if (n > 0 && d[0] == '/' && n + strlen(name) + 2 <= sizeof path) {
            memcpy(path, d, n);
            path[n] = '/';
            strcpy(path + n + 1, name);
            if (access(path, X_OK) == 0) {
                *out = strdup(path);
                return *out ? ST_OK : status_nomem(st, "program", strlen(path));
            }
        }
        d += n + (d[n] == ':');
    }
    return status_set(st, ST_NOT_FOUND, "--allow %.200s: no such program in PATH", name);
}

enum status_code agent_policy_allow(struct agent_policy *p, const char *path, struct status *st)
{
    if (p->n_programs == AGENT_PROGRAMS_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "--allow: more than %d programs", AGENT_PROGRAMS_MAX);
    enum status_code rc = find_program(path, &p->programs[p->n_programs], st);
    if (rc == ST_OK)
        p->n_programs++;
    return rc;
}

void agent_policy_fini(struct agent_policy *p)
{
    while (p->n_programs > 0)
        free(p->programs[--p->n_programs]);
}

static const char *last_part(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static bool names_setting(const char *arg)
{
    static const char *const options[] = {"-mca", "--mca", "--prtemca", "--pmixmca"};
    return matches(arg, strlen(arg), options, COUNT(options));
}

static enum status_code check_setting(const char *name, const char *value, struct status *st)
{
    if (!name || !value)
        return status_set(st, ST_PERMISSION_DENIED, "arguments: --mca without name and value");
    if (strcmp(name, "plm_rsh_agent") == 0 || strcmp(name, "prte_rsh_agent") == 0) {
        if (matches(value, strlen(value), agents, COUNT(agents)))
            return ST_OK;
        return status_set(st, ST_PERMISSION_DENIED, "arguments: %s %.100s, expected \"%s\"", name, value, agents[0]);
    }
    if (strcmp(name, "plm_rsh_args") == 0) {
        if (matches(value, strlen(value), agent_arguments, COUNT(agent_arguments)))
            return ST_OK;
        return status_set(st, ST_PERMISSION_DENIED, "arguments: %s %.100s, expected \"%s\"", name, value,
                          agent_arguments[0]);
    }
    if (!matches(name, strlen(name), settings, COUNT(settings)))
        return status_set(st, ST_PERMISSION_DENIED, "arguments: the setting %.100s is not on the list", name);
    if (strcmp(name, "ess") == 0 && strcmp(value, "env") != 0)
        return status_set(st, ST_PERMISSION_DENIED, "arguments: ess %.100s, expected env", value);
    return ST_OK;
}

enum status_code agent_policy_check(const struct agent_policy *p, const struct agent_request *r, const char **program,
                                    struct status *st)
{
    const char *found = NULL;
    for (size_t i = 0; i < r->argc; i++)
        if (!plain(r->argv[i]))
            return status_set(st, ST_PERMISSION_DENIED, "arguments: number %zu has bytes that are no printable ASCII",
                              i);
    for (size_t i = 0; r->argc > 0 && i < p->n_programs; i++)
        if (strcmp(r->argv[0], last_part(p->programs[i])) == 0 || strcmp(r->argv[0], p->programs[i]) == 0)
            found = p->programs[i];
    if (!found)
        return status_set(st, ST_PERMISSION_DENIED, "program %.100s: not on the list",
                          r->argc > 0 ? r->argv[0] : "(none)");
    for (size_t i = 1; i < r->argc; i++) {
        if (names_setting(r->argv[i])) {
            enum status_code rc = check_setting(r->argv[i + 1], r->argv[i + 1] ? r->argv[i + 2] : NULL, st);
            if (rc != ST_OK)
                return rc;
            i += 2;
        } else if (!matches(r->argv[i], strlen(r->argv[i]), switches, COUNT(switches)))
            return status_set(st, ST_PERMISSION_DENIED, "arguments: %.100s is not on the list", r->argv[i]);
    }
    for (size_t i = 0; i < r->envc; i++)
        if (!agent_policy_env(r->env[i]))
            return status_set(st, ST_PERMISSION_DENIED, "environment: %.*s is not on the list",
                              (int)strcspn(r->env[i], "="), r->env[i]);
    *program = found;
    return ST_OK;
}

bool agent_policy_env(const char *entry)
{
    size_t n = strcspn(entry, "=");
    return entry[n] == '=' && plain(entry) && matches(entry, n, environment, COUNT(environment));
}
