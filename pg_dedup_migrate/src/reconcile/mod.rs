//! Reconciliation: source and target compared record by record, both hashed anew.
//!
//! ```text
//! records (hashed by the worker) ─┐
//! rows    (hashed here) ──────────┴▶ compare   chunk by chunk: what is present, and what is left over on either side
//!                                      │       the ledger and quarantine of the chunk explain most of what is left over
//! index ─────────────────────────────▶ settle   that every entry has its row, which is what losers rest on
//!                                      ▼
//!                                    report    dedup.reconciled_chunks, dedup.divergences
//! ```
//!
//! Of a sampled pass [`sample`] chooses the keys; it compares what is under them, and says nothing of the index as a whole.
//!
//! Nothing is compared with what the run wrote down about itself: the hash index, the ledger and the books only say what kind of difference it
//! is, or that a duplicate was dropped for a content whose row is really there.
mod compare;
mod explained;
mod report;
mod sample;
mod settle;

use pg_dedup_record::checksum::Checksum;
use pg_dedup_record::layout::Layout;
use pg_dedup_record::wire;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{JsonB, Uuid, pg_sys};

use crate::error::{Error, Result};
use crate::hash::layout::stored_layout;
use crate::hash::rows::View;
use crate::indexing::refuse_row_security;
use crate::keyset::{KeyRange, KeyTypes};
use crate::local;
use crate::pace;
use crate::sql::{required, stored_checksum};

/// One chunk of a pass.
struct Chunk {
    reconciliation: i64,
    run: Uuid,
    chunk_id: String,
    table_id: i32,
    target_id: i32,
    table: pg_sys::Oid,
    /// Columns as the run delivers them: an index serves every run with the same content and key columns.
    layout: Layout,
    key_types: KeyTypes,
    /// Are records that changed in the source mismatches, too?
    strict: bool,
    /// Which of the target's rows are its.
    rows: Rows,
    /// Rows that no run wrote are told once, by the first of the run's sources that share the target.
    counts_rows: bool,
    /// What its checkpoint says of the source.
    read: (i64, Checksum),
}

/// How rows of the target are found for a chunk.
enum Rows {
    /// Those in its key range: keys are ordered alike on both sides.
    Range(KeyRange),
    /// Those under its records' keys.
    Keys,
    /// Those under the keys that were drawn, sorted. Of the source just the records under them are read.
    Sampled(Vec<Vec<u8>>),
    /// None: its records have no key, and none of them can have been written.
    None,
    /// The target has no key: contents are looked up in the index, which is compared with the rows in the end.
    Contents,
}

impl Chunk {
    fn load(reconciliation: i64, chunk_id: &str) -> Result<Self> {
        let chunk = Spi::connect(|client| -> Result<Self> {
            let rows = client.select(
                "SELECT p.run_id, p.verdict, p.is_strict, p.sample < 1 AS sampled, c.table_id, c.range_kind, c.range_lower, c.range_upper, c.source_count, c.checksum, \
                     t.target_id, t.range_comparable, t.keyless, t.layout, t.source_spec OPERATOR(pg_catalog.->) 'key_types' AS key_types, \
                     g.target::pg_catalog.oid AS target, \
                     NOT EXISTS (SELECT FROM dedup.run_tables AS o WHERE o.run_id = t.run_id AND o.target_id = t.target_id \
                                 AND o.table_id OPERATOR(pg_catalog.<) t.table_id) AS counts_rows \
                 FROM dedup.reconciliations AS p JOIN dedup.checkpoints AS c USING (run_id) JOIN dedup.run_tables AS t USING (run_id, table_id) \
                     JOIN dedup.targets AS g USING (target_id) \
                 WHERE p.reconciliation_id = $1 AND c.chunk_id = $2 AND c.status = 'verified'",
                Some(1),
                &[reconciliation.into(), chunk_id.into()],
            )?;
            let row = rows.into_iter().next().ok_or_else(|| {
                Error::undefined(format!("reconciliation {reconciliation} has no verified chunk {chunk_id}"))
            })?;
            let verdict: String = required(row["verdict"].value()?)?;
            if verdict != "open" {
                return Err(Error::state(format!("reconciliation {reconciliation} is {verdict}")));
            }
            let layout = stored_layout(required(row["layout"].value()?)?)?;
            let kind: String = required(row["range_kind"].value()?)?;
            let rows = if required(row["sampled"].value()?)? {
                Rows::Sampled(sample::keys_of(reconciliation, chunk_id)?)
            } else if required(row["keyless"].value()?)? {
                Rows::Contents
            } else if kind == "null_key" {
                Rows::None
            } else if required(row["range_comparable"].value()?)?
                && kind == "key"
                && has_types(&layout, row["key_types"].value()?)
            {
                Rows::Range(KeyRange {
                    lower: row["range_lower"].value()?,
                    upper: row["range_upper"].value()?,
                })
            } else {
                Rows::Keys
            };
            let read = (required(row["source_count"].value()?)?, stored_checksum(row["checksum"].value()?)?);
            let table: pg_sys::Oid = required(row["target"].value()?)?;
            Ok(Self {
                reconciliation,
                run: required(row["run_id"].value()?)?,
                chunk_id: chunk_id.to_owned(),
                strict: required(row["is_strict"].value()?)?,
                table_id: required(row["table_id"].value()?)?,
                target_id: required(row["target_id"].value()?)?,
                table,
                key_types: KeyTypes::of(table, &layout)?,
                layout,
                rows,
                counts_rows: required(row["counts_rows"].value()?)?,
                read,
            })
        })?;
        guard(chunk.target_id, chunk.table)?;
        Ok(chunk)
    }

