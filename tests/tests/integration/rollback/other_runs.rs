//! Several runs on one table: what one rests on, changed or wrote in another's place is not lost to its rollback.

use integration::check::{Table, assert_exact};
use integration::pair::Pair;
use integration::sidecar::exit;

use super::{
    assert_entries_have_rows, assert_forgotten, assert_index_is_true, notes, refused, rows, run_of, status,
};

#[tokio::test(flavor = "multi_thread")]
async fn duplicates_of_another_run_keep_their_survivors() {
    let pair = notes("SELECT n, 'body ' || n, 'a' FROM generate_series(1, 300) AS n").await;
    let db = &pair.target;
    let a = run_of(&pair, "notes").await;
    // All of A's contents under other keys, twice, and some of its own.
    pair.source
        .exec("INSERT INTO public.others SELECT 1000 + n, 'body ' || n % 250 + 1, 'b' FROM generate_series(1, 600) AS n; \
               INSERT INTO public.others SELECT 5000 + n, 'own ' || n, 'b' FROM generate_series(1, 50) AS n; ANALYZE public.others")
        .await;
    let b = run_of(&pair, "others").await;
    let before = rows(db, "public.notes").await;
    for way in ["SELECT dedup.rollback_run", "CALL dedup.rollback_run_in_chunks"] {
        refused(db, &format!("{way}('{a}')"), "55006", &[&b, "rest on 250 of its rows", "force"]).await;
        assert_eq!(rows(db, "public.notes").await, before);
        assert_eq!(status(db, &a).await, "done");
    }
    let done =
        db.texts(&format!("SELECT deleted_count, kept_count FROM dedup.rollback_run('{a}', true)")).await;
    assert_eq!(done, [[Some("50".into()), Some("250".into())]]);
    assert_forgotten(db, &a).await;
    let contents = |source: &'static str| format!("SELECT DISTINCT body FROM public.{source} ORDER BY 1");
    assert_eq!(db.column(&contents("notes")).await, pair.source.column(&contents("others")).await);
    let duplicates: i64 = db.one("SELECT count(survivor) FROM dedup.duplicates").await;
    assert_eq!(duplicates, 600, "duplicates of B that have a survivor");
    pair.reconcile().exits(exit::DONE).await;
    assert_eq!(status(db, &b).await, "reconciled");
    // What A would write now are the contents that B does not have.
    let again = run_of(&pair, "notes").await;
    let books = db.texts(&format!("SELECT sum(inserted_count), sum(duplicate_count), sum(unchanged_count) FROM dedup.checkpoints WHERE run_id = '{again}'")).await;
    assert_eq!(books, [[Some("50".into()), Some("0".into()), Some("250".into())]]);
    db.exec(&format!("SELECT dedup.rollback_run('{again}'); SELECT dedup.rollback_run('{b}')")).await;
    assert_eq!(rows(db, "public.notes").await, Vec::<String>::new());
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.segment").await, 0);
}

/// A second run that finds everything as it is rests on every row of the first.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_another_run_found_unchanged_stay() {
    let pair = notes("SELECT n, 'body ' || n, 'a' FROM generate_series(1, 200) AS n").await;
    let db = &pair.target;
    let a = run_of(&pair, "notes").await;
    pair.source.exec("DELETE FROM public.notes WHERE id > 150").await;
    let b = run_of(&pair, "notes").await;
    refused(db, &format!("SELECT dedup.rollback_run('{a}')"), "55006", &[&b, "rest on 150 of its rows"])
        .await;
    pair.rollback(&a).arg("--force").exits(exit::DONE).await;
    assert_exact(
        &pair.source,
        db,
        &Table {
            source: "public.notes",
            target: "public.notes",
            content: &["body"],
            columns: &["id", "body", "remark"],
        },
    )
    .await;
    pair.reconcile().exits(exit::DONE).await;
    db.exec(&format!("SELECT dedup.rollback_run('{b}')")).await;
    assert_eq!(rows(db, "public.notes").await, Vec::<String>::new());
}

/// The natural order: the last run first.
#[tokio::test(flavor = "multi_thread")]
async fn runs_are_taken_back_one_after_the_other() {
    let pair = notes("SELECT n, 'body ' || n, 'a' FROM generate_series(1, 200) AS n").await;
    let db = &pair.target;
    let a = run_of(&pair, "notes").await;
    let after_a = rows(db, "public.notes").await;
    pair.source.exec("UPDATE public.notes SET body = 'changed ' || id WHERE id % 3 = 0; INSERT INTO public.notes VALUES (900, 'body 7', 'dup'), (901, 'new', 'new')").await;
    let b = run_of(&pair, "notes").await;
    refused(db, &format!("SELECT dedup.rollback_run('{a}')"), "55006", &[&b, "changed 66 of its rows"]).await;
    db.exec(&format!("CALL dedup.rollback_run_in_chunks('{b}')")).await;
    assert_eq!(rows(db, "public.notes").await, after_a);
    db.exec(&format!("CALL dedup.rollback_run_in_chunks('{a}')")).await;
    assert_eq!(rows(db, "public.notes").await, Vec::<String>::new());
}

