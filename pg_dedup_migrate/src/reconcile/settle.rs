//! The end of a pass: the hash index against the target's rows.
//!
//! A dropped duplicate rests on a row that holds its content, and the chunks have looked for that in the index only. Here the index is shown to
//! say what is true: the chunks have added up every row of the target, the entries are added up the same way, and where the sums agree each entry
//! has its row and each row its entry. Where they don't, or where chunks see no more of the target than their own keys, the target is scanned and
//! compared entry by entry.
use std::collections::{BTreeMap, HashMap, HashSet};

use pg_dedup_record::digest::Digest;
use pg_dedup_record::record::RecordDigests;
use pg_dedup_record::wire;
use pgrx::Uuid;
use pgrx::prelude::*;

use super::compare::subject;
use super::report::{Findings, Kind};
use super::{guard, unpack_hashes};
use crate::by_key::{Reading, rows_under};
use crate::error::{Error, Result};
use crate::hash::rows::{self, View};
use crate::index::Target;
use crate::keyset::{every_row, hash_of};
use crate::ledger;
use crate::lookup::Place;
use crate::merge::Merge;
use crate::owners::{Owner, Owners};
use crate::passes::{Pass, Passes};
use crate::relation::{Access, Snapshot, Table};
use crate::repair::is_indexed;
use crate::segment;
use crate::sql::{self, required};

/// Compares the index of every target of a run with its rows.
///
/// # Errors
/// 42704 for an unknown pass, XX001 for damaged state.
pub fn settle(reconciliation: i64) -> Result<()> {
    // Locked: findings are entered once.
    let (run, strict, sampled, settled, targets) = Spi::connect_mut(|client| -> Result<_> {
        let rows = client.update(
            "SELECT p.run_id, p.is_strict, p.sample < 1 AS sampled, p.settled_at IS NOT NULL AS settled, \
                 ARRAY(SELECT DISTINCT t.target_id FROM dedup.run_tables AS t WHERE t.run_id = p.run_id ORDER BY 1) AS targets, \
                 EXISTS (SELECT FROM dedup.chunks_to_reconcile($1)) AS unfinished \
             FROM dedup.reconciliations AS p WHERE p.reconciliation_id = $1 AND p.verdict = 'open' FOR NO KEY UPDATE",
            None,
            &[reconciliation.into()],
        )?;
        let row = rows
            .into_iter()
            .next()
            .ok_or_else(|| Error::undefined(format!("there is no open reconciliation {reconciliation}")))?;
        if required(row["unfinished"].value()?)? {
            return Err(Error::state(format!("reconciliation {reconciliation} has chunks left to compare")));
        }
        let run: Uuid = required(row["run_id"].value()?)?;
        let targets: Vec<i32> = required(row["targets"].value()?)?;
        Ok((
            run,
            required::<bool>(row["is_strict"].value()?)?,
            required::<bool>(row["sampled"].value()?)?,
            required::<bool>(row["settled"].value()?)?,
            targets,
        ))
    })?;
    if settled {
        return Ok(());
    }
    let ordinals = ordinals_of(run)?;
    for target_id in targets {
        let target = Target::by_id(target_id)?;
        guard(target_id, target.table)?;
        let snapshot = Snapshot::of_statement();
        let mut settlement = Settlement {
            reconciliation,
            run,
            strict,
            ordinals: &ordinals,
            target,
            compared: Compared::load(reconciliation, target_id)?,
            snapshot: &snapshot,
            owners: Owners::new(run, target_id),
            findings: BTreeMap::new(),
            for_table: HashSet::new(),
        };
        let mut gone: HashSet<[u8; 32]> = settlement.compared.sought.iter().map(|l| l.content.0).collect();
        if sampled {
            settlement.seek(&mut gone)?;
            settlement.sought_in_vain(&gone);
            settlement.enter()?;
            continue;
        }
        let indexed = settlement.walk_index()?;
        // Contents that the index does not have stand nowhere if it has an entry for every row.
        if settlement.compared.rows != Some(indexed) {
            settlement.audit(indexed.0, &mut gone)?;
            settlement.losers_of(&gone)?;
        }
        settlement.sought_in_vain(&gone);
        settlement.enter()?;
    }
    Ok(Spi::run_with_args(
        "UPDATE dedup.reconciliations SET settled_at = pg_catalog.clock_timestamp() WHERE reconciliation_id = $1",
        &[reconciliation.into()],
    )?)
}

