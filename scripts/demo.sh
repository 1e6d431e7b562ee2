#!/usr/bin/env bash
# The demonstration behind `make demo`: two private clusters, real records, one migration, five questions.
#
#   scripts/demo.sh          (re)create the clusters, load, migrate, show; leaves the clusters running
#   scripts/demo.sh stop     stop and remove the clusters; the downloaded indexes stay for the next time
#
# The extension has to be installed and the sidecar built: `make demo` sees to both.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/postgres.sh
. scripts/cluster.sh
. scripts/package_index.sh

HOME_DIR=.demo
DATABASE=demo
SIDECAR=${SIDECAR:-${CARGO_TARGET_DIR:-target}/release/pg-dedup-migrate}

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# Fetched once; a copy from an earlier demo does as well.
fetch_records() {
    local copy=$HOME_DIR/packages.copy
    if [ -s "$copy" ]; then
        echo "using the package indexes fetched earlier ($copy)"
    elif package_index_fetch "$HOME_DIR/apt" "$copy"; then
        echo "fetched the package indexes of amd64 and arm64 with apt"
    else
        echo "no package index to be had (no network?): generating records instead"
        rm -f "$copy"
    fi
}

create_clusters() {
    local name
    for name in source target; do cluster_drop "$name"; done
    cluster_create source
    cluster_create target "shared_preload_libraries = 'pg_dedup_migrate'"
    for name in source target; do
        cluster_start "$name"
        cluster_psql "$name" -d postgres -c "CREATE DATABASE $DATABASE"
        echo "$name: $("$CLUSTER_BIN/postgres" --version), port $(cluster_port "$name"), $CLUSTER_HOME/$name"
    done
}

load_source() {
    cluster_psql source -d "$DATABASE" <<'SQL'
CREATE TABLE packages (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    archive     text NOT NULL,
    package     text NOT NULL,
    source      text,
    version     text NOT NULL,
    section     text,
    priority    text,
    maintainer  text,
    homepage    text,
    tags        text[],
    description text
);
SQL
    if [ -s "$HOME_DIR/packages.copy" ]; then
        cluster_psql source -d "$DATABASE" -c "\\copy packages ($PACKAGE_COLUMNS) FROM '$HOME_DIR/packages.copy'"
    else
        package_index_generator | cluster_psql source -d "$DATABASE"
    fi
    cluster_psql source -d "$DATABASE" -c 'VACUUM ANALYZE packages'
    cluster_psql source -d "$DATABASE" -c \
        "SELECT archive, count(*) AS records FROM packages GROUP BY archive ORDER BY archive"
}

# The tool never creates tables: the definition travels with pg_dump.
prepare_target() {
    cluster_psql target -d "$DATABASE" -c 'CREATE EXTENSION pg_dedup_migrate'
    "$CLUSTER_BIN/pg_dump" -h "$CLUSTER_HOME/source/socket" -p "$(cluster_port source)" -U postgres \
        --schema-only --table packages "$DATABASE" | cluster_psql target -d "$DATABASE" -o /dev/null
}

migrate() {
    local command=("$SIDECAR" run
        --source "$(cluster_url source "$DATABASE")"
        --target "$(cluster_url target "$DATABASE")"
        --table public.packages
        --exclude-columns public.packages:id,archive
        --chunk-size 2MB --workers 2)
    printf '$ %s' "$SIDECAR run"
    printf ' \\\n      %s' "--source '${command[3]}'" "--target '${command[5]}'" "${command[*]:6}"
    printf '\n\n'
    "${command[@]}"
}

# Prints a query the way it is typed, then its answer.
ask() {
    printf '\n-- %s\n%s=# %s\n' "$1" "$DATABASE" "$2"
    echo "$2" | cluster_psql target -d "$DATABASE" -P pager=off -P null='∅'
}

ask_as_a_dba() {
    ask "How far is it, how fast was it?" \
        "SELECT * FROM dedup.progress \\gx"
    ask "Do the books balance?" \
        "SELECT status, count(*) AS chunks, sum(source_count) AS source, sum(inserted_count) AS inserted,
        sum(duplicate_count) AS duplicates, sum(quarantined_count) AS quarantined
   FROM dedup.checkpoints GROUP BY status;"
    ask "Which records were dropped, and in favour of which?" \
        "SELECT chunk_id, source_key, survivor FROM dedup.duplicates LIMIT 3;"
    ask "Is this record here already, where, and who brought it?" \
        "SELECT dedup.locate('packages', h), p.run_id, p.chunk_id
   FROM (SELECT dedup.content_hash(package, source, version, section, priority, maintainer, homepage, tags, description) AS h
           FROM packages WHERE package = 'postgresql-15') AS record, dedup.provenance('packages', h) AS p;"
    ask "What does the hash index know?" \
        "SELECT left(content_hash::text, 18) || '…' AS content_hash, chunk_id, target_location_uri
   FROM dedup.hash_index('packages') LIMIT 3;"
}

farewell() {
    heading "The clusters are up. Look around:"
    printf '  %s\n' "$(cluster_psql_line source "$DATABASE")" "$(cluster_psql_line target "$DATABASE")"
    printf 'Stop and remove them with:\n  make demo-stop\n'
}

stop() {
    cluster_drop_all "$HOME_DIR"
    echo "clusters stopped and removed"
}

main() {
    if [ "${1:-}" = stop ]; then
        [ -e "$HOME_DIR/clusters" ] || {
            echo "no demo is running"
            return
        }
        cluster_home "$HOME_DIR"
        stop
        return
    fi
    [ -x "$SIDECAR" ] || {
        echo "demo: $SIDECAR is missing, run: make demo" >&2
        exit 1
    }
    heading "1. Records"
    mkdir -p "$HOME_DIR"
    fetch_records
    heading "2. Two clusters, run by an unprivileged user"
    cluster_home "$HOME_DIR"
    create_clusters
    heading "3. The source"
    load_source
    prepare_target
    heading "4. The migration"
    migrate
    heading "5. Five questions, as SQL in the target"
    ask_as_a_dba
    farewell
}

main "$@"
