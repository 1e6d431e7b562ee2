//! Repair: what was tampered with is right again, nothing else is touched, and a second repair finds nothing.

use integration::data::{LOG_ROWS, LOG_TABLE};
use integration::db::Db;
use integration::pair::Pair;
use integration::sidecar::{exit, failpoint};

use crate::reconcile::{BY_NUMBER, BY_TEXT, BY_TWO, Items, TAMPERING, items, line, statuses, tamper};

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
    tamper(db, kind).await;
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

/// A run in SQL: `src` of items `(id, body, note)` into `items`.
async fn local(pair: &Pair, name: &str, source: &str) -> String {
    let db = &pair.target;
    let run: String = db.one(&format!("SELECT dedup.create_run('{name}')::text")).await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.{source}', 'public.items', content_columns => '{{body}}'); SELECT dedup.plan_chunks('{run}', 2000)"
    ))
    .await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    run
}

/// `src` with that many items, and a target of the same columns.
async fn local_items(key: &str, rows: i32) -> Pair {
    let pair = Pair::start().await;
    pair.target
        .exec(&format!(
            "CREATE TABLE public.src (id {key} PRIMARY KEY, body text, note text); CREATE TABLE public.items (LIKE public.src INCLUDING ALL); \
             CREATE TABLE public.other (LIKE public.src INCLUDING ALL); INSERT INTO public.src SELECT n, 'b' || n, 'note' FROM generate_series(1, {rows}) AS n"
        ))
        .await;
    pair
}

async fn run_status(db: &Db, run: &str) -> String {
    db.one(&format!("SELECT status FROM dedup.runs WHERE run_id = '{run}'")).await
}

/// Every entry of the index has its row, every row its entry.
async fn assert_index(db: &Db) {
    let differ = db
        .column(
            "(SELECT target_location_uri || ' ' || encode(content_hash, 'hex') FROM dedup.hash_index('public.items')) EXCEPT \
             SELECT 'postgres:///it/public.items?id=' || id || ' ' || encode(dedup.content_hash(body), 'hex') FROM public.items",
        )
        .await;
    assert!(differ.is_empty(), "entries without a row: {differ:?}");
    let rows: i64 = db.one("SELECT count(*) FROM public.items").await;
    assert_eq!(
        db.one::<i64>("SELECT count(*) FROM dedup.hash_index('public.items')").await,
        rows,
        "rows without an entry"
    );
}

/// An entry whose row is gone and whose record changed does not swallow a later record.
#[tokio::test(flavor = "multi_thread")]
async fn entries_without_a_row_are_taken_out() {
    let pair = local_items("int", 50).await;
    let db = &pair.target;
    let run = local(&pair, "one", "src").await;
    db.exec(&format!("UPDATE public.items SET body = 'tampered' WHERE id = 3; UPDATE public.src SET body = 'new' WHERE id = 3; SELECT FROM dedup.reconcile('{run}', strict => true); SELECT dedup.repair('{run}')")).await;
    assert_eq!(run_status(db, &run).await, "reconciled");
    assert_index(db).await;
    db.exec("INSERT INTO public.src VALUES (150, 'b3', 'late')").await;
    local(&pair, "two", "src").await;
    assert_eq!(db.column("SELECT id::text FROM public.items WHERE body = 'b3'").await, ["150"]);
}

/// Rows that were put in by hand have no entry: they get one, or are folded; whatever is there twice is there once in the end.
#[tokio::test(flavor = "multi_thread")]
async fn rows_put_in_by_hand() {
    let pair = local_items("int", 200).await;
    let db = &pair.target;
    db.exec("UPDATE public.src SET body = 'X' WHERE id IN (5, 60, 130)").await;
    let run = local(&pair, "one", "src").await;
    db.exec(&format!(
        "DELETE FROM public.items WHERE body = 'X'; UPDATE public.src SET body = 'Y' WHERE id = 5; \
         INSERT INTO public.items VALUES (60, 'X', 'note'), (130, 'X', 'note'); UPDATE public.items SET note = 'tampered' WHERE id IN (61, 131); \
         SELECT FROM dedup.reconcile('{run}'); SELECT dedup.repair('{run}')"
    ))
    .await;
    assert_eq!(run_status(db, &run).await, "reconciled");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items WHERE body = 'X'").await, 1);
    assert_index(db).await;
}

