//! One chunk's transaction on the target, in the order of docs/protocol.md.

use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use pg_dedup_record::fold::{Books, Fold, Refusal, Refused, Way};
use serde_json::json;
use uuid::Uuid;

use crate::conn::Session;
use crate::error::{At, Error, Kind, Result, Side};
use crate::failpoint::{self, Failpoint};
use crate::observe::phases;
use crate::protocol::{self, ChunkCalls, Lease};
use crate::read::ReadChunk;
use crate::tables::TableWork;
use crate::throttle::Throttle;
use crate::write::{Judge, RefusedRow, remove_rows, write_rows};

/// Quarantine calls in flight at once.
const QUARANTINE_PIPELINE: usize = 32;

/// Bytes of manifest and ledger sent at once.
const LIST_PART_BYTES: usize = 512 << 10;

/// What a chunk's transaction is done with.
pub struct ChunkContext<'a> {
    /// The connection that leased the chunk.
    pub target: &'a Session,
    /// The run.
    pub run: Uuid,
    /// The chunk's table.
    pub table: &'a TableWork,
    /// The chunk.
    pub lease: &'a Lease,
    /// Records that may be refused.
    pub error_budget: u64,
    /// Verified chunks at the time this chunk was last given back for a foreign key.
    pub deferred_at: Option<i64>,
    /// How long the chunk waited between being read and being written.
    pub waited: Duration,
    /// Whether a further attempt is left.
    pub may_retry: bool,
    /// How fast rows are sent.
    pub throttle: &'a Throttle,
}

/// Writes a chunk and commits it. On an error the transaction is still open, or the connection is gone.
pub async fn write_chunk(context: &ChunkContext<'_>, read: &ReadChunk) -> Result<Books> {
    let started = Instant::now();
    let calls = ChunkCalls {
        session: context.target,
        run: context.run,
        chunk_id: &context.lease.chunk_id,
        throttle: Some(context.throttle),
    };
    let mut fold = Fold::new(&read.batch, context.table.keyless)?;
    let folded = started.elapsed();

    let occupied = calls.begin_chunk(context.lease.token).await?;
    failpoint::reach(Failpoint::Begun).await;
    if occupied && !context.table.keyless {
        let ask = fold.keys_to_match()?;
        let verdicts = calls.match_keys(&ask.keys, &ask.row_digests).await?;
        fold.matched(&ask, &verdicts)?;
    }
    let digests = fold.digests_to_claim();
    let verdicts = calls.claim(&digests).await?;
    drop(digests);
    fold.claimed(&verdicts)?;
    let claimed = started.elapsed();
    failpoint::reach(Failpoint::Claimed).await;

    let mut writer = Writer { context, calls, fold, read, parked: Vec::new() };
    writer.check_budget()?;
    if writer.fold.replaces() {
        // What becomes of the rows to be replaced decides whether their old contents may be written elsewhere.
        writer.resolve().await?;
        writer.write(Way::Upsert).await?;
        let superseded = writer.fold.superseded();
        writer.remove(&superseded).await?;
        let kept = writer.fold.refused_replacements()?;
        if !kept.is_empty() {
            let contents = calls.keep_rows(&kept).await?;
            writer.fold.stay(&contents);
        }
    }
    writer.write(Way::Insert).await?;
    failpoint::reach(Failpoint::Copied).await;
    writer.resolve().await?;
    failpoint::reach(Failpoint::Resolved).await;
    writer.write_the_rest().await?;
    let superseded = writer.fold.settle()?;
    writer.remove(&superseded).await?;
    let fold = writer.fold;
    over_budget(fold.refused().len(), context.error_budget)?;
    quarantine(calls, &fold, read).await?;
    failpoint::reach(Failpoint::BeforeFinish).await;
    let written = started.elapsed();

    for part in fold.lists(LIST_PART_BYTES) {
        calls.add_lists(&part?).await?;
    }
    let books = fold.books()?;
    let phases = [
        ("read", read.took),
        ("wait", context.waited),
        ("fold", folded),
        ("claim", claimed - folded),
        ("write", written - claimed),
    ];
    let mut info = json!({"source_bytes": read.bytes, "source_lsn": read.lsn});
    for (phase, took) in phases {
        info[format!("{phase}_seconds")] = took.as_secs_f64().into();
    }
    calls.finish_chunk(&books, &info).await?;
    failpoint::reach(Failpoint::BeforeCommit).await;
    context.target.client.batch_execute("COMMIT").await.at(Side::Target, "commit")?;
    failpoint::reach(Failpoint::AfterCommit).await;
    for (phase, took) in phases.into_iter().chain([("finish", started.elapsed() - written)]) {
        phases::took(phase, took.as_secs_f64());
    }
    Ok(books)
}

