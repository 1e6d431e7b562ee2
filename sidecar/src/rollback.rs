//! `rollback`: what a run did to its targets is taken back, several steps at a time, each in a transaction of its own.
//!
//! ```text
//!   admin    preview ─▶ question ─▶ begin_rollback … finish_rollback ─▶ what became of the rows
//!   lanes    rollback_step, rollback_step, …
//! ```
//!
//! A rollback that is cut off is taken up with the steps that are left.

use std::io::{self, BufRead, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use indicatif::HumanBytes;
use serde::Serialize;
use uuid::Uuid;

use crate::cli::RollbackArgs;
use crate::config::Job;
use crate::conn::{Endpoint, Role, Session, protocol_error};
use crate::error::{At, Error, Result, Side};
use crate::failpoint::{self, Failpoint};
use crate::progress::{Counters, Plan, Progress, Work, duration};
use crate::retry::patiently;
use crate::runs::{self, Run};
use crate::stop::Stop;
use crate::summary::print;
use crate::throttle::Flow;
use crate::worker;

/// How long a lane waits for others that are in its way.
const PAUSE: Duration = Duration::from_millis(100);
/// Tries beyond the steps that are left before it is said that there is no way on.
const PATIENCE: i64 = 10;
/// Rows shown that were left alone.
const SHOWN: usize = 20;

/// What is to be taken back, and how.
pub struct Wanted {
    run: String,
    chunk: Option<String>,
    force: bool,
    yes: bool,
}

impl From<&RollbackArgs> for Wanted {
    fn from(args: &RollbackArgs) -> Self {
        Self { run: args.run.clone(), chunk: args.chunk.clone(), force: args.force, yes: args.yes }
    }
}

/// Takes a run, or one chunk of it, back.
pub async fn rollback(job: &Job, wanted: &Wanted, stop: Stop) -> Result<u8> {
    let target = Arc::new(Endpoint::resolve(Side::Target, &job.target)?);
    let admin = target.connect(Role::Admin).await?;
    runs::check_versions(&admin).await?;
    let run = runs::find(&admin, &wanted.run).await?;
    let rows = preview(&admin, &run, wanted).await?;
    if !wanted.yes && !is_confirmed(&run, wanted)? {
        return Ok(130);
    }
    if wanted.chunk.is_none() {
        admin
            .client
            .execute("SELECT dedup.hold_run($1::uuid)", &[&run.run_id])
            .await
            .at(Side::Target, "reserving the run")?;
    }
    let resumable = |error: Error| match error.hint {
        Some(_) => error,
        None => error.hint(format!("pg-dedup-migrate rollback {} goes on with what is left", run.run_id)),
    };
    let begun = tokio::select! {
        biased;
        () = stop.asked() => None,
        begun = begin(&admin, &run, wanted) => Some(begun),
    };
    let Some(begun) = begun else {
        admin.cancel().await;
        tracing::warn!("interrupted: nothing was taken back");
        return Ok(130);
    };
    let Some(id) = begun? else {
        // A chunk is taken back by one transaction: it has been.
        return tell(job, &Outcome::of_chunk(&admin, &run).await?);
    };
    let counters = Arc::new(Counters::default());
    let plan = plan(&admin, id, rows).await?;
    let rolling = Arc::new(Rolling {
        id,
        target,
        counters: counters.clone(),
        busy: AtomicUsize::new(0),
        undone: AtomicU64::new(0),
        row_bytes: row_bytes(&admin, run.run_id).await?,
        stop: stop.clone(),
    });
    {
        let _throttling = Flow {
            source: None,
            target: rolling.target.clone(),
            run: run.run_id,
            lanes: job.workers,
            counters: counters.clone(),
            status: None,
        }
        .start()
        .await;
        let _progress = Progress::show(counters, plan);
        let mut lanes = tokio::task::JoinSet::new();
        for _ in 0..job.workers {
            let rolling = rolling.clone();
            lanes.spawn_blocking(move || worker::on_own_thread(lane(rolling)));
        }
        worker::join(lanes).await.map_err(resumable)?;
    }
    if stop.finishing() {
        tracing::warn!("interrupted; pg-dedup-migrate rollback {} goes on with what is left", run.run_id);
        return Ok(130);
    }
    tell(job, &Outcome::conclude(&admin, id, &run).await.map_err(resumable)?)
}

/// Bytes that a record of the run was in its source, about.
async fn row_bytes(admin: &Session, run: Uuid) -> Result<u64> {
    let doing = "reading the books";
    let sql = "SELECT coalesce(sum(source_bytes) / nullif(sum(source_count), 0), 0)::int8 FROM dedup.checkpoints WHERE run_id = $1";
    let row = admin.client.query_one(sql, &[&run]).await.at(Side::Target, doing)?;
    Ok(row.try_get::<_, i64>(0).at(Side::Target, doing)?.unsigned_abs())
}

/// Prints what became of the rows; answers the exit code that says it.
fn tell(job: &Job, outcome: &Outcome) -> Result<u8> {
    print(outcome, job.json, || outcome.text())?;
    Ok(if outcome.left_alone_count > 0 { 3 } else { 0 })
}

/// Tells what would go; answers the rows.
async fn preview(admin: &Session, run: &Run, wanted: &Wanted) -> Result<u64> {
    let doing = "rollback_preview";
    let rows = admin
        .client
        .query(
            "SELECT target::text, rows_to_delete, rows_to_restore, wal_bytes, extract(epoch FROM estimated)::float8 \
             FROM dedup.rollback_preview($1::uuid, $2::text)",
            &[&run.run_id, &wanted.chunk],
        )
        .await
        .at(Side::Target, doing)?;
    let what = wanted.chunk.as_ref().map_or(String::new(), |chunk| format!(", chunk {chunk}"));
    tracing::info!("rolling back run {} ({}, {}){what}", run.run_id, run.name, run.status);
    let mut total = 0;
    for row in rows {
        let (deleted, restored): (i64, i64) =
            (row.try_get(1).at(Side::Target, doing)?, row.try_get(2).at(Side::Target, doing)?);
        let (target, wal): (String, i64) =
            (row.try_get(0).at(Side::Target, doing)?, row.try_get(3).at(Side::Target, doing)?);
        let seconds: f64 = row.try_get(4).at(Side::Target, doing)?;
        tracing::info!(
            "{target}: {deleted} rows to delete, {restored} to restore, about {} of WAL, about {}",
            HumanBytes(wal.unsigned_abs()),
            duration(seconds)
        );
        total += (deleted + restored).unsigned_abs();
    }
    Ok(total)
}

/// Asks, where there is somebody to ask.
fn is_confirmed(run: &Run, wanted: &Wanted) -> Result<bool> {
    if !io::stdin().is_terminal() {
        return Err(Error::usage("a rollback is confirmed with --yes, or on a terminal"));
    }
    let what = wanted.chunk.as_ref().map_or("all of it".to_owned(), |chunk| format!("chunk {chunk}"));
    eprint!("Take {what} back from run {} ({})? Type yes: ", run.run_id, run.name);
    let _ = io::stderr().flush();
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    Ok(read.is_ok() && answer.trim() == "yes")
}

/// Begins with a run. One chunk is taken back whole: none.
async fn begin(admin: &Session, run: &Run, wanted: &Wanted) -> Result<Option<i64>> {
    let sql = match &wanted.chunk {
        None => "SELECT dedup.begin_rollback($1::uuid, $3::bool) WHERE $2::text IS NULL",
        Some(_) => "SELECT NULL::int8 FROM dedup.rollback_chunk($1::uuid, $2::text, $3::bool)",
    };
    admin
        .client
        .query_one(sql, &[&run.run_id, &wanted.chunk, &wanted.force])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "begin_rollback")
}

