//! Dry runs: what is foreseen is written down, the run is made, and the two are compared.

use std::process::Command;

use integration::db::Db;
use integration::pair::{DATABASE, Pair};
use integration::sidecar::exit;
use serde_json::Value;

/// What a dry run foresees of these tables.
async fn foresee(pair: &Pair, tables: &[&str], flags: &[&str], code: i32) -> Value {
    pair.run(tables).args(flags).args(&["--dry-run", "--json"]).exits(code).await.json()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// `sqlstate reason count` of what is refused, in order.
fn refusals(table: &Value) -> Vec<String> {
    let mut lines: Vec<String> = table["refused"]
        .as_array()
        .unwrap()
        .iter()
        .map(|refusal| {
            format!(
                "{} {} {}",
                refusal["sqlstate"].as_str().unwrap(),
                refusal["reason"].as_str().unwrap(),
                refusal["records"]
            )
        })
        .collect();
    lines.sort();
    lines
}

/// Whether a figure is within so much of what it was to be.
fn assert_near(what: &str, foreseen: &Value, real: i64, tolerance: f64) {
    let foreseen = number(foreseen);
    let off = (foreseen - real as f64).abs() / (real as f64).max(1.0);
    assert!(off <= tolerance, "{what}: {foreseen} foreseen, {real} in fact, {:.1} % off", off * 100.0);
}

const PACKAGES: &str = "CREATE TABLE public.packages (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, archive text NOT NULL, \
     package text NOT NULL, source text, version text NOT NULL, section text, priority text, maintainer text, homepage text, tags text[], description text); \
     CREATE INDEX ON public.packages (package)";

/// Fills the source with the package indexes of two architectures as the demonstration does: fetched once, generated without a network.
fn load_packages(pair: &Pair) {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let script = "set -eu; cd \"$1\"; . scripts/package_index.sh; for copy in .demo/packages.copy target/packages.copy; do if [ -s $copy ]; then \
         echo \"COPY packages ($PACKAGE_COLUMNS) FROM STDIN;\"; cat $copy; exit; fi; done; \
         if package_index_fetch target/apt target/packages.copy; then echo \"COPY packages ($PACKAGE_COLUMNS) FROM STDIN;\"; cat target/packages.copy; else package_index_generator; fi";
    let output = Command::new("bash").args(["-c", script, "bash", root]).output().expect("bash runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut sql = String::from_utf8(output.stdout).expect("package indexes are UTF-8");
    if sql.starts_with("COPY") {
        sql.push_str("\\.\n");
    }
    pair.source_cluster.program_fed("psql", &["-q", "-v", "ON_ERROR_STOP=1", "-d", DATABASE], &sql);
}

/// Real records: the dedup ratio within one hundredth, sizes within 15 %.
#[tokio::test(flavor = "multi_thread")]
async fn real_records() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both(PACKAGES).await;
    load_packages(&pair);
    pair.source.exec("ANALYZE public.packages").await;
    let flags =
        ["--exclude-columns", "public.packages:id,archive", "--chunk-size", "2MB", "--deadline", "1h"];
    let tables = ["public.packages"];
    let foreseen = foresee(&pair, &tables, &flags, exit::DONE).await;
    let sampled = foresee(&pair, &tables, &[&flags[..], &["--sample", "0.25"]].concat(), exit::DONE).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.packages").await, 0);

    let wal = "SELECT (wal_bytes - wal_fpi * 8192)::int8 FROM pg_stat_wal";
    db.exec("CHECKPOINT").await;
    let wal_before: i64 = db.one(wal).await;
    pair.run(&tables).args(&flags[..4]).exits(exit::DONE).await;
    db.exec("SELECT pg_sleep(1)").await;
    let wal_written = db.one::<i64>(wal).await - wal_before;
    let table = &foreseen["tables"][0];
    let books: Vec<i64> = db
        .one("SELECT ARRAY[sum(source_count), sum(inserted_count), sum(duplicate_count), sum(quarantined_count), sum(source_bytes)]::int8[] FROM dedup.checkpoints")
        .await;
    let [records, inserted, duplicates, quarantined, bytes] = books[..] else { panic!("{books:?}") };
    let size = |of: &str| format!("SELECT pg_{of}('public.packages')::int8");
    let relations = "SELECT sum(pg_total_relation_size(t))::int8 FROM unnest(ARRAY";
    let hash_index: i64 =
        db.one(&format!("{relations}['dedup.segment_block', 'dedup.segment']::regclass[]) AS t")).await;
    let ledger: i64 = db.one(&format!("{relations}['dedup.ledger_block']::regclass[]) AS t")).await;
    println!(
        "foreseen {foreseen}\nsampled {sampled}\nin fact {books:?}, hash index {hash_index}, ledger {ledger}, WAL {wal_written}"
    );

    assert_eq!((table["records"].as_i64(), quarantined), (Some(records), 0));
    assert_eq!(table["duplicates"].as_i64(), Some(duplicates));
    assert_eq!(table["inserted"].as_i64(), Some(inserted));
    assert_near("bytes", &table["bytes"], bytes, 0.001);
    let ratio = duplicates as f64 / records as f64;
    assert!((number(&table["dedup_ratio"]) - ratio).abs() < 0.01, "{} for {ratio}", table["dedup_ratio"]);
    assert_near("table", &table["table_bytes"], db.one(&size("table_size")).await, 0.15);
    assert_near("indexes", &table["index_bytes"], db.one(&size("indexes_size")).await, 0.15);
    assert_near("hash index", &table["hash_index_bytes"], hash_index, 0.15);
    assert_near("ledger", &table["ledger_bytes"], ledger, 0.15);
    assert_near("WAL", &table["wal_bytes"], wal_written, 0.15);
    assert_eq!(foreseen["deadline_kept"], true);

    // A quarter of the chunks tells sizes as well; of duplicates it is an estimate.
    let table = &sampled["tables"][0];
    assert_eq!(table["duplicates_are"], "estimated");
    assert_near("sampled records", &table["records"], records, 0.15);
    assert_near("sampled table", &table["table_bytes"], db.one(&size("table_size")).await, 0.15);
    assert!((number(&table["dedup_ratio"]) - ratio).abs() < 0.05, "{} for {ratio}", table["dedup_ratio"]);
}

/// Everything that refuses rows, foreseen and then met: checks, nulls, domains, lengths, partitions, unique constraints, foreign keys.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_target_refuses() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source
        .exec(
            "CREATE TABLE public.customers (id int PRIMARY KEY, name text); \
             CREATE TABLE public.orders (id int PRIMARY KEY, customer int, code text, amount int, email text, at date, note text); \
             INSERT INTO public.customers SELECT n, 'customer ' || n FROM generate_series(1, 200) AS n; \
             INSERT INTO public.orders SELECT n, n % 200 + 1, 'code ' || n, n, n || '@example.org', date '2024-01-01' + n % 300, 'note ' || n FROM generate_series(1, 3000) AS n; \
             UPDATE public.orders SET amount = -1 WHERE id % 500 = 1; UPDATE public.orders SET note = NULL WHERE id IN (10, 20, 30); \
             UPDATE public.orders SET email = 'nobody' WHERE id IN (11, 22); UPDATE public.orders SET code = repeat('x', 40) || id WHERE id = 77; \
             UPDATE public.orders SET at = '1999-01-01' WHERE id BETWEEN 100 AND 103; UPDATE public.orders SET code = 'code 200' WHERE id IN (2500, 2600); \
             UPDATE public.orders SET customer = 900 WHERE id IN (40, 41, 42, 43, 44); ANALYZE",
        )
        .await;
    db.exec(
        "CREATE DOMAIN public.email AS text CHECK (VALUE LIKE '%@%'); CREATE TABLE public.customers (id int PRIMARY KEY, name text); \
         CREATE TABLE public.orders (id int, customer int REFERENCES public.customers, code varchar(30), amount int CHECK (amount >= 0), email public.email, at date, note text NOT NULL, \
             PRIMARY KEY (id, at)) PARTITION BY RANGE (at); \
         CREATE TABLE public.orders_early PARTITION OF public.orders FOR VALUES FROM ('2024-01-01') TO ('2024-06-01'); \
         CREATE TABLE public.orders_late PARTITION OF public.orders FOR VALUES FROM ('2024-06-01') TO ('2025-01-01'); \
         CREATE UNIQUE INDEX ON public.orders (code, at)",
    )
    .await;
    // The two share a day with the order whose code they have.
    pair.source.exec("UPDATE public.orders AS o SET at = p.at FROM public.orders AS p WHERE p.id = 200 AND o.id IN (2500, 2600)").await;
    let tables = ["public.customers", "public.orders"];
    let foreseen = foresee(&pair, &tables, &["--chunk-size", "20kB"], exit::LEFT_ASIDE).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.orders").await, 0);
    assert_eq!(refusals(&foreseen["tables"][0]), [""; 0]);
    let wanted = [
        "22001 string_data_right_truncation 1",
        "23502 not_null_violation 3",
        "23503 foreign_key_violation 5",
        "23505 unique_violation 2",
        "23514 check_violation 2",
        "23514 check_violation 4",
        "23514 check_violation 6",
    ];
    assert_eq!(refusals(&foreseen["tables"][1]), wanted);
    pair.run(&tables).chunk_size("20kB").exits(exit::LEFT_ASIDE).await;
    let met = db
        .column("SELECT concat_ws(' ', sqlstate, reason, count(*)) FROM dedup.quarantine GROUP BY sqlstate, reason, message ~ 'partition', message ~ 'domain' ORDER BY 1")
        .await;
    assert_eq!(met, wanted);
    let inserted: i64 =
        db.one("SELECT sum(inserted_count)::int8 FROM dedup.checkpoints WHERE table_id = 2").await;
    assert_eq!(number(&foreseen["tables"][1]["inserted"]), inserted as f64);
}

