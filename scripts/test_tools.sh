#!/usr/bin/env bash
# Installs what only the tests need, and only what is missing: a browser for the page, Prometheus and its promtool for metrics and rules, a pooler for
# doctor, and script, which makes a terminal.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v promtool >/dev/null && command -v prometheus >/dev/null || missing+=(prometheus)
command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] || missing+=(pgbouncer)
command -v script >/dev/null || missing+=(bsdutils)
[ ${#missing[@]} -gt 0 ] || exit 0
command -v apt-get >/dev/null || {
    echo "test tools: these are missing: ${missing[*]}" >&2
    exit 1
}
sudo=()
[ "$(id -u)" -eq 0 ] || sudo=(sudo)
echo "test tools: installing ${missing[*]}" >&2
"${sudo[@]}" apt-get update -q >&2 || echo "test tools: apt-get update failed, going on with the lists there are" >&2
# The packages start a Prometheus and a pooler of their own unless a policy says no.
policy=/usr/sbin/policy-rc.d
made=
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
    "${sudo[@]}" chmod 755 "$policy"
    made=1
fi
status=0
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >&2 || status=$?
[ -z "$made" ] || "${sudo[@]}" rm -f "$policy"
exit "$status"
