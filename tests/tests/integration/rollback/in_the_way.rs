//! What somebody changed, and what points at rows that are to go.

use integration::db::Db;
use integration::pair::Pair;
use integration::sidecar::exit;

use super::{assert_index_is_true, notes, refused, rows, run_of, runs, status};

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_somebody_changed_are_left_alone() {
    for forced in [false, true] {
        let pair = notes("SELECT n, CASE WHEN n > 100 THEN 'r ' || n ELSE 'x ' || n END, 'a' FROM generate_series(1, 120) AS n").await;
        let db = &pair.target;
        db.exec(
            "INSERT INTO public.notes SELECT n, 'p ' || n, 'p' FROM generate_series(1, 20) AS n; \
                 INSERT INTO public.notes SELECT n, 'q ' || n, 'q' FROM generate_series(101, 120) AS n; \
                 INSERT INTO public.notes SELECT 100 + n, 'r ' || n, 'r' FROM generate_series(101, 120) AS n",
        )
        .await;
        let before = rows(db, "public.notes").await;
        let run = run_of(&pair, "notes").await;
        // Of rows inserted, replaced and removed some each.
        db.exec(
            "UPDATE public.notes SET remark = 'app' WHERE id IN (5, 50); UPDATE public.notes SET body = 'app' WHERE id = 51; \
             DELETE FROM public.notes WHERE id IN (6, 52)",
        )
        .await;
        let removed: i32 = db.one("SELECT min(n) FROM generate_series(101, 120) AS n WHERE n NOT IN (SELECT id FROM public.notes)").await;
        db.exec(&format!("INSERT INTO public.notes VALUES ({removed}, 'app too', 'app')")).await;
        let sidecar = pair.rollback("last").args(if forced { &["--force"] } else { &[] });
        let told = |db| async move {
            Db::column(db, "SELECT key || ' ' || reason FROM dedup.left_alone ORDER BY reason, key").await
        };
        let gone = "id=52 gone";
        if forced {
            sidecar.exits(exit::LEFT_ASIDE).await;
            assert_eq!(told(db).await, [gone]);
            assert_eq!(rows(db, "public.notes").await, before);
        } else {
            let output = sidecar.exits(exit::LEFT_ASIDE).await;
            assert!(
                output.stdout.contains("left alone: public.notes id=50 is changed"),
                "{}",
                output.describe()
            );
            let occupied = format!("id={removed} occupied");
            assert_eq!(
                told(db).await,
                ["id=5 changed", "id=50 changed", "id=51 changed", gone, "id=6 gone", &occupied]
            );
            let untouched = db
                .column(
                    "SELECT t::text FROM public.notes AS t WHERE remark = 'app' OR body = 'app' ORDER BY id",
                )
                .await;
            assert_eq!(untouched.len(), 4, "{untouched:?}");
            let rest = format!(
                "SELECT t::text FROM public.notes AS t WHERE id NOT IN (5, 6, 50, 51, {removed}) ORDER BY 1"
            );
            assert_eq!(db.column(&rest).await.len(), before.len() - 3);
            // The image of what could not be given back is still there.
            assert_eq!(
                db.column("SELECT dedup.key_text(target_id, key) FROM dedup.before_images ORDER BY 1")
                    .await
                    .len(),
                3
            );
        }
        // Every row that stands has its entry, so that nothing is written twice.
        let entries: i64 = db
            .one(
                "SELECT count(*) FROM public.notes AS t JOIN dedup.hash_index('public.notes') AS h \
             ON h.content_hash = dedup.content_hash(t.body) AND h.target_location_uri LIKE '%?id=' || t.id",
            )
            .await;
        assert_eq!(entries, db.one::<i64>("SELECT count(*) FROM public.notes").await);
        assert_eq!(status(db, &run).await, "rolled_back");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_others_point_at_are_refused_by_name() {
    let pair = Pair::start().await;
    pair.both(
        "CREATE TABLE public.parents (id int PRIMARY KEY, name text, boss int REFERENCES public.parents); \
         CREATE TABLE public.children (id int PRIMARY KEY, parent int NOT NULL REFERENCES public.parents ON DELETE CASCADE)",
    )
    .await;
    pair.source
        .exec(
            "INSERT INTO public.parents SELECT n, 'parent ' || n, CASE WHEN n > 1 THEN n / 2 END FROM generate_series(1, 300) AS n; \
             INSERT INTO public.children SELECT n, n % 300 + 1 FROM generate_series(1, 900) AS n; ANALYZE",
        )
        .await;
    let db = &pair.target;
    for way in ["sidecar", "SELECT dedup.rollback_run", "CALL dedup.rollback_run_in_chunks"] {
        pair.run(&["public.children", "public.parents"]).chunk_size("1kB").exits(exit::DONE).await;
        let run = runs(db).await.pop().unwrap_or_default();
        db.exec("CREATE TABLE public.visits (id int, parent int, FOREIGN KEY (parent) REFERENCES public.parents (id) ON DELETE SET NULL); \
                 INSERT INTO public.visits VALUES (1, 17), (2, NULL), (3, 40)")
            .await;
        db.exec("INSERT INTO public.children VALUES (5000, 20)").await;
        let before = rows(db, "public.parents").await;
        let says = ["visits_parent_fkey", "public.visits", "id=17, id=40", "children_parent_fkey", "id=20"];
        if way == "sidecar" {
            let output = pair.rollback("last").exits(exit::ERROR).await;
            says.iter().for_each(|part| assert!(output.stderr.contains(part), "{}", output.describe()));
        } else {
            refused(db, &format!("{way}('{run}')"), "23503", &says).await;
        }
        assert_eq!(rows(db, "public.parents").await, before);
        assert_eq!(status(db, &run).await, "done");
        db.exec("DROP TABLE public.visits; DELETE FROM public.children WHERE id = 5000").await;
        if way == "sidecar" {
            pair.rollback("last").exits(exit::DONE).await;
        } else {
            db.exec(&format!("{way}('{run}')")).await;
        }
        assert_eq!(
            db.one::<i64>(
                "SELECT (SELECT count(*) FROM public.parents) + (SELECT count(*) FROM public.children)"
            )
            .await,
            0,
            "{way}"
        );
    }
}

/// A trigger that rewrites what comes back is not taken for a restored row.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_restored_is_read_back() {
    let pair = notes("SELECT n, 'x ' || n, 'a' FROM generate_series(1, 50) AS n").await;
    let db = &pair.target;
    db.exec("INSERT INTO public.notes SELECT n, 'p ' || n, 'p' FROM generate_series(1, 10) AS n").await;
    let before = rows(db, "public.notes").await;
    let run = run_of(&pair, "notes").await;
    db.exec(
        "CREATE FUNCTION public.meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.remark := 'meddled'; RETURN NEW; END $$; \
         CREATE TRIGGER meddle BEFORE UPDATE ON public.notes FOR EACH ROW EXECUTE FUNCTION public.meddle()",
    )
    .await;
    refused(db, &format!("SELECT dedup.rollback_run('{run}')"), "23000", &["trigger"]).await;
    db.exec("DROP TRIGGER meddle ON public.notes").await;
    db.exec(&format!("SELECT dedup.rollback_run('{run}')")).await;
    assert_eq!(rows(db, "public.notes").await, before);
}

/// What a run would have put back and didn't stands nowhere: a later record with that content is written.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_to_rows_left_alone() {
    let pair = notes("VALUES (1, 'X1', 'a'), (2, 'X2', 'a'), (3, 'X3', 'a'), (4, 'X3', 'a')").await;
    let db = &pair.target;
    db.exec("INSERT INTO public.notes VALUES (1, 'P1', 'p'), (2, 'P2', 'p'), (3, 'X3', 'p'), (4, 'P4', 'p')")
        .await;
    let run = run_of(&pair, "notes").await;
    db.exec("UPDATE public.notes SET body = 'app' WHERE id = 1; DELETE FROM public.notes WHERE id = 2; INSERT INTO public.notes VALUES (4, 'app4', 'q')").await;
    db.exec(&format!("SELECT dedup.rollback_run('{run}')")).await;
    assert_eq!(
        db.column("SELECT reason FROM dedup.left_alone ORDER BY 1").await,
        ["changed", "gone", "occupied"]
    );
    assert_index_is_true(db).await;
    pair.source
        .exec("INSERT INTO public.others VALUES (11, 'P1', 'c'), (12, 'P2', 'c'), (14, 'P4', 'c')")
        .await;
    run_of(&pair, "others").await;
    let written = db.column("SELECT body FROM public.notes WHERE id > 10 ORDER BY 1").await;
    assert_eq!(written, ["P1", "P2", "P4"]);
}

