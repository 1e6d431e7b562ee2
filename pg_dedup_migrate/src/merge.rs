//! Segments read side by side, in order of digest and ordinal.
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use pg_dedup_record::block::{Entry, Stamp};
use pg_dedup_record::digest::Digest;

use crate::error::Result;
use crate::lookup::{self, Place};
use crate::pace;
use crate::relation::{Snapshot, Table};
use crate::segment::{BlockReader, Segment};

/// An entry at the head of its segment, ordered as segments are. Its key stays in the source's buffer.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Head {
    digest: Digest,
    ordinal: u64,
    tombstone: bool,
    source: usize,
    row_digest: [u8; Digest::SHORT_LEN],
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
            pace::point();
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

/// Several segments as one sorted list of entries; memory: a block of each.
pub struct Merge<'a> {
    sources: Vec<Source<'a>>,
    heads: BinaryHeap<Reverse<Head>>,
    /// The prefix to end before.
    until: Option<u64>,
}

impl<'a> Merge<'a> {
    /// Begins with the first entry of each of `segments`, in `blocks` (an open `dedup.segment_block`) as the snapshot sees it.
    ///
    /// # Errors
    /// XX001 for a damaged block.
    pub fn new<'s>(
        blocks: &'a Table,
        segments: impl IntoIterator<Item = &'s Segment>,
        snapshot: &'a Snapshot,
    ) -> Result<Self> {
        let mut merge = Self { sources: Vec::new(), heads: BinaryHeap::new(), until: None };
        for (number, segment) in segments.into_iter().enumerate() {
            let mut reader = BlockReader::new(blocks, snapshot)?;
            reader.start(segment.id);
            let mut source = Source { reader, number, heads: Vec::new(), keys: Vec::new() };
            merge.heads.extend(source.next()?.map(Reverse));
            merge.sources.push(source);
        }
        Ok(merge)
    }

    /// Ends before the first digest whose prefix is this or higher.
    pub fn until(self, prefix: Option<u64>) -> Self {
        Self { until: prefix, ..self }
    }

    /// Calls `visit` with every content, all that is said about it, and where it stands now. Both are sorted: by ordinal, and by key.
    ///
    /// # Errors
    /// As [`Merge::for_each`].
    pub fn for_each_content(
        self,
        mut visit: impl FnMut(&Digest, &[Place], &[Place]) -> Result<()>,
    ) -> Result<()> {
        let mut current: Option<Digest> = None;
        // What is said about the current content: the first `count` of these. The others keep their memory.
        let (mut said, mut count): (Vec<Place>, usize) = (Vec::new(), 0);
        let mut close = |digest: &Digest, said: &[Place]| match said {
            // The rule.
            [only] if !only.tombstone => visit(digest, said, said),
            several => {
                let mut standing = several.to_vec();
                lookup::keep_standing(&mut standing);
                visit(digest, said, &standing)
            }
        };
        self.for_each(|entry| {
            if current != Some(entry.digest) {
                if let Some(digest) = current.replace(entry.digest) {
                    close(&digest, &said[..count])?;
                }
                count = 0;
            }
            match said.get_mut(count) {
                Some(place) => place.set(entry),
                None => said.push(Place::of(entry)),
            }
            count += 1;
            Ok(())
        })?;
        match current {
            Some(digest) => close(&digest, &said[..count]),
            None => Ok(()),
        }
    }

    /// Calls `visit` with every entry, in order.
    ///
    /// # Errors
    /// XX001 for a damaged block; what `visit` returns.
    pub fn for_each(mut self, mut visit: impl FnMut(&Entry<'_>) -> Result<()>) -> Result<()> {
        while let Some(mut first) = self.heads.peek_mut() {
            let Reverse(head) = &*first;
            if self.until.is_some_and(|until| head.digest.prefix() >= until) {
                break;
            }
            let source = &mut self.sources[head.source];
            visit(&Entry {
                digest: head.digest,
                stamp: Stamp { ordinal: head.ordinal, tombstone: head.tombstone },
                row_digest: head.row_digest,
                key: &source.keys[head.key.0..head.key.1],
            })?;
            match source.next()? {
                Some(next) => *first = Reverse(next),
                None => drop(PeekMut::pop(first)),
            }
        }
        Ok(())
    }
}
