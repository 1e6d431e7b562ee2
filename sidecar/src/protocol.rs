//! The worker protocol's calls (docs/protocol.md), typed. Every statement is prepared once a session.

use pg_dedup_record::fold::{Books, Lists, Refusal};
use serde_json::Value;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::conn::{Session, UNWAITED, protocol_error};
use crate::error::{At, Error, Kind, Policy, Result, Side};
use crate::source::{Range, RangeKind};
use crate::throttle::Throttle;

/// A worker's hold on a chunk.
#[derive(Debug, Clone)]
pub struct Lease {
    /// The chunk.
    pub chunk_id: String,
    /// The pair of the run that it belongs to.
    pub table_id: i32,
    /// Its records.
    pub range: Range,
    /// The token that `begin_chunk` and `fail_chunk` check.
    pub token: Uuid,
    /// Leases so far, this one included.
    pub attempt: i32,
    /// The source's snapshot that the range belongs to: whatever the worker knew of the table before.
    pub snapshot: Option<String>,
}

type Parameters<'a> = [&'a (dyn ToSql + Sync)];

/// Calls one function of the protocol that answers one value.
async fn call<T>(session: &Session, doing: &str, sql: &str, parameters: &Parameters<'_>) -> Result<T>
where
    T: for<'a> tokio_postgres::types::FromSql<'a>,
{
    let statement = session.prepared(sql).await?;
    let row = session.client.query_one(&statement, parameters).await.at(session.side, doing)?;
    row.try_get(0).at(session.side, doing)
}

/// A sign of life; answers the run's status.
pub async fn heartbeat(session: &Session, worker: Uuid, run: Uuid, info: &Value) -> Result<String> {
    let sql = format!("SELECT dedup.heartbeat($1::uuid, $2::uuid, $3::jsonb), {UNWAITED}");
    call(session, "heartbeat", &sql, &[&worker, &run, info]).await
}

/// The next chunk; `None`: nothing to take now.
pub async fn lease_chunk(session: &Session, run: Uuid, worker: Uuid) -> Result<Option<Lease>> {
    let doing = "lease_chunk";
    let statement = session
        .prepared(
            "SELECT chunk_id, table_id, range_kind, range_lower, range_upper, lease, attempt, snapshot \
             FROM dedup.lease_chunk($1::uuid, $2::uuid)",
        )
        .await?;
    let row = session.client.query_opt(&statement, &[&run, &worker]).await.at(session.side, doing)?;
    let Some(row) = row else { return Ok(None) };
    let kind: String = row.try_get(2).at(session.side, doing)?;
    let kind = RangeKind::named(&kind)
        .ok_or_else(|| protocol_error(session.side, format!("unknown kind of range \"{kind}\"")))?;
    Ok(Some(Lease {
        chunk_id: row.try_get(0).at(session.side, doing)?,
        table_id: row.try_get(1).at(session.side, doing)?,
        range: Range {
            kind,
            lower: row.try_get(3).at(session.side, doing)?,
            upper: row.try_get(4).at(session.side, doing)?,
        },
        token: row.try_get(5).at(session.side, doing)?,
        attempt: row.try_get(6).at(session.side, doing)?,
        snapshot: row.try_get(7).at(session.side, doing)?,
    }))
}

/// Gives a chunk back; answers its status, or `fenced` when it was no longer ours.
pub async fn fail_chunk(session: &Session, run: Uuid, lease: &Lease, error: &Error) -> Result<String> {
    let message = error.to_string();
    let policy = error.policy();
    let retry = policy != Policy::FailChunk;
    // Not the chunk's fault.
    let free =
        matches!(policy, Policy::PauseRun | Policy::RetryAfterOthers) || error.kind == Kind::Interrupted;
    call(
        session,
        "fail_chunk",
        "SELECT dedup.fail_chunk($1::uuid, $2::text, $3::uuid, $4::text, $5::text, $6::text, $7::text, $8::bool, $9::bool)",
        &[
            &run,
            &lease.chunk_id,
            &lease.token,
            &error.state(),
            &message,
            &error.detail,
            &error.hint,
            &retry,
            &free,
        ],
    )
    .await
}

/// Whose chunks are asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// Everybody's.
    All,
    /// Those of sources that workers read.
    Workers,
    /// Those of sources that the target database reads itself.
    Database,
}

/// Whether a chunk is left to do.
pub async fn is_open(session: &Session, run: Uuid, whose: Whose) -> Result<bool> {
    let local = match whose {
        Whose::All => None,
        Whose::Workers => Some(false),
        Whose::Database => Some(true),
    };
    let sql = "SELECT dedup.run_state($1::uuid, $2::bool) = 'open'";
    call(session, "run_state", sql, &[&run, &local]).await
}

