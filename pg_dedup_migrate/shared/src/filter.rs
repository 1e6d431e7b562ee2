//! The blocked Bloom filter: was this content hash perhaps written before?
//!
//! The digest's leading bits choose a block of one cache line, seven groups of nine salted bits of the
//! digest choose seven of its 512 bits. A digest is uniform already, so nothing is hashed again. After
//! Putze, Sanders, Singler: *Cache-, Hash- and Space-Efficient Bloom Filters* (2007).
//!
//! # Memory order
//!
//! There are no locks: bits are set by atomic OR and are never cleared. The operations are relaxed. That
//! is enough because "set before" is only ever needed across a lock that orders everything: a
//! transaction sets its bits, then drops its claims under the partition's lock; whoever relies on those
//! bits has taken the same partition's lock afterwards, in its sweep, before it looks. Writers that make
//! no claims (indexing existing rows, warming up) are ordered against readers by the heavyweight
//! lock on the index or the lock of the warmth table, in the same way.
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::key::{Key, scale};
use crate::prefetch::Prefetch;

/// Bits set for one key. Seven is near the optimum for 8 to 14 bits a key and fits one 64-bit word of
/// digest (7 × 9 = 63).
const BITS_A_KEY: usize = 7;
/// Bits in one block: one cache line.
const BLOCK_BITS: usize = 512;
/// Bits of digest that choose one bit of a block.
const CHOICE_BITS: usize = 9;
const WORDS: usize = BLOCK_BITS / 64;
/// How many keys ahead memory is asked for: about a memory latency's worth of work.
const LOOKAHEAD: usize = 16;

/// One cache line of the filter.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Block([AtomicU64; WORDS]);

/// Bytes in one block.
pub const BLOCK_BYTES: usize = size_of::<Block>();

/// The filter over memory that somebody else owns.
#[derive(Clone, Copy, Debug)]
pub struct Filter<'a> {
    blocks: &'a [Block],
    bits_set: &'a AtomicU64,
}

/// Size and health of a filter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FilterStats {
    /// Bytes of memory.
    pub bytes: u64,
    /// Blocks of 64 bytes.
    pub blocks: u64,
    /// Bits that are set.
    pub bits_set: u64,
    /// Part of all bits that is set, 0 to 1.
    pub fill: f64,
    /// How many different keys would set that many bits.
    pub estimated_keys: f64,
    /// Probability that a key never set is answered with "perhaps", 0 to 1.
    pub predicted_fpr: f64,
}

impl<'a> Filter<'a> {
    /// A filter over zeroed or formerly used blocks; `bits_set` counts the bits that are set in them.
    /// Without a single block it answers "perhaps" always.
    pub fn new(blocks: &'a [Block], bits_set: &'a AtomicU64) -> Self {
        Self { blocks, bits_set }
    }

    /// Whether this key was perhaps set; `false` is certain.
    pub fn contains(&self, key: Key) -> bool {
        self.blocks.get(self.block_of(key)).is_none_or(|block| block.contains(key.fingerprint))
    }

    /// Sets a key; `true` if all its bits were set before.
    pub fn insert(&self, key: Key) -> bool {
        let Some(block) = self.blocks.get(self.block_of(key)) else { return true };
        let new = block.insert(key.fingerprint);
        self.bits_set.fetch_add(u64::from(new), Relaxed);
        new == 0
    }

    /// [`contains`](Self::contains) for many keys, answers appended to `perhaps`. Keys in ascending order
    /// of their digests walk memory forwards; any order is right.
    pub fn probe(&self, keys: impl Iterator<Item = Key>, prefetch: &impl Prefetch, perhaps: &mut Vec<bool>) {
        perhaps.reserve(keys.size_hint().0);
        self.visit(keys, prefetch, |block, bits| {
            perhaps.push(block.is_none_or(|block| block.contains(bits)));
        });
    }

    /// [`insert`](Self::insert) for many keys, answers appended to `seen`.
    pub fn insert_all(
        &self,
        keys: impl Iterator<Item = Key>,
        prefetch: &impl Prefetch,
        seen: &mut Vec<bool>,
    ) {
        seen.reserve(keys.size_hint().0);
        let mut set = 0;
        self.visit(keys, prefetch, |block, bits| {
            let new = block.map_or(0, |block| block.insert(bits));
            set += u64::from(new);
            seen.push(new == 0);
        });
        self.bits_set.fetch_add(set, Relaxed);
    }

    /// Calls `each` with every key's block and bits, in order, after having asked for the block early.
    fn visit(
        &self,
        keys: impl Iterator<Item = Key>,
        prefetch: &impl Prefetch,
        mut each: impl FnMut(Option<&Block>, u64),
    ) {
        let mut ring = [(0usize, 0u64); LOOKAHEAD];
        let mut count = 0usize;
        for key in keys {
            let index = self.block_of(key);
            if let Some(block) = self.blocks.get(index) {
                prefetch.fetch(block);
            }
            let place = &mut ring[count % LOOKAHEAD];
            if count >= LOOKAHEAD {
                each(self.blocks.get(place.0), place.1);
            }
            *place = (index, key.fingerprint);
            count += 1;
        }
        for i in count.saturating_sub(LOOKAHEAD)..count {
            let (index, bits) = ring[i % LOOKAHEAD];
            each(self.blocks.get(index), bits);
        }
    }

    #[inline]
    fn block_of(&self, key: Key) -> usize {
        scale(key.lead, self.blocks.len())
    }

