//! Rows under the key of a record that the chunk dropped as a duplicate, or set aside: it never wrote one there, so whatever stands there is somebody's.
use std::collections::{HashMap, HashSet};

use pg_dedup_record::digest::Digest;
use pgrx::prelude::*;

use crate::chunk::OpenChunk;
use crate::error::Result;
use crate::ledger;
use crate::lookup;
use crate::matching::Match;
use crate::owners::Owners;
use crate::sql::required;

/// Records of which a chunk that is repaired had no row when it finished before.
#[derive(Debug, Default)]
pub struct WithoutRow {
    /// Contents of those that were dropped as duplicates, by key.
    dropped: HashMap<Vec<u8>, Vec<Digest>>,
    /// Keys of those that were set aside, as texts.
    set_aside: HashSet<String>,
}

impl WithoutRow {
    /// Of a chunk that is not repaired, or has no key: none.
    ///
    /// # Errors
    /// XX001 for a damaged block.
    pub fn of(chunk: &OpenChunk) -> Result<Self> {
        let mut without = Self::default();
        if chunk.repair.is_none() || chunk.keyless() {
            return Ok(without);
        }
        ledger::for_each_dropped(chunk.run, &chunk.chunk_id, |entry| {
            without.dropped.entry(entry.key.to_vec()).or_default().push(entry.digest);
        })?;
        Spi::connect(|client| -> Result<()> {
            let keys = client.select(
                "SELECT source_key FROM dedup.quarantine WHERE run_id = $1 AND chunk_id = $2 AND source_key IS NOT NULL",
                None,
                &[chunk.run.into(), chunk.chunk_id.as_str().into()],
            )?;
            for key in keys {
                without.set_aside.insert(required(key["source_key"].value()?)?);
            }
            Ok(())
        })?;
        Ok(without)
    }

    /// Can't a row with this content have been written for the record with its key? One with the very content that was dropped is that record once
    /// more, whoever put it there.
    fn rules_out(&self, chunk: &OpenChunk, key: &[u8], content: &Digest) -> Result<bool> {
        match self.dropped.get(key) {
            Some(dropped) => Ok(!dropped.contains(content)),
            None => {
                Ok(!self.set_aside.is_empty() && self.set_aside.contains(&chunk.key_types.query_string(key)?))
            }
        }
    }
}

/// Of the rows found that differ from their records those that are not ours: the record was given no row, and the index has this one as somebody else's,
/// or not at all. They are left alone, as if there were none; a record that has to be written after all meets them as a violation of the key.
///
/// # Errors
/// XX001 for a damaged block.
pub fn not_ours<'k>(
    chunk: &OpenChunk,
    found: &[([u8; 32], u32)],
    matches: &[Match],
    key_of: &dyn Fn(u32) -> &'k [u8],
) -> Result<HashSet<u32>> {
    let mut suspects: Vec<&([u8; 32], u32)> = Vec::new();
    for row in found {
        let (content, n) = row;
        if matches[*n as usize] == Match::Changed
            && chunk.without_row.rules_out(chunk, key_of(*n), &Digest(*content))?
        {
            suspects.push(row);
        }
    }
    let rows: Vec<(Digest, Vec<u8>)> =
        suspects.iter().map(|&&(digest, n)| (Digest(digest), key_of(n).to_vec())).collect();
    let places = lookup::owners(chunk.target_id, &rows)?;
    let mut owners = Owners::new(chunk.run, chunk.target_id);
    let mut foreign = HashSet::new();
    for ((_, n), place) in suspects.into_iter().zip(places) {
        let ours = match place {
            Some(place) => owners.of(place.ordinal)?.is_table(chunk.table_id),
            None => false,
        };
        if !ours {
            foreign.insert(*n);
        }
    }
    Ok(foreign)
}
