//! `migrate_chunk`: a chunk in one SQL call, for a source that the target database sees itself (a table, a partition, any foreign table).
//!
//! The same steps as a worker's, on the same code: the batch and the [`Fold`] decide what becomes of each record, `claim`, `upsert` and
//! `finish` are what the protocol's functions call. Only reading (a query) and writing (COPY inside the server) differ.
use std::collections::HashSet;

use pg_dedup_record::fold::{Fold, FoldError, Refusal, Way};
use pg_dedup_record::layout::Layout;
use pg_dedup_record::refusal::condition_name;
use pg_dedup_record::sql::{finds_keys, has_key_among, quote_literal};
use pg_dedup_record::{Batch, BatchBuilder, WritePlan, pgcopy, wire};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{JsonB, Uuid, pg_sys};

use crate::chunk::{self, OpenChunk};
use crate::claim;
use crate::copy;
use crate::error::{Error, Result};
use crate::finish::{self, Books};
use crate::hash::rows::{self, View};
use crate::matching;
use crate::pace;
use crate::sql::required;
use crate::upsert;

/// Records of one chunk that may be refused before it fails.
const ERROR_BUDGET: usize = 10_000;

/// How the source is read; the same description that workers keep of theirs.
#[derive(serde::Deserialize)]
struct SourceSpec {
    relation: String,
    select: Vec<String>,
    key: Vec<String>,
    key_types: Vec<String>,
    key_nullable: Vec<bool>,
    #[serde(rename = "where")]
    filter: Option<String>,
}

/// `dedup.run_chunk`: leases and migrates one chunk inside the caller's transaction. `dedup.migrate_chunk` wraps it and returns the books.
///
/// # Errors
/// 42704 for an unknown chunk, 55006 when a worker has it, 53400 over the error budget; whatever reading and writing raise.
#[pg_extern(volatile, parallel_unsafe)]
fn run_chunk(run: Uuid, chunk_id: &str) -> Result<(), ErrorReport> {
    let lease =
        Spi::get_one_with_args::<Uuid>("SELECT dedup.lease_here($1, $2)", &[run.into(), chunk_id.into()])
            .map_err(Error::from)?;
    // No lease: it is verified already, and there is nothing to do.
    if let Some(lease) = lease {
        let _pace = pace::of_run(run)?;
        migrate(run, chunk_id, lease)?;
    }
    Ok(())
}

fn migrate(run: Uuid, chunk_id: &str, lease: Uuid) -> Result<()> {
    let occupied = chunk::begin(run, chunk_id, lease)?;
    chunk::with_open(run, chunk_id, |chunk| {
        let batch = read(chunk.run, chunk_id, &chunk.layout, chunk.keyless(), View::Latest, None)?;
        let mut writer = Writer { fold: Fold::new(&batch, chunk.keyless())?, batch: &batch, chunk };
        writer.settle(occupied)?;
        let Writer { fold, chunk, .. } = writer;
        set_aside(chunk, &fold, &batch)?;
        let books = fold.books()?;
        let info = JsonB(serde_json::json!({ "source_bytes": batch.data().len() }));
        let counts: Vec<i64> = books.counts.iter().map(|&n| n as i64).collect();
        for part in fold.lists(usize::MAX) {
            let part = part?;
            chunk.add_lists(&part.manifest, &part.ledger);
        }
        finish::finish(chunk, &Books::parse(&counts, &books.checksums)?, &info)?;
        Ok(())
    })
}

/// Reads a chunk's records, each as the tuple that a binary COPY of the source would send. `only`: those under these keys, as
/// [`KeyTypes::texts`](crate::keyset::KeyTypes::texts) gives them, and perhaps others.
///
/// # Errors
/// Whatever the source's query raises; XX001 for what cannot be read of the run.
pub fn read(
    run: Uuid,
    chunk_id: &str,
    layout: &Layout,
    keyless: bool,
    view: View,
    only: Option<&[String]>,
) -> Result<Batch> {
    let (spec, kind, lower, upper) = Spi::connect(|client| -> Result<_> {
        let found = client.select(
            "SELECT t.source_spec, c.range_kind, c.range_lower, c.range_upper \
             FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id) WHERE c.run_id = $1 AND c.chunk_id = $2",
            Some(1),
            &[run.into(), chunk_id.into()],
        )?;
        let row = found.into_iter().next().ok_or_else(|| Error::corrupted("the checkpoint is gone"))?;
        let JsonB(spec) = required(row["source_spec"].value()?)?;
        Ok((
            spec,
            required(row["range_kind"].value::<String>()?)?,
            row["range_lower"].value::<Vec<String>>()?,
            row["range_upper"].value::<Vec<String>>()?,
        ))
    })?;
    let spec: SourceSpec =
        serde_json::from_value(spec).map_err(|e| Error::corrupted(format!("unreadable source_spec: {e}")))?;
    let mut query = spec.query(&kind, lower.as_deref(), upper.as_deref());
    if let Some(keys) = only.filter(|_| finds_keys(layout, &spec.key, &spec.key_types)) {
        query.push_str(" AND ");
        query.push_str(&has_key_among(layout, &spec.select, keys));
    }
    let unreadable =
        |e: pg_dedup_record::BatchError| Error::corrupted(format!("a record of the source: {e}"));
    let mut builder = BatchBuilder::new(layout, keyless);
    builder.push(pgcopy::header()).map_err(unreadable)?;
    let mut tuple = Vec::new();
    rows::scan_in(view, &query, &[], layout, 0, |row| {
        tuple.clear();
        row.write_tuple(&mut tuple)?;
        builder.push(&tuple).map_err(unreadable)
    })?;
    builder.push(pgcopy::trailer()).map_err(unreadable)?;
    builder.finish().map_err(unreadable)
}

