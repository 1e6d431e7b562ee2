//! `run` and `work`: from a job to its books.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;
use uuid::Uuid;

use crate::config::{DEFAULT_ERROR_BUDGET, Job};
use crate::conn::{Endpoint, Role, Session};
use crate::error::{At, Error, Kind, Result, Side};
use crate::finish;
use crate::names::TableName;
use crate::observe::{Observation, Served};
use crate::progress::{Counters, Plan, Progress};
use crate::protocol::{Whose, is_open};
use crate::runs::{self, Run};
use crate::stop::Stop;
use crate::summary::Summary;
use crate::tables::{self, TableWork};
use crate::worker::{self, Crew};
use crate::{resume, setup, staging};

/// Both ends of a job and a session on the target for the process's own questions.
pub struct Ends {
    /// The source.
    pub source: Arc<Endpoint>,
    /// The target.
    pub target: Arc<Endpoint>,
    /// A session on the target.
    pub admin: Session,
}

impl Ends {
    /// Connects, and checks that the two fit together.
    pub async fn connect(job: &Job) -> Result<Ends> {
        let source = Arc::new(Endpoint::resolve(Side::Source, &job.source)?);
        let target = Arc::new(Endpoint::resolve(Side::Target, &job.target)?);
        let admin = target.connect(Role::Admin).await?;
        runs::check_versions(&admin).await?;
        Ok(Ends { source, target, admin })
    }

    /// Connects anew if the session was lost meanwhile, and says whether it did: what the old session held is gone.
    pub async fn revive(&mut self) -> Result<bool> {
        let lost = self.admin.is_closed();
        if lost {
            self.admin = self.target.connect_patiently(Role::Admin).await?;
        }
        Ok(lost)
    }
}

/// Plans a run, or takes up the one that `resume` names, and works until its end.
pub async fn run(job: &Job, resume: Option<&str>, stop: Stop) -> Result<u8> {
    let served = Served::at(job.metrics_addr).await?;
    let mut ends = Ends::connect(job).await?;
    let source = ends.source.connect(Role::Admin).await?;
    // Whatever keeps a snapshot has to live until the last chunk is read.
    let (run_id, _snapshot_keeper) = match resume {
        None => {
            if let Some(target) = &job.stands_for {
                staging::check(job, target, &source, &ends).await?;
            }
            let created = setup::create(job, &ends.source, &source, &ends.admin).await?;
            (created.run_id, created.snapshot_keeper)
        }
        Some(wanted) => {
            let run = runs::find(&ends.admin, wanted).await?;
            let keeper = resume::resume(job, &run, &ends.source, &source, &ends.admin).await?;
            (run.run_id, keeper)
        }
    };
    drop(source);
    let run = runs::find(&ends.admin, &run_id.to_string()).await?;
    tracing::info!("run {run_id} ({}) from {} to {}", run.name, ends.source.place(), ends.target.place());
    let observation = Observation::start(served, ends.target.clone(), run_id);
    if !matches!(run.status.as_str(), "done" | "reconciled") {
        let resumable = |error: Error| match error.hint {
            Some(_) => error,
            None => {
                error.hint(format!("pg-dedup-migrate run --resume {run_id} goes on when the cause is mended"))
            }
        };
        index(job, &ends.admin, run_id).await.map_err(resumable)?;
        let worked = work_to_the_end(job, &mut ends, &run, &stop).await;
        observation.end().await;
        worked.map_err(resumable)?;
    }
    let summary = Summary::load(&ends.admin, run_id).await?;
    summary.print(job.json)?;
    if stop.finishing() && !matches!(summary.status.as_str(), "done" | "reconciled" | "failed" | "halted") {
        tracing::warn!(
            "interrupted; pg-dedup-migrate run --resume {run_id} goes on, with the same --source and --target"
        );
        return Ok(130);
    }
    let left = summary.chunks - summary.verified - summary.failed;
    if left > 0 && summary.status == "running" && !warn_of_local(&ends.admin, run_id).await? {
        tracing::warn!("{left} chunks are not verified yet; pg-dedup-migrate run --resume {run_id} goes on");
    }
    Ok(summary.exit_code())
}

/// What is said where workers are done and the target database is not.
pub const LEFT_TO_THE_DATABASE: &str = "the run has chunks that the target database reads itself";

/// Says whether and how the target database has to go on with the run.
async fn warn_of_local(admin: &Session, run: Uuid) -> Result<bool> {
    let left = is_open(admin, run, Whose::Database).await?;
    if left {
        tracing::warn!("{LEFT_TO_THE_DATABASE}: CALL dedup.migrate_run('{run}')");
    }
    Ok(left)
}

