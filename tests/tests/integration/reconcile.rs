//! Reconciliation: exactly what was tampered with is named, in every kind of table; a mismatch holds the run until it is gone.

use integration::data::{LOG_ROWS, LOG_TABLE};
use integration::db::Db;
use integration::pair::Pair;
use integration::sidecar::{exit, failpoint};

/// A table of items whose `body` is content, 2,000 of them with 1,500 contents.
pub struct Items {
    /// The key columns as they are declared.
    pub key: &'static str,
    /// Their values for the row numbered `n`.
    pub values: &'static str,
    /// The key of a divergence `d` as the row's number.
    pub number: &'static str,
}

/// A surrogate number.
pub const BY_NUMBER: Items =
    Items { key: "k bigint PRIMARY KEY", values: "n * 10", number: "substring(d.key, 3)::int8 / 10" };
/// Ordered by a collation, so that ranges of the source mean nothing in the target.
pub const BY_TEXT: Items = Items {
    key: "k text PRIMARY KEY",
    values: "'it''s \"' || n || '\" & über'",
    number: "substring(convert_from(d.packed_key, 'UTF8'), '\"(\\d+)\"')::int8",
};
/// Two columns, one with an awkward name.
pub const BY_TWO: Items = Items {
    key: "k int, \"K 2\" int, PRIMARY KEY (k, \"K 2\")",
    values: "n / 7, n % 7",
    number: "substring(d.key, '^k=(\\d+)')::int8 * 7 + substring(d.key, '(\\d+)$')::int8",
};

/// What is done to the target, by SQL on its rows; each row knows its number `n`.
pub const TAMPERING: &str = "CREATE TABLE saved AS TABLE public.items; \
     CREATE TABLE deleted AS SELECT n, body FROM public.items WHERE n IN (SELECT min(n) FROM public.items UNION SELECT max(n) FROM public.items) OR n IN (500, 501, 777); \
     DELETE FROM public.items WHERE n IN (SELECT n FROM deleted); \
     CREATE TABLE changed AS SELECT n FROM public.items WHERE n IN (2, 300, 600, 1000); \
     UPDATE public.items SET note = 'tampered' WHERE n IN (2, 600); UPDATE public.items SET note = NULL WHERE n = 1000; \
     CREATE TABLE rewritten AS SELECT n, body FROM public.items WHERE n = 300; \
     UPDATE public.items SET body = 'tampered' WHERE n = 300";

/// Tampers, and puts a record in that was dropped; answers its number.
pub async fn tamper(db: &Db, kind: &Items) -> i32 {
    db.exec(TAMPERING).await;
    let dropped: i32 = db.one("SELECT min(n) FROM generate_series(1501, 2000) AS n WHERE n NOT IN (SELECT n FROM public.items) AND n % 1500 IN (SELECT n % 1500 FROM public.items)").await;
    db.exec(&format!(
        "INSERT INTO public.items SELECT {}, n, 'body ' || n % 1500, 'note ' || n FROM generate_series({dropped}, {dropped}) AS n",
        kind.values
    ))
    .await;
    dropped
}

/// Puts a row in that nobody delivered, numbered 5000.
pub async fn put_in_a_strange_row(db: &Db, kind: &Items) {
    db.exec(&format!(
        "INSERT INTO public.items SELECT {}, n, 'nobody''s', NULL FROM generate_series(5000, 5000) AS n",
        kind.values
    ))
    .await;
}

/// A migrated table of items.
pub async fn items(items: &Items) -> Pair {
    let pair = Pair::start().await;
    let table = format!("CREATE TABLE public.items ({}, n int, body text, note text)", items.key);
    pair.both(&table).await;
    pair.source
        .exec(&format!(
            "INSERT INTO public.items SELECT {}, n, 'body ' || n % 1500, 'note ' || n FROM generate_series(1, 2000) AS n; ANALYZE public.items",
            items.values
        ))
        .await;
    pair.run(&["public.items"])
        .args(&["--content-columns", "public.items:body"])
        .chunk_size("3kB")
        .workers(2)
        .exits(exit::DONE)
        .await;
    pair
}

/// `kind number` of what the last pass has named.
pub async fn named(db: &Db, number: &str) -> Vec<String> {
    db.column(&format!(
        "SELECT d.kind || ' ' || {number} FROM dedup.divergences AS d \
         WHERE d.reconciliation_id = (SELECT max(reconciliation_id) FROM dedup.reconciliations) ORDER BY 1"
    ))
    .await
}

/// Each run's status and the verdicts about it.
pub async fn statuses(db: &Db) -> Vec<Vec<Option<String>>> {
    db.texts(
        "SELECT r.status, string_agg(p.verdict || CASE WHEN p.released_by IS NOT NULL THEN ' released' ELSE '' END, ', ' ORDER BY p.reconciliation_id) \
         FROM dedup.runs AS r LEFT JOIN dedup.reconciliations AS p USING (run_id) GROUP BY r.run_id ORDER BY r.created_at",
    )
    .await
}

