//! Ways in which a record could get lost, or a chunk never end: each of these failed before it was mended.

use integration::db::Db;
use integration::pair::Pair;
use integration::sidecar::{exit, failpoint};

/// A local run of some sources into one target; returns its id.
async fn plan(db: &Db, sources: &[&str], target: &str) -> String {
    let run: String = db.one("SELECT dedup.create_run('lost')::text").await;
    for source in sources {
        db.exec(&format!("SELECT dedup.add_table('{run}', 'public.{source}', 'public.{target}')")).await;
    }
    db.exec(&format!("SELECT dedup.plan_chunks('{run}')")).await;
    run
}

const WORKER: &str = "00000000-0000-0000-0000-000000000001";

/// A run whose one table, `public.s` into `t`, workers read; [`WORKER`] may lease its chunks. Returns its id.
async fn remote_run(db: &Db, spec: &str, chunks: &str) -> String {
    let run: String = db.one("SELECT dedup.create_run('remote')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.s', 't', options => '{{\"source\": {{}}}}'), dedup.set_source_spec('{run}', 1, '{spec}'), \
                dedup.add_chunks('{run}', 1, '{chunks}'), dedup.heartbeat('{WORKER}', '{run}')"
    ))
    .await;
    run
}

async fn status(db: &Db, run: &str) -> String {
    db.one(&format!("SELECT status FROM dedup.runs WHERE run_id = '{run}'")).await
}

/// Entries of two kinds in one index would describe rows that the other kind overwrites.
#[tokio::test(flavor = "multi_thread")]
async fn sources_of_one_target_need_one_index() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE a (id int PRIMARY KEY, x text); CREATE TABLE b (LIKE a INCLUDING ALL); CREATE TABLE t (LIKE a INCLUDING ALL)",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('two')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.a', 't', NULL, '{{x}}')")).await;
    let (state, message) = db.fails(&format!("SELECT dedup.add_table('{run}', 'public.b', 't')")).await;
    assert_eq!(state, "55000", "{message}");
    assert!(message.contains("content columns"), "{message}");
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.b', 't', NULL, '{{x}}')")).await;
}

/// A finished run whose index was made anew for other columns is not done again into it.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_does_not_go_on_into_another_index() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE a (id int PRIMARY KEY, x text); INSERT INTO a VALUES (1, 'ok'), (2, 'bad'); \
         CREATE TABLE t (id int PRIMARY KEY, x text CHECK (x <> 'bad'))",
    )
    .await;
    let run = plan(db, &["a"], "t").await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    db.exec("SELECT dedup.forget_target('t')").await;
    let other: String = db.one("SELECT dedup.create_run('other')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{other}', 'public.a', 't', NULL, '{{x}}')")).await;
    db.exec(&format!("SELECT dedup.plan_chunks('{other}'); SELECT dedup.cancel_run('{other}')")).await;
    db.exec(&format!("SELECT dedup.requeue('{run}', 'quarantined')")).await;
    let (state, message) = db.fails(&format!("SELECT dedup.migrate_chunk('{run}', '1:000001')")).await;
    assert_eq!(state, "55000", "{message}");
    assert!(message.contains("other columns"), "{message}");
}

/// Within a pass the first record of a key wins, also where it stood in the target already.
#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_record_is_not_overwritten_by_the_next_source() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s1 (id int PRIMARY KEY, body text); CREATE TABLE s2 (LIKE s1 INCLUDING ALL); CREATE TABLE t (LIKE s1 INCLUDING ALL); \
         INSERT INTO t VALUES (1, 'a'); INSERT INTO s1 VALUES (1, 'a'); INSERT INTO s2 VALUES (1, 'b')",
    )
    .await;
    let run = plan(db, &["s1", "s2"], "t").await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(db.column("SELECT body FROM t").await, ["a"]);
    assert_eq!(db.column("SELECT reason FROM dedup.quarantine").await, ["key_collision"]);
    // The source of the first record may still change it.
    db.exec("UPDATE s1 SET body = 'c'; DELETE FROM s2").await;
    let run = plan(db, &["s1", "s2"], "t").await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(db.column("SELECT body FROM t").await, ["c"]);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.pass_keys").await, 0);
}

