//! The exact look-up: which of these sorted digests stand in a target's segments, and where.
//!
//! One merge over the sorted blocks of each segment, or a seek a digest where there are so few of them that touching
//! every block would cost more. No verdict rests on anything but 32 equal bytes in a block whose checksum holds.
use std::ops::ControlFlow;

use pg_dedup_record::block::{BlockView, Entry};

use crate::error::Result;
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader, Segment};

/// A seek costs about as much as merging past this many blocks (index descent and rescan against one sequential block).
const SEEK_COST_IN_BLOCKS: usize = 12;

/// Sorted distinct digests, packed.
pub type Digests<'a> = &'a [[u8; 32]];

/// Where a digest stands, or stood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Ordinal of the entry.
    pub ordinal: u64,
    /// Says that the digest no longer stands there.
    pub tombstone: bool,
    /// Packed key of the row.
    pub key: Vec<u8>,
}

/// Calls `hit(i, entry)` for entries of `digests[i]`, for every `i` in `wanted` (ascending), in segments that hold `oldest` or a later ordinal. `Break` from `hit` settles that digest: its
/// further entries are not looked for.
///
/// # Errors
/// XX001 for a damaged block, 42501 without SELECT on the segment tables; what `hit` returns.
pub fn for_each_hit(
    target: i32,
    digests: Digests<'_>,
    wanted: &[u32],
    oldest: i64,
    snapshot: &Snapshot,
    mut hit: impl FnMut(u32, &Entry<'_>) -> Result<ControlFlow<()>>,
) -> Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    // The table is opened before the segment list is read: a compaction that commits in between is then seen by both or neither.
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut open = wanted.to_vec();
    let mut reader = BlockReader::new(&blocks, snapshot)?;
    for segment in segment::segments_of(target, snapshot)?.into_iter().filter(|s| s.last_ordinal >= oldest) {
        if open.is_empty() {
            break;
        }
        let mut settled = Vec::new();
        let mut on_hit = |i: u32, entry: &Entry<'_>| -> Result<()> {
            if hit(i, entry)?.is_break() && settled.last() != Some(&i) {
                settled.push(i);
            }
            Ok(())
        };
        if open.len() * SEEK_COST_IN_BLOCKS < segment.blocks as usize {
            seek(&mut reader, &segment, digests, &open, &mut on_hit)?;
        } else {
            merge(&mut reader, &segment, digests, &open, &mut on_hit)?;
        }
        if !settled.is_empty() {
            let mut settled = settled.into_iter().peekable();
            open.retain(|i| settled.next_if_eq(i).is_none());
        }
    }
    Ok(())
}

type OnHit<'a> = dyn FnMut(u32, &Entry<'_>) -> Result<()> + 'a;

fn merge(
    reader: &mut BlockReader<'_>,
    segment: &Segment,
    digests: Digests<'_>,
    open: &[u32],
    hit: &mut OnHit<'_>,
) -> Result<()> {
    let mut next = 0;
    reader.start(segment.id);
    while let Some(block) = reader.next()? {
        pgrx::check_for_interrupts!();
        let Some(last) = block.len().checked_sub(1) else { continue };
        let (first, last) = (block.digest_bytes(0), block.digest_bytes(last));
        while open.get(next).is_some_and(|&i| &digests[i as usize] < first) {
            next += 1;
        }
        let mut from = 0;
        let mut at = next;
        while let Some(&i) = open.get(at).filter(|&&i| &digests[i as usize] <= last) {
            from = visit(&block, from, i, digests, hit)?;
            at += 1;
        }
        // A digest equal to the block's last may go on in the next block.
        next = if at > next && &digests[open[at - 1] as usize] == last { at - 1 } else { at };
        if next == open.len() {
            break;
        }
    }
    Ok(())
}

/// Visits the entries of one digest in a block; returns where the next digest's search may begin.
fn visit(
    block: &BlockView<'_>,
    from: usize,
    i: u32,
    digests: Digests<'_>,
    hit: &mut OnHit<'_>,
) -> Result<usize> {
    let digest = segment::digest(&digests[i as usize]);
    let mut at = block.lower_bound(&digest, from);
    while at < block.len() && block.digest_bytes(at) == digest.as_bytes() {
        hit(i, &block.entry(at))?;
        at += 1;
    }
    Ok(at)
}

