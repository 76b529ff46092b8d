#!/bin/sh
# test_bundle.sh: a bundle is complete, runs from a place where it was not built, and is found wanting without one of its libraries.
# TANDEM_BUNDLE names one (that of a build with CUDA, say); else one is made of the programs in TANDEM_BIN.
set -u
check=$TANDEM_SOURCE/k8s/bundle/check.sh
model=$TANDEM_SOURCE/tests/data/demo-model
temp=$(mktemp -d) server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null; wait; rm -rf "$temp"' EXIT
fail() {
    echo "FAIL: $*"
    exit 1
}

bundle=${TANDEM_BUNDLE:-}
if [ -z "$bundle" ]; then
    bundle=$temp/bundle
    "$TANDEM_SOURCE/k8s/bundle/bundle.sh" "$TANDEM_BIN" "$bundle" || fail "no bundle is made"
fi
text=$("$check" "$bundle") || fail "$text"
case $text in *complete:*) ;; *) fail "check says: $text" ;; esac
cmp -s "$check" "$bundle/check" || fail "the bundle's own check is not that of the source: build it again"

cp -r "$bundle" "$temp/moved" || fail "no room for a copy"
env -i PATH=/usr/bin:/bin "$temp/moved/tandem" --version || fail "tandem --version"
env -i PATH=/usr/bin:/bin HOME="$temp" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "$temp/moved/tandem" serve \
    --model "$model" --tp 2 --backend host --threads 1 --listen "unix:$temp/socket" >"$temp/log" 2>&1 &
server=$!
answer=$(env -i PATH=/usr/bin:/bin "$temp/moved/tandem" generate --address "unix:$temp/socket" --wait 60 --greedy \
    --max-tokens 8 "Once upon a time") || fail "no answer: $(tail -n 5 "$temp/log")"
[ -n "$answer" ] || fail "an empty answer"
kill "$server" && wait "$server"
server=

"$check" "$temp" >/dev/null 2>&1
[ $? -eq 2 ] || fail "what is no bundle passes the check"
missing=$(basename "$(find "$temp/moved/lib" -name 'libgrpc.so*' | head -n 1)")
rm "$temp/moved/lib/$missing" || fail "no libgrpc in it"
text=$("$check" "$temp/moved")
[ $? -eq 1 ] || fail "a bundle without $missing passes the check"
case $text in *"$missing"*) ;; *) fail "the check does not name $missing: $text" ;; esac
echo "ok: $answer"
