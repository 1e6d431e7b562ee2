//! Sampled reconciliation: of what is in the sample exactly what differs is named, and a clean sample settles nothing.

use integration::pair::Pair;
use integration::sidecar::{exit, failpoint};

use crate::reconcile::{
    BY_NUMBER, BY_TEXT, BY_TWO, Items, items, line, named, put_in_a_strange_row, statuses, tamper,
};

/// 1 - 2^-40: everything that was written or dropped.
const NEARLY_ALL: &str = "0.9999999999990905";

/// What a full pass named, of contents in this part of all digests: the record's content decides.
async fn full_of(pair: &Pair, kind: &Items, below: &str) -> Vec<String> {
    let number = kind.number;
    pair.target
        .column(&format!(
            "SELECT d.kind || ' ' || {number} FROM dedup.divergences AS d JOIN dedup.reconciliations USING (reconciliation_id) \
             WHERE sample = 1 AND d.content_hash < '{below}' AND d.kind <> 'foreign' ORDER BY 1"
        ))
        .await
}

async fn a_part_of_what_a_full_pass_names(kind: &Items) {
    let pair = items(kind).await;
    let db = &pair.target;
    tamper(db, kind).await;
    put_in_a_strange_row(db, kind).await;
    pair.reconcile().exits(exit::HALTED).await;
    for (sample, below) in [(NEARLY_ALL, "\\xffff"), ("0.5", "\\x80")] {
        let wanted = full_of(&pair, kind, below).await;
        assert!(!wanted.is_empty(), "nothing to find at {sample}");
        pair.reconcile().args(&["--sample", sample]).exits(exit::HALTED).await;
        assert_eq!(named(db, kind.number).await, wanted, "at {sample}");
    }
    let looked_at: i64 = db
        .one("SELECT sum(source_count)::int8 FROM dedup.reconciled_chunks JOIN dedup.reconciliations USING (reconciliation_id) WHERE sample = 0.5")
        .await;
    assert!((850..1150).contains(&looked_at), "{looked_at} of 2,000 records at 0.5");
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.sampled_keys").await, 0);

    // Mended, a sample is clean; the run is held until a full pass is.
    db.exec("DELETE FROM public.items; INSERT INTO public.items TABLE saved").await;
    let output = pair.reconcile().args(&["--sample", "0.5"]).exits(exit::HALTED).await;
    assert!(output.stdout.contains("a sample is clean, halted"), "{}", output.describe());
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.reconciliations WHERE holds IS NOT NULL").await, 3);
    let (state, message) = db
        .fails("UPDATE dedup.reconciliations SET released_by = (SELECT max(reconciliation_id) FROM dedup.reconciliations) WHERE holds IS NOT NULL")
        .await;
    assert_eq!(state, "23503", "{message}");
    pair.reconcile().exits(exit::DONE).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.reconciliations WHERE holds IS NOT NULL").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn by_number() {
    a_part_of_what_a_full_pass_names(&BY_NUMBER).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_text() {
    a_part_of_what_a_full_pass_names(&BY_TEXT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_two_columns() {
    a_part_of_what_a_full_pass_names(&BY_TWO).await;
}

/// A clean sample says so, and no more: the run is not reconciled by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_clean_sample_settles_nothing() {
    let pair = items(&BY_NUMBER).await;
    let output = pair.reconcile().args(&["--sample", "0.2"]).exits(exit::DONE).await;
    assert!(output.stdout.contains("a sample is clean, done"), "{}", output.describe());
    assert!(output.stdout.contains("with a confidence of 95 % fewer than 1 in "), "{}", output.describe());
    assert_eq!(statuses(&pair.target).await, [line(&["done", "clean"])]);
    let events = pair
        .target
        .column("SELECT kind FROM dedup.events WHERE kind IN ('sample_clean', 'reconciled')")
        .await;
    assert_eq!(events, ["sample_clean"]);
}

/// A run that found everything unchanged rests on rows of the one before: they are in its samples.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_a_run_found_unchanged() {
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    pair.run(&["public.items"])
        .args(&["--content-columns", "public.items:body", "--name", "again"])
        .chunk_size("3kB")
        .exits(exit::DONE)
        .await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.ordinals AS o JOIN dedup.segment AS s ON o.ordinal BETWEEN first_ordinal AND last_ordinal JOIN dedup.runs USING (run_id) WHERE name = 'again'").await, 0);
    db.exec(
        "UPDATE public.items SET note = 'tampered' WHERE n = 700; DELETE FROM public.items WHERE n = 800",
    )
    .await;
    pair.reconcile().args(&["--sample", NEARLY_ALL]).exits(exit::HALTED).await;
    assert_eq!(named(db, BY_NUMBER.number).await, ["changed 700", "missing 800"]);
    // It is repaired as what a full pass found.
    pair.repair().exits(exit::DONE).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items").await, 1500);
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.items WHERE note = 'tampered'").await, 0);
}

/// Records that changed in the source since, and records that went: told, and a mismatch only where one asks for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_lives_on() {
    let pair = items(&BY_NUMBER).await;
    let sample = ["--sample", NEARLY_ALL];
    pair.source.exec("UPDATE public.items SET body = 'other' WHERE n = 7; UPDATE public.items SET note = 'other' WHERE n = 8; DELETE FROM public.items WHERE n = 9").await;
    pair.reconcile().args(&sample).exits(exit::DONE).await;
    let wanted = ["source_changed 7", "source_changed 8", "source_changed 9"];
    assert_eq!(named(&pair.target, BY_NUMBER.number).await, wanted);
    pair.reconcile().args(&sample).arg("--strict").exits(exit::HALTED).await;
    assert_eq!(named(&pair.target, BY_NUMBER.number).await, wanted);
}

