//! The exact look-up: which of these sorted digests stand in a target's segments, and where.
//!
//! Both are sorted, so one walk over a segment's [`Directory`] reads each block that can hold one of them once, and no other. A few digests in a
//! segment that this backend does not know go through the index. No verdict rests on anything but 32 equal bytes in a block whose checksum
//! holds.
use std::collections::BTreeMap;
use std::ops::ControlFlow;

use pg_dedup_record::block::{BlockView, Entry};
use pg_dedup_record::digest::Digest;

use crate::directory::{self, Directory};
use crate::error::Result;
use crate::pace;
use crate::relation::{Access, Fetcher, Snapshot, Table};
use crate::segment::{self, BlockReader, Segment};

/// Sorted distinct digests, packed.
pub type Digests<'a> = &'a [[u8; 32]];

/// Digests as a look-up takes them: sorted, each once, all of them wanted.
pub fn distinct(contents: impl Iterator<Item = Digest>) -> (Vec<[u8; 32]>, Vec<u32>) {
    let mut digests: Vec<[u8; 32]> = contents.map(|digest| digest.0).collect();
    digests.sort_unstable();
    digests.dedup();
    let wanted = (0..digests.len() as u32).collect();
    (digests, wanted)
}

/// Where a digest stands, or stood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Ordinal of the entry.
    pub ordinal: u64,
    /// Says that the digest no longer stands there.
    pub tombstone: bool,
    /// Beginning of the row's digest.
    pub row_digest: [u8; Digest::SHORT_LEN],
    /// Packed key of the row.
    pub key: Vec<u8>,
}

impl Place {
    /// What an entry says.
    pub fn of(entry: &Entry<'_>) -> Self {
        Self {
            ordinal: entry.stamp.ordinal,
            tombstone: entry.stamp.tombstone,
            row_digest: entry.row_digest,
            key: entry.key.to_vec(),
        }
    }

    /// Becomes what another entry says.
    pub fn set(&mut self, entry: &Entry<'_>) {
        self.ordinal = entry.stamp.ordinal;
        self.tombstone = entry.stamp.tombstone;
        self.row_digest = entry.row_digest;
        self.key.clear();
        self.key.extend_from_slice(entry.key);
    }
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
    let mut fetcher = Fetcher::new(&blocks, snapshot);
    let segments = segment::segments_of(target, snapshot)?;
    directory::forget_merged(target, &segments);
    for segment in segments.iter().filter(|s| s.last_ordinal >= oldest) {
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
        match directory::of(target, segment, &blocks, snapshot, open.len())? {
            Some(directory) => walk(&directory, &mut fetcher, digests, &open, &mut on_hit)?,
            None => seek(&mut reader, segment, digests, &open, &mut on_hit)?,
        }
        if !settled.is_empty() {
            let mut settled = settled.into_iter().peekable();
            open.retain(|i| settled.next_if_eq(i).is_none());
        }
    }
    Ok(())
}

type OnHit<'a> = dyn FnMut(u32, &Entry<'_>) -> Result<()> + 'a;

/// Visits, block by block, the entries of the open digests.
fn walk(
    directory: &Directory,
    fetcher: &mut Fetcher<'_>,
    digests: Digests<'_>,
    open: &[u32],
    hit: &mut OnHit<'_>,
) -> Result<()> {
    let digest = |next: usize| open.get(next).map(|&i| Digest(digests[i as usize]));
    let (mut next, mut at) = (0, 0);
    while let Some(sought) = digest(next) {
        pace::point();
        at = directory.seek(sought.prefix(), at);
        let block = directory.block(at, fetcher)?;
        at += 1;
        let following = directory.prefix(at);
        let (mut from, mut spanning) = (0, None);
        while let Some(sought) = digest(next).filter(|s| following.is_none_or(|f| s.prefix() <= f)) {
            from = visit(&block, from, open[next], &sought, hit)?;
            if following == Some(sought.prefix()) {
                spanning.get_or_insert(next);
            }
            next += 1;
        }
        // The next block begins with the prefix of these: their entries may stand in it, or go on there.
        next = spanning.unwrap_or(next);
        if following.is_none() {
            break;
        }
    }
    Ok(())
}

