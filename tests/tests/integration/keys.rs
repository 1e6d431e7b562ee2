//! Keys of every kind, in chunks by their order, with gaps and at their limits.

use integration::check::{Table, assert_first_run};
use integration::pair::Pair;
use integration::sidecar::exit;

/// Migrates `(key…, body)` where `key_columns` defines the key columns and `keys` selects their values of `n`.
async fn migrates(key_columns: &str, key_names: &[&str], keys: &str) {
    let pair = Pair::start().await;
    let names = key_names.join(", ");
    pair.both(&format!("CREATE TABLE public.keyed ({key_columns}, body text, PRIMARY KEY ({names}))")).await;
    pair.source
        .exec(&format!(
            "INSERT INTO public.keyed SELECT {keys}, 'body ' || n % 4000 || repeat('.', 40) \
             FROM generate_series(1, 6000) AS n; ANALYZE public.keyed"
        ))
        .await;
    pair.run(&["public.keyed"])
        .args(&["--content-columns", "public.keyed:body"])
        .workers(4)
        .chunk_size("40kB")
        .exits(exit::DONE)
        .await;
    let mut columns = key_names.to_vec();
    columns.push("body");
    let table =
        Table { source: "public.keyed", target: "public.keyed", content: &["body"], columns: &columns };
    assert_first_run(&pair.source, &pair.target, &table).await;
    let empty: i64 = pair.target.one("SELECT count(*) FROM dedup.checkpoints WHERE source_count = 0").await;
    let chunks: i64 = pair.target.one("SELECT count(*) FROM dedup.checkpoints").await;
    assert!(chunks >= 4, "{chunks} chunks");
    // A first or last chunk of a range may be empty, and the one for NULL keys; gaps must not make more.
    assert!(empty <= 3, "{empty} of {chunks} chunks are empty");
}

#[tokio::test(flavor = "multi_thread")]
async fn bigint_with_huge_gaps() {
    migrates(
        "id bigint",
        &["id"],
        "CASE n % 3 WHEN 0 THEN n WHEN 1 THEN 9223372036854775807 - n ELSE -9223372036854775807 + n END",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn text_in_another_order() {
    migrates("id text", &["id"], "chr((65 + n % 26 + 32 * (n % 2))::int) || repeat('é', n % 3) || ' ' || n")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn text_in_a_linguistic_collation() {
    migrates(
        "id text COLLATE \"und-x-icu\"",
        &["id"],
        "(ARRAY['Äpfel', 'apfel', 'Zebra', 'zebra', 'ähre', 'co-op', 'coop'])[n % 7 + 1] || n",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uuid() {
    migrates("id uuid", &["id"], "md5(n::text)::uuid").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn timestamps() {
    migrates(
        "id timestamptz",
        &["id"],
        "CASE n WHEN 1 THEN 'infinity' WHEN 2 THEN '-infinity' WHEN 3 THEN '0044-03-15 BC' \
         ELSE timestamptz '2000-01-01+00' + n * n * interval '1.000001 seconds' END",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn composite_of_three() {
    migrates(
        "tenant int, name text, at date",
        &["tenant", "name", "at"],
        "n % 5, CASE WHEN n % 2 = 0 THEN '' ELSE 'n' || n % 100 END, date '2024-01-01' + n",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn composite_with_one_dominant_value() {
    migrates("tenant int, id bigint", &["tenant", "id"], "CASE WHEN n < 5900 THEN 1 ELSE n END, n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn numeric_with_scales() {
    migrates("id numeric", &["id"], "n * 1.10 + CASE WHEN n % 2 = 0 THEN 1e20 ELSE 0.000 END").await;
}

/// A source without the target's key constraint can hold NULL keys: a chunk of their own, set aside by the target.
#[tokio::test(flavor = "multi_thread")]
async fn null_keys_are_quarantined() {
    let pair = Pair::start().await;
    pair.source.exec("CREATE TABLE public.keyed (id int, body text)").await;
    pair.target.exec("CREATE TABLE public.keyed (id int PRIMARY KEY, body text)").await;
    pair.source
        .exec(
            "INSERT INTO public.keyed SELECT CASE WHEN n % 100 = 0 THEN NULL ELSE n END, 'body ' || n \
             FROM generate_series(1, 2000) AS n; CREATE UNIQUE INDEX ON public.keyed (id); ANALYZE public.keyed",
        )
        .await;
    pair.run(&["public.keyed"])
        .args(&["--content-columns", "public.keyed:body"])
        .workers(2)
        .exits(exit::LEFT_ASIDE)
        .await;
    let rows: i64 = pair.target.one("SELECT count(*) FROM public.keyed").await;
    assert_eq!(rows, 1_980);
    let aside: i64 = pair.target.one("SELECT count(*) FROM dedup.quarantine").await;
    assert_eq!(aside, 20);
}