/// Steps and rows in all, and what an earlier attempt has taken back.
async fn plan(admin: &Session, id: i64, rows: u64) -> Result<Plan> {
    let doing = "listing the steps";
    let row = admin
        .client
        .query_one(
            "SELECT count(*), count(undone_at), coalesce(sum(deleted_count + restored_count), 0)::int8 \
             FROM dedup.rollback_steps WHERE rollback_id = $1",
            &[&id],
        )
        .await
        .at(Side::Target, doing)?;
    let get = |index: usize| -> Result<u64> {
        Ok(row.try_get::<_, i64>(index).at(Side::Target, doing)?.unsigned_abs())
    };
    let done = get(2)?;
    Ok(Plan {
        total_bytes: rows + done,
        done_bytes: done,
        total_chunks: get(0)?,
        done_chunks: get(1)?,
        work: Work::TakeBack,
    })
}

/// What the lanes share.
struct Rolling {
    id: i64,
    target: Arc<Endpoint>,
    counters: Arc<Counters>,
    /// Lanes that are at a step.
    busy: AtomicUsize,
    /// Steps done.
    undone: AtomicU64,
    /// Bytes that a row was in its source, about.
    row_bytes: u64,
    stop: Stop,
}

/// What a call of `rollback_step` did.
struct Step {
    state: String,
    rows: u64,
    left_alone: u64,
}

