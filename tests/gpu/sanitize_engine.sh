#!/usr/bin/env bash
# check_engine_gpu under compute-sanitizer, on a machine with a GPU: sanitize_engine.sh [DIR of the programs [MODEL]]
# Two models, each with all that a step does: chunks, decodes, graphs, options of single tokens, slots in host memory. racecheck, which
# is slow, looks at the worker's own kernels with shared memory alone: attention and comm have scripts of their own. It fails in
# itself as soon as a product runs, whichever kernels it is told to look at (worker/README.md), so only with SANITIZE_RACECHECK=1.
set -uo pipefail
bin=${1:-build/release/bin}
model=${2:-tests/data/demo-model}
rc=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
one() {
    local tool=$1 what=$2 begun=$SECONDS
    shift 2
    if compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "$@" \
        "$bin/check_engine_gpu" "$model" "$bin/backend_cuda.so" "$what" >"$log" 2>&1; then
        tail -2 "$log"
    else
        rc=1
        grep -E "FAILED|=========|memory" "$log" | tail -30
    fi
    echo "$tool, $what: $((SECONDS - begun)) s"
}
own=()
for kernel in norm few swiglu sample score adjust select embed rope; do
    own+=(--kernel-name "kns=${kernel}")
done
for what in demo qwen2; do
    one memcheck "$what"
    one synccheck "$what" "${own[@]}"
    [ "${SANITIZE_RACECHECK:-0}" = 0 ] || one racecheck "$what" "${own[@]}"
done
exit "$rc"
