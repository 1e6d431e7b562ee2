//! What must hold of a target after a migration.
//!
//! Records are compared as the text that `COPY … TO STDOUT` sends, both ways across the two servers, so
//! nothing of the code under test takes part in the comparison.

use std::collections::{BTreeMap, BTreeSet};

use crate::db::{Db, literal};

/// One migrated table, for the checks: SQL text, quoted where names need it.
#[derive(Clone, Debug)]
pub struct Table<'a> {
    /// Query or table that delivers the source's records.
    pub source: &'a str,
    /// The target table.
    pub target: &'a str,
    /// The columns that make two records the same.
    pub content: &'a [&'a str],
    /// All migrated columns.
    pub columns: &'a [&'a str],
}

fn sample<'a>(lines: impl Iterator<Item = &'a Vec<u8>>) -> String {
    lines.take(3).map(|line| String::from_utf8_lossy(line).into_owned()).collect::<Vec<_>>().join("\n  ")
}

/// The target holds every distinct content of the source exactly once, nothing else, and every one of its
/// rows is a row of the source.
pub async fn assert_exact(source: &Db, target: &Db, table: &Table<'_>) {
    assert_exact_except(source, target, table, "false").await;
}

/// As [`assert_exact`], for a source without the records that `left_out`, an SQL condition, names.
pub async fn assert_exact_except(source: &Db, target: &Db, table: &Table<'_>, left_out: &str) {
    let (content, columns) = (table.content.join(", "), table.columns.join(", "));
    let from_source =
        |list: &str| format!("SELECT {list} FROM {} AS s WHERE ({left_out}) IS NOT TRUE", table.source);
    let from_target = |list: &str| format!("SELECT {list} FROM {} AS t", table.target);

    let wanted: BTreeSet<_> = source.copy_lines(&from_source(&content)).await.into_iter().collect();
    let found = target.copy_lines(&from_target(&content)).await;
    let mut seen = BTreeSet::new();
    let twice: Vec<_> = found.iter().filter(|line| !seen.insert(*line)).collect();
    assert!(
        twice.is_empty(),
        "{}: {} contents stand in the target twice\n  {}",
        table.target,
        twice.len(),
        sample(twice.iter().copied())
    );
    let missing: Vec<_> = wanted.iter().filter(|line| !seen.contains(line)).collect();
    let extra: Vec<_> = found.iter().filter(|line| !wanted.contains(*line)).collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "{}: {} of {} contents are missing\n  {}\n{} are extra\n  {}",
        table.target,
        missing.len(),
        wanted.len(),
        sample(missing.iter().copied()),
        extra.len(),
        sample(extra.iter().copied())
    );

    let rows: BTreeSet<_> = source.copy_lines(&from_source(&columns)).await.into_iter().collect();
    let written = target.copy_lines(&from_target(&columns)).await;
    let altered: Vec<_> = written.iter().filter(|line| !rows.contains(*line)).collect();
    assert!(
        altered.is_empty(),
        "{}: {} rows are not rows of the source\n  {}",
        table.target,
        altered.len(),
        sample(altered.iter().copied())
    );
}

/// The books of a run, summed over its chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// Records read.
    pub source: i64,
    /// Written as new rows.
    pub inserted: i64,
    /// Replaced a row of the same key.
    pub updated: i64,
    /// Stood there already, equal in every column.
    pub unchanged: i64,
    /// Dropped because their content is in the target.
    pub duplicate: i64,
    /// Set aside.
    pub quarantined: i64,
}

/// SQL for the latest run.
pub const LAST_RUN: &str = "(SELECT run_id FROM dedup.runs ORDER BY created_at DESC LIMIT 1)";

/// Reads the books of the latest run.
pub async fn books(target: &Db) -> Books {
    let sums = ["source", "inserted", "updated", "unchanged", "duplicate", "quarantined"]
        .map(|name| format!("coalesce(sum({name}_count), 0)::bigint"))
        .join(", ");
    let row = target
        .client()
        .query_one(&format!("SELECT {sums} FROM dedup.checkpoints WHERE run_id = {LAST_RUN}"), &[])
        .await
        .unwrap_or_else(|error| panic!("cannot read the books: {error}"));
    Books {
        source: row.get(0),
        inserted: row.get(1),
        updated: row.get(2),
        unchanged: row.get(3),
        duplicate: row.get(4),
        quarantined: row.get(5),
    }
}

