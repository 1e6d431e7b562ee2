//! Claims between backends, through the worker protocol as `docs/protocol.md` has it: who writes a digest
//! when several want to.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use integration::cluster::{Cluster, PRELOAD};
use integration::data::Numbers;
use integration::db::{Db, describe, sqlstate};
use integration::protocol::{
    DUPLICATE, NEW, PENDING, Record, TABLE, Worker, content_digest, create_run, row_digest,
};
use tokio_postgres::Error;
use uuid::Uuid;

struct Bench {
    cluster: Cluster,
    db: Db,
    run: Uuid,
}

impl Bench {
    async fn new(chunks: usize) -> Self {
        let cluster = Cluster::start(&[PRELOAD, "deadlock_timeout = 200ms"]);
        let db = Db::connect(&cluster, "postgres").await;
        db.exec("CREATE EXTENSION pg_dedup_migrate").await;
        db.exec(TABLE).await;
        let run = create_run(&db, chunks).await;
        Bench { cluster, db, run }
    }

    /// A worker with a chunk of its own, in its transaction.
    async fn worker(&self) -> Worker {
        let mut worker = self.idle_worker().await;
        assert!(worker.lease().await, "a chunk is left");
        worker.begin().await.expect("the chunk begins");
        worker
    }

    async fn idle_worker(&self) -> Worker {
        Worker::new(Db::connect(&self.cluster, "postgres").await, self.run).await
    }

    /// Waits until a backend waits for another's transaction.
    async fn until_waiting(&self, pid: i32) {
        self.db.wait_until(&format!("EXISTS (SELECT FROM pg_locks WHERE pid = {pid} AND NOT granted)")).await;
    }

    async fn rows(&self) -> i64 {
        self.db.one("SELECT count(*) FROM dst").await
    }
}

