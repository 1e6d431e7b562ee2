//! The whole index of a target against its rows: what is left of entries without one when the chunks are repaired.
use pg_dedup_record::digest::Digest;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::stale::bury;
use crate::error::{Error, Result};
use crate::hash::rows;
use crate::index::{Target, targets_of};
use crate::indexing::lock_exclusively;
use crate::keyset::{every_row, hash_of};
use crate::lookup::{Place, Subject};
use crate::merge::Merge;
use crate::passes::Passes;
use crate::relation::{Access, Snapshot, Table};
use crate::segment;

/// `dedup.retract_stale`: takes every entry that no row bears out out of the index of a run's targets; returns how many.
///
/// # Errors
/// XX001 for a damaged block, 55000 where a target's files were replaced.
#[pg_extern(volatile, parallel_unsafe, strict)]
pub fn retract_stale(run: pgrx::Uuid) -> Result<i64, ErrorReport> {
    let mut retracted = 0;
    for target in targets_of(run)? {
        // Exclusively: nobody may be told that a content is there while its entry is about to be retracted.
        lock_exclusively(target)?;
        Spi::run_with_args("SELECT dedup.refuse_replaced($1)", &[target.into()]).map_err(Error::from)?;
        retracted += without_row(&Target::by_id(target)?)?;
    }
    Ok(retracted)
}

/// Compares entries with rows, as many at a time as fit `maintenance_work_mem`: those of a range of digests, by one scan of the target.
fn without_row(target: &Target) -> Result<i64> {
    let snapshot = Snapshot::latest();
    let blocks = Table::open("segment_block", Access::Read)?;
    let segments = segment::segments_of(target.id, &snapshot)?;
    let most = segment::most_entries(&segments);
    let query = every_row(&target.layout, target.table);
    let mut retracted = 0;
    for pass in Passes::of(most, size_of::<([u8; 32], u64)>() + 1).each() {
        let each = |visit: &mut dyn FnMut(&Digest, &Place) -> Result<()>| {
            Merge::new(&blocks, &segments, &snapshot)?.for_each_content(|digest, _, standing| {
                if !pass.has(digest.as_bytes()) {
                    return Ok(());
                }
                standing.iter().try_for_each(|place| visit(digest, place))
            })
        };
        let mut expected: Vec<([u8; 32], u64)> = Vec::new();
        each(&mut |digest, place| {
            expected.push((digest.0, hash_of(&[&place.key])));
            Ok(())
        })?;
        expected.sort_unstable();
        let mut found = vec![false; expected.len()];
        let mut key = Vec::new();
        rows::scan(&query, &[], &target.layout, 0, |row| {
            key.clear();
            row.write_key(&mut key)?;
            let subject = (row.digests()?.content.0, hash_of(&[&key]));
            if let Ok(at) = expected.binary_search(&subject) {
                found[at] = true;
            }
            Ok(())
        })?;
        let mut gone: Vec<Subject> = Vec::new();
        each(&mut |digest, place| {
            let at = expected.binary_search(&(digest.0, hash_of(&[&place.key])));
            if at.is_ok_and(|at| !found[at]) {
                gone.push((digest.0, place.key.clone()));
            }
            Ok(())
        })?;
        retracted += gone.len() as i64;
        bury(target.id, gone)?;
    }
    Ok(retracted)
}
