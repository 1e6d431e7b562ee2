//! The harness itself: a check that cannot fail would make every test above it worthless.

use integration::check::{Table, assert_exact};
use integration::cluster::{Cluster, Stop};
use integration::data::{Content, NARROW_COLUMNS, NARROW_CONTENT, narrow_rows, narrow_table};
use integration::db::Db;

const RECORDS: Table<'_> =
    Table { source: "records", target: "copy", content: NARROW_CONTENT, columns: NARROW_COLUMNS };

async fn filled(content: &Content) -> (Cluster, Db) {
    let cluster = Cluster::start(&[]);
    let db = Db::connect(&cluster, "postgres").await;
    db.exec(&narrow_table("records")).await;
    db.exec(&narrow_rows("records", 1, 4_000, "n", content)).await;
    (cluster, db)
}

#[tokio::test(flavor = "multi_thread")]
async fn generators_repeat_what_they_say() {
    for (content, distinct) in [
        (Content::Distinct, 4_000),
        (Content::RepeatsNeighbour, 3_000),
        (Content::RepeatsFar, 3_000),
        (Content::TenContents, 410),
    ] {
        let (_cluster, db) = filled(&content).await;
        let columns = NARROW_CONTENT.join(", ");
        let found: i64 =
            db.one(&format!("SELECT count(*) FROM (SELECT DISTINCT {columns} FROM records) AS d")).await;
        assert_eq!(found, distinct);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_comes_back_from_a_crash() {
    let (cluster, db) = filled(&Content::Distinct).await;
    cluster.restart(Stop::Immediate);
    assert!(db.try_exec("SELECT 1").await.is_err(), "a connection outlived its server");
    let db = Db::connect(&cluster, "postgres").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM records").await, 4_000);
}

/// A target made of the source by `copy`, then changed by `damage`, fails the check with `complaint`.
async fn fails(copy: &str, damage: &str, complaint: &str) {
    let (_cluster, db) = filled(&Content::RepeatsFar).await;
    db.exec(&format!("CREATE TABLE copy AS {copy}")).await;
    db.exec(damage).await;
    let check = tokio::spawn(async move { assert_exact(&db, &db, &RECORDS).await });
    let message = match check.await {
        Ok(()) => String::new(),
        Err(error) => error.into_panic().downcast_ref::<String>().cloned().unwrap_or_default(),
    };
    assert_eq!(message.is_empty(), complaint.is_empty(), "{message}");
    assert!(message.contains(complaint), "{message}");
}

/// One row of each content.
const EXACT: &str = "SELECT DISTINCT ON (label) * FROM records";

#[tokio::test(flavor = "multi_thread")]
async fn the_check_passes_what_is_exact() {
    fails(EXACT, "", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_check_sees_what_is_missing() {
    fails(EXACT, "DELETE FROM copy WHERE id = (SELECT max(id) FROM copy)", "1 of 3000 contents are missing")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_check_sees_what_is_there_twice() {
    fails("SELECT * FROM records", "", "1000 contents stand in the target twice").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_check_sees_what_is_extra() {
    fails(EXACT, "INSERT INTO copy (id, label) VALUES (1, 'never there')", "1 are extra").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_check_sees_a_row_under_another_key() {
    fails(EXACT, "UPDATE copy SET id = -id WHERE label = 'record 1'", "1 rows are not rows of the source")
        .await;
}
