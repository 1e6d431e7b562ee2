//! The command line. A TOML file can say the same ([`crate::config`]); flags win.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

/// Migrates PostgreSQL tables into a PostgreSQL target, every distinct record exactly once, every chunk verified.
#[derive(Debug, Parser)]
#[command(name = "pg-dedup-migrate", version, propagate_version = true)]
#[command(
    after_help = "Exit codes: 0 done; 1 error; 2 usage; 3 done, with records in quarantine or rows left alone; 4 mismatches, halted; 130 interrupted."
)]
pub struct Cli {
    /// How log lines on standard error are written [default: text]
    #[arg(long, value_name = "FORMAT", global = true, default_value = "text", hide_default_value = true)]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// A JSON object a line
    Json,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Plan a run and work on it, or go on with one (--resume)
    Run(Box<RunArgs>),
    /// Join a run from another process or host
    Work(WorkArgs),
    /// Compare the sources of a run with its targets, record by record; a run with mismatches is halted
    Reconcile(ReconcileArgs),
    /// Set right what a reconciliation found, and reconcile again
    Repair(RepairArgs),
    /// Take back what a run, or one chunk of it, did to its targets
    Rollback(RollbackArgs),
    /// Show runs, or one run: progress, books, failed chunks
    Status(StatusArgs),
    /// Serve a run's metrics and page until interrupted, whoever works on it
    Serve(ServeArgs),
    /// Tell all of a run, and archive it
    Report(ReportArgs),
    /// Delete what is older than it is kept, archived, and of runs that are over
    Purge(PurgeArgs),
    /// Check everything before anything is written, and say what to change
    Doctor(DoctorArgs),
}

/// Where the flags can also be said.
#[derive(Debug, Args, Default)]
pub struct FileArgs {
    /// TOML file that says the same as the flags
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON on standard output
    #[arg(long)]
    pub json: bool,
}

/// The two servers. What a URL leaves out comes from the PG* environment variables and ~/.pgpass, as in libpq.
#[derive(Debug, Args, Default)]
pub struct EndpointArgs {
    /// Source: URL or key=value string; passwords are better in ~/.pgpass or PGPASSWORD
    #[arg(long, value_name = "URL")]
    pub source: Option<String>,
    /// Target: URL or key=value string
    #[arg(long, value_name = "URL")]
    pub target: Option<String>,
}

/// Where a process can be looked at.
#[derive(Debug, Args, Default)]
pub struct ObserveArgs {
    /// Serve metrics (/metrics), health (/healthz, /readyz) and a page (/) here, for example 127.0.0.1:9187; whoever reaches it may look
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics_addr: Option<SocketAddr>,
}

/// Which tables, and how.
#[derive(Debug, Args, Default)]
pub struct TableArgs {
    /// Table to migrate, with its target where the name differs
    #[arg(long = "table", value_name = "SOURCE[=TARGET]")]
    pub tables: Vec<String>,
    /// Migrate every table of a source schema
    #[arg(long = "schema", value_name = "SCHEMA")]
    pub schemas: Vec<String>,
    /// Columns whose equality makes two records duplicates
    #[arg(long, value_name = "TABLE:COLUMN,...")]
    pub content_columns: Vec<String>,
    /// Columns left out of that comparison
    #[arg(long, value_name = "TABLE:COLUMN,...")]
    pub exclude_columns: Vec<String>,
    /// Key to use where the target has several unique indexes
    #[arg(long, value_name = "TABLE:COLUMN,...")]
    pub key_columns: Vec<String>,
    /// Migrate only these records; SQL on the source
    #[arg(long = "where", value_name = "TABLE:SQL")]
    pub filters: Vec<String>,
    /// Compute a column on the source instead of reading it
    #[arg(long = "transform", value_name = "TABLE:COLUMN=SQL")]
    pub transforms: Vec<String>,
}

/// When what a run wrote is read back and compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// Every chunk before it commits
    #[default]
    Chunk,
    /// All chunks when everything is written, by scanning each target; until then they are syncing
    End,
}

