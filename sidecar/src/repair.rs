//! `repair`: chunks in which a reconciliation found mismatches are done again, and compared again.
//!
//! ```text
//!   begin_repair ─▶ workers do the chunks again ─▶ finish_repair ─▶ a pass over the run ─▶ verdict
//!        ▲                                              │ lost survivors     │ fewer mismatches than before
//!        └──────────────────────────────────────────────┴────────────────────┘
//! ```

use crate::config::Job;
use crate::conn::Session;
use crate::error::{At, Error, Result, Side};
use crate::finish;
use crate::protocol::{self, Whose};
use crate::reconcile::{self, Extent};
use crate::resume;
use crate::run::{self, Ends};
use crate::runs::{self, Run};
use crate::stop::Stop;
use crate::summary::print_text;
use crate::tables;

/// Sets right what the last reconciliation of a run found, as long as that makes it less.
pub async fn repair(job: &Job, wanted: &str, delete_extra: bool, stop: Stop) -> Result<u8> {
    let mut before = i64::MAX;
    loop {
        let mut ends = Ends::connect(job).await?;
        let run = runs::find(&ends.admin, wanted).await?;
        runs::check_source(&ends.source.connect(crate::conn::Role::Admin).await?, &run).await?;
        hold(&ends.admin, &run).await?;
        let Some(strict) = begin(&ends.admin, &run, delete_extra).await? else {
            tracing::info!("run {} ({}) is {}: there is nothing to repair", run.run_id, run.name, run.status);
            if !job.json {
                print_text(&format!("run {} ({}): {}\n", run.run_id, run.name, run.status));
            }
            return Ok(0);
        };
        rewrite(job, &mut ends, &run, &stop).await?;
        call(&ends.admin, "let_go_of_run", "SELECT dedup.let_go_of_run($1::uuid)::text", &run).await?;
        if stop.finishing() {
            tracing::warn!("interrupted; pg-dedup-migrate repair {} goes on with what is left", run.run_id);
            return Ok(130);
        }
        let extent = Extent { sample: 1.0, strict, repaired: true };
        let Some(verdict) = reconcile::pass(job, &run.run_id.to_string(), extent, stop.clone()).await? else {
            return Ok(130);
        };
        // What was too much to be listed is found by the next pass.
        let left = verdict.to_repair(delete_extra);
        if left == 0 || left >= before || verdict.verdict != "mismatch" {
            verdict.print(job.json)?;
            return Ok(verdict.exit_code());
        }
        tracing::info!("{left} mismatches are left");
        before = left;
    }
}

/// Keeps other passes and rollbacks off the run until the session ends.
async fn hold(admin: &Session, run: &Run) -> Result<()> {
    call(admin, "hold_run", "SELECT dedup.hold_run($1::uuid)::text", run).await.map(drop)
}

/// Sets chunks back; none: the run is not halted. Answers whether it was halted by a strict pass.
async fn begin(admin: &Session, run: &Run, delete_extra: bool) -> Result<Option<bool>> {
    let chunks: i32 = admin
        .client
        .query_one("SELECT dedup.begin_repair($1::uuid, $2::bool)", &[&run.run_id, &delete_extra])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "begin_repair")?;
    let strict: Option<bool> = admin
        .client
        .query_one("SELECT bool_or(is_strict) FROM dedup.reconciliations WHERE holds = $1", &[&run.run_id])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "looking at the passes")?;
    if strict.is_some() {
        tracing::info!("repairing run {} ({}): {chunks} chunks", run.run_id, run.name);
    }
    Ok(strict)
}

