//! What is to be done: flags and a TOML file merged, flags winning.
//!
//! ```toml
//! source = "postgresql://reader@old.example/shop"
//! target = "postgresql://loader@new.example/shop"
//! workers = 4
//! chunk_size = "25MB"
//!
//! [[table]]
//! source = "public.orders"
//! target = "public.orders_new"
//! content_columns = ["customer", "total"]
//! where = "created_at >= '2020-01-01'"
//! transforms = { email = "lower(email)" }
//! ```

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cli::{
    DoctorArgs, EndpointArgs, FileArgs, ObserveArgs, PurgeArgs, ReconcileArgs, RepairArgs, ReportArgs,
    RollbackArgs, RunArgs, ServeArgs, StatusArgs, TableArgs, Verify, WorkArgs,
};
use crate::error::{Error, Result};
use crate::names::{self, TableName};

/// Bytes a chunk unless told otherwise.
pub const DEFAULT_CHUNK_BYTES: u64 = 25_000_000;
/// Workers a process unless told otherwise.
pub const DEFAULT_WORKERS: u16 = 2;
/// Refused records a chunk unless told otherwise.
pub const DEFAULT_ERROR_BUDGET: u64 = 10_000;

/// How one table is migrated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TableOptions {
    /// Content columns by name; `None`: the default rule.
    pub content_columns: Option<Vec<String>>,
    /// Columns left out of the content.
    pub exclude_columns: Option<Vec<String>>,
    /// Key columns of the target; `None`: the extension chooses.
    pub key_columns: Option<Vec<String>>,
    /// SQL condition on the source.
    pub filter: Option<String>,
    /// Target column → SQL expression on the source.
    pub transforms: BTreeMap<String, String>,
}

/// How a run is throttled, as it is stored with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ThrottleOptions {
    /// Not by signals.
    #[serde(skip_serializing_if = "is_false")]
    pub off: bool,
    /// Bytes a second that it is never slowed below; none: 1 MB.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "bytes")]
    pub min_rate: Option<u64>,
    /// Bytes a second that it never reads above.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "bytes")]
    pub max_rate: Option<u64>,
    /// SQL on the target: above 0 means back off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
}

/// What a run raises alerts about, as it is stored with it; what is not said here the extension knows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AlertOptions {
    /// Seconds that the run may take.
    #[serde(
        rename(serialize = "deadline_seconds", deserialize = "deadline"),
        skip_serializing_if = "Option::is_none",
        deserialize_with = "seconds"
    )]
    pub deadline_seconds: Option<u64>,
    /// Bytes an hour.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "bytes")]
    pub min_throughput: Option<u64>,
    /// Part of the attempts at chunks that may fail before an alert is raised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_rate: Option<f64>,
    /// Part of them that may fail before the run pauses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_limit: Option<f64>,
    /// Bytes that must stay free on every file system of the target.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "bytes")]
    pub disk_floor: Option<u64>,
}

impl AlertOptions {
    fn check(&self) -> Result<()> {
        for (name, part) in [("failure_rate", self.failure_rate), ("failure_limit", self.failure_limit)] {
            if part.is_some_and(|part| !(part > 0.0 && part <= 1.0)) {
                return Err(Error::usage(format!("{name} is a fraction: above 0 and at most 1")));
            }
        }
        Ok(())
    }
}

fn seconds<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text)
        .map(|duration| Some(duration.as_secs()))
        .map_err(serde::de::Error::custom)
}

fn is_false(value: &bool) -> bool {
    !value
}

fn bytes<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u64>, D::Error> {
    match Option::<Size>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Size::Bytes(bytes)) => Ok(Some(bytes)),
        Some(Size::Text(text)) => parse_bytes(&text).map(Some).map_err(serde::de::Error::custom),
    }
}