/// Flags of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub endpoints: EndpointArgs,
    #[command(flatten)]
    pub tables: TableArgs,
    /// Name of the run (default: the source database's name)
    #[arg(long)]
    pub name: Option<String>,
    /// Workers in this process [default: 2]
    #[arg(long, value_name = "N")]
    pub workers: Option<u16>,
    /// Bytes a chunk, as the source sends them [default: 25MB]
    #[arg(long, value_name = "BYTES")]
    pub chunk_size: Option<String>,
    /// Records that may be refused in a chunk before the chunk is failed [default: 10000]
    #[arg(long, value_name = "N")]
    pub error_budget: Option<u64>,
    /// When what was written is read back [default: chunk]
    #[arg(long, value_name = "WHEN")]
    pub verify: Option<Verify>,
    /// Seconds without a heartbeat after which a worker's chunk goes to another [default: 60]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(10..=86400))]
    pub lease_seconds: Option<u32>,
    /// Go on with a run: its id, a unique prefix of it, its name, or "last"
    #[arg(long, value_name = "RUN")]
    pub resume: Option<String>,
    /// Take the rows that stand in a target as not there: don't hash them before the first chunk
    #[arg(long)]
    pub no_index_existing: bool,
    /// Bytes a second that the throttle never slows the run below [default: 1MB]
    #[arg(long, value_name = "BYTES")]
    pub min_rate: Option<String>,
    /// Bytes a second that all workers of the run read together, at most
    #[arg(long, value_name = "BYTES")]
    pub max_rate: Option<String>,
    /// SQL on the target that the throttle asks every second, too: above 0 means back off
    #[arg(long, value_name = "SQL")]
    pub throttle_query: Option<String>,
    /// Pay no heed to what source and target bear; dedup.set_rate and --max-rate still count
    #[arg(long)]
    pub no_throttle: bool,
    /// Run into this database instead, whose tables are like the target's: to see what comes of content columns, filters and transforms
    #[arg(long, value_name = "URL", conflicts_with_all = ["resume", "dry_run"])]
    pub staging: Option<String>,
    /// Write nothing: read the source, try every record, and say what the run would do, take and refuse
    #[arg(long, conflicts_with = "resume")]
    pub dry_run: bool,
    /// Of a dry run: read this fraction of the chunks only (0.05: one in twenty)
    #[arg(long, value_name = "FRACTION", default_value_t = 1.0, value_parser = fraction, requires = "dry_run")]
    pub sample: f64,
    /// How long the run may take ("24h", "90min"): an alert says when it won't be done in time; a dry run says whether it would
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub deadline: Option<Duration>,
    /// Bytes an hour below which an alert is raised [default: 100GB]
    #[arg(long, value_name = "BYTES")]
    pub min_throughput: Option<String>,
    /// Part of the attempts at chunks that may fail before the run pauses itself [default: 0.5]
    #[arg(long, value_name = "FRACTION", value_parser = fraction)]
    pub failure_limit: Option<f64>,
    /// Bytes that must stay free on every file system of the target: below it the run pauses [default: 10GB, a fiftieth of a small one]
    #[arg(long, value_name = "BYTES")]
    pub disk_floor: Option<String>,
    /// Days after its end that the run can be rolled back; then its before images may be purged [default: 14]
    #[arg(long, value_name = "DAYS")]
    pub bake_in_days: Option<u32>,
    #[command(flatten)]
    pub observe: ObserveArgs,
}

/// Flags of `work`.
#[derive(Debug, Args)]
pub struct WorkArgs {
    /// The run: its id, a unique prefix of it, its name, or "last"
    pub run: String,
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub endpoints: EndpointArgs,
    /// Workers in this process [default: 2]
    #[arg(long, value_name = "N")]
    pub workers: Option<u16>,
    /// Records that may be refused in a chunk before the chunk is failed [default: as the run was created with]
    #[arg(long, value_name = "N")]
    pub error_budget: Option<u64>,
    #[command(flatten)]
    pub observe: ObserveArgs,
}

/// Flags of `reconcile`.
#[derive(Debug, Args)]
pub struct ReconcileArgs {
    /// The run: its id, a unique prefix of it, its name, or "last"
    pub run: String,
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub endpoints: EndpointArgs,
    /// Chunks compared at a time [default: 2]
    #[arg(long, value_name = "N")]
    pub workers: Option<u16>,
    /// Look at this fraction of the contents only (0.01: one in a hundred), fetched by key on both sides
    #[arg(long, value_name = "FRACTION", default_value_t = 1.0, value_parser = fraction)]
    pub sample: f64,
    /// Records that changed in the source since they were migrated are mismatches, too
    #[arg(long)]
    pub strict: bool,
    #[command(flatten)]
    pub observe: ObserveArgs,
}

/// Flags of `repair`.
#[derive(Debug, Args)]
pub struct RepairArgs {
    /// The run: its id, a unique prefix of it, its name, or "last"
    pub run: String,
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub endpoints: EndpointArgs,
    /// Delete rows that the run wrote and the source does not have
    #[arg(long)]
    pub delete_extra: bool,
    /// Workers in this process [default: 2]
    #[arg(long, value_name = "N")]
    pub workers: Option<u16>,
    #[command(flatten)]
    pub observe: ObserveArgs,
}