/// Rows that row security hides would be deleted along with the row they point at.
#[tokio::test(flavor = "multi_thread")]
async fn hidden_references_are_refused() {
    let pair = notes("SELECT n, 'body ' || n, 'a' FROM generate_series(1, 20) AS n").await;
    let db = &pair.target;
    let run = run_of(&pair, "notes").await;
    db.exec(
        "CREATE ROLE dba SUPERUSER; CREATE ROLE plain; GRANT ALL ON SCHEMA dedup, public TO plain; GRANT ALL ON ALL TABLES IN SCHEMA dedup, public TO plain; \
         GRANT ALL ON ALL SEQUENCES IN SCHEMA dedup TO plain; GRANT EXECUTE ON ALL ROUTINES IN SCHEMA dedup TO plain; ALTER TABLE public.notes OWNER TO plain; \
         CREATE TABLE public.visits (note int REFERENCES public.notes ON DELETE CASCADE); INSERT INTO public.visits VALUES (5); GRANT SELECT ON public.visits TO plain; \
         ALTER TABLE public.visits ENABLE ROW LEVEL SECURITY; CREATE POLICY hide ON public.visits USING (false)",
    )
    .await;
    db.exec("SET ROLE plain").await;
    refused(db, &format!("SELECT dedup.rollback_run('{run}')"), "42501", &["public.visits", "row security"])
        .await;
    db.exec("RESET ROLE").await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM public.visits").await, 1);
    refused(db, &format!("SELECT dedup.rollback_run('{run}')"), "23503", &["visits"]).await;
}

