//! Migrations in SQL alone, from whatever the target database can see.

use integration::check::{Books, Table, assert_books, assert_exact, assert_first_run, assert_index};
use integration::data::{Content, NARROW_COLUMNS, NARROW_CONTENT, narrow_rows, narrow_table};
use integration::db::Db;
use integration::pair::{DATABASE, Pair};

const RECORDS: Table<'_> = Table {
    source: "public.records",
    target: "public.records",
    content: NARROW_CONTENT,
    columns: NARROW_COLUMNS,
};

/// Plans a run of one table with many chunks; returns its id.
async fn plan(target: &Db, source: &str, into: &str) -> String {
    let run: String = target.one("SELECT dedup.create_run('in SQL')::text").await;
    target
        .exec(&format!(
            "SELECT dedup.add_table('{run}', '{source}', '{into}', content_columns => ARRAY['{}'])",
            NARROW_CONTENT.join("', '")
        ))
        .await;
    let chunks: i32 = target.one(&format!("SELECT dedup.plan_chunks('{run}', 200000)")).await;
    assert!(chunks >= 4, "{chunks} chunks");
    run
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_table() {
    let pair = Pair::start().await;
    pair.target.exec(&narrow_table("public.raw")).await;
    pair.target.exec(&narrow_table("public.records")).await;
    pair.target.exec(&narrow_rows("public.raw", 1, 12_000, "n", &Content::RepeatsFar)).await;
    let run = plan(&pair.target, "public.raw", "public.records").await;
    pair.target.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let table = Table { source: "public.raw", ..RECORDS };
    assert_first_run(&pair.target, &pair.target, &table).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn through_postgres_fdw() {
    let pair = Pair::start().await;
    pair.both(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, 12_000, "n", &Content::RepeatsFar)).await;
    pair.target
        .exec(&format!(
            "CREATE EXTENSION postgres_fdw; \
             CREATE SERVER source FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{}', port '{}', dbname '{DATABASE}'); \
             CREATE USER MAPPING FOR postgres SERVER source OPTIONS (user 'postgres'); \
             CREATE SCHEMA far; IMPORT FOREIGN SCHEMA public FROM SERVER source INTO far",
            pair.source_cluster.dir().display(),
            pair.source_cluster.port()
        ))
        .await;
    let run = plan(&pair.target, "far.records", "public.records").await;
    pair.target.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn through_file_fdw() {
    let pair = Pair::start().await;
    pair.source.exec(&narrow_table("public.records")).await;
    pair.target.exec(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, 6_000, "n", &Content::RepeatsFar)).await;
    let file = pair.target_cluster.dir().join("records.csv");
    // Both servers run as one user, so one can write what the other reads.
    pair.source.exec(&format!("COPY public.records TO '{}' (FORMAT csv)", file.display())).await;
    pair.target
        .exec(&format!(
            "CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw; \
             CREATE FOREIGN TABLE public.file (id bigint, label text, amount numeric(12,2), happened_at timestamptz, \
                flags int[], body bytea) SERVER files OPTIONS (filename '{}', format 'csv')",
            file.display()
        ))
        .await;
    let run = plan(&pair.target, "public.file", "public.records").await;
    pair.target.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_exact(&pair.source, &pair.target, &RECORDS).await;
    assert_index(&pair.target, &RECORDS).await;
}

/// Chunk by chunk in sessions of their own, at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_in_two_sessions() {
    let pair = Pair::start().await;
    pair.target.exec(&narrow_table("public.raw")).await;
    pair.target.exec(&narrow_table("public.records")).await;
    pair.target.exec(&narrow_rows("public.raw", 1, 12_000, "n", &Content::TenContents)).await;
    let run = plan(&pair.target, "public.raw", "public.records").await;
    let chunks = pair.target.column("SELECT chunk_id FROM dedup.checkpoints ORDER BY chunk_no").await;
    let mut tasks = Vec::new();
    for half in 0..2 {
        let session = pair.target_again().await;
        let run = run.clone();
        let mine: Vec<String> = chunks.iter().skip(half).step_by(2).cloned().collect();
        tasks.push(tokio::spawn(async move {
            for chunk in mine {
                session.exec(&format!("SELECT * FROM dedup.migrate_chunk('{run}', '{chunk}')")).await;
            }
        }));
    }
    for task in tasks {
        task.await.expect("a session's task");
    }
    let table = Table { source: "public.raw", ..RECORDS };
    assert_exact(&pair.target, &pair.target, &table).await;
    assert_index(&pair.target, &table).await;
    let open: i64 =
        pair.target.one("SELECT count(*) FROM dedup.checkpoints WHERE status <> 'verified'").await;
    assert_eq!(open, 0);
}

