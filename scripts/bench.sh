#!/usr/bin/env bash
# The benchmark behind `make bench`: pg-dedup-migrate against plain COPY, pgcopydb and the SQL everybody writes.
#
#   scripts/bench.sh                     everything, the table goes to BENCHMARKS.md
#   BENCH_ROWS=100000 scripts/bench.sh   a small one to see that it works; the table goes to .bench/BENCHMARKS.md
#   BENCH_PARTS="narrow chunks"          only these of: narrow wide claim chunks foreground
#   BENCH_ROUNDS=1                       how often each side runs (default 3)
#   BENCH_KEEP=1                         leave the clusters running in the end
#
# The extension has to be installed and the sidecar built: `make bench` sees to both. Nothing else should run meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/postgres.sh
. scripts/cluster.sh
. scripts/bench/sides.sh
. scripts/bench/report.sh
. scripts/bench/foreground.sh

FULL_ROWS=2000000
ROWS=${BENCH_ROWS:-$FULL_ROWS}
DOCUMENTS=$((ROWS / 200))
KEYS=$((ROWS * 10))
DIGESTS=$((ROWS / 6))
SMALL_CHUNKS=2000
ROUNDS=${BENCH_ROUNDS:-3}
ALL_PARTS="narrow wide claim chunks foreground"
PARTS=${BENCH_PARTS:-$ALL_PARTS}
SIDECAR=$(realpath "${SIDECAR:-${CARGO_TARGET_DIR:-target}/release/pg-dedup-migrate}")
BENCH_DIR=$PWD/.bench

SETTINGS=(
    "fsync = on" "full_page_writes = on" "shared_buffers = 2GB" "max_wal_size = 8GB" "min_wal_size = 4GB" "checkpoint_timeout = 30min"
    "work_mem = 64MB" "maintenance_work_mem = 512MB"
)

