//! Hashing in the server: the canonical bytes of stored values, and the digests over them.
//!
//! ```text
//! types   what a column type looks like on the wire      (catalog → SendPlan)
//! send    the send bytes of a row's values               (datums  → byte slices)
//! layout  which columns of a target make up which digest (pg_attribute → Layout)
//! rows    a query's rows, hashed as the executor emits them
//! sql     content_hash() and the checksum functions
//! ```
//!
//! The bytes and their order are those of a binary COPY row, so that a worker that hashes what it forwards and
//! these functions, which hash what is stored, are two implementations of one definition and check each other.

mod encoding;
pub mod layout;
pub mod rows;
pub mod send;
pub mod sql;
pub mod types;

#[cfg(any(test, feature = "pg_test"))]
mod tests;