/// Keys that are of other types in the source, computed, spelled in several ways, or full of what has to be quoted; a filter that ends in a comment.
#[tokio::test(flavor = "multi_thread")]
async fn keys_are_found_in_the_source() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source
        .exec(
            "CREATE TABLE public.a (k int PRIMARY KEY, body text); CREATE TABLE public.b (at timestamptz, name text, body text, PRIMARY KEY (at, name)); \
             CREATE TABLE public.c (k numeric PRIMARY KEY, body text); \
             INSERT INTO public.a SELECT n, 'a' || n FROM generate_series(1, 300) AS n; \
             INSERT INTO public.b SELECT '2024-02-29 12:00:00.123456+00'::timestamptz + n * interval '1 day', E'{\"it''s\\\\,' || n || '} NULL', 'b' || n FROM generate_series(1, 300) AS n; \
             INSERT INTO public.c SELECT n + 0.5, 'c' || n FROM generate_series(1, 300) AS n; ANALYZE",
        )
        .await;
    db.exec(
        "CREATE TABLE public.a (k bigint PRIMARY KEY, body text); CREATE TABLE public.b (at timestamptz, name text, body text, PRIMARY KEY (at, name)); \
         CREATE TABLE public.c (k numeric(12,2) PRIMARY KEY, body text)",
    )
    .await;
    pair.run(&["public.a", "public.b", "public.c"])
        .args(&["--where", "public.a:k <= 200 -- and no more", "--transform", "public.c:k=k * 2 + 1"])
        .chunk_size("2kB")
        .exits(exit::DONE)
        .await;
    let sample = ["--sample", NEARLY_ALL];
    pair.reconcile().args(&sample).exits(exit::DONE).await;
    assert_eq!(db.one::<i64>("SELECT sum(present_count)::int8 FROM dedup.reconciled_chunks").await, 800);
    db.exec("DELETE FROM public.a WHERE k = 200; UPDATE public.b SET body = 'x' WHERE name LIKE '%,77}%'; DELETE FROM public.c WHERE k = 22").await;
    pair.reconcile().args(&sample).exits(exit::HALTED).await;
    let found = db.column("SELECT g.target::text || ' ' || kind FROM dedup.divergences AS d JOIN dedup.targets AS g USING (target_id) ORDER BY 1").await;
    assert_eq!(found, ["a missing", "b changed", "c missing"]);
}

