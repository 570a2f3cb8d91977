#!/usr/bin/env bash
# Looks our code up in the database of known vulnerabilities.
#
#   scripts/vuln.sh DATABASE GOVULNCHECK [ARG ...]
#
# DATABASE is a folder, a .tgz of one folder, or empty for govulncheck's own database on the network. Where that cannot
# be reached, nothing is known: it says so loudly, and the exit code is 0, because the sources are not at fault.
set -euo pipefail

db=$1
shift
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

args=()
if [ -n "$db" ]; then
  if [ -f "$db" ]; then
    tar -xzf "$db" -C "$tmp"
    db=$(dirname "$(dirname "$(find "$tmp" -path '*/index/db.json' | head -n 1)")")
  fi
  [ -f "$db/index/db.json" ] || { echo "vuln: $1 is no vulnerability database" >&2; exit 1; }
  args=(-db "file://$(cd "$db" && pwd)")
fi

# The arguments of the tool follow its name, which may be several words ("go tool ... govulncheck").
tool=()
while [ $# -gt 0 ] && [[ $1 != govulncheck ]]; do tool+=("$1"); shift; done
shift

code=0
"${tool[@]}" govulncheck ${args[@]+"${args[@]}"} "$@" >"$tmp/out" 2>"$tmp/err" || code=$?
cat "$tmp/out"
cat "$tmp/err" >&2
if [ "$code" -eq 1 ] && [ -z "$db" ] && grep -q 'fetching vulnerabilities' "$tmp/err"; then
  cat >&2 <<'NOTE'
****************************************************************
* NOT CHECKED for known vulnerabilities: govulncheck's database *
* cannot be reached. Give one with VULNDB=FOLDER or VULNDB=TGZ. *
****************************************************************
NOTE
  exit 0
fi
exit "$code"
