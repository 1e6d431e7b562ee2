//! Verifying chunks at the end of a run instead of before their COMMIT: one scan of the target.
//!
//! Rows without a key cannot be read back by the chunk that wrote them, and a run may put the reading back of all its chunks off
//! (`"verify": "end"`). Such a chunk's checkpoint stays `syncing` with `written_at` set, and when nothing is left to write, every index entry
//! that the run made is looked for among the target's rows: same content digest, same beginning of the row digest, which covers the key too.
//! An entry without a row is retracted and its chunk fails, so that the chunk's next attempt writes the record again.
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};

use pg_dedup_record::block::{Entry, Stamp};
use pg_dedup_record::checksum::Checksum;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{Uuid, pg_sys};

use crate::chunk::required;
use crate::error::{Error, Result};
use crate::hash::rows;
use crate::index::Target;
use crate::keyset::{column_list, qualified_name};
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader, SegmentWriter, next_number};

/// Entries that a block holds at most, roughly: when they have no key.
const ENTRIES_PER_BLOCK: usize = 200;

/// An entry of the run that must have a row.
struct Expected {
    digest: [u8; 32],
    /// A hash of its key, which tells entries of one content apart.
    key: u64,
    ordinal: u64,
    row_digest: [u8; 8],
    tombstone: bool,
    seen: bool,
}

impl Expected {
    /// What the last word is about.
    fn subject(&self) -> ([u8; 32], u64) {
        (self.digest, self.key)
    }
}

fn hash_of(key: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(key);
    hasher.finish()
}

/// What is known of one of the run's chunks.
struct Written {
    chunk_id: String,
    /// Its last ordinal; entries of earlier ones are its too, but not in its books.
    ordinal: u64,
    /// Sum of the row digests that its books call inserted; only a chunk without keys lists all of them under one ordinal.
    inserted: Option<Checksum>,
    /// The same of the rows found.
    found: Checksum,
    rows: i64,
    /// Digest and key's hash of the entries without a row.
    missing: BTreeSet<([u8; 32], u64)>,
}

/// `dedup.verify_written`: compares what the run's chunks wrote, and did not read back before they committed, with the target's rows; marks
/// them `verified`, or `failed` where rows are missing or differ. Returns how many rows are.
///
/// # Errors
/// 42704 for an unknown table of the run, 55000 when the target's files were replaced, XX001 for a damaged block.
#[pg_extern(volatile, parallel_unsafe, strict)]
fn verify_written(run: Uuid, table_id: i32) -> Result<i64, ErrorReport> {
    Ok(verify(run, table_id)?)
}

fn verify(run: Uuid, table_id: i32) -> Result<i64> {
    let target_id: i32 = Spi::get_one_with_args(
        "SELECT max(target_id) FROM dedup.run_tables WHERE run_id = $1 AND table_id = $2",
        &[run.into(), table_id.into()],
    )?
    .ok_or_else(|| Error::undefined(format!("run {run} has no table {table_id}")))?;
    // Exclusively: nobody may be told that a content is there while its entry is about to be retracted.
    Spi::run_with_args(
        "SELECT pg_catalog.pg_advisory_xact_lock(dedup.lock_class(), $1)",
        &[target_id.into()],
    )?;
    Spi::run_with_args("SELECT dedup.check_filenodes($1)", &[target_id.into()])?;
    let target = Target::by_id(target_id)?;
    let (mut chunks, chunk_of) = waiting(run, table_id)?;
    if chunks.is_empty() {
        return Ok(0);
    }
    compare(&target, &mut chunks, &chunk_of)?;
    close(run, &target, &chunks)
}

