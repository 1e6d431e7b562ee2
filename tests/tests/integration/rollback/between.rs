//! Rows that came and went between runs: what stood there before is put back once, by whoever's rollback is the last to rest on it.

use integration::db::Db;
use integration::pair::Pair;

/// A keyed target with rows from before, and sources in the same database.
async fn tables(before: &str, sources: &[(&str, &str)]) -> Pair {
    let pair = Pair::start().await;
    pair.target.exec("CREATE TABLE public.it (id int PRIMARY KEY, v text)").await;
    if !before.is_empty() {
        pair.target.exec(&format!("INSERT INTO public.it VALUES {before}")).await;
    }
    for (name, rows) in sources {
        pair.target
            .exec(&format!(
                "CREATE TABLE public.{name} (LIKE public.it INCLUDING ALL); INSERT INTO public.{name} VALUES {rows}"
            ))
            .await;
    }
    pair
}

/// One run of a source; its id.
async fn run(db: &Db, name: &str, source: &str) -> String {
    let run: String = db.one(&format!("SELECT dedup.create_run('{name}')::text")).await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.{source}', 'public.it', content_columns => '{{v}}'), dedup.plan_chunks('{run}')"
    ))
    .await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    run
}

async fn rows(db: &Db) -> Vec<String> {
    db.column("SELECT t::text FROM public.it AS t ORDER BY 1").await
}

async fn roll_back(db: &Db, run: &str, force: bool) {
    db.exec(&format!("SELECT dedup.rollback_run('{run}', {force})")).await;
}

/// Every row has its entry, every entry its row.
async fn assert_index(db: &Db) {
    let entries = db
        .column("SELECT substring(target_location_uri, 'id=(\\d+)') || encode(content_hash, 'hex') FROM dedup.hash_index('public.it') ORDER BY 1")
        .await;
    let standing =
        db.column("SELECT id || encode(dedup.content_hash(v), 'hex') FROM public.it ORDER BY 1").await;
    assert_eq!(entries, standing);
}

async fn reconcile(db: &Db, run: &str) -> String {
    db.exec(&format!("SELECT FROM dedup.reconcile('{run}')")).await;
    db.one(&format!("SELECT status FROM dedup.runs WHERE run_id = '{run}'")).await
}

const REMOVED: &[(&str, &str)] =
    &[("s0", "(1, 'q')"), ("s1", "(1, 'p')"), ("s2", "(1, 'x')"), ("s9", "(9, 'p')")];

/// A run removed a row, another wrote it again, a third removed that: the first one's rollback does not bring it back.
#[tokio::test(flavor = "multi_thread")]
async fn removed_written_and_removed_again() {
    let pair = tables("(1, 'p'), (2, 'q')", REMOVED).await;
    let db = &pair.target;
    let r0 = run(db, "r0", "s0").await;
    let r1 = run(db, "r1", "s1").await;
    let r2 = run(db, "r2", "s0").await;
    assert_eq!(rows(db).await, ["(2,q)"]);
    let (state, message) = db.fails(&format!("SELECT dedup.rollback_run('{r0}')")).await;
    assert!(state == "55006" && message.contains(&r2), "{message}");
    roll_back(db, &r0, true).await;
    assert_eq!(rows(db).await, ["(2,q)"]);
    assert_index(db).await;
    let r9 = run(db, "r9", "s9").await;
    assert_eq!(rows(db).await, ["(2,q)", "(9,p)"]);
    for run in [&r9, &r2, &r1] {
        roll_back(db, run, true).await;
        assert_index(db).await;
    }
    assert_eq!(rows(db).await, ["(1,p)", "(2,q)"]);
}

/// The same with another content between, in whatever order it is taken back.
#[tokio::test(flavor = "multi_thread")]
async fn another_row_between_two_removals() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let pair = tables("(1, 'p'), (2, 'q')", REMOVED).await;
        let db = &pair.target;
        let runs = [run(db, "r0", "s0").await, run(db, "r1", "s2").await, run(db, "r2", "s0").await];
        for n in order {
            roll_back(db, &runs[n], true).await;
            assert_index(db).await;
        }
        assert_eq!(rows(db).await, ["(1,p)", "(2,q)"], "{order:?}");
        assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.before_images").await, 0, "{order:?}");
    }
}

