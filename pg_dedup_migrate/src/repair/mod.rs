//! Repair: a chunk of a halted run is done again, and what is there is not believed but looked at.
//!
//! A chunk that is done again leaves rows that are equal to its records alone and writes the others. What it must not believe in a target that
//! somebody has tampered with is the index: an entry whose row is gone, or holds something else, would make its own record a duplicate of
//! nothing. So every place that would do that is read; where the content does not stand the entry is *stale*: it is retracted, and whoever has the
//! content writes it. The other way round a row may stand that the run had dropped as a duplicate of another: it is folded again.
//!
//! | module | idea |
//! |---|---|
//! | [`stale`] | entries of the chunk's contents that no row bears out |
//! | [`surplus`] | rows that are too many: duplicates, rows that the source does not have |
//! | [`foreign`] | rows under a record's key that no run wrote |
//! | [`audit`] | in the end, entries of whatever content without a row |
pub mod audit;
mod foreign;
mod stale;
mod surplus;

use std::collections::HashSet;

use pg_dedup_record::digest::Digest;
use pgrx::prelude::*;

pub use foreign::{WithoutRow, not_ours};
pub use stale::{retract, still_stale};
pub use surplus::{remove_extra, twins};

use crate::chunk::OpenChunk;
use crate::error::{Error, Result};
use crate::lookup::{self, Digests, Subject};
use crate::relation::Snapshot;
use crate::sql::{required, stored_digest};

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
    let mut stale =
        if chunk.keyless() { stale::without_rows(chunk, places)? } else { stale::disproved(chunk, places)? };
    stale.sort_unstable();
    let extra = if repair == Repair::DeleteExtra && !chunk.keyless() {
        surplus::extra_rows(chunk)?
    } else {
        Vec::new()
    };
    let of_stale = stale.iter().map(|(place, _)| place);
    let mut all: Vec<Subject> = chunk.leaving.iter().chain(of_stale).chain(&extra).cloned().collect();
    all.sort_unstable();
    all.dedup();
    chunk.leaving = all.into();
    chunk.stale = stale.into();
    chunk.extra = extra.into_iter().map(|(_, key)| key).collect::<Vec<_>>().into();
    Ok(())
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
            .map(|row| Ok((stored_digest(row["content_hash"].value()?)?, row["packed_key"].value()?)))
            .collect()
    })
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

/// A record that stood in the target and is refused now would be set aside, and the run found right without it. What foreign keys refuse may stay
/// so until the other chunks are done: `dedup.finish_repair` looks at that.
///
/// # Errors
/// 55000 when the chunk has records in quarantine, for other reasons, that were not there when the repair began.
pub fn refuse_more_quarantine(chunk: &OpenChunk) -> Result<()> {
    if chunk.repair.is_none() {
        return Ok(());
    }
    let (more, reason) = Spi::get_two_with_args::<i64, String>(
        "SELECT pg_catalog.count(*), pg_catalog.string_agg(DISTINCT a.reason, '; ') \
         FROM dedup.set_aside_by_repair($1, $2) AS a WHERE NOT a.by_foreign_key",
        &[chunk.run.into(), chunk.chunk_id.as_str().into()],
    )?;
    let more = required(more)?;
    if more == 0 {
        return Ok(());
    }
    Err(Error::state(format!(
        "{more} records that are to be repaired are refused by {}",
        chunk.target_name()
    ))
    .detail(reason.unwrap_or_default())
    .hint("Mend what the target refuses them for, then repair the run again."))
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
