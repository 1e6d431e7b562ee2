//! Reading back put off to the end of a run: what is written is not called verified before, and what is not there then is found.

use integration::check::{Table, assert_exact, assert_index};
use integration::db::Db;
use integration::pair::Pair;
use integration::sidecar::{exit, failpoint};

const NOTES: Table<'_> =
    Table { source: "public.notes", target: "public.notes", content: &["body"], columns: &["id", "body"] };

/// A run of local chunks that are verified at the end; `t` gets what `s` holds. Returns its id.
async fn late_run(db: &Db) -> String {
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text, note text); CREATE TABLE t (LIKE s INCLUDING ALL); \
         INSERT INTO s SELECT n, 'body ' || n % 800, 'note ' || n FROM generate_series(1, 1000) AS n",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('late', '{\"verify\": \"end\"}')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.s', 't', content_columns => '{{body}}'), dedup.plan_chunks('{run}', 20000)"
    ))
    .await;
    run
}

/// Writes every chunk, one statement each, without ending the run.
async fn write_chunks(db: &Db, run: &str) {
    for chunk in db
        .column(&format!("SELECT chunk_id FROM dedup.checkpoints WHERE run_id = '{run}' ORDER BY chunk_no"))
        .await
    {
        db.exec(&format!("SELECT dedup.migrate_chunk('{run}', '{chunk}')")).await;
    }
}

async fn states(db: &Db, run: &str) -> Vec<Vec<Option<String>>> {
    db.texts(&format!(
        "SELECT status, written_at IS NOT NULL, verified_at IS NOT NULL, count(*) > 1 FROM dedup.checkpoints \
         WHERE run_id = '{run}' GROUP BY 1, 2, 3 ORDER BY 1"
    ))
    .await
}