/// Every lease names the snapshot that its positions belong to: a worker that was there before the table started over reads under the new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_names_its_snapshot() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec("CREATE TABLE t (body text)").await;
    let run = remote_run(
        db,
        r#"{"key_types": [], "snapshot": "first"}"#,
        r#"[{"kind": "ctid"}, {"kind": "ctid"}]"#,
    )
    .await;
    let lease = format!("SELECT snapshot FROM dedup.lease_chunk('{run}', '{WORKER}')");
    assert_eq!(db.one::<String>(&lease).await, "first");
    db.exec(&format!(
        "SELECT dedup.set_source_spec('{run}', 1, '{{\"key_types\": [], \"snapshot\": \"second\"}}'), dedup.restart_table('{run}', 1)"
    ))
    .await;
    assert_eq!(db.one::<String>(&lease).await, "second");
}

/// Chunks of a local run are read one transaction after the other: rows without a key that move in between would be missed.
#[tokio::test(flavor = "multi_thread")]
async fn a_local_table_without_a_key_is_one_chunk() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec("CREATE TABLE s AS SELECT n, repeat('x', 500) AS body FROM generate_series(1, 2000) AS n; CREATE TABLE t (LIKE s)")
        .await;
    let run: String = db.one("SELECT dedup.create_run('keyless')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.s', 't')")).await;
    assert_eq!(db.one::<i32>(&format!("SELECT dedup.plan_chunks('{run}', 10000)")).await, 1);
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM t").await, 2000);
}

/// A record twice in a chunk, and a third one with its key: done again, the first is counted once.
#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_with_a_repeated_record_can_be_done_again() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int NOT NULL, body text); INSERT INTO s VALUES (1, 'a'), (1, 'a'), (1, 'b'); \
         CREATE TABLE t (id int PRIMARY KEY, body text)",
    )
    .await;
    let run = plan(db, &["s"], "t").await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let books = "SELECT concat_ws(' ', status, inserted_count, duplicate_count, quarantined_count) FROM dedup.checkpoints";
    let before: String = db.one(books).await;
    assert_eq!(before, "verified 1 1 1");
    db.exec(&format!("SELECT dedup.requeue('{run}', 'quarantined')")).await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(db.one::<String>(books).await, before);
}

/// The key stands as 1.0 and comes as 1.00, and the target refuses the new row: that record alone is set aside.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_update_of_a_key_that_is_spelled_otherwise() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id numeric PRIMARY KEY, body text); INSERT INTO s VALUES (1.00, 'bad'), (2, 'x'); \
         CREATE TABLE t (id numeric PRIMARY KEY, body text CHECK (body <> 'bad')); INSERT INTO t VALUES (1.0, 'old')",
    )
    .await;
    let run = plan(db, &["s"], "t").await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(status(db, &run).await, "done");
    assert_eq!(db.column("SELECT body FROM t ORDER BY id").await, ["old", "x"]);
    assert_eq!(db.column("SELECT sqlstate FROM dedup.quarantine").await, ["23514"]);
}

/// Keys that the source tells apart and the target does not: the first record has the key, the others are set aside.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_only_the_target_takes_for_equal() {
    let pair = Pair::start().await;
    pair.source
        .exec("CREATE TABLE s (k text PRIMARY KEY, body text); INSERT INTO s VALUES ('a', '1'), ('A', '2'), ('b', '3'), ('B', '4')")
        .await;
    pair.target
        .exec(
            "CREATE COLLATION any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false); \
             CREATE TABLE s (k text COLLATE any_case PRIMARY KEY, body text); INSERT INTO s VALUES ('B', 'old')",
        )
        .await;
    pair.run(&["public.s"]).exits(exit::LEFT_ASIDE).await;
    assert_eq!(pair.target.column("SELECT k || body FROM s ORDER BY body").await, ["a1", "b3"]);
    assert_eq!(
        pair.target.column("SELECT source_key || ' ' || sqlstate FROM dedup.quarantine ORDER BY 1").await,
        ["k=A 23505", "k=B 23505"]
    );
}

