//! What a person types beside `run`: `doctor`, `status`, a configuration file, pause and resume.

use integration::check::{LAST_RUN, Table, assert_first_run};
use integration::cluster::Cluster;
use integration::data::{Content, NARROW_COLUMNS, NARROW_CONTENT, narrow_rows, narrow_table};
use integration::db::Db;
use integration::pair::{DATABASE, Pair};
use integration::sidecar::{Invocation, exit};

const RECORDS: Table<'_> = Table {
    source: "public.records",
    target: "public.records",
    content: NARROW_CONTENT,
    columns: NARROW_COLUMNS,
};

async fn narrow_pair(rows: i64) -> Pair {
    let pair = Pair::start().await;
    pair.both(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, rows, "n", &Content::RepeatsFar)).await;
    pair
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_says_what_is_missing() {
    let pair = narrow_pair(100).await;
    pair.sidecar("doctor").args(&["--table", "public.records"]).exits(exit::DONE).await;
    pair.source.exec("CREATE TABLE public.forgotten (id int PRIMARY KEY)").await;
    let output = pair.sidecar("doctor").args(&["--table", "public.forgotten"]).exits(exit::ERROR).await;
    assert!(output.describe().contains("pg_dump --schema-only"), "{}", output.describe());
    let runs: i64 = pair.target.one("SELECT count(*) FROM dedup.runs").await;
    assert_eq!(runs, 0, "doctor wrote something");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_lists_and_shows() {
    let pair = narrow_pair(2_000).await;
    let status = |arguments: &[&str]| {
        Invocation::new("status").arg("--target").arg(pair.target_cluster.url(DATABASE)).args(arguments)
    };
    assert!(status(&[]).exits(exit::DONE).await.stdout.contains("no runs"));
    pair.run(&["public.records"]).args(&["--name", "the first"]).exits(exit::DONE).await;
    assert!(status(&[]).exits(exit::DONE).await.stdout.contains("the first"));
    for name in ["last", "the first"] {
        let shown = status(&[name, "--json"]).exits(exit::DONE).await.json();
        assert_eq!(shown["status"], "done");
        assert_eq!(shown["source_count"], 2_000);
        assert_eq!(shown["duplicate_count"], 500);
        assert_eq!(shown["tables"][0]["source"], "public.records");
    }
    status(&["no such run"]).exits(exit::ERROR).await.says("no such run");
}

/// A file says the same as flags, and what flags cannot: a transform for each column.
#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_file() {
    let pair = narrow_pair(2_000).await;
    let file = std::env::temp_dir().join(format!(
        "pgdm-it-{}-{}.toml",
        std::process::id(),
        pair.target_cluster.port()
    ));
    let text = format!(
        "source = \"{}\"\ntarget = \"{}\"\nworkers = 2\nchunk_size = \"100kB\"\n\n[[table]]\nsource = \"public.records\"\n\
         where = \"id > 100\"\ncontent_columns = [\"label\", \"amount\"]\ntransforms = {{ label = \"upper(label)\" }}\n",
        pair.source_cluster.url(DATABASE),
        pair.target_cluster.url(DATABASE)
    );
    std::fs::write(&file, text).expect("the file is written");
    let output = Invocation::new("run").arg("--config").arg(file.to_string_lossy()).output().await;
    std::fs::remove_file(&file).expect("the file is removed");
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    let source = "(SELECT id, upper(label) AS label, amount, happened_at, flags, body FROM public.records WHERE id > 100)";
    assert_first_run(&pair.source, &pair.target, &Table { source, content: &["label", "amount"], ..RECORDS })
        .await;
}