/// Does the chunks again, and those that lose survivors by that.
async fn rewrite(job: &Job, ends: &mut Ends, run: &Run, stop: &Stop) -> Result<()> {
    /// Each round does what the one before could not know of. If there is no end to it, somebody undoes what is done.
    const ROUNDS: usize = 10;
    for _ in 0..ROUNDS {
        let mut refused = [None; 2];
        let mut stuck = usize::MAX;
        loop {
            let _keeper = resume::renew_snapshot(run, &ends.source, &ends.admin).await?;
            let mut failed = repair_local_chunks(&ends.admin, run).await?;
            let tables = tables::load(&ends.admin, run.run_id).await?;
            if !tables.is_empty() {
                run::work_chunks(job, ends, run, tables, stop, true).await?;
            }
            if ends.revive().await? {
                hold(&ends.admin, run).await?;
            }
            if stop.finishing() {
                return Ok(());
            }
            // While the session was lost, somebody may have taken the run.
            let status = runs::find(&ends.admin, &run.run_id.to_string()).await?.status;
            if status != "halted" {
                return Err(Error::refused(format!("run {} is {status} now", run.run_id))
                    .hint("somebody else took it while it was being repaired"));
            }
            // Chunks that wait for others are tried again as long as that makes them fewer.
            if failed.len() >= stuck
                && let Some(error) = failed.pop()
            {
                return Err(error);
            }
            if !failed.is_empty() {
                stuck = failed.len();
                continue;
            }
            stuck = usize::MAX;
            for (local, refused) in [false, true].into_iter().zip(&mut refused) {
                *refused = finish::retry_foreign_keys(&ends.admin, run.run_id, *refused, local).await?;
            }
            if !protocol::is_open(&ends.admin, run.run_id, Whose::All).await? {
                break;
            }
        }
        let left =
            call(&ends.admin, "finish_repair", "SELECT dedup.finish_repair($1::uuid)::text", run).await?;
        if left == "0" {
            return Ok(());
        }
    }
    Err(Error::refused(format!("run {} cannot be repaired", run.run_id))
        .hint("look for a trigger, rule or application that changes or drops rows of the target"))
}

/// Chunks of sources that the target database sees are its own to do. Answers why some have to be tried again after others.
async fn repair_local_chunks(admin: &Session, run: &Run) -> Result<Vec<Error>> {
    let chunks = admin
        .client
        .query(
            "SELECT c.chunk_id FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id) \
             WHERE c.run_id = $1 AND c.status = 'pending' AND t.source_spec ? 'local' ORDER BY c.chunk_no",
            &[&run.run_id],
        )
        .await
        .at(Side::Target, "listing the chunks to repair")?;
    let mut failed = Vec::new();
    for chunk in chunks {
        let chunk: String = chunk.try_get(0).at(Side::Target, "listing the chunks to repair")?;
        let done = admin
            .client
            .execute("SELECT dedup.run_chunk($1::uuid, $2::text)", &[&run.run_id, &chunk])
            .await
            .map_err(|error| of_local_chunk(&chunk, error));
        match done {
            // It may want what another chunk does: a lock, a row to point at, that nobody points at a row any more.
            Err(error) if matches!(error.sqlstate.as_deref(), Some("55P03" | "23503" | "55000")) => {
                tracing::warn!("chunk {chunk}: {error}");
                failed.push(error);
            }
            done => done.map(drop)?,
        }
    }
    Ok(failed)
}

/// The extension's own reasons are told whole; others may quote a record.
fn of_local_chunk(chunk: &str, error: tokio_postgres::Error) -> Error {
    let own = matches!(error.code().map(|code| code.code()), Some("55000" | "55P03"));
    let told = if own { Error::driver } else { Error::record_driver };
    let error = told(Side::Target, "run_chunk", error);
    let detail = match &error.detail {
        Some(detail) => format!("chunk {chunk}: {detail}"),
        None => format!("chunk {chunk}"),
    };
    error.detail(detail)
}

async fn call(admin: &Session, doing: &'static str, sql: &str, run: &Run) -> Result<String> {
    let row = admin.client.query_one(sql, &[&run.run_id]).await.at(Side::Target, doing)?;
    Ok(row.try_get::<_, Option<String>>(0).at(Side::Target, doing)?.unwrap_or_default())
}
