//! Repair: a chunk of a halted run is done again, and what is there is not believed but looked at.
//!
//! A chunk that is done again leaves rows that are equal to its records alone and writes the others. What it must not believe in a target that
//! somebody has tampered with is the index: an entry whose row is gone, or holds something else, would make its own record a duplicate of
//! nothing. So every place that would do that is read; where the content does not stand the entry is *stale*: it is retracted, and whoever has the
//! content writes it. The other way round a row may stand that the run had dropped as a duplicate of another: it is folded again.
use std::collections::{HashMap, HashSet};

use pg_dedup_record::digest::Digest;
use pg_dedup_record::wire::ManifestEntry;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::by_key::{Reading, rows_under};
use crate::by_place;
use crate::chunk::{OpenChunk, required};
use crate::error::{Error, Result};
use crate::hash::rows;
use crate::index::Target;
use crate::indexing::lock_exclusively;
use crate::keyset::{column_list, hash_of, qualified_name};
use crate::lookup::{self, Digests, Place, Subject};
use crate::matching::{Match, rested_on};
use crate::merge::Merge;
use crate::passes::Passes;
use crate::references;
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, next_number};
use crate::upsert;

/// How a chunk is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Records that are missing or changed are written, duplicates folded.
    Rewrite,
    /// Rows that the run wrote and the source does not have are deleted, too.
    DeleteExtra,
}

impl Repair {
    /// As `dedup.checkpoints` has it.
    ///
    /// # Errors
    /// XX001 for anything else.
    pub fn named(name: Option<String>) -> Result<Option<Self>> {
        match name.as_deref() {
            None => Ok(None),
            Some("rewrite") => Ok(Some(Repair::Rewrite)),
            Some("delete_extra") => Ok(Some(Repair::DeleteExtra)),
            Some(other) => Err(Error::corrupted(format!("unknown way to repair a chunk: {other}"))),
        }
    }
}

/// Finds the entries of these digests that no row bears out; they count as leaving, and so do rows that are to be deleted.
///
/// # Errors
/// XX001 for a damaged block.
pub fn unbelieve(chunk: &mut OpenChunk, digests: Digests<'_>) -> Result<()> {
    let Some(repair) = chunk.repair else { return Ok(()) };
    let leaving: HashSet<&Subject> = chunk.leaving.iter().collect();
    let mut places = entries(chunk, digests)?;
    places.retain(|(place, _)| !leaving.contains(place));
    let mut stale = if chunk.keyless() { without_rows(chunk, places)? } else { disproved(chunk, places)? };
    stale.sort_unstable();
    let extra =
        if repair == Repair::DeleteExtra && !chunk.keyless() { extra_rows(chunk)? } else { Vec::new() };
    let of_stale = stale.iter().map(|(place, _)| place);
    let mut all: Vec<Subject> = chunk.leaving.iter().chain(of_stale).chain(&extra).cloned().collect();
    all.sort_unstable();
    all.dedup();
    chunk.leaving = all.into();
    chunk.stale = stale.into();
    chunk.extra = extra.into_iter().map(|(_, key)| key).collect::<Vec<_>>().into();
    Ok(())
}

/// Where the index has these digests, and under which ordinals.
fn entries(chunk: &OpenChunk, digests: Digests<'_>) -> Result<Vec<(Subject, u64)>> {
    let wanted: Vec<u32> = (0..digests.len() as u32).collect();
    let mut entries = Vec::new();
    for (i, found) in lookup::places(chunk.target_id, digests, &wanted, &Snapshot::latest())? {
        let digest = digests[i as usize];
        entries.extend(found.into_iter().map(|place| ((digest, place.key), place.ordinal)));
    }
    Ok(entries)
}

/// Of the entries that were stale when the chunk's digests were claimed those that still are: another chunk may have written the row, and
/// committed before the claim was ours.
///
/// # Errors
/// XX001 for a damaged block.
pub fn still_stale(chunk: &OpenChunk) -> Result<Vec<Subject>> {
    let mut digests: Vec<[u8; 32]> = chunk.stale.iter().map(|((digest, _), _)| *digest).collect();
    digests.dedup();
    let now: HashMap<Subject, u64> = entries(chunk, &digests)?.into_iter().collect();
    let is_same = |(place, ordinal): &&(Subject, u64)| now.get(place).is_some_and(|now| now <= ordinal);
    Ok(chunk.stale.iter().filter(is_same).map(|(place, _)| place.clone()).collect())
}