/// A dry run leaves nothing: no row, no run, no number drawn from a sequence; and goes by the budget of refusals.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source.exec("CREATE TABLE public.items (id int PRIMARY KEY, body text); INSERT INTO public.items SELECT n, 'body ' || n % 700 FROM generate_series(1, 1000) AS n").await;
    db.exec("CREATE TABLE public.items (id int PRIMARY KEY, body text CHECK (body <> 'body 3'), no bigserial UNIQUE, at timestamptz NOT NULL DEFAULT now(), twice int GENERATED ALWAYS AS (id * 2) STORED)").await;
    let everything = "SELECT string_agg(format('%s %s', relname, pg_relation_size(oid)), ',' ORDER BY oid) || (SELECT last_value || ' ' || is_called FROM public.items_no_seq) \
         || (SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'items') FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'S')";
    let before: String = db.one(everything).await;
    let flags = ["--content-columns", "public.items:body", "--chunk-size", "4kB"];
    let foreseen = foresee(&pair, &["public.items"], &flags, exit::LEFT_ASIDE).await;
    let table = &foreseen["tables"][0];
    assert_eq!(refusals(table), ["23514 check_violation 2"]);
    assert_eq!((table["inserted"].as_i64(), table["duplicates"].as_i64()), (Some(699), Some(299)));
    let budget =
        foresee(&pair, &["public.items"], &[&flags[..], &["--error-budget", "0"]].concat(), exit::ERROR)
            .await;
    assert_eq!(budget["tables"][0]["chunks_over_budget"], 2);
    db.exec("SELECT pg_stat_force_next_flush(); SELECT pg_stat_clear_snapshot()").await;
    assert_eq!(db.one::<String>(everything).await, before);
    for table in ["runs", "targets", "checkpoints", "events"] {
        assert_eq!(db.one::<i64>(&format!("SELECT count(*) FROM dedup.{table}")).await, 0, "{table}");
    }
    let text = pair
        .run(&["public.items"])
        .args(&flags)
        .args(&["--dry-run", "--deadline", "1ms"])
        .exits(exit::ERROR)
        .await
        .stdout;
    for part in [
        "foreseen, nothing written",
        "= inserted   699",
        "+ duplicate  299 (29.90 %)",
        "2 check_violation (items_body_check)",
        "deadline 0s: MISSED",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    for flags in
        [&["--sample", "0.5"][..], &["--dry-run", "--sample", "0"], &["--dry-run", "--resume", "last"]]
    {
        pair.run(&["public.items"]).args(flags).exits(exit::USAGE).await;
    }
}