/// Visits the entries of one digest in a block; returns where the next digest's search may begin.
fn visit(block: &BlockView<'_>, from: usize, i: u32, digest: &Digest, hit: &mut OnHit<'_>) -> Result<usize> {
    let mut at = block.lower_bound(digest, from);
    while at < block.len() && block.has_digest(at, digest) {
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
        pace::point();
        let wanted = Digest(digests[i as usize]);
        reader.seek(segment.id, wanted.as_bytes());
        while let Some(block) = reader.previous()? {
            visit(&block, 0, i, &wanted, hit)?;
            // Entries of one digest may begin in an earlier block only if this one begins with it.
            if block.is_empty() || block.digest(0) < wanted {
                break;
            }
        }
    }
    Ok(())
}

/// A content and the key of a row that holds it, or should.
pub type Subject = ([u8; 32], Vec<u8>);

/// Places that don't count: those that a chunk is about to overwrite.
#[derive(Clone, Copy, Default)]
pub struct Leaving<'a> {
    /// The places, sorted.
    pub places: &'a [Subject],
    /// Those of them that are said to hold their content by an entry which no row bears out, sorted, with its ordinal: a later entry counts.
    pub stale: &'a [(Subject, u64)],
}

impl Leaving<'_> {
    fn has(&self, digest: &[u8; 32], place: &Place) -> bool {
        let subject = (digest, place.key.as_slice());
        if self.places.binary_search_by(|(d, k)| (d, k.as_slice()).cmp(&subject)).is_err() {
            return false;
        }
        match self.stale.binary_search_by(|((d, k), _)| (d, k.as_slice()).cmp(&subject)) {
            Ok(at) => place.ordinal <= self.stale[at].1,
            Err(_) => true,
        }
    }
}

/// Which of `wanted` are present: for some key, the highest ordinal is an entry and not a tombstone, and the place is not leaving.
///
/// # Errors
/// As [`for_each_hit`].
pub fn present(
    target: i32,
    digests: Digests<'_>,
    wanted: &[u32],
    leaving: Leaving<'_>,
    snapshot: &Snapshot,
) -> Result<Vec<bool>> {
    let mut found = vec![false; digests.len()];
    if wanted.is_empty() {
        return Ok(found);
    }
    let segments = segment::segments_of(target, snapshot)?;
    if leaving.places.is_empty() && segments.iter().all(|s| s.tombstones == 0) {
        for_each_hit(target, digests, wanted, 0, snapshot, |i, _| {
            found[i as usize] = true;
            Ok(ControlFlow::Break(()))
        })?;
        return Ok(found);
    }
    for (i, places) in places(target, digests, wanted, snapshot)? {
        let digest = &digests[i as usize];
        found[i as usize] = places.iter().any(|p| !leaving.has(digest, p));
    }
    Ok(found)
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
        all.entry(i).or_default().push(Place::of(entry));
        Ok(ControlFlow::Continue(()))
    })?;
    let mut all: Vec<(u32, Vec<Place>)> = all.into_iter().collect();
    for (_, places) in &mut all {
        pace::point();
        keep_standing(places);
    }
    all.retain(|(_, places)| !places.is_empty());
    Ok(all)
}

/// Keeps of each key the last word, unless it is a tombstone. Of equal ordinals the entry is it: the row was rewritten with the same content.
pub fn keep_standing(places: &mut Vec<Place>) {
    places.sort_unstable_by(|a, b| (&a.key, a.ordinal, !a.tombstone).cmp(&(&b.key, b.ordinal, !b.tombstone)));
    // From behind, so that the last of each key is met first.
    places.reverse();
    places.dedup_by(|earlier, last| earlier.key == last.key);
    places.retain(|place| !place.tombstone);
    places.reverse();
}

/// What the index has of each of these rows (content, key), if anything.
///
/// # Errors
/// XX001 for a damaged block.
pub fn owners(target: i32, rows: &[(Digest, Vec<u8>)]) -> Result<Vec<Option<Place>>> {
    let (digests, wanted) = distinct(rows.iter().map(|(digest, _)| *digest));
    let found: BTreeMap<u32, Vec<Place>> =
        places(target, &digests, &wanted, &Snapshot::latest())?.into_iter().collect();
    Ok(rows
        .iter()
        .map(|(digest, key)| {
            let at = digests.binary_search(digest.as_bytes()).ok()?;
            found.get(&(at as u32))?.iter().find(|p| p.key == *key).cloned()
        })
        .collect())
}
