//! Where a source table's chunks begin.
//!
//! Keys come from a sample in key order: all rows of a small table, random pages of a larger one (`TABLESAMPLE SYSTEM`),
//! so that planning stays a matter of seconds. A sampled row weighs what its columns take; a few rows are copied out to
//! learn how that relates to the bytes of the stream (TOAST may be compressed). An estimate that is off makes chunks
//! uneven, never wrong: the first is open below, the last above.

use futures_util::TryStreamExt;
use pg_dedup_record::range;
use serde::Serialize;
use tokio_postgres::types::ToSql;

use crate::catalog::Relation;
use crate::conn::{Session, protocol_error};
use crate::error::{At, Result, Side};
use crate::source::{Range, RangeKind, SourceSpec};

/// Most records a chunk may have: what the claims table of the target can hold for every worker.
pub const MAX_RECORDS: u64 = 1_000_000;
/// Heap pages up to which a table is read whole instead of sampled: 32 MB.
const EXACT_PAGES: i64 = 4096;
/// Pages sampled at least.
const SAMPLE_PAGES: i64 = 1000;
/// Pages sampled a chunk.
const PAGES_PER_CHUNK: i64 = 8;
/// Rows that a sample of pages may return, a chunk, at least and at most; beyond it rows are thinned out.
const SAMPLE_ROWS_PER_CHUNK: f64 = 250.0;
const LEAST_SAMPLE_ROWS: f64 = 5_000.0;
const MOST_SAMPLE_ROWS: f64 = 1_000_000.0;
/// Keys taken a chunk from a table that is read whole.
const KEYS_PER_CHUNK: u64 = 64;
/// Rows copied out to learn how many bytes the stream takes.
const PROBE_ROWS: i64 = 200;

/// One chunk of the plan, as `dedup.add_chunks` takes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedChunk {
    /// Its range.
    #[serde(flatten)]
    pub range: Range,
    /// Records expected.
    pub records: u64,
    /// Bytes expected.
    pub bytes: u64,
}

/// A table's size, and how it can be sampled.
#[derive(Debug, Clone, Copy)]
struct Extent {
    /// Heap pages, all partitions together.
    pages: i64,
    /// Pages of the largest leaf: positions go up to here.
    longest: i64,
    /// Bytes with TOAST, without indexes.
    bytes: i64,
    /// Rows a page, as the statistics have it; 0 is unknown.
    rows_per_page: f64,
}

/// A sampled key and the bytes of stream up to the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sampled {
    key: Vec<String>,
    bytes: u64,
}

/// Plans one table. For a table without a key the session must be the one that holds the run's snapshot.
pub async fn plan_table(
    session: &Session,
    spec: &SourceSpec,
    relation: &Relation,
    chunk_bytes: u64,
) -> Result<Vec<PlannedChunk>> {
    let extent = extent(session, relation).await?;
    let ratio = stream_ratio(session, spec, relation, extent).await?;
    let exact = !relation.kind.has_pages() || extent.pages <= EXACT_PAGES;
    let (records, bytes) = if exact {
        let (records, weight) = totals(session, spec).await?;
        (records, scaled(weight, ratio))
    } else {
        (0, scaled(u64::try_from(extent.bytes).unwrap_or(0), ratio))
    };
    if spec.key.is_empty() {
        // Rows a page is an estimate, so the count is bounded by bytes alone beyond small tables.
        return Ok(by_position(relation, extent, records, bytes, chunk_bytes));
    }
    let chunks = if exact && bytes <= chunk_bytes && records <= MAX_RECORDS {
        vec![whole(RangeKind::Key, records, bytes)]
    } else if exact {
        let samples = all_keys(session, spec, records, bytes, ratio, chunk_bytes).await?;
        cut(&samples, records, chunk_bytes)
    } else {
        let (samples, records) = sampled_keys(session, spec, extent, bytes, ratio, chunk_bytes).await?;
        cut(&samples, records, chunk_bytes)
    };
    check_ascending(session, spec, &chunks).await?;
    Ok(with_null_chunk(chunks, spec))
}