/// Merges a full level of the table's hash index, if there is one: look-ups of later chunks then touch fewer segments.
pub async fn compact_step(session: &Session, run: Uuid, table_id: i32) -> Result<bool> {
    let sql = "SELECT coalesce(bool_or(dedup.compact_step(t.target_id)), false) FROM dedup.run_tables AS t \
               WHERE t.run_id = $1::uuid AND t.table_id = $2::int4";
    call(session, "compact_step", sql, &[&run, &table_id]).await
}

/// Warms the target's filter if it is cold and no other session is at it; answers the entries read.
pub async fn warm_filter(session: &Session) -> Result<i64> {
    call(session, "warming the filter", "SELECT dedup.warm_filter_once()", &[]).await
}

/// Leases of other workers that have gone silent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Silent {
    /// Chunks.
    pub chunks: i64,
    /// Seconds since the worker that is silent longest was heard.
    pub silent: f64,
    /// Seconds until its chunk is free.
    pub left: f64,
}

/// Whether chunks wait for the leases of silent workers to run out.
pub async fn silent_leases(session: &Session, run: Uuid) -> Result<Option<Silent>> {
    let doing = "looking at leases";
    let statement = session
        .prepared(
            "SELECT chunks, silent_seconds, seconds_left FROM dedup.silent_leases($1::uuid) WHERE chunks > 0",
        )
        .await?;
    let row = session.client.query_opt(&statement, &[&run]).await.at(session.side, doing)?;
    row.map(|row| {
        Ok(Silent {
            chunks: row.try_get(0).at(session.side, doing)?,
            silent: row.try_get(1).at(session.side, doing)?,
            left: row.try_get(2).at(session.side, doing)?,
        })
    })
    .transpose()
}

/// A run that is being rolled back from a target of this one: nothing is leased meanwhile.
pub async fn rollback_in_the_way(session: &Session, run: Uuid) -> Result<Option<String>> {
    let sql = "SELECT min(o::text) FROM dedup.rollbacks_in_the_way($1::uuid) AS o";
    call(session, "rollbacks_in_the_way", sql, &[&run]).await
}

/// Stops leasing for everybody.
pub async fn pause_run(session: &Session, run: Uuid) -> Result<String> {
    call(session, "pause_run", "SELECT dedup.pause_run($1::uuid)", &[&run]).await
}

/// How many chunks of the run nobody has taken.
pub async fn pending(session: &Session, run: Uuid) -> Result<i64> {
    let sql = "SELECT count(*) FROM dedup.checkpoints WHERE run_id = $1 AND status = 'pending'";
    call(session, "counting chunks", sql, &[&run]).await
}

/// How many chunks of the run are written, and how many others than this are still to be done.
pub async fn others(session: &Session, run: Uuid, chunk_id: &str) -> Result<(i64, i64)> {
    let doing = "counting chunks";
    let statement = session
        .prepared(
            "SELECT count(*) FILTER (WHERE status = 'verified' OR written_at IS NOT NULL), count(*) FILTER (WHERE chunk_id <> $2 \
             AND status IN ('pending', 'syncing') AND written_at IS NULL) FROM dedup.checkpoints WHERE run_id = $1",
        )
        .await?;
    let row = session.client.query_one(&statement, &[&run, &chunk_id]).await.at(session.side, doing)?;
    Ok((row.try_get(0).at(session.side, doing)?, row.try_get(1).at(session.side, doing)?))
}

/// For calls whose arguments are megabytes: planning for their very values copies them, several times, and gains nothing.
pub const GENERIC_PLANS: &str = "SET LOCAL plan_cache_mode = force_generic_plan";
/// For what triggers of the target do: plans as the session has them.
pub const USUAL_PLANS: &str = "SET LOCAL plan_cache_mode TO DEFAULT";

/// One chunk's transaction on the target.
#[derive(Clone, Copy)]
pub struct ChunkCalls<'a> {
    /// The connection that leased the chunk.
    pub session: &'a Session,
    /// The run.
    pub run: Uuid,
    /// The chunk.
    pub chunk_id: &'a str,
    /// What writing keeps to; none: nothing.
    pub throttle: Option<&'a Throttle>,
}