/// A chunk that fails inside an exception block leaves no claim, no row and no entry behind; done again in the same
/// transaction it is whole.
#[tokio::test(flavor = "multi_thread")]
async fn inside_an_exception_block() {
    let pair = Pair::start().await;
    pair.target.exec(&narrow_table("public.raw")).await;
    pair.target.exec(&narrow_table("public.records")).await;
    pair.target.exec(&narrow_rows("public.raw", 1, 6_000, "n", &Content::RepeatsNeighbour)).await;
    let run = plan(&pair.target, "public.raw", "public.records").await;
    pair.target
        .exec(&format!(
            "DO $$ DECLARE chunk text; BEGIN \
               FOR chunk IN SELECT chunk_id FROM dedup.checkpoints ORDER BY chunk_no LOOP \
                 BEGIN \
                   PERFORM dedup.migrate_chunk('{run}', chunk); \
                   RAISE EXCEPTION 'undo'; \
                 EXCEPTION WHEN raise_exception THEN NULL; END; \
                 IF EXISTS (SELECT FROM dedup.checkpoints WHERE chunk_id = chunk AND status = 'verified') THEN \
                   RAISE 'the chunk is still verified'; \
                 END IF; \
                 PERFORM dedup.migrate_chunk('{run}', chunk); \
               END LOOP; \
             END $$"
        ))
        .await;
    let table = Table { source: "public.raw", ..RECORDS };
    assert_exact(&pair.target, &pair.target, &table).await;
    assert_index(&pair.target, &table).await;
}

/// The whole run in one transaction that is rolled back: as if it had never been.
#[tokio::test(flavor = "multi_thread")]
async fn rolled_back_as_a_whole() {
    let pair = Pair::start().await;
    pair.target.exec(&narrow_table("public.raw")).await;
    pair.target.exec(&narrow_table("public.records")).await;
    pair.target.exec(&narrow_rows("public.raw", 1, 6_000, "n", &Content::RepeatsFar)).await;
    let run = plan(&pair.target, "public.raw", "public.records").await;
    pair.target
        .exec(&format!(
            "BEGIN; SELECT dedup.migrate_chunk('{run}', chunk_id) FROM dedup.checkpoints ORDER BY chunk_no; ROLLBACK"
        ))
        .await;
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM public.records").await, 0);
    pair.target.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let table = Table { source: "public.raw", ..RECORDS };
    assert_first_run(&pair.target, &pair.target, &table).await;
    assert_books(
        &pair.target,
        Books { source: 6_000, inserted: 4_500, duplicate: 1_500, ..Books::default() },
    )
    .await;
}

/// What the target refuses of a second run: new rows, changed ones, and rows that had to go.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_in_a_second_run() {
    let pair = Pair::start().await;
    pair.target
        .exec(
            "CREATE TABLE public.raw (id int PRIMARY KEY, body text); CREATE TABLE public.notes (id int PRIMARY KEY, body text); \
             INSERT INTO public.raw SELECT n, 'body ' || n FROM generate_series(1, 900) AS n",
        )
        .await;
    let migrate = async |books: Books| {
        let run: String = pair.target.one("SELECT dedup.create_run('in SQL')::text").await;
        pair.target
            .exec(&format!(
                "SELECT dedup.add_table('{run}', 'public.raw', 'public.notes', content_columns => ARRAY['body']); \
                 SELECT dedup.plan_chunks('{run}')"
            ))
            .await;
        pair.target.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
        assert_books(&pair.target, books).await;
    };
    migrate(Books { source: 900, inserted: 900, ..Books::default() }).await;
    pair.target
        .exec(
            "ALTER TABLE public.notes ADD CHECK (body NOT LIKE 'poison%'); \
             CREATE TABLE public.readers (note int REFERENCES public.notes); INSERT INTO public.readers VALUES (5); \
             CREATE TABLE public.marks (note int REFERENCES public.notes ON DELETE CASCADE); INSERT INTO public.marks VALUES (6); \
             UPDATE public.raw SET body = 'poison ' || id WHERE id BETWEEN 101 AND 120; \
             UPDATE public.raw SET body = 'revised ' || id WHERE id BETWEEN 121 AND 300; \
             UPDATE public.raw SET body = 'body 900' WHERE id IN (5, 6, 7); \
             INSERT INTO public.raw SELECT n, CASE WHEN n % 10 = 0 THEN 'poison ' ELSE 'body ' END || n FROM generate_series(901, 1000) AS n",
        )
        .await;
    migrate(Books {
        source: 1_000,
        inserted: 90,
        updated: 180,
        unchanged: 697,
        duplicate: 1,
        quarantined: 32,
    })
    .await;
    let table =
        Table { source: "public.raw", target: "public.notes", content: &["body"], columns: &["id", "body"] };
    assert_index(&pair.target, &table).await;
    let images = pair
        .target
        .column("SELECT action || count(*) FROM dedup.before_images GROUP BY action ORDER BY 1")
        .await;
    assert_eq!(images, ["delete1", "update180"]);
}

