//! Why a record of the source may have no row of its own: the chunk dropped it as a duplicate, or set it aside.
use std::collections::HashMap;

use pg_dedup_record::digest::Digest;
use pg_dedup_record::{BatchBuilder, pgcopy};
use pgrx::prelude::*;

use super::Chunk;
use crate::error::{Error, Result};
use crate::ledger;
use crate::sql::required;

/// What a chunk dropped as duplicates, by digest and key. Most of what it is asked for is not in it: the leading bits of a digest lead to the
/// few lines it may be among.
pub struct Ledger {
    lines: Vec<(Digest, Vec<u8>)>,
    /// Where the lines of each value of the leading bits begin, and where the last ones end.
    starts: Vec<u32>,
    /// How far a digest's prefix is shifted to get them.
    shift: u32,
    /// Of each line: a record was found for it.
    taken: Vec<bool>,
}

impl Ledger {
    /// What a chunk dropped.
    ///
    /// # Errors
    /// XX001 for a damaged block.
    pub fn load(chunk: &Chunk) -> Result<Self> {
        if chunk.keyless() {
            return Ok(Self::new(Vec::new()));
        }
        let mut lines = Vec::new();
        ledger::for_each_dropped(chunk.run, &chunk.chunk_id, |entry| {
            lines.push((entry.digest, entry.key.to_vec()));
        })?;
        Ok(Self::new(lines))
    }

    fn new(mut lines: Vec<(Digest, Vec<u8>)>) -> Self {
        lines.sort_unstable();
        let bits = (lines.len().max(1).ilog2() + 1).min(24);
        let shift = u64::BITS - bits;
        let mut starts = vec![0; (1 << bits) + 1];
        for (digest, _) in &lines {
            starts[(digest.prefix() >> shift) as usize + 1] += 1;
        }
        for at in 1..starts.len() {
            starts[at] += starts[at - 1];
        }
        let taken = vec![false; lines.len()];
        Self { lines, starts, shift, taken }
    }

    /// Whether nothing was dropped.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Whether a record was dropped.
    pub fn lists(&self, content: &Digest, key: &[u8]) -> bool {
        self.find(content, key).next().is_some()
    }

    /// Whether a record was dropped, once for each time it was.
    pub fn take(&mut self, content: &Digest, key: &[u8]) -> bool {
        let line = self.find(content, key).find(|&line| !self.taken[line]);
        line.is_some_and(|line| !std::mem::replace(&mut self.taken[line], true))
    }

    fn find(&self, content: &Digest, key: &[u8]) -> impl Iterator<Item = usize> {
        let bucket = (content.prefix() >> self.shift) as usize;
        let lines = self.starts[bucket] as usize..self.starts[bucket + 1] as usize;
        lines.filter(move |&line| {
            let (digest, k) = &self.lines[line];
            digest == content && k == key
        })
    }
}

/// Row digests of the chunk's quarantined records, and how many of each there are.
///
/// # Errors
/// XX001 for a record that is not one.
pub fn quarantined(chunk: &Chunk) -> Result<HashMap<[u8; 32], u32>> {
    let unreadable = |e: pg_dedup_record::BatchError| Error::corrupted(format!("a quarantined record: {e}"));
    let mut batch = BatchBuilder::new(&chunk.layout, true);
    batch.push(pgcopy::header()).map_err(unreadable)?;
    Spi::connect(|client| -> Result<()> {
        let rows = client.select(
            "SELECT record FROM dedup.quarantine WHERE run_id = $1 AND chunk_id = $2 AND record IS NOT NULL",
            None,
            &[chunk.run.into(), chunk.chunk_id.as_str().into()],
        )?;
        for row in rows {
            let record: Vec<u8> = required(row["record"].value()?)?;
            batch.push(&record).map_err(unreadable)?;
        }
        Ok(())
    })?;
    batch.push(pgcopy::trailer()).map_err(unreadable)?;
    let batch = batch.finish().map_err(unreadable)?;
    let mut counts = HashMap::new();
    for i in 0..batch.len() {
        *counts.entry(*batch.digests(i).row.as_bytes()).or_default() += 1;
    }
    Ok(counts)
}