/// Everything that a run has written under; what was kept for it when another run was rolled back is that run's writing.
fn ordinals_of(run: Uuid) -> Result<HashSet<u64>> {
    sql::ordinals("SELECT ordinal FROM dedup.ordinals WHERE run_id = $1 AND heir_of IS NULL", &[run.into()])
}

/// Under which rows were entered that stood in a target before any run, or are nobody's any more.
fn nobodys_ordinals(target: i32) -> Result<HashSet<u64>> {
    sql::ordinals(
        "SELECT ordinal FROM dedup.ordinals WHERE target_id = $1 AND run_id IS NULL",
        &[target.into()],
    )
}

/// What the chunks of a pass have found of one target.
struct Compared {
    /// Its rows and their sum, if the chunks have looked at all of them.
    rows: Option<(i64, u64)>,
    /// Of each pair whose chunks see their own keys only: hashes of what they found, sorted.
    seen: BTreeMap<i32, Vec<u64>>,
    /// Some chunk of the pass accounts for rows that no run wrote.
    counts_rows: bool,
    /// A chunk of each pair, for what belongs to none in particular.
    some_chunk: BTreeMap<i32, String>,
    /// Pairs whose source is what it was.
    unchanged: HashMap<i32, bool>,
    /// Dropped records whose content the index does not have.
    sought: Vec<Loser>,
}

/// A record that was dropped as a duplicate.
struct Loser {
    chunk: String,
    content: Digest,
    key: Vec<u8>,
}

impl Compared {
    fn load(reconciliation: i64, target_id: i32) -> Result<Self> {
        Spi::connect(|client| {
            let mut compared = Self {
                rows: Some((0, 0)),
                seen: BTreeMap::new(),
                counts_rows: false,
                some_chunk: BTreeMap::new(),
                unchanged: HashMap::new(),
                sought: Vec::new(),
            };
            let rows = client.select(
                "SELECT k.table_id, k.chunk_id, k.row_count, k.row_sum, k.seen, k.sought, k.source_is_same \
                 FROM dedup.reconciliations AS p JOIN dedup.run_tables AS t USING (run_id) \
                     JOIN dedup.reconciled_chunks AS k ON k.reconciliation_id = p.reconciliation_id AND k.table_id = t.table_id \
                 WHERE p.reconciliation_id = $1 AND t.target_id = $2 ORDER BY k.chunk_id",
                None,
                &[reconciliation.into(), target_id.into()],
            )?;
            for row in rows {
                let table: i32 = required(row["table_id"].value()?)?;
                let chunk: String = required(row["chunk_id"].value()?)?;
                if let Some(sought) = row["sought"].value::<Vec<u8>>()? {
                    for line in wire::ledger(&sought) {
                        let line = line.map_err(|e| Error::corrupted(format!("what a chunk sought: {e}")))?;
                        compared.sought.push(Loser {
                            chunk: chunk.clone(),
                            content: line.digest,
                            key: line.key.to_vec(),
                        });
                    }
                }
                compared.some_chunk.entry(table).or_insert(chunk);
                *compared.unchanged.entry(table).or_insert(true) &=
                    required::<bool>(row["source_is_same"].value()?)?;
                if let Some(seen) = row["seen"].value::<Vec<u8>>()? {
                    compared.seen.entry(table).or_default().extend(unpack_hashes(&seen));
                    compared.rows = None;
                }
                let counted = row["row_count"].value::<i64>()?.zip(row["row_sum"].value::<i64>()?);
                if let Some((count, sum)) = counted {
                    compared.counts_rows = true;
                    if let Some((rows, total)) = &mut compared.rows {
                        *rows += count;
                        *total = total.wrapping_add(sum.cast_unsigned());
                    }
                }
            }
            compared.seen.values_mut().for_each(|seen| seen.sort_unstable());
            Ok(compared)
        })
    }