/// A row that is kept for others does not make room for the one it replaced: what rests on that one's content keeps another.
#[tokio::test(flavor = "multi_thread")]
async fn a_content_that_does_not_come_back() {
    let pair = tables("(1, 'p')", &[("sa", "(1, 'q'), (2, 'p')"), ("sb", "(11, 'p'), (12, 'q')")]).await;
    let db = &pair.target;
    let a = run(db, "a", "sa").await;
    let b = run(db, "b", "sb").await;
    roll_back(db, &a, true).await;
    assert_eq!(rows(db).await, ["(1,q)", "(2,p)"]);
    assert_eq!(reconcile(db, &b).await, "reconciled");
    roll_back(db, &b, true).await;
    assert_eq!(rows(db).await, ["(1,p)"]);
    assert_index(db).await;
}

/// A row from before that a rollback puts back, under the key of a record that another run dropped, is none of that run's business.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_from_before_under_a_dropped_key() {
    let pair = tables("(1, 'old'), (3, 'x'), (4, 'y')", &[("sa", "(1, 'x'), (2, 'x'), (5, 'z')")]).await;
    let db = &pair.target;
    let a = run(db, "a", "sa").await;
    let b = run(db, "b", "sa").await;
    roll_back(db, &a, true).await;
    assert_eq!(rows(db).await, ["(1,old)", "(3,x)", "(4,y)", "(5,z)"]);
    assert_eq!(reconcile(db, &b).await, "reconciled");
    // Nor when its chunk is repaired for something else.
    db.exec("DELETE FROM public.it WHERE id = 5").await;
    assert_eq!(reconcile(db, &b).await, "halted");
    db.exec(&format!("SELECT dedup.repair('{b}')")).await;
    assert_eq!(rows(db).await, ["(1,old)", "(3,x)", "(4,y)", "(5,z)"]);
}

/// A row that another run wrote under the key of a record which was dropped.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_another_run_under_a_dropped_key() {
    let pair = tables("", &[("sa", "(3, 'x'), (5, 'x'), (8, 'w')"), ("sb", "(5, 'y')")]).await;
    let db = &pair.target;
    let a = run(db, "a", "sa").await;
    let b = run(db, "b", "sb").await;
    assert_eq!(reconcile(db, &a).await, "reconciled");
    db.exec("UPDATE public.it SET v = 'tampered' WHERE id = 8").await;
    assert_eq!(reconcile(db, &a).await, "halted");
    db.exec(&format!("SELECT dedup.repair('{a}')")).await;
    assert_eq!(rows(db).await, ["(3,x)", "(5,y)", "(8,w)"]);
    assert_eq!(reconcile(db, &b).await, "reconciled");
}

/// Rows that were kept for a run are not too many for a later run of its source.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_were_kept_for_an_earlier_run() {
    let pair = tables("", &[("sa", "(1, 'x')"), ("sb", "(5, 'x'), (6, 'y')")]).await;
    let db = &pair.target;
    let a = run(db, "a", "sa").await;
    run(db, "b", "sb").await;
    roll_back(db, &a, true).await;
    let c = run(db, "c", "sb").await;
    assert_eq!(reconcile(db, &c).await, "reconciled");
}

/// Done again after a repair and a rollback of one chunk, a run is right.
#[tokio::test(flavor = "multi_thread")]
async fn repaired_one_chunk_back_and_again() {
    let pair = tables("", &[("sa", "(1, 'x'), (2, 'y')"), ("sb", "(5, 'x')")]).await;
    let db = &pair.target;
    let a = run(db, "a", "sa").await;
    let b = run(db, "b", "sb").await;
    db.exec("DELETE FROM public.it WHERE id = 1").await;
    assert_eq!(reconcile(db, &a).await, "halted");
    db.exec(&format!("SELECT dedup.repair('{a}')")).await;
    let chunk: String = db.one(&format!("SELECT chunk_id FROM dedup.checkpoints WHERE run_id = '{a}'")).await;
    db.exec(&format!("SELECT dedup.rollback_chunk('{a}', '{chunk}', true); SELECT dedup.resume_run('{a}')"))
        .await;
    db.exec(&format!("CALL dedup.migrate_run('{a}')")).await;
    assert_eq!(rows(db).await, ["(1,x)", "(2,y)"]);
    for run in [&a, &b] {
        assert_eq!(reconcile(db, run).await, "reconciled");
    }
    assert_index(db).await;
}