fn row(values: [&str; 4]) -> Vec<Option<String>> {
    values.iter().map(|value| Some((*value).to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_syncing_until_the_end() {
    let pair = Pair::start().await;
    let db = &pair.target;
    let run = late_run(db).await;
    write_chunks(db, &run).await;
    assert_eq!(states(db, &run).await, [row(["syncing", "t", "f", "t"])]);
    let progress = db
        .texts("SELECT verified, unverified = chunks, unverified = syncing, percent FROM dedup.progress")
        .await;
    assert_eq!(progress, [row(["0", "t", "t", "100.0"])]);
    let (state, message) = db.fails(&format!("SELECT dedup.migrate_chunk('{run}', '1:000001')")).await;
    assert_eq!(state, "55006", "{message}");
    assert!(message.contains("waits for verification"), "{message}");

    assert_eq!(db.one::<String>(&format!("SELECT dedup.complete_run('{run}')")).await, "done");
    assert_eq!(states(db, &run).await, [row(["verified", "t", "t", "t"])]);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM t").await, 800);
}

/// One row is changed and one is deleted between writing and verifying: exactly their chunks fail, and done again they are whole.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_at_the_end_is_found_and_written_again() {
    let pair = Pair::start().await;
    let db = &pair.target;
    let run = late_run(db).await;
    write_chunks(db, &run).await;
    // Not even the content differs, only a column beside it.
    db.exec("UPDATE t SET note = 'other' WHERE id = 3; DELETE FROM t WHERE id = 790").await;
    assert_eq!(db.one::<String>(&format!("SELECT dedup.complete_run('{run}')")).await, "failed");
    let failed = db
        .texts(
            "SELECT error_sqlstate, error_message LIKE '%does not hold what was sent: of % rows 1 are missing or differ', \
                    error_hint LIKE '%trigger%', verified_at IS NULL FROM dedup.checkpoints WHERE status = 'failed'",
        )
        .await;
    assert_eq!(failed, vec![row(["23000", "t", "t", "t"]); 2]);

    db.exec(&format!("SELECT dedup.requeue('{run}', 'failed')")).await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(states(db, &run).await, [row(["verified", "t", "t", "t"])]);
    let wrong: i64 = db.one("SELECT count(*) FROM t LEFT JOIN s USING (id) WHERE (t.body, t.note) IS DISTINCT FROM (s.body, s.note)").await;
    assert_eq!(wrong, 0);
    let contents: i64 = db.one("SELECT count(DISTINCT body) FROM t").await;
    assert_eq!((contents, db.one::<i64>("SELECT count(*) FROM t").await), (800, 800));
}

/// A content that moves to another key leaves a tombstone under the old one; the entry under the new one is looked for all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_content_that_changed_its_key_is_looked_for_under_the_new_one() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec("CREATE TABLE s (id int PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); INSERT INTO s VALUES (1, 'x'), (2, 'y')")
        .await;
    for (late, change) in [(false, ""), (true, "UPDATE s SET body = CASE id WHEN 1 THEN 'y' ELSE 'x' END")] {
        if !change.is_empty() {
            db.exec(change).await;
        }
        let options = if late { "{\"verify\": \"end\"}" } else { "{}" };
        let run: String = db.one(&format!("SELECT dedup.create_run('swap', '{options}')::text")).await;
        db.exec(&format!(
            "SELECT dedup.add_table('{run}', 'public.s', 't', content_columns => '{{body}}'), dedup.plan_chunks('{run}')"
        ))
        .await;
        write_chunks(db, &run).await;
        if late {
            db.exec("UPDATE t SET body = 'z' WHERE body = 'x'").await;
        }
        let ended: String = db.one(&format!("SELECT dedup.complete_run('{run}')")).await;
        assert_eq!(ended, if late { "failed" } else { "done" });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sidecar_puts_it_off_and_says_so() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.notes (id int PRIMARY KEY, body text)").await;
    pair.source
        .exec("INSERT INTO public.notes SELECT n, repeat('b', 50) || n % 700 FROM generate_series(1, 1000) AS n; ANALYZE public.notes")
        .await;
    let run = |name: &str| {
        pair.run(&["public.notes"])
            .args(&["--content-columns", "public.notes:body", "--verify", "end", "--name", name])
            .chunk_size("10kB")
            .workers(2)
    };
    let output = run("good").exits(exit::DONE).await;
    output.says("verified when everything is written");
    assert_exact(&pair.source, &pair.target, &NOTES).await;
    assert_index(&pair.target, &NOTES).await;
    let early: i64 =
        pair.target.one("SELECT count(*) FROM dedup.checkpoints WHERE verified_at = written_at").await;
    assert_eq!(early, 0);

    // A trigger that rewrites a row is found, if later.
    pair.target
        .exec(
            "DELETE FROM public.notes; SELECT dedup.reindex_target('public.notes'); \
             CREATE FUNCTION rewrite() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.body := NEW.body || '!'; RETURN NEW; END $$; \
             CREATE TRIGGER rewrite BEFORE INSERT ON public.notes FOR EACH ROW WHEN (NEW.id = 5) EXECUTE FUNCTION rewrite()",
        )
        .await;
    let output = run("bad").exits(exit::ERROR).await;
    assert!(output.stdout.contains("does not hold what was sent"), "{}", output.describe());
    let chunks = pair
        .target
        .texts(
            "SELECT failed, unverified, verified = chunks - 1, status FROM dedup.progress WHERE name = 'bad'",
        )
        .await;
    assert_eq!(chunks, [row(["1", "0", "t", "failed"])]);
}

/// A run that is given up is verified first: nobody is dropped in favour of a row that isn't there.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_leaves_nothing_unverified() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); INSERT INTO s VALUES (1, 'a'), (2, 'b')",
    )
    .await;
    let run = plain_run(db, "end").await;
    write_chunks(db, &run).await;
    db.exec("DELETE FROM t WHERE id = 2").await;
    db.exec(&format!("SELECT dedup.cancel_run('{run}')")).await;
    assert_eq!(states(db, &run).await, [row(["failed", "f", "f", "f"])]);
    let other = plain_run(db, "chunk").await;
    db.exec(&format!("CALL dedup.migrate_run('{other}')")).await;
    assert_eq!(db.column("SELECT id || body FROM t ORDER BY id").await, ["1a", "2b"]);

    // Rows that were replaced altogether can't be verified; the index is not believed either, until it is made anew.
    let run = plain_run(db, "end").await;
    db.exec("UPDATE s SET body = body || '!'").await;
    write_chunks(db, &run).await;
    db.exec("TRUNCATE t").await;
    let (state, message) = db.fails(&format!("SELECT dedup.complete_run('{run}')")).await;
    assert_eq!(state, "55000", "{message}");
    assert!(message.contains(&format!("SELECT dedup.cancel_run('{run}')")), "{message}");
    db.exec(&format!("SELECT dedup.cancel_run('{run}'); SELECT dedup.reindex_target('t')")).await;
    let last = plain_run(db, "chunk").await;
    db.exec(&format!("CALL dedup.migrate_run('{last}')")).await;
    assert_eq!(db.column("SELECT id || body FROM t ORDER BY id").await, ["1a!", "2b!"]);
}

/// A run of one chunk from `s` into `t`.
async fn plain_run(db: &Db, verify: &str) -> String {
    let run: String =
        db.one(&format!("SELECT dedup.create_run('plain', '{{\"verify\": \"{verify}\"}}')::text")).await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.s', 't', content_columns => '{{body}}'), dedup.plan_chunks('{run}')"
    ))
    .await;
    run
}

/// Somebody changed a column beside the content: the chunk fails, but its content still stands and is not written twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_content_that_still_stands_is_not_retracted() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text, hits int); CREATE TABLE t (LIKE s INCLUDING ALL); \
         INSERT INTO s VALUES (1, 'a', 0), (2, 'b', 0)",
    )
    .await;
    let run = plain_run(db, "end").await;
    write_chunks(db, &run).await;
    db.exec("UPDATE t SET hits = 1 WHERE id = 1").await;
    assert_eq!(db.one::<String>(&format!("SELECT dedup.complete_run('{run}')")).await, "failed");
    let books: i64 = db.one("SELECT count(*) FROM dedup.checkpoints WHERE num_nonnulls(source_count, checksum, written_at) > 0").await;
    assert_eq!(books, 0, "a failed chunk has books");
    db.exec(&format!("SELECT dedup.cancel_run('{run}'); DELETE FROM s; INSERT INTO s VALUES (7, 'a', 0)"))
        .await;
    let other = plain_run(db, "chunk").await;
    db.exec(&format!("CALL dedup.migrate_run('{other}')")).await;
    assert_eq!(db.column("SELECT id || body FROM t ORDER BY id").await, ["1a", "2b"]);
}