/// A second run: what stands there is told apart from what is new, replaced or repeated.
#[tokio::test(flavor = "multi_thread")]
async fn a_catch_up() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.items SELECT n, 'body ' || n % 1500 FROM generate_series(1, 2000) AS n; ANALYZE").await;
    let flags = ["--content-columns", "public.items:body", "--chunk-size", "10kB"];
    pair.run(&["public.items"]).args(&flags).exits(exit::DONE).await;
    pair.source
        .exec(
            "UPDATE public.items SET body = 'revised ' || id WHERE id BETWEEN 600 AND 629; \
             INSERT INTO public.items SELECT 3000 + n, 'new ' || n % 40 FROM generate_series(1, 100) AS n; INSERT INTO public.items SELECT 4000 + n, 'body ' || n + 100 FROM generate_series(1, 50) AS n",
        )
        .await;
    let foreseen = foresee(&pair, &["public.items"], &flags, exit::DONE).await;
    let table = &foreseen["tables"][0];
    pair.run(&["public.items"]).args(&flags).args(&["--name", "again"]).exits(exit::DONE).await;
    let books: Vec<i64> = db
        .one("SELECT ARRAY[sum(source_count), sum(inserted_count), sum(updated_count), sum(unchanged_count), sum(duplicate_count)]::int8[] FROM dedup.checkpoints JOIN dedup.runs USING (run_id) WHERE name = 'again'")
        .await;
    let told: Vec<i64> = ["records", "inserted", "updated", "unchanged", "duplicates"]
        .iter()
        .map(|of| table[*of].as_i64().unwrap())
        .collect();
    assert_eq!(told, books);
    assert_eq!(table["not_tried"].as_array().unwrap().len(), 0);
}

