//! Compaction: the entries of a level's segments move into one segment of the next level, so that a look-up touches few.
//!
//! One transaction writes the merged segment and deletes the old ones: every snapshot sees all of the old or the new one. Entries keep their
//! ordinals, so a run's entries can still be told apart. Nothing is dropped here: a tombstone stays, with what it covers.
use std::cmp::Reverse;
use std::collections::BinaryHeap;

use pg_dedup_record::block::{Entry, Stamp};
use pg_dedup_record::digest::Digest;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::error::Result;
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader, Segment, SegmentWriter};

/// Segments of one level that are merged into one of the next.
const FAN_OUT: usize = 32;

/// `dedup.compact_step`: merges one full level of one target, if there is one; says whether there was.
///
/// # Errors
/// XX001 for a damaged block; 42501 without the privileges of a worker.
#[pg_extern(volatile, parallel_unsafe, strict)]
fn compact_step(target_id: i32) -> Result<bool, ErrorReport> {
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
    let snapshot = Snapshot::latest();
    let segments = segment::segments_of(target_id, &snapshot)?;
    let Some(level) = due(&segments) else { return Ok(false) };
    let mut old: Vec<&Segment> = segments.iter().filter(|s| s.level == level).collect();
    old.sort_by_key(|s| s.id);
    old.truncate(FAN_OUT);
    merge(target_id, level + 1, &old, &snapshot)?;
    let ids: Vec<i64> = old.iter().map(|s| s.id).collect();
    Spi::run_with_args("DELETE FROM dedup.segment_block WHERE segment_id = ANY ($1)", &[ids.clone().into()])?;
    Spi::run_with_args("DELETE FROM dedup.segment WHERE segment_id = ANY ($1)", &[ids.into()])?;
    Ok(true)
}

/// The lowest level with at least [`FAN_OUT`] segments.
fn due(segments: &[Segment]) -> Option<i32> {
    let highest = segments.iter().map(|s| s.level).max()?;
    (0..=highest).find(|&level| segments.iter().filter(|s| s.level == level).count() >= FAN_OUT)
}

/// An entry at the head of its segment, ordered as segments are. Its key stays in the source's buffer.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Head {
    digest: Digest,
    ordinal: u64,
    tombstone: bool,
    source: usize,
    row_digest: [u8; 8],
    key: (usize, usize),
}

/// One segment being read; memory: the entries of one block.
struct Source<'a> {
    reader: BlockReader<'a>,
    number: usize,
    /// The block's entries, last first.
    heads: Vec<Head>,
    /// Their keys, one behind the other.
    keys: Vec<u8>,
}

impl Source<'_> {
    /// The next entry. What the one before it says of its key is no longer true then.
    fn next(&mut self) -> Result<Option<Head>> {
        if let Some(head) = self.heads.pop() {
            return Ok(Some(head));
        }
        self.keys.clear();
        while self.heads.is_empty() {
            pgrx::check_for_interrupts!();
            let Some(view) = self.reader.next()? else { return Ok(None) };
            for i in 0..view.len() {
                let entry = view.entry(i);
                let start = self.keys.len();
                self.keys.extend_from_slice(entry.key);
                self.heads.push(Head {
                    digest: entry.digest,
                    ordinal: entry.stamp.ordinal,
                    tombstone: entry.stamp.tombstone,
                    source: self.number,
                    row_digest: entry.row_digest,
                    key: (start, self.keys.len()),
                });
            }
            self.heads.reverse();
        }
        Ok(self.heads.pop())
    }
}

fn merge(target_id: i32, level: i32, old: &[&Segment], snapshot: &Snapshot) -> Result<()> {
    let read = Table::open("segment_block", Access::Read)?;
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, target_id, level)?;
    let mut sources = Vec::with_capacity(old.len());
    let mut heads = BinaryHeap::with_capacity(old.len());
    for (number, segment) in old.iter().enumerate() {
        let mut reader = BlockReader::new(&read, snapshot)?;
        reader.start(segment.id);
        let mut source = Source { reader, number, heads: Vec::new(), keys: Vec::new() };
        heads.extend(source.next()?.map(Reverse));
        sources.push(source);
    }
    while let Some(mut first) = heads.peek_mut() {
        let Reverse(head) = &*first;
        let source = &mut sources[head.source];
        let stamp = Stamp { ordinal: head.ordinal, tombstone: head.tombstone };
        let key = &source.keys[head.key.0..head.key.1];
        writer.push(&Entry { digest: head.digest, stamp, row_digest: head.row_digest, key })?;
        match source.next()? {
            Some(next) => *first = Reverse(next),
            None => drop(std::collections::binary_heap::PeekMut::pop(first)),
        }
    }
    writer.finish(&segments)?;
    Ok(())
}