/// Has the source itself confirm that the bounds ascend: ranges that overlap would read records twice.
async fn check_ascending(session: &Session, spec: &SourceSpec, chunks: &[PlannedChunk]) -> Result<()> {
    let doing = "checking the plan";
    let bounds: Vec<&Vec<String>> = chunks.iter().filter_map(|chunk| chunk.range.lower.as_ref()).collect();
    let columns = spec.key_types.len();
    let arrays: Vec<Vec<&str>> =
        (0..columns).map(|column| bounds.iter().map(|bound| bound[column].as_str()).collect()).collect();
    let join = |format: &dyn Fn(usize) -> String| (0..columns).map(format).collect::<Vec<_>>().join(", ");
    let sql = format!(
        "SELECT coalesce(pg_catalog.bool_and(ROW({}) < ROW({})), true) FROM (SELECT n, {}, {} FROM (SELECT n, {} \
         FROM ROWS FROM ({}) WITH ORDINALITY AS u({}, n)) AS typed) AS pair WHERE n > 1",
        join(&|i| format!("p{i}")),
        join(&|i| format!("k{i}")),
        join(&|i| format!("k{i}")),
        join(&|i| format!("pg_catalog.lag(k{i}) OVER (ORDER BY n) AS p{i}")),
        // The subquery is never run: the key's own collation comes with it.
        join(&|i| format!(
            "coalesce(t{i}::{}, (SELECT {} FROM {} LIMIT 0)) AS k{i}",
            spec.key_types[i], spec.key[i], spec.relation
        )),
        join(&|i| format!("pg_catalog.unnest(${}::text[])", i + 1)),
        join(&|i| format!("t{i}")),
    );
    let parameters: Vec<&(dyn ToSql + Sync)> = arrays.iter().map(|a| a as &(dyn ToSql + Sync)).collect();
    let row = session.client.query_one(&sql, &parameters).await.with_records(Side::Source, doing)?;
    if row.try_get(0).with_records(Side::Source, doing)? {
        Ok(())
    } else {
        Err(protocol_error(Side::Source, format!("the planned ranges of {} do not ascend", spec.relation)))
    }
}

async fn extent(session: &Session, relation: &Relation) -> Result<Extent> {
    let doing = "measuring a table";
    let row = session
        .client
        .query_one(
            "WITH RECURSIVE tree AS (SELECT $1::oid AS oid UNION SELECT i.inhrelid FROM pg_catalog.pg_inherits AS i \
                 JOIN tree ON tree.oid = i.inhparent), \
             leaf AS (SELECT c.oid, c.reltuples::float8 AS reltuples, c.relpages::float8 AS relpages, \
                 pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::int8 AS pages \
                 FROM tree JOIN pg_catalog.pg_class AS c USING (oid) WHERE c.relkind IN ('r', 'm')) \
             SELECT coalesce(sum(pages), 0)::int8, coalesce(max(pages), 0)::int8, \
                 coalesce(sum(pg_catalog.pg_table_size(oid)), 0)::int8, \
                 coalesce(sum(reltuples) FILTER (WHERE relpages > 0) / nullif(sum(relpages), 0), 0)::float8 FROM leaf",
            &[&relation.oid],
        )
        .await
        .at(Side::Source, doing)?;
    Ok(Extent {
        pages: row.try_get(0).at(Side::Source, doing)?,
        longest: row.try_get(1).at(Side::Source, doing)?,
        bytes: row.try_get(2).at(Side::Source, doing)?,
        rows_per_page: row.try_get(3).at(Side::Source, doing)?,
    })
}

/// What a row takes in storage and framing: two bytes a tuple and four a field in the stream, and the columns' sizes.
fn weight(spec: &SourceSpec) -> String {
    let mut sum = format!("{}", 2 + 4 * spec.select.len());
    for expression in &spec.select {
        sum.push_str(&format!(" + coalesce(pg_catalog.pg_column_size({expression}), 0)"));
    }
    format!("({sum})::int8")
}

fn sample_clause(percent: f64) -> String {
    format!("TABLESAMPLE SYSTEM ({percent:.6}) REPEATABLE (1)")
}

fn conditions(spec: &SourceSpec, thin: Option<f64>) -> String {
    let mut all: Vec<String> = spec.filter_condition().into_iter().collect();
    all.extend(
        spec.key
            .iter()
            .zip(&spec.key_nullable)
            .filter(|(_, nullable)| **nullable)
            .map(|(k, _)| format!("{k} IS NOT NULL")),
    );
    all.extend(thin.map(|share| format!("pg_catalog.random() < {share:.6}")));
    if all.is_empty() { String::new() } else { format!(" WHERE {}", all.join(" AND ")) }
}