/// Writes what the fold wants written, and hears what the target refuses.
struct Writer<'a> {
    context: &'a ChunkContext<'a>,
    calls: ChunkCalls<'a>,
    fold: Fold<'a>,
    read: &'a ReadChunk,
    /// Refused for a foreign key; tried again when everything else of the chunk is written.
    parked: Vec<Refused>,
}

impl Writer<'_> {
    /// Waits for those who may be writing contents of this chunk.
    async fn resolve(&mut self) -> Result<()> {
        let pending = self.fold.digests_to_resolve();
        if pending.is_empty() {
            return Ok(());
        }
        let verdicts = self.calls.resolve(&pending).await?;
        Ok(self.fold.resolved(&verdicts)?)
    }

    /// Removes the rows of superseded records. Where one cannot go (a foreign key points at it), the record is set aside.
    async fn remove(&mut self, superseded: &[u32]) -> Result<()> {
        let kept = remove_rows(self.calls, superseded, |rows| Ok(self.fold.packed_keys(rows)?)).await?;
        for (row, refusal) in kept {
            self.fold.keep(row, refusal);
        }
        Ok(())
    }

    /// Writes in both ways until nobody is left who can be written.
    async fn write_the_rest(&mut self) -> Result<()> {
        loop {
            let mut wrote = self.write(Way::Insert).await?;
            wrote |= self.write(Way::Upsert).await?;
            if wrote {
                continue;
            }
            if self.parked.is_empty() {
                return Ok(());
            }
            self.try_parked_again().await?;
        }
    }

    /// Writes in one way until every group has a row, or none that can be written in this way. Answers whether anything
    /// was tried.
    async fn write(&mut self, way: Way) -> Result<bool> {
        let mut tried = false;
        loop {
            let rows = self.fold.next_to_write(way);
            if rows.is_empty() {
                return Ok(tried);
            }
            tried = true;
            self.attempt(&rows, way).await?;
        }
    }

    /// One pass over rows; answers how many were written.
    async fn attempt(&mut self, rows: &[u32], way: Way) -> Result<usize> {
        let mut judge = ChunkJudge {
            context: self.context,
            fold: &self.fold,
            refused: self.fold.refused().len() + self.parked.len(),
        };
        let refused =
            write_rows(self.calls, self.context.table, &self.read.batch, rows, way, &mut judge).await?;
        let mut bad = refused.iter().map(|refused| refused.row).peekable();
        for &row in rows {
            if bad.next_if_eq(&row).is_none() {
                self.fold.written(row, way);
            }
        }
        let written = rows.len() - refused.len();
        for RefusedRow { row, refusal, .. } in refused {
            match refusal.sqlstate.as_str() {
                "23503" => {
                    self.fold.park(row);
                    self.parked.push(Refused { row, refusal });
                }
                "23505" if self.fold.key_is_repeated(row) => {
                    self.fold.refuse(row, Refusal::key_collision());
                }
                _ => self.fold.refuse(row, refusal),
            }
        }
        self.check_budget()?;
        Ok(written)
    }

    /// Rows that point at rows of their own chunk may go in now. Once none does, the foreign key is violated.
    async fn try_parked_again(&mut self) -> Result<()> {
        let parked = std::mem::take(&mut self.parked);
        for way in [Way::Insert, Way::Upsert] {
            let mut rows: Vec<u32> =
                parked.iter().map(|parked| parked.row).filter(|row| self.fold.way(*row) == way).collect();
            if rows.is_empty() {
                continue;
            }
            rows.sort_unstable();
            for &row in &rows {
                self.fold.unpark(row);
            }
            if self.attempt(&rows, way).await? == 0 {
                // Those of them that were parked again are refused for good; the others were refused for another reason.
                let given_up: Vec<Refused> =
                    self.parked.extract_if(.., |parked| rows.binary_search(&parked.row).is_ok()).collect();
                for Refused { row, refusal } in given_up {
                    self.fold.refuse(row, refusal);
                }
            }
        }
        Ok(())
    }

    fn check_budget(&self) -> Result<()> {
        over_budget(self.fold.refused().len() + self.parked.len(), self.context.error_budget)
    }
}