impl ChunkCalls<'_> {
    /// Opens the transaction and the chunk; answers whether keys of its range may stand in the target.
    pub async fn begin_chunk(&self, token: Uuid) -> Result<bool> {
        let sql = "SELECT dedup.begin_chunk($1::uuid, $2::text, $3::uuid)";
        let statement = self.session.prepared(sql).await?;
        let client = &self.session.client;
        let parameters: &Parameters<'_> = &[&self.run, &self.chunk_id, &token];
        // One round trip for both: the driver sends them in this order.
        let begin = format!("BEGIN; {GENERIC_PLANS}");
        let (begun, row) =
            tokio::join!(client.batch_execute(&begin), client.query_one(&statement, parameters));
        begun.at(Side::Target, "begin")?;
        row.and_then(|row| row.try_get(0)).at(Side::Target, "begin_chunk")
    }

    /// The empty table that takes changed rows; called before the savepoint that they are written under.
    pub async fn upsert_staging(&self) -> Result<String> {
        let sql = "SELECT dedup.upsert_staging($1::uuid, $2::text)";
        call(self.session, "upsert_staging", sql, &[&self.run, &self.chunk_id]).await
    }

    /// Rows to be replaced that stay as they are; answers their contents' digests.
    pub async fn keep_rows(&self, keys: &[u8]) -> Result<Vec<u8>> {
        let sql = "SELECT dedup.keep_rows($1::uuid, $2::text, $3::bytea)";
        call(self.session, "keep_rows", sql, &[&self.run, &self.chunk_id, &keys]).await
    }

    /// What stands under each key.
    pub async fn match_keys(&self, keys: &[u8], row_digests: &[u8]) -> Result<Vec<u8>> {
        let sql = "SELECT dedup.match_keys($1::uuid, $2::text, $3::bytea, $4::bytea)";
        call(self.session, "match_keys", sql, &[&self.run, &self.chunk_id, &keys, &row_digests]).await
    }

    /// Which digests are ours to write.
    pub async fn claim(&self, digests: &[u8]) -> Result<Vec<u8>> {
        let sql = "SELECT dedup.claim($1::uuid, $2::text, $3::bytea)";
        call(self.session, "claim", sql, &[&self.run, &self.chunk_id, &digests]).await
    }

    /// Waits for the owners of pending digests.
    pub async fn resolve(&self, digests: &[u8]) -> Result<Vec<u8>> {
        let sql = "SELECT dedup.resolve($1::uuid, $2::text, $3::bytea)";
        call(self.session, "resolve", sql, &[&self.run, &self.chunk_id, &digests]).await
    }

    /// Removes rows whose new content another row has.
    pub async fn delete_superseded(
        &self,
        keys: &[u8],
    ) -> Result<std::result::Result<(), tokio_postgres::Error>> {
        let sql = "SELECT dedup.delete_superseded($1::uuid, $2::text, $3::bytea)";
        let statement = self.session.prepared(sql).await?;
        let deleted = self.session.client.execute(&statement, &[&self.run, &self.chunk_id, &keys]).await;
        Ok(deleted.map(drop))
    }

    /// Removes rows that the chunk wrote in vain.
    pub async fn take_back(&self, keys: &[u8]) -> Result<()> {
        let sql = "SELECT dedup.take_back($1::uuid, $2::text, $3::bytea)";
        call::<i64>(self.session, "take_back", sql, &[&self.run, &self.chunk_id, &keys]).await.map(drop)
    }

    /// Sets one refused record aside.
    pub async fn quarantine_record(&self, key: &[u8], refusal: &Refusal, record: &[u8]) -> Result<()> {
        let sql = "SELECT dedup.quarantine_record($1::uuid, $2::text, $3::bytea, $4::text, $5::text, $6::text, $7::bytea)";
        let statement = self.session.prepared(sql).await?;
        let key = (!key.is_empty()).then_some(key);
        let parameters: &Parameters<'_> =
            &[&self.run, &self.chunk_id, &key, &refusal.sqlstate, &refusal.reason, &refusal.message, &record];
        self.session
            .client
            .execute(&statement, parameters)
            .await
            .with_records(Side::Target, "quarantine_record")?;
        Ok(())
    }

    /// A part of manifest and ledger, ahead of [`ChunkCalls::finish_chunk`].
    pub async fn add_lists(&self, part: &Lists) -> Result<()> {
        let sql = "SELECT dedup.add_lists($1::uuid, $2::text, $3::bytea, $4::bytea)";
        let statement = self.session.prepared(sql).await?;
        let parameters: &Parameters<'_> = &[&self.run, &self.chunk_id, &part.manifest, &part.ledger];
        self.session.client.execute(&statement, parameters).await.at(Side::Target, "add_lists")?;
        Ok(())
    }

    /// Closes the books; answers the ordinal.
    pub async fn finish_chunk(&self, books: &Books, info: &Value) -> Result<i64> {
        let sql = "SELECT dedup.finish_chunk($1::uuid, $2::text, $3::bigint[], $4::bytea, '', '', $5::jsonb)";
        let counts: Vec<i64> = books.counts.iter().map(|n| *n as i64).collect();
        let parameters: &Parameters<'_> = &[&self.run, &self.chunk_id, &counts, &books.checksums, info];
        call(self.session, "finish_chunk", sql, parameters).await
    }
}
