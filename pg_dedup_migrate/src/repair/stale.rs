//! Entries that no row bears out.
use std::collections::{HashMap, HashSet};

use pg_dedup_record::digest::Digest;
use pg_dedup_record::wire::ManifestEntry;
use pgrx::prelude::*;

use super::{entries, listed};
use crate::by_key::{Reading, rows_under};
use crate::chunk::OpenChunk;
use crate::error::Result;
use crate::lookup::Subject;
use crate::segment;

/// Those of the entries under whose key the content does not stand, or stands in a row that is about to be replaced, under another spelling.
///
/// # Errors
/// What reading the target raises.
pub fn disproved(chunk: &OpenChunk, entries: Vec<(Subject, u64)>) -> Result<Vec<(Subject, u64)>> {
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
///
/// # Errors
/// SPI's own.
pub fn without_rows(chunk: &OpenChunk, entries: Vec<(Subject, u64)>) -> Result<Vec<(Subject, u64)>> {
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
///
/// # Errors
/// 42501 without the privileges of a worker.
pub fn bury(target: i32, places: Vec<Subject>) -> Result<()> {
    if places.is_empty() {
        return Ok(());
    }
    let ordinal = segment::nobodys_ordinal(target)?.cast_unsigned();
    segment::write_tombstones(
        target,
        places.into_iter().map(|(digest, key)| (Digest(digest), ordinal, key)).collect(),
    )
}
