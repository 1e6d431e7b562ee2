//! The books of a rehearsal: what would become of each record, and what that adds up to.

use std::collections::{BTreeMap, HashMap};

use pg_dedup_record::Batch;
use pg_dedup_record::block::{BlockBuilder, Entry, Stamp};
use pg_dedup_record::digest::Digest;

use super::contents::{self, Contents};
use super::prediction::{Certainty, Refusal, TablePrediction};
use super::stage::Part;
use super::trial::{Measured, RefusedRow, Sizes, UNIQUE_VIOLATION};
use crate::error::{Error, Kind, Result, Side};

/// What a row of `dedup.segment_block` or `dedup.ledger_block` takes beyond its block: header, other columns and index entries.
const BLOCK_OVERHEAD: u64 = 190;
/// WAL of an index entry beyond its bytes.
const WAL_PER_INDEX_ENTRY: u64 = 52;
/// WAL of a chunk beyond what it writes: lease, checkpoint, events, commit.
const WAL_PER_CHUNK: u64 = 6_000;

/// What the target has of a chunk's records: a byte each, as `dedup.rehearse_records` says it.
pub struct Standing(Vec<u8>);

impl Standing {
    /// The target is empty.
    pub fn nothing() -> Standing {
        Standing(Vec::new())
    }

    /// What the target said.
    pub fn of(found: Vec<u8>) -> Standing {
        Standing(found)
    }

    fn of_record(&self, row: u32) -> u8 {
        self.0.get(row as usize).copied().unwrap_or(0)
    }

    /// A row stands under its key.
    fn has_key(&self, row: u32) -> bool {
        self.of_record(row) & 1 != 0
    }

    fn is_same(&self, row: u32) -> bool {
        self.of_record(row) & 2 != 0
    }

    fn has_content(&self, row: u32) -> bool {
        self.of_record(row) & 4 != 0
    }
}

/// Records of one content that are not there yet.
struct Fresh {
    content: Digest,
    members: Vec<u32>,
    /// It was met in another chunk.
    known: bool,
}

/// Why a record is refused: SQLSTATE and constraint.
type Reason = (String, Option<String>);

/// What is known of a chunk's records, and found out by trying them.
pub struct Cast {
    fresh: Vec<Fresh>,
    unchanged: u64,
    /// Records whose content the target has.
    losers: Vec<u32>,
    /// Those of `fresh` that wait for a member to be accepted, and which member is next.
    open: Vec<(usize, usize)>,
    /// Member that was accepted.
    accepted: Vec<Option<usize>>,
    refused: BTreeMap<Reason, u64>,
}

impl Cast {
    /// Says of each record what would become of it, as far as that is known before it is tried.
    pub fn new(batch: &Batch, standing: &Standing, contents: &Contents) -> Cast {
        let groups = batch.groups();
        let mut cast = Cast {
            fresh: Vec::new(),
            unchanged: 0,
            losers: Vec::new(),
            open: Vec::new(),
            accepted: Vec::new(),
            refused: BTreeMap::new(),
        };
        for g in 0..groups.len() {
            let content = *groups.digest(g);
            let members = groups.members(g);
            let same = members.iter().filter(|row| standing.is_same(**row)).count() as u64;
            let others = members.iter().copied().filter(|row| !standing.is_same(*row));
            cast.unchanged += same;
            if same > 0 || members.iter().any(|row| standing.has_content(*row)) {
                cast.losers.extend(others);
                continue;
            }
            let known = contents.has(&content);
            if !known {
                cast.open.push((cast.fresh.len(), 0));
            }
            cast.fresh.push(Fresh { content, members: others.collect(), known });
        }
        cast.accepted = vec![None; cast.fresh.len()];
        cast
    }

    /// Records to try next: of each content that has no row yet the next one, as a run does it.
    pub fn candidates(&self) -> Vec<u32> {
        self.open.iter().map(|(fresh, member)| self.fresh[*fresh].members[*member]).collect()
    }