/// Bytes of stream a byte of [`weight`], from a few rows copied out.
async fn stream_ratio(
    session: &Session,
    spec: &SourceSpec,
    relation: &Relation,
    extent: Extent,
) -> Result<f64> {
    let doing = "measuring records";
    let sample = if relation.kind.has_pages() && extent.pages > EXACT_PAGES {
        sample_clause((100.0 * 100.0 / extent.pages as f64).clamp(0.000_001, 100.0))
    } else {
        String::new()
    };
    let from = format!("FROM {} {sample}{} LIMIT {PROBE_ROWS}", spec.relation, conditions(spec, None));
    let sql = format!("SELECT coalesce(sum(w), 0)::int8 FROM (SELECT {} AS w {from}) AS probe", weight(spec));
    let row = session.client.query_one(&sql, &[]).await.with_records(Side::Source, doing)?;
    let stored: i64 = row.try_get(0).with_records(Side::Source, doing)?;
    let copy = format!("COPY (SELECT {} {from}) TO STDOUT (FORMAT binary)", spec.select.join(", "));
    let stream = session.client.copy_out(copy.as_str()).await.with_records(Side::Source, doing)?;
    let sent: usize = stream
        .try_fold(0, |sum, bytes| async move { Ok(sum + bytes.len()) })
        .await
        .with_records(Side::Source, doing)?;
    Ok(if stored > 0 { (sent as f64 / stored as f64).clamp(0.1, 1000.0) } else { 1.0 })
}

async fn totals(session: &Session, spec: &SourceSpec) -> Result<(u64, u64)> {
    let doing = "measuring a table";
    let sql = format!(
        "SELECT count(*)::int8, coalesce(sum({}), 0)::int8 FROM {}{}",
        weight(spec),
        spec.relation,
        conditions(spec, None)
    );
    let row = session.client.query_one(&sql, &[]).await.with_records(Side::Source, doing)?;
    let (records, bytes): (i64, i64) = (
        row.try_get(0).with_records(Side::Source, doing)?,
        row.try_get(1).with_records(Side::Source, doing)?,
    );
    Ok((records.unsigned_abs(), bytes.unsigned_abs()))
}

/// Every n-th key of the whole table.
async fn all_keys(
    session: &Session,
    spec: &SourceSpec,
    records: u64,
    bytes: u64,
    ratio: f64,
    chunk_bytes: u64,
) -> Result<Vec<Sampled>> {
    let chunks = (bytes / chunk_bytes).max(records / MAX_RECORDS) + 1;
    let step = (records / (chunks * KEYS_PER_CHUNK)).max(1);
    let names: Vec<String> = (0..spec.key.len()).map(|i| format!("k{i}")).collect();
    let keys: Vec<String> =
        spec.key.iter().zip(&names).map(|(key, name)| format!("{key} AS {name}")).collect();
    let texts: Vec<String> = names.iter().map(|name| format!("{name}::pg_catalog.text")).collect();
    let sql = format!(
        "SELECT (before * {ratio})::int8, {} FROM (SELECT {}, pg_catalog.row_number() OVER o AS n, \
         (sum(w) OVER o - w) AS before FROM (SELECT {}, {} AS w FROM {}{}) AS record \
         WINDOW o AS (ORDER BY {} ROWS UNBOUNDED PRECEDING)) AS numbered WHERE (n - 1) % {step} = 0 ORDER BY n",
        texts.join(", "),
        names.join(", "),
        keys.join(", "),
        weight(spec),
        spec.relation,
        conditions(spec, None),
        names.join(", "),
    );
    let before = fetch(session, &sql, spec.key.len()).await?;
    Ok(from_running_sums(before, bytes))
}

