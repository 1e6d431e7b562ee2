//! Private throw-away PostgreSQL clusters.
//!
//! Every test starts its own: a copy of one initdb'ed template, a socket in a short private path, a free
//! port on 127.0.0.1 behind a password. The server refuses to run as root, so root hands it to the user
//! `postgres`. Clusters end with the value that owns them; should the test process die first, a janitor
//! process notices its pipe closing, stops the servers and removes their files.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// Superuser of every cluster.
pub const SUPERUSER: &str = "postgres";
/// The superuser's password over TCP; through the socket none is asked for.
pub const PASSWORD: &str = "correct-horse-battery";

/// Settings of every cluster. Nothing of ours has to outlive the machine, so nothing is fsynced.
const SETTINGS: &str = "listen_addresses = '127.0.0.1'\nshared_buffers = 64MB\nmax_wal_size = 1GB\nfsync = off\n\
                        log_min_messages = warning\nlog_line_prefix = '%m [%p] %a '\nlc_messages = 'C'\n\
                        timezone = 'UTC'\nautovacuum_naptime = 5s\n";

/// What a target needs above [`SETTINGS`].
pub const PRELOAD: &str = "shared_preload_libraries = 'pg_dedup_migrate'";

/// How a server goes down.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// Sessions are ended, a checkpoint is written.
    Fast,
    /// As if the power had gone: recovery has to follow.
    Immediate,
}

/// The installed server and the folder that this process keeps clusters in.
struct Installation {
    bindir: PathBuf,
    root: PathBuf,
    /// Ends when its standard input does, which is when this process does.
    _janitor: Child,
}

static INSTALLATION: LazyLock<Installation> = LazyLock::new(Installation::prepare);
static NEXT: AtomicU32 = AtomicU32::new(0);

impl Installation {
    fn prepare() -> Self {
        let pg_config =
            std::env::var("PG_CONFIG").unwrap_or_else(|_| "/usr/lib/postgresql/15/bin/pg_config".to_string());
        let answer = |option: &str| {
            let output = Command::new(&pg_config).arg(option).output().unwrap_or_else(|error| {
                panic!("cannot run {pg_config}: {error}; set PG_CONFIG, or use make test")
            });
            PathBuf::from(String::from_utf8_lossy(&output.stdout).trim().to_string())
        };
        let control = answer("--sharedir").join("extension/pg_dedup_migrate.control");
        assert!(control.exists(), "{} is missing: make install first", control.display());
        let bindir = answer("--bindir");

        let root = owner_output(Command::new("mktemp").args(["-d", "/tmp/pgdm-it-XXXXXX"]));
        let root = PathBuf::from(root.trim());
        let janitor = janitor(&root);
        let template = root.join("template");
        let mut passwords = root.clone();
        passwords.push("password");
        owner_write(&passwords, PASSWORD);
        owner_output(
            Command::new(bindir.join("initdb"))
                .arg("-D")
                .arg(&template)
                .args(["-U", SUPERUSER, "-E", "UTF8", "--no-locale", "--no-sync"])
                .args(["--auth-local=trust", "--auth-host=scram-sha-256"])
                .arg(format!("--pwfile={}", passwords.display())),
        );
        Installation { bindir, root, _janitor: janitor }
    }
}

