#!/usr/bin/env bash
# check_attention_gpu under compute-sanitizer, on a machine with a GPU: sanitize_attention.sh [DIR of the programs]
# memcheck and synccheck over every small shape; racecheck, which is slow, over the shapes that take every path.
# Each policy and the fixed cut once; the reference is not looked at.
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
done
for what in "few D" "one decode" "short decodes" "mixed D 40" "mixed 8/2" "soft cap"; do
    one racecheck "$what" --case "$what"
done
exit "$rc"