/// What the target refuses of a repair is not set aside: the chunk fails with the reason, and the run stays halted until it is mended.
#[tokio::test(flavor = "multi_thread")]
async fn refused_records_fail_the_repair() {
    let pair = local_items("int", 50).await;
    let db = &pair.target;
    let run = local(&pair, "one", "src").await;
    db.exec(&format!(
        "UPDATE public.items SET note = NULL WHERE id = 7; DELETE FROM public.items WHERE id = 9; ALTER TABLE public.items ADD CHECK (id <> 9); SELECT FROM dedup.reconcile('{run}')"
    ))
    .await;
    let (state, message) = db.fails(&format!("SELECT dedup.repair('{run}')")).await;
    assert!(state == "55000" && message.contains("check_violation"), "{message}");
    pair.repair().exits(exit::ERROR).await.says("check_violation").says("chunk 1:");
    assert_eq!(run_status(db, &run).await, "halted");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.quarantine").await, 0);
    db.exec(&format!(
        "ALTER TABLE public.items DROP CONSTRAINT items_id_check; SELECT dedup.repair('{run}')"
    ))
    .await;
    assert_eq!(run_status(db, &run).await, "reconciled");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items WHERE note = 'note'").await, 50);
}

/// Rows that point at rows of later chunks, which are many: a chunk is tried again and again before the last of them is there.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_keys_are_waited_for() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.nodes (id int PRIMARY KEY, next int REFERENCES public.nodes DEFERRABLE, body text)").await;
    pair.source.exec("BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO public.nodes SELECT n, CASE WHEN n < 1200 THEN n + 1 END, 'body ' || n FROM generate_series(1, 1200) AS n; COMMIT; ANALYZE public.nodes").await;
    pair.run(&["public.nodes"]).chunk_size("2kB").workers(2).exits(exit::DONE).await;
    db.exec("DELETE FROM public.nodes WHERE id <= 1100").await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().workers(2).exits(exit::DONE).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.nodes").await, 1200);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.quarantine").await, 0);
}

/// Chunks that point at each other: what foreign keys refuse of the first is written when the second is there, and nothing stays set aside.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_that_point_at_each_other() {
    for local in [false, true] {
        let pair = Pair::start().await;
        let db = &pair.target;
        let table =
            "(id int PRIMARY KEY, next int REFERENCES public.nodes DEFERRABLE, body text CHECK (body <> ''))";
        let rows = |into: &str| {
            format!(
                "INSERT INTO {into} SELECT n, CASE n WHEN 5 THEN 1990 WHEN 1991 THEN 6 END, 'body ' || n FROM generate_series(1, 2000) AS n; ANALYZE {into}"
            )
        };
        pair.both(&format!("CREATE TABLE public.nodes {table}")).await;
        let repair = if local {
            db.exec(&format!(
                "CREATE TABLE public.raw (id int PRIMARY KEY, next int, body text); {}",
                rows("public.raw")
            ))
            .await;
            let run: String = db.one("SELECT dedup.create_run('local')::text").await;
            db.exec(&format!("SELECT dedup.add_table('{run}', 'public.raw', 'public.nodes'), dedup.plan_chunks('{run}', 10000)")).await;
            db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
            Some(format!("SELECT dedup.repair('{run}')"))
        } else {
            pair.source
                .exec(&format!("BEGIN; SET CONSTRAINTS ALL DEFERRED; {}; COMMIT", rows("public.nodes")))
                .await;
            pair.run(&["public.nodes"]).chunk_size("10kB").workers(2).exits(exit::DONE).await;
            None
        };
        let damage =
            "DELETE FROM public.nodes WHERE id IN (5, 1991); DELETE FROM public.nodes WHERE id IN (6, 1990)";
        db.exec(damage).await;
        pair.reconcile().exits(exit::HALTED).await;
        // A reason that stays: nothing is set aside for it, and the run is not taken for right.
        db.exec("ALTER TABLE public.nodes ADD CONSTRAINT never CHECK (id <> 1990) NOT VALID").await;
        match &repair {
            Some(sql) => drop(db.fails(sql).await),
            None => drop(pair.repair().exits(exit::ERROR).await),
        }
        pair.reconcile().exits(if local { exit::HALTED } else { exit::ERROR }).await;
        assert_eq!(run_status_of_last(db).await, "halted");
        db.exec("ALTER TABLE public.nodes DROP CONSTRAINT never").await;
        match &repair {
            Some(sql) => db.exec(sql).await,
            None => drop(pair.repair().workers(2).exits(exit::DONE).await),
        }
        assert_eq!(run_status_of_last(db).await, "reconciled");
        assert_eq!(db.one::<i64>("SELECT count(*) FROM public.nodes").await, 2000);
        assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.quarantine").await, 0);
        assert_eq!(
            db.one::<i64>("SELECT count(*) FROM dedup.checkpoints WHERE repair_aside IS NOT NULL").await,
            0
        );
    }
}