/// Flags of `rollback`.
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// The run: its id, a unique prefix of it, its name, or "last"
    pub run: String,
    #[command(flatten)]
    pub file: FileArgs,
    /// Target: URL or key=value string
    #[arg(long, value_name = "URL")]
    pub target: Option<String>,
    /// Take back this chunk alone; it is pending then
    #[arg(long, value_name = "CHUNK")]
    pub chunk: Option<String>,
    /// Overwrite rows that somebody changed since; keep rows that other runs rest on for them
    #[arg(long)]
    pub force: bool,
    /// Do it without asking
    #[arg(long, short = 'y')]
    pub yes: bool,
    /// Steps taken back at a time [default: 2]
    #[arg(long, value_name = "N")]
    pub workers: Option<u16>,
    #[command(flatten)]
    pub observe: ObserveArgs,
}

/// Flags of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The run: its id, a unique prefix of it, its name, or "last"; without it the runs are listed
    pub run: Option<String>,
    #[command(flatten)]
    pub file: FileArgs,
    /// Target: URL or key=value string
    #[arg(long, value_name = "URL")]
    pub target: Option<String>,
}

/// Flags of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The run: its id, a unique prefix of it, its name, or "last"
    pub run: String,
    #[command(flatten)]
    pub file: FileArgs,
    /// Target: URL or key=value string
    #[arg(long, value_name = "URL")]
    pub target: Option<String>,
    #[command(flatten)]
    pub observe: ObserveArgs,
}

/// How a report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// One HTML file that needs nothing else
    Html,
    /// All of it, for programs
    Json,
    /// Markdown
    Md,
}

/// Flags of `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The run: its id, a unique prefix of it, its name, or "last"
    pub run: String,
    #[command(flatten)]
    pub file: FileArgs,
    /// Target: URL or key=value string
    #[arg(long, value_name = "URL")]
    pub target: Option<String>,
    /// What is printed on standard output
    #[arg(long, value_name = "FORMAT", default_value = "md")]
    pub format: ReportFormat,
    /// Write all formats, the log, the ledger and the quarantine into a new directory in this one, and record that in the target
    #[arg(long, value_name = "DIR", conflicts_with = "format")]
    pub archive: Option<PathBuf>,
}

/// Flags of `purge`.
#[derive(Debug, Args)]
pub struct PurgeArgs {
    #[command(flatten)]
    pub file: FileArgs,
    /// Target: URL or key=value string
    #[arg(long, value_name = "URL")]
    pub target: Option<String>,
    /// Only say what would go
    #[arg(long)]
    pub dry_run: bool,
    /// How long the detail of reconciliations is kept
    #[arg(long, value_name = "DURATION", default_value = "7days", value_parser = humantime::parse_duration)]
    pub reconciliations: Duration,
    /// How long checkpoints, events, ledger and quarantine are kept
    #[arg(long, value_name = "DURATION", default_value = "90days", value_parser = humantime::parse_duration)]
    pub history: Duration,
    /// How long archives are known
    #[arg(long, value_name = "DURATION", default_value = "365days", value_parser = humantime::parse_duration)]
    pub archives: Duration,
}

/// Flags of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub endpoints: EndpointArgs,
    #[command(flatten)]
    pub tables: TableArgs,
    /// Workers planned [default: 2]
    #[arg(long, value_name = "N")]
    pub workers: Option<u16>,
    /// Bytes a chunk planned [default: 25MB]
    #[arg(long, value_name = "BYTES")]
    pub chunk_size: Option<String>,
}

/// A part of a whole: above 0, at most 1.
fn fraction(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(fraction) if fraction > 0.0 && fraction <= 1.0 => Ok(fraction),
        _ => Err("a fraction is above 0 and at most 1".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn samples_are_fractions() {
        assert_eq!(fraction("0.01"), Ok(0.01));
        assert_eq!(fraction("1"), Ok(1.0));
        for text in ["0", "-0.1", "1.01", "NaN", "inf", "1%", ""] {
            assert!(fraction(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_run_is_read() {
        let cli = Cli::try_parse_from([
            "pg-dedup-migrate",
            "run",
            "--source",
            "postgres:///a",
            "--target",
            "postgres:///b",
            "--table",
            "public.t",
            "--table",
            "u=v",
            "--where",
            "t:a > 1",
            "--workers",
            "4",
        ])
        .unwrap();
        let Command::Run(run) = cli.command else { panic!("not a run") };
        assert_eq!(run.tables.tables, ["public.t", "u=v"]);
        assert_eq!(run.tables.filters, ["t:a > 1"]);
        assert_eq!(run.workers, Some(4));
    }
}