/// Those of the entries under whose key the content does not stand, or stands in a row that is about to be replaced, under another spelling.
fn disproved(chunk: &OpenChunk, entries: Vec<(Subject, u64)>) -> Result<Vec<(Subject, u64)>> {
    let keys: Vec<&[u8]> = entries.iter().map(|((_, key), _)| key.as_slice()).collect();
    let mut holds = vec![false; entries.len()];
    let mut stored: Subject = ([0; 32], Vec::new());
    rows_under(Reading::Latest, chunk.target, &chunk.layout, &chunk.key_types, &keys, |n, row| {
        stored.0 = row.digests()?.content.0;
        stored.1.clear();
        row.write_key(&mut stored.1)?;
        holds[n] |= stored.0 == entries[n].0.0 && chunk.leaving.binary_search(&stored).is_err();
        Ok(())
    })?;
    Ok(entries.into_iter().zip(holds).filter(|(_, holds)| !holds).map(|(entry, _)| entry).collect())
}

/// Without keys a row can't be looked for: those contents are stale that the reconciliation found no row of, as long as nobody wrote them since.
fn without_rows(chunk: &OpenChunk, entries: Vec<(Subject, u64)>) -> Result<Vec<(Subject, u64)>> {
    let missing: HashSet<[u8; 32]> =
        listed(chunk, "missing", false)?.into_iter().map(|(content, _)| content.0).collect();
    let last: Option<i64> = Spi::get_one_with_args(
        "SELECT pg_catalog.max(last_ordinal) FROM dedup.reconciliations WHERE run_id = $1 AND verdict = 'mismatch'",
        &[chunk.run.into()],
    )?;
    let last = last.unwrap_or_default().cast_unsigned();
    Ok(entries
        .into_iter()
        .filter(|((content, _), ordinal)| *ordinal <= last && missing.contains(content))
        .collect())
}

/// What the reconciliation found of a kind: content and key, in this chunk or the whole target.
fn listed(chunk: &OpenChunk, kind: &str, in_chunk: bool) -> Result<Vec<(Digest, Option<Vec<u8>>)>> {
    Spi::connect(|client| {
        client
            .select(
                "SELECT d.content_hash, d.packed_key FROM dedup.divergences AS d JOIN dedup.reconciliations AS p USING (reconciliation_id) \
                 WHERE p.holds = $1 AND d.target_id = $2 AND d.kind = $3 AND d.state = 'open' AND ($4::pg_catalog.text IS NULL OR d.chunk_id = $4) \
                 ORDER BY divergence_id",
                None,
                &[
                    chunk.run.into(),
                    chunk.target_id.into(),
                    kind.into(),
                    in_chunk.then(|| chunk.chunk_id.clone()).into(),
                ],
            )?
            .map(|row| {
                let content: Vec<u8> = required(row["content_hash"].value()?)?;
                let content = Digest::from_slice(&content)
                    .ok_or_else(|| Error::corrupted("a divergence's content hash is not 32 bytes"))?;
                Ok((content, row["packed_key"].value()?))
            })
            .collect()
    })
}

/// Rows of the chunk that the source does not have, as long as they are what was found; locked. A record may have come back since.
fn extra_rows(chunk: &OpenChunk) -> Result<Vec<Subject>> {
    let mut listed: Vec<(Digest, Vec<u8>)> = listed(chunk, "extra", true)?
        .into_iter()
        .filter_map(|(content, key)| key.map(|key| (content, key)))
        .filter(|(_, key)| !chunk.own_rows.contains(key))
        .collect();
    listed.sort_unstable();
    listed.dedup();
    refuse_rested_on(chunk, &listed)?;
    still_there(chunk, listed)
}

/// Records of other chunks, of whatever run, that were found to be these very rows would be lost with them.
fn refuse_rested_on(chunk: &OpenChunk, rows: &[(Digest, Vec<u8>)]) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let sought: HashSet<[u8; 16]> = rows.iter().map(|(content, key)| rested_on(content, key)).collect();
    Spi::connect(|client| {
        let mut cursor = client.open_cursor(
            "SELECT o.run_id, u.rows FROM dedup.unchanged_rows AS u JOIN dedup.ordinals AS o USING (ordinal) JOIN dedup.runs AS r ON r.run_id = o.run_id \
             WHERE u.target_id = $1 AND r.status <> 'rolled_back' AND NOT (o.run_id = $2 AND o.chunk_id = $3) \
                 AND NOT EXISTS (SELECT FROM dedup.run_tables AS a JOIN dedup.checkpoints AS c ON c.run_id = o.run_id AND c.chunk_id = o.chunk_id AND c.table_id = a.table_id, \
                     dedup.run_tables AS b JOIN dedup.checkpoints AS d ON d.run_id = $2 AND d.chunk_id = $3 AND d.table_id = b.table_id \
                     WHERE a.run_id = o.run_id AND b.run_id = $2 AND a.source = b.source)",
            &[chunk.target_id.into(), chunk.run.into(), chunk.chunk_id.as_str().into()],
        );
        loop {
            let found = cursor.fetch(16)?;
            if found.is_empty() {
                return Ok(());
            }
            for row in found {
                let packed: Vec<u8> = required(row["rows"].value()?)?;
                if packed.as_chunks::<16>().0.iter().any(|row| sought.contains(row)) {
                    let run: pgrx::Uuid = required(row["run_id"].value()?)?;
                    return Err(Error::state(format!(
                        "a record of run {run} is one of the rows to be deleted"
                    ))
                    .detail("It was found unchanged there.")
                    .hint("Repair without deleting extra rows, or roll that run back."));
                }
            }
        }
    })
}