impl SourceSpec {
    fn query(&self, kind: &str, lower: Option<&[String]>, upper: Option<&[String]>) -> String {
        // On a line of its own: the filter may end in a comment.
        let mut conditions: Vec<String> = self.filter.iter().map(|f| format!("({f}\n)")).collect();
        let nullable = self.key.iter().zip(&self.key_nullable).filter(|(_, nullable)| **nullable);
        if kind == "null_key" {
            let nulls: Vec<String> = nullable.map(|(key, _)| format!("{key} IS NULL")).collect();
            conditions.push(format!("({})", nulls.join(" OR ")));
        } else {
            // A row comparison is decided by its first differing column, nulls after it notwithstanding.
            conditions.extend(nullable.map(|(key, _)| format!("{key} IS NOT NULL")));
        }
        for (bound, operator) in [(lower, ">="), (upper, "<")] {
            let Some(bound) = bound else { continue };
            let values: Vec<String> = bound
                .iter()
                .zip(&self.key_types)
                .map(|(v, t)| format!("{}::{t}", quote_literal(v)))
                .collect();
            conditions.push(format!("ROW({}) {operator} ROW({})", self.key.join(", "), values.join(", ")));
        }
        let condition = if conditions.is_empty() { "true".to_owned() } else { conditions.join(" AND ") };
        format!("SELECT {} FROM {} WHERE {condition}", self.select.join(", "), self.relation)
    }
}

/// Claims and writes the records of one batch.
struct Writer<'a> {
    chunk: &'a mut OpenChunk,
    batch: &'a Batch,
    fold: Fold<'a>,
}