/// The keys of random pages, with the table's estimated number of records.
async fn sampled_keys(
    session: &Session,
    spec: &SourceSpec,
    extent: Extent,
    bytes: u64,
    ratio: f64,
    chunk_bytes: u64,
) -> Result<(Vec<Sampled>, u64)> {
    let chunks = i64::try_from(bytes / chunk_bytes).unwrap_or(i64::MAX / PAGES_PER_CHUNK) + 1;
    let pages = SAMPLE_PAGES.max(chunks.saturating_mul(PAGES_PER_CHUNK)).min(extent.pages);
    let share = (pages as f64 / extent.pages as f64).clamp(0.000_000_01, 1.0);
    let rows = pages as f64 * if extent.rows_per_page > 0.0 { extent.rows_per_page } else { 50.0 };
    let wanted = (chunks as f64 * SAMPLE_ROWS_PER_CHUNK).clamp(LEAST_SAMPLE_ROWS, MOST_SAMPLE_ROWS);
    let thin = (rows > wanted).then(|| wanted / rows);
    let scale = 1.0 / (share * thin.unwrap_or(1.0));
    let names: Vec<String> = (0..spec.key.len()).map(|i| format!("k{i}")).collect();
    let keys: Vec<String> =
        spec.key.iter().zip(&names).map(|(key, name)| format!("{key} AS {name}")).collect();
    // A subquery, so that ORDER BY means the keys and not their texts, whatever the columns are called.
    let texts: Vec<String> =
        names.iter().map(|name| format!("{name}::pg_catalog.text AS {name}_text")).collect();
    let sql = format!(
        "SELECT (w * {})::int8, {} FROM (SELECT {}, {} AS w FROM {} {}{}) AS record ORDER BY {}",
        ratio * scale,
        texts.join(", "),
        keys.join(", "),
        weight(spec),
        spec.relation,
        sample_clause(share * 100.0),
        conditions(spec, thin),
        names.join(", "),
    );
    let samples = fetch(session, &sql, spec.key.len()).await?;
    let records = (samples.len() as f64 * scale) as u64;
    Ok((samples, records))
}

async fn fetch(session: &Session, sql: &str, key_columns: usize) -> Result<Vec<Sampled>> {
    let doing = "sampling keys";
    let none: [&str; 0] = [];
    let rows = session.client.query_raw(sql, none).await.with_records(Side::Source, doing)?;
    let mut rows = std::pin::pin!(rows);
    let mut samples = Vec::new();
    while let Some(row) = rows.try_next().await.with_records(Side::Source, doing)? {
        let bytes: i64 = row.try_get(0).with_records(Side::Source, doing)?;
        let key = (1..=key_columns)
            .map(|i| row.try_get(i))
            .collect::<std::result::Result<_, _>>()
            .with_records(Side::Source, doing)?;
        samples.push(Sampled { key, bytes: bytes.unsigned_abs() });
    }
    Ok(samples)
}

/// Turns the bytes before each key into the bytes from each key to the next.
fn from_running_sums(mut samples: Vec<Sampled>, total: u64) -> Vec<Sampled> {
    let mut next = total;
    for sample in samples.iter_mut().rev() {
        let before = sample.bytes;
        sample.bytes = next.saturating_sub(before);
        next = before;
    }
    samples
}

/// Chunks of a sample in key order.
fn cut(samples: &[Sampled], records: u64, chunk_bytes: u64) -> Vec<PlannedChunk> {
    // Rows of equal keys can't be parted.
    let mut distinct: Vec<(Sampled, u64)> = Vec::with_capacity(samples.len());
    for sample in samples {
        match distinct.last_mut() {
            Some((last, rows)) if last.key == sample.key => {
                last.bytes += sample.bytes;
                *rows += 1;
            }
            _ => distinct.push((sample.clone(), 1)),
        }
    }
    if distinct.is_empty() {
        return vec![whole(RangeKind::Key, records, 0)];
    }
    let weights: Vec<u64> = distinct.iter().map(|(sample, _)| sample.bytes.max(1)).collect();
    let total: u64 = weights.iter().sum();
    let cuts = range::cut(&weights, total, records, chunk_bytes, MAX_RECORDS);
    let starts: Vec<usize> = std::iter::once(0).chain(cuts).collect();
    let sampled_rows: u64 = distinct.iter().map(|(_, rows)| rows).sum();
    (0..starts.len())
        .map(|i| {
            let (from, to) = (starts[i], starts.get(i + 1).copied().unwrap_or(distinct.len()));
            let rows: u64 = distinct[from..to].iter().map(|(_, rows)| rows).sum();
            PlannedChunk {
                range: Range {
                    kind: RangeKind::Key,
                    lower: (i > 0).then(|| distinct[from].0.key.clone()),
                    upper: distinct.get(to).map(|(sample, _)| sample.key.clone()),
                },
                records: (u128::from(records) * u128::from(rows) / u128::from(sampled_rows)) as u64,
                bytes: weights[from..to].iter().sum(),
            }
        })
        .collect()
}

