#!/usr/bin/env bash
# check_attention_gpu under compute-sanitizer, on a machine with a GPU: sanitize_attention.sh [DIR of the programs [small|large]]
# memcheck and synccheck over every small shape, and over f16, graphs and layers; racecheck, which is slow, over the shapes
# that take every path, a cap, scores that grow, f16, graphs and layers, and tokens that are written late. Each policy, each way and the fixed cut once; the
# reference is not looked at. Large: the two shapes whose cuts no small one has, under all three, racecheck by the Hopper back end
# alone (the portable one's kernels have had it; with these shapes it does not end in minutes).
set -uo pipefail
bin=${1:-build/release/bin}
part=${2:-all}
rc=0
one() {
    local tool=$1 what=$2 begun=$SECONDS
    shift 2
    echo "$tool, $what"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 --kernel-name-exclude kns=reference \
        "$bin/check_attention_gpu" --once "$@" | tail -2 || rc=1
    echo "$((SECONDS - begun)) s"
}
small() {
    local tool what
    for tool in memcheck synccheck; do
        one "$tool" "small shapes" --quick
        one "$tool" "f16" --quick --f16 --case "few D"
        one "$tool" "graphs and layers" --quick --replay --case "few D"
    done
    for what in "few D" "one decode" "short decodes" "mixed D 40" "mixed 8/2" "soft cap" "cap 50 D 64" "some SMs D 64" \
                "steep 0.0156"; do
        one racecheck "$what" --quick --case "$what"
    done
    one racecheck "f16" --quick --f16 --case "few D 128"
    one racecheck "steep, f16" --quick --f16 --case "steep 0.0039"
    one racecheck "graphs and layers, D 128" --quick --replay --case "few D 128"
    one racecheck "graphs and layers, D 64" --quick --replay --case "few D 64"
    one racecheck "early reads, D 128" --quick --replay --case "early decodes D 128"
    one racecheck "early reads, D 64" --quick --case "early decodes D 64"
}
large() {
    local what
    for what in "whole units, cut" "prefill in parts beside"; do
        one memcheck "$what" --case "$what"
        one synccheck "$what" --case "$what"
        one racecheck "$what" --back-end sm90 --case "$what"
    done
}
case $part in
all) small && large ;;
small | large) "$part" ;;
*) echo "sanitize_attention.sh: $part: expected small or large" >&2 && exit 2 ;;
esac
exit "$rc"
