#!/usr/bin/env bash
# Licences, sources, bans and advisories of what we depend on, as deny.toml has it.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! cargo deny --version >/dev/null 2>&1; then
    echo "deny: skipped, cargo-deny is not installed (cargo install cargo-deny --locked)"
    exit 0
fi
cargo deny check licenses bans sources

# The advisory database comes from the network; not having it is no finding.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if cargo deny check advisories >"$log" 2>&1; then
    tail -n 1 "$log"
elif grep -q 'failed to fetch advisory database' "$log"; then
    echo "deny: advisories skipped, their database could not be fetched"
else
    cat "$log"
    exit 1
fi
