//! Rollback: the target is what it was before, row by row; what others rest on, changed or point at is not lost.

use integration::check::{Table, assert_exact, assert_index};
use integration::cluster::Stop;
use integration::data::{
    Content, LOG_ROWS, LOG_TABLE, NARROW_COLUMNS, NARROW_CONTENT, narrow_rows, narrow_table,
};
use integration::db::Db;
use integration::pair::Pair;
use integration::sidecar::{exit, failpoint};

const RECORDS: Table<'_> = Table {
    source: "public.records",
    target: "public.records",
    content: NARROW_CONTENT,
    columns: NARROW_COLUMNS,
};

/// Every row of a table with all its columns.
async fn rows(db: &Db, table: &str) -> Vec<String> {
    db.column(&format!("SELECT t::text FROM {table} AS t ORDER BY 1")).await
}

/// Run ids, oldest first.
async fn runs(db: &Db) -> Vec<String> {
    db.column("SELECT run_id::text FROM dedup.runs ORDER BY created_at").await
}

async fn status(db: &Db, run: &str) -> String {
    db.one(&format!("SELECT status FROM dedup.runs WHERE run_id = '{run}'")).await
}

/// Nothing of these runs is left in index, ledger or images.
async fn assert_forgotten(db: &Db, run: &str) {
    for query in [
        "SELECT count(*) FROM dedup.targets AS t CROSS JOIN LATERAL dedup.hash_index(t.target) AS h WHERE h.run_id = $1::text::uuid",
        "SELECT count(*) FROM dedup.duplicates WHERE run_id = $1::text::uuid",
        "SELECT count(*) FROM dedup.before_images WHERE run_id = $1::text::uuid",
        "SELECT count(*) FROM dedup.unchanged_rows JOIN dedup.ordinals USING (ordinal) WHERE run_id = $1::text::uuid",
    ] {
        assert_eq!(db.value::<i64>(query, &[&run]).await, 0, "{query}");
    }
}

/// A run of several dozen chunks, a quarter of whose records are duplicates: its manifests have been merged.
async fn migrated() -> Pair {
    let pair = Pair::start().await;
    pair.both(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, 8_000, "n", &Content::RepeatsFar)).await;
    migrate(&pair).await;
    let merged: bool = pair.target.one("SELECT bool_or(level > 0) FROM dedup.segment").await;
    assert!(merged, "no segment was merged: too few chunks");
    pair
}

async fn migrate(pair: &Pair) {
    pair.run(&["public.records"]).chunk_size("15kB").workers(2).exits(exit::DONE).await;
}

