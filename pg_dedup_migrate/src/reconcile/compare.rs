//! One chunk: its records against the target's rows.
use std::collections::{BTreeMap, HashMap};

use pg_dedup_record::block::BlockView;
use pg_dedup_record::checksum::Checksum;
use pg_dedup_record::digest::Digest;
use pg_dedup_record::wire::{LedgerEntry, RecordEntry};
use pg_dedup_record::{BatchBuilder, pgcopy};
use pgrx::prelude::*;

use super::report::{Findings, Kind};
use super::{Chunk, Owner, Rows, owner};
use crate::chunk::{KeyRange, required};
use crate::error::{Error, Result};
use crate::hash::rows::{self, View};
use crate::keyset::{column_list, hash_of, qualified_name};
use crate::lookup::{self, Place};
use crate::planning::ByIndex;
use crate::relation::Snapshot;

/// Compares a chunk and enters what is found; returns the mismatches.
///
/// # Errors
/// XX001 for damaged state, what reading the target raises.
pub fn compare(chunk: &Chunk, records: &[RecordEntry<'_>]) -> Result<i64> {
    let snapshot = Snapshot::of_statement();
    let mut comparison = Comparison::new(chunk, records);
    match &chunk.rows {
        Rows::Range(range) => comparison.match_range(range)?,
        Rows::Keys => comparison.match_keys()?,
        Rows::Contents => comparison.match_contents(&snapshot)?,
        Rows::None => {}
    }
    comparison.explain(&snapshot)?;
    comparison.enter()
}

/// A row of the target that is none of the chunk's records.
struct Stranger {
    key: Vec<u8>,
    content: Digest,
    /// A record of the chunk has its key.
    key_is_known: bool,
}

struct Comparison<'a> {
    chunk: &'a Chunk,
    records: &'a [RecordEntry<'a>],
    /// Of each record: the target has the very row.
    matched: Vec<bool>,
    strangers: Vec<Stranger>,
    /// Rows looked at and the sum of their content and key, where the chunk accounts for a range of the target.
    rows: Option<(i64, u64)>,
    /// Hashes of what was found, where it does not.
    seen: Vec<u64>,
    /// Dropped records whose content the index does not have, packed.
    sought: Vec<u8>,
    source_is_same: bool,
    duplicates: i64,
    quarantined: i64,
    findings: Findings,
}

