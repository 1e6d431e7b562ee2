#!/usr/bin/env bash
# Runs the extension's own tests (#[pg_test]) inside a server: `cargo pgrx test`.
#
# pgrx installs a test build of the extension for them, so scripts/install.sh has to run afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/postgres.sh
. scripts/cluster.sh

config=$(find_pg_config)
owner=$(cluster_owner)
pgdata=$(mktemp -d /tmp/pg-dedup-tests-XXXXXX)
trap 'rm -rf "$pgdata"' EXIT
chmod 0755 "$pgdata"
mkdir "$pgdata/bin" "$pgdata/clusters"

if [ "$(id -u)" -eq 0 ]; then
    chown "$owner" "$pgdata/clusters"
    # pgrx goes through sudo for whatever it does as another user. Root needs none, and a container
    # often has none.
    cat >"$pgdata/bin/sudo" <<'SUDO'
#!/bin/sh
if [ "$1" = -u ]; then
    user=$2
    shift 2
    cd / && exec runuser -u "$user" -- env "$@"
fi
exec env "$@"
SUDO
    chmod 0755 "$pgdata/bin/sudo"
    export PATH=$pgdata/bin:$PATH
fi

cd pg_dedup_migrate
major=$(pg_major "$config")
# Not exec: the trap above has to run.
cargo pgrx test "pg$major" --no-default-features --features "pg$major" \
    --runas "$owner" --pgdata "$pgdata/clusters" "$@"
