//! The grants of docs/privileges.md are enough for what it says they are for, and alerts are looked at with them.

use integration::pair::{DATABASE, Pair};
use integration::sidecar::{Invocation, exit};

const PAGE: &str = include_str!("../../../docs/privileges.md");

/// The SQL of a section.
fn sql_of(section: &str) -> String {
    let section = PAGE
        .split("\n## ")
        .find(|s| s.starts_with(section))
        .unwrap_or_else(|| panic!("no section {section}"));
    let blocks: Vec<&str> = section.split("```sql\n").skip(1).filter_map(|s| s.split("```").next()).collect();
    assert!(!blocks.is_empty());
    // What a role on the source is granted there.
    blocks.into_iter().filter(|block| !block.contains("ROLE reader")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_and_an_observer() {
    let pair = Pair::start().await;
    let db = &pair.target;
    pair.both("CREATE SCHEMA x; CREATE TABLE x.orders (id bigserial PRIMARY KEY, body text)").await;
    pair.source.exec("INSERT INTO x.orders SELECT n, 'order ' || n % 700 FROM generate_series(1, 1000) AS n; ANALYZE x.orders").await;
    db.exec(&sql_of("A worker")).await;
    db.exec(&sql_of("An observer")).await;
    let target = |role: &str| pair.target_cluster.url(DATABASE).replace("postgres@", &format!("{role}@"));
    let on_both = |command: &str| {
        Invocation::new(command).args(&[
            "--source",
            &pair.source_cluster.url(DATABASE),
            "--target",
            &target("loader"),
        ])
    };
    let run = on_both("run")
        .args(&["--table", "x.orders", "--disk-floor", "0", "--name", "shop"])
        .exits(exit::DONE)
        .await;
    on_both("reconcile").arg("shop").exits(exit::DONE).await;
    assert!(!run.stderr.contains("alerts are not looked at"), "{}", run.describe());
    assert!(!run.stderr.contains("can't be asked"), "{}", run.describe());
    db.exec("DELETE FROM x.orders WHERE id = 5").await;
    on_both("reconcile").arg("shop").exits(exit::HALTED).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM dedup.alerts WHERE kind = 'mismatches'").await, 1);
    on_both("repair").arg("shop").exits(exit::DONE).await;

    let observing = |command: &str| Invocation::new(command).args(&["--target", &target("observer")]);
    observing("status").arg("shop").exits(exit::DONE).await;
    observing("report").args(&["shop", "--format", "json"]).exits(exit::DONE).await;

    let dir = tempfile::tempdir().expect("a folder");
    let on_target = |command: &str| Invocation::new(command).args(&["--target", &target("loader")]);
    on_target("report")
        .args(&["shop", "--archive", &dir.path().display().to_string()])
        .exits(exit::DONE)
        .await;
    let purged = on_target("purge").args(&["--reconciliations", "0s"]).exits(exit::DONE).await;
    assert!(purged.stdout.contains("went"), "{}", purged.describe());
    // What the repair found gone is not what the run wrote: it is told.
    on_target("rollback").args(&["shop", "--yes"]).exits(exit::LEFT_ASIDE).await;
    assert_eq!(db.one::<i64>("SELECT count(*) FROM x.orders").await, 0);
    on_target("report")
        .args(&["shop", "--archive", &dir.path().display().to_string()])
        .exits(exit::DONE)
        .await;
    db.exec("SELECT dedup.set_bake_in(run_id, now()) FROM dedup.runs").await;
    let purged = on_target("purge").args(&["--history", "0s", "--archives", "0s"]).exits(exit::DONE).await;
    assert!(purged.stdout.contains("history") && purged.stdout.contains("went"), "{}", purged.describe());
}
