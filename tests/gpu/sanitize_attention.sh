#!/usr/bin/env bash
# check_attention_gpu under compute-sanitizer, on a machine with a GPU: sanitize_attention.sh [DIR of the programs]
# memcheck over every small shape; racecheck and synccheck, which are slow, over the shapes that take every path.
set -uo pipefail
bin=${1:-build/release/bin}
rc=0
one() {
    local tool=$1 what=$2
    shift 2
    echo "$tool, $what"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "$bin/check_attention_gpu" "$@" | tail -3 || rc=1
}
one memcheck "small shapes" --quick
for tool in racecheck synccheck initcheck; do
    for what in "mixed 8/2" "chunks D 256" "decodes D 256" "mixed D 40" "soft cap, window"; do
        one "$tool" "$what" --quick --case "$what"
    done
done
exit "$rc"