/// A line of a result.
pub fn line(values: &[&str]) -> Vec<Option<String>> {
    values.iter().map(|value| Some((*value).to_owned())).collect()
}

async fn tampered_rows_are_named(kind: &Items) {
    let pair = items(kind).await;
    let db = &pair.target;
    pair.reconcile().exits(exit::DONE).await;
    assert_eq!(statuses(db).await, [line(&["reconciled", "clean"])]);

    let dropped = tamper(db, kind).await;
    put_in_a_strange_row(db, kind).await;
    let output = pair.reconcile().exits(exit::HALTED).await;
    assert!(output.stdout.contains("MISMATCHES, halted"), "{}", output.describe());
    // Whoever was dropped for a row that is gone is missing, too.
    let mut expected = db
        .column(
            "SELECT 'missing ' || n FROM generate_series(1, 2000) AS n WHERE 'body ' || n % 1500 IN (SELECT body FROM deleted UNION SELECT body FROM rewritten) \
                 AND n NOT IN (SELECT n FROM rewritten) \
             UNION SELECT 'changed ' || n FROM changed",
        )
        .await;
    expected.extend([format!("surviving_duplicate {dropped}"), "foreign 5000".to_owned()]);
    expected.sort();
    assert_eq!(named(db, kind.number).await, expected);
    let books: bool = db
        .one(
            "SELECT bool_and(source_count = present_count + duplicate_count + quarantined_count + missing_count + changed_count + source_changed_count) \
             FROM dedup.reconciled_chunks",
        )
        .await;
    assert!(books, "the books of a pass do not balance");

    // Found again as long as it is there; gone when it is mended.
    pair.reconcile().exits(exit::HALTED).await;
    db.exec("DELETE FROM public.items; INSERT INTO public.items TABLE saved").await;
    pair.reconcile().exits(exit::DONE).await;
    assert_eq!(
        statuses(db).await,
        [line(&["reconciled", "clean, mismatch released, mismatch released, clean"])]
    );
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.divergences WHERE state = 'open'").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn tampered_rows_by_number() {
    tampered_rows_are_named(&BY_NUMBER).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tampered_rows_by_text() {
    tampered_rows_are_named(&BY_TEXT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tampered_rows_by_two_columns() {
    tampered_rows_are_named(&BY_TWO).await;
}

/// Neither a function nor an UPDATE by hand, a resume or a restart gets a run with mismatches going.
#[tokio::test(flavor = "multi_thread")]
async fn a_mismatch_holds_the_run() {
    let mut pair = items(&BY_NUMBER).await;
    pair.target.exec("LISTEN dedup_alerts; DELETE FROM public.items WHERE n = 5").await;
    pair.reconcile().exits(exit::HALTED).await;
    let run: String = pair.target.one("SELECT run_id::text FROM dedup.runs").await;
    for (sql, state) in [
        (format!("SELECT dedup.resume_run('{run}')"), "55000"),
        (format!("SELECT dedup.pause_run('{run}')"), "55000"),
        (format!("SELECT dedup.cancel_run('{run}')"), "55000"),
        (format!("SELECT dedup.requeue('{run}', 'failed')"), "55000"),
        ("UPDATE dedup.runs SET status = 'running'".to_owned(), "23503"),
        ("UPDATE dedup.runs SET status = 'reconciled'".to_owned(), "23503"),
        ("UPDATE dedup.reconciliations SET verdict = 'abandoned'".to_owned(), "55000"),
        ("UPDATE dedup.reconciliations SET verdict = 'clean'".to_owned(), "55000"),
        ("DELETE FROM dedup.reconciliations".to_owned(), "55000"),
        ("TRUNCATE dedup.reconciliations CASCADE".to_owned(), "55000"),
        (
            format!(
                "INSERT INTO dedup.reconciliations (run_id, last_ordinal, settled_at) VALUES ('{run}', 0, now()); UPDATE dedup.reconciliations SET verdict = 'clean' WHERE verdict = 'open'"
            ),
            "55000",
        ),
        ("UPDATE dedup.reconciliations SET released_by = reconciliation_id".to_owned(), "23514"),
        ("UPDATE dedup.reconciliations SET released_by = reconciliation_id + 1".to_owned(), "23503"),
    ] {
        let (found, message) = pair.target.fails(&sql).await;
        assert_eq!(found, state, "{sql}: {message}");
    }
    assert_eq!(pair.target.one::<String>(&format!("SELECT dedup.complete_run('{run}')")).await, "halted");
    pair.target_cluster.restart(integration::cluster::Stop::Immediate);
    pair.reconnect_target().await;
    pair.resume().exits(exit::HALTED).await;
    assert_eq!(statuses(&pair.target).await, [line(&["halted", "mismatch"])]);
    let alerts: i64 = pair
        .target
        .one("SELECT count(*) FROM dedup.events WHERE kind = 'mismatch' AND detail ->> 'severity' = 'P1'")
        .await;
    assert_eq!(alerts, 1);
}

/// A source that lives on is told, and halts nothing unless one asks for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_changed() {
    let pair = items(&BY_NUMBER).await;
    pair.source
        .exec(
            "UPDATE public.items SET note = 'later' WHERE n = 7; UPDATE public.items SET body = 'later' WHERE n = 9; \
             DELETE FROM public.items WHERE n = 11; \
             INSERT INTO public.items VALUES (15, 3001, 'new', 'new'), (25, 3002, 'body 40', 'a duplicate that is new')",
        )
        .await;
    pair.reconcile().exits(exit::DONE).await;
    let keys = pair.target.column("SELECT kind || ' ' || key FROM dedup.divergences ORDER BY 1").await;
    let mut expected = ["k=70", "k=90", "k=110", "k=15", "k=25"].map(|key| format!("source_changed {key}"));
    expected.sort();
    assert_eq!(keys, expected);
    pair.reconcile().arg("--strict").exits(exit::HALTED).await;
    assert_eq!(statuses(&pair.target).await, [line(&["halted", "clean, mismatch"])]);
    assert_eq!(
        pair.target.one::<i64>("SELECT count(*) FROM dedup.divergences WHERE state = 'open'").await,
        5
    );
    // Who asked strictly is not answered otherwise.
    pair.reconcile().exits(exit::HALTED).await;
    assert_eq!(statuses(&pair.target).await, [line(&["halted", "clean, mismatch, clean"])]);
}

/// A record without a key that came later is named without one.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_without_a_key_that_is_new() {
    let pair = Pair::start().await;
    pair.source.exec("CREATE TABLE public.people (id int, note text)").await;
    pair.target.exec("CREATE TABLE public.people (id int PRIMARY KEY, note text)").await;
    pair.source
        .exec("INSERT INTO public.people SELECT n, 'note ' || n FROM generate_series(1, 50) AS n")
        .await;
    pair.run(&["public.people"]).exits(exit::DONE).await;
    pair.source.exec("INSERT INTO public.people VALUES (NULL, 'new')").await;
    pair.reconcile().exits(exit::DONE).await;
    let found = pair.target.texts("SELECT kind, key, packed_key::text FROM dedup.divergences").await;
    assert_eq!(found, [vec![Some("source_changed".to_owned()), None, None]]);
}

/// Rows under the keys of records that were dropped, or set aside.
async fn keys_that_are_taken(kind: &Items) {
    let pair = items(kind).await;
    let db = &pair.target;
    let dropped: Vec<String> = db
        .column("SELECT n FROM generate_series(1, 2000) AS n WHERE n NOT IN (SELECT n FROM public.items) ORDER BY 1 LIMIT 3")
        .await;
    db.exec(&format!(
        "INSERT INTO public.items SELECT {0}, n, 'garbage', NULL FROM generate_series({1}, {1}) AS n; \
         INSERT INTO public.items SELECT {0}, n, 'body ' || n % 1500, 'another note' FROM generate_series({2}, {2}) AS n",
        kind.values, dropped[0], dropped[1]
    ))
    .await;
    pair.reconcile().exits(exit::HALTED).await;
    let mut expected = [format!("foreign {}", dropped[0]), format!("surviving_duplicate {}", dropped[1])];
    expected.sort();
    assert_eq!(named(db, kind.number).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_taken_by_number() {
    keys_that_are_taken(&BY_NUMBER).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_taken_by_text() {
    keys_that_are_taken(&BY_TEXT).await;
}

/// A content that stands twice is named, and folded, even where nothing but the rows says so.
#[tokio::test(flavor = "multi_thread")]
async fn twins_that_the_index_does_not_know() {
    for key in ["bigint", "text"] {
        let pair = Pair::start().await;
        let db = &pair.target;
        pair.both(&format!("CREATE TABLE public.items (k {key} PRIMARY KEY, body text)")).await;
        pair.source
            .exec("INSERT INTO public.items SELECT 1000 + n, 'body ' || CASE n WHEN 399 THEN 5 ELSE n END FROM generate_series(1, 400) AS n; ANALYZE public.items")
            .await;
        let run = pair.run(&["public.items"]).args(&["--content-columns", "public.items:body"]);
        run.chunk_size("1kB").exits(exit::DONE).await;
        let (survivor, dropped) =
            match db.column("SELECT k FROM public.items WHERE body = 'body 5'").await.as_slice() {
                [k] if k == "1005" => ("1005", "1399"),
                _ => ("1399", "1005"),
            };
        // The row is the record's own, and no ledger tells that it was dropped.
        db.exec(&format!(
            "DELETE FROM dedup.ledger_block; INSERT INTO public.items VALUES ({dropped}, 'body 5')"
        ))
        .await;
        pair.reconcile().exits(exit::HALTED).await;
        let found = db.column("SELECT kind || ' ' || key FROM dedup.divergences").await;
        assert_eq!(found, [format!("surviving_duplicate k={dropped}")]);
        pair.repair().exits(exit::DONE).await;
        assert_eq!(db.column("SELECT k FROM public.items WHERE body = 'body 5'").await, [survivor]);
        assert_eq!(db.column("SELECT source_key FROM dedup.duplicates").await, [format!("k={dropped}")]);
    }
}

/// A record that the source has twice, one of which was dropped: the ledger's line explains one of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_of_the_ledger_explains_one_record() {
    let pair = Pair::start().await;
    pair.source.exec("CREATE TABLE public.twice (id int, body text, note text)").await;
    pair.target.exec("CREATE TABLE public.twice (id int PRIMARY KEY, body text, note text)").await;
    pair.source
        .exec("INSERT INTO public.twice SELECT n, 'body ' || n, 'note' FROM generate_series(1, 50) AS n; INSERT INTO public.twice VALUES (5, 'body 5', 'note')")
        .await;
    pair.run(&["public.twice"]).args(&["--content-columns", "public.twice:body"]).exits(exit::DONE).await;
    pair.reconcile().exits(exit::DONE).await;
    pair.target.exec("UPDATE public.twice SET note = 'tampered' WHERE id = 5").await;
    pair.reconcile().exits(exit::HALTED).await;
    let found = pair.target.column("SELECT kind || ' ' || key FROM dedup.divergences").await;
    assert_eq!(found, ["changed id=5"]);
}

/// What was in the source when an earlier run read it, and no longer when the last one did.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_too_many() {
    let pair = items(&BY_NUMBER).await;
    pair.source.exec("DELETE FROM public.items WHERE n IN (700, 1200)").await;
    pair.run(&["public.items"])
        .args(&["--content-columns", "public.items:body"])
        .chunk_size("10kB")
        .exits(exit::DONE)
        .await;
    pair.reconcile().exits(exit::HALTED).await;
    assert_eq!(named(&pair.target, BY_NUMBER.number).await, ["extra 1200", "extra 700"]);
    // An index that is made anew does not forget who wrote what.
    pair.target.exec("SELECT dedup.reindex_target('public.items')").await;
    pair.reconcile().exits(exit::HALTED).await;
    assert_eq!(named(&pair.target, BY_NUMBER.number).await, ["extra 1200", "extra 700"]);
    pair.target.exec("DELETE FROM public.items WHERE n IN (700, 1200)").await;
    pair.reconcile().exits(exit::DONE).await;
}

/// Runs of the same table with a filter have parts of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_the_source() {
    let pair = items(&BY_NUMBER).await;
    pair.source.exec("UPDATE public.items SET note = 'revised' WHERE n BETWEEN 100 AND 200").await;
    pair.run(&["public.items"])
        .args(&["--content-columns", "public.items:body", "--name", "part"])
        .args(&["--where", "public.items:n BETWEEN 100 AND 200"])
        .chunk_size("3kB")
        .exits(exit::DONE)
        .await;
    pair.reconcile().exits(exit::DONE).await;
    pair.target.exec("DELETE FROM public.items WHERE n = 150").await;
    pair.reconcile().exits(exit::HALTED).await;
    assert_eq!(named(&pair.target, BY_NUMBER.number).await, ["missing 150"]);
}

/// Rows of one run are none of another's that has another source; two sources of one run share a target.
#[tokio::test(flavor = "multi_thread")]
async fn several_sources() {
    let pair = items(&BY_NUMBER).await;
    let table = "(k bigint PRIMARY KEY, n int, body text, note text)";
    pair.source
        .exec(&format!(
            "CREATE TABLE public.more {table}; CREATE TABLE public.most {table}; \
             INSERT INTO public.more SELECT 100000 + n, n, 'body ' || n % 1800, 'more' FROM generate_series(1, 900) AS n; \
             INSERT INTO public.most SELECT 99500 + n, n, 'most ' || n % 700, 'most' FROM generate_series(1, 400) AS n; \
             ANALYZE public.more, public.most"
        ))
        .await;
    let content = ["--content-columns", "public.more:body", "--content-columns", "public.most:body"];
    pair.run(&["public.more=public.items", "public.most=public.items"])
        .args(&content)
        .chunk_size("10kB")
        .exits(exit::DONE)
        .await;
    pair.reconcile().exits(exit::DONE).await;
    // Everything is unchanged in the next run, and written by this one.
    pair.run(&["public.more=public.items", "public.most=public.items"])
        .args(&content)
        .chunk_size("10kB")
        .exits(exit::DONE)
        .await;
    pair.reconcile().exits(exit::DONE).await;
    pair.target
        .exec("DELETE FROM public.items WHERE k = 99600; UPDATE public.items SET note = '' WHERE k = 99700")
        .await;
    pair.reconcile().exits(exit::HALTED).await;
    let keys = pair.target.column("SELECT kind || ' ' || key FROM dedup.divergences ORDER BY 1").await;
    assert_eq!(keys, ["changed k=99700", "missing k=99600"]);
}

/// Without a key contents are compared.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_key() {
    let pair = Pair::start().await;
    pair.both(LOG_TABLE).await;
    pair.source.exec(LOG_ROWS).await;
    pair.run(&["public.log"]).workers(2).chunk_size("60kB").exits(exit::DONE).await;
    pair.reconcile().exits(exit::DONE).await;
    pair.target
        .exec(
            "CREATE TABLE saved AS TABLE public.log; DELETE FROM public.log WHERE line IN ('line 3', 'line 2699'); \
             UPDATE public.log SET line = 'tampered' WHERE line = 'line 500'; INSERT INTO public.log SELECT * FROM saved WHERE line = 'line 600'",
        )
        .await;
    pair.reconcile().exits(exit::HALTED).await;
    let found = pair
        .target
        .texts(
            "SELECT d.kind, coalesce(s.line, t.line), d.key FROM dedup.divergences AS d \
             LEFT JOIN saved AS s ON dedup.content_hash(s.at, s.line) = d.content_hash \
             LEFT JOIN public.log AS t ON dedup.content_hash(t.at, t.line) = d.content_hash AND t.line = 'tampered' ORDER BY 1, 2",
        )
        .await;
    let expected: Vec<Vec<Option<String>>> = [
        ["foreign", "line 600"],
        ["foreign", "tampered"],
        ["missing", "line 2699"],
        ["missing", "line 3"],
        ["missing", "line 500"],
    ]
    .iter()
    .map(|pair| vec![Some(pair[0].to_owned()), Some(pair[1].to_owned()), None])
    .collect();
    assert_eq!(found, expected);
    pair.target.exec("DELETE FROM public.log; INSERT INTO public.log TABLE saved").await;
    pair.reconcile().exits(exit::DONE).await;
}

