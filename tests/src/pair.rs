//! A source and a target cluster with one database each: what nearly every test begins with.

use crate::cluster::{Cluster, PRELOAD};
use crate::db::Db;
use crate::sidecar::Invocation;

/// Name of the database on either side.
pub const DATABASE: &str = "it";

/// Two clusters and a connection to each.
pub struct Pair {
    /// Where records come from: a plain server.
    pub source_cluster: Cluster,
    /// Where they go: a server with the extension preloaded.
    pub target_cluster: Cluster,
    /// Connection to the source.
    pub source: Db,
    /// Connection to the target; the extension is created.
    pub target: Db,
}

impl Pair {
    /// Starts both.
    pub async fn start() -> Self {
        Pair::start_with(&[]).await
    }

    /// Starts both, the target with further lines of `postgresql.conf`.
    pub async fn start_with(target_settings: &[&str]) -> Self {
        let mut settings = vec![PRELOAD];
        settings.extend_from_slice(target_settings);
        let source_cluster = Cluster::start(&[]);
        let target_cluster = Cluster::start(&settings);
        for cluster in [&source_cluster, &target_cluster] {
            Db::connect(cluster, "postgres").await.exec(&format!("CREATE DATABASE {DATABASE}")).await;
        }
        let source = Db::connect(&source_cluster, DATABASE).await;
        let target = Db::connect(&target_cluster, DATABASE).await;
        target.exec("CREATE EXTENSION pg_dedup_migrate").await;
        Pair { source_cluster, target_cluster, source, target }
    }

    /// Runs the same statements on both sides: for table definitions.
    pub async fn both(&self, sql: &str) {
        self.source.exec(sql).await;
        self.target.exec(sql).await;
    }

    /// `pg-dedup-migrate COMMAND --source … --target …`.
    pub fn sidecar(&self, command: &str) -> Invocation {
        Invocation::new(command)
            .arg("--source")
            .arg(self.source_cluster.url(DATABASE))
            .arg("--target")
            .arg(self.target_cluster.url(DATABASE))
    }

    /// `run` of some tables. How busy the machine of the tests is decides about no test: no heed is paid to signals.
    pub fn run(&self, tables: &[&str]) -> Invocation {
        self.throttled_run(tables).arg("--no-throttle")
    }

    /// The same, throttled. Nor does the room on its disks decide about a test.
    pub fn throttled_run(&self, tables: &[&str]) -> Invocation {
        let run = self.sidecar("run").args(&["--disk-floor", "0"]);
        tables.iter().fold(run, |run, table| run.arg("--table").arg(*table))
    }

    /// `run --resume last`.
    pub fn resume(&self) -> Invocation {
        self.sidecar("run").arg("--resume").arg("last")
    }

    /// `reconcile last`.
    pub fn reconcile(&self) -> Invocation {
        self.sidecar("reconcile").arg("last")
    }

    /// `repair last`.
    pub fn repair(&self) -> Invocation {
        self.sidecar("repair").arg("last")
    }

    /// `pg-dedup-migrate COMMAND --target …`.
    pub fn sidecar_on_target(&self, command: &str) -> Invocation {
        Invocation::new(command).args(&["--target", &self.target_cluster.url(DATABASE)])
    }

    /// `rollback RUN --yes`.
    pub fn rollback(&self, run: &str) -> Invocation {
        self.sidecar_on_target("rollback").args(&[run, "--yes"])
    }

    /// Dumps the target's database and restores it into another one of the same server, `restored`.
    pub async fn restored(&self) -> Db {
        let file = self.target_cluster.dir().join("dump");
        let file = file.to_string_lossy();
        self.target_cluster.program("pg_dump", &["-Fc", "-f", &file, DATABASE]);
        self.target.exec("CREATE DATABASE restored").await;
        self.target_cluster.program("pg_restore", &["-d", "restored", "--exit-on-error", &file]);
        Db::connect(&self.target_cluster, "restored").await
    }

    /// A further connection to the target.
    pub async fn target_again(&self) -> Db {
        Db::connect(&self.target_cluster, DATABASE).await
    }

    /// Reconnects to the target after a restart.
    pub async fn reconnect_target(&mut self) {
        self.target = self.target_again().await;
    }
}
