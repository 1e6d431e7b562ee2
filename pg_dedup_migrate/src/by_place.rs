//! Rows of a table without a key: found by a scan, deleted by where they lie.
use pg_dedup_record::layout::Layout;
use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::hash::rows::{self, RowView};
use crate::keyset::{column_list, qualified_name};
use crate::references::{self, Which};
use crate::sql::{execute, required};

/// Rows deleted by one statement.
const BATCH: usize = 50_000;

/// Where a row lies: its table, which may be a partition, and its position there.
#[derive(Clone, Debug)]
pub struct Place {
    table: pg_sys::Oid,
    position: String,
}

/// Where the rows lie that `wants` picks.
///
/// # Errors
/// What `wants` returns; ERRORs of the scan pass through.
pub fn find(
    table: pg_sys::Oid,
    layout: &Layout,
    mut wants: impl FnMut(&RowView<'_>) -> Result<bool>,
) -> Result<Vec<Place>> {
    let query = format!(
        "SELECT {}, t.tableoid, t.ctid::pg_catalog.text FROM {} AS t",
        column_list(layout, "t"),
        qualified_name(table)
    );
    let mut places = Vec::new();
    rows::scan(&query, &[], layout, 2, |row| {
        if wants(&row)? {
            places.push(Place { table: required(row.trailing(0)?)?, position: required(row.trailing(1)?)? });
        }
        Ok(())
    })?;
    places.sort_by_key(|place| place.table.to_u32());
    Ok(places)
}

/// Deletes the rows at these places of `table`, as [`find`] has them; returns how many.
///
/// # Errors
/// 23503 when a foreign key points at one, 40001 when one has changed since.
pub fn delete(table: pg_sys::Oid, places: &[Place]) -> Result<i64> {
    let name = qualified_name(table);
    let references = references::of(table, Which::All)?;
    let mut deleted = 0;
    for some in places.chunk_by(|a, b| a.table == b.table).flat_map(|of_table| of_table.chunks(BATCH)) {
        let positions: Vec<String> = some.iter().map(|place| place.position.clone()).collect();
        let leaf = qualified_name(some[0].table);
        for reference in &references {
            let query = format!(
                "SELECT EXISTS (SELECT FROM ONLY {leaf} AS t JOIN {} AS r ON {} WHERE t.ctid = ANY ($1::pg_catalog.tid[]))",
                reference.referencing, reference.matches
            );
            if required(Spi::get_one_with_args::<bool>(&query, &[positions.clone().into()])?)? {
                return Err(reference.violated(&name));
            }
        }
        let count = execute(
            &format!("DELETE FROM ONLY {leaf} AS t WHERE t.ctid = ANY ($1::pg_catalog.tid[])"),
            &[positions.into()],
        )?;
        if count != some.len() as i64 {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
                format!("rows of {name} changed while they were deleted"),
            ));
        }
        deleted += count;
    }
    Ok(deleted)
}