/// Rows that no run indexed: told apart by key, their contents are not known, and that is said.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_not_indexed() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text); INSERT INTO public.items SELECT n, 'body ' || n FROM generate_series(1, 100) AS n").await;
    pair.source.exec("UPDATE public.items SET body = 'other' WHERE id = 5; INSERT INTO public.items VALUES (200, 'new')").await;
    let foreseen = foresee(&pair, &["public.items"], &[], exit::DONE).await;
    let table = &foreseen["tables"][0];
    for (of, count) in [("unchanged", 99), ("updated", 1), ("inserted", 1), ("duplicates", 0)] {
        assert_eq!(table[of].as_i64(), Some(count), "{of}");
    }
    assert!(table["not_tried"][0].as_str().unwrap().contains("not indexed"), "{table}");
}

/// A table without a key, and two sources that share a target and its contents.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_and_into_one_target() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source.exec("CREATE TABLE public.a (line text); CREATE TABLE public.b (line text); INSERT INTO public.a SELECT 'line ' || n % 300 FROM generate_series(1, 500) AS n; INSERT INTO public.b SELECT 'line ' || n % 400 FROM generate_series(1, 500) AS n; ANALYZE").await;
    db.exec("CREATE TABLE public.log (line text)").await;
    let tables = ["public.a=public.log", "public.b=public.log"];
    let foreseen = foresee(&pair, &tables, &["--chunk-size", "2kB"], exit::DONE).await;
    pair.run(&tables).chunk_size("2kB").exits(exit::DONE).await;
    let (mut inserted, mut duplicates) = (0, 0);
    for table in foreseen["tables"].as_array().unwrap() {
        inserted += table["inserted"].as_i64().unwrap();
        duplicates += table["duplicates"].as_i64().unwrap();
    }
    let books: Vec<i64> = db
        .one("SELECT ARRAY[sum(inserted_count), sum(duplicate_count)]::int8[] FROM dedup.checkpoints")
        .await;
    assert_eq!([inserted, duplicates], books[..]);
    assert_eq!(inserted, 400);
}

