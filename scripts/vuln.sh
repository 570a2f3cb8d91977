#!/usr/bin/env bash
# Looks our code up in the database of known vulnerabilities.
#
#   scripts/vuln.sh DATABASE [ARGUMENT OF GOVULNCHECK ...]
#
# DATABASE is a folder, a .tgz of one folder, or empty for govulncheck's own database on the network. Where that cannot
# be reached, nothing is known: it says so loudly, and the exit code is 0, because the sources are not at fault.
set -euo pipefail
cd "$(dirname "$0")/.."

given=$1
shift
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

if [ -n "$given" ]; then
  folder=$given
  if [ -f "$given" ]; then
    tar -xzf "$given" -C "$tmp"
    folder=$(find "$tmp" -path '*/index/db.json' -exec dirname {} \; | head -n 1)/..
  fi
  [ -f "$folder/index/db.json" ] || { echo "vuln: $given is no vulnerability database" >&2; exit 1; }
  set -- -db "file://$(cd "$folder" && pwd)" "$@"
fi

code=0
"${GO:-go}" tool -modfile=tools/go.mod govulncheck "$@" 2>"$tmp/err" || code=$?
cat "$tmp/err" >&2
if [ "$code" -eq 1 ] && [ -z "$given" ] && grep -q 'fetching vulnerabilities' "$tmp/err"; then
  cat >&2 <<'NOTE'
*****************************************************************
* NOT CHECKED for known vulnerabilities: govulncheck's database *
* cannot be reached. Give one with VULNDB=FOLDER or VULNDB=TGZ. *
*****************************************************************
NOTE
  exit 0
fi
exit "$code"
