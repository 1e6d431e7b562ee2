//! `reconcile`: every chunk's records read from the source and hashed here, compared by the extension with the rows it hashes there.
//!
//! ```text
//!   keeper   holds one snapshot of the target for the whole pass
//!   lanes    read a chunk ─▶ reconcile_chunk under that snapshot, each in a transaction of its own
//!   admin    begin_reconcile … settle_reconcile, close_reconcile ─▶ verdict
//! ```
//!
//! A pass that is cut off is taken up with the chunks that are left.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use pg_dedup_record::Batch;
use pg_dedup_record::sql::quote_literal;
use uuid::Uuid;

use crate::config::Job;
use crate::conn::{Endpoint, Role, Session, protocol_error};
use crate::error::{At, Error, Kind, Result, Side};
use crate::failpoint::{self, Failpoint};
use crate::progress::{Counters, Plan, Progress, Work};
use crate::protocol::GENERIC_PLANS;
use crate::read;
use crate::retry::patiently;
use crate::runs::{self, Run};
use crate::setup;
use crate::source::{Range, RangeKind};
use crate::stop::Stop;
use crate::tables::{self, TableWork};
use crate::throttle::Flow;
use crate::verdict::Verdict;
use crate::worker;

/// A chunk to compare.
struct Chunk {
    chunk_id: String,
    table_id: i32,
    range: Range,
}

/// What the lanes share.
struct Pass {
    id: i64,
    source: Arc<Endpoint>,
    target: Arc<Endpoint>,
    tables: HashMap<i32, TableWork>,
    /// The target's snapshot that every chunk is compared under.
    target_snapshot: String,
    /// The source's snapshot that tables without a key are read under: positions move.
    source_snapshot: Option<String>,
    /// Only what was drawn is compared.
    sampled: bool,
    left: Mutex<VecDeque<Chunk>>,
    counters: Arc<Counters>,
    stop: Stop,
}

/// Compares a run's sources with its targets and tells the verdict.
pub async fn reconcile(job: &Job, wanted: &str, sample: f64, strict: bool, stop: Stop) -> Result<u8> {
    let extent = Extent { sample, strict, repaired: false };
    let Some(verdict) = pass(job, wanted, extent, stop).await? else {
        return Ok(130);
    };
    verdict.print(job.json)?;
    Ok(verdict.exit_code())
}

/// What a pass looks at.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// The fraction of contents that are looked at; 1: all.
    pub sample: f64,
    /// Records that changed in the source are mismatches, too.
    pub strict: bool,
    /// Chunks that the pass before found right, and nobody touched since, are not read from the source again.
    pub repaired: bool,
}

