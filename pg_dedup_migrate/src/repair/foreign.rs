//! Rows under the key of a record that the chunk dropped as a duplicate: it never wrote one there, so whatever stands there is somebody's.
use std::collections::HashSet;

use pg_dedup_record::digest::Digest;

use crate::chunk::OpenChunk;
use crate::error::Result;
use crate::ledger;
use crate::lookup;
use crate::matching::Match;

/// Keys of the records that a chunk which is repaired dropped when it finished before; of one that is not repaired: none.
///
/// # Errors
/// XX001 for a damaged block.
pub fn dropped_before(chunk: &OpenChunk) -> Result<HashSet<Vec<u8>>> {
    let mut keys = HashSet::new();
    if chunk.repair.is_some() && !chunk.keyless() {
        ledger::for_each_dropped(chunk.run, &chunk.chunk_id, |entry| {
            keys.insert(entry.key.to_vec());
        })?;
    }
    Ok(keys)
}

/// Of the rows found that differ from their records those that are nobody's: the record was dropped, and the index does not know the row. They
/// are left alone, as if there were none; a record that has to be written after all meets them as a violation of the key.
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
        .filter(|(_, n)| matches[*n as usize] == Match::Changed && chunk.dropped_before.contains(key_of(*n)))
        .collect();
    let rows: Vec<(Digest, Vec<u8>)> =
        suspects.iter().map(|&&(digest, n)| (Digest(digest), key_of(n).to_vec())).collect();
    let owners = lookup::owners(chunk.target_id, &rows)?;
    Ok(suspects.into_iter().zip(owners).filter(|(_, owner)| owner.is_none()).map(|((_, n), _)| *n).collect())
}
