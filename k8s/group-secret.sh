#!/usr/bin/env bash
# group-secret.sh: prints a Secret tandem-group, for pods that hold ranks and the one that serves: what agents are asked with,
# and a certificate that coordinator and ranks show each other (its CA's key is thrown away).
#   k8s/group-secret.sh | kubectl apply -f -
# Applied again it changes all of them, at once: between two launches of a group, or with a rollout.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
umask 077
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj "/CN=tandem group CA" \
    -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=tandem" -keyout tls.key -out tls.csr 2>/dev/null
printf 'subjectAltName = DNS:tandem\nextendedKeyUsage = serverAuth, clientAuth\n' >ext
openssl x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -extfile ext -out tls.crt 2>/dev/null
openssl rand -hex 32 >agent-secret
cat <<TEXT
apiVersion: v1
kind: Secret
metadata:
  name: tandem-group
type: Opaque
data:
TEXT
for key in agent-secret ca.crt tls.crt tls.key; do
    echo "  $key: $(base64 -w 0 <$key)"
done