/// Records in quarantine are accounted for; a row that came in past the run is foreign.
#[tokio::test(flavor = "multi_thread")]
async fn quarantined_records() {
    let pair = Pair::start().await;
    pair.source.exec("CREATE TABLE public.people (id int, email text, note text)").await;
    pair.target
        .exec("CREATE TABLE public.people (id int PRIMARY KEY, email text NOT NULL CHECK (email <> 'bad'), note text)")
        .await;
    pair.source
        .exec(
            "INSERT INTO public.people SELECT n, CASE n WHEN 7 THEN NULL WHEN 8 THEN 'bad' ELSE 'e' || n END, 'note' FROM generate_series(1, 500) AS n; \
             INSERT INTO public.people VALUES (NULL, 'no key', 'x'), (9, 'again', 'a second record with the key'); ANALYZE public.people",
        )
        .await;
    pair.run(&["public.people"]).chunk_size("5kB").exits(exit::LEFT_ASIDE).await;
    let output = pair.reconcile().arg("--json").exits(exit::LEFT_ASIDE).await;
    let verdict = output.json();
    assert_eq!(verdict["verdict"], "clean");
    assert_eq!(verdict["counts"]["source"], 502);
    assert_eq!(verdict["counts"]["present"], 498);
    assert_eq!(verdict["counts"]["quarantined"], 4);
    assert!(verdict["target_snapshot"].as_str().is_some_and(|snapshot| snapshot.contains(':')), "{verdict}");
}