/// Those of these rows that hold this content; locked.
fn still_there(chunk: &OpenChunk, listed: Vec<(Digest, Vec<u8>)>) -> Result<Vec<Subject>> {
    let keys: Vec<&[u8]> = listed.iter().map(|(_, key)| key.as_slice()).collect();
    let mut extra = Vec::new();
    rows_under(Reading::Locked, chunk.target, &chunk.layout, &chunk.key_types, &keys, |n, row| {
        let (content, key) = &listed[n];
        if row.digests()?.content == *content {
            extra.push((content.0, key.clone()));
        }
        Ok(())
    })?;
    Ok(extra)
}

/// Rows that are equal to their records and are to be claimed all the same: those whose content an older row holds, too, and, where all that stood in
/// the table before was indexed, those that the index does not know. They are folded, or get their entry.
///
/// # Errors
/// XX001 for a damaged block.
pub fn twins<'k>(
    chunk: &OpenChunk,
    found: &[([u8; 32], u32)],
    matches: &[Match],
    key_of: &dyn Fn(u32) -> &'k [u8],
) -> Result<HashSet<u32>> {
    if chunk.repair.is_none() {
        return Ok(HashSet::new());
    }
    let mut digests: Vec<[u8; 32]> = found.iter().map(|(digest, _)| *digest).collect();
    digests.dedup();
    let wanted: Vec<u32> = (0..digests.len() as u32).collect();
    let places: HashMap<u32, Vec<lookup::Place>> =
        lookup::places(chunk.target_id, &digests, &wanted, &Snapshot::latest())?.into_iter().collect();
    let indexed = is_indexed(chunk.target_id)?;
    // Each row with every older place of its content.
    let mut suspects: Vec<(u32, Subject)> = Vec::new();
    let mut twins = HashSet::new();
    for &(digest, n) in found.iter().filter(|(_, n)| matches[*n as usize] == Match::Unchanged) {
        let Ok(at) = digests.binary_search(&digest) else { continue };
        let places = places.get(&(at as u32)).map(Vec::as_slice).unwrap_or_default();
        let own = places.iter().find(|p| p.key == key_of(n)).map(|p| p.ordinal);
        if own.is_none() {
            twins.extend(indexed.then_some(n));
            continue;
        }
        let older = places.iter().filter(|p| p.key != key_of(n) && own.is_none_or(|own| p.ordinal < own));
        suspects.extend(older.map(|p| (n, (digest, p.key.clone()))));
    }
    let keys: Vec<&[u8]> = suspects.iter().map(|(_, (_, key))| key.as_slice()).collect();
    rows_under(Reading::Latest, chunk.target, &chunk.layout, &chunk.key_types, &keys, |at, row| {
        let (n, (digest, _)) = &suspects[at];
        if row.digests()?.content.as_bytes() == digest {
            twins.insert(*n);
        }
        Ok(())
    })?;
    Ok(twins)
}

/// Was all that stood in a target before indexed? Otherwise a row without an entry may be anybody's.
///
/// # Errors
/// SPI's own.
pub fn is_indexed(target: i32) -> Result<bool> {
    required(Spi::get_one_with_args(
        "SELECT indexed_at IS NOT NULL FROM dedup.targets WHERE target_id = $1",
        &[target.into()],
    )?)
}