/// What a later run finds is as if the run had never been.
async fn assert_taken_back(pair: &Pair, run: &str) {
    let db = &pair.target;
    assert_eq!(rows(db, "public.records").await, Vec::<String>::new());
    assert_eq!(status(db, run).await, "rolled_back");
    assert_forgotten(db, run).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.segment").await, 0);
    let logged = db.column("SELECT DISTINCT kind FROM dedup.events WHERE kind LIKE '%rol%' OR kind = 'run_created' ORDER BY 1").await;
    assert!(
        logged.contains(&"rolled_back".to_owned()) && logged.contains(&"run_created".to_owned()),
        "{logged:?}"
    );
    migrate(pair).await;
    assert_exact(&pair.source, db, &RECORDS).await;
    assert_index(db, &RECORDS).await;
    pair.reconcile().exits(exit::DONE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_taken_back_in_one_transaction() {
    let pair = migrated().await;
    let db = &pair.target;
    let run = runs(db).await.remove(0);
    let (written, seen): (i64, i64) = (
        db.one("SELECT count(*) FROM public.records").await,
        db.one(&format!("SELECT sum(rows_to_delete)::int8 FROM dedup.rollback_preview('{run}')")).await,
    );
    assert_eq!(written, seen, "the preview");
    db.exec(&format!("BEGIN; SELECT * FROM dedup.rollback_run('{run}'); ROLLBACK")).await;
    assert_exact(&pair.source, db, &RECORDS).await;
    assert_eq!(status(db, &run).await, "done");
    let done = db.texts(&format!("SELECT status, deleted_count, restored_count, kept_count, left_alone_count FROM dedup.rollback_run('{run}')")).await;
    let written = written.to_string();
    assert_eq!(
        done,
        [[Some("rolled_back".into()), Some(written), Some("0".into()), Some("0".into()), Some("0".into())]]
    );
    assert_taken_back(&pair, &run).await;
    let (state, message) = db.fails(&format!("SELECT dedup.rollback_run('{run}')")).await;
    assert_eq!(state, "55000", "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_taken_back_in_steps() {
    let pair = migrated().await;
    let run = runs(&pair.target).await.remove(0);
    pair.target.exec(&format!("CALL dedup.rollback_run_in_chunks('{run}')")).await;
    assert_taken_back(&pair, &run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_taken_back_by_the_sidecar() {
    let pair = migrated().await;
    let run = runs(&pair.target).await.remove(0);
    let written: i64 = pair.target.one("SELECT count(*) FROM public.records").await;
    let output = pair.rollback("last").workers(4).exits(exit::DONE).await;
    assert!(output.stdout.contains("rolled_back"), "{}", output.describe());
    assert!(output.stdout.contains(&format!("deleted{written:>25}")), "{}", output.describe());
    assert!(
        output.stderr.contains(&format!("public.records: {written} rows to delete")),
        "{}",
        output.describe()
    );
    assert_taken_back(&pair, &run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_taken_back_unasked() {
    let pair = migrated().await;
    let url = pair.target_cluster.url(integration::pair::DATABASE);
    let output = integration::sidecar::Invocation::new("rollback")
        .args(&["last", "--target", &url])
        .exits(exit::USAGE)
        .await;
    assert!(output.stderr.contains("--yes"), "{}", output.describe());
    assert_exact(&pair.source, &pair.target, &RECORDS).await;
    // Too much for one transaction: the limit is lowered for the test.
    pair.target
        .exec("CREATE OR REPLACE FUNCTION dedup.rollback_limit() RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT 100::bigint'")
        .await;
    let run = runs(&pair.target).await.remove(0);
    let (state, message) = pair.target.fails(&format!("SELECT dedup.rollback_run('{run}')")).await;
    assert!(state == "54000" && message.contains("rollback_run_in_chunks"), "{message}");
}

/// A table that had rows: some equal to what comes, some replaced, some removed because their record carries content that another row has, with a
/// column that nobody delivers.
async fn occupied() -> Pair {
    let pair = Pair::start().await;
    pair.source
        .exec("CREATE TABLE public.items (k text PRIMARY KEY, body text, price float8, at timestamptz)")
        .await;
    pair.target
        .exec(
            "CREATE TABLE public.items (k text PRIMARY KEY, own jsonb DEFAULT '{\"new\": true}', body text, price float8, at timestamptz, \
                 twice float8 GENERATED ALWAYS AS (price * 2) STORED, n int GENERATED ALWAYS AS IDENTITY); \
             INSERT INTO public.items (k, own, body, price, at) SELECT 'k' || n, jsonb_build_object('n', n, 'say', 'it''s \"' || n), 'body ' || n, n / 3.0, now() + n * interval '1 us' \
                 FROM generate_series(1, 900) AS n",
        )
        .await;
    // 1-100 equal content, other price; 101-200 other content; 201-300 content of 1-100; 2001-2400 new, half of them duplicates.
    pair.source
        .exec(
            "INSERT INTO public.items SELECT 'k' || n, 'body ' || n, -n, 'epoch' FROM generate_series(1, 100) AS n; \
             INSERT INTO public.items SELECT 'k' || n, 'other ' || n, n / 7.0, 'epoch' FROM generate_series(101, 200) AS n; \
             INSERT INTO public.items SELECT 'k' || n, 'body ' || n - 200, 'NaN', NULL FROM generate_series(201, 300) AS n; \
             INSERT INTO public.items SELECT 'k' || n, 'new ' || n % 200, n, 'infinity' FROM generate_series(2001, 2400) AS n; ANALYZE public.items",
        )
        .await;
    pair
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_had_rows_is_what_it_was() {
    for way in ["one", "steps", "sidecar"] {
        let pair = occupied().await;
        let db = &pair.target;
        let before = rows(db, "public.items").await;
        pair.run(&["public.items"])
            .args(&["--content-columns", "public.items:body"])
            .chunk_size("2kB")
            .workers(2)
            .exits(exit::DONE)
            .await;
        let images = db
            .column("SELECT action || ' ' || count(*) FROM dedup.before_images GROUP BY action ORDER BY 1")
            .await;
        assert_eq!(images, ["delete 100", "update 200"]);
        assert_ne!(rows(db, "public.items").await, before);
        let run = runs(db).await.remove(0);
        match way {
            "one" => db.exec(&format!("SELECT dedup.rollback_run('{run}')")).await,
            "steps" => db.exec(&format!("CALL dedup.rollback_run_in_chunks('{run}')")).await,
            _ => drop(pair.rollback("last").exits(exit::DONE).await),
        }
        assert_eq!(rows(db, "public.items").await, before, "{way}");
        assert_forgotten(db, &run).await;
        // The index says of every row where it stands.
        let indexed: i64 = db
            .one("SELECT count(*) FROM public.items AS t JOIN dedup.hash_index('public.items') AS h \
                  ON h.content_hash = dedup.content_hash(t.body) AND h.target_location_uri LIKE '%?k=' || t.k WHERE h.run_id IS NULL")
            .await;
        assert_eq!(indexed, 900, "{way}");
        assert_eq!(
            db.one::<i64>("SELECT count(*) FROM dedup.hash_index('public.items')").await,
            900,
            "{way}"
        );
    }
}

async fn notes(rows: &str) -> Pair {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.notes (id int PRIMARY KEY, body text, remark text)").await;
    pair.source
        .exec(&format!("INSERT INTO public.notes {rows}; ANALYZE public.notes; CREATE TABLE public.others (LIKE public.notes INCLUDING ALL)"))
        .await;
    pair
}

/// A run of one source table into `notes`.
async fn run_of(pair: &Pair, source: &str) -> String {
    pair.run(&[&format!("public.{source}=public.notes")])
        .args(&["--content-columns", &format!("public.{source}:body")])
        .chunk_size("1kB")
        .exits(exit::DONE)
        .await;
    runs(&pair.target).await.pop().unwrap_or_default()
}

async fn refused(db: &Db, sql: &str, state: &str, says: &[&str]) {
    let (code, message) = db.fails(sql).await;
    assert_eq!(code, state, "{message}");
    for part in says {
        assert!(message.contains(part), "\"{part}\" is not in: {message}");
    }
}

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

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_somebody_changed_are_left_alone() {
    for forced in [false, true] {
        let pair = notes("SELECT n, CASE WHEN n > 100 THEN 'r ' || n ELSE 'x ' || n END, 'a' FROM generate_series(1, 120) AS n").await;
        let db = &pair.target;
        db.exec(
            "INSERT INTO public.notes SELECT n, 'p ' || n, 'p' FROM generate_series(1, 20) AS n; \
                 INSERT INTO public.notes SELECT n, 'q ' || n, 'q' FROM generate_series(101, 120) AS n; \
                 INSERT INTO public.notes SELECT 100 + n, 'r ' || n, 'r' FROM generate_series(101, 120) AS n",
        )
        .await;
        let before = rows(db, "public.notes").await;
        let run = run_of(&pair, "notes").await;
        // Of rows inserted, replaced and removed some each.
        db.exec(
            "UPDATE public.notes SET remark = 'app' WHERE id IN (5, 50); UPDATE public.notes SET body = 'app' WHERE id = 51; \
             DELETE FROM public.notes WHERE id IN (6, 52)",
        )
        .await;
        let removed: i32 = db.one("SELECT min(n) FROM generate_series(101, 120) AS n WHERE n NOT IN (SELECT id FROM public.notes)").await;
        db.exec(&format!("INSERT INTO public.notes VALUES ({removed}, 'app too', 'app')")).await;
        let sidecar = pair.rollback("last").args(if forced { &["--force"] } else { &[] });
        let told = |db| async move {
            Db::column(db, "SELECT key || ' ' || reason FROM dedup.left_alone ORDER BY reason, key").await
        };
        let gone = "id=52 gone";
        if forced {
            sidecar.exits(exit::LEFT_ASIDE).await;
            assert_eq!(told(db).await, [gone]);
            assert_eq!(rows(db, "public.notes").await, before);
        } else {
            let output = sidecar.exits(exit::LEFT_ASIDE).await;
            assert!(
                output.stdout.contains("left alone: public.notes id=50 is changed"),
                "{}",
                output.describe()
            );
            let occupied = format!("id={removed} occupied");
            assert_eq!(
                told(db).await,
                ["id=5 changed", "id=50 changed", "id=51 changed", gone, "id=6 gone", &occupied]
            );
            let untouched = db
                .column(
                    "SELECT t::text FROM public.notes AS t WHERE remark = 'app' OR body = 'app' ORDER BY id",
                )
                .await;
            assert_eq!(untouched.len(), 4, "{untouched:?}");
            let rest = format!(
                "SELECT t::text FROM public.notes AS t WHERE id NOT IN (5, 6, 50, 51, {removed}) ORDER BY 1"
            );
            assert_eq!(db.column(&rest).await.len(), before.len() - 3);
            // The image of what could not be given back is still there.
            assert_eq!(
                db.column("SELECT dedup.key_text(target_id, key) FROM dedup.before_images ORDER BY 1")
                    .await
                    .len(),
                3
            );
        }
        // Every row that stands has its entry, so that nothing is written twice.
        let entries: i64 = db
            .one(
                "SELECT count(*) FROM public.notes AS t JOIN dedup.hash_index('public.notes') AS h \
             ON h.content_hash = dedup.content_hash(t.body) AND h.target_location_uri LIKE '%?id=' || t.id",
            )
            .await;
        assert_eq!(entries, db.one::<i64>("SELECT count(*) FROM public.notes").await);
        assert_eq!(status(db, &run).await, "rolled_back");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_others_point_at_are_refused_by_name() {
    let pair = Pair::start().await;
    pair.both(
        "CREATE TABLE public.parents (id int PRIMARY KEY, name text, boss int REFERENCES public.parents); \
         CREATE TABLE public.children (id int PRIMARY KEY, parent int NOT NULL REFERENCES public.parents ON DELETE CASCADE)",
    )
    .await;
    pair.source
        .exec(
            "INSERT INTO public.parents SELECT n, 'parent ' || n, CASE WHEN n > 1 THEN n / 2 END FROM generate_series(1, 300) AS n; \
             INSERT INTO public.children SELECT n, n % 300 + 1 FROM generate_series(1, 900) AS n; ANALYZE",
        )
        .await;
    let db = &pair.target;
    for way in ["sidecar", "SELECT dedup.rollback_run", "CALL dedup.rollback_run_in_chunks"] {
        pair.run(&["public.children", "public.parents"]).chunk_size("1kB").exits(exit::DONE).await;
        let run = runs(db).await.pop().unwrap_or_default();
        db.exec("CREATE TABLE public.visits (id int, parent int, FOREIGN KEY (parent) REFERENCES public.parents (id) ON DELETE SET NULL); \
                 INSERT INTO public.visits VALUES (1, 17), (2, NULL), (3, 40)")
            .await;
        db.exec("INSERT INTO public.children VALUES (5000, 20)").await;
        let before = rows(db, "public.parents").await;
        let says = ["visits_parent_fkey", "public.visits", "id=17, id=40", "children_parent_fkey", "id=20"];
        if way == "sidecar" {
            let output = pair.rollback("last").exits(exit::ERROR).await;
            says.iter().for_each(|part| assert!(output.stderr.contains(part), "{}", output.describe()));
        } else {
            refused(db, &format!("{way}('{run}')"), "23503", &says).await;
        }
        assert_eq!(rows(db, "public.parents").await, before);
        assert_eq!(status(db, &run).await, "done");
        db.exec("DROP TABLE public.visits; DELETE FROM public.children WHERE id = 5000").await;
        if way == "sidecar" {
            pair.rollback("last").exits(exit::DONE).await;
        } else {
            db.exec(&format!("{way}('{run}')")).await;
        }
        assert_eq!(
            db.one::<i64>(
                "SELECT (SELECT count(*) FROM public.parents) + (SELECT count(*) FROM public.children)"
            )
            .await,
            0,
            "{way}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_chunk_is_taken_back_and_done_again() {
    let pair = migrated().await;
    let db = &pair.target;
    let run = runs(db).await.remove(0);
    // One whose rows nobody rests on, and one of whose rows somebody does.
    let relied: String = db.one(
        "SELECT h.chunk_id FROM dedup.hash_index('public.records') AS h JOIN dedup.duplicates AS d USING (content_hash) WHERE d.chunk_id <> h.chunk_id ORDER BY 1 LIMIT 1",
    ).await;
    refused(db, &format!("SELECT dedup.rollback_chunk('{run}', '{relied}')"), "55006", &[&run]).await;
    let before: i64 = db.one("SELECT count(*) FROM public.records").await;
    db.exec(&format!("SELECT dedup.rollback_chunk('{run}', '{relied}', true)")).await;
    assert!(db.one::<i64>("SELECT count(*) FROM public.records").await < before);
    assert_eq!(status(db, &run).await, "paused");
    let (state, message) = db.fails(&format!("SELECT dedup.rollback_chunk('{run}', 'nothing')")).await;
    assert_eq!(state, "42704", "{message}");
    let pending = db.column(&format!("SELECT chunk_id FROM dedup.checkpoints WHERE run_id = '{run}' AND status = 'pending' AND source_count IS NULL")).await;
    assert_eq!(pending, [relied]);
    pair.resume().exits(exit::DONE).await;
    assert_exact(&pair.source, db, &RECORDS).await;
    assert_index(db, &RECORDS).await;
    pair.reconcile().exits(exit::DONE).await;
    let (state, message) = db.fails(&format!("SELECT dedup.pause_run('{run}')")).await;
    assert_eq!(state, "55000", "{message}");
    pair.rollback("last").exits(exit::DONE).await;
    assert_eq!(rows(db, "public.records").await, Vec::<String>::new());
}

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

#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_key_is_what_it_was() {
    let pair = Pair::start().await;
    pair.both(LOG_TABLE).await;
    pair.source.exec(LOG_ROWS).await;
    let db = &pair.target;
    db.exec("INSERT INTO public.log SELECT timestamptz '2024-01-01+00', 'line ' || n FROM generate_series(1, 100) AS n; INSERT INTO public.log SELECT NULL, 'own' FROM generate_series(1, 3)").await;
    let before = rows(db, "public.log").await;
    for (n, way) in ["sidecar", "one", "force"].into_iter().enumerate() {
        pair.run(&["public.log"]).chunk_size("30kB").workers(2).exits(exit::DONE).await;
        let run = runs(db).await.pop().unwrap_or_default();
        assert!(rows(db, "public.log").await.len() > before.len());
        if n == 1 {
            db.exec("UPDATE public.log SET line = 'app' WHERE line = 'line 777'").await;
        }
        let told = if n == 1 { exit::LEFT_ASIDE } else { exit::DONE };
        match way {
            "one" => drop(pair.rollback("last").exits(told).await),
            _ => db.exec(&format!("SELECT dedup.rollback_run('{run}')")).await,
        }
        if n == 1 {
            assert_eq!(db.column("SELECT DISTINCT reason FROM dedup.left_alone").await, ["gone"]);
            db.exec("DELETE FROM public.log WHERE line = 'app'").await;
        }
        assert_eq!(rows(db, "public.log").await, before, "{way}");
        assert_forgotten(db, &run).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_and_awkward_names() {
    let pair = Pair::start().await;
    pair.both(
        "CREATE TABLE public.\"Odd \"\"t\" (\"K 1\" numeric, \"k'2\" text, body text, PRIMARY KEY (\"K 1\", \"k'2\")) PARTITION BY RANGE (\"K 1\"); \
         CREATE TABLE public.p1 PARTITION OF public.\"Odd \"\"t\" FOR VALUES FROM (MINVALUE) TO (100); \
         CREATE TABLE public.p2 PARTITION OF public.\"Odd \"\"t\" FOR VALUES FROM (100) TO (MAXVALUE)",
    )
    .await;
    pair.source.exec("INSERT INTO public.\"Odd \"\"t\" SELECT n + 0.50, 'it''s ' || n, 'body ' || n % 150 FROM generate_series(1, 200) AS n; ANALYZE").await;
    let db = &pair.target;
    db.exec("INSERT INTO public.\"Odd \"\"t\" SELECT n + 0.5, 'it''s ' || n, 'other' || n FROM generate_series(95, 105) AS n").await;
    let before = rows(db, "public.\"Odd \"\"t\"").await;
    pair.run(&["public.\"Odd \"\"t\""])
        .args(&["--content-columns", "public.\"Odd \"\"t\":body"])
        .chunk_size("1kB")
        .exits(exit::DONE)
        .await;
    assert_ne!(rows(db, "public.\"Odd \"\"t\"").await, before);
    pair.rollback("last").exits(exit::DONE).await;
    assert_eq!(rows(db, "public.\"Odd \"\"t\"").await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_halted_run_is_taken_back() {
    let pair = migrated().await;
    let db = &pair.target;
    let run = runs(db).await.remove(0);
    db.exec("UPDATE public.records SET label = 'tampered' WHERE id = (SELECT min(id) FROM public.records)")
        .await;
    pair.reconcile().exits(exit::HALTED).await;
    refused(db, &format!("SELECT dedup.rollback_chunk('{run}', '1:000001')"), "55000", &["rollback_run"])
        .await;
    pair.rollback("last").exits(exit::LEFT_ASIDE).await;
    assert_eq!(status(db, &run).await, "rolled_back");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.records").await, 1);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.divergences WHERE state = 'open'").await, 0);
}

/// A trigger that rewrites what comes back is not taken for a restored row.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_restored_is_read_back() {
    let pair = notes("SELECT n, 'x ' || n, 'a' FROM generate_series(1, 50) AS n").await;
    let db = &pair.target;
    db.exec("INSERT INTO public.notes SELECT n, 'p ' || n, 'p' FROM generate_series(1, 10) AS n").await;
    let before = rows(db, "public.notes").await;
    let run = run_of(&pair, "notes").await;
    db.exec(
        "CREATE FUNCTION public.meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.remark := 'meddled'; RETURN NEW; END $$; \
         CREATE TRIGGER meddle BEFORE UPDATE ON public.notes FOR EACH ROW EXECUTE FUNCTION public.meddle()",
    )
    .await;
    refused(db, &format!("SELECT dedup.rollback_run('{run}')"), "23000", &["trigger"]).await;
    db.exec("DROP TRIGGER meddle ON public.notes").await;
    db.exec(&format!("SELECT dedup.rollback_run('{run}')")).await;
    assert_eq!(rows(db, "public.notes").await, before);
}

/// The script that is shipped, as psql runs it: it shows, asks, and does what was answered.
#[tokio::test(flavor = "multi_thread")]
async fn the_script_of_a_dba() {
    const SCRIPT: &str = include_str!("../../../sql/rollback.sql");
    for in_steps in [false, true] {
        let pair = migrated().await;
        let db = &pair.target;
        let run = runs(db).await.remove(0);
        let written: i64 = db.one("SELECT count(*) FROM public.records").await;
        if in_steps {
            db.exec("CREATE OR REPLACE FUNCTION dedup.rollback_limit() RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT 100::bigint'").await;
        }
        let file = pair.target_cluster.write_secret("rollback.sql", SCRIPT).display().to_string();
        let variable = format!("run={run}");
        let arguments = ["-X", "-At", "-F", " ", "-d", "it", "-v", &variable, "-f", &file];
        let output = pair.target_cluster.program_fed("psql", &arguments, "no\n");
        assert!(
            output.contains(&format!("public.records {written} 0 "))
                || output.contains(&format!("records {written} 0 ")),
            "{output}"
        );
        assert!(output.contains("Nothing was changed."), "{output}");
        assert_exact(&pair.source, db, &RECORDS).await;
        db.exec("UPDATE public.records SET label = 'app' WHERE id = (SELECT min(id) FROM public.records)")
            .await;
        let output = pair.target_cluster.program_fed("psql", &arguments, "yes\n");
        assert_eq!(output.contains("one transaction: all of it"), !in_steps, "{output}");
        assert!(output.contains(" changed 1:000001"), "{output}");
        assert_eq!(status(db, &run).await, "rolled_back");
        assert_eq!(db.column("SELECT label FROM public.records").await, ["app"]);
    }
}

/// Every entry of the index has its row, and every row its entry.
async fn assert_index_is_true(db: &Db) {
    assert_entries_have_rows(db).await;
    let rows: i64 = db.one("SELECT count(*) FROM public.notes").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.hash_index('public.notes')").await, rows);
}

/// Nothing is a duplicate of a row that is gone.
async fn assert_entries_have_rows(db: &Db) {
    let differ = db
        .column(
            "(SELECT h.target_location_uri || ' ' || encode(h.content_hash, 'hex') AS place FROM dedup.hash_index('public.notes') AS h) EXCEPT \
             SELECT 'postgres:///it/public.notes?id=' || t.id || ' ' || encode(dedup.content_hash(t.body), 'hex') FROM public.notes AS t",
        )
        .await;
    assert!(differ.is_empty(), "entries without a row: {differ:?}");
}

/// What a run would have put back and didn't stands nowhere: a later record with that content is written.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_to_rows_left_alone() {
    let pair = notes("VALUES (1, 'X1', 'a'), (2, 'X2', 'a'), (3, 'X3', 'a'), (4, 'X3', 'a')").await;
    let db = &pair.target;
    db.exec("INSERT INTO public.notes VALUES (1, 'P1', 'p'), (2, 'P2', 'p'), (3, 'X3', 'p'), (4, 'P4', 'p')")
        .await;
    let run = run_of(&pair, "notes").await;
    db.exec("UPDATE public.notes SET body = 'app' WHERE id = 1; DELETE FROM public.notes WHERE id = 2; INSERT INTO public.notes VALUES (4, 'app4', 'q')").await;
    db.exec(&format!("SELECT dedup.rollback_run('{run}')")).await;
    assert_eq!(
        db.column("SELECT reason FROM dedup.left_alone ORDER BY 1").await,
        ["changed", "gone", "occupied"]
    );
    assert_index_is_true(db).await;
    pair.source
        .exec("INSERT INTO public.others VALUES (11, 'P1', 'c'), (12, 'P2', 'c'), (14, 'P4', 'c')")
        .await;
    run_of(&pair, "others").await;
    let written = db.column("SELECT body FROM public.notes WHERE id > 10 ORDER BY 1").await;
    assert_eq!(written, ["P1", "P2", "P4"]);
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

/// Rows that row security hides would be deleted along with the row they point at.
#[tokio::test(flavor = "multi_thread")]
async fn hidden_references_are_refused() {
    let pair = notes("SELECT n, 'body ' || n, 'a' FROM generate_series(1, 20) AS n").await;
    let db = &pair.target;
    let run = run_of(&pair, "notes").await;
    db.exec(
        "CREATE ROLE dba SUPERUSER; CREATE ROLE plain; GRANT ALL ON SCHEMA dedup, public TO plain; GRANT ALL ON ALL TABLES IN SCHEMA dedup, public TO plain; \
         GRANT ALL ON ALL SEQUENCES IN SCHEMA dedup TO plain; GRANT EXECUTE ON ALL ROUTINES IN SCHEMA dedup TO plain; ALTER TABLE public.notes OWNER TO plain; \
         CREATE TABLE public.visits (note int REFERENCES public.notes ON DELETE CASCADE); INSERT INTO public.visits VALUES (5); GRANT SELECT ON public.visits TO plain; \
         ALTER TABLE public.visits ENABLE ROW LEVEL SECURITY; CREATE POLICY hide ON public.visits USING (false)",
    )
    .await;
    db.exec("SET ROLE plain").await;
    refused(db, &format!("SELECT dedup.rollback_run('{run}')"), "42501", &["public.visits", "row security"])
        .await;
    db.exec("RESET ROLE").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.visits").await, 1);
    refused(db, &format!("SELECT dedup.rollback_run('{run}')"), "23503", &["visits"]).await;
}

/// An index that does not know the rows does not make a rollback that did nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_was_made_anew() {
    let pair = notes("SELECT n, 'body ' || n, 'a' FROM generate_series(1, 20) AS n").await;
    let db = &pair.target;
    db.exec("INSERT INTO public.notes VALUES (1, 'P', 'p'), (300, 'other', 'p')").await;
    let before = rows(db, "public.notes").await;
    let a = run_of(&pair, "notes").await;
    let after_a = rows(db, "public.notes").await;
    pair.source.exec("UPDATE public.notes SET body = 'changed ' || id WHERE id < 10").await;
    let b = run_of(&pair, "notes").await;
    // The history of the rows survives it.
    db.exec("VACUUM FULL public.notes").await;
    db.exec("SELECT dedup.reindex_target('public.notes')").await;
    db.exec(&format!("SELECT dedup.rollback_run('{b}')")).await;
    assert_eq!(rows(db, "public.notes").await, after_a);
    assert_index_is_true(db).await;
    db.exec("SELECT dedup.reindex_target('public.notes')").await;
    db.exec(&format!("BEGIN; SELECT dedup.rollback_run('{a}')")).await;
    assert_eq!(rows(db, "public.notes").await, before);
    assert_index_is_true(db).await;
    db.exec("ROLLBACK; SELECT dedup.forget_target('public.notes')").await;
    refused(db, &format!("SELECT dedup.rollback_run('{a}')"), "55000", &["can no longer be rolled back"])
        .await;
    db.exec("UPDATE dedup.runs SET bake_in_until = NULL; SELECT dedup.index_existing('public.notes')").await;
    refused(db, &format!("SELECT dedup.rollback_run('{a}')"), "55000", &["knows none of the rows"]).await;
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

/// A chunk that finished twice, with a row that somebody changed.
#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_was_done_again() {
    let pair =
        notes("SELECT n, 'x ' || n, CASE WHEN n = 7 THEN NULL ELSE 'a' END FROM generate_series(1, 20) AS n")
            .await;
    let db = &pair.target;
    db.exec("ALTER TABLE public.notes ALTER remark SET NOT NULL; INSERT INTO public.notes SELECT n, 'p ' || n, 'p' FROM generate_series(1, 5) AS n").await;
    let before = rows(db, "public.notes").await;
    pair.run(&["public.notes"])
        .args(&["--content-columns", "public.notes:body"])
        .exits(exit::LEFT_ASIDE)
        .await;
    let run = runs(db).await.remove(0);
    pair.source.exec("UPDATE public.notes SET remark = 'late' WHERE id = 7; UPDATE public.notes SET body = 'y ' || id WHERE id < 4; UPDATE public.notes SET body = 'x ' || id WHERE id = 1").await;
    db.exec(&format!("SELECT dedup.requeue('{run}', 'quarantined')")).await;
    pair.resume().exits(exit::DONE).await;
    db.exec("UPDATE public.notes SET remark = 'app' WHERE id IN (2, 10)").await;
    pair.rollback("last").exits(exit::LEFT_ASIDE).await;
    assert_eq!(db.column("SELECT DISTINCT key FROM dedup.left_alone ORDER BY 1").await, ["id=10", "id=2"]);
    let rest = "SELECT t::text FROM public.notes AS t WHERE id NOT IN (2, 10) ORDER BY 1";
    assert_eq!(
        db.column(rest).await,
        before.iter().filter(|row| !row.starts_with("(2,")).cloned().collect::<Vec<_>>()
    );
    assert_index_is_true(db).await;
}

/// A row left alone by the rollback of a later run is left alone by that of an earlier one, too, and overwritten if one forces it.
#[tokio::test(flavor = "multi_thread")]
async fn rows_left_alone_twice() {
    for (change, app) in [("body = 'y'", "body = 'app'"), ("remark = 'b'", "remark = 'app'")] {
        for force in [false, true] {
            let pair = notes("VALUES (1, 'x', 'a'), (2, 'z', 'a')").await;
            let db = &pair.target;
            let a = run_of(&pair, "notes").await;
            pair.source.exec(&format!("UPDATE public.notes SET {change} WHERE id = 1")).await;
            let b = run_of(&pair, "notes").await;
            db.exec(&format!("UPDATE public.notes SET {app} WHERE id = 1; DELETE FROM dedup.unchanged_rows"))
                .await;
            db.exec(&format!("SELECT dedup.rollback_run('{b}')")).await;
            assert_index_is_true(db).await;
            db.exec(&format!("SELECT dedup.rollback_run('{a}', {force})")).await;
            let left = db.column("SELECT id::text FROM public.notes").await;
            assert_eq!(left, if force { vec![] } else { vec!["1".to_owned()] }, "{change} {force}");
            let told: i64 =
                db.one(&format!("SELECT count(*) FROM dedup.left_alone WHERE run_id = '{a}'")).await;
            assert_eq!(told, i64::from(!force), "{change} {force}");
            assert_index_is_true(db).await;
        }
    }
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

/// Columns that nobody delivers come back with a removed row, whatever has become of the table; beside rows that have none to come back.
#[tokio::test(flavor = "multi_thread")]
async fn further_columns_come_back() {
    let pair = notes("VALUES (1, 'X', 'a'), (2, 'X', 'a'), (3, 'X3', 'a')").await;
    let db = &pair.target;
    db.exec("ALTER TABLE public.notes ADD own char(5) DEFAULT 'new', ADD f float8; INSERT INTO public.notes VALUES (1, 'X', 'a', 'own1', 'NaN'), (2, 'P', 'p', 'own2', 1e-300), (3, 'Q', 'q', 'own3', '-Infinity')").await;
    let before = db.column("SELECT (id, body, remark, own, f)::text FROM public.notes ORDER BY 1").await;
    run_of(&pair, "notes").await;
    db.exec("DELETE FROM public.notes WHERE id = 3; ALTER TABLE public.notes ADD more int DEFAULT 7").await;
    pair.rollback("last").arg("--force").exits(exit::DONE).await;
    let after = db.column("SELECT (id, body, remark, own, f)::text FROM public.notes ORDER BY 1").await;
    assert_eq!(after[..2], before[..2]);
    assert_eq!(db.column("SELECT DISTINCT more::text FROM public.notes").await, ["7"]);
}

/// Foreign keys at rows that are kept, between partitions, and from rows that will be left alone.
#[tokio::test(flavor = "multi_thread")]
async fn references_are_looked_at_as_they_will_be() {
    let pair = Pair::start().await;
    pair.both(
        "CREATE TABLE public.parents (id int PRIMARY KEY, name text); \
         CREATE TABLE public.children (id int, parent int NOT NULL, note text, PRIMARY KEY (id)) PARTITION BY RANGE (id); \
         CREATE TABLE public.c1 PARTITION OF public.children FOR VALUES FROM (MINVALUE) TO (100); CREATE TABLE public.c2 PARTITION OF public.children FOR VALUES FROM (100) TO (MAXVALUE); \
         ALTER TABLE public.c1 ADD FOREIGN KEY (parent) REFERENCES public.parents; ALTER TABLE public.c2 ADD FOREIGN KEY (parent) REFERENCES public.parents",
    )
    .await;
    pair.source.exec("INSERT INTO public.parents SELECT n, 'p ' || n FROM generate_series(1, 20) AS n; INSERT INTO public.children SELECT n, n, 'a' FROM generate_series(1, 10) AS n").await;
    let run = pair
        .run(&["public.parents", "public.children"])
        .args(&["--content-columns", "public.children:id,parent"]);
    run.exits(exit::DONE).await;
    let db = &pair.target;
    let a = runs(db).await.remove(0);
    db.exec(&format!("BEGIN; SELECT dedup.rollback_run('{a}'); ROLLBACK")).await;
    db.exec("UPDATE public.children SET note = 'app' WHERE id = 3").await;
    refused(db, &format!("CALL dedup.rollback_run_in_chunks('{a}')"), "23503", &["id=3"]).await;
    assert_eq!(status(db, &a).await, "done");
    db.exec("UPDATE public.children SET note = 'a' WHERE id = 3").await;
    // A second run rests on the parents; its children point at them.
    pair.source.exec("DELETE FROM public.children; INSERT INTO public.children SELECT n, n - 190, 'b' FROM generate_series(191, 200) AS n").await;
    run.exits(exit::DONE).await;
    pair.rollback(&a).arg("--force").exits(exit::DONE).await;
    assert_eq!(
        db.texts("SELECT (SELECT count(*) FROM public.parents), (SELECT count(*) FROM public.children)")
            .await,
        [[Some("20".to_owned()), Some("10".to_owned())]]
    );
    pair.rollback("last").exits(exit::DONE).await;
    assert_eq!(
        db.texts("SELECT (SELECT count(*) FROM public.parents), (SELECT count(*) FROM public.children)")
            .await,
        [[Some("0".to_owned()), Some("0".to_owned())]]
    );
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

/// The sidecar takes one chunk back whole, or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn one_chunk_by_the_sidecar() {
    let pair = migrated().await;
    let db = &pair.target;
    let run = runs(db).await.remove(0);
    let chunk: String = db.one("SELECT chunk_id FROM dedup.hash_index('public.records') AS h GROUP BY chunk_id HAVING NOT EXISTS \
         (SELECT FROM dedup.hash_index('public.records') AS i JOIN dedup.duplicates AS d USING (content_hash) WHERE i.chunk_id = h.chunk_id AND d.chunk_id <> h.chunk_id) LIMIT 1").await;
    db.exec("CREATE FUNCTION public.no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER no BEFORE DELETE ON public.records FOR EACH ROW EXECUTE FUNCTION public.no()").await;
    pair.rollback("last").arg("--chunk").arg(&chunk).exits(exit::ERROR).await;
    db.exec("DROP TRIGGER no ON public.records").await;
    assert_eq!(status(db, &run).await, "done");
    let output = pair.rollback("last").arg("--chunk").arg(&chunk).exits(exit::DONE).await;
    assert!(output.stdout.contains("paused"), "{}", output.describe());
    assert_eq!(db.column("SELECT chunk_id FROM dedup.checkpoints WHERE status = 'pending'").await, [chunk]);
    pair.resume().exits(exit::DONE).await;
    assert_exact(&pair.source, db, &RECORDS).await;
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