fn over_budget(refused: usize, budget: u64) -> Result<()> {
    if refused as u64 <= budget {
        return Ok(());
    }
    Err(Error::new(
        Side::Target,
        Kind::OverBudget,
        format!("more than {budget} records of the chunk were refused, which is over the error budget"),
    )
    .hint("mend the cause and resume the run, or allow more with --error-budget"))
}

/// Decides about refusals while rows are being written.
struct ChunkJudge<'a, 'b> {
    context: &'a ChunkContext<'a>,
    fold: &'a Fold<'b>,
    refused: usize,
}

impl Judge for ChunkJudge<'_, '_> {
    /// A foreign key may be satisfied by a chunk that is still to come: then this one waits for it, as long as others
    /// get done meanwhile.
    async fn attempt_refused(&mut self, sqlstate: &str) -> Result<()> {
        if sqlstate != "23503" || !self.context.may_retry {
            return Ok(());
        }
        let (verified, open) =
            protocol::others(self.context.target, self.context.run, &self.context.lease.chunk_id).await?;
        if open > 0 && self.context.deferred_at.is_none_or(|before| verified > before) {
            return Err(Error::new(
                Side::Target,
                Kind::ForeignKeyLater,
                "a foreign key is not satisfied yet: the chunk is done again after others",
            ));
        }
        Ok(())
    }

    async fn row_refused(&mut self, row: &RefusedRow) -> Result<()> {
        self.refused += 1;
        over_budget(self.refused, self.context.error_budget)?;
        if row.refusal.sqlstate != "23505" || self.context.table.keyless {
            return Ok(());
        }
        let Some((schema, constraint)) = &row.constraint else { return Ok(()) };
        if !is_key(self.context, schema, constraint).await? || self.fold.key_is_repeated(row.row) {
            return Ok(());
        }
        // Done again, the chunk asks for its keys first and would have found a row that came from outside: two of its records spell
        // one key in two ways ('a' and 'A' under a collation that ignores case).
        if self.context.lease.attempt > 1 {
            return Ok(());
        }
        Err(Error::new(
            Side::Target,
            Kind::KeyAppeared,
            "a key of the chunk appeared in the target meanwhile",
        ))
    }
}

/// Whether a unique constraint or index, of the target or one of its partitions, is on exactly the key's columns.
async fn is_key(context: &ChunkContext<'_>, schema: &str, constraint: &str) -> Result<bool> {
    let doing = "looking at a unique index";
    let statement = context
        .target
        .prepared(
            "SELECT a.attname::text FROM pg_catalog.pg_class AS c \
             JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace \
             JOIN pg_catalog.pg_index AS i ON i.indexrelid = c.oid \
             JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid \
                 AND a.attnum = ANY ((i.indkey::pg_catalog.int2[])[0:i.indnkeyatts - 1]) \
             WHERE n.nspname = $1 AND c.relname = $2 AND i.indisunique",
        )
        .await?;
    let rows =
        context.target.client.query(&statement, &[&schema, &constraint]).await.at(Side::Target, doing)?;
    let mut columns: Vec<String> = rows
        .iter()
        .map(|row| row.try_get(0))
        .collect::<std::result::Result<_, _>>()
        .at(Side::Target, doing)?;
    let layout = &context.table.layout;
    let mut key: Vec<String> = layout.key.iter().map(|&i| layout.columns[i].name.clone()).collect();
    columns.sort_unstable();
    key.sort_unstable();
    Ok(columns == key)
}

/// Sets the refused records aside, several calls in flight at once.
async fn quarantine(calls: ChunkCalls<'_>, fold: &Fold<'_>, read: &ReadChunk) -> Result<()> {
    for some in fold.refused().chunks(QUARANTINE_PIPELINE) {
        let mut in_flight = Vec::with_capacity(some.len());
        for refused in some {
            in_flight.push(quarantine_one(calls, fold, read, refused));
        }
        try_join_all(in_flight).await?;
    }
    Ok(())
}

async fn quarantine_one(
    calls: ChunkCalls<'_>,
    fold: &Fold<'_>,
    read: &ReadChunk,
    refused: &Refused,
) -> Result<()> {
    let key = fold.key(refused.row);
    calls.quarantine_record(key, &refused.refusal, read.batch.row_bytes(refused.row as usize)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_a_limit_not_a_target() {
        assert!(over_budget(0, 0).is_ok());
        assert!(over_budget(10, 10).is_ok());
        let error = over_budget(11, 10).unwrap_err();
        assert_eq!(error.kind, Kind::OverBudget);
        assert!(error.hint.is_some());
    }
}
