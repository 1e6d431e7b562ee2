//! Compaction: the entries of a level's segments move into one segment of the next level, so that a look-up touches few.
//!
//! One transaction writes the merged segment and deletes the old ones: every snapshot sees all of the old or the new one. Entries keep their
//! ordinals, so a run's entries can still be told apart. Nothing is dropped here: a tombstone stays, with what it covers.
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::error::Result;
use crate::merge::Merge;
use crate::pace;
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, Segment, SegmentWriter};

/// Segments of one level that are merged into one of the next.
const FAN_OUT: usize = 32;

/// `dedup.compact_step`: merges one full level of one target, if there is one; says whether there was.
///
/// # Errors
/// XX001 for a damaged block; 42501 without the privileges of a worker.
#[pg_extern(volatile, parallel_unsafe, strict)]
fn compact_step(target_id: i32) -> Result<bool, ErrorReport> {
    let _pace = pace::of_target(target_id)?;
    Ok(step(target_id)?)
}

fn step(target_id: i32) -> Result<bool> {
    if due(&segment::segments_of(target_id, &Snapshot::latest())?).is_none() {
        return Ok(false);
    }
    // One compaction a target at a time, none while the index is rebuilt or rolled back; whoever finds it taken has nothing to do.
    let locked = Spi::get_one_with_args::<bool>(
        "SELECT pg_catalog.pg_try_advisory_xact_lock(dedup.lock_class(), -$1) \
                AND pg_catalog.pg_try_advisory_xact_lock_shared(dedup.lock_class(), $1)",
        &[target_id.into()],
    )?;
    if locked != Some(true) {
        return Ok(false);
    }
    // A rollback has laid out the segments as it needs them.
    if Spi::get_one_with_args::<bool>("SELECT dedup.run_rolling_back($1) IS NOT NULL", &[target_id.into()])?
        == Some(true)
    {
        return Ok(false);
    }
    let snapshot = Snapshot::latest();
    let segments = segment::segments_of(target_id, &snapshot)?;
    let Some(level) = due(&segments) else { return Ok(false) };
    let mut old: Vec<Segment> = segments.into_iter().filter(|s| s.level == level).collect();
    old.sort_by_key(|s| s.id);
    old.truncate(FAN_OUT);
    merge(target_id, level + 1, &old, &snapshot)?;
    segment::delete(&old)?;
    Ok(true)
}

/// The lowest level with at least [`FAN_OUT`] segments.
fn due(segments: &[Segment]) -> Option<i32> {
    let highest = segments.iter().map(|s| s.level).max()?;
    (0..=highest).find(|&level| segments.iter().filter(|s| s.level == level).count() >= FAN_OUT)
}

fn merge(target_id: i32, level: i32, old: &[Segment], snapshot: &Snapshot) -> Result<()> {
    let read = Table::open("segment_block", Access::Read)?;
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, target_id, level)?;
    Merge::new(&read, old.iter(), snapshot)?.for_each(|entry| writer.push(entry))?;
    writer.finish(&segments)?;
    Ok(())
}
