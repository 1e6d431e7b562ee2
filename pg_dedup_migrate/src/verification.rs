//! Verifying chunks at the end of a run instead of before their COMMIT, by scanning the target.
//!
//! Rows without a key cannot be read back by the chunk that wrote them, and a run may put the reading back of all its chunks off
//! (`"verify": "end"`). Such a chunk's checkpoint stays `syncing` with `written_at` set, and when nothing is left to write, every index entry
//! that the run made is looked for among the target's rows: same content digest, same key, same beginning of the row digest. A chunk with an
//! entry that has no such row fails. Where nothing under the key has the content any more, the entry is retracted, so that the chunk's
//! next attempt, or whoever else has the content, writes it.
use std::cmp::Reverse;
use std::collections::BTreeMap;

use pg_dedup_record::checksum::Checksum;
use pg_dedup_record::digest::Digest;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{JsonB, Uuid};

use crate::error::{Error, Result};
use crate::hash::layout::stored_layout;
use crate::hash::rows;
use crate::index::Target;
use crate::keyset::{every_row, hash_of, qualified_name};
use crate::pace;
use crate::passes::Passes;
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader, Segment, next_number};
use crate::sql::{required, stored_checksum};

/// What of an entry the scan has found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A row with its content under its key, with other values beside it.
    Content,
    /// The row.
    Row,
}

/// An entry of the run that must have a row.
struct Expected {
    digest: [u8; 32],
    /// A hash of its key, which tells entries of one content apart.
    key: u64,
    ordinal: u64,
    row_digest: [u8; Digest::SHORT_LEN],
    tombstone: bool,
    found: Found,
}

impl Expected {
    /// What the last word is about.
    fn subject(&self) -> ([u8; 32], u64) {
        (self.digest, self.key)
    }
}

/// What is known of one of the run's chunks.
struct Written {
    chunk_id: String,
    /// Its last ordinal; entries of earlier ones are its too.
    ordinal: u64,
    /// Count and sum of row digests of what it wrote under that.
    wrote: (i64, Checksum),
    /// The same of the rows found.
    found: (i64, Checksum),
    /// Rows that its books have in the target.
    rows: i64,
    /// Entries without their row.
    missing: i64,
    /// Where entries are retracted, once there are any.
    retracted_under: Option<i64>,
}

impl Written {
    /// All of its rows are there. What others have replaced since has no entry of it any more: then the sums can't be compared.
    fn is_whole(&self) -> bool {
        self.missing == 0 && (self.found.0 != self.wrote.0 || self.found.1 == self.wrote.1)
    }
}

/// The chunks that wait, and which of them each of the run's ordinals belongs to.
struct Waiting {
    chunks: Vec<Written>,
    chunk_of: BTreeMap<u64, usize>,
}

impl Waiting {
    fn of(&mut self, ordinal: u64) -> &mut Written {
        &mut self.chunks[self.chunk_of[&ordinal]]
    }
}

/// `dedup.verify_written`: compares what the run's chunks wrote, and did not read back before they committed, with the target's rows; marks
/// them `verified`, or `failed` where rows are missing or differ. Returns how many rows are; NULL: another session is at it, unless told to
/// `wait` for it.
///
/// # Errors
/// 42704 for an unknown table of the run, 55000 when the target's files were replaced, XX001 for a damaged block.
#[pg_extern(volatile, parallel_unsafe, strict)]
pub fn verify_written(
    run: Uuid,
    table_id: i32,
    wait: default!(bool, "false"),
) -> Result<Option<i64>, ErrorReport> {
    let _pace = pace::of_run(run)?;
    Ok(verify(run, table_id, wait)?)
}

