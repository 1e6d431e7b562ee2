//! `run --dry-run`: everything that a run would do but writing.
//!
//! ```text
//!   plan       as for a run, every check of both sides included, in a transaction that is taken back
//!   lanes      read a chunk ─▶ what of it the target has ─▶ contents met before ─▶ rows tried on a temporary table
//!   queries    unique constraints and foreign keys, which no single row tells
//!   prediction records, duplicates, refusals, sizes, time
//! ```
//!
//! The target's tables are read and never written; rows go into temporary tables of their shape, which are measured and emptied again. With a
//! sample, chunks are drawn by lot, small ones where a table has few.

mod constraints;
mod contents;
mod prediction;
mod shape;
mod tally;
mod trial;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pg_dedup_record::Batch;
use pg_dedup_record::fold::Books;
use tokio::sync::Semaphore;

use self::constraints::Questions;
use self::contents::Contents;
use self::prediction::{Prediction, TablePrediction};
use self::shape::Shape;
use self::tally::{Cast, Outcome, Standing, Tally};
use self::trial::{OverBudget, Trials};
use crate::config::{DEFAULT_ERROR_BUDGET, Job};
use crate::conn::{Endpoint, Role, Session, protocol_error};
use crate::error::{At, Error, Kind, Result, Side};
use crate::plan::{self, PlannedChunk};
use crate::progress::{Counters, Plan, Progress};
use crate::read::{self, Extent};
use crate::retry::patiently;
use crate::run::Ends;
use crate::setup::{self, Added, Planned};
use crate::source::RangeKind;
use crate::stop::Stop;
use crate::tables::TableWork;
use crate::worker;

/// Contents that are kept at most, of all targets together: about 200 MB.
const MOST_CONTENTS: usize = 4 << 20;

/// How a run is rehearsed.
#[derive(Debug, Clone, Copy)]
pub struct Rehearsal {
    /// The fraction of chunks that are read; 1: all.
    pub sample: f64,
    /// What the run may take.
    pub deadline: Option<Duration>,
}

/// Foresees a run and prints what it would come to.
pub async fn rehearse(job: &Job, rehearsal: Rehearsal, stop: Stop) -> Result<u8> {
    let mut ends = Ends::connect(job).await?;
    let source = ends.source.connect(Role::Planner).await?;
    let planned =
        setup::plan_only(job, &ends.source, &ends.source.connect(Role::Admin).await?, &ends.admin).await?;
    let drawn = draw(&planned, &source, rehearsal.sample).await?;
    let mut stage = Stage::prepare(&ends, job, &planned.tables, drawn, &stop).await?;
    let plan = stage.plan();
    let started = Instant::now();
    {
        let _progress = Progress::show(stage.counters.clone(), plan);
        stage = stage.play(job.workers).await?;
    }
    let took = started.elapsed();
    drop(planned.snapshot_keeper);
    if stop.finishing() {
        tracing::warn!("interrupted; nothing was written, and nothing is foreseen");
        return Ok(130);
    }
    let mut prediction = stage.foresee(job, took);
    prediction.sample = rehearsal.sample;
    ends.revive().await?;
    let pairs: Vec<&Added> = planned.tables.iter().map(|(pair, _)| pair).collect();
    let refusing: Vec<i32> = pairs
        .iter()
        .zip(&prediction.tables)
        .filter(|(_, foreseen)| !foreseen.refused.is_empty())
        .map(|(pair, _)| pair.table_id)
        .collect();
    for (pair, foreseen) in pairs.iter().zip(&mut prediction.tables) {
        let part = &stage.parts[&pair.table_id];
        if part.occupied && !part.indexed {
            let rows =
                "which records repeat rows that stand there: they are not indexed (the run does that first)";
            foreseen.not_tried.push(rows.into());
        }
        if rehearsal.sample < 1.0 {
            foreseen
                .not_tried
                .push("unique constraints and foreign keys: all records are needed for that".into());
            continue;
        }
        let questions = Questions { pairs: &pairs, refusing: &refusing, occupied: part.occupied };
        let looked = tokio::select! {
            looked = constraints::look(&source, &ends.admin, pair, &questions) => looked,
            () = stop.asked() => {
                source.cancel().await;
                ends.admin.cancel().await;
                return Ok(130);
            }
        };
        match looked {
            Ok(looked) => {
                foreseen.refuse(looked.refused);
                foreseen.not_tried.extend(looked.not_tried);
            }
            // What was read and tried is not thrown away for that.
            Err(error) => {
                foreseen.not_tried.push(format!("unique constraints and foreign keys: {error}"));
                ends.revive().await?;
            }
        }
    }
    prediction.judge(rehearsal.deadline);
    prediction.print(job.json)?;
    Ok(prediction.exit_code())
}

