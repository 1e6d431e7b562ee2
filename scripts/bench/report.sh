# What was measured, as a page of Markdown. Sourced by scripts/bench.sh.
#
# $BENCH_DIR/results has a line for each measurement: a name and a number, tab between.

results() { awk -F '\t' -v name="$1" '$1 == name {print $2}' "$BENCH_DIR/results"; }

# The sidecar's chunk size in MB: what it says its default is.
chunk_megabytes() { "$SIDECAR" run --help | tr '\n' ' ' | sed -n 's/.*--chunk-size [^[]*\[default: \([0-9]*\)MB\].*/\1/p'; }

median() {
    results "$1" | sort -g | awk '{v[NR] = $1} END {if (NR) print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2}'
}

all_of() { results "$1" | awk -v f="$2" '{printf "%s" f, (NR > 1 ? ", " : ""), $1}'; }

# number FORMAT VALUE, or a dash where nothing was measured
number() { if [ -n "$2" ]; then printf "$1" "$2"; else printf '–'; fi; }

quotient() { if [ -n "$1" ] && [ -n "$2" ]; then awk -v a="$1" -v b="$2" 'BEGIN {print a / b}'; fi; }

# target WHAT FORMAT MEASURED COMPARISON LIMIT WORDS: one row of the table of targets
target() {
    local met=–
    [ -z "$3" ] || met=$(awk -v a="$3" -v b="$5" -v op="$4" 'BEGIN {print (op == "<=" ? a <= b : a >= b) ? "met" : "**not met**"}')
    printf '| %s | %s | %s | %s |\n' "$1" "$6" "$(number "$2" "$3")" "$met"
}

report_sides() {
    local shape=$1 side name
    printf '| %s | seconds, median | each | CPU s: client | source | target |\n|---|--:|---|--:|--:|--:|\n' "$shape"
    name=SIDES_$shape
    for side in ${!name}; do
        [ -n "$(results "$shape.$side.seconds")" ] || continue
        printf '| %s | %s | %s | %s | %s | %s |\n' "$(side_title "$side")" \
            "$(number %.2f "$(median "$shape.$side.seconds")")" "$(all_of "$shape.$side.seconds" %.2f)" \
            "$(number %.1f "$(median "$shape.$side.cpu_client")")" "$(number %.1f "$(median "$shape.$side.cpu_source")")" \
            "$(number %.1f "$(median "$shape.$side.cpu_target")")"
    done
    echo
}

report_phases() {
    printf '| read and hash | fold | claim | write, with waits for the other worker | finish: index, read-back, commit | all |\n|--:|--:|--:|--:|--:|--:|\n'
    results "$1.phases" | tail -n 1 | awk '{printf "|"; for (i = 1; i <= NF; i++) printf " %s |", $i; print ""}'
}

report_foreground() {
    local kind
    for kind in quiet unthrottled throttled; do
        printf '| %s | %s | %s | %s |\n' "$kind" "$(number %.2f "$(median "foreground.source.$kind")")" "$(number %.2f "$(median "foreground.target.$kind")")" \
            "$(number '%.1f MB/s' "$(median "foreground.rate.$kind")")"
    done
}

report_targets() {
    local dedup wide limit side
    limit=$(($(chunk_megabytes) * 2 * 3 + 100))
    dedup=$(median narrow.dedup.seconds)
    wide=$(median wide.dedup.seconds)
    printf '| what | target | measured | |\n|---|---|--:|---|\n'
    target "narrow, against pgcopydb clone" '%.2f ×' "$(quotient "$dedup" "$(median narrow.pgcopydb.seconds)")" '<=' 1 "at most 1 × its time"
    target "narrow, against two COPY pipes" '%.2f ×' "$(quotient "$dedup" "$(median narrow.copy.seconds)")" '<=' 1.35 "at most 1.35 × their time"
    target "narrow, against staging and ON CONFLICT" '%.1f × faster' "$(quotient "$(median narrow.staging.seconds)" "$dedup")" '>=' 4 "at least 4 × faster"
    target "wide, against two COPY pipes" '%.2f ×' "$(quotient "$wide" "$(median wide.copy.seconds)")" '<=' 1.2 "at most 1.2 × their time"
    target "narrow, full reconciliation against the migration" '%.2f ×' "$(quotient "$(median narrow.reconcile.seconds)" "$dedup")" '<=' 0.6 "at most 0.6 × its time"
    target "narrow, rollback in steps against the migration" '%.2f ×' "$(quotient "$(median narrow.rollback.seconds)" "$dedup")" '<=' 1 "at most 1 × its time"
    target "hash index on disk" '%.1f bytes a key' "$(median index.bytes)" '<=' 56 "at most 56 bytes a key"
    target "claim, nothing seen before" '%.3f µs a digest' "$(median claim_new)" '<=' 0.25 "at most 0.25 µs"
    target "claim, a quarter looked up among $(results claim.keys) keys in $(results claim.segments) segments" '%.3f µs a digest' \
        "$(median claim_lookup)" '<=' 0.6 "at most 0.6 µs"
    target "$(number %.0f "$(results chunks.count)") chunks: a chunk of the last 200 against the first 200" '%.2f ×' \
        "$(quotient "$(results chunks.last)" "$(results chunks.first)")" '<=' 1.2 "at most 1.2 ×"
    for side in source target; do
        target "95th percentile of others' latency on the $side beside a throttled run" '%.2f ×' \
            "$(quotient "$(median "foreground.$side.throttled")" "$(median "foreground.$side.quiet")")" '<=' 1.5 "at most 1.5 × quiet"
    done
    target "sidecar's memory, narrow" '%.0f MB' "$(results narrow.dedup.peak | sort -g | tail -n 1)" '<=' "$limit" "at most $limit MB"
    target "sidecar's memory, wide" '%.0f MB' "$(results wide.dedup.peak | sort -g | tail -n 1)" '<=' "$limit" "at most $limit MB"
    echo
}