/// Deletes rows that are too many, before images kept.
///
/// # Errors
/// 23503 when a foreign key points at one of them.
pub fn remove_extra(chunk: &mut OpenChunk) -> Result<()> {
    if !chunk.extra.is_empty() {
        let extra = chunk.extra.clone();
        let keys: Vec<&[u8]> = extra.iter().map(Vec::as_slice).collect();
        // Rows that point at one may be deleted by another chunk.
        references::refuse_pointed_at(chunk.target, &chunk.key_types, &keys).map_err(|error| {
            Error::new(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, error.to_string())
                .hint("Repair the tables that reference it as well, or delete those rows.")
        })?;
        upsert::delete(chunk, &keys)?;
    }
    if chunk.repair == Some(Repair::DeleteExtra) && chunk.keyless() {
        remove_by_content(chunk)
    } else {
        Ok(())
    }
}

/// In a table without a key: one row of each content that was found too many.
fn remove_by_content(chunk: &mut OpenChunk) -> Result<()> {
    let extra: Vec<[u8; 32]> =
        listed(chunk, "extra", true)?.into_iter().map(|(content, _)| content.0).collect();
    if extra.is_empty() {
        return Ok(());
    }
    let mut left: HashSet<[u8; 32]> = extra.iter().copied().collect();
    let mut images: Vec<(Digest, Vec<u8>)> = Vec::new();
    let places = by_place::find(chunk.target, &chunk.layout, |row| {
        let content = row.digests()?.content;
        if !left.remove(content.as_bytes()) {
            return Ok(false);
        }
        let mut image = Vec::new();
        row.write_tuple(&mut image)?;
        images.push((content, image));
        Ok(true)
    })?;
    upsert::keep_keyless_images(chunk, &images)?;
    by_place::delete(chunk.target, &places)?;
    let entries = entries(chunk, &sorted(extra))?;
    let mut stale: Vec<(Subject, u64)> = chunk.stale.iter().cloned().chain(entries).collect();
    stale.sort_unstable();
    stale.dedup();
    chunk.stale = stale.into();
    Ok(())
}

fn sorted(mut digests: Vec<[u8; 32]>) -> Vec<[u8; 32]> {
    digests.sort_unstable();
    digests.dedup();
    digests
}

/// Rows that other chunks of the run found unchanged: their keys are taken, which is remembered elsewhere only as long as a run is open.
///
/// # Errors
/// SPI's own.
pub fn rows_of_other_chunks(chunk: &OpenChunk) -> Result<HashSet<[u8; 16]>> {
    if chunk.repair.is_none() {
        return Ok(HashSet::new());
    }
    let mut rows = HashSet::new();
    Spi::connect(|client| -> Result<()> {
        let packed = client.select(
            "SELECT u.rows FROM dedup.unchanged_rows AS u JOIN dedup.ordinals AS o USING (ordinal) \
             WHERE o.run_id = $1 AND u.target_id = $2 AND o.chunk_id <> $3",
            None,
            &[chunk.run.into(), chunk.target_id.into(), chunk.chunk_id.as_str().into()],
        )?;
        for row in packed {
            let packed: Vec<u8> = required(row["rows"].value()?)?;
            rows.extend(packed.as_chunks::<16>().0);
        }
        Ok(())
    })?;
    Ok(rows)
}

/// A record that stood in the target and is refused now would be set aside, and the run found right without it.
///
/// # Errors
/// 55000 when the chunk has more records in quarantine than before.
pub fn refuse_more_quarantine(chunk: &OpenChunk, quarantined: i64) -> Result<()> {
    let more = quarantined - chunk.quarantined_before;
    if chunk.repair.is_none() || more <= 0 {
        return Ok(());
    }
    let reason = Spi::get_one_with_args::<String>(
        "SELECT pg_catalog.string_agg(DISTINCT q.reason OPERATOR(pg_catalog.||) ': ' OPERATOR(pg_catalog.||) dedup.without_values(q.sqlstate, q.message), '; ') \
         FROM dedup.quarantine AS q WHERE q.run_id = $1 AND q.chunk_id = $2",
        &[chunk.run.into(), chunk.chunk_id.as_str().into()],
    )?;
    Err(Error::state(format!(
        "{more} records that are to be repaired are refused by {}",
        chunk.target_name()
    ))
    .detail(reason.unwrap_or_default())
    .hint("Mend what the target refuses them for, then repair the run again."))
}

