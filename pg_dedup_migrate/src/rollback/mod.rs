//! Rollback: what a run, or one chunk of it, did to its targets is taken back.
//!
//! ```text
//! prepare   under every target's exclusive lock, in one transaction:
//!             dependents   does anybody else rest on what leaves? refused, or (force) kept for them
//!             references   do foreign keys point at it? refused
//!             layout       the entries of each finish become segments of their own
//! undo      one finish (ordinal) at a time, newest first, each in a transaction of its own or all in one:
//!             look         which rows are still what was written
//!             restore      before images become rows again
//! ```
//!
//! Undoing a finish is its exact inverse: rows it inserted are deleted, rows it changed or removed get their before image back, its entries and
//! tombstones leave the index, which says then what it said before. So several finishes that touched one row are undone newest first, and whoever
//! finds that a newer one has not been undone yet comes back later.
mod awaited;
mod dependents;
mod heirs;
mod keyless;
mod layout;
mod look;
mod referenced;
mod restore;
mod step;
mod undo;

use std::collections::BTreeSet;

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{Uuid, pg_sys};

use crate::error::{Error, Result};
use crate::index::Target;
use crate::indexing::{lock_exclusively, refuse_row_security};
use crate::keyset::qualified_name;
use crate::pace;
use crate::relation::Snapshot;
use crate::segment::{self, Segment};
use crate::sql::{self, required};
use heirs::HandedOver;

/// A row of `dedup.rollbacks`.
struct Rollback {
    id: i64,
    run: Uuid,
    /// `None`: the whole run.
    chunk: Option<String>,
    forced: bool,
    /// Others changed rows after what is taken back.
    overwritten: bool,
}

impl Rollback {
    fn load(id: i64) -> Result<Self> {
        Spi::connect(|client| {
            let rows = client.select(
                "SELECT run_id, chunk_id, is_forced, is_overwritten FROM dedup.rollbacks WHERE rollback_id = $1 AND finished_at IS NULL",
                Some(1),
                &[id.into()],
            )?;
            let row = rows
                .into_iter()
                .next()
                .ok_or_else(|| Error::undefined(format!("there is no open rollback {id}")))?;
            Ok(Self {
                id,
                run: required(row["run_id"].value()?)?,
                chunk: row["chunk_id"].value()?,
                forced: required(row["is_forced"].value()?)?,
                overwritten: required(row["is_overwritten"].value()?)?,
            })
        })
    }

    /// What it takes back, for messages.
    fn name(&self) -> String {
        match &self.chunk {
            Some(chunk) => format!("chunk {chunk} of run {}", self.run),
            None => format!("run {}", self.run),
        }
    }
}

/// What leaves one target.
struct Part {
    target: Target,
    /// The finishes that are taken back.
    ordinals: BTreeSet<u64>,
}

impl Part {
    fn of(rollback: &Rollback) -> Result<Vec<Self>> {
        let numbers: Vec<i32> = Spi::connect(|client| -> Result<_> {
            client
                .select(
                    "SELECT DISTINCT target_id FROM dedup.ordinals WHERE run_id = $1 AND ($2::pg_catalog.text IS NULL OR chunk_id = $2) ORDER BY 1",
                    None,
                    &[rollback.run.into(), rollback.chunk.clone().into()],
                )?
                .map(|row| required(row["target_id"].value()?))
                .collect()
        })?;
        // Locked before anything is read of them: what a chunk in flight writes is seen.
        numbers.iter().try_for_each(|&number| lock_exclusively(number))?;
        refuse_second(rollback, &numbers)?;
        numbers
            .into_iter()
            .map(|number| {
                let target = Target::by_id(number)?;
                refuse_dropped(&target)?;
                refuse_row_security(target.table, "would stay behind")?;
                Spi::run_with_args("SELECT dedup.refuse_replaced($1)", &[number.into()])?;
                let ordinals = ordinals(rollback.run, rollback.chunk.as_deref(), number)?;
                Ok(Self { target, ordinals })
            })
            .collect()
    }

    fn oldest(&self) -> u64 {
        self.ordinals.first().copied().unwrap_or_default()
    }