report_settings() {
    cluster_psql target -d postgres -At -c "SELECT string_agg(format('\`%s = %s\`', name, current_setting(name)), ', ' ORDER BY name) FROM pg_settings \
        WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit', 'wal_level', 'wal_compression', 'shared_buffers', 'max_wal_size', 'checkpoint_timeout', \
            'work_mem', 'maintenance_work_mem', 'autovacuum', 'data_checksums', 'pg_dedup_migrate.filter_size', 'pg_dedup_migrate.claims_size')"
}

report() {
    cat <<PAGE
# Benchmarks

Written by \`make bench\`: all sides in one run on one machine, $ROUNDS rounds, medians, the sides taking turns. Every result was
compared with the source, its distinct contents against the target's by EXCEPT both ways, and the number of rows; all were equal.

- Machine: $(awk -F ': *' '/model name/ {print $2; exit}' /proc/cpuinfo), $(nproc) cores, $(awk '/MemTotal/ {printf "%.0f GB", $2 / 1e6}' /proc/meminfo) of memory; clients and both servers share it.
- Servers: $("$CLUSTER_BIN/postgres" --version), two private clusters, the same settings for all sides, logged tables:
  $(report_settings).
- Against: $(pgcopydb --version 2>/dev/null | head -n 1), tables larger than 100 MB split; psql $("$CLUSTER_BIN/psql" --version | awk '{print $3}').
- pg-dedup-migrate: chunks of $(chunk_megabytes) MB (its default), 2 workers, rows read back and verified.
- Before each measurement: target database dropped and created, CHECKPOINT on both servers, sync. The source is in memory.

## Targets

$(report_targets)

## Narrow: $(results narrow.rows) records of $(number %.0f "$(median narrow.bytes)") bytes, a quarter of them duplicates, bigint key, five content columns

$(report_sides narrow)

The first side and the last write each content once, the others every row; only the first reads back what it wrote.
A full reconciliation of the first side took $(number %.2f "$(median narrow.reconcile.seconds)") s ($(all_of narrow.reconcile.seconds %.2f)),
taking it back in steps, after that, $(number %.2f "$(median narrow.rollback.seconds)") s ($(all_of narrow.rollback.seconds %.2f)).
Where the time of its chunks went, seconds of both workers added up, in the last round:

$(report_phases narrow)

## Wide: $(results wide.rows) documents of 33 KB, half of them incompressible

$(report_sides wide)

A full reconciliation took $(number %.2f "$(median wide.reconcile.seconds)") s ($(all_of wide.reconcile.seconds %.2f)), a rollback
$(number %.2f "$(median wide.rollback.seconds)") s ($(all_of wide.rollback.seconds %.2f)).

## Beside others

pgbench with two clients and $FOREGROUND_RATE transactions a second on each server, look-ups on the source and writes on the target, while narrow records are migrated:

| pgbench, 95th percentile in ms | source | target | the run reads |
|---|--:|--:|--:|
$(report_foreground)

## How the rest was measured

- Index: \`pg_total_relation_size\` of \`dedup.segment\` and \`dedup.segment_block\`, over the entries, after a narrow run.
- Claim: $(results claim.digests) sorted digests at once, the server's clock before and after \`dedup.claim\`, five times on a warm filter, median; each rolled back.
- Many chunks: \`verified_at - started_at\` of a narrow run cut small: $(number %.1f "$(awk -v s="$(results chunks.first)" 'BEGIN {print s * 1000}')") ms a chunk at first, $(number %.1f "$(awk -v s="$(results chunks.last)" 'BEGIN {print s * 1000}')") ms in the end, $(number %.1f "$(results chunks.seconds)") s in all.
- Memory: peak resident set of the sidecar, the largest of all rounds; the bound is chunk size × workers × 3 + 100 MB.
PAGE
}