/// More entries than fit the memory for it, most of them missing: several scans, each chunk told once.
#[tokio::test(flavor = "multi_thread")]
async fn in_little_memory() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (id int PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); \
         INSERT INTO s SELECT n, 'body ' || n FROM generate_series(1, 60000) AS n; SET maintenance_work_mem = '1MB'",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('late', '{\"verify\": \"end\"}')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.s', 't', content_columns => '{{body}}'), dedup.plan_chunks('{run}', 300000)"
    ))
    .await;
    write_chunks(db, &run).await;
    db.exec("DELETE FROM t WHERE id > 3000 AND id % 2 = 0").await;
    assert_eq!(db.one::<String>(&format!("SELECT dedup.complete_run('{run}')")).await, "failed");
    let told: i64 = db
        .one("SELECT sum(substring(error_message, '(\\d+) are missing')::int)::int8 FROM dedup.checkpoints WHERE status = 'failed'")
        .await;
    assert_eq!(told, 28_500);
    let indexed: i64 = db.one("SELECT count(*) FROM dedup.hash_index('t')").await;
    assert_eq!(indexed, 31_500);
    db.exec(&format!("SELECT dedup.requeue('{run}', 'failed')")).await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM t JOIN s USING (id, body)").await, 60_000);
    assert_eq!(states(db, &run).await, [row(["verified", "t", "t", "t"])]);
}

/// Foreign keys into later chunks are waited for, though no chunk is verified meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_keys_are_waited_for() {
    let pair = Pair::start().await;
    pair.target
        .exec("CREATE TABLE public.chain (id int PRIMARY KEY, next int REFERENCES public.chain)")
        .await;
    pair.source
        .exec(
            "CREATE TABLE public.chain (id int PRIMARY KEY, next int); \
             INSERT INTO public.chain SELECT n, nullif(n + 1, 1001) FROM generate_series(1, 1000) AS n; ANALYZE public.chain",
        )
        .await;
    pair.run(&["public.chain"])
        .args(&["--verify", "end"])
        .chunk_size("5kB")
        .workers(2)
        .exits(exit::DONE)
        .await;
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM public.chain").await, 1000);

    // The same in SQL.
    let db = &pair.target;
    db.exec("CREATE TABLE s AS SELECT * FROM public.chain; ALTER TABLE s ADD PRIMARY KEY (id); CREATE TABLE t (id int PRIMARY KEY, next int REFERENCES t)").await;
    let run: String = db.one("SELECT dedup.create_run('late', '{\"verify\": \"end\"}')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.s', 't'), dedup.plan_chunks('{run}', 5000)"))
        .await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM t").await, 1000);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.quarantine").await, 0);
}

/// Killed before the end: `--resume` goes on, verifies, and does not take another word for it.
#[tokio::test(flavor = "multi_thread")]
async fn killed_before_the_end() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.notes (id int PRIMARY KEY, body text)").await;
    pair.source
        .exec("INSERT INTO public.notes SELECT n, repeat('b', 50) || n % 700 FROM generate_series(1, 1000) AS n; ANALYZE public.notes")
        .await;
    pair.run(&["public.notes"])
        .args(&["--content-columns", "public.notes:body", "--verify", "end"])
        .chunk_size("10kB")
        .workers(1)
        .killed_at(failpoint::AFTER_COMMIT)
        .await;
    let written: i64 = pair
        .target
        .one("SELECT count(*) FROM dedup.checkpoints WHERE status = 'syncing' AND written_at IS NOT NULL")
        .await;
    assert!(written >= 1);
    pair.target.exec("UPDATE dedup.runs SET options = options || '{\"lease_seconds\": 2}'").await;
    pair.resume()
        .args(&["--verify", "chunk"])
        .exits(exit::ERROR)
        .await
        .says("the run is verified at its end");
    pair.resume().exits(exit::DONE).await;
    assert_exact(&pair.source, &pair.target, &NOTES).await;
    assert_eq!(
        pair.target.one::<i64>("SELECT count(*) FROM dedup.checkpoints WHERE status <> 'verified'").await,
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn other_times_are_refused() {
    let pair = Pair::start().await;
    let (state, message) = pair.target.fails("SELECT dedup.create_run('r', '{\"verify\": \"never\"}')").await;
    assert_eq!(state, "22023", "{message}");
    for options in ["[1]", "{\"lease_seconds\": \"x\"}", "{\"max_attempts\": 0}"] {
        let (state, message) = pair.target.fails(&format!("SELECT dedup.create_run('r', '{options}')")).await;
        assert_eq!(state, "22023", "{message}");
    }
    pair.run(&["public.t"]).args(&["--verify", "never"]).exits(exit::USAGE).await.says("chunk, end");
}
