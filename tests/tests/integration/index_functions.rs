//! The hash index as a DBA asks it: where a content stands, who wrote it, how large the index is.

use integration::db::Db;
use integration::pair::Pair;

/// `public.t` (id, body) filled by two local runs of `public.s`; returns their ids.
async fn two_runs(db: &Db) -> [String; 2] {
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); INSERT INTO t VALUES (100, 'old'); \
         INSERT INTO s VALUES (1, 'a'), (2, 'b'), (3, 'a'), (4, 'old')",
    )
    .await;
    let first = run(db, "first").await;
    db.exec("UPDATE s SET body = 'c' WHERE id = 2; INSERT INTO s VALUES (5, 'd')").await;
    let second = run(db, "second").await;
    [first, second]
}

async fn run(db: &Db, name: &str) -> String {
    let run: String = db.one(&format!("SELECT dedup.create_run('{name}')::text")).await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.s', 't', content_columns => '{{body}}'), dedup.plan_chunks('{run}')"
    ))
    .await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(
        db.one::<String>(&format!("SELECT status FROM dedup.runs WHERE run_id = '{run}'")).await,
        "done"
    );
    run
}

fn some(values: &[&str]) -> Vec<Option<String>> {
    values.iter().map(|value| (!value.is_empty()).then(|| (*value).to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn contents_are_located_and_traced() {
    let pair = Pair::start().await;
    let db = &pair.target;
    let [first, second] = two_runs(db).await;
    let locate = |body: &str| format!("SELECT dedup.locate('t', dedup.content_hash('{body}'::text))");
    assert_eq!(db.one::<Option<String>>(&locate("a")).await.as_deref(), Some("postgres:///it/public.t?id=1"));
    assert_eq!(db.one::<Option<String>>(&locate("c")).await.as_deref(), Some("postgres:///it/public.t?id=2"));
    // Overwritten by the second run, and never there.
    assert_eq!(db.one::<Option<String>>(&locate("b")).await, None);
    assert_eq!(db.one::<Option<String>>(&locate("x")).await, None);

    let provenance = |body: &str| {
        format!("SELECT run_id, chunk_id FROM dedup.provenance('t', dedup.content_hash('{body}'::text))")
    };
    assert_eq!(db.texts(&provenance("a")).await, [some(&[&first, "1:000001"])]);
    assert_eq!(db.texts(&provenance("c")).await, [some(&[&second, "1:000001"])]);
    assert_eq!(db.texts(&provenance("old")).await, [some(&["", ""])]);
    assert!(db.texts(&provenance("b")).await.is_empty());

    let listed = db
        .texts(
            "SELECT h.run_id, h.chunk_id, h.target_location_uri FROM dedup.hash_index('t') AS h \
             JOIN t ON dedup.content_hash(t.body) = h.content_hash ORDER BY t.id",
        )
        .await;
    assert_eq!(
        listed,
        [
            some(&[&first, "1:000001", "postgres:///it/public.t?id=1"]),
            some(&[&second, "1:000001", "postgres:///it/public.t?id=2"]),
            some(&[&second, "1:000001", "postgres:///it/public.t?id=5"]),
            some(&["", "", "postgres:///it/public.t?id=100"]),
        ]
    );
    let sorted: bool = db
        .one("SELECT array_agg(content_hash) = array_agg(content_hash ORDER BY content_hash) FROM dedup.hash_index('t')")
        .await;
    assert!(sorted);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.hash_index('t')").await, 4);

    for function in ["locate('t', '\\x00')", "provenance('t', '\\x00')", "maybe_seen('t', '\\x00')"] {
        let (state, message) = db.fails(&format!("SELECT dedup.{function}")).await;
        assert_eq!(state, "22023", "{message}");
    }
    for function in ["locate('s', sha256(''))", "maybe_seen('s', sha256(''))", "hash_index('s')"] {
        let (state, message) = db.fails(&format!("SELECT dedup.{function}")).await;
        assert_eq!(state, "42704", "{message}");
        assert!(message.contains("no hash index"), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_filter_never_says_no_to_what_is_there() {
    let pair = Pair::start().await;
    let db = &pair.target;
    two_runs(db).await;
    db.exec("SELECT dedup.warm_filter()").await;
    let missed: i64 =
        db.one("SELECT count(*) FROM t WHERE NOT dedup.maybe_seen('t', dedup.content_hash(body))").await;
    assert_eq!(missed, 0);
    let seen: i64 = db
        .one("SELECT count(*) FROM generate_series(1, 1000) AS n WHERE dedup.maybe_seen('t', dedup.content_hash('none ' || n))")
        .await;
    assert!(seen < 50, "{seen} of 1000 that are not there may have been seen");
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_the_index_takes_select_on_the_target() {
    let pair = Pair::start().await;
    let db = &pair.target;
    two_runs(db).await;
    db.exec(
        "CREATE ROLE reader; GRANT USAGE ON SCHEMA dedup TO reader; GRANT EXECUTE ON ALL ROUTINES IN SCHEMA dedup TO reader; \
         GRANT SELECT ON ALL TABLES IN SCHEMA dedup TO reader; SET ROLE reader",
    )
    .await;
    for call in [
        "locate('t', sha256(''))",
        "maybe_seen('t', sha256(''))",
        "provenance('t', sha256(''))",
        "hash_index('t')",
    ] {
        let (state, message) = db.fails(&format!("SELECT dedup.{call}")).await;
        assert_eq!(state, "42501", "{call}: {message}");
    }
    db.exec("RESET ROLE; GRANT SELECT ON t TO reader; SET ROLE reader").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.hash_index('t')").await, 4);
}

/// Many small segments become few, and nothing else changes.
#[tokio::test(flavor = "multi_thread")]
async fn compaction_keeps_every_entry() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); \
         INSERT INTO s SELECT n, 'body ' || n FROM generate_series(1, 2000) AS n",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('many')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.s', 't', content_columns => '{{body}}'), dedup.plan_chunks('{run}', 1000)"
    ))
    .await;
    for chunk in db.column(&format!("SELECT chunk_id FROM dedup.checkpoints WHERE run_id = '{run}'")).await {
        db.exec(&format!("SELECT dedup.migrate_chunk('{run}', '{chunk}')")).await;
    }
    let all = "SELECT md5(string_agg(h::text, ',' ORDER BY h::text)) FROM dedup.hash_index('t') AS h";
    let before: String = db.one(all).await;
    let stats = "SELECT sum(segments)::int8, sum(entries)::int8 FROM dedup.index_stats() WHERE target = 't'::regclass";
    let segments: i64 = db.one("SELECT sum(segments)::int8 FROM dedup.index_stats()").await;
    assert!(segments > 64, "{segments} segments");
    db.exec("CALL dedup.compact()").await;
    assert_eq!(db.one::<String>(all).await, before);
    let after = db.texts(stats).await;
    let fewer: i64 = after[0][0].as_ref().unwrap().parse().unwrap();
    assert!(fewer < segments / 4, "{fewer} of {segments} segments are left");
    assert_eq!(after[0][1].as_deref(), Some("2000"));
    let bytes: f64 = db.one("SELECT min(bytes_per_key) FROM dedup.index_stats() WHERE level > 0").await;
    assert!(bytes > 30.0 && bytes < 100.0, "{bytes} bytes a key");
}

/// The checksum adds as numbers do, whatever the order, and repeats count.
#[tokio::test(flavor = "multi_thread")]
async fn checksums_add() {
    let pair = Pair::start().await;
    let db = &pair.target;
    let sum = |values: &str| format!("SELECT dedup.checksum(v) FROM (VALUES {values}) AS x(v)");
    let one = format!("('\\x{}01'::bytea)", "00".repeat(31));
    let most = format!("('\\x{}'::bytea)", "ff".repeat(32));
    assert_eq!(db.one::<String>(&sum(&one)).await, format!("{:064x}", 1));
    assert_eq!(db.one::<String>(&sum(&format!("{one}, {one}, {one}"))).await, format!("{:064x}", 3));
    assert_eq!(db.one::<String>(&sum(&format!("{most}, {one}, {one}"))).await, format!("{:064x}", 1));
    assert_eq!(db.one::<String>(&sum(&format!("{one}, {most}, {one}"))).await, format!("{:064x}", 1));
    let parallel: bool = db
        .one("SELECT dedup.checksum(sha256(n::text::bytea)) = dedup.checksum(sha256((1001 - n)::text::bytea)) FROM generate_series(1, 1000) AS n")
        .await;
    assert!(parallel);
    let (state, message) = db.fails("SELECT dedup.checksum('\\x01')").await;
    assert_eq!(state, "22023", "{message}");
}