/// One pair on stage.
struct Part {
    pair: Added,
    /// How its source is read.
    table: TableWork,
    /// The target has rows.
    occupied: bool,
    /// It does, and which contents they have is known.
    indexed: bool,
    /// Indexes of the target.
    indexes: u32,
    /// Layout as the extension takes it.
    layout: serde_json::Value,
    /// How its temporary tables are made.
    shape: Shape,
    chunks: u64,
    planned_bytes: u64,
}

/// What the lanes share.
struct Stage {
    source: Arc<Endpoint>,
    target: Arc<Endpoint>,
    parts: BTreeMap<i32, Part>,
    left: Mutex<VecDeque<(i32, PlannedChunk)>>,
    reading: Semaphore,
    writing: Semaphore,
    error_budget: u64,
    /// By target: sources that share one share its contents.
    contents: HashMap<u32, Mutex<Contents>>,
    tallies: Mutex<BTreeMap<i32, Tally>>,
    counters: Arc<Counters>,
    stop: Stop,
}

impl Stage {
    async fn prepare(
        ends: &Ends,
        job: &Job,
        tables: &[(Added, Vec<PlannedChunk>)],
        drawn: Vec<(i32, PlannedChunk)>,
        stop: &Stop,
    ) -> Result<Stage> {
        let mut parts = BTreeMap::new();
        for (pair, chunks) in tables {
            let layout = serde_json::to_value(&pair.layout)
                .map_err(|e| Error::here(Kind::Protocol, format!("unprintable layout: {e}")))?;
            let (occupied, indexed, indexes) = occupancy(&ends.admin, pair, &layout).await?;
            let part = Part {
                table: TableWork::into_table(pair, &pair.target.name.quoted()),
                occupied,
                indexed,
                indexes,
                shape: Shape::of(&ends.admin, pair).await?,
                layout,
                chunks: chunks.len() as u64,
                planned_bytes: chunks.iter().map(|chunk| chunk.bytes).sum(),
                pair: pair.clone(),
            };
            parts.insert(pair.table_id, part);
        }
        let targets: std::collections::BTreeSet<u32> =
            tables.iter().map(|(pair, _)| pair.target.oid).collect();
        let most = MOST_CONTENTS / targets.len().max(1);
        Ok(Stage {
            source: ends.source.clone(),
            target: ends.target.clone(),
            tallies: Mutex::new(parts.keys().map(|id| (*id, Tally::default())).collect()),
            parts,
            left: Mutex::new(drawn.into()),
            reading: Semaphore::new(job.workers.into()),
            writing: Semaphore::new(job.workers.into()),
            error_budget: job.error_budget.unwrap_or(DEFAULT_ERROR_BUDGET),
            contents: targets.into_iter().map(|oid| (oid, Mutex::new(Contents::new(most)))).collect(),
            counters: Arc::new(Counters::default()),
            stop: stop.clone(),
        })
    }

    fn plan(&self) -> Plan {
        let left = lock(&self.left);
        Plan {
            total_bytes: left.iter().map(|(_, chunk)| chunk.bytes).sum(),
            total_chunks: left.len() as u64,
            ..Plan::default()
        }
    }

    /// Works on the chunks as a run would: as many are read at a time as there are workers, and as many tried.
    async fn play(self, workers: u16) -> Result<Stage> {
        let stage = Arc::new(self);
        let mut lanes = tokio::task::JoinSet::new();
        for _ in 0..worker::lanes(workers) {
            let stage = stage.clone();
            lanes.spawn_blocking(move || worker::on_own_thread(lane(stage)));
        }
        worker::join(lanes).await?;
        Arc::into_inner(stage).ok_or_else(|| Error::here(Kind::Protocol, "a lane is still at it"))
    }

    fn foresee(&self, job: &Job, took: Duration) -> Prediction {
        let tallies = lock(&self.tallies);
        let mut tables: Vec<TablePrediction> = Vec::new();
        for (oid, contents) in &self.contents {
            let on_target: Vec<(&Part, &Tally)> = self
                .parts
                .iter()
                .filter(|(_, part)| part.pair.target.oid == *oid)
                .filter_map(|(id, part)| Some((part, tallies.get(id)?)))
                .collect();
            tables.extend(tally::foresee(&on_target, &lock(contents)));
        }
        let order: Vec<&Part> = self.parts.values().collect();
        let place = |table: &TablePrediction| {
            order.iter().position(|part| {
                part.table.source == table.source && part.pair.target.name.to_string() == table.target
            })
        };
        tables.sort_by_key(place);
        let read: u64 = tallies.values().map(|tally| tally.read_bytes).sum();
        let bytes_per_second = read as f64 / took.as_secs_f64().max(0.001);
        let bytes: u64 = tables.iter().map(|table| table.bytes).sum();
        Prediction {
            source: self.source.place(),
            target: self.target.place(),
            sample: 1.0,
            workers: job.workers,
            tables,
            bytes_per_second,
            seconds: if bytes == 0 { 0.0 } else { bytes as f64 / bytes_per_second.max(1.0) },
            deadline_seconds: None,
            deadline_kept: None,
        }
    }
}

