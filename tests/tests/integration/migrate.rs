//! The main job: the target's distinct contents are the source's, exactly, however many workers there are
//! and wherever the duplicates lie.

use integration::check::{
    Books, Table, assert_books, assert_exact, assert_first_run, assert_index, assert_ledger,
};
use integration::data::{Content, NARROW_COLUMNS, NARROW_CONTENT, narrow_rows, narrow_table};
use integration::pair::Pair;
use integration::sidecar::exit;

const RECORDS: Table<'_> = Table {
    source: "public.records",
    target: "public.records",
    content: NARROW_CONTENT,
    columns: NARROW_COLUMNS,
};

async fn narrow_pair(rows: i64, content: Content) -> Pair {
    let pair = Pair::start().await;
    pair.both(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, rows, "n", &content)).await;
    pair
}

async fn migrates_exactly(content: Content, workers: usize) {
    let pair = narrow_pair(30_000, content).await;
    pair.run(&["public.records"]).workers(workers).chunk_size("200kB").exits(exit::DONE).await;
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
    let chunks: i64 = pair.target.one("SELECT count(*) FROM dedup.checkpoints").await;
    assert!(chunks >= 8, "{chunks} chunks are too few for the workers to meet");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_worker() {
    migrates_exactly(Content::RepeatsFar, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers() {
    migrates_exactly(Content::RepeatsFar, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_workers() {
    migrates_exactly(Content::RepeatsFar, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_workers() {
    migrates_exactly(Content::RepeatsFar, 8).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn duplicates_inside_a_chunk() {
    migrates_exactly(Content::RepeatsNeighbour, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_duplicates() {
    migrates_exactly(Content::Distinct, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ninety_percent_of_ten_contents() {
    for workers in [1, 4] {
        migrates_exactly(Content::TenContents, workers).await;
    }
}

/// Two tables with the same contents in the same order, so that two workers meet at every digest.
#[tokio::test(flavor = "multi_thread")]
async fn two_tables_in_lockstep() {
    let pair = Pair::start().await;
    pair.target.exec(&narrow_table("public.records")).await;
    for (name, key) in [("public.odd", "n * 2 - 1"), ("public.even", "n * 2")] {
        pair.source.exec(&narrow_table(name)).await;
        pair.source.exec(&narrow_rows(name, 1, 15_000, key, &Content::RepeatsFar)).await;
    }
    pair.run(&["public.odd=public.records", "public.even=public.records"])
        .workers(2)
        .chunk_size("200kB")
        .exits(exit::DONE)
        .await;
    let source = "(SELECT * FROM public.odd UNION ALL SELECT * FROM public.even)";
    let both = Table { source, ..RECORDS };
    assert_first_run(&pair.source, &pair.target, &both).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_joins_the_run() {
    let pair = narrow_pair(60_000, Content::RepeatsFar).await;
    let first = pair.run(&["public.records"]).workers(1).chunk_size("100kB").spawn();
    // `work` needs a run to join: the first chunk says that there is one.
    loop {
        let started: bool =
            pair.target.one("SELECT EXISTS (SELECT FROM dedup.checkpoints WHERE status <> 'pending')").await;
        if started {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let second = pair.sidecar("work").arg("last").workers(2).spawn();
    let (first, second) = (first.finish().await, second.finish().await);
    assert_eq!(first.code, Some(exit::DONE), "{}", first.describe());
    assert_eq!(second.code, Some(exit::DONE), "{}", second.describe());
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn json_summary_has_the_columns_of_the_checkpoints() {
    let pair = narrow_pair(2_000, Content::RepeatsNeighbour).await;
    let output = pair.run(&["public.records"]).arg("--json").exits(exit::DONE).await;
    let summary = output.json();
    for (name, value) in [
        ("source_count", 2_000),
        ("inserted_count", 1_500),
        ("updated_count", 0),
        ("unchanged_count", 0),
        ("duplicate_count", 500),
        ("quarantined_count", 0),
    ] {
        assert_eq!(summary[name], value, "{name} in {summary}");
    }
    let run: String = pair.target.one("SELECT run_id::text FROM dedup.runs").await;
    assert_eq!(summary["run_id"], run.as_str());
    assert_eq!(summary["status"], "done");
}

#[tokio::test(flavor = "multi_thread")]
async fn content_columns_are_chosen_by_name() {
    let pair = narrow_pair(4_000, Content::Distinct).await;
    pair.source.exec("UPDATE public.records SET amount = id % 10, flags = NULL, label = 'x'").await;
    pair.run(&["public.records"])
        .args(&["--content-columns", "public.records:label,amount"])
        .exits(exit::DONE)
        .await;
    let table = Table { content: &["label", "amount"], ..RECORDS };
    assert_exact(&pair.source, &pair.target, &table).await;
    assert_index(&pair.target, &table).await;
    assert_ledger(&pair.target).await;
    let books = Books { source: 4_000, inserted: 10, duplicate: 3_990, ..Books::default() };
    assert_books(&pair.target, books).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_and_excluded_columns() {
    let pair = narrow_pair(4_000, Content::RepeatsFar).await;
    pair.run(&["public.records"])
        .args(&["--exclude-columns", "public.records:id", "--where", "public.records:id % 3 = 0"])
        .exits(exit::DONE)
        .await;
    let table = Table { source: "(SELECT * FROM public.records WHERE id % 3 = 0)", ..RECORDS };
    assert_first_run(&pair.source, &pair.target, &table).await;
}

/// The password of a URL is in no output, and TCP with a password works like a socket.
#[tokio::test(flavor = "multi_thread")]
async fn passwords_are_never_printed() {
    let pair = narrow_pair(1_000, Content::Distinct).await;
    let urls = |command: &str| {
        integration::sidecar::Invocation::new(command)
            .arg("--source")
            .arg(pair.source_cluster.tcp_url("it"))
            .arg("--target")
            .arg(pair.target_cluster.tcp_url("it"))
    };
    let outputs = [
        urls("doctor").args(&["--table", "public.records"]).output().await,
        urls("run").args(&["--table", "public.records"]).exits(exit::DONE).await,
        urls("status").arg("last").output().await,
        urls("run").args(&["--table", "public.nowhere"]).output().await,
    ];
    for output in outputs {
        assert!(!output.describe().contains(integration::cluster::PASSWORD), "{}", output.describe());
    }
    let kept: i64 = pair
        .target
        .one(&format!(
            "SELECT count(*) FROM dedup.runs AS r FULL JOIN dedup.events AS e ON true \
             FULL JOIN dedup.workers AS w ON true FULL JOIN dedup.run_tables AS t ON true \
             WHERE concat(r, e, w, t) LIKE '%{}%'",
            integration::cluster::PASSWORD
        ))
        .await;
    assert_eq!(kept, 0, "rows of the state that hold the password");
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
}

/// Sequences stand past the highest key afterwards, and the planner knows the table.
#[tokio::test(flavor = "multi_thread")]
async fn sequences_and_statistics_afterwards() {
    let pair = narrow_pair(3_000, Content::RepeatsNeighbour).await;
    pair.run(&["public.records"]).exits(exit::DONE).await;
    let next: i64 = pair
        .target
        .one("INSERT INTO public.records (label) VALUES ('the application writes again') RETURNING id")
        .await;
    assert!(next >= 3_000, "key {next} was given out by the migration already");
    let known: f32 = pair.target.one("SELECT reltuples FROM pg_class WHERE relname = 'records'").await;
    assert_eq!(known as i64, 2_250, "rows the planner knows of");
}
