//! A worker that is stopped, not dead, keeps its row lock and its claims. Another takes its chunk after the
//! lease and ends its backend; when the first wakes up it changes nothing.

use integration::check::{LAST_RUN, Table, assert_first_run};
use integration::data::{Content, NARROW_COLUMNS, NARROW_CONTENT, narrow_rows, narrow_table};
use integration::pair::Pair;
use integration::sidecar::exit;

#[tokio::test(flavor = "multi_thread")]
async fn stopped_in_the_middle_of_copy() {
    let pair = Pair::start().await;
    pair.both(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, 60_000, "n", &Content::RepeatsFar)).await;
    // One chunk of 8 MB: far more than the sockets between the two hold. The trigger holds COPY up at a row
    // in its middle, so that the worker is certainly inside it when it is stopped.
    pair.target
        .exec(
            "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN IF NEW.id = 30001 THEN PERFORM pg_advisory_xact_lock_shared(42); END IF; RETURN NEW; END $$; \
             CREATE TRIGGER hold BEFORE INSERT ON public.records FOR EACH ROW EXECUTE FUNCTION hold()",
        )
        .await;
    let holder = pair.target_again().await;
    holder.exec("SELECT pg_advisory_lock(42)").await;

    let first = pair.run(&["public.records"]).workers(1).spawn();
    pair.target
        .wait_until(
            "EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted)",
        )
        .await;
    pair.target.exec("UPDATE dedup.runs SET options = options || '{\"lease_seconds\": 2}'").await;
    first.stop();
    holder.exec("SELECT pg_advisory_unlock(42)").await;
    let backend: i32 = pair
        .target
        .one("SELECT backend_pid FROM dedup.checkpoints WHERE status = 'syncing' ORDER BY chunk_no LIMIT 1")
        .await;

    // The run is still open and its worker is not known to be dead: the second one joins.
    pair.sidecar("work").arg("last").workers(1).exits(exit::DONE).await;
    let alive: bool = pair
        .target
        .value(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND query LIKE 'COPY%')",
            &[&backend],
        )
        .await;
    assert!(!alive, "the stopped worker's backend is still there");
    let before = state(&pair).await;
    first.wake();
    first.finish().await;
    assert_eq!(state(&pair).await, before, "the worker changed something when it woke up");

    let table = Table {
        source: "public.records",
        target: "public.records",
        content: NARROW_CONTENT,
        columns: NARROW_COLUMNS,
    };
    assert_first_run(&pair.source, &pair.target, &table).await;
    let expired: i64 =
        pair.target.one("SELECT count(*) FROM dedup.events WHERE kind = 'lease_expired'").await;
    assert!(expired >= 1, "no event says that a lease expired");
}

/// Everything that a worker could change.
async fn state(pair: &Pair) -> Vec<Vec<Option<String>>> {
    let sql = format!(
        "SELECT chunk_id, status, ordinal::text, verified_at::text, attempts::text FROM dedup.checkpoints \
         WHERE run_id = {LAST_RUN} \
         UNION ALL SELECT 'rows', count(*)::text, sum(id)::text, NULL, NULL FROM public.records \
         UNION ALL SELECT 'segments', count(*)::text, sum(entries)::text, NULL, NULL FROM dedup.segment ORDER BY 1"
    );
    pair.target.texts(&sql).await
}