/// The chunks that are read, by table.
async fn draw(planned: &Planned, source: &Session, sample: f64) -> Result<Vec<(i32, PlannedChunk)>> {
    /// Chunks of a table that are drawn at least, where it is large enough for that many of [`SMALLEST`]: the fewer, the more chance there is.
    const FEWEST: u64 = 400;
    const SMALLEST: u64 = 32_000;
    let mut drawn = Vec::new();
    for (pair, chunks) in &planned.tables {
        let bytes: u64 = chunks.iter().map(|chunk| chunk.bytes).sum();
        let smaller = ((bytes as f64 * sample) as u64 / FEWEST).max(SMALLEST);
        let chosen = if sample >= 1.0 {
            chunks.clone()
        } else if chunks.iter().any(|chunk| chunk.bytes > smaller)
            && (chunks.len() as f64 * sample) < FEWEST as f64
        {
            let session =
                planned.snapshot_keeper.as_ref().filter(|_| pair.spec.key.is_empty()).unwrap_or(source);
            by_lot(&plan::plan_table(session, &pair.spec, &pair.source, smaller).await?, sample)
        } else {
            by_lot(chunks, sample)
        };
        drawn.extend(chosen.into_iter().map(|chunk| (pair.table_id, chunk)));
    }
    Ok(drawn)
}

/// So many of some chunks, in their order; the same ones each time.
fn by_lot(chunks: &[PlannedChunk], sample: f64) -> Vec<PlannedChunk> {
    let wanted = ((chunks.len() as f64 * sample).round() as usize).clamp(chunks.len().min(1), chunks.len());
    let lot = |index: usize| {
        let mut hasher = DefaultHasher::new();
        index.hash(&mut hasher);
        hasher.finish()
    };
    let mut indices: Vec<usize> = (0..chunks.len()).collect();
    indices.sort_by_key(|index| lot(*index));
    indices.truncate(wanted);
    indices.sort_unstable();
    indices.into_iter().map(|index| chunks[index].clone()).collect()
}