/// One pass over a run; none: interrupted.
pub async fn pass(job: &Job, wanted: &str, extent: Extent, stop: Stop) -> Result<Option<Verdict>> {
    let source = Arc::new(Endpoint::resolve(Side::Source, &job.source)?);
    let target = Arc::new(Endpoint::resolve(Side::Target, &job.target)?);
    let admin = target.connect(Role::Admin).await?;
    runs::check_versions(&admin).await?;
    let run = runs::find(&admin, wanted).await?;
    runs::check_source(&source.connect(Role::Admin).await?, &run).await?;
    admin
        .client
        .execute("SELECT dedup.hold_run($1::uuid)", &[&run.run_id])
        .await
        .at(Side::Target, "reserving the run")?;
    let id = begin(&admin, &run, extent).await?;
    let sampled = extent.sample < 1.0;
    if sampled {
        let keys = draw_sample(&admin, id).await?;
        tracing::info!("reconciling a sample of run {} ({}), pass {id}: {keys} keys", run.run_id, run.name);
        warn_of_keyless(&admin, &run).await?;
    } else {
        tracing::info!("reconciling run {} ({}), pass {id}", run.run_id, run.name);
    }
    // After that, so that the snapshot knows of the pass and what was drawn for it.
    let (_keeper, target_snapshot) = setup::export_snapshot(&target).await?;
    if !sampled {
        recheck(&admin, id, &target_snapshot).await?;
    }
    let resumable = |error: Error| match error.hint {
        Some(_) => error,
        None => error.hint(format!("pg-dedup-migrate reconcile {} goes on with what is left", run.run_id)),
    };
    let (left, plan) = chunks_left(&admin, run.run_id, id, extent.sample).await?;
    let tables = tables::load(&admin, run.run_id).await?;
    let keyless = left.iter().any(|chunk| chunk.range.kind == RangeKind::Ctid);
    let (_source_keeper, source_snapshot) = match keyless {
        true => {
            let (keeper, snapshot) = setup::export_snapshot(&source).await?;
            (Some(keeper), Some(snapshot))
        }
        false => (None, None),
    };
    let counters = Arc::new(Counters::default());
    let pass = Arc::new(Pass {
        id,
        source,
        target,
        tables,
        target_snapshot,
        source_snapshot,
        sampled,
        left: Mutex::new(left),
        counters: counters.clone(),
        stop: stop.clone(),
    });
    {
        let _throttling = Flow {
            source: Some(pass.source.clone()),
            target: pass.target.clone(),
            run: run.run_id,
            lanes: worker::lanes(job.workers),
            counters: pass.counters.clone(),
            status: None,
        }
        .start()
        .await;
        let _progress = Progress::show(counters, plan);
        compare(&pass, job.workers).await.map_err(resumable)?;
    }
    let concluded = tokio::select! {
        biased;
        () = stop.asked() => None,
        concluded = conclude(&admin, id) => Some(concluded),
    };
    let Some(concluded) = concluded else {
        admin.cancel().await;
        tracing::warn!("interrupted; pg-dedup-migrate reconcile {} goes on with what is left", run.run_id);
        return Ok(None);
    };
    concluded.map_err(resumable)?;
    Verdict::load(&admin, id).await.map(Some)
}

async fn begin(admin: &Session, run: &Run, extent: Extent) -> Result<i64> {
    admin
        .client
        .query_one(
            "SELECT dedup.begin_reconcile($1::uuid, $2::float8, $3::bool, $4::bool)",
            &[&run.run_id, &extent.sample, &extent.strict, &extent.repaired],
        )
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "begin_reconcile")
}

/// Has the target choose what a sampled pass looks at, unless it has; answers how many keys that is.
async fn draw_sample(admin: &Session, id: i64) -> Result<i64> {
    admin
        .client
        .query_one("SELECT dedup.draw_sample($1::bigint)", &[&id])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "draw_sample")
}

/// Says which tables a sample leaves out.
async fn warn_of_keyless(admin: &Session, run: &Run) -> Result<()> {
    let doing = "looking for tables without a key";
    let sql = "SELECT string_agg(source, ', ' ORDER BY table_id) FROM dedup.run_tables WHERE run_id = $1 AND keyless";
    let row = admin.client.query_one(sql, &[&run.run_id]).await.at(Side::Target, doing)?;
    if let Some(keyless) = row.try_get::<_, Option<String>>(0).at(Side::Target, doing)? {
        tracing::warn!("not in the sample: {keyless}: without a key nothing can be fetched by it");
    }
    Ok(())
}

/// Has the target forget chunks that an earlier attempt at the pass compared, and whose rows are others now.
async fn recheck(admin: &Session, id: i64, snapshot: &str) -> Result<()> {
    enter_snapshot(admin, snapshot).await?;
    let forgotten: i64 = admin
        .client
        .query_one("SELECT dedup.recheck_chunks($1::bigint)", &[&id])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "recheck_chunks")?;
    admin.client.batch_execute("COMMIT").await.at(Side::Target, "recheck_chunks")?;
    if forgotten > 0 {
        tracing::info!("{forgotten} chunks that were compared before are compared again");
    }
    Ok(())
}

/// Begins a transaction that sees the target as it was when the pass began.
async fn enter_snapshot(target: &Session, snapshot: &str) -> Result<()> {
    let begin = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT {}; {GENERIC_PLANS}",
        quote_literal(snapshot)
    );
    target.client.batch_execute(&begin).await.at(Side::Target, "entering the pass's snapshot")
}

