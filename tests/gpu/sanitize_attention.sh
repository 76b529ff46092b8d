#!/usr/bin/env bash
# check_attention_gpu under compute-sanitizer, on a machine with a GPU: sanitize_attention.sh [DIR of the programs]
# memcheck and synccheck over every small shape, and over f16, graphs and layers; racecheck, which is slow, over the shapes
# that take every path, a cap, scores that grow, f16, graphs and layers, and tokens that are written late. Each policy, each way and the fixed cut once; the
# reference is not looked at.
set -uo pipefail
bin=${1:-build/release/bin}
rc=0
one() {
    local tool=$1 what=$2 begun=$SECONDS
    shift 2
    echo "$tool, $what"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 --kernel-name-exclude kns=reference \
        "$bin/check_attention_gpu" --quick --once "$@" | tail -2 || rc=1
    echo "$((SECONDS - begun)) s"
}
for tool in memcheck synccheck; do
    one "$tool" "small shapes"
    one "$tool" "f16" --f16 --case "few D"
    one "$tool" "graphs and layers" --replay --case "few D"
done
for what in "few D" "one decode" "short decodes" "mixed D 40" "mixed 8/2" "soft cap" "cap 50 D 64" "some SMs D 64" \
            "steep 0.0156"; do
    one racecheck "$what" --case "$what"
done
one racecheck "f16" --f16 --case "few D 128"
one racecheck "steep, f16" --f16 --case "steep 0.0039"
one racecheck "graphs and layers, D 128" --replay --case "few D 128"
one racecheck "graphs and layers, D 64" --replay --case "few D 64"
one racecheck "early reads, D 128" --replay --case "early decodes D 128"
one racecheck "early reads, D 64" --case "early decodes D 64"
exit "$rc"
