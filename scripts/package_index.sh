# Real records for the demo: the package indexes of the distribution for amd64 and arm64.
#
# Sourced, not run. apt fetches and authenticates them into a folder of our own; neither the system's
# package lists nor its configuration are touched, and root is not needed.
#
#   package_index_fetch .demo/apt .demo/packages.copy     fails when there is no network (or no apt)
#
# The result is text for COPY with the columns of PACKAGE_COLUMNS: one line a package and architecture.

PACKAGE_COLUMNS="archive, package, source, version, section, priority, maintainer, homepage, tags, description"
PACKAGE_ARCHITECTURES="amd64 arm64"

# Prints "deb [...] URI SUITE main" for each architecture.
package_index_sources() {
    local ID= VERSION_CODENAME= line uri signed
    # shellcheck disable=SC1091
    . /etc/os-release
    if [ "$ID" = ubuntu ]; then
        # Ubuntu keeps its two architectures on two servers.
        signed=/usr/share/keyrings/ubuntu-archive-keyring.gpg
        echo "deb [arch=amd64 signed-by=$signed] http://archive.ubuntu.com/ubuntu $VERSION_CODENAME main universe"
        echo "deb [arch=arm64 signed-by=$signed] http://ports.ubuntu.com/ubuntu-ports $VERSION_CODENAME main universe"
        return
    fi
    # The mirror that this machine uses already.
    line=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(SIGNED_BY)' \
        'Identifier: Packages' 2>/dev/null |
        awk -v suite="$VERSION_CODENAME" '$2 == suite && $3 == "main" {print; exit}') || line=
    read -r uri _ _ signed <<<"${line:-http://deb.debian.org/debian/ $VERSION_CODENAME main}"
    case $signed in /*) ;; *) signed=/usr/share/keyrings/debian-archive-keyring.gpg ;; esac
    echo "deb [arch=${PACKAGE_ARCHITECTURES// /,} signed-by=${signed%% *}] $uri $VERSION_CODENAME main"
}

# An apt configuration that reads and writes below $1 only, but goes through the proxy of this machine.
package_index_config() {
    local dir=$1 architecture
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/none"
    : >"$dir/status"
    package_index_sources >"$dir/sources.list"
    {
        apt-config dump | grep '^Acquire::' | grep -v '^Acquire::\(IndexTargets\|Languages\)'
        printf '%s\n' "Dir::Etc::main \"/dev/null\";" "Dir::Etc::parts \"$dir/none\";" \
            "Dir::Etc::sourcelist \"$dir/sources.list\";" "Dir::Etc::sourceparts \"$dir/none\";" \
            "Dir::State \"$dir\";" "Dir::State::lists \"$dir/lists\";" "Dir::State::status \"$dir/status\";" \
            "Dir::Cache \"$dir/cache\";" "Dir::Log \"$dir\";" \
            "APT::Sandbox::User \"$(id -un)\";" \
            "Acquire::Languages \"none\";" "Acquire::Retries \"1\";" \
            "Acquire::http::Timeout \"15\";" "Acquire::https::Timeout \"15\";"
        for architecture in $PACKAGE_ARCHITECTURES; do echo "APT::Architectures:: \"$architecture\";"; done
    } >"$dir/apt.conf"
}

package_index_fetch() {
    local dir output=$2 architecture file
    command -v apt-get >/dev/null || return 1
    mkdir -p "$1"
    dir=$(realpath "$1")
    package_index_config "$dir"
    APT_CONFIG=$dir/apt.conf timeout 180 apt-get -q update >"$dir/log" 2>&1 || return 1
    APT_CONFIG=$dir/apt.conf apt-get indextargets --format '$(ARCHITECTURE) $(FILENAME)' \
        'Identifier: Packages' >"$dir/files" || return 1
    while read -r architecture file; do
        # cat-file, because apt keeps lists compressed in one of several ways.
        /usr/lib/apt/apt-helper cat-file "$file" | package_index_to_copy "$architecture" || return 1
    done <"$dir/files" >"$output.part"
    [ "$(wc -l <"$output.part")" -gt 1000 ] || return 1
    mv "$output.part" "$output"
}

# Debian control stanzas on stdin to lines for COPY.
package_index_to_copy() {
    awk -v archive="$1" '
        function text(key,    value) {
            if (!(key in field)) return "\\N"
            value = field[key]
            gsub(/\\/, "\\\\", value)
            gsub(/\t/, "\\t", value)
            return value
        }
        # "role::program, uitoolkit::sdl" to an array literal
        function tags(    value) {
            if (!("Tag" in field)) return "\\N"
            value = field["Tag"]
            gsub(/[ "\\{}]/, "", value)
            return "{" value "}"
        }
        function flush() {
            if ("Package" in field)
                print archive, text("Package"), text("Source"), text("Version"), text("Section"), \
                    text("Priority"), text("Maintainer"), text("Homepage"), tags(), text("Description")
            split("", field)
            key = ""
        }
        BEGIN { OFS = "\t" }
        /^$/ { flush(); next }
        /^[ \t]/ { if (key == "Tag") field[key] = field[key] $0; next }
        { at = index($0, ": "); key = substr($0, 1, at - 1); field[key] = substr($0, at + 2) }
        END { flush() }'
}

# The same columns and about as many rows without a network: SQL that fills table "packages" with
# 65,000 packages, of which 62,000 are the same for both architectures.
package_index_generator() {
    cat <<'SQL'
INSERT INTO packages (archive, package, source, version, section, priority, maintainer, homepage, tags, description)
SELECT architecture,
       format('lib%s-%s', substr(md5(n::text), 1, 6), n),
       CASE WHEN n % 4 = 0 THEN NULL ELSE format('source-%s', n / 3) END,
       format('%s.%s.%s-%s', n % 9, n % 23, n % 7, CASE WHEN n <= 62000 THEN '1' ELSE '1+' || architecture END),
       (ARRAY['admin', 'devel', 'doc', 'libs', 'net', 'python', 'science', 'utils'])[n % 8 + 1],
       CASE WHEN n % 50 = 0 THEN 'standard' ELSE 'optional' END,
       format('Maintainer %s <maintainer%s@example.org>', n % 900, n % 900),
       CASE WHEN n % 13 = 0 THEN NULL ELSE format('https://example.org/%s/', n / 3) END,
       CASE WHEN n % 2 = 0 THEN NULL ELSE ARRAY['role::program', 'area::' || n % 17] END,
       format('package number %s, %s', n, repeat(md5((n / 2)::text), 1 + n % 4))
FROM generate_series(1, 65000) AS n, unnest(ARRAY['amd64', 'arm64']) AS architecture;
SQL
}
