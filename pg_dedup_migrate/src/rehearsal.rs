//! What a rehearsal asks the target: what stands there already of the records that a run would bring. Nothing is written.
use pg_dedup_record::wire;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{JsonB, PgRelation};

use crate::by_key::{Reading, rows_under};
use crate::error::{Error, Result};
use crate::hash::layout::stored_layout;
use crate::index::may_read;
use crate::indexing::refuse_row_security;
use crate::keyset::KeyTypes;
use crate::lookup::{self, Leaving};
use crate::relation::Snapshot;

/// A row stands under the record's key.
const KEY: u8 = 1;
/// That row is the very record.
const SAME: u8 = 2;
/// The record's content stands in the target, by its hash index.
const CONTENT: u8 = 4;

/// `dedup.rehearse_records`: of each record, packed as docs/protocol.md has it for `reconcile_chunk`, one byte: 1 a row stands under its key, + 2 it
/// is the same, + 4 the hash index has its content. An index that was made for other columns, or none, has nothing.
///
/// # Errors
/// 42501 without SELECT on the target, 22023 for malformed records; what reading the target raises.
#[pg_extern(volatile, parallel_unsafe, strict)]
fn rehearse_records(target: PgRelation, layout: JsonB, records: &[u8]) -> Result<Vec<u8>, ErrorReport> {
    may_read(target.oid())?;
    let index = Spi::get_one_with_args::<i32>(
        "SELECT (SELECT g.target_id FROM dedup.targets AS g WHERE g.target = $1 AND g.signature = dedup.signature_of($2))",
        &[target.oid().into(), JsonB(layout.0.clone()).into()],
    )
    .map_err(Error::from)?;
    Ok(look(target.oid(), layout, index, records)?)
}

fn look(table: pgrx::pg_sys::Oid, layout: JsonB, index: Option<i32>, records: &[u8]) -> Result<Vec<u8>> {
    refuse_row_security(table, "cannot be foreseen")?;
    let layout = stored_layout(layout)?;
    layout.validate().map_err(|e| Error::invalid(format!("unusable layout: {e}")))?;
    let records: Vec<_> = wire::records(records)
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| Error::invalid(format!("malformed records: {e}")))?;
    let mut found = vec![0; records.len()];
    if !layout.key.is_empty() {
        let keyed: Vec<usize> = (0..records.len()).filter(|&i| records[i].key.is_some()).collect();
        let keys: Vec<&[u8]> = keyed.iter().filter_map(|&i| records[i].key).collect();
        let types = KeyTypes::of(table, &layout)?;
        rows_under(Reading::Statement, table, &layout, &types, &keys, |n, row| {
            let at = keyed[n];
            found[at] |= KEY;
            if row.digests()?.row == records[at].row {
                found[at] |= SAME;
            }
            Ok(())
        })?;
    }
    if let Some(index) = index {
        let (digests, wanted) = lookup::distinct(records.iter().map(|record| record.content));
        let snapshot = Snapshot::of_statement();
        let present = lookup::present(index, &digests, &wanted, Leaving::default(), &snapshot)?;
        for (record, found) in records.iter().zip(&mut found) {
            if digests.binary_search(record.content.as_bytes()).is_ok_and(|at| present[at]) {
                *found |= CONTENT;
            }
        }
    }
    Ok(found)
}