/// A row that has to go, since its new content stands elsewhere, and can't, since it is referenced: it keeps its content, and the chunk writes
/// that nowhere else.
#[tokio::test(flavor = "multi_thread")]
async fn a_referenced_row_that_is_superseded() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text); INSERT INTO s VALUES (1, 'Y'), (2, 'X'), (9, 'Y'); \
         CREATE TABLE t (id int PRIMARY KEY, body text); INSERT INTO t VALUES (1, 'X'), (9, 'Y'); \
         CREATE TABLE child (id int REFERENCES t); INSERT INTO child VALUES (1)",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('referenced')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.s', 'public.t', NULL, '{{body}}')")).await;
    db.exec(&format!("SELECT dedup.plan_chunks('{run}')")).await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(status(db, &run).await, "done");
    assert_eq!(db.column("SELECT id || body FROM t ORDER BY id").await, ["1X", "9Y"]);
    assert_eq!(db.column("SELECT source_key || ' ' || sqlstate FROM dedup.quarantine").await, ["id=1 23503"]);
    assert_eq!(
        db.column("SELECT concat_ws(' ', unchanged_count, duplicate_count, quarantined_count) FROM dedup.checkpoints").await,
        ["1 1 1"]
    );
}

/// A run that is given up after it replaced the survivor of another run's loser: that other run has to write the loser.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_leaves_no_orphans() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text); INSERT INTO s VALUES (1, 'X'), (2, 'X'); \
         CREATE TABLE t (id int PRIMARY KEY, body text)",
    )
    .await;
    let content = |run: &str| format!("SELECT dedup.add_table('{run}', 'public.s', 't', NULL, '{{body}}')");
    let first: String = db.one("SELECT dedup.create_run('first')::text").await;
    db.exec(&content(&first)).await;
    db.exec(&format!("SELECT dedup.plan_chunks('{first}')")).await;
    db.exec(&format!("CALL dedup.migrate_run('{first}')")).await;
    db.exec("UPDATE s SET body = 'Y' WHERE id = 1; CREATE TABLE kept AS SELECT * FROM s; DELETE FROM s WHERE id = 2")
        .await;
    let second: String = db.one("SELECT dedup.create_run('second')::text").await;
    db.exec(&content(&second)).await;
    db.exec(&format!(
        "SELECT dedup.plan_chunks('{second}'); SELECT dedup.migrate_chunk('{second}', '1:000001')"
    ))
    .await;
    db.exec("INSERT INTO s SELECT * FROM kept WHERE id = 2").await;
    db.exec(&format!("SELECT dedup.cancel_run('{second}')")).await;
    assert_eq!(status(db, &first).await, "running");
    db.exec(&format!("CALL dedup.migrate_run('{first}')")).await;
    assert_eq!(db.column("SELECT body FROM t ORDER BY id").await, ["Y", "X"]);
}

/// Bounds mean the same in every session, whatever its DateStyle.
#[tokio::test(flavor = "multi_thread")]
async fn local_bounds_are_iso_dates() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "SET DateStyle = 'SQL, DMY'; \
         CREATE TABLE s AS SELECT (DATE '2024-01-01' + n) AS day, n FROM generate_series(1, 300) AS n; ALTER TABLE s ADD PRIMARY KEY (day); \
         CREATE TABLE t (LIKE s INCLUDING ALL)",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('dates')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.s', 't')")).await;
    db.exec(&format!("SELECT dedup.plan_chunks('{run}', 1000)")).await;
    let bounds =
        db.column("SELECT range_lower[1] FROM dedup.checkpoints WHERE range_lower IS NOT NULL").await;
    assert!(bounds.len() > 2 && bounds.iter().all(|day| day.starts_with("2024-")), "{bounds:?}");
    db.exec("SET DateStyle = 'SQL, MDY'").await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM t").await, 300);
}

/// A statement that always takes too long burns attempts, an interrupt does not.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_nobodys_fault_burns_no_attempt() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec("CREATE TABLE t (id int PRIMARY KEY)").await;
    let run = remote_run(db, r#"{"key_types": ["int4"]}"#, r#"[{"kind": "key"}]"#).await;
    let mut attempts = Vec::new();
    for free in ["true", "false", "false"] {
        db.exec("UPDATE dedup.checkpoints SET not_before = NULL").await;
        db.exec(&format!(
            "SELECT dedup.fail_chunk('{run}', l.chunk_id, l.lease, '57014', 'canceled', retry => true, free => {free}) \
             FROM dedup.lease_chunk('{run}', '{WORKER}') AS l"
        ))
        .await;
        attempts.push(db.one::<i32>("SELECT attempts FROM dedup.checkpoints").await);
    }
    assert_eq!(attempts, [0, 1, 2]);
}

