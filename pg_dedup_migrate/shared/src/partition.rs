//! One partition of the claims table: open addressing with linear probing and backward-shift deletion.
//!
//! A key's home grows with its leading bits, so a sorted batch walks the slots forwards. A slot
//! remembers how far from home it stands: that makes a key's place part of the comparison, and lets a
//! deletion move the slots behind it back without knowing their digests. There are no tombstones, so
//! a partition that was once full is as fast as a new one when it is empty again.
//!
//! Invariant: between a key's home and its slot no slot is free. Every loop is bounded by the length of
//! the partition, so even damaged memory can't keep a lock held for ever.
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::key::{Key, scale};
use crate::prefetch::Prefetch;

/// Bits of the lead that choose a partition.
const PARTITION_BITS: u32 = 7;
/// How far from home a slot may stand at most. With uniform digests nothing gets half as far before the
/// load limit is reached, even in the largest table; it bounds how long a lock is held when they are not.
const REACH: u16 = 4096;
/// How many partitions the claims table has, each with a lock of its own.
pub const PARTITIONS: usize = 1 << PARTITION_BITS;

impl Key {
    /// The partition this key belongs to; grows with the digest.
    #[inline]
    pub fn partition(self) -> usize {
        (self.lead >> (u64::BITS - PARTITION_BITS)) as usize
    }
}

/// A claimed content hash. All zero is a free slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    fingerprint: u64,
    /// The transaction or subtransaction that claimed it first; 0 in a free slot.
    xid: u32,
    /// How often its transaction has claimed it.
    count: u16,
    /// How many slots behind its home it stands.
    displacement: u16,
}

/// What a claim on one key came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Claim {
    /// Nobody had it; now it is ours.
    #[default]
    Ours,
    /// This transaction had claimed it before, or a hash that can't be told from it; counted once more.
    AlreadyOurs,
    /// Another transaction, still in flight when we looked, has it: pending.
    Held(u32),
}

/// Why a key could not be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The partition is at its load limit, or too crowded around the key's home.
    Full,
    /// This transaction has claimed the key 65,535 times.
    TooOften,
}

/// One partition, to be formed only by who holds its lock exclusively.
#[derive(Debug)]
pub struct Partition<'a> {
    slots: &'a mut [Slot],
    /// Slots in use. Atomic so that statistics may read it without the lock.
    used: &'a AtomicU32,
}

/// Slots that a partition of this length fills at most: seven eighths, beyond which probing gets long.
pub fn capacity(slots: usize) -> usize {
    slots / 8 * 7
}

impl<'a> Partition<'a> {
    /// A partition over slots of which `used` are in use.
    pub fn new(slots: &'a mut [Slot], used: &'a AtomicU32) -> Self {
        Self { slots, used }
    }

    /// Claims `key` for transaction `xid`; `owns` says of a transaction id whether it is ours.
    #[inline]
    pub fn claim(&mut self, key: Key, xid: u32, owns: impl FnOnce(u32) -> bool) -> Result<Claim, Refused> {
        debug_assert_ne!(xid, 0);
        let capacity = capacity(self.slots.len());
        let mut at = home(self.slots, key);
        for displacement in 0..reach(self.slots) {
            let slot = &mut self.slots[at];
            if slot.xid == 0 {
                let used = self.used.load(Relaxed);
                if used as usize >= capacity {
                    return Err(Refused::Full);
                }
                *slot = Slot { fingerprint: key.fingerprint, xid, count: 1, displacement };
                self.used.store(used + 1, Relaxed);
                return Ok(Claim::Ours);
            }
            if slot.fingerprint == key.fingerprint && slot.displacement == displacement {
                if !owns(slot.xid) {
                    return Ok(Claim::Held(slot.xid));
                }
                slot.count = slot.count.checked_add(1).ok_or(Refused::TooOften)?;
                return Ok(Claim::AlreadyOurs);
            }
            at = after(self.slots, at);
        }
        Err(Refused::Full)
    }

    /// Takes one count off `key`'s slot and frees it at zero; `false` if there is no such slot.
    ///
    /// Whose it is isn't asked: only who has the claim in its book may call this.
    #[inline]
    pub fn release(&mut self, key: Key) -> bool {
        let Some(at) = find(self.slots, key) else { return false };
        if self.slots[at].count > 1 {
            self.slots[at].count -= 1;
        } else {
            self.free(at);
        }
        true
    }

    /// Frees a slot and closes the gap: whatever stands behind it and may stand nearer to its home moves.
    fn free(&mut self, at: usize) {
        let mut gap = at;
        let mut distance = 0u16;
        let mut next = at;
        for _ in 1..self.slots.len() {
            next = after(self.slots, next);
            let slot = self.slots[next];
            if slot.xid == 0 {
                break;
            }
            // A slot that can't move needn't stop the search: one behind it may have its home before the gap.
            distance = distance.saturating_add(1);
            if slot.displacement >= distance {
                self.slots[gap] = Slot { displacement: slot.displacement - distance, ..slot };
                gap = next;
                distance = 0;
            }
        }
        self.slots[gap] = Slot::default();
        self.used.store(self.used.load(Relaxed).saturating_sub(1), Relaxed);
    }

