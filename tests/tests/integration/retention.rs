//! Purging: only what is old, archived and over goes, and dedup stays exact without it.

use integration::check::books;
use integration::pair::Pair;
use integration::sidecar::exit;

use crate::reports::{archive, finished};

const HISTORY: &[&str] = &[
    "checkpoints",
    "events",
    "ledger_block",
    "quarantine",
    "unchanged_rows",
    "throughput",
    "workers",
    "processes",
];

/// `purge`, for which everything is old.
async fn purge_all(pair: &Pair, more: &[&str]) -> String {
    let all = ["--reconciliations", "0s", "--history", "0s", "--archives", "0s"];
    pair.sidecar_on_target("purge").args(&all).args(more).exits(exit::DONE).await.stdout
}

/// How many rows of each table belong to a run.
async fn rows(pair: &Pair) -> Vec<i64> {
    let mut counts = Vec::new();
    for table in HISTORY {
        let of_run = if *table == "ledger_block" || *table == "unchanged_rows" {
            ""
        } else {
            "WHERE run_id IS NOT NULL"
        };
        counts.push(pair.target.one(&format!("SELECT count(*) FROM dedup.{table} {of_run}")).await);
    }
    counts
}

/// What is not archived stays, what a dry run names stays, and then it goes: but not what later runs need to be exact.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_over_and_archived() {
    let pair = finished().await;
    let db = &pair.target;
    // Which of two records survives is whose chunk came first.
    db.exec("DELETE FROM public.items WHERE id = (SELECT min(id) FROM public.items)").await;
    pair.reconcile().exits(exit::HALTED).await;
    let dir = tempfile::tempdir().expect("a folder");
    archive(&pair, dir.path()).await;
    let before = rows(&pair).await;
    let told = purge_all(&pair, &[]).await;
    assert!(told.contains("stays: the run is halted") && !told.contains("went"), "{told}");
    for what in ["reconciliations", "before_images", "history"] {
        let by_hand = format!("SELECT dedup.purge_batch(run_id, '{what}', '0 s') FROM dedup.runs");
        assert_eq!(db.fails(&by_hand).await.0, "55000", "{what}");
    }
    pair.repair().exits(exit::LEFT_ASIDE).await;
    // The archive does not have the repair.
    let told = purge_all(&pair, &[]).await;
    assert!(told.contains("stays: it is not archived") && !told.contains("went"), "{told}");
    archive(&pair, dir.path()).await;
    let told = purge_all(&pair, &["--dry-run"]).await;
    assert!(told.contains("reconciliations") && told.contains("would go"), "{told}");
    // It may still be rolled back.
    assert!(told.contains("history") && told.contains("stays: it can be rolled back until"), "{told}");
    assert!(rows(&pair).await >= before);
    let young = pair.sidecar_on_target("purge").exits(exit::DONE).await.stdout;
    assert_eq!(young, "", "nothing is old enough");

    db.exec("SELECT dedup.set_bake_in(run_id, now()) FROM dedup.runs").await;
    let told = purge_all(&pair, &[]).await;
    assert!(told.contains("history") && told.contains("went"), "{told}");
    for (table, count) in HISTORY.iter().zip(rows(&pair).await) {
        // The log says that it was purged.
        let left = if *table == "events" {
            db.one("SELECT count(*) FROM dedup.events WHERE kind = 'purged'").await
        } else {
            0
        };
        assert_eq!(count, left, "{table}");
    }
    // Archives stand for what is here: they are forgotten after it.
    let told = purge_all(&pair, &[]).await;
    assert!(told.contains("archives, 2 rows, went"), "{told}");
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM dedup.archives").await,
        0,
        "archives that are old and whose run is purged"
    );
    assert_eq!(purge_all(&pair, &[]).await, "", "a further purge finds nothing");
    for command in ["reconcile", "rollback"] {
        let output = match command {
            "reconcile" => pair.reconcile().exits(exit::ERROR).await,
            _ => pair.rollback("last").exits(exit::ERROR).await,
        };
        output.says("was purged");
    }
    for (call, state) in [
        ("SELECT dedup.requeue(run_id, 'failed') FROM dedup.runs", "55000"),
        ("SELECT dedup.set_bake_in(run_id, now() + interval '1 day') FROM dedup.runs", "55000"),
        ("SELECT * FROM dedup.rollback_run((SELECT run_id FROM dedup.runs))", "55000"),
    ] {
        assert_eq!(db.fails(call).await.0, state, "{call}");
    }

    // Every content that stands in the target is still known.
    pair.source.exec("INSERT INTO public.items SELECT n + 10000, body FROM public.items AS s(n, body)").await;
    pair.run(&["public.items"]).args(&["--exclude-columns", "public.items:id"]).exits(exit::LEFT_ASIDE).await;
    let second = books(db).await;
    assert_eq!(second.inserted, 0, "{second:?}");
    assert_eq!(db.one::<i64>("SELECT count(*) - count(DISTINCT body) FROM public.items").await, 0);
}