/// A job as a person described it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Job {
    /// Connection string of the source; the environment fills in what it leaves out.
    pub source: String,
    /// Connection string of the target.
    pub target: String,
    /// The target that this one stands for, in a run into a staging database.
    pub stands_for: Option<String>,
    /// Tables named one by one: source, target.
    pub tables: Vec<(TableName, TableName)>,
    /// Source schemas taken whole.
    pub schemas: Vec<String>,
    /// Options by source table.
    pub options: BTreeMap<TableName, TableOptions>,
    /// Name for the run.
    pub name: Option<String>,
    /// Workers in this process.
    pub workers: u16,
    /// Bytes a chunk.
    pub chunk_bytes: u64,
    /// Refused records a chunk; `None`: as the run has it.
    pub error_budget: Option<u64>,
    /// When what was written is read back; `None`: as the run has it.
    pub verify: Option<Verify>,
    /// Seconds a lease lasts without a heartbeat; `None`: the extension's default.
    pub lease_seconds: Option<u32>,
    /// Whether rows that stand in a target are hashed before the first chunk.
    pub index_existing: bool,
    /// How the run is throttled.
    pub throttle: ThrottleOptions,
    /// What it raises alerts about.
    pub alerts: AlertOptions,
    /// Days that it can be rolled back; `None`: the extension's default.
    pub bake_in_days: Option<u32>,
    /// Where the process can be looked at.
    pub metrics_addr: Option<SocketAddr>,
    /// JSON on standard output.
    pub json: bool,
}

impl Job {
    /// The job of `run`.
    pub fn of_run(args: &RunArgs) -> Result<Job> {
        let mut file = FileConfig::load_for(&args.file, &args.endpoints, args.workers)?;
        file.chunk_size = args.chunk_size.clone().map(Size::Text).or(file.chunk_size);
        file.error_budget = args.error_budget.or(file.error_budget);
        file.verify = args.verify.or(file.verify);
        file.lease_seconds = args.lease_seconds.or(file.lease_seconds);
        file.name = args.name.clone().or(file.name);
        if args.no_index_existing {
            file.index_existing = Some(false);
        }
        let size = |text: &Option<String>| text.as_deref().map(parse_bytes).transpose();
        file.throttle.off |= args.no_throttle;
        file.throttle.min_rate = size(&args.min_rate)?.or(file.throttle.min_rate);
        file.throttle.max_rate = size(&args.max_rate)?.or(file.throttle.max_rate);
        file.throttle.query = args.throttle_query.clone().or(file.throttle.query);
        file.alerts.deadline_seconds =
            args.deadline.map(|deadline| deadline.as_secs()).or(file.alerts.deadline_seconds);
        file.alerts.min_throughput = size(&args.min_throughput)?.or(file.alerts.min_throughput);
        file.alerts.failure_limit = args.failure_limit.or(file.alerts.failure_limit);
        file.alerts.disk_floor = size(&args.disk_floor)?.or(file.alerts.disk_floor);
        file.bake_in_days = args.bake_in_days.or(file.bake_in_days);
        file.metrics_addr = args.observe.metrics_addr.or(file.metrics_addr);
        let mut job = file.into_job()?;
        job.apply_tables(&args.tables)?;
        job.json = args.file.json;
        if let Some(staging) = &args.staging {
            job.stands_for = Some(std::mem::replace(&mut job.target, staging.clone()));
        }
        if args.resume.is_none() && job.tables.is_empty() && job.schemas.is_empty() {
            return Err(Error::usage("no tables to migrate").hint("use --table or --schema"));
        }
        Ok(job)
    }

    /// The job of `work`.
    pub fn of_work(args: &WorkArgs) -> Result<Job> {
        let mut file = FileConfig::load_for(&args.file, &args.endpoints, args.workers)?;
        file.metrics_addr = args.observe.metrics_addr.or(file.metrics_addr);
        file.error_budget = args.error_budget.or(file.error_budget);
        let mut job = file.into_job()?;
        job.json = args.file.json;
        Ok(job)
    }

    /// The job of `reconcile`.
    pub fn of_reconcile(args: &ReconcileArgs) -> Result<Job> {
        Job::on_both(&args.file, &args.endpoints, args.workers, &args.observe)
    }

    /// The job of `repair`.
    pub fn of_repair(args: &RepairArgs) -> Result<Job> {
        Job::on_both(&args.file, &args.endpoints, args.workers, &args.observe)
    }

    fn on_both(
        file_args: &FileArgs,
        endpoints: &EndpointArgs,
        workers: Option<u16>,
        observe: &ObserveArgs,
    ) -> Result<Job> {
        let mut file = FileConfig::load_for(file_args, endpoints, workers)?;
        file.metrics_addr = observe.metrics_addr.or(file.metrics_addr);
        let mut job = file.into_job()?;
        job.json = file_args.json;
        Ok(job)
    }