/// Records in quarantine are told apart, not counted: one that goes in does not make room for another.
#[tokio::test(flavor = "multi_thread")]
async fn one_in_quarantine_for_another() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec("CREATE TABLE public.parents (id int PRIMARY KEY); INSERT INTO public.parents VALUES (1), (2); \
        CREATE TABLE public.items (id int PRIMARY KEY, parent int REFERENCES public.parents ON DELETE CASCADE, body text)").await;
    pair.source.exec("CREATE TABLE public.items (id int PRIMARY KEY, parent int, body text); INSERT INTO public.items SELECT n, n % 3 + 1, 'body ' || n FROM generate_series(1, 5) AS n").await;
    pair.run(&["public.items"]).exits(exit::LEFT_ASIDE).await;
    let aside = "SELECT source_key || ' ' || sqlstate FROM dedup.quarantine ORDER BY 1";
    assert_eq!(db.column(aside).await, ["id=2 23503", "id=5 23503"]);
    // The parent of two comes, that of two others goes, and they with it.
    db.exec("INSERT INTO public.parents VALUES (3); DELETE FROM public.parents WHERE id = 2").await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::ERROR).await.says("foreign keys refuse");
    pair.reconcile().exits(exit::ERROR).await.says("not repaired yet");
    assert_eq!(run_status_of_last(db).await, "halted");
    db.exec("INSERT INTO public.parents VALUES (2)").await;
    pair.repair().exits(exit::DONE).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items").await, 5);
    assert_eq!(run_status_of_last(db).await, "reconciled");
}

async fn run_status_of_last(db: &Db) -> String {
    db.one("SELECT status FROM dedup.runs ORDER BY created_at DESC LIMIT 1").await
}

/// A run that is verified at its end is repaired like any other, records that left the source included.
#[tokio::test(flavor = "multi_thread")]
async fn verified_at_the_end() {
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    pair.run(&["public.items"])
        .args(&["--content-columns", "public.items:body", "--verify", "end"])
        .chunk_size("3kB")
        .exits(exit::DONE)
        .await;
    pair.source.exec("DELETE FROM public.items WHERE n = 3").await;
    db.exec("DELETE FROM public.items WHERE n IN (3, 5)").await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::DONE).await;
    assert_right(&pair).await;
}

/// Cut off, the repair of a table without a key goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_key_that_was_cut_off() {
    let pair = Pair::start().await;
    pair.both(LOG_TABLE).await;
    pair.source.exec(LOG_ROWS).await;
    let db = &pair.target;
    pair.run(&["public.log"]).chunk_size("30kB").workers(2).exits(exit::DONE).await;
    for point in [failpoint::AFTER_COMMIT, failpoint::COPIED] {
        db.exec("DELETE FROM public.log WHERE line IN ('line 1', 'line 2000')").await;
        pair.reconcile().exits(exit::HALTED).await;
        pair.repair().workers(1).killed_at(&format!("{point}@2")).await;
        db.exec("UPDATE dedup.workers SET heartbeat_at = heartbeat_at - interval '1 h'; UPDATE dedup.checkpoints SET leased_at = leased_at - interval '1 h' WHERE status = 'syncing' AND written_at IS NULL").await;
        pair.repair().exits(exit::DONE).await;
        let wanted = pair.source.column("SELECT DISTINCT t::text FROM public.log AS t ORDER BY 1").await;
        assert_eq!(db.column("SELECT t::text FROM public.log AS t ORDER BY 1").await, wanted);
    }
    // A row that was written again and then came back by hand is nobody's.
    db.exec("INSERT INTO public.log SELECT * FROM public.log WHERE line = 'line 1'").await;
    pair.reconcile().exits(exit::DONE).await;
}