impl<'a> Comparison<'a> {
    fn new(chunk: &'a Chunk, records: &'a [RecordEntry<'a>]) -> Self {
        let mut sum = Checksum::default();
        records.iter().for_each(|record| sum.add(&record.row));
        Self {
            chunk,
            records,
            matched: vec![false; records.len()],
            strangers: Vec::new(),
            rows: None,
            seen: Vec::new(),
            sought: Vec::new(),
            source_is_same: (records.len() as i64, sum) == chunk.read,
            duplicates: 0,
            quarantined: 0,
            findings: Findings::default(),
        }
    }

    fn match_range(&mut self, range: &KeyRange) -> Result<()> {
        let chunk = self.chunk;
        let (condition, arguments) = chunk.key_types.range_condition(&chunk.layout, Some(range));
        let query = format!(
            "SELECT {} FROM {} AS t WHERE {condition}",
            column_list(&chunk.layout, "t"),
            qualified_name(chunk.table)
        );
        let arguments: Vec<_> = arguments.into_iter().map(Into::into).collect();
        let by_key = ByKey::new(self.records);
        let (mut count, mut sum) = (0, 0u64);
        let mut key = Vec::new();
        let _plan = ByIndex::new();
        rows::scan_in(View::Statement, &query, &arguments, &chunk.layout, 0, |row| {
            let digests = row.digests()?;
            key.clear();
            row.write_key(&mut key)?;
            count += 1;
            sum = sum.wrapping_add(subject(digests.content.as_bytes(), &key));
            let known = by_key.records(&key);
            if !self.matches(known.clone(), &digests.row) {
                let key_is_known = known.count() > 0;
                self.strangers.push(Stranger { key: key.clone(), content: digests.content, key_is_known });
            }
            Ok(())
        })?;
        if chunk.counts_rows {
            self.rows = Some((count, sum));
        }
        Ok(())
    }

    /// Takes a row for the first record that is equal to it and has none yet.
    fn matches(&mut self, records: impl Iterator<Item = u32>, row: &Digest) -> bool {
        for i in records {
            let i = i as usize;
            if !self.matched[i] && self.records[i].row == *row {
                self.matched[i] = true;
                return true;
            }
        }
        false
    }

    fn match_keys(&mut self) -> Result<()> {
        let chunk = self.chunk;
        let records = self.records;
        let mut keys: Vec<&[u8]> = records.iter().filter_map(|record| record.key).collect();
        keys.sort_unstable();
        keys.dedup();
        let by_key = ByKey::new(records);
        let mut stored = Vec::new();
        chunk.rows_under(&keys, |n, row| {
            let digests = row.digests()?;
            stored.clear();
            row.write_key(&mut stored)?;
            self.seen.push(hash_of(&[&stored]));
            if !self.matches(by_key.records(keys[n]), &digests.row) {
                let key = keys[n].to_vec();
                self.strangers.push(Stranger { key, content: digests.content, key_is_known: true });
            }
            Ok(())
        })
    }

    /// Without keys: a content that the index has counts as present, and the index is compared with the rows in the end.
    fn match_contents(&mut self, snapshot: &Snapshot) -> Result<()> {
        let mut digests: Vec<[u8; 32]> = self.records.iter().map(|r| *r.content.as_bytes()).collect();
        digests.sort_unstable();
        digests.dedup();
        let wanted: Vec<u32> = (0..digests.len() as u32).collect();
        let present = lookup::present(self.chunk.target_id, &digests, &wanted, &[], snapshot)?;
        let mut taken = vec![false; digests.len()];
        for (i, record) in self.records.iter().enumerate() {
            let Ok(at) = digests.binary_search(record.content.as_bytes()) else { continue };
            if present[at] {
                self.matched[i] = true;
                self.duplicates += i64::from(std::mem::replace(&mut taken[at], true));
            }
        }
        self.seen = digests.iter().zip(present).filter(|(_, p)| *p).map(|(d, _)| hash_of(&[d])).collect();
        Ok(())
    }

    /// Says of everything that is left over on either side what it is.
    fn explain(&mut self, snapshot: &Snapshot) -> Result<()> {
        let chunk = self.chunk;
        let mut quarantine = quarantined(chunk)?;
        let ledger = if chunk.layout.key.is_empty() { Ledger::new(Vec::new()) } else { Ledger::load(chunk)? };
        let mut losers: Vec<u32> = Vec::new();
        let mut unexplained: Vec<u32> = Vec::new();
        for (i, record) in self.records.iter().enumerate() {
            if self.matched[i] {
                continue;
            }
            if let Some(left) = quarantine.get_mut(record.row.as_bytes()).filter(|left| **left > 0) {
                *left -= 1;
                self.quarantined += 1;
            } else if record.key.is_some_and(|key| ledger.lists(&record.content, key)) {
                losers.push(i as u32);
            } else {
                unexplained.push(i as u32);
            }
        }
        self.look_for_survivors(&losers, snapshot)?;
        self.judge_unexplained(&unexplained, snapshot)?;
        self.judge_strangers(snapshot)?;
        self.judge_survivors_of_their_own(&ledger, snapshot)
    }

    /// A record that was dropped is there if its content is. What the index has of it is settled in the end; what it does not have is sought among
    /// the rows then.
    fn look_for_survivors(&mut self, losers: &[u32], snapshot: &Snapshot) -> Result<()> {
        let mut digests: Vec<[u8; 32]> =
            losers.iter().map(|&i| *self.records[i as usize].content.as_bytes()).collect();
        digests.sort_unstable();
        digests.dedup();
        let wanted: Vec<u32> = (0..digests.len() as u32).collect();
        let present = lookup::present(self.chunk.target_id, &digests, &wanted, &[], snapshot)?;
        let mut sought: Vec<LedgerEntry<'_>> = Vec::new();
        for &i in losers {
            let record = &self.records[i as usize];
            if !digests.binary_search(record.content.as_bytes()).is_ok_and(|at| present[at]) {
                sought.push(LedgerEntry { digest: record.content, key: record.key.unwrap_or_default() });
            }
        }
        sought.sort_unstable_by_key(|loser| (loser.digest, loser.key));
        for loser in &sought {
            loser.encode(&mut self.sought).map_err(|e| Error::invalid(e.to_string()))?;
        }
        self.duplicates += losers.len() as i64;
        Ok(())
    }

    /// Records that neither the target nor the ledger nor the quarantine has.
    fn judge_unexplained(&mut self, unexplained: &[u32], snapshot: &Snapshot) -> Result<()> {
        if unexplained.is_empty() {
            return Ok(());
        }
        let mut occupied: Vec<&[u8]> =
            self.strangers.iter().filter(|s| s.key_is_known).map(|s| s.key.as_slice()).collect();
        occupied.sort_unstable();
        // The source as a whole is what it was: then so is each of its records. Otherwise the index tells which were there.
        let standing = if self.source_is_same {
            BTreeMap::new()
        } else {
            self.standing(unexplained.iter().map(|&i| self.records[i as usize].content), snapshot)?
        };
        for &i in unexplained {
            let record = &self.records[i as usize];
            let key = record.key.unwrap_or_default();
            let was_there = self.source_is_same
                || self.chunk.layout.key.is_empty()
                || standing.get(record.content.as_bytes()).is_some_and(|places| {
                    places.iter().any(|p| p.key == key && p.row_digest == record.row.short())
                });
            let kind = match was_there {
                false => Kind::SourceChanged,
                true if occupied.binary_search(&key).is_ok() => Kind::Changed,
                true => Kind::Missing,
            };
            self.findings.add(kind, key, record.content);
        }
        Ok(())
    }

    /// Rows in the chunk's range whose key no record has. Those of other sources of the run are theirs to explain.
    fn judge_strangers(&mut self, snapshot: &Snapshot) -> Result<()> {
        let strangers: Vec<&Stranger> = self.strangers.iter().filter(|s| !s.key_is_known).collect();
        if strangers.is_empty() {
            return Ok(());
        }
        let standing = self.standing(strangers.iter().map(|s| s.content), snapshot)?;
        let mut owners: HashMap<u64, Owner> = HashMap::new();
        for stranger in strangers {
            let place = standing
                .get(stranger.content.as_bytes())
                .and_then(|places| places.iter().find(|p| p.key == stranger.key));
            let owner = match place {
                None => Owner::Nobody,
                Some(place) => match owners.get(&place.ordinal) {
                    Some(known) => known.clone(),
                    None => {
                        let found = owner(self.chunk.run, self.chunk.target_id, place.ordinal)?;
                        owners.insert(place.ordinal, found.clone());
                        found
                    }
                },
            };
            let ours = match owner {
                Owner::Table(table, _) => table == self.chunk.table_id,
                Owner::SameSource => true,
                Owner::Nobody | Owner::Other => false,
            };
            let kind = match (ours, self.source_is_same) {
                (true, true) => Kind::Extra,
                (true, false) => Kind::SourceChanged,
                (false, _) if owner == Owner::Nobody && self.chunk.counts_rows => Kind::Foreign,
                (false, _) => continue,
            };
            self.findings.add(kind, &stranger.key, stranger.content);
        }
        Ok(())
    }

    /// Records that were dropped as duplicates and whose row is there all the same: if another row has the content, too, it is there twice.
    fn judge_survivors_of_their_own(&mut self, ledger: &Ledger, snapshot: &Snapshot) -> Result<()> {
        if ledger.is_empty() {
            return Ok(());
        }
        let own: Vec<u32> = (0..self.records.len() as u32)
            .filter(|&i| {
                let record = &self.records[i as usize];
                self.matched[i as usize] && record.key.is_some_and(|key| ledger.lists(&record.content, key))
            })
            .collect();
        if own.is_empty() {
            return Ok(());
        }
        let standing = self.standing(own.iter().map(|&i| self.records[i as usize].content), snapshot)?;
        for i in own {
            let record = &self.records[i as usize];
            let key = record.key.unwrap_or_default();
            let others: Vec<&[u8]> = standing
                .get(record.content.as_bytes())
                .map(|places| places.iter().map(|p| p.key.as_slice()).filter(|k| *k != key).collect())
                .unwrap_or_default();
            let mut twice = false;
            self.chunk.rows_under(&others, |_, row| {
                twice |= row.digests()?.content == record.content;
                Ok(())
            })?;
            if twice {
                self.matched[i as usize] = false;
                self.duplicates += 1;
                self.findings.add(Kind::SurvivingDuplicate, key, record.content);
            }
        }
        Ok(())
    }

    /// Where these contents stand, by the index.
    fn standing(
        &self,
        contents: impl Iterator<Item = Digest>,
        snapshot: &Snapshot,
    ) -> Result<BTreeMap<[u8; 32], Vec<Place>>> {
        let mut digests: Vec<[u8; 32]> = contents.map(|digest| digest.0).collect();
        digests.sort_unstable();
        digests.dedup();
        let wanted: Vec<u32> = (0..digests.len() as u32).collect();
        let places = lookup::places(self.chunk.target_id, &digests, &wanted, snapshot)?;
        Ok(places.into_iter().map(|(i, places)| (digests[i as usize], places)).collect())
    }

    fn enter(mut self) -> Result<i64> {
        let chunk = self.chunk;
        let present = self.matched.iter().filter(|matched| **matched).count() as i64;
        // Without keys a content is present once; its other records are duplicates.
        let present = if chunk.layout.key.is_empty() { present - self.duplicates } else { present };
        let (row_count, row_sum) = match (&chunk.rows, self.rows) {
            (_, Some((count, sum))) => (Some(count), Some(sum.cast_signed())),
            (Rows::None, None) if chunk.counts_rows => (Some(0), Some(0)),
            _ => (None, None),
        };
        self.seen.sort_unstable();
        let seen: Option<Vec<u8>> = matches!(chunk.rows, Rows::Keys | Rows::Contents)
            .then(|| self.seen.iter().flat_map(|hash| hash.to_be_bytes()).collect());
        let counts: Vec<i64> = Kind::ALL.iter().map(|&kind| self.findings.count(kind)).collect();
        Spi::run_with_args(
            "INSERT INTO dedup.reconciled_chunks (reconciliation_id, chunk_id, table_id, source_count, present_count, duplicate_count, quarantined_count, \
                 missing_count, changed_count, extra_count, surviving_duplicate_count, foreign_count, source_changed_count, source_is_same, \
                 row_count, row_sum, seen, sought) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8[1], $8[2], $8[3], $8[4], $8[5], $8[6], $9, $10, $11, $12, $13)",
            &[
                chunk.reconciliation.into(),
                chunk.chunk_id.as_str().into(),
                chunk.table_id.into(),
                (self.records.len() as i64).into(),
                present.into(),
                self.duplicates.into(),
                self.quarantined.into(),
                counts.into(),
                self.source_is_same.into(),
                row_count.into(),
                row_sum.into(),
                seen.into(),
                (!self.sought.is_empty()).then_some(self.sought).into(),
            ],
        )?;
        self.findings.enter(chunk.reconciliation, chunk.run, &chunk.chunk_id, chunk.target_id, |key| {
            chunk.key_text(key)
        })?;
        Ok(self.findings.mismatches())
    }
}

/// What rows and entries are counted by: a hash over content and key.
pub fn subject(content: &[u8; 32], key: &[u8]) -> u64 {
    hash_of(&[content, key])
}

/// Records by key.
struct ByKey<'a> {
    first: HashMap<&'a [u8], u32>,
    /// The next record with the same key.
    next: Vec<Option<u32>>,
}

