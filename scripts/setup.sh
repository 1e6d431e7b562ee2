#!/usr/bin/env bash
# Installs what building and testing need, and only what is missing. Run again, it does nothing.
#
#   scripts/setup.sh               make this machine ready
#   scripts/setup.sh --pg-config   print the pg_config that the other scripts use, or fail
#
# PG_CONFIG=/path/to/pg_config chooses the server; nothing is installed for it then.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/postgres.sh

RUST_VERSION=1.95
PGRX_VERSION=0.18.1

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$1"
    shift
    local line
    for line in "$@"; do printf '       %s\n' "$line" >&2; done
    exit 1
}

# True when version $1 is at least version $2.
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "installing packages needs root, and there is no sudo" "run as root: $*"
    fi
}

need_rust() {
    local found
    command -v cargo >/dev/null || die "cargo not found" \
        "install Rust $RUST_VERSION or newer with rustup, see https://rustup.rs"
    found=$(rustc --version | awk '{print $2}')
    at_least "$found" "$RUST_VERSION" || die "rustc $found is too old, $RUST_VERSION is needed" \
        "rustup toolchain install $RUST_VERSION && rustup default $RUST_VERSION"
}

is_debian() {
    [ -r /etc/os-release ] && command -v apt-get >/dev/null && command -v dpkg >/dev/null &&
        grep -qE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release
}

have_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null ||
        ldconfig -p 2>/dev/null | grep -q 'libclang[-.]' || command -v llvm-config >/dev/null
}

have_pgrx() { [ "$(cargo pgrx --version 2>/dev/null)" = "cargo-pgrx $PGRX_VERSION" ]; }

have_openssl_headers() { pkg-config --exists openssl 2>/dev/null; }

# The first supported major that apt can install.
available_major() {
    local major
    for major in $PG_MAJORS; do
        if apt-cache show "postgresql-$major" >/dev/null 2>&1 &&
            apt-cache show "postgresql-server-dev-$major" >/dev/null 2>&1; then
            echo "$major"
            return
        fi
    done
    return 1
}

# Installs packages, without the server's package creating and starting a cluster of its own on port
# 5432: a drop-in for pg_createcluster says so while apt runs and is taken away afterwards, so that
# neither the administrator's settings nor later installations change.
install_packages() {
    local dir=/etc/postgresql-common/createcluster.d status=0
    local drop_in=$dir/99-pg-dedup-migrate-setup.conf
    say "installing: $*"
    as_root mkdir -p "$dir"
    echo 'create_main_cluster = false' | as_root tee "$drop_in" >/dev/null
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >&2 ||
        status=$?
    as_root rm -f "$drop_in"
    as_root rmdir --ignore-fail-on-non-empty "$dir"
    [ "$status" -eq 0 ] || die "apt-get could not install the packages" \
        "try: apt-get update && apt-get install $*"
}

setup_debian() {
    local packages=() major
    command -v cc >/dev/null && command -v make >/dev/null || packages+=(build-essential)
    command -v pkg-config >/dev/null || packages+=(pkg-config)
    have_libclang || packages+=(libclang-dev)
    have_pgrx || have_openssl_headers || packages+=(libssl-dev)
    if [ -z "${PG_CONFIG:-}" ] && ! find_pg_config >/dev/null; then
        packages+=(postgresql)
    fi
    [ ${#packages[@]} -gt 0 ] || return 0

    say "missing: ${packages[*]}; updating the package lists"
    as_root apt-get update -q >&2 || say "apt-get update failed, going on with the lists there are"
    if [ "${packages[-1]}" = postgresql ]; then
        unset 'packages[-1]'
        major=$(available_major) || die "this release has no PostgreSQL of $PG_MAJORS" \
            "add the repository of https://wiki.postgresql.org/wiki/Apt and run this again"
        packages+=("postgresql-$major" "postgresql-server-dev-$major")
    fi
    install_packages "${packages[@]}"
}

# Not Debian: name everything that is missing at once.
check_elsewhere() {
    local missing=()
    command -v cc >/dev/null || missing+=("a C compiler (cc)")
    command -v make >/dev/null || missing+=("GNU make")
    command -v pkg-config >/dev/null || missing+=("pkg-config")
    have_libclang || missing+=("libclang with its headers (llvm/clang development package, or LIBCLANG_PATH)")
    have_pgrx || have_openssl_headers || missing+=("OpenSSL headers (openssl-devel)")
    find_pg_config >/dev/null ||
        missing+=("a PostgreSQL server, one of $PG_MAJORS, with contrib and its server headers; PG_CONFIG=/path/to/pg_config if it is not in PATH")
    [ ${#missing[@]} -eq 0 ] || die "this is not Debian or Ubuntu, and these are missing:" "${missing[@]/#/- }"
}

setup_pgrx() {
    local config=$1 major known=
    if ! have_pgrx; then
        say "installing cargo-pgrx $PGRX_VERSION (takes some minutes, once)"
        cargo install cargo-pgrx --version "$PGRX_VERSION" --locked >&2
    fi
    major=$(pg_major "$config")
    local toml=${PGRX_HOME:-$HOME/.pgrx}/config.toml
    [ -r "$toml" ] && known=$(sed -n "s/^pg$major *= *\"\(.*\)\"/\1/p" "$toml")
    # Another path to the same server is as good: what counts is the headers it names.
    if [ -n "$known" ] && [ -x "$known" ] && [ "$("$known" --version)" = "$("$config" --version)" ] &&
        [ "$("$known" --includedir-server)" = "$("$config" --includedir-server)" ]; then
        return
    fi
    say "cargo pgrx init --pg$major $config"
    cargo pgrx init "--pg$major" "$config" --no-run >&2
}

main() {
    if [ "${1:-}" = --pg-config ]; then
        find_pg_config || die "no PostgreSQL server found" "run scripts/setup.sh, or set PG_CONFIG"
        return
    fi
    need_rust
    if [ -n "${RUSTFLAGS:-}" ]; then
        die "RUSTFLAGS is set, and pgrx cannot generate the extension's SQL then" "unset RUSTFLAGS"
    fi
    if is_debian; then setup_debian; else check_elsewhere; fi
    local config
    config=$(find_pg_config) || die "no usable PostgreSQL server${PG_CONFIG:+ at $PG_CONFIG}" \
        "it must be one of $PG_MAJORS, with server binaries and headers"
    setup_pgrx "$config"
    say "ready: $("$config" --version), $(cargo pgrx --version), $(rustc --version | cut -d' ' -f1-2)"
}

main "$@"
