//! The claims table: content hashes of transactions still in flight.
//!
//! # Lock order, and why nobody deadlocks
//!
//! Every partition has a lock. A [`sweep`] takes all of them in ascending order, those it has nothing to do
//! in too, and hand over hand: the next one before it lets go of the last. So sweeps are in
//! one order: who entered partition 0 first is first in every partition, nobody overtakes. Of two
//! transactions that each sweep once only the later can meet the other's claims and wait for it; a
//! circle would need one that is both earlier and later. All other operations hold one lock at a time and
//! take nothing else while they do.
//!
//! Several sweeps in one transaction, re-claims after an owner aborted, and waits for unique keys of the
//! target do break that order. Waiting happens in the server's lock manager with no partition
//! lock held, so such a circle ends with its deadlock error (40P01), and the worker tries again.
//!
//! # What a claim is worth
//!
//! A slot says "this transaction is about to write something with these bits". The owner is known
//! by transaction id; an [`Claim::Ours`] is ours until our transaction has ended or has released it. See
//! the crate's own page for why this makes writes exactly-once.
use std::ops::Deref;

use crate::key::Key;
use crate::partition::{self, Partition, Slot};
pub use crate::partition::{Claim, PARTITIONS, Refused};
use crate::prefetch::Prefetch;

/// How many keys ahead slots are asked for. Fewer than in the filter: the next slots are mostly in the
/// same cache line or the next.
const LOOKAHEAD: usize = 8;

/// The partitions behind their locks.
pub trait Table {
    /// An exclusively locked partition; dropping it releases the lock.
    type Exclusive<'a>: Exclusive
    where
        Self: 'a;

    /// The slots of a partition under a shared lock; dropping it releases the lock.
    type Shared<'a>: Deref<Target = [Slot]>
    where
        Self: 'a;

    /// Waits for the lock of this partition, below [`PARTITIONS`].
    fn exclusive(&self, partition: usize) -> Self::Exclusive<'_>;

    /// Waits until nobody writes in this partition, below [`PARTITIONS`].
    fn shared(&self, partition: usize) -> Self::Shared<'_>;
}

/// Access to a partition for as long as its lock is held.
pub trait Exclusive {
    /// The partition itself.
    fn partition(&mut self) -> Partition<'_>;
}

/// Claims of one sweep, in ascending order of their leads.
#[derive(Debug, Default)]
pub struct Run {
    keys: Vec<Key>,
    /// So many of `keys` are claimed; while a sweep is on, those that it has yet to visit come behind.
    claimed: usize,
}

impl Run {
    /// What a sweep is to claim; `None` if the leads are not in ascending order.
    pub fn new(keys: Vec<Key>) -> Option<Self> {
        keys.is_sorted_by_key(|key| key.lead).then_some(Self { keys, claimed: 0 })
    }

    /// The claims that are held.
    pub fn claimed(&self) -> &[Key] {
        &self.keys[..self.claimed]
    }

    /// Takes the keys at these positions, ascending and distinct, out of the run.
    pub(crate) fn remove(&mut self, positions: &[usize]) {
        let ends = positions.iter().skip(1).copied().chain([self.claimed]);
        let mut to = positions.first().copied().unwrap_or(self.claimed);
        for (gone, end) in positions.iter().zip(ends) {
            self.keys.copy_within(gone + 1..end, to);
            to += end - gone - 1;
        }
        self.keys.truncate(to);
        self.claimed = to;
    }
}

/// Claims every key of `run` in one sweep and says in `out`, key by key, what came of it.
///
/// `xid` is stored with new claims, `owns` says of a transaction id whether it is ours. On success the
/// run keeps the keys that are ours now. If a key can't be claimed, everything this sweep claimed is
/// released again and the run is empty: others may have seen those claims meanwhile, and wait for this
/// transaction for nothing.
///
/// After each claim the run says so at once: if the caller is torn out of the sweep, it still
/// knows what to release. Nothing in here allocates or fails in any other way.
pub fn sweep<T: Table>(
    table: &T,
    prefetch: &impl Prefetch,
    run: &mut Run,
    xid: u32,
    mut owns: impl FnMut(u32) -> bool,
    out: &mut [Claim],
) -> Result<(), Refused> {
    debug_assert_eq!(run.keys.len(), out.len());
    let mut next = 0;
    let mut refused = None;
    let mut held = table.exclusive(0);
    'sweep: for number in 0..PARTITIONS {
        if number > 0 {
            // Hand over hand: the new lock is taken before the assignment drops the old one.
            held = table.exclusive(number);
        }
        let mut partition = held.partition();
        while let Some(&key) = run.keys.get(next).filter(|key| key.partition() == number) {
            if let Some(&ahead) = run.keys.get(next + LOOKAHEAD) {
                partition.prefetch(ahead, prefetch);
            }
            match partition.claim(key, xid, &mut owns) {
                Ok(claim) => {
                    if claim == Claim::Ours || claim == Claim::AlreadyOurs {
                        run.keys[run.claimed] = key;
                        run.claimed += 1;
                    }
                    if let Some(place) = out.get_mut(next) {
                        *place = claim;
                    }
                }
                Err(reason) => {
                    refused = Some(reason);
                    break 'sweep;
                }
            }
            next += 1;
        }
    }
    drop(held);
    if let Some(reason) = refused {
        release(table, prefetch, run.claimed());
        *run = Run::default();
        return Err(reason);
    }
    run.keys.truncate(run.claimed);
    Ok(())
}

/// Releases one count of every key; the keys' leads ascend. One lock at a time, only where there are keys.
///
/// Only for keys that the caller has in its book. Allocates nothing and can't fail.
pub fn release<T: Table>(table: &T, prefetch: &impl Prefetch, keys: &[Key]) {
    let mut next = 0;
    while let Some(first) = keys.get(next) {
        let number = first.partition();
        let mut held = table.exclusive(number);
        let mut partition = held.partition();
        while let Some(&key) = keys.get(next).filter(|key| key.partition() == number) {
            if let Some(&ahead) = keys.get(next + LOOKAHEAD) {
                partition.prefetch(ahead, prefetch);
            }
            partition.release(key);
            next += 1;
        }
    }
}

/// Says of every key, in order, which (sub)transaction holds it. Leads ascend; one lock at a time.
pub fn owners<T: Table>(table: &T, keys: &[Key], mut each: impl FnMut(Key, Option<u32>)) {
    let mut next = 0;
    while let Some(first) = keys.get(next) {
        let number = first.partition();
        let slots = table.shared(number);
        while let Some(&key) = keys.get(next).filter(|key| key.partition() == number) {
            each(key, partition::owner(&slots, key));
            next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remove_takes_out_what_is_named() {
        for gone in [&[][..], &[0], &[5], &[2, 3], &[0, 1, 4, 5], &[0, 1, 2, 3, 4, 5]] {
            let keys = (0..6).map(|i| Key { lead: i, fingerprint: 0 }).collect();
            let mut run = Run { keys, claimed: 6 };
            run.remove(gone);
            let left: Vec<usize> = run.claimed().iter().map(|key| key.lead as usize).collect();
            assert_eq!(left, (0..6).filter(|i| !gone.contains(i)).collect::<Vec<_>>());
        }
    }
}