/// The latest run is done, each of its chunks is verified and the books are these.
pub async fn assert_books(target: &Db, expected: Books) {
    let open = target
        .column(&format!(
            "SELECT concat_ws(' ', chunk_id, status, error_sqlstate, error_message) FROM dedup.checkpoints \
             WHERE run_id = {LAST_RUN} AND status <> 'verified' ORDER BY chunk_no"
        ))
        .await;
    assert!(open.is_empty(), "chunks are not verified: {open:?}");
    let status: String =
        target.one(&format!("SELECT status FROM dedup.runs WHERE run_id = {LAST_RUN}")).await;
    assert_eq!(status, "done", "status of the run");
    assert_eq!(books(target).await, expected, "the books");
}

/// Counts how often each line occurs.
fn tally(lines: Vec<String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for line in lines {
        *counts.entry(line).or_insert(0) += 1;
    }
    counts
}

/// Hash index, ledger and rows of a target agree.
///
/// - The index lists exactly the digests of the rows, computed here by `content_hash`.
/// - Every dropped duplicate has a survivor that the index knows, and there are as many as the books say.
/// - Segments and blocks belong to each other, and every segment to a chunk that is committed.
pub async fn assert_index(target: &Db, table: &Table<'_>) {
    let name = literal(table.target);
    let indexed = tally(target.column(&format!("SELECT content_hash FROM dedup.hash_index({name})")).await);
    let hashes = format!("SELECT dedup.content_hash({}) FROM {}", table.content.join(", "), table.target);
    let hashed = tally(target.column(&hashes).await);
    let difference: Vec<_> = indexed
        .iter()
        .filter(|(hash, count)| hashed.get(*hash) != Some(*count))
        .chain(hashed.iter().filter(|(hash, count)| indexed.get(*hash) != Some(*count)))
        .take(4)
        .collect();
    assert!(
        difference.is_empty(),
        "{}: {} digests indexed, {} rows hashed; for example {difference:?}",
        table.target,
        indexed.len(),
        hashed.len()
    );

    let homeless: i64 = target.one("SELECT count(*) FROM dedup.duplicates WHERE survivor IS NULL").await;
    assert_eq!(homeless, 0, "duplicates without a survivor");
    let strays = target
        .column(
            "SELECT 'segment ' || s.segment_id || ' lacks blocks' FROM dedup.segment AS s \
             WHERE s.blocks <> (SELECT count(*) FROM dedup.segment_block AS b WHERE b.segment_id = s.segment_id) \
             UNION ALL \
             SELECT 'blocks of segment ' || b.segment_id || ' are orphaned' FROM dedup.segment_block AS b \
             WHERE NOT EXISTS (SELECT FROM dedup.segment AS s WHERE s.segment_id = b.segment_id) \
             UNION ALL \
             SELECT 'segment ' || s.segment_id || ' is of no committed chunk' FROM dedup.segment AS s \
             WHERE s.level = 0 AND NOT EXISTS (SELECT FROM dedup.ordinals AS o WHERE o.ordinal = s.first_ordinal)",
        )
        .await;
    assert!(strays.is_empty(), "{strays:?}");
    // A chunk that was done again has several ordinals; of a table without a key only the last one counts in its books.
    let unaccounted = target
        .column(
            "SELECT format('chunk %s wrote %s rows and indexed %s', c.chunk_id, c.inserted_count + c.updated_count, sum(s.entries - s.tombstones)) \
             FROM dedup.checkpoints AS c JOIN dedup.run_tables AS t USING (run_id, table_id) \
             JOIN dedup.ordinals AS o ON o.run_id = c.run_id AND o.chunk_id = c.chunk_id AND (NOT t.keyless OR o.ordinal = c.ordinal) \
             JOIN dedup.segment AS s ON s.level = 0 AND s.first_ordinal = o.ordinal AND s.last_ordinal = o.ordinal \
             GROUP BY c.run_id, c.chunk_id HAVING c.inserted_count + c.updated_count <> sum(s.entries - s.tombstones)",
        )
        .await;
    assert!(unaccounted.is_empty(), "{unaccounted:?}");
}

/// As many duplicates are listed for the latest run as its books count.
pub async fn assert_ledger(target: &Db) {
    let listed: i64 =
        target.one(&format!("SELECT count(*) FROM dedup.duplicates WHERE run_id = {LAST_RUN}")).await;
    assert_eq!(listed, books(target).await.duplicate, "duplicates listed");
}

/// Everything above, for a run into an empty target that set nothing aside: the books follow from the data.
pub async fn assert_first_run(source: &Db, target: &Db, table: &Table<'_>) {
    assert_exact(source, target, table).await;
    assert_index(target, table).await;
    assert_ledger(target).await;
    let records: i64 = source.one(&format!("SELECT count(*) FROM {} AS s", table.source)).await;
    let rows: i64 = target.one(&format!("SELECT count(*) FROM {}", table.target)).await;
    let expected = Books { source: records, inserted: rows, duplicate: records - rows, ..Books::default() };
    assert_books(target, expected).await;
}
