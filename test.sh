#!/usr/bin/env bash
# Installs, builds and runs every check and test that needs no GPU.
#   ./test.sh            all: format, lint, release, address+undefined sanitizers, thread sanitizer
#   ./test.sh --quick    the release build's tests only
#   ./test.sh NAME ...   ctest -R NAME on the release build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

quick=0 only=''
case ${1:-} in
-h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
--quick) quick=1 ;;
-*) echo "test.sh: unknown option $1; see ./test.sh --help" >&2; exit 2 ;;
*) only=$(IFS='|'; echo "$*") ;;
esac

.ci/setup.sh test
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 CK_VERBOSITY=minimal
started=$SECONDS second_tries='' timed='^(e2e_|k8s_pods|coordinator|worker|comm|rpc|client|http|agent$)'
# What makes no thread, or those that another test makes too, has nothing to show the thread sanitizer.
one_thread='^(agent|bench|trace|openai|cost|engine_share|engine_flights|e2e_sampling|e2e_chat|status|coord_stop|prefix|scheduler|fuzz_.*|shard|sample.*|safetensors|model_config|gguf|chat|jinja|tokenizer.*|cmd_tokenize|cli)$'
say() { printf '== %s (%d s)\n' "$*" $((SECONDS - started)); }

build() { # build PRESET
    local bench=OFF
    [ "$1" != release ] || bench=ON # built, so that they do not rot; not run
    say "build $1"
    cmake --preset "$1" -DTANDEM_TESTS=ON -DTANDEM_BENCH=$bench -DTANDEM_WERROR=ON >/dev/null
    cmake --build --preset "$1" 2>&1 | tail -n 1
}
run_tests() { # run_tests PRESET
    local preset=$1 skip=''
    [ "$preset" != tsan ] || skip=$one_thread
    say "test $preset"
    ctest --preset "$preset" -j "$(nproc)" -E "$timed${skip:+|$skip}"
    # These have bounds on time and share the machine with what they test. One that fails gets a second try, and is named at
    # the end: look at it. The end-to-end tests have the machine to themselves (RUN_SERIAL).
    ctest --preset "$preset" -j "$(nproc)" --repeat until-pass:2 -R "$timed" -E "${skip:-^$}" | tee build/ctest.log
    second_tries+=$(sed -n "s/.*Test *#[0-9]*: \([a-z0-9_]*\) .*\*\*\*.*/ $preset:\1/p" build/ctest.log | tr -d '\n')
}

if [ -n "$only" ]; then
    build release
    say "test release"
    ctest --preset release -R "$only"
    exit 0
fi
if [ "$quick" = 0 ]; then
    say "format and lint"
    .ci/lint.sh
fi
build release
run_tests release
if [ "$quick" = 0 ]; then
    for preset in asan tsan; do
        build "$preset"
        run_tests "$preset"
    done
    say "clang-tidy"
    .ci/lint.sh tidy
fi
say "all passed${second_tries:+; at the second try:$second_tries}"