    /// Asks for the memory that a claim or release of `key` will touch first.
    #[inline]
    pub fn prefetch(&self, key: Key, prefetch: &impl Prefetch) {
        if let Some(slot) = self.slots.get(home(self.slots, key)) {
            prefetch.fetch(slot);
        }
    }
}

/// The transaction or subtransaction that holds `key` in this partition.
pub fn owner(slots: &[Slot], key: Key) -> Option<u32> {
    find(slots, key).map(|at| slots[at].xid)
}

#[inline]
fn find(slots: &[Slot], key: Key) -> Option<usize> {
    let mut at = home(slots, key);
    for displacement in 0..reach(slots) {
        let slot = slots[at];
        if slot.xid == 0 {
            return None;
        }
        if slot.fingerprint == key.fingerprint && slot.displacement == displacement {
            return Some(at);
        }
        at = after(slots, at);
    }
    None
}

/// How many slots from its home on a key may stand in.
#[inline]
fn reach(slots: &[Slot]) -> u16 {
    u16::try_from(slots.len()).map_or(REACH, |length| length.min(REACH))
}

#[inline]
fn home(slots: &[Slot], key: Key) -> usize {
    scale(key.lead << PARTITION_BITS, slots.len())
}

#[inline]
fn after(slots: &[Slot], at: usize) -> usize {
    if at + 1 < slots.len() { at + 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(lead: u64, fingerprint: u64) -> Key {
        Key { lead, fingerprint }
    }

    #[test]
    fn a_slot_is_sixteen_bytes() {
        assert_eq!(size_of::<Slot>(), 16);
    }

    #[test]
    fn claims_count_and_are_held_by_one() {
        let (mut slots, used) = (vec![Slot::default(); 64], AtomicU32::new(0));
        let mut partition = Partition::new(&mut slots, &used);
        assert_eq!(partition.claim(key(1 << 60, 7), 10, |_| false), Ok(Claim::Ours));
        assert_eq!(partition.claim(key(1 << 60, 7), 11, |xid| xid == 11), Ok(Claim::Held(10)));
        assert_eq!(partition.claim(key(1 << 60, 7), 12, |xid| xid == 10), Ok(Claim::AlreadyOurs));
        assert!(partition.release(key(1 << 60, 7)));
        assert_eq!(used.load(Relaxed), 1);
        assert!(partition.release(key(1 << 60, 7)));
        assert!(!partition.release(key(1 << 60, 7)));
        assert_eq!(used.load(Relaxed), 0);
        assert!(slots.iter().all(|slot| *slot == Slot::default()));
    }

    #[test]
    fn too_many_claims_on_one_key_are_refused_and_change_nothing() {
        let (mut slots, used) = (vec![Slot::default(); 64], AtomicU32::new(0));
        let mut partition = Partition::new(&mut slots, &used);
        for _ in 0..u16::MAX {
            assert!(partition.claim(key(0, 7), 10, |_| true).is_ok());
        }
        assert_eq!(partition.claim(key(0, 7), 10, |_| true), Err(Refused::TooOften));
        for _ in 0..u16::MAX {
            assert!(partition.release(key(0, 7)));
        }
        assert_eq!(used.load(Relaxed), 0);
    }

    #[test]
    fn without_slots_it_is_full() {
        let used = AtomicU32::new(0);
        let mut partition = Partition::new(&mut [], &used);
        assert_eq!(partition.claim(key(0, 0), 1, |_| false), Err(Refused::Full));
        assert!(!partition.release(key(0, 0)));
    }

    #[test]
    fn keys_that_share_a_home_stop_at_the_reach() {
        let (mut slots, used) = (vec![Slot::default(); 1 << 14], AtomicU32::new(0));
        let mut partition = Partition::new(&mut slots, &used);
        for i in 0..u64::from(REACH) {
            assert_eq!(partition.claim(key(0, i), 1, |_| true), Ok(Claim::Ours));
        }
        assert_eq!(partition.claim(key(0, u64::MAX), 1, |_| true), Err(Refused::Full));
        for i in 0..u64::from(REACH) {
            assert!(partition.release(key(0, i)));
        }
        assert_eq!(used.load(Relaxed), 0);
    }

    #[test]
    fn uniform_keys_reach_the_load_limit_first() {
        let length = 1 << 18;
        let (mut slots, used) = (vec![Slot::default(); length], AtomicU32::new(0));
        let mut partition = Partition::new(&mut slots, &used);
        let mut random = 1u64;
        for i in 0..capacity(length) as u64 {
            // xorshift64*: uniform in its upper bits, as a digest is.
            random ^= random >> 12;
            random ^= random << 25;
            random ^= random >> 27;
            let lead = random.wrapping_mul(0x2545_f491_4f6c_dd1d);
            assert_eq!(partition.claim(key(lead, i), 1, |_| true), Ok(Claim::Ours));
        }
        assert_eq!(partition.claim(key(0, u64::MAX), 1, |_| true), Err(Refused::Full));
        assert_eq!(used.load(Relaxed) as usize, capacity(length));
        let farthest = slots.iter().map(|slot| slot.displacement).max();
        assert!(farthest.is_some_and(|displacement| displacement < REACH / 2), "{farthest:?}");
    }
}