/// The first record with a key has it in a repair, too, though the other's chunk is the one that is repaired.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_taken() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text, note text)").await;
    pair.source
        .exec(
            "CREATE TABLE public.sa (LIKE public.items INCLUDING ALL); CREATE TABLE public.sb (LIKE public.items INCLUDING ALL); \
             INSERT INTO public.sa SELECT n, 'a' || n, 'note' FROM generate_series(1, 10) AS n; INSERT INTO public.sb SELECT n, 'b' || n, 'note' FROM generate_series(10, 20) AS n",
        )
        .await;
    let tables = ["public.sa=public.items", "public.sb=public.items"];
    let run = pair.run(&tables).workers(1).args(&[
        "--content-columns",
        "public.sa:body",
        "--content-columns",
        "public.sb:body",
    ]);
    run.exits(exit::LEFT_ASIDE).await;
    run.exits(exit::LEFT_ASIDE).await;
    db.exec("UPDATE public.items SET note = 'tampered' WHERE id = 15").await;
    pair.reconcile().exits(exit::HALTED).await;
    let before = db.one::<String>("SELECT xmin || ' ' || t FROM public.items AS t WHERE id = 10").await;
    pair.repair().exits(exit::LEFT_ASIDE).await;
    assert_eq!(
        db.one::<String>("SELECT xmin || ' ' || t FROM public.items AS t WHERE id = 10").await,
        before
    );
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.pass_keys").await, 0);
}

/// What a plain pass cleared away is not missed by the comparison after a repair.
#[tokio::test(flavor = "multi_thread")]
async fn a_strict_and_a_plain_pass() {
    let pair = local_items("int", 100).await;
    let db = &pair.target;
    db.exec(
        "INSERT INTO public.other VALUES (1000, 'X', 'note'); UPDATE public.src SET body = 'X' WHERE id = 5",
    )
    .await;
    local(&pair, "one", "other").await;
    let run = local(&pair, "two", "src").await;
    db.exec(&format!(
        "UPDATE public.src SET note = 'later' WHERE id = 99; SELECT FROM dedup.reconcile('{run}', strict => true); SELECT FROM dedup.reconcile('{run}'); \
         DELETE FROM public.items WHERE id = 1000; SELECT dedup.repair('{run}')"
    ))
    .await;
    if run_status(db, &run).await == "halted" {
        db.exec(&format!("SELECT dedup.repair('{run}')")).await;
    }
    assert_eq!(run_status(db, &run).await, "reconciled");
    assert_eq!(db.column("SELECT id::text FROM public.items WHERE body = 'X'").await, ["5"]);
}