/// The chunks that workers compare, and how much there is in all. Sources that the target database sees it compares itself, in the end.
async fn chunks_left(admin: &Session, run: Uuid, id: i64, sample: f64) -> Result<(VecDeque<Chunk>, Plan)> {
    let doing = "listing the chunks to compare";
    let rows = admin
        .client
        .query(
            "SELECT chunk_id, table_id, range_kind, range_lower, range_upper, coalesce(estimated_bytes, 0) \
             FROM dedup.chunks_to_reconcile($1) WHERE NOT local",
            &[&id],
        )
        .await
        .at(Side::Target, doing)?;
    let mut chunks = VecDeque::with_capacity(rows.len());
    let mut bytes = 0u64;
    for row in rows {
        let kind: String = row.try_get(2).at(Side::Target, doing)?;
        chunks.push_back(Chunk {
            chunk_id: row.try_get(0).at(Side::Target, doing)?,
            table_id: row.try_get(1).at(Side::Target, doing)?,
            range: Range {
                kind: RangeKind::named(&kind).ok_or_else(|| {
                    protocol_error(Side::Target, format!("unknown kind of range \"{kind}\""))
                })?,
                lower: row.try_get(3).at(Side::Target, doing)?,
                upper: row.try_get(4).at(Side::Target, doing)?,
            },
        });
        bytes += row.try_get::<_, i64>(5).at(Side::Target, doing)?.unsigned_abs();
    }
    let whole = Plan::load(admin, run).await?;
    let done_chunks = whole.total_chunks - chunks.len() as u64;
    let part = |bytes: u64| (bytes as f64 * sample) as u64;
    let plan = Plan {
        total_bytes: part(whole.total_bytes.max(bytes)),
        done_bytes: part(whole.total_bytes.max(bytes) - bytes),
        total_chunks: whole.total_chunks,
        done_chunks,
        work: Work::Compare,
    };
    Ok((chunks, plan))
}

/// Compares what is left, several chunks at a time: while some are compared in the target, others are read.
async fn compare(pass: &Arc<Pass>, workers: u16) -> Result<()> {
    let mut lanes = tokio::task::JoinSet::new();
    for _ in 0..worker::lanes(workers) {
        let pass = pass.clone();
        lanes.spawn_blocking(move || worker::on_own_thread(lane(pass)));
    }
    worker::join(lanes).await
}

async fn lane(pass: Arc<Pass>) -> Result<()> {
    let mut sessions: Option<(Session, Session)> = None;
    let mut spent: Option<Batch> = None;
    while !pass.stop.finishing() {
        let next = pass.left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(chunk) = next else { break };
        tokio::select! {
            done = compare_patiently(&pass, &chunk, &mut sessions, &mut spent) => done?,
            () = pass.stop.aborted() => break,
        }
    }
    if let Some((source, target)) = sessions {
        tokio::join!(source.close(), target.close());
    }
    Ok(())
}

/// One chunk, tried again while the reason it fails for may pass.
async fn compare_patiently(
    pass: &Pass,
    chunk: &Chunk,
    sessions: &mut Option<(Session, Session)>,
    spent: &mut Option<Batch>,
) -> Result<()> {
    let mut lost_track = false;
    patiently(&pass.stop, &format!("chunk {}: ", chunk.chunk_id), async || {
        let compared = compare_chunk(pass, chunk, sessions, spent, lost_track).await;
        if compared.is_err() {
            lost_track = true;
            *sessions = None;
        }
        compared
    })
    .await
}

