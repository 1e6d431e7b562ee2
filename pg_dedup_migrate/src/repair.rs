//! Repair: a chunk of a halted run is done again, and what is there is not believed but looked at.
//!
//! A chunk that is done again leaves rows that are equal to its records alone and writes the others. What it must not believe in a target that
//! somebody has tampered with is the index: an entry whose row is gone, or holds something else, would make its own record a duplicate of
//! nothing. So every place that would do that is read; where the content does not stand the entry is *stale*: it is retracted, and whoever has the
//! content writes it. The other way round a row may stand that the run had dropped as a duplicate of another: it is folded again.
use std::collections::{HashMap, HashSet};

use pg_dedup_record::digest::Digest;
use pgrx::prelude::*;

use crate::by_key::{Reading, rows_under};
use crate::by_place;
use crate::chunk::{OpenChunk, required};
use crate::error::{Error, Result};
use crate::lookup::{self, Digests, Subject};
use crate::matching::Match;
use crate::relation::Snapshot;
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
    let mut extra = if chunk.keyless() { Vec::new() } else { twins_elsewhere(chunk)? };
    if repair == Repair::DeleteExtra && !chunk.keyless() {
        extra.extend(extra_rows(chunk)?);
    }
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

/// Those of the entries under whose key the content does not stand.
fn disproved(chunk: &OpenChunk, entries: Vec<(Subject, u64)>) -> Result<Vec<(Subject, u64)>> {
    let keys: Vec<&[u8]> = entries.iter().map(|((_, key), _)| key.as_slice()).collect();
    let mut holds = vec![false; entries.len()];
    rows_under(Reading::Latest, chunk.target, &chunk.layout, &chunk.key_types, &keys, |n, row| {
        holds[n] |= row.digests()?.content.as_bytes() == &entries[n].0.0;
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
                "SELECT content_hash, packed_key FROM dedup.divergences \
                 WHERE run_id = $1 AND target_id = $2 AND kind = $3 AND state = 'open' AND ($4::pg_catalog.text IS NULL OR chunk_id = $4) \
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

/// Rows of the chunk that the source does not have, as long as they are what was found; locked.
fn extra_rows(chunk: &OpenChunk) -> Result<Vec<Subject>> {
    let with_key = |(content, key): (Digest, Option<Vec<u8>>)| key.map(|key| (content, key));
    still_there(chunk, listed(chunk, "extra", true)?.into_iter().filter_map(with_key).collect())
}

/// Rows whose content another row holds, too, and that are no records of this chunk: the comparison of index and rows in the end names some chunk
/// for them. Their own chunk then finds its record dropped.
fn twins_elsewhere(chunk: &OpenChunk) -> Result<Vec<Subject>> {
    let mut suspects: Vec<(Digest, Vec<u8>)> = listed(chunk, "surviving_duplicate", true)?
        .into_iter()
        .filter_map(|(content, key)| key.map(|key| (content, key)))
        .filter(|(_, key)| !chunk.own_rows.contains(key))
        .collect();
    suspects.sort_unstable();
    suspects.dedup();
    let digests = sorted(suspects.iter().map(|(content, _)| content.0).collect());
    let all = entries(chunk, &digests)?;
    let disproved: HashSet<Subject> =
        disproved(chunk, all.clone())?.into_iter().map(|(subject, _)| subject).collect();
    let elsewhere = |content: &Digest, key: &Vec<u8>| {
        all.iter()
            .any(|(subject, _)| subject.0 == content.0 && subject.1 != *key && !disproved.contains(subject))
    };
    suspects.retain(|(content, key)| elsewhere(content, key));
    // One of two that name each other stays.
    suspects.dedup_by_key(|(content, _)| *content);
    still_there(chunk, suspects)
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

/// Rows that are equal to their records, and whose content an older row holds, too: they are to be folded.
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
    // Each row with every older place of its content.
    let mut suspects: Vec<(u32, Subject)> = Vec::new();
    for &(digest, n) in found.iter().filter(|(_, n)| matches[*n as usize] == Match::Unchanged) {
        let Ok(at) = digests.binary_search(&digest) else { continue };
        let Some(places) = places.get(&(at as u32)) else { continue };
        let own = places.iter().find(|p| p.key == key_of(n)).map(|p| p.ordinal);
        let older = places.iter().filter(|p| p.key != key_of(n) && own.is_none_or(|own| p.ordinal < own));
        suspects.extend(older.map(|p| (n, (digest, p.key.clone()))));
    }
    let keys: Vec<&[u8]> = suspects.iter().map(|(_, (_, key))| key.as_slice()).collect();
    let mut twins = HashSet::new();
    rows_under(Reading::Latest, chunk.target, &chunk.layout, &chunk.key_types, &keys, |at, row| {
        let (n, (digest, _)) = &suspects[at];
        if row.digests()?.content.as_bytes() == digest {
            twins.insert(*n);
        }
        Ok(())
    })?;
    Ok(twins)
}

/// Deletes rows that are too many, before images kept.
///
/// # Errors
/// 23503 when a foreign key points at one of them.
pub fn remove_extra(chunk: &mut OpenChunk) -> Result<()> {
    if !chunk.extra.is_empty() {
        let extra = chunk.extra.clone();
        let keys: Vec<&[u8]> = extra.iter().map(Vec::as_slice).collect();
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