/// Extra rows: those that the source has again stay, those that another run's records are stay, parents go after their children.
#[tokio::test(flavor = "multi_thread")]
async fn extra_rows_that_stay() {
    let pair = local_items("int", 50).await;
    let db = &pair.target;
    local(&pair, "one", "src").await;
    db.exec("DELETE FROM public.src WHERE id IN (3, 7)").await;
    let run = local(&pair, "two", "src").await;
    db.exec(&format!("SELECT FROM dedup.reconcile('{run}')")).await;
    assert_eq!(run_status(db, &run).await, "halted");
    db.exec(&format!("INSERT INTO public.src VALUES (3, 'b3', 'note'); SELECT dedup.repair('{run}', true)"))
        .await;
    assert_eq!(run_status(db, &run).await, "reconciled");
    assert_eq!(db.column("SELECT id::text FROM public.items WHERE id IN (3, 7)").await, ["3"]);

    db.exec("INSERT INTO public.other VALUES (8, 'b8', 'note'); DELETE FROM public.src WHERE id = 8").await;
    local(&pair, "of another source", "other").await;
    let run = local(&pair, "three", "src").await;
    db.exec(&format!("SELECT FROM dedup.reconcile('{run}')")).await;
    let (state, message) = db.fails(&format!("SELECT dedup.repair('{run}', true)")).await;
    assert!(state == "55000" && message.contains("found unchanged"), "{message}");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items WHERE id = 8").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn extra_parents_and_children() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.parents (id int PRIMARY KEY, body text); CREATE TABLE public.children (id int PRIMARY KEY, parent int REFERENCES public.parents)").await;
    pair.source.exec("INSERT INTO public.parents SELECT n, 'p' || n FROM generate_series(1, 20) AS n; INSERT INTO public.children SELECT n, n FROM generate_series(1, 20) AS n").await;
    let run = pair.run(&["public.parents", "public.children"]).workers(1);
    run.exits(exit::DONE).await;
    pair.source
        .exec("DELETE FROM public.children WHERE id = 4; DELETE FROM public.parents WHERE id = 4")
        .await;
    run.exits(exit::DONE).await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().arg("--delete-extra").workers(1).exits(exit::DONE).await;
    assert_eq!(
        db.texts("SELECT (SELECT count(*) FROM public.parents), (SELECT count(*) FROM public.children)")
            .await,
        [line(&["19", "19"])]
    );
}

/// The same where the target database reads the sources itself: a parent waits for its child's chunk there, too.
#[tokio::test(flavor = "multi_thread")]
async fn extra_parents_and_children_of_local_tables() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE public.src_p (id int PRIMARY KEY, body text); CREATE TABLE public.parents (LIKE public.src_p INCLUDING ALL); \
         CREATE TABLE public.src_c (id int PRIMARY KEY, parent int); CREATE TABLE public.children (id int PRIMARY KEY, parent int REFERENCES public.parents); \
         INSERT INTO public.src_p SELECT n, 'p' || n FROM generate_series(1, 20) AS n; INSERT INTO public.src_c SELECT n, n FROM generate_series(1, 20) AS n",
    )
    .await;
    // What is gone from the source is extra for a run that never saw it.
    let mut run = String::new();
    for gone in [0, 4] {
        db.exec(&format!(
            "DELETE FROM public.src_c WHERE id = {gone}; DELETE FROM public.src_p WHERE id = {gone}"
        ))
        .await;
        run = db.one("SELECT dedup.create_run('local')::text").await;
        db.exec(&format!(
            "SELECT dedup.add_table('{run}', 'public.src_p', 'public.parents'); SELECT dedup.add_table('{run}', 'public.src_c', 'public.children'); SELECT dedup.plan_chunks('{run}')"
        ))
        .await;
        db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    }
    db.exec(&format!("SELECT FROM dedup.reconcile('{run}')")).await;
    pair.repair().arg("--delete-extra").exits(exit::DONE).await;
    assert_eq!(
        db.texts("SELECT (SELECT count(*) FROM public.parents), (SELECT count(*) FROM public.children)")
            .await,
        [line(&["19", "19"])]
    );
}

/// A repair whose session on the target is lost goes on only if nobody else took the run meanwhile, and be it that they are done with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_lost() {
    for held in [true, false] {
        let pair = items(&BY_NUMBER).await;
        let db = &pair.target;
        db.exec(TAMPERING).await;
        pair.reconcile().exits(exit::HALTED).await;
        let blocker = pair.target_again().await;
        blocker.exec("BEGIN; LOCK TABLE public.items IN EXCLUSIVE MODE").await;
        let repair = pair.repair().spawn();
        db.wait_until(
            "EXISTS (SELECT FROM pg_locks WHERE relation = 'public.items'::regclass AND NOT granted)",
        )
        .await;
        db.exec("SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted").await;
        db.exec(if held {
            "SELECT dedup.hold_run(run_id) FROM dedup.runs"
        } else {
            "SELECT dedup.set_run_status(run_id, '{halted}', 'rolling_back', 'run_rolling_back') FROM dedup.runs"
        })
        .await;
        blocker.exec("COMMIT").await;
        let output = repair.finish().await;
        assert_eq!(output.code, Some(exit::ERROR), "{}", output.describe());
        output.says(if held { "another session" } else { "is rolling_back now" });
        assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.events WHERE kind = 'repaired'").await, 0);
        if held {
            db.exec("SELECT dedup.let_go_of_run(run_id) FROM dedup.runs").await;
            pair.repair().exits(exit::DONE).await;
            assert_right(&pair).await;
        }
    }
}

