//! Rows under the key of a record that the chunk dropped as a duplicate: it never wrote one there, so whatever stands there is somebody's.
use std::collections::{HashMap, HashSet};

use pg_dedup_record::digest::Digest;

use crate::chunk::OpenChunk;
use crate::error::Result;
use crate::ledger;
use crate::lookup;
use crate::matching::Match;

/// Keys and contents of the records that a chunk which is repaired dropped when it finished before; of one that is not repaired: none.
///
/// # Errors
/// XX001 for a damaged block.
pub fn dropped_before(chunk: &OpenChunk) -> Result<HashMap<Vec<u8>, Vec<Digest>>> {
    let mut dropped: HashMap<Vec<u8>, Vec<Digest>> = HashMap::new();
    if chunk.repair.is_some() && !chunk.keyless() {
        ledger::for_each_dropped(chunk.run, &chunk.chunk_id, |entry| {
            dropped.entry(entry.key.to_vec()).or_default().push(entry.digest);
        })?;
    }
    Ok(dropped)
}

/// Of the rows found that differ from their records those that are nobody's: the record was dropped, and the index does not know the row. They
/// are left alone, as if there were none; a record that has to be written after all meets them as a violation of the key. A row with the very content
/// that was dropped is that record once more, whoever put it there.
///
/// # Errors
/// XX001 for a damaged block.
pub fn not_ours<'k>(
    chunk: &OpenChunk,
    found: &[([u8; 32], u32)],
    matches: &[Match],
    key_of: &dyn Fn(u32) -> &'k [u8],
) -> Result<HashSet<u32>> {
    let suspects: Vec<&([u8; 32], u32)> = found
        .iter()
        .filter(|(content, n)| {
            let dropped = chunk.dropped_before.get(key_of(*n));
            matches[*n as usize] == Match::Changed
                && dropped.is_some_and(|dropped| !dropped.contains(&Digest(*content)))
        })
        .collect();
    let rows: Vec<(Digest, Vec<u8>)> =
        suspects.iter().map(|&&(digest, n)| (Digest(digest), key_of(n).to_vec())).collect();
    let owners = lookup::owners(chunk.target_id, &rows)?;
    Ok(suspects.into_iter().zip(owners).filter(|(_, owner)| owner.is_none()).map(|((_, n), _)| *n).collect())
}
