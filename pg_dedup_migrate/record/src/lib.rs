//! Canonical records, digests, checksums, packed blocks and key ranges: what both sides of a migration,
//! the extension in the target database and the sidecar in front of it, have to agree on.
//!
//! ```text
//!   layout ─────────────┐  which columns are content, key, rest; how a type becomes canonical bytes
//!                       ▼
//!   COPY stream ──▶ pgcopy ──▶ record (canonical) ──▶ batch ──▶ groups of equal content, by digest
//!   in any pieces   tuples     content + row digest   one chunk        │
//!                                                       │              ▼
//!                        checksum ◀── sum of row digests┘      wire: digests, keys, manifest, ledger
//!                        the books                                     │
//!                                                                      ▼
//!   range: where chunks begin      write_plan: which rows      block: ~8 KB of sorted entries,
//!   in an ordered sample           to try after a refusal      what the hash index stores
//! ```
//!
//! The crate is pure: no server, no sockets, no clock, no `unsafe`. Everything that decodes bytes returns an
//! error for what it does not understand and never panics on it.
//!
//! | module | idea |
//! |---|---|
//! | [`digest`] | 32 bytes of SHA-256, ordered |
//! | [`checksum`] | order-free sum of digests, adds and subtracts |
//! | [`canonical`] | send bytes without what differs between clusters |
//! | [`layout`] | the columns of a table and their roles |
//! | [`record`] | the two digests of a record |
//! | [`pgcopy`] | binary COPY format |
//! | [`key`] | key columns as one byte string |
//! | [`wire`] | packed arguments of the worker protocol |
//! | [`block`] | packed sorted entries of the hash index and the ledger |
//! | [`batch`] | the rows of one chunk in memory, and their groups |
//! | [`fold`] | what becomes of each record of a chunk |
//! | [`delivery`] | the steps in which they reach the target |
//! | [`refusal`] | which errors lie in a record, and their names |
//! | [`write_plan`] | finding the rows that a target refuses |
//! | [`range`] | chunk boundaries from a sample |
//! | [`sql`] | quoting, and the condition that finds rows by key |
#![forbid(unsafe_code)]

pub mod batch;
pub mod block;
pub mod canonical;
pub mod checksum;
pub mod delivery;
pub mod digest;
pub mod fold;
pub mod key;
pub mod layout;
pub mod pgcopy;
pub mod range;
pub mod record;
pub mod refusal;
pub mod sql;
pub mod wire;
pub mod write_plan;

mod groups;
mod key_list;
#[cfg(test)]
mod samples;

pub use batch::{Batch, BatchBuilder, BatchError, Groups};
pub use canonical::{Canonical, CanonicalError};
pub use checksum::Checksum;
pub use digest::Digest;
pub use fold::Fold;
pub use layout::{Column, Layout, LayoutError};
pub use record::{ContentHasher, RecordDigests, RecordHasher};
pub use write_plan::WritePlan;

/// Version of the canonical encoding and of the digests made from it. Stored with every run and every
/// index: digests of different versions never compare.
pub const ENCODING_VERSION: u16 = 1;
