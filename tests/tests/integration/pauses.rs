//! Ways in which a run comes to rest before its end: interrupted twice, and a full disk.

use integration::check::{Table, assert_first_run};
use integration::data::{Content, NARROW_COLUMNS, NARROW_CONTENT, narrow_rows, narrow_table};
use integration::pair::Pair;
use integration::sidecar::{exit, failpoint};

const RECORDS: Table<'_> = Table {
    source: "public.records",
    target: "public.records",
    content: NARROW_CONTENT,
    columns: NARROW_COLUMNS,
};

async fn narrow_pair() -> Pair {
    let pair = Pair::start().await;
    pair.both(&narrow_table("public.records")).await;
    pair.source.exec(&narrow_rows("public.records", 1, 10_000, "n", &Content::RepeatsFar)).await;
    pair
}

/// The second Ctrl-C abandons a chunk in the middle of COPY, and gives it back: nobody has to wait for its lease, no attempt is burnt.
#[tokio::test(flavor = "multi_thread")]
async fn interrupted_twice() {
    let pair = narrow_pair().await;
    let mut sidecar = pair
        .run(&["public.records"])
        .workers(1)
        .chunk_size("200kB")
        .stands_at(failpoint::MIDDLE_OF_COPY)
        .await;
    sidecar.interrupt();
    sidecar.wait_for("interrupt again").await;
    sidecar.interrupt();
    let output = sidecar.finish().await;
    assert_eq!(output.code, Some(130), "{}", output.describe());
    output.says("abandoned").says("--resume");
    let held: i64 = pair
        .target
        .one("SELECT count(*) FROM dedup.checkpoints WHERE status <> 'pending' OR attempts <> 0")
        .await;
    assert_eq!(held, 0);
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM public.records").await, 0);
    pair.resume().exits(exit::DONE).await;
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
}

/// A full disk pauses the run for everybody; resumed, the very process that found it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_pauses_the_run() {
    let pair = narrow_pair().await;
    pair.target
        .exec(
            "CREATE TABLE room (full_since timestamptz); INSERT INTO room VALUES (now()); \
             CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
               IF EXISTS (SELECT FROM room) THEN RAISE 'could not extend file' USING ERRCODE = 'disk_full'; END IF; RETURN NULL; END $$; \
             CREATE TRIGGER fill AFTER INSERT ON public.records FOR EACH STATEMENT EXECUTE FUNCTION fill()",
        )
        .await;
    let mut sidecar = pair.run(&["public.records"]).workers(2).chunk_size("200kB").spawn();
    // Every worker that met the full disk has given its chunk back: whoever did so later would pause the run once more.
    sidecar.wait_for("dedup.resume_run").await;
    pair.target.wait_until("NOT EXISTS (SELECT FROM dedup.checkpoints WHERE status = 'syncing')").await;
    let state = pair.target.texts("SELECT status FROM dedup.runs").await;
    assert_eq!(state, [[Some("paused".to_owned())]]);
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM public.records").await, 0);
    pair.target
        .wait_until("EXISTS (SELECT FROM dedup.alerts WHERE kind = 'disk_full' AND severity = 'P1')")
        .await;
    pair.target.exec("DELETE FROM room; SELECT dedup.resume_run(run_id) FROM dedup.runs").await;
    let output = sidecar.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    let burnt: i64 = pair.target.one("SELECT count(*) FROM dedup.checkpoints WHERE attempts <> 1").await;
    assert_eq!(burnt, 0, "a full disk cost attempts");
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM dedup.alerts").await, 0);
    assert_first_run(&pair.source, &pair.target, &RECORDS).await;
}
