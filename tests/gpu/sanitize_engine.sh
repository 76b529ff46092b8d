#!/usr/bin/env bash
# The worker's kernels under compute-sanitizer, on a machine with GPUs: sanitize_engine.sh [DIR of the programs [MODEL [RANKS]]]
# check_engine_gpu, four models, each with all that a step does: chunks, decodes, graphs, options of single tokens, slots in host memory:
# memcheck, and synccheck of the worker's own kernels; attention and comm have scripts of their own. racecheck fails in itself as
# soon as a product of cuBLASLt runs in the process, so it looks at check_kernels_gpu, which launches each of the worker's own
# kernels alone; so do the other tools, initcheck and memcheck without guards around memory, which would hide its ends from them.
# With several RANKS, a GPU each, only the engine: sums over peer memory, as NCCL looks for kernels that its library does not have.
# MPIRUN: another launcher.
set -uo pipefail
bin=${1:-build/release/bin}
model=${2:-tests/data/demo-model}
ranks=${3:-1}
rc=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
launch=()
[ "$ranks" = 1 ] || launch=("${MPIRUN:-mpirun}" -np "$ranks" --oversubscribe --bind-to none)
one() {
    local tool=$1 what=$2 begun=$SECONDS
    shift 2
    if "${launch[@]}" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "$@" >"$log" 2>&1; then
        tail -2 "$log"
    else
        rc=1
        grep -E "FAILED|=========|memory" "$log" | tail -30
    fi
    echo "$tool, $what: $((SECONDS - begun)) s"
}
groups=(embed norm rope swiglu random few glu adjust sample score)
[ "$ranks" = 1 ] || groups=()
for group in "${groups[@]}"; do
    one racecheck "$group" "$bin/check_kernels_gpu" --small "$group"
    one synccheck "$group" "$bin/check_kernels_gpu" --small "$group"
    one initcheck "$group" "$bin/check_kernels_gpu" --small --bare "$group"
    one memcheck "$group" "$bin/check_kernels_gpu" --small --bare "$group"
done
own=()
for kernel in norm few some swiglu sample score adjust select embed rope; do
    own+=(--kernel-name "kns=${kernel}")
done
for what in qwen2 windows yarn demo; do
    engine=("$bin/check_engine_gpu" "$model" "$bin/backend_cuda.so" "$what" peer)
    one memcheck "$what" "${engine[@]}"
    one synccheck "$what" "${own[@]}" "${engine[@]}"
done
exit "$rc"
