//! Room on the server's disks, which no function of the server tells.
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::error::{Error, Result};

/// `dedup.disk_space`: bytes free to the server, and bytes in all, on the file systems of the data directory, `pg_wal` and every tablespace.
///
/// # Errors
/// 58030 where the file system cannot be asked.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)] // the macro reads the columns from the type
fn disk_space() -> Result<
    TableIterator<'static, (name!(place, String), name!(free_bytes, i64), name!(total_bytes, i64))>,
    ErrorReport,
> {
    // SAFETY: set when the server starts, and a string from then on.
    let data = unsafe { CStr::from_ptr(pgrx::pg_sys::DataDir) };
    let data = PathBuf::from(OsStr::from_bytes(data.to_bytes()));
    let mut places =
        vec![("data directory".to_owned(), data.clone()), ("pg_wal".to_owned(), data.join("pg_wal"))];
    for (name, path) in tablespaces()? {
        places.push((format!("tablespace {name}"), PathBuf::from(path)));
    }
    let rows = places.into_iter().map(|(place, path)| space(place, &path)).collect::<Result<Vec<_>>>()?;
    Ok(TableIterator::new(rows))
}

fn space(place: String, path: &Path) -> Result<(String, i64, i64)> {
    let found = rustix::fs::statvfs(path).map_err(|error| {
        Error::new(PgSqlErrorCode::ERRCODE_IO_ERROR, format!("the file system of {place} cannot be asked"))
            .detail(error.to_string())
    })?;
    let bytes = |blocks: u64| i64::try_from(blocks.saturating_mul(found.f_frsize)).unwrap_or(i64::MAX);
    Ok((place, bytes(found.f_bavail), bytes(found.f_blocks)))
}

/// Name and directory of every tablespace that has one of its own.
fn tablespaces() -> Result<Vec<(String, String)>> {
    Spi::connect(|client| {
        let rows = client.select(
            "SELECT spcname::pg_catalog.text AS name, pg_catalog.pg_tablespace_location(oid) AS path FROM pg_catalog.pg_tablespace \
             WHERE pg_catalog.pg_tablespace_location(oid) <> ''",
            None,
            &[],
        )?;
        rows.into_iter()
            .map(|row| {
                let name = crate::sql::required(row["name"].value()?)?;
                Ok((name, crate::sql::required(row["path"].value()?)?))
            })
            .collect()
    })
}