    /// Did a chunk find it?
    fn has_seen(&self, hash: u64) -> bool {
        self.seen.values().any(|seen| seen.binary_search(&hash).is_ok())
    }
}

/// An entry that must have a row.
struct Expected {
    digest: [u8; 32],
    /// [`subject`] of its content and key.
    subject: u64,
    ordinal: u64,
    /// Rows found.
    found: u32,
    /// Without keys: how often runs wrote it.
    written: u32,
    /// Without keys: how often it stood there before any run.
    before: u32,
    /// Its content stands under another key.
    elsewhere: bool,
    /// Without keys, where a row is more than its content: the beginning of the row's digest, if this run wrote it, and it alone.
    row: Option<[u8; Digest::SHORT_LEN]>,
}

struct Settlement<'a> {
    reconciliation: i64,
    run: Uuid,
    strict: bool,
    /// What the run has written under.
    ordinals: &'a HashSet<u64>,
    target: Target,
    compared: Compared,
    snapshot: &'a Snapshot,
    owners: Owners,
    findings: BTreeMap<String, Findings>,
    /// Chunks that were named for a surviving duplicate which may be any chunk's of their table.
    for_table: HashSet<String>,
}

impl Settlement<'_> {
    fn keyless(&self) -> bool {
        self.target.layout.key.is_empty()
    }

    fn add(&mut self, chunk: String, kind: Kind, key: &[u8], content: Digest) {
        let key = Some(key).filter(|_| !self.keyless());
        self.findings.entry(chunk).or_default().add(kind, key, content);
    }

    /// A chunk that may stand for what no chunk in particular has to do with.
    fn some_chunk(&self, table: Option<i32>) -> String {
        let of_table = table.and_then(|table| self.compared.some_chunk.get(&table));
        of_table.or_else(|| self.compared.some_chunk.values().next()).cloned().unwrap_or_default()
    }

    /// Calls `visit` with every content of the index, all that is said about it, and where it stands now.
    fn for_each_content(&self, visit: impl FnMut(&Digest, &[Place], &[Place]) -> Result<()>) -> Result<()> {
        let blocks = Table::open("segment_block", Access::Read)?;
        let segments = segment::segments_of(self.target.id, self.snapshot)?;
        Merge::new(&blocks, &segments, self.snapshot)?.for_each_content(visit)
    }

    /// Takes out of `gone` what any row of the target holds. One scan, and only if something is sought.
    fn seek(&self, gone: &mut HashSet<[u8; 32]>) -> Result<()> {
        if gone.is_empty() {
            return Ok(());
        }
        let layout = &self.target.layout;
        let query = every_row(layout, self.target.table);
        rows::scan_in(View::Statement, &query, &[], layout, 0, |row| {
            gone.remove(row.digests()?.content.as_bytes());
            Ok(())
        })?;
        Ok(())
    }

    /// Adds up the entries that must have a row; contents that the run wrote a second time are entered.
    fn walk_index(&mut self) -> Result<(i64, u64)> {
        let (mut count, mut sum) = (0, 0u64);
        let mut twice: Vec<(Digest, Vec<Place>)> = Vec::new();
        self.for_each_content(|digest, said, standing| {
            for place in standing {
                count += 1;
                sum = sum.wrapping_add(subject(digest.as_bytes(), &place.key));
            }
            if standing.len() > 1 && standing.iter().any(|p| self.ordinals.contains(&p.ordinal)) {
                // Of each place the first entry counts: a row that is rewritten with its content stood there before.
                let first = |key: &[u8]| {
                    said.iter().filter(|p| p.key == key && !p.tombstone).min_by_key(|p| p.ordinal).cloned()
                };
                let mut places: Vec<Place> = standing.iter().filter_map(|p| first(&p.key)).collect();
                places.sort_by_key(|p| p.ordinal);
                twice.push((*digest, places));
            }
            Ok(())
        })?;
        for (digest, places) in twice {
            for (n, later) in places.iter().enumerate().skip(1) {
                let Owner::Table(_, chunk) = self.owners.of(later.ordinal)? else { continue };
                let keys: Vec<&[u8]> = places[..=n].iter().map(|p| p.key.as_slice()).collect();
                if self.rows_with(&digest, &keys)? > 1 {
                    self.add(chunk, Kind::SurvivingDuplicate, &later.key, digest);
                }
            }
        }
        Ok((count, sum))
    }

    /// How many of these keys have a row with the content.
    fn rows_with(&self, content: &Digest, keys: &[&[u8]]) -> Result<usize> {
        let Target { table, layout, key_types, .. } = &self.target;
        let mut count = 0;
        rows_under(Reading::Statement, *table, layout, key_types, keys, |_, row| {
            count += usize::from(row.digests()?.content == *content);
            Ok(())
        })?;
        Ok(count)
    }

    /// Compares entries with rows, as many at a time as fit `maintenance_work_mem`: those of a range of digests, by one scan of the target.
    /// What a row holds leaves `gone`; what the index has and no row holds is added to it.
    fn audit(&mut self, entries: i64, gone: &mut HashSet<[u8; 32]>) -> Result<()> {
        let has_rest = self.keyless() && !self.target.layout.rest.is_empty() && self.is_of_these_columns()?;
        let nobodys = nobodys_ordinals(self.target.id)?;
        for pass in Passes::of(entries as usize, size_of::<Expected>()).each() {
            let mut expected: Vec<Expected> = Vec::new();
            self.for_each_content(|digest, said, standing| {
                if pass.has(digest.as_bytes()) {
                    let net = |by: &dyn Fn(&&Place) -> bool| {
                        let signs = said.iter().filter(by).map(|p| if p.tombstone { -1 } else { 1 });
                        signs.sum::<i32>().max(0).cast_unsigned()
                    };
                    let before = net(&|p| nobodys.contains(&p.ordinal));
                    let written = net(&|p| !nobodys.contains(&p.ordinal));
                    expected.extend(standing.iter().map(|place| {
                        Expected {
                            digest: *digest.as_bytes(),
                            subject: subject(digest.as_bytes(), &place.key),
                            ordinal: place.ordinal,
                            found: 0,
                            written,
                            before,
                            elsewhere: false,
                            row: (has_rest && written == 1 && self.ordinals.contains(&place.ordinal))
                                .then_some(place.row_digest),
                        }
                    }));
                }
                Ok(())
            })?;
            expected.sort_unstable_by_key(|e| (e.digest, e.subject));
            let twins = self.scan(&mut expected, gone, pass)?;
            self.judge_twins(twins, &expected)?;
            for group in expected.chunk_by(|a, b| a.digest == b.digest) {
                if !group.iter().any(|e| e.found > 0 || e.elsewhere) {
                    gone.insert(group[0].digest);
                }
            }
            if self.keyless() {
                self.judge_contents(&expected)?;
            }
        }
        Ok(())
    }

    /// Whether the run's rows were digested by the columns that the target is read by.
    fn is_of_these_columns(&self) -> Result<bool> {
        required(Spi::get_one_with_args(
            "SELECT pg_catalog.bool_and(t.layout OPERATOR(pg_catalog.=) g.layout) FROM dedup.run_tables AS t JOIN dedup.targets AS g USING (target_id) \
             WHERE t.run_id = $1 AND t.target_id = $2",
            &[self.run.into(), self.target.id.into()],
        )?)
    }

    /// Rows without an entry whose content stands under another key, too: if they are records of the run, the content is there twice. Rows of
    /// nobody's are named already, and so are records that the ledger lists.
    fn judge_twins(&mut self, mut twins: Vec<(Digest, Vec<u8>)>, expected: &[Expected]) -> Result<()> {
        twins.retain(|(content, _)| {
            let from = expected.partition_point(|e| e.digest < content.0);
            expected[from..].iter().take_while(|e| e.digest == content.0).any(|e| e.found > 0)
        });
        // Of a table that was not indexed a row without an entry may be anybody's.
        if twins.is_empty() || !is_indexed(self.target.id)? {
            return Ok(());
        }
        let mut foreign = 0;
        let named: HashSet<Vec<u8>> = Spi::connect(|client| -> Result<_> {
            client
                .select(
                    "SELECT packed_key, kind = 'foreign' AS is_foreign FROM dedup.divergences \
                     WHERE reconciliation_id = $1 AND target_id = $2 AND packed_key IS NOT NULL",
                    None,
                    &[self.reconciliation.into(), self.target.id.into()],
                )?
                .map(|row| {
                    foreign += i64::from(required::<bool>(row["is_foreign"].value()?)?);
                    required(row["packed_key"].value()?)
                })
                .collect()
        })?;
        let counted: Option<i64> = Spi::get_one_with_args(
            "SELECT pg_catalog.sum(k.foreign_count)::pg_catalog.int8 FROM dedup.reconciled_chunks AS k JOIN dedup.run_tables AS t ON t.run_id = $2 AND t.table_id = k.table_id \
             WHERE k.reconciliation_id = $1 AND t.target_id = $3",
            &[self.reconciliation.into(), self.run.into(), self.target.id.into()],
        )?;
        // Of very many rows of nobody's not all are listed: then it can't be told which are.
        if counted.unwrap_or_default() != foreign {
            return Ok(());
        }
        twins.retain(|(_, key)| !named.contains(key));
        let chunks = self.writers_of(twins.iter().map(|(_, key)| key.as_slice()).collect())?;
        for (content, key) in twins {
            let chunk = chunks.get(&key).cloned().unwrap_or_else(|| {
                let chunk = self.some_chunk(None);
                self.for_table.insert(chunk.clone());
                chunk
            });
            self.add(chunk, Kind::SurvivingDuplicate, &key, content);
        }
        Ok(())
    }

    /// The chunks of the run that wrote something under these keys, by what the index has of them.
    fn writers_of(&mut self, keys: HashSet<&[u8]>) -> Result<HashMap<Vec<u8>, String>> {
        let mut ordinals: HashMap<Vec<u8>, u64> = HashMap::new();
        if !keys.is_empty() {
            self.for_each_content(|_, said, _| {
                for place in said {
                    if keys.contains(place.key.as_slice()) && self.ordinals.contains(&place.ordinal) {
                        ordinals.insert(place.key.clone(), place.ordinal);
                    }
                }
                Ok(())
            })?;
        }
        let mut chunks = HashMap::new();
        for (key, ordinal) in ordinals {
            if let Owner::Table(_, chunk) = self.owners.of(ordinal)? {
                chunks.insert(key, chunk);
            }
        }
        Ok(chunks)
    }

    /// Looks for the entries' rows; returns rows that have no entry, and whose content has one.
    fn scan(
        &mut self,
        expected: &mut [Expected],
        gone: &mut HashSet<[u8; 32]>,
        pass: Pass,
    ) -> Result<Vec<(Digest, Vec<u8>)>> {
        let query = every_row(&self.target.layout, self.target.table);
        let layout = self.target.layout.clone();
        let (keyless, tells_foreign) = (self.keyless(), !self.compared.counts_rows);
        let (mut key, mut twins) = (Vec::new(), Vec::new());
        rows::scan_in(View::Statement, &query, &[], &layout, 0, |row| {
            let RecordDigests { content, row: row_digest } = row.digests()?;
            if !pass.has(content.as_bytes()) {
                return Ok(());
            }
            gone.remove(content.as_bytes());
            key.clear();
            if !keyless {
                row.write_key(&mut key)?;
            }
            let wanted = (*content.as_bytes(), subject(content.as_bytes(), &key));
            let at = expected.binary_search_by_key(&wanted, |e| (e.digest, e.subject));
            // Without keys a row that differs in any column is another row.
            let is_it = |e: &&mut Expected| e.row.is_none_or(|row| row == row_digest.short());
            let entry = at.ok().map(|at| &mut expected[at]).filter(is_it);
            match entry {
                // Without keys: one row more than there should be. If the index knows of it, runs wrote it.
                Some(entry) if keyless && entry.found > 0 => {
                    entry.found += 1;
                    if entry.found <= entry.before {
                        return Ok(());
                    }
                    let known = entry.before + entry.written;
                    let kind = if entry.found <= known { Kind::SurvivingDuplicate } else { Kind::Foreign };
                    self.add(self.some_chunk(None), kind, &[], content);
                }
                Some(entry) => {
                    entry.found = 1;
                    if !keyless {
                        let ordinal = entry.ordinal;
                        self.judge_row(ordinal, &key, content)?;
                    }
                }
                None => {
                    let from = expected.partition_point(|e| e.digest < *content.as_bytes());
                    let same = expected[from..].iter_mut().take_while(|e| e.digest == *content.as_bytes());
                    let others = same.map(|e| e.elsewhere = true).count();
                    if tells_foreign && (keyless || !self.compared.has_seen(hash_of(&[&key]))) {
                        self.add(self.some_chunk(None), Kind::Foreign, &key, content);
                    } else if others > 0 && !keyless {
                        twins.push((content, key.clone()));
                    }
                }
            }
            Ok(())
        })?;
        Ok(twins)
    }

    /// A row with an entry: if no record of its source has its key, it is too many.
    fn judge_row(&mut self, ordinal: u64, key: &[u8], content: Digest) -> Result<()> {
        if self.compared.seen.is_empty() || self.compared.has_seen(hash_of(&[key])) {
            return Ok(());
        }
        let (table, chunk) = match self.owners.of(ordinal)? {
            // Pairs that account for a range have judged their rows.
            Owner::Table(table, _) | Owner::SameSource(table) if !self.compared.seen.contains_key(&table) => {
                return Ok(());
            }
            Owner::Table(table, chunk) => (table, chunk),
            Owner::SameSource(table) => (table, self.some_chunk(Some(table))),
            Owner::Nobody if self.compared.counts_rows => return Ok(()),
            Owner::Nobody => {
                self.add(self.some_chunk(None), Kind::Foreign, key, content);
                return Ok(());
            }
            Owner::Other => return Ok(()),
        };
        let kind = if self.compared.unchanged[&table] { Kind::Extra } else { Kind::SourceChanged };
        self.add(chunk, kind, key, content);
        Ok(())
    }

    /// Without keys: entries that have no row, and rows of the run that the source does not have.
    fn judge_contents(&mut self, expected: &[Expected]) -> Result<()> {
        for entry in expected {
            let content = Digest(entry.digest);
            let seen = self.compared.has_seen(hash_of(&[&entry.digest]));
            let (table, chunk) = match self.owners.of(entry.ordinal)? {
                Owner::Table(table, chunk) => (Some(table), chunk),
                Owner::SameSource(table) => (Some(table), self.some_chunk(Some(table))),
                _ => (None, self.some_chunk(None)),
            };
            if entry.found == 0 && seen {
                self.add(chunk, Kind::Missing, &[], content);
            } else if let (true, false, Some(table)) = (entry.found > 0, seen, table) {
                let kind = if self.compared.unchanged.get(&table) == Some(&true) {
                    Kind::Extra
                } else {
                    Kind::SourceChanged
                };
                self.add(chunk, kind, &[], content);
            }
        }
        Ok(())
    }

    /// Dropped records whose content neither the index nor a row has.
    fn sought_in_vain(&mut self, gone: &HashSet<[u8; 32]>) {
        for loser in std::mem::take(&mut self.compared.sought) {
            if gone.contains(loser.content.as_bytes()) {
                self.add(loser.chunk, Kind::Missing, &loser.key, loser.content);
            }
        }
    }

    /// Records that this run dropped for contents which are gone, of those that the index has. The others are sought.
    fn losers_of(&mut self, gone: &HashSet<[u8; 32]>) -> Result<()> {
        if gone.is_empty() || self.keyless() {
            return Ok(());
        }
        let dropped = self.dropped()?;
        let sought: HashSet<[u8; 32]> = self.compared.sought.iter().map(|l| l.content.0).collect();
        let mut lost: Vec<(String, Vec<u8>, Digest)> = Vec::new();
        Spi::connect(|client| -> Result<()> {
            let mut cursor = client.open_cursor(
                "SELECT o.chunk_id, l.entries FROM dedup.ordinals AS o JOIN dedup.ledger_block AS l USING (ordinal) \
                 WHERE o.run_id = $1 AND l.target_id = $2",
                &[self.run.into(), self.target.id.into()],
            );
            loop {
                let rows = cursor.fetch(64)?;
                if rows.is_empty() {
                    return Ok(());
                }
                for row in rows {
                    let bytes: Vec<u8> = required(row["entries"].value()?)?;
                    let block = ledger::parse(&bytes)?;
                    let chunk: String = required(row["chunk_id"].value()?)?;
                    let Some(counted) = dropped.get(&chunk) else { continue };
                    for line in (0..block.len()).map(|i| block.entry(i)) {
                        let digest = line.digest.as_bytes();
                        if gone.contains(digest)
                            && !sought.contains(digest)
                            && counted.contains(&subject(digest, line.key))
                        {
                            lost.push((chunk.clone(), line.key.to_vec(), line.digest));
                        }
                    }
                }
            }
        })?;
        for (chunk, key, content) in lost {
            self.add(chunk, Kind::Missing, &key, content);
        }
        Ok(())
    }

    /// What the chunks have counted as duplicates: hashes of content and key. The ledger lists records that the source no longer has, too.
    fn dropped(&self) -> Result<HashMap<String, HashSet<u64>>> {
        Spi::connect(|client| {
            client
                .select(
                    "SELECT k.chunk_id, k.dropped FROM dedup.reconciled_chunks AS k JOIN dedup.run_tables AS t ON t.run_id = $2 AND t.table_id = k.table_id \
                     WHERE k.reconciliation_id = $1 AND t.target_id = $3 AND k.dropped IS NOT NULL",
                    None,
                    &[self.reconciliation.into(), self.run.into(), self.target.id.into()],
                )?
                .map(|row| {
                    let packed: Vec<u8> = required(row["dropped"].value()?)?;
                    Ok((required(row["chunk_id"].value()?)?, unpack_hashes(&packed).collect()))
                })
                .collect()
        })
    }

    /// Adds the findings to what the chunks have found. Who was taken for a duplicate, or for present, and is missing is that no more.
    fn enter(&self) -> Result<()> {
        let (reconciliation, keyless) = (self.reconciliation, self.keyless());
        for (chunk, findings) in &self.findings {
            let counts: Vec<i64> = Kind::ALL.iter().map(|&kind| findings.count(kind)).collect();
            Spi::run_with_args(
                "UPDATE dedup.reconciled_chunks AS k \
                 SET missing_count = k.missing_count OPERATOR(pg_catalog.+) $3[1], changed_count = k.changed_count OPERATOR(pg_catalog.+) $3[2], \
                     extra_count = k.extra_count OPERATOR(pg_catalog.+) $3[3], \
                     surviving_duplicate_count = k.surviving_duplicate_count OPERATOR(pg_catalog.+) $3[4], \
                     foreign_count = k.foreign_count OPERATOR(pg_catalog.+) $3[5], source_changed_count = k.source_changed_count OPERATOR(pg_catalog.+) $3[6], \
                     duplicate_count = k.duplicate_count OPERATOR(pg_catalog.-) CASE WHEN $4 THEN 0 ELSE $3[1] END, \
                     present_count = k.present_count OPERATOR(pg_catalog.-) CASE WHEN $4 THEN $3[1] ELSE 0 END, \
                     stands_for_table = k.stands_for_table OR $5 \
                 WHERE k.reconciliation_id = $1 AND k.chunk_id = $2",
                &[
                    reconciliation.into(),
                    chunk.as_str().into(),
                    counts.into(),
                    keyless.into(),
                    self.for_table.contains(chunk).into(),
                ],
            )?;
            findings.enter(reconciliation, self.run, chunk, self.target.id, self.strict, |key| {
                self.target.key_types.query_string(key)
            })?;
        }
        Ok(())
    }
}