async fn compare_chunk(
    pass: &Pass,
    chunk: &Chunk,
    sessions: &mut Option<(Session, Session)>,
    spent: &mut Option<Batch>,
    lost_track: bool,
) -> Result<()> {
    let (source, target) = match sessions {
        Some(open) => open,
        None => {
            let (source, target) =
                tokio::join!(pass.source.connect(Role::Reader), pass.target.connect(Role::Writer));
            sessions.insert((source?, target?))
        }
    };
    // A connection that is lost in the middle of a COMMIT does not tell how it ended.
    if lost_track && is_entered(target, pass.id, &chunk.chunk_id).await? {
        return Ok(());
    }
    let table = pass.tables.get(&chunk.table_id).ok_or_else(|| {
        protocol_error(Side::Target, format!("chunk {} belongs to no table of the run", chunk.chunk_id))
    })?;
    let keys = if pass.sampled { Some(sampled_keys(pass, chunk, target).await?) } else { None };
    let extent = match (&keys, &pass.source_snapshot) {
        // Nothing of it is in the sample.
        (Some(None), _) => {
            call(pass, chunk, target, &[]).await?;
            pass.counters.compared(0, 0, 0);
            return Ok(());
        }
        (Some(Some(keys)), _) if !keys.is_empty() && table.spec.finds_keys(&table.layout) => {
            read::Extent::Keys(keys)
        }
        (_, Some(snapshot)) if chunk.range.kind == RangeKind::Ctid => read::Extent::AllUnder(snapshot),
        // The target picks those that were drawn.
        _ => read::Extent::All,
    };
    let read = read::read_chunk(source, table, &chunk.range, extent, &pass.counters, spent.take()).await?;
    failpoint::reach(Failpoint::Read).await;
    let records = read.batch.packed_records().map_err(|e| {
        Error::new(Side::Source, Kind::Protocol, format!("a record of the chunk: {e}")).because(e)
    })?;
    let mismatches = call(pass, chunk, target, &records).await?;
    pass.counters.compared(read.bytes, read.batch.len() as u64, mismatches);
    failpoint::reach(Failpoint::AfterCommit).await;
    *spent = Some(read.batch);
    Ok(())
}

/// The chunk's keys in the sample: of each key column an array of texts.
async fn sampled_keys(pass: &Pass, chunk: &Chunk, target: &Session) -> Result<Option<Vec<String>>> {
    let statement = target.prepared("SELECT dedup.sampled_keys($1::bigint, $2::text)").await?;
    target
        .client
        .query_one(&statement, &[&pass.id, &chunk.chunk_id])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "sampled_keys")
}

/// Whether the chunk was compared.
async fn is_entered(target: &Session, id: i64, chunk_id: &str) -> Result<bool> {
    target
        .client
        .query_one(
            "SELECT EXISTS (SELECT FROM dedup.reconciled_chunks WHERE reconciliation_id = $1 AND chunk_id = $2)",
            &[&id, &chunk_id],
        )
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "looking for the chunk")
}

/// Has the target compare the records with its rows, as they were when the pass began.
async fn call(pass: &Pass, chunk: &Chunk, target: &Session, records: &[u8]) -> Result<u64> {
    let statement = target.prepared("SELECT dedup.reconcile_chunk($1::bigint, $2::text, $3::bytea)").await?;
    enter_snapshot(target, &pass.target_snapshot).await?;
    let mismatches: i64 = target
        .client
        .query_one(&statement, &[&pass.id, &chunk.chunk_id, &records])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "reconcile_chunk")?;
    failpoint::reach(Failpoint::BeforeCommit).await;
    target.client.batch_execute("COMMIT").await.at(Side::Target, "entering what was found")?;
    Ok(mismatches.unsigned_abs())
}

/// What is left when every chunk is compared: sources that the target database sees, the index, the verdict.
async fn conclude(admin: &Session, id: i64) -> Result<()> {
    for (doing, sql) in [
        ("reconcile_local_chunks", "SELECT dedup.reconcile_local_chunks($1)"),
        ("settle_reconcile", "SELECT dedup.settle_reconcile($1)"),
        ("close_reconcile", "SELECT dedup.close_reconcile($1)"),
    ] {
        admin.client.execute(sql, &[&id]).await.at(Side::Target, doing)?;
    }
    Ok(())
}