/// A full disk ends the repair at once, and it is taken up when there is room.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk() {
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    db.exec(TAMPERING).await;
    pair.reconcile().exits(exit::HALTED).await;
    db.exec(
        "CREATE FUNCTION public.no_room() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = '53100'; END $$; \
         CREATE TRIGGER no_room BEFORE INSERT OR UPDATE ON public.items FOR EACH ROW EXECUTE FUNCTION public.no_room()",
    )
    .await;
    let output = pair.repair().workers(1).exits(exit::ERROR).await;
    output.says("no space left").says("make room");
    assert_eq!(db.one::<String>("SELECT status FROM dedup.runs").await, "halted");
    db.exec("DROP TRIGGER no_room ON public.items").await;
    pair.repair().exits(exit::DONE).await;
    assert_right(&pair).await;
}

/// A key that is spelled otherwise now: the row is the record's, and is not deleted for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_spelled_otherwise() {
    let pair = local_items("numeric", 20).await;
    let db = &pair.target;
    let run = local(&pair, "one", "src").await;
    db.exec(&format!("UPDATE public.items SET id = 3.00 WHERE id = 3; SELECT FROM dedup.reconcile('{run}')"))
        .await;
    assert_eq!(run_status(db, &run).await, "halted");
    db.exec(&format!("SELECT dedup.repair('{run}')")).await;
    assert_eq!(run_status(db, &run).await, "reconciled");
    assert_eq!(db.column("SELECT id::text FROM public.items WHERE body = 'b3'").await, ["3"]);
    assert_index(db).await;
}

/// Rows that stood in a table which was not indexed are nobody's, whatever they hold.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_table_that_was_not_indexed() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (k bigint PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.items SELECT n, CASE WHEN n IN (5, 190) THEN 'X' ELSE 'b' || n END FROM generate_series(1, 200) AS n; ANALYZE public.items").await;
    db.exec("INSERT INTO public.items VALUES (190, 'X')").await;
    pair.run(&["public.items"])
        .args(&["--content-columns", "public.items:body", "--no-index-existing"])
        .chunk_size("1kB")
        .exits(exit::DONE)
        .await;
    pair.reconcile().exits(exit::DONE).await;
    db.exec("UPDATE public.items SET body = 'tampered' WHERE k IN (7, 189)").await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::DONE).await;
    assert_eq!(db.column("SELECT k::text FROM public.items WHERE body = 'X' ORDER BY k").await, ["190", "5"]);
}

/// Whatever is done to the rows at random, several workers set it right in one call, and nothing is left to be found.
#[tokio::test(flavor = "multi_thread")]
async fn random_damage() {
    for seed in [0.1, 0.2, 0.3] {
        let pair = items(&BY_NUMBER).await;
        let db = &pair.target;
        db.exec(&format!(
            "SELECT setseed({seed}); CREATE TABLE saved AS TABLE public.items; CREATE TABLE src AS SELECT n * 10::int8 AS k, n, 'body ' || n % 1500 AS body, 'note ' || n AS note FROM generate_series(1, 2000) AS n; \
             DELETE FROM public.items WHERE random() < 0.1; UPDATE public.items SET body = 'body ' || (random() * 1499)::int WHERE random() < 0.1; \
             UPDATE public.items SET note = NULL WHERE random() < 0.05; UPDATE public.items SET body = 'gone' WHERE random() < 0.03; \
             INSERT INTO public.items SELECT * FROM src WHERE random() < 0.2 ON CONFLICT DO NOTHING"
        ))
        .await;
        pair.reconcile().exits(exit::HALTED).await;
        pair.repair().workers(4).exits(exit::DONE).await;
        assert_right(&pair).await;
        pair.reconcile().exits(exit::DONE).await;
        let entries: i64 = db.one("SELECT count(*) FROM dedup.hash_index('public.items')").await;
        assert_eq!(entries, db.one::<i64>("SELECT count(*) FROM public.items").await);
    }
}

