//! Rollback: the target is what it was before, row by row; what others rest on, changed or point at is not lost.

use integration::check::{Table, assert_exact, assert_index};
use integration::data::{
    Content, LOG_ROWS, LOG_TABLE, NARROW_COLUMNS, NARROW_CONTENT, narrow_rows, narrow_table,
};
use integration::db::Db;
use integration::pair::Pair;
use integration::sidecar::exit;

mod between;
mod in_the_way;
mod meanwhile;
mod other_runs;
mod repaired;
mod same_keys;

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

/// The script that is shipped, as psql runs it: it shows, asks, and does what was answered.
#[tokio::test(flavor = "multi_thread")]
async fn the_script_of_a_dba() {
    const SCRIPT: &str = include_str!("../../../../sql/rollback.sql");
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