/// A changes P into X, B changes X into Y: without A, B has changed P into Y.
#[tokio::test(flavor = "multi_thread")]
async fn changes_by_a_later_run_outlive_the_earlier_one() {
    for (had_rows, same_content) in [(true, false), (false, false), (true, true), (false, true)] {
        let pair = notes("SELECT n, 'x ' || n, 'a' FROM generate_series(1, 90) AS n").await;
        let db = &pair.target;
        if had_rows {
            db.exec("INSERT INTO public.notes SELECT n, 'p ' || n, 'p' FROM generate_series(1, 90) AS n")
                .await;
        }
        let before = rows(db, "public.notes").await;
        let a = run_of(&pair, "notes").await;
        let change = if same_content { "remark = 'b'" } else { "body = 'y ' || id" };
        pair.source.exec(&format!("UPDATE public.notes SET {change}")).await;
        let b = run_of(&pair, "notes").await;
        let after_b = rows(db, "public.notes").await;
        refused(db, &format!("SELECT dedup.rollback_run('{a}')"), "55006", &[&b]).await;
        db.exec(&format!("SELECT dedup.rollback_run('{a}', true)")).await;
        assert_eq!(rows(db, "public.notes").await, after_b);
        assert_forgotten(db, &a).await;
        pair.reconcile().exits(exit::DONE).await;
        db.exec(&format!("SELECT dedup.rollback_run('{b}')")).await;
        assert_eq!(rows(db, "public.notes").await, before, "{had_rows} {same_content}");
        let entries: i64 = db.one("SELECT count(*) FROM dedup.hash_index('public.notes')").await;
        assert_eq!(entries, before.len() as i64, "{had_rows} {same_content}");
    }
}

/// A removes a row, B writes one under its key: without A, B has replaced it.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_in_the_place_of_a_removed_one() {
    let pair = notes("VALUES (1, 'X', 'a'), (2, 'X', 'a')").await;
    let db = &pair.target;
    db.exec("INSERT INTO public.notes VALUES (1, 'X', 'a'), (2, 'P', 'p')").await;
    let before = rows(db, "public.notes").await;
    let a = run_of(&pair, "notes").await;
    assert_eq!(db.column("SELECT action FROM dedup.before_images").await, ["delete"]);
    pair.source.exec("INSERT INTO public.others VALUES (2, 'Z', 'b')").await;
    let b = run_of(&pair, "others").await;
    let after_b = rows(db, "public.notes").await;
    refused(db, &format!("SELECT dedup.rollback_run('{a}')"), "55006", &[&b]).await;
    db.exec(&format!("SELECT dedup.rollback_run('{a}', true)")).await;
    assert_eq!(rows(db, "public.notes").await, after_b);
    db.exec(&format!("SELECT dedup.rollback_run('{b}')")).await;
    assert_eq!(rows(db, "public.notes").await, before);
}

/// Rows that were kept for one run are still rested on by the others.
#[tokio::test(flavor = "multi_thread")]
async fn rows_are_handed_on_as_long_as_somebody_rests_on_them() {
    let pair = notes("SELECT n, 'body ' || n, 'a' FROM generate_series(1, 100) AS n").await;
    let db = &pair.target;
    let (a, b, c) =
        (run_of(&pair, "notes").await, run_of(&pair, "notes").await, run_of(&pair, "notes").await);
    db.exec(&format!("SELECT dedup.rollback_run('{a}', true)")).await;
    let heir: String = db.one("SELECT DISTINCT run_id::text FROM dedup.hash_index('public.notes')").await;
    let other = if heir == b { &c } else { &b };
    refused(db, &format!("SELECT dedup.rollback_run('{heir}')"), "55006", &[other, "rest on 100"]).await;
    let seen: i64 = db.one(&format!("SELECT rows_to_delete FROM dedup.rollback_preview('{heir}')")).await;
    assert_eq!(seen, 100, "the preview of what was handed over");
    db.exec(&format!("SELECT dedup.rollback_run('{heir}', true); SELECT dedup.rollback_run('{other}')"))
        .await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.notes").await, 0);
}

