//! One chunk: its records against the target's rows.
use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::CStr;

use pg_dedup_record::checksum::Checksum;
use pg_dedup_record::digest::Digest;
use pg_dedup_record::wire::{LedgerEntry, RecordEntry};
use pgrx::pg_sys;
use pgrx::prelude::*;

use super::explained::{Ledger, quarantined};
use super::report::{Findings, Kind};
use super::{Chunk, Rows, pack_hashes};
use crate::by_key::{Reading, rows_under};
use crate::error::{Error, Result};
use crate::hash::rows::{self, View};
use crate::keyset::{KeyRange, column_list, hash_of, qualified_name};
use crate::lookup::{self, Leaving, Place};
use crate::owners::{Owner, Owners};
use crate::planning::ByIndex;
use crate::relation::Snapshot;
use crate::sql::required;

/// Compares a chunk and enters what is found; returns the mismatches.
///
/// # Errors
/// XX001 for damaged state, what reading the target raises.
pub fn compare(chunk: &Chunk, mut records: Vec<RecordEntry<'_>>) -> Result<i64> {
    let snapshot = Snapshot::of_statement();
    if let Rows::Sampled(keys) = &chunk.rows {
        // Equal keys may be spelled in several ways.
        let is_drawn = |key: &[u8]| keys.binary_search_by(|drawn| drawn.as_slice().cmp(key)).is_ok();
        records.retain(|record| record.key.is_some_and(is_drawn));
    }
    let mut comparison = Comparison::new(chunk, &records);
    match &chunk.rows {
        Rows::Range(range) => comparison.match_range(range)?,
        Rows::Keys => {
            let mut keys: Vec<&[u8]> = records.iter().filter_map(|record| record.key).collect();
            keys.sort_unstable();
            keys.dedup();
            comparison.match_keys(&keys)?;
        }
        Rows::Sampled(keys) => comparison.match_keys(&keys.iter().map(Vec::as_slice).collect::<Vec<_>>())?,
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

/// What has become of a record.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Nothing is known yet.
    Open,
    /// The target has the very row.
    Present,
    /// It was dropped as a duplicate.
    Dropped,
    /// It was set aside.
    Quarantined,
    /// None of these.
    Unexplained,
}

struct Comparison<'a> {
    chunk: &'a Chunk,
    records: &'a [RecordEntry<'a>],
    by_key: ByKey<'a>,
    fates: Vec<Fate>,
    /// The record after the one that was found last.
    next: usize,
    strangers: Vec<Stranger>,
    /// Rows looked at and the sum of their content and key, where the chunk accounts for a range of the target.
    rows: Option<(i64, u64)>,
    /// Sum of the digests of the rows in its range.
    row_checksum: Option<Checksum>,
    /// Hashes of what was found, where it does not.
    seen: Vec<u64>,
    /// Hashes of content and key of the records that count as duplicates.
    dropped: Vec<u64>,
    /// Those of them whose content the index does not have, packed.
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
            by_key: ByKey::new(records),
            fates: vec![Fate::Open; records.len()],
            next: 0,
            strangers: Vec::new(),
            rows: None,
            row_checksum: None,
            seen: Vec::new(),
            dropped: Vec::new(),
            sought: Vec::new(),
            // A sample does not tell.
            source_is_same: !matches!(chunk.rows, Rows::Sampled(_))
                && (records.len() as i64, sum) == chunk.read,
            duplicates: 0,
            quarantined: 0,
            findings: Findings::default(),
        }
    }

    fn match_range(&mut self, range: &KeyRange) -> Result<()> {
        let chunk = self.chunk;
        let (mut count, mut sum, mut checksum) = (0, 0u64, Checksum::default());
        let mut key = Vec::new();
        scan_range(chunk, range, |row| {
            let row_digest = row.row_digest()?;
            key.clear();
            row.write_key(&mut key)?;
            // A row that is equal to a record has its content.
            let content = match self.matches(&key, &row_digest) {
                Some(record) => record.content,
                None => {
                    let content = row.digests()?.content;
                    let key_is_known = self.by_key.records(&key).next().is_some();
                    self.strangers.push(Stranger { key: key.clone(), content, key_is_known });
                    content
                }
            };
            count += 1;
            sum = sum.wrapping_add(subject(content.as_bytes(), &key));
            checksum.add(&row_digest);
            Ok(())
        })?;
        self.row_checksum = Some(checksum);
        if chunk.counts_rows {
            self.rows = Some((count, sum));
        }
        Ok(())
    }

    /// Takes a row for the first record that is equal to it and has none yet.
    fn matches(&mut self, key: &[u8], row: &Digest) -> Option<RecordEntry<'a>> {
        let is_it = |at: usize| self.fates[at] == Fate::Open && self.records[at].row == *row;
        let at = match self.next_with(key) {
            Some(at) if is_it(at) => at,
            _ => self.by_key.records(key).map(|i| i as usize).find(|&i| is_it(i))?,
        };
        self.fates[at] = Fate::Present;
        self.next = at + 1;
        Some(self.records[at])
    }

    /// The next record with this key, if it is near: both sides are read in order of their keys, but for the records that have no row.
    fn next_with(&self, key: &[u8]) -> Option<usize> {
        /// A longer stretch of records without rows is left to the look-up by key.
        const NEAR: usize = 32;
        let near = self.next..self.records.len().min(self.next + NEAR);
        near.into_iter().find(|&at| self.records[at].key == Some(key))
    }

    fn match_keys(&mut self, keys: &[&[u8]]) -> Result<()> {
        let chunk = self.chunk;
        let mut stored = Vec::new();
        rows_under(Reading::Statement, chunk.table, &chunk.layout, &chunk.key_types, keys, |n, row| {
            let digests = row.digests()?;
            stored.clear();
            row.write_key(&mut stored)?;
            self.seen.push(hash_of(&[&stored]));
            if self.matches(keys[n], &digests.row).is_none() {
                let key_is_known = self.by_key.records(keys[n]).next().is_some();
                let key = keys[n].to_vec();
                self.strangers.push(Stranger { key, content: digests.content, key_is_known });
            }
            Ok(())
        })
    }

    /// Without keys: a content that the index has counts as present, and the index is compared with the rows in the end.
    fn match_contents(&mut self, snapshot: &Snapshot) -> Result<()> {
        let (digests, wanted) = lookup::distinct(self.records.iter().map(|record| record.content));
        let present = lookup::present(self.chunk.target_id, &digests, &wanted, Leaving::default(), snapshot)?;
        let mut taken = vec![false; digests.len()];
        for (i, record) in self.records.iter().enumerate() {
            let Ok(at) = digests.binary_search(record.content.as_bytes()) else { continue };
            if present[at] {
                self.fates[i] = Fate::Present;
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
        let mut ledger = Ledger::load(chunk)?;
        for (record, fate) in
            self.records.iter().zip(&mut self.fates).filter(|(_, fate)| **fate == Fate::Open)
        {
            if let Some(left) = quarantine.get_mut(record.row.as_bytes()).filter(|left| **left > 0) {
                *left -= 1;
                self.quarantined += 1;
                *fate = Fate::Quarantined;
            } else if record.key.is_some_and(|key| ledger.take(&record.content, key)) {
                *fate = Fate::Dropped;
            } else {
                *fate = Fate::Unexplained;
            }
        }
        self.look_for_survivors(snapshot)?;
        self.judge_unexplained(snapshot)?;
        self.judge_occupied(snapshot)?;
        self.judge_strangers(snapshot)?;
        self.judge_survivors_of_their_own(&ledger, snapshot)
    }

    /// The records of one fate.
    fn fated(&self, fate: Fate) -> Vec<u32> {
        (0..self.records.len() as u32).filter(|&i| self.fates[i as usize] == fate).collect()
    }

    /// The key of a record as divergences name it.
    fn named_key(&self, record: &RecordEntry<'a>) -> Option<&'a [u8]> {
        record.key.filter(|_| !self.chunk.keyless())
    }

    /// A record that was dropped is there if its content is. What the index has of it is settled in the end, in a sample it is looked at here; what
    /// it does not have is sought among the rows then.
    fn look_for_survivors(&mut self, snapshot: &Snapshot) -> Result<()> {
        let losers = self.fated(Fate::Dropped);
        let contents = losers.iter().map(|&i| self.records[i as usize].content);
        let held = match self.chunk.rows {
            Rows::Sampled(_) => self.held(contents, snapshot)?,
            _ => {
                let (digests, wanted) = lookup::distinct(contents);
                let target = self.chunk.target_id;
                let present = lookup::present(target, &digests, &wanted, Leaving::default(), snapshot)?;
                digests.into_iter().zip(present).filter(|(_, present)| *present).map(|(d, _)| d).collect()
            }
        };
        let mut sought: Vec<LedgerEntry<'_>> = Vec::new();
        for &i in &losers {
            let record = &self.records[i as usize];
            self.dropped.push(subject(record.content.as_bytes(), record.key.unwrap_or_default()));
            if !held.contains(record.content.as_bytes()) {
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

    /// Which of these contents stand in a row that the index names.
    fn held(&self, contents: impl Iterator<Item = Digest>, snapshot: &Snapshot) -> Result<HashSet<[u8; 32]>> {
        let standing = self.standing(contents, snapshot)?;
        let chunk = self.chunk;
        let (keys, named): (Vec<&[u8]>, Vec<&[u8; 32]>) = standing
            .iter()
            .flat_map(|(content, places)| places.iter().map(move |place| (place.key.as_slice(), content)))
            .unzip();
        let mut held: HashSet<[u8; 32]> = HashSet::new();
        rows_under(Reading::Statement, chunk.table, &chunk.layout, &chunk.key_types, &keys, |n, row| {
            if row.digests()?.content.as_bytes() == named[n] {
                held.insert(*named[n]);
            }
            Ok(())
        })?;
        Ok(held)
    }

    /// Records that neither the target nor the ledger nor the quarantine has.
    fn judge_unexplained(&mut self, snapshot: &Snapshot) -> Result<()> {
        let unexplained = self.fated(Fate::Unexplained);
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
        let mut layouts = Layouts::new(self.chunk);
        for &i in &unexplained {
            let record = &self.records[i as usize];
            let key = record.key.unwrap_or_default();
            let has_row = occupied.binary_search(&key).is_ok();
            let place = standing
                .get(record.content.as_bytes())
                .and_then(|places| places.iter().find(|place| place.key == key));
            let was_there = match place {
                _ if self.source_is_same || self.chunk.keyless() => true,
                None => false,
                // The entry must have a row, whatever has become of the record's other columns. Where there is one that differs, the entry tells
                // which side has changed, unless it was made of other columns.
                Some(place) => {
                    !has_row || place.row_digest == record.row.short() || !layouts.is_ours(place.ordinal)?
                }
            };
            let kind = match was_there {
                false => Kind::SourceChanged,
                true if has_row => Kind::Changed,
                true => Kind::Missing,
            };
            self.findings.add(kind, self.named_key(record), record.content);
        }
        Ok(())
    }

    /// Rows under the keys of records that are accounted for otherwise: dropped as duplicates, or set aside.
    fn judge_occupied(&mut self, snapshot: &Snapshot) -> Result<()> {
        let mut occupied: Vec<(usize, &RecordEntry<'_>, Fate)> = Vec::new();
        for (n, stranger) in self.strangers.iter().enumerate().filter(|(_, s)| s.key_is_known) {
            let fates = self.by_key.records(&stranger.key).map(|i| (i as usize, self.fates[i as usize]));
            // One that is unexplained is missing its row: that says it all.
            if fates.clone().any(|(_, fate)| matches!(fate, Fate::Unexplained | Fate::Present)) {
                continue;
            }
            // Of several the one with the row's content, or else one that was dropped.
            let best = fates.max_by_key(|&(i, fate)| {
                (self.records[i].content == stranger.content, fate == Fate::Dropped)
            });
            occupied.extend(best.map(|(i, fate)| (n, &self.records[i], fate)));
        }
        if occupied.is_empty() {
            return Ok(());
        }
        let standing = self.standing(occupied.iter().map(|(n, ..)| self.strangers[*n].content), snapshot)?;
        let mut owners = Owners::new(self.chunk.run, self.chunk.target_id);
        let mut found = Vec::new();
        for (n, record, fate) in occupied {
            let stranger = &self.strangers[n];
            let places = standing.get(stranger.content.as_bytes()).map(Vec::as_slice).unwrap_or_default();
            let place = places.iter().find(|place| place.key == stranger.key);
            let owner = place.map_or(Ok(Owner::Nobody), |place| owners.of(place.ordinal))?;
            let is_ours = owner.is_table(self.chunk.table_id);
            let kind = if fate == Fate::Dropped && record.content == stranger.content {
                if !self.stands_elsewhere(&stranger.content, places, &stranger.key)? {
                    continue;
                }
                Kind::SurvivingDuplicate
            } else if place.is_none() {
                Kind::Foreign
            } else if is_ours && fate == Fate::Dropped {
                Kind::Changed
            } else {
                // The row that stood there before, which the record was to replace, or what another run or source of the run has put there.
                continue;
            };
            found.push((kind, n));
        }
        for (kind, n) in found {
            let Stranger { key, content, .. } = &self.strangers[n];
            self.findings.add(kind, Some(key), *content);
        }
        Ok(())
    }

    /// Whether a row under another of these places has the content.
    fn stands_elsewhere(&self, content: &Digest, places: &[Place], key: &[u8]) -> Result<bool> {
        let others: Vec<&[u8]> = places.iter().map(|p| p.key.as_slice()).filter(|k| *k != key).collect();
        let mut elsewhere = false;
        let chunk = self.chunk;
        rows_under(Reading::Statement, chunk.table, &chunk.layout, &chunk.key_types, &others, |_, row| {
            elsewhere |= row.digests()?.content == *content;
            Ok(())
        })?;
        Ok(elsewhere)
    }

    /// Rows in the chunk's range whose key no record has. Those of other sources of the run are theirs to explain.
    fn judge_strangers(&mut self, snapshot: &Snapshot) -> Result<()> {
        let strangers: Vec<&Stranger> = self.strangers.iter().filter(|s| !s.key_is_known).collect();
        if strangers.is_empty() {
            return Ok(());
        }
        let standing = self.standing(strangers.iter().map(|s| s.content), snapshot)?;
        let mut owners = Owners::new(self.chunk.run, self.chunk.target_id);
        for stranger in strangers {
            let place = standing
                .get(stranger.content.as_bytes())
                .and_then(|places| places.iter().find(|p| p.key == stranger.key));
            let owner = place.map_or(Ok(Owner::Nobody), |place| owners.of(place.ordinal))?;
            let kind = match (owner.is_table(self.chunk.table_id), self.source_is_same) {
                (true, true) => Kind::Extra,
                (true, false) => Kind::SourceChanged,
                (false, _) if owner == Owner::Nobody && self.chunk.counts_rows => Kind::Foreign,
                (false, _) => continue,
            };
            self.findings.add(kind, Some(&stranger.key), stranger.content);
        }
        Ok(())
    }

    /// Records that were dropped as duplicates and whose row is there all the same: if another row has the content, too, it is there twice.
    fn judge_survivors_of_their_own(&mut self, ledger: &Ledger, snapshot: &Snapshot) -> Result<()> {
        if ledger.is_empty() {
            return Ok(());
        }
        let mut own = self.fated(Fate::Present);
        own.retain(|&i| {
            let record = &self.records[i as usize];
            record.key.is_some_and(|key| ledger.lists(&record.content, key))
        });
        if own.is_empty() {
            return Ok(());
        }
        let standing = self.standing(own.iter().map(|&i| self.records[i as usize].content), snapshot)?;
        for i in own {
            let record = &self.records[i as usize];
            let key = record.key.unwrap_or_default();
            let places = standing.get(record.content.as_bytes()).map(Vec::as_slice).unwrap_or_default();
            if self.stands_elsewhere(&record.content, places, key)? {
                self.fates[i as usize] = Fate::Dropped;
                self.duplicates += 1;
                self.findings.add(Kind::SurvivingDuplicate, Some(key), record.content);
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
        let (digests, wanted) = lookup::distinct(contents);
        let places = lookup::places(self.chunk.target_id, &digests, &wanted, snapshot)?;
        Ok(places.into_iter().map(|(i, places)| (digests[i as usize], places)).collect())
    }

    fn enter(self) -> Result<i64> {
        let chunk = self.chunk;
        let present = self.fated(Fate::Present).len() as i64;
        // Without keys a content is present once; its other records are duplicates.
        let present = if chunk.keyless() { present - self.duplicates } else { present };
        let (row_count, row_sum) = match (&chunk.rows, self.rows) {
            (_, Some((count, sum))) => (Some(count), Some(sum.cast_signed())),
            (Rows::None, None) if chunk.counts_rows => (Some(0), Some(0)),
            _ => (None, None),
        };
        let packed = |mut hashes: Vec<u64>| -> Vec<u8> {
            hashes.sort_unstable();
            pack_hashes(&hashes)
        };
        let seen = matches!(chunk.rows, Rows::Keys | Rows::Contents).then(|| packed(self.seen));
        let dropped = (!self.dropped.is_empty()).then(|| packed(self.dropped));
        let counts: Vec<i64> = Kind::ALL.iter().map(|&kind| self.findings.count(kind)).collect();
        Spi::run_with_args(
            "INSERT INTO dedup.reconciled_chunks (reconciliation_id, chunk_id, table_id, source_count, present_count, duplicate_count, quarantined_count, \
                 missing_count, changed_count, extra_count, surviving_duplicate_count, foreign_count, source_changed_count, source_is_same, \
                 row_count, row_sum, row_checksum, seen, dropped, sought, target_snapshot) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8[1], $8[2], $8[3], $8[4], $8[5], $8[6], $9, $10, $11, $12, $13, $14, $15, $16)",
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
                self.row_checksum.map(|sum| sum.to_bytes().to_vec()).into(),
                seen.into(),
                dropped.into(),
                (!self.sought.is_empty()).then_some(self.sought).into(),
                statement_snapshot().into(),
            ],
        )?;
        self.findings.enter(
            chunk.reconciliation,
            chunk.run,
            &chunk.chunk_id,
            chunk.target_id,
            chunk.strict,
            |key| chunk.key_types.query_string(key),
        )?;
        Ok(self.findings.mismatches(chunk.strict))
    }
}

/// Whether entries were made of the columns that the chunk's run delivers: then their row digests can be compared.
struct Layouts<'a> {
    chunk: &'a Chunk,
    known: HashMap<u64, bool>,
}

impl<'a> Layouts<'a> {
    fn new(chunk: &'a Chunk) -> Self {
        Self { chunk, known: HashMap::new() }
    }

    fn is_ours(&mut self, ordinal: u64) -> Result<bool> {
        if let Some(known) = self.known.get(&ordinal) {
            return Ok(*known);
        }
        // Rows that stood there before were hashed as the target is.
        let same = Spi::get_one_with_args::<bool>(
            "SELECT coalesce(t.layout, g.layout) OPERATOR(pg_catalog.=) m.layout \
             FROM dedup.run_tables AS m JOIN dedup.targets AS g USING (target_id) \
                 LEFT JOIN dedup.ordinals AS o ON o.ordinal = $3 LEFT JOIN dedup.checkpoints AS c ON c.run_id = o.run_id AND c.chunk_id = o.chunk_id \
                 LEFT JOIN dedup.run_tables AS t ON t.run_id = c.run_id AND t.table_id = c.table_id \
             WHERE m.run_id = $1 AND m.table_id = $2",
            &[self.chunk.run.into(), self.chunk.table_id.into(), ordinal.cast_signed().into()],
        )?;
        let same = required(same)?;
        self.known.insert(ordinal, same);
        Ok(same)
    }
}

/// The snapshot of the statement that is being executed, as `pg_current_snapshot()` has it.
fn statement_snapshot() -> String {
    // SAFETY: reads the active snapshot, which a statement has; its output function takes what it returns and gives a palloc'ed string.
    unsafe {
        let snapshot = pgrx::direct_function_call_as_datum(pg_sys::pg_current_snapshot, &[]);
        let text = pgrx::direct_function_call::<&CStr>(pg_sys::pg_snapshot_out, &[snapshot]);
        text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

/// The target's rows in a chunk's key range.
fn scan_range(
    chunk: &Chunk,
    range: &KeyRange,
    mut visit: impl FnMut(&rows::RowView<'_>) -> Result<()>,
) -> Result<()> {
    let (condition, arguments) = chunk.key_types.range_condition(&chunk.layout, Some(range));
    let query = format!(
        "SELECT {} FROM {} AS t WHERE {condition}",
        column_list(&chunk.layout, "t"),
        qualified_name(chunk.table)
    );
    let arguments: Vec<_> = arguments.into_iter().map(Into::into).collect();
    let _plan = ByIndex::new();
    rows::scan_in(View::Statement, &query, &arguments, &chunk.layout, 0, |row| visit(&row))?;
    Ok(())
}

/// Forgets the chunks of a pass whose rows are others now, or which don't account for a range of rows; returns how many. A pass that was settled before it
/// was cut off is forgotten whole then: what the end of it found stands in the chunks' rows, and it has to come to that end again.
///
/// # Errors
/// As [`compare`].
pub fn recheck(reconciliation: i64) -> Result<i64> {
    let done: Vec<(String, Option<Vec<u8>>)> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT chunk_id, row_checksum FROM dedup.reconciled_chunks WHERE reconciliation_id = $1 ORDER BY chunk_id",
                None,
                &[reconciliation.into()],
            )?
            .map(|row| Ok((required(row["chunk_id"].value()?)?, row["row_checksum"].value()?)))
            .collect()
    })?;
    let all: Vec<String> = done.iter().map(|(chunk_id, _)| chunk_id.clone()).collect();
    let mut stale: Vec<String> = Vec::new();
    for (chunk_id, known) in done {
        let chunk = Chunk::load(reconciliation, &chunk_id)?;
        let mut checksum = Checksum::default();
        if let (Rows::Range(range), Some(_)) = (&chunk.rows, &known) {
            scan_range(&chunk, range, |row| {
                checksum.add(&row.row_digest()?);
                Ok(())
            })?;
            if known.as_deref() == Some(checksum.to_bytes().as_slice()) {
                continue;
            }
        }
        stale.push(chunk_id);
    }
    if !stale.is_empty() && unsettle(reconciliation)? {
        stale = all;
    }
    for table in ["divergences", "reconciled_chunks"] {
        Spi::run_with_args(
            &format!("DELETE FROM dedup.{table} WHERE reconciliation_id = $1 AND chunk_id = ANY ($2)"),
            &[reconciliation.into(), stale.clone().into()],
        )?;
    }
    Ok(stale.len() as i64)
}

/// The pass has to be settled once more; says whether it was.
fn unsettle(reconciliation: i64) -> Result<bool> {
    // Locked whether settled or not: a settling that is about to commit is waited for and seen, where a condition in the UPDATE would pass it by.
    let settled = Spi::get_one_with_args::<bool>(
        "SELECT settled_at IS NOT NULL FROM dedup.reconciliations WHERE reconciliation_id = $1 FOR NO KEY UPDATE",
        &[reconciliation.into()],
    )?;
    if settled == Some(true) {
        Spi::run_with_args(
            "UPDATE dedup.reconciliations SET settled_at = NULL WHERE reconciliation_id = $1",
            &[reconciliation.into()],
        )?;
    }
    Ok(settled == Some(true))
}

/// What rows and entries are counted by: a hash over content and key.
pub fn subject(content: &[u8; 32], key: &[u8]) -> u64 {
    hash_of(&[content, key])
}

/// Records by key, put in order when first asked for.
struct ByKey<'a> {
    records: &'a [RecordEntry<'a>],
    chains: OnceCell<Chains<'a>>,
}

struct Chains<'a> {
    first: HashMap<&'a [u8], u32>,
    /// The next record with the same key.
    next: Vec<Option<u32>>,
}

impl<'a> ByKey<'a> {
    fn new(records: &'a [RecordEntry<'a>]) -> Self {
        Self { records, chains: OnceCell::new() }
    }

    fn records(&self, key: &[u8]) -> impl Iterator<Item = u32> + Clone + '_ {
        let chains = self.chains.get_or_init(|| Chains::of(self.records));
        std::iter::successors(chains.first.get(key).copied(), |&i| chains.next[i as usize])
    }
}

impl<'a> Chains<'a> {
    fn of(records: &'a [RecordEntry<'a>]) -> Self {
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
}
