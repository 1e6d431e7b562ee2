//! A table without a key: every row that the run wrote is found by one scan, by its content.
use std::collections::HashMap;

use pg_dedup_record::digest::Digest;

use super::look::{Alone, Reason};
use super::restore::restore_keyless;
use super::step::{Step, layouts};
use super::undo::{forget_lists, report};
use super::{Undone, ordinals_left};
use crate::by_place;
use crate::error::Result;
use crate::index::Target;
use crate::passes::Passes;
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader, Segment};

/// Takes back all that leaves the target.
///
/// # Errors
/// 23503 when a foreign key points at one of the rows, XX001 for damaged state.
pub fn undo(step: &Step) -> Result<Undone> {
    let leaving = ordinals_left(step)?;
    let mut segments = segment::segments_of(step.target.id, &Snapshot::latest())?;
    segments
        .retain(|s| s.first_ordinal == s.last_ordinal && leaving.contains(&s.last_ordinal.cast_unsigned()));
    let mut undone = Undone::default();
    let mut alone: Vec<Alone> = Vec::new();
    for (ordinals, target) in layouts(step, &leaving)? {
        // First, so that rows of the run which a repair of it deleted go with the others.
        undone.restored += restore_keyless(&target, &ordinals)?;
        let of_layout: Vec<Segment> =
            segments.iter().filter(|s| ordinals.contains(&s.last_ordinal.cast_unsigned())).cloned().collect();
        undone.deleted += delete(&target, &of_layout, &mut alone)?;
    }
    segment::delete(&segments)?;
    for ordinal in leaving {
        forget_lists(ordinal.cast_signed())?;
    }
    report(step, &alone)?;
    undone.left_alone = alone.len() as i64;
    Ok(undone)
}

/// Deletes the rows that these segments say were written; those that are gone are added to `alone`.
fn delete(target: &Target, segments: &[Segment], alone: &mut Vec<Alone>) -> Result<i64> {
    let blocks = Table::open("segment_block", Access::Read)?;
    let snapshot = Snapshot::latest();
    let mut reader = BlockReader::new(&blocks, &snapshot)?;
    let mut deleted = 0;
    for pass in Passes::of(segment::most_entries(segments), 192).each() {
        // A row that was gone and is written again is taken off under the ordinal that it was written under first.
        let mut taken_off: HashMap<([u8; 32], u64), u32> = HashMap::new();
        let mut entries: HashMap<([u8; 32], u64, [u8; 8]), u32> = HashMap::new();
        for segment in segments {
            segment::for_each_entry(&mut reader, segment.id, |entry| {
                let (digest, ordinal) = (*entry.digest.as_bytes(), entry.stamp.ordinal);
                if pass.has(&digest) && entry.stamp.tombstone {
                    *taken_off.entry((digest, ordinal)).or_default() += 1;
                } else if pass.has(&digest) {
                    *entries.entry((digest, ordinal, entry.row_digest)).or_default() += 1;
                }
                Ok(())
            })?;
        }
        // How often each row, by content and beginning of its digest, was written.
        let mut written: HashMap<([u8; 32], [u8; 8]), u32> = HashMap::new();
        for ((digest, ordinal, row_digest), mut count) in entries {
            if let Some(off) = taken_off.get_mut(&(digest, ordinal)) {
                let both = count.min(*off);
                (count, *off) = (count - both, *off - both);
            }
            if count > 0 {
                *written.entry((digest, row_digest)).or_default() += count;
            }
        }
        let places = by_place::find(target.table, &target.layout, |row| {
            let digests = row.digests()?;
            let subject = (*digests.content.as_bytes(), digests.row.short());
            let Some(left) = written.get_mut(&subject) else { return Ok(false) };
            *left -= 1;
            if *left == 0 {
                written.remove(&subject);
            }
            Ok(true)
        })?;
        deleted += by_place::delete(target.table, &places)?;
        for ((content, _), count) in written {
            alone.extend((0..count).map(|_| Alone {
                key: Vec::new(),
                image: None,
                written: Some(Digest(content)),
                stands: None,
                content: None,
                reason: Reason::Gone,
            }));
        }
    }
    Ok(deleted)
}