    /// Takes up which of them the target refuses.
    pub fn tried(&mut self, refused: Vec<RefusedRow>) {
        let mut reasons: HashMap<u32, Reason> = HashMap::new();
        for row in refused.into_iter().filter(|row| row.sqlstate != UNIQUE_VIOLATION) {
            reasons.insert(row.row, (row.sqlstate, row.constraint));
        }
        for (fresh, member) in std::mem::take(&mut self.open) {
            let members = &self.fresh[fresh].members;
            let Some(reason) = reasons.remove(&members[member]) else {
                self.accepted[fresh] = Some(member);
                continue;
            };
            *self.refused.entry(reason).or_default() += 1;
            if member + 1 < members.len() {
                self.open.push((fresh, member + 1));
            }
        }
    }

    /// Records that the target refuses.
    pub fn refused(&self) -> u64 {
        self.refused.values().sum()
    }
}

/// What came of a chunk.
#[derive(Default)]
pub struct Outcome {
    /// Records.
    pub records: u64,
    /// Contents that were new, as far as is known.
    pub inserted: u64,
    /// Rows that would be replaced.
    pub updated: u64,
    /// Rows that stand there.
    pub unchanged: u64,
    /// Records that would be dropped, as far as is known.
    pub duplicates: u64,
    /// The chunk would fail.
    failed: bool,
    /// Of the duplicates, records whose content the target had before.
    of_target: u64,
    /// Records that had the content of another before them, or as many as those stand for.
    repeated: f64,
    /// Different contents.
    contents: u64,
    refused: BTreeMap<Reason, u64>,
    entries: Packed,
    losers: Packed,
}

impl Outcome {
    /// Of a chunk that would fail: nothing of it is written.
    pub fn failed(records: u64) -> Outcome {
        Outcome { records, failed: true, ..Outcome::default() }
    }

    /// Records that the target refuses.
    pub fn refused_records(&self) -> u64 {
        self.refused.values().sum()
    }
}

/// Entries in blocks.
#[derive(Default, Clone, Copy)]
struct Packed {
    entries: u64,
    bytes: u64,
}

impl Packed {
    fn add(&mut self, other: Packed) {
        self.entries += other.entries;
        self.bytes += other.bytes;
    }

    /// Bytes that so many entries take.
    fn bytes_of(self, entries: f64) -> u64 {
        if self.entries == 0 { 0 } else { (self.bytes as f64 / self.entries as f64 * entries) as u64 }
    }
}

/// Adds up what became of a chunk, and remembers its contents.
pub fn outcome(batch: &Batch, cast: Cast, standing: &Standing, contents: &mut Contents) -> Result<Outcome> {
    let mut outcome = Outcome {
        records: batch.len() as u64,
        unchanged: cast.unchanged,
        duplicates: cast.losers.len() as u64,
        of_target: cast.losers.len() as u64,
        ..Outcome::default()
    };
    let mut written = Packer::new(batch);
    let mut dropped = Packer::new(batch);
    for (fresh, accepted) in cast.fresh.iter().zip(&cast.accepted) {
        let losers = match accepted {
            _ if fresh.known => &fresh.members[..],
            Some(member) => {
                let row = fresh.members[*member];
                let replaces = standing.has_key(row);
                outcome.updated += u64::from(replaces);
                outcome.inserted += u64::from(!replaces);
                written.push(&fresh.content, row)?;
                &fresh.members[member + 1..]
            }
            // All of them are refused.
            None => continue,
        };
        let records = losers.len() as u32 + u32::from(!fresh.known);
        outcome.contents += 1;
        outcome.repeated += contents.add(&fresh.content, records);
        outcome.duplicates += losers.len() as u64;
        for loser in losers {
            dropped.push(&fresh.content, *loser)?;
        }
    }
    outcome.refused = cast.refused;
    outcome.entries = written.finish();
    outcome.losers = dropped.finish();
    Ok(outcome)
}

