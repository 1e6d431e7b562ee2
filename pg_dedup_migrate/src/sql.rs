//! What statements of this extension's own need: values that must be there, and the number of rows that a statement touched.
use pg_dedup_record::checksum::Checksum;
use pg_dedup_record::digest::Digest;
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;

use crate::error::{Error, Result};

/// Runs a statement with typed arguments; returns the rows it touched.
///
/// # Errors
/// SPI's own; an ERROR of the statement passes through.
pub fn execute(query: &str, arguments: &[DatumWithOid<'_>]) -> Result<i64> {
    Spi::connect_mut(|client| Ok(client.update(query, None, arguments)?.len() as i64))
}

/// The ordinals that a query answers, in its column `ordinal`.
///
/// # Errors
/// SPI's own.
pub fn ordinals<C: FromIterator<u64>>(query: &str, arguments: &[DatumWithOid<'_>]) -> Result<C> {
    Spi::connect(|client| {
        client
            .select(query, None, arguments)?
            .map(|row| Ok(required::<i64>(row["ordinal"].value()?)?.cast_unsigned()))
            .collect()
    })
}

/// A checksum as checkpoints keep it.
///
/// # Errors
/// XX001 when it is null or not 32 bytes.
pub fn stored_checksum(bytes: Option<Vec<u8>>) -> Result<Checksum> {
    let bytes: [u8; 32] = required(bytes)?
        .try_into()
        .map_err(|_| Error::corrupted("a checkpoint's checksum is not 32 bytes"))?;
    Ok(Checksum::from_bytes(&bytes))
}

/// A content hash as dedup's tables keep it.
///
/// # Errors
/// XX001 when it is null or not 32 bytes.
pub fn stored_digest(bytes: Option<Vec<u8>>) -> Result<Digest> {
    Digest::from_slice(&required(bytes)?)
        .ok_or_else(|| Error::corrupted("a stored content hash is not 32 bytes"))
}

/// A value that a NOT NULL column or an aggregate cannot leave out.
///
/// # Errors
/// XX001 when it is null all the same.
pub fn required<T>(value: Option<T>) -> Result<T> {
    value.ok_or_else(|| Error::corrupted("a value of a dedup table is null"))
}
