//! Rows of a target, found by packed keys.
use pg_dedup_record::layout::Layout;
use pgrx::pg_sys;

use crate::error::Result;
use crate::hash::rows::{self, RowView, View};
use crate::keyset::{KeyTypes, column_list, qualified_name};
use crate::planning::ByIndex;
use crate::sql::required;

/// Which rows are found, and whether they stay as they are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// Those that the statement sees.
    Statement,
    /// Those there are now.
    Latest,
    /// Those there are now, locked until the transaction ends: nobody changes them or comes to point at them.
    Locked,
}

/// Calls `visit` with the rows under these keys, and each key's position.
///
/// # Errors
/// 22P03 for a malformed key; what `visit` returns.
pub fn rows_under(
    reading: Reading,
    table: pg_sys::Oid,
    layout: &Layout,
    key_types: &KeyTypes,
    keys: &[&[u8]],
    mut visit: impl FnMut(usize, &RowView<'_>) -> Result<()>,
) -> Result<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let _plan = ByIndex::new();
    let (view, lock) = match reading {
        Reading::Statement => (View::Statement, ""),
        Reading::Latest => (View::Latest, ""),
        Reading::Locked => (View::Latest, "FOR UPDATE OF t"),
    };
    let query = format!(
        "SELECT {}, k.n FROM {} JOIN {} AS t ON {} {lock}",
        column_list(layout, "t"),
        key_types.unnest(),
        qualified_name(table),
        key_types.join_condition()
    );
    rows::scan_in(view, &query, &key_types.arrays(keys)?, layout, 1, |row| {
        visit(required(row.trailing::<i64>(0)?)? as usize - 1, &row)
    })?;
    Ok(())
}