/// The table's chunks that wait for verification, and which of them each of the run's ordinals belongs to.
fn waiting(run: Uuid, table_id: i32) -> Result<(Vec<Written>, BTreeMap<u64, usize>)> {
    Spi::connect(|client| {
        let mut chunks: Vec<Written> = Vec::new();
        let mut chunk_of = BTreeMap::new();
        let rows = client.select(
            "SELECT c.chunk_id, c.ordinal AS last, CASE WHEN t.keyless THEN c.inserted_checksum END AS inserted_checksum, \
                 c.inserted_count OPERATOR(pg_catalog.+) c.updated_count AS rows, o.ordinal \
             FROM dedup.checkpoints AS c JOIN dedup.ordinals AS o USING (run_id, chunk_id) \
                 JOIN dedup.run_tables AS t USING (run_id, table_id) \
             WHERE c.run_id = $1 AND c.table_id = $2 AND c.status = 'syncing' AND c.written_at IS NOT NULL \
             ORDER BY c.chunk_no, o.ordinal",
            None,
            &[run.into(), table_id.into()],
        )?;
        for row in rows {
            let chunk_id: String = required(row["chunk_id"].value()?)?;
            if chunks.last().is_none_or(|last| last.chunk_id != chunk_id) {
                let sum: Option<Vec<u8>> = row["inserted_checksum"].value()?;
                let sum: Option<[u8; 32]> = sum
                    .map(TryInto::try_into)
                    .transpose()
                    .map_err(|_| Error::corrupted("a checkpoint's checksum is not 32 bytes"))?;
                chunks.push(Written {
                    chunk_id,
                    ordinal: required(row["last"].value::<i64>()?)? as u64,
                    inserted: sum.as_ref().map(Checksum::from_bytes),
                    found: Checksum::default(),
                    rows: required(row["rows"].value()?)?,
                    missing: BTreeSet::new(),
                });
            }
            chunk_of.insert(required(row["ordinal"].value::<i64>()?)? as u64, chunks.len() - 1);
        }
        Ok((chunks, chunk_of))
    })
}

/// Scans the target, more than once if the entries do not fit `maintenance_work_mem`: each scan looks for those of a range of digests.
fn compare(target: &Target, chunks: &mut [Written], chunk_of: &BTreeMap<u64, usize>) -> Result<()> {
    let snapshot = Snapshot::latest();
    let oldest = chunk_of.first_key_value().map_or(0, |(ordinal, _)| *ordinal) as i64;
    let segments: Vec<_> = segment::segments_of(target.id, &snapshot)?
        .into_iter()
        .filter(|s| s.last_ordinal >= oldest)
        .collect();
    let most: usize = segments.iter().map(|s| s.blocks as usize * ENTRIES_PER_BLOCK).sum();
    // SAFETY: a setting of this backend, in kB.
    let memory = unsafe { pg_sys::maintenance_work_mem } as usize * 1024;
    let passes = (most * size_of::<Expected>()).div_ceil(memory.max(1)).clamp(1, 1 << 16) as u64;
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut reader = BlockReader::new(&blocks, &snapshot)?;
    for pass in 0..passes {
        let of_this_pass = |digest: &[u8; 32]| {
            let leading = u64::from(u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]));
            (leading * passes) >> 32 == pass
        };
        let mut expected = Vec::new();
        for segment in &segments {
            segment::for_each_entry(&mut reader, segment.id, |entry| {
                if entry.stamp.ordinal >= oldest as u64 && of_this_pass(entry.digest.as_bytes()) {
                    expected.push(Expected {
                        digest: *entry.digest.as_bytes(),
                        key: hash_of(entry.key),
                        ordinal: entry.stamp.ordinal,
                        row_digest: entry.row_digest,
                        tombstone: entry.stamp.tombstone,
                        seen: false,
                    });
                }
                Ok(())
            })?;
        }
        // Of one content and key the last word counts; what it says about other runs is not ours to check.
        expected.sort_unstable_by_key(|e| (e.subject(), Reverse(e.ordinal)));
        expected.dedup_by_key(|e| e.subject());
        expected.retain(|e| !e.tombstone && chunk_of.contains_key(&e.ordinal));
        look_for(target, &mut expected, chunks, chunk_of)?;
        for entry in expected.iter().filter(|e| !e.seen) {
            chunks[chunk_of[&entry.ordinal]].missing.insert(entry.subject());
        }
    }
    Ok(())
}

