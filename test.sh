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
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 CK_VERBOSITY=normal
started=$SECONDS second_tries='' timed='^(e2e_|k8s_pods|coordinator|worker|comm|rpc|client|http|agent$)'
# What makes no thread, or those that another test makes too, has nothing to show the thread sanitizer.
one_thread='^(agent|bench|trace|openai|cost|engine_share|engine_flights|e2e_sampling|e2e_chat|status|coord_stop|prefix|scheduler|fuzz_.*|shard|sample.*|safetensors|model_config|gguf|chat|jinja|tokenizer.*|cmd_tokenize|cli)$'
# The sanitizer builds leave out tests that go where others go too; TANDEM_TEST_ALL=1 runs all in every build (for an hour).
repeated='^(e2e_sampling|e2e_chat|e2e_prefix|e2e_tokens)$'
one_thread="${one_thread%)\$}|gemm|engine_options|engine_reference|e2e_prefix|e2e_tokens|e2e_cli|e2e_api|e2e_security|e2e_groups|e2e_journal)\$"
[ "${TANDEM_TEST_ALL:-0}" = 0 ] || { repeated='' one_thread=''; }
say() { printf '== %s (%d s)\n' "$*" $((SECONDS - started)); }

configure() { # configure PRESET
    local bench=OFF
    [ "$1" != release ] || bench=ON # built, so that they do not rot; not run
    cmake --preset "$1" -DTANDEM_TESTS=ON -DTANDEM_BENCH=$bench -DTANDEM_WERROR=ON >/dev/null
}
build() { # build PRESET
    say "build $1"
    configure "$1"
    cmake --build --preset "$1" 2>&1 | tail -n 1
}

# Many tests wait most of the time: what comes next is made meanwhile, one after the other, at the lowest priority.
beside='' beside_log=build/beside.log
trap '[ -z "$beside" ] || kill -- "-$beside" 2>/dev/null || kill "$beside" 2>/dev/null || true' EXIT
start_beside() { # start_beside COMMAND ...
    setsid nice -n 19 bash -c '(echo 19 >/proc/self/autogroup) 2>/dev/null; exec "$@"' beside "$@" >$beside_log 2>&1 &
    beside=$!
}
wait_built() { # wait_built PRESET, which is built beside the tests
    say "build $1, begun beside the tests"
    while [ ! -e "build/$1.built" ] && kill -0 "$beside" 2>/dev/null; do sleep 1; done
    [ -e "build/$1.built" ] || finish_beside "build $1" # ends here, and says why
}
finish_beside() { # finish_beside WHAT
    say "$1, begun beside the tests"
    wait "$beside" || { beside=''; grep -vE '^\[[0-9]+/' $beside_log >&2; echo "test.sh: $1 failed" >&2; exit 1; }
    beside=''
}
run_tests() { # run_tests PRESET
    local preset=$1 skip=''
    case $preset in
    asan) skip=$repeated ;;
    tsan) skip=$one_thread ;;
    esac
    say "test $preset"
    ctest --preset "$preset" -j "$(nproc)" -E "$timed${skip:+|$skip}"
    # These have bounds on time and share the machine with what they test. One that fails gets a second try, and is named at
    # the end: look at it. The end-to-end tests have the machine to themselves (RUN_SERIAL).
    ctest --preset "$preset" -j "$(nproc)" --repeat until-pass:2 -R "$timed" -E "${skip:-^$}" | tee build/ctest.log
    second_tries+=$(sed -n "/[*]Skipped/d; s/.*Test *#[0-9]*: \([a-z0-9_]*\) .*\*\*\*.*/ $preset:\1/p" build/ctest.log | tr -d '\n')
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
if [ "$quick" = 0 ]; then
    configure asan
    configure tsan
    rm -f build/asan.built build/tsan.built
    # shellcheck disable=SC2016 # expanded there
    start_beside bash -ec 'for p in asan tsan; do cmake --build --preset $p; touch build/$p.built; done; .ci/lint.sh tidy'
    run_tests release
    wait_built asan
    run_tests asan
    wait_built tsan
    run_tests tsan
    finish_beside "clang-tidy"
else
    run_tests release
fi
say "all passed${second_tries:+; at the second try:$second_tries}"