fn seek(
    reader: &mut BlockReader<'_>,
    segment: &Segment,
    digests: Digests<'_>,
    open: &[u32],
    hit: &mut OnHit<'_>,
) -> Result<()> {
    for &i in open {
        pgrx::check_for_interrupts!();
        let wanted = &digests[i as usize];
        reader.seek(segment.id, wanted);
        while let Some(block) = reader.previous()? {
            visit(&block, 0, i, digests, hit)?;
            // Entries of one digest may begin in an earlier block only if this one begins with it.
            if block.is_empty() || block.digest_bytes(0) < wanted {
                break;
            }
        }
    }
    Ok(())
}

/// Which of `wanted` are present: for some key, the highest ordinal is an entry and not a tombstone, and the key is not among
/// `leaving`, the places this chunk is about to overwrite (sorted).
///
/// # Errors
/// As [`for_each_hit`].
pub fn present(
    target: i32,
    digests: Digests<'_>,
    wanted: &[u32],
    leaving: &[([u8; 32], Vec<u8>)],
    snapshot: &Snapshot,
) -> Result<Vec<bool>> {
    let mut found = vec![false; digests.len()];
    if wanted.is_empty() {
        return Ok(found);
    }
    let segments = segment::segments_of(target, snapshot)?;
    if leaving.is_empty() && segments.iter().all(|s| s.tombstones == 0) {
        for_each_hit(target, digests, wanted, 0, snapshot, |i, _| {
            found[i as usize] = true;
            Ok(ControlFlow::Break(()))
        })?;
        return Ok(found);
    }
    for (i, places) in places(target, digests, wanted, snapshot)? {
        let digest = &digests[i as usize];
        found[i as usize] = places.iter().any(|p| !is_leaving(leaving, digest, &p.key));
    }
    Ok(found)
}

fn is_leaving(leaving: &[([u8; 32], Vec<u8>)], digest: &[u8; 32], key: &[u8]) -> bool {
    leaving.binary_search_by(|(d, k)| (d, k.as_slice()).cmp(&(digest, key))).is_ok()
}

/// Where each wanted digest stands now, if anywhere: for each key its highest ordinal, unless that is a tombstone. Ascending by digest, places by
/// key.
///
/// # Errors
/// As [`for_each_hit`].
pub fn places(
    target: i32,
    digests: Digests<'_>,
    wanted: &[u32],
    snapshot: &Snapshot,
) -> Result<Vec<(u32, Vec<Place>)>> {
    places_since(target, digests, wanted, 0, snapshot)
}

/// As [`places`], from the segments that hold entries of `oldest` or a later ordinal.
///
/// # Errors
/// As [`for_each_hit`].
pub fn places_since(
    target: i32,
    digests: Digests<'_>,
    wanted: &[u32],
    oldest: i64,
    snapshot: &Snapshot,
) -> Result<Vec<(u32, Vec<Place>)>> {
    let mut all: std::collections::BTreeMap<u32, Vec<Place>> = std::collections::BTreeMap::new();
    for_each_hit(target, digests, wanted, oldest, snapshot, |i, entry| {
        all.entry(i).or_default().push(Place {
            ordinal: entry.stamp.ordinal,
            tombstone: entry.stamp.tombstone,
            key: entry.key.to_vec(),
        });
        Ok(ControlFlow::Continue(()))
    })?;
    let mut all: Vec<(u32, Vec<Place>)> = all.into_iter().collect();
    for (_, places) in &mut all {
        pgrx::check_for_interrupts!();
        keep_standing(places);
    }
    all.retain(|(_, places)| !places.is_empty());
    Ok(all)
}

/// Keeps of each key the last word, unless it is a tombstone. Of equal ordinals the entry is it: the row was rewritten with the same content.
fn keep_standing(places: &mut Vec<Place>) {
    places.sort_unstable_by(|a, b| (&a.key, a.ordinal, !a.tombstone).cmp(&(&b.key, b.ordinal, !b.tombstone)));
    // From behind, so that the last of each key is met first.
    places.reverse();
    places.dedup_by(|earlier, last| earlier.key == last.key);
    places.retain(|place| !place.tombstone);
    places.reverse();
}