async fn lane(rolling: Arc<Rolling>) -> Result<()> {
    let mut session: Option<Session> = None;
    let mut vain = Vain::default();
    while !rolling.stop.finishing() {
        let step = tokio::select! {
            step = step_patiently(&rolling, &mut session) => step?,
            () = rolling.stop.aborted() => {
                if let Some(session) = &session {
                    session.cancel().await;
                }
                break;
            }
        };
        match step.state.as_str() {
            "finished" => break,
            "undone" => {
                rolling.undone.fetch_add(1, Ordering::SeqCst);
                rolling.counters.taken_back(step.rows, step.left_alone);
                let bytes = usize::try_from(step.rows * rolling.row_bytes).unwrap_or(usize::MAX);
                tokio::select! {
                    () = rolling.counters.throttle.pace(bytes) => {}
                    () = rolling.stop.aborted() => break,
                }
                failpoint::reach(Failpoint::AfterCommit).await;
            }
            state => {
                vain.count(rolling.undone.load(Ordering::SeqCst));
                if vain.is_enough(&rolling, &session).await? {
                    return Err(stuck(&rolling, &session).await);
                }
                if state == "waiting" || rolling.busy.load(Ordering::SeqCst) > 0 {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
    if let Some(session) = session {
        session.close().await;
    }
    Ok(())
}

/// Steps tried in vain since anybody did one.
#[derive(Default)]
struct Vain {
    undone: u64,
    tries: i64,
}

impl Vain {
    fn count(&mut self, undone: u64) {
        self.tries = if undone == self.undone { self.tries + 1 } else { 1 };
        self.undone = undone;
    }

    /// Whether every step that is left was tried, with nobody at one: there is no way on.
    async fn is_enough(&self, rolling: &Rolling, session: &Option<Session>) -> Result<bool> {
        let Some(target) = session.as_ref().filter(|_| self.tries > PATIENCE) else { return Ok(false) };
        if rolling.busy.load(Ordering::SeqCst) > 0 {
            return Ok(false);
        }
        let left: i64 = target
            .client
            .query_one("SELECT dedup.steps_left($1)", &[&rolling.id])
            .await
            .and_then(|row| row.try_get(0))
            .at(Side::Target, "steps_left")?;
        Ok(self.tries > PATIENCE + 2 * left)
    }
}

/// One step, tried again while the reason it fails for may pass.
async fn step_patiently(rolling: &Rolling, session: &mut Option<Session>) -> Result<Step> {
    rolling.busy.fetch_add(1, Ordering::SeqCst);
    let tried = patiently(&rolling.stop, "", async || {
        let done = step(rolling, session).await;
        if done.is_err() {
            *session = None;
        }
        done
    })
    .await;
    rolling.busy.fetch_sub(1, Ordering::SeqCst);
    tried
}

async fn step(rolling: &Rolling, session: &mut Option<Session>) -> Result<Step> {
    let target = match session {
        Some(open) => open,
        None => session.insert(rolling.target.connect(Role::Admin).await?),
    };
    let doing = "rollback_step";
    let statement = target
        .prepared("SELECT state, deleted + restored, left_alone FROM dedup.rollback_step($1::bigint)")
        .await?;
    failpoint::reach(Failpoint::Begun).await;
    let row = target.client.query_one(&statement, &[&rolling.id]).await.at(Side::Target, doing)?;
    Ok(Step {
        state: row.try_get(0).at(Side::Target, doing)?,
        rows: row.try_get::<_, i64>(1).at(Side::Target, doing)?.unsigned_abs(),
        left_alone: row.try_get::<_, i64>(2).at(Side::Target, doing)?.unsigned_abs(),
    })
}

/// Why there is no way on.
async fn stuck(rolling: &Rolling, session: &Option<Session>) -> Error {
    let Some(target) = session else {
        return protocol_error(Side::Target, "the rollback cannot go on");
    };
    match target
        .client
        .execute("SELECT dedup.rollback_stuck($1)", &[&rolling.id])
        .await
        .at(Side::Target, "rollback")
    {
        Err(error) => error,
        Ok(_) => protocol_error(Side::Target, "the rollback cannot go on"),
    }
}

/// What became of the rows.
#[derive(Debug, Serialize)]
struct Outcome {
    /// The run.
    run_id: Uuid,
    /// Its name.
    name: String,
    /// Its status now.
    status: String,
    /// Rows deleted.
    deleted_count: i64,
    /// Rows that are again what they were.
    restored_count: i64,
    /// Rows kept for other runs.
    kept_count: i64,
    /// Rows that somebody changed since.
    left_alone_count: i64,
    /// How long it took.
    seconds: f64,
    /// The first of the rows left alone.
    left_alone: Vec<LeftAlone>,
}

/// One line of `dedup.left_alone`.
#[derive(Debug, Serialize)]
struct LeftAlone {
    /// The target.
    target: String,
    /// `column=value`; for a table without a key the content hash.
    key: String,
    /// Why.
    reason: String,
}

impl Outcome {
    /// Of the chunk that was taken back just now.
    async fn of_chunk(admin: &Session, run: &Run) -> Result<Outcome> {
        let id = admin
            .client
            .query_one("SELECT max(rollback_id) FROM dedup.rollbacks WHERE run_id = $1", &[&run.run_id])
            .await
            .and_then(|row| row.try_get(0))
            .at(Side::Target, "looking for the rollback")?;
        Outcome::conclude(admin, id, run).await
    }

    async fn conclude(admin: &Session, id: i64, run: &Run) -> Result<Outcome> {
        let doing = "finish_rollback";
        let row = admin
            .client
            .query_one(
                "SELECT status, deleted_count, restored_count, kept_count, left_alone_count, seconds FROM dedup.finish_rollback($1)",
                &[&id],
            )
            .await
            .at(Side::Target, doing)?;
        let lines = admin
            .client
            .query(
                "SELECT t.target::text, coalesce(l.key, 'h:' || encode(l.content_hash, 'hex')), l.reason \
                 FROM dedup.left_alone AS l JOIN dedup.targets AS t USING (target_id) WHERE l.rollback_id = $1 ORDER BY l.left_alone_id LIMIT 100",
                &[&id],
            )
            .await
            .at(Side::Target, doing)?;
        let left_alone = lines
            .iter()
            .map(|line| {
                let text = |index: usize| line.try_get::<_, String>(index).at(Side::Target, doing);
                Ok(LeftAlone { target: text(0)?, key: text(1)?, reason: text(2)? })
            })
            .collect::<Result<_>>()?;
        let count = |index: usize| row.try_get::<_, i64>(index).at(Side::Target, doing);
        Ok(Outcome {
            run_id: run.run_id,
            name: run.name.clone(),
            status: row.try_get(0).at(Side::Target, doing)?,
            deleted_count: count(1)?,
            restored_count: count(2)?,
            kept_count: count(3)?,
            left_alone_count: count(4)?,
            seconds: row.try_get(5).at(Side::Target, doing)?,
            left_alone,
        })
    }

    fn text(&self) -> String {
        let mut text = format!("run {} ({}): {}\n", self.run_id, self.name, self.status);
        for (label, count) in [
            ("deleted", self.deleted_count),
            ("restored", self.restored_count),
            ("kept for other runs", self.kept_count),
            ("left alone", self.left_alone_count),
        ] {
            text.push_str(&format!("  {label:<20}{count:>12}\n"));
        }
        for row in self.left_alone.iter().take(SHOWN) {
            text.push_str(&format!("  left alone: {} {} is {}\n", row.target, row.key, row.reason));
        }
        if self.left_alone_count > SHOWN as i64 {
            text.push_str("  further ones are in dedup.left_alone\n");
        }
        text
    }
}
