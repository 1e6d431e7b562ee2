//! The lanes: chunks are read and tried as a run would read and write them.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pg_dedup_record::Batch;
use pg_dedup_record::fold::Books;
use tokio::sync::Semaphore;

use super::contents::Contents;
use super::prediction::{Prediction, TablePrediction};
use super::shape::Shape;
use super::tally::{self, Cast, Outcome, Standing, Tally};
use super::trial::{OverBudget, Trials};
use crate::config::{DEFAULT_ERROR_BUDGET, Job};
use crate::conn::{Endpoint, Role, Session, protocol_error};
use crate::error::{At, Error, Kind, Result, Side};
use crate::plan::PlannedChunk;
use crate::progress::{Counters, Plan};
use crate::read::{self, Extent};
use crate::retry::patiently;
use crate::run::Ends;
use crate::setup::Added;
use crate::source::RangeKind;
use crate::stop::Stop;
use crate::tables::TableWork;
use crate::worker;

/// Contents that are kept at most, of all targets together: about 200 MB.
const MOST_CONTENTS: usize = 4 << 20;

/// One pair on stage.
pub struct Part {
    /// The pair.
    pub pair: Added,
    /// How its source is read.
    pub table: TableWork,
    /// The target has rows.
    pub occupied: bool,
    /// It does, and which contents they have is known.
    pub indexed: bool,
    /// Indexes of the target.
    pub indexes: u32,
    /// Layout as the extension takes it.
    layout: serde_json::Value,
    /// How its temporary tables are made.
    pub shape: Shape,
    /// Chunks planned.
    pub chunks: u64,
    /// Bytes planned.
    pub planned_bytes: u64,
}

/// What the lanes share.
pub struct Stage {
    source: Arc<Endpoint>,
    target: Arc<Endpoint>,
    /// By number.
    pub parts: BTreeMap<i32, Part>,
    left: Mutex<VecDeque<(i32, PlannedChunk)>>,
    reading: Semaphore,
    writing: Semaphore,
    error_budget: u64,
    /// By target: sources that share one share its contents.
    contents: HashMap<u32, Mutex<Contents>>,
    tallies: Mutex<BTreeMap<i32, Tally>>,
    /// What was done so far.
    pub counters: Arc<Counters>,
    stop: Stop,
}

impl Stage {
    /// Looks at the targets.
    pub async fn prepare(
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
        let targets: BTreeSet<u32> = tables.iter().map(|(pair, _)| pair.target.oid).collect();
        let most = MOST_CONTENTS / targets.len().max(1);
        let counters = Arc::new(Counters::default());
        // Signals belong to a run; the rate that it may have at most is known.
        counters.throttle.at_most(job.throttle.max_rate);
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
            counters,
            stop: stop.clone(),
        })
    }

    /// What there is to read.
    pub fn plan(&self) -> Plan {
        let left = lock(&self.left);
        Plan {
            total_bytes: left.iter().map(|(_, chunk)| chunk.bytes).sum(),
            total_chunks: left.len() as u64,
            ..Plan::default()
        }
    }

    /// Works on the chunks as a run would: as many are read at a time as there are workers, and as many tried.
    pub async fn play(self, workers: u16) -> Result<Stage> {
        let stage = Arc::new(self);
        let mut lanes = tokio::task::JoinSet::new();
        for _ in 0..worker::lanes(workers) {
            let stage = stage.clone();
            lanes.spawn_blocking(move || worker::on_own_thread(lane(stage)));
        }
        worker::join(lanes).await?;
        Arc::into_inner(stage).ok_or_else(|| Error::here(Kind::Protocol, "a lane is still at it"))
    }

    /// What it comes to.
    pub fn foresee(&self, job: &Job, took: Duration, sample: f64) -> Prediction {
        let tallies = lock(&self.tallies);
        let mut by_number: BTreeMap<i32, TablePrediction> = BTreeMap::new();
        for (oid, contents) in &self.contents {
            let on_target: Vec<(&Part, &Tally)> = self
                .parts
                .iter()
                .filter(|(_, part)| part.pair.target.oid == *oid)
                .filter_map(|(id, part)| Some((part, tallies.get(id)?)))
                .collect();
            let numbers = on_target.iter().map(|(part, _)| part.pair.table_id);
            by_number.extend(numbers.zip(tally::foresee(&on_target, &lock(contents))));
        }
        let tables: Vec<TablePrediction> = by_number.into_values().collect();
        let read: u64 = tallies.values().map(|tally| tally.read_bytes).sum();
        let bytes_per_second = read as f64 / took.as_secs_f64().max(0.001);
        let bytes: u64 = tables.iter().map(|table| table.bytes).sum();
        Prediction {
            source: self.source.place(),
            target: self.target.place(),
            sample,
            workers: job.workers,
            tables,
            bytes_per_second,
            seconds: if bytes == 0 { 0.0 } else { bytes as f64 / bytes_per_second.max(1.0) },
            deadline_seconds: None,
            deadline_kept: None,
        }
    }
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