/// Whether the target has rows, whether the hash index has their contents, and how many indexes it has.
async fn occupancy(target: &Session, pair: &Added, layout: &serde_json::Value) -> Result<(bool, bool, u32)> {
    let doing = "looking at the target";
    let sql = format!(
        "SELECT EXISTS (SELECT FROM {}), EXISTS (SELECT FROM dedup.targets AS g \
             WHERE g.target = $1 AND g.indexed_at IS NOT NULL AND g.signature = dedup.signature_of($2::jsonb)), \
             (SELECT pg_catalog.count(*) FROM pg_catalog.pg_index AS i WHERE i.indrelid = $1)",
        pair.target.name.quoted()
    );
    let row = target.client.query_one(&sql, &[&pair.target.oid, layout]).await.at(Side::Target, doing)?;
    let indexes: i64 = row.try_get(2).at(Side::Target, doing)?;
    Ok((
        row.try_get(0).at(Side::Target, doing)?,
        row.try_get(1).at(Side::Target, doing)?,
        u32::try_from(indexes).unwrap_or(u32::MAX),
    ))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A lane's sessions, and the temporary tables in the second.
struct Sessions {
    source: Session,
    target: Session,
    trials: Trials,
}

async fn lane(stage: Arc<Stage>) -> Result<()> {
    let mut sessions: Option<Sessions> = None;
    let mut spent: Option<Batch> = None;
    while !stage.stop.finishing() {
        let next = lock(&stage.left).pop_front();
        let Some((table_id, chunk)) = next else { break };
        let part =
            stage.parts.get(&table_id).ok_or_else(|| protocol_error(Side::Here, "a chunk of no table"))?;
        let label = format!("{}: ", part.table.source);
        let done = patiently(&stage.stop, &label, async || {
            let done = rehearse_chunk(&stage, part, &chunk, &mut sessions, &mut spent).await;
            if done.is_err() {
                // What was not measured yet goes with the session.
                sessions = None;
            }
            done
        });
        tokio::select! {
            done = done => done?,
            () = stage.stop.aborted() => break,
        }
    }
    let Some(mut sessions) = sessions else { return Ok(()) };
    for table_id in stage.parts.keys() {
        // What this lane wrote last is not measured then; what others did stands for it.
        if let Err(error) = measure(&stage, &mut sessions, *table_id, true).await {
            tracing::warn!("{}: {error}", stage.parts[table_id].table.source);
        }
    }
    tokio::join!(sessions.source.close(), sessions.target.close());
    Ok(())
}

async fn rehearse_chunk(
    stage: &Stage,
    part: &Part,
    chunk: &PlannedChunk,
    sessions: &mut Option<Sessions>,
    spent: &mut Option<Batch>,
) -> Result<()> {
    let sessions = match sessions {
        Some(open) => open,
        None => {
            let (source, target) =
                tokio::join!(stage.source.connect(Role::Reader), stage.target.connect(Role::Writer));
            sessions.insert(Sessions { source: source?, target: target?, trials: Trials::default() })
        }
    };
    let turn = worker::take_turn(&stage.reading).await?;
    let extent = match &part.table.spec.snapshot {
        Some(snapshot) if chunk.range.kind == RangeKind::Ctid => Extent::AllUnder(snapshot),
        _ => Extent::All,
    };
    let read =
        read::read_chunk(&sessions.source, &part.table, &chunk.range, extent, &stage.counters, spent.take())
            .await?;
    drop(turn);
    let _turn = worker::take_turn(&stage.writing).await?;
    let standing =
        if part.occupied { look(&sessions.target, part, &read.batch).await? } else { Standing::nothing() };
    let contents = &stage.contents[&part.pair.target.oid];
    let mut cast = Cast::new(&read.batch, &standing, &lock(contents));
    let mut fails = false;
    loop {
        let candidates = cast.candidates();
        if candidates.is_empty() {
            break;
        }
        let left = stage.error_budget.saturating_sub(cast.refused());
        let attempt = sessions.trials.attempt(
            &sessions.target,
            &part.pair,
            &part.shape,
            &read.batch,
            &candidates,
            left,
        );
        match attempt.await? {
            Ok(refused) => cast.tried(refused),
            Err(OverBudget) => {
                fails = true;
                break;
            }
        }
    }
    // Before anything is added up: what fails from here on is nobody's to try again.
    measure(stage, sessions, part.pair.table_id, false).await?;
    let outcome = if fails {
        Outcome::failed(read.batch.len() as u64)
    } else {
        tally::outcome(&read.batch, cast, &standing, &mut lock(contents))?
    };
    let counts = [
        outcome.records,
        outcome.inserted,
        outcome.updated,
        outcome.unchanged,
        outcome.duplicates,
        outcome.refused_records(),
    ];
    stage.counters.committed(read.bytes, &Books { counts, checksums: Vec::new() });
    if let Some(tally) = lock(&stage.tallies).get_mut(&part.pair.table_id) {
        tally.add(outcome, chunk.bytes, read.bytes);
    }
    *spent = Some(read.batch);
    Ok(())
}

async fn measure(stage: &Stage, sessions: &mut Sessions, table_id: i32, all: bool) -> Result<()> {
    let measured = sessions.trials.measure(&sessions.target, table_id, all).await?;
    if let Some(measured) = measured
        && let Some(tally) = lock(&stage.tallies).get_mut(&table_id)
    {
        tally.measured(measured);
    }
    Ok(())
}

/// What of a chunk's records stands in the target.
async fn look(target: &Session, part: &Part, batch: &Batch) -> Result<Standing> {
    let records = batch.packed_records().map_err(|e| {
        Error::new(Side::Source, Kind::Protocol, format!("a record of the chunk: {e}")).because(e)
    })?;
    let statement =
        target.prepared("SELECT dedup.rehearse_records($1::oid::regclass, $2::jsonb, $3::bytea)").await?;
    let found: Vec<u8> = target
        .client
        .query_one(&statement, &[&part.pair.target.oid, &part.layout, &records])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "rehearse_records")?;
    Ok(Standing::of(found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Range;

    #[test]
    fn lots_are_spread_over_the_table() {
        let range = Range { kind: RangeKind::Key, lower: None, upper: None };
        let chunks: Vec<PlannedChunk> =
            (0..1000).map(|n| PlannedChunk { range: range.clone(), records: n, bytes: 1 }).collect();
        let chosen =
            |of: &[PlannedChunk], sample| by_lot(of, sample).iter().map(|c| c.records).collect::<Vec<_>>();
        assert_eq!(chosen(&chunks, 1.0), (0..1000).collect::<Vec<_>>());
        let tenth = chosen(&chunks, 0.1);
        assert!(tenth.len() == 100 && tenth.is_sorted());
        for quarter in 0..4 {
            let drawn = tenth.iter().filter(|n| **n / 250 == quarter).count();
            assert!((10..40).contains(&drawn), "{drawn} of 100 in quarter {quarter}");
        }
        assert_eq!(chosen(&chunks[..5], 0.01).len(), 1);
        assert!(chosen(&[], 0.5).is_empty());
    }
}
