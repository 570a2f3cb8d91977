#!/usr/bin/env bash
# Builds the parts of a real Kubernetes (integration/cluster) from their Go modules, once for each version of its sources,
# and prints the path of the program that is all of them but the cluster's DNS, which lies beside it as "dns". The first
# build takes 10 to 15 minutes on two cores and about 4 GB of Go's cache; it runs at low priority. Called by `make e2e`.
#
# With an argument, "nodes", it also sees to what containers need of the system: where packages are missing, root on a
# Debian gets them by apt, and anybody else is told their names. With "built" nothing is built: it prints nothing where nothing is.
set -euo pipefail
cd "$(dirname "$0")/.."

nodes() {
  if [ "$(uname -s)" != Linux ] || [ "$(id -u)" != 0 ]; then
    echo 'cluster: nodes that run pods need Linux and root; `make e2e NODES=skip` tests with the control plane alone' >&2
    return 1
  fi
  local missing=()
  want() { # PACKAGE FILE|COMMAND ...: the package is missing if none of these is there
    local package=$1 what
    shift
    for what; do command -v "$what" >/dev/null && return 0; done
    missing+=("$package")
  }
  want containerd containerd
  want runc runc
  want containernetworking-plugins /usr/lib/cni/ptp /opt/cni/bin/ptp
  want iptables iptables
  want conntrack conntrack
  want nftables nft
  want iproute2 ip
  want util-linux nsenter
  if [ ${#missing[@]} -eq 0 ]; then return 0; fi
  if ! command -v apt-get >/dev/null; then
    echo "cluster: nodes that run pods need what Debian calls: ${missing[*]}; or \`make e2e NODES=skip\`" >&2
    return 1
  fi
  echo "cluster: installing ${missing[*]}" >&2
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"; } >&2
}

if [ "${1:-}" = nodes ]; then nodes; fi

go=${GO:-go}
key=$(cat integration/cluster/{,dns/}{*.go,go.mod,go.sum} | sha256sum | cut -c 1-16)
dir=$PWD/.cache/cluster/$key

if [ "${1:-}" = built ]; then
  if [ -x "$dir/cluster" ]; then echo "$dir/cluster"; fi
  exit
fi

build() { # FOLDER NAME [FLAG ...]
  local folder=$1 out=$dir/$2
  shift 2
  if [ -x "$out" ]; then return 0; fi
  mkdir -p "$dir"
  (cd "$folder" && CGO_ENABLED=0 nice -n 10 "$go" build -trimpath -buildvcs=false "$@" -o "$out.new" . >&2)
  mv "$out.new" "$out"
}

version=$(awk '$1 == "require" && $2 == "k8s.io/kubernetes" { print $3 }' integration/cluster/go.mod)
if [ ! -x "$dir/cluster" ] || [ ! -x "$dir/dns" ]; then
  echo "cluster: building Kubernetes $version, which takes a while" >&2
fi
build integration/cluster cluster -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$version"
build integration/cluster/dns dns -ldflags '-s -w'
echo "$dir/cluster"
