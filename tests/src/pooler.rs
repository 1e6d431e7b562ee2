//! A connection pooler in front of a cluster.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, SUPERUSER, free_port, owner_output, owner_try};

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running PgBouncer; stopped when dropped.
#[derive(Debug)]
pub struct Pooler {
    dir: PathBuf,
    port: u16,
}

impl Pooler {
    /// One that lends sessions of the server as `mode` says: `session` or `transaction`.
    pub fn start(cluster: &Cluster, mode: &str) -> Pooler {
        let (dir, port) = (cluster.dir().to_owned(), free_port());
        let place = dir.display();
        let settings = format!(
            "[databases]\n* = host={place} port={} user={SUPERUSER}\n[pgbouncer]\npool_mode = {mode}\nauth_type = any\nlisten_port = {port}\n\
             unix_socket_dir = {place}\nlogfile = {place}/pooler-{port}.log\npidfile = {place}/pooler-{port}.pid\n\
             ignore_startup_parameters = extra_float_digits,options\n",
            cluster.port()
        );
        let file = cluster.write_secret(&format!("pooler-{port}.ini"), &settings);
        owner_output(Command::new("/usr/sbin/pgbouncer").arg("-d").arg(file));
        // It says that it runs before it listens.
        let socket = dir.join(format!(".s.PGSQL.{port}"));
        let began = Instant::now();
        while !socket.exists() {
            assert!(began.elapsed() < PATIENCE, "{} does not appear", socket.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        Pooler { dir, port }
    }

    /// URL of a database through it.
    pub fn url(&self, database: &str) -> String {
        format!("postgresql://{SUPERUSER}@/{database}?host={}&port={}", self.dir.display(), self.port)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let pid = self.dir.join(format!("pooler-{}.pid", self.port));
        owner_try(Command::new("sh").args(["-c", "kill -QUIT $(cat \"$1\")", "sh"]).arg(pid));
    }
}
