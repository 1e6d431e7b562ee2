//! Runs that were repaired, taken back: a row that was gone and is written again has no before image.

use integration::pair::Pair;
use integration::sidecar::exit;

/// One run of a source table into `public.it`, of which `v` is the content.
async fn run(pair: &Pair, source: &str, name: &str) {
    let flags = ["--exclude-columns", &format!("public.{source}:id"), "--name", name];
    pair.run(&[&format!("public.{source}=public.it")]).args(&flags).workers(1).exits(exit::DONE).await;
}

/// A keyed target, and a source table with these rows.
async fn keyed(rows: &str) -> Pair {
    let pair = Pair::start().await;
    pair.target.exec("CREATE TABLE public.it (id int PRIMARY KEY, v text)").await;
    source(&pair, "a", rows).await;
    pair
}

async fn source(pair: &Pair, name: &str, rows: &str) {
    pair.source
        .exec(&format!("CREATE TABLE public.{name} (id int PRIMARY KEY, v text); INSERT INTO public.{name} VALUES {rows}; ANALYZE public.{name}"))
        .await;
}

async fn repaired(pair: &Pair, run: &str, flags: &[&str]) {
    pair.sidecar("reconcile").arg(run).exits(exit::HALTED).await;
    pair.sidecar("repair").arg(run).args(flags).exits(exit::DONE).await;
}

async fn assert_rows(pair: &Pair, expected: &[&str]) {
    assert_eq!(pair.target.column("SELECT t::text FROM public.it AS t ORDER BY 1").await, expected);
}

/// Nothing is left in the index, and no image.
async fn assert_forgotten(pair: &Pair) {
    for what in ["dedup.hash_index('public.it')", "dedup.before_images", "dedup.ledger_block"] {
        assert_eq!(pair.target.one::<i64>(&format!("SELECT count(*) FROM {what}")).await, 0, "{what}");
    }
}

/// The row is kept for who rests on it, whichever of the entries of it was taken back.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_kept_for_others() {
    let pair = keyed("(1, 'x'), (2, 'y')").await;
    run(&pair, "a", "a").await;
    source(&pair, "b", "(5, 'x')").await;
    run(&pair, "b", "b").await;
    pair.target.exec("DELETE FROM public.it WHERE id = 1").await;
    repaired(&pair, "a", &[]).await;
    pair.rollback("a").arg("--force").exits(exit::DONE).await;
    assert_rows(&pair, &["(1,x)"]).await;
    pair.sidecar("reconcile").arg("b").exits(exit::DONE).await;
    pair.rollback("b").exits(exit::DONE).await;
    assert_rows(&pair, &[]).await;
    assert_forgotten(&pair).await;
}

/// What another run's repair wrote under the key of a row that was gone is that run's.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_another_run_wrote_again() {
    let pair = keyed("(1, 'x'), (2, 'y')").await;
    run(&pair, "a", "a").await;
    pair.target.exec("DELETE FROM public.it WHERE id = 1").await;
    run(&pair, "a", "b").await;
    repaired(&pair, "b", &[]).await;
    assert_rows(&pair, &["(1,x)", "(2,y)"]).await;
    let refused = pair.rollback("a").output().await;
    assert_ne!(refused.code, Some(exit::DONE), "{}", refused.describe());
    refused.says("other runs depend on");
    pair.rollback("a").arg("--force").exits(exit::LEFT_ASIDE).await;
    assert_rows(&pair, &["(1,x)", "(2,y)"]).await;
    pair.sidecar("reconcile").arg("b").exits(exit::DONE).await;
    pair.rollback("b").exits(exit::DONE).await;
    assert_rows(&pair, &[]).await;
    assert_forgotten(&pair).await;
}

/// Without keys: of a row that was gone and was written again one is taken back.
#[tokio::test(flavor = "multi_thread")]
async fn rows_without_keys() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.it (v text)").await;
    pair.source.exec("INSERT INTO public.it VALUES ('x'), ('y'); ANALYZE public.it").await;
    pair.run(&["public.it"]).exits(exit::DONE).await;
    pair.target.exec("DELETE FROM public.it WHERE v = 'x'").await;
    repaired(&pair, "last", &[]).await;
    assert_rows(&pair, &["(x)", "(y)"]).await;
    pair.target.exec("INSERT INTO public.it VALUES ('x')").await;
    pair.rollback("last").exits(exit::DONE).await;
    assert_rows(&pair, &["(x)"]).await;
}

/// Without keys: what a repair deleted as too much, of an earlier run, is there again.
#[tokio::test(flavor = "multi_thread")]
async fn extra_rows_without_keys() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.it (v text)").await;
    pair.source.exec("INSERT INTO public.it VALUES ('x'), ('y'); ANALYZE public.it").await;
    pair.run(&["public.it"]).args(&["--name", "a"]).exits(exit::DONE).await;
    pair.source.exec("DELETE FROM public.it WHERE v = 'x'").await;
    pair.run(&["public.it"]).args(&["--name", "b"]).exits(exit::DONE).await;
    repaired(&pair, "b", &["--delete-extra"]).await;
    assert_rows(&pair, &["(y)"]).await;
    pair.rollback("b").exits(exit::DONE).await;
    assert_rows(&pair, &["(x)", "(y)"]).await;
    pair.rollback("a").exits(exit::DONE).await;
    assert_rows(&pair, &[]).await;
    assert_forgotten(&pair).await;
}