/// Where a content stands twice, the chunk of the row that is too many is done again, and no other: what changed in the source since is left alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_content_that_stands_twice() {
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    let dropped: i32 = db
        .one("SELECT min(n) FROM generate_series(1, 2000) AS n WHERE n NOT IN (SELECT n FROM public.items)")
        .await;
    let elsewhere: i32 =
        db.one(&format!("SELECT n FROM public.items ORDER BY abs(n - {dropped}) DESC LIMIT 1")).await;
    let values = BY_NUMBER.values;
    db.exec(&format!(
        "INSERT INTO public.items SELECT {values}, n, 'body ' || n % 1500, 'by hand' FROM generate_series({dropped}, {dropped}) AS n"
    ))
    .await;
    pair.source.exec(&format!("UPDATE public.items SET note = 'later' WHERE n = {elsewhere}")).await;
    pair.reconcile().exits(exit::HALTED).await;
    let before = db.column("SELECT ordinal FROM dedup.checkpoints ORDER BY chunk_no").await;
    pair.repair().exits(exit::DONE).await;
    let after = db.column("SELECT ordinal FROM dedup.checkpoints ORDER BY chunk_no").await;
    assert_eq!(before.iter().zip(&after).filter(|(before, after)| before != after).count(), 1);
    assert_eq!(db.column("SELECT n FROM public.items WHERE note IN ('by hand', 'later')").await, [""; 0]);
}

/// A row that no run wrote, under the key of a record that was dropped as a duplicate, is nobody's to delete: not when the record's chunk is
/// repaired for something else, and not when its content is to be written again.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_rows_stay() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text, n int)").await;
    pair.source.exec("INSERT INTO public.items SELECT g, 'b' || g % 900, g % 900 FROM generate_series(1, 1000) AS g; ANALYZE public.items").await;
    // One worker, so that the first of equal records is the one that is written.
    pair.run(&["public.items"])
        .args(&["--exclude-columns", "public.items:id"])
        .workers(1)
        .chunk_size("10kB")
        .exits(exit::DONE)
        .await;
    let chunk_of = |id: i32| {
        format!(
            "SELECT chunk_id FROM dedup.checkpoints WHERE range_lower IS NULL OR range_lower[1]::int <= {id} ORDER BY chunk_no DESC LIMIT 1"
        )
    };
    // 990 was dropped in favour of 90; 985, of the same chunk, is missing.
    assert_eq!(db.one::<String>(&chunk_of(990)).await, db.one::<String>(&chunk_of(985)).await);
    db.exec(
        "DELETE FROM public.items WHERE id IN (1, 85); INSERT INTO public.items VALUES (990, 'precious', 0)",
    )
    .await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::DONE).await;
    let precious = "SELECT count(*) FROM public.items WHERE id = 990 AND body = 'precious'";
    assert_eq!(db.one::<i64>(precious).await, 1);
    assert_eq!(
        db.one::<i64>("SELECT count(DISTINCT body) FROM public.items WHERE body <> 'precious'").await,
        900
    );

    // Now 990 has to be written, for 90 is gone on both sides: it would have to overwrite what is nobody's.
    pair.source.exec("DELETE FROM public.items WHERE id = 90").await;
    db.exec("DELETE FROM public.items WHERE id = 90").await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::ERROR).await;
    assert_eq!(db.one::<i64>(precious).await, 1);
    db.exec("DELETE FROM public.items WHERE id = 990").await;
    pair.repair().exits(exit::DONE).await;
    assert_eq!(db.one::<String>("SELECT body FROM public.items WHERE id = 990").await, "b90");
}

