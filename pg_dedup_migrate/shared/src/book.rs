//! What a transaction knows of its own claims: which, and by which subtransaction they were taken.
//!
//! The book is private memory of one backend. It decides what is released and when:
//!
//! | event | claims |
//! |---|---|
//! | sweep | a new run, of the current subtransaction |
//! | subtransaction commits | its runs now belong to its parent |
//! | subtransaction aborts | its runs are released |
//! | transaction ends | all runs are released |
//!
//! A counted slot carries the id of the (sub)transaction that claimed it first. That stays right: while a
//! subtransaction is open nobody outside of it claims, so later counts belong to the level of the first
//! one or to levels inside it, and go no later than it. [`Book::release`] takes the latest count
//! first, which keeps it so. Releasing is not transactional: an aborting subtransaction does not bring
//! back what it released of its parent's claims.
use std::collections::TryReserveError;

use crate::claims::{self, Claim, Refused, Run, Table};
use crate::key::Key;
use crate::prefetch::Prefetch;

/// The claims of one backend's transaction, in the order they were taken.
#[derive(Debug, Default)]
pub struct Book {
    sections: Vec<Section>,
}

/// One sweep's claims.
#[derive(Debug)]
struct Section {
    /// The subtransaction that holds them now.
    level: u32,
    run: Run,
}

/// A key was to be released that is not claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotClaimed;

impl Book {
    /// A book without claims.
    pub const fn new() -> Self {
        Self { sections: Vec::new() }
    }

    /// How many claims are held, counts included.
    pub fn held(&self) -> usize {
        self.sections.iter().map(|section| section.run.claimed().len()).sum()
    }

    /// Makes room for one more sweep, so that [`sweep`](Self::sweep) needs no memory.
    pub fn reserve(&mut self) -> Result<(), TryReserveError> {
        self.sections.try_reserve(1)
    }

    /// [`claims::sweep`] with its claims entered in the book as they are made, for subtransaction `level`.
    #[expect(clippy::too_many_arguments, reason = "the sweep's own arguments and the level")]
    pub fn sweep<T: Table>(
        &mut self,
        table: &T,
        prefetch: &impl Prefetch,
        level: u32,
        run: Run,
        xid: u32,
        owns: impl FnMut(u32) -> bool,
        out: &mut [Claim],
    ) -> Result<(), Refused> {
        // In the book before anything is claimed: what interrupts the sweep can't leave a claim behind.
        let section = self.sections.push_mut(Section { level, run });
        let result = claims::sweep(table, prefetch, &mut section.run, xid, owns, out);
        if section.run.claimed().is_empty() {
            self.sections.pop();
        }
        result
    }

    /// Releases one count of every key, leads ascending. If one isn't claimed, nothing is released.
    pub fn release<T: Table>(
        &mut self,
        table: &T,
        prefetch: &impl Prefetch,
        keys: &[Key],
    ) -> Result<(), NotClaimed> {
        let mut wanted = keys.to_vec();
        let mut found = Vec::new();
        for (index, section) in self.sections.iter().enumerate().rev() {
            if wanted.is_empty() {
                break;
            }
            let positions = take_matches(&mut wanted, section.run.claimed());
            if !positions.is_empty() {
                found.push((index, positions));
            }
        }
        if !wanted.is_empty() {
            return Err(NotClaimed);
        }
        for (index, positions) in found {
            self.sections[index].run.remove(&positions);
        }
        self.sections.retain(|section| !section.run.claimed().is_empty());
        claims::release(table, prefetch, keys);
        Ok(())
    }

    /// A subtransaction commits: its parent holds its claims from now on.
    pub fn hand_over(&mut self, level: u32, parent: u32) {
        for section in self.sections.iter_mut().filter(|section| section.level == level) {
            section.level = parent;
        }
    }

    /// A subtransaction aborts: its claims are released. Needs no memory and can't fail.
    pub fn abort<T: Table>(&mut self, table: &T, prefetch: &impl Prefetch, level: u32) {
        self.sections.retain(|section| {
            if section.level == level {
                claims::release(table, prefetch, section.run.claimed());
            }
            section.level != level
        });
    }

    /// The transaction has ended: all claims are released. Needs no memory and can't fail.
    pub fn end<T: Table>(&mut self, table: &T, prefetch: &impl Prefetch) {
        for section in std::mem::take(&mut self.sections) {
            claims::release(table, prefetch, section.run.claimed());
        }
    }
}

/// Takes the keys that stand in `claimed` out of `wanted`; their positions in `claimed`, ascending.
fn take_matches(wanted: &mut Vec<Key>, claimed: &[Key]) -> Vec<usize> {
    let mut positions: Vec<usize> = Vec::new();
    let mut from = 0;
    wanted.retain(|key| {
        from += gallop(&claimed[from..], key.lead);
        // Different digests with the same lead are all but impossible, and in no particular order.
        let taken_here = positions.iter().rposition(|p| *p < from).map_or(0, |p| p + 1);
        let same_lead = claimed[from..].iter().take_while(|other| other.lead == key.lead);
        let position = same_lead
            .enumerate()
            .find(|(i, other)| **other == *key && !positions[taken_here..].contains(&(from + i)))
            .map(|(i, _)| from + i);
        positions.extend(position);
        position.is_none()
    });
    positions.sort_unstable();
    positions
}

/// How many keys at the front have a smaller lead; cheap when few do.
fn gallop(keys: &[Key], lead: u64) -> usize {
    let mut step = 1;
    let mut low = 0;
    while low + step <= keys.len() && keys[low + step - 1].lead < lead {
        low += step;
        step *= 2;
    }
    let high = keys.len().min(low + step);
    low + keys[low..high].partition_point(|key| key.lead < lead)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(leads: &[(u64, u64)]) -> Vec<Key> {
        leads.iter().map(|&(lead, fingerprint)| Key { lead, fingerprint }).collect()
    }

    #[test]
    fn gallop_finds_the_first_not_smaller() {
        let sorted = keys(&(0..200).map(|i| (i * 2, 0)).collect::<Vec<_>>());
        for lead in 0..410 {
            assert_eq!(gallop(&sorted, lead), sorted.partition_point(|key| key.lead < lead), "{lead}");
        }
        assert_eq!(gallop(&[], 3), 0);
    }

    #[test]
    fn matches_are_a_multiset_even_where_leads_agree() {
        let claimed = keys(&[(1, 1), (2, 9), (2, 3), (2, 9), (5, 5)]);
        let mut wanted = keys(&[(2, 3), (2, 9), (2, 9), (2, 9), (4, 4), (5, 5)]);
        assert_eq!(take_matches(&mut wanted, &claimed), [1, 2, 3, 4]);
        assert_eq!(wanted, keys(&[(2, 9), (4, 4)]));
    }
}
