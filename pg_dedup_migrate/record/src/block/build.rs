//! Writing blocks.
use super::{
    BlockError, CRC_AT, Entry, HEADER_LEN, MAGIC, MAX_BLOCK_BYTES, MAX_KEY_BYTES, PREFIX_LEN, ROW_DIGEST_LEN,
    VARIABLE_KEYS, VERSION, stamp_width,
};
use crate::digest::Digest;

/// Packs entries, pushed in order of digest and ordinal, into one block after another.
///
/// ```
/// # use pg_dedup_record::{Digest, block::{BlockBuilder, BlockError, BlockView, Entry, Stamp}};
/// # fn store(_: Vec<u8>) {}
/// # fn pack(entries: &[Entry<'_>]) -> Result<(), BlockError> {
/// let mut builder = BlockBuilder::new();
/// for entry in entries {
///     if !builder.try_push(entry)? {
///         store(builder.finish());
///         builder.try_push(entry)?; // an empty block has room for any entry
///     }
/// }
/// if !builder.is_empty() {
///     store(builder.finish());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default)]
pub struct BlockBuilder {
    digests: Vec<[u8; Digest::LEN]>,
    stamps: Vec<u64>,
    row_digests: Vec<[u8; ROW_DIGEST_LEN]>,
    keys: Vec<u8>,
    key_ends: Vec<u16>,
    /// Every key so far has the length of the first.
    same_width: bool,
    lowest: u64,
    highest: u64,
}

impl BlockBuilder {
    /// A builder with nothing in it.
    pub fn new() -> BlockBuilder {
        BlockBuilder::default()
    }

    /// Adds an entry; `false` if the block is full, and the entry then belongs into the next one. A block
    /// without entries has room for any.
    ///
    /// # Errors
    /// If the key or the ordinal is too large for any block, or the entry sorts before the last one by
    /// (digest, ordinal). The builder stays as it was.
    pub fn try_push(&mut self, entry: &Entry<'_>) -> Result<bool, BlockError> {
        if entry.key.len() > MAX_KEY_BYTES {
            return Err(BlockError::KeyTooLong(entry.key.len()));
        }
        let stamp = entry.stamp.pack().ok_or(BlockError::Ordinal(entry.stamp.ordinal))?;

        let (mut lowest, mut highest, mut same_width) = (stamp, stamp, true);
        if let (Some(digest), Some(last)) = (self.digests.last(), self.stamps.last()) {
            if (digest, last >> 1) > (&entry.digest.0, entry.stamp.ordinal) {
                return Err(BlockError::Unsorted);
            }
            lowest = lowest.min(self.lowest);
            highest = highest.max(self.highest);
            same_width = self.same_width && self.keys.len() == entry.key.len() * self.len();
        }

        let entries = self.len() + 1;
        let key_offset = if same_width { 0 } else { size_of::<u16>() };
        let fixed = Digest::LEN + stamp_width(highest - lowest) + ROW_DIGEST_LEN + key_offset;
        let key_end = self.keys.len() + entry.key.len();
        if HEADER_LEN + entries * fixed + key_end > MAX_BLOCK_BYTES {
            return Ok(false);
        }

        self.digests.push(entry.digest.0);
        self.stamps.push(stamp);
        self.row_digests.push(entry.row_digest);
        self.keys.extend_from_slice(entry.key);
        // Below MAX_BLOCK_BYTES, checked above.
        self.key_ends.push(key_end as u16);
        (self.lowest, self.highest, self.same_width) = (lowest, highest, same_width);
        Ok(true)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// How many entries there are in it.
    pub fn len(&self) -> usize {
        self.digests.len()
    }

    /// The digest of the first entry, by which the block is found.
    pub fn first_digest(&self) -> Option<Digest> {
        self.digests.first().copied().map(Digest)
    }

    /// The block of the entries so far, at most [`MAX_BLOCK_BYTES`] long; the builder is empty after it.
    pub fn finish(&mut self) -> Vec<u8> {
        let stamp_width = stamp_width(self.highest - self.lowest);
        let key_width = match (self.same_width, self.key_ends.first()) {
            (true, Some(width)) => *width,
            (false, Some(_)) => VARIABLE_KEYS,
            (_, None) => 0,
        };
        let mut block = Vec::with_capacity(MAX_BLOCK_BYTES);
        block.extend_from_slice(&[MAGIC, VERSION]);
        // An entry takes 40 bytes at least, so the count is far below 65,536.
        block.extend_from_slice(&(self.len() as u16).to_be_bytes());
        block.extend_from_slice(&key_width.to_be_bytes());
        block.extend_from_slice(&[stamp_width as u8, 0]);
        block.extend_from_slice(&self.lowest.to_be_bytes());
        block.extend_from_slice(&[0; HEADER_LEN - CRC_AT]);

        for digest in &self.digests {
            block.extend_from_slice(&digest[..PREFIX_LEN]);
        }
        for digest in &self.digests {
            block.extend_from_slice(&digest[PREFIX_LEN..]);
        }
        if stamp_width > 0 {
            for stamp in &self.stamps {
                let delta = (stamp - self.lowest).to_be_bytes();
                block.extend_from_slice(&delta[delta.len() - stamp_width..]);
            }
        }
        block.extend_from_slice(self.row_digests.as_flattened());
        if key_width == VARIABLE_KEYS {
            for end in &self.key_ends {
                block.extend_from_slice(&end.to_be_bytes());
            }
        }
        block.extend_from_slice(&self.keys);
        let crc = super::view::crc(&block);
        block[CRC_AT..HEADER_LEN].copy_from_slice(&crc.to_be_bytes());

        self.clear();
        block
    }

    /// Empties the builder and keeps its memory.
    fn clear(&mut self) {
        self.digests.clear();
        self.stamps.clear();
        self.row_digests.clear();
        self.keys.clear();
        self.key_ends.clear();
        (self.lowest, self.highest, self.same_width) = (0, 0, false);
    }
}
