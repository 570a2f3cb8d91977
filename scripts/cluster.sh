#!/usr/bin/env bash
# Builds the control plane of a real Kubernetes (integration/cluster) from its Go modules, once for each version of its
# sources, and prints the program's path. The first build takes 5 to 12 minutes on two cores and about 3 GB of Go's cache;
# it runs at low priority. Called by `make e2e`.
set -euo pipefail
cd "$(dirname "$0")/.."

go=${GO:-go}
key=$(cat integration/cluster/*.go integration/cluster/go.mod integration/cluster/go.sum | sha256sum | cut -c 1-16)
out=$PWD/.cache/cluster/$key/cluster
if [ ! -x "$out" ]; then
  version=$(awk '$1 == "require" && $2 == "k8s.io/kubernetes" { print $3 }' integration/cluster/go.mod)
  echo "cluster: building Kubernetes $version, which takes a while" >&2
  mkdir -p "$(dirname "$out")"
  (cd integration/cluster && CGO_ENABLED=0 nice -n 10 "$go" build -trimpath -buildvcs=false \
    -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$version" -o "$out.new" . >&2)
  mv "$out.new" "$out"
fi
echo "$out"