/// Killed at several points, a pass goes on with the chunks that are left.
#[tokio::test(flavor = "multi_thread")]
async fn killed_and_taken_up() {
    let pair = items(&BY_NUMBER).await;
    pair.target.exec("DELETE FROM public.items WHERE n IN (5, 1400)").await;
    for point in [failpoint::READ, failpoint::BEFORE_COMMIT, failpoint::AFTER_COMMIT] {
        pair.reconcile().workers(1).killed_at(&format!("{point}@2")).await;
        // The lock on the pass goes with the session.
        pair.target
            .wait_until(
                "NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'pg-dedup-migrate%')",
            )
            .await;
    }
    let compared = "SELECT concat_ws(' ', chunk_id, compared_at) FROM dedup.reconciled_chunks ORDER BY 1";
    let before = pair.target.column(compared).await;
    // A row of a chunk that was compared goes while nobody looks; the chunk is compared again.
    pair.target.exec("DELETE FROM public.items WHERE n = 2").await;
    assert!(before.len() >= 2, "{before:?}");
    pair.reconcile().exits(exit::HALTED).await;
    let after = pair.target.column(compared).await;
    let again: Vec<_> = before.iter().filter(|chunk| !after.contains(chunk)).collect();
    assert!(again.len() == 1 && again[0].starts_with("1:000001 "), "compared again: {again:?}");
    assert!(after.len() > before.len());
    assert_eq!(statuses(&pair.target).await, [line(&["halted", "mismatch"])]);
    let found = named(&pair.target, BY_NUMBER.number).await;
    assert_eq!(found, ["missing 1400", "missing 1502", "missing 1505", "missing 2", "missing 5"]);
}