/// One scan: marks the entries that have their row.
fn look_for(
    target: &Target,
    expected: &mut [Expected],
    chunks: &mut [Written],
    chunk_of: &BTreeMap<u64, usize>,
) -> Result<()> {
    if expected.is_empty() {
        return Ok(());
    }
    let query =
        format!("SELECT {} FROM {} AS t", column_list(&target.layout, "t"), qualified_name(target.table));
    rows::scan(&query, &[], &target.layout, 0, |row| {
        let digests = row.digests()?;
        let first = expected.partition_point(|e| e.digest < *digests.content.as_bytes());
        let row_digest = digests.row.short();
        let entry = expected[first..]
            .iter_mut()
            .take_while(|e| e.digest == *digests.content.as_bytes())
            .find(|e| !e.seen && e.row_digest == row_digest);
        if let Some(entry) = entry {
            entry.seen = true;
            let chunk = &mut chunks[chunk_of[&entry.ordinal]];
            if chunk.ordinal == entry.ordinal {
                chunk.found.add(&digests.row);
            }
        }
        Ok(())
    })?;
    Ok(())
}

/// Marks the chunks; returns how many rows are missing or differ.
fn close(run: Uuid, target: &Target, chunks: &[Written]) -> Result<i64> {
    let mut lost = 0;
    for chunk in chunks {
        if chunk.missing.is_empty() && chunk.inserted.is_none_or(|inserted| chunk.found == inserted) {
            Spi::run_with_args(
                "UPDATE dedup.checkpoints SET status = 'verified', verified_at = pg_catalog.clock_timestamp() \
                 WHERE run_id = $1 AND chunk_id = $2",
                &[run.into(), chunk.chunk_id.as_str().into()],
            )?;
            continue;
        }
        let missing = chunk.missing.len().max(1) as i64;
        lost += missing;
        retract(run, target.id, chunk)?;
        let message = format!(
            "{} does not hold what was sent: of {} rows {missing} are missing or differ",
            qualified_name(target.table),
            chunk.rows
        );
        Spi::run_with_args(
            "UPDATE dedup.checkpoints SET status = 'failed', written_at = NULL, error_sqlstate = '23000', error_message = $3, \
                 error_hint = 'Look for a trigger, rule or policy that rewrites or drops rows of the target, then resume the run.' \
             WHERE run_id = $1 AND chunk_id = $2",
            &[run.into(), chunk.chunk_id.as_str().into(), message.as_str().into()],
        )?;
        Spi::run_with_args(
            "SELECT dedup.log_event($1, $2, 'chunk_failed', pg_catalog.jsonb_build_object('sqlstate', '23000', 'message', $3))",
            &[run.into(), chunk.chunk_id.as_str().into(), message.as_str().into()],
        )?;
    }
    Ok(lost)
}

/// Takes the entries without a row out of the index, under an ordinal of their own.
fn retract(run: Uuid, target: i32, chunk: &Written) -> Result<()> {
    if chunk.missing.is_empty() {
        return Ok(());
    }
    let ordinal = next_number("ordinal_seq")?;
    Spi::run_with_args(
        "INSERT INTO dedup.ordinals (ordinal, target_id, run_id, chunk_id, pass) \
         SELECT $1, $2, $3, $4, r.pass FROM dedup.runs AS r WHERE r.run_id = $3",
        &[ordinal.into(), target.into(), run.into(), chunk.chunk_id.as_str().into()],
    )?;
    let stamp = Stamp { ordinal: ordinal as u64, tombstone: true };
    let missing = missing_entries(target, chunk)?;
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, target, 0)?;
    for (digest, key) in &missing {
        writer.push(&Entry { digest: segment::digest(digest), stamp, row_digest: [0; 8], key })?;
    }
    writer.finish(&segments)?;
    Ok(())
}

/// The missing entries with their keys, which were too much to keep while there was nothing missing.
fn missing_entries(target: i32, chunk: &Written) -> Result<BTreeSet<([u8; 32], Vec<u8>)>> {
    let snapshot = Snapshot::latest();
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut reader = BlockReader::new(&blocks, &snapshot)?;
    let mut entries = BTreeSet::new();
    for segment in segment::segments_of(target, &snapshot)? {
        segment::for_each_entry(&mut reader, segment.id, |entry| {
            let subject = (*entry.digest.as_bytes(), hash_of(entry.key));
            if chunk.missing.contains(&subject) {
                entries.insert((subject.0, entry.key.to_vec()));
            }
            Ok(())
        })?;
    }
    Ok(entries)
}
