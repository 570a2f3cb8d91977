#!/usr/bin/env bash
# Runs every test that needs no cluster: all packages, then those with tests behind a build tag once more with that tag,
# one package at a time, since they measure real processes. Called by `make test`, which has built what they run.
#
#   scripts/test.sh [FLAG OF GO TEST ...]
set -euo pipefail
cd "$(dirname "$0")/.."

export SIGNET_BIN=$PWD/bin
tags=integration
if [ -z "${SIGNET_ENVOY:-}" ]; then
  SIGNET_ENVOY=$(ls -d "$PWD"/.cache/envoy/*/envoy 2>/dev/null | tail -n 1 || true)
fi
if [ -n "$SIGNET_ENVOY" ]; then
  export SIGNET_ENVOY
  tags=integration,envoy
else
  unset SIGNET_ENVOY
  echo 'test: there is no Envoy here; the tests that need one are left out' >&2
fi

tagged=$(grep -rlE "^//go:build .*(${tags//,/|})" --include='*_test.go' --exclude-dir=.cache . | xargs -n 1 dirname | sort -u)
set -- "$@" ./... ${tagged:+-- -count=1 -p=1 "-tags=$tags" "$@" $tagged}
exec .cache/testsum "$@"
