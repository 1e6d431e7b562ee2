# Private throw-away PostgreSQL clusters, run by an unprivileged user.
#
# Sourced, not run, after scripts/postgres.sh:
#
#   cluster_home .demo                       where clusters live; call it first
#   cluster_create source 'work_mem = 64MB'  initdb; further arguments are lines of postgresql.conf
#   cluster_start source                     free port, waits until it answers
#   cluster_psql source -c 'SELECT 1'        psql as superuser through the cluster's socket
#   cluster_url source demo                  connection URL for the sidecar
#   cluster_stop source; cluster_drop source
#
# Invariants: nothing listens but a Unix socket in a folder that only the owner (and root) can enter, and
# 127.0.0.1 with scram and a random password. A cluster that is dropped leaves nothing behind.

# The server refuses to run as root: give it to postgres then, else to whoever runs this.
cluster_owner() {
    if [ "$(id -u)" -ne 0 ]; then
        id -un
    elif id postgres >/dev/null 2>&1; then
        echo postgres
    else
        id pg_dedup_demo >/dev/null 2>&1 ||
            useradd --system --no-create-home --shell /usr/sbin/nologin pg_dedup_demo >&2
        echo pg_dedup_demo
    fi
}

as_cluster_owner() {
    if [ "$(id -u)" -eq 0 ]; then
        # From /: the owner may not be allowed into the current directory.
        (cd / && exec runuser -u "$CLUSTER_OWNER" -- "$@")
    else
        "$@"
    fi
}

# Sets CLUSTER_HOME to a folder that the owner can reach and that is short enough for socket paths:
# $1/clusters, or, below a home directory that others cannot enter, a folder in /tmp with
# $1/clusters as a symbolic link to it.
cluster_home() {
    local dir=$1/clusters real
    CLUSTER_OWNER=$(cluster_owner)
    CLUSTER_BIN=$("$(find_pg_config)" --bindir)
    mkdir -p "$1"
    if [ ! -e "$dir" ]; then
        # A link whose folder is gone (a cleaned /tmp) is in the way.
        rm -f "$dir"
        mkdir -m 0700 "$dir"
        [ "$(id -u)" -ne 0 ] || chown "$CLUSTER_OWNER" "$dir"
        real=$(realpath "$dir")
        if [ ${#real} -gt 60 ] || ! as_cluster_owner test -w "$real"; then
            rmdir "$dir"
            real=$(mktemp -d /tmp/pg-dedup-XXXXXX)
            [ "$(id -u)" -ne 0 ] || chown "$CLUSTER_OWNER" "$real"
            ln -s "$real" "$dir"
        fi
    fi
    CLUSTER_HOME=$(realpath "$dir")
}

cluster_free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        if ! (exec 9<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
}

cluster_create() {
    local name=$1 dir=$CLUSTER_HOME/$1 port
    shift
    port=$(cluster_free_port)
    as_cluster_owner mkdir -m 0700 "$dir" "$dir/socket"
    od -An -N16 -tx1 /dev/urandom | tr -d ' \n' |
        as_cluster_owner sh -c 'umask 077; cat > "$1"' sh "$dir/password"
    as_cluster_owner "$CLUSTER_BIN/initdb" -D "$dir/data" -U postgres -E UTF8 --no-locale \
        --auth-local=trust --auth-host=scram-sha-256 --pwfile="$dir/password" \
        --data-checksums --no-sync >/dev/null
    {
        printf '%s\n' "port = $port" "listen_addresses = '127.0.0.1'" \
            "unix_socket_directories = '$dir/socket'" \
            "shared_buffers = 256MB" "max_wal_size = 2GB" "fsync = on" "full_page_writes = on" \
            "log_min_messages = warning" "lc_messages = 'C'"
        [ $# -eq 0 ] || printf '%s\n' "$@"
    } | as_cluster_owner sh -c 'cat >> "$1"' sh "$dir/data/postgresql.conf"
    echo "$port" | as_cluster_owner sh -c 'cat > "$1"' sh "$dir/port"
}

cluster_start() {
    local dir=$CLUSTER_HOME/$1
    # The server outlives this shell: it must not keep the pipes of whoever called us (make's job server).
    if ! as_cluster_owner "$CLUSTER_BIN/pg_ctl" -D "$dir/data" -l "$dir/log" -w -t 60 -s start \
        </dev/null 3>&- 4>&- 5>&-; then
        as_cluster_owner tail -n 20 "$dir/log" >&2
        return 1
    fi
}

cluster_is_running() {
    [ -n "${CLUSTER_HOME:-}" ] && as_cluster_owner test -f "$CLUSTER_HOME/$1/data/postmaster.pid" &&
        as_cluster_owner "$CLUSTER_BIN/pg_ctl" -D "$CLUSTER_HOME/$1/data" status >/dev/null
}

cluster_stop() {
    ! cluster_is_running "$1" ||
        as_cluster_owner "$CLUSTER_BIN/pg_ctl" -D "$CLUSTER_HOME/$1/data" -m fast -w -s stop
}

cluster_drop() {
    cluster_stop "$1"
    as_cluster_owner rm -rf "${CLUSTER_HOME:?}/$1"
}

# Removes the folder that cluster_home made, clusters stopped first.
cluster_drop_all() {
    local name
    for name in $(as_cluster_owner ls "$CLUSTER_HOME"); do cluster_drop "$name"; done
    rmdir "$CLUSTER_HOME"
    rm -f "$1/clusters"
}

cluster_port() { as_cluster_owner cat "$CLUSTER_HOME/$1/port"; }

# The psql command line that reaches database $2 of cluster $1, as a person would type it.
cluster_psql_line() {
    echo "$CLUSTER_BIN/psql -h $CLUSTER_HOME/$1/socket -p $(cluster_port "$1") -U postgres $2"
}

cluster_url() {
    echo "postgresql://postgres@/$2?host=$CLUSTER_HOME/$1/socket&port=$(cluster_port "$1")"
}

cluster_psql() {
    local name=$1
    shift
    PGOPTIONS='' "$CLUSTER_BIN/psql" -X -q -v ON_ERROR_STOP=1 -h "$CLUSTER_HOME/$name/socket" \
        -p "$(cluster_port "$name")" -U postgres "$@"
}
