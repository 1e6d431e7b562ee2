//! Packed blocks of entries: what one row of `dedup.segment_block` and of `dedup.ledger_block` stores.
//!
//! Columns of entries, not rows of them: the first bytes of the digests stand together, so a search touches two or three
//! cache lines, and what is alike costs nothing (one ordinal for all: no bytes; keys of one length: no
//! offsets). With a bigint key and one ordinal an entry takes 48 bytes.
//!
//! ```text
//! 0   u8  magic 0xDB      u8  version       u16 entries n     u16 key width, 0xFFFF = variable
//! 6   u8  stamp width w   u8  0             u64 base stamp    u32 CRC-32 of all other bytes
//! 20  prefixes n × 8      first bytes of the digests, which ascend
//!     rests    n × 24     their other bytes
//!     stamps  n × w       (ordinal << 1 | tombstone) - base; w = 0, 1, 2, 4 or 8
//!     row digests n × 8   first bytes of each
//!     keys    n × width, or n × u16 end offsets and the bytes
//! ```
//!
//! All integers are big-endian.
mod build;
mod order;
#[cfg(test)]
mod tests;
mod view;

pub use build::BlockBuilder;
pub use order::first_to_hold;
pub use view::BlockView;

use crate::digest::Digest;

/// A block is never longer: with tuple header, block columns and line pointer it fills one 8 KB page.
pub const MAX_BLOCK_BYTES: usize = 8080;

/// The longest key an entry can have. PostgreSQL's own limit for an indexed key is lower (2704 bytes), but
/// that holds after compression.
pub const MAX_KEY_BYTES: usize = 4096;

const MAGIC: u8 = 0xdb;
const VERSION: u8 = 2;
const HEADER_LEN: usize = 20;
const CRC_AT: usize = 16;
const VARIABLE_KEYS: u16 = 0xffff;
const ROW_DIGEST_LEN: usize = Digest::SHORT_LEN;
const PREFIX_LEN: usize = 8;
const REST_LEN: usize = Digest::LEN - PREFIX_LEN;

/// Which finish wrote an entry, and whether it took it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// The number of the finish; below 2^63.
    pub ordinal: u64,
    /// The entry says that the digest no longer stands under its key.
    pub tombstone: bool,
}

impl Stamp {
    fn pack(self) -> Option<u64> {
        (self.ordinal >> 63 == 0).then_some(self.ordinal << 1 | u64::from(self.tombstone))
    }

    fn unpack(packed: u64) -> Stamp {
        Stamp { ordinal: packed >> 1, tombstone: packed & 1 == 1 }
    }
}

/// One entry of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Content digest.
    pub digest: Digest,
    /// Who wrote it.
    pub stamp: Stamp,
    /// The first bytes of the row digest.
    pub row_digest: [u8; ROW_DIGEST_LEN],
    /// Key bytes.
    pub key: &'a [u8],
}

/// Bytes that are not a block, or an entry that no block can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The bytes do not begin as a block does.
    #[error("not a block")]
    Magic,
    /// A block of another version.
    #[error("block has version {0}, expected {VERSION}")]
    Version(u8),
    /// The contents are not what was written.
    #[error("block checksum mismatch: stored {stored:08x}, computed {computed:08x}")]
    Crc {
        /// What the header says.
        stored: u32,
        /// What the bytes give.
        computed: u32,
    },
    /// The header and the rest of the block contradict each other.
    #[error("malformed block: {0}")]
    Malformed(&'static str),
    /// A key longer than [`MAX_KEY_BYTES`].
    #[error("key of {0} bytes is longer than {MAX_KEY_BYTES}")]
    KeyTooLong(usize),
    /// An ordinal that does not fit a stamp.
    #[error("ordinal {0} is out of range")]
    Ordinal(u64),
    /// An entry pushed after one that it sorts before.
    #[error("entries are not in order")]
    Unsorted,
}

/// Bytes a stamp takes when the largest delta is `span`.
fn stamp_width(span: u64) -> usize {
    match span {
        0 => 0,
        1..=0xff => 1,
        0x100..=0xffff => 2,
        0x1_0000..=0xffff_ffff => 4,
        _ => 8,
    }
}
