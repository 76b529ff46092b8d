/* cmd_serve.h - what the files of `tandem serve` share: cmd_serve_setup.c reads options and makes the private folders,
 * cmd_serve_commands.c builds the command lines, cmd_serve.c runs and watches them, cmd_serve_say.c tells of it in JSON. */
#ifndef TANDEM_CMD_SERVE_H
#define TANDEM_CMD_SERVE_H

#include <jansson.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#include "coordinator/cli.h"

#define SERVE_MAX_ARGS   192
#define SERVE_MAX_GROUPS 64

/* An argv that owns its strings; ends with NULL. Starts as all zero. */
struct argument_list {
    char *v[SERVE_MAX_ARGS + 1];
    int n;
};

/* False when it is full or memory is. */
bool arguments_push(struct argument_list *a, const char *text);
bool arguments_push2(struct argument_list *a, const char *option, const char *value);
/* Removes what was pushed after the list had n entries. */
void arguments_cut(struct argument_list *a, int n);

struct serve_setup {
    struct cli_args args;
    /* from the options; they point into args */
    const char *model; /* or shape */
    const char *random_weights, *control_listen, *mpirun_path, *devices, *threads, *backend, *flight, *trace;
    struct argument_list coordinator_extra, worker_extra, mpi_extra;
    bool listens;    /* --listen was given */
    bool local_only; /* all ranks on this machine */
    bool json;       /* events on standard output */
    bool trace_kernels;
    enum cli_origin model_origin, random_origin;
    char random_where[192]; /* for messages about random_weights */
    char shape[PATH_MAX];   /* the folder of --random-weights CONFIG */
    double drain_s, launch_s;
    uint64_t tp;
    uint64_t groups;
    int64_t start_ms; /* of serve, set by the caller */
    /* by serve_prepare */
    char bin_dir[PATH_MAX];
    char run_dir[64]; /* control socket, Open MPI's session files */
    char shm_dir[64]; /* Open MPI's shared segments; "": where it wants */
    char control[192];
    struct argument_list coordinator, mpirun[SERVE_MAX_GROUPS]; /* what to run */
#define SERVE_FD_AT 2 /* in coordinator: the value of --supervisor-fd, set anew at each start */
};

/* Name of the i-th of several groups. */
void serve_group_name(char *out, size_t cap, uint64_t i);

/* The devices of group i out of the list that was given, *len bytes; NULL: that has not as many for each. */
const char *serve_devices_of(const struct serve_setup *s, uint64_t i, size_t *len);
/* False: too many arguments. */
bool serve_build_commands(struct serve_setup *s);

/* ---- cmd_serve_say.c ---- */

int64_t serve_now_ms(void); /* monotonic */
/* A line on standard output with --json, else nothing. group: "" or NULL: none. facts: an object that is taken over, or NULL. */
void serve_event(const struct serve_setup *s, const char *name, const char *group, json_t *facts);
/* cmd_error, and the event "error". */
int serve_error(const struct serve_setup *s, int rc, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* "a,b" as an array. */
json_t *serve_list(const char *text);

/* ---- cmd_serve_setup.c ---- */

/* CMD_OK, CMD_USAGE or CMD_FAILED (a line on stderr has said why), or -1 after --help. */
int serve_parse(int argc, char **argv, struct serve_setup *s);
/* Finds the programs, makes the folders, builds the command lines. False: a line on stderr has said why. */
bool serve_prepare(struct serve_setup *s);
/* Removes the folders, frees the lists. */
void serve_release(struct serve_setup *s);

#endif