/// Whoever joins and ends a run tells how it ended.
#[tokio::test(flavor = "multi_thread")]
async fn work_ends_as_run_does() {
    let pair = Pair::start().await;
    pair.source
        .exec("CREATE TABLE s (id int PRIMARY KEY, body text); INSERT INTO s VALUES (1, 'bad'), (2, 'x')")
        .await;
    pair.target.exec("CREATE TABLE s (id int PRIMARY KEY, body text CHECK (body <> 'bad'))").await;
    pair.run(&["public.s"]).arg("--lease-seconds").arg("10").killed_at(failpoint::LEASED).await;
    pair.sidecar("work").arg("last").exits(exit::LEFT_ASIDE).await;
}

/// Rows that a trigger adds to those that were sent are not what was sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_that_adds_rows() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE s (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO s VALUES (1, 'a'), (5, 'b')").await;
    pair.target
        .exec(
            "CREATE FUNCTION more() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
               IF NEW.id = 1 THEN INSERT INTO s VALUES (3, 'more'); END IF; RETURN NULL; END $$; \
             CREATE TRIGGER more AFTER INSERT ON s FOR EACH ROW EXECUTE FUNCTION more()",
        )
        .await;
    pair.run(&["public.s"]).exits(exit::ERROR).await;
    let (state, message): (String, String) = (
        pair.target.one("SELECT error_sqlstate FROM dedup.checkpoints").await,
        pair.target.one("SELECT error_message FROM dedup.checkpoints").await,
    );
    assert_eq!(state, "23000", "{message}");
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM s").await, 0);
}

/// A row that goes would take rows with it that point at its partition, not at the partitioned table.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_key_to_a_partition_does_not_cascade() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text); INSERT INTO s SELECT n, 'body ' || n FROM generate_series(1, 199) AS n; \
         CREATE TABLE t (id int PRIMARY KEY, body text) PARTITION BY RANGE (id); \
         CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (100); CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (100) TO (200); \
         CREATE TABLE marks (note int REFERENCES t1 ON DELETE CASCADE)",
    )
    .await;
    let migrate = async |name: &str| {
        let run: String = db.one(&format!("SELECT dedup.create_run('{name}')::text")).await;
        db.exec(&format!("SELECT dedup.add_table('{run}', 'public.s', 't', content_columns => '{{body}}'), dedup.plan_chunks('{run}')"))
            .await;
        db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
        assert_eq!(status(db, &run).await, "done");
    };
    migrate("first").await;
    // Both now carry a content that another row has; only one is pointed at.
    db.exec("INSERT INTO marks VALUES (6); UPDATE s SET body = 'body 7' WHERE id IN (6, 106)").await;
    migrate("second").await;
    let left: Vec<String> = db.column("SELECT id FROM t WHERE id IN (6, 106)").await;
    assert_eq!(left, ["6"]);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM marks").await, 1);
    let set_aside = db.column("SELECT source_key || ' ' || sqlstate FROM dedup.quarantine").await;
    assert_eq!(set_aside, ["id=6 23503"]);
}

/// What row security hides would be missing in the index, and be written once more.
#[tokio::test(flavor = "multi_thread")]
async fn hidden_rows_are_not_indexed_by_halves() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); INSERT INTO t VALUES (1, 'a'), (2, 'b')",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('r')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.s', 't', content_columns => '{{body}}')"))
        .await;
    db.exec(
        "CREATE ROLE half; GRANT USAGE ON SCHEMA dedup TO half; GRANT EXECUTE ON ALL ROUTINES IN SCHEMA dedup TO half; \
         GRANT ALL ON ALL TABLES IN SCHEMA dedup TO half; GRANT USAGE ON ALL SEQUENCES IN SCHEMA dedup TO half; GRANT ALL ON t TO half; \
         ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY half ON t USING (id = 1); SET ROLE half",
    )
    .await;
    for call in ["index_existing", "reindex_target"] {
        let (state, message) = db.fails(&format!("SELECT dedup.{call}('t')")).await;
        assert_eq!(state, "42501", "{message}");
        assert!(message.contains("row security is active"), "{message}");
    }
    db.exec("RESET ROLE").await;
    assert_eq!(db.one::<i64>("SELECT dedup.index_existing('t')").await, 2);
}