    fn has(&self, ordinal: u64) -> bool {
        self.ordinals.contains(&ordinal)
    }

    /// May the segment hold entries that leave?
    fn overlaps(&self, segment: &Segment) -> bool {
        let range = segment.first_ordinal.cast_unsigned()..=segment.last_ordinal.cast_unsigned();
        self.ordinals.range(range).next().is_some()
    }
}

fn ordinals(run: Uuid, chunk: Option<&str>, target: i32) -> Result<BTreeSet<u64>> {
    sql::ordinals(
        "SELECT ordinal FROM dedup.ordinals WHERE run_id = $1 AND target_id = $2 AND ($3::pg_catalog.text IS NULL OR chunk_id = $3)",
        &[run.into(), target.into(), chunk.into()],
    )
}

/// Rows are taken out of a table by one rollback at a time.
fn refuse_second(rollback: &Rollback, targets: &[i32]) -> Result<()> {
    let other = Spi::get_one_with_args::<String>(
        "SELECT pg_catalog.min(r.run_id::pg_catalog.text) FROM dedup.runs AS r JOIN dedup.run_tables AS t USING (run_id) \
         WHERE r.status = 'rolling_back' AND r.run_id <> $1 AND t.target_id = ANY ($2)",
        &[rollback.run.into(), targets.to_vec().into()],
    )?;
    let Some(other) = other else { return Ok(()) };
    Err(Error::new(
        PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
        format!("run {other} is being rolled back from the same tables"),
    )
    .hint(format!("CALL dedup.rollback_run_in_chunks('{other}') goes on with it.")))
}

fn refuse_dropped(target: &Target) -> Result<()> {
    let stands = Spi::get_one_with_args::<bool>(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_class AS c WHERE c.oid = $1)",
        &[target.table.into()],
    )?;
    if stands == Some(true) {
        return Ok(());
    }
    Err(Error::new(
        PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
        format!("target {} of the run no longer exists", target.id),
    ))
}

/// An index that does not know the rows (it was forgotten, or made anew in a restored database) would make the rollback end having done nothing.
fn refuse_unknown(rollback: &Rollback, part: &Part) -> Result<()> {
    let snapshot = Snapshot::latest();
    let known = segment::segments_of(part.target.id, &snapshot)?.iter().any(|s| part.overlaps(s));
    if known || rollback.forced {
        return Ok(());
    }
    let written = Spi::get_one_with_args::<i64>(
        "SELECT coalesce(pg_catalog.sum(c.inserted_count OPERATOR(pg_catalog.+) c.updated_count), 0)::pg_catalog.int8 \
         FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id) \
         WHERE c.run_id = $1 AND t.target_id = $2 AND ($3::pg_catalog.text IS NULL OR c.chunk_id = $3) \
             AND NOT EXISTS (SELECT FROM dedup.rollback_steps AS s WHERE s.ordinal = c.ordinal AND s.undone_at IS NOT NULL)",
        &[rollback.run.into(), part.target.id.into(), rollback.chunk.clone().into()],
    )?;
    if written.unwrap_or_default() == 0 {
        return Ok(());
    }
    let name = qualified_name(part.target.table);
    Err(Error::state(format!(
        "the hash index of {name} knows none of the rows that {} wrote",
        rollback.name()
    ))
    .detail("It was made anew since, from rows of which it could not tell who wrote them.")
    .hint("If the rows are gone anyway, force the rollback: it takes back what is known."))
}

/// The finishes that a step without keys takes back.
fn ordinals_left(step: &step::Step) -> Result<BTreeSet<u64>> {
    ordinals(step.run, step.only_chunk.as_deref(), step.target.id)
}

/// Rows that others committed meanwhile could not be seen.
fn refuse_strict_isolation() -> Result<()> {
    // SAFETY: a backend's own setting.
    if unsafe { pg_sys::XactIsoLevel } == pg_sys::XACT_READ_COMMITTED as i32 {
        return Ok(());
    }
    Err(Error::state("a rollback is done in a READ COMMITTED transaction")
        .hint("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"))
}

