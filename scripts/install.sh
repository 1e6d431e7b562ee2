#!/usr/bin/env bash
# Builds the extension in release mode and installs it into a server.
#
#   scripts/install.sh                                   the server that scripts/setup.sh chose
#   PG_CONFIG=/usr/lib/postgresql/16/bin/pg_config scripts/install.sh
#
# Uses sudo when the server's directories are not ours to write. The server has to be restarted with
# shared_preload_libraries = 'pg_dedup_migrate'; this script touches no running server.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/postgres.sh

config=$(find_pg_config) || {
    echo "install: no usable PostgreSQL server${PG_CONFIG:+ at $PG_CONFIG}, run scripts/setup.sh" >&2
    exit 1
}
major=$(pg_major "$config")
library_dir=$("$config" --pkglibdir)
extension_dir=$("$config" --sharedir)/extension

sudo_flag=()
for dir in "$library_dir" "$extension_dir"; do
    if [ ! -w "$dir" ]; then
        command -v sudo >/dev/null || {
            echo "install: $dir is not writable and there is no sudo" >&2
            exit 1
        }
        sudo_flag=(--sudo)
    fi
done

# The package must be in the current directory: cargo-pgrx looks for its control file there.
cd pg_dedup_migrate
cargo pgrx install --release --pg-config "$config" --no-default-features --features "pg$major" \
    "${sudo_flag[@]}" >&2
echo "install: $extension_dir/pg_dedup_migrate.control" >&2
echo "install: needs shared_preload_libraries = 'pg_dedup_migrate' and a restart" >&2