fn verify(run: Uuid, table_id: i32, wait: bool) -> Result<Option<i64>> {
    let target_id: i32 = Spi::get_one_with_args(
        "SELECT max(target_id) FROM dedup.run_tables WHERE run_id = $1 AND table_id = $2",
        &[run.into(), table_id.into()],
    )?
    .ok_or_else(|| Error::undefined(format!("run {run} has no table {table_id}")))?;
    // Numbers of targets are positive: the negative ones are for this.
    let turn = if wait {
        "SELECT true FROM pg_catalog.pg_advisory_xact_lock(dedup.lock_class(), -$1)"
    } else {
        "SELECT pg_catalog.pg_try_advisory_xact_lock(dedup.lock_class(), -$1)"
    };
    if Spi::get_one_with_args::<bool>(turn, &[target_id.into()])? != Some(true) {
        return Ok(None);
    }
    // Exclusively: nobody may be told that a content is there while its entry is about to be retracted.
    Spi::run_with_args(
        "SELECT pg_catalog.pg_advisory_xact_lock(dedup.lock_class(), $1)",
        &[target_id.into()],
    )?;
    let mut waiting = waiting(run, table_id)?;
    if waiting.chunks.is_empty() {
        return Ok(Some(0));
    }
    Spi::run_with_args("SELECT dedup.check_filenodes($1)", &[target_id.into()])?;
    let mut target = Target::by_id(target_id)?;
    // Content and key are the index's; what else was delivered is the run's.
    let layout: Option<JsonB> = Spi::get_one_with_args(
        "SELECT layout FROM dedup.run_tables WHERE run_id = $1 AND table_id = $2",
        &[run.into(), table_id.into()],
    )?;
    target.layout = stored_layout(required(layout)?)?;
    compare(run, &target, &mut waiting)?;
    Ok(Some(close(run, &target, &waiting.chunks)?))
}

fn waiting(run: Uuid, table_id: i32) -> Result<Waiting> {
    Spi::connect(|client| {
        let mut waiting = Waiting { chunks: Vec::new(), chunk_of: BTreeMap::new() };
        let rows = client.select(
            "SELECT c.chunk_id, c.ordinal AS last, c.written_count, c.written_checksum, \
                 c.inserted_count OPERATOR(pg_catalog.+) c.updated_count AS rows, o.ordinal \
             FROM dedup.checkpoints AS c JOIN dedup.ordinals AS o USING (run_id, chunk_id) \
             WHERE c.run_id = $1 AND c.table_id = $2 AND c.status = 'syncing' AND c.written_at IS NOT NULL \
             ORDER BY c.chunk_no, o.ordinal",
            None,
            &[run.into(), table_id.into()],
        )?;
        for row in rows {
            let chunk_id: String = required(row["chunk_id"].value()?)?;
            if waiting.chunks.last().is_none_or(|last| last.chunk_id != chunk_id) {
                let sum = stored_checksum(row["written_checksum"].value()?)?;
                waiting.chunks.push(Written {
                    chunk_id,
                    ordinal: required(row["last"].value::<i64>()?)? as u64,
                    wrote: (required(row["written_count"].value()?)?, sum),
                    found: (0, Checksum::default()),
                    rows: required(row["rows"].value()?)?,
                    missing: 0,
                    retracted_under: None,
                });
            }
            let ordinal = required(row["ordinal"].value::<i64>()?)? as u64;
            waiting.chunk_of.insert(ordinal, waiting.chunks.len() - 1);
        }
        Ok(waiting)
    })
}

/// Looks for the entries, as many at a time as fit `maintenance_work_mem`: those of a range of digests, by one scan of the target.
fn compare(run: Uuid, target: &Target, waiting: &mut Waiting) -> Result<()> {
    let snapshot = Snapshot::latest();
    let oldest = waiting.chunk_of.first_key_value().map_or(0, |(ordinal, _)| *ordinal) as i64;
    let segments: Vec<_> = segment::segments_of(target.id, &snapshot)?
        .into_iter()
        .filter(|s| s.last_ordinal >= oldest)
        .collect();
    let most = segment::most_entries(&segments);
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut reader = BlockReader::new(&blocks, &snapshot)?;
    for pass in Passes::of(most, size_of::<Expected>()).each() {
        let mut expected = Vec::new();
        for segment in &segments {
            segment::for_each_entry(&mut reader, segment.id, |entry| {
                if entry.stamp.ordinal >= oldest as u64 && pass.has(entry.digest.as_bytes()) {
                    expected.push(Expected {
                        digest: *entry.digest.as_bytes(),
                        key: hash_of(&[entry.key]),
                        ordinal: entry.stamp.ordinal,
                        row_digest: entry.row_digest,
                        tombstone: entry.stamp.tombstone,
                        found: Found::Nothing,
                    });
                }
                Ok(())
            })?;
        }
        // Of one content and key the last word counts; what it says about other runs is not ours to check.
        expected.sort_unstable_by_key(|e| (e.subject(), Reverse(e.ordinal)));
        expected.dedup_by_key(|e| e.subject());
        expected.retain(|e| !e.tombstone && waiting.chunk_of.contains_key(&e.ordinal));
        look_for(target, &mut expected, waiting)?;
        expected.retain(|e| e.found != Found::Row);
        for entry in &expected {
            waiting.of(entry.ordinal).missing += 1;
        }
        expected.retain(|e| e.found == Found::Nothing);
        retract(run, target.id, &mut reader, &segments, &expected, waiting)?;
    }
    Ok(())
}

