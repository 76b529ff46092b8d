#!/usr/bin/env bash
# The KV pool under compute-sanitizer's memcheck, on a machine with a GPU: sanitize_memory.sh [DIR of the programs]
# check_memory, whose tests read and write through the driver; and bench_kv_pool quick, if it was built there, whose kernels do.
# Errors of the driver's calls are not reported: tests ask for what it must refuse.
set -uo pipefail
bin=${1:-build/release/bin}
seconds=${SANITIZE_SECONDS:-120}
rc=0
one() {
    local begin=$SECONDS
    echo "memcheck, $*"
    timeout "$seconds" compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 --print-limit 5 "$@" |
        tail -n 12 || { rc=1 && echo "FAILED"; }
    echo "($((SECONDS - begin)) s)"
}
one "$bin/check_memory" cuda --quick
if [ -x "$bin/bench_kv_pool" ]; then
    one "$bin/bench_kv_pool" quick
fi
exit "$rc"