/// A run's ledger says whose rows a rollback has to keep: it stays as long as somebody may roll back what it rests on.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_that_others_are_held_to() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source
        .exec("INSERT INTO public.items SELECT n, 'item ' || n FROM generate_series(1, 500) AS n")
        .await;
    let content = ["--exclude-columns", "public.items:id"];
    pair.run(&["public.items"]).args(&content).args(&["--name", "a"]).exits(exit::DONE).await;
    pair.source.exec("UPDATE public.items SET id = id + 1000").await;
    pair.run(&["public.items"]).args(&content).args(&["--name", "b"]).exits(exit::DONE).await;
    let dir = tempfile::tempdir().expect("a folder");
    archive(&pair, dir.path()).await;
    db.exec("SELECT dedup.set_bake_in(run_id, now()) FROM dedup.runs WHERE name = 'b'").await;
    let told = purge_all(&pair, &[]).await;
    assert!(
        told.contains("(b): history") && told.contains("can still be rolled back") && !told.contains("went"),
        "{told}"
    );
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.duplicates").await, 500);
    // Rolled back by force, a hands its rows over to b: the ledger was needed.
    pair.rollback("a").exits(exit::ERROR).await;
    pair.rollback("a").arg("--force").exits(exit::DONE).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items").await, 500);
    archive(&pair, dir.path()).await;
    let told = purge_all(&pair, &[]).await;
    assert!(told.contains("(b): history") && told.contains("went"), "{told}");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items").await, 500);
}

/// The same by CALL, as cron would have it.
#[tokio::test(flavor = "multi_thread")]
async fn purged_in_sql() {
    let pair = finished().await;
    let dir = tempfile::tempdir().expect("a folder");
    archive(&pair, dir.path()).await;
    let db = &pair.target;
    let before = rows(&pair).await;
    db.exec("SELECT dedup.set_bake_in(run_id, now()) FROM dedup.runs").await;
    db.exec(
        "CALL dedup.purge(dry_run => true, reconciliations => '0 s', history => '0 s', archives => '0 s')",
    )
    .await;
    db.exec("CALL dedup.purge()").await;
    assert_eq!(rows(&pair).await[0], before[0]);
    db.exec("CALL dedup.purge(reconciliations => '0 s', history => '0 s')").await;
    assert_eq!(rows(&pair).await[0], 0);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.archives").await, 1);
}

/// An archive that was made while a run was being ended does not have its end.
#[tokio::test(flavor = "multi_thread")]
async fn an_archive_from_before_the_end() {
    let pair = finished().await;
    let db = &pair.target;
    let run: String = db.one("SELECT dedup.create_run('cancelled')::text").await;
    let why = format!("SELECT coalesce(dedup.why_kept('{run}'), 'nothing')");
    let other = pair.target_again().await;
    other.exec(&format!("BEGIN; SELECT dedup.cancel_run('{run}')")).await;
    let dir = tempfile::tempdir().expect("a folder");
    let report =
        || pair.sidecar_on_target("report").arg(&run).arg("--archive").arg(dir.path().display().to_string());
    let early = report().spawn();
    db.wait_until("EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'pg-dedup-migrate/%' AND query LIKE '%record_archive%')").await;
    other.exec("COMMIT").await;
    assert_eq!(early.finish().await.code, Some(exit::DONE));
    let told: String = db.one(&why).await;
    assert!(told.starts_with("it is not archived"), "{told}");
    report().exits(exit::DONE).await;
    assert_eq!(db.one::<String>(&why).await, "nothing");
}

/// A dry run says how many rows would go: those that then go.
#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_counts_what_goes() {
    let pair = finished().await;
    let db = &pair.target;
    let dir = tempfile::tempdir().expect("a folder");
    archive(&pair, dir.path()).await;
    db.exec("SELECT dedup.set_bake_in(run_id, now()) FROM dedup.runs").await;
    let history = |told: &str| -> String {
        let line = told.lines().find(|line| line.contains("history")).unwrap_or_else(|| panic!("{told}"));
        line.split(", ").nth(1).unwrap_or_default().to_owned()
    };
    let foreseen = history(&purge_all(&pair, &["--dry-run"]).await);
    assert_eq!(history(&purge_all(&pair, &[]).await), foreseen);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.checkpoints").await, 0);
}

/// A run that failed long ago and is done after all can be rolled back.
#[tokio::test(flavor = "multi_thread")]
async fn the_bake_in_begins_with_the_end() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.items VALUES (1, 'a'), (2, 'b'); ANALYZE public.items").await;
    db.exec("ALTER TABLE public.items ADD CONSTRAINT never CHECK (body IS NULL)").await;
    pair.run(&["public.items"]).args(&["--error-budget", "0"]).exits(exit::ERROR).await;
    assert_eq!(db.one::<String>("SELECT status FROM dedup.runs").await, "failed");
    db.exec("SELECT dedup.set_bake_in(run_id, now()) FROM dedup.runs; ALTER TABLE public.items DROP CONSTRAINT never").await;
    pair.resume().exits(exit::DONE).await;
    pair.rollback("last").exits(exit::DONE).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items").await, 0);
    let (state, message) = db.fails("SELECT dedup.set_bake_in(run_id, NULL) FROM dedup.runs").await;
    assert_eq!(state, "22004", "{message}");
}

/// A name as long as one likes.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_name() {
    let pair = Pair::start().await;
    pair.target.exec(&format!("SELECT dedup.create_run('{}')", "long ".repeat(60))).await;
    let dir = tempfile::tempdir().expect("a folder");
    assert!(archive(&pair, dir.path()).await.join("manifest.json").exists());
}