say() { printf '%s %s\n' "$(date +%T)" "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# Programs that are only measured with or against.
need_program() {
    local program=$1 package=$2
    command -v "$program" >/dev/null && return
    command -v apt-get >/dev/null || die "$program is missing, install it"
    say "installing $package"
    if [ "$(id -u)" -eq 0 ]; then
        apt-get install -y --no-install-recommends "$package" >/dev/null
    else
        sudo apt-get install -y --no-install-recommends "$package" >/dev/null
    fi
}

record() { printf '%s\t%s\n' "$1" "$2" >>"$BENCH_DIR/results"; }

create_clusters() {
    local name
    for name in source target; do cluster_drop "$name"; done
    cluster_create source "${SETTINGS[@]}"
    cluster_create target "${SETTINGS[@]}" "shared_preload_libraries = 'pg_dedup_migrate'"
    for name in source target; do cluster_start "$name"; done
}

load_source() {
    local shape=$1 rows=$2
    say "loading the source: $rows rows, $shape"
    cluster_psql source -d postgres -c "CREATE DATABASE $shape"
    cat "scripts/bench/${shape}_table.sql" "scripts/bench/${shape}_rows.sql" | cluster_psql source -d "$shape" -v rows="$rows"
    record "$shape.rows" "$rows"
}

# An empty database `bench`, nothing left to write from before.
fresh_target() {
    local name
    # A notice says that there was none.
    cluster_psql target -d postgres -c 'DROP DATABASE IF EXISTS bench WITH (FORCE)' -c 'CREATE DATABASE bench' 2>/dev/null
    side_prepare "$@"
    for name in source target; do cluster_psql "$name" -d postgres -c CHECKPOINT; done
    sync
}

# Seconds of CPU that a cluster has used, processes that have ended included.
cluster_cpu() {
    local pid
    pid=$(as_cluster_owner head -n 1 "$CLUSTER_HOME/$1/data/postmaster.pid")
    # Fields after the name in parentheses: state, parent, …; utime and stime are the 12th and 13th, those of ended
    # children follow.
    { cat /proc/[0-9]*/stat 2>/dev/null || true; } | sed -n 's/^\([0-9]*\) (.*) /\1 /p' |
        awk -v postmaster="$pid" -v hz="$(getconf CLK_TCK)" \
            '$1 == postmaster {t += $13 + $14 + $15 + $16} $3 == postmaster {t += $13 + $14} END {print t / hz}'
}

# measure NAME COMMAND…: wall-clock seconds, and CPU seconds of the client and either cluster.
measure() {
    local name=$1 source target
    local TIMEFORMAT='%R %U %S'
    shift
    source=$(cluster_cpu source)
    target=$(cluster_cpu target)
    if ! { time "$@" >"$BENCH_DIR/log" 2>&1; } 2>"$BENCH_DIR/time"; then
        cat "$BENCH_DIR/log" >&2
        die "$name failed"
    fi
    # A backend's time counts when it has ended, shortly after its client.
    sleep 1
    record "$name.seconds" "$(awk '{print $1}' "$BENCH_DIR/time")"
    record "$name.cpu_client" "$(awk '{print $2 + $3}' "$BENCH_DIR/time")"
    record "$name.cpu_source" "$(awk -v a="$(cluster_cpu source)" -v b="$source" 'BEGIN {print a - b}')"
    record "$name.cpu_target" "$(awk -v a="$(cluster_cpu target)" -v b="$target" 'BEGIN {print a - b}')"
    say "$name: $(results "$name.seconds" | tail -n 1) s"
}

# The target holds what it should, or the benchmark ends here.
check() {
    local side=$1 shape=$2 rows all distinct missing extra
    cluster_psql target -d bench -At -F ' ' -v relation="$shape" -v content="$(content_columns "$shape")" \
        -v host="$CLUSTER_HOME/source/socket" -v port="$(cluster_port source)" -v database="$shape" \
        <scripts/bench/check.sql >"$BENCH_DIR/check"
    read -r rows all distinct missing extra <"$BENCH_DIR/check"
    local expected=$all
    [ "$(side_rows "$side")" = all ] || expected=$distinct
    [ "$rows $missing $extra" = "$expected 0 0" ] ||
        die "$side, $shape: $rows rows where $expected were expected, $missing contents missing, $extra too many"
}

# Nothing of a run that was rolled back is left, in the table or in the index.
check_empty() {
    local left
    left=$(cluster_psql target -d bench -At -c "SELECT (SELECT count(*) FROM $1) + (SELECT count(*) FROM dedup.segment) + (SELECT count(*) FROM dedup.ledger_block)")
    [ "$left" = 0 ] || die "$1: $left rows are left after the rollback"
}

bench_shape() {
    local shape=$1 sides=SIDES_$1 round side
    # The first COPY into a new cluster makes WAL files that later ones find: nobody's time.
    fresh_target copy "$shape"
    side_run copy "$shape" >/dev/null
    for round in $(seq "$ROUNDS"); do
        for side in ${!sides}; do
            fresh_target "$side" "$shape"
            rm -rf "$BENCH_DIR/pgcopydb"
            measure "$shape.$side" side_run "$side" "$shape"
            if [ "$side" = dedup ]; then after_dedup "$shape"; fi
            check "$side" "$shape"
            if [ "$side" = dedup ]; then
                measure "$shape.reconcile" side_reconcile "$shape"
                measure "$shape.rollback" side_rollback
                check_empty "$shape"
            fi
        done
    done
}

# What the sidecar's run leaves to look at.
after_dedup() {
    local shape=$1 phases
    phases=$(cluster_psql target -d bench -At -F ' ' -f - <scripts/bench/phases.sql)
    say "$shape: seconds of all chunks: read fold claim write finish total: $phases"
    record "$shape.dedup.peak" "$(awk '{print $1 / 1000}' "$BENCH_DIR/peak")"
    record "$shape.phases" "$phases"
    record "$shape.bytes" "$(cluster_psql target -d bench -At -c 'SELECT sum(source_bytes) / sum(source_count) FROM dedup.checkpoints')"
    [ "$shape" != narrow ] || record index.bytes "$(cluster_psql target -d bench -At -f - <scripts/bench/index_size.sql)"
}

bench_chunks() {
    local bytes
    bytes=$(cluster_psql source -d narrow -At -c "SELECT 240 * count(*) / $SMALL_CHUNKS FROM narrow")
    fresh_target dedup narrow
    measure chunks side_dedup narrow --chunk-size "$bytes"
    check dedup narrow
    local first last count
    cluster_psql target -d bench -At -F ' ' -f - <scripts/bench/chunks.sql >"$BENCH_DIR/chunks"
    read -r first last count <"$BENCH_DIR/chunks"
    record chunks.first "$first"
    record chunks.last "$last"
    record chunks.count "$count"
}

bench_claim() {
    say "indexing $KEYS keys"
    cluster_psql target -d postgres -c 'DROP DATABASE IF EXISTS claim WITH (FORCE)' -c 'CREATE DATABASE claim' 2>/dev/null
    cluster_psql target -d claim -v keys="$KEYS" -f - <scripts/bench/claim_setup.sql
    cluster_psql target -d claim -At -F $'\t' -v keys="$KEYS" -v digests="$DIGESTS" -f - <scripts/bench/claim.sql >>"$BENCH_DIR/results"
    record claim.keys "$KEYS"
    record claim.digests "$DIGESTS"
    record claim.segments "$(cluster_psql target -d claim -At -c 'SELECT count(*) FROM dedup.segment')"
    cluster_psql target -d postgres -c 'DROP DATABASE claim'
    say "claim: $(median claim_new) and $(median claim_lookup) µs a digest"
}

clean_up() {
    local status=$?
    if [ -n "${BENCH_KEEP:-}" ]; then
        say "the clusters are left running"
    elif [ -n "${CLUSTER_HOME:-}" ]; then
        cluster_drop_all "$BENCH_DIR"
    fi
    exit "$status"
}

main() {
    [ -x "$SIDECAR" ] || die "the sidecar is missing, run: make bench"
    need_program pgcopydb pgcopydb
    need_program /usr/bin/time time
    cluster_home .bench
    : >"$BENCH_DIR/results"
    trap clean_up EXIT
    create_clusters
    local part
    for part in $PARTS; do
        case $part in
        narrow | chunks | foreground) [ -n "$(results narrow.rows)" ] || load_source narrow "$ROWS" ;;
        wide) load_source wide "$DOCUMENTS" ;;
        esac
        case $part in
        narrow | wide) bench_shape "$part" ;;
        claim) bench_claim ;;
        chunks) bench_chunks ;;
        foreground) bench_foreground ;;
        *) die "there is no part $part" ;;
        esac
    done
    local page=$BENCH_DIR/BENCHMARKS.md
    [ "$ROWS $ROUNDS $PARTS" != "$FULL_ROWS 3 $ALL_PARTS" ] || page=$PWD/BENCHMARKS.md
    report >"$page"
    cat "$page"
}

main "$@"