/// Sources that the target database sees; tables without a key, which no sample has.
#[tokio::test(flavor = "multi_thread")]
async fn in_sql() {
    let pair = Pair::start().await;
    let db = &pair.target;
    db.exec(
        "CREATE TABLE s (k text PRIMARY KEY, body text); CREATE TABLE t (LIKE s INCLUDING ALL); CREATE TABLE ks (body text); CREATE TABLE kt (body text); \
         INSERT INTO s SELECT 'key ' || n, 'body ' || n % 500 FROM generate_series(1, 600) AS n; INSERT INTO ks SELECT 'line ' || n FROM generate_series(1, 50) AS n",
    )
    .await;
    let run: String = db.one("SELECT dedup.create_run('both')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{run}', 'public.s', 't', content_columns => '{{body}}'), dedup.add_table('{run}', 'public.ks', 'kt'), dedup.plan_chunks('{run}', 5000)"
    ))
    .await;
    db.exec(&format!("CALL dedup.migrate_run('{run}')")).await;
    let books = |sample: &str| {
        format!(
            "SELECT format('%s %s %s', sum(present_count), sum(duplicate_count), count(*) FILTER (WHERE table_id = 2)) FROM dedup.reconcile('{run}', {sample})"
        )
    };
    assert_eq!(db.one::<String>(&books(NEARLY_ALL)).await, "500 100 0");
    assert_eq!(db.one::<String>(&books("1.0")).await, "550 100 1");
    for sample in ["0", "-1", "1.1", "'NaN'", "NULL"] {
        let (state, message) = db.fails(&books(sample)).await;
        assert_eq!(state, "22023", "{sample}: {message}");
    }
    let keyless: String = db.one("SELECT dedup.create_run('keyless')::text").await;
    db.exec(&format!(
        "SELECT dedup.add_table('{keyless}', 'public.ks', 'kt'), dedup.plan_chunks('{keyless}')"
    ))
    .await;
    db.exec(&format!("CALL dedup.migrate_run('{keyless}')")).await;
    let (state, message) = db.fails(&format!("SELECT dedup.reconcile('{keyless}', 0.5)")).await;
    assert_eq!(state, "0A000", "{message}");

    db.exec("DELETE FROM t WHERE body = 'body 77'").await;
    db.exec(&format!("SELECT FROM dedup.reconcile('{run}', {NEARLY_ALL})")).await;
    let found = db.column("SELECT kind || ' ' || convert_from(packed_key, 'UTF8') FROM dedup.divergences WHERE state = 'open' ORDER BY 1").await;
    assert_eq!(found, ["missing key 577", "missing key 77"]);
    assert_eq!(db.one::<String>("SELECT status FROM dedup.runs WHERE name = 'both'").await, "halted");
}

/// Killed at several points, a sampled pass goes on with what it had drawn.
#[tokio::test(flavor = "multi_thread")]
async fn killed_and_taken_up() {
    let pair = items(&BY_NUMBER).await;
    let db = &pair.target;
    db.exec("DELETE FROM public.items WHERE n IN (5, 1400)").await;
    let sample = ["--sample", NEARLY_ALL];
    for point in [failpoint::READ, failpoint::BEFORE_COMMIT, failpoint::AFTER_COMMIT] {
        pair.reconcile().args(&sample).workers(1).killed_at(&format!("{point}@2")).await;
        db.wait_until(
            "NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'pg-dedup-migrate%')",
        )
        .await;
    }
    let done: i64 = db.one("SELECT count(*) FROM dedup.reconciled_chunks").await;
    assert!(done >= 2, "{done} chunks compared");
    pair.reconcile().args(&sample).exits(exit::HALTED).await;
    assert_eq!(named(db, BY_NUMBER.number).await, ["missing 1400", "missing 1505", "missing 5"]);
    assert_eq!(statuses(db).await, [line(&["halted", "mismatch"])]);
}

/// Keys that the source has in other types, or computes: what they are there only its records tell.
#[tokio::test(flavor = "multi_thread")]
async fn keys_of_other_types() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source
        .exec(
            "CREATE TABLE public.a (k varchar(5) PRIMARY KEY, body text); INSERT INTO public.a SELECT 'k' || n, 'a' || n FROM generate_series(1, 300) AS n; \
             CREATE TABLE public.b (k text PRIMARY KEY, body text); INSERT INTO public.b VALUES ('sad', '1'), ('happy', '2'), ('calm', '3'); \
             CREATE TABLE public.c (k int PRIMARY KEY, body text); INSERT INTO public.c SELECT n, 'c' || n FROM generate_series(1, 300) AS n; ANALYZE",
        )
        .await;
    db.exec(
        "CREATE TYPE public.mood AS ENUM ('sad', 'calm', 'happy'); CREATE DOMAIN public.number AS numeric(12,2); \
         CREATE TABLE public.a (k char(5) PRIMARY KEY, body text); CREATE TABLE public.b (k public.mood PRIMARY KEY, body text); CREATE TABLE public.c (k public.number PRIMARY KEY, body text)",
    )
    .await;
    pair.run(&["public.a", "public.b", "public.c"]).chunk_size("3kB").exits(exit::DONE).await;
    let sample = ["--sample", NEARLY_ALL];
    pair.reconcile().args(&sample).exits(exit::DONE).await;
    assert_eq!(db.one::<i64>("SELECT sum(present_count)::int8 FROM dedup.reconciled_chunks").await, 603);
    db.exec("DELETE FROM public.a WHERE k = 'k7'; UPDATE public.a SET body = 'x' WHERE k = 'k8'; DELETE FROM public.b WHERE k = 'calm'; DELETE FROM public.c WHERE k = 5").await;
    pair.reconcile().args(&sample).exits(exit::HALTED).await;
    let found = db.column("SELECT g.target::text || ' ' || kind FROM dedup.divergences AS d JOIN dedup.targets AS g USING (target_id) ORDER BY 1").await;
    assert_eq!(found, ["a changed", "a missing", "b missing", "c missing"]);
}