impl<'a> ByKey<'a> {
    fn new(records: &[RecordEntry<'a>]) -> Self {
        let mut first = HashMap::with_capacity(records.len());
        let mut next = vec![None; records.len()];
        // From behind, so that chains run forwards.
        for (i, record) in records.iter().enumerate().rev() {
            if let Some(key) = record.key {
                next[i] = first.insert(key, i as u32);
            }
        }
        Self { first, next }
    }

    fn records(&self, key: &[u8]) -> impl Iterator<Item = u32> + Clone + '_ {
        std::iter::successors(self.first.get(key).copied(), |&i| self.next[i as usize])
    }
}

/// What a chunk dropped as duplicates, by digest and key. Most of what it is asked for is not in it: the leading bits of a digest lead to the
/// few lines it may be among.
struct Ledger {
    lines: Vec<(Digest, Vec<u8>)>,
    /// Where the lines of each value of the leading bits begin, and where the last ones end.
    starts: Vec<u32>,
    /// How far a digest's prefix is shifted to get them.
    shift: u32,
}

impl Ledger {
    fn load(chunk: &Chunk) -> Result<Self> {
        let lines = Spi::connect(|client| -> Result<_> {
            let mut lines = Vec::new();
            let rows = client.select(
                "SELECT l.entries FROM dedup.ordinals AS o JOIN dedup.ledger_block AS l USING (ordinal) WHERE o.run_id = $1 AND o.chunk_id = $2",
                None,
                &[chunk.run.into(), chunk.chunk_id.as_str().into()],
            )?;
            for row in rows {
                let bytes: Vec<u8> = required(row["entries"].value()?)?;
                let block = BlockView::parse(&bytes)
                    .map_err(|e| Error::corrupted("a ledger block is damaged").detail(e.to_string()))?;
                lines.extend((0..block.len()).map(|i| block.entry(i)).map(|e| (e.digest, e.key.to_vec())));
            }
            Ok(lines)
        })?;
        Ok(Self::new(lines))
    }

