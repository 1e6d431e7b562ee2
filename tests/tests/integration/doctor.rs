//! What `doctor` finds, each by name and with what to change, and that it writes nothing.

use integration::cluster::Cluster;
use integration::db::Db;
use integration::pair::{DATABASE, Pair};
use integration::pooler::Pooler;
use integration::sidecar::{Invocation, Output, exit};

/// Findings as `level subject: message -> hint`.
fn findings(output: &Output) -> Vec<String> {
    let json = output.json();
    let found = json["findings"].as_array().unwrap_or_else(|| panic!("{}", output.describe()));
    found
        .iter()
        .map(|f| {
            let text = |name: &str| f[name].as_str().unwrap_or_default().to_owned();
            format!("{} {}: {} -> {}", text("level"), text("subject"), text("message"), text("hint"))
        })
        .collect()
}

/// One of the findings begins with the first and holds the others.
fn assert_found(output: &Output, begin: &str, parts: &[&str]) {
    let found = findings(output);
    assert!(
        found.iter().any(|f| f.starts_with(begin) && parts.iter().all(|part| f.contains(part))),
        "{begin} … {parts:?} is not among\n{}",
        found.join("\n")
    );
}

async fn doctor(pair: &Pair, table: &str, code: i32) -> Output {
    pair.sidecar("doctor").args(&["--json", "--table", table]).exits(code).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_cannot_be_loaded_are_named() {
    let pair = Pair::start().await;
    for table in ["plain", "unlogged", "hidden", "locked"] {
        pair.both(&format!("CREATE TABLE public.{table} (id int PRIMARY KEY, x text)")).await;
    }
    pair.target
        .exec(
            "ALTER TABLE public.unlogged SET UNLOGGED; \
             CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw; \
             CREATE FOREIGN TABLE public.far (id int, x text) SERVER files OPTIONS (filename '/dev/null')",
        )
        .await;
    pair.source.exec("CREATE TABLE public.far (id int PRIMARY KEY, x text)").await;
    let output = doctor(&pair, "public.plain", exit::DONE).await;
    assert_eq!(output.json()["blockers"], 0, "{}", output.describe());
    for (table, parts) in [
        ("public.unlogged", ["not a logged table", "SET LOGGED"]),
        ("public.far", ["is not a table", "ordinary or a partitioned"]),
    ] {
        let output = doctor(&pair, table, exit::ERROR).await;
        assert_found(&output, &format!("blocker {table}:"), &parts);
    }
    let runs: i64 = pair.target.one("SELECT count(*) FROM dedup.runs").await;
    assert_eq!(runs, 0, "doctor wrote something");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_works_badly_is_warned_of() {
    let pair = Pair::start().await;
    pair.source.exec("CREATE TABLE public.logs (at int, line text); SELECT lo_create(4711)").await;
    pair.target.exec("CREATE TABLE public.logs (at int, line text)").await;
    pair.both("CREATE TABLE public.t (id int PRIMARY KEY, x text)").await;
    pair.source.exec("ALTER TABLE public.t DROP CONSTRAINT t_pkey").await;
    pair.target
        .exec(
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; \
             CREATE TRIGGER before_it BEFORE INSERT ON public.t FOR EACH ROW EXECUTE FUNCTION f(); \
             CREATE TRIGGER after_it AFTER INSERT ON public.t FOR EACH ROW EXECUTE FUNCTION f(); \
             SELECT pg_create_physical_replication_slot('forgotten', true)",
        )
        .await;
    let output = doctor(&pair, "public.logs", exit::DONE).await;
    assert_found(&output, "warning public.logs:", &["no usable key", "unique index"]);
    assert_found(&output, "warning source:", &["large objects"]);
    let output = doctor(&pair, "public.t", exit::DONE).await;
    assert_found(
        &output,
        "warning public.t:",
        &["no index of the source", "CREATE INDEX CONCURRENTLY ON \"public\".\"t\" (\"id\")"],
    );
    assert_found(&output, "warning public.t:", &["trigger before_it runs before each row", "verification"]);
    assert_found(&output, "note public.t:", &["trigger after_it will fire"]);
    assert_found(&output, "warning target:", &["inactive replication slot", "max_slot_wal_keep_size"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_preloaded_is_told_the_line() {
    let source = Cluster::start(&[]);
    let target = Cluster::start(&[]);
    for cluster in [&source, &target] {
        Db::connect(cluster, "postgres").await.exec(&format!("CREATE DATABASE {DATABASE}")).await;
        Db::connect(cluster, DATABASE).await.exec("CREATE TABLE public.t (id int PRIMARY KEY, x text)").await;
    }
    let run = |command: &str| {
        Invocation::new(command).args(&[
            "--source",
            &source.url(DATABASE),
            "--target",
            &target.url(DATABASE),
            "--table",
            "public.t",
        ])
    };
    let output = run("doctor").arg("--json").exits(exit::ERROR).await;
    assert_found(
        &output,
        "blocker target:",
        &["not preloaded", "shared_preload_libraries = 'pg_dedup_migrate'"],
    );
    assert_found(&output, "blocker target:", &["is not installed", "CREATE EXTENSION pg_dedup_migrate"]);
    Db::connect(&target, DATABASE).await.exec("CREATE EXTENSION pg_dedup_migrate").await;
    let output = run("doctor").arg("--json").exits(exit::ERROR).await;
    assert_found(&output, "blocker target:", &["not preloaded", "restart"]);
    run("run").exits(exit::ERROR).await.says("shared_preload_libraries");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileges_rows_that_are_hidden_and_encodings() {
    let pair = Pair::start().await;
    pair.both(
        "CREATE TABLE public.t (id int PRIMARY KEY, x text); CREATE TABLE public.h (id int PRIMARY KEY, x text); \
         CREATE ROLE poor LOGIN; ALTER TABLE public.h ENABLE ROW LEVEL SECURITY; GRANT SELECT ON public.h TO poor",
    )
    .await;
    pair.target
        .exec(
            "GRANT USAGE ON SCHEMA dedup TO poor; GRANT EXECUTE ON ALL ROUTINES IN SCHEMA dedup TO poor; \
             GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA dedup TO poor; \
             GRANT USAGE ON ALL SEQUENCES IN SCHEMA dedup TO poor; GRANT INSERT, UPDATE, DELETE ON public.h TO poor",
        )
        .await;
    let url = |cluster: &Cluster| cluster.url(DATABASE).replace("postgres@", "poor@");
    let as_poor = |table: &str| {
        Invocation::new("doctor")
            .args(&["--source", &url(&pair.source_cluster), "--target", &url(&pair.target_cluster)])
            .args(&["--json", "--table", table])
    };
    let output = as_poor("public.t").exits(exit::ERROR).await;
    assert_found(&output, "blocker public.t:", &["may not be read", "GRANT SELECT"]);
    assert_found(
        &output,
        "blocker public.t:",
        &["permission denied", "GRANT SELECT, INSERT, UPDATE, DELETE"],
    );
    let output = as_poor("public.h").exits(exit::ERROR).await;
    assert_found(&output, "blocker public.h:", &["row security hides rows of the source", "BYPASSRLS"]);
    assert_found(&output, "blocker public.h:", &["row security is active", "BYPASSRLS"]);

    Db::connect(&pair.source_cluster, "postgres")
        .await
        .exec("CREATE DATABASE bytes ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
        .await;
    Db::connect(&pair.source_cluster, "bytes")
        .await
        .exec("CREATE TABLE public.t (id int PRIMARY KEY, x text)")
        .await;
    let output = Invocation::new("doctor")
        .args(&[
            "--source",
            &pair.source_cluster.url("bytes"),
            "--target",
            &pair.target_cluster.url(DATABASE),
        ])
        .args(&["--json", "--table", "public.t"])
        .exits(exit::ERROR)
        .await;
    assert_found(&output, "blocker source:", &["SQL_ASCII"]);
}

/// What a worker would meet: connections, timeouts, room.
#[tokio::test(flavor = "multi_thread")]
async fn connections_timeouts_and_room() {
    let pair = Pair::start_with(&[
        "max_connections = 14",
        "statement_timeout = 5000",
        "idle_session_timeout = 7000",
    ])
    .await;
    pair.both("CREATE TABLE public.t (id int PRIMARY KEY, x text)").await;
    let output = doctor(&pair, "public.t", exit::DONE).await;
    assert_found(
        &output,
        "ok target:",
        &["statement_timeout = 7200 s", "lock_timeout = 600 s", "idle_session_timeout = 0"],
    );
    assert_found(&output, "ok source:", &["statement_timeout = 7200 s"]);
    assert_found(&output, "ok target:", &["data directory: ", " GB free"]);
    assert_found(&output, "", &["pg_wal: ", " GB free"]);
    // What goes into a tablespace is counted there.
    let place = pair.target_cluster.dir().join("elsewhere");
    pair.target_cluster.make_dir("elsewhere");
    pair.target.exec(&format!("CREATE TABLESPACE elsewhere LOCATION '{}'", place.display())).await;
    pair.target.exec("ALTER TABLE public.t SET TABLESPACE elsewhere").await;
    pair.source.exec("INSERT INTO public.t SELECT n, repeat(md5(n::text), 30) FROM generate_series(1, 60000) AS n; ANALYZE public.t").await;
    let output = doctor(&pair, "public.t", exit::DONE).await;
    assert_found(&output, "ok target:", &["tablespace elsewhere: ", "at most needed: 0.1 GB"]);
    assert_found(&output, "ok target:", &["data directory: ", "at most needed: 0.0 GB"]);
    let output = pair
        .sidecar("doctor")
        .args(&["--json", "--table", "public.t", "--workers", "8"])
        .exits(exit::ERROR)
        .await;
    assert_found(&output, "blocker target:", &["17 connections are needed", "fewer --workers"]);
}

/// Sessions that a pooler shares are no sessions: what one sets or locks another finds. A pool that lends whole sessions is fine.
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_shares_sessions() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.plain (id int PRIMARY KEY, x text)").await;
    for (mode, code) in [("transaction", exit::ERROR), ("session", exit::DONE)] {
        let pooler = Pooler::start(&pair.target_cluster, mode);
        let output = Invocation::new("doctor")
            .args(&["--json", "--table", "public.plain"])
            .args(&["--source", &pair.source_cluster.url(DATABASE), "--target", &pooler.url(DATABASE)])
            .exits(code)
            .await;
        if mode == "transaction" {
            assert_found(&output, "blocker target: a connection pooler", &["session mode"]);
        }
    }
}