    /// Size and health now.
    pub fn stats(&self) -> FilterStats {
        let blocks = self.blocks.len() as u64;
        let bits = blocks * BLOCK_BITS as u64;
        let bits_set = self.bits_set.load(Relaxed).min(bits);
        let fill = if bits == 0 { 1.0 } else { bits_set as f64 / bits as f64 };
        let keys_a_block = keys_a_block(fill);
        FilterStats {
            bytes: blocks * BLOCK_BYTES as u64,
            blocks,
            bits_set,
            fill,
            estimated_keys: keys_a_block * blocks as f64,
            predicted_fpr: false_positive_rate(keys_a_block),
        }
    }
}

/// Part of a block's bits that one key leaves unset: each of its seven choices misses a given bit.
fn unset_by_one_key() -> f64 {
    (1.0 - 1.0 / BLOCK_BITS as f64).powi(BITS_A_KEY as i32)
}

/// Keys a block at this fill. Keys fall on blocks at random (Poisson with mean λ), so a bit is
/// unset with probability E[q^N] = exp(-λ(1-q)), q being [`unset_by_one_key`].
fn keys_a_block(fill: f64) -> f64 {
    (1.0 - fill).ln().abs() / (1.0 - unset_by_one_key())
}

/// False-positive rate at λ keys a block: E[(1 - q^N)^7] over a Poisson distributed N, expanded by the
/// binomial theorem. That blocks differ in load makes it higher than (fill)^7.
fn false_positive_rate(keys_a_block: f64) -> f64 {
    if !keys_a_block.is_finite() {
        return 1.0;
    }
    let mut rate = 0.0;
    let mut choose = 1.0;
    for j in 0..=BITS_A_KEY {
        let term = choose * (-keys_a_block * (1.0 - unset_by_one_key().powi(j as i32))).exp();
        rate += if j % 2 == 0 { term } else { -term };
        choose *= (BITS_A_KEY - j) as f64 / (j + 1) as f64;
    }
    rate.clamp(0.0, 1.0)
}

impl Block {
    #[inline]
    fn contains(&self, bits: u64) -> bool {
        // Without a branch for each bit: the line is here or on its way, and branches would mispredict.
        let mut all = 1;
        for (word, bit) in choices(bits) {
            all &= self.0[word].load(Relaxed) >> bit;
        }
        all & 1 == 1
    }

    /// Sets the bits; how many were not set before.
    #[inline]
    fn insert(&self, bits: u64) -> u32 {
        let mut masks = [0u64; WORDS];
        for (word, bit) in choices(bits) {
            masks[word] |= 1 << bit;
        }
        // Which words they are in, collected without a branch for each word: those would mispredict, and
        // the atomic operations are what costs (44 ns a key with this, 57 with a test for each word).
        let mut touched = [0usize; WORDS];
        let mut count = 0;
        for (index, mask) in masks.iter().enumerate() {
            touched[count] = index;
            count += usize::from(*mask != 0);
        }
        let mut new = 0;
        for &index in &touched[..count] {
            new += (masks[index] & !self.0[index].fetch_or(masks[index], Relaxed)).count_ones();
        }
        new
    }
}

/// The word and bit of each choice.
#[inline]
fn choices(bits: u64) -> impl Iterator<Item = (usize, u32)> {
    (0..BITS_A_KEY).map(move |i| {
        let choice = (bits >> (i * CHOICE_BITS)) as usize % BLOCK_BITS;
        (choice / 64, (choice % 64) as u32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prefetch::NoPrefetch;

    fn key(i: u64) -> Key {
        Key {
            lead: i.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            fingerprint: (i + 1).wrapping_mul(0xd1b5_4a32_d192_ed03),
        }
    }

    #[test]
    fn insert_tells_whether_it_was_new_and_counts_bits() {
        let blocks: Vec<Block> = (0..64).map(|_| Block::default()).collect();
        let bits_set = AtomicU64::new(0);
        let filter = Filter::new(&blocks, &bits_set);
        assert!(!filter.contains(key(1)));
        assert!(!filter.insert(key(1)));
        assert!(filter.insert(key(1)));
        assert!(filter.contains(key(1)));
        let stored: u64 =
            blocks.iter().flat_map(|b| &b.0).map(|w| u64::from(w.load(Relaxed).count_ones())).sum();
        assert_eq!(stored, filter.stats().bits_set);
        assert!((1..=7).contains(&stored));
    }

    #[test]
    fn batches_answer_as_single_keys_do() {
        let blocks: Vec<Block> = (0..64).map(|_| Block::default()).collect();
        let bits_set = AtomicU64::new(0);
        let filter = Filter::new(&blocks, &bits_set);
        for count in [0, 1, 15, 16, 17, 100] {
            let mut seen = Vec::new();
            filter.insert_all((0..count).map(key), &NoPrefetch, &mut seen);
            assert_eq!(seen.len(), count as usize);
            let mut perhaps = Vec::new();
            filter.probe((0..count + 50).map(key), &NoPrefetch, &mut perhaps);
            let singly: Vec<bool> = (0..count + 50).map(|i| filter.contains(key(i))).collect();
            assert_eq!(perhaps, singly);
            assert!(perhaps[..count as usize].iter().all(|hit| *hit));
        }
    }

    #[test]
    fn an_empty_filter_claims_nothing() {
        let bits_set = AtomicU64::new(0);
        let filter = Filter::new(&[], &bits_set);
        assert!(filter.contains(key(1)));
        assert!(filter.insert(key(1)));
        assert_eq!(filter.stats().predicted_fpr, 1.0);
    }
}
