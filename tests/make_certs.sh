#!/usr/bin/env bash
# Certificates for tests of TLS, made new each time: make_certs.sh DIR
#   ca.pem         signs server, client, renewed, elsewhere, expired (in the past, not by a sleep)
#   other-ca.pem   signs stranger
# Every leaf NAME has NAME.pem and NAME.key; all are for localhost and 127.0.0.1 but `elsewhere`.
set -euo pipefail
mkdir -p "$1"
cd "$1"

key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key" 2>/dev/null; }
ca() { # ca NAME
    key "$1"
    openssl req -x509 -new -key "$1.key" -subj "/CN=tandem test $1" -days 2 -out "$1.pem"
}
leaf() { # leaf NAME CA DAYS HOSTS
    key "$1"
    openssl req -new -key "$1.key" -subj "/CN=$1" |
        openssl x509 -req -CA "$2.pem" -CAkey "$2.key" -days "$3" -set_serial "0x$(openssl rand -hex 8)" -out "$1.pem" \
            -extfile <(echo "subjectAltName=$4") 2>/dev/null
}
here=DNS:localhost,IP:127.0.0.1
ca ca &
ca other-ca &
wait
leaf server ca 2 $here &
leaf client ca 2 $here &
leaf renewed ca 2 $here &
leaf elsewhere ca 2 DNS:elsewhere.test &
leaf expired ca -1 $here &
leaf stranger other-ca 2 $here &
wait