/// In SQL, with several scans of a target that does not fit the memory for them.
#[tokio::test(flavor = "multi_thread")]
async fn in_sql_and_in_little_memory() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (k text PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); \
         INSERT INTO s SELECT 'key ' || n, 'body ' || n % 50000 FROM generate_series(1, 60000) AS n; SET maintenance_work_mem = '1MB'",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('local')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.s', 't', content_columns => '{{body}}'), dedup.plan_chunks('{run}', 500000)"
    ))
    .await;
    let (state, message) = db.fails(&format!("SELECT dedup.reconcile('{run}')")).await;
    assert_eq!(state, "55000", "{message}");
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let clean: i64 = db
        .one(&format!(
            "SELECT count(*) FROM dedup.reconcile('{run}') WHERE missing_count + changed_count + extra_count + foreign_count > 0"
        ))
        .await;
    assert_eq!(clean, 0);
    db.exec("DELETE FROM t WHERE body = 'body 77'; UPDATE t SET body = 'x' WHERE body = 'body 12345'; INSERT INTO t VALUES ('stranger', 'y')")
        .await;
    db.exec(&format!("SELECT dedup.reconcile('{run}')")).await;
    let found = db
        .column("SELECT kind || ' ' || convert_from(packed_key, 'UTF8') FROM dedup.divergences ORDER BY 1")
        .await;
    // body 77 and body 12345 are... the first of each pair of records may be either.
    let changed: String = db.one("SELECT 'changed ' || k FROM t WHERE body = 'x'").await;
    let mut expected = db
        .column("SELECT 'missing ' || s.k FROM s WHERE body IN ('body 77', 'body 12345') AND s.k NOT IN (SELECT k FROM t WHERE body = 'x')")
        .await;
    expected.extend([changed, "foreign stranger".to_owned()]);
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!(statuses(db).await, [line(&["halted", "clean, mismatch"])]);
}

