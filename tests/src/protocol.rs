//! A worker that speaks the protocol of `docs/protocol.md` over plain SQL.
//!
//! Its digests and packed values are made here from the document alone, so that they check the
//! implementation instead of repeating it. It migrates tables of the shape of [`TABLE`]: a bigint key and one
//! text, which is the content.

use sha2::{Digest as _, Sha256};
use tokio_postgres::Error;
use uuid::Uuid;

use crate::db::Db;

/// Definition of the target.
pub const TABLE: &str = "CREATE TABLE dst (id bigint PRIMARY KEY, body text NOT NULL)";

/// Verdict of `claim` and `resolve`: the digest is ours to write.
pub const NEW: u8 = 0;
/// Verdict of `claim` and `resolve`: its content is in the target.
pub const DUPLICATE: u8 = 1;
/// Verdict of `claim`: another transaction in flight has claimed it.
pub const PENDING: u8 = 2;

/// A SHA-256 digest.
pub type Digest = [u8; 32];

fn content_state(body: &str) -> Sha256 {
    let mut state = Sha256::new();
    feed(&mut state, body.as_bytes());
    state
}

fn feed(state: &mut Sha256, field: &[u8]) {
    let length = i32::try_from(field.len()).unwrap_or_else(|_| panic!("field of {} bytes", field.len()));
    state.update(length.to_be_bytes());
    state.update(field);
}

/// Content digest of a record.
pub fn content_digest(body: &str) -> Digest {
    content_state(body).finalize().into()
}

/// Row digest of a record: the content digest's state continued over the key.
pub fn row_digest(id: i64, body: &str) -> Digest {
    let mut state = content_state(body);
    feed(&mut state, &id.to_be_bytes());
    state.finalize().into()
}

/// Adds a digest to a sum of digests, mod 2^256.
fn add(sum: &mut Digest, digest: &Digest) {
    let mut carry = 0u16;
    for (into, from) in sum.iter_mut().zip(digest).rev() {
        carry += u16::from(*into) + u16::from(*from);
        *into = carry.to_be_bytes()[1];
        carry >>= 8;
    }
}

fn checksum<'a>(records: impl IntoIterator<Item = &'a Record>) -> Digest {
    let mut sum = [0; 32];
    for record in records {
        add(&mut sum, &row_digest(record.id, &record.body));
    }
    sum
}

/// One source record.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its key.
    pub id: i64,
    /// Its content.
    pub body: String,
}

impl Record {
    /// A record.
    pub fn new(id: i64, body: impl Into<String>) -> Self {
        Record { id, body: body.into() }
    }

    /// Its content digest.
    pub fn digest(&self) -> Digest {
        content_digest(&self.body)
    }
}

/// Creates a run into `dst` with as many chunks as asked for, as a worker with a remote source does.
pub async fn create_run(db: &Db, chunks: usize) -> Uuid {
    let run: Uuid = db.one("SELECT dedup.create_run('protocol')").await;
    let source = r#"{"source": {"relation": "\"public\".\"src\"", "select": ["\"id\"", "\"body\""],
                     "key": ["\"id\""], "key_types": ["bigint"], "where": null}}"#;
    let table: i32 = db
        .value(
            "SELECT dedup.add_table($1, 'public.src', 'dst', ARRAY['id'], ARRAY['body'], $2::text::jsonb)",
            &[&run, &source],
        )
        .await;
    let ranges: Vec<String> = (0..chunks)
        .map(|chunk| {
            let bound = |open: bool, at: usize| {
                if open { "null".to_string() } else { format!("[\"{}\"]", at * 1_000_000) }
            };
            format!(
                r#"{{"kind": "key", "lower": {}, "upper": {}, "records": 100, "bytes": 10000}}"#,
                bound(chunk == 0, chunk),
                bound(chunk + 1 == chunks, chunk + 1)
            )
        })
        .collect();
    let ranges = format!("[{}]", ranges.join(", "));
    let planned: i32 =
        db.value("SELECT dedup.add_chunks($1, $2, $3::text::jsonb)", &[&run, &table, &ranges]).await;
    assert_eq!(usize::try_from(planned), Ok(chunks), "chunks planned");
    run
}

/// One worker on one connection.
pub struct Worker {
    /// Its connection, for statements of the test's own.
    pub db: Db,
    run: Uuid,
    id: Uuid,
    chunk: String,
    lease: Uuid,
}

impl Worker {
    /// A worker of a run, with a heartbeat but without a chunk.
    pub async fn new(db: Db, run: Uuid) -> Self {
        let id: Uuid = db.one("SELECT gen_random_uuid()").await;
        let status: String = db.value("SELECT dedup.heartbeat($1, $2, '{}')", &[&id, &run]).await;
        assert!(["created", "running"].contains(&status.as_str()), "run is {status}");
        Worker { db, run, id, chunk: String::new(), lease: Uuid::nil() }
    }

    /// The chunk it holds.
    pub fn chunk(&self) -> &str {
        &self.chunk
    }

