//! The index laid out for a rollback: what leaves lies in segments of one finish each, which go when the finish is taken back.
//!
//! Compaction has merged many finishes into one segment. Taken apart once, each entry is written once; without that every step would write the
//! segments anew that its entries lie in.
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use pg_dedup_record::block::{Entry, Stamp};
use pg_dedup_record::digest::Digest;

use super::Part;
use super::heirs::{HandedOver, subject};
use crate::error::Result;
use crate::lookup::Place;
use crate::merge::Merge;
use crate::relation::{Access, Inserter, Snapshot, Table};
use crate::segment::{self, Segment, SegmentWriter};

/// Segments written at a time: each keeps a block in memory.
const WRITERS: usize = 4096;

/// Takes segments that hold entries of several finishes, some of which leave, apart. Entries of rows that were handed over are left out.
///
/// # Errors
/// XX001 for a damaged block, 42501 without the privileges of a worker.
pub fn split(part: &Part, handed_over: &HandedOver) -> Result<()> {
    let snapshot = Snapshot::latest();
    let segments = segment::segments_of(part.target.id, &snapshot)?;
    let (inherited, others): (Vec<Segment>, Vec<Segment>) = segments
        .into_iter()
        .partition(|s| handed_over.ordinals.contains_key(&s.last_ordinal.cast_unsigned()));
    let mixed: Vec<Segment> = others
        .into_iter()
        .filter(|s| {
            let is_one = s.first_ordinal == s.last_ordinal;
            part.overlaps(s) && !(is_one && inherited.is_empty() && handed_over.awaited.is_empty())
        })
        .collect();
    for segment in &mixed {
        take_apart(part, segment, &inherited, handed_over, &snapshot)?;
    }
    segment::delete(&mixed)
}

fn take_apart(
    part: &Part,
    segment: &Segment,
    inherited: &[Segment],
    handed_over: &HandedOver,
    snapshot: &Snapshot,
) -> Result<()> {
    let range = segment.first_ordinal.cast_unsigned()..=segment.last_ordinal.cast_unsigned();
    let leaving: Vec<u64> = part.ordinals.range(range).copied().collect();
    let read = Table::open("segment_block", Access::Read)?;
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let rows = Rc::new(RefCell::new(Inserter::new(&blocks)));
    let writer = |level| SegmentWriter::beside(rows.clone(), part.target.id, level);
    for (pass, some) in leaving.chunks(WRITERS).enumerate() {
        let mut stay = writer(segment.level)?;
        let mut leave: HashMap<u64, SegmentWriter<'_>> = HashMap::new();
        let all = std::iter::once(segment).chain(inherited);
        Merge::new(&read, all, snapshot)?.for_each_content(|digest, said, _| {
            for place in said.iter().filter(|p| !handed_over.ordinals.contains_key(&p.ordinal)) {
                let to = if !part.has(place.ordinal) {
                    if pass > 0 {
                        continue;
                    }
                    &mut stay
                } else if some.binary_search(&place.ordinal).is_ok()
                    && !is_handed_over(place, said, handed_over)
                {
                    match leave.entry(place.ordinal) {
                        std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                        std::collections::hash_map::Entry::Vacant(new) => new.insert(writer(0)?),
                    }
                } else {
                    continue;
                };
                to.push(&entry(digest, place))?;
            }
            Ok(())
        })?;
        stay.finish(&segments)?;
        for (_, writer) in leave {
            writer.finish(&segments)?;
        }
    }
    Ok(())
}

/// Whether an entry was handed over: another of its content and key was made of it, or of a later one whose row was written where none was left, or will be
/// when its row comes back.
pub fn is_handed_over(place: &Place, said: &[Place], handed_over: &HandedOver) -> bool {
    let is_made_of_it = |heir: &Place| {
        handed_over.ordinals.get(&heir.ordinal).is_some_and(|&writer| {
            writer == place.ordinal
                || writer > place.ordinal && !handed_over.replaced.contains(&subject(heir.ordinal, &heir.key))
        })
    };
    !place.tombstone
        && (handed_over.awaited.contains(&subject(place.ordinal, &place.key))
            || said.iter().any(|p| p.key == place.key && is_made_of_it(p)))
}

fn entry<'a>(digest: &Digest, place: &'a Place) -> Entry<'a> {
    Entry {
        digest: *digest,
        stamp: Stamp { ordinal: place.ordinal, tombstone: place.tombstone },
        row_digest: place.row_digest,
        key: &place.key,
    }
}