/// In a table without a key a row is told by all of its columns, though its content is only some: one that somebody changed is somebody's.
#[tokio::test(flavor = "multi_thread")]
async fn keyless_rows_that_differ_beside_their_content() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.lines (x int, v text)").await;
    pair.source.exec("INSERT INTO public.lines SELECT g, 'v' || g % 700 FROM generate_series(1, 1000) AS g; ANALYZE public.lines").await;
    pair.run(&["public.lines"])
        .args(&["--content-columns", "public.lines:v"])
        .chunk_size("8kB")
        .exits(exit::DONE)
        .await;
    pair.reconcile().exits(exit::DONE).await;
    db.exec("UPDATE public.lines SET x = -1 WHERE v = 'v20'; DELETE FROM public.lines WHERE v = 'v1'").await;
    pair.reconcile().exits(exit::HALTED).await;
    let found = db.column("SELECT kind || ' ' || state FROM dedup.divergences ORDER BY 1").await;
    assert_eq!(found, ["foreign reported", "missing open", "missing open"]);
    pair.repair().exits(exit::DONE).await;
    let rows = db.column("SELECT (x > 0)::text FROM public.lines WHERE v IN ('v1', 'v20') ORDER BY 1").await;
    assert_eq!(rows, ["false", "true", "true"]);
    db.exec("DELETE FROM public.lines WHERE x = -1; UPDATE public.lines SET x = -x").await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::DONE).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.lines WHERE x > 0").await, 700);
}

/// Two equal rows that stood there before any run are nobody's to fold, however they came into the index.
#[tokio::test(flavor = "multi_thread")]
async fn rows_from_before_stay() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source
        .exec("INSERT INTO public.items VALUES (1, 'x'), (2, 'x'), (3, 'z'); ANALYZE public.items")
        .await;
    let content = ["--content-columns", "public.items:body"];
    db.exec("INSERT INTO public.items VALUES (1, 'x')").await;
    let nothing = [&content[..], &["--where", "public.items:id = 0"]].concat();
    pair.run(&["public.items"]).args(&nothing).exits(exit::DONE).await;
    db.exec("INSERT INTO public.items VALUES (2, 'x'); SELECT dedup.index_existing('public.items')").await;
    pair.run(&["public.items"]).args(&content).exits(exit::DONE).await;
    pair.reconcile().exits(exit::DONE).await;
    db.exec("UPDATE public.items SET body = 'tampered' WHERE id = 3").await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::DONE).await;
    let rows = db.column("SELECT t::text FROM public.items AS t ORDER BY id").await;
    assert_eq!(rows, ["(1,x)", "(2,x)", "(3,z)"]);
}

/// A row under the key of a record that was set aside is nobody's to overwrite, though the record would be taken now.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_in_the_place_of_one_in_quarantine() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source.exec("CREATE TABLE public.items (id int PRIMARY KEY, body text); INSERT INTO public.items VALUES (1, 'bad'), (2, 'good'); ANALYZE public.items").await;
    db.exec(
        "CREATE TABLE public.items (id int PRIMARY KEY, body text CONSTRAINT good CHECK (body <> 'bad'))",
    )
    .await;
    pair.run(&["public.items"]).exits(exit::LEFT_ASIDE).await;
    db.exec("ALTER TABLE public.items DROP CONSTRAINT good; INSERT INTO public.items VALUES (1, 'mine'); UPDATE public.items SET body = 'tampered' WHERE id = 2").await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::LEFT_ASIDE).await;
    let rows = db.column("SELECT t::text FROM public.items AS t ORDER BY id").await;
    assert_eq!(rows, ["(1,mine)", "(2,good)"]);
}

/// A row under the key of a record that was set aside may have the content of a record that is missing: it is somebody's copy, the record gets its own row.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_record_in_the_place_of_one_in_quarantine() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source.exec("CREATE TABLE public.items (id int PRIMARY KEY, body text); INSERT INTO public.items VALUES (1, 'bad'), (2, 'good'), (3, 'other'); ANALYZE public.items").await;
    db.exec(
        "CREATE TABLE public.items (id int PRIMARY KEY, body text CONSTRAINT good CHECK (body <> 'bad'))",
    )
    .await;
    pair.run(&["public.items"])
        .args(&["--content-columns", "public.items:body"])
        .exits(exit::LEFT_ASIDE)
        .await;
    db.exec("DELETE FROM public.items WHERE id = 2; INSERT INTO public.items VALUES (1, 'good')").await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.repair().exits(exit::LEFT_ASIDE).await;
    let rows = db.column("SELECT t::text FROM public.items AS t ORDER BY id").await;
    assert_eq!(rows, ["(1,good)", "(2,good)", "(3,other)"]);
    pair.reconcile().exits(exit::LEFT_ASIDE).await;
}