/// What a repair of one run wrote in the place of another's rows, which somebody had taken away or changed, is the other's.
#[tokio::test(flavor = "multi_thread")]
async fn repaired_for_another_run() {
    let pair = tables("(3, 'z')", &[("sa", "(1, 'x'), (2, 'y'), (3, 'z'), (4, 'w')")]).await;
    let db = &pair.target;
    let a = run(db, "a", "sa").await;
    let b = run(db, "b", "sa").await;
    db.exec("DELETE FROM public.it WHERE id IN (1, 3); UPDATE public.it SET v = 'tampered' WHERE id = 2")
        .await;
    assert_eq!(reconcile(db, &b).await, "halted");
    db.exec(&format!("SELECT dedup.repair('{b}')")).await;
    roll_back(db, &b, false).await;
    assert_eq!(rows(db).await, ["(1,x)", "(2,y)", "(3,z)", "(4,w)"]);
    assert_index(db).await;
    assert_eq!(reconcile(db, &a).await, "reconciled");
    roll_back(db, &a, false).await;
    assert_eq!(rows(db).await, ["(3,z)"]);
    assert_index(db).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.before_images").await, 0);
}

/// What is left alone because it is another run's stands, also where the finish had found a row with the same content.
#[tokio::test(flavor = "multi_thread")]
async fn left_to_another_run() {
    let pair = tables("", &[("sa", "(1, 'x'), (2, 'y')")]).await;
    let db = &pair.target;
    db.exec("ALTER TABLE public.it ADD COLUMN n int; ALTER TABLE public.sa ADD COLUMN n int DEFAULT 1").await;
    let a = run(db, "a", "sa").await;
    db.exec("UPDATE public.it SET n = 11 WHERE id = 1").await;
    assert_eq!(reconcile(db, &a).await, "halted");
    db.exec(&format!("SELECT dedup.repair('{a}')")).await;
    let b = run(db, "b", "sa").await;
    db.exec("DELETE FROM public.it WHERE id = 1").await;
    assert_eq!(reconcile(db, &b).await, "halted");
    db.exec(&format!("SELECT dedup.repair('{b}')")).await;
    roll_back(db, &a, true).await;
    assert_eq!(rows(db).await, ["(1,x,1)", "(2,y,1)"]);
    assert_index(db).await;
    assert_eq!(reconcile(db, &b).await, "reconciled");
}

/// Repaired twice, what a run wrote in the place of another's row is the other's still.
#[tokio::test(flavor = "multi_thread")]
async fn repaired_twice_for_another_run() {
    let pair = tables("", &[("sa", "(1, 'x'), (2, 'y')")]).await;
    let db = &pair.target;
    let a = run(db, "a", "sa").await;
    let b = run(db, "b", "sa").await;
    for _ in 0..2 {
        db.exec("DELETE FROM public.it WHERE id = 1").await;
        assert_eq!(reconcile(db, &b).await, "halted");
        db.exec(&format!("SELECT dedup.repair('{b}')")).await;
    }
    roll_back(db, &b, true).await;
    assert_eq!(rows(db).await, ["(1,x)", "(2,y)"]);
    assert_index(db).await;
    assert_eq!(reconcile(db, &a).await, "reconciled");
}

/// Columns that no run delivers come back with a removed row, also where another run had changed it before and was taken back first.
#[tokio::test(flavor = "multi_thread")]
async fn further_columns_of_a_row_changed_and_removed() {
    let pair = tables("(3, 'z'), (4, 'q')", &[("sa", "(3, 'w')")]).await;
    let db = &pair.target;
    db.exec("ALTER TABLE public.it ADD app text DEFAULT 'none'; UPDATE public.it SET app = 'app' || id")
        .await;
    let narrow = async |name: &str| {
        let run: String = db.one(&format!("SELECT dedup.create_run('{name}')::text")).await;
        let options = r#"{"columns": ["id", "v"]}"#;
        db.exec(&format!("SELECT dedup.add_table('{run}', 'public.sa', 'public.it', content_columns => '{{v}}', options => '{options}'), dedup.plan_chunks('{run}')")).await;
        db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
        run
    };
    let r1 = narrow("r1").await;
    db.exec("UPDATE public.sa SET v = 'q'").await;
    let r2 = narrow("r2").await;
    assert_eq!(rows(db).await, ["(4,q,app4)"]);
    roll_back(db, &r1, true).await;
    roll_back(db, &r2, false).await;
    assert_eq!(rows(db).await, ["(3,z,app3)", "(4,q,app4)"]);
}
