//! Rows under the key of a record that the chunk dropped as a duplicate: it never wrote one there, so whatever stands there is somebody's.
use std::collections::{HashMap, HashSet};

use pgrx::prelude::*;

use crate::chunk::OpenChunk;
use crate::error::Result;
use crate::ledger;
use crate::lookup;
use crate::matching::Match;
use crate::relation::Snapshot;
use crate::sql::required;

/// Keys of the records that a chunk which is repaired dropped when it finished before; of one that is not repaired: none.
///
/// # Errors
/// XX001 for a damaged block.
pub fn dropped_before(chunk: &OpenChunk) -> Result<HashSet<Vec<u8>>> {
    let mut keys = HashSet::new();
    if chunk.repair.is_none() || chunk.keyless() {
        return Ok(keys);
    }
    Spi::connect(|client| -> Result<()> {
        let blocks = client.select(
            "SELECT l.entries FROM dedup.ordinals AS o JOIN dedup.ledger_block AS l USING (ordinal) WHERE o.run_id = $1 AND o.chunk_id = $2",
            None,
            &[chunk.run.into(), chunk.chunk_id.as_str().into()],
        )?;
        for block in blocks {
            let bytes: Vec<u8> = required(block["entries"].value()?)?;
            let block = ledger::parse(&bytes)?;
            keys.extend((0..block.len()).map(|i| block.entry(i).key.to_vec()));
        }
        Ok(())
    })?;
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
    let suspects: Vec<([u8; 32], u32)> = found
        .iter()
        .filter(|&&(_, n)| matches[n as usize] == Match::Changed && chunk.dropped_before.contains(key_of(n)))
        .copied()
        .collect();
    if suspects.is_empty() {
        return Ok(HashSet::new());
    }
    let mut digests: Vec<[u8; 32]> = suspects.iter().map(|(digest, _)| *digest).collect();
    digests.dedup();
    let wanted: Vec<u32> = (0..digests.len() as u32).collect();
    let places: HashMap<u32, Vec<lookup::Place>> =
        lookup::places(chunk.target_id, &digests, &wanted, &Snapshot::latest())?.into_iter().collect();
    Ok(suspects
        .into_iter()
        .filter(|(digest, n)| {
            let at = digests.binary_search(digest).ok().and_then(|at| places.get(&(at as u32)));
            !at.is_some_and(|places| places.iter().any(|place| place.key == key_of(*n)))
        })
        .map(|(_, n)| n)
        .collect())
}