/// The document's digests are the server's.
#[tokio::test(flavor = "multi_thread")]
async fn digests_are_those_of_the_document() {
    let bench = Bench::new(1).await;
    for body in ["", "a", "naïve 日本", "longer than one block of the hash ".repeat(9).as_str()] {
        let digest: Vec<u8> = bench.db.value("SELECT dedup.content_hash($1::text)", &[&body]).await;
        assert_eq!(digest, content_digest(body), "{body:?}");
    }
    let digest: Vec<u8> = bench.db.one("SELECT dedup.content_hash('a'::text, 7::bigint)").await;
    assert_eq!(digest, row_digest(7, "a"));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_writes_the_other_waits_and_finds_a_duplicate() {
    let bench = Bench::new(2).await;
    let (first, second) = (bench.worker().await, bench.worker().await);
    let (mine, theirs) = (Record::new(1, "the same"), Record::new(2_000_001, "the same"));
    let digest = [mine.digest()];
    assert_eq!(first.claim(&digest).await.expect("claim"), [NEW]);
    assert_eq!(second.claim(&digest).await.expect("claim"), [PENDING]);

    let pid = second.db.backend_pid().await;
    let waiting = tokio::spawn(async move {
        let verdict = second.resolve(&digest).await;
        (second, verdict)
    });
    bench.until_waiting(pid).await;
    first.write(std::slice::from_ref(&mine)).await.expect("write");
    first.finish(std::slice::from_ref(&mine), &[]).await.expect("finish");
    first.commit().await.expect("commit");

    let (second, verdict) = waiting.await.expect("the second worker's task");
    assert_eq!(verdict.expect("resolve"), [DUPLICATE]);
    second.finish(&[], std::slice::from_ref(&theirs)).await.expect("finish");
    second.commit().await.expect("commit");
    assert_eq!(bench.rows().await, 1);
    let ledger = bench.db.texts("SELECT source_key, survivor FROM dedup.duplicates").await;
    assert_eq!(ledger.len(), 1);
    assert!(ledger[0][1].as_deref().is_some_and(|survivor| survivor.ends_with("?id=1")), "{ledger:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_writes_when_the_first_aborts() {
    let bench = Bench::new(2).await;
    let (first, second) = (bench.worker().await, bench.worker().await);
    let record = Record::new(1_000_001, "the same");
    let digest = [record.digest()];
    assert_eq!(first.claim(&digest).await.expect("claim"), [NEW]);
    assert_eq!(second.claim(&digest).await.expect("claim"), [PENDING]);
    let pid = second.db.backend_pid().await;
    let waiting = tokio::spawn(async move {
        let verdict = second.resolve(&digest).await;
        (second, verdict)
    });
    bench.until_waiting(pid).await;
    first.write(&[Record::new(1, "the same")]).await.expect("write");
    first.rollback().await;

    let (second, verdict) = waiting.await.expect("the second worker's task");
    assert_eq!(verdict.expect("resolve"), [NEW]);
    second.write(std::slice::from_ref(&record)).await.expect("write");
    second.finish(std::slice::from_ref(&record), &[]).await.expect("finish");
    second.commit().await.expect("commit");
    assert_eq!(bench.rows().await, 1);
}

/// A backend that is terminated takes its claims with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_backend_holds_no_claim() {
    let bench = Bench::new(2).await;
    let (first, second) = (bench.worker().await, bench.worker().await);
    let digest = [content_digest("the same")];
    assert_eq!(first.claim(&digest).await.expect("claim"), [NEW]);
    let pid = first.db.backend_pid().await;
    let ended: bool = bench.db.value("SELECT pg_terminate_backend($1, 5000)", &[&pid]).await;
    assert!(ended);
    assert_eq!(second.claim(&digest).await.expect("claim"), [NEW]);
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_of_an_aborted_savepoint_are_dropped() {
    let bench = Bench::new(2).await;
    let (first, second) = (bench.worker().await, bench.worker().await);
    let (kept, dropped) = (content_digest("kept"), content_digest("dropped"));
    first.db.exec("SAVEPOINT s").await;
    assert_eq!(first.claim(&[dropped]).await.expect("claim"), [NEW]);
    first.db.exec("ROLLBACK TO s").await;
    assert_eq!(first.claim(&[kept]).await.expect("claim"), [NEW]);
    assert_eq!(second.claim(&[dropped, kept]).await.expect("claim"), [NEW, PENDING]);
}

/// A subtransaction that commits hands its claims to its parent.
#[tokio::test(flavor = "multi_thread")]
async fn claims_of_a_released_savepoint_are_kept() {
    let bench = Bench::new(2).await;
    let (first, second) = (bench.worker().await, bench.worker().await);
    let digest = content_digest("released");
    first.db.exec("SAVEPOINT s").await;
    assert_eq!(first.claim(&[digest]).await.expect("claim"), [NEW]);
    first.db.exec("RELEASE s").await;
    assert_eq!(second.claim(&[digest]).await.expect("claim"), [PENDING]);
    first.rollback().await;
    assert_eq!(second.resolve(&[digest]).await.expect("resolve"), [NEW]);
}

/// Claims keep 64 bits of a digest; no verdict rests on them alone.
#[tokio::test(flavor = "multi_thread")]
async fn digests_that_share_64_bits_are_told_apart() {
    let bench = Bench::new(2).await;
    let mut one = content_digest("one");
    let mut other = one;
    // A slot is found by the first eight bytes and compares the next eight.
    other[16..].fill(0xff);
    one[16..].fill(0x00);
    let (first, second) = (bench.worker().await, bench.worker().await);
    assert_eq!(first.claim(&[one, other]).await.expect("claim"), [NEW, NEW]);
    first.rollback().await;
    first.begin().await.expect("the chunk begins again");
    assert_eq!(first.claim(&[one]).await.expect("claim"), [NEW]);
    // What the other transaction has may be anything with these 64 bits: new, or worth waiting for.
    let verdict = second.claim(&[other]).await.expect("claim");
    assert_ne!(verdict, [DUPLICATE]);
    first.rollback().await;
    if verdict == [PENDING] {
        assert_eq!(second.resolve(&[other]).await.expect("resolve"), [NEW]);
    }
}

/// What is committed is a duplicate for everybody later, claims long gone.
#[tokio::test(flavor = "multi_thread")]
async fn committed_contents_are_duplicates() {
    let bench = Bench::new(2).await;
    let first = bench.worker().await;
    let records: Vec<Record> = (0..500).map(|n| Record::new(n, format!("body {n}"))).collect();
    let digests: Vec<_> = records.iter().map(Record::digest).collect();
    assert!(first.claim(&digests).await.expect("claim").iter().all(|verdict| *verdict == NEW));
    first.write(&records).await.expect("write");
    first.finish(&records, &[]).await.expect("finish");
    first.commit().await.expect("commit");
    let second = bench.worker().await;
    let mut asked = digests.clone();
    asked.push(content_digest("something else"));
    let verdicts = second.claim(&asked).await.expect("claim");
    assert!(verdicts[..500].iter().all(|verdict| *verdict == DUPLICATE));
    assert_eq!(verdicts[500], NEW);
}

/// What was not written, or was written otherwise, cannot be called verified.
#[tokio::test(flavor = "multi_thread")]
async fn finish_reads_back_what_was_written() {
    let bench = Bench::new(1).await;
    let worker = bench.worker().await;
    let record = Record::new(1, "as sent");
    for stored in [None, Some("as stored")] {
        worker.db.exec("SAVEPOINT attempt").await;
        assert_eq!(worker.claim(&[record.digest()]).await.expect("claim"), [NEW]);
        if let Some(body) = stored {
            worker.write(&[Record::new(1, body)]).await.expect("write");
        }
        let error = worker.finish(std::slice::from_ref(&record), &[]).await.expect_err("verified");
        assert!(!sqlstate(&error).is_empty(), "{}", describe(&error));
        worker.db.exec("ROLLBACK TO attempt").await;
    }
    worker.rollback().await;
    let verified: i64 =
        bench.db.one("SELECT count(*) FROM dedup.checkpoints WHERE status = 'verified'").await;
    assert_eq!(verified, 0);
}

/// Somebody else's lease opens nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_lease_is_fenced() {
    let bench = Bench::new(1).await;
    let mut worker = bench.idle_worker().await;
    assert!(worker.lease().await);
    let (state, message) = bench
        .db
        .fails(&format!("SELECT dedup.begin_chunk('{}', '{}', gen_random_uuid())", bench.run, worker.chunk()))
        .await;
    assert!(!state.is_empty(), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_phase_commit_is_refused_while_claims_are_held() {
    let cluster = Cluster::start(&[PRELOAD, "max_prepared_transactions = 5"]);
    let db = Db::connect(&cluster, "postgres").await;
    db.exec("CREATE EXTENSION pg_dedup_migrate").await;
    db.exec(TABLE).await;
    let run = create_run(&db, 1).await;
    let mut worker = Worker::new(Db::connect(&cluster, "postgres").await, run).await;
    assert!(worker.lease().await);
    worker.begin().await.expect("the chunk begins");
    worker.claim(&[content_digest("x")]).await.expect("claim");
    worker.db.fails("PREPARE TRANSACTION 'x'").await;
}

const CLAIMERS: u64 = 4;
const CHUNKS_EACH: u64 = 25;
const CONTENTS: u64 = 120;

/// Four claimers with overlapping sets and random aborts: never a deadlock that nobody detects, never a
/// content written twice, never one dropped that nobody wrote.
#[tokio::test(flavor = "multi_thread")]
async fn four_claimers_with_random_aborts() {
    claim_and_abort(false).await;
}

/// The same where the filter spares look-ups, and the recheck after the sweep is what counts.
#[tokio::test(flavor = "multi_thread")]
async fn four_claimers_with_random_aborts_and_a_warm_filter() {
    claim_and_abort(true).await;
}

async fn claim_and_abort(warm: bool) {
    let bench = Bench::new(usize::try_from(CLAIMERS * CHUNKS_EACH).expect("a small number")).await;
    if warm {
        bench.db.exec("SELECT dedup.warm_filter()").await;
    }
    assert_eq!(bench.db.one::<bool>("SELECT warm FROM dedup.filter_stats()").await, warm);
    let mut tasks = Vec::new();
    for seed in 0..CLAIMERS {
        let worker = bench.idle_worker().await;
        tasks.push(tokio::spawn(claim_at_random(worker, Numbers::new(seed))));
    }
    let mut committed = BTreeSet::new();
    let mut written = BTreeMap::new();
    for task in tasks {
        let outcome = tokio::time::timeout(Duration::from_secs(120), task).await;
        let (asked, wrote) = outcome.expect("a claimer hangs").expect("a claimer's task");
        committed.extend(asked);
        for body in wrote {
            *written.entry(body).or_insert(0) += 1;
        }
    }
    let twice: Vec<_> = written.iter().filter(|(_, times)| **times > 1).collect();
    assert!(twice.is_empty(), "written twice: {twice:?}");
    let stored: BTreeSet<String> = bench.db.column("SELECT body FROM dst").await.into_iter().collect();
    assert_eq!(stored.len() as i64, bench.rows().await, "contents that stand there twice");
    assert_eq!(stored, committed, "what was committed as written or dropped, and what is there");
    let verified: i64 =
        bench.db.one("SELECT count(*) FROM dedup.checkpoints WHERE status = 'verified'").await;
    assert_eq!(u64::try_from(verified), Ok(CLAIMERS * CHUNKS_EACH));
}

/// Takes chunks until none is left; returns the contents of its committed chunks, and those it wrote.
async fn claim_at_random(mut worker: Worker, mut numbers: Numbers) -> (BTreeSet<String>, Vec<String>) {
    let (mut asked, mut wrote) = (BTreeSet::new(), Vec::new());
    while worker.lease().await {
        let first_key = worker.first_key().await;
        loop {
            let bodies: BTreeSet<String> =
                (0..20).map(|_| format!("content {}", numbers.below(CONTENTS))).collect();
            let records: Vec<Record> =
                bodies.iter().zip(first_key..).map(|(body, id)| Record::new(id, body.as_str())).collect();
            match one_chunk(&worker, &records, numbers.below(10) < 3).await {
                Ok(Some(new)) => {
                    asked.extend(bodies);
                    wrote.extend(new);
                    break;
                }
                // The lease is still ours after an abort: the same chunk again.
                Ok(None) => {}
                Err(error) => {
                    assert_eq!(sqlstate(&error), "40P01", "{}", describe(&error));
                    worker.rollback().await;
                }
            }
        }
    }
    (asked, wrote)
}

/// One chunk as a worker does it; none when it was to be aborted, else the contents that it wrote.
async fn one_chunk(worker: &Worker, records: &[Record], abort: bool) -> Result<Option<Vec<String>>, Error> {
    worker.begin().await?;
    let digests: Vec<_> = records.iter().map(Record::digest).collect();
    let verdicts = worker.claim(&digests).await?;
    let with = |wanted: u8| -> Vec<Record> {
        records
            .iter()
            .zip(&verdicts)
            .filter(|(_, verdict)| **verdict == wanted)
            .map(|(record, _)| record.clone())
            .collect()
    };
    let (mut new, mut dropped, pending) = (with(NEW), with(DUPLICATE), with(PENDING));
    worker.write(&new).await?;
    if !pending.is_empty() {
        let digests: Vec<_> = pending.iter().map(Record::digest).collect();
        let verdicts = worker.resolve(&digests).await?;
        let mut ours = Vec::new();
        for (record, verdict) in pending.into_iter().zip(verdicts) {
            match verdict {
                NEW => ours.push(record),
                DUPLICATE => dropped.push(record),
                other => panic!("resolve answered {other}"),
            }
        }
        worker.write(&ours).await?;
        new.extend(ours);
    }
    if abort {
        worker.rollback().await;
        return Ok(None);
    }
    worker.finish(&new, &dropped).await?;
    worker.commit().await?;
    Ok(Some(new.into_iter().map(|record| record.body).collect()))
}
