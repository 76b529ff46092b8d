/* check_taken.c - worker/cuda_taken.c, as debug builds of the CUDA plugin link it, over calls that do nothing: each that may take
 * memory ends the process where it is forbidden, and goes through where not. */
#include <check.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cuda_runtime_api.h>

#include "worker/cuda_taken.h"

extern int fake_taking_calls;

#define NO 77 /* bytes, flags ...: the call fails */

static const cudaIpcMemHandle_t handle;

/* n: what the call is given. */
#define CALL(name, ...)                                                                                                \
    static cudaError_t call_##name(unsigned n)                                                                         \
    {                                                                                                                  \
        return name(__VA_ARGS__);                                                                                      \
    }
CALL(cudaMalloc, NULL, n)
CALL(cudaMallocAsync, NULL, n, NULL)
CALL(cudaMallocFromPoolAsync, NULL, n, NULL, NULL)
CALL(cudaMallocManaged, NULL, n, 0)
CALL(cudaMallocPitch, NULL, NULL, 1, n)
CALL(cudaMallocHost, NULL, n)
CALL(cudaHostAlloc, NULL, n, 0)
CALL(cudaHostRegister, NULL, n, 0)
CALL(cudaIpcOpenMemHandle, NULL, handle, n)
CALL(cudaGraphInstantiate, NULL, NULL, n)
CALL(cudaGraphInstantiateWithFlags, NULL, NULL, n)
CALL(cudaStreamCreateWithFlags, NULL, n)
CALL(cudaStreamCreateWithPriority, NULL, 0, (int)n)
CALL(cudaEventCreate, n == NO ? NULL : (cudaEvent_t *)(void *)&n)
CALL(cudaEventCreateWithFlags, NULL, n)

static const struct {
    const char *name;
    cudaError_t (*call)(unsigned n);
} calls[] = {
#define ENTRY(name)                                                                                                    \
    {                                                                                                                  \
#name, call_##name                                                                                             \
    }
    ENTRY(cudaMalloc),
    ENTRY(cudaMallocAsync),
    ENTRY(cudaMallocFromPoolAsync),
    ENTRY(cudaMallocManaged),
    ENTRY(cudaMallocPitch),
    ENTRY(cudaMallocHost),
    ENTRY(cudaHostAlloc),
    ENTRY(cudaHostRegister),
    ENTRY(cudaIpcOpenMemHandle),
    ENTRY(cudaGraphInstantiate),
    ENTRY(cudaGraphInstantiateWithFlags),
    ENTRY(cudaStreamCreateWithFlags),
    ENTRY(cudaStreamCreateWithPriority),
    ENTRY(cudaEventCreate),
    ENTRY(cudaEventCreateWithFlags),
#undef ENTRY
};
#define CALLS (int)(sizeof calls / sizeof *calls)

/* How a process ends that makes the call where it is forbidden; what it says goes to text. */
static int end_of(int i, char *text, size_t cap)
{
    int pipe_fd[2], how = 0;
    ck_assert_int_eq(pipe(pipe_fd), 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(pipe_fd[1], STDERR_FILENO);
        close(pipe_fd[0]);
        cuda_taken_forbid("start of a step");
        calls[i].call(1);
        _exit(0);
    }
    close(pipe_fd[1]);
    size_t n = 0;
    for (ssize_t got = 1; got > 0 && n<cap - 1; n += got> 0 ? (size_t)got : 0)
        got = read(pipe_fd[0], text + n, cap - 1 - n);
    text[n] = '\0';
    close(pipe_fd[0]);
    ck_assert_int_eq(waitpid(child, &how, 0), child);
    return how;
}

START_TEST(a_call_that_is_forbidden_ends_the_process_and_is_named)
{
    for (int i = 0; i < CALLS; i++) {
        char text[4096], wanted[256];
        int how = end_of(i, text, sizeof text);
        ck_assert_msg(WIFSIGNALED(how) && WTERMSIG(how) == SIGABRT, "%s: ended with %x", calls[i].name, (unsigned)how);
        snprintf(wanted, sizeof wanted, "tandem: start of a step: %s takes memory, though all was taken before",
                 calls[i].name);
        ck_assert_msg(strncmp(text, wanted, strlen(wanted)) == 0, "%s", text);
    }
}
END_TEST

START_TEST(a_call_that_is_allowed_goes_through)
{
    cuda_taken_forbid("a step");
    cuda_taken_forbid(NULL);
    for (int i = 0; i < CALLS; i++) {
        ck_assert_int_eq(calls[i].call(1), cudaSuccess);
        ck_assert_int_eq(calls[i].call(NO), cudaErrorMemoryAllocation); /* arguments and answer */
        ck_assert_int_eq(fake_taking_calls, 2 * i + 2);
    }
}
END_TEST

static void *take_elsewhere(void *arg)
{
    (void)arg;
    ck_assert_int_eq(calls[0].call(1), cudaSuccess);
    return NULL;
}

START_TEST(other_threads_are_not_forbidden)
{
    pthread_t thread;
    cuda_taken_forbid("a step");
    ck_assert_int_eq(pthread_create(&thread, NULL, take_elsewhere, NULL), 0);
    ck_assert_int_eq(pthread_join(thread, NULL), 0);
    cuda_taken_forbid(NULL);
    ck_assert_int_eq(fake_taking_calls, 1);
}
END_TEST

START_TEST(every_call_that_the_plugin_hands_on_is_tried_here)
{
    char list[] = TEST_TAKING_CALLS;
    int n = 0;
    for (char *name = strtok(list, " "); name; name = strtok(NULL, " "), n++) {
        int i = 0;
        while (i < CALLS && strcmp(calls[i].name, name) != 0)
            i++;
        ck_assert_msg(i < CALLS, "%s", name);
    }
    ck_assert_int_eq(n, CALLS);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("taken");
    TCase *core = tcase_create("core");
    tcase_add_test(core, a_call_that_is_forbidden_ends_the_process_and_is_named);
    tcase_add_test(core, a_call_that_is_allowed_goes_through);
    tcase_add_test(core, other_threads_are_not_forbidden);
    tcase_add_test(core, every_call_that_the_plugin_hands_on_is_tried_here);
    suite_add_tcase(s, core);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