/// Packs entries as the hash index and the ledger do, for their size.
struct Packer<'b> {
    batch: &'b Batch,
    builder: BlockBuilder,
    key: Vec<u8>,
    packed: Packed,
}

impl<'b> Packer<'b> {
    fn new(batch: &'b Batch) -> Packer<'b> {
        Packer { batch, builder: BlockBuilder::new(), key: Vec::new(), packed: Packed::default() }
    }

    fn push(&mut self, content: &Digest, row: u32) -> Result<()> {
        let unfit = |e: &dyn std::fmt::Display| {
            Error::new(Side::Source, Kind::Refused, format!("a record does not fit the hash index: {e}"))
        };
        self.key.clear();
        self.batch.key_into(row as usize, &mut self.key).map_err(|e| unfit(&e))?;
        let stamp = Stamp { ordinal: 1 << 20, tombstone: false };
        let row_digest = self.batch.digests(row as usize).row.short();
        let entry = Entry { digest: *content, stamp, row_digest, key: &self.key };
        if !self.builder.try_push(&entry).map_err(|e| unfit(&e))? {
            self.packed.bytes += self.builder.finish().len() as u64 + BLOCK_OVERHEAD;
            self.builder.try_push(&entry).map_err(|e| unfit(&e))?;
        }
        self.packed.entries += 1;
        Ok(())
    }

    fn finish(mut self) -> Packed {
        if !self.builder.is_empty() {
            self.packed.bytes += self.builder.finish().len() as u64 + BLOCK_OVERHEAD;
        }
        self.packed
    }
}

/// What came of a table's chunks.
#[derive(Default)]
pub struct Tally {
    /// Bytes that the source sent.
    pub read_bytes: u64,
    planned_bytes: u64,
    records: u64,
    updated: u64,
    unchanged: u64,
    of_target: u64,
    repeated: f64,
    /// Sum of the different contents of each chunk.
    contents: u64,
    refused: BTreeMap<Reason, u64>,
    failed_chunks: u64,
    failed: u64,
    entries: Packed,
    losers: Packed,
    measured: Measured,
}

impl Tally {
    /// A chunk was played.
    pub fn add(&mut self, outcome: Outcome, planned_bytes: u64, read_bytes: u64) {
        self.planned_bytes += planned_bytes;
        self.read_bytes += read_bytes;
        self.records += outcome.records;
        self.updated += outcome.updated;
        self.unchanged += outcome.unchanged;
        self.of_target += outcome.of_target;
        self.repeated += outcome.repeated;
        self.contents += outcome.contents;
        for (reason, records) in outcome.refused {
            *self.refused.entry(reason).or_default() += records;
        }
        if outcome.failed {
            self.failed_chunks += 1;
            self.failed += outcome.records;
        }
        self.entries.add(outcome.entries);
        self.losers.add(outcome.losers);
    }

    /// Rows were measured.
    pub fn measured(&mut self, measured: Measured) {
        self.measured.rows += measured.rows;
        self.measured.grown.table_bytes += measured.grown.table_bytes;
        self.measured.grown.index_bytes += measured.grown.index_bytes;
        self.measured.empty = measured.empty;
    }

    fn refused_records(&self) -> u64 {
        self.refused.values().sum()
    }