/// Entries of a run that delivered other columns: their row digests are those of other rows.
#[tokio::test(flavor = "multi_thread")]
async fn entries_of_other_columns() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source
        .exec("INSERT INTO public.items SELECT n, 'body ' || n FROM generate_series(1, 300) AS n")
        .await;
    let run = |name: &str| {
        pair.run(&["public.items"])
            .args(&["--content-columns", "public.items:body", "--name", name])
            .chunk_size("3kB")
    };
    run("first").exits(exit::DONE).await;
    pair.both("ALTER TABLE public.items ADD note text DEFAULT 'note'").await;
    run("second").exits(exit::DONE).await;
    db.exec("DELETE FROM public.items WHERE id = 7; UPDATE public.items SET note = 'tampered' WHERE id = 8")
        .await;
    // Somewhere else in the chunk the source goes on.
    pair.source.exec("UPDATE public.items SET body = 'new' WHERE id = 9").await;
    for sample in [NEARLY_ALL, "1"] {
        pair.reconcile().args(&["--sample", sample]).exits(exit::HALTED).await;
        let found = named(db, "substring(d.key, 4)::int8").await;
        assert_eq!(found, ["changed 8", "missing 7", "source_changed 9"], "at {sample}");
    }
}

/// A content that moved to another key is there, in a sample as in a full pass; and a sample neither ends a whole pass that was cut off nor what one found.
#[tokio::test(flavor = "multi_thread")]
async fn beside_a_full_pass() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source.exec("CREATE TABLE public.a (id int PRIMARY KEY, body text); CREATE TABLE public.b (LIKE public.a INCLUDING ALL); \
        INSERT INTO public.a SELECT n, 'body ' || n FROM generate_series(1, 300) AS n; INSERT INTO public.b SELECT 1000 + n, 'body ' || n FROM generate_series(1, 300) AS n").await;
    db.exec("CREATE TABLE public.t (id int PRIMARY KEY, body text)").await;
    for (source, name) in [("public.a", "a"), ("public.b", "b")] {
        pair.run(&[&format!("{source}=public.t")])
            .args(&["--content-columns", &format!("{source}:body"), "--name", name])
            .chunk_size("3kB")
            .exits(exit::DONE)
            .await;
    }
    db.exec("UPDATE public.t SET id = id + 100000 WHERE id = 5").await;
    pair.reconcile().workers(1).killed_at(&format!("{}@2", failpoint::AFTER_COMMIT)).await;
    db.wait_until(
        "NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'pg-dedup-migrate%')",
    )
    .await;
    pair.reconcile().args(&["--sample", NEARLY_ALL]).exits(exit::DONE).await;
    assert_eq!(
        db.column("SELECT verdict FROM dedup.reconciliations ORDER BY reconciliation_id").await,
        ["open", "clean"]
    );
    pair.reconcile().exits(exit::DONE).await;
    assert_eq!(
        db.column("SELECT verdict FROM dedup.reconciliations ORDER BY reconciliation_id").await,
        ["clean", "clean"]
    );
    // A sample that was cut off keeps what was drawn for it while a whole pass ends.
    let sample = ["--sample", NEARLY_ALL];
    pair.reconcile().args(&sample).workers(1).killed_at(&format!("{}@2", failpoint::AFTER_COMMIT)).await;
    db.wait_until(
        "NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'pg-dedup-migrate%')",
    )
    .await;
    pair.reconcile().exits(exit::DONE).await;
    db.exec("CREATE TABLE public.saved AS TABLE public.t; UPDATE public.t SET body = body || ' tampered' WHERE id > 200").await;
    pair.reconcile().args(&sample).exits(exit::HALTED).await;
    db.exec("DELETE FROM public.t; INSERT INTO public.t TABLE public.saved").await;
    pair.reconcile().exits(exit::DONE).await;
    db.exec("DELETE FROM public.t WHERE body IN ('body 6', 'body 7')").await;
    pair.reconcile().exits(exit::HALTED).await;
    pair.reconcile().args(&["--sample", "0.05"]).output().await;
    assert_eq!(
        db.one::<i64>("SELECT count(DISTINCT packed_key) FROM dedup.divergences WHERE state = 'open'").await,
        2
    );
}
