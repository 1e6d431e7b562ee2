//! The orphan pass: duplicates that were dropped in favour of a row which is gone since.
//!
//! A run that overwrites or removes rows retracts their digests. Whoever was dropped as a duplicate of such a content, in whatever chunk came
//! first, would be lost if no other row holds it. No run is done before the chunks of its own losers have been done again.
use std::collections::HashSet;

use pgrx::Uuid;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::error::Result;
use crate::index::targets_of;
use crate::ledger;
use crate::lookup::{self, Leaving};
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader};
use crate::sql::required;

/// `dedup.orphans`: chunks, of every standing run on the targets of this one, whose ledger names contents that were retracted and stand
/// nowhere any more, and how many records each.
///
/// # Errors
/// XX001 for a damaged block, 42501 without SELECT on dedup's tables.
#[pg_extern(volatile, parallel_unsafe, strict)]
#[allow(clippy::type_complexity)] // the macro reads the columns from the type
fn orphans(
    run: Uuid,
) -> Result<
    TableIterator<'static, (name!(run_id, Uuid), name!(chunk_id, String), name!(records, i64))>,
    ErrorReport,
> {
    let mut found = Vec::new();
    for target in targets_of(run)? {
        let gone = vanished(target)?;
        if !gone.is_empty() {
            found.extend(losers(target, &gone)?);
        }
    }
    Ok(TableIterator::new(found))
}

/// Digests that were retracted from a target and stand nowhere in it now.
fn vanished(target: i32) -> Result<HashSet<[u8; 32]>> {
    let snapshot = Snapshot::latest();
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut reader = BlockReader::new(&blocks, &snapshot)?;
    let mut retracted: Vec<[u8; 32]> = Vec::new();
    for segment in segment::segments_of(target, &snapshot)?.into_iter().filter(|s| s.tombstones > 0) {
        segment::for_each_entry(&mut reader, segment.id, |entry| {
            if entry.stamp.tombstone {
                retracted.push(*entry.digest.as_bytes());
            }
            Ok(())
        })?;
    }
    retracted.sort_unstable();
    retracted.dedup();
    let wanted: Vec<u32> = (0..retracted.len() as u32).collect();
    let present = lookup::present(target, &retracted, &wanted, Leaving::default(), &snapshot)?;
    Ok(retracted.into_iter().zip(present).filter(|(_, present)| !present).map(|(digest, _)| digest).collect())
}

/// Chunks whose ledger lines name one of these contents. Runs that were given up or rolled back have no claim on their losers.
fn losers(target: i32, gone: &HashSet<[u8; 32]>) -> Result<Vec<(Uuid, String, i64)>> {
    Spi::connect(|client| {
        let mut chunks: Vec<(Uuid, String, i64)> = Vec::new();
        let mut cursor = client.open_cursor(
            "SELECT o.run_id, o.chunk_id, l.entries FROM dedup.ledger_block AS l JOIN dedup.ordinals AS o USING (ordinal) \
             JOIN dedup.runs AS r ON r.run_id = o.run_id \
             WHERE l.target_id = $1 AND r.status NOT IN ('cancelled', 'rolling_back', 'rolled_back') ORDER BY o.run_id, o.chunk_id",
            &[target.into()],
        );
        loop {
            let rows = cursor.fetch(64)?;
            if rows.is_empty() {
                return Ok(chunks);
            }
            for row in rows {
                let run: Uuid = required(row["run_id"].value()?)?;
                let chunk: String = required(row["chunk_id"].value()?)?;
                let entries: Vec<u8> = required(row["entries"].value()?)?;
                let view = ledger::parse(&entries)?;
                let lost = view.digests().filter(|d| gone.contains(d.as_bytes())).count() as i64;
                match chunks.last_mut() {
                    _ if lost == 0 => {}
                    Some((last_run, last, count)) if (*last_run, &*last) == (run, &chunk) => *count += lost,
                    _ => chunks.push((run, chunk, lost)),
                }
            }
        }
    })
}