/// Stops whatever still runs below `root` and removes it, once this process is gone.
fn janitor(root: &Path) -> Child {
    let script = r#"
        cat >/dev/null
        for pidfile in "$1"/*/data/postmaster.pid; do
            [ -f "$pidfile" ] || continue
            pid=$(head -n 1 "$pidfile")
            kill -QUIT "$pid" 2>/dev/null
            for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
        done
        rm -rf "$1"
    "#;
    // A process group of its own: Ctrl-C must reach us alone.
    Command::new("sh")
        .args(["-c", script, "janitor"])
        .arg(root)
        .stdin(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start sh: {error}"))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Wraps a command so that it runs as the clusters' owner, from a directory that owner can enter.
fn as_owner(command: &Command) -> Command {
    let mut wrapped = if is_root() {
        let mut runuser = Command::new("runuser");
        runuser.args(["-u", "postgres", "--"]).arg(command.get_program());
        runuser
    } else {
        Command::new(command.get_program())
    };
    wrapped.args(command.get_args()).current_dir("/").env("LC_ALL", "C");
    wrapped
}

/// Runs a command as the clusters' owner; panics with its stderr unless it succeeds.
pub(crate) fn owner_output(command: &Command) -> String {
    let output = owner_try(command);
    assert!(
        output.status.success(),
        "{command:?} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn owner_try(command: &Command) -> Output {
    as_owner(command)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"))
}

fn owner_write(path: &Path, content: &str) {
    let mut child = as_owner(Command::new("sh").args(["-c", "cat >> \"$1\"", "sh"]).arg(path))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    let mut stdin = child.stdin.take().expect("standard input is piped");
    stdin
        .write_all(content.as_bytes())
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    drop(stdin);
    let status = child.wait().unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    assert!(status.success(), "cannot write {}: {status}", path.display());
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .unwrap_or_else(|error| panic!("no free port: {error}"))
        .port()
}

/// One running server, or one that a test has stopped. Removed when dropped.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    port: u16,
}

impl Cluster {
    /// A new cluster, started, with further lines of `postgresql.conf`.
    pub fn start(settings: &[&str]) -> Self {
        let installation = &*INSTALLATION;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = installation.root.join(number.to_string());
        owner_output(Command::new("mkdir").args(["-m", "0700"]).arg(&dir));
        owner_output(
            Command::new("cp")
                .args(["-a", "--reflink=auto"])
                .arg(installation.root.join("template"))
                .arg(dir.join("data")),
        );
        let port = free_port();
        let mut lines = format!("{SETTINGS}port = {port}\nunix_socket_directories = '{}'\n", dir.display());
        for setting in settings {
            lines.push_str(setting);
            lines.push('\n');
        }
        owner_write(&dir.join("data/postgresql.conf"), &lines);
        let cluster = Cluster { dir, port };
        cluster.start_again();
        cluster
    }

    /// Starts the server after [`Cluster::stop`]; returns when it answers.
    pub fn start_again(&self) {
        let output =
            owner_try(self.pg_ctl().args(["-w", "-t", "60", "-s", "-l"]).arg(self.log_path()).arg("start"));
        assert!(output.status.success(), "the server does not start: {}", self.log());
    }

    /// Stops the server.
    pub fn stop(&self, how: Stop) {
        let mode = match how {
            Stop::Fast => "fast",
            Stop::Immediate => "immediate",
        };
        owner_output(self.pg_ctl().args(["-w", "-s", "-m", mode, "stop"]));
    }

    /// Stops and starts the server.
    pub fn restart(&self, how: Stop) {
        self.stop(how);
        self.start_again();
    }

    /// Adds a line to `postgresql.conf`; it counts from the next start on.
    pub fn configure(&self, setting: &str) {
        owner_write(&self.dir.join("data/postgresql.conf"), &format!("{setting}\n"));
    }

    /// Makes an empty folder that the server can write to.
    pub fn make_dir(&self, name: &str) {
        owner_output(Command::new("mkdir").args(["-m", "0700"]).arg(self.dir.join(name)));
    }

    /// Writes a file that only the server's user can read; returns its path.
    pub fn write_secret(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.join(name);
        owner_output(Command::new("install").args(["-m", "0600", "/dev/null"]).arg(&path));
        owner_write(&path, content);
        path
    }

    fn pg_ctl(&self) -> Command {
        let mut command = Command::new(INSTALLATION.bindir.join("pg_ctl"));
        command.arg("-D").arg(self.dir.join("data"));
        command
    }

    /// Runs one of the server's programs (`pg_dump`, `pg_restore`, …) against this cluster as superuser.
    pub fn program(&self, name: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(INSTALLATION.bindir.join(name));
        command
            .arg("-h")
            .arg(&self.dir)
            .args(["-p", &self.port.to_string(), "-U", SUPERUSER])
            .args(arguments);
        owner_output(&command)
    }

    /// As [`Cluster::program`], with this on its standard input.
    pub fn program_fed(&self, name: &str, arguments: &[&str], input: &str) -> String {
        let file = self.write_secret("input", input);
        let mut command = Command::new("sh");
        command
            .args(["-c", "input=$1; shift; exec \"$@\" <\"$input\"", "sh"])
            .arg(file)
            .arg(INSTALLATION.bindir.join(name))
            .arg("-h")
            .arg(&self.dir)
            .args(["-p", &self.port.to_string(), "-U", SUPERUSER])
            .args(arguments);
        owner_output(&command)
    }

    /// A folder below the cluster's that both the server and [`Cluster::program`] can write to.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Port of this cluster, on 127.0.0.1 and in the name of its socket.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// URL of a database through the socket.
    pub fn url(&self, database: &str) -> String {
        format!("postgresql://{SUPERUSER}@/{database}?host={}&port={}", self.dir.display(), self.port)
    }

    /// URL of a database through TCP, with the password in it.
    pub fn tcp_url(&self, database: &str) -> String {
        format!("postgresql://{SUPERUSER}:{PASSWORD}@127.0.0.1:{}/{database}", self.port)
    }

    /// How tokio-postgres reaches a database.
    pub fn config(&self, database: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.dir).port(self.port).user(SUPERUSER).dbname(database);
        config.application_name("integration test");
        config
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The server's log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Not `stop`, which panics: the server may be down already, and a failing test is unwinding.
        owner_try(self.pg_ctl().args(["-w", "-s", "-m", "immediate", "stop"]));
        owner_try(Command::new("rm").arg("-rf").arg(&self.dir));
    }
}
