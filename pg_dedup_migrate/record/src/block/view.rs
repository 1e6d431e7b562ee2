//! Reading blocks where they lie.
use std::ops::Range;

use super::{
    BlockError, CRC_AT, Entry, HEADER_LEN, MAGIC, MAX_KEY_BYTES, PREFIX_LEN, REST_LEN, ROW_DIGEST_LEN, Stamp,
    VARIABLE_KEYS, VERSION,
};
use crate::digest::Digest;

/// A block, checked once, read in place.
#[derive(Debug, Clone, Copy)]
pub struct BlockView<'a> {
    prefixes: &'a [[u8; PREFIX_LEN]],
    rests: &'a [[u8; REST_LEN]],
    stamps: Stamps<'a>,
    base: u64,
    row_digests: &'a [[u8; ROW_DIGEST_LEN]],
    keys: Keys<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Stamps<'a> {
    Equal,
    One(&'a [u8]),
    Two(&'a [[u8; 2]]),
    Four(&'a [[u8; 4]]),
    Eight(&'a [[u8; 8]]),
}

#[derive(Debug, Clone, Copy)]
enum Keys<'a> {
    Fixed { width: usize, bytes: &'a [u8] },
    Variable { ends: &'a [[u8; 2]], bytes: &'a [u8] },
}

/// The checksum of a block: CRC-32 (IEEE) of everything but the checksum itself.
pub(super) fn crc(block: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(block.get(..CRC_AT).unwrap_or_default());
    hasher.update(block.get(HEADER_LEN..).unwrap_or_default());
    hasher.finalize()
}

impl<'a> BlockView<'a> {
    /// Checks version, checksum and bounds of a block.
    ///
    /// # Errors
    /// If any is wrong: the bytes are then not what [`super::BlockBuilder`] wrote.
    pub fn parse(block: &'a [u8]) -> Result<BlockView<'a>, BlockError> {
        let view = Self::parse_verified(block)?;
        let stored =
            block.get(HEADER_LEN - 4..HEADER_LEN).and_then(|c| c.try_into().ok()).map(u32::from_be_bytes);
        let (stored, computed) = (stored.ok_or(BlockError::Magic)?, crc(block));
        if stored == computed { Ok(view) } else { Err(BlockError::Crc { stored, computed }) }
    }

    /// As [`BlockView::parse`], but for the checksum: for a block that the caller has parsed before and that is never changed. The checksum
    /// reads every byte of it, a look-up only a few.
    ///
    /// # Errors
    /// If version or bounds are wrong.
    pub fn parse_verified(block: &'a [u8]) -> Result<BlockView<'a>, BlockError> {
        let (header, body) = block.split_first_chunk::<HEADER_LEN>().ok_or(BlockError::Magic)?;
        let [magic, version, n0, n1, k0, k1, stamp_width, reserved, words @ ..] = *header;
        let [b0, b1, b2, b3, b4, b5, b6, b7, ..] = words;
        if magic != MAGIC {
            return Err(BlockError::Magic);
        }
        if version != VERSION {
            return Err(BlockError::Version(version));
        }
        if reserved != 0 {
            return Err(BlockError::Malformed("reserved byte is set"));
        }

        let entries = usize::from(u16::from_be_bytes([n0, n1]));
        let key_width = u16::from_be_bytes([k0, k1]);
        let mut rest = body;
        let prefixes = take(&mut rest, entries)?;
        let rests = take(&mut rest, entries)?;
        let stamps = match stamp_width {
            0 => Stamps::Equal,
            1 => Stamps::One(take::<1>(&mut rest, entries)?.as_flattened()),
            2 => Stamps::Two(take(&mut rest, entries)?),
            4 => Stamps::Four(take(&mut rest, entries)?),
            8 => Stamps::Eight(take(&mut rest, entries)?),
            _ => return Err(BlockError::Malformed("unknown stamp width")),
        };
        let row_digests = take(&mut rest, entries)?;
        let keys = match key_width {
            VARIABLE_KEYS => Keys::variable(take(&mut rest, entries)?, rest)?,
            _ => Keys::fixed(key_width.into(), entries, rest)?,
        };
        let base = u64::from_be_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
        Ok(BlockView { prefixes, rests, stamps, base, row_digests, keys })
    }

    /// How many entries there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.prefixes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.prefixes.is_empty()
    }

    /// All digests, in order.
    #[inline]
    pub fn digests(&self) -> impl ExactSizeIterator<Item = Digest> + use<'a> {
        let BlockView { prefixes, rests, .. } = *self;
        prefixes.iter().zip(rests).map(|(prefix, rest)| join(prefix, rest))
    }

    /// The digest of entry `i`.
    ///
    /// # Panics
    /// If there is no entry `i`.
    #[inline]
    pub fn digest(&self, i: usize) -> Digest {
        join(&self.prefixes[i], &self.rests[i])
    }

    /// Whether entry `i` has this digest; cheaper than [`BlockView::digest`], which reads another part of the block.
    ///
    /// # Panics
    /// If there is no entry `i`.
    #[inline]
    pub fn has_digest(&self, i: usize, digest: &Digest) -> bool {
        self.prefixes[i] == digest.0[..PREFIX_LEN] && self.rests[i] == digest.0[PREFIX_LEN..]
    }

    /// Ordinal and tombstone of entry `i`.
    ///
    /// # Panics
    /// If there is no entry `i`.
    #[inline]
    pub fn stamp(&self, i: usize) -> Stamp {
        let delta = match self.stamps {
            Stamps::Equal => 0,
            Stamps::One(deltas) => deltas[i].into(),
            Stamps::Two(deltas) => u16::from_be_bytes(deltas[i]).into(),
            Stamps::Four(deltas) => u32::from_be_bytes(deltas[i]).into(),
            Stamps::Eight(deltas) => u64::from_be_bytes(deltas[i]),
        };
        Stamp::unpack(self.base.wrapping_add(delta))
    }

    /// Entry `i`.
    ///
    /// # Panics
    /// If there is no entry `i`.
    #[inline]
    pub fn entry(&self, i: usize) -> Entry<'a> {
        Entry {
            digest: self.digest(i),
            stamp: self.stamp(i),
            row_digest: self.row_digests[i],
            key: self.keys.get(i),
        }
    }

    /// All entries of `digest`; an empty range if there is none.
    #[inline]
    pub fn find(&self, digest: &Digest) -> Range<usize> {
        let start = self.lower_bound(digest, 0);
        let same = (start..self.len()).take_while(|i| self.has_digest(*i, digest)).count();
        start..start + same
    }

    /// The first entry at or after `from` whose digest is not below `digest`; [`BlockView::len`] if all are.
    ///
    /// Digests are uniform, so a guess by proportion lands within about √n of the place (half a dozen
    /// entries); from there the search doubles its steps, so it takes O(log n) steps whatever the digests.
    #[inline]
    pub fn lower_bound(&self, digest: &Digest, from: usize) -> usize {
        let (Some(prefixes), Some(rests)) = (self.prefixes.get(from..), self.rests.get(from..)) else {
            return self.len();
        };
        let (prefix, rest) = (digest.prefix(), &digest.0[PREFIX_LEN..]);
        let at = |i: usize| u64::from_be_bytes(prefixes[i]);
        let below = |i: usize| match at(i) {
            found if found == prefix => rests[i][..] < *rest,
            found => found < prefix,
        };
        let Some(end) = prefixes.len().checked_sub(1) else { return self.len() };
        if !below(0) {
            return from;
        }
        if below(end) {
            return self.len();
        }

        // From here on entry `low` is below the digest and entry `high` is not.
        let (mut low, mut high) = (0, end);
        let first = at(0);
        let span = at(end).wrapping_sub(first) as f64;
        let part = prefix.wrapping_sub(first) as f64;
        let guess = ((part / span * high as f64) as usize).clamp(low, high);
        let mut step = 2;
        if below(guess) {
            low = guess;
            while low + step < high && below(low + step) {
                low += step;
                step *= 2;
            }
            high = high.min(low + step);
        } else {
            high = guess;
            while high > low + step && !below(high - step) {
                high -= step;
                step *= 2;
            }
            low = low.max(high.saturating_sub(step));
        }
        while high - low > 1 {
            let middle = low.midpoint(high);
            if below(middle) {
                low = middle;
            } else {
                high = middle;
            }
        }
        from + high
    }
}

impl<'a> Keys<'a> {
    fn fixed(width: usize, entries: usize, bytes: &'a [u8]) -> Result<Keys<'a>, BlockError> {
        if width > MAX_KEY_BYTES || bytes.len() != width * entries {
            return Err(BlockError::Malformed("wrong length"));
        }
        Ok(Keys::Fixed { width, bytes })
    }

    fn variable(ends: &'a [[u8; 2]], bytes: &'a [u8]) -> Result<Keys<'a>, BlockError> {
        let mut last = 0;
        for end in ends {
            let end = u16::from_be_bytes(*end);
            if end < last {
                return Err(BlockError::Malformed("key offsets go backwards"));
            }
            last = end;
        }
        match bytes.len() == usize::from(last) {
            true => Ok(Keys::Variable { ends, bytes }),
            false => Err(BlockError::Malformed("wrong length")),
        }
    }

    #[inline]
    fn get(&self, i: usize) -> &'a [u8] {
        match *self {
            Keys::Fixed { width, bytes } => &bytes[i * width..(i + 1) * width],
            Keys::Variable { ends, bytes } => {
                let end = |i: usize| usize::from(u16::from_be_bytes(ends[i]));
                let start = if i == 0 { 0 } else { end(i - 1) };
                &bytes[start..end(i)]
            }
        }
    }
}

#[inline]
fn join(prefix: &[u8; PREFIX_LEN], rest: &[u8; REST_LEN]) -> Digest {
    let mut digest = [0; Digest::LEN];
    digest[..PREFIX_LEN].copy_from_slice(prefix);
    digest[PREFIX_LEN..].copy_from_slice(rest);
    Digest(digest)
}

/// Takes `entries` × `N` bytes off the front.
fn take<'a, const N: usize>(rest: &mut &'a [u8], entries: usize) -> Result<&'a [[u8; N]], BlockError> {
    let (head, tail) = rest.split_at_checked(entries * N).ok_or(BlockError::Malformed("wrong length"))?;
    *rest = tail;
    Ok(head.as_chunks().0)
}