    /// First key of the range of its chunk.
    pub async fn first_key(&self) -> i64 {
        self.db
            .value(
                "SELECT coalesce(range_lower[1]::bigint, 0) FROM dedup.checkpoints WHERE run_id = $1 AND chunk_id = $2",
                &[&self.run, &self.chunk],
            )
            .await
    }

    /// Leases the next chunk; false when there is none.
    pub async fn lease(&mut self) -> bool {
        let row = self
            .db
            .client()
            .query_opt("SELECT chunk_id, lease FROM dedup.lease_chunk($1, $2)", &[&self.run, &self.id])
            .await
            .unwrap_or_else(|error| panic!("cannot lease: {}", crate::db::describe(&error)));
        let Some(row) = row else { return false };
        self.chunk = row.get(0);
        self.lease = row.get(1);
        true
    }

    /// Opens the chunk's transaction.
    pub async fn begin(&self) -> Result<bool, Error> {
        self.db.try_exec("BEGIN").await?;
        self.db
            .try_value("SELECT dedup.begin_chunk($1, $2, $3)", &[&self.run, &self.chunk, &self.lease])
            .await
    }

    /// `claim` of digests in any order; verdicts in the same order.
    pub async fn claim(&self, digests: &[Digest]) -> Result<Vec<u8>, Error> {
        self.ask("SELECT dedup.claim($1, $2, $3)", digests).await
    }

    /// `resolve` of digests in any order; verdicts in the same order.
    pub async fn resolve(&self, digests: &[Digest]) -> Result<Vec<u8>, Error> {
        self.ask("SELECT dedup.resolve($1, $2, $3)", digests).await
    }

    async fn ask(&self, sql: &str, digests: &[Digest]) -> Result<Vec<u8>, Error> {
        let mut sorted = digests.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let verdicts: Vec<u8> = self.db.try_value(sql, &[&self.run, &self.chunk, &sorted.concat()]).await?;
        assert_eq!(verdicts.len(), sorted.len(), "one verdict a digest");
        Ok(digests
            .iter()
            .map(|digest| {
                verdicts[sorted.binary_search(digest).unwrap_or_else(|_| panic!("a digest got lost"))]
            })
            .collect())
    }

    /// Writes records, as COPY would.
    pub async fn write(&self, records: &[Record]) -> Result<(), Error> {
        let ids: Vec<i64> = records.iter().map(|record| record.id).collect();
        let bodies: Vec<&str> = records.iter().map(|record| record.body.as_str()).collect();
        self.db
            .client()
            .execute("INSERT INTO dst SELECT * FROM unnest($1::bigint[], $2::text[])", &[&ids, &bodies])
            .await
            .map(drop)
    }

    /// `finish_chunk` over what was written and what was dropped; leaves COMMIT to the caller.
    pub async fn finish(&self, written: &[Record], dropped: &[Record]) -> Result<i64, Error> {
        let count = |records: &[Record]| i64::try_from(records.len()).unwrap_or(i64::MAX);
        let counts = vec![count(written) + count(dropped), count(written), 0, 0, count(dropped), 0];
        let nothing = [0; 32];
        let checksums = [
            checksum(written.iter().chain(dropped)),
            checksum(written),
            nothing,
            nothing,
            checksum(dropped),
            nothing,
        ]
        .concat();

        let mut entries: Vec<&Record> = written.iter().collect();
        entries.sort_by_key(|record| record.digest());
        let mut manifest = Vec::new();
        for record in entries {
            manifest.extend(record.digest());
            manifest.extend(&row_digest(record.id, &record.body)[..8]);
            manifest.extend(8u32.to_be_bytes());
            manifest.extend(record.id.to_be_bytes());
        }
        let mut lines: Vec<&Record> = dropped.iter().collect();
        lines.sort_by_key(|record| (record.digest(), record.id.to_be_bytes()));
        let mut ledger = Vec::new();
        for record in lines {
            ledger.extend(record.digest());
            ledger.extend(8u32.to_be_bytes());
            ledger.extend(record.id.to_be_bytes());
        }
        self.db
            .try_value(
                "SELECT dedup.finish_chunk($1, $2, $3, $4, $5, $6, '{\"source_bytes\": 0}')",
                &[&self.run, &self.chunk, &counts, &checksums, &manifest, &ledger],
            )
            .await
    }

    /// Ends the transaction with what was written.
    pub async fn commit(&self) -> Result<(), Error> {
        self.db.try_exec("COMMIT").await
    }

    /// Ends the transaction without it.
    pub async fn rollback(&self) {
        self.db.exec("ROLLBACK").await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_carry_and_wrap() {
        let mut sum = [0xff; 32];
        let mut one = [0; 32];
        one[31] = 1;
        add(&mut sum, &one);
        assert_eq!(sum, [0; 32]);
        add(&mut sum, &[0x80; 32]);
        add(&mut sum, &[0x80; 32]);
        assert_eq!(sum[31], 0);
        assert_eq!(sum[30], 1);
    }
}
