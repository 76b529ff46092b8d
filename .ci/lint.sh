#!/usr/bin/env bash
# Format and static checks. `lint.sh` is quick; `lint.sh tidy` runs clang-tidy over the product's code, as build/release
# (configured before) compiles it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = tidy ]; then
    # How many states of a function the analyzer looks at. Its own 225000 take twice as long: TANDEM_TEST_ALL=1
    states=(-extra-arg=-Xclang -extra-arg=-analyzer-config -extra-arg=-Xclang -extra-arg=max-nodes=100000)
    [ "${TANDEM_TEST_ALL:-0}" = 0 ] || states=()
    files=$(sed -n "s#^ *\"file\": \"\($PWD/\(proto\|coordinator\|worker\|comm\|memory\|attention\|k8s\)/[^/]*\.c\)\".*#\1#p" \
        build/release/compile_commands.json | sort -u | xargs -r -d '\n' ls -S)
    [ -n "$files" ] || { echo "lint: build/release/compile_commands.json names none of our files" >&2; exit 1; }
    # The largest first, so that none of them is waited for alone at the end.
    xargs -d '\n' -n 1 -P "$(nproc)" clang-tidy-14 -p build/release -quiet "${states[@]}" <<<"$files" >build/tidy.log 2>&1 || {
        grep -E 'warning:|error:' build/tidy.log | sort -u >&2
        echo "lint: clang-tidy found something; all of it is in build/tidy.log" >&2
        exit 1
    }
    exit 0
fi
git ls-files -z '*.c' '*.h' '*.cu' '*.cuh' | xargs -0 -r clang-format-14 --dry-run -Werror
git ls-files -z '*.sh' .ci/run | xargs -0 -r shellcheck
