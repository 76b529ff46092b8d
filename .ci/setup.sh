#!/usr/bin/env bash
# Installs what the project needs from Debian's or Ubuntu's packages, only what is missing.
#   .ci/setup.sh run     to build and run
#   .ci/setup.sh test    to run the tests and checks as well
set -euo pipefail

packages=(build-essential cmake ninja-build pkg-config
          protobuf-compiler protobuf-c-compiler libprotobuf-c-dev libgrpc-dev libssl-dev
          libopenmpi-dev openmpi-bin libopenblas-dev libpcre2-dev libutf8proc-dev libjansson-dev libedit-dev libmicrohttpd-dev
          zlib1g-dev)
if [ "${1:-run}" = test ]; then
    # One version of the formatter everywhere: versions differ in what they print.
    packages+=(check openssl python3 python3-grpcio python3-protobuf python3-numpy python3-jinja2
               python3-yaml python3-jsonschema iproute2 clang-format-14 clang-tidy-14 shellcheck git)
fi

missing=()
for p in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || {
        echo "setup: these packages are missing and neither root nor sudo is here: ${missing[*]}" >&2
        exit 1
    }
    as_root=(sudo)
fi
echo "setup: installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
    "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}
install >"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    echo "setup: apt-get failed; its last lines stand above" >&2
    exit 1
}
