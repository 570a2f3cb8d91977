#!/usr/bin/env bash
# Builds the version that was released last from this repository's history, for the tests that upgrade from it, and prints
# the folder with it: its programs in bin, its chart in chart, and what it is called in version. Where the history does not go
# back that far, as in a shallow clone, it says so and prints nothing; the tests are then skipped. Called by `make e2e`.
set -euo pipefail
cd "$(dirname "$0")/.."

# The commit. It moves on with each release.
commit=${PREVIOUS:-f75c0b25361e3535adb803e21bb8d039a55545c6}

if ! full=$(git rev-parse --quiet --verify "$commit^{commit}" 2>/dev/null); then
  echo "previous: commit $commit is not in this repository's history, so no upgrade from it is tested (git fetch --unshallow)" >&2
  exit 0
fi
dir=$PWD/.cache/previous/$full
if [ ! -e "$dir/version" ]; then
  echo "previous: building $commit" >&2
  rm -rf "$dir" "$dir.new"
  mkdir -p "$dir.new/src"
  git archive "$full" | tar -x -C "$dir.new/src"
  version=previous-${full:0:12}
  (cd "$dir.new/src" && GOFLAGS='' CGO_ENABLED=0 nice "${GO:-go}" build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$version" -o "$dir.new/bin/" \
    ./cmd/signet ./cmd/signet-ca ./cmd/signet-agent >&2)
  mv "$dir.new/src/deploy/chart/signet" "$dir.new/chart"
  rm -rf "$dir.new/src"
  echo "$version" > "$dir.new/version"
  mv "$dir.new" "$dir"
fi
echo "$dir"
