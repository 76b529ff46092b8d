#!/usr/bin/env bash
# Ranks on GPUs under compute-sanitizer, one GPU each: sanitize_comm.sh [DIR of the programs] [RANKS, default 2]
# MPIRUN: another launcher. NCCL's own kernels are not in it.
set -uo pipefail
bin=${1:-build/release/bin}
ranks=${2:-2}
seconds=${SANITIZE_SECONDS:-120}
rc=0
for tool in memcheck racecheck synccheck; do
    for way in push read; do
        begin=$SECONDS
        echo "$tool, check_comm_gpu quick $way"
        timeout "$seconds" "${MPIRUN:-mpirun}" -np "$ranks" --oversubscribe --bind-to none \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "$bin/check_comm_gpu" quick "$way" |
            grep -E "=====|rank" | tail -n 12 || { rc=1 && echo "FAILED"; }
        echo "($((SECONDS - begin)) s)"
    done
done
exit "$rc"
