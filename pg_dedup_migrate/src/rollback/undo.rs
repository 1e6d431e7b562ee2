//! One finish is taken back.
use std::collections::HashSet;
use std::ops::ControlFlow;

use pg_dedup_record::block::{Entry, Stamp};
use pg_dedup_record::digest::Digest;
use pgrx::prelude::*;

use super::Undone;
use super::awaited;
use super::look::{Alone, Findings, look};
use super::restore::restore;
use super::step::{Done, Plan, Step, Written};
use crate::by_key::{Reading, rows_under};
use crate::chunk;
use crate::error::{Error, Result};
use crate::hash::rows;
use crate::index::Target;
use crate::keyset::{column_list, qualified_name};
use crate::lookup;
use crate::planning::ByIndex;
use crate::references::{self, Which};
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, Segment, SegmentWriter};
use crate::shmem::filter;
use crate::sql::required;

/// Takes a finish back; `None`: a newer one that touched one of its rows comes first.
///
/// # Errors
/// As `dedup.undo_ordinal`.
pub fn undo(step: &Step, careful: bool) -> Result<Option<Undone>> {
    awaited::give_up(step)?;
    let snapshot = Snapshot::latest();
    let segments = step.segments(&snapshot)?;
    let done = Done::load(step, &segments, &snapshot)?;
    let (plan, findings) = if careful || step.overwritten {
        let Some((plan, findings)) = look(step, &done)? else { return Ok(None) };
        (plan, findings)
    } else {
        (trusting(step, &done)?, Findings::default())
    };
    let deleted = delete(step, &plan.delete)?;
    let restored = restore(step, &plan)?;
    awaited::hand_over(step, &plan)?;
    forget(step, &segments, &findings)?;
    Ok(Some(Undone { deleted, restored, left_alone: findings.alone.len() as i64 }))
}

fn not_as_written(step: &Step) -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
        format!("a row of {} is not what was written", qualified_name(step.target.table)),
    )
}

/// The plan if every row is what was written. Rows to be restored are looked at first, rows to be deleted when they are.
fn trusting<'a>(step: &Step, done: &'a Done) -> Result<Plan<'a>> {
    let Target { table, layout, key_types, .. } = &step.target;
    let mut plan = Plan::default();
    let mut replaced: Vec<&Written> = Vec::new();
    for row in &done.written {
        match &row.replaced {
            Some(image) => {
                replaced.push(row);
                plan.update.push(&image.key);
            }
            None => plan.delete.push((&row.key, Some(row))),
        }
    }
    let mut same = 0;
    rows_under(Reading::Locked, *table, layout, key_types, &plan.update, |n, row| {
        same += usize::from(row.row_digest()?.short() == replaced[n].row_digest);
        Ok(())
    })?;
    plan.insert = done.removed.iter().map(|image| image.key.as_slice()).collect();
    let mut occupied = false;
    rows_under(Reading::Latest, *table, layout, key_types, &plan.insert, |_, _| {
        occupied = true;
        Ok(())
    })?;
    if same == replaced.len() && !occupied && done.unknown.is_empty() {
        Ok(plan)
    } else {
        Err(not_as_written(step))
    }
}

fn delete(step: &Step, rows: &[(&[u8], Option<&Written>)]) -> Result<i64> {
    if rows.is_empty() {
        return Ok(0);
    }
    let Target { table, layout, key_types, .. } = &step.target;
    let keys: Vec<&[u8]> = rows.iter().map(|(key, _)| *key).collect();
    if !references::of(*table, Which::All)?.is_empty() {
        // No row may come to point at them between the check and the deletion, which might take it along.
        rows_under(Reading::Locked, *table, layout, key_types, &keys, |_, _| Ok(()))?;
        references::refuse_pointed_at(*table, key_types, &keys)?;
    }
    let _plan = ByIndex::new();
    let query = format!(
        "DELETE FROM {} AS t USING {} WHERE {} RETURNING {}, k.n",
        qualified_name(*table),
        key_types.unnest(),
        key_types.join_condition(),
        column_list(layout, "t")
    );
    let mut same = true;
    let deleted = rows::scan(&query, &key_types.arrays(&keys)?, layout, 1, |row| {
        if let (_, Some(written)) = rows[required(row.trailing::<i64>(0)?)? as usize - 1] {
            same &= row.row_digest()?.short() == written.row_digest;
        }
        Ok(())
    })?;
    if !same || deleted != rows.len() as u64 {
        // Of rows that were looked at before, and locked, none can have changed.
        return Err(if rows.iter().any(|(_, unchecked)| unchecked.is_some()) {
            not_as_written(step)
        } else {
            Error::state(format!(
                "{deleted} of {} rows of {} could be deleted",
                rows.len(),
                qualified_name(*table)
            ))
            .hint("look for a trigger, rule or policy that hides or keeps rows of the target")
        });
    }
    Ok(deleted.cast_signed())
}

