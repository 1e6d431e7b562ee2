//! Runs that write the same keys again and again, taken back by force in whatever order: nothing of any of them is left.

use integration::pair::Pair;
use integration::sidecar::{Output, exit};

/// Sources that all go into `public.it`, by name: their rows.
type Sources = &'static [(&'static str, &'static str)];

/// Migrates each source by a run of its own, of which `id` is no content.
async fn migrated(sources: Sources) -> Pair {
    let pair = Pair::start().await;
    pair.target.exec("CREATE TABLE public.it (id int PRIMARY KEY, v text)").await;
    for (name, rows) in sources {
        pair.source
            .exec(&format!(
                "CREATE TABLE public.{name} (id int PRIMARY KEY, v text); INSERT INTO public.{name} VALUES {rows}; ANALYZE public.{name}"
            ))
            .await;
        run(&pair, name).await;
    }
    pair
}

async fn run(pair: &Pair, name: &str) -> Output {
    pair.run(&[&format!("public.{name}=public.it")])
        .args(&["--exclude-columns", &format!("public.{name}:id"), "--name", name])
        .workers(1)
        .output()
        .await
}

/// Goes on with each run so often: each reopens the others, whose survivors it overwrites.
async fn resumed(pair: &Pair, sources: Sources, rounds: usize) {
    for _ in 0..rounds {
        for (name, _) in sources {
            pair.sidecar("run").args(&["--resume", name]).workers(1).output().await;
        }
    }
    pair.target
        .exec(
            "SELECT dedup.cancel_run(run_id) FROM dedup.runs WHERE status IN ('failed', 'running', 'paused')",
        )
        .await;
}

/// Takes the runs back in this order; nothing is left of rows, entries and images.
async fn taken_back(pair: &Pair, order: &[&str]) {
    for name in order {
        pair.rollback(name).arg("--force").exits(exit::DONE).await;
    }
    let db = &pair.target;
    assert_eq!(db.column("SELECT id || '=' || v FROM public.it").await, [""; 0], "in order {order:?}");
    for table in ["before_images", "ledger_block", "unchanged_rows"] {
        assert_eq!(db.one::<i64>(&format!("SELECT count(*) FROM dedup.{table}")).await, 0, "{table}");
    }
    let entries: i64 = db.one("SELECT count(*) FROM dedup.hash_index('public.it')").await;
    assert_eq!(entries, 0, "entries without a row");
}

const THREE: Sources =
    &[("a", "(40, 'c8'), (39, 'c8')"), ("b", "(0, 'c8')"), ("c", "(40, 'c18'), (38, 'c18')")];
const OTHERS: Sources =
    &[("a", "(12, 'c21'), (28, 'c21'), (43, 'c17')"), ("b", "(38, 'c17')"), ("c", "(12, 'c3'), (43, 'c25')")];
const ORDERS: [[&str; 3]; 6] =
    [["a", "b", "c"], ["a", "c", "b"], ["b", "a", "c"], ["b", "c", "a"], ["c", "a", "b"], ["c", "b", "a"]];

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_two_runs_fight_for() {
    for order in ORDERS {
        let pair = migrated(THREE).await;
        resumed(&pair, THREE, 3).await;
        taken_back(&pair, &order).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn contents_that_move_from_key_to_key() {
    for order in ORDERS {
        let pair = migrated(OTHERS).await;
        resumed(&pair, OTHERS, 1).await;
        taken_back(&pair, &order).await;
    }
}

/// A run that was repaired has written a row twice, with another run's between.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_repaired() {
    const TWO: Sources = &[("a", "(1, 'a')"), ("b", "(1, 'b')")];
    for order in
        [["a", "d", "b"], ["a", "b", "d"], ["b", "a", "d"], ["d", "a", "b"], ["b", "d", "a"], ["d", "b", "a"]]
    {
        let pair = migrated(TWO).await;
        pair.sidecar("reconcile").arg("a").exits(exit::HALTED).await;
        pair.sidecar("repair").arg("a").exits(exit::DONE).await;
        pair.source.exec("CREATE TABLE public.d (id int PRIMARY KEY, v text); INSERT INTO public.d VALUES (5, 'a'); ANALYZE public.d").await;
        run(&pair, "d").await;
        taken_back(&pair, &order).await;
    }
}
