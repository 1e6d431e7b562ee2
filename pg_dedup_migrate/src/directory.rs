//! Where the blocks of a segment lie, kept by each backend: a look-up then goes straight to the one block that can hold a digest.
//!
//! A segment is immutable and its id is never used again, so what was read of it once stays true for as long as its row in `dedup.segment` is
//! seen and the file of `dedup.segment_block` is the same. Memory: 16 bytes a block, about 0.09 a key.
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use pg_dedup_record::block::{self, BlockView};
use pgrx::pg_sys;

use crate::error::Result;
use crate::relation::{Condition, EntryScan, Fetcher, Position, Snapshot, Table};
use crate::segment::{self, BLOCK_INDEX, Segment};

/// Blocks that a backend remembers at most, 128 MB worth; look-ups in segments beyond go through the index.
const LIMIT: usize = 8 << 20;

/// A look-up through the index costs about as much as reading so many entries of it.
const SEEK_COST_IN_BLOCKS: usize = 64;

/// The blocks of one segment in order of digest.
pub struct Directory {
    segment: i64,
    /// First eight bytes of each block's first digest.
    prefixes: Vec<u64>,
    positions: Vec<Position>,
    /// Blocks whose checksum this backend has verified: once is enough, and after that a look-up touches only the digests it compares.
    verified: Vec<Cell<bool>>,
}

thread_local! {
    // A backend has one thread. No borrow is held while the server could raise an error.
    static KNOWN: RefCell<Known> = RefCell::new(Known::default());
}

/// What this backend remembers.
#[derive(Default)]
struct Known {
    /// The file of `dedup.segment_block` that positions are about.
    file: pg_sys::Oid,
    segments: HashMap<i64, Memory>,
    blocks: usize,
}

/// What it remembers of one segment.
struct Memory {
    target: i32,
    /// Digests sought before there was a directory.
    sought: usize,
    directory: Option<Rc<Directory>>,
}

/// The directory of a segment in which so many digests are about to be looked up; `None` where it does not pay yet, or does not fit.
///
/// # Errors
/// XX001 when the index does not hold as many blocks as the segment has.
pub fn of(
    target: i32,
    segment: &Segment,
    blocks: &Table,
    snapshot: &Snapshot,
    digests: usize,
) -> Result<Option<Rc<Directory>>> {
    let (file, count) = (blocks.file(), segment.blocks as usize);
    let (known, wanted) = KNOWN.with_borrow_mut(|known| {
        if known.file != file {
            *known = Known { file, ..Known::default() };
        }
        let fits = known.blocks + count <= LIMIT;
        let memory =
            known.segments.entry(segment.id).or_insert(Memory { target, sought: 0, directory: None });
        memory.sought = memory.sought.saturating_add(digests);
        let pays = memory.sought.saturating_mul(SEEK_COST_IN_BLOCKS) >= count;
        (memory.directory.clone(), pays && fits)
    });
    if known.is_some() || !wanted {
        return Ok(known);
    }
    let directory = Rc::new(Directory::read(segment, blocks, snapshot)?);
    KNOWN.with_borrow_mut(|known| {
        if let Some(memory) = known.segments.get_mut(&segment.id) {
            memory.directory = Some(directory.clone());
            known.blocks += count;
        }
    });
    Ok(Some(directory))
}

/// Forgets segments of a target that are not among its segments now: compaction has merged them.
pub fn forget_merged(target: i32, alive: &[Segment]) {
    KNOWN.with_borrow_mut(|Known { segments, blocks, .. }| {
        if segments.values().filter(|memory| memory.target == target).count() > alive.len() {
            segments.retain(|id, memory| memory.target != target || alive.iter().any(|s| s.id == *id));
            *blocks = segments.values().filter_map(|memory| memory.directory.as_ref()).map(|d| d.len()).sum();
        }
    });
}

impl Directory {
    fn read(segment: &Segment, blocks: &Table, snapshot: &Snapshot) -> Result<Self> {
        let count = segment.blocks as usize;
        let mut directory = Self {
            segment: segment.id,
            prefixes: Vec::with_capacity(count),
            positions: Vec::with_capacity(count),
            verified: vec![Cell::new(false); count],
        };
        let mut entries =
            EntryScan::new(blocks, BLOCK_INDEX, snapshot, &[Condition::int8_eq(1, segment.id)])?;
        while let Some((position, prefix)) = entries.next(2)? {
            pgrx::check_for_interrupts!();
            directory.prefixes.push(u64::from_be_bytes(prefix));
            directory.positions.push(position);
        }
        if directory.len() != count {
            return Err(segment::damaged(segment.id)
                .detail(format!("It has {count} blocks, of which the index finds {}.", directory.len())));
        }
        Ok(directory)
    }

    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.prefixes.len()
    }

    /// First eight bytes of the first digest of block `at`.
    pub fn prefix(&self, at: usize) -> Option<u64> {
        self.prefixes.get(at).copied()
    }

    /// The first block from `from` on that can hold digests with this prefix; others may follow it.
    pub fn seek(&self, prefix: u64, from: usize) -> usize {
        block::first_to_hold(&self.prefixes, prefix, from)
    }

    /// Reads block `at`.
    ///
    /// # Errors
    /// XX001 when it is damaged, or lies elsewhere.
    pub fn block<'f>(&self, at: usize, fetcher: &'f mut Fetcher<'_>) -> Result<BlockView<'f>> {
        let row = fetcher.fetch(self.positions[at]).ok_or_else(|| segment::damaged(self.segment))?;
        let view = segment::parse(&row, self.verified[at].get())?;
        if (row.int8(1)?, row.int4(2)?) != (self.segment, at as i32) {
            return Err(segment::damaged(self.segment).detail(format!("Block {at} is not where it was.")));
        }
        self.verified[at].set(true);
        Ok(view)
    }
}
