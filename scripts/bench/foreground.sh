# What a run costs those who are at work on source and target meanwhile: pgbench's latencies, quiet, beside a run, and beside a throttled one.
# Sourced by scripts/bench.sh.

# Transactions a second that the load generator makes on each server, with two clients.
FOREGROUND_RATE=100

foreground_prepare() {
    local name
    for name in source target; do
        cluster_psql "$name" -d postgres -c 'DROP DATABASE IF EXISTS foreground WITH (FORCE)' -c 'CREATE DATABASE foreground' 2>/dev/null
        as_cluster_owner "$CLUSTER_BIN/pgbench" -h "$CLUSTER_HOME/$name/socket" -p "$(cluster_port "$name")" -U postgres -i -q -s 10 foreground >/dev/null 2>&1
    done
}

# foreground_p95 KIND SECONDS: records the 95th percentile of both servers' latencies, in ms: look-ups on the source, writes on the target.
foreground_p95() {
    local kind=$1 seconds=$2 name logs
    logs=$(as_cluster_owner mktemp -d /tmp/pg-dedup-foreground-XXXXXX)
    for name in source target; do
        local script=(-S)
        [ "$name" = source ] || script=(-N)
        as_cluster_owner "$CLUSTER_BIN/pgbench" -h "$CLUSTER_HOME/$name/socket" -p "$(cluster_port "$name")" -U postgres -n "${script[@]}" \
            -c 2 -R "$FOREGROUND_RATE" -T "$seconds" -l --log-prefix "$logs/$name" foreground >/dev/null 2>&1 &
    done
    wait
    for name in source target; do
        # client, transaction, latency in µs, …; the schedule's lag is part of what somebody waits.
        record "foreground.$name.$kind" "$(cat "$logs/$name".* | awk '{print $3 / 1000}' | sort -g | awk '{v[NR] = $1} END {print v[int(NR * 0.95)]}')"
    done
    rm -rf "$logs"
    say "foreground, $kind: source $(results "foreground.source.$kind" | tail -n 1) ms, target $(results "foreground.target.$kind" | tail -n 1) ms"
}

# foreground_beside KIND SECONDS FLAG…: the same, and a run that begins a second later; how fast that moves.
foreground_beside() {
    local kind=$1 seconds=$2 pid
    shift 2
    fresh_target dedup narrow
    (
        sleep 1
        exec_run "$@"
    ) &
    pid=$!
    (foreground_p95 "$kind" "$seconds")
    record "foreground.rate.$kind" "$(cluster_psql target -d bench -At -c "SELECT sum(read_bytes) / 1e6 / ($seconds - 1) FROM dedup.processes")"
    say "foreground, $kind: the run reads $(results "foreground.rate.$kind" | tail -n 1) MB/s"
    pkill -KILL -f "$SIDECAR run" || true
    wait "$pid" || true
}

exec_run() { side_dedup narrow "$@" >"$BENCH_DIR/log" 2>&1; }

# Quiet, beside a run that pays no heed, beside one that does, and quiet again.
bench_foreground() {
    local round
    foreground_prepare
    (foreground_p95 warm 5)
    for round in $(seq "$ROUNDS"); do
        (foreground_p95 quiet 8)
        # It is over soon.
        foreground_beside unthrottled 5 --no-throttle
        (foreground_p95 quiet 8)
        foreground_beside throttled "${FOREGROUND_SECONDS:-20}"
    done
}
