//! `migrate_chunk`: a chunk in one SQL call, for a source that the target database sees itself (a table, a partition, any foreign table).
//!
//! The same steps as a worker's, on the same code: [`deliver`] drives, the batch and the [`Fold`] decide what becomes of each record, `claim`,
//! `upsert` and `finish` are what the protocol's functions call. Only reading (a query) and writing (COPY inside the server) differ.
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use pg_dedup_record::delivery::{Target, deliver};
use pg_dedup_record::fold::{Fold, FoldError, KeysToMatch, Way};
use pg_dedup_record::layout::Layout;
use pg_dedup_record::refusal::RefusedAttempt;
use pg_dedup_record::sql::{finds_keys, has_key_among, quote_literal};
use pg_dedup_record::{Batch, BatchBuilder, pgcopy};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{JsonB, Uuid, pg_sys};

use crate::chunk::{self, OpenChunk};
use crate::claim;
use crate::copy;
use crate::error::{Error, Result};
use crate::finish::{self, Books};
use crate::hash::rows::{self, View};
use crate::matching::{self, unpack_keys};
use crate::pace;
use crate::sql::required;
use crate::upsert;

/// Records of one chunk that may be refused before it fails.
const ERROR_BUDGET: u64 = 10_000;

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
        let mut fold = Fold::new(&batch, chunk.keyless())?;
        let occupied = occupied && !chunk.keyless();
        let mut here = Here { chunk, batch: &batch };
        at_once(deliver(&mut fold, &mut here, occupied, ERROR_BUDGET))?;
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

/// The target of a chunk, in its own server.
struct Here<'a> {
    chunk: &'a mut OpenChunk,
    batch: &'a Batch,
}

impl Target for Here<'_> {
    type Error = Error;

    async fn match_keys(&mut self, ask: &KeysToMatch) -> Result<Vec<u8>> {
        let (digests, _) = ask.row_digests.as_chunks::<32>();
        let matches = matching::match_rows(self.chunk, &unpack_keys(&ask.keys)?, digests)?;
        Ok(matches.into_iter().map(|m| m as u8).collect())
    }

    async fn claim(&mut self, digests: &[u8]) -> Result<Vec<u8>> {
        let verdicts = claim::claim(self.chunk, claim::digests_of(digests)?)?;
        self.chunk.claimed = true;
        Ok(packed(&verdicts))
    }

    async fn resolve(&mut self, digests: &[u8]) -> Result<Vec<u8>> {
        Ok(packed(&claim::resolve(self.chunk, claim::digests_of(digests)?)?))
    }

    async fn write(&mut self, rows: &[u32], way: Way) -> Result<Option<RefusedAttempt>> {
        pgrx::check_for_interrupts!();
        let staging = match way {
            Way::Insert => None,
            Way::Upsert => Some(upsert::staging_table(self.chunk.target, &self.chunk.layout)?),
        };
        let ordinal = self.chunk.ordinal;
        let chunk = std::panic::AssertUnwindSafe(&mut *self.chunk);
        let batch = std::panic::AssertUnwindSafe(self.batch);
        let refused = copy::attempt(move || write(chunk, &batch, rows, staging))?;
        if refused.is_some() {
            // What the attempt drew went with it.
            self.chunk.ordinal = ordinal;
        }
        Ok(refused)
    }

    async fn remove(&mut self, keys: &[u8]) -> Result<Option<RefusedAttempt>> {
        finish::draw_ordinal(self.chunk)?;
        let chunk = std::panic::AssertUnwindSafe(&mut *self.chunk);
        copy::attempt(move || {
            let chunk = chunk;
            upsert::delete(chunk.0, &unpack_keys(keys)?).map(drop)
        })
    }

    async fn keep(&mut self, keys: &[u8]) -> Result<Vec<u8>> {
        Ok(self.chunk.keep_rows(&unpack_keys(keys)?)?.into_flattened())
    }

    async fn take_back(&mut self, keys: &[u8]) -> Result<()> {
        upsert::take_back_rows(self.chunk, &unpack_keys(keys)?).map(drop)
    }

    async fn unique_violated(&mut self, _: &RefusedAttempt) -> Result<()> {
        Ok(())
    }

    fn over_budget(&self) -> Error {
        Error::new(
            PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            format!("more than {ERROR_BUDGET} records of the chunk were refused"),
        )
        .hint("mend the cause, then call dedup.migrate_chunk again")
    }
}

/// The result of a future that waits for nothing but this backend.
fn at_once<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(Error::corrupted("a step inside the server waited for another task")),
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