/// `dedup.prepare_rollback`: refuses what others rest on, or keeps it for them; refuses rows that foreign keys point at; lists the steps. Returns
/// the rows kept for others.
///
/// # Errors
/// 55006 naming runs that rest on the rows, 23503 naming foreign keys, 55000 where a target's files were replaced.
#[pg_extern(volatile, parallel_unsafe, strict)]
pub fn prepare_rollback(rollback_id: i64) -> Result<i64, ErrorReport> {
    Ok(prepare(rollback_id)?)
}

fn prepare(id: i64) -> Result<i64> {
    refuse_strict_isolation()?;
    let rollback = Rollback::load(id)?;
    let parts = Part::of(&rollback)?;
    parts.iter().try_for_each(|part| refuse_unknown(&rollback, part))?;
    dependents::refuse(&rollback, &parts)?;
    let handed_over = parts
        .iter()
        .map(|part| match rollback.forced {
            true => heirs::hand_over(&rollback, part),
            false => Ok(HandedOver::default()),
        })
        .collect::<Result<Vec<_>>>()?;
    referenced::refuse(&rollback, &parts, &handed_over)?;
    for (part, handed_over) in parts.iter().zip(&handed_over) {
        layout::split(part, handed_over)?;
        list_steps(&rollback, part)?;
    }
    let kept: i64 = handed_over.iter().map(|h| h.rows).sum();
    Spi::run_with_args(
        "UPDATE dedup.rollbacks SET kept_count = $2, is_overwritten = $3 WHERE rollback_id = $1",
        &[id.into(), kept.into(), dependents::is_overwritten(&rollback, &parts)?.into()],
    )?;
    Ok(kept)
}

/// One step a finish; one in all where rows have no key to find them by: each would scan the table.
fn list_steps(rollback: &Rollback, part: &Part) -> Result<()> {
    let mut ordinals: Vec<i64> = part.ordinals.iter().map(|o| o.cast_signed()).collect();
    if part.target.layout.key.is_empty() {
        ordinals.drain(..ordinals.len().saturating_sub(1));
    }
    Ok(Spi::run_with_args(
        "INSERT INTO dedup.rollback_steps (rollback_id, ordinal, target_id, table_id, chunk_id) \
         SELECT $1, o.ordinal, o.target_id, c.table_id, o.chunk_id \
         FROM dedup.ordinals AS o JOIN dedup.checkpoints AS c USING (run_id, chunk_id) WHERE o.ordinal = ANY ($2) \
             AND NOT EXISTS (SELECT FROM dedup.rollback_steps AS s WHERE s.ordinal = o.ordinal AND s.undone_at IS NOT NULL)",
        &[rollback.id.into(), ordinals.into()],
    )?)
}

/// What a step did.
#[derive(Clone, Copy, Default)]
struct Undone {
    deleted: i64,
    restored: i64,
    left_alone: i64,
}

/// `dedup.undo_ordinal`: takes one finish back and answers what became of its rows; no row: a newer finish that touched one of its rows has to be
/// taken back first. Unless told to be `careful`, it takes every row for what was written until it sees that one isn't.
///
/// # Errors
/// 40001 when a row is not what was written and it was not told to be careful: everything it did is to be taken back. 23503 when a foreign key
/// points at one of the rows, 23000 when the target does not hold what was restored.
#[pg_extern(volatile, parallel_unsafe, strict)]
#[allow(clippy::type_complexity)] // the macro reads the columns from the type
pub fn undo_ordinal(
    rollback_id: i64,
    ordinal: i64,
    careful: bool,
) -> Result<
    TableIterator<'static, (name!(deleted, i64), name!(restored, i64), name!(left_alone, i64))>,
    ErrorReport,
> {
    refuse_strict_isolation()?;
    let rollback = Rollback::load(rollback_id)?;
    let step = step::Step::load(&rollback, ordinal)?;
    let _pace = pace::of_run(step.run)?;
    let undone = if step.target.layout.key.is_empty() {
        Some(keyless::undo(&step)?)
    } else {
        undo::undo(&step, careful)?
    };
    Ok(TableIterator::new(undone.map(|u| (u.deleted, u.restored, u.left_alone))))
}
