//! Killed anywhere, resumed exactly: the sidecar at ten points inside a chunk and from outside, the
//! target server at three.

use std::collections::BTreeSet;
use std::time::Duration;

use integration::check::{LAST_RUN, Table, assert_first_run};
use integration::cluster::Stop;
use integration::data::{Content, NARROW_COLUMNS, NARROW_CONTENT, narrow_rows, narrow_table};
use integration::db::Db;
use integration::pair::Pair;
use integration::sidecar::{Invocation, exit, failpoint};
use tokio::time::sleep;

const RECORDS: Table<'_> = Table {
    source: "public.records",
    target: "public.records",
    content: NARROW_CONTENT,
    columns: NARROW_COLUMNS,
};
const SIGKILL: i32 = 9;

async fn narrow_pair(rows: i64) -> Pair {
    let pair = Pair::start().await;
    pair.both(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, rows, "n", &Content::RepeatsFar)).await;
    pair
}

fn run(pair: &Pair) -> Invocation {
    pair.run(&["public.records"]).workers(2).chunk_size("200kB")
}

/// The verified chunks with everything that another attempt would change.
async fn verified(target: &Db) -> BTreeSet<String> {
    let sql = format!(
        "SELECT concat_ws(' ', chunk_id, ordinal, attempts, verified_at) FROM dedup.checkpoints \
         WHERE run_id = {LAST_RUN} AND status = 'verified'"
    );
    target.column(&sql).await.into_iter().collect()
}

/// At least `count` chunks are verified.
fn verified_chunks(count: i64) -> String {
    format!("(SELECT count(*) >= {count} FROM dedup.checkpoints WHERE status = 'verified')")
}

/// A dead worker's lease need not be waited for as long as in production.
async fn shorten_leases(target: &Db) {
    target.exec("UPDATE dedup.runs SET options = options || '{\"lease_seconds\": 2}'").await;
}

/// Resumes, and checks that the result is exact and that `before` was not done again.
async fn resumes_exactly(pair: &Pair, before: &BTreeSet<String>) {
    shorten_leases(&pair.target).await;
    pair.resume().workers(2).exits(exit::DONE).await;
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
    let after = verified(&pair.target).await;
    let redone: Vec<_> = before.difference(&after).collect();
    assert!(redone.is_empty(), "verified chunks were done again: {redone:?}");
}

async fn killed_at(point: &str) {
    let pair = narrow_pair(12_000).await;
    // Two workers have four chunks in hand: whoever comes by for the fifth time has verified one, which must not be done again.
    let output = run(&pair).killed_at(&format!("{point}@5")).await;
    assert_eq!(output.signal, Some(SIGKILL), "failpoint {point}: {}", output.describe());
    let before = verified(&pair.target).await;
    assert!(!before.is_empty(), "no chunk was verified before");
    resumes_exactly(&pair, &before).await;
}

macro_rules! killed_at {
    ($($name:ident: $point:expr;)*) => {
        $(#[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            killed_at($point).await;
        })*
    };
}

killed_at! {
    killed_when_leased: failpoint::LEASED;
    killed_after_read: failpoint::READ;
    killed_after_begin: failpoint::BEGUN;
    killed_after_claim: failpoint::CLAIMED;
    killed_in_the_middle_of_copy: failpoint::MIDDLE_OF_COPY;
    killed_after_copy: failpoint::COPIED;
    killed_after_resolve: failpoint::RESOLVED;
    killed_before_finish: failpoint::BEFORE_FINISH;
    killed_before_commit: failpoint::BEFORE_COMMIT;
    killed_after_commit: failpoint::AFTER_COMMIT;
}

