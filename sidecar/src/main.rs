//! `pg-dedup-migrate`: the worker of pg_dedup_migrate.
//!
//! ```text
//!   cli ─▶ config ─▶ run ─┬─ setup ─▶ catalog, select, source, plan     a run is created and planned
//!                         ├─ resume                                     or taken up
//!                         ├─ worker × N ─▶ read ─▶ fold ─▶ chunk ─▶ write    chunk after chunk
//!                         │      └─ heartbeat, progress, stop
//!                         └─ finish ─▶ summary                          sequences, VACUUM, the books
//! ```
//!
//! | module | idea |
//! |---|---|
//! | [`cli`], [`config`] | what is to be done: flags and a TOML file |
//! | [`names`] | SQL names: read, folded, quoted |
//! | [`conninfo`], [`tls`], [`conn`] | connections as libpq has them |
//! | [`error`] | what can go wrong and what is done about it |
//! | [`catalog`], [`select`], [`source`] | how a source table is read in the target's types |
//! | [`plan`] | where chunks begin |
//! | [`setup`], [`resume`], [`runs`], [`tables`] | runs: created, found, taken up, described |
//! | [`protocol`] | the calls of docs/protocol.md |
//! | [`worker`], [`read`], [`fold`], [`chunk`], [`write`] | one chunk, end to end |
//! | [`heartbeat`], [`progress`], [`stop`], [`failpoint`] | beside it |
//! | [`finish`], [`summary`], [`status`], [`doctor`] | after it, and before |
//! | [`observe`], [`view`] | alerts, metrics, a page |
//! | [`reconcile`], [`verdict`] | source and target compared |
//! | [`report`], [`purge`] | a run told and kept, and gone |
//! | [`repair`], [`rollback`] | a run set right, or taken back |
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command, LogFormat};
use crate::config::Job;
use crate::error::Result;
use crate::observe::Observation;
use crate::rehearsal::Rehearsal;
use crate::stop::Stop;

mod catalog;
mod chunk;
mod cli;
mod config;
mod conn;
mod conninfo;
mod doctor;
mod error;
mod failpoint;
mod finish;
mod heartbeat;
mod names;
mod observe;
mod plan;
mod progress;
mod protocol;
mod purge;
mod read;
mod reconcile;
mod rehearsal;
mod repair;
mod report;
mod resume;
mod retry;
mod rollback;
mod run;
mod runs;
mod select;
mod setup;
mod source;
mod staging;
mod status;
mod stop;
mod summary;
mod tables;
mod throttle;
mod tls;
mod verdict;
mod view;
mod worker;
mod write;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("PG_DEDUP_MIGRATE_LOG")
        .unwrap_or_else(|_| EnvFilter::new("warn,pg_dedup_migrate=info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(|| progress::LogWriter);
    match cli.log_format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
    }
    match command(&cli.command).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            match cli.log_format {
                LogFormat::Text => eprintln!("{}", error.report()),
                LogFormat::Json => {
                    tracing::error!(
                        sqlstate = error.sqlstate,
                        detail = error.detail,
                        hint = error.hint,
                        "{error}"
                    )
                }
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// What a command does, with the run looked at meanwhile.
async fn observed(job: &Job, run: &str, work: impl Future<Output = Result<u8>>) -> Result<u8> {
    let observation = Observation::of(job, run).await?;
    let done = work.await;
    observation.end().await;
    done
}

async fn command(command: &Command) -> Result<u8> {
    match command {
        Command::Run(args) if args.dry_run => {
            let rehearsal = Rehearsal { sample: args.sample, deadline: args.deadline };
            rehearsal::rehearse(&Job::of_run(args)?, rehearsal, Stop::listen()?).await
        }
        Command::Run(args) => run::run(&Job::of_run(args)?, args.resume.as_deref(), Stop::listen()?).await,
        Command::Work(args) => run::work(&Job::of_work(args)?, &args.run, Stop::listen()?).await,
        Command::Reconcile(args) => {
            let job = Job::of_reconcile(args)?;
            let passed = reconcile::reconcile(&job, &args.run, args.sample, args.strict, Stop::listen()?);
            observed(&job, &args.run, passed).await
        }
        Command::Repair(args) => {
            let job = Job::of_repair(args)?;
            let repaired = repair::repair(&job, &args.run, args.delete_extra, Stop::listen()?);
            observed(&job, &args.run, repaired).await
        }
        Command::Rollback(args) => {
            let job = Job::of_rollback(args)?;
            let wanted = args.into();
            let rolled_back = rollback::rollback(&job, &wanted, Stop::listen()?);
            observed(&job, &args.run, rolled_back).await
        }
        Command::Status(args) => status::status(&Job::of_status(args)?, args.run.as_deref()).await,
        Command::Serve(args) => {
            let stop = Stop::listen()?;
            let served = async {
                stop.asked().await;
                Ok(0)
            };
            observed(&Job::of_serve(args)?, &args.run, served).await
        }
        Command::Report(args) => report::report(&Job::of_report(args)?, args).await,
        Command::Purge(args) => purge::purge(&Job::of_purge(args)?, args, Stop::listen()?).await,
        Command::Doctor(args) => doctor::doctor(&Job::of_doctor(args)?).await,
    }
}
