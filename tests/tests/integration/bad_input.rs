//! Bad input: one clear error, and nothing changed.

use integration::cluster::Cluster;
use integration::data::{Content, narrow_rows, narrow_table};
use integration::db::Db;
use integration::pair::{DATABASE, Pair};
use integration::sidecar::{Invocation, exit};

async fn narrow_pair(settings: &[&str]) -> Pair {
    let pair = Pair::start_with(settings).await;
    pair.both(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, 2_000, "n", &Content::RepeatsFar)).await;
    pair
}

/// No run, no chunk and no row.
async fn assert_untouched(pair: &Pair) {
    let found: i64 = pair
        .target
        .one("SELECT (SELECT count(*) FROM dedup.checkpoints) + (SELECT count(*) FROM public.records)")
        .await;
    assert_eq!(found, 0, "something was planned or written");
}

#[tokio::test(flavor = "multi_thread")]
async fn usage() {
    for arguments in [
        &["run", "--no-such-flag"][..],
        &["run"],
        &["no-such-command"],
        &[
            "run",
            "--source",
            "postgresql:///a",
            "--target",
            "postgresql:///b",
            "--table",
            "t",
            "--workers",
            "none",
        ],
        &[
            "run",
            "--source",
            "postgresql:///a",
            "--target",
            "postgresql:///b",
            "--table",
            "t",
            "--chunk-size",
            "12 parsecs",
        ],
    ] {
        let output = Invocation::new(arguments[0]).args(&arguments[1..]).exits(exit::USAGE).await;
        assert!(!output.stderr.is_empty(), "no word about {arguments:?}");
        assert!(output.stdout.is_empty(), "errors belong to standard error: {}", output.describe());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_tables_and_columns() {
    let pair = narrow_pair(&[]).await;
    pair.run(&["public.nowhere"]).exits(exit::ERROR).await.says("nowhere");
    pair.run(&["public.records=public.nowhere"]).exits(exit::ERROR).await.says("nowhere");
    pair.run(&["public.records"])
        .args(&["--content-columns", "public.records:no_such_column"])
        .exits(exit::ERROR)
        .await
        .says("no_such_column");
    pair.run(&["public.records"])
        .args(&["--where", "public.records:no_such_column > 1"])
        .exits(exit::ERROR)
        .await
        .says("no_such_column");
    assert_untouched(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn types_that_do_not_cast() {
    let pair = Pair::start().await;
    pair.source.exec("CREATE TABLE public.records (id int PRIMARY KEY, value point)").await;
    pair.target.exec("CREATE TABLE public.records (id int PRIMARY KEY, value int)").await;
    pair.run(&["public.records"]).exits(exit::ERROR).await.says("value");
    assert_untouched(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_servers() {
    let pair = narrow_pair(&[]).await;
    let output = Invocation::new("run")
        .args(&["--source", "postgresql://postgres@127.0.0.1:1/it", "--target"])
        .arg(pair.target_cluster.url(DATABASE))
        .args(&["--table", "public.records"])
        .exits(exit::ERROR)
        .await;
    output.says("source");
    assert_untouched(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_extension_is_not_there() {
    let pair = narrow_pair(&[]).await;
    pair.target.exec("DROP EXTENSION pg_dedup_migrate").await;
    pair.run(&["public.records"]).exits(exit::ERROR).await.says("CREATE EXTENSION pg_dedup_migrate");
    let rows: i64 = pair.target.one("SELECT count(*) FROM public.records").await;
    assert_eq!(rows, 0);
}

/// Hashing works without the preload; what needs shared memory names the line to add.
#[tokio::test(flavor = "multi_thread")]
async fn not_preloaded() {
    let (source_cluster, target_cluster) = (Cluster::start(&[]), Cluster::start(&[]));
    for cluster in [&source_cluster, &target_cluster] {
        let db = Db::connect(cluster, "postgres").await;
        db.exec(&narrow_table("public.records")).await;
        db.exec(&narrow_rows("public.records", 1, 10, "n", &Content::Distinct)).await;
    }
    let target = Db::connect(&target_cluster, "postgres").await;
    target.exec("TRUNCATE public.records; CREATE EXTENSION pg_dedup_migrate").await;
    let hashed: i32 = target.one("SELECT length(dedup.content_hash(1, 'a'::text))").await;
    assert_eq!(hashed, 32);
    let (state, message) = target.fails("SELECT * FROM dedup.warm_filter()").await;
    assert_eq!(state, "55000", "{message}");
    assert!(message.contains("shared_preload_libraries"), "{message}");
    let output = Invocation::new("run")
        .arg("--source")
        .arg(source_cluster.url("postgres"))
        .arg("--target")
        .arg(target_cluster.url("postgres"))
        .args(&["--table", "public.records"])
        .exits(exit::ERROR)
        .await;
    output.says("shared_preload_libraries = 'pg_dedup_migrate'");
    let rows: i64 = target.one("SELECT count(*) FROM public.records").await;
    assert_eq!(rows, 0);
}

/// A chunk with more digests than claims can hold fails by name; with the chunks that planning makes for this
/// size, the same data goes through.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_claims_table() {
    let pair = Pair::start_with(&["pg_dedup_migrate.claims_size = '1MB'"]).await;
    pair.target.exec(integration::protocol::TABLE).await;
    let run = integration::protocol::create_run(&pair.target, 1).await;
    let mut worker = integration::protocol::Worker::new(pair.target_again().await, run).await;
    assert!(worker.lease().await);
    worker.begin().await.expect("the chunk begins");
    let digests: Vec<_> =
        (0..200_000).map(|n| integration::protocol::content_digest(&n.to_string())).collect();
    let error = worker.claim(&digests).await.expect_err("200,000 claims fit into 1 MB");
    assert_eq!(integration::db::sqlstate(&error), "53400", "{}", integration::db::describe(&error));
    let text = integration::db::describe(&error);
    assert!(text.contains("HINT") && text.contains("pg_dedup_migrate.claims_size"), "{text}");
    worker.rollback().await;

    // Nothing of the failed sweep stays behind.
    worker.begin().await.expect("the chunk begins again");
    let verdicts = worker.claim(&digests[..100]).await.expect("100 claims fit");
    assert!(verdicts.iter().all(|verdict| *verdict == integration::protocol::NEW), "{verdicts:?}");
    worker.rollback().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_privileges() {
    let pair = narrow_pair(&[]).await;
    pair.target.exec("CREATE ROLE nobody LOGIN PASSWORD 'x'").await;
    let output = Invocation::new("run")
        .arg("--source")
        .arg(pair.source_cluster.url(DATABASE))
        .arg("--target")
        .arg(pair.target_cluster.url(DATABASE).replace("postgres@", "nobody@"))
        .args(&["--table", "public.records"])
        .exits(exit::ERROR)
        .await;
    output.says("permission denied");
    assert_untouched(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_that_do_not_commit_with_us() {
    let pair = Pair::start().await;
    pair.source.exec(&narrow_table("public.records")).await;
    pair.target.exec(&narrow_table("public.records").replace("CREATE TABLE", "CREATE UNLOGGED TABLE")).await;
    pair.run(&["public.records"]).exits(exit::ERROR).await.says("unlogged");
    assert_untouched(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_none() {
    let pair = narrow_pair(&[]).await;
    let run: String = pair.target.one("SELECT dedup.create_run('keys')::text").await;
    let (state, message) = pair
        .target
        .fails(&format!(
            "SELECT dedup.add_table('{run}', 'public.records', 'public.records', ARRAY['label'])"
        ))
        .await;
    assert_eq!(state, "42P16", "{message}");
    assert!(message.contains("HINT: CREATE UNIQUE INDEX"), "{message}");
}

/// An open run on the same target: the line that resumes it.
#[tokio::test(flavor = "multi_thread")]
async fn an_open_run_on_the_same_target() {
    let pair = narrow_pair(&[]).await;
    pair.run(&["public.records"]).killed_at(integration::sidecar::failpoint::CLAIMED).await;
    pair.run(&["public.records"]).exits(exit::ERROR).await.says("--resume");
}

/// A run is resumed with what it was created with, or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn resumed_with_something_else() {
    let pair = narrow_pair(&[]).await;
    pair.run(&["public.records"]).killed_at(integration::sidecar::failpoint::CLAIMED).await;
    pair.resume()
        .args(&["--table", "public.records", "--content-columns", "public.records:label"])
        .exits(exit::ERROR)
        .await
        .says("content");
    pair.resume()
        .args(&["--table", "public.records", "--where", "public.records:id > 5"])
        .exits(exit::ERROR)
        .await
        .says("filter");
}
