//! Manifest and ledger of a settled chunk, packed part by part: a chunk of a hundred thousand records has megabytes of them, of which
//! nobody needs to hold more than a piece.

use super::{Fold, Outcome, Result};
use crate::wire::{LedgerEntry, ManifestEntry};

/// A part of both lists, each in the order the protocol wants.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Lists {
    /// Packed manifest.
    pub manifest: Vec<u8>,
    /// Packed ledger.
    pub ledger: Vec<u8>,
}

/// Iterator of [`Fold::lists`]. Parts are cut between groups of equal content; no part is empty.
pub struct Parts<'f> {
    fold: &'f Fold<'f>,
    part_bytes: usize,
    group: usize,
    losers: Vec<u32>,
}

impl<'f> Parts<'f> {
    pub(super) fn new(fold: &'f Fold<'f>, part_bytes: usize) -> Self {
        Self { fold, part_bytes, group: 0, losers: Vec::new() }
    }

    /// Packs the members of the next group.
    fn pack_group(&mut self, lists: &mut Lists) -> Result<()> {
        let fold = self.fold;
        let digest = *fold.groups.digest(self.group);
        self.losers.clear();
        for &row in fold.groups.members(self.group) {
            match fold.outcomes[row as usize] {
                Outcome::Inserted | Outcome::Updated => {
                    let row_digest = fold.batch.digests(row as usize).row.short();
                    ManifestEntry { digest, row_digest, key: fold.key(row) }.encode(&mut lists.manifest)?;
                }
                Outcome::Duplicate => self.losers.push(row),
                _ => {}
            }
        }
        self.losers.sort_unstable_by_key(|&row| fold.key(row));
        for &row in &self.losers {
            LedgerEntry { digest, key: fold.key(row) }.encode(&mut lists.ledger)?;
        }
        self.group += 1;
        Ok(())
    }
}

impl Iterator for Parts<'_> {
    type Item = Result<Lists>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut lists = Lists::default();
        while self.group < self.fold.groups.len()
            && lists.manifest.len() + lists.ledger.len() < self.part_bytes
        {
            if let Err(error) = self.pack_group(&mut lists) {
                self.group = self.fold.groups.len();
                return Some(Err(error));
            }
        }
        (lists != Lists::default()).then_some(Ok(lists))
    }
}