/// One scan: says of each entry what there is of it.
fn look_for(target: &Target, expected: &mut [Expected], waiting: &mut Waiting) -> Result<()> {
    if expected.is_empty() {
        return Ok(());
    }
    let query = every_row(&target.layout, target.table);
    let mut key = Vec::new();
    rows::scan(&query, &[], &target.layout, 0, |row| {
        let digests = row.digests()?;
        key.clear();
        if !target.layout.key.is_empty() {
            row.write_key(&mut key)?;
        }
        let subject = (*digests.content.as_bytes(), hash_of(&[&key]));
        let Ok(at) = expected.binary_search_by_key(&subject, Expected::subject) else { return Ok(()) };
        let entry = &mut expected[at];
        if entry.found == Found::Row {
            return Ok(());
        }
        if digests.row.short() != entry.row_digest {
            entry.found = Found::Content;
            return Ok(());
        }
        entry.found = Found::Row;
        let chunk = waiting.of(entry.ordinal);
        if chunk.ordinal == entry.ordinal {
            chunk.found.0 += 1;
            chunk.found.1.add(&digests.row);
        }
        Ok(())
    })?;
    Ok(())
}

/// Takes the entries of contents that are gone out of the index, those of each chunk under an ordinal of their own.
fn retract(
    run: Uuid,
    target: i32,
    reader: &mut BlockReader<'_>,
    segments: &[Segment],
    gone: &[Expected],
    waiting: &mut Waiting,
) -> Result<()> {
    if gone.is_empty() {
        return Ok(());
    }
    // Their keys were too much to keep while nothing was known to be missing.
    let mut tombstones: Vec<(Digest, u64, Vec<u8>)> = Vec::with_capacity(gone.len());
    for segment in segments {
        segment::for_each_entry(reader, segment.id, |entry| {
            let subject = (*entry.digest.as_bytes(), hash_of(&[entry.key]));
            if let Ok(at) = gone.binary_search_by_key(&subject, Expected::subject)
                && gone[at].ordinal == entry.stamp.ordinal
            {
                let ordinal = retraction_ordinal(run, target, waiting.of(entry.stamp.ordinal))?;
                tombstones.push((entry.digest, ordinal as u64, entry.key.to_vec()));
            }
            Ok(())
        })?;
    }
    segment::write_tombstones(target, tombstones)
}

fn retraction_ordinal(run: Uuid, target: i32, chunk: &mut Written) -> Result<i64> {
    if let Some(ordinal) = chunk.retracted_under {
        return Ok(ordinal);
    }
    let ordinal = next_number("ordinal_seq")?;
    Spi::run_with_args(
        "INSERT INTO dedup.ordinals (ordinal, target_id, run_id, chunk_id, pass) \
         SELECT $1, $2, $3, $4, r.pass FROM dedup.runs AS r WHERE r.run_id = $3",
        &[ordinal.into(), target.into(), run.into(), chunk.chunk_id.as_str().into()],
    )?;
    chunk.retracted_under = Some(ordinal);
    Ok(ordinal)
}

/// Marks the chunks; returns how many rows are missing or differ.
fn close(run: Uuid, target: &Target, chunks: &[Written]) -> Result<i64> {
    let mut lost = 0;
    for chunk in chunks {
        if chunk.is_whole() {
            Spi::run_with_args(
                "UPDATE dedup.checkpoints SET status = 'verified', verified_at = pg_catalog.clock_timestamp() \
                 WHERE run_id = $1 AND chunk_id = $2",
                &[run.into(), chunk.chunk_id.as_str().into()],
            )?;
            continue;
        }
        lost += chunk.missing.max(1);
        let name = qualified_name(target.table);
        let what = match chunk.missing {
            0 => "the checksums of its rows differ".to_owned(),
            missing => format!("of {} rows {missing} are missing or differ", chunk.rows),
        };
        let message = format!("{name} does not hold what was sent: {what}");
        Spi::run_with_args(
            "SELECT dedup.fail_written($1, $2, $3)",
            &[run.into(), chunk.chunk_id.as_str().into(), message.as_str().into()],
        )?;
    }
    Ok(lost)
}