/// Takes entries, ledger and images of the finish away; enters what the index has to say of the rows that were left alone.
fn forget(step: &Step, segments: &[Segment], findings: &Findings) -> Result<()> {
    segment::delete(segments)?;
    segment::write_tombstones(step.target.id, taken_away(step, findings)?)?;
    tell_index(step, findings)?;
    let ordinal = step.ordinal.cast_signed();
    let kept: Vec<Vec<u8>> = findings
        .alone
        .iter()
        .filter_map(|alone| alone.image.as_ref())
        .map(|image| image.key.clone())
        .collect();
    // Whoever mends a row by hand still finds what it was.
    Spi::run_with_args(
        "DELETE FROM dedup.before_images WHERE ordinal = $1 AND key <> ALL ($2)",
        &[ordinal.into(), kept.into()],
    )?;
    forget_lists(ordinal)?;
    report(step, &findings.alone)
}

/// The contents that others took away from a row, but for those that they wrote there again: a row whose other columns alone they changed holds
/// its content still.
fn taken_away(step: &Step, findings: &Findings) -> Result<Vec<(Digest, u64, Vec<u8>)>> {
    let mut taken = findings.tombstones.clone();
    let (digests, wanted) = lookup::distinct(taken.iter().map(|(content, ..)| *content));
    let mut written: HashSet<(Digest, u64, Vec<u8>)> = HashSet::new();
    lookup::for_each_hit(step.target.id, &digests, &wanted, 0, &Snapshot::latest(), |_, entry| {
        if !entry.stamp.tombstone {
            written.insert((entry.digest, entry.stamp.ordinal, entry.key.to_vec()));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    taken.retain(|tombstone| !written.contains(tombstone));
    Ok(taken)
}

/// Takes away what the finish dropped as duplicates or found unchanged.
///
/// # Errors
/// 42501 without the privileges of a worker.
pub fn forget_lists(ordinal: i64) -> Result<()> {
    for table in ["ledger_block", "unchanged_rows"] {
        Spi::run_with_args(&format!("DELETE FROM dedup.{table} WHERE ordinal = $1"), &[ordinal.into()])?;
    }
    Ok(())
}

/// What the index says from now on, under an ordinal that is nobody's: rows that are left alone stand like rows that stood there before any run;
/// what they would have been again stands nowhere, nor does what was overwritten.
fn tell_index(step: &Step, findings: &Findings) -> Result<()> {
    let mut entries: Vec<Word<'_>> = Vec::new();
    for alone in &findings.alone {
        if let Some((digests, key)) = &alone.stands {
            entries.push((digests.content, false, digests.row.short(), key));
        }
        if let Some(image) = alone.image.as_ref().filter(|image| alone.content != Some(image.content)) {
            entries.push((image.content, true, [0; Digest::SHORT_LEN], &image.key));
        }
    }
    entries.extend(findings.buried.iter().map(|(content, key)| (*content, true, [0; 8], key.as_slice())));
    if entries.is_empty() {
        return Ok(());
    }
    let ordinal = segment::nobodys_ordinal(step.target.id)?;
    enter(step.target.id, ordinal.cast_unsigned(), entries)
}

/// What the index is to say of a place: content, whether it is gone, the beginning of the row's digest, key.
pub type Word<'a> = (Digest, bool, [u8; Digest::SHORT_LEN], &'a [u8]);

/// Enters these into the index, in a segment of their own.
///
/// # Errors
/// 42501 without the privileges of a worker.
pub fn enter(target: i32, ordinal: u64, mut entries: Vec<Word<'_>>) -> Result<()> {
    entries.sort_unstable();
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, target, 0)?;
    for &(digest, tombstone, row_digest, key) in &entries {
        let stamp = Stamp { ordinal, tombstone };
        writer.push(&Entry { digest, stamp, row_digest, key })?;
    }
    let mut contents: Vec<[u8; 32]> = entries.iter().map(|(digest, ..)| digest.0).collect();
    contents.dedup();
    // Without shared memory there is no filter that could miss them.
    if crate::shmem::attached().is_ok() {
        filter::set_sorted(chunk::scope(target), contents.iter(), &mut Vec::new())?;
    }
    writer.finish(&segments)?;
    Ok(())
}

/// Names the rows that are left alone, and why.
///
/// # Errors
/// SPI's own.
pub fn report(step: &Step, alone: &[Alone]) -> Result<()> {
    if alone.is_empty() {
        return Ok(());
    }
    let texts = alone
        .iter()
        .map(|a| match a.key.is_empty() {
            true => Ok(None),
            false => step.target.key_types.query_string(&a.key).map(Some),
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Spi::run_with_args(
        "INSERT INTO dedup.left_alone (rollback_id, run_id, chunk_id, target_id, ordinal, key, packed_key, content_hash, reason) \
         SELECT $1, $2, $3, $4, $5, u.key, u.packed, u.content, u.reason \
         FROM ROWS FROM (pg_catalog.unnest($6), pg_catalog.unnest($7), pg_catalog.unnest($8), pg_catalog.unnest($9)) AS u(key, packed, content, reason)",
        &[
            step.rollback.into(),
            step.run.into(),
            step.chunk.as_str().into(),
            step.target.id.into(),
            step.ordinal.cast_signed().into(),
            texts.into(),
            alone
                .iter()
                .map(|a| Some(a.key.clone()).filter(|key| !key.is_empty()))
                .collect::<Vec<_>>()
                .into(),
            alone.iter().map(|a| a.written.map(|digest| digest.0.to_vec())).collect::<Vec<_>>().into(),
            alone.iter().map(|a| a.reason.name().to_owned()).collect::<Vec<_>>().into(),
        ],
    )?)
}