/// A row left alone by the rollback of a later run is left alone by that of an earlier one, too, and overwritten if one forces it.
#[tokio::test(flavor = "multi_thread")]
async fn rows_left_alone_twice() {
    for (change, app) in [("body = 'y'", "body = 'app'"), ("remark = 'b'", "remark = 'app'")] {
        for force in [false, true] {
            let pair = notes("VALUES (1, 'x', 'a'), (2, 'z', 'a')").await;
            let db = &pair.target;
            let a = run_of(&pair, "notes").await;
            pair.source.exec(&format!("UPDATE public.notes SET {change} WHERE id = 1")).await;
            let b = run_of(&pair, "notes").await;
            db.exec(&format!("UPDATE public.notes SET {app} WHERE id = 1; DELETE FROM dedup.unchanged_rows"))
                .await;
            db.exec(&format!("SELECT dedup.rollback_run('{b}')")).await;
            assert_index_is_true(db).await;
            db.exec(&format!("SELECT dedup.rollback_run('{a}', {force})")).await;
            let left = db.column("SELECT id::text FROM public.notes").await;
            assert_eq!(left, if force { vec![] } else { vec!["1".to_owned()] }, "{change} {force}");
            let told: i64 =
                db.one(&format!("SELECT count(*) FROM dedup.left_alone WHERE run_id = '{a}'")).await;
            assert_eq!(told, i64::from(!force), "{change} {force}");
            assert_index_is_true(db).await;
        }
    }
}

/// Foreign keys at rows that are kept, between partitions, and from rows that will be left alone.
#[tokio::test(flavor = "multi_thread")]
async fn references_are_looked_at_as_they_will_be() {
    let pair = Pair::start().await;
    pair.both(
        "CREATE TABLE public.parents (id int PRIMARY KEY, name text); \
         CREATE TABLE public.children (id int, parent int NOT NULL, note text, PRIMARY KEY (id)) PARTITION BY RANGE (id); \
         CREATE TABLE public.c1 PARTITION OF public.children FOR VALUES FROM (MINVALUE) TO (100); CREATE TABLE public.c2 PARTITION OF public.children FOR VALUES FROM (100) TO (MAXVALUE); \
         ALTER TABLE public.c1 ADD FOREIGN KEY (parent) REFERENCES public.parents; ALTER TABLE public.c2 ADD FOREIGN KEY (parent) REFERENCES public.parents",
    )
    .await;
    pair.source.exec("INSERT INTO public.parents SELECT n, 'p ' || n FROM generate_series(1, 20) AS n; INSERT INTO public.children SELECT n, n, 'a' FROM generate_series(1, 10) AS n").await;
    let run = pair
        .run(&["public.parents", "public.children"])
        .args(&["--content-columns", "public.children:id,parent"]);
    run.exits(exit::DONE).await;
    let db = &pair.target;
    let a = runs(db).await.remove(0);
    db.exec(&format!("BEGIN; SELECT dedup.rollback_run('{a}'); ROLLBACK")).await;
    db.exec("UPDATE public.children SET note = 'app' WHERE id = 3").await;
    refused(db, &format!("CALL dedup.rollback_run_in_chunks('{a}')"), "23503", &["id=3"]).await;
    assert_eq!(status(db, &a).await, "done");
    db.exec("UPDATE public.children SET note = 'a' WHERE id = 3").await;
    // A second run rests on the parents; its children point at them.
    pair.source.exec("DELETE FROM public.children; INSERT INTO public.children SELECT n, n - 190, 'b' FROM generate_series(191, 200) AS n").await;
    run.exits(exit::DONE).await;
    pair.rollback(&a).arg("--force").exits(exit::DONE).await;
    assert_eq!(
        db.texts("SELECT (SELECT count(*) FROM public.parents), (SELECT count(*) FROM public.children)")
            .await,
        [[Some("20".to_owned()), Some("10".to_owned())]]
    );
    pair.rollback("last").exits(exit::DONE).await;
    assert_eq!(
        db.texts("SELECT (SELECT count(*) FROM public.parents), (SELECT count(*) FROM public.children)")
            .await,
        [[Some("0".to_owned()), Some("0".to_owned())]]
    );
}
