# Which PostgreSQL server the scripts build for, install into and start.
#
# Sourced, not run. Functions answer on stdout and say nothing else.

# Oldest and newest server the extension is built for, in order of preference.
PG_MAJORS="15 16 17 18"

# True when $1 is the pg_config of a server we support, with binaries and headers.
pg_config_is_usable() {
    local config=$1 major
    [ -x "$config" ] || return 1
    major=$(pg_major "$config") || return 1
    case " $PG_MAJORS " in *" $major "*) ;; *) return 1 ;; esac
    [ -x "$("$config" --bindir)/postgres" ] && [ -f "$("$config" --includedir-server)/postgres.h" ]
}

# 15 for "PostgreSQL 15.20 (Debian 15.20-0+deb12u1)".
pg_major() {
    "$1" --version 2>/dev/null | sed -n 's/^PostgreSQL \([0-9][0-9]*\).*/\1/p'
}

# Path of the pg_config to use: $PG_CONFIG if set, else Debian's by preference, else the one in PATH.
find_pg_config() {
    local major candidate
    if [ -n "${PG_CONFIG:-}" ]; then
        candidate=$(command -v "$PG_CONFIG") && pg_config_is_usable "$candidate" && echo "$candidate"
        return
    fi
    for major in $PG_MAJORS; do
        # Not /usr/bin/pg_config: on Debian that answers for the newest headers installed.
        candidate=/usr/lib/postgresql/$major/bin/pg_config
        if pg_config_is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    candidate=$(command -v pg_config) && pg_config_is_usable "$candidate" && echo "$candidate"
}