/// Killed or interrupted, a dry run leaves nothing either; a run that is open refuses it as it refuses a run.
#[tokio::test(flavor = "multi_thread")]
async fn cut_off() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.items SELECT n, repeat('x', 100) || n FROM generate_series(1, 200000) AS n; ANALYZE").await;
    let running = pair.run(&["public.items"]).args(&["--dry-run", "--chunk-size", "100kB"]).spawn();
    db.wait_until("EXISTS (SELECT FROM pg_class WHERE relname = 'rehearsal_1')").await;
    running.interrupt();
    let output = running.finish().await;
    assert_eq!(output.code, Some(130), "{}", output.describe());
    db.wait_until("NOT EXISTS (SELECT FROM pg_class WHERE relname = 'rehearsal_1')").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.runs").await, 0);
    let run: String = db.one("SELECT dedup.create_run('open')::text").await;
    db.exec(&format!("SELECT dedup.add_table('{run}', 'public.items', 'public.items')")).await;
    pair.run(&["public.items"]).arg("--dry-run").exits(exit::ERROR).await.says(&run[..8]);
}

/// The same run into a staging database: it must be another one, with the same tables; the target is left alone.
#[tokio::test(flavor = "multi_thread")]
async fn into_staging() {
    let pair = Pair::start().await;
    let db = &pair.target;
    let table = "CREATE TABLE public.items (id int PRIMARY KEY, body text CHECK (body <> 'body 3'))";
    pair.source.exec("CREATE TABLE public.items (id int PRIMARY KEY, body text); INSERT INTO public.items SELECT n, 'BODY ' || n % 700 FROM generate_series(1, 1000) AS n").await;
    db.exec(table).await;
    db.exec("CREATE DATABASE staging").await;
    let staging = Db::connect(&pair.target_cluster, "staging").await;
    let url = pair.target_cluster.url("staging");
    let run = |to: &str| {
        let flags = [
            "--content-columns",
            "public.items:body",
            "--transform",
            "public.items:body=lower(body)",
            "--staging",
            to,
        ];
        pair.run(&["public.items"]).args(&flags)
    };
    run(&pair.target_cluster.url(DATABASE)).exits(exit::USAGE).await.says("the target itself");
    staging.exec("CREATE EXTENSION pg_dedup_migrate").await;
    run(&url).exits(exit::ERROR).await.says("pg_dump --schema-only");
    staging.exec("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    run(&url).exits(exit::ERROR).await.says("another one in the staging database").says("body 3");
    staging.exec("DROP TABLE public.items; CREATE TABLE public.items (id int PRIMARY KEY, body text CHECK (body <> 'body 3') DEFAULT 'other')").await;
    run(&url).exits(exit::ERROR).await.says("default 'other'");
    staging.exec("DROP TABLE public.items").await;
    staging.exec(table).await;
    run(&url).exits(exit::LEFT_ASIDE).await;
    assert_eq!(staging.column("SELECT name FROM dedup.runs").await, ["it (staging)"]);
    assert_eq!(staging.one::<i64>("SELECT count(*) FROM public.items").await, 699);
    for table in ["public.items", "dedup.runs"] {
        assert_eq!(db.one::<i64>(&format!("SELECT count(*) FROM {table}")).await, 0, "{table}");
    }
}

/// Defaults of columns that the source does not deliver are not let do anything; what is not tried is said.
#[tokio::test(flavor = "multi_thread")]
async fn defaults_do_nothing() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source.exec("CREATE TABLE public.items (id int PRIMARY KEY, body text); INSERT INTO public.items SELECT n, 'body ' || n FROM generate_series(1, 300) AS n").await;
    db.exec(
        "CREATE SEQUENCE public.numbers; CREATE TABLE public.log (id bigint); \
         CREATE FUNCTION public.next_id() RETURNS bigint LANGUAGE sql AS 'INSERT INTO public.log VALUES (nextval(''public.numbers'')) RETURNING id'; \
         CREATE FUNCTION public.gate() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; \
         CREATE TABLE public.items (id int PRIMARY KEY, body text, uid bigint NOT NULL DEFAULT public.next_id(), no text NOT NULL DEFAULT 'ORD-' || nextval('public.numbers') CHECK (no LIKE 'ORD-%'), \
             at timestamptz NOT NULL DEFAULT now(), serial bigserial UNIQUE); \
         CREATE TRIGGER gate BEFORE INSERT ON public.items FOR EACH ROW EXECUTE FUNCTION public.gate()",
    )
    .await;
    let foreseen =
        foresee(&pair, &["public.items"], &["--content-columns", "public.items:body"], exit::DONE).await;
    let table = &foreseen["tables"][0];
    assert_eq!(table["inserted"].as_i64(), Some(300));
    let said = table["not_tried"].to_string();
    for part in ["column uid", "column no", "triggers: gate"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    for unmoved in ["public.numbers", "public.items_serial_seq"] {
        assert!(!db.one::<bool>(&format!("SELECT is_called FROM {unmoved}")).await, "{unmoved}");
    }
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.log").await, 0);
}

/// Of records with one content the next is tried when one is refused, as a run does it.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_of_a_content() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source.exec("CREATE TABLE public.items (id int PRIMARY KEY, body text, note text); INSERT INTO public.items SELECT n, 'body ' || n % 50, CASE WHEN n > 50 THEN 'note' END FROM generate_series(1, 500) AS n").await;
    db.exec("CREATE TABLE public.items (id int PRIMARY KEY, body text, note text NOT NULL)").await;
    let flags = ["--content-columns", "public.items:body"];
    let foreseen = foresee(&pair, &["public.items"], &flags, exit::LEFT_ASIDE).await;
    pair.run(&["public.items"]).args(&flags).exits(exit::LEFT_ASIDE).await;
    let books: Vec<i64> = db.one("SELECT ARRAY[sum(inserted_count), sum(duplicate_count), sum(quarantined_count)]::int8[] FROM dedup.checkpoints").await;
    let table = &foreseen["tables"][0];
    let refused = table["refused"][0]["records"].as_i64();
    assert_eq!(
        [table["inserted"].as_i64(), table["duplicates"].as_i64(), refused],
        [Some(books[0]), Some(books[1]), Some(books[2])]
    );
}