/// One pass at a time; a pass over a run that went on meanwhile says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn passes_that_do_not_count() {
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    let run: String = db.one("SELECT run_id::text FROM dedup.runs").await;
    db.exec(&format!("SELECT dedup.hold_run('{run}')")).await;
    let output = pair.reconcile().exits(exit::ERROR).await;
    output.says("another session is reconciling");
    db.exec("SELECT pg_advisory_unlock_all()").await;

    let pass: i64 = db.one(&format!("SELECT dedup.begin_reconcile('{run}')")).await;
    let (state, message) = db.fails(&format!("SELECT dedup.close_reconcile({pass})")).await;
    assert_eq!(state, "55000", "{message}");
    let chunk: String = db.one("SELECT min(chunk_id) FROM dedup.checkpoints").await;
    for garbage in ["\\x00", "\\xff", &format!("\\x{}", "ab".repeat(70))] {
        let (state, message) =
            db.fails(&format!("SELECT dedup.reconcile_chunk({pass}, '{chunk}', '{garbage}')")).await;
        assert_eq!(state, "22023", "{message}");
    }
    let (state, message) = db.fails(&format!("SELECT dedup.reconcile_chunk({pass}, 'none', '')")).await;
    assert_eq!(state, "42704", "{message}");
    let rest =
        format!("SELECT dedup.reconcile_chunk({pass}, chunk_id, '') FROM dedup.checkpoints WHERE chunk_no");
    db.exec(&format!("{rest} > 1")).await;
    let (state, message) = db.fails(&format!("SELECT dedup.settle_reconcile({pass})")).await;
    assert_eq!(state, "55000", "{message}");
    db.exec(&format!("{rest} = 1")).await;
    let (state, message) = db.fails(&format!("SELECT dedup.close_reconcile({pass})")).await;
    assert_eq!(state, "55000", "{message}");
    let counts = "SELECT string_agg(k::text, ',' ORDER BY chunk_id) FROM dedup.reconciled_chunks AS k";
    db.exec(&format!("SELECT dedup.settle_reconcile({pass})")).await;
    let once: String = db.one(counts).await;
    db.exec(&format!("SELECT dedup.settle_reconcile({pass})")).await;
    assert_eq!(db.one::<String>(counts).await, once, "settled twice");
    db.exec("UPDATE dedup.runs SET status = 'running'").await;
    assert_eq!(db.one::<String>(&format!("SELECT dedup.close_reconcile({pass})")).await, "abandoned");
    assert_eq!(statuses(db).await, [line(&["running", "abandoned"])]);
}

/// The queries that are shipped, as psql runs them.
#[tokio::test(flavor = "multi_thread")]
async fn the_queries_of_a_dba() {
    const QUERIES: &str = include_str!("../../../sql/queries/reconciliation.sql");
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    db.exec("DELETE FROM public.items WHERE n = 100").await;
    pair.reconcile().exits(exit::HALTED).await;
    let run: String = db.one("SELECT run_id::text FROM dedup.runs").await;
    let dropped: String =
        db.one("SELECT min(source_key) FROM dedup.duplicates WHERE source_key <> 'k=16000'").await;
    let file = pair.target_cluster.write_secret("reconciliation.sql", QUERIES);
    let output = pair.target_cluster.program(
        "psql",
        &[
            "-X",
            "-At",
            "-F",
            " ",
            "-d",
            "it",
            "-v",
            &format!("run={run}"),
            "-v",
            &format!("key={dropped}"),
            "-f",
            &file.display().to_string(),
        ],
    );
    let survivor: String =
        db.one(&format!("SELECT survivor FROM dedup.duplicates WHERE source_key = '{dropped}'")).await;
    for expected in [
        "public.items items 2000 1500 0 0 500 0".to_owned(),
        "items 1499".to_owned(),
        "mismatch f".to_owned(),
        "2000 1499 499 0 2 0 0 0 0 0".to_owned(),
        "missing items k=1000 ".to_owned(),
        "missing items k=16000 ".to_owned(),
        format!("{dropped} {survivor}"),
        "1:000001 verified".to_owned(),
    ] {
        assert!(output.contains(&expected), "no \"{expected}\" in\n{output}");
    }
    let books: Vec<&str> =
        output.lines().filter(|line| line.starts_with("1:") && line.contains(" verified ")).collect();
    assert!(books.len() > 10 && books.iter().all(|line| line.ends_with(" t")), "{books:?}");
}