/// A row that another run wrote where somebody had deleted or changed this run's is the other's.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_others_are_theirs_whoever_came_between() {
    for (app, after_a) in [
        ("DELETE FROM public.notes", true),
        ("UPDATE public.notes SET body = 'Z'", true),
        ("DELETE FROM public.notes", false),
    ] {
        for force in [false, true] {
            let pair = notes("VALUES (1, 'X', 'a')").await;
            let db = &pair.target;
            if !after_a {
                db.exec("INSERT INTO public.notes VALUES (1, 'P', 'p')").await;
            }
            let a = run_of(&pair, "notes").await;
            db.exec(app).await;
            pair.source.exec("UPDATE public.notes SET body = 'Y'").await;
            let b = run_of(&pair, "notes").await;
            db.exec(&format!("SELECT dedup.rollback_run('{a}', {force})")).await;
            assert_eq!(db.column("SELECT body FROM public.notes").await, ["Y"], "{app} {force}");
            assert_index_is_true(db).await;
            assert_eq!(
                db.one::<String>("SELECT run_id::text FROM dedup.hash_index('public.notes')").await,
                b
            );
            db.exec(&format!("SELECT dedup.rollback_run('{b}')")).await;
            assert_entries_have_rows(db).await;
        }
    }
}

/// A removes a row, B writes one in its place, C changes that: without A, B has changed what A had removed.
#[tokio::test(flavor = "multi_thread")]
async fn two_runs_in_the_place_of_a_removed_row() {
    let pair = notes("VALUES (1, 'X', 'a'), (2, 'X', 'a')").await;
    let db = &pair.target;
    db.exec("ALTER TABLE public.notes ADD own text DEFAULT 'new'; INSERT INTO public.notes VALUES (1, 'X', 'a', 'own1'), (2, 'P', 'p', 'own2')").await;
    let before = rows(db, "public.notes").await;
    let a = run_of(&pair, "notes").await;
    pair.source.exec("INSERT INTO public.others VALUES (2, 'Z', 'b')").await;
    let b = run_of(&pair, "others").await;
    pair.source.exec("UPDATE public.others SET body = 'W'").await;
    let c = run_of(&pair, "others").await;
    db.exec(&format!("SELECT dedup.rollback_run('{a}', true)")).await;
    assert_eq!(db.column("SELECT body FROM public.notes ORDER BY id").await, ["X", "W"]);
    assert_index_is_true(db).await;
    db.exec(&format!("SELECT dedup.rollback_run('{c}'); SELECT dedup.rollback_run('{b}')")).await;
    assert_eq!(rows(db, "public.notes").await, before);
    assert_index_is_true(db).await;
}

/// Images that come over to a run which delivers fewer columns.
#[tokio::test(flavor = "multi_thread")]
async fn images_of_other_columns() {
    let pair = notes("VALUES (1, 'X', 'a'), (2, 'Y', 'a')").await;
    let db = &pair.target;
    db.exec("INSERT INTO public.notes VALUES (1, 'P', 'p'), (2, 'Q', 'q')").await;
    let before = rows(db, "public.notes").await;
    let a = run_of(&pair, "notes").await;
    pair.source.exec("CREATE TABLE public.fewer (id int PRIMARY KEY, body text); INSERT INTO public.fewer VALUES (1, 'X2'), (2, 'Y2')").await;
    let b = run_of(&pair, "fewer").await;
    db.exec(&format!("SELECT dedup.rollback_run('{a}', true)")).await;
    assert_eq!(db.column("SELECT body FROM public.notes ORDER BY 1").await, ["X2", "Y2"]);
    db.exec(&format!("SELECT dedup.rollback_run('{b}')")).await;
    assert_eq!(rows(db, "public.notes").await, before);
}

/// A key that three parties spell in three ways.
#[tokio::test(flavor = "multi_thread")]
async fn spellings_of_a_key() {
    for force in [false, true] {
        let pair = Pair::start().await;
        pair.both("CREATE TABLE public.notes (id numeric PRIMARY KEY, body text)").await;
        pair.source.exec("INSERT INTO public.notes VALUES (1.00, 'X'), (2.00, 'Y')").await;
        let db = &pair.target;
        db.exec("INSERT INTO public.notes VALUES (1.0, 'P'), (2.0, 'Q')").await;
        pair.run(&["public.notes"]).args(&["--content-columns", "public.notes:body"]).exits(exit::DONE).await;
        db.exec("UPDATE public.notes SET id = 1.000, body = 'app' WHERE id = 1").await;
        let told = if force { exit::DONE } else { exit::LEFT_ASIDE };
        pair.rollback("last").args(if force { &["--force"] } else { &[] }).exits(told).await;
        let first = if force { "1.0 P" } else { "1.000 app" };
        assert_eq!(
            db.column("SELECT id || ' ' || body FROM public.notes ORDER BY id").await,
            [first, "2.0 Q"]
        );
        assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.left_alone").await, i64::from(!force));
        assert_index_is_true(db).await;
    }
}