    /// The job of `rollback`: only the target matters.
    pub fn of_rollback(args: &RollbackArgs) -> Result<Job> {
        let mut job = Job::on_target(&args.file, args.target.as_ref(), args.workers)?;
        job.metrics_addr = args.observe.metrics_addr.or(job.metrics_addr);
        Ok(job)
    }

    /// The job of `status`: only the target matters.
    pub fn of_status(args: &StatusArgs) -> Result<Job> {
        Job::on_target(&args.file, args.target.as_ref(), None)
    }

    /// The job of `serve`: only the target matters, and where it is served.
    pub fn of_serve(args: &ServeArgs) -> Result<Job> {
        let mut job = Job::on_target(&args.file, args.target.as_ref(), None)?;
        job.metrics_addr = args.observe.metrics_addr.or(job.metrics_addr);
        if job.metrics_addr.is_none() {
            return Err(Error::usage("nowhere to serve at").hint("--metrics-addr 127.0.0.1:9187"));
        }
        Ok(job)
    }

    /// The job of `report`: only the target matters.
    pub fn of_report(args: &ReportArgs) -> Result<Job> {
        Job::on_target(&args.file, args.target.as_ref(), None)
    }

    /// The job of `purge`: only the target matters.
    pub fn of_purge(args: &PurgeArgs) -> Result<Job> {
        Job::on_target(&args.file, args.target.as_ref(), None)
    }

    fn on_target(file_args: &FileArgs, target: Option<&String>, workers: Option<u16>) -> Result<Job> {
        let mut file = FileConfig::load(file_args)?;
        file.target = target.cloned().or(file.target);
        file.workers = workers.or(file.workers);
        let mut job = file.into_job()?;
        job.json = file_args.json;
        Ok(job)
    }

    /// The job of `doctor`.
    pub fn of_doctor(args: &DoctorArgs) -> Result<Job> {
        let mut file = FileConfig::load_for(&args.file, &args.endpoints, args.workers)?;
        file.chunk_size = args.chunk_size.clone().map(Size::Text).or(file.chunk_size);
        let mut job = file.into_job()?;
        job.apply_tables(&args.tables)?;
        job.json = args.file.json;
        Ok(job)
    }

    /// Options of one source table.
    pub fn options_of(&self, source: &TableName) -> TableOptions {
        self.options.get(source).cloned().unwrap_or_default()
    }

    fn apply_tables(&mut self, args: &TableArgs) -> Result<()> {
        for text in &args.tables {
            let (source, target) = names::parse_pair(text)?;
            self.tables.retain(|(known, _)| *known != source);
            self.tables.push((source, target));
        }
        for text in &args.schemas {
            let schema = names::parse_ident(text)?;
            if !self.schemas.contains(&schema) {
                self.schemas.push(schema);
            }
        }
        for text in &args.content_columns {
            let (table, columns) = names::parse_table_columns(text)?;
            self.options.entry(table).or_default().content_columns = Some(columns);
        }
        for text in &args.exclude_columns {
            let (table, columns) = names::parse_table_columns(text)?;
            self.options.entry(table).or_default().exclude_columns = Some(columns);
        }
        for text in &args.key_columns {
            let (table, columns) = names::parse_table_columns(text)?;
            self.options.entry(table).or_default().key_columns = Some(columns);
        }
        for text in &args.filters {
            let (table, sql) = names::parse_table_sql(text)?;
            self.options.entry(table).or_default().filter = Some(sql);
        }
        for text in &args.transforms {
            let (table, column, sql) = names::parse_table_transform(text)?;
            self.options.entry(table).or_default().transforms.insert(column, sql);
        }
        self.check()
    }

    fn check(&self) -> Result<()> {
        for (table, options) in &self.options {
            if options.content_columns.is_some() && options.exclude_columns.is_some() {
                return Err(Error::usage(format!(
                    "content columns and excluded columns are both given for {table}"
                )));
            }
            let named = self.tables.iter().any(|(source, _)| source == table);
            if !named && !self.schemas.contains(&table.schema) {
                return Err(Error::usage(format!("options are given for {table}, which is not migrated"))
                    .hint("name it with --table"));
            }
        }
        Ok(())
    }
}