/// A halted run is not stuck when the target's files are replaced, nor in a dump that is restored.
#[tokio::test(flavor = "multi_thread")]
async fn halted_and_rewritten() {
    let pair = items(&BY_NUMBER).await;
    pair.target
        .exec("CREATE TABLE saved AS TABLE public.items; DELETE FROM public.items WHERE n = 100")
        .await;
    pair.reconcile().exits(exit::HALTED).await;
    let restored = pair.restored().await;
    let (state, message) = restored.fails("UPDATE dedup.runs SET status = 'done'").await;
    assert_eq!(state, "23503", "{message}");

    pair.target.exec("VACUUM FULL public.items").await;
    pair.reconcile().exits(exit::ERROR).await.says("reindex_target");
    pair.target.exec("SELECT dedup.reindex_target('public.items')").await;
    // Who was dropped for the row is missing with it, whatever the index remembers.
    pair.reconcile().exits(exit::HALTED).await;
    assert_eq!(named(&pair.target, BY_NUMBER.number).await, ["missing 100", "missing 1600"]);
    pair.target.exec("INSERT INTO public.items SELECT * FROM saved WHERE n = 100").await;
    // It counts, though the index has no entry of it.
    pair.reconcile().exits(exit::DONE).await;
    assert_eq!(statuses(&pair.target).await[0][0].as_deref(), Some("reconciled"));
}

/// What is stored with a run is not executed as somebody else who reconciles it; an index for other columns is of no use to a run.
#[tokio::test(flavor = "multi_thread")]
async fn runs_that_are_not_ones_own() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (k int PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); INSERT INTO s SELECT n, n FROM generate_series(1, 9) AS n",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('local')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.s', 't'), dedup.plan_chunks('{run}')")).await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    db.exec("CREATE ROLE other SUPERUSER; SET ROLE other").await;
    let pass: i64 = db.one(&format!("SELECT dedup.begin_reconcile('{run}')")).await;
    for sql in
        [format!("SELECT dedup.reconcile('{run}')"), format!("SELECT dedup.reconcile_local_chunks({pass})")]
    {
        let (state, message) = db.fails(&sql).await;
        assert_eq!(state, "42501", "{sql}: {message}");
    }
    db.exec("RESET ROLE; SELECT dedup.forget_target('t')").await;
    let next: String = db.one("SELECT dedup.create_run('next')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{next}', 'public.s', 't', content_columns => '{{body}}'), dedup.plan_chunks('{next}')"
    ))
    .await;
    db.exec(&format!("CALL dedup.migrate_run('{next}')")).await;
    let (state, message) = db.fails(&format!("SELECT dedup.reconcile('{run}')")).await;
    assert_eq!(state, "55000", "{message}");
    assert!(message.contains("other columns"), "{message}");
}

/// A record that was dropped, and another source's row under the same key: both are as they should be.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_record_under_the_key_of_another_source() {
    let pair = Pair::start().await;
    pair.target.exec("CREATE TABLE public.it (id int PRIMARY KEY, v text)").await;
    for (name, row) in [("a", "(9, 'd')"), ("b", "(1, 'd')"), ("c", "(1, 'e')")] {
        pair.source.exec(&format!("CREATE TABLE public.{name} (id int PRIMARY KEY, v text); INSERT INTO public.{name} VALUES {row}; ANALYZE public.{name}")).await;
    }
    let tables = ["public.a=public.it", "public.b=public.it", "public.c=public.it"];
    let flags = [
        "--exclude-columns",
        "public.a:id",
        "--exclude-columns",
        "public.b:id",
        "--exclude-columns",
        "public.c:id",
    ];
    pair.run(&tables).args(&flags).workers(1).exits(exit::DONE).await;
    let rows = pair.target.column("SELECT t::text FROM public.it AS t ORDER BY id").await;
    assert_eq!(rows, ["(1,e)", "(9,d)"]);
    pair.reconcile().exits(exit::DONE).await;
}

