//! Repair: what was tampered with is right again, nothing else is touched, and a second repair finds nothing.

use integration::data::{LOG_ROWS, LOG_TABLE};
use integration::db::Db;
use integration::pair::Pair;
use integration::sidecar::{exit, failpoint};

use crate::reconcile::{BY_NUMBER, BY_TEXT, BY_TWO, Items, TAMPERING, items, line, statuses};

/// Where each row lies and what it holds: a row that is written anew lies elsewhere.
const ROWS: &str = "SELECT ctid || ' ' || xmin || ' ' || t FROM public.items AS t ORDER BY 1";

/// The target holds each content of the source once, every row is one of the source's.
async fn assert_right(pair: &Pair) {
    let contents = "SELECT body FROM public.items ORDER BY 1";
    let found = pair.target.column(contents).await;
    let mut wanted = pair.source.column(contents).await;
    wanted.dedup();
    assert_eq!(found, wanted);
    let rows = pair.source.column("SELECT t::text FROM public.items AS t").await;
    for row in pair.target.column("SELECT t::text FROM public.items AS t").await {
        assert!(rows.contains(&row), "{row} is no row of the source");
    }
}

async fn tampered_rows_are_set_right(kind: &Items) {
    let pair = items(kind).await;
    let db = &pair.target;
    pair.reconcile().exits(exit::DONE).await;
    pair.repair().exits(exit::DONE).await;
    db.exec(TAMPERING).await;
    // A record that was dropped comes in after all; a row that nobody wrote stays.
    let dropped: i32 = db.one("SELECT min(n) FROM generate_series(1501, 2000) AS n WHERE n NOT IN (SELECT n FROM public.items) AND n % 1500 IN (SELECT n % 1500 FROM public.items)").await;
    db.exec(&format!(
        "INSERT INTO public.items SELECT {0}, n, 'body ' || n % 1500, 'note ' || n FROM generate_series({dropped}, {dropped}) AS n",
        kind.values
    ))
    .await;
    let right = "SELECT ctid || ' ' || xmin || ' ' || t FROM public.items AS t WHERE EXISTS (SELECT FROM saved AS s WHERE s = t) ORDER BY 1";
    let before = db.column(right).await;
    pair.reconcile().exits(exit::HALTED).await;
    let output = pair.repair().exits(exit::DONE).await;
    assert!(output.stdout.contains("clean, reconciled"), "{}", output.describe());
    assert_right(&pair).await;
    // Rows that were right are where they were.
    let after = db.column(ROWS).await;
    let moved: Vec<_> = before.iter().filter(|row| !after.contains(row)).collect();
    assert!(moved.is_empty(), "{moved:?}");
    assert_eq!(statuses(db).await, [line(&["reconciled", "clean, mismatch released, clean"])]);
    let reread: i64 = db.one("SELECT count(*) FROM dedup.reconciled_chunks WHERE reconciliation_id = (SELECT max(reconciliation_id) FROM dedup.reconciliations)").await;
    assert_eq!(
        reread,
        db.one::<i64>("SELECT count(*) FROM dedup.checkpoints").await,
        "the pass holds for every chunk"
    );
    // What was overwritten or removed is kept. A changed row is removed where a record that had been dropped for it took its content meanwhile.
    let changed: i64 = db.one("SELECT count(*) FROM changed").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.before_images").await, changed + 1);
    let output = pair.repair().exits(exit::DONE).await;
    assert!(output.stderr.contains("nothing to repair"), "{}", output.describe());
    assert_eq!(db.column(ROWS).await, after);
    pair.reconcile().exits(exit::DONE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_by_number() {
    tampered_rows_are_set_right(&BY_NUMBER).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_by_text() {
    tampered_rows_are_set_right(&BY_TEXT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_by_two_columns() {
    tampered_rows_are_set_right(&BY_TWO).await;
}

/// Everything at once: contents swapped, rows gone by the range, the whole table gone.
#[tokio::test(flavor = "multi_thread")]
async fn large_damage() {
    for damage in [
        "UPDATE public.items AS t SET body = s.body, note = s.note FROM saved AS s WHERE t.n <= 1000 AND s.n = CASE WHEN t.n % 2 = 0 THEN t.n - 1 ELSE t.n + 1 END",
        "DELETE FROM public.items WHERE n BETWEEN 300 AND 900",
        "DELETE FROM public.items",
        "UPDATE public.items SET body = 'all the same', note = NULL",
    ] {
        let pair = items(&BY_NUMBER).await;
        pair.target.exec(&format!("CREATE TABLE saved AS TABLE public.items; {damage}")).await;
        pair.reconcile().exits(exit::HALTED).await;
        pair.repair().exits(exit::DONE).await;
        assert_right(&pair).await;
    }
}

async fn kinds(db: &Db) -> Vec<String> {
    db.column("SELECT kind || ' ' || coalesce(key, '') FROM dedup.divergences WHERE reconciliation_id = (SELECT max(reconciliation_id) FROM dedup.reconciliations) ORDER BY 1").await
}

/// Rows that the source does not have are deleted if one asks for it; who was dropped in favour of one is written.
#[tokio::test(flavor = "multi_thread")]
async fn rows_too_many() {
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    // 100 holds what 1600 was dropped for, or the other way round.
    let survivor: i32 = db.one("SELECT n FROM public.items WHERE n IN (100, 1600)").await;
    let loser = 1700 - survivor;
    pair.source.exec(&format!("DELETE FROM public.items WHERE n IN ({survivor}, 700)")).await;
    pair.run(&["public.items"])
        .args(&["--content-columns", "public.items:body"])
        .chunk_size("3kB")
        .workers(1)
        .exits(exit::DONE)
        .await;
    pair.reconcile().exits(exit::HALTED).await;
    let mut extra = [format!("extra k={}", survivor * 10), "extra k=7000".to_owned()];
    extra.sort();
    assert_eq!(kinds(db).await, extra);
    let before = db.column(ROWS).await;
    pair.repair().exits(exit::HALTED).await;
    assert_eq!(db.column(ROWS).await, before);
    pair.repair().arg("--delete-extra").exits(exit::DONE).await;
    assert_right(&pair).await;
    assert_eq!(db.one::<i64>(&format!("SELECT count(*) FROM public.items WHERE n = {loser}")).await, 1);
    pair.repair().arg("--delete-extra").exits(exit::DONE).await;
}

/// A row that a trigger of another table points at cannot be deleted: nothing is half done, and it is said.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_cannot_go() {
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    pair.source.exec("DELETE FROM public.items WHERE n = 700").await;
    pair.run(&["public.items"])
        .args(&["--content-columns", "public.items:body"])
        .chunk_size("3kB")
        .exits(exit::DONE)
        .await;
    db.exec("CREATE TABLE public.uses (k bigint REFERENCES public.items (k)); INSERT INTO public.uses VALUES (7000)").await;
    pair.reconcile().exits(exit::HALTED).await;
    let output = pair.repair().arg("--delete-extra").exits(exit::ERROR).await;
    assert!(output.stderr.contains("uses_k_fkey"), "{}", output.describe());
    db.exec("DROP TABLE public.uses").await;
    pair.repair().arg("--delete-extra").exits(exit::DONE).await;
    assert_right(&pair).await;
}

/// Killed at whatever point, a repair goes on.
#[tokio::test(flavor = "multi_thread")]
async fn killed_and_taken_up() {
    for point in [failpoint::LEASED, failpoint::CLAIMED, failpoint::BEFORE_COMMIT, failpoint::AFTER_COMMIT] {
        let pair = items(&BY_NUMBER).await;
        pair.target.exec(TAMPERING).await;
        pair.reconcile().exits(exit::HALTED).await;
        pair.repair().workers(1).killed_at(&format!("{point}@2")).await;
        assert_eq!(pair.target.one::<String>("SELECT status FROM dedup.runs").await, "halted");
        // Not the worker's heartbeat, which nobody waits for here.
        pair.target.exec("UPDATE dedup.workers SET heartbeat_at = heartbeat_at - interval '1 h'; UPDATE dedup.checkpoints SET leased_at = leased_at - interval '1 h' WHERE status = 'syncing'").await;
        pair.repair().exits(exit::DONE).await;
        assert_right(&pair).await;
        assert_eq!(
            statuses(&pair.target).await,
            [line(&["reconciled", "mismatch released, clean"])],
            "{point}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_key() {
    let pair = Pair::start().await;
    pair.both(LOG_TABLE).await;
    pair.source.exec(LOG_ROWS).await;
    let db = &pair.target;
    pair.run(&["public.log"]).chunk_size("30kB").workers(2).exits(exit::DONE).await;
    let sorted = "SELECT t::text FROM public.log AS t ORDER BY 1";
    let before = db.column(sorted).await;
    db.exec(
        "DELETE FROM public.log WHERE line IN ('line 1', 'line 2000'); UPDATE public.log SET line = 'tampered' WHERE line = 'line 5'; \
         INSERT INTO public.log SELECT * FROM public.log WHERE line IN ('line 7', 'line 8')",
    )
    .await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::DONE).await;
    // Rows that no run wrote are nobody's to delete.
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM public.log WHERE line IN ('tampered', 'line 7', 'line 8')").await,
        5
    );
    db.exec("DELETE FROM public.log WHERE line = 'tampered'; DELETE FROM public.log AS t USING public.log AS u WHERE t.line = u.line AND t.ctid > u.ctid").await;
    let after = db.column(sorted).await;
    let differ: Vec<_> = after
        .iter()
        .filter(|row| !before.contains(row))
        .chain(before.iter().filter(|row| !after.contains(row)))
        .collect();
    assert!(differ.is_empty(), "{differ:?}");
    assert_eq!(after.len(), before.len());
    pair.repair().exits(exit::DONE).await;
    pair.reconcile().exits(exit::DONE).await;

    pair.source.exec("DELETE FROM public.log WHERE line IN ('line 10', 'line 11')").await;
    pair.run(&["public.log"]).chunk_size("30kB").exits(exit::DONE).await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().arg("--delete-extra").exits(exit::DONE).await;
    let wanted = pair.source.column("SELECT DISTINCT t::text FROM public.log AS t ORDER BY 1").await;
    assert_eq!(db.column(sorted).await, wanted);
}

/// In SQL, where the target database sees the source, all in one transaction.
#[tokio::test(flavor = "multi_thread")]
async fn in_sql() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE public.old (id int PRIMARY KEY, body text, note text); CREATE TABLE public.items (LIKE public.old INCLUDING ALL); \
         INSERT INTO public.old SELECT n, 'body ' || n % 300, 'note ' || n FROM generate_series(1, 400) AS n",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('local')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.old', 'public.items', content_columns => '{{body}}'); SELECT dedup.plan_chunks('{run}', 3000)"
    ))
    .await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let refused = db.fails(&format!("SELECT dedup.repair('{run}')")).await;
    assert!(refused.0 == "55000" && refused.1.contains("reconcile"), "{refused:?}");
    let before = db.column("SELECT t::text FROM public.items AS t ORDER BY 1").await;
    db.exec(&format!(
        "SELECT FROM dedup.reconcile('{run}'); DELETE FROM public.items WHERE id IN (1, 50, 300); UPDATE public.items SET note = 'tampered' WHERE id = 7; SELECT FROM dedup.reconcile('{run}')"
    ))
    .await;
    // Two of the rows that are gone are missed by those who were dropped for them, too.
    assert_eq!(db.one::<i32>(&format!("SELECT dedup.repair('{run}')")).await, 6);
    let contents = "SELECT DISTINCT body FROM public.items ORDER BY 1";
    assert_eq!(db.column(contents).await.len(), before.len());
    assert_eq!(statuses(db).await, [line(&["reconciled", "clean, mismatch released, clean"])]);
    assert_eq!(db.one::<i32>(&format!("SELECT dedup.repair('{run}')")).await, 0);
}

/// What was asked for strictly is repaired and answered strictly.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_went_on() {
    let pair = items(&BY_NUMBER).await;
    pair.source.exec("UPDATE public.items SET note = 'later' WHERE n = 7; UPDATE public.items SET body = 'later' WHERE n = 9; INSERT INTO public.items VALUES (15, 3001, 'new', 'new')").await;
    pair.reconcile().arg("--strict").exits(exit::HALTED).await;
    pair.repair().exits(exit::DONE).await;
    assert_right(&pair).await;
    assert_eq!(statuses(&pair.target).await, [line(&["reconciled", "mismatch released, clean"])]);
}

/// A run that was repaired is taken back like any other.
#[tokio::test(flavor = "multi_thread")]
async fn repaired_and_taken_back() {
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    db.exec(TAMPERING).await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::DONE).await;
    let output = pair.rollback("last").exits(exit::LEFT_ASIDE).await;
    // What somebody had deleted or changed before the repair is theirs.
    let told =
        db.column("SELECT reason || ' ' || count(*) FROM dedup.left_alone GROUP BY reason ORDER BY 1").await;
    assert_eq!(told, ["changed 4", "gone 5"], "{}", output.describe());
    let left = db.column("SELECT n FROM public.items ORDER BY 1").await;
    assert_eq!(left, db.column("SELECT n FROM changed ORDER BY 1").await);
}