/// A paused run takes no further chunk; resumed, the same process goes on.
#[tokio::test(flavor = "multi_thread")]
async fn paused_and_resumed() {
    let pair = narrow_pair(40_000).await;
    let sidecar = pair.run(&["public.records"]).workers(1).chunk_size("100kB").spawn();
    loop {
        let some: bool =
            pair.target.one("SELECT count(*) > 0 FROM dedup.checkpoints WHERE status = 'verified'").await;
        if some {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    pair.target.exec(&format!("SELECT dedup.pause_run({LAST_RUN})")).await;
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    let count = "SELECT count(*) FROM dedup.checkpoints WHERE status = 'verified'";
    let before: i64 = pair.target.one(count).await;
    tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    assert_eq!(pair.target.one::<i64>(count).await, before, "a paused run went on");
    assert!(
        pair.target.one::<bool>("SELECT count(*) > 0 FROM dedup.checkpoints WHERE status = 'pending'").await
    );
    pair.target.exec(&format!("SELECT dedup.resume_run({LAST_RUN})")).await;
    let output = sidecar.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
}

/// Digests and rows are the same whatever the encodings; what the target's cannot hold is set aside.
#[tokio::test(flavor = "multi_thread")]
async fn databases_of_other_encodings() {
    let (source_cluster, target_cluster) =
        (Cluster::start(&[]), Cluster::start(&[integration::cluster::PRELOAD]));
    let make = async |cluster: &Cluster, name: &str, encoding: &str| {
        let admin = Db::connect(cluster, "postgres").await;
        admin.exec(&format!("CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0")).await;
        let db = Db::connect(cluster, name).await;
        db.exec("CREATE TABLE public.notes (id int PRIMARY KEY, body text)").await;
        db
    };
    let latin = make(&source_cluster, "latin", "LATIN1").await;
    let unicode = make(&source_cluster, "unicode", "UTF8").await;
    latin.exec("INSERT INTO public.notes VALUES (1, 'naïve'), (2, 'é'), (3, 'naïve')").await;
    unicode.exec("INSERT INTO public.notes VALUES (1, 'naïve'), (2, '日本'), (3, 'naïve')").await;
    let run = |from: &str, to: &str| {
        Invocation::new("run")
            .arg("--source")
            .arg(source_cluster.url(from))
            .arg("--target")
            .arg(target_cluster.url(to))
            .args(&["--table", "public.notes", "--content-columns", "public.notes:body"])
    };
    for (name, encoding) in [("a", "UTF8"), ("b", "LATIN1")] {
        let target = make(&target_cluster, name, encoding).await;
        target.exec("CREATE EXTENSION pg_dedup_migrate").await;
        run("latin", name).exits(exit::DONE).await;
        assert_eq!(target.column("SELECT body FROM public.notes ORDER BY id").await, ["naïve", "é"]);
        run("latin", name).exits(exit::DONE).await;
        let hashes = target.column("SELECT content_hash FROM dedup.hash_index('public.notes')").await;
        let bytes = target.column("SELECT dedup.content_hash(body) AS h FROM public.notes ORDER BY h").await;
        assert_eq!(hashes, bytes, "digests in {encoding}");
        let code = if encoding == "UTF8" { exit::DONE } else { exit::LEFT_ASIDE };
        run("unicode", name).exits(code).await;
    }
    let target = make(&target_cluster, "c", "SQL_ASCII").await;
    target.exec("CREATE EXTENSION pg_dedup_migrate").await;
    run("latin", "c").exits(exit::ERROR).await.says("SQL_ASCII");
}

/// On a terminal a run draws how far it is, how fast, what it dropped and how long it will take.
#[tokio::test(flavor = "multi_thread")]
async fn progress_on_a_terminal() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.items (id int PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.items SELECT n, repeat(md5((n % 20000)::text), 2) FROM generate_series(1, 40000) AS n; ANALYZE public.items").await;
    let output = pair
        .run(&["public.items"])
        .args(&["--content-columns", "public.items:body", "--max-rate", "1MB"])
        .chunk_size("100kB")
        .in_terminal()
        .exits(exit::DONE)
        .await;
    let drawn = output
        .stdout
        .split(['\r', '\n'])
        .filter(|line| line.contains("% [") && line.contains("MB/s"))
        .map(|line| line.to_owned())
        .collect::<Vec<_>>();
    assert!(drawn.len() >= 3, "{}", output.describe());
    let parts = [" records/s, ", " chunks, ", " duplicates, ", "ETA "];
    assert!(drawn.iter().all(|line| parts.iter().all(|part| line.contains(part))), "{drawn:?}");
    // Further on at the end than at the beginning.
    let percent = |line: &String| -> u32 {
        let before = line.split('%').next().unwrap_or_default();
        before
            .chars()
            .rev()
            .take_while(char::is_ascii_digit)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .collect::<String>()
            .parse()
            .unwrap_or(0)
    };
    assert!(drawn.first().map(percent) < drawn.last().map(percent), "{drawn:?}");
    assert!(
        output.stdout.contains("duplicate") && output.stdout.contains("= inserted"),
        "{}",
        output.describe()
    );
}
