//! A table without a key: every row that the run wrote is found by one scan, by its content.
use std::collections::HashMap;

use pg_dedup_record::digest::Digest;

use super::look::{Alone, Reason};
use super::step::Step;
use super::undo::{forget_lists, report};
use super::{Undone, ordinals_left};
use crate::by_place;
use crate::error::Result;
use crate::passes::Passes;
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader};

/// Takes back all that leaves the target.
///
/// # Errors
/// 23503 when a foreign key points at one of the rows, XX001 for damaged state.
pub fn undo(step: &Step) -> Result<Undone> {
    let leaving = ordinals_left(step)?;
    let snapshot = Snapshot::latest();
    let mut segments = segment::segments_of(step.target.id, &snapshot)?;
    segments
        .retain(|s| s.first_ordinal == s.last_ordinal && leaving.contains(&s.last_ordinal.cast_unsigned()));
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut reader = BlockReader::new(&blocks, &snapshot)?;
    let entries = segment::most_entries(&segments);
    let mut undone = Undone::default();
    let mut alone: Vec<Alone> = Vec::new();
    for pass in Passes::of(entries, 96).each() {
        // How often each row, by content and beginning of its digest, was written.
        let mut written: HashMap<([u8; 32], [u8; 8]), u32> = HashMap::new();
        for segment in &segments {
            segment::for_each_entry(&mut reader, segment.id, |entry| {
                if !entry.stamp.tombstone && pass.has(entry.digest.as_bytes()) {
                    *written.entry((*entry.digest.as_bytes(), entry.row_digest)).or_default() += 1;
                }
                Ok(())
            })?;
        }
        let places = by_place::find(step.target.table, &step.target.layout, |row| {
            let digests = row.digests()?;
            let subject = (*digests.content.as_bytes(), digests.row.short());
            let Some(left) = written.get_mut(&subject) else { return Ok(false) };
            *left -= 1;
            if *left == 0 {
                written.remove(&subject);
            }
            Ok(true)
        })?;
        undone.deleted += by_place::delete(step.target.table, &places)?;
        for ((content, _), count) in written {
            alone.extend((0..count).map(|_| Alone {
                key: Vec::new(),
                image: None,
                written: Some(Digest(content)),
                stands: None,
                reason: Reason::Gone,
            }));
        }
    }
    segment::delete(&segments)?;
    for ordinal in leaving {
        forget_lists(ordinal.cast_signed())?;
    }
    report(step, &alone)?;
    undone.left_alone = alone.len() as i64;
    Ok(undone)
}