/// Takes stale entries out of the index, under an ordinal that is nobody's: that there was no row stays true if the run is rolled back.
///
/// # Errors
/// XX001 for a damaged block, 42501 without the privileges of a worker.
pub fn retract(chunk: &OpenChunk, manifest: &[ManifestEntry<'_>], stale: Vec<Subject>) -> Result<()> {
    // What the chunk wrote there stands.
    let (rewritten, gone): (Vec<Subject>, Vec<Subject>) = stale.into_iter().partition(|(digest, key)| {
        let from = manifest.partition_point(|e| e.digest.as_bytes() < digest);
        manifest[from..].iter().take_while(|e| e.digest.as_bytes() == digest).any(|e| e.key == key.as_slice())
    });
    bury(chunk.target_id, gone)?;
    if !chunk.keyless() {
        return Ok(());
    }
    // Without keys it counts how often a content was written: the row that is gone is taken off under its own ordinal.
    let ordinals: HashMap<&Subject, u64> =
        chunk.stale.iter().map(|(place, ordinal)| (place, *ordinal)).collect();
    let taken_off =
        |place: Subject| ordinals.get(&place).map(|&ordinal| (Digest(place.0), ordinal, place.1.clone()));
    segment::write_tombstones(chunk.target_id, rewritten.into_iter().filter_map(taken_off).collect())
}

/// Says of places, under an ordinal that is nobody's, that their content does not stand there.
fn bury(target: i32, places: Vec<Subject>) -> Result<()> {
    if places.is_empty() {
        return Ok(());
    }
    let ordinal = next_number("ordinal_seq")?;
    Spi::run_with_args(
        "INSERT INTO dedup.ordinals (ordinal, target_id) VALUES ($1, $2)",
        &[ordinal.into(), target.into()],
    )?;
    let ordinal = ordinal.cast_unsigned();
    segment::write_tombstones(
        target,
        places.into_iter().map(|(digest, key)| (Digest(digest), ordinal, key)).collect(),
    )
}

/// `dedup.retract_stale`: takes every entry that no row bears out out of the index of a run's targets; returns how many.
///
/// # Errors
/// XX001 for a damaged block, 55000 where a target's files were replaced.
#[pg_extern(volatile, parallel_unsafe, strict)]
pub fn retract_stale(run: pgrx::Uuid) -> Result<i64, ErrorReport> {
    let targets: Vec<i32> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT DISTINCT target_id FROM dedup.run_tables WHERE run_id = $1 ORDER BY 1",
                None,
                &[run.into()],
            )?
            .map(|row| required(row["target_id"].value()?))
            .collect()
    })?;
    let mut retracted = 0;
    for target in targets {
        // Exclusively: nobody may be told that a content is there while its entry is about to be retracted.
        lock_exclusively(target)?;
        Spi::run_with_args("SELECT dedup.refuse_replaced($1)", &[target.into()]).map_err(Error::from)?;
        retracted += without_row(&Target::by_id(target)?)?;
    }
    Ok(retracted)
}

/// Compares entries with rows, as many at a time as fit `maintenance_work_mem`: those of a range of digests, by one scan of the target.
fn without_row(target: &Target) -> Result<i64> {
    let snapshot = Snapshot::latest();
    let blocks = Table::open("segment_block", Access::Read)?;
    let segments = segment::segments_of(target.id, &snapshot)?;
    let most: usize = segments.iter().map(|s| s.blocks as usize * segment::ENTRIES_PER_BLOCK).sum();
    let query =
        format!("SELECT {} FROM {} AS t", column_list(&target.layout, "t"), qualified_name(target.table));
    let mut retracted = 0;
    for pass in Passes::of(most, size_of::<([u8; 32], u64)>() + 1).each() {
        let each = |visit: &mut dyn FnMut(&Digest, &Place) -> Result<()>| {
            Merge::new(&blocks, &segments, &snapshot)?.for_each_content(|digest, _, standing| {
                if !pass.has(digest.as_bytes()) {
                    return Ok(());
                }
                standing.iter().try_for_each(|place| visit(digest, place))
            })
        };
        let mut expected: Vec<([u8; 32], u64)> = Vec::new();
        each(&mut |digest, place| {
            expected.push((digest.0, hash_of(&[&place.key])));
            Ok(())
        })?;
        expected.sort_unstable();
        let mut found = vec![false; expected.len()];
        let mut key = Vec::new();
        rows::scan(&query, &[], &target.layout, 0, |row| {
            key.clear();
            row.write_key(&mut key)?;
            let subject = (row.digests()?.content.0, hash_of(&[&key]));
            if let Ok(at) = expected.binary_search(&subject) {
                found[at] = true;
            }
            Ok(())
        })?;
        let mut gone: Vec<Subject> = Vec::new();
        each(&mut |digest, place| {
            let at = expected.binary_search(&(digest.0, hash_of(&[&place.key])));
            if at.is_ok_and(|at| !found[at]) {
                gone.push((digest.0, place.key.clone()));
            }
            Ok(())
        })?;
        retracted += gone.len() as i64;
        bury(target.id, gone)?;
    }
    Ok(retracted)
}
