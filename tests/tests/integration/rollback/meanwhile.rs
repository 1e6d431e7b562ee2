//! Who else is at work while a run is taken back, and what becomes of it when it is cut off.

use integration::check::{Table, assert_exact};
use integration::cluster::Stop;
use integration::data::{Content, narrow_rows, narrow_table};
use integration::pair::Pair;
use integration::sidecar::{exit, failpoint};

use super::{RECORDS, assert_taken_back, migrated, refused, rows, runs, status};

/// A worker in the middle of a chunk is waited for; what it leases after that it cannot begin.
#[tokio::test(flavor = "multi_thread")]
async fn workers_are_fenced() {
    let pair = Pair::start().await;
    pair.both(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, 4_000, "n", &Content::RepeatsFar)).await;
    let run = pair.run(&["public.records"]).chunk_size("50kB").workers(1).arg("--lease-seconds").arg("10");
    let worker = run.stands_at(&format!("{}@3", failpoint::COPIED)).await;
    let db = &pair.target;
    let id = runs(db).await.remove(0);
    // Another process at the same run, between its lease and the chunk.
    let other = pair.sidecar("work").arg("last").workers(1).stands_at(failpoint::READ).await;
    let rolling = pair.target_again().await;
    let (by, sql) = (rolling.backend_pid().await, format!("SELECT dedup.rollback_run('{id}')"));
    let rollback = tokio::spawn(async move { rolling.exec(&sql).await });
    db.wait_until(&format!(
        "EXISTS (SELECT FROM pg_stat_activity WHERE pid = {by} AND wait_event_type = 'Lock')"
    ))
    .await;
    assert!(!rollback.is_finished());
    worker.kill();
    worker.finish().await;
    rollback.await.expect("the rollback");
    assert_eq!(rows(db, "public.records").await, Vec::<String>::new());
    assert_eq!(status(db, &id).await, "rolled_back");
    other.kill();
    other.finish().await;
    let output = pair.sidecar("work").arg("last").output().await;
    assert_eq!(output.code, Some(exit::ERROR), "{}", output.describe());
    assert_eq!(rows(db, "public.records").await, Vec::<String>::new());
}

/// Cut off after some steps, by a crash of the server too, it goes on; meanwhile nobody else writes to the table.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_is_cut_off_goes_on() {
    for (cut, server) in [(1, false), (3, false), (9, true), (20, false)] {
        let mut pair = migrated().await;
        let run = runs(&pair.target).await.remove(0);
        let written: i64 = pair.target.one("SELECT count(*) FROM public.records").await;
        pair.rollback("last").workers(2).killed_at(&format!("{}@{cut}", failpoint::AFTER_COMMIT)).await;
        if server {
            pair.target_cluster.restart(Stop::Immediate);
            pair.reconnect_target().await;
        }
        let db = &pair.target;
        let left: i64 = db.one("SELECT count(*) FROM public.records").await;
        assert!(left > 0 && left < written, "{left} of {written}");
        assert_eq!(status(db, &run).await, "rolling_back");
        let (state, message) = db.fails(&format!("SELECT dedup.resume_run('{run}')")).await;
        assert_eq!(state, "55000", "{message}");
        match cut {
            1 => db.exec(&format!("CALL dedup.rollback_run_in_chunks('{run}')")).await,
            3 => db.exec(&format!("SELECT dedup.rollback_run('{run}')")).await,
            _ => drop(pair.rollback("last").exits(exit::DONE).await),
        }
        assert_taken_back(&pair, &run).await;
    }
}