/// Keys and unique values that sources of one target share; foreign keys with duplicates, of other types, null in part.
#[tokio::test(flavor = "multi_thread")]
async fn between_records() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source
        .exec(
            "CREATE TABLE public.a (id int PRIMARY KEY, email text); CREATE TABLE public.b (LIKE public.a INCLUDING ALL); \
             INSERT INTO public.a SELECT n, 'a' || n FROM generate_series(1, 300) AS n; INSERT INTO public.b SELECT n + 200, CASE WHEN n > 250 THEN 'a' || n - 250 ELSE 'b' || n END FROM generate_series(1, 300) AS n; \
             CREATE TABLE public.c (id int PRIMARY KEY, kind text, place text, x int, y int); \
             INSERT INTO public.c SELECT n, 'kind ' || n % 5, 'place', CASE WHEN n <= 10 THEN 1 END, CASE WHEN n <= 10 THEN 1 WHEN n <= 13 THEN 2 END FROM generate_series(1, 100) AS n; \
             UPDATE public.c SET kind = 'a kind that is much too long' WHERE id = 50",
        )
        .await;
    db.exec(
        "CREATE TABLE public.t (id int PRIMARY KEY, email text UNIQUE); \
         CREATE TABLE public.kinds (kind varchar(10) PRIMARY KEY); INSERT INTO public.kinds SELECT 'kind ' || n FROM generate_series(0, 3) AS n; \
         CREATE TABLE public.points (x int, y int, PRIMARY KEY (x, y)); INSERT INTO public.points VALUES (1, 1); \
         CREATE TABLE public.c (id int PRIMARY KEY, kind varchar(10) REFERENCES public.kinds, place text, x int, y int, FOREIGN KEY (x, y) REFERENCES public.points MATCH FULL)",
    )
    .await;
    let tables = ["public.a=public.t", "public.b=public.t", "public.c"];
    let flags = ["--content-columns", "public.c:kind,place,x,y"];
    let foreseen = foresee(&pair, &tables, &flags, exit::LEFT_ASIDE).await;
    pair.run(&tables).args(&flags).exits(exit::LEFT_ASIDE).await;
    let mut told: Vec<String> = foreseen["tables"].as_array().unwrap().iter().flat_map(refusals).collect();
    told.sort();
    let met = db.column("SELECT concat_ws(' ', sqlstate, reason, count(*)) FROM dedup.quarantine GROUP BY sqlstate, reason, message ~ 'kind_fkey' ORDER BY 1").await;
    // 100 keys and 50 addresses are shared.
    assert_eq!(
        told,
        [
            "22001 string_data_right_truncation 1",
            "23503 foreign_key_violation 20",
            "23503 foreign_key_violation 3",
            "23505 key_collision 100",
            "23505 unique_violation 50"
        ]
    );
    assert_eq!(told, met);
    let books: Vec<i64> = db.one("SELECT ARRAY[sum(inserted_count), sum(duplicate_count)]::int8[] FROM dedup.checkpoints WHERE table_id = 3").await;
    let table = &foreseen["tables"][2];
    assert_eq!([table["inserted"].as_i64(), table["duplicates"].as_i64()], [Some(books[0]), Some(books[1])]);
}

