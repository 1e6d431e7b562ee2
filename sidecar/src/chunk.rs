//! One chunk's transaction on the target, in the order of docs/protocol.md.

use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use pg_dedup_record::Batch;
use pg_dedup_record::delivery::{Target, deliver};
use pg_dedup_record::fold::{Books, Fold, KeysToMatch, Refused, Way};
use pg_dedup_record::refusal::RefusedAttempt;
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
use crate::write;

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
    let mut target = ChunkTarget { context, calls, batch: &read.batch, claimed: folded, started };
    deliver(&mut fold, &mut target, occupied && !context.table.keyless, context.error_budget).await?;
    let claimed = target.claimed;
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

/// The target of a chunk, as its worker reaches it.
struct ChunkTarget<'a> {
    context: &'a ChunkContext<'a>,
    calls: ChunkCalls<'a>,
    batch: &'a Batch,
    started: Instant,
    /// How long after the start the digests were claimed.
    claimed: Duration,
}

impl Target for ChunkTarget<'_> {
    type Error = Error;

    async fn match_keys(&mut self, ask: &KeysToMatch) -> Result<Vec<u8>> {
        self.calls.match_keys(&ask.keys, &ask.row_digests).await
    }

    async fn claim(&mut self, digests: &[u8]) -> Result<Vec<u8>> {
        let verdicts = self.calls.claim(digests).await?;
        self.claimed = self.started.elapsed();
        failpoint::reach(Failpoint::Claimed).await;
        Ok(verdicts)
    }

    async fn resolve(&mut self, digests: &[u8]) -> Result<Vec<u8>> {
        let verdicts = if digests.is_empty() { Vec::new() } else { self.calls.resolve(digests).await? };
        failpoint::reach(Failpoint::Resolved).await;
        Ok(verdicts)
    }

    async fn write(&mut self, rows: &[u32], way: Way) -> Result<Option<RefusedAttempt>> {
        let refused = write::write(self.calls, self.context.table, self.batch, rows, way).await?;
        match &refused {
            None => failpoint::reach(Failpoint::Copied).await,
            Some(refused) if refused.refusal.sqlstate == "23503" => self.may_wait_for_others().await?,
            Some(_) => {}
        }
        Ok(refused)
    }

    async fn remove(&mut self, keys: &[u8]) -> Result<Option<RefusedAttempt>> {
        write::remove(self.calls, keys).await
    }

    async fn keep(&mut self, keys: &[u8]) -> Result<Vec<u8>> {
        self.calls.keep_rows(keys).await
    }

    async fn take_back(&mut self, keys: &[u8]) -> Result<()> {
        self.calls.take_back(keys).await
    }

    async fn unique_violated(&mut self, refused: &RefusedAttempt) -> Result<()> {
        let Some((schema, constraint)) = &refused.constraint else { return Ok(()) };
        if self.context.table.keyless || !is_key(self.context, schema, constraint).await? {
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

    fn over_budget(&self) -> Error {
        let budget = self.context.error_budget;
        Error::new(
            Side::Target,
            Kind::OverBudget,
            format!("more than {budget} records of the chunk were refused, which is over the error budget"),
        )
        .hint("mend the cause and resume the run, or allow more with --error-budget")
    }
}

impl ChunkTarget<'_> {
    /// A foreign key may be satisfied by a chunk that is still to come: then this one waits for it, as long as others get done meanwhile.
    async fn may_wait_for_others(&self) -> Result<()> {
        let context = self.context;
        if !context.may_retry {
            return Ok(());
        }
        let (verified, open) = protocol::others(context.target, context.run, &context.lease.chunk_id).await?;
        if open > 0 && context.deferred_at.is_none_or(|before| verified > before) {
            return Err(Error::new(
                Side::Target,
                Kind::ForeignKeyLater,
                "a foreign key is not satisfied yet: the chunk is done again after others",
            ));
        }
        Ok(())
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