/// While rows are taken out of a table nobody writes to it: workers of other runs wait, and say for what.
#[tokio::test(flavor = "multi_thread")]
async fn other_runs_keep_out_meanwhile() {
    let pair = migrated().await;
    let db = &pair.target;
    let run = runs(db).await.remove(0);
    pair.source.exec(&narrow_table("public.later")).await;
    pair.source.exec(&narrow_rows("public.later", 100_000, 104_000, "n", &Content::Distinct)).await;
    let later = pair
        .run(&["public.later=public.records"])
        .chunk_size("15kB")
        .workers(2)
        .arg("--lease-seconds")
        .arg("10");
    later.killed_at(&format!("{}@3", failpoint::AFTER_COMMIT)).await;
    pair.rollback(&run).workers(1).killed_at(&format!("{}@5", failpoint::AFTER_COMMIT)).await;
    assert_eq!(status(db, &run).await, "rolling_back");
    let written =
        format!("SELECT count(*) FROM dedup.checkpoints WHERE run_id <> '{run}' AND written_at IS NOT NULL");
    let before: i64 = db.one(&written).await;
    let mut other = pair.resume().workers(2).spawn();
    other.wait_for(&format!("waiting for the rollback of run {run}")).await;
    assert_eq!(db.one::<i64>(&written).await, before);
    let third = pair.run(&["public.records"]).exits(exit::ERROR).await;
    assert!(third.stderr.contains("still open"), "{}", third.describe());
    pair.rollback(&run).exits(exit::DONE).await;
    let output = other.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    assert_exact(&pair.source, db, &Table { source: "public.later", ..RECORDS }).await;
}

/// What was in the way and is no longer does not stop a rollback for good; nor does a table that is written anew between its steps.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_was_stuck_goes_on() {
    let pair = migrated().await;
    let db = &pair.target;
    let run = runs(db).await.remove(0);
    pair.rollback("last").workers(1).killed_at(&format!("{}@5", failpoint::AFTER_COMMIT)).await;
    db.exec("CREATE TABLE public.uses (id bigint REFERENCES public.records (id)); INSERT INTO public.uses SELECT min(id) FROM public.records").await;
    refused(
        db,
        &format!("CALL dedup.rollback_run_in_chunks('{run}')"),
        "55006",
        &["cannot go on", "uses_id_fkey"],
    )
    .await;
    let output = pair.rollback(&run).workers(3).exits(exit::ERROR).await;
    assert!(output.stderr.contains("uses_id_fkey"), "{}", output.describe());
    // A session that has ended takes a moment to let go.
    db.wait_until("NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted)").await;
    db.exec("DROP TABLE public.uses").await;
    db.exec("VACUUM FULL public.records").await;
    db.exec(&format!("CALL dedup.rollback_run_in_chunks('{run}')")).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.records").await, 0);
    assert_eq!(status(db, &run).await, "rolled_back");
}

/// Runs in SQL keep out as well, and go on afterwards; two rollbacks don't meet.
#[tokio::test(flavor = "multi_thread")]
async fn other_runs_in_sql_keep_out() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE public.s1 (id int PRIMARY KEY, body text); CREATE TABLE public.s2 (LIKE public.s1 INCLUDING ALL); CREATE TABLE public.notes (LIKE public.s1 INCLUDING ALL); \
         INSERT INTO public.s1 SELECT n, 'a ' || n FROM generate_series(1, 500) AS n; INSERT INTO public.s2 SELECT 1000 + n, 'b ' || n FROM generate_series(1, 500) AS n",
    )
    .await;
    let mut ids = Vec::new();
    for source in ["s1", "s2"] {
        let run: String = db.one(&format!("SELECT dedup.create_run('{source}')::text")).await;
        db.exec(&format!("SELECT dedup.add_table('{run}', 'public.{source}', 'public.notes', content_columns => '{{body}}'); SELECT dedup.plan_chunks('{run}', 2000)")).await;
        if source == "s1" {
            db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
        }
        ids.push(run);
    }
    db.exec(&format!("SELECT dedup.migrate_chunk('{}', '1:000002')", ids[1])).await;
    db.exec(&format!("SELECT dedup.begin_rollback('{}')", ids[0])).await;
    db.exec(&format!("CALL dedup.migrate_run('{}')", ids[1])).await;
    assert_eq!(
        db.column(&format!(
            "SELECT chunk_id FROM dedup.checkpoints WHERE run_id = '{}' AND status <> 'pending'",
            ids[1]
        ))
        .await,
        ["1:000002"]
    );
    refused(
        db,
        &format!("SELECT dedup.migrate_chunk('{}', '1:000001')", ids[1]),
        "55P03",
        &["being rolled back"],
    )
    .await;
    refused(db, &format!("SELECT dedup.rollback_run('{}')", ids[1]), "55006", &[&ids[0]]).await;
    db.exec(&format!("CALL dedup.rollback_run_in_chunks('{}')", ids[0])).await;
    db.exec(&format!("CALL dedup.migrate_run('{}')", ids[1])).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.notes WHERE id > 1000").await, 500);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.notes").await, 500);
}