/// Killed again and again at whatever it was doing, it still comes to an end.
#[tokio::test(flavor = "multi_thread")]
async fn killed_from_outside_with_chunks_verified() {
    let pair = narrow_pair(40_000).await;
    let sidecar = run(&pair).spawn();
    pair.target.wait_until("EXISTS (SELECT FROM dedup.runs)").await;
    pair.target.wait_until(&verified_chunks(3)).await;
    sidecar.kill();
    sidecar.finish().await;
    shorten_leases(&pair.target).await;
    let sidecar = pair.resume().workers(2).spawn();
    pair.target.wait_until(&verified_chunks(8)).await;
    sidecar.kill();
    sidecar.finish().await;
    let before = verified(&pair.target).await;
    assert!(before.len() >= 8);
    resumes_exactly(&pair, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_by_ctrl_c() {
    let pair = narrow_pair(40_000).await;
    let sidecar = run(&pair).spawn();
    pair.target.wait_until(&verified_chunks(2)).await;
    sidecar.interrupt();
    let output = sidecar.finish().await;
    assert_eq!(output.code, Some(130), "{}", output.describe());
    output.says("--resume");
    let before = verified(&pair.target).await;
    // Nothing of an abandoned chunk is left to wait for: no lease has to expire.
    pair.resume().workers(2).exits(exit::DONE).await;
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
    assert!(before.is_subset(&verified(&pair.target).await), "verified chunks were done again");
}

/// Takes the target server down at once while the sidecar works, brings it up again, and expects the sidecar
/// to get over it by itself or else to say how it is resumed.
async fn survives_server_crash(mut pair: Pair, sidecar: integration::sidecar::Sidecar) {
    pair.target_cluster.stop(Stop::Immediate);
    sleep(Duration::from_millis(300)).await;
    pair.target_cluster.start_again();
    pair.reconnect_target().await;
    // Chunks commit with synchronous_commit = off: the last ones may be lost with the server. What it remembers is done.
    let remembered = verified(&pair.target).await;
    shorten_leases(&pair.target).await;
    let output = sidecar.finish().await;
    if output.code != Some(exit::DONE) {
        assert_eq!(output.code, Some(exit::ERROR), "{}", output.describe());
        output.says("--resume");
        pair.resume().workers(2).exits(exit::DONE).await;
    }
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
    let after = verified(&pair.target).await;
    assert!(remembered.is_subset(&after), "verified chunks were done again");
}

#[tokio::test(flavor = "multi_thread")]
async fn server_killed_between_chunks() {
    let pair = narrow_pair(40_000).await;
    let sidecar = run(&pair).spawn();
    pair.target.wait_until(&verified_chunks(3)).await;
    survives_server_crash(pair, sidecar).await;
}

/// A trigger holds COPY up at one row, the crash comes while it waits.
#[tokio::test(flavor = "multi_thread")]
async fn server_killed_in_the_middle_of_copy() {
    let pair = narrow_pair(12_000).await;
    pair.target
        .exec(
            "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN IF NEW.id = 7001 THEN PERFORM pg_advisory_xact_lock_shared(42); END IF; RETURN NEW; END $$; \
             CREATE TRIGGER hold BEFORE INSERT ON public.records FOR EACH ROW EXECUTE FUNCTION hold()",
        )
        .await;
    let holder = pair.target_again().await;
    holder.exec("SELECT pg_advisory_lock(42)").await;
    let sidecar = run(&pair).spawn();
    pair.target
        .wait_until(
            "EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted)",
        )
        .await;
    survives_server_crash(pair, sidecar).await;
}

/// `finish_chunk` cannot write its segment, the crash comes while it waits.
#[tokio::test(flavor = "multi_thread")]
async fn server_killed_in_finish() {
    let pair = narrow_pair(60_000).await;
    let holder = pair.target_again().await;
    let sidecar = run(&pair).spawn();
    pair.target.wait_until("EXISTS (SELECT FROM dedup.runs)").await;
    pair.target.wait_until(&verified_chunks(1)).await;
    holder.exec("BEGIN; LOCK TABLE dedup.segment IN SHARE MODE").await;
    pair.target
        .wait_until(
            "EXISTS (SELECT FROM pg_locks WHERE relation = 'dedup.segment'::regclass AND NOT granted)",
        )
        .await;
    survives_server_crash(pair, sidecar).await;
}

/// After a restart the filter knows nothing, says so, and no duplicate gets past it. `migrate_chunk` does not warm it.
#[tokio::test(flavor = "multi_thread")]
async fn a_cold_filter_lets_no_duplicate_pass() {
    let mut pair = narrow_pair(8_000).await;
    run(&pair).exits(exit::DONE).await;
    pair.target_cluster.restart(Stop::Fast);
    pair.reconnect_target().await;
    let target = &pair.target;
    target.exec(&narrow_table("public.raw")).await;
    target.exec(&narrow_rows("public.raw", 1, 4_000, "n + 200000", &Content::RepeatsFar)).await;
    let run_id: String = target.one("SELECT dedup.create_run('cold')::text").await;
    target
        .exec(&format!(
            "SELECT dedup.add_table('{run_id}', 'public.raw', 'public.records', content_columns => ARRAY['{}'])",
            NARROW_CONTENT.join("', '")
        ))
        .await;
    target.exec(&format!("SELECT dedup.plan_chunks('{run_id}')")).await;
    target.exec(&format!("SELECT dedup.migrate_chunk('{run_id}', '1:000001')")).await;
    assert!(!target.one::<bool>("SELECT warm FROM dedup.filter_stats()").await, "the filter was to be cold");
    let known: i64 =
        target.one(&format!("SELECT duplicate_count FROM dedup.checkpoints WHERE run_id = '{run_id}'")).await;
    assert!(known > 0, "nothing of it was known");
    let copies = format!(
        "SELECT count(*) FROM (SELECT FROM public.records GROUP BY {} HAVING count(*) > 1) AS twice",
        NARROW_CONTENT.join(", ")
    );
    assert_eq!(target.one::<i64>(&copies).await, 0, "contents written twice with a cold filter");
    target.exec(&format!("SELECT dedup.complete_run('{run_id}')")).await;
}

/// After a restart a worker reads the index into the filter before it begins.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_is_warmed() {
    let mut pair = narrow_pair(8_000).await;
    run(&pair).exits(exit::DONE).await;
    pair.target_cluster.restart(Stop::Fast);
    pair.reconnect_target().await;
    pair.source.exec(&narrow_rows("public.records", 1, 8_000, "n + 100000", &Content::RepeatsFar)).await;
    run(&pair).exits(exit::DONE).await;
    let rows: i64 = pair.target.one("SELECT count(*) FROM public.records WHERE id > 100000").await;
    assert_eq!(rows, 0, "duplicates written after a restart");
    let duplicates: i64 = pair
        .target
        .one(&format!("SELECT sum(duplicate_count)::bigint FROM dedup.checkpoints WHERE run_id = {LAST_RUN}"))
        .await;
    assert_eq!(duplicates, 2_000 + 8_000, "the losers of the first run and every new record");
    assert!(pair.target.one::<bool>("SELECT warm FROM dedup.filter_stats()").await);
}

/// Chunks that were committed, and that a crash of the server took back: the very process that was told so does them again.
#[tokio::test(flavor = "multi_thread")]
async fn commits_that_were_lost() {
    let mut pair = Pair::start_with(&["wal_writer_delay = 10s"]).await;
    pair.both(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, 20_000, "n", &Content::RepeatsFar)).await;
    let process = pair
        .run(&["public.records"])
        .workers(1)
        .chunk_size("50kB")
        .args(&["--lease-seconds", "10", "--max-rate", "200kB"])
        .spawn();
    let verified = "SELECT count(*) FROM dedup.checkpoints WHERE status = 'verified'";
    let mut lost = 0;
    for _ in 0..6 {
        let before: i64 = pair.target.one(verified).await;
        pair.target.wait_until(&format!("({verified}) > {before}")).await;
        // Nothing flushes the commit but what other sessions commit.
        let told: i64 = pair.target.one(verified).await;
        pair.target_cluster.stop(Stop::Immediate);
        pair.target_cluster.start_again();
        pair.reconnect_target().await;
        lost += told - pair.target.one::<i64>(verified).await;
        if lost > 0 {
            break;
        }
    }
    assert!(lost > 0, "no commit was lost");
    pair.target.exec("SELECT dedup.set_rate(run_id, 100000000) FROM dedup.runs").await;
    let output = process.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
}
