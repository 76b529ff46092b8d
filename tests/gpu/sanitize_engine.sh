#!/usr/bin/env bash
# check_engine_gpu under compute-sanitizer, on a machine with a GPU: sanitize_engine.sh [DIR of the programs [MODEL]]
# Two models, each with all that a step does: chunks, decodes, graphs, options of single tokens, slots in host memory. cuBLASLt's own
# kernels are left out of racecheck, which takes minutes for them and says nothing of ours.
set -uo pipefail
bin=${1:-build/release/bin}
model=${2:-tests/data/demo-model}
rc=0
one() {
    local tool=$1 what=$2 begun=$SECONDS
    shift 2
    echo "$tool, $what"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "$@" \
        "$bin/check_engine_gpu" "$model" "$bin/backend_cuda.so" "$what" | tail -2 || rc=1
    echo "$((SECONDS - begun)) s"
}
for what in demo qwen2; do
    one memcheck "$what"
    one synccheck "$what"
    one racecheck "$what" --kernel-name-exclude kns=cutlass --kernel-name-exclude kns=gemm
done
exit "$rc"