/// A pass that was cut off after its last comparison, and before its verdict, finds the same when it is taken up.
#[tokio::test(flavor = "multi_thread")]
async fn cut_off_before_the_verdict() {
    for table in ["id int PRIMARY KEY, v text", "id text PRIMARY KEY, v text", "id int, v text"] {
        let pair = Pair::start().await;
        let db = &pair.target;
        db.exec(&format!(
            "CREATE TABLE public.src ({table}); CREATE TABLE public.it (LIKE public.src INCLUDING ALL); INSERT INTO public.src SELECT n, 'v' || n FROM generate_series(1, 100) AS n"
        ))
        .await;
        let run: String = db.one("SELECT dedup.create_run('r')::text").await;
        db.exec(&format!(
            "SELECT dedup.add_table('{run}', 'public.src', 'public.it'), dedup.plan_chunks('{run}')"
        ))
        .await;
        db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
        db.exec("DELETE FROM public.it WHERE v IN ('v7', 'v8', 'v9')").await;
        let pass: i64 = db.one(&format!("SELECT dedup.begin_reconcile('{run}')")).await;
        for step in ["recheck_chunks", "reconcile_local_chunks", "settle_reconcile"] {
            db.exec(&format!("SELECT dedup.{step}({pass})")).await;
        }
        db.exec("UPDATE public.it SET v = 'tampered' WHERE v = 'v1'").await;
        let missing: i64 =
            db.one(&format!("SELECT sum(missing_count)::int8 FROM dedup.reconcile('{run}')")).await;
        assert!(missing >= 3, "{missing} missing, {table}");
        assert_eq!(db.one::<String>("SELECT status FROM dedup.runs").await, "halted", "{table}");
    }
}

/// Without keys: two equal rows from before are as many as there were.
#[tokio::test(flavor = "multi_thread")]
async fn equal_rows_from_before() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.it (v text)").await;
    db.exec("INSERT INTO public.it VALUES ('old'), ('old')").await;
    pair.source.exec("INSERT INTO public.it VALUES ('new'); ANALYZE public.it").await;
    pair.run(&["public.it"]).exits(exit::DONE).await;
    pair.reconcile().exits(exit::DONE).await;
    db.exec("INSERT INTO public.it VALUES ('old')").await;
    pair.reconcile().exits(exit::DONE).await;
    let found = db.column("SELECT kind FROM dedup.divergences").await;
    assert_eq!(found, ["foreign"]);
}

/// Without keys: each run is compared by the columns that it delivers, and rows that were kept by those of their writer.
#[tokio::test(flavor = "multi_thread")]
async fn runs_of_different_columns() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE public.it (v text, n int, m int); CREATE TABLE public.sa (v text, n int); CREATE TABLE public.sb (LIKE public.it); \
         INSERT INTO public.sa VALUES ('x', 1), ('y', 1); INSERT INTO public.sb VALUES ('x', 7, 7), ('w', 8, 8)",
    )
    .await;
    let mut runs = Vec::new();
    for (source, options) in [("sa", r#"{"columns": ["v", "n"]}"#), ("sb", "{}")] {
        let run: String = db.one(&format!("SELECT dedup.create_run('{source}')::text")).await;
        db.exec(&format!("SELECT dedup.add_table('{run}', 'public.{source}', 'public.it', NULL, '{{v}}', '{options}'), dedup.plan_chunks('{run}')")).await;
        db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
        runs.push(run);
    }
    let rows = "SELECT t::text FROM public.it AS t ORDER BY 1";
    assert_eq!(db.column(rows).await, ["(w,8,8)", "(x,1,)", "(y,1,)"]);
    assert_eq!(db.column("SELECT DISTINCT status FROM dedup.runs").await, ["done"]);
    db.exec(&format!("SELECT dedup.rollback_run('{}', true)", runs[0])).await;
    assert_eq!(db.column(rows).await, ["(w,8,8)", "(x,1,)"]);
    // So that sums differ, and rows are looked at one by one.
    db.exec("INSERT INTO public.it VALUES ('foreign', 0, 0)").await;
    db.exec(&format!("SELECT dedup.reconcile('{}')", runs[1])).await;
    assert_eq!(db.column("SELECT kind FROM dedup.divergences").await, ["foreign"]);
    db.exec(&format!("SELECT dedup.rollback_run('{}')", runs[1])).await;
    assert_eq!(db.column(rows).await, ["(foreign,0,0)"]);
}

/// A hold does not end by writing that it has.
#[tokio::test(flavor = "multi_thread")]
async fn held_by_more_than_a_word() {
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    pair.source.exec("UPDATE public.items SET note = 'later' WHERE n = 7").await;
    pair.reconcile().exits(exit::DONE).await;
    pair.reconcile().arg("--strict").exits(exit::HALTED).await;
    pair.reconcile().exits(exit::HALTED).await;
    let release = "UPDATE dedup.reconciliations SET released_by = (SELECT max(reconciliation_id) FROM dedup.reconciliations WHERE verdict = 'clean') WHERE verdict = 'mismatch'";
    for by_hand in ["UPDATE dedup.runs SET status = 'rolled_back'", release] {
        let (state, message) = db.fails(by_hand).await;
        assert_eq!(state, "55000", "{message}");
    }
}
