//! Reading one chunk from the source into memory, hashed as it arrives.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use pg_dedup_record::sql::quote_literal;
use pg_dedup_record::{Batch, BatchBuilder, BatchError};

use crate::conn::Session;
use crate::error::{At, Error, Kind, Result, Side};
use crate::progress::Counters;
use crate::source::Range;
use crate::tables::TableWork;

/// A chunk's records.
pub struct ReadChunk {
    /// The records.
    pub batch: Batch,
    /// Bytes of the COPY stream.
    pub bytes: u64,
    /// Where the source's WAL was before.
    pub lsn: Option<String>,
    /// How long it took.
    pub took: Duration,
    /// Counts the bytes as on their way until the chunk is done with.
    pub in_flight: InFlight,
}

/// What is read of a chunk.
#[derive(Debug, Clone, Copy)]
pub enum Extent<'a> {
    /// Everything.
    All,
    /// Everything, under a snapshot that another session exported.
    AllUnder(&'a str),
    /// Records with one of these keys: of each key column an array of texts.
    Keys(&'a [String]),
}

/// Reads a chunk. `spent` is a batch that is done with; its memory is used again.
pub async fn read_chunk(
    source: &Session,
    table: &TableWork,
    range: &Range,
    extent: Extent<'_>,
    counters: &Arc<Counters>,
    spent: Option<Batch>,
) -> Result<ReadChunk> {
    let started = Instant::now();
    let lsn = position(source).await?;
    if let Extent::AllUnder(snapshot) = extent {
        enter_snapshot(source, snapshot).await?;
    }
    let sql = match extent {
        Extent::All | Extent::AllUnder(_) => table.spec.copy_out(range),
        Extent::Keys(keys) => table.spec.copy_out_keys(range, &table.layout, keys),
    };
    let builder = match spent {
        Some(batch) => BatchBuilder::reusing(batch, &table.layout, table.keyless),
        None => BatchBuilder::new(&table.layout, table.keyless),
    };
    let mut in_flight = InFlight::begin(counters);
    let batch = copy_out(source, &sql, builder, &mut in_flight).await;
    if let Extent::AllUnder(_) = extent {
        source.client.batch_execute("ROLLBACK").await.at(Side::Source, "leaving the snapshot")?;
    }
    let batch = batch?;
    Ok(ReadChunk { batch, bytes: in_flight.bytes, lsn, took: started.elapsed(), in_flight })
}

async fn copy_out(
    source: &Session,
    sql: &str,
    mut builder: BatchBuilder,
    in_flight: &mut InFlight,
) -> Result<Batch> {
    let doing = "reading the chunk";
    let stream = source.client.copy_out(sql).await.with_records(Side::Source, doing)?;
    let mut stream = std::pin::pin!(stream);
    while let Some(piece) = stream.try_next().await.with_records(Side::Source, doing)? {
        in_flight.add(piece.len() as u64);
        in_flight.counters.throttle.pace(piece.len()).await;
        builder.push(&piece).map_err(malformed)?;
    }
    builder.finish().map_err(malformed)
}

/// The source's WAL position; on a standby what it has replayed.
async fn position(source: &Session) -> Result<Option<String>> {
    let sql = "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() \
               ELSE pg_catalog.pg_current_wal_lsn() END::pg_catalog.text";
    let statement = source.prepared(sql).await?;
    let row =
        source.client.query_one(&statement, &[]).await.at(Side::Source, "asking for the WAL position")?;
    row.try_get(0).at(Side::Source, "asking for the WAL position")
}

async fn enter_snapshot(source: &Session, snapshot: &str) -> Result<()> {
    let sql = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
        quote_literal(snapshot)
    );
    let Err(error) = source.client.batch_execute(&sql).await else { return Ok(()) };
    // Best effort: the transaction is aborted, and a lost connection has none.
    let _ = source.client.batch_execute("ROLLBACK").await;
    Err(match error.code().map(|code| code.code()) {
        Some("22023" | "42704" | "55000") => Error::new(
            Side::Source,
            Kind::Refused,
            "the snapshot that the positions of this table without a key belong to is gone",
        )
        .sqlstate("55000")
        .hint("pg-dedup-migrate run --resume starts the table over under a new snapshot"),
        _ => Error::driver(Side::Source, "entering the snapshot", error),
    })
}

fn malformed(error: BatchError) -> Error {
    Error::new(Side::Source, Kind::Protocol, format!("the stream of the chunk: {error}")).because(error)
}

/// Bytes that count as progress while a chunk is on its way; taken back when this is dropped.
pub struct InFlight {
    counters: Arc<Counters>,
    bytes: u64,
}

impl InFlight {
    fn begin(counters: &Arc<Counters>) -> Self {
        counters.busy.fetch_add(1, Ordering::Relaxed);
        Self { counters: counters.clone(), bytes: 0 }
    }

    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.counters.reading.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.counters.busy.fetch_sub(1, Ordering::Relaxed);
        self.counters.reading.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