impl Writer<'_> {
    fn settle(&mut self, occupied: bool) -> Result<()> {
        if occupied && !self.chunk.keyless() {
            let ask = self.fold.keys_to_match()?;
            let keys: Vec<&[u8]> =
                wire::keys(&ask.keys).collect::<std::result::Result<_, _>>().map_err(FoldError::from)?;
            let (digests, _) = ask.row_digests.as_chunks::<32>();
            let matches = matching::match_rows(self.chunk, &keys, digests)?;
            self.fold.matched(&ask, &matches.into_iter().map(|m| m as u8).collect::<Vec<_>>())?;
        }
        let digests = self.fold.digests_to_claim();
        let verdicts = claim::claim(self.chunk, claim::digests_of(&digests)?)?;
        self.chunk.claimed = true;
        self.fold.claimed(&packed(&verdicts))?;
        if self.fold.replaces() {
            // What becomes of the rows to be replaced decides whether their old contents may be written elsewhere. Upserts draw the ordinal,
            // which comes after every claim.
            self.resolve()?;
            self.write(&[Way::Upsert])?;
            let superseded = self.fold.superseded();
            self.remove(&superseded)?;
            let kept = self.fold.refused_replacements()?;
            let keys: Vec<&[u8]> =
                wire::keys(&kept).collect::<std::result::Result<_, _>>().map_err(FoldError::from)?;
            self.fold.stay(self.chunk.keep_rows(&keys)?.as_flattened());
        }
        self.write(&[Way::Insert])?;
        self.resolve()?;
        self.write(&[Way::Insert, Way::Upsert])?;
        let superseded = self.fold.settle()?;
        self.remove(&superseded)
    }

    fn resolve(&mut self) -> Result<()> {
        let pending = self.fold.digests_to_resolve();
        if pending.is_empty() {
            return Ok(());
        }
        let verdicts = claim::resolve(self.chunk, claim::digests_of(&pending)?)?;
        Ok(self.fold.resolved(&packed(&verdicts))?)
    }

    /// Removes the rows of superseded records. Where one cannot go (a foreign key points at it), the record is set aside.
    fn remove(&mut self, superseded: &[u32]) -> Result<()> {
        if superseded.is_empty() {
            return Ok(());
        }
        finish::draw_ordinal(self.chunk)?;
        let mut plan = WritePlan::new(superseded.len());
        while let Some(positions) = plan.next() {
            let keys = self.fold.packed_keys(&superseded[positions.clone()])?;
            let chunk = std::panic::AssertUnwindSafe(&mut *self.chunk);
            let attempt = move || {
                let chunk = chunk;
                let keys: Vec<&[u8]> =
                    wire::keys(&keys).collect::<std::result::Result<_, _>>().map_err(FoldError::from)?;
                upsert::delete(chunk.0, &keys).map(drop)
            };
            match copy::attempt(attempt)? {
                Ok(()) => plan.accepted(),
                Err(reason) => {
                    let Some(position) = plan.refused(None) else { continue };
                    let refusal = Refusal {
                        reason: condition_name(&reason.sqlstate).to_owned(),
                        sqlstate: reason.sqlstate,
                        message: reason.message,
                    };
                    self.fold.keep(superseded[position], refusal);
                }
            }
        }
        Ok(())
    }

    /// Writes in these ways until every content has a row, or no record that could be written. Rows that point at rows of the same chunk
    /// are tried again as long as that helps.
    fn write(&mut self, ways: &[Way]) -> Result<()> {
        let mut parked: Vec<(u32, Refusal)> = Vec::new();
        loop {
            let mut wrote = 0;
            for &way in ways {
                loop {
                    let rows = self.fold.next_to_write(way);
                    if rows.is_empty() {
                        break;
                    }
                    wrote += self.attempt(&rows, way, &mut parked)?;
                }
            }
            if parked.is_empty() {
                return Ok(());
            }
            let again = std::mem::take(&mut parked);
            for (row, refusal) in again {
                self.fold.unpark(row);
                if wrote == 0 {
                    self.fold.refuse(row, refusal);
                }
            }
        }
    }

    /// One pass over rows; returns how many were written.
    fn attempt(&mut self, rows: &[u32], way: Way, parked: &mut Vec<(u32, Refusal)>) -> Result<usize> {
        let mut plan = WritePlan::new(rows.len());
        let mut refused: HashSet<u32> = HashSet::new();
        while let Some(positions) = plan.next() {
            pgrx::check_for_interrupts!();
            let some = &rows[positions];
            let ordinal = self.chunk.ordinal;
            let staging = match way {
                Way::Insert => None,
                Way::Upsert => Some(upsert::staging_table(self.chunk.target, &self.chunk.layout)?),
            };
            let chunk = std::panic::AssertUnwindSafe(&mut *self.chunk);
            let batch = std::panic::AssertUnwindSafe(self.batch);
            match copy::attempt(move || write(chunk, &batch, some, staging))? {
                Ok(()) => plan.accepted(),
                Err(reason) => {
                    // What the attempt drew went with it.
                    self.chunk.ordinal = ordinal;
                    let Some(position) = plan.refused(None) else { continue };
                    let row = rows[position];
                    refused.insert(row);
                    self.refuse(row, reason, parked)?;
                }
            }
        }
        for &row in rows.iter().filter(|row| !refused.contains(row)) {
            self.fold.written(row, way);
        }
        Ok(rows.len() - refused.len())
    }

    fn refuse(&mut self, row: u32, reason: copy::Refused, parked: &mut Vec<(u32, Refusal)>) -> Result<()> {
        let refusal = if reason.sqlstate == "23505" && self.fold.key_is_repeated(row) {
            Refusal::key_collision()
        } else {
            Refusal {
                reason: condition_name(&reason.sqlstate).to_owned(),
                sqlstate: reason.sqlstate,
                message: reason.message,
            }
        };
        if refusal.sqlstate == "23503" {
            self.fold.park(row);
            parked.push((row, refusal));
        } else {
            self.fold.refuse(row, refusal);
        }
        if self.fold.refused().len() + parked.len() > ERROR_BUDGET {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                format!("more than {ERROR_BUDGET} records of the chunk were refused"),
            )
            .hint("mend the cause, then call dedup.migrate_chunk again"));
        }
        Ok(())
    }
}

fn write(
    chunk: std::panic::AssertUnwindSafe<&mut OpenChunk>,
    batch: &Batch,
    rows: &[u32],
    staging: Option<pg_sys::Oid>,
) -> Result<()> {
    let chunk = chunk.0;
    let layout: &Layout = &chunk.layout;
    match staging {
        None => copy::copy_in(chunk.target, layout, batch, rows).map(drop),
        Some(table) => {
            copy::copy_in(table, layout, batch, rows)?;
            upsert::apply(chunk).map(drop)
        }
    }
}

fn packed(verdicts: &[claim::Verdict]) -> Vec<u8> {
    verdicts.iter().map(|&v| v as u8).collect()
}

fn set_aside(chunk: &OpenChunk, fold: &Fold<'_>, batch: &Batch) -> Result<()> {
    for refused in fold.refused() {
        Spi::run_with_args(
            "SELECT dedup.quarantine_record($1, $2, $3, $4, $5, $6, $7)",
            &[
                chunk.run.into(),
                chunk.chunk_id.as_str().into(),
                fold.key(refused.row).to_vec().into(),
                refused.refusal.sqlstate.as_str().into(),
                refused.refusal.reason.as_str().into(),
                refused.refusal.message.as_str().into(),
                batch.row_bytes(refused.row as usize).to_vec().into(),
            ],
        )?;
    }
    Ok(())
}

impl From<FoldError> for Error {
    fn from(error: FoldError) -> Self {
        Error::corrupted(error.to_string())
    }
}