/// Every row but the last points at the next one, many of them into the next chunk: foreign keys are satisfied in the end.
#[tokio::test(flavor = "multi_thread")]
async fn rows_may_point_into_later_chunks() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE raw (id int PRIMARY KEY, next int); INSERT INTO raw SELECT n, n + 1 FROM generate_series(1, 200) AS n; \
         UPDATE raw SET next = NULL WHERE id = 200; CREATE TABLE dst (id int PRIMARY KEY, next int REFERENCES dst)",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('chain')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.raw', 'dst'), dedup.plan_chunks('{run}', 1200)"
    ))
    .await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let state = format!(
        "SELECT status, chunks > 3, inserted_count, quarantined_count FROM dedup.progress WHERE run_id = '{run}'"
    );
    assert_eq!(db.texts(&state).await, [["done", "t", "200", "0"].map(|text| Some(text.to_owned()))]);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dst").await, 200);

    // One that points nowhere is set aside, and whatever points at it.
    db.exec("TRUNCATE dst; SELECT dedup.reindex_target('dst'); UPDATE raw SET next = 999 WHERE id = 150")
        .await;
    let run: String = db.one("SELECT dedup.create_run('broken chain')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.raw', 'dst'), dedup.plan_chunks('{run}', 1200)"
    ))
    .await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let state = format!(
        "SELECT status, inserted_count, quarantined_count FROM dedup.progress WHERE run_id = '{run}'"
    );
    assert_eq!(db.texts(&state).await, [["done", "50", "150"].map(|text| Some(text.to_owned()))]);
    let other: i64 = db.one("SELECT count(*) FROM dedup.quarantine WHERE sqlstate <> '23503' OR substr(source_key, 4)::int > 150").await;
    assert_eq!(other, 0);
}

/// The orphan pass opens chunks again, and one CALL does them; a run that is done stays as it is however often it is called.
#[tokio::test(flavor = "multi_thread")]
async fn one_call_is_enough_and_more_do_nothing() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE raw (id int PRIMARY KEY, body text, boss int); CREATE TABLE dst (LIKE raw INCLUDING ALL, FOREIGN KEY (boss) REFERENCES dst); \
         INSERT INTO raw VALUES (5, 'x', NULL), (9, 'x', NULL), (1, 'one', NULL), (2, 'two', 999)",
    )
    .await;
    let plan = async |name: &str| {
        let run: String = db.one(&format!("SELECT dedup.create_run('{name}')::text")).await;
        db.exec(&format!(
            "SELECT dedup.add_table('{run}', 'public.raw', 'dst', content_columns => '{{body}}'), dedup.plan_chunks('{run}', 60)"
        ))
        .await;
        run
    };
    let first = plan("first").await;
    db.exec(&format!("CALL dedup.migrate_run('{first}')")).await;
    let books = "SELECT run_id, chunk_id, status, ordinal, verified_at, attempts FROM dedup.checkpoints ORDER BY 1, 2";
    let before = db.texts(books).await;
    db.exec(&format!("CALL dedup.migrate_run('{first}')")).await;
    assert_eq!(db.texts(books).await, before, "a run that was done was done again");

    // 9 was dropped for 5, which now changes: the later chunk comes first and finds 5 as it was.
    db.exec("UPDATE raw SET body = 'y' WHERE id = 5").await;
    let second = plan("second").await;
    let chunks = db
        .column(&format!(
            "SELECT chunk_id FROM dedup.checkpoints WHERE run_id = '{second}' ORDER BY chunk_no DESC"
        ))
        .await;
    assert!(chunks.len() > 1);
    for chunk in chunks {
        db.exec(&format!("SELECT dedup.migrate_chunk('{second}', '{chunk}')")).await;
    }
    db.exec(&format!("CALL dedup.migrate_run('{second}')")).await;
    assert_eq!(db.column("SELECT id || body FROM dst ORDER BY id").await, ["1one", "5y", "9x"]);
    // The second run wrote what the first one had dropped: that is not to be done again.
    assert_eq!(db.column("SELECT status FROM dedup.runs ORDER BY created_at").await, ["done", "done"]);
}
