# The sides of the comparison: each moves table $1 (`narrow` or `wide`) of the source's database of the same name into
# the target's database `bench`, in its own way. Sourced by scripts/bench.sh.
#
#   side_prepare SIDE SHAPE    what has to stand in the empty target database before the clock starts
#   side_run SIDE SHAPE        what is timed
#   side_rows SIDE             whether `all` rows or the `distinct` ones are expected in the target

SIDES_narrow="dedup pgcopydb copy staging"
SIDES_wide="dedup copy"

content_columns() {
    case $1 in
    narrow) echo customer,created_at,amount,status,note ;;
    wide) echo title,body ;;
    esac
}

side_title() {
    case $1 in
    dedup) echo "pg-dedup-migrate run --workers 2" ;;
    pgcopydb) echo "pgcopydb clone, 2 table and 2 index jobs" ;;
    copy) echo "two plain COPY pipes" ;;
    staging) echo "staging table, INSERT … ON CONFLICT (digest) DO NOTHING" ;;
    esac
}

side_rows() {
    case $1 in
    dedup | staging) echo distinct ;;
    *) echo all ;;
    esac
}

side_prepare() {
    local side=$1 shape=$2
    case $side in
    pgcopydb) ;; # makes its tables itself
    *) cluster_psql target -d bench -f - <"scripts/bench/${shape}_table.sql" ;;
    esac
    case $side in
    dedup) cluster_psql target -d bench -c 'CREATE EXTENSION pg_dedup_migrate' ;;
    staging)
        cluster_psql target -d bench -c "CREATE UNLOGGED TABLE staging (LIKE $shape)" \
            -c "ALTER TABLE $shape ADD digest bytea NOT NULL" -c "CREATE UNIQUE INDEX ON $shape (digest)"
        ;;
    esac
}

side_run() { "side_$1" "$2"; }

side_dedup() {
    # Further arguments are flags. The peak of its memory, in kB, is left in a file.
    local shape=$1
    shift
    /usr/bin/time -f %M -o "$BENCH_DIR/peak" "$SIDECAR" run --source "$(cluster_url source "$shape")" --target "$(cluster_url target bench)" \
        --table "public.$shape" --content-columns "public.$shape:$(content_columns "$shape")" --workers 2 "$@"
}

# Every record and row read and hashed again, after side_dedup.
side_reconcile() {
    "$SIDECAR" reconcile last --source "$(cluster_url source "$1")" --target "$(cluster_url target bench)" --workers 2
}

# What side_dedup did is taken back.
side_rollback() {
    "$SIDECAR" rollback last --yes --target "$(cluster_url target bench)" --workers 2
}

side_pgcopydb() {
    PATH=$CLUSTER_BIN:$PATH pgcopydb clone --source "$(cluster_url source "$1")" --target "$(cluster_url target bench)" \
        --dir "$BENCH_DIR/pgcopydb" --table-jobs 2 --index-jobs 2 --split-tables-larger-than 100MB --no-owner --no-acl
}

# COPY out of the source into table $2 of the target, one connection each for either half of the keys.
copy_halves() {
    local shape=$1 into=$2 middle half pids=() status=0
    middle=$(cluster_psql source -d "$shape" -At -c "SELECT (min(id) + max(id)) / 2 FROM $shape")
    for half in "<= $middle" "> $middle"; do
        cluster_psql source -d "$shape" -c "COPY (SELECT * FROM $shape WHERE id $half) TO STDOUT (FORMAT binary)" |
            cluster_psql target -d bench -c "COPY $into FROM STDIN (FORMAT binary)" &
        pids+=($!)
    done
    for half in "${pids[@]}"; do wait "$half" || status=1; done
    return "$status"
}

side_copy() { copy_halves "$1" "$1"; }

side_staging() {
    local columns
    columns=$(content_columns "$1")
    copy_halves "$1" staging
    cluster_psql target -d bench -c "INSERT INTO $1 SELECT s.*, sha256(convert_to(ROW($columns)::text, 'UTF8')) FROM staging AS s \
        ON CONFLICT (digest) DO NOTHING"
}