/// Chunks of a table without a key: ranges of pages.
fn by_position(
    relation: &Relation,
    extent: Extent,
    records: u64,
    bytes: u64,
    chunk_bytes: u64,
) -> Vec<PlannedChunk> {
    let records =
        if records > 0 { records } else { (extent.pages as f64 * extent.rows_per_page.max(0.0)) as u64 };
    let wanted = bytes.div_ceil(chunk_bytes).max(records.div_ceil(MAX_RECORDS)).max(1);
    let pages = if relation.kind.has_pages() { extent.longest.unsigned_abs() } else { 0 };
    let count = wanted.min(pages.max(1));
    let page = |i: u64| (i > 0 && i < count).then(|| vec![format!("({},0)", pages * i / count)]);
    (0..count)
        .map(|i| PlannedChunk {
            range: Range { kind: RangeKind::Ctid, lower: page(i), upper: page(i + 1) },
            records: records / count,
            bytes: bytes / count,
        })
        .collect()
}

fn whole(kind: RangeKind, records: u64, bytes: u64) -> PlannedChunk {
    PlannedChunk { range: Range { kind, lower: None, upper: None }, records, bytes }
}

fn with_null_chunk(mut chunks: Vec<PlannedChunk>, spec: &SourceSpec) -> Vec<PlannedChunk> {
    if spec.has_nullable_key() {
        chunks.push(whole(RangeKind::NullKey, 0, 0));
    }
    chunks
}

fn scaled(bytes: u64, ratio: f64) -> u64 {
    (bytes as f64 * ratio) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::RelationKind;
    use crate::names::TableName;

    fn samples(keys: &[(&str, u64)]) -> Vec<Sampled> {
        keys.iter().map(|(key, bytes)| Sampled { key: vec![(*key).into()], bytes: *bytes }).collect()
    }

    fn relation(kind: RelationKind) -> Relation {
        Relation { oid: 1, name: TableName::new("s", "t"), kind, columns: Vec::new() }
    }

    #[test]
    fn chunks_cover_everything_and_meet() {
        let keys: Vec<(String, u64)> = (0..100).map(|i| (format!("{i:03}"), 10)).collect();
        let keys: Vec<(&str, u64)> = keys.iter().map(|(k, b)| (k.as_str(), *b)).collect();
        let chunks = cut(&samples(&keys), 1000, 200);
        assert_eq!(chunks.len(), 5);
        assert_eq!(chunks[0].range.lower, None);
        assert_eq!(chunks[4].range.upper, None);
        for pair in chunks.windows(2) {
            assert_eq!(pair[0].range.upper, pair[1].range.lower);
            assert!(pair[0].range.upper.is_some());
        }
        assert_eq!(chunks.iter().map(|c| c.bytes).sum::<u64>(), 1000);
        assert_eq!(chunks.iter().map(|c| c.records).sum::<u64>(), 1000);
    }

    #[test]
    fn equal_keys_stay_together() {
        let chunks = cut(&samples(&[("a", 60), ("a", 60), ("a", 60), ("b", 60)]), 4, 100);
        assert_eq!(chunks.len(), 2);
        assert_eq!(chunks[1].range.lower, Some(vec!["b".to_owned()]));
        assert_eq!(cut(&[], 0, 100).len(), 1);
    }

    #[test]
    fn running_sums_become_shares() {
        let shares = from_running_sums(samples(&[("a", 0), ("b", 30), ("c", 70)]), 100);
        assert_eq!(shares.iter().map(|s| s.bytes).collect::<Vec<_>>(), [30, 40, 30]);
    }

    #[test]
    fn tables_without_a_key_are_cut_by_pages() {
        let extent = Extent { pages: 100, longest: 100, bytes: 0, rows_per_page: 10.0 };
        let chunks = by_position(&relation(RelationKind::Table), extent, 1000, 1000, 400);
        let lowers: Vec<_> = chunks.iter().map(|c| c.range.lower.clone()).collect();
        assert_eq!(lowers, [None, Some(vec!["(33,0)".into()]), Some(vec!["(66,0)".into()])]);
        assert_eq!(by_position(&relation(RelationKind::View), extent, 10, 1000, 100).len(), 1);
    }

    #[test]
    fn the_plan_is_written_as_the_protocol_has_it() {
        let json = serde_json::to_value(whole(RangeKind::Key, 3, 4)).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"kind": "key", "lower": null, "upper": null, "records": 3, "bytes": 4})
        );
    }
}
