//! A source that lives on, and targets that hold rows already: what a later run may change, and what it must not
//! believe.

use integration::check::{Books, LAST_RUN, Table, assert_books, assert_exact, assert_index};
use integration::cluster::{Cluster, Stop};
use integration::db::Db;
use integration::pair::{DATABASE, Pair};
use integration::sidecar::{Invocation, exit};

const NOTES: Table<'_> =
    Table { source: "public.notes", target: "public.notes", content: &["body"], columns: &["id", "body"] };

/// A pair whose source holds `(id, body)` rows.
async fn notes(rows: &str) -> Pair {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.notes (id int PRIMARY KEY, body text)").await;
    pair.source.exec(&format!("INSERT INTO public.notes VALUES {rows}; ANALYZE public.notes")).await;
    pair
}

fn run(pair: &Pair) -> Invocation {
    pair.run(&["public.notes"]).args(&["--content-columns", "public.notes:body"]).workers(1)
}

async fn contents(db: &Db) -> Vec<String> {
    db.column("SELECT body FROM public.notes ORDER BY body").await
}

/// The target holds each content of the source once, and index and rows agree.
async fn assert_current(pair: &Pair) {
    assert_eq!(contents(&pair.target).await, {
        let mut wanted = contents(&pair.source).await;
        wanted.dedup();
        wanted
    });
    assert_exact(&pair.source, &pair.target, &NOTES).await;
    assert_index(&pair.target, &NOTES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unchanged_data_writes_nothing() {
    let pair = notes("(1, 'a'), (2, 'b'), (3, 'a'), (4, 'c')").await;
    run(&pair).exits(exit::DONE).await;
    let before = pair.target.texts("SELECT ctid, xmin, id FROM public.notes ORDER BY id").await;
    run(&pair).exits(exit::DONE).await;
    assert_books(&pair.target, Books { source: 4, unchanged: 3, duplicate: 1, ..Books::default() }).await;
    assert_eq!(pair.target.texts("SELECT ctid, xmin, id FROM public.notes ORDER BY id").await, before);
    assert_current(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_row_is_updated_and_its_old_content_forgotten() {
    let pair = notes("(1, 'a'), (2, 'b')").await;
    run(&pair).exits(exit::DONE).await;
    pair.source.exec("UPDATE public.notes SET body = 'a, revised' WHERE id = 1").await;
    run(&pair).exits(exit::DONE).await;
    assert_books(&pair.target, Books { source: 2, updated: 1, unchanged: 1, ..Books::default() }).await;
    let images = pair.target.column("SELECT action FROM dedup.before_images").await;
    assert_eq!(images, ["update"]);
    assert_current(&pair).await;

    // What the row was before is nobody's any more: a record with it is written, not dropped.
    pair.source.exec("INSERT INTO public.notes VALUES (3, 'a')").await;
    run(&pair).exits(exit::DONE).await;
    assert_books(&pair.target, Books { source: 3, inserted: 1, unchanged: 2, ..Books::default() }).await;
    assert_current(&pair).await;
}

/// Keys 1 and 2 share content X, 1 survives; then 1 becomes Y. X must stay, under 2, whichever chunk came first.
#[tokio::test(flavor = "multi_thread")]
async fn a_loser_outlives_its_survivor() {
    for changed in [1, 2] {
        let pair = notes("(1, 'X'), (2, 'X'), (3, 'other')").await;
        run(&pair).exits(exit::DONE).await;
        pair.source.exec(&format!("UPDATE public.notes SET body = 'Y' WHERE id = {changed}")).await;
        run(&pair).exits(exit::DONE).await;
        assert_current(&pair).await;
    }
}

/// The same with the two keys in chunks of their own, the survivor's first or last.
#[tokio::test(flavor = "multi_thread")]
async fn a_loser_outlives_its_survivor_across_chunks() {
    for survivor in [1, 4_000] {
        let pair = notes("(0, 'start')").await;
        pair.source
            .exec(
                "INSERT INTO public.notes SELECT n, 'filler ' || n || repeat('.', 100) FROM generate_series(1, 4000) AS n; \
                 UPDATE public.notes SET body = 'X' WHERE id IN (1, 4000); ANALYZE public.notes",
            )
            .await;
        let loser = 4_001 - survivor;
        // Only one of the two is there at first, so it is the survivor.
        let first = run(&pair).arg("--where").arg(format!("public.notes:id <> {loser}"));
        first.exits(exit::DONE).await;
        let chunked = run(&pair).chunk_size("50kB");
        chunked.exits(exit::DONE).await;
        assert_current(&pair).await;
        pair.source.exec(&format!("UPDATE public.notes SET body = 'Y' WHERE id = {survivor}")).await;
        chunked.exits(exit::DONE).await;
        assert_current(&pair).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn contents_swapped_between_two_keys() {
    let pair = notes("(1, 'left'), (2, 'right'), (3, 'a'), (4, 'b'), (5, 'c')").await;
    run(&pair).exits(exit::DONE).await;
    pair.source
        .exec(
            "UPDATE public.notes SET body = CASE id WHEN 1 THEN 'right' WHEN 2 THEN 'left' \
             WHEN 3 THEN 'b' WHEN 4 THEN 'c' ELSE 'a' END",
        )
        .await;
    run(&pair).exits(exit::DONE).await;
    assert_current(&pair).await;
    let rows = pair.target.column("SELECT id || ' ' || body FROM public.notes ORDER BY id").await;
    assert_eq!(rows, ["1 right", "2 left", "3 b", "4 c", "5 a"]);
}

/// The row whose key now carries what another row has already goes, with a before image.
#[tokio::test(flavor = "multi_thread")]
async fn new_content_that_another_row_has() {
    let pair = notes("(1, 'a'), (2, 'b')").await;
    run(&pair).exits(exit::DONE).await;
    pair.source.exec("UPDATE public.notes SET body = 'b' WHERE id = 1").await;
    run(&pair).exits(exit::DONE).await;
    assert_books(&pair.target, Books { source: 2, unchanged: 1, duplicate: 1, ..Books::default() }).await;
    assert_eq!(pair.target.column("SELECT action FROM dedup.before_images").await, ["delete"]);
    assert_current(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_with_rows_of_its_own() {
    let pair = notes("(1, 'a'), (2, 'b'), (3, 'there already'), (4, 'c')").await;
    pair.target.exec("INSERT INTO public.notes VALUES (2, 'old b'), (900, 'there already')").await;
    run(&pair).exits(exit::DONE).await;
    let expected = Books { source: 4, inserted: 2, updated: 1, duplicate: 1, ..Books::default() };
    assert_books(&pair.target, expected).await;
    let rows = pair.target.column("SELECT id || ' ' || body FROM public.notes ORDER BY id").await;
    assert_eq!(rows, ["1 a", "2 b", "4 c", "900 there already"]);
    let images: i64 =
        pair.target.one("SELECT count(*) FROM dedup.before_images WHERE action = 'update'").await;
    assert_eq!(images, 1);
    assert_index(&pair.target, &NOTES).await;
}

/// Refused with the functions that help; never "all unchanged", never a row.
async fn assert_refused(pair: &Pair, rows: i64) {
    let output = run(pair).exits(exit::ERROR).await;
    output.says("reindex_target").says("forget_target");
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM public.notes").await, rows);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_target() {
    let pair = notes("(1, 'a'), (2, 'b')").await;
    run(&pair).exits(exit::DONE).await;
    pair.target.exec("TRUNCATE public.notes").await;
    assert_refused(&pair, 0).await;
    pair.target.exec("SELECT dedup.reindex_target('public.notes')").await;
    run(&pair).exits(exit::DONE).await;
    assert_books(&pair.target, Books { source: 2, inserted: 2, ..Books::default() }).await;
    assert_current(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_dropped_and_created_again() {
    let pair = notes("(1, 'a'), (2, 'b')").await;
    run(&pair).exits(exit::DONE).await;
    pair.target
        .exec("DROP TABLE public.notes; CREATE TABLE public.notes (id int PRIMARY KEY, body text)")
        .await;
    // Another table as far as PostgreSQL is concerned: nothing is known of it, and nothing is believed.
    run(&pair).exits(exit::DONE).await;
    assert_books(&pair.target, Books { source: 2, inserted: 2, ..Books::default() }).await;
    assert_current(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_of_another_type() {
    let pair = notes("(1, 'a'), (2, 'b')").await;
    run(&pair).exits(exit::DONE).await;
    pair.target.exec("ALTER TABLE public.notes ALTER body TYPE varchar(100)").await;
    run(&pair).exits(exit::ERROR).await.says("forget_target");
    pair.target.exec("SELECT dedup.forget_target('public.notes')").await;
    run(&pair).exits(exit::DONE).await;
    assert_books(&pair.target, Books { source: 2, unchanged: 2, ..Books::default() }).await;
    assert_current(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_content_columns() {
    let pair = notes("(1, 'a'), (2, 'b')").await;
    run(&pair).exits(exit::DONE).await;
    pair.run(&["public.notes"])
        .args(&["--content-columns", "public.notes:id,body"])
        .exits(exit::ERROR)
        .await
        .says("forget_target");
    assert_current(&pair).await;
}

/// Two databases of one cluster share memory and no digest; neither do a template and its copy.
#[tokio::test(flavor = "multi_thread")]
async fn other_databases_of_the_cluster() {
    let pair = notes("(1, 'a'), (2, 'b'), (3, 'a')").await;
    run(&pair).exits(exit::DONE).await;

    pair.target.exec("CREATE DATABASE other").await;
    let other = Db::connect(&pair.target_cluster, "other").await;
    other
        .exec("CREATE EXTENSION pg_dedup_migrate; CREATE TABLE public.notes (id int PRIMARY KEY, body text)")
        .await;
    from(&pair.source_cluster, &pair.target_cluster, "other").exits(exit::DONE).await;
    assert_exact(&pair.source, &other, &NOTES).await;
    assert_index(&other, &NOTES).await;

    let template = Db::connect(&pair.target_cluster, "postgres").await;
    drop(pair.target);
    template
        .exec(&format!(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{DATABASE}'; "
        ))
        .await;
    template.exec(&format!("CREATE DATABASE copied TEMPLATE {DATABASE}")).await;
    let copied = Db::connect(&pair.target_cluster, "copied").await;
    // The copy knows what the template knew: the same again is unchanged, and new content is new in both.
    from(&pair.source_cluster, &pair.target_cluster, "copied").exits(exit::DONE).await;
    assert_books(&copied, Books { source: 3, unchanged: 2, duplicate: 1, ..Books::default() }).await;
    pair.source.exec("INSERT INTO public.notes VALUES (4, 'd'), (5, 'b')").await;
    for database in ["copied", DATABASE] {
        let db = Db::connect(&pair.target_cluster, database).await;
        from(&pair.source_cluster, &pair.target_cluster, database).exits(exit::DONE).await;
        assert_exact(&pair.source, &db, &NOTES).await;
        assert_index(&db, &NOTES).await;
    }
}

/// A run from the pair's source into another database of the target cluster.
fn from(source: &Cluster, target: &Cluster, database: &str) -> Invocation {
    Invocation::new("run")
        .arg("--source")
        .arg(source.url(DATABASE))
        .arg("--target")
        .arg(target.url(database))
        .args(&["--table", "public.notes", "--content-columns", "public.notes:body"])
}

/// Dumped and restored into a server that runs: dedup stays exact, with a filter that never saw the rows.
#[tokio::test(flavor = "multi_thread")]
async fn restored_from_a_dump() {
    let pair = notes("(1, 'a'), (2, 'b'), (3, 'a'), (4, 'c')").await;
    run(&pair).exits(exit::DONE).await;
    let restored = pair.restored().await;
    pair.source.exec("INSERT INTO public.notes VALUES (5, 'c'), (6, 'new')").await;
    let output = from(&pair.source_cluster, &pair.target_cluster, "restored").output().await;
    if output.code != Some(exit::DONE) {
        // The rows are in other files than those the entries were made of: it may ask to look first.
        assert_eq!(output.code, Some(exit::ERROR), "{}", output.describe());
        output.says("reindex_target");
        restored.exec("SELECT dedup.reindex_target('public.notes')").await;
        from(&pair.source_cluster, &pair.target_cluster, "restored").exits(exit::DONE).await;
    }
    assert_exact(&pair.source, &restored, &NOTES).await;
    assert_index(&restored, &NOTES).await;
    let inserted: i64 = restored
        .one(&format!("SELECT sum(inserted_count)::bigint FROM dedup.checkpoints WHERE run_id = {LAST_RUN}"))
        .await;
    assert_eq!(inserted, 1, "only what is new is written");
}

/// A dump may leave the hash index out: the next run makes it anew before it writes.
#[tokio::test(flavor = "multi_thread")]
async fn restored_without_the_index() {
    let pair = notes("(1, 'a'), (2, 'b'), (3, 'a')").await;
    run(&pair).exits(exit::DONE).await;
    pair.target.exec("ALTER DATABASE it SET pg_dedup_migrate.dump_index = off").await;
    let restored = pair.restored().await;
    assert_eq!(restored.one::<i64>("SELECT count(*) FROM dedup.segment_block").await, 0);
    assert_eq!(restored.one::<i64>("SELECT count(*) FROM dedup.runs").await, 1);
    let migrate = from(&pair.source_cluster, &pair.target_cluster, "restored");
    pair.source.exec("INSERT INTO public.notes VALUES (4, 'b'), (5, 'c')").await;
    migrate.exits(exit::DONE).await.says("2 rows that stood there are indexed");
    assert_eq!(restored.column("SELECT id FROM public.notes ORDER BY id").await, ["1", "2", "5"]);
    assert_exact(&pair.source, &restored, &NOTES).await;
    assert_index(&restored, &NOTES).await;
}

/// The server restarted between two runs: what was known is known, from the segments.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart() {
    let mut pair = notes("(1, 'a'), (2, 'b'), (3, 'a')").await;
    run(&pair).exits(exit::DONE).await;
    for how in [Stop::Fast, Stop::Immediate] {
        pair.target_cluster.restart(how);
        pair.reconnect_target().await;
        run(&pair).exits(exit::DONE).await;
        assert_books(&pair.target, Books { source: 3, unchanged: 2, duplicate: 1, ..Books::default() }).await;
        assert_current(&pair).await;
    }
}

/// Keys that are equal and not the same bytes: 1.0 became 1.00 in the source.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_written_otherwise() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.notes (id numeric PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO public.notes VALUES (1.0, 'a'), (2.0, 'b'), (3, 'a')").await;
    run(&pair).exits(exit::DONE).await;
    pair.source.exec("UPDATE public.notes SET id = 1.00 WHERE id = 1; UPDATE public.notes SET id = 2.000, body = 'c' WHERE id = 2").await;
    run(&pair).exits(exit::DONE).await;
    assert_books(&pair.target, Books { source: 3, updated: 2, duplicate: 1, ..Books::default() }).await;
    assert_current(&pair).await;
    run(&pair).exits(exit::DONE).await;
    assert_books(&pair.target, Books { source: 3, unchanged: 2, duplicate: 1, ..Books::default() }).await;
}

/// GENERATED ALWAYS keeps the key to itself, in COPY and in UPDATE.
#[tokio::test(flavor = "multi_thread")]
async fn an_identity_that_is_always_generated() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text)")
        .await;
    pair.source.exec("INSERT INTO public.notes (body) VALUES ('a'), ('b'), ('a')").await;
    run(&pair).exits(exit::DONE).await;
    pair.source.exec("UPDATE public.notes SET body = 'c' WHERE id = 2").await;
    run(&pair).exits(exit::DONE).await;
    assert_books(
        &pair.target,
        Books { source: 3, updated: 1, unchanged: 1, duplicate: 1, ..Books::default() },
    )
    .await;
    assert_current(&pair).await;
}

/// Somebody else writes a key between the look at the target and the write: the chunk is done again and updates.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_appears_meanwhile() {
    let pair = notes("(1, 'a'), (2, 'b'), (3, 'c')").await;
    pair.target
        .exec(
            "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN IF NEW.id = 1 THEN PERFORM pg_advisory_xact_lock_shared(42); END IF; RETURN NEW; END $$; \
             CREATE TRIGGER hold BEFORE INSERT ON public.notes FOR EACH ROW EXECUTE FUNCTION hold()",
        )
        .await;
    let holder = pair.target_again().await;
    holder.exec("SELECT pg_advisory_lock(42)").await;
    let sidecar = run(&pair).spawn();
    loop {
        let waits: bool = pair
            .target
            .one("SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted)")
            .await;
        if waits {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    pair.target.exec("INSERT INTO public.notes VALUES (2, 'of an application')").await;
    holder.exec("SELECT pg_advisory_unlock(42)").await;
    let output = sidecar.finish().await;
    assert_eq!(output.code, Some(exit::DONE), "{}", output.describe());
    assert_books(&pair.target, Books { source: 3, inserted: 2, updated: 1, ..Books::default() }).await;
    assert_exact(&pair.source, &pair.target, &NOTES).await;
    let images = pair.target.column("SELECT action FROM dedup.before_images").await;
    assert_eq!(images, ["update"]);
}

/// A row that has to go because another has its new content, and cannot because somebody points at it: set aside, and
/// nothing that points at it is touched.
#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_row_that_is_referenced() {
    for on_delete in ["NO ACTION", "CASCADE", "SET NULL"] {
        let pair = notes("(1, 'a'), (2, 'b'), (3, 'c')").await;
        run(&pair).exits(exit::DONE).await;
        pair.target
            .exec(&format!(
                "CREATE TABLE public.readers (note int REFERENCES public.notes ON DELETE {on_delete}); \
                 INSERT INTO public.readers VALUES (1)"
            ))
            .await;
        pair.source.exec("UPDATE public.notes SET body = 'b' WHERE id IN (1, 3)").await;
        run(&pair).exits(exit::LEFT_ASIDE).await;
        let expected = Books { source: 3, unchanged: 1, duplicate: 1, quarantined: 1, ..Books::default() };
        assert_books(&pair.target, expected).await;
        let rows = pair.target.column("SELECT id || ' ' || body FROM public.notes ORDER BY id").await;
        assert_eq!(rows, ["1 a", "2 b"], "{on_delete}");
        assert_eq!(pair.target.column("SELECT note FROM public.readers").await, ["1"], "{on_delete}");
        let aside =
            pair.target.column("SELECT concat_ws(' ', source_key, sqlstate) FROM dedup.quarantine").await;
        assert_eq!(aside, ["id=1 23503"], "{on_delete}");
        assert_index(&pair.target, &NOTES).await;
    }
}

/// A row that cannot be replaced keeps its content, so that no other key of the chunk may carry it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_replacement_and_its_old_content() {
    let pair = notes("(1, 'a'), (2, 'b')").await;
    run(&pair).exits(exit::DONE).await;
    pair.target.exec("ALTER TABLE public.notes ADD CHECK (body <> 'poison')").await;
    pair.source
        .exec(
            "UPDATE public.notes SET body = 'poison' WHERE id = 1; INSERT INTO public.notes VALUES (3, 'a')",
        )
        .await;
    run(&pair).exits(exit::LEFT_ASIDE).await;
    assert_eq!(contents(&pair.target).await, ["a", "b"]);
    assert_index(&pair.target, &NOTES).await;
    pair.target.exec("ALTER TABLE public.notes DROP CONSTRAINT notes_body_check").await;
    pair.target.one::<i32>(&format!("SELECT dedup.requeue({LAST_RUN}, 'quarantined')")).await;
    pair.resume().exits(exit::DONE).await;
    assert_current(&pair).await;
}

/// Contents move on from key to key, and the last row can't be replaced: the record that took its content over is a duplicate of it, and the
/// row that was replaced for it goes. What a rollback brings back is the row as it was, the columns that no run delivers included.
#[tokio::test(flavor = "multi_thread")]
async fn contents_that_move_on_from_a_row_that_stays() {
    let pair = notes("(1, 'a'), (2, 'b'), (3, 'c'), (4, 'd')").await;
    run(&pair).exits(exit::DONE).await;
    pair.target
        .exec(
            "ALTER TABLE public.notes ADD CHECK (body <> 'poison'), ADD remark text; \
             UPDATE public.notes SET remark = 'of ' || id",
        )
        .await;
    let all = "SELECT id || ' ' || body || ' ' || coalesce(remark, '-') FROM public.notes ORDER BY id";
    let before = pair.target.column(all).await;
    pair.source
        .exec("UPDATE public.notes SET body = CASE id WHEN 1 THEN 'b' WHEN 2 THEN 'c' WHEN 3 THEN 'poison' ELSE 'e' END")
        .await;
    run(&pair).exits(exit::LEFT_ASIDE).await;
    assert_eq!(pair.target.column(all).await, ["1 b of 1", "3 c of 3", "4 e of 4"]);
    assert_books(
        &pair.target,
        Books { source: 4, updated: 2, duplicate: 1, quarantined: 1, ..Books::default() },
    )
    .await;
    assert_index(&pair.target, &NOTES).await;
    pair.rollback("last").exits(exit::DONE).await;
    assert_eq!(pair.target.column(all).await, before);
    assert_index(&pair.target, &NOTES).await;
}

/// A row that waits for a foreign key in vain keeps its content, too, also where its key was to have another by then.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_waits_in_vain_keeps_its_content() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.notes (id int PRIMARY KEY, body text, parent int)").await;
    pair.target.exec("ALTER TABLE public.notes ADD FOREIGN KEY (parent) REFERENCES public.notes").await;
    pair.source
        .exec("INSERT INTO public.notes VALUES (1, 'a', NULL), (2, 'b', NULL); ANALYZE public.notes")
        .await;
    run(&pair).exits(exit::DONE).await;
    pair.source
        .exec(
            "UPDATE public.notes SET body = 'c', parent = 99 WHERE id = 1; \
             INSERT INTO public.notes VALUES (3, 'a', NULL), (4, 'd', 5), (5, 'e', NULL)",
        )
        .await;
    run(&pair).exits(exit::LEFT_ASIDE).await;
    assert_eq!(contents(&pair.target).await, ["a", "b", "d", "e"]);
    let aside = pair.target.column("SELECT concat_ws(' ', source_key, sqlstate) FROM dedup.quarantine").await;
    assert_eq!(aside, ["id=1 23503"]);
    assert_index(&pair.target, &NOTES).await;
}