    /// Records that compete for contents: neither refused, nor of a chunk that fails, nor there already, nor dropped for what the target had.
    fn competing(&self) -> f64 {
        (self.records - self.failed - self.unchanged - self.of_target - self.refused_records()) as f64
    }
}

/// What the sources of one target would come to.
pub fn foresee(parts: &[(&Part, &Tally)], contents: &Contents) -> Vec<TablePrediction> {
    // What was read stands for the whole table.
    let scale = |part: &Part, tally: &Tally| {
        if tally.planned_bytes == 0 || tally.planned_bytes >= part.planned_bytes {
            1.0
        } else {
            part.planned_bytes as f64 / tally.planned_bytes as f64
        }
    };
    let competing: f64 = parts.iter().map(|(part, tally)| tally.competing() * scale(part, tally)).sum();
    let whole = parts.iter().all(|(part, tally)| scale(part, tally) == 1.0);
    let distinct = if whole {
        contents.distinct()
    } else {
        let seen: f64 = parts.iter().map(|(_, tally)| tally.contents as f64).sum();
        let all: f64 = parts.iter().map(|(part, tally)| tally.contents as f64 * scale(part, tally)).sum();
        contents::in_all(seen, contents.distinct(), contents.met_once(), all)
    };
    let repeated_in_all = (competing - distinct).max(0.0);
    let repeated: f64 = parts.iter().map(|(part, tally)| tally.repeated * scale(part, tally)).sum();
    let duplicates_are = match (whole, contents.is_exact()) {
        (true, true) => Certainty::Exact,
        (true, false) => Certainty::Close,
        (false, _) => Certainty::Estimated,
    };
    let each = |(part, tally): &(&Part, &Tally)| {
        let scale = scale(part, tally);
        let scaled = |count: u64| (count as f64 * scale).round() as u64;
        let share = if repeated > 0.0 { tally.repeated * scale / repeated } else { 0.0 };
        let duplicates = (repeated_in_all * share + tally.of_target as f64 * scale).round();
        let records = tally.records as f64 * scale;
        let refused = tally.refused_records() as f64 * scale;
        let updated = tally.updated as f64 * scale;
        let unchanged = tally.unchanged as f64 * scale;
        let failed = tally.failed as f64 * scale;
        let inserted = (records - failed - duplicates - refused - updated - unchanged).max(0.0);
        let written = inserted + updated;
        let per_row = |bytes: u64| {
            if tally.measured.rows == 0 { 0.0 } else { bytes as f64 / tally.measured.rows as f64 }
        };
        let empty = if part.occupied { Sizes::default() } else { tally.measured.empty };
        let growth = |bytes: u64, empty: u64| {
            if written == 0.0 { 0 } else { empty + (per_row(bytes) * written) as u64 }
        };
        let table_bytes = growth(tally.measured.grown.table_bytes, empty.table_bytes);
        let index_bytes = growth(tally.measured.grown.index_bytes, empty.index_bytes);
        let hash_index_bytes = tally.entries.bytes_of(written);
        let ledger_bytes = tally.losers.bytes_of(duplicates);
        let index_entries = written * f64::from(part.indexes);
        let wal_bytes = table_bytes
            + (index_bytes as f64 * 0.8) as u64
            + (index_entries as u64 * WAL_PER_INDEX_ENTRY)
            + hash_index_bytes
            + ledger_bytes
            + part.chunks * WAL_PER_CHUNK;
        TablePrediction {
            source: part.table.source.clone(),
            target: part.pair.target.name.to_string(),
            content_rule: part.pair.content_rule.clone(),
            looked_at: tally.records,
            records: records.round() as u64,
            bytes: scaled(tally.read_bytes),
            chunks: part.chunks,
            inserted: inserted.round() as u64,
            updated: updated.round() as u64,
            unchanged: unchanged.round() as u64,
            duplicates: duplicates as u64,
            dedup_ratio: if records > 0.0 { duplicates / records } else { 0.0 },
            duplicates_are,
            refused: tally
                .refused
                .iter()
                .map(|((sqlstate, constraint), records)| {
                    Refusal::new(sqlstate, constraint.clone(), scaled(*records))
                })
                .collect(),
            chunks_over_budget: scaled(tally.failed_chunks),
            table_bytes,
            index_bytes,
            hash_index_bytes,
            ledger_bytes,
            wal_bytes,
            not_tried: part.shape.not_tried.clone(),
        }
    };
    parts.iter().map(each).collect()
}