    fn new(mut lines: Vec<(Digest, Vec<u8>)>) -> Self {
        lines.sort_unstable();
        let bits = (lines.len().max(1).ilog2() + 1).min(24);
        let shift = u64::BITS - bits;
        let mut starts = vec![0; (1 << bits) + 1];
        for (digest, _) in &lines {
            starts[(digest.prefix() >> shift) as usize + 1] += 1;
        }
        for at in 1..starts.len() {
            starts[at] += starts[at - 1];
        }
        Self { lines, starts, shift }
    }

    fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    fn lists(&self, content: &Digest, key: &[u8]) -> bool {
        let bucket = (content.prefix() >> self.shift) as usize;
        let lines = &self.lines[self.starts[bucket] as usize..self.starts[bucket + 1] as usize];
        lines.iter().any(|(digest, k)| digest == content && k == key)
    }
}

/// Row digests of the chunk's quarantined records, and how many of each there are.
fn quarantined(chunk: &Chunk) -> Result<HashMap<[u8; 32], u32>> {
    let unreadable = |e: pg_dedup_record::BatchError| Error::corrupted(format!("a quarantined record: {e}"));
    let mut batch = BatchBuilder::new(&chunk.layout, true);
    batch.push(pgcopy::header()).map_err(unreadable)?;
    Spi::connect(|client| -> Result<()> {
        let rows = client.select(
            "SELECT record FROM dedup.quarantine WHERE run_id = $1 AND chunk_id = $2 AND record IS NOT NULL",
            None,
            &[chunk.run.into(), chunk.chunk_id.as_str().into()],
        )?;
        for row in rows {
            let record: Vec<u8> = required(row["record"].value()?)?;
            batch.push(&record).map_err(unreadable)?;
        }
        Ok(())
    })?;
    batch.push(pgcopy::trailer()).map_err(unreadable)?;
    let batch = batch.finish().map_err(unreadable)?;
    let mut counts = HashMap::new();
    for i in 0..batch.len() {
        *counts.entry(*batch.digests(i).row.as_bytes()).or_default() += 1;
    }
    Ok(counts)
}