/// Joins a run from here.
pub async fn work(job: &Job, wanted: &str, stop: Stop) -> Result<u8> {
    let served = Served::at(job.metrics_addr).await?;
    let mut ends = Ends::connect(job).await?;
    let run = runs::find(&ends.admin, wanted).await?;
    if !matches!(run.status.as_str(), "created" | "running" | "paused") {
        return Err(Error::refused(format!(
            "run {} is {}: there is nothing to work on",
            run.run_id, run.status
        )));
    }
    runs::check_source(&ends.source.connect(Role::Admin).await?, &run).await?;
    tracing::info!("joining run {} ({})", run.run_id, run.name);
    let observation = Observation::start(served, ends.target.clone(), run.run_id);
    let worked = work_to_the_end(job, &mut ends, &run, &stop).await;
    observation.end().await;
    worked?;
    let summary = Summary::load(&ends.admin, run.run_id).await?;
    summary.print(job.json)?;
    if stop.finishing() {
        return Ok(130);
    }
    warn_of_local(&ends.admin, run.run_id).await?;
    // Others may still be at it: then this process has done its part, and whoever ends the run tells how it ended.
    Ok(if matches!(summary.status.as_str(), "created" | "running" | "paused") {
        0
    } else {
        summary.exit_code()
    })
}

/// Hashes rows that stand in the targets already, and reads the hash index into the filter after a restart.
async fn index(job: &Job, admin: &Session, run: Uuid) -> Result<()> {
    let doing = "indexing the targets";
    if job.index_existing {
        let rows = admin
            .client
            .query(
                "SELECT DISTINCT g.target::oid, g.target::text FROM dedup.run_tables AS t JOIN dedup.targets AS g USING (target_id) \
                 WHERE t.run_id = $1 AND dedup.needs_index(t.run_id, t.table_id)",
                &[&run],
            )
            .await
            .at(Side::Target, doing)?;
        for row in rows {
            let (oid, name): (u32, String) =
                (row.try_get(0).at(Side::Target, doing)?, row.try_get(1).at(Side::Target, doing)?);
            let entries: i64 = admin
                .client
                .query_one("SELECT dedup.index_existing($1::oid::regclass)", &[&oid])
                .await
                .and_then(|row| row.try_get(0))
                .at(Side::Target, doing)?;
            if entries > 0 {
                tracing::info!("{name}: {entries} rows that stood there are indexed");
            }
        }
    }
    admin.client.execute("SELECT dedup.warm_filter()", &[]).await.at(Side::Target, "warming the filter")?;
    Ok(())
}

async fn work_to_the_end(job: &Job, ends: &mut Ends, run: &Run, stop: &Stop) -> Result<()> {
    let tables = tables::load(&ends.admin, run.run_id).await?;
    let mut targets: Vec<TableName> = tables.values().map(|table| table.target.clone()).collect();
    targets.sort();
    targets.dedup();
    let mut unreferenced = None;
    loop {
        work_chunks(job, ends, run, tables.clone(), stop, false).await?;
        ends.revive().await?;
        if stop.finishing() {
            return Ok(());
        }
        if !is_open(&ends.admin, run.run_id, Whose::Workers).await? {
            unreferenced = finish::retry_foreign_keys(&ends.admin, run.run_id, unreferenced, false).await?;
            if is_open(&ends.admin, run.run_id, Whose::Workers).await? {
                continue;
            }
        }
        if !is_open(&ends.admin, run.run_id, Whose::All).await? {
            finish::verify_written(&ends.admin, run.run_id, stop).await?;
            if stop.finishing() {
                return Ok(());
            }
        }
        finish::advance_sequences(&ends.admin, &targets).await?;
        match finish::complete(&ends.admin, run.run_id).await?.as_str() {
            // The orphan pass reopened chunks.
            "running" if is_open(&ends.admin, run.run_id, Whose::Workers).await? => {}
            "done" => return finish::vacuum_analyze(&ends.target, &targets, usize::from(job.workers)).await,
            _ => return Ok(()),
        }
    }
}

/// Works on chunks until none is left; those of a halted run are repaired.
pub async fn work_chunks(
    job: &Job,
    ends: &Ends,
    run: &Run,
    tables: HashMap<i32, TableWork>,
    stop: &Stop,
    repairs: bool,
) -> Result<()> {
    if tables.is_empty() {
        return Err(Error::here(
            Kind::Refused,
            format!("run {} has no table that a worker reads", run.run_id),
        )
        .hint("CALL dedup.migrate_run(run) does the tables that the target database sees itself"));
    }
    let counters = Arc::new(Counters::default());
    let plan = Plan::load(&ends.admin, run.run_id).await?;
    let crew = Crew {
        source: ends.source.clone(),
        target: ends.target.clone(),
        run: run.run_id,
        tables,
        error_budget: job.error_budget.or(run.setting("error_budget")).unwrap_or(DEFAULT_ERROR_BUDGET),
        max_attempts: run.max_attempts,
        counters: counters.clone(),
        stop: stop.clone(),
        deferred: Mutex::default(),
        news: Notify::new(),
        vacuumed: AtomicBool::new(false),
        no_room: AtomicBool::new(false),
        told_waiting: Mutex::default(),
        repairs,
    };
    let _progress = Progress::show(counters, plan);
    worker::work(Arc::new(crew), job.workers).await
}
