#!/usr/bin/env bash
# Installs, builds, starts a coordinator and two MPI ranks on the demo model, asks for a story over gRPC and streams it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
usage: ./run.sh [--keep] [--model DIR] [--tp R] [--port N] [PROMPT]

Installs what is missing (apt-get, root or sudo), builds, starts a coordinator and R ranks (default 2), sends PROMPT over
gRPC and prints the answer as it streams. Nothing is left running, except with --keep.

  --keep       leave the server running and say how to stop it
  --model DIR  a Hugging Face model folder (default: the demo model in tests/data)
  --tp R       tensor-parallel ranks
  --port N     TCP port on 127.0.0.1 (default: the first free one from 50051)
TEXT
}

keep=0 model=tests/data/demo-model tp=2 port='' prompt='Once upon a time'
while [ $# -gt 0 ]; do
    case $1 in
    --keep) keep=1 ;;
    --model | --tp | --port)
        [ $# -gt 1 ] || { echo "run.sh: $1 needs a value; see ./run.sh --help" >&2; exit 2; }
        case $1 in
        --model) model=$2 ;;
        --tp) tp=$2 ;;
        --port) port=$2 ;;
        esac
        shift ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "run.sh: unknown option $1; see ./run.sh --help" >&2; exit 2 ;;
    *) prompt=$1 ;;
    esac
    shift
done

.ci/setup.sh run
# Tests are built by ./test.sh; a tree that it has configured stays as it is. A compiler that we do not know may warn of
# more than ours: that must not stop a user.
[ -f build/release/CMakeCache.txt ] ||
    cmake --preset release -DTANDEM_TESTS=OFF -DTANDEM_BENCH=OFF -DTANDEM_WERROR=OFF >/dev/null
echo "run.sh: building"
log=$(mktemp)
cmake --build --preset release --target programs >"$log" 2>&1 || { cat "$log" >&2; rm -f "$log"; exit 1; }
rm -f "$log"
tandem=build/release/bin/tandem

in_use() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
if [ -z "$port" ]; then
    port=50051
    while in_use "$port"; do port=$((port + 1)); done
fi
address=127.0.0.1:$port

server_log=$(mktemp /tmp/tandem-log.XXXXXX)
setsid "$tandem" serve --model "$model" --tp "$tp" --listen "$address" </dev/null >"$server_log" 2>&1 &
server=$!
stop() {
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
}
failed() {
    echo "run.sh: $1; the server said:" >&2
    cat "$server_log" >&2
    stop
    rm -f "$server_log"
    exit 1
}
trap 'stop; rm -f "$server_log"; exit 130' INT TERM

echo "run.sh: starting a coordinator and $tp ranks on $address, model $model"
waited=0
until "$tandem" probe --address "$address" --quiet --timeout 1; do
    kill -0 "$server" 2>/dev/null || failed "the server ended"
    waited=$((waited + 1))
    [ "$waited" -lt 1200 ] || failed "the server was not ready in time"
    sleep 0.1
done

echo
printf "%s" "$prompt"
"$tandem" generate --address "$address" --max-tokens 160 --greedy --stats "$prompt" || failed "the request failed"
echo

if [ "$keep" = 1 ]; then
    cat <<TEXT
The server is still running (pid $server, log $server_log). Try:
  $tandem generate --address $address --temperature 0.8 "The little dog"
  $tandem probe --address $address
Stop it:
  kill $server
TEXT
    exit 0
fi
stop
rm -f "$server_log"
cat <<TEXT
The server is stopped. Try:
  ./run.sh --keep                          leave it running
  $tandem serve --model DIR --tp 2   serve a model of yours
  ./test.sh                                run all tests
TEXT