/// The TOML file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileConfig {
    source: Option<String>,
    target: Option<String>,
    name: Option<String>,
    workers: Option<u16>,
    chunk_size: Option<Size>,
    error_budget: Option<u64>,
    verify: Option<Verify>,
    lease_seconds: Option<u32>,
    index_existing: Option<bool>,
    bake_in_days: Option<u32>,
    metrics_addr: Option<SocketAddr>,
    #[serde(default)]
    throttle: ThrottleOptions,
    #[serde(default)]
    alerts: AlertOptions,
    #[serde(default)]
    schemas: Vec<String>,
    #[serde(default, rename = "table")]
    tables: Vec<FileTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileTable {
    source: TableName,
    target: Option<TableName>,
    content_columns: Option<Vec<String>>,
    exclude_columns: Option<Vec<String>>,
    key_columns: Option<Vec<String>>,
    #[serde(rename = "where")]
    filter: Option<String>,
    #[serde(default)]
    transforms: BTreeMap<String, String>,
}

/// A size: a number of bytes, or text with a unit.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Size {
    Bytes(u64),
    Text(String),
}

impl FileConfig {
    fn load(args: &FileArgs) -> Result<FileConfig> {
        match &args.config {
            Some(path) => FileConfig::read(path),
            None => Ok(FileConfig::default()),
        }
    }

    /// The file with what most commands say by flags, too.
    fn load_for(args: &FileArgs, endpoints: &EndpointArgs, workers: Option<u16>) -> Result<FileConfig> {
        let mut file = FileConfig::load(args)?;
        file.source = endpoints.source.clone().or(file.source);
        file.target = endpoints.target.clone().or(file.target);
        file.workers = workers.or(file.workers);
        Ok(file)
    }

    fn read(path: &Path) -> Result<FileConfig> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::usage(format!("can't read {}: {e}", path.display())))?;
        FileConfig::parse(&text).map_err(|e| e.detail(format!("in {}", path.display())))
    }

    fn parse(text: &str) -> Result<FileConfig> {
        // The parser's full message would quote the line, which may hold a password.
        toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
            Error::usage(format!("configuration file, line {line}: {}", e.message()))
        })
    }

    fn into_job(self) -> Result<Job> {
        let workers = self.workers.unwrap_or(DEFAULT_WORKERS);
        if workers == 0 {
            return Err(Error::usage("at least one worker is needed"));
        }
        let chunk_bytes = match self.chunk_size {
            None => DEFAULT_CHUNK_BYTES,
            Some(Size::Bytes(bytes)) => bytes,
            Some(Size::Text(text)) => parse_bytes(&text)?,
        };
        if !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&chunk_bytes) {
            return Err(
                Error::usage(format!("chunk size {chunk_bytes} is out of range")).hint("between 1kB and 2GB")
            );
        }
        if self.lease_seconds.is_some_and(|seconds| !(10..=86_400).contains(&seconds)) {
            return Err(Error::usage("lease_seconds is out of range").hint("between 10 and 86400"));
        }
        let throttle = self.throttle;
        if throttle.min_rate == Some(0) || throttle.max_rate == Some(0) {
            return Err(Error::usage("a rate of 0 is no rate").hint("dedup.pause_run stops a run"));
        }
        if let (Some(least), Some(most)) = (throttle.min_rate, throttle.max_rate)
            && least > most
        {
            return Err(Error::usage("the least rate is above the highest"));
        }
        self.alerts.check()?;
        let mut job = Job {
            throttle,
            alerts: self.alerts,
            bake_in_days: self.bake_in_days,
            metrics_addr: self.metrics_addr,
            source: self.source.unwrap_or_default(),
            target: self.target.unwrap_or_default(),
            schemas: self.schemas,
            name: self.name,
            workers,
            chunk_bytes,
            error_budget: self.error_budget,
            verify: self.verify,
            lease_seconds: self.lease_seconds,
            index_existing: self.index_existing.unwrap_or(true),
            ..Job::default()
        };
        for table in self.tables {
            let target = table.target.unwrap_or_else(|| table.source.clone());
            let options = TableOptions {
                content_columns: table.content_columns,
                exclude_columns: table.exclude_columns,
                key_columns: table.key_columns,
                filter: table.filter,
                transforms: table.transforms,
            };
            if job.options.insert(table.source.clone(), options).is_some() {
                return Err(Error::usage(format!(
                    "{} is named twice in the configuration file",
                    table.source
                )));
            }
            job.tables.push((table.source, target));
        }
        job.check()?;
        Ok(job)
    }
}