/// Tables that a temporary table cannot be like in everything: it is tried with less, and said.
#[tokio::test(flavor = "multi_thread")]
async fn awkward_targets() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.source.exec("CREATE TABLE public.a (id int PRIMARY KEY, at date, body text); INSERT INTO public.a SELECT n, date '2024-01-01' + n % 200, 'body ' || n FROM generate_series(1, 300) AS n; CREATE TABLE public.b (LIKE public.a INCLUDING ALL); INSERT INTO public.b TABLE public.a").await;
    db.exec(
        "CREATE TABLE public.a (id int, at date, body text, CONSTRAINT partitions CHECK (body <> 'body 7'), PRIMARY KEY (id, at)) PARTITION BY RANGE (at); \
         CREATE TABLE public.a_2024 PARTITION OF public.a (CONSTRAINT only_here CHECK (body <> 'body 8')) FOR VALUES FROM ('2024-01-01') TO ('2025-01-01'); \
         CREATE TABLE public.b (id int PRIMARY KEY, at date, body text); ALTER TABLE public.b ADD CHECK (b IS NOT NULL)",
    )
    .await;
    let foreseen = foresee(&pair, &["public.a", "public.b"], &[], exit::LEFT_ASIDE).await;
    assert_eq!(refusals(&foreseen["tables"][0]), ["23514 check_violation 1"]);
    assert!(foreseen["tables"][0]["not_tried"].to_string().contains("only_here"), "{foreseen}");
    assert!(foreseen["tables"][1]["not_tried"].to_string().contains("check constraints"), "{foreseen}");
    assert_eq!(foreseen["tables"][1]["inserted"].as_i64(), Some(300));
}

/// The session that asks the questions at the end was lost meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_session() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.items SELECT n, repeat('x', 100) || n FROM generate_series(1, 200000) AS n; ANALYZE").await;
    let running = pair.run(&["public.items"]).args(&["--dry-run", "--json", "--chunk-size", "100kB"]).spawn();
    db.wait_until("EXISTS (SELECT FROM pg_class WHERE relname = 'rehearsal_1')").await;
    db.exec("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'pg-dedup-migrate/%'").await;
    let output = running.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    let table = &output.json()["tables"][0];
    assert_eq!((table["records"].as_i64(), table["inserted"].as_i64()), (Some(200_000), Some(200_000)));
}
