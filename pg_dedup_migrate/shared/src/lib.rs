//! What the hash index keeps in shared memory, as algorithms over plain memory.
//!
//! ```text
//!   content hash ──Scope::key──▶ Key { lead, fingerprint }
//!                                  │
//!                  ┌───────────────┴────────────────┐
//!          Filter (blocks of 64 bytes)      Partition (slots of 16 bytes), 128 of them
//!          was it ever written?             is it in flight, and whose is it?
//! ```
//!
//! The extension places these structures in the server's shared memory, gives [`claims::Table`] its
//! locks and calls [`book::Book`] from its transaction callbacks. Everything else is here, where it
//! can be tested without a server: nothing in this crate is `unsafe`, nothing knows PostgreSQL.
//!
//! # Why a record is written exactly once
//!
//! A transaction that wants to write content hash *h* goes through three steps, in this order:
//!
//! 1. **Probe** the filter, and the segments where the filter says "perhaps". No claim is made, so a
//!    hash that has long been written holds nobody up.
//! 2. **Claim** what is left, in one sweep ([`claims::sweep`]).
//! 3. **Recheck** what was claimed: set its filter bits. If all of them were set before, look it up in
//!    the segments with a snapshot taken after step 2.
//!
//! Take another transaction *W* that writes *h* too, and ask where *W*'s claim was when our sweep came
//! by its slot, under the lock of the partition:
//!
//! - *there*: the sweep answers [`claims::Claim::Held`], and we wait for *W* instead of writing;
//! - *dropped, W committed*: *W* set its filter bits before it committed, and dropped its claim after
//!   it had left the proc array, under the same partition lock that we took later. So its bits are
//!   visible to our step 3, which then takes a snapshot in which *W* is committed, and finds *h*;
//! - *dropped, W aborted*: its bits may be set, the look-up finds nothing, and we write, rightly;
//! - *not yet made*: then *W* meets ours, and the argument holds with the roles changed.
//!
//! The filter never says "absent" of a hash whose bits were set, because bits are only ever added and
//! it is not cleared while the server runs. It may say "perhaps" of any other, which costs a look-up and
//! never a record. The claims table compares 64 salted digest bits and the slot's home position; when
//! two different hashes share those, one is taken for the other and its transaction waits, or looks it
//! up, for nothing: no verdict rests on the claims table alone.
//!
//! An empty filter after a restart is not believed before it is *warm*: see [`warmth`].
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod book;
pub mod claims;
pub mod filter;
pub mod key;
pub mod partition;
pub mod prefetch;
pub mod warmth;

pub use key::{Key, Scope};