/// Smallest chunk accepted; below this the work around a chunk dwarfs the chunk.
const MIN_CHUNK_BYTES: u64 = 1_000;
/// Largest chunk accepted: a chunk is held in memory.
const MAX_CHUNK_BYTES: u64 = 2_000_000_000;

/// Reads `100MB`, `64 kB`, `1GiB` or a plain number of bytes. MB is 10⁶, MiB 2²⁰.
pub fn parse_bytes(text: &str) -> Result<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(bad_size(text)),
    };
    let number: f64 = number.parse().map_err(|_| bad_size(text))?;
    Ok((number * factor).round() as u64)
}

fn bad_size(text: &str) -> Error {
    Error::usage(format!("can't read \"{text}\" as a size")).hint("for example 100MB")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_bytes("100MB").unwrap(), 100_000_000);
        assert_eq!(parse_bytes(" 1.5 GiB ").unwrap(), 1_610_612_736);
        assert_eq!(parse_bytes("4096").unwrap(), 4096);
        for bad in ["", "MB", "1TBx", "-1", "1.2.3"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    fn run_args(flags: &[&str]) -> RunArgs {
        let cli = Cli::try_parse_from(["x", "run"].iter().chain(flags)).unwrap();
        let Command::Run(args) = cli.command else { panic!("not a run") };
        *args
    }

    #[test]
    fn flags_fill_a_job() {
        let job = Job::of_run(&run_args(&[
            "--source",
            "postgres:///a",
            "--table",
            "orders=new.orders",
            "--content-columns",
            "orders:a,B",
            "--where",
            "orders:a > 0",
            "--transform",
            "orders:c=lower(c)",
            "--chunk-size",
            "1MB",
        ]))
        .unwrap();
        let orders = TableName::new("public", "orders");
        assert_eq!(job.tables, [(orders.clone(), TableName::new("new", "orders"))]);
        let options = job.options_of(&orders);
        assert_eq!(options.content_columns.as_deref(), Some(&["a".to_owned(), "b".to_owned()][..]));
        assert_eq!(options.filter.as_deref(), Some("a > 0"));
        assert_eq!(options.transforms["c"], "lower(c)");
        assert_eq!((job.chunk_bytes, job.workers, job.error_budget), (1_000_000, 2, None));
    }

    #[test]
    fn flags_win_over_the_file() {
        let dir = std::env::temp_dir().join(format!("pg-dedup-config-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("job.toml");
        std::fs::write(
            &path,
            "source = 'postgres:///file'\nworkers = 8\nchunk_size = '5MB'\n[[table]]\nsource = 'public.t'\n\
             where = 'a = 1'\ntransforms = { b = 'upper(b)' }\n",
        )
        .unwrap();
        let file = path.to_str().unwrap();
        let job =
            Job::of_run(&run_args(&["--config", file, "--workers", "3", "--where", "t:a = 2"])).unwrap();
        assert_eq!((job.workers, job.chunk_bytes, job.source.as_str()), (3, 5_000_000, "postgres:///file"));
        let options = job.options_of(&TableName::new("public", "t"));
        assert_eq!(options.filter.as_deref(), Some("a = 2"));
        assert_eq!(options.transforms["b"], "upper(b)");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Job::of_run(&run_args(&[])).is_err());
        assert!(Job::of_run(&run_args(&["--table", "t", "--where", "u:a"])).is_err());
        assert!(Job::of_run(&run_args(&["--table", "t", "--workers", "0"])).is_err());
        assert!(Job::of_run(&run_args(&["--table", "t", "--chunk-size", "1"])).is_err());
        let both = ["--table", "t", "--content-columns", "t:a", "--exclude-columns", "t:b"];
        assert!(Job::of_run(&run_args(&both)).is_err());
        let told = FileConfig::parse("target = 'postgres://u:secret@h/d'\nbogus = 1\n").unwrap_err();
        assert!(told.message.contains("line 2") && !told.report().contains("secret"), "{}", told.report());
    }
}