    /// Has the target no key?
    fn keyless(&self) -> bool {
        self.layout.key.is_empty()
    }
}

/// Are the key's types in the source, modifiers included, those of the target? A key that is rounded on its way may leave its range.
fn has_types(layout: &Layout, key_types: Option<JsonB>) -> bool {
    let Some(JsonB(types)) = key_types else { return false };
    let own = layout.key.iter().map(|&i| layout.columns[i].type_name.as_str());
    types.as_array().is_some_and(|types| own.eq(types.iter().filter_map(|t| t.as_str())))
}

/// The share lock on the hash index: nobody rebuilds it or takes entries out meanwhile. Refuses a target whose files were replaced, or whose rows
/// are hidden from this role: what is hidden would be missing.
fn guard(target_id: i32, table: pg_sys::Oid) -> Result<()> {
    Spi::run_with_args(
        "SELECT pg_catalog.pg_advisory_xact_lock_shared(dedup.lock_class(), $1)",
        &[target_id.into()],
    )?;
    refuse_row_security(table, "would be missing")?;
    Ok(Spi::run_with_args("SELECT dedup.refuse_replaced($1)", &[target_id.into()])?)
}

/// `dedup.reconcile_chunk`: compares a chunk's records, packed as docs/protocol.md has it, with the target's rows, and enters what is found;
/// returns the mismatches.
///
/// # Errors
/// 42704 for an unknown chunk, 55000 when the pass is over or the target's files were replaced, 22023 for a malformed list.
#[pg_extern(volatile, parallel_unsafe, strict)]
pub fn reconcile_chunk(reconciliation_id: i64, chunk_id: &str, records: &[u8]) -> Result<i64, ErrorReport> {
    let chunk = Chunk::load(reconciliation_id, chunk_id)?;
    let records: Vec<_> = wire::records(records)
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| Error::invalid(format!("malformed records: {e}")))?;
    let _pace = pace::of_run(chunk.run)?;
    Ok(compare::compare(&chunk, records)?)
}

/// `dedup.reconcile_local_chunks`: reads and compares every chunk that is left of sources which this database sees, under one snapshot.
///
/// # Errors
/// As [`reconcile_chunk`]; whatever reading the source raises.
#[pg_extern(volatile, parallel_unsafe, strict)]
pub fn reconcile_local_chunks(reconciliation_id: i64) -> Result<i64, ErrorReport> {
    Ok(compare_here(reconciliation_id)?)
}

fn compare_here(reconciliation: i64) -> Result<i64> {
    let chunks: Vec<String> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT c.chunk_id FROM dedup.chunks_to_reconcile($1) AS c WHERE c.local",
                None,
                &[reconciliation.into()],
            )?
            .map(|row| required(row["chunk_id"].value()?))
            .collect()
    })?;
    if !chunks.is_empty() {
        // What is stored with the run is executed as whoever calls.
        Spi::run_with_args(
            "SELECT dedup.must_own(p.run_id) FROM dedup.reconciliations AS p WHERE p.reconciliation_id = $1",
            &[reconciliation.into()],
        )?;
    }
    for chunk_id in &chunks {
        let chunk = Chunk::load(reconciliation, chunk_id)?;
        let only = match &chunk.rows {
            Rows::Sampled(keys) if keys.is_empty() => {
                compare::compare(&chunk, Vec::new())?;
                continue;
            }
            Rows::Sampled(keys) if keys.len() <= sample::FETCHED => Some(chunk.key_types.texts(keys)?),
            _ => None,
        };
        let batch = local::read(
            chunk.run,
            chunk_id,
            &chunk.layout,
            chunk.keyless(),
            View::Statement,
            only.as_deref(),
        )?;
        let packed =
            batch.packed_records().map_err(|e| Error::corrupted(format!("a record of the source: {e}")))?;
        let records: Vec<_> = wire::records(&packed)
            .collect::<std::result::Result<_, _>>()
            .map_err(|e| Error::corrupted(e.to_string()))?;
        compare::compare(&chunk, records)?;
    }
    Ok(chunks.len() as i64)
}

/// `dedup.recheck_chunks`: forgets the chunks of a pass, which was cut off and is taken up, that the target's rows are not the same of any more, or
/// of which that can't be told; returns how many. Those are compared anew, so that the pass holds for the snapshot it is ended under.
///
/// # Errors
/// As [`reconcile_chunk`].
#[pg_extern(volatile, parallel_unsafe, strict)]
pub fn recheck_chunks(reconciliation_id: i64) -> Result<i64, ErrorReport> {
    Ok(compare::recheck(reconciliation_id)?)
}

/// `dedup.settle_reconcile`: compares the hash index with the target's rows when every chunk is compared, and enters what that shows.
///
/// # Errors
/// As [`reconcile_chunk`].
#[pg_extern(volatile, parallel_unsafe, strict)]
pub fn settle_reconcile(reconciliation_id: i64) -> Result<(), ErrorReport> {
    Ok(settle::settle(reconciliation_id)?)
}

/// Hashes as `dedup.reconciled_chunks` keeps them.
fn pack_hashes(hashes: &[u64]) -> Vec<u8> {
    hashes.iter().flat_map(|hash| hash.to_be_bytes()).collect()
}

/// The hashes of [`pack_hashes`].
fn unpack_hashes(packed: &[u8]) -> impl Iterator<Item = u64> {
    packed.as_chunks::<8>().0.iter().map(|hash| u64::from_be_bytes(*hash))
}
